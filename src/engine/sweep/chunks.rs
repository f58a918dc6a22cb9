//! Which chunks the outputs of a sweep lack, and the thresholds that they look for.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use super::group::Out;
use super::places;
use crate::plan::{Chunk, Goal, Plan, Schedule, Unit};
use crate::sketch::Threshold;

/// Parts of tensor `tensor` that some of the outputs lack, in order, each with those that lack all of it; the others
/// lack nothing of it.
fn intervals(outs: &[Out<'_>], length: u64, tensor: u32) -> Vec<(Range<u64>, Arc<[usize]>)> {
    let gaps: Vec<Vec<(u64, u64)>> = outs.iter().map(|out| out.kept.gaps(tensor, length).collect()).collect();
    let bounds: BTreeSet<u64> = gaps.iter().flatten().flat_map(|&(start, end)| [start, end]).collect();
    let bounds: Vec<u64> = bounds.into_iter().collect();
    let lacking = |start: u64| -> Arc<[usize]> {
        let lacks = |gaps: &Vec<(u64, u64)>| gaps.iter().any(|&(from, end)| from <= start && start < end);
        (0..outs.len()).filter(|&out| lacks(&gaps[out])).collect()
    };
    let all = bounds.windows(2).map(|pair| (pair[0]..pair[1], lacking(pair[0])));
    all.filter(|(_, lacking)| !lacking.is_empty()).collect()
}

/// The chunks of `tensors` that some of the outputs lack, in order, each with those outputs.
pub(super) fn left<'a>(
    union: &'a Plan,
    outs: &'a [Out<'_>],
    tensors: &'a [u32],
    chunk_elements: u64,
) -> impl Iterator<Item = (Chunk, Arc<[usize]>)> + 'a {
    tensors.iter().flat_map(move |&tensor| {
        intervals(outs, union.length(tensor), tensor).into_iter().flat_map(move |(range, lacking)| {
            let most = chunk_elements.max(union.granule(tensor).unwrap_or(0));
            Schedule::chunks_of(union, tensor, range, most).map(move |chunk| (chunk, Arc::clone(&lacking)))
        })
    })
}

/// What the outputs by `plans` want of each of `union`'s models in `unit`: goal i is about model i mod n.
pub(super) fn goals_of<'p>(union: &Plan, plans: impl Iterator<Item = &'p Plan>, unit: &Unit) -> Vec<Goal> {
    let models = union.models();
    let mut own: Vec<Vec<Goal>> = vec![Vec::new(); models];
    for plan in plans {
        let Some(places) = places(plan, union) else { continue };
        for (at, goal) in plan.goals(unit).into_iter().enumerate() {
            let model = places[plan.first_model + at % plan.models()] as usize - union.first_model;
            own[model].push(goal);
        }
    }
    let rounds = own.iter().map(Vec::len).max().unwrap_or(0).max(1);
    let goal = |at: usize| own[at % models].get(at / models).copied().unwrap_or(Goal::Nothing);
    (0..rounds * models).map(goal).collect()
}

/// What outputs look for in one unit, each thing once: goal i is about model i mod n of the union's n.
pub(super) struct Search {
    pub goals: Vec<Goal>,
    /// Per output: its goals, and where the threshold of each is found.
    own: Vec<(Vec<Goal>, Vec<Option<usize>>)>,
}

impl Search {
    pub(super) fn new(union: &Plan, outs: &[&Out<'_>], unit: &Unit) -> Self {
        let models = union.models();
        let mut distinct: Vec<Vec<Goal>> = vec![Vec::new(); models];
        let own = outs.iter().map(|out| {
            let goals = out.plan.goals(unit);
            let place = |(at, goal): (usize, &Goal)| {
                let model = out.union_model(union, at % out.plan.models());
                goal.needs_threshold().then(|| {
                    let sought = &mut distinct[model];
                    let known = sought.iter().position(|other| other == goal);
                    let number = known.unwrap_or_else(|| {
                        sought.push(*goal);
                        sought.len() - 1
                    });
                    number * models + model
                })
            };
            let places = goals.iter().enumerate().map(place).collect();
            (goals, places)
        });
        let own = own.collect();
        let rounds = distinct.iter().map(Vec::len).max().unwrap_or(0).max(1);
        let goal = |at: usize| distinct[at % models].get(at / models).copied().unwrap_or(Goal::Nothing);
        Self { goals: (0..rounds * models).map(goal).collect(), own }
    }

    /// The goals of the `number`-th output, and what was found of each.
    pub(super) fn of(&self, number: usize, found: &[Option<Threshold>]) -> (&[Goal], Vec<Option<Threshold>>) {
        let (goals, places) = &self.own[number];
        (goals, places.iter().map(|place| place.and_then(|at| found[at])).collect())
    }
}
