//! Every method against a reference of its own, against mergekit's outputs, and in what all of them must do.
//!
//! A [`Case`] is a method with parameters; the registry of methods is walked to see that each has one.

use crate::support::family::{Deltas, Family, Spec, text};
use crate::support::files::{read_checkpoint, read_file};
use crate::support::reference::{self, Unit};
use crate::support::repository;
use crate::support::run::{Outcome, tiesmith};
use crate::support::statistics;
use crate::support::tensor::Tensors;

/// A way to use a method, and what it must give.
struct Case {
    method: &'static str,
    /// How many models of a family take part, and whether base does.
    models: usize,
    base: bool,
    flags: &'static [&'static str],
    /// What follows the paths of the models.
    suffixes: &'static [&'static str],
    /// mergekit's output for the same, if there is one.
    golden: Option<&'static str>,
    reference: fn(&Unit) -> Vec<f64>,
    /// Accepted difference to the reference, relative to the largest input at the position.
    tolerance: f64,
    /// Accepted difference to mergekit, relative to its output (or a thousandth).
    golden_tolerance: f64,
}

const CASE: Case = Case {
    method: "",
    models: 3,
    base: true,
    flags: &[],
    suffixes: &[],
    golden: None,
    reference: |_| Vec::new(),
    tolerance: 1e-6,
    golden_tolerance: 1e-6,
};

/// Methods that go by angles: mergekit takes them from sums in f32.
const SPHERE: Case = Case { tolerance: 1e-6, golden_tolerance: 1e-5, ..CASE };

const WEIGHTED: &[&str] = &[",weight=0.5", ",weight=1", ",weight=0.25"];
const WEIGHTS: [f64; 3] = [0.5, 1.0, 0.25];
/// As mergekit does it.
const PER_TENSOR: &[&str] = &["--scope=tensor", "--trim-ties=lowest", "--density=0.6", "--param=gamma=0.05"];
const PER_TENSOR_ELECTED: &[&str] =
    &["--scope=tensor", "--trim-ties=lowest", "--density=0.6", "--param=gamma=0.05", "--zero-sum=positive"];

fn cases() -> Vec<Case> {
    vec![
        Case {
            method: "breadcrumbs",
            flags: PER_TENSOR,
            golden: Some("breadcrumbs"),
            reference: |unit| reference::consensus(unit, &tails(unit, 0.6, 0.05), &[1.0; 3], false),
            ..CASE
        },
        Case {
            method: "breadcrumbs",
            flags: &["--scope=tensor", "--trim-ties=lowest", "--lambda=1"],
            suffixes: &[",density=0.9,gamma=0.2,weight=2", ",density=0.3,gamma=0", ",density=1,gamma=0.5,weight=-1"],
            reference: |unit| {
                let [a, b, c] = [(0.9, 0.2), (0.3, 0.0), (1.0, 0.5)];
                let rules = [a, b, c].into_iter().zip(&unit.taus);
                let sparse: Vec<_> = rules.map(|((k, gamma), tau)| reference::breadcrumbs(tau, k, gamma)).collect();
                reference::consensus(unit, &sparse, &[2.0, 1.0, -1.0], false)
            },
            ..CASE
        },
        Case {
            method: "breadcrumbs",
            flags: &[
                "--scope=tensor",
                "--trim-ties=lowest",
                "--density=0.6",
                "--param=gamma=0",
                "--param=normalize=true",
            ],
            suffixes: WEIGHTED,
            reference: |unit| {
                let weights = WEIGHTS.map(|w| w / WEIGHTS.iter().sum::<f64>());
                reference::consensus(unit, &tails(unit, 0.6, 0.0), &weights, false)
            },
            ..CASE
        },
        Case {
            method: "breadcrumbs_ties",
            flags: PER_TENSOR_ELECTED,
            golden: Some("breadcrumbs_ties"),
            reference: |unit| reference::consensus(unit, &tails(unit, 0.6, 0.05), &[1.0; 3], true),
            ..CASE
        },
        Case {
            method: "breadcrumbs",
            flags: &[
                "--scope=tensor",
                "--trim-ties=lowest",
                "--density=0.6",
                "--param=gamma=0.05",
                "--param=rescale=l1",
            ],
            reference: |unit| {
                let sparse = reference::restored(&unit.taus, tails(unit, 0.6, 0.05));
                reference::consensus(unit, &sparse, &[1.0; 3], false)
            },
            ..CASE
        },
        Case {
            method: "ties",
            flags: &[
                "--scope=tensor",
                "--trim-ties=lowest",
                "--density=0.3",
                "--combine=sum",
                "--zero-sum=positive",
                "--param=rescale=l1",
            ],
            suffixes: WEIGHTED,
            reference: |unit| {
                let sparse = reference::restored(&unit.taus, tails(unit, 0.3, 0.0));
                reference::consensus(unit, &sparse, &WEIGHTS, true)
            },
            ..CASE
        },
        Case {
            method: "nearswap",
            models: 1,
            golden: Some("nearswap"),
            reference: |unit| reference::nearswap(unit, 1e-4),
            ..CASE
        },
        // No golden output: mergekit takes the divergence from differences that f32 has rounded away.
        Case {
            method: "arcee_fusion",
            models: 1,
            reference: |unit| reference::fusion(&unit.base, &unit.models[0], unit.row()),
            ..CASE
        },
        Case {
            method: "arcee_fusion",
            models: 2,
            base: false,
            reference: |unit| reference::fusion(&unit.models[0], &unit.models[1], unit.row()),
            ..CASE
        },
        Case {
            method: "fisher",
            base: false,
            reference: |unit| reference::fisher(&unit.models, &magnitudes(unit), &[1.0; 3], 1e-6),
            ..CASE
        },
        Case {
            method: "fisher",
            models: 2,
            suffixes: &[",weight=0.25", ",weight=3"],
            flags: &["--fisher-floor=0.4"],
            reference: |unit| reference::fisher(&unit.models, &magnitudes(unit), &[0.25, 3.0], 0.4f32.into()),
            ..CASE
        },
        Case { method: "regmean", base: false, reference: |unit| regressed(unit, 0.9), tolerance: 1e-4, ..CASE },
        Case {
            method: "regmean",
            models: 2,
            flags: &["--alpha=0.5", "--dtype=float32"],
            reference: |unit| regressed(unit, 0.5),
            tolerance: 1e-4,
            ..CASE
        },
        Case {
            method: "passthrough",
            models: 1,
            base: false,
            suffixes: &[",scale=-2"],
            reference: |unit| reference::weighted(&unit.models, &[-2.0]),
            ..CASE
        },
        Case {
            method: "slerp",
            models: 1,
            flags: &["--param=t=0.35"],
            golden: Some("slerp"),
            reference: |unit| reference::slerp(&unit.base, &unit.models[0], 0.35),
            ..SPHERE
        },
        Case {
            method: "slerp",
            models: 2,
            base: false,
            reference: |unit| reference::slerp(&unit.models[0], &unit.models[1], 0.5),
            ..SPHERE
        },
        Case {
            method: "nuslerp",
            models: 2,
            base: false,
            suffixes: WEIGHTED,
            golden: Some("nuslerp"),
            reference: |unit| reference::nuslerp(&unit.models[0], &unit.models[1], [0.5, 1.0]),
            ..SPHERE
        },
        Case {
            method: "nuslerp",
            models: 2,
            suffixes: WEIGHTED,
            golden: Some("nuslerp_base"),
            reference: |unit| {
                let tau = reference::nuslerp(&unit.taus[0], &unit.taus[1], [0.5, 1.0]);
                unit.added(|p| tau[p])
            },
            ..SPHERE
        },
        Case {
            method: "nuslerp",
            models: 2,
            base: false,
            flags: &["--param=nuslerp_flatten=false"],
            suffixes: WEIGHTED,
            golden: Some("nuslerp_rows"),
            reference: |unit| {
                reference::by_rows(&unit.models, unit.row(), |x| reference::nuslerp(&x[0], &x[1], [0.5, 1.0]))
            },
            ..SPHERE
        },
        Case {
            method: "nuslerp",
            models: 2,
            base: false,
            flags: &["--param=nuslerp_flatten=false", "--param=nuslerp_row_wise=true"],
            suffixes: WEIGHTED,
            golden: Some("nuslerp_cols"),
            reference: |unit| {
                reference::by_columns(unit, &unit.models, |x| reference::nuslerp(&x[0], &x[1], [0.5, 1.0]))
            },
            ..SPHERE
        },
        Case {
            method: "multislerp",
            base: false,
            suffixes: WEIGHTED,
            golden: Some("multislerp"),
            reference: |unit| reference::multislerp(&unit.models, &WEIGHTS),
            ..SPHERE
        },
        Case {
            method: "multislerp",
            suffixes: WEIGHTED,
            golden: Some("multislerp_base"),
            reference: |unit| {
                let tau = reference::multislerp(&unit.taus, &WEIGHTS);
                unit.added(|p| tau[p])
            },
            ..SPHERE
        },
        Case {
            method: "karcher",
            base: false,
            golden: Some("karcher"),
            // Angles between norms' weights are below what a cosine in f32 can tell from 0.
            golden_tolerance: 1e-3,
            reference: |unit| reference::karcher(&unit.models),
            ..SPHERE
        },
        Case {
            method: "model_stock",
            flags: &["--param=norm_floor=1e-6"],
            golden: Some("model_stock"),
            reference: |unit| {
                let tau = reference::model_stock(&unit.taus, 1e-6);
                unit.added(|p| tau[p])
            },
            ..SPHERE
        },
        Case {
            method: "model_stock",
            reference: |unit| {
                let tau = reference::model_stock(&unit.taus, 0.0);
                unit.added(|p| tau[p])
            },
            ..SPHERE
        },
        Case {
            method: "model_stock",
            flags: &["--param=norm_floor=1e-6", "--param=filter_wise=true"],
            golden: Some("model_stock_rows"),
            reference: |unit| {
                let tau = reference::by_rows(&unit.taus, unit.row(), |x| reference::model_stock(x, 1e-6));
                unit.added(|p| tau[p])
            },
            ..SPHERE
        },
        Case {
            method: "sce",
            flags: &["--param=select_topk=0.4", "--param=uniform_below=1e-6"],
            golden: Some("sce"),
            reference: |unit| reference::sce(unit, 0.4, 1e-6),
            ..CASE
        },
        Case {
            method: "sce",
            flags: &["--param=uniform_below=1e-6"],
            golden: Some("sce_all"),
            reference: |unit| reference::sce(unit, 1.0, 1e-6),
            ..CASE
        },
        Case {
            method: "sce",
            flags: &["--param=select_topk=0.7"],
            reference: |unit| reference::sce(unit, 0.7, 0.0),
            ..CASE
        },
        Case { method: "ramplus_tl", golden: Some("ramplus_tl"), reference: reference::ramplus, ..CASE },
        Case { method: "ram", golden: Some("ram"), reference: |unit| reference::ram(unit, 1e-5), ..CASE },
    ]
}

/// RegMean with what stands for the Gram matrices of the models: see `support::statistics`.
fn regressed(unit: &Unit, alpha: f64) -> Vec<f64> {
    if unit.shape.len() != 2 {
        return reference::weighted(&unit.models, &vec![1.0 / unit.models.len() as f64; unit.models.len()]);
    }
    let n = unit.row();
    let gram = |w: &Vec<f64>| -> Vec<f64> {
        let sum = |i: usize, j: usize| (0..w.len() / n).map(|k| w[k * n + i] * w[k * n + j]).sum::<f64>();
        let extra = |i: usize, j: usize| if i == j { 0.01 + 0.001 * i as f64 } else { 0.0 };
        (0..n * n).map(|at| f64::from((sum(at / n, at % n) + extra(at / n, at % n)) as f32)).collect()
    };
    reference::regmean(&unit.models, &unit.models.iter().map(gram).collect::<Vec<_>>(), n, alpha)
}

/// What stands for the Fisher information of the models: see `support::statistics`.
fn magnitudes(unit: &Unit) -> Vec<Vec<f64>> {
    unit.models.iter().map(|model| model.iter().map(|x| x.abs()).collect()).collect()
}

fn tails(unit: &Unit, density: f64, gamma: f64) -> Vec<Vec<f64>> {
    unit.taus.iter().map(|tau| reference::breadcrumbs(tau, density, gamma)).collect()
}

/// Methods that `methods.rs` holds to the oracle, bit for bit.
const EXACT: [&str; 3] = ["ties", "task_arithmetic", "linear"];
/// Methods whose results are random: they have tests of their own in `draws.rs`.
const RANDOM: [&str; 4] = ["dare_ties", "dare_linear", "della", "della_linear"];

fn methods() -> Vec<serde_json::Value> {
    tiesmith(["methods", "--json"]).succeeded().json()["methods"].as_array().unwrap().clone()
}

#[test]
fn every_method_of_the_registry_is_held_to_something() {
    let cases = cases();
    for method in methods() {
        let name = method["name"].as_str().unwrap();
        let held = cases.iter().any(|case| case.method == name) || EXACT.contains(&name) || RANDOM.contains(&name);
        assert!(held, "{name} has no case here");
    }
}

impl Case {
    /// Runs it on checkpoints at `base` and `models`.
    fn run(&self, base: &str, models: &[String], out: &str, extra: &[&str]) -> Outcome {
        let mut args = vec!["merge".to_owned(), format!("--method={}", self.method)];
        if self.base {
            args.extend(["--base".into(), base.into()]);
        }
        for (t, model) in models[..self.models].iter().enumerate() {
            args.extend(["--model".into(), model.clone() + self.suffixes.get(t).unwrap_or(&"")]);
        }
        args.extend(statistics::args(self.method, &models[..self.models]));
        args.extend(self.flags.iter().chain(extra).map(|flag| (*flag).to_owned()));
        args.extend(["--out", out, "--json", "--progress=none"].map(str::to_owned));
        tiesmith(args)
    }

    fn merge(&self, family: &Family, extra: &[&str]) -> Tensors {
        let saved = family.save();
        let out = text(&saved.path("merged"));
        let models: Vec<String> = saved.models.iter().map(|path| text(path)).collect();
        self.run(&text(&saved.base), &models, &out, extra).succeeded();
        read_checkpoint(saved.path("merged").as_path())
    }

    /// Fails where `merged` is not what the reference gives.
    fn check(&self, family: &Family, merged: &Tensors, what: &str) -> Vec<String> {
        let mut wrong = Vec::new();
        for (name, found) in merged {
            let unit = Unit::new(family, name, self.models);
            if unit.elements() == 0 {
                continue;
            }
            let expected = (self.reference)(&unit);
            for (p, (found, expected)) in found.values().into_iter().zip(expected).enumerate() {
                let inputs = unit.models.iter().chain([&unit.base]).map(|values| values[p].abs());
                let scale = inputs.fold(1e-30, f64::max);
                let close = (found - expected).abs() <= self.tolerance * scale;
                if !close {
                    wrong.push(format!(
                        "{} {:?} of the {what} family: {name}[{p}] is {found:e}, expected {expected:e}",
                        self.method, self.flags
                    ));
                    break;
                }
            }
        }
        wrong
    }
}

fn families() -> Vec<(&'static str, Family)> {
    let family = |seed, deltas| Spec { seed, deltas, ..Spec::default() }.family();
    vec![
        ("heavy-tailed", family(3, Deltas::HeavyTailed)),
        ("stepped", family(4, Deltas::Stepped)),
        ("adversarial", Family::adversarial()),
    ]
}

#[test]
fn every_case_is_what_its_reference_gives() {
    let mut wrong = Vec::new();
    for case in cases() {
        for (what, family) in families() {
            wrong.extend(case.check(&family, &case.merge(&family, &[]), what));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_case_is_what_mergekit_gives() {
    let golden = |path: &str| text(&repository("tests/golden").join(path));
    let models: Vec<String> = (0..3).map(|t| golden(&format!("family-f32/ft{t}"))).collect();
    let read = |path: &str| read_checkpoint(std::path::Path::new(path));
    let family = Family {
        base: read(&golden("family-f32/base")),
        models: models.iter().map(|model| read(model)).collect(),
        signs: Tensors::new(),
    };
    let mut wrong = Vec::new();
    for case in cases() {
        let Some(name) = case.golden else { continue };
        let dir = tempfile::tempdir().unwrap();
        let out = text(&dir.path().join("out"));
        case.run(&golden("family-f32/base"), &models, &out, &[]).succeeded();
        let merged = read(&out);
        wrong.extend(case.check(&family, &merged, "golden"));
        let expected = read_file(&repository(&format!("tests/golden/mergekit-f32/{name}.safetensors")));
        assert_eq!(expected.keys().collect::<Vec<_>>(), merged.keys().collect::<Vec<_>>());
        for (tensor, expected) in &expected {
            for (p, (found, expected)) in merged[tensor].values().iter().zip(expected.values()).enumerate() {
                let close = (found - expected).abs() <= case.golden_tolerance * expected.abs().max(1e-3);
                if !close {
                    wrong.push(format!("{name}: {tensor}[{p}] is {found:e}, mergekit has {expected:e}"));
                    break;
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
