//! Task arithmetic: the weighted sum of task vectors (Ilharco et al. 2023, arXiv 2212.04089).
//!
//! τ = λ Σ_t w_t τ_t, with `normalize true` divided by Σ_t w_t (unless that is nearly zero). Negative weights forget a
//! task. The TIES paper uses λ = 0.4 where there is no validation data.

use super::{Inputs, Merger, Method, Needs, ParamKind, ParamSpec, Settings, Tile};
use crate::kernels::{self, Fused};

/// See the module's documentation.
pub(super) struct TaskArithmetic;

impl Method for TaskArithmetic {
    fn name(&self) -> &'static str {
        "task_arithmetic"
    }

    fn summary(&self) -> &'static str {
        "add the weighted sum of all task vectors to base"
    }

    fn formula(&self) -> &'static str {
        "θ = θ0 + λ Σ w_t (θ_t − θ0)"
    }

    fn reference(&self) -> &'static str {
        "Ilharco et al. 2023, arXiv 2212.04089"
    }

    fn params(&self) -> &'static [ParamSpec] {
        &[
            ParamSpec {
                name: "weight",
                per_model: true,
                kind: ParamKind::ANY,
                help: "weight of a model's task vector",
            },
            ParamSpec {
                name: "lambda",
                per_model: false,
                kind: ParamKind::ANY,
                help: "scale of the sum (the TIES paper without validation data: 0.4)",
            },
            NORMALIZE,
        ]
    }

    fn prepare(&self, settings: &Settings, _base: bool) -> Box<dyn Merger> {
        Box::new(TaskArithmeticMerger { lambda: settings.number("lambda") as f32, normalize: normalizes(settings) })
    }
}

/// Whether a sum of weighted task vectors is divided by the weights.
pub(super) const NORMALIZE: ParamSpec = ParamSpec {
    name: "normalize",
    per_model: false,
    kind: ParamKind::Choice(&["false", "true"]),
    help: "divide the sum by the sum of the weights, or not",
};

/// What [`NORMALIZE`] is set to.
pub(super) fn normalizes(settings: &Settings) -> bool {
    settings.word("normalize") == "true"
}

/// Divides the sum in `out` by the weights, unless they nearly cancel.
pub(super) fn normalize(tile: &Tile<'_>, out: &mut [f32]) {
    let sum: f32 = tile.weights.iter().sum();
    if sum.abs() >= LEAST_SUM {
        kernels::divide(tile.isa, out, sum);
    }
}

struct TaskArithmeticMerger {
    lambda: f32,
    normalize: bool,
}

/// Weights whose sum is closer to zero than this are not divided by, as in mergekit.
const LEAST_SUM: f32 = 1e-8;

impl Merger for TaskArithmeticMerger {
    fn needs(&self) -> Needs {
        Needs::of(Inputs::TaskVectors)
    }

    fn lambda(&self) -> Option<f32> {
        Some(self.lambda)
    }

    fn merge(&self, tile: &Tile<'_>, out: &mut [f32], scratch: &mut [f32]) {
        self.unscaled(tile, out, scratch);
        kernels::scale(tile.isa, out, self.lambda);
    }

    fn unscaled(&self, tile: &Tile<'_>, out: &mut [f32], _scratch: &mut [f32]) {
        kernels::combine_sum(tile.isa, tile.inputs, tile.weights, None, out);
        if self.normalize {
            normalize(tile, out);
        }
    }

    fn fused(&self, _weights: &[f32], _majority: f32) -> Option<Fused> {
        (!self.normalize).then_some(Fused::Sum { lambda: self.lambda })
    }
}
