//! From counts and sums to what a report says: shares, cosines, means and deviations.

use serde_json::Value;

use super::super::PROGRAM;
use super::super::side_files::base_name;
use super::gather::Gathered;
use super::measures::{BINS, BUCKETS, CLASSES, Count, FIRST_EXPONENT, MOMENTS, Measures, Sum, WAYS};
use super::study::{Density, Groups, Study};
use crate::plan::Scope;
use crate::report::{
    Analysis, AtDensity, Class, Group, Histogram, Measured, Moments, Pairs, Settings, Survival, TensorEntry,
    ThresholdAt, ratio, round, share,
};
use crate::sketch::Threshold;

/// Names of the classes and of the buckets.
const CLASS_NAMES: [&str; CLASSES] = ["0", "1", "more"];
const BUCKET_NAMES: [&str; BUCKETS] = ["0.5-0.6", "0.6-0.7", "0.7-0.8", "0.8-0.9", "0.9-1", "1"];

impl Study {
    /// The densities, for records and reports.
    pub(super) fn densities_json(&self) -> Vec<Option<f64>> {
        let one = |density: &Density| match density {
            Density::Uniform(fraction) => Some(*fraction),
            Density::Planned => None,
        };
        self.densities.iter().map(one).collect()
    }

    /// All but the tensors.
    pub(super) fn describe(&self, gathered: &Gathered) -> Analysis {
        let plan = &self.plan;
        let first = plan.params_of(self.tensors[0]);
        let name = |source: &str| base_name(source.trim_end_matches('/'));
        let groups = |groups: &Groups, all: &[Measures]| {
            let parts = groups.names.iter().zip(&groups.tensors).zip(all);
            let one = |((name, &tensors), measures): ((&String, &u64), &Measures)| Group {
                name: name.clone(),
                tensors,
                measured: self.measured(measures, &gathered.overall),
            };
            parts.map(one).collect()
        };
        Analysis {
            format: super::FORMAT.into(),
            program: PROGRAM.into(),
            fingerprint: plan.fingerprint.clone(),
            base: plan.recipe.base.as_deref().map(name).unwrap_or_default(),
            models: plan.recipe.models.iter().map(|model| name(&model.source)).collect(),
            settings: Settings {
                scope: if plan.scope == Scope::Model { "model" } else { "tensor" }.into(),
                densities: self.densities_json(),
                chosen: self.aim.chosen,
                chosen_per_model: first.density.clone(),
                weights: first.weights.iter().map(|&weight| round(f64::from(weight))).collect(),
                subsets: self.aim.subsets.clone(),
                seed: plan.seed,
                magnitude_bins: magnitude_bins(),
            },
            warnings: self.warnings(),
            thresholds: gathered.thresholds.as_ref().map(|found| self.thresholds(found)),
            overall: self.measured(&gathered.overall, &gathered.overall),
            layers: groups(&self.layers, &gathered.layers),
            kinds: groups(&self.kinds, &gathered.kinds),
        }
    }

    fn warnings(&self) -> Vec<String> {
        let mut warnings = self.plan.warnings.clone();
        let models = self.plan.models();
        let drawn = (2..=models).find(|&size| {
            let of_size = self.aim.subsets.iter().filter(|subset| subset.len() == size).count();
            size < models && of_size == super::study::SUBSETS && models > 5
        });
        if models == 1 {
            warnings.push("only one model is given: what compares models needs two, and is left out".into());
        } else if drawn.is_some() {
            warnings.push(format!(
                "of {models} models, conflicts are measured in at most {} subsets of each size, drawn with seed {}",
                super::study::SUBSETS,
                self.plan.seed
            ));
        }
        warnings
    }

    /// One tensor; `place` is its place in the order of work.
    pub(super) fn entry(
        &self,
        place: usize,
        found: &[Option<Threshold>],
        own: &Measures,
        all: &Measures,
    ) -> TensorEntry {
        let tensor = &self.plan.tensors[self.tensors[place] as usize];
        TensorEntry {
            name: tensor.name.to_string(),
            shape: tensor.shape.to_vec(),
            layer: self.layers.of[place],
            kind: self.kinds.of[place],
            thresholds: (!found.is_empty()).then(|| self.thresholds(found)),
            measured: self.measured(own, all),
        }
    }

    fn thresholds(&self, found: &[Option<Threshold>]) -> Vec<Vec<Option<ThresholdAt>>> {
        let one = |found: &Option<Threshold>| {
            found.map(|Threshold { ties, above, tied }| {
                let magnitude = round(f64::from(f32::from_bits(ties.low)));
                ThresholdAt { magnitude, above, tied }
            })
        };
        found.chunks(self.plan.models()).map(|models| models.iter().map(one).collect()).collect()
    }

    /// Everything that follows from one set of numbers; `all` are those of the whole model.
    fn measured(&self, own: &Measures, all: &Measures) -> Measured {
        let shape = &self.aim.shape;
        let counts = |what| &own.counts[shape.count(what)];
        let sums = |what| &own.sums[shape.sum(what)];
        let (present, elements) = (counts(Count::Present), counts(Count::Elements)[0]);
        let (squares, mass) = (sums(Sum::Squares), sums(Sum::Mass));
        let models = 0..shape.models;
        let squares_all = &all.sums[shape.sum(Sum::Squares)];
        Measured {
            elements,
            present: present.to_vec(),
            zeros: present.iter().zip(counts(Count::NonZero)).map(|(all, nonzero)| all - nonzero).collect(),
            norm: squares.iter().map(|square| round(square.sqrt())).collect(),
            norm_share: models.clone().map(|m| ratio(squares[m], squares_all[m])).collect(),
            mean_magnitude: models.clone().map(|m| ratio(mass[m], present[m] as f64)).collect(),
            magnitudes: counts(Count::Magnitudes).chunks(BINS).map(histogram).collect(),
            densities: (0..shape.densities).map(|k| self.at_density(own, k)).collect(),
            subset_conflicts: counts(Count::Subsets).to_vec(),
            influential: counts(Count::Influential).to_vec(),
            classes: {
                let influential = counts(Count::Influential);
                let more = influential.iter().skip(2).sum();
                let counts = [influential[0], influential[1], more];
                classes(&CLASS_NAMES, &counts, sums(Sum::Classes), elements)
            },
            agreement: classes(&BUCKET_NAMES, counts(Count::Agreement), sums(Sum::Agreement), elements),
            pairs: self.pairs(own),
            survival: models.map(|m| self.survival(own, m)).collect(),
        }
    }

    fn at_density(&self, own: &Measures, density: usize) -> AtDensity {
        let shape = &self.aim.shape;
        let of = |what| &own.counts[shape.count(what)][density * shape.models..(density + 1) * shape.models];
        let (kept, tied) = (of(Count::Kept), of(Count::Ties));
        let present = &own.counts[shape.count(Count::Present)];
        let squares = &own.sums[shape.sum(Sum::Squares)];
        let squares_kept = &own.sums[shape.sum(Sum::SquaresKept)][density * shape.models..];
        let conflicts = own.counts[shape.count(Count::Conflicts)][density];
        AtDensity {
            kept: kept.to_vec(),
            kept_fraction: kept.iter().zip(present).map(|(&kept, &all)| share(kept, all)).collect(),
            tied_fraction: tied.iter().zip(present).map(|(&tied, &all)| share(tied, all)).collect(),
            norm_kept: squares.iter().zip(squares_kept).map(|(&all, &kept)| ratio(kept, all)).collect(),
            conflicts,
            conflict_fraction: share(conflicts, own.counts[shape.count(Count::Elements)][0]),
        }
    }

    fn pairs(&self, own: &Measures) -> Pairs {
        let shape = &self.aim.shape;
        let squares = &own.sums[shape.sum(Sum::Squares)];
        let kept = &own.sums[shape.sum(Sum::SquaresKept)][self.aim.chosen * shape.models..];
        let cosines = |what, squares: &[f64]| {
            let dots = own.sums[shape.sum(what)].iter();
            shape.pairs().zip(dots).map(|((a, b), &dot)| cosine(dot, squares[a], squares[b])).collect()
        };
        let signs = |alike, opposed| {
            let counts = own.counts[shape.count(alike)].iter().zip(&own.counts[shape.count(opposed)]);
            counts.map(|(&alike, &opposed)| share(alike, alike + opposed)).collect()
        };
        Pairs {
            cosine: cosines(Sum::Dots, squares),
            cosine_trimmed: cosines(Sum::DotsTrimmed, kept),
            same_sign: signs(Count::Alike, Count::Opposed),
            same_sign_trimmed: signs(Count::AlikeTrimmed, Count::OpposedTrimmed),
        }
    }

    fn survival(&self, own: &Measures, model: usize) -> Survival {
        let shape = &self.aim.shape;
        let count = |what| own.counts[shape.count(what)][model];
        let sum = |what| own.sums[shape.sum(what)][model];
        let kept = own.counts[shape.count(Count::Kept)][self.aim.chosen * shape.models + model];
        let merged = own.sums[shape.sum(Sum::Merged)][0];
        let agreeing = count(Count::Agreeing);
        Survival {
            agreeing,
            of_kept: share(agreeing, kept),
            of_all: share(agreeing, count(Count::Present)),
            of_mass: ratio(sum(Sum::MassAgreeing), sum(Sum::Mass)),
            cosine: cosine(sum(Sum::DotsMerged), sum(Sum::Squares), merged),
        }
    }
}

/// Least magnitude of each bin.
fn magnitude_bins() -> Vec<f64> {
    let edge = |bin: usize| {
        let octave = 2f64.powi(FIRST_EXPONENT + (bin / 2) as i32);
        if bin.is_multiple_of(2) { octave } else { 1.5 * octave }
    };
    (0..BINS).map(edge).collect()
}

fn histogram(counts: &[u64]) -> Histogram {
    let first = counts.iter().position(|&count| count > 0).unwrap_or(0);
    let end = counts.iter().rposition(|&count| count > 0).map_or(first, |last| last + 1);
    Histogram { first, counts: counts[first..end].to_vec() }
}

fn classes(names: &[&str], counts: &[u64], sums: &[f64], elements: u64) -> Vec<Class> {
    let parts = names.iter().zip(counts).zip(sums.chunks_exact(WAYS * MOMENTS));
    let class = |((name, &count), sums): ((&&str, &u64), &[f64])| {
        let way = |at: usize| moments(count, sums[at * MOMENTS], sums[at * MOMENTS + 1]);
        let (plain_mean, trimmed_mean, ties) = (way(0), way(1), way(2));
        Class { name: (*name).into(), count, fraction: share(count, elements), plain_mean, trimmed_mean, ties }
    };
    parts.map(class).collect()
}

/// From the number of values, their sum and the sum of their squares.
fn moments(count: u64, sum: f64, squares: f64) -> Moments {
    if count == 0 {
        return Moments { mean: None, deviation: None };
    }
    let mean = sum / count as f64;
    // Rounding can take what should be zero below it.
    let variance = (squares / count as f64 - mean * mean).max(0.0);
    Moments { mean: Some(round(mean)), deviation: Some(round(variance.sqrt())) }
}

/// The cosine that follows from a dot product and two squared lengths, if both are something.
fn cosine(dot: f64, a: f64, b: f64) -> Option<f64> {
    (a > 0.0 && b > 0.0).then(|| round((dot / a.sqrt() / b.sqrt()).clamp(-1.0, 1.0)))
}

/// A value as one line of JSON.
pub(super) fn json(value: &impl serde::Serialize) -> crate::error::Result<String> {
    serde_json::to_string(value).map_err(|e| crate::error::Error::failed(format!("the report as JSON: {e}")))
}

/// The fields of `value`, without the braces around them: so that more can follow.
pub(super) fn open_json(value: &impl serde::Serialize) -> crate::error::Result<String> {
    let Value::Object(fields) = serde_json::to_value(value).map_err(|e| crate::error::Error::failed(e.to_string()))?
    else {
        return Ok(String::new());
    };
    let mut text = String::from("{");
    for (at, (name, value)) in fields.iter().enumerate() {
        text.push_str(if at == 0 { "\n" } else { ",\n" });
        text.push_str(&format!("{}:{}", json(name)?, json(value)?));
    }
    Ok(text)
}
