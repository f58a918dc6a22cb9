//! JSON as Python's `json` reads and writes it, so that what is not changed comes out as it went in.
//!
//! Models have `NaN`, `Infinity` and `-Infinity` in `config.json` (`"time_step_limit": [0.0, Infinity]`), and numbers that a float64 or an
//! integer of 64 bits does not hold (`1E400`, `model_max_length`) or that are written otherwise here (`1e-05`). They are read as
//! strings that no file can have by accident, and written as they were.

use serde_json::Value;
use serde_json::value::RawValue;

/// What begins such a string: a character that is always escaped.
const MARK: &str = "\\u0000python:";
const NAMES: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// Reads a file's content.
pub fn read(text: &[u8]) -> serde_json::Result<Value> {
    match std::str::from_utf8(text) {
        Ok(text) => serde_json::from_str(&marked(text)),
        Err(_) => serde_json::from_slice(text),
    }
}

/// Writes what was read.
pub fn write(value: &Value) -> serde_json::Result<String> {
    let text = serde_json::to_string_pretty(value)?;
    let quoted = format!("\"{MARK}");
    let mut parts = text.split(&*quoted);
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        // What is marked has no quotes in it.
        let (name, rest) = part.split_once('"').unwrap_or((part, ""));
        out.push_str(name);
        out.push_str(rest);
    }
    Ok(out)
}

/// Names, and numbers that would not come out the same, outside of strings as marked strings.
fn marked(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 64);
    let (mut rest, mut quoted) = (text, false);
    while let Some(c) = rest.chars().next() {
        let name = NAMES.iter().copied().find(|name| !quoted && rest.starts_with(*name));
        let number = || Some(number(rest)).filter(|number| !quoted && !number.is_empty());
        if let Some(token) = name.or_else(number) {
            match name.is_some() || is_other(token) {
                true => out.push_str(&format!("\"{MARK}{token}\"")),
                false => out.push_str(token),
            }
            rest = &rest[token.len()..];
            continue;
        }
        let length = match c {
            '\\' if quoted => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            c => c.len_utf8(),
        };
        quoted ^= c == '"';
        out.push_str(&rest[..length]);
        rest = &rest[length..];
    }
    out
}

/// What `text` begins with that may be a number.
fn number(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_ascii_digit() && !matches!(c, '+' | '-' | '.' | 'e' | 'E'));
    let begins = text.starts_with(|c: char| c.is_ascii_digit() || c == '-');
    if begins { &text[..end.unwrap_or(text.len())] } else { "" }
}

/// Whether `token` is a number that would be written otherwise.
fn is_other(token: &str) -> bool {
    let is_number = serde_json::from_str::<&RawValue>(token).is_ok();
    let written = serde_json::from_str::<Value>(token).and_then(|value| serde_json::to_string(&value));
    is_number && !written.is_ok_and(|written| written == token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_python_writes_comes_back_as_it_was() {
        let text = "{\n  \"a\": [\n    0.0,\n    Infinity,\n    -Infinity,\n    NaN\n  ],\n  \"b\": \"NaN \\\" Infinity \\\\\"\n}";
        assert!(serde_json::from_str::<Value>(text).is_err());
        let value = read(text.as_bytes()).unwrap();
        assert_eq!(value["b"], "NaN \" Infinity \\");
        assert_eq!(write(&value).unwrap(), text);
        for plain in [r#"{"a": 1.5, "Infinity": "NaN"}"#, "[]"] {
            assert_eq!(read(plain.as_bytes()).unwrap(), serde_json::from_str::<Value>(plain).unwrap());
        }
        for bad in ["", "{", "{\"a\": Inf}", "{\"a\": --Infinity}", "\"NaN", "{NaN: 1}\\", "\u{fffd}\\"] {
            assert!(read(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn numbers_come_back_as_they_were_whatever_holds_them() {
        let numbers = "1E400 -1e999 1e-05 1000000000000000019884624838656 -0 0.10 1e5 18446744073709551615 -1.5 12";
        let list = format!("[\n  {}\n]", numbers.replace(' ', ",\n  "));
        let value = read(list.as_bytes()).unwrap();
        assert_eq!(write(&value).unwrap(), list);
        assert_eq!((value[7].as_u64(), value[8].as_f64(), value[9].as_u64()), (Some(u64::MAX), Some(-1.5), Some(12)));
        for bad in ["01", "1.", "1e", "+1", "1-1", "-", "1e400x", "--1e400"] {
            assert!(read(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
