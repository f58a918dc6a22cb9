//! The weights of one linear layer by RegMean (Jin et al. 2023, arXiv 2212.09849), computed where they are read.
//!
//! - W = (Σ_t W_t G̃_t) (Σ_t G̃_t)⁻¹ in f64, W_t being model t's weights [out, in] and G̃_t its Gram matrix [in, in] with all entries
//!   off the diagonal times α.
//! - Rows are independent: a row of Σ W_t G̃_t is summed up over t and k in order, then solved with the Cholesky factor of
//!   Σ G̃_t. So a row has the same bits whichever rows are read with it.
//! - If a pivot vanishes, ρ/n is added to every diagonal of the n Gram matrices: the result is drawn towards the average, which it is for inputs
//!   that no model has seen. ρ is the smallest of [`RIDGES`] times the mean diagonal that does; what was needed is a note.
//! - One layer's matrices are held at a time, for all threads; whoever needs another layer's waits until nobody reads this
//!   one.
//!
//! Knows files and offsets, not names.

use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::rows::{Part, read_elements};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::kernels::{self, Isa, PANEL};
use crate::storage::{Identity, InputFile, stored_ranges};

/// Rows that are solved at once.
const ROWS: u64 = 64;
/// Elements that are converted at a time.
const BLOCK: usize = 4096;
/// A pivot below this share of its diagonal entry says that the sum is singular as far as f64 can tell.
const TOLERANCE: f64 = 1e-12;
/// What is added to the diagonal, in units of its mean, until the sum is positive definite.
const RIDGES: [f64; 6] = [0.0, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2];

/// The matrices of the layer that is being read.
#[derive(Default)]
pub struct Held {
    current: RwLock<Option<Prepared>>,
    /// Layers whose sum was singular, and the largest share of the mean diagonal that was added.
    singular: Mutex<Vec<(u32, f64)>>,
}

impl Held {
    /// What was done about sums that are singular.
    fn note(&self) -> Option<String> {
        let singular = self.singular.lock().unwrap_or_else(PoisonError::into_inner);
        let most = singular.iter().map(|&(_, share)| share).fold(0.0, f64::max);
        let count = singular.len();
        (count > 0).then(|| {
            format!(
                "the Gram matrices of {count} layers sum up to a singular matrix: up to {most:e} of the mean diagonal was \
                 added, which draws their weights towards the average"
            )
        })
    }
}

/// The Gram matrices of a layer as stored, and the factor of their sum.
struct Prepared {
    layer: u32,
    grams: Vec<Vec<u8>>,
    /// ρ / n.
    ridge: f64,
    factor: Vec<f64>,
}

/// See the module's documentation.
pub struct Regression {
    /// Number of the layer, unique among those that share `held`.
    pub layer: u32,
    /// W_t.
    pub weights: Vec<Part>,
    /// G_t.
    pub grams: Vec<Part>,
    /// Rows of W.
    pub outputs: u64,
    /// Columns of W.
    pub inputs: u64,
    /// α.
    pub alpha: f64,
    /// Shared by all layers.
    pub held: Arc<Held>,
}

impl Regression {
    /// Memory that the matrices take while the layer is read, in bytes.
    pub fn held_bytes(inputs: u64, grams: &[Float]) -> u64 {
        let area = inputs.saturating_mul(inputs);
        let widths: u64 = grams.iter().map(|float| float.width() as u64).sum();
        area.saturating_mul(widths + 8)
    }

    /// Memory that one read takes beside its result and the matrices, in bytes.
    pub fn scratch_bytes(inputs: u64) -> u64 {
        // Rows of W and of the result, and the panel and block of a solution, or of the factor.
        let solving = inputs * (2 * ROWS + PANEL as u64) + 2 * ROWS * PANEL as u64;
        let factoring = (inputs + PANEL as u64) * (2 * PANEL as u64 + 1);
        8 * solving.max(factoring) + 16 * BLOCK as u64
    }

    /// What tells this from other layers.
    pub fn hash(&self) -> [u8; 32] {
        let offsets: Vec<_> = self.weights.iter().chain(&self.grams).map(|part| (part.offset, part.float)).collect();
        let text = format!("regmean {} {} {} {offsets:?}", self.outputs, self.inputs, self.alpha.to_bits());
        *blake3::hash(text.as_bytes()).as_bytes()
    }

    /// Whole rows, each rounded to f32, to `use_row` with its number.
    fn rows(&self, rows: Range<u64>, use_row: &mut dyn FnMut(u64, &[f64])) -> Result<()> {
        loop {
            let current = self.held.current.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(prepared) = current.as_ref().filter(|prepared| prepared.layer == self.layer) {
                return self.solve(prepared, rows, use_row);
            }
            drop(current);
            let mut current = self.held.current.write().unwrap_or_else(PoisonError::into_inner);
            if current.as_ref().is_none_or(|prepared| prepared.layer != self.layer) {
                // The one before goes first: both do not fit.
                *current = None;
                *current = Some(self.prepare()?);
            }
        }
    }

    fn prepare(&self) -> Result<Prepared> {
        let mut grams = Vec::with_capacity(self.grams.len());
        for (model, part) in self.grams.iter().enumerate() {
            let mut bytes = vec![0; (self.inputs * self.inputs) as usize * part.float.width()];
            part.file.read_at(&mut bytes, part.offset)?;
            self.check_gram(model, part, &bytes)?;
            grams.push(bytes);
        }
        let n = self.inputs as usize;
        let isa = Isa::detect();
        let mut prepared = Prepared { layer: self.layer, grams, ridge: 0.0, factor: vec![0.0; n * n] };
        let mut scratch = vec![0.0; (n + PANEL) * (2 * PANEL + 1)];
        let mean = self.mean_diagonal(&prepared);
        for share in RIDGES {
            // Nothing was seen at all: any ridge gives the average.
            let ridge = if mean > 0.0 { share * mean } else { share };
            prepared.ridge = ridge / self.grams.len() as f64;
            self.sum(&mut prepared, &mut scratch[..n]);
            if kernels::cholesky(isa, &mut prepared.factor, n, TOLERANCE, &mut scratch) {
                if share > 0.0 {
                    self.held.singular.lock().unwrap_or_else(PoisonError::into_inner).push((self.layer, share));
                }
                return Ok(prepared);
            }
        }
        Err(Error::input("the Gram matrices sum up to no positive definite matrix, as XᵀX is")
            .at(self.grams[0].file.path())
            .help("compute them anew, in float32 or better"))
    }

    fn check_gram(&self, model: usize, part: &Part, bytes: &[u8]) -> Result<()> {
        let n = self.inputs as usize;
        let refuse = |what: String| {
            Err(Error::input(format!("{what} in the Gram matrix of model {}", model + 1)).at(part.file.path()).help(
                "a Gram matrix is XᵀX of a layer's inputs: finite, symmetric, and nowhere negative on the diagonal",
            ))
        };
        let mut values = [0f64; BLOCK];
        for start in (0..n * n).step_by(BLOCK) {
            let values = &mut values[..BLOCK.min(n * n - start)];
            decode(part.float, &bytes[start * part.float.width()..], values);
            for (at, value) in (start..).zip(values.iter()) {
                if !value.is_finite() || (at / n == at % n && *value < 0.0) {
                    return refuse(format!("{value} at [{}, {}]", at / n, at % n));
                }
                if at / n > at % n {
                    let other = self::value(part.float, bytes, at % n * n + at / n);
                    // Products in another order differ by rounding, at most.
                    let slack = || {
                        let diagonal = |i: usize| self::value(part.float, bytes, i * (n + 1)).max(0.0);
                        0.01 * (diagonal(at / n) * diagonal(at % n)).sqrt()
                    };
                    if (value - other).abs() > 0.05 * value.abs().max(other.abs()) + slack() {
                        return refuse(format!(
                            "{value} at [{}, {}], but {} at [{}, {}]",
                            at / n,
                            at % n,
                            other,
                            at % n,
                            at / n
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    fn mean_diagonal(&self, prepared: &Prepared) -> f64 {
        let n = self.inputs as usize;
        let trace =
            |(bytes, part): (&Vec<u8>, &Part)| (0..n).map(|i| value(part.float, bytes, i * (n + 1))).sum::<f64>();
        prepared.grams.iter().zip(&self.grams).map(trace).sum::<f64>() / n.max(1) as f64
    }

    /// Σ G̃_t into the factor's place.
    fn sum(&self, prepared: &mut Prepared, line: &mut [f64]) {
        let n = self.inputs as usize;
        prepared.factor.fill(0.0);
        for (bytes, part) in prepared.grams.iter().zip(&self.grams) {
            for (i, sums) in prepared.factor.chunks_exact_mut(n).enumerate() {
                self.gram_row(prepared.ridge, bytes, part.float, i, 0..n, line);
                sums.iter_mut().zip(line.iter()).for_each(|(sum, value)| *sum += value);
            }
        }
    }

    /// Columns `columns` of row `i` of G̃.
    fn gram_row(&self, ridge: f64, bytes: &[u8], float: Float, i: usize, columns: Range<usize>, out: &mut [f64]) {
        let (n, width) = (self.inputs as usize, float.width());
        let out = &mut out[..columns.len()];
        decode(float, &bytes[(i * n + columns.start) * width..], out);
        for (j, value) in columns.zip(out) {
            *value = if i == j { *value + ridge } else { *value * self.alpha };
        }
    }

    /// Solves for `rows`.
    fn solve(&self, prepared: &Prepared, rows: Range<u64>, use_row: &mut dyn FnMut(u64, &[f64])) -> Result<()> {
        let n = self.inputs as usize;
        let isa = Isa::detect();
        let most = ROWS.min(rows.end - rows.start) as usize;
        let (mut weights, mut sums) = (vec![0.0; most * n], vec![0.0; most * n]);
        let (mut panel, mut block) = (vec![0.0; (n + most) * PANEL], vec![0.0; most * PANEL]);
        for first in rows.clone().step_by(ROWS as usize) {
            let count = ROWS.min(rows.end - first) as usize;
            sums[..count * n].fill(0.0);
            for (model, weight) in self.weights.iter().enumerate() {
                self.read(model, weight, first, &mut weights[..count * n])?;
                for start in (0..n).step_by(PANEL) {
                    let width = PANEL.min(n - start);
                    let (bytes, float) = (&prepared.grams[model], self.grams[model].float);
                    for (k, line) in panel[..n * PANEL].as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
                        line[width..].fill(0.0);
                        self.gram_row(prepared.ridge, bytes, float, k, start..start + width, line);
                    }
                    let block = block.as_chunks_mut::<PANEL>().0;
                    for (sums, line) in sums.chunks_exact(n).take(count).zip(block.iter_mut()) {
                        line[..width].copy_from_slice(&sums[start..start + width]);
                        line[width..].fill(0.0);
                    }
                    let (panel, block) = (&panel[..n * PANEL], block[..count].as_flattened_mut());
                    kernels::multiply(isa, &weights, n, panel, block, false);
                    let block = block.as_chunks::<PANEL>().0;
                    for (sums, line) in sums.chunks_exact_mut(n).take(count).zip(block.iter()) {
                        sums[start..start + width].copy_from_slice(&line[..width]);
                    }
                }
            }
            // The panel is free again.
            kernels::solve(isa, &prepared.factor, n, &mut sums[..count * n], &mut panel);
            for (row, solved) in (first..).zip(sums.chunks_exact(n).take(count)) {
                use_row(row, solved);
            }
        }
        Ok(())
    }

    /// Rows of a model's weights from `first` on.
    fn read(&self, model: usize, part: &Part, first: u64, out: &mut [f64]) -> Result<()> {
        let width = part.float.width();
        let mut bytes = [0u8; 8 * BLOCK];
        for (start, out) in (0..).step_by(BLOCK).zip(out.chunks_mut(BLOCK)) {
            let bytes = &mut bytes[..out.len() * width];
            let element = first * self.inputs + start;
            part.file.read_at(bytes, part.offset + element * width as u64)?;
            decode(part.float, bytes, out);
            if let Some(at) = out.iter().position(|value| !value.is_finite()) {
                return Err(Error::input(format!(
                    "{} in model {} at element {}",
                    out[at],
                    model + 1,
                    element + at as u64
                ))
                .at(part.file.path())
                .help("repair the checkpoint: RegMean needs finite weights"));
            }
        }
        Ok(())
    }

    /// Fills `out`, f32, with the elements from `first` on.
    fn elements(&self, first: u64, out: &mut [u8]) -> Result<()> {
        let (end, inputs) = (first + out.len() as u64 / 4, self.inputs);
        let rows = first / inputs..end.div_ceil(inputs);
        self.rows(rows, &mut |row, solved| {
            let (begin, end) = ((row * inputs).max(first), ((row + 1) * inputs).min(end));
            let solved = &solved[(begin - row * inputs) as usize..(end - row * inputs) as usize];
            let place = &mut out[4 * (begin - first) as usize..4 * (end - first) as usize];
            for (bytes, value) in place.as_chunks_mut::<4>().0.iter_mut().zip(solved) {
                *bytes = (*value as f32).to_le_bytes();
            }
        })
    }
}

/// The first stored values of `bytes`, exactly.
fn decode(float: Float, bytes: &[u8], out: &mut [f64]) {
    // A short run is the rule in a panel, and clearing a long buffer for it would take longer than the work.
    if out.len() <= PANEL { decode_by::<PANEL>(float, bytes, out) } else { decode_by::<512>(float, bytes, out) }
}

fn decode_by<const N: usize>(float: Float, bytes: &[u8], out: &mut [f64]) {
    if float == Float::F64 {
        out.iter_mut().zip(bytes.as_chunks::<8>().0).for_each(|(out, bytes)| *out = f64::from_le_bytes(*bytes));
        return;
    }
    let (isa, width) = (Isa::detect(), float.width());
    let mut single = [0f32; N];
    for (out, bytes) in out.chunks_mut(N).zip(bytes.chunks(N * width)) {
        let single = &mut single[..out.len()];
        kernels::load(isa, float, &bytes[..out.len() * width], single);
        out.iter_mut().zip(single).for_each(|(out, value)| *out = f64::from(*value));
    }
}

/// Stored value number `at`.
fn value(float: Float, bytes: &[u8], at: usize) -> f64 {
    let mut one = [0.0];
    decode_by::<1>(float, &bytes[at * float.width()..], &mut one);
    one[0]
}

impl InputFile for Regression {
    fn path(&self) -> &Path {
        self.weights[0].file.path()
    }

    fn identity(&self) -> &Identity {
        self.weights[0].file.identity()
    }

    fn identity_now(&self) -> Result<Identity> {
        self.weights[0].file.identity_now()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        read_elements(buffer, offset, 4, |first, out| self.elements(first, out))
    }

    /// The matrices with the first row. A row that is only begun comes with the range before.
    fn made_of(&self, offset: u64, length: u64, see: &mut dyn FnMut(&dyn InputFile, u64, u64)) -> bool {
        let area = self.inputs * self.inputs;
        for gram in self.grams.iter().filter(|_| offset == 0) {
            stored_ranges(&*gram.file, gram.offset, area * gram.float.width() as u64, see);
        }
        let row_bytes = 4 * self.inputs.max(1);
        let (first, end) = (offset.div_ceil(row_bytes), (offset + length).div_ceil(row_bytes));
        for weight in self.weights.iter().filter(|_| first < end) {
            let row_bytes = self.inputs * weight.float.width() as u64;
            stored_ranges(&*weight.file, weight.offset + first * row_bytes, (end - first) * row_bytes, see);
        }
        true
    }

    fn is_exclusive(&self) -> bool {
        true
    }

    fn note(&self) -> Option<String> {
        self.held.note()
    }
}
