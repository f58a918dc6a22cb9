//! Verbs, help, reports and exit codes.

use std::fs;

use safetensors::Dtype;
use serde_json::Value;

use crate::support::family::{Family, Spec, text};
use crate::support::files::{Layout, read_checkpoint, read_tree, write_checkpoint, write_raw};
use crate::support::oracle::{Method, Recipe};
use crate::support::run::tiesmith;
use crate::support::tensor::{Tensor, Tensors, tensors};

#[test]
fn every_verb_explains_itself() {
    for verb in ["merge", "plan", "inspect", "diff", "verify", "methods", "completions", "man"] {
        let help = tiesmith([verb, "--help"]).succeeded();
        assert!(help.stdout.contains("Usage"), "{verb}\n{}", help.stdout);
        assert_eq!(help.stderr, "", "{verb}");
        let listed = tiesmith(["--help"]).succeeded();
        assert!(listed.stdout.contains(verb), "--help does not list {verb}");
    }
}

#[test]
fn help_for_merge_names_every_option() {
    let help = tiesmith(["merge", "--help"]).succeeded().stdout;
    for flag in [
        "base",
        "model",
        "out",
        "method",
        "density",
        "lambda",
        "scope",
        "threshold",
        "trim-ties",
        "elect",
        "combine",
        "zero-sum",
        "sign-from",
        "seed",
        "dtype",
        "include",
        "exclude",
        "max-shard-size",
        "memory",
        "threads",
        "io",
        "non-finite",
        "missing",
        "restart",
        "force",
        "progress",
        "json",
    ] {
        assert!(help.contains(&format!("--{flag}")), "--{flag} is not explained");
    }
}

#[test]
fn the_version_is_the_packages() {
    let version = tiesmith(["--version"]).succeeded().stdout;
    assert_eq!(version.trim(), concat!("tiesmith ", env!("CARGO_PKG_VERSION")));
}

#[test]
fn methods_are_listed_with_their_parameters() {
    let listed = tiesmith(["methods"]).succeeded().stdout;
    for word in ["ties", "task_arithmetic", "linear", "density", "lambda", "weight", "0.2", "2306.01708"] {
        assert!(listed.contains(word), "{word} is missing in\n{listed}");
    }
}

#[test]
fn files_for_packagers() {
    for shell in ["bash", "zsh", "fish"] {
        let script = tiesmith(["completions", shell]).succeeded().stdout;
        assert!(script.contains("tiesmith") && script.contains("trim-ties"), "{shell}");
    }
    let page = tiesmith(["man"]).succeeded().stdout;
    assert!(page.contains(".TH") && page.contains("merge"), "{page}");
}

// ---- plan ----------------------------------------------------------------------------------------------------------

#[test]
fn a_plan_reads_well_and_writes_nothing() {
    let saved = Spec::default().family().save();
    let before = read_tree(saved.dir.path());
    let plan = saved.run("plan", &Recipe::default(), &[]).succeeded();
    let lower = plan.stdout.to_lowercase();
    for word in ["ties", "memory", "read", "model1", "model.safetensors"] {
        assert!(lower.contains(word), "{word} is missing in\n{}", plan.stdout);
    }
    assert!(before == read_tree(saved.dir.path()), "plan wrote something");
}

/// A number that a report must have.
#[track_caller]
fn number(report: &Value, field: &str) -> f64 {
    report[field].as_f64().unwrap_or_else(|| panic!("{field} is not a number in {report:#}"))
}

#[test]
fn a_plan_in_json_adds_up() {
    let family = Spec::default().family();
    let saved = family.save();
    let bytes = |tensors: &Tensors| tensors.values().map(|tensor| tensor.bytes.len()).sum::<usize>() as f64;
    let inputs = bytes(&family.base) + family.models.iter().map(bytes).sum::<f64>();
    for (flags, least_reads, most_reads) in [
        (&["--scope=tensor"][..], 1.0, 1.0),
        // Twice and a probe, which on tensors as small as these is the whole.
        (&["--scope=model"], 1.0, 3.1),
        (&["--method=linear"], 0.5, 1.0),
        (&["--method=task_arithmetic"], 1.0, 1.0),
    ] {
        let plan =
            saved.run("plan", &Recipe::default(), &[flags, &["--json", "--memory=1GiB"]].concat()).succeeded().json();
        let passes = plan["passes"].as_array().expect("passes");
        let read: f64 = passes.iter().map(|pass| number(pass, "bytes_read")).sum();
        let written: f64 = passes.iter().map(|pass| number(pass, "bytes_written")).sum();
        assert_eq!(read, number(&plan, "bytes_read"), "{flags:?}");
        assert_eq!(written, number(&plan, "bytes_written"), "{flags:?}");
        assert!(least_reads * inputs <= read && read <= most_reads * inputs, "{flags:?}: {read} of {inputs}");
        assert!(written >= bytes(&family.base), "{flags:?}");
        assert!(number(&plan, "memory_bytes") <= number(&plan, "memory_limit_bytes"), "{flags:?}");
        assert_eq!(number(&plan, "memory_limit_bytes"), f64::from(1 << 30));
        assert!(plan["shards"].as_array().is_some_and(|shards| shards.len() == 1), "{flags:?}");
    }
}

#[test]
fn a_tensor_of_two_billion_elements_fits_a_small_budget() {
    let dir = tempfile::tempdir().unwrap();
    let elements = 2_000_000_000u64;
    let header = format!(r#"{{"w":{{"dtype":"BF16","shape":[{elements}],"data_offsets":[0,{}]}}}}"#, 2 * elements);
    let mut args = vec!["plan".to_owned(), "--memory=256MB".into(), "--json".into()];
    for (flag, name) in [("--base", "b.safetensors"), ("--model", "m1.safetensors"), ("--model", "m2.safetensors")] {
        let path = dir.path().join(name);
        write_raw(&path, &header, &[]);
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_len(8 + header.len() as u64 + 2 * elements).unwrap();
        args.extend([flag.to_owned(), text(&path)]);
    }
    for scope in ["--scope=model", "--scope=tensor"] {
        let plan = tiesmith(args.iter().map(String::as_str).chain([scope])).succeeded().json();
        assert!(number(&plan, "memory_bytes") <= 256e6, "{plan:#}");
        // Even per tensor the threshold must be known before the merge, and this tensor cannot wait in memory.
        let inputs = 3.0 * 2.0 * elements as f64;
        assert!(number(&plan, "bytes_read") <= 2.05 * inputs, "{plan:#}");
    }
}

// ---- inspect and diff ----------------------------------------------------------------------------------------------

#[test]
fn inspect_says_what_is_in_a_checkpoint() {
    let family = Spec { base: Dtype::BF16, ..Spec::default() }.family();
    let saved = family.save();
    let base = text(&saved.base);
    let summary = tiesmith(["inspect", &base]).succeeded().stdout;
    assert!(summary.contains("BF16") || summary.contains("bfloat16"), "{summary}");
    assert!(summary.contains(&family.base.len().to_string()), "{summary}");
    for flags in [&["--tensors"][..], &["--tensors", "--stats"]] {
        let listed = tiesmith([&["inspect", base.as_str()], flags].concat()).succeeded().stdout;
        for name in family.base.keys() {
            assert!(listed.contains(name.as_str()), "{name} is missing in\n{listed}");
        }
    }
}

#[test]
fn inspect_counts_all_values_by_octave() {
    let values = [0.0f32, -0.0, 1.0, -1.5, 1.999, 2.0, f32::NAN, f32::INFINITY, f32::from_bits(1), -0.25, 3e38];
    let held = tensors([("a", Tensor::vector(&values)), ("b", Tensor::vector(&[0.25, 0.3, 0.5]))]);
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &held, Layout::SINGLE);
    let report = tiesmith(["inspect", "--stats", "--json", &text(dir.path())]).succeeded().json();
    let octave = |exponent: i32, count: u64| serde_json::json!({"from": 2f64.powi(exponent), "count": count});
    let expected = [octave(-149, 1), octave(-2, 3), octave(-1, 1), octave(0, 3), octave(1, 1), octave(127, 1)];
    assert_eq!(report["magnitudes"], serde_json::json!(expected));
    let shown = tiesmith(["inspect", "--stats", &text(dir.path())]).succeeded().stdout;
    let (_, histogram) = shown.split_once("\nMagnitudes of all float values\n").unwrap();
    assert_eq!(histogram.lines().count(), 1 + expected.len(), "{histogram}");
    assert!(histogram.lines().any(|line| line.contains("1 to 2  25.0 %  ██")), "{histogram}");
    let plain = tiesmith(["inspect", "--json", &text(dir.path())]).succeeded().json();
    assert!(plain.get("magnitudes").is_none());
}

#[test]
fn diff_compares_tensor_by_tensor() {
    let base = tensors([("same", Tensor::vector(&[1.0, 2.0])), ("changed.bias", Tensor::vector(&[1.0, -3.0]))]);
    let with = |name: &str, tensor: Tensor| {
        let mut changed = base.clone();
        changed.insert(name.into(), tensor);
        changed
    };
    let next = f32::from_bits(1.0f32.to_bits() + 3);
    let mut lacking = base.clone();
    lacking.remove("changed.bias");
    // What the other side is, the flags, and the exit code with the tensor that is then named.
    let cases: Vec<(&str, Tensors, &[&str], i32, &str)> = vec![
        ("the same", base.clone(), &[], 0, ""),
        ("a value", with("changed.bias", Tensor::vector(&[1.5, -3.0])), &[], 1, "changed.bias"),
        ("a value within atol", with("changed.bias", Tensor::vector(&[1.5, -3.0])), &["--atol=0.5"], 0, ""),
        ("a value beyond atol", with("changed.bias", Tensor::vector(&[1.5, -3.0])), &["--atol=0.4"], 1, "changed.bias"),
        ("three ulps", with("changed.bias", Tensor::vector(&[next, -3.0])), &["--max-ulp=3"], 0, ""),
        (
            "three ulps, two allowed",
            with("changed.bias", Tensor::vector(&[next, -3.0])),
            &["--max-ulp=2"],
            1,
            "changed.bias",
        ),
        ("another shape", with("changed.bias", Tensor::vector(&[1.0])), &[], 1, "changed.bias"),
        ("a tensor less", lacking, &[], 1, "changed.bias"),
        ("a tensor more", with("new.weight", Tensor::vector(&[1.0])), &[], 1, "new.weight"),
    ];
    for (what, other, flags, code, named) in cases {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        // Layouts differ: they are not what is compared.
        write_checkpoint(&a, &base, Layout::SINGLE);
        write_checkpoint(&b, &other, Layout::sharded(2, 3));
        for (left, right) in [(&a, &b), (&b, &a)] {
            let outcome = tiesmith([&["diff", &text(left), &text(right)], flags].concat());
            assert_eq!(outcome.code, Some(code), "{what}\n{}{}", outcome.stdout, outcome.stderr);
            assert!(outcome.stdout.contains(named), "{what}: {named} is not named in\n{}", outcome.stdout);
        }
    }
}

// ---- merge ---------------------------------------------------------------------------------------------------------

#[test]
fn the_report_has_every_field() {
    let family = Spec::default().family();
    let saved = family.save();
    for method in Method::ALL {
        let output = saved.merge(&Recipe { method: *method, ..Recipe::default() }, &[]);
        let report = &output.report;
        let elements: usize = family.base.values().map(Tensor::elements).sum();
        let shard = fs::metadata(output.path.join("model.safetensors")).unwrap().len();
        assert_eq!(number(report, "tensors"), family.base.len() as f64);
        assert_eq!(number(report, "elements"), elements as f64);
        let written = number(report, "bytes_written");
        assert!(4.0 * elements as f64 <= written && written <= shard as f64, "{written}");
        assert!(number(report, "bytes_read") > 0.0);
        assert!(number(report, "wall_seconds") >= 0.0);
        assert!(number(report, "peak_memory_bytes") > 0.0);
        assert_eq!(number(report, "chunks_reused"), 0.0);
        assert_eq!(report["resumed"], false);
        assert!(report["warnings"].is_array());
        assert_eq!(report["out"], text(&output.path));
        if *method == Method::Ties {
            assert_eq!(report["kept_fraction"].as_array().map(Vec::len), Some(3));
            assert!((0.0..=1.0).contains(&number(report, "sign_conflict_fraction")));
        }
    }
}

#[test]
fn tensor_scope_reads_every_byte_once() {
    let family = Spec::default().family();
    let output = family.save().merge(&Recipe::default(), &["--scope=tensor"]);
    let bytes = |tensors: &Tensors| tensors.values().map(|tensor| tensor.bytes.len()).sum::<usize>();
    let inputs = bytes(&family.base) + family.models.iter().map(bytes).sum::<usize>();
    assert_eq!(number(&output.report, "bytes_read"), inputs as f64);
}

#[test]
fn a_merge_reads_what_its_plan_says() {
    let shapes = vec![("a", vec![300, 200]), ("b", vec![30_000]), ("c", vec![7])];
    let saved = Spec { shapes, ..Spec::default() }.family().save();
    let smallest = |flags: &[&str]| {
        let refused = saved.run("plan", &Recipe::default(), &[flags, &["--memory=1MB"]].concat()).exited(2);
        let number = refused.refusal().split("at least ").nth(1).and_then(|rest| rest.split(' ').next());
        format!("--memory={}", number.expect("the smallest memory"))
    };
    let settled = ["--density=0", "--density=1"];
    let signs = saved.signs_flag();
    let choices: [&[&str]; 8] = [
        &[],
        &[settled[0]],
        &[settled[1]],
        &["--threshold=sketch"],
        &["--zero-sum=majority"],
        &["--zero-sum=majority", &signs],
        &["--zero-sum=majority", settled[1]],
        &["--trim-ties=lowest", &signs],
    ];
    for scope in ["--scope=tensor", "--scope=model"] {
        for choice in choices {
            let flags = [&[scope, "--threads=1"], choice].concat();
            for memory in ["--memory=1GiB", &smallest(&flags)] {
                let flags = [&flags[..], &[memory]].concat();
                let plan =
                    saved.run("plan", &Recipe::default(), &[&flags[..], &["--json"]].concat()).succeeded().json();
                let output = saved.merge(&Recipe::default(), &flags);
                assert_eq!(
                    number(&plan, "bytes_read"),
                    number(&output.report, "bytes_read"),
                    "{flags:?} {}",
                    output.outcome.stderr
                );
            }
        }
    }
}

#[test]
fn a_finished_output_is_replaced_only_by_force() {
    let family = Spec::default().family();
    let saved = family.save();
    let out = text(&saved.path("out"));
    let sharded = ["--out", &out, "--max-shard-size=400B"];
    saved.run("merge", &Recipe::default(), &sharded).succeeded();
    let first = read_tree(&saved.path("out"));

    let other = Recipe { density: 0.9, ..Recipe::default() };
    saved.run("merge", &other, &["--out", &out]).refusal();
    assert!(first == read_tree(&saved.path("out")), "a refused run changed the output");

    saved.run("merge", &other, &["--out", &out, "--force"]).succeeded();
    assert!(read_checkpoint(&saved.path("out")) == family.expected(&other).tensors);
    let shards =
        read_tree(&saved.path("out")).keys().filter(|p| p.extension().is_some_and(|e| e == "safetensors")).count();
    assert_eq!(shards, 1, "shards of the replaced output are left");
    assert!(!saved.path("out/model.safetensors.index.json").exists(), "the replaced output's index is left");
}

#[test]
fn an_empty_directory_is_a_fine_place_for_output() {
    let family = Spec::default().family();
    let saved = family.save();
    fs::create_dir(saved.path("out")).unwrap();
    saved.run("merge", &Recipe::default(), &["--out", &text(&saved.path("out"))]).succeeded();
    saved.run("merge", &Recipe::default(), &["--out", &text(&saved.path("a/b/c"))]).succeeded();
    assert!(read_checkpoint(&saved.path("out")) == read_checkpoint(&saved.path("a/b/c")));
}

#[test]
fn piped_output_has_no_escape_codes() {
    let saved = Spec::default().family().save();
    let place = |name: &str| text(&saved.path(name));
    let mut outcomes = vec![
        saved.run("plan", &Recipe::default(), &[]),
        saved.run("merge", &Recipe::default(), &["--out", &place("default")]),
        saved.run("merge", &Recipe::default(), &["--out", &place("plain"), "--progress=plain"]),
        saved.run("merge", &Recipe::default(), &["--out", &place("none"), "--progress=none"]),
        saved.run("merge", &Recipe::default(), &["--out", &place("json"), "--progress=json"]),
        tiesmith(["inspect", "--tensors", &text(&saved.base)]),
        tiesmith(["methods"]),
        tiesmith(["--help"]),
    ];
    for outcome in &outcomes {
        assert_eq!(outcome.code, Some(0), "{}\n{}", outcome.command, outcome.stderr);
    }
    outcomes.push(tiesmith(["merge", "--density=9"]));
    for outcome in outcomes {
        let printed = outcome.stdout + &outcome.stderr;
        assert!(!printed.contains(['\u{1b}', '\r']), "{}\n{printed:?}", outcome.command);
    }
}

#[test]
fn progress_in_json_is_one_object_a_line() {
    let saved = Spec::default().family().save();
    let outcome = saved.run("merge", &Recipe::default(), &["--out", &text(&saved.path("out")), "--progress=json"]);
    let outcome = outcome.succeeded();
    for line in outcome.stderr.lines().filter(|line| !line.starts_with("warning: ")) {
        let value: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert!(value.is_object(), "{line}");
    }
}

#[test]
fn without_progress_success_is_silent_on_stderr() {
    let saved = Family::vectors(&[0.0; 10], &[&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]]).save();
    let output = saved.merge(&Recipe::default(), &[]);
    assert!(output.outcome.command.contains("--progress none"));
    assert_eq!(output.outcome.stderr, "");
}

#[test]
fn parameters_that_a_method_does_not_have_are_warned_of() {
    let saved = Spec::default().family().save();
    let output = saved.merge(&Recipe { method: Method::Linear, ..Recipe::default() }, &["--density=0.5"]);
    assert!(output.warnings().contains("density"), "{}", output.warnings());
}

#[test]
fn a_look_at_a_family_takes_no_statistics() {
    let saved = Spec::default().family().save();
    let [base, a] = [text(&saved.base), text(&saved.models[0])];
    let args = ["analyze", "--base", &base, "--model", &a, "--out", "r", "--fisher", &a];
    assert!(tiesmith(args).refusal().contains("--fisher"));
}
