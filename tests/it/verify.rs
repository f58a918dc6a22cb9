//! `tiesmith verify`: damage is found and named, and nothing else is.

use std::fs;

use serde_json::Value;

use crate::support::family::{Spec, text};
use crate::support::files::read_tree;
use crate::support::oracle::Recipe;
use crate::support::run::{Outcome, tiesmith};

#[test]
fn every_kind_of_damage_to_every_file_is_named() {
    let saved = Spec::default().family().save();
    fs::write(saved.base.join("tokenizer.json"), "{}").unwrap();
    let output = saved.merge(&Recipe::default(), &["--max-shard-size=700B"]);
    let verify = |flags: &[&str]| -> Outcome { tiesmith([&["verify", &text(&output.path)], flags].concat()) };
    let intact = verify(&["--json"]).succeeded().json();
    let files: Vec<_> = read_tree(&output.path).into_keys().filter(|path| !path.ends_with("tiesmith.json")).collect();
    assert!(files.len() >= 6, "{files:?}");
    // With the manifest.
    assert_eq!((&intact["intact"], &intact["files"]), (&Value::Bool(true), &(files.len() + 1).into()));
    for file in &files {
        let (path, name) = (output.path.join(file), file.to_str().unwrap());
        let content = fs::read(&path).unwrap();
        let mut flipped = content.clone();
        *flipped.last_mut().unwrap() ^= 1;
        for (damaged, kind) in [(Some(&flipped[..]), "content"), (Some(&content[1..]), "length"), (None, "missing")] {
            match damaged {
                Some(damaged) => fs::write(&path, damaged).unwrap(),
                None => fs::remove_file(&path).unwrap(),
            }
            let report = verify(&["--json"]).exited(1).json();
            let found = report["damaged"].as_array().unwrap();
            assert_eq!(found.len(), 1, "{name} {kind}: {report}");
            assert_eq!((found[0]["name"].as_str(), found[0]["damage"]["kind"].as_str()), (Some(name), Some(kind)));
            assert!(verify(&[]).exited(1).stdout.contains(name));
            fs::write(&path, &content).unwrap();
        }
    }
    verify(&[]).succeeded();
    // What a user adds is not the program's business.
    fs::write(output.path.join("notes.txt"), "mine").unwrap();
    assert!(verify(&[]).succeeded().stdout.starts_with("intact: "));
}

#[test]
fn a_manifest_that_was_changed_is_damage_too() {
    let saved = Spec::default().family().save();
    let output = saved.merge(&Recipe::default(), &["--max-shard-size=700B"]);
    let path = output.path.join("tiesmith.json");
    let good = fs::read(&path).unwrap();
    let verify = |flags: &[&str]| tiesmith([&["verify", "--progress=none", &text(&output.path)], flags].concat());
    let edited = |change: &dyn Fn(&mut Value)| {
        let mut value: Value = serde_json::from_slice(&good).unwrap();
        change(&mut value);
        format!("{value:#}\n").into_bytes()
    };
    // What is listed of the other files is right in all of these.
    let changes = [
        edited(&|m| drop(m["shards"].as_array_mut().unwrap().pop())),
        edited(&|m| m["shards"] = Value::Array(Vec::new())),
        edited(&|m| m["recipe"]["seed"] = 7.into()),
        edited(&|m| drop(m["run"].as_object_mut().unwrap().remove("manifest_blake3"))),
        good[..good.len() - 1].to_vec(),
        [&good[..], b"\n"].concat(),
    ];
    for (number, content) in changes.iter().enumerate() {
        fs::write(&path, content).unwrap();
        let report = verify(&["--json"]).exited(1).json();
        assert_eq!(report["damaged"][0]["name"], "tiesmith.json", "{number}");
        assert!(verify(&[]).exited(1).stdout.contains("--force"), "{number}");
        let line = verify(&["--repair"]).error_line(1).to_owned();
        assert!(line.contains("tiesmith.json") && line.contains("--force"), "{number}: {line}");
    }
    for (place, bit) in (0..good.len()).step_by(97).zip((0..8).cycle()) {
        let mut content = good.clone();
        content[place] ^= 1 << bit;
        fs::write(&path, &content).unwrap();
        assert_ne!(verify(&[]).code, Some(0), "bit {bit} of byte {place}");
    }
    fs::write(&path, &good).unwrap();
    verify(&[]).succeeded();
    let sealed = good.split_inclusive(|&byte| byte == b'\n').rev().skip(3).map(<[u8]>::len).sum();
    let hash = blake3::hash(&good[..sealed]).to_hex();
    assert_eq!(serde_json::from_slice::<Value>(&good).unwrap()["run"]["manifest_blake3"], *hash);
}

#[test]
fn what_is_no_finished_output_is_refused() {
    let saved = Spec::default().family().save();
    let verify = |path: &std::path::Path| tiesmith(["verify", &text(path)]);
    assert!(verify(&saved.base).refusal().contains("not a finished output"));
    assert!(verify(&saved.path("nowhere")).refusal().contains("nowhere"));
    let output = saved.merge(&Recipe::default(), &[]);
    let manifest = output.path.join("tiesmith.json");
    let good: Value = serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
    let mut outside = good.clone();
    outside["shards"][0]["name"] = "../base/model.safetensors".into();
    let mut endless = good.clone();
    endless["shards"][0]["bytes"] = u64::MAX.into();
    endless["side_files"][0]["bytes"] = u64::MAX.into();
    for broken in [outside.to_string(), endless.to_string(), "[]".into(), "{\"shards\": []}".into(), "no JSON".into()] {
        fs::write(&manifest, broken).unwrap();
        assert!(verify(&output.path).refusal().contains("the manifest is damaged"));
    }
}
