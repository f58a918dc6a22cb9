//! Models that are merged part by part.

use std::fs;

use safetensors::Dtype;
use serde_json::json;

use crate::support::files::{Layout, read_json, write_checkpoint};
use crate::support::place::{Place, moved};
use crate::support::random::Random;
use crate::support::tensor::{Tensor, Tensors};

/// A model that reads text and sees, as such models name their tensors.
fn sighted(place: &Place, name: &str, seed: u64) -> Tensors {
    let mut random = Random::new(seed);
    let mut tensors = Tensors::new();
    let mut add = |name: &str, shape: &[usize]| {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| random.symmetric()).collect();
        tensors.insert(name.into(), Tensor::floats(Dtype::F32, shape, &values));
    };
    add("language_model.model.embed_tokens.weight", &[6, 4]);
    add("language_model.model.norm.weight", &[4]);
    add("language_model.lm_head.weight", &[6, 4]);
    add("vision_tower.patch_embed.weight", &[4, 4]);
    add("multi_modal_projector.linear.weight", &[4, 4]);
    for layer in 0..3 {
        add(&format!("language_model.model.layers.{layer}.mlp.weight"), &[4, 4]);
        add(&format!("vision_tower.blocks.{layer}.mlp.weight"), &[4, 4]);
    }
    write_checkpoint(&place.path(name), &tensors, Layout::sharded(2, seed));
    let config = json!({
        "architectures": ["Sighted"],
        "text_config": {"num_hidden_layers": 3, "vocab_size": 6},
        "vision_config": {"num_hidden_layers": 3},
    });
    fs::write(place.path(name).join("config.json"), config.to_string()).unwrap();
    tensors
}

const PARTS: &str = "merge_method: task_arithmetic
base_model: base
parameters: {weight: 3}
modules:
  text_decoder:
    parameters: {weight: [0, 1]}
    models: [{model: a}]
  vision_tower:
    models: [{model: a, parameters: {weight: 0.5}}, {model: b}]
  multi_modal_projector:
    models: [{model: base}]
";

#[test]
fn each_module_is_merged_from_its_own_models_with_its_own_parameters() {
    let place = Place::new();
    let [base, a, b] = [("base", 1), ("a", 2), ("b", 3)].map(|(name, seed)| sighted(&place, name, seed));
    let merged = place.merge(PARTS, &[]);
    assert_eq!(merged.keys().collect::<Vec<_>>(), base.keys().collect::<Vec<_>>());
    for (layer, weight) in [0.0, 0.5, 1.0].into_iter().enumerate() {
        let name = format!("language_model.model.layers.{layer}.mlp.weight");
        assert!(merged[&name] == moved(&base[&name], &a[&name], weight), "{name}");
    }
    let head = "language_model.lm_head.weight";
    assert!(merged[head] == moved(&base[head], &a[head], 0.0), "a gradient begins outside the layers");
    for name in ["vision_tower.patch_embed.weight", "vision_tower.blocks.1.mlp.weight"] {
        let [base, a, b] = [&base, &a, &b].map(|model| model[name].f32s());
        let sum = |i: usize| ((0.0 + 0.5 * (a[i] - base[i])) + 3.0 * (b[i] - base[i])) + base[i];
        assert_eq!(merged[name].f32s(), (0..base.len()).map(sum).collect::<Vec<_>>(), "{name}");
    }
    let projector = "multi_modal_projector.linear.weight";
    assert!(merged[projector] == base[projector], "a module of base alone is base's");
}

#[test]
fn layers_of_one_module_are_stacked_and_the_others_stay() {
    let place = Place::new();
    let [a, b] = [("a", 2), ("b", 3)].map(|(name, seed)| sighted(&place, name, seed));
    let merged = place.merge(
        "merge_method: passthrough
modules:
  text_decoder:
    slices:
    - sources: [{model: a, layer_range: [0, 3]}]
    - sources: [{model: b, layer_range: [1, 3]}]
  vision_tower: {models: [{model: b}]}
",
        &[],
    );
    let text = |layer: u64| format!("language_model.model.layers.{layer}.mlp.weight");
    for (output, (model, layer)) in [(&a, 0), (&a, 1), (&a, 2), (&b, 1), (&b, 2)].into_iter().enumerate() {
        assert!(merged[&text(output as u64)] == model[&text(layer)], "layer {output}");
    }
    assert!(merged["language_model.lm_head.weight"] == b["language_model.lm_head.weight"]);
    assert!(merged["vision_tower.blocks.2.mlp.weight"] == b["vision_tower.blocks.2.mlp.weight"]);
    let projector = "multi_modal_projector.linear.weight";
    assert!(merged[projector] == b[projector], "what is in no module is in the text's, whose end is b's");
    let config = read_json(&place.path("out/config.json"));
    assert_eq!(config["text_config"]["num_hidden_layers"], 5);
    assert_eq!(config["vision_config"]["num_hidden_layers"], 3);
}

#[test]
fn modules_are_found_by_names_that_nobody_has_heard_of() {
    let place = Place::new();
    let [base, a] = [("base", 1), ("a", 2)].map(|(name, seed)| sighted(&place, name, seed));
    let recipe = "merge_method: task_arithmetic
base_model: base
modules:
  language_model.model: {models: [{model: a, parameters: {weight: 1}}]}
  vision_tower.blocks: {models: [{model: a, parameters: {weight: 2}}]}
";
    place.write("recipe.yml", recipe);
    let report = place.tiesmith(&["merge", "recipe.yml", "--out", "out", "--json"]).succeeded().json();
    let warnings = report["warnings"].to_string();
    assert!(warnings.contains("3 tensors in no module, such as"), "{warnings}");
    let merged = crate::support::files::read_checkpoint(&place.path("out"));
    for (name, weight) in [
        ("language_model.model.norm.weight", Some(1.0)),
        ("vision_tower.blocks.0.mlp.weight", Some(2.0)),
        ("vision_tower.patch_embed.weight", None),
        ("language_model.lm_head.weight", None),
    ] {
        let expected = weight.map_or(base[name].clone(), |weight| moved(&base[name], &a[name], weight));
        assert!(merged[name] == expected, "{name}");
    }
}

#[test]
fn modules_do_not_depend_on_how_they_are_made_and_are_made_again_from_the_manifest() {
    let place = Place::new();
    ["base", "a", "b"].into_iter().zip(1..).for_each(|(name, seed)| drop(sighted(&place, name, seed)));
    let recipe = PARTS.replace("task_arithmetic", "ties").replace("{weight: 3}", "{weight: 3, density: 0.4}");
    let merged = place.merge(&recipe, &["--threads", "1"]);
    assert!(place.merge(&recipe, &["--threads", "3", "--io", "mmap"]) == merged);
    place.tiesmith(&["merge", "out/tiesmith.json", "--out", "again", "--progress", "none"]).succeeded();
    assert!(crate::support::files::read_checkpoint(&place.path("again")) == merged);
}

#[test]
fn modules_that_do_not_separate_are_refused() {
    let place = Place::new();
    ["base", "a"].into_iter().zip(1..).for_each(|(name, seed)| drop(sighted(&place, name, seed)));
    let recipe = |first: &str, second: &str| {
        format!(
            "merge_method: linear\nparameters: {{weight: 1}}\nmodules:\n  {first}: {{models: [{{model: a}}]}}\n  \
             {second}: {{models: [{{model: a}}, {{model: base}}]}}\n"
        )
    };
    for (recipe, message) in [
        (recipe("default", "ears"), "recipe.yml:5:3: no tensor is in the module \"ears\"; call a module by a part of"),
        (
            recipe("default", "text_decoder"),
            "recipe.yml:4:3: \"text_decoder\" and \"default\" both are for the tensors",
        ),
        (recipe("eyes", "ears"), "recipe.yml:4:3: no tensor is in the module \"eyes\""),
    ] {
        let refusal = place.refusal(&recipe, &[]);
        assert!(refusal.contains(message), "{recipe}\n{refusal}");
    }
    let one = recipe("vision_tower", "default").replace("linear", "slerp").replace("{weight: 1}", "{t: 0.5}");
    assert!(place.refusal(&one, &[]).contains("slerp merges 2 models, but 1 is given"));
}

#[test]
fn an_architecture_that_is_given_stands_in_the_outputs_configuration() {
    let place = Place::new();
    ["base", "a"].into_iter().zip(1..).for_each(|(name, seed)| drop(sighted(&place, name, seed)));
    place.merge(
        "merge_method: linear\nmodels:\n- model: {model: a, override_architecture: Other}\n  parameters: {weight: 1}\n\
         - model: {model: {path: base}, override_architecture: Unused}\n  parameters: {weight: 1}\n",
        &[],
    );
    assert_eq!(read_json(&place.path("out/config.json"))["architectures"], json!(["Other"]));
}
