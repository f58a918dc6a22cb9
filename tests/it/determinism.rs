//! Output bytes are a function of the recipe and the inputs, and of nothing else.

use std::collections::BTreeMap;
use std::path::PathBuf;

use safetensors::Dtype;

use crate::support::family::{Deltas, Family, Output, Spec};
use crate::support::files::{Layout, read_tree};
use crate::support::oracle::{Method, Recipe, Scope, TrimTies, ZeroSum};

/// Everything in an output but the manifest, which also records how long the run took.
fn bytes(output: &Output) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = read_tree(&output.path);
    files.remove(&PathBuf::from("tiesmith.json")).expect("an output has a manifest");
    files
}

/// Large enough for several chunks of work per tensor, with ties.
fn family() -> Family {
    let spec = Spec {
        seed: 9,
        shapes: vec![("a", vec![300, 257]), ("b", vec![70_001]), ("c", vec![3]), ("d", vec![])],
        base: Dtype::BF16,
        models: vec![Dtype::BF16, Dtype::F32, Dtype::BF16],
        deltas: Deltas::Stepped,
    };
    spec.family()
}

fn recipes() -> Vec<(Recipe, &'static [&'static str])> {
    let ties = Recipe::default();
    vec![
        (ties.clone(), &[]),
        (Recipe { trim_ties: TrimTies::Lowest, zero_sum: ZeroSum::Majority, ..ties.clone() }, &[]),
        (Recipe { scope: Scope::Tensor, trim_ties: TrimTies::Lowest, ..ties.clone() }, &[]),
        (ties.clone(), &["--trim-ties=sample", "--seed=7"]),
        (ties.clone(), &["--threshold=sketch"]),
        (Recipe { method: Method::Linear, ..ties.clone() }, &[]),
        (Recipe { method: Method::TaskArithmetic, ..ties }, &[]),
    ]
}

#[test]
fn how_a_run_is_done_changes_no_byte() {
    let runs: [&[&str]; 6] = [
        &["--threads=1"],
        &["--threads=2", "--memory=64MB"],
        &["--threads=7", "--memory=2GiB"],
        &["--io=mmap", "--memory=64MB"],
        &["--io=read"],
        &["--io=auto"],
    ];
    let saved = family().save();
    for (recipe, flags) in recipes() {
        let merged = |run: &[&str]| {
            let output = saved.merge(&recipe, &[flags, run].concat());
            (bytes(&output), output.outcome.command)
        };
        let (first, command) = merged(runs[0]);
        for run in &runs[1..] {
            let (other, other_command) = merged(run);
            let differing: Vec<_> =
                first.keys().chain(other.keys()).filter(|path| first.get(*path) != other.get(*path)).collect();
            assert!(differing.is_empty(), "{differing:?} differ between\n{command}\n{other_command}");
        }
    }
}

#[test]
fn the_largest_shard_changes_only_the_sharding() {
    let saved = family().save();
    for (recipe, flags) in recipes() {
        let merged = |size: &str| saved.merge(&recipe, &[flags, &["--max-shard-size", size]].concat());
        let whole = merged("5GB");
        assert!(whole.path.join("model.safetensors").exists());
        for size in ["200KB", "1B"] {
            let split = merged(size);
            assert!(split.path.join("model.safetensors.index.json").exists());
            split.must_equal(&whole.tensors());
        }
    }
}

#[test]
fn the_layout_of_inputs_changes_no_tensor() {
    let family = family();
    let layouts: [fn(usize) -> Layout; 4] = [
        |_| Layout::SINGLE,
        |_| Layout::sharded(4, 0),
        |checkpoint| Layout::sharded(1 + checkpoint % 4, 31 + checkpoint as u64),
        |checkpoint| Layout { shards: 1, order: 5 + checkpoint as u64 },
    ];
    for (recipe, flags) in recipes() {
        let mut outputs = layouts.iter().map(|&layout| family.save_as(layout).merge(&recipe, flags).tensors());
        let first = outputs.next().unwrap();
        for (other, n) in outputs.zip(1..) {
            assert!(first == other, "layout {n} differs: {:?} {flags:?}", recipe.args());
        }
    }
}

#[test]
fn small_tensors_give_the_same_bytes_again() {
    let saved = Family::adversarial().save();
    let merged = || bytes(&saved.merge(&Recipe::default(), &[]));
    assert_eq!(merged(), merged());
}
