//! The output directory: who may write there, what is found there, and the order in which files become a model.
//!
//! - Nothing is decided before the lock is held, but for refusals that spare somebody else's directory.
//! - Unfinished work lives in `DIR/.tiesmith/`, with a journal of what of it is durable.
//! - The file that makes the directory loadable (the index, or the single `model.safetensors` or `adapter_model.safetensors`) appears last: until
//!   then no loader sees a model.
//! - Only files that this program wrote are removed, and what is replaced stays whole until its successor is complete.
//!
//! Knows names and order; what is written into shards is the business of `shards`.

mod found;
mod handing;
mod inputs;
mod parts;
mod repair;
mod upload;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

use super::hand_over::{AllHandedOver, HandedOver, OnShard, hand_over};
use super::identity::Begin;
use super::side_files::{Content, SideFile};
use super::{Observer, OutputOptions, Report};
use crate::error::{Error, Result};
use crate::journal::{Journal, Record, replay};
use crate::limits::MAX_MANIFEST_BYTES;
use crate::plan::Plan;
use crate::storage::{Lock, Storage};
use found::{Found, finished_already, is_shard_name};
pub(super) use found::{admit_swept, no_directory, not_empty, work_dir};
use handing::held_at_once;
pub(super) use inputs::refuse_inputs;
pub(super) use upload::address;

/// Name of the folder that holds unfinished work.
pub(super) const WORK_DIR: &str = ".tiesmith";
pub(super) const LOCK: &str = "lock";
/// The journal of unfinished work, in the output directory.
pub(super) const JOURNAL_PATH: &str = ".tiesmith/journal";
pub(super) const JOURNAL: &str = "journal";
/// Name of the manifest: its presence marks a finished output of this program.
pub(super) const MANIFEST: &str = "tiesmith.json";
/// Name of the index of a sharded checkpoint.
pub(super) const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// The weights of an adapter.
const ADAPTER: &str = "adapter_model.safetensors";
/// What makes a directory loadable.
pub(super) const LOADABLE: [&str; 3] = [INDEX, SINGLE, ADAPTER];
/// Room for side files, headers and the file system's own needs, on top of the planned tensor bytes.
const SPARE_DISK_BYTES: u64 = 32_000_000;
const MEGABYTE: u64 = 1_000_000;
const COPY_BYTES: usize = 1 << 20;

/// Kinds of journal records.
pub(super) mod kind {
    /// What the run is a run of.
    pub const BEGIN: u8 = 1;
    /// Work that is done.
    pub const DONE: u8 = 2;
    /// Names of a replaced output's files, which are removed from now on.
    pub const REPLACE: u8 = 3;
    /// Everything but the last names is in place: the directory becomes a model now.
    pub const COMMIT: u8 = 4;
    /// A shard that was handed over to a command: it need not be there any more.
    pub const HANDED_OVER: u8 = 5;
    /// What the inputs are now, whose content was found to be the same.
    pub const INPUTS: u8 = 6;
}

/// An output directory that this process may write to.
pub(super) struct OutputDir {
    pub storage: Arc<dyn Storage>,
    pub dir: PathBuf,
    work: PathBuf,
    journal_path: PathBuf,
    /// What other processes made of it, or are making: their work is left alone until all of it is there.
    in_parts: bool,
    /// The directory did not exist before.
    created: bool,
    /// A finished output is being replaced: it stays whole until the new one is.
    replaces: bool,
    /// What of a replaced output is to be removed, once that has begun.
    stale: Option<Vec<String>>,
    /// There is work of an earlier attempt to take over.
    resumes: bool,
    /// What an earlier attempt left is not known to be this run's yet: whatever goes wrong, it is not touched.
    untouchable: AtomicBool,
    /// An earlier attempt got as far as publishing everything.
    published: bool,
    /// One got as far as giving shards their names: nothing of a replaced output was left by then.
    committed: bool,
    /// See [`OutputOptions::hash_inputs`].
    hash_inputs: bool,
    /// What the journal says of the inputs. Nothing in parts and in repairs.
    inputs: Option<Begin>,
    /// See [`OutputOptions::on_shard`].
    pub on_shard: Option<OnShard>,
    /// Shards that it has had.
    handed_over: Mutex<AllHandedOver>,
    /// None while the directory is being opened, and in a repair.
    journal: Mutex<Option<Journal>>,
    _lock: Lock,
}

/// What a journal says, apart from the work that is done.
#[derive(Default)]
pub(super) struct Log {
    begin: Option<Begin>,
    stale: Option<Vec<String>>,
    committed: bool,
    handed_over: AllHandedOver,
}

impl Log {
    /// Takes in a record; `None` if it makes no sense.
    pub(super) fn take(&mut self, record: &Record) -> Option<()> {
        match (record.kind, &self.begin) {
            (kind::BEGIN, None) => self.begin = Some(Begin::decode(&record.payload)?),
            (kind::DONE, Some(_)) => {}
            (kind::INPUTS, Some(_)) => self.begin = Some(Begin::decode(&record.payload)?),
            (kind::REPLACE, Some(_)) => self.stale = Some(serde_json::from_slice(&record.payload).ok()?),
            (kind::COMMIT, Some(_)) => self.committed = true,
            (kind::HANDED_OVER, Some(_)) => {
                let shard: HandedOver = serde_json::from_slice(&record.payload).ok()?;
                self.handed_over.insert(shard.name.clone(), shard);
            }
            _ => return None,
        }
        Some(())
    }
}

impl OutputDir {
    /// Checks everything that can be refused, then takes the directory. What is refused is left as it was.
    pub(super) fn open(plan: &Plan, options: &OutputOptions, storage: &Arc<dyn Storage>) -> Result<Self> {
        let dir = &options.dir;
        let admit = || -> Result<(PathBuf, Found)> {
            refuse_inputs(plan, dir, &**storage)?;
            let work = work_dir(dir, &**storage)?;
            let before = Found::look(dir, &work, &**storage)?;
            before.admit(dir, options)?;
            if !before.begun() {
                check_space(held_at_once(plan, options.on_shard.is_some()), dir, &**storage)?;
                upload::refuse_occupied(options.on_shard.as_ref(), &**storage)?;
            }
            Ok((work, before))
        };
        // Whatever fails before anything is written.
        let (work, before) = admit().map_err(|error| {
            Self::forget_lock(dir, &**storage);
            error.as_input()
        })?;
        let unwritable = |e: Error| e.as_input().help("choose an --out that you may write to");
        let lock = storage.lock(&work.join(LOCK)).map_err(unwritable)?;
        let taken = Self::taken(dir, work.join(JOURNAL), lock, storage);
        let mut output = Self {
            created: !before.exists,
            on_shard: options.on_shard.clone(),
            hash_inputs: options.hash_inputs,
            ..taken
        };
        match output.take_over(plan, options) {
            Ok(()) => Ok(output),
            Err(error) => {
                output.leave();
                Err(error)
            }
        }
    }

    /// The directory under its `lock`, before anything is known of what it holds.
    fn taken(dir: &Path, journal_path: PathBuf, lock: Lock, storage: &Arc<dyn Storage>) -> Self {
        Self {
            storage: Arc::clone(storage),
            dir: dir.to_path_buf(),
            work: dir.join(WORK_DIR),
            journal_path,
            in_parts: false,
            created: false,
            replaces: false,
            stale: None,
            resumes: false,
            untouchable: AtomicBool::new(false),
            published: false,
            committed: false,
            hash_inputs: false,
            inputs: None,
            on_shard: None,
            handed_over: Mutex::default(),
            journal: Mutex::default(),
            _lock: lock,
        }
    }

    /// Decides, under the lock, what is to be done with what is there.
    fn take_over(&mut self, plan: &Plan, options: &OutputOptions) -> Result<()> {
        // What was seen before the lock was held may be outdated.
        let found = Found::look(&self.dir, &self.work, &*self.storage)?;
        found.admit(&self.dir, options)?;
        let finished = found.finished();
        let mut log = Log::default();
        let mut journal = None;
        if found.begun() {
            match self.read_log(&mut log) {
                Ok(opened) => journal = opened,
                Err(_) if options.restart => {}
                Err(error) => return Err(error),
            }
        }
        if let (true, true, Some(begin)) = (finished, log.committed, &log.begin) {
            let ours = self.manifest_is_of(begin)?;
            if ours && begin.admit(plan).is_ok() {
                self.published = true;
                self.refuse_other_address(&log.handed_over)?;
                self.handed_over = Mutex::new(log.handed_over);
                self.journal = Mutex::new(journal);
                return Ok(());
            }
            let nothing_left = !options.force && !self.hands_over() && ours;
            if nothing_left && begin.has_hashes() && begin.admit_touched(plan).is_ok() {
                // Whether touched inputs are the same does not matter any more.
                self.clear_work()?;
            }
        }
        if finished && !options.force {
            return Err(finished_already(&self.dir));
        }
        // Something loadable without a manifest is not ours, whatever an earlier run left beside it; unless it was being
        // removed.
        if !finished && (found.loadable() && log.stale.is_none() || log.begin.is_none() && !found.entries.is_empty()) {
            let ours = options.restart && found.begun() && !found.loadable();
            if !ours {
                return Err(found.not_empty(&self.dir));
            }
        }
        self.replaces = finished;
        if let (Some(begin), Some(journal), false) = (&log.begin, journal, options.restart) {
            begin.admit_touched(plan).map_err(|e| e.at(&self.dir))?;
            self.inputs = Some(begin.clone());
            self.stale = match log.stale {
                // A replacement whose last record was lost: what is left of the old output has its manifest beside it.
                None if !finished && found.has(MANIFEST) && !self.manifest_is_of(begin)? => Some(self.stale_names()?),
                stale => stale,
            };
            self.committed = log.committed;
            self.refuse_other_address(&log.handed_over)?;
            self.handed_over = Mutex::new(log.handed_over);
            self.resumes = true;
            self.untouchable = AtomicBool::new(true);
            self.journal = Mutex::new(Some(journal));
            return Ok(());
        }
        self.start_over(plan, log, &found)
    }

    fn read_log(&self, log: &mut Log) -> Result<Option<Journal>> {
        let path = self.journal_path.clone();
        let opened = Journal::open(&path, &*self.storage, |record| {
            log.take(&record).ok_or_else(|| {
                Error::input("the journal is not one of this version").at(&path).help("use --restart to start over")
            })
        })?;
        Ok(opened)
    }

    /// Removes what an earlier, unfinished run left, and begins a journal.
    fn start_over(&mut self, plan: &Plan, log: Log, found: &Found) -> Result<()> {
        if !self.replaces && found.begun() {
            let mut names = self.stale_names()?;
            names.extend(log.stale.into_iter().flatten());
            match log.begin {
                Some(begin) => names.extend(begin.shards),
                None => names.extend(found.entries.iter().filter(|name| is_shard_name(name)).cloned()),
            }
            for name in names.iter().filter(|name| is_file_name(name)) {
                self.storage.remove_file(&self.dir.join(name))?;
            }
            self.storage.sync_dir(&self.dir)?;
        }
        self.clear_work()?;
        check_space(held_at_once(plan, self.hands_over()), &self.dir, &*self.storage)?;
        let begin = Begin::of(plan)?.with_hashes(self.hash_inputs);
        let journal = Journal::create(&self.journal_path, kind::BEGIN, &begin.encode()?, &*self.storage)?;
        self.journal = Mutex::new(Some(journal));
        self.inputs = Some(begin);
        self.storage.sync_dir(&self.work)?;
        self.storage.sync_dir(&self.dir)
    }

    /// Goes without a trace, as far as there was none before.
    fn leave(self) {
        let only_lock = |names: &Vec<std::ffi::OsString>| names.iter().all(|name| name == LOCK);
        // Best effort: the error that led here is the one worth reporting.
        if self.storage.list(&self.work).as_ref().is_ok_and(only_lock) {
            self.remove_work();
        }
    }

    /// Empties the work directory but for the lock. The journal goes last: it says whose the other files are.
    fn clear_work(&self) -> Result<()> {
        for name in self.storage.list(&self.work)? {
            if name == parts::DIR {
                self.clear_parts()?;
            } else if name != LOCK && name != JOURNAL {
                self.storage.remove_file(&self.work.join(name))?;
            }
        }
        self.sync_work()?;
        self.storage.remove_file(&self.work.join(JOURNAL))
    }

    /// Removes the lock, then its directory, and the output directory if it was made for nothing. Somebody else may take
    /// a new lock at once: then the directories stay.
    fn remove_work(&self) {
        let _ = self.storage.remove_file(&self.work.join(LOCK));
        let _ = self.storage.remove_dir(&self.work);
        if self.created {
            let _ = self.storage.remove_dir(&self.dir);
        }
    }

    /// Removes the work directory that a run killed at its very end left beside its output: of its files, only the lock
    /// outlives the journal. Best effort: it is in nobody's way.
    pub(super) fn forget_lock(dir: &Path, storage: &dyn Storage) {
        let Ok(work) = work_dir(dir, storage) else { return };
        let Ok(found) = Found::look(dir, &work, storage) else { return };
        let is_left = storage.identity(&work).is_ok_and(|there| there.is_some());
        if !is_left || !found.finished() || !found.work.iter().all(|name| name == LOCK) {
            return;
        }
        if let Ok(Some(_lock)) = storage.try_lock(&work.join(LOCK)) {
            let _ = storage.remove_file(&work.join(LOCK));
            let _ = storage.remove_dir(&work);
        }
    }

    /// Undoes everything: for errors that mean that nothing should have been written.
    pub(super) fn abandon(self, plan: &Plan) {
        if self.untouchable.load(Ordering::Relaxed) {
            return;
        }
        // Best effort: the error that led here is the one worth reporting.
        if !self.replaces {
            for shard in &plan.layout.shards {
                let _ = self.storage.remove_file(&self.dir.join(&shard.name));
            }
        }
        let _ = self.clear_work();
        self.remove_work();
    }

    /// Whether an earlier attempt did everything but tidy up.
    pub(super) fn is_published(&self) -> bool {
        self.published
    }

    /// Whether there is work of an earlier attempt to take over.
    pub(super) fn resumes(&self) -> bool {
        self.resumes
    }

    /// Says that the work of an earlier attempt is taken over: it is this run's own now.
    pub(super) fn taken_over(&self) {
        self.untouchable.store(false, Ordering::Relaxed);
    }

    /// Whether finished shards wait for the end instead of getting their names at once.
    pub(super) fn holds_shards(&self, plan: &Plan) -> bool {
        self.in_parts || self.replaces || self.stale.is_some() || plan.layout.shards.len() == 1
    }

    /// Whether a file with a shard's final name can only be of this run or to be removed.
    pub(super) fn owns_final_names(&self) -> bool {
        !self.replaces || self.stale.is_some()
    }

    /// Where a shard is while it is written.
    pub(super) fn partial(&self, name: &str) -> PathBuf {
        self.work.join(format!("{name}.partial"))
    }

    /// Makes the entries of the work directory durable.
    pub(super) fn sync_work(&self) -> Result<()> {
        self.storage.sync_dir(&self.work)
    }

    /// Records work that is done. What it vouches for must be durable.
    pub(super) fn record_done(&self, payload: &[u8]) -> Result<()> {
        self.record(kind::DONE, payload)
    }

    fn record(&self, kind: u8, payload: &[u8]) -> Result<()> {
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        // A repair has none.
        journal.as_mut().map_or(Ok(()), |journal| journal.append(kind, payload))
    }

    /// Shows all records of work that is done to `each`.
    pub(super) fn each_done(&self, mut each: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let each = |record: Record| if record.kind == kind::DONE { each(&record.payload) } else { Ok(()) };
        replay(&self.journal_path, &*self.storage, each).map(drop)
    }

    /// A journal whose records are sound but make no sense.
    pub(super) fn senseless_journal(&self) -> Error {
        let help = if self.in_parts { "remove it and run the part again" } else { "use --restart to start over" };
        Error::input("the journal does not fit this merge").at(&self.journal_path).help(help)
    }

    /// Fails if less than `needed` bytes are free.
    pub(super) fn check_space(&self, needed: u64) -> Result<()> {
        check_space(needed, &self.dir, &*self.storage)
    }

    /// Makes the finished shards and side files a model. `manifest` makes the manifest from what was written beside it;
    /// `made` says what shards are handed over.
    pub(super) fn publish(
        mut self,
        plan: &Plan,
        side_files: Vec<(String, Content)>,
        manifest: impl FnOnce(&[SideFile]) -> Result<Vec<u8>>,
        made: &dyn Fn(usize) -> HandedOver,
        observer: &dyn Observer,
    ) -> Result<()> {
        let written = side_files.into_iter().map(|(name, content)| self.stage(name, content));
        let mut staged = written.collect::<Result<Vec<_>>>()?;
        let index = plan.layout.index_json().map(|index| SideFile::of(INDEX, index.as_bytes()));
        let listed: Vec<SideFile> = staged.iter().cloned().chain(index).collect();
        let content = Content::Bytes(manifest(&listed)?);
        // First, because it tells which of the files beside it are ours.
        staged.insert(0, self.stage(MANIFEST.into(), content)?);
        if !self.owns_final_names() {
            let stale = self.stale_names()?;
            let payload = serde_json::to_vec(&stale).map_err(|e| Error::failed(format!("names as JSON: {e}")))?;
            self.record(kind::REPLACE, &payload)?;
            self.stale = Some(stale);
        }
        self.remove_stale(plan)?;
        for file in &staged {
            self.storage.rename(&self.partial(&file.name), &self.dir.join(&file.name))?;
        }
        self.storage.sync_dir(&self.dir)?;
        self.record(kind::COMMIT, &[])?;
        if self.holds_shards(plan) {
            for shard in &plan.layout.shards {
                let partial = self.partial(&shard.name);
                // Unless an earlier attempt got as far.
                if self.storage.identity(&partial)?.is_none() {
                    continue;
                }
                match self.in_parts && self.hands_over() && self.was_handed_over(&shard.name) {
                    // Made again for nothing, by a part that had lost its journal.
                    true => self.storage.remove_file(&partial)?,
                    false => self.storage.rename(&partial, &self.dir.join(&shard.name))?,
                }
            }
            self.storage.sync_dir(&self.dir)?;
        }
        self.upload_side_files(observer)?;
        if self.hands_over() {
            for shard in 0..plan.layout.shards.len() {
                hand_over(&self, &made(shard), (shard, plan.layout.shards.len()), observer)?;
            }
        }
        if let Some(index) = plan.layout.index_json() {
            self.storage.write_small(&self.dir.join(INDEX), index.as_bytes(), &self.work)?;
        }
        self.upload_last(plan, observer)?;
        self.tidy_up();
        Ok(())
    }

    /// Removes the work directory of a published output. What cannot be removed disturbs nobody.
    pub(super) fn tidy_up(mut self) {
        // What is uploaded leaves nothing here.
        self.created = self.address().is_some();
        if self.clear_work().is_ok() {
            self.remove_work();
        }
        let _ = self.storage.sync_dir(&self.dir);
    }

    /// Writes a side file under a temporary name, durably.
    fn stage(&self, name: String, content: Content) -> Result<SideFile> {
        let path = self.partial(&name);
        let file = self.storage.create(&path, 0)?;
        let mut hasher = blake3::Hasher::new();
        let mut bytes = 0;
        match content {
            Content::Bytes(content) => {
                file.write_at(&content, 0)?;
                hasher.update(&content);
                bytes = content.len() as u64;
            }
            Content::Copy(from) => {
                let source = self.storage.open(&from)?;
                let whole = source.identity().bytes;
                let mut buffer = vec![0; COPY_BYTES.min(whole as usize)];
                while bytes < whole {
                    let part = &mut buffer[..(whole - bytes).min(COPY_BYTES as u64) as usize];
                    source.read_at(part, bytes)?;
                    file.write_at(part, bytes)?;
                    hasher.update(part);
                    bytes += part.len() as u64;
                }
            }
        }
        file.sync()?;
        Ok(SideFile { name, bytes, blake3: hasher.finalize().to_hex().to_string() })
    }

    /// The manifest in the directory, if there is one that can be understood.
    pub(super) fn manifest(&self) -> Result<Option<Value>> {
        let path = self.dir.join(MANIFEST);
        if self.storage.identity(&path)?.is_none() {
            return Ok(None);
        }
        let content = self.storage.read_small(&path, MAX_MANIFEST_BYTES)?;
        Ok(serde_json::from_slice(&content).ok())
    }

    /// Whether the manifest in the directory is that of the run.
    fn manifest_is_of(&self, begin: &Begin) -> Result<bool> {
        let manifest = self.manifest()?.unwrap_or_default();
        Ok(begin.is_of(manifest["fingerprint"].as_str().unwrap_or_default()))
    }

    /// The report that a finished output's manifest has.
    pub(super) fn report_in(dir: &Path, storage: &dyn Storage) -> Result<Report> {
        let content = storage.read_small(&dir.join(MANIFEST), MAX_MANIFEST_BYTES)?;
        let mut manifest: Value = serde_json::from_slice(&content).unwrap_or_default();
        serde_json::from_value(manifest["report"].take())
            .map_err(|_| Error::failed("the merge is finished, but its manifest has no report").at(dir))
    }

    /// Files of the output in the directory, as its manifest lists them: shards by name, side files only if they still
    /// are what was written.
    fn stale_names(&self) -> Result<Vec<String>> {
        let mut stale = Vec::new();
        let manifest = self.manifest()?.unwrap_or_default();
        let listed = |list: &str| manifest[list].as_array().cloned().unwrap_or_default();
        let name = |entry: &Value| entry["name"].as_str().filter(|name| is_file_name(name)).map(str::to_owned);
        stale.extend(listed("shards").iter().filter_map(name).filter(|name| is_shard_name(name)));
        for entry in listed("side_files") {
            let Some(name) = name(&entry) else { continue };
            let path = self.dir.join(&name);
            if self.storage.is_file(&path) && entry["blake3"].as_str() == Some(&hash_of(&path, &*self.storage)?) {
                stale.push(name);
            }
        }
        // Last, because it says whose the others are.
        stale.push(MANIFEST.to_owned());
        Ok(stale)
    }

    /// Removes what is left of a replaced output: first what makes it loadable.
    fn remove_stale(&self, plan: &Plan) -> Result<()> {
        // Once shards have their names, what is called so is new.
        let Some(stale) = self.stale.as_ref().filter(|_| !self.committed) else { return Ok(()) };
        let planned = |name: &str| plan.layout.shards.iter().any(|shard| shard.name == name);
        for name in LOADABLE {
            // Unless it is the new one, and the record of that was lost.
            if !planned(name) || self.storage.identity(&self.partial(name))?.is_some() {
                self.storage.remove_file(&self.dir.join(name))?;
            }
        }
        self.storage.sync_dir(&self.dir)?;
        for name in stale.iter().filter(|name| is_file_name(name) && !planned(name)) {
            self.storage.remove_file(&self.dir.join(name))?;
        }
        Ok(())
    }
}

/// BLAKE3 of a file in hexadecimal, read in pieces.
pub(super) fn hash_of(path: &Path, storage: &dyn Storage) -> Result<String> {
    let file = storage.open(path)?;
    let mut buffer = vec![0; COPY_BYTES];
    let (mut hasher, mut at) = (blake3::Hasher::new(), 0);
    while at < file.identity().bytes {
        let part = &mut buffer[..(file.identity().bytes - at).min(COPY_BYTES as u64) as usize];
        file.read_at(part, at)?;
        hasher.update(part);
        at += part.len() as u64;
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Refuses an output that does not fit on its disk.
fn check_space(bytes: u64, dir: &Path, storage: &dyn Storage) -> Result<()> {
    must_fit("the output needs", bytes, dir, storage).map_err(|e| e.help("make room, or use another --out"))
}

/// Fails if `bytes` bytes and room for small files are more than is free where `dir` is; `needs` begins the sentence.
pub(super) fn must_fit(needs: &str, bytes: u64, dir: &Path, storage: &dyn Storage) -> Result<()> {
    let needed = bytes.saturating_add(SPARE_DISK_BYTES);
    let free = storage.free_bytes(dir)?;
    if free >= needed {
        return Ok(());
    }
    // Rounded so that what is needed is always the larger number.
    let (needed, free) = (needed.div_ceil(MEGABYTE), free / MEGABYTE);
    // Room may be made at any time.
    Err(Error::failed(format!("{needs} {needed} MB of disk space, but only {free} MB are free")).at(dir))
}

/// Whether `name` is a plain file name: a list in a file must not reach out of its directory.
pub(super) fn is_file_name(name: &str) -> bool {
    !name.is_empty() && !matches!(name, "." | "..") && !name.contains(['/', '\\', '\0'])
}
