//! Karcher mean: the point on the sphere whose squared angles to all models sum to the least, at their mean length
//! (Karcher 1977, "Riemannian center of mass and mollifier smoothing").
//!
//! With u_t = θ_t / ‖θ_t‖ and α = 1/n: start at u = Σ α u_t, normalised. Repeat at most `max_iter` times: with Ω_t the
//! angle between u and u_t, T = Σ α (Ω_t / sin Ω_t)(u_t − cos Ω_t u), over the t with Ω_t ≥ `tol`; stop at ‖T‖ < `tol`;
//! u ← cos ‖T‖ u + sin ‖T‖ T / ‖T‖. Then θ = u · Σ α ‖θ_t‖. Models no longer than `tol` have no direction, but their
//! length counts. u stays in the span of the models, so all this is done on coefficients.

use super::described::Described;
use super::gram::{Gram, SpanMerger};
use super::{Inputs, ParamKind, ParamSpec};

/// See the module's documentation.
pub(super) static KARCHER: Described = Described {
    name: "karcher",
    summary: "the mean of the models' directions on the sphere, at their mean length, tensor by tensor",
    formula: "θ = u · mean ‖θ_t‖,  u = argmin Σ angle(u, θ_t)²",
    reference: "Karcher 1977, doi 10.1002/cpa.3160300502",
    params: &[
        ParamSpec {
            name: "max_iter",
            per_model: false,
            kind: ParamKind::Number { default: 10.0, min: 0.0, max: 10_000.0 },
            help: "most iterations",
        },
        ParamSpec {
            name: "tol",
            per_model: false,
            kind: ParamKind::Number { default: 1e-5, min: 0.0, max: 1.0 },
            help: "angle that is close enough",
        },
    ],
    needs_base: false,
    prepare: |settings, _| {
        let (iterations, tol) = (settings.number("max_iter") as usize, settings.number("tol"));
        SpanMerger::of(Inputs::Weights, Box::new(move |gram, _| coefficients(gram, iterations, tol)))
    },
    ..Described::PLAIN
};

fn coefficients(gram: &Gram, iterations: usize, tol: f64) -> Vec<f64> {
    let n = gram.len();
    if n == 1 {
        return vec![1.0];
    }
    let norms: Vec<f64> = (0..n).map(|i| gram.norm(i)).collect();
    let length = norms.iter().sum::<f64>() / n as f64;
    let directed: Vec<usize> = (0..n).filter(|&i| norms[i] > tol).collect();
    let Some(&first) = directed.first() else { return vec![0.0; n] };
    let alpha = 1.0 / directed.len() as f64;
    let unit = |c: &mut Vec<f64>| {
        let norm = gram.norm_of(c);
        c.iter_mut().for_each(|c| *c /= norm);
    };
    // u as coefficients of the models.
    let mut u = vec![0.0; n];
    directed.iter().for_each(|&i| u[i] = alpha / norms[i]);
    if gram.norm_of(&u) < tol {
        u.fill(0.0);
        u[first] = 1.0 / norms[first];
    }
    unit(&mut u);
    for _ in 0..iterations {
        let mut tangent = vec![0.0; n];
        for &i in &directed {
            let cosine: f64 = (0..n).map(|j| u[j] * gram.dot(i, j)).sum::<f64>() / norms[i];
            let cosine = cosine.clamp(-1.0, 1.0);
            let angle = libm::acos(cosine);
            // At the opposite point every direction leads back: none is taken.
            if angle < tol || libm::sin(angle) == 0.0 {
                continue;
            }
            let scale = alpha * angle / libm::sin(angle);
            tangent.iter_mut().zip(&u).for_each(|(tangent, u)| *tangent -= scale * cosine * u);
            tangent[i] += scale / norms[i];
        }
        let norm = gram.norm_of(&tangent);
        // Written so that a step of no length ends the search whatever the tolerance.
        if !(norm >= tol && norm > 0.0) {
            break;
        }
        u.iter_mut()
            .zip(&tangent)
            .for_each(|(u, tangent)| *u = libm::cos(norm) * *u + libm::sin(norm) / norm * tangent);
        unit(&mut u);
    }
    u.iter().map(|c| c * length).collect()
}
