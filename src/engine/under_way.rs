//! What is found out of a unit before its thresholds are: the groups of its probe, the counts of its looks, and its votes.
//!
//! - A look at a unit that is not held in memory can take long. What it has found out is kept every so often, so that a run
//!   that is interrupted again and again gets through: the work pauses for a moment, and the sum of what all workers
//!   counted goes into the journal with the place up to which the unit was seen.
//! - Counts add up, so a run that goes on may cut what is left differently.
//! - A step says what it is a step of, where the journal it is in does not.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::iter::Peekable;
use std::time::{Duration, Instant};

use super::cut::Cut;
use super::records::{Entry, Rest};
use super::shard_hash::Digest;
use crate::error::Result;
use crate::kernels::Ties;
use crate::plan::{Chunk, Plan, Schedule, Unit};
use crate::sketch::{Probe, Threshold};

/// A group of a probe's blocks that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ProbeDone {
    /// First tensor of the unit.
    pub tensor: u32,
    /// What it is a step of.
    pub of: Digest,
    /// Which group.
    pub group: u32,
    /// Tensor bytes read for it.
    pub bytes_read: u64,
    /// Per model its sketch, encoded.
    pub sketches: Vec<u8>,
}

/// One of several searches that go on together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SearchDone {
    /// First tensor of the unit.
    pub tensor: u32,
    /// What it is a step of.
    pub of: Digest,
    /// Number of the look, from 0.
    pub round: u32,
    /// Elements of the unit that the look has seen, in the unit's order.
    pub elements: u64,
    /// Tensor bytes read for all searches until then, probes included.
    pub bytes_read: u64,
    /// How many searches there are.
    pub searches: u32,
    /// Whose task vector it is about.
    pub model: u32,
    /// Which of the largest magnitudes is sought.
    pub rank: u64,
    /// How far it is.
    pub state: SearchState,
}

/// How far a search is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum SearchState {
    /// Magnitudes are counted.
    Counting {
        /// Whether a bracket missed.
        missed: bool,
        /// The counts, encoded.
        sketch: Vec<u8>,
    },
    /// It is over.
    Found(Threshold),
}

/// Votes on the signs of a part of a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct VotesDone {
    /// First tensor of the unit.
    pub tensor: u32,
    /// What it is a step of.
    pub of: Digest,
    /// Elements of the unit that have voted, in the unit's order.
    pub elements: u64,
    /// Tensor bytes read for it.
    pub bytes_read: u64,
    /// The outcome for each output.
    pub votes: Vec<Votes>,
}

/// Votes for one output.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Votes {
    /// Which output, of those that are made together.
    pub of: Digest,
    /// Sum of the signs.
    pub sum: i64,
    /// Per model: ties in what has voted.
    pub ties: Vec<u64>,
}

/// One entry of the journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    Search(SearchDone),
    Probe(ProbeDone),
    Votes(VotesDone),
}

const SEARCH: u8 = 4;
const PROBE: u8 = 5;
const VOTES: u8 = 6;

impl Step {
    /// Memory that it holds beside itself.
    pub(super) fn held_bytes(&self) -> usize {
        match self {
            Self::Search(SearchDone { state: SearchState::Counting { sketch, .. }, .. }) => sketch.len(),
            Self::Search(_) => 0,
            Self::Probe(probe) => probe.sketches.len(),
            Self::Votes(votes) => votes.votes.iter().map(|v| size_of::<Votes>() + size_of_val(&*v.ties)).sum(),
        }
    }

    /// Its type, and what follows it.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let head = |out: &mut Vec<u8>, kind: u8, tensor: u32, of: &Digest| {
            out.push(kind);
            out.extend(tensor.to_le_bytes());
            out.extend(of);
        };
        let bytes = |out: &mut Vec<u8>, bytes: &[u8]| {
            out.extend((bytes.len() as u32).to_le_bytes());
            out.extend(bytes);
        };
        match self {
            Self::Search(search) => {
                head(out, SEARCH, search.tensor, &search.of);
                out.extend(search.round.to_le_bytes());
                [search.elements, search.bytes_read].iter().for_each(|n| out.extend(n.to_le_bytes()));
                [search.searches, search.model].iter().for_each(|n| out.extend(n.to_le_bytes()));
                out.extend(search.rank.to_le_bytes());
                match &search.state {
                    SearchState::Counting { missed, sketch } => {
                        out.push(u8::from(*missed));
                        bytes(out, sketch);
                    }
                    SearchState::Found(Threshold { ties, above, tied }) => {
                        out.push(2);
                        [ties.low, ties.high].iter().for_each(|key| out.extend(key.to_le_bytes()));
                        [above, tied].iter().for_each(|n| out.extend(n.to_le_bytes()));
                    }
                }
            }
            Self::Probe(probe) => {
                head(out, PROBE, probe.tensor, &probe.of);
                out.extend(probe.group.to_le_bytes());
                out.extend(probe.bytes_read.to_le_bytes());
                bytes(out, &probe.sketches);
            }
            Self::Votes(done) => {
                head(out, VOTES, done.tensor, &done.of);
                [done.elements, done.bytes_read].iter().for_each(|n| out.extend(n.to_le_bytes()));
                out.extend((done.votes.len() as u32).to_le_bytes());
                for votes in &done.votes {
                    out.extend(votes.of);
                    out.extend(votes.sum.to_le_bytes());
                    out.extend((votes.ties.len() as u32).to_le_bytes());
                    votes.ties.iter().for_each(|n| out.extend(n.to_le_bytes()));
                }
            }
        }
    }

    /// The step of type `kind` at the front of `rest`; `None` if there is none.
    pub(super) fn decode(kind: u8, rest: &mut Rest<'_>) -> Option<Self> {
        if !(SEARCH..=VOTES).contains(&kind) {
            return None;
        }
        let (tensor, of) = (rest.u32()?, rest.take()?);
        Some(match kind {
            SEARCH => {
                let (round, elements, bytes_read) = (rest.u32()?, rest.u64()?, rest.u64()?);
                let (searches, model, rank) = (rest.u32()?, rest.u32()?, rest.u64()?);
                let state = match rest.byte()? {
                    2 => {
                        let ties = Ties { low: rest.u32()?, high: rest.u32()? };
                        SearchState::Found(Threshold { ties, above: rest.u64()?, tied: rest.u64()? })
                    }
                    missed @ 0..=1 => SearchState::Counting { missed: missed == 1, sketch: rest.bytes()? },
                    _ => return None,
                };
                Self::Search(SearchDone { tensor, of, round, elements, bytes_read, searches, model, rank, state })
            }
            PROBE => {
                let (group, bytes_read) = (rest.u32()?, rest.u64()?);
                Self::Probe(ProbeDone { tensor, of, group, bytes_read, sketches: rest.bytes()? })
            }
            _ => {
                let (elements, bytes_read) = (rest.u64()?, rest.u64()?);
                let votes = rest.list(|rest| {
                    let (of, sum) = (rest.take()?, rest.u64()? as i64);
                    Some(Votes { of, sum, ties: rest.list(Rest::u64)? })
                })?;
                Self::Votes(VotesDone { tensor, of, elements, bytes_read, votes })
            }
        })
    }
}

/// What earlier attempts left, by first tensor of the unit.
#[derive(Debug, Default)]
pub(super) struct UnderWay(HashMap<u32, Left>);

#[derive(Debug, Default)]
struct Left {
    probe: Vec<ProbeDone>,
    /// The last searches of which all are there.
    searches: Vec<SearchDone>,
    /// Those of which more are to come.
    incomplete: Vec<SearchDone>,
    votes: Option<VotesDone>,
}

impl UnderWay {
    /// Takes in a step: the last one of its kind counts.
    pub(super) fn take(&mut self, step: Step) {
        match step {
            Step::Probe(probe) => self.0.entry(probe.tensor).or_default().probe.push(probe),
            Step::Votes(votes) => {
                let left = self.0.entry(votes.tensor).or_default();
                left.votes = Some(votes);
            }
            Step::Search(search) => {
                let left = self.0.entry(search.tensor).or_default();
                let together = |s: &SearchDone| (s.of, s.round, s.elements, s.bytes_read, s.searches);
                if left.incomplete.first().is_some_and(|first| together(first) != together(&search)) {
                    left.incomplete.clear();
                }
                // What an attempt left when it ended in the middle may be told again.
                left.incomplete.retain(|other| (other.model, other.rank) != (search.model, search.rank));
                let searches = search.searches as usize;
                left.incomplete.push(search);
                if left.incomplete.len() >= searches {
                    left.searches = std::mem::take(&mut left.incomplete);
                }
            }
        }
    }

    /// Whether nothing is left.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of the unit that begins with tensor `tensor` is known.
    pub(super) fn forget(&mut self, tensor: u32) {
        self.0.remove(&tensor);
    }

    /// How far the unit is in steps of `of`: look and elements of its searches, then groups of its probe.
    pub(super) fn progress(&self, tensor: u32, of: &Digest) -> (Option<(u32, u64)>, usize) {
        let Some(left) = self.0.get(&tensor) else { return (None, 0) };
        let search = left.searches.first().filter(|search| search.of == *of);
        let groups = left.probe.iter().filter(|probe| probe.of == *of).count();
        (search.map(|search| (search.round, search.elements)), groups)
    }
}

/// Keeps entries, durably before anything that depends on them.
pub(super) trait Keeps: Sync {
    fn keep_entries(&self, entries: Vec<Entry>) -> Result<()>;
}

/// Where what is found out of a unit is kept, and what is known of it from earlier attempts.
#[derive(Clone, Copy)]
pub(super) struct Notes<'a> {
    pub keeper: &'a dyn Keeps,
    pub left: &'a UnderWay,
    /// What steps are steps of.
    pub of: Digest,
    /// All of the unit is read again after the search, before its thresholds are kept otherwise.
    pub more_to_come: bool,
}

impl<'a> Notes<'a> {
    /// Those of a merge by `plan`.
    pub(super) fn of_merge(plan: &Plan, keeper: &'a dyn Keeps, left: &'a UnderWay) -> Self {
        // What comes before the merge reads all of a unit again.
        let more_to_come = plan.votes() || !plan.needs().looks.is_empty();
        Self { keeper, left, of: Digest::default(), more_to_come }
    }

    fn left(&self, unit: &Unit) -> Option<&'a Left> {
        self.left.0.get(unit.tensors.first()?)
    }

    /// The groups of the unit's probe that were read.
    pub(super) fn probe(&self, unit: &Unit) -> impl Iterator<Item = &'a ProbeDone> + use<'a> {
        let of = self.of;
        self.left(unit).into_iter().flat_map(|left| &left.probe).filter(move |probe| probe.of == of)
    }

    /// Keeps the last groups of the unit's probe, (number, tensor bytes read) in the order in which they were added.
    pub(super) fn keep_groups(&self, unit: &Unit, groups: Vec<(u32, u64)>, probes: &[Probe]) -> Result<()> {
        let count = groups.len();
        // One at a time: together they are as large as the probe.
        for (before, (group, bytes_read)) in groups.into_iter().enumerate() {
            let sketches = probes.iter().filter_map(|probe| probe.group(count - before)).flat_map(|s| s.encode());
            let (tensor, of, sketches) = (unit.tensors[0], self.of, sketches.collect());
            let done = ProbeDone { tensor, of, group, bytes_read, sketches };
            self.keeper.keep_entries(vec![Entry::Step(Step::Probe(done))])?;
        }
        Ok(())
    }

    /// How far the searches for the unit's thresholds are.
    pub(super) fn searches(&self, unit: &Unit) -> Option<&'a [SearchDone]> {
        let left = self.left(unit)?;
        left.searches.first().is_some_and(|search| search.of == self.of).then_some(&left.searches)
    }

    /// The votes of the unit.
    pub(super) fn votes(&self, unit: &Unit) -> Option<&'a VotesDone> {
        self.left(unit)?.votes.as_ref().filter(|votes| votes.of == self.of && votes.elements <= unit.elements)
    }

    /// Those for output `of`, of which `cuts` are kept.
    pub(super) fn votes_for(&self, unit: &Unit, of: Digest, cuts: &[Cut]) -> Option<&'a Votes> {
        let done = self.votes(unit)?;
        let most = done.elements.saturating_mul(cuts.len() as u64);
        let sound = |votes: &&Votes| {
            let ties = votes.ties.len() == cuts.len() && votes.ties.iter().all(|&ties| ties <= done.elements);
            votes.of == of && votes.sum.unsigned_abs() <= most && ties
        };
        done.votes.iter().find(sound)
    }

    /// The ties in each tensor of the unit, of each of `cuts` cuts, as far as they are counted, and in how many elements and for how
    /// many tensor bytes read that is.
    pub(super) fn ties(&self, unit: &Unit, cuts: usize) -> Option<(u64, u64, BTreeMap<u32, Vec<u64>>)> {
        let done = self.votes(unit)?;
        let own: HashSet<u32> = unit.tensors.iter().copied().collect();
        let of_tensor = |counted: &Votes| {
            let tensor = u32::try_from(u128::from_le_bytes(counted.of)).ok().filter(|tensor| own.contains(tensor))?;
            let sound = counted.ties.len() == cuts && counted.ties.iter().all(|&ties| ties <= done.elements);
            sound.then(|| (tensor, counted.ties.clone()))
        };
        Some((done.elements, done.bytes_read, done.votes.iter().map(of_tensor).collect::<Option<_>>()?))
    }

    /// Keeps such counts, of the first `elements` elements of the unit: as votes for each tensor that are only ties.
    pub(super) fn keep_ties(&self, unit: &Unit, done: (u64, u64), counted: &BTreeMap<u32, Vec<u64>>) -> Result<()> {
        let votes =
            counted.iter().map(|(&tensor, ties)| Votes { of: tensor_digest(tensor), sum: 0, ties: ties.clone() });
        self.keep_votes(unit, done, votes.collect())
    }

    /// Keeps the votes of the first `elements` elements of the unit, for which `bytes_read` tensor bytes were read.
    pub(super) fn keep_votes(&self, unit: &Unit, (elements, bytes_read): (u64, u64), votes: Vec<Votes>) -> Result<()> {
        let done = VotesDone { tensor: unit.tensors[0], of: self.of, elements, bytes_read, votes };
        self.keeper.keep_entries(vec![Entry::Step(Step::Votes(done))])
    }
}

/// Stands for a tensor of the plan where a digest is asked for.
fn tensor_digest(tensor: u32) -> Digest {
    u128::from(tensor).to_le_bytes()
}

impl Votes {
    /// No votes for output `of` yet.
    pub(super) fn none(of: Digest, cuts: &[Cut]) -> Self {
        Self { of, sum: 0, ties: vec![0; cuts.len()] }
    }

    /// Adds votes, and the ties among them.
    pub(super) fn add(&mut self, sum: i64, ties: &[u64]) {
        self.sum += sum;
        add(&mut self.ties, ties);
    }
}

/// Adds counts to others.
pub(super) fn add(sum: &mut [u64], counts: &[u64]) {
    sum.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
}

/// The chunks of a unit, in stretches of a duration. After each, what is known can be kept.
pub(super) struct Stretches<'p> {
    chunks: Peekable<Box<dyn Iterator<Item = Chunk> + 'p>>,
    keep_after: Option<Duration>,
    /// Elements of the unit that were handed out, and those before them.
    pub elements: u64,
}

impl<'p> Stretches<'p> {
    /// The chunks behind the first `elements` elements of `unit`: one stretch if nothing is kept in between.
    pub(super) fn new(plan: &'p Plan, unit: &'p Unit, elements: u64, keep_after: Option<Duration>) -> Self {
        let mut skip = elements;
        let chunks = unit.tensors.iter().flat_map(move |&tensor| {
            let length = plan.length(tensor);
            let start = skip.min(length);
            skip -= start;
            Schedule::chunks_of(plan, tensor, start..length, unit.chunk_elements)
        });
        let chunks: Box<dyn Iterator<Item = Chunk> + 'p> = Box::new(chunks);
        Self { chunks: chunks.peekable(), keep_after, elements }
    }

    /// Whether there are chunks left.
    pub(super) fn more(&mut self) -> bool {
        self.chunks.peek().is_some()
    }

    /// The chunks of the next stretch: at least one, if there are any.
    pub(super) fn stretch(&mut self) -> impl Iterator<Item = Chunk> + use<'_, 'p> {
        let Self { chunks, keep_after, elements } = self;
        for_a_while(chunks, *keep_after).inspect(|chunk| *elements += chunk.count)
    }
}

/// The next items, for as long as `most` says: at least one, if there are any.
pub(super) fn for_a_while<T>(mut items: impl Iterator<Item = T>, most: Option<Duration>) -> impl Iterator<Item = T> {
    let (begin, mut first) = (Instant::now(), true);
    std::iter::from_fn(move || {
        let full = !first && most.is_some_and(|most| begin.elapsed() >= most);
        first = false;
        if full { None } else { items.next() }
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn search(round: u32, model: u32, state: SearchState) -> SearchDone {
        let (of, rank) = ([1; 16], 3 + u64::from(model));
        SearchDone { tensor: 2, of, round, elements: 1 << 42, bytes_read: 7, searches: 2, model, rank, state }
    }

    /// One of each kind.
    pub(in crate::engine) fn steps() -> Vec<Step> {
        let threshold = Threshold { ties: Ties { low: 5, high: 6 }, above: 1 << 40, tied: 3 };
        vec![
            Step::Probe(ProbeDone { tensor: 2, of: [1; 16], group: 7, bytes_read: 9, sketches: vec![1, 2, 3] }),
            Step::Search(search(0, 0, SearchState::Counting { missed: true, sketch: vec![0, 1, 2] })),
            Step::Search(search(0, 1, SearchState::Found(threshold))),
            Step::Votes(VotesDone {
                tensor: 2,
                of: [1; 16],
                elements: 5,
                bytes_read: 6,
                votes: vec![Votes { of: [2; 16], sum: -4, ties: vec![1, 2] }, Votes::default()],
            }),
        ]
    }

    #[test]
    fn searches_count_when_all_of_them_are_there() {
        let mut left = UnderWay::default();
        let counting = |byte| SearchState::Counting { missed: false, sketch: vec![byte] };
        let of = [1; 16];
        left.take(Step::Search(search(0, 0, counting(1))));
        assert_eq!(left.progress(2, &of).0, None);
        left.take(Step::Search(search(0, 1, counting(2))));
        assert_eq!(left.progress(2, &of).0, Some((0, 1 << 42)));
        // The next ones are cut off in the middle, then come whole.
        left.take(Step::Search(search(1, 0, counting(3))));
        assert_eq!(left.progress(2, &of).0, Some((0, 1 << 42)));
        left.take(Step::Search(search(2, 0, counting(4))));
        left.take(Step::Search(search(2, 0, counting(4))));
        assert_eq!(left.progress(2, &of).0, Some((0, 1 << 42)));
        left.take(Step::Search(search(2, 1, counting(5))));
        assert_eq!(left.progress(2, &of).0, Some((2, 1 << 42)));
        assert_eq!((left.progress(2, &[0; 16]), left.progress(3, &of)), ((None, 0), (None, 0)));
        left.forget(2);
        assert_eq!(left.progress(2, &of).0, None);
    }
}
