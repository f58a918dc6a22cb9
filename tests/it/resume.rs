//! What becomes of an unfinished output: it goes on, or a sentence says why not and nothing is touched.

#![cfg(unix)]

use std::collections::BTreeMap;
use std::fs::{self, File, FileTimes};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::family::{Family, Saved, Spec, text};
use crate::support::files::{lasting, read_checkpoint, read_tree};
use crate::support::oracle::Recipe;
use crate::support::run::{Outcome, command, run};

const FLAGS: [&str; 5] = ["--max-shard-size=50KB", "--threads=1", "--scope=tensor", "--progress=none", "--json"];

/// Three tensors that fill a shard each, and one that is larger than the limit of [`interrupted`].
fn family() -> Family {
    let shapes = [("a", 10_000), ("b", 11_000), ("c", 12_000), ("z", 210_000)];
    Spec { shapes: shapes.map(|(name, length)| (name, vec![length])).to_vec(), ..Spec::default() }.family()
}

fn merge(saved: &Saved, recipe: &Recipe, extra: &[&str]) -> Command {
    let mut merge = command();
    merge.arg("merge").args(saved.inputs(recipe)).args(recipe.args()).args(FLAGS).args(extra);
    merge.args(["--out", &text(&saved.path("out"))]);
    merge
}

fn again(saved: &Saved, extra: &[&str]) -> Outcome {
    run(merge(saved, &recipe(), extra))
}

fn recipe() -> Recipe {
    Recipe { scope: crate::support::oracle::Scope::Tensor, ..Recipe::default() }
}

/// A run that fails at the fourth shard, because files may not become that long; the first three are finished.
fn interrupted(saved: &Saved, extra: &[&str]) {
    let merge = merge(saved, &recipe(), extra);
    let mut shell = Command::new("sh");
    shell.args(["-c", r#"ulimit -f 800; exec "$@""#, "sh"]).arg(merge.get_program()).args(merge.get_args());
    let outcome = run(shell);
    assert!(outcome.error_line(1).contains("model-00004-of-00004.safetensors"), "{}", outcome.stderr);
}

fn unfinished() -> (Family, Saved) {
    let family = family();
    let saved = family.save();
    interrupted(&saved, &[]);
    (family, saved)
}

/// All files of the output but the lock, which names the last process.
fn tree(saved: &Saved) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut tree = read_tree(&saved.path("out"));
    tree.remove(Path::new(".tiesmith/lock"));
    tree
}

fn shard(saved: &Saved, number: usize) -> PathBuf {
    saved.path(&format!("out/model-{number:05}-of-00004.safetensors"))
}

/// Fails unless the output is finished and right.
#[track_caller]
fn finished(family: &Family, saved: &Saved) {
    assert!(read_checkpoint(&saved.path("out")) == family.expected(&recipe()).tensors);
    assert!(!saved.path("out/.tiesmith").exists());
}

#[test]
fn what_is_finished_stays_and_the_report_says_so() {
    let (family, saved) = unfinished();
    let clean = saved.path("clean");
    let mut undisturbed = merge(&saved, &recipe(), &[]);
    undisturbed.args(["--out", &text(&clean)]);
    let expected = run(undisturbed).succeeded().json();
    let before: Vec<_> = (1..=3).map(|n| fs::metadata(shard(&saved, n)).unwrap()).collect();
    let report = again(&saved, &[]).succeeded().json();
    finished(&family, &saved);
    for (number, before) in (1..).zip(before) {
        let after = fs::metadata(shard(&saved, number)).unwrap();
        assert_eq!((after.ino(), after.modified().unwrap()), (before.ino(), before.modified().unwrap()));
    }
    assert!(report["resumed"] == true && report["chunks_reused"] == 3, "{report}");
    for same in [
        "kept_fraction",
        "surviving_fraction",
        "sign_conflict_fraction",
        "bytes_read",
        "bytes_written",
        "tensors",
        "elements",
    ] {
        assert_eq!(report[same], expected[same], "{same}");
    }
}

#[test]
fn another_recipe_is_refused_by_the_name_of_the_setting() {
    let (family, saved) = unfinished();
    let before = tree(&saved);
    let cases: [(Recipe, &[&str], &str); 5] = [
        (Recipe { density: 0.5, ..recipe() }, &[], "density"),
        (Recipe { lambda: 0.5, ..recipe() }, &[], "lambda"),
        (recipe(), &["--seed=4"], "seed"),
        (recipe(), &["--max-shard-size=60KB"], "max_shard_bytes"),
        (recipe(), &["--exclude=b"], "exclude"),
    ];
    for (recipe, extra, named) in cases {
        let outcome = run(merge(&saved, &recipe, extra));
        let line = outcome.refusal();
        assert!(line.contains(named) && line.contains("--restart"), "{line}");
        assert!(before == tree(&saved), "{named}: a refused run changed something");
    }
    let fewer = Recipe { ..recipe() };
    let mut fewer = merge(&saved, &fewer, &["--model", &text(&saved.signs)]);
    fewer.arg("--json");
    assert!(run(fewer).refusal().contains("number of models was 3, now 4"));
    again(&saved, &["--threads=2", "--memory=100MB", "--io=mmap"]).succeeded();
    finished(&family, &saved);
}

#[test]
fn restart_starts_over_with_whatever_is_asked() {
    let (family, saved) = unfinished();
    let other = Recipe { density: 0.7, ..recipe() };
    let report = run(merge(&saved, &other, &["--restart", "--max-shard-size=10MB"])).succeeded().json();
    assert!(report["resumed"] == false && report["chunks_reused"] == 0);
    assert!(read_checkpoint(&saved.path("out")) == family.expected(&other).tensors);
    assert!(!shard(&saved, 1).exists(), "shards of the other cut are left");
}

/// Sets the modification time of `to` to that of `from`.
fn copy_time(from: &fs::Metadata, to: &Path) {
    let times = FileTimes::new().set_modified(from.modified().unwrap());
    File::options().append(true).open(to).unwrap().set_times(times).unwrap();
}

#[test]
fn changed_inputs_are_refused_by_name() {
    let changes: [(&str, Change); 10] = [
        ("a byte, the time put back", |path| {
            let metadata = fs::metadata(path).unwrap();
            let mut content = fs::read(path).unwrap();
            *content.last_mut().unwrap() ^= 1;
            fs::write(path, content).unwrap();
            copy_time(&metadata, path);
        }),
        ("a byte", |path| {
            let mut content = fs::read(path).unwrap();
            *content.last_mut().unwrap() ^= 1;
            fs::write(path, content).unwrap();
        }),
        ("touched", |path| {
            drop(File::options().append(true).open(path).unwrap().set_modified(std::time::SystemTime::now()))
        }),
        ("made older", |path| {
            let then = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
            File::options().append(true).open(path).unwrap().set_modified(then).unwrap();
        }),
        ("replaced by a copy, the time put back", |path| {
            let metadata = fs::metadata(path).unwrap();
            let copy = path.with_extension("copy");
            fs::copy(path, &copy).unwrap();
            fs::rename(&copy, path).unwrap();
            copy_time(&metadata, path);
        }),
        ("cut off", |path| File::options().write(true).open(path).unwrap().set_len(1000).unwrap()),
        ("emptied", |path| fs::write(path, "").unwrap()),
        ("longer", |path| {
            let mut content = fs::read(path).unwrap();
            content.extend([0; 8]);
            fs::write(path, content).unwrap();
        }),
        ("removed", |path| fs::remove_file(path).unwrap()),
        ("permissions changed", |path| {
            let mut permissions = fs::metadata(path).unwrap().permissions();
            permissions.set_readonly(true);
            fs::set_permissions(path, permissions).unwrap();
        }),
    ];
    let (_, saved) = unfinished();
    for (number, (what, change)) in changes.into_iter().enumerate() {
        // A fresh unfinished run each time: a change cannot be taken back.
        let fresh;
        let saved = if number == 0 {
            &saved
        } else {
            fresh = unfinished().1;
            &fresh
        };
        let before = tree(saved);
        let input = saved.models[0].join("model.safetensors");
        change(&input);
        let outcome = again(saved, &[]);
        let line = outcome.refusal();
        assert!(line.contains("model1"), "{what}: {line}");
        assert!(before == tree(saved), "{what}: a refused run changed something");
    }
}

#[test]
fn inputs_that_were_only_moved_are_the_same_inputs() {
    let (family, mut saved) = unfinished();
    let moved = saved.path("elsewhere");
    fs::rename(&saved.models[1], &moved).unwrap();
    saved.models[1] = moved;
    assert!(again(&saved, &[]).succeeded().json()["resumed"] == true);
    finished(&family, &saved);
}

/// The files that hold the tensors of the checkpoint in `dir`.
fn weights(dir: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).collect()
}

type Change = fn(&Path);

/// Changes to a file after which its content is the same.
const TOUCHES: [(&str, Change); 4] = [
    ("touched", |path| {
        drop(File::options().append(true).open(path).unwrap().set_modified(std::time::SystemTime::now()))
    }),
    ("copied", |path| {
        let copy = path.with_extension("copy");
        fs::copy(path, &copy).unwrap();
        fs::rename(&copy, path).unwrap();
    }),
    ("permissions changed", |path| {
        let mut permissions = fs::metadata(path).unwrap().permissions();
        permissions.set_readonly(true);
        fs::set_permissions(path, permissions).unwrap();
    }),
    ("written anew", |path| fs::write(path, fs::read(path).unwrap()).unwrap()),
];

#[test]
fn with_hashes_a_run_goes_on_over_inputs_that_were_only_touched_or_copied() {
    for (what, touch) in TOUCHES {
        for scope in ["--scope=tensor", "--scope=model"] {
            let saved = family().save();
            let flags = ["--hash-inputs", scope];
            interrupted(&saved, &flags);
            let clean = saved.path("clean");
            for input in saved.models.iter().chain([&saved.base]) {
                weights(input).iter().for_each(|path| touch(path));
            }
            // The copies are as good as what they are copies of: nothing is compared a second time.
            interrupted(&saved, &flags);
            // It does not have to be asked for again.
            let outcome = again(&saved, &[scope]).succeeded();
            assert!(!outcome.stderr.contains("its content is the same"), "{what}: {}", outcome.stderr);
            assert!(outcome.json()["resumed"] == true && outcome.json()["chunks_reused"].as_u64() >= Some(3), "{what}");
            let mut undisturbed = merge(&saved, &recipe(), &[scope]);
            run({
                undisturbed.args(["--out", &text(&clean)]);
                undisturbed
            })
            .succeeded();
            assert!(lasting(&saved.path("out")) == lasting(&clean), "{what} {scope}");
        }
    }
}

#[test]
fn the_comparison_of_touched_inputs_is_told() {
    let saved = family().save();
    interrupted(&saved, &["--hash-inputs"]);
    let touched = weights(&saved.models[1]).remove(0);
    TOUCHES[0].1(&touched);
    let outcome = again(&saved, &[]).succeeded();
    let said = format!("warning: {}: its modification time is another, but its content is the same", text(&touched));
    assert!(outcome.stderr.contains(&said), "{}", outcome.stderr);
}

#[test]
fn content_that_changed_is_found_by_its_hash_whatever_the_times_say() {
    // The last tensor is what the first run failed at; what it had read of that counts too.
    for (scope, place) in
        [("--scope=tensor", 0.01), ("--scope=tensor", 0.1), ("--scope=model", 0.01), ("--scope=model", 0.9)]
    {
        for restore_times in [false, true] {
            let saved = family().save();
            interrupted(&saved, &["--hash-inputs", scope]);
            let before = tree(&saved);
            let input = saved.models[0].join("model.safetensors");
            let metadata = fs::metadata(&input).unwrap();
            let mut content = fs::read(&input).unwrap();
            let at = 1000 + (content.len() as f64 * place) as usize;
            content[at] ^= 1;
            fs::write(&input, content).unwrap();
            if restore_times {
                copy_time(&metadata, &input);
            }
            let outcome = again(&saved, &[scope]);
            let line = outcome.refusal();
            assert!(line.contains("model1") && line.contains("are others") && line.contains("--restart"), "{line}");
            assert!(before == tree(&saved), "a refused run changed something");
            again(&saved, &["--restart", scope]).succeeded();
        }
    }
}

#[test]
fn what_was_begun_without_hashes_says_so() {
    let (family, saved) = unfinished();
    let outcome = again(&saved, &["--hash-inputs"]).succeeded();
    assert!(outcome.stderr.contains("warning: --hash-inputs came too late"), "{}", outcome.stderr);
    finished(&family, &saved);
    let (_, saved) = unfinished();
    weights(&saved.base).iter().for_each(|path| TOUCHES[1].1(path));
    let outcome = again(&saved, &["--hash-inputs"]);
    assert!(outcome.refusal().contains("a merge begun with --hash-inputs goes on"), "{}", outcome.stderr);
}

#[test]
fn damage_to_what_is_kept_never_reaches_the_output() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 7] = [
        ("a flipped bit", |path| {
            let mut content = fs::read(path).unwrap();
            let middle = content.len() / 2;
            content[middle] ^= 4;
            fs::write(path, content).unwrap();
        }),
        ("a flipped bit in the header", |path| {
            let mut content = fs::read(path).unwrap();
            content[20] ^= 1;
            fs::write(path, content).unwrap();
        }),
        ("cut off", |path| File::options().write(true).open(path).unwrap().set_len(30_000).unwrap()),
        ("emptied", |path| fs::write(path, "").unwrap()),
        ("longer", |path| File::options().write(true).open(path).unwrap().set_len(900_000).unwrap()),
        ("removed", |path| fs::remove_file(path).unwrap()),
        ("zeros", |path| fs::write(path, vec![0; fs::metadata(path).unwrap().len() as usize]).unwrap()),
    ];
    for (what, damage) in damages {
        let (family, saved) = unfinished();
        damage(&shard(&saved, 2));
        let report = again(&saved, &[]).succeeded().json();
        assert!(report["chunks_reused"].as_u64() >= Some(2), "{what}: {report}");
        finished(&family, &saved);
    }
}

#[test]
fn a_damaged_journal_is_refused_and_a_cut_one_costs_work_only() {
    let journal = |saved: &Saved| saved.path("out/.tiesmith/journal");
    // What is damaged, and whether the run can go on all the same.
    type Damage = fn(Vec<u8>) -> Vec<u8>;
    let damages: [(&str, bool, Damage); 8] = [
        ("a bit of the first record", false, |mut j| {
            j[60] ^= 1;
            j
        }),
        ("a bit of the name", false, |mut j| {
            j[0] ^= 1;
            j
        }),
        ("a record missing", false, |j| {
            let starts: Vec<usize> = (0..j.len() - 4).filter(|&at| &j[at..at + 4] == b"TSR\n").collect();
            [&j[..starts[1]], &j[starts[2]..]].concat()
        }),
        ("a bit of the last byte", true, |mut j| {
            *j.last_mut().unwrap() ^= 1;
            j
        }),
        ("the tail cut off", true, |j| j[..j.len() - 30].to_vec()),
        ("zeros behind", true, |mut j| {
            j.resize(j.len() + 5000, 0);
            j
        }),
        ("rubbish behind", true, |mut j| {
            j.extend(b"TSR\nrubbish of some length, but no record");
            j
        }),
        ("the first record only", true, |j| {
            let second = (17..j.len() - 4).find(|&at| &j[at..at + 4] == b"TSR\n").unwrap();
            j[..second].to_vec()
        }),
    ];
    for (what, goes_on, damage) in damages {
        let (family, saved) = unfinished();
        let content = fs::read(journal(&saved)).unwrap();
        fs::write(journal(&saved), damage(content)).unwrap();
        let before = tree(&saved);
        let outcome = again(&saved, &[]);
        if goes_on {
            outcome.succeeded();
        } else {
            let line = outcome.refusal();
            assert!(line.contains("journal") && line.contains("--restart"), "{what}: {line}");
            assert!(before == tree(&saved), "{what}: a refused run changed something");
            again(&saved, &["--restart"]).succeeded();
        }
        finished(&family, &saved);
    }
}

#[test]
fn foreign_files_are_never_removed() {
    let (family, saved) = unfinished();
    let note = saved.path("out/notes.txt");
    fs::write(&note, "mine").unwrap();
    again(&saved, &[]).succeeded();
    finished(&family, &saved);
    fs::write(saved.path("out/model-00009-of-00009.safetensors"), "mine").unwrap();
    again(&saved, &["--force", "--max-shard-size=10MB"]).succeeded();
    finished(&family, &saved);
    assert_eq!(fs::read_to_string(&note).unwrap(), "mine");
    assert_eq!(fs::read_to_string(saved.path("out/model-00009-of-00009.safetensors")).unwrap(), "mine");
    assert!(!shard(&saved, 1).exists(), "shards of the replaced output are left");
    // A model that somebody put beside an unfinished run is not taken for its own.
    let (_, saved) = unfinished();
    fs::write(saved.path("out/model.safetensors"), "mine").unwrap();
    for extra in [&[][..], &["--force"], &["--restart"]] {
        again(&saved, extra).refusal();
    }
    assert_eq!(fs::read_to_string(saved.path("out/model.safetensors")).unwrap(), "mine");
}

#[test]
fn a_replaced_output_loses_its_side_files_but_not_those_that_were_edited() {
    let family = family();
    let saved = family.save();
    for name in ["chat_template.jinja", "tokenizer.json", "merges.txt"] {
        fs::write(saved.base.join(name), name).unwrap();
    }
    again(&saved, &[]).succeeded();
    for name in ["chat_template.jinja", "tokenizer.json", "merges.txt"] {
        fs::remove_file(saved.base.join(name)).unwrap();
    }
    fs::write(saved.base.join("tokenizer.json"), "of the new output").unwrap();
    fs::write(saved.path("out/merges.txt"), "edited").unwrap();
    again(&saved, &["--force"]).succeeded();
    finished(&family, &saved);
    assert!(!saved.path("out/chat_template.jinja").exists(), "a stale chat template is left");
    assert_eq!(fs::read_to_string(saved.path("out/tokenizer.json")).unwrap(), "of the new output");
    assert_eq!(fs::read_to_string(saved.path("out/merges.txt")).unwrap(), "edited");
}

#[test]
fn an_interrupted_replacement_keeps_the_old_output_and_goes_on_with_force() {
    let family = family();
    let saved = family.save();
    let older = Recipe { density: 0.9, ..recipe() };
    run(merge(&saved, &older, &[])).succeeded();
    interrupted(&saved, &["--force"]);
    assert!(read_checkpoint(&saved.path("out")) == family.expected(&older).tensors, "the old output is gone");
    assert!(again(&saved, &[]).refusal().contains("--force"));
    assert!(again(&saved, &["--force"]).succeeded().json()["resumed"] == true);
    finished(&family, &saved);
}

#[test]
fn a_replacement_whose_last_record_was_lost_leaves_nothing_of_the_old_output() {
    let family = family();
    let saved = family.save();
    fs::write(saved.base.join("vocab.txt"), "of the old output").unwrap();
    again(&saved, &["--max-shard-size=100KB"]).succeeded();
    fs::remove_file(saved.base.join("vocab.txt")).unwrap();
    interrupted(&saved, &["--force"]);
    // It got as far as removing the old index: the record that says so was the last.
    fs::remove_file(saved.path("out/model.safetensors.index.json")).unwrap();
    assert!(again(&saved, &["--force"]).succeeded().json()["resumed"] == true);
    finished(&family, &saved);
    let left: Vec<_> = tree(&saved).into_keys().filter(|path| text(path).contains("of-00003")).collect();
    assert!(left.is_empty() && !saved.path("out/vocab.txt").exists(), "{left:?}");
}

/// A journal record with a right checksum, whatever it says.
fn record(number: u64, kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut record = b"TSR\n".to_vec();
    record.extend([kind, 0, 0, 0]);
    record.extend(number.to_le_bytes());
    record.extend((payload.len() as u32).to_le_bytes());
    record.extend((payload.len() as u32).to_le_bytes());
    record.extend(payload);
    let checksum = blake3::hash(&record);
    record.extend(&checksum.as_bytes()[..16]);
    record
}

/// The entry of a range of tensor 3.
fn range(tensor: u32, start: u64, count: u64, kept: &[u64], pieces: &[u32]) -> Vec<u8> {
    let mut entry = vec![2];
    entry.extend(tensor.to_le_bytes());
    entry.push(0);
    [start, count, 0, 0].iter().for_each(|n| entry.extend(n.to_le_bytes()));
    entry.extend((kept.len() as u32).to_le_bytes());
    kept.iter().for_each(|n| entry.extend(n.to_le_bytes()));
    // No survivors with the merged sign, and no ties.
    entry.extend([0u32.to_le_bytes(), 0u32.to_le_bytes()].concat());
    entry.extend((pieces.len() as u32).to_le_bytes());
    for piece in pieces {
        entry.extend(piece.to_le_bytes());
        entry.extend([0; 16]);
    }
    entry
}

#[test]
fn sound_records_that_make_no_sense_are_refused() {
    let (family, saved) = unfinished();
    let path = saved.path("out/.tiesmith/journal");
    let good = fs::read(&path).unwrap();
    let number = good.windows(4).filter(|bytes| *bytes == b"TSR\n").count() as u64;
    let before = tree(&saved);
    let nonsense: [(&str, u8, Vec<u8>); 20] = [
        ("an unknown kind", 9, Vec::new()),
        ("a second beginning", 1, b"{}".to_vec()),
        ("an unknown entry", 2, vec![99]),
        ("an entry cut off", 2, range(3, 0, 10, &[], &[40])[..30].to_vec()),
        ("no such tensor", 2, range(9, 0, 10, &[], &[40])),
        ("beyond the tensor", 2, range(3, 209_999, 10, &[], &[40])),
        ("more than there is", 2, range(3, u64::MAX, u64::MAX, &[], &[40])),
        ("nothing at all", 2, range(3, 0, 0, &[], &[])),
        ("writes that do not add up", 2, range(3, 0, 10, &[], &[39])),
        ("counts of too few models", 2, range(3, 0, 10, &[1], &[40])),
        ("more survivors than elements", 2, range(3, 0, 10, &[1, u64::MAX, 1], &[40])),
        ("a read where none are recorded", 2, [&[3][..], &[0; 32]].concat()),
        ("a search cut off", 2, [&[4][..], &[0; 20], &[9, 0, 0, 0]].concat()),
        ("votes cut off", 2, [&[6][..], &[0; 36], &[9, 0, 0, 0]].concat()),
        ("a group of a probe cut off", 2, [&[5][..], &[0; 32], &[9, 0, 0, 0]].concat()),
        ("a miss without a guess", 2, [8; 9].to_vec()),
        ("a guess about too few models", 2, [&[7, 3, 0, 0, 0, 0][..], &[0; 12]].concat()),
        ("a guess in a state that there is not", 2, [&[7, 3, 0, 0, 0, 3][..], &[0; 12]].concat()),
        ("inputs that are none", 6, b"{}".to_vec()),
        ("names that are none", 3, b"{}".to_vec()),
    ];
    for (what, kind, payload) in nonsense {
        fs::write(&path, [&good[..], &record(number, kind, &payload)].concat()).unwrap();
        let outcome = again(&saved, &[]);
        let line = outcome.refusal();
        assert!(line.contains("journal") && line.contains("--restart"), "{what}: {line}");
        fs::write(&path, &good).unwrap();
        assert!(before == tree(&saved), "{what}: a refused run changed something");
    }
    // A range that is not what was written is done again, and so is one whose bytes are not there.
    let absent = record(number, 2, &range(3, 0, 10, &[], &[40]));
    // So is a search that has counted something else.
    let numbers =
        [&[0; 20][..], &5u64.to_le_bytes(), &7u64.to_le_bytes(), &[1, 0, 0, 0, 0, 0, 0, 0], &9u64.to_le_bytes()];
    let state = [0, 5, 0, 0, 0, 1, 7, 7, 7, 7];
    let search = record(number + 1, 2, &[&[4, 3, 0, 0, 0][..], &numbers.concat(), &state].concat());
    fs::write(&path, [good, absent, search].concat()).unwrap();
    again(&saved, &[]).succeeded();
    finished(&family, &saved);
}
