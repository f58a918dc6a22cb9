//! LoRA adapters as the changes that they make: one tensor ΔW = s B A [outputs, inputs] per module, computed where it is
//! read, and the adapter that a merge of them is written as.
//!
//! - Ranks may differ, between adapters and between modules: ΔW has none.
//! - An adapter that lacks a module does not change it: its ΔW is zero, as it is for a model with the adapter on it.
//! - The output's rank is one for all modules, and its scale is one: lora_alpha is the rank.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};

use super::config::{CONFIG, Kind};
use super::views::{Adapted, Constant, Kept};
use super::{Adapter, Factors, Modules, weight};
use crate::checkpoint::{Checkpoint, CheckpointFile, Derived, TensorEntry};
use crate::dtype::{Dtype, Float};
use crate::error::{Error, Result, printable};
use crate::limits::{ADAPTER_SCRATCH_BYTES, MAX_ADAPTER_CONFIG_BYTES};
use crate::storage::Storage;

/// A factor of a module, as it is to be written.
#[derive(Debug, Clone)]
pub struct FactorEntry {
    /// Its name.
    pub name: Box<str>,
    /// Its shape.
    pub shape: Box<[u64]>,
}

/// A module that is merged.
#[derive(Debug, Clone)]
pub struct FactoredModule {
    /// The name of its ΔW, that of the model's tensor.
    pub name: Box<str>,
    /// [rank, inputs ...].
    pub a: FactorEntry,
    /// [outputs, rank ...].
    pub b: FactorEntry,
    /// The type of both.
    pub dtype: Dtype,
}

/// Adapters as the changes that they make.
pub struct Changes {
    /// One per adapter, after the base of their task vectors if there is one.
    pub checkpoints: Vec<Checkpoint>,
    /// The modules of all of them, sorted by name.
    pub modules: Vec<FactoredModule>,
    /// The rank of the output.
    pub rank: u64,
    /// The output's `adapter_config.json`.
    pub config: Vec<u8>,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// A and B of one module of one adapter.
#[derive(Clone, Copy)]
struct Own<'a> {
    a: &'a TensorEntry,
    b: &'a TensorEntry,
}

/// The factors of every module of an adapter that is LoRA and nothing else.
fn factors(adapter: &Adapter) -> Result<BTreeMap<String, (Own<'_>, Factors<'_>)>> {
    let place = |error: Error| error.at(adapter.file.file.path());
    let Kind::Lora(lora) = &adapter.config.kind else {
        return Err(place(Error::usage("an (IA)³ adapter, which has no rank").help("leave --rank out")));
    };
    let modules = Modules::of(&adapter.tensors).map_err(place)?;
    if let Some(entry) = modules.whole.values().next() {
        return Err(place(
            Error::input("a whole tensor, which has no factors")
                .tensor(&entry.name)
                .help("give --base MODEL to merge the models that the adapters make of it"),
        ));
    }
    let mut own = BTreeMap::new();
    for (module, parts) in modules.changed {
        let (a, b) = (parts.linear.0.or(parts.embedding.0), parts.linear.1.or(parts.embedding.1));
        let (Some(a), Some(b)) = (a, b) else {
            return Err(place(super::one_factor(&module)));
        };
        let factors = Factors::new(&module, lora, a, b).map_err(place)?;
        own.insert(module, (Own { a, b }, factors));
    }
    Ok(own)
}

/// Whether every module that several of `adapters` have is of one rank.
pub(super) fn ranks_are_equal(adapters: &[Adapter]) -> Result<bool> {
    let mut ranks = BTreeMap::new();
    for adapter in adapters {
        let scales = adapter.scales()?;
        if scales.iter().any(|(module, (_, rank))| *ranks.entry(module.clone()).or_insert(*rank) != *rank) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The changes that `adapters`, called `specs`, make; to be written with `rank`, or else their largest.
pub(super) fn changes(
    adapters: &[Adapter],
    specs: &[&str],
    with_base: bool,
    rank: Option<u64>,
    storage: &dyn Storage,
) -> Result<Changes> {
    let own = adapters.iter().map(factors).collect::<Result<Vec<_>>>()?;
    // Where it stands first says what it is called, and its shape and type.
    let mut all: BTreeMap<&str, (Own<'_>, usize)> = BTreeMap::new();
    for (number, modules) in own.iter().enumerate() {
        for (module, (own, _)) in modules {
            let (first, at) = *all.entry(module).or_insert((*own, number));
            if first.a.shape[1..] != own.a.shape[1..] || first.b.shape[0] != own.b.shape[0] {
                return Err(Error::input(format!(
                    "factors of shapes {:?} and {:?}, but {:?} and {:?} in {}",
                    own.a.shape,
                    own.b.shape,
                    first.a.shape,
                    first.b.shape,
                    printable(specs[at])
                ))
                .at(adapters[number].file.file.path())
                .tensor(&own.a.name)
                .help("merge adapters of one base model"));
            }
        }
    }
    let largest = own.iter().flat_map(|modules| modules.values().map(|(_, factors)| factors.rank)).max().unwrap_or(1);
    let rank = rank.unwrap_or(largest);
    let modules = all.iter().map(|(module, (own, _))| factored(module, *own, rank)).collect::<Result<Vec<_>>>()?;
    let lacking = all.keys().filter(|module| own.iter().any(|modules| !modules.contains_key(**module))).count();
    let mut warnings = Vec::new();
    if lacking > 0 {
        warnings.push(format!(
            "{lacking} of {} modules are not in every adapter: those without one count as not changing it",
            all.len()
        ));
    }
    let names: Vec<&str> = all.keys().copied().collect();
    let config = config(adapters, &names, rank, storage)?;
    let mut checkpoints = Vec::with_capacity(adapters.len() + 1);
    let shapes: Vec<(&str, [u64; 2])> = all.iter().map(|(module, (own, _))| (*module, matrix(own))).collect();
    if with_base {
        checkpoints.push(zeros(&adapters[0], &format!("untrained {}", specs[0]), &shapes));
    }
    for ((adapter, own), spec) in adapters.iter().zip(&own).zip(specs) {
        checkpoints.push(shown(adapter, spec, own, &shapes)?);
    }
    Ok(Changes { checkpoints, modules, rank, config, warnings })
}

/// Outputs and inputs.
fn matrix(own: &Own<'_>) -> [u64; 2] {
    [own.b.shape[0], own.a.shape[1..].iter().product()]
}

fn factored(module: &str, own: Own<'_>, rank: u64) -> Result<FactoredModule> {
    let Own { a, b } = own;
    let float = Float::from_dtype(a.dtype).filter(|float| !matches!(float, Float::F64));
    let dtype = float.unwrap_or(Float::F32).dtype();
    let (mut a_shape, mut b_shape) = (a.shape.clone(), b.shape.clone());
    (a_shape[0], b_shape[1]) = (rank, rank);
    let entry = |entry: &TensorEntry, shape| FactorEntry { name: entry.name.clone(), shape };
    Ok(FactoredModule { name: weight(module).into(), a: entry(a, a_shape), b: entry(b, b_shape), dtype })
}

fn entry(module: &str, shape: [u64; 2], file: u32) -> TensorEntry {
    let (name, dtype) = (weight(module).into(), Float::F32.dtype());
    TensorEntry { name, dtype, shape: shape.into(), file, offset: 0, bytes: shape[0] * shape[1] * 4 }
}

fn nothing(adapter: &Adapter) -> CheckpointFile {
    let file = Arc::new(Constant { like: Arc::clone(&adapter.file.file), value: 0.0 });
    CheckpointFile { file, header_bytes: 0, header_hash: *blake3::hash(b"no change").as_bytes() }
}

/// A checkpoint in which nothing changes.
fn zeros(adapter: &Adapter, spec: &str, shapes: &[(&str, [u64; 2])]) -> Checkpoint {
    let mut tensors: Vec<_> = shapes.iter().map(|(module, shape)| entry(module, *shape, 0)).collect();
    tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    adapter.checkpoint(spec, vec![nothing(adapter)], tensors, Derived::default())
}

/// The changes of one adapter.
fn shown(
    adapter: &Adapter,
    spec: &str,
    own: &BTreeMap<String, (Own<'_>, Factors<'_>)>,
    shapes: &[(&str, [u64; 2])],
) -> Result<Checkpoint> {
    let mut files = vec![adapter.file.clone(), nothing(adapter)];
    let (mut derived, kept) = (Derived::default(), Arc::new(Kept::default()));
    let mut tensors = Vec::with_capacity(shapes.len());
    for (module, shape) in shapes {
        let Some((_, factors)) = own.get(*module) else {
            tensors.push(entry(module, *shape, 1));
            continue;
        };
        let change = factors.change(&adapter.file.file, false).map_err(|e| e.at(adapter.file.file.path()))?;
        let view = Adapted::new(None, (shape[0], shape[1]), change).keeping(&kept);
        derived.held_bytes += (size_of::<CheckpointFile>() + size_of_val(&view)) as u64;
        tensors.push(entry(module, *shape, files.len() as u32));
        files.push(CheckpointFile { header_bytes: 0, header_hash: view.hash(), file: Arc::new(view) });
    }
    let (held, reading) = kept.held_bytes();
    derived.held_bytes += held;
    derived.scratch_bytes = ADAPTER_SCRATCH_BYTES + reading;
    tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok(adapter.checkpoint(spec, files, tensors, derived))
}

/// The first adapter's configuration, with the rank and the modules of the output.
fn config(adapters: &[Adapter], modules: &[&str], rank: u64, storage: &dyn Storage) -> Result<Vec<u8>> {
    let read = |adapter: &Adapter| -> Result<Value> {
        let bytes = storage.read_small(&adapter.dir.join(CONFIG), MAX_ADAPTER_CONFIG_BYTES).map_err(Error::as_input)?;
        serde_json::from_slice(&bytes).map_err(|e| Error::input(format!("not valid JSON: {e}")).at(&adapter.dir))
    };
    let configs = adapters.iter().map(read).collect::<Result<Vec<_>>>()?;
    let mut config = configs[0].clone();
    // What says which modules have factors: as it was where all agree, else by their names.
    let targets = ["target_modules", "layers_to_transform", "layers_pattern", "exclude_modules"];
    let alike = |key: &&str| configs.iter().all(|other| other.get(*key) == configs[0].get(*key));
    if !targets.iter().all(alike) {
        for key in &targets[1..] {
            if let Some(value) = config.get_mut(*key) {
                *value = Value::Null;
            }
        }
        config[targets[0]] = json!(modules);
    }
    config["r"] = rank.into();
    config["lora_alpha"] = rank.into();
    for (key, value) in [("rank_pattern", json!({})), ("alpha_pattern", json!({})), ("use_rslora", json!(false))] {
        if config.get(key).is_some() {
            config[key] = value;
        }
    }
    let text = serde_json::to_string_pretty(&config).map_err(|e| Error::failed(format!("{CONFIG}: {e}")))?;
    Ok((text + "\n").into_bytes())
}
