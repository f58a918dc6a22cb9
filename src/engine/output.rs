//! The output directory: who may write there, where bytes go before they count, and the order in which they do.
//!
//! - Unfinished shards live in `DIR/.tiesmith/` as `*.partial`; a shard gets its final name only when it is complete
//!   and durable.
//! - The file that makes the directory loadable (the index, or the single `model.safetensors`) appears last: until
//!   then no loader sees a model.
//! - Written bytes do not pile up: every so many megabytes they are made durable and dropped from the page cache.
//! - The first failed operation ends the run; nothing is renamed after a failed sync.
//!
//! Knows shards and offsets, not what is in them.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender};

use super::OutputOptions;
use super::shard_hash::ShardHash;
use crate::error::{Error, Result, printable};
use crate::limits::WRITE_BEHIND_BYTES;
use crate::plan::Plan;
use crate::storage::{Lock, OutputFile, Storage};

/// Name of the folder that holds unfinished work.
pub(super) const WORK_DIR: &str = ".tiesmith";
/// Name of the manifest: its presence marks a finished output of this program.
pub(super) const MANIFEST: &str = "tiesmith.json";
/// Name of the index of a sharded checkpoint.
pub(super) const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// Room for side files, headers and the file system's own needs, on top of the planned tensor bytes.
const SPARE_DISK_BYTES: u64 = 32_000_000;

/// An output directory that this process may write to.
pub(super) struct OutputDir {
    pub storage: Arc<dyn Storage>,
    pub dir: PathBuf,
    pub work: PathBuf,
    /// The directory did not exist before.
    created: bool,
    /// A finished output is being replaced: it stays whole until the new one is.
    replaces: bool,
    _lock: Lock,
}

impl OutputDir {
    /// Checks everything that can be refused, then takes the directory. Nothing is created before the last check.
    pub(super) fn open(plan: &Plan, options: &OutputOptions, storage: &Arc<dyn Storage>) -> Result<Self> {
        let dir = &options.dir;
        refuse_inputs(plan, dir, &**storage)?;
        let entries = existing(dir, &**storage)?;
        let has = |name: &str| entries.iter().flatten().any(|e| e == name);
        // The manifest is written before what makes the directory loadable, so both together are a finished output,
        // even if a killed run left its work directory beside it.
        let loadable = has(INDEX) || has(SINGLE);
        let finished = has(MANIFEST) && loadable;
        // Something loadable without a manifest is not ours, whatever an earlier run left beside it.
        let unfinished = has(WORK_DIR) && !loadable;
        if finished && !options.force {
            return Err(Error::input("a finished merge is already there")
                .at(dir)
                .help("use another --out, or --force to replace it"));
        }
        if !unfinished && !finished && entries.as_ref().is_some_and(|e| !e.is_empty()) {
            return Err(Error::input(format!(
                "the output directory is not empty ({} entries)",
                entries.map_or(0, |e| e.len())
            ))
            .at(dir)
            .help("use a new or empty directory for --out"));
        }
        // What an unfinished run wrote is in the way of its own successor: it is counted only when it is gone.
        if !unfinished {
            check_space(plan, dir, &**storage)?;
        }
        let work = dir.join(WORK_DIR);
        let unwritable = |e: Error| e.as_input().help("choose an --out that you may write to");
        if storage.identity(&work)?.is_some() && storage.canonical(&work) != storage.canonical(dir).join(WORK_DIR) {
            return Err(Error::input("the work directory is a link to somewhere else").at(&work).help("remove it"));
        }
        storage.create_dir_all(&work).map_err(unwritable)?;
        let lock = storage.lock(&work.join("lock")).map_err(unwritable)?;
        let output = Self {
            storage: Arc::clone(storage),
            dir: dir.clone(),
            work,
            created: entries.is_none(),
            replaces: finished,
            _lock: lock,
        };
        output.discard_work()?;
        if unfinished {
            output.unpublish()?;
            check_space(plan, dir, &**storage)?;
        }
        Ok(output)
    }

    /// Removes what an earlier, unfinished run left in the work directory.
    fn discard_work(&self) -> Result<()> {
        for name in self.storage.list(&self.work)? {
            if name != "lock" {
                self.storage.remove_file(&self.work.join(name))?;
            }
        }
        Ok(())
    }

    /// Removes the files of an earlier output: first what makes it loadable, then its shards.
    fn unpublish(&self) -> Result<()> {
        for name in [INDEX, SINGLE, MANIFEST] {
            self.storage.remove_file(&self.dir.join(name))?;
        }
        self.storage.sync_dir(&self.dir)?;
        for name in self.storage.list(&self.dir)? {
            let name = name.to_string_lossy();
            if is_shard_name(&name) {
                self.storage.remove_file(&self.dir.join(&*name))?;
            }
        }
        Ok(())
    }

    /// Undoes everything: for errors that mean that nothing should have been written.
    pub(super) fn abandon(self) {
        // Best effort: the error that led here is the one worth reporting.
        let _ = self.storage.remove_dir_all(&self.work);
        if !self.replaces {
            let _ = self.unpublish();
        }
        if self.created {
            let _ = self.storage.remove_dir_all(&self.dir);
        }
    }

    /// Makes the finished shards and side files a model. `side_files` are (name, content), the manifest among them.
    pub(super) fn publish(self, plan: &Plan, side_files: &[(String, Vec<u8>)]) -> Result<()> {
        let names: Vec<String> = plan.layout.shards.iter().map(|s| s.name.clone()).collect();
        if self.replaces {
            self.unpublish()?;
        }
        for (name, content) in side_files {
            self.storage.write_small(&self.dir.join(name), content, &self.work)?;
        }
        for name in &names {
            let partial = self.partial(name);
            if self.holds_shards(plan) {
                self.storage.rename(&partial, &self.dir.join(name))?;
            }
        }
        self.storage.sync_dir(&self.dir)?;
        if let Some(index) = plan.layout.index_json() {
            self.storage.write_small(&self.dir.join(INDEX), index.as_bytes(), &self.work)?;
        }
        self.storage.remove_dir_all(&self.work)?;
        self.storage.sync_dir(&self.dir)
    }

    fn partial(&self, name: &str) -> PathBuf {
        self.work.join(format!("{name}.partial"))
    }

    /// Whether finished shards wait for the end instead of getting their names at once.
    fn holds_shards(&self, plan: &Plan) -> bool {
        self.replaces || plan.layout.shards.len() == 1
    }
}

/// Refuses an output that does not fit on its disk.
fn check_space(plan: &Plan, dir: &Path, storage: &dyn Storage) -> Result<()> {
    let needed = plan.layout.shards.iter().map(|s| s.bytes).sum::<u64>() + SPARE_DISK_BYTES;
    let free = storage.free_bytes(dir)?;
    if free >= needed {
        return Ok(());
    }
    let megabytes = |bytes: u64| bytes.div_ceil(1_000_000);
    Err(Error::input(format!(
        "the output needs {} MB of disk space, but only {} MB are free",
        megabytes(needed),
        megabytes(free)
    ))
    .at(dir)
    .help("make room, or use another --out"))
}

/// The entries of `dir`, or `None` if there is no such directory.
fn existing(dir: &Path, storage: &dyn Storage) -> Result<Option<Vec<std::ffi::OsString>>> {
    if storage.identity(dir)?.is_none() {
        return Ok(None);
    }
    if !storage.is_dir(dir) {
        return Err(Error::input("the output is a file, not a directory").at(dir).help("choose another --out"));
    }
    storage.list(dir).map(Some).map_err(Error::as_input)
}

/// An output directory that is an input's directory would be overwritten while it is read.
fn refuse_inputs(plan: &Plan, dir: &Path, storage: &dyn Storage) -> Result<()> {
    let Some(out) = storage.identity(dir)? else { return Ok(()) };
    for checkpoint in &plan.checkpoints {
        let same = match storage.identity(&checkpoint.dir)? {
            // Where inodes are not known, only the resolved paths can tell.
            Some(input) if input.inode != 0 => (input.device, input.inode) == (out.device, out.inode),
            _ => storage.canonical(&checkpoint.dir) == storage.canonical(dir),
        };
        if same {
            return Err(Error::input(format!("the output directory is the input {}", printable(&checkpoint.spec)))
                .at(dir)
                .help("choose another --out"));
        }
    }
    Ok(())
}

/// Whether `name` is one that this program gives to a shard of several.
fn is_shard_name(name: &str) -> bool {
    let Some(middle) = name.strip_prefix("model-").and_then(|n| n.strip_suffix(".safetensors")) else { return false };
    let digits = |s: &str| s.len() >= 5 && s.bytes().all(|b| b.is_ascii_digit());
    middle.split_once("-of-").is_some_and(|(i, n)| digits(i) && digits(n))
}

/// A written range.
struct Written {
    shard: usize,
    offset: u64,
    bytes: u64,
}

/// What sealing found out about a shard.
#[derive(Debug, Clone)]
pub(super) struct SealedShard {
    /// BLAKE3 of the file.
    pub hash: String,
    /// Its length.
    pub bytes: u64,
}

/// The file of a shard: created on first use, closed when sealed.
enum ShardFile {
    Absent,
    Open(Arc<dyn OutputFile>),
    Sealed,
}

/// The shards while they are written.
struct Shards<'a> {
    plan: &'a Plan,
    output: &'a OutputDir,
    files: Vec<Mutex<ShardFile>>,
    hashes: Vec<ShardHash>,
    /// Tensor bytes still to come, per shard.
    remaining: Vec<AtomicU64>,
}

/// Takes encoded bytes from all workers and puts them where the plan says.
pub(super) struct ShardWriter<'a> {
    shards: &'a Shards<'a>,
    behind: Sender<Written>,
    /// The first failure of the write-behind thread.
    failure: &'a Mutex<Option<Error>>,
}

impl ShardWriter<'_> {
    /// Writes `bytes` at `offset` (in bytes) of tensor `tensor`.
    pub(super) fn write(&self, tensor: u32, offset: u64, bytes: &[u8]) -> Result<()> {
        let place = &self.shards.plan.layout.tensors[tensor as usize];
        let shard = place.shard as usize;
        let offset = place.offset + offset;
        self.shards.file(shard)?.write_at(bytes, offset)?;
        self.shards.hashes[shard].add(offset, bytes);
        let bytes = bytes.len() as u64;
        self.shards.remaining[shard].fetch_sub(bytes, Ordering::AcqRel);
        // The receiver ends early only after a failure, which is the one to report.
        self.behind.send(Written { shard, offset, bytes }).map_err(|_| self.first_failure())
    }

    fn first_failure(&self) -> Error {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.clone().unwrap_or_else(|| Error::failed("writing stopped"))
    }
}

impl Shards<'_> {
    /// The open file of a shard, created with its header on first use.
    fn file(&self, shard: usize) -> Result<Arc<dyn OutputFile>> {
        let mut state = self.files[shard].lock().unwrap_or_else(PoisonError::into_inner);
        match &*state {
            ShardFile::Open(file) => return Ok(Arc::clone(file)),
            ShardFile::Sealed => unreachable!("a complete shard is not written to"),
            ShardFile::Absent => {}
        }
        let planned = &self.plan.layout.shards[shard];
        let file = self.output.storage.create(&self.output.partial(&planned.name), planned.bytes)?;
        file.write_at(&planned.header, 0)?;
        let file: Arc<dyn OutputFile> = Arc::from(file);
        *state = ShardFile::Open(Arc::clone(&file));
        Ok(file)
    }

    /// Makes a complete shard durable and, unless it must wait, gives it its name.
    fn seal(&self, shard: usize) -> Result<SealedShard> {
        let planned = &self.plan.layout.shards[shard];
        let file = self.file(shard)?;
        file.sync()?;
        let partial = self.output.partial(&planned.name);
        let written = self.output.storage.open(&partial)?;
        let hash = self.hashes[shard].finish(|buffer, offset| written.read_at(buffer, offset))?;
        file.release(0, planned.bytes);
        *self.files[shard].lock().unwrap_or_else(PoisonError::into_inner) = ShardFile::Sealed;
        if !self.output.holds_shards(self.plan) {
            self.output.storage.rename(&partial, &self.output.dir.join(&planned.name))?;
            self.output.storage.sync_dir(&self.output.dir)?;
        }
        Ok(SealedShard { hash, bytes: planned.bytes })
    }

    /// Follows the writes: keeps dirty bytes few and seals complete shards. Runs on a thread of its own.
    fn follow(&self, written: &Receiver<Written>, sealed: &mut [Option<SealedShard>]) -> Result<()> {
        let mut dirty = 0;
        let mut ranges = vec![0..0; self.files.len()];
        for Written { shard, offset, bytes } in written {
            // Another worker's last write may be reported before an earlier one's: then the shard is sealed already.
            if sealed[shard].is_some() {
                continue;
            }
            let range: &mut Range<u64> = &mut ranges[shard];
            let start = if range.is_empty() { offset } else { range.start.min(offset) };
            *range = start..range.end.max(offset + bytes);
            dirty += bytes;
            if self.remaining[shard].load(Ordering::Acquire) == 0 {
                sealed[shard] = Some(self.seal(shard)?);
                ranges[shard] = 0..0;
            }
            if dirty >= WRITE_BEHIND_BYTES {
                self.flush(&mut ranges)?;
                dirty = 0;
            }
        }
        Ok(())
    }

    fn flush(&self, ranges: &mut [Range<u64>]) -> Result<()> {
        for (shard, range) in ranges.iter_mut().enumerate().filter(|(_, range)| !range.is_empty()) {
            let file = self.file(shard)?;
            file.sync()?;
            file.release(range.start, range.end - range.start);
            *range = 0..0;
        }
        Ok(())
    }
}

/// Lets `work` write the shards; returns what sealing said about each, in order.
pub(super) fn write_shards(
    plan: &Plan,
    output: &OutputDir,
    work: impl FnOnce(&ShardWriter<'_>) -> Result<()>,
) -> Result<Vec<SealedShard>> {
    let mut remaining = vec![0u64; plan.layout.shards.len()];
    for (tensor, place) in plan.layout.tensors.iter().enumerate() {
        remaining[place.shard as usize] += plan.output_bytes(tensor as u32);
    }
    let shards = Shards {
        plan,
        output,
        files: remaining.iter().map(|_| Mutex::new(ShardFile::Absent)).collect(),
        hashes: plan.layout.shards.iter().map(|shard| ShardHash::new(shard.bytes)).collect(),
        remaining: remaining.into_iter().map(AtomicU64::new).collect(),
    };
    let failure = Mutex::new(None);
    let mut sealed: Vec<Option<SealedShard>> = vec![None; plan.layout.shards.len()];
    // Bounded, so that workers wait for the disk instead of filling the page cache.
    let (behind, written) = crossbeam_channel::bounded(64);
    std::thread::scope(|scope| {
        let (shards, failure, sealed) = (&shards, &failure, &mut sealed);
        let follower = scope.spawn(move || {
            let result = shards.follow(&written, sealed);
            if let Err(error) = &result {
                *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.clone());
            }
            result
        });
        let done = work(&ShardWriter { shards, behind, failure });
        let followed = follower.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        done.and(followed)
    })?;
    // What no write completed holds no tensor data: a shard of empty tensors.
    sealed.into_iter().enumerate().map(|(shard, sealed)| sealed.map_or_else(|| shards.seal(shard), Ok)).collect()
}
