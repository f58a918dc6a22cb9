//! Tensors that an adapter changes, computed where they are read.
//!
//! - A view shows W + s B A, or W with its rows or columns scaled, as a stored tensor of float32 (of float64 where W is):
//!   nothing is rounded to W's type before the merge, and ΔW exists block by block only.
//! - An entry of B A is summed up in f32 over k = 0, 1, ..., r − 1, products and sums rounded separately: the same bits
//!   whichever range is read.
//! - W is read in long runs. Factors of the modules that are being read are kept in f32 ([`Kept`]), if they are not large.
//! - Beside that, a read takes at most [`ADAPTER_SCRATCH_BYTES`](crate::limits::ADAPTER_SCRATCH_BYTES) and its result,
//!   whatever the rank and the shape.
//!
//! Knows offsets and numbers, not names.

use std::collections::VecDeque;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::config::CONFIG;
use crate::checkpoint::rows::{Part, read_elements};
use crate::dtype::Float;
use crate::error::{Result, printable};
use crate::kernels::{self, Isa};
use crate::limits::{ADAPTER_SCRATCH_BYTES, FACTORS_BYTES, KEPT_FACTORS_BYTES};
use crate::storage::{Identity, InputFile, stored_ranges};

/// Rows of a block, bytes of W that are read at once for it, and columns and ranks that are computed at once.
const BLOCK_ROWS: u64 = 128;
const BLOCK_BYTES: u64 = 1 << 18;
const BLOCK_COLUMNS: u64 = 512;
const BLOCK_RANKS: u64 = 64;
/// Bytes of a factor read at once.
const READ_BYTES: u64 = 1 << 16;

const _: () = {
    // The change of a block, and of each factor a block and a run as stored and converted.
    let change = 4 * (BLOCK_BYTES / 4);
    let factors = 4 * BLOCK_RANKS * (BLOCK_ROWS + BLOCK_COLUMNS) + 3 * READ_BYTES;
    assert!(BLOCK_BYTES + change + factors + 8 * BLOCK_COLUMNS <= ADAPTER_SCRATCH_BYTES);
    // The widest elements of the longest run that is read.
    assert!(8 * BLOCK_COLUMNS <= READ_BYTES);
};

/// Both factors of a module, each as [rank, length].
struct Pair {
    left: Vec<f32>,
    right: Vec<f32>,
}

/// Factors of the modules that were read last, for all views of one adapter.
#[derive(Default)]
pub(super) struct Kept(Mutex<KeptPairs>);

#[derive(Default)]
struct KeptPairs {
    /// Number of the view, its factors; the oldest first.
    pairs: VecDeque<(u32, Arc<Pair>)>,
    /// Views that take part; bytes of all their factors, and of the largest.
    views: u32,
    bytes: u64,
    largest: u64,
}

impl Kept {
    fn lock(&self) -> std::sync::MutexGuard<'_, KeptPairs> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number for a view whose factors have so many bytes in f32; none if that is too much to be kept.
    fn admit(&self, bytes: u64) -> Option<u32> {
        let mut kept = self.lock();
        (bytes <= FACTORS_BYTES).then(|| {
            kept.views += 1;
            kept.bytes += bytes;
            kept.largest = kept.largest.max(bytes);
            kept.views
        })
    }

    /// Memory that it holds between reads, and that a read may hold besides, in bytes.
    pub(super) fn held_bytes(&self) -> (u64, u64) {
        let kept = self.lock();
        (kept.bytes.min(KEPT_FACTORS_BYTES), kept.largest)
    }

    /// The factors of view `number`, which `read` reads if they are not there.
    fn get(&self, number: u32, read: impl FnOnce() -> Result<Pair>) -> Result<Arc<Pair>> {
        let find =
            |kept: &KeptPairs| kept.pairs.iter().find(|(own, _)| *own == number).map(|(_, pair)| Arc::clone(pair));
        if let Some(pair) = find(&self.lock()) {
            return Ok(pair);
        }
        let pair = Arc::new(read()?);
        let bytes = |pair: &Pair| 4 * (pair.left.len() + pair.right.len()) as u64;
        let mut kept = self.lock();
        if find(&kept).is_none() {
            let mut sum = bytes(&pair) + kept.pairs.iter().map(|(_, pair)| bytes(pair)).sum::<u64>();
            while sum > KEPT_FACTORS_BYTES
                && let Some((_, oldest)) = kept.pairs.pop_front()
            {
                sum -= bytes(&oldest);
            }
            kept.pairs.push_back((number, Arc::clone(&pair)));
        }
        Ok(pair)
    }
}

/// A factor of ΔW: its matrix has `rank` × `length` entries, whichever of them is stored contiguously.
pub(super) struct Factor {
    pub part: Part,
    pub rank: u64,
    pub length: u64,
    /// Stored as [rank, length], and not as [length, rank].
    pub rank_first: bool,
}

impl Factor {
    /// Entries `ks` × `xs` into `out`, those of one k after those of the one before.
    fn block(&self, isa: Isa, ks: Range<u64>, xs: Range<u64>, out: &mut [f32]) -> Result<()> {
        let (outer, inner, inner_length) = match self.rank_first {
            true => (ks.clone(), xs.clone(), self.length),
            false => (xs.clone(), ks.clone(), self.rank),
        };
        let (float, width) = (self.part.float, self.part.float.width() as u64);
        let run = inner.end - inner.start;
        // Whole lines follow each other without gaps, so several can be read at once.
        let together = if run == inner_length { (READ_BYTES / (width * run).max(1)).max(1) } else { 1 };
        let mut bytes = vec![0; (together * run * width) as usize];
        let mut values = vec![0f32; (together * run) as usize];
        let line = (xs.end - xs.start) as usize;
        let mut at = outer.start;
        while at < outer.end {
            let count = together.min(outer.end - at);
            let bytes = &mut bytes[..(count * run * width) as usize];
            let values = &mut values[..(count * run) as usize];
            self.part.file.read_at(bytes, self.part.offset + (at * inner_length + inner.start) * width)?;
            kernels::load(isa, float, bytes, values);
            for (i, values) in values.chunks_exact(run as usize).enumerate() {
                let place = (at - outer.start) as usize + i;
                match self.rank_first {
                    true => out[place * line..(place + 1) * line].copy_from_slice(values),
                    false => values.iter().enumerate().for_each(|(k, &value)| out[k * line + place] = value),
                }
            }
            at += count;
        }
        Ok(())
    }
}

/// What is done to W.
pub(super) enum Change {
    /// W + s L R, L having a row per row of W and R a column per column.
    Add { left: Factor, right: Factor, scale: f32 },
    /// Each row of W times its entry.
    ScaleRows(Part),
    /// Each column of W times its entry.
    ScaleColumns(Part),
    /// W times a number.
    Scale(f32),
}

/// See the module's documentation.
pub(super) struct Adapted {
    /// W; zeros where there is none.
    weight: Option<Part>,
    rows: u64,
    columns: u64,
    change: Change,
    float: Float,
    isa: Isa,
    /// Where the factors are kept, and under which number.
    kept: Option<(Arc<Kept>, u32)>,
}

/// A rectangle of a matrix.
struct Block {
    rows: Range<u64>,
    columns: Range<u64>,
}

impl Block {
    fn width(&self) -> usize {
        (self.columns.end - self.columns.start) as usize
    }

    fn height(&self) -> usize {
        (self.rows.end - self.rows.start) as usize
    }
}

impl Adapted {
    pub(super) fn new(weight: Option<Part>, (rows, columns): (u64, u64), change: Change) -> Self {
        let float = match weight.as_ref().map(|part| part.float) {
            Some(Float::F64) => Float::F64,
            _ => Float::F32,
        };
        Self { weight, rows, columns, change, float, isa: Isa::detect(), kept: None }
    }

    /// The same with its factors kept while they are read, if they are not too large.
    pub(super) fn keeping(mut self, kept: &Arc<Kept>) -> Self {
        if let Change::Add { left, right, .. } = &self.change {
            let number = kept.admit(4 * left.rank.saturating_mul(left.length.saturating_add(right.length)));
            self.kept = number.map(|number| (Arc::clone(kept), number));
        }
        self
    }

    /// The type that it is shown as.
    pub(super) fn float(&self) -> Float {
        self.float
    }

    /// What tells this from other views of the same files.
    pub(super) fn hash(&self) -> [u8; 32] {
        let factor =
            |f: &Factor| format!("{} {} {} {} {:?}", f.part.offset, f.rank, f.length, f.rank_first, f.part.float);
        let vector = |part: &Part| format!("{} {:?}", part.offset, part.float);
        let change = match &self.change {
            Change::Add { left, right, scale } => {
                format!("add {} {} {:08x}", factor(left), factor(right), scale.to_bits())
            }
            Change::ScaleRows(part) => format!("rows {}", vector(part)),
            Change::ScaleColumns(part) => format!("columns {}", vector(part)),
            Change::Scale(factor) => format!("scale {:08x}", factor.to_bits()),
        };
        let weight = self.weight.as_ref().map(vector);
        *blake3::hash(format!("{} {} {weight:?} {change}", self.rows, self.columns).as_bytes()).as_bytes()
    }

    /// The file that stands for this where only one can: W's, or the adapter's.
    fn file(&self) -> &dyn InputFile {
        &*self.weight.as_ref().or(self.own()).expect("a view changes something").file
    }

    /// A part of what the adapter stores of it, if that is more than a number.
    fn own(&self) -> Option<&Part> {
        match &self.change {
            Change::Add { left, .. } => Some(&left.part),
            Change::ScaleRows(part) | Change::ScaleColumns(part) => Some(part),
            Change::Scale(_) => None,
        }
    }

    /// Fills `out` with the elements from `first` on.
    fn elements(&self, mut first: u64, mut out: &mut [u8]) -> Result<()> {
        let (width, stored) = (self.float.width(), self.weight.as_ref().map_or(1, |part| part.float.width()));
        let most = BLOCK_BYTES / (stored as u64).max(4);
        let pair = match (&self.kept, &self.change) {
            (Some((kept, number)), Change::Add { left, right, .. }) => {
                Some(kept.get(*number, || self.factors(left, right))?)
            }
            _ => None,
        };
        let mut change = Vec::new();
        while !out.is_empty() {
            let (row, column) = (first / self.columns, first % self.columns);
            let left = ((out.len() / width) as u64).min(most);
            // Whole rows as far as there are, else a part of one.
            let block = match column == 0 && left >= self.columns {
                true => Block { rows: row..row + (left / self.columns).min(BLOCK_ROWS), columns: 0..self.columns },
                false => Block { rows: row..row + 1, columns: column..column + left.min(self.columns - column) },
            };
            let count = block.height() * block.width();
            let (part, rest) = out.split_at_mut(count * width);
            change.clear();
            change.resize(count, 0f32);
            self.change(&block, pair.as_deref(), &mut change)?;
            self.combine(first, &mut change, part)?;
            out = rest;
            first += count as u64;
        }
        Ok(())
    }

    /// Both factors, whole.
    fn factors(&self, left: &Factor, right: &Factor) -> Result<Pair> {
        let whole = |factor: &Factor| {
            let mut values = vec![0f32; (factor.rank * factor.length) as usize];
            factor.block(self.isa, 0..factor.rank, 0..factor.length, &mut values)?;
            Ok(values)
        };
        Ok(Pair { left: whole(left)?, right: whole(right)? })
    }

    /// Writes W with `change` made to it, from element `first` on.
    fn combine(&self, first: u64, change: &mut [f32], out: &mut [u8]) -> Result<()> {
        let adds = matches!(self.change, Change::Add { .. });
        if let Some(part) = &self.weight {
            let width = part.float.width();
            let mut stored = vec![0; change.len() * width];
            part.file.read_at(&mut stored, part.offset + first * width as u64)?;
            if part.float == Float::F64 {
                self.combine_f64(&stored, change, out);
                return Ok(());
            }
            let mut weight = [0f32; BLOCK_COLUMNS as usize];
            for (change, stored) in change.chunks_mut(weight.len()).zip(stored.chunks(weight.len() * width)) {
                let weight = &mut weight[..change.len()];
                kernels::load(self.isa, part.float, stored, weight);
                match adds {
                    true => kernels::add(self.isa, change, weight),
                    false => change.iter_mut().zip(weight).for_each(|(change, weight)| *change *= *weight),
                }
            }
        }
        kernels::store(self.isa, self.float, change, out, false);
        Ok(())
    }

    fn combine_f64(&self, stored: &[u8], change: &[f32], out: &mut [u8]) {
        let adds = matches!(self.change, Change::Add { .. });
        let values = stored.as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes));
        for ((weight, &change), out) in values.zip(change).zip(out.as_chunks_mut::<8>().0) {
            let change = f64::from(change);
            *out = if adds { weight + change } else { weight * change }.to_le_bytes();
        }
    }

    /// ΔW, or the factors of W, in `block`.
    fn change(&self, block: &Block, pair: Option<&Pair>, out: &mut [f32]) -> Result<()> {
        let whole = block.width();
        for start in block.columns.clone().step_by(BLOCK_COLUMNS as usize) {
            let columns = start..(start + BLOCK_COLUMNS).min(block.columns.end);
            let (at, width) = ((start - block.columns.start) as usize, (columns.end - start) as usize);
            let mut lines: Vec<&mut [f32]> =
                out.chunks_exact_mut(whole).map(|line| &mut line[at..at + width]).collect();
            match &self.change {
                Change::Add { left, right, scale } => {
                    let part = Block { rows: block.rows.clone(), columns };
                    match pair {
                        Some(pair) => self.kept_product(&part, (left, right), pair, &mut lines),
                        None => self.product(&part, left, right, &mut lines)?,
                    }
                    lines.iter_mut().for_each(|line| kernels::scale(self.isa, line, *scale));
                }
                Change::ScaleRows(part) => {
                    let mut rows = vec![0f32; block.height()];
                    self.entries(part, block.rows.start, &mut rows)?;
                    lines.iter_mut().zip(rows).for_each(|(line, factor)| line.fill(factor));
                }
                Change::ScaleColumns(part) => {
                    let mut factors = vec![0f32; width];
                    self.entries(part, start, &mut factors)?;
                    lines.iter_mut().for_each(|line| line.copy_from_slice(&factors));
                }
                Change::Scale(factor) => lines.iter_mut().for_each(|line| line.fill(*factor)),
            }
        }
        Ok(())
    }

    /// L R in `block`, whose lines hold zeros, of factors that are in memory.
    fn kept_product(&self, block: &Block, (left, right): (&Factor, &Factor), pair: &Pair, lines: &mut [&mut [f32]]) {
        let columns = block.columns.start as usize..block.columns.end as usize;
        for (row, line) in (block.rows.start..).zip(lines) {
            for k in 0..left.rank {
                let factor = pair.left[(k * left.length + row) as usize];
                let start = (k * right.length) as usize;
                kernels::add_scaled(self.isa, line, factor, &pair.right[start + columns.start..start + columns.end]);
            }
        }
    }

    /// L R in `block`, whose lines hold zeros, of factors that are read for it.
    fn product(&self, block: &Block, left: &Factor, right: &Factor, lines: &mut [&mut [f32]]) -> Result<()> {
        let (height, width) = (block.height(), block.width());
        let ranks = left.rank.min(BLOCK_RANKS) as usize;
        let (mut lefts, mut rights) = (vec![0f32; ranks * height], vec![0f32; ranks * width]);
        for start in (0..left.rank).step_by(BLOCK_RANKS as usize) {
            let ks = start..(start + BLOCK_RANKS).min(left.rank);
            left.block(self.isa, ks.clone(), block.rows.clone(), &mut lefts)?;
            right.block(self.isa, ks.clone(), block.columns.clone(), &mut rights)?;
            for (i, line) in lines.iter_mut().enumerate() {
                for (k, right) in rights.chunks_exact(width).take((ks.end - ks.start) as usize).enumerate() {
                    kernels::add_scaled(self.isa, line, lefts[k * height + i], right);
                }
            }
        }
        Ok(())
    }

    /// The entries of a vector from `first` on.
    fn entries(&self, part: &Part, first: u64, out: &mut [f32]) -> Result<()> {
        let width = part.float.width();
        let mut bytes = vec![0; out.len() * width];
        part.file.read_at(&mut bytes, part.offset + first * width as u64)?;
        kernels::load(self.isa, part.float, &bytes, out);
        Ok(())
    }
}

impl InputFile for Adapted {
    fn path(&self) -> &Path {
        self.file().path()
    }

    /// The adapter's where W is finite.
    fn origin(&self, offset: u64) -> PathBuf {
        let mut entry = [0.0];
        let is_finite = |weight: &Part| {
            self.entries(weight, offset / self.float.width() as u64, &mut entry).is_ok() && entry[0].is_finite()
        };
        let own = self.own().filter(|_| self.weight.as_ref().is_none_or(is_finite));
        own.map_or(self.path(), |own| own.file.path()).to_path_buf()
    }

    fn described_by(&self) -> Option<String> {
        let weights = self.own().map_or(self.path(), |own| own.file.path());
        Some(printable(&weights.with_file_name(CONFIG).to_string_lossy()))
    }

    fn identity(&self) -> &Identity {
        self.file().identity()
    }

    fn identity_now(&self) -> Result<Identity> {
        self.file().identity_now()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        read_elements(buffer, offset, self.float.width(), |first, out| self.elements(first, out))
    }

    /// Beside W, factors are small, and kept from pass to pass if they are.
    fn made_of(&self, offset: u64, length: u64, see: &mut dyn FnMut(&dyn InputFile, u64, u64)) -> bool {
        if let Some(Part { file, offset: start, float }) = &self.weight {
            let (shown, stored) = (self.float.width() as u64, float.width() as u64);
            stored_ranges(&**file, start + offset / shown * stored, length / shown * stored, see);
        }
        true
    }
}

/// A tensor all of whose entries are one number: a base of zeros or ones, which is stored nowhere.
pub(super) struct Constant {
    /// Stands for this where a file must be named.
    pub like: Arc<dyn InputFile>,
    pub value: f32,
}

impl InputFile for Constant {
    fn path(&self) -> &Path {
        self.like.path()
    }

    fn identity(&self) -> &Identity {
        self.like.identity()
    }

    fn identity_now(&self) -> Result<Identity> {
        self.like.identity_now()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let bytes = self.value.to_le_bytes();
        buffer.iter_mut().zip(offset..).for_each(|(byte, at)| *byte = bytes[(at % 4) as usize]);
        Ok(())
    }

    fn made_of(&self, _: u64, _: u64, _: &mut dyn FnMut(&dyn InputFile, u64, u64)) -> bool {
        true
    }
}
