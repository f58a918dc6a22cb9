//! Scaling, adding and storing in one loop against the same one after the other.

use super::*;

const FLOATS: [Float; 5] = [Float::F32, Float::BF16, Float::F16, Float::E4M3, Float::E5M2];

#[test]
fn one_loop_scales_adds_and_stores() {
    for (float, len, finite) in
        FLOATS.iter().flat_map(|&f| LENGTHS.map(|len| (f, len, true)).into_iter().chain([(f, 300, false)]))
    {
        let bytes = |values: &[f32]| {
            let mut bytes = vec![0; len * float.width()];
            store(Isa::baseline(), float, values, &mut bytes, true);
            bytes
        };
        let data = match finite {
            true => [coarse(len, 1), noise(len, 2)],
            false => [wild(len, 1, false), wild(len, 2, false)],
        };
        let (base, tau) = (bytes(&data[0]), &data[1]);
        for lambda in [1.0, 0.3, 2.5, -1.0, 1e-30, 1e30] {
            let width = float.width();
            let at_once = everywhere(len, |isa, tiles| {
                let mut out = vec![0; base.len()];
                let stored = tiles.iter().map(|tile| {
                    let bytes = tile.start * width..tile.end * width;
                    store_scaled(isa, float, &base[bytes.clone()], &tau[tile.clone()], lambda, &mut out[bytes])
                });
                let stored = stored.fold(true, |all, one| all & one);
                stored.then_some(out)
            });
            let mut values = tau.clone();
            scale(Isa::baseline(), &mut values, lambda);
            let mut wide = vec![0.0; len];
            load(Isa::baseline(), float, &base, &mut wide);
            add(Isa::baseline(), &mut values, &wide);
            let mut out = vec![0; base.len()];
            let stored =
                store(Isa::baseline(), float, &values, &mut out, false) && all_finite(Isa::baseline(), &values);
            match at_once {
                Some(bytes) => assert_eq!((bytes, true), (out, stored), "{float:?} {len} {lambda}"),
                // Only what is too large, or nearly so, may be left to others.
                None => assert!(!stored || lambda == 1e30, "{float:?} {len} {lambda}"),
            }
        }
    }
}

#[test]
fn sums_of_more_digits_are_left_to_others() {
    assert!(!store_scaled(Isa::detect(), Float::F64, &[0; 16], &[0.0; 2], 1.0, &mut [0; 16]));
}

#[test]
fn key_ranges_leave_zeros_out() {
    for (values, range) in [
        (vec![], (0, 0)),
        (vec![0.0, -0.0], (0, 0)),
        (vec![0.0, -2.0, f32::from_bits(5), 1.0], (5, 2.0f32.to_bits())),
        (vec![f32::NAN; 70], (key(f32::NAN), key(f32::NAN))),
    ] {
        for isa in Isa::available() {
            assert_eq!(key_range(isa, &values), range, "{values:?}");
        }
    }
    let values = wild(1091, 3, true);
    let keys: Vec<u32> = values.iter().copied().map(key).filter(|key| *key > 0).collect();
    let expected = (*keys.iter().min().unwrap(), *keys.iter().max().unwrap());
    assert_eq!(
        everywhere(1091, |isa, tiles| {
            let ranges = tiles.iter().map(|tile| key_range(isa, &values[tile.clone()]));
            ranges.filter(|range| range.0 > 0).fold((u32::MAX, 0), |all, one| (all.0.min(one.0), all.1.max(one.1)))
        }),
        expected
    );
}
