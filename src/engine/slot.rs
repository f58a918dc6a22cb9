//! What is loaded of one chunk: windows on the inputs, and views of their tiles.
//!
//! Knows where elements lie in files and windows; computes nothing.

use std::ops::Range;

use super::reads::Reads;
use super::spool::{Packer, Spool};
use crate::dtype::Float;
use crate::error::Result;
use crate::kernels::{self, Isa};
use crate::limits::TILE_ELEMENTS;
use crate::plan::{Action, Chunk, Piece, Plan, Wanted, changing_place};
use crate::storage::{InputFile, Window};

/// More than a core's share of the caches.
const DISTANT_BYTES: u64 = 6 << 20;

/// Windows on one chunk of every checkpoint.
#[derive(Default)]
pub(super) struct Slot {
    windows: Vec<Window>,
    /// Per checkpoint of the plan at hand, its window; empty where they are numbered alike.
    places: Vec<u32>,
    /// What is loaded is too much for the caches: tiles are asked for ahead of their use.
    distant: bool,
}

impl Slot {
    /// Windows that hold `elements` elements of each checkpoint's widest type.
    pub(super) fn new(widths: &[u64], elements: u64) -> Self {
        let windows = widths.iter().map(|&w| Window::with_capacity((w * elements) as usize)).collect();
        Self { windows, places: Vec::new(), distant: false }
    }

    /// Windows that hold exactly `chunk`.
    pub(super) fn for_chunk(plan: &Plan, chunk: Chunk) -> Self {
        let mut bytes = vec![0; plan.checkpoints.len()];
        for piece in plan.pieces(chunk.tensor, Wanted::All) {
            bytes[piece.checkpoint as usize] = locate(plan, chunk, piece).2;
        }
        let windows = bytes.into_iter().map(|b| Window::with_capacity(b as usize)).collect();
        Self { windows, places: Vec::new(), distant: false }
    }

    /// Loads `pieces` of `chunk`, and tells `reads` where that is asked for; returns the bytes loaded.
    pub(super) fn load(
        &mut self,
        plan: &Plan,
        chunk: Chunk,
        pieces: impl Iterator<Item = Piece>,
        reads: Option<&Reads>,
    ) -> Result<u64> {
        let mut total = 0;
        for piece in pieces {
            let (file, offset, bytes) = locate(plan, chunk, piece);
            let window = &mut self.windows[piece.checkpoint as usize];
            file.load(window, offset, bytes as usize)
                .map_err(|e| e.tensor(&plan.tensors[chunk.tensor as usize].name))?;
            if let Some(reads) = reads {
                reads.add(plan, piece, offset, window.bytes());
            }
            total += bytes;
        }
        self.distant = total > DISTANT_BYTES;
        Ok(total)
    }

    /// Loads `pieces` of `chunk`, those that `spool` has from there; returns the bytes read, and those that were kept.
    pub(super) fn load_kept(
        &mut self,
        plan: &Plan,
        chunk: Chunk,
        pieces: impl Iterator<Item = Piece>,
        (spool, packer): (&Spool<'_>, &mut Packer),
        reads: Option<&Reads>,
    ) -> Result<[u64; 2]> {
        let mut bytes = [0; 2];
        let base_of = |piece: &Piece| match &plan.tensors[chunk.tensor as usize].action {
            Action::Merge { base, .. } => base.filter(|base| base != piece),
            Action::Copy { .. } => None,
        };
        let mut first = None;
        for piece in pieces {
            let (at, mut kept) = (piece.checkpoint as usize, false);
            // Base comes first, if it comes.
            let first = *first.get_or_insert(piece);
            if spool.holds(chunk, piece) {
                let mut window = std::mem::take(&mut self.windows[at]);
                let base = base_of(&piece).filter(|&base| base == first).map(|base| self.bytes(base));
                let length = locate(plan, chunk, piece).2;
                let filled = window.fill(length as usize, |out| {
                    kept = spool.get(chunk, piece, base, packer, out);
                    Ok(())
                });
                self.windows[at] = window;
                filled?;
                bytes[1] += if kept { length } else { 0 };
            }
            if !kept {
                bytes[0] += self.load(plan, chunk, std::iter::once(piece), reads)?;
            }
        }
        self.distant = bytes.iter().sum::<u64>() > DISTANT_BYTES;
        Ok(bytes)
    }

    /// Makes window `index` show `length` bytes of `file` from `offset`.
    pub(super) fn show(&mut self, index: usize, file: &dyn InputFile, offset: u64, length: usize) -> Result<()> {
        file.load(&mut self.windows[index], offset, length)
    }

    pub(super) fn bytes(&self, piece: Piece) -> &[u8] {
        let checkpoint = piece.checkpoint as usize;
        self.windows[self.places.get(checkpoint).map_or(checkpoint, |&place| place as usize)].bytes()
    }

    /// Numbers the windows as a plan does whose checkpoints are in `places`.
    pub(super) fn renumber(&mut self, places: &[u32]) {
        self.places.clear();
        self.places.extend_from_slice(places);
    }

    /// The bytes of elements `[from, from + length)` of the chunk in `piece`.
    fn tile(&self, float: Float, piece: Piece, from: usize, length: usize) -> &[u8] {
        &self.bytes(piece)[from * float.width()..(from + length) * float.width()]
    }
}

/// Where `chunk` of `piece` lies: file, offset and length in bytes.
pub(super) fn locate(plan: &Plan, chunk: Chunk, piece: Piece) -> (&dyn InputFile, u64, u64) {
    let (entry, file) = plan.source(piece);
    let width = if plan.is_raw_copy(chunk.tensor) { 1 } else { plan.float_width(piece) };
    (file, entry.offset + chunk.start * width, chunk.count * width)
}

/// The merge of a chunk's tensor.
pub(super) struct Merge<'a> {
    pub base: Option<Piece>,
    pub models: &'a [(u32, Piece)],
    pub oracle: Option<Piece>,
    /// What each model has besides; empty where that is nothing.
    pub statistics: &'a [Piece],
}

/// A chunk of a merged tensor and the windows that show it.
#[derive(Clone, Copy)]
pub(super) struct Loaded<'a> {
    pub plan: &'a Plan,
    pub chunk: Chunk,
    pub slot: &'a Slot,
}

impl<'a> Loaded<'a> {
    /// What is merged.
    pub(super) fn merge(&self) -> Merge<'a> {
        match &self.plan.tensors[self.chunk.tensor as usize].action {
            Action::Merge { base, models, oracle, statistics } => {
                Merge { base: *base, models, oracle: *oracle, statistics }
            }
            Action::Copy { .. } => unreachable!("copied tensors are not merged"),
        }
    }

    /// The stored type of `piece`.
    pub(super) fn float(&self, piece: Piece) -> Float {
        Float::from_dtype(self.plan.source(piece).0.dtype).expect("the plan merges floats only")
    }

    /// Elements of a tile.
    pub(super) fn tile(&self) -> usize {
        self.plan.tile(self.chunk.tensor)
    }

    /// Elements of a row, for [`Tile::row`](crate::method::Tile::row).
    pub(super) fn row(&self) -> usize {
        if self.plan.needs().rows { self.plan.row(self.chunk.tensor) as usize } else { self.tile() }
    }

    /// The tiles of the chunk.
    pub(super) fn tiles(self) -> impl Iterator<Item = Span<'a>> {
        self.tiles_of(0..self.chunk.count as usize)
    }

    /// The tiles of a range of the chunk.
    pub(super) fn tiles_of(self, range: Range<usize>) -> impl Iterator<Item = Span<'a>> {
        let (end, tile) = (range.end, self.tile());
        range.step_by(tile).map(move |from| Span { data: self, from, length: tile.min(end - from) })
    }

    /// The output's type.
    pub(super) fn output(&self) -> Float {
        let dtype = self.plan.tensors[self.chunk.tensor as usize].dtype;
        Float::from_dtype(dtype).expect("merged tensors are floats")
    }

    /// Name of the tensor.
    pub(super) fn name(&self) -> &'a str {
        &self.plan.tensors[self.chunk.tensor as usize].name
    }
}

/// One tile of a chunk: elements from element `from` of the chunk on.
#[derive(Clone, Copy)]
pub(super) struct Span<'a> {
    pub data: Loaded<'a>,
    pub from: usize,
    pub length: usize,
}

impl<'a> Span<'a> {
    /// The stored type and the bytes of the tile in `piece`.
    pub(super) fn stored(&self, piece: Piece) -> (Float, &'a [u8]) {
        let float = self.data.float(piece);
        (float, self.data.slot.tile(float, piece, self.from, self.length))
    }

    /// Leaves a block of the tile, another one each time: what repeats in the data (rows, heads) is met in all of its phases.
    pub(super) fn shorten(&mut self, block: usize, time: usize) {
        let places = (self.length / block).max(1) as u64;
        self.from += changing_place(time as u64, places) as usize * block;
        self.length = self.length.min(block);
    }

    /// Asks for a share of the next tile of base and models, where what is loaded is too much for the caches: one of
    /// `shares`, between two steps of the work on this tile. All at once would be more requests than a core has room for.
    pub(super) fn ask_ahead(&self, share: usize, shares: usize) {
        if !self.data.slot.distant {
            return;
        }
        let merge = self.data.merge();
        for piece in merge.base.into_iter().chain(merge.models.iter().map(|&(_, piece)| piece)) {
            let width = self.data.float(piece).width();
            let (next, bytes) = ((self.from + self.length) * width, TILE_ELEMENTS * width);
            let range = next + bytes * share / shares..next + bytes * (share + 1) / shares;
            kernels::prefetch(self.data.slot.bytes(piece).get(range).unwrap_or_default());
        }
    }

    /// The `index`-th value of the tile in `piece`, exactly.
    pub(super) fn value(&self, piece: Piece, index: usize) -> f64 {
        let (float, bytes) = self.stored(piece);
        let bytes = &bytes[index * float.width()..(index + 1) * float.width()];
        if let (Float::F64, Ok(bytes)) = (float, bytes.try_into()) {
            return f64::from_le_bytes(bytes);
        }
        let mut value = [0.0];
        kernels::load(Isa::baseline(), float, bytes, &mut value);
        f64::from(value[0])
    }

    /// Index in the tensor of the `index`-th element of the tile.
    pub(super) fn element(&self, index: usize) -> u64 {
        self.data.chunk.start + (self.from + index) as u64
    }
}
