//! Stored elements as f64, block by block: what `inspect` and `diff` compute with.
//!
//! - Every mergeable type converts to f64 exactly, so statistics and differences speak of the stored values.
//! - Buffers are allocated once and hold [`BLOCK_ELEMENTS`] elements, whatever the tensor's size.

use crate::dtype::{Dtype, Float};
use crate::kernels::{self, Isa};

/// Elements handled at once: 512 KiB of f64, which stays in a core's second-level cache.
pub(super) const BLOCK_ELEMENTS: usize = 1 << 16;

/// Turns stored bytes into f64 values, reusing its buffers.
pub(super) struct Decoder {
    isa: Isa,
    single: Vec<f32>,
    double: Vec<f64>,
}

impl Decoder {
    pub(super) fn new() -> Self {
        Self { isa: Isa::detect(), single: vec![0.0; BLOCK_ELEMENTS], double: vec![0.0; BLOCK_ELEMENTS] }
    }

    /// The values of at most [`BLOCK_ELEMENTS`] elements of type `float`.
    pub(super) fn decode(&mut self, float: Float, bytes: &[u8]) -> &[f64] {
        let count = bytes.len() / float.width();
        let values = &mut self.double[..count];
        if float == Float::F64 {
            for (value, stored) in values.iter_mut().zip(bytes.as_chunks::<8>().0) {
                *value = f64::from_le_bytes(*stored);
            }
        } else {
            let single = &mut self.single[..count];
            kernels::load(self.isa, float, bytes, single);
            for (value, &stored) in values.iter_mut().zip(single.iter()) {
                *value = f64::from(stored);
            }
        }
        values
    }
}

/// Bytes per element, or 1 where elements are smaller than a byte and only bytes can be counted.
pub(super) fn element_width(dtype: Dtype) -> usize {
    let bits = dtype.bitsize();
    if bits.is_multiple_of(8) { bits / 8 } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_float_type_decodes_exactly() {
        let mut decoder = Decoder::new();
        let one_and_minus_two: [(Float, &[u8]); 6] = [
            (Float::F64, &[0, 0, 0, 0, 0, 0, 0xf0, 0x3f, 0, 0, 0, 0, 0, 0, 0, 0xc0]),
            (Float::F32, &[0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0]),
            (Float::F16, &[0, 0x3c, 0, 0xc0]),
            (Float::BF16, &[0x80, 0x3f, 0, 0xc0]),
            (Float::E4M3, &[0x38, 0xc0]),
            (Float::E5M2, &[0x3c, 0xc0]),
        ];
        for (float, bytes) in one_and_minus_two {
            assert_eq!(decoder.decode(float, bytes), [1.0, -2.0], "{float:?}");
        }
        let tenth = 0.1_f64.to_le_bytes();
        assert_eq!(decoder.decode(Float::F64, &tenth), [0.1], "not rounded to f32");
    }

    #[test]
    fn sub_byte_types_are_counted_in_bytes() {
        assert_eq!(element_width(Dtype::I64), 8);
        assert_eq!(element_width(Dtype::F6_E2M3), 1);
    }
}
