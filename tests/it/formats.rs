//! Stored types, and every way to name a checkpoint.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use crate::support::family::{Deltas, Family, Spec, text};
use crate::support::files::{self, Layout, read_checkpoint, read_json, write_raw};
use crate::support::oracle::{Method, Recipe, Scope};
use crate::support::run::{Outcome, command, run, tiesmith};
use crate::support::tensor::{Tensor, differences};

const FLOATS: [Dtype; 6] = [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F8_E4M3, Dtype::F8_E5M2];
const OUTPUTS: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

#[test]
fn every_pair_of_stored_types_to_every_output_type() {
    for base in FLOATS {
        for model in FLOATS {
            let spec = Spec { base, models: vec![model, Dtype::F32], ..Spec::default() };
            let family = spec.family();
            let saved = family.save();
            for dtype in OUTPUTS {
                let recipe = Recipe { dtype: Some(dtype), density: 0.5, ..Recipe::default() };
                saved.merge(&recipe, &[]).must_equal(&family.expected(&recipe).tensors);
            }
        }
    }
}

#[test]
fn without_a_type_asked_for_every_tensor_keeps_its_own() {
    let mut family = Spec { models: vec![Dtype::BF16, Dtype::F64], ..Spec::default() }.family();
    let types = [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16];
    for (tensor, dtype) in family.base.values_mut().zip(types) {
        *tensor = tensor.to(dtype);
    }
    let saved = family.save();
    for method in Method::ALL {
        for scope in Scope::ALL {
            let recipe = Recipe { method: *method, scope: *scope, density: 0.5, ..Recipe::default() };
            saved.merge(&recipe, &[]).must_equal(&family.expected(&recipe).tensors);
        }
    }
}

#[test]
fn results_round_once_to_the_nearest_even() {
    // Halfway between two bf16 values, seen from both sides, and just beyond halfway.
    let step = 2f32.powi(-8);
    let family = Family::vectors(
        &[1.0; 6],
        &[&[1.0 + step, 1.0 + 3.0 * step, 1.0 - step / 2.0, 1.0 + step * 1.0001, 1e-40, -0.0]],
    );
    for dtype in [Dtype::BF16, Dtype::F16] {
        let recipe = Recipe { method: Method::Linear, dtype: Some(dtype), ..Recipe::default() };
        family.save().merge(&recipe, &[]).must_equal(&family.expected(&recipe).tensors);
    }
}

#[test]
fn a_result_too_large_for_the_output_type_is_an_error_naming_the_tensor() {
    let family = Family::vectors(&[1.0, 2.0], &[&[1.0, 70_000.0]]);
    let saved = family.save();
    let recipe = Recipe { density: 1.0, dtype: Some(Dtype::F16), ..Recipe::default() };
    let out = saved.path("out");
    let outcome = saved.run("merge", &recipe, &["--progress=none", "--out", &text(&out)]);
    let line = outcome.error_line(outcome.code.filter(|code| *code != 0).expect("a failure"));
    assert!(line.contains("\"w\""), "{line}");
    assert!(!out.join("model.safetensors").exists(), "an unfinished output must not look finished");
}

#[test]
fn integers_of_every_kind_are_copied_byte_for_byte() {
    let mut family = Spec::default().family();
    let types =
        [Dtype::U8, Dtype::I8, Dtype::U16, Dtype::I16, Dtype::U32, Dtype::I32, Dtype::U64, Dtype::I64, Dtype::BOOL];
    for (i, dtype) in types.into_iter().enumerate() {
        let bytes: Vec<u8> = (0..3 * dtype.bitsize() / 8).map(|byte| (byte % 2) as u8).collect();
        let tensor = Tensor::raw(dtype, &[3], bytes);
        for tensors in family.models.iter_mut().chain([&mut family.base]) {
            tensors.insert(format!("copied.{i}"), tensor.clone());
        }
    }
    let recipe = Recipe { dtype: Some(Dtype::BF16), ..Recipe::default() };
    let merged = family.save().merge(&recipe, &[]);
    let expected = family.expected(&recipe).tensors;
    for (name, tensor) in merged.tensors() {
        assert!(tensor == expected[&name], "{name}");
    }
}

/// A family on disk whose base can be named in many ways, and the result it must give.
struct Named {
    family: Family,
    saved: crate::support::family::Saved,
}

impl Named {
    fn new() -> Self {
        let family = Spec { deltas: Deltas::Stepped, ..Spec::default() }.family();
        let saved = family.save_as(|_| Layout::sharded(3, 4));
        Self { family, saved }
    }

    /// Merges with base called `name`, in `folder`, under `environment`.
    fn merge(&self, name: &str, folder: &Path, environment: &[(&str, &Path)]) -> (Outcome, PathBuf) {
        let out = tempfile::tempdir_in(self.saved.dir.path()).unwrap().keep().join("out");
        let mut merge = command();
        merge.current_dir(folder).envs(environment.iter().copied());
        merge.args(["merge", "--base", name, "--out", &text(&out)]);
        for model in &self.saved.models {
            merge.args(["--model", &text(model)]);
        }
        (run(merge), out)
    }

    #[track_caller]
    fn works(&self, name: &str, folder: &Path, environment: &[(&str, &Path)]) {
        let (outcome, out) = self.merge(name, folder, environment);
        outcome.succeeded();
        let expected = self.family.expected(&Recipe::default()).tensors;
        assert_eq!(differences(&expected, &read_checkpoint(&out)), "", "base called {name}");
    }
}

#[test]
fn a_checkpoint_is_a_directory_a_file_or_an_index() {
    let named = Named::new();
    let (root, base) = (named.saved.dir.path(), named.saved.base.clone());
    let index = base.join("model.safetensors.index.json");

    named.works(&text(&base), root, &[]);
    named.works("base", root, &[]);
    named.works("./base/", root, &[]);
    named.works(&text(&index), root, &[]);
    named.works("model.safetensors.index.json", &base, &[]);
    named.works(".", &base, &[]);

    // Any index whose name ends as it must.
    fs::rename(&index, base.join("diffusion.safetensors.index.json")).unwrap();
    named.works("base", root, &[]);
    named.works("base/diffusion.safetensors.index.json", root, &[]);

    // One file of any name, in a directory and by itself.
    let single = root.join("single");
    files::write_checkpoint(&single, &named.family.base, Layout { shards: 1, order: 3 });
    named.works("single", root, &[]);
    fs::rename(single.join("model.safetensors"), single.join("weights.v2.safetensors")).unwrap();
    named.works("single", root, &[]);
    named.works("single/weights.v2.safetensors", root, &[]);
}

#[test]
fn shards_and_directories_may_be_symbolic_links() {
    let named = Named::new();
    let root = named.saved.dir.path();
    let linked = root.join("linked");
    fs::create_dir(&linked).unwrap();
    for entry in fs::read_dir(&named.saved.base).unwrap() {
        let entry = entry.unwrap();
        symlink(Path::new("../base").join(entry.file_name()), linked.join(entry.file_name())).unwrap();
    }
    symlink("linked", root.join("again")).unwrap();
    named.works("linked", root, &[]);
    named.works("again", root, &[]);
}

/// Puts the checkpoint in `dir` into a Hub cache as the Hub's client does: blobs, a snapshot of links, refs.
fn put_in_hub_cache(cache: &Path, folder: &str, commit: &str, reference: &str, dir: &Path) {
    let repository = cache.join(folder);
    let (blobs, snapshot) = (repository.join("blobs"), repository.join("snapshots").join(commit));
    for folder in [&blobs, &snapshot, &repository.join("refs")] {
        fs::create_dir_all(folder).unwrap();
    }
    fs::write(repository.join("refs").join(reference), commit).unwrap();
    for (path, bytes) in files::read_tree(dir) {
        let blob = format!("{}{}", blake3::hash(&bytes).to_hex(), commit);
        fs::write(blobs.join(&blob), bytes).unwrap();
        symlink(Path::new("../../blobs").join(&blob), snapshot.join(path)).unwrap();
    }
}

#[test]
fn a_hub_id_is_found_in_the_local_cache() {
    let named = Named::new();
    let root = named.saved.dir.path();
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let other = "fedcba9876543210fedcba9876543210fedcba98";
    let home = root.join("home");
    let cache = home.join("hub");
    put_in_hub_cache(&cache, "models--org--name", commit, "main", &named.saved.base);
    put_in_hub_cache(&cache, "models--org--name", other, "v2", &named.saved.models[0]);

    named.works("org/name", root, &[("HF_HUB_CACHE", &cache)]);
    named.works("org/name", root, &[("HF_HOME", &home)]);
    named.works("org/name@main", root, &[("HF_HUB_CACHE", &cache)]);
    named.works(&format!("org/name@{commit}"), root, &[("HF_HUB_CACHE", &cache)]);

    let home_dir = root.join("person");
    fs::create_dir_all(home_dir.join(".cache/huggingface")).unwrap();
    symlink(&cache, home_dir.join(".cache/huggingface/hub")).unwrap();
    named.works("org/name", root, &[("HOME", &home_dir)]);

    // Another revision is another checkpoint.
    let (outcome, out) = named.merge("org/name@v2", root, &[("HF_HUB_CACHE", &cache)]);
    outcome.succeeded();
    let expected = named.family.expected(&Recipe::default()).tensors;
    assert_ne!(differences(&expected, &read_checkpoint(&out)), "");
}

#[test]
fn a_directory_wins_over_a_hub_id_of_the_same_spelling() {
    let named = Named::new();
    let root = named.saved.dir.path();
    let cache = root.join("cache");
    let commit = "0123456789abcdef0123456789abcdef01234567";
    put_in_hub_cache(&cache, "models--org--name", commit, "main", &named.saved.models[1]);
    fs::create_dir(root.join("org")).unwrap();
    files::copy_tree(&named.saved.base, &root.join("org/name"));
    named.works("org/name", root, &[("HF_HUB_CACHE", &cache)]);
}

#[test]
fn a_hub_id_that_is_not_in_the_cache_is_refused() {
    let named = Named::new();
    let cache = named.saved.path("cache");
    fs::create_dir(&cache).unwrap();
    for name in ["org/name", "org/name@v9"] {
        let (outcome, out) = named.merge(name, named.saved.dir.path(), &[("HF_HUB_CACHE", &cache)]);
        assert!(outcome.refusal().contains("org/name"));
        assert!(!out.exists());
    }
}

#[test]
fn odd_but_valid_headers_are_accepted() {
    let family = Family::vectors(&[1.0, 2.0], &[&[3.0, 5.0]]);
    let data: Vec<u8> = [3.0f32, 5.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let entry = r#""w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
    let empty = r#""e":{"dtype":"F32","shape":[0],"data_offsets":[8,8]}"#;
    let headers = [
        ("no metadata", format!("{{{entry}}}")),
        ("padding", format!("{{{entry}}}        ")),
        ("metadata of another tool", format!(r#"{{"__metadata__":{{"made by":"ünknown\n"}},{entry}}}"#)),
        ("metadata last", format!(r#"{{{entry},"__metadata__":{{"format":"pt"}}}}"#)),
        ("fields in another order", r#"{"w":{"data_offsets":[0,8],"shape":[2],"dtype":"F32"}}"#.to_owned()),
        ("spaces", r#"{ "w" : { "dtype" : "F32", "shape" : [ 2 ], "data_offsets" : [ 0, 8 ] } }"#.to_owned()),
        ("an escaped name", r#"{"\u0077":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#.to_owned()),
        ("an empty tensor at the end", format!("{{{entry},{empty}}}")),
    ];
    for (what, header) in headers {
        let saved = family.save();
        write_raw(&saved.models[0].join("model.safetensors"), &header, &data);
        let recipe = Recipe { method: Method::Linear, ..Recipe::default() };
        let out = saved.path("out");
        let outcome = saved.run("merge", &recipe, &["--missing", "base", "--out", &text(&out)]);
        assert_eq!(outcome.code, Some(0), "{what}\n{}", outcome.stderr);
        assert_eq!(read_checkpoint(&out)["w"].f32s(), [3.0, 5.0], "{what}");
    }
}

#[test]
fn names_of_any_characters_survive() {
    let names = ["", "with space", "quote\"and\\slash", "tab\tnewline\n", "ünïcode 模型", "a/b/../c", "model.0"];
    let family = {
        let named = |value: f32| -> crate::support::tensor::Tensors {
            names.iter().map(|name| ((*name).to_owned(), Tensor::vector(&[value, 1.0]))).collect()
        };
        Family { base: named(0.0), models: vec![named(2.0), named(3.0)], signs: named(1.0) }
    };
    let output = family.save().merge(&Recipe { density: 1.0, ..Recipe::default() }, &[]);
    output.must_equal(&family.expected(&Recipe { density: 1.0, ..Recipe::default() }).tensors);
}

#[test]
fn an_output_is_an_input() {
    let family = Spec::default().family();
    let saved = family.save();
    let recipe = Recipe { method: Method::Linear, ..Recipe::default() };
    let first = saved.merge(&recipe, &["--max-shard-size=400B"]);
    assert!(read_json(&first.path.join("model.safetensors.index.json"))["weight_map"].is_object());
    let out = saved.path("second");
    let args = ["merge", "--method=linear", "--model", &text(&first.path), "--out", &text(&out)];
    tiesmith(args).succeeded();
    assert_eq!(differences(&first.tensors(), &read_checkpoint(&out)), "");
}
