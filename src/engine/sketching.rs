//! The search for thresholds of a unit that all workers share: looks at all of its data, with the bracket that the last look
//! left.
//!
//! - The first look at a unit that is not held in memory can take long. What it has counted is kept every so often, so that a
//!   run that is interrupted again and again gets through: the work pauses for a moment, and the sum of all workers' sketches
//!   goes into the journal with the place up to which the unit was seen.
//! - Counts add up, so a run that goes on may cut what is left differently.

use std::time::Instant;

use super::passes::{Passes, Resident};
use super::records::SketchDone;
use super::select::observe;
use crate::error::Result;
use crate::limits::{MAX_KEPT_SKETCH_BYTES, SKETCH_BINS_MIN};
use crate::plan::ThresholdKind;
use crate::plan::{Chunk, Goal, Plan, Schedule, Trim, Unit, UnitKind, Wanted};
use crate::sketch::{Bracket, MagnitudeSketch, Selector, Threshold};

/// A look that an earlier attempt began.
struct Begun {
    selectors: Vec<Option<Selector>>,
    /// Per goal; empty ones where nothing is sought.
    sketches: Vec<MagnitudeSketch>,
    elements: u64,
    bytes_read: u64,
}

impl Passes<'_> {
    /// Finds every model's threshold for a shared unit by sketching it.
    pub(super) fn shared_thresholds(
        &mut self,
        unit: &Unit,
        goals: &[Goal],
        resident: &mut Option<Resident>,
    ) -> Result<Vec<Option<Threshold>>> {
        let plan = self.plan;
        let read_before = self.tally().bytes_read;
        let mut selectors: Vec<Option<Selector>> = vec![None; goals.len()];
        let mut begun = None;
        if let Some(trim) = plan.trim.as_ref().filter(|_| goals.iter().any(Goal::needs_threshold)) {
            begun = self.begun(unit, trim, goals);
            selectors = match &mut begun {
                Some(begun) => self.not_below_what_is_kept(std::mem::take(&mut begun.selectors)),
                None => self.selectors(unit, resident, trim, goals)?,
            };
        }
        let mut round = 0;
        loop {
            let brackets: Vec<_> = selectors.iter().map(|s| s.as_ref().and_then(Selector::bracket)).collect();
            if brackets.iter().all(Option::is_none) {
                break;
            }
            self.announce(if round == 0 { "sketch" } else { "sketch again" }, self.pass_bytes("sketch"));
            if let Some(begun) = &begun {
                self.observer.advance(begun.bytes_read.min(self.pass_bytes("sketch")));
            }
            self.demand_least(&selectors)?;
            let sketches = match round == 0 && self.keeps_sketches(unit) {
                true => self.sketch_and_keep(unit, &brackets, begun.take(), read_before)?,
                false => self.sketch_all(unit, resident, &brackets)?,
            };
            observe(&mut selectors, &sketches);
            self.looked = true;
            round += 1;
        }
        Ok(selectors.iter().map(|s| s.as_ref().and_then(Selector::threshold)).collect())
    }

    /// One look at all of the unit with the given brackets: the sum of the workers' sketches.
    pub(super) fn sketch_all(
        &mut self,
        unit: &Unit,
        resident: &mut Option<Resident>,
        brackets: &[Option<Bracket>],
    ) -> Result<Vec<MagnitudeSketch>> {
        self.workers.iter_mut().for_each(|worker| worker.set_brackets(brackets));
        let models = searched(self.plan, brackets);
        let wanted = Wanted::TaskVectors(&models);
        let keep = self.keeper(&models);
        self.each_chunk(unit, resident, wanted, None, |worker, _, data| {
            worker.sketch(data, brackets)?;
            keep(worker, data)
        })?;
        Ok(self.sum_of_sketches())
    }

    /// What all workers counted in their sketches.
    pub(super) fn sum_of_sketches(&mut self) -> Vec<MagnitudeSketch> {
        self.add_up().to_vec()
    }

    /// The same, in the sketches of the first worker.
    fn add_up(&mut self) -> &[MagnitudeSketch] {
        let (first, rest) = self.workers.split_first_mut().expect("at least one worker");
        for worker in rest {
            for (sum, sketch) in first.sketches.iter_mut().zip(&worker.sketches) {
                sum.merge(sketch);
            }
        }
        &first.sketches
    }

    /// Whether what is counted of `unit` is kept before all of it is.
    fn keeps_sketches(&self, unit: &Unit) -> bool {
        unit.kind == UnitKind::Streamed && self.writer.is_some()
    }

    /// The same look as [`Self::sketch_all`], which goes on where an earlier attempt was, and keeps what it has counted.
    fn sketch_and_keep(
        &mut self,
        unit: &Unit,
        brackets: &[Option<Bracket>],
        begun: Option<Begun>,
        read_before: u64,
    ) -> Result<Vec<MagnitudeSketch>> {
        let plan = self.plan;
        self.workers.iter_mut().for_each(|worker| worker.set_brackets(brackets));
        let mut elements = 0;
        if let Some(begun) = begun {
            elements = begun.elements;
            self.workers[0].sketches = begun.sketches;
        }
        let models = searched(plan, brackets);
        let keep = self.keeper(&models);
        let mut chunks = chunks_from(plan, unit, elements).peekable();
        // What comes before the merge reads all of the unit again.
        let more_to_come = plan.votes() || !plan.needs().looks.is_empty();
        while chunks.peek().is_some() {
            let (begin, keep_after) = (Instant::now(), self.schedule.keep_after);
            let before = elements;
            let part = std::iter::from_fn(|| {
                let full = elements > before && begin.elapsed() >= keep_after;
                let chunk = if full { None } else { chunks.next() };
                elements += chunk.map_or(0, |chunk: Chunk| chunk.count);
                chunk
            });
            let wanted = Wanted::TaskVectors(&models);
            self.each_of(part, unit, &mut None, wanted, None, |worker, _, data| {
                worker.sketch(data, brackets)?;
                keep(worker, data)
            })?;
            if chunks.peek().is_some() || more_to_come {
                self.keep_sketch(unit, brackets, elements, read_before)?;
            }
        }
        Ok(self.sum_of_sketches())
    }

    /// Puts what was counted so far into the journal, and goes on counting.
    fn keep_sketch(
        &mut self,
        unit: &Unit,
        brackets: &[Option<Bracket>],
        elements: u64,
        read_before: u64,
    ) -> Result<()> {
        let mut sketches = Vec::new();
        for (sketch, bracket) in self.add_up().iter().zip(brackets) {
            sketches.push(u8::from(bracket.is_some()));
            if bracket.is_some() {
                sketches.extend(sketch.encode());
            }
            if sketches.len() > MAX_KEPT_SKETCH_BYTES {
                break;
            }
        }
        self.workers[1..].iter_mut().for_each(|worker| worker.set_brackets(brackets));
        if sketches.len() > MAX_KEPT_SKETCH_BYTES {
            return Ok(());
        }
        let bytes_read = self.tally().bytes_read - read_before;
        self.writer().keep_sketch(SketchDone { tensor: unit.tensors[0], elements, bytes_read, sketches })
    }

    /// What an earlier attempt counted of `unit`, if it fits to what is sought now.
    fn begun(&mut self, unit: &Unit, trim: &Trim, goals: &[Goal]) -> Option<Begun> {
        let done = self.kept.sketch(unit.tensors[0]).filter(|_| self.keeps_sketches(unit))?;
        let most_bins = self.schedule.sketch_bins.max(SKETCH_BINS_MIN);
        let mut rest = &*done.sketches;
        let (mut selectors, mut sketches) = (Vec::new(), Vec::new());
        for goal in goals {
            let (&is_some, behind) = rest.split_first()?;
            rest = behind;
            let (selector, sketch) = match (goal, is_some) {
                (Goal::Keep { keep, .. }, 1) => {
                    let sketch = MagnitudeSketch::decode(&mut rest)?;
                    let selector = match trim.threshold {
                        ThresholdKind::Sketch => Selector::coarse(*keep),
                        ThresholdKind::Exact => Selector::exact(*keep, sketch.bracket(), self.schedule.sketch_bins),
                    };
                    if selector.bracket() != Some(sketch.bracket()) || sketch.bins() > most_bins {
                        return None;
                    }
                    (Some(selector), sketch)
                }
                (Goal::All | Goal::Nothing, 0) => (None, MagnitudeSketch::new(Bracket { low: 0, shift: 0, bins: 0 })),
                _ => return None,
            };
            selectors.push(selector);
            sketches.push(sketch);
        }
        if !rest.is_empty() || done.elements > unit.elements {
            return None;
        }
        self.take_over_reads(done.bytes_read);
        Some(Begun { selectors, sketches, elements: done.elements, bytes_read: done.bytes_read })
    }
}

/// Models whose task vectors are looked at.
fn searched(plan: &Plan, brackets: &[Option<Bracket>]) -> Vec<bool> {
    let models = plan.models();
    (0..models).map(|m| brackets.iter().skip(m).step_by(models).any(Option::is_some)).collect()
}

/// The chunks of `unit` behind its first `elements` elements.
fn chunks_from<'a>(plan: &'a Plan, unit: &'a Unit, elements: u64) -> impl Iterator<Item = Chunk> + 'a {
    let mut skip = elements;
    unit.tensors.iter().flat_map(move |&tensor| {
        let length = plan.length(tensor);
        let start = skip.min(length);
        skip -= start;
        Schedule::chunks_of(plan, tensor, start..length, unit.chunk_elements)
    })
}
