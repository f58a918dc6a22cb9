//! What a manifest is good for: its output can be made again bit for bit, and its damaged files can be repaired.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::{Value, json};

use crate::support::family::{Deltas, Saved, Spec, text};
use crate::support::files::{Layout, copy_tree, read_checkpoint, read_json, read_tree, write_checkpoint, write_raw};
use crate::support::oracle::Recipe;
use crate::support::repository;
use crate::support::run::{Outcome, command, run, tiesmith};
use crate::support::tensor::Tensor;

const SHARDS: &str = "--max-shard-size=700B";

/// Flags of merges whose repair takes different ways.
const KINDS: [&[&str]; 9] = [
    &[SHARDS],
    &[SHARDS, "--scope=tensor", "--trim-ties=lowest"],
    &[SHARDS, "--trim-ties=lowest", "--density=0.3"],
    &[SHARDS, "--trim-ties=sample", "--dtype=bfloat16", "--density=0.123456789012345678"],
    &[SHARDS, "--threshold=sketch", "--zero-sum=majority"],
    &[SHARDS, "--method=breadcrumbs_ties"],
    &[SHARDS, "--method=karcher"],
    &[SHARDS, "--method=dare_ties", "--seed=7", "--exclude=*norm*"],
    &[],
];

fn saved(seed: u64) -> Saved {
    let saved = Spec { seed, deltas: Deltas::Stepped, ..Spec::default() }.family().save();
    fs::write(saved.base.join("tokenizer.json"), "{}").unwrap();
    saved
}

/// A finished output.
struct Merged {
    path: PathBuf,
}

/// The recipe's flags are those of the kind alone.
fn merged(saved: &Saved, flags: &[&str]) -> Merged {
    let path = (0..).map(|number| saved.path(&format!("merged{number}"))).find(|path| !path.exists()).unwrap();
    let mut merge = command();
    merge.arg("merge").args(saved.inputs(&Recipe::default())).args(flags).args(["--progress=none", "--out"]).arg(&path);
    run(merge).succeeded();
    Merged { path }
}

/// Files that are functions of recipe and inputs alone.
fn lasting(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut tree = read_tree(dir);
    tree.remove(Path::new("tiesmith.json")).expect("a manifest");
    tree
}

fn shard_names(dir: &Path) -> Vec<String> {
    let manifest = read_json(&dir.join("tiesmith.json"));
    manifest["shards"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap().to_owned()).collect()
}

fn repair(dir: &Path) -> Outcome {
    tiesmith(["verify", "--repair", "--json", "--progress=none", &text(dir)])
}

#[test]
fn a_manifest_makes_its_output_again() {
    for (number, flags) in KINDS.into_iter().enumerate() {
        let saved = saved(number as u64);
        let first = merged(&saved, flags);
        let again = first.path.with_file_name("again");
        let manifest = text(&first.path.join("tiesmith.json"));
        let report = tiesmith(["merge", &manifest, "--json", "--threads=1", "--out", &text(&again)]).succeeded().json();
        assert_eq!(report["reproduced"], true, "{flags:?}");
        assert!(lasting(&first.path) == lasting(&again), "{flags:?}");
        let (then, now) = (read_json(&first.path.join("tiesmith.json")), read_json(&again.join("tiesmith.json")));
        for same in ["recipe", "fingerprint", "settings", "inputs", "thresholds", "shards", "side_files"] {
            assert_eq!(then[same], now[same], "{flags:?}: {same}");
        }
        tiesmith(["plan", &manifest]).succeeded();
    }
}

#[test]
fn a_manifest_finds_inputs_from_anywhere_and_knows_when_they_are_others() {
    let saved = saved(1);
    let mut merge = command();
    merge.current_dir(saved.dir.path()).args([
        "merge",
        "--base=base",
        "--model=model1",
        "--model=model2/",
        "--out=out",
    ]);
    run(merge).succeeded();
    let manifest = text(&saved.path("out/tiesmith.json"));
    let again =
        |out: &str, extra: &[&str]| tiesmith([&["merge", &manifest, "--out", &text(&saved.path(out))], extra].concat());
    assert!(again("again", &[]).succeeded().stdout.contains("reproduced"));
    assert!(lasting(&saved.path("out")) == lasting(&saved.path("again")));
    assert!(again("x", &["--density=0.5"]).refusal().contains("--density cannot be given with a manifest"));
    // A fresh copy is as good: only content counts.
    let copy = saved.path("copy");
    copy_tree(&saved.models[0], &copy);
    fs::remove_dir_all(&saved.models[0]).unwrap();
    assert!(again("x", &[]).refusal().contains("model1"));
    fs::rename(&copy, &saved.models[0]).unwrap();
    again("fresh", &[]).succeeded();
    // Another content of the same length shows in the end; another length at once.
    let file = saved.models[0].join("model.safetensors");
    let mut content = fs::read(&file).unwrap();
    *content.last_mut().unwrap() ^= 64;
    fs::write(&file, &content).unwrap();
    let line = again("other", &[]).error_line(1).to_owned();
    assert!(line.contains("model.safetensors is not what the manifest lists"), "{line}");
    write_raw(&file, r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, &[0; 4]);
    assert!(again("x", &[]).code == Some(2) && !saved.path("x").exists());
}

/// A directory with a copy of every kind of input, to be named from within.
fn kinds_of_inputs() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["base", "lora", "rslora"] {
        copy_tree(&repository("tests/golden/peft").join(name), &dir.path().join(name));
    }
    let at = |args: &[&str]| {
        let mut command = command();
        command.current_dir(dir.path()).args(args).args(["--progress", "none"]);
        run(command).succeeded();
    };
    at(&["merge", "--method", "linear", "--model", "base+lora", "--out", "model"]);
    let ones = |tensor: &Tensor| Tensor::floats(Dtype::F32, &tensor.shape, &vec![1.0; tensor.values().len()]);
    let fisher =
        read_checkpoint(&dir.path().join("base")).iter().map(|(name, tensor)| (name.clone(), ones(tensor))).collect();
    write_checkpoint(&dir.path().join("fisher"), &fisher, Layout::SINGLE);
    at(&["pack", "model", "--base", "base", "--out", "model.tvz"]);
    dir
}

#[test]
fn inputs_of_every_kind_are_found_from_anywhere() {
    let dir = kinds_of_inputs();
    let at = |name: &str| text(&dir.path().join(name));
    let merges: [&[&str]; 4] = [
        &["merge", "--base", "base", "--model", "base+lora", "--model", "base+rslora"],
        &["merge", "--base", "base", "--model", "lora", "--model", "model"],
        &["merge", "--base", "base", "--model", "model.tvz"],
        &["merge", "--method", "fisher", "--base", "base", "--model", "model,weight=0.5", "--fisher", "fisher"],
    ];
    for flags in merges {
        let mut merge = command();
        merge.current_dir(dir.path()).args(flags).args(["--out", "out", "--progress", "none"]);
        run(merge).succeeded();
        let manifest = at("out/tiesmith.json");
        for again in ["again", "and-again"] {
            let from = if again == "again" { manifest.clone() } else { at("again/tiesmith.json") };
            tiesmith(["merge", &from, "--out", &at(again)]).succeeded();
            assert!(lasting(&dir.path().join("out")) == lasting(&dir.path().join(again)), "{flags:?}");
        }
        for file in shard_names(&dir.path().join("out")) {
            fs::write(dir.path().join("out").join(file), "").unwrap();
        }
        assert_eq!(repair(&dir.path().join("out")).succeeded().json()["intact"], true, "{flags:?}");
        for made in ["out", "again", "and-again"] {
            fs::remove_dir_all(dir.path().join(made)).unwrap();
        }
    }
}

#[test]
fn manifests_that_make_no_sense_are_refused() {
    let saved = saved(2);
    let output = merged(&saved, &[]);
    let path = output.path.join("tiesmith.json");
    let good = read_json(&path);
    let spoil = |what: &str, change: &dyn Fn(&mut Value)| {
        let mut value = good.clone();
        change(&mut value);
        fs::write(&path, value.to_string()).unwrap();
        let out = text(&saved.path("x"));
        let line = tiesmith(["merge", &text(&path), "--out", &out]).refusal().to_owned();
        assert!(!saved.path("x").exists(), "{what}: {line}");
    };
    spoil("another version", &|m| m["format_version"] = json!(99));
    spoil("no inputs", &|m| m["inputs"] = json!([]));
    spoil("an unknown setting", &|m| m["recipe"]["colour"] = json!("red"));
    spoil("an empty gradient", &|m| m["recipe"]["params"]["lambda"] = json!([]));
    spoil("a density that is none", &|m| m["recipe"]["params"]["density"] = json!(7));
    spoil("an unknown method", &|m| m["recipe"]["method"] = json!("best"));
    spoil("no models", &|m| m["recipe"]["models"] = json!([]));
    spoil("a slice of no model", &|m| {
        m["recipe"]["slices"] =
            json!([{"layers": 1, "sources": [{"model": 99, "first": 0, "params": {}}], "base": null, "params": {}}]);
    });
    spoil("other shards", &|m| m["shards"][0]["bytes"] = json!(12));
    spoil("another header", &|m| m["inputs"][1]["files"][0]["header_blake3"] = json!("00"));
    spoil("fewer files", &|m| m["inputs"][0]["files"] = json!([]));
}

/// CRC-64/NVME, one bit at a time.
fn crc64(bytes: &[u8]) -> u64 {
    let step = |crc: u64| crc >> 1 ^ (if crc & 1 == 1 { 0x9a6c_9329_ac4b_c9b5 } else { 0 });
    !bytes.iter().fold(u64::MAX, |crc, &byte| (0..8).fold(crc ^ u64::from(byte), |crc, _| step(crc)))
}

#[test]
fn every_tensor_has_its_checksum() {
    // Long enough for pieces that meet inside leaves, in types of several widths, over resumed and whole shards.
    let shapes = vec![("a", vec![150_001]), ("b", vec![3, 70_007]), ("empty", vec![0, 4]), ("one", vec![])];
    for dtype in [Dtype::F32, Dtype::BF16] {
        let saved = Spec { shapes: shapes.clone(), base: dtype, ..Spec::default() }.family().save();
        for flags in [&["--threads=3"][..], &["--threads=1", "--max-shard-size=400KB", "--memory=32MB"]] {
            let output = merged(&saved, flags);
            let manifest = read_json(&output.path.join("tiesmith.json"));
            let mut seen = 0;
            for shard in manifest["shards"].as_array().unwrap() {
                for (name, crc) in shard["tensors"].as_object().unwrap() {
                    let tensor = &read_checkpoint(&output.path)[name];
                    assert_eq!(*crc, format!("{:016x}", crc64(&tensor.bytes)), "{name}");
                    seen += 1;
                }
            }
            assert_eq!(seen, 4);
        }
    }
}

#[test]
fn damaged_tensors_are_named() {
    let saved = saved(3);
    let output = merged(&saved, &[SHARDS]);
    let name = &shard_names(&output.path)[0];
    let path = output.path.join(name);
    let content = fs::read(&path).unwrap();
    let tensors = read_json(&output.path.join("tiesmith.json"))["shards"][0]["tensors"].as_object().unwrap().clone();
    let last = tensors.keys().next_back().unwrap();
    let verify = || tiesmith(["verify", "--json", &text(&output.path)]).exited(1).json()["damaged"][0].clone();
    let mut damaged = content.clone();
    *damaged.last_mut().unwrap() ^= 1;
    fs::write(&path, &damaged).unwrap();
    assert_eq!(verify()["tensors"], json!([last]));
    let text_report = tiesmith(["verify", &text(&output.path)]).exited(1).stdout;
    assert!(text_report.contains(last) && text_report.contains("--repair"), "{text_report}");
    fs::write(&path, &content[..content.len() - 1]).unwrap();
    assert_eq!(verify()["tensors"], json!([last]), "cut off");
    damaged.clone_from(&content);
    damaged[9] ^= 1;
    fs::write(&path, &damaged).unwrap();
    assert!(verify()["tensors"].is_null(), "a damaged header tells nothing");
}

#[test]
fn repair_makes_damaged_files_again_and_leaves_the_others_alone() {
    type Damage = fn(&Path);
    let damages: [Damage; 4] = [
        |path| {
            let mut content = fs::read(path).unwrap();
            let middle = content.len() * 3 / 4;
            content[middle] ^= 1;
            fs::write(path, content).unwrap();
        },
        |path| fs::remove_file(path).unwrap(),
        |path| fs::write(path, "").unwrap(),
        |path| fs::OpenOptions::new().write(true).open(path).unwrap().set_len(100_000).unwrap(),
    ];
    for (number, flags) in KINDS.into_iter().enumerate() {
        let saved = saved(10 + number as u64);
        let output = merged(&saved, flags);
        let whole = read_tree(&output.path);
        let files: Vec<&PathBuf> = whole.keys().filter(|path| **path != Path::new("tiesmith.json")).collect();
        for (at, damaged) in files.iter().enumerate() {
            let times = |skip: &Path| -> Vec<_> {
                let others = whole.keys().filter(|path| **path != skip);
                others.map(|path| fs::metadata(output.path.join(path)).unwrap().modified().unwrap()).collect()
            };
            let before = times(damaged);
            damages[(at + number) % damages.len()](&output.path.join(damaged));
            let report = repair(&output.path).succeeded().json();
            assert_eq!((&report["intact"], &report["repaired"]), (&json!(true), &json!([damaged])), "{flags:?}");
            assert!(whole == read_tree(&output.path), "{flags:?}: {}", damaged.display());
            assert!(before == times(damaged), "{flags:?}: more than {} was written", damaged.display());
        }
        // Everything at once.
        files.iter().enumerate().for_each(|(at, file)| damages[at % damages.len()](&output.path.join(file)));
        repair(&output.path).succeeded();
        assert!(whole == read_tree(&output.path), "{flags:?}");
        assert_eq!(repair(&output.path).succeeded().json()["repaired"], json!([]));
    }
}

#[test]
fn repair_refuses_other_inputs_and_leaves_things_as_they_are() {
    let saved = saved(30);
    let output = merged(&saved, &[SHARDS]);
    let names = shard_names(&output.path);
    let shard = output.path.join(&names[1]);
    fs::write(&shard, "damaged").unwrap();
    let before = read_tree(&output.path);
    let file = saved.models[0].join("model.safetensors");
    let content = fs::read(&file).unwrap();
    let unchanged = |line: &str| assert!(before == read_tree(&output.path), "{line}");
    // The same length, other weights: only the result tells.
    let zeros = [&content[..content.len() / 2], &vec![0; content.len() - content.len() / 2][..]].concat();
    fs::write(&file, zeros).unwrap();
    let outcome = repair(&output.path);
    let line = outcome.error_line(1);
    assert!(line.contains("made again, the shard has the hash"), "{line}");
    unchanged(line);
    fs::write(&file, &content[..content.len() - 4]).unwrap();
    unchanged(repair(&output.path).refusal());
    fs::remove_file(&file).unwrap();
    assert!(repair(&output.path).refusal().contains("model1"));
    fs::write(&file, &content).unwrap();
    // A tokenizer that is not what was copied.
    fs::write(saved.base.join("tokenizer.json"), "{\"other\": 1}").unwrap();
    fs::write(output.path.join("tokenizer.json"), "damaged").unwrap();
    let outcome = repair(&output.path);
    assert!(outcome.error_line(1).contains("tokenizer.json"), "{}", outcome.stderr);
    assert!(fs::read(&shard).unwrap() != b"damaged", "what can be repaired is");
    assert!(!output.path.join(".tiesmith").exists());
}

#[test]
fn repair_waits_for_an_unfinished_merge() {
    let saved = saved(31);
    let output = merged(&saved, &[]);
    fs::create_dir(output.path.join(".tiesmith")).unwrap();
    fs::write(output.path.join(".tiesmith/journal"), "of a replacement").unwrap();
    fs::write(output.path.join("model.safetensors"), "damaged").unwrap();
    let before = read_tree(&output.path);
    assert!(repair(&output.path).refusal().contains("unfinished"));
    assert!(before == read_tree(&output.path));
}
