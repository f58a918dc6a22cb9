//! Merge methods: one file each, one line each in [`METHODS`].
//!
//! - A method declares its parameters and what it needs; help text, validation, `plan` output, docs and conformance
//!   tests iterate over the registry.
//! - [`Method::prepare`] turns checked settings into a [`Merger`]: a pure function of a tile.
//! - No method sees a file, a tensor name or a plan, and none divides the work: the engine does.

mod arcee_fusion;
mod breadcrumbs;
mod dare;
mod della;
mod described;
mod fisher;
mod gram;
mod karcher;
mod linear;
mod model_stock;
mod multislerp;
mod nearswap;
mod nuslerp;
mod params;
mod passthrough;
mod perturb;
mod ram;
mod ramplus;
mod regmean;
mod sce;
mod slerp;
mod sparse;
mod task_arithmetic;
mod ties;

pub use params::{ParamKind, ParamSpec, Settings, Value};

use crate::error::{Error, Result};
use crate::kernels::{Fused, Isa};

/// Methods of commands of their own, which nobody names.
const INTERNAL: &[&dyn Method] = &[&perturb::PERTURB];

/// Every method, in the order in which they are listed to users.
pub const METHODS: &[&dyn Method] = &[
    &ties::Ties,
    &task_arithmetic::TaskArithmetic,
    &linear::Linear,
    &fisher::Fisher,
    &regmean::RegMean,
    &dare::DARE_TIES,
    &dare::DARE_LINEAR,
    &della::DELLA,
    &della::DELLA_LINEAR,
    &breadcrumbs::BREADCRUMBS_TIES,
    &breadcrumbs::BREADCRUMBS,
    &sce::SCE,
    &ram::RAM,
    &ramplus::RAMPLUS_TL,
    &model_stock::MODEL_STOCK,
    &slerp::SLERP,
    &nuslerp::NUSLERP,
    &multislerp::MULTISLERP,
    &karcher::KARCHER,
    &nearswap::NEARSWAP,
    &arcee_fusion::ARCEE_FUSION,
    &passthrough::Passthrough,
];

/// The method called `name`, or an error that lists what there is.
pub fn find(name: &str) -> Result<&'static dyn Method> {
    METHODS.iter().chain(INTERNAL).copied().find(|m| m.name() == name).ok_or_else(|| {
        let names: Vec<_> = METHODS.iter().map(|m| m.name()).collect();
        Error::usage(format!("unknown method {name:?}")).help(format!("one of: {}", names.join(", ")))
    })
}

/// What the inputs of a [`Tile`] are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inputs {
    /// θ_t, the weights themselves; the result is the merged weights. No base is needed.
    Weights,
    /// τ_t = θ_t − θ_0; the result is a task vector that the engine adds to base.
    TaskVectors,
    /// τ̂_t: sparse task vectors (see [`Sparsify`]); the result is a task vector that the engine adds to base.
    TrimmedTaskVectors,
}

/// How one task vector of d entries becomes sparse, where a density K below 1 asks for it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sparsify {
    /// The ⌊K·d⌋ entries of largest magnitude are kept.
    Magnitude,
    /// The ⌊γ·d⌋ entries of largest magnitude are dropped, and the ⌊K·d⌋ that follow are kept.
    Outliers {
        /// The fraction dropped at the top.
        gamma: f64,
    },
    /// Each entry is kept with probability K, and what is kept is multiplied by `scale`.
    Random {
        /// Factor of what is kept.
        scale: f32,
    },
    /// Nothing is dropped: of the ⌊K·d⌋ entries of largest magnitude, or of the others, each changes its sign with a
    /// probability.
    Flip {
        /// Of the others.
        below: bool,
        /// That probability.
        probability: f64,
    },
    /// The entry of rank r by magnitude in its row of C, the smallest having 0, is kept with probability
    /// p = K − ε + 2ε r / (C − 1).
    Ranked {
        /// Half the difference between the largest and the smallest probability.
        epsilon: f64,
        /// Whether what is kept is divided by p.
        rescale: bool,
    },
}

/// What a prepared method needs from the passes over the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    /// What tiles hold.
    pub inputs: Inputs,
    /// Whether the sign of the sum of all elected signs must be known before merging.
    pub majority_sign: bool,
    /// What is gathered over each tensor, in this order, before it is merged: [`Tile::facts`] tells the outcome.
    pub looks: &'static [Look],
    /// Whether tiles hold whole rows, for methods that treat each row on its own.
    pub rows: bool,
    /// Whether rows are those of the first axis, and there are sums and facts for each of their columns, one after the
    /// other. Then [`Needs::rows`] holds too.
    pub columns: bool,
}

impl Needs {
    /// Nothing but `inputs`.
    pub const fn of(inputs: Inputs) -> Self {
        Self { inputs, majority_sign: false, looks: &[], rows: false, columns: false }
    }
}

/// Checkpoints beside the models' that a method weighs their parameters by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Statistics {
    /// Diagonal Fisher information: a tensor like the weights', nowhere negative.
    Fisher,
    /// Gram matrices XᵀX [in, in] of the inputs of linear layers, named after the layers' weights.
    Gram,
}

impl Statistics {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Fisher, Self::Gram];

    /// The option, and the key in a recipe, that names them.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fisher => "fisher",
            Self::Gram => "gram",
        }
    }
}

/// One look at all of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Sums over the tensor: [`Merger::add_sums`].
    Sums,
    /// Values of given rank of a score that each element has: [`Merger::score`].
    Ranks,
    /// What draws take of each task vector: the facts are the factors Σ|τ| / Σ|τ̂|, by which what is kept is multiplied.
    Magnitudes,
}

/// Most values that one [`Look::Ranks`] may ask for.
pub const MAX_RANKS: usize = 3;

/// A tensor that is being looked at.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// Its elements.
    pub elements: u64,
    /// The weights of the models that have it.
    pub weights: &'a [f32],
    /// What earlier looks found.
    pub facts: &'a [f64],
}

/// A merge method, as registered.
pub trait Method: Sync {
    /// The field's name for it.
    fn name(&self) -> &'static str;
    /// One line for lists.
    fn summary(&self) -> &'static str;
    /// The formula in plain text.
    fn formula(&self) -> &'static str;
    /// Where the formula comes from.
    fn reference(&self) -> &'static str;
    /// Its parameters.
    fn params(&self) -> &'static [ParamSpec];
    /// Whether task vectors are made sparse first, to a `density`.
    fn trims(&self) -> bool {
        false
    }
    /// Whether what is kept of them is drawn at random, and not chosen by thresholds.
    fn draws(&self) -> bool {
        false
    }
    /// Whether it works on task vectors and therefore needs a base checkpoint.
    fn needs_base(&self) -> bool {
        true
    }
    /// The per-model parameter that becomes [`Tile::weights`].
    fn weight_param(&self) -> &'static str {
        "weight"
    }
    /// What it needs of each model besides the weights, in a checkpoint of its own.
    fn statistics(&self) -> Option<Statistics> {
        None
    }
    /// Fewest and most models that a tensor is merged from, base aside.
    fn models(&self) -> (usize, usize) {
        (1, usize::MAX)
    }
    /// Whether a base that is given beside a single model is the first of two models.
    fn base_is_model(&self) -> bool {
        false
    }
    /// The merge itself for these settings, which are already checked against [`Method::params`]; `base` says whether
    /// there is a base checkpoint.
    fn prepare(&self, settings: &Settings, base: bool) -> Box<dyn Merger>;
}

/// A slice of the inputs, aligned element by element.
pub struct Tile<'a> {
    /// Instruction set to use.
    pub isa: Isa,
    /// One slice per model that has the tensor, in recipe order: see [`Inputs`].
    pub inputs: &'a [&'a [f32]],
    /// The weights of those models.
    pub weights: &'a [f32],
    /// One slice per model of its Fisher information, where the method goes by it and the models have it for this tensor;
    /// else none.
    pub statistics: &'a [&'a [f32]],
    /// Signs given from outside (−1, 0 or +1 per element) that replace an election.
    pub oracle: Option<&'a [f32]>,
    /// Sign of the sum of all elected signs, where [`Needs::majority_sign`] asked for it; else 0.
    pub majority: f32,
    /// What the looks at the tensor found: see [`Merger::conclude`].
    pub facts: &'a [f64],
    /// Elements of a row, where [`Needs::rows`] asked for whole ones; else those of the tile.
    pub row: usize,
}

/// A method with its parameters fixed: a pure, element-wise function.
pub trait Merger: Send + Sync {
    /// What it needs.
    fn needs(&self) -> Needs;
    /// How the task vector of model `model` becomes sparse, for [`Inputs::TrimmedTaskVectors`].
    fn sparsify(&self, model: usize) -> Sparsify {
        let _ = model;
        Sparsify::Magnitude
    }
    /// Writes the merged tile to `out`. `scratch` has the same length and arbitrary content.
    fn merge(&self, tile: &Tile<'_>, out: &mut [f32], scratch: &mut [f32]);
    /// What [`Merger::merge`] multiplies [`Merger::unscaled`] by, last of all, if that is all it does with it. Then merges that
    /// differ in this factor alone need to be worked out once.
    fn lambda(&self) -> Option<f32> {
        None
    }
    /// [`Merger::merge`] before it multiplies by [`Merger::lambda`].
    fn unscaled(&self, tile: &Tile<'_>, out: &mut [f32], scratch: &mut [f32]) {
        self.merge(tile, out, scratch);
    }
    /// The kernel that does the same as [`Merger::merge`] with the arithmetic before and after it, from stored bytes to
    /// stored bytes, if there is one for these settings. Only element-wise merges without looks have one.
    fn fused(&self, weights: &[f32], majority: f32) -> Option<Fused> {
        let _ = (weights, majority);
        None
    }
    /// Whether it divides by the sum of the weights, which then must not be zero.
    fn divides_by_weights(&self) -> bool {
        false
    }
    /// Whether the result for a single model of weight `weight` is that model, bit for bit.
    fn is_copy(&self, weight: f32) -> bool {
        let _ = weight;
        false
    }
    /// How many facts the looks find (per column, with [`Needs::columns`]) where `models` models have the tensor.
    fn facts(&self, models: usize) -> usize {
        let _ = models;
        0
    }
    /// How many sums look `look` gathers (per column, with [`Needs::columns`]) where `models` models have the tensor.
    fn sums(&self, look: usize, models: usize) -> usize {
        let _ = (look, models);
        0
    }
    /// Adds the tile's share to the sums of look `look`.
    fn add_sums(&self, look: usize, tile: &Tile<'_>, sums: &mut [f64]) {
        let _ = (look, tile, sums);
    }
    /// The ranks that a [`Look::Ranks`] asks for, 1 being the largest score; at most [`MAX_RANKS`].
    fn ranks(&self, subject: Subject<'_>) -> Vec<u64> {
        let _ = subject;
        Vec::new()
    }
    /// The score of each element, neither negative nor NaN.
    fn score(&self, tile: &Tile<'_>, out: &mut [f32]) {
        let _ = (tile, out);
    }
    /// What follows from the sums, or from the scores at the ranks, that look `look` found: added to the facts.
    fn conclude(&self, look: usize, subject: Subject<'_>, found: &[f64]) -> Vec<f64> {
        let _ = (look, subject);
        found.to_vec()
    }
    /// Sum over the tile of the elected signs, for [`Needs::majority_sign`].
    fn sum_of_signs(&self, tile: &Tile<'_>, scratch: &mut [f32]) -> i64 {
        let _ = (tile, scratch);
        0
    }
}
