//! A real, tiny family: accuracies of merged networks against those computed independently.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::LazyLock;

use crate::support::family::text;
use crate::support::files::{read_checkpoint, read_file, read_json};
use crate::support::repository;
use crate::support::run::tiesmith;
use crate::support::tensor::Tensors;

const DOMAINS: [&str; 5] = ["rotated", "mirrored", "inverted", "flipped", "shuffled"];
const PIXELS: usize = 64;
/// Half a percentage point.
const TOLERANCE: f64 = 0.005;

fn folder(name: &str) -> String {
    text(&repository("examples/digits").join(name))
}

/// The test images.
struct TestSet {
    labels: Vec<usize>,
    images: BTreeMap<&'static str, Vec<f32>>,
}

static TEST_SET: LazyLock<TestSet> = LazyLock::new(|| {
    let file = read_file(&repository("examples/digits/test.safetensors"));
    TestSet {
        labels: file["labels"].values().into_iter().map(|label| label as usize).collect(),
        images: DOMAINS.iter().map(|domain| (*domain, file[&format!("images.{domain}")].f32s())).collect(),
    }
});

/// A linear layer with its matrix transposed, so that an input of zero skips a whole row.
struct Layer {
    rows: Vec<Vec<f32>>,
    bias: Vec<f32>,
}

impl Layer {
    fn new(tensors: &Tensors, name: &str) -> Self {
        let weight = &tensors[&format!("{name}.weight")];
        let (outputs, inputs) = (weight.shape[0], weight.shape[1]);
        let values = weight.f32s();
        Self {
            rows: (0..inputs).map(|i| (0..outputs).map(|o| values[o * inputs + i]).collect()).collect(),
            bias: tensors[&format!("{name}.bias")].f32s(),
        }
    }

    fn forward(&self, input: &[f32]) -> Vec<f32> {
        let mut output = self.bias.clone();
        for (x, row) in input.iter().zip(&self.rows).filter(|(x, _)| **x != 0.0) {
            for (y, w) in output.iter_mut().zip(row) {
                *y += x * w;
            }
        }
        output
    }
}

/// The accuracy of a network on each domain.
fn accuracies(network: &Tensors) -> BTreeMap<&'static str, f64> {
    let layers = ["layers.0", "layers.1", "head"].map(|name| Layer::new(network, name));
    let classify = |image: &[f32]| {
        let relu = |values: Vec<f32>| -> Vec<f32> { values.into_iter().map(|x| x.max(0.0)).collect() };
        let hidden = relu(layers[1].forward(&relu(layers[0].forward(image))));
        let logits = layers[2].forward(&hidden);
        (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap()
    };
    let accuracy = |images: &Vec<f32>| {
        let labels = &TEST_SET.labels;
        let right = images.chunks(PIXELS).zip(labels).filter(|(image, label)| classify(image) == **label).count();
        right as f64 / labels.len() as f64
    };
    TEST_SET.images.iter().map(|(domain, images)| (*domain, accuracy(images))).collect()
}

#[track_caller]
fn must_score_as_recorded(row: &str, network: &Tensors) {
    let recorded = read_json(&repository("examples/digits/accuracies.json"));
    for (domain, found) in accuracies(network) {
        let expected = recorded[row][domain].as_f64().unwrap_or_else(|| panic!("no row {row:?}"));
        assert!((found - expected).abs() <= TOLERANCE, "{row}, {domain}: {found:.4}, recorded {expected:.4}");
    }
}

/// Merges the five fine-tunes with these flags and compares with a row of `accuracies.json`.
#[track_caller]
fn must_merge_to(row: &str, flags: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let mut args = vec!["merge".to_owned(), "--base".into(), folder("base")];
    args.extend(DOMAINS.iter().flat_map(|domain| ["--model".into(), folder(domain)]));
    args.extend(flags.iter().map(|flag| (*flag).to_owned()));
    args.extend(["--out".into(), text(&out)]);
    tiesmith(args).succeeded();
    must_score_as_recorded(row, &read_checkpoint(&out));
}

#[test]
fn inputs_score_as_recorded() {
    let read = |name: &str| read_checkpoint(Path::new(&folder(name)));
    must_score_as_recorded("base", &read("base"));
    must_score_as_recorded("multitask", &read("multitask"));
    must_score_as_recorded("finetuned:inverted", &read("inverted"));
}

#[test]
fn averaging() {
    must_merge_to("average", &["--method", "linear"]);
}

#[test]
fn task_arithmetic() {
    for lambda in ["0.2", "0.3", "0.4", "0.5"] {
        let row = format!("task_arithmetic lambda={lambda}");
        must_merge_to(&row, &["--method", "task_arithmetic", "--lambda", lambda]);
    }
}

#[test]
fn ties_at_densities_0_1_and_0_2() {
    ties_at(&["0.1", "0.2"]);
}

#[test]
fn ties_at_densities_0_3_and_0_5() {
    ties_at(&["0.3", "0.5"]);
}

#[track_caller]
fn ties_at(densities: &[&str]) {
    for density in densities {
        for lambda in ["1.0", "1.5", "2.0"] {
            must_merge_to(&format!("ties k={density} lambda={lambda}"), &["--density", density, "--lambda", lambda]);
        }
    }
}

#[test]
fn ablations_and_oracle_signs() {
    must_merge_to("ties no trim", &["--density", "1"]);
    must_merge_to("ties no elect", &["--elect", "none"]);
    must_merge_to("ties oracle sign", &["--sign-from", &folder("multitask")]);
}
