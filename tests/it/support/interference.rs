//! What a look at a family should find: every number of the report from its definition, one element at a time.
//!
//! Values are the f32 that the definitions ask for; sums over elements are in f64, in the plainest order.

use serde_json::{Value, json};

use super::tensor::Tensors;

/// One tensor of the family.
#[derive(Clone)]
pub struct Task {
    pub name: String,
    /// τ per model; `None` where the model lacks the tensor.
    pub taus: Vec<Option<Vec<f32>>>,
    /// τ̂ per density and model.
    pub trimmed: Vec<Vec<Option<Vec<f32>>>>,
    /// The least magnitude kept, per density and model; `None` where nothing is cut off.
    pub thresholds: Vec<Vec<Option<f32>>>,
}

/// How the family is looked at.
#[derive(Clone, Debug)]
pub struct Look {
    /// Densities per model, one list per density.
    pub densities: Vec<Vec<f64>>,
    pub chosen: usize,
    pub tensor_scope: bool,
    pub subsets: Vec<Vec<usize>>,
    pub weights: Vec<f32>,
}

/// The tensors that are looked at, with task vectors and what is left of them.
pub fn tasks(base: &Tensors, models: &[Tensors], look: &Look) -> Vec<Task> {
    let mut tasks: Vec<Task> = Vec::new();
    for (name, base) in base.iter().filter(|(_, tensor)| tensor.elements() > 0) {
        let difference = |model: &Tensors| {
            let tensor = model.get(name)?;
            Some(tensor.f32s().iter().zip(base.f32s()).map(|(theta, base)| theta - base).collect())
        };
        let taus = models.iter().map(difference).collect();
        tasks.push(Task { name: name.clone(), taus, trimmed: Vec::new(), thresholds: Vec::new() });
    }
    for densities in &look.densities {
        let of_model: Vec<Vec<Option<f32>>> = (0..models.len())
            .map(|model| {
                let all = |tasks: &[Task]| -> Vec<f32> {
                    tasks.iter().filter_map(|task| task.taus[model].as_ref()).flatten().copied().collect()
                };
                match look.tensor_scope {
                    true => tasks
                        .iter()
                        .map(|task| threshold(&all(std::slice::from_ref(task)), densities[model], true))
                        .collect(),
                    false => vec![threshold(&all(&tasks), densities[model], false); tasks.len()],
                }
            })
            .collect();
        for (place, task) in tasks.iter_mut().enumerate() {
            let least: Vec<Option<f32>> = of_model.iter().map(|tasks| tasks[place]).collect();
            let trim = |(tau, least): (&Option<Vec<f32>>, &Option<f32>)| {
                let survives = |x: &f32| if least.is_none_or(|least| x.abs() >= least) { *x } else { 0.0 };
                tau.as_ref().map(|tau| tau.iter().map(survives).collect())
            };
            let trimmed = task.taus.iter().zip(&least).map(trim).collect();
            task.trimmed.push(trimmed);
            task.thresholds.push(least);
        }
    }
    tasks
}

/// The least magnitude kept of `tau`; infinite where nothing is, `None` where all is.
fn threshold(tau: &[f32], density: f64, tensor_scope: bool) -> Option<f32> {
    let mut keep = (density * tau.len() as f64) as usize;
    if keep == 0 && density > 0.0 && tensor_scope {
        keep = 1.min(tau.len());
    }
    if keep >= tau.len() {
        return None;
    }
    let mut magnitudes: Vec<f32> = tau.iter().map(|x| x.abs()).collect();
    magnitudes.sort_by(|a, b| b.total_cmp(a));
    Some(if keep == 0 { f32::INFINITY } else { magnitudes[keep - 1] })
}

/// All elements of some tensors, each with one value per model (0 where it lacks the tensor).
struct Elements {
    /// Per element and model.
    tau: Vec<Vec<f32>>,
    /// Per density, element and model.
    trimmed: Vec<Vec<Vec<f32>>>,
    /// Whether the model has the element.
    present: Vec<Vec<bool>>,
    /// Per density, element and model: whether it equals the threshold.
    tied: Vec<Vec<Vec<bool>>>,
}

impl Elements {
    fn of(tasks: &[&Task]) -> Self {
        let models = tasks[0].taus.len();
        let densities = tasks[0].trimmed.len();
        let mut all = Self {
            tau: Vec::new(),
            trimmed: vec![Vec::new(); densities],
            present: Vec::new(),
            tied: vec![Vec::new(); densities],
        };
        for task in tasks {
            let length = task.taus.iter().flatten().map(Vec::len).next().unwrap_or(0);
            for at in 0..length {
                let row = |of: &[Option<Vec<f32>>]| -> Vec<f32> {
                    (0..models).map(|m| of[m].as_ref().map_or(0.0, |values| values[at])).collect()
                };
                all.tau.push(row(&task.taus));
                all.present.push(task.taus.iter().map(Option::is_some).collect());
                for k in 0..densities {
                    all.trimmed[k].push(row(&task.trimmed[k]));
                    let tied = |m: usize| {
                        let tau = task.taus[m].as_ref().map(|tau| tau[at].abs());
                        tau.is_some() && tau == task.thresholds[k][m]
                    };
                    all.tied[k].push((0..models).map(tied).collect());
                }
            }
        }
        all
    }
}

fn share(part: usize, whole: usize) -> Value {
    if whole == 0 { Value::Null } else { json!(part as f64 / whole as f64) }
}

fn ratio(part: f64, whole: f64) -> Value {
    if whole > 0.0 { json!(part / whole) } else { Value::Null }
}

fn conflict(values: impl Iterator<Item = f32> + Clone) -> bool {
    values.clone().any(|x| x > 0.0) && values.clone().any(|x| x < 0.0)
}

fn cosine(a: &[f64], b: &[f64]) -> Value {
    let dot: f64 = a.iter().zip(b).map(|(a, b)| a * b).sum();
    let length = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let whole = length(a) * length(b);
    if whole > 0.0 { json!(dot / length(a) / length(b)) } else { Value::Null }
}

/// Plain mean, trimmed mean and TIES of one element, in f32 as defined.
fn ways(tau: &[f32], trimmed: &[f32], present: &[bool], weights: &[f32]) -> [f32; 3] {
    let (mut sum, mut total) = (0.0f32, 0.0f32);
    for model in (0..tau.len()).filter(|&m| present[m]) {
        sum += weights[model] * tau[model];
        total += weights[model];
    }
    let mean_where = |member: &dyn Fn(f32) -> bool| {
        let (mut sum, mut total) = (0.0f32, 0.0f32);
        for model in (0..tau.len()).filter(|&m| member(trimmed[m])) {
            sum += weights[model] * trimmed[model];
            total += weights[model];
        }
        if total == 0.0 { 0.0 } else { sum / total }
    };
    let mut mass = 0.0f32;
    (0..tau.len()).for_each(|m| mass += weights[m] * trimmed[m]);
    let ties = match mass {
        m if m > 0.0 => mean_where(&|x| x > 0.0),
        m if m < 0.0 => mean_where(&|x| x < 0.0),
        _ => 0.0,
    };
    [sum / total, mean_where(&|x| x != 0.0), ties]
}

/// A class of elements: what the ways to merge make of them.
fn class(name: &str, values: &[[f32; 3]], elements: usize) -> Value {
    let moments = |way: usize| {
        if values.is_empty() {
            return json!({"mean": null, "deviation": null});
        }
        let magnitudes: Vec<f64> = values.iter().map(|v| f64::from(v[way].abs())).collect();
        let mean = magnitudes.iter().sum::<f64>() / magnitudes.len() as f64;
        let variance = magnitudes.iter().map(|m| (m - mean).powi(2)).sum::<f64>() / magnitudes.len() as f64;
        json!({"mean": mean, "deviation": variance.sqrt()})
    };
    json!({
        "name": name, "count": values.len(), "fraction": share(values.len(), elements),
        "plain_mean": moments(0), "trimmed_mean": moments(1), "ties": moments(2),
    })
}

/// Least magnitude of each bin of the histograms: two bins per octave from 2^-40 on.
pub fn magnitude_bins() -> Vec<f64> {
    (-40..8).flat_map(|octave| [2f64.powi(octave), 1.5 * 2f64.powi(octave)]).collect()
}

fn histogram(values: &[f64]) -> Value {
    let edges = magnitude_bins();
    let mut counts = vec![0u64; edges.len()];
    for value in values.iter().map(|x| x.abs()).filter(|x| *x != 0.0) {
        counts[edges.iter().rposition(|edge| value >= *edge).unwrap_or(0)] += 1;
    }
    let first = counts.iter().position(|&n| n > 0).unwrap_or(0);
    let end = counts.iter().rposition(|&n| n > 0).map_or(first, |last| last + 1);
    json!({"first": first, "counts": counts[first..end]})
}

/// Everything that a report says of `some` of all `tasks`.
pub fn measured(some: &[&Task], all: &[Task], look: &Look) -> Value {
    let models = look.weights.len();
    let elements = Elements::of(some);
    let total = elements.tau.len();
    let column = |rows: &[Vec<f32>], m: usize| -> Vec<f64> { rows.iter().map(|row| f64::from(row[m])).collect() };
    let squares = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>();
    let mass = |values: &[f64]| values.iter().map(|x| x.abs()).sum::<f64>();
    let present: Vec<usize> = (0..models).map(|m| elements.present.iter().filter(|row| row[m]).count()).collect();
    let per_model = |value: &dyn Fn(usize) -> Value| -> Value { (0..models).map(value).collect::<Vec<_>>().into() };
    let tau = |m: usize| column(&elements.tau, m);
    let whole: Vec<f64> = (0..models)
        .map(|m| all.iter().filter_map(|t| t.taus[m].as_ref()).flatten().map(|&x| f64::from(x).powi(2)).sum())
        .collect();
    let chosen = &elements.trimmed[look.chosen];
    let merged: Vec<[f32; 3]> =
        (0..total).map(|at| ways(&elements.tau[at], &chosen[at], &elements.present[at], &look.weights)).collect();
    let survivors = |at: usize| chosen[at].iter().filter(|x| **x != 0.0).count();
    let densities: Vec<Value> = (0..look.densities.len())
        .map(|k| {
            let rows = &elements.trimmed[k];
            let kept = |m: usize| rows.iter().filter(|row| row[m] != 0.0).count();
            let tied = |m: usize| elements.tied[k].iter().filter(|row| row[m]).count();
            let conflicts = rows.iter().filter(|row| conflict(row.iter().copied())).count();
            json!({
                "kept": per_model(&|m| json!(kept(m))),
                "kept_fraction": per_model(&|m| share(kept(m), present[m])),
                "tied_fraction": per_model(&|m| share(tied(m), present[m])),
                "norm_kept": per_model(&|m| ratio(squares(&column(rows, m)), squares(&tau(m)))),
                "conflicts": conflicts,
                "conflict_fraction": share(conflicts, total),
            })
        })
        .collect();
    let in_subset =
        |subset: &Vec<usize>| json!(chosen.iter().filter(|row| conflict(subset.iter().map(|&m| row[m]))).count());
    let of_class = |name: &str, member: &dyn Fn(usize) -> bool| {
        let values: Vec<[f32; 3]> = (0..total).filter(|&at| member(at)).map(|at| merged[at]).collect();
        class(name, &values, total)
    };
    let agreement = |at: usize| {
        let positive = chosen[at].iter().filter(|x| **x > 0.0).count();
        positive.max(survivors(at) - positive) as f64 / survivors(at) as f64
    };
    let within = |low: f64, high: f64| {
        move |at: usize| {
            let agreement = agreement(at);
            // Tenths are not exact in f64; ratios of small numbers are a billionth off at most.
            survivors(at) >= 2 && agreement > low - 1e-9 && agreement < high - 1e-9
        }
    };
    let pairs: Vec<(usize, usize)> = (0..models).flat_map(|a| (a + 1..models).map(move |b| (a, b))).collect();
    let per_pair = |value: &dyn Fn(usize, usize) -> Value| -> Value {
        pairs.iter().map(|&(a, b)| value(a, b)).collect::<Vec<_>>().into()
    };
    let same_sign = |rows: &[Vec<f32>], a: usize, b: usize| {
        let both = rows.iter().filter(|row| row[a] != 0.0 && row[b] != 0.0);
        share(both.clone().filter(|row| (row[a] > 0.0) == (row[b] > 0.0)).count(), both.count())
    };
    let ties: Vec<f64> = merged.iter().map(|ways| f64::from(ways[2])).collect();
    let survival = |m: usize| {
        let agrees = |at: &usize| {
            f64::from(chosen[*at][m]) * ties[*at] > 0.0
                || (chosen[*at][m] > 0.0 && ties[*at] > 0.0)
                || (chosen[*at][m] < 0.0 && ties[*at] < 0.0)
        };
        let agreeing: Vec<usize> = (0..total).filter(agrees).collect();
        let kept = chosen.iter().filter(|row| row[m] != 0.0).count();
        let their_mass: f64 = agreeing.iter().map(|&at| f64::from(chosen[at][m].abs())).sum();
        json!({
            "agreeing": agreeing.len(),
            "of_kept": share(agreeing.len(), kept),
            "of_all": share(agreeing.len(), present[m]),
            "of_mass": ratio(their_mass, mass(&tau(m))),
            "cosine": cosine(&tau(m), &ties),
        })
    };
    json!({
        "elements": total,
        "present": present,
        "zeros": per_model(&|m| json!(present[m] - tau(m).iter().filter(|x| **x != 0.0).count())),
        "norm": per_model(&|m| json!(squares(&tau(m)).sqrt())),
        "norm_share": per_model(&|m| ratio(squares(&tau(m)), whole[m])),
        "mean_magnitude": per_model(&|m| ratio(mass(&tau(m)), present[m] as f64)),
        "magnitudes": per_model(&|m| histogram(&tau(m))),
        "densities": densities,
        "subset_conflicts": look.subsets.iter().map(in_subset).collect::<Vec<_>>(),
        "influential": (0..=models).map(|n| (0..total).filter(|&at| survivors(at) == n).count()).collect::<Vec<_>>(),
        "classes": [
            of_class("0", &|at| survivors(at) == 0),
            of_class("1", &|at| survivors(at) == 1),
            of_class("more", &|at| survivors(at) >= 2),
        ],
        "agreement": [
            of_class("0.5-0.6", &within(0.5, 0.6)),
            of_class("0.6-0.7", &within(0.6, 0.7)),
            of_class("0.7-0.8", &within(0.7, 0.8)),
            of_class("0.8-0.9", &within(0.8, 0.9)),
            of_class("0.9-1", &within(0.9, 1.0)),
            of_class("1", &within(1.0, 2.0)),
        ],
        "pairs": {
            "cosine": per_pair(&|a, b| cosine(&tau(a), &tau(b))),
            "cosine_trimmed": per_pair(&|a, b| cosine(&column(chosen, a), &column(chosen, b))),
            "same_sign": per_pair(&|a, b| same_sign(&elements.tau, a, b)),
            "same_sign_trimmed": per_pair(&|a, b| same_sign(chosen, a, b)),
        },
        "survival": per_model(&survival),
    })
}

/// The fields of `found` that `expected` does not have, other than `known`: numbers that nothing is compared with.
pub fn unknown_fields(expected: &Value, found: &Value, known: &[&str]) -> Vec<String> {
    match (expected, found) {
        (Value::Object(fields), Value::Object(found)) => found
            .iter()
            .filter(|(name, _)| !known.contains(&name.as_str()))
            .flat_map(|(name, value)| match fields.get(name) {
                Some(expected) => unknown_fields(expected, value, &[]),
                None => vec![name.clone()],
            })
            .collect(),
        (Value::Array(list), Value::Array(found)) => {
            list.iter().zip(found).flat_map(|(expected, found)| unknown_fields(expected, found, &[])).collect()
        }
        _ => Vec::new(),
    }
}

/// Where `found` is not what is `expected`: the path of the first difference and both values. Fields that `found` has
/// besides are ignored; `scale` is what a difference of nearly nothing is measured by.
pub fn difference(path: &str, expected: &Value, found: &Value, scale: f64) -> Option<String> {
    match (expected, found) {
        (Value::Object(fields), Value::Object(_)) => {
            // A deviation is as exact as the values that it is about.
            let scale = fields.get("mean").and_then(Value::as_f64).unwrap_or(scale);
            fields.iter().find_map(|(name, value)| difference(&format!("{path}.{name}"), value, &found[name], scale))
        }
        (Value::Array(list), Value::Array(other)) if list.len() == other.len() => {
            let both = list.iter().zip(other).enumerate();
            both.into_iter().find_map(|(at, (a, b))| difference(&format!("{path}[{at}]"), a, b, scale))
        }
        (Value::Number(a), Value::Number(b)) if a.is_u64() && b.is_u64() && a == b => None,
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64()?, b.as_f64()?);
            let close = (a - b).abs() <= 1e-7 * a.abs().max(b.abs()).max(scale.abs());
            (!close).then(|| format!("{path}: expected {a:e}, found {b:e}"))
        }
        (a, b) => (a != b).then(|| format!("{path}: expected {a}, found {b}")),
    }
}
