//! Model Stock: interpolate between base and the average of the models, the closer the task vectors are to each other
//! the nearer to the average (Jang et al. 2024, arXiv 2403.19522).
//!
//! For each tensor (or each of its rows, with `filter_wise true`; of a row longer than 131,072 elements, each piece of
//! that length), c = the mean over all pairs of cos(τ_s, τ_t) and r = N c / (1 + (N − 1) c): θ = r · mean θ_t + (1 − r) θ0
//! = θ0 + r · mean τ_t. A pair with a zero vector has cosine 0; r is not limited to [0, 1]. Where 1 + (N − 1) c = 0, base
//! is kept.

use super::described::Described;
use super::gram::{Gram, SpanMerger, Vectors, flag};
use super::{Inputs, ParamKind, ParamSpec};

/// See the module's documentation.
pub(super) static MODEL_STOCK: Described = Described {
    name: "model_stock",
    summary: "move base towards the models' average, by how much their task vectors agree in direction",
    formula: "θ = r · mean θ_t + (1 − r) θ0,  r = N c / (1 + (N − 1) c),  c = mean of cos(τ_s, τ_t) over pairs",
    reference: "Jang et al. 2024, arXiv 2403.19522",
    params: &[
        ParamSpec {
            name: "filter_wise",
            per_model: false,
            kind: ParamKind::Choice(&["false", "true"]),
            help: "one ratio per tensor, or one per row",
        },
        ParamSpec {
            name: "norm_floor",
            per_model: false,
            kind: ParamKind::Number { default: 0.0, min: 0.0, max: f32::MAX as f64 },
            help: "smallest product of two task vectors' lengths that a cosine is taken with (mergekit: 1e-6)",
        },
    ],
    models: (2, usize::MAX),
    prepare: |settings, _| {
        let floor = settings.number("norm_floor");
        Box::new(SpanMerger {
            inputs: Inputs::TaskVectors,
            vectors: if flag(settings, "filter_wise") { Vectors::Rows } else { Vectors::Tensors },
            coefficients: Box::new(move |gram, _| coefficients(gram, floor)),
        })
    },
    ..Described::PLAIN
};

fn coefficients(gram: &Gram, floor: f64) -> Vec<f64> {
    let n = gram.len();
    if n == 1 {
        return vec![1.0];
    }
    let cosine = |i: usize, j: usize| match (gram.norm(i) * gram.norm(j)).max(floor) {
        0.0 => 0.0,
        norms => (gram.dot(i, j) / norms).clamp(-1.0, 1.0),
    };
    let pairs = || (0..n).flat_map(|i| (i + 1..n).map(move |j| (i, j)));
    let mean = pairs().map(|(i, j)| cosine(i, j)).sum::<f64>() / pairs().count() as f64;
    let divisor = 1.0 + (n as f64 - 1.0) * mean;
    let ratio = if divisor.abs() < 1e-12 { 0.0 } else { n as f64 * mean / divisor };
    vec![ratio / n as f64; n]
}
