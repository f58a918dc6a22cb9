//! What a finished part leaves for whoever publishes: hashes and checksums of its shards, and its share of the report.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::super::kept::Kept;
use super::super::output::OutputDir;
use super::super::passes::Passes;
use super::super::select::{Thresholds, UnitThresholds};
use super::super::shards::{SealedShard, Written};
use super::super::tensor_crc::Crc;
use super::super::worker::Tally;
use super::Part;
use super::board::Board;
use crate::error::{Error, Result};
use crate::kernels::Ties;
use crate::plan::{Plan, Schedule, Unit};
use crate::sketch::Threshold;

/// See the module's documentation.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct PartDone {
    /// Index of the first shard.
    first: usize,
    /// (bytes, BLAKE3) of each shard.
    shards: Vec<(u64, String)>,
    /// Checksum of each tensor in them, with its index.
    tensors: Vec<(u32, Crc)>,
    pub kept: Vec<u64>,
    pub agreeing: Vec<u64>,
    pub conflicts: u64,
    pub merged: u64,
    pub bytes_read: u64,
    pub differing: BTreeSet<u32>,
    /// Per model: survivors of the unit that all parts share.
    pub unit_kept: Vec<u64>,
    /// Per model: survivors at least and at most, of units of the part's own.
    pub survivors: Vec<[u64; 2]>,
    listed: Vec<(u32, Vec<Option<[u64; 5]>>)>,
    pub reused: u64,
    pub threads: usize,
}

impl PartDone {
    pub(super) fn new(plan: &Plan, schedule: &Schedule) -> Self {
        Self { unit_kept: vec![0; plan.models()], threads: schedule.threads, ..Self::default() }
    }

    /// What the passes counted.
    pub(super) fn take(&mut self, passes: &mut Passes<'_>, kept: &Kept) {
        let Tally { kept: survivors, agreeing, conflicts, merged, bytes_read, .. } = passes.tally();
        self.agreeing = agreeing;
        (self.kept, self.conflicts, self.merged, self.bytes_read) = (survivors, conflicts, merged, bytes_read);
        self.differing = std::mem::take(&mut passes.differing);
        self.reused = kept.ranges;
        let Thresholds { survivors, listed, .. } = std::mem::take(&mut passes.thresholds);
        self.survivors = survivors;
        self.listed = listed.into_iter().map(|unit| (unit.tensor, unit.found.iter().map(numbers).collect())).collect();
    }

    /// Survivors of a unit that other parts have more of, counted since `before`.
    pub(super) fn survivors_of_unit(&mut self, unit: &Unit, passes: &Passes<'_>, before: &[u64]) {
        let now = passes.tally().kept;
        self.unit_kept = now.iter().zip(before).map(|(now, before)| now - before).collect();
        passes.kept.add_survivors(&unit.tensors, &mut self.unit_kept);
    }

    /// What was written to the shards `own`.
    pub(super) fn seal(&mut self, plan: &Plan, own: Range<usize>, written: Written) {
        let crcs = plan.layout.tensors.iter().zip(written.tensors).zip(0..);
        let mine = crcs.filter(|((place, _), _)| own.contains(&(place.shard as usize)));
        self.tensors = mine.map(|((_, crc), tensor)| (tensor, crc)).collect();
        self.first = own.start;
        self.shards = written.shards.into_iter().map(|shard| (shard.bytes, shard.hash)).collect();
    }

    /// What all `parts` wrote.
    pub(super) fn written(plan: &Plan, parts: &[Self]) -> Written {
        let mut tensors = vec![0; plan.tensors.len()];
        for &(tensor, crc) in parts.iter().flat_map(|part| &part.tensors) {
            if let Some(known) = tensors.get_mut(tensor as usize) {
                *known = crc;
            }
        }
        Written { shards: parts.iter().flat_map(Self::shards).map(|(_, shard)| shard).collect(), tensors }
    }

    /// The thresholds of units of the part's own.
    pub(super) fn thresholds(&self) -> impl Iterator<Item = UnitThresholds> + '_ {
        let unit = |(tensor, found): &(u32, Vec<Option<[u64; 5]>>)| UnitThresholds {
            tensor: *tensor,
            found: found.iter().map(|numbers| numbers.map(threshold)).collect(),
        };
        self.listed.iter().map(unit)
    }

    /// The shards, by index.
    pub(super) fn shards(&self) -> impl Iterator<Item = (usize, SealedShard)> + '_ {
        let sealed = |(bytes, hash): &(u64, String)| SealedShard { bytes: *bytes, hash: hash.clone() };
        self.shards.iter().enumerate().map(move |(at, shard)| (self.first + at, sealed(shard)))
    }

    /// Whether it is of `part`: a file can be copied to another's place.
    fn is_of(&self, plan: &Plan, part: Part) -> bool {
        let own = plan.shares(part.count)[part.index].clone();
        let tensors = (0..plan.tensors.len() as u32).filter(|&tensor| plan.is_within(tensor, &own));
        self.first == own.start
            && self.shards.len() == own.len()
            && self.tensors.iter().map(|(tensor, _)| *tensor).eq(tensors)
    }

    /// Where the shards are that can be read again: those that were handed over need not be here.
    pub(super) fn files(&self, plan: &Plan, dir: &OutputDir) -> Result<Vec<(PathBuf, SealedShard)>> {
        let mut files = Vec::new();
        for (index, sealed) in self.shards() {
            let Some(planned) = plan.layout.shards.get(index) else { continue };
            files.extend(dir.path_of(&planned.name)?.map(|path| (path, sealed)));
        }
        Ok(files)
    }

    /// Whether all its shards are in the directory.
    pub(super) fn is_there(&self, plan: &Plan, dir: &OutputDir) -> Result<bool> {
        for (index, sealed) in self.shards() {
            let Some(planned) = plan.layout.shards.get(index) else { return Ok(false) };
            if sealed.bytes != planned.bytes || !dir.has_shard(&planned.name, planned.bytes)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub(super) fn write(&self, board: &Board, part: Part) -> Result<()> {
        let json = serde_json::to_vec(self).map_err(|e| Error::failed(format!("what the part did as JSON: {e}")))?;
        board.write(&part.file("done"), &json)
    }

    /// What `part` left, if it is done. What is damaged, or of another part, is as good as nothing: the part is done again.
    pub(super) fn read(plan: &Plan, board: &Board, part: Part) -> Result<Option<Self>> {
        let Some(Ok(bytes)) = board.look(&part.file("done"))? else { return Ok(None) };
        Ok(serde_json::from_slice(&bytes).ok().filter(|done: &Self| done.is_of(plan, part)))
    }
}

fn numbers(found: &Option<(Threshold, u64)>) -> Option<[u64; 5]> {
    found.map(|(Threshold { ties, above, tied }, elements)| {
        [u64::from(ties.low), u64::from(ties.high), above, tied, elements]
    })
}

fn threshold([low, high, above, tied, elements]: [u64; 5]) -> (Threshold, u64) {
    (Threshold { ties: Ties { low: low as u32, high: high as u32 }, above, tied }, elements)
}
