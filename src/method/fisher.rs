//! Fisher-weighted averaging (Matena and Raffel 2022, arXiv 2111.09832; a baseline of the TIES paper).
//!
//! θ = Σ_t w_t F_t θ_t / Σ_t w_t F_t, element by element, F_t being the diagonal of model t's Fisher information and never
//! below a floor. Where no model has F for a tensor, its weighted mean.

use super::linear::mean_of_all;
use super::{Inputs, Merger, Method, Needs, ParamKind, ParamSpec, Settings, Statistics, Tile};
use crate::kernels;

/// See the module's documentation.
pub(super) struct Fisher;

impl Method for Fisher {
    fn name(&self) -> &'static str {
        "fisher"
    }

    fn summary(&self) -> &'static str {
        "average the models' weights, each parameter weighed by its Fisher information"
    }

    fn formula(&self) -> &'static str {
        "θ = Σ w_t F_t θ_t / Σ w_t F_t,  F_t at least fisher_floor"
    }

    fn reference(&self) -> &'static str {
        "Matena and Raffel 2022, arXiv 2111.09832"
    }

    fn params(&self) -> &'static [ParamSpec] {
        &[
            ParamSpec {
                name: "weight",
                per_model: true,
                kind: ParamKind::Number { default: 1.0, min: 0.0, max: f32::MAX as f64 },
                help: "weight of a model beside its Fisher information; not all zero",
            },
            ParamSpec {
                name: "fisher_floor",
                per_model: false,
                kind: ParamKind::Number { default: 1e-6, min: f32::MIN_POSITIVE as f64, max: f32::MAX as f64 },
                help: "smaller Fisher information counts as this much, so that there is always something to divide by",
            },
        ]
    }

    fn needs_base(&self) -> bool {
        false
    }

    fn statistics(&self) -> Option<Statistics> {
        Some(Statistics::Fisher)
    }

    fn prepare(&self, settings: &Settings, _base: bool) -> Box<dyn Merger> {
        Box::new(FisherMerger { floor: settings.number("fisher_floor") as f32 })
    }
}

struct FisherMerger {
    floor: f32,
}

impl Merger for FisherMerger {
    fn needs(&self) -> Needs {
        Needs::of(Inputs::Weights)
    }

    fn divides_by_weights(&self) -> bool {
        true
    }

    fn merge(&self, tile: &Tile<'_>, out: &mut [f32], _scratch: &mut [f32]) {
        if tile.statistics.is_empty() {
            return mean_of_all(tile, None, out);
        }
        kernels::weighted_mean(tile.isa, tile.inputs, tile.statistics, tile.weights, self.floor, out);
    }
}
