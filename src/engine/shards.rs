//! Shards while they are written: positional writes by all workers, followed by a thread that makes them count.
//!
//! - Unfinished shards are `*.partial` files in the work directory; one gets its final name when it is complete and
//!   durable.
//! - Written bytes do not pile up: every so many megabytes or seconds they are made durable, dropped from the page cache,
//!   and only then the journal says that they are done.
//! - What earlier attempts did is taken over after its bytes have been read and compared.
//! - The first failed operation ends the run; nothing is renamed or recorded after a failed sync.
//!
//! Knows shards and offsets, not what is in them.

mod resume;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use super::Observer;
use super::cut::TieCounts;
use super::kept::Kept;
use super::output::OutputDir;
use super::records::{self, Entry, Piece, RangeDone, UnitDone};
use super::shard_hash::ShardHash;
use super::worker::Tally;
use crate::error::{Error, Result};
use crate::limits::{RECORD_BYTES, WRITE_BEHIND_BYTES, WRITE_BEHIND_SECONDS};
use crate::plan::{Chunk, Plan};
use crate::storage::OutputFile;

/// What workers tell the thread that follows them.
enum Message {
    /// Bytes of a shard are written.
    Written { shard: usize, offset: u64, bytes: u64 },
    /// Work is done: all its bytes are written.
    Done(Entry),
    /// A unit's thresholds took long to find: they are to be kept at once.
    Precious(UnitDone),
}

/// What sealing found out about a shard.
#[derive(Debug, Clone)]
pub(super) struct SealedShard {
    /// BLAKE3 of the file.
    pub hash: String,
    /// Its length.
    pub bytes: u64,
}

/// The file of a shard: opened on first use, closed when sealed.
enum ShardFile {
    /// Nothing of it is there.
    Absent,
    /// An earlier attempt left a part of it.
    Left,
    Open(Arc<dyn OutputFile>),
    Sealed,
}

/// The shards while they are written.
struct Shards<'a> {
    plan: &'a Plan,
    output: &'a OutputDir,
    observer: &'a dyn Observer,
    files: Vec<Mutex<ShardFile>>,
    hashes: Vec<ShardHash>,
    /// Those that this process writes.
    own: Range<usize>,
}

/// Takes encoded bytes from all workers and puts them where the plan says.
pub(super) struct ShardWriter<'a> {
    shards: &'a Shards<'a>,
    behind: Sender<Message>,
    /// The first failure of the write-behind thread.
    failure: &'a Mutex<Option<Error>>,
}

/// Takes the encoded bytes of one chunk.
pub(super) struct ChunkWriter<'a> {
    writer: &'a ShardWriter<'a>,
    chunk: Chunk,
    pieces: Vec<Piece>,
}

impl ShardWriter<'_> {
    /// Takes the result of `chunk`.
    pub(super) fn chunk(&self, chunk: Chunk) -> ChunkWriter<'_> {
        ChunkWriter { writer: self, chunk, pieces: Vec::new() }
    }

    /// Keeps the thresholds of a unit before anything is written that depends on them.
    pub(super) fn keep(&self, unit: UnitDone) -> Result<()> {
        self.shards.output.storage.check_mapped()?;
        self.send(Message::Precious(unit))
    }

    fn send(&self, message: Message) -> Result<()> {
        // The receiver ends early only after a failure, which is the one to report.
        self.behind.send(message).map_err(|_| {
            let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
            failure.clone().unwrap_or_else(|| Error::failed("writing stopped"))
        })
    }
}

impl ChunkWriter<'_> {
    /// Writes `bytes` at `offset` (in bytes) of the chunk's tensor; the chunk's bytes come in order and without gaps.
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let shards = self.writer.shards;
        shards.observer.go_on()?;
        let place = &shards.plan.layout.tensors[self.chunk.tensor as usize];
        let (shard, offset) = (place.shard as usize, place.offset + offset);
        shards.file(shard)?.write_at(bytes, offset)?;
        let digest = shards.hashes[shard].add(offset, bytes);
        let length = u32::try_from(bytes.len()).expect("a window is shorter than 4 GiB");
        self.pieces.push(Piece { bytes: length, digest });
        self.writer.send(Message::Written { shard, offset, bytes: bytes.len() as u64 })
    }

    /// Says that the chunk is done, counted as `tally`; `unit` are its thresholds if they are not kept yet.
    pub(super) fn done(self, tally: Tally, ties: TieCounts, differs: bool, unit: Option<UnitDone>) -> Result<()> {
        self.writer.shards.output.storage.check_mapped()?;
        if let Some(unit) = unit {
            self.writer.send(Message::Done(Entry::Unit(unit)))?;
        }
        let none = |counts: &TieCounts| counts.iter().all(|&n| n == 0);
        self.writer.send(Message::Done(Entry::Range(RangeDone {
            tensor: self.chunk.tensor,
            start: self.chunk.start,
            count: self.chunk.count,
            differs,
            bytes_read: tally.bytes_read,
            conflicts: tally.conflicts,
            kept: if none(&tally.kept) { Vec::new() } else { tally.kept },
            agreeing: if none(&tally.agreeing) { Vec::new() } else { tally.agreeing },
            ties: if none(&ties) { Vec::new() } else { ties },
            pieces: self.pieces,
        })))
    }
}

impl<'a> Shards<'a> {
    fn new(plan: &'a Plan, output: &'a OutputDir, own: Range<usize>, observer: &'a dyn Observer) -> Self {
        let shards = &plan.layout.shards;
        Self {
            plan,
            output,
            observer,
            files: shards.iter().map(|_| Mutex::new(ShardFile::Absent)).collect(),
            hashes: shards.iter().map(|shard| ShardHash::new(shard.bytes)).collect(),
            own,
        }
    }

    /// The open file of a shard, created with its header on first use.
    fn file(&self, shard: usize) -> Result<Arc<dyn OutputFile>> {
        let mut state = self.files[shard].lock().unwrap_or_else(PoisonError::into_inner);
        let planned = &self.plan.layout.shards[shard];
        let (storage, partial) = (&self.output.storage, self.output.partial(&planned.name));
        let file = match &*state {
            ShardFile::Open(file) => return Ok(Arc::clone(file)),
            ShardFile::Sealed => unreachable!("a complete shard is not written to"),
            ShardFile::Left => storage.reopen(&partial, planned.bytes)?,
            ShardFile::Absent => {
                let file = storage.create(&partial, planned.bytes)?;
                self.output.sync_work()?;
                file
            }
        };
        file.write_at(&planned.header, 0)?;
        let file: Arc<dyn OutputFile> = Arc::from(file);
        *state = ShardFile::Open(Arc::clone(&file));
        Ok(file)
    }

    fn set(&self, shard: usize, state: ShardFile) {
        *self.files[shard].lock().unwrap_or_else(PoisonError::into_inner) = state;
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
        self.set(shard, ShardFile::Sealed);
        if !self.output.holds_shards(self.plan) {
            self.output.storage.rename(&partial, &self.output.dir.join(&planned.name))?;
            self.output.storage.sync_dir(&self.output.dir)?;
        }
        Ok(SealedShard { hash, bytes: planned.bytes })
    }
}

/// Follows the writes: keeps dirty bytes few, journals what is durable and seals complete shards.
struct Follower<'a> {
    shards: &'a Shards<'a>,
    sealed: Vec<Option<SealedShard>>,
    /// Tensor bytes still to come, per shard.
    remaining: Vec<u64>,
    /// What was written since the last sync, per shard.
    dirty: Vec<Range<u64>>,
    dirty_bytes: u64,
    /// What is done but not in the journal yet.
    entries: Vec<Entry>,
    entries_bytes: usize,
    /// When the journal was written last.
    flushed: Instant,
}

impl Follower<'_> {
    /// Runs until the workers end, whether they succeed or not: what was done is kept.
    fn follow(&mut self, messages: &Receiver<Message>) -> Result<()> {
        let period = Duration::from_secs(WRITE_BEHIND_SECONDS);
        loop {
            match messages.recv_timeout(period.saturating_sub(self.flushed.elapsed())) {
                Ok(message) => self.take(message)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return self.flush(),
            }
            let full = self.dirty_bytes >= WRITE_BEHIND_BYTES || self.entries_bytes >= RECORD_BYTES;
            if full || self.flushed.elapsed() >= period {
                self.flush()?;
            }
        }
    }

    fn take(&mut self, message: Message) -> Result<()> {
        match message {
            Message::Written { shard, offset, bytes } => {
                let range = &mut self.dirty[shard];
                let start = if range.is_empty() { offset } else { range.start.min(offset) };
                *range = start..range.end.max(offset + bytes);
                self.dirty_bytes += bytes;
            }
            Message::Precious(unit) => {
                self.push(Entry::Unit(unit));
                self.flush()?;
            }
            Message::Done(entry) => {
                let complete = match &entry {
                    Entry::Range(range) => self.count_down(range),
                    Entry::Unit(_) => None,
                };
                self.push(entry);
                if let Some(shard) = complete {
                    self.flush()?;
                    self.sealed[shard] = Some(self.shards.seal(shard)?);
                }
            }
        }
        Ok(())
    }

    fn push(&mut self, entry: Entry) {
        self.entries_bytes += entry.held_bytes();
        self.entries.push(entry);
    }

    /// Takes the range off what its shard lacks; tells if nothing is lacking any more.
    fn count_down(&mut self, range: &RangeDone) -> Option<usize> {
        let shard = self.shards.plan.layout.tensors[range.tensor as usize].shard as usize;
        self.remaining[shard] -= range.pieces.iter().map(|piece| u64::from(piece.bytes)).sum::<u64>();
        (self.remaining[shard] == 0).then_some(shard)
    }

    /// Makes everything written durable, then says so.
    fn flush(&mut self) -> Result<()> {
        for (shard, range) in self.dirty.iter_mut().enumerate().filter(|(_, range)| !range.is_empty()) {
            let file = self.shards.file(shard)?;
            file.sync()?;
            file.release(range.start, range.end - range.start);
            *range = 0..0;
        }
        self.dirty_bytes = 0;
        if !self.entries.is_empty() {
            self.shards.output.record_done(&records::encode(&std::mem::take(&mut self.entries)))?;
            self.entries_bytes = 0;
        }
        self.flushed = Instant::now();
        Ok(())
    }

    /// Seals what no write completed: shards that hold no tensor data, and those that earlier attempts completed.
    fn seal_complete(&mut self) -> Result<()> {
        for shard in self.shards.own.clone() {
            if self.sealed[shard].is_none() && self.remaining[shard] == 0 {
                self.sealed[shard] = Some(self.shards.seal(shard)?);
            }
        }
        Ok(())
    }
}

/// Lets `work` write the shards `own`; returns what sealing said about each of these, in order.
pub(super) fn write_shards(
    plan: &Plan,
    output: &OutputDir,
    own: Range<usize>,
    observer: &dyn Observer,
    work: impl FnOnce(&ShardWriter<'_>, &Kept) -> Result<()>,
) -> Result<Vec<SealedShard>> {
    let mut remaining = vec![0u64; plan.layout.shards.len()];
    for (tensor, place) in plan.layout.tensors.iter().enumerate() {
        if own.contains(&(place.shard as usize)) {
            remaining[place.shard as usize] += plan.output_bytes(tensor as u32);
        }
    }
    let shards = Shards::new(plan, output, own.clone(), observer);
    let mut follower = Follower {
        shards: &shards,
        sealed: vec![None; remaining.len()],
        dirty: vec![0..0; remaining.len()],
        remaining,
        dirty_bytes: 0,
        entries: Vec::new(),
        entries_bytes: 0,
        flushed: Instant::now(),
    };
    let kept = if output.resumes() { follower.take_over()? } else { Kept::new(plan) };
    let failure = Mutex::new(None);
    // Bounded, so that workers wait for the disk instead of filling the page cache.
    let (behind, messages) = crossbeam_channel::bounded(64);
    std::thread::scope(|scope| {
        let (shards, failure, follower) = (&shards, &failure, &mut follower);
        let following = scope.spawn(move || {
            let result = follower.follow(&messages);
            if let Err(error) = &result {
                *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.clone());
            }
            result
        });
        let done = work(&ShardWriter { shards, behind, failure }, &kept);
        let followed = following.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        done.and(followed)
    })?;
    follower.seal_complete()?;
    Ok(follower.sealed.drain(own).map(|sealed| sealed.expect("all work is done")).collect())
}
