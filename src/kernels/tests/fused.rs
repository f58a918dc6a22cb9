//! Whole merges in one loop against the same merges kernel by kernel.

use super::*;

const LENGTHS: [usize; 7] = [0, 1, 64, 255, 256, 257, 700];
const FLOATS: [Float; 3] = [Float::BF16, Float::F16, Float::F32];

/// One merge, kernel by kernel, as [`merge_stored`] does it at once; `None` where something is not finite.
fn in_steps(isa: Isa, fused: Fused, stored: &Stored<'_>, out: &mut [u8], counted: Counted<'_>) -> Option<u64> {
    let float = stored.float;
    let length = out.len() / float.width();
    let (mut base, mut merged, mut gamma) = (vec![0.0; length], vec![0.0; length], vec![0.0; length]);
    if let Some(bytes) = stored.base {
        load(isa, float, bytes, &mut base);
    }
    let mut finite = true;
    let mut input = |(model, bytes): (usize, &&[u8])| {
        let mut tau = vec![0.0; length];
        match fused {
            Fused::Average { .. } => load(isa, float, bytes, &mut tau),
            _ => finite &= task_vector(isa, float, bytes, &base, &mut tau),
        }
        finite &= all_finite(isa, &tau);
        if let Fused::Elected { .. } = fused {
            let key = stored.min_keys[model];
            if stored.counts_ties {
                counted.tied[model] += count_ties(isa, &tau, Ties { low: key, high: key });
            }
            counted.kept[model] += trim(isa, &mut tau, key);
        }
        tau
    };
    let inputs: Vec<Vec<f32>> = stored.models.iter().enumerate().map(&mut input).collect();
    let inputs: Vec<&[f32]> = inputs.iter().map(Vec::as_slice).collect();
    let opposed = match fused {
        Fused::Average { divisor } => {
            combine_sum(isa, &inputs, stored.weights, None, &mut merged);
            divide(isa, &mut merged, divisor);
            0
        }
        Fused::Sum { lambda } => {
            combine_sum(isa, &inputs, stored.weights, None, &mut merged);
            scale(isa, &mut merged, lambda);
            inputs.iter().zip(&mut *counted.agreeing).for_each(|(tau, sum)| *sum += agreeing(isa, tau, &merged));
            add(isa, &mut merged, &base);
            conflicts(isa, &inputs)
        }
        Fused::Elected { zero_sign, lambda } => {
            // A sum that overflows is left to the other kernels too.
            combine_sum(isa, &inputs, stored.weights, None, &mut merged);
            finite &= all_finite(isa, &merged);
            elect_mass(isa, &inputs, stored.weights, &mut gamma);
            if zero_sign != 0.0 {
                fill_zero_sign(isa, &mut gamma, zero_sign);
            }
            combine_mean(isa, &inputs, stored.weights, Some(&gamma), &mut merged);
            scale(isa, &mut merged, lambda);
            inputs.iter().zip(&mut *counted.agreeing).for_each(|(tau, sum)| *sum += agreeing(isa, tau, &merged));
            add(isa, &mut merged, &base);
            conflicts(isa, &inputs)
        }
    };
    (store(isa, float, &merged, out, false) && finite).then_some(opposed)
}

/// Of each model in turn; smaller ones might vanish under factors below 1.
fn min_keys(float: Float, count: usize) -> Vec<u32> {
    let any = if float == Float::F32 { 1e-36f32.to_bits() } else { 1 };
    (0..count).map(|model| [0.004f32.to_bits(), any, 0.01f32.to_bits()][model % 3]).collect()
}

/// Whether there is a loop for these factors.
fn is_open(fused: Fused, weights: &[f32]) -> bool {
    match fused {
        Fused::Elected { lambda, .. } => lambda > 0.0 && weights.iter().all(|&weight| weight > 0.0),
        _ => true,
    }
}

/// All merges with some settings each.
fn merges() -> Vec<Fused> {
    let mut merges = vec![Fused::Average { divisor: 1.0 }, Fused::Average { divisor: -2.3 }];
    for lambda in [1.0, 0.37, -1.5] {
        merges.push(Fused::Sum { lambda });
        merges.extend([0.0, 1.0, -1.0].map(|zero_sign| Fused::Elected { zero_sign, lambda }));
    }
    merges
}

/// Stored checkpoints, the first being base, and how they differ from it.
fn checkpoints(float: Float, len: usize, count: usize, value: impl Fn(u64) -> Vec<f32>) -> Vec<Vec<u8>> {
    let base = value(0);
    let each = |seed: u64| {
        let mut values = value(seed);
        if seed > 0 {
            // Task vectors with ties: few different ones, and zeros.
            values.iter_mut().zip(&base).for_each(|(value, base)| *value = base + *value * 0.25);
        }
        let mut bytes = vec![0; len * float.width()];
        store(Isa::baseline(), float, &values, &mut bytes, false);
        bytes
    };
    (0..=count as u64).map(each).collect()
}

/// Both ways, over all of the data and tile by tile, on every instruction set, with and without counts of ties.
fn assert_alike(float: Float, len: usize, checkpoints: &[Vec<u8>], fused: Fused, weights: &[f32]) -> Option<u64> {
    let found = assert_alike_with(float, len, checkpoints, (fused, false), weights);
    let again = assert_alike_with(float, len, checkpoints, (fused, true), weights);
    assert_eq!(found.is_some(), again.is_some());
    found
}

fn assert_alike_with(
    float: Float,
    len: usize,
    checkpoints: &[Vec<u8>],
    (fused, counts_ties): (Fused, bool),
    weights: &[f32],
) -> Option<u64> {
    if len == 0 && !is_open(fused, weights) {
        return None;
    }
    let min_keys = min_keys(float, weights.len());
    // A key that some entries have.
    let tied = {
        let decoded = |bytes: &[u8]| {
            let mut values = vec![0.0; len];
            load(Isa::baseline(), float, bytes, &mut values);
            values
        };
        let (base, model) = (decoded(&checkpoints[0]), decoded(&checkpoints[1]));
        let mut keys = base.iter().zip(&model).map(|(base, model)| key(model - base));
        keys.rfind(|key| (min_keys[0]..f32::INFINITY.to_bits()).contains(key))
    };
    let tied: Vec<u32> = tied.into_iter().chain(min_keys.iter().copied().skip(1)).collect();
    let min_keys = if counts_ties && tied.len() == min_keys.len() { tied } else { min_keys };
    type Merge = fn(Isa, Fused, &Stored<'_>, &mut [u8], Counted<'_>) -> Option<u64>;
    let run = |merge: Merge, isa: Isa, tiles: &[Range<usize>]| {
        let mut out = vec![0; len * float.width()];
        let none = || vec![0; weights.len()];
        let (mut kept, mut tied, mut agreeing) = (none(), none(), none());
        let mut opposed = Some(0);
        for tile in tiles {
            let bytes = tile.start * float.width()..tile.end * float.width();
            let models: Vec<&[u8]> = checkpoints[1..].iter().map(|bytes_of| &bytes_of[bytes.clone()]).collect();
            let base = Some(&checkpoints[0][bytes.clone()]);
            let stored = Stored { float, base, models: &models, weights, min_keys: &min_keys, counts_ties };
            let counted = Counted { kept: &mut kept, tied: &mut tied, agreeing: &mut agreeing };
            let found = merge(isa, fused, &stored, &mut out[bytes], counted);
            opposed = opposed.and_then(|sum| Some(sum + found?));
        }
        // Without an answer nothing else has a meaning.
        opposed.map(|opposed| (out, kept, tied, agreeing, opposed))
    };
    let expected = everywhere(len, |isa, tiles| run(in_steps, isa, tiles));
    let found = everywhere(len, |isa, tiles| run(merge_stored, isa, tiles));
    let expected = expected.filter(|_| is_open(fused, weights));
    assert_eq!(found, expected, "{float:?}, {} models, {fused:?}", weights.len());
    if let Some((_, kept, tied, ..)) = &found {
        assert!(
            tied.iter().zip(kept).all(|(tied, kept)| tied <= kept) && (counts_ties || *tied == vec![0; tied.len()])
        );
    }
    found.map(|(.., opposed)| opposed)
}

#[test]
fn one_loop_does_what_the_kernels_do_in_turn() {
    for float in FLOATS {
        let most = if float == Float::BF16 { FUSED_MODELS } else { 4 };
        for count in 1..=most {
            let len = LENGTHS[count % LENGTHS.len()];
            for len in [len, if cfg!(miri) { 70 } else { 300 }] {
                let checkpoints = checkpoints(float, len, count, |seed| coarse(len, seed));
                for (index, fused) in merges().into_iter().enumerate() {
                    let weights: Vec<f32> = (0..count)
                        .map(|t| [[1.0, 1.0, 1.0], [0.5, 0.3, -0.2], [0.5, 0.3, 2.0]][index % 3][t % 3])
                        .collect();
                    let found = assert_alike(float, len, &checkpoints, fused, &weights);
                    assert_eq!(found.is_some(), is_open(fused, &weights), "finite");
                }
            }
        }
    }
}

#[test]
fn whatever_is_not_finite_is_left_to_the_other_kernels() {
    for float in FLOATS {
        let len = 600;
        for finite in [true, false] {
            let checkpoints = checkpoints(float, len, 3, |seed| wild(len, seed, finite));
            for fused in merges() {
                for weights in [[1.0, 0.5, -3.0], [1.0, 0.5, 3.0], [1.0; 3]] {
                    assert_alike(float, len, &checkpoints, fused, &weights);
                }
            }
        }
        // A single one, anywhere: in base, in a model, in the result.
        let calm = checkpoints(float, len, 2, |seed| noise(len, seed));
        for (party, place) in [(0, 0), (1, 255), (2, 256), (1, 599)] {
            let mut checkpoints = calm.clone();
            let bytes = place * float.width()..(place + 1) * float.width();
            store(Isa::baseline(), float, &[f32::NEG_INFINITY], &mut checkpoints[party][bytes], false);
            for fused in merges() {
                let unread = party == 0 && matches!(fused, Fused::Average { .. });
                let open = unread && is_open(fused, &[1.0; 2]);
                assert_eq!(assert_alike(float, len, &checkpoints, fused, &[1.0, 1.0]).is_some(), open);
            }
        }
        let huge = 3e38;
        let narrow = float == Float::F16;
        let fused = Fused::Average { divisor: 1.0 };
        assert_eq!(assert_alike(float, len, &calm, fused, &[huge, huge]).is_none(), narrow);
        let fused = Fused::Average { divisor: f32::MIN_POSITIVE };
        assert_eq!(assert_alike(float, len, &calm, fused, &[huge, huge]), None);
    }
}

#[test]
fn elections_under_which_survivors_may_vanish_have_no_loop() {
    let open = |float: Float, min_key: f32, weight: f32, lambda: f32| {
        let bytes = vec![0; float.width()];
        let min_keys = [min_key.to_bits().max(1)];
        let (base, models) = (Some(&*bytes), &[&*bytes]);
        let weights = &[weight];
        let stored = Stored { float, base, models, weights, min_keys: &min_keys, counts_ties: false };
        let counted = Counted { kept: &mut [0], tied: &mut [0], agreeing: &mut [0] };
        let fused = Fused::Elected { zero_sign: 0.0, lambda };
        merge_stored(Isa::detect(), fused, &stored, &mut bytes.clone(), counted).is_some()
    };
    for float in FLOATS {
        // Factors of 1 or above, over the smallest survivor there can be.
        assert!(open(float, 0.0, 1.0, 1.0) && open(float, 0.0, 1.0, 3.0));
        // Below, where survivors are not that small.
        assert!(open(float, 1e-9, 0.1, 0.1));
        assert_eq!(open(float, 0.0, 1.0, 0.1), float != Float::F32);
        assert_eq!(open(float, 0.0, 0.1, 1.0), float != Float::F32);
        assert!(!open(float, 0.0, 1e-35, 1.0) || float == Float::F16);
        for factor in [0.0, -1.0, f32::NAN, 1e-45] {
            assert!(!open(float, 1e-9, factor, 1.0) && !open(float, 1e-9, 1.0, factor));
        }
        // What is not finite has to survive, or nobody would see it.
        assert!(open(float, f32::INFINITY, 1.0, 1.0) && !open(float, f32::from_bits(0x7f80_0001), 1.0, 1.0));
    }
}

#[test]
fn other_types_and_more_models_have_no_loop() {
    let bytes = [0u8; 16];
    let merge = |float, count: usize| {
        let models = vec![&bytes[..]; count];
        let (base, weights) = (Some(&bytes[..]), &vec![1.0; count][..]);
        let stored = Stored { float, base, models: &models, weights, min_keys: &[], counts_ties: false };
        let none = || vec![0; count];
        let counted = Counted { kept: &mut none(), tied: &mut none(), agreeing: &mut none() };
        merge_stored(Isa::detect(), Fused::Sum { lambda: 1.0 }, &stored, &mut [1; 16], counted)
    };
    assert_eq!(merge(Float::BF16, FUSED_MODELS), Some(0));
    for (float, count) in [(Float::BF16, 9), (Float::BF16, 0), (Float::F32, 5), (Float::F64, 1), (Float::E4M3, 1)] {
        assert_eq!(merge(float, count), None);
    }
}
