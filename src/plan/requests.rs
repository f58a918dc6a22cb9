//! What the passes of a merge ask for of inputs that come over a network: how many requests, and how many bytes. Of what is
//! computed where it is read (RegMean's layers, packed vectors, models with adapters) that is what it is computed from.
//!
//! - What several inputs are made of is asked for once where they are read together.
//! - What touches in a file is one range, and comes in requests of the length that there is memory for.
//! - A file's first bytes came when it was opened, and are not asked for again.
//! - The number is what there is to ask for. A reader that is faster than the network asks for less at a time; faults and
//!   renewed addresses come on top.

use std::collections::BTreeMap;
use std::ops::{AddAssign, Range};

use super::{Chunk, Piece, Plan, Schedule, ThresholdKind, Unit, UnitKind, Wanted};
use crate::storage::{HEAD_BYTES, is_remote, request_bytes, stored_ranges};

/// Ranges of inputs on a network, in the order in which a pass asks for them.
pub(super) struct Requests<'a> {
    plan: &'a Plan,
    /// Longest request.
    length: u64,
    /// Per file, the range that may go on, and where what was asked for last begins in it.
    open: BTreeMap<u64, (Range<u64>, u64)>,
    count: u64,
    bytes: u64,
}

impl<'a> Requests<'a> {
    /// None yet, where `ahead_bytes` are held of what is fetched ahead.
    pub(super) fn new(plan: &'a Plan, ahead_bytes: u64) -> Self {
        let sources = plan.checkpoints.iter().filter(|checkpoint| checkpoint.is_remote()).count();
        Self { plan, length: request_bytes(ahead_bytes, sources), open: BTreeMap::new(), count: 0, bytes: 0 }
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
        let (entry, file) = self.plan.source(piece);
        stored_ranges(file, entry.offset + from, bytes, &mut |file, first, bytes| {
            if is_remote(file.path()) {
                self.stored(file.identity().inode, first, bytes);
            }
        });
    }

    fn stored(&mut self, file: u64, first: u64, bytes: u64) {
        let end = first + bytes;
        let (open, last) = self.open.entry(file).or_insert((first..first, first));
        // What two inputs are made of comes once for both.
        if *last <= first && end <= open.end {
            return;
        }
        *last = first;
        self.bytes += bytes;
        if open.end == first {
            open.end = end;
            return;
        }
        self.count += requests(open, self.length);
        *open = first..end;
    }

    /// What they come to.
    pub(super) fn sum(self) -> Downloads {
        let open = self.open.values().map(|(open, _)| requests(open, self.length));
        Downloads { requests: self.count + open.sum::<u64>(), bytes: self.bytes }
    }
}

/// How many requests of `length` bytes a range takes, beside that which opens the file.
fn requests(range: &Range<u64>, length: u64) -> u64 {
    range.end.saturating_sub(range.start.max(HEAD_BYTES)).div_ceil(length)
}

/// What a pass asks for.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Downloads {
    pub requests: u64,
    /// Bytes, those included that came when files were opened.
    pub bytes: u64,
}

impl AddAssign for Downloads {
    fn add_assign(&mut self, other: Self) {
        self.requests += other.requests;
        self.bytes += other.bytes;
    }
}

/// The same of each pass; see [`super::PassSummary`].
#[derive(Debug, Default)]
pub(super) struct OfPasses {
    probe: Downloads,
    sketch: Downloads,
    vote: Downloads,
    gather: Downloads,
    merge: Downloads,
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
        all.merge = merge.sum();
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
            pass.sum()
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
                self.probe += probe.sum();
            }
        }
        let looks = Schedule::looks(plan);
        if plan.votes() {
            self.vote += over(Wanted::All, Some(looks == 0));
        }
        for look in 0..looks {
            self.gather += over(Wanted::All, Some(look == 0));
        }
    }

    /// Of the pass called `name`.
    pub(super) fn get(&self, name: &str) -> Downloads {
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
