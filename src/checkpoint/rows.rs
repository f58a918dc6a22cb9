//! A tensor whose rows are taken from rows of other tensors, seen as a file: nothing is permuted in memory.
//!
//! - A row is a row of one tensor, the mean of rows of several, the average of all rows before it, or zeros. Consecutive
//!   rows of one tensor are one run.
//! - The mean is taken in f32, in the order given, and rounded once to the type of the whole.
//! - The average is taken once, in f64 and in order, and kept.
//! - What is read are the rows asked for, and for a mean those that it is made of.
//!
//! Knows offsets, not what the rows stand for.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::TensorEntry;
use crate::dtype::Float;
use crate::error::Result;
use crate::kernels::{self, Isa};
use crate::storage::{Identity, InputFile, stored_ranges};

/// Elements that are converted at a time.
const BLOCK: usize = 1024;

/// A stored tensor that rows are taken from.
#[derive(Clone)]
pub struct Part {
    /// Its file.
    pub file: Arc<dyn InputFile>,
    /// Where it begins.
    pub offset: u64,
    /// Its type.
    pub float: Float,
}

/// Where a run of rows comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RowSource {
    /// Consecutive rows of a part: (part, first row).
    Rows(u32, u64),
    /// Every row is the mean of these: (part, row).
    Mean(Box<[(u32, u64)]>),
    /// Zeros.
    Zero,
    /// Every row is the average of all rows of the runs before this one, which is the last.
    Average,
}

/// Consecutive rows with one source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// The first of them.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// Where they come from.
    pub source: RowSource,
}

/// See the module's documentation. The first part gives the identity and the type.
pub struct Rows {
    parts: Vec<Part>,
    columns: u64,
    runs: Vec<Run>,
    isa: Isa,
    /// The average, once it was asked for.
    average: Mutex<Option<Arc<[f32]>>>,
}

impl Rows {
    /// `runs` follow each other without gaps from row 0 on; their rows exist.
    pub fn new(parts: Vec<Part>, columns: u64, runs: Vec<Run>) -> Self {
        debug_assert!(runs.windows(2).all(|pair| pair[0].first + pair[0].count == pair[1].first));
        Self { parts, columns, runs, isa: Isa::detect(), average: Mutex::new(None) }
    }

    /// Number of rows.
    pub fn rows(&self) -> u64 {
        self.runs.last().map_or(0, |run| run.first + run.count)
    }

    /// What tells this from other ways to take rows.
    pub fn hash(&self) -> [u8; 32] {
        *blake3::hash(format!("{} {:?}", self.columns, self.runs).as_bytes()).as_bytes()
    }

    /// Memory that it holds, in bytes.
    pub fn held_bytes(&self) -> u64 {
        let means = self.runs.iter().map(|run| match &run.source {
            RowSource::Mean(rows) => size_of_val(&**rows),
            _ => 0,
        });
        let average = match self.runs.last() {
            Some(Run { source: RowSource::Average, .. }) => self.columns * (size_of::<f32>() + size_of::<f64>()) as u64,
            _ => 0,
        };
        (self.runs.len() * size_of::<Run>() + means.sum::<usize>()) as u64 + average
    }

    /// The entry of the tensor that this shows in place of `entry`, in file number `file`.
    pub fn entry(&self, entry: &TensorEntry, file: u32) -> TensorEntry {
        let shape: Box<[u64]> = [self.rows(), self.columns].into();
        let bytes = self.rows() * self.columns * self.parts[0].float.width() as u64;
        TensorEntry { name: entry.name.clone(), dtype: entry.dtype, shape, file, offset: 0, bytes }
    }

    /// Fills `buffer` with the elements from `element` on.
    fn elements(&self, mut element: u64, mut buffer: &mut [u8]) -> Result<()> {
        let width = self.parts[0].float.width() as u64;
        while !buffer.is_empty() {
            let row = element / self.columns.max(1);
            let run = &self.runs[self.runs.partition_point(|run| run.first + run.count <= row)];
            let start = element - run.first * self.columns;
            let count = (run.count * self.columns - start).min(buffer.len() as u64 / width);
            let (part, rest) = buffer.split_at_mut((count * width) as usize);
            self.fill(run, start, part)?;
            buffer = rest;
            element += count;
        }
        Ok(())
    }

    /// Fills `buffer` with the elements from `start` on of a run's rows, counted from the run's first element.
    fn fill(&self, run: &Run, start: u64, buffer: &mut [u8]) -> Result<()> {
        let float = self.parts[0].float;
        match &run.source {
            RowSource::Zero => {
                buffer.fill(0);
                Ok(())
            }
            RowSource::Average => {
                let (columns, average) = (self.columns.max(1), self.average()?);
                self.blocks_within(buffer, start % columns, columns, |at, sum| {
                    sum.copy_from_slice(&average[at as usize..][..sum.len()]);
                    Ok(())
                })
            }
            RowSource::Rows(part, first) => {
                let part = &self.parts[*part as usize];
                let from = first * self.columns + start;
                if part.float == float {
                    return part.file.read_at(buffer, part.offset + from * float.width() as u64);
                }
                self.blocks(buffer, |at, sum| self.add(part, from + at, sum))
            }
            RowSource::Mean(rows) => {
                // A mean's run may have several equal rows: the element's place in its row is what counts.
                let columns = self.columns.max(1);
                let count = rows.len() as f32;
                self.blocks_within(buffer, start % columns, columns, |at, sum| {
                    for &(part, row) in &**rows {
                        self.add(&self.parts[part as usize], row * columns + at, sum)?;
                    }
                    sum.iter_mut().for_each(|value| *value /= count);
                    Ok(())
                })
            }
        }
    }

    /// The average of all rows but those of the last run.
    fn average(&self) -> Result<Arc<[f32]>> {
        let mut known = self.average.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(average) = &*known {
            return Ok(Arc::clone(average));
        }
        let (float, columns) = (self.parts[0].float, self.columns.max(1));
        let mut sums = vec![0f64; columns as usize];
        let runs = &self.runs[..self.runs.len() - 1];
        let (mut bytes, mut values) = (vec![0u8; BLOCK * float.width()], [0f32; BLOCK]);
        for run in runs {
            let elements = run.count * columns;
            for start in (0..elements).step_by(BLOCK) {
                let count = (elements - start).min(BLOCK as u64) as usize;
                let (bytes, values) = (&mut bytes[..count * float.width()], &mut values[..count]);
                self.fill(run, start, bytes)?;
                kernels::load(self.isa, float, bytes, values);
                for (at, value) in (start..).zip(values.iter()) {
                    sums[(at % columns) as usize] += f64::from(*value);
                }
            }
        }
        let rows = runs.last().map_or(0, |run| run.first + run.count).max(1) as f64;
        let average: Arc<[f32]> = sums.iter().map(|sum| (sum / rows) as f32).collect();
        *known = Some(Arc::clone(&average));
        Ok(average)
    }

    /// Adds the elements of `part` from `from` on to `sum`.
    fn add(&self, part: &Part, from: u64, sum: &mut [f32]) -> Result<()> {
        let width = part.float.width();
        let (mut bytes, mut values) = ([0u8; BLOCK * 8], [0f32; BLOCK]);
        let (bytes, values) = (&mut bytes[..sum.len() * width], &mut values[..sum.len()]);
        part.file.read_at(bytes, part.offset + from * width as u64)?;
        kernels::load(self.isa, part.float, bytes, values);
        sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += *value);
        Ok(())
    }

    /// Fills `buffer` block by block with what `make` puts into zeros, given the place of the block's first element.
    fn blocks(&self, buffer: &mut [u8], make: impl Fn(u64, &mut [f32]) -> Result<()>) -> Result<()> {
        self.blocks_within(buffer, 0, u64::MAX, make)
    }

    /// The same, for places that begin at `start` and return to 0 after each `period`.
    fn blocks_within(
        &self,
        mut buffer: &mut [u8],
        start: u64,
        period: u64,
        make: impl Fn(u64, &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        let float = self.parts[0].float;
        let mut at = start;
        while !buffer.is_empty() {
            let left = (buffer.len() / float.width()).min(BLOCK) as u64;
            let count = left.min(period - at) as usize;
            let mut values = [0f32; BLOCK];
            make(at, &mut values[..count])?;
            let (block, rest) = buffer.split_at_mut(count * float.width());
            kernels::store(self.isa, float, &values[..count], block, false);
            buffer = rest;
            at += count as u64;
            if at == period {
                at = 0;
            }
        }
        Ok(())
    }
}

/// Fills `buffer` with bytes from `offset` on of elements of `width` bytes, of which `fill` makes whole ones: where bytes
/// are copied as they are, a range may begin or end within an element.
pub(super) fn read_elements(
    buffer: &mut [u8],
    offset: u64,
    width: usize,
    mut fill: impl FnMut(u64, &mut [u8]) -> Result<()>,
) -> Result<()> {
    let (mut at, mut buffer) = (offset, buffer);
    while !buffer.is_empty() {
        let (element, within) = (at / width as u64, (at % width as u64) as usize);
        let whole = buffer.len() / width * width;
        let count = if within == 0 && whole > 0 { whole } else { buffer.len().min(width - within) };
        let (part, rest) = buffer.split_at_mut(count);
        if within == 0 && whole > 0 {
            fill(element, part)?;
        } else {
            let mut one = [0; 8];
            fill(element, &mut one[..width])?;
            part.copy_from_slice(&one[within..within + count]);
        }
        buffer = rest;
        at += count as u64;
    }
    Ok(())
}

impl InputFile for Rows {
    fn path(&self) -> &Path {
        self.parts[0].file.path()
    }

    fn described_by(&self) -> Option<String> {
        Some("the tokenizer.json of an input".into())
    }

    fn identity(&self) -> &Identity {
        self.parts[0].file.identity()
    }

    fn identity_now(&self) -> Result<Identity> {
        self.parts[0].file.identity_now()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        read_elements(buffer, offset, self.parts[0].float.width(), |element, buffer| self.elements(element, buffer))
    }

    /// What an average is taken of comes on top, once.
    fn made_of(&self, offset: u64, length: u64, see: &mut dyn FnMut(&dyn InputFile, u64, u64)) -> bool {
        let (columns, width) = (self.columns.max(1), self.parts[0].float.width() as u64);
        let rows = offset / width / columns..(offset + length).div_ceil(width * columns);
        let mut part = |part: u32, first: u64, count: u64| {
            let Part { file, offset, float } = &self.parts[part as usize];
            let row_bytes = self.columns * float.width() as u64;
            stored_ranges(&**file, offset + first * row_bytes, count * row_bytes, see);
        };
        for run in &self.runs[self.runs.partition_point(|run| run.first + run.count <= rows.start)..] {
            let (first, end) = (run.first.max(rows.start), (run.first + run.count).min(rows.end));
            match &run.source {
                _ if first >= end => break,
                RowSource::Rows(number, from) => part(*number, from + (first - run.first), end - first),
                RowSource::Mean(rows) => rows.iter().for_each(|&(number, row)| part(number, row, 1)),
                RowSource::Zero | RowSource::Average => {}
            }
        }
        true
    }
}
