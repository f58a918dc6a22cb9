//! The output directory of a look: who may write there, what of it is done, and how its files appear.
//!
//! - The rules are those of a merge: an output that is an input, that holds something else, or that is finished is refused; an
//!   unfinished look goes on if it is the same; one process at a time.
//! - Unfinished work is a journal in `DIR/.tiesmith/`. The report's files get their names in the end, `report.json` last:
//!   it marks a finished look.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::OutputOptions;
use super::super::identity::Begin;
use super::super::output::{JOURNAL, LOCK, WORK_DIR, no_directory, not_empty, refuse_inputs, work_dir};
use super::super::records;
use super::super::under_way::Keeps;
use super::gather::Entry;
use super::study::Study;
use crate::error::{Error, Result};
use crate::journal::{Journal, Record, replay};
use crate::storage::{Lock, OutputFile, Storage};

/// The file that marks a finished look.
pub(super) const REPORT: &str = "report.json";
/// Version of the journal's records of a look.
const VERSION: u32 = 2;

/// Kinds of journal records.
mod kind {
    /// What is looked at.
    pub const BEGIN: u8 = 1;
    /// Entries: see `gather`.
    pub const DONE: u8 = 2;
}

/// The first record.
#[derive(Serialize, Deserialize)]
struct First {
    /// Version of the records that follow.
    analysis: u32,
    densities: Value,
    begin: Begin,
}

/// An output directory that this process may write to.
pub(super) struct WorkDir {
    storage: Arc<dyn Storage>,
    pub dir: PathBuf,
    work: PathBuf,
    /// The directory did not exist before.
    created: bool,
    /// There is work of an earlier attempt.
    pub resumes: bool,
    /// None only while the directory is being opened.
    journal: Mutex<Option<Journal>>,
    _lock: Lock,
}

impl WorkDir {
    /// Checks everything that can be refused, then takes the directory. What is refused is left as it was.
    pub(super) fn open(study: &Study, options: &OutputOptions, storage: &Arc<dyn Storage>) -> Result<Self> {
        let dir = &options.dir;
        let admit = || -> Result<(PathBuf, bool)> {
            refuse_inputs(&study.plan, dir, &**storage)?;
            let work = work_dir(dir, &**storage)?;
            let created = storage.identity(dir)?.is_none();
            if !created && !storage.is_dir(dir) {
                return Err(no_directory(dir));
            }
            admit(dir, &work, options, &**storage)?;
            Ok((work, created))
        };
        // Whatever fails before anything is written.
        let (work, created) = admit().map_err(Error::as_input)?;
        let unwritable = |e: Error| e.as_input().help("choose an --out that you may write to");
        let lock = storage.lock(&work.join(LOCK)).map_err(unwritable)?;
        let mut opened = Self {
            storage: Arc::clone(storage),
            dir: dir.clone(),
            work,
            created,
            resumes: false,
            journal: Mutex::default(),
            _lock: lock,
        };
        match opened.take_over(study, options) {
            Ok(()) => Ok(opened),
            Err(error) => {
                opened.leave();
                Err(error)
            }
        }
    }

    /// Decides, under the lock, what is to be done with what is there.
    fn take_over(&mut self, study: &Study, options: &OutputOptions) -> Result<()> {
        // What was seen before the lock was held may be outdated.
        admit(&self.dir, &self.work, options, &*self.storage)?;
        let path = self.work.join(JOURNAL);
        let densities = serde_json::json!(study.densities_json());
        if self.storage.is_file(&path) {
            let mut first: Option<Option<First>> = None;
            let opened = Journal::open(&path, &*self.storage, |record| {
                if first.is_none() {
                    let begin = serde_json::from_slice(&record.payload).ok().filter(|_| record.kind == kind::BEGIN);
                    first = Some(begin.filter(|first: &First| first.analysis == VERSION));
                }
                Ok(())
            });
            let ours = first.as_ref().is_none_or(Option::is_some);
            if !ours {
                return Err(Error::input(
                    "the output directory holds other unfinished work, of a merge or of another version",
                )
                .at(&self.dir)
                .help("finish or remove it, or use another --out"));
            }
            if let (false, Some(Some(first))) = (options.restart, first)
                && let Some(journal) = opened?
            {
                first.begin.admit(&study.plan).map_err(|e| e.at(&self.dir))?;
                if first.densities != densities {
                    let then = first.densities;
                    let text = format!("the unfinished analysis looks at densities {then}, now {densities}");
                    return Err(Error::input(text).at(&self.dir).help("use --restart to start over, or another --out"));
                }
                self.journal = Mutex::new(Some(journal));
                self.resumes = true;
                return Ok(());
            }
        }
        self.storage.remove_file(&path)?;
        let first = First { analysis: VERSION, densities, begin: Begin::of(&study.plan)? };
        let first = serde_json::to_vec(&first).map_err(|e| Error::failed(format!("the first record as JSON: {e}")))?;
        self.journal = Mutex::new(Some(Journal::create(&path, kind::BEGIN, &first, &*self.storage)?));
        self.storage.sync_dir(&self.work)?;
        self.storage.sync_dir(&self.dir)
    }

    /// Where the spool of what is downloaded is, and the directory that it is in.
    pub(super) fn spool(&self) -> (PathBuf, PathBuf) {
        (self.work.join("spool"), self.work.clone())
    }

    /// Records entries that are done.
    pub(super) fn record(&self, payload: &[u8]) -> Result<()> {
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        journal.as_mut().expect("an open directory has a journal").append(kind::DONE, payload)
    }

    /// Makes sure that what was read so far is what it seemed, then records how far searches are.
    fn record_steps(&self, entries: Vec<records::Entry>) -> Result<()> {
        self.storage.check_mapped()?;
        let mut payload = Vec::new();
        for entry in entries {
            let records::Entry::Step(step) = entry else { unreachable!("a search has nothing but steps") };
            Entry::Step(step).encode(&mut payload);
        }
        self.record(&payload)
    }

    /// Shows the payloads of all records of work that is done to `each`.
    pub(super) fn each_done(&self, mut each: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let each = |record: Record| if record.kind == kind::DONE { each(&record.payload) } else { Ok(()) };
        replay(&self.work.join(JOURNAL), &*self.storage, each).map(drop)
    }

    /// A journal whose records are sound but make no sense.
    pub(super) fn senseless(&self) -> Error {
        Error::input("the journal does not fit this analysis")
            .at(&self.work.join(JOURNAL))
            .help("use --restart to start over")
    }

    /// A file of the report that is to be written piece by piece.
    pub(super) fn create(&self, name: &str) -> Result<Box<dyn OutputFile>> {
        self.storage.create(&self.partial(name), 0)
    }

    /// Writes a file of the report under a temporary name, durably.
    pub(super) fn stage(&self, name: &str, content: &[u8]) -> Result<()> {
        let file = self.create(name)?;
        file.write_at(content, 0)?;
        file.sync()
    }

    fn partial(&self, name: &str) -> PathBuf {
        self.work.join(format!("{name}.partial"))
    }

    /// Gives the staged files their names, those of an earlier report that have no successor being removed: `all` are the
    /// names that a report may have, and [`REPORT`] comes last.
    pub(super) fn publish(self, staged: &[String], all: &[&str]) -> Result<()> {
        self.storage.remove_file(&self.dir.join(REPORT))?;
        for stale in all.iter().filter(|name| !staged.iter().any(|staged| staged == *name)) {
            self.storage.remove_file(&self.dir.join(stale))?;
        }
        for name in staged.iter().filter(|name| *name != REPORT) {
            self.storage.rename(&self.partial(name), &self.dir.join(name))?;
        }
        self.storage.sync_dir(&self.dir)?;
        self.storage.rename(&self.partial(REPORT), &self.dir.join(REPORT))?;
        self.storage.sync_dir(&self.dir)?;
        self.clear();
        let _ = self.storage.sync_dir(&self.dir);
        Ok(())
    }

    /// Undoes everything, for errors that mean that nothing should have been written; what an earlier attempt did stays.
    pub(super) fn abandon(self) {
        if !self.resumes {
            let created = self.created;
            self.clear();
            if created {
                let _ = self.storage.remove_dir(&self.dir);
            }
        }
    }

    /// Removes the work directory. What cannot be removed disturbs nobody.
    fn clear(&self) {
        let names = self.storage.list(&self.work).unwrap_or_default();
        for name in names.iter().filter(|name| **name != LOCK) {
            let _ = self.storage.remove_file(&self.work.join(name));
        }
        let _ = self.storage.remove_file(&self.work.join(LOCK));
        let _ = self.storage.remove_dir(&self.work);
    }

    /// Goes without a trace, as far as there was none before.
    fn leave(self) {
        let only_lock = |names: &Vec<std::ffi::OsString>| names.iter().all(|name| name == LOCK);
        if self.storage.list(&self.work).as_ref().is_ok_and(only_lock) {
            self.clear();
            if self.created {
                let _ = self.storage.remove_dir(&self.dir);
            }
        }
    }
}

impl Keeps for WorkDir {
    fn keep_entries(&self, entries: Vec<records::Entry>) -> Result<()> {
        self.record_steps(entries)
    }
}

/// Refuses what needs no look into a journal.
fn admit(dir: &Path, work: &Path, options: &OutputOptions, storage: &dyn Storage) -> Result<()> {
    if storage.is_file(&work.join(JOURNAL)) || storage.identity(dir)?.is_none() {
        return Ok(());
    }
    let mut entries = storage.list(dir).map_err(Error::as_input)?;
    entries.retain(|name| name != WORK_DIR);
    if is_finished(dir, storage)? {
        if options.force {
            return Ok(());
        }
        return Err(Error::input("a finished analysis is already there")
            .at(dir)
            .help("use another --out, or --force to replace it"));
    }
    if entries.is_empty() {
        return Ok(());
    }
    Err(not_empty(dir, entries.len()))
}

/// Whether `dir` holds a finished report: its first line says what it is.
fn is_finished(dir: &Path, storage: &dyn Storage) -> Result<bool> {
    let path = dir.join(REPORT);
    if !storage.is_file(&path) {
        return Ok(false);
    }
    let file = storage.open(&path)?;
    let mark = super::MARK.as_bytes();
    let mut head = vec![0; mark.len()];
    Ok(file.identity().bytes >= mark.len() as u64 && file.read_at(&mut head, 0).is_ok() && head == mark)
}
