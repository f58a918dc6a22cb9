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
    accuracies_on(network, &DOMAINS)
}

/// The accuracy of a network on some domains.
fn accuracies_on(network: &Tensors, domains: &[&'static str]) -> BTreeMap<&'static str, f64> {
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
    domains.iter().map(|&domain| (domain, accuracy(&TEST_SET.images[domain]))).collect()
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

/// The cells of the row of the first table below `heading` in docs/paper.md that begins with `label`.
fn documented(heading: &str, label: &str) -> Vec<f64> {
    let page = std::fs::read_to_string(repository("docs/paper.md")).unwrap();
    let section = page.split_once(&format!("### {heading}\n")).unwrap().1;
    let row = section.lines().find_map(|line| line.strip_prefix(&format!("| {label} |"))).unwrap();
    row.trim_end_matches('|').split('|').map(|cell| cell.trim().parse().unwrap()).collect()
}

/// Fails unless the mean accuracies on the models' own domains are those that the documentation shows.
#[track_caller]
fn must_be_documented(heading: &str, label: &str, found: &[f64]) {
    let rounded: Vec<f64> = found.iter().map(|accuracy| (accuracy * 1000.0).round() / 1000.0).collect();
    assert_eq!(rounded, documented(heading, label), "{heading}, {label}");
}

/// Mean accuracy of `network(domain)` on its own domain.
fn mean_accuracy(network: impl Fn(&str) -> Tensors) -> f64 {
    DOMAINS.iter().map(|&domain| accuracies_on(&network(domain), &[domain])[domain]).sum::<f64>() / DOMAINS.len() as f64
}

#[test]
fn a_single_model_trimmed_scores_as_in_figure_3() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("grid");
    let mut args = vec!["sweep".to_owned(), "--base".into(), folder("base"), "--out".into(), text(&out)];
    args.extend(DOMAINS.iter().flat_map(|domain| ["--model".into(), folder(domain)]));
    let densities = ["1%", "5%", "10%", "20%", "30%", "50%", "80%", "100%"];
    args.extend(["--subset=1,2,3,4,5".into(), format!("--density={}", densities.join(","))]);
    tiesmith(args).succeeded();
    let score = |density: &&str| {
        mean_accuracy(|domain| {
            let number = DOMAINS.iter().position(|other| *other == domain).unwrap() + 1;
            read_checkpoint(&out.join(format!("models-{number}_density-{}", density.trim_end_matches('%'))))
        })
    };
    must_be_documented("Figure 3", "accuracy", &densities.iter().map(score).collect::<Vec<_>>());
}

#[test]
fn flipped_signs_score_as_in_figure_7() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    for (label, flags) in [
        ("largest 20 % flipped", ["--flip-sign=top", "--density=20%"]),
        ("smallest 80 % flipped", ["--flip-sign=bottom", "--density=80%"]),
    ] {
        let score = |probability: &&str| {
            mean_accuracy(|domain| {
                let (model, base) = (folder(domain), folder("base"));
                let rest = ["--probability", probability, "--force", "--out", &text(&out)].map(str::to_owned);
                let args = ["perturb", &model, "--base", &base, flags[0], flags[1]].map(str::to_owned);
                tiesmith(args.into_iter().chain(rest)).succeeded();
                read_checkpoint(&out)
            })
        };
        let found: Vec<f64> = ["0", "0.25", "0.5", "0.75", "1"].iter().map(score).collect();
        must_be_documented("Figure 7", label, &found);
    }
}

#[test]
fn tables_5_and_6_score_as_documented() {
    let page = std::fs::read_to_string(repository("docs/paper.md")).unwrap();
    let tables = page.split_once("## Tables 5 and 6\n").unwrap().1;
    let check = |label: &str, found: f64| {
        let rows: Vec<&str> = tables.lines().filter(|line| line.starts_with(&format!("| {label} |"))).collect();
        assert!(!rows.is_empty(), "there is no row {label}");
        for row in rows {
            let cell = row.split('|').nth(3).unwrap().trim();
            assert_eq!(format!("{found:.3}"), cell, "{label}");
        }
    };
    let mean = |network: &Tensors| accuracies(network).values().sum::<f64>() / DOMAINS.len() as f64;
    let read = |name: &str| read_checkpoint(Path::new(&folder(name)));
    check("Fine-tuned", mean_accuracy(read));
    check("Multitask", mean(&read("multitask")));
    let signs = folder("multitask");
    let rows: [(&str, bool, &[&str]); 8] = [
        ("TIES-Merging", true, &["--density", "0.2"]),
        ("− Trim", true, &["--density", "1"]),
        ("− Elect", true, &["--density", "0.2", "--elect", "none"]),
        ("− Disjoint Mean", true, &["--density", "0.2", "--combine", "mean-all"]),
        ("− Scale", true, &["--density", "0.2", "--lambda", "1"]),
        ("Averaging", false, &["--method", "linear"]),
        ("Task vectors", true, &["--method", "task_arithmetic", "--lambda", "0.4"]),
        ("TIES-Merging (oracle sign)", true, &["--density", "0.2", "--sign-from", &signs]),
    ];
    for (label, based, flags) in rows {
        // The command is the one that the row shows.
        let command = flags.join(" ").replace(&signs, "MULTITASK");
        assert!(tables.lines().any(|line| line.starts_with(&format!("| {label} | `{command}`"))), "{label}: {command}");
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let mut args = vec!["merge".to_owned(), "--out".into(), text(&out)];
        args.extend(based.then(|| ["--base".to_owned(), folder("base")]).into_iter().flatten());
        args.extend(DOMAINS.iter().flat_map(|domain| ["--model".into(), folder(domain)]));
        args.extend(flags.iter().map(|flag| (*flag).to_owned()));
        tiesmith(args).succeeded();
        check(label, mean(&read_checkpoint(&out)));
    }
}
