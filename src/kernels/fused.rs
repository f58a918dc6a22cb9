//! Whole merges from stored bytes to stored bytes, for what is common: one type, and everything finite.
//!
//! - Base, models and output have the same 16- or 32-bit type. No value leaves the registers between loading and storing.
//! - Operations and their order are those of the tile kernels in `body.rs`, so the bytes are the same. What needs a
//!   decision (a value that is not finite, a result that the type cannot hold) is left to them: the answer is `None`.
//!   It is looked for where it ends up: a sum that has met an infinity or NaN is one itself.
//! - Elements come in words of 32 bits, so that two bfloat16 are widened by one instruction each and packed again by one.
//! - The number of models is a constant of each loop: the loop over models is unrolled, that over words vectorised. Flags
//!   are counted, because the compiler does not vectorise a loop that collects them.
//!
//! The same rules as in `body.rs`: always inlined, selects by mask, only integers are summed over elements.
#![allow(clippy::needless_range_loop, reason = "the compiler sees through indices where it does not through iterators")]

use super::convert::{BFloat16, Binary16, Binary32, Codec, INFINITY, keep, key, mask, select};
use super::isa::prefetch;
use super::{Counted, Fused, Stored};
use crate::dtype::Float;

/// Words of a block: so many that adding up its counts at the end does not matter.
const BLOCK: usize = 128;

/// How far ahead inputs are asked for, in words: inputs from several files are more streams, in shorter pages, than the
/// hardware's own prefetching follows.
const AHEAD: usize = 4 * BLOCK;

/// The sign of an f32.
const SIGN: u32 = 1 << 31;

/// Elements of a stored type in words of `W` bytes.
trait Packed<const W: usize> {
    /// Keys of results from here on cannot be stored, or may not.
    const BEYOND: u32;
    /// The smallest difference of two stored values that is not zero.
    const STEP: f64;

    /// Merges a word of `N` models.
    fn merge<R: Rule, const N: usize>(
        base: [u8; W],
        models: [[u8; W]; N],
        settings: &Settings<N>,
        counts: &mut Counts<u32, N>,
    ) -> [u8; W];
}

impl Packed<4> for BFloat16 {
    const BEYOND: u32 = BFloat16::BEYOND;
    const STEP: f64 = f64::from_bits((1023 - 133) << 52);

    #[inline(always)]
    fn merge<R: Rule, const N: usize>(
        base: [u8; 4],
        models: [[u8; 4]; N],
        settings: &Settings<N>,
        counts: &mut Counts<u32, N>,
    ) -> [u8; 4] {
        let base = u32::from_le_bytes(base);
        let (mut low, mut high) = ([0.0; N], [0.0; N]);
        for model in 0..N {
            let word = u32::from_le_bytes(models[model]);
            low[model] = f32::from_bits(word << 16);
            high[model] = f32::from_bits(word & 0xffff_0000);
        }
        let low = R::merge(f32::from_bits(base << 16), low, settings, counts);
        let high = R::merge(f32::from_bits(base & 0xffff_0000), high, settings, counts);
        counts.greatest = counts.greatest.max(key(low)).max(key(high));
        (Self::round(low) >> 16 | Self::round(high) & 0xffff_0000).to_le_bytes()
    }
}

/// Merges a word that holds one element, whose result is left in f32.
#[inline(always)]
fn merge_one<R: Rule, C: Codec<W>, const W: usize, const N: usize>(
    base: [u8; W],
    models: [[u8; W]; N],
    settings: &Settings<N>,
    counts: &mut Counts<u32, N>,
) -> f32 {
    let mut thetas = [0.0; N];
    for model in 0..N {
        thetas[model] = C::widen(models[model]);
    }
    let merged = R::merge(C::widen(base), thetas, settings, counts);
    counts.greatest = counts.greatest.max(key(merged));
    merged
}

impl Packed<2> for Binary16 {
    // 65520.
    const BEYOND: u32 = 0x477f_f000;
    const STEP: f64 = f64::from_bits((1023 - 24) << 52);

    #[inline(always)]
    fn merge<R: Rule, const N: usize>(
        base: [u8; 2],
        models: [[u8; 2]; N],
        settings: &Settings<N>,
        counts: &mut Counts<u32, N>,
    ) -> [u8; 2] {
        Self::narrow(merge_one::<R, Self, 2, N>(base, models, settings, counts), false).0
    }
}

impl Packed<4> for Binary32 {
    const BEYOND: u32 = INFINITY;
    const STEP: f64 = f64::from_bits((1023 - 149) << 52);

    #[inline(always)]
    fn merge<R: Rule, const N: usize>(
        base: [u8; 4],
        models: [[u8; 4]; N],
        settings: &Settings<N>,
        counts: &mut Counts<u32, N>,
    ) -> [u8; 4] {
        merge_one::<R, Self, 4, N>(base, models, settings, counts).to_le_bytes()
    }
}

/// What stands beside the elements of a block.
struct Settings<const N: usize> {
    weights: [f32; N],
    /// The smallest key of each model that survives.
    min_keys: [u32; N],
    /// Factor of the merged task vector.
    lambda: f32,
    /// What a weighted sum is divided by.
    divisor: f32,
    /// What is elected where the sum cancels.
    cancelled: Side,
}

/// What is counted.
#[derive(Clone, Copy)]
struct Counts<C, const N: usize> {
    /// The greatest key of a sum that is not finite if something in it is not.
    greatest_sum: u32,
    /// The greatest key of a result.
    greatest: u32,
    conflicts: C,
    kept: [C; N],
    tied: [C; N],
    agreeing: [C; N],
}

impl<C: Copy + Default, const N: usize> Default for Counts<C, N> {
    #[inline(always)]
    fn default() -> Self {
        let none = [C::default(); N];
        Self { greatest_sum: 0, greatest: 0, conflicts: C::default(), kept: none, tied: none, agreeing: none }
    }
}

/// How an element is merged.
trait Rule {
    /// Whether there is a base.
    const BASE: bool;

    /// The merged element of `N` models, in f32.
    fn merge<const N: usize>(base: f32, thetas: [f32; N], settings: &Settings<N>, counts: &mut Counts<u32, N>) -> f32;
}

/// Σ w θ / divisor.
struct Average;

impl Rule for Average {
    const BASE: bool = false;

    #[inline(always)]
    fn merge<const N: usize>(
        _base: f32,
        thetas: [f32; N],
        settings: &Settings<N>,
        _counts: &mut Counts<u32, N>,
    ) -> f32 {
        let mut sum = 0.0f32;
        for model in 0..N {
            sum += settings.weights[model] * thetas[model];
        }
        sum / settings.divisor
    }
}

/// θ0 + λ Σ w τ.
///
/// With `POSITIVE`, weights and λ are above zero and no task vector vanishes under them: then entries of either sign are there
/// exactly where one of them has not the sign of the merged one.
struct Sum<const POSITIVE: bool>;

impl<const POSITIVE: bool> Rule for Sum<POSITIVE> {
    const BASE: bool = true;

    #[inline(always)]
    fn merge<const N: usize>(base: f32, thetas: [f32; N], settings: &Settings<N>, counts: &mut Counts<u32, N>) -> f32 {
        let mut taus = [0.0f32; N];
        let mut sum = 0.0f32;
        // As integers, positive values are above 0, and negative ones above that which is all sign.
        let (mut positive, mut negative) = (0i32, SIGN);
        for model in 0..N {
            taus[model] = thetas[model] - base;
            let weighed = settings.weights[model] * taus[model];
            if POSITIVE {
                // A sum of -0.0 makes the same result as one of 0.0: task vectors are -0.0 only where base is 0.0.
                sum = if model == 0 { weighed } else { sum + weighed };
            } else {
                sum += weighed;
                positive = positive.max(taus[model].to_bits().cast_signed());
                negative = negative.max(taus[model].to_bits());
            }
        }
        let merged = sum * settings.lambda;
        let side = Side::of_sum(merged);
        let mut opposed = side.seen_from(taus[0]);
        for model in 0..N {
            let seen = side.seen_from(taus[model]);
            counts.agreeing[model] += mask(seen.cast_signed() > 0) & 1;
            opposed = opposed.max(seen);
        }
        let clash = if POSITIVE { mask(opposed > SIGN) } else { mask(positive > 0) & mask(negative > SIGN) };
        counts.conflicts += clash & 1;
        merged + base
    }
}

/// θ0 + λ Σ_A w τ̂ / Σ_A w over the models A whose trimmed entry has the sign of Σ w τ̂.
///
/// Only for weights and λ above zero that no survivor vanishes under: then the merged task vector has the elected sign
/// wherever A is not empty, and survivors have either sign exactly where one of them is not in A.
///
/// With `TIES`, survivors with the smallest key are counted too.
struct Elected<const TIES: bool>;

impl<const TIES: bool> Rule for Elected<TIES> {
    const BASE: bool = true;

    #[inline(always)]
    fn merge<const N: usize>(base: f32, thetas: [f32; N], settings: &Settings<N>, counts: &mut Counts<u32, N>) -> f32 {
        let mut taus = [0.0f32; N];
        let mut kept = [0; N];
        let mut mass = 0.0f32;
        for model in 0..N {
            taus[model] = thetas[model] - base;
            kept[model] = mask(key(taus[model]) >= settings.min_keys[model]);
            if TIES {
                counts.tied[model] += mask(key(taus[model]) == settings.min_keys[model]) & 1;
            }
            // Adding zero would change nothing: no sum of survivors is -0.0.
            let weighed = settings.weights[model] * taus[model];
            mass = if model == 0 { keep(kept[model], weighed) } else { choose(kept[model], mass + weighed, mass) };
        }
        // Whatever is not finite survives, so that it is in the sum.
        counts.greatest_sum = counts.greatest_sum.max(key(mass));
        let side = Side::of(mass, settings.cancelled);
        let (mut sum, mut divisor, mut clash) = (0.0f32, 0.0f32, 0);
        for model in 0..N {
            let member = side.holds(taus[model], settings.min_keys[model]);
            let (weighed, weight) = (settings.weights[model] * taus[model], settings.weights[model]);
            sum = if model == 0 { keep(member, weighed) } else { choose(member, sum + weighed, sum) };
            divisor = if model == 0 { keep(member, weight) } else { choose(member, divisor + weight, divisor) };
            counts.kept[model] += kept[model] & 1;
            counts.agreeing[model] += member & 1;
            clash |= kept[model] ^ member;
        }
        counts.conflicts += clash & 1;
        let mean = choose(mask(divisor != 0.0), sum / divisor, 0.0);
        mean * settings.lambda + base
    }
}

/// `a` where `mask` is all ones, `b` where it is zero.
#[inline(always)]
fn choose(mask: u32, a: f32, b: f32) -> f32 {
    f32::from_bits(select(mask, a.to_bits(), b.to_bits()))
}

/// One of the two signs, or none.
#[derive(Clone, Copy)]
struct Side {
    /// The sign.
    sign: u32,
    /// All sign if there is none.
    none: u32,
}

impl Side {
    const NONE: Self = Self { sign: 0, none: SIGN };

    /// The sign of `value`, or what is there instead if it is zero.
    #[inline(always)]
    fn of(value: f32, instead: Self) -> Self {
        let zero = mask(value == 0.0);
        Self { sign: select(zero, instead.sign, value.to_bits() & SIGN), none: zero & instead.none }
    }

    /// The sign of `value`, or none.
    #[inline(always)]
    fn of_sum(value: f32) -> Self {
        Self { sign: value.to_bits() & SIGN, none: mask(value == 0.0) & SIGN }
    }

    /// The key of `tau` if it has this sign, else more than the key: [`SIGN`] is added.
    #[inline(always)]
    fn seen_from(self, tau: f32) -> u32 {
        (tau.to_bits() ^ self.sign) | self.none
    }

    /// All ones if `tau` has this sign and a key of at least `min_key`, which is above 0. Not for NaN.
    #[inline(always)]
    fn holds(self, tau: f32, min_key: u32) -> u32 {
        mask(self.seen_from(tau).cast_signed() >= min_key.cast_signed())
    }
}

/// Merges `B` words.
#[inline(always)]
fn merge_block<R: Rule, C: Packed<W>, const W: usize, const N: usize, const B: usize>(
    base: &[[u8; W]; B],
    models: [&[[u8; W]; B]; N],
    settings: &Settings<N>,
    counts: &mut Counts<u32, N>,
    out: &mut [[u8; W]; B],
) {
    for at in 0..B {
        // Loops and no closures: what the compiler does not see through, it does not vectorise.
        let mut words = [[0; W]; N];
        for model in 0..N {
            words[model] = models[model][at];
        }
        out[at] = C::merge::<R, N>(base[at], words, settings, counts);
    }
}

/// A merge's counts, of all its blocks.
impl<const N: usize> Counts<u64, N> {
    /// Adds what a block counted; false if something in it was not finite.
    #[inline(always)]
    fn add<C: Packed<W>, const W: usize>(&mut self, block: Counts<u32, N>) -> bool {
        self.conflicts += u64::from(block.conflicts);
        for model in 0..N {
            self.kept[model] += u64::from(block.kept[model]);
            self.tied[model] += u64::from(block.tied[model]);
            self.agreeing[model] += u64::from(block.agreeing[model]);
        }
        block.greatest_sum < INFINITY && block.greatest < C::BEYOND
    }
}

/// `B` words from word `start` on.
#[inline(always)]
fn part<const W: usize, const B: usize>(words: &[[u8; W]], start: usize) -> &[[u8; W]; B] {
    words[start..].first_chunk().expect("slices have equal lengths")
}

/// The first bytes of a word, the others being zero.
#[inline(always)]
fn partial<const W: usize>(bytes: &[u8]) -> [[u8; W]; 1] {
    let mut word = [0; W];
    word[..bytes.len()].copy_from_slice(bytes);
    [word]
}

/// Goes through all elements.
#[inline(always)]
fn merge<R: Rule, C: Packed<W>, const W: usize, const N: usize>(
    stored: &Stored<'_>,
    settings: &Settings<N>,
    out: &mut [u8],
    counted: Counted<'_>,
) -> Option<u64> {
    // A rule without base is given something of the right length.
    let base = stored.base.unwrap_or(stored.models[0]).as_chunks::<W>();
    let models: [(&[[u8; W]], &[u8]); N] = std::array::from_fn(|model| stored.models[model].as_chunks::<W>());
    let none = Counts::default();
    let mut counts = Counts::default();
    let (words, last) = out.as_chunks_mut::<W>();
    let (blocks, rest) = words.as_chunks_mut::<BLOCK>();
    let tail = blocks.len() * BLOCK;
    for (index, block) in blocks.iter_mut().enumerate() {
        let start = index * BLOCK;
        for (input, _) in models.iter().chain(R::BASE.then_some(&base)) {
            prefetch(input.get(start + AHEAD..start + AHEAD + BLOCK).unwrap_or_default().as_flattened());
        }
        let models = std::array::from_fn(|model| part(models[model].0, start));
        let mut found = none;
        merge_block::<R, C, W, N, BLOCK>(part(base.0, start), models, settings, &mut found, block);
        if !counts.add::<C, W>(found) {
            return None;
        }
    }
    let mut found = none;
    for (start, word) in (tail..).zip(rest) {
        let models = std::array::from_fn(|model| part(models[model].0, start));
        merge_block::<R, C, W, N, 1>(part(base.0, start), models, settings, &mut found, std::array::from_mut(word));
    }
    if !last.is_empty() {
        // Zeros beside the last element are merged too: they make zeros, and count for nothing.
        let words: [[[u8; W]; 1]; N] = std::array::from_fn(|model| partial(models[model].1));
        let mut word = [[0; W]];
        merge_block::<R, C, W, N, 1>(&partial(base.1), words.each_ref(), settings, &mut found, &mut word);
        last.copy_from_slice(&word[0][..last.len()]);
    }
    if !counts.add::<C, W>(found) {
        return None;
    }
    counted.kept.iter_mut().zip(counts.kept).for_each(|(sum, count)| *sum += count);
    counted.tied.iter_mut().zip(counts.tied).for_each(|(sum, count)| *sum += count);
    counted.agreeing.iter_mut().zip(counts.agreeing).for_each(|(sum, count)| *sum += count);
    Some(counts.conflicts)
}

#[inline(always)]
fn merge_models<C: Packed<W>, const W: usize, const N: usize>(
    fused: Fused,
    stored: &Stored<'_>,
    out: &mut [u8],
    counted: Counted<'_>,
) -> Option<u64> {
    let mut settings = Settings {
        weights: std::array::from_fn(|model| stored.weights[model]),
        min_keys: [0; N],
        lambda: 1.0,
        divisor: 1.0,
        cancelled: Side::NONE,
    };
    match fused {
        Fused::Average { divisor } => {
            settings.divisor = divisor;
            merge::<Average, C, W, N>(stored, &settings, out, counted)
        }
        Fused::Sum { lambda } => {
            settings.lambda = lambda;
            match sum_keeps_signs(&settings, C::STEP) {
                true => merge::<Sum<true>, C, W, N>(stored, &settings, out, counted),
                false => merge::<Sum<false>, C, W, N>(stored, &settings, out, counted),
            }
        }
        Fused::Elected { zero_sign, lambda } => {
            settings.lambda = lambda;
            if zero_sign != 0.0 {
                settings.cancelled = Side { sign: zero_sign.to_bits() & SIGN, none: 0 };
            }
            settings.min_keys = std::array::from_fn(|model| stored.min_keys[model]);
            match nothing_vanishes(&settings, C::STEP) {
                false => None,
                true if stored.counts_ties => merge::<Elected<true>, C, W, N>(stored, &settings, out, counted),
                true => merge::<Elected<false>, C, W, N>(stored, &settings, out, counted),
            }
        }
    }
}

/// Sixteen times the smallest f32, for what rounding may take.
const LEAST: f64 = f64::from_bits((1023 - 145) << 52);

/// Whether weights and λ are above zero, and no task vector becomes zero under them. `step` is the smallest difference of two
/// stored values.
#[inline(always)]
fn sum_keeps_signs<const N: usize>(settings: &Settings<N>, step: f64) -> bool {
    let least = |weight: &f32| f64::from(*weight) * step;
    let keeps = |weighed: f64| weighed >= LEAST && f64::from(settings.lambda) * weighed >= LEAST;
    settings.weights.iter().map(least).all(keeps)
}

/// Whether weights and λ are above zero, no product of a survivor with them becomes zero, and what is not finite
/// survives. `step` is the smallest difference of two stored values.
#[inline(always)]
fn nothing_vanishes<const N: usize>(settings: &Settings<N>, step: f64) -> bool {
    let Settings { weights, min_keys, lambda, .. } = settings;
    let survivors = min_keys.map(|key| f64::from(f32::from_bits(key)).max(step));
    let products = weights.iter().zip(survivors).all(|(&weight, survivor)| f64::from(weight) * survivor >= LEAST);
    // A mean is no smaller than the smallest survivor.
    let means = survivors.iter().all(|survivor| f64::from(*lambda) * survivor >= LEAST);
    // Sums and means of the smallest numbers are at least as large.
    let whole = weights.iter().all(|&weight| weight == 1.0) && *lambda >= 1.0;
    min_keys.iter().all(|&key| key <= INFINITY) && (whole || products && means)
}

/// The choice of a loop for the number of models: one for each up to four, and up to eight for bfloat16.
#[inline(always)]
pub(super) fn merge_stored(fused: Fused, stored: &Stored<'_>, out: &mut [u8], counted: Counted<'_>) -> Option<u64> {
    macro_rules! models {
        ($codec:ty, $width:literal: $($models:literal)*) => {
            match stored.models.len() {
                $($models => merge_models::<$codec, $width, $models>(fused, stored, out, counted),)*
                _ => None,
            }
        };
    }
    match stored.float {
        Float::BF16 => models!(BFloat16, 4: 1 2 3 4 5 6 7 8),
        Float::F16 => models!(Binary16, 2: 1 2 3 4),
        Float::F32 => models!(Binary32, 4: 1 2 3 4),
        Float::F64 | Float::E4M3 | Float::E5M2 => None,
    }
}
