//! A canvas with axes, on which lines, bars, points and cells are drawn as SVG.
//!
//! - Colours are classes: a page gives them its own, and a file of its own carries [`STYLE`], for light and dark.
//! - What is worth a look has a `<title>`, which viewers show when it is pointed at.
//! - Text from files is escaped where it is written.

use std::fmt::Write;

use crate::error::printable;

/// Colours that tell apart with any colour vision (Okabe and Ito 2008), and how often they come again with other dashes.
pub const COLOURS: usize = 7;

/// Most series that a legend names.
pub const NAMED: usize = 12;

/// The style of a file of its own.
pub const STYLE: &str = include_str!("figure.css");

/// `text` fit for SVG and HTML, its unprintable characters made visible.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if c == ' ' || c.is_ascii_graphic() || c.is_alphanumeric() => out.push(c),
            c => out.push_str(&printable(c.encode_utf8(&mut [0; 4]))),
        }
    }
    out
}

/// `text`, cut to so many characters from its front, which says least in a path.
pub fn shorten(text: &str, most: usize) -> String {
    let count = text.chars().count();
    if count <= most {
        return text.to_owned();
    }
    std::iter::once('…').chain(text.chars().skip(count - most + 1)).collect()
}

/// A number with so many significant digits as a reader needs.
pub fn number(value: f64) -> String {
    let magnitude = value.abs();
    if value == 0.0 {
        "0".into()
    } else if !(1e-3..1e6).contains(&magnitude) {
        let text = format!("{value:.1e}");
        text.replace(".0e", "e")
    } else {
        let digits = (3 - magnitude.log10().floor() as i32 - 1).clamp(0, 6) as usize;
        let text = format!("{value:.digits$}");
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
    }
}

/// A share as a percentage; the space before the sign does not break.
pub fn percent(share: f64) -> String {
    format!("{}\u{a0}%", number(share * 100.0))
}

/// From values to places.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    log: bool,
}

impl Scale {
    /// Where `value` lies.
    pub fn at(&self, value: f64) -> f64 {
        let (low, high, value) = match self.log {
            true => (self.low.log10(), self.high.log10(), value.max(f64::MIN_POSITIVE).log10()),
            false => (self.low, self.high, value),
        };
        let share = if high > low { ((value - low) / (high - low)).clamp(-0.02, 1.02) } else { 0.5 };
        self.from + share * (self.to - self.from)
    }

    /// Round values between the ends, about `count` of them.
    fn ticks(&self, count: usize) -> Vec<f64> {
        if self.log {
            let (first, last) = (self.low.log10().ceil() as i32, self.high.log10().floor() as i32);
            let step = ((last - first) / count.max(1) as i32 + 1).max(1);
            return (first..=last).step_by(step as usize).map(|exponent| 10f64.powi(exponent)).collect();
        }
        let span = self.high - self.low;
        if !(span > 0.0 && span.is_finite()) {
            return vec![self.low];
        }
        let rough = span / count.max(1) as f64;
        let unit = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 2.5, 5.0, 10.0].map(|m| m * unit).into_iter().find(|step| *step >= rough * 0.999);
        let step = step.unwrap_or(rough);
        let first = (self.low / step).ceil() as i64;
        (first..).map(|at| at as f64 * step).take_while(|tick| *tick <= self.high + step * 1e-9).collect()
    }
}

/// What an axis says.
pub struct Axis<'a> {
    /// Its name, with the unit.
    pub label: &'a str,
    /// Its ends.
    pub range: (f64, f64),
    /// Logarithmic.
    pub log: bool,
    /// How a value is written.
    pub format: fn(f64) -> String,
    /// Values to mark, instead of round ones.
    pub ticks: Option<Vec<(f64, String)>>,
}

impl<'a> Axis<'a> {
    /// A linear axis with round values.
    pub fn linear(label: &'a str, range: (f64, f64), format: fn(f64) -> String) -> Self {
        Self { label, range, log: false, format, ticks: None }
    }

    /// An axis with these marks.
    pub fn marked(label: &'a str, range: (f64, f64), ticks: Vec<(f64, String)>) -> Self {
        Self { label, range, log: false, format: number, ticks: Some(ticks) }
    }
}

/// A drawing.
pub struct Canvas {
    pub width: f64,
    pub height: f64,
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
    pub x: Scale,
    pub y: Scale,
    pub body: String,
}

impl Canvas {
    /// An empty drawing with margins around the plot.
    pub fn new(width: f64, height: f64, [top, right, bottom, left]: [f64; 4]) -> Self {
        let scale = |from, to| Scale { low: 0.0, high: 1.0, from, to, log: false };
        Self {
            width,
            height,
            left,
            right: width - right,
            top,
            bottom: height - bottom,
            x: scale(left, width - right),
            y: scale(height - bottom, top),
            body: String::new(),
        }
    }

    /// Draws both axes, and lines across the plot at the marks of y.
    pub fn axes(&mut self, x: &Axis<'_>, y: &Axis<'_>) {
        let scale =
            |axis: &Axis<'_>, from, to| Scale { low: axis.range.0, high: axis.range.1, from, to, log: axis.log };
        self.x = scale(x, self.left, self.right);
        self.y = scale(y, self.bottom, self.top);
        let marks = |axis: &Axis<'_>, scale: &Scale, count| match &axis.ticks {
            Some(ticks) => ticks.clone(),
            None => scale.ticks(count).into_iter().map(|tick| (tick, (axis.format)(tick))).collect(),
        };
        let (left, right, top, bottom) = (self.left, self.right, self.top, self.bottom);
        for (value, text) in marks(y, &self.y, 5) {
            let at = self.y.at(value);
            self.put(format_args!(r#"<path class="g" d="M{left:.1} {at:.1}H{right:.1}"/>"#));
            self.text(left - 7.0, at + 4.0, "m e", &text);
        }
        let x_marks = marks(x, &self.x, 6);
        for (value, text) in x_marks {
            let at = self.x.at(value);
            self.put(format_args!(r#"<path class="ax" d="M{at:.1} {bottom:.1}v4"/>"#));
            self.text(at, bottom + 17.0, "m c", &text);
        }
        self.put(format_args!(r#"<path class="ax" d="M{left:.1} {bottom:.1}H{right:.1}"/>"#));
        self.text((left + right) / 2.0, bottom + 35.0, "t c", x.label);
        self.text(4.0, top - 13.0, "t", y.label);
    }

    /// Text; `class` may hold `c` (centred) or `e` (ends there).
    pub fn text(&mut self, x: f64, y: f64, class: &str, text: &str) {
        self.put(format_args!(r#"<text class="{class}" x="{x:.1}" y="{y:.1}">{}</text>"#, escape(text)));
    }

    /// A line through points.
    pub fn line(&mut self, points: &[(f64, f64)], series: usize, title: &str) {
        let (dash, path) = (dash(series), self.path(points));
        self.put(format_args!(
            r#"<path class="l s{}"{dash} d="{path}"><title>{}</title></path>"#,
            series % COLOURS,
            escape(title)
        ));
    }

    /// A line of no colour, for what is compared with.
    pub fn reference(&mut self, points: &[(f64, f64)], title: &str) {
        let path = self.path(points);
        self.put(format_args!(r#"<path class="r" d="{path}"><title>{}</title></path>"#, escape(title)));
    }

    fn path(&self, points: &[(f64, f64)]) -> String {
        let mut path = String::new();
        for (at, &(x, y)) in points.iter().enumerate() {
            let command = if at == 0 { 'M' } else { 'L' };
            // Writing to a String cannot fail.
            let _ = write!(path, "{command}{:.1} {:.1}", self.x.at(x), self.y.at(y));
        }
        path
    }

    /// A point.
    pub fn point(&mut self, (x, y): (f64, f64), radius: f64, class: &str, title: &str) {
        let (x, y) = (self.x.at(x), self.y.at(y));
        self.put(format_args!(
            r#"<circle class="p {class}" cx="{x:.1}" cy="{y:.1}" r="{radius}"><title>{}</title></circle>"#,
            escape(title)
        ));
    }

    /// A bar from `x` (a place), `width` wide, up to `value`; with whiskers from `low` to `high` if there are any.
    pub fn bar(&mut self, x: f64, width: f64, value: f64, whisker: Option<(f64, f64)>, series: usize, title: &str) {
        let (top, bottom) = (self.y.at(value), self.bottom);
        let height = (bottom - top).max(0.0);
        let mut mark = String::new();
        if let Some((low, high)) = whisker {
            let (x, low, high) = (x + width / 2.0, self.y.at(low), self.y.at(high));
            let _ = write!(mark, r#"<path class="w" d="M{x:.1} {low:.1}V{high:.1}M{:.1} {high:.1}h6"/>"#, x - 3.0);
        }
        self.put(format_args!(
            r#"<g><title>{}</title><rect class="b c{}" x="{x:.1}" y="{top:.1}" width="{width:.1}" height="{height:.1}"/>{mark}</g>"#,
            escape(title),
            series % COLOURS
        ));
    }

    /// A shaded cell; `share` between -1 and 1 says how much, and of which of the two colours.
    pub fn cell(&mut self, [x, y, width, height]: [f64; 4], share: Option<f64>, title: &str) {
        let (class, opacity) = match share {
            Some(share) if share < 0.0 => ("neg", share.abs().min(1.0)),
            Some(share) => ("pos", share.min(1.0)),
            None => ("none", 1.0),
        };
        self.put(format_args!(
            r#"<rect class="h {class}" fill-opacity="{opacity:.2}" x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}"><title>{}</title></rect>"#,
            escape(title)
        ));
    }

    /// Names of the series in rows below the axis, of the first [`NAMED`].
    pub fn legend(&mut self, names: &[String]) {
        let left = self.left.min(30.0);
        let (mut x, mut y) = (left, self.bottom + 58.0);
        for (series, name) in names.iter().enumerate().take(NAMED) {
            let name = shorten(name, 22);
            let width = 30.0 + name.chars().count() as f64 * 6.8;
            if x + width > self.width && x > left {
                (x, y) = (left, y + 18.0);
            }
            let dash = dash(series);
            self.put(format_args!(r#"<path class="l s{}"{dash} d="M{x:.1} {:.1}h16"/>"#, series % COLOURS, y - 4.0));
            self.text(x + 21.0, y, "m", &name);
            x += width + 10.0;
        }
        if names.len() > NAMED {
            self.text(x, y, "m", &format!("and {} more", names.len() - NAMED));
        }
    }

    /// Adds to the drawing.
    pub fn put(&mut self, element: std::fmt::Arguments<'_>) {
        // Writing to a String cannot fail.
        let _ = self.body.write_fmt(element);
        self.body.push('\n');
    }
}

/// Series beyond the colours come again with dashes.
fn dash(series: usize) -> &'static str {
    match series / COLOURS {
        0 => "",
        1 => r#" stroke-dasharray="6 3""#,
        _ => r#" stroke-dasharray="2 3""#,
    }
}

/// A top of an axis a little above `value`: a round number.
pub fn ceiling(value: f64) -> f64 {
    if !(value > 0.0 && value.is_finite()) {
        return 1.0;
    }
    let unit = 10f64.powf(value.log10().floor());
    let steps = [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0];
    steps.into_iter().map(|step| step * unit).find(|top| *top >= value * 0.9999).unwrap_or(10.0 * unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_files_cannot_leave_its_place() {
        assert_eq!(escape("<b a=\"x\">&'\u{202e}"), "&lt;b a=&quot;x&quot;&gt;&amp;&#39;\\u{202e}");
        assert_eq!((shorten("abcdef", 6), shorten("abcdef", 4)), ("abcdef".into(), "…def".into()));
    }

    #[test]
    fn numbers_are_as_long_as_needed() {
        assert_eq!([0.0, 0.134, 13.42, 100.0, 1234.5].map(number), ["0", "0.134", "13.4", "100", "1234"]);
        assert_eq!([2.5e-5, 3e7, -0.5, 0.2].map(number), ["2.5e-5", "3e7", "-0.5", "0.2"]);
        assert_eq!([0.2, 1.0, 0.0123].map(percent), ["20\u{a0}%", "100\u{a0}%", "1.23\u{a0}%"]);
    }

    #[test]
    fn ticks_are_round_and_within_the_axis() {
        let scale = |low, high, log| Scale { low, high, from: 0.0, to: 100.0, log };
        assert_eq!(scale(0.0, 1.0, false).ticks(5), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        // 0, 0.05, 0.1, 0.15: steps are no finer than asked for.
        assert_eq!(scale(0.0, 0.15, false).ticks(5).len(), 4);
        assert_eq!(scale(1e-7, 2e-3, true).ticks(6), [1e-7, 1e-6, 1e-5, 1e-4, 1e-3]);
        assert_eq!(scale(3.0, 3.0, false).ticks(5), [3.0]);
        assert_eq!((ceiling(0.0), ceiling(7.0)), (1.0, 8.0));
        assert!((ceiling(0.134) - 0.15).abs() < 1e-12);
    }
}
