//! PyTorch checkpoints as inputs: the same output as from safetensors files with the same tensors.

use std::fs;

use safetensors::Dtype;

use crate::support::family::{Deltas, Saved, Spec, text};
use crate::support::files::read_checkpoint;
use crate::support::repository;
use crate::support::run::tiesmith;
use crate::support::tensor::{Tensor, Tensors, differences};
use crate::support::torch::write_torch;

fn merge(saved: &Saved, names: [&str; 3], out: &str, extra: &[&str]) -> Tensors {
    let [base, a, b] = names.map(|name| text(&saved.path(name)));
    let out = saved.path(out);
    let fixed = ["merge", "--base", &base, "--model", &a, "--model", &b, "--out", out.to_str().unwrap()];
    tiesmith([&fixed[..], &["--progress=none"], extra].concat()).succeeded();
    read_checkpoint(&out)
}

#[test]
fn pickled_inputs_give_the_same_bytes_as_safetensors() {
    let family = Spec { seed: 11, deltas: Deltas::HeavyTailed, ..Spec::default() }.family();
    let saved = family.save();
    let [base, a, b] = [&saved.base, &saved.models[0], &saved.models[1]].map(|path| {
        let name = path.file_name().unwrap().to_str().unwrap();
        name.to_owned()
    });
    let expected = merge(&saved, [&base, &a, &b], "plain", &[]);
    write_torch(&saved.path("base-bin"), &family.base, 1);
    write_torch(&saved.path("a-bin"), &family.models[0], 3);
    write_torch(&saved.path("b-bin"), &family.models[1], 1);
    let runs: [(&str, [&str; 3], &[&str]); 4] = [
        ("all", ["base-bin", "a-bin", "b-bin"], &[]),
        ("mixed", [&base, "a-bin", "b-bin/pytorch_model.bin"], &["--io=mmap"]),
        ("small", ["base-bin", &a, "b-bin"], &["--memory=32MB", "--threads=1"]),
        ("indexed", ["base-bin", "a-bin/pytorch_model.bin.index.json", "b-bin"], &["--threads=4"]),
    ];
    for (out, names, extra) in runs {
        assert_eq!(differences(&expected, &merge(&saved, names, out, extra)), "", "{out}");
    }
}

#[test]
fn files_of_pythons_pickle_are_inspected_compared_and_copied() {
    let dir = tempfile::tempdir().unwrap();
    let file = text(&repository("tests/golden/torch/pytorch_model.bin"));
    let nested = text(&repository("tests/golden/torch/protocol4.pt"));
    let report = tiesmith(["inspect", &file, "--json"]).succeeded().json();
    assert_eq!(report["tensors"], 10);
    tiesmith(["diff", &file, &nested]).succeeded();
    let out = text(&dir.path().join("out"));
    tiesmith(["merge", "--method=passthrough", "--model", &file, "--out", &out]).succeeded();
    let merged = read_checkpoint(&dir.path().join("out"));
    assert_eq!(merged.len(), 10);
    let values: Vec<f32> = (0..12).map(|i| 0.5 * i as f32).collect();
    assert!(merged["embed.weight"] == Tensor::floats(Dtype::F32, &[3, 4], &values));
    assert!(merged["lm_head.weight"] == merged["embed.weight"], "tensors of one storage are two in the output");
    assert!(merged["layer.view"] == Tensor::floats(Dtype::F32, &[2, 2], &values[4..8]));
    assert!(merged["layer.positions"].values() == [0.0, 1.0, -2.0]);
    assert!(merged["layer.parameter"] == Tensor::floats(Dtype::BF16, &[3], &[1.0, -2.0, 0.25]));
}

#[test]
fn a_pickle_with_code_in_it_is_refused_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    fs::create_dir(&model).unwrap();
    let out = text(&dir.path().join("out"));
    for (name, parts) in [
        ("evil.bin", ["names __builtin__.eval, which tensors do not need", "torch.save(model.state_dict(), FILE)"]),
        ("transposed.bin", ["tensor \"w\": shape [4, 3] with strides [1, 4]", ".contiguous()"]),
    ] {
        fs::copy(repository("tests/golden/torch").join(name), model.join("pytorch_model.bin")).unwrap();
        let outcome = tiesmith(["merge", "--method=linear", "--model", &text(&model), "--out", &out]);
        let refusal = outcome.refusal();
        assert!(parts.iter().all(|part| refusal.contains(part)), "{refusal}");
        assert!(refusal.contains("pytorch_model.bin: "), "{refusal}");
    }
    assert!(!dir.path().join("out").exists());
}
