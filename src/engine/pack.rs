//! Packs a checkpoint into a `.tvz` file: what differs from its base, trimmed if that is asked for.
//!
//! - Trimmed (density below 1): of a float tensor, the elements whose task vector survives the trim are stored with the
//!   checkpoint's own bits; at all others the packed checkpoint has base's bits. Tensors of other types are not trimmed.
//! - Whole (density 1): every element whose bits differ is stored, so that nothing at all is lost: payloads of NaN,
//!   negative zeros, tensors of other types and shapes than base's (whole), tensors that base lacks.
//! - Chunks are compressed by all workers and written in order: the same bytes for any number of threads.
//! - What was packed is kept when the work is interrupted (`target`), and the file appears under its name when it is complete
//!   and durable.

mod target;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::cut::Cut;
use super::passes::{Passes, lock, prefetch, whole};
use super::pool;
use super::records::{self, UnitDone};
use super::select::{UnitThresholds, cuts, solo_thresholds, tensor_cuts};
use super::shard_hash::Digest;
use super::slot::{Loaded, Slot};
use super::turns::{Pending, Turns};
use super::under_way::{Keeps, Notes, for_a_while};
use super::worker::Worker;
use super::{Observer, PROGRAM, check_inputs_unchanged, peak_memory_bytes, share};
use crate::checkpoint::packed::{self, CHUNK, Contents, Encoder, Entry, Settings, Tensor, checksum, identify, tail};
use crate::checkpoint::{Checkpoint, TensorEntry};
use crate::dtype::{Float, dtype_name};
use crate::error::{Error, Result};
use crate::limits::{PREFETCH_BYTES, WRITE_BEHIND_SECONDS};
use crate::plan::{Action, Chunk, Goal, Piece, Plan, Run, Schedule, Scope, Unit, UnitKind, Wanted};
use crate::sketch::Threshold;
use crate::storage::Storage;
use target::{Left, Place, Target};

/// Indexes of base and of the checkpoint that is packed among the plan's checkpoints.
const BASE: usize = 0;
const MODEL: usize = 1;
/// What the index takes until it is written, in bytes per chunk: itself, as bytes, and compressed.
const CHUNK_BYTES: u64 = 3 * size_of::<Entry>() as u64 + 16;
/// File name extension of packed task vectors.
pub(super) const EXTENSION: &str = "tvz";

/// Where a packed task vector goes.
#[derive(Debug, Clone)]
pub struct PackOutput {
    /// The file.
    pub file: PathBuf,
    /// Replace a file that is there, and unfinished work of other inputs or settings.
    pub force: bool,
}

/// What packing did.
#[derive(Debug, Clone, Serialize)]
pub struct PackReport {
    /// The file.
    pub out: String,
    /// Tensors packed.
    pub tensors: u64,
    /// Elements packed.
    pub elements: u64,
    /// Elements stored, as a fraction of those of tensors that base has too.
    pub stored_fraction: f64,
    /// Bytes of the checkpoint's tensors.
    pub checkpoint_bytes: u64,
    /// Bytes of the file.
    pub bytes_written: u64,
    /// `checkpoint_bytes` over `bytes_written`.
    pub ratio: f64,
    /// Tensor bytes read, of both checkpoints, over all passes; those that earlier attempts read for work taken over included.
    pub bytes_read: u64,
    /// Duration.
    pub wall_seconds: f64,
    /// Peak resident memory of the process, where the system tells.
    pub peak_memory_bytes: Option<u64>,
    /// Whether work of an earlier run was taken over.
    pub resumed: bool,
    /// Chunks taken over.
    pub chunks_reused: u64,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// Packs the one model of `plan`, which trims it, against its base. A plan that merges nothing packs it whole.
pub fn pack(
    plan: &Plan,
    run: Run,
    output: &PackOutput,
    storage: &Arc<dyn Storage>,
    observer: &dyn Observer,
) -> Result<PackReport> {
    let begin = Instant::now();
    let jobs = jobs(plan)?;
    let packing = Packing::new(plan, &jobs);
    let schedule = packing.schedule(run)?;
    super::check_memory(&schedule)?;
    let place = Place::take(plan, output, &**storage)?;
    let (left, contents) = match packing.left(&place, output.force, observer) {
        Ok(left) => left,
        Err(error) => {
            place.leave();
            return Err(error);
        }
    };
    let (finished, resumed, chunks_reused) = (left.finished, left.is_something(), left.chunks.len() as u64);
    let done = packing.run(&schedule, &place, (left, &contents), &**storage, observer);
    place.close(finished, done).map(|done| {
        let elements = jobs.iter().map(|job| job.units).sum();
        let checkpoint_bytes = jobs.iter().map(|job| job.units * job.width as u64).sum();
        let compared = jobs.iter().filter(|job| job.base.is_some()).map(|job| job.units).sum();
        PackReport {
            out: output.file.display().to_string(),
            tensors: jobs.len() as u64,
            elements,
            stored_fraction: share(done.stored, compared),
            checkpoint_bytes,
            bytes_written: done.bytes_written,
            ratio: checkpoint_bytes as f64 / done.bytes_written as f64,
            bytes_read: done.bytes_read,
            wall_seconds: begin.elapsed().as_secs_f64(),
            peak_memory_bytes: peak_memory_bytes(),
            resumed,
            chunks_reused,
            warnings: plan.checkpoints.iter().flat_map(|c| c.warnings.iter().cloned()).collect(),
        }
    })
}

/// Reads what is left of an interrupted packing as [`pack`] does; returns how many chunks are kept, and whether ties are.
pub fn packing_left(plan: &Plan, output: &PackOutput, storage: &dyn Storage) -> Result<(usize, bool)> {
    struct Silent;
    impl Observer for Silent {}
    let jobs = jobs(plan)?;
    let place = Place::take(plan, output, storage)?;
    let left = Packing::new(plan, &jobs).left(&place, output.force, &Silent);
    place.leave();
    left.map(|(left, _)| (left.chunks.len(), !left.ties.is_empty()))
}

/// A tensor to pack.
struct Job<'a> {
    entry: &'a TensorEntry,
    /// Base's tensor of the same name, type and shape.
    base: Option<&'a TensorEntry>,
    /// Its index in the plan, if it is trimmed.
    trimmed: Option<u32>,
    width: usize,
    units: u64,
}

impl Job<'_> {
    fn chunks(&self) -> u64 {
        self.units.div_ceil(CHUNK as u64)
    }
}

/// The tensors of the model, in the order in which it stores them.
fn jobs<'a>(plan: &'a Plan) -> Result<Vec<Job<'a>>> {
    let (base, model) = (&plan.checkpoints[BASE], &plan.checkpoints[MODEL]);
    let trims = plan.trim.is_some();
    let mut planned = std::collections::HashMap::new();
    for (index, tensor) in plan.tensors.iter().enumerate() {
        if matches!(tensor.action, Action::Merge { .. }) {
            planned.insert(&*tensor.name, index as u32);
        }
    }
    let mut entries: Vec<&TensorEntry> = model.tensors.iter().collect();
    entries.sort_by_key(|entry| (entry.file, entry.offset));
    let job = |entry: &'a TensorEntry| {
        let (width, units) = packed::units(entry.dtype, &entry.shape)?;
        let namesake = base.get(&entry.name);
        let own = namesake.filter(|own| own.dtype == entry.dtype && own.shape == entry.shape);
        if let (true, Some(other), None) = (trims && Float::from_dtype(entry.dtype).is_some(), namesake, own) {
            return Err(Error::input(format!(
                "{} of shape {:?}, but base has {} of shape {:?}: what is trimmed must be as in base",
                dtype_name(entry.dtype),
                entry.shape,
                dtype_name(other.dtype),
                other.shape
            ))
            .at(model.path_of(entry))
            .tensor(&entry.name)
            .help("--density 1 packs it whole"));
        }
        let trimmed = own.and_then(|_| planned.get(&*entry.name)).copied().filter(|_| trims);
        Ok(Job { entry, base: own, trimmed, width, units })
    };
    entries.into_iter().map(job).collect()
}

/// What was packed, by this run or an earlier one.
struct Done {
    stored: u64,
    bytes_read: u64,
    bytes_written: u64,
}

/// Everything that a run shares.
struct Packing<'a> {
    plan: &'a Plan,
    jobs: &'a [Job<'a>],
    /// Widest element.
    width: usize,
}

/// One thread's buffers.
struct Packer {
    worker: Worker,
    encoder: Encoder,
    /// A bit per element of the chunk: whether it is stored.
    mask: Vec<u64>,
}

/// A chunk to pack.
#[derive(Clone, Copy)]
struct Item {
    job: usize,
    number: u64,
}

impl<'a> Packing<'a> {
    fn new(plan: &'a Plan, jobs: &'a [Job<'a>]) -> Self {
        Self { plan, jobs, width: jobs.iter().map(|job| job.width).max().unwrap_or(1) }
    }

    fn items(&self) -> impl Iterator<Item = Item> + '_ {
        self.jobs.iter().enumerate().flat_map(|(job, own)| (0..own.chunks()).map(move |number| Item { job, number }))
    }

    /// What earlier attempts left in `place`, and what the file says behind its chunks.
    fn left(&self, place: &Place<'_>, force: bool, observer: &dyn Observer) -> Result<(Left, Contents)> {
        let contents = self.contents(&self.plan.checkpoints[BASE])?;
        let chunks = self.jobs.iter().map(Job::chunks).sum::<u64>() as usize;
        Ok((place.left(self.plan, (chunks, &contents), force, observer)?, contents))
    }

    /// What packing takes beside finding thresholds, in bytes.
    fn memory(&self, threads: usize) -> u64 {
        let buffers = 2 * (CHUNK * self.width) as u64 + CHUNK as u64 / 8 + Encoder::held_bytes(self.width);
        let names: u64 = self.jobs.iter().map(|job| 4 * job.entry.name.len() as u64 + 256).sum();
        let chunks: u64 = self.jobs.iter().map(Job::chunks).sum();
        threads as u64 * buffers + chunks * CHUNK_BYTES + names
    }

    fn schedule(&self, run: Run) -> Result<Schedule> {
        for threads in (1..=run.threads.max(1)).rev() {
            let extra = self.memory(threads);
            let Some(memory_bytes) = run.memory_bytes.checked_sub(extra) else { continue };
            if let Ok(mut schedule) = Schedule::new(self.plan, Run { memory_bytes, threads, ..run }) {
                schedule.memory.push((format!("packing ({threads} threads)"), extra));
                return Ok(schedule);
            }
        }
        let smallest = Schedule::smallest_memory(self.plan) + self.memory(1);
        Err(Error::usage(format!(
            "--memory {} bytes is too little to pack this: at least {smallest} bytes are needed",
            run.memory_bytes
        ))
        .help(format!("use --memory {}MB or more", smallest.div_ceil(1_000_000))))
    }

    fn run(
        &self,
        schedule: &Schedule,
        place: &Place<'_>,
        (mut left, contents): (Left, &Contents),
        storage: &dyn Storage,
        observer: &dyn Observer,
    ) -> Result<Done> {
        if left.finished {
            let bytes_written = storage.identity(place.path())?.map_or(0, |found| found.bytes);
            let bytes_read = self.found_before(schedule, &left).saturating_add(self.reads(&left.ties));
            return Ok(Done { stored: self.stored(&left.chunks), bytes_read, bytes_written });
        }
        let target = place.begin(self.plan, &mut left, keep_after(schedule))?;
        let done = self.go_on(schedule, &target, (left, contents), storage, observer);
        done.inspect_err(|error| target.interrupted(error))
    }

    /// Does what is left.
    fn go_on(
        &self,
        schedule: &Schedule,
        target: &Target<'_>,
        (left, contents): (Left, &Contents),
        storage: &dyn Storage,
        observer: &dyn Observer,
    ) -> Result<Done> {
        schedule.allow_ahead(self.plan, storage);
        let mut passes = Passes::new(self.plan, schedule, observer, None, &left.kept);
        let notes = Notes { keeper: target, left: &left.kept.under_way, of: Digest::default(), more_to_come: false };
        passes.notes = Some(notes);
        let cuts = thresholds(&mut passes, target)?;
        let searched = passes.tally().bytes_read;
        let widths = [self.width as u64; 2];
        let mut packers = std::mem::take(&mut passes.workers)
            .into_iter()
            .map(|mut worker| {
                worker.slot = Slot::new(&widths, CHUNK as u64);
                Ok(Packer { worker, encoder: Encoder::new(self.width)?, mask: Vec::with_capacity(CHUNK / 64) })
            })
            .collect::<Result<Vec<_>>>()?;
        let mut ties = left.ties;
        if cuts.iter().flatten().any(|cut| matches!(cut, Cut::Lowest { .. })) {
            ties = self.count_ties(&cuts, ties, (&mut packers, target, keep_after(schedule)), observer)?;
        }
        let bytes_read = searched.saturating_add(self.reads(&ties));
        self.write(&cuts, &self.ties_before(&ties), &mut packers, target, observer)?;
        let mut stored = 0;
        let bytes_written = target.finish(|chunks, end| {
            stored = self.stored(chunks);
            tail(contents, chunks, end)
        })?;
        storage.check_mapped()?;
        check_inputs_unchanged(self.plan)?;
        Ok(Done { stored, bytes_read, bytes_written })
    }

    /// Tensor bytes that an earlier attempt read to find all thresholds.
    fn found_before(&self, schedule: &Schedule, left: &Left) -> u64 {
        let units = schedule.units.iter().filter_map(|unit| left.kept.unit(self.plan, unit));
        // A journal can say anything.
        units.fold(0, |sum: u64, known| sum.saturating_add(known.bytes_read))
    }

    /// Tensor bytes that packing all chunks reads, and counting ties before, if they are counted.
    fn reads(&self, ties: &[u64]) -> u64 {
        let again = |job: &Job<'_>| 1 + u64::from(!ties.is_empty() && job.trimmed.is_some());
        self.jobs.iter().map(|job| again(job) * job.units * (job.width * sides(job)) as u64).sum()
    }

    /// Elements stored of tensors that base has too.
    fn stored(&self, chunks: &[Entry]) -> u64 {
        let own = |(item, chunk): (Item, &Entry)| self.jobs[item.job].base.map(|_| u64::from(chunk.stored));
        self.items().zip(chunks).filter_map(own).sum()
    }

    fn contents(&self, base: &Checkpoint) -> Result<Contents> {
        let recipe = &self.plan.recipe;
        let density = if self.plan.trim.is_some() { self.plan.params[0].density[0] } else { 1.0 };
        let word = |value: serde_json::Result<serde_json::Value>| {
            value.ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
        };
        let tensor = |job: &Job<'_>| Tensor {
            name: job.entry.name.to_string(),
            dtype: job.entry.dtype,
            shape: job.entry.shape.to_vec(),
            delta: job.base.is_some(),
        };
        Ok(Contents {
            program: PROGRAM.into(),
            settings: Settings {
                density,
                scope: word(serde_json::to_value(recipe.scope)),
                trim_ties: word(serde_json::to_value(recipe.trim_ties)),
                threshold: word(serde_json::to_value(recipe.threshold)),
                seed: recipe.seed,
            },
            fingerprint: None,
            base: identify(base, &base.spec)?,
            tensors: self.jobs.iter().map(tensor).collect(),
        })
    }

    /// Packs the chunks that are left, and writes them in order.
    fn write(
        &self,
        cuts: &[Vec<Cut>],
        ties: &[u64],
        packers: &mut [Packer],
        target: &Target<'_>,
        observer: &dyn Observer,
    ) -> Result<()> {
        observer.stage("pack", self.jobs.iter().map(|job| job.units * (job.width * sides(job)) as u64).sum());
        let (end, first) = target.start();
        observer.advance(self.items().take(first).map(|item| self.bytes(item)).sum());
        let turns = Turns::new(end);
        let lookahead = (PREFETCH_BYTES / (2 * CHUNK * self.width) as u64).clamp(1, 64) as usize;
        let ahead = |&item: &Item| self.announce(item);
        pool::run(packers, self.items().skip(first), lookahead, ahead, |packer, ordinal, item| {
            observer.go_on()?;
            let mut pending = Pending::new(&turns, ordinal);
            let before = ties.get(first + ordinal).copied().unwrap_or(0);
            let (bytes, entry) = packer.pack(self, item, cuts, before)?;
            let offset = turns.take(ordinal, |end: &mut u64| {
                *end += bytes.len() as u64;
                *end - bytes.len() as u64
            })?;
            pending.complete();
            target.write(first + ordinal, entry, bytes, offset)?;
            observer.advance(self.bytes(item));
            Ok(())
        })
    }

    /// Tensor bytes that packing a chunk reads.
    fn bytes(&self, item: Item) -> u64 {
        let job = &self.jobs[item.job];
        self.count(item) * (job.width * sides(job)) as u64
    }

    /// Elements of a chunk.
    fn count(&self, item: Item) -> u64 {
        (self.jobs[item.job].units - item.number * CHUNK as u64).min(CHUNK as u64)
    }

    fn announce(&self, item: Item) {
        let job = &self.jobs[item.job];
        let (start, length) = (item.number * (CHUNK * job.width) as u64, self.count(item) * job.width as u64);
        for (checkpoint, entry) in [(MODEL, Some(job.entry)), (BASE, job.base)] {
            if let Some(entry) = entry {
                let file = &self.plan.checkpoints[checkpoint].files[entry.file as usize].file;
                file.prefetch(entry.offset + start, length);
            }
        }
    }

    /// The ties in each chunk, of the model's task vector, beginning with those that are known; what is counted is kept.
    fn count_ties(
        &self,
        cuts: &[Vec<Cut>],
        mut counted: Vec<u64>,
        (packers, target, keep_after): (&mut [Packer], &Target<'_>, Duration),
        observer: &dyn Observer,
    ) -> Result<Vec<u64>> {
        observer.stage("count ties", self.items().map(|item| self.bytes(item)).sum());
        observer.advance(self.items().take(counted.len()).map(|item| self.bytes(item)).sum());
        let mut items = self.items().skip(counted.len()).peekable();
        while items.peek().is_some() {
            let counts = Mutex::new(BTreeMap::new());
            let stretch = for_a_while(&mut items, Some(keep_after));
            pool::run(
                packers,
                stretch,
                1,
                |&item| self.announce(item),
                |packer, ordinal, item| {
                    observer.go_on()?;
                    let ties = packer.count_ties(self, item, cuts)?;
                    lock(&counts).insert(ordinal, ties);
                    observer.advance(self.bytes(item));
                    Ok(())
                },
            )?;
            let counts: Vec<u64> = counts.into_inner().unwrap_or_else(PoisonError::into_inner).into_values().collect();
            target.keep_ties(counted.len(), &counts)?;
            counted.extend(counts);
        }
        Ok(counted)
    }

    /// Per chunk, the ties in its unit that lie before it, if ties are kept by position.
    fn ties_before(&self, counts: &[u64]) -> Vec<u64> {
        if counts.is_empty() {
            return Vec::new();
        }
        let items: Vec<Item> = self.items().collect();
        // Positions are counted in the order of names.
        let mut order: Vec<usize> = (0..items.len()).collect();
        order.sort_by_key(|&at| (&self.jobs[items[at].job].entry.name, items[at].number));
        let mut before = vec![0; items.len()];
        let (mut sum, mut last) = (0, None);
        for at in order {
            if self.plan.scope == Scope::Tensor && last != Some(items[at].job) {
                sum = 0;
            }
            (before[at], last) = (sum, Some(items[at].job));
            sum += counts[at];
        }
        before
    }

    fn chunk(&self, item: Item, tensor: u32) -> Chunk {
        Chunk { tensor, start: item.number * CHUNK as u64, count: self.count(item) }
    }
}

/// How many checkpoints a tensor is read of.
fn sides(job: &Job<'_>) -> usize {
    1 + usize::from(job.base.is_some())
}

impl Packer {
    /// Loads a chunk of the tensor and of base's.
    fn load(&mut self, packing: &Packing<'_>, item: Item) -> Result<()> {
        let job = &packing.jobs[item.job];
        let start = item.number * (CHUNK * job.width) as u64;
        let length = packing.count(item) as usize * job.width;
        for (checkpoint, entry) in [(MODEL, Some(job.entry)), (BASE, job.base)] {
            let Some(entry) = entry else { continue };
            let file = &*packing.plan.checkpoints[checkpoint].files[entry.file as usize].file;
            self.worker.slot.show(checkpoint, file, entry.offset + start, length).map_err(|e| e.tensor(&entry.name))?;
        }
        Ok(())
    }

    /// The ties in a chunk of the model's task vector.
    fn count_ties(&mut self, packing: &Packing<'_>, item: Item, cuts: &[Vec<Cut>]) -> Result<u64> {
        let Some(tensor) = packing.jobs[item.job].trimmed else { return Ok(0) };
        self.load(packing, item)?;
        let slot = std::mem::take(&mut self.worker.slot);
        let data = Loaded { plan: packing.plan, chunk: packing.chunk(item, tensor), slot: &slot };
        let counted = self.worker.count_ties(data, &cuts[tensor as usize]);
        self.worker.slot = slot;
        Ok(counted?[0])
    }

    /// A chunk, compressed, and its entry. `before` are the ties before it.
    fn pack(&mut self, packing: &Packing<'_>, item: Item, cuts: &[Vec<Cut>], before: u64) -> Result<(&[u8], Entry)> {
        let job = &packing.jobs[item.job];
        self.load(packing, item)?;
        let slot = std::mem::take(&mut self.worker.slot);
        let piece = |checkpoint: usize| Piece { checkpoint: checkpoint as u32, entry: 0 };
        let (model, base) = (slot.bytes(piece(MODEL)), job.base.map(|_| slot.bytes(piece(BASE))));
        self.mask.clear();
        let masked = match (job.trimmed, base) {
            (Some(tensor), _) => {
                let chunk = packing.chunk(item, tensor);
                let cuts = tensor_cuts(packing.plan, chunk, &cuts[tensor as usize], &[]);
                let data = Loaded { plan: packing.plan, chunk, slot: &slot };
                mark_kept(&mut self.worker, data, &cuts, before, &mut self.mask)
            }
            (None, Some(base)) => {
                mark_differing(model, base, job.width, &mut self.mask);
                Ok(())
            }
            (None, None) => {
                mark_all(model.len() / job.width, &mut self.mask);
                Ok(())
            }
        };
        let packed = masked.and_then(|()| {
            let (bytes, stored) = self.encoder.encode(model, base, job.width, &self.mask)?;
            let base = base.map_or(0, checksum);
            Ok((bytes, Entry { stored, length: bytes.len() as u32, check: checksum(bytes), base }))
        });
        self.worker.slot = slot;
        packed
    }
}

/// Marks the elements of the chunk whose task vector survives the trim.
fn mark_kept(worker: &mut Worker, data: Loaded<'_>, cuts: &[Cut], before: u64, mask: &mut Vec<u64>) -> Result<()> {
    let (model, piece) = data.merge().models[0];
    let mut seen = vec![before; cuts.len()];
    for span in data.tiles() {
        worker.load_base(span);
        worker.trimmed_task_vector(span, (model as usize, piece), cuts, &mut seen)?;
        let tau = &worker.tiles.inputs[0][..span.length];
        let word = |tau: &[f32]| tau.iter().rev().fold(0, |word, &tau| word << 1 | u64::from(tau != 0.0));
        mask.extend(tau.chunks(64).map(word));
    }
    Ok(())
}

/// Marks the elements whose bytes differ.
pub(super) fn mark_differing(model: &[u8], base: &[u8], width: usize, mask: &mut Vec<u64>) {
    match width {
        1 => differing::<1>(model, base, mask),
        2 => differing::<2>(model, base, mask),
        4 => differing::<4>(model, base, mask),
        _ => differing::<8>(model, base, mask),
    }
}

fn differing<const W: usize>(model: &[u8], base: &[u8], mask: &mut Vec<u64>) {
    let (model, base) = (model.as_chunks::<W>().0, base.as_chunks::<W>().0);
    let word = |(model, base): (&[[u8; W]], &[[u8; W]])| {
        model.iter().zip(base).rev().fold(0, |word, (model, base)| word << 1 | u64::from(model != base))
    };
    mask.extend(model.chunks(64).zip(base.chunks(64)).map(word));
}

/// Marks all of `elements`.
pub(super) fn mark_all(elements: usize, mask: &mut Vec<u64>) {
    mask.extend(std::iter::repeat_n(u64::MAX, elements / 64));
    if !elements.is_multiple_of(64) {
        mask.push(u64::MAX >> (64 - elements % 64));
    }
}

/// For how long what is done need not be recorded.
fn keep_after(schedule: &Schedule) -> Duration {
    schedule.keep_after.min(Duration::from_secs(WRITE_BEHIND_SECONDS))
}

/// What survives of each tensor of the plan. What is found is kept.
fn thresholds(passes: &mut Passes<'_>, target: &Target<'_>) -> Result<Vec<Vec<Cut>>> {
    let (plan, schedule, observer) = (passes.plan, passes.schedule, passes.observer);
    let mut all = vec![vec![Cut::NonZero]; plan.tensors.len()];
    if !schedule.units.is_empty() {
        observer.stage("sketch", schedule.search_bytes(plan));
    }
    let mut solo = Vec::new();
    for unit in &schedule.units {
        let goals = plan.goals(unit);
        let found = match passes.kept.unit(plan, unit) {
            Some(known) => {
                passes.take_over_reads(known.bytes_read);
                observer.advance(known.bytes_read);
                known.found.iter().map(|found| found.map(|(threshold, _)| threshold)).collect()
            }
            None if unit.kind == UnitKind::Solo => {
                solo.push(unit);
                continue;
            }
            None => shared(passes, unit, &goals, target)?,
        };
        unit.tensors.iter().for_each(|&tensor| all[tensor as usize] = cuts(plan, &goals, &found));
    }
    let bins = schedule.sketch_bins;
    let found_cuts = Mutex::new((&mut all, Vec::new(), Instant::now()));
    let items = solo.iter().filter(|unit| unit.elements > 0);
    pool::run(
        &mut passes.workers,
        items,
        1,
        |unit| _ = prefetch(plan, whole(unit), Wanted::All),
        |worker, _, unit| {
            let (chunk, goals) = (whole(unit), plan.goals(unit));
            let before = worker.tally.bytes_read;
            let mut found = Vec::new();
            worker.load(plan, chunk, plan.pieces(chunk.tensor, Wanted::All), observer, |worker, data| {
                found = solo_thresholds(worker, data, &goals, bins)?;
                Ok(())
            })?;
            let done = unit_done(unit, &goals, &found, worker.tally.bytes_read - before);
            let (all, unkept, kept) = &mut *found_cuts.lock().unwrap_or_else(PoisonError::into_inner);
            all[chunk.tensor as usize] = cuts(plan, &goals, &found);
            unkept.push(done);
            if kept.elapsed() < keep_after(schedule) {
                return Ok(());
            }
            *kept = Instant::now();
            target.keep_entries(std::mem::take(unkept))
        },
    )?;
    let (_, unkept, _) = found_cuts.into_inner().unwrap_or_else(PoisonError::into_inner);
    target.keep_entries(unkept)?;
    Ok(all)
}

/// The thresholds of a unit that all workers share.
fn shared(passes: &mut Passes<'_>, unit: &Unit, goals: &[Goal], target: &Target<'_>) -> Result<Vec<Option<Threshold>>> {
    let before = passes.tally().bytes_read;
    let mut resident = passes.hold(unit);
    let found = passes.shared_thresholds(unit, goals, &mut resident, None)?;
    passes.give_back(resident);
    target.keep_entries(vec![unit_done(unit, goals, &found, passes.tally().bytes_read - before)])?;
    Ok(found)
}

fn unit_done(unit: &Unit, goals: &[Goal], found: &[Option<Threshold>], bytes_read: u64) -> records::Entry {
    let UnitThresholds { tensor, found } = UnitThresholds::new(unit, goals, found);
    records::Entry::Unit(UnitDone { tensor, found, majority: 0, bytes_read, facts: Vec::new() })
}
