//! Election, disjoint merge and linear kernels against the paper's equations.

use super::*;

/// Weights for any number of models: ones, powers of two with a negative one, and ones that cancel in pairs.
fn weightings(models: usize) -> [Vec<f32>; 3] {
    let each = |pattern: &[f32]| pattern.iter().copied().cycle().take(models).collect();
    [each(&[1.0]), each(&[0.5, 2.0, 1.0, -0.25]), each(&[1.0, -1.0])]
}

/// Model counts: one, few, and more than any register file holds.
const MODELS: [usize; 6] = [1, 2, 3, 4, 9, 64];

type Combine = fn(Isa, &[&[f32]], &[f32], Option<&[f32]>, &mut [f32]);
type InPlace<'a> = &'a dyn Fn(Isa, &Range<usize>, &mut [f32]);
type Oracle = fn(&[f64], &[f64], Option<f64>) -> f64;
const COMBINES: [(Combine, Oracle); 3] =
    [(combine_mean, naive::mean), (combine_sum, naive::sum), (combine_max, naive::max)];

fn models(count: usize, each: impl Fn(u64) -> Vec<f32>) -> Vec<Vec<f32>> {
    (0..count as u64).map(each).collect()
}

/// Runs a kernel that makes one value per position, everywhere.
fn positions(len: usize, run: impl Fn(Isa, &Range<usize>, &mut [f32])) -> Vec<f32> {
    let out = everywhere(len, |isa, tiles| {
        let mut out = vec![9.0; len];
        for tile in tiles {
            run(isa, tile, &mut out[tile.clone()]);
        }
        bits(&out)
    });
    out.into_iter().map(f32::from_bits).collect()
}

fn mass(models: &[Vec<f32>], weights: &[f32], len: usize) -> Vec<f32> {
    positions(len, |isa, tile, out| elect_mass(isa, &cut(models, tile), weights, out))
}

#[test]
fn elections_equal_the_paper_where_sums_are_exact() {
    for len in LENGTHS {
        for count in MODELS {
            let models = models(count, |seed| coarse(len, seed));
            let columns: Vec<Vec<f64>> = (0..len).map(|at| column(&models, at)).collect();
            for weights in weightings(count) {
                let gamma = mass(&models, &weights, len);
                let weights = f64s(&weights);
                assert_eq!(bits(&gamma), oracle_bits(columns.iter().map(|column| naive::elect_mass(column, &weights))));
            }
            let votes = positions(len, |isa, tile, out| elect_count(isa, &cut(&models, tile), out));
            assert_eq!(bits(&votes), oracle_bits(columns.iter().map(|column| naive::elect_count(column))));
            let disagreeing = everywhere(len, |isa, tiles| -> u64 {
                tiles.iter().map(|tile| conflicts(isa, &cut(&models, tile))).sum()
            });
            assert_eq!(disagreeing, columns.iter().filter(|column| naive::conflict(column)).count() as u64);
        }
    }
}

#[test]
fn merges_equal_the_paper_where_sums_are_exact() {
    for len in LENGTHS {
        for count in MODELS {
            let models = models(count, |seed| coarse(len, seed));
            let columns: Vec<Vec<f64>> = (0..len).map(|at| column(&models, at)).collect();
            for weights in weightings(count) {
                let gamma = mass(&models, &weights, len);
                let exact = f64s(&weights);
                for (combine, oracle) in COMBINES {
                    let merged = positions(len, |isa, tile, out| {
                        combine(isa, &cut(&models, tile), &weights, Some(&gamma[tile.clone()]), out);
                    });
                    let expected = (0..len).map(|at| oracle(&columns[at], &exact, Some(f64::from(gamma[at]))));
                    // Sums that cancel may be -0.0 on either side: zeros are equal.
                    assert_eq!(oracle_bits(f64s(&merged).into_iter()), oracle_bits(expected));
                    let merged =
                        positions(len, |isa, tile, out| combine(isa, &cut(&models, tile), &weights, None, out));
                    let expected = (0..len).map(|at| oracle(&columns[at], &exact, None));
                    assert_eq!(oracle_bits(f64s(&merged).into_iter()), oracle_bits(expected));
                }
            }
        }
    }
}

#[test]
fn merges_are_near_the_paper_where_sums_round() {
    let len = 700;
    for count in MODELS {
        let models = models(count, |seed| noise(len, seed));
        let weights: Vec<f32> = (0..count).map(|t| 0.1 + t as f32 * 0.37).collect();
        let exact = f64s(&weights);
        let gamma = mass(&models, &weights, len);
        for (combine, oracle) in COMBINES {
            for elected in [true, false] {
                let merged = positions(len, |isa, tile, out| {
                    combine(isa, &cut(&models, tile), &weights, elected.then_some(&gamma[tile.clone()]), out);
                });
                for at in 0..len {
                    let column = column(&models, at);
                    let expected = oracle(&column, &exact, elected.then_some(f64::from(gamma[at])));
                    let scale: f64 = column.iter().zip(&exact).map(|(tau, weight)| (tau * weight).abs()).sum();
                    let bound = 1e-6 * (count + 1) as f64 * scale;
                    assert!((f64::from(merged[at]) - expected).abs() <= bound, "{} {expected}", merged[at]);
                }
            }
        }
    }
}

#[test]
fn sums_run_in_model_order() {
    let len = 130;
    let models = models(9, |seed| noise(len, seed));
    let weights: Vec<f32> = (0..9).map(|t| 0.1 + t as f32 * 0.37).collect();
    let merged = positions(len, |isa, tile, out| combine_sum(isa, &cut(&models, tile), &weights, None, out));
    let in_order = |at: usize| models.iter().zip(&weights).fold(0.0, |sum, (tau, weight)| sum + weight * tau[at]);
    assert_eq!(merged, (0..len).map(in_order).collect::<Vec<f32>>());
    // 2^24 + 1 + 1 is 2^24 from the left and 2^24 + 2 from the right.
    let models = [vec![16_777_216.0; 65], vec![1.0; 65], vec![1.0; 65]];
    let merged = positions(65, |isa, tile, out| combine_sum(isa, &cut(&models, tile), &[1.0; 3], None, out));
    assert_eq!(merged, vec![16_777_216.0; 65]);
}

#[test]
fn wild_values_agree_everywhere() {
    for len in LENGTHS {
        let models = models(5, |seed| wild(len, 40 + seed, false));
        let weights = [1.0, -0.3, 1e30, 1e-30, 2.0];
        let gamma = mass(&models, &weights, len);
        assert!(gamma.iter().all(|gamma| [-1.0, 0.0, 1.0].contains(gamma)));
        positions(len, |isa, tile, out| elect_count(isa, &cut(&models, tile), out));
        for (combine, _) in COMBINES {
            for gamma in [Some(&gamma), None] {
                positions(len, |isa, tile, out| {
                    combine(isa, &cut(&models, tile), &weights, gamma.map(|gamma| &gamma[tile.clone()]), out);
                });
            }
        }
    }
}

#[test]
fn denormals_count() {
    let tiny = f32::from_bits(1);
    let models = [vec![tiny; 70], vec![tiny; 70], vec![-tiny; 70]];
    let gamma = mass(&models, &[1.0; 3], 70);
    assert_eq!(gamma, vec![1.0; 70]);
    for (combine, expected) in [(combine_mean as Combine, tiny), (combine_sum, 2.0 * tiny), (combine_max, tiny)] {
        let merged = positions(70, |isa, tile, out| {
            combine(isa, &cut(&models, tile), &[1.0; 3], Some(&gamma[tile.clone()]), out);
        });
        assert_eq!(bits(&merged), bits(&[expected; 70]));
    }
}

#[test]
fn no_models_merge_to_nothing() {
    for isa in Isa::available() {
        let (mut gamma, mut out) = ([9.0; 70], [9.0; 70]);
        elect_mass(isa, &[], &[], &mut gamma);
        assert_eq!(gamma, [0.0; 70]);
        elect_count(isa, &[], &mut gamma);
        assert_eq!(gamma, [0.0; 70]);
        for (combine, _) in COMBINES {
            out.fill(9.0);
            combine(isa, &[], &[], None, &mut out);
            assert_eq!(out, [0.0; 70]);
        }
        assert_eq!(conflicts(isa, &[]), 0);
    }
}

#[test]
fn the_first_model_wins_ties_of_the_maximum() {
    let models = [vec![1.0; 70], vec![-2.0; 70], vec![2.0; 70]];
    let merged = positions(70, |isa, tile, out| combine_max(isa, &cut(&models, tile), &[1.0; 3], None, out));
    assert_eq!(merged, vec![-2.0; 70]);
}

#[test]
fn products_and_sums_round_separately() {
    // (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24 rounds to 1 + 2^-11, so the difference is 0, but 2^-24 with a fused operation.
    let factor = 1.0 + 2f32.powi(-12);
    let product = 1.0 + 2f32.powi(-11);
    assert_ne!(factor.mul_add(factor, -product), 0.0, "the values would show a fused operation");
    let len = 131;
    let models = [vec![-product; len], vec![factor; len]];
    let weights = [1.0, factor];
    let zeros = vec![0.0; len];
    assert_eq!(mass(&models, &weights, len), zeros);
    assert_eq!(positions(len, |isa, tile, out| combine_sum(isa, &cut(&models, tile), &weights, None, out)), zeros);
    assert_eq!(positions(len, |isa, tile, out| combine_mean(isa, &cut(&models, tile), &weights, None, out)), zeros);
    let added = |isa, tile: &Range<usize>, out: &mut [f32]| {
        out.copy_from_slice(&models[0][tile.clone()]);
        add_scaled(isa, out, factor, &models[1][tile.clone()]);
    };
    assert_eq!(positions(len, added), zeros);
}

#[test]
fn signs() {
    for len in LENGTHS {
        let values = wild(len, 51, false);
        let gamma = positions(len, |isa, tile, out| sign_of(isa, &values[tile.clone()], out));
        assert_eq!(bits(&gamma), oracle_bits(f64s(&values).into_iter().map(naive::sign)));
        let total = everywhere(len, |isa, tiles| -> i64 {
            tiles.iter().map(|tile| sum_signs(isa, &gamma[tile.clone()])).sum()
        });
        assert_eq!(total, gamma.iter().map(|gamma| *gamma as i64).sum::<i64>());
        for sign in [1.0, -1.0, 0.0] {
            let filled = positions(len, |isa, tile, out| {
                out.copy_from_slice(&gamma[tile.clone()]);
                fill_zero_sign(isa, out, sign);
            });
            let expected = gamma.iter().map(|gamma| if *gamma == 0.0 { sign } else { *gamma });
            assert_eq!(filled, expected.collect::<Vec<_>>());
        }
    }
}

#[test]
fn linear_kernels() {
    for len in LENGTHS {
        let (one, two) = (noise(len, 61), noise(len, 62));
        let from_one = |run: InPlace<'_>| {
            positions(len, |isa, tile, out| {
                out.copy_from_slice(&one[tile.clone()]);
                run(isa, tile, out);
            })
        };
        let each = |value: fn(f64, f64) -> f32| -> Vec<f32> {
            one.iter().zip(&two).map(|(one, two)| value(f64::from(*one), f64::from(*two))).collect()
        };
        // One f64 operation on f32 operands, then f32: rounded like the f32 operation.
        let factor = f64::from(0.3f32);
        assert_eq!(from_one(&|isa, _, out| scale(isa, out, 0.3)), each(|one, _| (one * f64::from(0.3f32)) as f32));
        assert_eq!(from_one(&|isa, _, out| divide(isa, out, 0.3)), each(|one, _| (one / f64::from(0.3f32)) as f32));
        assert_eq!(from_one(&|isa, tile, out| add(isa, out, &two[tile.clone()])), each(|one, two| (one + two) as f32));
        let expected: Vec<f32> = one
            .iter()
            .zip(&two)
            .map(|(one, two)| (f64::from(*one) + f64::from((factor * f64::from(*two)) as f32)) as f32)
            .collect();
        assert_eq!(from_one(&|isa, tile, out| add_scaled(isa, out, 0.3, &two[tile.clone()])), expected);
    }
}

#[test]
fn dot_products_are_those_of_f64_on_every_instruction_set() {
    for len in LENGTHS {
        let (a, b) = (noise(len, 5), wild(len, 6, true));
        let found: Vec<u64> = Isa::available().into_iter().map(|isa| dot(isa, &a, &b).to_bits()).collect();
        assert!(found.windows(2).all(|pair| pair[0] == pair[1]), "{len} elements");
        let products = || a.iter().zip(&b).map(|(a, b)| f64::from(*a) * f64::from(*b));
        let (sum, size) = (products().sum::<f64>(), products().map(f64::abs).sum::<f64>());
        assert!((f64::from_bits(found[0]) - sum).abs() <= 1e-13 * size, "{len} elements");
    }
}
