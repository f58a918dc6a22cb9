//! What is downloaded and needed again: every byte comes over the network once, and the output has the bytes of a merge of
//! local inputs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use safetensors::Dtype;
use serde_json::Value;

use crate::remote::{Remote, content_bytes, hf, lasting, must_be_about, requests};
use crate::support::family::{Deltas, Family, Spec, text};
use crate::support::hub::Fault;
use crate::support::oracle::{Recipe, Scope, TrimTies, ZeroSum};
use crate::support::random::Random;
use crate::support::run::{Outcome, run};

/// Too little to hold the inputs between the passes, in one thread and in two.
pub const LITTLE: [&str; 3] = ["--memory=52MB", "--threads=2", "--max-shard-size=2MB"];

pub fn spec(seed: u64, base: Dtype, models: &[Dtype], deltas: Deltas) -> Spec {
    let shapes =
        vec![("a", vec![900, 1000]), ("b", vec![600_001]), ("c", vec![3]), ("d", vec![]), ("e", vec![700, 1001])];
    Spec { seed, shapes, base, models: models.to_vec(), deltas }
}

/// What goes wrong where values are put back together: NaN and infinities, zeros of both signs, denormals.
fn with_oddities(mut family: Family) -> Family {
    let mut random = Random::new(99);
    let mut spoil = |tensor: &mut crate::support::tensor::Tensor, odd: &[f32]| {
        let mut values = tensor.f32s();
        for _ in 0..values.len() / 50 {
            let at = random.below(values.len());
            values[at] = odd[random.below(odd.len())];
        }
        *tensor = crate::support::tensor::Tensor::floats(tensor.dtype, &tensor.shape, &values);
    };
    let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, f32::from_bits(1 << 16), -1e-40, 3e38];
    family.base.values_mut().for_each(|tensor| spoil(tensor, &odd));
    for model in &mut family.models {
        model.values_mut().for_each(|tensor| spoil(tensor, &odd));
    }
    family
}

pub fn passes(plan: &Value, what: &str) -> u64 {
    plan["passes"].as_array().unwrap().iter().filter_map(|pass| pass[what].as_u64()).sum()
}

/// The flags of a merge of the remote family as the recipe says.
fn flags<'a>(recipe: &'a [String], more: &[&'a str]) -> Vec<&'a str> {
    recipe.iter().map(String::as_str).chain(LITTLE).chain(more.iter().copied()).collect()
}

/// Merges the family from the network and from files; what was downloaded must be what the plan says.
fn compare(remote: &Remote, recipe: &Recipe, more: &[&str], base: &dyn Fn(&str) -> String) {
    let local = lasting(&remote.saved.merge(recipe, &[&LITTLE[..], more].concat()).path);
    let name = |name: &str| match name.strip_prefix("model") {
        Some(number) => hf(name) + &recipe.model_suffix(number.parse::<usize>().unwrap() - 1),
        None => base(name),
    };
    let args = recipe.args();
    let flags = flags(&args, more);
    remote.hub.log();
    let plan = remote.merge("plan", &name, &flags).succeeded().json();
    let planning = remote.hub.log();
    let heads = content_bytes(&planning);
    let (planned, spared) = (passes(&plan, "bytes_downloaded"), passes(&plan, "bytes_spared"));
    assert!(plan["spool_bytes"].as_u64().is_some_and(|bytes| bytes > 0) && spared > 0, "{flags:?}: {plan}");
    let out = tempfile::tempdir().unwrap();
    let merged = out.path().join("merged");
    let outcome = remote.merge("merge", &name, &[&flags[..], &["--out", &text(&merged)]].concat()).succeeded();
    let log = remote.hub.log();
    let read = content_bytes(&log);
    must_be_about(&log, requests(&planning), &plan);
    assert_eq!(lasting(&merged), local, "{}", outcome.command);
    assert_eq!(outcome.json()["bytes_read"], plan["bytes_read"], "{}", outcome.command);
    // Heads are read when files are opened, twice where there is an index, and hold data that is not asked for again.
    assert!(read <= planned + heads && read + heads >= planned, "{flags:?}: {read} bytes, {planned} planned, {heads}");
    assert!(!merged.join(".tiesmith").exists());
    if let Some(peak) = outcome.json()["peak_memory_bytes"].as_u64() {
        assert!(peak <= 52_000_000, "{peak} bytes resident, 52,000,000 allowed: {}", outcome.command);
    }
}

#[test]
fn every_byte_is_downloaded_once_whatever_is_merged() {
    let ties = Recipe::default();
    let recipes: Vec<(Recipe, &[&str])> = vec![
        (ties.clone(), &[]),
        (Recipe { trim_ties: TrimTies::Lowest, zero_sum: ZeroSum::Majority, ..ties.clone() }, &[]),
        (ties.clone(), &["--trim-ties=sample", "--seed=7"]),
        (ties.clone(), &["--density=0.9"]),
        (ties.clone(), &["--method=breadcrumbs", "--param=gamma=0.02"]),
        (ties.clone(), &["--elect=count", "--combine=max"]),
        (ties.clone(), &["--threshold=sketch"]),
        (ties.clone(), &["--threshold=sketch", "--trim-ties=sample", "--zero-sum=majority"]),
    ];
    let bf16 = Dtype::BF16;
    for (seed, deltas) in [(31, Deltas::Stepped), (32, Deltas::HeavyTailed)] {
        let remote = Remote::of(&spec(seed, bf16, &[bf16, Dtype::F32, bf16], deltas));
        for (recipe, more) in &recipes {
            compare(&remote, recipe, more, &hf);
        }
    }
    // One type throughout goes a shorter way through the merge.
    let remote = Remote::of(&spec(38, Dtype::F16, &[Dtype::F16; 3], Deltas::HeavyTailed));
    compare(&remote, &ties, &[], &hf);
    // A base on this machine is read here, twice.
    let base = text(&remote.saved.base);
    compare(&remote, &ties, &[], &|_| base.clone());
}

/// A tensor that is too long to be held in [`LITTLE`] memory, and one that is not.
pub fn long(seed: u64, models: &[Dtype], deltas: Deltas) -> Spec {
    let shapes = vec![("a", vec![4_300, 1000]), ("b", vec![200_001]), ("c", vec![3])];
    Spec { shapes, ..spec(seed, Dtype::BF16, models, deltas) }
}

#[test]
fn a_tensor_too_long_for_memory_is_downloaded_once() {
    let (bf16, tensor) = (Dtype::BF16, Recipe { scope: Scope::Tensor, ..Recipe::default() });
    let recipes: [(Recipe, &[&str]); 5] = [
        (tensor.clone(), &[]),
        (Recipe { trim_ties: TrimTies::Lowest, zero_sum: ZeroSum::Majority, ..tensor.clone() }, &[]),
        (tensor.clone(), &["--trim-ties=sample", "--seed=7"]),
        (tensor.clone(), &["--threshold=sketch"]),
        // Shard by shard, as where each is handed over.
        (tensor.clone(), &["--on-shard=true"]),
    ];
    let remote = Remote::of(&long(51, &[bf16, Dtype::F32, bf16], Deltas::HeavyTailed));
    for (recipe, more) in &recipes {
        compare(&remote, recipe, more, &hf);
    }
    // Where there is nothing to keep, or it is not to be kept, the plan says so.
    for more in [&["--spool=none"][..], &["--method=linear"]] {
        let args = [&LITTLE[..], &["--scope=tensor"], more].concat();
        let plan = remote.merge("plan", &hf, &args).succeeded().json();
        assert_eq!((passes(&plan, "bytes_spared"), plan.get("spool_bytes")), (0, None), "{more:?}");
    }
}

#[test]
fn what_is_not_finite_comes_back_as_it_was() {
    let bf16 = Dtype::BF16;
    let family = with_oddities(spec(34, bf16, &[bf16; 3], Deltas::HeavyTailed).family());
    let remote = Remote::of_family(&family);
    for rule in ["--non-finite=copy-base", "--non-finite=propagate"] {
        compare(&remote, &Recipe::default(), &[rule, "--overflow=clamp"], &hf);
    }
}

#[test]
fn what_the_spool_is_no_help_for_is_read_again_and_the_plan_says_so() {
    let remote = Remote::of(&spec(35, Dtype::BF16, &[Dtype::BF16; 3], Deltas::HeavyTailed));
    let plan = |more: &[&str]| remote.merge_as_text("plan", &hf, &[&LITTLE[..], more].concat()).succeeded().stdout;
    let with = plan(&[]);
    assert!(with.contains("nothing of them twice but a sample of 1"), "{with}");
    assert!(with.contains("are kept on the disk until the end (--spool DIR says where)"), "{with}");
    let without = plan(&["--spool=none", "--network=8Mbit/s"]);
    assert!(without.contains("17.6 MB (17.6 s) of them again; with --cache DIR"), "{without}");
    let little = |more| [&LITTLE[..], &[more]].concat();
    let roomy = vec!["--memory=2GiB", "--threads=2", "--scope=tensor"];
    for args in [roomy, little("--method=linear"), little("--spool=none")] {
        let more = &args;
        let plan = remote.merge("plan", &hf, &args).succeeded().json();
        assert_eq!((passes(&plan, "bytes_spared"), plan.get("spool_bytes")), (0, None), "{more:?}");
        let local = remote.saved.merge(&Recipe::default(), &args);
        let out = tempfile::tempdir().unwrap();
        let merged = out.path().join("merged");
        remote.merge("merge", &hf, &[&args[..], &["--out", &text(&merged)]].concat()).succeeded();
        assert_eq!(lasting(&merged), lasting(&local.path), "{more:?}");
    }
    let refused = remote.merge("merge", &hf, &[&LITTLE[..], &["--spool=missing", "--out=nowhere"]].concat());
    assert!(refused.refusal().contains("no such directory for --spool"), "{}", refused.stderr);
    let refused = remote.merge(
        "sweep",
        &hf,
        &["--memory=96MB", "--threads=2", "--spool=missing", "--lambda=1,2", "--out=nowhere"],
    );
    assert!(refused.refusal().contains("no such directory for --spool"), "{}", refused.stderr);
    let refused = remote.merge("analyze", &hf, &["--memory=96MB", "--threads=2", "--spool=missing", "--out=nowhere"]);
    assert!(refused.refusal().contains("no such directory for --spool"), "{}", refused.stderr);
    assert!(!remote.saved.path("base/nowhere").exists());
    // What nothing keeps is said by commands that have no plan.
    let args = ["--memory=96MB", "--threads=2", "--spool=none", "--out=report"];
    let analyzed = remote.merge("analyze", &hf, &args).succeeded();
    assert!(analyzed.stderr.contains("are downloaded twice: with --cache DIR"), "{}", analyzed.stderr);
}

/// Length of all inputs.
pub fn input_bytes(remote: &Remote) -> u64 {
    let files = ["base", "model1", "model2", "model3"].map(|name| remote.saved.dir.path().join(name));
    let tensors = |dir: &PathBuf| -> u64 {
        let files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
        let files = files.filter(|file| file.file_name().to_str().unwrap().ends_with(".safetensors"));
        files.map(|file| file.metadata().unwrap().len()).sum()
    };
    files.iter().map(tensors).sum()
}

#[test]
fn each_part_of_a_merge_downloads_its_tensors_once() {
    let bf16 = Dtype::BF16;
    let remote = Remote::of(&spec(43, bf16, &[bf16, Dtype::F32, bf16], Deltas::HeavyTailed));
    let once = input_bytes(&remote);
    let ways: [&[&str]; 6] = [
        &[],
        &["--trim-ties=lowest", "--zero-sum=majority"],
        &["--threshold=sketch"],
        &["--threshold=sketch", "--trim-ties=sample", "--spool=."],
        &["--spool=."],
        &["--spool=none"],
    ];
    for more in ways {
        let flags = [&LITTLE[..], more].concat();
        let local = lasting(
            &remote
                .saved
                .merge(
                    &Recipe::default(),
                    &flags.iter().copied().filter(|f| !f.starts_with("--spool")).collect::<Vec<_>>(),
                )
                .path,
        );
        for stages in [&[&[][..]][..], &[&["--stage=sketch"], &["--stage=merge", "--memory=96MB"]]] {
            let dir = tempfile::tempdir().unwrap();
            let (merged, job) = (dir.path().join("merged"), text(&dir.path().join("job")));
            let out = text(&merged);
            let plan = remote.merge("plan", &hf, &[&flags[..], &["--out", &out, "--save", &job]].concat()).succeeded();
            let keeps = more != ["--spool=none"];
            assert_eq!(plan.json()["spool_bytes"].as_u64().is_some(), keeps);
            remote.hub.log();
            for stage in stages {
                for part in ["2/3", "1/3", "3/3"] {
                    let args = [&["run", &job, "--progress=none", "--part", part], *stage].concat();
                    remote.run(&args).succeeded();
                }
            }
            let read = content_bytes(&remote.hub.log());
            remote.run(&["finish", &job, "--progress=none"]).succeeded();
            assert_eq!(lasting(&merged), local, "{more:?}, {stages:?}");
            // In each process the heads of files, and their probes.
            match keeps {
                true => assert!(read < once + once / 2, "{more:?}, {stages:?}: {read} bytes, {once} once"),
                false => assert!(read > once * 3 / 2, "{more:?}, {stages:?}: {read} bytes, {once} once"),
            }
            assert!(spool_in(&remote.saved.dir.path().join("base")).is_none());
        }
    }
}

/// Outputs of a sweep, without what names inputs.
pub fn outputs(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = lasting(dir);
    files.retain(|path, _| {
        let name = path.file_name().unwrap().to_str().unwrap();
        !["tiesmith.json", "README.md", "sweep.json", "sweep.md"].contains(&name)
    });
    files
}

#[test]
fn outputs_of_a_sweep_share_what_is_downloaded_once() {
    let bf16 = Dtype::BF16;
    for (seed, deltas, dtype) in [(41, Deltas::HeavyTailed, bf16), (42, Deltas::Stepped, Dtype::F32)] {
        let remote = Remote::of(&spec(seed, bf16, &[bf16, dtype, bf16], deltas));
        let run = ["--memory=96MB", "--threads=2", "--max-shard-size=2MB"];
        let grids: [&[&str]; 5] = [
            &["--density=0.1,0.3", "--lambda=0.5,1"],
            &["--density=0.05,0.2", "--subset=pairs"],
            // What one output trims, another uses whole.
            &["--method=ties,task_arithmetic", "--density=0.2"],
            &["--density=0.2,1", "--trim-ties=lowest", "--zero-sum=majority"],
            &["--density=0.1,0.4", "--threshold=sketch"],
        ];
        for grid in grids {
            let flags = [&run[..], grid].concat();
            let dir = tempfile::tempdir().unwrap();
            let (here, there) = (dir.path().join("here"), dir.path().join("there"));
            let local = |name: &str| text(&remote.saved.dir.path().join(name));
            remote.merge("sweep", &local, &[&flags[..], &["--out", &text(&here)]].concat()).succeeded();
            remote.hub.log();
            let outcome = remote.merge("sweep", &hf, &[&flags[..], &["--out", &text(&there)]].concat()).succeeded();
            let read = content_bytes(&remote.hub.log());
            assert_eq!(outputs(&there), outputs(&here), "{}", outcome.command);
            assert!(!there.join("sweep.spool").exists());
            if let Some(peak) = outcome.json()["peak_memory_bytes"].as_u64() {
                assert!(peak <= 96_000_000, "{peak} bytes resident: {}", outcome.command);
            }
            // Everything once, a sample, and what opening the files brings.
            let once = input_bytes(&remote);
            assert!(read < once + once / 4, "{read} bytes downloaded, {once} once: {}", outcome.command);
            remote.hub.log();
            remote
                .merge("sweep", &hf, &[&flags[..], &["--spool=none", "--force", "--out", &text(&there)]].concat())
                .succeeded();
            let twice = content_bytes(&remote.hub.log());
            assert!(twice > once * 3 / 2, "{twice} bytes downloaded without: {}", outcome.command);
            assert_eq!(outputs(&there), outputs(&here));
        }
    }
}

#[test]
#[cfg(unix)]
fn where_the_disk_is_full_the_rest_is_downloaded_again() {
    let remote = Remote::of(&spec(36, Dtype::BF16, &[Dtype::BF16; 3], Deltas::HeavyTailed));
    let local = lasting(&remote.saved.merge(&Recipe::default(), &LITTLE).path);
    let plan = remote.merge("plan", &hf, &LITTLE).succeeded().json();
    let (once, twice) = (passes(&plan, "bytes_downloaded"), passes(&plan, "bytes_spared"));
    let (spools, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let merged = out.path().join("merged");
    // Shards are shorter than what files may have, and the spool is longer.
    let program = remote.command();
    let mut shell = Command::new("sh");
    for (name, value) in program.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    shell.args(["-c", r#"ulimit -f 4500; exec "$@""#, "sh"]).arg(program.get_program());
    shell.args(["merge", "--json", "--progress=none", "--base", &hf("base"), "--spool", &text(spools.path())]);
    for model in ["model1", "model2", "model3"] {
        shell.args(["--model", &hf(model)]);
    }
    shell.args(LITTLE).args(["--out", &text(&merged)]);
    remote.hub.log();
    let outcome = run(shell).succeeded();
    let read = content_bytes(&remote.hub.log());
    assert_eq!(lasting(&merged), local);
    assert!(outcome.stderr.contains("the rest is downloaded twice"), "{}", outcome.stderr);
    assert!(read > once + twice / 10 && read < once + twice, "{read} bytes, {once} once, {twice} twice");
    assert_eq!(std::fs::read_dir(spools.path()).unwrap().count(), 0, "nothing is left");
}

/// A merge that is running; killed when it is dropped.
pub struct Running(pub std::process::Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(remote: &Remote, args: &[&str]) -> Running {
    let mut command = remote.command();
    command.args(["merge", "--progress=none", "--base", &hf("base")]);
    for model in ["model1", "model2", "model3"] {
        command.args(["--model", &hf(model)]);
    }
    Running(command.args(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
}

fn finish(remote: &Remote, args: &[&str]) -> Outcome {
    remote.merge("merge", &hf, args).succeeded()
}

/// The spool in `dir`, and its length.
pub fn spool_in(dir: &Path) -> Option<(PathBuf, u64)> {
    let path = std::fs::read_dir(dir).ok()?.flatten().map(|entry| entry.path()).find(|path| {
        path.file_name().is_some_and(|name| name == "spool" || name.to_string_lossy().ends_with(".spool"))
    })?;
    let bytes = path.metadata().ok()?.len();
    Some((path, bytes))
}

#[test]
fn a_killed_run_goes_on_with_what_it_downloaded() {
    let remote = Remote::of(&spec(37, Dtype::BF16, &[Dtype::BF16; 3], Deltas::HeavyTailed));
    let local = lasting(&remote.saved.merge(&Recipe::default(), &LITTLE).path);
    let plan = remote.merge("plan", &hf, &LITTLE).succeeded().json();
    let sketch = plan["passes"][1]["bytes_downloaded"].as_u64().unwrap();
    let spools = tempfile::tempdir().unwrap();
    let elsewhere = text(spools.path());
    // How much of the spool is there when the run is killed, in percent of about what it becomes, and what then happens to it.
    let mut reused = 0;
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 4] = [
        ("nothing", |_| ()),
        ("cut off", |path| {
            let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
            let length = file.metadata().unwrap().len();
            file.set_len(length - length / 3).unwrap();
        }),
        ("bytes", |path| {
            let mut bytes = std::fs::read(path).unwrap();
            let mut random = Random::new(5);
            for _ in 0..20 {
                let at = random.below(bytes.len());
                bytes[at] ^= 0x40;
            }
            std::fs::write(path, bytes).unwrap();
        }),
        ("gone", |path| std::fs::remove_file(path).unwrap()),
    ];
    for (what, damage) in damages {
        for (percent, own, more) in [(20, true, &LITTLE[..]), (60, false, &LITTLE[..]), (60, true, &["--memory=2GiB"])]
        {
            let out = tempfile::tempdir().unwrap();
            let merged = out.path().join("merged");
            let path = text(&merged);
            let spool = ["--spool", &elsewhere];
            let place = if own { &[][..] } else { &spool[..] };
            let args = |flags: &[&'static str]| {
                let shards = ["--max-shard-size=2MB", "--out"];
                flags.iter().map(|f| (*f).to_owned()).chain(shards.map(str::to_owned)).collect::<Vec<_>>()
            };
            let first: Vec<String> = args(&LITTLE);
            let first: Vec<&str> = first.iter().map(|a| &**a).chain([&*path]).chain(place.iter().copied()).collect();
            let dir = if own { merged.join(".tiesmith") } else { spools.path().to_owned() };
            remote.hub.slow_down(Duration::from_millis(30));
            let running = start(&remote, &first);
            let begin = Instant::now();
            let spool_bytes = plan["spool_bytes"].as_u64().unwrap();
            while spool_in(&dir).is_none_or(|(_, bytes)| bytes * 100 < spool_bytes * percent) {
                assert!(begin.elapsed() < Duration::from_secs(60), "{what}: no spool in {}", dir.display());
                std::thread::sleep(Duration::from_millis(1));
            }
            drop(running);
            remote.hub.slow_down(Duration::ZERO);
            let Some((spool, _)) = spool_in(&dir) else { continue };
            damage(&spool);
            // What the killed run asked for is answered, and counted, after its end.
            while !remote.hub.log().is_empty() {
                std::thread::sleep(Duration::from_millis(200));
            }
            let second: Vec<&str> = more
                .iter()
                .copied()
                .chain(["--max-shard-size=2MB", "--out", &path])
                .chain(place.iter().copied())
                .collect();
            finish(&remote, &second);
            let read = content_bytes(&remote.hub.log());
            assert_eq!(lasting(&merged), local, "{what}, {percent} %");
            assert!(!merged.join(".tiesmith").exists() && spool_in(spools.path()).is_none(), "{what}: nothing is left");
            if what == "nothing" && more == LITTLE {
                assert!(read < sketch, "{percent} %: {read} bytes downloaded again, {sketch} in all");
                reused += 1;
            }
        }
    }
    assert!(reused > 0);
}

#[test]
fn a_killed_sweep_goes_on_with_what_it_downloaded() {
    let remote = Remote::of(&spec(44, Dtype::BF16, &[Dtype::BF16; 3], Deltas::HeavyTailed));
    let flags = ["--memory=96MB", "--threads=2", "--max-shard-size=2MB", "--density=0.1,0.3", "--lambda=0.5,1"];
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    remote.merge("sweep", &hf, &[&flags[..], &["--out", &text(&whole)]].concat()).succeeded();
    let mut random = Random::new(45);
    for turn in 0..6 {
        let there = dir.path().join(format!("there{turn}"));
        let out = text(&there);
        // Killed at a random length of the spool, or when outputs are being merged, some of them with a damaged spool.
        let bytes = 1 + random.below(9_000_000) as u64;
        remote.hub.slow_down(Duration::from_millis(20));
        let mut command = remote.command();
        command.args(["sweep", "--progress=none", "--base", &hf("base"), "--out", &out]).args(flags);
        for model in ["model1", "model2", "model3"] {
            command.args(["--model", &hf(model)]);
        }
        let mut running = Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        let spool = there.join("sweep.spool");
        let length = || spool.metadata().map_or(0, |file| file.len());
        while length() < bytes && running.0.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(running);
        remote.hub.slow_down(Duration::ZERO);
        if let (1, Ok(mut content)) = (turn % 2, std::fs::read(&spool)) {
            let at = random.below(content.len());
            content[at] ^= 1;
            content.truncate(content.len() - random.below(content.len() / 2));
            std::fs::write(&spool, content).unwrap();
        }
        remote.merge("sweep", &hf, &[&flags[..], &["--out", &out]].concat()).succeeded();
        assert_eq!(outputs(&there), outputs(&whole), "turn {turn}, killed at {bytes} bytes");
        assert!(!spool.exists());
    }
}

#[test]
fn passing_faults_of_the_network_leave_a_sound_spool() {
    let remote = Remote::of(&spec(38, Dtype::BF16, &[Dtype::BF16; 2], Deltas::Stepped));
    let name = |name: &str| if name == "model3" { hf("model2") } else { hf(name) };
    let merge = |dir: &Path| {
        let dir = text(dir);
        remote.merge("merge", &name, &[&LITTLE[..], &["--out", &dir]].concat())
    };
    let out = tempfile::tempdir().unwrap();
    let lasting_of = |name: &str| -> BTreeMap<PathBuf, Vec<u8>> { lasting(&out.path().join(name)) };
    merge(&out.path().join("quiet")).succeeded();
    for (fault, from, times) in [(Fault::Reset, 20, 5), (Fault::Unavailable, 15, 3), (Fault::Truncate, 25, 4)] {
        let dir = format!("{fault:?}");
        remote.hub.misbehave(fault, from, times);
        merge(&out.path().join(&dir)).succeeded();
        assert_eq!(lasting_of(&dir), lasting_of("quiet"), "{fault:?}");
    }
    // One that lasts ends the run; the same command goes on.
    remote.hub.misbehave(Fault::ChangedTag, 30, 100_000);
    let failed = merge(&out.path().join("changed"));
    assert_ne!(failed.code, Some(0));
    remote.hub.misbehave(Fault::Reset, 1_000_000, 0);
    merge(&out.path().join("changed")).succeeded();
    assert_eq!(lasting_of("changed"), lasting_of("quiet"));
}
