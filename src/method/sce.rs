//! SCE: select, calculate, erase (Wan et al. 2024, "FuseChat", arXiv 2408.07990).
//!
//! For each tensor, over the n task vectors τ_t:
//!
//! - select: of the positions whose variance over the models is not 0, the fraction `select_topk` of largest variance is
//!   kept in all τ_t (all that equal the last one kept too), the rest is zeroed;
//! - calculate: ω_t = mean τ_t² / Σ_s mean τ_s², or 1/n where that sum is at most `uniform_below`;
//! - erase: γ = sgn Σ_t τ_t (+ where it cancels), and A = {t : sgn τ_t = γ}: θ = θ0 + Σ_A ω_t τ_t / max(Σ_A ω_t, 1e-6).

use super::described::Described;
use super::{Inputs, Look, Merger, Needs, ParamKind, ParamSpec, Subject, Tile};
use crate::kernels;

/// See the module's documentation.
pub(super) static SCE: Described = Described {
    name: "sce",
    summary: "keep where the models vary most, weigh each model by its squared change, erase minority signs",
    formula: "θ = θ0 + Σ_A ω_t τ_t / Σ_A ω_t,  A = {t : sgn τ_t = sgn Σ τ},  ω_t ∝ mean τ_t², where the variance is in the top select_topk",
    reference: "Wan et al. 2024, arXiv 2408.07990",
    params: &[
        ParamSpec {
            name: "select_topk",
            per_model: false,
            kind: ParamKind::Number { default: 1.0, min: 0.0, max: 1.0 },
            help: "fraction of positions with any variance that is kept, largest variance first (the paper's τ)",
        },
        ParamSpec {
            name: "uniform_below",
            per_model: false,
            kind: ParamKind::Number { default: 0.0, min: 0.0, max: f32::MAX as f64 },
            help: "sum of the models' mean squares up to which they weigh the same (mergekit: 1e-6)",
        },
    ],
    prepare: |settings, _| {
        Box::new(SceMerger { topk: settings.number("select_topk"), uniform_below: settings.number("uniform_below") })
    },
    ..Described::PLAIN
};

/// Smallest sum of weights that is divided by.
const SMALLEST_SUM: f32 = 1e-6;

struct SceMerger {
    topk: f64,
    uniform_below: f64,
}

impl SceMerger {
    /// Variance of each position over the models, rounded once.
    fn variance(tile: &Tile<'_>, at: usize) -> f32 {
        let n = tile.inputs.len() as f64;
        let mean = tile.inputs.iter().map(|tau| f64::from(tau[at])).sum::<f64>() / n;
        let sum = tile.inputs.iter().map(|tau| (f64::from(tau[at]) - mean).powi(2)).sum::<f64>();
        (sum / n).min(f64::from(f32::MAX)) as f32
    }

    fn selects(&self) -> bool {
        self.topk < 1.0
    }

    /// Whether position `at` is kept; the smallest variance kept is the second fact.
    fn keeps(&self, tile: &Tile<'_>, at: usize) -> bool {
        !self.selects() || f64::from(Self::variance(tile, at)) >= tile.facts[1]
    }
}

impl Merger for SceMerger {
    fn needs(&self) -> Needs {
        let looks: &[Look] = if self.selects() { &[Look::Sums, Look::Ranks, Look::Sums] } else { &[Look::Sums] };
        Needs { looks, ..Needs::of(Inputs::TaskVectors) }
    }

    fn facts(&self, models: usize) -> usize {
        models + if self.selects() { 2 } else { 0 }
    }

    fn sums(&self, look: usize, models: usize) -> usize {
        if self.selects() && look == 0 { 1 } else { models }
    }

    fn add_sums(&self, look: usize, tile: &Tile<'_>, sums: &mut [f64]) {
        let elements = tile.inputs.first().map_or(0, |input| input.len());
        if self.selects() && look == 0 {
            sums[0] += (0..elements).filter(|&at| Self::variance(tile, at) != 0.0).count() as f64;
        } else if self.selects() {
            for at in (0..elements).filter(|&at| self.keeps(tile, at)) {
                sums.iter_mut().zip(tile.inputs).for_each(|(sum, tau)| *sum += f64::from(tau[at]).powi(2));
            }
        } else {
            sums.iter_mut().zip(tile.inputs).for_each(|(sum, tau)| *sum += kernels::dot(tile.isa, tau, tau));
        }
    }

    fn ranks(&self, subject: Subject<'_>) -> Vec<u64> {
        match (subject.facts[0] * self.topk) as u64 {
            0 => Vec::new(),
            rank => vec![rank],
        }
    }

    fn score(&self, tile: &Tile<'_>, out: &mut [f32]) {
        out.iter_mut().enumerate().for_each(|(at, out)| *out = Self::variance(tile, at));
    }

    /// Facts: positions with variance and the smallest variance kept, where positions are selected; then ω.
    fn conclude(&self, look: usize, subject: Subject<'_>, found: &[f64]) -> Vec<f64> {
        match (self.selects(), look) {
            (true, 0) => found.to_vec(),
            // No position is selected: none reaches infinity.
            (true, 1) => vec![found.first().copied().unwrap_or(f64::INFINITY)],
            _ => {
                let n = found.len() as f64;
                let means: Vec<f64> = found.iter().map(|sum| sum / subject.elements as f64).collect();
                let sum: f64 = means.iter().sum();
                means.iter().map(|mean| if sum <= self.uniform_below { 1.0 / n } else { mean / sum }).collect()
            }
        }
    }

    fn merge(&self, tile: &Tile<'_>, out: &mut [f32], _scratch: &mut [f32]) {
        let weights = &tile.facts[if self.selects() { 2 } else { 0 }..];
        for (at, out) in out.iter_mut().enumerate() {
            *out = 0.0;
            if !self.keeps(tile, at) {
                continue;
            }
            let positive = tile.inputs.iter().map(|tau| tau[at]).sum::<f32>() >= 0.0;
            let (mut sum, mut divisor) = (0.0, 0.0);
            for (tau, &weight) in tile.inputs.iter().zip(weights) {
                let agrees = if positive { tau[at] > 0.0 } else { tau[at] < 0.0 };
                if agrees {
                    sum += weight as f32 * tau[at];
                    divisor += weight as f32;
                }
            }
            *out = sum / divisor.max(SMALLEST_SUM);
        }
    }
}
