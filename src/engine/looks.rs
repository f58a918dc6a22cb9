//! What a method needs to know of a whole tensor before it is merged: sums, and values of given rank.
//!
//! - Sums run over granules (whole tiles, from the tensor's first element on), and granules are added up in order: the
//!   same sum for any number of workers and any length of chunks.
//! - Ranks are found by counting the bits of scores, in any order: see `sketch`.
//! - Knows no method: what is summed and ranked is the merger's affair.

use super::cut::{Cut, TieChain, TieCounts};
use super::passes::{Passes, Resident, ties_before};
use super::select::tensor_cuts;
use super::slot::{Loaded, Span};
use super::turns::{Ordered, Turns};
use super::worker::{Worker, with_refs};
use crate::error::Result;
use crate::limits::SKETCH_BINS_MIN;
use crate::method::{Look, Merger, Subject, Tile};
use crate::plan::{Action, Plan, Unit, Wanted};
use crate::sketch::{Bracket, MagnitudeSketch, Selector};

impl Worker {
    /// Shows `see` the tile of `span`, loaded, and buffers of its length.
    fn show<R>(
        &mut self,
        span: Span<'_>,
        facts: &[f64],
        see: impl FnOnce(&dyn Merger, &Tile<'_>, &mut [f32]) -> R,
    ) -> Result<R> {
        self.load_inputs(span, &[], &mut Vec::new())?;
        let (isa, row, models) = (self.isa, span.data.row(), span.data.merge().models);
        let (weights, out) = (&self.weights, &mut self.tiles.out[..span.length]);
        Ok(with_refs(&self.tiles.inputs, models, span.length, |inputs| {
            let tile = Tile { isa, inputs, weights, statistics: &[], oracle: None, majority: 0.0, facts, row };
            see(&*span.data.plan.params_of(span.data.chunk.tensor).merger, &tile, out)
        }))
    }

    /// Adds the magnitudes of each model's tile to `sums`: before `cuts` and after them.
    fn add_magnitudes(&mut self, span: Span<'_>, cuts: &[Cut], seen: &mut [u64], sums: &mut [f64]) -> Result<()> {
        let magnitude = |tau: &[f32]| tau.iter().map(|tau| f64::from(tau.abs())).sum::<f64>();
        self.load_base(span);
        for (&(model, piece), sums) in span.data.merge().models.iter().zip(sums.chunks_exact_mut(2)) {
            let model = (model as usize, piece);
            self.task_vector(span, model)?;
            sums[0] += magnitude(&self.tiles.inputs[model.0][..span.length]);
            self.trimmed_task_vector(span, model, cuts, seen)?;
            sums[1] += magnitude(&self.tiles.inputs[model.0][..span.length]);
        }
        Ok(())
    }

    /// The sums of look `look` over each granule of the chunk, one after the other, in `each`. `cuts` are the chunk's, and
    /// `seen` counts the ties before it.
    fn sum(
        &mut self,
        data: Loaded<'_>,
        (look, facts): (usize, &[f64]),
        (cuts, seen): (&[Cut], &mut TieCounts),
        mut each: impl FnMut(&[f64]),
    ) -> Result<()> {
        self.set_weights(data);
        let magnitudes = data.plan.needs().looks[look] == Look::Magnitudes;
        // Survivors are counted once, when they are merged.
        let kept = self.tally.kept.clone();
        let granule = data.plan.granule(data.chunk.tensor).unwrap_or(u64::MAX);
        let mut sums = vec![0.0; sums_of(data, look)];
        for span in data.tiles() {
            match magnitudes {
                true => self.add_magnitudes(span, cuts, seen, &mut sums)?,
                false => self.show(span, facts, |merger, tile, _| merger.add_sums(look, tile, &mut sums))?,
            }
            let end = (span.from + span.length) as u64;
            if end.is_multiple_of(granule) || end == data.chunk.count {
                each(&sums);
                sums.fill(0.0);
            }
        }
        self.tally.kept = kept;
        Ok(())
    }

    /// Counts the scores of the chunk in the sketches that have a bracket.
    fn sketch_scores(&mut self, data: Loaded<'_>, facts: &[f64], brackets: &[Option<Bracket>]) -> Result<()> {
        self.set_weights(data);
        for span in data.tiles() {
            self.show(span, facts, |merger, tile, out| merger.score(tile, out))?;
            for (sketch, _) in self.sketches.iter_mut().zip(brackets).filter(|(_, bracket)| bracket.is_some()) {
                sketch.add(self.isa, &self.tiles.out[..span.length]);
            }
        }
        Ok(())
    }
}

/// How many sums look `look` at a tensor gathers.
fn sums_of(data: Loaded<'_>, look: usize) -> usize {
    let tensor = data.chunk.tensor;
    data.plan.params_of(tensor).merger.sums(look, data.merge().models.len()) * data.plan.columns(tensor)
}

/// Someone who can look at all of a tensor.
trait Looker {
    fn sums(&mut self, look: usize, facts: &[f64]) -> Result<Vec<f64>>;
    fn sketches(&mut self, facts: &[f64], brackets: &[Option<Bracket>]) -> Result<Vec<MagnitudeSketch>>;
}

/// Does all looks that the plan's method asks for.
fn look(plan: &Plan, tensor: u32, looker: &mut dyn Looker) -> Result<Vec<f64>> {
    let (looks, params) = (plan.needs().looks, plan.params_of(tensor));
    let planned = &plan.tensors[tensor as usize];
    let Action::Merge { models, .. } = &planned.action else { return Ok(Vec::new()) };
    let weights: Vec<f32> = models.iter().map(|&(model, _)| params.weights[model as usize]).collect();
    let mut facts = Vec::new();
    for (number, look) in looks.iter().enumerate() {
        let subject = Subject { elements: planned.elements, weights: &weights, facts: &facts };
        let found = match look {
            Look::Sums => looker.sums(number, &facts)?,
            Look::Magnitudes => {
                facts.extend(looker.sums(number, &facts)?.chunks_exact(2).map(restoring));
                continue;
            }
            Look::Ranks => ranked(params.merger.ranks(subject), &facts, looker)?,
        };
        let concluded = params.merger.conclude(number, subject, &found);
        facts.extend(concluded);
    }
    Ok(facts)
}

/// The factor that restores a sum of magnitudes: 1 where there is hardly anything, as in mergekit.
fn restoring(sums: &[f64]) -> f64 {
    if sums.iter().any(|&sum| sum < 1e-7) { 1.0 } else { sums[0] / sums[1] }
}

/// The scores at `ranks`.
fn ranked(ranks: Vec<u64>, facts: &[f64], looker: &mut dyn Looker) -> Result<Vec<f64>> {
    let mut selectors: Vec<Selector> =
        ranks.into_iter().map(|rank| Selector::exact(rank, Bracket::COARSE, SKETCH_BINS_MIN)).collect();
    loop {
        let brackets: Vec<_> = selectors.iter().map(Selector::bracket).collect();
        if brackets.iter().all(Option::is_none) {
            break;
        }
        let sketches = looker.sketches(facts, &brackets)?;
        for (selector, sketch) in selectors.iter_mut().zip(&sketches).filter(|(s, _)| s.bracket().is_some()) {
            selector.observe(sketch);
        }
    }
    let key = |selector: &Selector| selector.threshold().map_or(0, |threshold| threshold.ties.low);
    Ok(selectors.iter().map(|selector| f64::from(f32::from_bits(key(selector)))).collect())
}

/// A tensor that one worker holds in memory.
struct Solo<'a> {
    worker: &'a mut Worker,
    data: Loaded<'a>,
    /// What is kept of it.
    cuts: Vec<Cut>,
}

impl Looker for Solo<'_> {
    fn sums(&mut self, look: usize, facts: &[f64]) -> Result<Vec<f64>> {
        let mut total = vec![0.0; sums_of(self.data, look)];
        let mut seen = vec![0; self.cuts.len()];
        self.worker.sum(self.data, (look, facts), (&self.cuts, &mut seen), |sums| add(&mut total, sums))?;
        Ok(total)
    }

    fn sketches(&mut self, facts: &[f64], brackets: &[Option<Bracket>]) -> Result<Vec<MagnitudeSketch>> {
        self.worker.set_brackets(brackets);
        self.worker.sketch_scores(self.data, facts, brackets)?;
        Ok(self.worker.sketches.clone())
    }
}

/// What the method needs to know of a tensor that `worker` holds in memory, and of which it keeps what `cuts` say.
pub(super) fn solo_facts(worker: &mut Worker, data: Loaded<'_>, cuts: &[Cut]) -> Result<Vec<f64>> {
    if data.plan.needs().looks.is_empty() {
        return Ok(Vec::new());
    }
    let cuts = tensor_cuts(data.plan, data.chunk, cuts, &[]);
    look(data.plan, data.chunk.tensor, &mut Solo { worker, data, cuts })
}

/// Sums and ties, which chunks wait for in the same order.
struct Both<'a>(&'a dyn Ordered, &'a dyn Ordered);

impl Ordered for Both<'_> {
    fn abort(&self, ordinal: usize) {
        self.0.abort(ordinal);
        self.1.abort(ordinal);
    }
}

/// A tensor that all workers share.
struct Shared<'p, 'a> {
    passes: &'p mut Passes<'a>,
    unit: &'p Unit,
    resident: &'p mut Option<Resident>,
    /// What is kept of it.
    cuts: &'p [Cut],
}

impl Looker for Shared<'_, '_> {
    fn sums(&mut self, look: usize, facts: &[f64]) -> Result<Vec<f64>> {
        let (turns, plan, cuts) = (Turns::new(Vec::new()), self.passes.plan, self.cuts);
        let chain = TieChain::of(cuts.len());
        let ordered = Both(&turns, &chain);
        let keep = self.passes.keeper(&vec![true; plan.models()]);
        self.passes.each_chunk(self.unit, self.resident, Wanted::All, Some(&ordered), |worker, ordinal, data| {
            let cuts = tensor_cuts(plan, data.chunk, cuts, &[]);
            let (mut seen, _) = ties_before(worker, &chain, ordinal, data, &cuts)?;
            let mut granules = Vec::new();
            worker.sum(data, (look, facts), (&cuts, &mut seen), |sums| granules.push(sums.to_vec()))?;
            keep(worker, data)?;
            turns.take(ordinal, |total: &mut Vec<f64>| {
                for sums in &granules {
                    total.resize(sums.len(), 0.0);
                    add(total, sums);
                }
            })
        })?;
        self.passes.looked_at_all()?;
        Ok(turns.into_inner())
    }

    fn sketches(&mut self, facts: &[f64], brackets: &[Option<Bracket>]) -> Result<Vec<MagnitudeSketch>> {
        self.passes.workers.iter_mut().for_each(|worker| worker.set_brackets(brackets));
        let keep = self.passes.keeper(&vec![true; self.passes.plan.models()]);
        self.passes.each_chunk(self.unit, self.resident, Wanted::All, None, |worker, _, data| {
            worker.sketch_scores(data, facts, brackets)?;
            keep(worker, data)
        })?;
        self.passes.looked_at_all()?;
        Ok(self.passes.sum_of_sketches())
    }
}

impl Passes<'_> {
    /// What the method needs to know of a shared unit, which is one tensor wherever a method needs to know anything.
    pub(super) fn facts(&mut self, unit: &Unit, resident: &mut Option<Resident>, cuts: &[Cut]) -> Result<Vec<f64>> {
        let plan = self.plan;
        if plan.needs().looks.is_empty() {
            return Ok(Vec::new());
        }
        self.announce("gather", self.pass_bytes("gather"));
        look(plan, unit.tensors[0], &mut Shared { passes: self, unit, resident, cuts })
    }
}

fn add(total: &mut [f64], sums: &[f64]) {
    total.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
}
