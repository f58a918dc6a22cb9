//! Limits that the system sets: files, memory, names. Each is one line, and the same command works without it.

#![cfg(unix)]

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::support::family::{Saved, Spec, text};
use crate::support::run::{Outcome, command, run};

/// Runs `tiesmith ARGS` in a shell after `limits`.
fn limited(limits: &str, args: &[String]) -> Outcome {
    let program = command();
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!(r#"{limits}; exec "$@""#), "sh"]).arg(program.get_program()).args(args);
    run(shell)
}

fn args(saved: &Saved, verb: &str, more: &[&str]) -> Vec<String> {
    let (base, model) = (text(&saved.base), text(&saved.models[0]));
    let inputs = match verb {
        "pack" => vec![model, "--base".into(), base, "--density=0.5".into()],
        "perturb" => {
            let flags = ["--flip-sign=top", "--density=0.2", "--probability=0.5"].map(str::to_owned);
            [vec![model, "--base".into(), base], flags.to_vec()].concat()
        }
        _ => vec!["--base".into(), base, "--model".into(), model, "--model".into(), text(&saved.models[1])],
    };
    [vec![verb.to_owned()], inputs, more.iter().map(|more| (*more).to_owned()).collect()].concat()
}

#[test]
fn a_file_size_limit_is_one_line_whatever_writes() {
    let saved = Spec { shapes: vec![("a", vec![40_000])], ..Spec::default() }.family().save();
    let (out, file) = (text(&saved.path("out")), text(&saved.path("file.tvz")));
    for (verb, more) in [
        ("merge", &["--out", &out][..]),
        ("sweep", &["--out", &out, "--lambda=0.5,1"]),
        ("analyze", &["--out", &out]),
        ("perturb", &["--out", &out]),
        ("pack", &["--out", &file]),
        ("plan", &["--out", &out, "--save", &file]),
    ] {
        let args = args(&saved, verb, more);
        for blocks in [0, 1, 8] {
            let outcome = limited(&format!("ulimit -f {blocks}"), &args);
            if outcome.code == Some(0) {
                assert!(verb == "plan" && blocks > 0, "{verb}: how can {blocks} blocks be enough?");
                continue;
            }
            // With 2, nothing was written.
            let code = outcome.code.unwrap();
            let line = outcome.error_line(code);
            assert!(code == 1 || code == 2 && !Path::new(&out).exists() && !Path::new(&file).exists(), "{line}");
            assert!(line.contains("File too large") && line.contains("ulimit -f"), "{line}");
        }
        if verb != "plan" {
            run(with(&args)).succeeded();
        }
        for left in [&out, &file] {
            let _ = fs::remove_dir_all(left).or_else(|_| fs::remove_file(left));
        }
    }
}

fn with(args: &[String]) -> Command {
    let mut command = command();
    command.args(args);
    command
}

#[test]
#[cfg(target_os = "linux")]
fn memory_that_the_system_does_not_give_is_one_line() {
    let saved = Spec { shapes: vec![("a", vec![3_000_000])], ..Spec::default() }.family().save();
    let out = text(&saved.path("out"));
    let args = args(&saved, "merge", &["--threads=2", "--out", &out]);
    let mut refused = 0;
    // Below, not even the program's libraries can be loaded.
    for kilobytes in [30_000, 40_000, 50_000, 60_000, 80_000, 100_000, 150_000, 200_000] {
        let outcome = limited(&format!("ulimit -v {kilobytes}"), &args);
        if outcome.code != Some(0) {
            let line = outcome.error_line(1);
            assert!(line.contains("memory") || line.contains("thread"), "{kilobytes}: {line}");
            assert!(line.contains("--threads") || line.contains("--memory"), "{kilobytes}: {line}");
            refused += 1;
        }
        let _ = fs::remove_dir_all(&out);
    }
    assert!(refused > 0, "every limit was enough");
    run(with(&args)).succeeded();
}

#[test]
fn names_that_no_file_can_have_are_refused_as_input() {
    let saved = Spec::default().family().save();
    let long = "n".repeat(300);
    let circular = saved.path("circular");
    std::os::unix::fs::symlink(&circular, &circular).unwrap();
    for bad in [&*saved.path(&long), &*circular, &*circular.join("model")] {
        let inputs = args(&saved, "merge", &["--out", &text(&saved.path("out")), "--model", &text(bad)]);
        run(with(&inputs)).refusal();
        let out = args(&saved, "merge", &["--out", &text(bad)]);
        run(with(&out)).refusal();
    }
    let index = format!(r#"{{"weight_map": {{"a": "{long}.safetensors"}}}}"#);
    let sharded = saved.path("sharded");
    fs::create_dir(&sharded).unwrap();
    fs::write(sharded.join("model.safetensors.index.json"), index).unwrap();
    let args = args(&saved, "plan", &["--model", &text(&sharded)]);
    assert!(run(with(&args)).refusal().contains("nnn"));
    assert!(!Path::new(&saved.path("out")).exists());
}
