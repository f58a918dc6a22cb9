//! Accepting and rejecting: every form of the language, and hostile files.

use super::*;
use crate::dtype::Float;
use crate::method::Value;
use crate::recipe::{Scope, Setting, ThresholdKind, TrimTies};

fn documents(text: &str) -> Vec<Document> {
    parse(text, "r.yml").unwrap_or_else(|e| panic!("{e}\n{text}"))
}

fn one(text: &str) -> Document {
    let mut documents = documents(text);
    assert_eq!(documents.len(), 1);
    documents.remove(0)
}

fn recipe(text: &str) -> Recipe {
    one(text).recipe
}

fn number(setting: &Setting, name: &str, t: f64) -> f64 {
    match setting.at(name, t) {
        Some(Value::Number(x)) => x,
        other => panic!("{other:?}"),
    }
}

const TIES: &str = "merge_method: ties\nbase_model: b\nmodels:\n- model: m\n  parameters: {weight: 1}\n";

#[test]
fn a_ties_recipe_means_what_it_means_to_mergekit() {
    let recipe = recipe(TIES);
    assert_eq!((&*recipe.method, recipe.base.as_deref()), ("ties", Some("b")));
    assert_eq!(
        (recipe.scope, recipe.trim_ties, recipe.threshold),
        (Scope::Tensor, TrimTies::Lowest, ThresholdKind::Exact)
    );
    assert_eq!(recipe.params["density"], Value::Number(1.0));
    assert_eq!(recipe.params["zero_sum"], Value::Word("positive".into()));
    assert_eq!(recipe.params["combine"], Value::Word("mean".into()));
    assert_eq!(recipe.models[0].params["weight"], Value::Number(1.0));
    assert!(recipe.required.contains("weight") && recipe.tied_heads && recipe.dtype.is_none());
}

#[test]
fn the_example_with_all_common_forms() {
    let text = "
merge_method: ties
base_model: org/base@main
models:
  - model: org/a@v1.0
    parameters: { weight: 0.5, density: 0.3 }
  - model: { model: { path: ./b+c, revision: abc } }
    parameters:
      weight: [0.2, 0.8, 0.2]
      density:
        - { filter: self_attn, value: [0.9, 0.5] }
        - { filter: '*.mlp.*', value: 0.4 }
        - { value: 0.3 }
parameters: { normalize: false, int8_mask: true, lambda: 1.1 }
dtype: float32
out_dtype: torch.bfloat16
tokenizer_source: base
";
    let document = one(text);
    assert!(document.warnings.is_empty(), "{:?}", document.warnings);
    let recipe = document.recipe;
    assert_eq!(recipe.base.as_deref(), Some("org/base@main"));
    assert_eq!((&*recipe.models[0].source, &*recipe.models[1].source), ("org/a@v1.0", "./b+c@abc"));
    assert_eq!(recipe.dtype, Some(Float::BF16));
    assert_eq!(recipe.params["combine"], Value::Word("sum".into()));
    assert_eq!(recipe.params["lambda"], Value::Number(1.1));
    let density = &recipe.models[1].params["density"];
    assert_eq!(number(density, "model.layers.3.self_attn.q_proj.weight", 0.5), 0.7);
    assert_eq!(number(density, "model.layers.3.mlp.up_proj.weight", 0.5), 0.4);
    assert_eq!(number(density, "lm_head.weight", 0.0), 0.3);
    assert_eq!(number(&recipe.models[1].params["weight"], "", 0.5), 0.8);
}

#[test]
fn our_own_keys() {
    let text = format!(
        "{TIES}scope: model\nthreshold: sketch\ntrim_ties: sample\nseed: 7\nelect: count\ncombine: max\nzero_sum: majority\n"
    );
    let recipe = recipe(&text);
    assert_eq!((recipe.scope, recipe.threshold, recipe.seed), (Scope::Model, ThresholdKind::Sketch, 7));
    assert_eq!(recipe.trim_ties, TrimTies::Sample);
    for (name, word) in [("elect", "count"), ("combine", "max"), ("zero_sum", "majority")] {
        assert_eq!(recipe.params[name], Value::Word(word.into()), "{name}");
    }
    let inside = self::recipe(&format!("{TIES}parameters: {{ elect: none }}\n"));
    assert_eq!(inside.params["elect"], Value::Word("none".into()));
}

#[test]
fn scalars_as_yaml_1_1_writes_them() {
    for (text, value) in
        [("1e-3", 0.001), (".5", 0.5), ("1_000", 1000.0), ("+2", 2.0), ("-1", -1.0), ("'0.25'", 0.25), ("1.", 1.0)]
    {
        let recipe = recipe(&TIES.replace("weight: 1", &format!("weight: {text}")));
        assert_eq!(recipe.models[0].params["weight"], Value::Number(value), "{text}");
    }
    for (text, word) in
        [("true", "mean"), ("yes", "mean"), ("On", "mean"), ("1", "mean"), ("FALSE", "sum"), ("off", "sum")]
    {
        let recipe = recipe(&format!("{TIES}parameters: {{ normalize: {text} }}\n"));
        assert_eq!(recipe.params["combine"], Value::Word(word.into()), "{text}");
    }
    // Nothing is not given.
    let recipe = recipe(&format!("{TIES}parameters:\ndtype: ~\nout_dtype: null\n"));
    assert_eq!(recipe.dtype, None);
}

#[test]
fn words_may_step_over_the_layers() {
    let recipe = recipe(&format!("{TIES}parameters: {{ normalize: [true, false] }}\n"));
    let at = |t| recipe.params["combine"].at("", t).unwrap().to_string();
    assert_eq!([at(0.0), at(0.9), at(1.0)], ["mean", "mean", "sum"]);
}

#[test]
fn a_default_of_mergekit_fills_in_where_no_case_is_for_a_tensor() {
    let recipe = recipe(&format!("{TIES}parameters:\n  density: {{ filter: mlp, value: 0.5 }}\n"));
    assert_eq!(number(&recipe.params["density"], "a.mlp.b", 0.0), 0.5);
    assert_eq!(number(&recipe.params["density"], "a.attn.b", 0.0), 1.0);
}

#[test]
fn base_among_the_models_is_no_task_vector_but_takes_part_in_an_average() {
    let listed = "base_model: b\nmodels:\n- model: b\n- {model: m, parameters: {weight: 1}}\n";
    assert_eq!(recipe(&format!("merge_method: ties\n{listed}")).models.len(), 1);
    let average =
        format!("merge_method: linear\n{listed}").replace("- model: b\n", "- {model: b, parameters: {weight: 2}}\n");
    assert_eq!(recipe(&average).models.len(), 2);
}

#[test]
fn vocabularies_may_be_bases_a_models_or_all_together() {
    use crate::recipe::Vocabulary;
    for (text, vocabulary) in [
        ("", None),
        ("tokenizer_source: base", Some(Vocabulary::Base)),
        ("tokenizer_source: b", Some(Vocabulary::Base)),
        ("tokenizer_source: m", Some(Vocabulary::Model("m".into()))),
        ("tokenizer_source: {model: {path: m}}", Some(Vocabulary::Model("m".into()))),
        ("tokenizer_source: union", Some(Vocabulary::Union)),
        ("tokenizer: {}", Some(Vocabulary::Union)),
        ("tokenizer: {source: base}", Some(Vocabulary::Base)),
    ] {
        assert_eq!(recipe(&format!("{TIES}{text}\n")).vocabulary, vocabulary, "{text}");
    }
}

#[test]
fn single_tokens_have_sources_of_every_kind() {
    use crate::recipe::TokenSource;
    let text = "
tokenizer:
  source: union
  pad_to_multiple_of: 64
  tokens:
    '<|im_start|>': { source: { kind: model_token, model: { model: { path: m } }, token: <s> }, force: true }
    b: { source: { kind: model_token, model: b, token_id: 7 } }
    c: { source: m }
    d: { source: { kind: zero } }
    e:
    f: { force: yes }
";
    let recipe = recipe(&format!("{TIES}{text}"));
    assert_eq!(recipe.vocabulary_multiple, Some(64));
    let rules: Vec<_> = recipe.token_rules.iter().map(|r| (&*r.token, r.source.clone(), r.force)).collect();
    let expected = [
        ("<|im_start|>", Some(TokenSource::Token("m".into(), "<s>".into())), true),
        ("b", Some(TokenSource::Row("b".into(), 7)), false),
        ("c", Some(TokenSource::Model("m".into())), false),
        ("d", Some(TokenSource::Zero), false),
        ("e", None, false),
        ("f", None, true),
    ];
    assert_eq!(rules, expected);
    assert_eq!(recipe.token_rules[1].place.as_deref(), Some("r.yml:12:5"));
}

#[test]
fn slices_name_models_once_and_layers_by_their_first() {
    let text = "
merge_method: passthrough
slices:
- sources: [{ model: a, layer_range: [0, 4] }]
- sources: [{ model: b, layer_range: [2, 3], parameters: { scale: 0.5 } }]
  parameters: { scale: 2 }
  residual_weight: 0
- sources: [{ model: a, layer_range: [1, 4] }]
";
    let document = one(text);
    assert!(document.warnings[0].starts_with("r.yml:7:20: residual_weight"), "{:?}", document.warnings);
    let recipe = document.recipe;
    let models: Vec<&str> = recipe.models.iter().map(|m| &*m.source).collect();
    assert_eq!(models, ["a", "b"]);
    let slices: Vec<_> = recipe.slices.iter().map(|s| (s.sources[0].model, s.sources[0].first, s.layers)).collect();
    assert_eq!(slices, [(0, 0, 4), (1, 2, 1), (0, 1, 3)]);
    assert_eq!(recipe.slices[1].params["scale"], Value::Number(2.0));
    assert_eq!(recipe.slices[1].sources[0].params["scale"], Value::Number(0.5));
}

#[test]
fn slices_of_task_vectors_know_their_base() {
    let source = |model: &str, first: u64| format!("  - {{ model: {model}, layer_range: [{first}, {}] }}\n", first + 2);
    let slices = |sources: &[String]| {
        format!(
            "merge_method: task_arithmetic\nbase_model: b\nparameters: {{ weight: 1 }}\nslices:\n- sources:\n{}",
            sources.concat()
        )
    };
    // As a source of its own, or at the layers that all sources name.
    let base = recipe(&slices(&[source("b", 3), source("m", 0)])).slices[0].base.clone().unwrap();
    assert_eq!((base.model, base.first), (None, 3));
    let base = recipe(&slices(&[source("m", 5), source("n", 5)])).slices[0].base.clone().unwrap();
    assert_eq!((base.model, base.first), (None, 5));
    let error = parse(&slices(&[source("m", 5), source("n", 4)]), "r.yml").unwrap_err().to_string();
    assert!(error.contains("r.yml:5:3: the sources begin at different layers"), "{error}");
    // A slice may have a base of its own.
    let text = slices(&[source("m", 0)]) + "  base_model: other\n";
    let recipe = recipe(&text);
    let base = recipe.slices[0].base.clone().unwrap();
    assert_eq!(recipe.models[base.model.unwrap()].source, "other");
}

#[test]
fn one_module_is_the_whole_model() {
    let text = "
merge_method: linear
parameters: { weight: { filter: mlp, value: 3 } }
modules:
  default:
    models: [{ model: a, parameters: { weight: 1 } }, { model: b }]
    parameters: { weight: { filter: attn, value: 2 } }
";
    let recipe = recipe(text);
    let weight = &recipe.params["weight"];
    assert_eq!((number(weight, "attn", 0.0), number(weight, "mlp", 0.0)), (2.0, 3.0));
    assert_eq!(weight.at("norm", 0.0), None);
}

#[test]
fn documents_come_in_the_order_of_their_use() {
    let document = |name: &str, models: &[&str]| {
        let list: String = models.iter().map(|m| format!("- {{model: {m}, parameters: {{weight: 1}}}}\n")).collect();
        let name = if name.is_empty() { String::new() } else { format!("name: {name}\n") };
        format!("---\n{name}merge_method: linear\nmodels:\n{list}")
    };
    let text = document("", &["two", "x"]) + &document("two", &["one", "y"]) + &document("one", &["x", "y"]);
    let names: Vec<_> = documents(&text).into_iter().map(|d| d.name.unwrap_or_default()).collect();
    assert_eq!(names, ["one", "two", ""]);
    for (text, message) in [
        (document("a", &["b"]) + &document("b", &["a"]), "in the end, from its own output"),
        (document("a", &["x"]) + &document("a", &["y"]), "two documents are called \"a\""),
        (document("", &["x"]) + &document("", &["y"]), "r.yml:6:1: a second document without a name"),
        (document("../a", &["x"]), "cannot be the name of a directory"),
    ] {
        let error = parse(&text, "r.yml").unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn aliases_and_merged_mappings() {
    let text = "
merge_method: linear
models:
- model: a
  parameters: &p { weight: 2 }
- model: b
  parameters: *p
- model: c
  parameters: { <<: *p }
- model: d
  parameters: { <<: *p, weight: 3 }
";
    let recipe = recipe(text);
    let weights: Vec<f64> = recipe.models.iter().map(|m| number(&m.params["weight"], "", 0.0)).collect();
    assert_eq!(weights, [2.0, 2.0, 2.0, 3.0]);
}

#[test]
fn types_may_have_torchs_prefix_and_the_outputs_goes_first() {
    for (text, dtype) in [
        ("dtype: torch.bfloat16", Some(Float::BF16)),
        ("dtype: float16\nout_dtype: torch.float32", Some(Float::F32)),
        ("out_dtype: bfloat16", Some(Float::BF16)),
        ("dtype: null", None),
    ] {
        assert_eq!(recipe(&format!("{TIES}{text}\n")).dtype, dtype, "{text}");
    }
    let error = parse(&format!("{TIES}out_dtype: torch.float8\n"), "r.yml").unwrap_err().to_string();
    assert!(error.starts_with("r.yml:6:12: unknown out_dtype"), "{error}");
}

/// The parameter `name` as `value`, for the whole merge.
fn shared(method: &str, name: &str, value: &str) -> Recipe {
    recipe(&format!("{}parameters: {{ {name}: {value} }}\n", TIES.replace("ties", method)))
}

#[test]
fn switches_of_mergekit_mean_what_they_mean_there() {
    for method in ["task_arithmetic", "dare_linear", "della_linear", "breadcrumbs"] {
        assert_eq!(shared(method, "normalize", "true").params["normalize"], Value::Word("true".into()), "{method}");
    }
    for method in ["ties", "della", "dare_ties", "breadcrumbs_ties"] {
        assert_eq!(shared(method, "normalize", "true").params["combine"], Value::Word("mean".into()), "{method}");
        assert_eq!(shared(method, "normalize", "no").params["combine"], Value::Word("sum".into()), "{method}");
    }
    assert_eq!(shared("linear", "normalize", "false").params["normalize"], Value::Word("false".into()));
    // Where nothing is dropped there is nothing to rescale.
    assert!(!shared("task_arithmetic", "rescale", "true").params.contains_key("rescale"));
    assert_eq!(shared("dare_ties", "rescale", "false").params["rescale"], Value::Word("none".into()));
    for method in ["ties", "breadcrumbs", "breadcrumbs_ties"] {
        assert_eq!(shared(method, "rescale", "true").params["rescale"], Value::Word("l1".into()), "{method}");
        assert!(!shared(method, "lambda", "1").params.contains_key("rescale"), "{method}");
    }
}

#[test]
fn what_has_no_effect_is_warned_of() {
    for (text, warning) in [
        (format!("{TIES}parameters: {{ gamma: 0.1 }}\n"), "r.yml:6:15: ties has no parameter gamma: it is ignored"),
        (TIES.replace("weight: 1", "weight: 1, lambda: 2"), "r.yml:5:27: lambda is for the merge as a whole"),
    ] {
        let warnings = one(&text).warnings;
        assert!(warnings.len() == 1 && warnings[0].starts_with(warning), "{warnings:?}");
    }
}

/// Every way to be wrong: (what follows the good recipe or replaces a part of it, the error).
#[test]
fn mistakes_are_named_with_their_place() {
    let with = |more: &str| format!("{TIES}{more}\n");
    let instead = |from: &str, to: &str| TIES.replace(from, to);
    let slice = |body: &str| format!("merge_method: passthrough\nslices:\n- {body}\n");
    let cases: Vec<(String, &str)> = vec![
        (with("paramters: {}"), "r.yml:6:1: unknown key in a recipe: \"paramters\"; did you mean \"parameters\"?"),
        (with("colour: red"), "r.yml:6:1: unknown key in a recipe: \"colour\"; known are: merge_method, models"),
        (with("parameters: { lamda: 1 }"), "r.yml:6:15: unknown parameter: \"lamda\"; did you mean \"lambda\"?"),
        (instead("  parameters: {weight: 1}", "  weight: 1"), "r.yml:5:3: unknown key in a model: \"weight\""),
        (instead("ties", "teis"), "r.yml:1:15: unknown merge_method: \"teis\"; did you mean \"ties\"?"),
        (instead("merge_method: ties\n", ""), "r.yml:1:1: no merge_method"),
        (instead("base_model: b\n", ""), "r.yml:1:1: ties works on task vectors and needs 'base_model'"),
        (instead("weight: 1", "weight: heavy"), "r.yml:5:24: weight must be a number, not \"heavy\""),
        (instead("weight: 1", "weight: .inf"), "weight must be a number"),
        (instead("weight: 1", "weight: [1, a]"), "r.yml:5:28: weight must be a number, not \"a\""),
        (instead("weight: 1", "weight: [1, {value: 2}]"), "r.yml:5:28: a mapping in a gradient of weight"),
        (instead("weight: 1", "weight: []"), "weight is an empty list"),
        (instead("weight: 1", "weight: {filter: a}"), "a case of weight without a value"),
        (instead("weight: 1", "weight: {filtre: a, value: 1}"), "did you mean \"filter\"?"),
        (instead("weight: 1", "weight: {filter: 'a[', value: 1}"), "r.yml:5:33: filter \"a[\""),
        (instead("weight: 1", "density: 1.5"), "r.yml:5:25: density is 1.5, but must lie between 0 and 1"),
        (with("parameters: { normalize: maybe }"), "r.yml:6:26: normalize must be true or false, not \"maybe\""),
        (with("parameters: { normalize: true, combine: sum }"), "say the same thing: keep one"),
        (with("parameters: { elect: vote }"), "r.yml:6:22: unknown elect: \"vote\""),
        (with("parameters: { rescale: maybe }"), "r.yml:6:24: rescale must be true or false, not \"maybe\""),
        (with("parameters: 3"), "r.yml:6:13: parameters must be a mapping, not a single value"),
        (with("dtype: float8"), "r.yml:6:8: unknown dtype: \"float8\"; did you mean \"float16\"?"),
        (with("dtype: int64"), "dtype int64"),
        (with("scope: layer"), "r.yml:6:8: unknown scope"),
        (with("seed: -1"), "r.yml:6:7: seed must be a whole number, not \"-1\""),
        (with("slices: [a]"), "r.yml:6:9: both 'models' and 'slices': give one"),
        (with("base_model: c"), "r.yml:6:1: key \"base_model\" comes twice, first in line 2"),
        (with("tokenizer_source: [other]"), "r.yml:6:19: tokenizer source must be a text, not a list"),
        (with("tokenizer_source: base\ntokenizer: {source: base}"), "both 'tokenizer_source' and 'tokenizer'"),
        (with("tokenizer: {pad_to_multiple_of: 0}"), "r.yml:6:33: pad_to_multiple_of is 0, but must lie between 1 and"),
        (with("tokenizer: {pad_to_multiple_of: 1.5}"), "pad_to_multiple_of must be a whole number, not \"1.5\""),
        (with("tokenizer: {tokens: [a]}"), "r.yml:6:21: tokens must be a mapping, not a list"),
        (with("tokenizer: {tokens: {a: {sauce: m}}}"), "r.yml:6:26: unknown key in a token: \"sauce\""),
        (with("tokenizer: {tokens: {a: {source: x}}}"), "r.yml:6:34: the token source \"x\" is none of the models"),
        (with("tokenizer: {tokens: {a: {force: maybe}}}"), "r.yml:6:33: force must be true or false"),
        (with("tokenizer: {tokens: {a: {source: {kind: model}}}}"), "r.yml:6:41: unknown kind: \"model\""),
        (with("tokenizer: {tokens: {a: {source: {kind: zero, token: b}}}}"), "r.yml:6:47: token with kind zero"),
        (with("tokenizer: {tokens: {a: {source: {kind: model_token}}}}"), "a token source without 'model'"),
        (with("tokenizer: {tokens: {a: {source: {kind: model_token, model: m}}}}"), "needs 'token' or 'token_id'"),
        (
            with("tokenizer: {tokens: {a: {source: {kind: model_token, model: m, token: b, token_id: 1}}}}"),
            "r.yml:6:34: a token source needs 'token' or 'token_id', and not both",
        ),
        (with("tokenizer: {sauce: base}"), "did you mean \"source\"?"),
        (with("chat_template: mistrall"), "r.yml:6:16: unknown chat_template: \"mistrall\"; did you mean \"mistral\"?"),
        (with("chat_template: autp"), "r.yml:6:16: unknown chat_template: \"autp\"; did you mean \"auto\"?"),
        (with("chat_template: []"), "chat_template must be a text, not a list"),
        (instead("- model: m", "- model: {model: m, lora: {revision: l}}"), "lora without 'path'"),
        (
            instead("- model: m", "- model: {model: m, override_architecture: [A]}"),
            "r.yml:4:44: override_architecture must be a text, not a list",
        ),
        (instead("- model: m", "- model: {model: {path: m, revison: l}}"), "did you mean \"revision\"?"),
        (instead("- model: m\n  ", "- "), "r.yml:4:3: an entry without 'model'"),
        (with("- {model: m}"), "r.yml:6:3: model \"m\" comes twice, first in line 4"),
        (instead("models:\n- model: m\n  parameters: {weight: 1}", "models: m"), "r.yml:3:9: models must be a list"),
        (instead("- model: m", "- model: b"), "no model but base"),
        (instead("models:\n- model: m\n  parameters: {weight: 1}", ""), "neither 'models' nor 'slices'"),
        (slice("sources: [{model: a}]"), "r.yml:3:13: a source without 'layer_range'"),
        (slice("sources: [{model: a, layer_range: [0]}]"), "layer_range has 1 numbers, but needs two"),
        (slice("sources: [{model: a, layer_range: [3, 3]}]"), "r.yml:3:37: layer_range [3, 3] holds no layer"),
        (slice("sources: [{model: a, layer_range: [0, x]}]"), "a layer must be a whole number, not \"x\""),
        (
            slice("sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]"),
            "3 layers, but the slice's first source has 2",
        ),
        (slice("source: []"), "did you mean \"sources\"?"),
        (slice("parameters: {scale: 1}"), "r.yml:3:3: a slice without 'sources'"),
        (
            "merge_method: linear\nmodules: {a: {models: [{model: x}]}, b: {}}\n".into(),
            "r.yml:2:41: the module \"b\" has either 'models' or 'slices'",
        ),
        ("merge_method: linear\nmodules: {a: {}}\n".into(), "a module has either 'models' or 'slices'"),
        ("- a\n".into(), "r.yml:1:1: a recipe must be a mapping, not a list"),
        ("".into(), "r.yml:1:1: an empty recipe"),
        ("# nothing\n---\n".into(), "an empty recipe"),
        ("a: [1\n".into(), "not valid YAML"),
        ("a: 'x\n".into(), "not valid YAML"),
        ("a: *nowhere\n".into(), "not valid YAML"),
        ("? [a]\n: b\n".into(), "r.yml:1:3: a list as a key"),
        ("a: !!python/object x\n".into(), "a YAML tag"),
        ("a: &a [*a]\n".into(), "an alias within what it names"),
        ("<<: 3\n".into(), "<< takes in mappings"),
    ];
    for (text, message) in cases {
        let error = parse(&text, "r.yml").expect_err(&text);
        assert_eq!(error.exit_code(), 2);
        let error = error.to_string();
        assert!(error.contains(message), "{text}\n{error}\n{message}");
        assert!(error.starts_with("r.yml:"), "{error}");
    }
}

#[test]
fn files_that_would_be_huge_are_refused_quickly() {
    let begin = std::time::Instant::now();
    let mut bomb = String::from("a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n");
    for level in 1..=10 {
        let aliases = vec![format!("*a{}", level - 1); 9].join(", ");
        bomb.push_str(&format!("a{level}: &a{level} [{aliases}]\n"));
    }
    let mut merges = String::from("a: &a {");
    (0..20_000).for_each(|i| merges.push_str(&format!("k{i}: 1, ")));
    merges.push_str("}\n");
    (0..20_000).for_each(|i| merges.push_str(&format!("b{i}: {{<<: *a}}\n")));
    let cases = [
        (bomb, "aliases written out"),
        (merges, "more than 100000 values"),
        ("[".repeat(4000), "not valid YAML"),
        (format!("{}1", "- ".repeat(4000)), ""),
        (format!("{}1", "{a: ".repeat(4000)), ""),
        (format!("a: {}", "x".repeat(2 << 20)), "bytes, but a recipe has at most 1048576"),
        ("- a\n".repeat(200_000), "more than 100000 values"),
        ("--- {a: b}\n".repeat(2000), "2000 documents"),
    ];
    for (text, message) in cases {
        let error = parse(&text, "r.yml").expect_err(&text[..40]).to_string();
        assert!(error.contains(message), "{error}");
    }
    assert!(begin.elapsed().as_secs() < 20, "{:?}", begin.elapsed());
}

#[test]
fn no_mutation_of_a_recipe_makes_it_panic() {
    let seeds = [
        include_str!("../../../fuzz/corpus/recipe/seed-ties"),
        include_str!("../../../fuzz/corpus/recipe/seed-slices"),
        include_str!("../../../fuzz/corpus/recipe/seed-documents"),
    ];
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let pieces = [
        "- ", ": ", "\n", "  ", "[", "]", "{", "}", "&a ", "*a", "<<: ", "'", "\"", "---\n", "#", "|", "null", "-1",
        "é", "\t",
    ];
    let (mut accepted, mut refused) = (0, 0);
    for round in 0..6000 {
        let mut text = seeds[round % seeds.len()].to_string();
        assert!(round >= seeds.len() || parse(&text, "f").is_ok(), "{text}");
        for _ in 0..random(4) + usize::from(round >= seeds.len()) {
            let mut at = random(text.len() + 1);
            while !text.is_char_boundary(at) {
                at -= 1;
            }
            match random(3) {
                0 => text.insert_str(at, pieces[random(pieces.len())]),
                1 => drop(text.split_off(at)),
                _ if at < text.len() => drop(text.remove(at)),
                _ => {}
            }
        }
        match parse(&text, "f") {
            Ok(_) => accepted += 1,
            Err(error) => {
                assert_eq!(error.exit_code(), 2, "{error}");
                assert!(error.to_string().starts_with("f:"), "{error}\n{text}");
                refused += 1;
            }
        }
    }
    assert!(accepted > 100 && refused > 1000, "{accepted} {refused}");
}
