//! What a schedule reads and holds, for plans of files of holes and for any numbers.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::method::Value;
use crate::recipe::{ModelInput, Recipe, Scope, Setting};
use crate::storage::{Disk, IoMode, Storage};

/// A family of f32 checkpoints with tensors `t0`, `t1`, ... of these lengths: files of holes.
struct Family {
    _dir: tempfile::TempDir,
    recipe: Recipe,
    storage: Arc<dyn Storage>,
}

impl Family {
    fn new(models: usize, lengths: &[u64]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (mut members, mut end) = (Vec::new(), 0);
        for (i, length) in lengths.iter().enumerate() {
            let begin = end;
            end += 4 * length;
            members.push(format!(r#""t{i}":{{"dtype":"F32","shape":[{length}],"data_offsets":[{begin},{end}]}}"#));
        }
        let header = format!("{{{}}}", members.join(","));
        let place = |name: String| {
            let path = dir.path().join(name);
            let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
            std::fs::write(&path, &bytes).unwrap();
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            file.set_len(bytes.len() as u64 + end).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let model = |i| ModelInput { source: place(format!("m{i}.safetensors")), ..ModelInput::default() };
        let recipe = Recipe {
            base: Some(place("base.safetensors".into())),
            models: (0..models).map(model).collect(),
            ..Recipe::default()
        };
        Self { _dir: dir, recipe, storage: Arc::new(Disk::new(IoMode::Auto)) }
    }

    fn plan(&self, change: impl FnOnce(&mut Recipe)) -> Plan {
        let mut recipe = self.recipe.clone();
        change(&mut recipe);
        Plan::new(&recipe, &self.storage).unwrap()
    }
}

fn number(value: f64) -> Setting {
    Setting::Value(Value::Number(value))
}

fn schedule(plan: &Plan, memory_bytes: u64, threads: usize) -> Schedule {
    Schedule::new(plan, Run::new(memory_bytes, threads)).unwrap()
}

/// The least memory for which `plan` has a schedule, as the refusal of less says.
fn least(plan: &Plan) -> u64 {
    let refusal = Schedule::new(plan, Run::new(1, 4)).unwrap_err().to_string();
    refusal.split("at least ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap()
}

fn read(schedule: &Schedule) -> BTreeMap<&'static str, u64> {
    schedule.passes.iter().map(|pass| (pass.name, pass.bytes_read)).collect()
}

#[test]
fn the_least_that_is_named_is_enough_and_no_less_is() {
    let family = Family::new(3, &[5_000_000, 3, 70_000]);
    for scope in [Scope::Model, Scope::Tensor] {
        let plan = family.plan(|recipe| recipe.scope = scope);
        let least = least(&plan);
        for threads in [1, 4] {
            assert!(schedule(&plan, least, threads).memory_bytes() <= least);
            assert!(Schedule::new(&plan, Run::new(least - 1, threads)).is_err());
        }
    }
}

#[test]
fn chunks_follow_each_other_and_end_where_tensors_do() {
    let lengths = [1_000_000, 1, 0, 300_001, 16_384];
    let family = Family::new(1, &lengths);
    let plan = family.plan(|_| ());
    let tensors: Vec<u32> = (0..5).collect();
    for most in [MIN_CHUNK_ELEMENTS, 100_000, CHUNK_ELEMENTS] {
        let mut ends = [0; 5];
        let mut last = 0;
        for chunk in Schedule::chunks(&plan, &tensors, most) {
            assert!(chunk.tensor >= last && chunk.count > 0 && chunk.count <= most, "{chunk:?}");
            assert_eq!(chunk.start, ends[chunk.tensor as usize], "{chunk:?}");
            ends[chunk.tensor as usize] += chunk.count;
            last = chunk.tensor;
        }
        let planned: Vec<u64> = tensors.iter().map(|&t| plan.length(t)).collect();
        assert_eq!(ends.to_vec(), planned);
    }
}

#[test]
fn a_probe_is_spread_over_everything() {
    let family = Family::new(1, &[30_000_000, 7, 9_000_000, 1_000_000, 0]);
    let plan = family.plan(|_| ());
    let schedule = schedule(&plan, least(&plan), 1);
    let [unit] = &schedule.units[..] else { panic!("model scope has one unit") };
    let mut per_tensor = [0u64; 5];
    let mut phases = [false; 8];
    let mut end = (0, 0);
    for block in Schedule::probe_blocks(&plan, unit) {
        assert!(block.start + block.count <= plan.length(block.tensor), "{block:?}");
        assert!((block.tensor, block.start) >= end, "{block:?} overlaps");
        end = (block.tensor, block.start + block.count);
        per_tensor[block.tensor as usize] += block.count;
        phases[(block.start % 8192 / 1024) as usize] = true;
    }
    assert_eq!(phases, [true; 8], "blocks of rows of 8,192 elements");
    let total: u64 = per_tensor.iter().sum();
    assert!((0.99..1.02).contains(&(total as f64 / 625_000.0)), "{total} of 40,000,007 elements are probed");
    for tensor in [0, 2, 3] {
        let share = per_tensor[tensor] as f64 / plan.length(tensor as u32) as f64;
        assert!((0.013..0.018).contains(&share), "{share} of tensor {tensor} is probed");
    }
}

#[test]
fn a_unit_is_read_as_often_as_memory_makes_necessary() {
    let family = Family::new(2, &[20_000_000, 1000]);
    let bytes = 3 * 4 * 20_001_000;
    let tensor = family.plan(|recipe| recipe.scope = Scope::Tensor);
    let kinds = |schedule: &Schedule| -> Vec<UnitKind> { schedule.units.iter().map(|unit| unit.kind).collect() };
    let plenty = schedule(&tensor, 2 << 30, 2);
    assert_eq!(kinds(&plenty), [UnitKind::Resident, UnitKind::Solo]);
    assert_eq!(read(&plenty), BTreeMap::from([("merge", bytes)]));
    let short = schedule(&tensor, 100_000_000, 2);
    assert_eq!(kinds(&short), [UnitKind::Streamed, UnitKind::Solo]);
    assert_eq!(read(&short)["sketch"], 3 * 4 * 20_000_000);

    let model = family.plan(|_| ());
    assert_eq!(kinds(&schedule(&model, 2 << 30, 2)), [UnitKind::Streamed], "too large to be held");
    let small = Family::new(2, &[200_000, 1000]);
    let small = small.plan(|_| ());
    assert_eq!(kinds(&schedule(&small, 2 << 30, 2)), [UnitKind::Resident]);
    assert_eq!(kinds(&schedule(&small, least(&small), 2)), [UnitKind::Streamed]);
}

#[test]
fn no_pass_reads_what_is_settled_already() {
    let family = Family::new(2, &[20_000_000]);
    let one = 4 * 20_000_000;
    let reads = |change: &dyn Fn(&mut Recipe)| read(&schedule(&family.plan(change), 1 << 30, 2));
    let usual = reads(&|_| ());
    assert_eq!((usual["sketch"], usual["merge"]), (3 * one, 3 * one));
    assert!(!usual.contains_key("vote"));
    // Where all or nothing of a model is kept, only the other is searched.
    for settled in [0.0, 1.0] {
        let half = reads(&|recipe| drop(recipe.models[0].params.insert("density".into(), number(settled))));
        assert_eq!((half["sketch"], half["merge"]), (2 * one, 3 * one), "density {settled}");
        let none = reads(&|recipe| drop(recipe.params.insert("density".into(), number(settled))));
        assert_eq!(none, BTreeMap::from([("merge", 3 * one)]), "density {settled}");
    }
    let majority = |recipe: &mut Recipe| {
        recipe.params.insert("zero_sum".into(), Setting::Value(Value::Word("majority".into())));
    };
    assert_eq!(reads(&majority)["vote"], 3 * one);
    let signs = reads(&|recipe| {
        majority(recipe);
        recipe.sign_from = recipe.base.clone();
    });
    assert!(!signs.contains_key("vote"), "oracle signs leave no vote: {signs:?}");
}

#[test]
fn hashes_take_a_few_values_per_tensor_however_large() {
    let account = |lengths: &[u64]| {
        let family = Family::new(1, lengths);
        let plan = family.plan(|_| ());
        account_bytes(&plan, 1)
    };
    let (small, large) = (account(&[1000]), account(&[20_000_000_000]));
    assert!(large - small < 10_000, "{small} {large}");
    assert!(account(&[20_000_000; 50]) - small < 50 * 10_000);
}

prop_compose! {
    fn demand()(
        widths in prop::collection::vec(1u64..=8, 1..6),
        models in 1u64..20,
        longest in 1u64..(1 << 33),
        unit_share in 0u64..=4,
        (trims, tensor_scope, exact, remote) in any::<(bool, bool, bool, bool)>(),
        (catalogue_bytes, account_bytes) in (0u64..50_000_000, 0u64..50_000_000),
        units in 0u32..1000,
        scratch_bytes in prop::sample::select(vec![0, 1 << 20]),
        (bounds, tile, sums, ranks) in (1u64..=2, 1024u64..=OUT_ELEMENTS, 0u64..9_000, prop::sample::select(vec![0, 3])),
    ) -> Demand {
        Demand {
            widths,
            out_width: 4,
            models,
            columns: models,
            bounds,
            tile,
            granule: if sums + ranks > 0 { MIN_CHUNK_ELEMENTS.next_multiple_of(tile) } else { 0 },
            sums,
            ranks,
            longest,
            longest_unit: if tensor_scope { longest * unit_share / 4 } else { 0 },
            unit_elements: longest * (unit_share + 1),
            trims,
            tensor_scope,
            exact: exact && trims,
            catalogue_bytes,
            account_bytes,
            scratch_bytes,
            shared: None,
            remote,
            fixed_bins: None,
            spool: None,
            direct: Vec::new(),
            grouped: (0..units).collect(),
            study: None,
        }
    }
}

proptest! {
    /// Whatever is asked for, what is promised fits; and what is named as the smallest is enough, and no less is.
    #[test]
    fn the_sum_never_exceeds_the_limit(demand in demand(), threads in 1usize..65, extra in 0u64..(1 << 36)) {
        let smallest = demand.smallest();
        prop_assert!(demand.fit(1, smallest - 1).is_none());
        for limit in [smallest, smallest + extra % 1_000_000, smallest + extra] {
            let cut = (1..=threads).rev().find_map(|threads| demand.fit(threads, limit));
            let cut = cut.expect("one thread fits into the smallest");
            let sum: u64 = cut.terms.iter().map(|(_, bytes)| bytes).sum();
            prop_assert!(sum <= limit, "{sum} of {limit}");
            prop_assert!(cut.slot_elements >= MIN_CHUNK_ELEMENTS.min(demand.longest));
            prop_assert!(cut.bins.is_power_of_two() && cut.bins >= SKETCH_BINS_MIN);
        }
    }
}
