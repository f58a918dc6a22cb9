//! What the parts of a merge find out together: thresholds that hold for the whole model, ties before each tensor, and
//! the majority of signs.
//!
//! - Each look is a number of files that add up: the probe's groups, then a sketch per part, as often as a bracket misses;
//!   then, where they matter, ties per tensor and votes per part.
//! - Where a search starts and goes on follows from these files alone, so all parts search alike.

use std::collections::HashMap;
use std::sync::Mutex;

use super::super::cut::{Cut, TieCounts};
use super::super::kept::Kept;
use super::super::passes::{Passes, lock, not_below_what_is_likely, prefetch, probed_selectors, probes_ahead};
use super::super::pool;
use super::super::records::{self, Entry, UnitDone};
use super::super::select::{UnitThresholds, coarse_selectors, cuts, observe, tensor_cuts};
use super::super::shard_hash::Digest;
use super::super::spool::least_of;
use super::super::under_way::{Notes, Stretches, UnderWay, add};
use super::super::worker::Known;
use super::page::Page;
use super::{Desk, file_of, files_of};
use crate::error::{Error, Result};
use crate::limits::PROBE_GROUPS;
use crate::plan::{Downloads, Goal, Schedule, ThresholdKind, Unit, Wanted};
use crate::sketch::{Bracket, MagnitudeSketch, Probe, Selector, Threshold};

/// The file that holds the thresholds once they are found.
const FOUND: &str = "thresholds";

/// The looks of one job, from one part's desk. Without a unit that all parts share there is nothing to look for.
pub(super) struct Looks<'a> {
    desk: &'a Desk<'a>,
    /// The whole model's unit, and each model's goal in it.
    shared: Option<(Unit, Vec<Goal>)>,
}

/// What all looks found.
pub(super) struct Found {
    unit: UnitDone,
    pub cuts: Vec<Cut>,
    /// Per tensor of this part: ties before it in tensors of other parts.
    pub ties_elsewhere: HashMap<u32, TieCounts>,
    /// Tensor bytes that this process read to find it.
    pub bytes_read_here: u64,
}

impl Found {
    pub(super) fn thresholds(&self) -> UnitThresholds {
        UnitThresholds { tensor: self.unit.tensor, found: self.unit.found.clone() }
    }

    pub(super) fn known(&self) -> Known {
        Known { majority: f32::from(self.unit.majority), facts: Vec::new() }
    }
}

impl<'a> Looks<'a> {
    pub(super) fn new(desk: &'a Desk<'a>) -> Self {
        let whole = desk.schedule.units.first().filter(|_| !desk.plan.per_tensor());
        Self { desk, shared: whole.map(|unit| (unit.clone(), desk.plan.goals(unit))) }
    }

    /// The unit, where its thresholds have to be searched.
    fn searched(&self) -> Option<(&Unit, &[Goal])> {
        let (unit, goals) = self.shared.as_ref()?;
        goals.iter().any(Goal::needs_threshold).then_some((unit, goals))
    }

    /// Counts this part's magnitudes for the first time, unless that is done; returns the bytes read.
    pub(super) fn sketch_own(&self) -> Result<u64> {
        let Some((unit, goals)) = self.searched() else { return Ok(0) };
        let (board, part) = (&self.desk.board, self.desk.part);
        let name = part.file(&sketch_name(0));
        if board.has(FOUND) || board.has(&name) {
            return Ok(0);
        }
        self.with_passes(|passes| {
            let selectors = self.first_selectors(passes, unit, goals)?;
            passes.demand_least(&selectors)?;
            // Parts that began earlier may be at work on it already.
            board.share(&[name], 0, self.desk.observer, |_| self.sketch(passes, part.index, (0, &selectors)))
        })
    }

    /// Whether this part's counts are there, if any are needed.
    pub(super) fn sketched(&self) -> bool {
        let board = &self.desk.board;
        self.searched().is_none() || board.has(FOUND) || board.has(&self.desk.part.file(&sketch_name(0)))
    }

    /// An error if some part's first counts are missing.
    pub(super) fn must_be_sketched(&self) -> Result<()> {
        let (board, count) = (&self.desk.board, self.desk.part.count);
        if self.searched().is_none() || board.has(FOUND) {
            return Ok(());
        }
        let names = files_of(&sketch_name(0), count);
        let missing: Vec<usize> = (0..count).filter(|&index| !board.has(&names[index])).collect();
        match &missing[..] {
            [] => Ok(()),
            missing => Err(Error::failed(format!("not sketched yet: {}", listed(missing, count)))
                .at(&self.desk.job.out)
                .help(format!("run them first: tiesmith run JOB --stage sketch --part {}/{count}", missing[0] + 1))),
        }
    }

    /// Completes all looks, doing what nobody else does; `None` if there are none.
    pub(super) fn complete(&self) -> Result<Option<Found>> {
        let Some((unit, goals)) = &self.shared else { return Ok(None) };
        let board = &self.desk.board;
        let mut found = None;
        let bytes_read_here = self.with_passes(|passes| {
            if !board.has(FOUND) {
                let thresholds = self.thresholds(passes, unit, goals)?;
                // Ties and votes are counted by all, the result is written down by one.
                let cuts = cuts(self.desk.plan, goals, &thresholds);
                passes.least = least_of(&thresholds, self.desk.plan.models());
                let majority = self.majority(passes, unit, &cuts)?;
                let thresholds = UnitThresholds::new(unit, goals, &thresholds);
                let done = UnitDone {
                    tensor: thresholds.tensor,
                    found: thresholds.found,
                    majority,
                    bytes_read: 0,
                    facts: Vec::new(),
                };
                board.share(&[FOUND.to_owned()], 0, self.desk.observer, |_| {
                    Ok(records::encode(std::slice::from_ref(&Entry::Unit(done.clone()))))
                })?;
            }
            let done = self.read_found()?;
            let thresholds: Vec<_> = done.found.iter().map(|found| found.map(|(threshold, _)| threshold)).collect();
            let cuts = cuts(self.desk.plan, goals, &thresholds);
            passes.least = least_of(&thresholds, self.desk.plan.models());
            let ties_elsewhere = self.ties_elsewhere(passes, unit, &cuts, self.desk.part.index)?;
            found = Some(Found { unit: done, cuts, ties_elsewhere, bytes_read_here: 0 });
            Ok(())
        })?;
        Ok(found.map(|found| Found { bytes_read_here, ..found }))
    }

    fn read_found(&self) -> Result<UnitDone> {
        let board = &self.desk.board;
        let entries = records::decode(&board.expect(FOUND)?);
        match entries.as_deref() {
            Some([Entry::Unit(unit)]) if Kept::fits_unit(self.desk.plan, unit) => Ok(unit.clone()),
            _ => Err(board.senseless(FOUND)),
        }
    }

    /// Runs `work` with workers that only look; returns the bytes they read.
    fn with_passes(&self, work: impl FnOnce(&mut Passes<'_>) -> Result<()>) -> Result<u64> {
        let kept = Kept::new(self.desk.plan);
        let schedule = self.desk.schedule_of(self.desk.part.index);
        let mut passes = Passes::new(self.desk.plan, &schedule, self.desk.observer, None, &kept);
        work(&mut passes)?;
        Ok(passes.tally().bytes_read)
    }

    /// The tensors of part `index` in `unit`.
    fn unit_of(&self, index: usize, unit: &Unit) -> Unit {
        let own = &self.desk.plan.shares(self.desk.part.count)[index];
        let tensors = unit.tensors.iter().copied().filter(|&t| self.desk.plan.is_within(t, own)).collect();
        Unit { tensors, ..unit.clone() }
    }

    /// Runs `work` on the unit of part `index`, with what is kept for that part of what is downloaded; `searches` says that it is
    /// looked at for the first time. Passes that make file `name` keep beside it what they find out on the way. They have read
    /// nothing yet.
    fn at_part<R>(
        &self,
        passes: &mut Passes<'_>,
        (index, searches): (usize, bool),
        name: Option<&str>,
        work: impl FnOnce(&mut Passes<'_>, &Unit) -> Result<R>,
    ) -> Result<R> {
        let (desk, kept) = (self.desk, Kept::new(self.desk.plan));
        let (unit, _) = self.shared.as_ref().expect("there is something to look for");
        let schedule = desk.schedule_of(index);
        let spool = desk.spool(index, &schedule, searches)?;
        spool.as_ref().map_or(Ok(()), |spool| spool.demand(&passes.least))?;
        let page = name.map(|name| Page::open(&desk.board, name));
        let left = page.as_ref().map_or_else(|| Ok(UnderWay::default()), Page::left)?;
        let read_before: Vec<u64> =
            passes.workers.iter_mut().map(|w| std::mem::take(&mut w.tally.bytes_read)).collect();
        let workers = std::mem::take(&mut passes.workers);
        let mut own = Passes::with_workers(desk.plan, &schedule, desk.observer, None, &kept, workers);
        own.ties_elsewhere = std::mem::take(&mut passes.ties_elsewhere);
        own.least.clone_from(&passes.least);
        own.spool = spool.as_ref();
        own.notes =
            page.as_ref().map(|page| Notes { keeper: page, left: &left, of: Digest::default(), more_to_come: false });
        let result = work(&mut own, &self.unit_of(index, unit));
        passes.workers = own.workers;
        passes.workers.iter_mut().zip(read_before).for_each(|(worker, before)| worker.tally.bytes_read += before);
        if let Some(page) = page.filter(|_| result.is_ok()) {
            page.clear()?;
        }
        result
    }

    fn bytes_of(&self, index: usize, pass: &str) -> u64 {
        self.desk.schedule_of(index).passes.iter().filter(|p| p.name == pass).map(|p| p.bytes_read).sum()
    }

    /// Every model's threshold.
    fn thresholds(&self, passes: &mut Passes<'_>, unit: &Unit, goals: &[Goal]) -> Result<Vec<Option<Threshold>>> {
        if self.searched().is_none() {
            return Ok(vec![None; goals.len()]);
        }
        let (desk, parts) = (self.desk, self.desk.part.count);
        let mut selectors = self.first_selectors(passes, unit, goals)?;
        for round in 0.. {
            let brackets = brackets(&selectors);
            if brackets.iter().all(Option::is_none) {
                break;
            }
            passes.demand_least(&selectors)?;
            let names = files_of(&sketch_name(round), parts);
            let search = (round, &selectors[..]);
            desk.board.share(&names, desk.part.index, desk.observer, |part| self.sketch(passes, part, search))?;
            observe(&mut selectors, &self.sum(&names, &brackets)?);
        }
        Ok(selectors.iter().map(|s| s.as_ref().and_then(Selector::threshold)).collect())
    }

    /// Where the searches start.
    fn first_selectors(&self, passes: &mut Passes<'_>, unit: &Unit, goals: &[Goal]) -> Result<Vec<Option<Selector>>> {
        let (plan, desk) = (self.desk.plan, self.desk);
        let coarse = plan.trim.as_ref().is_some_and(|trim| trim.threshold == ThresholdKind::Sketch);
        let coarse = coarse.then(|| coarse_selectors(goals));
        // All parts must agree on what is below what is kept, whether the memory of each is enough to keep it or not.
        let keeps = plan.is_remote() && desk.job.downloads != Downloads::Forgotten;
        if let Some(selectors) = coarse.as_ref().filter(|_| !keeps) {
            return Ok(selectors.clone());
        }
        let names: Vec<String> = (1..=PROBE_GROUPS).map(|group| format!("probe-{group}")).collect();
        let first = desk.part.index % PROBE_GROUPS;
        desk.board.share(&names, first, desk.observer, |group| self.probe(passes, unit, goals, group))?;
        let mut probes = vec![Probe::default(); plan.models()];
        for name in &names {
            let bytes = desk.board.expect(name)?;
            let mut rest = bytes.get(8..).ok_or_else(|| desk.board.senseless(name))?;
            for probe in &mut probes {
                let group = MagnitudeSketch::decode(&mut rest).ok_or_else(|| desk.board.senseless(name))?;
                if group.bins() > 0 {
                    probe.add_group(&group);
                }
            }
        }
        let selectors = coarse.unwrap_or_else(|| probed_selectors(&probes, goals, desk.job.sketch_bins));
        Ok(if plan.is_remote() { not_below_what_is_likely(&probes, goals, selectors) } else { selectors })
    }

    /// One group of the probe's blocks, over the whole model.
    fn probe(&self, passes: &mut Passes<'_>, unit: &Unit, goals: &[Goal], group: usize) -> Result<Vec<u8>> {
        let (plan, observer) = (self.desk.plan, self.desk.observer);
        observer.stage(
            "probe",
            self.desk.schedule.passes.iter().filter(|p| p.name == "probe").map(|p| p.bytes_read).sum::<u64>()
                / (PROBE_GROUPS as u64 * self.desk.schedule.probe_looks(plan)),
        );
        let models = plan.searched(goals);
        let brackets: Vec<_> = models.iter().map(|wanted| wanted.then_some(Bracket::COARSE)).collect();
        let before = passes.tally().bytes_read;
        passes.workers.iter_mut().for_each(|worker| worker.set_brackets(&brackets));
        let blocks = Schedule::probe_blocks(plan, unit).skip(group).step_by(PROBE_GROUPS);
        pool::run(
            &mut passes.workers,
            blocks,
            probes_ahead(&self.desk.schedule),
            |&block| {
                if self.desk.schedule.ahead_bytes > 0 {
                    prefetch(plan, block, Wanted::TaskVectors(&models));
                }
            },
            |worker, _, block| {
                let pieces = plan.pieces(block.tensor, Wanted::TaskVectors(&models));
                worker.load(plan, block, pieces, observer, |worker, data| worker.sketch(data, &brackets))
            },
        )?;
        let sum = passes.sum_of_sketches();
        Ok(encoded(passes.tally().bytes_read - before, &sum))
    }

    /// The counts of one part.
    fn sketch(
        &self,
        passes: &mut Passes<'_>,
        part: usize,
        (round, selectors): (u32, &[Option<Selector>]),
    ) -> Result<Vec<u8>> {
        let (_, goals) = self.shared.as_ref().expect("there is something to look for");
        self.desk.observer.stage("sketch", self.bytes_of(part, "sketch"));
        let name = file_of(&sketch_name(round), part, self.desk.part.count);
        self.at_part(passes, (part, round == 0), Some(&name), |passes, unit| {
            let sketches = passes.sketch_part(unit, goals, (round, selectors))?;
            Ok(encoded(passes.tally().bytes_read, &sketches))
        })
    }

    /// What the parts' counts add up to.
    fn sum(&self, names: &[String], brackets: &[Option<Bracket>]) -> Result<Vec<MagnitudeSketch>> {
        let board = &self.desk.board;
        let mut sums: Vec<_> = brackets.iter().map(|b| MagnitudeSketch::new(b.unwrap_or(Bracket::NONE))).collect();
        for name in names {
            let bytes = board.expect(name)?;
            let mut rest = bytes.get(8..).ok_or_else(|| board.senseless(name))?;
            for sum in &mut sums {
                let sketch = MagnitudeSketch::decode(&mut rest).filter(|sketch| sum.fits(sketch));
                sum.merge(&sketch.ok_or_else(|| board.senseless(name))?);
            }
        }
        Ok(sums)
    }

    /// Ties of all other parts' tensors before each tensor of part `part`.
    fn ties_elsewhere(
        &self,
        passes: &mut Passes<'_>,
        unit: &Unit,
        cuts: &[Cut],
        part: usize,
    ) -> Result<HashMap<u32, TieCounts>> {
        let (plan, desk) = (self.desk.plan, self.desk);
        if !cuts.iter().any(|cut| matches!(cut, Cut::Lowest { .. })) {
            return Ok(HashMap::new());
        }
        let names = files_of("ties", desk.part.count);
        desk.board.share(&names, desk.part.index, desk.observer, |part| {
            self.count_ties(passes, cuts, (part, &names[part]))
        })?;
        let mut ties: HashMap<u32, TieCounts> = HashMap::new();
        for name in &names {
            let listed = listed_ties(&desk.board.expect(name)?, cuts.len());
            ties.extend(listed.ok_or_else(|| desk.board.senseless(name))?);
        }
        let own = &plan.shares(desk.part.count)[part];
        let mut sum = vec![0; cuts.len()];
        let mut before = HashMap::new();
        for &tensor in &unit.tensors {
            if plan.is_within(tensor, own) {
                before.insert(tensor, sum.clone());
            } else if let Some(ties) = ties.get(&tensor) {
                sum.iter_mut().zip(ties).for_each(|(sum, ties)| *sum += ties);
            }
        }
        Ok(before)
    }

    /// The ties in each tensor of one part, which go into file `name`.
    fn count_ties(&self, passes: &mut Passes<'_>, cuts: &[Cut], (part, name): (usize, &str)) -> Result<Vec<u8>> {
        let (plan, observer) = (self.desk.plan, self.desk.observer);
        observer.stage("count ties", self.bytes_of(part, "sketch"));
        let (_, goals) = self.shared.as_ref().expect("there is something to look for");
        let models = plan.searched(goals);
        self.at_part(passes, (part, false), Some(name), |passes, unit| {
            let notes = passes.notes_of(unit);
            let left = notes.and_then(|notes| notes.ties(unit, cuts.len()));
            let (elements, read_before, counted) = left.unwrap_or_default();
            passes.take_over_reads(read_before);
            observer.advance(read_before);
            let counted = Mutex::new(counted);
            let mut chunks = Stretches::new(plan, unit, elements, notes.map(|_| passes.schedule.keep_after));
            while chunks.more() {
                let wanted = Wanted::TaskVectors(&models);
                passes.each_of(chunks.stretch(), unit, &mut None, wanted, None, |worker, _, data| {
                    let counts = worker.count_ties(data, &tensor_cuts(plan, data.chunk, cuts, &[]))?;
                    let mut counted = lock(&counted);
                    add(counted.entry(data.chunk.tensor).or_insert_with(|| vec![0; counts.len()]), &counts);
                    Ok(())
                })?;
                if let Some(notes) = notes.filter(|_| chunks.more()) {
                    notes.keep_ties(unit, (chunks.elements, passes.tally().bytes_read), &lock(&counted))?;
                }
            }
            let mut bytes = passes.tally().bytes_read.to_le_bytes().to_vec();
            for (tensor, counts) in &*lock(&counted) {
                bytes.extend(tensor.to_le_bytes());
                counts.iter().for_each(|count| bytes.extend(count.to_le_bytes()));
            }
            Ok(bytes)
        })
    }

    /// Sign of the sum of all parts' elected signs, where the method asks for it.
    fn majority(&self, passes: &mut Passes<'_>, unit: &Unit, cuts: &[Cut]) -> Result<i8> {
        let (plan, desk) = (self.desk.plan, self.desk);
        if !plan.votes() {
            return Ok(0);
        }
        let names = files_of("vote", desk.part.count);
        desk.board.share(&names, desk.part.index, desk.observer, |part| {
            let ties = self.ties_elsewhere(passes, unit, cuts, part)?;
            desk.observer.stage("vote", self.bytes_of(part, "vote"));
            passes.ties_elsewhere = ties;
            self.at_part(passes, (part, false), Some(&names[part]), |passes, unit| {
                let votes = passes.votes(unit, &mut None, cuts, &[])?;
                Ok([passes.tally().bytes_read.to_le_bytes(), votes.to_le_bytes()].concat())
            })
        })?;
        let mut sum = 0i64;
        for name in &names {
            let bytes = desk.board.expect(name)?;
            let votes = bytes.get(8..).and_then(|votes| Some(i64::from_le_bytes(votes.try_into().ok()?)));
            sum += votes.ok_or_else(|| desk.board.senseless(name))?;
        }
        Ok(sum.signum() as i8)
    }

    /// Whether there is a unit that all parts share.
    pub(super) fn has_shared(&self) -> bool {
        self.shared.is_some()
    }

    /// Its thresholds.
    pub(super) fn thresholds_found(&self) -> Result<UnitThresholds> {
        let UnitDone { tensor, found, .. } = self.read_found()?;
        Ok(UnitThresholds { tensor, found })
    }

    /// Tensor bytes that all looks of all parts read.
    pub(super) fn bytes_read(&self) -> Result<u64> {
        let board = &self.desk.board;
        let mut sum = 0u64;
        let mut add = |name: &str| -> Result<bool> {
            let Some(bytes) = board.read(name)? else { return Ok(false) };
            let read = bytes.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
            sum = sum.saturating_add(read.ok_or_else(|| board.senseless(name))?);
            Ok(true)
        };
        for group in 1..=PROBE_GROUPS {
            add(&format!("probe-{group}"))?;
        }
        for what in ["ties", "vote"] {
            for name in files_of(what, self.desk.part.count) {
                add(&name)?;
            }
        }
        for round in 0.. {
            let mut any = false;
            for name in files_of(&sketch_name(round), self.desk.part.count) {
                any |= add(&name)?;
            }
            if !any {
                break;
            }
        }
        Ok(sum)
    }
}

/// Parts by number, as a message lists them: from 1.
pub(super) fn listed(parts: &[usize], count: usize) -> String {
    const SHOWN: usize = 20;
    let mut text: Vec<String> = parts.iter().take(SHOWN).map(|part| (part + 1).to_string()).collect();
    if parts.len() > SHOWN {
        text.push(format!("and {} more", parts.len() - SHOWN));
    }
    format!("{} {} of {count}", if parts.len() == 1 { "part" } else { "parts" }, text.join(", "))
}

fn sketch_name(round: u32) -> String {
    if round == 0 { "sketch".into() } else { format!("sketch{}", round + 1) }
}

fn brackets(selectors: &[Option<Selector>]) -> Vec<Option<Bracket>> {
    selectors.iter().map(|s| s.as_ref().and_then(Selector::bracket)).collect()
}

fn encoded(bytes_read: u64, sketches: &[MagnitudeSketch]) -> Vec<u8> {
    let mut bytes = bytes_read.to_le_bytes().to_vec();
    sketches.iter().for_each(|sketch| bytes.extend(sketch.encode()));
    bytes
}

/// Ties per tensor from a file's bytes, `counts` numbers each.
fn listed_ties(bytes: &[u8], counts: usize) -> Option<Vec<(u32, TieCounts)>> {
    let rest = bytes.get(8..)?;
    let (entries, []) = (rest.chunks_exact(4 + 8 * counts), rest.chunks_exact(4 + 8 * counts).remainder()) else {
        return None;
    };
    let entry = |bytes: &[u8]| {
        let (tensor, counts) = bytes.split_first_chunk()?;
        Some((u32::from_le_bytes(*tensor), counts.as_chunks::<8>().0.iter().map(|n| u64::from_le_bytes(*n)).collect()))
    };
    entries.map(entry).collect()
}
