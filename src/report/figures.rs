//! Each figure of a report, drawn from its numbers, with a sentence on how to read it.

use super::data::{Analysis, Class, Line, Moments};
use super::svg::{Axis, Canvas, NAMED, STYLE, ceiling, escape, number, percent, shorten};

/// Names of all figures, as files are called.
pub const FIGURES: [&str; 12] = [
    "conflicts-by-models",
    "conflicts-by-density",
    "influence",
    "agreement",
    "kept-by-density",
    "norm-by-density",
    "magnitudes",
    "cosines",
    "signs",
    "survival",
    "norm-by-layer",
    "layers",
];

/// Most models in a matrix, and most layers in a map.
const MATRIX: usize = 40;
const MAP: usize = 200;
const WIDTH: f64 = 460.0;
const PLOT_HEIGHT: f64 = 250.0;

/// A figure.
#[derive(Debug, Clone)]
pub struct Figure {
    /// Name, as its file is called.
    pub name: &'static str,
    /// What it shows.
    pub title: &'static str,
    /// The paper's figure that it corresponds to.
    pub paper: Option<&'static str>,
    /// How to read it.
    pub caption: String,
    /// Width and height.
    pub size: (f64, f64),
    /// The drawing, without the `<svg>` around it.
    pub body: String,
}

impl Figure {
    /// The figure to stand in a page.
    pub fn inline(&self) -> String {
        let (width, height) = self.size;
        format!(
            "<svg viewBox=\"0 0 {width:.0} {height:.0}\" role=\"img\" aria-label=\"{}\">{}</svg>",
            escape(self.title),
            self.body
        )
    }

    /// The figure as a file of its own.
    pub fn file(&self) -> String {
        let (width, height) = self.size;
        let (title, caption) = (escape(self.title), escape(&self.caption));
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {:.0}\" width=\"{width:.0}\" \
             height=\"{:.0}\">\n<title>{title}</title>\n<desc>{caption}</desc>\n<style>{STYLE}</style>\n\
             <rect class=\"bg\" width=\"100%\" height=\"100%\"/>\n\
             <text class=\"t hd\" x=\"14\" y=\"22\">{title}</text>\n<g transform=\"translate(0 30)\">\n{}</g>\n</svg>\n",
            height + 30.0,
            height + 30.0,
            self.body
        )
    }
}

/// All figures that these numbers give.
pub fn figures(analysis: &Analysis) -> Vec<Figure> {
    let two = analysis.models.len() > 1;
    let mut all = Vec::new();
    if two {
        all.push(conflicts_by_models(analysis));
        all.push(conflicts_by_density(analysis));
        all.push(influence(analysis));
        all.push(agreement(analysis));
    }
    all.push(kept_by_density(analysis));
    all.push(norm_by_density(analysis));
    all.push(magnitudes(analysis));
    if two {
        all.push(cosines(analysis));
        all.push(signs(analysis));
        all.push(survival(analysis));
    }
    all.push(norm_by_layer(analysis));
    all.push(layers(analysis));
    all
}

fn finish(
    name: &'static str,
    title: &'static str,
    paper: Option<&'static str>,
    caption: String,
    canvas: Canvas,
) -> Figure {
    Figure { name, title, paper, caption, size: (canvas.width, canvas.height), body: canvas.body }
}

/// A canvas for lines with the names of `series` below.
fn plot(series: &[String]) -> Canvas {
    let mut rows = 1.0;
    let mut x = 0.0;
    for name in series.iter().take(NAMED) {
        let width = 40.0 + shorten(name, 22).chars().count() as f64 * 6.8;
        if x + width > WIDTH - 30.0 && x > 0.0 {
            (rows, x) = (rows + 1.0, 0.0);
        }
        x += width;
    }
    let legend = if series.is_empty() { 0.0 } else { rows * 18.0 + 8.0 };
    Canvas::new(WIDTH, PLOT_HEIGHT + 42.0 + legend, [28.0, 24.0, 42.0 + legend, 52.0])
}

/// The chosen density, in words.
pub fn chosen_density(analysis: &Analysis) -> String {
    match analysis.settings.densities[analysis.settings.chosen] {
        Some(density) => percent(density),
        None => "each model's density".into(),
    }
}

fn conflicts_by_models(analysis: &Analysis) -> Figure {
    let sizes = analysis.conflicts_by_size();
    let top = sizes.iter().flat_map(|(_, rates)| rates).copied().fold(0.0, f64::max);
    let mut canvas = plot(&[]);
    let sizes_shown: Vec<(f64, String)> = {
        let step = sizes.len().div_ceil(12).max(1);
        sizes.iter().step_by(step).map(|(size, _)| (*size as f64, size.to_string())).collect()
    };
    let most = analysis.models.len() as f64;
    canvas.axes(
        &Axis::marked("number of models merged", (1.6, most + 0.4), sizes_shown),
        &Axis::linear("parameters with a sign conflict", (0.0, ceiling(top)), percent),
    );
    let mean = |rates: &[f64]| rates.iter().sum::<f64>() / rates.len() as f64;
    let line: Vec<(f64, f64)> = sizes.iter().map(|(size, rates)| (*size as f64, mean(rates))).collect();
    canvas.line(&line, 0, "mean over the subsets");
    let mut at = 0;
    for (size, rates) in &sizes {
        for rate in rates {
            let names: Vec<String> = analysis.settings.subsets[at]
                .iter()
                .take(6)
                .map(|&model| shorten(&analysis.models[model], 24))
                .collect();
            let more = if *size > 6 { format!(" and {} more", size - 6) } else { String::new() };
            let title = format!("{}{more}: {}", names.join(", "), percent(*rate));
            canvas.point((*size as f64, *rate), 3.2, "c5", &title);
            at += 1;
        }
        canvas.point((*size as f64, mean(rates)), 4.6, "c0", &format!("{size} models, mean: {}", percent(mean(rates))));
    }
    let caption = format!(
        "Each light point is one subset of the models, trimmed to {}; the line runs through the means: the higher it \
         climbs, the more of the parameters are pulled both ways at once.",
        chosen_density(analysis)
    );
    finish("conflicts-by-models", "Sign conflicts by number of models", Some("Figures 4 and 10"), caption, canvas)
}

/// The densities that are the same for all models, with their places.
fn uniform(analysis: &Analysis) -> Vec<(usize, f64)> {
    analysis.settings.densities.iter().enumerate().filter_map(|(at, k)| Some((at, (*k)?))).collect()
}

fn density_axis<'a>() -> Axis<'a> {
    Axis::linear("density k asked for", (0.0, 1.0), percent)
}

fn conflicts_by_density(analysis: &Analysis) -> Figure {
    let rate = |at: usize| analysis.overall.densities[at].conflict_fraction.unwrap_or(0.0);
    let points: Vec<(f64, f64)> = uniform(analysis).iter().map(|&(at, k)| (k, rate(at))).collect();
    let top = points.iter().map(|&(_, rate)| rate).fold(0.0, f64::max);
    let mut canvas = plot(&[]);
    let y = Axis::linear("parameters with a sign conflict", (0.0, ceiling(top)), percent);
    canvas.axes(&density_axis(), &y);
    canvas.line(&points, 1, "all models together");
    for &(k, rate) in &points {
        canvas.point((k, rate), 4.6, "c1", &format!("density {}: {} in conflict", percent(k), percent(rate)));
    }
    let caption =
        "All models are trimmed to the density on the horizontal axis: the further left, the fewer parameters \
                   are still pulled both ways."
            .to_owned();
    finish("conflicts-by-density", "Sign conflicts by density", Some("Figure 9"), caption, canvas)
}

/// Bars of three ways to merge in each class.
fn classes(classes: &[Class], label: &str) -> Canvas {
    let names: Vec<String> = ["plain mean", "trimmed mean", "TIES"].map(String::from).into();
    let ways = |class: &Class| [class.plain_mean, class.trimmed_mean, class.ties];
    let reach = |m: &Moments| m.mean.unwrap_or(0.0) + m.deviation.unwrap_or(0.0);
    let top = classes.iter().flat_map(|class| ways(class).iter().map(reach).collect::<Vec<_>>()).fold(0.0, f64::max);
    let mut canvas = plot(&names);
    let count = classes.len() as f64;
    let marks = classes.iter().enumerate().map(|(at, class)| (at as f64 + 0.5, class.name.clone())).collect();
    canvas.axes(
        &Axis::marked(label, (0.0, count), marks),
        &Axis::linear("magnitude, mean and deviation", (0.0, ceiling(top)), number),
    );
    for (at, class) in classes.iter().enumerate() {
        let (from, to) = (canvas.x.at(at as f64), canvas.x.at(at as f64 + 1.0));
        let width = ((to - from) * 0.24).min(30.0);
        for (way, moments) in ways(class).iter().enumerate() {
            let (Some(mean), Some(deviation)) = (moments.mean, moments.deviation) else { continue };
            let x = (from + to) / 2.0 + (way as f64 - 1.5) * width;
            let title = format!(
                "{} in {}: mean {}, deviation {}; {} parameters, {}",
                names[way],
                class.name,
                number(mean),
                number(deviation),
                class.count,
                percent(class.fraction.unwrap_or(0.0))
            );
            let whisker = Some(((mean - deviation).max(0.0), mean + deviation));
            canvas.bar(x + 1.0, width - 2.0, mean, whisker, way, &title);
        }
    }
    canvas.legend(&names);
    canvas
}

fn influence(analysis: &Analysis) -> Figure {
    let canvas = classes(&analysis.overall.classes, "models in which the parameter survives the trim");
    let caption =
        "Where a parameter matters to one model only, the plain mean shrinks it by the models in which it does \
                   not; trimming first keeps its size. Whiskers are one standard deviation."
            .to_owned();
    finish("influence", "Magnitude by number of influential models", Some("Figures 6a and 11a"), caption, canvas)
}

fn agreement(analysis: &Analysis) -> Figure {
    let canvas = classes(&analysis.overall.agreement, "sign agreement among the models in which it survives");
    let caption = "Of parameters that survive in two models or more: 0.5 means half of them pull each way, 1 that all \
                   agree. Where they disagree, averaging cancels; electing a sign first keeps the size."
        .to_owned();
    finish("agreement", "Magnitude by sign agreement", Some("Figures 6b and 11b"), caption, canvas)
}

/// One line per model over the densities.
fn by_density(analysis: &Analysis, label: &str, value: impl Fn(usize, usize) -> Option<f64>) -> Canvas {
    let mut canvas = plot(&analysis.models);
    canvas.axes(&density_axis(), &Axis::linear(label, (0.0, 1.0), percent));
    canvas.reference(&[(0.0, 0.0), (1.0, 1.0)], "as much as asked for");
    for (model, name) in analysis.models.iter().enumerate() {
        let points: Vec<(f64, f64)> =
            uniform(analysis).iter().filter_map(|&(at, k)| Some((k, value(at, model)?))).collect();
        canvas.line(&points, model, name);
        for &(k, share) in &points {
            let class = format!("c{}", model % super::svg::COLOURS);
            canvas.point((k, share), 3.0, &class, &format!("{name} at {}: {}", percent(k), percent(share)));
        }
    }
    canvas.legend(&analysis.models);
    canvas
}

fn kept_by_density(analysis: &Analysis) -> Figure {
    let canvas = by_density(analysis, "entries kept", |at, model| analysis.overall.densities[at].kept_fraction[model]);
    let caption =
        "What is kept of each task vector when all ties at the threshold are: above the dotted line, many entries \
                   have the same magnitude and more is kept than asked for; below it, many are exactly zero."
            .to_owned();
    finish("kept-by-density", "Entries kept by density", None, caption, canvas)
}

fn norm_by_density(analysis: &Analysis) -> Figure {
    let canvas = by_density(analysis, "Σ τ² kept", |at, model| analysis.overall.densities[at].norm_kept[model]);
    let caption =
        "The share of each task vector's squared length that its largest entries hold: the steeper the rise, the \
                   less is lost by a small density."
            .to_owned();
    finish("norm-by-density", "What each density keeps", Some("in place of Figure 3"), caption, canvas)
}

fn magnitudes(analysis: &Analysis) -> Figure {
    let histograms = &analysis.overall.magnitudes;
    let edges = &analysis.settings.magnitude_bins;
    let filled = histograms.iter().filter(|h| !h.counts.is_empty());
    let first = filled.clone().map(|h| h.first).min().unwrap_or(0);
    let end = filled.map(|h| h.first + h.counts.len()).max().unwrap_or(first + 1).max(first + 1);
    let edge = |bin: usize| edges.get(bin).copied().unwrap_or(edges[edges.len() - 1] * 4.0 / 3.0);
    let share = |model: usize, bin: usize| {
        let histogram = &histograms[model];
        let count = bin.checked_sub(histogram.first).and_then(|at| histogram.counts.get(at)).copied().unwrap_or(0);
        count as f64 / analysis.overall.present[model].max(1) as f64
    };
    let models = 0..analysis.models.len();
    let top = models
        .clone()
        .flat_map(|m| (first..end).map(move |bin| (m, bin)))
        .map(|(m, b)| share(m, b))
        .fold(0.0, f64::max);
    let mut canvas = plot(&analysis.models);
    let x = Axis {
        label: "|τ|, two bins per octave",
        range: (edge(first), edge(end)),
        log: true,
        format: power,
        ticks: None,
    };
    canvas.axes(&x, &Axis::linear("share of all entries", (0.0, ceiling(top)), percent));
    for model in models {
        let mut points = vec![(edge(first), 0.0)];
        for bin in first..end {
            points.extend([(edge(bin), share(model, bin)), (edge(bin + 1), share(model, bin))]);
        }
        points.push((edge(end), 0.0));
        let zeros = analysis.overall.zeros[model] as f64 / analysis.overall.present[model].max(1) as f64;
        canvas.line(&points, model, &format!("{}: {} are exactly zero", analysis.models[model], percent(zeros)));
    }
    for (at, thresholds) in analysis.thresholds.iter().flatten().enumerate() {
        for (model, threshold) in thresholds.iter().enumerate().filter(|_| at == analysis.settings.chosen) {
            let Some(threshold) = threshold.filter(|t| t.magnitude > 0.0) else { continue };
            let x = canvas.x.at(threshold.magnitude);
            let foot = canvas.y.at(0.0);
            let title = format!(
                "threshold of {} at {}: {}",
                analysis.models[model],
                chosen_density(analysis),
                number(threshold.magnitude)
            );
            canvas.put(format_args!(
                r#"<path class="l s{}" d="M{x:.1} {:.1}v-14"><title>{}</title></path>"#,
                model % super::svg::COLOURS,
                foot,
                escape(&title)
            ));
        }
    }
    canvas.legend(&analysis.models);
    let caption =
        "How large the entries of each task vector are; ticks on the axis mark the thresholds of the trim. Spikes \
                   come from 16-bit weights, which differ by few values."
            .to_owned();
    finish("magnitudes", "Magnitudes of the task vectors", None, caption, canvas)
}

fn power(value: f64) -> String {
    format!("1e{}", value.log10().round() as i32)
}

/// A matrix of pairs: above the diagonal before the trim, below it after.
fn matrix(
    analysis: &Analysis,
    before: &[Option<f64>],
    after: &[Option<f64>],
    shade: fn(f64) -> f64,
    write: fn(f64) -> String,
) -> Canvas {
    let count = analysis.models.len().min(MATRIX);
    let (left, top) = (112.0, 84.0);
    let side = ((WIDTH - left - 14.0) / count as f64).min(64.0);
    let height = top + side * count as f64 + 34.0;
    let mut canvas = Canvas::new(WIDTH, height, [top, 14.0, 34.0, left]);
    let numbers = side >= 30.0;
    for (model, name) in analysis.models.iter().enumerate().take(count) {
        let middle = (model as f64 + 0.5) * side;
        canvas.text(left - 8.0, top + middle + 4.0, "m e", &shorten(name, 15));
        let (x, y) = (left + middle + 4.0, top - 8.0);
        let name = escape(&shorten(name, 13));
        canvas.put(format_args!(r#"<text class="m" transform="translate({x:.1} {y:.1}) rotate(-50)">{name}</text>"#));
    }
    for (at, (a, b)) in analysis.pairs().into_iter().enumerate().filter(|(_, (a, b))| *a < count && *b < count) {
        for (row, column, value, when) in [(a, b, before[at], "before"), (b, a, after[at], "after")] {
            let (x, y) = (left + column as f64 * side, top + row as f64 * side);
            let said = value.map_or_else(|| "undefined".into(), number);
            let title = format!("{} and {}, {when} the trim: {said}", analysis.models[a], analysis.models[b]);
            canvas.cell([x + 0.5, y + 0.5, side - 1.0, side - 1.0], value.map(shade), &title);
            if let (true, Some(value)) = (numbers, value) {
                let class = if shade(value).abs() > 0.55 { "m c on" } else { "m c t" };
                canvas.text(x + side / 2.0, y + side / 2.0 + 4.0, class, &write(value));
            }
        }
    }
    canvas.text(left, height - 12.0, "m", "above the diagonal: before the trim; below it: after");
    canvas
}

/// Two decimals, without the zero before them.
fn short(value: f64) -> String {
    let text = format!("{value:.2}");
    text.replacen("0.", ".", 1)
}

fn cosines(analysis: &Analysis) -> Figure {
    let pairs = &analysis.overall.pairs;
    let canvas = matrix(analysis, &pairs.cosine, &pairs.cosine_trimmed, |value| value, short);
    let caption =
        "Cosine of each pair of task vectors: 0 is unrelated (what most fine-tunes are), blue pulls the same way, \
                   orange against each other."
            .to_owned();
    finish("cosines", "Cosines of the task vectors", None, caption, canvas)
}

fn signs(analysis: &Analysis) -> Figure {
    let pairs = &analysis.overall.pairs;
    let shade = |value: f64| 2.0 * value - 1.0;
    let canvas =
        matrix(analysis, &pairs.same_sign, &pairs.same_sign_trimmed, shade, |value| format!("{:.0}", value * 100.0));
    let caption =
        "Of the parameters that both models of a pair change, the percentage that they change in the same direction: \
                   50 is chance, blue is more, orange less."
            .to_owned();
    finish("signs", "Sign agreement of the task vectors, %", None, caption, canvas)
}

fn survival(analysis: &Analysis) -> Figure {
    let names: Vec<String> = ["entries kept", "Σ|τ| of the whole"].map(String::from).into();
    let mut canvas = plot(&names);
    let shown = analysis.models.len().min(MATRIX);
    let room = ((WIDTH - 76.0) / shown as f64 / 7.0) as usize;
    let shown_models = analysis.models.iter().take(shown);
    let numbered = shown_models.clone().any(|name| name.chars().count() > room.max(6));
    let marks = shown_models.enumerate().map(|(at, name)| {
        let text = if numbered { (at + 1).to_string() } else { name.clone() };
        (at as f64 + 0.5, text)
    });
    let label = if numbered { "model, by its number" } else { "model" };
    canvas.axes(
        &Axis::marked(label, (0.0, shown as f64), marks.collect()),
        &Axis::linear("share that points the merged way", (0.0, 1.0), percent),
    );
    for (at, survival) in analysis.overall.survival.iter().take(shown).enumerate() {
        let (from, to) = (canvas.x.at(at as f64), canvas.x.at(at as f64 + 1.0));
        let width = ((to - from) * 0.36).min(34.0);
        let name = &analysis.models[at];
        for (way, value) in [survival.of_kept, survival.of_mass].into_iter().enumerate() {
            let Some(value) = value else { continue };
            let x = (from + to) / 2.0 + (way as f64 - 1.0) * width;
            canvas.bar(x + 1.0, width - 2.0, value, None, way, &format!("{name}, {}: {}", names[way], percent(value)));
        }
    }
    canvas.legend(&names);
    let caption =
        "How much of each model ends in the merged task vector: of the entries that the trim kept, those whose sign \
                   won; and their magnitude as a share of the model's whole task vector."
            .to_owned();
    finish("survival", "What survives of each model", None, caption, canvas)
}

fn norm_by_layer(analysis: &Analysis) -> Figure {
    let mut canvas = plot(&analysis.models);
    let groups = &analysis.layers;
    let count = groups.len();
    let top = groups.iter().flat_map(|g| g.measured.norm_share.iter().flatten()).copied().fold(0.0, f64::max);
    let step = count.div_ceil(8).max(1);
    let marks = groups.iter().enumerate().step_by(step);
    let marks = marks.map(|(at, group)| (at as f64, last_part(&group.name))).collect();
    canvas.axes(
        &Axis::marked("layer, in the order of the checkpoint", (-0.4, count as f64 - 0.6), marks),
        &Axis::linear("share of Σ τ² over the model", (0.0, ceiling(top)), percent),
    );
    for (model, name) in analysis.models.iter().enumerate() {
        let share = |at: usize| groups[at].measured.norm_share[model].unwrap_or(0.0);
        let points: Vec<(f64, f64)> = (0..count).map(|at| (at as f64, share(at))).collect();
        canvas.line(&points, model, name);
        for (at, &point) in points.iter().enumerate().filter(|_| count * analysis.models.len() <= 600) {
            let class = format!("c{}", model % super::svg::COLOURS);
            let title = format!("{name}, {}: {}", groups[at].name, percent(point.1));
            canvas.point(point, 2.6, &class, &title);
        }
    }
    canvas.legend(&analysis.models);
    let caption =
        "Where in the model each fine-tune changed most: the share of its squared length that lies in each layer. \
                   Large layers hold more."
            .to_owned();
    finish("norm-by-layer", "Where the task vectors are", None, caption, canvas)
}

/// A layer's number, or a short name.
fn last_part(name: &str) -> String {
    let last = name.rsplit('.').next().unwrap_or(name);
    if last.bytes().all(|b| b.is_ascii_digit()) { last.to_owned() } else { "other".into() }
}

/// A column of the map of layers: its name, and the value of a line.
type Column = (&'static str, fn(&Line) -> Option<f64>);

/// Columns of the map of layers.
fn map_columns() -> [Column; 6] {
    [
        ("kept", |line| line.kept),
        ("conflict", |line| line.conflicts),
        ("cosine", |line| line.cosine),
        ("survives", |line| line.survives),
        ("of norm", |line| line.norm_share),
        ("zero", |line| line.zeros),
    ]
}

fn layers(analysis: &Analysis) -> Figure {
    let chosen = analysis.settings.chosen;
    let lines: Vec<(&str, Line)> =
        analysis.layers.iter().take(MAP).map(|g| (&*g.name, Line::of(&g.measured, chosen))).collect();
    let columns = map_columns();
    let (left, top, row) = (150.0, 34.0, if lines.len() > 60 { 12.0 } else { 20.0 });
    let width = (WIDTH - left - 14.0) / columns.len() as f64;
    let height = top + row * lines.len() as f64 + 14.0;
    let mut canvas = Canvas::new(WIDTH, height, [top, 14.0, 14.0, left]);
    for (at, (name, value)) in columns.iter().enumerate() {
        let x = left + at as f64 * width;
        canvas.text(x + width / 2.0, top - 10.0, "m c", name);
        let most = lines.iter().filter_map(|(_, line)| value(line)).map(f64::abs).fold(0.0, f64::max);
        for (place, (layer, line)) in lines.iter().enumerate() {
            let y = top + place as f64 * row;
            let said = value(line);
            let shade = said.map(|said| if most > 0.0 { said / most } else { 0.0 });
            let text =
                said.map_or_else(|| "undefined".into(), |v| if *name == "cosine" { number(v) } else { percent(v) });
            canvas.cell([x + 0.5, y + 0.5, width - 1.0, row - 1.0], shade, &format!("{layer}, {name}: {text}"));
            if row >= 20.0 {
                let class = if shade.unwrap_or(0.0).abs() > 0.55 { "m c on" } else { "m c t" };
                canvas.text(x + width / 2.0, y + row / 2.0 + 4.0, class, if said.is_some() { &text } else { "–" });
            }
        }
    }
    for (place, (layer, _)) in lines.iter().enumerate() {
        let y = top + place as f64 * row + row / 2.0 + 4.0;
        canvas.text(left - 8.0, y, "m e", &shorten(layer, 20));
    }
    let caption =
        "Each row is a layer, each column a measure, shaded from nothing to the largest value of the column: look for \
                   rows that stand out."
            .to_owned();
    finish("layers", "Layers and measures", None, caption, canvas)
}
