//! Merge methods: one file each, one line each in [`METHODS`].
//!
//! - A method declares its parameters and what it needs; help text, validation, `plan` output, docs and conformance
//!   tests iterate over the registry.
//! - [`Method::prepare`] turns checked settings into a [`Merger`]: a pure function of a tile.
//! - No method sees a file, a tensor name or a plan, and none divides the work: the engine does.

mod linear;
mod params;
mod passthrough;
mod task_arithmetic;
mod ties;

pub use params::{ParamKind, ParamSpec, Settings, Value};

use crate::error::{Error, Result};
use crate::kernels::Isa;

/// Every method, in the order in which they are listed to users.
pub const METHODS: &[&dyn Method] =
    &[&ties::Ties, &task_arithmetic::TaskArithmetic, &linear::Linear, &passthrough::Passthrough];

/// The method called `name`, or an error that lists what there is.
pub fn find(name: &str) -> Result<&'static dyn Method> {
    METHODS.iter().copied().find(|m| m.name() == name).ok_or_else(|| {
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
    /// τ̂_t: trimmed task vectors (zeros elsewhere); the result is a task vector that the engine adds to base.
    TrimmedTaskVectors,
}

/// What a prepared method needs from the passes over the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    /// What tiles hold.
    pub inputs: Inputs,
    /// Whether the sign of the sum of all elected signs must be known before merging.
    pub majority_sign: bool,
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
    /// Whether task vectors are trimmed to a `density` first.
    fn trims(&self) -> bool {
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
    /// Fewest and most models that it merges.
    fn models(&self) -> (usize, usize) {
        (1, usize::MAX)
    }
    /// The merge itself for these settings. Settings are already checked against [`Method::params`].
    fn prepare(&self, settings: &Settings) -> Box<dyn Merger>;
}

/// A slice of the inputs, aligned element by element.
pub struct Tile<'a> {
    /// Instruction set to use.
    pub isa: Isa,
    /// One slice per model that has the tensor, in recipe order: see [`Inputs`].
    pub inputs: &'a [&'a [f32]],
    /// The weights of those models.
    pub weights: &'a [f32],
    /// Signs given from outside (−1, 0 or +1 per element) that replace an election.
    pub oracle: Option<&'a [f32]>,
    /// Sign of the sum of all elected signs, where [`Needs::majority_sign`] asked for it; else 0.
    pub majority: f32,
}

/// A method with its parameters fixed: a pure, element-wise function.
pub trait Merger: Send + Sync {
    /// What it needs.
    fn needs(&self) -> Needs;
    /// Writes the merged tile to `out`. `scratch` has the same length and arbitrary content.
    fn merge(&self, tile: &Tile<'_>, out: &mut [f32], scratch: &mut [f32]);
    /// Whether it divides by the sum of the weights, which then must not be zero.
    fn divides_by_weights(&self) -> bool {
        false
    }
    /// Whether the result for a single model of weight `weight` is that model, bit for bit.
    fn is_copy(&self, weight: f32) -> bool {
        let _ = weight;
        false
    }
    /// Sum over the tile of the elected signs, for [`Needs::majority_sign`].
    fn sum_of_signs(&self, tile: &Tile<'_>, scratch: &mut [f32]) -> i64 {
        let _ = (tile, scratch);
        0
    }
}
