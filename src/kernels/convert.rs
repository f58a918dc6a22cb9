//! Stored floats to and from f32, one element at a time, inlined into the kernels' loops.
//!
//! - Widening is exact for every type but f64, which rounds to nearest even (overflow gives an infinity).
//! - Narrowing rounds once, to nearest even. Signed zeros survive; NaN becomes the type's positive quiet NaN.
//! - No branch depends on a value: every special case is computed and selected by a bit mask, so the loops around
//!   these functions vectorise. Nothing depends on how the CPU treats f32 denormals: subnormal codes are widened as
//!   integers and narrowed by adding a power of two whose unit in the last place is the type's smallest step.
//! - All 8- and 16-bit types share one widening and one narrowing ([`Small`]): they differ in four numbers.
//!
//! It does not know about slices, alignment or instruction sets.

/// The magnitude bits of an f32 infinity; everything above is NaN.
pub(super) const INFINITY: u32 = 0x7f80_0000;
/// The f32 NaN that every kernel stores.
const CANONICAL_NAN: u32 = 0x7fc0_0000;

/// All ones where `condition` holds, else zero: the operand of a branch-free select.
#[inline(always)]
pub(super) fn mask(condition: bool) -> u32 {
    u32::from(condition).wrapping_neg()
}

/// `chosen` where `mask` is all ones, `other` where it is zero.
#[inline(always)]
pub(super) fn select(mask: u32, chosen: u32, other: u32) -> u32 {
    (chosen & mask) | (other & !mask)
}

/// `value` where `mask` is all ones, +0.0 where it is zero.
#[inline(always)]
pub(super) fn keep(mask: u32, value: f32) -> f32 {
    f32::from_bits(value.to_bits() & mask)
}

/// The key of a value: its bits without the sign, monotone in magnitude.
#[inline(always)]
pub const fn key(value: f32) -> u32 {
    value.to_bits() & 0x7fff_ffff
}

/// A stored type of `W` little-endian bytes.
pub(super) trait Codec<const W: usize> {
    /// The stored value as f32.
    fn widen(bytes: [u8; W]) -> f32;

    /// The stored value as f64, exactly.
    #[inline(always)]
    fn widen_f64(bytes: [u8; W]) -> f64 {
        f64::from(Self::widen(bytes))
    }

    /// The value as stored, and whether it is finite but too large for the type. Such a value becomes the largest
    /// finite one of its sign with `clamp`, else an infinity (E4M3: NaN).
    fn narrow(value: f32, clamp: bool) -> ([u8; W], bool);

    /// The value as stored, and zero if that holds: all ones if the value is not finite or may be too large.
    #[inline(always)]
    fn narrow_finite(value: f32) -> ([u8; W], u32) {
        let (bytes, overflow) = Self::narrow(value, false);
        (bytes, mask(overflow) | mask(key(value) >= INFINITY))
    }
}

/// IEEE 754 binary64.
pub(super) struct Binary64;
/// IEEE 754 binary32.
pub(super) struct Binary32;
/// IEEE 754 binary16.
pub(super) struct Binary16;
/// The upper half of a binary32.
pub(super) struct BFloat16;
/// OCP E4M3: no infinities, one NaN per sign.
pub(super) struct E4M3;
/// OCP E5M2: the upper half of a binary16.
pub(super) struct E5M2;

impl Codec<8> for Binary64 {
    #[inline(always)]
    fn widen(bytes: [u8; 8]) -> f32 {
        f64::from_le_bytes(bytes) as f32
    }

    #[inline(always)]
    fn widen_f64(bytes: [u8; 8]) -> f64 {
        f64::from_le_bytes(bytes)
    }

    #[inline(always)]
    fn narrow(value: f32, _clamp: bool) -> ([u8; 8], bool) {
        (bytes_of_f64(f64::from(value)), false)
    }
}

impl Codec<4> for Binary32 {
    #[inline(always)]
    fn widen(bytes: [u8; 4]) -> f32 {
        f32::from_le_bytes(bytes)
    }

    #[inline(always)]
    fn narrow(value: f32, _clamp: bool) -> ([u8; 4], bool) {
        let nan = mask(key(value) > INFINITY);
        (select(nan, CANONICAL_NAN, value.to_bits()).to_le_bytes(), false)
    }

    #[inline(always)]
    fn narrow_finite(value: f32) -> ([u8; 4], u32) {
        (value.to_le_bytes(), mask(key(value) >= INFINITY))
    }
}

/// The stored form of an f64: the value itself, or the positive quiet NaN.
#[inline(always)]
pub(super) fn bytes_of_f64(value: f64) -> [u8; 8] {
    let bits = value.to_bits();
    let magnitude = bits & 0x7fff_ffff_ffff_ffff;
    let nan = u64::from(magnitude > 0x7ff0_0000_0000_0000).wrapping_neg();
    ((0x7ff8_0000_0000_0000 & nan) | (bits & !nan)).to_le_bytes()
}

/// A float of one or two bytes: sign, exponent, mantissa.
trait Small {
    /// Explicit mantissa bits.
    const MANTISSA: u32;
    /// Exponent bias.
    const BIAS: u32;
    /// Bits without the sign.
    const SIGN_SHIFT: u32;
    /// The largest finite code.
    const MAX: u32;
    /// What an infinity, or an overflow, becomes.
    const INFINITY: u32;
    /// The canonical NaN; codes above `MAX` other than `INFINITY` are NaN.
    const NAN: u32;
}

impl Small for Binary16 {
    const MANTISSA: u32 = 10;
    const BIAS: u32 = 15;
    const SIGN_SHIFT: u32 = 15;
    const MAX: u32 = 0x7bff;
    const INFINITY: u32 = 0x7c00;
    const NAN: u32 = 0x7e00;
}

impl Small for BFloat16 {
    const MANTISSA: u32 = 7;
    const BIAS: u32 = 127;
    const SIGN_SHIFT: u32 = 15;
    const MAX: u32 = 0x7f7f;
    const INFINITY: u32 = 0x7f80;
    const NAN: u32 = 0x7fc0;
}

impl Small for E4M3 {
    const MANTISSA: u32 = 3;
    const BIAS: u32 = 7;
    const SIGN_SHIFT: u32 = 7;
    const MAX: u32 = 0x7e;
    const INFINITY: u32 = 0x7f;
    const NAN: u32 = 0x7f;
}

impl Small for E5M2 {
    const MANTISSA: u32 = 2;
    const BIAS: u32 = 15;
    const SIGN_SHIFT: u32 = 7;
    const MAX: u32 = 0x7b;
    const INFINITY: u32 = 0x7c;
    const NAN: u32 = 0x7e;
}

/// 2 to the power of minus the position of the last bit of a subnormal of `S`.
const fn steps<S: Small>() -> u32 {
    S::BIAS - 1 + S::MANTISSA
}

/// The f32 of a code of `S`.
#[inline(always)]
fn widen<S: Small>(code: u32) -> f32 {
    let sign = (code >> S::SIGN_SHIFT) << 31;
    let magnitude = code & ((1 << S::SIGN_SHIFT) - 1);
    let shifted = magnitude << (23 - S::MANTISSA);
    if S::BIAS == 127 {
        return f32::from_bits(sign | shifted);
    }
    let rebias = (127 - S::BIAS) << 23;
    let normal = shifted + rebias;
    let step = f32::from_bits((127u32.wrapping_sub(steps::<S>())) << 23);
    let subnormal = (magnitude as i32 as f32) * step;
    let finite = select(mask(magnitude < 1 << S::MANTISSA), subnormal.to_bits(), normal);
    let special = if S::INFINITY == S::NAN { CANONICAL_NAN } else { INFINITY | shifted };
    f32::from_bits(sign | select(mask(magnitude > S::MAX), special, finite))
}

/// The code of `S` nearest to an f32, and the overflow of [`Codec::narrow`].
#[inline(always)]
fn narrow<S: Small>(value: f32, clamp: bool) -> (u32, bool) {
    let magnitude = key(value);
    let sign = (value.to_bits() >> 31) << S::SIGN_SHIFT;
    let shift = 23 - S::MANTISSA;
    // Adding half a step less one, plus one if the last kept bit is odd, carries exactly when nearest-even rounds up.
    let rounded = magnitude + ((1 << (shift - 1)) - 1) + ((magnitude >> shift) & 1);
    let mut code = rounded.wrapping_sub((127 - S::BIAS) << 23) >> shift;
    if S::BIAS != 127 {
        // In the binade of `anchor` one f32 ulp is one subnormal step, so the addition itself rounds to nearest even.
        let anchor = (127 + 23u32).wrapping_sub(steps::<S>()) << 23;
        let subnormal = (f32::from_bits(magnitude) + f32::from_bits(anchor)).to_bits().wrapping_sub(anchor);
        code = select(mask(magnitude < (128 - S::BIAS) << 23), subnormal, code);
    }
    let beyond = code > S::MAX;
    let overflow = beyond & (magnitude < INFINITY);
    let limit = if clamp { S::MAX } else { S::INFINITY };
    code = select(mask(beyond), select(mask(overflow), limit, S::INFINITY), code);
    let nan = mask(magnitude > INFINITY) | mask(code == S::NAN);
    (select(nan, S::NAN, sign | code), overflow)
}

macro_rules! small_codec {
    ($($name:ident: $code:ty, $width:literal;)*) => {$(
        impl Codec<$width> for $name {
            #[inline(always)]
            fn widen(bytes: [u8; $width]) -> f32 {
                widen::<$name>(u32::from(<$code>::from_le_bytes(bytes)))
            }

            #[inline(always)]
            fn narrow(value: f32, clamp: bool) -> ([u8; $width], bool) {
                let (code, overflow) = narrow::<$name>(value, clamp);
                ((code as $code).to_le_bytes(), overflow)
            }
        }
    )*};
}

impl Codec<2> for BFloat16 {
    #[inline(always)]
    fn widen(bytes: [u8; 2]) -> f32 {
        widen::<Self>(u32::from(u16::from_le_bytes(bytes)))
    }

    #[inline(always)]
    fn narrow(value: f32, clamp: bool) -> ([u8; 2], bool) {
        let (code, overflow) = narrow::<Self>(value, clamp);
        ((code as u16).to_le_bytes(), overflow)
    }

    #[inline(always)]
    fn narrow_finite(value: f32) -> ([u8; 2], u32) {
        (((Self::round(value) >> 16) as u16).to_le_bytes(), mask(key(value) >= Self::BEYOND))
    }
}

impl BFloat16 {
    /// The smallest key that rounds beyond the largest finite value.
    pub(super) const BEYOND: u32 = 0x7f7f_8000;

    /// The bits of a value whose key is below [`Self::BEYOND`], the upper half rounded to nearest even.
    #[inline(always)]
    pub(super) fn round(value: f32) -> u32 {
        // A half rounds up where the bit above it is set. The carry cannot reach the sign below the limit.
        value.to_bits().wrapping_add(0x7fff + ((value.to_bits() >> 16) & 1))
    }
}

small_codec! {
    Binary16: u16, 2;
    E4M3: u8, 1;
    E5M2: u8, 1;
}

/// Evaluates an expression with `$codec` standing for the [`Codec`] of a [`crate::dtype::Float`].
macro_rules! with_codec {
    ($float:expr, $codec:ident => $body:expr) => {
        match $float {
            $crate::dtype::Float::F64 => {
                type $codec = $crate::kernels::convert::Binary64;
                $body
            }
            $crate::dtype::Float::F32 => {
                type $codec = $crate::kernels::convert::Binary32;
                $body
            }
            $crate::dtype::Float::F16 => {
                type $codec = $crate::kernels::convert::Binary16;
                $body
            }
            $crate::dtype::Float::BF16 => {
                type $codec = $crate::kernels::convert::BFloat16;
                $body
            }
            $crate::dtype::Float::E4M3 => {
                type $codec = $crate::kernels::convert::E4M3;
                $body
            }
            $crate::dtype::Float::E5M2 => {
                type $codec = $crate::kernels::convert::E5M2;
                $body
            }
        }
    };
}
pub(super) use with_codec;
