//! Model Breadcrumbs: mask both tails of each task vector (Davari and Belilovsky 2023, arXiv 2312.06795).
//!
//! With N entries in order of magnitude, the ⌊γN⌋ largest are dropped as outliers, the ⌊KN⌋ that follow are kept and the
//! rest is dropped as noise; where fewer than ⌊γN⌋ + ⌊KN⌋ entries exist, fewer outliers are dropped. N counts a tensor
//! (as in the paper) or the whole model, as `--scope` says.
//!
//! With `rescale l1` (mergekit), what is kept of a tensor is multiplied by Σ|τ_t| / Σ|τ̂_t|.
//!
//! - `breadcrumbs`: λ Σ_t w_t τ̂_t (the paper), with `normalize true` divided by Σ_t w_t.
//! - `breadcrumbs_ties`: TIES over the τ̂_t, by default λ Σ_A w_t τ̂_t.

use super::described::Described;
use super::sparse::{RESTORE, SparseMerger, per_model};
use super::task_arithmetic::NORMALIZE;
use super::ties::{COMBINE_SUM, ELECT, LAMBDA, TiesMerger, WEIGHT, ZERO_SUM};
use super::{ParamKind, ParamSpec, Settings, Sparsify};

const DENSITY: ParamSpec = ParamSpec {
    name: "density",
    per_model: true,
    kind: ParamKind::Number { default: 0.2, min: 0.0, max: 1.0 },
    help: "fraction of each task vector kept, by magnitude, below the outliers",
};

const GAMMA: ParamSpec = ParamSpec {
    name: "gamma",
    per_model: true,
    kind: ParamKind::Number { default: 0.01, min: 0.0, max: 1.0 },
    help: "fraction of each task vector dropped as outliers, largest magnitudes first",
};

/// Elects signs among what was kept.
pub(super) static BREADCRUMBS_TIES: Described = Described {
    name: "breadcrumbs_ties",
    summary: "drop the largest and the smallest entries of each task vector, elect signs, add what agrees",
    formula: "θ = θ0 + λ · Σ{ w_t τ̂_t : sgn τ̂_t = sgn Σ w_t τ̂_t },  τ̂_t = top density of τ_t below its top gamma",
    reference: "Davari and Belilovsky 2023, arXiv 2312.06795; Yadav et al. 2023, arXiv 2306.01708",
    params: &[WEIGHT, DENSITY, GAMMA, LAMBDA, ELECT, COMBINE_SUM, ZERO_SUM, RESTORE],
    trims: true,
    prepare: |settings, _| Box::new(SparseMerger::new(TiesMerger::elected(settings), rules(settings), settings)),
    ..Described::PLAIN
};

/// Adds up what was kept.
pub(super) static BREADCRUMBS: Described = Described {
    name: "breadcrumbs",
    summary: "drop the largest and the smallest entries of each task vector, add the weighted sum to base",
    formula: "θ = θ0 + λ Σ w_t τ̂_t,  τ̂_t = top density of τ_t below its top gamma",
    reference: "Davari and Belilovsky 2023, arXiv 2312.06795",
    params: &[WEIGHT, DENSITY, GAMMA, LAMBDA, NORMALIZE, RESTORE],
    trims: true,
    prepare: |settings, _| Box::new(SparseMerger::new(TiesMerger::sum(settings), rules(settings), settings)),
    ..Described::PLAIN
};

fn rules(settings: &Settings) -> Vec<Sparsify> {
    per_model(settings, "gamma").into_iter().map(|gamma| Sparsify::Outliers { gamma }).collect()
}
