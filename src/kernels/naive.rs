//! The equations as the paper and the format standards write them: f64, one element at a time.
//!
//! The oracle of the kernels' tests, so it shares no code with them and is meant to be obvious, not fast. A column is
//! one position of every task vector: `column[t]` = τ_t. It does not know about slices, bytes or bit tricks.

use crate::dtype::Float;

/// The parameters of a small float: bits of exponent and mantissa, and which codes are special.
struct Format {
    exponent_bits: u32,
    mantissa_bits: u32,
    /// The largest finite code.
    max: u64,
    /// The infinity, if there is one.
    infinity: Option<u64>,
    nan: u64,
}

fn format(float: Float) -> Format {
    let (exponent_bits, mantissa_bits, max, infinity, nan) = match float {
        Float::F16 => (5, 10, 0x7bff, Some(0x7c00), 0x7e00),
        Float::BF16 => (8, 7, 0x7f7f, Some(0x7f80), 0x7fc0),
        Float::E4M3 => (4, 3, 0x7e, None, 0x7f),
        Float::E5M2 => (5, 2, 0x7b, Some(0x7c), 0x7e),
        Float::F32 => (8, 23, 0x7f7f_ffff, Some(0x7f80_0000), 0x7fc0_0000),
        Float::F64 => (11, 52, 0x7fef_ffff_ffff_ffff, Some(0x7ff0_0000_0000_0000), 0x7ff8_0000_0000_0000),
    };
    Format { exponent_bits, mantissa_bits, max, infinity, nan }
}

/// The value of a code without sign if its exponent were not special: (1 + m / 2^M) 2^(e - bias), or m / 2^M 2^(1 - bias).
fn unbounded(format: &Format, code: u64) -> f64 {
    let bias = (1i32 << (format.exponent_bits - 1)) - 1;
    let exponent = (code >> format.mantissa_bits) as i32;
    let steps = (1u64 << format.mantissa_bits) as f64;
    let fraction = (code & ((1 << format.mantissa_bits) - 1)) as f64 / steps;
    if exponent == 0 { fraction * 2f64.powi(1 - bias) } else { (1.0 + fraction) * 2f64.powi(exponent - bias) }
}

/// The value of a stored code of at most 32 bits.
pub fn decode(float: Float, code: u64) -> f64 {
    let format = format(float);
    let sign_bit = 1 << (format.exponent_bits + format.mantissa_bits);
    let sign = if code & sign_bit != 0 { -1.0 } else { 1.0 };
    let magnitude = code & (sign_bit - 1);
    if magnitude <= format.max {
        sign * unbounded(&format, magnitude)
    } else if Some(magnitude) == format.infinity {
        sign * f64::INFINITY
    } else {
        f64::NAN
    }
}

/// The code nearest to a value, ties to the even code, and whether a finite value was too large.
pub fn encode(float: Float, value: f64, clamp: bool) -> (u64, bool) {
    let format = format(float);
    if value.is_nan() {
        return (format.nan, false);
    }
    if float == Float::F64 {
        return (value.to_bits(), false);
    }
    let sign = if value.is_sign_negative() { 1 << (format.exponent_bits + format.mantissa_bits) } else { 0 };
    let infinity = format.infinity.map_or(format.nan, |infinity| sign | infinity);
    let size = value.abs();
    if size.is_infinite() {
        return (infinity, false);
    }
    // The last code not above the value, one code beyond the largest being allowed: the next value of an unbounded exponent.
    let (mut below, mut above) = (0, format.max + 2);
    while above - below > 1 {
        let middle = (below + above) / 2;
        if unbounded(&format, middle) <= size {
            below = middle;
        } else {
            above = middle;
        }
    }
    let down = size - unbounded(&format, below);
    let up = unbounded(&format, below + 1) - size;
    let nearest = if down < up || (down == up && below % 2 == 0) { below } else { below + 1 };
    if nearest <= format.max {
        (sign | nearest, false)
    } else if clamp {
        (sign | format.max, true)
    } else {
        (infinity, true)
    }
}

/// sgn(x) in {-1, 0, 1}; 0 for NaN.
pub fn sign(value: f64) -> f64 {
    if value > 0.0 {
        1.0
    } else if value < 0.0 {
        -1.0
    } else {
        0.0
    }
}

/// |τ|, NaN being larger than anything.
pub fn magnitude(tau: f64) -> f64 {
    if tau.is_nan() { f64::INFINITY } else { tau.abs() }
}

/// Trim: τ where it is kept, else 0.
pub fn trim(tau: f64, kept: bool) -> f64 {
    if kept && tau != 0.0 { tau } else { 0.0 }
}

/// γ = sgn(Σ_t w_t τ_t).
pub fn elect_mass(column: &[f64], weights: &[f64]) -> f64 {
    let mut sum = 0.0;
    for t in 0..column.len() {
        sum += weights[t] * column[t];
    }
    sign(sum)
}

/// γ = sgn(#positive - #negative).
pub fn elect_count(column: &[f64]) -> f64 {
    let positive = column.iter().filter(|tau| **tau > 0.0).count();
    let negative = column.iter().filter(|tau| **tau < 0.0).count();
    sign(positive as f64 - negative as f64)
}

/// Whether both signs occur.
pub fn conflict(column: &[f64]) -> bool {
    column.iter().any(|tau| *tau > 0.0) && column.iter().any(|tau| *tau < 0.0)
}

/// A = {t : τ_t ≠ 0 and, with an election, sgn τ_t = γ}.
pub fn members(column: &[f64], gamma: Option<f64>) -> Vec<usize> {
    let all = (0..column.len()).filter(|t| column[*t] != 0.0);
    match gamma {
        Some(gamma) => all.filter(|t| gamma != 0.0 && sign(column[*t]) == gamma).collect(),
        None => all.collect(),
    }
}

/// Σ_A w τ / Σ_A w, or 0.
pub fn mean(column: &[f64], weights: &[f64], gamma: Option<f64>) -> f64 {
    let divisor: f64 = members(column, gamma).iter().map(|t| weights[*t]).sum();
    if divisor == 0.0 { 0.0 } else { sum(column, weights, gamma) / divisor }
}

/// Σ_A w τ.
pub fn sum(column: &[f64], weights: &[f64], gamma: Option<f64>) -> f64 {
    members(column, gamma).iter().map(|t| weights[*t] * column[*t]).fold(0.0, |sum, term| sum + term)
}

/// The first w τ of A with the largest magnitude, or 0.
pub fn max(column: &[f64], weights: &[f64], gamma: Option<f64>) -> f64 {
    let mut best = 0.0f64;
    for t in members(column, gamma) {
        let candidate = weights[t] * column[t];
        if candidate.abs() > best.abs() {
            best = candidate;
        }
    }
    best
}
