//! The same for a look at a family: crashes and errors at every operation, and stops.

use super::*;
use tiesmith::Study;

fn look(memory: &Memory, observer: &dyn Observer) -> Result<bool, Error> {
    look_with(Scope::Tensor, memory, Run::new(256 << 20, 1), observer).map(|report| report.tensors_reused > 0)
}

fn look_with(
    scope: Scope,
    memory: &Memory,
    run: Run,
    observer: &dyn Observer,
) -> Result<tiesmith::AnalysisReport, Error> {
    let storage: Arc<dyn Storage> = Arc::new(memory.clone());
    let plan = Plan::new(&Recipe { scope, ..recipe() }, &storage)?;
    let study = Study::new(plan, &[0.1, 0.5], run)?;
    let output = OutputOptions { dir: OUT.into(), ..OutputOptions::default() };
    tiesmith::analyze(&study, &output, &storage, observer)
}

fn files(memory: &Memory) -> BTreeMap<String, Vec<u8>> {
    let lasting = memory.tree(OUT).into_iter().filter(|(name, _)| !name.starts_with(".tiesmith/"));
    lasting.map(|(name, (_, data))| (name, data)).collect()
}

/// Runs again, which must succeed unless all was done, and compares.
fn finish(memory: &Memory, expected: &BTreeMap<String, Vec<u8>>, what: &str) -> bool {
    if let Some(report) = files(memory).get("report.json") {
        assert!(*report == expected["report.json"], "{what}: a report that is not one");
    }
    let reused = match look(memory, &Silent) {
        Ok(reused) => reused,
        Err(error) if error.to_string().contains("a finished analysis is already there") => false,
        Err(error) => panic!("{what}: {error}"),
    };
    let found = files(memory);
    assert!(found.keys().eq(expected.keys()), "{what}: {:?}", found.keys());
    expected.iter().for_each(|(name, data)| assert!(found[name] == *data, "{what}: {name} differs"));
    reused
}

/// A tensor that is not held in memory is measured once, however the look is cut and wherever it is stopped: what is read again
/// are the chunks at hand.
#[test]
fn a_look_that_is_stopped_goes_on_in_the_middle_of_a_tensor() {
    let before = large_inputs();
    let inputs = 3 * 6_000_004;
    let run = |mebibytes: u64, threads| Run { keep_after: Duration::ZERO, ..Run::new(mebibytes << 20, threads) };
    let (mut stops, mut within) = (0, 0);
    for scope in [Scope::Model, Scope::Tensor] {
        let memory = before.fork(None);
        let all = look_with(scope, &memory, run(48, 1), &Silent).unwrap().bytes_read;
        let expected = files(&memory);
        for (number, patience) in (20..).step_by(2 * STEP).enumerate() {
            let memory = before.fork(None);
            let (first, second) = if number % 2 == 0 { ((48, 1), (60, 2)) } else { ((60, 2), (48, 1)) };
            let observer = StopAfter(AtomicI64::new(patience));
            if look_with(scope, &memory, run(first.0, first.1), &observer).is_ok() {
                break;
            }
            let read = memory.bytes_read(DISK);
            let memory = memory.reboot(Survives::Nothing);
            let again = look_with(scope, &memory, run(second.0, second.1), &Silent).unwrap().bytes_read;
            assert!(files(&memory) == expected, "{scope:?}, stopped after {patience}: another report");
            // A chunk of every worker, or a group of the probe.
            assert!(read + again < all + inputs / 3, "{scope:?} {patience}: {read} and {again} bytes of {all}");
            stops += 1;
            within += usize::from(again < inputs * 9 / 10);
        }
    }
    say(&format!("{stops} looks stopped, {within} of them while they measured"));
    assert!(stops > 40 / STEP && within > 4 / STEP, "{stops} {within}");
}

#[test]
fn a_look_that_is_disturbed_anywhere_ends_the_same() {
    let before = inputs();
    let memory = before.fork(None);
    look(&memory, &Silent).unwrap();
    let expected = files(&memory);
    let (operations, changes) = memory.counts();
    let mut cases = 0;
    for at in (1..=changes + 3).step_by(STEP) {
        for fault in [Fault::CrashBefore, Fault::CrashIn] {
            let memory = before.fork(Some((at, fault)));
            let outcome = look(&memory, &Silent);
            for survives in Survives::EACH {
                if outcome.is_ok() && survives != Survives::All {
                    continue;
                }
                finish(&memory.reboot(survives), &expected, &format!("{fault:?} {at}, {survives:?}"));
                cases += 1;
            }
        }
    }
    for at in (1..=operations).step_by(STEP) {
        for fault in [Fault::Once(ErrorKind::StorageFull), Fault::FromHere(ErrorKind::PermissionDenied)] {
            let memory = before.fork(Some((at, fault)));
            let _ = look(&memory, &Silent);
            finish(&memory.reboot(Survives::All), &expected, &format!("operation {at}, {fault:?}"));
            cases += 1;
        }
    }
    let mut reused = 0;
    for asked in 0..20 {
        let memory = before.fork(None);
        if look(&memory, &StopAfter(AtomicI64::new(asked))).is_err() {
            reused += u32::from(finish(&memory.reboot(Survives::All), &expected, &format!("stopped after {asked}")));
        }
    }
    say(&format!("{cases} looks disturbed"));
    assert!(cases > 500 / STEP, "{cases}");
    assert!(reused > 0, "nothing was taken over after a stop");
}
