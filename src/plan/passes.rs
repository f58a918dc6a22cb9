//! What a run reads and writes, pass by pass.

use super::requests::OfPasses;
use super::spooling::Spooling;
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
        // What is there from earlier passes.
        let (mut spared_vote, mut spared_gather, mut spared_merge) = (0, 0, 0);
        let looks = Self::looks(plan);
        let mut gather = 0;
        for unit in &self.units {
            let all = bytes_of(plan, &unit.tensors, Wanted::All);
            merge += all;
            if unit.kind != UnitKind::Streamed {
                continue;
            }
            let models = plan.searched(&plan.goals(unit));
            if models.contains(&true) {
                let wanted = Wanted::TaskVectors(&models);
                sketch += bytes_of(plan, &unit.tensors, wanted);
                if exact || self.spool.as_ref().is_some_and(Spooling::needs_bounds) {
                    for block in Self::probe_blocks(plan, unit) {
                        probe += chunk_bytes(plan, block, wanted) * self.probe_looks(plan);
                    }
                }
            }
            if plan.votes() {
                vote += all;
            }
            gather += looks * all;
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
        let downloads = OfPasses::of(plan, self);
        let pass = |name, purpose, all: u64, bytes_spared: u64, bytes_written| PassSummary {
            name,
            purpose,
            bytes_read: all - bytes_spared,
            bytes_downloaded: downloads.get(name).bytes,
            requests: downloads.get(name).requests,
            bytes_spared,
            bytes_written,
        };
        let find = match self.probe_looks(plan) {
            1 => "count magnitudes to find the thresholds",
            _ => "count magnitudes to find the thresholds, unless the sample tells them",
        };
        let mut passes = vec![
            pass("probe", "sample magnitudes to bracket the thresholds", probe, 0, 0),
            pass("sketch", find, sketch, 0, 0),
            pass("vote", "count elected signs for the majority", vote, spared_vote, 0),
            pass("gather", "sum up or rank what the method needs of each tensor", gather, spared_gather, 0),
            pass("merge", "merge and write", merge, spared_merge, written),
        ];
        passes.retain(|p| p.bytes_read + p.bytes_spared > 0 || p.name == "merge");
        passes
    }
}

/// Input bytes of `tensors` that a pass loads.
pub fn bytes_of(plan: &Plan, tensors: &[u32], wanted: Wanted<'_>) -> u64 {
    tensors.iter().map(|&t| plan.pieces(t, wanted).map(|p| plan.bytes_used(t, p)).sum::<u64>()).sum()
}

/// Input bytes of `chunk` that a pass loads.
fn chunk_bytes(plan: &Plan, chunk: Chunk, wanted: Wanted<'_>) -> u64 {
    plan.pieces(chunk.tensor, wanted).map(|piece| plan.float_width(piece) * chunk.count).sum()
}
