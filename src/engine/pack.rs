//! Packs a checkpoint into a `.tvz` file: what differs from its base, trimmed if that is asked for.
//!
//! - Trimmed (density below 1): of a float tensor, the elements whose task vector survives the trim are stored with the
//!   checkpoint's own bits; at all others the packed checkpoint has base's bits. Tensors of other types are not trimmed.
//! - Whole (density 1): every element whose bits differ is stored, so that nothing at all is lost: payloads of NaN,
//!   negative zeros, tensors of other types and shapes than base's (whole), tensors that base lacks.
//! - Chunks are compressed by all workers and written in order: the same bytes for any number of threads.
//! - The file appears under its name when it is complete and durable.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde::Serialize;

use super::cut::Cut;
use super::kept::Kept;
use super::passes::{Passes, prefetch, whole};
use super::pool;
use super::select::{cuts, solo_thresholds, tensor_cuts};
use super::slot::{Loaded, Slot};
use super::turns::{Pending, Turns};
use super::worker::Worker;
use super::{Observer, PROGRAM, check_inputs_unchanged, peak_memory_bytes, share};
use crate::checkpoint::packed::{
    self, CHUNK, Contents, Encoder, Entry, HEAD_BYTES, Settings, Tensor, checksum, head, identify, tail,
};
use crate::checkpoint::{Checkpoint, TensorEntry};
use crate::dtype::{Float, dtype_name};
use crate::error::{Error, Result};
use crate::limits::{PREFETCH_BYTES, WRITE_BEHIND_BYTES};
use crate::plan::{Action, Chunk, Piece, Plan, Run, Schedule, Scope, UnitKind, Wanted};
use crate::storage::{OutputFile, Storage};

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
    /// Replace a file that is there.
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
    /// Tensor bytes read, of both checkpoints, over all passes.
    pub bytes_read: u64,
    /// Duration.
    pub wall_seconds: f64,
    /// Peak resident memory of the process, where the system tells.
    pub peak_memory_bytes: Option<u64>,
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
    let target = Target::new(plan, output, &**storage)?;
    let result = packing.run(&schedule, &target, &**storage, observer);
    target.close(result, &**storage).map(|(counted, bytes_written)| {
        let elements = jobs.iter().map(|job| job.units).sum();
        let checkpoint_bytes = jobs.iter().map(|job| job.units * job.width as u64).sum();
        let compared = jobs.iter().filter(|job| job.base.is_some()).map(|job| job.units).sum();
        PackReport {
            out: output.file.display().to_string(),
            tensors: jobs.len() as u64,
            elements,
            stored_fraction: share(counted.stored, compared),
            checkpoint_bytes,
            bytes_written,
            ratio: checkpoint_bytes as f64 / bytes_written as f64,
            bytes_read: counted.bytes_read,
            wall_seconds: begin.elapsed().as_secs_f64(),
            peak_memory_bytes: peak_memory_bytes(),
            warnings: plan.checkpoints.iter().flat_map(|c| c.warnings.iter().cloned()).collect(),
        }
    })
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

/// A file while it is made.
struct Target {
    path: PathBuf,
    partial: PathBuf,
    lock_path: PathBuf,
    /// Its folder did not exist before.
    created: bool,
    _lock: crate::storage::Lock,
}

impl Target {
    fn new(plan: &Plan, output: &PackOutput, storage: &dyn Storage) -> Result<Self> {
        let path = &output.file;
        if plan.checkpoints[BASE].derived.packed {
            return Err(Error::input("base is itself a packed task vector")
                .at(Path::new(&plan.checkpoints[BASE].spec))
                .help("give a whole checkpoint as --base: the one that it was packed against, or what 'tiesmith unpack' makes of it"));
        }
        if path.extension().is_none_or(|extension| extension != EXTENSION) {
            return Err(Error::usage("the name of a packed task vector ends in .tvz").at(path));
        }
        if storage.is_dir(path) {
            return Err(Error::input("a directory is there").at(path).help("use another --out"));
        }
        if storage.identity(path)?.is_some() && !output.force {
            return Err(Error::input("the file is already there").at(path).help("use another --out, or --force"));
        }
        let folder = folder(path);
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let unwritable = |e: Error| e.as_input().help("choose an --out that you may write to");
        let created = storage.identity(folder)?.is_none();
        let lock_path = folder.join(format!(".{name}.lock"));
        let lock = storage.lock(&lock_path).map_err(unwritable)?;
        let partial = path.with_added_extension("partial");
        Ok(Self { path: path.clone(), partial, lock_path, created, _lock: lock })
    }

    /// Gives the file its name if it is complete, and removes what is left of it if it is not.
    fn close<T>(self, result: Result<T>, storage: &dyn Storage) -> Result<T> {
        let folder = folder(&self.path);
        let result = result.and_then(|made| {
            storage.rename(&self.partial, &self.path)?;
            storage.sync_dir(folder)?;
            Ok(made)
        });
        if result.is_err() {
            // Best effort: the error that led here is the one worth reporting.
            let _ = storage.remove_file(&self.partial);
        }
        let _ = storage.remove_file(&self.lock_path);
        if result.is_err() && self.created {
            let _ = storage.remove_dir(folder);
        }
        result
    }
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."))
}

/// What was counted.
#[derive(Default)]
struct Counted {
    stored: u64,
    bytes_read: u64,
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
    counted: Counted,
}

/// A chunk to pack.
#[derive(Clone, Copy)]
struct Item {
    job: usize,
    number: u64,
}

/// What is written so far.
struct Written {
    offset: u64,
    entries: Vec<Entry>,
    /// Bytes since the last sync.
    dirty: u64,
}

impl<'a> Packing<'a> {
    fn new(plan: &'a Plan, jobs: &'a [Job<'a>]) -> Self {
        Self { plan, jobs, width: jobs.iter().map(|job| job.width).max().unwrap_or(1) }
    }

    fn items(&self) -> impl Iterator<Item = Item> + '_ {
        self.jobs.iter().enumerate().flat_map(|(job, own)| (0..own.chunks()).map(move |number| Item { job, number }))
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
        target: &Target,
        storage: &dyn Storage,
        observer: &dyn Observer,
    ) -> Result<(Counted, u64)> {
        schedule.allow_ahead(self.plan, storage);
        let kept = Kept::new(self.plan);
        let mut passes = Passes::new(self.plan, schedule, observer, None, &kept);
        let cuts = thresholds(&mut passes, schedule, observer)?;
        let mut counted = Counted { bytes_read: passes.tally().bytes_read, stored: 0 };
        let widths = [self.width as u64; 2];
        let mut packers = std::mem::take(&mut passes.workers)
            .into_iter()
            .map(|mut worker| {
                worker.slot = Slot::new(&widths, CHUNK as u64);
                let mask = Vec::with_capacity(CHUNK / 64);
                Ok(Packer { worker, encoder: Encoder::new(self.width)?, mask, counted: Counted::default() })
            })
            .collect::<Result<Vec<_>>>()?;
        let ties = self.ties_before(&cuts, &mut packers, observer)?;
        let file = storage.create(&target.partial, 0)?;
        file.write_at(&head(), 0)?;
        let written = self.write(&cuts, &ties, &mut packers, &*file, observer)?;
        let base = &self.plan.checkpoints[BASE];
        let contents = self.contents(base)?;
        let tail = tail(&contents, &written.entries, written.offset)?;
        file.write_at(&tail, written.offset)?;
        file.sync()?;
        storage.check_mapped()?;
        check_inputs_unchanged(self.plan)?;
        for packer in packers {
            counted.stored += packer.counted.stored;
            counted.bytes_read += packer.counted.bytes_read;
        }
        Ok((counted, written.offset + tail.len() as u64))
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

    /// Packs all chunks and writes them in order.
    fn write(
        &self,
        cuts: &[Vec<Cut>],
        ties: &[u64],
        packers: &mut [Packer],
        file: &dyn OutputFile,
        observer: &dyn Observer,
    ) -> Result<Written> {
        observer.stage("pack", self.jobs.iter().map(|job| job.units * (job.width * sides(job)) as u64).sum());
        let start = Written { offset: HEAD_BYTES, entries: Vec::new(), dirty: 0 };
        let turns = Turns::new(start);
        let lookahead = (PREFETCH_BYTES / (2 * CHUNK * self.width) as u64).clamp(1, 64) as usize;
        let ahead = |&item: &Item| self.announce(item);
        pool::run(packers, self.items(), lookahead, ahead, |packer, ordinal, item| {
            observer.go_on()?;
            let mut pending = Pending::new(&turns, ordinal);
            let before = ties.get(ordinal).copied().unwrap_or(0);
            let (bytes, entry) = packer.pack(self, item, cuts, before)?;
            let (offset, full) = turns.take(ordinal, |written: &mut Written| {
                let offset = written.offset;
                written.offset += bytes.len() as u64;
                written.entries.push(entry);
                written.dirty += bytes.len() as u64;
                let full = written.dirty >= WRITE_BEHIND_BYTES;
                if full {
                    written.dirty = 0;
                }
                (offset, full)
            })?;
            pending.complete();
            file.write_at(bytes, offset)?;
            if full {
                file.sync()?;
                file.release(0, offset);
            }
            let job = &self.jobs[item.job];
            let count = self.count(item) * (job.width * sides(job)) as u64;
            packer.counted.bytes_read += count;
            observer.advance(count);
            Ok(())
        })?;
        Ok(turns.into_inner())
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

    /// Per chunk, the ties in its unit that lie before it, where ties are kept by position; else nothing.
    fn ties_before(&self, cuts: &[Vec<Cut>], packers: &mut [Packer], observer: &dyn Observer) -> Result<Vec<u64>> {
        if !cuts.iter().flatten().any(|cut| matches!(cut, Cut::Lowest { .. })) {
            return Ok(Vec::new());
        }
        let items: Vec<Item> = self.items().collect();
        let counts = Mutex::new(vec![0; items.len()]);
        observer.stage("count ties", self.jobs.iter().map(|job| job.units * (job.width * sides(job)) as u64).sum());
        pool::run(
            packers,
            items.iter(),
            1,
            |&&item| self.announce(item),
            |packer, ordinal, &item| {
                observer.go_on()?;
                let Some(tensor) = self.jobs[item.job].trimmed else { return Ok(()) };
                let bytes = packer.load(self, item)?;
                let slot = std::mem::take(&mut packer.worker.slot);
                let data = Loaded { plan: self.plan, chunk: self.chunk(item, tensor), slot: &slot };
                let counted = packer.worker.count_ties(data, &cuts[tensor as usize]);
                packer.worker.slot = slot;
                counts.lock().unwrap_or_else(PoisonError::into_inner)[ordinal] = counted?[0];
                packer.counted.bytes_read += bytes;
                observer.advance(bytes);
                Ok(())
            },
        )?;
        let counts = counts.into_inner().unwrap_or_else(PoisonError::into_inner);
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
        Ok(before)
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
    /// Loads a chunk of the tensor and of base's; returns the bytes read.
    fn load(&mut self, packing: &Packing<'_>, item: Item) -> Result<u64> {
        let job = &packing.jobs[item.job];
        let start = item.number * (CHUNK * job.width) as u64;
        let length = packing.count(item) as usize * job.width;
        let mut read = 0;
        for (checkpoint, entry) in [(MODEL, Some(job.entry)), (BASE, job.base)] {
            let Some(entry) = entry else { continue };
            let file = &*packing.plan.checkpoints[checkpoint].files[entry.file as usize].file;
            self.worker.slot.show(checkpoint, file, entry.offset + start, length).map_err(|e| e.tensor(&entry.name))?;
            read += length as u64;
        }
        Ok(read)
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
        let (bytes, entry) = packed?;
        if job.base.is_some() {
            self.counted.stored += u64::from(entry.stored);
        }
        Ok((bytes, entry))
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

/// What survives of each tensor of the plan.
fn thresholds(passes: &mut Passes<'_>, schedule: &Schedule, observer: &dyn Observer) -> Result<Vec<Vec<Cut>>> {
    let plan = passes.plan;
    let mut all = vec![vec![Cut::NonZero]; plan.tensors.len()];
    if !schedule.units.is_empty() {
        observer.stage("sketch", schedule.search_bytes(plan));
    }
    let (solo, shared): (Vec<_>, Vec<_>) = schedule.units.iter().partition(|unit| unit.kind == UnitKind::Solo);
    for unit in shared {
        let goals = plan.goals(unit);
        let mut resident = passes.hold(unit);
        let found = passes.shared_thresholds(unit, &goals, &mut resident, None)?;
        passes.give_back(resident);
        unit.tensors.iter().for_each(|&tensor| all[tensor as usize] = cuts(plan, &goals, &found));
    }
    let bins = schedule.sketch_bins;
    let found_cuts = Mutex::new(&mut all);
    let items = solo.iter().filter(|unit| unit.elements > 0);
    pool::run(
        &mut passes.workers,
        items,
        1,
        |unit| _ = prefetch(plan, whole(unit), Wanted::All),
        |worker, _, unit| {
            let (chunk, goals) = (whole(unit), plan.goals(unit));
            worker.load(plan, chunk, plan.pieces(chunk.tensor, Wanted::All), observer, |worker, data| {
                let found = solo_thresholds(worker, data, &goals, bins)?;
                let mut all = found_cuts.lock().unwrap_or_else(PoisonError::into_inner);
                all[chunk.tensor as usize] = cuts(plan, &goals, &found);
                Ok(())
            })
        },
    )?;
    Ok(all)
}
