//! What the user asked for, free of any dialect: the command line (and later YAML) is lowered into a [`Recipe`].
//!
//! - A recipe plus the inputs determine every output byte; how the run is done (threads, memory, I/O) is not in it.
//! - It opens no checkpoint: names are only spelled here, numbers only range-checked.

pub mod mergekit;
mod module;
mod setting;

use std::collections::BTreeSet;

use globset::{Glob, GlobSet, GlobSetBuilder};
use serde::{Deserialize, Serialize};

use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::method::{self, Method, Statistics, Value};

pub use module::{Module, ModuleModel};
pub use setting::{Case, Filter, Params, Setting};

/// One threshold per task vector over the whole model, or one per tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Over all merged tensors (the paper).
    #[default]
    Model,
    /// Per tensor (mergekit).
    Tensor,
}

/// How the trim threshold is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ThresholdKind {
    /// The true k-th largest magnitude.
    #[default]
    Exact,
    /// From a fixed-size histogram, with a certified rank interval.
    Sketch,
}

/// What happens to magnitudes equal to the threshold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrimTies {
    /// All are kept (the paper's code).
    #[default]
    Keep,
    /// Exactly ⌊K·d⌋ survive, ties by lowest position.
    Lowest,
    /// Ties survive by a seeded draw that meets ⌊K·d⌋ in expectation.
    Sample,
}

/// What to do with a tensor that some model lacks or has in another shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Missing {
    /// Refuse, naming all parties.
    #[default]
    Error,
    /// Keep base's tensor.
    Base,
    /// Merge the models that have it.
    Skip,
}

/// What a NaN or an infinity in an input does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NonFinite {
    /// Refuse, naming model, tensor and index.
    #[default]
    Error,
    /// The element keeps base's value.
    CopyBase,
    /// The element becomes the sum of the non-finite inputs (NaN stays NaN).
    Propagate,
}

/// What a result too large for the output type does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Overflow {
    /// Refuse, naming the tensor.
    #[default]
    Error,
    /// Becomes the largest finite value of the type.
    Clamp,
}

/// One model to merge.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelInput {
    /// The checkpoint as the user named it.
    pub source: String,
    /// Its own parameters (`weight`, `density`, ...), overriding the recipe's.
    pub params: Params,
    /// The checkpoint of its Fisher information, for methods that weigh by it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fisher: Option<String>,
    /// The checkpoint of the Gram matrices of its layers' inputs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gram: Option<String>,
}

/// Layers of the output, taken from layers of the inputs.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Slice {
    /// How many layers.
    pub layers: u64,
    /// The models that are merged in them.
    pub sources: Vec<LayerSource>,
    /// What the models were fine-tuned from, where the method works on task vectors.
    pub base: Option<BaseLayers>,
    /// Parameters of this slice, between those of a source and the recipe's.
    pub params: Params,
}

/// A model in a slice.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LayerSource {
    /// Index of the model in the recipe.
    pub model: usize,
    /// The first of its layers.
    pub first: u64,
    /// Its own parameters in this slice.
    pub params: Params,
    /// Where this is written, for messages.
    #[serde(skip)]
    pub place: Option<String>,
}

/// Which vocabulary the output has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Vocabulary {
    /// Base's (or the first model's).
    Base,
    /// Base's, and every token that some model has besides.
    Union,
    /// That of the model called so, which need not take part otherwise.
    Model(String),
}

/// What a single token's row is, where the output's vocabulary is reconciled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenRule {
    /// The token; it is added to the vocabulary if it is not in it.
    pub token: String,
    /// The row of models that lack the token; `None` for the row that they would have anyway.
    pub source: Option<TokenSource>,
    /// Whether models that have the token take that row too.
    pub force: bool,
    /// Where this is written, for messages.
    #[serde(skip)]
    pub place: Option<String>,
}

/// Where a token's row comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenSource {
    /// The same token in the model called so.
    Model(String),
    /// Another token in a model: (model, token).
    Token(String, String),
    /// A row of a model: (model, its number).
    Row(String, u64),
    /// Zeros.
    Zero,
}

impl TokenSource {
    /// The model that it names.
    pub fn model(&self) -> Option<&String> {
        match self {
            Self::Model(model) | Self::Token(model, _) | Self::Row(model, _) => Some(model),
            Self::Zero => None,
        }
    }

    /// The same, to be renamed.
    pub fn model_mut(&mut self) -> Option<&mut String> {
        match self {
            Self::Model(model) | Self::Token(model, _) | Self::Row(model, _) => Some(model),
            Self::Zero => None,
        }
    }
}

/// Which chat template the output has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ChatTemplate {
    /// The one that most inputs have.
    Auto,
    /// This one.
    Text(String),
}

/// Base in a slice.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BaseLayers {
    /// Index of the model in the recipe that is base here; the recipe's base if absent.
    pub model: Option<usize>,
    /// The first of its layers.
    pub first: u64,
}

/// A whole request. Build one, then lower it with [`crate::Plan::new`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Recipe {
    /// Method name, see [`crate::METHODS`].
    pub method: String,
    /// The checkpoint that the models were fine-tuned from.
    pub base: Option<String>,
    /// The models, in order; sums run in this order.
    pub models: Vec<ModelInput>,
    /// Method parameters for all models (`lambda`, `density`, `elect`, ...), as far as given.
    pub params: Params,
    /// Parameters that have no default: each merged tensor must be given one.
    pub required: BTreeSet<String>,
    /// The output's layers, in order; empty to merge whole models.
    pub slices: Vec<Slice>,
    /// Parts of the model that are merged each in its own way; empty to merge all of it alike.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub modules: Vec<Module>,
    /// What `config.json` of the output names as its architecture; `None` for what the template's says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub architecture: Option<String>,
    /// Whether a head that a checkpoint lacks is its input embedding.
    pub tied_heads: bool,
    /// Whether embeddings and heads of models with longer vocabularies are cropped.
    pub crop_vocabulary: bool,
    /// The vocabulary that embeddings and heads of all models are brought to; `None` leaves them as they are.
    pub vocabulary: Option<Vocabulary>,
    /// Rows of single tokens; needs a vocabulary.
    pub token_rules: Vec<TokenRule>,
    /// What the number of rows of embeddings and heads is a multiple of; needs a vocabulary.
    pub vocabulary_multiple: Option<u64>,
    /// The chat template; `None` for that of the tokenizer's files.
    pub chat_template: Option<ChatTemplate>,
    /// Where one trim threshold applies.
    pub scope: Scope,
    /// How it is found.
    pub threshold: ThresholdKind,
    /// Ties at it.
    pub trim_ties: TrimTies,
    /// Checkpoint whose task vector gives the elected signs (the oracle of the paper's section 7.2).
    pub sign_from: Option<String>,
    /// Seed of every random draw.
    pub seed: u64,
    /// Output type of all float tensors; `None` keeps the stored type of base.
    #[serde(serialize_with = "serialize_float", deserialize_with = "deserialize_float")]
    pub dtype: Option<Float>,
    /// Globs of tensor names to merge; empty means all.
    pub include: Vec<String>,
    /// Globs of tensor names to copy from base instead of merging.
    pub exclude: Vec<String>,
    /// Tensors that not all have.
    pub missing: Missing,
    /// NaN and infinities.
    pub non_finite: NonFinite,
    /// Results too large for the output type.
    pub overflow: Overflow,
    /// Largest shard, in tensor bytes.
    pub max_shard_bytes: u64,
    /// The rank of the output, where LoRA adapters are merged with each other through the changes that they make.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<u64>,
    /// What packed task vectors are put on, where `base` is not given; else the checkpoint that they name.
    #[serde(skip)]
    pub packed_base: Option<String>,
}

impl Default for Recipe {
    /// The paper's recipe without validation data, with nothing to merge yet.
    fn default() -> Self {
        Self {
            method: "ties".into(),
            base: None,
            models: Vec::new(),
            params: Params::new(),
            required: BTreeSet::new(),
            slices: Vec::new(),
            modules: Vec::new(),
            architecture: None,
            tied_heads: false,
            crop_vocabulary: false,
            vocabulary: None,
            token_rules: Vec::new(),
            vocabulary_multiple: None,
            chat_template: None,
            scope: Scope::default(),
            threshold: ThresholdKind::default(),
            trim_ties: TrimTies::default(),
            sign_from: None,
            seed: 0,
            dtype: None,
            include: Vec::new(),
            exclude: Vec::new(),
            missing: Missing::default(),
            non_finite: NonFinite::default(),
            overflow: Overflow::default(),
            max_shard_bytes: 5_000_000_000,
            rank: None,
            packed_base: None,
        }
    }
}

impl ModelInput {
    /// The checkpoint that a method needs besides the weights.
    pub fn statistics(&self, kind: Statistics) -> Option<&String> {
        match kind {
            Statistics::Fisher => self.fisher.as_ref(),
            Statistics::Gram => self.gram.as_ref(),
        }
    }

    /// Changes the name of every checkpoint.
    pub fn rename(&mut self, mut name: impl FnMut(&str) -> String) {
        self.source = name(&self.source);
        for other in [&mut self.fisher, &mut self.gram] {
            *other = other.as_deref().map(&mut name);
        }
    }
}

impl Recipe {
    /// The method named, or an error that lists the closest and all names.
    pub fn method(&self) -> Result<&'static dyn Method> {
        method::find(&self.method)
    }

    /// Every checkpoint that is named: base, models, the oracle, what models have besides, and those of the tokenizer.
    pub fn sources(&self) -> impl Iterator<Item = &str> {
        let besides = self.models.iter().flat_map(|model| [&model.fisher, &model.gram]).flatten();
        let tokens = self.token_rules.iter().filter_map(|rule| rule.source.as_ref()?.model());
        let vocabulary = self.vocabulary.as_ref().and_then(|vocabulary| match vocabulary {
            Vocabulary::Model(model) => Some(model),
            Vocabulary::Base | Vocabulary::Union => None,
        });
        let models = self.models.iter().map(|model| &model.source);
        let all = self.base.iter().chain(models).chain(&self.sign_from).chain(besides).chain(vocabulary).chain(tokens);
        all.map(String::as_str)
    }

    /// The same, to be renamed.
    pub fn rename_sources(&mut self, mut name: impl FnMut(&mut String)) {
        self.base.iter_mut().for_each(&mut name);
        self.models.iter_mut().for_each(|model| name(&mut model.source));
        self.sign_from.iter_mut().for_each(&mut name);
        self.models.iter_mut().flat_map(|model| [&mut model.fisher, &mut model.gram]).flatten().for_each(&mut name);
        if let Some(Vocabulary::Model(model)) = &mut self.vocabulary {
            name(model);
        }
        self.token_rules.iter_mut().filter_map(|rule| rule.source.as_mut()?.model_mut()).for_each(name);
    }

    /// The trim of one checkpoint against its base, for [`crate::pack`]; density 1 packs all that differs.
    pub fn packing(checkpoint: &str, base: &str, density: f64) -> Self {
        let whole = density >= 1.0;
        Self {
            base: Some(base.to_owned()),
            models: vec![ModelInput { source: checkpoint.to_owned(), ..ModelInput::default() }],
            params: Params::from([("density".to_owned(), Value::Number(density).into())]),
            // What is packed whole needs no reconciling: no tensor is looked at for its task vector.
            exclude: if whole { vec!["*".into()] } else { Vec::new() },
            missing: Missing::Base,
            ..Self::default()
        }
    }

    /// The tensors of one checkpoint as they are: what [`crate::merge()`] makes of it is a copy, in shards of its own.
    pub fn copying(checkpoint: &str) -> Self {
        Self {
            method: "passthrough".into(),
            models: vec![ModelInput { source: checkpoint.to_owned(), ..ModelInput::default() }],
            exclude: vec!["*".into()],
            ..Self::default()
        }
    }

    /// Gives a parameter one value, whatever models and slices say.
    pub fn set_everywhere(&mut self, name: &str, value: Value) {
        let inner = self.slices.iter_mut().flat_map(Slice::params_mut);
        let inner = inner.chain(self.modules.iter_mut().flat_map(Module::params_mut));
        inner.for_each(|params| drop(params.remove(name)));
        self.models.iter_mut().for_each(|model| drop(model.params.remove(name)));
        self.params.insert(name.to_string(), value.into());
    }

    /// The same models in the same places, as [`crate::Study`] looks at them: with the method `ties`, whatever this one's
    /// is, and of all parameters the densities alone.
    pub fn as_studied(mut self) -> Self {
        let inner = self.slices.iter_mut().flat_map(Slice::params_mut);
        let inner = inner.chain(self.modules.iter_mut().flat_map(Module::params_mut)).chain([&mut self.params]);
        inner.for_each(|params| params.retain(|name, _| name == "density"));
        for model in &mut self.models {
            model.params.retain(|name, _| name == "density");
            (model.fisher, model.gram) = (None, None);
        }
        let method = Self::default().method;
        Self { method, required: BTreeSet::new(), sign_from: None, dtype: None, chat_template: None, ..self }
    }

    /// Whether layers are taken from models one by one, anywhere.
    pub fn assembles_layers(&self) -> bool {
        !self.slices.is_empty() || self.modules.iter().any(|module| !module.slices.is_empty())
    }

    /// All slices, those of modules too.
    pub fn all_slices(&self) -> impl Iterator<Item = &Slice> {
        self.slices.iter().chain(self.modules.iter().flat_map(|module| &module.slices))
    }

    /// Which tensor names are to be merged.
    pub fn filter(&self) -> Result<TensorFilter> {
        Ok(TensorFilter { include: globs("--include", &self.include)?, exclude: globs("--exclude", &self.exclude)? })
    }
}

/// Compiled `include` and `exclude` globs. `*` also matches dots and slashes.
pub struct TensorFilter {
    include: Option<GlobSet>,
    exclude: Option<GlobSet>,
}

impl TensorFilter {
    /// Whether a tensor of this name is to be merged.
    pub fn merges(&self, name: &str) -> bool {
        self.include.as_ref().is_none_or(|g| g.is_match(name))
            && !self.exclude.as_ref().is_some_and(|g| g.is_match(name))
    }
}

fn globs(flag: &str, patterns: &[String]) -> Result<Option<GlobSet>> {
    if patterns.is_empty() {
        return Ok(None);
    }
    let mut set = GlobSetBuilder::new();
    for pattern in patterns {
        let glob = Glob::new(pattern).map_err(|e| {
            Error::usage(format!("{flag} {pattern:?}: {}", e.kind())).help("a glob is like 'model.layers.*.mlp.*'")
        })?;
        set.add(glob);
    }
    set.build().map(Some).map_err(|e| Error::usage(format!("{flag}: {e}")))
}

fn serialize_float<S: serde::Serializer>(float: &Option<Float>, s: S) -> std::result::Result<S::Ok, S::Error> {
    float.map(Float::torch_name).serialize(s)
}

fn deserialize_float<'de, D: serde::Deserializer<'de>>(d: D) -> std::result::Result<Option<Float>, D::Error> {
    let Some(name) = Option::<String>::deserialize(d)? else { return Ok(None) };
    let known = [Float::F32, Float::BF16, Float::F16].into_iter().find(|float| float.torch_name() == name);
    known.map(Some).ok_or_else(|| serde::de::Error::custom(format!("no element type is called {name:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_is_read_back_from_json_as_it_was() {
        let mut recipe =
            Recipe { base: Some("b".into()), dtype: Some(Float::BF16), seed: u64::MAX, ..Recipe::default() };
        let cases = vec![
            Case { filter: Some(Filter::new("*.mlp.*").unwrap()), value: Setting::Gradient(vec![0.1, 1.0 / 3.0]) },
            Case { filter: None, value: Value::Number(0.7 + 0.1).into() },
        ];
        recipe.params.insert("lambda".into(), Setting::Cases(cases));
        recipe.params.insert("elect".into(), Value::Word("count".into()).into());
        let steps = vec![Value::Word("mean".into()), Value::Word("sum".into())];
        recipe.params.insert("combine".into(), Setting::Steps(steps));
        let params = recipe.params.clone();
        recipe.models.push(ModelInput { source: "m".into(), params, ..ModelInput::default() });
        recipe.vocabulary = Some(Vocabulary::Model("m".into()));
        recipe.chat_template = Some(ChatTemplate::Text("{{ x }}".into()));
        recipe.slices.push(Slice { layers: 2, sources: vec![LayerSource::default()], ..Slice::default() });
        let json = serde_json::to_string(&recipe).unwrap();
        assert_eq!(serde_json::from_str::<Recipe>(&json).unwrap(), recipe);
        for broken in [r#"{"params":{"lambda":[]}}"#, r#"{"dtype":"int8"}"#, r#"{"no_such_field":1}"#, r#"{"seed":-1}"#]
        {
            assert!(serde_json::from_str::<Recipe>(broken).is_err(), "{broken}");
        }
    }

    #[test]
    fn globs_match_across_dots_and_exclude_wins() {
        let recipe = Recipe { include: vec!["model.*".into()], exclude: vec!["*.mlp.*".into()], ..Recipe::default() };
        let filter = recipe.filter().unwrap();
        assert!(filter.merges("model.layers.0.self_attn.q_proj.weight"));
        assert!(!filter.merges("model.layers.0.mlp.up_proj.weight"));
        assert!(!filter.merges("lm_head.weight"));
    }

    #[test]
    fn a_broken_glob_is_a_usage_error_that_names_the_flag() {
        let recipe = Recipe { include: vec!["a[".into()], ..Recipe::default() };
        let error = recipe.filter().err().unwrap();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("--include \"a[\""), "{error}");
    }
}
