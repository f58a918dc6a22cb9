//! Counting keys around a threshold: histograms of a range of them, and lists of the few between two bounds.
//!
//! - Entries that matter are rare or all alike, and where they are is not predictable. So blocks that hold some are noted
//!   without a branch first, and visited afterwards.
//! - The same rules as in `body.rs`: always inlined, only integers are summed over elements.
//!
//! It does not know what the bounds mean.

use super::body::LANES;
use super::convert::{key, mask};
use super::{NO_KEY, Near, STRAY};

/// Blocks of [`LANES`] that are gone through before what was found in them is visited.
const MARKED: usize = 32;

#[inline(always)]
pub(super) fn histogram(tau: &[f32], low: u32, shift: u32, common: u32, bins: &mut [u64]) -> u64 {
    // In u64 because the range may end above every key; how far above makes no difference.
    let end = ((bins.len() as u64) << shift).saturating_add(u64::from(low)).min(1 << 31);
    let end = (end as u32).max(low);
    let width = end - low;
    // Keys below `low` wrap to offsets beyond any width.
    let common = if common.wrapping_sub(low) < width { common } else { NO_KEY };
    let (mut above_total, mut common_total) = (0, 0);
    for stretch in tau.chunks(MARKED * LANES) {
        let (blocks, tail) = stretch.as_chunks::<LANES>();
        let mut marked = Marked::default();
        let (mut above, mut at_common) = (0, 0);
        for tau in &stretch[..blocks.len() * LANES] {
            above += mask(key(*tau) >= end) & 1;
            at_common += mask(key(*tau) == common) & 1;
        }
        above_total += u64::from(above);
        common_total += u64::from(at_common);
        marked.note(blocks, low, width, common);
        for block in marked.iter().map(|index| &blocks[index]) {
            let mut found = bits_within(block, low, width, common);
            // A wide range holds nearly every block whole, a narrow one a few entries of most blocks.
            if found == u64::MAX {
                for tau in block {
                    count_offset(key(*tau) - low, 1, shift, bins);
                }
                continue;
            }
            while found != 0 {
                count_offset(key(block[found.trailing_zeros() as usize]) - low, 1, shift, bins);
                found &= found - 1;
            }
        }
        for key in tail.iter().copied().map(key) {
            above_total += u64::from(key >= end);
            if key.wrapping_sub(low) < width {
                count_offset(key - low, 1, shift, bins);
            }
        }
    }
    if common_total > 0 {
        count_offset(common - low, common_total, shift, bins);
    }
    above_total
}

#[inline(always)]
pub(super) fn collect(tau: &[f32], low: u32, high: u32, between: &mut [u32]) -> Near {
    let mut near = Near::default();
    // Keys up to `low` wrap to offsets beyond any width.
    let first = low + 1;
    let width = high.saturating_sub(first);
    let mut list = |near: &mut Near, key: u32| {
        if let Some(slot) = between.get_mut(near.between as usize) {
            *slot = key;
        }
        near.between += 1;
    };
    for stretch in tau.chunks(MARKED * LANES) {
        let (blocks, tail) = stretch.as_chunks::<LANES>();
        let mut marked = Marked::default();
        let (mut above, mut at_high, mut at_low) = (0, 0, 0);
        for tau in &stretch[..blocks.len() * LANES] {
            let key = key(*tau);
            above += mask(key > high) & 1;
            at_high += mask(key == high) & 1;
            at_low += mask(key == low) & 1;
        }
        near.above += u64::from(above);
        near.at_high += u64::from(at_high);
        near.at_low += u64::from(at_low);
        marked.note(blocks, first, width, NO_KEY);
        for block in marked.iter().map(|index| &blocks[index]) {
            let mut found = bits_within(block, first, width, NO_KEY);
            while found != 0 {
                list(&mut near, key(block[found.trailing_zeros() as usize]));
                found &= found - 1;
            }
        }
        for key in tail.iter().copied().map(key) {
            near.above += u64::from(key > high);
            near.at_high += u64::from(key == high);
            near.at_low += u64::from(key == low);
            if key.wrapping_sub(first) < width {
                list(&mut near, key);
            }
        }
    }
    near
}

/// Blocks that hold something to visit, in order. Noted without a branch: which ones they are is not predictable.
#[derive(Default)]
struct Marked {
    indices: [u8; MARKED],
    noted: usize,
}

impl Marked {
    /// Notes the blocks with a key less than `width` above `first`, other than `common`.
    #[inline(always)]
    fn note(&mut self, blocks: &[[f32; LANES]], first: u32, width: u32, common: u32) {
        for (index, block) in (0..).zip(blocks) {
            let mut any = 0;
            for tau in block {
                let key = key(*tau);
                // A sum, because what collects flags of two conditions is not vectorised.
                any += mask(key.wrapping_sub(first) < width) & mask(key != common) & 1;
            }
            self.indices[self.noted] = index;
            self.noted += usize::from(any != 0);
        }
    }

    #[inline(always)]
    fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.indices[..self.noted].iter().map(|&index| usize::from(index))
    }
}

/// The keys of a block that lie less than `width` above `first` and are not `common`, as the bits of a word.
#[inline(always)]
fn bits_within(block: &[f32; LANES], first: u32, width: u32, common: u32) -> u64 {
    let mut flags = [0u8; LANES];
    for (flag, value) in flags.iter_mut().zip(block) {
        let key = key(*value);
        *flag = u8::from(key.wrapping_sub(first) < width) & u8::from(key != common);
    }
    // The product brings flag i of eight, which is bit 8i, to bit 56 + i: 8i + 7(8 - i).
    let bits = |eight: &[u8; 8]| u64::from_le_bytes(*eight).wrapping_mul(0x0102_0408_1020_4080) >> 56;
    flags.as_chunks::<8>().0.iter().rev().fold(0, |found, eight| found << 8 | bits(eight))
}

/// Counts a key by its distance from the first bin's first key, and marks a bin in which it is not the first.
#[inline(always)]
fn count_offset(offset: u32, times: u64, shift: u32, bins: &mut [u64]) {
    let bin = &mut bins[(offset >> shift) as usize];
    let stray = offset & ((1 << shift) - 1) != 0;
    *bin = (*bin + times) | (u64::from(stray) * STRAY);
}
