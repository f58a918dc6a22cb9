//! How long the files of parts can be: whatever is longer is damaged, and not read.

use crate::limits::SKETCH_BINS_MIN;
use crate::plan::Plan;

/// Room for what has no size of its own: heads, field names, braces.
const SPARE_BYTES: u64 = 1 << 16;
/// A sketch of one threshold's magnitudes, beside its bins.
const SKETCH_HEAD_BYTES: u64 = 256;
/// One bin, where compression does not help.
const BIN_BYTES: u64 = 8;
/// A number in JSON, with what separates it from the next.
const NUMBER_BYTES: u64 = 24;

/// What is under way to a count of ties.
const TIES_ON_THE_WAY: &str = "on-the-way-ties-";

/// Bounds that follow from a plan.
pub(super) struct Lengths {
    /// Thresholds that can be sought: one or two per model.
    goals: u64,
    tensors: u64,
    shards: u64,
    bins: u64,
}

impl Lengths {
    /// For the files about `plan`, whose sketches have `bins` bins.
    pub(super) fn of(plan: &Plan, bins: usize) -> Self {
        Self {
            goals: 2 * plan.models() as u64,
            tensors: plan.tensors.len() as u64,
            shards: plan.layout.shards.len() as u64,
            bins: bins.max(SKETCH_BINS_MIN) as u64,
        }
    }

    /// The most bytes that file `name` can have.
    pub(super) fn longest(&self, name: &str) -> u64 {
        let Self { goals, tensors, shards, bins } = *self;
        let content = match name.split('-').next().unwrap_or_default() {
            "job" | "vote" => 0,
            "thresholds" => goals * 64,
            "ties" => tensors * (4 + 8 * goals),
            // What is known of all tensors and shards as JSON; per threshold of a tensor's own, five numbers.
            "done" => tensors * NUMBER_BYTES * (4 + 5 * goals) + shards * 128 + goals * 8 * NUMBER_BYTES,
            // As votes: which tensor, no sum, and a list.
            _ if name.starts_with(TIES_ON_THE_WAY) => tensors * (28 + 8 * goals),
            // Sketches, and what is under way to them. A bracket can take twice the bins.
            _ => goals * (2 * bins * BIN_BYTES + SKETCH_HEAD_BYTES) + tensors * (4 + 8 * goals),
        };
        SPARE_BYTES + content
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::records::{self, Entry};
    use super::super::super::under_way::{Step, Votes, VotesDone};
    use super::*;

    #[test]
    fn ties_of_very_many_tensors_under_way_can_be_read_again() {
        let lengths = Lengths { goals: 2, tensors: 200_000, shards: 1, bins: SKETCH_BINS_MIN as u64 };
        let counted = |tensor: u32| Votes { of: u128::from(tensor).to_le_bytes(), sum: 0, ties: vec![u64::MAX; 2] };
        let votes = (0..200_000).map(counted).collect();
        let step = VotesDone { tensor: 0, of: [0; 16], elements: 1, bytes_read: 1, votes };
        let bytes = records::encode(&[Entry::Step(Step::Votes(step))]);
        assert!(bytes.len() as u64 <= lengths.longest("on-the-way-ties-00001-of-00002"), "{} bytes", bytes.len());
        assert!(records::decode(&bytes).is_some());
    }
}
