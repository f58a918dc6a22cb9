//! What a run reads and writes, pass by pass.

use super::requests::OfPasses;
use super::spooling::{Spooling, remote_bytes_of};
use super::{Chunk, PassSummary, Plan, Schedule, ThresholdKind, UnitKind, Wanted};
use crate::method::Look;

impl Schedule {
    /// How often all of a unit is read for what the method needs of it.
    pub(super) fn looks(plan: &Plan) -> u64 {
        // Ranks are bracketed by one look and found by a second, at the latest.
        let reads = |look: &Look| if *look == Look::Ranks { 2 } else { 1 };
        plan.needs().looks.iter().map(reads).sum()
    }

    pub(super) fn passes(&self, plan: &Plan) -> Vec<PassSummary> {
        let exact = plan.trim.as_ref().is_some_and(|t| t.threshold == ThresholdKind::Exact);
        let (mut probe, mut sketch, mut vote, mut merge) = (0, 0, 0, bytes_of(plan, &self.direct, Wanted::All));
        // Of those, what comes over a network.
        let (mut far_probe, mut far_sketch, mut far) = (0, 0, remote_bytes_of(plan, &self.direct, Wanted::All));
        let (mut far_vote, mut far_gather) = (0, 0);
        // What is there from earlier passes.
        let (mut spared_vote, mut spared_gather, mut spared_merge) = (0, 0, 0);
        let looks = Self::looks(plan);
        let mut gather = 0;
        for unit in &self.units {
            let all = bytes_of(plan, &unit.tensors, Wanted::All);
            let far_all = remote_bytes_of(plan, &unit.tensors, Wanted::All);
            merge += all;
            far += far_all;
            if unit.kind != UnitKind::Streamed {
                continue;
            }
            let models = plan.searched(&plan.goals(unit));
            if models.contains(&true) {
                let wanted = Wanted::TaskVectors(&models);
                sketch += bytes_of(plan, &unit.tensors, wanted);
                far_sketch += remote_bytes_of(plan, &unit.tensors, wanted);
                if exact || self.spool.as_ref().is_some_and(Spooling::needs_bounds) {
                    for block in Self::probe_blocks(plan, unit) {
                        let [near, far] = chunk_bytes(plan, block, wanted).map(|bytes| bytes * self.probe_looks(plan));
                        (probe, far_probe) = (probe + near + far, far_probe + far);
                    }
                }
            }
            if plan.votes() {
                (vote, far_vote) = (vote + all, far_vote + far_all);
            }
            (gather, far_gather) = (gather + looks * all, far_gather + looks * far_all);
            if let Some(spool) = &self.spool {
                spared_merge += spool.spared(plan, &unit.tensors, false);
                spared_vote += if plan.votes() { spool.spared(plan, &unit.tensors, looks == 0) } else { 0 };
                if looks > 0 {
                    spared_gather += spool.spared(plan, &unit.tensors, true);
                    spared_gather += (looks - 1) * spool.spared(plan, &unit.tensors, false);
                }
            }
        }
        let written = plan.layout.shards.iter().map(|s| s.bytes).sum();
        let requests = OfPasses::of(plan, self);
        let pass = |name, purpose, all: u64, far: u64, bytes_spared: u64, bytes_written| PassSummary {
            name,
            purpose,
            bytes_read: all - bytes_spared,
            bytes_downloaded: far - bytes_spared,
            requests: requests.get(name),
            bytes_spared,
            bytes_written,
        };
        let find = match self.probe_looks(plan) {
            1 => "count magnitudes to find the thresholds",
            _ => "count magnitudes to find the thresholds, unless the sample tells them",
        };
        let mut passes = vec![
            pass("probe", "sample magnitudes to bracket the thresholds", probe, far_probe, 0, 0),
            pass("sketch", find, sketch, far_sketch, 0, 0),
            pass("vote", "count elected signs for the majority", vote, far_vote, spared_vote, 0),
            pass("gather", "sum up or rank what the method needs of each tensor", gather, far_gather, spared_gather, 0),
            pass("merge", "merge and write", merge, far, spared_merge, written),
        ];
        passes.retain(|p| p.bytes_read + p.bytes_spared > 0 || p.name == "merge");
        passes
    }
}

/// Input bytes of `tensors` that a pass loads.
pub fn bytes_of(plan: &Plan, tensors: &[u32], wanted: Wanted<'_>) -> u64 {
    tensors.iter().map(|&t| plan.pieces(t, wanted).map(|p| plan.bytes_used(t, p)).sum::<u64>()).sum()
}

/// Input bytes of `chunk` that a pass loads: of files on this machine, and over a network.
fn chunk_bytes(plan: &Plan, chunk: Chunk, wanted: Wanted<'_>) -> [u64; 2] {
    let mut bytes = [0; 2];
    for piece in plan.pieces(chunk.tensor, wanted) {
        let far = plan.checkpoints[piece.checkpoint as usize].is_remote();
        bytes[usize::from(far)] += plan.float_width(piece) * chunk.count;
    }
    bytes
}
