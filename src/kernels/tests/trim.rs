//! Trimming and counting against the oracle, on data with massive ties.

use super::*;

/// Keys of thresholds worth trying: the smallest denormal, the ties of the data, infinity, NaN, beyond all.
const THRESHOLDS: [u32; 7] = [1, 2, 0x3e80_0000, 0x3f00_0000, 0x7f80_0000, 0x7fc0_0000, u32::MAX];

/// Ranges of ties: one key, a wide range, zeros included, all keys, none.
const TIES: [Ties; 6] = [
    Ties { low: 0x3f00_0000, high: 0x3f00_0000 },
    Ties { low: 0x3d00_0000, high: 0x3f00_0000 },
    Ties { low: 0, high: 0x3f00_0000 },
    Ties { low: 0, high: 0 },
    Ties { low: 0, high: u32::MAX },
    Ties { low: 5, high: 4 },
];

/// Coarse and wild data of a length.
fn data(len: usize) -> [Vec<f32>; 3] {
    [coarse(len, 21), wild(len, 22, true), wild(len, 23, false)]
}

fn tied(ties: Ties, tau: f32) -> bool {
    (ties.low..=ties.high).contains(&key(tau))
}

/// The oracle's trim of a slice, given which entries are kept, and its survivors.
fn oracle(tau: &[f32], mut kept: impl FnMut(usize, f32) -> bool) -> (Vec<u32>, u64) {
    let trimmed: Vec<f64> =
        tau.iter().enumerate().map(|(at, tau)| naive::trim(f64::from(*tau), kept(at, *tau))).collect();
    let survivors = trimmed.iter().filter(|tau| **tau != 0.0).count();
    (oracle_bits(trimmed.into_iter()), survivors as u64)
}

#[test]
fn keys_order_magnitudes() {
    let values = wild(200, 1, true);
    for one in &values {
        for two in &values {
            assert_eq!(key(*one).cmp(&key(*two)), one.abs().total_cmp(&two.abs()));
        }
    }
}

#[test]
fn trim_keeps_magnitudes_from_the_threshold_on() {
    for len in LENGTHS {
        for tau in data(len) {
            for min_key in THRESHOLDS {
                let outcome = everywhere(len, |isa, tiles| {
                    let mut tau = tau.clone();
                    let survivors = tiles.iter().map(|tile| trim(isa, &mut tau[tile.clone()], min_key)).sum();
                    (bits(&tau), survivors)
                });
                let expected = if min_key > 0x7f80_0000 {
                    oracle(&tau, |_, tau| tau.is_nan() && key(tau) >= min_key)
                } else {
                    let threshold = f64::from(f32::from_bits(min_key));
                    oracle(&tau, |_, tau| naive::magnitude(f64::from(tau)) >= threshold)
                };
                assert_eq!(outcome, expected, "{len} {min_key:#x}");
            }
        }
    }
}

#[test]
fn trim_sample_draws_for_ties() {
    for len in LENGTHS {
        for tau in data(len) {
            for ties in TIES {
                // Indexes beyond 32 bits, and one that wraps.
                for first in [0, 0xffff_ffff, u64::MAX - 3] {
                    // The last one is a draw itself: below means below.
                    for accept in [0, 1 << 62, u64::MAX, draw(99, first)] {
                        let outcome = everywhere(len, |isa, tiles| {
                            let mut tau = tau.clone();
                            let trim = |tile: &Range<usize>| {
                                let first = first.wrapping_add(tile.start as u64);
                                trim_sample(isa, &mut tau[tile.clone()], ties, 99, first, accept)
                            };
                            let survivors = tiles.iter().map(trim).sum();
                            (bits(&tau), survivors)
                        });
                        let expected = oracle(&tau, |at, tau| {
                            let accepted = draw(99, first.wrapping_add(at as u64)) < accept;
                            key(tau) > ties.high || (tied(ties, tau) && accepted)
                        });
                        assert_eq!(outcome, expected, "{len} {ties:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn trim_sample_keeps_the_share_it_is_asked_for() {
    let ties = Ties { low: key(0.5), high: key(0.5) };
    let mut tau = vec![0.5; if cfg!(miri) { 2_000 } else { 100_000 }];
    let survivors = trim_sample(Isa::detect(), &mut tau, ties, 1, 0, u64::MAX / 10 * 3);
    assert_binomial(survivors as usize, tau.len(), 0.3, "survivors");
}

#[test]
fn trim_lowest_keeps_the_first_ties() {
    for len in LENGTHS.into_iter().chain([if cfg!(miri) { 200 } else { 5000 }]) {
        for tau in data(len) {
            for ties in TIES {
                let all = tau.iter().filter(|tau| tied(ties, **tau)).count() as u64;
                for quota in [0, 1, all / 2, all.saturating_sub(1), all, all + 1, u64::MAX] {
                    let outcome = everywhere(len, |isa, tiles| {
                        let mut tau = tau.clone();
                        let (mut survivors, mut kept) = (0, 0);
                        for tile in tiles {
                            let more = trim_lowest(isa, &mut tau[tile.clone()], ties, quota - kept);
                            (survivors, kept) = (survivors + more.0, kept + more.1);
                        }
                        (bits(&tau), survivors, kept)
                    });
                    let mut left = quota;
                    let (trimmed, survivors) = oracle(&tau, |_, tau| {
                        let kept = tied(ties, tau) && left > 0;
                        left -= u64::from(kept);
                        kept || key(tau) > ties.high
                    });
                    assert_eq!(outcome, (trimmed, survivors, quota - left), "{len} {ties:?} {quota}");
                }
            }
        }
    }
}

#[test]
fn ties_are_counted() {
    for len in LENGTHS {
        for tau in data(len) {
            for ties in TIES {
                let count = everywhere(len, |isa, tiles| -> u64 {
                    tiles.iter().map(|tile| count_ties(isa, &tau[tile.clone()], ties)).sum()
                });
                assert_eq!(count, tau.iter().filter(|tau| tied(ties, **tau)).count() as u64);
            }
        }
    }
}

#[test]
fn counters_do_not_overflow_within_long_slices() {
    let len = (1 << if cfg!(miri) { 12 } else { 17 }) + 3;
    let ones = vec![1.0; len];
    let ties = Ties { low: key(1.0), high: key(1.0) };
    for isa in Isa::available() {
        assert_eq!(trim(isa, &mut ones.clone(), 1), len as u64);
        assert_eq!(count_ties(isa, &ones, ties), len as u64);
        assert_eq!(sum_signs(isa, &ones), len as i64);
        let mut bins = [0; 1];
        assert_eq!(histogram(isa, &ones, 0, 31, NO_KEY, &mut bins), 0);
        assert_eq!(bins, [STRAY | len as u64]);
    }
}

#[test]
fn keys_about_two_bounds_are_counted_and_listed() {
    let half = 0x3f00_0000;
    let bounds = [(0, 0), (0, 1), (0, half), (half, half), (half - 1, half), (half - 5000, half + 5000)];
    let more = [(0, 0x7fff_ffff), (0x7f80_0000, 0x7fff_ffff), (0x3c00_0000, 0x3f80_0000), (7, 0x7f7f_ffff)];
    for len in LENGTHS {
        for tau in data(len).into_iter().chain([noise(len, 31), vec![0.5; len]]) {
            for (low, high) in bounds.into_iter().chain(more) {
                let keys = || tau.iter().map(|tau| key(*tau));
                let listed: Vec<u32> = keys().filter(|key| (low + 1..high).contains(key)).collect();
                let expected = Near {
                    above: keys().filter(|&key| key > high).count() as u64,
                    at_high: keys().filter(|&key| key == high).count() as u64,
                    between: listed.len() as u64,
                    at_low: keys().filter(|&key| key == low && low < high).count() as u64,
                };
                for room in [len, listed.len() / 2] {
                    let (near, list) = everywhere(len, |isa, tiles| {
                        let (mut sum, mut list) = (Near::default(), vec![u32::MAX; room]);
                        for tile in tiles {
                            let room = list.get_mut(sum.between as usize..).unwrap_or_default();
                            let near = collect(isa, &tau[tile.clone()], low, high, room);
                            sum.above += near.above;
                            sum.at_high += near.at_high;
                            sum.between += near.between;
                            sum.at_low += near.at_low;
                        }
                        (sum, list)
                    });
                    assert_eq!(near, expected, "{len} elements, {low:#x} to {high:#x}");
                    let listed = listed.iter().chain(std::iter::repeat(&u32::MAX)).take(room);
                    assert!(list.iter().eq(listed), "{len} elements, {low:#x} to {high:#x}, room for {room}");
                }
            }
        }
    }
}

#[test]
fn histograms_count_every_key_once() {
    let half = 0x3f00_0000;
    // (low, shift, bins): wide, narrow around the ties, past the last key, empty, from beyond any key.
    let shapes = [(0, 15, 65536), (0, 31, 1), (half, 0, 1), (half - 40, 3, 10), (half - 5000, 0, 9000), (1, 0, 1)];
    let more = [(0x7f00_0000, 20, 1000), (half, 31, 5), (half, 0, 0), (0, 0, 0), (u32::MAX, 4, 3), (1 << 31, 0, 1)];
    for len in LENGTHS {
        for tau in data(len).into_iter().chain([noise(len, 31), vec![0.5; len]]) {
            for (low, shift, size) in shapes.into_iter().chain(more) {
                let outcome = everywhere(len, |isa, tiles| {
                    let mut bins = vec![7; size];
                    // Whatever is said to be common: nothing, the ties, some key, and what is none of the range.
                    let common = [NO_KEY, half, low.wrapping_add(1), 0, key(tau.first().copied().unwrap_or(1.0))];
                    let above = |(tile, common): (&Range<usize>, u32)| {
                        histogram(isa, &tau[tile.clone()], low, shift, common, &mut bins)
                    };
                    let above: u64 = tiles.iter().zip(common.into_iter().cycle()).map(above).sum();
                    (bins, above)
                });
                let (mut bins, mut above) = (vec![7; size], 0);
                for tau in tau.iter().filter(|tau| key(**tau) >= low) {
                    match bins.get_mut(((key(*tau) - low) >> shift) as usize) {
                        Some(bin) if (key(*tau) - low).is_multiple_of(1 << shift) => *bin += 1,
                        Some(bin) => *bin = (*bin + 1) | STRAY,
                        None => above += 1,
                    }
                }
                assert!(outcome == (bins, above), "{len} elements, low {low:#x}, shift {shift}, {size} bins");
            }
        }
    }
}

#[test]
fn what_another_slice_marks_is_dropped() {
    for len in LENGTHS {
        let (values, marks) = (wild(len, 3, false), coarse(len, 4));
        let expected: Vec<f32> =
            values.iter().zip(&marks).map(|(value, mark)| if *mark == 0.0 { *value } else { 0.0 }).collect();
        let count = expected.iter().filter(|value| **value != 0.0 || value.is_nan()).count() as u64;
        let found = everywhere(len, |isa, tiles| {
            let mut tau = values.clone();
            let kept: u64 =
                tiles.iter().map(|tile| drop_where(isa, &mut tau[tile.clone()], &marks[tile.clone()])).sum();
            (bits(&tau), kept)
        });
        // A negative zero that is kept becomes +0.0.
        assert_eq!(found, (bits(&expected.iter().map(|value| value + 0.0).collect::<Vec<_>>()), count));
    }
}
