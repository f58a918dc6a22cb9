//! Kills the program for real, at random moments, and runs the same command until it is through.
//!
//! `TIESMITH_KILLS` sets how many kills there are at least (40 unless set).

#![cfg(unix)]

#[path = "it/support/mod.rs"]
#[allow(dead_code, unused_imports)]
mod support;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use support::family::{Family, Saved, Spec, text};
use support::files::{read_checkpoint, read_tree};
use support::oracle::Recipe;
use support::random::Random;
use support::run::{command, run};

/// Large enough for a run to take a while, in a dozen shards.
fn family(elements: usize) -> Family {
    let names = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"];
    let shapes = names.map(|name| (name, vec![elements])).to_vec();
    Spec { shapes, ..Spec::default() }.family()
}

fn merge(saved: &Saved, out: &Path, extra: &[&str]) -> Command {
    let mut merge = command();
    merge.arg("merge").args(saved.inputs(&Recipe::default())).args(["--progress=none", "--json", "--out", &text(out)]);
    merge.args(extra).stdout(Stdio::piped()).stderr(Stdio::piped());
    merge
}

/// Files that do not depend on how a run went: all but the manifest's times.
fn lasting(out: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files: BTreeMap<String, Vec<u8>> =
        read_tree(out).into_iter().map(|(path, data)| (path.to_str().unwrap().to_owned(), data)).collect();
    let manifest = files.get_mut("tiesmith.json").expect("a manifest");
    let mut value: Value = serde_json::from_slice(manifest).unwrap();
    for field in ["out", "wall_seconds", "peak_memory_bytes", "resumed", "chunks_reused", "bytes_read"] {
        value["report"].as_object_mut().unwrap().remove(field);
    }
    value.as_object_mut().unwrap().remove("run");
    *manifest = value.to_string().into_bytes();
    files
}

fn signal(child: &Child, name: &str) {
    // The process may have ended.
    let _ = Command::new("kill").args([name, &child.id().to_string()]).stderr(Stdio::null()).status();
}

/// Inode and modification time of every finished shard.
fn finished_shards(out: &Path) -> BTreeMap<String, (u64, i64, i64)> {
    let entries = fs::read_dir(out).into_iter().flatten().map(Result::unwrap);
    let shards = entries.filter(|entry| entry.file_name().to_str().unwrap().ends_with(".safetensors"));
    shards
        .map(|entry| {
            let metadata = entry.metadata().unwrap();
            let place = (metadata.ino(), metadata.mtime(), metadata.mtime_nsec());
            (entry.file_name().into_string().unwrap(), place)
        })
        .collect()
}

#[test]
fn killed_at_random_moments_the_output_is_the_same() {
    let wanted: u32 = std::env::var("TIESMITH_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(40);
    let saved = family(60_000).save();
    let mut random = Random::new(7);
    let (mut kills, mut resumed, mut reused) = (0, 0, 0);
    let cuts: [&[&str]; 4] = [
        &["--max-shard-size=250KB", "--threads=1"],
        &["--max-shard-size=500KB", "--threads=2", "--scope=tensor", "--trim-ties=lowest"],
        &["--threads=2", "--memory=40MB", "--trim-ties=lowest"],
        &["--max-shard-size=1MB", "--threads=1", "--memory=32MB", "--io=mmap"],
    ];
    for round in 0.. {
        let extra = cuts[round % cuts.len()];
        let clean = saved.path(&format!("clean{round}"));
        let begin = Instant::now();
        assert!(merge(&saved, &clean, extra).status().unwrap().success());
        let whole = begin.elapsed();
        let out = saved.path(&format!("out{round}"));
        loop {
            let finished = finished_shards(&out);
            let mut child = merge(&saved, &out, extra).spawn().unwrap();
            std::thread::sleep(whole.mul_f64(f64::from(random.below(1000) as u32) / 900.0));
            signal(&child, "-KILL");
            let status = child.wait().unwrap();
            // Whatever the moment: what was finished is not written again.
            for (name, place) in finished {
                assert_eq!(finished_shards(&out).get(&name), Some(&place), "{name} was written again");
            }
            if status.signal() == Some(9) {
                kills += 1;
                let index =
                    ["model.safetensors.index.json", "model.safetensors"].iter().any(|name| out.join(name).exists());
                assert!(!index || read_checkpoint(&out) == read_checkpoint(&clean), "looks like a model");
            }
            if out.join("tiesmith.json").exists() && !out.join(".tiesmith").exists() {
                break;
            }
            if random.below(3) == 0 {
                let output = run(merge(&saved, &out, extra));
                if output.code == Some(0) {
                    let report = output.json();
                    resumed += u32::from(report["resumed"] == true);
                    reused += report["chunks_reused"].as_u64().unwrap();
                } else {
                    assert!(output.error_line(2).contains("a finished merge is already there"));
                }
                break;
            }
        }
        assert!(lasting(&out) == lasting(&clean), "round {round}");
        fs::remove_dir_all(&out).unwrap();
        fs::remove_dir_all(&clean).unwrap();
        if kills >= wanted {
            break;
        }
    }
    println!("{kills} kills, {resumed} runs went on, {reused} chunks taken over");
    assert!(resumed > 0, "no run had anything to go on with");
}

#[test]
fn signals_stop_a_run_soon_and_the_same_command_goes_on() {
    let saved = family(400_000).save();
    let clean = saved.path("clean");
    let extra = ["--threads=1", "--scope=tensor", "--max-shard-size=4MB"];
    assert!(merge(&saved, &clean, &extra).status().unwrap().success());
    for (name, code) in [("-INT", 130), ("-TERM", 143), ("-HUP", 129)] {
        let out = saved.path("out");
        let child = merge(&saved, &out, &extra).spawn().unwrap();
        // As soon as the first shard is finished.
        while finished_shards(&out).is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let begin = Instant::now();
        signal(&child, name);
        let output = child.wait_with_output().unwrap();
        assert!(begin.elapsed() < Duration::from_secs(2), "{name}: {:?}", begin.elapsed());
        let stderr = String::from_utf8(output.stderr).unwrap();
        if output.status.success() {
            eprintln!("skipped: the run was over before {name} arrived");
        } else {
            assert_eq!(output.status.code(), Some(code), "{stderr}");
            assert_eq!(stderr.lines().count(), 1, "{stderr}");
            assert!(stderr.starts_with("error: ") && stderr.contains("run the same command again"), "{stderr}");
            let finished = finished_shards(&out);
            let report = run(merge(&saved, &out, &extra)).succeeded().json();
            assert!(report["resumed"] == true && report["chunks_reused"].as_u64() > Some(0), "{report}");
            let after = finished_shards(&out);
            assert!(finished.iter().all(|(name, place)| after[name] == *place), "a finished shard was written again");
        }
        assert!(lasting(&out) == lasting(&clean), "{name}");
        fs::remove_dir_all(&out).unwrap();
    }
}

/// Runs a shell script that has the program and its arguments as `"$@"`.
fn shell(script: &str, merge: &Command) -> ExitStatus {
    let mut shell = Command::new("sh");
    shell.args(["-c", script, "sh"]).arg(merge.get_program()).args(merge.get_args());
    shell.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap()
}

/// The job script of `docs/guide.md`, as it stands there.
fn job_of_the_guide() -> String {
    let guide = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/guide.md")).unwrap();
    let (_, script) = guide.split_once("```sh\n#!/bin/sh\n#SBATCH").expect("a job script");
    format!("#!/bin/sh\n#SBATCH{}", script.split_once("```").unwrap().0)
}

#[test]
fn the_guides_job_gets_through_however_often_it_is_preempted() {
    let saved = family(250_000).save();
    for (name, ckpt) in [("llama", &saved.base), ("chat", &saved.models[0]), ("code", &saved.models[1])] {
        std::os::unix::fs::symlink(ckpt, saved.path(name)).unwrap();
    }
    // What a cluster has: the scheduler's command, and the program in the path.
    let bin = saved.path("bin");
    fs::create_dir(&bin).unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_tiesmith"));
    std::os::unix::fs::symlink(program, bin.join("tiesmith")).unwrap();
    fs::write(bin.join("scontrol"), "#!/bin/sh\necho \"$@\" >> requeued\n").unwrap();
    let script = job_of_the_guide();
    fs::write(saved.path("job.sh"), &script).unwrap();
    let run_in = |limit: &str, more: &str| {
        let mut shell = Command::new("sh");
        let line = format!(
            "chmod +x bin/scontrol; PATH=$PWD/bin:$PATH SLURM_JOB_ID=7; export PATH SLURM_JOB_ID; {limit} {more}"
        );
        shell.current_dir(saved.dir.path()).args(["-c", &line]).stdout(Stdio::null()).stderr(Stdio::null());
        shell.status().unwrap().code()
    };
    let arguments = "tiesmith merge --base llama --model chat --model code --progress none --out";
    assert!(script.contains("tiesmith merge --base llama --model chat --model code --out merged"), "{script}");
    let begin = Instant::now();
    assert_eq!(run_in("", &format!("{arguments} clean")), Some(0));
    let mut slot = begin.elapsed().mul_f64(0.4);
    let mut preempted = 0;
    let code = loop {
        let limit = format!("timeout -s TERM {:.3}", slot.as_secs_f64());
        match run_in(&limit, "sh job.sh") {
            Some(0) => break 0,
            // `timeout` reports 124 where the job ended because of it.
            Some(124 | 143) => preempted += 1,
            other => panic!("{other:?} after {preempted} preemptions"),
        }
        // Attempts that are too short for any progress at all would go on for ever.
        slot = slot.mul_f64(1.1);
        assert!(preempted < 100);
    };
    println!("{preempted} preemptions");
    assert_eq!(code, 0);
    assert!(lasting(&saved.path("merged")) == lasting(&saved.path("clean")));
    assert!(preempted == 0 || fs::read_to_string(saved.path("requeued")).unwrap().contains("requeue 7"));
    assert_eq!(run_in("", "sh job.sh"), Some(0), "what is done stays done");
}

#[test]
fn ignored_signals_stay_ignored() {
    let saved = family(100_000).save();
    let out = saved.path("out");
    let merge = merge(&saved, &out, &["--threads=1"]);
    let status = shell(
        r#"trap "" HUP INT; "$@" & p=$!; while kill -HUP $p && kill -INT $p; do sleep 0.01; done 2>/dev/null; wait $p"#,
        &merge,
    );
    assert!(status.success(), "{status}");
}

#[test]
fn closed_or_full_standard_streams_never_disturb_the_work() {
    let saved = family(1_000).save();
    for (script, code) in [
        (r#""$@" >&-"#, 0),
        (r#""$@" 2>&-"#, 0),
        (r#""$@" >&- 2>&- <&-"#, 0),
        (r#"("$@"; echo $? >&3) 3>&1 | true"#, 0),
        (r#""$@" --progress=plain 2>/dev/full"#, 0),
        (r#""$@" --progress=json 2>&-"#, 0),
        (r#""$@" >/dev/full"#, 1),
    ] {
        let out = saved.path("out");
        let status = shell(script, &merge(&saved, &out, &[]));
        assert_eq!(status.code(), Some(code), "{script}");
        assert!(out.join("tiesmith.json").exists() && !out.join(".tiesmith").exists(), "{script}");
        fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn a_file_size_limit_is_an_error_that_can_be_resumed() {
    let saved = family(60_000).save();
    let (clean, out) = (saved.path("clean"), saved.path("out"));
    assert!(merge(&saved, &clean, &[]).status().unwrap().success());
    // In blocks of 512 bytes or 1 KiB, as shells please.
    let status = shell(r#"ulimit -f 1000; "$@""#, &merge(&saved, &out, &[]));
    assert_eq!(status.code(), Some(1), "{status}");
    run(merge(&saved, &out, &[])).succeeded();
    assert!(lasting(&out) == lasting(&clean));
}

#[test]
#[cfg(target_os = "linux")]
fn an_input_cut_off_during_the_run_is_an_error_that_names_it_however_it_is_read() {
    let original = family(300_000).save();
    let mut random = Random::new(3);
    for round in 0..12 {
        let io = ["--io=mmap", "--io=read"][round % 2];
        let saved = family_of(&original);
        let out = saved.path("out");
        let child =
            merge(&saved, &out, &["--threads=2", "--scope=tensor", "--max-shard-size=2MB", io]).spawn().unwrap();
        while !out.join(".tiesmith/journal").exists() {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(random.below(150) as u64));
        let input = saved.models[0].join("model.safetensors");
        let kept = 1 << (12 + random.below(11));
        fs::File::options().write(true).open(&input).unwrap().set_len(kept).unwrap();
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.signal(), None, "{io}: ended by a signal\n{stderr}");
        if output.status.success() {
            eprintln!("skipped: the run was over before the input was cut off");
        } else {
            assert_eq!(output.status.code(), Some(1), "{stderr}");
            assert!(
                stderr.starts_with("error: ") && stderr.contains("model1") && stderr.lines().count() == 1,
                "{stderr}"
            );
            assert!(!out.join("model.safetensors.index.json").exists(), "looks like a model");
        }
    }
}

/// The same family once more, to be spoiled.
#[cfg(target_os = "linux")]
fn family_of(original: &Saved) -> Saved {
    let dir = tempfile::tempdir().unwrap();
    let place = |path: &Path| {
        let copy = dir.path().join(path.file_name().unwrap());
        support::files::copy_tree(path, &copy);
        copy
    };
    Saved {
        base: place(&original.base),
        models: original.models.iter().map(|model| place(model)).collect(),
        signs: place(&original.signs),
        dir,
    }
}
