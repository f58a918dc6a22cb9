//! Merges with guessed thresholds, disturbed anywhere: whether the guess is right or wrong, the output is the same.

use super::*;

/// Elements of the only tensor: not held in memory, and sampled in blocks.
const ELEMENTS: u64 = 1_500_001;
/// A sample of 131,072 elements: a block of 1,024 somewhere in each cell of so many.
const CELL: u64 = ELEMENTS * BLOCK / 131_072;
const BLOCK: u64 = 1024;

/// Whether the sample has element `i`.
fn is_sampled(i: u64) -> bool {
    let (cell, at) = (i / CELL, i % CELL);
    let phase = u128::from(cell.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let begin = ((phase * u128::from(CELL - BLOCK + 1)) >> 64) as u64;
    cell < ELEMENTS / CELL && (begin..begin + BLOCK).contains(&at)
}

/// Of few magnitudes: a fifth of the entries is cut in the midst of those with 2. Where the sample is to mislead, it is cut in
/// the midst of those with 3 instead, of which there are more outside the sample.
fn value(i: u64, seed: u64, misleads: bool) -> f32 {
    let hash = i.wrapping_add(seed << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let magnitude = match (hash >> 33) % 100 {
        0..5 => 3.0,
        5..30 if misleads && !is_sampled(i) => 3.0,
        5..35 => 2.0,
        35..60 => 1.0,
        _ => 0.0,
    };
    if hash >> 63 == 1 { -magnitude } else { magnitude }
}

fn inputs(misleads: bool) -> Memory {
    let memory = Memory::default();
    let tensors: [(&str, &[u64]); 1] = [("w", &[ELEMENTS])];
    memory.put("/in/base/model.safetensors", &floats(&tensors, |_| 0.0));
    for (name, seed) in [("one", 1), ("two", 2)] {
        let path = format!("/in/{name}/model.safetensors");
        memory.put(&path, &floats(&tensors, |i| value(i, seed, misleads)));
    }
    memory
}

/// Tensor bytes of all inputs, and of the sample.
const ALL: u64 = 3 * 4 * ELEMENTS;
const SAMPLE: u64 = 3 * 4 * BLOCK * (ELEMENTS / CELL);

fn job() -> Job {
    Job {
        name: "guess",
        recipe: Recipe { max_shard_bytes: 1 << 30, ..recipe() },
        force: false,
        copied: false,
        far: false,
    }
}

/// The files of an undisturbed run, and the number of changes it makes.
fn undisturbed(misleads: bool) -> (Memory, BTreeMap<String, Vec<u8>>, u64) {
    let before = inputs(misleads);
    let whole = before.fork(None);
    let report = job().run(&whole).unwrap();
    assert!(!report.resumed && report.chunks_reused == 0);
    // A sample that misleads costs a merge, and two looks that miss.
    let reads = if misleads { ALL + 3 * SAMPLE + SAMPLE + 4 * ALL } else { ALL + 3 * SAMPLE };
    assert!(report.bytes_read.abs_diff(reads) <= SAMPLE / 8, "{} read, not {reads}", report.bytes_read);
    // Merged by hand.
    let merged = |i: u64| {
        let threshold = if misleads { 3.0 } else { 2.0 };
        let taus = [1, 2].map(|seed| value(i, seed, misleads)).map(|tau| if tau.abs() < threshold { 0.0 } else { tau });
        let agree: Vec<f32> = taus.into_iter().filter(|tau| *tau != 0.0 && *tau * (taus[0] + taus[1]) > 0.0).collect();
        if agree.is_empty() { 0.0 } else { agree.iter().sum::<f32>() / agree.len() as f32 }
    };
    let expected: Vec<u8> = (0..ELEMENTS).flat_map(|i| merged(i).to_le_bytes()).collect();
    let files = lasting(&whole.tree(OUT));
    assert!(files["model.safetensors"].ends_with(&expected), "not what is merged by hand");
    (before, files, whole.counts().1)
}

#[test]
fn crashes_and_errors_while_merging_with_a_guess() {
    for misleads in [false, true] {
        let (before, expected, changes) = undisturbed(misleads);
        let (mut cases, mut reused) = (0, 0);
        for at in 1..=changes + 3 {
            let kind = KINDS[at as usize % KINDS.len()];
            let faults = [Fault::CrashBefore, Fault::CrashIn, Fault::Once(kind), Fault::FromHere(kind)];
            let fault = faults[at as usize % faults.len()];
            let memory = before.fork(Some((at, fault)));
            let outcome = job().run(&memory);
            for turn in 0..3 {
                let dead = matches!(fault, Fault::CrashIn | Fault::CrashBefore);
                let survives = match (dead, turn) {
                    (false, 0) => Survives::All,
                    (true, turn) if outcome.is_err() => Survives::EACH[(at as usize + turn) % Survives::EACH.len()],
                    _ => break,
                };
                let what = format!("misleads: {misleads}, change {at} of {changes}, {fault:?}, {survives:?}");
                let case = Case { job: &job(), expected: &expected, older: &BTreeMap::new(), what };
                let report = case.finish(&memory.reboot(survives));
                cases += 1;
                reused += u64::from(report.is_some_and(|report| report.chunks_reused > 0));
            }
        }
        say(&format!("{cases} disturbed merges with a guess (wrong: {misleads}), {reused} with work taken over"));
        assert!(cases > 50 && reused > 5, "{cases} cases, {reused} with work taken over");
    }
}

/// Wherever it is stopped, even if it never gets further than a chunk.
#[test]
fn a_merge_with_a_guess_that_never_gets_far_gets_through() {
    for misleads in [false, true] {
        let (before, expected, _) = undisturbed(misleads);
        let (mut memory, mut stops) = (before, 0);
        // Enough for all looks at the sample, then for a chunk of anything.
        let patience = |stops: usize| [396, 5, 6, 7, 180][stops % 5];
        while let Err(error) = job().run_with(&memory, 1, 28 << 20, &StopAfter(AtomicI64::new(patience(stops)))) {
            assert_eq!(error.exit_code(), 130, "{error}");
            memory = memory.reboot(Survives::Nothing);
            stops += 1;
            assert!(stops < 200, "it does not get through");
        }
        say(&format!("{stops} stops of a merge with a guess (wrong: {misleads})"));
        assert!(stops >= 2 && lasting(&memory.tree(OUT)) == expected, "{stops} stops");
    }
}

/// A shard that is handed over cannot be taken back.
#[cfg(unix)]
#[test]
fn a_guess_is_given_up_where_shards_are_handed_over() {
    let (memory, expected, _) = undisturbed(false);
    let patience = StopAfter(AtomicI64::new(108));
    let stopped = job().run_with(&memory, 1, 28 << 20, &patience).unwrap_err();
    assert_eq!(stopped.exit_code(), 130, "{stopped}");
    let memory = memory.reboot(Survives::Nothing);
    let storage: Arc<dyn Storage> = Arc::new(memory.clone());
    let plan = Plan::new(&job().recipe, &storage).unwrap();
    let schedule =
        Schedule::new(&plan, Run { memory_bytes: 28 << 20, threads: 1, keep_after: Duration::ZERO }).unwrap();
    let output = OutputOptions {
        dir: OUT.into(),
        on_shard: Some(tiesmith::OnShard::Command("true".into())),
        ..OutputOptions::default()
    };
    let report = tiesmith::merge(&plan, &schedule, &output, &storage, &Silent).unwrap();
    assert!(report.resumed && report.chunks_reused == 0, "what was guessed is void");
    assert!(report.bytes_read > 2 * ALL, "{} read", report.bytes_read);
    assert!(memory.tree(OUT)["model.safetensors"].1 == expected["model.safetensors"]);
}
