//! Looks at models on the network: each byte is downloaded once, and what is found is what is found in files.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use safetensors::Dtype;
use serde_json::Value;

use crate::remote::{Remote, content_bytes, hf, kinds};
use crate::spool::{Running, input_bytes, spec, spool_in};
use crate::support::family::{Deltas, text};
use crate::support::files::read_json;

const RUN: [&str; 3] = ["--memory=128MB", "--threads=2", "--densities=0.1,0.4"];

/// All that a report says of the weights: the rest names inputs.
pub fn numbers(out: &Path) -> [Value; 5] {
    let mut report = read_json(&out.join("report.json"));
    ["thresholds", "overall", "layers", "kinds", "tensors"].map(|key| report[key].take())
}

fn remote(seed: u64) -> Remote {
    let bf16 = Dtype::BF16;
    Remote::of(&spec(seed, bf16, &[bf16, Dtype::F32, bf16], Deltas::HeavyTailed))
}

#[test]
fn a_look_downloads_each_byte_once_and_finds_what_files_have() {
    let remote = remote(61);
    let cache = tempfile::tempdir().unwrap();
    let once = input_bytes(&remote);
    for more in [&["--threads=2"][..], &["--threads=1", "--memory=2GiB"], &["--threshold=sketch"]] {
        let mut local = None;
        for (kind, name, of_kind) in kinds(&remote, cache.path()) {
            let dir = tempfile::tempdir().unwrap();
            let out = dir.path().join("report");
            let path = text(&out);
            // What is said last counts.
            let run: Vec<&str> = RUN.into_iter().filter(|run| more.iter().all(|m| run[..9] != m[..9])).collect();
            let of_kind: Vec<&str> = of_kind.iter().map(|flag| &**flag).collect();
            remote.hub.log();
            let outcome = remote.merge("analyze", &name, &[&run[..], more, &of_kind, &["--out", &path]].concat());
            let outcome = outcome.succeeded();
            let read = content_bytes(&remote.hub.log());
            let found = numbers(&out);
            assert_eq!(*local.get_or_insert_with(|| found.clone()), found, "{kind}: {}", outcome.command);
            assert!(spool_in(&out.join(".tiesmith")).is_none() && !out.join(".tiesmith").exists());
            // A sample, and what opening files brings, come on top.
            match kind {
                "files" => assert_eq!(read, 0),
                "the Hub without a spool" => {
                    assert!(read > once * 3 / 2, "{kind}: {read} bytes, {once} once: {}", outcome.command);
                    assert!(outcome.stderr.contains("are downloaded twice"), "{}", outcome.stderr);
                }
                _ => assert!(read < once + once / 4, "{kind}: {read} bytes, {once} once: {}", outcome.command),
            }
            let says = outcome.stderr.contains("are kept on the disk until the end (--spool DIR says where)");
            assert_eq!(says, ["the Hub", "a web server"].contains(&kind), "{kind}: {}", outcome.stderr);
            if let (Some(peak), "--threads=2") = (outcome.json()["peak_memory_bytes"].as_u64(), more[0]) {
                assert!(peak <= 128_000_000, "{kind}: {peak} bytes resident: {}", outcome.command);
            }
        }
    }
}

#[test]
fn a_look_that_is_killed_goes_on_with_what_it_downloaded() {
    let remote = remote(62);
    let once = input_bytes(&remote);
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    remote.merge("analyze", &hf, &[&RUN[..], &["--out", &text(&whole)]].concat()).succeeded();
    let spools = dir.path().join("spools");
    std::fs::create_dir(&spools).unwrap();
    let elsewhere = text(&spools);
    // Killed when so much is kept; then the spool is used, is damaged, or is gone.
    let ends = [(once / 4, ""), (once / 2, "damaged"), (once / 3, "gone"), (once / 2, "elsewhere")];
    for (turn, (bytes, what)) in ends.into_iter().enumerate() {
        let out = dir.path().join(format!("out{turn}"));
        let path = text(&out);
        let place: &[&str] = if what == "elsewhere" { &["--spool", &elsewhere] } else { &[] };
        let at = if what == "elsewhere" { spools.clone() } else { out.join(".tiesmith") };
        let args = [&RUN[..], place, &["--out", &path]].concat();
        remote.hub.slow_down(Duration::from_millis(30));
        let mut command = remote.command();
        command.args(["analyze", "--progress=none", "--base", &hf("base")]).args(&args);
        for model in ["model1", "model2", "model3"] {
            command.args(["--model", &hf(model)]);
        }
        let mut running = Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        let begin = Instant::now();
        while spool_in(&at).is_none_or(|(_, there)| there < bytes) && running.0.try_wait().unwrap().is_none() {
            assert!(begin.elapsed() < Duration::from_secs(60), "no spool in {}", at.display());
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(running);
        remote.hub.slow_down(Duration::ZERO);
        let left = spool_in(&at);
        match (what, &left) {
            ("damaged", Some((path, _))) => {
                let mut content = std::fs::read(path).unwrap();
                let middle = content.len() / 2;
                content[middle] ^= 0x40;
                std::fs::write(path, content).unwrap();
            }
            ("gone", Some((path, _))) => std::fs::remove_file(path).unwrap(),
            _ => {}
        }
        while !remote.hub.log().is_empty() {
            std::thread::sleep(Duration::from_millis(200));
        }
        // It may have been over.
        remote
            .merge("analyze", &hf, &[&args[..], if left.is_none() { &["--force"] } else { &[] }].concat())
            .succeeded();
        let read = content_bytes(&remote.hub.log());
        assert_eq!(numbers(&out), numbers(&whole), "{what:?} {turn}");
        assert!(!out.join(".tiesmith").exists() && spool_in(&spools).is_none(), "{what:?}: nothing is left");
        if let (Some((_, kept)), "" | "elsewhere") = (left, what) {
            assert!(read + kept / 2 < once + once / 4, "{what:?}: {read} bytes again, {kept} kept of {once}");
        }
    }
}

#[test]
#[cfg(unix)]
fn what_the_disk_has_no_room_for_is_downloaded_again() {
    let remote = remote(63);
    let once = input_bytes(&remote);
    let dir = tempfile::tempdir().unwrap();
    let (whole, out) = (dir.path().join("whole"), dir.path().join("out"));
    remote.hub.log();
    remote.merge("analyze", &hf, &[&RUN[..], &["--spool=none", "--out", &text(&whole)]].concat()).succeeded();
    let without = content_bytes(&remote.hub.log());
    let program = remote.command();
    let mut shell = std::process::Command::new("sh");
    for (name, value) in program.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    shell.args(["-c", r#"ulimit -f 8000; exec "$@""#, "sh"]).arg(program.get_program());
    shell.args(["analyze", "--json", "--progress=none", "--base", &hf("base")]).args(RUN).args(["--out", &text(&out)]);
    for model in ["model1", "model2", "model3"] {
        shell.args(["--model", &hf(model)]);
    }
    remote.hub.log();
    let outcome = crate::support::run::run(shell).succeeded();
    let read = content_bytes(&remote.hub.log());
    assert_eq!(numbers(&out), numbers(&whole));
    assert!(outcome.stderr.contains("the rest is downloaded twice"), "{}", outcome.stderr);
    assert!(read > once + once / 2 && read < without, "{read} bytes, {once} once, {without} without a spool");
    assert!(!out.join(".tiesmith").exists());
}
