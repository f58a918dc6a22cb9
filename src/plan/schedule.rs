//! Cuts a plan into units and chunks under a memory budget.
//!
//! - A *unit* is a set of tensors that share trim thresholds: the whole model, or one tensor.
//! - A *chunk* is a run of elements of one tensor: what a worker loads, computes and writes at once.
//! - Peak memory is a sum of named terms, computed here before anything is read and never exceeded: buffers are
//!   allocated from these numbers and reused.
//!
//! Nothing here changes an output byte: only how often inputs are read, and how fast.

#[cfg(test)]
mod tests;

use std::time::Duration;

use super::passes::bytes_of;
use super::shares::HELD;
use super::spooling::{SPOOL, SPOOLED_ELEMENTS, Spooling};
use super::summary::PassSummary;
use super::upkeep::{account_bytes, catalogue_bytes};
use super::{Action, Goal, Plan, Wanted};
use crate::dtype::Float;
use crate::error::{Error, Result, printable};
use crate::limits::{
    AHEAD_BYTES, AHEAD_SHARE, CHUNK_ELEMENTS, CONNECTIONS_BYTES, GUESS_LOOKS, KEEP_AFTER_SECONDS, LISTED_BYTES,
    LISTED_THRESHOLDS, MAPPED_BYTES, MIN_CHUNK_ELEMENTS, NEAR_KEYS, NEAR_SHARE, OUT_ELEMENTS, PAGE_BYTES, PROBE_BLOCK,
    PROBE_GROUPS, PROBE_MAX_ELEMENTS, PROBE_MIN_ELEMENTS, PROBE_REMOTE_BLOCK, PROBE_SHARE, PROCESS_BYTES,
    RESIDENT_BYTES, RESIDENT_WINDOWS, SAMPLE_ELEMENTS, SKETCH_BINS_MAX, SKETCH_BINS_MIN, SMALL_UNIT_ELEMENTS,
    SOLO_ELEMENTS, THREAD_BYTES, TILE_ELEMENTS,
};
use crate::method::{Look, MAX_RANKS};
use crate::recipe::ThresholdKind;
use crate::storage::{Storage, Window};

/// What keeping track of one unit costs: itself, its list of one tensor, and the allocator's needs.
const UNIT_BYTES: u64 = size_of::<Unit>() as u64 + 32;

/// What keeping track of one window costs, with the allocator's own needs.
const WINDOW_BYTES: u64 = size_of::<Window>() as u64 + 32;

/// How a run is to be done: changes speed and memory, never output bytes.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    /// Upper bound of peak resident memory in bytes.
    pub memory_bytes: u64,
    /// Worker threads.
    pub threads: usize,
    /// How long work goes on before what it has found out is kept, where a kill would cost more than what was written since.
    pub keep_after: Duration,
}

impl Run {
    /// With so much memory and so many threads.
    pub const fn new(memory_bytes: u64, threads: usize) -> Self {
        Self { memory_bytes, threads, keep_after: Duration::from_secs(KEEP_AFTER_SECONDS) }
    }
}

/// What a look at a family asks of memory beyond what a merge of it does.
#[derive(Debug, Clone, Copy)]
pub struct Study {
    /// Thresholds per model.
    pub densities: u64,
    /// Elements over which sums run in one go: chunks hold whole ones.
    pub block_elements: u64,
    /// Sums of a block.
    pub sums: u64,
    /// Buffers of each thread, in bytes.
    pub thread_bytes: u64,
    /// What is held once, in bytes.
    pub held_bytes: u64,
}

/// A run of elements of one tensor (of bytes, for a tensor that is copied as it is).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Index into [`Plan::tensors`].
    pub tensor: u32,
    /// First element.
    pub start: u64,
    /// Number of elements.
    pub count: u64,
}

/// How often, and by whom, a unit's data is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnitKind {
    /// One tensor that one worker loads whole: sketched and merged from memory, read once.
    Solo,
    /// All chunks stay in memory between sketch and merge, shared by all workers: read once.
    Resident,
    /// Too large for memory: read once to sketch (after a probe, where exact) and once to merge.
    Streamed,
}

/// What is made together with a plan, from what it loads.
pub struct Together<'a> {
    /// Most thresholds that are sought at a time for one model.
    pub searches: u64,
    /// The plans of the outputs.
    pub plans: Vec<&'a Plan>,
    /// What is held beside them, in bytes: in all, and by each thread.
    pub held_bytes: (u64, u64),
    /// What the outputs want of a unit's models: goal i is about model i mod n of those that are loaded.
    pub goals: &'a dyn Fn(&Unit) -> Vec<Goal>,
}

/// Tensors that share trim thresholds.
#[derive(Debug, Clone)]
pub struct Unit {
    /// Indexes into [`Plan::tensors`].
    pub tensors: Vec<u32>,
    /// Elements of all of them.
    pub elements: u64,
    /// How it is read.
    pub kind: UnitKind,
    /// Longest chunk, in elements.
    pub chunk_elements: u64,
}

/// A plan cut for a run. See the module's documentation.
#[derive(Debug, Clone)]
pub struct Schedule {
    /// Worker threads (fewer than asked for where memory is short).
    pub threads: usize,
    /// Tensors that need no unit: copied, or merged without thresholds.
    pub direct: Vec<u32>,
    /// Longest chunk of a direct tensor, in elements.
    pub chunk_elements: u64,
    /// Units, in the order in which they are done.
    pub units: Vec<Unit>,
    /// Elements that a worker's windows can hold.
    pub slot_elements: u64,
    /// Widest element used of each checkpoint, in bytes: what its window must hold per element.
    pub widths: Vec<u64>,
    /// Most bins of one magnitude sketch.
    pub sketch_bins: usize,
    /// How long the search for the thresholds of a streamed unit goes on before what it has counted is kept.
    pub keep_after: Duration,
    /// Bytes held of ranges that are fetched from a network ahead of their use; 0 if no input is on one.
    pub ahead_bytes: u64,
    /// Elements of a merged tensor that are held, where its factors are sought; else none.
    pub held_elements: u64,
    /// What is kept on the local disk between the passes, if anything.
    pub spool: Option<Spooling>,
    /// The memory sum: (term, bytes).
    pub memory: Vec<(String, u64)>,
    /// The limit asked for.
    pub memory_limit: u64,
    /// What is read and written, pass by pass.
    pub passes: Vec<PassSummary>,
}

impl Schedule {
    /// Cuts `plan` for `run`; an error names the smallest memory that works.
    pub fn new(plan: &Plan, run: Run) -> Result<Self> {
        if let Some(factored) = &plan.factors {
            return factored.schedule(plan, run);
        }
        Self::cut(plan, run, Demand::of(plan))
    }

    /// The same for a merge that keeps on the local disk what it downloads, where that spares another download.
    pub fn with_spool(plan: &Plan, run: Run) -> Result<Self> {
        if plan.factors.is_some() {
            return Self::new(plan, run);
        }
        Self::cut_keeping(plan, run, Demand::of(plan), &|tensors| Spooling::of(plan, tensors))
    }

    /// Cuts `plan` for a run that makes other outputs of what it loads; see [`Self::new`].
    pub fn together(plan: &Plan, run: Run, others: &Together<'_>) -> Result<Self> {
        let mut demand = Demand::of(plan);
        demand.bounds = demand.bounds.max(others.searches);
        demand.catalogue_bytes += others.held_bytes.0;
        demand.scratch_bytes += others.held_bytes.1;
        for other in &others.plans {
            let own = Demand::of(other);
            demand.catalogue_bytes += own.catalogue_bytes;
            demand.account_bytes += own.account_bytes + THREAD_BYTES;
            demand.out_width = demand.out_width.max(own.out_width);
            demand.tile = demand.tile.max(own.tile);
        }
        Self::cut_keeping(plan, run, demand, &|tensors| Spooling::of_together(plan, tensors, others))
    }

    /// Cuts a look at the models of `plan` for `run`, that seeks `goals` in a unit: nothing is written, and no unit is held in
    /// memory by all workers.
    pub fn of_study(plan: &Plan, run: Run, study: Study, goals: &dyn Fn(&Unit) -> Vec<Goal>) -> Result<Self> {
        let mut demand = Demand::of(plan);
        demand.bounds = study.densities.max(1);
        demand.granule = study.block_elements;
        demand.sums = study.sums;
        demand.direct.clear();
        demand.study = Some(study);
        Self::cut_keeping(plan, run, demand, &|tensors| Spooling::of_study(plan, tensors, goals))
    }

    /// The same with sketches of `bins` bins, as runs that add up their sketches must have, and with room to write them
    /// down.
    pub fn with_bins(plan: &Plan, run: Run, bins: usize) -> Result<Self> {
        let demand = Demand { fixed_bins: Some(bins), ..Demand::of(plan) };
        Self::cut_keeping(plan, run, demand, &|tensors| Spooling::of(plan, tensors))
    }

    /// Cuts `plan` for a run that keeps on the local disk what it needs again of what it downloads: what `worth` says of the
    /// tensors that are read more than once. Where there is no memory for that, nothing is kept: what helps to read less must
    /// not be what fails.
    fn cut_keeping(plan: &Plan, run: Run, demand: Demand, worth: &dyn Fn(&[u32]) -> Option<Spooling>) -> Result<Self> {
        let without = Self::cut(plan, run, demand.clone())?;
        if !plan.is_remote() {
            return Ok(without);
        }
        let mut tensors = if plan.per_tensor() { without.streamed() } else { demand.grouped.clone() };
        // Keeping takes memory, and so leaves more tensors too long for what is left: more than once only for their table.
        for _ in 0..3 {
            let spool = worth(&tensors).filter(|spool| spool.is_modest(run.memory_bytes));
            let Some(spool) = spool else { break };
            let Ok(kept) = Self::cut(plan, run, Demand { spool: Some(spool), ..demand.clone() }) else { break };
            if !plan.per_tensor() {
                return Ok(kept);
            }
            tensors = kept.streamed();
            // Of some there is nothing worth keeping.
            let worth = worth(&tensors);
            if kept.spool.as_ref().zip(worth).is_some_and(|(spool, worth)| spool.has_all_of(&worth)) {
                return Ok(kept);
            }
        }
        Ok(without)
    }

    /// Tensors that are read more than once, in increasing order.
    fn streamed(&self) -> Vec<u32> {
        let streamed = self.units.iter().filter(|unit| unit.kind == UnitKind::Streamed);
        let mut tensors: Vec<u32> = streamed.flat_map(|unit| unit.tensors.iter().copied()).collect();
        tensors.sort_unstable();
        tensors
    }

    fn cut(plan: &Plan, run: Run, demand: Demand) -> Result<Self> {
        let mut cut = None;
        for threads in (1..=run.threads.max(1)).rev() {
            cut = demand.fit(threads, run.memory_bytes);
            if cut.is_some() {
                break;
            }
        }
        let Some(cut) = cut else {
            let smallest = demand.smallest();
            return Err(Error::usage(format!(
                "--memory {} bytes is too little for this plan: at least {smallest} bytes are needed",
                run.memory_bytes
            ))
            .help(match &demand.shared {
                Some((bytes, tensor)) => format!(
                    "use --memory {}MB or more: the Gram matrices of \"{}\" and their factor take {bytes} bytes",
                    smallest.div_ceil(1_000_000),
                    printable(tensor)
                ),
                None => format!("use --memory {}MB or more", smallest.div_ceil(1_000_000)),
            }));
        };
        let units = demand.units(plan, &cut, run.memory_bytes);
        let mut schedule = Self {
            threads: cut.threads,
            direct: demand.direct,
            chunk_elements: cut.slot_elements.min(CHUNK_ELEMENTS.max(demand.granule)),
            units,
            slot_elements: cut.slot_elements,
            widths: demand.widths,
            sketch_bins: cut.bins,
            keep_after: run.keep_after,
            ahead_bytes: cut.ahead_bytes,
            held_elements: 0,
            spool: demand.spool,
            memory: cut.terms,
            memory_limit: run.memory_bytes,
            passes: Vec::new(),
        };
        let resident = |u: &&Unit| u.kind == UnitKind::Resident && !plan.per_tensor();
        for unit in schedule.units.iter().filter(resident) {
            let chunks = Self::chunks(plan, &unit.tensors, unit.chunk_elements).count() as u64;
            let bytes = bytes_of(plan, &unit.tensors, Wanted::All);
            let held = held_bytes(bytes, chunks * schedule.widths.len() as u64);
            schedule.memory.push((HELD.into(), held));
        }
        // What is held in memory is read once.
        if !schedule.units.iter().any(|unit| unit.kind == UnitKind::Streamed) {
            schedule = schedule.without_spool(plan);
        }
        schedule.passes = schedule.passes(plan);
        Ok(schedule)
    }

    /// Tells `storage` how much memory it has for ranges that are fetched ahead of their use.
    pub fn allow_ahead(&self, plan: &Plan, storage: &dyn Storage) {
        if self.ahead_bytes > 0 {
            storage.read_ahead(self.ahead_bytes, plan.checkpoints.iter().filter(|c| c.is_remote()).count());
        }
    }

    /// The smallest memory that `plan` can be cut for, in bytes.
    pub fn smallest_memory(plan: &Plan) -> u64 {
        Demand::of(plan).smallest()
    }

    /// Bytes that are read to find all thresholds and whatever else comes before merging.
    pub fn search_bytes(&self, plan: &Plan) -> u64 {
        let before = self.passes.iter().filter(|pass| !["merge", "factor"].contains(&pass.name));
        let held = self.units.iter().filter(|unit| unit.kind != UnitKind::Streamed);
        before.map(|pass| pass.bytes_read).sum::<u64>()
            + held.map(|unit| bytes_of(plan, &unit.tensors, Wanted::All)).sum::<u64>()
    }

    /// Peak memory promised, in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.memory.iter().map(|(_, bytes)| bytes).sum()
    }

    /// The chunks of `tensors`, in order, each of at most `chunk_elements`.
    pub fn chunks<'a>(plan: &'a Plan, tensors: &'a [u32], chunk_elements: u64) -> impl Iterator<Item = Chunk> + 'a {
        tensors.iter().flat_map(move |&tensor| Self::chunks_of(plan, tensor, 0..plan.length(tensor), chunk_elements))
    }

    /// The chunks of elements `range` of one tensor.
    pub fn chunks_of(
        plan: &Plan,
        tensor: u32,
        range: std::ops::Range<u64>,
        chunk_elements: u64,
    ) -> impl Iterator<Item = Chunk> + '_ {
        let (mut start, end) = (range.start, range.end);
        std::iter::from_fn(move || {
            let count = plan.aligned(tensor, start, chunk_elements).min(end - start);
            let chunk = Chunk { tensor, start, count };
            start += count;
            (count > 0).then_some(chunk)
        })
    }

    /// The blocks that a probe of `unit` reads, in order: one in each of as many cells of equal length as there are, at a place
    /// in it that changes, so that what repeats in the data (rows, heads) is met in all of its phases.
    pub fn probe_blocks<'a>(plan: &'a Plan, unit: &'a Unit) -> impl Iterator<Item = Chunk> + 'a {
        let block = if plan.is_remote() { PROBE_REMOTE_BLOCK } else { PROBE_BLOCK };
        let wanted = (unit.elements / PROBE_SHARE).min(PROBE_MAX_ELEMENTS).max(PROBE_MIN_ELEMENTS.min(unit.elements));
        let cell = (u128::from(unit.elements) * u128::from(block) / u128::from(wanted.max(1))) as u64;
        // A small unit is probed whole, across the ends of its tensors.
        let whole = cell <= block;
        let room = cell.saturating_sub(block) + 1;
        let cells = if whole { 0 } else { unit.elements / cell };
        let mut places = (0..cells).map(move |index| index * cell + changing_place(index, room));
        let mut tensors = unit.tensors.iter().map(|&tensor| (tensor, plan.length(tensor)));
        let (mut current, mut begin) = (tensors.next(), 0);
        let sampled = std::iter::from_fn(move || {
            let place = places.next()?;
            loop {
                let (tensor, length) = current?;
                if place < begin + length {
                    let start = place - begin;
                    return Some(Chunk { tensor, start, count: block.min(length - start) });
                }
                begin += length;
                current = tensors.next();
            }
        });
        whole.then(|| Self::chunks(plan, &unit.tensors, block)).into_iter().flatten().chain(sampled)
    }

    /// How often the sample of a probe is looked at, at most.
    pub fn probe_looks(&self, plan: &Plan) -> u64 {
        if plan.can_guess() && !plan.is_remote() { GUESS_LOOKS } else { 1 }
    }
}

/// What a plan asks of memory, before the run is known.
#[derive(Debug, Clone)]
struct Demand {
    widths: Vec<u64>,
    out_width: u64,
    models: u64,
    /// Columns of a tile: models, and what they have besides.
    columns: u64,
    /// Thresholds per model.
    bounds: u64,
    /// Elements of the longest tile, and of the longest granule, if there are any.
    tile: u64,
    granule: u64,
    /// Most sums, and most ranks, that a look gathers.
    sums: u64,
    ranks: u64,
    /// Longest tensor, in elements (bytes for raw copies).
    longest: u64,
    /// Longest tensor that is a unit of its own.
    longest_unit: u64,
    /// Elements of the largest unit.
    unit_elements: u64,
    trims: bool,
    tensor_scope: bool,
    /// Thresholds are the true ones, so that units are probed and sketched narrowly.
    exact: bool,
    catalogue_bytes: u64,
    account_bytes: u64,
    /// What reading computed tensors takes, in bytes.
    scratch_bytes: u64,
    /// What all readers of computed tensors share, in bytes, and the tensor that takes the most.
    shared: Option<(u64, Box<str>)>,
    /// Some input is read over a network.
    remote: bool,
    /// Bins of a sketch, where they are not chosen here.
    fixed_bins: Option<usize>,
    /// What is kept on the local disk between the passes.
    spool: Option<Spooling>,
    direct: Vec<u32>,
    /// Tensors that belong to units, in the order of work.
    grouped: Vec<u32>,
    /// What is asked for beyond that by a look at the models, which is no merge.
    study: Option<Study>,
}

/// A division of memory that fits.
struct Cut {
    threads: usize,
    slot_elements: u64,
    bins: usize,
    ahead_bytes: u64,
    terms: Vec<(String, u64)>,
}

impl Demand {
    fn of(plan: &Plan) -> Self {
        let needs = plan.needs();
        let needs_units = plan.selects() || plan.votes() || !needs.looks.is_empty();
        let sums = |look| plan.params.iter().map(|set| set.merger.sums(look, plan.models())).max().unwrap_or(0);
        let merged = |t: &u32| matches!(plan.tensors[*t as usize].action, Action::Merge { .. });
        let all = 0..plan.tensors.len() as u32;
        let (mut grouped, direct): (Vec<u32>, Vec<u32>) = all.partition(|t| needs_units && merged(t));
        if plan.position_ordered() {
            // Ties are kept by lowest position, and positions are counted in name order.
            grouped.sort_by(|&a, &b| plan.tensors[a as usize].name.cmp(&plan.tensors[b as usize].name));
        }
        let mut widths = vec![0u64; plan.checkpoints.len()];
        let mut out_width = 1;
        for t in 0..plan.tensors.len() as u32 {
            for piece in plan.pieces(t, Wanted::All) {
                let width = if plan.is_raw_copy(t) { 1 } else { plan.float_width(piece) };
                let slot = &mut widths[piece.checkpoint as usize];
                *slot = (*slot).max(width);
            }
            if let Some(float) = Float::from_dtype(plan.tensors[t as usize].dtype) {
                out_width = out_width.max(float.width() as u64);
            }
        }
        let tensor_scope = plan.per_tensor();
        let columns = grouped.iter().map(|&t| plan.columns(t)).max().unwrap_or(1);
        let longest = |tensors: &[u32]| tensors.iter().map(|&t| plan.length(t)).max().unwrap_or(0);
        Self {
            out_width,
            models: plan.models() as u64,
            columns: plan.tile_columns() as u64,
            bounds: plan.bounds() as u64,
            tile: (0..plan.tensors.len() as u32).map(|t| plan.tile(t)).max().unwrap_or(TILE_ELEMENTS) as u64,
            granule: (0..plan.tensors.len() as u32).filter_map(|t| plan.granule(t)).max().unwrap_or(0),
            sums: ((0..needs.looks.len()).map(sums).max().unwrap_or(0) * columns) as u64,
            ranks: if needs.looks.contains(&Look::Ranks) { MAX_RANKS as u64 } else { 0 },
            longest: longest(&direct).max(longest(&grouped)).max(1),
            longest_unit: if tensor_scope { longest(&grouped) } else { 0 },
            unit_elements: match tensor_scope {
                true => longest(&grouped),
                false => grouped.iter().map(|&t| plan.length(t)).sum(),
            },
            trims: plan.selects(),
            tensor_scope,
            exact: plan.selects() && plan.trim.as_ref().is_some_and(|t| t.threshold == ThresholdKind::Exact),
            catalogue_bytes: catalogue_bytes(plan),
            account_bytes: account_bytes(plan, if tensor_scope { grouped.len() as u64 } else { 1 }),
            scratch_bytes: plan.checkpoints.iter().map(|c| c.derived.scratch_bytes).max().unwrap_or(0),
            shared: plan.checkpoints.iter().filter_map(|c| c.derived.shared.clone()).max(),
            remote: plan.is_remote(),
            fixed_bins: None,
            spool: None,
            widths,
            direct,
            grouped,
            study: None,
        }
    }

    /// The division for `threads` workers, or `None` if not even the smallest fits into `limit`.
    fn fit(&self, threads: usize, limit: u64) -> Option<Cut> {
        let (smallest, mut bins) = (self.smallest_slot(), self.fewest_bins());
        let fixed = self.terms(threads, smallest, bins, 0).iter().map(|(_, b)| b).sum::<u64>();
        if fixed > limit {
            return None;
        }
        let ahead = if self.remote { AHEAD_BYTES.min(limit / AHEAD_SHARE).min(limit - fixed) } else { 0 };
        let total = |slot, bins| self.terms(threads, slot, bins, ahead).iter().map(|(_, b)| b).sum::<u64>();
        // Windows come first, as far as they make reads long; then narrow bins, so that one look finds a threshold;
        // then windows that hold whole tensors, so that one read serves sketch and merge.
        let mut slot = CHUNK_ELEMENTS.min(self.longest).max(smallest);
        while total(slot, bins) > limit {
            slot = (slot / 2).max(smallest);
        }
        if self.exact && self.fixed_bins.is_none() {
            // Narrow bins spare looks at the data; in tensor scope, windows that hold whole tensors spare more.
            // A look at several densities has as many sketches more, which are to be emptied and added up.
            let (most, share) = match (self.tensor_scope, &self.study) {
                (true, _) => (SKETCH_BINS_MAX / 4, limit / 8),
                (false, Some(_)) => (SKETCH_BINS_MAX / 4, limit / 4),
                (false, None) => (SKETCH_BINS_MAX, limit),
            };
            // More bins than magnitudes would only be memory to clear.
            let most = most.min(self.unit_elements.min(SKETCH_BINS_MAX as u64).next_power_of_two() as usize);
            let sketches = |bins| total(slot, bins) - total(slot, 0);
            while bins < most && sketches(bins * 2) <= share && total(slot, bins * 2) <= limit / 4 * 3 {
                bins *= 2;
            }
        }
        if self.longest_unit > slot {
            let share = self.longest_unit.div_ceil(threads as u64) + OUT_ELEMENTS;
            let whole = share.max(SOLO_ELEMENTS).min(self.longest_unit);
            // The longest window with which the whole sum still fits.
            let (mut low, mut high) = (slot, whole.max(slot));
            while low < high {
                let middle = low + (high - low).div_ceil(2);
                if total(middle, bins) <= limit {
                    low = middle;
                } else {
                    high = middle - 1;
                }
            }
            slot = low;
        }
        let terms = self.terms(threads, slot, bins, ahead);
        Some(Cut { threads, slot_elements: slot, bins, ahead_bytes: ahead, terms })
    }

    /// The shortest windows that work.
    fn smallest_slot(&self) -> u64 {
        MIN_CHUNK_ELEMENTS.max(self.granule).min(self.longest)
    }

    fn fewest_bins(&self) -> usize {
        self.fixed_bins.unwrap_or(SKETCH_BINS_MIN)
    }

    fn smallest(&self) -> u64 {
        self.terms(1, self.smallest_slot(), self.fewest_bins(), 0).iter().map(|(_, b)| b).sum()
    }

    /// Peak memory as a sum.
    fn terms(&self, threads: usize, slot_elements: u64, bins: usize, ahead: u64) -> Vec<(String, u64)> {
        let n = threads as u64;
        let windows = slot_elements * self.widths.iter().sum::<u64>() + self.widths.len() as u64 * PAGE_BYTES;
        // Inputs, base, signs, results, scratch and exceptions, and the order of a row's entries.
        let tiles = (self.columns + 5) * self.tile * 4 + self.tile * 8;
        let out = OUT_ELEMENTS.min(slot_elements.max(1)) * self.out_width;
        let mut terms = vec![
            ("program and allocator".to_string(), PROCESS_BYTES + n * THREAD_BYTES),
            ("catalogue of tensors".to_string(), self.catalogue_bytes),
            ("hashes, journal and side files".to_string(), self.account_bytes),
            (format!("input windows ({threads} threads)"), n * windows),
            (format!("output buffers and tiles ({threads} threads)"), n * (out + tiles)),
        ];
        if self.remote {
            terms.push(("ranges from the network, ahead of their use".to_string(), ahead + CONNECTIONS_BYTES));
        }
        if let Some(spool) = &self.spool {
            let (thread, table) = spool.held_bytes(slot_elements);
            terms.push((SPOOL.to_string(), n * thread + table));
        }
        if self.scratch_bytes > 0 {
            terms.push((format!("computed inputs ({threads} threads)"), n * self.scratch_bytes));
        }
        if let Some((bytes, _)) = self.shared {
            terms.push(("Gram matrices of a layer".to_string(), bytes));
        }
        if self.trims {
            // Each worker's sketches, and the sum of them.
            let searches = self.models * self.bounds;
            let sketches = (n + 1) * searches * bins as u64 * 8;
            // A worker's sample and the keys near each threshold; samples of a unit that all workers share.
            let sample = SMALL_UNIT_ELEMENTS.max(SAMPLE_ELEMENTS);
            let own = sample.min(slot_elements) + searches * near_keys(slot_elements);
            let keys = 4 * (n * own + self.models * sample);
            let keys = if self.exact { keys } else { 0 };
            // Parts probe together, if one of them has room for what is kept.
            let bounds =
                self.spool.as_ref().is_some_and(Spooling::needs_bounds) || self.fixed_bins.is_some() && self.remote;
            let probe =
                if self.exact || bounds { PROBE_GROUPS as u64 * self.models * SKETCH_BINS_MIN as u64 * 4 } else { 0 };
            terms.push(("magnitude sketches".to_string(), sketches + keys + probe));
            if self.fixed_bins.is_some() {
                // All of them compressed, in the worst case to their own length, and one on its way there.
                terms.push(("sketches written down".to_string(), (searches + 2) * bins as u64 * 8));
            }
            let units = if self.tensor_scope { self.grouped.len() as u64 } else { 1 };
            let listed = (units * self.models * self.bounds).min(LISTED_THRESHOLDS as u64) * LISTED_BYTES;
            terms.push(("units and their thresholds".to_string(), units * UNIT_BYTES + listed));
        }
        if self.sums + self.ranks > 0 {
            // The sums of each granule of a chunk that waits for the chunks before it; a tensor alone adds up as it goes.
            let granules = slot_elements.min(CHUNK_ELEMENTS.max(self.granule)).div_ceil(MIN_CHUNK_ELEMENTS) + 1;
            let sketches = (n + 1) * self.ranks * SKETCH_BINS_MIN as u64 * 8;
            terms.push(("sums and scores of tensors".to_string(), (n * granules + 2) * self.sums * 8 + sketches));
        }
        if let Some(study) = &self.study {
            terms.push(("figures of tensors, layers and kinds".to_string(), n * study.thread_bytes + study.held_bytes));
        }
        terms
    }

    fn units(&self, plan: &Plan, cut: &Cut, limit: u64) -> Vec<Unit> {
        if self.grouped.is_empty() {
            return Vec::new();
        }
        let longest = if self.spool.is_some() { SPOOLED_ELEMENTS } else { CHUNK_ELEMENTS };
        let streamed_chunk = cut.slot_elements.min(longest.max(self.granule));
        let elements = |tensors: &[u32]| tensors.iter().map(|&t| plan.length(t)).sum::<u64>();
        if !self.tensor_scope {
            let used: u64 = cut.terms.iter().map(|(_, b)| b).sum();
            let chunks = Schedule::chunks(plan, &self.grouped, streamed_chunk);
            let windows = chunks.take(RESIDENT_WINDOWS as usize + 1).count() as u64 * self.widths.len() as u64;
            let bytes = bytes_of(plan, &self.grouped, Wanted::All);
            let small = bytes <= RESIDENT_BYTES && windows <= RESIDENT_WINDOWS;
            // A machine that does a part does not have all of it.
            let alone = self.study.is_none() && self.fixed_bins.is_none();
            let fits = alone && small && used + held_bytes(bytes, windows) <= limit;
            return vec![Unit {
                elements: elements(&self.grouped),
                tensors: self.grouped.clone(),
                kind: if fits { UnitKind::Resident } else { UnitKind::Streamed },
                chunk_elements: streamed_chunk,
            }];
        }
        // Chunks end at round places of the output, or at granules.
        let spare = OUT_ELEMENTS.max(self.granule);
        let unit = |&t: &u32| {
            let length = plan.length(t);
            let share = length.div_ceil(cut.threads as u64);
            let (kind, chunk_elements) = match length {
                n if n <= cut.slot_elements.min(SOLO_ELEMENTS) => (UnitKind::Solo, n.max(1)),
                _ if self.study.is_none() && share + spare <= cut.slot_elements => (UnitKind::Resident, share + spare),
                _ => (UnitKind::Streamed, streamed_chunk),
            };
            Unit { tensors: vec![t], elements: length, kind, chunk_elements }
        };
        self.grouped.iter().map(unit).collect()
    }
}

/// What `windows` windows hold that show `bytes` bytes: those that are mapped show whole pages.
fn held_bytes(bytes: u64, windows: u64) -> u64 {
    bytes + bytes / MAPPED_BYTES as u64 * PAGE_BYTES + windows * WINDOW_BYTES
}

/// One of `places` that changes with `index`: the multiples of the golden ratio, modulo 1, are as even as those of any number.
pub fn changing_place(index: u64, places: u64) -> u64 {
    let share = index.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((u128::from(share) * u128::from(places)) >> 64) as u64
}

/// Most keys that a worker with windows of `slot_elements` lists near one threshold.
pub fn near_keys(slot_elements: u64) -> u64 {
    NEAR_KEYS.min(slot_elements / NEAR_SHARE).max(1)
}
