//! Passthrough: each tensor is one model's, as it is or scaled. With slices, layers are stacked in any order.
//!
//! θ = s θ_1. With s = 1 tensors are copied byte for byte (unless the output type differs).

use super::{Inputs, Merger, Method, Needs, ParamKind, ParamSpec, Settings, Tile};
use crate::kernels;

/// See the module's documentation.
pub(super) struct Passthrough;

impl Method for Passthrough {
    fn name(&self) -> &'static str {
        "passthrough"
    }

    fn summary(&self) -> &'static str {
        "take each tensor from one model, to stack layers of several"
    }

    fn formula(&self) -> &'static str {
        "θ = s θ_1"
    }

    fn reference(&self) -> &'static str {
        "mergekit, Goddard et al. 2024, arXiv 2403.13257"
    }

    fn params(&self) -> &'static [ParamSpec] {
        &[ParamSpec { name: "scale", per_model: true, kind: ParamKind::ANY, help: "factor of every value of a tensor" }]
    }

    fn needs_base(&self) -> bool {
        false
    }

    fn weight_param(&self) -> &'static str {
        "scale"
    }

    fn models(&self) -> (usize, usize) {
        (1, 1)
    }

    fn prepare(&self, _settings: &Settings, _base: bool) -> Box<dyn Merger> {
        Box::new(PassthroughMerger)
    }
}

struct PassthroughMerger;

impl Merger for PassthroughMerger {
    fn needs(&self) -> Needs {
        Needs::of(Inputs::Weights)
    }

    fn is_copy(&self, weight: f32) -> bool {
        weight == 1.0
    }

    fn merge(&self, tile: &Tile<'_>, out: &mut [f32], _scratch: &mut [f32]) {
        out.copy_from_slice(tile.inputs[0]);
        kernels::scale(tile.isa, out, tile.weights[0]);
    }
}
