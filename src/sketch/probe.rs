//! Placing a narrow bracket around the k-th largest magnitude from a sample of the data.
//!
//! The sample is taken in blocks (neighbours in a tensor are alike), so its error is not that of independent draws. It
//! is therefore split into [`crate::limits::PROBE_GROUPS`] groups that each see the whole model, and the spread between the groups
//! gives the standard error. A bracket that misses costs another look at the data, never a wrong result.

use super::{Bracket, COARSE_SHIFT, KEYS, MagnitudeSketch, count};
use crate::limits::SKETCH_BINS_MIN;

/// Half width of the bracket in standard errors: with 7 degrees of freedom, a miss in about 10^4.
const SIGMAS: f64 = 8.0;
/// Half width of what a guess has to leave aside, in standard errors: at the worst place, a miss in about 160.
const CERTAIN_SIGMAS: f64 = 2.5;

/// A sample of magnitudes in [`crate::limits::PROBE_GROUPS`] groups.
#[derive(Debug, Clone, Default)]
pub struct Probe {
    groups: Vec<Vec<u32>>,
}

impl Probe {
    /// Adds one group's coarse sketch, which may be empty.
    pub fn add_group(&mut self, sketch: &MagnitudeSketch) {
        assert_eq!(sketch.bracket, Bracket::COARSE, "a probe is made of coarse sketches");
        // A group samples about a thousandth of the data; saturation would only bend a guess.
        self.groups.push(sketch.bins.iter().map(|&n| u32::try_from(count(n)).unwrap_or(u32::MAX)).collect());
    }

    /// The group that is the `last`-th from behind, as it was added: but for what only exact counts say.
    pub fn group(&self, last: usize) -> Option<MagnitudeSketch> {
        let counts = self.groups.get(self.groups.len().checked_sub(last)?)?;
        let bins = counts.iter().map(|&count| u64::from(count)).collect();
        Some(MagnitudeSketch { bins, ..MagnitudeSketch::new(Bracket::COARSE) })
    }

    /// A bracket that holds the value at `fraction` (from the top) of the whole data with high confidence.
    pub fn bracket(&self, fraction: f64, max_bins: usize) -> Bracket {
        let Some([mut low, middle, mut end]) = self.bounds(fraction) else { return Bracket::COARSE };
        // Bins wider than a key make another look certain; a narrower bracket only makes it likelier.
        while (end - low) << COARSE_SHIFT > max_bins && end - low > 1 {
            if end - middle > middle - low + 1 { end -= 1 } else { low += 1 }
        }
        Bracket::over((low as u32) << COARSE_SHIFT, (end as u64) << COARSE_SHIFT, max_bins)
    }

    /// A key that the value at `fraction` (from the top) of the whole data is not below, with the same confidence, however
    /// narrow a bracket had to be.
    pub fn least(&self, fraction: f64) -> u32 {
        self.bounds(fraction).map_or(0, |[low, ..]| (low as u32) << COARSE_SHIFT)
    }

    /// The keys of the coarse bin that the value at `fraction` (from the top) of the sample is in.
    pub fn bin(&self, fraction: f64) -> Option<Bracket> {
        let [_, middle, _] = self.bounds(fraction)?;
        let key = |bin: usize| (bin as u64) << COARSE_SHIFT;
        Some(Bracket::over(key(middle) as u32, key(middle + 1), 1 << COARSE_SHIFT))
    }

    /// The coarse bins about the value at `fraction`: the first, its own, and the one behind the last; `None` if nothing was
    /// sampled.
    fn bounds(&self, fraction: f64) -> Option<[usize; 3]> {
        let mut total = vec![0u64; SKETCH_BINS_MIN];
        for group in &self.groups {
            for (sum, &count) in total.iter_mut().zip(group) {
                *sum += u64::from(count);
            }
        }
        let samples: u64 = total.iter().sum();
        if samples == 0 {
            return None;
        }
        let middle = bin_at(&total, fraction * samples as f64);
        let half = SIGMAS * standard_error(self.shares(middle).into_iter(), fraction, samples as f64);
        let high = bin_at(&total, (fraction - half) * samples as f64);
        let low = bin_at(&total, (fraction + half) * samples as f64);
        // The top bin of a sample says little about the largest value of the data.
        let end = if fraction - half <= 0.0 { SKETCH_BINS_MIN } else { high + 1 };
        Some([low, middle, end])
    }

    /// Share of values at or above bin `bin` in each group that is not empty.
    fn shares(&self, bin: usize) -> Vec<f64> {
        let sum = |counts: &[u32]| counts.iter().map(|&n| u64::from(n)).sum::<u64>();
        let share = |group: &Vec<u32>| match sum(group) {
            0 => None,
            all => Some(sum(&group[bin..]) as f64 / all as f64),
        };
        self.groups.iter().filter_map(share).collect()
    }
}

/// What a block of a sample stands for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Standing {
    /// A stretch of the data of which it is one of several blocks.
    pub stratum: u32,
    /// How many values of it each value of the block stands for.
    pub weight: f64,
}

/// Counts of a sample about one key, block by block: whether that is the key of the value at a fraction of the whole data.
///
/// The sample is stratified: what differs from one stratum to the next is no part of its error. Inside of one, that is told from the
/// differences between neighbouring blocks (successive differences: Wolter, Introduction to Variance Estimation, 2007, chapter 8).
#[derive(Debug, Clone, Copy, Default)]
pub struct BlockCounts {
    samples: u64,
    /// Values that the sample stands for: the sum over blocks, and of its squares by block; of those compared with a neighbour.
    weights: [f64; 3],
    /// Above the key, and from it on: the values that the sample says there are, and the sum of squared differences of neighbours.
    sides: [(f64, f64); 2],
    last: Option<(u32, [f64; 2])>,
}

impl BlockCounts {
    /// Takes in the next block, of `samples` values: so many are above the key, and so many have it.
    pub fn add(&mut self, Standing { stratum, weight }: Standing, samples: u64, above: u64, tied: u64) {
        if samples == 0 {
            return;
        }
        let counts = [above, above + tied];
        let shares = counts.map(|count| count as f64 / samples as f64);
        let all = weight * samples as f64;
        let last = self.last.filter(|(of, _)| *of == stratum);
        for (at, (sum, squares)) in self.sides.iter_mut().enumerate() {
            *sum += weight * counts[at] as f64;
            *squares += last.map_or(0.0, |(_, last)| (all * (shares[at] - last[at])).powi(2));
        }
        let [whole, squares, compared] = &mut self.weights;
        *whole += all;
        *squares += all * all;
        *compared += last.map_or(0.0, |_| all * all);
        (self.samples, self.last) = (self.samples + samples, Some((stratum, shares)));
    }

    /// Adds the counts of other blocks.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.sides.iter_mut().zip(other.sides) {
            *mine = (mine.0 + theirs.0, mine.1 + theirs.1);
        }
        self.weights.iter_mut().zip(other.weights).for_each(|(mine, theirs)| *mine += theirs);
        (self.samples, self.last) = (self.samples + other.samples, None);
    }

    /// Its bytes, for a file.
    pub fn encode(&self) -> Vec<u8> {
        let [(above, squares_above), (at_least, squares_at_least)] = self.sides;
        let sums = [above, squares_above, at_least, squares_at_least];
        let words = self.weights.into_iter().chain(sums).map(f64::to_bits);
        [self.samples].into_iter().chain(words).flat_map(u64::to_le_bytes).collect()
    }

    /// Takes encoded counts off the front of `bytes`; `None` if there are none.
    pub fn decode(bytes: &mut &[u8]) -> Option<Self> {
        let mut word = || {
            let (word, rest) = bytes.split_first_chunk()?;
            *bytes = rest;
            Some(u64::from_le_bytes(*word))
        };
        let samples = word()?;
        let mut sum = || word().map(f64::from_bits).filter(|sum| *sum >= 0.0 && sum.is_finite());
        let weights = [sum()?, sum()?, sum()?];
        let sides = [(sum()?, sum()?), (sum()?, sum()?)];
        (samples < 1 << 48).then_some(Self { samples, weights, sides, last: None })
    }

    /// Whether the key is that of the value at `fraction` (from the top) of the whole data, as far as a sample can tell: what
    /// it may err by leaves the value among the entries with the key.
    pub fn is_certain(&self, fraction: f64) -> bool {
        self.margins(fraction).is_some_and(|margins| margins.into_iter().all(|margin| margin > CERTAIN_SIGMAS))
    }

    /// How likely it is that the key is that of the value at `fraction` (from the top) of the whole data.
    pub fn likelihood(&self, fraction: f64) -> f64 {
        let [above, below] = self.margins(fraction).unwrap_or([f64::NEG_INFINITY; 2]);
        (normal_share(above) + normal_share(below) - 1.0).max(0.0)
    }

    /// How far the wanted rank is from the first and from the last entry with the key, in standard errors of the sample;
    /// negative where it is beyond them. `None` if there is too little to tell.
    fn margins(&self, fraction: f64) -> Option<[f64; 2]> {
        let [whole, squares, compared] = self.weights;
        if compared <= 0.0 {
            return None;
        }
        let independent = (fraction * (1.0 - fraction) / self.samples as f64).sqrt();
        let [above, at_least] = self.sides.map(|(sum, differences)| {
            // Blocks without a neighbour are like the others.
            let error = (differences / 2.0 * squares / compared).sqrt() / whole;
            (sum / whole, error.max(independent))
        });
        Some([(fraction - above.0) / above.1, (at_least.0 - fraction) / at_least.1])
    }
}

/// The share of a normal distribution up to `x` standard deviations above its mean, within 0.0002 (Bowling et al., A logistic
/// approximation to the cumulative normal distribution, 2009).
fn normal_share(x: f64) -> f64 {
    1.0 / (1.0 + (-x * (1.5976 + 0.07056 * x * x)).exp())
}

/// The key of the value at `fraction` (from the top) of a part of a sample of keys, taken in blocks of `block` neighbours:
/// what the rest then judges. `None` if there is no such value.
fn suggested(keys: &[u32], block: usize, fraction: f64) -> Option<u32> {
    /// One block in so many.
    const SHARE: usize = 8;
    let mut few: Vec<u32> = keys.chunks(block).step_by(SHARE).flatten().copied().collect();
    let rank = (fraction * few.len() as f64) as usize;
    (rank < few.len()).then(|| *few.select_nth_unstable_by(rank, |a, b| b.cmp(a)).1)
}

/// The likeliest key of the value at `fraction` (from the top) of data in memory, and how likely it is, as a sample of its keys
/// says, taken in blocks of `block` neighbours.
pub fn guess_of_sample(keys: &[u32], block: usize, fraction: f64) -> Option<(u32, f64)> {
    /// Most keys judged: neighbours of what is suggested, which only a part of the sample does.
    const JUDGED: usize = 4;
    let mut key = suggested(keys, block, fraction)?;
    let mut judged = None;
    for _ in 0..JUDGED {
        let counts = counts_of_sample(keys, block, key);
        judged = Some((key, counts.likelihood(fraction)));
        let next = match counts.margins(fraction) {
            Some([above, _]) if above < 0.0 => keys.iter().copied().filter(|&other| other > key).min(),
            Some([_, below]) if below < 0.0 => keys.iter().copied().filter(|&other| other < key).max(),
            _ => None,
        };
        let Some(next) = next else { break };
        key = next;
    }
    judged
}

/// Counts of a sample in memory about a key.
fn counts_of_sample(keys: &[u32], block: usize, key: u32) -> BlockCounts {
    let mut counts = BlockCounts::default();
    for block in keys.chunks(block) {
        let count = |is: fn(u32, u32) -> bool| block.iter().map(|&other| u32::from(is(other, key))).sum::<u32>();
        let (above, at_least) = (count(|other, key| other > key), count(|other, key| other >= key));
        let whole = Standing { stratum: 0, weight: 1.0 };
        counts.add(whole, block.len() as u64, above.into(), (at_least - above).into());
    }
    counts
}

/// Bounds (smallest and largest key) about the value at `fraction` (from the top) of data in memory, from a sample of its
/// keys taken in blocks of `block` neighbours; `None` if the sample says nothing. The sample is reordered. A miss costs
/// another look but no reading, so it may be likelier here.
pub fn bounds_of_sample(keys: &mut [u32], block: usize, fraction: f64) -> Option<(u32, u32)> {
    /// Half width of the bracket in standard errors.
    const HALF_WIDTH: f64 = 3.0;
    let n = keys.len();
    let rank = |share: f64| (share.max(0.0) * n as f64) as usize;
    let middle = suggested(keys, block, fraction)?;
    let descending = |a: &u32, b: &u32| b.cmp(a);
    let share = |block: &[u32]| block.iter().filter(|&&key| key > middle).count() as f64 / block.len() as f64;
    let half = HALF_WIDTH * standard_error(keys.chunks(block).map(share), fraction, n as f64);
    let (upper, lower) = (rank(fraction - half), rank(fraction + half));
    let (larger, low) = match lower {
        // Beyond the sample's smallest there may be anything.
        beyond if beyond >= n => (keys, 0),
        _ => {
            let (larger, low, _) = keys.select_nth_unstable_by(lower, descending);
            (larger, *low)
        }
    };
    let high = match upper {
        0 => KEYS as u32 - 1,
        _ => *larger.select_nth_unstable_by(upper.min(larger.len() - 1), descending).1,
    };
    Some((low, high))
}

/// Standard error of a share of `samples` values, from the shares in the groups they were taken in: at least that of
/// independent draws.
fn standard_error(shares: impl Iterator<Item = f64> + Clone, fraction: f64, samples: f64) -> f64 {
    let independent = (fraction * (1.0 - fraction) / samples).sqrt();
    let n = shares.clone().count() as f64;
    if n < 2.0 {
        return independent.max(0.05);
    }
    let mean = shares.clone().sum::<f64>() / n;
    let variance = shares.map(|s| (s - mean).powi(2)).sum::<f64>() / (n - 1.0);
    (variance / n).sqrt().max(independent)
}

/// The bin that holds the value with `rank` values above it, counted from the top; 0 if there are fewer.
fn bin_at(counts: &[u64], rank: f64) -> usize {
    let mut above = 0;
    for (bin, &count) in counts.iter().enumerate().rev() {
        above += count;
        if above > 0 && above as f64 >= rank {
            return bin;
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Isa;
    use crate::limits::PROBE_GROUPS;

    /// Heavy-tailed values whose scale changes slowly, as between the layers of a model.
    fn value(i: u64) -> f32 {
        let u = (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f32 / (1u64 << 24) as f32 + 1e-7;
        let scale = 1.0 + (i as f32 / 50_000.0).sin() * 0.5;
        1e-3 * scale * (1.0 / u).powf(0.3)
    }

    #[test]
    fn groups_are_told_as_they_were_added() {
        let sketch = |seed: u64| {
            let mut sketch = MagnitudeSketch::new(Bracket::COARSE);
            sketch.add(Isa::detect(), &(0..5000).map(|i| value(i * seed)).collect::<Vec<_>>());
            sketch
        };
        let groups = [sketch(3), sketch(5)];
        let probe = probe(&groups);
        for (last, group) in [(2, &groups[0]), (1, &groups[1])] {
            let told = probe.group(last).unwrap();
            assert!(told.fits(group) && told.total() == Some(5000));
            assert!(told.bins.iter().zip(&group.bins).all(|(told, counted)| *told == count(*counted)));
        }
        assert!(probe.group(3).is_none());
    }

    fn probe(groups: &[MagnitudeSketch]) -> Probe {
        let mut probe = Probe::default();
        groups.iter().for_each(|group| probe.add_group(group));
        probe
    }

    #[test]
    fn the_bracket_of_a_sample_is_narrow_and_holds_the_threshold() {
        let (n, step) = if cfg!(miri) { (80_000u64, 1_024) } else { (4_000_000, 5_120) };
        let mut groups = vec![MagnitudeSketch::new(Bracket::COARSE); PROBE_GROUPS];
        for (b, start) in (0..n).step_by(step).enumerate() {
            let block: Vec<f32> = (start..start + 512).map(value).collect();
            groups[b % PROBE_GROUPS].add(Isa::detect(), &block);
        }
        let mut keys: Vec<u32> = (0..n).map(|i| value(i).to_bits()).collect();
        keys.sort_unstable_by(|a, b| b.cmp(a));
        for fraction in [0.1, 0.2, 0.5] {
            let bracket = probe(&groups).bracket(fraction, 1 << 20);
            let key = keys[(fraction * n as f64) as usize - 1];
            assert!(bracket.low <= key && u64::from(key) < bracket.end(), "{fraction}: {bracket:?} misses {key}");
            let inside = keys.iter().filter(|&&k| k >= bracket.low && u64::from(k) < bracket.end()).count();
            assert!(
                (inside as f64) < if cfg!(miri) { 0.3 } else { 0.08 } * n as f64,
                "{fraction}: {inside} of {n} values inside"
            );
            assert_eq!(bracket.shift, 0, "bins of one key");
        }
    }

    #[test]
    fn a_bracket_that_is_too_wide_is_narrowed_around_the_middle() {
        let mut groups = vec![MagnitudeSketch::new(Bracket::COARSE); PROBE_GROUPS];
        for (g, group) in groups.iter_mut().enumerate() {
            let values: Vec<f32> = (0..100).map(|i| value(i * 7919 + g as u64)).collect();
            group.add(Isa::detect(), &values);
        }
        let wide = probe(&groups).bracket(0.2, 1 << 30);
        let narrow = probe(&groups).bracket(0.2, 1 << 16);
        assert!(wide.bins > 1 << 16);
        assert_eq!((narrow.shift, narrow.bins), (0, 1 << 16));
        assert!(narrow.low >= wide.low && narrow.end() <= wide.end());
    }

    #[test]
    fn a_sample_in_memory_gives_a_bracket_around_the_threshold() {
        let (n, block) = if cfg!(miri) { (30_000u64, 30) } else { (1_000_000, 1000) };
        let keys: Vec<u32> = (0..n).map(|i| value(i).to_bits()).collect();
        let mut sorted = keys.clone();
        sorted.sort_unstable_by(|a, b| b.cmp(a));
        for fraction in [1e-4, 0.2, 0.5, 0.9999] {
            let mut sample: Vec<u32> = keys.chunks(block).step_by(10).flatten().copied().collect();
            let (low, high) = bounds_of_sample(&mut sample, block, fraction).unwrap();
            let key = sorted[(fraction * n as f64) as usize - 1];
            assert!(low <= key && key <= high, "{fraction}: {low} to {high} misses {key}");
        }
        assert_eq!(bounds_of_sample(&mut [], 1, 0.5), None);
        assert_eq!(bounds_of_sample(&mut [5; 3], 1, 0.5), Some((0, KEYS as u32 - 1)), "too few to say anything");
        assert_eq!(bounds_of_sample(&mut vec![5; 100_000], 10, 0.5), Some((5, 5)));
    }

    #[test]
    fn a_key_in_memory_is_guessed_where_it_is_common() {
        let guess = |keys: &[u32], fraction| guess_of_sample(keys, 100, fraction);
        let keys: Vec<u32> = (0..60_000).map(|i| value(i).to_bits() >> 20).collect();
        let mut sorted = keys.clone();
        sorted.sort_unstable_by(|a, b| b.cmp(a));
        let mut guessed = 0;
        for rank in (0..60_000).step_by(997) {
            let (key, likelihood) = guess(&keys, (rank + 1) as f64 / 60_000.0).unwrap();
            if likelihood > 0.99 {
                assert_eq!(key, sorted[rank], "rank {rank}");
                guessed += 1;
            }
        }
        assert!(guessed > 30, "{guessed} of 61");
        let distinct: Vec<u32> = (0..60_000).map(|i| value(i).to_bits()).collect();
        assert!(guess(&distinct, 0.2).unwrap().1 < 0.01);
        assert_eq!(guess(&[], 0.2), None);
        assert_eq!((guess(&[7; 50], 0.2), guess(&[7; 500], 1.0)), (Some((7, 0.0)), None));
        // The eighth of the blocks that suggests a key is not like the others.
        let misled = (0..60_000).map(|i| if i / 100 % 8 == 0 { 9 } else { 7 + u32::from(i % 10 < 3) });
        assert!(guess(&misled.collect::<Vec<_>>(), 0.2).is_some_and(|(key, likelihood)| key == 8 && likelihood > 0.99));
        assert!(guess(&[7; 50_000], 0.2).is_some_and(|(key, likelihood)| key == 7 && likelihood > 0.999));
    }

    /// 400 blocks of a sample, in strata of so many, in which so many of 4,096 are above the key, and have it, give or take a few,
    /// and with a slope and a step per stratum.
    fn blocks(strata: u64, above: u64, tied: u64, noise: u64, [slope, step]: [u64; 2]) -> BlockCounts {
        let (mut whole, mut half) = (BlockCounts::default(), BlockCounts::default());
        for block in 0..400u64 {
            let stratum = block / strata;
            let drift = slope * block / 400 + step * (stratum % 2);
            let random = |salt: u64| (block + salt).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
            let standing = Standing { stratum: stratum as u32, weight: 100.0 };
            half.add(
                standing,
                4096,
                above + drift + random(1) % (noise + 1),
                tied + random(2) % (noise + 1) - drift / 2,
            );
            half.add(standing, 0, 0, 0);
            if block == 199 {
                whole.merge(&std::mem::take(&mut half));
            }
        }
        whole.merge(&half);
        whole
    }

    #[test]
    fn a_key_is_certain_where_its_entries_cover_what_the_sample_may_err_by() {
        let plain = |above, tied| blocks(400, above, tied, 0, [0, 0]);
        // 0.2 of 4,096 is 819.2; of 400 blocks the error is at least 0.0003 of them, or 1.3.
        assert!(plain(700, 400).is_certain(0.2));
        assert!(!plain(830, 400).is_certain(0.2), "too many above");
        assert!(!plain(300, 400).is_certain(0.2), "too few");
        assert!(plain(814, 400).is_certain(0.2) && !plain(817, 400).is_certain(0.2));
        assert!(!plain(410, 410).is_certain(0.2) && plain(410, 414).is_certain(0.2));
        // Noise between neighbours counts; what changes from one end to the other, or from stratum to stratum, does not.
        let noisy = |above| blocks(400, above, 400, 100, [0, 0]);
        assert!(noisy(750).is_certain(0.2) && !noisy(768).is_certain(0.2));
        assert!(blocks(400, 600, 700, 0, [400, 0]).is_certain(0.2));
        assert!(blocks(4, 713, 400, 0, [0, 200]).is_certain(0.2) && !blocks(1, 713, 400, 0, [0, 200]).is_certain(0.2));
        let counts = noisy(750);
        let mut bytes = &*counts.encode();
        let again = BlockCounts::decode(&mut bytes).unwrap();
        assert_eq!((again.encode(), bytes), (counts.encode(), &[][..]));
        assert!(BlockCounts::decode(&mut &counts.encode()[..40]).is_none());
        assert!(BlockCounts::decode(&mut &[255; 64][..]).is_none(), "not counts");
        assert!(!BlockCounts::default().is_certain(0.2));
        let mut one = BlockCounts::default();
        one.add(Standing { stratum: 0, weight: 1.0 }, 4096, 0, 4096);
        assert!(!one.is_certain(0.2), "one block says nothing of its error");
    }

    /// Blocks stand for what they are few of.
    #[test]
    fn strata_count_as_much_as_there_is_of_them() {
        let counts = |weights: [f64; 2]| {
            let mut counts = BlockCounts::default();
            for block in 0..40 {
                let stratum = block / 20;
                let standing = Standing { stratum, weight: weights[stratum as usize] };
                counts.add(standing, 1024, if stratum == 0 { 100 } else { 300 }, 100);
            }
            counts
        };
        // 0.195 above in both together, 0.146 where the first counts thrice, 0.244 where the second does.
        assert!(counts([1.0, 1.0]).is_certain(0.24) && counts([3.0, 1.0]).is_certain(0.2));
        assert!(!counts([3.0, 1.0]).is_certain(0.26) && !counts([1.0, 3.0]).is_certain(0.24));
    }

    #[test]
    fn the_bin_of_a_fraction_holds_its_value() {
        let mut groups = vec![MagnitudeSketch::new(Bracket::COARSE); PROBE_GROUPS];
        let values: Vec<f32> = (1..=1000u16).map(f32::from).collect();
        groups[3].add(Isa::detect(), &values);
        for fraction in [0.001, 0.2, 0.5, 1.0] {
            let bracket = probe(&groups).bin(fraction).unwrap();
            let key = (1001.0 - (fraction * 1000.0) as f32).to_bits();
            assert!(bracket.low <= key && u64::from(key) < bracket.end() && bracket.shift == 0, "{fraction}");
        }
        assert_eq!(probe(&[]).bin(0.2), None);
    }

    #[test]
    fn an_empty_probe_asks_for_everything() {
        let groups = vec![MagnitudeSketch::new(Bracket::COARSE); PROBE_GROUPS];
        assert_eq!(probe(&groups).bracket(0.2, 1 << 16), Bracket::COARSE);
    }
}
