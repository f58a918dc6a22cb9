//! PEFT adapters: a model and an adapter, seen as the checkpoint that merging them would give.
//!
//! - `MODEL+ADAPTER` names it; a path that exists with a `+` in its name is that path.
//! - LoRA: W + s B A ([Hu et al. 2021](https://arxiv.org/abs/2106.09685)), s = alpha / r or, rank-stabilised, alpha / √r; embeddings and convolutions
//!   too. (IA)³ ([Liu et al. 2022](https://arxiv.org/abs/2205.05638)): W with its rows or columns scaled, and with rows the bias.
//! - Tensors that the adapter holds whole (`modules_to_save`, biases, embeddings) take the place of the model's.
//! - Every tensor of the adapter must find its place in the model: an adapter of another model is refused.
//!
//! | file | what |
//! |---|---|
//! | `alone.rs` | adapters without a model |
//! | `changes.rs` | the same, as the changes that they make |
//! | `config.rs` | `adapter_config.json` |
//! | `views.rs` | tensors that are computed where they are read |

mod alone;
mod changes;
pub(super) mod config;
#[cfg(test)]
mod tests;
pub(super) mod views;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::rows::Part;
use super::{Catalogue, Checkpoint, CheckpointFile, TensorEntry, resolve};
use crate::dtype::{Float, dtype_name};
use crate::error::{Error, Result, printable};
use crate::limits::ADAPTER_SCRATCH_BYTES;
use crate::storage::Storage;
pub use alone::Adapters;
pub use changes::{Changes, FactoredModule};
use config::{CONFIG, Config, Kind, Lora};
use views::{Adapted, Change, Factor, Kept};

/// The weights' file, of now and of older versions of PEFT.
const WEIGHTS: [&str; 2] = ["adapter_model.safetensors", "adapter_model.bin"];
/// What PEFT puts before a module's name.
const PREFIX: &str = "base_model.model.";
/// Most adapters on one model.
const MAX_STACKED: usize = 16;

/// The model and the adapter that `spec` names, if it does not name something that exists.
pub(super) fn split<'a>(spec: &'a str, storage: &dyn Storage) -> Result<Option<(&'a str, &'a str)>> {
    // What cannot be looked at is not there; opening it says why.
    let exists = |path: &str| matches!(storage.identity(Path::new(path)), Ok(Some(_)));
    if !spec.contains('+') || exists(spec) {
        return Ok(None);
    }
    let places: Vec<usize> = spec.match_indices('+').map(|(at, _)| at).collect();
    if places.len() > MAX_STACKED {
        let text = format!("{} adapters on one model, but at most {MAX_STACKED} are supported", places.len());
        return Err(Error::usage(text).help("check the path"));
    }
    let part = |&at: &usize| (&spec[..at], &spec[at + 1..]);
    let mut parts: Vec<_> = places.iter().map(part).filter(|(l, r)| !l.is_empty() && !r.is_empty()).collect();
    parts.reverse();
    for &(model, adapter) in &parts {
        if exists(adapter) || exists(model) {
            return Ok(Some((model, adapter)));
        }
    }
    Ok(parts.first().copied())
}

/// An opened adapter.
pub(super) struct Adapter {
    pub dir: PathBuf,
    pub config: Config,
    pub file: CheckpointFile,
    /// As stored, sorted by name.
    pub tensors: Vec<TensorEntry>,
}

impl Adapter {
    /// Opens the adapter that `spec` names: a directory, or a Hub id in the local cache.
    pub(super) fn open(spec: &str, storage: &dyn Storage) -> Result<Self> {
        let mut dir = PathBuf::from(spec);
        if !storage.is_dir(&dir) {
            dir = resolve::resolve(spec, storage, &|name| std::env::var_os(name))?.dir;
        }
        if !storage.is_file(&dir.join(CONFIG)) {
            return Err(Error::input(format!("no {CONFIG} in this directory, so it is no PEFT adapter"))
                .at(&dir)
                .help("MODEL+ADAPTER names a model and an adapter on it"));
        }
        let config = Config::read(&dir, storage)?;
        let Some(weights) = WEIGHTS.iter().map(|name| dir.join(name)).find(|path| storage.is_file(path)) else {
            return Err(Error::input(format!("no {} beside {CONFIG}", WEIGHTS[0]))
                .at(&dir)
                .help("complete the download"));
        };
        let mut catalogue = Catalogue::of_file(&weights, storage)?;
        if catalogue.tensors.is_empty() {
            return Err(Error::input("an adapter without a tensor").at(&weights));
        }
        let file = catalogue.files.remove(0);
        Ok(Self { dir, config, file, tensors: catalogue.tensors })
    }

    /// Puts the adapter on `checkpoint`.
    pub(super) fn apply(self, checkpoint: &mut Checkpoint) -> Result<()> {
        let path = self.file.file.path().to_path_buf();
        let place = |error: Error| error.at(&path);
        let modules = Modules::of(&self.tensors).map_err(place)?;
        let names = Naming::find(&modules, checkpoint).map_err(place)?;
        names.check(&modules).map_err(place)?;
        let file = checkpoint.files.len() as u32;
        let source = Arc::clone(&self.file.file);
        checkpoint.files.push(self.file);
        for (name, entry) in &modules.whole {
            replace(checkpoint, &names.of(name), TensorEntry { file, ..(*entry).clone() });
        }
        let kept = Arc::new(Kept::default());
        let mut patch = Patch { checkpoint, source, names: &names, config: &self.config, kept: Arc::clone(&kept) };
        for (module, parts) in &modules.changed {
            patch.module(module, parts).map_err(place)?;
        }
        let (held, reading) = kept.held_bytes();
        checkpoint.derived.held_bytes += held;
        // Adapters on adapters read each other's results.
        checkpoint.derived.scratch_bytes += ADAPTER_SCRATCH_BYTES + reading;
        Ok(())
    }
}

/// Puts a whole tensor in the place of the checkpoint's, or adds it.
fn replace(checkpoint: &mut Checkpoint, name: &str, entry: TensorEntry) {
    let entry = TensorEntry { name: name.into(), ..entry };
    match checkpoint.tensors.binary_search_by(|t| (*t.name).cmp(name)) {
        Ok(index) => {
            let before = checkpoint.tensors[index].dtype;
            if Float::from_dtype(before).is_some() {
                checkpoint.derived.stored.insert(name.into(), before);
            }
            checkpoint.tensors[index] = entry;
        }
        Err(index) => checkpoint.tensors.insert(index, entry),
    }
}

fn part(file: &Arc<dyn crate::storage::InputFile>, entry: &TensorEntry) -> Result<Part> {
    let float = Float::from_dtype(entry.dtype).ok_or_else(|| {
        Error::input(format!("has type {}, which is no float that can be computed with", dtype_name(entry.dtype)))
            .tensor(&entry.name)
    })?;
    Ok(Part { file: Arc::clone(file), offset: entry.offset, float })
}

/// What an adapter holds of one module.
#[derive(Default)]
pub(super) struct ModuleParts<'a> {
    /// A and B of a linear layer or a convolution.
    pub linear: (Option<&'a TensorEntry>, Option<&'a TensorEntry>),
    /// A and B of an embedding.
    pub embedding: (Option<&'a TensorEntry>, Option<&'a TensorEntry>),
    /// The vector of (IA)³.
    pub ia3: Option<&'a TensorEntry>,
}

/// The tensors of an adapter by what they mean.
#[derive(Default)]
pub(super) struct Modules<'a> {
    /// By name of the module.
    pub changed: BTreeMap<String, ModuleParts<'a>>,
    /// Tensors that take the place of the model's, by its name for them.
    pub whole: BTreeMap<String, &'a TensorEntry>,
}

impl<'a> Modules<'a> {
    pub(super) fn of(tensors: &'a [TensorEntry]) -> Result<Self> {
        let mut modules = Self::default();
        for entry in tensors {
            modules.add(entry).map_err(|e| e.tensor(&entry.name))?;
        }
        Ok(modules)
    }

    fn add(&mut self, entry: &'a TensorEntry) -> Result<()> {
        let name = entry.name.strip_prefix(PREFIX).unwrap_or(&entry.name);
        if name.contains("lora_magnitude_vector") {
            return Err(Error::input("a DoRA adapter, which is not supported")
                .help("merge it into its model first (peft: merge_and_unload, then save_pretrained)"));
        }
        // Some writers leave the name of the adapter in the names of tensors.
        let ends: [(&str, &[&str]); 5] = [
            (".lora_A", &[".weight", ".default.weight"]),
            (".lora_B", &[".weight", ".default.weight"]),
            (".lora_embedding_A", &["", ".default"]),
            (".lora_embedding_B", &["", ".default"]),
            (".ia3_l", &["", ".default"]),
        ];
        for (number, (marker, tails)) in ends.into_iter().enumerate() {
            let Some(module) = tails.iter().find_map(|tail| name.strip_suffix(tail)?.strip_suffix(marker)) else {
                continue;
            };
            let parts = self.changed.entry(module.to_owned()).or_default();
            let slot = match number {
                0 => &mut parts.linear.0,
                1 => &mut parts.linear.1,
                2 => &mut parts.embedding.0,
                3 => &mut parts.embedding.1,
                _ => &mut parts.ia3,
            };
            return match slot.replace(entry) {
                None => Ok(()),
                Some(first) => Err(Error::input(format!("means the same as \"{}\"", printable(&first.name)))),
            };
        }
        if name.contains(".lora_") || name.contains(".ia3_") {
            return Err(Error::input("a part of an adapter that is not known")
                .help("merge the adapter into its model first (peft: merge_and_unload, then save_pretrained)"));
        }
        if name.contains(".original_module.") {
            return Ok(());
        }
        let name = name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".");
        match self.whole.insert(name.replace(".base_layer.", "."), entry) {
            None => Ok(()),
            Some(first) => Err(Error::input(format!("means the same as \"{}\"", printable(&first.name)))),
        }
    }
}

/// How an adapter's names become the checkpoint's: the class that a checkpoint is saved from may have another outer
/// module than the one that the adapter was trained on.
enum Naming {
    Same,
    /// The first component is left out: `transformer.h.0` is `h.0`.
    Inner,
    /// This is put before: `layers.0` is `model.layers.0`.
    Outer(String),
}

impl Naming {
    /// The naming by which every changed module has a weight in `checkpoint`.
    fn find(modules: &Modules<'_>, checkpoint: &Checkpoint) -> Result<Self> {
        let Some(first) = modules.changed.keys().next() else { return Ok(Self::Same) };
        let ending = format!(".{}", weight(first));
        let outer = checkpoint.tensors.iter().filter_map(|t| t.name.strip_suffix(&ending));
        let candidates = [Self::Same, Self::Inner].into_iter().chain(outer.map(|p| Self::Outer(format!("{p}."))));
        let lacking =
            |naming: &Self| modules.changed.keys().find(|module| checkpoint.get(&weight(&naming.of(module))).is_none());
        let mut candidates = candidates.filter(|naming| lacking(naming).is_none());
        match candidates.next() {
            Some(naming) => Ok(naming),
            None => {
                let lacked = lacking(&Self::Same).unwrap_or(first);
                Err(Error::input(format!(
                    "changes \"{}\", which the model {} does not have",
                    printable(&weight(lacked)),
                    printable(&checkpoint.spec)
                ))
                .help("put the adapter on the model that it was trained on"))
            }
        }
    }

    /// Refuses two modules that would change one tensor, or two whole tensors in one place.
    fn check(&self, modules: &Modules<'_>) -> Result<()> {
        for names in [modules.changed.keys().collect::<Vec<_>>(), modules.whole.keys().collect()] {
            let mut seen = BTreeMap::new();
            for name in names {
                if let Some(first) = seen.insert(self.of(name), name) {
                    return Err(Error::input(format!(
                        "\"{}\" and \"{}\" mean the same part of the model, \"{}\"",
                        printable(first),
                        printable(name),
                        printable(&self.of(name))
                    ))
                    .help("put the adapter on the model that it was trained on"));
                }
            }
        }
        Ok(())
    }

    fn of(&self, name: &str) -> String {
        match self {
            Self::Same => name.to_owned(),
            Self::Inner => name.split_once('.').map_or(name, |(_, rest)| rest).to_owned(),
            Self::Outer(prefix) => format!("{prefix}{name}"),
        }
    }
}

/// The name of a module's weight.
pub(super) fn weight(module: &str) -> String {
    format!("{module}.weight")
}

/// An adapter being put on a checkpoint.
struct Patch<'a> {
    checkpoint: &'a mut Checkpoint,
    source: Arc<dyn crate::storage::InputFile>,
    names: &'a Naming,
    config: &'a Config,
    kept: Arc<Kept>,
}

impl Patch<'_> {
    fn module(&mut self, module: &str, parts: &ModuleParts<'_>) -> Result<()> {
        let name = weight(&self.names.of(module));
        let target = self.checkpoint.get(&name).expect("the naming was found by it").clone();
        let shape = Matrix::of(&target)?;
        match (&self.config.kind, parts) {
            (Kind::Lora(lora), ModuleParts { linear: (None, None), embedding: (Some(a), Some(b)), ia3: None }) => {
                let factors = Factors::new(module, lora, a, b)?;
                let change = factors.embedding(&self.source, &target)?;
                self.put(&target, shape, change)
            }
            (Kind::Lora(lora), ModuleParts { linear: (Some(a), Some(b)), embedding: (None, None), ia3: None }) => {
                let factors = Factors::new(module, lora, a, b)?;
                let change = factors.linear(&self.source, &target, self.config.transposed)?;
                self.put(&target, shape, change)
            }
            (
                Kind::Ia3 { feedforward },
                ModuleParts { linear: (None, None), embedding: (None, None), ia3: Some(l) },
            ) => self.ia3(module, feedforward, l, &target, shape),
            _ => Err(Error::input(format!(
                "module \"{}\" does not have the parts that a {} adapter has",
                printable(module),
                if matches!(self.config.kind, Kind::Lora(_)) { "LoRA" } else { "(IA)³" }
            ))
            .help("download the adapter again")),
        }
    }

    fn ia3(
        &mut self,
        module: &str,
        feedforward: &[String],
        l: &TensorEntry,
        target: &TensorEntry,
        shape: Matrix,
    ) -> Result<()> {
        let length = l.elements();
        let inputs = match (&l.shape[..], length) {
            (_, 1) => feedforward.iter().any(|end| module == end || module.ends_with(&format!(".{end}"))),
            ([1, ..], _) => true,
            _ => false,
        };
        let fits = |columns: bool| match columns {
            true => target.shape.len() == 2 && length == shape.columns,
            false => length == shape.rows,
        };
        let (plain, other) = (inputs, !inputs);
        let columns = match (fits(plain), fits(other)) {
            (true, false) => plain,
            (false, true) if target.shape.len() == 2 => other,
            (true, true) => plain != self.config.transposed,
            _ => return Err(misfit(&[l], target)),
        };
        let vector = part(&self.source, l)?;
        let change = if columns { Change::ScaleColumns(vector.clone()) } else { Change::ScaleRows(vector.clone()) };
        self.put(target, shape, change)?;
        // Scaled outputs: what is added to them is scaled too.
        let bias = format!("{}.bias", self.names.of(module));
        match self.checkpoint.get(&bias).filter(|_| !inputs).cloned() {
            Some(bias) if bias.elements() != length => Err(misfit(&[l], &bias)),
            Some(bias) => self.put(&bias, Matrix { rows: 1, columns: length }, Change::ScaleColumns(vector)),
            None => Ok(()),
        }
    }

    /// Shows `change` on `target` in its place.
    fn put(&mut self, target: &TensorEntry, shape: Matrix, change: Change) -> Result<()> {
        let weight = part(&self.checkpoint.files[target.file as usize].file, target)?;
        let view = Adapted::new(Some(weight), (shape.rows, shape.columns), change).keeping(&self.kept);
        self.checkpoint.show(target, view.float(), view.hash(), Arc::new(view));
        Ok(())
    }
}

/// A tensor seen as a matrix: its first dimension, and all others.
#[derive(Clone, Copy)]
struct Matrix {
    rows: u64,
    columns: u64,
}

impl Matrix {
    fn of(tensor: &TensorEntry) -> Result<Self> {
        match &tensor.shape[..] {
            [rows, rest @ ..] if !rest.is_empty() => Ok(Self { rows: *rows, columns: rest.iter().product() }),
            _ => Err(Error::input(format!("an adapter changes it, but its shape is {:?}", tensor.shape))
                .tensor(&tensor.name)),
        }
    }
}

/// A and B of one module, and what they are multiplied with.
pub(super) struct Factors<'a> {
    pub a: &'a TensorEntry,
    pub b: &'a TensorEntry,
    pub rank: u64,
    pub scale: f32,
}

impl<'a> Factors<'a> {
    pub(super) fn new(module: &str, lora: &Lora, a: &'a TensorEntry, b: &'a TensorEntry) -> Result<Self> {
        let rank = lora.rank(module);
        let (first, second) = (a.shape.first().copied(), b.shape.get(1).copied());
        if first != Some(rank) || second != Some(rank) || a.shape.len() < 2 || b.shape[2..].iter().any(|&n| n != 1) {
            return Err(Error::input(format!(
                "its shape is {:?}, and that of \"{}\" is {:?}, which are not factors of rank {rank}, the rank in {CONFIG}",
                a.shape,
                printable(&b.name),
                b.shape,
            ))
            .tensor(&a.name)
            .help("download the adapter again, configuration and weights together"));
        }
        Ok(Self { a, b, rank, scale: lora.scale(module) as f32 })
    }

    /// Inputs and outputs of the layer.
    fn sizes(&self) -> (u64, u64) {
        (self.a.shape[1..].iter().product(), self.b.shape[0])
    }

    /// ΔW = s B A of a layer whose weight is [outputs, inputs], or [inputs, outputs].
    fn change(&self, file: &Arc<dyn crate::storage::InputFile>, transposed: bool) -> Result<Change> {
        let (inputs, outputs) = self.sizes();
        let a = Factor { part: part(file, self.a)?, rank: self.rank, length: inputs, rank_first: true };
        let b = Factor { part: part(file, self.b)?, rank: self.rank, length: outputs, rank_first: false };
        let (left, right) = if transposed { (a, b) } else { (b, a) };
        Ok(Change::Add { left, right, scale: self.scale })
    }

    fn linear(
        &self,
        file: &Arc<dyn crate::storage::InputFile>,
        target: &TensorEntry,
        transposed: bool,
    ) -> Result<Change> {
        let (inputs, outputs) = self.sizes();
        let shape = Matrix::of(target)?;
        let plain = (outputs, inputs) == (shape.rows, shape.columns);
        let turned = target.shape.len() == 2 && (inputs, outputs) == (shape.rows, shape.columns);
        match (plain, turned) {
            (false, false) => Err(misfit(&[self.a, self.b], target)),
            // Where both would do, the configuration knows; elsewhere the shape does.
            (true, true) => self.change(file, transposed),
            (_, turned) => self.change(file, turned),
        }
    }

    fn embedding(&self, file: &Arc<dyn crate::storage::InputFile>, target: &TensorEntry) -> Result<Change> {
        let (inputs, outputs) = self.sizes();
        match target.shape[..] == [inputs, outputs] {
            true => self.change(file, true),
            false => Err(misfit(&[self.a, self.b], target)),
        }
    }
}

/// A module of an adapter without A or B.
fn one_factor(module: &str) -> Error {
    Error::input(format!("module \"{}\" has one factor only", printable(module))).help("download the adapter again")
}

/// The adapter's tensors do not fit the model's.
fn misfit(own: &[&TensorEntry], target: &TensorEntry) -> Error {
    let shapes: Vec<String> = own.iter().map(|entry| format!("{:?}", entry.shape)).collect();
    Error::input(format!(
        "shape {} does not fit the model's \"{}\" of shape {:?}",
        shapes.join(" by "),
        printable(&target.name),
        target.shape
    ))
    .tensor(&own[0].name)
    .help("put the adapter on the model that it was trained on")
}
