//! Stored numbers: the definitions of the formats, evaluated literally.

use safetensors::Dtype;

/// A binary floating-point format of at most 16 bits.
struct Small {
    exponent_bits: i32,
    mantissa_bits: i32,
    /// Largest finite code, sign excluded.
    largest: u16,
    /// Code of infinity, sign excluded, if the format has one.
    infinity: Option<u16>,
}

fn small(dtype: Dtype) -> Option<Small> {
    let (exponent_bits, mantissa_bits, largest, infinity) = match dtype {
        Dtype::F16 => (5, 10, 0x7bff, Some(0x7c00)),
        Dtype::BF16 => (8, 7, 0x7f7f, Some(0x7f80)),
        Dtype::F8_E4M3 => (4, 3, 0x7e, None),
        Dtype::F8_E5M2 => (5, 2, 0x7b, Some(0x7c)),
        _ => return None,
    };
    Some(Small { exponent_bits, mantissa_bits, largest, infinity })
}

impl Small {
    fn sign_bit(&self) -> u16 {
        1 << (self.exponent_bits + self.mantissa_bits)
    }

    /// The value of a code without sign, as if no exponent were reserved.
    fn magnitude(&self, code: u16) -> f64 {
        let bias = (1 << (self.exponent_bits - 1)) - 1;
        let exponent = i32::from(code >> self.mantissa_bits);
        let steps = f64::from(1u16 << self.mantissa_bits);
        let fraction = f64::from(code & ((1 << self.mantissa_bits) - 1)) / steps;
        match exponent {
            0 => fraction * 2f64.powi(1 - bias),
            _ => (1.0 + fraction) * 2f64.powi(exponent - bias),
        }
    }

    fn decode(&self, code: u16) -> f64 {
        let magnitude = code & (self.sign_bit() - 1);
        let value = if magnitude <= self.largest {
            self.magnitude(magnitude)
        } else if Some(magnitude) == self.infinity {
            f64::INFINITY
        } else {
            f64::NAN
        };
        if code & self.sign_bit() == 0 { value } else { -value }
    }

    /// Nearest code, ties to the even one. The value must not overflow.
    fn encode(&self, value: f64) -> u16 {
        let sign = if value.is_sign_negative() { self.sign_bit() } else { 0 };
        if value.is_nan() {
            return self.sign_bit() - 1;
        }
        if value.is_infinite() {
            return sign | self.infinity.expect("the format has an infinity");
        }
        let size = value.abs();
        // The last code that is not above the value.
        let (mut low, mut above) = (0, self.largest + 1);
        while above - low > 1 {
            let middle = low + (above - low) / 2;
            if self.magnitude(middle) <= size {
                low = middle;
            } else {
                above = middle;
            }
        }
        if low == self.largest {
            let step = self.magnitude(low) - self.magnitude(low - 1);
            assert!(size < self.magnitude(low) + step / 2.0, "{value} overflows");
            return sign | low;
        }
        let (down, up) = (size - self.magnitude(low), self.magnitude(low + 1) - size);
        let nearest = if down < up || (down == up && low % 2 == 0) { low } else { low + 1 };
        sign | nearest
    }
}

/// Bytes per element.
pub fn width(dtype: Dtype) -> usize {
    dtype.bitsize() / 8
}

/// Whether tensors of this type are merged rather than copied.
pub fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F64 | Dtype::F32) || small(dtype).is_some()
}

/// The value of one stored element.
pub fn decode(dtype: Dtype, bytes: &[u8]) -> f64 {
    let mut wide = [0; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    let code = u64::from_le_bytes(wide);
    match (dtype, small(dtype)) {
        (_, Some(format)) => format.decode(code as u16),
        (Dtype::F64, _) => f64::from_bits(code),
        (Dtype::F32, _) => f64::from(f32::from_bits(code as u32)),
        (Dtype::I64, _) => code as i64 as f64,
        (Dtype::I32, _) => f64::from(code as u32 as i32),
        (Dtype::U8 | Dtype::BOOL, _) => f64::from(code as u8),
        _ => panic!("the tests do not use {dtype:?}"),
    }
}

/// The stored form of a float, rounded to nearest even.
pub fn encode(dtype: Dtype, value: f32) -> Vec<u8> {
    match (dtype, small(dtype)) {
        (Dtype::F64, _) => f64::from(value).to_le_bytes().to_vec(),
        (Dtype::F32, _) => value.to_le_bytes().to_vec(),
        (_, Some(format)) => format.encode(f64::from(value)).to_le_bytes()[..width(dtype)].to_vec(),
        _ => panic!("{dtype:?} is not a float"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: [Dtype; 4] = [Dtype::F16, Dtype::BF16, Dtype::F8_E4M3, Dtype::F8_E5M2];

    #[test]
    fn known_codes() {
        let cases: [(Dtype, u16, f64); 10] = [
            (Dtype::F16, 0x3c00, 1.0),
            (Dtype::F16, 0x7bff, 65504.0),
            (Dtype::F16, 0x0001, 2f64.powi(-24)),
            (Dtype::BF16, 0x3f80, 1.0),
            (Dtype::BF16, 0xc049, -3.140625),
            (Dtype::F8_E4M3, 0x38, 1.0),
            (Dtype::F8_E4M3, 0x7e, 448.0),
            (Dtype::F8_E4M3, 0x01, 2f64.powi(-9)),
            (Dtype::F8_E5M2, 0x3c, 1.0),
            (Dtype::F8_E5M2, 0x7b, 57344.0),
        ];
        for (dtype, code, value) in cases {
            let bytes = &code.to_le_bytes()[..width(dtype)];
            assert_eq!(decode(dtype, bytes), value, "{dtype:?} {code:#x}");
            assert_eq!(encode(dtype, value as f32), bytes, "{dtype:?} {value}");
        }
    }

    #[test]
    fn every_small_code_survives_a_round_trip() {
        for dtype in SMALL {
            let codes = 1u32 << (8 * width(dtype));
            // A prime stride: enough codes of the 16-bit formats, all of the 8-bit ones.
            for code in (0..codes).step_by(if codes > 256 { 37 } else { 1 }) {
                let bytes = &code.to_le_bytes()[..width(dtype)];
                let value = decode(dtype, bytes);
                if value.is_finite() {
                    assert_eq!(encode(dtype, value as f32), bytes, "{dtype:?} {code:#x}");
                }
            }
        }
    }

    #[test]
    fn rounding_goes_to_the_nearest_and_ties_to_even() {
        let one = 1.0f32;
        for (value, expected) in [
            (one + 2f32.powi(-9), 0x3f80u16),    // below half a step
            (one + 2f32.powi(-8), 0x3f80),       // half a step, even below
            (one + 3.0 * 2f32.powi(-8), 0x3f82), // half a step, even above
            (one + 2f32.powi(-8) + 2f32.powi(-20), 0x3f81),
            (-0.0, 0x8000),
        ] {
            assert_eq!(encode(Dtype::BF16, value), expected.to_le_bytes(), "{value}");
        }
    }
}
