//! Whatever a file or a person can contain: one line that begins `error: `, exit code 2, and nothing written.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use safetensors::Dtype;
use serde_json::json;

use crate::support::family::{Family, Saved, Spec, text};
use crate::support::files::{self, Layout, read_json, read_tree, write_index, write_raw};
use crate::support::oracle::{Method, Recipe};
use crate::support::run::tiesmith;
use crate::support::tensor::{Tensor, Tensors, tensors};

/// One way to spoil a family, and what the error must name.
struct Case {
    what: &'static str,
    spoil: fn(&Saved),
    names: &'static [&'static str],
}

/// Two tensors, two models; base and the second model in two shards, the first model in one file.
fn family() -> Family {
    let named = |x: f32| -> Tensors {
        tensors([("a.weight", Tensor::vector(&[x, 2.0])), ("b.weight", Tensor::vector(&[x, 3.0, 4.0]))])
    };
    Family { base: named(1.0), models: vec![named(5.0), named(-2.0)], signs: named(2.0) }
}

/// Asserts that merging is refused with a line that contains `names`, and that nothing was written.
#[track_caller]
fn refused(what: &str, saved: &Saved, flags: &[&str], names: &[&str]) {
    let out = saved.path("out");
    let out_flag = format!("--out={}", out.display());
    let mut all = vec![out_flag.as_str()];
    all.extend(flags);
    if !flags.iter().any(|flag| flag.starts_with("--progress")) {
        all.push("--progress=none");
    }
    let outcome = saved.run("merge", &Recipe::default(), &all);
    let line = outcome.refusal();
    for name in names {
        assert!(line.contains(name), "{what}: {name:?} is not named in\n{line}");
    }
    assert!(!out.exists(), "{what}: something was written");
}

#[track_caller]
fn all_refused(cases: &[Case]) {
    for case in cases {
        let saved = family().save();
        (case.spoil)(&saved);
        refused(case.what, &saved, &[], case.names);
        // A plan validates everything that a header can tell.
        let plan = saved.run("plan", &Recipe::default(), &[]);
        assert_eq!(plan.code, Some(2), "{}: plan accepts it\n{}", case.what, plan.stderr);
    }
}

// ---- Files ---------------------------------------------------------------------------------------------------------

fn single(saved: &Saved) -> std::path::PathBuf {
    saved.models[0].join("model.safetensors")
}

fn shard(saved: &Saved) -> std::path::PathBuf {
    saved.base.join("model-00002-of-00002.safetensors")
}

fn edit_index(saved: &Saved, tensor: &str, file: serde_json::Value) {
    let path = saved.base.join("model.safetensors.index.json");
    let mut index = read_json(&path);
    index["weight_map"][tensor] = file;
    write_index(&saved.base, &index);
}

fn cut(path: &Path, bytes: u64) {
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len() - bytes).unwrap();
}

#[test]
fn files_that_are_missing_truncated_or_something_else() {
    const SHARD: &str = "model-00002-of-00002.safetensors";
    all_refused(&[
        Case { what: "missing shard", spoil: |s| fs::remove_file(shard(s)).unwrap(), names: &["base", SHARD] },
        Case { what: "truncated shard", spoil: |s| cut(&shard(s), 1), names: &["base", SHARD] },
        Case { what: "truncated file", spoil: |s| cut(&single(s), 8), names: &["model1", "model.safetensors"] },
        Case {
            what: "shard cut within its header",
            spoil: |s| fs::File::options().write(true).open(shard(s)).unwrap().set_len(20).unwrap(),
            names: &[SHARD],
        },
        Case { what: "empty file", spoil: |s| fs::write(single(s), b"").unwrap(), names: &["model1"] },
        Case { what: "seven bytes", spoil: |s| fs::write(single(s), b"1234567").unwrap(), names: &["model1"] },
        Case {
            what: "trailing bytes",
            spoil: |s| {
                let mut bytes = fs::read(single(s)).unwrap();
                bytes.push(0);
                fs::write(single(s), bytes).unwrap();
            },
            names: &["model1"],
        },
        Case {
            what: "a directory in place of a shard",
            spoil: |s| {
                fs::remove_file(shard(s)).unwrap();
                fs::create_dir(shard(s)).unwrap();
            },
            names: &[SHARD],
        },
        Case {
            what: "a pipe in place of a shard",
            spoil: |s| {
                fs::remove_file(shard(s)).unwrap();
                assert!(Command::new("mkfifo").arg(shard(s)).status().unwrap().success());
            },
            names: &[SHARD],
        },
        Case {
            what: "a dangling link",
            spoil: |s| {
                fs::remove_file(shard(s)).unwrap();
                symlink("nowhere", shard(s)).unwrap();
            },
            names: &[SHARD],
        },
        Case {
            what: "a directory without a checkpoint",
            spoil: |s| fs::remove_file(single(s)).unwrap(),
            names: &["model1"],
        },
        Case {
            what: "several files without an index",
            spoil: |s| fs::remove_file(s.base.join("model.safetensors.index.json")).unwrap(),
            names: &["base"],
        },
        Case { what: "no such place", spoil: |s| fs::remove_dir_all(&s.models[1]).unwrap(), names: &["model2"] },
        Case {
            what: "a pickle",
            spoil: |s| {
                fs::remove_file(single(s)).unwrap();
                fs::write(s.models[0].join("pytorch_model.bin"), b"\x80\x02}q\x00.").unwrap();
            },
            names: &["model1"],
        },
    ]);
}

#[test]
fn indexes() {
    const INDEX: &str = "model.safetensors.index.json";
    fn replace(s: &Saved, text: &str) {
        fs::write(s.base.join(INDEX), text).unwrap();
    }
    all_refused(&[
        Case {
            what: "an absent tensor",
            spoil: |s| edit_index(s, "ghost.weight", json!("model-00001-of-00002.safetensors")),
            names: &["ghost.weight"],
        },
        Case {
            what: "the wrong shard",
            spoil: |s| edit_index(s, "a.weight", json!("model-00002-of-00002.safetensors")),
            names: &["a.weight"],
        },
        Case {
            what: "an absent file",
            spoil: |s| edit_index(s, "a.weight", json!("model-00009-of-00002.safetensors")),
            names: &["model-00009-of-00002.safetensors"],
        },
        Case {
            what: "the parent directory",
            spoil: |s| edit_index(s, "a.weight", json!("../model1/model.safetensors")),
            names: &[INDEX, "../model1/model.safetensors"],
        },
        Case {
            what: "an absolute path",
            spoil: |s| edit_index(s, "a.weight", json!(text(&single(s)))),
            names: &[INDEX, "model1/model.safetensors"],
        },
        Case { what: "an empty name", spoil: |s| edit_index(s, "a.weight", json!("")), names: &[INDEX] },
        Case { what: "a dot", spoil: |s| edit_index(s, "a.weight", json!(".")), names: &[INDEX] },
        Case { what: "two dots", spoil: |s| edit_index(s, "a.weight", json!("..")), names: &[INDEX] },
        Case { what: "a NUL", spoil: |s| edit_index(s, "a.weight", json!("a\0b")), names: &[INDEX] },
        Case { what: "a number for a file", spoil: |s| edit_index(s, "a.weight", json!(3)), names: &[INDEX] },
        Case { what: "no JSON", spoil: |s| replace(s, "{\"weight_map\": "), names: &[INDEX] },
        Case { what: "an empty file", spoil: |s| replace(s, ""), names: &[INDEX] },
        Case { what: "an array", spoil: |s| replace(s, "[]"), names: &[INDEX] },
        Case { what: "no weight_map", spoil: |s| replace(s, r#"{"metadata":{}}"#), names: &[INDEX, "weight_map"] },
        Case { what: "a list for a map", spoil: |s| replace(s, r#"{"weight_map":["a"]}"#), names: &[INDEX] },
        Case {
            what: "a duplicate tensor",
            spoil: |s| {
                let file = "model-00001-of-00002.safetensors";
                replace(s, &format!(r#"{{"weight_map":{{"a.weight":"{file}","a.weight":"{file}"}}}}"#));
            },
            names: &[INDEX, "a.weight"],
        },
    ]);
}

// ---- Headers -------------------------------------------------------------------------------------------------------

/// The first model's file with this header and 20 bytes of data is refused; the error names the file and `names`.
#[track_caller]
fn header_refused(what: &str, header: &str, names: &[&str]) {
    let saved = family().save();
    write_raw(&single(&saved), header, &[0; 20]);
    refused(what, &saved, &[], &[&["model1", "model.safetensors"], names].concat());
    let inspect = tiesmith(["inspect", &text(&single(&saved))]);
    assert_eq!(inspect.code, Some(2), "{what}: inspect accepts it\n{}", inspect.stdout);
}

/// A header of two tensors, the second of which has these fields.
fn second_tensor(fields: &str) -> String {
    format!(r#"{{"a.weight":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}},"b.weight":{{{fields}}}}}"#)
}

#[test]
fn headers_of_one_bad_tensor() {
    let deep = format!(r#""dtype":"F32","shape":{}3{},"data_offsets":[8,20]"#, "[".repeat(5000), "]".repeat(5000));
    let cases: [(&str, &str); 28] = [
        ("overlap", r#""dtype":"F32","shape":[3],"data_offsets":[4,16]"#),
        ("the same bytes twice", r#""dtype":"F32","shape":[2],"data_offsets":[0,8]"#),
        ("a gap", r#""dtype":"F32","shape":[2],"data_offsets":[12,20]"#),
        ("bytes that belong to none", r#""dtype":"F32","shape":[2],"data_offsets":[8,16]"#),
        ("beyond the end", r#""dtype":"F32","shape":[4],"data_offsets":[8,24]"#),
        ("offsets turned round", r#""dtype":"F32","shape":[3],"data_offsets":[20,8]"#),
        ("negative offset", r#""dtype":"F32","shape":[3],"data_offsets":[-8,20]"#),
        ("offset beyond 64 bits", r#""dtype":"F32","shape":[3],"data_offsets":[8,99999999999999999999]"#),
        ("largest offset", r#""dtype":"F32","shape":[3],"data_offsets":[8,18446744073709551615]"#),
        ("fractional offset", r#""dtype":"F32","shape":[3],"data_offsets":[8,20.5]"#),
        ("one offset", r#""dtype":"F32","shape":[3],"data_offsets":[8]"#),
        ("three offsets", r#""dtype":"F32","shape":[3],"data_offsets":[8,20,20]"#),
        ("offsets as text", r#""dtype":"F32","shape":[3],"data_offsets":["8","20"]"#),
        ("a wider type than the bytes", r#""dtype":"F64","shape":[3],"data_offsets":[8,20]"#),
        ("a narrower type than the bytes", r#""dtype":"BF16","shape":[3],"data_offsets":[8,20]"#),
        ("unknown type", r#""dtype":"F33","shape":[3],"data_offsets":[8,20]"#),
        ("type as number", r#""dtype":32,"shape":[3],"data_offsets":[8,20]"#),
        ("shape too large for the bytes", r#""dtype":"F32","shape":[4],"data_offsets":[8,20]"#),
        ("shape overflow", r#""dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[8,20]"#),
        (
            "shape overflow to the right size",
            r#""dtype":"F32","shape":[9223372036854775808,2,3],"data_offsets":[8,20]"#,
        ),
        ("size overflow", r#""dtype":"F32","shape":[4611686018427387907],"data_offsets":[8,20]"#),
        ("negative dimension", r#""dtype":"F32","shape":[-3],"data_offsets":[8,20]"#),
        ("fractional dimension", r#""dtype":"F32","shape":[3.0],"data_offsets":[8,20]"#),
        ("shape as number", r#""dtype":"F32","shape":3,"data_offsets":[8,20]"#),
        ("no type", r#""shape":[3],"data_offsets":[8,20]"#),
        ("no shape", r#""dtype":"F32","data_offsets":[8,20]"#),
        ("no offsets", r#""dtype":"F32","shape":[3]"#),
        ("nested without end", &deep),
    ];
    for (what, fields) in cases {
        header_refused(what, &second_tensor(fields), &[]);
    }
}

#[test]
fn errors_about_one_tensor_name_it() {
    for (what, fields) in [
        ("a wider type than the bytes", r#""dtype":"F64","shape":[3],"data_offsets":[8,20]"#),
        ("a gap", r#""dtype":"F32","shape":[2],"data_offsets":[12,20]"#),
        ("shape overflow", r#""dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[8,20]"#),
        ("beyond the end", r#""dtype":"F32","shape":[4],"data_offsets":[8,24]"#),
    ] {
        header_refused(what, &second_tensor(fields), &["b.weight"]);
    }
}

#[test]
fn headers_that_are_wrong_as_a_whole() {
    let good = r#"{"dtype":"F32","shape":[5],"data_offsets":[0,20]}"#;
    let cases = [
        ("nothing", String::new()),
        ("no JSON", "not json".into()),
        ("an array", "[]".into()),
        ("null", "null".into()),
        ("unclosed", format!(r#"{{"a":{good}"#)),
        ("trailing text", format!(r#"{{"a":{good}}} x"#)),
        ("two objects", format!(r#"{{"a":{good}}}{{}}"#)),
        ("a tensor that is a number", r#"{"a":1}"#.into()),
        ("metadata that is text", format!(r#"{{"__metadata__":"pt","a":{good}}}"#)),
        ("metadata of numbers", format!(r#"{{"__metadata__":{{"format":1}},"a":{good}}}"#)),
        ("no tensors but bytes", "{}".into()),
        ("a broken escape", format!(r#"{{"\ud800":{good}}}"#)),
    ];
    for (what, header) in cases {
        header_refused(what, &header, &[]);
    }
    let twice = format!(r#"{{"a.weight":{good},"a.weight":{good}}}"#);
    header_refused("a duplicate name", &twice, &["a.weight"]);
}

#[test]
fn header_lengths() {
    for (what, length) in [
        ("zero", 0u64),
        ("one beyond the file", 1_000),
        ("largest", u64::MAX),
        ("overflowing with the prefix", u64::MAX - 7),
        ("signed largest", i64::MAX as u64),
        ("a terabyte", 1 << 40),
    ] {
        let saved = family().save();
        let mut bytes = fs::read(single(&saved)).unwrap();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        fs::write(single(&saved), bytes).unwrap();
        refused(what, &saved, &[], &["model1", "model.safetensors"]);
    }
    // Within the file, but beyond what a header may be: refused before it is read.
    let saved = family().save();
    fs::write(single(&saved), 100_000_001u64.to_le_bytes()).unwrap();
    fs::File::options().write(true).open(single(&saved)).unwrap().set_len(200_000_000).unwrap();
    refused("above the limit", &saved, &[], &["model1", "100"]);
}

#[test]
fn a_header_that_is_not_utf8() {
    let saved = family().save();
    let mut bytes = fs::read(single(&saved)).unwrap();
    let name = bytes.windows(8).position(|window| window == b"a.weight").unwrap();
    bytes[name] = 0xff;
    fs::write(single(&saved), bytes).unwrap();
    refused("not UTF-8", &saved, &[], &["model1"]);
}

#[test]
fn hostile_names_do_not_reach_the_terminal() {
    // `refusal` asserts that there is one line without control characters.
    let name = r"\u001b[31mred\r\n\u0007".to_owned() + &"x".repeat(3000);
    let entry = r#"{"dtype":"F64","shape":[3],"data_offsets":[0,20]}"#;
    header_refused("terminal codes", &format!(r#"{{"{name}":{entry}}}"#), &["red"]);
    header_refused("text direction", &format!("{{\"safe\u{202e}fdp\":{entry}}}"), &["safe"]);
}

// ---- Families ------------------------------------------------------------------------------------------------------

/// Merging is refused for a family whose checkpoints do not fit together.
#[track_caller]
fn misfit(what: &str, change: impl Fn(&mut Family), names: &[&str]) {
    let mut family = family();
    change(&mut family);
    refused(what, &family.save(), &[], names);
}

#[test]
fn checkpoints_that_do_not_fit_together() {
    let vector = |n: usize| Tensor::vector(&vec![1.0; n]);
    misfit(
        "another length",
        |f| drop(f.models[1].insert("a.weight".into(), vector(7))),
        &["base", "model2", "a.weight", "[7]", "[2]"],
    );
    misfit(
        "another rank",
        |f| drop(f.models[1].insert("a.weight".into(), Tensor::floats(Dtype::F32, &[2, 1], &[1.0, 2.0]))),
        &["model2", "a.weight", "[2, 1]", "[2]"],
    );
    misfit("a tensor missing in a model", |f| drop(f.models[0].remove("b.weight")), &["base", "model1", "b.weight"]);
    misfit("no common tensors", |f| f.models[0] = tensors([("c.weight", vector(2))]), &["model1"]);
}

#[test]
fn signs_that_do_not_fit() {
    let mut lacking = family();
    lacking.signs.remove("a.weight");
    let saved = lacking.save();
    refused("signs that lack a tensor", &saved, &[&saved.signs_flag()], &["signs", "a.weight"]);
    let mut misshapen = family();
    misshapen.signs.insert("a.weight".into(), Tensor::vector(&[1.0; 3]));
    let saved = misshapen.save();
    refused("misshapen signs", &saved, &[&saved.signs_flag()], &["signs", "a.weight"]);
    refused("no signs", &saved, &["--sign-from=nowhere/at-all"], &["nowhere/at-all"]);
}

#[test]
fn nan_and_infinity_in_an_input() {
    let spoilt = |values: &[f32], index: usize, bad: f32| {
        let mut values = values.to_vec();
        values[index] = bad;
        Tensor::vector(&values)
    };
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for method in Method::ALL {
            let flag = format!("--method={}", method.word());
            let mut in_model = family();
            in_model.models[1].insert("b.weight".into(), spoilt(&[1.0, 2.0, 3.0], 2, bad));
            let names: &[&str] = &["model2", "b.weight", "2"];
            refused("in a model", &in_model.save(), &[&flag], names);
            if *method != Method::Linear {
                let mut in_base = family();
                in_base.base.insert("a.weight".into(), spoilt(&[1.0, 2.0], 0, bad));
                refused("in base", &in_base.save(), &[&flag], &["base", "a.weight", "0"]);
            }
        }
    }
    // In every stored type, at an index that only the numbers of this tensor can give.
    for dtype in [Dtype::F64, Dtype::F16, Dtype::BF16, Dtype::F8_E4M3, Dtype::F8_E5M2] {
        let shapes = vec![("w", vec![2000])];
        let mut family = Spec { shapes, models: vec![dtype; 2], ..Spec::default() }.family();
        let mut values = family.models[0]["w"].f32s();
        values[1234] = f32::NAN;
        family.models[0].insert("w".into(), Tensor::floats(dtype, &[2000], &values));
        for scope in ["--scope=model", "--scope=tensor"] {
            refused("a NaN far in", &family.save(), &[scope], &["model1", "\"w\"", "1234"]);
        }
    }
}

/// A tensor of doubles.
fn doubles(values: &[f64]) -> Tensor {
    Tensor::raw(Dtype::F64, &[values.len()], values.iter().flat_map(|value| value.to_le_bytes()).collect())
}

#[test]
fn finite_doubles_beyond_float32_are_never_dropped() {
    for (base, model, at) in [([1.0, 2.0], [1.0, 1e300], 1), ([-3e38, 0.0], [3e38, 0.0], 0)] {
        let mut family = family();
        family.base.insert("a.weight".into(), doubles(&base));
        family.models[0].insert("a.weight".into(), doubles(&model));
        for model in &mut family.models[1..] {
            model.insert("a.weight".into(), doubles(&base));
        }
        let saved = family.save();
        for mode in ["--non-finite=error", "--non-finite=copy-base", "--non-finite=propagate"] {
            let what = format!("{}e", if at == 1 { "1" } else { "3" });
            refused(mode, &saved, &[mode], &["model1", "a.weight", &format!("element {at}"), &what, "float32"]);
        }
    }
}

#[test]
fn a_result_in_doubles_that_overflows_is_an_error_or_clamped() {
    let mut family = family();
    family.base.insert("a.weight".into(), doubles(&[1.0, 2.0]));
    for model in &mut family.models {
        model.insert("a.weight".into(), doubles(&[11.0, 2.0]));
    }
    let saved = family.save();
    let flags = ["--density=1", "--lambda=3e38"];
    refused("an infinite sum", &saved, &flags, &["a.weight", "element 0", "inf", "float64"]);
    let clamped = saved.merge(&Recipe::default(), &[&flags[..], &["--overflow=clamp"]].concat());
    let expected = [1.0 + f64::from(f32::MAX), 2.0];
    assert_eq!(clamped.tensors()["a.weight"].values(), expected);
}

// ---- Options -------------------------------------------------------------------------------------------------------

#[test]
fn options_out_of_range() {
    let saved = family().save();
    let cases: &[(&[&str], &[&str])] = &[
        (&["--density=-0.1"], &["density", "-0.1"]),
        (&["--density=1.0001"], &["density", "1.0001"]),
        (&["--density=nan"], &["density"]),
        (&["--density=inf"], &["density"]),
        (&["--density=120%"], &["density"]),
        (&["--density=many"], &["density", "many"]),
        (&["--density="], &["density"]),
        (&["--lambda=nan"], &["lambda"]),
        (&["--lambda=inf"], &["lambda"]),
        (&["--lambda=one"], &["lambda", "one"]),
        (&["--method=tise"], &["tise", "ties"]),
        (&["--method="], &["method"]),
        (&["--scope=layer"], &["layer", "tensor"]),
        (&["--threshold=guess"], &["guess", "sketch"]),
        (&["--trim-ties=some"], &["some", "lowest"]),
        (&["--elect=vote"], &["vote", "mass"]),
        (&["--combine=median"], &["median", "mean"]),
        (&["--zero-sum=negative"], &["negative", "majority"]),
        (&["--dtype=int8"], &["int8", "bfloat16"]),
        (&["--seed=-1"], &["seed"]),
        (&["--seed=x"], &["seed"]),
        (&["--memory=lots"], &["memory", "lots"]),
        (&["--memory=-1GB"], &["memory"]),
        (&["--memory=0"], &["memory"]),
        (&["--memory=64KB"], &["memory", "MB"]),
        (&["--max-shard-size=big"], &["max-shard-size", "big"]),
        (&["--max-shard-size=0"], &["max-shard-size"]),
        (&["--threads=0"], &["threads"]),
        (&["--threads=two"], &["threads"]),
        (&["--io=psychic"], &["psychic", "mmap"]),
        (&["--missing=maybe"], &["maybe", "skip"]),
        (&["--non-finite=ignore"], &["ignore", "propagate"]),
        (&["--progress=loud"], &["loud", "plain"]),
        (&["--include=a["], &["include", "a["]),
        (&["--exclude={a"], &["exclude", "{a"]),
        (&["--no-such-flag"], &["--no-such-flag"]),
    ];
    for (flags, names) in cases {
        refused(&flags.join(" "), &saved, flags, names);
    }
}

#[test]
fn parameters_of_models_out_of_range() {
    let saved = family().save();
    let model = text(&saved.models[0]);
    let suffixes: &[(&str, &[&str])] = &[
        ("density=2", &["density", "2"]),
        ("density=-1", &["density"]),
        ("density=nan", &["density"]),
        ("weight=nan", &["weight"]),
        ("weight=inf", &["weight"]),
        ("weight=1e39", &["weight is 1000000000000000000000000000000000000000", "float32"]),
        ("weight=heavy", &["weight", "heavy"]),
        ("weight=", &["weight"]),
        ("colour=3", &["colour"]),
        ("weight", &["weight"]),
        ("weight=1,weight=2", &["weight"]),
    ];
    for (suffix, names) in suffixes {
        let argument = format!("{model},{suffix}");
        refused(suffix, &saved, &["--model", &argument], names);
    }
}

#[test]
fn command_lines_that_lack_something() {
    let saved = family().save();
    let (base, model, out) = (text(&saved.base), text(&saved.models[0]), text(&saved.path("out")));
    let cases: &[&[&str]] = &[
        &["merge", "--base", &base, "--out", &out],
        &["merge", "--model", &model, "--out", &out],
        &["merge", "--method=task_arithmetic", "--model", &model, "--out", &out],
        &["merge", "--base", &base, "--model", &model],
        &["merge", "--base", &base, "--model", &model, "--out"],
        &["merge", "--base", &base, "--model", "", "--out", &out],
        &["merge", "--base", "", "--model", &model, "--out", &out],
        &["plan", "--base", &base],
        &["inspect"],
        &["inspect", "/no/such/checkpoint"],
        &["diff", &base],
        &["diff", &base, "/no/such/checkpoint"],
        &["completions", "cobol"],
        &["no-such-verb"],
    ];
    for args in cases {
        tiesmith(*args).refusal();
        assert!(!Path::new(&out).exists(), "{args:?}");
    }
}

#[test]
fn weights_that_sum_to_zero_cannot_be_averaged() {
    let saved = family().save();
    let recipe = Recipe { method: Method::Linear, weights: vec![1.0, -1.0], ..Recipe::default() };
    let outcome = saved.run("merge", &recipe, &["--out", &text(&saved.path("out"))]);
    assert!(outcome.refusal().contains("weight"));
    assert!(!saved.path("out").exists());
}

// ---- Outputs -------------------------------------------------------------------------------------------------------

#[test]
fn an_output_that_is_an_input() {
    let saved = family().save();
    symlink(&saved.base, saved.path("link")).unwrap();
    fs::create_dir(saved.path("sub")).unwrap();
    for place in ["base", "model1", "model2", "link", "sub/../base"] {
        for force in [&[][..], &["--force"]] {
            let before = read_tree(saved.dir.path());
            let out = text(&saved.path(place));
            let outcome = saved.run("merge", &Recipe::default(), &[force, &["--out", &out]].concat());
            outcome.refusal();
            assert!(before == read_tree(saved.dir.path()), "{place} {force:?}: an input was touched");
        }
    }
}

#[test]
fn an_output_that_holds_a_file_of_an_input() {
    let saved = family().save();
    let (out, elsewhere) = (saved.path("out"), saved.path("elsewhere"));
    saved.run("merge", &Recipe::default(), &["--out", &text(&out)]).succeeded();
    fs::create_dir(&elsewhere).unwrap();
    symlink(out.join("model.safetensors"), elsewhere.join("linked.safetensors")).unwrap();
    fs::hard_link(out.join("model.safetensors"), elsewhere.join("same.safetensors")).unwrap();
    let before = read_tree(saved.dir.path());
    for name in ["linked.safetensors", "same.safetensors"] {
        let (model, out) = (text(&elsewhere.join(name)), text(&out));
        let outcome = tiesmith(["merge", "--base", &text(&saved.base), "--model", &model, "--out", &out, "--force"]);
        let line = outcome.refusal();
        assert!(line.contains("model.safetensors is a file of the input") && line.contains(name), "{line}");
        assert!(before == read_tree(saved.dir.path()), "{name}: an input was touched");
    }
}

#[test]
fn an_output_that_is_taken_or_impossible() {
    let saved = family().save();
    fs::create_dir(saved.path("taken")).unwrap();
    fs::write(saved.path("taken/notes.txt"), "mine").unwrap();
    fs::write(saved.path("file"), "mine").unwrap();
    files::write_checkpoint(&saved.path("model"), &family().base, Layout::SINGLE);
    for place in ["taken", "file", "file/out", "model"] {
        let before = read_tree(saved.dir.path());
        let out = text(&saved.path(place));
        let outcome = saved.run("merge", &Recipe::default(), &["--out", &out]);
        assert!(outcome.refusal().contains(place.split('/').next().unwrap()));
        assert!(before == read_tree(saved.dir.path()), "{place} was touched");
    }
}

#[test]
fn an_output_in_a_place_that_cannot_be_written() {
    let saved = family().save();
    // Nobody, root included, can create a directory in /proc.
    let outcome = saved.run("merge", &Recipe::default(), &["--out", "/proc/tiesmith/out"]);
    assert!(outcome.refusal().contains("/proc/tiesmith"));
}

#[test]
fn an_output_larger_than_the_disk() {
    // Sparse checkpoints of 8 TB each: no bytes on disk, but as many to be written.
    let dir = tempfile::tempdir().unwrap();
    let elements = 1u64 << 41;
    let header = format!(r#"{{"w":{{"dtype":"F32","shape":[{elements}],"data_offsets":[0,{}]}}}}"#, 4 * elements);
    let mut args = vec!["merge".to_owned()];
    for (flag, name) in [("--base", "base.safetensors"), ("--model", "model.safetensors")] {
        let path = dir.path().join(name);
        write_raw(&path, &header, &[]);
        let bytes = 8 + header.len() as u64 + 4 * elements;
        if fs::File::options().write(true).open(&path).unwrap().set_len(bytes).is_err() {
            eprintln!("skipped: the file system of {} has no files that large", dir.path().display());
            return;
        }
        args.extend([flag.to_owned(), text(&path)]);
    }
    let out = dir.path().join("out");
    // A plan reads headers only, whatever the size.
    tiesmith(["plan".to_owned()].iter().chain(&args[1..])).succeeded();
    args.extend(["--out".into(), text(&out)]);
    let outcome = tiesmith(&args);
    // Room may be there the next time.
    let line = outcome.error_line(1);
    assert!(line.contains("space") || line.contains("free"), "{line}");
    assert!(!out.exists());
}

#[cfg(unix)]
#[test]
fn nothing_is_written_through_a_link_in_the_output() {
    let saved = crate::support::family::Spec::default().family().save();
    let recipe = crate::support::oracle::Recipe::default();
    let victim = saved.path("victim");
    std::fs::create_dir_all(&victim).unwrap();
    std::fs::write(victim.join("file"), "precious").unwrap();

    let linked_dir = saved.path("a");
    std::fs::create_dir(&linked_dir).unwrap();
    std::os::unix::fs::symlink(&victim, linked_dir.join(".tiesmith")).unwrap();
    let linked_lock = saved.path("b");
    std::fs::create_dir_all(linked_lock.join(".tiesmith")).unwrap();
    std::os::unix::fs::symlink(victim.join("file"), linked_lock.join(".tiesmith/lock")).unwrap();

    let twice = saved.path("c");
    std::fs::create_dir_all(twice.join(".tiesmith")).unwrap();
    std::fs::hard_link(victim.join("file"), twice.join(".tiesmith/lock")).unwrap();
    let nowhere = saved.path("d");
    std::os::unix::fs::symlink(victim.join("none"), &nowhere).unwrap();

    let untouched = || {
        assert_eq!(std::fs::read_to_string(victim.join("file")).unwrap(), "precious");
        assert_eq!(std::fs::read_dir(&victim).unwrap().count(), 1);
    };
    for (out, says) in [
        (linked_dir, "the work directory is a link to somewhere else"),
        (linked_lock, "a link to somewhere else, where this program keeps a file of its own; remove it"),
        (twice, "a hard link"),
        (nowhere, "a link to a place that is not there"),
    ] {
        let line = saved.run("merge", &recipe, &["--out", out.to_str().unwrap()]).error_line(2).to_owned();
        assert!(line.contains(says) && line.contains(out.to_str().unwrap()), "{line}");
        untouched();
    }

    // What was to be written anew gets a file of its own.
    let (packed, model) = (text(&saved.path("x.tvz")), text(&saved.models[0]));
    std::fs::hard_link(victim.join("file"), saved.path("x.tvz.partial")).unwrap();
    tiesmith(["pack", &model, "--base", &text(&saved.base), "--out", &packed]).succeeded();
    untouched();
}
