//! Widening and narrowing against the format standards: exhaustive where there are few codes.

use super::*;

const SMALL: [Float; 4] = [Float::F16, Float::BF16, Float::E4M3, Float::E5M2];

/// Codes as stored bytes, after one byte that makes them unaligned.
fn stored(float: Float, codes: impl Iterator<Item = u64>) -> Vec<u8> {
    let mut bytes = vec![0xa5];
    for code in codes {
        bytes.extend_from_slice(&code.to_le_bytes()[..float.width()]);
    }
    bytes
}

/// Every code of a small type; of those of two bytes a few where everything is interpreted.
fn codes(float: Float) -> impl Iterator<Item = u64> {
    let step = if cfg!(miri) && float.width() == 2 { 151 } else { 1 };
    (0..1u64 << (8 * float.width())).step_by(step)
}

/// The bytes that belong to a range of elements.
fn span(float: Float, tile: &Range<usize>) -> Range<usize> {
    tile.start * float.width()..tile.end * float.width()
}

/// Stores on every instruction set, in tiles; the bytes and whether all that is stored is finite.
fn store_everywhere(float: Float, values: &[f32], clamp: bool) -> (Vec<u8>, bool) {
    everywhere(values.len(), |isa, tiles| {
        let mut out = vec![0xa5; values.len() * float.width() + 1];
        let mut finite = true;
        for tile in tiles {
            finite &= store(isa, float, &values[tile.clone()], &mut out[1..][span(float, tile)], clamp);
        }
        (out, finite)
    })
}

/// Checks the stored bytes, and the finiteness of short groups, against the oracle.
fn assert_stores(float: Float, values: &[f32], clamp: bool) {
    let oracle: Vec<_> = values.iter().map(|value| naive::encode(float, f64::from(*value), clamp)).collect();
    let expected = stored(float, oracle.iter().map(|(code, _)| *code));
    let width = float.width();
    let mut out = vec![0; values.len() * width];
    let fits = |values: &[f32], oracle: &[(u64, bool)]| {
        values.iter().zip(oracle).all(|(value, (_, overflow))| value.is_finite() && (clamp || !overflow))
    };
    for isa in Isa::available() {
        let finite = store(isa, float, values, &mut out, clamp);
        assert_eq!(finite, fits(values, &oracle));
        if out != expected[1..] {
            let at = (0..values.len()).find(|at| out[at * width..][..width] != expected[1 + at * width..][..width]);
            let at = at.expect("some element differs");
            panic!("{float:?} {}: {:?} at {at}: {:x?}", isa.name(), values[at], &out[at * width..][..width]);
        }
        for (values, oracle) in values.chunks(7).zip(oracle.chunks(7)) {
            let finite = store(isa, float, values, &mut out[..values.len() * width], clamp);
            assert_eq!(finite, fits(values, oracle), "{float:?} {values:?}");
        }
    }
}

#[test]
fn every_code_widens_to_its_value() {
    for float in SMALL {
        let bytes = stored(float, codes(float));
        let expected: Vec<f32> = codes(float).map(|code| naive::decode(float, code) as f32).collect();
        for isa in Isa::available() {
            let mut out = vec![1.0; expected.len()];
            load(isa, float, &bytes[1..], &mut out);
            assert_eq!(bits(&out), bits(&expected), "{float:?} {}", isa.name());
        }
    }
}

#[test]
fn every_code_survives_a_round_trip() {
    for float in SMALL {
        let isa = Isa::detect();
        let bytes = stored(float, codes(float));
        let mut values = vec![0.0; bytes[1..].len() / float.width()];
        load(isa, float, &bytes[1..], &mut values);
        let canonical = |code| {
            let value = naive::decode(float, code);
            if value.is_nan() { naive::encode(float, value, false).0 } else { code }
        };
        let mut out = vec![0; bytes.len() - 1];
        assert_eq!(store(isa, float, &values, &mut out, false), values.iter().all(|value| value.is_finite()));
        assert!(out == stored(float, codes(float).map(canonical))[1..], "{float:?}");
    }
}

#[test]
fn halfway_cases_round_to_even() {
    for float in SMALL {
        let finite = |code: &u64| naive::decode(float, *code).is_finite();
        let positive: Vec<f64> =
            codes(float).take(codes(float).count() / 2).filter(finite).map(|code| naive::decode(float, code)).collect();
        let largest = positive[positive.len() - 1];
        let step = largest - positive[positive.len() - 2];
        let mut values = vec![];
        for (low, high) in positive.iter().zip(positive[1..].iter().chain([&(largest + step)])) {
            let middle = ((low + high) / 2.0) as f32;
            for value in [middle.next_down(), middle, middle.next_up()] {
                values.extend([value, -value]);
            }
        }
        assert_stores(float, &values, false);
    }
}

#[test]
fn any_pattern_rounds_like_the_oracle() {
    for float in SMALL {
        // Uniform patterns are mostly out of the range of the small types: half of them are scaled into it.
        let pattern = |index| {
            let word = draw(3, index);
            let exponent = (word >> 40) as u32 % 60 + 90;
            let narrow = (word as u32 & 0x807f_ffff) | exponent << 23;
            f32::from_bits(if index % 2 == 0 { word as u32 } else { narrow })
        };
        let values: Vec<f32> = (0..if cfg!(miri) { 200 } else { 20_000 }).map(pattern).collect();
        assert_stores(float, &values, false);
        assert_stores(float, &values, true);
        assert_stores(float, &wild(if cfg!(miri) { 100 } else { 1000 }, 5, false), true);
    }
}

#[test]
fn limits_of_each_type() {
    // (type, largest finite, last value that does not overflow, first that does)
    let cases = [
        (Float::F16, 65504.0, 65520.0f32.next_down(), 65520.0),
        (Float::BF16, f32::from_bits(0x7f7f_0000), f32::from_bits(0x7f7f_7fff), f32::from_bits(0x7f7f_8000)),
        (Float::E4M3, 448.0, 464.0, 464.0f32.next_up()),
        (Float::E5M2, 57344.0, 61440.0f32.next_down(), 61440.0),
    ];
    for (float, largest, last, first) in cases {
        let isa = Isa::detect();
        let nan = naive::encode(float, f64::NAN, false).0;
        let infinity = naive::encode(float, f64::INFINITY, false).0;
        let top = naive::encode(float, f64::from(largest), false).0;
        let one = |value: f32, clamp| {
            let mut out = [0; 8];
            let finite = store(isa, float, &[value], &mut out[..float.width()], clamp);
            (u64::from_le_bytes(out), finite)
        };
        for clamp in [false, true] {
            assert_eq!(one(last, clamp), (top, true), "{float:?}");
            assert_eq!(one(f32::INFINITY, clamp), (infinity, false), "{float:?}");
            assert_eq!(one(f32::NAN, clamp), (nan, false), "{float:?}");
            assert_eq!(one(-f32::NAN, clamp), (nan, false), "{float:?}");
            assert_eq!(one(f32::from_bits(0x7f80_0001), clamp), (nan, false), "{float:?}");
        }
        assert_eq!(one(first, false), (infinity, false), "{float:?}");
        assert_eq!(one(first, true), (top, true), "{float:?}");
        assert_eq!(one(f32::MAX, true), (top, true), "{float:?}");
    }
    assert_eq!(naive::encode(Float::E4M3, f64::INFINITY, false).0, 0x7f);
}

#[test]
fn wide_types_store_what_they_are_given() {
    let values = wild(500, 11, false);
    for float in [Float::F32, Float::F64] {
        assert_stores(float, &values, false);
        let (out, finite) = store_everywhere(float, &values, true);
        assert_eq!(finite, values.iter().all(|value| value.is_finite()));
        let back = everywhere(values.len(), |isa, tiles| {
            let mut back = vec![0.0; values.len()];
            for tile in tiles {
                load(isa, float, &out[1..][span(float, tile)], &mut back[tile.clone()]);
            }
            bits(&back)
        });
        assert_eq!(back, bits(&values));
    }
}

#[test]
fn doubles_round_to_nearest_even() {
    let doubles = [1.0 + 2f64.powi(-24), 1.0 + 3.0 * 2f64.powi(-24), 1e300, -1e300, 1e-50, -0.0, 2f64.powi(-150)];
    let bytes = stored(Float::F64, doubles.iter().map(|value| value.to_bits()));
    let expected = [1.0, 1.0 + 2f32.powi(-22), f32::INFINITY, -f32::INFINITY, 0.0, -0.0, 0.0];
    for isa in Isa::available() {
        let mut out = [1.0; 7];
        load(isa, Float::F64, &bytes[1..], &mut out);
        assert_eq!(bits(&out), bits(&expected));
    }
}

#[test]
fn lengths_offsets_and_tiles() {
    for float in Float::ALL {
        for len in LENGTHS {
            let values = wild(len, len as u64, false);
            for clamp in [false, true] {
                let (out, _) = store_everywhere(float, &values, clamp);
                assert_eq!(out[0], 0xa5);
                let oracle = values.iter().map(|value| naive::encode(float, f64::from(*value), clamp).0);
                assert!(out == stored(float, oracle), "{float:?} {len}");
            }
        }
    }
}

#[test]
fn task_vectors() {
    for float in Float::ALL {
        for len in LENGTHS {
            let base = noise(len, 1);
            let (bytes, _) = store_everywhere(float, &noise(len, 2), false);
            let (model, tau) = everywhere(len, |isa, tiles| {
                let (mut model, mut tau) = (vec![0.0; len], vec![0.0; len]);
                for tile in tiles {
                    let (bytes, base) = (&bytes[1..][span(float, tile)], &base[tile.clone()]);
                    load(isa, float, bytes, &mut model[tile.clone()]);
                    assert!(task_vector(isa, float, bytes, base, &mut tau[tile.clone()]));
                }
                (model, tau)
            });
            for at in 0..len {
                // One f64 operation on f32 operands, then f32: rounded like the f32 operation.
                assert_eq!(tau[at], (f64::from(model[at]) - f64::from(base[at])) as f32);
            }
        }
    }
}

#[test]
fn task_vectors_can_be_trimmed_on_the_way() {
    for float in Float::ALL {
        for len in LENGTHS {
            for finite in [true, false] {
                let base = wild(len, 1, finite).into_iter().map(|value| value * 1e-30).collect::<Vec<_>>();
                let (bytes, _) = store_everywhere(float, &coarse(len, 2), false);
                for min_key in [1, key(1e-3), key(0.5)] {
                    everywhere(len, |isa, tiles| {
                        let mut all = Vec::new();
                        for tile in tiles {
                            let (bytes, base) = (&bytes[1..][span(float, tile)], &base[tile.clone()]);
                            let (mut two, mut one) = (vec![0.0; tile.len()], vec![0.0; tile.len()]);
                            let clean = task_vector(isa, float, bytes, base, &mut two);
                            assert_eq!(clean, all_finite(isa, &two));
                            let kept = trim(isa, &mut two, min_key);
                            let fused = trimmed_task_vector(isa, float, bytes, base, min_key, &mut one);
                            assert_eq!(fused, clean.then_some(kept));
                            if clean {
                                assert_eq!(bits(&one), bits(&two));
                                all.extend(bits(&one));
                            }
                        }
                        if finite { all } else { Vec::new() }
                    });
                }
            }
        }
    }
}

#[test]
fn doubles_are_subtracted_and_added_as_doubles() {
    for base_float in Float::ALL {
        for float in Float::ALL {
            let len = if cfg!(miri) { 9 } else { 131 };
            let (mut base_bytes, _) = store_everywhere(base_float, &noise(len, 1), false);
            let (mut bytes, _) = store_everywhere(float, &noise(len, 2), false);
            // Doubles with bits that no f32 has.
            for (float, bytes) in [(base_float, &mut base_bytes), (float, &mut bytes)] {
                if float == Float::F64 {
                    bytes[1..].chunks_mut(8).for_each(|bytes| bytes[0] ^= 0x5b);
                }
            }
            let values = |float: Float, bytes: &[u8]| -> Vec<f64> {
                let wide = |code: &[u8]| {
                    let mut word = [0; 8];
                    word[..code.len()].copy_from_slice(code);
                    let code = u64::from_le_bytes(word);
                    if float == Float::F64 { f64::from_bits(code) } else { naive::decode(float, code) }
                };
                bytes.chunks(float.width()).map(wide).collect()
            };
            let (model, base) = (values(float, &bytes[1..]), values(base_float, &base_bytes[1..]));
            let (tau, out) = everywhere(len, |isa, tiles| {
                let (mut tau, mut out) = (vec![0.0; len], vec![0; len * 8 + 1]);
                for tile in tiles {
                    let base_bytes = &base_bytes[1..][span(base_float, tile)];
                    let bytes = &bytes[1..][span(float, tile)];
                    task_vector_f64(isa, float, bytes, base_float, base_bytes, &mut tau[tile.clone()]);
                    let out = &mut out[1..][span(Float::F64, tile)];
                    store_sum_f64(isa, base_float, base_bytes, &tau[tile.clone()], out);
                }
                (tau, out)
            });
            let sums = values(Float::F64, &out[1..]);
            for at in 0..len {
                assert_eq!(tau[at], (model[at] - base[at]) as f32);
                assert_eq!(sums[at], base[at] + f64::from(tau[at]));
            }
        }
    }
    let mut out = [0; 8];
    store_sum_f64(Isa::detect(), Float::F32, &f32::NEG_INFINITY.to_le_bytes(), &[f32::INFINITY], &mut out);
    assert_eq!(u64::from_le_bytes(out), 0x7ff8_0000_0000_0000);
}

#[test]
fn finiteness() {
    for len in LENGTHS {
        for finite in [false, true] {
            let values = wild(len, 17, finite);
            let all = everywhere(len, |isa, tiles| tiles.iter().all(|tile| all_finite(isa, &values[tile.clone()])));
            assert_eq!(all, values.iter().all(|value| value.is_finite()));
        }
    }
    // One bad value anywhere in a long slice is found.
    for at in [0, 1, 4095, 4096, 9999] {
        let mut values = vec![f32::MAX; 10_000];
        assert!(Isa::available().iter().all(|isa| all_finite(*isa, &values)));
        values[at] = f32::NEG_INFINITY;
        assert!(Isa::available().iter().all(|isa| !all_finite(*isa, &values)));
    }
}
