//! The files of a finished output, and the order in which they appear.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use safetensors::Dtype;
use serde_json::{Value, json};

use crate::support::family::{Family, Output, Saved, Spec, text};
use crate::support::files::{read_checkpoint, read_json};
use crate::support::oracle::Recipe;
use crate::support::run::command;
use crate::support::tensor::Tensor;

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn shards(dir: &Path) -> Vec<String> {
    names(dir).into_iter().filter(|name| name.ends_with(".safetensors")).collect()
}

/// The header of a safetensors file and where its data begins.
fn header(path: &Path) -> (Value, usize) {
    let bytes = fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + length]).unwrap(), 8 + length)
}

#[test]
fn a_small_output_is_one_file_without_an_index() {
    let output = Spec::default().family().save().merge(&Recipe::default(), &[]);
    assert_eq!(shards(&output.path), ["model.safetensors"]);
    assert!(!output.path.join("model.safetensors.index.json").exists());
}

#[test]
fn a_large_output_is_shards_and_an_index() {
    let family = Spec::default().family();
    let limit = 700;
    let output = family.save().merge(&Recipe::default(), &[&format!("--max-shard-size={limit}B")]);
    let found = shards(&output.path);
    assert!(found.len() > 1);
    for (i, name) in found.iter().enumerate() {
        assert_eq!(*name, format!("model-{:05}-of-{:05}.safetensors", i + 1, found.len()));
        let (header, data) = header(&output.path.join(name));
        let tensors = header.as_object().unwrap().len() - 1;
        let bytes = fs::metadata(output.path.join(name)).unwrap().len() as usize - data;
        assert!(tensors >= 1 && (bytes <= limit || tensors == 1), "{name}: {bytes} bytes in {tensors} tensors");
    }
    let index = read_json(&output.path.join("model.safetensors.index.json"));
    let total: usize = output.tensors().values().map(|tensor| tensor.bytes.len()).sum();
    assert_eq!(index["metadata"]["total_size"], json!(total));
    let listed: Vec<&String> = index["weight_map"].as_object().unwrap().keys().collect();
    assert_eq!(listed.len(), family.base.len());
}

#[test]
fn headers_say_pt_and_data_is_aligned() {
    for size in ["5GB", "700B"] {
        let output = Spec::default().family().save().merge(&Recipe::default(), &["--max-shard-size", size]);
        for name in shards(&output.path) {
            let (header, data) = header(&output.path.join(&name));
            assert_eq!(header["__metadata__"], json!({"format": "pt"}), "{name}");
            assert_eq!(data % 8, 0, "{name}: data begins at byte {data}");
        }
    }
}

/// A saved family whose base has the side files of a real checkpoint, and some that are not to be copied.
fn with_side_files(family: &Family) -> Saved {
    let saved = family.save();
    for name in SIDE_FILES.iter().chain(&NOT_COPIED) {
        fs::write(saved.base.join(name), format!("{{\"file\": \"{name}\"}}")).unwrap();
    }
    saved
}

const SIDE_FILES: [&str; 8] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
];
const NOT_COPIED: [&str; 4] = ["pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_config.json"];

#[test]
fn side_files_come_from_base() {
    let saved = with_side_files(&Spec::default().family());
    fs::write(saved.base.join("README.md"), "# The base's own card").unwrap();
    let output = saved.merge(&Recipe::default(), &[]);
    for name in SIDE_FILES {
        let (copied, original) = (fs::read(output.path.join(name)), fs::read(saved.base.join(name)));
        assert_eq!(copied.unwrap_or_default(), original.unwrap(), "{name}");
    }
    for name in NOT_COPIED {
        assert!(!output.path.join(name).exists(), "{name} was copied");
    }
    let card = fs::read_to_string(output.path.join("README.md")).unwrap();
    assert!(!card.contains("The base's own card"), "base's card is not this model's");
}

#[test]
fn nothing_else_is_in_the_output() {
    let output = Spec::default().family().save().merge(&Recipe::default(), &[]);
    let expected = ["README.md", "config.json", "model.safetensors", "tiesmith.json"];
    assert_eq!(names(&output.path), expected);
}

#[test]
fn the_configuration_says_the_output_type() {
    let family = Spec::default().family();
    for key in ["torch_dtype", "dtype"] {
        let saved = family.save();
        let config = json!({"model_type": "llama", "hidden_size": 8, "nested": {"x": [1, 2.5]}, key: "float32"});
        fs::write(saved.base.join("config.json"), config.to_string()).unwrap();
        for (dtype, name) in [(Dtype::BF16, "bfloat16"), (Dtype::F16, "float16"), (Dtype::F32, "float32")] {
            let recipe = Recipe { dtype: Some(dtype), ..Recipe::default() };
            let written = read_json(&saved.merge(&recipe, &[]).path.join("config.json"));
            let mut expected = config.clone();
            expected[key] = json!(name);
            assert_eq!(written, expected);
        }
    }
}

/// A configuration with these lines keeps them, while its type is brought in line.
fn stays_in_the_configuration(lines: &str) {
    let saved = Spec::default().family().save();
    let config = |dtype: &str| format!("{{\n  \"dtype\": \"{dtype}\",\n{lines}\n}}\n");
    fs::write(saved.base.join("config.json"), config("float32")).unwrap();
    let output = saved.merge(&Recipe { dtype: Some(Dtype::BF16), ..Recipe::default() }, &[]);
    assert_eq!(fs::read_to_string(output.path.join("config.json")).unwrap(), config("bfloat16"));
}

#[test]
fn what_python_writes_for_infinity_stays_in_the_configuration() {
    stays_in_the_configuration("  \"time_step_limit\": [\n    0.0,\n    Infinity\n  ]");
}

#[test]
fn numbers_of_the_configuration_come_out_as_they_went_in() {
    stays_in_the_configuration("  \"rms_norm_eps\": 1e-05,\n  \"a\": 1E400,\n  \"b\": -1e999");
}

#[test]
fn a_base_without_a_configuration_still_merges() {
    let saved = Spec::default().family().save();
    fs::remove_file(saved.base.join("config.json")).unwrap();
    let output = saved.merge(&Recipe::default(), &[]);
    assert!(!output.path.join("config.json").exists());
}

#[test]
fn the_model_card_has_front_matter_recipe_and_inputs() {
    let output = Spec::default().family().save().merge(&Recipe { density: 0.35, ..Recipe::default() }, &[]);
    let card = fs::read_to_string(output.path.join("README.md")).unwrap();
    let front = card.strip_prefix("---\n").and_then(|rest| rest.split_once("\n---\n")).expect("front matter");
    for word in ["base_model", "tags", "- merge", "- tiesmith"] {
        assert!(front.0.contains(word), "{word} is missing in\n{}", front.0);
    }
    for word in ["ties", "0.35", "model1", "model2", "model3"] {
        assert!(front.1.contains(word), "{word} is missing in\n{}", front.1);
    }
}

fn manifest(output: &Output) -> Value {
    read_json(&output.path.join("tiesmith.json"))
}

#[test]
fn the_manifest_has_the_hash_of_every_shard() {
    for size in ["5GB", "700B"] {
        let output = Spec::default().family().save().merge(&Recipe::default(), &["--max-shard-size", size]);
        let manifest = manifest(&output).to_string();
        for name in shards(&output.path) {
            let hash = blake3::hash(&fs::read(output.path.join(&name)).unwrap()).to_hex();
            assert!(manifest.contains(&name) && manifest.contains(hash.as_str()), "{name} {hash}\n{manifest}");
        }
    }
}

#[test]
fn the_manifest_records_recipe_inputs_and_results() {
    let saved = Spec::default().family().save();
    let first = manifest(&saved.merge(&Recipe::default(), &[]));
    for field in ["recipe", "fingerprint", "inputs"] {
        assert!(!first[field].is_null(), "{field} is missing in {first:#}");
    }
    let text = first.to_string();
    for word in [env!("CARGO_PKG_VERSION"), "threshold", "kept_fraction", "model1", "model2", "model3"] {
        assert!(text.contains(word), "{word} is missing in {first:#}");
    }
    let again = manifest(&saved.merge(&Recipe::default(), &["--threads=1"]));
    assert_eq!(first["fingerprint"], again["fingerprint"], "the same work");
    let other = manifest(&saved.merge(&Recipe { lambda: 0.5, ..Recipe::default() }, &[]));
    assert_ne!(first["fingerprint"], other["fingerprint"], "other work");
}

#[test]
fn a_finished_output_never_has_work_files() {
    let output = Spec::default().family().save().merge(&Recipe::default(), &["--max-shard-size=700B"]);
    assert!(!output.path.join(".tiesmith").exists());
    assert!(names(&output.path).iter().all(|name| !name.starts_with('.') && !name.contains("partial")));
}

#[test]
fn what_a_run_leaves_that_is_killed_at_its_very_end_goes_with_the_next() {
    let saved = Spec::default().family().save();
    let output = saved.merge(&Recipe::default(), &[]);
    let work = output.path.join(".tiesmith");
    let again = || saved.run("merge", &Recipe::default(), &["--progress=none", "--out", &text(&output.path)]);
    for with_lock in [false, true] {
        fs::create_dir(&work).unwrap();
        if with_lock {
            fs::write(work.join("lock"), "process 1").unwrap();
        }
        assert!(again().error_line(2).contains("a finished merge is already there"));
        assert!(!work.exists(), "with a lock: {with_lock}");
    }
    // Somebody else's work is not a trace.
    fs::create_dir(&work).unwrap();
    let lock = fs::File::create(work.join("lock")).unwrap();
    lock.lock().unwrap();
    again().error_line(2);
    assert!(work.join("lock").exists());
}

/// Large enough for a run to be watched: eight shards.
fn eight_shards() -> Family {
    let names = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let shapes = names.map(|name| (name, vec![40_000])).to_vec();
    Spec { shapes, ..Spec::default() }.family()
}

/// Starts a merge into `out` that nobody listens to.
fn start(saved: &Saved, out: &Path) -> Child {
    let mut merge = command();
    merge.arg("merge").args(saved.inputs(&Recipe::default())).args([
        "--max-shard-size=200KB",
        "--threads=1",
        "--out",
        &text(out),
    ]);
    merge.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn one_run_at_a_time_in_an_output() {
    let family = eight_shards();
    let saved = family.save();
    let out = saved.path("out");
    let mut first = start(&saved, &out);
    // More than the lock's file: the lock is held.
    let at_work = || fs::read_dir(out.join(".tiesmith")).is_ok_and(|entries| entries.count() > 1);
    while !at_work() {
        if first.try_wait().unwrap().is_some() {
            eprintln!("skipped: the first run was over before it was seen");
            return;
        }
    }
    let signal = |name: &str| {
        let sent = Command::new("kill").args([name, &first.id().to_string()]).status();
        sent.expect("kill is installed");
    };
    signal("-STOP");
    // Unless the first run ended in between.
    if at_work() {
        let second = saved.run("merge", &Recipe::default(), &["--progress=none", "--out", &text(&out)]);
        second.error_line(1);
        let index = out.join("model.safetensors.index.json");
        assert!(!index.exists(), "an unfinished output looks finished");
    }
    signal("-CONT");
    assert!(first.wait().unwrap().success(), "the second run disturbed the first");
    assert!(read_checkpoint(&out) == family.expected(&Recipe::default()).tensors);
}

#[test]
fn the_index_appears_last() {
    let family = eight_shards();
    let saved = family.save();
    let out = saved.path("out");
    let mut running = start(&saved, &out);
    let index = out.join("model.safetensors.index.json");
    loop {
        let ended = running.try_wait().unwrap();
        if index.exists() {
            // From this moment on, and not before, a loader would take it for a model.
            let tensors = read_checkpoint(&out);
            assert_eq!(tensors.len(), family.base.len());
            assert!(tensors.values().map(Tensor::elements).sum::<usize>() == 8 * 40_000);
            assert!(running.wait().unwrap().success());
            break;
        }
        assert!(ended.is_none(), "ended without an index: {ended:?}");
    }
    assert!(read_checkpoint(&out) == family.expected(&Recipe::default()).tensors);
}
