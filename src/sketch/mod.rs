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
//! - [`BlockCounts`]: tells whether a sample is enough to know the key itself, because so many entries have it.

mod near;
mod probe;
mod select;

pub use near::NearKeys;
pub use probe::{BlockCounts, Probe, Standing, bounds_of_sample, guess_of_sample};
pub use select::{Selector, Threshold, select_in_place};

use crate::kernels::{self, Isa, NO_KEY, STRAY};
use crate::limits::{SKETCH_BINS_MAX, SKETCH_BINS_MIN};

/// Key bits below the coarse bin.
const COARSE_SHIFT: u32 = 15;
/// Bytes of an encoded sketch before its bins.
const HEAD_BYTES: usize = 32;
/// No sketch that was encoded has as many values: whatever bytes are decoded, sums of sketches fit.
const TOO_MANY: u64 = 1 << 56;
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

    /// No keys at all.
    pub const NONE: Self = Self { low: 0, shift: 0, bins: 0 };

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

    /// What it counts in.
    pub fn bracket(&self) -> Bracket {
        self.bracket
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

    /// Values with keys above the bracket, and those in its first bin.
    pub fn above_and_first(&self) -> (u64, u64) {
        (self.above, self.bins.first().map_or(0, |&bin| count(bin)))
    }

    /// The key that most values inside the bracket have, if its bins are single keys.
    pub fn mode(&self) -> Option<u32> {
        let most = self.bins.iter().enumerate().max_by_key(|(_, bin)| count(**bin))?;
        (self.bracket.shift == 0 && count(*most.1) > 0).then(|| self.bracket.keys(most.0).0)
    }

    /// Adds the counts of a sketch with the same bracket.
    pub fn merge(&mut self, other: &Self) {
        assert_eq!(self.bracket, other.bracket, "only sketches of one bracket can be added");
        self.above += other.above;
        for (mine, theirs) in self.bins.iter_mut().zip(&other.bins) {
            *mine = (count(*mine) + count(*theirs)) | ((*mine | *theirs) & STRAY);
        }
    }

    /// Its bytes, for a file: bracket, count above, and the bins compressed with zstd.
    pub fn encode(&self) -> Vec<u8> {
        let bins: Vec<u8> = self.bins.iter().flat_map(|bin| bin.to_le_bytes()).collect();
        let (stored, plain) = match zstd::bulk::compress(&bins, 1) {
            Ok(compressed) if compressed.len() < bins.len() => (compressed, false),
            _ => (bins, true),
        };
        let mut bytes = Vec::with_capacity(HEAD_BYTES + stored.len());
        bytes.extend(self.bracket.low.to_le_bytes());
        bytes.extend((self.bracket.shift << 1 | u32::from(plain)).to_le_bytes());
        bytes.extend((self.bins.len() as u64).to_le_bytes());
        bytes.extend(self.above.to_le_bytes());
        bytes.extend((stored.len() as u64).to_le_bytes());
        bytes.extend(stored);
        bytes
    }

    /// Takes an encoded sketch off the front of `bytes`; `None` if there is none.
    pub fn decode(bytes: &mut &[u8]) -> Option<Self> {
        fn word<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
            let (word, rest) = bytes.split_first_chunk::<N>()?;
            *bytes = rest;
            Some(*word)
        }
        let low = u32::from_le_bytes(word(bytes)?);
        let shift = u32::from_le_bytes(word(bytes)?);
        let (shift, plain) = (shift >> 1, shift & 1 == 1);
        let bins = usize::try_from(u64::from_le_bytes(word(bytes)?)).ok().filter(|&bins| bins <= SKETCH_BINS_MAX)?;
        let above = u64::from_le_bytes(word(bytes)?);
        let length = usize::try_from(u64::from_le_bytes(word(bytes)?)).ok()?;
        let (stored, rest) = bytes.split_at_checked(length)?;
        *bytes = rest;
        let unpacked;
        let raw = if plain {
            stored
        } else {
            unpacked = zstd::bulk::decompress(stored, bins * 8).ok()?;
            &unpacked
        };
        let (words, []) = raw.as_chunks::<8>() else { return None };
        let words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
        let bracket = Bracket { low, shift, bins };
        let last = u64::from(low) + ((bins as u64).saturating_sub(1) << shift.min(31));
        let sound = words.len() == bins && shift < 32 && last < KEYS;
        let sketch = Self { bracket, common: NO_KEY, seen: 0, above, bins: words };
        (sound && sketch.total().is_some_and(|total| total < TOO_MANY)).then_some(sketch)
    }

    /// Values counted; `None` if they are more than can be counted.
    pub fn total(&self) -> Option<u64> {
        self.bins.iter().try_fold(self.above, |sum, &bin| sum.checked_add(count(bin)))
    }

    /// Whether `other` counts in the same bracket, so that both can be added.
    pub fn fits(&self, other: &Self) -> bool {
        self.bracket == other.bracket
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mode_is_the_most_common_key_of_single_key_bins() {
        let key = 1.0f32.to_bits();
        let mut sketch = MagnitudeSketch::new(Bracket::over(key, u64::from(key) + 100, 100));
        let values = [0, 7, 7, 9, 1000].map(|above| f32::from_bits(key + above));
        assert_eq!(sketch.mode(), None, "nothing counted");
        sketch.add(Isa::detect(), &values);
        assert_eq!(sketch.mode(), Some(key + 7));
        assert_eq!(sketch.above_and_first(), (1, 1));
        let mut coarse = MagnitudeSketch::new(Bracket::COARSE);
        coarse.add(Isa::detect(), &values);
        assert_eq!(coarse.mode(), None, "bins of many keys");
    }

    #[test]
    #[cfg_attr(miri, ignore = "zstd is written in C")]
    fn counts_whose_sum_does_not_fit_are_not_decoded() {
        let bracket = Bracket::over(8, 10, 2);
        for (above, bins, sound) in [
            (TOO_MANY - 3, [1, 1 | STRAY], true),
            (TOO_MANY - 2, [1, 1], false),
            (u64::MAX, [0, 0], false),
            (0, [!STRAY, 0], false),
            (u64::MAX, [u64::MAX; 2], false),
        ] {
            let sketch = MagnitudeSketch { above, bins: bins.to_vec(), ..MagnitudeSketch::new(bracket) };
            let found = MagnitudeSketch::decode(&mut &sketch.encode()[..]);
            assert_eq!(found.is_some(), sound, "{above} {bins:?}");
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "zstd is written in C")]
    fn what_is_encoded_is_decoded_and_nothing_else() {
        let mut sketch = MagnitudeSketch::new(Bracket::over(0x3a00_0000, 0x3a00_4000, 1 << 20));
        let values: Vec<f32> = (0..5000u32).map(|i| f32::from_bits(0x3a00_0000 + i * 7)).collect();
        sketch.add(Isa::detect(), &values);
        let empty = MagnitudeSketch::new(Bracket::NONE);
        let coarse = MagnitudeSketch::new(Bracket::COARSE);
        let bytes: Vec<u8> = [&sketch, &empty, &coarse].iter().flat_map(|sketch| sketch.encode()).collect();
        let mut rest = &bytes[..];
        for expected in [&sketch, &empty, &coarse] {
            let found = MagnitudeSketch::decode(&mut rest).unwrap();
            let parts = |sketch: &MagnitudeSketch| (sketch.bracket, sketch.above, sketch.bins.clone());
            assert_eq!(parts(&found), parts(expected));
        }
        assert!(rest.is_empty() && MagnitudeSketch::decode(&mut rest).is_none());
        let one = sketch.encode();
        for length in 0..one.len() {
            assert!(MagnitudeSketch::decode(&mut &one[..length]).is_none(), "cut off at {length}");
        }
    }
}
