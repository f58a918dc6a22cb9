//! LoRA adapters of any ranks, merged with each other: the merged ΔW of a module, and the factors that come closest to it.
//!
//! - Thresholds are found as in any merge. Then, module by module, rows of ΔW are merged into memory: all of them, or as many
//!   as fit, again for each product.
//! - The factors are those of a truncated singular value decomposition, which is the closest matrix of that rank (Eckart,
//!   Young 1936): found by subspace iteration with more columns than the rank, from a fixed start (Halko et al. 2011,
//!   algorithm 4.4), until another round makes the rest of ΔW shorter by less than [`PROGRESS`] of it. B' = U √S and
//!   A' = √S Vᵀ.
//! - All sums run in a fixed order (`tall`, `spectrum`): the same bytes for any threads, memory and instruction set.
//! - What is done is done by module: an interrupted run knows its thresholds, and goes on with the module that it was at. In the
//!   journal, thresholds and searches for them have the numbers of modules, and what was counted of a module has the number
//!   behind these ([`Factored::result`]).

mod spectrum;
mod tall;

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::cut::{Cut, TieChain, TieCounts};
use super::kept::Kept;
use super::output::OutputDir;
use super::passes::{Passes, lookahead, prefetch, ties_before};
use super::records::UnitDone;
use super::select::{Thresholds, UnitThresholds, cuts, tensor_cuts};
use super::shards::{ShardWriter, write_shards};
use super::turns::Pending;
use super::under_way::{Notes, add};
use super::worker::{Known, Tally};
use super::{Finished, Observer, check_inputs_unchanged, pool, report};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::kernels;
use crate::limits::OUT_ELEMENTS;
use crate::plan::{Action, Chunk, Factored, Overflow, Plan, Schedule, Unit, UnitKind, Wanted, search_columns};
use spectrum::{Spectrum, spectrum};
use tall::{Hands, Tall};

/// The search ends when a round makes what is left of ΔW, squared, smaller by less than this share of it.
const PROGRESS: f64 = 1e-6;
/// What of ΔW, squared, is rounding.
const ROUNDING: f64 = 1e-13;
/// Most rounds.
const ROUNDS: usize = 16;
/// Entries of a factor that are written at a time.
const WRITTEN: usize = 1 << 14;

/// How much of the merged changes their factors hold.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FactorReport {
    /// Rank of every module.
    pub rank: u64,
    /// Length (Frobenius norm) of all factors' products, as a fraction of that of all merged changes.
    pub kept_norm: f64,
    /// The same of the module that it is least of.
    pub least_kept_norm: f64,
    /// That module's weight.
    pub least_kept: String,
}

/// The length of ΔW and of what its factors hold, squared; what was counted while it was merged.
#[derive(Debug, Clone, PartialEq)]
struct Counted {
    whole: f64,
    kept: f64,
    tally: Tally,
    /// Where they are kept by position.
    ties: TieCounts,
}

impl Counted {
    /// As numbers for the journal, which are exact below 2^53.
    fn facts(&self) -> Vec<f64> {
        let counts = [self.tally.conflicts, self.tally.merged];
        let counts = counts.iter().chain(&self.tally.kept).chain(&self.tally.agreeing).chain(&self.ties);
        [self.whole, self.kept].into_iter().chain(counts.map(|&count| count as f64)).collect()
    }

    /// From such numbers about module `index` of `merged`, if they can be that.
    fn of(done: &UnitDone, merged: &Plan, index: usize) -> Option<Self> {
        let (models, most) = (merged.models(), merged.tensors[index].elements);
        let (lengths, counts) = done.facts.split_first_chunk::<2>()?;
        let counts: Vec<u64> = counts.iter().map(|&count| count as u64).collect();
        let (&[conflicts, of_all], rest) = counts.split_first_chunk::<2>()?;
        let sound = done.facts.iter().all(|fact| fact.is_finite() && *fact >= 0.0);
        if !sound || counts.iter().any(|&count| count > most) || rest.len() != models * (2 + merged.bounds()) {
            return None;
        }
        let ((kept, rest), [whole, held]) = (rest.split_at(models), *lengths);
        let (agreeing, ties) = rest.split_at(models);
        let counted = Tally { kept: kept.to_vec(), agreeing: agreeing.to_vec(), ..Tally::of(models) };
        let tally = Tally { conflicts, merged: of_all, bytes_read: done.bytes_read, ..counted };
        Some(Self { whole, kept: held, tally, ties: ties.to_vec() })
    }
}

/// What came of the work.
struct Found {
    /// Per module.
    counted: Vec<Counted>,
    thresholds: Thresholds,
    /// Bytes read to find them.
    searched: u64,
    /// Parts of factors that an earlier attempt had written.
    reused: u64,
}

/// Passes a stop on, and no progress: how often a module is read is not known beforehand.
struct Quiet<'a>(&'a dyn Observer);

impl Observer for Quiet<'_> {
    fn stopped(&self) -> bool {
        self.0.stopped()
    }
}

/// What is known of a unit before its tensors are merged.
struct Ready {
    cuts: Vec<Cut>,
    known: Known,
    thresholds: UnitThresholds,
}

/// The work on all modules.
struct Factoring<'a> {
    plan: &'a Plan,
    factored: &'a Factored,
    schedule: &'a Schedule,
    passes: Passes<'a>,
    observer: &'a dyn Observer,
    /// Per unit, and per tensor its unit, where there is one.
    units: Vec<Ready>,
    unit_of: Vec<Option<usize>>,
    hands: Hands,
    /// Rows of ΔW.
    block: Vec<f32>,
    /// Ties before the module, in the order of positions.
    ties: TieCounts,
}

/// The module that is being worked on.
struct Module {
    index: usize,
    rows: usize,
    columns: usize,
    /// Rows that are held at a time.
    held: usize,
    /// Whether all rows are in memory.
    loaded: bool,
    /// Ties before each block, once they are counted.
    ties: Vec<TieCounts>,
    /// The squared length of ΔW, once it is known.
    whole: Option<f64>,
}

/// Merges, seeks the factors and writes them.
pub(super) fn run(
    plan: &Plan,
    factored: &Factored,
    schedule: &Schedule,
    dir: &OutputDir,
    observer: &dyn Observer,
    begin: Instant,
) -> Result<Finished> {
    let mut found = None;
    let all = 0..plan.layout.shards.len();
    // Nothing is written before all thresholds are recorded.
    let makes_sense = |kept: &Kept| {
        let written = (0..plan.tensors.len() as u32).any(|tensor| kept.has_part_of(tensor));
        !written || schedule.units.iter().all(|unit| kept.unit(&factored.merged, unit).is_some())
    };
    let written = write_shards(plan, dir, all, observer, None, &makes_sense, |writer, kept| {
        found = Some(work(plan, factored, schedule, observer, writer, kept)?);
        Ok(())
    })?;
    check_inputs_unchanged(plan)?;
    observer.go_on()?;
    let Found { counted, thresholds, searched, reused } = found.expect("the work was done");
    let merged = &factored.merged;
    let mut tally = Tally { bytes_read: searched, ..Tally::of(plan.models()) };
    counted.iter().for_each(|counted| tally.add(&counted.tally));
    let mut report = report(merged, schedule, (&dir.dir, dir.resumes()), &tally, &thresholds, plan.warnings.clone());
    report.tensors = plan.tensors.len() as u64;
    report.elements = plan.tensors.iter().map(|tensor| tensor.elements).sum();
    report.bytes_written = plan.layout.shards.iter().map(|shard| shard.bytes).sum();
    report.factors = Some(summary(factored, &counted));
    report.chunks_reused = reused;
    report.wall_seconds = begin.elapsed().as_secs_f64();
    Ok(Finished { report, written, thresholds })
}

/// Makes the damaged files of a finished output again.
pub(super) fn repair(
    plan: &Plan,
    factored: &Factored,
    schedule: &Schedule,
    observer: &dyn Observer,
    writer: &ShardWriter<'_>,
) -> Result<()> {
    work(plan, factored, schedule, observer, writer, &Kept::new(plan)).map(drop)
}

fn work(
    plan: &Plan,
    factored: &Factored,
    schedule: &Schedule,
    observer: &dyn Observer,
    writer: &ShardWriter<'_>,
    kept: &Kept,
) -> Result<Found> {
    let merged = &factored.merged;
    // What is kept are parts of factors; of what is merged, nothing is.
    let nothing = Kept::new(merged);
    let mut passes = Passes::new(merged, schedule, observer, None, &nothing);
    passes.notes = Some(Notes::of_merge(merged, writer, &kept.under_way));
    let mut factoring = Factoring {
        plan,
        factored,
        schedule,
        passes,
        observer,
        units: Vec::new(),
        unit_of: vec![None; merged.tensors.len()],
        hands: Hands::new(schedule.threads),
        block: Vec::with_capacity(schedule.held_elements as usize),
        ties: vec![0; merged.models() * merged.bounds()],
    };
    factoring.find_thresholds(writer, kept)?;
    let searched = factoring.passes.tally().bytes_read;
    let counted = factoring.modules(writer, kept)?;
    let mut thresholds = Thresholds::new(merged.models(), merged.selects());
    for (number, unit) in factoring.units.into_iter().enumerate().take(schedule.units.len()) {
        let own = counted.iter().zip(&factoring.unit_of).filter(|(_, of)| **of == Some(number));
        let mut survivors = vec![0; merged.models()];
        own.for_each(|(counted, _)| survivors.iter_mut().zip(&counted.tally.kept).for_each(|(sum, n)| *sum += n));
        thresholds.record(unit.thresholds, &survivors);
    }
    Ok(Found { counted, thresholds, searched, reused: kept.ranges })
}

fn summary(factored: &Factored, counted: &[Counted]) -> FactorReport {
    let share = |kept: f64, whole: f64| if whole > 0.0 { (kept / whole).sqrt().min(1.0) } else { 1.0 };
    let shares = counted.iter().map(|counted| share(counted.kept, counted.whole));
    let least = shares.enumerate().min_by(|(_, a), (_, b)| a.total_cmp(b));
    let (index, least_kept_norm) = least.unwrap_or((0, 1.0));
    let sum = |part: fn(&Counted) -> f64| counted.iter().map(part).sum();
    FactorReport {
        rank: factored.rank,
        kept_norm: share(sum(|counted| counted.kept), sum(|counted| counted.whole)),
        least_kept_norm,
        least_kept: factored.modules.get(index).map_or(String::new(), |module| module.name.to_string()),
    }
}

impl Factoring<'_> {
    /// What survives of each tensor. Thresholds are kept, at the latest when all of them are found.
    fn find_thresholds(&mut self, writer: &ShardWriter<'_>, kept: &Kept) -> Result<()> {
        let merged = self.passes.plan;
        let lacking = self.schedule.units.iter().filter(|unit| kept.unit(merged, unit).is_none()).count();
        if lacking > 0 && !self.passes.announces_passes() {
            self.observer.stage("sketch", self.schedule.search_bytes(merged));
        }
        let mut left = lacking;
        for unit in &self.schedule.units {
            let ready = match kept.unit(merged, unit) {
                Some(known) => {
                    // Else there is no stage that it is a part of.
                    self.observer.advance(if lacking > 0 { known.bytes_read } else { 0 });
                    self.known(unit, known)
                }
                None => {
                    left -= 1;
                    let (ready, done) = self.search(unit)?;
                    if left > 0 {
                        writer.keep_soon(done)?
                    } else {
                        writer.keep(done)?
                    }
                    ready
                }
            };
            unit.tensors.iter().for_each(|&tensor| self.unit_of[tensor as usize] = Some(self.units.len()));
            self.units.push(ready);
        }
        // Tensors without thresholds are as a unit of their own, of which nothing is cut.
        let known = Known::default();
        let thresholds = UnitThresholds { tensor: 0, found: Vec::new() };
        let cuts = vec![Cut::NonZero; merged.models()];
        if self.unit_of.iter().any(Option::is_none) {
            self.units.push(Ready { cuts, known, thresholds });
        }
        Ok(())
    }

    /// A unit whose thresholds an earlier attempt found.
    fn known(&mut self, unit: &Unit, known: &UnitDone) -> Ready {
        let merged = self.passes.plan;
        let (goals, found): (_, Vec<_>) = (merged.goals(unit), known.found.iter().map(|f| f.map(|(t, _)| t)).collect());
        self.passes.take_over_reads(known.bytes_read);
        Ready {
            cuts: cuts(merged, &goals, &found),
            known: Known { majority: f32::from(known.majority), facts: known.facts.clone() },
            thresholds: UnitThresholds::new(unit, &goals, &found),
        }
    }

    /// Searches the thresholds of a unit.
    fn search(&mut self, unit: &Unit) -> Result<(Ready, UnitDone)> {
        let (merged, before) = (self.passes.plan, self.passes.tally().bytes_read);
        let mut unit = unit.clone();
        if unit.kind == UnitKind::Solo {
            (unit.kind, unit.chunk_elements) = (UnitKind::Streamed, self.schedule.chunk_elements);
        }
        let goals = merged.goals(&unit);
        let mut resident = self.passes.hold(&unit);
        let found = self.passes.shared_thresholds(&unit, &goals, &mut resident, None)?;
        let cuts = cuts(merged, &goals, &found);
        let facts = self.passes.facts(&unit, &mut resident, &cuts)?;
        let majority = self.passes.majority(&unit, &mut resident, &cuts, &facts)?;
        self.passes.give_back(resident);
        let thresholds = UnitThresholds::new(&unit, &goals, &found);
        let done = UnitDone {
            tensor: thresholds.tensor,
            found: thresholds.found.clone(),
            majority: majority as i8,
            bytes_read: self.passes.tally().bytes_read - before,
            facts: facts.clone(),
        };
        Ok((Ready { cuts, known: Known { majority, facts }, thresholds }, done))
    }

    /// Does all modules, in the order of positions.
    fn modules(&mut self, writer: &ShardWriter<'_>, kept: &Kept) -> Result<Vec<Counted>> {
        let merged = self.passes.plan;
        let area = |index: usize| merged.tensors[index].elements;
        let mut order: Vec<usize> = (0..merged.tensors.len()).collect();
        if merged.position_ordered() {
            order.sort_by(|&a, &b| merged.tensors[a].name.cmp(&merged.tensors[b].name));
        }
        self.observer.stage("factor", order.iter().map(|&index| 4 * area(index)).sum());
        let mut counted: Vec<Option<Counted>> = vec![None; order.len()];
        for index in order {
            self.observer.go_on()?;
            let (a, b) = (2 * index as u32, 2 * index as u32 + 1);
            let done = |tensor: u32| kept.gaps(tensor, self.plan.length(tensor)).next().is_none();
            let known = kept.done(self.factored.result(index)).filter(|_| done(a) && done(b));
            let known = known.and_then(|unit| Counted::of(unit, merged, index));
            if merged.scope == crate::plan::Scope::Tensor {
                self.ties.fill(0);
            }
            counted[index] = Some(match known {
                Some(known) => {
                    add(&mut self.ties, &known.ties);
                    known
                }
                None => self.module(index, writer, kept)?,
            });
            self.observer.advance(4 * area(index));
        }
        Ok(counted.into_iter().flatten().collect())
    }

    fn open(&self, index: usize) -> Module {
        let (rows, columns) = self.factored.shape(index);
        let (rows, columns) = (rows as usize, columns as usize);
        let mut held = (self.schedule.held_elements as usize / columns.max(1)).clamp(1, rows.max(1));
        // What the method takes together is merged together.
        let granule = self.passes.plan.granule(index as u32).map_or(1, |granule| granule as usize);
        if held < rows && granule > 1 {
            let together = if granule.is_multiple_of(columns) { granule / columns } else { rows };
            held = (held / together).max(1) * together;
        }
        let held = held.min(rows);
        Module { index, rows, columns, held, loaded: false, ties: Vec::new(), whole: None }
    }

    /// Seeks the factors of a module and writes them.
    fn module(&mut self, index: usize, writer: &ShardWriter<'_>, kept: &Kept) -> Result<Counted> {
        let (before, ties_before) = (self.passes.tally(), self.ties.clone());
        let mut module = self.open(index);
        let (rows, columns, rank) = (module.rows, module.columns, self.factored.rank as usize);
        let width = search_columns(rows as u64, columns as u64, self.factored.rank) as usize;
        let (mut x, mut y) = (Tall::new(columns, width), Tall::new(rows, width));
        x.randomize();
        let (mut found, mut last) = (spectrum(Vec::new()), f64::NEG_INFINITY);
        for round in 0..ROUNDS {
            self.each_block(&mut module, |hands, block, first| y.multiply(hands, block, first, &x))?;
            y.orthonormalize(&mut self.hands)?;
            x.clear();
            self.each_block(&mut module, |hands, block, first| x.add_transposed(hands, block, first, &y))?;
            let r = x.orthonormalize(&mut self.hands)?;
            // ΔW is close to Q (P R)ᵀ, and the rows of R are the columns of Rᵀ.
            found = spectrum(r.chunks_exact(width).map(<[f64]>::to_vec).collect());
            let whole = module.whole.unwrap_or(0.0);
            let squares = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>();
            let (spanned, held) = (squares(&found.values), squares(&found.values[..rank.min(width)]));
            let rest = (whole - held).max(0.0);
            let all = whole - spanned <= ROUNDING * whole || width >= rows.min(columns);
            if all || round > 0 && held - last <= PROGRESS * rest + ROUNDING * whole {
                break;
            }
            last = held;
        }
        let tally = self.passes.tally().since(&before);
        let ties = self.ties.iter().zip(ties_before).map(|(sum, before)| sum - before).collect();
        let squares: f64 = found.values.iter().take(rank).map(|value| value * value).sum();
        let counted = Counted { whole: module.whole.unwrap_or(0.0), kept: squares, tally, ties };
        self.write(index, (&x, &y), &found, (writer, kept), &counted)?;
        Ok(counted)
    }

    /// Shows `see` all rows of ΔW, block by block with the number of the first.
    fn each_block(
        &mut self,
        module: &mut Module,
        mut see: impl FnMut(&mut Hands, &[f32], usize) -> Result<()>,
    ) -> Result<()> {
        let mut whole = 0.0;
        for (number, first) in (0..module.rows).step_by(module.held.max(1)).enumerate() {
            self.observer.go_on()?;
            let rows = module.held.min(module.rows - first);
            let mut block = std::mem::take(&mut self.block);
            if !module.loaded {
                block.clear();
                block.resize(rows * module.columns, 0.0);
                self.fill(module, number, first, &mut block)?;
            }
            if module.whole.is_none() {
                whole += block.chunks(module.columns).map(square).sum::<f64>();
            }
            let seen = see(&mut self.hands, &block, first);
            self.block = block;
            seen?;
        }
        module.loaded = module.held == module.rows;
        if module.whole.is_none() {
            if !whole.is_finite() {
                return Err(Error::input("the merged change is not finite, so it has no factors")
                    .at(self.passes.plan.checkpoints[self.passes.plan.first_model].files[0].file.path())
                    .tensor(&self.passes.plan.tensors[module.index].name)
                    .help("repair the adapters, or leave --non-finite propagate out"));
            }
            module.whole = Some(whole);
        }
        Ok(())
    }

    /// Merges the rows of block `number`, from `first` on, into `block`.
    fn fill(&mut self, module: &mut Module, number: usize, first: usize, block: &mut [f32]) -> Result<()> {
        let (plan, observer, tensor) = (self.passes.plan, Quiet(self.observer), module.index as u32);
        let start = (first * module.columns) as u64;
        if let Action::Copy { source, .. } = &plan.tensors[module.index].action {
            let (entry, file) = plan.source(*source);
            let mut bytes = vec![0; 4 * OUT_ELEMENTS as usize];
            for (part, out) in block.chunks_mut(OUT_ELEMENTS as usize).enumerate() {
                self.observer.go_on()?;
                let bytes = &mut bytes[..4 * out.len()];
                file.read_at(bytes, entry.offset + 4 * (start + part as u64 * OUT_ELEMENTS))?;
                decode(bytes, out);
            }
            return Ok(());
        }
        let unit = &self.units[self.unit_of[module.index].unwrap_or(self.units.len() - 1)];
        let again = module.whole.is_some();
        let before = module.ties.get(number).unwrap_or(&self.ties).clone();
        let chunks = Schedule::chunks_of(plan, tensor, start..start + block.len() as u64, self.schedule.chunk_elements);
        let mut rest = block;
        let items = chunks.map(|chunk| {
            let (own, others) = std::mem::take(&mut rest).split_at_mut(chunk.count as usize);
            rest = others;
            (chunk, own)
        });
        let chain = TieChain::of(unit.cuts.len());
        let ahead = lookahead(self.schedule, self.schedule.chunk_elements);
        let announce = |(chunk, _): &(Chunk, &mut [f32])| _ = prefetch(plan, *chunk, Wanted::All);
        pool::run(&mut self.passes.workers, items, ahead, announce, |worker, ordinal, (chunk, out)| {
            let mut pending = Pending::new(&chain, ordinal);
            let tally = worker.tally.clone();
            worker.load(plan, chunk, plan.pieces(tensor, Wanted::All), &observer, |worker, data| {
                let cuts = tensor_cuts(plan, chunk, &unit.cuts, &unit.known.facts);
                let (mut seen, _) = ties_before(worker, &chain, ordinal, data, &cuts)?;
                seen.iter_mut().zip(&before).for_each(|(seen, before)| *seen += before);
                worker.merge(data, &cuts, &mut seen, &unit.known, &mut |offset, bytes| {
                    let at = (offset / 4 - chunk.start) as usize;
                    decode(bytes, &mut out[at..at + bytes.len() / 4]);
                    Ok(())
                })
            })?;
            if again {
                // What survives is counted once.
                worker.tally = Tally { bytes_read: worker.tally.bytes_read, ..tally };
            }
            pending.complete();
            Ok(())
        })?;
        if !again {
            module.ties.push(before);
            add(&mut self.ties, &chain.into_inner());
        }
        Ok(())
    }

    /// Writes what is lacking of A' and B'.
    fn write(
        &mut self,
        index: usize,
        (x, y): (&Tall, &Tall),
        found: &Spectrum,
        (writer, kept): (&ShardWriter<'_>, &Kept),
        counted: &Counted,
    ) -> Result<()> {
        let (rank, width) = (self.factored.rank as usize, found.values.len());
        let largest = found.values.first().copied().unwrap_or(0.0);
        // Below that, directions are rounding.
        let used = found.values.iter().take(rank).take_while(|&&value| value > 1e-14 * largest).count();
        for (tensor, basis, sides, is_a) in [(2 * index, x, &found.right, true), (2 * index + 1, y, &found.left, false)]
        {
            let mut small = vec![0.0; width * used];
            for (k, (side, value)) in sides.iter().zip(&found.values).take(used).enumerate() {
                let factor = if is_a { value.sqrt() } else { 1.0 / value.sqrt() };
                side.iter().enumerate().for_each(|(i, entry)| small[i * used + k] = entry * factor);
            }
            let factor = basis.combined(&mut self.hands, &small, used)?;
            let length = self.factored.shape(index);
            let length = if is_a { length.1 } else { length.0 } as usize;
            let value = |at: usize| {
                let (row, k) = if is_a { (at % length, at / length) } else { (at / rank, at % rank) };
                if k < used { factor.get(row, k) as f32 } else { 0.0 }
            };
            self.put(tensor as u32, (writer, kept), &value, (!is_a).then_some(counted))?;
        }
        Ok(())
    }

    /// Writes what is lacking of a factor whose entries are `value`, and with the last of it what was counted.
    fn put(
        &self,
        tensor: u32,
        (writer, kept): (&ShardWriter<'_>, &Kept),
        value: &dyn Fn(usize) -> f32,
        counted: Option<&Counted>,
    ) -> Result<()> {
        let planned = &self.plan.tensors[tensor as usize];
        let float = Float::from_dtype(planned.dtype).expect("factors are floats");
        let width = float.width() as u64;
        let clamp = self.plan.overflow == Overflow::Clamp;
        let isa = kernels::Isa::detect();
        let (mut values, mut bytes) = (vec![0f32; WRITTEN], vec![0u8; width as usize * WRITTEN]);
        let gaps: Vec<(u64, u64)> = kept.gaps(tensor, self.plan.length(tensor)).collect();
        for (number, &(start, end)) in gaps.iter().enumerate() {
            let mut out = writer.chunk(Chunk { tensor, start, count: end - start });
            // Parts that are done begin and end with whole elements.
            for first in (start / width..end / width).step_by(values.len()) {
                let count = (end / width - first).min(values.len() as u64) as usize;
                let (values, bytes) = (&mut values[..count], &mut bytes[..count * width as usize]);
                values.iter_mut().enumerate().for_each(|(i, out)| *out = value(first as usize + i));
                if !kernels::store(isa, float, values, bytes, clamp) {
                    return Err(Error::failed("a factor's entry is too large for the type of the output")
                        .tensor(&planned.name)
                        .help("use --overflow clamp, a wider --dtype, or a smaller --lambda"));
                }
                out.write(first * width, bytes)?;
            }
            let last = number + 1 == gaps.len();
            let merged = self.passes.plan;
            let done = counted.filter(|_| last).map(|counted| UnitDone {
                tensor: self.factored.result(tensor as usize / 2),
                found: vec![None; merged.models() * merged.bounds()],
                majority: 0,
                bytes_read: counted.tally.bytes_read,
                facts: counted.facts(),
            });
            out.done(Tally::of(self.plan.models()), Vec::new(), false, done)?;
        }
        Ok(())
    }
}

/// f32 values from their stored bytes.
fn decode(bytes: &[u8], out: &mut [f32]) {
    out.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(out, bytes)| *out = f32::from_le_bytes(*bytes));
}

/// The sum of the squares of a row.
fn square(row: &[f32]) -> f64 {
    row.iter().map(|value| f64::from(*value) * f64::from(*value)).sum()
}
