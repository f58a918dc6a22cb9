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
    assert_eq!((&intact["intact"], &intact["files"]), (&Value::Bool(true), &files.len().into()));
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
