//! Outputs of a sweep as packed task vectors: chunks are compressed as they are merged, and put in order in the end.
//!
//! - Work ends in any order: what is packed of an output goes to a spool, and an entry says where. When all of it is there,
//!   it is copied in the order of the format into the file, which gets its name when it is durable.
//! - The bytes are those that packing the merged checkpoint (all that differs) would give, but for what the index says of
//!   the recipe.
//! - An interrupted run's spool is of no use: its outputs are begun again. Outputs that have their name stay.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::checkpoint::packed::{
    self, CHUNK, Contents, Encoder, Entry, HEAD_BYTES, Settings, Tensor, checksum, head, identify, tail,
};
use crate::engine::PROGRAM;
use crate::engine::pack::{mark_all, mark_differing};
use crate::engine::slot::Slot;
use crate::error::{Error, Result};
use crate::limits::WRITE_BEHIND_BYTES;
use crate::plan::{Action, Chunk, Piece, Plan};
use crate::storage::{Lock, OutputFile, Storage};

/// Bytes copied at a time when an output is put in order.
const COPY_BYTES: usize = 1 << 20;

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
    _lock: Lock,
}

struct State {
    chunks: Vec<Spooled>,
    end: u64,
    dirty: u64,
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
pub(super) fn leftovers(path: &Path) -> [PathBuf; 3] {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    [
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
    /// Begins the file at `path`.
    pub(super) fn new(plan: &'a Plan, path: PathBuf, storage: &'a dyn Storage) -> Result<Self> {
        let base = &plan.checkpoints[plan.base.expect("what is packed has a base")];
        let mut places = Vec::with_capacity(plan.tensors.len());
        let mut first_chunk = 0;
        for tensor in &plan.tensors {
            let (width, units) = packed::units(tensor.dtype, &tensor.shape)?;
            let own = base.get(&tensor.name).filter(|own| own.dtype == tensor.dtype && own.shape == tensor.shape);
            places.push(Place { width, units, first_chunk, base: own.map(|own| (own.file, own.offset)) });
            first_chunk += units.div_ceil(CHUNK as u64) as usize;
        }
        let [_, _, lock_path] = leftovers(&path);
        let lock = storage.lock(&lock_path).map_err(Error::as_input)?;
        let spool = storage.create(&path.with_added_extension("spool"), 0)?;
        let state = Mutex::new(State { chunks: vec![Spooled::default(); first_chunk], end: 0, dirty: 0 });
        Ok(Self { plan, storage, path, spool, places, state, _lock: lock })
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
        let partial = self.path.with_added_extension("partial");
        let spooled = self.storage.open(&self.path.with_added_extension("spool"))?;
        let target = self.storage.create(&partial, 0)?;
        target.write_at(&head(), 0)?;
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
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

impl Drop for Spool<'_> {
    fn drop(&mut self) {
        // Best effort: what is left disturbs nobody, and the next run begins it again.
        for left in leftovers(&self.path) {
            let _ = self.storage.remove_file(&left);
        }
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

    /// Ends the chunk; returns the bytes of base that were read.
    pub(super) fn done(self) -> Result<u64> {
        assert!(self.framer.values.is_empty(), "work ends where a chunk of the format does");
        Ok(self.read)
    }

    fn pack(&mut self) -> Result<()> {
        let Framer { encoder, values, base, mask } = &mut *self.framer;
        let start = self.at - values.len() as u64;
        let width = self.place.width;
        mask.clear();
        let mut base_check = 0;
        match self.place.base {
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
                base_check = checksum(base);
                mark_differing(values, base, width, mask);
            }
            None => mark_all(values.len() / width, mask),
        }
        let (bytes, stored) = encoder.encode(values, width, mask)?;
        let entry = Entry { stored, length: bytes.len() as u32, check: checksum(bytes), base: base_check };
        let number = self.place.first_chunk + (start / (CHUNK * width) as u64) as usize;
        let (offset, full) = {
            let mut state = self.spool.state.lock().unwrap_or_else(PoisonError::into_inner);
            let offset = state.end;
            state.end += bytes.len() as u64;
            state.dirty += bytes.len() as u64;
            state.chunks[number] = Spooled { entry, offset, there: true };
            let full = state.dirty >= WRITE_BEHIND_BYTES;
            if full {
                state.dirty = 0;
            }
            (offset, full)
        };
        self.spool.spool.write_at(bytes, offset)?;
        if full {
            // Not for safety: so that writes do not pile up in memory.
            self.spool.spool.sync()?;
            self.spool.spool.release(0, offset);
        }
        values.clear();
        Ok(())
    }
}
