//! Values of options: sizes, fractions, numbers and model specifications.
//!
//! Every message says what is accepted; clap puts the value and the option in front of it.

use tiesmith::{METHODS, ModelInput, ParamKind, ParamSpec, Params, Part, Value};

use super::ranks::PartSpec;

/// Units of sizes: name in lower case, bytes.
const UNITS: [(&str, u64); 10] = [
    ("", 1),
    ("b", 1),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
];

/// A size in bytes: `2GiB`, `5GB`, `1.5 TB`, `1000000`. Exact: no floating point is involved.
pub fn size(text: &str) -> Result<u64, String> {
    const EXPECTED: &str = "a size is like 2GiB (binary), 500MB (decimal) or 1000000 (bytes)";
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = (&text[..split], text[split..].trim());
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.contains('.') || fraction.len() > 9 {
        return Err(EXPECTED.into());
    }
    let Some(&(_, scale)) = UNITS.iter().find(|(name, _)| unit.eq_ignore_ascii_case(name)) else {
        if let Some(letter @ ("K" | "M" | "G" | "T")) = Some(unit.to_uppercase().as_str()) {
            return Err(format!(
                "'{unit}' is ambiguous: write {number}{letter}B (decimal) or {number}{letter}iB (binary)"
            ));
        }
        return Err(format!("unknown unit '{unit}': {EXPECTED}"));
    };
    let too_large = || "larger than any file".to_string();
    let digits = |digits: &str| {
        if digits.is_empty() { Ok(0) } else { digits.parse::<u64>().map_err(|_| too_large()) }
    };
    let whole = u128::from(digits(whole)?) * u128::from(scale);
    let part = u128::from(digits(fraction)?) * u128::from(scale);
    let bytes = whole + part / 10_u128.pow(fraction.len() as u32);
    match u64::try_from(bytes) {
        Ok(0) => Err(format!("must be more than nothing; {EXPECTED}")),
        Ok(bytes) => Ok(bytes),
        Err(_) => Err(too_large()),
    }
}

/// A fraction between 0 and 1: `0.2` or `20%`.
pub fn fraction(text: &str) -> Result<f64, String> {
    const EXPECTED: &str = "a fraction is like 0.2 or 20%";
    let (digits, percent) = match text.trim().strip_suffix('%') {
        Some(digits) => (digits.trim_end(), true),
        None => (text.trim(), false),
    };
    let number: f64 = digits.parse().map_err(|_| EXPECTED.to_string())?;
    // Dividing rounds once: 20% is exactly the 0.2 that can be written.
    let value = if percent { number / 100.0 } else { number };
    if (0.0..=1.0).contains(&value) {
        return Ok(value);
    }
    if !percent && number > 1.0 && number <= 100.0 {
        return Err(format!("more than 1; for {number} percent write {number}%"));
    }
    Err(format!("must lie between 0 and 1 (0% and 100%); {EXPECTED}"))
}

/// A finite number.
pub fn number(text: &str) -> Result<f64, String> {
    match text.trim().parse::<f64>() {
        Ok(value) if value.is_finite() => Ok(value),
        Ok(_) => Err("must be finite".into()),
        Err(_) => Err("not a number".into()),
    }
}

/// A number without sign or fraction.
pub fn whole(text: &str) -> Result<u64, String> {
    text.trim().parse().map_err(|_| "a whole number is expected, such as 0 or 42".to_string())
}

/// A number of threads.
pub fn threads(text: &str) -> Result<usize, String> {
    match text.trim().parse() {
        Ok(count @ 1..=1024) => Ok(count),
        _ => Err("a number of threads is expected, from 1 to 1024".into()),
    }
}

/// A rank of factors.
pub fn rank(text: &str) -> Result<u64, String> {
    match text.trim().parse() {
        Ok(rank @ 1..=65_536) => Ok(rank),
        _ => Err("a rank is expected, from 1 to 65,536".into()),
    }
}

/// A number of parts.
pub fn parts(text: &str) -> Result<usize, String> {
    match text.trim().parse() {
        Ok(count @ 1..=10_000) => Ok(count),
        _ => Err("a number of parts is expected, from 1 to 10,000".into()),
    }
}

/// `I/N`, counted from 1; `auto` or `auto/N`.
pub fn part(text: &str) -> Result<PartSpec, String> {
    const EXPECTED: &str = "a part is like 2/8 (the second of eight), auto, or auto/8";
    let (first, count) = match text.trim().split_once('/') {
        Some((first, count)) => (first, Some(parts(count)?)),
        None => (text.trim(), None),
    };
    match (first, first.parse::<usize>(), count) {
        ("auto", _, count) => Ok(PartSpec::Auto(count)),
        (_, Ok(number), Some(count)) if (1..=count).contains(&number) => {
            Ok(PartSpec::Given(Part { index: number - 1, count }))
        }
        (_, Ok(number), Some(count)) => {
            Err(format!("there is no part {number} of {count}: parts are numbered from 1 to {count}"))
        }
        _ => Err(EXPECTED.into()),
    }
}

/// A number that is finite and not negative.
pub fn tolerance(text: &str) -> Result<f64, String> {
    match number(text)? {
        value if value < 0.0 => Err("must not be negative".into()),
        value => Ok(value),
    }
}

/// `CKPT[,weight=W][,density=D]...`: only trailing `,key=value` parts are split off, for a path may contain commas.
pub fn model(text: &str) -> Result<ModelInput, String> {
    let mut source = text;
    let mut params = Params::new();
    while let Some((rest, key, value)) = last_assignment(source) {
        let name = key.replace('-', "_");
        let Some(spec) = per_model_params().find(|spec| spec.name == name) else {
            return Err(unknown_key(key, source));
        };
        let value = param_value(spec, value).map_err(|e| format!("{key}={value}: {e}"))?;
        if params.insert(name, value.into()).is_some() {
            return Err(format!("{key} is given twice"));
        }
        source = rest;
    }
    if source.is_empty() {
        return Err("the checkpoint is missing: write CKPT,weight=W".into());
    }
    Ok(ModelInput { source: source.to_string(), params, ..ModelInput::default() })
}

/// `NAME=VALUE` of any method's parameter. What it must be depends on the method, and is checked once that is known.
pub fn param(text: &str) -> Result<(String, Value), String> {
    let (name, value) = text.split_once('=').ok_or("a parameter is given as NAME=VALUE")?;
    let name = name.trim().replace('-', "_");
    let known = || METHODS.iter().flat_map(|method| method.params()).filter(|spec| spec.name == name);
    if known().next().is_none() {
        let names = METHODS.iter().flat_map(|method| method.params()).map(|spec| spec.name);
        let closest = names.min_by_key(|known| edit_distance(&name, known)).unwrap_or_default();
        return Err(format!("no method has a parameter '{name}': did you mean '{closest}'?"));
    }
    let mut values = known().map(|spec| param_value(spec, value.trim()));
    let first = values.next().expect("there is one");
    // A word of one method may be none of another.
    first.or_else(|error| values.find_map(Result::ok).ok_or(error)).map(|value| (name, value))
}

/// Splits `rest,key=value`. A value with a slash belongs to a path: `runs,seed=3/model`.
fn last_assignment(text: &str) -> Option<(&str, &str, &str)> {
    let (rest, last) = text.rsplit_once(',')?;
    let (key, value) = last.split_once('=')?;
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    let is_key = !key.is_empty() && key.chars().all(word);
    (is_key && !value.contains(['/', '\\'])).then_some((rest, key, value))
}

/// Parameters that some method takes per model, each once.
fn per_model_params() -> impl Iterator<Item = &'static ParamSpec> {
    let all = METHODS.iter().flat_map(|method| method.params());
    let mut seen = Vec::new();
    all.filter(move |spec| {
        spec.per_model && !seen.contains(&spec.name) && {
            seen.push(spec.name);
            true
        }
    })
}

fn param_value(spec: &ParamSpec, text: &str) -> Result<Value, String> {
    match spec.kind {
        ParamKind::Number { min: 0.0, max: 1.0, .. } => fraction(text).map(Value::Number),
        ParamKind::Number { .. } => number(text).map(Value::Number),
        ParamKind::Choice(words) if words.contains(&text) => Ok(Value::Word(text.into())),
        ParamKind::Choice(words) => Err(format!("one of: {}", words.join(", "))),
    }
}

fn unknown_key(key: &str, source: &str) -> String {
    let names: Vec<&str> = per_model_params().map(|spec| spec.name).collect();
    let closest = names.iter().min_by_key(|name| edit_distance(key, name));
    let hint = match closest {
        Some(name) if edit_distance(key, name) <= 2 => format!("did you mean '{name}'?"),
        _ => format!("known are {}", names.join(", ")),
    };
    format!("a model has no parameter '{key}', {hint} (if that is part of the path, write '{source}/')")
}

/// Levenshtein distance, for suggestions between short words.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_exact_and_case_does_not_matter() {
        let cases = [
            ("2GiB", 2 << 30),
            ("256MB", 256_000_000),
            ("5GB", 5_000_000_000),
            ("1.5 TB", 1_500_000_000_000),
            ("1000000", 1_000_000),
            ("512kib", 512 << 10),
            ("64B", 64),
            ("0.5KiB", 512),
            ("1.", 1),
        ];
        for (text, bytes) in cases {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn bad_sizes_say_what_is_accepted() {
        let cases = [
            ("", "a size is like"),
            ("-1", "a size is like"),
            ("five", "a size is like"),
            ("1.2.3GB", "a size is like"),
            ("5XB", "unknown unit 'XB'"),
            ("2G", "write 2GB (decimal) or 2GiB (binary)"),
            ("2g", "write 2GB (decimal) or 2GiB (binary)"),
            ("0", "more than nothing"),
            ("0.0001B", "more than nothing"),
            ("99999999TB", "larger than any file"),
            ("99999999999999999999999", "larger than any file"),
            ("1e9", "unknown unit 'e9'"),
        ];
        for (text, message) in cases {
            let error = size(text).unwrap_err();
            assert!(error.contains(message), "{text}: {error}");
        }
    }

    #[test]
    fn fractions_and_percentages_agree() {
        for (text, value) in [("0.2", 0.2), ("20%", 0.2), (" 12.5 % ", 0.125), ("1", 1.0), ("0%", 0.0)] {
            assert_eq!(fraction(text), Ok(value), "{text}");
        }
        for (text, message) in [
            ("20", "for 20 percent write 20%"),
            ("1.5", "more than 1"),
            ("-0.1", "between 0 and 1"),
            ("101%", "between 0 and 1"),
            ("nan", "between 0 and 1"),
            ("much", "a fraction is like"),
        ] {
            let error = fraction(text).unwrap_err();
            assert!(error.contains(message), "{text}: {error}");
        }
    }

    #[test]
    fn numbers_are_finite() {
        assert_eq!(number("-0.5"), Ok(-0.5));
        assert_eq!(number("1e-3"), Ok(1e-3));
        assert!(number("inf").is_err() && number("nan").is_err() && number("x").is_err());
        assert!(tolerance("-1").is_err());
        assert_eq!((whole("18446744073709551615"), threads("1024")), (Ok(u64::MAX), Ok(1024)));
        for bad in ["-1", "x", "1.5", ""] {
            assert!(whole(bad).is_err() && threads(bad).is_err());
        }
        assert!(threads("0").is_err() && threads("1025").is_err());
    }

    #[test]
    fn parts_are_counted_from_one() {
        assert_eq!(part("2/8"), Ok(PartSpec::Given(Part { index: 1, count: 8 })));
        assert_eq!((part("auto"), part("auto/8")), (Ok(PartSpec::Auto(None)), Ok(PartSpec::Auto(Some(8)))));
        for (text, message) in [
            ("0/8", "there is no part 0 of 8"),
            ("9/8", "numbered from 1 to 8"),
            ("3", "a part is like 2/8"),
            ("a/8", "a part is like 2/8"),
            ("1/0", "a number of parts"),
            ("1/x", "a number of parts"),
            ("-1/2", "a part is like"),
        ] {
            let error = part(text).unwrap_err();
            assert!(error.contains(message), "{text}: {error}");
        }
    }

    #[test]
    fn models_split_off_their_parameters() {
        let parsed = model("org/name,weight=0.5,density=30%").unwrap();
        assert_eq!(parsed.source, "org/name");
        assert_eq!(parsed.params["weight"], Value::Number(0.5));
        assert_eq!(parsed.params["density"], Value::Number(0.3));
        assert!(model("plain").unwrap().params.is_empty());
    }

    #[test]
    fn commas_in_paths_stay_in_paths() {
        for path in ["a,b", "runs/lr=1,seed=3/model", "x,y=1/", "a,=1", "wei rd,k ey=1"] {
            assert_eq!(model(path).unwrap().source, path);
        }
        assert_eq!(model("a,b,weight=2").unwrap().source, "a,b");
    }

    #[test]
    fn mistakes_in_models_are_explained() {
        for (text, message) in [
            ("m,wieght=2", "did you mean 'weight'?"),
            ("m,colour=2", "known are weight, density"),
            ("m,colour=2", "write 'm,colour=2/'"),
            ("m,weight=1,weight=2", "given twice"),
            ("m,weight=heavy", "weight=heavy: not a number"),
            ("m,density=2", "for 2 percent write 2%"),
            (",weight=1", "checkpoint is missing"),
            ("", "checkpoint is missing"),
        ] {
            let error = model(text).unwrap_err();
            assert!(error.contains(message), "{text}: {error}");
        }
    }
}
