//! SLERP: spherical interpolation between two models (Shoemake 1985, "Animating rotation with quaternion curves").
//!
//! For each tensor, with θ_0 and θ_1 as vectors and Ω the angle between them:
//! θ = (sin((1 − t)Ω) θ_0 + sin(tΩ) θ_1) / sin Ω. Where |cos Ω| > 0.9995 the arc is a line: θ = (1 − t) θ_0 + t θ_1. A
//! vector shorter than 1e-8 counts as having no direction. θ_0 is base, or the first of two models.

use super::described::Described;
use super::gram::{Gram, SpanMerger};
use super::{Inputs, ParamKind, ParamSpec};

/// See the module's documentation.
pub(super) static SLERP: Described = Described {
    name: "slerp",
    summary: "interpolate between two models (or base and one) along the arc between them, tensor by tensor",
    formula: "θ = (sin((1 − t)Ω) θ_0 + sin(tΩ) θ_1) / sin Ω,  Ω the angle between θ_0 and θ_1",
    reference: "Shoemake 1985, doi 10.1145/325334.325242",
    params: &[ParamSpec {
        name: "t",
        per_model: false,
        kind: ParamKind::Number { default: 0.5, min: f32::MIN as f64, max: f32::MAX as f64 },
        help: "0 is the first model (or base), 1 the second",
    }],
    models: (2, 2),
    needs_base: false,
    base_is_model: true,
    prepare: |settings, _| {
        let t = settings.number("t");
        SpanMerger::of(Inputs::Weights, Box::new(move |gram, _| coefficients(gram, t)))
    },
    ..Described::PLAIN
};

/// Cosine beyond which the arc is taken for a line.
const LINE: f64 = 0.9995;
/// Length below which a vector has no direction.
const SHORT: f64 = 1e-8;

fn coefficients(gram: &Gram, t: f64) -> Vec<f64> {
    if gram.len() == 1 {
        return vec![1.0];
    }
    let length = |i| Some(gram.norm(i)).filter(|&norm| norm > SHORT).unwrap_or(1.0);
    let cosine = gram.dot(0, 1) / length(0) / length(1);
    if cosine.abs() > LINE {
        return vec![1.0 - t, t];
    }
    let angle = libm::acos(cosine);
    vec![libm::sin((1.0 - t) * angle) / libm::sin(angle), libm::sin(t * angle) / libm::sin(angle)]
}
