//! `parameters`: values, gradients and filters, and what mergekit's names mean here.
//!
//! - A name that the method declares is read by its declaration.
//! - `normalize` and `rescale` are words of a method's own parameters here (`combine`, `rescale`).
//! - A name of another method of mergekit has no effect, as in mergekit, but is warned of; any other name is an error.

use std::path::Path;

use super::node::{Content, Key, Node};
use super::reader::Reader;
use crate::error::{Error, Result, printable};
use crate::method::{METHODS, Method, ParamKind, ParamSpec, Value};
use crate::recipe::{Case, Filter, Params, Setting};

/// Parameters that some method of mergekit 0.1.4 has.
const NAMES: &[&str] = &[
    "weight",
    "density",
    "gamma",
    "epsilon",
    "normalize",
    "int8_mask",
    "rescale",
    "lambda",
    "scale",
    "t",
    "nuslerp_flatten",
    "nuslerp_row_wise",
    "normalize_weights",
    "eps",
    "max_iter",
    "tol",
    "filter_wise",
    "select_topk",
    "r",
    "alpha",
];
/// Parameters without a default in mergekit, by method.
const REQUIRED: &[(&str, &[&str])] = &[
    (
        "weight",
        &[
            "linear",
            "task_arithmetic",
            "ties",
            "dare_ties",
            "dare_linear",
            "breadcrumbs",
            "breadcrumbs_ties",
            "della",
            "della_linear",
            "nuslerp",
            "multislerp",
        ],
    ),
    ("t", &["slerp", "nearswap"]),
];

/// Where parameters are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// With one model.
    Model,
    /// For a slice, a module or the whole merge.
    Shared,
}

/// Reads the parameters of one method.
pub(super) struct Settings<'a> {
    pub reader: Reader<'a>,
    pub method: &'static dyn Method,
}

/// What a value must be.
#[derive(Clone, Copy)]
enum Kind {
    /// As the method declares.
    Declared(ParamSpec),
    /// Yes or no, in the words of a parameter of the method: (for yes, for no).
    Switch(&'static str, &'static str),
    /// Yes or no, without effect.
    Idle,
}

/// The parameters of mergekit that `method` cannot do without.
pub(super) fn required(method: &dyn Method) -> impl Iterator<Item = String> {
    let name = method.name();
    REQUIRED.iter().filter(move |(_, methods)| methods.contains(&name)).map(|(param, _)| (*param).to_string())
}

/// The defaults of mergekit that differ from the method's own.
pub(super) fn defaults(method: &dyn Method) -> Params {
    let mut defaults = Params::new();
    for spec in method.params() {
        let default = match (spec.name, spec.kind) {
            ("density", ParamKind::Number { .. }) => Value::Number(1.0),
            ("combine", ParamKind::Choice(words)) if words.contains(&"mean") && words.contains(&"sum") => {
                Value::Word(if matches!(method.name(), "ties" | "della") { "mean" } else { "sum" }.into())
            }
            // What mergekit divides by at least, and where it takes models for equals.
            ("norm_floor" | "uniform_below", ParamKind::Number { .. }) => Value::Number(1e-6),
            ("zero_sum", ParamKind::Choice(words)) if words.contains(&"positive") => Value::Word("positive".into()),
            ("rescale", ParamKind::Choice(words)) if words[0] != "none" && words.contains(&"l1") => {
                Value::Word("l1".into())
            }
            _ => continue,
        };
        defaults.insert(spec.name.to_string(), default.into());
    }
    defaults
}

impl Settings<'_> {
    /// Reads the mapping `node` into `params`.
    pub(super) fn read(
        &self,
        node: &Node,
        scope: Scope,
        params: &mut Params,
        warnings: &mut Vec<String>,
    ) -> Result<()> {
        let fields = self.reader.map(node, "parameters")?;
        for (key, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
            self.read_one(key, value, scope, params, warnings)?;
        }
        Ok(())
    }

    /// Reads one parameter into `params`.
    pub(super) fn read_one(
        &self,
        key: &Key,
        value: &Node,
        scope: Scope,
        params: &mut Params,
        warnings: &mut Vec<String>,
    ) -> Result<()> {
        let Some((name, kind)) = self.meaning(&key.text) else {
            return self.foreign(key, warnings);
        };
        let setting = self.setting(value, &key.text, kind)?;
        let per_model = self.method.params().iter().any(|spec| spec.name == name && spec.per_model);
        if scope == Scope::Model && !per_model && !matches!(kind, Kind::Idle) {
            warnings.push(format!(
                "{}: {} is for the merge as a whole and has no effect with a model",
                self.reader.spot(key.place),
                key.text
            ));
            return Ok(());
        }
        if matches!(kind, Kind::Idle) {
            return Ok(());
        }
        if params.insert(name.to_string(), setting).is_some() {
            return Err(self.reader.fail(key.place, format!("{} and {name} say the same thing: keep one", key.text)));
        }
        Ok(())
    }

    /// The parameter of the method that `name` sets, and what it must be.
    fn meaning(&self, name: &str) -> Option<(&'static str, Kind)> {
        let specs = self.method.params();
        let words = |name: &str| {
            specs.iter().find(|spec| spec.name == name).and_then(|spec| match spec.kind {
                ParamKind::Choice(words) => Some(words),
                ParamKind::Number { .. } => None,
            })
        };
        match name {
            // It never changed a result; and where nothing is dropped, there is nothing to rescale.
            "int8_mask" => return Some(("int8_mask", Kind::Idle)),
            "rescale" if self.method.name() == "task_arithmetic" => return Some(("rescale", Kind::Idle)),
            "rescale" => {
                let on = words("rescale").and_then(|words| words.iter().find(|word| **word != "none").copied());
                let on = if words("rescale").is_some_and(|words| words.contains(&"l1")) { Some("l1") } else { on };
                if let Some(on) = on {
                    return Some(("rescale", Kind::Switch(on, "none")));
                }
            }
            _ => {}
        }
        if let Some(spec) = specs.iter().find(|spec| spec.name == name) {
            return Some((spec.name, Kind::Declared(*spec)));
        }
        if name == "normalize" && words("combine").is_some_and(|w| w.contains(&"mean") && w.contains(&"sum")) {
            return Some(("combine", Kind::Switch("mean", "sum")));
        }
        None
    }

    /// A name that the method does not have.
    fn foreign(&self, key: &Key, warnings: &mut Vec<String>) -> Result<()> {
        let own: Vec<&str> = self.method.params().iter().map(|spec| spec.name).collect();
        let all = METHODS.iter().flat_map(|method| method.params()).map(|spec| spec.name);
        if !NAMES.contains(&&*key.text) && !all.clone().any(|name| name == key.text) {
            let known: Vec<&str> = own.into_iter().chain(NAMES.iter().copied()).collect();
            return Err(self.reader.unknown(key.place, "parameter", &key.text, &known));
        }
        warnings.push(format!(
            "{}: {} has no parameter {}: it is ignored",
            self.reader.spot(key.place),
            self.method.name(),
            key.text
        ));
        Ok(())
    }

    fn setting(&self, node: &Node, name: &str, kind: Kind) -> Result<Setting> {
        match &node.content {
            Content::Scalar { .. } => Ok(Setting::Value(self.value(node, name, kind)?)),
            Content::Map(_) => Ok(Setting::Cases(vec![self.case(node, name, kind)?])),
            Content::List(items) if items.is_empty() => {
                Err(self.reader.fail(node.place, format!("{name} is an empty list")))
            }
            Content::List(items) if items.iter().all(|item| matches!(item.content, Content::Map(_))) => {
                Ok(Setting::Cases(items.iter().map(|item| self.case(item, name, kind)).collect::<Result<_>>()?))
            }
            Content::List(items) => {
                if let Some(other) = items.iter().find(|item| !matches!(item.content, Content::Scalar { .. })) {
                    return Err(self
                        .reader
                        .fail(other.place, format!("{} in a gradient of {name}", other.kind()))
                        .help("a list holds either numbers or 'value' and 'filter' mappings"));
                }
                let values: Vec<Value> =
                    items.iter().map(|item| self.value(item, name, kind)).collect::<Result<_>>()?;
                let number = |value: &Value| match value {
                    Value::Number(x) => Some(*x),
                    Value::Word(_) => None,
                };
                let numbers: Option<Vec<f64>> = values.iter().map(number).collect();
                Ok(numbers.map_or(Setting::Steps(values), Setting::Gradient))
            }
        }
    }

    fn case(&self, node: &Node, name: &str, kind: Kind) -> Result<Case> {
        let fields = self.reader.fields(node, &format!("a case of {name}"), &["value", "filter"])?;
        let Some(value) = fields.get("value") else {
            return Err(self.reader.fail(fields.place, format!("a case of {name} without a value")));
        };
        let filter = match fields.get("filter") {
            None => None,
            Some(filter) => match self.reader.text(filter, "filter")? {
                "*" => None,
                text => Some(Filter::new(text).map_err(|e| e.at(Path::new(&self.reader.spot(filter.place))))?),
            },
        };
        Ok(Case { filter, value: self.setting(value, name, kind)? })
    }

    fn value(&self, node: &Node, name: &str, kind: Kind) -> Result<Value> {
        let spec = match kind {
            Kind::Switch(..) | Kind::Idle => {
                let on = self.boolean(node, name)?;
                let (yes, no) = if let Kind::Switch(yes, no) = kind { (yes, no) } else { ("true", "false") };
                return Ok(Value::Word((if on { yes } else { no }).into()));
            }
            Kind::Declared(spec) => spec,
        };
        let value = match spec.kind {
            ParamKind::Number { .. } => match (node.number(), node.boolean()) {
                (Some(number), _) => Value::Number(number),
                (None, Some(on)) => Value::Number(f64::from(u8::from(on))),
                (None, None) => return Err(self.not(node, name, "a number")),
            },
            ParamKind::Choice(words) => match (node.boolean(), words.iter().find(|word| node.text() == Some(word))) {
                (_, Some(word)) => Value::Word((*word).into()),
                (Some(on), None) if words.contains(&"true") => Value::Word((if on { "true" } else { "false" }).into()),
                _ => return Err(self.reader.unknown(node.place, name, node.text().unwrap_or_default(), words)),
            },
        };
        spec.check(&value).map_err(|e| e.at(Path::new(&self.reader.spot(node.place))))?;
        Ok(value)
    }

    fn boolean(&self, node: &Node, name: &str) -> Result<bool> {
        match (node.boolean(), node.number()) {
            (Some(on), _) => Ok(on),
            (None, Some(x)) if x == 0.0 || x == 1.0 => Ok(x == 1.0),
            _ => Err(self.not(node, name, "true or false")),
        }
    }

    fn not(&self, node: &Node, name: &str, wanted: &str) -> Error {
        let given = match node.text() {
            Some(text) => format!("\"{}\"", printable(text)),
            None => node.kind().to_string(),
        };
        self.reader.fail(node.place, format!("{name} must be {wanted}, not {given}"))
    }
}
