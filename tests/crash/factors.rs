//! Merges of adapters into an adapter: what a kill costs, counted in bytes that are read again.

use std::sync::{Arc, Mutex};

use tiesmith::{Observer, Recipe, Scope, Storage, TrimTies, Value};

use super::memory::{Fault, Memory, Survives};
use super::{DISK, Job, OUT, STEP, changes, inputs, lasting, say};

/// Notes how much was read of the inputs when the first stage began, when the modules' turn came, and after each of them.
struct Watch {
    memory: Memory,
    seen: Mutex<(Option<u64>, Vec<u64>)>,
}

impl Watch {
    fn new(memory: &Memory) -> Self {
        Self { memory: memory.clone(), seen: Mutex::default() }
    }

    /// Bytes read before the first module, but for what any run reads; bytes read of each module.
    fn read(&self) -> (u64, Vec<u64>) {
        let (first, marks) = &*self.seen.lock().unwrap();
        let modules = marks.windows(2).map(|pair| pair[1] - pair[0]).collect();
        (marks[0] - first.unwrap(), modules)
    }
}

impl Observer for Watch {
    fn stage(&self, name: &str, _bytes: u64) {
        let (first, marks) = &mut *self.seen.lock().unwrap();
        let read = self.memory.bytes_read(DISK);
        first.get_or_insert(read);
        if name == "factor" {
            marks.push(read);
        }
    }

    fn advance(&self, _bytes: u64) {
        let (_, marks) = &mut *self.seen.lock().unwrap();
        if !marks.is_empty() {
            marks.push(self.memory.bytes_read(DISK));
        }
    }
}

/// How many thresholds, and then modules, the journal of `memory` knows.
pub(super) fn known_in(memory: &Memory) -> usize {
    let storage: Arc<dyn Storage> = Arc::new(memory.fork(None));
    let path = format!("{OUT}/.tiesmith/journal");
    if !storage.is_file(path.as_ref()) {
        return 0;
    }
    let decoded = tiesmith::fuzz::decode_journal(path.as_ref(), &*storage).unwrap();
    decoded.map_or(0, |decoded| decoded.units as usize)
}

/// Thresholds that the journal knows are not searched again, and of modules only those are merged that it does not know:
/// wherever the process or the machine dies.
#[test]
fn a_kill_in_the_merge_pass_repeats_the_module_at_hand_and_nothing_else() {
    let mut votes = Recipe { trim_ties: TrimTies::Lowest, ..changes() };
    votes.params.insert("zero_sum".into(), Value::Word("majority".into()).into());
    let kinds = [
        ("ties by position", Recipe { trim_ties: TrimTies::Lowest, ..changes() }, 1),
        ("by tensor", Recipe { scope: Scope::Tensor, ..changes() }, 2),
        ("a vote", votes, 1),
        ("outliers", Recipe { method: "breadcrumbs".into(), ..changes() }, 1),
    ];
    let (mut cases, mut known, mut done) = (0, 0, 0);
    for (name, recipe, units) in kinds {
        let job = Job { name, recipe, force: false, copied: false, far: false };
        let run = |memory: &Memory| {
            let watch = Watch::new(memory);
            let result = job.run_with(memory, 1, 36 << 20, &watch);
            (result, watch)
        };
        let memory = inputs();
        let (result, watch) = run(&memory);
        result.unwrap();
        let (searching, modules) = watch.read();
        // The modules' factors are in memory still.
        assert!(searching > 0 && modules.len() == 2, "{searching} {modules:?}");
        let (expected, (_, changes)) = (lasting(&memory.tree(OUT)), memory.counts());
        for at in (1..=changes).step_by(STEP) {
            let fault = [Fault::CrashBefore, Fault::CrashIn][at as usize / STEP % 2];
            for survives in [Survives::All, Survives::Nothing, Survives::Mixed(at)] {
                let what = format!("{name}: {fault:?} {at} of {changes}, {survives:?}");
                let memory = inputs().fork(Some((at, fault)));
                let _ = run(&memory);
                let memory = memory.reboot(survives);
                let found = known_in(&memory);
                let (result, watch) = run(&memory);
                cases += 1;
                match result {
                    Ok(_) => assert!(lasting(&memory.tree(OUT)) == expected, "{what}"),
                    Err(error) => {
                        assert!(error.to_string().contains("a finished merge is already there"), "{what}: {error}");
                        continue;
                    }
                }
                if found < units || watch.seen.lock().unwrap().1.is_empty() {
                    continue;
                }
                let finished = found - units;
                let (searching, read) = watch.read();
                assert_eq!(searching, 0, "{what}: searched again");
                assert!(read[..finished].iter().all(|read| *read == 0), "{what}: merged again: {read:?}");
                assert!(read.get(finished).is_none_or(|read| *read > 0), "{what}: {read:?} with {found} entries");
                (known, done) = (known + 1, done + finished);
            }
        }
    }
    say(&format!("{cases} merges into adapters killed, {known} of them with thresholds, {done} modules taken over"));
    assert!(known > 60 / STEP && done > 60 / STEP, "{known} of {cases}, {done}");
}
