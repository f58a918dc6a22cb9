//! Means in which every element of every model has a weight of its own, and what such weights must be.
//!
//! Fisher information spans many orders of magnitude: products and sums are in f64, where neither overflow nor underflow
//! of f32 factors is possible, and the quotient is rounded once.

/// Elements whose sums are kept at once.
const LANES: usize = 64;

#[inline(always)]
pub(super) fn weighted_mean(thetas: &[&[f32]], fishers: &[&[f32]], weights: &[f32], floor: f32, out: &mut [f32]) {
    for (at, out) in (0..).step_by(LANES).zip(out.chunks_mut(LANES)) {
        let (mut sums, mut totals) = ([0f64; LANES], [0f64; LANES]);
        for ((theta, fisher), &weight) in thetas.iter().zip(fishers).zip(weights) {
            let (theta, fisher) = (&theta[at..at + out.len()], &fisher[at..at + out.len()]);
            let weight = f64::from(weight);
            for i in 0..out.len() {
                let share = weight * f64::from(if fisher[i] > floor { fisher[i] } else { floor });
                sums[i] += share * f64::from(theta[i]);
                totals[i] += share;
            }
        }
        for i in 0..out.len() {
            out[i] = (sums[i] / totals[i]) as f32;
        }
    }
}

#[inline(always)]
pub(super) fn all_weights(values: &[f32]) -> bool {
    // Written so that NaN fails; -0.0 is no negative number.
    let bad = values.iter().fold(0u32, |bad, &value| bad | u32::from(!(0.0..f32::INFINITY).contains(&value)));
    bad == 0
}

#[cfg(test)]
mod tests {
    use crate::kernels::{self, Isa};

    #[test]
    fn every_instruction_set_agrees_with_the_equation() {
        let column = |seed: u32, spread: i32| -> Vec<f32> {
            let value = |i: u32| {
                let bits = i.wrapping_mul(2_654_435_761).wrapping_add(seed.wrapping_mul(40_503));
                (f64::from(bits >> 9) / 4e6 * 10f64.powi((bits % 61) as i32 * spread / 30 - spread)) as f32
            };
            (0..259).map(value).collect()
        };
        let thetas: Vec<Vec<f32>> = (0..3).map(|t| column(t, 0).iter().map(|x| x - 1.0).collect()).collect();
        let mut fishers: Vec<Vec<f32>> = (0..3).map(|t| column(9 + t, 30)).collect();
        fishers[0][..4].copy_from_slice(&[0.0, -0.0, f32::from_bits(1), f32::MAX]);
        fishers[1][..4].copy_from_slice(&[0.0, 1.0, f32::from_bits(1), f32::MAX]);
        let weights = [1.0f32, 0.25, 3.0];
        let [theta_refs, fisher_refs] =
            [&thetas, &fishers].map(|columns| columns.iter().map(Vec::as_slice).collect::<Vec<_>>());
        for floor in [1e-6f32, 1.0] {
            let mut first: Option<Vec<u32>> = None;
            for isa in Isa::available() {
                let mut out = vec![0f32; 259];
                kernels::weighted_mean(isa, &theta_refs, &fisher_refs, &weights, floor, &mut out);
                for i in 0..out.len() {
                    let share = |t: usize| f64::from(weights[t]) * f64::from(fishers[t][i].max(floor));
                    let sum: f64 = (0..3).map(|t| share(t) * f64::from(thetas[t][i])).sum();
                    let expected = (sum / (0..3).map(share).sum::<f64>()) as f32;
                    assert_eq!(out[i].to_bits(), expected.to_bits(), "{} element {i}", isa.name());
                }
                let bits: Vec<u32> = out.iter().map(|x| x.to_bits()).collect();
                assert_eq!(first.get_or_insert_with(|| bits.clone()), &bits);
            }
        }
    }

    #[test]
    fn weights_are_finite_and_not_negative() {
        for isa in Isa::available() {
            let with = |bad: f32| {
                let mut values = vec![1.0f32; 37];
                values[23] = bad;
                kernels::all_weights(isa, &values)
            };
            assert!([0.0, -0.0, 1e-45, f32::MAX].into_iter().all(with));
            assert!(![-1e-45, -1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY].into_iter().any(with));
        }
    }
}
