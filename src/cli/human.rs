//! Numbers as people read them: decimal units, three significant digits, a space before the unit.

use std::fmt::Write as _;

/// A line of a summary: what it is about, and what there is to say.
pub fn line(text: &mut String, label: &str, value: &str) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{label:<15} {value}");
}

/// Bytes: `512 B`, `1.5 GB`, `137 GB`.
pub fn bytes(bytes: u64) -> String {
    scaled(bytes, &["B", "kB", "MB", "GB", "TB", "PB", "EB"], "")
}

/// A count, in words from a million on: `291`, `32,000`, `6.74 billion`.
pub fn count(count: u64) -> String {
    if count < 1_000_000 {
        return grouped(count);
    }
    scaled(count, &["", "thousand", "million", "billion", "trillion", "quadrillion"], "")
}

/// A count with thousands separated: `32,000`.
pub fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes per second.
pub fn rate(bytes: u64, seconds: f64) -> String {
    if seconds <= 0.0 {
        return "-".into();
    }
    scaled((bytes as f64 / seconds) as u64, &["B", "kB", "MB", "GB", "TB", "PB", "EB"], "/s")
}

/// A duration: `15 ms`, `1.42 s`, `12.3 s`, `2 min 5 s`, `3 h 20 min`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    let short = |digits: String, unit: &str| format!("{} {unit}", trim_zeros(&digits));
    match whole {
        _ if seconds < 0.9995 => short(format!("{:.0}", seconds * 1000.0), "ms"),
        _ if seconds < 10.0 => short(format!("{seconds:.2}"), "s"),
        0..60 => short(format!("{seconds:.1}"), "s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole / 60 % 60),
    }
}

/// A fraction in percent: `20 %`, `0.0312 %`.
pub fn percent(fraction: f64) -> String {
    format!("{} %", significant(fraction * 100.0))
}

/// A fraction in percent as columns show it, with all of its three digits: `20.0 %`, `0.0312 %`.
pub fn share(fraction: f64) -> String {
    let percent = fraction * 100.0;
    match percent.abs() {
        0.0 => "0 %".into(),
        1e-4..99.95 => format!("{percent:.*} %", (2.0 - percent.abs().log10().floor()).max(0.0) as usize),
        _ => self::percent(fraction),
    }
}

/// A number with three significant digits and no trailing zeros; tiny and huge ones in scientific notation.
pub fn significant(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return format!("{value}");
    }
    let magnitude = value.abs().log10().floor();
    if !(-4.0..7.0).contains(&magnitude) {
        let text = format!("{value:.2e}");
        return text.replace(".00e", "e");
    }
    let decimals = (2.0 - magnitude).max(0.0) as usize;
    trim_zeros(&format!("{value:.decimals$}"))
}

/// `1 tensor`, `2 tensors`.
pub fn plural(count: u64, noun: &str) -> String {
    format!("{} {noun}{}", grouped(count), if count == 1 { "" } else { "s" })
}

/// A shape: `[4096, 32000]`.
pub fn shape(shape: &[u64]) -> String {
    let sizes: Vec<String> = shape.iter().map(u64::to_string).collect();
    format!("[{}]", sizes.join(", "))
}

fn scaled(value: u64, units: &[&str], suffix: &str) -> String {
    let (mut scaled, mut unit) = (value as f64, 0);
    // 999.5 and above would print as 1000 of the smaller unit.
    while scaled >= 999.5 && unit + 1 < units.len() {
        scaled /= 1000.0;
        unit += 1;
    }
    let decimals = match scaled {
        _ if unit == 0 => 0,
        x if x < 9.995 => 2,
        x if x < 99.95 => 1,
        _ => 0,
    };
    let number = trim_zeros(&format!("{scaled:.decimals$}"));
    format!("{number} {}{suffix}", units[unit]).trim_end().to_string()
}

fn trim_zeros(number: &str) -> String {
    if !number.contains('.') {
        return number.to_string();
    }
    number.trim_end_matches('0').trim_end_matches('.').to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_use_decimal_units_and_three_digits() {
        let cases = [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1 kB"),
            (1_500_000_000, "1.5 GB"),
            (999_600, "1 MB"),
            (13_476_839_424, "13.5 GB"),
            (137_953_316_864, "138 GB"),
            (u64::MAX, "18.4 EB"),
        ];
        for (value, text) in cases {
            assert_eq!(bytes(value), text);
        }
    }

    #[test]
    fn counts_are_grouped_and_then_named() {
        assert_eq!(count(291), "291");
        assert_eq!(count(999_999), "999,999");
        assert_eq!(count(6_738_415_616), "6.74 billion");
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(plural(1, "tensor"), "1 tensor");
        assert_eq!(plural(1291, "tensor"), "1,291 tensors");
    }

    #[test]
    fn durations_and_rates() {
        assert_eq!(duration(0.0154), "15 ms");
        assert_eq!(duration(1.421), "1.42 s");
        assert_eq!(duration(12.34), "12.3 s");
        assert_eq!(duration(1.0), "1 s");
        assert_eq!(duration(125.0), "2 min 5 s");
        assert_eq!(duration(12_000.0), "3 h 20 min");
        assert_eq!(rate(3_000_000_000, 2.0), "1.5 GB/s");
        assert_eq!(rate(10, 0.0), "-");
    }

    #[test]
    fn shares_in_columns_keep_their_zeros() {
        assert_eq!(
            [0.2, 0.05, 0.209, 1.0, 0.0, 0.0009].map(share),
            ["20.0 %", "5.00 %", "20.9 %", "100 %", "0 %", "0.0900 %"]
        );
    }

    #[test]
    fn significant_digits() {
        for (value, text) in [
            (0.2, "0.2"),
            (20.0, "20"),
            (13.1578, "13.2"),
            (1234.5, "1234"),
            (0.000_123_4, "0.000123"),
            (1.5e-7, "1.50e-7"),
            (-2e10, "-2e10"),
            (0.0, "0"),
            (f64::INFINITY, "inf"),
        ] {
            assert_eq!(significant(value), text);
        }
        assert_eq!(percent(0.2), "20 %");
        assert_eq!(percent(0.131_578), "13.2 %");
    }
}
