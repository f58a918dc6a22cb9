//! From densities to cuts: what has to be selected in a unit, and what survives once it is known.

use super::cut::Cut;
use super::guess::{Guess, Odds};
use super::slot::Loaded;
use super::worker::Worker;
use crate::error::Result;
use crate::limits::{LISTED_THRESHOLDS, SAMPLE_BLOCK, SAMPLE_ELEMENTS, SMALL_UNIT_ELEMENTS, TILE_ELEMENTS};
use crate::method::Sparsify;
use crate::plan::{Action, Chunk, Goal, Plan, ThresholdKind, Unit};
use crate::sketch::{Bracket, MagnitudeSketch, Selector, Threshold, bounds_of_sample, select_in_place};

/// One in so many elements of a unit in memory is sampled: a longer sample would cost more than what it would save.
const SAMPLED_SHARE: u64 = 64;
/// Fewest elements sampled.
const SAMPLED_MIN: u64 = 1 << 14;
/// Bins of a sketch over data in memory: they stay in the second-level cache, and another look costs no reading.
const IN_MEMORY_BINS: usize = 1 << 18;

/// Thresholds found for one unit, for the record.
#[derive(Debug, Clone)]
pub(super) struct UnitThresholds {
    /// First tensor of the unit.
    pub tensor: u32,
    /// Per goal: the threshold and the number of elements it was found among; `None` where nothing was cut or kept.
    pub found: Vec<Option<(Threshold, u64)>>,
}

impl UnitThresholds {
    pub(super) fn new(unit: &Unit, goals: &[Goal], found: &[Option<Threshold>]) -> Self {
        let one = |(goal, found): (&Goal, &Option<Threshold>)| match goal {
            Goal::Keep { elements, .. } => found.map(|threshold| (threshold, *elements)),
            Goal::All | Goal::Nothing => None,
        };
        Self { tensor: unit.tensors[0], found: goals.iter().zip(found).map(one).collect() }
    }
}

/// All thresholds of a run: sums for the report, and a list for the manifest.
#[derive(Debug, Default)]
pub(super) struct Thresholds {
    /// Per model, over all units: survivors at least and at most, if a threshold bounds them.
    pub survivors: Vec<[u64; 2]>,
    /// The units of the first tensors, in order: [`LISTED_THRESHOLDS`] over all models.
    pub listed: Vec<UnitThresholds>,
    selects: bool,
}

impl Thresholds {
    /// `selects`: whether there are thresholds at all.
    pub(super) fn new(models: usize, selects: bool) -> Self {
        Self { survivors: vec![[0; 2]; models], listed: Vec::new(), selects }
    }

    /// Takes in a unit, in any order, with the number of each model's entries that survived in it.
    pub(super) fn record(&mut self, unit: UnitThresholds, kept: &[u64]) {
        let bounds = |(threshold, _): &(Threshold, u64)| [threshold.above, threshold.above + threshold.tied];
        let models = self.survivors.len();
        for (model, (sums, &kept)) in self.survivors.iter_mut().zip(kept).enumerate() {
            // Where all or nothing was kept, there is nothing uncertain. What is dropped as outliers has bounds too.
            let reached = unit.found[model].as_ref().map(bounds);
            let outliers = unit.found.get(models + model).and_then(|found| found.as_ref().map(bounds));
            let [fewest, most] = outliers.unwrap_or_default();
            let [least, greatest] = reached.map_or([kept; 2], |[above, at]| [above.saturating_sub(most), at - fewest]);
            sums[0] += least;
            sums[1] += greatest;
        }
        self.list(unit);
    }

    /// Lists the thresholds of a unit, in any order.
    pub(super) fn list(&mut self, unit: UnitThresholds) {
        let listed = (unit.tensor as usize) < LISTED_THRESHOLDS / unit.found.len().max(1);
        if listed && self.selects {
            let place = self.listed.partition_point(|other| other.tensor < unit.tensor);
            self.listed.insert(place, unit);
        }
    }
}

/// The search for the thresholds of a unit that one worker holds in memory.
pub(super) struct SoloSearch<'g> {
    goals: &'g [Goal],
    bins: usize,
    /// Per goal: what is known already.
    found: Vec<Option<Threshold>>,
    /// Per goal: the keys that a threshold lies between, as a sample says.
    bounds: Vec<Option<(u32, u32)>>,
    /// Per goal: where the search goes on if it is not found between them.
    selectors: Vec<Option<Selector>>,
}

impl<'g> SoloSearch<'g> {
    /// A search with sketches of at most `bins` bins, of which nothing is known.
    pub(super) fn new(goals: &'g [Goal], bins: usize) -> Self {
        let bins = bins.min(IN_MEMORY_BINS);
        Self {
            goals,
            bins,
            found: vec![None; goals.len()],
            bounds: vec![None; goals.len()],
            selectors: vec![None; goals.len()],
        }
    }

    /// The thresholds, if a sample of the unit says that they are likely to be right, all together.
    pub(super) fn guess(&mut self, worker: &mut Worker, data: Loaded<'_>) -> Result<Option<Guess>> {
        let Some(stride) = sample_stride(data.chunk.count) else { return Ok(None) };
        let (mut odds, mut guess, mut whole) = (Odds::default(), vec![None; self.goals.len()], true);
        for &(model, piece) in data.merge().models {
            let model = model as usize;
            if let Some(fraction) = self.goals[model].fraction() {
                let keys = worker.keys(data, (model, piece), (0, Some(stride)))?;
                guess[model] = odds.guess(keys, fraction);
                if guess[model].is_none() {
                    whole = false;
                    self.bound(model, keys);
                }
            }
        }
        Ok(whole.then_some(Guess(guess)))
    }

    /// Takes in thresholds that were found otherwise.
    pub(super) fn learn(&mut self, found: Vec<Option<Threshold>>) {
        self.found = found;
    }

    /// Bounds a threshold by a sample of the keys.
    fn bound(&mut self, at: usize, sample: &mut [u32]) {
        let goal = self.goals[at];
        if let (Goal::Keep { keep, .. }, Some(fraction)) = (goal, goal.fraction()) {
            self.bounds[at] = bounds_of_sample(sample, SAMPLE_BLOCK, fraction);
            self.selectors[at] = Some(Selector::exact(keep, Bracket::within(self.bounds[at], self.bins), self.bins));
        }
    }

    /// Whether nothing is known of a threshold that is needed.
    fn is_open(&self, at: usize) -> bool {
        self.goals[at].needs_threshold() && self.found[at].is_none() && self.selectors[at].is_none()
    }

    /// Samples the unit for what nothing is known of.
    fn sample(&mut self, worker: &mut Worker, data: Loaded<'_>) -> Result<()> {
        let stride = sample_stride(data.chunk.count);
        for &(model, piece) in data.merge().models {
            let own = || (model as usize..self.goals.len()).step_by(data.plan.models());
            let open: Vec<usize> = own().filter(|&at| self.is_open(at)).collect();
            if open.is_empty() {
                continue;
            }
            let keys = worker.keys(data, (model as usize, piece), (0, stride))?;
            for at in open {
                match self.goals[at] {
                    Goal::Keep { keep, .. } if stride.is_none() => self.found[at] = Some(select_in_place(keys, keep)),
                    _ => self.bound(at, keys),
                }
            }
        }
        Ok(())
    }

    /// The thresholds, from looks at all of the unit.
    pub(super) fn end(mut self, worker: &mut Worker, data: Loaded<'_>) -> Result<Vec<Option<Threshold>>> {
        if data.plan.trim.as_ref().is_some_and(|t| t.threshold == ThresholdKind::Sketch) {
            self.selectors = coarse_selectors(self.goals);
        } else {
            self.sample(worker, data)?;
        }
        // All in one look, which loads base once.
        if self.bounds.iter().any(Option::is_some) {
            worker.list_near(data, &self.bounds)?;
            for (at, goal) in self.goals.iter().enumerate() {
                if let (Goal::Keep { keep, .. }, Some(_)) = (goal, self.bounds[at]) {
                    self.found[at] = worker.near[at].threshold(*keep);
                    self.selectors[at].take_if(|_| self.found[at].is_some());
                }
            }
        }
        loop {
            let brackets: Vec<_> = self.selectors.iter().map(|s| s.as_ref().and_then(Selector::bracket)).collect();
            if brackets.iter().all(Option::is_none) {
                break;
            }
            worker.set_brackets(&brackets);
            worker.sketch(data, &brackets)?;
            observe(&mut self.selectors, &worker.sketches);
        }
        for (found, selector) in self.found.iter_mut().zip(&self.selectors) {
            *found = found.or(selector.as_ref().and_then(Selector::threshold));
        }
        Ok(self.found)
    }
}

/// Thresholds of a unit that one worker holds in memory.
pub(super) fn solo_thresholds(
    worker: &mut Worker,
    data: Loaded<'_>,
    goals: &[Goal],
    bins: usize,
) -> Result<Vec<Option<Threshold>>> {
    SoloSearch::new(goals, bins).end(worker, data)
}

/// Where each search starts that ends at a coarse bin.
pub(super) fn coarse_selectors(goals: &[Goal]) -> Vec<Option<Selector>> {
    let coarse = |goal: &Goal| if let Goal::Keep { keep, .. } = goal { Some(Selector::coarse(*keep)) } else { None };
    goals.iter().map(coarse).collect()
}

/// Of every how many tiles of a unit of `elements` a block is sampled; `None` if there are so few that all are.
pub(super) fn sample_stride(elements: u64) -> Option<usize> {
    let sampled = (elements / SAMPLED_SHARE).clamp(SAMPLED_MIN, SAMPLE_ELEMENTS);
    let stride = elements * SAMPLE_BLOCK as u64 / (sampled * TILE_ELEMENTS as u64);
    (elements > SMALL_UNIT_ELEMENTS).then_some(stride.max(1) as usize)
}

/// Shows each selector that still searches the sketch made with its bracket.
pub(super) fn observe(selectors: &mut [Option<Selector>], sketches: &[MagnitudeSketch]) {
    for (selector, sketch) in selectors.iter_mut().zip(sketches) {
        if let Some(selector) = selector.as_mut().filter(|s| s.bracket().is_some()) {
            selector.observe(sketch);
        }
    }
}

/// What survives of each model, from what was found.
pub(super) fn cuts(plan: &Plan, goals: &[Goal], found: &[Option<Threshold>]) -> Vec<Cut> {
    let rule = plan.trim.as_ref().map(|t| t.ties).unwrap_or_default();
    let cut = |(index, (goal, found)): (usize, (&Goal, &Option<Threshold>))| match (goal, found) {
        (Goal::Keep { keep, .. }, Some(threshold)) if index >= plan.models() => Cut::outliers(*threshold, *keep, rule),
        (Goal::Keep { keep, .. }, Some(threshold)) => Cut::new(*threshold, *keep, rule),
        (Goal::All, _) => Cut::NonZero,
        (Goal::Nothing, _) => Cut::Nothing,
        (Goal::Keep { .. }, None) => unreachable!("the search ends with a threshold"),
    };
    goals.iter().zip(found).enumerate().map(cut).collect()
}

/// The cuts, with draws keyed to the chunk's tensor.
///
/// `facts` are what looks at the tensor found: where a method draws, factors of what is kept.
pub(super) fn tensor_cuts(plan: &Plan, chunk: Chunk, cuts: &[Cut], facts: &[f64]) -> Vec<Cut> {
    let name = &plan.tensors[chunk.tensor as usize].name;
    // One draw decides whether an entry is above a threshold and whether it is an outlier.
    let params = plan.params_of(chunk.tensor);
    let models = match &plan.tensors[chunk.tensor as usize].action {
        Action::Merge { models, .. } => &models[..],
        Action::Copy { .. } => &[],
    };
    let factor = |model: usize| {
        let place = models.iter().position(|&(m, _)| m as usize == model);
        place.and_then(|place| facts.get(place)).map_or(1.0, |&factor| factor as f32)
    };
    let drawn = |model: usize| match (params.density.get(model), params.merger.sparsify(model)) {
        (Some(&density), Sparsify::Random { scale }) if density < 1.0 => Cut::random(density, scale),
        (Some(&density), Sparsify::Ranked { epsilon, rescale }) if density < 1.0 => {
            Cut::ranked(density, epsilon, rescale)
        }
        _ => Cut::NonZero,
    };
    let cut = |(at, cut): (usize, &Cut)| {
        let cut = match params.merger.sparsify(at % plan.models()) {
            Sparsify::Flip { below, probability } => cut.flipped(below, probability),
            _ if plan.method.draws() => drawn(at).scaled(factor(at)),
            _ => *cut,
        };
        cut.for_tensor(plan.seed, at % plan.models(), name)
    };
    cuts.iter().enumerate().map(cut).collect()
}
