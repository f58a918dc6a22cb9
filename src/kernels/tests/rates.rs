//! How fast each kernel is, per instruction set, on data in the nearest caches. Prints; asserts nothing.

use super::*;

/// Million elements per second of the main kernels; `cargo test --release kernels::tests::rates -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement, not a test"]
fn rates() {
    const LEN: usize = 1 << 16;
    const ROUNDS: usize = 200;
    let models: Vec<Vec<f32>> = (0..4).map(|seed| noise(LEN, seed)).collect();
    let taus: Vec<&[f32]> = models.iter().map(Vec::as_slice).collect();
    let weights = [1.0; 4];
    for isa in Isa::available() {
        let time = |name: &str, work: &mut dyn FnMut()| {
            work();
            let best = (0..5)
                .map(|_| {
                    let start = std::time::Instant::now();
                    for _ in 0..ROUNDS / 5 {
                        work();
                    }
                    start.elapsed()
                })
                .min()
                .unwrap();
            let rate = (LEN * ROUNDS / 5) as f64 / best.as_secs_f64() / 1e6;
            println!("{:9} {name:24} {rate:8.0} Melem/s", isa.name());
        };
        let (mut out, mut gamma) = (vec![0.0; LEN], vec![0.0; LEN]);
        for float in Float::ALL {
            let mut bytes = vec![0; LEN * float.width() + 1];
            time(&format!("store {float:?}"), &mut || {
                store(isa, float, taus[0], &mut bytes[1..], false);
            });
            time(&format!("load {float:?}"), &mut || load(isa, float, &bytes[1..], &mut out));
            time(&format!("task_vector {float:?}"), &mut || {
                task_vector(isa, float, &bytes[1..], taus[1], &mut out);
            });
        }
        time("all_finite", &mut || {
            std::hint::black_box(all_finite(isa, taus[0]));
        });
        // Rounded as deltas of bf16 weights are: massive ties.
        let tied: Vec<f32> = taus[0].iter().map(|tau| (tau * 16384.0).round() / 16384.0).collect();
        let mut sorted: Vec<u32> = tied.iter().map(|tau| key(*tau)).collect();
        sorted.sort_unstable();
        let ties = Ties { low: sorted[LEN * 8 / 10], high: sorted[LEN * 8 / 10] };
        time("copy", &mut || out.copy_from_slice(&tied));
        time("copy + trim", &mut || {
            out.copy_from_slice(&tied);
            trim(isa, &mut out, ties.low);
        });
        time("copy + trim_sample", &mut || {
            out.copy_from_slice(&tied);
            trim_sample(isa, &mut out, ties, 7, 0, 1 << 63);
        });
        time("copy + trim_lowest", &mut || {
            out.copy_from_slice(&tied);
            trim_lowest(isa, &mut out, ties, 1000);
        });
        time("count_ties", &mut || {
            std::hint::black_box(count_ties(isa, &tied, ties));
        });
        let mut bins = vec![0; 65536];
        time("histogram wide", &mut || {
            histogram(isa, taus[0], 0, 15, NO_KEY, &mut bins);
        });
        time("histogram wide, ties", &mut || {
            histogram(isa, &tied, 0, 15, NO_KEY, &mut bins);
        });
        let mut sorted: Vec<u32> = taus[0].iter().map(|tau| key(*tau)).collect();
        sorted.sort_unstable();
        for percent in [1, 3, 10, 50] {
            let low = sorted[LEN * 8 / 10 - LEN * percent / 200];
            let high = sorted[LEN * 8 / 10 + LEN * percent.min(30) / 200 - 1];
            let mut bins = vec![0; (high - low) as usize];
            let size = bins.len();
            time(&format!("histogram {percent}% {size}"), &mut || {
                histogram(isa, taus[0], low, 0, NO_KEY, &mut bins);
            });
        }
        time("elect_mass 4", &mut || elect_mass(isa, &taus, &weights, &mut gamma));
        time("elect_count 4", &mut || elect_count(isa, &taus, &mut gamma));
        time("conflicts 4", &mut || {
            std::hint::black_box(conflicts(isa, &taus));
        });
        time("combine_mean 4", &mut || combine_mean(isa, &taus, &weights, Some(&gamma), &mut out));
        time("combine_mean 4 no gamma", &mut || combine_mean(isa, &taus, &weights, None, &mut out));
        time("combine_sum 4", &mut || combine_sum(isa, &taus, &weights, Some(&gamma), &mut out));
        time("combine_max 4", &mut || combine_max(isa, &taus, &weights, Some(&gamma), &mut out));
        time("sum_signs", &mut || {
            std::hint::black_box(sum_signs(isa, &gamma));
        });
        time("add_scaled", &mut || add_scaled(isa, &mut out, 1e-9, taus[0]));
    }
}
