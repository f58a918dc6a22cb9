//! Every kernel on every instruction set this CPU has, on whole slices and on slices cut into tiles.
//!
//! - [`everywhere`] is the determinism test: it insists that all of those agree bit for bit.
//! - What they agree on is compared with `naive.rs`: exactly, on data chosen so that f32 sums do not round, or within
//!   a bound otherwise.

mod formats;
mod fused;
mod merge;
mod rates;
mod scaled;
mod trim;

use std::fmt::Debug;
use std::ops::Range;

use super::*;

/// Around the block size, and far from it; a few of them where everything is interpreted.
#[cfg(miri)]
const LENGTHS: [usize; 4] = [0, 1, 65, 130];
#[cfg(not(miri))]
const LENGTHS: [usize; 16] = [0, 1, 2, 3, 7, 15, 31, 33, 63, 64, 65, 127, 128, 129, 130, 1091];

/// Runs on every instruction set, over the whole length and over tiles that cut it at awkward places.
fn everywhere<R: PartialEq + Debug>(len: usize, run: impl Fn(Isa, &[Range<usize>]) -> R) -> R {
    let outcome = run(Isa::baseline(), std::slice::from_ref(&(0..len)));
    for isa in Isa::available() {
        for tile in if cfg!(miri) { vec![64] } else { vec![len.max(1), 1, 5, 64, 100] } {
            let tiles: Vec<_> = (0..len).step_by(tile).map(|start| start..(start + tile).min(len)).collect();
            assert_eq!(run(isa, &tiles), outcome, "{} on {len} elements in tiles of {tile}", isa.name());
        }
    }
    outcome
}

/// The bits of values, all NaN being one.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| if value.is_nan() { 0x7fc0_0000 } else { value.to_bits() }).collect()
}

/// The bits of an oracle's values rounded to f32, with +0.0 for zeros.
fn oracle_bits(values: impl Iterator<Item = f64>) -> Vec<u32> {
    bits(&values.map(|value| value as f32 + 0.0).collect::<Vec<_>>())
}

fn f64s(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}

/// The same range of every model.
fn cut<'a>(models: &'a [Vec<f32>], tile: &Range<usize>) -> Vec<&'a [f32]> {
    models.iter().map(|tau| &tau[tile.clone()]).collect()
}

/// One position of every model, in f64.
fn column(models: &[Vec<f32>], position: usize) -> Vec<f64> {
    models.iter().map(|tau| f64::from(tau[position])).collect()
}

/// Bell-shaped task vectors.
fn noise(len: usize, seed: u64) -> Vec<f32> {
    let bell = |word: u64| (0..4).map(|part| ((word >> (16 * part)) & 0xffff) as i64 - 0x8000).sum::<i64>();
    (0..len as u64).map(|index| bell(draw(seed, index)) as f32 * 1e-7).collect()
}

/// Small multiples of 2^-10, a third of them zeros of both signs: sums and powers of two times them are exact in f32.
fn coarse(len: usize, seed: u64) -> Vec<f32> {
    let each = |word: u64| match word % 6 {
        0 => 0.0,
        1 => -0.0,
        _ => ((word >> 32) % 64) as f32 / 1024.0 * if word & 0x100 == 0 { 1.0 } else { -1.0 },
    };
    (0..len as u64).map(|index| each(draw(seed, index))).collect()
}

/// Everything f32 has: any bit pattern, zeros, denormals, ties at ±0.5 and, if asked, infinities and NaN.
fn wild(len: usize, seed: u64, finite: bool) -> Vec<f32> {
    let each = |word: u64| {
        let sign = ((word >> 8) as u32 & 1) << 31;
        let random = (word >> 32) as u32;
        let value = match word % 10 {
            0 => 0.0,
            1 => f32::from_bits(random & 0x007f_ffff),
            2 => f32::from_bits(1),
            3 | 4 => 0.5,
            5 => f32::MAX,
            6 => f32::INFINITY,
            7 => f32::NAN,
            _ => f32::from_bits(random & 0x7fff_ffff),
        };
        let value = f32::from_bits(value.to_bits() | sign);
        if finite && !value.is_finite() { 1.0 } else { value }
    };
    (0..len as u64).map(|index| each(draw(seed, index))).collect()
}

#[test]
fn instruction_sets_are_distinct_and_the_best_comes_last() {
    let sets = Isa::available();
    assert_eq!(sets.first(), Some(&Isa::baseline()));
    assert_eq!(sets.last(), Some(&Isa::detect()));
    let names: std::collections::HashSet<_> = sets.iter().map(|isa| isa.name()).collect();
    assert_eq!(names.len(), sets.len());
}

#[test]
fn draws_are_splitmix64_and_never_change() {
    assert_eq!([draw(0, 0), draw(0, 1)], [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4]);
    // From an independent implementation.
    assert_eq!(draw(1, 0), 0xbfef_8030_ddc2_d772);
    assert_eq!(draw(42, 1 << 40), 0xadf0_2fa5_54e5_373c);
    assert_eq!(draw(u64::MAX, u64::MAX), 0x4bff_d802_ebfb_15e4);
}

/// The number of `count` events of probability `p` is within six standard deviations of its expectation.
fn assert_binomial(hits: usize, count: usize, p: f64, what: &str) {
    let (n, deviation) = (count as f64, (count as f64 * p * (1.0 - p)).sqrt());
    assert!((hits as f64 - n * p).abs() < 6.0 * deviation, "{what}: {hits} of {count}, probability {p}");
}

#[test]
fn draws_are_uniform_and_neighbours_independent() {
    const COUNT: usize = if cfg!(miri) { 1 << 8 } else { 1 << 16 };
    for draw_key in [0, 1, 2, 0x9e37_79b9_7f4a_7c15, u64::MAX] {
        let draws: Vec<u64> = (0..COUNT as u64).map(|index| draw(draw_key, index)).collect();
        for top in 0..16 {
            assert_binomial(draws.iter().filter(|word| *word >> 60 == top).count(), COUNT, 1.0 / 16.0, "sixteenths");
        }
        // Neighbouring indexes, neighbouring keys, and a key that differs by the generator's own increment.
        let others = [(0, 1), (0, 2), (1, 0), (2, 0), (0x9e37_79b9_7f4a_7c15, 0)];
        for (key_step, index_step) in others {
            let other = |index: u64| draw(draw_key.wrapping_add(key_step), index + index_step);
            let pairs: Vec<(u64, u64)> = (0..COUNT as u64).map(|index| (draws[index as usize], other(index))).collect();
            for bit in 0..64 {
                let flips = pairs.iter().filter(|(one, two)| (one ^ two) >> bit & 1 == 1).count();
                assert_binomial(flips, COUNT, 0.5, "flips of a bit");
            }
            let limit = u64::MAX / 5;
            let both = pairs.iter().filter(|(one, two)| *one < limit && *two < limit).count();
            assert_binomial(both, COUNT, 0.04, "both below a fifth");
        }
    }
}
