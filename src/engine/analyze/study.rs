//! What is looked at: the plan of a family, the densities, the subsets of models, and the groups that tensors belong to.
//!
//! - All ties at a threshold are kept, as in the paper's code, whatever the plan's rule for them.
//! - Subsets of models are all of a size if there are at most [`SUBSETS`], else so many of them, drawn by a counter-based
//!   generator from the seed, the size and the attempt: the same on every machine.
//! - A tensor's layer is the first number in its name with what stands before it; its kind is its name with every
//!   number replaced by `*`.

use std::collections::BTreeSet;

use super::super::cut::Cut;
use super::measures::Shape;
use super::meter::{Aim, BLOCK_ELEMENTS, Cuts, Meter};
use crate::error::{Error, Result};
use crate::kernels;
use crate::method::Inputs;
use crate::plan::{
    Action, Downloads, Goal, Plan, Run, Schedule, Scope, Study as Demand, Trim, TrimTies, Unit, split_layer,
};
use crate::sketch::Threshold;

/// Most subsets of models of one size that are looked at.
pub(super) const SUBSETS: usize = 10;
/// Most layers, and most kinds, that have numbers of their own; what is beyond shares the last.
const GROUPS: usize = 1024;
/// Most densities: each is a threshold to be found in every task vector.
const DENSITIES: usize = 32;
/// What the report takes while it is written: the page, one tensor's entry, and the journal's record.
pub(super) const REPORT_BYTES: u64 = 12_000_000;
/// Name of the group of tensors outside the layers.
const OUTSIDE: &str = "outside the layers";
/// Name of the group that all groups beyond [`GROUPS`] share.
const OTHERS: &str = "(others)";

/// A fraction of each task vector that is kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Density {
    /// The same of all.
    Uniform(f64),
    /// What the plan says, which differs between models or tensors.
    Planned,
}

/// Tensors that are summed up together.
#[derive(Debug, Default)]
pub(super) struct Groups {
    pub names: Vec<String>,
    /// Number of tensors in each.
    pub tensors: Vec<u64>,
    /// Per tensor of the study, in its order.
    pub of: Vec<u32>,
}

/// A family to be looked at, with everything decided: see [`super::analyze`].
pub struct Study {
    pub(super) plan: Plan,
    /// How it is cut for the run.
    pub schedule: Schedule,
    pub(super) densities: Vec<Density>,
    pub(super) aim: Aim,
    /// Tensors looked at, in the order of work.
    pub(super) tensors: Vec<u32>,
    pub(super) layers: Groups,
    pub(super) kinds: Groups,
}

impl Study {
    /// A look at the models of `plan` at its density and at `densities`. The plan must trim by magnitude.
    pub fn new(mut plan: Plan, densities: &[f64], run: Run) -> Result<Self> {
        // Of adapters that are written as factors, the changes that they make are looked at.
        plan = match plan.factors.take() {
            Some(factored) => factored.merged,
            None => plan,
        };
        if plan.needs().inputs != Inputs::TrimmedTaskVectors
            || plan.method.draws()
            || plan.bounds() != 1
            || plan.votes()
        {
            return Err(Error::usage(format!("'{}' is not a method that can be analyzed", plan.method.name()))
                .help("interference is measured for --method ties"));
        }
        let threshold = plan.trim.as_ref().map_or(plan.recipe.threshold, |trim| trim.threshold);
        plan.trim = Some(Trim { threshold, ties: TrimTies::Keep });
        let merged = |t: &u32| {
            let tensor = &plan.tensors[*t as usize];
            tensor.elements > 0 && matches!(tensor.action, Action::Merge { .. })
        };
        let tensors: Vec<u32> = (0..plan.tensors.len() as u32).filter(merged).collect();
        if tensors.is_empty() {
            return Err(Error::input("nothing to analyze: no tensor of the base is a float tensor that is merged")
                .at(&plan.template().dir)
                .help("check --base, --include and --exclude"));
        }
        let (densities, chosen) = densities_of(&plan, &tensors, densities)?;
        let subsets = subsets(plan.models(), plan.seed);
        let aim = Aim { shape: Shape::new(plan.models(), densities.len(), subsets.len()), chosen, subsets };
        let layers = group(&plan, &tensors, layer_of);
        let kinds = group(&plan, &tensors, kind_of);
        let numbers = aim.shape.bytes();
        let names: usize = layers.names.iter().chain(&kinds.names).map(|name| name.len() + 64).sum();
        let demand = Demand {
            densities: densities.len() as u64,
            block_elements: BLOCK_ELEMENTS,
            sums: aim.shape.sums() as u64,
            thread_bytes: Meter::bytes(&aim.shape),
            held_bytes: numbers * (layers.names.len() + kinds.names.len() + 5) as u64
                + names as u64
                + tensors.len() as u64 * 16
                + REPORT_BYTES,
        };
        let schedule = Schedule::of_study(&plan, run, demand, &|unit| goals(&plan, &densities, unit))?;
        Ok(Self { plan, schedule, densities, aim, tensors, layers, kinds })
    }

    /// Keeps what is downloaded and needed again as `kept` says.
    pub fn keeping(mut self, kept: &Downloads) -> Self {
        self.schedule = self.schedule.keeping(&self.plan, kept);
        self
    }

    /// What is sought in `unit`: goal k·n + t is about density k and model t.
    pub(super) fn goals(&self, unit: &Unit) -> Vec<Goal> {
        goals(&self.plan, &self.densities, unit)
    }

    /// What survives, from what was found for [`Self::goals`].
    pub(super) fn cuts(&self, goals: &[Goal], found: &[Option<Threshold>]) -> Cuts {
        let cut = |(goal, found): (&Goal, &Option<Threshold>)| match (goal, found) {
            (Goal::Keep { keep, .. }, Some(threshold)) => Cut::new(*threshold, *keep, TrimTies::Keep),
            (Goal::Nothing, _) => Cut::Nothing,
            _ => Cut::NonZero,
        };
        let ties = found.iter().map(|found| found.map(|threshold| threshold.ties)).collect();
        Cuts { cuts: goals.iter().zip(found).map(cut).collect(), ties }
    }

    /// Stored bytes of the tensors from place `from` on.
    pub(super) fn bytes_from(&self, from: usize) -> u64 {
        self.tensors[from..].iter().map(|&t| self.bytes_of(t, self.plan.length(t))).sum()
    }

    /// Stored bytes of so many elements of a tensor.
    pub(super) fn bytes_of(&self, tensor: u32, elements: u64) -> u64 {
        let pieces = self.plan.pieces(tensor, crate::plan::Wanted::All);
        let bytes = pieces.map(|piece| self.plan.bytes_used(tensor, piece)).sum::<u64>();
        (u128::from(bytes) * u128::from(elements) / u128::from(self.plan.length(tensor).max(1))) as u64
    }
}

/// See [`Study::goals`].
fn goals(plan: &Plan, densities: &[Density], unit: &Unit) -> Vec<Goal> {
    let goal = |density: Density, model: usize| {
        let elements: u64 = unit.tensors.iter().map(|&t| plan.merged_length(t, model)).sum();
        let fraction = match density {
            Density::Uniform(fraction) => fraction,
            Density::Planned => plan.params_of(unit.tensors[0]).density[model],
        };
        let keep = ((fraction * elements as f64) as u64).min(elements);
        let tiny = keep == 0 && fraction > 0.0 && plan.scope == Scope::Tensor;
        match if tiny { 1.min(elements) } else { keep } {
            0 => Goal::Nothing,
            keep if keep >= elements => Goal::All,
            keep => Goal::Keep { keep, elements },
        }
    };
    densities.iter().flat_map(|&density| (0..plan.models()).map(move |model| goal(density, model))).collect()
}

/// The densities to look at, in order, and the place of the plan's own.
fn densities_of(plan: &Plan, tensors: &[u32], asked: &[f64]) -> Result<(Vec<Density>, usize)> {
    if let Some(bad) = asked.iter().find(|k| !(**k > 0.0 && **k <= 1.0)) {
        return Err(Error::usage(format!("a density of {bad} is not above 0 and at most 1")).help("see --densities"));
    }
    if asked.len() > DENSITIES {
        return Err(Error::usage(format!("{} densities are asked for, at most {DENSITIES} are possible", asked.len())));
    }
    let planned: Vec<f64> = tensors.iter().flat_map(|&t| plan.params_of(t).density.iter().copied()).collect();
    let uniform = planned.iter().all(|k| *k == planned[0]).then_some(planned[0]);
    let mut list: Vec<f64> = asked.iter().copied().chain(uniform).chain([1.0]).collect();
    list.sort_by(f64::total_cmp);
    list.dedup();
    let mut densities: Vec<Density> = list.iter().map(|&k| Density::Uniform(k)).collect();
    let chosen = match uniform {
        Some(chosen) => list.iter().position(|k| *k == chosen).expect("it is in the list"),
        None => {
            densities.push(Density::Planned);
            densities.len() - 1
        }
    };
    Ok((densities, chosen))
}

/// Subsets of `models` models, of two and more, by size.
fn subsets(models: usize, seed: u64) -> Vec<Vec<usize>> {
    let mut all = Vec::new();
    for size in 2..=models {
        match combinations(models, size) {
            Some(count) if count <= SUBSETS => all.extend(every(models, size)),
            _ => all.extend(drawn(models, size, seed)),
        }
    }
    all
}

/// n over k, if it is at most a few.
fn combinations(n: usize, k: usize) -> Option<usize> {
    (0..k.min(n - k)).try_fold(1usize, |count, at| {
        let next = count * (n - at) / (at + 1);
        (next <= 1_000_000).then_some(next)
    })
}

/// All subsets of a size, in lexicographic order.
fn every(models: usize, size: usize) -> Vec<Vec<usize>> {
    let mut all = Vec::new();
    let mut subset: Vec<usize> = (0..size).collect();
    loop {
        all.push(subset.clone());
        let Some(at) = (0..size).rev().find(|&at| subset[at] < models - size + at) else { return all };
        subset[at] += 1;
        (at + 1..size).for_each(|next| subset[next] = subset[next - 1] + 1);
    }
}

/// [`SUBSETS`] different subsets of a size, of which there are more.
fn drawn(models: usize, size: usize, seed: u64) -> Vec<Vec<usize>> {
    let mut found = BTreeSet::new();
    let key = kernels::draw(seed, size as u64);
    let mut attempt = 0;
    while found.len() < SUBSETS {
        // The first entries of a shuffle.
        let mut order: Vec<usize> = (0..models).collect();
        for at in 0..size {
            let draw = kernels::draw(key, attempt * models as u64 + at as u64);
            let left = (models - at) as u128;
            order.swap(at, at + ((u128::from(draw) * left) >> 64) as usize);
        }
        let mut subset = order[..size].to_vec();
        subset.sort_unstable();
        found.insert(subset);
        attempt += 1;
    }
    found.into_iter().collect()
}

fn group(plan: &Plan, tensors: &[u32], name_of: impl Fn(&str) -> String) -> Groups {
    let mut groups = Groups::default();
    let mut places = std::collections::HashMap::new();
    for &tensor in tensors {
        let mut name = name_of(&plan.tensors[tensor as usize].name);
        if groups.names.len() >= GROUPS && !places.contains_key(&name) {
            name = OTHERS.to_owned();
        }
        let place = *places.entry(name.clone()).or_insert_with(|| {
            groups.names.push(name);
            groups.tensors.push(0);
            groups.names.len() as u32 - 1
        });
        groups.tensors[place as usize] += 1;
        groups.of.push(place);
    }
    groups
}

fn layer_of(name: &str) -> String {
    split_layer(name).map_or_else(|| OUTSIDE.to_owned(), |(stack, number, _)| format!("{stack}.{number}"))
}

fn kind_of(name: &str) -> String {
    let number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    name.split('.').map(|part| if number(part) { "*" } else { part }).collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_families_have_all_their_subsets() {
        assert_eq!(subsets(1, 0), Vec::<Vec<usize>>::new());
        assert_eq!(subsets(3, 0), [vec![0, 1], vec![0, 2], vec![1, 2], vec![0, 1, 2]]);
        assert_eq!(subsets(5, 0).len(), 10 + 10 + 5 + 1);
    }

    #[test]
    fn of_large_families_ten_subsets_of_each_size_are_drawn() {
        for models in [6, 12, 40, 128] {
            let drawn = subsets(models, 7);
            for size in 2..=models {
                let of_size: BTreeSet<_> = drawn.iter().filter(|subset| subset.len() == size).collect();
                assert_eq!(
                    of_size.len(),
                    combinations(models, size).unwrap_or(SUBSETS).min(SUBSETS),
                    "{models} {size}"
                );
            }
            assert!(drawn.iter().all(|subset| subset.is_sorted() && subset.iter().all(|&model| model < models)));
        }
        assert_eq!(subsets(12, 7), subsets(12, 7));
        assert_ne!(subsets(12, 7), subsets(12, 8));
    }

    #[test]
    fn every_model_is_drawn_about_as_often_as_the_others() {
        let mut counts = [0u32; 12];
        (0..200).flat_map(|seed| drawn(12, 3, seed)).flatten().for_each(|model| counts[model] += 1);
        assert!(counts.iter().all(|&count| (400..600).contains(&count)), "{counts:?}");
    }

    #[test]
    fn names_give_layers_and_kinds() {
        assert_eq!(layer_of("model.layers.12.mlp.up_proj.weight"), "model.layers.12");
        assert_eq!(kind_of("model.layers.12.mlp.experts.3.w1.weight"), "model.layers.*.mlp.experts.*.w1.weight");
        assert_eq!((layer_of("lm_head.weight"), kind_of("lm_head.weight")), (OUTSIDE.into(), "lm_head.weight".into()));
    }
}
