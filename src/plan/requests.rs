//! How many requests the passes of a merge take for inputs that come over a network.
//!
//! - What touches in a file is one range, and comes in requests of the length that there is memory for.
//! - A file's first bytes came when it was opened, and are not asked for again.
//! - The number is what there is to ask for. A reader that is faster than the network asks for less at a time; faults and
//!   renewed addresses come on top.

use super::{Chunk, Piece, Plan, Schedule, ThresholdKind, Unit, UnitKind, Wanted};
use crate::storage::{HEAD_BYTES, request_bytes};

/// Ranges of inputs on a network, in the order in which a pass asks for them.
pub(super) struct Requests<'a> {
    plan: &'a Plan,
    /// Longest request.
    length: u64,
    /// Per checkpoint, the range that may go on: file, first byte, end.
    open: Vec<(u32, u64, u64)>,
    count: u64,
}

impl<'a> Requests<'a> {
    /// None yet, where `ahead_bytes` are held of what is fetched ahead.
    pub(super) fn new(plan: &'a Plan, ahead_bytes: u64) -> Self {
        let sources = plan.checkpoints.iter().filter(|checkpoint| checkpoint.is_remote()).count();
        Self {
            plan,
            length: request_bytes(ahead_bytes, sources),
            open: vec![(0, 0, 0); plan.checkpoints.len()],
            count: 0,
        }
    }

    /// Asks for `piece` of tensor `index`.
    pub(super) fn tensor(&mut self, index: u32, piece: Piece) {
        self.range(piece, 0, self.plan.bytes_used(index, piece));
    }

    /// Asks for the elements of `chunk` in `piece`.
    pub(super) fn chunk(&mut self, chunk: Chunk, piece: Piece) {
        let width = self.plan.float_width(piece);
        self.range(piece, chunk.start * width, chunk.count * width);
    }

    fn range(&mut self, piece: Piece, from: u64, bytes: u64) {
        let checkpoint = piece.checkpoint as usize;
        if !self.plan.checkpoints[checkpoint].is_remote() {
            return;
        }
        let entry = self.plan.source(piece).0;
        let end = entry.offset + from + bytes;
        let first = (entry.offset + from).max(HEAD_BYTES);
        if first >= end {
            return;
        }
        let (file, _, reached) = self.open[checkpoint];
        if (file, reached) == (entry.file, first) {
            self.open[checkpoint].2 = end;
            return;
        }
        self.close(checkpoint);
        self.open[checkpoint] = (entry.file, first, end);
    }

    fn close(&mut self, checkpoint: usize) {
        let (_, first, end) = self.open[checkpoint];
        self.count += (end - first).div_ceil(self.length);
    }

    /// How many they are.
    pub(super) fn count(mut self) -> u64 {
        (0..self.open.len()).for_each(|checkpoint| self.close(checkpoint));
        self.count
    }
}

/// Requests of each pass; see [`super::PassSummary`].
#[derive(Debug, Default)]
pub(super) struct OfPasses {
    probe: u64,
    sketch: u64,
    vote: u64,
    gather: u64,
    merge: u64,
}

impl OfPasses {
    /// Those of a run of `plan` as `schedule` cuts it.
    pub(super) fn of(plan: &Plan, schedule: &Schedule) -> Self {
        let mut all = Self::default();
        if !plan.is_remote() {
            return all;
        }
        let mut merge = Requests::new(plan, schedule.ahead_bytes);
        for unit in &schedule.units {
            let streamed = unit.kind == UnitKind::Streamed;
            for &tensor in &unit.tensors {
                plan.pieces(tensor, Wanted::All)
                    .filter(|&piece| !(streamed && spares(plan, schedule, (tensor, piece), false)))
                    .for_each(|piece| merge.tensor(tensor, piece));
            }
            if streamed {
                all.add_searches(plan, schedule, unit);
            }
        }
        for &tensor in &schedule.direct {
            plan.pieces(tensor, Wanted::All).for_each(|piece| merge.tensor(tensor, piece));
        }
        all.merge = merge.count();
        all
    }

    /// What comes before the merge of a unit that is read more than once.
    fn add_searches(&mut self, plan: &Plan, schedule: &Schedule, unit: &Unit) {
        let none = || Requests::new(plan, schedule.ahead_bytes);
        // `first` says whether a pass is the first after the sketch pass, or a later one.
        let over = |wanted: Wanted<'_>, first: Option<bool>| {
            let mut pass = none();
            for &tensor in &unit.tensors {
                let there = |piece| first.is_some_and(|first| spares(plan, schedule, (tensor, piece), first));
                let left = plan.pieces(tensor, wanted).filter(|&piece| !there(piece));
                left.for_each(|piece| pass.tensor(tensor, piece));
            }
            pass.count()
        };
        let models = plan.searched(&plan.goals(unit));
        if models.contains(&true) {
            self.sketch += over(Wanted::TaskVectors(&models), None);
            let exact = plan.trim.as_ref().is_some_and(|trim| trim.threshold == ThresholdKind::Exact);
            if exact || schedule.spool.as_ref().is_some_and(|spool| spool.needs_bounds()) {
                let mut probe = none();
                for block in Schedule::probe_blocks(plan, unit) {
                    let pieces = plan.pieces(block.tensor, Wanted::TaskVectors(&models));
                    pieces.for_each(|piece| probe.chunk(block, piece));
                }
                self.probe += probe.count();
            }
        }
        let looks = Schedule::looks(plan);
        self.vote += if plan.votes() { over(Wanted::All, Some(looks == 0)) } else { 0 };
        if looks > 0 {
            self.gather += over(Wanted::All, Some(true)) + (looks - 1) * over(Wanted::All, Some(false));
        }
    }

    /// Of the pass called `name`.
    pub(super) fn get(&self, name: &str) -> u64 {
        match name {
            "probe" => self.probe,
            "sketch" => self.sketch,
            "vote" => self.vote,
            "gather" => self.gather,
            _ => self.merge,
        }
    }
}

/// Whether a pass finds `piece` of a tensor on the local disk: the first one after the sketch pass, or the merge.
fn spares(plan: &Plan, schedule: &Schedule, (tensor, piece): (u32, Piece), first: bool) -> bool {
    schedule.spool.as_ref().is_some_and(|spool| spool.spares(plan, tensor, piece, first))
}
