//! What a user is told where something odd is in the place of a file: what it is, and what to do. And which exit code says that
//! the same command may work the next time.

#![cfg(unix)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use safetensors::Dtype;

use crate::support::adapters::Adapter;
use crate::support::family::{Saved, Spec, text};
use crate::support::files::{Layout, write_checkpoint};
use crate::support::oracle::Recipe;
use crate::support::random::Random;
use crate::support::run::{Outcome, command, run, tiesmith};

fn fifo(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

fn merge(saved: &Saved) -> Outcome {
    saved.run("merge", &Recipe::default(), &["--progress=none", "--out", &text(&saved.path("out"))])
}

#[test]
fn what_another_run_holds_may_be_free_the_next_time() {
    let saved = Spec::default().family().save();
    fs::create_dir_all(saved.path("out/.tiesmith")).unwrap();
    let held = fs::File::create(saved.path("out/.tiesmith/lock")).unwrap();
    held.lock().unwrap();
    assert!(merge(&saved).error_line(1).contains("in use by another process; wait until it ends"));
    drop(held);
    merge(&saved).succeeded();
}

#[test]
fn side_files_that_cannot_be_copied_are_named() {
    let saved = Spec::default().family().save();
    let file = saved.base.join("tokenizer.json");
    type Make = fn(&Path);
    let kinds: [(Make, &str); 4] = [
        (|path| symlink("/nonexistent/file", path).unwrap(), "a link to a file that is not there"),
        (|path| fs::create_dir(path).unwrap(), "a directory, not a file; it belongs in the output too"),
        (fifo, "not a regular file; it belongs in the output too"),
        (|path| symlink("/dev/null", path).unwrap(), "not a regular file; it belongs in the output too"),
    ];
    for (make, words) in kinds {
        make(&file);
        let outcome = merge(&saved);
        let line = outcome.refusal();
        assert!(line.contains("base/tokenizer.json") && line.contains(words), "{line}");
        assert_eq!(saved.run("plan", &Recipe::default(), &[]).refusal(), line);
        assert!(!saved.path("out").exists());
        fs::remove_file(&file).or_else(|_| fs::remove_dir(&file)).unwrap();
    }
    merge(&saved).succeeded();
}

#[test]
fn a_hub_cache_with_a_file_gone_says_how_to_complete_it() {
    let saved = Spec::default().family().save();
    let snapshot = saved.path("hub/models--org--name/snapshots/0123");
    fs::create_dir_all(snapshot.parent().unwrap()).unwrap();
    fs::rename(&saved.models[0], &snapshot).unwrap();
    let plan = || {
        let mut plan = command();
        plan.args(["plan", "--base", &text(&saved.base), "--model", "org/name"]);
        plan.env("HF_HUB_CACHE", saved.path("hub"));
        run(plan)
    };
    plan().succeeded();
    let weights = snapshot.join("model.safetensors");
    fs::remove_file(&weights).unwrap();
    symlink("../../blobs/gone", &weights).unwrap();
    for sharded in [false, true] {
        if sharded {
            fs::write(snapshot.join("model.safetensors.index.json"), r#"{"weight_map": {"a": "model.safetensors"}}"#)
                .unwrap();
        }
        let outcome = plan();
        let line = outcome.refusal();
        assert!(line.contains("model.safetensors: a link to a file that is not there"), "{line}");
        assert!(line.contains("`hf download org/name --revision 0123`"), "{line}");
    }
}

#[test]
fn what_is_in_the_place_of_work_files_is_named() {
    let saved = Spec::default().family().save();
    let out = saved.path("out");
    type Make = fn(&Path);
    let places: [(Make, i32, &[&str]); 6] = [
        (
            |out| fs::create_dir_all(out.join(".tiesmith/journal")).unwrap(),
            2,
            &["/journal: a directory", "belongs there: remove"],
        ),
        (
            |out| {
                fs::create_dir_all(out.join(".tiesmith")).unwrap();
                fifo(&out.join(".tiesmith/journal"));
            },
            2,
            &["/journal: not a regular file", "belongs there: remove"],
        ),
        (
            |out| fs::create_dir_all(out.join(".tiesmith/lock")).unwrap(),
            2,
            &["/lock: a directory, where this program keeps"],
        ),
        (
            |out| fs::create_dir_all(out.join(".tiesmith/model.safetensors.partial/x")).unwrap(),
            1,
            &[".partial: a directory, where this program keeps", "remove it"],
        ),
        (
            |out| {
                fs::create_dir_all(out).unwrap();
                fs::write(out.join(".tiesmith"), "mine").unwrap();
            },
            2,
            &[".tiesmith: no directory, where a run keeps its work; remove it"],
        ),
        (
            |out| {
                fs::create_dir_all(out.join(".tiesmith")).unwrap();
                fs::write(out.join(".tiesmith/model-00002-of-00002.safetensors.partial"), "").unwrap();
                fs::write(out.join("model-00001-of-00002.safetensors"), "").unwrap();
            },
            2,
            &["it has 1 shards and 1 unfinished files of a merge", "nor the journal", "remove them to start over"],
        ),
    ];
    for (make, code, words) in places {
        make(&out);
        let outcome = merge(&saved);
        let line = outcome.error_line(code);
        for words in words {
            assert!(line.contains(words), "{words}: {line}");
        }
        fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn other_files_of_this_program_are_no_recipes() {
    let saved = Spec::default().family().save();
    let (job, out, again) = (text(&saved.path("job.plan")), text(&saved.path("out")), text(&saved.path("again")));
    saved.run("plan", &Recipe::default(), &["--out", &out, "--save", &job]).succeeded();
    for verb in [&["merge", &job, "--out", &out][..], &["plan", &job], &["analyze", &job, "--out", &out]] {
        let outcome = tiesmith(verb);
        let line = outcome.refusal();
        assert!(line.contains("job.plan: a plan made by") && line.contains("'tiesmith run'"), "{line}");
    }
    merge(&saved).succeeded();
    let manifest = saved.path("out/tiesmith.json");
    let whole = fs::read(&manifest).unwrap();
    for bytes in [100, whole.len() / 2, whole.len() - 3] {
        fs::write(&manifest, &whole[..bytes]).unwrap();
        let outcome = tiesmith(["merge", &text(&manifest), "--out", &again]);
        let line = outcome.refusal();
        assert!(line.contains("tiesmith.json: a manifest that is cut off or damaged"), "{line}");
    }
    let content = fs::read_to_string(&job).unwrap();
    fs::write(&job, &content[..content.len() / 2]).unwrap();
    let outcome = tiesmith(["merge", &job, "--out", &again]);
    assert!(outcome.refusal().contains("that is cut off or damaged"), "{}", outcome.stderr);
}

/// Runs `merge` with files that may not become longer than a block, so that it ends behind its first record.
fn begun(merge: &Command) {
    let mut shell = Command::new("sh");
    shell.args(["-c", r#"ulimit -f 8; exec "$@""#, "sh"]).arg(merge.get_program()).args(merge.get_args());
    run(shell).exited(1);
}

#[test]
fn what_says_how_tensors_are_computed_is_named_if_it_changes() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let mut random = Random::new(4);
    let lora = Adapter::lora(2, 4.0).with(&mut random, "w", (100, 100), Dtype::F32);
    lora.write(&path("lora"));
    let weights: Vec<f32> = (0..10_000).map(|_| random.symmetric()).collect();
    let model = [("w.weight".to_owned(), crate::support::tensor::Tensor::floats(Dtype::F32, &[100, 100], &weights))];
    write_checkpoint(&path("base"), &model.into(), Layout::SINGLE);
    let mut merge = command();
    let model = format!("{}+{}", text(&path("base")), text(&path("lora")));
    merge.args(["merge", "--base", &text(&path("base")), "--model", &model, "--out", &text(&path("out"))]);
    merge.args(["--progress=none"]);
    begun(&merge);
    let config = path("lora/adapter_config.json");
    let changed = fs::read_to_string(&config).unwrap().replace("4.0", "8.0");
    fs::write(&config, changed).unwrap();
    let outcome = run(merge);
    assert!(outcome.refusal().contains(&format!("{} was changed", text(&config))), "{}", outcome.stderr);
}
