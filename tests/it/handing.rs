//! Shards that are handed over to a command, which may take them away: the bytes of any merge, each shard once.
#![cfg(unix)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::Value;

use crate::support::family::{Deltas, Saved, Spec, text};
use crate::support::files::read_tree;
use crate::support::oracle::{Recipe, Scope};
use crate::support::run::{Outcome, tiesmith};

/// About eight shards of 100 kB, with a tensor between them that is copied.
const FLAGS: [&str; 3] = ["--max-shard-size=100KB", "--exclude=d*", "--threads=2"];

fn saved() -> Saved {
    let shapes =
        (0..12).map(|i| (["a", "b", "c", "d"][i % 4].to_owned() + &i.to_string(), vec![20_000 + 977 * i as u64]));
    let spec = Spec {
        seed: 8,
        shapes: shapes.map(|(name, shape)| (&*name.leak(), shape.into_iter().map(|n| n as usize).collect())).collect(),
        base: Dtype::BF16,
        models: vec![Dtype::BF16, Dtype::F32],
        deltas: Deltas::Stepped,
    };
    spec.family().save()
}

/// Where shards go, what was handed over, and the output.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("away")).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A command that notes what it is given, runs `before`, and moves the shard away.
    fn command(&self, before: &str) -> String {
        let (log, away) = (text(&self.path("log")), text(&self.path("away")));
        format!(
            "echo $TIESMITH_SHARD_NAME $TIESMITH_SHARD_NUMBER/$TIESMITH_SHARD_COUNT $TIESMITH_SHARD_BYTES \
             $TIESMITH_SHARD_BLAKE3 $(ls $TIESMITH_OUT/*.safetensors | wc -l) $(ls $TIESMITH_OUT/*.index.json 2>&- | wc -l) \
             >> {log}; {before} cp {{}} {away} && test $TIESMITH_SHARD = {{}} && rm {{}}"
        )
    }

    fn merge(&self, saved: &Saved, recipe: &Recipe, command: &str, flags: &[&str]) -> Outcome {
        let out = text(&self.path("merged"));
        let all = [&["--out", &out, "--json", "--progress=none", "--on-shard", command], &FLAGS[..], flags].concat();
        saved.run("merge", recipe, &all)
    }

    /// The lines of the log.
    fn log(&self) -> Vec<Vec<String>> {
        let log = fs::read_to_string(self.path("log")).unwrap_or_default();
        log.lines().map(|line| line.split(' ').map(str::to_owned).collect()).collect()
    }

    /// What was taken away and what stayed, together.
    fn all(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = lasting(&self.path("merged"));
        assert!(!self.path("merged/.tiesmith").exists());
        for (name, bytes) in read_tree(&self.path("away")) {
            assert!(files.insert(name.clone(), bytes).is_none(), "{name:?} stayed");
        }
        files
    }
}

/// What does not depend on when and where it was made.
fn lasting(out: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = read_tree(out);
    let manifest: Value = serde_json::from_slice(&files[Path::new("tiesmith.json")]).unwrap();
    files.insert("shards".into(), manifest["shards"].to_string().into_bytes());
    files.retain(|path, _| !["tiesmith.json", "README.md"].contains(&path.to_str().unwrap()));
    files
}

fn recipes() -> [Recipe; 2] {
    [Recipe::default(), Recipe { scope: Scope::Tensor, ..Recipe::default() }]
}

#[test]
fn each_shard_is_handed_over_once_before_the_index_is_there() {
    let saved = saved();
    for recipe in recipes() {
        let local = lasting(&saved.merge(&recipe, &FLAGS).path);
        let place = Place::new();
        let outcome = place.merge(&saved, &recipe, &place.command(""), &[]).succeeded();
        assert_eq!(place.all(), local);
        let log = place.log();
        let shards = outcome.json()["shards"].as_u64().unwrap();
        assert!(shards >= 5);
        assert_eq!(outcome.json()["shards_handed_over"], shards);
        assert_eq!(log.len() as u64, shards);
        let mut numbers: Vec<&str> = log.iter().map(|line| line[1].split('/').next().unwrap()).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, (1..=shards).map(|number| number.to_string()).collect::<Vec<_>>());
        for line in &log {
            let file = fs::read(place.path("away").join(&line[0])).unwrap();
            let number = line[1].strip_suffix(&format!("/{shards}")).unwrap();
            assert!(line[0].starts_with(&format!("model-{number:0>5}-of-")), "{line:?}");
            assert_eq!(line[2], file.len().to_string());
            assert_eq!(line[3], blake3::hash(&file).to_hex().as_str());
            assert!(line[4].parse::<u64>().unwrap() <= 3, "{} shards on the disk", line[4]);
            assert_eq!(line[5], "0", "the index is there already");
        }
        let verified = tiesmith(["verify", &text(&place.path("merged"))]).succeeded();
        let expected = format!("but for {shards} shards that --on-shard took away");
        assert!(verified.stdout.starts_with("intact: ") && verified.stdout.contains(&expected), "{}", verified.stdout);
        let again = place.merge(&saved, &recipe, &place.command(""), &[]);
        assert!(again.refusal().contains("a finished merge is already there"));
        assert_eq!(place.log().len() as u64, shards);
    }
}

#[test]
fn a_command_that_fails_is_one_line_and_the_same_command_goes_on() {
    let saved = saved();
    for recipe in recipes() {
        let local = lasting(&saved.merge(&recipe, &FLAGS).path);
        let place = Place::new();
        let marker = text(&place.path("mended"));
        let command = place.command(&format!(
            "if [ $TIESMITH_SHARD_NUMBER = 3 ] && [ ! -e {marker} ]; then echo quota exceeded >&2; exit 7; fi;"
        ));
        let outcome = place.merge(&saved, &recipe, &command, &[]);
        let line = outcome.error_line(1);
        for word in ["model-00003-of-", "--on-shard failed", "7", "quota exceeded", "run the same command again"] {
            assert!(line.contains(word), "{word}: {line}");
        }
        assert!(!place.path("merged/model.safetensors.index.json").exists());
        place.merge(&saved, &recipe, &command, &[]).error_line(1);
        fs::write(&marker, "").unwrap();
        let outcome = place.merge(&saved, &recipe, &command, &[]).succeeded();
        assert_eq!(place.all(), local);
        let count =
            |number: usize| place.log().iter().filter(|line| line[1].starts_with(&format!("{number}/"))).count();
        let shards = outcome.json()["shards"].as_u64().unwrap() as usize;
        let expected: Vec<usize> = (1..=shards).map(|number| if number == 3 { 3 } else { 1 }).collect();
        assert_eq!((1..=shards).map(count).collect::<Vec<_>>(), expected);
    }
}

#[test]
fn a_kill_between_the_command_and_the_record_makes_the_shard_again() {
    let saved = saved();
    for recipe in recipes() {
        let local = lasting(&saved.merge(&recipe, &FLAGS).path);
        for kept in [false, true] {
            let place = Place::new();
            let marker = text(&place.path("killed"));
            // The command succeeds, with the process that would record it gone.
            let kill = format!(
                "if [ $TIESMITH_SHARD_NUMBER = 4 ] && [ ! -e {marker} ]; then touch {marker}; cp {{}} {}; {} kill -9 $PPID; fi;",
                text(&place.path("away")),
                if kept { "" } else { "rm {};" },
            );
            let command = place.command(&kill);
            let outcome = place.merge(&saved, &recipe, &command, &[]);
            assert_eq!(outcome.code, None, "{}", outcome.stderr);
            // The command may still be at it.
            std::thread::sleep(std::time::Duration::from_millis(200));
            let outcome = place.merge(&saved, &recipe, &command, &[]).succeeded();
            assert_eq!(outcome.json()["resumed"], true);
            assert_eq!(place.all(), local, "kept {kept}");
            let times = place.log().iter().filter(|line| line[1].starts_with("4/")).count();
            assert_eq!(times, 2);
            assert!(place.log().iter().filter(|line| !line[1].starts_with("4/")).count() < 13);
        }
    }
}

#[test]
fn one_shard_and_a_replaced_output_are_handed_over_at_the_end() {
    let saved = saved();
    let recipe = Recipe::default();
    let local = lasting(&saved.merge(&recipe, &["--exclude=d*"]).path);
    let place = Place::new();
    let marker = text(&place.path("mended"));
    let command = place.command(&format!("[ -e {marker} ] || exit 1;"));
    place.merge(&saved, &recipe, &command, &["--max-shard-size=5GB"]).error_line(1);
    fs::write(&marker, "").unwrap();
    place.merge(&saved, &recipe, &command, &["--max-shard-size=5GB"]).succeeded();
    assert_eq!(place.all(), local);
    assert!(place.merge(&saved, &recipe, &command, &["--max-shard-size=5GB"]).refusal().contains("already there"));

    let place = Place::new();
    saved
        .run("merge", &recipe, &["--out", &text(&place.path("merged")), "--lambda=2", "--max-shard-size=100KB"])
        .succeeded();
    place.merge(&saved, &recipe, &place.command(""), &["--force"]).succeeded();
    assert_eq!(place.all(), lasting(&saved.merge(&recipe, &FLAGS).path));
}

#[test]
fn parts_are_handed_over_when_they_are_finished() {
    let saved = saved();
    let recipe = Recipe::default();
    let place = Place::new();
    let (out, job) = (text(&place.path("merged")), text(&place.path("job")));
    let marker = text(&place.path("mended"));
    let command = place.command(&format!("[ $TIESMITH_SHARD_NUMBER != 2 ] || [ -e {marker} ] || exit 1;"));
    let flags = ["--out", &out, "--save", &job, "--on-shard", &command];
    saved.run("plan", &recipe, &[&flags[..], &FLAGS].concat()).succeeded();
    for part in ["2/2", "1/2"] {
        tiesmith(["run", &job, "--part", part, "--progress=none"]).succeeded();
    }
    assert!(place.log().is_empty());
    tiesmith(["finish", &job, "--progress=none"]).error_line(1);
    fs::write(&marker, "").unwrap();
    tiesmith(["finish", &job, "--progress=none"]).succeeded();
    assert_eq!(place.all(), lasting(&saved.merge(&recipe, &FLAGS).path));
    assert_eq!(place.log().iter().filter(|line| line[1].starts_with("1/")).count(), 1);
}

/// A planned merge in two parts, its shards handed over by `command`.
fn plan_parts(saved: &Saved, place: &Place, command: &str, flags: &[&str]) -> String {
    let (out, job) = (text(&place.path("merged")), text(&place.path("job")));
    let all = [&["--out", &out, "--save", &job, "--on-shard", command], &FLAGS[..], flags].concat();
    saved.run("plan", &Recipe::default(), &all).succeeded();
    job
}

fn run_parts(job: &str) {
    for part in ["1/2", "2/2"] {
        tiesmith(["run", job, "--part", part, "--progress=none"]).succeeded();
    }
}

#[test]
fn a_finish_that_is_killed_between_the_command_and_the_record_hands_over_nothing_twice_but_that_shard() {
    let saved = saved();
    let local = lasting(&saved.merge(&Recipe::default(), &FLAGS).path);
    let shards = local.keys().filter(|name| name.extension().is_some_and(|e| e == "safetensors")).count();
    for killed in [1, 3, shards] {
        for again in [true, false] {
            let place = Place::new();
            let marker = text(&place.path("killed"));
            let kill = format!(
                "if [ $TIESMITH_SHARD_NUMBER = {killed} ] && [ ! -e {marker} ]; then touch {marker}; rm {{}}; kill -9 $PPID; exit; fi;"
            );
            let job = plan_parts(&saved, &place, &place.command(&kill), &[]);
            run_parts(&job);
            assert_eq!(tiesmith(["finish", &job, "--progress=none"]).code, None);
            std::thread::sleep(std::time::Duration::from_millis(200));
            let refused = tiesmith(["finish", &job, "--progress=none"]);
            let line = refused.error_line(1);
            let lacking = line.split("--part ").nth(1).expect(line).to_owned();
            // What is asked for, or everything: shards that are elsewhere are not made again.
            if again {
                run_parts(&job);
            } else {
                tiesmith(["run", &job, "--part", &lacking, "--progress=none"]).succeeded();
            }
            let made = read_tree(&place.path("merged"));
            let made = made.keys().filter(|name| name.to_str().unwrap().contains(".safetensors"));
            let made: Vec<_> = made.filter(|name| !name.to_str().unwrap().ends_with(".json")).collect();
            assert_eq!(made.len(), shards - (killed - 1), "{made:?}");
            tiesmith(["finish", &job, "--progress=none"]).succeeded();
            assert_eq!(place.all(), local, "killed at {killed}");
            for number in 1..=shards {
                let times = place.log().iter().filter(|line| line[1].starts_with(&format!("{number}/"))).count();
                assert_eq!(times, 1 + usize::from(number == killed), "shard {number}, killed at {killed}");
            }
            let report = tiesmith(["finish", &job, "--progress=none", "--json"]).succeeded().json();
            assert_eq!(report["shards_handed_over"], shards as u64);
        }
    }
}

#[test]
fn one_shard_in_parts_that_is_handed_over_by_a_finish_that_is_killed() {
    let saved = saved();
    let local = lasting(&saved.merge(&Recipe::default(), &["--exclude=d*"]).path);
    let place = Place::new();
    let marker = text(&place.path("killed"));
    let kill = format!("if [ ! -e {marker} ]; then touch {marker}; rm {{}}; kill -9 $PPID; exit; fi;");
    let job = plan_parts(&saved, &place, &place.command(&kill), &["--max-shard-size=5GB"]);
    run_parts(&job);
    assert_eq!(tiesmith(["finish", &job, "--progress=none"]).code, None);
    std::thread::sleep(std::time::Duration::from_millis(200));
    tiesmith(["finish", &job, "--progress=none"]).error_line(1);
    run_parts(&job);
    tiesmith(["finish", &job, "--progress=none"]).succeeded();
    assert_eq!(place.all(), local);
    // It is finished, though what makes it loadable is elsewhere.
    assert_eq!(tiesmith(["finish", &job, "--progress=none", "--json"]).succeeded().json()["shards_handed_over"], 1);
    assert!(tiesmith(["run", &job, "--part=1/2", "--progress=none"]).succeeded().stdout.contains("was done before"));
    assert_eq!(place.all(), local);
    let plain = ["--max-shard-size=5GB", "--lambda=2"];
    let merge =
        |force: &[&str]| place.merge(&saved, &Recipe::default(), &place.command(""), &[&plain[..], force].concat());
    assert!(merge(&[]).refusal().contains("a finished merge is already there"));
    merge(&["--force"]).succeeded();
}

/// This program has no object stores; what can be said without one is said.
#[test]
#[cfg(not(feature = "cloud"))]
fn addresses_are_refused_where_they_mean_nothing() {
    let saved = saved();
    let place = Place::new();
    let dir = text(&place.path("merged"));
    let merge = |flags: &[&str]| saved.run("merge", &Recipe::default(), &[&["--progress=none"], flags].concat());
    for (flags, words) in [
        (&["--out=s3://bucket/merged", "--work", &dir][..], "built without object stores"),
        (&["--out=s3://bucket/merged", "--force"], "--force replaces nothing in an object store"),
        (&["--out=gs://bucket/merged", "--on-shard=true"], "there are none for --on-shard"),
        (&["--out", &dir, "--work=elsewhere"], "--out is a directory"),
        (&["--out", &dir, "--on-shard=s3://bucket/merged"], "use it for --out"),
    ] {
        let refused = merge(flags);
        assert!(refused.refusal().contains(words), "{words}: {}", refused.stderr);
        assert!(!place.path("merged").exists(), "{words}");
    }
    let sweep = saved.run("sweep", &Recipe::default(), &["--out=s3://bucket/merged", "--lambda=1,2"]);
    assert!(sweep.refusal().contains("go to a directory"), "{}", sweep.stderr);
    let plan = saved.run("plan", &Recipe::default(), &["--out=s3://bucket/merged", "--save", &dir]);
    assert!(plan.refusal().contains("built without object stores"), "{}", plan.stderr);
    assert!(!place.path("merged").exists());
}
