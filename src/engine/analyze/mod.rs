//! A look at a family of models before it is merged: what of the task vectors is kept, where they disagree, and what of
//! each model a merge would hold.
//!
//! - One sketch pass finds the thresholds of all densities, one pass over the tensors measures everything else; in tensor
//!   scope one reading serves both.
//! - Counts are integers. Sums run over fixed blocks of elements in the order of the tensors, so that neither threads nor
//!   chunks nor memory change a digit.
//! - Finished tensors are recorded, and every so often what is measured of one that is not held in memory: a look that was
//!   interrupted goes on where it was.

mod describe;
mod gather;
mod measures;
mod meter;
mod study;
mod work;

pub use study::Study;

use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;

use super::kept::Kept;
use super::passes::{Passes, lookahead, prefetch, prefetch_pieces, units_ahead};
use super::pool;
use super::select::solo_thresholds;
use super::slot::Loaded;
use super::spool::{Room, Site, Spool, Use};
use super::turns::{Ordered, Pending, Turns};
use super::under_way::Notes;
use super::worker::Worker;
use super::{Observer, OutputOptions, check_inputs_unchanged, check_memory, peak_memory_bytes};
use crate::error::{ErrorKind, Result};
use crate::plan::{Chunk, Goal, Piece, Plan, Unit, UnitKind, Wanted};
use crate::report::{self, Analysis, Line, Row};
use crate::sketch::Threshold;
use crate::storage::Storage;
use gather::{Entry, Gathered, Gatherer};
use meter::{BLOCK_ELEMENTS, Cuts, Meter};
use study::REPORT_BYTES;
use work::{REPORT, WorkDir};

/// Name and version of the report's format.
const FORMAT: &str = "tiesmith analysis 1";
/// How a report begins.
const MARK: &str = "{\n\"format\":\"tiesmith analysis";
/// Bytes of a report that are written at once.
const WRITE_BYTES: usize = 1 << 20;

/// What a look found, and how it went.
#[derive(Debug, Clone, Serialize)]
pub struct AnalysisReport {
    /// Output directory.
    pub out: String,
    /// Files written.
    pub files: Vec<String>,
    /// Tensors looked at.
    pub tensors: u64,
    /// Tensor bytes read from inputs in this run.
    pub bytes_read: u64,
    /// Duration.
    pub wall_seconds: f64,
    /// Peak resident memory of the process, where the system tells.
    pub peak_memory_bytes: Option<u64>,
    /// Whether work of an earlier run was taken over.
    pub resumed: bool,
    /// Tensors taken over.
    pub tensors_reused: u64,
    /// All numbers but those of single tensors.
    #[serde(flatten)]
    pub analysis: Analysis,
}

/// Looks at all models of `study` and writes the report to `output.dir`.
pub fn analyze(
    study: &Study,
    output: &OutputOptions,
    storage: &Arc<dyn Storage>,
    observer: &dyn Observer,
) -> Result<AnalysisReport> {
    let begin = Instant::now();
    check_memory(&study.schedule)?;
    let work = WorkDir::open(study, output, storage)?;
    study.schedule.allow_ahead(&study.plan, &**storage);
    let outcome = run(study, &work, storage, observer);
    let (mut report, staged) = match outcome {
        Ok(done) => done,
        Err(error) => {
            // An input that cannot be used leaves nothing to resume.
            if !matches!(error.kind(), ErrorKind::Failed | ErrorKind::Interrupted) {
                work.abandon();
            }
            return Err(error);
        }
    };
    let figures = report::FIGURES.map(|name| format!("{name}.svg"));
    let all: Vec<&str> = figures.iter().map(String::as_str).chain([report::PAGE, REPORT]).collect();
    work.publish(&staged, &all)?;
    report.wall_seconds = begin.elapsed().as_secs_f64();
    report.peak_memory_bytes = peak_memory_bytes();
    Ok(report)
}

fn run(
    study: &Study,
    work: &WorkDir,
    storage: &Arc<dyn Storage>,
    observer: &dyn Observer,
) -> Result<(AnalysisReport, Vec<String>)> {
    let gathered = taken_over(study, work)?;
    let site = Site {
        own: work.spool(),
        name: String::new(),
        out: &work.dir,
        at_once: REPORT_BYTES,
        takes_over: work.resumes,
        hashes: false,
        storage: &**storage,
        room: Room::default(),
    };
    let spool = Spool::open(&study.plan, &study.schedule, &site, gathered.thresholds.is_none(), observer)?;
    let done = look(study, work, storage, observer, gathered, (&site, spool.as_ref()));
    Spool::forget(spool, done)
}

/// Looks at what is not in `gathered`, and stages the report.
fn look(
    study: &Study,
    work: &WorkDir,
    storage: &Arc<dyn Storage>,
    observer: &dyn Observer,
    mut gathered: Gathered,
    (site, spool): (&Site<'_>, Option<&Spool<'_>>),
) -> Result<(AnalysisReport, Vec<String>)> {
    let (reused, left) = (gathered.done, std::mem::take(&mut gathered.under_way));
    // All of a tensor is read again before its thresholds are recorded.
    let more_to_come = study.plan.per_tensor();
    let notes = Notes { keeper: work, left: &left, of: Default::default(), more_to_come };
    let mut looker = Looker::new(study, observer, notes, site);
    let (mut gatherer, outcome) = looker.look(Gatherer::new(study, work, &**storage, gathered), spool);
    // What was finished is kept, whatever ended the look.
    let flushed = gatherer.flush();
    outcome?;
    flushed?;
    site.forget_tensors(&study.plan, &study.schedule);
    check_inputs_unchanged(&study.plan)?;
    observer.go_on()?;
    let analysis = study.describe(&gatherer.gathered);
    let rows = write_report(study, work, &gatherer.gathered, &analysis)?;
    let mut staged = vec![REPORT.to_owned(), report::PAGE.to_owned()];
    work.stage(report::PAGE, report::page(&analysis, &rows).as_bytes())?;
    for figure in report::figures(&analysis) {
        let name = format!("{}.svg", figure.name);
        work.stage(&name, figure.file().as_bytes())?;
        staged.push(name);
    }
    staged.sort();
    let report = AnalysisReport {
        out: work.dir.display().to_string(),
        files: staged.clone(),
        tensors: study.tensors.len() as u64,
        bytes_read: looker.bytes_read(),
        wall_seconds: 0.0,
        peak_memory_bytes: None,
        resumed: work.resumes,
        tensors_reused: reused as u64,
        analysis,
    };
    Ok((report, staged))
}

/// What earlier attempts measured.
fn taken_over(study: &Study, work: &WorkDir) -> Result<Gathered> {
    let mut gathered = Gathered::new(study);
    if work.resumes {
        work.each_done(|payload| {
            let taken = gather::decode(payload, study, |entry| match gathered.take(study, entry) {
                true => Ok(()),
                false => Err(work.senseless()),
            })?;
            taken.ok_or_else(|| work.senseless())
        })?;
    }
    Ok(gathered)
}

/// Writes all numbers, tensor by tensor, as the journal has them. Returns the rows of the page's table.
fn write_report(study: &Study, work: &WorkDir, gathered: &Gathered, analysis: &Analysis) -> Result<Vec<Row>> {
    let file = work.create(REPORT)?;
    let (mut at, mut text) = (0, describe::open_json(analysis)?);
    let mut rows = Vec::new();
    text.push_str(",\n\"tensors\":[");
    let mut put = |text: &mut String, least: usize| -> Result<()> {
        if text.len() >= least {
            file.write_at(text.as_bytes(), at)?;
            at += text.len() as u64;
            text.clear();
        }
        Ok(())
    };
    work.each_done(|payload| {
        let mut result = Ok(());
        let entries = gather::decode(payload, study, |entry| {
            let Entry::Tensor { place, found, measures } = entry else { return Ok(()) };
            let entry = study.entry(place as usize, &found, &measures, &gathered.overall);
            text.push_str(if place == 0 { "\n" } else { ",\n" });
            text.push_str(&describe::json(&entry)?);
            rows.push(Row { name: entry.name, layer: entry.layer, line: Line::of(&entry.measured, study.aim.chosen) });
            result = put(&mut text, WRITE_BYTES);
            Ok(())
        })?;
        result?;
        entries.ok_or_else(|| work.senseless())
    })?;
    text.push_str("\n]\n}\n");
    put(&mut text, 0)?;
    file.sync()?;
    Ok(rows)
}

/// One thread's buffers.
struct Hand {
    /// Lent to the passes that find thresholds.
    worker: Option<Worker>,
    meter: Meter,
    /// Sums of the chunk's blocks, one after the other.
    blocks: Vec<f64>,
}

/// Tensors that are measured chunk by chunk.
struct Streamed<'s> {
    tensors: &'s [u32],
    /// Elements of the first one that are measured.
    from: u64,
    /// Their own thresholds, if they have any.
    found: &'s [Option<Threshold>],
    /// Longest chunk.
    chunk_elements: u64,
    /// What was downloaded of them.
    spool: Option<&'s Spool<'s>>,
}

/// Everything that a look shares.
struct Looker<'a> {
    study: &'a Study,
    observer: &'a dyn Observer,
    notes: Notes<'a>,
    /// Where what is downloaded is kept of a single tensor.
    site: &'a Site<'a>,
    hands: Vec<Hand>,
}

impl<'a> Looker<'a> {
    fn new(study: &'a Study, observer: &'a dyn Observer, notes: Notes<'a>, site: &'a Site<'a>) -> Self {
        let hand = |_| Hand {
            worker: Some(Worker::new(&study.plan, &study.schedule)),
            meter: Meter::new(&study.aim.shape),
            blocks: Vec::new(),
        };
        Self { study, observer, notes, site, hands: (0..study.schedule.threads).map(hand).collect() }
    }

    fn bytes_read(&self) -> u64 {
        self.hands.iter().filter_map(|hand| hand.worker.as_ref()).map(|worker| worker.tally.bytes_read).sum()
    }

    /// Measures all tensors that are not done; `spool` has what is downloaded of all of them together.
    fn look(&mut self, mut gatherer: Gatherer<'a>, spool: Option<&Spool<'_>>) -> (Gatherer<'a>, Result<()>) {
        let study = self.study;
        let done = gatherer.gathered.done;
        if !study.plan.per_tensor() {
            let unit = &study.schedule.units[0];
            let goals = study.goals(unit);
            let found = match self.model_thresholds((unit, &goals), spool, &mut gatherer) {
                Ok(found) => found,
                Err(error) => return (gatherer, Err(error)),
            };
            self.observer.stage("measure", study.bytes_from(done));
            let cuts = study.cuts(&goals, &found);
            let from = self.go_on(&mut gatherer);
            let (tensors, chunk_elements) = (&study.tensors[done..], unit.chunk_elements);
            return self.stream(&Streamed { tensors, from, found: &[], chunk_elements, spool }, &cuts, gatherer);
        }
        self.observer.stage("measure", study.bytes_from(done));
        let tensors: Vec<u32> = study.tensors[done..].to_vec();
        let unit_of = |tensor: u32| {
            let place = study.schedule.units.partition_point(|unit| unit.tensors[0] < tensor);
            &study.schedule.units[place]
        };
        let mut rest: Vec<&Unit> = tensors.iter().map(|&tensor| unit_of(tensor)).collect();
        while !rest.is_empty() {
            let alone = rest.iter().take_while(|unit| unit.kind == UnitKind::Solo).count();
            if alone > 0 {
                // It is held in memory now, and soon measured again.
                gatherer.gathered.part = None;
            }
            let outcome;
            (gatherer, outcome) = match alone {
                0 => self.streamed_tensor(rest[0], gatherer),
                _ => self.alone(&rest[..alone], gatherer),
            };
            if outcome.is_err() {
                return (gatherer, outcome);
            }
            rest.drain(..alone.max(1));
        }
        (gatherer, Ok(()))
    }

    /// Thresholds of the whole model, found now or by an earlier attempt.
    fn model_thresholds(
        &mut self,
        (unit, goals): (&Unit, &[Goal]),
        spool: Option<&Spool<'_>>,
        gatherer: &mut Gatherer<'a>,
    ) -> Result<Vec<Option<Threshold>>> {
        if let Some(found) = gatherer.gathered.thresholds.clone() {
            return if fit(goals, &found) { Ok(found) } else { Err(gatherer.senseless()) };
        }
        if gatherer.gathered.done > 0 {
            return Err(gatherer.senseless());
        }
        let found = self.thresholds(unit, goals, spool)?;
        gatherer.thresholds(found.clone())?;
        Ok(found)
    }

    /// Sketches a unit that is not held in memory.
    fn thresholds(&mut self, unit: &Unit, goals: &[Goal], spool: Option<&Spool<'_>>) -> Result<Vec<Option<Threshold>>> {
        let study = self.study;
        let kept = Kept::new(&study.plan);
        let workers = self.hands.iter_mut().filter_map(|hand| hand.worker.take()).collect();
        let mut passes = Passes::with_workers(&study.plan, &study.schedule, self.observer, None, &kept, workers);
        passes.notes = Some(self.notes);
        passes.spool = spool;
        let found = passes.shared_thresholds(unit, goals, &mut None, None);
        let found = found.and_then(|found| passes.keep_for(&found).map(|()| found));
        self.hands.iter_mut().zip(passes.workers).for_each(|(hand, worker)| hand.worker = Some(worker));
        found
    }

    fn streamed_tensor(&mut self, unit: &Unit, mut gatherer: Gatherer<'a>) -> (Gatherer<'a>, Result<()>) {
        let Study { plan, schedule, .. } = self.study;
        let known = gatherer.gathered.part.as_ref().map(|(_, found)| found.clone());
        let spool = match Spool::of_tensor(plan, schedule, unit, self.site, known.is_none(), self.observer) {
            Ok(spool) => spool,
            Err(error) => return (gatherer, Err(error)),
        };
        let goals = self.study.goals(unit);
        let found = match known {
            Some(found) if fit(&goals, &found) => Ok(found),
            Some(_) => Err(gatherer.senseless()),
            None => self.thresholds(unit, &goals, spool.as_ref()),
        };
        let (gatherer, done) = match found {
            Ok(found) => {
                let (cuts, from) = (self.study.cuts(&goals, &found), self.go_on(&mut gatherer));
                let (tensors, chunk_elements, spool) = (&unit.tensors[..], unit.chunk_elements, spool.as_ref());
                self.stream(&Streamed { tensors, from, found: &found, chunk_elements, spool }, &cuts, gatherer)
            }
            Err(error) => (gatherer, Err(error)),
        };
        (gatherer, Spool::forget(spool, done))
    }

    /// Goes on with the tensor that an earlier attempt was at; returns how many of its elements are measured.
    fn go_on(&self, gatherer: &mut Gatherer<'a>) -> u64 {
        let Some((part, _)) = gatherer.gathered.part.take() else { return 0 };
        let (study, from) = (self.study, part.elements);
        self.observer.advance(study.bytes_of(study.tensors[gatherer.gathered.done], from));
        gatherer.go_on(part);
        from
    }

    /// Measures tensors chunk by chunk.
    fn stream(&mut self, streamed: &Streamed<'_>, cuts: &Cuts, gatherer: Gatherer<'a>) -> (Gatherer<'a>, Result<()>) {
        let (study, observer) = (self.study, self.observer);
        let &Streamed { tensors, from, found, chunk_elements, spool } = streamed;
        let plan = &study.plan;
        let turns = Turns::new(gatherer);
        let ordered: &dyn Ordered = &turns;
        let lookahead = lookahead(&study.schedule, chunk_elements);
        let ahead = |&chunk: &Chunk| {
            let kept = |piece: &Piece| spool.is_some_and(|spool| spool.holds(chunk, *piece));
            prefetch_pieces(plan, chunk, plan.pieces(chunk.tensor, Wanted::All).filter(|piece| !kept(piece)));
        };
        let chunks = chunks(plan, tensors, from, chunk_elements);
        let outcome = pool::run(&mut self.hands, chunks, lookahead, ahead, |hand, ordinal, chunk| {
            let mut pending = Pending::new(ordered, ordinal);
            let Hand { worker: Some(worker), meter, blocks } = hand else { unreachable!("the worker is back") };
            blocks.clear();
            let measure = |worker: &mut Worker, data: Loaded<'_>| {
                meter.measure(worker, data, &study.aim, cuts, |sums| blocks.extend_from_slice(sums))
            };
            let pieces = plan.pieces(chunk.tensor, Wanted::All);
            match spool {
                Some(spool) => worker.load_kept(Use { spool, counts: false }, chunk, pieces, measure)?,
                None => worker.load(plan, chunk, pieces, observer, measure)?,
            }
            turns.take(ordinal, |gatherer| {
                gatherer.part(chunk.count, &meter.counts, blocks.chunks_exact(study.aim.shape.sums()));
                let last = chunk.start + chunk.count == plan.length(chunk.tensor);
                if last { gatherer.finish(found) } else { gatherer.keep_in_time(found) }
            })??;
            pending.complete();
            Ok(())
        });
        let mut gatherer = turns.into_inner();
        if outcome.is_err() {
            // Best effort: the error that led here is the one worth reporting.
            let _ = gatherer.keep(found);
        }
        (gatherer, outcome)
    }

    /// Measures tensors that one worker each holds in memory.
    fn alone(&mut self, units: &[&Unit], gatherer: Gatherer<'a>) -> (Gatherer<'a>, Result<()>) {
        let (study, observer) = (self.study, self.observer);
        let plan = &study.plan;
        let turns = Turns::new(gatherer);
        let ordered: &dyn Ordered = &turns;
        let whole = |unit: &Unit| Chunk { tensor: unit.tensors[0], start: 0, count: unit.elements };
        let (lookahead, weight) = units_ahead(&study.schedule);
        let ahead = |unit: &&&Unit| weight(prefetch(plan, whole(unit), Wanted::All));
        let outcome = pool::run_weighed(&mut self.hands, units.iter(), lookahead, ahead, |hand, ordinal, unit| {
            let mut pending = Pending::new(ordered, ordinal);
            let (chunk, goals) = (whole(unit), study.goals(unit));
            let Hand { worker: Some(worker), meter, blocks } = hand else { unreachable!("the worker is back") };
            blocks.clear();
            blocks.resize(study.aim.shape.sums(), 0.0);
            let mut found = Vec::new();
            worker.load(plan, chunk, plan.pieces(chunk.tensor, Wanted::All), observer, |worker, data| {
                found = solo_thresholds(worker, data, &goals, study.schedule.sketch_bins)?;
                let cuts = study.cuts(&goals, &found);
                meter.measure(worker, data, &study.aim, &cuts, |sums| {
                    blocks.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
                })
            })?;
            turns.take(ordinal, |gatherer| {
                gatherer.part(chunk.count, &meter.counts, std::iter::once(&blocks[..]));
                gatherer.finish(&found)
            })??;
            pending.complete();
            Ok(())
        });
        (turns.into_inner(), outcome)
    }
}

/// The chunks of `tensors`, in order: whole blocks, at most `chunk_elements` long where that is a block at least. Of the first
/// tensor they begin with element `from`.
fn chunks<'p>(plan: &'p Plan, tensors: &'p [u32], from: u64, chunk_elements: u64) -> impl Iterator<Item = Chunk> + 'p {
    let step = (chunk_elements / BLOCK_ELEMENTS).max(1) * BLOCK_ELEMENTS;
    let begins = std::iter::once(from).chain(std::iter::repeat(0));
    tensors.iter().zip(begins).flat_map(move |(&tensor, from)| {
        let length = plan.length(tensor);
        let starts = (0..(length - from).div_ceil(step)).map(move |at| from + at * step);
        starts.map(move |start| Chunk { tensor, start, count: step.min(length - start) })
    })
}

/// Whether thresholds from a journal can be those of `goals`.
fn fit(goals: &[Goal], found: &[Option<Threshold>]) -> bool {
    let one = |(goal, found): (&Goal, &Option<Threshold>)| match (goal, found) {
        (Goal::Keep { keep, elements }, Some(threshold)) => {
            let reached = threshold.above.checked_add(threshold.tied);
            threshold.above < *keep && reached.is_some_and(|reached| *keep <= reached && reached <= *elements)
        }
        (Goal::All | Goal::Nothing, None) => true,
        _ => false,
    };
    goals.len() == found.len() && goals.iter().zip(found).all(one)
}
