//! Multi-SLERP: the weighted barycentre of any number of models on the sphere, in the tangent plane at their mean
//! direction (Goddard 2025, mergekit's method of that name).
//!
//! With u_t = x_t / ‖x_t‖ and w_t the weights (divided by their sum unless `normalize_weights false`):
//! m = Σ w_t u_t, and θ = (Σ w_t ‖x_t‖) · m / ‖m‖. The step in the tangent plane at m that the method is named after is
//! Σ w_t (u_t − ⟨u_t, m̂⟩ m̂) = m − ⟨m, m̂⟩ m̂ = 0, so it is left out. Where the directions cancel (‖m‖ < `eps`):
//! θ = Σ w_t x_t. The x are the models' weights, or their differences to base, to which θ is then added.

use super::described::Described;
use super::gram::{Gram, SpanMerger, flag, inputs_with};
use super::{ParamKind, ParamSpec};

/// See the module's documentation.
pub(super) static MULTISLERP: Described = Described {
    name: "multislerp",
    summary: "the weighted mean direction of the models, or of their task vectors if there is a base, at their mean length",
    formula: "θ = (Σ w_t ‖x_t‖) m / ‖m‖ [+ θ0],  m = Σ w_t x_t / ‖x_t‖,  x_t = θ_t [− θ0]",
    reference: "Goddard et al. 2024, arXiv 2403.13257",
    params: &[
        ParamSpec { name: "weight", per_model: true, kind: ParamKind::ANY, help: "weight of a model in both means" },
        ParamSpec {
            name: "normalize_weights",
            per_model: false,
            kind: ParamKind::Choice(&["true", "false"]),
            help: "divide the weights by their sum (unless that is 0)",
        },
        ParamSpec {
            name: "eps",
            per_model: false,
            kind: ParamKind::Number { default: 1e-8, min: 0.0, max: 1.0 },
            help: "length of the mean direction below which the models' weighted sum is taken",
        },
    ],
    needs_base: false,
    prepare: |settings, base| {
        let (normalize, eps) = (flag(settings, "normalize_weights"), settings.number("eps"));
        SpanMerger::of(inputs_with(base), Box::new(move |gram, weights| coefficients(gram, weights, normalize, eps)))
    },
    ..Described::PLAIN
};

fn coefficients(gram: &Gram, weights: &[f64], normalize: bool, eps: f64) -> Vec<f64> {
    if gram.len() == 1 {
        return vec![1.0];
    }
    let sum: f64 = weights.iter().sum();
    let weights: Vec<f64> = weights.iter().map(|w| if normalize && sum != 0.0 { w / sum } else { *w }).collect();
    // A vector without length has no direction either.
    let unit = |i: usize| gram.norm(i) + eps.max(f64::MIN_POSITIVE);
    let mean: Vec<f64> = weights.iter().enumerate().map(|(i, w)| w / unit(i)).collect();
    let length = gram.norm_of(&mean);
    if length < eps.max(f64::MIN_POSITIVE) {
        return weights;
    }
    let scale = weights.iter().enumerate().map(|(i, w)| w * gram.norm(i)).sum::<f64>();
    mean.iter().map(|c| c / length * scale).collect()
}
