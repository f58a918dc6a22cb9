//! Outputs of a sweep as packed task vectors: chunks are compressed as they are merged, and put in order in the end.
//!
//! - Work ends in any order: what is packed of an output goes to a spool, and an entry says where. When all of it is there,
//!   it is copied in the order of the format into the file, which gets its name when it is durable.
//! - The bytes are those that packing the merged checkpoint (all that differs) would give, but for what the index says of
//!   the recipe.
//! - Beside the spool there is a journal: what is durable, and what was counted in it. A run that goes on reads what the
//!   journal vouches for, compares, and keeps it.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::checkpoint::packed::{
    self, CHUNK, Contents, Encoder, Entry, HEAD_BYTES, Settings, Tensor, checksum, head, identify, tail,
};
use crate::engine::PROGRAM;
use crate::engine::identity::Begin;
use crate::engine::kept::Kept;
use crate::engine::pack::{mark_all, mark_differing};
use crate::engine::records::{self, Piece as Written, RangeDone, UnitDone};
use crate::engine::slot::Slot;
use crate::engine::under_way::Keeps;
use crate::engine::worker::Tally;
use crate::engine::{Observer, cut::TieCounts};
use crate::error::{Error, Result};
use crate::journal::Journal;
use crate::limits::{WRITE_BEHIND_BYTES, WRITE_BEHIND_SECONDS};
use crate::plan::{Action, Chunk, Piece, Plan};
use crate::storage::{InputFile, Lock, OutputFile, Storage};

/// Bytes copied at a time when an output is put in order.
const COPY_BYTES: usize = 1 << 20;

/// Kinds of journal records.
mod kind {
    /// What the run is a run of.
    pub const BEGIN: u8 = 1;
    /// Work that is done: the number of chunks, each of them, then entries as in a merge's journal.
    pub const DONE: u8 = 2;
}

/// A tensor of an output.
struct Place {
    width: usize,
    units: u64,
    first_chunk: usize,
    /// Where base's tensor of the same name, type and shape is: its file (an index) and offset.
    base: Option<(u32, u64)>,
}

/// Where a chunk is in the spool.
#[derive(Debug, Clone, Copy, Default)]
struct Spooled {
    entry: Entry,
    offset: u64,
    there: bool,
}

/// A packed output while it is made.
pub(super) struct Spool<'a> {
    plan: &'a Plan,
    storage: &'a dyn Storage,
    path: PathBuf,
    spool: Box<dyn OutputFile>,
    places: Vec<Place>,
    state: Mutex<State>,
    journal: Mutex<Journal>,
    resumed: bool,
    _lock: Lock,
}

struct State {
    chunks: Vec<Spooled>,
    end: u64,
    dirty: u64,
    /// What is written, but not in the journal yet.
    done: Done,
    /// When the journal was written last.
    flushed: Instant,
}

/// Chunks that are in the spool, and what is done with them.
#[derive(Default)]
struct Done {
    chunks: Vec<(u32, Spooled)>,
    entries: Vec<records::Entry>,
}

impl Done {
    fn encode(&self) -> Vec<u8> {
        let mut out = (self.chunks.len() as u32).to_le_bytes().to_vec();
        for (number, Spooled { entry, offset, .. }) in &self.chunks {
            out.extend(number.to_le_bytes());
            out.extend(entry.stored.to_le_bytes());
            out.extend(entry.length.to_le_bytes());
            [entry.check, entry.base, *offset].iter().for_each(|n| out.extend(n.to_le_bytes()));
        }
        out.extend(records::encode(&self.entries));
        out
    }

    fn decode(payload: &[u8]) -> Option<Self> {
        const ROW: usize = 36;
        let (count, rest) = payload.split_first_chunk::<4>()?;
        let (rows, entries) = rest.split_at_checked((u32::from_le_bytes(*count) as usize).checked_mul(ROW)?)?;
        let chunk = |row: &[u8; ROW]| {
            let half = |at: usize| u32::from_le_bytes(row[at..at + 4].try_into().expect("4 bytes"));
            let whole = |at: usize| u64::from_le_bytes(row[at..at + 8].try_into().expect("8 bytes"));
            let entry = Entry { stored: half(4), length: half(8), check: whole(12), base: whole(20) };
            (half(0), Spooled { entry, offset: whole(28), there: true })
        };
        let chunks = rows.as_chunks::<ROW>().0.iter().map(chunk).collect();
        Some(Self { chunks, entries: records::decode(entries)? })
    }
}

/// One thread's buffers for packing.
pub(super) struct Framer {
    encoder: Encoder,
    values: Vec<u8>,
    base: Vec<u8>,
    mask: Vec<u64>,
}

impl Framer {
    pub(super) fn new(width: usize) -> Result<Self> {
        let buffer = || Vec::with_capacity(CHUNK * width);
        Ok(Self {
            encoder: Encoder::new(width)?,
            values: buffer(),
            base: buffer(),
            mask: Vec::with_capacity(CHUNK / 64),
        })
    }

    /// Memory that it holds, in bytes.
    pub(super) fn held_bytes(width: usize) -> u64 {
        2 * (CHUNK * width) as u64 + CHUNK as u64 / 8 + Encoder::held_bytes(width)
    }
}

/// The file of the output called `name`.
pub(super) fn file(dir: &Path, name: &str) -> PathBuf {
    dir.join(name).with_added_extension(crate::engine::pack::EXTENSION)
}

/// What there is beside the file at `path` while it is made.
pub(super) fn leftovers(path: &Path) -> [PathBuf; 4] {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    [
        path.with_added_extension("journal"),
        path.with_added_extension("spool"),
        path.with_added_extension("partial"),
        path.with_file_name(format!(".{name}.lock")),
    ]
}

/// What keeping track of `plan`'s chunks takes, in bytes.
pub(super) fn table_bytes(plan: &Plan) -> u64 {
    let chunks = |tensor: u32| plan.output_bytes(tensor).div_ceil(CHUNK as u64) + 1;
    let all: u64 = (0..plan.tensors.len() as u32).map(chunks).sum();
    all * 2 * size_of::<Spooled>() as u64
}

impl<'a> Spool<'a> {
    /// Begins the file at `path`, or goes on with it; with what there is of it.
    pub(super) fn open(
        plan: &'a Plan,
        path: PathBuf,
        restart: bool,
        storage: &'a dyn Storage,
        observer: &dyn Observer,
    ) -> Result<(Self, Kept)> {
        let base = &plan.checkpoints[plan.base.expect("what is packed has a base")];
        let mut places = Vec::with_capacity(plan.tensors.len());
        let mut first_chunk = 0;
        for tensor in &plan.tensors {
            let (width, units) = packed::units(tensor.dtype, &tensor.shape)?;
            let own = base.get(&tensor.name).filter(|own| own.dtype == tensor.dtype && own.shape == tensor.shape);
            places.push(Place { width, units, first_chunk, base: own.map(|own| (own.file, own.offset)) });
            first_chunk += units.div_ceil(CHUNK as u64) as usize;
        }
        let [journal_path, spool_path, _, lock_path] = leftovers(&path);
        let lock = storage.lock(&lock_path).map_err(Error::as_input)?;
        let mut left = Left { chunks: vec![Spooled::default(); first_chunk], kept: Kept::new(plan), end: 0 };
        let mut journal = None;
        if !restart && storage.identity(&journal_path)?.is_some() && storage.identity(&spool_path)?.is_some() {
            journal =
                left.take_over(plan, &places, &journal_path, &*storage.open_own(&spool_path)?, storage, observer)?;
        }
        let resumed = journal.is_some();
        let spool = match resumed {
            true => storage.reopen(&spool_path, left.end)?,
            false => storage.create(&spool_path, 0)?,
        };
        let journal = match journal {
            Some(journal) => journal,
            None => Journal::create(&journal_path, kind::BEGIN, &Begin::of(plan)?.encode()?, storage)?,
        };
        storage.sync_dir(path.parent().unwrap_or(Path::new(".")))?;
        let Left { chunks, kept, end } = left;
        let state = State { chunks, end, dirty: 0, done: Done::default(), flushed: Instant::now() };
        let (state, journal) = (Mutex::new(state), Mutex::new(journal));
        Ok((Self { plan, storage, path, spool, places, state, journal, resumed, _lock: lock }, kept))
    }

    /// Whether work of an earlier attempt was taken over.
    pub(super) fn resumed(&self) -> bool {
        self.resumed
    }

    /// Removes what there is of the file, if this run began it.
    pub(super) fn abandon(self) {
        if !self.resumed {
            leftovers(&self.path).iter().for_each(|left| drop(self.storage.remove_file(left)));
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes everything written durable, then says so.
    fn flush(&self) -> Result<()> {
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        // What is taken here was written before; what is written meanwhile is for the next time.
        let (done, end) = {
            let mut state = self.lock();
            (state.dirty, state.flushed) = (0, Instant::now());
            (std::mem::take(&mut state.done), state.end)
        };
        self.spool.sync()?;
        self.spool.release(0, end);
        match done.chunks.is_empty() && done.entries.is_empty() {
            true => Ok(()),
            false => journal.append(kind::DONE, &done.encode()),
        }
    }

    /// Widest unit.
    pub(super) fn width(plan: &Plan) -> usize {
        let width = |tensor: &crate::plan::PlannedTensor| packed::units(tensor.dtype, &tensor.shape).map_or(8, |u| u.0);
        plan.tensors.iter().map(width).max().unwrap_or(1)
    }

    /// Takes the result of `chunk`, which begins where a chunk of the format does; `slot` shows what it is made from.
    pub(super) fn chunk<'s>(&'s self, chunk: Chunk, slot: &'s Slot, framer: &'s mut Framer) -> FrameWriter<'s> {
        let place = &self.places[chunk.tensor as usize];
        // Of a tensor copied as it is, a chunk counts bytes.
        let unit = if self.plan.is_raw_copy(chunk.tensor) { 1 } else { place.width as u64 };
        let piece = match &self.plan.tensors[chunk.tensor as usize].action {
            Action::Merge { base, .. } => *base,
            Action::Copy { source, .. } => {
                Some(*source).filter(|source| Some(source.checkpoint as usize) == self.plan.base)
            }
        };
        let is_base = |piece: &Piece| {
            let entry = self.plan.source(*piece).0;
            place.base == Some((entry.file, entry.offset))
        };
        let shown = piece.filter(is_base).map(|piece| slot.bytes(piece));
        framer.values.clear();
        let at = chunk.start * unit;
        FrameWriter { spool: self, place, start: at, at, shown, framer, read: 0 }
    }

    /// Puts everything in order and gives the file its name; returns its length.
    pub(super) fn finish(&self) -> Result<u64> {
        self.flush()?;
        let partial = self.path.with_added_extension("partial");
        let spooled = self.storage.open_own(&self.path.with_added_extension("spool"))?;
        let target = self.storage.create(&partial, 0)?;
        target.write_at(&head(), 0)?;
        let state = self.lock();
        let mut buffer = vec![0; COPY_BYTES];
        let (mut end, mut synced) = (HEAD_BYTES, HEAD_BYTES);
        for chunk in &state.chunks {
            assert!(chunk.there, "all chunks are merged");
            let mut done = 0;
            while done < u64::from(chunk.entry.length) {
                let part = (u64::from(chunk.entry.length) - done).min(COPY_BYTES as u64) as usize;
                spooled.read_at(&mut buffer[..part], chunk.offset + done)?;
                target.write_at(&buffer[..part], end)?;
                (done, end) = (done + part as u64, end + part as u64);
            }
            if end - synced >= WRITE_BEHIND_BYTES {
                target.sync()?;
                target.release(synced, end - synced);
                synced = end;
            }
        }
        let entries: Vec<Entry> = state.chunks.iter().map(|chunk| chunk.entry).collect();
        let tail = tail(&self.contents()?, &entries, end)?;
        target.write_at(&tail, end)?;
        target.sync()?;
        drop(target);
        self.storage.rename(&partial, &self.path)?;
        self.storage.sync_dir(self.path.parent().unwrap_or(Path::new(".")))?;
        drop(state);
        // The journal first: without it the spool is of no use.
        leftovers(&self.path)[..2].iter().for_each(|left| drop(self.storage.remove_file(left)));
        Ok(end + tail.len() as u64)
    }

    fn contents(&self) -> Result<Contents> {
        let plan = self.plan;
        let base = &plan.checkpoints[plan.base.expect("what is packed has a base")];
        let tensor = |(tensor, place): (&crate::plan::PlannedTensor, &Place)| Tensor {
            name: tensor.name.to_string(),
            dtype: tensor.dtype,
            shape: tensor.shape.to_vec(),
            delta: place.base.is_some(),
        };
        Ok(Contents {
            program: PROGRAM.into(),
            settings: Settings::whole(),
            fingerprint: Some(plan.fingerprint.clone()),
            base: identify(base, &base.spec)?,
            tensors: plan.tensors.iter().zip(&self.places).map(tensor).collect(),
        })
    }
}

impl Keeps for Spool<'_> {
    fn keep_entries(&self, entries: Vec<records::Entry>) -> Result<()> {
        self.storage.check_mapped()?;
        self.lock().done.entries.extend(entries);
        self.flush()
    }
}

/// What an earlier attempt left.
struct Left {
    chunks: Vec<Spooled>,
    kept: Kept,
    /// Where the last sound chunk ends.
    end: u64,
}

impl Left {
    /// Reads what the journal vouches for, and keeps what is still as it was written; `None` if the journal never began.
    fn take_over(
        &mut self,
        plan: &Plan,
        places: &[Place],
        path: &Path,
        spool: &dyn InputFile,
        storage: &dyn Storage,
        observer: &dyn Observer,
    ) -> Result<Option<Journal>> {
        let senseless =
            || Error::input("the journal does not fit this sweep").at(path).help("use --restart to start over");
        observer.stage("check", spool.identity().bytes);
        let mut begun = false;
        let mut buffer = Vec::new();
        Journal::open(path, storage, |record| {
            if record.kind == kind::BEGIN && !begun {
                begun = true;
                return Begin::decode(&record.payload).ok_or_else(senseless)?.admit(plan).map_err(|e| e.at(path));
            }
            let done = Done::decode(&record.payload).filter(|_| begun && record.kind == kind::DONE);
            let done = done.ok_or_else(senseless)?;
            for (number, spooled) in done.chunks {
                observer.go_on()?;
                let slot = self.chunks.get_mut(number as usize).ok_or_else(senseless)?;
                let length = u64::from(spooled.entry.length);
                let end = spooled.offset.checked_add(length).filter(|&end| end <= spool.identity().bytes);
                let Some(end) = end else { continue };
                buffer.resize(length as usize, 0);
                spool.read_at(&mut buffer, spooled.offset)?;
                observer.advance(length);
                if checksum(&buffer) == spooled.entry.check {
                    *slot = spooled;
                    self.end = self.end.max(end);
                }
            }
            for entry in done.entries {
                match entry {
                    records::Entry::Unit(unit) if Kept::fits_unit(plan, &unit) => self.kept.add_unit(unit),
                    records::Entry::Step(step) => self.kept.under_way.take(step),
                    records::Entry::Range(range) if Kept::fits(plan, &range) => {
                        if self.kept.is_new(&range) && self.has(plan, places, &range) {
                            self.kept.add_range(plan, range);
                        }
                    }
                    _ => return Err(senseless()),
                }
            }
            Ok(())
        })
    }

    /// Whether all chunks of `range` are there.
    fn has(&self, plan: &Plan, places: &[Place], range: &RangeDone) -> bool {
        let place = &places[range.tensor as usize];
        let unit = if plan.is_raw_copy(range.tensor) { 1 } else { place.width as u64 };
        let frame = (CHUNK * place.width) as u64;
        let (start, end) = (range.start * unit, (range.start + range.count) * unit);
        let ends = end.is_multiple_of(frame) || end == place.units * place.width as u64;
        let chunks = (start / frame)..end.div_ceil(frame);
        let there = |number: u64| self.chunks[place.first_chunk + number as usize].there;
        start.is_multiple_of(frame) && ends && chunks.into_iter().all(there)
    }
}

impl Drop for Spool<'_> {
    fn drop(&mut self) {
        // Best effort: what is left disturbs nobody.
        let [_, _, partial, lock] = leftovers(&self.path);
        let _ = self.storage.remove_file(&partial);
        let _ = self.storage.remove_file(&lock);
    }
}

/// Takes the encoded bytes of one chunk of work, and packs them chunk of the format by chunk.
pub(super) struct FrameWriter<'s> {
    spool: &'s Spool<'s>,
    place: &'s Place,
    /// The first byte of the tensor that comes here, and the next.
    start: u64,
    at: u64,
    /// Base's bytes from there on, if they are loaded.
    shown: Option<&'s [u8]>,
    framer: &'s mut Framer,
    /// Bytes of base that were read.
    read: u64,
}

impl FrameWriter<'_> {
    /// Takes the next bytes.
    pub(super) fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        let frame = (CHUNK * self.place.width) as u64;
        while !bytes.is_empty() {
            let room = (frame - self.at % frame) as usize;
            let (part, rest) = bytes.split_at(room.min(bytes.len()));
            self.framer.values.extend_from_slice(part);
            self.at += part.len() as u64;
            bytes = rest;
            if self.at.is_multiple_of(frame) || self.at == self.place.units * self.place.width as u64 {
                self.pack()?;
            }
        }
        Ok(())
    }

    /// Ends the chunk, whose bytes are all there, and says what was counted; returns the bytes of base that were read.
    pub(super) fn done(
        self,
        chunk: Chunk,
        tally: Tally,
        ties: TieCounts,
        same: bool,
        unit: Option<UnitDone>,
    ) -> Result<u64> {
        assert!(self.framer.values.is_empty(), "work ends where a chunk of the format does");
        self.spool.storage.check_mapped()?;
        let none = |counts: &[u64]| counts.iter().all(|&n| n == 0);
        let range = RangeDone {
            tensor: chunk.tensor,
            start: chunk.start,
            count: chunk.count,
            differs: !same,
            bytes_read: tally.bytes_read,
            conflicts: tally.conflicts,
            kept: if none(&tally.kept) { Vec::new() } else { tally.kept },
            agreeing: if none(&tally.agreeing) { Vec::new() } else { tally.agreeing },
            ties: if none(&ties) { Vec::new() } else { ties },
            // The chunks vouch for themselves.
            pieces: vec![Written { bytes: (self.at - self.start) as u32, digest: [0; 16] }],
        };
        let full = {
            let mut state = self.spool.lock();
            state.done.entries.extend(unit.map(records::Entry::Unit));
            state.done.entries.push(records::Entry::Range(range));
            state.dirty >= WRITE_BEHIND_BYTES || state.flushed.elapsed() >= Duration::from_secs(WRITE_BEHIND_SECONDS)
        };
        if full {
            self.spool.flush()?;
        }
        Ok(self.read)
    }

    fn pack(&mut self) -> Result<()> {
        let Framer { encoder, values, base, mask } = &mut *self.framer;
        let start = self.at - values.len() as u64;
        let width = self.place.width;
        mask.clear();
        let shown = match self.place.base {
            Some((file, offset)) => {
                let base = match self.shown {
                    Some(shown) => &shown[(start - self.start) as usize..][..values.len()],
                    None => {
                        base.resize(values.len(), 0);
                        let checkpoint = &self.spool.plan.checkpoints[self.spool.plan.base.expect("it has one")];
                        checkpoint.files[file as usize].file.read_at(base, offset + start)?;
                        self.read += base.len() as u64;
                        &base[..]
                    }
                };
                mark_differing(values, base, width, mask);
                Some(base)
            }
            None => {
                mark_all(values.len() / width, mask);
                None
            }
        };
        let base_check = shown.map_or(0, checksum);
        let (bytes, stored) = encoder.encode(values, shown, width, mask)?;
        let entry = Entry { stored, length: bytes.len() as u32, check: checksum(bytes), base: base_check };
        let number = self.place.first_chunk + (start / (CHUNK * width) as u64) as usize;
        let offset = {
            let mut state = self.spool.lock();
            let offset = state.end;
            state.end += bytes.len() as u64;
            state.dirty += bytes.len() as u64;
            offset
        };
        self.spool.spool.write_at(bytes, offset)?;
        let spooled = Spooled { entry, offset, there: true };
        let mut state = self.spool.lock();
        state.chunks[number] = spooled;
        state.done.chunks.push((number as u32, spooled));
        drop(state);
        values.clear();
        Ok(())
    }
}
