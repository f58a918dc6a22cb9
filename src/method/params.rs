//! Parameters of methods: declared once, checked once, read by name.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Method;
use crate::error::{Error, Result};

/// A parameter's value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Value {
    /// A number.
    Number(f64),
    /// One of a few words.
    Word(String),
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Number(x) => write!(f, "{x}"),
            Self::Word(w) => f.write_str(w),
        }
    }
}

/// What values a parameter takes, and its default.
#[derive(Debug, Clone, Copy)]
pub enum ParamKind {
    /// A number in `[min, max]`.
    Number {
        /// Used when nothing is given.
        default: f64,
        /// Smallest accepted.
        min: f64,
        /// Largest accepted.
        max: f64,
    },
    /// One of these words; the first is the default.
    Choice(&'static [&'static str]),
}

impl ParamKind {
    /// Any number that float32, in which methods compute, can hold; 1 unless given.
    pub const ANY: Self = Self::Number { default: 1.0, min: f32::MIN as f64, max: f32::MAX as f64 };
}

/// One parameter of a method.
#[derive(Debug, Clone, Copy)]
pub struct ParamSpec {
    /// Its name in recipes; the flag is `--name` with dashes.
    pub name: &'static str,
    /// Whether each model may have its own value.
    pub per_model: bool,
    /// Values and default.
    pub kind: ParamKind,
    /// One line of help.
    pub help: &'static str,
}

impl ParamSpec {
    fn default(&self) -> Value {
        match self.kind {
            ParamKind::Number { default, .. } => Value::Number(default),
            ParamKind::Choice(words) => Value::Word(words[0].into()),
        }
    }

    /// Refuses what is not one of its values.
    pub fn check(&self, value: &Value) -> Result<()> {
        match (self.kind, value) {
            (ParamKind::Number { min, max, .. }, Value::Number(x)) => {
                // Written so that NaN fails.
                if *x >= min && *x <= max {
                    return Ok(());
                }
                Err(Error::usage(format!("{} is {x}, but must lie {}", self.name, range(min, max))))
            }
            (ParamKind::Choice(words), Value::Word(w)) if words.contains(&w.as_str()) => Ok(()),
            (ParamKind::Choice(words), _) => {
                Err(Error::usage(format!("{} is {value}", self.name)).help(format!("one of: {}", words.join(", "))))
            }
            (ParamKind::Number { .. }, _) => {
                Err(Error::usage(format!("{} is {value}, but must be a number", self.name)))
            }
        }
    }
}

fn range(min: f64, max: f64) -> String {
    match (min > f64::from(f32::MIN), max < f64::from(f32::MAX)) {
        (true, true) => format!("between {min} and {max}"),
        (true, false) => format!("at or above {min}"),
        _ => "within the finite numbers of float32".into(),
    }
}

/// A method's parameters after defaults and checks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Settings {
    globals: BTreeMap<&'static str, Value>,
    per_model: BTreeMap<&'static str, Vec<Value>>,
}

impl Settings {
    /// Fills in what was not given and checks what was. Parameters that the method does not have become warnings.
    pub fn resolve(
        method: &dyn Method,
        given: &BTreeMap<String, Value>,
        per_model_given: &[&BTreeMap<String, Value>],
    ) -> Result<(Self, Vec<String>)> {
        let mut settings = Self { globals: BTreeMap::new(), per_model: BTreeMap::new() };
        for spec in method.params() {
            let shared = match given.get(spec.name) {
                Some(value) => {
                    spec.check(value)?;
                    value.clone()
                }
                None => spec.default(),
            };
            if !spec.per_model {
                settings.globals.insert(spec.name, shared);
                continue;
            }
            let mut values = Vec::with_capacity(per_model_given.len());
            for own in per_model_given {
                let value = own.get(spec.name).unwrap_or(&shared);
                spec.check(value)?;
                values.push(value.clone());
            }
            settings.per_model.insert(spec.name, values);
        }
        Ok((settings, unknown(method, given, per_model_given)))
    }

    /// A global parameter. The name must be declared by the method.
    pub fn global(&self, name: &str) -> &Value {
        &self.globals[name]
    }

    /// A global number. The name must be declared by the method.
    pub fn number(&self, name: &str) -> f64 {
        match self.global(name) {
            Value::Number(x) => *x,
            Value::Word(word) => unreachable!("{name} is a word: {word}"),
        }
    }

    /// A global choice. The name must be declared by the method.
    pub fn word(&self, name: &str) -> &str {
        match self.global(name) {
            Value::Word(w) => w,
            Value::Number(x) => unreachable!("{name} is a number: {x}"),
        }
    }

    /// One number per model, or `None` if the method has no such parameter.
    pub fn per_model(&self, name: &str) -> Option<Vec<f64>> {
        self.per_model.get(name).map(|values| {
            let number = |v: &Value| if let Value::Number(x) = v { *x } else { unreachable!("{name} is not a number") };
            values.iter().map(number).collect()
        })
    }
}

fn unknown(
    method: &dyn Method,
    given: &BTreeMap<String, Value>,
    per_model: &[&BTreeMap<String, Value>],
) -> Vec<String> {
    let known =
        |name: &String| method.params().iter().any(|s| s.name == name && (s.per_model || given.contains_key(name)));
    let mut names: Vec<&String> = given.keys().chain(per_model.iter().flat_map(|m| m.keys())).collect();
    names.sort_unstable();
    names.dedup();
    names
        .into_iter()
        .filter(|name| !known(name))
        .map(|name| format!("{} has no parameter {name}: it is ignored", method.name()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::method::find;

    fn given(pairs: &[(&str, Value)]) -> BTreeMap<String, Value> {
        pairs.iter().map(|(k, v)| ((*k).to_string(), v.clone())).collect()
    }

    #[test]
    fn per_model_values_override_shared_ones_and_defaults_fill_in() {
        let own = given(&[("density", Value::Number(0.5))]);
        let none = given(&[]);
        let shared = given(&[("density", Value::Number(0.1))]);
        let (settings, warnings) = Settings::resolve(find("ties").unwrap(), &shared, &[&own, &none]).unwrap();
        assert_eq!(settings.per_model("density").unwrap(), [0.5, 0.1]);
        assert_eq!(settings.per_model("weight").unwrap(), [1.0, 1.0]);
        assert_eq!(settings.number("lambda"), 1.0);
        assert!(warnings.is_empty());
    }

    #[test]
    fn values_out_of_range_and_unknown_words_are_refused() {
        for bad in [Value::Number(1.5), Value::Number(-0.1), Value::Number(f64::NAN), Value::Word("x".into())] {
            let error = Settings::resolve(find("ties").unwrap(), &given(&[("density", bad)]), &[]).unwrap_err();
            assert!(error.to_string().contains("density"), "{error}");
        }
        let bad = given(&[("lambda", Value::Number(1e39))]);
        let error = Settings::resolve(find("ties").unwrap(), &bad, &[]).unwrap_err().to_string();
        assert!(error.contains("within the finite numbers of float32"), "{error}");
        let bad = given(&[("elect", Value::Word("vote".into()))]);
        assert!(Settings::resolve(find("ties").unwrap(), &bad, &[]).unwrap_err().to_string().contains("mass, count"));
    }

    #[test]
    fn parameters_of_other_methods_are_named_in_a_warning() {
        let shared = given(&[("density", Value::Number(0.1))]);
        let (_, warnings) = Settings::resolve(find("linear").unwrap(), &shared, &[]).unwrap();
        assert_eq!(warnings, ["linear has no parameter density: it is ignored"]);
    }
}
