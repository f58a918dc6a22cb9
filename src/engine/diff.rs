//! Comparison of two checkpoints, tensor by tensor, streamed through fixed buffers.
//!
//! - Without a tolerance, equal means equal bits: −0 differs from +0, and NaNs differ in their payload.
//! - With one, an element agrees if the values are equal, if both are NaN, or if either tolerance given accepts it;
//!   float tensors of different types are then compared by value.
//! - An ulp distance counts representable values between the two in the stored type. Between different types it counts
//!   values of the type that holds both exactly (f64 if one is f64, else f32).

use serde::{Serialize, Serializer};

use super::Observer;
use super::elements::{BLOCK_ELEMENTS, Decoder, element_width};
use super::inspect::in_file_order;
use crate::checkpoint::{Checkpoint, TensorEntry};
use crate::dtype::{Float, dtype_name};
use crate::error::Result;

/// What counts as equal.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct DiffOptions {
    /// Largest accepted absolute difference of values.
    pub atol: Option<f64>,
    /// Largest accepted distance in units in the last place.
    pub max_ulp: Option<u64>,
}

impl DiffOptions {
    fn tolerant(&self) -> bool {
        self.atol.is_some() || self.max_ulp.is_some()
    }

    fn accepts(&self, a: f64, b: f64, ulp: Option<u64>) -> bool {
        a == b
            || (a.is_nan() && b.is_nan())
            || self.atol.is_some_and(|atol| (a - b).abs() <= atol)
            || self.max_ulp.zip(ulp).is_some_and(|(most, ulp)| ulp <= most)
    }
}

/// In what two tensors of one name differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// Only the first checkpoint has it.
    OnlyInA,
    /// Only the second checkpoint has it.
    OnlyInB,
    /// The shapes differ; values were not compared.
    Shape,
    /// The types differ; values were not compared.
    Dtype,
    /// Values differ.
    Values,
}

/// One differing tensor.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorDiff {
    /// Its name.
    pub name: String,
    /// In what it differs.
    pub change: Change,
    /// Type in the first and in the second checkpoint.
    pub dtypes: [Option<String>; 2],
    /// Shape in the first and in the second checkpoint.
    pub shapes: [Option<Vec<u64>>; 2],
    /// Elements compared (bytes, for types smaller than a byte).
    pub elements: u64,
    /// Elements that differ by more than accepted.
    pub differing: u64,
    /// Among those, elements of which exactly one is NaN: they take no part in the two maxima.
    pub nan_mismatches: u64,
    /// Largest absolute difference, for floats; "inf" where an infinity meets a finite value.
    #[serde(serialize_with = "finite_or_word")]
    pub max_abs: Option<f64>,
    /// Largest distance in units in the last place, for floats.
    pub max_ulp: Option<u64>,
    /// Index of the first differing element.
    pub first_index: Option<u64>,
}

/// What [`diff`] found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DiffReport {
    /// The first checkpoint as it was named.
    pub a: String,
    /// The second checkpoint as it was named.
    pub b: String,
    /// Whether nothing differs by more than accepted.
    pub identical: bool,
    /// Tensors that both have.
    pub tensors: u64,
    /// Elements compared.
    pub elements: u64,
    /// What differs: by kind, then the largest absolute difference first.
    pub differences: Vec<TensorDiff>,
}

/// Compares `a` with `b`, reading every tensor that both have in equal shape once.
pub fn diff(a: &Checkpoint, b: &Checkpoint, options: &DiffOptions, observer: &dyn Observer) -> Result<DiffReport> {
    let only = |entry: &TensorEntry, change| blank(change, Some(entry), None);
    let mut differences: Vec<TensorDiff> = Vec::new();
    let mut pairs: Vec<(&TensorEntry, &TensorEntry)> = Vec::new();
    let mut common = 0;
    for index in in_file_order(&a.tensors) {
        let entry = &a.tensors[index];
        let Some(other) = b.get(&entry.name) else {
            differences.push(only(entry, Change::OnlyInA));
            continue;
        };
        common += 1;
        match structural(entry, other, options) {
            Some(change) => differences.push(blank(change, Some(entry), Some(other))),
            None => pairs.push((entry, other)),
        }
    }
    let unmatched = b.tensors.iter().filter(|entry| a.get(&entry.name).is_none());
    differences.extend(unmatched.map(|entry| blank(Change::OnlyInB, None, Some(entry))));

    observer.stage("compare", pairs.iter().map(|(x, y)| x.bytes + y.bytes).sum());
    let mut comparer = Comparer::new(*options);
    let mut elements = 0;
    for (entry, other) in pairs {
        let tally = comparer.compare((a, entry), (b, other), observer)?;
        elements += entry.elements();
        if tally.differing > 0 {
            differences.push(tally.report(entry, other));
        }
    }
    differences.sort_by(|x, y| {
        let size = |d: &TensorDiff| d.max_abs.unwrap_or(0.0);
        let by_kind = x.change.cmp(&y.change);
        by_kind
            .then_with(|| (y.nan_mismatches > 0).cmp(&(x.nan_mismatches > 0)))
            .then_with(|| size(y).total_cmp(&size(x)))
            .then_with(|| y.differing.cmp(&x.differing))
            .then_with(|| x.name.cmp(&y.name))
    });
    Ok(DiffReport {
        a: a.spec.clone(),
        b: b.spec.clone(),
        identical: differences.is_empty(),
        tensors: common,
        elements,
        differences,
    })
}

/// The difference that headers alone show.
fn structural(a: &TensorEntry, b: &TensorEntry, options: &DiffOptions) -> Option<Change> {
    if a.shape != b.shape {
        return Some(Change::Shape);
    }
    let float = |entry: &TensorEntry| Float::from_dtype(entry.dtype).is_some();
    let by_value = options.tolerant() && float(a) && float(b);
    (a.dtype != b.dtype && !by_value).then_some(Change::Dtype)
}

/// A difference of `change` without figures.
fn blank(change: Change, a: Option<&TensorEntry>, b: Option<&TensorEntry>) -> TensorDiff {
    let dtype = |entry: Option<&TensorEntry>| entry.map(|e| dtype_name(e.dtype));
    let shape = |entry: Option<&TensorEntry>| entry.map(|e| e.shape.to_vec());
    let name = a.or(b).map(|entry| entry.name.to_string()).unwrap_or_default();
    TensorDiff {
        name,
        change,
        dtypes: [dtype(a), dtype(b)],
        shapes: [shape(a), shape(b)],
        elements: 0,
        differing: 0,
        nan_mismatches: 0,
        max_abs: None,
        max_ulp: None,
        first_index: None,
    }
}

/// What was found so far in one pair of tensors.
#[derive(Debug, Default, PartialEq)]
struct Tally {
    /// Elements seen.
    elements: u64,
    differing: u64,
    nan_mismatches: u64,
    max_abs: Option<f64>,
    max_ulp: Option<u64>,
    first_index: Option<u64>,
}

impl Tally {
    /// Counts the element at `offset` of the block at hand as differing.
    fn differs(&mut self, offset: usize) {
        self.differing += 1;
        self.first_index.get_or_insert(self.elements + offset as u64);
    }

    fn measure(&mut self, a: f64, b: f64, ulp: Option<u64>) {
        if a.is_nan() != b.is_nan() {
            self.nan_mismatches += 1;
        }
        let distance = (a - b).abs();
        if !distance.is_nan() {
            self.max_abs = Some(self.max_abs.map_or(distance, |most| most.max(distance)));
            self.max_ulp = self.max_ulp.max(ulp);
        }
    }

    fn report(self, a: &TensorEntry, b: &TensorEntry) -> TensorDiff {
        TensorDiff {
            elements: self.elements,
            differing: self.differing,
            nan_mismatches: self.nan_mismatches,
            max_abs: self.max_abs,
            max_ulp: self.max_ulp,
            first_index: self.first_index,
            ..blank(Change::Values, Some(a), Some(b))
        }
    }
}

/// One tensor and the checkpoint whose files hold it.
type Located<'a> = (&'a Checkpoint, &'a TensorEntry);

/// The buffers of a comparison.
struct Comparer {
    options: DiffOptions,
    bytes: [Vec<u8>; 2],
    decoders: [Decoder; 2],
}

impl Comparer {
    fn new(options: DiffOptions) -> Self {
        let buffer = || vec![0; BLOCK_ELEMENTS * 8];
        let decoders = [Decoder::new(), Decoder::new()];
        Self { options, bytes: [buffer(), buffer()], decoders }
    }

    fn compare(&mut self, a: Located, b: Located, observer: &dyn Observer) -> Result<Tally> {
        let widths = [a, b].map(|(_, entry)| element_width(entry.dtype));
        let count = a.1.bytes / widths[0] as u64;
        let mut tally = Tally::default();
        while tally.elements < count {
            let block = (count - tally.elements).min(BLOCK_ELEMENTS as u64) as usize;
            for (side, (checkpoint, entry)) in [a, b].into_iter().enumerate() {
                let file = &checkpoint.files[entry.file as usize].file;
                let offset = entry.offset + tally.elements * widths[side] as u64;
                let bytes = &mut self.bytes[side][..block * widths[side]];
                file.read_at(bytes, offset).map_err(|e| e.tensor(&entry.name))?;
            }
            self.block(&mut tally, block, [a.1, b.1]);
            tally.elements += block as u64;
            observer.advance((block * (widths[0] + widths[1])) as u64);
        }
        Ok(tally)
    }

    /// Compares the `count` elements that the buffers hold.
    fn block(&mut self, tally: &mut Tally, count: usize, entries: [&TensorEntry; 2]) {
        let dtypes = entries.map(|entry| entry.dtype);
        let widths = dtypes.map(element_width);
        let [left, right] = &self.bytes;
        let (left, right) = (&left[..count * widths[0]], &right[..count * widths[1]]);
        let same_type = dtypes[0] == dtypes[1];
        if same_type && left == right {
            return;
        }
        let floats = dtypes.map(Float::from_dtype);
        let [Some(float), Some(other)] = floats else {
            let pairs = left.chunks_exact(widths[0]).zip(right.chunks_exact(widths[0]));
            pairs.enumerate().filter(|(_, (a, b))| a != b).for_each(|(i, _)| tally.differs(i));
            return;
        };
        let [decode_left, decode_right] = &mut self.decoders;
        let values = (decode_left.decode(float, left), decode_right.decode(other, right));
        for (i, (&a, &b)) in values.0.iter().zip(values.1).enumerate() {
            let stored = |bytes: &[u8], width: usize| bits(&bytes[i * width..][..width]);
            let ulp = if a.is_nan() || b.is_nan() {
                None
            } else if same_type {
                let width = widths[0];
                Some(ulp_distance(stored(left, width), stored(right, width), width))
            } else if float == Float::F64 || other == Float::F64 {
                Some(ulp_distance(a.to_bits(), b.to_bits(), 8))
            } else {
                let single = |value: f64| u64::from((value as f32).to_bits());
                Some(ulp_distance(single(a), single(b), 4))
            };
            let agrees = if self.options.tolerant() {
                self.options.accepts(a, b, ulp)
            } else {
                stored(left, widths[0]) == stored(right, widths[1])
            };
            if !agrees {
                tally.differs(i);
                tally.measure(a, b, ulp);
            }
        }
    }
}

/// Little-endian bits of one stored element.
fn bits(stored: &[u8]) -> u64 {
    stored.iter().rev().fold(0, |bits, &byte| bits << 8 | u64::from(byte))
}

/// Number of steps between two values of a sign-and-magnitude type of `width` bytes; −0 and +0 are one value.
fn ulp_distance(a: u64, b: u64, width: usize) -> u64 {
    let sign = 1_u64 << (width * 8 - 1);
    let (magnitude_a, magnitude_b) = (a & !sign, b & !sign);
    if (a ^ b) & sign == 0 {
        magnitude_a.abs_diff(magnitude_b)
    } else {
        // At most twice the largest magnitude, 2 * (2^63 - 2^52): fits.
        magnitude_a + magnitude_b
    }
}

/// JSON has no infinity: it is written as the word "inf".
fn finite_or_word<S: Serializer>(value: &Option<f64>, s: S) -> std::result::Result<S::Ok, S::Error> {
    match value {
        Some(value) if value.is_infinite() => s.serialize_str("inf"),
        value => value.serialize(s),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;

    fn entry(dtype: Dtype, elements: u64) -> TensorEntry {
        let bytes = elements * element_width(dtype) as u64;
        let shape = [elements].into();
        TensorEntry { name: "t".into(), dtype, shape, file: 0, offset: 0, bytes }
    }

    fn tally(options: DiffOptions, a: (Dtype, &[u8]), b: (Dtype, &[u8])) -> Tally {
        let mut comparer = Comparer::new(options);
        comparer.bytes[0][..a.1.len()].copy_from_slice(a.1);
        comparer.bytes[1][..b.1.len()].copy_from_slice(b.1);
        let count = a.1.len() / element_width(a.0);
        let mut tally = Tally::default();
        comparer.block(&mut tally, count, [&entry(a.0, count as u64), &entry(b.0, count as u64)]);
        tally
    }

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    const STRICT: DiffOptions = DiffOptions { atol: None, max_ulp: None };

    #[test]
    fn strict_means_bits_and_reports_size_and_place() {
        let next = f32::from_bits(1.0_f32.to_bits() + 3);
        let (a, b) = (f32s(&[1.0, 0.0, 1.0, 5.0]), f32s(&[1.0, -0.0, next, 5.0]));
        let found = tally(STRICT, (Dtype::F32, &a), (Dtype::F32, &b));
        assert_eq!((found.differing, found.first_index), (2, Some(1)));
        assert_eq!((found.max_ulp, found.max_abs), (Some(3), Some(f64::from(next) - 1.0)));
        assert_eq!(tally(STRICT, (Dtype::F32, &a), (Dtype::F32, &a)), Tally::default());
    }

    #[test]
    fn tolerances_accept_what_they_name() {
        let next = f32::from_bits(1.0_f32.to_bits() + 3);
        let (a, b) = (f32s(&[1.0, 0.0, f32::NAN]), f32s(&[next, -0.0, f32::from_bits(0xffc0_0001)]));
        let with = |atol, max_ulp| tally(DiffOptions { atol, max_ulp }, (Dtype::F32, &a), (Dtype::F32, &b)).differing;
        assert_eq!(with(None, None), 3);
        assert_eq!(with(None, Some(2)), 1);
        assert_eq!(with(None, Some(3)), 0);
        assert_eq!(with(Some(1e-6), None), 0);
        assert_eq!(with(Some(1e-7), None), 1);
        assert_eq!(with(Some(0.0), Some(3)), 0);
    }

    #[test]
    fn a_nan_never_agrees_with_a_number_and_infinity_is_far_from_it() {
        let (a, b) = (f32s(&[f32::NAN, f32::INFINITY, 1.0]), f32s(&[1.0, 1.0, 1.0]));
        let options = DiffOptions { atol: Some(1e30), max_ulp: Some(10) };
        let found = tally(options, (Dtype::F32, &a), (Dtype::F32, &b));
        assert_eq!((found.differing, found.nan_mismatches), (2, 1));
        assert_eq!(found.max_abs, Some(f64::INFINITY));
        let report = found.report(&entry(Dtype::F32, 3), &entry(Dtype::F32, 3));
        let json = serde_json::to_string(&report).unwrap();
        assert!(json.contains(r#""max_abs":"inf""#), "{json}");
    }

    #[test]
    fn different_float_types_compare_by_value_only_with_a_tolerance() {
        let bf16 = [0x80, 0x3f, 0x80, 0xbf]; // 1, -1
        let single = f32s(&[1.0, -1.0 - f32::EPSILON]);
        let options = DiffOptions { atol: Some(0.0), max_ulp: None };
        let found = tally(options, (Dtype::BF16, &bf16), (Dtype::F32, &single));
        assert_eq!((found.differing, found.first_index, found.max_ulp), (1, Some(1), Some(1)));
        let (a, b) = (entry(Dtype::BF16, 2), entry(Dtype::F32, 2));
        assert_eq!(structural(&a, &b, &STRICT), Some(Change::Dtype));
        assert_eq!(structural(&a, &b, &options), None);
        assert_eq!(structural(&a, &entry(Dtype::I32, 2), &options), Some(Change::Dtype));
        assert_eq!(structural(&a, &entry(Dtype::BF16, 3), &options), Some(Change::Shape));
    }

    #[test]
    fn integers_are_counted_element_by_element_without_a_tolerance() {
        let (a, b) = ([1, 0, 2, 0, 3, 0], [1, 0, 2, 1, 3, 0]);
        let options = DiffOptions { atol: Some(1e9), max_ulp: None };
        let found = tally(options, (Dtype::I16, &a), (Dtype::I16, &b));
        assert_eq!((found.differing, found.first_index, found.max_abs), (1, Some(1), None));
    }

    #[test]
    fn ulp_distance_crosses_zero_and_does_not_overflow() {
        assert_eq!(ulp_distance(0x8000_0001, 1, 4), 2);
        assert_eq!(ulp_distance(0x80, 0x00, 1), 0);
        let largest = f64::MAX.to_bits();
        assert_eq!(ulp_distance(largest, largest | 1 << 63, 8), 2 * largest);
        assert_eq!(bits(&[0x34, 0x12]), 0x1234);
    }
}
