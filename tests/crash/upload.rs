//! An output that is uploaded: disturbed anywhere, nothing loads that is not whole, and the same command ends it.

use std::collections::BTreeMap;
use std::sync::Arc;

use tiesmith::{Error, Job, OnShard, OutputOptions, Part, Plan, Recipe, Report, Run, Schedule, Storage};

use super::memory::{Memory, Survives, every_fault};
use super::{KINDS, OUT, STEP, Silent, inputs, recipe, say};

const ADDRESS: &str = "s3://bucket/merged";

fn upload(recipe: &Recipe, address: &str, memory: &Memory) -> Result<Report, Error> {
    let storage: Arc<dyn Storage> = Arc::new(memory.clone());
    let plan = Plan::new(recipe, &storage)?;
    let schedule = Schedule::new(&plan, Run::new(28 << 20, 1))?;
    let output =
        OutputOptions { dir: OUT.into(), on_shard: Some(OnShard::Upload(address.into())), ..OutputOptions::default() };
    tiesmith::merge(&plan, &schedule, &output, &storage, &Silent)
}

/// What is in the store but for what differs from run to run.
fn lasting(memory: &Memory) -> BTreeMap<String, Vec<u8>> {
    let mut objects = memory.objects();
    if let Some(manifest) = objects.get_mut(&format!("{ADDRESS}/tiesmith.json")) {
        let mut value: serde_json::Value = serde_json::from_slice(manifest).unwrap();
        value["run"].as_object_mut().unwrap().remove("manifest_blake3").unwrap();
        let report = value["report"].as_object_mut().unwrap();
        for field in ["wall_seconds", "peak_memory_bytes", "resumed", "chunks_reused"] {
            report.remove(field).unwrap();
        }
        *manifest = value.to_string().into_bytes();
    }
    objects
}

#[test]
fn an_upload_that_is_disturbed_anywhere_can_be_run_again() {
    let mut cases = 0;
    for recipe in [recipe(), Recipe { max_shard_bytes: 1 << 30, ..recipe() }] {
        let before = inputs();
        let undisturbed = before.fork(None);
        let report = upload(&recipe, ADDRESS, &undisturbed).unwrap();
        assert_eq!((report.out.as_str(), report.shards_handed_over), (ADDRESS, report.shards));
        assert!(undisturbed.tree(OUT).is_empty(), "{:?}", undisturbed.tree(OUT).keys());
        let expected = lasting(&undisturbed);
        let index = ["model.safetensors.index.json", "model.safetensors"].map(|name| format!("{ADDRESS}/{name}"));
        assert!(index.iter().any(|index| expected.contains_key(index)));
        let again = upload(&recipe, ADDRESS, &undisturbed).unwrap_err();
        assert!(again.exit_code() == 2 && again.to_string().contains("something is there already"), "{again}");
        let (operations, changes) = undisturbed.counts();
        let faults = every_fault(operations, changes, |at| [KINDS[at as usize % KINDS.len()]; 2]);
        for (at, fault, survives) in faults.into_iter().step_by(STEP) {
            let what = format!("{fault:?} {at} of {changes} or {operations}, survives {survives:?}");
            let disturbed = before.fork(Some((at, fault)));
            let _ = upload(&recipe, ADDRESS, &disturbed);
            let disturbed = disturbed.reboot(survives);
            let there = lasting(&disturbed);
            let loads = index.iter().any(|index| there.contains_key(index));
            assert!(!loads || there.keys().eq(expected.keys()), "{what}: {:?}", there.keys());
            match upload(&recipe, ADDRESS, &disturbed) {
                Ok(_) => assert!(disturbed.tree(OUT).is_empty(), "{what}: {:?}", disturbed.tree(OUT).keys()),
                // It was complete but for its exit code.
                Err(error) => assert!(loads && error.exit_code() == 2, "{what}: {error}"),
            }
            assert!(lasting(&disturbed) == expected, "{what}: other objects");
            cases += 1;
        }
    }
    say(&format!("{cases} uploads disturbed"));
    assert!(cases > 1000 / STEP, "{cases}");
}

/// A merge in two parts whose end uploads it.
fn upload_in_parts(recipe: &Recipe, memory: &Memory) -> Result<Report, Error> {
    let run = Run::new(40 << 20, 1);
    let storage: Arc<dyn Storage> = Arc::new(memory.clone());
    let plan = || Plan::new(recipe, &storage);
    let output =
        OutputOptions { dir: OUT.into(), on_shard: Some(OnShard::Upload(ADDRESS.into())), ..OutputOptions::default() };
    let planned = plan()?;
    let job = Job::new(&planned, &Schedule::new(&planned, run)?, &output)?;
    for index in 0..2 {
        tiesmith::run_part(&plan()?, &job, Part { index, count: 2 }, None, run, &storage, &Silent)?;
    }
    tiesmith::finish(&plan()?, &job, run, &storage, &Silent)
}

#[test]
fn an_upload_of_parts_that_is_disturbed_anywhere_can_be_run_again() {
    let mut cases = 0;
    for recipe in [recipe(), Recipe { max_shard_bytes: 1 << 30, ..recipe() }] {
        let whole = inputs();
        upload(&recipe, ADDRESS, &whole).unwrap();
        let before = inputs();
        let undisturbed = before.fork(None);
        let report = upload_in_parts(&recipe, &undisturbed).unwrap();
        assert_eq!((report.out.as_str(), report.shards_handed_over), (ADDRESS, report.shards));
        assert!(undisturbed.tree(OUT).is_empty(), "{:?}", undisturbed.tree(OUT).keys());
        let tensors = |memory: &Memory| -> BTreeMap<String, Vec<u8>> {
            let made = |name: &String| name.contains(".safetensors");
            memory.objects().into_iter().filter(|(name, _)| made(name)).collect()
        };
        let (expected, names) = (tensors(&whole), lasting(&undisturbed).into_keys().collect::<Vec<_>>());
        assert!(tensors(&undisturbed) == expected && lasting(&whole).keys().eq(&names));
        // Whoever does it again finds it done.
        assert_eq!(upload_in_parts(&recipe, &undisturbed).unwrap().out, ADDRESS);
        let index = ["model.safetensors.index.json", "model.safetensors"].map(|name| format!("{ADDRESS}/{name}"));
        let (operations, changes) = undisturbed.counts();
        let faults = every_fault(operations, changes, |at| [KINDS[at as usize % KINDS.len()]; 2]);
        for (at, fault, survives) in faults.into_iter().step_by(4 * STEP - 1) {
            let what = format!("{fault:?} {at} of {changes} or {operations}, survives {survives:?}");
            let disturbed = before.fork(Some((at, fault)));
            let complete = upload_in_parts(&recipe, &disturbed).is_ok();
            let disturbed = disturbed.reboot(survives);
            let there = disturbed.objects();
            let loads = index.iter().any(|index| there.contains_key(index));
            assert!(!loads || there.keys().eq(&names), "{what}: {:?}", there.keys());
            upload_in_parts(&recipe, &disturbed).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert!(tensors(&disturbed) == expected, "{what}: other objects");
            assert!(disturbed.objects().keys().eq(&names), "{what}");
            // What cannot be removed of an output that is complete elsewhere stays, and disturbs nobody.
            let left = disturbed.tree(OUT);
            let gone = left.keys().all(|name| name == ".tiesmith/lock");
            assert!(gone || complete, "{what}: {:?}", left.keys());
            cases += 1;
        }
    }
    say(&format!("{cases} uploads of parts disturbed"));
    assert!(cases > 800 / STEP, "{cases}");
}

#[test]
fn shards_of_one_output_go_to_one_address() {
    let before = inputs();
    let (_, changes) = {
        let whole = before.fork(None);
        upload(&recipe(), ADDRESS, &whole).unwrap();
        whole.counts()
    };
    let mut refused = 0;
    for at in (1..changes).step_by(3) {
        let disturbed = before.fork(Some((at, super::memory::Fault::CrashBefore)));
        let _ = upload(&recipe(), ADDRESS, &disturbed);
        let disturbed = disturbed.reboot(Survives::All);
        let uploaded = !disturbed.objects().is_empty();
        if let Err(error) = upload(&recipe(), "s3://bucket/elsewhere", &disturbed) {
            assert!(uploaded && error.exit_code() == 2 && error.to_string().contains(ADDRESS), "{error}");
            refused += 1;
        }
    }
    assert!(refused > 0);
}
