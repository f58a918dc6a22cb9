//! A repair that is disturbed anywhere leaves every file as it was or repaired, and the same command then ends it.

use std::collections::BTreeMap;
use std::sync::Arc;

use tiesmith::{Error, Manifest, Plan, Recipe, Run, Schedule, Scope, Storage};

use super::memory::{Memory, Survives, every_fault};
use super::{Job, KINDS, OUT, STEP, Silent, recipe, say};

/// `tiesmith verify --repair`.
fn repair(memory: &Memory) -> Result<bool, Error> {
    let storage: Arc<dyn Storage> = Arc::new(memory.clone());
    let report = tiesmith::verify(OUT.as_ref(), 1, &storage, &Silent)?;
    if report.intact {
        return Ok(false);
    }
    let manifest = Manifest::read(format!("{OUT}/tiesmith.json").as_ref(), &*storage)?;
    let mut plan = Plan::new(&manifest.recipe(&*storage), &storage)?;
    manifest.admit(&mut plan)?;
    let schedule = Schedule::new(&plan, Run::new(40 << 20, 1))?;
    let damaged: Vec<String> = report.damaged.into_iter().map(|file| file.name).collect();
    tiesmith::repair(&manifest, &damaged, &plan, &schedule, OUT.as_ref(), &storage, &Silent).map(|()| true)
}

/// All files but those of the work directory, by content.
fn files(memory: &Memory) -> BTreeMap<String, Vec<u8>> {
    let files = memory.tree(OUT).into_iter().filter(|(name, _)| !name.starts_with(".tiesmith/"));
    files.map(|(name, (_, data))| (name, data)).collect()
}

#[test]
fn a_repair_that_is_disturbed_anywhere_can_be_run_again() {
    let mut cases = 0;
    for recipe in [recipe(), Recipe { scope: Scope::Tensor, ..recipe() }] {
        let job = Job { name: "to be damaged", recipe, force: false, copied: false, far: false };
        let memory = job.before();
        job.run(&memory).unwrap();
        let memory = memory.reboot(Survives::All);
        let whole = files(&memory);
        let shard = whole.keys().find(|name| name.starts_with("model-00002")).unwrap().clone();
        let mut bytes = whole[&shard].clone();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        memory.put(&format!("{OUT}/{shard}"), &bytes);
        memory.put(&format!("{OUT}/config.json"), b"{}");
        let damaged = files(&memory);
        let undisturbed = memory.fork(None);
        assert!(repair(&undisturbed).unwrap() && files(&undisturbed) == whole);
        let (operations, changes) = undisturbed.counts();
        let faults = every_fault(operations, changes, |at| [KINDS[at as usize % KINDS.len()]; 2]);
        for (at, fault, survives) in faults.into_iter().step_by(STEP) {
            let what = format!("{fault:?} {at} of {changes} or {operations}, survives {survives:?}");
            let disturbed = memory.fork(Some((at, fault)));
            let _ = repair(&disturbed);
            let disturbed = disturbed.reboot(survives);
            for (name, found) in files(&disturbed) {
                assert!(found == whole[&name] || found == damaged[&name], "{what}: {name} is neither");
            }
            repair(&disturbed).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert!(files(&disturbed) == whole, "{what}: not repaired");
            cases += 1;
        }
    }
    say(&format!("{cases} repairs disturbed"));
    assert!(cases > 500 / STEP, "{cases}");
}
