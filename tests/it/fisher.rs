//! Fisher merging: golden estimates, tensors without them, and what is refused.

use std::fs;
use std::path::Path;

use safetensors::Dtype;

use crate::support::family::{Saved, Spec, text};
use crate::support::files::{Layout, read_checkpoint, read_file, write_checkpoint};
use crate::support::reference;
use crate::support::repository;
use crate::support::run::{Outcome, tiesmith};
use crate::support::statistics::fisher_of;
use crate::support::tensor::{Tensor, Tensors};

#[test]
fn the_golden_family() {
    let golden = |path: String| repository("tests/golden/family-f32").join(path);
    let dir = tempfile::tempdir().unwrap();
    let (out, mut args) = (dir.path().join("out"), vec!["merge".to_owned(), "--method=fisher".into()]);
    let (mut models, mut fishers) = (Vec::new(), Vec::new());
    for t in 0..3 {
        // A checkpoint is named by its ending.
        let fisher = dir.path().join(format!("fisher{t}.safetensors"));
        fs::copy(golden(format!("ft{t}/fisher.st")), &fisher).unwrap();
        args.extend(["--model".into(), text(&golden(format!("ft{t}"))), "--fisher".into(), text(&fisher)]);
        models.push(read_checkpoint(&golden(format!("ft{t}"))));
        fishers.push(read_file(&fisher));
    }
    args.extend(["--out".into(), text(&out)]);
    tiesmith(args).succeeded();
    let merged = read_checkpoint(&out);
    let mut weighed = 0;
    for (name, found) in &merged {
        let all = |of: &[Tensors]| of.iter().map(|tensors| tensors[name].values()).collect::<Vec<_>>();
        let values = all(&models);
        let expected = match fishers[0].contains_key(name) {
            true => reference::fisher(&values, &all(&fishers), &[1.0; 3], 1e-6),
            false => reference::weighted(&values, &[1.0 / 3.0; 3]),
        };
        weighed += usize::from(fishers[0].contains_key(name));
        for (found, expected) in found.values().iter().zip(expected) {
            assert!((found - expected).abs() <= 1e-6 * expected.abs().max(1e-3), "{name}: {found} for {expected}");
        }
    }
    assert!(weighed > 5, "{weighed}");
}

/// A family of two models with Fisher information beside them, changed by `edit`.
fn with_fishers(edit: impl Fn(&mut [Tensors; 2])) -> Saved {
    let family = Spec { models: vec![Dtype::F32, Dtype::BF16], ..Spec::default() }.family();
    let saved = family.save();
    let mut fishers = [fisher_of(&family.models[0]), fisher_of(&family.models[1])];
    edit(&mut fishers);
    for (i, fisher) in fishers.iter().enumerate() {
        write_checkpoint(&saved.path(&format!("fisher{i}")), fisher, Layout::SINGLE);
    }
    saved
}

fn run(saved: &Saved, extra: &[&str]) -> Outcome {
    let mut args = vec!["merge".to_owned(), "--out".into(), text(&saved.path("out")), "--method=fisher".into()];
    for (i, model) in saved.models.iter().enumerate() {
        args.extend(["--model".into(), text(model), "--fisher".into(), text(&saved.path(&format!("fisher{i}")))]);
    }
    args.extend(extra.iter().map(|arg| (*arg).to_owned()));
    tiesmith(args)
}

#[test]
fn tensors_without_it_are_averaged_and_that_is_said() {
    let saved = with_fishers(|fishers| fishers.iter_mut().for_each(|f| drop(f.remove("embed.weight"))));
    let outcome = run(&saved, &["--json", "--param=weight=2"]).succeeded();
    let warnings = outcome.json()["warnings"].to_string();
    assert!(warnings.contains("1 tensors have no fisher and are averaged: \\\"embed.weight\\\""), "{warnings}");
    let merged = read_checkpoint(&saved.path("out"));
    let models: Vec<_> = saved.models.iter().map(|m| read_checkpoint(m)["embed.weight"].values()).collect();
    let expected = reference::weighted(&models, &[0.5, 0.5]);
    for (found, expected) in merged["embed.weight"].values().iter().zip(expected) {
        assert!((found - expected).abs() <= 1e-6 * expected.abs().max(1e-3));
    }
}

#[test]
fn a_recipe_file_names_it_per_model() {
    let saved = with_fishers(|_| ());
    let at = |name: &str| text(&saved.path(name));
    run(&saved, &["--fisher-floor=0.1"]).succeeded();
    let by_flags = read_checkpoint(Path::new(&at("out")));
    let models: String = (0..2)
        .map(|i| format!("- model: {}\n  fisher: {}\n", text(&saved.models[i]), at(&format!("fisher{i}"))))
        .collect();
    fs::write(
        saved.path("r.yml"),
        format!("merge_method: fisher\nparameters: {{fisher_floor: 0.1}}\nmodels:\n{models}"),
    )
    .unwrap();
    tiesmith(["merge", &at("r.yml"), "--out", &at("by-file")]).succeeded();
    assert!(by_flags == read_checkpoint(Path::new(&at("by-file"))));
}

#[test]
fn what_cannot_weigh_is_one_line() {
    let edit = |index: usize, value: f32| {
        move |fishers: &mut [Tensors; 2]| {
            let tensor = fishers[1].get_mut("layers.0.mlp.weight").unwrap();
            let mut values = tensor.f32s();
            values[index] = value;
            *tensor = Tensor::floats(Dtype::F32, &tensor.shape.clone(), &values);
        }
    };
    let refused = |saved: &Saved, extra: &[&str], parts: &[&str]| {
        let outcome = run(saved, extra);
        let line = outcome.refusal();
        assert!(parts.iter().all(|part| line.contains(part)), "{line}");
        assert!(!saved.path("out").exists(), "{line}");
    };
    for (value, shown) in [(-0.5, "-0.5"), (f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        let parts = [&format!("{shown} in the Fisher information of model 2 at element 17"), "layers.0.mlp.weight"];
        refused(&with_fishers(edit(17, value)), &["--non-finite=propagate"], &parts);
    }
    let missing = with_fishers(|fishers| drop(fishers[1].remove("layers.0.norm.weight")));
    refused(&missing, &[], &["layers.0.norm.weight", "fisher of model 2", "does not have it"]);
    let shape = with_fishers(|fishers| {
        fishers[0].insert("layers.0.norm.weight".into(), Tensor::vector(&[1.0; 12]));
    });
    refused(&shape, &[], &["layers.0.norm.weight", "fisher of model 1", "has shape [12]"]);
    let integers = with_fishers(|fishers| {
        fishers[0].insert("layers.2.mlp.bias".into(), Tensor::raw(Dtype::I32, &[1], vec![0; 4]));
    });
    refused(&integers, &[], &["layers.2.mlp.bias", "has type I32"]);
    let others = with_fishers(|fishers| {
        fishers.iter_mut().for_each(|f| *f = [("x".to_owned(), Tensor::vector(&[1.0]))].into());
    });
    refused(&others, &[], &["no tensor of the models has a fisher in"]);
    let good = with_fishers(|_| ());
    refused(&good, &["--fisher", "x"], &["--fisher is given 3 times, but there are 2 models"]);
    refused(&good, &["--method=ties", &format!("--base={}", text(&good.base))], &["ties has no use for --fisher"]);
    refused(&good, &["--fisher-floor=0"], &["fisher_floor is 0"]);
    refused(&good, &["--param=weight=0"], &["weights sum to 0"]);
    let models: Vec<String> = good.models.iter().flat_map(|model| ["--model".into(), text(model)]).collect();
    let without = tiesmith(["plan", "--method=fisher"].into_iter().map(str::to_owned).chain(models));
    assert!(without.refusal().contains("fisher needs the fisher checkpoint of every model"), "{}", without.stderr);
}
