//! What is in one checkpoint: catalogue, and statistics streamed through fixed buffers.
//!
//! - Without statistics no tensor data is read.
//! - Mean and standard deviation are computed per block around the block's own mean and joined by the formula of Chan,
//!   Golub and LeVeque (1979), so that a large mean does not drown a small spread.
//! - Least, greatest, mean and deviation are those of the finite values; NaN and infinities are counted beside them.
//! - Magnitudes of all tensors together are counted by octave: the exponent of a value tells its octave exactly.

use serde::Serialize;

use super::Observer;
use super::elements::{BLOCK_ELEMENTS, Decoder};
use crate::checkpoint::{Checkpoint, TensorEntry};
use crate::dtype::{Float, dtype_name};
use crate::error::Result;

/// Everything of one element type in a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DtypeTotal {
    /// Name of the type as stored.
    pub dtype: String,
    /// Tensors of that type.
    pub tensors: u64,
    /// Their elements.
    pub elements: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Statistics of the values of a float tensor.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct ValueStats {
    /// Least finite value; absent where there is none.
    pub min: Option<f64>,
    /// Greatest finite value.
    pub max: Option<f64>,
    /// Mean of the finite values.
    pub mean: Option<f64>,
    /// Standard deviation of the finite values, taken as the whole population.
    pub std: Option<f64>,
    /// Zeros of either sign.
    pub zeros: u64,
    /// NaNs.
    pub nan: u64,
    /// Infinities of either sign.
    pub inf: u64,
}

/// One tensor.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorStats {
    /// Its name.
    pub name: String,
    /// Type as stored.
    pub dtype: String,
    /// Shape, outermost dimension first.
    pub shape: Vec<u64>,
    /// Number of elements.
    pub elements: u64,
    /// Number of bytes.
    pub bytes: u64,
    /// Name of the file that holds it.
    pub file: String,
    /// Statistics, where asked for and the type is a mergeable float.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stats: Option<ValueStats>,
}

/// Finite values of magnitude in [`from`, 2 `from`), in all float tensors together.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Octave {
    /// Least magnitude of the octave: a power of two.
    pub from: f64,
    /// How many values lie in it.
    pub count: u64,
}

/// What [`inspect`] found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct InspectReport {
    /// The checkpoint as it was named.
    pub source: String,
    /// The directory it was found in.
    pub path: String,
    /// Hub id and commit, `org/name@commit`, if it came from the local cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hub: Option<String>,
    /// Number of files.
    pub files: u64,
    /// Number of tensors.
    pub tensors: u64,
    /// Number of elements.
    pub elements: u64,
    /// Number of tensor bytes.
    pub bytes: u64,
    /// Totals per type, most bytes first.
    pub dtypes: Vec<DtypeTotal>,
    /// Every tensor, by name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub list: Vec<TensorStats>,
    /// Magnitudes of all float tensors, where statistics were asked for: octaves with values in them, ascending. Zeros have
    /// none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub magnitudes: Vec<Octave>,
    /// Peculiarities.
    pub warnings: Vec<String>,
}

/// Lists `checkpoint`; with `stats`, reads all of its float tensors once.
pub fn inspect(checkpoint: &Checkpoint, stats: bool, observer: &dyn Observer) -> Result<InspectReport> {
    let tensors = &checkpoint.tensors;
    let mut list: Vec<_> = tensors.iter().map(|entry| describe(checkpoint, entry)).collect();
    let mut magnitudes = Vec::new();
    if stats {
        let floats = |entry: &&TensorEntry| Float::from_dtype(entry.dtype).is_some();
        observer.stage("read", tensors.iter().filter(floats).map(|entry| entry.bytes).sum());
        let mut reader = Reader::new();
        for index in in_file_order(tensors) {
            list[index].stats = reader.measure(checkpoint, &tensors[index], observer)?;
        }
        magnitudes = reader.octaves();
    }
    Ok(InspectReport {
        source: checkpoint.spec.clone(),
        path: checkpoint.dir.display().to_string(),
        hub: checkpoint.hub.as_ref().map(|hub| format!("{}@{}", hub.id, hub.commit)),
        files: checkpoint.stored_files() as u64,
        tensors: tensors.len() as u64,
        elements: list.iter().map(|t| t.elements).sum(),
        bytes: list.iter().map(|t| t.bytes).sum(),
        dtypes: totals(&list),
        list,
        magnitudes,
        warnings: checkpoint.warnings.clone(),
    })
}

fn describe(checkpoint: &Checkpoint, entry: &TensorEntry) -> TensorStats {
    let file = checkpoint.path_of(entry).file_name().unwrap_or_default();
    TensorStats {
        name: entry.name.to_string(),
        dtype: dtype_name(entry.dtype),
        shape: entry.shape.to_vec(),
        elements: entry.elements(),
        bytes: entry.bytes,
        file: file.to_string_lossy().into_owned(),
        stats: None,
    }
}

/// Indexes of `tensors` in the order in which their bytes lie in the files, for sequential reads.
pub(super) fn in_file_order(tensors: &[TensorEntry]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|&index| (tensors[index].file, tensors[index].offset));
    order
}

fn totals(list: &[TensorStats]) -> Vec<DtypeTotal> {
    let mut totals: Vec<DtypeTotal> = Vec::new();
    for tensor in list {
        let total = match totals.iter_mut().find(|t| t.dtype == tensor.dtype) {
            Some(total) => total,
            None => {
                let dtype = tensor.dtype.clone();
                totals.push(DtypeTotal { dtype, tensors: 0, elements: 0, bytes: 0 });
                totals.last_mut().expect("just pushed")
            }
        };
        total.tensors += 1;
        total.elements += tensor.elements;
        total.bytes += tensor.bytes;
    }
    totals.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.dtype.cmp(&b.dtype)));
    totals
}

/// The buffers of a statistics run.
struct Reader {
    bytes: Vec<u8>,
    decoder: Decoder,
    /// Values of all tensors by their biased float64 exponent, zeros and subnormal ones under 0.
    exponents: Vec<u64>,
    zeros: u64,
}

/// Bits of a float64's significand, the values of its exponent, and what its exponent is biased by.
const SIGNIFICAND: u32 = 52;
const EXPONENTS: usize = 1 << 11;
const BIAS: i32 = 1023;

impl Reader {
    fn new() -> Self {
        let (bytes, exponents) = (vec![0; BLOCK_ELEMENTS * 8], vec![0; EXPONENTS]);
        Self { bytes, decoder: Decoder::new(), exponents, zeros: 0 }
    }

    /// What was counted of all tensors.
    fn octaves(&self) -> Vec<Octave> {
        // Infinities and NaN have the largest exponent.
        let finite = self.exponents.iter().take(EXPONENTS - 1).enumerate();
        let octave = |(exponent, &count): (usize, &u64)| match exponent {
            0 => Octave { from: 0.0, count: count - self.zeros },
            _ => Octave { from: 2f64.powi(exponent as i32 - BIAS), count },
        };
        finite.map(octave).filter(|octave| octave.count > 0).collect()
    }

    fn measure(
        &mut self,
        checkpoint: &Checkpoint,
        entry: &TensorEntry,
        observer: &dyn Observer,
    ) -> Result<Option<ValueStats>> {
        let Some(float) = Float::from_dtype(entry.dtype) else {
            return Ok(None);
        };
        let file = &checkpoint.files[entry.file as usize].file;
        let block_bytes = BLOCK_ELEMENTS * float.width();
        let mut accumulator = Accumulator::default();
        let mut done: u64 = 0;
        while done < entry.bytes {
            let length = (entry.bytes - done).min(block_bytes as u64) as usize;
            let bytes = &mut self.bytes[..length];
            file.read_at(bytes, entry.offset + done).map_err(|e| e.tensor(&entry.name))?;
            let values = self.decoder.decode(float, bytes);
            accumulator.add(values);
            for value in values {
                self.exponents[(value.to_bits() >> SIGNIFICAND) as usize % EXPONENTS] += 1;
            }
            done += length as u64;
            observer.advance(length as u64);
        }
        let stats = accumulator.finish();
        self.zeros += stats.zeros;
        Ok(Some(stats))
    }
}

/// Running statistics of one tensor.
#[derive(Default)]
struct Accumulator {
    stats: ValueStats,
    finite: u64,
    mean: f64,
    /// Sum of squared deviations from the mean.
    squares: f64,
}

impl Accumulator {
    fn add(&mut self, values: &[f64]) {
        let (mut count, mut sum) = (0_u64, 0.0);
        let (mut min, mut max) = (f64::INFINITY, f64::NEG_INFINITY);
        for &value in values {
            if value.is_finite() {
                count += 1;
                sum += value;
                min = min.min(value);
                max = max.max(value);
                self.stats.zeros += u64::from(value == 0.0);
            } else if value.is_nan() {
                self.stats.nan += 1;
            } else {
                self.stats.inf += 1;
            }
        }
        if count == 0 {
            return;
        }
        let mean = sum / count as f64;
        let finite = values.iter().filter(|value| value.is_finite());
        let squares: f64 = finite.map(|value| (value - mean) * (value - mean)).sum();
        self.join(count, mean, squares);
        self.stats.min = Some(self.stats.min.map_or(min, |least| least.min(min)));
        self.stats.max = Some(self.stats.max.map_or(max, |greatest| greatest.max(max)));
    }

    fn join(&mut self, count: u64, mean: f64, squares: f64) {
        let total = self.finite + count;
        let share = count as f64 / total as f64;
        let step = mean - self.mean;
        self.mean += step * share;
        self.squares += squares + step * step * share * self.finite as f64;
        self.finite = total;
    }

    fn finish(self) -> ValueStats {
        let known = self.finite > 0;
        ValueStats {
            mean: known.then_some(self.mean),
            std: known.then(|| (self.squares / self.finite as f64).sqrt()),
            ..self.stats
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_join_to_the_statistics_of_the_whole() {
        let values: Vec<f64> = (0..1000).map(|i| 1e6 + f64::from(i % 7)).collect();
        let mut accumulator = Accumulator::default();
        for block in values.chunks(33) {
            accumulator.add(block);
        }
        let stats = accumulator.finish();
        let mean = values.iter().map(|v| v - 1e6).sum::<f64>() / 1000.0 + 1e6;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 1000.0;
        assert!((stats.mean.unwrap() - mean).abs() < 1e-6);
        assert!((stats.std.unwrap() - variance.sqrt()).abs() < 1e-9);
        assert_eq!((stats.min, stats.max), (Some(1e6), Some(1e6 + 6.0)));
    }

    #[test]
    fn nan_and_infinities_are_counted_and_kept_out_of_the_moments() {
        let mut accumulator = Accumulator::default();
        accumulator.add(&[f64::NAN, f64::INFINITY]);
        accumulator.add(&[1.0, -0.0, f64::NEG_INFINITY, 3.0, 0.0]);
        let stats = accumulator.finish();
        assert_eq!((stats.nan, stats.inf, stats.zeros), (1, 2, 2));
        assert_eq!((stats.mean, stats.min, stats.max), (Some(1.0), Some(-0.0), Some(3.0)));
    }

    #[test]
    fn without_finite_values_there_are_no_moments() {
        let mut accumulator = Accumulator::default();
        accumulator.add(&[f64::NAN]);
        let stats = accumulator.finish();
        assert_eq!((stats.min, stats.mean, stats.std, stats.nan), (None, None, None, 1));
    }
}
