//! Recipe files in mergekit's language: what they make, against mergekit's own outputs and against flags.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::{Value, json};

use crate::support::family::text;
use crate::support::files::{Layout, read_checkpoint, read_file, read_json, read_tree, write_checkpoint};
use crate::support::place::{Place, moved};
use crate::support::repository;
use crate::support::run::{command, run};
use crate::support::statistics;
use crate::support::tensor::{Tensor, Tensors, differences};

/// Largest |actual − expected| / max(|expected|, 1e-6) over all tensors.
fn worst(expected: &Tensors, actual: &Tensors) -> f64 {
    assert_eq!(expected.keys().collect::<Vec<_>>(), actual.keys().collect::<Vec<_>>());
    let pairs = expected.iter().flat_map(|(name, want)| {
        let got = &actual[name];
        assert_eq!((want.dtype, &want.shape), (got.dtype, &got.shape), "{name}");
        want.values().into_iter().zip(got.values())
    });
    pairs.map(|(want, got)| (got - want).abs() / want.abs().max(1e-6)).fold(0.0, f64::max)
}

#[test]
fn recipes_of_mergekit_give_its_outputs_within_a_millionth() {
    let golden = repository("tests/golden/mergekit-f32");
    let dir = tempfile::tempdir().unwrap();
    let mut checked = Vec::new();
    for entry in fs::read_dir(golden.join("recipes")).unwrap() {
        let recipe = entry.unwrap().path();
        let name = recipe.file_stem().unwrap().to_str().unwrap().to_owned();
        let out = text(&dir.path().join(&name));
        let mut command = command();
        // Models are named relative to the family's folder.
        command.current_dir(repository("tests/golden/family-f32"));
        command.args(["merge", &text(&recipe), "--out", &out, "--progress", "none"]);
        run(command).succeeded();
        let expected = read_file(&golden.join(format!("{name}.safetensors")));
        let deviation = worst(&expected, &read_checkpoint(Path::new(&out)));
        let accepted = match name.as_str() {
            // Angles come from sums in f32 there; those of norms' weights are below what that can tell from 0.
            "karcher" => 1e-3,
            name if name.contains("slerp") || name.starts_with("model_stock") => 1e-3,
            "sce" | "sce_all" | "ram" | "ramplus_tl" | "nearswap" | "breadcrumbs" | "breadcrumbs_ties" => 1e-5,
            _ => 1e-6,
        };
        assert!(deviation <= accepted, "{name}: {deviation:e}");
        checked.push(name);
    }
    for name in [
        "gradient",
        "linear",
        "linear_raw",
        "passthrough",
        "task_arithmetic",
        "ties",
        "ties_raw",
        "ties_weighted",
        "sce",
        "slerp",
        "slerp_filters",
    ] {
        assert!(checked.iter().any(|n| n == name), "{name} was not checked");
    }
}

#[test]
fn a_recipe_and_the_flags_that_say_the_same_give_the_same_bytes() {
    let place = Place::new();
    for (seed, name) in [(1, "base"), (2, "a"), (3, "b")] {
        place.model(name, 3, seed);
    }
    let merged = place.merge(
        "merge_method: ties\nbase_model: base\nparameters: {lambda: 0.8}\nmodels:\n\
         - {model: a, parameters: {weight: 2, density: 0.4}}\n- {model: b, parameters: {weight: 1, density: 0.6}}\n",
        &[],
    );
    let flags = [
        "merge",
        "--base",
        "base",
        "--model",
        "a,weight=2,density=0.4",
        "--model",
        "b,density=0.6",
        "--lambda",
        "0.8",
        "--scope",
        "tensor",
        "--trim-ties",
        "lowest",
        "--zero-sum",
        "positive",
        "--out",
        "flags",
    ];
    place.tiesmith(&flags).succeeded();
    assert_eq!(differences(&read_checkpoint(&place.path("flags")), &merged), "");
}

#[test]
fn gradients_and_filters_choose_the_weight_of_each_tensor() {
    let place = Place::new();
    let (base, a) = (place.model("base", 3, 1), place.model("a", 3, 2));
    let merged = place.merge(
        "merge_method: task_arithmetic\nbase_model: base\nmodels:\n- model: a\n  parameters:\n    weight:\n\
         \x20   - {filter: self_attn, value: [0, 0.5, 2]}\n    - {filter: 'model.*.weight', value: [0.25, 0.75]}\n\
         \x20   - value: [4, 8]\n",
        &[],
    );
    let weight = |name: &str| match name {
        "model.layers.0.self_attn.q_proj.weight" => 0.0,
        "model.layers.1.self_attn.q_proj.weight" => 0.5,
        "model.layers.2.self_attn.q_proj.weight" => 2.0,
        "model.layers.1.mlp.up_proj.weight" => 0.5,
        "model.layers.2.mlp.up_proj.weight" => 0.75,
        // Outside the layers the first number holds, as in mergekit.
        "lm_head.weight" => 4.0,
        _ => 0.25,
    };
    let mut expected = Tensors::new();
    for (name, tensor) in &base {
        let float = tensor.dtype == Dtype::F32;
        expected.insert(name.clone(), if float { moved(tensor, &a[name], weight(name)) } else { tensor.clone() });
    }
    assert_eq!(differences(&expected, &merged), "");
    let plan = place.tiesmith(&["plan", "recipe.yml", "--json"]).succeeded().json();
    assert_eq!(plan["inputs"][1]["params"]["weight"], json!([0.0, 4.0]));
}

#[test]
fn layers_are_stacked_and_numbered_anew() {
    let place = Place::new();
    let (a, b) = (place.model("a", 4, 1), place.model("b", 3, 2));
    let merged = place.merge(
        "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 3]}]\n\
         - sources: [{model: b, layer_range: [1, 3]}]\n- sources: [{model: a, layer_range: [2, 4]}]\n",
        &[],
    );
    let from = [(&a, 0), (&a, 1), (&a, 2), (&b, 1), (&b, 2), (&a, 2), (&a, 3)];
    let mut expected = Tensors::new();
    for (layer, (model, source)) in from.iter().enumerate() {
        for (name, tensor) in model.iter() {
            if let Some(rest) = name.strip_prefix(&format!("model.layers.{source}.")) {
                expected.insert(format!("model.layers.{layer}.{rest}"), tensor.clone());
            }
        }
    }
    for name in ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"] {
        expected.insert(name.into(), a[name].clone());
    }
    assert_eq!(differences(&expected, &merged), "");
    let config = read_json(&place.path("out/config.json"));
    assert_eq!(config["num_hidden_layers"], 7);
    assert_eq!(config["layer_types"], json!(["kind0", "kind1", "kind2", "kind1", "kind2", "kind2", "kind3"]));
    assert_eq!(config["vocab_size"], 6);
}

#[test]
fn the_input_side_is_the_first_slices_and_the_output_side_the_lasts() {
    let place = Place::new();
    let (a, b) = (place.model("a", 2, 1), place.model("b", 2, 2));
    let merged = place.merge(
        "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 1]}]\n\
         - sources: [{model: b, layer_range: [0, 1], parameters: {scale: [{filter: norm, value: 2}, {value: 1}]}}]\n",
        &[],
    );
    assert!(merged["model.embed_tokens.weight"] == a["model.embed_tokens.weight"]);
    assert!(merged["lm_head.weight"] == b["lm_head.weight"]);
    let doubled: Vec<f32> = b["model.norm.weight"].f32s().iter().map(|x| x * 2.0).collect();
    assert_eq!(merged["model.norm.weight"].f32s(), doubled);
}

#[test]
fn slices_merge_with_a_base_and_parameters_of_their_own() {
    let place = Place::new();
    let (base, a, b) = (place.model("base", 3, 1), place.model("a", 3, 2), place.model("b", 4, 3));
    let merged = place.merge(
        "merge_method: task_arithmetic\nbase_model: base\nparameters: {weight: 3}\nslices:\n\
         - sources: [{model: a, layer_range: [0, 2]}]\n  parameters: {weight: [0.5, 1]}\n\
         - sources: [{model: base, layer_range: [2, 3]}, {model: b, layer_range: [3, 4], parameters: {weight: 0.25}}]\n\
         - base_model: b\n  sources: [{model: a, layer_range: [1, 2]}]\n",
        &[],
    );
    let part = |model: &Tensors, layer: u64| model[&format!("model.layers.{layer}.mlp.up_proj.weight")].clone();
    let layer = |index: u64| part(&merged, index);
    assert!(layer(0) == moved(&part(&base, 0), &part(&a, 0), 0.5), "a slice's gradient begins");
    assert!(layer(1) == moved(&part(&base, 1), &part(&a, 1), 1.0), "a slice's gradient ends");
    assert!(layer(2) == moved(&part(&base, 2), &part(&b, 3), 0.25), "a source's own weight");
    assert!(layer(3) == moved(&part(&b, 1), &part(&a, 1), 3.0), "a slice's own base");
    let embed = "model.embed_tokens.weight";
    assert!(merged[embed] == moved(&base[embed], &a[embed], 0.5));
    assert!(merged["lm_head.weight"] == moved(&b["lm_head.weight"], &a["lm_head.weight"], 3.0));
}

#[test]
fn an_assembled_output_does_not_depend_on_how_it_is_made() {
    let place = Place::new();
    for (seed, name) in [(1, "base"), (2, "a"), (3, "b")] {
        place.model(name, 3, seed);
    }
    let recipe = "merge_method: ties\nbase_model: base\nparameters: {weight: 1, density: [0.3, 0.9]}\nslices:\n\
                  - sources: [{model: a, layer_range: [0, 3]}, {model: b, layer_range: [0, 3]}]\n\
                  - sources: [{model: b, layer_range: [1, 3]}]\n";
    let tree = |extra: &[&str]| {
        place.merge(recipe, extra);
        let mut files = read_tree(&place.path("out"));
        files.remove(&PathBuf::from("tiesmith.json"));
        files
    };
    let first = tree(&["--threads", "1"]);
    for extra in [&["--threads", "4"][..], &["--memory", "64MB", "--io", "mmap"], &["--io", "read"]] {
        assert!(tree(extra) == first, "{extra:?}");
    }
}

#[test]
fn a_head_that_is_not_stored_is_the_embedding() {
    let place = Place::new();
    let (mut base, mut a) = (place.model("base", 1, 1), place.model("a", 1, 2));
    let recipe = "merge_method: task_arithmetic\nbase_model: base\nmodels:\n- {model: a, parameters: {weight: 0.5}}\n";
    // Stored by the model alone: the output has it, made with base's embedding.
    let head = "lm_head.weight";
    base.remove(head);
    place.save("base", &base, 1);
    let merged = place.merge(recipe, &[]);
    assert!(merged[head] == moved(&base["model.embed_tokens.weight"], &a[head], 0.5));
    // Stored by neither: absent.
    a.remove(head);
    place.save("a", &a, 1);
    assert!(!place.merge(recipe, &[]).contains_key(head));
    // Stored by base alone.
    let base = place.model("base", 1, 1);
    assert!(place.merge(recipe, &[])[head] == moved(&base[head], &a["model.embed_tokens.weight"], 0.5));
}

/// `tensors` with `rows` rows of zeros more in its vocabulary.
fn with_longer_vocabulary(tensors: &Tensors, rows: usize) -> Tensors {
    let mut longer = tensors.clone();
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        let tensor = &tensors[name];
        let mut values = tensor.f32s();
        values.extend(vec![0.0; rows * tensor.shape[1]]);
        longer.insert(name.into(), Tensor::floats(Dtype::F32, &[tensor.shape[0] + rows, tensor.shape[1]], &values));
    }
    longer
}

#[test]
fn vocabularies_of_different_size_are_cropped_with_a_warning() {
    let place = Place::new();
    let (base, a) = (place.model("base", 1, 1), place.model("a", 1, 2));
    let ties = "merge_method: task_arithmetic\nbase_model: base\nmodels:\n- {model: a, parameters: {weight: 1}}\n";
    let expected = place.merge(ties, &[]);
    place.save("a", &with_longer_vocabulary(&a, 3), 1);
    assert_eq!(differences(&expected, &place.merge(ties, &[])), "");
    let report = place.tiesmith(&["merge", "recipe.yml", "--out", "again", "--json"]).succeeded().json();
    let warnings = report["warnings"].to_string();
    assert!(warnings.contains("model 1 (a) has 9 rows, of which the first 6 are merged"), "{warnings}");
    let plan = place.tiesmith(&["plan", "recipe.yml", "--json"]).succeeded().json();
    assert_eq!(plan["bytes_read"], report["bytes_read"]);

    // An average is as long as its shortest model, and config.json follows.
    place.save("base", &with_longer_vocabulary(&base, 5), 1);
    let average = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: base}]\n";
    place.model("c", 1, 2);
    let merged = place.merge(average, &[]);
    assert_eq!(merged["lm_head.weight"].shape, [9, 4]);
    let config =
        fs::read_to_string(place.path("a/config.json")).unwrap().replace("\"vocab_size\":6", "\"vocab_size\":9");
    fs::write(place.path("a/config.json"), config).unwrap();
    let merged = place.merge(&average.replace("model: base", "model: c"), &[]);
    assert_eq!(merged["model.embed_tokens.weight"].shape, [6, 4]);
    assert_eq!(read_json(&place.path("out/config.json"))["vocab_size"], 6);

    // A model with fewer rows than base cannot be subtracted, and other tensors are never cropped.
    let refusal = place.refusal(&ties.replace("model: a", "model: c"), &[]);
    assert!(refusal.contains("shape [11, 4], but model 1 (c) has shape [6, 4]"), "{refusal}");
}

#[test]
fn options_go_before_what_the_file_says() {
    let place = Place::new();
    let (base, a) = (place.model("base", 2, 1), place.model("a", 2, 2));
    let recipe = "merge_method: task_arithmetic\nbase_model: base\ndtype: bfloat16\nparameters: {lambda: 3}\nmodels:\n\
                  - {model: a, parameters: {weight: 1}}\n";
    let merged = place.merge(recipe, &["--lambda", "0.5", "--dtype", "float32", "--exclude", "*norm*"]);
    let name = "model.layers.1.mlp.up_proj.weight";
    let half: Vec<f32> = base[name].f32s().iter().zip(a[name].f32s()).map(|(b, m)| (m - b) * 0.5 + b).collect();
    assert_eq!(merged[name].f32s(), half);
    assert!(merged["model.norm.weight"] == base["model.norm.weight"]);
    assert_eq!(place.merge(recipe, &[])[name].dtype, Dtype::BF16);
}

#[test]
fn what_cannot_be_planned_is_refused_with_its_place() {
    let place = Place::new();
    place.model("base", 3, 1);
    place.model("a", 3, 2);
    let slice =
        |range: &str| format!("merge_method: passthrough\nslices:\n- sources: [{{model: a, layer_range: {range}}}]\n");
    let ties = |more: &str| {
        format!("merge_method: ties\nbase_model: base\n{more}\nmodels:\n- {{model: a, parameters: {{weight: 1}}}}\n")
    };
    for (recipe, message) in [
        (slice("[1, 4]"), "error: recipe.yml:3:37: layer_range [1, 4] of a, but \"model.layers\" has 3 layers"),
        (slice("[7, 9]"), "the range must lie within [0, 3]"),
        (
            slice("[0, 2]").replace("model: a", "model: none"),
            "none: no such file or directory, named in recipe.yml:3:21;",
        ),
        (ties("scope: model\nparameters: {density: [0.1, 0.5]}"), "the density differs between tensors"),
        (ties("parameters: {zero_sum: [positive, majority]}"), "must be the same for all tensors"),
        (
            ties("").replace("weight: 1", "weight: {filter: mlp, value: 1}"),
            "ties needs the parameter weight, which is not given for model a",
        ),
        (ties("").replace("{weight: 1}", "{}"), "ties needs the parameter weight"),
        (
            "merge_method: passthrough\nmodels: [{model: a}, {model: base}]\n".into(),
            "passthrough merges one model, but 2 are given",
        ),
    ] {
        let refusal = place.refusal(&recipe, &[]);
        assert!(refusal.contains(message), "{recipe}\n{refusal}");
    }
    let sliced = "merge_method: linear\nparameters: {weight: 1}\nbase_model: base\nslices:\n\
                  - sources: [{model: a, layer_range: [0, 3]}]\n";
    assert!(place.refusal(sliced, &["--non-finite", "copy-base"]).contains("needs a base in every slice"));
    let sliced = sliced.replace("linear", "ties");
    assert!(place.refusal(&sliced, &["--sign-from", "a"]).contains("--sign-from cannot be used with slices"));
    let message = |args: &[&str]| place.tiesmith(args).refusal().to_owned();
    assert!(message(&["merge", "a", "--out", "o"]).contains("'a' is a directory, not a recipe file"));
    assert!(message(&["plan", "missing.yml"]).contains("missing.yml"));
    assert!(message(&["merge", "recipe.yml", "--model", "a", "--out", "o"]).contains("cannot be used with"));
    assert!(message(&["merge", "recipe.yml", "other.yml", "--out", "o"]).contains("other.yml"));
    fs::write(place.path("bytes.yml"), [0xff, 0xfe, 0]).unwrap();
    assert!(message(&["plan", "bytes.yml"]).contains("not a text file"));
}

#[test]
fn a_filter_for_no_tensor_is_warned_of() {
    let place = Place::new();
    place.model("a", 1, 1);
    let recipe =
        "merge_method: linear\nmodels:\n- model: a\n  parameters: {weight: [{filter: atn, value: 2}, {value: 1}]}\n";
    place.write("recipe.yml", recipe);
    let plan = place.tiesmith(&["plan", "recipe.yml", "--json"]).succeeded().json();
    assert_eq!(plan["warnings"], json!(["the filter \"atn\" matches no tensor"]));
}

/// Two documents: the second merges the output of the first with a third model.
const CHAIN: &str = "merge_method: linear\nmodels:\n- {model: first, parameters: {weight: 1}}\n\
                     - {model: c, parameters: {weight: 1}}\n---\nname: first\nmerge_method: linear\nmodels:\n\
                     - {model: a, parameters: {weight: 1}}\n- {model: b, parameters: {weight: 1}}\n";

#[test]
fn a_document_uses_the_output_of_another() {
    let place = Place::new();
    let models: Vec<Tensors> = [("a", 1), ("b", 2), ("c", 3)].map(|(name, seed)| place.model(name, 1, seed)).into();
    place.write("recipe.yml", CHAIN);
    let plan = place.tiesmith(&["plan", "recipe.yml"]).succeeded().stdout;
    assert!(plan.starts_with("first\n") && plan.contains("planned once out.parts/first is made"), "{plan}");
    let merged = place.merge(CHAIN, &[]);
    let value = |model: &Tensors| model["model.norm.weight"].f32s()[0];
    let (a, b, c) = (value(&models[0]), value(&models[1]), value(&models[2]));
    assert_eq!(value(&merged), ((a + b) / 2.0 + c) / 2.0);
    // A finished part is used again, until its own recipe changes.
    let part = place.path("out.parts/first/tiesmith.json");
    let before = fs::metadata(&part).unwrap().modified().unwrap();
    // As a run leaves it that is killed while it removes its traces.
    let work = place.path("out.parts/first/.tiesmith");
    fs::create_dir(&work).unwrap();
    fs::write(work.join("lock"), "").unwrap();
    place.merge(CHAIN, &[]);
    assert_eq!(fs::metadata(&part).unwrap().modified().unwrap(), before);
    assert!(!work.exists());
    let changed = CHAIN.replace("{model: b, parameters: {weight: 1}}", "{model: b, parameters: {weight: 3}}");
    fs::remove_dir_all(place.path("out")).unwrap();
    assert!(place.refusal(&changed, &[]).contains("--force"));
    assert_eq!(value(&place.merge(&changed, &["--force"])), ((a + 3.0 * b) / 4.0 + c) / 2.0);
    place.merge(CHAIN, &["--parts", "elsewhere"]);
    assert!(place.path("elsewhere/first/model.safetensors").exists());
}

#[test]
fn a_finished_document_is_used_again_only_as_it_was_written() {
    let place = Place::new();
    for (name, seed) in [("a", 1), ("b", 2), ("c", 3)] {
        place.model(name, 1, seed);
    }
    let expected = place.merge(CHAIN, &[]);
    let part = place.path("out.parts/first/model.safetensors");
    let written = fs::read(&part).unwrap();
    let mut flipped = written.clone();
    *flipped.last_mut().unwrap() ^= 1;
    for damaged in [flipped, written[..written.len() - 2].to_vec()] {
        assert!(damaged != written);
        fs::write(&part, damaged).unwrap();
        fs::remove_dir_all(place.path("out")).unwrap();
        let refusal = place.refusal(CHAIN, &[]);
        for words in ["out.parts/first/model.safetensors", "document first is damaged", "out.parts/first --repair"] {
            assert!(refusal.contains(words), "{words}: {refusal}");
        }
        assert!(!place.path("out").exists());
        place.tiesmith(&["verify", "out.parts/first", "--repair"]).succeeded();
        assert!(fs::read(&part).unwrap() == written);
        assert_eq!(differences(&place.merge(CHAIN, &[]), &expected), "");
    }
    fs::write(&part, "").unwrap();
    place.merge(CHAIN, &["--force"]);
    assert!(fs::read(&part).unwrap() == written);
}

#[test]
fn a_checkpoint_that_a_later_document_lacks_is_missed_before_the_first_is_merged() {
    let place = Place::new();
    for (seed, name) in [(1, "a"), (2, "b")] {
        place.model(name, 1, seed);
    }
    let refusal = place.refusal(CHAIN, &[]);
    assert!(refusal.contains("c: no such file or directory, named in recipe.yml:4:11"), "{refusal}");
    assert!(!place.path("out.parts").exists());
}

#[test]
fn the_manifest_says_which_tensors_have_which_parameters() {
    let place = Place::new();
    place.model("a", 2, 1);
    place.merge(
        "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: [{filter: mlp, value: 2}, {value: 1}]}}\n",
        &[],
    );
    let manifest = read_json(&place.path("out/tiesmith.json"));
    let sets = manifest["settings"].as_array().unwrap();
    let mlp = sets.iter().find(|set| set["settings"]["per_model"]["weight"] == json!([2.0])).unwrap();
    let mut names: Vec<&str> = mlp["tensors"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    names.sort_unstable();
    assert_eq!(names, ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]);
    let recorded = &manifest["recipe"]["models"][0]["params"]["weight"];
    assert_eq!(recorded[0], json!({"filter": "mlp", "value": 2.0}));
}

/// The contents of the ```yaml blocks of a page.
fn examples(page: &str) -> Vec<String> {
    let text = fs::read_to_string(repository(page)).unwrap();
    let blocks = text.split("```yaml\n").skip(1);
    blocks.map(|block| block.split("```").next().unwrap().to_owned()).collect()
}

#[test]
fn examples_in_the_docs() {
    let place = Place::new();
    for (seed, name) in [(1, "base"), (2, "chat"), (3, "code"), (4, "math")] {
        let mut model = place.model(name, 4, seed);
        model.insert("vision_tower.proj.weight".into(), model["model.layers.0.mlp.up_proj.weight"].clone());
        place.save(name, &model, 4);
        place.write(&format!("{name}/tokenizer.json"), r#"{"model": {"vocab": {"a": 0, "b": 1, "c": 2}}}"#);
    }
    for name in ["chat", "code"] {
        let model = read_checkpoint(&place.path(name));
        for (what, tensors) in [("fisher", statistics::fisher_of(&model)), ("gram", statistics::gram_of(&model))] {
            write_checkpoint(&place.path(&format!("{name}-{what}")), &tensors, Layout::SINGLE);
        }
    }
    let pages = ["docs/recipes.md", "docs/from-mergekit.md", "README.md"];
    let examples: Vec<String> = pages.iter().flat_map(|page| examples(page)).collect();
    let methods = place.tiesmith(&["methods", "--json"]).succeeded().json();
    for method in methods["methods"].as_array().unwrap() {
        let line = format!("merge_method: {}\n", method["name"].as_str().unwrap());
        let own = |example: &String| example.starts_with(&line) || example.contains(&format!("\n{line}"));
        assert!(examples.iter().any(own), "the docs have no example with {line}");
    }
    for example in &examples {
        let _ = fs::remove_dir_all(place.path("out.parts"));
        assert!(!place.merge(example, &[]).is_empty(), "{example}");
    }
}

#[test]
fn the_refusal_in_the_docs_is_the_programs() {
    let place = Place::new();
    let recipe = "merge_method: ties\nbase_model: b\nmodels:\n- model: m\n  parameters: {weight: 1}\nparamters: {}\n";
    let refusal = place.refusal(recipe, &[]);
    let page = fs::read_to_string(repository("docs/recipes.md")).unwrap();
    assert!(page.contains(&refusal), "{refusal}");
}
