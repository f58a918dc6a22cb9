//! Inputs from the Hub and from web servers: the bytes of local ones, or one clear error, whatever the network does.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use safetensors::Dtype;
use serde_json::Value;

use crate::support::family::{Deltas, Family, Saved, Spec, text};
use crate::support::files::read_tree;
use crate::support::hub::{COMMIT, Fault, Hub, Request};
use crate::support::oracle::Recipe;
use crate::support::run::{Outcome, command, run};

/// What the first request of a file asks for.
const HEAD_BYTES: u64 = 64 << 10;

/// What a checkpoint is called, from its short name.
type Name<'a> = &'a dyn Fn(&str) -> String;

/// A family on disk and on a server.
pub struct Remote {
    pub saved: Saved,
    pub hub: Hub,
}

impl Remote {
    fn new() -> Self {
        let spec = Spec {
            seed: 21,
            shapes: vec![("a", vec![300, 257]), ("b", vec![70_001]), ("c", vec![3]), ("d", vec![])],
            base: Dtype::BF16,
            models: vec![Dtype::BF16, Dtype::F32, Dtype::BF16],
            deltas: Deltas::Stepped,
        };
        Self::of(&spec)
    }

    pub fn of(spec: &Spec) -> Self {
        Self::of_family(&spec.family())
    }

    pub fn of_family(family: &Family) -> Self {
        Self::of_saved(family.save())
    }

    pub fn of_saved(saved: Saved) -> Self {
        let hub = Hub::start();
        hub.add("org/base", &saved.base);
        for (index, model) in (1..).zip(&saved.models) {
            hub.add(&format!("org/model{index}"), model);
        }
        Self { saved, hub }
    }

    /// The command with the server as its Hub, and an empty cache.
    pub fn command(&self) -> Command {
        let mut command = command();
        command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", &self.hub.endpoint).env("HF_HUB_DOWNLOAD_TIMEOUT", "1");
        command.env("HF_HOME", self.saved.path("home")).env("HOME", self.saved.path("home"));
        command.current_dir(self.saved.dir.path().join("base"));
        command
    }

    pub fn run(&self, args: &[&str]) -> Outcome {
        let mut command = self.command();
        command.args(args);
        run(command)
    }

    /// A merge of models called `name` and their number into `out`.
    pub fn merge(&self, verb: &str, name: &dyn Fn(&str) -> String, flags: &[&str]) -> Outcome {
        self.merge_as_text(verb, name, &[&["--json"], flags].concat())
    }

    pub fn merge_as_text(&self, verb: &str, name: &dyn Fn(&str) -> String, flags: &[&str]) -> Outcome {
        let sources = ["model1", "model2", "model3"].map(name);
        let base = name("base");
        let mut args = vec![verb, "--progress=none", "--base", &base];
        sources.iter().for_each(|source| args.extend(["--model", source]));
        args.extend(flags);
        self.run(&args)
    }

    fn local(&self, flags: &[&str]) -> BTreeMap<PathBuf, Vec<u8>> {
        lasting(&self.saved.merge(&Recipe::default(), flags).path)
    }
}

pub fn hf(name: &str) -> String {
    format!("hf://org/{name}")
}

/// What does not depend on how inputs are named.
pub fn lasting(out: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = read_tree(out);
    files.retain(|path, _| !["tiesmith.json", "README.md"].contains(&path.to_str().unwrap()));
    files
}

pub fn content_bytes(log: &[Request]) -> u64 {
    log.iter().filter(|request| request.content).map(|request| request.sent).sum()
}

/// How many requests for content there are.
pub fn requests(log: &[Request]) -> u64 {
    log.iter().filter(|request| request.content).count() as u64
}

/// The requests of a run, beside those that open its files, must be about as many as `plan` says.
pub fn must_be_about(log: &[Request], opened: u64, plan: &Value) {
    let passes = plan["passes"].as_array().unwrap().iter();
    let planned: u64 = passes.filter_map(|pass| pass["requests"].as_u64()).sum();
    let asked = requests(log) - opened;
    println!("{asked} range requests, {planned} planned, {opened} to open files");
    assert!(planned > 0 && asked <= planned * 3 / 2 + 8 && asked * 2 >= planned, "{asked} requests, {planned} planned");
}

#[test]
fn remote_inputs_give_the_bytes_of_local_ones() {
    let remote = Remote::new();
    let file = |name: &str| match name {
        "model1" => remote.hub.address("org/model1", "model.safetensors"),
        name => remote.hub.address(&format!("org/{name}"), "model.safetensors.index.json"),
    };
    let names: [(&str, Name<'_>); 4] = [
        ("hf", &hf),
        ("revision", &|name| format!("hf://org/{name}@v1")),
        ("bare", &|name| format!("org/{name}")),
        ("address", &file),
    ];
    for flags in [&["--memory=64MB", "--threads=1"][..], &["--scope=tensor", "--threads=3", "--max-shard-size=100KB"]] {
        let local = remote.local(flags);
        for (kind, name) in names {
            let out = tempfile::tempdir().unwrap();
            let merged = out.path().join("merged");
            let outcome = remote.merge("merge", name, &[flags, &["--out", &text(&merged)]].concat()).succeeded();
            assert_eq!(lasting(&merged), local, "{}", outcome.command);
            let warnings = outcome.json()["warnings"].to_string();
            assert_eq!(warnings.contains("not in the local cache: it is read from http://127.0.0.1"), kind == "bare");
            let manifest: Value =
                serde_json::from_slice(&std::fs::read(merged.join("tiesmith.json")).unwrap()).unwrap();
            assert_eq!(manifest["inputs"].to_string().contains(COMMIT), kind != "address", "{kind}");
        }
    }
}

/// Where inputs come from: how a checkpoint is called, and what else is asked for.
pub type Kind = (&'static str, Box<dyn Fn(&str) -> String>, Vec<String>);

pub fn kinds(remote: &Remote, cache: &Path) -> Vec<Kind> {
    let content = remote.hub.address("org", "");
    let local = remote.saved.dir.path().to_owned();
    let dir = local.clone();
    let address = move |name: &str| {
        let index = "model.safetensors.index.json";
        let file = if dir.join(name).join(index).exists() { index } else { "model.safetensors" };
        format!("{}/{name}/{file}", content.trim_end_matches('/'))
    };
    let cached = ["--cache".to_owned(), text(cache), "--cache-size=1GB".to_owned()];
    vec![
        ("files", Box::new(move |name: &str| text(&local.join(name))), Vec::new()),
        ("the Hub", Box::new(hf), Vec::new()),
        ("a web server", Box::new(address), Vec::new()),
        ("the Hub with a cache", Box::new(hf), cached.to_vec()),
        ("the Hub without a spool", Box::new(hf), vec!["--spool=none".to_owned()]),
    ]
}

/// The tests of determinism and memory, with inputs from everywhere.
#[test]
fn how_a_run_is_done_changes_no_byte_of_remote_inputs_either() {
    let remote = Remote::new();
    let runs: [(&[&str], u64); 4] = [
        (&["--threads=1"], 2 << 30),
        (&["--threads=2", "--memory=56MB"], 56_000_000),
        (&["--threads=7", "--memory=2GiB"], 2 << 30),
        (&["--io=read"], 2 << 30),
    ];
    let cache = tempfile::tempdir().unwrap();
    let kinds = kinds(&remote, cache.path());
    for (recipe, flags) in crate::determinism::recipes() {
        let flags: Vec<String> = recipe.args().into_iter().chain(flags.iter().map(|&flag| flag.to_owned())).collect();
        let local = lasting(&remote.saved.merge(&recipe, &flags.iter().map(|f| &**f).collect::<Vec<_>>()).path);
        for (kind, name, more) in &kinds {
            let name = |short: &str| match short.strip_prefix("model") {
                Some(number) => name(short) + &recipe.model_suffix(number.parse::<usize>().unwrap() - 1),
                None => name(short),
            };
            for (run, memory) in runs {
                let out = tempfile::tempdir().unwrap();
                let merged = text(&out.path().join("merged"));
                let all = flags.iter().chain(more).map(|f| &**f).chain(run.iter().copied()).chain(["--out", &merged]);
                let outcome = remote.merge("merge", &name, &all.collect::<Vec<_>>()).succeeded();
                assert_eq!(lasting(Path::new(&merged)), local, "{kind}: {}", outcome.command);
                if let Some(peak) = outcome.json()["peak_memory_bytes"].as_u64() {
                    assert!(peak <= memory, "{kind}: {peak} bytes resident: {}", outcome.command);
                }
            }
        }
    }
}

#[test]
fn what_is_read_is_what_the_plan_says() {
    let remote = Remote::new();
    for scope in ["--scope=tensor", "--scope=model"] {
        let flags = [scope, "--memory=64MB"];
        remote.hub.log();
        let plan = remote.merge("plan", &hf, &flags).succeeded().json();
        let planning = remote.hub.log();
        assert!(planning.iter().filter(|r| r.content).all(|r| r.range.is_some_and(|(_, last)| last < HEAD_BYTES)));
        assert_eq!(planning.iter().filter(|r| r.path.starts_with("/api/")).count(), 4, "a revision is asked for once");
        let out = tempfile::tempdir().unwrap();
        let merged = text(&out.path().join("merged"));
        remote.merge("merge", &hf, &[&flags[..], &["--out", &merged]].concat()).succeeded();
        let log = remote.hub.log();
        let heads = content_bytes(&planning);
        must_be_about(&log, requests(&planning), &plan);
        let (read, planned) = (content_bytes(&log), plan["bytes_read"].as_u64().unwrap());
        assert!(read <= planned + 2 * heads, "{scope}: {read} bytes sent, {planned} planned, {heads} of heads");
        // Heads hold data too, which is not asked for again.
        assert!(read + heads >= planned, "{scope}: {read} bytes sent, {planned} planned");
        // One redirect a file, then straight to where it is.
        let files = planning.iter().filter(|r| r.content).count();
        assert!(log.iter().filter(|r| r.path.contains("/resolve/")).count() <= files + 4, "{scope}");
    }
}

#[test]
fn a_revision_means_one_commit_for_the_whole_run() {
    let remote = Remote::new();
    remote.hub.move_revisions();
    let out = tempfile::tempdir().unwrap();
    let merged = out.path().join("merged");
    let name = |name: &str| if name == "base" { "hf://org/base".into() } else { "hf://org/model1".to_string() };
    remote.merge("merge", &name, &["--out", &text(&merged)]).succeeded();
    let manifest: Value = serde_json::from_slice(&std::fs::read(merged.join("tiesmith.json")).unwrap()).unwrap();
    let commits: Vec<&str> =
        manifest["inputs"].as_array().unwrap().iter().filter_map(|i| i["checkpoint"]["hub"].as_str()).collect();
    assert_eq!(commits.len(), 4);
    assert!(commits[1..].iter().all(|commit| *commit == commits[1]), "{commits:?}");
}

#[test]
fn ranges_are_large_and_several_at_a_time_over_few_connections() {
    let spec = Spec {
        seed: 5,
        shapes: vec![("a", vec![1500, 1000]), ("b", vec![900_001]), ("c", vec![3]), ("d", vec![700, 1000])],
        base: Dtype::BF16,
        models: vec![Dtype::BF16, Dtype::BF16, Dtype::BF16],
        deltas: Deltas::Stepped,
    };
    let remote = Remote::of(&spec);
    for flags in
        [["--scope=model", "--memory=512MB", "--threads=2"], ["--scope=tensor", "--memory=512MB", "--threads=2"]]
    {
        let local = remote.local(&flags);
        let plan = remote.merge("plan", &hf, &flags).succeeded().json();
        let planned = plan["bytes_read"].as_u64().unwrap();
        remote.hub.slow_down(std::time::Duration::from_millis(50));
        let opened = requests(&remote.hub.log());
        remote.hub.traffic();
        let out = tempfile::tempdir().unwrap();
        let merged = out.path().join("merged");
        let begin = std::time::Instant::now();
        remote.merge("merge", &hf, &[&flags[..], &["--out", &text(&merged)]].concat()).succeeded();
        let (took, log, (connections, at_once)) = (begin.elapsed(), remote.hub.log(), remote.hub.traffic());
        remote.hub.slow_down(std::time::Duration::ZERO);
        assert_eq!(lasting(&merged), local, "{flags:?}");
        let ranges: Vec<u64> = log.iter().filter(|r| r.content).map(|r| r.sent).collect();
        let (heads, rest): (Vec<u64>, Vec<u64>) = ranges.iter().partition(|&&bytes| bytes <= HEAD_BYTES);
        assert!(at_once >= 4, "{flags:?}: {at_once} at a time");
        // Threads that fetch, those that read, and the one that opens the files, at two hosts.
        assert!(connections <= 2 * 20, "{flags:?}: {connections} connections for {} requests", log.len());
        // Chunks are 256 kB: without joining there would be one request for each chunk of each file and pass.
        let chunks = planned / (256 << 10);
        assert!((rest.len() as u64) < chunks / 2, "{flags:?}: {} ranges for {planned} bytes: {rest:?}", rest.len());
        let read = rest.iter().sum::<u64>() + heads.iter().sum::<u64>();
        must_be_about(&log, opened, &plan);
        assert!(read <= planned + 4 * HEAD_BYTES * 2, "{flags:?}: {read} bytes of {planned}");
        let one_by_one = std::time::Duration::from_millis(50) * (chunks as u32 + 40);
        println!("{flags:?}: {took:?}, {} ranges, {connections} connections, {at_once} at a time", ranges.len());
        assert!(took < one_by_one, "{flags:?}: {took:?}, one by one {one_by_one:?}");
    }
}

#[test]
fn what_is_kept_is_not_downloaded_again() {
    let spec = Spec {
        seed: 6,
        shapes: vec![("a", vec![1500, 1000]), ("b", vec![900_001]), ("c", vec![3]), ("d", vec![700, 1000])],
        base: Dtype::BF16,
        models: vec![Dtype::BF16, Dtype::BF16, Dtype::BF16],
        deltas: Deltas::HeavyTailed,
    };
    let remote = Remote::of(&spec);
    let flags = ["--scope=model", "--memory=52MB", "--threads=2", "--spool=none"];
    let local = remote.local(&flags);
    let plan = remote.merge("plan", &hf, &flags).succeeded().json();
    let bytes = |name: &str| {
        let passes = plan["passes"].as_array().unwrap().iter();
        passes.filter(|pass| pass["name"] == name).map(|pass| pass["bytes_read"].as_u64().unwrap()).sum::<u64>()
    };
    let (probe, sketch, merge) = (bytes("probe"), bytes("sketch"), bytes("merge"));
    assert!(probe > 0 && sketch > 20_000_000 && merge == sketch, "{plan}");
    let cache = tempfile::tempdir().unwrap();
    let cache_dir = text(cache.path());
    for (size, most) in [
        (None, probe + sketch + merge),
        (Some("1GB"), probe + sketch),
        (Some("10MB"), probe + sketch + merge - 8_000_000),
    ] {
        let out = tempfile::tempdir().unwrap();
        let merged = text(&out.path().join("merged"));
        let mut args = [&flags[..], &["--out", &merged]].concat();
        if let Some(size) = size {
            args.extend(["--cache", &cache_dir, "--cache-size", size]);
        }
        remote.hub.log();
        let report = remote.merge("merge", &hf, &args).succeeded().json();
        let read = content_bytes(&remote.hub.log());
        if let Some(peak) = report["peak_memory_bytes"].as_u64() {
            assert!(peak <= 52_000_000, "{peak} bytes resident, 52,000,000 allowed");
        }
        assert_eq!(lasting(Path::new(&merged)), local, "{size:?}");
        // First bytes of files are read once more, and hold what need not be asked for again.
        let slack = 16 * HEAD_BYTES;
        assert!(read <= most + slack && read + slack + 3_000_000 >= most, "{size:?}: {read} bytes, {most} expected");
        assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 0, "nothing is left");
    }
    let says = |args: &[&str], words: &[&str]| {
        let plan = remote.merge_as_text("plan", &hf, &[&flags[..], args].concat()).succeeded().stdout;
        words.iter().for_each(|word| assert!(plan.contains(word), "{word}: {plan}"));
    };
    says(&[], &["Network", "again; with --cache DIR --cache-size 1GB nothing is"]);
    says(&["--cache", &cache_dir, "--cache-size", "1GB"], &["nothing of them twice"]);
    says(&["--scope=tensor", "--memory=512MB"], &["nothing of them twice"]);
    let refused = |code, args: &[&str]| {
        remote.merge("merge", &hf, &[args, &["--out", "nowhere"]].concat()).error_line(code).to_owned()
    };
    assert!(refused(2, &["--cache", "missing", "--cache-size", "1GB"]).contains("no such directory for --cache"));
    assert!(refused(1, &["--cache", &cache_dir, "--cache-size", "1000TB"]).contains("smaller --cache-size"));
    assert!(refused(2, &["--cache", &cache_dir]).contains("--cache-size"));
}

#[test]
fn a_wait_that_a_server_asks_for_is_told() {
    let remote = Remote::new();
    let plan = ["--memory=64MB", "--threads=1"];
    remote.hub.log();
    remote.merge("plan", &hf, &plan).succeeded();
    let opened = remote.hub.log().iter().filter(|request| request.content).count();
    let dir = tempfile::tempdir().unwrap();
    // When files are opened, and when they are read.
    let turns =
        [("plan", 0, "plain"), ("merge", 0, "auto"), ("merge", opened + 1, "plain"), ("merge", opened + 1, "json")];
    for (turn, (verb, from, mode)) in turns.into_iter().chain([("merge", opened + 1, "none")]).enumerate() {
        let out = text(&dir.path().join(turn.to_string()));
        let [base, models @ ..] = ["base", "model1", "model2", "model3"].map(hf);
        let mut args = vec![verb, "--progress", mode, "--base", &base];
        models.iter().for_each(|model| args.extend(["--model", model]));
        remote.hub.misbehave(Fault::TooMany, from, 1);
        let place = ["--out", &out];
        let place = if verb == "plan" { &[][..] } else { &place };
        let outcome = remote.run(&[&args[..], &plan, place].concat());
        let told: Vec<String> =
            outcome.succeeded().stderr.lines().filter(|line| line.contains("wait")).map(str::to_owned).collect();
        match (mode, &told[..]) {
            ("none", []) => {}
            ("json", [event]) => {
                let event: Value = serde_json::from_str(event).unwrap();
                let host = event["host"].as_str().unwrap();
                assert!(host.starts_with("127.0.0.1:") && event["event"] == "wait" && event["seconds"] == 1, "{event}");
            }
            ("plain" | "auto", [line]) => {
                assert!(line.starts_with("127.0.0.1:") && line.ends_with(" asks to wait 1 s"), "{line}");
            }
            _ => panic!("{verb} {mode}: {told:?}"),
        }
    }
}

#[test]
fn passing_faults_cost_time_and_no_byte() {
    let remote = Remote::new();
    let flags = ["--memory=64MB", "--threads=1"];
    let local = remote.local(&flags);
    remote.hub.log();
    remote.merge("plan", &hf, &flags).succeeded();
    let opened = remote.hub.log().iter().filter(|r| r.content).count();
    let faults = [
        (Fault::Stall, 1),
        (Fault::Reset, 3),
        (Fault::Truncate, 3),
        (Fault::TooMany, 1),
        (Fault::Unavailable, 3),
        (Fault::WrongRange, 1),
        (Fault::NoContentRange, 1),
        (Fault::Expired, 1),
        (Fault::ShortLived, 1000),
    ];
    let cache = tempfile::tempdir().unwrap();
    for (kind, name, more) in kinds(&remote, cache.path()).iter().skip(1) {
        for (fault, times) in faults {
            // Only what the Hub gives out are addresses that end.
            if matches!(fault, Fault::Expired | Fault::ShortLived) && *kind == "a web server" {
                continue;
            }
            for from in [0, opened + 1] {
                if from == 0
                    && matches!(fault, Fault::WrongRange | Fault::NoContentRange | Fault::Expired | Fault::ShortLived)
                {
                    continue;
                }
                // Before anything is read there is less patience.
                let times = if from == 0 { times.min(1) } else { times };
                let out = tempfile::tempdir().unwrap();
                let merged = out.path().join("merged");
                remote.hub.misbehave(fault, from, times);
                let more: Vec<&str> = more.iter().map(|f| &**f).collect();
                let path = text(&merged);
                let outcome = remote.merge("merge", name, &[&flags[..], &more, &["--out", &path]].concat());
                assert_eq!(outcome.code, Some(0), "{kind}: {fault:?} from {from}: {}", outcome.stderr);
                assert_eq!(lasting(&merged), local, "{kind}: {fault:?} from {from}");
            }
        }
    }
}

#[test]
fn lasting_faults_are_one_line_and_the_same_command_goes_on() {
    let remote = Remote::new();
    let flags = ["--memory=64MB", "--threads=1", "--scope=tensor"];
    let local = remote.local(&flags);
    remote.hub.log();
    remote.merge("plan", &hf, &flags).succeeded();
    let opened = remote.hub.log().iter().filter(|r| r.content).count();
    for (fault, words) in [
        (Fault::ChangedTag, "changed while it was read"),
        (Fault::IgnoresRanges, "ignores byte ranges"),
        (Fault::Unavailable, "gave up after 6 attempts: the server says 503"),
        (Fault::Expired, "gave up after 6 attempts: the address that it leads to is refused (status 403)"),
        (
            Fault::Skewed,
            "RequestTimeTooSkewed: The difference between the request time and the current time is too large",
        ),
    ] {
        let out = tempfile::tempdir().unwrap();
        let merged = out.path().join("merged");
        remote.hub.misbehave(fault, opened + 3, 1_000_000);
        let again = || remote.merge("merge", &hf, &[&flags[..], &["--out", &text(&merged)]].concat());
        let outcome = again();
        let code = outcome.code.unwrap();
        assert!(outcome.error_line(code).contains(words), "{fault:?}: {}", outcome.stderr);
        assert!(matches!(code, 1 | 2), "{fault:?}");
        assert!(!merged.join("model.safetensors").exists());
        remote.hub.misbehave(fault, 0, 0);
        again().succeeded();
        assert_eq!(lasting(&merged), local, "{fault:?}");
    }
    // Clocks that differ: both times, and what to do, wherever it is noticed.
    for (name, code) in
        [("hf://org/base".to_owned(), 1), (remote.hub.address("org/base", "model.safetensors.index.json"), 2)]
    {
        remote.hub.misbehave(Fault::Skewed, 0, 1_000_000);
        let outcome = remote.run(&["inspect", &name]);
        let line = outcome.error_line(code);
        for words in [
            "the server's clock says 2099-01-01 00:00:00 UTC, this machine's 20",
            "RequestTimeTooSkewed",
            "set this machine's clock",
        ] {
            assert!(line.contains(words), "{line}");
        }
    }
    for (fault, words) in [
        (Fault::IgnoresRanges, "ignores byte ranges"),
        (Fault::NoContentRange, "answered with no Content-Range"),
        (Fault::WrongRange, "answered with bytes 1-"),
    ] {
        remote.hub.misbehave(fault, 0, 1_000_000);
        let outcome = remote.merge("plan", &hf, &flags);
        assert!(outcome.refusal().contains(words), "{fault:?}: {}", outcome.stderr);
    }
}

#[test]
fn servers_that_make_no_sense_are_one_line() {
    let remote = Remote::new();
    for (fault, code, words) in [
        (Fault::Loop, 2, "too many redirects"),
        (Fault::LongHeaders, 1, "gave up after 3 attempts"),
        (Fault::Longer, 1, "sent more than was asked for"),
        (Fault::Drip, 1, "bytes of the answer come per second"),
    ] {
        remote.hub.misbehave(fault, 0, 1_000_000);
        let begin = std::time::Instant::now();
        let line = remote.run(&["inspect", "hf://org/model1"]).error_line(code).to_owned();
        assert!(line.contains(words) && line.len() < 500, "{fault:?}: {line}");
        assert!(begin.elapsed() < std::time::Duration::from_secs(30), "{fault:?}");
    }
    // What arrives is kept, so that even this ends, once the file is open.
    remote.hub.misbehave(Fault::Shorter, 1, 1_000_000);
    let read = remote.run(&["diff", "hf://org/model1", &text(&remote.saved.models[0])]);
    assert_eq!(read.code, Some(0), "{}", read.stderr);
}

/// A checkpoint among ten thousand other files, under names that addresses have to escape.
#[test]
fn names_are_what_they_are_however_many_there_are() {
    let remote = Remote::new();
    let strange = ["teil ä%41 #1?&+.safetensors", "模型%2F.safetensors"];
    let dir = remote.saved.path("strange");
    std::fs::create_dir(&dir).unwrap();
    let mut map = serde_json::Map::new();
    for (part, name) in strange.into_iter().enumerate() {
        let header = format!(r#"{{"t{part}":{{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}}}"#);
        let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[part as u8; 12]].concat();
        std::fs::write(dir.join(name), file).unwrap();
        map.insert(format!("t{part}"), name.into());
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    for number in 0..10_000 {
        std::fs::write(dir.join(format!("notes-{number:05}.txt")), b"").unwrap();
    }
    remote.hub.add("org/strange", &dir);
    let begin = std::time::Instant::now();
    let same = remote.run(&["diff", "hf://org/strange", &text(&dir)]);
    assert_eq!(same.code, Some(0), "{}{}", same.stdout, same.stderr);
    assert!(begin.elapsed() < std::time::Duration::from_secs(20));
}

#[test]
fn tokens_go_to_the_hub_and_nowhere_else() {
    let remote = Remote::new();
    remote.hub.protect("org/model1", "hf_secret", false);
    remote.hub.log();
    let with = |variables: &[(&str, &str)]| {
        let mut command = remote.command();
        command.args(["inspect", "hf://org/model1"]).envs(variables.iter().copied());
        run(command)
    };
    let says = |outcome: &Outcome, words: &[&str]| {
        let line = outcome.refusal();
        words.iter().for_each(|word| assert!(line.contains(word), "{word}: {line}"));
        assert!(!line.contains("hf_"), "{line}");
    };
    says(&with(&[]), &["hf://org/model1", "it is private", "set HF_TOKEN"]);
    says(&with(&[("HF_TOKEN", "hf_wrong")]), &["this token may not read it", "HF_TOKEN or"]);
    with(&[("HF_TOKEN", " hf_secret\n")]).succeeded();
    let file = remote.saved.path("token");
    std::fs::write(&file, "hf_secret\n").unwrap();
    with(&[("HF_TOKEN_PATH", &text(&file))]).succeeded();
    std::fs::create_dir_all(remote.saved.path("home")).unwrap();
    std::fs::copy(&file, remote.saved.path("home").join("token")).unwrap();
    with(&[]).succeeded();
    let log = remote.hub.log();
    assert!(log.iter().any(|r| !r.content && r.token.as_deref() == Some("hf_secret")));
    assert!(log.iter().all(|r| !r.content || r.token.is_none()), "a token went to the host of the content");
    remote.hub.protect("org/model1", "hf_other", true);
    says(&with(&[]), &["gated", "accept its terms at", "/org/model1"]);
}

#[test]
fn what_is_not_there_is_explained() {
    let remote = Remote::new();
    let bin = remote.saved.path("bin");
    std::fs::create_dir(&bin).unwrap();
    std::fs::write(bin.join("pytorch_model.bin"), b"x").unwrap();
    remote.hub.add("org/bin", &bin);
    let gguf = remote.saved.path("gguf");
    std::fs::create_dir(&gguf).unwrap();
    std::fs::write(gguf.join("model.Q4_K_M.gguf"), b"x").unwrap();
    std::fs::write(gguf.join("README.md"), b"x").unwrap();
    remote.hub.add("org/gguf", &gguf);
    let says = |args: &[&str], words: &[&str]| {
        let outcome = remote.run(args);
        let line = outcome.refusal();
        words.iter().for_each(|word| assert!(line.contains(word), "{word}: {line}"));
    };
    says(&["inspect", "hf://org/nothing"], &["hf://org/nothing", "no such model"]);
    says(&["inspect", "org/nothing"], &["not in the Hub cache", "nor can it be read from the Hub", "no such model"]);
    says(&["inspect", "hf://org/base@v9"], &["there is no revision v9"]);
    says(&["inspect", "hf://org/bin"], &["pytorch_model.bin", "not a PyTorch checkpoint"]);
    says(&["inspect", "hf://org/gguf"], &["GGUF", "safetensors"]);
    says(&["inspect", "hf://nonsense"], &["not a model of the Hub", "hf://org/name"]);
    says(&["inspect", &remote.hub.address("org/base", "no.safetensors")], &["there is no such file"]);
    says(&["inspect", "http://example.invalid/model.safetensors"], &["not encrypted", "use https://"]);
    let mut offline = remote.command();
    offline.env("HF_HUB_OFFLINE", "1").args(["inspect", "hf://org/base"]);
    let outcome = run(offline);
    let line = outcome.refusal();
    assert!(line.contains("not in the Hub cache") && line.contains("unset HF_HUB_OFFLINE"), "{line}");
    let mut nobody = remote.command();
    nobody.env("HF_ENDPOINT", "http://127.0.0.1:1").args(["inspect", "hf://org/base"]);
    let outcome = run(nobody);
    let line = outcome.error_line(1);
    assert!(line.contains("gave up after 3 attempts") && line.contains("run the same command again"), "{line}");
    let line = remote.run(&["inspect", "http://127.0.0.1:1/model.safetensors"]).error_line(1).to_owned();
    assert!(line.contains("gave up after 3 attempts"), "{line}");
    let mut nobody = remote.command();
    nobody.env("HF_ENDPOINT", "http://127.0.0.1:1").args(["inspect", "org/base"]);
    assert!(run(nobody).error_line(1).contains("nor can it be read from the Hub"));
}

#[test]
fn a_model_in_the_cache_is_not_asked_for() {
    let remote = Remote::new();
    let repository = remote.saved.path("home").join("hub/models--org--base");
    let snapshot = repository.join("snapshots").join(COMMIT);
    crate::support::files::copy_tree(&remote.saved.base, &snapshot);
    std::fs::create_dir_all(repository.join("refs")).unwrap();
    std::fs::write(repository.join("refs/main"), COMMIT).unwrap();
    remote.hub.log();
    remote.run(&["inspect", "hf://org/base"]).succeeded();
    remote.run(&["inspect", "org/base"]).succeeded();
    assert!(remote.hub.log().is_empty());
}

/// For other clients (`tests/hub.sh`): serves a family, and a gated model, until it is stopped, and writes down where.
#[test]
#[ignore = "runs until it is stopped"]
fn serve() {
    let remote = Remote::new();
    remote.hub.add("org/gated", &remote.saved.base);
    remote.hub.protect("org/gated", "hf_secret", true);
    let place = std::env::var_os("TIESMITH_HUB").expect("TIESMITH_HUB names a file for the address");
    std::fs::write(place, &remote.hub.endpoint).unwrap();
    std::thread::sleep(std::time::Duration::from_secs(600));
}
