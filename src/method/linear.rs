//! Simple and weighted averaging of weights (model soups, Wortsman et al. 2022, arXiv 2203.05482).
//!
//! θ = Σ_t w_t θ_t / Σ_t w_t over the models; base takes no part unless it is listed as a model. With `normalize false`
//! there is no division.

use super::{Inputs, Merger, Method, Needs, ParamKind, ParamSpec, Settings, Tile};
use crate::kernels::{self, Fused};

/// See the module's documentation.
pub(super) struct Linear;

impl Method for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn summary(&self) -> &'static str {
        "average the models' weights (simple averaging, or weighted)"
    }

    fn formula(&self) -> &'static str {
        "θ = Σ w_t θ_t / Σ w_t"
    }

    fn reference(&self) -> &'static str {
        "Wortsman et al. 2022, arXiv 2203.05482"
    }

    fn params(&self) -> &'static [ParamSpec] {
        &[
            ParamSpec {
                name: "weight",
                per_model: true,
                kind: ParamKind::ANY,
                help: "weight of a model; the weights must not sum to zero where they are normalized",
            },
            ParamSpec {
                name: "normalize",
                per_model: false,
                kind: ParamKind::Choice(&["true", "false"]),
                help: "divide by the sum of the weights, or not",
            },
        ]
    }

    fn needs_base(&self) -> bool {
        false
    }

    fn prepare(&self, settings: &Settings, _base: bool) -> Box<dyn Merger> {
        Box::new(LinearMerger { normalize: settings.word("normalize") == "true" })
    }
}

/// Σ w_t θ_t, divided by Σ w_t where that is asked for.
pub(super) struct LinearMerger {
    /// Divide.
    pub(super) normalize: bool,
}

/// The sum of all inputs (of those that `gamma` agrees with) divided by the weights of all.
pub(super) fn mean_of_all(tile: &Tile<'_>, gamma: Option<&[f32]>, out: &mut [f32]) {
    kernels::combine_sum(tile.isa, tile.inputs, tile.weights, gamma, out);
    kernels::divide(tile.isa, out, tile.weights.iter().sum());
}

impl Merger for LinearMerger {
    fn needs(&self) -> Needs {
        Needs::of(Inputs::Weights)
    }

    fn divides_by_weights(&self) -> bool {
        self.normalize
    }

    fn merge(&self, tile: &Tile<'_>, out: &mut [f32], _scratch: &mut [f32]) {
        match self.normalize {
            true => mean_of_all(tile, None, out),
            false => kernels::combine_sum(tile.isa, tile.inputs, tile.weights, None, out),
        }
    }

    fn fused(&self, weights: &[f32], _majority: f32) -> Option<Fused> {
        Some(Fused::Average { divisor: if self.normalize { weights.iter().sum() } else { 1.0 } })
    }
}
