//! Whole merges from stored bytes to stored bytes, for what is common: one type, and everything finite.
//!
//! - Base, models and output have the same 16- or 32-bit type. No value leaves the registers between loading and storing.
//! - Operations and their order are those of the tile kernels in `body.rs`, so the bytes are the same. What needs a
//!   decision (a value that is not finite, a result that the type cannot hold) is left to them: the answer is `None`.
//! - The number of models is a constant of each loop: the loop over models is unrolled, that over elements vectorised.
//!   All flags are counted, because the compiler does not vectorise a loop that collects them in any other way.
//!
//! The same rules as in `body.rs`: always inlined, selects by mask, only integers are summed over elements.

use super::body::sign;
use super::convert::{BFloat16, Binary16, Binary32, Codec, INFINITY, keep, key, mask, select};
use super::isa::prefetch;
use super::{Counted, Fused, Stored};
use crate::dtype::Float;

/// Elements of a block: so many that adding up its counts at the end does not matter.
const BLOCK: usize = 256;

/// How far ahead inputs are asked for, in elements: inputs from several files are more streams, in shorter pages, than
/// the hardware's own prefetching follows.
const AHEAD: usize = 4 * BLOCK;

/// What stands beside the elements of a block.
struct Settings<const N: usize> {
    weights: [f32; N],
    /// The smallest key of each model that survives.
    min_keys: [u32; N],
    /// Factor of the merged task vector.
    lambda: f32,
    /// What a weighted sum is divided by.
    divisor: f32,
    /// The sign where an election cancels.
    zero_sign: f32,
}

/// What is counted.
struct Counts<const N: usize> {
    /// Elements that the tile kernels must look at.
    special: u64,
    conflicts: u64,
    kept: [u64; N],
    agreeing: [u64; N],
}

/// How a block is merged.
trait Rule {
    /// Merges `L` elements of `N` models; `base` has `L` elements too, or, for a rule without base, any.
    fn block<C: Codec<W>, const W: usize, const N: usize, const L: usize>(
        base: &[[u8; W]; L],
        models: [&[[u8; W]; L]; N],
        settings: &Settings<N>,
        counts: &mut Counts<N>,
    ) -> [[u8; W]; L];
}

/// Σ w θ / divisor.
struct Average;

impl Rule for Average {
    #[inline(always)]
    fn block<C: Codec<W>, const W: usize, const N: usize, const L: usize>(
        _base: &[[u8; W]; L],
        models: [&[[u8; W]; L]; N],
        settings: &Settings<N>,
        counts: &mut Counts<N>,
    ) -> [[u8; W]; L] {
        let (weights, divisor) = (settings.weights, settings.divisor);
        let mut out = [[0; W]; L];
        let mut special = 0;
        for lane in 0..L {
            let mut sum = 0.0f32;
            for model in 0..N {
                let theta = C::widen(models[model][lane]);
                special += mask(key(theta) >= INFINITY) & 1;
                sum += weights[model] * theta;
            }
            let (bytes, beyond) = C::narrow_finite(sum / divisor);
            special += beyond & 1;
            out[lane] = bytes;
        }
        counts.special += u64::from(special);
        out
    }
}

/// θ0 + λ Σ w τ.
struct Sum;

impl Rule for Sum {
    #[inline(always)]
    fn block<C: Codec<W>, const W: usize, const N: usize, const L: usize>(
        base: &[[u8; W]; L],
        models: [&[[u8; W]; L]; N],
        settings: &Settings<N>,
        counts: &mut Counts<N>,
    ) -> [[u8; W]; L] {
        let (weights, lambda) = (settings.weights, settings.lambda);
        let mut out = [[0; W]; L];
        let (mut special, mut conflicts, mut agreeing) = (0, 0, [0; N]);
        for lane in 0..L {
            let base = C::widen(base[lane]);
            let mut taus = [0.0f32; N];
            let (mut sum, mut least, mut greatest) = (0.0f32, 0.0f32, 0.0f32);
            for model in 0..N {
                let tau = C::widen(models[model][lane]) - base;
                special += mask(key(tau) >= INFINITY) & 1;
                sum += weights[model] * tau;
                least = if tau < least { tau } else { least };
                greatest = if tau > greatest { tau } else { greatest };
                taus[model] = tau;
            }
            conflicts += mask(least < 0.0) & mask(greatest > 0.0) & 1;
            let merged = sum * lambda;
            for model in 0..N {
                agreeing[model] += agrees(taus[model], merged);
            }
            let (bytes, beyond) = C::narrow_finite(merged + base);
            special += beyond & 1;
            out[lane] = bytes;
        }
        counts.special += u64::from(special);
        counts.conflicts += u64::from(conflicts);
        add(&mut counts.agreeing, agreeing);
        out
    }
}

/// θ0 + λ Σ_A w τ̂ / Σ_A w over the models A whose trimmed entry has the sign of Σ w τ̂.
struct Elected;

impl Rule for Elected {
    #[inline(always)]
    fn block<C: Codec<W>, const W: usize, const N: usize, const L: usize>(
        base: &[[u8; W]; L],
        models: [&[[u8; W]; L]; N],
        settings: &Settings<N>,
        counts: &mut Counts<N>,
    ) -> [[u8; W]; L] {
        let &Settings { weights, min_keys, lambda, zero_sign, .. } = settings;
        let mut out = [[0; W]; L];
        let (mut special, mut conflicts, mut survivors, mut agreeing) = (0, 0, [0; N], [0; N]);
        for lane in 0..L {
            let base = C::widen(base[lane]);
            let mut taus = [0.0f32; N];
            let (mut mass, mut least, mut greatest) = (0.0f32, 0.0f32, 0.0f32);
            for model in 0..N {
                let tau = C::widen(models[model][lane]) - base;
                special += mask(key(tau) >= INFINITY) & 1;
                let kept = mask(key(tau) >= min_keys[model]);
                let tau = keep(kept, tau);
                survivors[model] += kept & 1;
                mass += weights[model] * tau;
                least = if tau < least { tau } else { least };
                greatest = if tau > greatest { tau } else { greatest };
                taus[model] = tau;
            }
            conflicts += mask(least < 0.0) & mask(greatest > 0.0) & 1;
            let gamma = sign(mass);
            let gamma = f32::from_bits(select(mask(key(gamma) == 0), zero_sign.to_bits(), gamma.to_bits()));
            let (mut sum, mut divisor) = (0.0f32, 0.0f32);
            for model in 0..N {
                let member = mask(taus[model] * gamma > 0.0);
                sum += keep(member, weights[model] * taus[model]);
                divisor += keep(member, weights[model]);
            }
            let mean = keep(mask(divisor != 0.0), sum / divisor);
            let merged = mean * lambda;
            for model in 0..N {
                agreeing[model] += agrees(taus[model], merged);
            }
            let (bytes, beyond) = C::narrow_finite(merged + base);
            special += beyond & 1;
            out[lane] = bytes;
        }
        counts.special += u64::from(special);
        counts.conflicts += u64::from(conflicts);
        add(&mut counts.kept, survivors);
        add(&mut counts.agreeing, agreeing);
        out
    }
}

/// 1 if both are above zero or both below.
#[inline(always)]
fn agrees(tau: f32, merged: f32) -> u32 {
    (mask(tau > 0.0) & mask(merged > 0.0) | mask(tau < 0.0) & mask(merged < 0.0)) & 1
}

#[inline(always)]
fn add<const N: usize>(sums: &mut [u64; N], counts: [u32; N]) {
    for (sum, count) in sums.iter_mut().zip(counts) {
        *sum += u64::from(count);
    }
}

/// `L` elements from `start` on.
#[inline(always)]
fn part<const W: usize, const L: usize>(elements: &[[u8; W]], start: usize) -> &[[u8; W]; L] {
    elements[start..].first_chunk().expect("slices have equal lengths")
}

/// Goes through all elements, the tail one by one.
#[inline(always)]
fn merge<R: Rule, C: Codec<W>, const W: usize, const N: usize>(
    stored: &Stored<'_>,
    settings: &Settings<N>,
    out: &mut [u8],
    counted: Counted<'_>,
) -> Option<u64> {
    let models: [&[[u8; W]]; N] = std::array::from_fn(|model| stored.models[model].as_chunks::<W>().0);
    // A rule without base is given something of the right length.
    let base = stored.base.map_or(models[0], |base| base.as_chunks::<W>().0);
    let mut counts = Counts { special: 0, conflicts: 0, kept: [0; N], agreeing: [0; N] };
    let (blocks, rest) = out.as_chunks_mut::<W>().0.as_chunks_mut::<BLOCK>();
    let tail = blocks.len() * BLOCK;
    for (index, block) in blocks.iter_mut().enumerate() {
        let start = index * BLOCK;
        for input in models.iter().chain(&[base]) {
            prefetch(input.get(start + AHEAD..start + AHEAD + BLOCK).unwrap_or_default().as_flattened());
        }
        let models = std::array::from_fn(|model| part(models[model], start));
        *block = R::block::<C, W, N, BLOCK>(part(base, start), models, settings, &mut counts);
        if counts.special != 0 {
            return None;
        }
    }
    for (start, element) in (tail..).zip(rest) {
        let models = std::array::from_fn(|model| part(models[model], start));
        [*element] = R::block::<C, W, N, 1>(part(base, start), models, settings, &mut counts);
    }
    if counts.special != 0 {
        return None;
    }
    counted.kept.iter_mut().zip(counts.kept).for_each(|(sum, count)| *sum += count);
    counted.agreeing.iter_mut().zip(counts.agreeing).for_each(|(sum, count)| *sum += count);
    Some(counts.conflicts)
}

#[inline(always)]
fn merge_models<C: Codec<W>, const W: usize, const N: usize>(
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
        zero_sign: 0.0,
    };
    match fused {
        Fused::Average { divisor } => {
            settings.divisor = divisor;
            merge::<Average, C, W, N>(stored, &settings, out, counted)
        }
        Fused::Sum { lambda } => {
            settings.lambda = lambda;
            merge::<Sum, C, W, N>(stored, &settings, out, counted)
        }
        Fused::Elected { zero_sign, lambda } => {
            (settings.lambda, settings.zero_sign) = (lambda, zero_sign);
            settings.min_keys = std::array::from_fn(|model| stored.min_keys[model]);
            merge::<Elected, C, W, N>(stored, &settings, out, counted)
        }
    }
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
        Float::BF16 => models!(BFloat16, 2: 1 2 3 4 5 6 7 8),
        Float::F16 => models!(Binary16, 2: 1 2 3 4),
        Float::F32 => models!(Binary32, 4: 1 2 3 4),
        Float::F64 | Float::E4M3 | Float::E5M2 => None,
    }
}
