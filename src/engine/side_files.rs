//! The files beside the weights: configuration, tokenizer, licence, model card, manifest.
//!
//! They are copied from the template (base, or the first model), with the data type in `config.json` brought in line.
//! Nothing here is needed to merge; a template without such files is fine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::ser::{SerializeMap as _, Serializer};
use serde_json::{Value, json};

use super::output::MANIFEST;
use super::select::{Thresholds, UnitThresholds};
use super::shards::Written;
use super::tensor_crc::{self, Crc};
use super::{PROGRAM, Report};
use crate::error::{Error, Result, printable};
use crate::limits::{MAX_CONFIG_BYTES, MAX_SIDE_FILE_BYTES};
use crate::plan::{
    Action, LAYER_COUNT_KEYS, LayerMap, MANIFEST_VERSION, Plan, PlanSummary, Schedule, may_describe, python_json, seal,
};
use crate::sketch::Threshold;
use crate::storage::Storage;

/// Sets of parameters that the manifest lists.
const SETTINGS_LISTED: usize = 10_000;
/// Tensors that the manifest names for each set of parameters.
const SETTINGS_TENSORS: usize = 100;
/// Configuration of a PEFT adapter.
const ADAPTER_CONFIG: &str = "adapter_config.json";

/// Files that are copied from the template where it has them: what transformers and the Hub's tools look for.
const COPIED: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "NOTICE.txt",
    "USE_POLICY.md",
];

/// Those of them that make up a tokenizer.
const TOKENIZER: &[&str] = &[
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];

/// What is to be in a side file.
pub(super) enum Content {
    /// The same as in this file, which may be too long to be held in memory.
    Copy(PathBuf),
    /// These bytes.
    Bytes(Vec<u8>),
}

/// A side file that is written.
#[derive(Debug, Clone)]
pub(super) struct SideFile {
    pub name: String,
    pub bytes: u64,
    /// In hexadecimal.
    pub blake3: String,
}

impl SideFile {
    /// A file with this content.
    pub(super) fn of(name: &str, content: &[u8]) -> Self {
        let blake3 = blake3::hash(content).to_hex().to_string();
        Self { name: name.to_owned(), bytes: content.len() as u64, blake3 }
    }
}

/// Everything but weights, index and manifest.
pub(super) fn all(plan: &Plan, report: &Report, storage: &dyn Storage) -> Result<Vec<(String, Content)>> {
    let mut files = copied(plan, storage)?;
    files.push(("README.md".into(), Content::Bytes(model_card(plan, report).into_bytes())));
    Ok(files)
}

/// Refuses side files that could not be copied in the end, before the work rather than after it.
pub fn check(plan: &Plan, storage: &dyn Storage) -> Result<()> {
    copied(plan, storage).map(drop).map_err(Error::as_input)
}

fn copied(plan: &Plan, storage: &dyn Storage) -> Result<Vec<(String, Content)>> {
    let dir = &plan.template().dir;
    let mut files = Vec::new();
    let adapter = plan.adapter.then_some(ADAPTER_CONFIG);
    for &name in COPIED.iter().chain(&adapter) {
        if let (Some(factored), ADAPTER_CONFIG) = (&plan.factors, name) {
            files.push((name.to_string(), Content::Bytes(factored.config.clone())));
            continue;
        }
        match (&plan.chat_template, name) {
            (Some(template), "chat_template.jinja") => {
                files.push((name.to_string(), Content::Bytes(template.clone().into_bytes())));
                continue;
            }
            (Some(_), "chat_template.json") => continue,
            _ => {}
        }
        let tokenizer = plan.tokenizer.as_ref().filter(|_| TOKENIZER.contains(&name));
        if let (Some(json), "tokenizer.json") = (tokenizer.and_then(|t| t.json.as_ref()), name) {
            files.push((name.to_string(), Content::Bytes(json.clone())));
            continue;
        }
        let path = tokenizer.map_or(dir, |t| &t.dir).join(name);
        if !storage.is_there(&path)? {
            continue;
        }
        // An output that lacks what its template has would be no good, and say nothing.
        let bytes = match storage.open(&path) {
            Ok(file) => file.identity().bytes,
            Err(e) if storage.identity(&path)?.is_none() => return Err(e),
            Err(e) => return Err(e.replace_help("it belongs in the output too: put a file there, or move it away")),
        };
        if bytes > MAX_SIDE_FILE_BYTES {
            return Err(
                Error::input(format!("{bytes} bytes, but at most {MAX_SIDE_FILE_BYTES} are accepted")).at(&path)
            );
        }
        let content = match name {
            "config.json" => {
                let content = storage.read_small(&path, MAX_CONFIG_BYTES)?;
                Content::Bytes(updated_config(&path, content, plan)?)
            }
            "tokenizer_config.json" if plan.chat_template.is_some() => {
                let content = storage.read_small(&path, MAX_CONFIG_BYTES)?;
                Content::Bytes(with_template(&path, &content, plan)?)
            }
            _ => Content::Copy(path),
        };
        files.push((name.to_string(), content));
    }
    Ok(files)
}

/// `config.json` with its data type, layers and vocabulary as they are in the output; other content and its order stay.
fn updated_config(path: &Path, content: Vec<u8>, plan: &Plan) -> Result<Vec<u8>> {
    if plan.float.is_none() && plan.layers.is_empty() && plan.vocabulary.is_none() && plan.recipe.architecture.is_none()
    {
        return Ok(content);
    }
    let mut config = python_json::read(&content)
        .map_err(|e| Error::input(format!("not valid JSON: {e}")).at(path).help("repair it, or move it away"))?;
    let before = config.clone();
    let Some(object) = config.as_object_mut() else { return Ok(content) };
    // Newer writers say `dtype`, older ones `torch_dtype`; readers accept both.
    for key in ["dtype", "torch_dtype"] {
        if let (Some(value), Some(float)) = (object.get_mut(key), plan.float) {
            *value = float.torch_name().into();
        }
    }
    if let Some(rows) = plan.vocabulary {
        let nested = !object.contains_key("vocab_size");
        let parts = object.iter_mut().filter(|(key, _)| nested && *key == "text_config");
        let inner: Vec<&mut Value> = parts.filter_map(|(_, part)| part.get_mut("vocab_size")).collect();
        inner.into_iter().for_each(|size| *size = rows.into());
        if let Some(size) = object.get_mut("vocab_size") {
            *size = rows.into();
        }
    }
    for layers in &plan.layers {
        set_layers(object, layers);
        // Models of several parts describe each in an object of its own.
        let others = object.iter_mut().filter(|(key, _)| layers.module.as_ref().is_none_or(|m| may_describe(key, m)));
        others.filter_map(|(_, part)| part.as_object_mut()).for_each(|part| set_layers(part, layers));
    }
    if let Some(architecture) = &plan.recipe.architecture {
        object.insert("architectures".into(), json!([architecture]));
    }
    if config == before {
        return Ok(content);
    }
    let text = python_json::write(&config).map_err(|e| Error::failed(e.to_string()).at(path))?;
    Ok((text + "\n").into_bytes())
}

/// `tokenizer_config.json` with the output's chat template, for loaders that do not look for a file of its own.
fn with_template(path: &Path, content: &[u8], plan: &Plan) -> Result<Vec<u8>> {
    let mut config = python_json::read(content)
        .map_err(|e| Error::input(format!("not valid JSON: {e}")).at(path).help("repair it, or move it away"))?;
    if let Some(object) = config.as_object_mut() {
        object.insert("chat_template".into(), plan.chat_template.as_deref().into());
    }
    let text = python_json::write(&config).map_err(|e| Error::failed(e.to_string()).at(path))?;
    Ok((text + "\n").into_bytes())
}

/// Brings the number of layers, and lists that have an entry per layer, in line with where layers were taken from.
fn set_layers(config: &mut serde_json::Map<String, Value>, layers: &LayerMap) {
    let mut described = false;
    let fitting = |key: &&&str| layers.module.as_ref().is_none_or(|module| may_describe(key, module));
    for key in LAYER_COUNT_KEYS.iter().filter(fitting) {
        if let Some(count) = config.get_mut(*key).filter(|count| count.as_u64() == Some(layers.depth)) {
            *count = layers.from.len().into();
            described = true;
        }
    }
    for (_, value) in config.iter_mut().filter(|(key, _)| described && key.contains("layer")) {
        if let Some(list) = value.as_array_mut().filter(|list| list.len() as u64 == layers.depth) {
            let entry = |&from: &u64| list.get(from as usize).or(list.last()).cloned();
            *list = layers.from.iter().filter_map(entry).collect();
        }
    }
}

/// The model card, as the Hub shows it.
fn model_card(plan: &Plan, report: &Report) -> String {
    let mut card = String::from("---\n");
    let summary = PlanSummary::inputs(plan.merging());
    let hub_ids: Vec<&str> =
        plan.checkpoints.iter().filter_map(|c| c.hub.as_ref()).map(|hub| hub.id.as_str()).collect();
    if !hub_ids.is_empty() {
        card.push_str("base_model:\n");
        for id in &hub_ids {
            card.push_str(&format!("- {id}\n"));
        }
    } else if let Some(base) = &plan.recipe.base {
        card.push_str(&format!("base_model: {}\n", json!(base_name(base))));
    }
    let (library, title) = if plan.adapter { ("peft", "adapter") } else { ("transformers", "model") };
    card.push_str(&format!("library_name: {library}\ntags:\n- merge\n- tiesmith\n---\n\n"));
    if plan.factors.is_none() && !plan.tensors.iter().any(|tensor| matches!(tensor.action, Action::Merge { .. })) {
        let source = printable(&base_name(&plan.template().spec)).replace('|', "\\|");
        card.push_str(&format!("# Copied model\n\nThe tensors of `{source}`, written by {PROGRAM}.\n"));
        return card;
    }
    card.push_str(&format!("# Merged {title}\n\n"));
    card.push_str(&format!(
        "A merge of {} {title}s by `{}`, made with {PROGRAM}.\n\n{}\n({})\n\n",
        plan.models(),
        plan.method.name(),
        plan.method.formula(),
        plan.method.reference()
    ));
    card.push_str("| role | checkpoint | parameters | kept | survives |\n|---|---|---|---|---|\n");
    let mut kept = report.kept_fraction.iter();
    let mut survives = report.surviving_fraction.iter();
    for input in summary {
        let params: Vec<String> = input.params.iter().map(|(name, value)| format!("{name} {value}")).collect();
        let kept = if input.role == "model" { kept.next() } else { None };
        let survives = if input.role == "model" { survives.next() } else { None };
        let share = |share: Option<&f64>| share.map_or(String::new(), |share| format!("{:.2} %", share * 100.0));
        let (kept, survives) = (share(kept), share(survives));
        let source = printable(&base_name(&input.source)).replace('|', "\\|");
        card.push_str(&format!("| {} | `{source}` | {} | {kept} | {survives} |\n", input.role, params.join(", ")));
    }
    card.push_str(&format!("\nSign conflicts: {:.2} % of the parameters.\n", report.sign_conflict_fraction * 100.0));
    if let Some(factors) = &report.factors {
        card.push_str(&format!(
            "\nFactors of rank {} hold {:.2} % of the length of the merged changes; least of all {:.2} %, of `{}`.\n",
            factors.rank,
            factors.kept_norm * 100.0,
            factors.least_kept_norm * 100.0,
            printable(&factors.least_kept)
        ));
    }
    card.push_str("\n## Recipe\n\n```json\n");
    card.push_str(&serde_json::to_string_pretty(&recipe_without_paths(plan)).unwrap_or_default());
    card.push_str("\n```\n\nHashes of inputs and outputs are in `tiesmith.json`.\n");
    card
}

/// A local path's last component: a card is published, the paths of the machine it was made on are not.
pub(super) fn base_name(source: &str) -> String {
    if let Some(id) = source.strip_prefix("hf://") {
        return id.to_owned();
    }
    let path = Path::new(source);
    let local = path.is_absolute() || source.starts_with('.') || path.components().count() > 2;
    match path.file_name() {
        Some(name) if local => name.to_string_lossy().into_owned(),
        _ => source.to_string(),
    }
}

fn recipe_without_paths(plan: &Plan) -> impl serde::Serialize {
    let mut recipe = plan.recipe.clone();
    recipe.base = recipe.base.map(|s| base_name(&s));
    recipe.sign_from = recipe.sign_from.map(|s| base_name(&s));
    recipe.models.iter_mut().for_each(|m| m.rename(base_name));
    recipe
}

/// The manifest, as it is written. Not a JSON value: an output may have very many tensors.
#[derive(Serialize)]
struct WrittenManifest<'a> {
    format_version: u32,
    program: &'a str,
    fingerprint: &'a str,
    recipe: &'a crate::plan::Recipe,
    places: &'a BTreeMap<String, String>,
    settings: Value,
    inputs: Vec<Value>,
    thresholds: Vec<Value>,
    shards: Vec<WrittenShard<'a>>,
    side_files: Vec<Value>,
    report: &'a Report,
    run: Value,
}

#[derive(Serialize)]
struct WrittenShard<'a> {
    name: &'a str,
    bytes: u64,
    blake3: &'a str,
    tensors: TensorList<'a>,
}

/// Checksums of the bytes of a shard's tensors, by name, in the order of the file.
struct TensorList<'a>(Vec<(&'a str, Crc)>);

impl Serialize for TensorList<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for &(name, crc) in &self.0 {
            map.serialize_entry(name, &tensor_crc::hex(crc))?;
        }
        map.end()
    }
}

/// What is listed of the shards.
fn shard_list<'a>(plan: &'a Plan, written: &'a Written) -> Vec<WrittenShard<'a>> {
    let mut order: Vec<usize> = (0..plan.tensors.len()).collect();
    order.sort_by_key(|&tensor| (plan.layout.tensors[tensor].shard, plan.layout.tensors[tensor].offset));
    let mut order = order.into_iter().peekable();
    let shards = plan.layout.shards.iter().zip(&written.shards).zip(0..);
    let shard = |((planned, sealed), shard): ((&'a crate::plan::ShardLayout, &'a super::shards::SealedShard), u32)| {
        let own = std::iter::from_fn(|| order.next_if(|&tensor| plan.layout.tensors[tensor].shard == shard));
        let tensors = own.map(|tensor| (&*plan.tensors[tensor].name, written.tensors[tensor])).collect();
        WrittenShard { name: &planned.name, bytes: sealed.bytes, blake3: &sealed.hash, tensors: TensorList(tensors) }
    };
    shards.map(shard).collect()
}

/// The manifest: everything needed to check the output and to make it again.
pub(super) fn manifest(
    plan: &Plan,
    schedule: &Schedule,
    written: &Written,
    thresholds: &Thresholds,
    report: &Report,
    side_files: &[SideFile],
) -> Result<Vec<u8>> {
    let inputs: Vec<Value> = PlanSummary::inputs(plan.merging())
        .zip(&plan.checkpoints)
        .map(|(mut summary, checkpoint)| {
            // For those who look for it from elsewhere.
            let absolute = std::path::absolute(&checkpoint.dir).unwrap_or_else(|_| checkpoint.dir.clone());
            summary.path = absolute.to_string_lossy().into_owned();
            // A view of other files' rows is no file of its own.
            let files = checkpoint.files.iter().filter(|file| file.header_bytes > 0).map(|file| {
                let identity = file.file.identity();
                json!({
                    "name": file.file.path().file_name().map(|n| n.to_string_lossy()),
                    "bytes": identity.bytes,
                    "mtime_ns": identity.mtime_ns.to_string(),
                    "header_blake3": blake3::Hash::from_bytes(file.header_hash).to_hex().as_str(),
                })
            });
            json!({ "checkpoint": summary, "files": files.collect::<Vec<_>>() })
        })
        .collect();
    let side_files = side_files.iter().map(|f| json!({ "name": f.name, "bytes": f.bytes, "blake3": f.blake3 }));
    let manifest = WrittenManifest {
        format_version: MANIFEST_VERSION,
        program: PROGRAM,
        fingerprint: &plan.fingerprint,
        recipe: &plan.recipe,
        places: &plan.places,
        settings: settings(plan.merging()),
        inputs,
        thresholds: thresholds.listed.iter().map(|unit| unit_thresholds(plan.merging(), unit)).collect(),
        shards: shard_list(plan, written),
        side_files: side_files.collect(),
        report,
        run: json!({ "threads": schedule.threads, "memory_limit_bytes": schedule.memory_limit }),
    };
    let text = serde_json::to_string_pretty(&manifest).map_err(|e| Error::failed(format!("{MANIFEST}: {e}")))?;
    Ok(seal(&text))
}

/// The parameters after defaults: one object, or where tensors differ each set of them, and which tensors have it.
fn settings(plan: &Plan) -> Value {
    if let [only] = &plan.params[..] {
        return json!(only.settings);
    }
    let mut tensors: Vec<Vec<&str>> = vec![Vec::new(); plan.params.len()];
    for tensor in plan.tensors.iter().filter(|t| matches!(t.action, Action::Merge { .. })) {
        let names = &mut tensors[tensor.params as usize];
        if names.len() < SETTINGS_TENSORS {
            names.push(&tensor.name);
        }
    }
    let sets = plan.params.iter().zip(&tensors).take(SETTINGS_LISTED);
    sets.map(|(set, tensors)| json!({ "settings": set.settings, "tensors": tensors })).collect()
}

fn unit_thresholds(plan: &Plan, unit: &UnitThresholds) -> Value {
    let describe = |found: &Option<(Threshold, u64)>| match found {
        Some((threshold, elements)) => json!({
            "magnitude": f32::from_bits(threshold.ties.low),
            "above": threshold.above,
            "tied": threshold.tied,
            "elements": elements,
        }),
        None => Value::Null,
    };
    let (models, outliers) = unit.found.split_at(plan.models().min(unit.found.len()));
    let scope = match plan.scope {
        crate::plan::Scope::Model => Value::Null,
        crate::plan::Scope::Tensor => (*plan.tensors[unit.tensor as usize].name).into(),
    };
    let mut described = json!({ "tensor": scope, "models": models.iter().map(describe).collect::<Vec<_>>() });
    if !outliers.is_empty() {
        described["outliers"] = outliers.iter().map(describe).collect();
    }
    described
}
