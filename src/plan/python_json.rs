//! JSON as Python's `json` writes it: with `NaN`, `Infinity` and `-Infinity` where a number is no number.
//!
//! Models have them in `config.json` (`"time_step_limit": [0.0, Infinity]`). JSON itself has no such thing, so they are read as
//! strings that no file can have by accident, and written as they were.

use serde_json::Value;

/// What begins such a string: a character that is always escaped.
const MARK: &str = "\\u0000python:";
const NAMES: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// Reads a file's content.
pub fn read(text: &[u8]) -> serde_json::Result<Value> {
    let first = serde_json::from_slice(text);
    match std::str::from_utf8(text) {
        Ok(text) if first.is_err() => serde_json::from_str(&marked(text)),
        _ => first,
    }
}

/// Writes what was read.
pub fn write(value: &Value) -> serde_json::Result<String> {
    let text = serde_json::to_string_pretty(value)?;
    Ok(NAMES.iter().fold(text, |text, name| text.replace(&format!("\"{MARK}{name}\""), name)))
}

/// The names outside of strings as marked strings.
fn marked(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 64);
    let (mut rest, mut quoted) = (text, false);
    while let Some(c) = rest.chars().next() {
        let name = NAMES.iter().find(|name| !quoted && rest.starts_with(**name));
        let length = match (name, c) {
            (Some(name), _) => {
                out.push_str(&format!("\"{MARK}{name}\""));
                rest = &rest[name.len()..];
                continue;
            }
            (None, '\\') if quoted => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            (None, c) => c.len_utf8(),
        };
        quoted ^= c == '"';
        out.push_str(&rest[..length]);
        rest = &rest[length..];
    }
    out
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
}
