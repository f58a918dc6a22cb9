//! The mathematics, written for the eye: slow, obvious, one equation a line.
//!
//! Element arithmetic is f32, models in recipe order, product and sum rounded separately; thresholds come from sorting.
//! The program must give the same bits. Notation: θ0 base, θ_t model t, τ_t = θ_t − θ0, γ the elected sign.

use safetensors::Dtype;

use super::numbers;
use super::tensor::{Tensor, Tensors};

/// Declares an option with its command-line words.
macro_rules! option {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $word:literal),+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($variant),+ }

        impl $name {
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            pub fn word(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }
    };
}

option!(/// The merge method.
    Method { Ties = "ties", TaskArithmetic = "task_arithmetic", Linear = "linear" });
option!(/// Where one threshold applies.
    Scope { Model = "model", Tensor = "tensor" });
option!(/// Magnitudes equal to the threshold.
    TrimTies { Keep = "keep", Lowest = "lowest", Sample = "sample" });
option!(/// How signs are elected.
    Elect { Mass = "mass", Count = "count", None = "none" });
option!(/// How agreeing entries are combined.
    Combine { Mean = "mean", Sum = "sum", Max = "max", MeanAll = "mean-all" });
option!(/// The sign of an election that cancels exactly.
    ZeroSum { Zero = "zero", Positive = "positive", Majority = "majority" });

/// What is asked of a merge.
#[derive(Clone, Debug)]
pub struct Recipe {
    pub method: Method,
    pub density: f64,
    pub lambda: f32,
    pub scope: Scope,
    pub trim_ties: TrimTies,
    pub elect: Elect,
    pub combine: Combine,
    pub zero_sum: ZeroSum,
    /// Weight per model; missing ones are 1.
    pub weights: Vec<f32>,
    /// Density per model; missing ones are `density`.
    pub densities: Vec<f64>,
    /// Output type; base's if not given.
    pub dtype: Option<Dtype>,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            method: Method::Ties,
            density: 0.2,
            lambda: 1.0,
            scope: Scope::Model,
            trim_ties: TrimTies::Keep,
            elect: Elect::Mass,
            combine: Combine::Mean,
            zero_sum: ZeroSum::Zero,
            weights: Vec::new(),
            densities: Vec::new(),
            dtype: None,
        }
    }
}

impl Recipe {
    pub fn weight(&self, model: usize) -> f32 {
        self.weights.get(model).copied().unwrap_or(1.0)
    }

    pub fn density(&self, model: usize) -> f64 {
        self.densities.get(model).copied().unwrap_or(self.density)
    }

    /// The flags that say the same to the program, models aside.
    pub fn args(&self) -> Vec<String> {
        let mut args = vec![format!("--method={}", self.method.word())];
        if self.method != Method::Linear {
            args.push(format!("--lambda={}", self.lambda));
        }
        if self.method == Method::Ties {
            args.push(format!("--density={}", self.density));
            args.push(format!("--scope={}", self.scope.word()));
            args.push(format!("--trim-ties={}", self.trim_ties.word()));
            args.push(format!("--elect={}", self.elect.word()));
            args.push(format!("--combine={}", self.combine.word()));
            args.push(format!("--zero-sum={}", self.zero_sum.word()));
        }
        args.extend(self.dtype.map(|dtype| {
            let name = match dtype {
                Dtype::F32 => "float32",
                Dtype::F16 => "float16",
                Dtype::BF16 => "bfloat16",
                _ => panic!("{dtype:?} is not an output type"),
            };
            format!("--dtype={name}")
        }));
        args
    }

    /// What follows the path in `--model PATH...`.
    pub fn model_suffix(&self, model: usize) -> String {
        let weight = self.weights.get(model).map(|w| format!(",weight={w}"));
        let density = self.densities.get(model).map(|d| format!(",density={d}"));
        [weight, density].into_iter().flatten().collect()
    }

    /// Every combination of the options of ties.
    pub fn combinations() -> Vec<Self> {
        let mut all = Vec::new();
        for &scope in Scope::ALL {
            for &trim_ties in TrimTies::ALL {
                for &elect in Elect::ALL {
                    for &combine in Combine::ALL {
                        for &zero_sum in ZeroSum::ALL {
                            all.push(Self { scope, trim_ties, elect, combine, zero_sum, ..Self::default() });
                        }
                    }
                }
            }
        }
        all
    }
}

/// A merged checkpoint and what there is to know about it.
pub struct Merged {
    pub tensors: Tensors,
    /// Merged elements.
    pub elements: usize,
    /// Per model: survivors of the trim that are not zero.
    pub kept: Vec<usize>,
    /// Elements at which one model's survivor is positive and another's is negative.
    pub conflicts: usize,
}

/// Merges `models` into `base`. `signs`: the checkpoint whose task vector replaces the election.
pub fn merge(base: &Tensors, models: &[Tensors], signs: Option<&Tensors>, recipe: &Recipe) -> Merged {
    let merged = merged_names(base, models);
    let units: Vec<Vec<&String>> = match recipe.scope {
        Scope::Model => vec![merged.clone()],
        Scope::Tensor => merged.iter().map(|name| vec![*name]).collect(),
    };
    let mut result = Merged { tensors: base.clone(), elements: 0, kept: vec![0; models.len()], conflicts: 0 };
    for unit in units {
        let theta0 = flatten(base, &unit);
        let thetas: Vec<_> = models.iter().map(|model| flatten(model, &unit)).collect();
        let oracle = signs.map(|signs| flatten(signs, &unit));
        let values = match recipe.method {
            Method::Linear => linear(&thetas, recipe),
            Method::TaskArithmetic => task_arithmetic(&theta0, &thetas, recipe),
            Method::Ties => ties(&theta0, &thetas, oracle.as_deref(), recipe, &places(base, &unit), &mut result),
        };
        result.elements += values.len();
        scatter(&values, &unit, base, recipe.dtype, &mut result.tensors);
    }
    result
}

/// Tensors that base and all models have with equal shapes and float types.
fn merged_names<'a>(base: &'a Tensors, models: &[Tensors]) -> Vec<&'a String> {
    let fits = |theta0: &Tensor, theta: &Tensor| theta.shape == theta0.shape && numbers::is_float(theta.dtype);
    base.iter()
        .filter(|(_, theta0)| numbers::is_float(theta0.dtype))
        .filter(|(name, theta0)| models.iter().all(|m| m.get(*name).is_some_and(|theta| fits(theta0, theta))))
        .map(|(name, _)| name)
        .collect()
}

fn flatten(tensors: &Tensors, unit: &[&String]) -> Vec<f32> {
    unit.iter().flat_map(|name| tensors[*name].f32s()).collect()
}

/// Name of the tensor and index in it, of every element of a unit.
fn places<'a>(base: &Tensors, unit: &[&'a String]) -> Vec<(&'a str, u64)> {
    unit.iter().flat_map(|name| (0..base[*name].elements() as u64).map(|i| (name.as_str(), i))).collect()
}

/// What an element draws for `--trim-ties sample` with seed 0: an output of splitmix64, counted by the element, of a stream
/// that is named by model and tensor.
fn draw(model: usize, (tensor, element): (&str, u64)) -> u64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let name = [&0u64.to_le_bytes()[..], &(model as u64).to_le_bytes(), tensor.as_bytes()].concat();
    let stream = u64::from_le_bytes(blake3::hash(&name).as_bytes()[..8].try_into().unwrap());
    mix(mix(stream).wrapping_add((element + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

fn scatter(values: &[f32], unit: &[&String], base: &Tensors, dtype: Option<Dtype>, out: &mut Tensors) {
    let mut rest = values;
    for name in unit {
        let theta0 = &base[*name];
        let (own, others) = rest.split_at(theta0.elements());
        rest = others;
        let stored = Tensor::floats(dtype.unwrap_or(theta0.dtype), &theta0.shape, own);
        out.insert((*name).clone(), stored);
    }
}

fn linear(thetas: &[Vec<f32>], recipe: &Recipe) -> Vec<f32> {
    (0..thetas[0].len())
        .map(|p| {
            let (mut sum, mut weights) = (0.0f32, 0.0f32);
            for (t, theta) in thetas.iter().enumerate() {
                sum += recipe.weight(t) * theta[p];
                weights += recipe.weight(t);
            }
            sum / weights
        })
        .collect()
}

fn task_arithmetic(theta0: &[f32], thetas: &[Vec<f32>], recipe: &Recipe) -> Vec<f32> {
    (0..theta0.len())
        .map(|p| {
            let mut sum = 0.0f32;
            for (t, theta) in thetas.iter().enumerate() {
                sum += recipe.weight(t) * (theta[p] - theta0[p]);
            }
            theta0[p] + recipe.lambda * sum
        })
        .collect()
}

fn ties(
    theta0: &[f32],
    thetas: &[Vec<f32>],
    oracle: Option<&[f32]>,
    recipe: &Recipe,
    places: &[(&str, u64)],
    result: &mut Merged,
) -> Vec<f32> {
    let weights: Vec<f32> = (0..thetas.len()).map(|t| recipe.weight(t)).collect();
    let mut trimmed = Vec::new();
    for (t, theta) in thetas.iter().enumerate() {
        let tau: Vec<f32> = theta.iter().zip(theta0).map(|(theta, theta0)| theta - theta0).collect();
        let survivors = trim(&tau, recipe.density(t), recipe.scope, recipe.trim_ties, |p| draw(t, places[p]));
        result.kept[t] += survivors.iter().filter(|tau| **tau != 0.0).count();
        trimmed.push(survivors);
    }
    let columns: Vec<Vec<f32>> = (0..theta0.len()).map(|p| trimmed.iter().map(|tau| tau[p]).collect()).collect();
    let disagree = |c: &&Vec<f32>| c.iter().any(|tau| *tau > 0.0) && c.iter().any(|tau| *tau < 0.0);
    result.conflicts += columns.iter().filter(disagree).count();

    let gamma: Option<Vec<i32>> = match (oracle, recipe.elect) {
        (Some(theta), _) => Some((0..theta0.len()).map(|p| sign(theta[p] - theta0[p])).collect()),
        (None, Elect::None) => None,
        (None, elect) => Some(elect_signs(&columns, &weights, elect, recipe.zero_sum)),
    };
    (0..theta0.len())
        .map(|p| {
            let merged = combine(&columns[p], &weights, gamma.as_ref().map(|gamma| gamma[p]), recipe.combine);
            theta0[p] + recipe.lambda * merged
        })
        .collect()
}

/// τ where it survives, else 0. `draw` is asked for the position of a tie.
pub fn trim(tau: &[f32], density: f64, scope: Scope, rule: TrimTies, draw: impl Fn(usize) -> u64) -> Vec<f32> {
    let mut keep = (density * tau.len() as f64).floor() as usize;
    if keep == 0 && density > 0.0 && scope == Scope::Tensor {
        keep = 1.min(tau.len());
    }
    if keep == 0 {
        return vec![0.0; tau.len()];
    }
    // Stable: among equal magnitudes the lower position comes first.
    let mut order: Vec<usize> = (0..tau.len()).collect();
    order.sort_by(|&a, &b| tau[b].abs().total_cmp(&tau[a].abs()));
    let threshold = tau[order[keep - 1]].abs();
    let above = tau.iter().filter(|tau| tau.abs() > threshold).count();
    let tied = tau.iter().filter(|tau| tau.abs() == threshold).count();
    // Of 2^64 equally likely draws, so many are below.
    let accepted = ((keep - above) as u128 * (1 << 64)) / tied as u128;
    let mut survivors = vec![0.0; tau.len()];
    for (rank, &p) in order.iter().enumerate() {
        let survives = match rule {
            TrimTies::Keep => tau[p].abs() >= threshold,
            TrimTies::Lowest => rank < keep,
            TrimTies::Sample => tau[p].abs() > threshold || tau[p].abs() == threshold && u128::from(draw(p)) < accepted,
        };
        if survives {
            survivors[p] = tau[p];
        }
    }
    survivors
}

fn elect_signs(columns: &[Vec<f32>], weights: &[f32], elect: Elect, zero_sum: ZeroSum) -> Vec<i32> {
    let elected: Vec<i32> = columns
        .iter()
        .map(|column| match elect {
            Elect::Mass => {
                let mut mass = 0.0f32;
                for (tau, weight) in column.iter().zip(weights) {
                    mass += weight * tau;
                }
                sign(mass)
            }
            Elect::Count => column.iter().map(|tau| sign(*tau)).sum::<i32>().signum(),
            Elect::None => unreachable!("no election"),
        })
        .collect();
    let cancelled = match zero_sum {
        ZeroSum::Zero => 0,
        ZeroSum::Positive => 1,
        ZeroSum::Majority => elected.iter().sum::<i32>().signum(),
    };
    elected.into_iter().map(|gamma| if gamma == 0 { cancelled } else { gamma }).collect()
}

/// The disjoint merge of one position over A = {t : τ_t ≠ 0 and sgn τ_t = γ}; without γ, over all survivors.
fn combine(column: &[f32], weights: &[f32], gamma: Option<i32>, rule: Combine) -> f32 {
    let agrees = |tau: f32| tau != 0.0 && gamma.is_none_or(|gamma| sign(tau) == gamma);
    let (mut sum, mut divisor, mut largest) = (0.0f32, 0.0f32, 0.0f32);
    for (&tau, &weight) in column.iter().zip(weights) {
        if agrees(tau) {
            let weighted = weight * tau;
            sum += weighted;
            divisor += weight;
            if weighted.abs() > largest.abs() {
                largest = weighted;
            }
        }
    }
    match rule {
        Combine::Mean if divisor == 0.0 => 0.0,
        Combine::Mean => sum / divisor,
        Combine::Sum => sum,
        Combine::Max => largest,
        Combine::MeanAll => sum / weights.iter().sum::<f32>(),
    }
}

fn sign(value: f32) -> i32 {
    i32::from(value > 0.0) - i32::from(value < 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::tensor::tensors;

    fn merged(base: &[f32], models: &[&[f32]], recipe: &Recipe) -> Vec<f32> {
        let base = tensors([("w", Tensor::vector(base))]);
        let models: Vec<_> = models.iter().map(|m| tensors([("w", Tensor::vector(m))])).collect();
        merge(&base, &models, None, recipe).tensors["w"].f32s()
    }

    #[test]
    fn the_papers_figure_by_hand() {
        let base = [0.0; 4];
        let models: [&[f32]; 3] = [&[5.0, 1.0, -2.0, 0.5], &[3.0, -4.0, 2.0, 0.25], &[-1.0, -2.0, 6.0, -0.5]];
        let recipe = Recipe { density: 0.5, ..Recipe::default() };
        // Trimmed: [5, 0, -2, 0], [3, -4, 0, 0], [0, -2, 6, 0]; signs + - + 0.
        assert_eq!(merged(&base, &models, &recipe), [4.0, -3.0, 6.0, 0.0]);
        let recipe = Recipe { combine: Combine::Sum, lambda: 0.5, ..recipe };
        assert_eq!(merged(&base, &models, &recipe), [4.0, -3.0, 3.0, 0.0]);
        let recipe = Recipe { combine: Combine::Max, lambda: 1.0, ..recipe };
        assert_eq!(merged(&base, &models, &recipe), [5.0, -4.0, 6.0, 0.0]);
        let recipe = Recipe { elect: Elect::None, combine: Combine::Mean, ..recipe };
        assert_eq!(merged(&base, &models, &recipe), [4.0, -3.0, 2.0, 0.0]);
    }

    #[test]
    fn ties_at_the_threshold() {
        let tau = [2.0, -1.0, 1.0, 1.0, 0.0];
        let keep = |density, scope, rule| trim(&tau, density, scope, rule, |p| [0, u64::MAX, u64::MAX / 4, 0, 0][p]);
        assert_eq!(keep(0.5, Scope::Model, TrimTies::Keep), [2.0, -1.0, 1.0, 1.0, 0.0]);
        assert_eq!(keep(0.5, Scope::Model, TrimTies::Lowest), [2.0, -1.0, 0.0, 0.0, 0.0]);
        // One of three ties is wanted, so that draws below a third are accepted.
        assert_eq!(keep(0.5, Scope::Model, TrimTies::Sample), [2.0, 0.0, 1.0, 1.0, 0.0]);
        assert_eq!(keep(0.1, Scope::Model, TrimTies::Keep), [0.0; 5]);
        assert_eq!(keep(0.1, Scope::Tensor, TrimTies::Keep), [2.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(keep(0.0, Scope::Tensor, TrimTies::Keep), [0.0; 5]);
        assert_eq!(keep(1.0, Scope::Model, TrimTies::Lowest), tau);
    }

    #[test]
    fn cancelled_elections() {
        let models: [&[f32]; 2] = [&[2.0, -1.0, -3.0, 0.5], &[-2.0, -2.0, -1.0, 0.25]];
        let cases = [
            (ZeroSum::Zero, [0.0, -1.5, -2.0, 0.375]),
            (ZeroSum::Positive, [2.0, -1.5, -2.0, 0.375]),
            (ZeroSum::Majority, [-2.0, -1.5, -2.0, 0.375]),
        ];
        for (zero_sum, expected) in cases {
            let recipe = Recipe { density: 1.0, zero_sum, ..Recipe::default() };
            assert_eq!(merged(&[0.0; 4], &models, &recipe), expected, "{zero_sum:?}");
        }
    }
}
