//! A merge in parts that is disturbed anywhere: the same commands, run again, give the output of a merge in one piece.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;
use tiesmith::{Error, Job, OutputOptions, Part, Plan, Recipe, Run, Schedule, Scope, Storage, TrimTies};

use super::memory::{Fault, Memory, Survives};
use super::{KINDS, OUT, STEP, Silent, inputs, recipe, say};

const PARTS: usize = 2;
const RUN: Run = Run::new(40 << 20, 1);

struct InParts {
    recipe: Recipe,
    job: Job,
    before: Memory,
}

impl InParts {
    /// Planned over what is on the disk `before`.
    fn new(recipe: Recipe, force: bool, before: Memory) -> Self {
        let storage: Arc<dyn Storage> = Arc::new(before.fork(None));
        let plan = Plan::new(&recipe, &storage).unwrap();
        let schedule = Schedule::new(&plan, RUN).unwrap();
        let output = OutputOptions { dir: OUT.into(), force, ..OutputOptions::default() };
        Self { job: Job::new(&plan, &schedule, &output).unwrap(), recipe, before }
    }

    /// Every part, then the end.
    fn run(&self, memory: &Memory) -> Result<(), Error> {
        let storage: Arc<dyn Storage> = Arc::new(memory.clone());
        for index in 0..PARTS {
            let plan = Plan::new(&self.recipe, &storage)?;
            tiesmith::run_part(&plan, &self.job, Part { index, count: PARTS }, None, RUN, &storage, &Silent)?;
        }
        let plan = Plan::new(&self.recipe, &storage)?;
        tiesmith::finish(&plan, &self.job, RUN, &storage, &Silent).map(drop)
    }
}

/// What does not depend on how it was done.
fn lasting(memory: &Memory) -> BTreeMap<String, Vec<u8>> {
    let mut files = super::lasting(&memory.tree(OUT));
    if let Some(manifest) = files.get_mut("tiesmith.json") {
        let mut value: Value = serde_json::from_slice(manifest).unwrap();
        value["report"].as_object_mut().unwrap().remove("bytes_read").unwrap();
        value["run"].take();
        *manifest = value.to_string().into_bytes();
    }
    files
}

#[test]
fn a_merge_in_parts_that_is_disturbed_anywhere_ends_the_same() {
    let lowest = Recipe { trim_ties: TrimTies::Lowest, ..recipe() };
    let per_tensor = Recipe { scope: Scope::Tensor, ..recipe() };
    let mut cases = 0;
    for (merged, force) in [(lowest, false), (per_tensor, false), (recipe(), true)] {
        let piece = super::Job { name: "in one piece", recipe: merged.clone(), force, copied: false, far: false };
        let before = piece.before();
        let whole = before.fork(None);
        piece.run(&whole).unwrap();
        let (expected, older) = (lasting(&whole), super::lasting(&before.tree(OUT)));
        let parts = InParts::new(merged, force, before);
        let undisturbed = parts.before.fork(None);
        parts.run(&undisturbed).unwrap();
        assert!(lasting(&undisturbed) == expected, "in parts it is another");
        let (operations, changes) = undisturbed.counts();
        let mut faults: Vec<(u64, Fault, Survives)> = Vec::new();
        for at in 1..=changes {
            for (number, survives) in Survives::EACH.into_iter().enumerate() {
                faults.push((at, [Fault::CrashBefore, Fault::CrashIn][(number + at as usize) % 2], survives));
            }
        }
        for at in 1..=operations {
            let kind = KINDS[at as usize % KINDS.len()];
            faults.push((at, [Fault::Once(kind), Fault::FromHere(kind)][at as usize % 2], Survives::All));
        }
        for (at, fault, survives) in faults.into_iter().step_by(3 * STEP - 2) {
            let what = format!("{fault:?} {at} of {changes} or {operations}, survives {survives:?}");
            let memory = parts.before.fork(Some((at, fault)));
            let outcome = parts.run(&memory);
            let memory = memory.reboot(survives);
            let there = memory.tree(OUT);
            let loadable = there.keys().any(|name| name == "model.safetensors.index.json");
            let is = |files: &BTreeMap<String, Vec<u8>>| {
                let same = |(name, data): (&String, &Vec<u8>)| there.get(name).is_some_and(|(_, found)| found == data);
                files.iter().filter(|(name, _)| *name != "tiesmith.json").all(same)
            };
            assert!(!loadable || is(&expected) || force && is(&older), "{what}: looks like a model");
            if outcome.is_err() {
                parts.run(&memory).unwrap_or_else(|error| panic!("{what}: {error}"));
            }
            let found = lasting(&memory);
            let files = |files: &BTreeMap<String, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
            if outcome.is_err() {
                assert_eq!(files(&found), files(&expected), "{what}");
            }
            for (name, data) in &expected {
                assert!(found.get(name) == Some(data), "{what}: {name} differs; there are {:?}", files(&found));
            }
            cases += 1;
        }
    }
    say(&format!("{cases} merges in parts disturbed"));
    assert!(cases > 2000 / STEP, "{cases}");
}

#[test]
fn an_input_of_a_part_that_was_changed_is_refused() {
    let parts = InParts::new(recipe(), false, inputs());
    let memory = parts.before.fork(None);
    memory.put("/in/one/model.safetensors", &super::checkpoint(9));
    let error = parts.run(&memory).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("/in/one/model.safetensors"), "{error}");
    assert!(memory.tree(OUT).is_empty());
}
