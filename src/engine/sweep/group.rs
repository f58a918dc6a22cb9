//! Outputs that are made together: unit by unit, chunk by chunk.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::chunks::{Search, left};
use super::downloads::floors;
use super::ready::Ready;
use super::spool::{self, Framer, Spool};
use super::{Sweep, Variant, families, places};
use crate::engine::cut::{Cut, TieCounts};
use crate::engine::identity::Begin;
use crate::engine::kept::Kept;
use crate::engine::output::OutputDir;
use crate::engine::passes::{Passes, Resident, lock, lookahead, prefetch_pieces, units_ahead, whole};
use crate::engine::pool;
use crate::engine::reads::first_half;
use crate::engine::records::{Entry, UnitDone};
use crate::engine::select::{Thresholds, solo_thresholds, tensor_cuts};
use crate::engine::shard_hash::Digest;
use crate::engine::shards::{ShardWriter, Written, write_shards};
use crate::engine::slot::{Loaded, Slot, locate};
use crate::engine::spool::{Site, Spool as Downloaded, Use};
use crate::engine::turns::Pending;
use crate::engine::under_way::{Keeps, Notes};
use crate::engine::worker::{Known, Sink, Tally, Worker};
use crate::engine::{
    Finished, Observer, Report, check_inputs_unchanged, differing_warning, publish, report, side_files, tidy_up,
};
use crate::error::{Error, ErrorKind, Result};
use crate::plan::{Action, Chunk, Piece, Plan, Schedule, Unit, UnitKind, Wanted};

/// An output while it is made.
pub(super) struct Out<'a> {
    pub plan: &'a Plan,
    pub kept: &'a Kept,
    target: Target<'a>,
    /// Per checkpoint of its plan, the union's.
    places: Vec<u32>,
    /// The number of those that differ from it in λ alone, if there are any.
    family: Option<usize>,
}

impl Out<'_> {
    /// The number of its model `model` in the union.
    pub(super) fn union_model(&self, union: &Plan, model: usize) -> usize {
        self.places[self.plan.first_model + model] as usize - union.first_model
    }

    /// Merges a chunk, from what it has in common with others of its family where there are any.
    fn merge(
        &self,
        worker: &mut Worker,
        data: Loaded<'_>,
        (cuts, seen): (&[Cut], &mut TieCounts),
        known: &Known,
        sink: Sink<'_>,
    ) -> Result<()> {
        if let Some(family) = self.family {
            if worker.unscaled.of != Some(family) {
                worker.hold_unscaled(family, data, cuts, seen, known)?;
            }
            if worker.merge_held(data, sink)? {
                return Ok(());
            }
        }
        worker.merge(data, cuts, seen, known, sink)
    }
}

/// Where the result of an output goes.
enum Target<'a> {
    Shards(&'a ShardWriter<'a>),
    Packed(&'a Spool<'a>),
}

impl<'a> Target<'a> {
    fn keeper(&self) -> &'a dyn Keeps {
        match *self {
            Self::Shards(writer) => writer,
            Self::Packed(spool) => spool,
        }
    }
}

/// What was counted for an output in this run.
struct Counts {
    tally: Tally,
    thresholds: Thresholds,
    differing: BTreeSet<u32>,
}

/// The work on a group.
pub(super) struct Group<'a> {
    pub union: &'a Plan,
    pub schedule: &'a Schedule,
    pub observer: &'a dyn Observer,
    pub outs: &'a [Out<'a>],
    counts: Vec<Mutex<Counts>>,
    /// Buffers for packing that no thread uses.
    framers: Mutex<Vec<Framer>>,
    /// Bytes of base that were read to be compared with.
    compared: AtomicU64,
    /// What the union is, its inputs as they are now: searches are for all models together.
    of: Digest,
}

/// What a group found out.
struct Made {
    tally: Tally,
    thresholds: Thresholds,
    warnings: Vec<String>,
    reused: u64,
}

impl Sweep<'_> {
    /// Makes the outputs of `variants` together; their reports, in order.
    pub(super) fn run_group(&mut self, variants: &[&Variant], schedule: &Schedule) -> Result<Vec<Report>> {
        let begin = Instant::now();
        let mut reports: Vec<Option<Report>> = vec![None; variants.len()];
        let mut dirs: Vec<(usize, OutputDir)> = Vec::new();
        let opened = variants.iter().enumerate().try_for_each(|(at, variant)| {
            side_files::check(&variant.plan, &**self.storage)?;
            let dir = OutputDir::open(&variant.plan, &self.options(variant), self.storage)?;
            match dir.is_published() {
                true => reports[at] = Some(tidy_up(&variant.plan, dir, self.observer)?),
                false => dirs.push((at, dir)),
            }
            Ok(())
        });
        let result = opened.and_then(|()| self.make(variants, &dirs, schedule));
        let (made, sealed) = match result {
            Ok(made) => made,
            Err(error) => {
                // An input that cannot be used leaves nothing to resume.
                if !matches!(error.kind(), ErrorKind::Failed | ErrorKind::Interrupted) {
                    dirs.into_iter().for_each(|(at, dir)| dir.abandon(&variants[at].plan));
                }
                return Err(error);
            }
        };
        for (((at, dir), made), written) in dirs.into_iter().zip(made).zip(sealed) {
            let plan = &variants[at].plan;
            let mut warnings = plan.warnings.clone();
            warnings.extend(made.warnings);
            let mut report = report(plan, schedule, (&dir.dir, dir.resumes()), &made.tally, &made.thresholds, warnings);
            report.chunks_reused = made.reused;
            report.wall_seconds = begin.elapsed().as_secs_f64();
            let finished = Finished { report, written, thresholds: made.thresholds };
            reports[at] = Some(publish(plan, schedule, dir, finished, self.observer)?);
        }
        Ok(reports.into_iter().flatten().collect())
    }

    /// Makes the outputs of `variants` together, packed; their reports, in order.
    pub(super) fn pack_group(&mut self, variants: &[&Variant], schedule: &Schedule) -> Result<Vec<Report>> {
        let storage = &**self.storage;
        let mut spools = Vec::with_capacity(variants.len());
        let mut kept = Vec::with_capacity(variants.len());
        let result = variants.iter().try_for_each(|variant| {
            let path = spool::file(&self.output.dir, &variant.name);
            let opened = Spool::open(&variant.plan, path, self.output.restart, storage, self.observer)?;
            spools.push(opened.0);
            kept.push(opened.1);
            Ok(())
        });
        let result = result.and_then(|()| self.pack_opened(variants, &spools, &kept, schedule));
        // An input that cannot be used leaves nothing to resume.
        if result.as_ref().is_err_and(|e| !matches!(e.kind(), ErrorKind::Failed | ErrorKind::Interrupted)) {
            spools.into_iter().for_each(Spool::abandon);
        }
        result
    }

    fn pack_opened(
        &mut self,
        variants: &[&Variant],
        spools: &[Spool<'_>],
        kept: &[Kept],
        schedule: &Schedule,
    ) -> Result<Vec<Report>> {
        let begin = Instant::now();
        let mut outs = Vec::with_capacity(variants.len());
        for ((variant, spool), kept) in variants.iter().zip(spools).zip(kept) {
            let places = places(&variant.plan, self.union).expect("what is made together fits");
            outs.push(Out { plan: &variant.plan, kept, target: Target::Packed(spool), places, family: None });
        }
        join_families(&mut outs);
        schedule.allow_ahead(self.union, &**self.storage);
        let at_once = variants.iter().map(|variant| super::packed_bytes_max(&variant.plan)).sum();
        let site = self.site(at_once);
        let (made, read) = Group::new(self.union, schedule, self.observer, &outs)?.run_keeping(&site)?;
        self.bytes_read = self.bytes_read.saturating_add(read);
        self.storage.check_mapped()?;
        check_inputs_unchanged(self.union)?;
        let mut reports = Vec::with_capacity(variants.len());
        for ((variant, spool), made) in variants.iter().zip(spools).zip(made) {
            self.observer.go_on()?;
            let bytes_written = spool.finish()?;
            let mut warnings = variant.plan.warnings.clone();
            warnings.extend(made.warnings);
            let path = spool::file(&self.output.dir, &variant.name);
            let place = (&*path, spool.resumed());
            let report = report(&variant.plan, schedule, place, &made.tally, &made.thresholds, warnings);
            let (wall_seconds, chunks_reused) = (begin.elapsed().as_secs_f64(), made.reused);
            reports.push(Report { shards: 0, bytes_written, wall_seconds, chunks_reused, ..report });
        }
        Ok(reports)
    }

    fn make(
        &mut self,
        variants: &[&Variant],
        dirs: &[(usize, OutputDir)],
        schedule: &Schedule,
    ) -> Result<(Vec<Made>, Vec<Written>)> {
        let targets: Vec<(&Plan, &OutputDir)> = dirs.iter().map(|(at, dir)| (&variants[*at].plan, dir)).collect();
        let (mut made, mut sealed) = (Vec::new(), Vec::new());
        let (union, observer) = (self.union, self.observer);
        let mut read = 0;
        schedule.allow_ahead(union, &**self.storage);
        let at_once = targets.iter().map(|(plan, dir)| dir.bytes_at_once(plan)).sum();
        let site = self.site(at_once);
        with_writers(&targets, &[], observer, &mut sealed, &mut |writers| {
            let mut outs = Vec::with_capacity(writers.len());
            for (&(writer, kept), &(plan, _)) in writers.iter().zip(&targets) {
                let places = places(plan, union).expect("what is made together fits");
                outs.push(Out { plan, kept, target: Target::Shards(writer), places, family: None });
            }
            join_families(&mut outs);
            (made, read) = Group::new(union, schedule, observer, &outs)?.run_keeping(&site)?;
            Ok(())
        })?;
        self.bytes_read = self.bytes_read.saturating_add(read);
        check_inputs_unchanged(union)?;
        observer.go_on()?;
        // The innermost is sealed first.
        sealed.reverse();
        Ok((made, sealed))
    }
}

/// Tells outputs that are worked out together from others.
fn join_families(outs: &mut [Out<'_>]) {
    let families = families(&outs.iter().map(|out| out.plan).collect::<Vec<_>>());
    outs.iter_mut().zip(families).for_each(|(out, family)| out.family = family);
}

/// Shards that are open for writing, and what earlier attempts left of them.
type Opened<'a> = (&'a ShardWriter<'a>, &'a Kept);

/// Opens the shards of all `targets`, lets `work` write them, and adds what sealing said, the last target's first.
fn with_writers(
    targets: &[(&Plan, &OutputDir)],
    opened: &[Opened<'_>],
    observer: &dyn Observer,
    sealed: &mut Vec<Written>,
    work: &mut dyn FnMut(&[Opened<'_>]) -> Result<()>,
) -> Result<()> {
    let Some((&(plan, dir), rest)) = targets.split_first() else { return work(opened) };
    let all = 0..plan.layout.shards.len();
    let written = write_shards(plan, dir, all, observer, None, &|_| true, |writer, kept| {
        let opened = [opened, &[(writer, kept)]].concat();
        with_writers(rest, &opened, observer, sealed, work)
    })?;
    sealed.push(written);
    Ok(())
}

impl<'a> Group<'a> {
    fn new(union: &'a Plan, schedule: &'a Schedule, observer: &'a dyn Observer, outs: &'a [Out<'a>]) -> Result<Self> {
        let counts = outs.iter().map(|out| {
            let thresholds = Thresholds::new(out.plan.models(), out.plan.selects());
            let differing = out.kept.differing.clone();
            Mutex::new(Counts { tally: out.kept.tally.clone(), thresholds, differing })
        });
        let (counts, framers, compared) = (counts.collect(), Mutex::default(), AtomicU64::new(0));
        let of = first_half(&blake3::hash(&Begin::of(union)?.encode()?));
        Ok(Self { union, schedule, observer, outs, counts, framers, compared, of })
    }

    /// Does everything, and keeps at `site` what is downloaded and needed again; see [`Self::run`].
    fn run_keeping(self, site: &'a Site<'a>) -> Result<(Vec<Made>, u64)> {
        let downloads = Downloaded::open(self.union, self.schedule, site, true, self.observer)?;
        let done = self.run(site, downloads.as_ref());
        Downloaded::forget(downloads, done)
    }

    /// Does everything, with what is downloaded of all tensors together in `downloads`; returns what each output's report is
    /// made of, and the tensor bytes read.
    fn run(self, site: &Site<'_>, downloads: Option<&Downloaded<'_>>) -> Result<(Vec<Made>, u64)> {
        let nothing_kept = Kept::new(self.union);
        let mut passes = Passes::new(self.union, self.schedule, self.observer, None, &nothing_kept);
        passes.spool = downloads;
        for worker in &mut passes.workers {
            self.outs.iter().for_each(|out| worker.fit(out.plan, self.schedule));
        }
        if !passes.announces_passes() {
            self.observer.stage("sweep", self.schedule.passes.iter().map(|pass| pass.bytes_read).sum());
        }
        let mut solo = Vec::new();
        for unit in &self.schedule.units {
            match unit.kind == UnitKind::Solo && self.is_whole(unit.tensors[0]) {
                true => solo.push(unit),
                false => self.keeping(unit, &mut passes, site)?,
            }
        }
        site.forget_tensors(self.union, self.schedule);
        self.solo_units(&solo, &mut passes)?;
        self.direct(&mut passes)?;
        let read = passes.read_here() + self.compared.load(Ordering::Relaxed);
        let made = self.outs.iter().zip(self.counts).map(|(out, counts)| {
            let Counts { tally, thresholds, differing } = counts.into_inner().unwrap_or_else(|e| e.into_inner());
            let warnings = differing_warning(out.plan, &differing).into_iter().collect();
            Made { tally, thresholds, warnings, reused: out.kept.ranges }
        });
        Ok((made.collect(), read))
    }

    /// Whether every output has all of tensor `tensor`, or nothing.
    fn is_whole(&self, tensor: u32) -> bool {
        let length = self.union.length(tensor);
        self.outs.iter().all(|out| !out.kept.has_part_of(tensor) || out.kept.gaps(tensor, length).next().is_none())
    }

    /// What is known of `unit` for output `out` from an earlier attempt.
    fn known(&self, out: &Out<'_>, unit: &Unit) -> Result<Option<Ready>> {
        match out.kept.unit(out.plan, unit) {
            Some(done) => {
                let found: Vec<_> = done.found.iter().map(|found| found.map(|(threshold, _)| threshold)).collect();
                let known = Known { majority: f32::from(done.majority), facts: Vec::new() };
                Ok(Some(Ready::new(out, unit, &out.plan.goals(unit), &found, known)))
            }
            None if unit.tensors.iter().any(|&tensor| out.kept.has_part_of(tensor)) => {
                Err(Error::failed("the journal has results of a merge without their thresholds")
                    .help("use --restart to start over"))
            }
            None => Ok(None),
        }
    }

    /// Where what is found out of `unit` is kept until its thresholds are: with the first of those that lack them, whose
    /// thresholds are kept last. Earlier attempts may have begun with another one.
    fn notes(&self, unit: &Unit, new: &[usize]) -> Option<Notes<'a>> {
        let outs = self.outs;
        let progress = |out: &&usize| outs[**out].kept.under_way.progress(unit.tensors[0], &self.of);
        // The first of those that are furthest.
        let (&first, furthest) = (new.first()?, new.iter().rev().max_by_key(progress)?);
        let more_to_come = new.iter().any(|&out| outs[out].plan.votes());
        let left = &outs[*furthest].kept.under_way;
        Some(Notes { keeper: outs[first].target.keeper(), left, of: self.of, more_to_come })
    }

    /// A unit that all workers share, with what is downloaded for it kept where that spares another download.
    fn keeping<'p>(&self, unit: &Unit, passes: &mut Passes<'p>, site: &Site<'_>) -> Result<()>
    where
        'a: 'p,
    {
        let lacks = left(self.union, self.outs, &unit.tensors, unit.chunk_elements).next().is_some();
        let of_tensor = || Downloaded::of_tensor(self.union, self.schedule, unit, site, true, self.observer);
        let Some(downloads) = lacks.then(of_tensor).transpose()?.flatten() else {
            return self.shared_unit(unit, passes);
        };
        let done = passes.lending(self.schedule, |passes| {
            passes.spool = Some(&downloads);
            self.shared_unit(unit, passes)
        });
        Downloaded::forget(Some(downloads), done)
    }

    /// A unit that all workers share.
    fn shared_unit<'p>(&self, unit: &Unit, passes: &mut Passes<'p>) -> Result<()>
    where
        'a: 'p,
    {
        let mut ready = self.outs.iter().map(|out| self.known(out, unit)).collect::<Result<Vec<_>>>()?;
        let new: Vec<usize> = (0..ready.len()).filter(|&out| ready[out].is_none()).collect();
        // Chunks that are held are those of a run that begins.
        let begins = new.len() == ready.len();
        let mut resident = if begins { passes.hold(unit) } else { None };
        passes.notes = self.notes(unit, &new);
        if !new.is_empty() {
            let searching: Vec<&Out<'_>> = new.iter().map(|&out| &self.outs[out]).collect();
            let search = Search::new(self.union, &searching, unit);
            passes.floors = floors(self.union, self.outs, unit, &ready);
            let found = passes.shared_thresholds(unit, &search.goals, &mut resident, None)?;
            for (number, &out) in new.iter().enumerate() {
                let (goals, found) = search.of(number, &found);
                ready[out] = Some(Ready::new(&self.outs[out], unit, goals, &found, Known::default()));
            }
        }
        if let Some(downloads) = passes.spool {
            downloads.demand(&floors(self.union, self.outs, unit, &ready))?;
        }
        let mut ready: Vec<Ready> = ready.into_iter().flatten().collect();
        self.vote(unit, passes, &mut resident, &new, &mut ready)?;
        for &out in new.iter().rev() {
            self.outs[out].target.keeper().keep_entries(vec![Entry::Unit(ready[out].done(0))])?;
        }
        passes.announce("merge", passes.pass_bytes("merge"));
        let before: Vec<Vec<u64>> = self.counts.iter().map(|counts| lock(counts).tally.kept.clone()).collect();
        let all: Vec<usize> = (0..self.outs.len()).collect();
        let chunks = left(self.union, self.outs, &unit.tensors, unit.chunk_elements);
        self.each_chunk((unit, &all), chunks, passes, &mut resident, &ready, |worker, ordinal, chunk, slot, out| {
            let (own, ready) = (&self.outs[out], &ready[out]);
            let data = Loaded { plan: own.plan, chunk, slot };
            let cuts = tensor_cuts(own.plan, chunk, &ready.cuts, &[]);
            let (mut seen, ties) = ready.ties(own, worker, ordinal, data, &cuts)?;
            self.put(worker, (out, chunk, slot), (ties, None), |worker, sink| {
                own.merge(worker, data, (&cuts, &mut seen), &ready.known, sink)?;
                Ok(true)
            })
            .map(drop)
        })?;
        for ((out, ready), (counts, before)) in self.outs.iter().zip(ready).zip(self.counts.iter().zip(before)) {
            let mut counts = lock(counts);
            let mut survivors: Vec<u64> = counts.tally.kept.iter().zip(&before).map(|(now, then)| now - then).collect();
            out.kept.add_survivors(&unit.tensors, &mut survivors);
            counts.thresholds.record(ready.thresholds, &survivors);
        }
        passes.give_back(resident);
        Ok(())
    }

    /// Runs `work` on each of `chunks` of `unit`, loaded, once for each of `outs` that lack it.
    pub(super) fn each_chunk(
        &self,
        (unit, outs): (&Unit, &[usize]),
        chunks: impl Iterator<Item = (Chunk, Arc<[usize]>)>,
        passes: &mut Passes<'_>,
        resident: &mut Option<Resident>,
        ready: &[Ready],
        work: impl Fn(&mut Worker, usize, Chunk, &Slot, usize) -> Result<()> + Sync,
    ) -> Result<()> {
        let loaded = resident.as_ref().is_some_and(Resident::is_loaded);
        let mut slots = resident.as_mut().map(Resident::slots);
        let items = chunks.map(move |(chunk, lacking)| (chunk, lacking, slots.as_mut().and_then(Iterator::next)));
        let downloads = passes.spool;
        let ahead = |(chunk, lacking, _): &(Chunk, Arc<[usize]>, Option<&mut Slot>)| {
            if !loaded {
                let kept = |piece: &Piece| downloads.is_some_and(|downloads| downloads.holds(*chunk, *piece));
                prefetch_pieces(self.union, *chunk, self.pieces(chunk.tensor, lacking).filter(|piece| !kept(piece)));
            }
        };
        let lookahead = lookahead(self.schedule, unit.chunk_elements);
        pool::run(&mut passes.workers, items, lookahead, ahead, |worker, ordinal, (chunk, lacking, slot)| {
            let mut pending: Vec<Pending<'_>> = ready.iter().map(|ready| Pending::new(&ready.chain, ordinal)).collect();
            let mut own = std::mem::take(&mut worker.slot);
            let held = slot.is_some();
            let slot = slot.unwrap_or(&mut own);
            let result = match loaded {
                true => self.observer.go_on(),
                false if held => {
                    let all = self.union.pieces(chunk.tensor, Wanted::All);
                    worker.load_into(slot, self.union, chunk, all, self.observer)
                }
                false => {
                    let pieces = self.pieces(chunk.tensor, &lacking);
                    match downloads {
                        Some(spool) => worker.load_kept_into(slot, Use { spool, counts: false }, chunk, pieces),
                        None => worker.load_into(slot, self.union, chunk, pieces, self.observer),
                    }
                }
            };
            let result = result.and_then(|()| {
                self.for_each(worker, slot, &lacking, |worker, slot, out| work(worker, ordinal, chunk, slot, out))
            });
            worker.slot = own;
            // Chunks that an output has already count as passed.
            let result = result.and_then(|()| {
                let mut had = outs.iter().filter(|out| !lacking.contains(out));
                had.try_for_each(|&out| ready[out].skip(ordinal))
            });
            if result.is_ok() {
                pending.iter_mut().for_each(Pending::complete);
            }
            result
        })?;
        if let Some(resident) = resident {
            resident.set_loaded();
        }
        Ok(())
    }

    /// Runs `work` for each of `outs`, which sees the slot as that output's plan numbers it, and counts for itself.
    fn for_each(
        &self,
        worker: &mut Worker,
        slot: &mut Slot,
        outs: &[usize],
        mut work: impl FnMut(&mut Worker, &Slot, usize) -> Result<()>,
    ) -> Result<()> {
        let union = worker.tally.clone();
        worker.unscaled.of = None;
        let result = outs.iter().try_for_each(|&out| {
            worker.tally = Tally::of(self.outs[out].plan.models());
            worker.begin();
            slot.renumber(&self.outs[out].places);
            work(worker, slot, out)
        });
        slot.renumber(&[]);
        worker.tally = union;
        worker.begin();
        result
    }

    /// The union's pieces of a tensor that `outs` are made from.
    fn pieces<'s>(&'s self, tensor: u32, outs: &'s [usize]) -> impl Iterator<Item = Piece> + 's {
        let used = move |piece: &Piece| {
            let uses = |out: &Out<'_>| {
                let mut own = out.plan.pieces(tensor, Wanted::All);
                own.any(|own| out.places[own.checkpoint as usize] == piece.checkpoint)
            };
            outs.iter().any(|&out| uses(&self.outs[out]))
        };
        self.union.pieces(tensor, Wanted::All).filter(used)
    }

    /// What the worker counted for output `out` in `chunk`, which is added to what is counted of it. Bytes read are those
    /// that the output's chunk is made from, whoever else uses them.
    fn count(&self, worker: &Worker, out: usize, chunk: Chunk) -> Tally {
        let plan = self.outs[out].plan;
        let mut counted = worker.counted();
        counted.bytes_read = plan.pieces(chunk.tensor, Wanted::All).map(|piece| locate(plan, chunk, piece).2).sum();
        lock(&self.counts[out]).tally.add(&counted);
        counted
    }

    /// Units that one worker does alone, each read once.
    fn solo_units(&self, units: &[&Unit], passes: &mut Passes<'_>) -> Result<()> {
        let mut items: Vec<(&Unit, Vec<usize>)> = Vec::new();
        for unit in units.iter().filter(|unit| unit.elements > 0) {
            let mut lacking = Vec::new();
            for (at, out) in self.outs.iter().enumerate() {
                match self.known(out, unit)? {
                    Some(ready) if out.kept.has_part_of(unit.tensors[0]) => {
                        let mut survivors = vec![0; out.plan.models()];
                        out.kept.add_survivors(&unit.tensors, &mut survivors);
                        lock(&self.counts[at]).thresholds.record(ready.thresholds, &survivors);
                    }
                    _ => lacking.push(at),
                }
            }
            items.push((unit, lacking));
        }
        let items = items.iter().filter(|(_, lacking)| !lacking.is_empty());
        let (lookahead, weight) = units_ahead(self.schedule);
        let ahead = |(unit, lacking): &&(&Unit, Vec<usize>)| {
            weight(prefetch_pieces(self.union, whole(unit), self.pieces(unit.tensors[0], lacking)))
        };
        pool::run_weighed(&mut passes.workers, items, lookahead, ahead, |worker, _, (unit, lacking)| {
            let mut slot = std::mem::take(&mut worker.slot);
            let result = self.solo_unit(unit, lacking, worker, &mut slot);
            worker.slot = slot;
            result
        })
    }

    fn solo_unit(&self, unit: &Unit, lacking: &[usize], worker: &mut Worker, slot: &mut Slot) -> Result<()> {
        let chunk = whole(unit);
        worker.load_into(slot, self.union, chunk, self.pieces(chunk.tensor, lacking), self.observer)?;
        let known = lacking.iter().map(|&out| self.known(&self.outs[out], unit)).collect::<Result<Vec<_>>>()?;
        let searching: Vec<&Out<'_>> =
            lacking.iter().zip(&known).filter(|(_, known)| known.is_none()).map(|(&out, _)| &self.outs[out]).collect();
        let search = Search::new(self.union, &searching, unit);
        let data = Loaded { plan: self.union, chunk, slot };
        let found = solo_thresholds(worker, data, &search.goals, self.schedule.sketch_bins)?;
        let mut number = 0;
        let ready: Vec<Ready> = known
            .into_iter()
            .zip(lacking)
            .map(|(known, &out)| {
                known.unwrap_or_else(|| {
                    let (goals, found) = search.of(number, &found);
                    number += 1;
                    Ready::new(&self.outs[out], unit, goals, &found, Known::default())
                })
            })
            .collect();
        let mut ready = ready.into_iter();
        self.for_each(worker, slot, lacking, |worker, slot, out| {
            let (own, mut ready) = (&self.outs[out], ready.next().expect("one for each"));
            let data = Loaded { plan: own.plan, chunk, slot };
            let cuts = tensor_cuts(own.plan, chunk, &ready.cuts, &[]);
            if own.plan.votes() {
                ready.known.majority = worker.vote(data, &cuts, &mut vec![0; cuts.len()], &[])?.signum() as f32;
            }
            let done = Some(ready.done(0));
            let counted = self.put(worker, (out, chunk, slot), (Vec::new(), done), |worker, sink| {
                own.merge(worker, data, (&cuts, &mut vec![0; cuts.len()]), &ready.known, sink)?;
                Ok(true)
            })?;
            lock(&self.counts[out]).thresholds.record(ready.thresholds, &counted.kept);
            Ok(())
        })
    }

    /// Copies, and merges that need no thresholds.
    fn direct(&self, passes: &mut Passes<'_>) -> Result<()> {
        let schedule = self.schedule;
        let items = left(self.union, self.outs, &schedule.direct, schedule.chunk_elements);
        let ahead = |(chunk, lacking): &(Chunk, Arc<[usize]>)| {
            prefetch_pieces(self.union, *chunk, self.pieces(chunk.tensor, lacking));
        };
        let lookahead = lookahead(schedule, schedule.chunk_elements);
        pool::run(&mut passes.workers, items, lookahead, ahead, |worker, _, (chunk, lacking)| {
            let mut slot = std::mem::take(&mut worker.slot);
            let pieces = self.pieces(chunk.tensor, &lacking);
            let result = worker.load_into(&mut slot, self.union, chunk, pieces, self.observer).and_then(|()| {
                self.for_each(worker, &mut slot, &lacking, |worker, slot, out| {
                    self.direct_chunk(worker, slot, chunk, out)
                })
            });
            worker.slot = slot;
            result
        })
    }

    fn direct_chunk(&self, worker: &mut Worker, slot: &Slot, chunk: Chunk, out: usize) -> Result<()> {
        let own = &self.outs[out];
        let plan = own.plan;
        let data = Loaded { plan, chunk, slot };
        let counted = self.put(worker, (out, chunk, slot), (Vec::new(), None), |worker, sink| {
            match &plan.tensors[chunk.tensor as usize].action {
                Action::Copy { source, compared } if plan.is_raw_copy(chunk.tensor) => {
                    let same = worker.copy(slot, *source, compared, sink, chunk.start)?;
                    if !same {
                        lock(&self.counts[out]).differing.insert(chunk.tensor);
                    }
                    return Ok(same);
                }
                Action::Copy { source, .. } => worker.convert(data, *source, sink)?,
                Action::Merge { .. } => {
                    let cuts = tensor_cuts(plan, chunk, &vec![Cut::NonZero; plan.models()], &[]);
                    own.merge(worker, data, (&cuts, &mut vec![0; cuts.len()]), &Known::default(), sink)?;
                }
            }
            Ok(true)
        });
        counted.map(drop)
    }

    /// Lets `work` make a chunk of output `out`, and takes the result; `slot` shows what it is made from. `work` says
    /// whether the versions that it compared are the same. Returns what was counted.
    fn put(
        &self,
        worker: &mut Worker,
        (out, chunk, slot): (usize, Chunk, &Slot),
        (ties, unit): (TieCounts, Option<UnitDone>),
        work: impl FnOnce(&mut Worker, Sink<'_>) -> Result<bool>,
    ) -> Result<Tally> {
        match self.outs[out].target {
            Target::Shards(writer) => {
                let mut target = writer.chunk(chunk);
                let same = work(worker, &mut |offset, bytes| target.write(offset, bytes))?;
                let counted = self.count(worker, out, chunk);
                target.done(counted.clone(), ties, !same, unit)?;
                Ok(counted)
            }
            Target::Packed(spool) => {
                let idle = lock(&self.framers).pop();
                let width = || self.outs.iter().map(|out| Spool::width(out.plan)).max().unwrap_or(1);
                let mut framer = idle.map_or_else(|| Framer::new(width()), Ok)?;
                let mut target = spool.chunk(chunk, slot, &mut framer);
                let same = work(worker, &mut |_, bytes| target.write(bytes))?;
                let counted = self.count(worker, out, chunk);
                let read = target.done(chunk, counted.clone(), ties, same, unit)?;
                self.compared.fetch_add(read, Ordering::Relaxed);
                lock(&self.framers).push(framer);
                Ok(counted)
            }
        }
    }
}
