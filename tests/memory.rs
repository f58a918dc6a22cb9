//! Peak memory under a real limit: a family of 600 MB merged with a budget of 64 MB; a family of very many tensors merged
//! with the least that works.
//!
//! - Where a memory cgroup can be made (root, v1 or v2), the process runs in one and is killed if it takes more.
//! - Everywhere on Linux its peak of resident memory is read while it runs, and the report's own figure must agree.

#![cfg(target_os = "linux")]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;

#[path = "it/support/hub.rs"]
#[allow(dead_code)]
mod hub;

/// What `--memory` promises.
const BUDGET_BYTES: u64 = 64_000_000;
/// What the kernel enforces: the budget, and room for what is not resident memory of the process, such as page tables,
/// file-system structures and pages being written back.
const CGROUP_BYTES: u64 = 2 * BUDGET_BYTES;
/// Held by the test that runs: what others write would keep the disk busy, and pages being written back cannot be reclaimed.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Elements of the tensors of each checkpoint: one of nearly everything, and some small ones.
const SHAPES: [(&str, &[u64]); 4] =
    [("big.weight", &[48_000, 1_000]), ("mid.weight", &[1_000, 1_999]), ("norm.weight", &[4_097]), ("scale", &[])];
const CHECKPOINT_BYTES: u64 = 4 * (48_000_000 + 1_999_000 + 4_097 + 1);

/// Writes an f32 checkpoint of [`SHAPES`]: a block of pseudo-random values over and over, its length being prime and
/// different for each seed, so that no two checkpoints are in step.
fn write_checkpoint(path: &Path, seed: u32, block_elements: usize) {
    let mut entries = Vec::new();
    let mut end = 0;
    for (name, shape) in SHAPES {
        let begin = end;
        end += 4 * shape.iter().product::<u64>();
        entries.push(format!(r#""{name}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[{begin},{end}]}}"#));
    }
    assert_eq!(end, CHECKPOINT_BYTES);
    let header = format!("{{{}}}", entries.join(","));
    let mut state = seed;
    let block: Vec<u8> = (0..block_elements)
        .flat_map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (((state >> 8) as f32 / (1 << 24) as f32) - 0.5).to_le_bytes()
        })
        .collect();
    let mut file = fs::File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    let mut left = CHECKPOINT_BYTES as usize;
    while left > 0 {
        let part = left.min(block.len());
        file.write_all(&block[..part]).unwrap();
        left -= part;
    }
}

/// Writes a LoRA adapter on the large tensor.
fn write_adapter(dir: &Path, rank: u64) {
    fs::create_dir(dir).unwrap();
    let config = format!(r#"{{"peft_type": "LORA", "r": {rank}, "lora_alpha": 16}}"#);
    fs::write(dir.join("adapter_config.json"), config).unwrap();
    let (rows, columns) = (SHAPES[0].1[0], SHAPES[0].1[1]);
    let (a, b) = (4 * rank * columns, 4 * rank * rows);
    let entry = |name: &str, shape: [u64; 2], begin: u64, end: u64| {
        format!(r#""big.lora_{name}.weight":{{"dtype":"F32","shape":{shape:?},"data_offsets":[{begin},{end}]}}"#)
    };
    let header = format!("{{{},{}}}", entry("A", [rank, columns], 0, a), entry("B", [rows, rank], a, a + b));
    let values = (0..(a + b) / 4).flat_map(|i| ((i % 251) as f32 / 1e4 - 0.01).to_le_bytes());
    let file = (header.len() as u64).to_le_bytes().into_iter().chain(header.bytes()).chain(values);
    fs::write(dir.join("adapter_model.safetensors"), file.collect::<Vec<u8>>()).unwrap();
}

/// A memory cgroup that disappears with this value.
struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes one with the limit, if this user and system can.
    fn new() -> Option<Self> {
        let name = format!("tiesmith-test-{}", std::process::id());
        let root = Path::new("/sys/fs/cgroup");
        let (dir, limit, swap) = if root.join("memory/memory.limit_in_bytes").exists() {
            (root.join("memory").join(name), "memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        } else {
            (root.join(name), "memory.max", "memory.swap.max")
        };
        fs::create_dir(&dir).ok()?;
        let group = Self(dir);
        fs::write(group.0.join(limit), CGROUP_BYTES.to_string()).ok()?;
        // Without swap, if swap is accounted for at all.
        let swap_bytes = if swap == "memory.swap.max" { 0 } else { CGROUP_BYTES };
        let _ = fs::write(group.0.join(swap), swap_bytes.to_string());
        Some(group)
    }

    /// `program`, as a member of the group from its first instruction.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", r#"echo $$ > "$0" && exec "$@""#]).arg(self.0.join("cgroup.procs")).arg(program);
        command
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// Waits for the child; returns the highest peak of resident memory seen, in bytes.
fn watch(child: &mut Child) -> u64 {
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        let text = fs::read_to_string(&status).unwrap_or_default();
        // The peak starts anew when the shell becomes the program, so it is followed, not read once.
        let line = text.lines().find(|line| line.starts_with("VmHWM:"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1)).and_then(|kib| kib.parse::<u64>().ok());
        peak = peak.max(kib.unwrap_or(0) * 1024);
        std::thread::sleep(Duration::from_millis(5));
    }
    peak
}

/// Names and hashes of an output's shards.
fn shards_of(out: &str) -> Vec<(String, blake3::Hash)> {
    let paths = fs::read_dir(out).unwrap().map(|entry| entry.unwrap().path());
    let hash = |path: PathBuf| {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(fs::File::open(&path).unwrap()).unwrap();
        (path.file_name().unwrap().to_str().unwrap().to_owned(), hasher.finalize())
    };
    let mut shards: Vec<_> =
        paths.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).map(hash).collect();
    shards.sort_by(|a, b| a.0.cmp(&b.0));
    shards
}

/// The smallest `--memory` that a refusal names.
fn least_memory(refusal: &str) -> String {
    refusal.split("at least ").nth(1).and_then(|rest| rest.split(' ').next()).expect(refusal).to_owned()
}

#[test]
fn the_memory_budget_holds() {
    let _alone = alone();
    // Not the system's temporary directory: files in a tmpfs would count as memory.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let place = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    for (seed, (name, block)) in [("base", 262_147), ("one", 262_151), ("two", 131_101)].into_iter().enumerate() {
        fs::create_dir(place(name)).unwrap();
        write_checkpoint(&dir.path().join(name).join("model.safetensors"), seed as u32 + 1, block);
    }
    write_adapter(&dir.path().join("lora"), 8);
    const { assert!(3 * CHECKPOINT_BYTES > 8 * BUDGET_BYTES) };

    let group = Cgroup::new();
    if group.is_none() {
        eprintln!("no memory cgroup can be made here: resident memory is watched, not limited");
    }
    // Where inputs come from; the server is no member of the group.
    let server = hub::Hub::start();
    ["base", "one", "two"].iter().for_each(|name| server.add(&format!("org/{name}"), &dir.path().join(name)));
    type Name<'a> = &'a dyn Fn(&str) -> String;
    let sources: [(&str, Name<'_>); 3] = [
        ("files", &place),
        ("the Hub", &|name| format!("hf://org/{name}")),
        ("a web server", &|name| server.address(&format!("org/{name}"), "model.safetensors")),
    ];
    let lora = place("lora");
    let cases: [&[&str]; 7] = [
        // Computed where they are read, among others.
        &["--model", &lora, "--threads=3"],
        &["--io=mmap", "--threads=2", "--trim-ties=lowest"],
        &["--io=read", "--threads=4", "--scope=tensor"],
        &["--method=linear", "--max-shard-size=50MB"],
        // Two thresholds per model; sums over tensors that do not fit; rows.
        &["--method=breadcrumbs_ties", "--trim-ties=lowest", "--threads=3"],
        &["--method=slerp", "--threads=4"],
        &["--method=nuslerp", "--param=nuslerp_flatten=false", "--threads=4"],
    ];
    let mut expected = Vec::new();
    let everywhere = cases.into_iter().enumerate().flat_map(|case| sources.map(|source| (case, source)));
    // Whoever serves ranges, they are read in one way: from a web server, a few cases do.
    let tried = everywhere.filter(|((number, _), (source, _))| *source != "a web server" || number % 3 == 0);
    for ((_, flags), (source, name)) in tried {
        let program = env!("CARGO_BIN_EXE_tiesmith");
        let mut command = group.as_ref().map_or_else(|| Command::new(program), |group| group.command(program));
        command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", &server.endpoint).env("HF_HOME", place("home"));
        let out = place("out");
        command.args(["merge", "--base", &name("base"), "--model", &name("one"), "--model", &name("two")]);
        command.args(["--memory", &BUDGET_BYTES.to_string(), "--progress=none", "--json", "--out", &out]).args(flags);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let peak = watch(&mut child);
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{source}, {flags:?}: {} {stderr}", output.status);
        eprintln!("{source}, {flags:?}: a peak of {peak} bytes");
        assert!(peak > 0 && peak <= BUDGET_BYTES, "{source}, {flags:?}: a peak of {peak} bytes");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let reported = report["peak_memory_bytes"].as_u64().expect("a reported peak");
        assert!(reported <= BUDGET_BYTES, "{source}, {flags:?}: a reported peak of {reported} bytes");
        let written: u64 = fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
        assert!(written >= CHECKPOINT_BYTES, "{source}, {flags:?}: {written} bytes written");
        match source {
            "files" => expected = shards_of(&out),
            _ => assert_eq!(shards_of(&out), expected, "{source}, {flags:?}: other bytes than from files"),
        }
        fs::remove_dir_all(&out).unwrap();
    }
}

/// Adapters of different ranks whose change is three times the budget: a part of it is held at a time, and its factors.
#[test]
fn factors_of_a_large_change_fit() {
    let _alone = alone();
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let place = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    write_adapter(&dir.path().join("eight"), 8);
    write_adapter(&dir.path().join("three"), 3);
    let group = Cgroup::new();
    for flags in [&["--method=linear", "--threads=2"][..], &["--density=0.5", "--threads=1", "--rank=2"]] {
        let program = env!("CARGO_BIN_EXE_tiesmith");
        let mut command = group.as_ref().map_or_else(|| Command::new(program), |group| group.command(program));
        command.args([
            "merge",
            "--model",
            &place("eight"),
            "--model",
            &place("three"),
            "--out",
            &place("out"),
            "--force",
        ]);
        command.args(["--memory", &BUDGET_BYTES.to_string(), "--progress=none", "--json"]).args(flags);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let peak = watch(&mut child);
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{flags:?}: {}", String::from_utf8_lossy(&output.stderr));
        eprintln!("{flags:?}: a peak of {peak} bytes");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let peak = peak.max(report["peak_memory_bytes"].as_u64().unwrap());
        assert!(peak > BUDGET_BYTES / 4 && peak <= BUDGET_BYTES, "{flags:?}: a peak of {peak} bytes");
        assert!(report["factors"]["kept_norm"].as_f64().unwrap() > 0.5);
    }
}

/// Writes a checkpoint of `count` tensors with a few pseudo-random values each.
fn write_many(path: &Path, seed: u32, count: usize) {
    const ELEMENTS: usize = 9;
    let entry = |i: usize| {
        let (begin, end) = (i * ELEMENTS * 4, (i + 1) * ELEMENTS * 4);
        let name = format!("model.layers.{}.experts.{}.weight", i / 100, i % 100);
        format!(r#""{name}":{{"dtype":"F32","shape":[3,3],"data_offsets":[{begin},{end}]}}"#)
    };
    let header = format!("{{{}}}", (0..count).map(entry).collect::<Vec<_>>().join(","));
    let mut state = seed;
    let values = (0..count * ELEMENTS).flat_map(|_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (((state >> 8) as f32 / (1 << 24) as f32) - 0.5).to_le_bytes()
    });
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &values.collect::<Vec<u8>>()].concat();
    fs::create_dir(path).unwrap();
    fs::write(path.join("model.safetensors"), file).unwrap();
}

/// Names, plan, hashes, journal and manifest are in the sum, not beside it.
#[test]
fn very_many_tensors_stay_within_the_least_that_works() {
    let _alone = alone();
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let place = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    const TENSORS: usize = 40_000;
    const MODELS: usize = 6;
    let mut inputs = vec!["--base".to_owned(), place("base")];
    write_many(Path::new(&place("base")), 1, TENSORS);
    for model in 0..MODELS {
        let path = place(&format!("model{model}"));
        write_many(Path::new(&path), model as u32 + 2, TENSORS);
        inputs.extend(["--model".to_owned(), path]);
    }
    // A tokenizer of this size is copied in pieces.
    fs::write(dir.path().join("base/tokenizer.json"), vec![b' '; 60_000_000]).unwrap();
    fs::write(dir.path().join("base/config.json"), format!("{{\"labels\":[{}0]}}", "0,".repeat(100_000))).unwrap();
    for flags in [&["--scope=tensor"][..], &["--trim-ties=lowest", "--max-shard-size=300kB"], &["--io=mmap"]] {
        let run = |verb: &str, more: &[&str]| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_tiesmith"));
            command.arg(verb).args(&inputs).args(flags).args(["--threads=2", "--json"]).args(more);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        };
        let refused = run("plan", &["--memory=1MB"]).wait_with_output().unwrap();
        let text = String::from_utf8(refused.stderr).unwrap();
        let least = least_memory(&text);
        let out = place("out");
        let mut child = run("merge", &["--progress=none", "--memory", &least, "--out", &out]);
        let peak = watch(&mut child);
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{flags:?}: {}", String::from_utf8_lossy(&output.stderr));
        let (least, report): (u64, Value) = (least.parse().unwrap(), serde_json::from_slice(&output.stdout).unwrap());
        let peak = peak.max(report["peak_memory_bytes"].as_u64().unwrap());
        eprintln!("{flags:?}: a peak of {peak} bytes, {least} promised");
        assert!(peak <= least, "{flags:?}: a peak of {peak} bytes, but {least} were promised");
        // An empty promise would hold too.
        assert!(peak * 3 >= least, "{flags:?}: a peak of {peak} bytes, far below the {least} promised");
        fs::remove_dir_all(&out).unwrap();
    }
}

/// What is packed, read from packed files, made together, and looked at is in the sum too.
#[test]
fn packing_sweeping_and_looking_stay_within_the_budget() {
    let _alone = alone();
    const LIMIT: u64 = 96_000_000;
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let place = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    for (seed, (name, block)) in [("base", 262_147), ("one", 262_151), ("two", 131_101)].into_iter().enumerate() {
        fs::create_dir(place(name)).unwrap();
        write_checkpoint(&dir.path().join(name).join("model.safetensors"), seed as u32 + 1, block);
    }
    let [base, one, two, packed] = ["base", "one", "two", "one.tvz"].map(place);
    let models = ["--base", &base, "--model", &one, "--model", &two];
    let server = hub::Hub::start();
    ["base", "one", "two"].iter().for_each(|name| server.add(&format!("org/{name}"), &dir.path().join(name)));
    let far = ["--base", "hf://org/base", "--model", "hf://org/one", "--model", "hf://org/two"];
    let run = |verb: &[&str], flags: &[&str], out: &str| {
        let limit = LIMIT.to_string();
        let mut command = Command::new(env!("CARGO_BIN_EXE_tiesmith"));
        command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", &server.endpoint).env("HF_HOME", place("home"));
        command.args(verb).args(flags).args(["--memory", &limit, "--progress=none", "--json", "--out", out]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let peak = watch(&mut child);
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{verb:?} {flags:?}: {}", String::from_utf8_lossy(&output.stderr));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let peak = peak.max(report["peak_memory_bytes"].as_u64().unwrap());
        eprintln!("{} {flags:?}: a peak of {peak} bytes", verb[0]);
        assert!(peak > 0 && peak <= LIMIT, "{verb:?} {flags:?}: a peak of {peak} bytes");
        let _ = fs::remove_dir_all(out);
    };
    let out = place("out");
    run(&["pack", &one, "--base", &base], &["--threads=2", "--scope=tensor", "--force"], &packed);
    run(&["pack", &one, "--base", &base], &["--threads=4", "--trim-ties=lowest", "--force"], &packed);
    run(&["unpack", &packed], &["--threads=4"], &out);
    run(&["merge", "--base", &base, "--model", &packed, "--model", &two], &["--threads=2"], &out);
    let sweep = [&["sweep"][..], &models].concat();
    run(&sweep, &["--threads=2", "--lambda=0.5,1,1.5,2", "--density=0.2,0.4", "--io=mmap"], &out);
    run(&sweep, &["--threads=2", "--lambda=1,1.5,2,3", "--scope=tensor", "--packed"], &out);
    let look = [&["analyze"][..], &models].concat();
    run(&look, &["--threads=2"], &out);
    run(&look, &["--threads=3", "--scope=tensor", "--io=mmap", "--densities=0.1,0.4"], &out);
    run(
        &["pack", "hf://org/one", "--base", "hf://org/base"],
        &["--threads=2", "--trim-ties=lowest", "--force"],
        &packed,
    );
    run(&[&["sweep"][..], &far].concat(), &["--threads=2", "--lambda=0.5,1", "--density=0.2"], &out);
    run(&[&["analyze"][..], &far].concat(), &["--threads=2", "--scope=tensor"], &out);
}

/// Vocabularies are read before anything is planned; what that takes is in the sum too.
#[test]
fn vocabularies_are_in_the_sum() {
    let _alone = alone();
    const TOKENS: usize = 60_000;
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut recipe = String::from("merge_method: ties\nbase_model: m0\nmodels:\n");
    for model in 0..4 {
        let path = dir.path().join(format!("m{model}"));
        // Most are in all of them; the others are added to the union.
        let token = |i: usize| match i < TOKENS / 6 * 5 {
            true => format!(r#""a token {i}":{i}"#),
            false => format!(r#""a token {i} of {model}":{i}"#),
        };
        let vocabulary: Vec<String> = (0..TOKENS).map(token).collect();
        let bytes = TOKENS * 4 * 2;
        let header = format!(
            r#"{{"model.embed_tokens.weight":{{"dtype":"BF16","shape":[{TOKENS},4],"data_offsets":[0,{bytes}]}}}}"#
        );
        fs::create_dir(&path).unwrap();
        let data = vec![0; bytes];
        let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
        fs::write(path.join("model.safetensors"), file).unwrap();
        let tokenizer = format!(r#"{{"added_tokens":[],"model":{{"vocab":{{{}}}}}}}"#, vocabulary.join(","));
        fs::write(path.join("tokenizer.json"), tokenizer).unwrap();
        if model > 0 {
            recipe.push_str(&format!("- model: m{model}\n  parameters: {{weight: 1, density: 0.5}}\n"));
        }
    }
    recipe.push_str("tokenizer_source: union\n");
    fs::write(dir.path().join("recipe.yml"), recipe).unwrap();
    let run = |verb: &str, more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tiesmith"));
        command.current_dir(dir.path()).args([verb, "recipe.yml", "--threads=1", "--json"]).args(more).output().unwrap()
    };
    let refused = String::from_utf8(run("plan", &["--memory=1MB"]).stderr).unwrap();
    let least = least_memory(&refused);
    let output = run("merge", &["--progress=none", "--memory", &least, "--out=out"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let (least, peak): (u64, u64) = (least.parse().unwrap(), report["peak_memory_bytes"].as_u64().unwrap());
    eprintln!("a peak of {peak} bytes, {least} promised");
    assert!(peak <= least, "a peak of {peak} bytes, but {least} were promised");
}
