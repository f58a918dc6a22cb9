//! One chunk of a packed tensor: which elements are stored, and their bytes.
//!
//! - A bitmap says which elements are stored (bit i of a chunk is bit i mod 8 of byte i / 8); the others are base's.
//! - Where there is a base, an element is stored as its distance from base's: the difference of their bits as integers, modulo
//!   2^bits, with the sign in the lowest bit (zigzag). Floats that are close have bits that are close, so most of it is zeros.
//! - The bytes of what is stored are split into planes, the most significant byte of each element first: the upper ones
//!   compress well, the lowest hardly, and apart neither disturbs the other.
//! - Bitmap and planes are a zstd frame each, one after the other. Where every element is stored there is no bitmap, and
//!   where none is there is nothing.
//!
//! Knows elements of 1 to 8 bytes; not what they mean, nor where chunks are kept.

use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::{compress_bound, get_frame_content_size};

use crate::error::{Error, Result};

/// Elements of a chunk; the last one of a tensor may have fewer.
pub const CHUNK: usize = 1 << 18;
/// Higher levels gain 2 % at most, for several times the work.
const LEVEL: i32 = 1;
/// What zstd holds for compressing, and for decompressing, at this level.
const ZSTD_BYTES: u64 = 2_000_000;

/// The first 8 bytes of the BLAKE3 of `bytes`.
pub fn checksum(bytes: &[u8]) -> u64 {
    let hash = blake3::hash(bytes);
    let (first, _) = hash.as_bytes().split_first_chunk::<8>().expect("a hash has 32 bytes");
    u64::from_le_bytes(*first)
}

/// Bytes of a chunk of `elements` elements of `width` bytes, `stored` of which are stored, before compression.
pub fn content_bytes(elements: usize, stored: usize, width: usize) -> usize {
    let bitmap = if stored == 0 || stored == elements { 0 } else { elements.div_ceil(8) };
    bitmap + stored * width
}

/// Most bytes that such a chunk takes when it is compressed.
pub fn compressed_bytes_max(elements: usize, stored: usize, width: usize) -> usize {
    let bitmap = content_bytes(elements, stored, width) - stored * width;
    compress_bound(bitmap) + width * compress_bound(stored)
}

/// Compresses chunks. Its buffers are allocated once.
pub struct Encoder {
    zstd: Compressor<'static>,
    planes: Vec<u8>,
    bitmap: Vec<u8>,
    out: Vec<u8>,
}

impl Encoder {
    /// For elements of up to `width` bytes.
    pub fn new(width: usize) -> Result<Self> {
        let zstd = Compressor::new(LEVEL).map_err(|e| Error::failed(format!("zstd: {e}")))?;
        let out = vec![0; compress_bound(CHUNK / 8) + width * compress_bound(CHUNK)];
        Ok(Self { zstd, planes: vec![0; CHUNK * width], bitmap: vec![0; CHUNK / 8], out })
    }

    /// Memory that it holds, in bytes.
    pub fn held_bytes(width: usize) -> u64 {
        (CHUNK / 4 + width * (CHUNK + compress_bound(CHUNK))) as u64 + ZSTD_BYTES
    }

    /// The compressed chunk that stores those of `values` (elements of `width` bytes) whose bit in `mask` is set, as
    /// distances from `base` if there is one, and how many these are.
    pub fn encode(&mut self, values: &[u8], base: Option<&[u8]>, width: usize, mask: &[u64]) -> Result<(&[u8], u32)> {
        let elements = values.len() / width;
        let stored = mask.iter().map(|word| word.count_ones() as usize).sum::<usize>();
        let planes = &mut self.planes[..stored * width];
        match width {
            1 => gather::<1>(values, base, mask, planes),
            2 => gather::<2>(values, base, mask, planes),
            4 => gather::<4>(values, base, mask, planes),
            _ => gather::<8>(values, base, mask, planes),
        }
        let mut length = 0;
        if stored > 0 && stored < elements {
            for (bytes, word) in self.bitmap.chunks_mut(8).zip(mask) {
                bytes.copy_from_slice(&word.to_le_bytes()[..bytes.len()]);
            }
            length += compress(&mut self.zstd, &self.bitmap[..elements.div_ceil(8)], &mut self.out)?;
        }
        for plane in planes.chunks(stored.max(1)) {
            length += compress(&mut self.zstd, plane, &mut self.out[length..])?;
        }
        Ok((&self.out[..length], stored as u32))
    }
}

fn compress(zstd: &mut Compressor<'_>, part: &[u8], out: &mut [u8]) -> Result<usize> {
    zstd.compress_to_buffer(part, out).map_err(|e| Error::failed(format!("zstd: {e}")))
}

/// A value as its distance from base's, the sign in the lowest bit; in the lowest `bits` bits.
#[inline(always)]
fn distance(value: u64, base: u64, bits: u32) -> u64 {
    let (unused, difference) = (64 - bits, value.wrapping_sub(base));
    let signed = (difference << unused) as i64 >> unused;
    ((signed << 1) ^ (signed >> 63)) as u64
}

/// The value at a distance from base's, in the lowest bits.
#[inline(always)]
fn at_distance(distance: u64, base: u64) -> u64 {
    base.wrapping_add((distance >> 1) ^ (distance & 1).wrapping_neg())
}

/// The integer that little-endian bytes are.
#[inline(always)]
fn integer<const W: usize>(bytes: [u8; W]) -> u64 {
    let mut whole = [0; 8];
    whole[..W].copy_from_slice(&bytes);
    u64::from_le_bytes(whole)
}

/// Splits the elements whose bit is set into planes.
fn gather<const W: usize>(values: &[u8], base: Option<&[u8]>, mask: &[u64], planes: &mut [u8]) {
    let stored = planes.len() / W;
    let (values, _) = values.as_chunks::<W>();
    let base = base.map(|base| base.as_chunks::<W>().0);
    let mut at = 0;
    for (first, (block, &word)) in (0..).step_by(64).zip(values.chunks(64).zip(mask)) {
        let mut bits = word;
        while bits != 0 {
            let place = bits.trailing_zeros() as usize;
            let value = match base {
                Some(base) => distance(integer(block[place]), integer(base[first + place]), 8 * W as u32),
                None => integer(block[place]),
            };
            for (plane, byte) in value.to_le_bytes()[..W].iter().rev().enumerate() {
                planes[plane * stored + at] = *byte;
            }
            at += 1;
            bits &= bits - 1;
        }
    }
}

/// Decompresses chunks. Its buffers are allocated as they are needed, up to those of a whole chunk.
pub struct Decoder {
    zstd: Decompressor<'static>,
    /// For the compressed chunk: filled by whoever calls.
    pub compressed: Vec<u8>,
    content: Vec<u8>,
}

impl Decoder {
    /// One without buffers.
    pub fn new() -> Result<Self> {
        let zstd = Decompressor::new().map_err(|e| Error::failed(format!("zstd: {e}")))?;
        Ok(Self { zstd, compressed: Vec::new(), content: Vec::new() })
    }

    /// Memory that one needs for chunks of up to these sizes, in bytes.
    pub fn held_bytes(compressed: usize, content: usize) -> u64 {
        (compressed + content) as u64 + ZSTD_BYTES
    }

    /// Puts the `stored` elements of the compressed chunk into their places in `out`, which holds base's elements of
    /// `width` bytes if they are stored as distances from it; false if the chunk is not one of so many.
    pub fn apply(&mut self, stored: usize, width: usize, delta: bool, out: &mut [u8]) -> bool {
        let elements = out.len() / width;
        if stored == 0 {
            return self.compressed.is_empty();
        }
        let length = content_bytes(elements, stored, width);
        if self.content.len() < length {
            self.content.resize(length, 0);
        }
        // A bitmap comes first, or a plane: a short chunk could have as many bytes either way.
        let first = if length > stored * width { length - stored * width } else { stored };
        if !matches!(get_frame_content_size(&self.compressed), Ok(Some(found)) if found == first as u64) {
            return false;
        }
        let content = &mut self.content[..length];
        if !self.zstd.decompress_to_buffer(&self.compressed, content).is_ok_and(|found| found == length) {
            return false;
        }
        let (bitmap, planes) = content.split_at(length - stored * width);
        if !bitmap.is_empty() {
            let count: usize = bitmap.iter().map(|byte| byte.count_ones() as usize).sum();
            let beyond = bitmap.last().is_some_and(|&last| u32::from(last) >> ((elements - 1) % 8 + 1) != 0);
            if count != stored || beyond {
                return false;
            }
        }
        match width {
            1 => scatter::<1>(bitmap, planes, delta, out),
            2 => scatter::<2>(bitmap, planes, delta, out),
            4 => scatter::<4>(bitmap, planes, delta, out),
            _ => scatter::<8>(bitmap, planes, delta, out),
        }
        true
    }
}

/// Puts elements back together and in their places.
fn scatter<const W: usize>(bitmap: &[u8], planes: &[u8], delta: bool, out: &mut [u8]) {
    let stored = planes.len() / W;
    let (out, _) = out.as_chunks_mut::<W>();
    let put = |at: usize, out: &mut [u8; W]| {
        let value = integer::<W>(std::array::from_fn(|byte| planes[(W - 1 - byte) * stored + at]));
        let value = if delta { at_distance(value, integer(*out)) } else { value };
        out.copy_from_slice(&value.to_le_bytes()[..W]);
    };
    if bitmap.is_empty() {
        out.iter_mut().enumerate().for_each(|(at, out)| put(at, out));
        return;
    }
    let mut at = 0;
    for (block, bytes) in out.chunks_mut(64).zip(bitmap.chunks(8)) {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        let mut bits = u64::from_le_bytes(word);
        while bits != 0 {
            put(at, &mut block[bits.trailing_zeros() as usize]);
            at += 1;
            bits &= bits - 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Elements, a base, and which of the elements are stored.
    fn chunk() -> impl Strategy<Value = (usize, Vec<u8>, Vec<u8>, Vec<u64>)> {
        (prop::sample::select(vec![1usize, 2, 4, 8]), 0usize..300, any::<u64>(), 0u32..4).prop_map(
            |(width, elements, seed, share)| {
                let mut state = seed;
                let mut next = || {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (state >> 33) as u8
                };
                let values: Vec<u8> = (0..elements * width).map(|_| next()).collect();
                let base: Vec<u8> = (0..elements * width).map(|_| next()).collect();
                let mut mask = vec![0u64; elements.div_ceil(64)];
                for i in 0..elements {
                    let set = u32::from(next() % 4) < share || share == 3;
                    mask[i / 64] |= u64::from(set) << (i % 64);
                }
                (width, values, base, mask)
            },
        )
    }

    #[test]
    fn distances_are_small_where_values_are_close() {
        for (value, base, bits, expected) in [
            (0x3f80, 0x3f80, 16, 0),
            (0x3f81, 0x3f80, 16, 2),
            (0x3f7f, 0x3f80, 16, 1),
            (0, 0xffff, 16, 2),
            (0x8000, 0, 16, 0xffff),
            (0, u64::MAX, 64, 2),
            (5, 3, 8, 4),
        ] {
            assert_eq!(distance(value, base, bits), expected);
            let mask = u64::MAX >> (64 - bits);
            assert!(expected <= mask && at_distance(expected, base) & mask == value);
        }
    }

    proptest! {
        #[test]
        fn what_is_stored_comes_back_and_the_rest_is_base(
            (width, values, base, mask) in chunk(), delta in any::<bool>(),
        ) {
            let mut encoder = Encoder::new(8).unwrap();
            let (compressed, stored) = encoder.encode(&values, delta.then_some(&base[..]), width, &mask).unwrap();
            let elements = values.len() / width;
            prop_assert!(compressed.len() <= compressed_bytes_max(elements, stored as usize, width));
            let mut decoder = Decoder::new().unwrap();
            decoder.compressed = compressed.to_vec();
            let mut out = base.clone();
            prop_assert!(decoder.apply(stored as usize, width, delta, &mut out));
            for i in 0..elements {
                let from = if mask[i / 64] >> (i % 64) & 1 == 1 { &values } else { &base };
                prop_assert_eq!(&out[i * width..(i + 1) * width], &from[i * width..(i + 1) * width]);
            }
            // Another count is never taken for right.
            prop_assert!(!decoder.apply(stored as usize + 1, width, delta, &mut out));
        }

        #[test]
        fn damage_never_panics((width, values, _, mask) in chunk(), place in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let mut encoder = Encoder::new(8).unwrap();
            let (compressed, stored) = encoder.encode(&values, None, width, &mask).unwrap();
            let mut decoder = Decoder::new().unwrap();
            decoder.compressed = compressed.to_vec();
            if !decoder.compressed.is_empty() {
                let place = place.index(decoder.compressed.len());
                decoder.compressed[place] ^= byte;
            }
            let mut out = vec![0; values.len()];
            let _ = decoder.apply(stored as usize, width, true, &mut out);
        }
    }
}
