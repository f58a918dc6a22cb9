//! The search for thresholds of a unit that all workers share: looks at all of its data, with the bracket that the last look
//! left. Those at a unit that is not held in memory go on where an earlier attempt was: see `under_way`.

use std::collections::BTreeSet;

use super::passes::{Passes, Resident};
use super::records::Entry;
use super::select::observe;
use super::under_way::{Notes, SearchDone, SearchState, Step, Stretches};
use crate::error::Result;
use crate::limits::{KEPT_AT_ONCE_BYTES, PROBE_GROUPS, SKETCH_BINS_MIN};
use crate::plan::ThresholdKind;
use crate::plan::{Goal, Plan, Trim, Unit, UnitKind, Wanted};
use crate::sketch::{Bracket, MagnitudeSketch, Probe, Selector, Threshold};

/// A search that an earlier attempt began.
struct Begun {
    selectors: Vec<Option<Selector>>,
    /// Per goal; empty ones where nothing is counted.
    sketches: Vec<MagnitudeSketch>,
    round: u32,
    elements: u64,
    bytes_read: u64,
}

/// The look at hand, of a search for the thresholds of a unit.
struct Look<'s> {
    unit: &'s Unit,
    goals: &'s [Goal],
    selectors: &'s [Option<Selector>],
    round: u32,
    /// Tensor bytes read before the search.
    read_before: u64,
}

impl<'a> Passes<'a> {
    /// Finds every model's threshold for a shared unit by sketching it, from `start` on, if that is known, and what was read
    /// before it.
    pub(super) fn shared_thresholds(
        &mut self,
        unit: &Unit,
        goals: &[Goal],
        resident: &mut Option<Resident>,
        start: Option<(Vec<Option<Selector>>, u64)>,
    ) -> Result<Vec<Option<Threshold>>> {
        let plan = self.plan;
        let read_before = start.as_ref().map_or_else(|| self.tally().bytes_read, |(_, before)| *before);
        let mut selectors: Vec<Option<Selector>> = vec![None; goals.len()];
        let mut begun = None;
        if let Some(trim) = plan.trim.as_ref().filter(|_| goals.iter().any(Goal::needs_threshold)) {
            begun = self.begun(unit, trim, goals);
            begun.iter().for_each(|begun| self.take_over_reads(begun.bytes_read));
            selectors = match (&mut begun, start) {
                (Some(begun), _) => self.not_below_what_is_kept(std::mem::take(&mut begun.selectors)),
                (None, Some((start, _))) => start,
                (None, None) => self.selectors(unit, resident, trim, goals)?,
            };
        }
        let mut goes_on = begun.is_some();
        let mut round = begun.as_ref().map_or(0, |begun| begun.round);
        self.looked |= round > 0;
        let mut looks = 0;
        loop {
            let brackets: Vec<_> = selectors.iter().map(|s| s.as_ref().and_then(Selector::bracket)).collect();
            if brackets.iter().all(Option::is_none) {
                break;
            }
            self.announce(if round == 0 { "sketch" } else { "sketch again" }, self.pass_bytes("sketch"));
            self.demand_least(&selectors)?;
            let look = Look { unit, goals, selectors: &selectors, round, read_before };
            let sketches = match self.notes_of(unit) {
                Some(notes) => self.sketch_and_keep(notes, &look, &brackets, begun.take())?,
                None => self.sketch_all(unit, resident, &brackets)?,
            };
            if let Some(trim) = plan.trim.as_ref().filter(|_| goes_on && !can_observe(&selectors, &sketches)) {
                // What it went on with was not true.
                (selectors, round, goes_on) = (self.selectors(unit, resident, trim, goals)?, 0, false);
                continue;
            }
            observe(&mut selectors, &sketches);
            self.looked = true;
            (round, looks) = (round + 1, looks + 1);
        }
        if let Some(notes) = self.notes_of(unit).filter(|notes| notes.more_to_come && looks > 0) {
            let look = Look { unit, goals, selectors: &selectors, round, read_before };
            self.keep_search(notes, &look, unit.elements)?;
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

    /// One look at a part of a unit, number `round` of the searches `selectors` for `goals`.
    pub(super) fn sketch_part(
        &mut self,
        unit: &Unit,
        goals: &[Goal],
        (round, selectors): (u32, &[Option<Selector>]),
    ) -> Result<Vec<MagnitudeSketch>> {
        let brackets: Vec<_> = selectors.iter().map(|s| s.as_ref().and_then(Selector::bracket)).collect();
        let Some(notes) = self.notes_of(unit) else { return self.sketch_all(unit, &mut None, &brackets) };
        let same = |(sketch, bracket): (&MagnitudeSketch, &Option<Bracket>)| {
            sketch.bins() == 0 && bracket.is_none() || Some(sketch.bracket()) == *bracket
        };
        let begun = self.plan.trim.as_ref().and_then(|trim| self.begun(unit, trim, goals)).filter(|begun| {
            begun.round == round && begun.elements > 0 && begun.sketches.iter().zip(&brackets).all(same)
        });
        begun.iter().for_each(|begun| self.take_over_reads(begun.bytes_read));
        self.sketch_and_keep(notes, &Look { unit, goals, selectors, round, read_before: 0 }, &brackets, begun)
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

    /// Where to keep what is found out of `unit`, if that is kept.
    pub(super) fn notes_of(&self, unit: &Unit) -> Option<Notes<'a>> {
        self.notes.filter(|_| unit.kind == UnitKind::Streamed && !unit.tensors.is_empty())
    }

    /// Adds to `probes` what an earlier attempt read for them; tells of each group whether that is known.
    pub(super) fn probed(&mut self, unit: &Unit, models: &[bool], probes: &mut [Probe]) -> [bool; PROBE_GROUPS] {
        let mut done = [false; PROBE_GROUPS];
        let Some(notes) = self.notes_of(unit) else { return done };
        for known in notes.probe(unit) {
            let (group, mut rest) = (known.group as usize, &known.sketches[..]);
            if done.get(group) != Some(&false) {
                continue;
            }
            let sketches: Option<Vec<_>> = models
                .iter()
                .filter(|&&sought| sought)
                .map(|_| MagnitudeSketch::decode(&mut rest).filter(|sketch| sketch.bracket() == Bracket::COARSE))
                .collect();
            let Some(sketches) = sketches.filter(|_| rest.is_empty()) else { continue };
            let sought = probes.iter_mut().zip(models).filter(|(_, sought)| **sought);
            sought.zip(&sketches).for_each(|((probe, _), sketch)| probe.add_group(sketch));
            self.take_over_reads(known.bytes_read);
            done[group] = true;
        }
        done
    }

    /// The same look as [`Self::sketch_all`], which goes on where an earlier attempt was, and keeps what it has counted.
    fn sketch_and_keep(
        &mut self,
        notes: Notes<'_>,
        look: &Look<'_>,
        brackets: &[Option<Bracket>],
        begun: Option<Begun>,
    ) -> Result<Vec<MagnitudeSketch>> {
        let (plan, unit) = (self.plan, look.unit);
        self.workers.iter_mut().for_each(|worker| worker.set_brackets(brackets));
        let mut elements = 0;
        if let Some(begun) = begun {
            self.observer.advance(begun.bytes_read.min(self.pass_bytes("sketch")));
            elements = begun.elements;
            self.workers[0].sketches = begun.sketches;
        } else if look.round > 0 {
            self.keep_search(notes, look, 0)?;
        }
        let models = searched(plan, brackets);
        let keep = self.keeper(&models);
        let mut chunks = Stretches::new(plan, unit, elements, Some(self.schedule.keep_after));
        while chunks.more() {
            let wanted = Wanted::TaskVectors(&models);
            self.each_of(chunks.stretch(), unit, &mut None, wanted, None, |worker, _, data| {
                worker.sketch(data, brackets)?;
                keep(worker, data)
            })?;
            if chunks.more() {
                self.add_up();
                self.workers[1..].iter_mut().for_each(|worker| worker.set_brackets(brackets));
                self.keep_search(notes, look, chunks.elements)?;
            }
        }
        Ok(self.sum_of_sketches())
    }

    /// Keeps how far the searches are: `elements` were looked at, and the first worker has what was counted in them.
    fn keep_search(&mut self, notes: Notes<'_>, look: &Look<'_>, elements: u64) -> Result<()> {
        let bytes_read = self.tally().bytes_read - look.read_before;
        let searches = sought(self.plan, look.goals).map(|(_, search)| search).collect::<BTreeSet<_>>().len() as u32;
        let mut told = BTreeSet::new();
        let (mut entries, mut held) = (Vec::new(), 0);
        for (at, (model, rank)) in sought(self.plan, look.goals).filter(|&(_, search)| told.insert(search)) {
            let Some(selector) = &look.selectors[at] else { continue };
            let state = match selector.threshold() {
                Some(threshold) => SearchState::Found(threshold),
                None => SearchState::Counting {
                    missed: selector.has_missed(),
                    sketch: self.workers[0].sketches[at].encode(),
                },
            };
            let (tensor, of, round) = (look.unit.tensors[0], notes.of, look.round);
            let search = SearchDone { tensor, of, round, elements, bytes_read, searches, model, rank, state };
            let entry = Entry::Step(Step::Search(search));
            held += entry.held_bytes();
            entries.push(entry);
            if held >= KEPT_AT_ONCE_BYTES {
                notes.keeper.keep_entries(std::mem::take(&mut entries))?;
                held = 0;
            }
        }
        if entries.is_empty() { Ok(()) } else { notes.keeper.keep_entries(entries) }
    }

    /// How far an earlier attempt was with the searches, if they are those for `goals`.
    fn begun(&self, unit: &Unit, trim: &Trim, goals: &[Goal]) -> Option<Begun> {
        let left = self.notes_of(unit)?.searches(unit)?;
        let first = left.first().filter(|first| first.elements <= unit.elements)?;
        let most_bins = self.schedule.sketch_bins.max(SKETCH_BINS_MIN);
        let nothing = || MagnitudeSketch::new(Bracket::NONE);
        let mut selectors = vec![None; goals.len()];
        let mut sketches = vec![nothing(); goals.len()];
        for (at, (model, rank)) in sought(self.plan, goals) {
            let own = left.iter().find(|search| (search.model, search.rank) == (model, rank))?;
            let selector = match &own.state {
                SearchState::Found(threshold) => {
                    let reached = threshold.above.checked_add(threshold.tied)?;
                    if threshold.above >= rank || rank > reached || reached > unit.elements {
                        return None;
                    }
                    Selector::found(rank, *threshold)
                }
                SearchState::Counting { missed, sketch } => {
                    let sketch = MagnitudeSketch::decode(&mut &sketch[..])?;
                    let selector = match trim.threshold {
                        ThresholdKind::Sketch => Selector::coarse(rank),
                        ThresholdKind::Exact => {
                            Selector::exact(rank, sketch.bracket(), self.schedule.sketch_bins).after_a_miss(*missed)
                        }
                    };
                    let fits = selector.bracket() == Some(sketch.bracket()) && (1..=most_bins).contains(&sketch.bins());
                    if !fits || sketch.total()? > first.elements {
                        return None;
                    }
                    sketches[at] = sketch;
                    selector
                }
            };
            selectors[at] = Some(selector);
        }
        Some(Begun { selectors, sketches, round: first.round, elements: first.elements, bytes_read: first.bytes_read })
    }
}

/// What is searched for: the place of each goal that needs it, with its model and rank.
fn sought<'g>(plan: &Plan, goals: &'g [Goal]) -> impl Iterator<Item = (usize, (u32, u64))> + use<'g> {
    let models = plan.models();
    goals.iter().enumerate().filter_map(move |(at, goal)| match goal {
        Goal::Keep { keep, .. } => Some((at, ((at % models) as u32, *keep))),
        Goal::All | Goal::Nothing => None,
    })
}

/// Whether what is sought can be among what was counted: counts that a look went on with need not be true.
fn can_observe(selectors: &[Option<Selector>], sketches: &[MagnitudeSketch]) -> bool {
    let can = |(selector, sketch): (&Option<Selector>, &MagnitudeSketch)| {
        selector.as_ref().filter(|s| s.bracket().is_some()).is_none_or(|selector| selector.can_observe(sketch))
    };
    selectors.iter().zip(sketches).all(can)
}

/// Models whose task vectors are looked at.
fn searched(plan: &Plan, brackets: &[Option<Bracket>]) -> Vec<bool> {
    let models = plan.models();
    (0..models).map(|m| brackets.iter().skip(m).step_by(models).any(Option::is_some)).collect()
}
