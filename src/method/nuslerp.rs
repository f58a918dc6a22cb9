//! NuSLERP: spherical interpolation between two models by their weights, of task vectors where there is a base
//! (mergekit's method of that name).
//!
//! With t = w_1 / (w_0 + w_1) (½ where the weights cancel) and Ω the angle between x_0 and x_1:
//! x = (sin((1 − t)Ω) x_0 + sin(tΩ) x_1) / sin Ω, and the straight (1 − t) x_0 + t x_1 where sin Ω < 1e-8. The x are the
//! models' weights, or their differences to base, to which x is then added. Each tensor is one vector; with
//! `nuslerp_flatten false`, each of its rows is (a row longer than 131,072 elements: each piece of that length), or, with
//! `nuslerp_row_wise true` too, each of its columns: all entries that differ in the first index alone.

use super::described::Described;
use super::gram::{Gram, SpanMerger, Vectors, flag, inputs_with};
use super::{ParamKind, ParamSpec};

/// See the module's documentation.
pub(super) static NUSLERP: Described = Described {
    name: "nuslerp",
    summary: "interpolate between two models, or their task vectors if there is a base, along the arc between them",
    formula: "θ = (sin((1 − t)Ω) x_0 + sin(tΩ) x_1) / sin Ω [+ θ0],  t = w_1 / (w_0 + w_1),  x = θ_t [− θ0]",
    reference: "Goddard et al. 2024, arXiv 2403.13257; Shoemake 1985, doi 10.1145/325334.325242",
    params: &[
        ParamSpec {
            name: "weight",
            per_model: true,
            kind: ParamKind::ANY,
            help: "weight of a model: its share of the arc",
        },
        ParamSpec {
            name: "nuslerp_flatten",
            per_model: false,
            kind: ParamKind::Choice(&["true", "false"]),
            help: "treat each tensor as one vector, or each of its rows on its own",
        },
        ParamSpec {
            name: "nuslerp_row_wise",
            per_model: false,
            kind: ParamKind::Choice(&["false", "true"]),
            help: "with nuslerp_flatten false, each column instead of each row (mergekit's name for it)",
        },
    ],
    models: (2, 2),
    needs_base: false,
    prepare: |settings, base| {
        let vectors = match (flag(settings, "nuslerp_flatten"), flag(settings, "nuslerp_row_wise")) {
            (true, _) => Vectors::Tensors,
            (false, false) => Vectors::Rows,
            (false, true) => Vectors::Columns,
        };
        Box::new(SpanMerger { inputs: inputs_with(base), vectors, coefficients: Box::new(coefficients) })
    },
    ..Described::PLAIN
};

/// Length that shorter vectors count as having.
const SHORTEST: f64 = 1e-7;

fn coefficients(gram: &Gram, weights: &[f64]) -> Vec<f64> {
    if gram.len() == 1 {
        return vec![1.0];
    }
    let sum = weights[0] + weights[1];
    let t = if sum.abs() < 1e-6 { 0.5 } else { weights[1] / sum };
    let cosine = gram.dot(0, 1) / gram.norm(0).max(SHORTEST) / gram.norm(1).max(SHORTEST);
    let angle = libm::acos(cosine.clamp(-1.0, 1.0));
    if libm::sin(angle).abs() < 1e-8 {
        return vec![1.0 - t, t];
    }
    vec![libm::sin((1.0 - t) * angle) / libm::sin(angle), libm::sin(t * angle) / libm::sin(angle)]
}
