//! Output bytes are a function of the recipe and the inputs, and of nothing else.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::PathBuf;

use safetensors::Dtype;
use serde_json::Value;
use tempfile::TempDir;

use crate::remote::{Kind, Remote, kinds, lasting};

use crate::support::family::{Deltas, Family, Output, Saved, Spec, text};
use crate::support::files::{Layout, read_tree};
use crate::support::oracle::{Method, Recipe, Scope, TrimTies, ZeroSum};
use crate::support::run::{Outcome, run, tiesmith};
use crate::support::statistics;

/// A family, and the places that it can be read from over a network: each call is for the next of them.
struct Places {
    remote: Remote,
    kinds: Vec<Kind>,
    calls: Cell<usize>,
    _cache: TempDir,
}

impl Places {
    fn of(saved: Saved) -> Self {
        let (remote, cache) = (Remote::of_saved(saved), tempfile::tempdir().unwrap());
        let mut kinds = kinds(&remote, cache.path());
        kinds.retain(|(kind, ..)| *kind != "files");
        Self { remote, kinds, calls: Cell::default(), _cache: cache }
    }

    fn next(&self) -> &Kind {
        &self.kinds[self.calls.replace(self.calls.get() + 1) % self.kinds.len()]
    }

    /// What [`Saved::merge`] makes, from the next place; and which that is.
    fn merge(&self, recipe: &Recipe, flags: &[&str]) -> (&'static str, BTreeMap<PathBuf, Vec<u8>>) {
        let (kind, name, more) = self.next();
        let name = |short: &str| match short.strip_prefix("model") {
            Some(number) => name(short) + &recipe.model_suffix(number.parse::<usize>().unwrap() - 1),
            None => name(short),
        };
        let dir = tempfile::tempdir().unwrap();
        let (out, args) = (dir.path().join("out"), recipe.args());
        let path = text(&out);
        let all = args.iter().chain(more).map(|flag| &**flag).chain(flags.iter().copied()).chain(["--out", &path]);
        self.remote.merge("merge", &name, &all.collect::<Vec<_>>()).succeeded();
        (kind, lasting(&out))
    }

    /// What [`merge_by`] makes, from the next place; and which that is.
    fn merge_by(&self, method: &Value, isa: &str, flags: &[&str]) -> (&'static str, BTreeMap<PathBuf, Vec<u8>>) {
        let (kind, name, more) = self.next();
        let more: Vec<&str> = more.iter().map(|flag| &**flag).collect();
        (kind, self.merge_from(method, name, isa, &[flags, &more].concat()))
    }

    /// The same from inputs that are called `name`.
    fn merge_from(
        &self,
        method: &Value,
        name: &dyn Fn(&str) -> String,
        isa: &str,
        flags: &[&str],
    ) -> BTreeMap<PathBuf, Vec<u8>> {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let path = text(&out);
        let flags = [flags, &["--progress=none", "--out", &path]].concat();
        let mut command = self.remote.command();
        command.env("TIESMITH_ISA", isa).args(arguments("merge", &self.remote.saved, method, name, &flags));
        run(command).succeeded();
        lasting(&out)
    }
}

/// Everything in an output but the manifest, which also records how long the run took.
fn bytes(output: &Output) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = read_tree(&output.path);
    files.remove(&PathBuf::from("tiesmith.json")).expect("an output has a manifest");
    files
}

/// Large enough for several chunks of work per tensor, with ties.
fn family() -> Family {
    let spec = Spec {
        seed: 9,
        shapes: vec![("a", vec![300, 257]), ("b", vec![70_001]), ("c", vec![3]), ("d", vec![])],
        base: Dtype::BF16,
        models: vec![Dtype::BF16, Dtype::F32, Dtype::BF16],
        deltas: Deltas::Stepped,
    };
    spec.family()
}

pub fn recipes() -> Vec<(Recipe, &'static [&'static str])> {
    let ties = Recipe::default();
    vec![
        (ties.clone(), &[]),
        (Recipe { trim_ties: TrimTies::Lowest, zero_sum: ZeroSum::Majority, ..ties.clone() }, &[]),
        (Recipe { scope: Scope::Tensor, trim_ties: TrimTies::Lowest, ..ties.clone() }, &[]),
        (ties.clone(), &["--trim-ties=sample", "--seed=7"]),
        (ties.clone(), &["--threshold=sketch"]),
        (Recipe { method: Method::Linear, ..ties.clone() }, &[]),
        (Recipe { method: Method::TaskArithmetic, ..ties }, &[]),
    ]
}

#[test]
fn how_a_run_is_done_changes_no_byte() {
    let runs: [&[&str]; 6] = [
        &["--threads=1"],
        &["--threads=2", "--memory=64MB"],
        &["--threads=7", "--memory=2GiB"],
        &["--io=mmap", "--memory=64MB"],
        &["--io=read"],
        &["--io=auto"],
    ];
    let saved = family().save();
    for (recipe, flags) in recipes() {
        let merged = |run: &[&str]| {
            let output = saved.merge(&recipe, &[flags, run].concat());
            (bytes(&output), output.outcome.command)
        };
        let (first, command) = merged(runs[0]);
        for run in &runs[1..] {
            let (other, other_command) = merged(run);
            let differing: Vec<_> =
                first.keys().chain(other.keys()).filter(|path| first.get(*path) != other.get(*path)).collect();
            assert!(differing.is_empty(), "{differing:?} differ between\n{command}\n{other_command}");
        }
    }
}

#[test]
fn the_largest_shard_changes_only_the_sharding() {
    let places = Places::of(family().save());
    let saved = &places.remote.saved;
    for (recipe, flags) in recipes() {
        let merged = |size: &str| saved.merge(&recipe, &[flags, &["--max-shard-size", size]].concat());
        let whole = merged("5GB");
        assert!(whole.path.join("model.safetensors").exists());
        for size in ["200KB", "1B"] {
            let split = merged(size);
            assert!(split.path.join("model.safetensors.index.json").exists());
            split.must_equal(&whole.tensors());
            let (kind, far) = places.merge(&recipe, &[flags, &["--max-shard-size", size]].concat());
            assert!(far == lasting(&split.path), "{kind}: {}", split.outcome.command);
        }
    }
}

#[test]
fn the_layout_of_inputs_changes_no_tensor() {
    let family = family();
    let layouts: [fn(usize) -> Layout; 4] = [
        |_| Layout::SINGLE,
        |_| Layout::sharded(4, 0),
        |checkpoint| Layout::sharded(1 + checkpoint % 4, 31 + checkpoint as u64),
        |checkpoint| Layout { shards: 1, order: 5 + checkpoint as u64 },
    ];
    let places = layouts.map(|layout| Places::of(family.save_as(layout)));
    for (recipe, flags) in recipes() {
        let mut outputs = places.iter().map(|places| {
            let near = places.remote.saved.merge(&recipe, flags);
            let (kind, far) = places.merge(&recipe, flags);
            assert!(far == lasting(&near.path), "{kind}: {}", near.outcome.command);
            near.tensors()
        });
        let first = outputs.next().unwrap();
        for (other, n) in outputs.zip(1..) {
            assert!(first == other, "layout {n} differs: {:?} {flags:?}", recipe.args());
        }
    }
}

#[test]
fn small_tensors_give_the_same_bytes_again() {
    let places = Places::of(Family::adversarial().save());
    let merged = || places.remote.saved.merge(&Recipe::default(), &[]);
    assert_eq!(bytes(&merged()), bytes(&merged()));
    let near = lasting(&merged().path);
    for _ in &places.kinds {
        let (kind, far) = places.merge(&Recipe::default(), &[]);
        assert_eq!(far, near, "{kind}");
    }
}

/// `VERB` with a method on as many of `saved`'s models as it takes, with its defaults.
fn run_by(verb: &str, saved: &Saved, method: &Value, extra: &[&str]) -> Outcome {
    tiesmith(arguments(verb, saved, method, &|name| text(&saved.path(name)), extra))
}

/// The arguments of [`run_by`], with inputs that are called `name`.
fn arguments(
    verb: &str,
    saved: &Saved,
    method: &Value,
    name_of: &dyn Fn(&str) -> String,
    extra: &[&str],
) -> Vec<String> {
    let name = method["name"].as_str().unwrap();
    let most = method["models"]["max"].as_u64().unwrap_or(u64::MAX).min(saved.models.len() as u64) as usize;
    let mut args = vec![verb.to_owned(), "--method".into(), name.into()];
    if method["needs_base"] == true {
        args.extend(["--base".into(), name_of("base")]);
    }
    for number in 1..=most {
        args.extend(["--model".into(), name_of(&format!("model{number}"))]);
    }
    args.extend(statistics::args(name, &saved.models[..most]));
    args.extend(extra.iter().map(|arg| (*arg).to_owned()));
    args
}

/// What the refusal of too small a budget says is needed, in bytes.
fn smallest_memory(saved: &Saved, method: &Value, scope: &str) -> u64 {
    let outcome = run_by("plan", saved, method, &["--memory=1MB", scope]);
    let (_, rest) = outcome.refusal().split_once("at least ").expect("the smallest memory");
    rest.split(' ').next().unwrap().parse().unwrap()
}

fn merge_by(saved: &Saved, method: &Value, run: &[&str]) -> BTreeMap<PathBuf, Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let out = text(&dir.path().join("out"));
    run_by("merge", saved, method, &[run, &["--progress=none", "--out", &out]].concat()).succeeded();
    let mut files = read_tree(dir.path().join("out").as_path());
    files.remove(&PathBuf::from("tiesmith.json")).expect("an output has a manifest");
    files
}

#[test]
fn no_method_depends_on_how_a_run_is_done() {
    // Tensors that do not fit into the smallest windows, so that they are read in chunks.
    let spec = Spec {
        shapes: vec![("a", vec![100, 257]), ("b", vec![201, 299]), ("c", vec![3]), ("d", vec![20_001])],
        ..Spec::default()
    };
    let places = Places::of(spec.family().save());
    let saved = &places.remote.saved;
    for method in tiesmith(["methods", "--json"]).succeeded().json()["methods"].as_array().unwrap() {
        for scope in ["--scope=model", "--scope=tensor"] {
            if scope == "--scope=tensor" && method["trims"] != true {
                continue;
            }
            // Where scopes are the same, the second round is for another rescaling.
            let rescale = if method["draws"] == true && scope == "--scope=tensor" { "l1" } else { "density" };
            let rescale = format!("--param=rescale={rescale}");
            let scope = if method["draws"] == true { &*rescale } else { scope };
            let mut first = merge_by(saved, method, &[scope, "--threads=1"]);
            let smallest = format!("--memory={}", smallest_memory(saved, method, scope));
            for run in [&["--threads=2", &smallest][..], &["--threads=3", "--io=mmap"]] {
                let other = merge_by(saved, method, &[&[scope], run].concat());
                assert!(first == other, "{}: {scope} {run:?}", method["name"]);
            }
            first.remove(&PathBuf::from("README.md"));
            let (kind, far) = places.merge_by(method, "", &[scope, "--threads=2", "--memory=56MB"]);
            assert!(first == far, "{}: {scope}, {kind}", method["name"]);
        }
    }
}

#[test]
fn sums_of_what_is_kept_do_not_depend_on_how_a_run_is_done() {
    // Massive ties, in tensors that are read in chunks.
    let places = Places::of(family().save());
    let saved = &places.remote.saved;
    let methods = tiesmith(["methods", "--json"]).succeeded().json();
    for name in ["ties", "breadcrumbs"] {
        let method = methods["methods"].as_array().unwrap().iter().find(|method| method["name"] == name).unwrap();
        let mut different = Vec::new();
        for ties in ["--trim-ties=lowest", "--trim-ties=keep", "--trim-ties=sample"] {
            let flags = ["--scope=tensor", "--density=0.3", "--param=rescale=l1", ties];
            let first = merge_by(saved, method, &[&flags[..], &["--threads=1"]].concat());
            let smallest = run_by("plan", saved, method, &[&flags[..], &["--memory=1MB"]].concat());
            let smallest = smallest.refusal().split_once("at least ").unwrap().1.split(' ').next().unwrap().to_owned();
            let smallest = format!("--memory={smallest}");
            for run in [&["--threads=2", &smallest][..], &["--threads=3", "--io=mmap"], &["--memory=40MB"]] {
                assert!(first == merge_by(saved, method, &[&flags[..], run].concat()), "{name} {ties} {run:?}");
            }
            let (kind, mut far) =
                places.merge_by(method, "", &[&flags[..], &["--threads=2", "--memory=48MB"]].concat());
            far.insert(PathBuf::from("README.md"), first[&PathBuf::from("README.md")].clone());
            assert!(first == far, "{name} {ties} {kind}");
            assert!(!different.contains(&first), "{ties}");
            different.push(first);
        }
    }
    let mut nuslerp = methods["methods"].as_array().unwrap().iter().find(|m| m["name"] == "nuslerp").unwrap().clone();
    nuslerp["needs_base"] = true.into();
    let flags = ["--param=nuslerp_flatten=false", "--param=nuslerp_row_wise=true"];
    let first = merge_by(saved, &nuslerp, &[&flags[..], &["--threads=1"]].concat());
    for run in [&["--threads=2", "--memory=30MB"][..], &["--threads=3", "--io=mmap"]] {
        assert!(first == merge_by(saved, &nuslerp, &[&flags[..], run].concat()), "nuslerp {run:?}");
    }
    let refused = run_by("plan", saved, &methods["methods"][0], &["--param=rescale=l1"]);
    assert!(refused.refusal().contains("use --scope tensor"), "{}", refused.refusal());
}

#[test]
fn no_method_depends_on_the_instruction_set() {
    let spec = Spec { shapes: vec![("a", vec![100, 257]), ("b", vec![3]), ("c", vec![9_001])], ..Spec::default() };
    let places = Places::of(spec.family().save());
    let near = |name: &str| text(&places.remote.saved.path(name));
    for method in tiesmith(["methods", "--json"]).succeeded().json()["methods"].as_array().unwrap() {
        // One that this CPU does not have is not used: then the widest is.
        let [baseline, widest] = ["baseline", "avx512"].map(|isa| places.merge_from(method, &near, isa, &[]));
        let (kind, far) = places.merge_by(method, "avx2", &[]);
        assert!(baseline == widest && baseline == far, "{}: {kind}", method["name"]);
    }
}
