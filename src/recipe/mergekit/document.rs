//! One document: its keys, and the recipe that they make.

use std::collections::HashMap;

use super::Document;
use super::models::{Inputs, named};
use super::node::{Content, Node};
use super::reader::{Fields, Reader};
use super::settings::{self, Scope, Settings};
use super::templates::TEMPLATES;
use super::tokenizer;
use crate::dtype::Float;
use crate::error::{Result, printable};
use crate::method::{METHODS, Method};
use crate::recipe::{ChatTemplate, Params, Recipe, Scope as TrimScope, Setting, ThresholdKind, TrimTies};

/// Shorter texts are names, as in mergekit.
const SHORTEST_TEMPLATE: usize = 20;
/// Every key of a document.
const KEYS: &[&str] = &[
    "merge_method",
    "models",
    "slices",
    "modules",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "name",
    "scope",
    "threshold",
    "trim_ties",
    "seed",
    "rank",
    "elect",
    "combine",
    "zero_sum",
];
/// Methods of mergekit by their names, to tell a slip of the pen from what is not there yet.
const MERGEKIT_METHODS: &[&str] = &[
    "linear",
    "slerp",
    "nuslerp",
    "passthrough",
    "model_stock",
    "arcee_fusion",
    "karcher",
    "task_arithmetic",
    "ties",
    "dare_ties",
    "dare_linear",
    "breadcrumbs",
    "breadcrumbs_ties",
    "della",
    "della_linear",
    "multislerp",
    "sce",
    "nearswap",
    "ram",
    "ramplus_tl",
];
const SCOPES: &[(&str, TrimScope)] = &[("tensor", TrimScope::Tensor), ("model", TrimScope::Model)];
const THRESHOLDS: &[(&str, ThresholdKind)] = &[("exact", ThresholdKind::Exact), ("sketch", ThresholdKind::Sketch)];
const TRIM_TIES: &[(&str, TrimTies)] =
    &[("keep", TrimTies::Keep), ("lowest", TrimTies::Lowest), ("sample", TrimTies::Sample)];
const DTYPES: &[(&str, Float)] = &[
    ("float32", Float::F32),
    ("float16", Float::F16),
    ("bfloat16", Float::BF16),
    ("torch.float32", Float::F32),
    ("torch.float16", Float::F16),
    ("torch.bfloat16", Float::BF16),
];

/// Reads the document `node`.
pub(super) fn read(reader: Reader<'_>, node: &Node) -> Result<Document> {
    let fields = reader.fields(node, "a recipe", KEYS)?;
    let method = method(reader, &fields)?;
    let mut architectures = Vec::new();
    let base = match fields.get("base_model") {
        Some(node) => Some(named(reader, node, "base_model", &mut architectures)?),
        None => None,
    };
    // Adapters that are merged with each other have no base, and their rank says that they are.
    let rank = fields.get("rank").map(|node| rank(reader, node)).transpose()?;
    if method.needs_base() && base.is_none() && rank.is_none() && !every_slice_has_base(reader, &fields) {
        return Err(reader
            .fail(fields.place, format!("{} works on task vectors and needs 'base_model'", method.name()))
            .help("name the checkpoint that the models were fine-tuned from"));
    }
    let recipe = Recipe {
        method: method.name().into(),
        base,
        scope: choice(reader, &fields, "scope", SCOPES)?.unwrap_or(TrimScope::Tensor),
        threshold: choice(reader, &fields, "threshold", THRESHOLDS)?.unwrap_or_default(),
        trim_ties: choice(reader, &fields, "trim_ties", TRIM_TIES)?.unwrap_or(TrimTies::Lowest),
        seed: fields.get("seed").map_or(Ok(0), |node| reader.whole(node, "seed"))?,
        dtype: dtype(reader, &fields)?,
        rank,
        required: settings::required(method).collect(),
        tied_heads: true,
        crop_vocabulary: true,
        ..Recipe::default()
    };
    let settings = Settings { reader, method };
    let mut inputs = Inputs { settings, recipe, warnings: Vec::new(), architectures };
    let mut params = Params::new();
    shared_params(&inputs.settings, &fields, &mut params, &mut inputs.warnings)?;
    inputs.recipe.params = params;
    sources(reader, &fields, &mut inputs)?;
    for (name, default) in settings::defaults(method) {
        let setting = match inputs.recipe.params.remove(&name) {
            Some(Setting::Cases(cases)) => Setting::Cases(cases).or(default),
            Some(given) => given,
            None => default,
        };
        inputs.recipe.params.insert(name, setting);
    }
    let template = inputs.recipe.base.as_ref().or(inputs.recipe.models.first().map(|model| &model.source));
    let said = inputs.architectures.iter().find(|(source, _)| Some(source) == template);
    inputs.recipe.architecture = said.map(|(_, architecture)| architecture.clone());
    inputs.recipe.chat_template = fields.get("chat_template").map(|node| chat_template(reader, node)).transpose()?;
    tokenizer::read(reader, &fields, &mut inputs.recipe)?;
    let name = fields.get("name").map(|node| name(reader, node)).transpose()?;
    let mut places = HashMap::new();
    note_places(reader, node, &mut places);
    Ok(Document { name, recipe: inputs.recipe, warnings: inputs.warnings, places })
}

/// Notes where checkpoints are named. The document was read before, so it is neither deep nor large.
fn note_places(reader: Reader<'_>, node: &Node, places: &mut HashMap<String, String>) {
    match &node.content {
        Content::Scalar { .. } => {}
        Content::List(items) => items.iter().for_each(|item| note_places(reader, item, places)),
        Content::Map(entries) => {
            for (key, value) in entries {
                match value.text() {
                    Some(text)
                        if matches!(
                            &*key.text,
                            "model" | "base_model" | "path" | "tokenizer_source" | "source" | "fisher" | "gram"
                        ) =>
                    {
                        places.entry(text.to_owned()).or_insert_with(|| reader.spot(value.place));
                    }
                    _ => note_places(reader, value, places),
                }
            }
        }
    }
}

fn method(reader: Reader<'_>, fields: &Fields<'_>) -> Result<&'static dyn Method> {
    let Some(node) = fields.get("merge_method") else {
        return Err(reader.fail(fields.place, "no merge_method").help("write merge_method: NAME, such as ties"));
    };
    let name = reader.text(node, "merge_method")?;
    let names: Vec<&str> = METHODS.iter().map(|method| method.name()).collect();
    if let Some(method) = METHODS.iter().find(|method| method.name() == name) {
        return Ok(*method);
    }
    if MERGEKIT_METHODS.contains(&name) {
        let text = format!("merge_method {name} is not supported yet");
        return Err(reader.fail(node.place, text).help(format!("supported are: {}", names.join(", "))));
    }
    Err(reader.unknown(node.place, "merge_method", name, &names))
}

fn every_slice_has_base(reader: Reader<'_>, fields: &Fields<'_>) -> bool {
    let Some(Ok(items)) = fields.get("slices").map(|node| reader.list(node, "slices")) else { return false };
    let has = |item: &Node| reader.map(item, "a slice").is_ok_and(|slice| slice.get("base_model").is_some());
    items.iter().all(|item| has(item))
}

fn choice<T: Copy>(reader: Reader<'_>, fields: &Fields<'_>, key: &str, words: &[(&str, T)]) -> Result<Option<T>> {
    fields.get(key).map(|node| reader.word(node, key, words)).transpose()
}

/// The rank of the adapter that LoRA adapters are merged into.
fn rank(reader: Reader<'_>, node: &Node) -> Result<u64> {
    match reader.whole(node, "rank")? {
        0 => Err(reader.fail(node.place, "a rank of 0 holds nothing").help("give the output's rank, such as 16")),
        rank => Ok(rank),
    }
}

/// The type of the output: `out_dtype`, or else `dtype`.
fn dtype(reader: Reader<'_>, fields: &Fields<'_>) -> Result<Option<Float>> {
    let read = |key: &str| -> Result<Option<Float>> {
        let Some(node) = fields.get(key) else { return Ok(None) };
        if matches!(node.text(), Some("int64" | "torch.int64")) {
            return Err(reader.fail(node.place, format!("{key} int64: weights are floating-point numbers")));
        }
        Ok(Some(reader.word(node, key, DTYPES)?))
    };
    let inner = read("dtype")?;
    Ok(read("out_dtype")?.or(inner))
}

/// `parameters` of the whole merge, and those of the method that may stand beside `merge_method`.
fn shared_params(
    settings: &Settings<'_>,
    fields: &Fields<'_>,
    params: &mut Params,
    warnings: &mut Vec<String>,
) -> Result<()> {
    if let Some(node) = fields.get("parameters") {
        settings.read(node, Scope::Shared, params, warnings)?;
    }
    for (key, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
        if matches!(&*key.text, "elect" | "combine" | "zero_sum") {
            settings.read_one(key, value, Scope::Shared, params, warnings)?;
        }
    }
    Ok(())
}

fn sources(reader: Reader<'_>, fields: &Fields<'_>, inputs: &mut Inputs<'_>) -> Result<()> {
    let given: Vec<&str> =
        ["models", "slices", "modules"].into_iter().filter(|key| fields.get(key).is_some()).collect();
    let node = |key: &str| fields.get(key).expect("it was found");
    match given[..] {
        ["models"] => inputs.models(node("models")),
        ["slices"] => {
            inputs.recipe.slices = inputs.slices(node("slices"))?;
            Ok(())
        }
        ["modules"] => inputs.modules(node("modules")),
        [] => Err(reader
            .fail(fields.place, "neither 'models' nor 'slices'")
            .help("list the checkpoints to merge under 'models'")),
        _ => Err(reader.fail(node(given[1]).place, format!("both '{}' and '{}': give one", given[0], given[1]))),
    }
}

/// `auto`, the name of a known template, or a template.
fn chat_template(reader: Reader<'_>, node: &Node) -> Result<ChatTemplate> {
    let text = reader.text(node, "chat_template")?;
    if text == "auto" {
        return Ok(ChatTemplate::Auto);
    }
    if let Some((_, template)) = TEMPLATES.iter().find(|(name, _)| *name == text) {
        return Ok(ChatTemplate::Text((*template).into()));
    }
    if text.contains('{') && text.len() >= SHORTEST_TEMPLATE {
        return Ok(ChatTemplate::Text(text.into()));
    }
    let known: Vec<&str> = std::iter::once("auto").chain(TEMPLATES.iter().map(|(name, _)| *name)).collect();
    Err(reader.unknown(node.place, "chat_template", text, &known))
}

/// A document's name, which becomes part of a path.
fn name(reader: Reader<'_>, node: &Node) -> Result<String> {
    let name = reader.text(node, "name")?;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.starts_with('.') || !name.chars().all(plain) || name.len() > 128 {
        return Err(reader
            .fail(node.place, format!("\"{}\" cannot be the name of a directory", printable(name)))
            .help("use letters, digits, '-', '_' and '.'"));
    }
    Ok(name.to_owned())
}
