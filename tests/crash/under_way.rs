//! Work that has to look at all of the data before it writes anything: however soon and often it is stopped, it gets
//! through, and wherever it crashes on the way, the output is the same.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicI64;
use std::time::Duration;

use tiesmith::{
    Downloads, Error, Job, Observer, OutputOptions, Part, Plan, Recipe, Run, Schedule, Scope, Storage, Study,
    SweepOptions, TrimTies, Variant,
};

use super::factors::known_in;
use super::memory::{Fault, Memory, Survives};
use super::{DISK, KINDS, OUT, STEP, STORE, Silent, StopAfter, changes, far, large_inputs, lasting_below, recipe, say};

/// What is known is kept after every chunk.
const RUN: Run = Run { keep_after: Duration::ZERO, ..Run::new(28 << 20, 1) };

const ADAPTERS: &str = "a merge of adapters";
const LOOKS: &str = "a merge that looks at whole tensors";

/// The recipe as it is, or for inputs in a store.
type Place = fn(Recipe) -> Recipe;

/// Some work with an output directory.
#[derive(Clone, Copy)]
struct Work {
    name: &'static str,
    run: fn(&Memory, Place, &dyn Observer) -> Result<(), Error>,
}

/// Where inputs are, and one in how many cases is tried there: what changes is how they are read.
fn places() -> [(&'static str, Place, Memory, usize); 2] {
    [("files", |recipe| recipe, large_inputs(), 3), ("a store", far, large_inputs().moved(DISK, STORE), 10)]
}

/// With so many MiB of memory, or where inputs are in a store so many: connections, and what is kept of what is downloaded, take
/// some. The inputs themselves do not fit.
fn run_of(recipe: &Recipe, near: u64, far: u64) -> Run {
    let mebibytes = if recipe.models[0].source.starts_with(STORE) { far } else { near };
    Run { memory_bytes: mebibytes << 20, ..RUN }
}

fn whole(votes: bool, ties: TrimTies) -> Recipe {
    let mut recipe = Recipe { max_shard_bytes: 1 << 30, trim_ties: ties, ..recipe() };
    if votes {
        recipe.params.insert("zero_sum".into(), tiesmith::Value::Word("majority".into()).into());
    }
    recipe
}

fn merge(recipe: &Recipe, memory: &Memory, observer: &dyn Observer) -> Result<(), Error> {
    let storage: Arc<dyn Storage> = Arc::new(memory.clone());
    let plan = Plan::new(recipe, &storage)?;
    let output = OutputOptions { dir: OUT.into(), ..OutputOptions::default() };
    let is_large = recipe.base.is_some();
    let schedule = Schedule::with_spool(&plan, if is_large { run_of(recipe, 28, 46) } else { run_of(recipe, 34, 50) })?;
    // Adapters are small.
    assert_eq!(schedule.spool.is_some(), plan.is_remote() && is_large, "{:?}", schedule.memory);
    tiesmith::merge(&plan, &schedule, &output, &storage, observer).map(drop)
}

fn sweep(base: &Recipe, packed: bool, memory: &Memory, observer: &dyn Observer) -> Result<(), Error> {
    let storage: Arc<dyn Storage> = Arc::new(memory.clone());
    let mut recipes = vec![base.clone()];
    for (density, votes) in [(0.2, false), (0.2, true), (0.6, true)] {
        let mut recipe = Recipe { params: whole(votes, base.trim_ties).params, ..base.clone() };
        recipe.set_everywhere("density", tiesmith::Value::Number(density));
        recipes.push(recipe);
    }
    let mut plans = Plan::all(&recipes, &storage)?.into_iter();
    let union = plans.next().unwrap();
    let variant = |(number, plan)| Variant { name: format!("v{number}"), settings: Vec::new(), plan };
    let variants: Vec<Variant> = plans.enumerate().map(variant).collect();
    let output = OutputOptions { dir: OUT.into(), ..OutputOptions::default() };
    let run = run_of(base, 44, 52);
    tiesmith::sweep(
        union,
        &variants,
        run,
        &SweepOptions { output, packed, downloads: Downloads::default() },
        &storage,
        observer,
    )
    .map(drop)
}

fn look(recipe: &Recipe, memory: &Memory, observer: &dyn Observer) -> Result<(), Error> {
    let storage: Arc<dyn Storage> = Arc::new(memory.clone());
    let study = Study::new(Plan::new(recipe, &storage)?, &[0.1, 0.5], run_of(recipe, 48, 56))?;
    let output = OutputOptions { dir: OUT.into(), ..OutputOptions::default() };
    match tiesmith::analyze(&study, &output, &storage, observer) {
        // It was complete but for its exit code.
        Err(error) if error.to_string().contains("a finished analysis is already there") => Ok(()),
        outcome => outcome.map(drop),
    }
}

fn in_parts(recipe: &Recipe, memory: &Memory, observer: &dyn Observer) -> Result<(), Error> {
    let storage: Arc<dyn Storage> = Arc::new(memory.clone());
    let (plan, run) = (|| Plan::new(recipe, &storage), run_of(recipe, 28, 46));
    let output = OutputOptions { dir: OUT.into(), ..OutputOptions::default() };
    let job = Job::new(&plan()?, &Schedule::new(&plan()?, run)?, &output)?;
    for index in 0..2 {
        tiesmith::run_part(&plan()?, &job, Part { index, count: 2 }, None, run, &storage, observer)?;
    }
    tiesmith::finish(&plan()?, &job, run, &storage, observer).map(drop)
}

fn works() -> Vec<Work> {
    let work = |name, run| Work { name, run };
    vec![
        work("a merge", |m, p, o| merge(&p(whole(false, TrimTies::Keep)), m, o)),
        work("a merge with a vote", |m, p, o| merge(&p(whole(true, TrimTies::Lowest)), m, o)),
        work("a merge by tensor", |m, p, o| {
            merge(&p(Recipe { scope: Scope::Tensor, ..whole(true, TrimTies::Lowest) }), m, o)
        }),
        work(ADAPTERS, |m, p, o| {
            let params = whole(true, TrimTies::Lowest).params;
            merge(&p(Recipe { params, trim_ties: TrimTies::Lowest, ..changes() }), m, o)
        }),
        work(LOOKS, |m, p, o| {
            let mut recipe = Recipe { scope: Scope::Tensor, ..whole(false, TrimTies::Lowest) };
            recipe.params.insert("rescale".into(), tiesmith::Value::Word("l1".into()).into());
            merge(&p(recipe), m, o)
        }),
        work("a sweep", |m, p, o| sweep(&p(whole(false, TrimTies::Lowest)), false, m, o)),
        work("a sweep by tensor", |m, p, o| {
            sweep(&p(Recipe { scope: Scope::Tensor, ..whole(false, TrimTies::Lowest) }), false, m, o)
        }),
        work("a packed sweep", |m, p, o| sweep(&p(whole(false, TrimTies::Keep)), true, m, o)),
        work("an analysis", |m, p, o| look(&p(recipe()), m, o)),
        work("an analysis by tensor", |m, p, o| look(&p(Recipe { scope: Scope::Tensor, ..recipe() }), m, o)),
        work("parts", |m, p, o| {
            in_parts(&p(Recipe { max_shard_bytes: 1 << 21, ..whole(true, TrimTies::Lowest) }), m, o)
        }),
    ]
}

fn compare(memory: &Memory, expected: &BTreeMap<String, Vec<u8>>, what: &str) {
    let found = lasting_below(memory);
    assert!(found.keys().eq(expected.keys()), "{what}: {:?}", found.keys());
    expected.iter().for_each(|(name, data)| assert!(found[name] == *data, "{what}: {name} differs"));
}

/// How often an attempt may ask whether to stop before it is stopped: enough for a group of a probe, or a chunk of a search
/// or a vote, but not for all of them. Each goes on with what the ones before it did, which they read and compare first.
fn patience(memory: &Memory, name: &str) -> i64 {
    if name.starts_with(ADAPTERS) && known_in(memory) > 0 {
        // The factors of a module are found in one go.
        return 3000;
    }
    let written =
        |name: &String| name.ends_with(".partial") || name.ends_with(".spool") && !memory.tree(OUT)[name].1.is_empty();
    match memory.tree(OUT).keys().any(written) {
        true => 300,
        // What a method needs to know of a tensor is found in one go.
        false if name.starts_with(LOOKS) => 120,
        false => 40,
    }
}

/// However soon each attempt is stopped, as long as it does one step of anything.
#[test]
fn a_run_that_never_gets_far_gets_through() {
    for (Work { name, run }, (place, of, before, _)) in works().into_iter().flat_map(|work| places().map(|p| (work, p)))
    {
        let name = format!("{name} of inputs in {place}");
        let whole = before.fork(None);
        run(&whole, of, &Silent).unwrap_or_else(|error| panic!("{name}: {error}"));
        let expected = lasting_below(&whole);
        let (mut memory, mut stops) = (before.fork(None), 0);
        while let Err(error) = run(&memory, of, &StopAfter(AtomicI64::new(patience(&memory, &name)))) {
            assert_eq!(error.exit_code(), 130, "{name}: {error}");
            memory = memory.reboot(Survives::Nothing);
            stops += 1;
            assert!(stops < 100, "{name} does not get through");
        }
        say(&format!("{name}: {stops} stops"));
        // From a store, chunks are fewer.
        assert!(stops >= if place == "files" && !name.starts_with(LOOKS) { 3 } else { 1 }, "{name}: {stops} stops");
        compare(&memory, &expected, &name);
    }
}

/// Crashes and errors while everything is looked at, and a crash more on the way back.
#[test]
fn work_that_is_disturbed_while_it_looks_ends_the_same() {
    let cases = disturb_looks(0);
    assert!(cases > 300 / STEP, "{cases}");
}

/// The same of inputs elsewhere: apart, because both take long.
#[test]
fn work_on_inputs_in_a_store_that_is_disturbed_while_it_looks_ends_the_same() {
    let cases = disturb_looks(1);
    assert!(cases > 150 / STEP, "{cases}");
}

/// Disturbs all works on inputs in one of the places; how often.
fn disturb_looks(place: usize) -> usize {
    let mut cases = 0;
    for (number, Work { name, run }) in works().into_iter().enumerate() {
        let (place, of, before, sparse) = places().into_iter().nth(place).unwrap();
        let name = format!("{name} of inputs in {place}");
        let run = |memory: &Memory| run(memory, of, &Silent);
        let whole = before.fork(None);
        run(&whole).unwrap();
        let (expected, (operations, changes)) = (lasting_below(&whole), whole.counts());
        let crash = |at: u64| (at, [Fault::CrashBefore, Fault::CrashIn][at as usize % 2]);
        let error = |at: u64| {
            let kind = KINDS[at as usize % KINDS.len()];
            (at, [Fault::Once(kind), Fault::FromHere(kind)][at as usize / 2 % 2])
        };
        let crashes = (1 + number as u64 % 3..=changes).step_by((6 * STEP - 3) * sparse).map(crash);
        let errors = (1..=operations).step_by((30 * STEP - 19) * sparse).map(error);
        let begin = cases;
        for (at, fault) in crashes.chain(errors) {
            let survives = Survives::EACH[at as usize / 3 % Survives::EACH.len()];
            let what = format!("{name}: {fault:?} at {at}, survives {survives:?}");
            let memory = before.fork(Some((at, fault)));
            let _ = run(&memory);
            let dead = matches!(fault, Fault::CrashBefore | Fault::CrashIn);
            let memory = memory.reboot(if dead { survives } else { Survives::All });
            let again = memory.fork(Some((at / 2 + 3, Fault::CrashIn)));
            let _ = run(&again);
            let memory = again.reboot(survives);
            if let Err(error) = run(&memory) {
                assert!(error.to_string().contains("a finished merge is already there"), "{what}: {error}");
            }
            compare(&memory, &expected, &what);
            cases += 1;
        }
        say(&format!("{name}: {} cases of {changes} changes and {operations} operations", cases - begin));
    }
    say(&format!("{cases} looks, votes and merges disturbed twice"));
    cases
}

/// Outputs of each of `grid`: (models, density).
fn sweep_of(grid: &[(&[&str], f64)], memory: &Memory, observer: &dyn Observer) -> Result<u64, Error> {
    let storage: Arc<dyn Storage> = Arc::new(memory.clone());
    let base = whole(false, TrimTies::Keep);
    let mut recipes = vec![base.clone()];
    for (models, density) in grid {
        let mut recipe = base.clone();
        recipe.models.retain(|model| models.iter().any(|name| model.source.ends_with(name)));
        recipe.set_everywhere("density", tiesmith::Value::Number(*density));
        recipes.push(recipe);
    }
    let mut plans = Plan::all(&recipes, &storage)?.into_iter();
    let union = plans.next().unwrap();
    let name = |(models, density): &(&[&str], f64)| format!("{}-{density}", models.join("+"));
    let variant = |(plan, point): (Plan, _)| Variant { name: name(point), settings: Vec::new(), plan };
    let variants: Vec<Variant> = plans.zip(grid).map(variant).collect();
    let output = OutputOptions { dir: OUT.into(), ..OutputOptions::default() };
    let options = SweepOptions { output, packed: false, downloads: Downloads::default() };
    let run = Run { memory_bytes: 44 << 20, ..RUN };
    tiesmith::sweep(union, &variants, run, &options, &storage, observer).map(|report| report.bytes_read)
}

/// The sweep of `grid`, stopped in the middle of its search.
fn stopped(grid: &[(&[&str], f64)], before: &Memory) -> Memory {
    let memory = before.fork(None);
    assert!(sweep_of(grid, &memory, &StopAfter(AtomicI64::new(150))).is_err());
    let memory = memory.reboot(Survives::Nothing);
    assert!(memory.tree(OUT).keys().all(|name| !name.ends_with(".partial")), "it merges already");
    memory
}

#[test]
fn a_sweep_goes_on_with_searches_for_another_grid() {
    let before = large_inputs();
    let (both, one): (&[&str], &[&str]) = (&["one", "two"], &["one"]);
    let first = [(one, 0.2), (both, 0.2), (both, 0.5)];
    let fresh = |grid: &[(&[&str], f64)], before: &Memory| {
        let memory = before.fork(None);
        let read = sweep_of(grid, &memory, &Silent).unwrap();
        (lasting_below(&memory), read)
    };
    // The same, fewer, in another order, and others too.
    let grids = [
        (first.to_vec(), true),
        (vec![(one, 0.2), (both, 0.5)], true),
        (vec![(both, 0.5), (one, 0.2)], true),
        (vec![(one, 0.2), (both, 0.7)], false),
    ];
    for (grid, goes_on) in grids {
        let memory = stopped(&first, &before);
        let read = sweep_of(&grid, &memory, &Silent).unwrap();
        let (expected, all) = fresh(&grid, &before);
        // The probe is for all models, whatever is sought.
        assert_eq!(read + 4_000_000 < all, goes_on, "{grid:?}: {read} of {all} bytes");
        let found = lasting_below(&memory);
        expected.iter().for_each(|(name, data)| assert!(found[name] == *data, "{grid:?}: {name} differs"));
    }
    // A model that the output with the journal does not have is another now, as long as the other one: nothing that was
    // counted of it is used.
    let memory = stopped(&first, &before);
    let other = memory.tree("/in")["base/model.safetensors"].1.clone();
    let there = large_inputs();
    for memory in [&memory, &there] {
        memory.put("/in/two/model.safetensors", &other);
    }
    assert!(sweep_of(&first, &memory, &Silent).is_err(), "outputs of that model go on");
    for name in memory.tree(OUT).keys().filter(|name| name.starts_with("one+two")) {
        memory.remove_file(format!("{OUT}/{name}").as_ref()).unwrap();
    }
    sweep_of(&first, &memory, &Silent).unwrap();
    let (found, expected) = (lasting_below(&memory), fresh(&first, &there).0);
    // Manifests have times.
    let models = expected.iter().filter(|(name, _)| name.ends_with(".safetensors"));
    models.for_each(|(name, data)| assert!(found[name] == *data, "{name} differs"));
}

/// A sound record with `payload`, behind those of `journal`.
fn with_record(journal: &[u8], payload: &[u8]) -> Vec<u8> {
    let number = journal.windows(4).filter(|bytes| *bytes == b"TSR\n").count() as u64;
    let mut record = [&b"TSR\n"[..], &[2, 0, 0, 0], &number.to_le_bytes()].concat();
    record.extend([(payload.len() as u32).to_le_bytes(); 2].concat());
    record.extend(payload);
    let checksum = blake3::hash(&record);
    record.extend(&checksum.as_bytes()[..16]);
    [journal, &record].concat()
}

/// Entries for the searches of both models, of which `elements` were looked at.
fn searches(elements: u64, rank: u64, state: &[u8]) -> Vec<u8> {
    let search = |model: u32| {
        let head = [&[4, 0, 0, 0, 0][..], &[0; 16], &0u32.to_le_bytes(), &elements.to_le_bytes(), &7u64.to_le_bytes()];
        [&head.concat()[..], &2u32.to_le_bytes(), &model.to_le_bytes(), &rank.to_le_bytes(), state].concat()
    };
    [search(0), search(1)].concat()
}

/// A sketch that is being counted: (least key, shift, not compressed), bins, entries above.
fn counting(low: u32, shift: u32, bins: &[u64], above: u64) -> Vec<u8> {
    let bins: Vec<u8> = bins.iter().flat_map(|bin| bin.to_le_bytes()).collect();
    let count = bins.len() as u64 / 8;
    let numbers = [count, above, bins.len() as u64].map(u64::to_le_bytes).concat();
    let sketch = [&low.to_le_bytes()[..], &(shift << 1 | 1).to_le_bytes(), &numbers, &bins].concat();
    [&[0][..], &(sketch.len() as u32).to_le_bytes(), &sketch].concat()
}

#[test]
fn counts_that_make_no_sense_never_reach_the_output() {
    const ELEMENTS: u64 = 1_500_001;
    let rank = (0.2 * ELEMENTS as f64) as u64;
    let recipe = whole(true, TrimTies::Lowest);
    let before = large_inputs();
    let memory = before.fork(None);
    merge(&recipe, &memory, &Silent).unwrap();
    let expected = memory.tree(OUT)["model.safetensors"].1.clone();
    let memory = before.fork(None);
    merge(&recipe, &memory, &StopAfter(AtomicI64::new(20))).unwrap_err();
    let begun = memory.reboot(Survives::Nothing);
    let found = |above: u64, tied: u64| {
        [&[2][..], &9u32.to_le_bytes(), &9u32.to_le_bytes(), &above.to_le_bytes(), &tied.to_le_bytes()].concat()
    };
    let votes = |elements: u64, sum: i64, ties: &[u64]| {
        let head = [&[6, 0, 0, 0, 0][..], &[0; 16], &elements.to_le_bytes(), &7u64.to_le_bytes(), &1u32.to_le_bytes()];
        let ties =
            [&(ties.len() as u32).to_le_bytes()[..], &ties.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<_>>()];
        [&head.concat()[..], &[0; 16], &sum.to_le_bytes(), &ties.concat()].concat()
    };
    let probe = |group: u32, sketches: &[u8]| {
        let head = [&[5, 0, 0, 0, 0][..], &[0; 16], &group.to_le_bytes(), &7u64.to_le_bytes()].concat();
        [&head[..], &(sketches.len() as u32).to_le_bytes(), sketches].concat()
    };
    let entries = [
        // More counted than there was, more than can be counted, more elements than there are.
        searches(1000, rank, &counting(1 << 29, 0, &[500; 4], 0)),
        searches(1000, rank, &counting(1 << 29, 0, &[u64::MAX >> 1; 4], u64::MAX)),
        searches(ELEMENTS + 1, rank, &counting(1 << 29, 0, &[0; 4], 0)),
        // Another rank; brackets that are none.
        searches(1000, rank + 1, &counting(1 << 29, 0, &[0; 4], 0)),
        searches(1000, rank, &counting(1 << 29, 40, &[0; 4], 0)),
        searches(1000, rank, &counting(1 << 29, 30, &[0; 4], 0)),
        searches(1000, rank, &counting(u32::MAX, 0, &[0; 4], 0)),
        searches(1000, rank, &counting(0, 0, &[], 0)),
        searches(1000, rank, &counting(1 << 29, 0, &vec![0; 1 << 20], 0)),
        // All looked at and nothing found; then more than there are above everything.
        searches(ELEMENTS, rank, &counting(1 << 29, 0, &[0; 4], 0)),
        searches(ELEMENTS, rank, &counting(0, 0, &[0; 4], 0)),
        searches(ELEMENTS, rank, &counting((1 << 31) - 1, 0, &[0], ELEMENTS)),
        searches(0, rank, &counting(0, 15, &[0; 1 << 16], 0)),
        // Thresholds that are none.
        searches(ELEMENTS, rank, &found(rank, 5)),
        searches(ELEMENTS, rank, &found(rank - 5, 4)),
        searches(ELEMENTS, rank, &found(u64::MAX, u64::MAX)),
        searches(ELEMENTS, rank, &found(0, ELEMENTS + 1)),
        votes(1000, 2001, &[0, 0]),
        votes(1000, i64::MIN, &[0, 0]),
        votes(1000, 0, &[0]),
        votes(1000, 0, &[u64::MAX, u64::MAX]),
        votes(ELEMENTS + 1, 0, &[0, 0]),
        probe(8, &[]),
        probe(u32::MAX, &[]),
        probe(3, &[1, 2, 3]),
        probe(3, &counting(0, 15, &[1; 1 << 16], 0)[5..]),
        probe(3, &[&counting(0, 15, &[u64::MAX; 1 << 16], 0)[5..], &counting(9, 0, &[1], 0)[5..]].concat()),
    ];
    for (number, entries) in entries.iter().enumerate() {
        let memory = begun.fork(None);
        let path = format!("{OUT}/.tiesmith/journal");
        let journal = memory.tree(OUT)[".tiesmith/journal"].1.clone();
        memory.put(&path, &with_record(&journal, entries));
        merge(&recipe, &memory, &Silent).unwrap_or_else(|error| panic!("{number}: {error}"));
        assert!(memory.tree(OUT)["model.safetensors"].1 == expected, "{number}: another output");
    }
    say(&format!("{} senseless entries", entries.len()));
}
