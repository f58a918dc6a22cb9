//! Magnitude sketches and the selection of trim thresholds from them.
//!
//! The key of an f32 is its bit pattern without the sign: unsigned order of keys is order of magnitudes, so a threshold
//! is a key and counting keys is exact, order-free and bounded.
//!
//! - [`MagnitudeSketch`]: counts of keys in a [`Bracket`] (a key range cut into equal bins) and above it. Two sketches
//!   of the same bracket merge by addition, in any order.
//! - [`Selector`]: finds the k-th largest key from a sequence of sketches, each over all the data: exact, with as few
//!   looks as the first bracket's luck allows.
//! - [`NearKeys`]: the same for data in memory, where the few keys near the threshold can be listed.
//! - [`Probe`]: places that first bracket from a sample, so that one look at the data is enough.

mod near;
mod probe;
mod select;

pub use near::NearKeys;
pub use probe::{Probe, bounds_of_sample};
pub use select::{Selector, Threshold, select_in_place};

use crate::kernels::{self, Isa, NO_KEY, STRAY};
use crate::limits::SKETCH_BINS_MIN;

/// Key bits below the coarse bin.
const COARSE_SHIFT: u32 = 15;
/// One more than the largest key.
const KEYS: u64 = 1 << 31;

/// A range of keys cut into bins of `2^shift` keys each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bracket {
    /// Smallest key of the first bin.
    pub low: u32,
    /// Log2 of a bin's width.
    pub shift: u32,
    /// Number of bins.
    pub bins: usize,
}

impl Bracket {
    /// From bounds on a threshold, both included, with the narrowest bins that `max_bins` allows; all keys for `None`.
    pub fn within(bounds: Option<(u32, u32)>, max_bins: usize) -> Self {
        bounds.map_or(Self::COARSE, |(low, high)| Self::over(low, u64::from(high) + 1, max_bins))
    }

    /// All keys, 2^15 per bin: about 0.4 % of a magnitude.
    pub const COARSE: Self = Self { low: 0, shift: COARSE_SHIFT, bins: SKETCH_BINS_MIN };

    /// The bracket over keys `[low, end)` with the narrowest bins that `max_bins` allows.
    pub fn over(low: u32, end: u64, max_bins: usize) -> Self {
        debug_assert!(u64::from(low) < end && end <= KEYS);
        let width = end - u64::from(low);
        let mut shift = 0;
        while width.div_ceil(1 << shift) > max_bins as u64 {
            shift += 1;
        }
        Self { low, shift, bins: width.div_ceil(1 << shift) as usize }
    }

    /// One more than the largest key covered.
    pub fn end(&self) -> u64 {
        u64::from(self.low) + ((self.bins as u64) << self.shift)
    }

    /// Keys of bin `bin`: (smallest, largest).
    fn keys(&self, bin: usize) -> (u32, u32) {
        let low = u64::from(self.low) + ((bin as u64) << self.shift);
        (low as u32, (low + (1 << self.shift) - 1).min(KEYS - 1) as u32)
    }
}

/// Values after which it is known which key is common.
const SEEN_ENOUGH: usize = 1 << 17;

/// Counts of keys inside and above a bracket.
#[derive(Debug, Clone)]
pub struct MagnitudeSketch {
    bracket: Bracket,
    /// A key inside the bracket that very many values have, once enough was seen to tell. Only a help: see
    /// [`kernels::histogram`].
    common: u32,
    /// Values taken in before `common` was settled.
    seen: usize,
    above: u64,
    /// Counts, with [`STRAY`] on bins of more than one key. Task vectors between 16-bit checkpoints have few different
    /// magnitudes, so that even wide bins hold a single one.
    bins: Vec<u64>,
}

impl MagnitudeSketch {
    /// An empty sketch.
    pub fn new(bracket: Bracket) -> Self {
        Self { bracket, common: NO_KEY, seen: 0, above: 0, bins: vec![0; bracket.bins] }
    }

    /// Empties the sketch and gives it another bracket, keeping its memory.
    pub fn reset(&mut self, bracket: Bracket) {
        self.bracket = bracket;
        (self.common, self.seen, self.above) = (NO_KEY, 0, 0);
        self.bins.clear();
        self.bins.resize(bracket.bins, 0);
    }

    /// Number of bins.
    pub fn bins(&self) -> usize {
        self.bins.len()
    }

    /// Counts the finite values of `tau`.
    pub fn add(&mut self, isa: Isa, tau: &[f32]) {
        let Bracket { low, shift, .. } = self.bracket;
        self.above += kernels::histogram(isa, tau, low, shift, self.common, &mut self.bins);
        if self.seen < SEEN_ENOUGH {
            self.seen += tau.len();
            if self.seen >= SEEN_ENOUGH {
                self.common = self.most_common();
            }
        }
    }

    /// The key that most values inside the bracket have, if they are worth counting apart: more than one in a hundred of
    /// all, where the bracket holds but a few of them. Differences of 16-bit weights have such keys.
    fn most_common(&self) -> u32 {
        let inside: u64 = self.bins.iter().map(|&bin| count(bin)).sum();
        let most = self.bins.iter().enumerate().max_by_key(|(_, bin)| count(**bin));
        let Some((place, &most)) = most else { return NO_KEY };
        let common = most & STRAY == 0 && count(most) * 100 > self.seen as u64 && inside * 4 < self.seen as u64;
        if common { self.bracket.keys(place).0 } else { NO_KEY }
    }

    /// Adds the counts of a sketch with the same bracket.
    pub fn merge(&mut self, other: &Self) {
        assert_eq!(self.bracket, other.bracket, "only sketches of one bracket can be added");
        self.above += other.above;
        for (mine, theirs) in self.bins.iter_mut().zip(&other.bins) {
            *mine = (count(*mine) + count(*theirs)) | ((*mine | *theirs) & STRAY);
        }
    }

    /// The bin that holds the `rank`-th largest value (1-based) and the number of values above that bin.
    fn locate(&self, rank: u64) -> Result<(usize, u64), Miss> {
        if self.above >= rank {
            return Err(Miss::Above);
        }
        let mut above = self.above;
        for (bin, &content) in self.bins.iter().enumerate().rev() {
            if above + count(content) >= rank {
                return Ok((bin, above));
            }
            above += count(content);
        }
        Err(Miss::Below)
    }
}

/// Where a value lies that a bracket does not hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Miss {
    Above,
    Below,
}

/// A bin's count without its mark.
fn count(bin: u64) -> u64 {
    bin & !STRAY
}
