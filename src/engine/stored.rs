//! The short way: blocks merged from stored bytes to stored bytes by one kernel.
//!
//! Open to merges that have such a kernel, where all that is loaded has the output's type, thresholds cut by magnitude
//! alone and no signs come from outside. A block in which anything is not finite is tried again tile by tile, and such a
//! tile goes the long way, which decides what becomes of it.

use super::cut::Cut;
use super::slot::{Loaded, Span};
use super::worker::Worker;
use crate::dtype::Float;
use crate::kernels::{self, Counted, FUSED_MODELS, Fused, Stored};
use crate::method::Inputs;

/// How the blocks of a chunk are merged the short way.
pub(super) struct Short {
    fused: Fused,
    float: Float,
    /// Of each model that has the tensor, the smallest key that survives.
    min_keys: [u32; FUSED_MODELS],
    /// Of each such model, whether entries with that key are counted.
    guesses: [bool; FUSED_MODELS],
}

impl Short {
    /// The short way for `data`, if there is one.
    pub(super) fn of(data: Loaded<'_>, cuts: &[Cut], weights: &[f32], majority: f32) -> Option<Self> {
        let (merge, float, plan) = (data.merge(), data.output(), data.plan);
        let needs = plan.needs();
        let fused = plan.params_of(data.chunk.tensor).merger.fused(weights, majority)?;
        let alike = merge.base.iter().chain(merge.models.iter().map(|(_, piece)| piece));
        let open = merge.oracle.is_none()
            && merge.models.len() <= FUSED_MODELS
            && !needs.rows
            && needs.looks.is_empty()
            && weights.iter().all(|weight| weight.is_finite())
            && alike.into_iter().all(|&piece| data.float(piece) == float);
        if !open {
            return None;
        }
        let (mut min_keys, mut guesses) = ([1; FUSED_MODELS], [false; FUSED_MODELS]);
        if needs.inputs == Inputs::TrimmedTaskVectors {
            for ((key, guess), &(model, _)) in min_keys.iter_mut().zip(&mut guesses).zip(merge.models) {
                let outliers = cuts.get(plan.models() + model as usize).is_some_and(|cut| *cut != Cut::Nothing);
                let min_key = match cuts[model as usize] {
                    Cut::Guess { min_key } => {
                        *guess = true;
                        Some(min_key)
                    }
                    cut => cut.min_key(),
                };
                *key = min_key.filter(|_| !outliers)?;
            }
        }
        Some(Self { fused, float, min_keys, guesses })
    }
}

impl Worker {
    /// Merges a block the short way; false, and no meaning in `encoded`, if it has to go the long way.
    pub(super) fn merge_short(&mut self, span: Span<'_>, short: &Short, encoded: &mut [u8]) -> bool {
        let merge = span.data.merge();
        let count = merge.models.len();
        let mut models = [&[][..]; FUSED_MODELS];
        for (bytes, &(_, piece)) in models.iter_mut().zip(merge.models) {
            *bytes = span.stored(piece).1;
        }
        let stored = Stored {
            float: short.float,
            base: merge.base.map(|piece| span.stored(piece).1),
            models: &models[..count],
            weights: &self.weights,
            min_keys: &short.min_keys[..count],
            counts_ties: short.guesses.contains(&true),
        };
        let [mut kept, mut tied, mut agreeing] = [[0; FUSED_MODELS]; 3];
        let counted = Counted { kept: &mut kept[..count], tied: &mut tied[..count], agreeing: &mut agreeing[..count] };
        let Some(conflicts) = kernels::merge_stored(self.isa, short.fused, &stored, encoded, counted) else {
            return false;
        };
        self.tally.conflicts += conflicts;
        for (place, &(model, _)) in merge.models.iter().enumerate() {
            let model = model as usize;
            self.tally.kept[model] += kept[place];
            self.tally.agreeing[model] += agreeing[place];
            if short.guesses[place] {
                self.tally.tied[model] += tied[place];
            }
        }
        true
    }
}
