//! One merge in parts, on as many machines as share a file system.
//!
//! - A [`Job`] says what is merged, and where to: [`run_part`] does one part of it, [`finish`] publishes all of them.
//! - A part is a number of whole output shards, and the tensors in them. Where thresholds are shared by the whole model,
//!   parts first look at their own tensors and write down what they counted: counts add up exactly, in any order.
//! - Parts may run at once or one after the other, be killed, and run again: what is done is not done twice, and the
//!   output's bytes are those of a merge in one piece. What is found done is read again and compared with its hash.
//! - Nothing is scheduled here. Whoever runs does its own part, and of the common looks what nobody else is at work on.

mod board;
mod done;
mod finish;
mod lengths;
mod looks;
mod page;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

pub use finish::finish;

use super::identity::Begin;
use super::kept::Kept;
use super::output::{OutputDir, address};
use super::passes::Passes;
use super::shards::write_shards;
use super::spool::{Room, Site, Spool};
use super::{
    Observer, OnShard, OutputOptions, check_inputs_unchanged, check_memory, holds_output, peak_memory_bytes,
    side_files, verify,
};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::MAX_PARTS;
use crate::plan::{Downloads, Plan, Run, Schedule};
use crate::storage::Storage;
use board::Board;
use done::PartDone;
use looks::{Found, Looks};

/// The file that says which job, in how many parts, the directory is taken for.
const MARKER: &str = "job";

/// A merge that is done in parts: what its plan was, and where the output goes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    /// Output directory; of an output that is uploaded, where it is made.
    pub out: PathBuf,
    /// Replace a finished output there.
    pub force: bool,
    /// See [`OutputOptions::on_shard`]; `finish` hands the shards over.
    #[serde(default)]
    pub on_shard: Option<OnShard>,
    /// What each part keeps of what it downloads and needs again.
    #[serde(default)]
    pub downloads: Downloads,
    /// BLAKE3 over recipe and inputs' headers, as [`Plan::fingerprint`].
    pub fingerprint: String,
    /// Bins of a sketch: the same in all parts, for their counts are added up.
    sketch_bins: usize,
    /// What the inputs were.
    inputs: Begin,
}

/// Which part of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// From 0.
    pub index: usize,
    /// Of how many.
    pub count: usize,
}

/// A pass of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Count magnitudes to find the thresholds.
    Sketch,
    /// Merge, once all parts are sketched.
    Merge,
}

/// What running a part did.
#[derive(Debug, Clone, Serialize)]
pub struct PartReport {
    /// From 1.
    pub part: usize,
    /// Of how many.
    pub parts: usize,
    /// Output directory.
    pub out: String,
    /// Its counts are there, if the job needs any.
    pub sketched: bool,
    /// Its shards are there.
    pub merged: bool,
    /// All was there already.
    pub done_before: bool,
    /// Number of its shards.
    pub shards: usize,
    /// Tensor bytes read from inputs by this call.
    pub bytes_read: u64,
    /// Bytes of its shards.
    pub bytes_written: u64,
    /// Duration.
    pub wall_seconds: f64,
    /// Peak resident memory of the process, where the system tells.
    pub peak_memory_bytes: Option<u64>,
    /// What the user should know.
    pub warnings: Vec<String>,
}

impl Job {
    /// The job that does `plan`, cut as in `schedule`, into `output`.
    pub fn new(plan: &Plan, schedule: &Schedule, output: &OutputOptions) -> Result<Self> {
        if plan.factors.is_some() {
            return Err(Error::usage("adapters that are merged through their changes are merged in one piece")
                .help("use 'tiesmith merge'"));
        }
        Ok(Self {
            out: output.dir.clone(),
            force: output.force,
            on_shard: output.on_shard.clone(),
            downloads: Downloads::default(),
            fingerprint: plan.fingerprint.clone(),
            sketch_bins: schedule.sketch_bins,
            inputs: Begin::of(plan)?,
        })
    }

    /// How a part is run.
    pub fn schedule(&self, plan: &Plan, run: Run) -> Result<Schedule> {
        Ok(Schedule::with_bins(plan, run, self.sketch_bins)?.keeping(plan, &self.downloads))
    }

    /// The address in an object store that the output goes to, if it does.
    pub fn address(&self) -> Option<&Path> {
        address(self.on_shard.as_ref()).map(Path::new)
    }

    /// Whether its output is published, here or where it goes to.
    fn is_published(&self, plan: &Plan, storage: &dyn Storage) -> Result<bool> {
        holds_output(plan, self.address().unwrap_or(&self.out), storage)
    }

    /// Refuses inputs that are not what they were when the job was planned. Copies with equal times are the same.
    fn admit(&self, plan: &Plan) -> Result<()> {
        self.inputs.admit_copies(plan).map_err(|e| e.replace_help("use the inputs of the plan, or plan again"))
    }
}

impl Part {
    fn check(self) -> Result<()> {
        let Self { index, count } = self;
        if count == 0 || count > MAX_PARTS || index >= count {
            return Err(Error::usage(format!("there is no part {} of {count}", index + 1))
                .help(format!("parts are numbered from 1 to their number, which is at most {MAX_PARTS}")));
        }
        Ok(())
    }

    /// What a file about this part is called.
    fn file(self, what: &str) -> String {
        file_of(what, self.index, self.count)
    }
}

fn file_of(what: &str, index: usize, count: usize) -> String {
    format!("{what}-{:05}-of-{count:05}", index + 1)
}

/// Files about all parts.
fn files_of(what: &str, count: usize) -> Vec<String> {
    (0..count).map(|index| file_of(what, index, count)).collect()
}

/// What one process needs to know to do its part.
struct Desk<'a> {
    plan: &'a Plan,
    job: &'a Job,
    part: Part,
    board: Board,
    schedule: Schedule,
    observer: &'a dyn Observer,
}

/// Does `part` of `job`: of `stage`, or all that is left of it. Work that others do at the same time is waited for, and
/// what nobody does is done here.
pub fn run_part(
    plan: &Plan,
    job: &Job,
    part: Part,
    stage: Option<Stage>,
    run: Run,
    storage: &Arc<dyn Storage>,
    observer: &dyn Observer,
) -> Result<PartReport> {
    let begin = Instant::now();
    part.check()?;
    job.admit(plan)?;
    side_files::check(plan, &**storage)?;
    let schedule = job.schedule(plan, run)?;
    check_memory(&schedule)?;
    schedule.allow_ahead(plan, &**storage);
    let shards = plan.shares(part.count)[part.index].clone();
    let mut report = PartReport {
        part: part.index + 1,
        parts: part.count,
        out: job.out.display().to_string(),
        sketched: true,
        merged: true,
        done_before: true,
        shards: shards.len(),
        bytes_read: 0,
        bytes_written: plan.layout.shards[shards].iter().map(|shard| shard.bytes).sum(),
        wall_seconds: 0.0,
        peak_memory_bytes: None,
        warnings: Vec::new(),
    };
    let parts_dir = OutputDir::parts_dir(&job.out, &**storage)?;
    if !storage.is_dir(&parts_dir) && job.is_published(plan, &**storage)?
        || OutputDir::is_ended(plan, &job.out, job.on_shard.as_ref(), &**storage)?
    {
        return Ok(report);
    }
    let board = take_board(plan, job, part, parts_dir, storage)?;
    let desk = Desk { plan, job, part, board, schedule, observer };
    let looks = Looks::new(&desk);
    if stage != Some(Stage::Merge) {
        report.bytes_read += looks.sketch_own()?;
    }
    report.merged = stage != Some(Stage::Sketch);
    report.done_before = false;
    if stage == Some(Stage::Sketch) {
        report.sketched = looks.sketched();
        report.bytes_written = 0;
    } else {
        if stage.is_some() {
            looks.must_be_sketched()?;
        }
        desk.merge(&looks, &mut report)?;
    }
    report.wall_seconds = begin.elapsed().as_secs_f64();
    report.peak_memory_bytes = peak_memory_bytes();
    Ok(report)
}

/// The board of `job`, which the first to come puts up.
fn take_board(plan: &Plan, job: &Job, part: Part, dir: PathBuf, storage: &Arc<dyn Storage>) -> Result<Board> {
    let board = Board::new(dir, plan, job.sketch_bins, storage);
    let count = (part.count as u64).to_le_bytes();
    OutputDir::take_for_parts(
        plan,
        &job.out,
        (job.force, job.on_shard.as_ref()),
        storage,
        || board.has(MARKER),
        || board.write(MARKER, &count),
    )?;
    let parts = parts_of(&board, &job.out)?;
    if parts != part.count {
        return Err(Error::usage(format!("this merge was begun in {parts} parts, not in {}", part.count))
            .at(&job.out)
            .help(format!("use --part I/{parts}, or remove the directory's .tiesmith folder to start over")));
    }
    Ok(board)
}

/// In how many parts the job is done.
fn parts_of(board: &Board, out: &Path) -> Result<usize> {
    let Some(marker) = board.look(MARKER)? else {
        return Err(Error::input("no part of this merge was run yet")
            .at(out)
            .help("run its parts first: tiesmith run"));
    };
    let start_over = |e: Error| e.replace_help("remove the output directory's .tiesmith folder to start over");
    let marker = marker.map_err(|e| match e.kind() {
        ErrorKind::Input => e.replace_help(
            "use the plan whose merge is under way there, or another --out; or remove the directory's .tiesmith folder to \
             give that merge up",
        ),
        _ => start_over(e),
    })?;
    let count = marker.try_into().map(u64::from_le_bytes).ok().filter(|&count| (1..=MAX_PARTS as u64).contains(&count));
    count.map(|count| count as usize).ok_or_else(|| start_over(board.senseless(MARKER)))
}

impl Desk<'_> {
    /// The schedule of one part.
    fn schedule_of(&self, index: usize) -> Schedule {
        self.schedule.part(self.plan, &self.plan.shares(self.part.count)[index])
    }

    /// Where it is kept, of part `index`, what is downloaded and needed again. What is there is used.
    fn site(&self, index: usize) -> Site<'_> {
        let name = file_of("spool", index, self.part.count);
        Site {
            own: (self.board.path(&name), self.board.path("")),
            name,
            out: &self.job.out,
            // Other parts need theirs too.
            at_once: self.plan.layout.shards.iter().map(|shard| shard.bytes).sum(),
            takes_over: true,
            hashes: false,
            storage: &*self.board.storage,
            room: Room::default(),
        }
    }

    /// What is kept there of tensors that share thresholds, as `schedule` of the part says; `searches` says that nothing of it
    /// was looked at yet.
    fn spool<'s>(&'s self, index: usize, schedule: &'s Schedule, searches: bool) -> Result<Option<Spool<'s>>> {
        Spool::open(self.plan, schedule, &self.site(index), searches, self.observer)
    }

    /// The files, of shards of finished `parts`, that are not what was written.
    fn damaged(&self, parts: &[&PartDone], dir: &OutputDir) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for part in parts {
            files.extend(part.files(self.plan, dir)?);
        }
        self.observer.stage("check", files.iter().map(|(_, shard)| shard.bytes).sum());
        let differing = verify::differing(&files, self.schedule.threads, &*self.board.storage, self.observer)?;
        Ok(differing.into_iter().map(|at| files[at].0.clone()).collect())
    }

    /// Merges the shards of the part, unless that is done.
    fn merge(&self, looks: &Looks<'_>, report: &mut PartReport) -> Result<()> {
        let (plan, part, board) = (self.plan, self.part, &self.board);
        let own = plan.shares(part.count)[part.index].clone();
        let found = looks.complete()?;
        report.bytes_read += found.as_ref().map_or(0, |found| found.bytes_read_here);
        let lock = board.lock(&part.file("merge"))?;
        let journal = board.path(&part.file("journal"));
        let mut dir = OutputDir::of_part(plan, &self.job.out, journal, lock, &board.storage)?;
        if let Some(done) = PartDone::read(plan, board, part)? {
            let is_whole = |dir: &OutputDir| Ok(done.is_there(plan, dir)? && self.damaged(&[&done], dir)?.is_empty());
            let undone = |dir: &OutputDir| {
                if is_whole(dir)? { Ok(true) } else { board.remove(&part.file("done")).map(|()| false) }
            };
            if is_whole(&dir)? || dir.while_nobody_ends(undone)? {
                report.done_before = report.bytes_read == 0;
                return Ok(());
            }
        }
        if !dir.resumes() {
            dir.check_space(report.bytes_written)?;
        }
        let schedule = self.schedule_of(part.index);
        let site = self.site(part.index);
        let spool = match found.is_some() {
            true => Spool::open(plan, &schedule, &site, false, self.observer)?,
            false => None,
        };
        let mut done = PartDone::new(plan, &schedule);
        let written = write_shards(plan, &dir, own.clone(), self.observer, None, &|_| true, |writer, kept: &Kept| {
            let mut passes = Passes::new(plan, &schedule, self.observer, Some(writer), kept);
            (passes.spool, passes.site) = (spool.as_ref(), Some(&site));
            match &found {
                Some(found) => self.merge_shared(&mut passes, found, &mut done)?,
                None => passes.run()?,
            }
            report.bytes_read += passes.read_here();
            done.take(&mut passes, kept);
            Ok(())
        })?;
        check_inputs_unchanged(plan)?;
        self.observer.go_on()?;
        done.seal(plan, own, written);
        done.write(board, part)?;
        spool.into_iter().for_each(Spool::remove);
        Ok(())
    }

    /// Merges the part's tensors with thresholds that all parts share.
    fn merge_shared(&self, passes: &mut Passes<'_>, found: &Found, done: &mut PartDone) -> Result<()> {
        passes.ties_elsewhere = found.ties_elsewhere.clone();
        passes.announce("merge", passes.pass_bytes("merge"));
        self.observer.advance(passes.kept.tally.bytes_read);
        let thresholds: Vec<_> = found.thresholds().found.iter().map(|found| found.map(|(found, _)| found)).collect();
        passes.keep_for(&thresholds)?;
        if let Some(unit) = passes.schedule.units.first() {
            let before = passes.tally().kept;
            passes.merge_unit(unit, &mut None, &found.cuts, found.thresholds(), &found.known())?;
            done.survivors_of_unit(unit, passes, &before);
        }
        passes.direct()
    }
}
