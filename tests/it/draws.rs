//! Methods that draw at random: by distribution over many seeds, and by exact repetition.

use crate::support::family::{Family, Saved, text};
use crate::support::files::read_checkpoint;
use crate::support::run::tiesmith;
use crate::support::tensor::{Tensor, tensors};

/// Elements of the one tensor.
const ELEMENTS: usize = 4096;

/// Base zero, so that an output is its merged task vector; entry p of model t is (p + 1) · (t + 1), signs alternating by
/// position.
fn family(models: usize) -> Family {
    let values = |t: usize| -> Vec<f32> {
        (0..ELEMENTS).map(|p| (p + 1) as f32 * (t + 1) as f32 * if p % 2 == 0 { 1.0 } else { -1.0 }).collect()
    };
    let one = |values: &[f32]| tensors([("w", Tensor::floats(safetensors::Dtype::F32, &[64, 64], values))]);
    let base = one(&[0.0; ELEMENTS]);
    Family { models: (0..models).map(|t| one(&values(t))).collect(), signs: base.clone(), base }
}

/// The merged task vector, and what the report says was kept of each model.
fn draw(saved: &Saved, flags: &[&str]) -> (Vec<f32>, Vec<f64>) {
    let dir = tempfile::tempdir().unwrap();
    let out = text(&dir.path().join("out"));
    let mut args = vec!["merge".to_owned(), "--base".into(), text(&saved.base)];
    for model in &saved.models {
        args.extend(["--model".into(), text(model)]);
    }
    args.extend(flags.iter().map(|flag| (*flag).to_owned()));
    args.extend(["--json", "--progress=none", "--out", &out].map(str::to_owned));
    let report = tiesmith(args).succeeded().json();
    let kept = report["kept_fraction"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
    (read_checkpoint(dir.path().join("out").as_path())["w"].f32s(), kept)
}

/// (p + 1) · ±1.
fn entry(p: usize) -> f32 {
    (p + 1) as f32 * if p.is_multiple_of(2) { 1.0 } else { -1.0 }
}

#[test]
fn dare_keeps_each_entry_with_its_density_and_rescales_it() {
    let saved = family(1).save();
    let seeds = 40;
    let mut counts = vec![0u32; ELEMENTS];
    for seed in 0..seeds {
        let seed = format!("--seed={seed}");
        let (merged, kept) = draw(&saved, &["--method=dare_linear", "--density=0.25", &seed]);
        for (p, value) in merged.iter().enumerate() {
            assert!(*value == 0.0 || *value == 4.0 * entry(p), "[{p}] is {value}");
            counts[p] += u32::from(*value != 0.0);
        }
        let survivors = merged.iter().filter(|value| **value != 0.0).count();
        assert_eq!(kept, [survivors as f64 / ELEMENTS as f64]);
        // Five standard deviations of a binomial count.
        let spread = (ELEMENTS as f64 * 0.25 * 0.75).sqrt();
        assert!((survivors as f64 - ELEMENTS as f64 * 0.25).abs() < 5.0 * spread, "{survivors} of {ELEMENTS}");
    }
    // Over the seeds, every position is kept as often as a binomial count of its own would be.
    let (mean, spread) = (f64::from(seeds) * 0.25, (f64::from(seeds) * 0.25 * 0.75).sqrt());
    assert!(counts.iter().all(|&count| (f64::from(count) - mean).abs() < 6.0 * spread));
    let variance = counts.iter().map(|&count| (f64::from(count) - mean).powi(2)).sum::<f64>() / ELEMENTS as f64;
    assert!((variance / (spread * spread) - 1.0).abs() < 0.15, "a variance of {variance}");
}

#[test]
fn draws_are_reproducible_and_differ_between_seeds_and_models() {
    let saved = family(2).save();
    for method in ["dare_linear", "dare_ties", "della_linear", "della"] {
        let method = format!("--method={method}");
        // Averaging what agrees would hide what was kept.
        let combine = if method.ends_with("della") { "--combine=sum" } else { "--scope=model" };
        let flags = ["--density=0.5", "--param=rescale=none", combine];
        let merged = |seed: &str| draw(&saved, &[&[&*method, seed], &flags[..]].concat()).0;
        let first = merged("--seed=5");
        assert_eq!(first, merged("--seed=5"));
        assert_ne!(first, merged("--seed=6"));
        // A sum of τ_1 = x and τ_2 = 2x tells which of the two were kept: independently, a quarter each.
        for kept in 0..4 {
            let count = (0..ELEMENTS).filter(|&p| first[p] == kept as f32 * entry(p)).count();
            // Under DELLA both models keep the same ranks more often: E p² = 0.25 + ε²/3.
            let more = if method.contains("della") { 4096.0 * 0.15 * 0.15 / 3.0 } else { 0.0 };
            let expected = if kept == 0 || kept == 3 { 1024.0 + more } else { 1024.0 - more };
            assert!((count as f64 - expected).abs() < 5.0 * (1024.0f64 * 0.75).sqrt(), "{method} {kept}: {count}");
        }
    }
}

#[test]
fn densities_of_nothing_and_everything_draw_nothing() {
    let saved = family(2).save();
    for method in ["dare_linear", "dare_ties", "della_linear", "della"] {
        let method = &*format!("--method={method}");
        let (all, kept) = draw(&saved, &[method, "--density=1"]);
        let whole = if method.ends_with("=della") { 1.5 } else { 3.0 };
        assert!(all.iter().enumerate().all(|(p, value)| *value == whole * entry(p)), "{method}");
        assert_eq!(kept, [1.0, 1.0]);
        let (none, kept) = draw(&saved, &[method, "--density=0"]);
        assert!(none.iter().all(|value| *value == 0.0));
        assert_eq!(kept, [0.0, 0.0]);
    }
}

#[test]
fn dare_ties_elects_among_what_was_kept() {
    // Opposite models: what both keep cancels, what one keeps stands alone.
    let mut family = family(2);
    let opposite: Vec<f32> = family.models[0]["w"].f32s().iter().map(|x| -x).collect();
    family.models[1] = tensors([("w", Tensor::floats(safetensors::Dtype::F32, &[64, 64], &opposite))]);
    let saved = family.save();
    let flags = ["--method=dare_ties", "--density=0.5", "--param=rescale=none"];
    let (zero, _) = draw(&saved, &flags);
    let (positive, _) = draw(&saved, &[&flags[..], &["--zero-sum=positive"]].concat());
    let mut cancelled = 0;
    for (p, (zero, positive)) in zero.iter().zip(&positive).enumerate() {
        assert!([0.0, 1.0, -1.0].contains(&(zero / entry(p))));
        if zero != positive {
            assert_eq!((*zero, *positive), (0.0, entry(p).abs()));
            cancelled += 1;
        }
    }
    assert!((900..1150).contains(&cancelled), "{cancelled}");
}

#[test]
fn della_keeps_each_rank_of_a_row_with_its_probability_and_divides_by_it() {
    // Magnitudes rise along each row of 64, so that the column is the rank.
    let saved = family(1).save();
    let probability = |column: usize| 0.3 - 0.2 + 2.0 * 0.2 * column as f64 / 63.0;
    let seeds = 30;
    let mut counts = [0u32; 64];
    for seed in 0..seeds {
        let seed = format!("--seed={seed}");
        let flags = ["--method=della_linear", "--density=0.3", "--param=epsilon=0.2", &seed];
        let (merged, kept) = draw(&saved, &flags);
        for (p, value) in merged.iter().enumerate().filter(|(_, value)| **value != 0.0) {
            let expected = f64::from(entry(p)) / probability(p % 64);
            assert!((f64::from(*value) / expected - 1.0).abs() < 1e-6, "[{p}] is {value}, not {expected}");
            counts[p % 64] += 1;
        }
        assert_eq!(kept, [merged.iter().filter(|value| **value != 0.0).count() as f64 / ELEMENTS as f64]);
    }
    for (column, &count) in counts.iter().enumerate() {
        let (trials, p) = (64.0 * f64::from(seeds), probability(column));
        assert!((f64::from(count) - trials * p).abs() < 5.0 * (trials * p * (1.0 - p)).sqrt(), "{column}: {count}");
    }
}

#[test]
fn della_shrinks_epsilon_where_a_probability_would_leave_its_range() {
    // At density 0.9, ε = 0.15 becomes 0.1: the largest entry of each row is always kept.
    let saved = family(1).save();
    for seed in ["--seed=1", "--seed=2", "--seed=3"] {
        let (merged, kept) = draw(&saved, &["--method=della_linear", "--density=0.9", "--param=rescale=none", seed]);
        assert!((0..64).all(|row| merged[row * 64 + 63] == entry(row * 64 + 63)));
        assert!((kept[0] - 0.9).abs() < 0.03, "{kept:?}");
    }
}

#[test]
fn normalized_sums_are_divided_by_all_weights() {
    let saved = family(2).save();
    for method in ["--method=dare_linear", "--method=della_linear"] {
        let flags = [method, "--density=0.5", "--param=rescale=none", "--seed=3"];
        let (sum, _) = draw(&saved, &flags);
        let (mean, _) = draw(&saved, &[&flags[..], &["--param=normalize=true"]].concat());
        assert!(sum.iter().zip(&mean).all(|(sum, mean)| sum / 2.0 == *mean), "{method}");
    }
}

#[test]
fn l1_restores_the_sum_of_magnitudes_of_each_model() {
    let saved = family(1).save();
    for method in ["--method=dare_linear", "--method=della_linear"] {
        let flags = [method, "--density=0.3", "--seed=11"];
        let (bare, _) = draw(&saved, &[&flags[..], &["--param=rescale=none"]].concat());
        let (merged, kept) = draw(&saved, &[&flags[..], &["--param=rescale=l1"]].concat());
        let sum = |values: &[f32]| values.iter().map(|x| f64::from(x.abs())).sum::<f64>();
        let whole: f64 = (0..ELEMENTS).map(|p| f64::from(entry(p).abs())).sum();
        let factor = whole / sum(&bare);
        for (p, (bare, merged)) in bare.iter().zip(&merged).enumerate() {
            let expected = f64::from(*bare) * factor;
            assert!((f64::from(*merged) - expected).abs() <= 1e-6 * expected.abs(), "{method} [{p}]");
        }
        assert!((sum(&merged) / whole - 1.0).abs() < 1e-6, "{method}");
        assert_eq!(kept, [bare.iter().filter(|value| **value != 0.0).count() as f64 / ELEMENTS as f64]);
    }
    // Two models, each by its own factor; a density of 1 needs none.
    let saved = family(2).save();
    let whole = draw(&saved, &["--method=dare_linear", "--density=1", "--param=rescale=l1"]).0;
    assert!(whole.iter().enumerate().all(|(p, value)| *value == 3.0 * entry(p)));
    let merged = draw(&saved, &["--method=dare_linear", "--density=0.3", "--param=rescale=l1"]).0;
    let sum: f64 = merged.iter().map(|x| f64::from(x.abs())).sum();
    let expected: f64 = (0..ELEMENTS).map(|p| 3.0 * f64::from(entry(p).abs())).sum();
    assert!((sum / expected - 1.0).abs() < 1e-5, "{sum} of {expected}");
}
