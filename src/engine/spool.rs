//! What a pass downloaded and a later one needs, on the local disk: so that every byte comes over the network once.
//!
//! - Of a model's chunk those elements are kept that may survive the trim: whose key is at or above a bound, or that are not
//!   finite. The others come back as base's: their task vector is zero then, and below the bound it is trimmed as well.
//!   So results are the same to the bit, ties and counts included, as long as no threshold lies below the bound.
//! - For a look at the models (`analyze/`) all of what a pass downloads is kept.
//! - The spool is a log of records that vouch for themselves: nothing depends on what of it is durable. What is missing or
//!   damaged is downloaded again. A run that goes on takes over what records it finds.
//! - When the disk has no more room, the rest is downloaded again too.

mod site;
mod tensors;

pub(super) use site::{Room, Site};

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::identity::Begin;
use super::pack::mark_all;
use super::passes::Passes;
use super::slot::{Loaded, Slot};
use super::worker::{Worker, subtract};
use super::{Observer, can_be_resumed};
use crate::checkpoint::packed::{CHUNK, Decoder, Encoder, checksum};
use crate::error::Result;
use crate::kernels;
use crate::limits::WRITE_BEHIND_BYTES;
use crate::plan::{Action, Chunk, Piece, Plan, Schedule, Spooling, Unit};
use crate::sketch::{Selector, Threshold};
use crate::storage::{InputFile, OutputFile, Storage};

/// What the file begins with: magic, version, length of chunks, and what it is the spool of.
const HEAD_BYTES: usize = 56;
const MAGIC: [u8; 8] = *b"TIESPOOL";
const VERSION: u64 = 1;
/// What a record begins with.
const RECORD_HEAD: usize = 48;
/// In the place of a bound: all elements are kept, as they are.
const WHOLE: u32 = u32::MAX;
/// Longest chunk.
const MOST_ELEMENTS: u64 = CHUNK as u64;

/// What is kept of a model's chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    /// Nothing: it is not loaded, or not needed again.
    Nothing,
    /// Elements with keys from this one on.
    From(u32),
    /// Everything.
    All,
}

impl Keep {
    /// Of a model that a pass loads or not, and whose thresholds are not below `least`.
    pub(super) fn of(least: Option<u32>, loaded: bool) -> Self {
        least.filter(|_| loaded).map_or(Self::Nothing, Self::From)
    }
}

/// How a pass deals with the spool.
#[derive(Clone, Copy)]
pub(super) struct Use<'a> {
    pub spool: &'a Spool<'a>,
    /// What comes from there counts as read: the run that left it is this one.
    pub counts: bool,
}

/// See the module's documentation.
pub(super) struct Spool<'a> {
    plan: &'a Plan,
    spooling: &'a Spooling,
    storage: &'a dyn Storage,
    observer: &'a dyn Observer,
    path: PathBuf,
    file: Box<dyn OutputFile>,
    /// The same, as it was when the pass at hand began.
    reader: RwLock<Option<Box<dyn InputFile>>>,
    /// Longest chunk.
    chunk_elements: u64,
    /// Per tensor, the number of its first chunk; of those that are not in the unit, none.
    first: Vec<Option<u64>>,
    /// Per checkpoint that is kept, where the record of each chunk is; 0 if there is none.
    places: Vec<Vec<AtomicU64>>,
    /// Per checkpoint, the largest bound of its records.
    bounds: Vec<AtomicU32>,
    end: AtomicU64,
    /// How far the file may grow.
    limit: u64,
    unsynced: AtomicU64,
    /// Nothing more is written.
    full: AtomicBool,
    /// Whether it was told that the disk has no room.
    told: Arc<AtomicBool>,
}

/// One thread's buffers.
pub(super) struct Packer {
    encoder: Encoder,
    decoder: Decoder,
    mask: Vec<u64>,
    record: Vec<u8>,
    /// A chunk of which only a part is asked for.
    whole: Vec<u8>,
}

impl Packer {
    fn new(width: usize) -> Result<Self> {
        Ok(Self {
            encoder: Encoder::new(width)?,
            decoder: Decoder::new()?,
            mask: Vec::new(),
            record: Vec::new(),
            whole: Vec::new(),
        })
    }
}

/// The head of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Record {
    checkpoint: u32,
    bound: u32,
    number: u64,
    elements: u32,
    stored: u32,
    length: u32,
    check: u64,
}

impl Record {
    fn encode(&self) -> [u8; RECORD_HEAD] {
        let mut head = [0; RECORD_HEAD];
        head[..4].copy_from_slice(&self.checkpoint.to_le_bytes());
        head[4..8].copy_from_slice(&self.bound.to_le_bytes());
        head[8..16].copy_from_slice(&self.number.to_le_bytes());
        head[16..20].copy_from_slice(&self.elements.to_le_bytes());
        head[20..24].copy_from_slice(&self.stored.to_le_bytes());
        head[24..28].copy_from_slice(&self.length.to_le_bytes());
        head[32..40].copy_from_slice(&self.check.to_le_bytes());
        let check = checksum(&head[..40]);
        head[40..].copy_from_slice(&check.to_le_bytes());
        head
    }

    fn decode(head: &[u8; RECORD_HEAD]) -> Option<Self> {
        let half = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("4 bytes"));
        let whole = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("8 bytes"));
        (checksum(&head[..40]) == whole(40)).then(|| Self {
            checkpoint: half(0),
            bound: half(4),
            number: whole(8),
            elements: half(16),
            stored: half(20),
            length: half(24),
            check: whole(32),
        })
    }
}

impl<'a> Spool<'a> {
    /// Begins the spool of a run at `site` over all tensors together, or goes on with that of an earlier attempt; `None` if
    /// `schedule` needs none. `searches` says that thresholds are still sought.
    pub(super) fn open(
        plan: &'a Plan,
        schedule: &'a Schedule,
        site: &Site<'a>,
        searches: bool,
        observer: &'a dyn Observer,
    ) -> Result<Option<Self>> {
        match (&schedule.spool, &schedule.units[..]) {
            (Some(spooling), [unit]) if !spooling.by_tensor() => {
                let begin = blake3::hash(&Begin::of(plan)?.encode()?);
                Self::open_for(plan, (spooling, unit), begin, site, searches, observer).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// The same for `unit`, as part of what `begin` is the hash of.
    fn open_for(
        plan: &'a Plan,
        (spooling, unit): (&'a Spooling, &Unit),
        begin: blake3::Hash,
        site: &Site<'a>,
        searches: bool,
        observer: &'a dyn Observer,
    ) -> Result<Self> {
        let storage = site.storage;
        let (path, dir) = site.place(plan, spooling)?;
        let left = match site.takes_over(searches) && storage.is_file(&path) {
            true => Some(storage.open_own(&path)?),
            false => None,
        };
        // Chunks of another length would not be found again.
        let length_of = |left: &dyn InputFile| chunk_elements_of(left, begin.as_bytes());
        let left = left.and_then(|left| length_of(&*left).map(|length| (left, length)));
        let left = left.filter(|&(_, length)| !searches || length == unit.chunk_elements);
        let file = match &left {
            Some((left, _)) => storage.reopen(&path, left.identity().bytes),
            None => storage.create(&path, 0),
        };
        let file = file.map_err(|e| e.help("choose a --spool that you may write to"))?;
        let room = site.room(&dir)?;
        let mut spool = Self {
            plan,
            spooling,
            storage,
            observer,
            path,
            file,
            reader: RwLock::new(None),
            chunk_elements: left.as_ref().map_or(unit.chunk_elements, |&(_, length)| length),
            first: vec![None; plan.tensors.len()],
            places: Vec::new(),
            bounds: plan.checkpoints.iter().map(|_| AtomicU32::new(0)).collect(),
            end: AtomicU64::new(HEAD_BYTES as u64),
            limit: 0,
            unsynced: AtomicU64::new(0),
            full: AtomicBool::new(false),
            told: Arc::clone(&site.room.told),
        };
        let chunks = spool.number_chunks(unit);
        let table = |keeps: bool| (0..if keeps { chunks } else { 0 }).map(|_| AtomicU64::new(0)).collect();
        spool.places = (0..plan.checkpoints.len()).map(|checkpoint| table(spooling.keeps(checkpoint))).collect();
        match left {
            Some((left, _)) => spool.take_over(&*left),
            None => spool.write_head(begin.as_bytes()),
        }
        spool.limit = spool.end.load(Ordering::Relaxed) + room;
        spool.refresh()?;
        Ok(spool)
    }

    fn write_head(&self, begin: &[u8; 32]) {
        let mut head = Vec::from(MAGIC);
        head.extend(VERSION.to_le_bytes());
        head.extend(self.chunk_elements.to_le_bytes());
        head.extend(begin);
        // Nothing is lost with it.
        if self.file.write_at(&head, 0).is_err() {
            self.give_up();
        }
    }

    /// Finds the records that an earlier attempt left, as far as there is one after the other.
    fn take_over(&self, left: &dyn InputFile) {
        let mut end = HEAD_BYTES as u64;
        while let Some(head) = record_at(left, end) {
            let table = self.places.get(head.checkpoint as usize);
            if let Some(place) = table.and_then(|table| table.get(head.number as usize)) {
                if head.bound != WHOLE {
                    self.bounds[head.checkpoint as usize].fetch_max(head.bound, Ordering::Relaxed);
                }
                place.store(end, Ordering::Relaxed);
            }
            end += RECORD_HEAD as u64 + u64::from(head.length);
        }
        self.end.store(end, Ordering::Relaxed);
    }

    /// Gives every chunk of the unit a number; returns how many there are.
    fn number_chunks(&mut self, unit: &Unit) -> u64 {
        let mut next = 0;
        for &tensor in &unit.tensors {
            self.first[tensor as usize] = Some(next);
            let length = self.plan.length(tensor);
            next += if length == 0 { 0 } else { self.chunk_of(tensor, length - 1) + 1 };
        }
        next
    }

    /// The first chunk of a tensor, and the length of those after it.
    fn lengths(&self, tensor: u32) -> (u64, u64) {
        let length = self.plan.length(tensor);
        let first = self.plan.aligned(tensor, 0, self.chunk_elements).min(length);
        (first, self.plan.aligned(tensor, first, self.chunk_elements))
    }

    /// Which chunk of its tensor `element` is in.
    fn chunk_of(&self, tensor: u32, element: u64) -> u64 {
        let (first, rest) = self.lengths(tensor);
        if element < first { 0 } else { 1 + (element - first) / rest }
    }

    /// Where chunk `number` of a tensor begins and ends.
    fn bounds_of(&self, tensor: u32, number: u64) -> (u64, u64) {
        let (first, rest) = self.lengths(tensor);
        let end = first + number * rest;
        (if number == 0 { 0 } else { end - rest }, end.min(self.plan.length(tensor)))
    }

    /// The places of the records that cover `chunk` of `piece`, with the bounds of their elements.
    fn records(&self, chunk: Chunk, piece: Piece) -> impl Iterator<Item = (u64, (u64, u64))> + '_ {
        let first = self.first[chunk.tensor as usize].filter(|_| chunk.count > 0);
        let places = &self.places[piece.checkpoint as usize];
        let numbers = first.map(|first| {
            let last = self.chunk_of(chunk.tensor, chunk.start + chunk.count - 1);
            (first, self.chunk_of(chunk.tensor, chunk.start)..=last)
        });
        numbers.into_iter().flat_map(move |(first, numbers)| {
            numbers.map(move |number| {
                let place = places.get((first + number) as usize).map_or(0, |place| place.load(Ordering::Relaxed));
                (place, self.bounds_of(chunk.tensor, number))
            })
        })
    }

    /// Whether of models is kept what lies above a bound, and not everything.
    pub(super) fn has_bounds(&self) -> bool {
        self.spooling.needs_bounds()
    }

    /// Whether `chunk` of `piece` is there.
    pub(super) fn holds(&self, chunk: Chunk, piece: Piece) -> bool {
        let mut records = self.records(chunk, piece).peekable();
        records.peek().is_some() && records.all(|(place, _)| place > 0)
    }

    /// From here on, what is kept of a model must do for thresholds from its bound in `bounds` on; what does not is
    /// forgotten.
    pub(super) fn demand(&self, bounds: &[Option<u32>]) -> Result<()> {
        for tensor in self.first.iter().zip(0..).filter_map(|(first, tensor)| first.map(|_| tensor)) {
            let Action::Merge { models, .. } = &self.plan.tensors[tensor as usize].action else {
                continue;
            };
            for &(model, piece) in models {
                let checkpoint = piece.checkpoint as usize;
                let Some(bound) = bounds[model as usize] else { continue };
                if self.bounds[checkpoint].load(Ordering::Relaxed) > bound {
                    self.places[checkpoint].iter().for_each(|place| place.store(0, Ordering::Relaxed));
                    self.bounds[checkpoint].store(0, Ordering::Relaxed);
                }
            }
        }
        self.refresh()
    }

    /// Per model, the bound of what is kept of it, if anything is.
    fn bounds_of_models(&self) -> Vec<Option<u32>> {
        let mut bounds = vec![None; self.plan.models()];
        let tensors = self.first.iter().zip(&self.plan.tensors).filter(|(first, _)| first.is_some());
        for (_, tensor) in tensors {
            let Action::Merge { models, .. } = &tensor.action else { continue };
            for &(model, piece) in models {
                let bound = self.bounds[piece.checkpoint as usize].load(Ordering::Relaxed);
                let known: &mut Option<u32> = &mut bounds[model as usize];
                *known = (*known).max((bound > 0).then_some(bound));
            }
        }
        bounds
    }

    /// Shows what was written since.
    fn refresh(&self) -> Result<()> {
        *self.reader.write().unwrap_or_else(PoisonError::into_inner) = Some(self.storage.open_own(&self.path)?);
        Ok(())
    }

    /// Keeps `keep` of the chunk that `slot` shows, as far as it is not there yet.
    pub(super) fn put(&self, worker: &mut Worker, data: Loaded<'_>, keep: &[Keep]) -> Result<()> {
        let (first, merge) = (self.first[data.chunk.tensor as usize], data.merge());
        let number = self.chunk_of(data.chunk.tensor, data.chunk.start);
        let whole =
            self.bounds_of(data.chunk.tensor, number) == (data.chunk.start, data.chunk.start + data.chunk.count);
        let Some(first) = first.filter(|_| whole) else { return Ok(()) };
        let models = merge.models.iter().map(|&(model, piece)| (piece, keep[model as usize]));
        for (piece, keep) in merge.base.map(|base| (base, Keep::All)).into_iter().chain(models) {
            if keep == Keep::Nothing
                || !self.spooling.keeps(piece.checkpoint as usize)
                || self.holds(data.chunk, piece)
                || self.full.load(Ordering::Relaxed)
            {
                continue;
            }
            let mut packer = match worker.packer.take() {
                Some(packer) => packer,
                None => self.packer()?,
            };
            let written = self.put_piece(worker, data, (piece, keep), first + number, &mut packer);
            worker.packer = Some(packer);
            written?;
        }
        Ok(())
    }

    /// Buffers for a thread.
    pub(super) fn packer(&self) -> Result<Box<Packer>> {
        Ok(Box::new(Packer::new(self.spooling.width())?))
    }

    fn put_piece(
        &self,
        worker: &mut Worker,
        data: Loaded<'_>,
        (piece, keep): (Piece, Keep),
        number: u64,
        packer: &mut Packer,
    ) -> Result<()> {
        let float = data.float(piece);
        let base = data.merge().base.filter(|&base| base != piece && data.float(base) == float);
        let Packer { encoder, mask, record, .. } = packer;
        mask.clear();
        let bound = match (keep, base) {
            (Keep::From(bound), Some(_)) => {
                mark_from(worker, data, piece, bound, mask);
                bound
            }
            _ => {
                mark_all(data.chunk.count as usize, mask);
                WHOLE
            }
        };
        let base = base.filter(|_| bound != WHOLE).map(|base| data.slot.bytes(base));
        let (compressed, stored) = encoder.encode(data.slot.bytes(piece), base, float.width(), mask)?;
        let head = Record {
            checkpoint: piece.checkpoint,
            bound,
            number,
            elements: data.chunk.count as u32,
            stored,
            length: compressed.len() as u32,
            check: checksum(compressed),
        };
        record.clear();
        record.extend(head.encode());
        record.extend_from_slice(compressed);
        self.write(record, &head);
        Ok(())
    }

    /// Writes a record. What cannot be written is not there: it costs another download.
    fn write(&self, record: &[u8], head: &Record) {
        let bytes = record.len() as u64;
        let place = self.end.fetch_add(bytes, Ordering::Relaxed);
        if place + bytes > self.limit || self.file.write_at(record, place).is_err() {
            return self.give_up();
        }
        // Bytes that wait for the disk count as memory.
        if self.unsynced.fetch_add(bytes, Ordering::Relaxed) + bytes >= WRITE_BEHIND_BYTES {
            self.unsynced.store(0, Ordering::Relaxed);
            if self.file.sync().is_err() {
                return self.give_up();
            }
            self.file.release(0, place);
        }
        if head.bound != WHOLE {
            self.bounds[head.checkpoint as usize].fetch_max(head.bound, Ordering::Relaxed);
        }
        self.places[head.checkpoint as usize][head.number as usize].store(place, Ordering::Relaxed);
    }

    fn give_up(&self) {
        if !self.full.swap(true, Ordering::Relaxed) && !self.told.swap(true, Ordering::Relaxed) {
            self.observer.warn(
                "the disk has no room for all that is downloaded and needed again: the rest is downloaded twice \
                 (--spool DIR keeps it elsewhere)",
            );
        }
    }

    /// Fills `out` with `chunk` of `piece`; false if something of it is not there, or damaged. `base` shows base.
    pub(super) fn get(
        &self,
        chunk: Chunk,
        piece: Piece,
        base: Option<&[u8]>,
        packer: &mut Packer,
        out: &mut [u8],
    ) -> bool {
        let reader = self.reader.read().unwrap_or_else(PoisonError::into_inner);
        let Some(reader) = reader.as_deref() else { return false };
        let width = self.plan.float_width(piece) as usize;
        self.records(chunk, piece).all(|(place, (start, end))| {
            // What is asked for of it, in elements of the chunk.
            let from = start.max(chunk.start) - chunk.start;
            let to = end.min(chunk.start + chunk.count) - chunk.start;
            let part = from as usize * width..to as usize * width;
            let Packer { decoder, whole, .. } = packer;
            let Some(head) = read(reader, place, decoder) else { return false };
            let elements = (end - start) as usize;
            let delta = head.bound != WHOLE;
            if head.checkpoint != piece.checkpoint || head.elements as usize != elements || delta && base.is_none() {
                return false;
            }
            let (out, base) = (&mut out[part.clone()], base.filter(|_| delta).map(|base| &base[part]));
            if out.len() == elements * width {
                base.inspect(|base| out.copy_from_slice(base));
                return decoder.apply(head.stored as usize, width, delta, out);
            }
            whole.clear();
            whole.resize(elements * width, 0);
            let skipped = (chunk.start + from - start) as usize * width;
            let asked = skipped..skipped + out.len();
            base.inspect(|base| whole[asked.clone()].copy_from_slice(base));
            let sound = decoder.apply(head.stored as usize, width, delta, whole);
            out.copy_from_slice(&whole[asked]);
            sound
        })
    }

    /// Removes it, unless it is of use to a run that goes on after `done`.
    pub(super) fn forget<T>(spool: Option<Self>, done: Result<T>) -> Result<T> {
        if let Some(spool) = spool.filter(|_| !done.as_ref().is_err_and(can_be_resumed)) {
            spool.remove();
        }
        done
    }

    /// Removes it.
    pub(super) fn remove(self) {
        let Self { storage, path, file, reader, .. } = self;
        drop((file, reader));
        // Best effort: it is of no use any more.
        let _ = storage.remove_file(&path);
    }
}

impl<'a> Passes<'a> {
    /// What was kept must do for the thresholds that were found.
    pub(super) fn keep_for(&self, found: &[Option<Threshold>]) -> Result<()> {
        self.spool.map_or(Ok(()), |spool| spool.demand(&least_of(found, self.plan.models())))
    }

    /// What is kept must do for what is sought and for what was found.
    pub(super) fn demand_least(&mut self, selectors: &[Option<Selector>]) -> Result<()> {
        let models = self.plan.models();
        let own = |model| selectors.iter().skip(model).step_by(models).flatten().map(Selector::least).min();
        let floor = |model: usize| self.floors.get(model).copied().flatten().unwrap_or(u32::MAX);
        self.least = (0..models).map(|model| own(model).map(|own: u32| own.min(floor(model)))).collect();
        self.spool.map_or(Ok(()), |spool| spool.demand(&self.least))
    }

    /// Lets a search that an earlier attempt began go on with what that kept.
    pub(super) fn not_below_what_is_kept(&self, selectors: Vec<Option<Selector>>) -> Vec<Option<Selector>> {
        let Some(spool) = self.spool else { return selectors };
        let bounds = spool.bounds_of_models();
        let over = |(selector, bound): (Option<Selector>, &Option<u32>)| selector.map(|s| s.over_what_is_kept(*bound));
        selectors.into_iter().zip(bounds.iter().cycle()).map(over).collect()
    }

    /// All of the unit was looked at: what was kept of it is there for the next look.
    pub(super) fn looked_at_all(&mut self) -> Result<()> {
        self.looked = true;
        self.spool.map_or(Ok(()), Spool::refresh)
    }

    /// Keeps what matters of each chunk that a look has loaded; `models` are those that it looks at.
    pub(super) fn keeper(&self, models: &[bool]) -> impl Fn(&mut Worker, Loaded<'_>) -> Result<()> + Sync + use<'a> {
        let spool = self.spool;
        let least = |model: usize| self.least.get(model).copied().flatten();
        let keep = |(model, &loaded): (usize, &bool)| match spool {
            Some(spool) if loaded && !spool.has_bounds() => Keep::All,
            _ => Keep::of(least(model), loaded),
        };
        let keep: Vec<Keep> = (0..).zip(models).map(keep).collect();
        move |worker, data| spool.map_or(Ok(()), |spool| spool.put(worker, data, &keep))
    }
}

impl Worker {
    /// Loads `pieces` of `chunk` into the worker's own windows, what `from` has of them from there, and runs `work` on them.
    pub(super) fn load_kept(
        &mut self,
        from: Use<'_>,
        chunk: Chunk,
        pieces: impl Iterator<Item = Piece>,
        work: impl FnOnce(&mut Self, Loaded<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut slot = std::mem::take(&mut self.slot);
        let loaded = self.load_kept_into(&mut slot, from, chunk, pieces);
        let result = loaded.and_then(|()| work(self, Loaded { plan: from.spool.plan, chunk, slot: &slot }));
        self.slot = slot;
        result
    }

    /// Loads them into `slot`.
    pub(super) fn load_kept_into(
        &mut self,
        slot: &mut Slot,
        from: Use<'_>,
        chunk: Chunk,
        pieces: impl Iterator<Item = Piece>,
    ) -> Result<()> {
        let Spool { plan, observer, .. } = from.spool;
        observer.go_on()?;
        self.begin();
        let mut packer = match self.packer.take() {
            Some(packer) => packer,
            None => from.spool.packer()?,
        };
        let loaded = slot.load_kept(plan, chunk, pieces, (from.spool, &mut packer), self.reads.as_deref());
        self.packer = Some(packer);
        let [read, kept] = loaded?;
        self.tally.bytes_read += if from.counts { read + kept } else { read };
        observer.advance(read + kept);
        Ok(())
    }
}

/// Per model, the least key that matters where thresholds are `found`.
pub(super) fn least_of(found: &[Option<Threshold>], models: usize) -> Vec<Option<u32>> {
    let own = |model| found.iter().skip(model).step_by(models).flatten().map(|found| found.ties.low).min();
    (0..models).map(own).collect()
}

/// The length of chunks in the spool `left`, if it is one of what `begin` is the hash of.
fn chunk_elements_of(left: &dyn InputFile, begin: &[u8; 32]) -> Option<u64> {
    let mut head = [0; HEAD_BYTES];
    if left.identity().bytes < HEAD_BYTES as u64 || left.read_at(&mut head, 0).is_err() {
        return None;
    }
    let number = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("8 bytes"));
    let fits = head[..8] == MAGIC && number(8) == VERSION && head[24..] == begin[..];
    let length = number(16);
    (fits && (1..=MOST_ELEMENTS).contains(&length)).then_some(length)
}

/// The head of the record at `place`, if there is one and the file goes on to its end.
fn record_at(file: &dyn InputFile, place: u64) -> Option<Record> {
    let mut head = [0; RECORD_HEAD];
    let behind = place.checked_add(RECORD_HEAD as u64)?;
    if behind > file.identity().bytes || file.read_at(&mut head, place).is_err() {
        return None;
    }
    let head = Record::decode(&head)?;
    (behind.checked_add(u64::from(head.length))? <= file.identity().bytes).then_some(head)
}

/// Reads the record at `place` for `decoder`.
fn read(file: &dyn InputFile, place: u64, decoder: &mut Decoder) -> Option<Record> {
    let head = record_at(file, place).filter(|_| place > 0)?;
    decoder.compressed.resize(head.length as usize, 0);
    file.read_at(&mut decoder.compressed, place + RECORD_HEAD as u64).ok()?;
    (checksum(&decoder.compressed) == head.check).then_some(head)
}

/// Marks the elements of `piece` whose task vector has a key of at least `bound`, or is not finite.
fn mark_from(worker: &mut Worker, data: Loaded<'_>, piece: Piece, bound: u32, mask: &mut Vec<u64>) {
    for span in data.tiles() {
        worker.load_base(span);
        let (isa, tiles) = (worker.isa, &mut worker.tiles);
        let tau = &mut tiles.scratch[..span.length];
        subtract(isa, span, piece, &tiles.base, tau);
        let word =
            |tau: &[f32]| tau.iter().rev().fold(0, |word, &tau| word << 1 | u64::from(kernels::key(tau) >= bound));
        mask.extend(tau.chunks(64).map(word));
    }
}
