//! The fuzz targets with fixed seeds: what each does with the committed corpus and with mutations of it.
//!
//! `TIESMITH_FUZZ` sets how many mutations of each seed are tried (100 unless set).

#[path = "../fuzz/cases/mod.rs"]
mod cases;
#[path = "it/support/random.rs"]
#[allow(dead_code)]
mod random;

use std::fs;
use std::path::Path;

use random::Random;

/// One of so many mutations is tried on the disk, too.
const ON_DISK_TOO: usize = 16;

/// Words that make mutations of text meet something.
const WORDS: [&str; 24] = [
    "\"",
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    "null",
    "-1",
    "0",
    "1",
    "18446744073709551615",
    "4611686018427387904",
    "1e999",
    "\\u0000",
    "__metadata__",
    "data_offsets",
    "shape",
    "dtype",
    "F32",
    "weight_map",
    "../",
    "*a",
    "&a [*a]",
];

fn mutate(seed: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() + 1);
        let end = (at + random.below(9)).min(bytes.len());
        match random.below(7) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = random.below(256) as u8,
            2 => drop(bytes.drain(at..end)),
            3 => bytes.truncate(at),
            4 => {
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
            5 => drop(bytes.splice(at..at, (0..random.below(12)).map(|_| 0).collect::<Vec<u8>>())),
            _ => drop(bytes.splice(at..end, WORDS[random.below(WORDS.len())].bytes())),
        }
    }
    bytes
}

/// Runs the seeds of `target`, and mutations of them.
fn target(name: &str, share: usize, run: fn(&[u8])) {
    let mutations = std::env::var("TIESMITH_FUZZ").ok().and_then(|n| n.parse().ok()).unwrap_or(100 * share);
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut paths: Vec<_> = fs::read_dir(&corpus).expect("seeds").map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let mut random = Random::new(17);
    let mut runs = 0;
    for path in &paths {
        let seed = fs::read(path).unwrap();
        run(&seed);
        cases::on_disk(|| run(&seed));
        for _ in 0..mutations {
            let mut bytes = mutate(&seed, &mut random);
            if name == "header" && bytes.len() > 8 && random.below(2) == 0 {
                // So that the text is looked at.
                let length = (bytes.len() as u64 - 8).saturating_sub(random.below(40) as u64);
                bytes[..8].copy_from_slice(&length.to_le_bytes());
            }
            run(&bytes);
            if runs % ON_DISK_TOO == 0 {
                cases::on_disk(|| run(&bytes));
            }
            runs += 1;
        }
    }
    println!("{name}: {} seeds, {runs} mutations", paths.len());
    assert!(!paths.is_empty() && runs >= mutations, "{name}");
}

#[test]
fn header() {
    target("header", 20, cases::header::run);
}

#[test]
fn differential() {
    target("differential", 20, cases::differential::run);
}

#[test]
fn index() {
    target("index", 20, cases::index::run);
}

#[test]
fn recipe() {
    target("recipe", 20, cases::recipe::run);
}

#[test]
fn manifest() {
    target("manifest", 10, cases::manifest::run);
}

#[test]
fn journal() {
    target("journal", 1, cases::journal::run);
}

#[test]
fn records() {
    target("records", 20, cases::records::run);
}

#[test]
fn adapter() {
    target("adapter", 10, cases::adapter::run);
}

#[test]
fn packed() {
    target("packed", 10, cases::packed::run);
}

#[test]
fn packing() {
    target("packing", 3, cases::packing::run);
}

#[test]
fn torch() {
    target("torch", 10, cases::torch::run);
}
