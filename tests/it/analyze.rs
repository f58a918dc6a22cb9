//! `analyze`: every number of the report against its definition, on families of every kind.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::{Value, json};

use crate::support::family::{Deltas, Family, Saved, Spec, text};
use crate::support::files::read_json;
use crate::support::interference::{Look, Task, difference, magnitude_bins, measured, tasks, unknown_fields};
use crate::support::repository;
use crate::support::run::{Outcome, tiesmith};

/// Runs `analyze` on a saved family; `models` are added to each model's path.
fn analyze(saved: &Saved, out: &Path, suffixes: &[&str], flags: &[&str]) -> Outcome {
    let mut args = vec!["analyze".to_owned(), "--base".into(), text(&saved.base), "--out".into(), text(out)];
    for (at, model) in saved.models.iter().enumerate() {
        args.extend(["--model".into(), text(model) + suffixes.get(at).unwrap_or(&"")]);
    }
    args.extend(flags.iter().map(|flag| (*flag).to_owned()));
    tiesmith(args)
}

fn report(saved: &Saved, suffixes: &[&str], flags: &[&str]) -> (Value, PathBuf) {
    let out = saved.path(&format!("report{}", fs::read_dir(saved.dir.path()).unwrap().count()));
    analyze(saved, &out, suffixes, flags).succeeded();
    (read_json(&out.join("report.json")), out)
}

fn layer(name: &str) -> String {
    let parts: Vec<&str> = name.split('.').collect();
    let number = (1..parts.len().saturating_sub(1)).find(|&at| parts[at].bytes().all(|b| b.is_ascii_digit()));
    number.map_or("outside the layers".into(), |at| parts[..=at].join("."))
}

fn kind(name: &str) -> String {
    let part = |part: &str| if part.bytes().all(|b| b.is_ascii_digit()) { "*".to_owned() } else { part.to_owned() };
    name.split('.').map(part).collect::<Vec<_>>().join(".")
}

/// Fails unless the report is what brute force makes of the family.
#[track_caller]
fn must_hold(family: &Family, report: &Value, look: &Look) {
    let all = tasks(&family.base, &family.models, look);
    let check = |path: &str, some: &[&Task], found: &Value| {
        let expected = measured(some, &all, look);
        let differs = difference(path, &expected, found, 0.0);
        assert!(differs.is_none(), "{}\n{look:?}", differs.unwrap());
        let beside = ["name", "shape", "layer", "kind", "tensors", "thresholds"];
        assert_eq!(unknown_fields(&expected, found, &beside), [""; 0], "{path}: nothing checks these");
    };
    must_be_described(family, report, look);
    check("overall", &all.iter().collect::<Vec<_>>(), &report["overall"]);
    let entries = report["tensors"].as_array().unwrap();
    assert_eq!(entries.len(), all.len());
    for entry in entries {
        let task = all.iter().find(|task| entry["name"] == task.name.as_str()).unwrap();
        check(&task.name, &[task], entry);
        let group = |list: &str, at: &Value| report[list][at.as_u64().unwrap() as usize]["name"].clone();
        assert_eq!(entry["shape"], json!(family.base[&task.name].shape));
        assert_eq!(group("layers", &entry["layer"]), layer(&task.name));
        assert_eq!(group("kinds", &entry["kind"]), kind(&task.name));
    }
    for (list, name_of) in [("layers", layer as fn(&str) -> String), ("kinds", kind)] {
        let mut groups: BTreeMap<String, Vec<&Task>> = BTreeMap::new();
        all.iter().for_each(|task| groups.entry(name_of(&task.name)).or_default().push(task));
        let found = report[list].as_array().unwrap();
        assert_eq!(found.len(), groups.len(), "{list}");
        for group in found {
            let tasks = &groups[group["name"].as_str().unwrap()];
            assert_eq!(group["tensors"], tasks.len());
            check(list, tasks, group);
        }
    }
    // Thresholds, where they are the whole model's or a tensor's own.
    for (place, task) in all.iter().enumerate() {
        let entry = entries.iter().find(|entry| entry["name"] == task.name.as_str()).unwrap();
        let thresholds = if look.tensor_scope { &entry["thresholds"] } else { &report["thresholds"] };
        for (k, m) in (0..look.densities.len()).flat_map(|k| (0..look.weights.len()).map(move |m| (k, m))) {
            let least =
                task.thresholds[k][m].filter(|t| t.is_finite() && (!look.tensor_scope || task.taus[m].is_some()));
            let found = &thresholds[k][m];
            let Some(least) = least else {
                assert!(found.is_null(), "{}: {found}", task.name);
                continue;
            };
            let same = |task: &&Task| !look.tensor_scope || task.name == all[place].name;
            let magnitudes =
                all.iter().filter(same).filter_map(|task| task.taus[m].as_ref()).flatten().map(|x| x.abs());
            let (above, tied) = (magnitudes.clone().filter(|x| *x > least), magnitudes.filter(|x| *x == least));
            let expected = json!({"magnitude": least, "above": above.count(), "tied": tied.count()});
            assert_eq!(difference(&task.name, &expected, found, 0.0), None);
            assert_eq!(unknown_fields(&expected, found, &[]), [""; 0]);
        }
    }
}

/// Fails unless the report says what was looked at, and nothing that is not checked.
#[track_caller]
fn must_be_described(family: &Family, report: &Value, look: &Look) {
    let fields = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    let all = [
        "base",
        "fingerprint",
        "format",
        "kinds",
        "layers",
        "models",
        "overall",
        "program",
        "settings",
        "tensors",
        "thresholds",
        "warnings",
    ];
    assert_eq!(fields(report), BTreeSet::from(all.map(String::from)));
    let settings = &report["settings"];
    let all = ["chosen", "chosen_per_model", "densities", "magnitude_bins", "scope", "seed", "subsets", "weights"];
    assert_eq!(fields(settings), BTreeSet::from(all.map(String::from)));
    assert_eq!(settings["chosen"], look.chosen);
    assert_eq!(settings["chosen_per_model"], json!(look.densities[look.chosen]));
    assert_eq!(settings["weights"], json!(look.weights));
    assert_eq!(settings["subsets"], json!(look.subsets));
    assert_eq!(settings["scope"], if look.tensor_scope { "tensor" } else { "model" });
    assert_eq!(report["models"].as_array().unwrap().len(), family.models.len());
    assert_eq!((&report["format"], &report["base"]), (&json!("tiesmith analysis 1"), &json!("base")));
    assert!(report["fingerprint"].as_str().is_some_and(|hash| hash.len() == 64));
}

/// All subsets of two and more models, by size.
fn every_subset(models: usize) -> Vec<Vec<usize>> {
    assert!(models <= 8, "more than a few");
    let mut all: Vec<Vec<usize>> = (0u32..1 << models)
        .map(|bits| (0..models).filter(|m| bits >> m & 1 == 1).collect())
        .filter(|subset: &Vec<usize>| subset.len() >= 2)
        .collect();
    all.sort_by_key(|subset| (subset.len(), subset.clone()));
    all
}

/// What a run without flags looks at, of so many models.
fn look(models: usize) -> Look {
    let densities = [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0].map(|k| vec![k; models]).into();
    Look { densities, chosen: 2, tensor_scope: false, subsets: every_subset(models), weights: vec![1.0; models] }
}

fn families() -> Vec<Family> {
    let shapes = vec![
        ("embed.weight", vec![16, 9]),
        ("layers.0.mlp.weight", vec![37, 61]),
        ("layers.0.norm.weight", vec![13]),
        ("layers.1.mlp.weight", vec![3, 5, 4]),
        ("layers.10.experts.3.weight", vec![9, 9]),
        ("layers.10.mlp.bias", vec![1]),
    ];
    let spec =
        |models: Vec<Dtype>, deltas, seed| Spec { seed, shapes: shapes.clone(), models, deltas, ..Spec::default() };
    vec![
        spec(vec![Dtype::F32; 3], Deltas::HeavyTailed, 1).family(),
        Spec { base: Dtype::BF16, ..spec(vec![Dtype::BF16; 5], Deltas::HeavyTailed, 2) }.family(),
        spec(vec![Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F32], Deltas::Stepped, 3).family(),
        spec(vec![Dtype::F32; 2], Deltas::Stepped, 4).family(),
        Family::adversarial(),
    ]
}

#[test]
fn every_number_is_what_brute_force_finds() {
    for family in families() {
        let saved = family.save();
        let models = family.models.len();
        let (found, _) = report(&saved, &[], &[]);
        assert_eq!(found["settings"]["subsets"], json!(every_subset(models)));
        assert_eq!(found["settings"]["densities"], json!([0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0]));
        assert_eq!(difference("bins", &json!(magnitude_bins()), &found["settings"]["magnitude_bins"], 0.0), None);
        must_hold(&family, &found, &look(models));
        let (found, _) = report(&saved, &[], &["--scope=tensor", "--density=30%", "--densities=0.1,0.3"]);
        let densities = [0.1, 0.3, 1.0].map(|k| vec![k; models]).into();
        must_hold(&family, &found, &Look { densities, chosen: 1, tensor_scope: true, ..look(models) });
    }
}

#[test]
fn weights_and_densities_of_single_models_count() {
    let family = &families()[0];
    let saved = family.save();
    let suffixes = [",weight=2", ",density=0.5", ",weight=0.5,density=0"];
    let (found, _) = report(&saved, &suffixes, &["--densities=0.4"]);
    assert_eq!(found["settings"]["densities"], json!([0.4, 1.0, null]));
    assert_eq!(found["settings"]["chosen_per_model"], json!([0.2, 0.5, 0.0]));
    let densities = vec![vec![0.4; 3], vec![1.0; 3], vec![0.2, 0.5, 0.0]];
    must_hold(family, &found, &Look { densities, chosen: 2, weights: vec![2.0, 1.0, 0.5], ..look(3) });
}

#[test]
fn tensors_that_some_models_lack_count_for_the_others() {
    let mut family = families().swap_remove(0);
    family.models[1].remove("layers.0.mlp.weight");
    let saved = family.save();
    for scope in ["model", "tensor"] {
        let (found, _) = report(&saved, &[], &["--missing=skip", "--scope", scope]);
        must_hold(&family, &found, &Look { tensor_scope: scope == "tensor", ..look(3) });
    }
}

#[test]
fn of_many_models_ten_subsets_of_each_size_are_looked_at() {
    let spec = Spec { models: vec![Dtype::F32; 7], ..Spec::default() };
    let family = spec.family();
    let saved = family.save();
    let (found, _) = report(&saved, &[], &["--seed=3"]);
    let subsets: Vec<Vec<usize>> = serde_json::from_value(found["settings"]["subsets"].clone()).unwrap();
    for size in 2..=7usize {
        let of_size: BTreeSet<&Vec<usize>> = subsets.iter().filter(|subset| subset.len() == size).collect();
        assert_eq!(of_size.len(), [10, 10, 10, 10, 7, 1][size - 2]);
    }
    must_hold(&family, &found, &Look { subsets: subsets.clone(), ..look(7) });
    assert!(found["warnings"][0].as_str().unwrap().contains("at most 10 subsets of each size, drawn with seed 3"));
    let (other, _) = report(&saved, &[], &["--seed=4"]);
    assert_ne!(other["settings"]["subsets"], json!(subsets));
}

#[test]
fn of_forty_models_subsets_are_drawn_and_that_is_said() {
    let spec = Spec { models: vec![Dtype::F32; 40], shapes: vec![("layers.0.w", vec![40])], ..Spec::default() };
    let saved = spec.family().save_as(|_| crate::support::files::Layout::SINGLE);
    let out = saved.path("report");
    let outcome = analyze(&saved, &out, &[], &[]).succeeded();
    assert!(
        outcome.stderr.contains("of 40 models, conflicts are measured in at most 10 subsets"),
        "{}",
        outcome.stderr
    );
    let found = read_json(&out.join("report.json"));
    let subsets: Vec<Vec<usize>> = serde_json::from_value(found["settings"]["subsets"].clone()).unwrap();
    assert_eq!(subsets.len(), 38 * 10 + 1);
    let densities = look(1).densities.iter().map(|k| vec![k[0]; 40]).collect();
    let look = Look { densities, chosen: 2, tensor_scope: false, subsets, weights: vec![1.0; 40] };
    must_hold(&spec.family(), &found, &look);
}

#[test]
fn a_single_model_has_no_figures_that_compare() {
    let mut family = families().swap_remove(0);
    family.models.truncate(1);
    let saved = family.save();
    let out = saved.path("report");
    let outcome = analyze(&saved, &out, &[], &[]).succeeded();
    let said = "warning: only one model is given: what compares models needs two, and is left out";
    assert_eq!(outcome.stderr.lines().filter(|line| *line == said).count(), 1, "{}", outcome.stderr);
    must_hold(&family, &read_json(&out.join("report.json")), &look(1));
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("figures that compare models are left out: they need two"));
    assert!(!out.join("cosines.svg").exists() && out.join("norm-by-density.svg").exists());
    assert!(!page.contains("NaN") && !outcome.stdout.contains("conflict"), "{}", outcome.stdout);
}

#[test]
fn a_recipe_names_the_family_and_its_densities() {
    let saved = families().swap_remove(0).save();
    let [a, b] = [0, 1].map(|model| text(&saved.models[model]));
    let base = text(&saved.base);
    let recipe = |name: &str, content: &str| {
        let file = saved.path(name);
        fs::write(&file, content).unwrap();
        text(&file)
    };
    let run = |args: &[&str], name: &str| {
        let out = saved.path(name);
        tiesmith(["analyze"].iter().chain(args).copied().chain(["--out", &text(&out)])).succeeded();
        let mut report = read_json(&out.join("report.json"));
        for changing in ["fingerprint", "run", "out", "wall_seconds", "peak_memory_bytes"] {
            report.as_object_mut().unwrap().remove(changing);
        }
        report
    };
    // Whatever the method, with what belongs to a merge alone left aside.
    let ties = recipe(
        "ties.yml",
        &format!(
            "merge_method: ties\nbase_model: {base}\nmodels:\n- model: {a}\n  parameters: {{density: 0.3, weight: 0.5}}\n\
             - model: {b}\n  parameters: {{weight: 2}}\nparameters: {{density: 0.2, lambda: 0.7}}\nscope: tensor\ndtype: float16\n"
        ),
    );
    let (a3, b2) = (format!("{a},density=0.3"), format!("{b},density=0.2"));
    let expected = run(&["--base", &base, "--model", &a3, "--model", &b2, "--scope=tensor"], "flags");
    assert_eq!(run(&[&ties], "recipe"), expected);
    let expected = run(&["--base", &base, "--model", &a, "--model", &b, "--density=0.1"], "flags2");
    assert_eq!(run(&[&ties, "--density=0.1", "--scope=model"], "recipe2"), expected);

    let refused = |args: &[&str], said: &str| {
        let outcome = tiesmith(["analyze"].iter().chain(args).copied().chain(["--out", &text(&saved.path("no"))]));
        assert!(outcome.refusal().contains(said), "{}", outcome.stderr);
    };
    refused(&[&ties, "--base", &base], "--base");
    refused(&[&text(&saved.path("none.yml"))], "none.yml");
    let layers = format!("merge_method: passthrough\nslices:\n- sources:\n  - model: {a}\n    layer_range: [0, 1]\n");
    refused(&[&recipe("slices.yml", &layers)], "passthrough puts layers together without a base");
    let one = |name: &str| {
        format!("name: {name}\nmerge_method: linear\nmodels:\n- model: {a}\n  parameters: {{weight: 1}}\n")
    };
    let two = recipe("two.yml", &format!("{}---\n{}", one("x"), one("y")));
    refused(&[&two], "2 merges in one file: which of them is to be looked at?; add '--document NAME', one of: x, y");
    refused(&[&two, "--document=z"], "there is no document z in it");
    refused(&[&two, "--document=x"], "base");
    let second = fs::read_to_string(&ties).unwrap();
    let both = recipe("both.yml", &format!("name: x\n{second}---\n{second}"));
    let expected = run(&[&ties], "ties");
    assert_eq!(run(&[&both, "--document=x"], "first"), expected);
    assert_eq!(run(&[&both, "--document=2"], "second"), expected);
    let made = recipe("made.yml", &format!("{}---\nname: last\n{}", one("x"), second.replace(&b, "x")));
    refused(&[&made, "--document=last"], "x is the output of another document, which is to be made first");
    refused(&[&recipe("linear.yml", &one("x"))], "base");
}

#[test]
fn what_cannot_be_analyzed_is_refused_in_one_sentence() {
    let family = &families()[0];
    let saved = family.save();
    let out = text(&saved.path("report"));
    let (base, model) = (text(&saved.base), text(&saved.models[0]));
    let cases: [(&[&str], &str); 8] = [
        (&["--base", &base], "nothing to analyze: no --model is given"),
        (&["--model", &model], "base"),
        (
            &["--base", &base, "--model", &model, "--exclude", "*"],
            "nothing to analyze: no tensor of the base is a float",
        ),
        (&["--base", &base, "--model", &model, "--densities", "0.1,0"], "a density of 0 is not above 0"),
        (&["--base", &base, "--model", &model, "--densities", "0.1,x"], "'x'"),
        (&["--base", &base, "--model", &model, "--memory", "1MB"], "--memory 1000000 bytes is too little"),
        (&["--base", &base, "--model", &text(&saved.path("nothing"))], "nothing"),
        (&["--base", &base, "--model", &model, "--out", &base], "the output directory is the input"),
    ];
    for (args, said) in cases {
        let mut all = vec!["analyze"];
        all.extend(args);
        if !args.contains(&"--out") {
            all.extend(["--out", &out]);
        }
        let outcome = tiesmith(all);
        let line = outcome.refusal();
        assert!(line.contains(said), "{line}");
        assert!(!saved.path("report").exists());
    }
    let outcome = tiesmith(["analyze", "--base", &base, "--model", &model]);
    assert!(outcome.refusal().contains("no output directory is given; add '--out DIR'"), "{}", outcome.stderr);
}

#[test]
fn a_checkpoint_without_floats_and_a_nan_are_refused_and_leave_nothing() {
    use crate::support::tensor::{Tensor, tensors};
    let ints = || tensors([("w", Tensor::raw(Dtype::I32, &[2], vec![0; 8]))]);
    let saved = Family { base: ints(), models: vec![ints(), ints()], signs: ints() }.save();
    let out = saved.path("report");
    let outcome = analyze(&saved, &out, &[], &[]);
    assert!(
        outcome.refusal().contains("nothing to analyze: no tensor of the base is a float tensor"),
        "{}",
        outcome.stderr
    );
    let saved = Family::vectors(&[0.0, 1.0], &[&[1.0, f32::NAN], &[0.5, 2.0]]).save();
    let outcome = analyze(&saved, &out, &[], &[]);
    assert!(outcome.refusal().contains("\"w\"") || outcome.refusal().contains("w["), "{}", outcome.stderr);
    assert!(!out.exists());
    analyze(&saved, &out, &[], &["--non-finite=copy-base"]).succeeded();
}

#[test]
fn layers_that_a_recipe_puts_together_are_looked_at_in_their_places() {
    let names = ["layers.0.w", "layers.1.w", "layers.2.w"];
    let shapes = names.iter().map(|name| (*name, vec![9, 5])).collect();
    let family = Spec { shapes, models: vec![Dtype::F32; 2], ..Spec::default() }.family();
    let saved = family.save();
    let [base, a, b] = [&saved.base, &saved.models[0], &saved.models[1]].map(|path| text(path));
    // The output's layers are 0, 2, 1, the last with another density.
    let slice = |layer: u64, density: &str| {
        let source = |model: &str| {
            format!(
                "  - model: {model}\n    layer_range: [{layer}, {}]\n    parameters: {{weight: 1{density}}}\n",
                layer + 1
            )
        };
        format!("- sources:\n{}{}", source(&a), source(&b))
    };
    let slices = [slice(0, ""), slice(2, ""), slice(1, ", density: 0.5")].concat();
    let file = saved.path("slices.yml");
    let content = format!(
        "merge_method: ties\nscope: tensor\nbase_model: {base}\nslices:\n{slices}parameters: {{density: 0.2}}\ndtype: float32\n"
    );
    fs::write(&file, content).unwrap();
    let out = saved.path("report");
    tiesmith(["analyze", &text(&file), "--out", &text(&out), "--densities=0.3"]).succeeded();
    let found = read_json(&out.join("report.json"));
    assert_eq!(found["settings"]["densities"], json!([0.3, 1.0, null]));
    for (place, layer, density) in [(0, 0, 0.2), (1, 2, 0.2), (2, 1, 0.5)] {
        let look = Look {
            densities: vec![vec![0.3; 2], vec![1.0; 2], vec![density; 2]],
            chosen: 2,
            tensor_scope: true,
            ..look(2)
        };
        let all = tasks(&family.base, &family.models, &look);
        let task = all.iter().find(|task| task.name == names[layer]).unwrap();
        let entries = found["tensors"].as_array().unwrap();
        let entry = entries.iter().find(|entry| entry["name"] == names[place]).unwrap();
        // Shares of the whole are those of all layers together.
        assert_eq!(difference(names[place], &measured(&[task], &all, &look), entry, 0.0), None);
    }
}

/// All files of a directory.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(Result::unwrap);
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

#[test]
fn how_a_look_is_done_changes_no_byte() {
    let spec = Spec {
        seed: 9,
        shapes: vec![("layers.0.a", vec![300, 257]), ("layers.1.b", vec![200_003]), ("c", vec![3]), ("d", vec![])],
        models: vec![Dtype::BF16, Dtype::F32, Dtype::BF16],
        base: Dtype::BF16,
        deltas: Deltas::HeavyTailed,
    };
    let saved = spec.family().save();
    let runs: [&[&str]; 5] = [
        &["--threads=1"],
        &["--threads=2", "--memory=80MB"],
        &["--threads=7", "--memory=2GiB"],
        &["--io=mmap", "--memory=80MB", "--threads=3"],
        &["--io=read", "--threads=2"],
    ];
    for scope in ["--scope=model", "--scope=tensor"] {
        let mut first: Option<BTreeMap<String, Vec<u8>>> = None;
        for run in runs {
            let (_, out) = report(&saved, &[], &[run, &[scope, "--densities=0.1,0.4"]].concat());
            let found = contents(&out);
            let first = first.get_or_insert_with(|| found.clone());
            assert!(*first == found, "{scope} {run:?}");
        }
    }
}

#[test]
fn finished_reports_are_replaced_only_when_asked() {
    let saved = families()[0].save();
    let (_, out) = report(&saved, &[], &[]);
    let before = contents(&out);
    let outcome = analyze(&saved, &out, &[], &[]);
    assert!(outcome.refusal().contains("a finished analysis is already there"), "{}", outcome.stderr);
    assert_eq!(contents(&out), before);
    analyze(&saved, &out, &[], &["--force", "--density=0.5"]).succeeded();
    assert_ne!(contents(&out)["report.json"], before["report.json"]);
    // Nor does a merge take the place of something else, or a look.
    let recipe = crate::support::oracle::Recipe::default();
    let refused = saved.run("merge", &recipe, &["--out", &text(&out)]);
    assert!(refused.refusal().contains("not empty"), "{}", refused.stderr);
    let merged = saved.path("merged");
    saved.run("merge", &recipe, &["--out", &text(&merged)]).succeeded();
    let outcome = analyze(&saved, &merged, &[], &["--force"]);
    assert!(outcome.refusal().contains("not empty"), "{}", outcome.stderr);
    let mut single = families().swap_remove(0);
    single.models.truncate(1);
    let saved = single.save();
    analyze(&saved, &out, &[], &["--force"]).succeeded();
    assert!(!out.join("cosines.svg").exists(), "figures of the report replaced are gone");
}

/// Everything that stands in `attribute` of the elements of class `p` in a figure.
fn titles(svg: &str) -> Vec<String> {
    svg.split("<title>").skip(1).map(|rest| rest.split("</title>").next().unwrap().to_owned()).collect()
}

#[test]
fn figures_say_what_the_report_says() {
    let family = &families()[1];
    let saved = family.save();
    let (found, out) = report(&saved, &[], &[]);
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    let percent = |share: f64| {
        let x = share * 100.0;
        let digits = if x == 0.0 { 0 } else { (2 - x.abs().log10().floor() as i32).clamp(0, 6) as usize };
        let text = format!("{x:.digits$}");
        let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
        format!("{text}\u{a0}%")
    };
    for (name, expected) in [
        (
            "conflicts-by-density",
            found["overall"]["densities"]
                .as_array()
                .unwrap()
                .iter()
                .map(|at| percent(at["conflict_fraction"].as_f64().unwrap()) + " in conflict")
                .collect::<Vec<_>>(),
        ),
        (
            "survival",
            found["overall"]["survival"]
                .as_array()
                .unwrap()
                .iter()
                .map(|of| format!("entries kept: {}", percent(of["of_kept"].as_f64().unwrap())))
                .collect(),
        ),
        (
            "conflicts-by-models",
            found["overall"]["subset_conflicts"]
                .as_array()
                .unwrap()
                .iter()
                .map(|count| percent(count.as_f64().unwrap() / found["overall"]["elements"].as_f64().unwrap()))
                .collect(),
        ),
    ] {
        let file = fs::read_to_string(out.join(format!("{name}.svg"))).unwrap();
        let titles = titles(&file);
        for text in expected {
            assert!(titles.iter().any(|title| title.ends_with(&text)), "{name}: no {text:?} in {titles:#?}");
        }
        // The page shows the same drawing.
        let drawing = file.split("translate(0 30)\">\n").nth(1).unwrap().trim_end_matches("</g>\n</svg>\n");
        assert!(page.contains(drawing), "{name}");
    }
    let data = page.split("id=\"data\">").nth(1).unwrap().split("</script>").next().unwrap();
    let data: Value = serde_json::from_str(data).unwrap();
    for (row, entry) in data["tensors"].as_array().unwrap().iter().zip(found["tensors"].as_array().unwrap()) {
        assert_eq!((&row[0], &row[1]), (&entry["name"], &entry["elements"]));
        let conflicts = entry["densities"][2]["conflict_fraction"].as_f64().unwrap();
        assert!((row[3].as_f64().unwrap() - conflicts).abs() <= 1e-5 * conflicts, "{row}");
    }
}

#[test]
fn names_cannot_leave_their_place_in_the_page() {
    use crate::support::tensor::{Tensor, tensors};
    let hostile = "a</script><script>alert(1)</script>\u{2028}\u{202e}<b>&\"'.0.x\n";
    let one = |value: f32| {
        let mut all = tensors([("w", Tensor::vector(&[value, -value, 2.0]))]);
        all.insert(hostile.into(), Tensor::vector(&[value, 1.0]));
        all
    };
    let saved = Family { base: one(0.0), models: vec![one(1.0), one(-2.0)], signs: one(0.0) }.save();
    let (found, out) = report(&saved, &[], &[]);
    assert!(found["tensors"].as_array().unwrap().iter().any(|entry| entry["name"] == hostile));
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    assert_eq!(page.matches("<script").count(), 2);
    assert!(!page.contains("alert(1)</script>") && !page.contains('\u{202e}') && !page.contains("<b>&"));
    for name in ["norm-by-layer", "layers"] {
        let svg = fs::read_to_string(out.join(format!("{name}.svg"))).unwrap();
        assert!(!svg.contains("<script") && !svg.contains('\u{202e}'), "{svg}");
    }
}

#[test]
fn the_sample_conflicts_as_its_merge_says() {
    let folder = |name: &str| text(&repository("examples/digits").join(name));
    let dir = tempfile::tempdir().unwrap();
    let mut args = vec!["--base".to_owned(), folder("base")];
    for model in ["rotated", "mirrored", "inverted", "flipped", "shuffled"] {
        args.extend(["--model".into(), folder(model)]);
    }
    let run = |verb: &str, out: &str| {
        let out = text(&dir.path().join(out));
        let all = [verb, "--json", "--out", &out].into_iter().map(str::to_owned).chain(args.iter().cloned());
        tiesmith(all).succeeded().json()
    };
    let (merged, looked) = (run("merge", "merged"), run("analyze", "report"));
    let chosen = &looked["overall"]["densities"][2];
    let close = |a: &Value, b: &Value| assert!((a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-8, "{a} {b}");
    close(&merged["sign_conflict_fraction"], &chosen["conflict_fraction"]);
    for model in 0..5 {
        close(&merged["kept_fraction"][model], &chosen["kept_fraction"][model]);
        close(&merged["surviving_fraction"][model], &looked["overall"]["survival"][model]["of_kept"]);
    }
}
