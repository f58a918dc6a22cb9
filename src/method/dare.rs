//! DARE: drop and rescale (Yu et al. 2023, "Language Models are Super Mario", arXiv 2311.03099, equation 2).
//!
//! - Each entry of τ_t is kept with probability K, by a draw of its own: m ~ Bernoulli(K), τ̂_t = m · τ_t / K, which has
//!   τ_t as its mean. With `rescale l1` (mergekit): τ̂_t = m · τ_t · Σ|τ_t| / Σ m|τ_t| over the tensor. With `rescale none`:
//!   τ̂_t = m · τ_t.
//! - `dare_ties` merges the τ̂_t as TIES does, by default as λ Σ_A w_t τ̂_t; `dare_linear` as λ Σ_t w_t τ̂_t, with
//!   `normalize true` divided by Σ_t w_t.
//! - The draw of an entry depends on seed, model, tensor and index alone. The paper's p is 1 − K.

use super::described::Described;
use super::sparse::{RESCALE, SparseMerger, per_model};
use super::task_arithmetic::NORMALIZE;
use super::ties::{COMBINE_SUM, ELECT, LAMBDA, TiesMerger, WEIGHT, ZERO_SUM};
use super::{ParamKind, ParamSpec, Settings, Sparsify};

const DENSITY: ParamSpec = ParamSpec {
    name: "density",
    per_model: true,
    kind: ParamKind::Number { default: 0.2, min: 0.0, max: 1.0 },
    help: "probability with which each entry of a task vector is kept (1 − the paper's drop rate)",
};

/// Elects signs among what was kept.
pub(super) static DARE_TIES: Described = Described {
    name: "dare_ties",
    summary: "drop entries of each task vector at random, rescale the others, elect signs, add what agrees",
    formula: "θ = θ0 + λ · Σ{ w_t τ̂_t : sgn τ̂_t = sgn Σ w_t τ̂_t },  τ̂_t = m_t τ_t / K_t, m_t ~ Bernoulli(K_t)",
    reference: "Yu et al. 2023, arXiv 2311.03099",
    params: &[WEIGHT, DENSITY, LAMBDA, ELECT, COMBINE_SUM, ZERO_SUM, RESCALE],
    trims: true,
    draws: true,
    prepare: |settings, _| Box::new(SparseMerger::new(TiesMerger::elected(settings), rules(settings), settings)),
    ..Described::PLAIN
};

/// Adds up what was kept.
pub(super) static DARE_LINEAR: Described = Described {
    name: "dare_linear",
    summary: "drop entries of each task vector at random, rescale the others, add the weighted sum to base",
    formula: "θ = θ0 + λ Σ w_t τ̂_t,  τ̂_t = m_t τ_t / K_t, m_t ~ Bernoulli(K_t)",
    reference: "Yu et al. 2023, arXiv 2311.03099",
    params: &[WEIGHT, DENSITY, LAMBDA, NORMALIZE, RESCALE],
    trims: true,
    draws: true,
    prepare: |settings, _| Box::new(SparseMerger::new(TiesMerger::sum(settings), rules(settings), settings)),
    ..Described::PLAIN
};

fn rules(settings: &Settings) -> Vec<Sparsify> {
    let rescale = settings.word("rescale") == "density";
    // At density 0 nothing is left to be scaled.
    let scale = |density: f64| if rescale && density > 0.0 { (1.0 / density) as f32 } else { 1.0 };
    per_model(settings, "density").into_iter().map(|density| Sparsify::Random { scale: scale(density) }).collect()
}
