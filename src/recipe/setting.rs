//! A parameter's value as it may vary over tensors: by name and by depth.
//!
//! - A gradient of m numbers at depth t ∈ [0, 1] is piecewise linear: s = t (m − 1), between elements ⌊s⌋ and ⌊s⌋ + 1.
//! - Words step instead: element ⌊t (m − 1)⌋.
//! - Of several cases the first whose filter matches the tensor's name decides; where none does, nothing is set and the
//!   next scope is asked.

use std::collections::BTreeMap;

use globset::{Glob, GlobMatcher};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};
use crate::method::Value;

/// Parameters by name, as far as given.
pub type Params = BTreeMap<String, Setting>;

/// A value, or how it depends on the tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, try_from = "Written")]
pub enum Setting {
    /// The same everywhere.
    Value(Value),
    /// Numbers, interpolated over the layers. Not empty.
    Gradient(Vec<f64>),
    /// Words, stepping over the layers. Not empty.
    Steps(Vec<Value>),
    /// By name of the tensor.
    Cases(Vec<Case>),
}

/// One of several values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// Names it is for; absent for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<Filter>,
    /// The value for these.
    pub value: Setting,
}

/// A setting as JSON may hold it: not checked yet.
#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Value(Value),
    Gradient(Vec<f64>),
    Steps(Vec<Value>),
    Cases(Vec<Case>),
}

impl TryFrom<Written> for Setting {
    type Error = &'static str;

    fn try_from(written: Written) -> std::result::Result<Self, Self::Error> {
        match written {
            Written::Value(value) => Ok(Self::Value(value)),
            Written::Gradient(numbers) if numbers.is_empty() => Err("a setting without values"),
            Written::Gradient(numbers) => Ok(Self::Gradient(numbers)),
            Written::Steps(values) => Ok(Self::Steps(values)),
            Written::Cases(cases) => Ok(Self::Cases(cases)),
        }
    }
}

/// Matches tensor names: a text that they contain, or, with `*`, `?` or `[`, a glob of the whole name.
#[derive(Debug, Clone)]
pub struct Filter {
    text: String,
    glob: Option<GlobMatcher>,
}

impl From<Value> for Setting {
    fn from(value: Value) -> Self {
        Self::Value(value)
    }
}

impl PartialEq<Value> for Setting {
    fn eq(&self, other: &Value) -> bool {
        matches!(self, Self::Value(value) if value == other)
    }
}

impl Setting {
    /// The value for a tensor called `name` at depth `t`; `None` if no case is for it.
    pub fn at(&self, name: &str, t: f64) -> Option<Value> {
        match self {
            Self::Value(value) => Some(value.clone()),
            Self::Gradient(numbers) => {
                let last = numbers.len() - 1;
                let place = t.clamp(0.0, 1.0) * last as f64;
                let (low, share) = (place as usize, place.fract());
                let high = (low + 1).min(last);
                Some(Value::Number(numbers[low] * (1.0 - share) + numbers[high] * share))
            }
            Self::Steps(values) => Some(values[(t.clamp(0.0, 1.0) * (values.len() - 1) as f64) as usize].clone()),
            Self::Cases(cases) => {
                let case = cases.iter().find(|case| case.filter.as_ref().is_none_or(|f| f.matches(name)))?;
                case.value.at(name, t)
            }
        }
    }

    /// This setting, and `outer` where none of its cases is for a tensor.
    pub fn or(self, outer: Self) -> Self {
        match self {
            Self::Cases(mut cases) => {
                cases.push(Case { filter: None, value: outer });
                Self::Cases(cases)
            }
            all => all,
        }
    }

    /// Whether it is the same for all tensors.
    pub fn is_constant(&self) -> bool {
        matches!(self, Self::Value(_))
    }

    /// Calls `f` with every filter in it.
    pub fn filters<'a>(&'a self, f: &mut impl FnMut(&'a Filter)) {
        if let Self::Cases(cases) = self {
            for case in cases {
                case.filter.iter().for_each(&mut *f);
                case.value.filters(f);
            }
        }
    }
}

impl Filter {
    /// Reads a filter.
    pub fn new(text: &str) -> Result<Self> {
        let glob = match text.contains(['*', '?', '[']) {
            true => Some(
                Glob::new(text)
                    .map_err(|e| {
                        Error::usage(format!("filter {text:?}: {}", e.kind()))
                            .help("a filter is part of a tensor's name, or a glob like '*.mlp.*'")
                    })?
                    .compile_matcher(),
            ),
            false => None,
        };
        Ok(Self { text: text.to_owned(), glob })
    }

    /// Whether it is for tensors called `name`.
    pub fn matches(&self, name: &str) -> bool {
        match &self.glob {
            Some(glob) => glob.is_match(name),
            None => name.contains(&self.text),
        }
    }

    /// As the user wrote it.
    pub fn text(&self) -> &str {
        &self.text
    }
}

impl PartialEq for Filter {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl<'de> Deserialize<'de> for Filter {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Self::new(&String::deserialize(d)?).map_err(serde::de::Error::custom)
    }
}

impl Serialize for Filter {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        self.text.serialize(s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(setting: &Setting, name: &str, t: f64) -> Option<f64> {
        match setting.at(name, t)? {
            Value::Number(x) => Some(x),
            _ => panic!("not a number"),
        }
    }

    #[test]
    fn gradients_are_piecewise_linear_and_stop_at_their_ends() {
        let gradient = Setting::Gradient(vec![0.0, 1.0, 0.5]);
        let at = |t| number(&gradient, "", t).unwrap();
        assert_eq!([at(0.0), at(0.25), at(0.5), at(0.75), at(1.0), at(2.0)], [0.0, 0.5, 1.0, 0.75, 0.5, 0.5]);
        assert_eq!(number(&Setting::Gradient(vec![3.0]), "", 0.7), Some(3.0));
    }

    #[test]
    fn words_step_at_the_last_possible_layer() {
        let words = ["a", "b", "c"].map(|w| Value::Word(w.into()));
        let steps = Setting::Steps(words.to_vec());
        let at = |t| steps.at("", t).unwrap().to_string();
        assert_eq!([at(0.0), at(0.49), at(0.5), at(0.99), at(1.0)], ["a", "a", "b", "b", "c"]);
    }

    #[test]
    fn the_first_case_that_matches_decides() {
        let case = |filter: &str, value: f64| Case {
            filter: Some(Filter::new(filter).unwrap()),
            value: Setting::Value(Value::Number(value)),
        };
        let cases = Setting::Cases(vec![case("layers.1", 1.0), case("*.mlp.*_proj.weight", 2.0), case("mlp", 3.0)]);
        let at = |name| number(&cases, name, 0.0);
        // As in mergekit: part of a name.
        assert_eq!(at("model.layers.10.mlp.up_proj.weight"), Some(1.0));
        assert_eq!(at("model.layers.2.mlp.up_proj.weight"), Some(2.0));
        assert_eq!(at("model.layers.2.mlp.bias"), Some(3.0));
        assert_eq!(at("model.norm.weight"), None);
        assert!(Filter::new("a[").is_err());
    }
}
