//! What a run holds beside tensor data, in bytes: names and plan entries, hashes of the output, the journal, side files.
//!
//! Counted from the plan, so that the memory sum holds for many tensors as for large ones. Each figure is an upper bound
//! of what is held at once, allocator's needs included; `tests/memory.rs` compares the sum with what is used.

use super::{Action, Plan, PlannedTensor};
use crate::checkpoint::{Checkpoint, TensorEntry};
use crate::limits::{FOUND_BYTES, HASH_LEAF_BYTES, RECORD_BYTES};

/// What the allocator adds to an allocation.
const ALLOCATION_BYTES: u64 = 16;
/// An entry of a sorted or hashed map with what its nodes or buckets leave empty, beside key and value.
const MAP_ENTRY_BYTES: u64 = 32;
/// One subtree's value in a map that may be half empty: place, length, 32 bytes.
const SUBTREE_BYTES: u64 = 2 * (8 + 8 + 32) + MAP_ENTRY_BYTES;
/// Part of a plan's making, per tensor: its layout, and the index.
const PLACED_BYTES: u64 = 200;
/// A parsed JSON document's size in terms of its text: numbers of one digit are the worst.
const PARSED_SHARE: u64 = 40;
/// A file of an input: its name, identity and hash, in the catalogue, the journal's first record and the manifest.
const FILE_BYTES: u64 = 2_000;

/// A tensor's line in the manifest, but for its name.
const LISTED_TENSOR_BYTES: u64 = 80;

/// What the catalogues of all checkpoints and the plan itself hold, and what making them takes.
pub(super) fn catalogue_bytes(plan: &Plan) -> u64 {
    let entry =
        |name: &str, rank: usize, size: usize| size as u64 + name.len() as u64 + rank as u64 * 8 + 2 * ALLOCATION_BYTES;
    let stored = |t: &TensorEntry| entry(&t.name, t.shape.len(), size_of::<TensorEntry>());
    let catalogues: u64 = plan.checkpoints.iter().flat_map(|c| &c.tensors).map(stored).sum();
    // While inputs are joined, each tensor has a list of its sources; afterwards, of its pieces.
    let models = plan.models() as u64;
    let joined = 2 * ALLOCATION_BYTES + models * (40 + 12) + 160;
    let planned = |t: &PlannedTensor| {
        entry(&t.name, t.shape.len(), size_of::<PlannedTensor>()) + joined + PLACED_BYTES + t.name.len() as u64
    };
    let planned: u64 = plan.tensors.iter().map(planned).sum();
    // While a checkpoint is opened, its list grows to up to twice its length; the header of a file is held for as long as
    // it is parsed, and so is an index.
    let longest = plan.checkpoints.iter().map(|c| c.tensors.len()).max().unwrap_or(0);
    let growing = (longest * size_of::<TensorEntry>()) as u64;
    let files = || plan.checkpoints.iter().flat_map(|c| &c.files);
    let header = files().map(|f| f.header_bytes).max().unwrap_or(0);
    let listed = |c: &Checkpoint| -> u64 {
        let line = |t: &TensorEntry| 2 * t.name.len() as u64 + 120;
        if c.files.len() > 1 { c.tensors.iter().map(line).sum() } else { 0 }
    };
    let index_read = plan.checkpoints.iter().map(listed).max().unwrap_or(0);
    let headers: u64 = plan.layout.shards.iter().map(|s| s.header.len() as u64 + FILE_BYTES).sum();
    let index = plan.layout.index_json().map_or(0, str::len) as u64;
    let rows = plan.tokenizer.as_ref().map_or(0, |tokenizer| tokenizer.held_bytes);
    let derived: u64 = plan.checkpoints.iter().map(|c| c.derived.held_bytes).sum();
    let params = plan.params.len() as u64 * (models + 4) * 400;
    catalogues
        + planned
        + growing
        + header
        + index_read
        + headers
        + 2 * index
        + rows
        + derived
        + params
        + files().map(|f| FILE_BYTES + f.file.held_bytes()).sum::<u64>()
}

/// What a run keeps account of: hashes of the output, what is done, what of an earlier attempt is taken over, and side
/// files that are changed.
pub(super) fn account_bytes(plan: &Plan, units: u64) -> u64 {
    let subtrees: u64 = plan.layout.tensors.iter().map(|t| subtrees(t.offset, t.offset + t.bytes)).sum();
    // What is done but not recorded yet, as entries, as a record and compressed.
    let journal = 5 * RECORD_BYTES as u64;
    let (models, searches) = (plan.models() as u64, (plan.models() * plan.bounds()) as u64);
    let unit = MAP_ENTRY_BYTES + 4 * ALLOCATION_BYTES + 80 + searches * FOUND_BYTES as u64;
    let merged = plan.tensors.iter().filter(|t| matches!(t.action, Action::Merge { .. })).count() as u64;
    // Per tensor: its ranges that are done, survivors, and ties before and in it.
    let ranges = 2 * MAP_ENTRY_BYTES + 4 * ALLOCATION_BYTES + 120 + 8 * (models + 2 * searches);
    let side_files = plan.parsed_bytes * PARSED_SHARE;
    // What looks found, as it is kept and as an earlier attempt's.
    let facts: u64 = (0..plan.tensors.len() as u32).map(|t| 2 * 8 * plan.facts(t) as u64).sum();
    // Per tensor: its checksum, and its line of the manifest while that grows.
    let listed: u64 = plan.tensors.iter().map(|t| 8 + 2 * (t.name.len() as u64 + LISTED_TENSOR_BYTES)).sum();
    // Those of the file, and those of the chunks that are written to.
    listed + 2 * subtrees * SUBTREE_BYTES + journal + units * unit + merged * ranges + side_files + facts
}

/// How many values of subtrees the hash of a file needs for bytes `start` to `end`: whole leaves, joined as far as their
/// places allow, and what is ragged at the file's end.
fn subtrees(start: u64, end: u64) -> u64 {
    let (mut leaf, end) = (start.div_ceil(HASH_LEAF_BYTES), end / HASH_LEAF_BYTES);
    let mut count = 1;
    while leaf < end {
        let aligned = if leaf == 0 { u64::MAX } else { 1 << leaf.trailing_zeros() };
        leaf += aligned.min(1 << (end - leaf).ilog2());
        count += 1;
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subtrees_are_few_wherever_a_tensor_lies() {
        assert_eq!(subtrees(0, HASH_LEAF_BYTES), 2);
        assert_eq!(subtrees(0, HASH_LEAF_BYTES << 20), 2);
        assert_eq!(subtrees(1, 100), 1);
        // One leaf up to an even place, two up to a multiple of four, and so on; then back.
        assert_eq!(subtrees(HASH_LEAF_BYTES - 8, 8 * HASH_LEAF_BYTES + 8), 1 + 3);
        assert_eq!(subtrees(1, (1 << 40) - 1), 1 + 2 * 25);
    }
}
