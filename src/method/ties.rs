//! TIES-Merging: trim, elect sign, disjoint merge (Yadav et al. 2023, arXiv 2306.01708, section 4).
//!
//! With trimmed task vectors τ̂_t and weights w_t (1 unless given):
//!
//! - elect: γ = sgn Σ_t w_t τ̂_t (`mass`), sgn(#positive − #negative) (`count`), or no election (`none`); signs given
//!   from outside replace the election;
//! - disjoint merge over A = {t : τ̂_t ≠ 0 and sgn τ̂_t = γ}: Σ_A w_t τ̂_t / Σ_A w_t (`mean`), Σ_A w_t τ̂_t (`sum`), or
//!   the w_t τ̂_t of largest magnitude in A (`max`), or Σ_A w_t τ̂_t / Σ_t w_t over all models (`mean-all`: no disjoint
//!   mean); 0 where A is empty;
//! - the merged task vector is λ times that.
//!
//! With `rescale l1` (mergekit), τ̂_t is multiplied by Σ|τ_t| / Σ|τ̂_t| over the tensor.

use super::linear::mean_of_all;
use super::sparse::{RESTORE, SparseMerger, per_model};
use super::task_arithmetic::{normalize, normalizes};
use super::{Inputs, Merger, Method, Needs, ParamKind, ParamSpec, Settings, Sparsify, Tile};
use crate::kernels::{self, Fused};

/// See the module's documentation.
pub(super) struct Ties;

/// Weights of models where signs are elected.
pub(super) const WEIGHT: ParamSpec =
    ParamSpec { name: "weight", per_model: true, kind: ParamKind::ANY, help: "weight of a model in election and mean" };

/// The scale of the result.
pub(super) const LAMBDA: ParamSpec =
    ParamSpec { name: "lambda", per_model: false, kind: ParamKind::ANY, help: "scale of the merged task vector" };

/// How signs are elected.
pub(super) const ELECT: ParamSpec = ParamSpec {
    name: "elect",
    per_model: false,
    kind: ParamKind::Choice(&["mass", "count", "none"]),
    help: "elect signs by summed mass (paper), by count, or not at all",
};

/// How what agrees is combined.
pub(super) const COMBINE: ParamSpec = ParamSpec {
    name: "combine",
    per_model: false,
    kind: ParamKind::Choice(&["mean", "sum", "max", "mean-all"]),
    help: "disjoint mean (paper), sum, entry of largest magnitude, or sum over all models' weights",
};

/// How what agrees is combined, in methods whose authors add it up.
pub(super) const COMBINE_SUM: ParamSpec = ParamSpec {
    name: "combine",
    per_model: false,
    kind: ParamKind::Choice(&["sum", "mean", "max", "mean-all"]),
    help: "sum of what agrees with the elected sign, its mean, the largest magnitude, or sum over all models' weights",
};

/// What becomes of elections that cancel.
pub(super) const ZERO_SUM: ParamSpec = ParamSpec {
    name: "zero_sum",
    per_model: false,
    kind: ParamKind::Choice(&["zero", "positive", "majority"]),
    help: "sign where an election cancels exactly: none (paper), positive, or the majority's",
};

impl Method for Ties {
    fn name(&self) -> &'static str {
        "ties"
    }

    fn summary(&self) -> &'static str {
        "trim each task vector, elect a sign per parameter, average what agrees"
    }

    fn formula(&self) -> &'static str {
        "θ = θ0 + λ · mean{ τ̂_t : sgn τ̂_t = sgn Σ w_t τ̂_t },  τ̂_t = top density of τ_t = θ_t − θ0"
    }

    fn reference(&self) -> &'static str {
        "Yadav et al. 2023, arXiv 2306.01708"
    }

    fn params(&self) -> &'static [ParamSpec] {
        &[
            WEIGHT,
            ParamSpec {
                name: "density",
                per_model: true,
                kind: ParamKind::Number { default: 0.2, min: 0.0, max: 1.0 },
                help: "fraction of each task vector kept, by magnitude",
            },
            LAMBDA,
            ELECT,
            COMBINE,
            ZERO_SUM,
            RESTORE,
        ]
    }

    fn trims(&self) -> bool {
        true
    }

    fn prepare(&self, settings: &Settings, _base: bool) -> Box<dyn Merger> {
        let merge = TiesMerger::elected(settings);
        if settings.word("rescale") == "none" {
            return Box::new(merge);
        }
        let rules = per_model(settings, "density").iter().map(|_| Sparsify::Magnitude).collect();
        Box::new(SparseMerger::new(merge, rules, settings))
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Elect {
    Mass,
    Count,
    None,
}

#[derive(Clone, Copy)]
enum Combine {
    Mean,
    Sum,
    Max,
    MeanAll,
}

#[derive(Clone, Copy, PartialEq)]
enum ZeroSum {
    Sign(f32),
    Majority,
}

/// Election and disjoint merge of task vectors, however they became sparse.
pub(super) struct TiesMerger {
    elect: Elect,
    combine: Combine,
    zero_sum: ZeroSum,
    lambda: f32,
    /// The sum of all survivors is divided by all weights.
    normalize: bool,
}

impl TiesMerger {
    /// As `elect`, `combine`, `zero_sum` and `lambda` say.
    pub(super) fn elected(settings: &Settings) -> Self {
        let elect = match settings.word("elect") {
            "mass" => Elect::Mass,
            "count" => Elect::Count,
            _ => Elect::None,
        };
        let combine = match settings.word("combine") {
            "mean" => Combine::Mean,
            "sum" => Combine::Sum,
            "mean-all" => Combine::MeanAll,
            _ => Combine::Max,
        };
        let zero_sum = match settings.word("zero_sum") {
            "zero" => ZeroSum::Sign(0.0),
            "positive" => ZeroSum::Sign(1.0),
            _ => ZeroSum::Majority,
        };
        Self { elect, combine, zero_sum, lambda: settings.number("lambda") as f32, normalize: false }
    }

    /// λ Σ w τ̂, divided by Σ w where `normalize` says so: no election.
    pub(super) fn sum(settings: &Settings) -> Self {
        let lambda = settings.number("lambda") as f32;
        let normalize = normalizes(settings);
        Self { elect: Elect::None, combine: Combine::Sum, zero_sum: ZeroSum::Sign(0.0), lambda, normalize }
    }

    /// Elects signs into `gamma` without regard to exact cancellation. False if every survivor takes part.
    fn elect(&self, tile: &Tile<'_>, gamma: &mut [f32]) -> bool {
        match (tile.oracle, self.elect) {
            (Some(signs), _) => gamma.copy_from_slice(signs),
            (None, Elect::Mass) => kernels::elect_mass(tile.isa, tile.inputs, tile.weights, gamma),
            (None, Elect::Count) => kernels::elect_count(tile.isa, tile.inputs, gamma),
            (None, Elect::None) => return false,
        }
        true
    }
}

impl Merger for TiesMerger {
    fn needs(&self) -> Needs {
        let majority_sign = self.elect != Elect::None && self.zero_sum == ZeroSum::Majority;
        Needs { majority_sign, ..Needs::of(Inputs::TrimmedTaskVectors) }
    }

    fn lambda(&self) -> Option<f32> {
        Some(self.lambda)
    }

    fn merge(&self, tile: &Tile<'_>, out: &mut [f32], scratch: &mut [f32]) {
        self.unscaled(tile, out, scratch);
        kernels::scale(tile.isa, out, self.lambda);
    }

    fn unscaled(&self, tile: &Tile<'_>, out: &mut [f32], scratch: &mut [f32]) {
        let elected = self.elect(tile, scratch);
        // An oracle's zero means that it did not move: nothing agrees with it. Only an election can cancel.
        if elected && tile.oracle.is_none() {
            let sign = match self.zero_sum {
                ZeroSum::Sign(sign) => sign,
                ZeroSum::Majority => tile.majority,
            };
            if sign != 0.0 {
                kernels::fill_zero_sign(tile.isa, scratch, sign);
            }
        }
        let gamma = elected.then_some(&*scratch);
        match self.combine {
            Combine::Mean => kernels::combine_mean(tile.isa, tile.inputs, tile.weights, gamma, out),
            Combine::Sum => kernels::combine_sum(tile.isa, tile.inputs, tile.weights, gamma, out),
            Combine::Max => kernels::combine_max(tile.isa, tile.inputs, tile.weights, gamma, out),
            Combine::MeanAll => mean_of_all(tile, gamma, out),
        }
        if self.normalize {
            normalize(tile, out);
        }
    }

    fn divides_by_weights(&self) -> bool {
        matches!(self.combine, Combine::MeanAll)
    }

    fn fused(&self, _weights: &[f32], majority: f32) -> Option<Fused> {
        let zero_sign = match self.zero_sum {
            ZeroSum::Sign(sign) => sign,
            ZeroSum::Majority => majority,
        };
        match (self.elect, self.combine) {
            (Elect::Mass, Combine::Mean) if !self.normalize => Some(Fused::Elected { zero_sign, lambda: self.lambda }),
            _ => None,
        }
    }

    fn sum_of_signs(&self, tile: &Tile<'_>, scratch: &mut [f32]) -> i64 {
        if self.elect(tile, scratch) { kernels::sum_signs(tile.isa, scratch) } else { 0 }
    }
}
