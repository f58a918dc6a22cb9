//! Fails and crashes a small merge at every operation, goes on with it, and compares with an undisturbed run.
//!
//! - Crashes: before and in every changing operation, with eight fates of what was not durable; also, as errors, while a
//!   crash is being recovered from.
//! - Errors: at every operation, once and from there on, of several kinds.
//! - Transfers of data that are short or interrupted: at every one, once and from there on.
//!
//! A build without optimisation tries every fifth operation only: it is several times slower. How many cases there were is
//! printed.
//!
//! Afterwards the same command must give the same files. Before it, nothing may look like a model that is not one.

mod analyze;
mod factors;
mod finished;
mod guess;
mod memory;
mod packed;
mod parts;
mod places;
mod repair;
mod room;
mod sweep;
mod under_way;
mod upload;

use std::collections::BTreeMap;
use std::io::{ErrorKind, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tiesmith::{
    Error, Float, ModelInput, Observer, OutputOptions, Overflow, Plan, Recipe, Report, Run, Schedule, Scope, Storage,
    TrimTies,
};

use memory::{Fault, Memory, Survives};

/// Neither directory is there at first.
const OUT: &str = "/new/out";
/// Where inputs are: on a disk or in an object store.
const DISK: &str = "/in";
const STORE: &str = "s3://bucket/in";
/// One in so many operations is tried.
const STEP: usize = if cfg!(debug_assertions) { 5 } else { 1 };
/// Tensors of every checkpoint, all f32 but the last.
const TENSORS: [(&str, u64); 6] =
    [("a.weight", 20_000), ("b.weight", 9_000), ("c.empty", 0), ("d.norm", 13), ("e.scale", 1), ("f.ids", 7)];

/// Errors that systems give: no room, over quota, no permission, read-only, out of time, anything else.
const KINDS: [ErrorKind; 6] = [
    ErrorKind::StorageFull,
    ErrorKind::QuotaExceeded,
    ErrorKind::PermissionDenied,
    ErrorKind::ReadOnlyFilesystem,
    ErrorKind::TimedOut,
    ErrorKind::Other,
];

/// Says what was tried, also when tests are run without `--nocapture`.
fn say(text: &str) {
    // Nobody reading it changes nothing.
    let _ = writeln!(std::io::stderr(), "{text}");
}

type Tree = BTreeMap<String, (u64, Vec<u8>)>;

struct Silent;

impl Observer for Silent {}

/// Stops the run when it has asked so many times.
struct StopAfter(AtomicI64);

impl Observer for StopAfter {
    fn stopped(&self) -> bool {
        self.0.fetch_sub(1, Ordering::Relaxed) <= 0
    }
}

/// A file of f32 tensors whose entry number i is `value(i)`.
fn floats(tensors: &[(&str, &[u64])], value: impl Fn(u64) -> f32) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data: Vec<u8> = Vec::new();
    for (name, shape) in tensors {
        let begin = data.len();
        (0..shape.iter().product()).for_each(|i| data.extend(value(i).to_le_bytes()));
        header.insert((*name).into(), json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, data.len()]}));
    }
    let header = Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

/// A checkpoint file with pseudo-random weights; many are equal to others.
fn checkpoint(seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as u32
    };
    let mut header = serde_json::Map::new();
    let mut data: Vec<u8> = Vec::new();
    for (name, elements) in TENSORS {
        let begin = data.len();
        let dtype = if name == "f.ids" { "I32" } else { "F32" };
        for _ in 0..elements {
            match dtype {
                "I32" => data.extend(7u32.to_le_bytes()),
                _ => data.extend((f32::from(next() as u8) / 256.0 - 0.5).to_le_bytes()),
            }
        }
        let shape = if name == "a.weight" { json!([elements / 40, 40]) } else { json!([elements]) };
        header.insert(name.into(), json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, data.len()]}));
    }
    let header = Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

/// Inputs on a durable disk.
fn inputs() -> Memory {
    let memory = Memory::default();
    for (name, seed) in [("base", 1), ("one", 2), ("two", 3)] {
        memory.put(&format!("/in/{name}/model.safetensors"), &checkpoint(seed));
    }
    let factors = [("base_model.model.a.lora_A.weight", &[3, 40][..]), ("base_model.model.a.lora_B.weight", &[500, 3])];
    memory.put("/in/lora/adapter_model.safetensors", &floats(&factors, |i| (i % 7) as f32 / 16.0 - 0.2));
    memory.put("/in/lora/adapter_config.json", br#"{"peft_type": "LORA", "r": 3, "lora_alpha": 6}"#);
    let factors: [(&str, &[u64]); 4] = [
        ("base_model.model.a.lora_A.weight", &[2, 40]),
        ("base_model.model.a.lora_B.weight", &[500, 2]),
        ("base_model.model.z.lora_A.weight", &[2, 30]),
        ("base_model.model.z.lora_B.weight", &[20, 2]),
    ];
    memory.put("/in/lora2/adapter_model.safetensors", &floats(&factors, |i| (i % 5) as f32 / 8.0 - 0.2));
    memory.put("/in/lora2/adapter_config.json", br#"{"peft_type": "LORA", "r": 2, "lora_alpha": 3}"#);
    let fishers = [("a.weight", &[500, 40][..]), ("b.weight", &[9_000])];
    memory.put("/in/fisher/model.safetensors", &floats(&fishers, |i| (i % 11) as f32 / 16.0));
    let gram = |i: u64| if i.is_multiple_of(41) { 2.0 } else { 0.01 };
    memory.put("/in/gram/model.safetensors", &floats(&[("a.weight", &[40, 40])], gram));
    memory.put("/in/base/config.json", br#"{"torch_dtype": "float32"}"#);
    memory.put("/in/base/tokenizer.json", &[b'x'; 3000]);
    memory
}

#[derive(Clone)]
struct Job {
    name: &'static str,
    recipe: Recipe,
    force: bool,
    /// Inputs are hashed, and copied before each run.
    copied: bool,
    /// Inputs are in an object store.
    far: bool,
}

fn recipe() -> Recipe {
    let model = |source: &str| ModelInput { source: source.into(), ..ModelInput::default() };
    Recipe {
        base: Some("/in/base".into()),
        models: vec![model("/in/one"), model("/in/two")],
        max_shard_bytes: 60_000,
        ..Recipe::default()
    }
}

/// An adapter on base beside a model.
fn adapted() -> Recipe {
    let mut recipe = recipe();
    recipe.models[0].source = "/in/base+/in/lora".into();
    recipe
}

/// An average by what each model has besides its weights.
fn described(method: &str) -> Recipe {
    let mut recipe = Recipe { method: method.into(), ..recipe() };
    for model in &mut recipe.models {
        match method {
            "fisher" => model.fisher = Some("/in/fisher".into()),
            _ => model.gram = Some("/in/gram".into()),
        }
    }
    recipe
}

/// Adapters merged with each other.
fn alone() -> Recipe {
    let lora = || ModelInput { source: "/in/lora".into(), ..ModelInput::default() };
    Recipe { base: None, models: vec![lora(), lora()], ..recipe() }
}

/// Adapters of different ranks.
fn changes() -> Recipe {
    let lora = |source: &str| ModelInput { source: source.into(), ..ModelInput::default() };
    Recipe { base: None, models: vec![lora("/in/lora"), lora("/in/lora2")], ..recipe() }
}

/// The recipe for the same inputs in an object store.
fn far(mut recipe: Recipe) -> Recipe {
    let there = |source: &mut String| *source = source.replace(DISK, STORE);
    recipe.base.iter_mut().for_each(there);
    for model in &mut recipe.models {
        there(&mut model.source);
        model.fisher.iter_mut().chain(&mut model.gram).for_each(there);
    }
    recipe
}

fn jobs() -> Vec<Job> {
    let job = |name, recipe, force| Job { name, recipe, force, copied: false, far: false };
    let copied = |name, recipe| Job { name, recipe, force: false, copied: true, far: false };
    let far = |name, recipe| Job { name, recipe: far(recipe), force: false, copied: false, far: true };
    let lowest = |recipe| Recipe { trim_ties: TrimTies::Lowest, ..recipe };
    vec![
        job("shards", recipe(), false),
        job("one file", Recipe { max_shard_bytes: 1 << 30, dtype: Some(Float::BF16), ..recipe() }, false),
        job("ties by position", Recipe { trim_ties: TrimTies::Lowest, scope: Scope::Tensor, ..recipe() }, false),
        job("an adapter", adapted(), false),
        job("fisher", described("fisher"), false),
        job("regmean", described("regmean"), false),
        job("adapters alone", alone(), false),
        job("changes of adapters", Recipe { trim_ties: TrimTies::Lowest, ..changes() }, false),
        copied("copied inputs", recipe()),
        copied("a copied adapter", Recipe { trim_ties: TrimTies::Lowest, ..adapted() }),
        job("replacing shards", recipe(), true),
        job("replacing by one file", Recipe { max_shard_bytes: 1 << 30, ..recipe() }, true),
        far("shards from a store", recipe()),
        far("a tensor at a time from a store", Recipe { scope: Scope::Tensor, ..lowest(recipe()) }),
        far("an adapter from a store", adapted()),
        far("fisher from a store", described("fisher")),
        far("changes of adapters from a store", lowest(changes())),
    ]
}

impl Job {
    fn run(&self, memory: &Memory) -> Result<Report, Error> {
        // Connections take a part of it.
        self.run_with(memory, 1, if self.far { 40 << 20 } else { 28 << 20 }, &Silent)
    }

    /// One in so many operations is tried: what goes on behind the seam is the same wherever inputs are.
    fn step(&self) -> usize {
        if self.far { 6 * STEP } else { STEP }
    }

    fn run_with(
        &self,
        memory: &Memory,
        threads: usize,
        memory_bytes: u64,
        observer: &dyn Observer,
    ) -> Result<Report, Error> {
        if self.copied {
            memory.copy_files("/in");
        }
        let storage: Arc<dyn Storage> = Arc::new(memory.clone());
        let plan = Plan::new(&self.recipe, &storage)?;
        // What was counted is kept after every chunk.
        let run = Run { keep_after: Duration::ZERO, ..Run::new(memory_bytes, threads) };
        let schedule = Schedule::with_spool(&plan, run)?;
        let output =
            OutputOptions { dir: OUT.into(), force: self.force, hash_inputs: self.copied, ..OutputOptions::default() };
        tiesmith::merge(&plan, &schedule, &output, &storage, observer)
    }

    /// The disk before the run: with an older output where that is to be replaced.
    fn before(&self) -> Memory {
        let memory = inputs();
        if self.force {
            let older = Recipe { max_shard_bytes: 40_000, seed: 5, ..recipe() };
            memory.put("/in/base/chat_template.jinja", b"of the older output only");
            Job { name: "older", recipe: older, force: false, copied: false, far: false }.run(&memory).unwrap();
            let memory = memory.reboot(Survives::All);
            memory.remove_file("/in/base/chat_template.jinja".as_ref()).unwrap();
            return memory.reboot(Survives::All);
        }
        if self.far { memory.moved(DISK, STORE) } else { memory }
    }
}

/// What does not depend on how often a run was disturbed.
fn lasting(tree: &Tree) -> BTreeMap<String, Vec<u8>> {
    let mut lasting: BTreeMap<String, Vec<u8>> = tree
        .iter()
        .filter(|(name, _)| *name != ".tiesmith/lock")
        .map(|(name, (_, data))| (name.clone(), data.clone()))
        .collect();
    lasting.get_mut("tiesmith.json").into_iter().for_each(forget_passing);
    lasting
}

/// The same of everything in and below the directory, where there are several outputs.
fn lasting_below(memory: &Memory) -> BTreeMap<String, Vec<u8>> {
    let passing = |name: &str| name.starts_with("sweep.") || name.ends_with(".tiesmith/lock");
    let files = memory.tree(OUT).into_iter().filter(|(name, _)| !passing(name));
    let mut files: BTreeMap<String, Vec<u8>> = files.map(|(name, (_, data))| (name, data)).collect();
    files.iter_mut().filter(|(name, _)| name.ends_with("tiesmith.json")).for_each(|(_, data)| forget_passing(data));
    files
}

/// Takes out of a manifest what depends on how a run went.
fn forget_passing(manifest: &mut Vec<u8>) {
    let mut value: Value = serde_json::from_slice(manifest).unwrap();
    value["run"].as_object_mut().unwrap().remove("manifest_blake3").unwrap();
    let report = value["report"].as_object_mut().unwrap();
    for field in ["wall_seconds", "peak_memory_bytes", "resumed", "chunks_reused"] {
        report.remove(field).unwrap();
    }
    if value["inputs"].to_string().contains(STORE) {
        // What a crash took of what was downloaded is read again, and counts.
        value["report"].as_object_mut().unwrap().remove("bytes_read").unwrap();
    }
    *manifest = value.to_string().into_bytes();
}

struct Case<'a> {
    job: &'a Job,
    expected: &'a BTreeMap<String, Vec<u8>>,
    older: &'a BTreeMap<String, Vec<u8>>,
    what: String,
}

impl Case<'_> {
    /// What loads as a model must be the old output or the new one, whole.
    fn looks_right(&self, memory: &Memory) {
        let tree = memory.tree(OUT);
        let loadable = ["model.safetensors.index.json", "model.safetensors", "adapter_model.safetensors"]
            .iter()
            .any(|name| tree.contains_key(*name));
        let is = |files: &BTreeMap<String, Vec<u8>>| {
            let same = |(name, data): (&String, &Vec<u8>)| {
                tree.get(name).is_some_and(|(_, found)| found == data || name == "tiesmith.json")
            };
            !files.is_empty() && files.iter().all(same)
        };
        assert!(!loadable || is(self.older) || is(self.expected), "{}: looks like a model", self.what);
    }

    /// Runs again, which must succeed, and compares.
    fn finish(&self, memory: &Memory) -> Option<Report> {
        self.looks_right(memory);
        let finished = memory.tree(OUT);
        let report = match self.job.run(memory) {
            Ok(report) => Some(report),
            // It was complete but for its exit code.
            Err(error) if error.to_string().contains("a finished merge is already there") => None,
            Err(error) => panic!("{}: {error}", self.what),
        };
        let tree = memory.tree(OUT);
        let found = lasting(&tree);
        assert!(found.keys().eq(self.expected.keys()), "{}: {:?}", self.what, found.keys());
        for (name, data) in self.expected {
            assert!(found[name] == *data, "{}: {name} differs", self.what);
        }
        // What was finished is not written again.
        if !self.job.force {
            for (name, (inode, data)) in finished.iter().filter(|(name, _)| name.ends_with(".safetensors")) {
                if !name.contains('/') && tree[name].1 == *data {
                    assert_eq!(tree[name].0, *inode, "{}: {name} was written again", self.what);
                }
            }
        }
        report
    }
}

/// An undisturbed run: the disk before it, its files, and its numbers of operations and of changes.
struct Undisturbed {
    before: Memory,
    older: BTreeMap<String, Vec<u8>>,
    expected: BTreeMap<String, Vec<u8>>,
    operations: u64,
    changes: u64,
}

fn undisturbed(job: &Job) -> Undisturbed {
    let before = job.before();
    let older = before.tree(OUT).into_iter().map(|(name, (_, data))| (name, data)).collect();
    let memory = before.fork(None);
    let report = job.run(&memory).unwrap();
    assert!(!report.resumed && report.chunks_reused == 0);
    let (operations, changes) = memory.counts();
    let expected = lasting(&memory.tree(OUT));
    assert!(!expected.contains_key("chat_template.jinja"), "the older output's side files are left");
    Undisturbed { before, older, expected, operations, changes }
}

#[test]
fn crashes_at_every_change_with_every_fate_of_what_was_not_durable() {
    let (mut cases, mut reused) = (0, 0);
    for job in jobs() {
        let Undisturbed { before, older, expected, changes, .. } = undisturbed(&job);
        for at in (1..=changes + 3).step_by(job.step()) {
            for fault in [Fault::CrashBefore, Fault::CrashIn] {
                let memory = before.fork(Some((at, fault)));
                let outcome = job.run(&memory);
                for survives in Survives::EACH {
                    let what = format!("{}, change {at} of {changes}, {fault:?}, survives {survives:?}", job.name);
                    if outcome.is_ok() && survives != Survives::All {
                        continue;
                    }
                    let case = Case { job: &job, expected: &expected, older: &older, what };
                    let rebooted = memory.reboot(survives);
                    if outcome.is_ok() && job.force {
                        continue;
                    }
                    let report = case.finish(&rebooted);
                    cases += 1;
                    reused += u64::from(report.is_some_and(|report| report.chunks_reused > 0));
                }
            }
        }
    }
    say(&format!("{cases} crashes survived, {reused} of them with work taken over"));
    assert!(cases > 4000 / STEP && reused > 300 / STEP as u64, "{cases} cases, {reused} with work taken over");
}

#[test]
fn crashes_and_errors_while_recovering_from_a_crash() {
    let mut cases = 0;
    for job in jobs() {
        let Undisturbed { before, older, expected, changes, .. } = undisturbed(&job);
        for first in (1..=changes).step_by(2 * job.step() - 1) {
            let crashed = before.fork(Some((first, [Fault::CrashIn, Fault::CrashBefore][first as usize / 2 % 2])));
            let _ = job.run(&crashed);
            let survives = Survives::EACH[first as usize % Survives::EACH.len()];
            let faults = [
                Fault::CrashIn,
                Fault::CrashBefore,
                Fault::Once(KINDS[first as usize % KINDS.len()]),
                Fault::FromHere(KINDS[first as usize % KINDS.len()]),
            ];
            for second in (1..=changes).step_by(4) {
                let fault = faults[(first / 2 + second / 4) as usize % faults.len()];
                let again = crashed.reboot(survives).fork(Some((second, fault)));
                let outcome = job.run(&again);
                let what = format!("{}, change {first} of {changes}, {survives:?}, then {fault:?} {second}", job.name);
                if outcome.is_ok() && job.force {
                    break;
                }
                let case = Case { job: &job, expected: &expected, older: &older, what };
                let dead = matches!(fault, Fault::CrashIn | Fault::CrashBefore);
                let then = Survives::EACH[second as usize / 4 % Survives::EACH.len()];
                case.finish(&again.reboot(if dead { then } else { Survives::All }));
                cases += 1;
            }
        }
    }
    say(&format!("{cases} crashes and errors while recovering from a crash survived"));
    assert!(cases > 2500 / STEP, "{cases}");
}

#[test]
fn errors_at_every_operation_once_and_from_there_on() {
    let mut cases = 0;
    for job in jobs() {
        let Undisturbed { before, older, expected, operations, .. } = undisturbed(&job);
        for at in (1..=operations).step_by(job.step()) {
            let kind = KINDS[at as usize / job.step() % KINDS.len()];
            for fault in [Fault::Once(kind), Fault::FromHere(kind)] {
                let what = format!("{}, operation {at} of {operations}, {fault:?}", job.name);
                let memory = before.fork(Some((at, fault)));
                let outcome = job.run(&memory);
                let case = Case { job: &job, expected: &expected, older: &older, what };
                let rebooted = memory.reboot(Survives::All);
                if outcome.is_ok() {
                    // It failed where that does no harm.
                    let mut found = lasting(&rebooted.tree(OUT));
                    found.retain(|name, _| !name.starts_with(".tiesmith/"));
                    assert!(found == expected, "{}: success, but wrong", case.what);
                } else {
                    case.finish(&rebooted);
                }
                cases += 1;
            }
        }
    }
    say(&format!("{cases} errors survived"));
    assert!(cases > 1000 / STEP, "{cases}");
}

/// A part of what was asked is no error, and an interruption none either: the run ends as if nothing had been.
#[test]
fn short_and_interrupted_transfers_change_nothing() {
    let mut cases = 0;
    for job in jobs() {
        let Undisturbed { before, expected, .. } = undisturbed(&job);
        let whole = before.fork(None);
        job.run(&whole).unwrap();
        for at in (1..=whole.transfers()).step_by(job.step()) {
            let faults = [Fault::Short(false), Fault::Short(true), Fault::Interrupted(false), Fault::Interrupted(true)];
            for fault in faults {
                let what = format!("{}, transfer {at} of {}, {fault:?}", job.name, whole.transfers());
                let memory = before.fork(Some((at, fault)));
                let report = job.run(&memory).unwrap_or_else(|error| panic!("{what}: {error}"));
                assert!(!report.resumed && memory.transfers() > whole.transfers(), "{what}: it did not happen");
                assert!(lasting(&memory.tree(OUT)) == expected, "{what}: the output is another");
                cases += 1;
            }
        }
    }
    say(&format!("{cases} short or interrupted transfers made good"));
    assert!(cases > 1500 / STEP, "{cases}");
}

/// Inputs of one tensor that is not held in memory, and adapters that change as much.
fn large_inputs() -> Memory {
    let elements = 1_500_001u32;
    let header = format!(r#"{{"w":{{"dtype":"F32","shape":[{elements}],"data_offsets":[0,{}]}}}}"#, 4 * elements);
    let memory = Memory::default();
    for (seed, name) in (0u32..).zip(["base", "one", "two"]) {
        let values = (0..elements).map(|i| f32::from((i.wrapping_mul(2_654_435_761 + 2 * seed) >> 20) as u16));
        let data: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
        let content = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
        memory.put(&format!("/in/{name}/model.safetensors"), &content);
    }
    for (name, rank) in [("lora", 1), ("lora2", 2)] {
        let (a, b) = ("base_model.model.w.lora_A.weight", "base_model.model.w.lora_B.weight");
        let factors = [(a, &[rank, 1_250][..]), (b, &[1_200, rank])];
        let value = |i: u64| ((i * 37) % 101) as f32 / 64.0 - 0.7;
        memory.put(&format!("/in/{name}/adapter_model.safetensors"), &floats(&factors, value));
        let config = format!(r#"{{"peft_type": "LORA", "r": {rank}, "lora_alpha": 3}}"#);
        memory.put(&format!("/in/{name}/adapter_config.json"), config.as_bytes());
    }
    memory
}

#[test]
fn a_resumed_run_may_have_other_threads_and_memory() {
    let before = large_inputs();
    let (mut reused, mut stops) = (0, 0);
    let kinds = [
        (TrimTies::Lowest, Scope::Model, false),
        (TrimTies::Lowest, Scope::Model, true),
        (TrimTies::Keep, Scope::Tensor, false),
        (TrimTies::Lowest, Scope::Tensor, true),
    ];
    for (ties, scope, copied) in kinds {
        let job = Job {
            name: "other cuts",
            recipe: Recipe { trim_ties: ties, scope, ..recipe() },
            force: false,
            copied,
            far: false,
        };
        let memory = before.fork(None);
        let undisturbed = job.run_with(&memory, 1, 40 << 20, &Silent).unwrap();
        let expected = memory.tree(OUT)["model.safetensors"].1.clone();
        for patience in (3..40).step_by(4 * STEP) {
            let mut memory = before.fork(None);
            let mut runs = [(1, 40 << 20), (3, 64 << 20), (1, 28 << 20), (2, 128 << 20)].iter().cycle();
            let mut more = 0;
            let report = loop {
                let &(threads, memory_bytes) = runs.next().unwrap();
                let observer = StopAfter(AtomicI64::new(patience + more));
                match job.run_with(&memory, threads, memory_bytes, &observer) {
                    Ok(report) => break report,
                    Err(error) => assert_eq!(error.exit_code(), 130, "{error}"),
                }
                memory = memory.reboot(Survives::Nothing);
                (more, stops) = (more + 1, stops + 1);
            };
            reused += report.chunks_reused;
            assert!(memory.tree(OUT)["model.safetensors"].1 == expected, "{ties:?} {scope:?} {patience}");
            assert_eq!(report.kept_fraction, undisturbed.kept_fraction);
            assert_eq!(report.sign_conflict_fraction, undisturbed.sign_conflict_fraction);
        }
    }
    say(&format!("{stops} stops, {reused} chunks taken over by runs with other cuts"));
    assert!(stops > 40 / STEP && reused > 20 / STEP as u64, "{stops} {reused}");
}

/// A job repeats what failed, and nothing that is wrong: a disk that is still full is no reason to give up.
#[test]
fn a_run_that_was_begun_waits_for_room() {
    for job in jobs().into_iter().filter(|job| !job.force) {
        let Undisturbed { before, expected, .. } = undisturbed(&job);
        let memory = before.fork(None);
        memory.set_free(Some(1000));
        let error = job.run(&memory).unwrap_err();
        assert!(error.exit_code() == 1 && error.to_string().contains("disk space"), "{}: {error}", job.name);
        assert!(memory.tree(OUT).is_empty(), "{}", job.name);
        memory.set_free(None);
        let begun = (1..).map(|patience| {
            let memory = memory.fork(None);
            let outcome = job.run_with(&memory, 1, 40 << 20, &StopAfter(AtomicI64::new(patience)));
            (outcome.is_ok(), memory.reboot(Survives::All))
        });
        let stopped = begun.take_while(|(done, _)| !done).map(|(_, memory)| memory);
        let Some(memory) = stopped.filter(|memory| memory.tree(OUT).contains_key(".tiesmith/journal")).last() else {
            panic!("{}: it cannot be stopped", job.name)
        };
        memory.set_free(Some(1000));
        let error = job.run(&memory).unwrap_err();
        let line = error.to_string();
        assert!(error.exit_code() == 1 && line.contains("run the same command again"), "{}: {line}", job.name);
        memory.set_free(None);
        job.run(&memory).unwrap();
        assert!(lasting(&memory.tree(OUT)) == expected, "{}", job.name);
    }
}

/// What the directory holds is decided on under the lock: a run that ends in between is seen, and keeps its result.
#[test]
fn a_run_that_ends_before_the_lock_is_taken_keeps_its_result() {
    for job in jobs().into_iter().filter(|job| !job.force) {
        let (memory, other) = (job.before(), job.clone());
        let first = memory.clone();
        memory.before_lock(move || drop(other.run(&first).unwrap()));
        let second = Job { recipe: Recipe { overflow: Overflow::Clamp, ..job.recipe.clone() }, ..job.clone() };
        let error = second.run(&memory).unwrap_err().to_string();
        assert!(error.contains("a finished merge is already there"), "{}: {error}", job.name);
        assert!(lasting(&memory.tree(OUT)) == undisturbed(&job).expected, "{}", job.name);
    }
}
