//! Thresholds that are guessed from a sample, merged with, and proven by what was counted on the way.
//!
//! Differences of 16-bit weights have few magnitudes: a single one is often that of so many entries about the wanted rank
//! that a sample leaves hardly a doubt that it is the threshold. Merging with it counts the entries above it and tied with
//! it, which says for certain whether it is. Then the data need not be looked at before it is merged.
//!
//! - A unit in memory that was guessed wrong is merged again; nothing of it counted yet.
//! - The parts of a streamed unit are journalled as they are done, with the guess before them, so that a run that is killed
//!   goes on with it. No shard gets its name before the guess is proven. If it turns out to be wrong, the journal says so, what
//!   was merged since is void, and thresholds are searched for.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::cut::Cut;
use super::passes::{Passes, Resident, load_blocks, lock, probed_selectors, sampled_selectors};
use super::pool;
use super::records::{Entry, GuessDone, GuessState, UnitDone};
use super::select::{UnitThresholds, tensor_cuts};
use super::shard_hash::Digest;
use super::slot::Loaded;
use super::solo::merge_chunk;
use super::under_way::{Notes, ProbeDone, Step};
use super::worker::{Known, Tally, Worker};
use crate::error::Result;
use crate::kernels::Ties;
use crate::limits::{PROBE_GROUPS, SAMPLE_BLOCK};
use crate::plan::{Chunk, Goal, Plan, Schedule, Unit, UnitKind, Wanted, bytes_of};
use crate::sketch::{BlockCounts, Bracket, MagnitudeSketch, Probe, Selector, Standing, Threshold, guess_of_sample};

/// Per goal: the threshold, where it was found.
type Found = Vec<Option<Threshold>>;

/// Per goal: the key that the threshold is taken for; `None` where nothing is cut or kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Guess(pub Vec<Option<u32>>);

impl Guess {
    /// The thresholds, if samples of all models' keys say that they are likely to be right, all together.
    pub(super) fn of_samples(samples: &[Vec<u32>], goals: &[Goal]) -> Option<Self> {
        let mut odds = Odds::default();
        let one = |(goal, sample): (&Goal, &Vec<u32>)| match goal.fraction() {
            Some(fraction) => odds.guess(sample, fraction).map(Some),
            None => Some(None),
        };
        goals.iter().zip(samples).map(one).collect::<Option<_>>().map(Self)
    }

    /// What survives if it is right.
    pub(super) fn cuts(&self, goals: &[Goal]) -> Vec<Cut> {
        let cut = |(goal, key): (&Goal, &Option<u32>)| match (goal, key) {
            (Goal::Nothing, _) => Cut::Nothing,
            (Goal::Keep { .. }, Some(key)) => Cut::guess(*key),
            (Goal::Keep { .. }, None) | (Goal::All, _) => Cut::NonZero,
        };
        goals.iter().zip(&self.0).map(cut).collect()
    }

    /// The thresholds if it is right: `kept` survivors were counted with [`Self::cuts`], `tied` of them with the key. If it is
    /// not, those that it is right about.
    pub(super) fn proven(&self, goals: &[Goal], kept: &[u64], tied: &[u64]) -> std::result::Result<Found, Found> {
        let one = |(at, (goal, key)): (usize, (&Goal, &Option<u32>))| match (goal, *key) {
            (&Goal::Keep { keep, elements }, Some(key)) => {
                // Zeros are not among the survivors.
                let tied = if key == 0 { elements.checked_sub(kept[at])? } else { tied[at] };
                let above = if key == 0 { kept[at] } else { kept[at].checked_sub(tied)? };
                let right = above < keep && keep <= above + tied;
                right.then_some(Threshold { ties: Ties { low: key, high: key }, above, tied })
            }
            _ => None,
        };
        let found: Found = goals.iter().zip(&self.0).enumerate().map(one).collect();
        match goals.iter().zip(&found).all(|(goal, found)| found.is_some() || !goal.needs_threshold()) {
            true => Ok(found),
            false => Err(found),
        }
    }
}

/// How likely it is that all thresholds of a unit in memory are those that samples suggest.
pub(super) struct Odds(f64);

impl Default for Odds {
    fn default() -> Self {
        Self(1.0)
    }
}

impl Odds {
    /// What is merged in vain costs hardly more than the look that a right guess saves.
    const LEAST: f64 = 0.5;

    /// The next model's key at `fraction` (from the top), unless that makes the guess too bold: then all further ones are.
    pub(super) fn guess(&mut self, sample: &[u32], fraction: f64) -> Option<u32> {
        if self.0 < Self::LEAST {
            return None;
        }
        let (key, likelihood) = guess_of_sample(sample, SAMPLE_BLOCK, fraction).unwrap_or_default();
        self.0 *= likelihood;
        (self.0 >= Self::LEAST).then_some(key)
    }
}

/// What groups of looks at a sample are groups of, in the journal: for the most common keys, and for their counts.
const FINE: Digest = [1; 16];
const COUNTS: Digest = [2; 16];

/// What is looked for in a sample, in groups of blocks.
trait Look: Sync {
    /// Takes in what an earlier attempt found in a group; false if it makes no sense.
    fn take(&self, group: usize, kept: &[u8]) -> bool;
    /// A worker begins a group.
    fn begin(&self, worker: &mut Worker);
    /// It sees a block of it.
    fn see(&self, worker: &mut Worker, group: usize, data: Loaded<'_>) -> Result<()>;
    /// It ends the group: what was found, for the journal.
    fn end(&self, worker: &Worker, group: usize) -> Vec<u8>;
}

/// The counts of all keys of a bin.
struct FineLook {
    brackets: Vec<Option<Bracket>>,
    sums: Mutex<Vec<MagnitudeSketch>>,
}

impl FineLook {
    fn new(brackets: Vec<Option<Bracket>>) -> Self {
        let sums = brackets.iter().map(|bracket| MagnitudeSketch::new(bracket.unwrap_or(Bracket::NONE))).collect();
        Self { brackets, sums: Mutex::new(sums) }
    }

    /// The most common ones.
    fn keys(&self) -> Vec<Option<u32>> {
        lock(&self.sums).iter().map(MagnitudeSketch::mode).collect()
    }
}

impl Look for FineLook {
    fn take(&self, _group: usize, mut kept: &[u8]) -> bool {
        let mut sums = lock(&self.sums);
        let searched = || self.brackets.iter().enumerate().filter(|(_, bracket)| bracket.is_some());
        let found: Option<Vec<_>> = searched().map(|_| MagnitudeSketch::decode(&mut kept)).collect();
        let fits = |found: &Vec<MagnitudeSketch>| searched().zip(found).all(|((at, _), found)| sums[at].fits(found));
        let Some(found) = found.filter(|found| kept.is_empty() && fits(found)) else { return false };
        searched().zip(found).for_each(|((at, _), found)| sums[at].merge(&found));
        true
    }

    fn begin(&self, worker: &mut Worker) {
        worker.set_brackets(&self.brackets);
    }

    fn see(&self, worker: &mut Worker, _group: usize, data: Loaded<'_>) -> Result<()> {
        worker.sketch(data, &self.brackets)
    }

    fn end(&self, worker: &Worker, _group: usize) -> Vec<u8> {
        lock(&self.sums).iter_mut().zip(&worker.sketches).for_each(|(sum, sketch)| sum.merge(sketch));
        worker.sketches.iter().filter(|sketch| sketch.bins() > 0).flat_map(MagnitudeSketch::encode).collect()
    }
}

/// What each block of a sample stands for. A stratum is a tensor, or several that follow each other if they have too few blocks
/// for their error to be told.
fn standings(plan: &Plan, unit: &Unit) -> HashMap<(u32, u64), Standing> {
    let mut blocks = Schedule::probe_blocks(plan, unit).peekable();
    let mut strata: Vec<(u64, Vec<Chunk>)> = Vec::new();
    let mut open = false;
    for &tensor in &unit.tensors {
        if !std::mem::replace(&mut open, true) {
            strata.push((0, Vec::new()));
        }
        let (elements, sampled) = strata.last_mut().expect("one is open");
        *elements += plan.length(tensor);
        sampled.extend(std::iter::from_fn(|| blocks.next_if(|block| block.tensor == tensor)));
        open = sampled.len() < 2;
    }
    if open && strata.len() > 1 {
        let (elements, sampled) = strata.pop().expect("more than one");
        let last = strata.last_mut().expect("one is left");
        last.0 += elements;
        last.1.extend(sampled);
    }
    let standing = |(stratum, (elements, sampled)): (usize, (u64, Vec<Chunk>))| {
        let samples: u64 = sampled.iter().map(|block| block.count).sum();
        let standing = Standing { stratum: stratum as u32, weight: elements as f64 / samples.max(1) as f64 };
        sampled.into_iter().map(move |block| ((block.tensor, block.start), standing))
    };
    strata.into_iter().enumerate().flat_map(standing).collect()
}

/// What the blocks have above a key, and tied with it.
struct CountLook<'p> {
    plan: &'p Plan,
    standings: HashMap<(u32, u64), Standing>,
    brackets: Vec<Option<Bracket>>,
    /// By group, so that they are added up in one order.
    groups: Mutex<Vec<Vec<BlockCounts>>>,
}

impl<'p> CountLook<'p> {
    fn new(plan: &'p Plan, unit: &Unit, keys: &[Option<u32>]) -> Self {
        let single = |key: &Option<u32>| key.map(|low| Bracket { low, shift: 0, bins: 1 });
        let groups = Mutex::new(vec![vec![BlockCounts::default(); keys.len()]; PROBE_GROUPS]);
        Self { plan, standings: standings(plan, unit), brackets: keys.iter().map(single).collect(), groups }
    }

    /// Those of all groups, per goal.
    fn counts(&self) -> Vec<BlockCounts> {
        let mut sums = vec![BlockCounts::default(); self.brackets.len()];
        for group in &*lock(&self.groups) {
            sums.iter_mut().zip(group).for_each(|(sum, counts)| sum.merge(counts));
        }
        sums
    }
}

impl Look for CountLook<'_> {
    fn take(&self, group: usize, mut kept: &[u8]) -> bool {
        let found: Option<Vec<_>> = self.brackets.iter().map(|_| BlockCounts::decode(&mut kept)).collect();
        let Some(found) = found.filter(|_| kept.is_empty()) else { return false };
        lock(&self.groups)[group] = found;
        true
    }

    fn begin(&self, _worker: &mut Worker) {}

    fn see(&self, worker: &mut Worker, group: usize, data: Loaded<'_>) -> Result<()> {
        worker.set_brackets(&self.brackets);
        worker.sketch(data, &self.brackets)?;
        let standing = self.standings[&(data.chunk.tensor, data.chunk.start)];
        for (model, counts) in lock(&self.groups)[group].iter_mut().enumerate() {
            if self.brackets[model].is_some() && self.plan.merged_length(data.chunk.tensor, model) > 0 {
                let (above, tied) = worker.sketches[model].above_and_first();
                counts.add(standing, data.chunk.count, above, tied);
            }
        }
        Ok(())
    }

    fn end(&self, _worker: &Worker, group: usize) -> Vec<u8> {
        lock(&self.groups)[group].iter().flat_map(BlockCounts::encode).collect()
    }
}

/// How a unit that all workers share begins.
pub(super) enum Beginning {
    /// With the end: all of it is merged.
    Merged,
    /// With the search for its thresholds, which starts there, if that is known.
    Search(Option<Vec<Option<Selector>>>),
}

impl Passes<'_> {
    /// Merges a unit that all workers share with guessed thresholds, if they can be guessed. Fails where they turn out to
    /// be others and parts are journalled: the next attempt knows.
    pub(super) fn begin_with_guess(
        &mut self,
        unit: &Unit,
        goals: &[Goal],
        resident: &mut Option<Resident>,
    ) -> Result<Beginning> {
        if let Some(done) = self.kept.taken_guess(unit.tensors[0]) {
            if !self.guesses || !self.plan.can_guess() {
                return Err(self.writer().missed(done.bytes_read));
            }
            self.take_over_reads(done.bytes_read);
            self.merge_streamed(unit, goals, &Guess(done.keys.clone()), done.bytes_read)?;
            return Ok(Beginning::Merged);
        }
        if !self.plan.can_guess() || !goals.iter().any(Goal::needs_threshold) {
            return Ok(Beginning::Search(None));
        }
        let searched = self.notes_of(unit).is_some_and(|notes| notes.searches(unit).is_some());
        let bins = self.schedule.sketch_bins;
        match unit.kind {
            UnitKind::Resident if self.plan.per_tensor() => {
                let samples = self.sample(unit, resident, goals)?;
                if let Some(guess) = Guess::of_samples(&samples, goals)
                    && self.merge_resident(unit, goals, &guess, resident)?
                {
                    return Ok(Beginning::Merged);
                }
                Ok(Beginning::Search(Some(sampled_selectors(samples, goals, bins))))
            }
            UnitKind::Streamed if self.guesses && self.kept.missed().is_none() && !searched => {
                let before = self.tally().bytes_read;
                let probes = self.probe(unit, goals)?;
                let selectors = probed_selectors(&probes, goals, bins);
                let Some(guess) = self.guess(unit, goals, probes, before)? else {
                    return Ok(Beginning::Search(Some(selectors)));
                };
                let bytes_read = self.tally().bytes_read - before;
                self.merge_streamed(unit, goals, &guess, bytes_read)?;
                Ok(Beginning::Merged)
            }
            _ => Ok(Beginning::Search(None)),
        }
    }

    /// The thresholds of a streamed unit, if two more looks at the sample leave hardly a doubt about any: one for the most
    /// common key about each, one for its counts. What they say is kept; tensor bytes read from `before` on are for it.
    fn guess(&mut self, unit: &Unit, goals: &[Goal], probes: Vec<Probe>, before: u64) -> Result<Option<Guess>> {
        let (tensor, models, writer) = (unit.tensors[0], self.plan.searched(goals), self.writer());
        let probed = self.tally().bytes_read;
        let known = self.kept.guess(tensor);
        known.iter().for_each(|known| self.take_over_reads(known.bytes_read));
        let keys = match known {
            Some(GuessDone { state: GuessState::Doubted, .. }) => return Ok(None),
            Some(known) => known.keys.clone(),
            None => {
                let bin = |(probe, goal): (&Probe, &Goal)| goal.fraction().and_then(|fraction| probe.bin(fraction));
                let bins: Vec<Option<Bracket>> = probes.iter().zip(goals).map(bin).collect();
                drop(probes);
                let look = FineLook::new(bins);
                self.look_again(unit, &models, FINE, &look)?;
                let keys = look.keys();
                let (state, bytes_read) = (GuessState::Candidates, self.tally().bytes_read - probed);
                writer.keep_guess(GuessDone { tensor, state, bytes_read, keys: keys.clone() })?;
                keys
            }
        };
        let look = CountLook::new(self.plan, unit, &keys);
        self.look_again(unit, &models, COUNTS, &look)?;
        let counts = look.counts();
        let certain = |((goal, key), counts): ((&Goal, &Option<u32>), &BlockCounts)| {
            goal.fraction().is_none_or(|fraction| key.is_some() && counts.is_certain(fraction))
        };
        let certain = goals.iter().zip(&keys).zip(&counts).all(certain);
        let read = self.tally().bytes_read;
        // The probe is kept by itself until the guess is all there is to know.
        let (state, bytes_read) =
            if certain { (GuessState::Taken, read - before) } else { (GuessState::Doubted, read - probed) };
        writer.keep_guess(GuessDone { tensor, state, bytes_read, keys: keys.clone() })?;
        Ok(certain.then_some(Guess(keys)))
    }

    /// Looks at the sample of a streamed unit once more, group by group, of which an earlier attempt may have kept some.
    fn look_again(&mut self, unit: &Unit, models: &[bool], of: Digest, look: &dyn Look) -> Result<()> {
        let (plan, observer, wanted) = (self.plan, self.observer, Wanted::TaskVectors(models));
        let notes = self.notes_of(unit).map(|notes| Notes { of, ..notes });
        let mut done = [false; PROBE_GROUPS];
        for kept in notes.iter().flat_map(|notes| notes.probe(unit)) {
            let group = kept.group as usize;
            if done.get(group) == Some(&false) && look.take(group, &kept.sketches) {
                self.take_over_reads(kept.bytes_read);
                done[group] = true;
            }
        }
        let share = Schedule::probe_blocks(plan, unit).count().div_ceil(PROBE_GROUPS);
        let (schedule, keep_after) = (self.schedule, self.schedule.keep_after);
        let kept = Mutex::new((Vec::new(), Instant::now()));
        pool::run(
            &mut self.workers,
            (0..PROBE_GROUPS).filter(|&group| !done[group]),
            0,
            |_| (),
            |worker, _, group| {
                let before = worker.tally.bytes_read;
                look.begin(worker);
                // Neighbours together.
                let blocks = || Schedule::probe_blocks(plan, unit).skip(group * share).take(share);
                let see = |worker: &mut Worker, data: Loaded<'_>| look.see(worker, group, data);
                load_blocks(worker, (plan, schedule), blocks, wanted, observer, see)?;
                let sketches = look.end(worker, group);
                let Some(notes) = notes else { return Ok(()) };
                let (tensor, group, bytes_read) = (unit.tensors[0], group as u32, worker.tally.bytes_read - before);
                let (entries, last) = &mut *lock(&kept);
                entries.push(Entry::Step(Step::Probe(ProbeDone { tensor, of, group, bytes_read, sketches })));
                if last.elapsed() < keep_after {
                    return Ok(());
                }
                *last = Instant::now();
                notes.keeper.keep_entries(std::mem::take(entries))
            },
        )
    }

    /// Merges what is left of a streamed unit with a guess that the journal knows, for which `bytes_read` were read.
    fn merge_streamed(&mut self, unit: &Unit, goals: &[Goal], guess: &Guess, bytes_read: u64) -> Result<()> {
        let (plan, writer, kept) = (self.plan, self.writer(), self.kept);
        self.announce("merge", self.pass_bytes("merge"));
        if self.announces_passes() {
            self.observer.advance(kept.tally.bytes_read);
        }
        let (before, cuts) = (self.tally(), guess.cuts(goals));
        self.each_chunk(unit, &mut None, Wanted::All, None, |worker, _, data| {
            let cuts = tensor_cuts(plan, data.chunk, &cuts, &[]);
            let out = merge_chunk(worker, data, writer, &cuts, &Known::default())?;
            let counted = worker.counted();
            let ties = counted.tied.clone();
            out.done(counted, ties, false, None)
        })?;
        let Tally { kept: mut survivors, mut tied, .. } = self.tally().since(&before);
        kept.add_survivors(&unit.tensors, &mut survivors);
        kept.add_ties(&unit.tensors, &mut tied);
        let Ok(found) = guess.proven(goals, &survivors, &tied) else {
            return Err(writer.missed(bytes_read + bytes_of(plan, &unit.tensors, Wanted::All)));
        };
        if !self.announces_passes() {
            // The stage that counts all reads counts those that are spared too.
            self.observer.advance(bytes_of(plan, &unit.tensors, Wanted::TaskVectors(&plan.searched(goals))));
        }
        let thresholds = self.keep_proven(unit, goals, &found, bytes_read)?;
        self.thresholds.record(thresholds, &survivors);
        Ok(())
    }

    /// Merges a unit in memory with a guess, and tells whether it was right; if not, nothing is done.
    fn merge_resident(
        &mut self,
        unit: &Unit,
        goals: &[Goal],
        guess: &Guess,
        resident: &mut Option<Resident>,
    ) -> Result<bool> {
        let (plan, writer) = (self.plan, self.writer());
        let before: Vec<Tally> = self.workers.iter().map(|worker| worker.tally.clone()).collect();
        let (sum_before, cuts) = (self.tally(), guess.cuts(goals));
        // Few and long ones: one for each worker.
        let merged = Mutex::new(Vec::new());
        self.each_chunk(unit, resident, Wanted::All, None, |worker, _, data| {
            let cuts = tensor_cuts(plan, data.chunk, &cuts, &[]);
            let out = merge_chunk(worker, data, writer, &cuts, &Known::default())?;
            lock(&merged).push((out, worker.counted()));
            Ok(())
        })?;
        let Tally { kept: survivors, tied, .. } = self.tally().since(&sum_before);
        let Ok(found) = guess.proven(goals, &survivors, &tied) else {
            self.workers.iter_mut().zip(before).for_each(|(worker, before)| worker.tally = before);
            return Ok(false);
        };
        let thresholds = self.keep_proven(unit, goals, &found, 0)?;
        for (out, counted) in merged.into_inner().unwrap_or_else(PoisonError::into_inner) {
            out.done(counted, Vec::new(), false, None)?;
        }
        self.thresholds.record(thresholds, &survivors);
        Ok(true)
    }

    /// Keeps what a guess turned out to be.
    fn keep_proven(
        &mut self,
        unit: &Unit,
        goals: &[Goal],
        found: &[Option<Threshold>],
        bytes_read: u64,
    ) -> Result<UnitThresholds> {
        let thresholds = UnitThresholds::new(unit, goals, found);
        let (tensor, found) = (thresholds.tensor, thresholds.found.clone());
        self.writer().keep(UnitDone { tensor, found, majority: 0, bytes_read, facts: Vec::new() })?;
        Ok(thresholds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_prove_a_guess_or_refute_it() {
        let goals = [Goal::Keep { keep: 20, elements: 100 }, Goal::All, Goal::Nothing];
        let guess = |key| Guess(vec![Some(key), None, None]);
        let proven = |key, kept, tied| guess(key).proven(&goals, &[kept, 100, 0], &[tied, 0, 0]).ok();
        let threshold = |key, above, tied| {
            Some(vec![Some(Threshold { ties: Ties { low: key, high: key }, above, tied }), None, None])
        };
        // Ranks 20 to 30, 11 to 20, and the very last.
        assert_eq!(proven(7, 30, 11), threshold(7, 19, 11));
        assert_eq!(proven(7, 20, 10), threshold(7, 10, 10));
        assert_eq!(proven(7, 20, 1), threshold(7, 19, 1));
        assert_eq!(proven(7, 19, 10), None, "too large");
        assert_eq!(proven(7, 30, 10), None, "too small");
        assert_eq!(proven(7, 5, 6), None, "no counts at all");
        // Fewer than wanted differ from zero.
        assert_eq!(proven(0, 19, 0), threshold(0, 19, 81));
        assert_eq!(proven(0, 20, 0), None);
        assert_eq!(guess(7).cuts(&goals), [Cut::Guess { min_key: 7 }, Cut::NonZero, Cut::Nothing]);
        assert_eq!(guess(0).cuts(&goals)[0], Cut::NonZero);
    }
}
