//! RegMean: golden Gram matrices, sums that are singular, memory, and what is refused.

use std::fs;

use safetensors::Dtype;

use crate::support::family::text;
use crate::support::files::{Layout, read_checkpoint, read_file, write_checkpoint};
use crate::support::random::Random;
use crate::support::reference;
use crate::support::repository;
use crate::support::run::{Outcome, tiesmith};
use crate::support::tensor::{Tensor, Tensors, tensors};

#[test]
fn the_golden_family() {
    let golden = |path: String| repository("tests/golden/family-f32").join(path);
    let dir = tempfile::tempdir().unwrap();
    let (out, mut args) = (dir.path().join("out"), vec!["merge".to_owned(), "--method=regmean".into()]);
    let (mut models, mut grams) = (Vec::new(), Vec::new());
    for t in 0..3 {
        let gram = dir.path().join(format!("gram{t}.safetensors"));
        fs::copy(golden(format!("ft{t}/gram.st")), &gram).unwrap();
        args.extend(["--model".into(), text(&golden(format!("ft{t}"))), "--gram".into(), text(&gram)]);
        models.push(read_checkpoint(&golden(format!("ft{t}"))));
        grams.push(read_file(&gram));
    }
    args.extend(["--out".into(), text(&out)]);
    tiesmith(args).succeeded();
    let mut solved = 0;
    for (name, found) in &read_checkpoint(&out) {
        let all = |of: &[Tensors]| of.iter().map(|tensors| tensors[name].values()).collect::<Vec<_>>();
        let values = all(&models);
        let expected = match grams[0].contains_key(name) {
            true => reference::regmean(&values, &all(&grams), found.shape[1], 0.9),
            false => reference::weighted(&values, &[1.0 / 3.0; 3]),
        };
        solved += usize::from(grams[0].contains_key(name));
        for (found, expected) in found.values().iter().zip(expected) {
            assert!((found - expected).abs() <= 2e-6 * expected.abs().max(1.0), "{name}: {found} for {expected}");
        }
    }
    assert!(solved > 5, "{solved}");
}

struct Layers {
    dir: tempfile::TempDir,
    models: Vec<Tensors>,
}

/// Two models with a layer `w` [5, 4] and a norm, and the Gram matrices of `w` that `gram` gives.
fn layers(gram: impl Fn(usize) -> Tensors) -> Layers {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random::new(3);
    let mut models = Vec::new();
    for t in 0..2 {
        let mut draw = |n: usize| (0..n).map(|_| random.symmetric()).collect::<Vec<f32>>();
        let model = tensors([
            ("w", Tensor::floats(Dtype::F32, &[5, 4], &draw(20))),
            ("norm", Tensor::floats(Dtype::F32, &[4], &draw(4))),
        ]);
        write_checkpoint(&dir.path().join(format!("m{t}")), &model, Layout::SINGLE);
        write_checkpoint(&dir.path().join(format!("g{t}")), &gram(t), Layout::SINGLE);
        models.push(model);
    }
    Layers { dir, models }
}

impl Layers {
    fn run(&self, extra: &[&str]) -> Outcome {
        let at = |name: String| text(&self.dir.path().join(name));
        let mut args = vec!["merge".to_owned(), "--method=regmean".into(), "--out".into(), at("out".into())];
        for t in 0..2 {
            args.extend(["--model".into(), at(format!("m{t}")), "--gram".into(), at(format!("g{t}"))]);
        }
        args.extend(extra.iter().map(|arg| (*arg).to_owned()));
        tiesmith(args)
    }

    #[track_caller]
    fn refused(&self, extra: &[&str], parts: &[&str]) {
        let outcome = self.run(extra);
        let line = outcome.refusal();
        assert!(parts.iter().all(|part| line.contains(part)), "{line}");
        assert!(!self.dir.path().join("out").exists(), "{line}");
    }
}

fn square(values: [f32; 16]) -> Tensor {
    Tensor::floats(Dtype::F32, &[4, 4], &values)
}

/// 2 on the diagonal and 1 beside it.
const GOOD: [f32; 16] = [2.0, 1.0, 0.0, 0.0, 1.0, 2.0, 1.0, 0.0, 0.0, 1.0, 2.0, 1.0, 0.0, 0.0, 1.0, 2.0];

#[test]
fn a_singular_sum_is_drawn_towards_the_average_and_reported() {
    // The last input was never seen, and the second is the first.
    let gram = |t: usize| {
        let s = 1.0 + t as f32;
        tensors([("w", square([s, s, 0.0, 0.0, s, s, 0.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0]))])
    };
    let layers = layers(gram);
    let report = layers.run(&["--alpha=1", "--json"]).succeeded().json();
    let warnings = report["warnings"].to_string();
    assert!(warnings.contains("the Gram matrices of 1 layers sum up to a singular matrix"), "{warnings}");
    let merged = read_checkpoint(&layers.dir.path().join("out"));
    let (w, models) = (merged["w"].values(), [layers.models[0]["w"].values(), layers.models[1]["w"].values()]);
    for row in 0..5 {
        let unseen = row * 4 + 3;
        let average = (models[0][unseen] + models[1][unseen]) / 2.0;
        assert!((w[unseen] - average).abs() < 1e-6, "{} for {average}", w[unseen]);
        // What was seen of the first two is their sum: models weigh 1 and 2 in it.
        let sum = |v: &[f64]| v[row * 4] + v[row * 4 + 1];
        let expected = (sum(&models[0]) + 2.0 * sum(&models[1])) / 3.0;
        assert!((sum(&w) - expected).abs() < 1e-5, "{} for {expected}", sum(&w));
    }
    let nothing = self::layers(|_| tensors([("w", square([0.0; 16]))]));
    nothing.run(&[]).succeeded();
    let merged = read_checkpoint(&nothing.dir.path().join("out"));
    let (a, b) = (nothing.models[0]["w"].values(), nothing.models[1]["w"].values());
    for (found, (a, b)) in merged["w"].values().iter().zip(a.iter().zip(b)) {
        assert!((found - (a + b) / 2.0).abs() < 1e-6);
    }
}

#[test]
fn what_is_no_gram_matrix_is_one_line() {
    let with = |at: usize, value: f32| {
        move |t: usize| {
            let mut values = GOOD;
            if t == 1 {
                values[at] = value;
            }
            tensors([("w", square(values))])
        }
    };
    layers(with(5, -1.0)).refused(&[], &["-1 at [1, 1] in the Gram matrix of model 2", "\"w\""]);
    layers(with(6, f32::NAN)).refused(&[], &["NaN at [1, 2] in the Gram matrix of model 2"]);
    layers(with(6, f32::INFINITY)).refused(&[], &["inf at [1, 2]"]);
    layers(with(1, -1.0)).refused(&[], &["1 at [1, 0], but -1 at [0, 1]"]);
    let indefinite = [0.0, 9.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
    layers(move |_| tensors([("w", square(indefinite))])).refused(&[], &["no positive definite matrix"]);
    let shape = |_| tensors([("w", Tensor::floats(Dtype::F32, &[5, 5], &[1.0; 25]))]);
    layers(shape).refused(&[], &["gram of model 1", "has shape [5, 5]"]);
    let missing = |t: usize| match t {
        0 => tensors([("w", square(GOOD))]),
        _ => tensors([("v", square(GOOD))]),
    };
    layers(missing).refused(&[], &["\"w\"", "gram of model 2", "does not have it"]);
    layers(|_| tensors([("v", square(GOOD))])).refused(&[], &["no tensor of the models has a gram in"]);
    let good = layers(|_| tensors([("w", square(GOOD))]));
    good.refused(&["--alpha=1.5"], &["alpha is 1.5"]);
    good.refused(&["--gram=x"], &["--gram is given 3 times, but there are 2 models"]);
    good.refused(&["--method=linear"], &["linear has no use for --gram"]);
    good.refused(&["--memory=1MB"], &["the Gram matrices of \"w\" and their factor take 256 bytes"]);
    good.run(&["--non-finite=propagate"]).succeeded();
    let mut broken = good.models[0].clone();
    broken.insert("w".into(), Tensor::floats(Dtype::F32, &[5, 4], &[f32::NAN; 20]));
    let bad = layers(|_| tensors([("w", square(GOOD))]));
    write_checkpoint(&bad.dir.path().join("m0"), &broken, Layout::SINGLE);
    bad.refused(&["--non-finite=propagate"], &["NaN in model 1 at element 0", "\"w\""]);
}

#[test]
fn rows_have_the_same_bits_whatever_is_read_with_them() {
    // More inputs than a panel, more outputs than are solved at once, and chunks that end within rows.
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| text(&dir.path().join(name));
    let mut random = Random::new(8);
    let mut inputs = Vec::new();
    for t in 0..3 {
        let mut draw = |n: usize| (0..n).map(|_| random.symmetric()).collect::<Vec<f32>>();
        let model = tensors([
            ("a", Tensor::floats(Dtype::BF16, &[301, 203], &draw(301 * 203))),
            ("b", Tensor::floats(Dtype::BF16, &[70, 129], &draw(70 * 129))),
            ("c", Tensor::floats(Dtype::BF16, &[5], &draw(5))),
        ]);
        let mut gram = |n: usize| {
            let x = draw(n * n);
            let entry = |i: usize, j: usize| (0..n).map(|k| x[k * n + i] * x[k * n + j]).sum::<f32>();
            Tensor::floats(Dtype::F32, &[n, n], &(0..n * n).map(|at| entry(at / n, at % n)).collect::<Vec<_>>())
        };
        let grams = tensors([("a", gram(203)), ("b", gram(129))]);
        write_checkpoint(&dir.path().join(format!("m{t}")), &model, Layout::SINGLE);
        write_checkpoint(&dir.path().join(format!("g{t}")), &grams, Layout::SINGLE);
        inputs.extend(["--model".into(), at(&format!("m{t}")), "--gram".into(), at(&format!("g{t}"))]);
    }
    let merged = |run: &str, flags: &[&str]| {
        let mut args = vec!["merge".to_owned(), "--method=regmean".into(), "--out".into(), at(run)];
        args.extend(inputs.iter().cloned().chain(flags.iter().map(|flag| (*flag).to_owned())));
        tiesmith(args).succeeded();
        read_checkpoint(&dir.path().join(run))
    };
    let first = merged("one", &["--threads=1"]);
    for (run, flags) in [("two", ["--threads=3", "--memory=30MB"]), ("three", ["--threads=2", "--io=mmap"])] {
        assert!(first == merged(run, &flags), "{flags:?}");
    }
}
