//! DELLA: drop entries at random, those of small magnitude more often (Deep, Bhardwaj and Poria 2024, arXiv 2406.11617).
//!
//! - In each row of C entries of τ_t (the last axis; a vector is one row), the entry of rank r = 0 ... C − 1 by magnitude,
//!   smallest first (equal ones by position), is kept with probability p = K − ε + 2ε r / (C − 1), by a draw of its own,
//!   and divided by p: its mean stays τ_t. Where K ± ε would leave [0, 1], ε is what remains: min(K, 1 − K). A row of one
//!   entry has p = K; `rescale l1` (mergekit) restores the tensor's Σ|τ_t| instead, `rescale none` divides by nothing; a row longer than 131,072 entries is ranked in pieces of that length.
//! - `della` merges the result as TIES does, by default by the mean of what agrees; `della_linear` as λ Σ_t w_t τ̂_t
//!   (divided by Σ_t w_t with `normalize true`).

use super::described::Described;
use super::sparse::{RESCALE, SparseMerger, per_model};
use super::task_arithmetic::NORMALIZE;
use super::ties::{COMBINE, ELECT, LAMBDA, TiesMerger, WEIGHT, ZERO_SUM};
use super::{ParamKind, ParamSpec, Settings, Sparsify};

const DENSITY: ParamSpec = ParamSpec {
    name: "density",
    per_model: true,
    kind: ParamKind::Number { default: 0.2, min: 0.0, max: 1.0 },
    help: "mean probability with which the entries of a task vector are kept",
};

const EPSILON: ParamSpec = ParamSpec {
    name: "epsilon",
    per_model: true,
    kind: ParamKind::Number { default: 0.15, min: 0.0, max: 1.0 },
    help: "how far the probability lies below density for the smallest entry of a row, and above it for the largest",
};

/// Elects signs among what was kept.
pub(super) static DELLA: Described = Described {
    name: "della",
    summary: "drop entries at random, small ones more often, rescale the others, elect signs, average what agrees",
    formula: "θ = θ0 + λ · mean{ τ̂_t : sgn τ̂_t = sgn Σ w_t τ̂_t },  τ̂_t = m_t τ_t / p_t, m_t ~ Bernoulli(p_t), p_t by rank in the row",
    reference: "Deep et al. 2024, arXiv 2406.11617",
    params: &[WEIGHT, DENSITY, EPSILON, LAMBDA, ELECT, COMBINE, ZERO_SUM, RESCALE],
    trims: true,
    draws: true,
    prepare: |settings, _| Box::new(SparseMerger::new(TiesMerger::elected(settings), rules(settings), settings)),
    ..Described::PLAIN
};

/// Adds up what was kept.
pub(super) static DELLA_LINEAR: Described = Described {
    name: "della_linear",
    summary: "drop entries at random, small ones more often, rescale the others, add the weighted sum to base",
    formula: "θ = θ0 + λ Σ w_t τ̂_t,  τ̂_t = m_t τ_t / p_t, m_t ~ Bernoulli(p_t), p_t by rank in the row",
    reference: "Deep et al. 2024, arXiv 2406.11617",
    params: &[WEIGHT, DENSITY, EPSILON, LAMBDA, NORMALIZE, RESCALE],
    trims: true,
    draws: true,
    prepare: |settings, _| Box::new(SparseMerger::new(TiesMerger::sum(settings), rules(settings), settings)),
    ..Described::PLAIN
};

fn rules(settings: &Settings) -> Vec<Sparsify> {
    let rescale = settings.word("rescale") == "density";
    per_model(settings, "epsilon").into_iter().map(|epsilon| Sparsify::Ranked { epsilon, rescale }).collect()
}
