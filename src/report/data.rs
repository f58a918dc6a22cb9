//! The numbers of a report: what `report.json` holds, and all that pages and figures are drawn from.
//!
//! Lists per model are in the order of the models. Lists per pair are in the order (0, 1), (0, 2), ..., (1, 2), ... A number
//! that is not defined (a cosine with nothing, a share of none) is null. `docs/report.md` describes every field.

use serde::Serialize;

/// A look at a family of models. The tensors are written one by one: see [`TensorEntry`].
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Analysis {
    /// What this is, with the version of its format.
    pub format: String,
    /// Name and version of the program.
    pub program: String,
    /// BLAKE3 over recipe and headers, as in a merge's manifest.
    pub fingerprint: String,
    /// The base, by its last name.
    pub base: String,
    /// The models, by their last names.
    pub models: Vec<String>,
    /// What was asked for.
    pub settings: Settings,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// Thresholds per density and model, where they are the whole model's.
    pub thresholds: Option<Vec<Vec<Option<ThresholdAt>>>>,
    /// The whole model.
    pub overall: Measured,
    /// Per layer, in the order of the tensors.
    pub layers: Vec<Group>,
    /// Per kind of tensor: names with the numbers left out.
    pub kinds: Vec<Group>,
}

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Settings {
    /// `model` or `tensor`: where one threshold applies.
    pub scope: String,
    /// The densities looked at, ascending; null where it is the plan's and differs between models or tensors.
    pub densities: Vec<Option<f64>>,
    /// Which of them the family is merged at: what is said of trimmed task vectors without naming a density.
    pub chosen: usize,
    /// The chosen density of each model, in the first tensor.
    pub chosen_per_model: Vec<f64>,
    /// Weights of the models in the election, in the first tensor.
    pub weights: Vec<f64>,
    /// The subsets of models looked at.
    pub subsets: Vec<Vec<usize>>,
    /// Seed of the subsets' draw.
    pub seed: u64,
    /// Least magnitude of each bin of the histograms; the first bin holds everything smaller too.
    pub magnitude_bins: Vec<f64>,
}

/// A threshold.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ThresholdAt {
    /// Magnitude of the least entry kept.
    pub magnitude: f64,
    /// Entries above it.
    pub above: u64,
    /// Entries equal to it.
    pub tied: u64,
}

/// Tensors that are summed up.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Group {
    /// Name of the layer or kind.
    pub name: String,
    /// Tensors in it.
    pub tensors: u64,
    /// Their numbers.
    #[serde(flatten)]
    pub measured: Measured,
}

/// One tensor.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorEntry {
    /// Its name.
    pub name: String,
    /// Its shape, outermost dimension first.
    pub shape: Vec<u64>,
    /// Place of its layer in the list of layers.
    pub layer: u32,
    /// Place of its kind in the list of kinds.
    pub kind: u32,
    /// Its own thresholds, where there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thresholds: Option<Vec<Vec<Option<ThresholdAt>>>>,
    /// Its numbers.
    #[serde(flatten)]
    pub measured: Measured,
}

/// The numbers of a tensor, a layer, a kind or the whole model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measured {
    /// Merged elements.
    pub elements: u64,
    /// Per model: elements of tensors that it has.
    pub present: Vec<u64>,
    /// Per model: entries of the task vector that are exactly zero.
    pub zeros: Vec<u64>,
    /// Per model: length of the task vector, √Σ τ².
    pub norm: Vec<f64>,
    /// Per model: share of Σ τ² over the whole model that lies here.
    pub norm_share: Vec<Option<f64>>,
    /// Per model: mean |τ|.
    pub mean_magnitude: Vec<Option<f64>>,
    /// Per model: entries that are not zero, by magnitude.
    pub magnitudes: Vec<Histogram>,
    /// Per density.
    pub densities: Vec<AtDensity>,
    /// Per subset of models: elements whose survivors disagree in sign, at the chosen density.
    pub subset_conflicts: Vec<u64>,
    /// Elements that survive in 0, 1, ..., n models.
    pub influential: Vec<u64>,
    /// Elements that survive in no model, in one, in more: what ways to merge make of them.
    pub classes: Vec<Class>,
    /// Elements that survive in two models or more, by sign agreement.
    pub agreement: Vec<Class>,
    /// Per pair of models.
    pub pairs: Pairs,
    /// Per model: what of it is found in the merged task vector.
    pub survival: Vec<Survival>,
}

/// Counts by magnitude.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Histogram {
    /// The bin of the first count.
    pub first: usize,
    /// Counts of that bin and those after it, without empty ones at the end.
    pub counts: Vec<u64>,
}

/// At one density.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AtDensity {
    /// Per model: entries kept that are not zero.
    pub kept: Vec<u64>,
    /// Per model: the same as a share of its entries.
    pub kept_fraction: Vec<Option<f64>>,
    /// Per model: share of its entries that equal the threshold.
    pub tied_fraction: Vec<Option<f64>>,
    /// Per model: share of Σ τ² that the entries kept have.
    pub norm_kept: Vec<Option<f64>>,
    /// Elements whose survivors disagree in sign.
    pub conflicts: u64,
    /// The same as a share of all elements.
    pub conflict_fraction: Option<f64>,
}

/// Elements that have something in common, and the magnitudes that ways to merge give them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Class {
    /// What they have in common.
    pub name: String,
    /// How many there are.
    pub count: u64,
    /// Share of all elements.
    pub fraction: Option<f64>,
    /// Magnitude of the mean of all task vectors, untrimmed.
    pub plain_mean: Moments,
    /// Magnitude of the mean of the survivors, signs not elected.
    pub trimmed_mean: Moments,
    /// Magnitude of the TIES merge.
    pub ties: Moments,
}

/// Mean and standard deviation (of the whole population).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Moments {
    /// Mean.
    pub mean: Option<f64>,
    /// Standard deviation.
    pub deviation: Option<f64>,
}

/// How alike pairs of task vectors are.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Pairs {
    /// Cosine before the trim.
    pub cosine: Vec<Option<f64>>,
    /// Cosine after it.
    pub cosine_trimmed: Vec<Option<f64>>,
    /// Of the entries that are not zero in both: share of equal sign, before the trim.
    pub same_sign: Vec<Option<f64>>,
    /// The same after it.
    pub same_sign_trimmed: Vec<Option<f64>>,
}

/// What of a model is found in the merged task vector.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Survival {
    /// Entries kept that point the way the merged task vector does.
    pub agreeing: u64,
    /// The same as a share of the entries kept.
    pub of_kept: Option<f64>,
    /// The same as a share of all its entries.
    pub of_all: Option<f64>,
    /// Their Σ|τ| as a share of the whole task vector's.
    pub of_mass: Option<f64>,
    /// Cosine of the whole task vector with the merged one.
    pub cosine: Option<f64>,
}

/// One row of the page's table of tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Name.
    pub name: String,
    /// Place of its layer in the list of layers.
    pub layer: u32,
    /// The numbers.
    pub line: Line,
}

/// What a table says of a tensor, a layer or a kind.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Line {
    /// Merged elements.
    pub elements: u64,
    /// Share kept at the chosen density, over all models.
    pub kept: Option<f64>,
    /// Share of elements whose survivors disagree.
    pub conflicts: Option<f64>,
    /// Mean cosine of pairs after the trim.
    pub cosine: Option<f64>,
    /// Share of the entries kept that point the way the merged task vector does, over all models.
    pub survives: Option<f64>,
    /// Mean over the models of their share of Σ τ².
    pub norm_share: Option<f64>,
    /// Share of exact zeros, over all models.
    pub zeros: Option<f64>,
}

impl Line {
    /// The line of these numbers; `chosen` is the density.
    pub fn of(measured: &Measured, chosen: usize) -> Self {
        let total = |list: &[u64]| list.iter().sum::<u64>();
        let at = &measured.densities[chosen];
        let agreeing = measured.survival.iter().map(|s| s.agreeing).sum();
        Self {
            elements: measured.elements,
            kept: share(total(&at.kept), total(&measured.present)),
            conflicts: at.conflict_fraction,
            cosine: mean(&measured.pairs.cosine_trimmed),
            survives: share(agreeing, total(&at.kept)),
            norm_share: mean(&measured.norm_share),
            zeros: share(total(&measured.zeros), total(&measured.present)),
        }
    }
}

/// `part` of `whole`, if that is something.
pub fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| round(part as f64 / whole as f64))
}

/// `part` of `whole`, if that is something.
pub fn ratio(part: f64, whole: f64) -> Option<f64> {
    (whole > 0.0).then(|| round(part / whole))
}

/// Mean of what is defined.
pub fn mean(values: &[Option<f64>]) -> Option<f64> {
    let count = values.iter().flatten().count();
    (count > 0).then(|| round(values.iter().flatten().sum::<f64>() / count as f64))
}

/// Nine significant digits: more would be noise, and take room.
pub fn round(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() { value } else { format!("{value:.8e}").parse().unwrap_or(value) }
}

impl Analysis {
    /// Numbers of models that were merged, and for each the conflict rates of the subsets of that size.
    pub fn conflicts_by_size(&self) -> Vec<(usize, Vec<f64>)> {
        let rates = self.settings.subsets.iter().zip(&self.overall.subset_conflicts);
        let mut sizes: Vec<(usize, Vec<f64>)> = Vec::new();
        for (subset, &conflicts) in rates {
            let rate = share(conflicts, self.overall.elements).unwrap_or(0.0);
            match sizes.last_mut().filter(|(size, _)| *size == subset.len()) {
                Some((_, rates)) => rates.push(rate),
                None => sizes.push((subset.len(), vec![rate])),
            }
        }
        sizes
    }

    /// The numbers at the chosen density.
    pub fn chosen(&self) -> &AtDensity {
        &self.overall.densities[self.settings.chosen]
    }

    /// The conflict rate to be expected if the survivors' signs were drawn at random: Σ over c of the share of elements with
    /// c survivors × (1 − 2^(1−c)).
    pub fn chance_of_conflict(&self) -> Option<f64> {
        let by_chance = |(survivors, &count): (usize, &u64)| count as f64 * (1.0 - 2f64.powi(1 - survivors as i32));
        let expected = self.overall.influential.iter().enumerate().skip(1).map(by_chance).sum::<f64>();
        ratio(expected, self.overall.elements as f64)
    }

    /// All pairs of models, in the order of their numbers.
    pub fn pairs(&self) -> Vec<(usize, usize)> {
        let models = self.models.len();
        (0..models).flat_map(|a| (a + 1..models).map(move |b| (a, b))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_nothing_are_undefined() {
        assert_eq!((share(0, 0), share(1, 4), ratio(1.0, 0.0), mean(&[None])), (None, Some(0.25), None, None));
        assert_eq!(mean(&[Some(1.0), None, Some(2.0)]), Some(1.5));
    }

    #[test]
    fn nine_digits_are_kept() {
        assert_eq!([round(1.0 / 3.0), round(-2e-300 / 3.0), round(0.0)], [0.333333333, -6.66666667e-301, 0.0]);
    }
}
