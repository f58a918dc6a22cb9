//! The plan: recipe and checkpoints reconciled into tensors, sources, numbers and offsets.
//!
//! - Nothing is left to decide afterwards: every output byte has a shard and an offset before any data is read.
//! - The plan is a pure function of the recipe and the inputs' headers; how a run is cut into units and chunks under a
//!   memory budget is the [`Schedule`], which changes no output byte.
//!
//! Reads headers (through `checkpoint`), never tensor data.

mod assembly;
mod build;
mod chat;
mod factored;
mod layers;
mod manifest;
mod modules;
mod params;
mod passes;
pub mod python_json;
mod request;
mod requests;
mod schedule;
mod shares;
mod spooling;
mod statistics;
mod summary;
mod tokens;
mod upkeep;
mod vocabulary;

use std::collections::BTreeMap;
use std::sync::Arc;

pub use factored::{Factored, search_columns};
pub use layers::LAYER_COUNT_KEYS;
pub(crate) use layers::split as split_layer;
pub use manifest::{ListedFile, MANIFEST_VERSION, Manifest, is_sealed, must_be_current, seal};
pub use modules::may_describe;
pub(crate) use passes::bytes_of;
pub use schedule::{Chunk, Run, Schedule, Study, Together, Unit, UnitKind};
pub(crate) use schedule::{changing_place, near_keys};
pub use spooling::{Downloads, Spooling, spool_room};
pub use summary::{InputSummary, PassSummary, PlanSummary, Spread};

pub use vocabulary::TokenizerFiles;

use crate::checkpoint::layout::Layout;
pub use crate::checkpoint::layout::ShardLayout;
use crate::checkpoint::{Checkpoint, TensorEntry};
use crate::dtype::{Dtype, Float};
use crate::error::Result;
use crate::limits::{MIN_CHUNK_ELEMENTS, OUT_ELEMENTS, ROW_ELEMENTS, TILE_ELEMENTS};
use crate::method::{Merger, Method, Needs, Settings, Sparsify, Statistics};
pub use crate::recipe::{NonFinite, Overflow, Recipe, Scope, ThresholdKind, TrimTies};
use crate::storage::{InputFile, Storage};

/// A tensor of an opened checkpoint: indexes into [`Plan::checkpoints`] and its `tensors`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Which checkpoint.
    pub checkpoint: u32,
    /// Which of its tensors.
    pub entry: u32,
}

/// What is done to one output tensor.
#[derive(Debug, Clone)]
pub enum Action {
    /// Bytes are taken from `source`, converted if the types are different floats; `compared` are the other models'
    /// versions, where a difference is worth a warning.
    Copy {
        /// Where the bytes come from.
        source: Piece,
        /// Versions to compare with, byte for byte.
        compared: Box<[Piece]>,
    },
    /// The tensor is merged.
    Merge {
        /// θ_0, where the method works on task vectors.
        base: Option<Piece>,
        /// θ_t: (index of the model in the recipe, its tensor), in recipe order.
        models: Box<[(u32, Piece)]>,
        /// The checkpoint that gives the signs, where asked for.
        oracle: Option<Piece>,
        /// What [`Method::statistics`] names, one per model; empty where the models have none for this tensor.
        statistics: Box<[Piece]>,
    },
}

/// One output tensor.
#[derive(Debug, Clone)]
pub struct PlannedTensor {
    /// Its name.
    pub name: Box<str>,
    /// Its shape.
    pub shape: Box<[u64]>,
    /// Number of elements.
    pub elements: u64,
    /// Stored type in the output.
    pub dtype: Dtype,
    /// What is done.
    pub action: Action,
    /// Its parameters: index into [`Plan::params`].
    pub params: u32,
}

impl PlannedTensor {
    /// Whether model `model` takes part in the merge of this tensor.
    pub fn merges_model(&self, model: usize) -> bool {
        match &self.action {
            Action::Merge { models, .. } => models.iter().any(|&(m, _)| m as usize == model),
            Action::Copy { .. } => false,
        }
    }
}

/// A method with its parameters fixed, shared by the tensors that have the same.
pub struct ParamSet {
    /// Every parameter's value.
    pub settings: Settings,
    /// The merge function.
    pub merger: Box<dyn Merger>,
    /// Weight of each model, in recipe order.
    pub weights: Vec<f32>,
    /// Fraction that the trim keeps of each model's task vector; empty where the method does not trim.
    pub density: Vec<f64>,
}

impl ParamSet {
    /// How many of `elements` entries model `model` keeps: ⌊K·d⌋ in f64; in tensor scope at least one where K > 0.
    pub fn keep(&self, model: usize, elements: u64, tensor_scope: bool) -> u64 {
        let density = self.density[model];
        let keep = (density * elements as f64) as u64;
        if keep == 0 && density > 0.0 && tensor_scope { 1.min(elements) } else { keep.min(elements) }
    }
}

/// How task vectors are trimmed.
#[derive(Debug, Clone)]
pub struct Trim {
    /// Exact or sketched threshold.
    pub threshold: ThresholdKind,
    /// Rule for ties.
    pub ties: TrimTies,
}

/// What is wanted of one model's task vector in one unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// All of it: nothing is cut off.
    All,
    /// The `keep` largest of `elements` entries: needs a threshold.
    Keep {
        /// How many.
        keep: u64,
        /// Of how many.
        elements: u64,
    },
    /// None of it.
    Nothing,
}

impl Goal {
    /// Whether the data must be looked at to find a threshold.
    pub fn needs_threshold(&self) -> bool {
        matches!(self, Self::Keep { .. })
    }

    /// The share of the entries that a threshold is to keep, if one is needed.
    pub fn fraction(&self) -> Option<f64> {
        match *self {
            Self::Keep { keep, elements } => Some(keep as f64 / elements.max(1) as f64),
            Self::All | Self::Nothing => None,
        }
    }
}

/// Which inputs of a tensor a pass loads.
#[derive(Debug, Clone, Copy)]
pub enum Wanted<'a> {
    /// Everything that the result depends on.
    All,
    /// The task vectors of the models marked.
    TaskVectors(&'a [bool]),
}

/// Where the layers of an assembled output come from.
#[derive(Debug, Clone)]
pub struct LayerMap {
    /// Number of layers of the template, whose `config.json` the output gets.
    pub depth: u64,
    /// The module whose layers these are, where there are several.
    pub module: Option<String>,
    /// Per output layer, the number of the layer in its first source.
    pub from: Vec<u64>,
}

/// The lowered request. See the module's documentation.
pub struct Plan {
    /// What was asked, for the record.
    pub recipe: Recipe,
    /// Where the checkpoints are that it names, from any working directory, by their names.
    pub places: BTreeMap<String, String>,
    /// The method.
    pub method: &'static dyn Method,
    /// Its parameters: each different set once. All have the same needs.
    pub params: Vec<ParamSet>,
    /// How task vectors are trimmed; `None` where nothing is cut off.
    pub trim: Option<Trim>,
    /// Where one threshold applies.
    pub scope: Scope,
    /// NaN and infinities in inputs.
    pub non_finite: NonFinite,
    /// Results too large for the output type.
    pub overflow: Overflow,
    /// Seed of random draws.
    pub seed: u64,
    /// Base (if any), then the models, then the oracle (if any), then what each model has besides (if anything).
    pub checkpoints: Vec<Checkpoint>,
    /// How many of them the recipe names; the others are computed from these.
    pub named: usize,
    /// Whether adapters are merged with each other, and the output is one.
    pub adapter: bool,
    /// Where they are merged through the changes that they make: that merge, and how its result is written.
    pub factors: Option<Box<Factored>>,
    /// Index in `checkpoints` of base.
    pub base: Option<usize>,
    /// Index in `checkpoints` of the first model.
    pub first_model: usize,
    /// Index in `checkpoints` of the checkpoint that gives signs.
    pub oracle: Option<usize>,
    /// Output tensors in the order in which base stores them.
    pub tensors: Vec<PlannedTensor>,
    /// Where they go: parallel to `tensors`.
    pub layout: Layout,
    /// Where the output's layers come from, for each stack that is assembled from slices.
    pub layers: Vec<LayerMap>,
    /// Rows of the vocabulary in the output, if they may differ from the template's.
    pub vocabulary: Option<u64>,
    /// The output's tokenizer, if it was reconciled.
    pub tokenizer: Option<TokenizerFiles>,
    /// The chat template that goes before those of copied files.
    pub chat_template: Option<String>,
    /// Length of the longest configuration that is parsed, in bytes.
    pub parsed_bytes: u64,
    /// Output type of float tensors, for `config.json`: the type asked for, or base's commonest float type.
    pub float: Option<Float>,
    /// Units (elements of 2, 4 or 8 bytes, else bytes) at whose multiples chunks are cut, where outputs are packed.
    pub packing: Option<u64>,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// BLAKE3 over recipe, numeric version and inputs' headers: equal fingerprints give equal output bytes.
    pub fingerprint: String,
    /// The same without the inputs' modification times.
    pub untimed_fingerprint: String,
}

impl Plan {
    /// Opens every checkpoint named in `recipe` and reconciles them. No tensor data is read.
    pub fn new(recipe: &Recipe, storage: &Arc<dyn Storage>) -> Result<Self> {
        build::build(recipe, storage)
    }

    /// The same for several recipes, which share the checkpoints that they name alike: each is opened once.
    pub fn all(recipes: &[Recipe], storage: &Arc<dyn Storage>) -> Result<Vec<Self>> {
        build::build_all(recipes, storage)
    }

    /// The entry and the open file of `piece`.
    pub fn source(&self, piece: Piece) -> (&TensorEntry, &dyn InputFile) {
        let checkpoint = &self.checkpoints[piece.checkpoint as usize];
        let entry = &checkpoint.tensors[piece.entry as usize];
        (entry, &*checkpoint.files[entry.file as usize].file)
    }

    /// Inputs of tensor `index` that a pass loads: base, models and the oracle; or a copy's sources.
    pub fn pieces<'a>(&'a self, index: u32, wanted: Wanted<'a>) -> impl Iterator<Item = Piece> + 'a {
        let (first, models, others, last) = match &self.tensors[index as usize].action {
            Action::Copy { source, compared } => (Some(*source), &[][..], &compared[..], None),
            Action::Merge { base, models, oracle, statistics } => (*base, &models[..], &statistics[..], *oracle),
        };
        let last = last.filter(|_| matches!(wanted, Wanted::All));
        let others = if matches!(wanted, Wanted::All) { others } else { &[] };
        let taken = move |&&(model, _): &&(u32, Piece)| match wanted {
            Wanted::All => true,
            Wanted::TaskVectors(models) => models[model as usize],
        };
        let models = models.iter().filter(taken).map(|&(_, piece)| piece);
        first.into_iter().chain(models).chain(others.iter().copied()).chain(last)
    }

    /// What is wanted of each model in `unit`. Where outliers are dropped, as many goals follow that say what is dropped:
    /// goal i, and whatever comes of it, is about model i mod n.
    pub fn goals(&self, unit: &Unit) -> Vec<Goal> {
        let Some(trim) = self.trim.as_ref().filter(|_| self.selects()) else {
            return vec![Goal::All; self.models()];
        };
        // In model scope densities are the same for all tensors of the unit.
        let params = self.params_of(unit.tensors[0]);
        let goal = |index: usize| {
            let model = index % self.models();
            let elements = unit.tensors.iter().map(|&t| self.merged_length(t, model)).sum();
            let keep = params.keep(model, elements, self.scope == Scope::Tensor);
            let dropped = match params.merger.sparsify(model) {
                Sparsify::Outliers { gamma } => ((gamma * elements as f64) as u64).min(elements - keep),
                _ => 0,
            };
            match (index < self.models(), keep) {
                (false, _) if dropped == 0 || keep == 0 => Goal::Nothing,
                // Where all ties are kept, the largest magnitude that is not dropped is what matters.
                (false, _) => Goal::Keep { keep: dropped + u64::from(trim.ties == TrimTies::Keep), elements },
                (true, 0) => Goal::Nothing,
                // Nothing is too small: all but the outliers are kept.
                (true, keep) if keep + dropped >= elements => Goal::All,
                (true, keep) => Goal::Keep { keep: keep + dropped, elements },
            }
        };
        (0..self.bounds() * self.models()).map(goal).collect()
    }

    /// Which models' task vectors must be looked at for `goals`.
    pub fn searched(&self, goals: &[Goal]) -> Vec<bool> {
        let own = |model| goals.iter().skip(model).step_by(self.models());
        (0..self.models()).map(|model| own(model).any(Goal::needs_threshold)).collect()
    }

    /// Whether thresholds decide what is kept of task vectors, so that magnitudes have to be counted.
    pub fn selects(&self) -> bool {
        self.trim.is_some() && !self.method.draws()
    }

    /// Thresholds per task vector: one to keep what is above, and a second where outliers above that are dropped.
    pub fn bounds(&self) -> usize {
        let outliers = self.selects() && matches!(self.params[0].merger.sparsify(0), Sparsify::Outliers { .. });
        if outliers { 2 } else { 1 }
    }

    /// Whether thresholds can be guessed from a sample and proven by the merge itself: magnitude alone decides what is kept,
    /// all ties are, and nothing else has to be known before.
    pub fn can_guess(&self) -> bool {
        let exact = |trim: &Trim| trim.threshold == ThresholdKind::Exact && trim.ties == TrimTies::Keep;
        let by_magnitude = |params: &ParamSet| {
            (0..self.models()).all(|model| matches!(params.merger.sparsify(model), Sparsify::Magnitude))
        };
        self.selects()
            && self.trim.as_ref().is_some_and(exact)
            && self.bounds() == 1
            && !self.votes()
            && self.needs().looks.is_empty()
            && self.params.iter().all(by_magnitude)
    }

    /// How many facts the looks at tensor `index` find.
    pub fn facts(&self, index: u32) -> usize {
        match &self.tensors[index as usize].action {
            Action::Merge { models, .. } => self.params_of(index).merger.facts(models.len()) * self.columns(index),
            Action::Copy { .. } => 0,
        }
    }

    /// How many columns of tensor `index` have sums and facts of their own.
    pub fn columns(&self, index: u32) -> usize {
        if self.needs().columns { self.row(index) as usize } else { 1 }
    }

    /// Whether every tensor is a unit of its own: where thresholds are per tensor, or something else is gathered over it.
    pub fn per_tensor(&self) -> bool {
        self.scope == Scope::Tensor || !self.needs().looks.is_empty()
    }

    /// Elements of a row of tensor `index`, where the method works row by row.
    pub fn row(&self, index: u32) -> u64 {
        let tensor = &self.tensors[index as usize];
        match (self.needs().columns, &tensor.shape[..]) {
            (true, [first, ..]) => (tensor.elements / (*first).max(1)).clamp(1, ROW_ELEMENTS),
            (false, [.., last]) => (*last).clamp(1, ROW_ELEMENTS),
            (_, []) => 1,
        }
    }

    /// Elements of a tile of tensor `index`: whole rows, where the method works row by row.
    pub fn tile(&self, index: u32) -> usize {
        let tile = TILE_ELEMENTS as u64;
        match self.needs().rows {
            true => (self.row(index) * (tile / self.row(index)).max(1)) as usize,
            false => TILE_ELEMENTS,
        }
    }

    /// Elements that stay together however tensor `index` is cut, where that matters: whole tiles, over which sums run in
    /// order.
    pub fn granule(&self, index: u32) -> Option<u64> {
        if let Some(units) = self.packing {
            let width = match self.tensors[index as usize].dtype.bitsize() {
                bits @ (16 | 32 | 64) if self.is_raw_copy(index) => bits as u64 / 8,
                _ => 1,
            };
            return Some(units * width);
        }
        let matters = self.needs().rows || !self.needs().looks.is_empty();
        let merged = matches!(self.tensors[index as usize].action, Action::Merge { .. });
        (matters && merged).then(|| MIN_CHUNK_ELEMENTS.next_multiple_of(self.tile(index) as u64))
    }

    /// Whether the sign of the sum of all elected signs must be known before merging.
    pub fn votes(&self) -> bool {
        self.needs().majority_sign && self.oracle.is_none()
    }

    /// Whether tensor `index` is copied byte for byte.
    pub fn is_raw_copy(&self, index: u32) -> bool {
        let tensor = &self.tensors[index as usize];
        matches!(&tensor.action, Action::Copy { source, .. } if self.source(*source).0.dtype == tensor.dtype)
    }

    /// Length of tensor `index` in elements, or in bytes if it is copied byte for byte.
    pub fn length(&self, index: u32) -> u64 {
        let tensor = &self.tensors[index as usize];
        match &tensor.action {
            Action::Copy { source, .. } if self.is_raw_copy(index) => self.source(*source).0.bytes,
            _ => tensor.elements,
        }
    }

    /// Bytes of `piece` that tensor `index` is made of: all, unless it is cropped.
    pub fn bytes_used(&self, index: u32, piece: Piece) -> u64 {
        if self.is_raw_copy(index) { self.length(index) } else { self.length(index) * self.float_width(piece) }
    }

    /// Bytes of tensor `index` in the output.
    pub fn output_bytes(&self, index: u32) -> u64 {
        let tensor = &self.tensors[index as usize];
        match Float::from_dtype(tensor.dtype) {
            Some(float) => tensor.elements * float.width() as u64,
            None => self.length(index),
        }
    }

    /// How many elements of tensor `index` to take from element `start` on: at most `most`, less than
    /// [`OUT_ELEMENTS`] fewer, and so that they end at a round place of the output file, which lets pieces be hashed
    /// where they are written.
    ///
    /// Where a tensor has granules, as many of them instead.
    pub fn aligned(&self, index: u32, start: u64, most: u64) -> u64 {
        if let Some(granule) = self.granule(index) {
            return if most < granule { most } else { most / granule * granule };
        }
        let width = self.output_bytes(index).checked_div(self.length(index)).unwrap_or(1).max(1);
        let first = self.layout.tensors[index as usize].offset / width + start;
        let block = OUT_ELEMENTS.min(1 << most.ilog2());
        let end = (first + most) / block * block;
        if end > first { end - first } else { most }
    }

    /// Bytes per element of a piece of a float type.
    pub fn float_width(&self, piece: Piece) -> u64 {
        Float::from_dtype(self.source(piece).0.dtype).map_or(1, |f| f.width() as u64)
    }

    /// What the method needs, whatever the tensor.
    pub fn needs(&self) -> Needs {
        self.params[0].merger.needs()
    }

    /// The parameters of tensor `index`.
    pub fn params_of(&self, index: u32) -> &ParamSet {
        &self.params[self.tensors[index as usize].params as usize]
    }

    /// Whether the trim depends on positions, so that chunks have an order.
    pub fn position_ordered(&self) -> bool {
        self.selects() && self.trim.as_ref().is_some_and(|t| t.ties == TrimTies::Lowest)
    }

    /// The checkpoint whose layout and side files the output follows: base, or the first model.
    pub fn template(&self) -> &Checkpoint {
        &self.checkpoints[self.base.unwrap_or(self.first_model)]
    }

    /// Elements of tensor `index` that model `model` takes part in.
    pub fn merged_length(&self, index: u32, model: usize) -> u64 {
        let tensor = &self.tensors[index as usize];
        if tensor.merges_model(model) { tensor.elements } else { 0 }
    }

    /// Merged elements that model `model` takes part in.
    pub fn merged_elements(&self, model: usize) -> u64 {
        self.tensors.iter().filter(|t| t.merges_model(model)).map(|t| t.elements).sum()
    }

    /// Whether an input is read over a network.
    pub fn is_remote(&self) -> bool {
        self.checkpoints.iter().any(Checkpoint::is_remote)
    }

    /// Whether reading tensor `index` holds so much that no other tensor is to be read meanwhile.
    pub fn is_exclusive(&self, index: u32) -> bool {
        self.pieces(index, Wanted::All).any(|piece| self.source(piece).1.is_exclusive())
    }

    /// Columns of inputs that a tile has: the models, and what each has besides.
    pub fn tile_columns(&self) -> usize {
        self.models() * if self.method.statistics() == Some(Statistics::Fisher) { 2 } else { 1 }
    }

    /// Number of models.
    pub fn models(&self) -> usize {
        self.recipe.models.len()
    }
}
