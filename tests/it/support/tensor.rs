//! A tensor as bytes with a type and a shape, and named collections of them.

use std::collections::BTreeMap;

use safetensors::Dtype;

use super::numbers;

/// One tensor.
#[derive(Clone, PartialEq)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// The tensors of a checkpoint, in lexicographic order of their names.
pub type Tensors = BTreeMap<String, Tensor>;

impl Tensor {
    /// A float tensor, `values` rounded to `dtype`.
    pub fn floats(dtype: Dtype, shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|&value| numbers::encode(dtype, value)).collect();
        Self::raw(dtype, shape, bytes)
    }

    /// An f32 vector.
    pub fn vector(values: &[f32]) -> Self {
        Self::floats(Dtype::F32, &[values.len()], values)
    }

    /// A tensor of any type.
    pub fn raw(dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> Self {
        let elements: usize = shape.iter().product();
        assert_eq!(bytes.len(), elements * numbers::width(dtype));
        Self { dtype, shape: shape.to_vec(), bytes }
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The values.
    pub fn values(&self) -> Vec<f64> {
        self.bytes.chunks(numbers::width(self.dtype)).map(|bytes| numbers::decode(self.dtype, bytes)).collect()
    }

    /// The values in f32: exact for every type but f64.
    pub fn f32s(&self) -> Vec<f32> {
        self.values().into_iter().map(|value| value as f32).collect()
    }

    /// The same values, rounded to another float type.
    pub fn to(&self, dtype: Dtype) -> Self {
        Self::floats(dtype, &self.shape, &self.f32s())
    }
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} {:?}", self.dtype, self.shape)
    }
}

/// Names tensors: `tensors([("a", a), ("b", b)])`.
pub fn tensors<const N: usize>(named: [(&str, Tensor); N]) -> Tensors {
    named.into_iter().map(|(name, tensor)| (name.to_owned(), tensor)).collect()
}

/// The first few differences between two checkpoints, one a line; empty if they are the same.
///
/// An f64 result counts as the f32 it rounds to: the last addition may be done in f64 or in f32.
pub fn differences(expected: &Tensors, actual: &Tensors) -> String {
    let mut found = Vec::new();
    for name in expected.keys().chain(actual.keys().filter(|n| !expected.contains_key(*n))) {
        let (Some(want), Some(got)) = (expected.get(name), actual.get(name)) else {
            found.push(format!("{name}: present in one only"));
            continue;
        };
        if want == got {
            continue;
        }
        if (want.dtype, &want.shape) != (got.dtype, &got.shape) {
            found.push(format!("{name}: expected {want:?}, found {got:?}"));
            continue;
        }
        let same = |a: f64, b: f64| match want.dtype {
            Dtype::F64 => (a as f32).to_bits() == (b as f32).to_bits(),
            _ => a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()),
        };
        let (want, got) = (want.values(), got.values());
        let wrong: Vec<_> = (0..want.len()).filter(|&i| !same(want[i], got[i])).collect();
        if let Some(&i) = wrong.first() {
            found.push(format!(
                "{name}: {} of {} elements differ; [{i}] expected {:e}, found {:e}",
                wrong.len(),
                want.len(),
                want[i],
                got[i]
            ));
        }
    }
    found.truncate(5);
    found.join("\n")
}
