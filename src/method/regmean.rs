//! RegMean (Jin et al. 2023, arXiv 2212.09849; a baseline of the TIES paper).
//!
//! For a linear layer with weights W_t [out, in] and Gram matrices G_t = X_tᵀ X_t [in, in] of its inputs:
//! W = (Σ_t W_t G̃_t) (Σ_t G̃_t)⁻¹, G̃_t being G_t with all entries off the diagonal times α. The solution is a matter of the
//! whole layer, so the plan hands in its result as the only input; every other tensor is averaged.

use super::linear::LinearMerger;
use super::{Merger, Method, ParamKind, ParamSpec, Settings, Statistics};

/// See the module's documentation.
pub(super) struct RegMean;

impl Method for RegMean {
    fn name(&self) -> &'static str {
        "regmean"
    }

    fn summary(&self) -> &'static str {
        "solve for the linear layers that are closest to all models on their own inputs"
    }

    fn formula(&self) -> &'static str {
        "W = (Σ W_t G_t) (Σ G_t)^-1,  G_t = X_t^T X_t, off the diagonal times alpha; other tensors are averaged"
    }

    fn reference(&self) -> &'static str {
        "Jin et al. 2023, arXiv 2212.09849"
    }

    fn params(&self) -> &'static [ParamSpec] {
        &[ParamSpec {
            name: "alpha",
            per_model: false,
            kind: ParamKind::Number { default: 0.9, min: 0.0, max: 1.0 },
            help: "factor of the Gram matrices off their diagonal",
        }]
    }

    fn needs_base(&self) -> bool {
        false
    }

    fn statistics(&self) -> Option<Statistics> {
        Some(Statistics::Gram)
    }

    fn prepare(&self, _settings: &Settings, _base: bool) -> Box<dyn Merger> {
        // What is solved for comes as one input, and everything else is averaged.
        Box::new(LinearMerger { normalize: true })
    }
}
