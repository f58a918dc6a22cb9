//! `tokenizer_source`: one vocabulary for models that disagree, against rows put together by hand.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::files::{Layout, read_checkpoint, read_json, read_tree, write_checkpoint};
use crate::support::random::Random;
use crate::support::run::{Outcome, command, run};
use crate::support::tensor::{Tensor, Tensors};

const COLUMNS: usize = 3;

/// Models with tokenizers in a directory.
struct Place {
    dir: TempDir,
}

/// `tokenizer.json` of words: ordinary ones numbered from 0, then added ones.
fn tokenizer(words: &[&str], added: &[(&str, bool)]) -> Value {
    let vocab: serde_json::Map<String, Value> =
        words.iter().enumerate().map(|(id, w)| ((*w).into(), id.into())).collect();
    let added: Vec<Value> = added
        .iter()
        .enumerate()
        .map(|(at, (content, special))| {
            json!({
                "id": words.len() + at, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": special,
            })
        })
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": words[0]},
    })
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A model with `rows` rows of `dtype` in embedding and head.
    fn model(&self, name: &str, rows: usize, dtype: Dtype, seed: u64, tokenizer: Option<Value>) -> Tensors {
        let mut random = Random::new(seed);
        let mut tensors = Tensors::new();
        for (name, shape) in [
            ("model.embed_tokens.weight", [rows, COLUMNS]),
            ("lm_head.weight", [rows, COLUMNS]),
            ("model.embed_positions.weight", [7, COLUMNS]),
            ("model.layers.0.mlp.weight", [4, COLUMNS]),
        ] {
            let values: Vec<f32> = (0..shape[0] * shape[1]).map(|_| random.symmetric()).collect();
            tensors.insert(name.into(), Tensor::floats(dtype, &shape, &values));
        }
        write_checkpoint(&self.path(name), &tensors, Layout::SINGLE);
        let config = json!({"model_type": "fixture", "num_hidden_layers": 1, "vocab_size": rows});
        fs::write(self.path(name).join("config.json"), config.to_string()).unwrap();
        if let Some(tokenizer) = tokenizer {
            fs::write(self.path(name).join("tokenizer.json"), tokenizer.to_string()).unwrap();
        }
        tensors
    }

    fn tiesmith(&self, args: &[&str]) -> Outcome {
        let mut command = command();
        command.current_dir(self.dir.path()).args(args);
        run(command)
    }

    /// base + 1·(a − base) + 0.5·(b − base) with the vocabulary of `source`.
    fn merge(&self, source: &str, extra: &[&str]) -> Tensors {
        let recipe = format!(
            "merge_method: task_arithmetic\nbase_model: base\ntokenizer_source: {source}\nmodels:\n\
             - {{model: a, parameters: {{weight: 1}}}}\n- {{model: b, parameters: {{weight: 0.5}}}}\n"
        );
        fs::write(self.path("recipe.yml"), recipe).unwrap();
        let _ = fs::remove_dir_all(self.path("out"));
        let args = [&["merge", "recipe.yml", "--out", "out", "--progress", "none", "--json"], extra].concat();
        let outcome = self.tiesmith(&args);
        if outcome.code == Some(0) { read_checkpoint(&self.path("out")) } else { panic!("{}", outcome.stderr) }
    }

    fn refusal(&self, source: &str) -> String {
        let _ = fs::remove_dir_all(self.path("out"));
        let args = ["merge", "recipe.yml", "--out", "out"];
        let recipe = fs::read_to_string(self.path("recipe.yml")).unwrap();
        let (head, rest) = recipe.split_once("tokenizer_source: ").unwrap();
        let rest = &rest[rest.find("models:").unwrap()..];
        fs::write(self.path("recipe.yml"), format!("{head}tokenizer_source: {source}\n{rest}")).unwrap();
        let outcome = self.tiesmith(&args);
        assert!(!self.path("out").exists());
        outcome.refusal().to_owned()
    }

    /// Three models: `a` adds two tokens to base's, `b` has base's in another order and adds one of them.
    fn family(&self, dtypes: [Dtype; 3]) -> [Tensors; 3] {
        let base = tokenizer(&["<unk>", "one", "two", "three"], &[]);
        let a = tokenizer(&["<unk>", "one", "two", "three", "four"], &[("<im>", true)]);
        let b = tokenizer(&["<unk>", "three", "two", "one"], &[("<im>", true)]);
        [
            self.model("base", 4, dtypes[0], 1, Some(base)),
            self.model("a", 6, dtypes[1], 2, Some(a)),
            // A row more than there are tokens.
            self.model("b", 6, dtypes[2], 3, Some(b)),
        ]
    }
}

fn row(tensor: &Tensor, row: usize) -> Vec<f32> {
    tensor.f32s()[row * COLUMNS..(row + 1) * COLUMNS].to_vec()
}

/// The mean of two rows, rounded to `dtype`.
fn mean(dtype: Dtype, a: &[f32], b: &[f32]) -> Vec<f32> {
    let values: Vec<f32> = a.iter().zip(b).map(|(a, b)| (0.0 + a + b) / 2.0).collect();
    Tensor::floats(dtype, &[values.len()], &values).f32s()
}

/// What the merge makes of rows of base, a and b.
fn merged(base: &[f32], a: &[f32], b: &[f32]) -> Vec<f32> {
    let each = base.iter().zip(a).zip(b);
    each.map(|((base, a), b)| ((0.0 + 1.0 * (a - base)) + 0.5 * (b - base)) * 1.0 + base).collect()
}

#[test]
fn a_union_has_every_token_and_the_rows_that_models_have_for_it() {
    for dtypes in [[Dtype::F32; 3], [Dtype::F32, Dtype::BF16, Dtype::F16]] {
        let place = Place::new();
        let [base, a, b] = place.family(dtypes);
        let out = place.merge("union", &[]);
        for name in ["model.embed_tokens.weight", "lm_head.weight"] {
            let (base, a, b) = (&base[name], &a[name], &b[name]);
            assert_eq!(out[name].shape, [6, COLUMNS]);
            // "one" is in row 1 of base and a, and in row 3 of b.
            assert_eq!(row(&out[name], 1), merged(&row(base, 1), &row(a, 1), &row(b, 3)), "{name}");
            assert_eq!(row(&out[name], 2), merged(&row(base, 2), &row(a, 2), &row(b, 2)), "{name}");
            // "four": ordinary tokens come first; a alone has it.
            let four = row(a, 4);
            let rounded = |dtype| Tensor::floats(dtype, &[COLUMNS], &four).f32s();
            assert_eq!(row(&out[name], 4), merged(&rounded(dtypes[0]), &four, &rounded(dtypes[2])), "{name}");
            // "<im>": base has the mean of the others.
            let (own, other) = (row(a, 5), row(b, 4));
            assert_eq!(row(&out[name], 5), merged(&mean(dtypes[0], &own, &other), &own, &other), "{name}");
        }
        assert_eq!(out["model.embed_positions.weight"].shape, [7, COLUMNS]);
        assert_eq!(read_json(&place.path("out/config.json"))["vocab_size"], 6);
    }
}

#[test]
fn tokens_that_share_a_number_have_one_order() {
    let place = Place::new();
    place.family([Dtype::F32; 3]);
    let mut base = tokenizer(&["<unk>", "one", "two", "three"], &[("<s>", true), ("<t>", true)]);
    // Of "three", "<s>" and "<t>" the added ones come first; of "zwei" and "two" the first by name.
    (base["added_tokens"][0]["id"], base["added_tokens"][1]["id"]) = (3.into(), 3.into());
    base["model"]["vocab"]["zwei"] = 2.into();
    fs::write(place.path("base/tokenizer.json"), base.to_string()).unwrap();
    let mut b = tokenizer(&["<unk>", "three", "two", "one"], &[("<im>", true)]);
    (b["model"]["vocab"]["x"], b["model"]["vocab"]["y"], b["model"]["vocab"]["z"]) = (3.into(), 3.into(), 3.into());
    b["added_tokens"].as_array_mut().unwrap().push(json!({"id": 2, "content": "<s>"}));
    fs::write(place.path("b/tokenizer.json"), b.to_string()).unwrap();
    let first = place.merge("union", &[]);
    let written = fs::read(place.path("out/tokenizer.json")).unwrap();
    for _ in 0..4 {
        assert!(place.merge("union", &[]) == first);
        assert!(fs::read(place.path("out/tokenizer.json")).unwrap() == written);
    }
    // "<s>" is in row 3 of base and in row 2 of b; a has none, and takes base's.
    let input = |name: &str| read_checkpoint(&place.path(name))["lm_head.weight"].clone();
    let (base, b) = (row(&input("base"), 3), row(&input("b"), 2));
    assert_eq!(row(&first["lm_head.weight"], 3), merged(&base, &base, &b));
}

#[test]
fn the_tokenizer_of_a_union_loads_and_round_trips() {
    let place = Place::new();
    place.family([Dtype::F32; 3]);
    place.merge("union", &[]);
    let loaded = tokenizers::Tokenizer::from_file(place.path("out/tokenizer.json")).unwrap();
    assert_eq!(loaded.get_vocab_size(true), 6);
    let ids = loaded.encode("one <im> four two", false).unwrap();
    assert_eq!(ids.get_ids(), [1, 5, 4, 2]);
    assert_eq!(loaded.decode(ids.get_ids(), false).unwrap(), "one <im> four two");
    assert_eq!(loaded.decode(ids.get_ids(), true).unwrap(), "one four two", "a special token stays special");
}

#[test]
fn the_vocabulary_of_base_or_of_a_model() {
    let place = Place::new();
    let [base, a, b] = place.family([Dtype::F32; 3]);
    let name = "lm_head.weight";
    let out = place.merge("base", &[]);
    assert_eq!(out[name].shape, [4, COLUMNS]);
    assert_eq!(row(&out[name], 3), merged(&row(&base[name], 3), &row(&a[name], 3), &row(&b[name], 1)));
    let text = |path: &str| fs::read_to_string(place.path(path)).unwrap();
    assert_eq!(text("out/tokenizer.json"), text("base/tokenizer.json"));

    let out = place.merge("b", &[]);
    assert_eq!(out[name].shape, [5, COLUMNS]);
    assert_eq!(row(&out[name], 3), merged(&row(&base[name], 1), &row(&a[name], 1), &row(&b[name], 3)));
    let (own, other) = (row(&a[name], 5), row(&b[name], 4));
    assert_eq!(row(&out[name], 4), merged(&mean(Dtype::F32, &other, &own), &own, &other));
    assert_eq!(text("out/tokenizer.json"), text("b/tokenizer.json"));
    assert_eq!(read_json(&place.path("out/config.json"))["vocab_size"], 5);
}

#[test]
fn the_vocabulary_of_a_model_that_is_not_merged() {
    let place = Place::new();
    let [base, a, b] = place.family([Dtype::F32; 3]);
    fs::create_dir(place.path("other")).unwrap();
    let other = tokenizer(&["two", "<unk>", "four"], &[]).to_string();
    fs::write(place.path("other/tokenizer.json"), &other).unwrap();
    let name = "lm_head.weight";
    let out = place.merge("other", &[]);
    assert_eq!(out[name].shape, [3, COLUMNS]);
    assert_eq!(row(&out[name], 0), merged(&row(&base[name], 2), &row(&a[name], 2), &row(&b[name], 2)));
    assert_eq!(row(&out[name], 1), merged(&row(&base[name], 0), &row(&a[name], 0), &row(&b[name], 0)));
    assert_eq!(row(&out[name], 2), row(&a[name], 4));
    assert_eq!(fs::read_to_string(place.path("out/tokenizer.json")).unwrap(), other);
}

#[test]
fn a_token_without_a_row_in_any_model_is_zeros_with_a_warning() {
    let place = Place::new();
    let words = ["<unk>", "one", "two"];
    place.model("base", 2, Dtype::F32, 1, Some(tokenizer(&words, &[])));
    place.model("a", 2, Dtype::F32, 2, None);
    place.model("b", 2, Dtype::F32, 3, None);
    let out = place.merge("union", &[]);
    assert_eq!(row(&out["lm_head.weight"], 2), [0.0; COLUMNS]);
    let manifest = read_json(&place.path("out/tiesmith.json"));
    let warnings = manifest["report"]["warnings"].to_string();
    assert!(warnings.contains("1 tokens have a row in no model: zeros"), "{warnings}");
}

#[test]
fn rows_do_not_depend_on_how_they_are_read() {
    let place = Place::new();
    let mut random = Random::new(4);
    let mut words: Vec<String> = (0..30_000).map(|i| format!("w{i}")).collect();
    let names = |words: &[String]| tokenizer(&words.iter().map(String::as_str).collect::<Vec<_>>(), &[]);
    place.model("base", words.len(), Dtype::BF16, 1, Some(names(&words)));
    words.extend((0..500).map(|i| format!("new{i}")));
    place.model("a", words.len(), Dtype::BF16, 2, Some(names(&words)));
    random.shuffle(&mut words);
    place.model("b", words.len(), Dtype::F32, 3, Some(names(&words)));
    let tree = |extra: &[&str]| {
        place.merge("union", extra);
        let mut files = read_tree(&place.path("out"));
        files.remove(Path::new("tiesmith.json"));
        files
    };
    let first = tree(&["--threads", "1"]);
    for extra in [&["--threads", "5"][..], &["--memory", "44MB", "--threads", "2"], &["--io", "mmap"]] {
        assert!(tree(extra) == first, "{extra:?}");
    }
    let report = place.tiesmith(&["merge", "recipe.yml", "--out", "again", "--json"]).succeeded().json();
    let plan = place.tiesmith(&["plan", "recipe.yml", "--json"]).succeeded().json();
    assert_eq!(plan["bytes_read"], report["bytes_read"]);
}

/// The value of `tokenizer_source` that, put where one goes, is a `tokenizer` section.
fn section(body: &str) -> String {
    format!("\ntokenizer: {{source: {body}}}")
}

#[test]
fn single_tokens_take_the_rows_that_the_recipe_says() {
    let place = Place::new();
    let [base, a, b] = place.family([Dtype::F32; 3]);
    let name = "lm_head.weight";
    let (base, a, b) = (&base[name], &a[name], &b[name]);
    let merge = |body: &str| {
        let mut out = place.merge(&section(body), &[]);
        out.remove(name).unwrap()
    };
    // "<im>" is in row 5 of a and row 4 of b. Without force, models that have it keep their own.
    let out = merge("union, tokens: {<im>: {source: b}}");
    assert_eq!(row(&out, 5), merged(&row(b, 4), &row(a, 5), &row(b, 4)));
    let out = merge("union, tokens: {<im>: {source: b, force: true}}");
    assert_eq!(row(&out, 5), merged(&row(b, 4), &row(b, 4), &row(b, 4)));
    // Another token's row, by name and by number; zeros; and force alone: what a model would have without its own.
    let out = merge("union, tokens: {<im>: {source: {kind: model_token, model: a, token: two}, force: true}}");
    assert_eq!(row(&out, 5), merged(&row(a, 2), &row(a, 2), &row(a, 2)));
    let out = merge("union, tokens: {<im>: {source: {kind: model_token, model: base, token_id: 3}}}");
    assert_eq!(row(&out, 5), merged(&row(base, 3), &row(a, 5), &row(b, 4)));
    let out = merge("union, tokens: {<im>: {source: {kind: zero}, force: true}, one: {force: true}}");
    assert_eq!(row(&out, 5), [0.0; COLUMNS]);
    assert_eq!(row(&out, 1), merged(&row(base, 1), &row(base, 1), &row(base, 1)));
    // A token that no vocabulary has is added to that of the output, whichever that is.
    let out = merge("base, tokens: {new: {source: {kind: model_token, model: b, token: one}}, <im>: null}");
    assert_eq!(out.shape, [6, COLUMNS]);
    assert_eq!(row(&out, 4), row(b, 3));
    let (own, other) = (row(a, 5), row(b, 4));
    assert_eq!(row(&out, 5), merged(&mean(Dtype::F32, &own, &other), &own, &other));
    let loaded = tokenizers::Tokenizer::from_file(place.path("out/tokenizer.json")).unwrap();
    let ids = loaded.encode("one new <im> two", false).unwrap();
    assert_eq!(ids.get_ids(), [1, 4, 5, 2]);
    assert_eq!(loaded.decode(ids.get_ids(), true).unwrap(), "one new two", "a special token stays special");
    // Without a source or a model that has it, it is zeros, with a warning.
    let out = merge("base, tokens: {other: {}}");
    assert_eq!(row(&out, 4), [0.0; COLUMNS]);
    let warnings = read_json(&place.path("out/tiesmith.json"))["report"]["warnings"].to_string();
    assert!(warnings.contains("1 tokens have a row in no model: zeros"), "{warnings}");
}

#[test]
fn rows_that_fill_up_are_the_average_of_all_others() {
    let place = Place::new();
    let [base, a, b] = place.family([Dtype::F32, Dtype::F32, Dtype::BF16]);
    let out = place.merge(&section("base, pad_to_multiple_of: 8"), &[]);
    let average = |tensor: &Tensor, rows: &[usize]| -> Vec<f32> {
        let sum = |c: usize| rows.iter().map(|&r| f64::from(row(tensor, r)[c])).sum::<f64>();
        let values: Vec<f32> = (0..COLUMNS).map(|c| (sum(c) / rows.len() as f64) as f32).collect();
        Tensor::floats(tensor.dtype, &[COLUMNS], &values).f32s()
    };
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        assert_eq!(out[name].shape, [8, COLUMNS]);
        let own = |tensors: &Tensors, rows: &[usize]| average(&tensors[name], rows);
        let expected = merged(&own(&base, &[0, 1, 2, 3]), &own(&a, &[0, 1, 2, 3]), &own(&b, &[0, 3, 2, 1]));
        (4..8).for_each(|r| assert_eq!(row(&out[name], r), expected, "{name} {r}"));
    }
    assert_eq!(read_json(&place.path("out/config.json"))["vocab_size"], 8);
    // Nothing to fill up, and a multiple that is none.
    assert_eq!(place.merge(&section("union, pad_to_multiple_of: 3"), &[])["lm_head.weight"].shape, [6, COLUMNS]);
    let tree = |extra: &[&str]| {
        place.merge(&section("union, pad_to_multiple_of: 64"), extra);
        read_checkpoint(&place.path("out"))
    };
    let first = tree(&["--threads", "1"]);
    assert_eq!(first["lm_head.weight"].shape, [64, COLUMNS]);
    assert!(tree(&["--threads", "4", "--io", "mmap"]) == first);
}

#[test]
fn a_row_of_base_that_no_token_stands_for_is_not_a_new_tokens() {
    // base has rows to spare; the token that is added has the number of one of them.
    let place = Place::new();
    place.model("base", 8, Dtype::F32, 1, Some(tokenizer(&["<unk>", "one"], &[])));
    let a = place.model("a", 3, Dtype::F32, 2, Some(tokenizer(&["<unk>", "one", "two"], &[])));
    place.model("b", 8, Dtype::F32, 3, None);
    let out = place.merge("union", &[]);
    assert_eq!(out["lm_head.weight"].shape, [3, COLUMNS]);
    assert_eq!(row(&out["lm_head.weight"], 2), row(&a["lm_head.weight"], 2));
}

#[test]
fn single_tokens_that_cannot_be_found() {
    let place = Place::new();
    place.family([Dtype::F32; 3]);
    place.merge("base", &[]);
    for (body, message) in [
        ("union, tokens: {<im>: {source: base}}", "recipe.yml:4:37: token \"<im>\": base has no token \"<im>\""),
        (
            "union, tokens: {x: {source: {kind: model_token, model: a, token: ten}}}",
            "token \"x\": a has no token \"ten\"",
        ),
        (
            "union, tokens: {x: {source: {kind: model_token, model: a, token_id: 6}}}",
            "recipe.yml:4:37: token \"x\": \"lm_head.weight\" has no row 6 there",
        ),
        ("union, tokens: {x: {source: {kind: model_token, model: a, token_id: 5000000000}}}", "no row 5000000000"),
        ("union, tokens: {x: {source: other}}", "recipe.yml:4:49: the token source \"other\" is none of the models"),
    ] {
        let refusal = place.refusal(&section(body));
        assert!(refusal.contains(message), "{refusal}");
    }
    fs::remove_file(place.path("base/tokenizer.json")).unwrap();
    for body in ["base, pad_to_multiple_of: 8", "base, tokens: {x: {}}"] {
        let refusal = place.refusal(&section(body));
        assert!(refusal.contains("no tokenizer.json in base"), "{refusal}");
    }
}

#[test]
fn tokenizers_that_are_missing_or_broken() {
    let place = Place::new();
    place.family([Dtype::F32; 3]);
    place.merge("base", &[]);
    let refusal = place.refusal("other");
    assert!(refusal.contains("other: no such file or directory, named in recipe.yml:3:19"), "{refusal}");
    let file = place.path("a/tokenizer.json");
    for (text, message) in [
        ("{", "not a tokenizer that can be read"),
        ("{}", "missing field `model`"),
        (r#"{"model": {"vocab": {"a": -1}}}"#, "not a tokenizer that can be read"),
        (
            r#"{"model": {"vocab": {"a": 4000000000}}}"#,
            "a token has the number 4000000000, but there are only 1 tokens",
        ),
        (r#"{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}"#, "an added token without content or id"),
    ] {
        fs::write(&file, text).unwrap();
        let refusal = place.refusal("union");
        assert!(refusal.contains("a/tokenizer.json") && refusal.contains(message), "{refusal}");
    }
    fs::remove_file(&file).unwrap();
    let refusal = place.refusal("a");
    assert!(refusal.contains("no tokenizer.json in a"), "{refusal}");
    // Without base's there is nothing to compare with; base's own vocabulary then stays as it is.
    fs::remove_file(place.path("base/tokenizer.json")).unwrap();
    assert!(place.refusal("union").contains("no tokenizer.json in base"));
    assert_eq!(place.merge("base", &[])["lm_head.weight"].shape, [4, COLUMNS]);
}

#[test]
fn the_chat_template_is_given_or_the_commonest() {
    let place = Place::new();
    place.family([Dtype::F32; 3]);
    let save = |path: &str, text: &str| fs::write(place.path(path), text).unwrap();
    save("base/tokenizer_config.json", r#"{"a": 1, "chat_template": "{{ one }}", "b": 2}"#);
    save("a/chat_template.jinja", "{{ two }}");
    save("b/tokenizer_config.json", r#"{"chat_template": [{"name": "default", "template": "{{ two }}"}]}"#);
    let template = |value: &str| {
        place.merge(&format!("base\nchat_template: {value}"), &[]);
        let file = fs::read_to_string(place.path("out/chat_template.jinja")).unwrap();
        let config = read_json(&place.path("out/tokenizer_config.json"));
        assert_eq!(config["chat_template"], file.as_str());
        assert_eq!((&config["a"], &config["b"]), (&json!(1), &json!(2)));
        file
    };
    assert_eq!(template("auto"), "{{ two }}");
    assert_eq!(template("'{{ messages | length }} messages'"), "{{ messages | length }} messages");
    assert!(template("chatml").contains("{{ '<|im_start|>assistant\\n' }}"));
    // Without the key files are copied as they are.
    place.merge("base", &[]);
    assert!(!place.path("out/chat_template.jinja").exists());
    for file in ["base/tokenizer_config.json", "b/tokenizer_config.json", "a/chat_template.jinja"] {
        fs::remove_file(place.path(file)).unwrap();
    }
    place.merge("base\nchat_template: auto", &[]);
    let warnings = read_json(&place.path("out/tiesmith.json"))["report"]["warnings"].to_string();
    assert!(warnings.contains("no input has a chat template"), "{warnings}");
}
