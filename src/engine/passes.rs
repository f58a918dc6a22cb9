//! The passes over the data: probe, sketch, vote and merge, unit by unit.
//!
//! - A unit's chunks are either held in memory between the passes (*resident*) or loaded anew for each pass.
//! - Sketches are integers and add up in any order; everything that depends on position goes through a [`TieChain`].

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::Observer;
use super::cut::{Cut, TieChain, TieCounts};
use super::guess::Beginning;
use super::kept::Kept;
use super::pool;
use super::records::UnitDone;
use super::select::{Thresholds, UnitThresholds, coarse_selectors, cuts, sample_stride, tensor_cuts};
use super::shards::ShardWriter;
use super::slot::{Loaded, Slot, locate};
use super::spool::{Site, Spool, Use};
use super::turns::{Ordered, Pending};
use super::under_way::Notes;
use super::worker::{Known, Tally, Worker};
use crate::error::Result;
use crate::limits::{MIN_CHUNK_ELEMENTS, PREFETCH_BYTES, PROBE_GROUPS, PROBES_AHEAD, SAMPLE_BLOCK, SAMPLE_ELEMENTS};
use crate::plan::ThresholdKind;
use crate::plan::{Action, Chunk, Goal, PassSummary, Piece, Plan, Schedule, Trim, Unit, UnitKind, Wanted};
use crate::sketch::{Bracket, Probe, Selector, bounds_of_sample};

/// Everything that a run shares.
pub(super) struct Passes<'a> {
    pub plan: &'a Plan,
    pub schedule: &'a Schedule,
    pub observer: &'a dyn Observer,
    /// Where results go; `None` for passes that only look at the data.
    pub writer: Option<&'a ShardWriter<'a>>,
    pub kept: &'a Kept,
    /// Where what is found out of a unit is kept on the way.
    pub notes: Option<Notes<'a>>,
    /// Per tensor: ties before it in tensors that other parts of the work deal with.
    pub ties_elsewhere: HashMap<u32, TieCounts>,
    pub workers: Vec<Worker>,
    /// Tensor bytes that earlier attempts read for thresholds that are taken over.
    pub kept_reads: u64,
    /// What was selected so far.
    pub thresholds: Thresholds,
    /// Copied tensors whose versions differ.
    pub differing: BTreeSet<u32>,
    /// These are the passes over one shard of several.
    pub by_shard: bool,
    /// What is downloaded and needed again.
    pub spool: Option<&'a Spool<'a>>,
    /// Where that is kept of a single tensor.
    pub site: Option<&'a Site<'a>>,
    /// Streamed units may be merged with guessed thresholds.
    pub guesses: bool,
    /// All of the unit was looked at once.
    pub looked: bool,
    /// Per model, the least key that matters to what is sought, where something is kept.
    pub least: Vec<Option<u32>>,
    /// Per model, a key from which on everything matters, whatever is sought.
    pub floors: Vec<Option<u32>>,
}

/// A chunk to work on, with its slot if it is held in memory.
struct Item<'s> {
    chunk: Chunk,
    slot: Option<&'s mut Slot>,
}

/// Slots of a resident unit, one per chunk.
pub(super) struct Resident {
    slots: Vec<Slot>,
    loaded: bool,
}

impl Resident {
    /// Whether the slots show their chunks.
    pub(super) fn is_loaded(&self) -> bool {
        self.loaded
    }

    /// Says that they do.
    pub(super) fn set_loaded(&mut self) {
        self.loaded = true;
    }

    /// The slots, in the order of the chunks.
    pub(super) fn slots(&mut self) -> std::slice::IterMut<'_, Slot> {
        self.slots.iter_mut()
    }
}

impl<'a> Passes<'a> {
    pub(super) fn new(
        plan: &'a Plan,
        schedule: &'a Schedule,
        observer: &'a dyn Observer,
        writer: Option<&'a ShardWriter<'a>>,
        kept: &'a Kept,
    ) -> Self {
        let reads = writer.and_then(ShardWriter::reads);
        let workers = (0..schedule.threads).map(|_| Worker::new(plan, schedule).telling(reads.clone())).collect();
        Self::with_workers(plan, schedule, observer, writer, kept, workers)
    }

    /// With workers that there are already.
    pub(super) fn with_workers(
        plan: &'a Plan,
        schedule: &'a Schedule,
        observer: &'a dyn Observer,
        writer: Option<&'a ShardWriter<'a>>,
        kept: &'a Kept,
        workers: Vec<Worker>,
    ) -> Self {
        Self {
            notes: writer.map(|keeper| Notes::of_merge(plan, keeper, &kept.under_way)),
            plan,
            schedule,
            observer,
            writer,
            kept,
            ties_elsewhere: HashMap::new(),
            workers,
            kept_reads: 0,
            thresholds: Thresholds::new(plan.models(), plan.selects()),
            differing: BTreeSet::new(),
            by_shard: false,
            spool: None,
            site: None,
            guesses: false,
            looked: false,
            least: Vec::new(),
            floors: Vec::new(),
        }
    }

    /// Does everything: units first (what can be wrong with the data shows before anything is written), then tensors
    /// that need no thresholds.
    pub(super) fn run(&mut self) -> Result<()> {
        self.announce_all();
        self.units()?;
        self.forget_kept();
        self.direct()
    }

    pub(super) fn announce_all(&self) {
        if !self.announces_passes() {
            self.observer.stage("merge", self.schedule.passes.iter().map(PassSummary::bytes_used).sum());
            self.observer.advance(self.kept.tally.bytes_read);
        }
    }

    pub(super) fn units(&mut self) -> Result<()> {
        let mut solo = Vec::new();
        let (schedule, kept) = (self.schedule, self.kept);
        for unit in &schedule.units {
            if kept.skips(unit) {
                continue;
            }
            if let Some(known) = kept.unit(self.plan, unit) {
                self.keeping(unit, false, |passes| passes.known_unit(unit, known))?;
            } else if unit.kind == UnitKind::Solo && self.kept.taken_guess(unit.tensors[0]).is_none() {
                solo.push(unit);
            } else {
                self.keeping(unit, true, |passes| passes.shared_unit(unit))?;
            }
        }
        self.solo_units(&solo)
    }

    /// Counts so many bytes as read, by an earlier attempt.
    pub(super) fn take_over_reads(&mut self, bytes: u64) {
        self.kept_reads = self.kept_reads.saturating_add(bytes);
    }

    /// Tensor bytes that this run read.
    pub(super) fn read_here(&self) -> u64 {
        self.workers.iter().map(|worker| worker.tally.bytes_read).sum()
    }

    pub(super) fn writer(&self) -> &'a ShardWriter<'a> {
        self.writer.expect("passes that have results have somewhere to put them")
    }

    /// What all workers counted, and what is kept of earlier attempts.
    pub(super) fn tally(&self) -> Tally {
        let mut sum = self.kept.tally.clone();
        let in_vain = self.kept.missed().unwrap_or_default();
        sum.bytes_read = sum.bytes_read.saturating_add(self.kept_reads).saturating_add(in_vain);
        self.workers.iter().for_each(|worker| sum.add(&worker.tally));
        sum
    }

    /// Whether passes follow each other over the whole model, so that each is worth a stage of its own. Otherwise there
    /// is one stage that counts everything read.
    pub(super) fn announces_passes(&self) -> bool {
        !self.by_shard && matches!(&self.schedule.units[..], [unit] if unit.kind == UnitKind::Streamed)
    }

    pub(super) fn announce(&self, stage: &str, bytes: u64) {
        if self.announces_passes() {
            self.observer.stage(stage, bytes);
        }
    }

    pub(super) fn pass_bytes(&self, name: &str) -> u64 {
        self.schedule.passes.iter().filter(|p| p.name == name).map(PassSummary::bytes_used).sum()
    }

    /// A unit that all workers share.
    fn shared_unit(&mut self, unit: &Unit) -> Result<()> {
        let mut resident = self.hold(unit);
        let goals = self.plan.goals(unit);
        let before = self.tally().bytes_read;
        let start = match self.begin_with_guess(unit, &goals, &mut resident)? {
            Beginning::Merged => {
                self.give_back(resident);
                return Ok(());
            }
            Beginning::Search(start) => start.map(|start| (start, before)),
        };
        let found = self.shared_thresholds(unit, &goals, &mut resident, start)?;
        let cuts = cuts(self.plan, &goals, &found);
        self.keep_for(&found)?;
        let facts = self.facts(unit, &mut resident, &cuts)?;
        let majority = self.majority(unit, &mut resident, &cuts, &facts)?;
        let thresholds = UnitThresholds::new(unit, &goals, &found);
        self.writer().keep(UnitDone {
            tensor: thresholds.tensor,
            found: thresholds.found.clone(),
            majority: majority as i8,
            bytes_read: self.tally().bytes_read - before,
            facts: facts.clone(),
        })?;
        self.announce("merge", self.pass_bytes("merge"));
        self.merge_unit(unit, &mut resident, &cuts, thresholds, &Known { majority, facts })?;
        self.give_back(resident);
        Ok(())
    }

    /// A unit whose thresholds an earlier attempt found, and a part of which it may have merged.
    fn known_unit(&mut self, unit: &Unit, known: &UnitDone) -> Result<()> {
        let found: Vec<_> = known.found.iter().map(|found| found.map(|(threshold, _)| threshold)).collect();
        let goals = self.plan.goals(unit);
        let cuts = cuts(self.plan, &goals, &found);
        let thresholds = UnitThresholds::new(unit, &goals, &found);
        self.keep_for(&found)?;
        self.announce("merge", self.pass_bytes("merge"));
        // One stage for all passes counts the reads of the first ones too.
        let done = if self.announces_passes() { self.kept.tally.bytes_read } else { known.bytes_read };
        self.observer.advance(done);
        self.looked = true;
        self.kept_reads = self.kept_reads.saturating_add(known.bytes_read);
        // What was in memory when the thresholds were found is read again: reads that an undisturbed run does not make.
        let rereads = unit.kind == UnitKind::Resident;
        self.workers.iter_mut().for_each(|worker| worker.rereads = rereads);
        let known = Known { majority: f32::from(known.majority), facts: known.facts.clone() };
        self.merge_unit(unit, &mut None, &cuts, thresholds, &known)?;
        self.workers.iter_mut().for_each(|worker| worker.rereads = false);
        Ok(())
    }

    /// Slots for all chunks of a resident unit: its own in model scope; in tensor scope the workers', which are large
    /// enough.
    pub(super) fn hold(&mut self, unit: &Unit) -> Option<Resident> {
        if unit.kind != UnitKind::Resident {
            return None;
        }
        let slots = match self.plan.per_tensor() {
            false => Schedule::chunks(self.plan, &unit.tensors, unit.chunk_elements)
                .map(|chunk| Slot::for_chunk(self.plan, chunk))
                .collect(),
            true => self.workers.iter_mut().map(|w| std::mem::take(&mut w.slot)).collect(),
        };
        Some(Resident { slots, loaded: false })
    }

    pub(super) fn give_back(&mut self, resident: Option<Resident>) {
        if let (Some(resident), true) = (resident, self.plan.per_tensor()) {
            for (worker, slot) in self.workers.iter_mut().zip(resident.slots) {
                worker.slot = slot;
            }
        }
    }

    /// Runs `work` on every chunk of `unit`, loaded. A failure releases those who wait in `chain`.
    pub(super) fn each_chunk(
        &mut self,
        unit: &Unit,
        resident: &mut Option<Resident>,
        wanted: Wanted<'_>,
        chain: Option<&dyn Ordered>,
        work: impl Fn(&mut Worker, usize, Loaded<'_>) -> Result<()> + Sync,
    ) -> Result<()> {
        let chunks = self.kept.left(self.plan, &unit.tensors, unit.chunk_elements);
        self.each_of(chunks, unit, resident, wanted, chain, work)
    }

    /// The same for some chunks of `unit`.
    pub(super) fn each_of(
        &mut self,
        chunks: impl Iterator<Item = Chunk>,
        unit: &Unit,
        resident: &mut Option<Resident>,
        wanted: Wanted<'_>,
        chain: Option<&dyn Ordered>,
        work: impl Fn(&mut Worker, usize, Loaded<'_>) -> Result<()> + Sync,
    ) -> Result<()> {
        let plan = self.plan;
        let loaded = resident.as_ref().is_some_and(|r| r.loaded);
        // A unit held in memory is loaded with all that later passes need.
        let wanted = if resident.is_some() { Wanted::All } else { wanted };
        let mut slots = resident.as_mut().map(|r| r.slots.iter_mut());
        let items = chunks.map(move |chunk| Item { chunk, slot: slots.as_mut().and_then(Iterator::next) });
        let observer = self.observer;
        // The first pass is the one that leaves what later ones find.
        let first = matches!(wanted, Wanted::TaskVectors(_)) || !plan.needs().looks.is_empty();
        let counts = first && !self.looked;
        let spool = self.spool.map(|spool| Use { spool, counts });
        let ahead = |item: &Item<'_>| {
            if !loaded {
                let kept = |piece: &Piece| self.spool.is_some_and(|spool| spool.holds(item.chunk, *piece));
                prefetch_pieces(plan, item.chunk, plan.pieces(item.chunk.tensor, wanted).filter(|piece| !kept(piece)));
            }
        };
        let lookahead = lookahead(self.schedule, unit.chunk_elements);
        pool::run(&mut self.workers, items, lookahead, ahead, |worker, ordinal, item| {
            let chunk = item.chunk;
            let pieces = plan.pieces(chunk.tensor, wanted);
            let mut pending = chain.map(|chain| Pending::new(chain, ordinal));
            let result = match item.slot {
                Some(slot) if loaded => {
                    worker.begin();
                    observer.go_on().and_then(|()| work(worker, ordinal, Loaded { plan, chunk, slot }))
                }
                Some(slot) => worker
                    .load_into(slot, plan, chunk, pieces, observer)
                    .and_then(|()| work(worker, ordinal, Loaded { plan, chunk, slot })),
                None => match spool {
                    Some(spool) => worker.load_kept(spool, chunk, pieces, |worker, data| work(worker, ordinal, data)),
                    None => worker.load(plan, chunk, pieces, observer, |worker, data| work(worker, ordinal, data)),
                },
            };
            if let (Ok(()), Some(pending)) = (&result, &mut pending) {
                pending.complete();
            }
            result
        })?;
        if let Some(resident) = resident {
            resident.loaded = true;
        }
        Ok(())
    }

    /// Where each model's search for its threshold starts: at a bracket from a sample, which is read on its own where the
    /// unit is not held in memory.
    pub(super) fn selectors(
        &mut self,
        unit: &Unit,
        resident: &mut Option<Resident>,
        trim: &Trim,
        goals: &[Goal],
    ) -> Result<Vec<Option<Selector>>> {
        let bins = self.schedule.sketch_bins;
        if trim.threshold == ThresholdKind::Sketch {
            // What is to be kept for the merge is all that a bracket is for.
            let selectors = coarse_selectors(goals);
            if !self.spool.is_some_and(Spool::has_bounds) {
                return Ok(selectors);
            }
            return Ok(not_below_what_is_likely(&self.probe(unit, goals)?, goals, selectors));
        }
        if resident.is_some() {
            let samples = self.sample(unit, resident, goals)?;
            return Ok(sampled_selectors(samples, goals, bins));
        }
        let probes = self.probe(unit, goals)?;
        let selectors = probed_selectors(&probes, goals, bins);
        let keeps = self.spool.is_some_and(Spool::has_bounds);
        Ok(if keeps { not_below_what_is_likely(&probes, goals, selectors) } else { selectors })
    }

    /// Loads a resident unit, and samples the keys of the models that need a threshold.
    pub(super) fn sample(
        &mut self,
        unit: &Unit,
        resident: &mut Option<Resident>,
        goals: &[Goal],
    ) -> Result<Vec<Vec<u32>>> {
        let stride = sample_stride(unit.elements);
        let searched = self.plan.searched(goals);
        let samples = Mutex::new(vec![Vec::new(); searched.len()]);
        self.each_chunk(unit, resident, Wanted::All, None, |worker, ordinal, data| {
            for &(model, piece) in data.merge().models {
                if searched[model as usize] {
                    let keys = worker.keys(data, (model as usize, piece), (ordinal, stride))?;
                    let sample = &mut lock(&samples)[model as usize];
                    // Uneven chunks can give more than planned: a sample need not be complete.
                    let room = SAMPLE_ELEMENTS as usize - sample.len();
                    sample.extend_from_slice(&keys[..room.min(keys.len())]);
                }
            }
            Ok(())
        })?;
        Ok(samples.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// Samples a streamed unit: one probe per model, empty for those that need no threshold.
    pub(super) fn probe(&mut self, unit: &Unit, goals: &[Goal]) -> Result<Vec<Probe>> {
        let plan = self.plan;
        let models = plan.searched(goals);
        let brackets: Vec<_> = models.iter().map(|wanted| wanted.then_some(Bracket::COARSE)).collect();
        // A guess takes more looks.
        let looks = if self.guesses { 1 } else { self.schedule.probe_looks(self.plan) };
        self.announce("probe", self.pass_bytes("probe") / looks);
        let notes = self.notes_of(unit);
        let mut probes = vec![Probe::default(); plan.models()];
        let done = self.probed(unit, &models, &mut probes);
        let probes = Mutex::new((probes, Vec::new(), Instant::now()));
        let (observer, keep_after) = (self.observer, self.schedule.keep_after);
        let schedule = self.schedule;
        pool::run(
            &mut self.workers,
            (0..PROBE_GROUPS).filter(|&group| !done[group]),
            0,
            |_| (),
            |worker, _, group| {
                worker.set_brackets(&brackets);
                let (wanted, before) = (Wanted::TaskVectors(&models), worker.tally.bytes_read);
                let blocks = || Schedule::probe_blocks(plan, unit).skip(group).step_by(PROBE_GROUPS);
                let see = |worker: &mut Worker, data: Loaded<'_>| worker.sketch(data, &brackets);
                load_blocks(worker, (plan, schedule), blocks, wanted, observer, see)?;
                let (probes, unkept, kept) = &mut *lock(&probes);
                for (probe, sketch) in probes.iter_mut().zip(&worker.sketches).filter(|(_, s)| s.bins() > 0) {
                    probe.add_group(sketch);
                }
                let Some(notes) = notes else { return Ok(()) };
                unkept.push((group as u32, worker.tally.bytes_read - before));
                if kept.elapsed() < keep_after {
                    return Ok(());
                }
                *kept = Instant::now();
                notes.keep_groups(unit, std::mem::take(unkept), probes)
            },
        )?;
        Ok(probes.into_inner().unwrap_or_else(PoisonError::into_inner).0)
    }

    /// Merges what is left of the unit, and records its thresholds with what survived in all of it.
    pub(super) fn merge_unit(
        &mut self,
        unit: &Unit,
        resident: &mut Option<Resident>,
        cuts: &[Cut],
        thresholds: UnitThresholds,
        known: &Known,
    ) -> Result<()> {
        let (plan, writer, kept) = (self.plan, self.writer(), self.kept);
        let before = self.tally().kept;
        let (kept_ties, elsewhere) = (kept.ties_before(plan, &unit.tensors), &std::mem::take(&mut self.ties_elsewhere));
        let chain = TieChain::of(cuts.len());
        self.each_chunk(unit, resident, Wanted::All, Some(&chain), |worker, ordinal, data| {
            let cuts = tensor_cuts(plan, data.chunk, cuts, &known.facts);
            let (mut seen, own) = ties_before(worker, &chain, ordinal, data, &cuts)?;
            add_ties(elsewhere, data.chunk, &mut seen);
            if add_ties(&kept_ties, data.chunk, &mut seen) {
                kept.add_ties_in_tensor(data.chunk, &mut seen);
            }
            let mut out = writer.chunk(data.chunk);
            worker.merge(data, &cuts, &mut seen, known, &mut |offset, bytes| out.write(offset, bytes))?;
            out.done(worker.counted(), own, false, None)
        })?;
        let mut survivors = difference(&self.tally().kept, &before);
        self.kept.add_survivors(&unit.tensors, &mut survivors);
        self.thresholds.record(thresholds, &survivors);
        Ok(())
    }

    /// Copies, and merges that need no thresholds.
    pub(super) fn direct(&mut self) -> Result<()> {
        let (plan, writer, observer) = (self.plan, self.writer(), self.observer);
        let schedule = self.schedule;
        let no_cuts = vec![Cut::NonZero; plan.models()];
        let differing = Mutex::new(self.kept.differing.clone());
        let lookahead = lookahead(self.schedule, self.schedule.chunk_elements);
        // Tensors that hold much in memory while they are read go one after the other.
        let alone = |&tensor: &u32| plan.is_exclusive(tensor);
        for tensors in schedule.direct.chunk_by(|a, b| !alone(a) && !alone(b)) {
            let chunks = self.kept.left(plan, tensors, schedule.chunk_elements);
            pool::run(
                &mut self.workers,
                chunks,
                lookahead,
                |&chunk| _ = prefetch(plan, chunk, Wanted::All),
                |worker, _, chunk| {
                    worker.load(plan, chunk, plan.pieces(chunk.tensor, Wanted::All), observer, |worker, data| {
                        let mut out = writer.chunk(chunk);
                        let mut sink = |offset, bytes: &[u8]| out.write(offset, bytes);
                        let mut same = true;
                        match &plan.tensors[chunk.tensor as usize].action {
                            Action::Copy { source, compared } if plan.is_raw_copy(chunk.tensor) => {
                                same = worker.copy(data.slot, *source, compared, &mut sink, chunk.start)?;
                                if !same {
                                    lock(&differing).insert(chunk.tensor);
                                }
                            }
                            Action::Copy { source, .. } => worker.convert(data, *source, &mut sink)?,
                            Action::Merge { .. } => {
                                let cuts = tensor_cuts(plan, chunk, &no_cuts, &[]);
                                worker.merge(data, &cuts, &mut vec![0; cuts.len()], &Known::default(), &mut sink)?;
                            }
                        }
                        out.done(worker.counted(), Vec::new(), !same, None)
                    })
                },
            )?;
        }
        self.differing = differing.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(())
    }
}

/// Where each search starts, from a sample of each model's keys.
pub(super) fn sampled_selectors(mut samples: Vec<Vec<u32>>, goals: &[Goal], bins: usize) -> Vec<Option<Selector>> {
    let models = samples.len();
    let selector = |(at, goal): (usize, &Goal)| match *goal {
        Goal::Keep { keep, .. } => {
            let bounds = bounds_of_sample(&mut samples[at % models], SAMPLE_BLOCK, goal.fraction()?);
            Some(Selector::exact(keep, Bracket::within(bounds, bins), bins))
        }
        Goal::All | Goal::Nothing => None,
    };
    goals.iter().enumerate().map(selector).collect()
}

/// Where each search starts, from a probe of each model.
pub(super) fn probed_selectors(probes: &[Probe], goals: &[Goal], bins: usize) -> Vec<Option<Selector>> {
    let selector = |(probe, goal): (&Probe, &Goal)| match *goal {
        Goal::Keep { keep, .. } => Some(Selector::exact(keep, probe.bracket(goal.fraction()?, bins), bins)),
        Goal::All | Goal::Nothing => None,
    };
    probes.iter().cycle().zip(goals).map(selector).collect()
}

/// Lets the searches look for what their brackets missed where it is likely first: in what is kept of what was downloaded.
pub(super) fn not_below_what_is_likely(
    probes: &[Probe],
    goals: &[Goal],
    selectors: Vec<Option<Selector>>,
) -> Vec<Option<Selector>> {
    let least = |(probe, goal): (&Probe, &Goal)| goal.fraction().map_or(0, |fraction| probe.least(fraction));
    let least = probes.iter().cycle().zip(goals).map(least);
    selectors.into_iter().zip(least).map(|(selector, least)| selector.map(|s| s.not_below(least))).collect()
}

/// Adds the ties before the chunk's tensor to `seen`; tells if any are listed.
pub(super) fn add_ties(before: &HashMap<u32, TieCounts>, chunk: Chunk, seen: &mut TieCounts) -> bool {
    let Some(before) = before.get(&chunk.tensor) else { return false };
    seen.iter_mut().zip(before).for_each(|(seen, before)| *seen += before);
    true
}

/// What was added to each count.
fn difference(now: &[u64], before: &[u64]) -> Vec<u64> {
    now.iter().zip(before).map(|(now, before)| now - before).collect()
}

/// The whole of a unit that is one tensor.
pub(super) fn whole(unit: &Unit) -> Chunk {
    Chunk { tensor: unit.tensors[0], start: 0, count: unit.elements }
}

/// Ties before the chunk (of those that this run does) and in it, per model, where a cut goes by position.
pub(super) fn ties_before(
    worker: &mut Worker,
    chain: &TieChain,
    ordinal: usize,
    data: Loaded<'_>,
    cuts: &[Cut],
) -> Result<(TieCounts, TieCounts)> {
    if !cuts.iter().any(|cut| matches!(cut, Cut::Lowest { .. })) {
        return Ok((vec![0; cuts.len()], vec![0; cuts.len()]));
    }
    let own = worker.count_ties(data, cuts)?;
    Ok((chain.pass(ordinal, &own)?, own))
}

/// Announces what `wanted` is of `chunk`: so many bytes.
pub(super) fn prefetch(plan: &Plan, chunk: Chunk, wanted: Wanted<'_>) -> u64 {
    prefetch_pieces(plan, chunk, plan.pieces(chunk.tensor, wanted))
}

pub(super) fn prefetch_pieces(plan: &Plan, chunk: Chunk, pieces: impl Iterator<Item = Piece>) -> u64 {
    let announce = |piece| {
        let (file, offset, bytes) = locate(plan, chunk, piece);
        file.prefetch(offset, bytes);
        bytes
    };
    pieces.map(announce).sum()
}

/// How many chunks to announce ahead: about [`PREFETCH_BYTES`] of input, or what there is memory for where that is fetched
/// from a network.
pub(super) fn lookahead(schedule: &Schedule, chunk_elements: u64) -> usize {
    let chunk_bytes = chunk_elements.max(MIN_CHUNK_ELEMENTS) * schedule.widths.iter().sum::<u64>().max(1);
    match schedule.ahead_bytes {
        0 => (PREFETCH_BYTES / chunk_bytes).clamp(1, 64) as usize,
        bytes => (bytes / chunk_bytes).max(1) as usize,
    }
}

/// How much to announce ahead of units that are loaded whole, and of what: bytes where they come from a network, else units.
pub(super) fn units_ahead(schedule: &Schedule) -> (u64, Weight) {
    match schedule.ahead_bytes {
        0 => (1, |_| 1),
        bytes => (bytes, |bytes| bytes),
    }
}

/// What a unit of so many bytes weighs; see [`units_ahead`].
pub(super) type Weight = fn(u64) -> u64;

/// Shows `see` the `blocks` of a sample, some announced ahead where they come from a network. They are read again in all of
/// the data: no hash is taken of them.
pub(super) fn load_blocks<I: Iterator<Item = Chunk>>(
    worker: &mut Worker,
    (plan, schedule): (&Plan, &Schedule),
    blocks: impl Fn() -> I,
    wanted: Wanted<'_>,
    observer: &dyn Observer,
    see: impl Fn(&mut Worker, Loaded<'_>) -> Result<()>,
) -> Result<()> {
    let (ahead, reads, mut next) = (probes_ahead(schedule), worker.reads.take(), blocks());
    for (index, block) in blocks().enumerate() {
        let announced = if index == 0 { ahead } else { ahead.min(1) };
        next.by_ref().take(announced).for_each(|block| _ = prefetch(plan, block, wanted));
        worker.load(plan, block, plan.pieces(block.tensor, wanted), observer, &see)?;
    }
    worker.reads = reads;
    Ok(())
}

/// How many blocks of a probe each worker announces ahead: a network is slow to answer, and a disk is not.
pub(super) fn probes_ahead(schedule: &Schedule) -> usize {
    if schedule.ahead_bytes > 0 { PROBES_AHEAD } else { 0 }
}

/// Locks even if another worker panicked: that panic is on its way to the caller.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
