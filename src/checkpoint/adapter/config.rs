//! `adapter_config.json` of a PEFT adapter: which kind it is, and what its numbers mean.
//!
//! - LoRA (rsLoRA included) and (IA)³ are read; every other kind is refused by its name.
//! - An option that changes the mathematics and is not known here is refused, not ignored: an adapter that is read wrong
//!   looks like a worse model, not like an error.
//! - Defaults are those of PEFT, which older files leave out.
//!
//! Knows nothing of tensors.

use std::path::Path;

use regex::{RegexSet, RegexSetBuilder};
use serde_json::{Map, Value};

use crate::error::{Error, Result, printable};
use crate::limits::MAX_ADAPTER_CONFIG_BYTES;
use crate::storage::Storage;

/// The file's name.
pub(crate) const CONFIG: &str = "adapter_config.json";
/// Most memory that a compiled table of patterns may take: enough for a line per module of the largest models.
const MAX_TABLE_BYTES: usize = 8 << 20;

/// Options of LoRA that leave the mathematics of a saved adapter alone.
const HARMLESS: &[&str] = &[
    "alpha_pattern",
    "arrow_config",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "feedforward_modules",
    "inference_mode",
    "init_ia3_weights",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
];
/// Ways to begin that change the base model's weights, so that the adapter alone does not say what was trained.
const CHANGES_BASE: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

/// What an adapter is, and how it is scaled.
#[derive(Debug)]
pub(crate) struct Config {
    /// LoRA or (IA)³.
    pub(crate) kind: Kind,
    /// Whether weights are stored as [in, out], where shapes do not tell.
    pub(crate) transposed: bool,
}

/// A kind of adapter.
#[derive(Debug)]
pub(crate) enum Kind {
    /// W + s B A.
    Lora(Lora),
    /// W with its rows or columns scaled.
    Ia3 {
        /// Ends of the names of modules whose inputs are scaled.
        feedforward: Vec<String>,
    },
}

/// The numbers of LoRA.
#[derive(Debug)]
pub(crate) struct Lora {
    rank: u64,
    alpha: f64,
    /// Whether s is alpha / √r and not alpha / r.
    rank_stabilized: bool,
    ranks: Table<u64>,
    alphas: Table<f64>,
}

/// Numbers by patterns of module names.
#[derive(Debug)]
struct Table<T> {
    patterns: RegexSet,
    values: Vec<T>,
}

impl<T: Copy> Table<T> {
    /// The value of the first pattern that matches.
    fn get(&self, module: &str) -> Option<T> {
        self.patterns.matches(module).iter().next().map(|index| self.values[index])
    }
}

impl Lora {
    /// The rank that `module` is said to have.
    pub(crate) fn rank(&self, module: &str) -> u64 {
        self.ranks.get(module).unwrap_or(self.rank)
    }

    /// s of `module`.
    pub(crate) fn scale(&self, module: &str) -> f64 {
        let (alpha, rank) = (self.alphas.get(module).unwrap_or(self.alpha), self.rank(module) as f64);
        if self.rank_stabilized { alpha / rank.sqrt() } else { alpha / rank }
    }
}

impl Config {
    /// Reads the configuration in `dir`.
    pub(crate) fn read(dir: &Path, storage: &dyn Storage) -> Result<Self> {
        let path = dir.join(CONFIG);
        let bytes = storage.read_small(&path, MAX_ADAPTER_CONFIG_BYTES).map_err(Error::as_input)?;
        Self::parse(&bytes).map_err(|e| e.at(&path))
    }

    /// Reads the text of a configuration.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        let json: Value = serde_json::from_slice(bytes)
            .map_err(|e| Error::input(format!("not valid JSON: {e}")).help("download the adapter again"))?;
        let Value::Object(json) = json else {
            return Err(Error::input("not a JSON object, as the configuration of an adapter is"));
        };
        let kind = match json.get("peft_type").and_then(Value::as_str) {
            Some("LORA") => Kind::Lora(lora(&json)?),
            Some("IA3") => Kind::Ia3 { feedforward: names(&json, "feedforward_modules")? },
            Some(other) => {
                return Err(Error::input(format!("peft_type {} is not supported", printable(other)))
                    .help("LORA and IA3 are; merge other adapters into their model with peft (merge_and_unload)"));
            }
            None => return Err(Error::input("no peft_type, so it is not known what kind of adapter this is")),
        };
        refuse_unknown(&json)?;
        Ok(Self { kind, transposed: flag(&json, "fan_in_fan_out")? })
    }
}

fn lora(json: &Map<String, Value>) -> Result<Lora> {
    if flag(json, "use_dora")? {
        return Err(Error::input("DoRA (use_dora) is not supported").help(MERGE_FIRST));
    }
    let initial = json.get("init_lora_weights").and_then(Value::as_str).unwrap_or_default();
    if CHANGES_BASE.iter().any(|name| initial.starts_with(name)) {
        return Err(Error::input(format!(
            "init_lora_weights is \"{}\", which changes the base model's weights too",
            printable(initial)
        ))
        .help("save it with peft's path_initial_model_for_weight_conversion, which makes it an ordinary LoRA"));
    }
    let rank = whole(json.get("r"), "r", 8)?;
    let alpha = number(json.get("lora_alpha"), "lora_alpha", 8.0)?;
    let ranks = table(json, "rank_pattern", |value| whole(Some(value), "a rank in rank_pattern", 0))?;
    let alphas = table(json, "alpha_pattern", |value| number(Some(value), "an alpha in alpha_pattern", 0.0))?;
    Ok(Lora { rank, alpha, rank_stabilized: flag(json, "use_rslora")?, ranks, alphas })
}

const MERGE_FIRST: &str = "merge the adapter into its model first (peft: merge_and_unload, then save_pretrained)";

/// Refuses options that are set and may mean something.
fn refuse_unknown(json: &Map<String, Value>) -> Result<()> {
    let unset = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    };
    match json.iter().find(|(name, value)| !HARMLESS.contains(&name.as_str()) && !unset(value)) {
        None => Ok(()),
        Some((name, _)) => {
            Err(Error::input(format!("the option {} is set, which is not supported", printable(name)))
                .help(MERGE_FIRST))
        }
    }
}

fn flag(json: &Map<String, Value>, name: &str) -> Result<bool> {
    match json.get(name) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(other) => Err(Error::input(format!("{name} is {}, but must be true or false", shown(other)))),
    }
}

fn whole(value: Option<&Value>, name: &str, default: u64) -> Result<u64> {
    let Some(value) = value.filter(|value| !value.is_null()) else { return Ok(default) };
    value
        .as_u64()
        .filter(|n| (1..=u64::from(u32::MAX)).contains(n))
        .ok_or_else(|| Error::input(format!("{name} is {}, but must be a whole number above 0", shown(value))))
}

fn number(value: Option<&Value>, name: &str, default: f64) -> Result<f64> {
    let Some(value) = value.filter(|value| !value.is_null()) else { return Ok(default) };
    value
        .as_f64()
        .filter(|x| x.is_finite() && (*x as f32).is_finite())
        .ok_or_else(|| Error::input(format!("{name} is {}, but must be a number", shown(value))))
}

/// One name, or a list of them; nothing if it is not given.
fn names(json: &Map<String, Value>, name: &str) -> Result<Vec<String>> {
    match json.get(name) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::String(one)) => Ok(vec![one.clone()]),
        Some(Value::Array(list)) if list.iter().all(Value::is_string) => {
            Ok(list.iter().filter_map(Value::as_str).map(str::to_owned).collect())
        }
        Some(other) => Err(Error::input(format!("{name} is {}, but must be a list of names", shown(other)))),
    }
}

/// A table from patterns of module names to numbers. A pattern matches a name's last components.
fn table<T>(json: &Map<String, Value>, name: &str, read: impl Fn(&Value) -> Result<T>) -> Result<Table<T>> {
    let empty = Map::new();
    let entries = match json.get(name) {
        None | Some(Value::Null) => &empty,
        Some(Value::Object(entries)) => entries,
        Some(other) => return Err(Error::input(format!("{name} is {}, but must be an object", shown(other)))),
    };
    let values = entries.values().map(read).collect::<Result<_>>()?;
    let compile = |patterns: &mut dyn Iterator<Item = &String>| {
        let whole = patterns.map(|pattern| format!(r"^(?:.*\.)?(?:{pattern})$"));
        RegexSetBuilder::new(whole).size_limit(MAX_TABLE_BYTES).dfa_size_limit(MAX_TABLE_BYTES).build()
    };
    match compile(&mut entries.keys()) {
        Ok(patterns) => Ok(Table { patterns, values }),
        Err(error) => {
            // Which one it is takes compiling them one by one: worth it for one that is wrong, not for too many.
            let wrong = || entries.keys().find(|pattern| compile(&mut std::iter::once(*pattern)).is_err());
            let bad = if matches!(error, regex::Error::CompiledTooBig(_)) { None } else { wrong() };
            let what = match bad {
                Some(pattern) => format!("the pattern \"{}\" cannot be understood", printable(pattern)),
                None => format!("{} patterns take too much memory", entries.len()),
            };
            Err(Error::input(format!("{name}: {what}")).help("write module names, or plain regular expressions"))
        }
    }
}

/// A value in a message.
fn shown(value: &Value) -> String {
    printable(&value.to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(json: &Value) -> Result<Config> {
        Config::parse(json.to_string().as_bytes())
    }

    fn lora_of(json: &Value) -> Lora {
        match parse(json).unwrap().kind {
            Kind::Lora(lora) => lora,
            Kind::Ia3 { .. } => panic!("not LoRA"),
        }
    }

    #[test]
    fn scales_follow_ranks_and_patterns_as_in_peft() {
        let plain = lora_of(&json!({"peft_type": "LORA", "r": 16, "lora_alpha": 32}));
        assert_eq!(plain.scale("a.q_proj"), 2.0);
        let defaults = lora_of(&json!({"peft_type": "LORA"}));
        assert_eq!((defaults.rank("q"), defaults.scale("q")), (8, 1.0));
        let patterns = lora_of(&json!({
            "peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": true,
            "rank_pattern": {"q_proj": 16, "layers.1.v_proj": 9}, "alpha_pattern": {"^model.layers.0.k_proj": 2.5},
        }));
        assert_eq!(patterns.scale("model.layers.7.q_proj"), 8.0 / 4.0);
        assert_eq!(patterns.rank("model.layers.1.v_proj"), 9);
        assert_eq!(patterns.rank("model.layers.11.v_proj"), 4);
        assert_eq!(patterns.scale("model.layers.0.k_proj"), 2.5 / 2.0);
        assert_eq!(patterns.rank("model.layers.7.other_q_proj"), 4, "a component, not its end");
    }

    #[test]
    fn what_is_not_understood_is_refused_by_name() {
        let with = |name: &str, value: Value| {
            let mut json = json!({"peft_type": "LORA", "r": 4});
            json[name] = value;
            parse(&json).unwrap_err().to_string()
        };
        let cases = [
            ("peft_type", json!("LOHA"), "peft_type LOHA is not supported"),
            ("peft_type", json!("PREFIX_TUNING"), "peft_type PREFIX_TUNING"),
            ("peft_type", json!(3), "no peft_type"),
            ("use_dora", json!(true), "DoRA (use_dora) is not supported"),
            ("init_lora_weights", json!("pissa_niter_4"), "changes the base model's weights"),
            ("layer_replication", json!([[0, 4]]), "option layer_replication is set"),
            ("target_parameters", json!(["experts"]), "option target_parameters"),
            ("lora_bias", json!(true), "option lora_bias"),
            ("trainable_token_indices", json!([1]), "option trainable_token_indices"),
            ("invented_later", json!(0.5), "option invented_later"),
            ("r", json!(0), "r is 0"),
            ("r", json!(-1), "r is -1"),
            ("r", json!("4"), "r is \"4\""),
            ("lora_alpha", json!([1]), "lora_alpha is [1]"),
            ("lora_alpha", json!(1e300), "lora_alpha is 1e+300"),
            ("use_rslora", json!("yes"), "use_rslora is \"yes\""),
            ("rank_pattern", json!([1]), "rank_pattern is [1]"),
            ("rank_pattern", json!({"a(": 4}), "the pattern \"a(\""),
            ("alpha_pattern", json!({"a": null}), ""),
        ];
        for (name, value, message) in cases {
            if !message.is_empty() {
                let error = with(name, value);
                assert!(error.contains(message), "{name}: {error}");
            }
        }
        for text in ["", "{", "[]", "null", "{\"peft_type\": \"LORA\", \"r\": 1e400}"] {
            assert_eq!(Config::parse(text.as_bytes()).unwrap_err().exit_code(), 2, "{text}");
        }
        for harmless in [json!(null), json!(false), json!([]), json!({})] {
            let mut json = json!({"peft_type": "LORA", "invented_later": harmless});
            json["qalora_group_size"] = 16.into();
            assert!(parse(&json).is_ok());
        }
    }

    #[test]
    fn feedforward_modules_are_a_list_or_one() {
        for (given, expected) in
            [(json!(["w0", "wo"]), vec!["w0", "wo"]), (json!("w0"), vec!["w0"]), (json!(null), vec![])]
        {
            let config = parse(&json!({"peft_type": "IA3", "feedforward_modules": given})).unwrap();
            let Kind::Ia3 { feedforward } = config.kind else { panic!("not (IA)³") };
            assert_eq!(feedforward, expected);
        }
    }
}
