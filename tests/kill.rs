//! Kills the program for real, at random moments, and runs the same command until it is through.
//!
//! `TIESMITH_KILLS` sets how many kills there are at least (40 unless set); from 200 on, the merges are larger. What all
//! attempts wrote is printed, beside what undisturbed runs write.

#![cfg(unix)]

#[path = "it/support/mod.rs"]
#[allow(dead_code, unused_imports)]
mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use support::family::{Family, Saved, Spec, text};
use support::files::{lasting, read_checkpoint, read_tree};
use support::oracle::Recipe;
use support::random::Random;
use support::run::{command, run};

/// Large enough for a run to take a while, in a dozen shards.
fn family(elements: usize) -> Family {
    let names = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"];
    let shapes = names.map(|name| (name, vec![elements])).to_vec();
    Spec { shapes, ..Spec::default() }.family()
}

fn merge(saved: &Saved, out: &Path, extra: &[&str]) -> Command {
    merge_telling("none", saved, out, extra)
}

/// Says on stderr how far it is, as `--progress` takes it.
fn merge_telling(progress: &str, saved: &Saved, out: &Path, extra: &[&str]) -> Command {
    let mut merge = command();
    merge.arg("merge").args(saved.inputs(&Recipe::default())).args([
        "--json",
        "--progress",
        progress,
        "--out",
        &text(out),
    ]);
    merge.args(extra).stdout(Stdio::piped()).stderr(Stdio::piped());
    merge
}

fn signal(child: &Child, name: &str) {
    // The process may have ended.
    let _ = Command::new("kill").args([name, &child.id().to_string()]).stderr(Stdio::null()).status();
}

/// Asks `child` to stop and waits until it has: within two seconds, but for the time in which this machine was too busy to run
/// even a thread that does nothing but wake up.
fn stop_soon(child: Child, name: &str, about: &str) -> Output {
    const NAP: Duration = Duration::from_millis(2);
    signal(&child, name);
    let (begin, ended) = (Instant::now(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let busy = scope.spawn(|| {
            let mut late = Duration::ZERO;
            while !ended.load(Ordering::Relaxed) {
                let nap = Instant::now();
                std::thread::sleep(NAP);
                late += nap.elapsed().saturating_sub(2 * NAP);
            }
            late
        });
        let output = child.wait_with_output().unwrap();
        let took = begin.elapsed();
        ended.store(true, Ordering::Relaxed);
        let late = busy.join().unwrap();
        assert!(took < Duration::from_secs(2) + late, "{about}: {took:?}, and the machine was busy for {late:?}");
        output
    })
}

/// Waits until `child` has ended, and tells what it has written with system calls, its report on stdout included; 0 where
/// the system does not tell.
fn written(child: &Child) -> u64 {
    let about = |what: &str| fs::read_to_string(format!("/proc/{}/{what}", child.id())).unwrap_or_default();
    // An ended process is there until its parent asks how it ended.
    while about("stat").rsplit(") ").next().is_some_and(|state| !state.is_empty() && !state.starts_with('Z')) {
        std::thread::sleep(Duration::from_millis(1));
    }
    about("io").lines().find_map(|line| line.strip_prefix("wchar: ")?.parse().ok()).unwrap_or(0)
}

/// Inode and modification time of every finished shard.
fn finished_shards(out: &Path) -> BTreeMap<String, (u64, i64, i64)> {
    let entries = fs::read_dir(out).into_iter().flatten().map(Result::unwrap);
    let shards = entries.filter(|entry| entry.file_name().to_str().unwrap().ends_with(".safetensors"));
    shards
        .map(|entry| {
            let metadata = entry.metadata().unwrap();
            let place = (metadata.ino(), metadata.mtime(), metadata.mtime_nsec());
            (entry.file_name().into_string().unwrap(), place)
        })
        .collect()
}

/// What the journal vouched for when a run began, in bytes; `None` if it did not get as far as telling.
fn vouched(stderr: &str) -> Option<u64> {
    let mut events = stderr.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let told = events.rfind(|event| event["event"] == "stage" && event["stage"] == "check")?;
    told["bytes"].as_u64()
}

/// Bytes of shards on the disk, finished or not: files are at their full length from the start, with holes.
fn on_disk(out: &Path) -> u64 {
    let entries = |dir: &Path| fs::read_dir(dir).into_iter().flatten().map(Result::unwrap).collect::<Vec<_>>();
    let is_shard = |name: &str| name.trim_end_matches(".partial").ends_with(".safetensors");
    let shards = entries(out).into_iter().chain(entries(&out.join(".tiesmith")));
    let shards = shards.filter(|entry| is_shard(&entry.file_name().to_string_lossy()));
    shards.map(|entry| entry.metadata().unwrap().blocks() * 512).sum()
}

/// What was written in vain: what the runs that were killed had written when nothing vouched for it yet.
#[derive(Default)]
struct InFlight {
    bytes: u64,
    /// Per run that was killed, until it is known what the journal vouches for: what it wrote, and what was on the disk then.
    killed: Vec<(u64, u64)>,
}

impl InFlight {
    /// Now it is known.
    fn settle(&mut self, vouched: u64) {
        for (written, on_disk) in self.killed.drain(..) {
            self.bytes += written.min(on_disk.saturating_sub(vouched));
        }
    }
}

/// Puts copies in the places of all files of a checkpoint, with their times.
fn copy_files(dir: &Path) {
    for entry in fs::read_dir(dir).unwrap() {
        let (path, copy) = (entry.as_ref().unwrap().path(), dir.join("copy"));
        fs::copy(&path, &copy).unwrap();
        let times = fs::FileTimes::new().set_modified(entry.unwrap().metadata().unwrap().modified().unwrap());
        fs::File::options().append(true).open(&copy).unwrap().set_times(times).unwrap();
        fs::rename(&copy, &path).unwrap();
    }
}

#[test]
fn killed_at_random_moments_the_output_is_the_same() {
    let wanted: u32 = std::env::var("TIESMITH_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(40);
    let larger = wanted >= 200;
    let saved = family(if larger { 1_500_000 } else { 60_000 }).save();
    let mut random = Random::new(7);
    let (mut kills, mut runs, mut resumed, mut reused) = (0, 0, 0, 0);
    // By all attempts, and by as many undisturbed runs as there were outputs.
    let (mut all_bytes, mut clean_bytes, mut in_flight) = (0, 0, InFlight::default());
    let cuts: [&[&str]; 5] = [
        &["--max-shard-size=250KB", "--threads=1"],
        &["--max-shard-size=500KB", "--threads=2", "--scope=tensor", "--trim-ties=lowest"],
        &["--threads=2", "--memory=40MB", "--trim-ties=lowest"],
        &["--max-shard-size=1MB", "--threads=1", "--memory=32MB", "--io=mmap"],
        &["--max-shard-size=500KB", "--threads=2", "--memory=40MB", "--hash-inputs"],
    ];
    for round in 0.. {
        let extra = cuts[round % cuts.len()];
        let clean = saved.path(&format!("clean{round}"));
        let begin = Instant::now();
        let mut child = merge_telling("json", &saved, &clean, extra).spawn().unwrap();
        let bytes = written(&child);
        assert!(child.wait().unwrap().success());
        let whole = begin.elapsed();
        clean_bytes += bytes;
        let out = saved.path(&format!("out{round}"));
        loop {
            if extra.contains(&"--hash-inputs") {
                // Content is the same, inodes are not.
                saved.models.iter().chain([&saved.base]).for_each(|dir| copy_files(dir));
            }
            let finished = finished_shards(&out);
            let child = merge_telling("json", &saved, &out, extra).spawn().unwrap();
            std::thread::sleep(whole.mul_f64(f64::from(random.below(1000) as u32) / 900.0));
            signal(&child, "-KILL");
            let attempt = written(&child);
            (runs, all_bytes) = (runs + 1, all_bytes + attempt);
            // No attempt does more than all of the work, and a line more in the journal for what it took over.
            assert!(attempt <= bytes + bytes / 10 + 4096, "{attempt} bytes written, {bytes} undisturbed");
            let output = child.wait_with_output().unwrap();
            let status = output.status;
            if let Some(vouched) = vouched(&String::from_utf8_lossy(&output.stderr)) {
                in_flight.settle(vouched);
            }
            // Whatever the moment: what was finished is not written again.
            for (name, place) in finished {
                assert_eq!(finished_shards(&out).get(&name), Some(&place), "{name} was written again");
            }
            if status.signal() == Some(9) {
                kills += 1;
                in_flight.killed.push((attempt, on_disk(&out)));
                let index =
                    ["model.safetensors.index.json", "model.safetensors"].iter().any(|name| out.join(name).exists());
                assert!(!index || read_checkpoint(&out) == read_checkpoint(&clean), "looks like a model");
            }
            if out.join("tiesmith.json").exists() && !out.join(".tiesmith").exists() {
                break;
            }
            if random.below(3) == 0 {
                let child = merge_telling("json", &saved, &out, extra).spawn().unwrap();
                (runs, all_bytes) = (runs + 1, all_bytes + written(&child));
                let output = child.wait_with_output().unwrap();
                if let Some(vouched) = vouched(&String::from_utf8_lossy(&output.stderr)) {
                    in_flight.settle(vouched);
                }
                if output.status.success() {
                    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
                    resumed += u32::from(report["resumed"] == true);
                    reused += report["chunks_reused"].as_u64().unwrap();
                } else {
                    let stderr = String::from_utf8_lossy(&output.stderr);
                    assert!(stderr.contains("a finished merge is already there"), "{stderr}");
                }
                break;
            }
        }
        // Whatever was killed last had done everything.
        in_flight.settle(u64::MAX);
        assert!(lasting(&out) == lasting(&clean), "round {round}");
        fs::remove_dir_all(&out).unwrap();
        fs::remove_dir_all(&clean).unwrap();
        if kills >= wanted {
            break;
        }
    }
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    let told = format!(
        "{kills} kills in {runs} runs, {resumed} of the last ones went on, with {reused} chunks; {:.1} MB written, {:.1} MB by \
         undisturbed runs, {:.1} MB in flight when a run was killed: but for these {:.3} times as much",
        megabytes(all_bytes),
        megabytes(clean_bytes),
        megabytes(in_flight.bytes),
        (all_bytes - in_flight.bytes) as f64 / clean_bytes as f64
    );
    // Not lost where tests are run without `--nocapture`.
    let _ = writeln!(std::io::stderr(), "{told}");
    assert!(all_bytes <= clean_bytes + clean_bytes / 10 + in_flight.bytes, "{told}");
    assert!(resumed > 0, "no run had anything to go on with");
}

/// How a run ended.
#[derive(Clone, Copy, PartialEq)]
enum End {
    Through,
    Killed,
    /// Another run does the same work, so that this one was refused.
    Refused,
}

/// Starts `command` and kills it after up to `most`, unless it has ended. It may fail in no other way.
fn run_or_kill(mut command: Command, random: &mut Random, most: Duration) -> End {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let until = Instant::now() + most.mul_f64(f64::from(random.below(1000) as u32) / 1000.0);
    while Instant::now() < until && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let _ = child.kill();
    let status = child.wait().unwrap();
    let mut said = String::new();
    std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut said).unwrap();
    match (status.code(), status.signal()) {
        (Some(0), _) => End::Through,
        (_, Some(9)) => End::Killed,
        (Some(1), _) if said.contains("in use by ") => End::Refused,
        _ => panic!("{status}: {said}"),
    }
}

#[test]
fn parts_that_are_run_twice_at_once_killed_and_requeued_give_the_same_output() {
    let saved = family(60_000).save();
    let mut random = Random::new(17);
    let (mut kills, mut refusals) = (0, 0);
    for (round, flags) in [
        &["--max-shard-size=250KB", "--memory=40MB", "--trim-ties=lowest"][..],
        &["--max-shard-size=250KB", "--scope=tensor", "--zero-sum=majority"],
        &["--max-shard-size=500KB", "--memory=36MB"],
    ]
    .into_iter()
    .enumerate()
    {
        let (out, job) = (saved.path(&format!("parts{round}")), text(&saved.path(&format!("job{round}"))));
        let clean = saved.path(&format!("whole{round}"));
        assert!(merge(&saved, &clean, flags).status().unwrap().success());
        let inputs = saved.inputs(&Recipe::default());
        let mut plan = command();
        plan.arg("plan").args(inputs).args(["--out", &text(&out), "--save", &job]).args(flags);
        assert_eq!(run(plan).code, Some(0));
        let part = |number: usize| {
            let mut part = command();
            part.args(["run", &job, "--progress=none", "--threads=1", "--part", &format!("{number}/3")]);
            part
        };
        let mut left = vec![1, 2, 3];
        for attempt in 0.. {
            assert!(attempt < 60, "parts {left:?} do not get through");
            // Each part that is left runs twice at once, as where a scheduler takes a node for dead that is not: one of
            // them does the work.
            let most = Duration::from_millis(if attempt < 8 { 30 * (attempt + 1) } else { 20_000 });
            let seeds: Vec<(usize, u64)> =
                left.iter().flat_map(|&part| [part, part]).map(|part| (part, random.below(1 << 30) as u64)).collect();
            let ends: Vec<(usize, End)> = std::thread::scope(|scope| {
                let run = |(number, seed): (usize, u64)| {
                    let command = part(number);
                    scope.spawn(move || (number, run_or_kill(command, &mut Random::new(seed), most)))
                };
                let running: Vec<_> = seeds.into_iter().map(run).collect();
                running.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let count = |end: End| ends.iter().filter(|(_, e)| *e == end).count();
            (kills, refusals) = (kills + count(End::Killed), refusals + count(End::Refused));
            left.retain(|part| !ends.contains(&(*part, End::Through)));
            if left.is_empty() {
                break;
            }
            let mut finish = command();
            finish.args(["finish", &job, "--progress=none"]);
            let refused = run(finish);
            if refused.code == Some(0) {
                // What was killed had done its work already.
                break;
            }
            assert!(matches!(refused.code, Some(1 | 2)), "{}", refused.stderr);
            assert!(!out.join("model.safetensors.index.json").exists() && !out.join("tiesmith.json").exists());
        }
        for attempt in 1.. {
            let mut finish = command();
            finish.args(["finish", &job, "--progress=none"]);
            match run_or_kill(finish, &mut random, Duration::from_millis(60) * attempt) {
                End::Through => break,
                End::Killed => kills += 1,
                End::Refused => panic!("nothing else runs"),
            }
        }
        assert_eq!(read_checkpoint(&out), read_checkpoint(&clean), "{flags:?}");
        let names = |dir: &Path| read_tree(dir).into_keys().collect::<Vec<_>>();
        assert_eq!(names(&out), names(&clean));
    }
    assert!(kills > 3, "only {kills} kills, {refusals} refusals");
}

#[test]
fn remote_inputs_and_shards_that_are_taken_away_survive_kills() {
    let saved = family(60_000).save();
    let hub = support::hub::Hub::start();
    hub.slow_down(Duration::from_millis(10));
    hub.add("org/base", &saved.base);
    (1..).zip(&saved.models).for_each(|(number, model)| hub.add(&format!("org/model{number}"), model));
    let mut random = Random::new(23);
    let mut kills = 0;
    for (round, flags) in [
        &["--max-shard-size=250KB", "--memory=56MB"][..],
        &["--max-shard-size=250KB", "--scope=tensor", "--threads=2"],
        &["--max-shard-size=500KB", "--threads=1", "--trim-ties=lowest"],
    ]
    .into_iter()
    .enumerate()
    {
        let (clean, out, away) = (
            saved.path(&format!("local{round}")),
            saved.path(&format!("far{round}")),
            saved.path(&format!("away{round}")),
        );
        assert!(merge(&saved, &clean, flags).status().unwrap().success());
        fs::create_dir(&away).unwrap();
        // What is there under its name is whole: a kill may come in the middle of the copy.
        let away_text = text(&away);
        let take =
            format!("cp {{}} {away_text}/part && mv {away_text}/part {away_text}/$TIESMITH_SHARD_NAME && rm -f {{}}");
        let far = || {
            let mut far = command();
            far.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", &hub.endpoint).env("HF_HOME", saved.path("home"));
            far.args([
                "merge",
                "--progress=none",
                "--base",
                "hf://org/base",
                "--out",
                &text(&out),
                "--on-shard",
                &take,
            ]);
            for number in 1..=saved.models.len() {
                far.args(["--model", &format!("hf://org/model{number}")]);
            }
            far.args(flags);
            far
        };
        for attempt in 0.. {
            assert!(attempt < 60);
            let most = Duration::from_millis(if attempt < 8 { 800 } else { 60_000 });
            match run_or_kill(far(), &mut random, most) {
                End::Through => break,
                End::Killed => kills += 1,
                End::Refused => panic!("nothing else runs"),
            }
            // The command outlives the kill, and must be through before it runs again.
            std::thread::sleep(Duration::from_millis(100));
        }
        let shards = |dir: &Path| {
            let mut files = read_tree(dir);
            files.retain(|name, _| name.extension().is_some_and(|e| e == "safetensors"));
            files
        };
        assert_eq!(shards(&away), shards(&clean), "{flags:?}");
        assert!(shards(&out).is_empty() && out.join("model.safetensors.index.json").exists());
    }
    assert!(kills > 10, "only {kills} kills");
}

#[test]
fn killed_inside_one_of_several_documents_the_recipe_goes_on_where_it_was() {
    let saved = family(60_000).save();
    let place = saved.path(".");
    let names: Vec<String> = [&saved.base, &saved.models[0], &saved.models[1]].map(|path| text(path)).into();
    let [base, a, b] = &names[..] else { unreachable!() };
    let ties = |name: &str, models: [&str; 2]| {
        let list =
            models.map(|model| format!("- {{model: {model}, parameters: {{weight: 1, density: 0.3}}}}\n")).concat();
        format!("---\n{name}merge_method: ties\nbase_model: {base}\nmodels:\n{list}")
    };
    let recipe = ties("name: one\n", [a, b]) + &ties("name: two\n", ["one", b]) + &ties("", ["one", "two"]);
    fs::write(place.join("recipe.yml"), recipe).unwrap();
    let merge = |out: &str| {
        let mut merge = command();
        merge.current_dir(&place).args([
            "merge",
            "recipe.yml",
            "--progress=none",
            "--threads=1",
            "--memory=40MB",
            "--out",
            out,
        ]);
        merge.args(["--max-shard-size=500KB"]).stdout(Stdio::null()).stderr(Stdio::null());
        merge
    };
    let begin = Instant::now();
    assert!(merge("clean").status().unwrap().success());
    let whole = begin.elapsed();
    let mut random = Random::new(3);
    let mut inside = [0; 3];
    for round in 0..12 {
        let out = format!("out{round}");
        for _ in 0..3 {
            let mut child = merge(&out).spawn().unwrap();
            std::thread::sleep(whole.mul_f64(f64::from(random.below(1000) as u32) / 1000.0));
            signal(&child, "-KILL");
            child.wait().unwrap();
            // Which document was being made.
            let parts = place.join(format!("{out}.parts"));
            let making = [parts.join("one"), parts.join("two"), place.join(&out)];
            inside.iter_mut().zip(&making).for_each(|(count, dir)| *count += u32::from(dir.join(".tiesmith").exists()));
        }
        // The last kill may have come too late.
        let finished = place.join(&out).join("tiesmith.json").exists();
        assert!(merge(&out).status().unwrap().success() || finished);
        for (made, clean) in
            [("out{}.parts/one", "clean.parts/one"), ("out{}.parts/two", "clean.parts/two"), ("out{}", "clean")]
        {
            let made = made.replace("{}", &round.to_string());
            assert!(read_checkpoint(&place.join(&made)) == read_checkpoint(&place.join(clean)), "{made}");
            assert!(!place.join(&made).join(".tiesmith").exists(), "{made}");
        }
    }
    assert!(inside.iter().all(|&count| count > 0), "kills inside each document: {inside:?}");
}

#[test]
fn signals_stop_a_run_soon_and_the_same_command_goes_on() {
    let saved = family(400_000).save();
    let clean = saved.path("clean");
    let extra = ["--threads=1", "--scope=tensor", "--max-shard-size=4MB"];
    assert!(merge(&saved, &clean, &extra).status().unwrap().success());
    for (name, code) in [("-INT", 130), ("-TERM", 143), ("-HUP", 129)] {
        let out = saved.path("out");
        let child = merge(&saved, &out, &extra).spawn().unwrap();
        // As soon as the first shard is finished.
        while finished_shards(&out).is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let output = stop_soon(child, name, name);
        let stderr = String::from_utf8(output.stderr).unwrap();
        if output.status.success() {
            eprintln!("skipped: the run was over before {name} arrived");
        } else {
            assert_eq!(output.status.code(), Some(code), "{stderr}");
            assert_eq!(stderr.lines().count(), 1, "{stderr}");
            assert!(stderr.starts_with("error: ") && stderr.contains("run the same command again"), "{stderr}");
            let finished = finished_shards(&out);
            let report = run(merge(&saved, &out, &extra)).succeeded().json();
            assert!(report["resumed"] == true && report["chunks_reused"].as_u64() > Some(0), "{report}");
            let after = finished_shards(&out);
            assert!(finished.iter().all(|(name, place)| after[name] == *place), "a finished shard was written again");
        }
        assert!(lasting(&out) == lasting(&clean), "{name}");
        fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn packing_that_is_killed_or_stopped_goes_on_and_gives_the_same_file() {
    let saved = family(400_000).save();
    let mut random = Random::new(23);
    let (mut kills, mut stops, mut resumed, mut reused) = (0, 0, 0, 0);
    for (round, flags) in
        [&["--density=1"][..], &["--density=0.2"], &["--density=0.3", "--trim-ties=lowest"]].into_iter().enumerate()
    {
        let pack = |out: &Path| {
            let mut pack = command();
            pack.args(["pack", &text(&saved.models[0]), "--base", &text(&saved.base), "--out", &text(out), "--json"]);
            pack.args(["--progress=none", "--threads=1"]).args(flags);
            pack
        };
        let clean = saved.path(&format!("clean{round}.tvz"));
        let begin = Instant::now();
        let undisturbed = run(pack(&clean)).succeeded().json();
        let most = begin.elapsed();
        let out = saved.path(&format!("packed{round}/one.tvz"));
        for file in 0..8 {
            let _ = fs::remove_dir_all(out.parent().unwrap());
            for attempt in 0.. {
                assert!(attempt < 200, "{flags:?} does not get through");
                let mut child = pack(&out).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
                let most = most.mul_f64(if attempt < 20 { 1.0 } else { 4.0 });
                let until = Instant::now() + most.mul_f64(f64::from(random.below(1000) as u32) / 1000.0);
                while Instant::now() < until && child.try_wait().unwrap().is_none() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                signal(&child, if (file + attempt) % 2 == 0 { "-TERM" } else { "-KILL" });
                let output = child.wait_with_output().unwrap();
                let stderr = String::from_utf8(output.stderr).unwrap();
                match (output.status.code(), output.status.signal()) {
                    (Some(0), _) => {
                        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
                        resumed += u64::from(report["resumed"] == true);
                        reused += report["chunks_reused"].as_u64().unwrap();
                        assert_eq!(report["bytes_read"], undisturbed["bytes_read"], "{flags:?}");
                        break;
                    }
                    (_, Some(9)) => kills += 1,
                    (Some(143), _) => {
                        assert!(stderr.contains("run the same command again to go on"), "{stderr}");
                        stops += 1;
                    }
                    // It was through when it was killed, but for the signal.
                    (Some(2), _) if stderr.contains("already there") => break,
                    // Before it heeds signals.
                    (_, Some(15)) => {}
                    _ => panic!("{}: {stderr}", output.status),
                }
                assert!(!out.exists() || fs::read(&out).unwrap() == fs::read(&clean).unwrap(), "{flags:?}");
            }
            assert!(fs::read(&out).unwrap() == fs::read(&clean).unwrap(), "{flags:?}");
        }
    }
    eprintln!("{kills} kills and {stops} stops of packing; {resumed} runs took work over, {reused} chunks");
    assert!(kills > 0 && stops > 0 && resumed > 0, "{kills} kills, {stops} stops, {resumed} resumed");
}

/// Factors of a large matrix are not looked away from.
#[test]
fn long_computations_do_not_hold_up_a_run_that_is_to_stop() {
    use std::os::unix::fs::FileExt as _;

    const N: u64 = 6000;
    let dir = tempfile::tempdir().unwrap();
    let create = |name: &str, rows: u64| {
        let bytes = 4 * rows * N;
        let header = format!(r#"{{"w.weight":{{"dtype":"F32","shape":[{rows},{N}],"data_offsets":[0,{bytes}]}}}}"#);
        let path = dir.path().join(name);
        let file = fs::File::create(&path).unwrap();
        file.write_all_at(&[&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat(), 0).unwrap();
        file.set_len(8 + header.len() as u64 + bytes).unwrap();
        (file, 8 + header.len() as u64, path)
    };
    let [base, one, two] = ["base", "one", "two"].map(|name| create(&format!("{name}.safetensors"), 8).2);
    let (gram, start, gram_path) = create("gram.safetensors", N);
    (0..N).for_each(|i| gram.write_all_at(&1f32.to_le_bytes(), start + 4 * i * (N + 1)).unwrap());
    let mut merge = Command::new(env!("CARGO_BIN_EXE_tiesmith"));
    merge.args(["merge", "--method=regmean", "--memory=2GiB", "--threads=1", "--progress=none", "--out"]);
    merge.arg(dir.path().join("out")).arg("--base").arg(base);
    for (model, gram) in [(one, &gram_path), (two, &gram_path)] {
        merge.arg("--model").arg(model).arg("--gram").arg(gram);
    }
    let child = merge.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    let output = stop_soon(child, "-TERM", "regmean");
    let stderr = String::from_utf8(output.stderr).unwrap();
    if output.status.success() {
        eprintln!("skipped: the run was over before the signal arrived");
        return;
    }
    assert_eq!((output.status.code(), stderr.lines().count()), (Some(143), 1), "{stderr}");
    assert!(stderr.contains("run the same command again"), "{stderr}");
}

#[test]
fn a_command_that_has_a_shard_does_not_hold_up_a_run_that_is_to_stop() {
    let saved = family(60_000).save();
    let (clean, out) = (saved.path("clean"), saved.path("out"));
    let extra = ["--threads=1", "--scope=tensor", "--max-shard-size=500KB"];
    assert!(merge(&saved, &clean, &extra).status().unwrap().success());
    let started = saved.path("started");
    for command in ["sleep 30", "trap '' TERM; sleep 30 & wait; wait", "sleep 30 & exec sleep 30"] {
        let on_shard = format!("--on-shard=touch '{}'; {command}", started.display());
        let child = merge(&saved, &out, &[&extra[..], &[&*on_shard]].concat()).spawn().unwrap();
        while !started.exists() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let output = stop_soon(child, "-TERM", command);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(143), "{command}: {stderr}");
        assert!(stderr.lines().count() == 1 && stderr.contains("run the same command again"), "{command}: {stderr}");
        fs::remove_file(&started).unwrap();
    }
    let log = saved.path("log");
    let on_shard = format!("--on-shard=echo {{}} >> '{}'", log.display());
    run(merge(&saved, &out, &[&extra[..], &[&*on_shard]].concat())).succeeded();
    assert!(read_checkpoint(&out) == read_checkpoint(&clean));
    assert_eq!(fs::read_to_string(log).unwrap().lines().count(), finished_shards(&out).len());
}

/// Runs a shell script that has the program and its arguments as `"$@"`.
fn shell(script: &str, merge: &Command) -> ExitStatus {
    let mut shell = Command::new("sh");
    shell.args(["-c", script, "sh"]).arg(merge.get_program()).args(merge.get_args());
    shell.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap()
}

/// The job script of `docs/guide.md`, as it stands there.
fn job_of_the_guide() -> String {
    let guide = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/guide.md")).unwrap();
    let (_, script) = guide.split_once("```sh\n#!/bin/sh\n#SBATCH").expect("a job script");
    format!("#!/bin/sh\n#SBATCH{}", script.split_once("```").unwrap().0)
}

#[test]
fn the_guides_job_gets_through_however_often_it_is_preempted() {
    let saved = family(250_000).save();
    for (name, ckpt) in [("llama", &saved.base), ("chat", &saved.models[0]), ("code", &saved.models[1])] {
        std::os::unix::fs::symlink(ckpt, saved.path(name)).unwrap();
    }
    // What a cluster has: the scheduler's command, and the program in the path.
    let bin = saved.path("bin");
    fs::create_dir(&bin).unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_tiesmith"));
    std::os::unix::fs::symlink(program, bin.join("tiesmith")).unwrap();
    fs::write(bin.join("scontrol"), "#!/bin/sh\necho \"$@\" >> requeued\n").unwrap();
    let script = job_of_the_guide();
    fs::write(saved.path("job.sh"), &script).unwrap();
    let run_in = |limit: &str, more: &str| {
        let mut shell = Command::new("sh");
        let line = format!(
            "chmod +x bin/scontrol; PATH=$PWD/bin:$PATH SLURM_JOB_ID=7; export PATH SLURM_JOB_ID; {limit} {more}"
        );
        shell.current_dir(saved.dir.path()).args(["-c", &line]).stdout(Stdio::null()).stderr(Stdio::null());
        shell.status().unwrap().code()
    };
    let arguments = "tiesmith merge --base llama --model chat --model code --progress none --out";
    assert!(script.contains("tiesmith merge --base llama --model chat --model code --out merged"), "{script}");
    let begin = Instant::now();
    assert_eq!(run_in("", &format!("{arguments} clean")), Some(0));
    let mut slot = begin.elapsed().mul_f64(0.4);
    let mut preempted = 0;
    let code = loop {
        let limit = format!("timeout -s TERM {:.3}", slot.as_secs_f64());
        match run_in(&limit, "sh job.sh") {
            Some(0) => break 0,
            // `timeout` reports 124 where the job ended because of it.
            Some(124 | 143) => preempted += 1,
            other => panic!("{other:?} after {preempted} preemptions"),
        }
        // Attempts that are too short for any progress at all would go on for ever.
        slot = slot.mul_f64(1.1);
        assert!(preempted < 100);
    };
    println!("{preempted} preemptions");
    assert_eq!(code, 0);
    assert!(lasting(&saved.path("merged")) == lasting(&saved.path("clean")));
    assert!(preempted == 0 || fs::read_to_string(saved.path("requeued")).unwrap().contains("requeue 7"));
    assert_eq!(run_in("", "sh job.sh"), Some(0), "what is done stays done");
}

#[test]
fn ignored_signals_stay_ignored() {
    let saved = family(100_000).save();
    let out = saved.path("out");
    let merge = merge(&saved, &out, &["--threads=1"]);
    let status = shell(
        r#"trap "" HUP INT; "$@" & p=$!; while kill -HUP $p && kill -INT $p; do sleep 0.01; done 2>/dev/null; wait $p"#,
        &merge,
    );
    assert!(status.success(), "{status}");
}

#[test]
fn closed_or_full_standard_streams_never_disturb_the_work() {
    let saved = family(1_000).save();
    for (script, code) in [
        (r#""$@" >&-"#, 0),
        (r#""$@" 2>&-"#, 0),
        (r#""$@" >&- 2>&- <&-"#, 0),
        (r#"("$@"; echo $? >&3) 3>&1 | true"#, 0),
        (r#""$@" --progress=plain 2>/dev/full"#, 0),
        (r#""$@" --progress=json 2>&-"#, 0),
        (r#""$@" >/dev/full"#, 1),
    ] {
        let out = saved.path("out");
        let status = shell(script, &merge(&saved, &out, &[]));
        assert_eq!(status.code(), Some(code), "{script}");
        assert!(out.join("tiesmith.json").exists() && !out.join(".tiesmith").exists(), "{script}");
        fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn a_file_size_limit_is_an_error_that_can_be_resumed() {
    let saved = family(60_000).save();
    let (clean, out) = (saved.path("clean"), saved.path("out"));
    assert!(merge(&saved, &clean, &[]).status().unwrap().success());
    // In blocks of 512 bytes or 1 KiB, as shells please.
    let status = shell(r#"ulimit -f 1000; "$@""#, &merge(&saved, &out, &[]));
    assert_eq!(status.code(), Some(1), "{status}");
    run(merge(&saved, &out, &[])).succeeded();
    assert!(lasting(&out) == lasting(&clean));
}

#[test]
#[cfg(target_os = "linux")]
fn an_input_that_changes_during_the_run_is_an_error_that_names_it_however_it_is_read() {
    type Change = fn(&Path, &mut Random);
    let changes: [(&str, Change); 4] = [
        ("cut off", |input, random| {
            let kept = 1 << (12 + random.below(11));
            fs::File::options().write(true).open(input).unwrap().set_len(kept).unwrap();
        }),
        ("overwritten", |input, random| {
            use std::os::unix::fs::FileExt as _;
            let at = 4096 + random.below(1 << 20) as u64;
            fs::File::options().write(true).open(input).unwrap().write_all_at(&[1; 4096], at).unwrap();
        }),
        ("replaced", |input, _| {
            let other = input.with_extension("other");
            fs::copy(input, &other).unwrap();
            fs::rename(other, input).unwrap();
        }),
        ("removed", |input, _| fs::remove_file(input).unwrap()),
    ];
    let original = family(300_000).save();
    let mut random = Random::new(3);
    let mut noticed = BTreeMap::new();
    for round in 0..24 {
        let io = ["--io=mmap", "--io=read"][round % 2];
        let (what, change) = changes[round / 2 % changes.len()];
        let saved = family_of(&original);
        let out = saved.path("out");
        let child =
            merge(&saved, &out, &["--threads=2", "--scope=tensor", "--max-shard-size=2MB", io]).spawn().unwrap();
        while !out.join(".tiesmith/journal").exists() {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(random.below(100) as u64));
        let input = saved.models[0].join("model.safetensors");
        change(&input, &mut random);
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.signal(), None, "{what}, {io}: ended by a signal\n{stderr}");
        if output.status.success() {
            eprintln!("skipped: the run was over before the input was {what}");
            continue;
        }
        assert_eq!(output.status.code(), Some(1), "{what}, {io}: {stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains("model1") && stderr.lines().count() == 1, "{stderr}");
        assert!(!out.join("model.safetensors.index.json").exists(), "{what}, {io}: looks like a model");
        *noticed.entry(what).or_insert(0) += 1;
    }
    assert!(noticed.len() >= 3, "hardly any change came in time: {noticed:?}");
}

/// The same family once more, to be spoiled.
#[cfg(target_os = "linux")]
fn family_of(original: &Saved) -> Saved {
    let dir = tempfile::tempdir().unwrap();
    let place = |path: &Path| {
        let copy = dir.path().join(path.file_name().unwrap());
        support::files::copy_tree(path, &copy);
        copy
    };
    Saved {
        base: place(&original.base),
        models: original.models.iter().map(|model| place(model)).collect(),
        signs: place(&original.signs),
        dir,
    }
}
