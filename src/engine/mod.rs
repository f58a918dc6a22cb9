//! The engine: the only place that holds a plan and tensor bytes at once.
//!
//! - [`analyze()`] looks at the models of a plan and writes a report, no model.
//! - [`merge`]: takes the output directory, runs the passes, publishes shards and side files.
//! - [`diff()`] and [`inspect()`] stream checkpoints without a plan; [`verify()`] checks a finished output.

mod analyze;
mod by_shard;
mod cut;
mod decoded;
mod diff;
mod elements;
mod exceptions;
mod factor;
mod guess;
mod hand_over;
mod identity;
mod inspect;
mod kept;
mod looks;
mod output;
mod pack;
mod parts;
mod passes;
mod pool;
mod reads;
mod records;
mod repair;
mod scaled;
mod select;
mod shard_hash;
mod shards;
mod side_files;
mod sketching;
mod slot;
mod solo;
mod spool;
mod stored;
mod sweep;
mod tensor_crc;
mod turns;
mod under_way;
mod verify;
mod votes;
mod worker;

pub use analyze::{AnalysisReport, Study, analyze};
pub use decoded::{Decoded, decode_journal};
pub use diff::{Change, DiffOptions, DiffReport, TensorDiff, diff};
pub use factor::FactorReport;
pub use hand_over::OnShard;
pub use inspect::{DtypeTotal, InspectReport, Octave, TensorStats, ValueStats, inspect};
pub use pack::{PackOutput, PackReport, pack, packing_left};
pub use parts::{Job, Part, PartReport, Stage, finish, run_part};
pub use repair::repair;
pub use side_files::check as check_side_files;
pub use sweep::{SweepEntry, SweepOptions, SweepReport, Variant, sweep};
pub use verify::{Damage, DamagedFile, VerifyReport, verify};

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use hand_over::HandedOver;
use kept::Kept;
use output::OutputDir;
use passes::Passes;
use select::Thresholds;
use shards::Written;
use spool::{Site, Spool};
use worker::Tally;

use crate::error::{Error, ErrorKind, Result, printable};
use crate::limits::MAX_SIDE_FILE_BYTES;
use crate::method::{Inputs, Sparsify};
use crate::plan::{Goal, Plan, Schedule, Unit};
use crate::plan::{ThresholdKind, TrimTies};
use crate::storage::{Storage, address_space_is_limited, is_object};

/// Receives progress from worker threads. Every method must be quick and must not fail.
pub trait Observer: Sync {
    /// A stage begins that will handle `bytes` bytes of input (and output, for a writing stage).
    fn stage(&self, name: &str, bytes: u64) {
        let _ = (name, bytes);
    }
    /// So many more bytes of the stage are done.
    fn advance(&self, bytes: u64) {
        let _ = bytes;
    }
    /// Something the user should know, said once.
    fn warn(&self, message: &str) {
        let _ = message;
    }
    /// Whether the work is to stop. It then ends within a moment, with [`ErrorKind::Interrupted`]; the same call goes on
    /// with it later.
    fn stopped(&self) -> bool {
        false
    }
}

impl dyn Observer + '_ {
    /// An error if the work is to stop.
    fn go_on(&self) -> Result<()> {
        if self.stopped() {
            return Err(Error::interrupted("interrupted").help("run the same command again to go on"));
        }
        Ok(())
    }
}

/// Where and how the output is put.
#[derive(Debug, Clone, Default)]
pub struct OutputOptions {
    /// Output directory.
    pub dir: PathBuf,
    /// Replace a finished output.
    pub force: bool,
    /// Throw unfinished work away.
    pub restart: bool,
    /// Keep hashes of what is read, so that an interrupted merge can go on after its inputs were copied or touched. For
    /// merges that begin; not for factors of merged adapters.
    pub hash_inputs: bool,
    /// What becomes of each finished shard, if it is not to stay. For merges.
    pub on_shard: Option<OnShard>,
}

/// What a merge did: printed with `--json`, kept in the manifest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// Output directory.
    pub out: String,
    /// Tensors written.
    pub tensors: u64,
    /// Elements written.
    pub elements: u64,
    /// Shards written.
    pub shards: u64,
    /// Tensor bytes read from inputs, over all passes; those that earlier attempts read for work taken over included.
    pub bytes_read: u64,
    /// Bytes of shards written.
    pub bytes_written: u64,
    /// Shards that were handed over to a command, which may have removed them.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub shards_handed_over: u64,
    /// Duration.
    pub wall_seconds: f64,
    /// Peak resident memory of the process, where the system tells.
    pub peak_memory_bytes: Option<u64>,
    /// Whether work of an earlier run was taken over.
    pub resumed: bool,
    /// Chunks of output taken over.
    pub chunks_reused: u64,
    /// Per model: survivors of the trim that are not zero, as a fraction of the merged elements.
    pub kept_fraction: Vec<f64>,
    /// Per model: certified interval of that fraction, where thresholds come from a sketch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_interval: Option<Vec<[f64; 2]>>,
    /// Per model: survivors whose sign is that of the merged task vector, as a fraction of all its survivors; empty for
    /// methods without task vectors.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub surviving_fraction: Vec<f64>,
    /// Fraction of merged elements whose survivors disagree in sign.
    pub sign_conflict_fraction: f64,
    /// How much the factors of a merged adapter hold, where they were sought.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub factors: Option<FactorReport>,
    /// What the user should know.
    pub warnings: Vec<String>,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Name and version of the program, as recorded in outputs.
const PROGRAM: &str = concat!("tiesmith ", env!("CARGO_PKG_VERSION"));

/// Runs `plan` as cut by `schedule` and publishes the result in `output.dir`.
pub fn merge(
    plan: &Plan,
    schedule: &Schedule,
    output: &OutputOptions,
    storage: &Arc<dyn Storage>,
    observer: &dyn Observer,
) -> Result<Report> {
    let begin = Instant::now();
    check_memory(schedule)?;
    side_files::check(plan, &**storage)?;
    let dir = OutputDir::open(plan, output, storage)?;
    if dir.is_published() {
        return tidy_up(plan, dir, observer);
    }
    schedule.allow_ahead(plan, &**storage);
    match run(plan, schedule, &dir, observer, begin) {
        Ok(finished) => {
            let mut report = publish(plan, schedule, dir, finished, observer)?;
            report.wall_seconds = begin.elapsed().as_secs_f64();
            report.peak_memory_bytes = peak_memory_bytes();
            Ok(report)
        }
        Err(error) => {
            // An input that cannot be used leaves nothing to resume.
            if !can_be_resumed(&error) {
                dir.abandon(plan);
            }
            Err(error)
        }
    }
}

/// Whether the work that ended like this can be gone on with.
fn can_be_resumed(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Failed | ErrorKind::Interrupted)
}

/// Ends what an earlier attempt had finished but for its traces, if it still is what that attempt wrote; the report is the one it
/// left.
fn tidy_up(plan: &Plan, dir: OutputDir, observer: &dyn Observer) -> Result<Report> {
    let damaged = match dir.address() {
        None => verify(&dir.dir, 1, &dir.storage, observer)?.damaged,
        Some(_) => Vec::new(),
    };
    if let Some(file) = damaged.first() {
        let path = dir.dir.join(&file.name);
        dir.tidy_up();
        return Err(Error::failed("the merge was finished, but this file is not what it wrote any more")
            .at(&path)
            .help("repair it with 'tiesmith verify --repair' and the output's directory"));
    }
    let there = dir.address().map(Path::new);
    let report = OutputDir::report_in(&dir.dir, &*dir.storage)
        .or_else(|error| there.map_or(Err(error), |there| OutputDir::report_in(there, &*dir.storage)));
    dir.hand_over_rest(plan, observer)?;
    dir.tidy_up();
    Ok(Report { resumed: true, ..report? })
}

/// What a run found out before its output is published.
struct Finished {
    report: Report,
    written: Written,
    thresholds: Thresholds,
}

/// Whether `dir` holds the finished output of `plan`, and nothing of the work is left beside it: that is removed by whoever
/// takes it up again. A mere lock of a run that is no more goes at once.
pub fn is_finished(plan: &Plan, dir: &Path, storage: &dyn Storage) -> Result<bool> {
    let finished = holds_output(plan, dir, storage)? && !OutputDir::is_begun(dir, storage)?;
    if finished {
        OutputDir::forget_lock(dir, storage);
    }
    Ok(finished)
}

/// Whether what makes `dir` loadable is the output of `plan`, or was handed over as the one shard that it is.
fn holds_output(plan: &Plan, dir: &Path, storage: &dyn Storage) -> Result<bool> {
    let path = dir.join(output::MANIFEST);
    let loadable = output::LOADABLE.iter().any(|name| storage.is_file(&dir.join(name)));
    let may_be_away =
        plan.layout.shards.len() == 1 && !is_object(dir) && !storage.is_dir(&OutputDir::parts_dir(dir, storage)?);
    if !(loadable || may_be_away) || !storage.is_file(&path) {
        return Ok(false);
    }
    let manifest = storage.read_small(&path, MAX_SIDE_FILE_BYTES)?;
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap_or_default();
    let away = manifest["report"]["shards_handed_over"].as_u64().is_some_and(|count| count > 0);
    Ok(manifest["fingerprint"] == *plan.fingerprint && (loadable || away))
}

fn run(plan: &Plan, schedule: &Schedule, dir: &OutputDir, observer: &dyn Observer, begin: Instant) -> Result<Finished> {
    if let Some(factored) = &plan.factors {
        return factor::run(plan, factored, schedule, dir, observer, begin);
    }
    let mut tally = Tally::default();
    let mut thresholds = Thresholds::default();
    let mut warnings = plan.warnings.clone();
    let mut reused = 0;
    // Nothing is merged before the thresholds of its unit are recorded, be they guessed.
    let makes_sense = |kept: &Kept| {
        let merged = |unit: &Unit| unit.tensors.iter().any(|&tensor| kept.has_part_of(tensor));
        let known = |unit: &Unit| kept.unit(plan, unit).is_some() || kept.taken_guess(unit.tensors[0]).is_some();
        schedule.units.iter().all(|unit| !merged(unit) || known(unit))
    };
    let all = 0..plan.layout.shards.len();
    let written = shards::write_shards(plan, dir, all, observer, None, &makes_sense, |writer, kept: &Kept| {
        let searches = schedule.units.iter().any(|unit| kept.unit(plan, unit).is_none());
        let site = schedule.spool.as_ref().map(|_| Site::of_merge(plan, dir, kept, writer.reads().is_some()));
        let spool = match &site {
            Some(site) => Spool::open(plan, schedule, site, searches, observer)?,
            None => None,
        };
        let mut passes = Passes::new(plan, schedule, observer, Some(writer), kept);
        (passes.spool, passes.site) = (spool.as_ref(), site.as_ref());
        // What is handed over cannot be taken back; what is downloaded is kept for a second pass.
        passes.guesses = !dir.hands_over() && !plan.is_remote();
        let done = if dir.hands_over() { passes.run_by_shard() } else { passes.run() };
        tally = passes.tally();
        thresholds = std::mem::take(&mut passes.thresholds);
        warnings.extend(differing_warning(plan, &passes.differing));
        reused = kept.ranges;
        drop(passes);
        Spool::forget(spool, done)
    })?;
    check_inputs_unchanged(plan)?;
    observer.go_on()?;
    if dir.lacks_hashes() {
        warnings.push("--hash-inputs came too late: the merge was begun without it".into());
    }
    let mut report = report(plan, schedule, (&dir.dir, dir.resumes()), &tally, &thresholds, warnings);
    report.chunks_reused = reused;
    report.shards_handed_over = if dir.hands_over() { report.shards } else { 0 };
    report.out = dir.address().map_or(report.out, str::to_owned);
    report.wall_seconds = begin.elapsed().as_secs_f64();
    Ok(Finished { report, written, thresholds })
}

fn publish(
    plan: &Plan,
    schedule: &Schedule,
    dir: OutputDir,
    finished: Finished,
    observer: &dyn Observer,
) -> Result<Report> {
    let Finished { report, written, thresholds } = finished;
    let files = side_files::all(plan, &report, &*dir.storage)?;
    let manifest = |files: &[_]| side_files::manifest(plan, schedule, &written, &thresholds, &report, files);
    dir.publish(plan, files, manifest, &|shard| HandedOver::of_written(plan, shard, &written), observer)?;
    Ok(report)
}

/// Copies that hide a difference between the models are worth a word.
fn differing_warning(plan: &Plan, differing: &BTreeSet<u32>) -> Option<String> {
    let name = printable(&plan.tensors[*differing.first()? as usize].name);
    let count = differing.len();
    Some(format!("{count} tensors that are copied from base differ between the models (first: \"{name}\")"))
}

/// What C libraries set apart for a thread: an arena, and its stack.
const ADDRESSES_OF_A_THREAD: u64 = 66 << 20;

/// Fails before anything is written if the system does not give as much memory as is planned: where an allocation fails,
/// the process ends without a word.
fn check_memory(schedule: &Schedule) -> Result<()> {
    // Where addresses are rationed, what allocators and stacks set apart counts too.
    let apart = if address_space_is_limited() { (schedule.threads as u64 + 1) * ADDRESSES_OF_A_THREAD } else { 0 };
    let bytes = schedule.memory_bytes() + apart;
    let mut room = Vec::<u8>::new();
    let got = room.try_reserve_exact(usize::try_from(bytes).unwrap_or(usize::MAX));
    // Looked at, so that it is really asked for.
    std::hint::black_box(&mut room);
    got.map_err(|_| {
        Error::failed(format!(
            "the system does not give the {} MB of memory that the run needs",
            bytes.div_ceil(1_000_000)
        ))
        .help("use less --memory or fewer --threads, or raise the limit (ulimit -v)")
    })
}

/// Thresholds depend on everything that was read, whatever shard it went into.
fn check_inputs_unchanged(plan: &Plan) -> Result<()> {
    // A view of a file is found where the file is.
    let mut checked = BTreeSet::new();
    let mut files = plan.checkpoints.iter().flat_map(|c| &c.files).filter(|file| checked.insert(file.file.path()));
    files.try_for_each(|file| shards::check_input(&*file.file))
}

fn report(
    plan: &Plan,
    schedule: &Schedule,
    (dir, resumed): (&Path, bool),
    tally: &Tally,
    thresholds: &Thresholds,
    mut warnings: Vec<String>,
) -> Report {
    let trims = plan.needs().inputs == Inputs::TrimmedTaskVectors;
    let kept_fraction: Vec<f64> = (0..plan.models())
        .map(|model| if trims { share(tally.kept[model], plan.merged_elements(model)) } else { 1.0 })
        .collect();
    warnings.extend(tie_warnings(plan, schedule, &tally.kept));
    let notes: BTreeSet<String> =
        plan.checkpoints.iter().flat_map(|c| &c.files).filter_map(|file| file.file.note()).collect();
    warnings.extend(notes);
    Report {
        out: dir.display().to_string(),
        tensors: plan.tensors.len() as u64,
        elements: plan.tensors.iter().map(|t| t.elements).sum(),
        shards: plan.layout.shards.len() as u64,
        bytes_read: tally.bytes_read,
        bytes_written: plan.layout.shards.iter().map(|s| s.bytes).sum(),
        shards_handed_over: 0,
        wall_seconds: 0.0,
        peak_memory_bytes: peak_memory_bytes(),
        resumed,
        chunks_reused: 0,
        kept_interval: kept_interval(plan, thresholds),
        kept_fraction,
        surviving_fraction: surviving(plan, tally),
        sign_conflict_fraction: share(tally.conflicts, tally.merged),
        factors: None,
        warnings,
    }
}

/// A kept fraction far above what was asked for comes from ties at the threshold; that is worth knowing.
fn tie_warnings(plan: &Plan, schedule: &Schedule, kept: &[u64]) -> Vec<String> {
    let flips = matches!(plan.params[0].merger.sparsify(0), Sparsify::Flip { .. });
    if flips || !plan.selects() || plan.trim.as_ref().is_none_or(|t| t.ties != TrimTies::Keep) {
        return Vec::new();
    }
    let mut wanted = vec![0; plan.models()];
    for unit in &schedule.units {
        for (index, goal) in plan.goals(unit).iter().enumerate() {
            let model = index % plan.models();
            let count: u64 = match goal {
                Goal::All => unit.tensors.iter().map(|&t| plan.merged_length(t, model)).sum(),
                Goal::Keep { keep, .. } => *keep,
                Goal::Nothing => 0,
            };
            match index < plan.models() {
                true => wanted[model] += count,
                // Of outliers, the largest magnitude kept is counted along.
                false => wanted[model] -= count.saturating_sub(1),
            }
        }
    }
    let excessive = |(_, (wanted, kept)): &(usize, (&u64, &u64))| **kept > **wanted + **wanted / 10;
    wanted
        .iter()
        .zip(kept)
        .enumerate()
        .filter(excessive)
        .map(|(model, (&wanted, &kept))| {
            let percent = |part| share(part, plan.merged_elements(model)) * 100.0;
            format!(
                "model {}: {:.1} % of the task vector is kept where {:.1} % were asked for, because many entries are \
                 equal to the threshold; --trim-ties sample keeps an even share of them",
                model + 1,
                percent(kept),
                percent(wanted)
            )
        })
        .collect()
}

/// Certified interval of each model's kept fraction, where thresholds come from a sketch.
fn kept_interval(plan: &Plan, thresholds: &Thresholds) -> Option<Vec<[f64; 2]>> {
    plan.trim.as_ref().filter(|t| plan.selects() && t.threshold == ThresholdKind::Sketch)?;
    let share = |(model, bounds): (usize, &[u64; 2])| bounds.map(|n| share(n, plan.merged_elements(model)));
    Some(thresholds.survivors.iter().enumerate().map(share).collect())
}

/// What of each model's survivors points the way the merged task vector does.
fn surviving(plan: &Plan, tally: &Tally) -> Vec<f64> {
    let flips = matches!(plan.params[0].merger.sparsify(0), Sparsify::Flip { .. });
    match plan.needs().inputs {
        _ if flips => Vec::new(),
        Inputs::Weights => Vec::new(),
        Inputs::TrimmedTaskVectors => {
            tally.agreeing.iter().zip(&tally.kept).map(|(&of, &all)| share(of, all)).collect()
        }
        // Untrimmed: of all entries.
        Inputs::TaskVectors => {
            (0..plan.models()).map(|model| share(tally.agreeing[model], plan.merged_elements(model))).collect()
        }
    }
}

/// `part` of `whole`, 0 of nothing.
fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// Peak resident memory of this process, mapped pages included, where the system tells.
fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}
