//! A merge in parts gives the bytes of a merge in one piece, whatever the parts, their order and their accidents.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use crate::support::family::{Deltas, Family, Saved, Spec, text};
use crate::support::files::{lasting, read_tree};
use crate::support::oracle::{Method, Recipe, Scope, TrimTies, ZeroSum};
use crate::support::random::Random;
use crate::support::run::{Outcome, command, run, tiesmith};
use crate::support::tensor::Tensor;

/// A planned merge in a directory of its own.
struct Job {
    dir: tempfile::TempDir,
    out: PathBuf,
    file: PathBuf,
}

impl Job {
    fn plan(saved: &Saved, recipe: &Recipe, flags: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (out, file) = (dir.path().join("merged"), dir.path().join("job.plan"));
        let (out_text, file_text) = (text(&out), text(&file));
        let all = [&["--out", &out_text, "--save", &file_text], flags].concat();
        saved.run("plan", recipe, &all).succeeded();
        assert!(!out.exists(), "planning writes nothing but the plan");
        Self { dir, out, file }
    }

    fn run(&self, part: &str, extra: &[&str]) -> Outcome {
        let file = text(&self.file);
        let args = [&["run", &file, "--progress=none", "--json", "--part", part], extra].concat();
        tiesmith(args)
    }

    fn finish(&self) -> Outcome {
        tiesmith(["finish", &text(&self.file), "--progress=none", "--json"])
    }

    fn parts(&self) -> PathBuf {
        self.out.join(".tiesmith/parts")
    }
}

#[track_caller]
fn must_be_alike(one: &Path, other: &Path, what: &str) {
    let (one, other) = (lasting(one), lasting(other));
    let differing: Vec<_> = one.keys().chain(other.keys()).filter(|path| one.get(*path) != other.get(*path)).collect();
    assert!(differing.is_empty(), "{what}: {differing:?} differ");
}

/// Tensors of very different scales in several shards, so that a probe has something to be wrong about, with ties.
fn family(deltas: Deltas) -> Family {
    let spec = Spec {
        seed: 11,
        shapes: vec![
            ("a", vec![300, 257]),
            ("b", vec![70_001]),
            ("c", vec![3]),
            ("d", vec![]),
            ("e", vec![0, 5]),
            ("f", vec![90_000]),
            ("b.bias", vec![40_000]),
        ],
        base: Dtype::BF16,
        models: vec![Dtype::BF16, Dtype::F32, Dtype::BF16],
        deltas,
    };
    spec.family()
}

fn recipes() -> Vec<(Recipe, &'static [&'static str])> {
    let ties = Recipe::default();
    vec![
        (ties.clone(), &[]),
        (Recipe { trim_ties: TrimTies::Lowest, ..ties.clone() }, &[]),
        (Recipe { trim_ties: TrimTies::Lowest, zero_sum: ZeroSum::Majority, ..ties.clone() }, &["--exclude=b"]),
        (Recipe { zero_sum: ZeroSum::Majority, ..ties.clone() }, &["--density=1"]),
        (ties.clone(), &["--trim-ties=sample", "--seed=7"]),
        (ties.clone(), &["--threshold=sketch"]),
        (Recipe { scope: Scope::Tensor, trim_ties: TrimTies::Lowest, ..ties.clone() }, &[]),
        (Recipe { method: Method::TaskArithmetic, ..ties.clone() }, &[]),
        (Recipe { method: Method::Linear, ..ties }, &[]),
    ]
}

#[test]
fn any_number_of_parts_in_any_order_gives_the_same_bytes() {
    let mut random = Random::new(3);
    for deltas in [Deltas::Stepped, Deltas::HeavyTailed] {
        let saved = family(deltas).save();
        for (recipe, flags) in recipes() {
            let flags = [flags, &["--max-shard-size=100KB", "--memory=64MB"]].concat();
            let whole = saved.merge(&recipe, &flags);
            for parts in [1, 2 + random.below(6), 7] {
                let job = Job::plan(&saved, &recipe, &flags);
                let mut order: Vec<usize> = (1..=parts).collect();
                random.shuffle(&mut order);
                let stages: &[&[&str]] =
                    if random.below(2) == 0 { &[&[]] } else { &[&["--stage=sketch"], &["--stage=merge"]] };
                for stage in stages {
                    for part in &order {
                        let threads = format!("--threads={}", 1 + random.below(3));
                        job.run(&format!("{part}/{parts}"), &[stage, &[&*threads][..]].concat()).succeeded();
                    }
                }
                let report = job.finish().succeeded().json();
                let what = format!("{} in {parts} parts, order {order:?}, {stages:?}", whole.outcome.command);
                must_be_alike(&whole.path, &job.out, &what);
                for field in ["kept_fraction", "sign_conflict_fraction", "elements", "bytes_written", "warnings"] {
                    assert_eq!(report[field], whole.report[field], "{field}: {what}");
                }
                assert!(!job.out.join(".tiesmith").exists(), "{what}");
                tiesmith(["verify", &text(&job.out)]).succeeded();
            }
        }
    }
}

#[test]
fn a_bracket_that_misses_costs_another_look_and_no_byte() {
    let shapes = vec![("a", vec![1_310_720]), ("b", vec![1_000])];
    let mut family = Spec { shapes, models: vec![Dtype::F32; 2], ..Spec::default() }.family();
    // Where the probe looks, task vectors are a thousandth of what they are elsewhere.
    let (base, stride) = (family.base["a"].f32s(), 1_311_720 * 4_096 / 131_072);
    for model in &mut family.models {
        let tuned = model["a"].f32s();
        let scale = |at: usize| if at % stride < 4_096 { 1e-3 } else { 1.0 };
        let values: Vec<f32> = (0..tuned.len()).map(|at| base[at] + (tuned[at] - base[at]) * scale(at)).collect();
        model.insert("a".into(), Tensor::floats(Dtype::F32, &[values.len()], &values));
    }
    let saved = family.save();
    let recipe = Recipe { trim_ties: TrimTies::Lowest, ..Recipe::default() };
    let flags = ["--max-shard-size=5MB", "--memory=64MB", "--threads=1"];
    let whole = saved.merge(&recipe, &flags);
    for stages in [&[&[][..]][..], &[&["--stage=sketch"][..], &["--stage=merge"]]] {
        let job = Job::plan(&saved, &recipe, &flags);
        for stage in stages {
            for part in ["2/2", "1/2"] {
                job.run(part, stage).succeeded();
            }
        }
        assert!(job.parts().join("sketch2-00001-of-00002").exists(), "no bracket missed: nothing was tried");
        job.finish().succeeded();
        must_be_alike(&whole.path, &job.out, "another look");
    }
}

#[test]
fn parts_at_the_same_time_share_the_looks() {
    let saved = family(Deltas::Stepped).save();
    let recipe = Recipe { trim_ties: TrimTies::Lowest, zero_sum: ZeroSum::Majority, ..Recipe::default() };
    let flags = ["--max-shard-size=100KB", "--memory=64MB", "--threads=1"];
    let whole = saved.merge(&recipe, &flags);
    let job = Job::plan(&saved, &recipe, &flags);
    let parts: Vec<_> = (1..=4)
        .map(|part| {
            let mut command = command();
            command.args(["run", &text(&job.file), "--progress=none", "--part", &format!("{part}/4")]);
            command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for part in parts {
        let output = part.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let read = job.finish().succeeded().json()["bytes_read"].as_u64().unwrap();
    must_be_alike(&whole.path, &job.out, "four at once");
    // Probe, sketch, ties, votes and merge: each input byte at most five times, and nothing done twice.
    let inputs: u64 = 2 * 3 * 277_104 + 4 * 277_104;
    assert!(read <= 5 * inputs, "{read} of {inputs}");
}

#[test]
fn a_part_waits_for_its_own_sketch_if_another_part_is_at_work_on_it() {
    let saved = family(Deltas::Stepped).save();
    let recipe = Recipe { trim_ties: TrimTies::Lowest, ..Recipe::default() };
    let flags = ["--max-shard-size=100KB", "--memory=64MB", "--threads=1"];
    let whole = saved.merge(&recipe, &flags);
    let job = Job::plan(&saved, &recipe, &flags);
    fs::create_dir_all(job.parts()).unwrap();
    // What another part does that began earlier.
    let lock = fs::File::create(job.parts().join("sketch-00002-of-00002.lock")).unwrap();
    lock.lock().unwrap();
    let mut command = command();
    command.args(["run", &text(&job.file), "--progress=none", "--part=2/2"]);
    let command = command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut late = command.spawn().unwrap();
    let begin = std::time::Instant::now();
    while begin.elapsed().as_millis() < 1_000 && late.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    drop(lock);
    let output = late.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    job.run("1/2", &[]).succeeded();
    job.finish().succeeded();
    must_be_alike(&whole.path, &job.out, "one waited");
}

#[test]
fn a_part_that_is_done_is_not_done_again() {
    let saved = family(Deltas::Stepped).save();
    let recipe = Recipe::default();
    let job = Job::plan(&saved, &recipe, &["--max-shard-size=100KB"]);
    let first = job.run("2/3", &[]).succeeded().json();
    assert_eq!((&first["done_before"], &first["merged"]), (&false.into(), &true.into()));
    let modified = |job: &Job| {
        let tree = fs::read_dir(job.out.join(".tiesmith")).unwrap().map(|e| e.unwrap());
        let shards = tree.filter(|e| e.path().extension().is_some_and(|e| e == "partial"));
        shards.map(|e| (e.path(), e.metadata().unwrap().modified().unwrap())).collect::<BTreeMap<_, _>>()
    };
    let before = modified(&job);
    assert!(!before.is_empty());
    let second = job.run("2/3", &[]).succeeded().json();
    assert_eq!((&second["done_before"], &second["bytes_read"]), (&true.into(), &0.into()));
    assert_eq!(before, modified(&job));
    // A shard that is lost is made again.
    fs::remove_file(before.keys().next().unwrap()).unwrap();
    assert!(job.finish().error_line(1).contains("not done yet: parts 1, 2, 3 of 3"));
    let third = job.run("2/3", &[]).succeeded().json();
    assert_eq!(third["done_before"], false);
    for part in ["1/3", "3/3"] {
        job.run(part, &[]).succeeded();
    }
    job.finish().succeeded();
    must_be_alike(&saved.merge(&recipe, &["--max-shard-size=100KB"]).path, &job.out, "a shard made again");
    // Whoever comes late finds that all is done.
    assert_eq!(job.run("1/3", &[]).succeeded().json()["done_before"], true);
    job.finish().succeeded();
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let saved = family(Deltas::Stepped).save();
    let flags = ["--max-shard-size=100KB"];
    let job = Job::plan(&saved, &Recipe::default(), &flags);
    let says =
        |line: &str, words: &[&str]| words.iter().for_each(|word| assert!(line.contains(word), "{word}: {line}"));
    says(job.run("4/3", &[]).refusal(), &["there is no part 4 of 3", "from 1 to 3"]);
    says(job.run("auto", &[]).refusal(), &["no scheduler", "--part 2/8"]);
    says(job.finish().refusal(), &["no part of this merge was run yet"]);
    assert!(!job.out.exists(), "a refusal writes nothing");
    says(
        job.run("2/3", &["--stage=merge"]).error_line(1),
        &["not sketched yet: parts 1, 2, 3 of 3", "--stage sketch --part 1/3"],
    );
    job.run("1/3", &[]).succeeded();
    says(job.run("1/2", &[]).refusal(), &["begun in 3 parts, not in 2", "--part I/3"]);
    says(job.finish().error_line(1), &["not done yet: parts 2, 3 of 3", "--part 2/3"]);
    assert!(!job.out.join("model.safetensors.index.json").exists());
    // Another plan for the same output.
    let other = job.dir.path().join("other.plan");
    let (out, file) = (text(&job.out), text(&other));
    let planned = [&["--density=0.5", "--out", &out, "--save", &file][..], &flags].concat();
    saved.run("plan", &Recipe::default(), &planned).succeeded();
    let line = tiesmith(["run", &file, "--progress=none", "--part=2/3"]);
    says(line.refusal(), &["belongs to another plan", "another --out"]);
    // A merge in one piece.
    let line = saved.run("merge", &Recipe::default(), &[&["--out", &out, "--progress=none"][..], &flags].concat());
    says(line.refusal(), &["a merge in parts is under way", "tiesmith finish"]);
    let line = saved.run(
        "merge",
        &Recipe::default(),
        &[&["--restart", "--out", &out, "--progress=none"][..], &flags].concat(),
    );
    says(line.refusal(), &["a merge in parts is under way"]);
    for part in ["2/3", "3/3"] {
        job.run(part, &[]).succeeded();
    }
    job.finish().succeeded();
    must_be_alike(&saved.merge(&Recipe::default(), &flags).path, &job.out, "after all refusals");
}

#[test]
fn changed_inputs_and_recipes_are_refused() {
    let saved = family(Deltas::Stepped).save();
    let job = Job::plan(&saved, &Recipe::default(), &[]);
    job.run("1/1", &["--stage=sketch"]).succeeded();
    let file = saved.models[0].join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes).unwrap();
    let outcome = job.run("1/1", &[]);
    let line = outcome.refusal();
    assert!(line.contains("modification time is another") && line.contains("model.safetensors"), "{line}");
    let outcome = job.finish();
    assert!(outcome.refusal().contains("modification time is another"));
}

#[test]
fn copies_with_the_same_times_are_the_same_inputs() {
    let saved = family(Deltas::Stepped).save();
    let job = Job::plan(&saved, &Recipe::default(), &["--max-shard-size=100KB"]);
    job.run("1/2", &[]).succeeded();
    // As if the second machine had a copy of its own.
    let model = &saved.models[0];
    let aside = saved.path("aside");
    fs::rename(model, &aside).unwrap();
    fs::create_dir(model).unwrap();
    for entry in fs::read_dir(&aside).unwrap().map(Result::unwrap) {
        let copy = model.join(entry.file_name());
        fs::copy(entry.path(), &copy).unwrap();
        let time = entry.metadata().unwrap().modified().unwrap();
        fs::File::options().write(true).open(&copy).unwrap().set_modified(time).unwrap();
    }
    job.run("2/2", &[]).succeeded();
    job.finish().succeeded();
    must_be_alike(&saved.merge(&Recipe::default(), &["--max-shard-size=100KB"]).path, &job.out, "copies");
}

/// Hosts whose clocks are hours apart leave files of the past and of the future.
#[test]
fn clocks_that_differ_change_nothing() {
    fn set_times(dir: &Path, time: std::time::SystemTime) {
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            match entry.file_type().unwrap().is_dir() {
                true => set_times(&entry.path(), time),
                false => fs::File::options().write(true).open(entry.path()).unwrap().set_modified(time).unwrap(),
            }
        }
    }
    let saved = family(Deltas::Stepped).save();
    let hours = |hours: u64| std::time::Duration::from_secs(3600 * hours);
    let now = std::time::SystemTime::now();
    for (recipe, flags) in recipes() {
        let flags = [flags, &["--max-shard-size=100KB"]].concat();
        let job = Job::plan(&saved, &recipe, &flags);
        let plan = fs::File::options().write(true).open(&job.file).unwrap();
        plan.set_modified(now + hours(100)).unwrap();
        for (part, time) in [("2/3", now + hours(5)), ("3/3", now - hours(7)), ("1/3", now + hours(24 * 365))] {
            job.run(part, &[]).succeeded();
            set_times(&job.out, time);
        }
        // One that is run again looks at what the others left.
        job.run("2/3", &[]).succeeded();
        job.finish().succeeded();
        must_be_alike(&saved.merge(&recipe, &flags).path, &job.out, "clocks");
    }
}

#[test]
fn damaged_files_of_parts_are_named() {
    let saved = family(Deltas::Stepped).save();
    let job = Job::plan(&saved, &Recipe::default(), &[]);
    job.run("1/2", &["--stage=sketch"]).succeeded();
    let sketch = job.parts().join("sketch-00001-of-00002");
    let sound = fs::read(&sketch).unwrap();
    for at in [0, 20, sound.len() / 2, sound.len() - 1] {
        let mut damaged = sound.clone();
        damaged[at] ^= 1;
        fs::write(&sketch, damaged).unwrap();
        let outcome = job.run("2/2", &[]);
        let line = outcome.error_line(1);
        assert!(line.contains("sketch-00001-of-00002") && line.contains("remove it and run the part again"), "{line}");
    }
    fs::remove_file(&sketch).unwrap();
    for part in ["1/2", "2/2"] {
        job.run(part, &[]).succeeded();
    }
    job.finish().succeeded();
}

/// The unfinished shards, by name.
fn shards(job: &Job) -> Vec<PathBuf> {
    let entries = fs::read_dir(job.out.join(".tiesmith")).unwrap().map(|entry| entry.unwrap().path());
    let mut shards: Vec<_> = entries.filter(|path| path.extension().is_some_and(|e| e == "partial")).collect();
    shards.sort();
    shards
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_shard_damaged_after_its_part_is_made_again() {
    let saved = family(Deltas::Stepped).save();
    let flags = ["--max-shard-size=100KB"];
    let whole = saved.merge(&Recipe::default(), &flags);
    for at in [0, 400, 70_000] {
        let job = Job::plan(&saved, &Recipe::default(), &flags);
        for part in ["1/2", "2/2"] {
            job.run(part, &[]).succeeded();
        }
        let damaged = &shards(&job)[1];
        flip(damaged, at);
        let outcome = job.finish();
        let line = outcome.error_line(1);
        for words in [&text(damaged), "damaged", "made by part 1 of 2", "--part 1/2"] {
            assert!(line.contains(words), "{words}: {line}");
        }
        assert!(!job.out.join("tiesmith.json").exists());
        assert_eq!(job.run("2/2", &[]).succeeded().json()["done_before"], true);
        assert_eq!(job.run("1/2", &[]).succeeded().json()["done_before"], false);
        job.finish().succeeded();
        must_be_alike(&whole.path, &job.out, &format!("a flipped bit at {at}"));
    }
}

#[test]
fn a_replaced_output_is_not_taken_for_a_lost_shard() {
    let saved = family(Deltas::Stepped).save();
    let job = Job::plan(&saved, &Recipe::default(), &["--max-shard-size=100KB"]);
    let (out, file) = (text(&job.out), text(&job.file));
    let flags = ["--out", &out, "--max-shard-size=100KB"];
    saved.run("merge", &Recipe::default(), &[&flags[..], &["--density=0.7", "--progress=none"]].concat()).succeeded();
    let before = read_tree(&job.out);
    saved.run("plan", &Recipe::default(), &[&flags[..], &["--save", &file, "--force"]].concat()).succeeded();
    job.run("1/1", &[]).succeeded();
    fs::remove_file(&shards(&job)[0]).unwrap();
    assert!(job.finish().error_line(1).contains("not done yet: part 1 of 1"));
    assert_eq!(job.run("1/1", &[]).succeeded().json()["done_before"], false);
    let during = read_tree(&job.out);
    assert!(before.iter().all(|(path, data)| during.get(path) == Some(data)), "the old output is whole until the end");
    job.finish().succeeded();
    must_be_alike(&saved.merge(&Recipe::default(), &["--max-shard-size=100KB"]).path, &job.out, "replaced");
}

#[test]
fn records_that_are_not_a_part_s_own_are_made_again() {
    let saved = family(Deltas::Stepped).save();
    let flags = ["--max-shard-size=100KB"];
    let whole = saved.merge(&Recipe::default(), &flags);
    let spoils: [fn(&Path, &Path); 3] = [
        |own, other| assert!(fs::copy(other, own).unwrap() > 0),
        |own, _| flip(own, 150),
        |own, _| fs::File::options().write(true).open(own).unwrap().set_len(3 << 30).unwrap(),
    ];
    for spoil in spoils {
        let job = Job::plan(&saved, &Recipe::default(), &flags);
        for part in ["1/3", "2/3", "3/3"] {
            job.run(part, &[]).succeeded();
        }
        let done = |part: usize| job.parts().join(format!("done-{part:05}-of-00003"));
        spoil(&done(2), &done(1));
        assert!(job.finish().error_line(1).contains("not done yet: part 2 of 3"));
        assert_eq!(job.run("2/3", &[]).succeeded().json()["done_before"], false);
        job.finish().succeeded();
        must_be_alike(&whole.path, &job.out, "a record made again");
    }
}

#[test]
fn a_damaged_mark_of_the_job_says_what_helps() {
    let saved = family(Deltas::Stepped).save();
    let job = Job::plan(&saved, &Recipe::default(), &[]);
    job.run("1/2", &[]).succeeded();
    let marker = job.parts().join("job");
    flip(&marker, 90);
    for outcome in [job.run("1/2", &[]), job.finish()] {
        let line = outcome.error_line(1);
        assert!(
            line.contains("parts/job") && line.contains("remove the output directory's .tiesmith folder"),
            "{line}"
        );
    }
    fs::File::options().write(true).open(&marker).unwrap().set_len(3 << 30).unwrap();
    for outcome in [job.run("1/2", &[]), job.finish()] {
        let line = outcome.error_line(1);
        assert!(line.contains("3221225472 bytes, but can have 6") && line.contains(".tiesmith folder"), "{line}");
    }
    fs::remove_dir_all(job.out.join(".tiesmith")).unwrap();
    for part in ["1/2", "2/2"] {
        job.run(part, &[]).succeeded();
    }
    job.finish().succeeded();
}

#[test]
fn files_longer_than_they_can_be_are_not_read() {
    let saved = family(Deltas::Stepped).save();
    let recipe = Recipe { trim_ties: TrimTies::Lowest, zero_sum: ZeroSum::Majority, ..Recipe::default() };
    let job = Job::plan(&saved, &recipe, &[]);
    job.run("1/1", &[]).succeeded();
    for name in ["probe-1", "sketch-00001-of-00001", "ties-00001-of-00001", "vote-00001-of-00001", "thresholds"] {
        let path = job.parts().join(name);
        let sound = fs::read(&path).unwrap();
        fs::File::options().write(true).open(&path).unwrap().set_len(3 << 30).unwrap();
        let outcome = job.finish();
        let line = outcome.error_line(1);
        assert!(line.contains(name) && line.contains("3221225472 bytes, but can have"), "{line}");
        assert!(line.contains("remove it and run the part again"), "{line}");
        fs::write(&path, sound).unwrap();
    }
    job.finish().succeeded();
}

#[test]
fn a_bad_input_is_the_same_line_in_parts() {
    let mut family = family(Deltas::Stepped);
    let bytes = &mut family.models[1].get_mut("f").unwrap().bytes;
    bytes[400..404].copy_from_slice(&f32::NAN.to_le_bytes());
    let saved = family.save();
    let job = Job::plan(&saved, &Recipe::default(), &["--max-shard-size=100KB"]);
    let whole = saved.run("merge", &Recipe::default(), &["--out", &text(&saved.path("whole")), "--progress=none"]);
    let outcome = job.run("1/2", &[]);
    assert_eq!(outcome.error_line(2), whole.error_line(2));
    assert!(job.finish().error_line(1).contains("not done yet"));
}

#[test]
fn a_finished_output_is_replaced_whole_or_not_at_all() {
    let saved = family(Deltas::Stepped).save();
    let flags = ["--max-shard-size=100KB"];
    let job = Job::plan(&saved, &Recipe::default(), &flags);
    let merged = |density: &str| {
        let args = ["--out", &text(&job.out), "--progress=none", "--max-shard-size=100KB", density];
        saved.run("merge", &Recipe::default(), &args).succeeded();
    };
    merged("--density=0.7");
    let outcome = job.run("1/2", &[]);
    assert!(outcome.refusal().contains("a finished merge is already there"));
    let before = lasting(&job.out);
    let (out, file) = (text(&job.out), text(&job.file));
    saved
        .run("plan", &Recipe::default(), &[&["--out", &out, "--save", &file, "--force"][..], &flags].concat())
        .succeeded();
    job.run("1/2", &[]).succeeded();
    job.run("2/2", &[]).succeeded();
    let mut during = read_tree(&job.out);
    during.retain(|path, _| !path.starts_with(".tiesmith"));
    assert_eq!(during.len(), before.len(), "the old output is whole until the end");
    job.finish().succeeded();
    must_be_alike(&saved.merge(&Recipe::default(), &flags).path, &job.out, "replaced");
}

#[test]
fn schedulers_name_the_part() {
    let saved = family(Deltas::Stepped).save();
    let flags = ["--max-shard-size=100KB"];
    let job = Job::plan(&saved, &Recipe::default(), &flags);
    let with = |part: &str, variables: &[(&str, &str)]| {
        let mut command = command();
        command.args(["run", &text(&job.file), "--progress=none", "--json", "--part", part]);
        command.envs(variables.iter().copied());
        run(command).succeeded().json()["part"].clone()
    };
    let slurm = [("SLURM_ARRAY_TASK_ID", "5"), ("SLURM_ARRAY_TASK_MIN", "5"), ("SLURM_ARRAY_TASK_COUNT", "3")];
    assert_eq!(with("auto", &slurm), 1);
    assert_eq!(with("auto/3", &[("JOB_COMPLETION_INDEX", "1")]), 2);
    assert_eq!(with("auto", &[("OMPI_COMM_WORLD_RANK", "2"), ("OMPI_COMM_WORLD_SIZE", "3")]), 3);
    job.finish().succeeded();
    let script = tiesmith(["slurm", &text(&job.file), "--parts=3", "--", "--partition=cpu"]).succeeded().stdout;
    for words in ["--array=1-3", "--dependency=afterok", "--requeue", "--partition=cpu", "--stage sketch", "finish"] {
        assert!(script.contains(words), "{words}\n{script}");
    }
    let mut check = std::process::Command::new("bash");
    let mut child = check.arg("-n").stdin(std::process::Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), script.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{script}");
}

#[test]
#[cfg(unix)]
fn the_script_for_slurm_runs_in_folders_of_any_name() {
    use std::os::unix::fs::PermissionsExt as _;
    let saved = family(Deltas::Stepped).save();
    let dir = tempfile::tempdir().unwrap();
    let odd = dir.path().join("it's \"a\" $HOME folder");
    fs::create_dir(&odd).unwrap();
    let (out, file) = (odd.join("merged"), odd.join("the job.plan"));
    let page =
        saved.run("plan", &Recipe::default(), &["--out", &text(&out), "--save", &text(&file)]).succeeded().stdout;
    assert!(page.contains("Saved to "), "{page}");
    // A scheduler that does each task of an array at once.
    let sbatch = "#!/bin/bash\nset -e\ntasks=1\nfor word; do case $word in --array=1-*) tasks=${word#--array=1-};; esac; done\n\
                  for i in $(seq $tasks); do SLURM_ARRAY_TASK_ID=$i bash -c \"${@: -1}\" >&2; done\necho 7\n";
    let program = dir.path().join("sbatch");
    fs::write(&program, sbatch).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let script = tiesmith(["slurm", &text(&file), "--parts=2", "--threads=1"]).succeeded().stdout;
    assert!(!script.contains("   --wrap"), "{script}");
    let link = odd.join("tie smith");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_tiesmith"), &link).unwrap();
    let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
    let mut bash = std::process::Command::new("bash");
    let done = bash.args(["-c", &script]).env("PATH", path).env("TIESMITH", &link).output().unwrap();
    assert!(done.status.success(), "{script}\n{}", String::from_utf8_lossy(&done.stderr));
    assert!(out.join("model.safetensors").exists() && !out.join(".tiesmith").exists());
}

#[test]
fn plan_files_are_checked() {
    let saved = family(Deltas::Stepped).save();
    let job = Job::plan(&saved, &Recipe::default(), &[]);
    let says =
        |line: &str, words: &[&str]| words.iter().for_each(|word| assert!(line.contains(word), "{word}: {line}"));
    let args = |file: &str| ["run".to_owned(), file.to_owned(), "--part=1/1".to_owned()];
    says(tiesmith(args(&text(&saved.path("no.plan")))).refusal(), &["no.plan", "plan --save"]);
    let original = fs::read_to_string(&job.file).unwrap();
    for (find, replace, words) in [
        ("{", "[", &["not a plan file"][..]),
        ("\"tiesmith_plan\": 1", "\"tiesmith_plan\": 99", &["version 99, not 1"]),
        ("\"--memory\"", "\"--nemory\"", &["not understood by this version"]),
        ("\"directory\": \"/", "\"directory\": \"/nowhere/", &["cannot be entered here"]),
    ] {
        let changed = original.replacen(find, replace, 1);
        if changed == original && find.contains("memory") {
            continue;
        }
        assert_ne!(changed, original, "{find}");
        fs::write(&job.file, changed).unwrap();
        says(job.run("1/1", &[]).refusal(), words);
    }
    let outcome = saved.run("plan", &Recipe::default(), &["--save", &text(&job.file)]);
    says(outcome.refusal(), &["no output directory is given", "all parts write there"]);
    // Where the directory that parts share is not mounted.
    let (out, file) = (text(&saved.path("share/merged")), text(&saved.path("shared.plan")));
    saved.run("plan", &Recipe::default(), &["--out", &out, "--save", &file]).succeeded();
    fs::remove_dir(saved.path("share")).unwrap();
    says(tiesmith(args(&file)).refusal(), &["merged: there is no directory", "share on this machine", "mount it here"]);
    assert!(!saved.path("share").exists());
    fs::create_dir(saved.path("share")).unwrap();
    tiesmith(args(&file)).succeeded();
    let nowhere = text(&saved.path("no/such/folder/job.plan"));
    saved.run("plan", &Recipe::default(), &["--out=x", "--save", &nowhere]).refusal();
}

#[test]
#[cfg(unix)]
fn a_work_directory_that_leads_elsewhere_is_refused() {
    let saved = family(Deltas::HeavyTailed).save();
    let job = Job::plan(&saved, &Recipe::default(), &[]);
    let elsewhere = job.dir.path().join("elsewhere");
    fs::create_dir_all(elsewhere.join("parts")).unwrap();
    fs::write(elsewhere.join("parts/mine"), "mine").unwrap();
    fs::create_dir(&job.out).unwrap();
    std::os::unix::fs::symlink(&elsewhere, job.out.join(".tiesmith")).unwrap();
    for outcome in [job.run("1/2", &[]), job.finish()] {
        assert!(outcome.refusal().contains("a link to somewhere else"), "{}", outcome.stderr);
    }
    fs::remove_file(job.out.join(".tiesmith")).unwrap();
    job.run("1/2", &[]).succeeded();
    // The folder of the parts may not lead elsewhere either: what is in it is removed in the end.
    let parts = job.parts();
    fs::rename(&parts, elsewhere.join("moved")).unwrap();
    std::os::unix::fs::symlink(elsewhere.join("parts"), &parts).unwrap();
    for outcome in [job.run("1/2", &[]), job.finish()] {
        assert!(outcome.refusal().contains("a link to somewhere else"), "{}", outcome.stderr);
    }
    assert_eq!(fs::read_to_string(elsewhere.join("parts/mine")).unwrap(), "mine");
    assert_eq!(fs::read_dir(elsewhere.join("parts")).unwrap().count(), 1, "something was put there");
}
