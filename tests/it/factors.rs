//! LoRA adapters of any ranks, merged with each other through the changes that they make: against the merge of those
//! changes written out, and the best approximation of its rank by an f64 decomposition.

use std::fs;
use std::path::Path;

use safetensors::Dtype;
use serde_json::json;

use crate::support::adapters::{Adapter, PREFIX, recipes};
use crate::support::family::text;
use crate::support::files::read_json;
use crate::support::oracle::{self, Method, Recipe};
use crate::support::random::Random;
use crate::support::run::{Outcome, tiesmith};
use crate::support::tensor::{Tensor, Tensors};

/// Modules of the test's model: name, inputs, outputs.
const MODULES: [(&str, usize, usize); 3] = [("a", 70, 45), ("b", 7, 64), ("c", 160, 150)];

fn adapters() -> Vec<Adapter> {
    let mut random = Random::new(77);
    let mut adapter = |rank: usize, alpha: f64, dtype, modules: &[usize]| {
        modules.iter().fold(Adapter::lora(rank, alpha), |adapter, &number| {
            let (module, inputs, outputs) = MODULES[number];
            adapter.with(&mut random, module, (inputs, outputs), dtype)
        })
    };
    vec![
        adapter(4, 8.0, Dtype::F32, &[0, 1, 2]),
        adapter(7, 7.0, Dtype::F32, &[0, 1, 2]),
        adapter(2, 5.0, Dtype::BF16, &[0, 2]),
    ]
}

/// What each adapter changes, as a model whose base is zero.
fn changes(adapter: &Adapter) -> Tensors {
    let scale = adapter.config["lora_alpha"].as_f64().unwrap() / adapter.config["r"].as_f64().unwrap();
    let change = |&(module, inputs, outputs): &(&str, usize, usize)| {
        let there = adapter.tensors.contains_key(&format!("{PREFIX}{module}.lora_A.weight"));
        let values = if there { adapter.change(module, scale as f32).2 } else { vec![0.0; inputs * outputs] };
        (format!("{module}.weight"), Tensor::floats(Dtype::F32, &[outputs, inputs], &values))
    };
    MODULES.iter().map(change).collect()
}

fn merge_into(dir: &Path, adapters: &[Adapter], recipe: &Recipe, extra: &[&str]) -> Outcome {
    let mut args = vec!["merge".to_owned(), "--out".into(), text(&dir.join("out"))];
    for (i, adapter) in adapters.iter().enumerate() {
        let path = dir.join(format!("adapter{i}"));
        adapter.write(&path);
        args.extend(["--model".into(), text(&path)]);
    }
    args.extend(recipe.args());
    args.extend(extra.iter().map(|arg| (*arg).to_owned()));
    tiesmith(args)
}

/// Squared singular values of a matrix, the largest first: the eigenvalues of the product with itself, by rotations.
fn squared_singular_values(matrix: &[f32], rows: usize, columns: usize) -> Vec<f64> {
    let at = |i: usize, j: usize| f64::from(matrix[i * columns + j]);
    let n = rows.min(columns);
    let product = |i: usize, j: usize| -> f64 {
        match rows <= columns {
            true => (0..columns).map(|k| at(i, k) * at(j, k)).sum(),
            false => (0..rows).map(|k| at(k, i) * at(k, j)).sum(),
        }
    };
    let mut g: Vec<f64> = (0..n * n).map(|at| product(at / n, at % n)).collect();
    for _ in 0..30 {
        for i in 0..n {
            for j in i + 1..n {
                let (a, b, c) = (g[i * n + i], g[j * n + j], g[i * n + j]);
                if c.abs() <= 1e-300 {
                    continue;
                }
                let half = (b - a) / (2.0 * c);
                let t = half.signum() / (half.abs() + (1.0 + half * half).sqrt());
                let (cosine, sine) = (1.0 / (1.0 + t * t).sqrt(), t / (1.0 + t * t).sqrt());
                for k in 0..n {
                    let (x, y) = (g[k * n + i], g[k * n + j]);
                    (g[k * n + i], g[k * n + j]) = (cosine * x - sine * y, sine * x + cosine * y);
                }
                for k in 0..n {
                    let (x, y) = (g[i * n + k], g[j * n + k]);
                    (g[i * n + k], g[j * n + k]) = (cosine * x - sine * y, sine * x + cosine * y);
                }
            }
        }
    }
    let mut values: Vec<f64> = (0..n).map(|i| g[i * n + i].max(0.0)).collect();
    values.sort_by(|a, b| b.total_cmp(a));
    values
}

/// Checks a merged adapter against the merge of the changes; returns how long it is and how long what it holds, squared.
fn check(merged: &Adapter, expected: &Tensors, rank: usize) -> (f64, f64) {
    assert_eq!((&merged.config["r"], &merged.config["lora_alpha"]), (&json!(rank), &json!(rank)));
    assert_eq!(merged.tensors.len(), 2 * MODULES.len());
    let (mut whole, mut held) = (0.0, 0.0);
    for (module, inputs, outputs) in MODULES {
        let (own_outputs, own_inputs, actual) = merged.change(module, 1.0);
        assert_eq!((own_inputs, own_outputs), (inputs, outputs));
        let expected = expected[&format!("{module}.weight")].f32s();
        let error: f64 = actual.iter().zip(&expected).map(|(x, y)| f64::from(x - y).powi(2)).sum();
        let values = squared_singular_values(&expected, outputs, inputs);
        let length: f64 = values.iter().sum();
        let best: f64 = values.iter().skip(rank).sum();
        // As close as any matrix of this rank, but for rounding to f32.
        assert!(error <= best * (1.0 + 1e-4) + 1e-11 * length, "{module}: {error} for {best} of {length}");
        whole += length;
        held += length - best;
    }
    (whole, held)
}

#[test]
fn factors_come_as_close_to_the_merged_changes_as_any_of_their_rank() {
    let adapters = adapters();
    let models: Vec<Tensors> = adapters.iter().map(changes).collect();
    let zeros: Tensors = models[0]
        .iter()
        .map(|(name, tensor)| (name.clone(), Tensor::floats(Dtype::F32, &tensor.shape, &vec![0.0; tensor.elements()])))
        .collect();
    for recipe in recipes() {
        let expected = oracle::merge(&zeros, &models, None, &recipe).tensors;
        // By default the largest rank; linear merges of all ranks' sum are exact.
        for (flags, rank) in [(&[][..], 7), (&["--rank=3"], 3), (&["--rank=13"], 13), (&["--rank=80"], 80)] {
            let dir = tempfile::tempdir().unwrap();
            let outcome = merge_into(dir.path(), &adapters, &recipe, &[flags, &["--json"]].concat());
            let report = outcome.succeeded().json();
            let merged = Adapter::read(&dir.path().join("out"));
            let (whole, held) = check(&merged, &expected, rank);
            let share = report["factors"]["kept_norm"].as_f64().unwrap();
            assert!((share - (held / whole).sqrt()).abs() < 1e-5, "{share} for {}", (held / whole).sqrt());
            assert_eq!(report["factors"]["rank"], rank);
            let warnings = report["warnings"].to_string();
            assert!(warnings.contains("1 of 3 modules are not in every adapter"), "{warnings}");
            tiesmith(["verify", &text(&dir.path().join("out"))]).succeeded();
        }
    }
}

#[test]
fn nothing_but_recipe_and_inputs_changes_a_byte() {
    let adapters = adapters();
    let lowest = ["--trim-ties=lowest", "--rank=5"];
    let sampled = ["--trim-ties=sample", "--zero-sum=majority", "--rank=5"];
    let stock = ["--method=model_stock", "--rank=5"];
    for flags in [&[][..], &["--scope=tensor", "--dtype=bf16"], &lowest, &sampled, &stock] {
        let mut outputs = Vec::new();
        for run in [&["--threads=1"][..], &["--threads=3", "--memory=44MB", "--io=mmap"], &["--memory=8GB"]] {
            let dir = tempfile::tempdir().unwrap();
            merge_into(dir.path(), &adapters, &Recipe::default(), &[flags, run].concat()).succeeded();
            outputs.push(fs::read(dir.path().join("out/adapter_model.safetensors")).unwrap());
        }
        assert!(outputs.windows(2).all(|pair| pair[0] == pair[1]), "{flags:?}");
    }
}

#[test]
fn a_merged_adapter_is_one_like_any_other() {
    let adapters = adapters();
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| text(&dir.path().join(name));
    let linear = Recipe { method: Method::Linear, ..Recipe::default() };
    merge_into(dir.path(), &adapters, &linear, &["--rank=13"]).succeeded();
    let out = dir.path().join("out");
    // The keys that PEFT reads, and tensors named and shaped as it wants them.
    let config = read_json(&out.join("adapter_config.json"));
    assert_eq!((&config["peft_type"], &config["bias"]), (&json!("LORA"), &json!("none")));
    assert_eq!(config["target_modules"], adapters[0].config["target_modules"]);
    let merged = Adapter::read(&out);
    for (module, inputs, outputs) in MODULES {
        assert_eq!(merged.tensors[&format!("{PREFIX}{module}.lora_A.weight")].shape, [13, inputs]);
        assert_eq!(merged.tensors[&format!("{PREFIX}{module}.lora_B.weight")].shape, [outputs, 13]);
    }
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.contains("Factors of rank 13 hold 100.00 % of the length"), "{card}");
    // On a model it is what the merge of models with the adapters on them is.
    let base: Tensors = changes(&adapters[0])
        .into_iter()
        .map(|(name, tensor)| (name, Tensor::floats(Dtype::F32, &tensor.shape, &vec![0.25; tensor.elements()])))
        .collect();
    crate::support::files::write_checkpoint(&dir.path().join("base"), &base, crate::support::files::Layout::SINGLE);
    let on = |adapter: &str| format!("{}+{}", at("base"), at(adapter));
    let models = ["adapter0", "adapter1", "adapter2"].map(on);
    let models = models.iter().flat_map(|model| ["--model", model]);
    let args: Vec<&str> = ["merge", "--method=linear", "--out"]
        .into_iter()
        .chain([&*at("full")].map(|s| s.to_owned().leak() as &str))
        .chain(models)
        .collect();
    tiesmith(args).succeeded();
    tiesmith(["diff", &on("out"), &at("full"), "--atol", "1e-5"]).succeeded();
    // A recipe file can ask for the same.
    let list = |method: &str, rank: &str| {
        let models: String =
            (0..3).map(|i| format!("- model: {}\n  parameters: {{weight: 1}}\n", at(&format!("adapter{i}")))).collect();
        fs::write(at("recipe.yml"), format!("merge_method: {method}\nrank: {rank}\nmodels:\n{models}")).unwrap();
        tiesmith(["merge", &at("recipe.yml"), "--out", &at("listed"), "--force"])
    };
    list("linear", "13").succeeded();
    assert!(fs::read(dir_file(&at("listed"))).unwrap() == fs::read(dir_file(&text(&out))).unwrap());
    list("ties", "5").succeeded();
    assert_eq!(read_json(&dir.path().join("listed/adapter_config.json"))["r"], 5);
    for (rank, said) in [("0", "a rank of 0 holds nothing"), ("x", "rank")] {
        let outcome = list("ties", rank);
        let line = outcome.refusal();
        assert!(line.contains("recipe.yml:2:7") && line.contains(said), "{line}");
    }
    // A manifest makes it again, and what is damaged can be mended.
    tiesmith(["merge", &text(&out.join("tiesmith.json")), "--out", &at("again")]).succeeded();
    let weights = |dir: &str| fs::read(dir_file(dir)).unwrap();
    assert!(weights(&at("out")) == weights(&at("again")));
    let sound = weights(&at("out"));
    let mut damaged = sound.clone();
    *damaged.last_mut().unwrap() ^= 1;
    fs::write(dir_file(&at("out")), &damaged).unwrap();
    assert_eq!(tiesmith(["verify", &at("out")]).code, Some(1));
    tiesmith(["verify", &at("out"), "--repair"]).succeeded();
    assert!(weights(&at("out")) == sound);
    // Other verbs see the changes.
    let pair = ["--model", &at("adapter0"), "--model", &at("adapter1")];
    let plan = tiesmith([&["plan"][..], &pair].concat()).succeeded();
    assert!(plan.stdout.contains("factor"), "{}", plan.stdout);
    tiesmith([&["analyze"][..], &pair, &["--out", &at("report")]].concat()).succeeded();
    tiesmith([&["sweep"][..], &pair, &["--lambda=0.5,1", "--out", &at("grid")]].concat()).succeeded();
    assert!(dir.path().join("grid/lambda-0.5/adapter_config.json").exists());
    let saved = tiesmith([&["plan"][..], &pair, &["--save", &at("job"), "--out", &at("parts")]].concat());
    assert!(saved.refusal().contains("in one piece"), "{}", saved.stderr);
}

fn dir_file(dir: &str) -> std::path::PathBuf {
    Path::new(dir).join("adapter_model.safetensors")
}

#[test]
fn modules_that_adapters_do_not_share_are_named_in_the_configuration() {
    let mut adapters = adapters();
    adapters[1].config["target_modules"] = json!(["a", "b"]);
    adapters[0].config["rank_pattern"] = json!({});
    adapters[0].config["layers_to_transform"] = json!([1]);
    let dir = tempfile::tempdir().unwrap();
    merge_into(dir.path(), &adapters, &Recipe::default(), &[]).succeeded();
    let merged = Adapter::read(&dir.path().join("out"));
    assert_eq!(merged.config["target_modules"], json!(["a", "b", "c"]));
    assert_eq!(merged.config["layers_to_transform"], json!(null));
}

#[test]
fn embeddings_and_convolutions_keep_their_shapes() {
    let mut random = Random::new(3);
    let mut draw = |shape: &[usize]| {
        let count = shape.iter().product();
        Tensor::floats(Dtype::F32, shape, &(0..count).map(|_| random.symmetric()).collect::<Vec<f32>>())
    };
    let mut adapter = |rank: usize| {
        let mut adapter = Adapter::lora(rank, rank as f64);
        let mut add =
            |name: &str, shape: &[usize]| drop(adapter.tensors.insert(format!("{PREFIX}{name}"), draw(shape)));
        add("embed.lora_embedding_A", &[rank, 33]);
        add("embed.lora_embedding_B", &[12, rank]);
        add("conv.lora_A.weight", &[rank, 5, 3, 3]);
        add("conv.lora_B.weight", &[9, rank, 1, 1]);
        adapter
    };
    let adapters = [adapter(2), adapter(3)];
    let dir = tempfile::tempdir().unwrap();
    let linear = Recipe { method: Method::Linear, ..Recipe::default() };
    merge_into(dir.path(), &adapters, &linear, &["--rank=5"]).succeeded();
    let merged = Adapter::read(&dir.path().join("out"));
    let product = |adapter: &Adapter, a: &str, b: &str| -> Vec<f64> {
        let (a, b) = (&adapter.tensors[&format!("{PREFIX}{a}")], &adapter.tensors[&format!("{PREFIX}{b}")]);
        let (rank, n, m) = (a.shape[0], a.elements() / a.shape[0], b.shape[0]);
        let (a, b) = (a.f32s(), b.f32s());
        let entry = |i: usize, j: usize| (0..rank).map(|k| f64::from(b[i * rank + k]) * f64::from(a[k * n + j])).sum();
        (0..m * n).map(|at| entry(at / n, at % n)).collect()
    };
    for (a, b, shapes) in [
        ("embed.lora_embedding_A", "embed.lora_embedding_B", [vec![5, 33], vec![12, 5]]),
        ("conv.lora_A.weight", "conv.lora_B.weight", [vec![5, 5, 3, 3], vec![9, 5, 1, 1]]),
    ] {
        assert_eq!(
            [&merged.tensors[&format!("{PREFIX}{a}")].shape, &merged.tensors[&format!("{PREFIX}{b}")].shape],
            [&shapes[0], &shapes[1]]
        );
        let (one, two) = (product(&adapters[0], a, b), product(&adapters[1], a, b));
        for ((actual, one), two) in product(&merged, a, b).iter().zip(one).zip(two) {
            assert!((actual - (one + two) / 2.0).abs() < 1e-5);
        }
    }
}
