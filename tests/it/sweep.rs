//! Sweeps: every output is what a merge of its own gives, bit for bit, from shared reads.

use std::fs;
use std::path::Path;

use safetensors::Dtype;
use serde_json::Value;

use crate::support::family::{Deltas, Family, Saved, Spec, text};
use crate::support::files::{self, lasting, read_checkpoint, read_tree};
use crate::support::run::{Outcome, tiesmith};
use crate::support::tensor::{Tensor, differences};

fn inputs(saved: &Saved) -> Vec<String> {
    let mut args = vec!["--base".to_owned(), text(&saved.base)];
    args.extend(saved.models.iter().flat_map(|model| ["--model".to_owned(), text(model)]));
    args
}

fn sweep(saved: &Saved, out: &Path, extra: &[&str]) -> Outcome {
    let mut args = vec!["sweep".to_owned()];
    args.extend(inputs(saved));
    args.extend(["--out".to_owned(), text(out), "--json".into(), "--progress".into(), "none".into()]);
    args.extend(extra.iter().map(|arg| (*arg).to_owned()));
    tiesmith(args)
}

/// What is varied, and what is not.
struct Case {
    grid: &'static [&'static str],
    fixed: &'static [&'static str],
    outputs: usize,
    /// How many of them are made together.
    shared: usize,
}

/// The options of `merge` for an output of the sweep, models included.
fn merge_args(saved: &Saved, entry: &Value, fixed: &[&str]) -> Vec<String> {
    let mut args = vec!["--base".to_owned(), text(&saved.base)];
    let mut models: Vec<usize> = (1..=saved.models.len()).collect();
    for setting in entry["settings"].as_array().unwrap() {
        let (key, value) = (setting[0].as_str().unwrap(), setting[1].as_str().unwrap());
        match key {
            "models" => models = value.split('+').map(|number| number.parse().unwrap()).collect(),
            _ => args.push(format!("--{key}={value}")),
        }
    }
    args.extend(models.iter().flat_map(|model| ["--model".to_owned(), text(&saved.models[model - 1])]));
    args.extend(fixed.iter().map(|arg| (*arg).to_owned()));
    args
}

fn check(saved: &Saved, case: &Case, run: &[&str], what: &str) -> Value {
    let out = saved.path("sweep");
    let _ = fs::remove_dir_all(&out);
    let report = sweep(saved, &out, &[case.grid, case.fixed, run].concat()).succeeded().json();
    let outputs = report["outputs"].as_array().unwrap();
    assert_eq!(outputs.len(), case.outputs, "{what}");
    assert_eq!(outputs.iter().filter(|entry| entry["shared"] == true).count(), case.shared, "{what}");
    for entry in outputs {
        let name = entry["name"].as_str().unwrap();
        let alone = saved.path("alone");
        let mut args = vec!["merge".to_owned(), "--out".into(), text(&alone), "--force".into()];
        args.extend(merge_args(saved, entry, case.fixed));
        tiesmith(args).succeeded();
        let (found, expected) = (lasting(&out.join(name)), lasting(&alone));
        assert!(found.keys().eq(expected.keys()), "{what}, {name}: {:?}", found.keys());
        for (file, bytes) in &expected {
            assert!(found[file] == *bytes, "{what}, {name}: {} differs", file.display());
        }
        tiesmith(["verify", &text(&out.join(name))]).succeeded();
    }
    report
}

fn families() -> Vec<Family> {
    let spec = |seed, dtype, deltas| Spec { seed, base: dtype, models: vec![dtype; 3], deltas, ..Spec::default() };
    let mut families: Vec<Family> =
        [spec(1, Dtype::F32, Deltas::HeavyTailed), spec(2, Dtype::BF16, Deltas::Stepped)].map(|s| s.family()).into();
    families.push(Family::adversarial());
    let ids = |value: i32| Tensor::raw(Dtype::I32, &[1], value.to_le_bytes().to_vec());
    families[0].base.insert("ids".into(), ids(1));
    families[0].models.iter_mut().for_each(|model| drop(model.insert("ids".into(), ids(2))));
    families
}

const CASES: [Case; 6] = [
    Case { grid: &["--lambda=0.8:1.2:0.2", "--density=0,0.2,50%,1"], fixed: &[], outputs: 12, shared: 12 },
    Case { grid: &["--subset=pairs,all,2", "--density=0.1,0.3"], fixed: &["--scope=tensor"], outputs: 10, shared: 10 },
    Case {
        grid: &["--method=ties,task_arithmetic,linear,dare_ties", "--lambda=0.5,-1"],
        fixed: &["--zero-sum=majority"],
        outputs: 7,
        shared: 7,
    },
    Case {
        grid: &["--density=0.2,0.4", "--subset=leave-one-out"],
        fixed: &["--trim-ties=lowest", "--zero-sum=majority"],
        outputs: 6,
        shared: 6,
    },
    Case {
        grid: &["--density=0.2,0.4", "--subset=sizes"],
        fixed: &["--trim-ties=lowest", "--scope=tensor", "--dtype=bf16", "--max-shard-size=500B"],
        outputs: 4,
        shared: 4,
    },
    Case {
        grid: &["--method=breadcrumbs_ties,ties,karcher", "--density=0.3,0.6"],
        fixed: &["--trim-ties=sample", "--seed=4", "--exclude=*mlp*"],
        outputs: 5,
        shared: 4,
    },
];

#[test]
fn every_output_is_a_merge_of_its_own() {
    for (number, family) in families().iter().enumerate() {
        let saved = family.save();
        for (at, case) in CASES.iter().enumerate() {
            for run in [&["--threads=1"][..], &["--threads=3", "--io=mmap"]] {
                let report = check(&saved, case, run, &format!("family {number}, case {at}, {run:?}"));
                let (read, separate) = (&report["bytes_read"], &report["separate_bytes_read"]);
                assert!(read.as_u64().unwrap() < separate.as_u64().unwrap() / 2, "{read} of {separate}");
            }
        }
    }
}

/// Factors of every kind: those that a common merge serves, and those that it does not.
const LAMBDAS: &str = "--lambda=0.5,1,-1,0,1.5,1e-40,3";

#[test]
fn factors_of_one_merge_give_what_separate_merges_give() {
    let cases = [
        Case { grid: &[LAMBDAS, "--density=0.3"], fixed: &["--trim-ties=lowest"], outputs: 7, shared: 7 },
        Case {
            grid: &[LAMBDAS],
            fixed: &["--scope=tensor", "--elect=count", "--zero-sum=positive"],
            outputs: 7,
            shared: 7,
        },
        Case {
            grid: &["--method=ties,task_arithmetic,dare_ties,breadcrumbs", "--lambda=0.4,0.8,1,2.5,9e4"],
            fixed: &["--dtype=float16", "--overflow=clamp"],
            outputs: 20,
            shared: 20,
        },
    ];
    let mut all = families();
    let spec = |base, models: [Dtype; 3]| Spec { seed: 7, base, models: models.into(), ..Spec::default() };
    all.push(spec(Dtype::F64, [Dtype::F64, Dtype::F32, Dtype::F64]).family());
    all.push(spec(Dtype::BF16, [Dtype::F32, Dtype::BF16, Dtype::F16]).family());
    for (number, family) in all.iter().enumerate() {
        let saved = family.save();
        for (at, case) in cases.iter().enumerate() {
            check(&saved, case, &["--threads=2"], &format!("family {number}, case {at}"));
        }
    }
    // What is not finite is decided about merge by merge.
    let values = [f32::NAN, 1.0, f32::INFINITY, -2.0, f32::MAX];
    let saved = Family::vectors(&[0.0, 0.5, 0.0, 1.0, 0.5], &[&values, &[1.0, 2.0, 3.0, -4.0, 5.0]]).save();
    let rules: [&'static [&'static str]; 2] =
        [&["--overflow=clamp", "--non-finite=copy-base"], &["--overflow=clamp", "--non-finite=propagate"]];
    for fixed in rules {
        check(&saved, &Case { grid: &[LAMBDAS], fixed, outputs: 7, shared: 7 }, &[], &format!("{fixed:?}"));
    }
}

#[test]
fn a_model_that_does_not_fit_into_memory_is_read_about_as_often_as_by_one_merge() {
    let shapes = vec![("a", vec![3000, 1000]), ("b", vec![2600, 1003]), ("c", vec![77])];
    let spec = Spec { shapes, base: Dtype::BF16, models: vec![Dtype::BF16; 2], ..Spec::default() };
    let saved = spec.family().save();
    let run = ["--memory=192MiB", "--threads=2"];
    let grid: &[&str] = &["--lambda=0.8,1.0,1.2", "--density=0.1,0.2"];
    // Where a bracket misses, task vectors are looked at once more: rarer by far than six merges read them.
    for (fixed, limit) in [(&["--trim-ties=lowest"][..], 2.0), (&["--scope=tensor"][..], 1.05)] {
        let case = Case { grid, fixed: Box::leak(fixed.to_vec().into_boxed_slice()), outputs: 6, shared: 6 };
        let report = check(&saved, &case, &run, &format!("{fixed:?}"));
        let alone = sweep(&saved, &saved.path("one"), &[fixed, &run, &["--lambda=1", "--force"]].concat());
        let alone = alone.succeeded().json()["bytes_read"].as_u64().unwrap() as f64;
        let read = report["bytes_read"].as_u64().unwrap() as f64;
        assert!(read <= limit * alone, "{fixed:?}: {read} against {alone}");
    }
}

#[test]
fn the_table_says_what_is_where_and_finished_outputs_stay() {
    let saved = Spec::default().family().save();
    let out = saved.path("sweep");
    let first = sweep(&saved, &out, &["--lambda", "0.5,1", "--method", "ties,task_arithmetic"]).succeeded().json();
    let names: Vec<&str> = first["outputs"].as_array().unwrap().iter().map(|e| e["name"].as_str().unwrap()).collect();
    let expected = ["ties_lambda-0.5", "ties_lambda-1", "task_arithmetic_lambda-0.5", "task_arithmetic_lambda-1"];
    assert_eq!(names, expected);
    assert_eq!(files::read_json(&out.join("sweep.json"))["outputs"].as_array().unwrap().len(), 4);
    let table = fs::read_to_string(out.join("sweep.md")).unwrap();
    for name in expected {
        assert!(table.contains(&format!("| `{name}` |")), "{table}");
    }
    // A wider grid in the same place makes what is lacking.
    fs::remove_dir_all(out.join("ties_lambda-1")).unwrap();
    let before = fs::metadata(out.join("ties_lambda-0.5/model.safetensors")).unwrap().modified().unwrap();
    let second = sweep(&saved, &out, &["--lambda", "0.5,1,2", "--method", "ties,task_arithmetic"]).succeeded().json();
    let found: Vec<bool> = second["outputs"].as_array().unwrap().iter().map(|entry| entry["found"] == true).collect();
    assert_eq!(found, [true, false, false, true, true, false]);
    assert_eq!(fs::metadata(out.join("ties_lambda-0.5/model.safetensors")).unwrap().modified().unwrap(), before);
    let third = sweep(&saved, &out, &["--lambda", "0.5,1,2", "--method", "ties,task_arithmetic"]).succeeded().json();
    assert_eq!((&third["bytes_read"], &third["separate_bytes_read"]), (&0.into(), &0.into()));
    // A run that found everything leaves the table of the one that made it.
    let table = fs::read_to_string(out.join("sweep.md")).unwrap();
    assert!(table.contains("The last run made 3 of them: it read "), "{table}");
    // Other inputs in the same place are refused.
    let line = sweep(&saved, &out, &["--lambda", "0.5", "--method", "ties,task_arithmetic", "--seed", "9"]);
    assert!(line.refusal().contains("--force"), "{}", line.stderr);
}

#[test]
fn what_cannot_be_swept_is_refused() {
    let saved = Spec::default().family().save();
    let out = saved.path("sweep");
    let refused = |extra: &[&str], part: &str| {
        let outcome = sweep(&saved, &out, extra);
        assert!(outcome.refusal().contains(part), "{part}: {}", outcome.stderr);
        assert!(!out.exists(), "{part}");
    };
    refused(&["--lambda", "1:2"], "first:last:step");
    refused(&["--lambda", "1,1"], "two outputs");
    refused(&["--density", "20"], "20");
    refused(&["--subset", "1+9"], "no model 9");
    refused(&["--subset", "some"], "leave-one-out");
    refused(&["--method", "ties,magic"], "magic");
    refused(&["--lambda", "0:100000:1"], "10000");
    refused(&["--lambda", "0.1,0.2", "--memory", "21MB"], "at least");
    refused(&["--method", "slerp", "--subset", "all"], "slerp");
}

#[test]
fn a_directory_of_other_things_is_no_place_for_a_sweep() {
    let saved = Spec::default().family().save();
    let taken = saved.path("taken");
    fs::create_dir(&taken).unwrap();
    fs::write(taken.join("notes.txt"), "mine").unwrap();
    for extra in [&["--lambda=0.5,1"][..], &["--lambda=0.5,1", "--packed", "--force"]] {
        for (place, words) in [(&taken, "not empty"), (&saved.models[0], "is the input"), (&saved.base, "is the input")]
        {
            let before = read_tree(saved.dir.path());
            let line = sweep(&saved, place, extra).refusal().to_owned();
            assert!(line.contains(words) && line.contains(&text(place)), "{line}");
            assert!(before == read_tree(saved.dir.path()), "{line}");
        }
        // A sweep's own directory may have a note in it, and other values are added to it.
        let out = saved.path(if extra.len() > 1 { "packed" } else { "sweep" });
        sweep(&saved, &out, extra).succeeded();
        fs::write(out.join("notes.txt"), "mine").unwrap();
        sweep(&saved, &out, &[&["--lambda=2"], &extra[1..]].concat()).succeeded();
        // As if it had been killed before there was a table.
        fs::remove_file(out.join("sweep.json")).unwrap();
        sweep(&saved, &out, extra).succeeded();
    }
}

#[test]
fn outputs_that_do_not_fit_on_the_disk_are_refused_before_the_work() {
    let dir = tempfile::tempdir().unwrap();
    let place = |name: &str| dir.path().join(name);
    for name in ["base.safetensors", "model.safetensors"] {
        let elements = 250_000_000_000u64;
        let header = format!(r#"{{"w":{{"dtype":"F32","shape":[{elements}],"data_offsets":[0,{}]}}}}"#, 4 * elements);
        files::write_raw(&place(name), &header, &[]);
        // Holes take no room.
        let file = fs::OpenOptions::new().write(true).open(place(name)).unwrap();
        file.set_len(8 + header.len() as u64 + 4 * elements).unwrap();
    }
    let [base, model, out] = ["base.safetensors", "model.safetensors", "out"].map(|name| text(&place(name)));
    let inputs = ["sweep", "--base", &base, "--model", &model, "--out", &out, "--lambda", "1:100:1"];
    let outcome = tiesmith(inputs);
    // The figures are what is needed, with room for small files, and what is there, which is less.
    let line = outcome.error_line(1);
    assert!(line.contains("100 outputs need 100000033 MB of disk space, but only "), "{line}");
    let outcome = tiesmith([&inputs[..], &["--packed"]].concat());
    assert!(outcome.error_line(1).contains("100 outputs need up to"), "{}", outcome.stderr);
    assert!(!place("out").exists());
}

#[test]
fn a_recipe_file_can_be_swept() {
    let saved = Spec::default().family().save();
    let recipe = saved.path("recipe.yml");
    let model = |model: &Path| format!("  - model: {}\n    parameters: {{weight: 1, density: 0.5}}\n", text(model));
    let models: String = saved.models.iter().map(|path| model(path)).collect();
    let base = text(&saved.base);
    fs::write(&recipe, format!("merge_method: ties\nbase_model: {base}\nmodels:\n{models}dtype: float32\n")).unwrap();
    let out = saved.path("sweep");
    let argument = text(&recipe);
    tiesmith(["sweep", &argument, "--density", "0.1,0.5", "--lambda", "1,2", "--out", &text(&out)]).succeeded();
    for (density, lambda) in [("0.1", "1"), ("0.1", "2"), ("0.5", "1"), ("0.5", "2")] {
        let alone = saved.path(&format!("alone{density}{lambda}"));
        tiesmith(["merge", &argument, "--density", density, "--lambda", lambda, "--out", &text(&alone)]).succeeded();
        let name = format!("density-{density}_lambda-{lambda}");
        assert_eq!(differences(&read_checkpoint(&alone), &read_checkpoint(&out.join(name))), "");
    }
}

#[test]
fn packed_outputs_are_the_merges_bit_for_bit() {
    let shapes = vec![("a", vec![600, 1000]), ("b", vec![3, 5]), ("c", vec![0]), ("d", vec![1 << 18])];
    let spec = |dtype| Spec { shapes: shapes.clone(), base: dtype, models: vec![dtype; 2], ..Spec::default() };
    let mut family = spec(Dtype::BF16).family();
    let ids = |value: i64| Tensor::raw(Dtype::I64, &[300_000], value.to_le_bytes().repeat(300_000));
    family.base.insert("ids".into(), ids(1));
    family.models.iter_mut().for_each(|model| drop(model.insert("ids".into(), ids(1))));
    let saved = family.save();
    let cases: [(&[&str], &[&str]); 5] = [
        (&["--lambda=0.8,1.3", "--density=0.1,1"], &[]),
        (&["--density=0.1,0.2", "--subset=1,all"], &["--scope=tensor", "--trim-ties=lowest", "--exclude=b"]),
        (&["--method=ties,linear"], &["--zero-sum=majority"]),
        (&["--density=0.3"], &["--dtype=float32"]),
        (&["--lambda=0.5,0.8,1,1.3", "--density=0.3"], &[]),
    ];
    for (number, (grid, fixed)) in cases.iter().enumerate() {
        let (folders, files) = (saved.path(&format!("folders{number}")), saved.path(&format!("files{number}")));
        let whole = sweep(&saved, &folders, &[*grid, *fixed].concat()).succeeded().json();
        let mut bytes = Vec::new();
        for run in [&["--threads=1", "--memory=64MiB"][..], &["--threads=4"]] {
            let packed = sweep(&saved, &files, &[*grid, *fixed, &["--packed", "--force"], run].concat()).succeeded();
            let packed = packed.json();
            assert!(packed["bytes_written"].as_u64() < whole["bytes_written"].as_u64());
            for (entry, other) in packed["outputs"].as_array().unwrap().iter().zip(whole["outputs"].as_array().unwrap())
            {
                for field in ["kept_fraction", "sign_conflict_fraction", "tensors", "elements"] {
                    assert_eq!(entry["report"][field], other["report"][field], "case {number}, {field}");
                }
                let name = entry["name"].as_str().unwrap();
                let (file, out) = (files.join(format!("{name}.tvz")), saved.path("out"));
                bytes.push((name.to_owned(), fs::read(&file).unwrap()));
                tiesmith(["diff", &text(&file), &text(&folders.join(name))]).succeeded();
                tiesmith(["unpack", &text(&file), "--out", &text(&out), "--force"]).succeeded();
                let (found, expected) = (read_tree(&out), read_tree(&folders.join(name)));
                for (path, data) in expected.iter().filter(|(path, _)| path.extension() != Some("json".as_ref())) {
                    let same = path.ends_with("README.md") || found[path] == *data;
                    assert!(same, "case {number}, {name}: {}", path.display());
                }
                assert_eq!(found[Path::new("config.json")], expected[Path::new("config.json")]);
            }
        }
        let (one, other) = bytes.split_at(bytes.len() / 2);
        assert!(one == other, "case {number}: threads or memory show in a packed output");
        // What is there stays.
        let again = sweep(&saved, &files, &[*grid, *fixed, &["--packed"]].concat()).succeeded().json();
        assert!(again["outputs"].as_array().unwrap().iter().all(|entry| entry["found"] == true));
    }
    let refused = |extra: &[&str], part: &str| {
        let out = saved.path("refused");
        let outcome = sweep(&saved, &out, &[extra, &["--packed"]].concat());
        assert!(outcome.refusal().contains(part), "{part}: {}", outcome.stderr);
        assert!(!out.exists());
    };
    refused(&["--method=ties,karcher"], "karcher");
}

#[test]
fn an_output_with_a_lost_or_cut_off_file_is_not_there_already() {
    let shapes = vec![("a", vec![30, 100]), ("b", vec![2000])];
    let saved = Spec { shapes, ..Spec::default() }.family().save();
    let out = saved.path("sweep");
    let grid = ["--lambda=0.5,1", "--max-shard-size=13KB"];
    sweep(&saved, &out, &grid).succeeded();
    let expected = lasting(&out.join("lambda-1"));
    let shard = expected.keys().find(|path| text(path).starts_with("model-00001")).expect("there are several shards");
    let path = out.join("lambda-1").join(shard);
    let cut = |path: &Path| fs::File::options().write(true).open(path).unwrap().set_len(100).unwrap();
    for (spoil, words) in [(&|path: &Path| fs::remove_file(path).unwrap()) as &dyn Fn(&Path), &cut]
        .into_iter()
        .zip(["it is missing", "it has 100 bytes"])
    {
        spoil(&path);
        let outcome = sweep(&saved, &out, &grid);
        let line = outcome.refusal();
        for words in [&text(&path), words, "lambda-1 --repair", "--force"] {
            assert!(line.contains(words), "{words}: {line}");
        }
        assert_eq!(tiesmith(["verify", &text(&out.join("lambda-1")), "--repair"]).code, Some(0));
        let again = sweep(&saved, &out, &grid).succeeded().json();
        assert!(again["outputs"].as_array().unwrap().iter().all(|entry| entry["found"] == true));
        assert!(lasting(&out.join("lambda-1")) == expected);
    }
}

#[test]
fn a_second_run_keeps_what_is_known_of_packed_outputs() {
    let saved = Spec::default().family().save();
    let out = saved.path("sweep");
    let grid = ["--lambda=0.5,1", "--packed"];
    sweep(&saved, &out, &grid).succeeded();
    let (table, json) = (out.join("sweep.md"), out.join("sweep.json"));
    let before = (fs::read(&table).unwrap(), fs::read(&json).unwrap());
    sweep(&saved, &out, &grid).succeeded();
    assert!((fs::read(&table).unwrap(), fs::read(&json).unwrap()) == before);
    // A wider one lists the old ones with what was counted when they were made.
    let third = sweep(&saved, &out, &["--lambda=0.5,1,2", "--packed"]).succeeded().json();
    for (entry, found) in third["outputs"].as_array().unwrap().iter().zip([true, true, false]) {
        assert_eq!(entry["found"], found);
        assert!(entry["report"]["kept_fraction"][0].as_f64().unwrap() > 0.0);
    }
    assert!(!fs::read_to_string(&table).unwrap().contains("| |"), "every row has its numbers");
    // What was made otherwise is not taken for it.
    fs::write(&json, "{\"outputs\": 3}").unwrap();
    let fourth = sweep(&saved, &out, &grid).succeeded().json();
    assert!(fourth["outputs"][0]["report"].is_null());
    // Help that speaks of sweeps.
    let help = tiesmith(["sweep", "--help"]).succeeded().stdout;
    assert!(!help.contains("--parts") && help.contains("Directory of the outputs"), "{help}");
    let outcome = sweep(&saved, &out, &["--parts=x"]);
    assert!(outcome.code == Some(2), "{}", outcome.stderr);
    // One that was cut off since is not there already.
    let cut = out.join("lambda-1.tvz");
    for bytes in [fs::metadata(&cut).unwrap().len() - 1, 200, 0] {
        fs::File::options().write(true).open(&cut).unwrap().set_len(bytes).unwrap();
        let line = sweep(&saved, &out, &grid).refusal().to_owned();
        assert!(line.contains("lambda-1.tvz") && line.contains("remove it and run the sweep again"), "{line}");
    }
    fs::remove_file(&cut).unwrap();
    let fifth = sweep(&saved, &out, &grid).succeeded().json();
    assert_eq!(fifth["outputs"][1]["found"], false);
}
