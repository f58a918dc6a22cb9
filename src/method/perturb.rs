//! Perturb: the signs of one task vector's largest or smallest entries flipped at random (TIES-Merging, arXiv 2306.01708,
//! section 7.2 and Figure 7).
//!
//! - θ = θ0 + τ', where τ'_i = −τ_i with probability p for each entry i of the side chosen, by a draw of its own, and τ_i
//!   otherwise.
//! - `top`: the entries at or above the threshold of the density; `bottom`: those below it.
//!
//! A method of the command `perturb`, not one to merge with: it is in no list.

use super::described::Described;
use super::sparse::per_model;
use super::{Inputs, Merger, Needs, ParamKind, ParamSpec, Settings, Sparsify, Tile};

/// See the module's documentation.
pub(super) static PERTURB: Described = Described {
    name: "perturb",
    summary: "flip the signs of a task vector's largest or smallest entries at random",
    formula: "θ = θ0 + τ',  τ'_i = −τ_i with probability p on the side chosen, else τ_i",
    reference: "Yadav et al. 2023, arXiv 2306.01708, Figure 7",
    params: &[
        ParamSpec {
            name: "density",
            per_model: true,
            kind: ParamKind::Number { default: 0.2, min: 0.0, max: 1.0 },
            help: "fraction of the entries that are the largest",
        },
        ParamSpec {
            name: "probability",
            per_model: false,
            kind: ParamKind::Number { default: 1.0, min: 0.0, max: 1.0 },
            help: "probability with which the sign of an entry of the side chosen is flipped",
        },
        ParamSpec {
            name: "side",
            per_model: false,
            kind: ParamKind::Choice(&["top", "bottom"]),
            help: "flip among the largest entries, or among the others",
        },
    ],
    trims: true,
    models: (1, 1),
    prepare,
    ..Described::PLAIN
};

fn prepare(settings: &Settings, _base: bool) -> Box<dyn Merger> {
    // Declared per model because the trim's density is.
    debug_assert_eq!(per_model(settings, "density").len(), 1);
    let (below, probability) = (settings.word("side") == "bottom", settings.number("probability"));
    Box::new(Perturbed(Sparsify::Flip { below, probability }))
}

struct Perturbed(Sparsify);

impl Merger for Perturbed {
    fn needs(&self) -> Needs {
        Needs::of(Inputs::TrimmedTaskVectors)
    }

    fn sparsify(&self, _model: usize) -> Sparsify {
        self.0
    }

    fn merge(&self, tile: &Tile<'_>, out: &mut [f32], _scratch: &mut [f32]) {
        out.copy_from_slice(tile.inputs[0]);
    }
}
