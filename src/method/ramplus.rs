//! RAM+ with tensor-level rescaling: RAM that strengthens what one model alone changed
//! ("Behavior Knowledge Merge in Reinforced Agentic Models", 2026).
//!
//! With z_t = [|τ_t| > ε] and c = Σ_t z_t, model t has s_t entries with c > 1 (shared) and q_t with c = 1 (unique) in a
//! tensor, λ_t = 1 + r · min(s_t / max(q_t, ε), α), and θ = θ0 + λ_t τ_t where t alone changed the entry, θ0 + mean{ τ_t :
//! z_t } where several did.

use super::described::Described;
use super::ram::EPSILON;
use super::{Inputs, Look, Merger, Needs, ParamKind, ParamSpec, Subject, Tile};

/// See the module's documentation.
pub(super) static RAMPLUS_TL: Described = Described {
    name: "ramplus_tl",
    summary: "average each entry over the models that changed it, and strengthen what one model alone changed",
    formula: "θ = θ0 + λ_t τ_t if t alone has |τ_t| > epsilon, else θ0 + mean{ τ_t : |τ_t| > epsilon },  λ_t = 1 + r min(shared_t / unique_t, alpha)",
    reference: "Behavior Knowledge Merge in Reinforced Agentic Models, 2026",
    params: &[
        EPSILON,
        ParamSpec {
            name: "r",
            per_model: false,
            kind: ParamKind::Number { default: 0.1, min: f32::MIN as f64, max: f32::MAX as f64 },
            help: "how much unique entries are strengthened per share of shared ones",
        },
        ParamSpec {
            name: "alpha",
            per_model: false,
            kind: ParamKind::Number { default: 0.2, min: 0.0, max: f32::MAX as f64 },
            help: "largest ratio of shared to unique entries that counts",
        },
    ],
    prepare: |settings, _| {
        let number = |name| settings.number(name);
        Box::new(RamPlusMerger { epsilon: number("epsilon"), r: number("r"), alpha: number("alpha") })
    },
    ..Described::PLAIN
};

struct RamPlusMerger {
    epsilon: f64,
    r: f64,
    alpha: f64,
}

impl RamPlusMerger {
    fn changed(&self, tau: f32) -> bool {
        tau.abs() > self.epsilon as f32
    }
}

impl Merger for RamPlusMerger {
    fn needs(&self) -> Needs {
        Needs { looks: &[Look::Sums], ..Needs::of(Inputs::TaskVectors) }
    }

    fn facts(&self, models: usize) -> usize {
        models
    }

    fn sums(&self, _look: usize, models: usize) -> usize {
        2 * models
    }

    /// Shared and unique entries of each model.
    fn add_sums(&self, _look: usize, tile: &Tile<'_>, sums: &mut [f64]) {
        let elements = tile.inputs.first().map_or(0, |input| input.len());
        for at in 0..elements {
            let changed = tile.inputs.iter().filter(|tau| self.changed(tau[at])).count();
            for (tau, counts) in tile.inputs.iter().zip(sums.chunks_exact_mut(2)) {
                if self.changed(tau[at]) {
                    counts[usize::from(changed == 1)] += 1.0;
                }
            }
        }
    }

    fn conclude(&self, _look: usize, _subject: Subject<'_>, found: &[f64]) -> Vec<f64> {
        let scale = |counts: &[f64]| {
            let ratio = counts[0] / counts[1].max(self.epsilon).max(f64::MIN_POSITIVE);
            1.0 + self.r * ratio.min(self.alpha)
        };
        found.chunks_exact(2).map(scale).collect()
    }

    fn merge(&self, tile: &Tile<'_>, out: &mut [f32], _scratch: &mut [f32]) {
        for (at, out) in out.iter_mut().enumerate() {
            let (mut sum, mut count, mut scale) = (0.0, 0u16, 1.0);
            for (tau, fact) in tile.inputs.iter().zip(tile.facts) {
                if self.changed(tau[at]) {
                    sum += tau[at];
                    count += 1;
                    scale = *fact as f32;
                }
            }
            *out = match count {
                0 => 0.0,
                1 => scale * sum,
                count => sum / f32::from(count),
            };
        }
    }
}
