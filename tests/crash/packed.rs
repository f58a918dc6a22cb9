//! Packing that fails or dies leaves no file that looks packed and is not; the same command then goes on with what was packed.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use tiesmith::{Error, Observer, PackOutput, PackReport, Plan, Recipe, Run, Scope, Storage, TrimTies};

use super::memory::{Fault, Memory, Survives, every_fault};
use super::{KINDS, OUT, STEP, Silent, StopAfter, inputs, large_inputs, say};

/// What is done is kept after every chunk.
const RUN: Run = Run { keep_after: Duration::ZERO, ..Run::new(96 << 20, 1) };

/// How a checkpoint is packed.
#[derive(Clone, Copy, Debug)]
struct Way {
    density: f64,
    scope: Scope,
    ties: TrimTies,
    force: bool,
}

const WHOLE: Way = Way { density: 1.0, scope: Scope::Model, ties: TrimTies::Keep, force: false };
const WAYS: [Way; 4] = [
    WHOLE,
    Way { density: 0.2, ..WHOLE },
    Way { density: 0.2, scope: Scope::Tensor, ..WHOLE },
    Way { density: 0.3, ties: TrimTies::Lowest, force: true, ..WHOLE },
];

impl Way {
    fn run(self, memory: &Memory, run: Run, observer: &dyn Observer) -> Result<PackReport, Error> {
        let storage: Arc<dyn Storage> = Arc::new(memory.clone());
        let recipe =
            Recipe { scope: self.scope, trim_ties: self.ties, ..Recipe::packing("/in/one", "/in/base", self.density) };
        let plan = Plan::new(&recipe, &storage)?;
        let output = PackOutput { file: format!("{OUT}/one.tvz").into(), force: self.force };
        tiesmith::pack(&plan, run, &output, &storage, observer)
    }

    fn pack(self, memory: &Memory) -> Result<PackReport, Error> {
        self.run(memory, RUN, &Silent)
    }

    /// Operations and changes of an undisturbed run, the file that it gives, and its report.
    fn undisturbed(self, before: &Memory) -> ((u64, u64), Vec<u8>, PackReport) {
        let memory = before.fork(None);
        let report = self.pack(&memory).unwrap();
        let counts = memory.counts();
        assert_eq!(memory.tree(OUT).keys().collect::<Vec<_>>(), ["one.tvz"]);
        let file = packed(&memory).unwrap();
        (counts, file, report)
    }
}

fn packed(memory: &Memory) -> Option<Vec<u8>> {
    memory.tree(OUT).get("one.tvz").map(|(_, data)| data.clone())
}

/// Runs the same command again, where there is something to do: the file is the expected one, and nothing else is left.
/// Returns whether work was taken over.
fn finish(way: Way, memory: &Memory, expected: &[u8], once: &PackReport, what: &str) -> bool {
    let names = |memory: &Memory| memory.tree(OUT).into_keys().collect::<Vec<_>>();
    assert!(packed(memory).is_none_or(|found| found == expected), "{what}: not what was packed");
    let done = packed(memory).is_some() && !names(memory).contains(&"one.tvz.journal".to_owned());
    if done && !way.force {
        let error = way.pack(memory).unwrap_err();
        assert!(error.to_string().contains("already there"), "{what}: {error}");
        return false;
    }
    let report = way.pack(memory).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(packed(memory).as_deref() == Some(expected), "{what}: packed again, but otherwise");
    assert_eq!(names(memory), ["one.tvz"], "{what}");
    let sums = |report: &PackReport| (report.bytes_written, report.stored_fraction);
    assert_eq!(sums(&report), sums(once), "{what}");
    report.resumed
}

#[test]
fn packing_that_is_disturbed_anywhere_ends_the_same() {
    let (mut cases, mut resumed) = (0, 0);
    for way in WAYS {
        let ((operations, changes), expected, once) = way.undisturbed(&inputs());
        let faults = every_fault(operations, changes, |_| [ErrorKind::StorageFull, ErrorKind::Other]);
        for (at, fault, survives) in faults.into_iter().step_by(STEP) {
            let what = format!("{way:?}, at {at}, {fault:?}, survives {survives:?}");
            let memory = inputs().fork(Some((at, fault)));
            let outcome = way.pack(&memory);
            let memory = memory.reboot(survives);
            // What an ended run called done is there, unless the machine died on the way.
            let crashed = matches!(fault, Fault::CrashBefore | Fault::CrashIn);
            assert!(outcome.is_err() || crashed || packed(&memory).is_some(), "{what}: done, but nothing there");
            resumed += usize::from(finish(way, &memory, &expected, &once, &what));
            cases += 1;
        }
    }
    say(&format!("{cases} packings disturbed, {resumed} of them with work taken over"));
    assert!(cases > 1000 / STEP && resumed > cases / 4, "{cases}, {resumed}");
}

#[test]
fn packing_that_is_disturbed_while_it_recovers_ends_the_same() {
    let (mut cases, mut resumed) = (0, 0);
    for way in WAYS {
        let ((_, changes), expected, once) = way.undisturbed(&inputs());
        for first in (1..=changes).step_by(2 * STEP) {
            let survives = Survives::EACH[first as usize / (2 * STEP) % Survives::EACH.len()];
            let memory = inputs().fork(Some((first, Fault::CrashBefore)));
            let _ = way.pack(&memory);
            let crashed = memory.reboot(survives);
            let undisturbed = crashed.fork(None);
            let _ = way.pack(&undisturbed);
            let (operations, changes) = undisturbed.counts();
            let crashes = (1..=changes).map(|at| (at, Fault::CrashIn));
            let errors = (1..=operations).map(|at| (at, Fault::Once(KINDS[at as usize % KINDS.len()])));
            for (number, (at, fault)) in crashes.chain(errors).step_by(3 * STEP).enumerate() {
                let survives = Survives::EACH[number % Survives::EACH.len()];
                let what = format!("{way:?}, crashed before {first}, then at {at} {fault:?}, survives {survives:?}");
                let memory = crashed.fork(Some((at, fault)));
                let _ = way.pack(&memory);
                let memory = memory.reboot(survives);
                resumed += usize::from(finish(way, &memory, &expected, &once, &what));
                cases += 1;
            }
        }
    }
    say(&format!("{cases} packings disturbed twice, {resumed} of them with work taken over"));
    assert!(cases > 500 / STEP.pow(2) && resumed > cases / 4, "{cases}, {resumed}");
}

/// A checkpoint and its base, of one bfloat16 tensor of six chunks.
fn six_chunks() -> Memory {
    let elements = 1_400_001u32;
    let header = format!(r#"{{"w":{{"dtype":"BF16","shape":[{elements}],"data_offsets":[0,{}]}}}}"#, 2 * elements);
    let memory = Memory::default();
    for (seed, name) in (0u32..).zip(["base", "one"]) {
        let value = |i: u32| (i.wrapping_mul(2_654_435_761 + 2 * seed) >> 20) as u16 | 0x3000;
        let data: Vec<u8> = (0..elements).flat_map(|i| value(i).to_le_bytes()).collect();
        let content = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
        memory.put(&format!("/in/{name}/model.safetensors"), &content);
    }
    memory
}

/// Chunks that several workers write in any order, some behind gaps: what is recorded of them is there, wherever it ends.
#[test]
fn packing_by_several_workers_that_is_disturbed_ends_the_same() {
    let run = Run { keep_after: Duration::ZERO, ..Run::new(120 << 20, 3) };
    let (before, mut cases, mut resumed) = (six_chunks(), 0, 0);
    for way in [WHOLE, Way { density: 0.3, ties: TrimTies::Lowest, ..WHOLE }] {
        // One worker gives the same.
        let ((operations, changes), expected, once) = way.undisturbed(&before);
        let faults = every_fault(operations, changes, |at| [KINDS[at as usize % KINDS.len()], ErrorKind::Other]);
        for (at, fault, survives) in faults.into_iter().step_by(2 * STEP + 1) {
            let what = format!("{way:?}, three workers, at {at}, {fault:?}, survives {survives:?}");
            let memory = before.fork(Some((at, fault)));
            let _ = way.run(&memory, run, &Silent);
            let memory = memory.reboot(survives);
            // Another crash on the way back, where there is a way back.
            let again = memory.fork(Some((at / 2 + 2, Fault::CrashIn)));
            let _ = way.run(&again, run, &Silent);
            resumed += usize::from(finish(way, &again.reboot(survives), &expected, &once, &what));
            cases += 1;
        }
    }
    say(&format!("{cases} packings by several workers disturbed, {resumed} of them with work taken over"));
    assert!(cases > 400 / STEP && resumed > cases / 4, "{cases}, {resumed}");
}

/// However soon each attempt is stopped: thresholds, ties and chunks are kept, and what is read is not more in the end.
#[test]
fn packing_that_never_gets_far_gets_through() {
    let before = large_inputs();
    for way in WAYS {
        let run = Run { memory_bytes: 30 << 20, ..RUN };
        let memory = before.fork(None);
        let once = way.run(&memory, run, &Silent).unwrap();
        let expected = packed(&memory).unwrap();
        let memory = before.fork(None);
        let mut stops = 0;
        let report = loop {
            // Each checks what the ones before it did first.
            let patience = if way.density < 1.0 { 40 } else { 3 } + stops;
            match way.run(&memory, run, &StopAfter(AtomicI64::new(patience))) {
                Ok(report) => break report,
                Err(error) => assert_eq!(error.exit_code(), 130, "{error}"),
            }
            stops += 1;
            assert!(stops < 200, "{way:?} gets nowhere");
        };
        say(&format!("{way:?} got through after {stops} stops"));
        assert!(stops > 1 && report.resumed, "{way:?}: {stops}");
        assert!(way.density < 1.0 || report.chunks_reused > 0, "{way:?}");
        assert_eq!(report.bytes_read, once.bytes_read, "{way:?}");
        assert!(packed(&memory).unwrap() == expected, "{way:?}: not what was packed");
    }
}

/// Stops the run when it asks for the second time while it counts ties.
struct StopInCount(AtomicI64);

impl Observer for StopInCount {
    fn stage(&self, name: &str, _: u64) {
        self.0.store(if name == "count ties" { 1 } else { i64::MAX }, Ordering::Relaxed);
    }

    fn stopped(&self) -> bool {
        let asked = self.0.load(Ordering::Relaxed);
        asked != i64::MAX && self.0.fetch_sub(1, Ordering::Relaxed) <= 0
    }
}

#[test]
fn ties_are_counted_a_chunk_at_a_time() {
    let (way, run) = (WAYS[3], Run { memory_bytes: 30 << 20, ..RUN });
    let memory = large_inputs().fork(None);
    way.run(&memory, run, &Silent).unwrap();
    let expected = packed(&memory).unwrap();
    let memory = large_inputs().fork(None);
    let mut stops = 0;
    while let Err(error) = way.run(&memory, run, &StopInCount(AtomicI64::new(i64::MAX))) {
        assert_eq!(error.exit_code(), 130, "{error}");
        stops += 1;
        assert!(stops < 20, "it gets nowhere");
    }
    assert!(stops > 2 && packed(&memory).unwrap() == expected, "{stops} stops");
}

#[test]
fn damage_to_what_was_packed_never_reaches_the_file() {
    let way = WAYS[1];
    let ((_, changes), expected, once) = way.undisturbed(&inputs());
    let memory = inputs().fork(Some((changes - 3, Fault::CrashBefore)));
    way.pack(&memory).unwrap_err();
    let left: BTreeMap<String, (u64, Vec<u8>)> = memory.reboot(Survives::All).tree(OUT);
    let put = |name: &str, content: &[u8]| {
        let memory = inputs().fork(None);
        left.iter().for_each(|(name, (_, content))| memory.put(&format!("{OUT}/{name}"), content));
        memory.put(&format!("{OUT}/{name}"), content);
        memory
    };
    let partial = &left["one.tvz.partial"].1;
    let mut kept = 0;
    for at in (0..partial.len()).step_by(97) {
        let mut content = partial.clone();
        content[at] ^= 4;
        let damaged = put("one.tvz.partial", &content);
        kept += usize::from(finish(way, &damaged, &expected, &once, &format!("damaged at {at}")));
        let cut = put("one.tvz.partial", &partial[..at]);
        finish(way, &cut, &expected, &once, &format!("cut at {at}"));
    }
    assert!(kept > 10, "{kept}");
    let journal = &left["one.tvz.journal"].1;
    let mut refused = 0;
    for at in 0..journal.len() {
        let cut = put("one.tvz.journal", &journal[..at]);
        finish(way, &cut, &expected, &once, &format!("the journal cut at {at}"));
        let mut content = journal.clone();
        content[at] ^= 4;
        let damaged = put("one.tvz.journal", &content);
        match way.pack(&damaged) {
            Ok(_) => assert!(packed(&damaged).unwrap() == expected, "the journal damaged at {at}"),
            Err(error) => {
                assert!(error.exit_code() == 2 && error.to_string().contains("--force"), "{error}");
                refused += 1;
                assert_eq!(damaged.tree(OUT)["one.tvz.journal"].1, content, "a refused run changed something");
                let forced = Way { force: true, ..way };
                assert!(!finish(forced, &damaged, &expected, &once, "forced"));
            }
        }
    }
    assert!(refused > journal.len() / 2, "{refused}");
}

#[test]
fn another_packing_is_not_gone_on_with() {
    let way = WAYS[1];
    let ((_, changes), ..) = way.undisturbed(&inputs());
    let memory = inputs().fork(Some((changes - 3, Fault::CrashBefore)));
    way.pack(&memory).unwrap_err();
    let memory = memory.reboot(Survives::All);
    let other = Way { density: 0.5, ..way };
    let before = memory.tree(OUT);
    let error = other.pack(&memory).unwrap_err().to_string();
    assert!(
        error.contains("one.tvz: the unfinished packing is another one") && error.contains("was 0.2, now 0.5"),
        "{error}"
    );
    assert!(error.contains("use --force to start over"), "{error}");
    assert_eq!(memory.tree(OUT).into_iter().filter(|(name, _)| !name.ends_with(".lock")).collect::<Vec<_>>(), {
        before.into_iter().filter(|(name, _)| !name.ends_with(".lock")).collect::<Vec<_>>()
    });
    let forced = Way { force: true, ..other };
    let (_, expected, once) = forced.undisturbed(&inputs());
    assert!(!finish(forced, &memory, &expected, &once, "forced"));
}
