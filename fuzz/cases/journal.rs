//! Bytes behind, or in the place of, the end of an interrupted merge's journal, raw or as records with right checksums:
//! the merge goes on to the right output, or is refused and leaves everything as it was. Most are stopped soon after they have
//! gone on, and must not look finished.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use tiesmith::{ErrorKind, ModelInput, Observer, OutputOptions, Plan, Recipe, Report, Run, Schedule, Scope};

use super::Files;

/// Stops the run when it has asked so many times.
pub struct StopAfter(pub AtomicI64);

impl Observer for StopAfter {
    fn stopped(&self) -> bool {
        self.0.fetch_sub(1, Ordering::Relaxed) <= 0
    }
}

/// The output directory.
const OUT: &str = "out";

type Tree = BTreeMap<PathBuf, Vec<u8>>;

/// An interrupted merge: what is in its output directory, and the shard that it must become.
struct Interrupted {
    files: Files,
    kind: Kind,
    plan: Plan,
    schedule: Schedule,
    tree: Tree,
    expected: Vec<u8>,
}

/// A merge to interrupt: with hashes of what it reads or not, and with thresholds per tensor, or for the whole model whose
/// data does not fit into memory and votes on signs.
#[derive(Clone, Copy)]
struct Kind {
    hashes: bool,
    streams: bool,
}

/// As little memory as the plan can do with, so that no data stays in it.
fn smallest(plan: &Plan) -> u64 {
    let refusal = Schedule::new(plan, Run::new(1, 1)).expect_err("one byte is too little").to_string();
    let (_, number) = refusal.split_once("at least ").expect("it says how much is needed");
    number.split(' ').next().and_then(|number| number.parse().ok()).expect("a number")
}

/// The merge of this kind, of the inputs in `files`.
fn planned(files: &Files, kind: Kind) -> (Plan, Schedule) {
    let model = |name: &str| ModelInput { source: files.path(name), ..ModelInput::default() };
    let mut recipe = Recipe {
        base: Some(model("base.safetensors").source),
        models: vec![model("one.safetensors"), model("two.safetensors")],
        scope: if kind.streams { Scope::Model } else { Scope::Tensor },
        ..Recipe::default()
    };
    if kind.streams {
        recipe.params.insert("zero_sum".into(), tiesmith::Value::Word("majority".into()).into());
    }
    let plan = Plan::new(&recipe, &files.storage).expect("the inputs fit together");
    let memory_bytes = if kind.streams { smallest(&plan) } else { 40 << 20 };
    let run = Run { keep_after: Duration::ZERO, ..Run::new(memory_bytes, 1) };
    let schedule = Schedule::new(&plan, run).expect("there is memory enough");
    (plan, schedule)
}

pub(super) fn make_inputs(files: &Files) {
    let header = r#"{"a":{"dtype":"F32","shape":[50],"data_offsets":[0,200]},"b":{"dtype":"F32","shape":[30],"data_offsets":[200,320]}}"#;
    for (number, name) in (0u32..).zip(["base", "one", "two"]) {
        let value = |i: u32| (i.wrapping_mul(2_654_435_761 + number) >> 8) as f32 / 1e7;
        let data: Vec<u8> = (0..80).flat_map(|i| value(i).to_le_bytes()).collect();
        files.put(&format!("{name}.safetensors"), &super::file(header, &data));
    }
}

impl Interrupted {
    /// Its journal has two records at least; that of a merge that streams, as many as there are before it writes anything.
    fn new(name: &str, kind: Kind) -> Self {
        let files = Files::new(name);
        make_inputs(&files);
        let (plan, schedule) = planned(&files, kind);
        let mut start = Self { files, kind, plan, schedule, tree: Tree::new(), expected: Vec::new() };
        start.files.clear(OUT);
        start.merge(i64::MAX).expect("an undisturbed merge succeeds");
        start.expected = start.made();
        for patience in 1.. {
            start.files.clear(OUT);
            let outcome = start.merge(patience);
            let tree = start.files.tree(OUT);
            let writes = tree.keys().any(|name| name.extension().is_some_and(|extension| extension == "partial"));
            if outcome.is_ok() || kind.streams && writes {
                break;
            }
            let journal = tree.get(Path::new(".tiesmith/journal"));
            if journal.is_some_and(|journal| journal.windows(4).filter(|bytes| *bytes == b"TSR\n").count() > 1) {
                start.tree = tree;
                if !kind.streams {
                    break;
                }
            }
        }
        assert!(!start.tree.is_empty(), "it is interrupted in the middle");
        start
    }

    fn merge(&self, patience: i64) -> tiesmith::Result<Report> {
        let dir = self.files.path(OUT).into();
        let output = OutputOptions { dir, hash_inputs: self.kind.hashes, ..OutputOptions::default() };
        let observer = StopAfter(AtomicI64::new(patience));
        tiesmith::merge(&self.plan, &self.schedule, &output, &self.files.storage, &observer)
    }

    /// The shard that a merge made.
    fn made(&self) -> Vec<u8> {
        self.files.tree(OUT).remove(Path::new("model.safetensors")).expect("a shard")
    }

    /// Changes the journal, and goes on with the merge, which is stopped when it has asked `patience` times.
    fn check(&self, way: u8, patience: i64, data: &[u8]) {
        let mut tree = self.tree.clone();
        change(tree.get_mut(Path::new(".tiesmith/journal")).expect("a journal"), way, data);
        self.files.clear(OUT);
        for (name, content) in &tree {
            self.files.put(&format!("{OUT}/{}", name.display()), content);
        }
        match self.merge(patience) {
            Ok(_) => {
                let made = self.made();
                // Counts of magnitudes that have a right checksum and could be true are believed.
                let believed = self.kind.streams && matches!(way % 4, 1 | 2);
                assert!(made == self.expected || believed && made.len() == self.expected.len(), "a wrong output");
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {
                let after = self.files.tree(OUT);
                assert!(after.keys().all(|name| name.starts_with(".tiesmith")), "it looks finished");
            }
            Err(error) => {
                super::refused(&error);
                let mut after = self.files.tree(OUT);
                // Who holds the lock is written down anew.
                after.remove(Path::new(".tiesmith/lock"));
                tree.remove(Path::new(".tiesmith/lock"));
                assert!(after == tree, "a refused run changed something: {error}");
            }
        }
    }
}

/// A record with a right checksum.
pub fn record(number: u64, kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut record = [&b"TSR\n"[..], &[kind, 0, 0, 0], &number.to_le_bytes()].concat();
    record.extend((payload.len() as u32).to_le_bytes());
    record.extend((payload.len() as u32).to_le_bytes());
    record.extend(payload);
    let checksum = blake3::hash(&record);
    record.extend(&checksum.as_bytes()[..16]);
    record
}

/// Changes a journal of two records or more in one of four ways.
pub fn change(journal: &mut Vec<u8>, way: u8, data: &[u8]) {
    let starts: Vec<usize> = (0..journal.len() - 4).filter(|&at| &journal[at..at + 4] == b"TSR\n").collect();
    match way % 4 {
        // Another tail.
        0 => {
            journal.truncate(journal.len().saturating_sub(usize::from(way / 4)));
            journal.extend(data);
        }
        // A sound record more.
        1 => journal.extend(record(starts.len() as u64, way / 4 % 8, data)),
        // A sound record in the place of the second.
        2 => {
            journal.truncate(starts[1]);
            journal.extend(record(1, way / 4 % 8, data));
        }
        // Bytes changed anywhere: (place, difference) by turns.
        _ => {
            for change in data.chunks_exact(3) {
                let at = usize::from(u16::from_le_bytes([change[0], change[1]])) % journal.len();
                journal[at] ^= change[2];
            }
        }
    }
}

/// One in so many inputs is merged to the end: that takes several times as long as reading what is left.
const MERGED: u32 = 16;

/// See the file's documentation. Of the first byte, the two highest bits say which merge it is.
pub fn run(data: &[u8]) {
    thread_local! {
        static STARTS: [OnceCell<Interrupted>; 8] = const { [const { OnceCell::new() }; 8] };
    }
    let Some((&way, data)) = data.split_first() else { return };
    let sum = data.iter().fold(0u32, |sum, &byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    let patience = if sum.is_multiple_of(MERGED) { i64::MAX } else { i64::from(sum / MERGED % 4) };
    let kind = Kind { hashes: way & 0x40 != 0, streams: way & 0x80 != 0 };
    STARTS.with(|starts| {
        let number = usize::from(way >> 6) + if super::ON_DISK.get() { 4 } else { 0 };
        let start = starts[number].get_or_init(|| Interrupted::new(&format!("journal-{number}"), kind));
        start.check(way & 0x3f, patience, data);
    });
}
