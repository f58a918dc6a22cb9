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

use super::cut::TieCounts;
use super::hand_over::{HandedOver, hand_over};
use super::kept::Kept;
use super::output::OutputDir;
use super::pool::no_thread;
use super::reads::Reads;
use super::records::{self, Entry, GuessDone, MissDone, Piece, RangeDone, UnitDone};
use super::shard_hash::ShardHash;
use super::tensor_crc::{Crc, PieceCrc, TensorCrcs};
use super::under_way::Keeps;
use super::worker::Tally;
use super::{Observer, check_inputs_unchanged};
use crate::error::{Error, Result};
use crate::limits::{RECORD_BYTES, WRITE_BEHIND_BYTES, WRITE_BEHIND_SECONDS};
use crate::plan::{Chunk, Plan, Wanted};
use crate::storage::{InputFile, OutputFile};

/// What workers tell the thread that follows them.
enum Message {
    /// Bytes of a shard are written.
    Written { shard: usize, offset: u64, bytes: u64 },
    /// Work is done: all its bytes are written.
    Done(Entry),
    /// A unit's thresholds, or what was counted for them, took long: they are to be kept at once.
    Precious(Vec<Entry>),
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
    tensors: TensorCrcs,
    /// What is read of the inputs, where the journal keeps hashes of that.
    reads: Option<Arc<Reads>>,
    /// Where a finished output is repaired: the hash that each shard to be written must get; the others are left alone.
    repairs: Option<&'a [Option<String>]>,
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
    /// Their share of the shard's hash and of the tensor's checksum, which count only when the chunk is done.
    hash: ShardHash,
    crc: PieceCrc,
    /// Where in the tensor the next piece begins.
    end: u64,
}

impl ShardWriter<'_> {
    /// Takes the result of `chunk`.
    pub(super) fn chunk(&self, chunk: Chunk) -> ChunkWriter<'_> {
        let place = &self.shards.plan.layout.tensors[chunk.tensor as usize];
        let hash = ShardHash::new(self.shards.plan.layout.shards[place.shard as usize].bytes);
        ChunkWriter { writer: self, chunk, pieces: Vec::new(), hash, crc: PieceCrc::new(), end: 0 }
    }

    /// What is to be told of reads.
    pub(super) fn reads(&self) -> Option<Arc<Reads>> {
        self.shards.reads.clone()
    }

    /// Keeps the thresholds of a unit before anything is written that depends on them.
    pub(super) fn keep(&self, unit: UnitDone) -> Result<()> {
        self.keep_entries(vec![Entry::Unit(unit)])
    }

    /// Keeps the thresholds of a unit with what is recorded next: in a few seconds, or when the run ends.
    pub(super) fn keep_soon(&self, unit: UnitDone) -> Result<()> {
        self.shards.output.storage.check_mapped()?;
        self.send(Message::Done(Entry::Unit(unit)))
    }

    /// Keeps what a sample says of a unit, before anything is merged with it.
    pub(super) fn keep_guess(&self, guess: GuessDone) -> Result<()> {
        self.shards.output.storage.check_mapped()?;
        self.send(Message::Precious(vec![Entry::Guess(guess)]))
    }

    /// Says that the guess was wrong, and ends the attempt: the next one takes over what was not merged with it.
    pub(super) fn missed(&self, bytes_read: u64) -> Error {
        let missed = Message::Precious(vec![Entry::Miss(MissDone { bytes_read })]);
        self.send(missed).err().unwrap_or_else(|| Error::interrupted("thresholds were guessed wrong"))
    }

    fn send(&self, message: Message) -> Result<()> {
        // The receiver ends early only after a failure, which is the one to report.
        self.behind.send(message).map_err(|_| {
            let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
            failure.clone().unwrap_or_else(|| Error::failed("writing stopped"))
        })
    }
}

impl Keeps for ShardWriter<'_> {
    fn keep_entries(&self, entries: Vec<Entry>) -> Result<()> {
        self.shards.output.storage.check_mapped()?;
        self.send(Message::Precious(entries))
    }
}

impl ChunkWriter<'_> {
    /// Writes `bytes` at `offset` (in bytes) of the chunk's tensor; the chunk's bytes come in order and without gaps.
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let shards = self.writer.shards;
        shards.observer.go_on()?;
        let (plan, tensor) = (shards.plan, self.chunk.tensor);
        let place = &plan.layout.tensors[tensor as usize];
        let shard = place.shard as usize;
        if !shards.writes(shard) {
            return Ok(());
        }
        self.crc.update(bytes);
        self.end = offset + bytes.len() as u64;
        let offset = place.offset + offset;
        shards.file(shard)?.write_at(bytes, offset)?;
        let (nodes, digest) = self.hash.subtrees(offset, bytes);
        self.hash.insert(nodes);
        let length = u32::try_from(bytes.len()).expect("a window is shorter than 4 GiB");
        self.pieces.push(Piece { bytes: length, digest });
        self.writer.send(Message::Written { shard, offset, bytes: bytes.len() as u64 })
    }

    /// Says that the chunk is done, counted as `tally`; `unit` are its thresholds if they are not kept yet.
    pub(super) fn done(self, tally: Tally, ties: TieCounts, differs: bool, unit: Option<UnitDone>) -> Result<()> {
        let (shards, tensor) = (self.writer.shards, self.chunk.tensor);
        shards.output.storage.check_mapped()?;
        let shard = shards.plan.layout.tensors[tensor as usize].shard as usize;
        if !shards.writes(shard) {
            return Ok(());
        }
        shards.hashes[shard].insert(self.hash.nodes());
        shards.tensors.add(tensor, &self.crc, shards.plan.output_bytes(tensor) - self.end);
        if let Some(unit) = unit {
            self.writer.send(Message::Done(Entry::Unit(unit)))?;
        }
        let none = |counts: &TieCounts| counts.iter().all(|&n| n == 0);
        self.writer.send(Message::Done(Entry::Range(RangeDone {
            tensor,
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
    fn new(
        plan: &'a Plan,
        output: &'a OutputDir,
        own: Range<usize>,
        observer: &'a dyn Observer,
        repairs: Option<&'a [Option<String>]>,
    ) -> Self {
        let shards = &plan.layout.shards;
        Self {
            repairs,
            reads: output.hashes_inputs().then(|| Arc::new(Reads::new(plan))),
            tensors: TensorCrcs::new(plan.tensors.len()),
            plan,
            output,
            observer,
            files: shards.iter().map(|_| Mutex::new(ShardFile::Absent)).collect(),
            hashes: shards.iter().map(|shard| ShardHash::new(shard.bytes)).collect(),
            own,
        }
    }

    /// Whether the shard is to be written.
    fn writes(&self, shard: usize) -> bool {
        self.repairs.is_none_or(|repairs| repairs[shard].is_some())
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
        let written = self.output.storage.open_own(&partial)?;
        let hash = self.hashes[shard].finish(|buffer, offset| written.read_at(buffer, offset))?;
        file.release(0, planned.bytes);
        self.set(shard, ShardFile::Sealed);
        check_inputs(self.plan, shard)?;
        let wanted = self.repairs.and_then(|repairs| repairs[shard].as_ref());
        if let Some(wanted) = wanted.filter(|wanted| **wanted != hash) {
            return Err(Error::failed(format!("made again, the shard has the hash {hash}, not {wanted} as listed"))
                .at(&self.output.dir.join(&planned.name))
                .help(
                    "an input was changed without changing its length, or versions differ: merge again with --force",
                ));
        }
        if wanted.is_some() || !self.output.holds_shards(self.plan) {
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
    /// What is merged now is merged with a guess: no shard counts before it is proven.
    guessing: bool,
    /// It was wrong.
    missed: bool,
    /// Takes shards that are to be handed over, while there is a thread for that.
    courier: Option<Sender<HandedOver>>,
}

impl<'a> Follower<'a> {
    /// For shards of which nothing is there.
    fn new(shards: &'a Shards<'a>) -> Self {
        let plan = shards.plan;
        let mut remaining = vec![0u64; plan.layout.shards.len()];
        for (tensor, place) in plan.layout.tensors.iter().enumerate() {
            if shards.own.contains(&(place.shard as usize)) {
                remaining[place.shard as usize] += plan.output_bytes(tensor as u32);
            }
        }
        let left_alone = |shard: usize| SealedShard { hash: String::new(), bytes: plan.layout.shards[shard].bytes };
        Self {
            shards,
            sealed: (0..remaining.len()).map(|shard| (!shards.writes(shard)).then(|| left_alone(shard))).collect(),
            dirty: vec![0..0; remaining.len()],
            remaining,
            dirty_bytes: 0,
            entries: Vec::new(),
            entries_bytes: 0,
            flushed: Instant::now(),
            guessing: false,
            missed: false,
            courier: None,
        }
    }

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
            Message::Precious(entries) => {
                let any = |is: fn(&Entry) -> bool| entries.iter().any(is);
                let proven = self.guessing && any(|entry| matches!(entry, Entry::Unit(_)));
                self.guessing = !proven && (self.guessing || any(Entry::takes_guess));
                let missed = any(|entry| matches!(entry, Entry::Miss(_)));
                entries.into_iter().for_each(|entry| self.push(entry));
                self.flush()?;
                self.missed |= missed;
                if proven {
                    self.seal_complete()?;
                }
            }
            Message::Done(entry) => {
                let complete = if let Entry::Range(range) = &entry { self.count_down(range) } else { None };
                self.push(entry);
                if let Some(shard) = complete.filter(|_| !self.guessing) {
                    self.flush()?;
                    self.seal(shard)?;
                }
            }
        }
        Ok(())
    }

    fn seal(&mut self, shard: usize) -> Result<()> {
        self.sealed[shard] = Some(self.shards.seal(shard)?);
        self.hand_over(shard)
    }

    /// Hands a shard over that has its name.
    fn hand_over(&self, shard: usize) -> Result<()> {
        let Shards { plan, output, observer, tensors, .. } = self.shards;
        let Some(sealed) = self.sealed[shard].as_ref().filter(|_| output.hands_over() && !output.holds_shards(plan))
        else {
            return Ok(());
        };
        let made = HandedOver::new(plan, shard, sealed, |tensor| tensors.get(tensor));
        match &self.courier {
            // It ends early only after a failure, which is the one to report.
            Some(courier) => courier.send(made).map_err(|_| Error::failed("handing over stopped")),
            None => hand_over(output, &made, (shard, plan.layout.shards.len()), *observer),
        }
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
        let mut entries = std::mem::take(&mut self.entries);
        if let Some(reads) = &self.shards.reads {
            if !entries.is_empty() {
                // What was read a second time was not hashed again.
                check_inputs_unchanged(self.shards.plan)?;
            }
            // Work that is done here was told of after its reads.
            entries.splice(0..0, reads.take_pending().into_iter().map(Entry::Read));
        }
        if !entries.is_empty() {
            self.shards.output.record_done(&records::encode(&entries))?;
            self.entries_bytes = 0;
        }
        self.flushed = Instant::now();
        Ok(())
    }

    /// Seals what no write completed: shards that hold no tensor data, and those that earlier attempts completed.
    fn seal_complete(&mut self) -> Result<()> {
        for shard in self.shards.own.clone() {
            if self.sealed[shard].is_none() && self.remaining[shard] == 0 {
                self.seal(shard)?;
            }
        }
        Ok(())
    }
}

/// What is known of the shards once they are complete.
pub(super) struct Written {
    /// Of the shards to be written, in the order of the layout.
    pub shards: Vec<SealedShard>,
    /// Checksum of each tensor's bytes; 0 for tensors in other shards.
    pub tensors: Vec<Crc>,
}

/// Lets `work` write the shards `own`, after what earlier attempts left is taken over, which must make sense. Of a
/// finished output, those with a hash in `repairs` are written again, and must get it.
///
/// Where `work` guesses wrong, it is asked again.
pub(super) fn write_shards(
    plan: &Plan,
    output: &OutputDir,
    own: Range<usize>,
    observer: &dyn Observer,
    repairs: Option<&[Option<String>]>,
    makes_sense: &dyn Fn(&Kept) -> bool,
    mut work: impl FnMut(&ShardWriter<'_>, &Kept) -> Result<()>,
) -> Result<Written> {
    let mut goes_on = output.resumes();
    loop {
        let shards = Shards::new(plan, output, own.clone(), observer, repairs);
        let mut follower = Follower::new(&shards);
        let kept = if goes_on { follower.take_over(makes_sense)? } else { Kept::new(plan) };
        let worked = follow(&mut follower, |writer| work(writer, &kept));
        if !follower.missed {
            worked?;
            follower.seal_complete()?;
            let sealed = follower.sealed.drain(own).map(|sealed| sealed.expect("all work is done")).collect();
            return Ok(Written { shards: sealed, tensors: shards.tensors.finish() });
        }
        goes_on = true;
    }
}

/// Lets `follower` follow what `work` writes.
fn follow(follower: &mut Follower<'_>, work: impl FnOnce(&ShardWriter<'_>) -> Result<()>) -> Result<()> {
    let shards = follower.shards;
    let Shards { plan, output, observer, .. } = *shards;
    let failure = Mutex::new(None);
    // Bounded, so that workers wait for the disk instead of filling the page cache.
    let (behind, messages) = crossbeam_channel::bounded(64);
    std::thread::scope(|scope| {
        let failure = &failure;
        let mut follow = move || {
            if !output.hands_over() {
                return follower.follow(&messages);
            }
            // One shard waits while another is handed over; the merge waits when a third is complete.
            let (courier, complete) = crossbeam_channel::bounded(0);
            let hand_over = move || hand_over_all(&complete, plan, output, observer);
            let handing =
                std::thread::Builder::new().spawn_scoped(scope, hand_over).map_err(|error| no_thread(&error))?;
            follower.courier = Some(courier);
            let result = follower.follow(&messages);
            follower.courier = None;
            let handed = handing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            // What stopped it comes first: the follower was only told that it did.
            handed.and(result)
        };
        // The workers are told before the channel to the follower is closed.
        let follow = move || {
            follow().inspect_err(|error| {
                *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.clone());
            })
        };
        let following = std::thread::Builder::new().spawn_scoped(scope, follow).map_err(|error| no_thread(&error))?;
        let done = work(&ShardWriter { shards, behind, failure });
        let followed = following.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        done.and(followed)
    })
}

/// Hands over what is complete, one shard after the other.
fn hand_over_all(
    complete: &Receiver<HandedOver>,
    plan: &Plan,
    output: &OutputDir,
    observer: &dyn Observer,
) -> Result<()> {
    let shards = &plan.layout.shards;
    complete.iter().try_for_each(|made| {
        let index = shards.iter().position(|shard| shard.name == made.name).unwrap_or_default();
        hand_over(output, &made, (index, shards.len()), observer)
    })
}

/// Fails if an input that the shard was made of is not what it was when the run began.
fn check_inputs(plan: &Plan, shard: usize) -> Result<()> {
    let tensors = plan.layout.tensors.iter().zip(0..).filter(|(place, _)| place.shard as usize == shard);
    let mut used: Vec<(u32, u32)> = tensors
        .flat_map(|(_, tensor)| plan.pieces(tensor, Wanted::All))
        .map(|piece| (piece.checkpoint, plan.checkpoints[piece.checkpoint as usize].tensors[piece.entry as usize].file))
        .collect();
    used.sort_unstable();
    used.dedup();
    used.into_iter().try_for_each(|(checkpoint, file)| {
        check_input(&*plan.checkpoints[checkpoint as usize].files[file as usize].file)
    })
}

/// A file that changed while it was read gives a mixture that nobody asked for.
pub(super) fn check_input(file: &dyn InputFile) -> Result<()> {
    let changed = |what: &str| {
        Err(Error::failed(format!("the file {what} while it was read"))
            .at(file.path())
            .help("do not change inputs during a merge; run it again"))
    };
    // A modification time can be put back by whoever changes a file; the change time cannot.
    if *file.identity() != file.identity_now()? {
        return changed("changed");
    }
    match file.identity_there()? {
        None => changed("was removed"),
        Some(now) if now != *file.identity() => changed("was replaced by another"),
        Some(_) => Ok(()),
    }
}
