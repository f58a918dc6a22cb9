//! NearSwap: take over the model's entries where they hardly differ from base's (alchemonaut, QuartetAnemoi-70B, 2024).
//!
//! With τ = θ_1 − θ0 and w = min(t / |τ|, 1): θ = w θ_1 + (1 − w) θ0 = θ0 + w τ. Differences up to t are taken over;
//! larger ones move base by t.

use super::described::Described;
use super::{Inputs, Merger, Needs, ParamKind, ParamSpec, Tile};

/// See the module's documentation.
pub(super) static NEARSWAP: Described = Described {
    name: "nearswap",
    summary: "take over the model's entries where they hardly differ from base's, move base by t elsewhere",
    formula: "θ = w θ_1 + (1 − w) θ0,  w = min(t / |θ_1 − θ0|, 1)",
    reference: "alchemonaut 2024, huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    params: &[ParamSpec {
        name: "t",
        per_model: false,
        kind: ParamKind::Number { default: 1e-4, min: 0.0, max: f32::MAX as f64 },
        help: "largest difference that is taken over whole",
    }],
    models: (1, 1),
    prepare: |settings, _| Box::new(NearswapMerger { t: settings.number("t") as f32 }),
    ..Described::PLAIN
};

struct NearswapMerger {
    t: f32,
}

/// Smallest difference that is divided by: as in the authors' code.
const FLOOR: f32 = 1e-6;

impl Merger for NearswapMerger {
    fn needs(&self) -> Needs {
        Needs::of(Inputs::TaskVectors)
    }

    fn merge(&self, tile: &Tile<'_>, out: &mut [f32], _scratch: &mut [f32]) {
        for (out, tau) in out.iter_mut().zip(tile.inputs[0]) {
            let weight = (self.t / tau.abs().max(FLOOR)).min(1.0);
            *out = weight * tau;
        }
    }
}
