//! The output directory of a merge that many processes do in parts.
//!
//! - `DIR/.tiesmith/parts/` holds what the parts tell each other, and a journal for each of them. While it is there, no
//!   other merge takes the directory.
//! - Finished shards keep their unfinished names until all parts are there. Then one process publishes them, as it would
//!   its own.
//! - Parts look into that process's journal: a shard that it handed over is done, though it is not there any more.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::upload::{address, refuse_occupied};
use super::{Found, JOURNAL, LOCK, Log, OutputDir, check_space, finished_already, kind, refuse_inputs, work_dir};
use crate::engine::hand_over::OnShard;
use crate::engine::holds_output;
use crate::engine::identity::Begin;
use crate::error::{Error, Result};
use crate::journal::{Journal, replay};
use crate::plan::Plan;
use crate::storage::{Lock, Storage};

/// Name of the folder in the work directory.
pub(super) const DIR: &str = "parts";

impl Log {
    /// Whether it says that the output of `plan` is published: only traces of work can be left then in the directory.
    fn is_of_the_end(
        &self,
        plan: &Plan,
        found: &Found,
        on_shard: Option<&OnShard>,
        storage: &dyn Storage,
    ) -> Result<bool> {
        if !self.committed || !self.begin.as_ref().is_some_and(|begin| begin.is_of(&plan.fingerprint)) {
            return Ok(false);
        }
        let all_away = || plan.layout.shards.iter().all(|shard| self.handed_over.contains_key(&shard.name));
        match address(on_shard) {
            _ if found.finished() => Ok(true),
            // What makes it loadable has gone too.
            _ if plan.layout.index_json().is_none() => Ok(all_away()),
            Some(address) => Ok(all_away() && holds_output(plan, Path::new(address), storage)?),
            None => Ok(false),
        }
    }
}

impl OutputDir {
    /// Where the parts of a merge into `dir` leave what they know.
    pub(in crate::engine) fn parts_dir(dir: &Path, storage: &dyn Storage) -> Result<PathBuf> {
        work_dir(dir, storage).map(|work| work.join(DIR))
    }

    /// Takes `dir` for parts, unless `taken` says that it is already; `begin` is run while nobody else can, and makes that
    /// true.
    pub(in crate::engine) fn take_for_parts(
        plan: &Plan,
        dir: &Path,
        (force, on_shard): (bool, Option<&OnShard>),
        storage: &Arc<dyn Storage>,
        taken: impl Fn() -> bool,
        begin: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        refuse_inputs(plan, dir, &**storage)?;
        let work = work_dir(dir, &**storage)?;
        let admit = || -> Result<bool> {
            let found = Found::look(dir, &work, &**storage)?;
            if found.in_parts() {
                return Ok(taken());
            }
            if found.begun() {
                return Err(Error::input("an unfinished merge in one piece is here")
                    .at(dir)
                    .help("end it with its command, or use another --out"));
            }
            match (found.finished(), force) {
                (true, true) => {}
                (true, false) => return Err(finished_already(dir)),
                (false, _) if !found.entries.is_empty() => return Err(found.not_empty(dir)),
                (false, _) => {}
            }
            check_space(plan.layout.shards.iter().map(|s| s.bytes).sum(), dir, &**storage)?;
            refuse_occupied(on_shard, &**storage)?;
            Ok(false)
        };
        if admit()? {
            return Ok(());
        }
        let unwritable = |e: Error| e.as_input().help("choose an --out that you may write to");
        let _lock = loop {
            // Whoever holds it is doing the same, or refuses what is here.
            match storage.try_lock(&work.join(LOCK)).map_err(unwritable)? {
                Some(lock) => break lock,
                None if admit()? => return Ok(()),
                None => std::thread::sleep(std::time::Duration::from_millis(20)),
            }
        };
        if admit()? {
            return Ok(());
        }
        storage.create_dir_all(&work.join(DIR))?;
        begin()?;
        storage.sync_dir(&work)?;
        storage.sync_dir(dir)
    }

    /// What one part writes to, under its `lock`. It goes on with what its journal says is done.
    pub(in crate::engine) fn of_part(
        plan: &Plan,
        dir: &Path,
        journal_path: PathBuf,
        lock: Lock,
        storage: &Arc<dyn Storage>,
    ) -> Result<Self> {
        let mut output = Self::bare(dir, journal_path, lock, storage);
        output.look_at_the_end()?;
        if storage.identity(&output.journal_path)?.is_some() {
            let mut log = Log::default();
            // A journal that cannot be read is no loss but of time: the part is done again.
            if let (Ok(Some(journal)), Some(begin)) = (output.read_log(&mut log), log.begin)
                && begin.admit_copies(plan).is_ok()
            {
                output.resumes = true;
                output.journal = Mutex::new(Some(journal));
                return Ok(output);
            }
        }
        output.begin_journal(plan)?;
        Ok(output)
    }

    /// Decides with `decide` what of a part is to be done again, while nobody publishes: then no shard is gone that is not
    /// known to be handed over.
    pub(in crate::engine) fn while_nobody_ends<T>(&mut self, decide: impl FnOnce(&Self) -> Result<T>) -> Result<T> {
        let at_work =
            |e: Error| e.replace_help("wait until 'tiesmith finish' ends, then run the part again if it asks for it");
        let _lock = self.storage.lock(&self.work.join(LOCK)).map_err(at_work)?;
        self.look_at_the_end()?;
        decide(self)
    }

    /// Takes in what whoever publishes did so far: which shards were handed over, and whether a replaced output is still there.
    fn look_at_the_end(&mut self) -> Result<()> {
        // What is published after this look is in the journal by then.
        let found = Found::look(&self.dir, &self.work, &*self.storage)?;
        let path = self.work.join(JOURNAL);
        let mut log = Log::default();
        if self.storage.identity(&path)?.is_some() {
            let take = |record| log.take(&record).ok_or_else(|| self.senseless_journal());
            replay(&path, &*self.storage, take)
                .map_err(|e| e.replace_help("remove the directory's .tiesmith folder to start over"))?;
        }
        self.handed_over = Mutex::new(log.handed_over);
        self.replaces = found.finished() && !log.committed;
        self.stale = log.stale;
        Ok(())
    }

    /// The directory, with all parts in it, to be published.
    pub(in crate::engine) fn of_parts(
        plan: &Plan,
        dir: &Path,
        force: bool,
        on_shard: Option<OnShard>,
        storage: &Arc<dyn Storage>,
    ) -> Result<Self> {
        refuse_inputs(plan, dir, &**storage)?;
        let work = work_dir(dir, &**storage)?;
        let lock = storage.lock(&work.join(LOCK)).map_err(Error::as_input)?;
        let mut output = Self { on_shard, ..Self::bare(dir, work.join(JOURNAL), lock, storage) };
        let found = Found::look(dir, &work, &**storage)?;
        let mut log = Log::default();
        let journal = if found.begun() { output.read_log(&mut log)? } else { None };
        output.published = log.is_of_the_end(plan, &found, output.on_shard.as_ref(), &**storage)?;
        output.refuse_other_address(&log.handed_over)?;
        output.handed_over = Mutex::new(std::mem::take(&mut log.handed_over));
        if output.published {
            return Ok(output);
        }
        output.replaces = found.finished();
        if output.replaces && !force {
            return Err(finished_already(dir));
        }
        if !log.committed {
            refuse_occupied(output.on_shard.as_ref(), &**storage)?;
        }
        match (journal, &log.begin) {
            (Some(journal), Some(begin)) => {
                begin.admit_copies(plan).map_err(|e| e.at(dir))?;
                output.stale = log.stale;
                output.journal = Mutex::new(Some(journal));
            }
            _ => output.begin_journal(plan)?,
        }
        Ok(output)
    }

    /// Whether the output of `plan` is published, and traces of the work are left in `dir`.
    pub(in crate::engine) fn is_ended(
        plan: &Plan,
        dir: &Path,
        on_shard: Option<&OnShard>,
        storage: &dyn Storage,
    ) -> Result<bool> {
        let work = work_dir(dir, storage)?;
        let found = Found::look(dir, &work, storage)?;
        let mut log = Log::default();
        if found.begun() {
            // What cannot be read is for whoever takes the directory to complain about.
            let _ = replay(&work.join(JOURNAL), storage, |record| {
                log.take(&record).ok_or_else(|| Error::input("no record of this version"))
            });
        }
        log.is_of_the_end(plan, &found, on_shard, storage)
    }

    /// Whether there is a journal of the whole output: it is the last trace of work that goes.
    pub(in crate::engine) fn is_begun(dir: &Path, storage: &dyn Storage) -> Result<bool> {
        Ok(storage.is_file(&work_dir(dir, storage)?.join(JOURNAL)))
    }

    fn bare(dir: &Path, journal_path: PathBuf, lock: Lock, storage: &Arc<dyn Storage>) -> Self {
        Self { in_parts: true, ..Self::taken(dir, journal_path, lock, storage) }
    }

    fn begin_journal(&mut self, plan: &Plan) -> Result<()> {
        let begin = Begin::of(plan)?.encode()?;
        let journal = Journal::create(&self.journal_path, kind::BEGIN, &begin, &*self.storage)?;
        self.journal = Mutex::new(Some(journal));
        self.storage.sync_dir(self.journal_path.parent().unwrap_or(&self.work))
    }

    /// Removes what the parts left. Their shards have got their names by then.
    pub(super) fn clear_parts(&self) -> Result<()> {
        let parts = self.work.join(DIR);
        for name in self.storage.list(&parts)? {
            self.storage.remove_file(&parts.join(name))?;
        }
        self.storage.remove_dir(&parts)
    }

    /// Whether shard `name` is there in full, finished or published, or was handed over.
    pub(in crate::engine) fn has_shard(&self, name: &str, bytes: u64) -> Result<bool> {
        let Some(path) = self.path_of(name)? else { return Ok(self.was_handed_over(name)) };
        Ok(self.storage.identity(&path)?.is_some_and(|found| found.bytes == bytes))
    }

    /// Where shard `name` is, finished or published; `None` if it is nowhere, or was handed over.
    pub(in crate::engine) fn path_of(&self, name: &str) -> Result<Option<PathBuf>> {
        if self.was_handed_over(name) {
            return Ok(None);
        }
        for (path, counts) in [(self.partial(name), true), (self.dir.join(name), self.owns_final_names())] {
            if counts && self.storage.identity(&path)?.is_some() {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }
}
