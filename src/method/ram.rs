//! RAM, Reinforced Agent Merging: entries that one model alone changed are kept whole, shared ones are averaged
//! ("Behavior Knowledge Merge in Reinforced Agentic Models", 2026).
//!
//! With z_t = [|τ_t| > ε] and c = Σ_t z_t: θ = θ0 + Σ_t z_t τ_t / c, and θ0 where c = 0.

use super::described::Described;
use super::{Inputs, Merger, Needs, ParamKind, ParamSpec, Tile};

/// What counts as changed.
pub(super) const EPSILON: ParamSpec = ParamSpec {
    name: "epsilon",
    per_model: false,
    kind: ParamKind::Number { default: 1e-5, min: 0.0, max: f32::MAX as f64 },
    help: "largest magnitude of a task vector's entry that counts as unchanged",
};

/// See the module's documentation.
pub(super) static RAM: Described = Described {
    name: "ram",
    summary: "average each entry over the models that changed it",
    formula: "θ = θ0 + mean{ τ_t : |τ_t| > epsilon }",
    reference: "Behavior Knowledge Merge in Reinforced Agentic Models, 2026",
    params: &[EPSILON],
    prepare: |settings, _| Box::new(RamMerger { epsilon: settings.number("epsilon") as f32 }),
    ..Described::PLAIN
};

struct RamMerger {
    epsilon: f32,
}

impl Merger for RamMerger {
    fn needs(&self) -> Needs {
        Needs::of(Inputs::TaskVectors)
    }

    fn merge(&self, tile: &Tile<'_>, out: &mut [f32], scratch: &mut [f32]) {
        out.fill(0.0);
        scratch.fill(0.0);
        for tau in tile.inputs {
            for ((sum, count), &tau) in out.iter_mut().zip(scratch.iter_mut()).zip(*tau) {
                let changed = tau.abs() > self.epsilon;
                *sum += if changed { tau } else { 0.0 };
                *count += f32::from(u8::from(changed));
            }
        }
        for (sum, count) in out.iter_mut().zip(scratch) {
            *sum = if *count > 0.0 { *sum / *count } else { 0.0 };
        }
    }
}
