//! What must hold for every method of the registry, whatever it computes.

use std::collections::BTreeMap;

use safetensors::Dtype;
use serde_json::Value;

use crate::support::family::{Family, Saved, Spec, text};
use crate::support::files::read_checkpoint;
use crate::support::run::{Outcome, command, run as run_command, tiesmith};
use crate::support::statistics;
use crate::support::tensor::{Tensor, Tensors};

/// Methods whose result does not depend on the order of equally weighted models, and how far it may differ by rounding.
const SYMMETRIC: [&str; 13] = [
    "ties",
    "task_arithmetic",
    "linear",
    "fisher",
    "regmean",
    "breadcrumbs",
    "breadcrumbs_ties",
    "sce",
    "ram",
    "ramplus_tl",
    "model_stock",
    "multislerp",
    "karcher",
];
/// Methods of two models that are symmetric at their default of one half.
const SYMMETRIC_PAIRS: [&str; 2] = ["slerp", "nuslerp"];

fn methods() -> Vec<Value> {
    tiesmith(["methods", "--json"]).succeeded().json()["methods"].as_array().unwrap().clone()
}

fn name(method: &Value) -> &str {
    method["name"].as_str().unwrap()
}

/// As many models as `method` takes of `given`.
fn taken(method: &Value, given: usize) -> usize {
    method["models"]["max"].as_u64().unwrap_or(u64::MAX).min(given as u64) as usize
}

/// `VERB` with `method` and its defaults on the first models that it takes of `family`.
fn run(verb: &str, method: &Value, family: &Family, extra: &[&str]) -> (Outcome, BTreeMap<String, Tensor>) {
    let saved = family.save();
    let out = text(&saved.path("out"));
    let mut args = vec![verb.to_owned(), "--method".into(), name(method).into()];
    if method["needs_base"] == true {
        args.extend(["--base".into(), text(&saved.base)]);
    }
    for model in &saved.models[..taken(method, family.models.len())] {
        args.extend(["--model".into(), text(model)]);
    }
    args.extend(statistics::args(name(method), &saved.models[..taken(method, family.models.len())]));
    args.extend(extra.iter().map(|arg| (*arg).to_owned()));
    if verb == "merge" {
        args.extend(["--json", "--progress=none", "--out", &out].map(str::to_owned));
    }
    let outcome = tiesmith(args).succeeded();
    let tensors = if verb == "merge" { read_checkpoint(saved.path("out").as_path()) } else { Tensors::new() };
    (outcome, tensors)
}

fn merge(method: &Value, family: &Family, extra: &[&str]) -> Tensors {
    run("merge", method, family, extra).1
}

fn close(a: &Tensors, b: &Tensors, tolerance: f64) -> Result<(), String> {
    for (name, a) in a {
        for (p, (a, b)) in a.values().into_iter().zip(b[name].values()).enumerate() {
            let equal = (a - b).abs() <= tolerance * a.abs().max(1e-3);
            if !equal {
                return Err(format!("{name}[{p}]: {a:e} against {b:e}"));
            }
        }
    }
    Ok(())
}

fn family() -> Family {
    Spec { seed: 21, ..Spec::default() }.family()
}

#[test]
fn the_order_of_models_does_not_matter_where_the_formula_is_symmetric() {
    for method in methods() {
        let mut family = family();
        if SYMMETRIC_PAIRS.contains(&name(&method)) {
            family.models.truncate(2);
        } else if !SYMMETRIC.contains(&name(&method)) {
            continue;
        }
        let before = merge(&method, &family, &[]);
        family.models.reverse();
        close(&before, &merge(&method, &family, &[]), 2e-6).unwrap_or_else(|e| panic!("{}: {e}", name(&method)));
    }
}

#[test]
fn models_that_are_base_merge_to_base() {
    let mut family = family();
    family.models = vec![family.base.clone(); 3];
    for method in methods() {
        close(&family.base, &merge(&method, &family, &[]), 1e-6).unwrap_or_else(|e| panic!("{}: {e}", name(&method)));
    }
}

#[test]
fn identical_models_merge_to_that_model_where_all_of_it_is_kept() {
    let mut family = family();
    family.models = vec![family.models[0].clone(); 3];
    for method in methods() {
        let flags: &[&str] = match name(&method) {
            // Sums of three times the same.
            "task_arithmetic" => &["--lambda=0.3333333333333333"],
            "dare_ties" | "breadcrumbs_ties" => &["--density=1", "--combine=mean"],
            "dare_linear" | "della_linear" | "breadcrumbs" => &["--density=1", "--lambda=0.3333333333333333"],
            "ties" | "della" => &["--density=1"],
            // Only large changes are taken over, or only small ones.
            "arcee_fusion" | "nearswap" => continue,
            // Entries that all models changed by less than epsilon stay.
            "ram" | "ramplus_tl" => &["--param=epsilon=0"],
            _ => &[],
        };
        let merged = merge(&method, &family, flags);
        close(&family.models[0], &merged, 2e-6).unwrap_or_else(|e| panic!("{}: {e}", name(&method)));
    }
}

#[test]
fn one_model_is_itself_where_a_method_takes_one() {
    let mut family = family();
    family.models.truncate(1);
    for method in methods().iter().filter(|method| method["models"]["min"] == 1 && method["models"]["max"].is_null()) {
        let flags: &[&str] = match name(method) {
            "ram" | "ramplus_tl" => &["--param=epsilon=0", "--param=r=0"][..if name(method) == "ram" { 1 } else { 2 }],
            _ if method["trims"] == true => &["--density=1"],
            _ => &[],
        };
        let merged = merge(method, &family, flags);
        close(&family.models[0], &merged, 2e-6).unwrap_or_else(|e| panic!("{}: {e}", name(method)));
    }
}

#[test]
fn scaling_all_weights_changes_nothing_where_they_are_shares() {
    for name in ["linear", "fisher", "nuslerp", "multislerp"] {
        let method = methods().into_iter().find(|method| method["name"] == name).unwrap();
        let family = family();
        let one = merge(&method, &family, &["--param=weight=1"]);
        close(&one, &merge(&method, &family, &["--param=weight=8"]), 2e-6).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

#[test]
fn what_is_read_is_what_the_plan_said() {
    // One tensor of several chunks at the smallest budget, so that methods that look at it first read it again.
    let spec = Spec { shapes: vec![("a", vec![211, 301]), ("b", vec![7])], ..Spec::default() };
    let family = spec.family();
    let mut looking = 0;
    for method in methods() {
        let smallest = |text: &str| -> String {
            let (_, rest) = text.split_once("at least ").expect("the smallest memory");
            rest.split(' ').next().unwrap().to_owned()
        };
        let refused = {
            let saved = family.save();
            let mut args = vec!["plan".to_owned(), "--memory=1MB".into(), "--method".into(), name(&method).into()];
            if method["needs_base"] == true {
                args.extend(["--base".into(), text(&saved.base)]);
            }
            for model in &saved.models[..taken(&method, 3)] {
                args.extend(["--model".into(), text(model)]);
            }
            args.extend(statistics::args(name(&method), &saved.models[..taken(&method, 3)]));
            smallest(tiesmith(args).refusal())
        };
        let memory = format!("--memory={refused}");
        let planned = run("plan", &method, &family, &["--json", &memory]).0.json();
        let report = run("merge", &method, &family, &[&memory]).0.json();
        let (planned_bytes, read) = (planned["bytes_read"].as_u64().unwrap(), report["bytes_read"].as_u64().unwrap());
        let passes: Vec<&str> =
            planned["passes"].as_array().unwrap().iter().map(|pass| pass["name"].as_str().unwrap()).collect();
        looking += usize::from(passes.contains(&"gather"));
        // A look that settles a rank at once spares the second.
        assert!(read <= planned_bytes && 2 * read > planned_bytes, "{}: {read} of {planned_bytes}", name(&method));
        let ranks = ["sce", "arcee_fusion"].contains(&name(&method)) || passes.contains(&"probe");
        assert!(ranks || read == planned_bytes, "{}: {read} of {planned_bytes}", name(&method));
        let peak = report["peak_memory_bytes"].as_u64().unwrap_or(0);
        assert!(peak <= refused.parse().unwrap(), "{}: a peak of {peak} bytes", name(&method));
    }
    assert!(looking >= 6, "only {looking} methods looked");
}

#[test]
fn stored_types_are_widened_before_anything_else() {
    // bf16 inputs that are the same numbers as f32 inputs give the same merge.
    let spec = Spec { base: Dtype::BF16, models: vec![Dtype::BF16; 3], ..Spec::default() };
    let narrow = spec.family();
    let widen = |tensors: &Tensors| -> Tensors { tensors.iter().map(|(n, t)| (n.clone(), t.to(Dtype::F32))).collect() };
    let wide = Family {
        base: widen(&narrow.base),
        models: narrow.models.iter().map(widen).collect(),
        signs: widen(&narrow.signs),
    };
    for method in methods() {
        let merged = merge(&method, &narrow, &["--dtype=float32"]);
        assert!(merged == merge(&method, &wide, &[]), "{}", name(&method));
    }
}

/// `merge` with `method` into `out`, in small windows; with `blocks`, files may not become longer than so many KiB.
#[cfg(unix)]
fn merge_limited(method: &Value, saved: &Saved, out: &str, blocks: Option<u32>) -> Outcome {
    let mut merge = command();
    merge.args(["merge", "--method", name(method), "--max-shard-size=50KB", "--threads=2", "--memory=34MB"]);
    merge.args(["--json", "--progress=none", "--out", &text(&saved.path(out))]);
    if method["needs_base"] == true {
        merge.args(["--base", &text(&saved.base)]);
    }
    for model in &saved.models[..taken(method, 3)] {
        merge.args(["--model", &text(model)]);
    }
    merge.args(statistics::args(name(method), &saved.models[..taken(method, 3)]));
    let Some(blocks) = blocks else { return run_command(merge) };
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", &format!("ulimit -f {blocks}; exec \"$@\""), "sh"]);
    shell.arg(merge.get_program()).args(merge.get_args());
    run_command(shell)
}

#[cfg(unix)]
#[test]
fn an_interrupted_merge_goes_on_to_the_same_bytes() {
    // The last tensor is longer than files may become, and than a window.
    let shapes = [("a", vec![100, 100]), ("b", vec![11_000]), ("z", vec![701, 300])];
    let saved = Spec { shapes: shapes.to_vec(), ..Spec::default() }.family().save();
    for method in methods() {
        let (clean, out) = (format!("{}-clean", name(&method)), name(&method).to_owned());
        merge_limited(&method, &saved, &clean, None).succeeded();
        let failed = merge_limited(&method, &saved, &out, Some(800));
        assert_eq!(failed.code, Some(1), "{}\n{}", failed.command, failed.stderr);
        let report = merge_limited(&method, &saved, &out, None).succeeded().json();
        assert_eq!(report["resumed"], true, "{out}");
        let tensors = |out: &str| read_checkpoint(saved.path(out).as_path());
        assert!(tensors(&clean) == tensors(&out), "{out} differs after an interruption");
    }
}

#[test]
fn what_a_method_cannot_take_is_said() {
    let saved = family().save();
    let message = |flags: &[&str], models: usize| {
        let mut args = vec!["plan".to_owned()];
        saved.models[..models].iter().for_each(|model| args.extend(["--model".into(), text(model)]));
        args.extend(flags.iter().map(|flag| (*flag).to_owned()));
        tiesmith(args).refusal().to_owned()
    };
    let base = format!("--base={}", text(&saved.base));
    let cases: [(&[&str], usize, &str); 7] = [
        (&["--method=slerp"], 3, "slerp"),
        (&["--method=slerp"], 1, "slerp"),
        (&["--method=nearswap", &base], 2, "nearswap"),
        (&["--method=model_stock", &base], 1, "model_stock"),
        (&["--method=dare_ties"], 2, "dare_ties works on task vectors and needs a base"),
        (&["--method=della", &base, "--param=epsilon=1.5"], 2, "epsilon"),
        (&["--method=karcher", "--param=max_itr=3"], 2, "did you mean 'max_iter'?"),
    ];
    for (flags, models, expected) in cases {
        let found = message(flags, models);
        assert!(found.contains(expected), "{flags:?}: {found}");
    }
    let twice = message(&[&base, "--density=0.3", "--param=density=0.4"], 2);
    assert!(twice.contains("density is given twice"), "{twice}");
}
