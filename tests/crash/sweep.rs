//! A sweep that is interrupted, or fails, goes on and gives what an undisturbed one gives.

use std::collections::BTreeMap;
use std::sync::Arc;

use tiesmith::{
    Downloads, Error, OutputOptions, Plan, Recipe, Run, Scope, Storage, SweepOptions, SweepReport, TrimTies, Variant,
};

use super::memory::{Fault, Memory, Survives};
use super::{KINDS, OUT, STEP, Silent, inputs, lasting_below, recipe, say};

fn sweep(base: &Recipe, packed: bool, memory: &Memory) -> Result<SweepReport, Error> {
    let storage: Arc<dyn Storage> = Arc::new(memory.clone());
    let mut recipes = vec![base.clone()];
    for (density, lambda) in [(0.2, 1.0), (0.2, 0.5), (0.6, 1.0)] {
        let mut recipe = base.clone();
        recipe.set_everywhere("density", tiesmith::Value::Number(density));
        recipe.set_everywhere("lambda", tiesmith::Value::Number(lambda));
        recipes.push(recipe);
    }
    let mut plans = Plan::all(&recipes, &storage)?.into_iter();
    let union = plans.next().unwrap();
    let variant = |(number, plan)| Variant { name: format!("v{number}"), settings: Vec::new(), plan };
    let variants: Vec<Variant> = plans.enumerate().map(variant).collect();
    let output = OutputOptions { dir: OUT.into(), ..OutputOptions::default() };
    let options = SweepOptions { output, packed, downloads: Downloads::default() };
    tiesmith::sweep(union, &variants, Run::new(96 << 20, 1), &options, &storage, &Silent)
}

/// Goes on after `fault` at operation or change `at`, and compares.
fn disturbed(
    (base, packed): (&Recipe, bool),
    at: u64,
    fault: Fault,
    survives: Survives,
    expected: &BTreeMap<String, Vec<u8>>,
) -> u64 {
    let memory = inputs().fork(Some((at, fault)));
    let _ = sweep(base, packed, &memory);
    let memory = memory.reboot(survives);
    let what = format!("at {at}, {fault:?}, survives {survives:?}");
    let report = sweep(base, packed, &memory).unwrap_or_else(|error| panic!("{what}: {error}"));
    let found = lasting_below(&memory);
    assert!(found.keys().eq(expected.keys()), "{what}: {:?}", found.keys());
    for (name, data) in expected {
        assert!(found[name] == *data, "{what}: {name} differs");
    }
    let reused = |report: &tiesmith::Report| report.chunks_reused;
    report.outputs.iter().map(|e| e.report.as_ref().map_or(0, reused) + u64::from(e.found)).sum()
}

#[test]
fn an_interrupted_sweep_goes_on() {
    let (mut cases, mut reused) = (0, 0);
    let kinds = [
        (Scope::Model, TrimTies::Lowest, 60_000, false),
        (Scope::Tensor, TrimTies::Keep, 1 << 30, false),
        (Scope::Model, TrimTies::Keep, 1 << 30, true),
    ];
    for (scope, trim_ties, max_shard_bytes, packed) in kinds {
        let base = Recipe { scope, trim_ties, max_shard_bytes, ..recipe() };
        let memory = inputs().fork(None);
        sweep(&base, packed, &memory).unwrap();
        let (operations, changes) = memory.counts();
        let expected = lasting_below(&memory);
        let ending = if packed { ".tvz" } else { "/tiesmith.json" };
        assert_eq!(expected.keys().filter(|name| name.ends_with(ending)).count(), 3);
        for at in (1..=changes).step_by(STEP) {
            let fault = [Fault::CrashBefore, Fault::CrashIn][at as usize / STEP % 2];
            let survives = Survives::EACH[at as usize / STEP % Survives::EACH.len()];
            reused += disturbed((&base, packed), at, fault, survives, &expected);
            cases += 1;
        }
        for at in (1..=operations).step_by(3 * STEP) {
            let kind = KINDS[at as usize / STEP % KINDS.len()];
            let fault = [Fault::Once(kind), Fault::FromHere(kind)][at as usize / STEP % 2];
            reused += disturbed((&base, packed), at, fault, Survives::All, &expected);
            cases += 1;
        }
    }
    say(&format!("{cases} sweeps disturbed, {reused} chunks and outputs taken over"));
    assert!(cases > 300 / STEP && reused > 100 / STEP as u64, "{cases} {reused}");
}
