//! Merges that differ only in the factor that they end with: worked out once, multiplied for each.
//!
//! - What is held is the merged task vector of one chunk in f32, before the factor, and what was counted for it.
//! - An output's bytes and counts are those of a merge of its own. Where that is not certain (something is not finite, the
//!   factor is not above zero, or something vanishes under it), nothing is held, and each merges for itself.

use super::cut::{Cut, TieCounts};
use super::slot::{Loaded, Span};
use super::worker::{Known, Sink, Tally, Worker};
use crate::error::Result;
use crate::kernels;
use crate::limits::CHUNK_ELEMENTS;
use crate::method::Merger;

/// The key of an infinity; NaN are above it.
const INFINITY: u32 = f32::INFINITY.to_bits();

/// Memory that a chunk held takes at most, in bytes: longer ones, of units that are not streamed, are not held.
pub(super) const HELD_BYTES: u64 = CHUNK_ELEMENTS * size_of::<f32>() as u64;

/// A chunk's merged task vector before it is multiplied by λ.
#[derive(Default)]
pub(super) struct Unscaled {
    /// Which merges it is of, if it is of any.
    pub of: Option<usize>,
    tau: Vec<f32>,
    counted: Tally,
    /// The least magnitude in it that is not zero; `None` if each is to merge for itself.
    least: Option<f32>,
}

impl Worker {
    /// Works out what the merges number `of` of the chunk have in common; like [`Worker::merge`] otherwise. Nothing counts as
    /// done.
    pub(super) fn hold_unscaled(
        &mut self,
        of: usize,
        data: Loaded<'_>,
        cuts: &[Cut],
        seen: &TieCounts,
        known: &Known,
    ) -> Result<()> {
        let merger = &data.plan.params_of(data.chunk.tensor).merger;
        let mut held = std::mem::take(&mut self.unscaled);
        (held.of, held.least) = (Some(of), None);
        if merger.lambda().is_some() && data.chunk.count <= CHUNK_ELEMENTS && data.merge().base.is_some() {
            let before = self.tally.clone();
            let found = self.unscaled_into(&mut held.tau, data, cuts, seen, known);
            let after = std::mem::replace(&mut self.tally, before);
            held.least = match found {
                Ok(least) => least,
                Err(error) => {
                    self.unscaled = held;
                    return Err(error);
                }
            };
            held.counted = after.since(&self.tally);
        }
        self.unscaled = held;
        Ok(())
    }

    /// The least magnitude that is not zero, if all of the chunk is finite.
    fn unscaled_into(
        &mut self,
        tau: &mut Vec<f32>,
        data: Loaded<'_>,
        cuts: &[Cut],
        seen: &TieCounts,
        known: &Known,
    ) -> Result<Option<f32>> {
        self.set_weights(data);
        self.set_scales(data, &known.facts);
        let mut seen = seen.clone();
        let mut least = INFINITY;
        tau.clear();
        for span in data.tiles() {
            let clean = self.load_inputs(span, cuts, &mut seen)?;
            self.combine(span, known, Merger::unscaled);
            let merged = &self.tiles.out[..span.length];
            let (smallest, greatest) = kernels::key_range(self.isa, merged);
            if !clean || greatest >= INFINITY {
                return Ok(None);
            }
            least = if smallest > 0 { least.min(smallest) } else { least };
            tau.extend_from_slice(merged);
        }
        Ok(Some(f32::from_bits(least)))
    }

    /// Finishes a merge of the chunk from what is held; false if it has to be merged for itself.
    pub(super) fn merge_held(&mut self, data: Loaded<'_>, sink: Sink<'_>) -> Result<bool> {
        let held = std::mem::take(&mut self.unscaled);
        let lambda = data.plan.params_of(data.chunk.tensor).merger.lambda().unwrap_or(0.0);
        let exact = held.least.is_some_and(|least| lambda > 0.0 && lambda.is_finite() && least * lambda > 0.0);
        let result = if exact { self.scale_held(&held.tau, lambda, data, sink) } else { Ok(()) };
        if exact {
            self.tally.add(&held.counted);
            self.tally.merged += data.chunk.count;
        }
        self.unscaled = held;
        result.map(|()| exact)
    }

    fn scale_held(&mut self, tau: &[f32], lambda: f32, data: Loaded<'_>, sink: Sink<'_>) -> Result<()> {
        let float = data.output();
        let base = data.merge().base.filter(|piece| data.float(*piece) == float);
        let at_once = |worker: &mut Self, span: Span<'_>, encoded: &mut [u8]| {
            let tau = &tau[span.from..span.from + span.length];
            base.is_some_and(|piece| {
                kernels::store_scaled(worker.isa, float, span.stored(piece).1, tau, lambda, encoded)
            })
        };
        self.in_blocks(data, sink, at_once, |worker, span, encoded| {
            worker.load_base(span);
            let out = &mut worker.tiles.out[..span.length];
            out.copy_from_slice(&tau[span.from..span.from + span.length]);
            kernels::scale(worker.isa, out, lambda);
            worker.finish(span, true, encoded)
        })
    }
}
