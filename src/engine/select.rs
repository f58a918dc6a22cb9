//! From densities to cuts: what has to be selected in a unit, and what survives once it is known.

use super::cut::Cut;
use super::slot::Loaded;
use super::worker::Worker;
use crate::error::Result;
use crate::limits::{LISTED_THRESHOLDS, SMALL_UNIT_ELEMENTS, TILE_ELEMENTS};
use crate::plan::{Chunk, Goal, Plan, ThresholdKind, Unit};
use crate::sketch::{Bracket, MagnitudeSketch, Selector, Threshold, bounds_of_sample, select_in_place};

/// One in so many elements of a unit in memory is sampled to bracket its threshold.
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
    /// Per model: the threshold and the number of elements it was found among; `None` where nothing was cut or kept.
    pub models: Vec<Option<(Threshold, u64)>>,
}

impl UnitThresholds {
    pub(super) fn new(unit: &Unit, goals: &[Goal], found: &[Option<Threshold>]) -> Self {
        let one = |(goal, found): (&Goal, &Option<Threshold>)| match goal {
            Goal::Keep { elements, .. } => found.map(|threshold| (threshold, *elements)),
            Goal::All | Goal::Nothing => None,
        };
        Self { tensor: unit.tensors[0], models: goals.iter().zip(found).map(one).collect() }
    }
}

/// All thresholds of a run: sums for the report, and a list for the manifest.
#[derive(Debug, Default)]
pub(super) struct Thresholds {
    /// Per model, over all units: survivors at least and at most, if a threshold bounds them.
    pub survivors: Vec<[u64; 2]>,
    /// The units of the first tensors, in order: [`LISTED_THRESHOLDS`] over all models.
    pub listed: Vec<UnitThresholds>,
}

impl Thresholds {
    pub(super) fn new(models: usize) -> Self {
        Self { survivors: vec![[0; 2]; models], listed: Vec::new() }
    }

    /// Takes in a unit, in any order, with the number of each model's entries that survived in it.
    pub(super) fn record(&mut self, unit: UnitThresholds, kept: &[u64]) {
        for ((sums, found), &kept) in self.survivors.iter_mut().zip(&unit.models).zip(kept) {
            // Where all or nothing was kept, there is nothing uncertain.
            let [least, most] =
                found.map_or([kept; 2], |(threshold, _)| [threshold.above, threshold.above + threshold.tied]);
            sums[0] += least;
            sums[1] += most;
        }
        if (unit.tensor as usize) < LISTED_THRESHOLDS / unit.models.len().max(1) {
            let place = self.listed.partition_point(|other| other.tensor < unit.tensor);
            self.listed.insert(place, unit);
        }
    }
}

/// Thresholds of a unit that one worker holds in memory.
pub(super) fn solo_thresholds(
    worker: &mut Worker,
    data: Loaded<'_>,
    goals: &[Goal],
    bins: usize,
) -> Result<Vec<Option<Threshold>>> {
    let (plan, chunk) = (data.plan, data.chunk);
    let coarse = plan.trim.as_ref().is_some_and(|t| t.threshold == ThresholdKind::Sketch);
    let stride = sample_stride(chunk.count);
    let mut found = vec![None; goals.len()];
    let mut bounds = vec![None; goals.len()];
    let mut selectors = vec![None; goals.len()];
    for &(model, piece) in data.merge().models {
        let model = model as usize;
        let Goal::Keep { keep, .. } = goals[model] else { continue };
        if coarse {
            selectors[model] = Some(Selector::coarse(keep));
            continue;
        }
        let keys = worker.keys(data, (model, piece), (0, stride))?;
        if stride == 1 {
            found[model] = Some(select_in_place(keys, keep));
        } else {
            let bins = bins.min(IN_MEMORY_BINS);
            bounds[model] = bounds_of_sample(keys, TILE_ELEMENTS, keep as f64 / chunk.count as f64);
            selectors[model] = Some(Selector::exact(keep, Bracket::within(bounds[model], bins), bins));
        }
    }
    // All models in one look, which loads base once.
    if bounds.iter().any(Option::is_some) {
        worker.list_near(data, &bounds)?;
        for (model, goal) in goals.iter().enumerate() {
            if let (Goal::Keep { keep, .. }, Some(_)) = (goal, bounds[model]) {
                found[model] = worker.near[model].threshold(*keep);
                selectors[model].take_if(|_| found[model].is_some());
            }
        }
    }
    loop {
        let brackets: Vec<_> = selectors.iter().map(|s| s.as_ref().and_then(Selector::bracket)).collect();
        if brackets.iter().all(Option::is_none) {
            break;
        }
        worker.set_brackets(&brackets);
        worker.sketch(data, &brackets)?;
        observe(&mut selectors, &worker.sketches);
    }
    for (found, selector) in found.iter_mut().zip(&selectors) {
        *found = found.or(selector.as_ref().and_then(Selector::threshold));
    }
    Ok(found)
}

/// Every how many tiles of a unit of `elements` to sample: 1, for all of them, if there are few; else so that a longer
/// sample would cost more than the keys near the threshold that it would save.
pub(super) fn sample_stride(elements: u64) -> usize {
    if elements <= SMALL_UNIT_ELEMENTS {
        return 1;
    }
    let sampled = (elements / SAMPLED_SHARE).clamp(SAMPLED_MIN, SMALL_UNIT_ELEMENTS / 2);
    elements.div_ceil(sampled) as usize
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
    let cut = |(goal, found): (&Goal, &Option<Threshold>)| match (goal, found) {
        (Goal::Keep { keep, .. }, Some(threshold)) => Cut::new(*threshold, *keep, rule),
        (Goal::All, _) => Cut::NonZero,
        (Goal::Nothing, _) => Cut::Nothing,
        (Goal::Keep { .. }, None) => unreachable!("the search ends with a threshold"),
    };
    goals.iter().zip(found).map(cut).collect()
}

/// The cuts, with draws keyed to the chunk's tensor.
pub(super) fn tensor_cuts(plan: &Plan, chunk: Chunk, cuts: &[Cut]) -> Vec<Cut> {
    let name = &plan.tensors[chunk.tensor as usize].name;
    cuts.iter().enumerate().map(|(model, cut)| cut.for_tensor(plan.seed, model, name)).collect()
}
