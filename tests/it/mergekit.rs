//! mergekit's outputs on a family whose task vectors have massive ties.
//!
//! Which of several entries at a threshold mergekit keeps is arbitrary. So where some model's entry is one of them, its
//! output and ours must each be what follows from keeping or dropping that entry; everywhere else they must agree.

use std::path::Path;

use crate::support::family::text;
use crate::support::files::{read_checkpoint, read_file};
use crate::support::repository;
use crate::support::run::{command, run, tiesmith};
use crate::support::tensor::{Tensor, Tensors};

/// How one model's task vector of one tensor becomes sparse.
#[derive(Clone, Copy)]
struct Trim {
    density: f64,
    gamma: f64,
}

/// A recipe that trims.
struct Trimmed {
    name: &'static str,
    weights: &'static [f64],
    elect: bool,
    normalize: bool,
    lambda: f64,
    /// By model and tensor.
    trim: fn(usize, &str) -> Trim,
    /// By model and tensor, where it is not the same everywhere.
    weight: Option<fn(usize, &str) -> f64>,
}

const TRIMMED: Trimmed = Trimmed {
    name: "",
    weights: &[1.0, 1.0, 1.0],
    elect: true,
    normalize: true,
    lambda: 1.0,
    trim: |_, _| Trim { density: 0.2, gamma: 0.0 },
    weight: None,
};

/// Place of a tensor among the two layers of the family: 0 outside of them.
fn depth(tensor: &str) -> f64 {
    if tensor.contains("layers.1.") { 1.0 } else { 0.0 }
}

fn trimmed() -> Vec<Trimmed> {
    let tails: fn(usize, &str) -> Trim = |_, _| Trim { density: 0.6, gamma: 0.05 };
    vec![
        Trimmed { name: "ties", ..TRIMMED },
        Trimmed {
            name: "ties_weighted",
            weights: &[0.5, 1.0, 0.25],
            lambda: 1.2,
            trim: |model, _| Trim { density: [0.3, 0.6, 0.9][model], gamma: 0.0 },
            ..TRIMMED
        },
        Trimmed {
            name: "ties_raw",
            weights: &[0.5, 1.0, 0.25],
            normalize: false,
            trim: |_, _| Trim { density: 0.5, gamma: 0.0 },
            ..TRIMMED
        },
        Trimmed {
            name: "gradient",
            weights: &[0.0, 0.6],
            weight: Some(|model, tensor| if model == 0 { 0.2 + 0.7 * depth(tensor) } else { 0.6 }),
            trim: |model, tensor| {
                let first = if tensor.contains("mlp") { 0.5 } else { 0.3 + 0.5 * depth(tensor) };
                Trim { density: [first, 0.4][model], gamma: 0.0 }
            },
            ..TRIMMED
        },
        Trimmed { name: "breadcrumbs", elect: false, normalize: false, trim: tails, ..TRIMMED },
        Trimmed { name: "breadcrumbs_ties", normalize: false, trim: tails, ..TRIMMED },
    ]
}

/// What becomes of an entry.
#[derive(Clone, Copy, PartialEq)]
enum Fate {
    Kept,
    Dropped,
    /// At a threshold, with others that share its magnitude and not its fate.
    Either,
}

/// The fates of the entries of `tau`.
fn fates(tau: &[f32], trim: Trim) -> Vec<Fate> {
    let d = tau.len();
    let share = |k: f64| (k * d as f64) as usize;
    let kept = share(trim.density).max(1);
    let mut top = share(trim.gamma);
    // mergekit drops everything where no outlier is to be dropped; we do not.
    if trim.density >= 1.0 {
        return vec![Fate::Kept; d];
    }
    top = top.min(d - kept);
    let mut sorted: Vec<f32> = tau.iter().map(|x| x.abs()).collect();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let ranks = |x: f32| (sorted.partition_point(|y| *y > x), sorted.partition_point(|y| *y >= x));
    let fate = |x: &f32| {
        // Its ranks, from 0, are those of all entries of its magnitude.
        let (first, end) = ranks(x.abs());
        let inside = |rank: usize| (top..top + kept).contains(&rank);
        match (inside(first), inside(end - 1)) {
            (true, true) => Fate::Kept,
            (false, false) if first >= top + kept || end <= top => Fate::Dropped,
            _ => Fate::Either,
        }
    };
    tau.iter().map(fate).collect()
}

impl Trimmed {
    /// The result at one position for these entries.
    fn merge(&self, base: f32, entries: &[f32], weights: &[f64]) -> f64 {
        // Products of 16-bit numbers often cancel exactly, or but for the rounding in f32 that both programs do.
        let weighted: Vec<f32> = entries.iter().zip(weights).map(|(x, w)| x * *w as f32).collect();
        let positive = weighted.iter().fold(0.0, |sum, x| sum + x) >= 0.0;
        let weighted: Vec<f64> = weighted.into_iter().map(f64::from).collect();
        let agrees = |x: f64| !self.elect || if positive { x > 0.0 } else { x < 0.0 };
        let mixed: f64 = weighted.iter().filter(|x| agrees(**x)).sum();
        let divisor: f64 = weighted.iter().zip(weights).filter(|(x, _)| agrees(**x)).map(|(_, w)| w).sum();
        let divisor = if self.normalize && divisor != 0.0 { divisor } else { 1.0 };
        f64::from(base) + self.lambda * mixed / divisor
    }

    /// All results that keeping or dropping the undecided entries can give.
    fn possible(&self, base: f32, entries: &[(f32, Fate)], weights: &[f64]) -> Vec<f64> {
        let choices = 0..1u32 << entries.len();
        let sparse = |choice: u32| -> Option<Vec<f32>> {
            let each = entries.iter().enumerate().map(|(model, &(x, fate))| {
                let keep = choice >> model & 1 == 1;
                let allowed = fate == Fate::Either || keep == (fate == Fate::Kept);
                allowed.then_some(if keep { x } else { 0.0 })
            });
            each.collect()
        };
        choices.filter_map(sparse).map(|sparse| self.merge(base, &sparse, weights)).collect()
    }
}

fn golden(path: &str) -> std::path::PathBuf {
    repository("tests/golden").join(path)
}

/// What the recipe `name` gives on the bf16 family.
fn merge(name: &str) -> Tensors {
    let dir = tempfile::tempdir().unwrap();
    let folder = if name == "arcee_fusion" { "mergekit-bf16/recipes" } else { "mergekit-f32/recipes" };
    let (recipe, out) = (golden(folder).join(format!("{name}.yml")), text(&dir.path().join("out")));
    let mut command = command();
    command.current_dir(golden("family-bf16"));
    command.args(["merge", &text(&recipe), "--out", &out, "--progress", "none"]);
    run(command).succeeded();
    read_checkpoint(Path::new(&out))
}

fn expected(name: &str) -> Tensors {
    read_file(&golden("mergekit-bf16").join(format!("{name}.safetensors")))
}

/// Whether two results are the same, but for rounding of f32 sums in another order.
fn close(a: f64, b: f64, tolerance: f64) -> bool {
    (a - b).abs() <= tolerance * b.abs().max(1e-3)
}

#[test]
fn trims_agree_wherever_mergekits_choice_is_not_arbitrary() {
    let read = |name: &str| read_checkpoint(&golden("family-bf16").join(name));
    let base = read("base");
    let models = ["ft0", "ft1", "ft2"].map(read);
    for recipe in trimmed() {
        let (ours, theirs) = (merge(recipe.name), expected(recipe.name));
        assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>());
        let (mut certain, mut all) = (0, 0);
        for (name, base) in &base {
            let base = base.f32s();
            let count = recipe.weights.len();
            let taus: Vec<Vec<f32>> = models[..count]
                .iter()
                .map(|model| model[name].f32s().iter().zip(&base).map(|(x, b)| x - b).collect())
                .collect();
            let fates: Vec<Vec<Fate>> =
                taus.iter().enumerate().map(|(t, tau)| fates(tau, (recipe.trim)(t, name))).collect();
            let weights: Vec<f64> =
                (0..count).map(|t| recipe.weight.map_or(recipe.weights[t], |weight| weight(t, name))).collect();
            let (ours, theirs) = (ours[name].values(), theirs[name].values());
            for (p, &base) in base.iter().enumerate() {
                let entries: Vec<(f32, Fate)> = taus.iter().zip(&fates).map(|(tau, fate)| (tau[p], fate[p])).collect();
                let possible = recipe.possible(base, &entries, &weights);
                let what =
                    format!("{}: {name}[{p}]: {} and {}, possible {possible:?}", recipe.name, ours[p], theirs[p]);
                assert!(possible.iter().any(|value| close(*value, ours[p], 1e-5)), "ours, {what}");
                assert!(possible.iter().any(|value| close(*value, theirs[p], 1e-5)), "mergekit's, {what}");
                let decided = entries.iter().all(|(_, fate)| *fate != Fate::Either);
                assert!(!decided || close(ours[p], theirs[p], 1e-5), "{what}");
                certain += usize::from(decided);
                all += 1;
            }
        }
        assert!(certain * 10 > all * 3, "{}: only {certain} of {all} are certain", recipe.name);
    }
}

#[test]
fn all_other_methods_agree_within_rounding() {
    for (name, tolerance) in [
        ("linear", 1e-6),
        ("linear_raw", 1e-6),
        ("task_arithmetic", 1e-6),
        ("passthrough", 0.0),
        ("ram", 1e-5),
        ("ramplus_tl", 1e-5),
        ("nearswap", 1e-5),
        ("sce_all", 1e-5),
        // Angles come from sums in f32 there.
        ("slerp", 1e-3),
        ("slerp_filters", 1e-3),
        ("nuslerp", 1e-3),
        ("nuslerp_base", 1e-3),
        ("nuslerp_rows", 1e-3),
        ("nuslerp_cols", 1e-3),
        ("multislerp", 1e-3),
        ("karcher", 1e-3),
        ("model_stock", 1e-3),
        ("model_stock_rows", 1e-3),
    ] {
        let (ours, theirs) = (merge(name), expected(name));
        assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>(), "{name}");
        let mut worst = (0.0, String::new());
        for (tensor, theirs) in &theirs {
            assert_eq!((theirs.dtype, &theirs.shape), (ours[tensor].dtype, &ours[tensor].shape), "{name}: {tensor}");
            for (p, (a, b)) in ours[tensor].values().into_iter().zip(theirs.values()).enumerate() {
                let deviation = (a - b).abs() / b.abs().max(1e-3);
                if deviation > worst.0 {
                    worst = (deviation, format!("{tensor}[{p}] is {a}, mergekit has {b}"));
                }
            }
        }
        assert!(worst.0 <= tolerance, "{name}: {worst:?}");
    }
}

/// Share of the entries in which two outputs agree.
fn agreement(ours: &Tensors, theirs: &Tensors) -> f64 {
    let (mut same, mut all) = (0, 0);
    for (name, theirs) in theirs {
        for (a, b) in ours[name].values().into_iter().zip(theirs.values()) {
            same += usize::from(close(a, b, 1e-5));
            all += 1;
        }
    }
    same as f64 / all as f64
}

#[test]
fn choices_that_mergekit_leaves_to_rounding_or_ties_agree_mostly() {
    // Which of several equal variances count as the largest is arbitrary, and moves the weights of the models a little.
    let sce = agreement(&merge("sce"), &expected("sce"));
    assert!(sce > 0.98, "sce: {sce}");
    // Its importance is made of divergences near 1e-8, taken in f32: see
    // `rounding_of_divergences_explains_every_choice_of_fusion_that_differs`. That it is one of two values is certain.
    let (ours, theirs) = (merge("arcee_fusion"), expected("arcee_fusion"));
    let share = agreement(&ours, &theirs);
    assert!(share > 0.8, "arcee_fusion: {share}");
    let [base, model] = ["base", "ft0"].map(|name| read_checkpoint(&golden("family-bf16").join(name)));
    for output in [&ours, &theirs] {
        for (name, tensor) in output {
            let (base, model) = (base[name].values(), model[name].values());
            let one_of_two = |(p, x): (usize, f64)| close(x, base[p], 1e-6) || close(x, model[p], 1e-6);
            assert!(tensor.values().into_iter().enumerate().all(one_of_two), "{name}");
        }
    }
}

#[test]
fn fusion_agrees_where_float32_can_tell() {
    let dir = tempfile::tempdir().unwrap();
    let [base, model] = ["base", "model"].map(|name| text(&golden("arcee").join(format!("{name}.safetensors"))));
    let out = text(&dir.path().join("out"));
    tiesmith(["merge", "--method=arcee_fusion", "--base", &base, "--model", &model, "--out", &out]).succeeded();
    let (ours, theirs) = (read_checkpoint(Path::new(&out)), read_file(&golden("arcee/merged.safetensors")));
    assert_eq!(agreement(&ours, &theirs), 1.0);
    assert!(
        agreement(&read_file(Path::new(&base)), &theirs) > 0.5
            && agreement(&read_file(Path::new(&model)), &theirs) > 0.05
    );
}

/// Σ p ln(p / q) of a row in f64, with mergekit's smoothing.
fn divergence(base: &[f64], model: &[f64]) -> f64 {
    let softmax = |row: &[f64]| {
        let sum: f64 = row.iter().map(|x| x.exp()).sum();
        row.iter().map(|x| x.exp() / sum + 1e-8).collect::<Vec<f64>>()
    };
    softmax(model).iter().zip(softmax(base)).map(|(p, q)| p * (p / q).ln()).sum()
}

#[test]
fn rounding_of_divergences_explains_every_choice_of_fusion_that_differs() {
    // One threshold per tensor and divergences within one unit in the last place of 1 (in f32) of the true ones give
    // mergekit's choice everywhere: that is the error of p / q, of which its divergences are sums.
    const ULP: f64 = f32::EPSILON as f64 * 1.1;
    let [base, model] = ["base", "ft0"].map(|name| read_checkpoint(&golden("family-bf16").join(name)));
    for (name, merged) in expected("arcee_fusion") {
        let row = *merged.shape.last().unwrap();
        let values = [&base[&name], &model[&name], &merged].map(Tensor::values);
        let (mut least, mut most) = (f64::NEG_INFINITY, f64::INFINITY);
        for start in (0..values[0].len()).step_by(row) {
            let [base, model, merged] = [0, 1, 2].map(|i| &values[i][start..start + row]);
            let divergence = divergence(base, model);
            let (mut taken, mut left) = (f64::INFINITY, 0.0f64);
            for ((base, model), merged) in base.iter().zip(model).zip(merged).filter(|((b, m), _)| b != m) {
                let change = (model - base).abs();
                match close(*merged, *model, 1e-6) {
                    true => taken = taken.min(change),
                    false => left = left.max(change),
                }
            }
            least = least.max((divergence - ULP) * left);
            most = most.min((divergence + ULP) * taken);
        }
        assert!(least <= most, "{name}: no threshold lies between {least:e} and {most:e}");
    }
}
