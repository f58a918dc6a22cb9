//! The outputs of the paper's own code and of mergekit (`tests/golden/README.md` says how they were made).
//!
//! The oracle is held to the same files: where it and the program agree bit for bit, this says that both are right.

use serde_json::Value;

use crate::support::family::{Family, text};
use crate::support::files::{read_checkpoint, read_file, read_json};
use crate::support::oracle::{self, Combine, Method, Recipe, Scope, TrimTies, ZeroSum};
use crate::support::repository;
use crate::support::run::tiesmith;
use crate::support::tensor::{Tensor, Tensors, differences};

use safetensors::Dtype;

const PARAMETERS: usize = 26_784;

fn golden(path: &str) -> String {
    text(&repository("tests/golden").join(path))
}

/// Merges a golden family with the program.
fn merge_family(family: &str, recipe: &Recipe) -> Tensors {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let mut args = vec!["merge".to_owned(), "--base".into(), golden(&format!("{family}/base"))];
    for t in 0..3 {
        args.extend(["--model".into(), golden(&format!("{family}/ft{t}")) + &recipe.model_suffix(t)]);
    }
    args.extend(recipe.args());
    args.extend(["--out".into(), text(&out)]);
    tiesmith(args).succeeded();
    read_checkpoint(&out)
}

/// Merges a golden family with the oracle.
fn merge_family_by_hand(family: &str, recipe: &Recipe) -> Tensors {
    let read = |name: &str| read_checkpoint(repository("tests/golden").join(family).join(name).as_path());
    let models: Vec<_> = (0..3).map(|t| read(&format!("ft{t}"))).collect();
    oracle::merge(&read("base"), &models, None, recipe).tensors
}

/// The density at which ⌊K·d⌋ is what the paper's code keeps for `fraction`: one more than asked, for it cuts at the
/// (⌊fraction·d⌋ + 1)-th largest magnitude and keeps that one too.
fn papers_density(fraction: f64, parameters: usize) -> f64 {
    let kept = (fraction * parameters as f64).floor() + 1.0;
    (kept + 0.5) / parameters as f64
}

/// The paper's code by its own name, and the recipe that says the same to tiesmith.
fn papers_recipes() -> Vec<(&'static str, Recipe)> {
    let papers = Recipe {
        density: papers_density(0.2, PARAMETERS),
        zero_sum: ZeroSum::Majority,
        dtype: Some(Dtype::BF16),
        ..Recipe::default()
    };
    vec![
        ("topk20_mass_dis-mean", papers.clone()),
        ("topk20_mass_dis-sum", Recipe { combine: Combine::Sum, ..papers.clone() }),
        ("topk20_mass_dis-max", Recipe { combine: Combine::Max, ..papers.clone() }),
        ("topk50_mass_dis-mean", Recipe { density: papers_density(0.5, PARAMETERS), ..papers.clone() }),
        ("task-vector", Recipe { method: Method::TaskArithmetic, ..papers.clone() }),
        ("basic_mean", Recipe { method: Method::Linear, ..papers }),
    ]
}

#[test]
fn the_papers_code_exactly() {
    for family in ["bf16", "f32"] {
        for (name, recipe) in papers_recipes() {
            let expected = read_file(&repository(&format!("tests/golden/papers-code-{family}/{name}.safetensors")));
            for (who, merge) in
                [("oracle", merge_family_by_hand as fn(&str, &Recipe) -> Tensors), ("tiesmith", merge_family)]
            {
                let found = differences(&expected, &merge(&format!("family-{family}"), &recipe));
                assert_eq!(found, "", "{who}: {name} of the {family} family");
            }
        }
    }
}

/// Elements whose stored bytes differ.
fn count_differing(a: &Tensors, b: &Tensors) -> usize {
    let differing = |(name, a): (&String, &Tensor)| {
        let (a, b) = (a.values(), b[name].values());
        a.iter().zip(&b).filter(|(a, b)| a.to_bits() != b.to_bits()).count()
    };
    a.iter().map(differing).sum()
}

#[test]
fn the_papers_code_differs_from_the_papers_formula_by_this_much() {
    // Of 26,784 elements. In f32 the one survivor more per model shows; in bf16 that one ties with others that are kept
    // anyway, but elections cancel exactly, and then the code follows the majority where the formula keeps base.
    let cases = [
        ("bf16", "topk20_mass_dis-mean", 0.2, ZeroSum::Zero, 375),
        ("bf16", "topk20_mass_dis-mean", 0.2, ZeroSum::Majority, 0),
        ("bf16", "topk50_mass_dis-mean", 0.5, ZeroSum::Zero, 1078),
        ("bf16", "topk50_mass_dis-mean", 0.5, ZeroSum::Majority, 0),
        ("f32", "topk20_mass_dis-mean", 0.2, ZeroSum::Zero, 2),
        ("f32", "topk50_mass_dis-mean", 0.5, ZeroSum::Zero, 1),
    ];
    for (family, name, density, zero_sum, differing) in cases {
        let recipe = Recipe { density, zero_sum, dtype: Some(Dtype::BF16), ..Recipe::default() };
        let papers = format!("tests/golden/papers-code-{family}/{name}.safetensors");
        let merged = merge_family(&format!("family-{family}"), &recipe);
        let found = count_differing(&read_file(&repository(&papers)), &merged);
        assert_eq!(found, differing, "{name} of the {family} family, {zero_sum:?}");
    }
}

/// mergekit's meaning of ties.
fn mergekit_ties(densities: [f64; 3], weights: [f32; 3]) -> Recipe {
    Recipe {
        scope: Scope::Tensor,
        trim_ties: TrimTies::Lowest,
        zero_sum: ZeroSum::Positive,
        densities: densities.to_vec(),
        weights: weights.to_vec(),
        ..Recipe::default()
    }
}

/// mergekit's outputs by the name of their recipe, and the flags that say the same to tiesmith.
fn mergekit_recipes() -> Vec<(&'static str, Recipe)> {
    let weights = [0.5, 1.0, 0.25];
    let weighted = |method| Recipe { method, weights: weights.to_vec(), ..Recipe::default() };
    vec![
        ("ties", mergekit_ties([0.2; 3], [1.0; 3])),
        ("ties_raw", Recipe { combine: Combine::Sum, ..mergekit_ties([0.5; 3], weights) }),
        ("ties_weighted", Recipe { lambda: 1.2, ..mergekit_ties([0.3, 0.6, 0.9], weights) }),
        ("linear", weighted(Method::Linear)),
        ("task_arithmetic", Recipe { lambda: 0.7, ..weighted(Method::TaskArithmetic) }),
    ]
}

/// The largest |actual − expected| / max(|expected|, `floor`), and where it is.
fn worst_deviation(expected: &Tensors, actual: &Tensors, floor: f64) -> (f64, String) {
    assert_eq!(expected.keys().collect::<Vec<_>>(), actual.keys().collect::<Vec<_>>());
    let mut worst = (0.0, String::new());
    for (name, want) in expected {
        let got = &actual[name];
        assert_eq!((want.dtype, &want.shape), (got.dtype, &got.shape), "{name}");
        for (i, (want, got)) in want.values().into_iter().zip(got.values()).enumerate() {
            let deviation = (got - want).abs() / want.abs().max(floor);
            if deviation > worst.0 {
                worst = (deviation, format!("{name}[{i}]: expected {want:e}, found {got:e}"));
            }
        }
    }
    worst
}

#[test]
fn mergekit_within_a_millionth() {
    for (name, recipe) in mergekit_recipes() {
        let expected = read_file(&repository(&format!("tests/golden/mergekit-f32/{name}.safetensors")));
        for (who, merge) in
            [("oracle", merge_family_by_hand as fn(&str, &Recipe) -> Tensors), ("tiesmith", merge_family)]
        {
            let (deviation, place) = worst_deviation(&expected, &merge("family-f32", &recipe), 1e-6);
            assert!(deviation <= 1e-6, "{who}: {name}: {deviation:e} at {place}");
        }
    }
}

/// What mergekit may make of `name[i]` in `family`: which of several magnitudes equal to a threshold it keeps is
/// arbitrary, so that every choice is tried for the models that have one there.
fn possible(family: &[Tensors], name: &str, recipe: &Recipe) -> Vec<Vec<f64>> {
    let theta0 = family[0][name].f32s();
    let taus: Vec<Vec<f32>> = family[1..]
        .iter()
        .map(|model| model[name].f32s().iter().zip(&theta0).map(|(theta, theta0)| theta - theta0).collect())
        .collect();
    let threshold = |(t, tau): (usize, &Vec<f32>)| {
        let mut magnitudes: Vec<f32> = tau.iter().map(|tau| tau.abs()).collect();
        magnitudes.sort_by(|a, b| b.total_cmp(a));
        magnitudes[(recipe.density(t) * tau.len() as f64) as usize - 1]
    };
    let thresholds: Vec<f32> = taus.iter().enumerate().map(threshold).collect();
    let one = |p: usize| {
        let tied: Vec<usize> = (0..taus.len()).filter(|&t| taus[t][p].abs() == thresholds[t]).collect();
        let choice = |kept: u32| {
            let survives = |t: usize| match tied.iter().position(|&other| other == t) {
                Some(place) => kept >> place & 1 == 1,
                None => taus[t][p].abs() > thresholds[t],
            };
            let column: Vec<f64> =
                (0..taus.len()).map(|t| if survives(t) { f64::from(taus[t][p]) } else { 0.0 }).collect();
            let weight = |t: usize| f64::from(recipe.weight(t));
            let mass: f64 = column.iter().enumerate().map(|(t, tau)| weight(t) * tau).sum();
            let agrees = |t: &usize| column[*t] != 0.0 && (column[*t] > 0.0) == (mass >= 0.0);
            let agreeing: Vec<usize> = (0..taus.len()).filter(agrees).collect();
            let sum: f64 = agreeing.iter().map(|&t| weight(t) * column[t]).sum();
            let divisor: f64 = match recipe.combine {
                Combine::Mean => agreeing.iter().map(|&t| weight(t)).sum(),
                Combine::MeanAll => (0..taus.len()).map(weight).sum(),
                _ => 1.0,
            };
            let merged = if agreeing.is_empty() { 0.0 } else { sum / divisor };
            f64::from(theta0[p]) + f64::from(recipe.lambda) * merged
        };
        (0..1 << tied.len()).map(choice).collect()
    };
    (0..theta0.len()).map(one).collect()
}

/// In bf16 a large part of all entries is equal to a threshold. What mergekit and tiesmith make of each is one of the
/// results that keeping or dropping them allows; everywhere else both are the only one.
#[test]
fn mergekit_on_bf16_but_for_the_choice_among_ties() {
    let family: Vec<Tensors> = ["base", "ft0", "ft1", "ft2"]
        .iter()
        .map(|name| read_checkpoint(&repository("tests/golden/family-bf16").join(name)))
        .collect();
    let (mut elements, mut chosen) = (0, 0);
    for (name, recipe) in mergekit_recipes() {
        let recipe = Recipe { dtype: Some(Dtype::F32), ..recipe };
        let expected = read_file(&repository(&format!("tests/golden/mergekit-bf16/{name}.safetensors")));
        let actual = merge_family("family-bf16", &recipe);
        if recipe.method != Method::Ties {
            let (deviation, place) = worst_deviation(&expected, &actual, 1e-6);
            assert!(deviation <= 1e-6, "{name}: {deviation:e} at {place}");
            continue;
        }
        for (tensor, theta) in &expected {
            let possible = possible(&family, tensor, &recipe);
            for (who, values) in [("mergekit", theta.values()), ("tiesmith", actual[tensor].values())] {
                for (i, (value, possible)) in values.iter().zip(&possible).enumerate() {
                    let near = |wanted: &f64| (value - wanted).abs() <= 1e-6 * wanted.abs().max(1e-3);
                    assert!(
                        possible.iter().any(near),
                        "{who}: {name}: {tensor}[{i}] is {value:e}, not of {possible:?}"
                    );
                }
            }
            elements += possible.len();
            chosen += possible.iter().filter(|possible| possible.len() > 1).count();
        }
    }
    assert!(chosen * 10 > elements && chosen * 2 < elements, "{chosen} of {elements} have a choice");
}

/// `case[field]` of vectors.json as a checkpoint of f32 vectors.
fn checkpoint(values: &Value) -> Tensors {
    let numbers =
        |list: &Value| -> Vec<f32> { list.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect() };
    let named = values.as_object().expect("named tensors");
    named.iter().map(|(name, list)| (name.clone(), Tensor::vector(&numbers(list)))).collect()
}

/// The recipe behind a result of vectors.json, or why there is none.
fn vector_recipe(case: &str, result: &str, parameters: usize) -> Result<Recipe, &'static str> {
    let official = |fraction: f64| Recipe {
        density: papers_density(fraction, parameters),
        zero_sum: ZeroSum::Majority,
        ..Recipe::default()
    };
    let untrimmed =
        |weights: &[f32]| Recipe { density: 1.0, weights: weights.to_vec(), ..mergekit_ties([1.0; 3], [1.0; 3]) };
    Ok(match (case, result) {
        (_, "official_K50_mean") => official(0.5),
        (_, "official_K50_sum") => Recipe { combine: Combine::Sum, ..official(0.5) },
        (_, "official_K50_max") => Recipe { combine: Combine::Max, ..official(0.5) },
        (_, "official_notrim_mean") => Recipe { density: 1.0, ..official(0.5) },
        (_, "official_K25_mean") => official(0.25),
        (_, "official_K25_sum_lam15") => Recipe { combine: Combine::Sum, lambda: 1.5, ..official(0.25) },
        ("sdmecha_4x4", "mergekit_ties_d05_w1") => {
            return Err("mergekit chose other ones of the tied magnitudes than the lowest");
        }
        (_, "mergekit_ties_d05_w1") => mergekit_ties([0.5; 3], [1.0; 3]),
        (_, "mergekit_ties_d1_w1_3") => untrimmed(&[1.0, 3.0]),
        (_, "mergekit_ties_d1_w1_1_nonorm") => Recipe { combine: Combine::Sum, ..untrimmed(&[]) },
        (_, "mergekit_ties_d1_w1" | "mergekit_ties_d1_w1_1") => untrimmed(&[]),
        (_, "mergekit_ties_d1_w1_4") => untrimmed(&[1.0, 4.0]),
        (_, "mergekit_ties_d1_w1_1_lambda05") => Recipe { lambda: 0.5, ..untrimmed(&[]) },
        (_, "mergekit_task_arithmetic_w1_4") => {
            Recipe { method: Method::TaskArithmetic, weights: vec![1.0, 4.0], ..Recipe::default() }
        }
        // Σ w τ / Σ w is λ = 1 / Σ w.
        (_, "mergekit_task_arithmetic_w1_4_normalize") => {
            Recipe { method: Method::TaskArithmetic, weights: vec![1.0, 4.0], lambda: 0.2, ..Recipe::default() }
        }
        (_, "mergekit_ties") => mergekit_ties([0.25, 0.5, 0.75], [1.0; 3]),
        (_, "mergekit_ties_w") => return Err("its weights are not recorded"),
        (_, "sd_mecha_k05_default") => {
            return Err("another algorithm: its threshold is one rank lower");
        }
        other => panic!("vectors.json has a result without a recipe here: {other:?}"),
    })
}

#[test]
fn hand_checkable_vectors() {
    let cases = read_json(&repository("tests/golden/vectors.json"));
    let mut skipped = Vec::new();
    let mut checked = 0;
    for case in cases.as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let family = Family {
            base: checkpoint(&case["base"]),
            models: case["models"].as_array().unwrap().iter().map(checkpoint).collect(),
            signs: checkpoint(&case["base"]),
        };
        let parameters = family.base.values().map(Tensor::elements).sum();
        let saved = family.save();
        let results = case.as_object().unwrap().keys();
        for result in results.filter(|key| !["name", "why", "base", "models"].contains(&key.as_str())) {
            let recipe = match vector_recipe(name, result, parameters) {
                Ok(recipe) => recipe,
                Err(why) => {
                    skipped.push(format!("{name}/{result}: {why}"));
                    continue;
                }
            };
            let expected = checkpoint(&case[result]);
            for (who, merged) in
                [("oracle", family.expected(&recipe).tensors), ("tiesmith", saved.merge(&recipe, &[]).tensors())]
            {
                let (deviation, place) = worst_deviation(&expected, &merged, 1e-6);
                assert!(deviation <= 1e-6, "{who}: {name}/{result}: {place}");
            }
            checked += 1;
        }
    }
    assert_eq!((checked, skipped.len()), (17, 3), "{skipped:?}");
}

#[test]
fn the_papers_code_keeps_one_entry_more_than_asked() {
    // Eight distinct magnitudes, density one half: ⌊K·d⌋ = 4 survive here, 5 in the paper's code.
    let family = Family::vectors(&[0.0; 8], &[&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]]);
    let saved = family.save();
    let survivors = |density: f64| {
        let merged = saved.merge(&Recipe { density, ..Recipe::default() }, &[]).tensors();
        merged["w"].f32s().iter().filter(|x| **x != 0.0).count()
    };
    assert_eq!(survivors(0.5), 4);
    assert_eq!(survivors(papers_density(0.5, 8)), 5);
}
