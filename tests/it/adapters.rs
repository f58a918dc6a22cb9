//! PEFT adapters as inputs: against what PEFT itself merges, and against models with the adapter merged in by hand.

use std::fs;
use std::path::Path;

use safetensors::Dtype;
use serde_json::json;

use crate::support::adapters::{Adapter, PREFIX, recipes};
use crate::support::family::{Family, Saved, Spec, text};
use crate::support::files::{Layout, read_checkpoint, write_checkpoint};
use crate::support::oracle::{self, Method, Recipe, Scope};
use crate::support::random::Random;
use crate::support::repository;
use crate::support::run::{Outcome, tiesmith};
use crate::support::tensor::{Tensor, Tensors, differences, tensors};

const GOLDEN: [&str; 4] = ["lora", "rslora", "conv1d", "ia3"];

fn golden(name: &str) -> String {
    text(&repository("tests/golden/peft").join(name))
}

#[test]
fn what_peft_merges() {
    for adapter in GOLDEN {
        let dir = tempfile::tempdir().unwrap();
        let out = text(&dir.path().join("out"));
        let input = format!("{}+{}", golden("base"), golden(adapter));
        let merge = ["merge", "--method", "linear", "--model", &input, "--out", &out];
        tiesmith(merge).succeeded();
        let expected = read_checkpoint(Path::new(&golden(&format!("{adapter}-merged"))));
        let actual = read_checkpoint(Path::new(&out));
        assert!(expected.keys().eq(actual.keys()), "{adapter}");
        let mut changed = 0;
        let base = read_checkpoint(Path::new(&golden("base")));
        for (name, expected) in &expected {
            let actual = &actual[name];
            assert_eq!((actual.dtype, &actual.shape), (expected.dtype, &expected.shape), "{adapter}: {name}");
            for (x, y) in actual.values().iter().zip(expected.values()) {
                assert!((x - y).abs() <= 2e-6 * (1.0 + y.abs()), "{adapter}: {name}: {x} for {y}");
            }
            changed += usize::from(base[name].bytes != expected.bytes);
        }
        assert!(changed >= 2, "{adapter} changes something");
        // The same seen by other verbs.
        tiesmith(["diff", &input, &golden(&format!("{adapter}-merged")), "--atol", "1e-5"]).succeeded();
        let differs = tiesmith(["diff", &input, &golden("base"), "--atol", "1e-5"]);
        assert_eq!(differs.code, Some(1), "{}", differs.stdout);
        tiesmith(["inspect", &input, "--stats"]).succeeded();
    }
}

/// A base in bf16 with two adapters on it, and the models that they make.
struct Adapted {
    saved: Saved,
    adapters: Vec<Adapter>,
    /// Base and the models with their adapters merged in.
    family: Family,
}

fn adapted(dtype: Dtype) -> Adapted {
    let spec = Spec {
        shapes: vec![("embed.weight", vec![16, 9]), ("a.weight", vec![150, 530]), ("b.weight", vec![64, 7])],
        base: dtype,
        models: Vec::new(),
        ..Spec::default()
    };
    let mut random = Random::new(5);
    let first = Adapter::lora(8, 16.0).with(&mut random, "a", (530, 150), Dtype::F32).with(
        &mut random,
        "b",
        (7, 64),
        Dtype::F32,
    );
    let second = Adapter::lora(5, 4.0).with(&mut random, "a", (530, 150), Dtype::BF16);
    let third = Adapter::lora(70, 7.0).with(&mut random, "a", (530, 150), Dtype::F16);
    let mut family = spec.family();
    let adapters = vec![first, second, third];
    let saved = family.save();
    for (i, adapter) in adapters.iter().enumerate() {
        adapter.write(&saved.path(&format!("adapter{i}")));
    }
    family.models = adapters.iter().map(|adapter| adapter.merged_into(&family.base)).collect();
    Adapted { saved, adapters, family }
}

impl Adapted {
    fn merge(&self, recipe: &Recipe, alone: bool, extra: &[&str]) -> Tensors {
        let dir = tempfile::tempdir().unwrap();
        let out = text(&dir.path().join("out"));
        let base = text(&self.saved.base);
        let mut args = vec!["merge".to_owned(), "--base".into(), base.clone(), "--out".into(), out.clone()];
        for i in 0..self.adapters.len() {
            let adapter = text(&self.saved.path(&format!("adapter{i}")));
            args.extend(["--model".into(), if alone { adapter } else { format!("{base}+{adapter}") }]);
        }
        args.extend(recipe.args());
        args.extend(extra.iter().map(|arg| (*arg).to_owned()));
        tiesmith(args).succeeded();
        read_checkpoint(Path::new(&out))
    }
}

#[test]
fn task_vectors_of_adapters_are_those_of_merged_models() {
    for dtype in [Dtype::BF16, Dtype::F32, Dtype::F16] {
        let adapted = adapted(dtype);
        let ties = Recipe { density: 0.3, ..Recipe::default() };
        let recipes = [
            ties.clone(),
            Recipe { scope: Scope::Tensor, ..ties.clone() },
            Recipe { method: Method::TaskArithmetic, ..ties.clone() },
            Recipe { method: Method::Linear, ..ties },
        ];
        for recipe in recipes {
            let expected = adapted.family.expected(&recipe).tensors;
            // The output is in base's type, though what is merged is in float32.
            for alone in [false, true] {
                let found = differences(&expected, &adapted.merge(&recipe, alone, &[]));
                assert!(found.is_empty(), "{dtype:?} {:?}\n{found}", recipe.args());
            }
            let cut = ["--threads=3", "--memory=40MB", "--io=mmap"];
            let found = differences(&expected, &adapted.merge(&recipe, true, &cut));
            assert!(found.is_empty(), "{found}");
        }
    }
}

#[test]
fn a_recipe_file_names_adapters_as_mergekit_does() {
    let adapted = adapted(Dtype::F32);
    let at = |name: &str| text(&adapted.saved.path(name));
    let (base, one, two, three) = (at("base"), at("adapter0"), at("adapter1"), at("adapter2"));
    let recipe = format!(
        "merge_method: task_arithmetic\nbase_model: {base}\nparameters: {{lambda: 1.0}}\nmodels:\n\
         - model: {base}+{one}\n  parameters: {{weight: 1}}\n\
         - model: {{model: {{path: {base}}}, lora: {{path: {two}}}}}\n  parameters: {{weight: 1}}\n\
         - model: {three}\n  parameters: {{weight: 1}}\n"
    );
    let file = adapted.saved.path("recipe.yml");
    fs::write(&file, recipe).unwrap();
    let out = adapted.saved.path("out");
    tiesmith(["merge", &text(&file), "--out", &text(&out)]).succeeded();
    let expected = adapted.merge(&Recipe { method: Method::TaskArithmetic, ..Recipe::default() }, false, &[]);
    assert_eq!(differences(&expected, &read_checkpoint(&out)), "");
}

#[test]
fn an_adapter_on_a_model_that_is_no_base_keeps_its_stored_type() {
    let adapted = adapted(Dtype::BF16);
    let input = format!("{}+{}", text(&adapted.saved.base), text(&adapted.saved.path("adapter0")));
    let out = text(&adapted.saved.path("out"));
    tiesmith(["merge", "--method", "linear", "--model", &input, "--out", &out]).succeeded();
    let merged = read_checkpoint(Path::new(&out));
    assert!(merged.values().all(|tensor| tensor.dtype == Dtype::BF16));
    let model = &adapted.family.models[0];
    let rounded: Tensors = model.iter().map(|(name, tensor)| (name.clone(), tensor.to(Dtype::BF16))).collect();
    assert_eq!(differences(&rounded, &merged), "");
}

#[test]
fn adapters_that_cannot_be_used_are_one_line_each() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| text(&dir.path().join(name));
    let model = tensors([("w.weight", Tensor::floats(Dtype::F32, &[4, 2], &[1.0; 8]))]);
    write_checkpoint(&dir.path().join("base"), &model, Layout::SINGLE);
    let good = || Adapter::lora(2, 4.0).with(&mut Random::new(1), "w", (2, 4), Dtype::F32);
    let mut cases: Vec<(&str, Adapter, &str)> = Vec::new();
    let mut case = |name, edit: &dyn Fn(&mut Adapter), message| {
        let mut adapter = good();
        edit(&mut adapter);
        cases.push((name, adapter, message));
    };
    case("dora", &|a| a.config["use_dora"] = true.into(), "DoRA");
    case("loha", &|a| a.config["peft_type"] = "LOHA".into(), "peft_type LOHA is not supported");
    case("rank", &|a| a.config["r"] = 3.into(), "rank 3");
    case("other", &|a| *a = Adapter::lora(2, 4.0).with(&mut Random::new(1), "v", (2, 4), Dtype::F32), "v.weight");
    case("shape", &|a| *a = Adapter::lora(2, 4.0).with(&mut Random::new(1), "w", (3, 4), Dtype::F32), "does not fit");
    case(
        "ints",
        &|a| {
            let name = format!("{PREFIX}w.lora_A.weight");
            a.tensors.insert(name, Tensor::raw(Dtype::I32, &[2, 2], vec![0; 16]));
        },
        "has type I32",
    );
    case(
        "nan",
        &|a| {
            let name = format!("{PREFIX}w.lora_A.weight");
            a.tensors.insert(name, Tensor::floats(Dtype::F32, &[2, 2], &[0.0, f32::NAN, 0.0, 0.0]));
        },
        "nan/adapter_model.safetensors: tensor \"w.weight\"",
    );
    case("newer", &|a| a.config["use_something"] = json!("yes"), "option use_something");
    case(
        "twice",
        &|a| {
            // Without their outer modules, both are "w".
            let lora = Adapter::lora(2, 4.0);
            *a = ["x.w", "y.w"].iter().fold(lora, |a, m| a.with(&mut Random::new(1), m, (2, 4), Dtype::F32));
        },
        "mean the same part of the model",
    );
    for (name, adapter, message) in cases {
        adapter.write(&dir.path().join(name));
        for input in [format!("{}+{}", at("base"), at(name)), at(name)] {
            let out = at("out");
            let outcome = tiesmith(["merge", "--base", &at("base"), "--model", &input, "--out", &out]);
            let line = outcome.refusal();
            assert!(line.contains(message), "{name}: {line}");
            assert!(!dir.path().join("out").exists(), "{name}: something was written");
        }
    }
    good().write(&dir.path().join("good"));
    let refused = |spec: &str, message: &str| {
        let outcome = tiesmith(["inspect", spec]);
        assert!(outcome.refusal().contains(message), "{spec}: {}", outcome.stderr);
    };
    refused(&at("good"), "MODEL+ADAPTER");
    refused(&format!("{}+{}", at("none"), at("good")), "no such file or directory");
    refused(&format!("{}+{}", at("base"), at("base")), "no adapter_config.json");
    fs::remove_file(dir.path().join("good/adapter_model.safetensors")).unwrap();
    refused(&at("good"), "MODEL+ADAPTER");
    refused(&format!("{}+{}", at("base"), at("good")), "no adapter_model.safetensors beside");
    fs::remove_file(dir.path().join("good/adapter_config.json")).unwrap();
    fs::write(dir.path().join("good/adapter_model.safetensors"), b"").unwrap();
    refused(&at("good"), "without its adapter_config.json");
}

/// Adapters in a directory, merged with each other.
fn merge_alone(adapters: &[Adapter], recipe: &Recipe, extra: &[&str]) -> (tempfile::TempDir, Outcome) {
    let dir = tempfile::tempdir().unwrap();
    let mut args = vec!["merge".to_owned(), "--out".into(), text(&dir.path().join("out"))];
    for (i, adapter) in adapters.iter().enumerate() {
        let path = dir.path().join(format!("adapter{i}"));
        adapter.write(&path);
        args.extend(["--model".into(), text(&path)]);
    }
    args.extend(recipe.args());
    args.extend(extra.iter().map(|arg| (*arg).to_owned()));
    (dir, tiesmith(args))
}

/// What the oracle makes of adapters as models of a base of one number.
fn merged_by_hand(models: &[Tensors], base: f32, recipe: &Recipe) -> Tensors {
    let filled = |tensor: &Tensor| Tensor::floats(Dtype::F32, &tensor.shape, &vec![base; tensor.elements()]);
    let base: Tensors = models[0].iter().map(|(name, tensor)| (name.clone(), filled(tensor))).collect();
    let expected = oracle::merge(&base, models, None, recipe).tensors;
    expected.into_iter().map(|(name, tensor)| (name.clone(), tensor.to(models[0][&name].dtype))).collect()
}

#[test]
fn ia3_adapters_merge_into_an_adapter() {
    let mut random = Random::new(11);
    let adapters: Vec<Adapter> = (0..3).map(|_| Adapter::ia3(&mut random, &[("a", 150), ("b", 64)])).collect();
    let models: Vec<Tensors> = adapters.iter().map(|adapter| adapter.tensors.clone()).collect();
    for recipe in recipes() {
        let (dir, outcome) = merge_alone(&adapters, &recipe, &["--json"]);
        outcome.succeeded();
        let merged = Adapter::read(&dir.path().join("out"));
        assert_eq!(differences(&merged_by_hand(&models, 1.0, &recipe), &merged.tensors), "", "{:?}", recipe.args());
        assert_eq!(merged.config, adapters[0].config);
    }
}

#[test]
fn lora_factors_of_one_rank_merge_into_an_adapter() {
    let mut random = Random::new(12);
    let mut adapter = |alpha: f64, dtype| {
        Adapter::lora(4, alpha).with(&mut random, "a", (530, 150), dtype).with(&mut random, "b", (7, 64), dtype)
    };
    // The second is scaled by twice the first's factor: its B counts twice.
    let adapters = [adapter(8.0, Dtype::BF16), adapter(16.0, Dtype::F32), adapter(8.0, Dtype::F16)];
    let mut models: Vec<Tensors> = adapters.iter().map(|adapter| adapter.tensors.clone()).collect();
    for (_, tensor) in models[1].iter_mut().filter(|(name, _)| name.contains("lora_B")) {
        let doubled: Vec<f32> = tensor.f32s().iter().map(|value| value * 2.0).collect();
        *tensor = Tensor::floats(Dtype::F32, &tensor.shape.clone(), &doubled);
    }
    for recipe in recipes() {
        let (dir, outcome) = merge_alone(&adapters, &recipe, &["--threads=1"]);
        outcome.succeeded();
        let out = dir.path().join("out");
        let merged = Adapter::read(&out);
        assert_eq!(differences(&merged_by_hand(&models, 0.0, &recipe), &merged.tensors), "", "{:?}", recipe.args());
        assert_eq!(merged.config, adapters[0].config);
        assert!(!out.join("model.safetensors").exists() && !out.join(".tiesmith").exists());
        let (other, outcome) = merge_alone(&adapters, &recipe, &["--threads=3", "--memory=40MB", "--io=mmap"]);
        outcome.succeeded();
        assert!(Adapter::read(&other.path().join("out")).tensors == merged.tensors);
        // It is a finished output, and an adapter like any other.
        tiesmith(["verify", &text(&out)]).succeeded();
        let again = merge_alone(&adapters[..1], &recipe, &["--out", &text(&out)]).1;
        assert!(again.refusal().contains("--force"), "{}", again.stderr);
        let model = adapted(Dtype::F32);
        tiesmith(["inspect", &format!("{}+{}", text(&model.saved.base), text(&out)), "--stats"]).succeeded();
    }
}

#[test]
fn adapters_that_do_not_go_together_are_one_line() {
    let mut random = Random::new(13);
    let lora = |rank: usize, random: &mut Random| Adapter::lora(rank, 8.0).with(random, "a", (5, 6), Dtype::F32);
    let four = lora(4, &mut random);
    let ia3 = Adapter::ia3(&mut random, &[("a", 6)]);
    let mut whole = four.clone();
    whole.tensors.insert(format!("{PREFIX}head.weight"), Tensor::vector(&[1.0; 3]));
    let more = four.clone().with(&mut random, "b", (5, 6), Dtype::F32);
    let refused = |adapters: &[&Adapter], flags: &[&str], message: &str| {
        let adapters: Vec<Adapter> = adapters.iter().map(|adapter| (*adapter).clone()).collect();
        let (dir, outcome) = merge_alone(&adapters, &Recipe::default(), flags);
        let line = outcome.refusal();
        assert!(line.contains(message), "{line}");
        assert!(!dir.path().join("out").exists());
    };
    refused(&[&ia3, &ia3], &["--rank=4"], "has no rank");
    refused(&[&whole, &four], &["--rank=4"], "a whole tensor, which has no factors");
    refused(&[&four, &four], &["--rank=0"], "a rank is expected");
    refused(&[&four, &four], &["--rank=4", "--memory=9MB"], "at least");
    let wide = Adapter::lora(3, 8.0).with(&mut random, "a", (9, 6), Dtype::F32);
    refused(&[&four, &wide], &[], "factors of shapes [3, 9] and [6, 3], but [4, 5] and [6, 4]");
    refused(&[&four, &ia3], &[], "is LoRA, but");
    refused(&[&whole, &four], &[], "a whole tensor, whose base is not known");
    refused(&[&more, &four], &[], "does not have it");
    refused(&[&four, &four], &["--sign-from=x"], "needs a base checkpoint");
}
