//! Bytes behind, or in the place of, the end of an interrupted merge's journal, raw or as records with right checksums:
//! the merge goes on to the right output, or is refused and leaves everything as it was.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, Ordering};

use tiesmith::{ModelInput, Observer, OutputOptions, Plan, Recipe, Report, Run, Schedule, Scope};

/// Stops the run when it has asked so many times.
struct StopAfter(AtomicI64);

impl Observer for StopAfter {
    fn stopped(&self) -> bool {
        self.0.fetch_sub(1, Ordering::Relaxed) <= 0
    }
}

type Tree = BTreeMap<PathBuf, Vec<u8>>;

/// An interrupted merge: what is in its output directory, and the shard that it must become.
struct Interrupted {
    tree: Tree,
    expected: Vec<u8>,
}

fn read(dir: &Path) -> Tree {
    let mut tree = Tree::new();
    for folder in [dir.to_path_buf(), dir.join(".tiesmith")] {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            if entry.path().is_file() {
                let name = entry.path().strip_prefix(dir).expect("it is in there").to_path_buf();
                tree.insert(name, std::fs::read(entry.path()).expect("it can be read"));
            }
        }
    }
    tree
}

fn merge(inputs: &Path, out: &Path, patience: i64) -> tiesmith::Result<Report> {
    let model = |name: &str| ModelInput { source: inputs.join(name).to_string_lossy().into(), ..ModelInput::default() };
    let recipe = Recipe {
        base: Some(model("base.safetensors").source),
        models: vec![model("one.safetensors"), model("two.safetensors")],
        scope: Scope::Tensor,
        ..Recipe::default()
    };
    let storage = super::storage();
    let plan = Plan::new(&recipe, &storage)?;
    let schedule = Schedule::new(&plan, Run { memory_bytes: 40 << 20, threads: 1 })?;
    let output = OutputOptions { dir: out.to_path_buf(), ..OutputOptions::default() };
    tiesmith::merge(&plan, &schedule, &output, &storage, &StopAfter(AtomicI64::new(patience)))
}

fn make_inputs(dir: &Path) {
    let header = r#"{"a":{"dtype":"F32","shape":[50],"data_offsets":[0,200]},"b":{"dtype":"F32","shape":[30],"data_offsets":[200,320]}}"#;
    for (number, name) in (0u32..).zip(["base", "one", "two"]) {
        let value = |i: u32| (i.wrapping_mul(2_654_435_761 + number) >> 8) as f32 / 1e7;
        let data: Vec<u8> = (0..80).flat_map(|i| value(i).to_le_bytes()).collect();
        std::fs::write(dir.join(format!("{name}.safetensors")), super::file(header, &data)).expect("it can be written");
    }
}

fn interrupted(dir: &Path) -> Interrupted {
    make_inputs(dir);
    let out = dir.join("out");
    let _ = std::fs::remove_dir_all(&out);
    merge(dir, &out, i64::MAX).expect("an undisturbed merge succeeds");
    let expected = std::fs::read(out.join("model.safetensors")).expect("a shard");
    for patience in 1.. {
        std::fs::remove_dir_all(&out).expect("it can be removed");
        let outcome = merge(dir, &out, patience);
        assert!(outcome.is_err(), "it is never interrupted in the middle");
        let tree = read(&out);
        let journal = tree.get(Path::new(".tiesmith/journal"));
        if journal.is_some_and(|journal| journal.windows(4).filter(|bytes| *bytes == b"TSR\n").count() > 1) {
            return Interrupted { tree, expected };
        }
    }
    unreachable!()
}

/// A record with a right checksum.
fn record(number: u64, kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut record = [&b"TSR\n"[..], &[kind, 0, 0, 0], &number.to_le_bytes()].concat();
    record.extend((payload.len() as u32).to_le_bytes());
    record.extend((payload.len() as u32).to_le_bytes());
    record.extend(payload);
    let checksum = blake3::hash(&record);
    record.extend(&checksum.as_bytes()[..16]);
    record
}

/// See the file's documentation.
pub fn run(data: &[u8]) {
    thread_local! {
        static START: OnceLock<(PathBuf, Interrupted)> = const { OnceLock::new() };
    }
    START.with(|start| {
        let (dir, start) = start.get_or_init(|| {
            let dir = super::place("journal");
            let start = interrupted(&dir);
            (dir, start)
        });
        check(dir, start, data);
    });
}

fn check(dir: &Path, start: &Interrupted, data: &[u8]) {
    let Some((&way, data)) = data.split_first() else { return };
    let mut tree = start.tree.clone();
    let journal = tree.get_mut(Path::new(".tiesmith/journal")).expect("a journal");
    let starts: Vec<usize> = (0..journal.len() - 4).filter(|&at| &journal[at..at + 4] == b"TSR\n").collect();
    match way % 4 {
        // Another tail.
        0 => {
            journal.truncate(journal.len().saturating_sub(usize::from(way / 4)));
            journal.extend(data);
        }
        // A sound record more.
        1 => journal.extend(record(starts.len() as u64, way / 4 % 6, data)),
        // A sound record in the place of the second.
        2 => {
            journal.truncate(starts[1]);
            journal.extend(record(1, way / 4 % 6, data));
        }
        // Bytes changed anywhere: (place, difference) by turns.
        _ => {
            for change in data.chunks_exact(3) {
                let at = usize::from(u16::from_le_bytes([change[0], change[1]])) % journal.len();
                journal[at] ^= change[2];
            }
        }
    }
    let out = dir.join("out");
    let _ = std::fs::remove_dir_all(&out);
    std::fs::create_dir_all(out.join(".tiesmith")).expect("it can be made");
    tree.iter().for_each(|(name, content)| std::fs::write(out.join(name), content).expect("it can be written"));
    match merge(dir, &out, i64::MAX) {
        Ok(_) => {
            let made = std::fs::read(out.join("model.safetensors")).expect("a shard");
            assert!(made == start.expected, "a wrong output");
        }
        Err(error) => {
            super::refused(&error);
            let mut after = read(&out);
            // Who holds the lock is written down anew.
            after.remove(Path::new(".tiesmith/lock"));
            tree.remove(Path::new(".tiesmith/lock"));
            assert!(after == tree, "a refused run changed something: {error}");
        }
    }
}
