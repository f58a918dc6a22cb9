//! From a merged task vector to stored elements, for what is merged once and multiplied by many factors.
//!
//! Operations and their order are those of `scale`, `add` and `store` one after the other, so the bytes are the same.

use super::convert::{Codec, key, with_codec};
use crate::dtype::Float;

#[inline(always)]
pub(super) fn store_scaled(float: Float, base: &[u8], tau: &[f32], lambda: f32, out: &mut [u8]) -> bool {
    #[inline(always)]
    fn store<C: Codec<W>, const W: usize>(base: &[u8], tau: &[f32], lambda: f32, out: &mut [u8]) -> bool {
        // Counted, because the compiler does not vectorise a loop that collects flags.
        let mut beyond = 0u32;
        for ((base, tau), out) in base.as_chunks::<W>().0.iter().zip(tau).zip(out.as_chunks_mut::<W>().0) {
            let (bytes, found) = C::narrow_finite(tau * lambda + C::widen(*base));
            *out = bytes;
            beyond += found & 1;
        }
        beyond == 0
    }
    // Elements of more digits than f32 are added up in f64.
    float != Float::F64 && with_codec!(float, C => store::<C, _>(base, tau, lambda, out))
}

#[inline(always)]
pub(super) fn key_range(values: &[f32]) -> (u32, u32) {
    let (mut least, mut greatest) = (u32::MAX, 0);
    for &value in values {
        // Zero comes last.
        least = least.min(key(value).wrapping_sub(1));
        greatest = greatest.max(key(value));
    }
    (least.wrapping_add(1), greatest)
}
