//! What earlier attempts of a run left that can be kept: thresholds, and the parts of tensors that are done.
//!
//! - Parts are element ranges, not chunks: the run that goes on may cut its work differently.
//! - Counts of what is kept go into the report as if this run had done it.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::cut::TieCounts;
use super::records::{GuessDone, GuessState, MissDone, RangeDone, UnitDone};
use super::under_way::UnderWay;
use super::worker::Tally;
use crate::plan::{Action, Chunk, Goal, Plan, Schedule, Unit};

/// A part of a tensor that is done.
#[derive(Debug, Clone)]
struct Span {
    start: u64,
    count: u64,
    /// Per model; empty where ties have no order.
    ties: Vec<u64>,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Kept {
    units: HashMap<u32, UnitDone>,
    /// What is known of units whose thresholds are not found.
    pub under_way: UnderWay,
    /// By first tensor of the unit: what a sample says of its thresholds, while they are not known.
    guesses: HashMap<u32, GuessDone>,
    /// Tensor bytes read under guesses that were wrong, if there were any.
    missed: Option<u64>,
    /// Per tensor, by start; disjoint.
    spans: BTreeMap<u32, Vec<Span>>,
    /// Per tensor, per model: survivors in the parts that are done; tensors without any are not listed.
    survivors: HashMap<u32, Vec<u64>>,
    /// Of the parts that are done. Reads for thresholds are not in it.
    pub tally: Tally,
    /// Copied tensors whose versions differ.
    pub differing: BTreeSet<u32>,
    /// Number of parts.
    pub ranges: u64,
    /// Tensors that are not looked at at all: in a repair, those that are intact.
    skipped: HashSet<u32>,
}

impl Kept {
    pub(super) fn new(plan: &Plan) -> Self {
        Self { tally: Tally::of(plan.models()), ..Self::default() }
    }

    /// Whether an earlier attempt left anything.
    pub(super) fn is_empty(&self) -> bool {
        self.units.is_empty() && self.spans.is_empty()
    }

    /// Whether `unit` can be one of this plan.
    pub(super) fn fits_unit(plan: &Plan, unit: &UnitDone) -> bool {
        let merging = plan.merging();
        (unit.tensor as usize) < plan.tensors.len()
            && unit.found.len() == merging.models() * merging.bounds()
            && (-1..=1).contains(&unit.majority)
    }

    /// Takes in the thresholds of a unit that fits.
    pub(super) fn add_unit(&mut self, unit: UnitDone) {
        self.under_way.forget(unit.tensor);
        self.guesses.remove(&unit.tensor);
        self.units.insert(unit.tensor, unit);
    }

    /// Whether `guess` can be one about this plan.
    pub(super) fn fits_guess(plan: &Plan, guess: &GuessDone) -> bool {
        (guess.tensor as usize) < plan.tensors.len() && guess.keys.len() == plan.models()
    }

    /// Takes in a guess that fits.
    pub(super) fn add_guess(&mut self, guess: GuessDone) {
        self.guesses.insert(guess.tensor, guess);
    }

    /// Takes in that the guess was wrong; what was merged with it is not taken in.
    pub(super) fn add_miss(&mut self, miss: &MissDone) {
        self.guesses.clear();
        self.missed = Some(self.missed.unwrap_or(0).saturating_add(miss.bytes_read));
    }

    /// What a sample says of the unit that begins with tensor `tensor`.
    pub(super) fn guess(&self, tensor: u32) -> Option<&GuessDone> {
        self.guesses.get(&tensor)
    }

    /// The same, if the unit is merged with it.
    pub(super) fn taken_guess(&self, tensor: u32) -> Option<&GuessDone> {
        self.guess(tensor).filter(|guess| guess.state == GuessState::Taken)
    }

    /// Whether something is merged with thresholds that are not proven.
    pub(super) fn is_guessing(&self) -> bool {
        self.guesses.values().any(|guess| guess.state == GuessState::Taken)
    }

    /// Tensor bytes read under guesses that were wrong, if there were any.
    pub(super) fn missed(&self) -> Option<u64> {
        self.missed
    }

    /// Whether `range` can be a part of this plan.
    pub(super) fn fits(plan: &Plan, range: &RangeDone) -> bool {
        let counted = |counts: &[u64], bounds: usize| {
            let known = counts.is_empty() || counts.len() == plan.models() * bounds;
            known && counts.iter().all(|&n| n <= range.count)
        };
        // Each element is read once of each checkpoint and each layer of it, in at most 8 bytes.
        let most_read = range.count.saturating_mul(16 * (plan.checkpoints.len() + plan.models()) as u64);
        let numbers = counted(&range.kept, 1) && counted(&range.agreeing, 1) && counted(&range.ties, plan.bounds());
        let numbers = numbers && range.conflicts <= range.count && range.bytes_read <= most_read;
        if range.tensor as usize >= plan.tensors.len() || !numbers {
            return false;
        }
        // What stays together is done together.
        if let Some(granule) = plan.granule(range.tensor) {
            let end = range.start.saturating_add(range.count);
            let ends = end.is_multiple_of(granule) || end == plan.length(range.tensor);
            if !range.start.is_multiple_of(granule) || !ends {
                return false;
            }
        }
        let inside = range.start.checked_add(range.count).is_some_and(|end| end <= plan.length(range.tensor));
        let width = plan.output_bytes(range.tensor).checked_div(plan.length(range.tensor)).unwrap_or(1);
        let bytes: u64 = range.pieces.iter().map(|piece| u64::from(piece.bytes)).sum();
        inside && range.count > 0 && range.count.checked_mul(width) == Some(bytes)
    }

    /// Whether nothing of `range` is done yet. A part that was damaged on the disk and done again is listed twice.
    pub(super) fn is_new(&self, range: &RangeDone) -> bool {
        let Some(spans) = self.spans.get(&range.tensor) else { return true };
        let next = spans.partition_point(|span| span.start < range.start);
        let free_before = next == 0 || spans[next - 1].start + spans[next - 1].count <= range.start;
        free_before && spans.get(next).is_none_or(|span| range.start + range.count <= span.start)
    }

    /// Takes in a part that fits and is new.
    pub(super) fn add_range(&mut self, plan: &Plan, range: RangeDone) {
        if matches!(plan.tensors[range.tensor as usize].action, Action::Merge { .. }) {
            self.tally.merged += range.count;
        }
        self.tally.bytes_read += range.bytes_read;
        self.tally.conflicts += range.conflicts;
        add(&mut self.tally.kept, &range.kept);
        add(&mut self.tally.agreeing, &range.agreeing);
        if !range.kept.is_empty() {
            let survivors = self.survivors.entry(range.tensor).or_insert_with(|| vec![0; plan.models()]);
            add(survivors, &range.kept);
        }
        self.ranges += 1;
        if range.differs {
            self.differing.insert(range.tensor);
        }
        let spans = self.spans.entry(range.tensor).or_default();
        let next = spans.partition_point(|span| span.start < range.start);
        spans.insert(next, Span { start: range.start, count: range.count, ties: range.ties });
        // Neighbours are joined: few spans, whatever the tensor's size. What is left lies before or behind all of one.
        for joined in [next.checked_sub(1), Some(next)].into_iter().flatten().rev() {
            if joined + 1 < spans.len() && spans[joined].start + spans[joined].count == spans[joined + 1].start {
                let behind = spans.remove(joined + 1);
                let span = &mut spans[joined];
                span.count += behind.count;
                span.ties.resize(span.ties.len().max(behind.ties.len()), 0);
                add(&mut span.ties, &behind.ties);
            }
        }
    }

    /// Leaves all of tensor `tensor` as it is.
    pub(super) fn skip(&mut self, plan: &Plan, tensor: u32) {
        self.skipped.insert(tensor);
        let whole = Span { start: 0, count: plan.length(tensor), ties: Vec::new() };
        self.spans.insert(tensor, vec![whole]);
    }

    /// Whether nothing of `unit` is to be done.
    pub(super) fn skips(&self, unit: &Unit) -> bool {
        unit.tensors.iter().all(|tensor| self.skipped.contains(tensor))
    }

    /// What is known of `unit`, if it is what the plan needs.
    pub(super) fn unit(&self, plan: &Plan, unit: &Unit) -> Option<&UnitDone> {
        let known = self.units.get(unit.tensors.first()?)?;
        let enough = |(goal, found): (&Goal, &Option<_>)| match (goal, found) {
            (Goal::Keep { keep, elements }, Some((threshold, among))) => {
                let threshold: &crate::sketch::Threshold = threshold;
                let reached = threshold.above.checked_add(threshold.tied);
                let enough = reached.is_some_and(|reached| *keep <= reached && reached <= *elements);
                threshold.above < *keep && enough && among == elements
            }
            (Goal::All | Goal::Nothing, None) => true,
            _ => false,
        };
        let facts = plan.facts(known.tensor);
        (known.facts.len() == facts && plan.goals(unit).iter().zip(&known.found).all(enough)).then_some(known)
    }

    /// What is kept of a unit that begins with tensor `tensor`, whatever the plan needs.
    pub(super) fn done(&self, tensor: u32) -> Option<&UnitDone> {
        self.units.get(&tensor)
    }

    /// Whether something of tensor `tensor` is done.
    pub(super) fn has_part_of(&self, tensor: u32) -> bool {
        self.spans.contains_key(&tensor)
    }

    /// The chunks of `tensors` that are left to do, in order, each of at most `chunk_elements`.
    pub(super) fn left<'a>(
        &'a self,
        plan: &'a Plan,
        tensors: &'a [u32],
        chunk_elements: u64,
    ) -> impl Iterator<Item = Chunk> + 'a {
        tensors.iter().flat_map(move |&tensor| {
            self.gaps(tensor, plan.length(tensor))
                .flat_map(move |(start, end)| Schedule::chunks_of(plan, tensor, start..end, chunk_elements))
        })
    }

    /// What is not done of a tensor of `length` elements: (start, end).
    pub(super) fn gaps(&self, tensor: u32, length: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let spans = self.spans.get(&tensor).map(Vec::as_slice).unwrap_or_default();
        let starts = std::iter::once(0).chain(spans.iter().map(|span| span.start + span.count));
        let ends = spans.iter().map(|span| span.start).chain([length]);
        starts.zip(ends).filter(|(start, end)| start < end)
    }

    /// Bytes of the output that are not done.
    pub(super) fn bytes_left(&self, plan: &Plan) -> u64 {
        let left = |tensor: u32| {
            let length = plan.length(tensor);
            let gaps: u64 = self.gaps(tensor, length).map(|(start, end)| end - start).sum();
            (u128::from(plan.output_bytes(tensor)) * u128::from(gaps) / u128::from(length.max(1))) as u64
        };
        (0..plan.tensors.len() as u32).map(left).sum()
    }

    /// For each tensor of a unit, in its order: ties of the parts done in all tensors before it.
    pub(super) fn ties_before(&self, plan: &Plan, tensors: &[u32]) -> HashMap<u32, TieCounts> {
        let mut sum = vec![0; plan.models() * plan.bounds()];
        let mut before = HashMap::new();
        if self.spans.is_empty() {
            return before;
        }
        for &tensor in tensors {
            before.insert(tensor, sum.clone());
            self.spans.get(&tensor).into_iter().flatten().for_each(|span| add(&mut sum, &span.ties));
        }
        before
    }

    /// Adds to `sum` the survivors in the parts of `tensors` that are done.
    pub(super) fn add_survivors(&self, tensors: &[u32], sum: &mut [u64]) {
        tensors.iter().filter_map(|tensor| self.survivors.get(tensor)).for_each(|counts| add(sum, counts));
    }

    /// Adds to `sum` the ties in the parts of `tensors` that are done.
    pub(super) fn add_ties(&self, tensors: &[u32], sum: &mut [u64]) {
        tensors.iter().filter_map(|tensor| self.spans.get(tensor)).flatten().for_each(|span| add(sum, &span.ties));
    }

    /// Adds to `sum` the ties of the parts of the chunk's tensor that are done and lie before it.
    pub(super) fn add_ties_in_tensor(&self, chunk: Chunk, sum: &mut TieCounts) {
        let spans = self.spans.get(&chunk.tensor).into_iter().flatten();
        spans.filter(|span| span.start < chunk.start).for_each(|span| add(sum, &span.ties));
    }
}

fn add(sum: &mut [u64], counts: &[u64]) {
    sum.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
}
