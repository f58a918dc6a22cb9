//! The file while it is made, and what of it survives a run that is interrupted.
//!
//! - Chunks are written to `NAME.partial`; `NAME.journal` says which of them are durable, after they are, and what was found
//!   out before: thresholds, and how far the search for them is. A lock in `.NAME.lock` keeps others away.
//! - A run that finds the journal of the same work keeps the chunks, from the first one on, whose bytes are still what was
//!   written, and goes on behind them: the file in the end is the same.
//! - The file gets its name when it is complete and durable. What cannot be gone on with leaves nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{BASE, EXTENSION, PackOutput};
use crate::checkpoint::packed::{self, CHUNK, Contents, ENTRY_BYTES, Entry, HEAD_BYTES, checksum, head};
use crate::engine::identity::Begin;
use crate::engine::kept::Kept;
use crate::engine::output::kind;
use crate::engine::records::{self, Rest};
use crate::engine::under_way::Keeps;
use crate::engine::{Observer, can_be_resumed};
use crate::error::{Error, Result};
use crate::journal::{Journal, Record, replay};
use crate::limits::{RECORD_BYTES, WRITE_BEHIND_BYTES};
use crate::plan::Plan;
use crate::storage::{InputFile, Lock, OutputFile, Storage};

/// Chunks, or counts of ties, in one record.
const LISTED: usize = 1 << 14;
/// No chunk is longer, compressed: twice as long as one of the widest type.
const LONGEST: u32 = 2 * (CHUNK * size_of::<f64>()) as u32;
const ADVICE: &str = "use --force to start over, or another --out";

/// Parts of a record of work that is done; what they begin with.
mod part {
    /// Entries as in the journal of a merge.
    pub const FOUND: u8 = 0;
    /// Chunks that are durable.
    pub const CHUNKS: u8 = 1;
    /// Ties in each chunk.
    pub const TIES: u8 = 2;
}

/// Where a packed task vector is made. Nobody else makes it there.
pub(super) struct Place<'a> {
    path: &'a Path,
    partial: PathBuf,
    journal: PathBuf,
    lock: PathBuf,
    /// Its folder did not exist before.
    created: bool,
    storage: &'a dyn Storage,
    _held: Lock,
}

/// What earlier attempts left.
pub(super) struct Left {
    /// What is known of thresholds.
    pub kept: Kept,
    /// Ties in each chunk, if all were counted.
    pub ties: Vec<u64>,
    /// Chunks that are durable and intact, from the first one on.
    pub chunks: Vec<Entry>,
    /// The journal, if it is to be continued.
    journal: Option<Journal>,
    /// The file is complete and has its name.
    pub finished: bool,
    /// How many chunks there are in all.
    most: usize,
}

impl<'a> Place<'a> {
    /// Refuses what needs no look into a journal, and takes the lock.
    pub(super) fn take(plan: &Plan, output: &'a PackOutput, storage: &'a dyn Storage) -> Result<Self> {
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
        let journal = path.with_added_extension("journal");
        if storage.identity(path)?.is_some() && !output.force && storage.identity(&journal)?.is_none() {
            return Err(already_there(path));
        }
        let folder = folder(path);
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let unwritable = |e: Error| e.as_input().help("choose an --out that you may write to");
        let created = storage.identity(folder)?.is_none();
        let lock = folder.join(format!(".{name}.lock"));
        let _held = storage.lock(&lock).map_err(unwritable)?;
        Ok(Self { path, partial: path.with_added_extension("partial"), journal, lock, created, storage, _held })
    }

    /// Where the file will be.
    pub(super) fn path(&self) -> &Path {
        self.path
    }

    /// What earlier attempts left of the same work, `chunks` chunks, after which the file says `contents`. With `force`,
    /// other work is thrown away.
    pub(super) fn left(
        &self,
        plan: &Plan,
        (chunks, contents): (usize, &Contents),
        force: bool,
        observer: &dyn Observer,
    ) -> Result<Left> {
        let mut left = Left::nothing(plan, chunks);
        if self.storage.identity(&self.journal)?.is_some() {
            match self.replay(plan, &mut left) {
                Err(_) if force => left = Left::nothing(plan, chunks),
                other => other?,
            }
        }
        let (is_there, is_begun) = (self.is_there(self.path)?, self.is_there(&self.partial)?);
        if left.journal.is_some() && is_there && left.chunks.len() == chunks {
            let found = packed::index(self.path, self.storage);
            left.finished = found.is_ok_and(|(found, entries)| found == *contents && entries == left.chunks);
        }
        if is_there && !left.finished && !force {
            return Err(already_there(self.path));
        }
        if !left.finished {
            left.chunks.truncate(chunks);
            let intact = if is_begun { self.intact(&left.chunks, observer)? } else { 0 };
            left.chunks.truncate(intact);
        }
        Ok(left)
    }

    fn is_there(&self, path: &Path) -> Result<bool> {
        Ok(self.storage.identity(path)?.is_some())
    }

    /// Takes in the journal, if it is one of the same work.
    fn replay(&self, plan: &Plan, left: &mut Left) -> Result<()> {
        let mut begin = None;
        let first = |record: Record| {
            if begin.is_none() {
                begin = Some(Begin::decode(&record.payload).filter(|_| record.kind == kind::BEGIN));
            }
            Ok(())
        };
        replay(&self.journal, self.storage, first).map_err(|e| e.replace_help(ADVICE))?;
        // Of the first record nothing was durable yet.
        let Some(begin) = begin else { return Ok(()) };
        let admitted = match &begin {
            Some(begin) => begin.admit_as(plan, "packing"),
            None => Err(Error::input("the unfinished packing was begun by another version").help(ADVICE)),
        };
        admitted.map_err(|e| e.replace_help(ADVICE).at(self.path))?;
        let senseless = || Error::input("the journal does not fit this packing").at(&self.journal).help(ADVICE);
        let mut first = true;
        left.journal = Journal::open(&self.journal, self.storage, |record| {
            let known = std::mem::replace(&mut first, false) || record.kind == kind::DONE && left.take(plan, &record);
            if known { Ok(()) } else { Err(senseless()) }
        })?;
        Ok(())
    }

    /// How many of `chunks` are in the file as they were written, from the first one on.
    fn intact(&self, chunks: &[Entry], observer: &dyn Observer) -> Result<usize> {
        observer.stage("check", chunks.iter().map(|chunk| u64::from(chunk.length)).sum());
        let file = self.storage.open_own(&self.partial)?;
        let (bytes, mut offset) = (file.identity().bytes, HEAD_BYTES);
        let mut begin = head();
        if bytes < HEAD_BYTES {
            return Ok(0);
        }
        file.read_at(&mut begin, 0)?;
        if begin != head() {
            return Ok(0);
        }
        let mut buffer = Vec::new();
        for (number, chunk) in chunks.iter().enumerate() {
            observer.go_on()?;
            let end = offset + u64::from(chunk.length);
            if bytes < end || !is_intact(&*file, chunk, offset, &mut buffer)? {
                return Ok(number);
            }
            observer.advance(u64::from(chunk.length));
            offset = end;
        }
        Ok(chunks.len())
    }

    /// The file to write to, with what was kept of it, and the journal.
    pub(super) fn begin(&self, plan: &Plan, left: &mut Left, keep_after: Duration) -> Result<Target<'_>> {
        let end = HEAD_BYTES + left.chunks.iter().map(|chunk| u64::from(chunk.length)).sum::<u64>();
        let goes_on = left.journal.is_some() && !left.chunks.is_empty();
        if left.journal.is_none() {
            self.storage.remove_file(&self.journal)?;
        }
        let file = match goes_on {
            true => self.storage.reopen(&self.partial, end)?,
            false => self.storage.create(&self.partial, 0)?,
        };
        if !goes_on {
            file.write_at(&head(), 0)?;
        }
        let journal = match left.journal.take() {
            Some(journal) => journal,
            None => Journal::create(&self.journal, kind::BEGIN, &Begin::of(plan)?.encode()?, self.storage)?,
        };
        self.storage.sync_dir(folder(self.path))?;
        let chunks = std::mem::take(&mut left.chunks);
        let recorded = Recorded { journal, chunks: chunks.len(), end, at: Instant::now() };
        let written = Written { chunks, ahead: BTreeMap::new(), end };
        Ok(Target { place: self, file, keep_after, written: Mutex::new(written), recorded: Mutex::new(recorded) })
    }

    /// Gives the file its name if it is complete; removes what there is of it if it cannot be gone on with.
    pub(super) fn close<T>(self, finished: bool, result: Result<T>) -> Result<T> {
        let (storage, folder) = (self.storage, folder(self.path));
        let result = result.and_then(|made| {
            // After a crash it can have both names.
            match finished {
                true => storage.remove_file(&self.partial)?,
                false => storage.rename(&self.partial, self.path)?,
            }
            storage.sync_dir(folder)?;
            storage.remove_file(&self.journal)?;
            Ok(made)
        });
        // Best effort: the error that led here is the one worth reporting.
        let is_over = result.as_ref().is_err_and(|error| !can_be_resumed(error));
        if is_over {
            let _ = storage.remove_file(&self.partial);
            let _ = storage.remove_file(&self.journal);
        }
        let _ = storage.remove_file(&self.lock);
        if is_over && self.created {
            let _ = storage.remove_dir(folder);
        }
        result
    }

    /// Leaves what is there as it is, and the lock to others.
    pub(super) fn leave(self) {
        let _ = self.storage.remove_file(&self.lock);
        if self.created {
            let _ = self.storage.remove_dir(folder(self.path));
        }
    }
}

fn already_there(path: &Path) -> Error {
    Error::input("the file is already there").at(path).help("use another --out, or --force")
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."))
}

fn is_intact(file: &dyn InputFile, chunk: &Entry, offset: u64, buffer: &mut Vec<u8>) -> Result<bool> {
    buffer.resize(chunk.length as usize, 0);
    file.read_at(buffer, offset)?;
    Ok(checksum(buffer) == chunk.check)
}

impl Left {
    /// Nothing, of work of `most` chunks.
    fn nothing(plan: &Plan, most: usize) -> Self {
        Self { kept: Kept::new(plan), ties: Vec::new(), chunks: Vec::new(), journal: None, finished: false, most }
    }

    /// Whether it is worth anything.
    pub(super) fn is_something(&self) -> bool {
        let found = !self.kept.is_empty() || !self.kept.under_way.is_empty() || !self.ties.is_empty();
        self.finished || !self.chunks.is_empty() || found
    }

    /// Takes in what a record says; false if that makes no sense.
    fn take(&mut self, plan: &Plan, record: &Record) -> bool {
        let Some((&part, payload)) = record.payload.split_first() else { return false };
        match part {
            part::FOUND => {
                records::decode(payload).is_some_and(|found| found.into_iter().all(|entry| self.find(plan, entry)))
            }
            part::CHUNKS => self.list(
                payload,
                |left| &mut left.chunks,
                |rest| rest.take::<ENTRY_BYTES>().map(|row| Entry::decode(&row)).filter(|e| e.length <= LONGEST),
            ),
            part::TIES => {
                self.list(payload, |left| &mut left.ties, |rest| rest.u64().filter(|&ties| ties <= CHUNK as u64))
            }
            _ => false,
        }
    }

    fn find(&mut self, plan: &Plan, entry: records::Entry) -> bool {
        match entry {
            records::Entry::Step(step) => self.kept.under_way.take(step),
            records::Entry::Unit(unit) if Kept::fits_unit(plan, &unit) => self.kept.add_unit(unit),
            _ => return false,
        }
        true
    }

    /// Takes in items from the one on whose number comes first: later ones are done again.
    fn list<T>(
        &mut self,
        payload: &[u8],
        all: impl Fn(&mut Self) -> &mut Vec<T>,
        item: impl Fn(&mut Rest<'_>) -> Option<T>,
    ) -> bool {
        let (mut rest, most) = (Rest::of(payload), self.most);
        let all = all(self);
        let Some(first) = rest.u64().filter(|&first| first <= all.len() as u64) else { return false };
        all.truncate(first as usize);
        while !rest.is_empty() {
            match item(&mut rest) {
                Some(item) if all.len() < most => all.push(item),
                _ => return false,
            }
        }
        true
    }
}

/// The file that is written.
pub(super) struct Target<'a> {
    place: &'a Place<'a>,
    file: Box<dyn OutputFile>,
    /// What is written is recorded when it is so old.
    keep_after: Duration,
    written: Mutex<Written>,
    recorded: Mutex<Recorded>,
}

/// What is written.
struct Written {
    /// The first chunks, without gaps, and where they end.
    chunks: Vec<Entry>,
    end: u64,
    /// Chunks behind a gap, by number.
    ahead: BTreeMap<usize, Entry>,
}

/// What the journal knows.
struct Recorded {
    journal: Journal,
    chunks: usize,
    end: u64,
    at: Instant,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Target<'_> {
    /// Where the chunks that were kept end, and how many they are.
    pub(super) fn start(&self) -> (u64, usize) {
        let written = lock(&self.written);
        (written.end, written.chunks.len())
    }

    /// Writes chunk `number` at `offset`. What is written becomes durable every so often, and is recorded then.
    pub(super) fn write(&self, number: usize, entry: Entry, bytes: &[u8], offset: u64) -> Result<()> {
        self.file.write_at(bytes, offset)?;
        let (end, chunks) = {
            let mut written = lock(&self.written);
            written.ahead.insert(number, entry);
            loop {
                let next = written.chunks.len();
                let Some(entry) = written.ahead.remove(&next) else { break };
                written.end += u64::from(entry.length);
                written.chunks.push(entry);
            }
            (written.end, written.chunks.len())
        };
        let Ok(mut recorded) = self.recorded.try_lock() else { return Ok(()) };
        let late = recorded.at.elapsed() >= self.keep_after;
        // Another worker may have recorded more than was there a moment ago.
        let fresh = (end.saturating_sub(recorded.end), chunks.saturating_sub(recorded.chunks));
        if fresh.0 >= WRITE_BEHIND_BYTES || fresh.1 >= LISTED || late {
            self.record(&mut recorded)?;
        }
        Ok(())
    }

    /// Makes what is written durable, then says so.
    fn record(&self, recorded: &mut Recorded) -> Result<()> {
        let (fresh, end) = {
            let written = lock(&self.written);
            (written.chunks[recorded.chunks..].to_vec(), written.end)
        };
        self.place.storage.check_mapped()?;
        self.file.sync()?;
        self.file.release(0, end);
        recorded.at = Instant::now();
        for entries in fresh.chunks(LISTED) {
            let mut payload = vec![part::CHUNKS];
            payload.extend((recorded.chunks as u64).to_le_bytes());
            entries.iter().for_each(|entry| payload.extend(entry.encode()));
            recorded.journal.append(kind::DONE, &payload)?;
            recorded.chunks += entries.len();
        }
        recorded.end = end;
        Ok(())
    }

    /// Keeps the ties in each of some chunks, from number `first` on.
    pub(super) fn keep_ties(&self, first: usize, counts: &[u64]) -> Result<()> {
        self.place.storage.check_mapped()?;
        let mut recorded = lock(&self.recorded);
        for (number, counts) in counts.chunks(LISTED).enumerate() {
            let mut payload = vec![part::TIES];
            payload.extend(((first + number * LISTED) as u64).to_le_bytes());
            counts.iter().for_each(|count| payload.extend(count.to_le_bytes()));
            recorded.journal.append(kind::DONE, &payload)?;
        }
        Ok(())
    }

    /// Records what is written, for the next attempt, if there is one.
    pub(super) fn interrupted(&self, error: &Error) {
        if can_be_resumed(error) {
            // Best effort: the error that led here is the one worth reporting.
            let _ = self.record(&mut lock(&self.recorded));
        }
    }

    /// Writes what follows the chunks, and makes everything durable. Returns the chunks, and the length of the file.
    pub(super) fn finish(&self, tail: impl FnOnce(&[Entry], u64) -> Result<Vec<u8>>) -> Result<u64> {
        // So that a file that is complete is known to be, whatever name it has.
        self.record(&mut lock(&self.recorded))?;
        let written = lock(&self.written);
        let tail = tail(&written.chunks, written.end)?;
        self.file.write_at(&tail, written.end)?;
        self.file.sync()?;
        Ok(written.end + tail.len() as u64)
    }
}

impl Keeps for Target<'_> {
    fn keep_entries(&self, entries: Vec<records::Entry>) -> Result<()> {
        self.place.storage.check_mapped()?;
        let mut recorded = lock(&self.recorded);
        let mut payload = vec![part::FOUND];
        for (place, entry) in entries.iter().enumerate() {
            payload.extend(records::encode(std::slice::from_ref(entry)));
            if payload.len() >= RECORD_BYTES || place + 1 == entries.len() {
                recorded.journal.append(kind::DONE, &payload)?;
                payload.truncate(1);
            }
        }
        Ok(())
    }
}
