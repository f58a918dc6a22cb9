//! Output bytes do not depend on where inputs are, nor on threads and memory: for every method, from a disk and from an object
//! store.

use std::sync::Arc;

use tiesmith::{METHODS, OutputOptions, Plan, Recipe, Run, Schedule, Scope, Statistics, Storage};

use super::memory::Memory;
use super::*;

/// The output of a merge on a disk with inputs `before`, but for what names them; with the least memory that works if none is
/// given.
fn merged(recipe: &Recipe, before: &Memory, threads: usize, mebibytes: Option<u64>) -> BTreeMap<String, Vec<u8>> {
    let memory = before.fork(None);
    let storage: Arc<dyn Storage> = Arc::new(memory.clone());
    let plan = Plan::new(recipe, &storage).unwrap();
    let bytes = mebibytes.map_or_else(|| Schedule::smallest_memory(&plan), |mebibytes| mebibytes << 20);
    let schedule = Schedule::with_spool(&plan, Run::new(bytes, threads)).unwrap();
    let output = OutputOptions { dir: OUT.into(), ..OutputOptions::default() };
    tiesmith::merge(&plan, &schedule, &output, &storage, &Silent).unwrap();
    let mut files = lasting(&memory.tree(OUT));
    files.retain(|name, _| !["tiesmith.json", "README.md"].contains(&&**name));
    files
}

#[test]
fn where_inputs_are_and_how_a_run_is_done_changes_no_byte() {
    let mut cases = 0;
    for method in METHODS {
        let name = method.name();
        let mut recipe = match method.statistics() {
            Some(_) => described(name),
            None => Recipe { method: name.into(), max_shard_bytes: 1 << 30, ..recipe() },
        };
        recipe.models.truncate(method.models().1);
        if !method.needs_base() {
            recipe.base = None;
        }
        let before = if method.statistics() == Some(Statistics::Gram) { inputs() } else { large_inputs() };
        // Fisher information is nowhere negative, and neither are these models.
        if method.statistics() == Some(Statistics::Fisher) {
            recipe.models.iter_mut().for_each(|model| model.fisher = Some(model.source.clone()));
        }
        let scopes = if method.trims() { &[Scope::Model, Scope::Tensor][..] } else { &[Scope::Model] };
        for &scope in scopes {
            let near = Recipe { scope, ..recipe.clone() };
            let expected = merged(&near, &before, 2, Some(256));
            let (far, there) = (far(near.clone()), before.fork(None).moved(DISK, STORE));
            for (threads, mebibytes) in [(1, None), (3, Some(128))] {
                for (place, recipe, before) in [("a disk", &near, &before), ("a store", &far, &there)] {
                    let found = merged(recipe, before, threads, mebibytes);
                    assert!(found == expected, "{name} {scope:?}, {threads} threads, {mebibytes:?}, inputs in {place}");
                    cases += 1;
                }
            }
        }
    }
    say(&format!("{cases} merges from a disk and a store"));
    assert!(cases >= 4 * METHODS.len(), "{cases}");
}
