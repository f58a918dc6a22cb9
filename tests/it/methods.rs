//! Every option of every method against the oracle, bit for bit.

use proptest::prelude::*;
use safetensors::Dtype;
use serde_json::Value;

use crate::support::family::{Deltas, Family, Saved, Spec};
use crate::support::files;
use crate::support::oracle::{Combine, Elect, Method, Recipe, Scope, TrimTies, ZeroSum};
use crate::support::random::Random;
use crate::support::run::tiesmith;
use crate::support::tensor::{Tensor, Tensors, differences};

/// Merges `family` by every recipe and compares bits; all failures are reported together.
#[track_caller]
fn agree(family: &Family, recipes: impl IntoIterator<Item = Recipe>) {
    let saved = family.save();
    let (mut runs, mut failures) = (0, Vec::new());
    for recipe in recipes {
        let output = saved.merge(&recipe, &[]);
        let found = differences(&family.expected(&recipe).tensors, &output.tensors());
        runs += 1;
        if !found.is_empty() {
            failures.push(format!("{}\n{found}", output.outcome.command));
        }
    }
    let shown = failures.iter().take(3).cloned().collect::<Vec<_>>().join("\n");
    assert!(failures.is_empty(), "{} of {runs} recipes differ:\n{shown}", failures.len());
}

/// Every combination of options, with densities, lambdas, weights and densities per model taken in turn.
fn varied_combinations() -> Vec<Recipe> {
    let densities = [0.2, 0.5, 0.05, 1.0, 0.8];
    let lambdas = [1.0, 0.4, 1.5, -0.5];
    let weights: [&[f32]; 3] = [&[], &[0.5, 1.0, 0.25], &[2.0, 1.5, 0.3]];
    let own_densities: [&[f64]; 4] = [&[], &[], &[], &[0.9, 0.1, 0.4]];
    let mut recipes = Recipe::combinations();
    for (i, recipe) in recipes.iter_mut().enumerate() {
        recipe.density = densities[i % densities.len()];
        recipe.lambda = lambdas[i % lambdas.len()];
        // Strides without common factors with the innermost options, so that all of them meet all of these.
        recipe.weights = weights[(i / 2) % weights.len()].to_vec();
        recipe.densities = own_densities[(i / 5) % own_densities.len()].to_vec();
    }
    recipes
}

#[test]
fn every_combination_on_a_heavy_tailed_family() {
    agree(&Spec::default().family(), varied_combinations());
}

#[test]
fn every_combination_on_bf16_with_massive_ties() {
    let spec =
        Spec { seed: 2, base: Dtype::BF16, models: vec![Dtype::BF16; 3], deltas: Deltas::Stepped, ..Spec::default() };
    agree(&spec.family(), varied_combinations());
}

#[test]
fn every_combination_on_adversarial_tensors() {
    agree(&Family::adversarial(), varied_combinations());
}

#[test]
fn every_combination_on_opposite_models() {
    // The second model undoes the first: every election of the two cancels, and only the third breaks some ties.
    let mut family = Spec { seed: 3, deltas: Deltas::Stepped, ..Spec::default() }.family();
    let mirrored = family
        .base
        .iter()
        .map(|(name, theta0)| {
            let theta = family.models[0][name].f32s();
            let values: Vec<f32> = theta0.f32s().iter().zip(theta).map(|(x0, x)| x0 - (x - x0)).collect();
            (name.clone(), Tensor::floats(Dtype::F32, &theta0.shape, &values))
        })
        .collect();
    family.models[1] = mirrored;
    agree(&family, varied_combinations());
}

#[test]
fn densities_from_nothing_to_everything() {
    let densities = [0.0, 1e-300, 1e-9, 0.001, 0.1, 0.29, 0.3, 1.0 / 3.0, 0.5, 0.7, 0.999_999, 1.0];
    for family in [Spec::default().family(), Family::adversarial()] {
        let recipes = densities.iter().flat_map(|&density| {
            [Scope::Model, Scope::Tensor].into_iter().flat_map(move |scope| {
                TrimTies::ALL.iter().map(move |&trim_ties| Recipe { density, scope, trim_ties, ..Recipe::default() })
            })
        });
        agree(&family, recipes);
    }
}

#[test]
fn density_may_be_a_percentage() {
    let family = Spec::default().family();
    let saved = family.save();
    let recipe = Recipe { density: 0.25, ..Recipe::default() };
    let mut args = vec!["merge".to_owned()];
    args.extend(saved.inputs(&recipe));
    let out = saved.path("percent");
    args.extend(["--density", "25%", "--out", out.to_str().unwrap()].map(String::from));
    crate::support::run::tiesmith(args).succeeded();
    let merged = crate::support::files::read_checkpoint(&out);
    assert_eq!(differences(&family.expected(&recipe).tensors, &merged), "");
}

#[test]
fn the_defaults_are_the_papers_recipe() {
    let family = Spec::default().family();
    let saved = family.save();
    let mut args = vec!["merge".to_owned()];
    args.extend(saved.inputs(&Recipe::default()));
    let out = saved.path("defaults");
    args.extend(["--out".to_owned(), out.to_str().unwrap().to_owned()]);
    crate::support::run::tiesmith(args).succeeded();
    let merged = crate::support::files::read_checkpoint(&out);
    assert_eq!(differences(&family.expected(&Recipe::default()).tensors, &merged), "");
}

#[test]
fn numbers_of_models_from_one_to_nine() {
    for models in [1, 2, 5, 9] {
        let family = Spec { models: vec![Dtype::F32; models], ..Spec::default() }.family();
        let combined = Combine::ALL.iter().map(|&combine| Recipe { combine, ..Recipe::default() });
        agree(&family, combined);
    }
}

#[test]
fn identical_models_merge_to_the_trimmed_model() {
    let mut family = Spec::default().family();
    family.models = vec![family.models[0].clone(); 3];
    let recipe = Recipe { density: 1.0, ..Recipe::default() };
    agree(&family, [recipe.clone(), Recipe::default()]);
    // Untrimmed, the mean of three equal task vectors is that task vector, up to rounding.
    let merged = family.save().merge(&recipe, &[]).tensors();
    for (name, tensor) in &merged {
        for (got, want) in tensor.values().iter().zip(family.models[0][name].values()) {
            assert!((got - want).abs() <= 1e-6 * want.abs().max(1.0), "{name}: {got} and {want}");
        }
    }
}

#[test]
fn equal_models_and_base_change_nothing() {
    let mut family = Spec::default().family();
    family.models = vec![family.base.clone(); 2];
    for method in Method::ALL {
        let recipe = Recipe { method: *method, ..Recipe::default() };
        family.save().merge(&recipe, &[]).must_equal(&family.base);
    }
}

#[test]
fn a_model_of_weight_zero_takes_no_part_and_divides_nothing_by_zero() {
    let weights = vec![0.0, 1.0, 0.5];
    let family = Spec { deltas: Deltas::Stepped, ..Spec::default() }.family();
    let recipes = ZeroSum::ALL.iter().flat_map(|&zero_sum| {
        Combine::ALL.iter().map({
            let weights = weights.clone();
            move |&combine| Recipe { weights: weights.clone(), combine, zero_sum, ..Recipe::default() }
        })
    });
    agree(&family, recipes);
}

#[test]
fn oracle_signs_replace_the_election() {
    for family in [Spec::default().family(), Family::adversarial()] {
        let saved = family.save();
        for scope in Scope::ALL {
            for combine in Combine::ALL {
                for zero_sum in ZeroSum::ALL {
                    let recipe = Recipe {
                        scope: *scope,
                        combine: *combine,
                        zero_sum: *zero_sum,
                        density: 0.6,
                        weights: vec![1.0, 0.5, 2.0],
                        ..Recipe::default()
                    };
                    let expected = family.expected_with_signs(&recipe).tensors;
                    saved.merge(&recipe, &[&saved.signs_flag()]).must_equal(&expected);
                }
            }
        }
    }
}

#[test]
fn task_arithmetic_and_linear() {
    let weights: [&[f32]; 3] = [&[], &[0.5, 1.0, 0.25], &[3.0, -1.0, 0.1]];
    for family in [Spec::default().family(), Family::adversarial()] {
        let recipes = [Method::TaskArithmetic, Method::Linear].into_iter().flat_map(|method| {
            weights.iter().flat_map(move |weights| {
                [1.0, 0.4, -2.0].map(|lambda| Recipe { method, lambda, weights: weights.to_vec(), ..Recipe::default() })
            })
        });
        agree(&family, recipes);
    }
}

#[test]
fn methods_without_a_trim_ignore_density() {
    let family = Spec::default().family();
    let saved = family.save();
    for method in [Method::TaskArithmetic, Method::Linear] {
        let recipe = Recipe { method, ..Recipe::default() };
        saved.merge(&recipe, &["--density", "0.01"]).must_equal(&family.expected(&recipe).tensors);
    }
}

#[test]
fn linear_counts_base_only_if_it_is_listed_as_a_model() {
    let mut family = Spec::default().family();
    family.models.push(family.base.clone());
    agree(&family, [Recipe { method: Method::Linear, ..Recipe::default() }]);
}

#[test]
fn the_order_of_models_is_the_order_of_the_sum() {
    let family = Family::vectors(&[0.0], &[&[1e8], &[1.0], &[-1e8], &[1.0]]);
    let recipe = Recipe { method: Method::TaskArithmetic, ..Recipe::default() };
    let mut turned = family.clone();
    turned.models.swap(1, 2);
    assert_ne!(family.expected(&recipe).tensors, turned.expected(&recipe).tensors, "the case distinguishes");
    agree(&family, [recipe.clone()]);
    agree(&turned, [recipe]);
}

#[test]
fn lowest_breaks_ties_by_tensor_name_then_position() {
    // Byte order of names, which is neither their order in the files nor a natural order of numbers.
    let names = ["layers.10", "layers.2", "Zeta", "alpha", "ünter"];
    let named =
        |value: f32| -> Tensors { names.iter().map(|name| ((*name).into(), Tensor::vector(&[value; 3]))).collect() };
    let family = Family { base: named(0.0), models: vec![named(1.0)], signs: named(0.0) };
    let recipes = (0..=15).map(|kept| Recipe {
        density: (f64::from(kept) + 0.5) / 15.0,
        trim_ties: TrimTies::Lowest,
        ..Recipe::default()
    });
    agree(&family, recipes.take(15));
}

/// A family of one f32 tensor: 100 entries above the ties, `ties` entries at them, 1,000 below.
fn tied_family(ties: usize) -> (Family, Vec<f32>) {
    let mut tau: Vec<f32> = [vec![2.0; 100], vec![1.0; ties], vec![0.5; 1000]].concat();
    let mut random = Random::new(5);
    random.shuffle(&mut tau);
    for value in &mut tau {
        *value *= *random.pick(&[1.0, -1.0]);
    }
    (Family::vectors(&vec![0.0; tau.len()], &[&tau]), tau)
}

#[test]
fn sample_keeps_the_asked_number_in_expectation() {
    let (family, tau) = tied_family(4000);
    let saved = family.save();
    let keep = 1100.0; // 100 above, 1,000 of the 4,000 ties
    let recipe = Recipe { density: keep / tau.len() as f64, ..Recipe::default() };
    let sample = |scope: &str, seed: &str| {
        let extra = ["--trim-ties=sample", "--scope", scope, "--seed", seed];
        saved.merge(&recipe, &extra).tensors()["w"].f32s()
    };
    for scope in ["model", "tensor"] {
        let mut draws = Vec::new();
        for seed in ["0", "1", "2"] {
            let merged = sample(scope, seed);
            for (tau, merged) in tau.iter().zip(&merged) {
                match tau.abs() {
                    above if above > 1.0 => {
                        assert_eq!(merged, tau, "entries above the threshold survive")
                    }
                    below if below < 1.0 => {
                        assert_eq!(*merged, 0.0, "entries below the threshold do not")
                    }
                    _ => assert!(merged == tau || *merged == 0.0),
                }
            }
            let kept = merged.iter().filter(|merged| **merged != 0.0).count() as f64;
            // Six standard deviations of 4,000 draws at a quarter.
            let spread = 6.0 * (4000.0f64 * 0.25 * 0.75).sqrt();
            assert!((kept - keep).abs() < spread, "{kept} kept, {keep} asked for");
            // Evenly spread: about as many in the first half as in the second.
            let half = merged[..tau.len() / 2].iter().filter(|merged| **merged != 0.0).count() as f64;
            assert!((half - keep / 2.0).abs() < spread, "{half} of {kept} in the first half");
            assert_eq!(merged, sample(scope, seed), "the same seed gives the same bytes");
            assert!(!draws.contains(&merged), "another seed gives other bytes");
            draws.push(merged);
        }
    }
}

#[test]
fn sample_draws_differ_between_models_and_tensors() {
    let (family, tau) = tied_family(4000);
    let named = |w: &Tensors| -> Tensors { ["a", "b"].map(|name| (name.to_owned(), w["w"].clone())).into() };
    let family =
        Family { base: named(&family.base), models: vec![named(&family.models[0]); 2], signs: named(&family.base) };
    let recipe =
        Recipe { density: 1100.0 / tau.len() as f64, elect: Elect::None, combine: Combine::Sum, ..Recipe::default() };
    let merged = family.save().merge(&recipe, &["--trim-ties=sample"]).tensors();
    assert_ne!(merged["a"].bytes, merged["b"].bytes, "two tensors with the same task vector");
    let ones = merged["a"].f32s().iter().filter(|merged| merged.abs() == 1.0).count();
    assert!(ones > 100, "two models with the same task vector keep different ties: {ones}");
}

/// `report[field]` as numbers.
fn numbers(report: &Value, field: &str) -> Vec<f64> {
    let values = report[field].as_array().unwrap_or_else(|| panic!("{field} in {report}"));
    values.iter().map(|value| value.as_f64().expect("a number")).collect()
}

#[test]
fn the_report_counts_survivors_and_conflicts() {
    for family in [Spec::default().family(), Family::adversarial()] {
        let saved = family.save();
        for scope in Scope::ALL {
            for trim_ties in TrimTies::ALL {
                let recipe = Recipe {
                    scope: *scope,
                    trim_ties: *trim_ties,
                    densities: vec![0.2, 0.5, 0.9],
                    ..Recipe::default()
                };
                let expected = family.expected(&recipe);
                let report = saved.merge(&recipe, &[]).report;
                let fraction = |count: usize| count as f64 / expected.elements as f64;
                let kept = numbers(&report, "kept_fraction");
                assert_eq!(kept.len(), expected.kept.len());
                for (reported, count) in kept.iter().zip(&expected.kept) {
                    assert!((reported - fraction(*count)).abs() < 1e-9, "{reported} for {count}: {recipe:?}");
                }
                let conflicts = report["sign_conflict_fraction"].as_f64().expect("a number");
                assert!((conflicts - fraction(expected.conflicts)).abs() < 1e-9, "{conflicts}: {recipe:?}");
            }
        }
    }
}

#[test]
fn massive_ties_are_warned_of_and_the_warning_names_the_way_out() {
    let (family, tau) = tied_family(4000);
    let saved = family.save();
    let recipe = Recipe { density: 1100.0 / tau.len() as f64, ..Recipe::default() };
    assert!(saved.merge(&recipe, &[]).warnings().contains("sample"));
    let recipe = Recipe { trim_ties: TrimTies::Lowest, ..recipe };
    assert!(!saved.merge(&recipe, &[]).warnings().contains("sample"));
}

/// In tensor scope a tiny tensor keeps one entry at least: no tie, though far more than the density says.
#[test]
fn tiny_tensors_are_no_ties_and_leave_the_interval_open() {
    let tiny = ["a", "b", "c", "d", "e", "f", "g", "h"].map(|name| (name, vec![1]));
    let shapes = [&tiny[..], &[("w", vec![10])]].concat();
    let saved = Spec { shapes, ..Spec::default() }.family().save();
    let output = saved.merge(&Recipe { scope: Scope::Tensor, ..Recipe::default() }, &[]);
    assert!(!output.warnings().contains("asked for"), "{}", output.warnings());
    // One unit whose threshold is known without a look does not make the others' certain.
    let shapes = [&tiny[..], &[("w", vec![30_000])]].concat();
    let saved = Spec { shapes, ..Spec::default() }.family().save();
    let output = saved.merge(&Recipe::default(), &["--threshold=sketch", "--scope=tensor"]);
    let kept = numbers(&output.report, "kept_fraction");
    for (interval, kept) in output.report["kept_interval"].as_array().expect("an interval per model").iter().zip(kept) {
        let (low, high) = (interval[0].as_f64().unwrap(), interval[1].as_f64().unwrap());
        assert!(low <= kept && kept <= high && high - low > 1e-4, "{kept}: {interval}");
    }
}

#[test]
fn a_sketched_threshold_certifies_its_interval() {
    let spec = Spec { shapes: vec![("w", vec![300, 100]), ("x", vec![5000])], ..Spec::default() };
    let family = spec.family();
    let saved = family.save();
    for scope in ["model", "tensor"] {
        for density in ["0.01", "0.2", "0.7"] {
            let recipe = Recipe { elect: Elect::None, combine: Combine::Sum, ..Recipe::default() };
            let output = saved.merge(&recipe, &["--threshold=sketch", "--scope", scope, "--density", density]);
            let kept = numbers(&output.report, "kept_fraction");
            let intervals = output.report["kept_interval"].as_array().expect("an interval per model");
            assert_eq!(intervals.len(), kept.len());
            for (interval, kept) in intervals.iter().zip(&kept) {
                let (low, high) = (interval[0].as_f64().unwrap(), interval[1].as_f64().unwrap());
                assert!(low <= *kept && *kept <= high, "{scope} {density}: {kept} outside {interval}");
                let asked: f64 = density.parse().unwrap();
                assert!(high - low < 0.25 * asked, "{scope} {density}: {interval} is too wide");
                assert!((kept - asked).abs() < 0.25 * asked, "{scope}: {kept} kept, {asked} asked for");
            }
        }
    }
}

#[test]
fn the_true_kept_fraction_of_one_model_lies_in_the_certified_interval() {
    let spec = Spec { shapes: vec![("w", vec![20_000])], models: vec![Dtype::F32], ..Spec::default() };
    let family = spec.family();
    let output = family.save().merge(&Recipe::default(), &["--threshold=sketch"]);
    let (base, merged) = (&family.base["w"], &output.tensors()["w"]);
    let changed = base.f32s().iter().zip(merged.f32s()).filter(|(x0, x)| *x0 != x).count();
    let interval = &output.report["kept_interval"][0];
    let (low, high) = (interval[0].as_f64().unwrap(), interval[1].as_f64().unwrap());
    let kept = changed as f64 / 20_000.0;
    assert!(low <= kept && kept <= high, "{kept} outside {interval}");
}

#[test]
fn included_tensors_are_merged_and_the_others_copied() {
    let family = Spec::default().family();
    let saved = family.save();
    let cases: [(&[&str], &[&str]); 5] = [
        (&["--include", "layers.*"], &["embed.weight"]),
        (&["--exclude", "*.mlp.*"], &["layers.0.mlp.weight", "layers.10.mlp.weight", "layers.2.mlp.bias"]),
        (&["--exclude", "embed.weight", "--exclude", "*norm*"], &["embed.weight", "layers.0.norm.weight"]),
        (&["--include", "layers.*", "--exclude", "*.bias"], &["embed.weight", "layers.2.mlp.bias"]),
        (&["--include", "layers.0.*"], &["embed.weight", "layers.10.mlp.weight", "layers.2.mlp.bias"]),
    ];
    for (flags, copied) in cases {
        // What is copied takes no part in the threshold either.
        let mut part = family.clone();
        for tensors in part.models.iter_mut().chain([&mut part.base]) {
            tensors.retain(|name, _| !copied.contains(&name.as_str()));
        }
        let mut expected = part.expected(&Recipe::default()).tensors;
        expected.extend(copied.iter().map(|name| ((*name).to_owned(), family.base[*name].clone())));
        saved.merge(&Recipe::default(), flags).must_equal(&expected);
    }
}

#[test]
fn integer_and_bool_tensors_are_copied_and_a_difference_is_warned_of() {
    let mut family = Spec::default().family();
    let ids =
        |last: i64| Tensor::raw(Dtype::I64, &[3], [1, 2, last].iter().flat_map(|x: &i64| x.to_le_bytes()).collect());
    let mask = Tensor::raw(Dtype::BOOL, &[2], vec![1, 0]);
    for tensors in family.models.iter_mut().chain([&mut family.base]) {
        tensors.insert("position_ids".into(), ids(3));
        tensors.insert("mask".into(), mask.clone());
    }
    let output = family.save().merge(&Recipe::default(), &[]);
    output.must_equal(&family.expected(&Recipe::default()).tensors);
    assert!(!output.warnings().contains("position_ids"), "{}", output.warnings());

    family.models[1].insert("position_ids".into(), ids(4));
    let output = family.save().merge(&Recipe::default(), &[]);
    output.must_equal(&family.expected(&Recipe::default()).tensors);
    assert!(output.warnings().contains("position_ids"), "{}", output.warnings());
    assert!(!output.warnings().contains("mask"), "{}", output.warnings());
}

#[test]
fn tensors_that_a_model_lacks_or_has_in_another_shape() {
    let whole = Spec::default().family();
    let recipe = Recipe { density: 1.0, ..Recipe::default() };
    let name = "layers.0.norm.weight";
    let mut lacking = whole.clone();
    lacking.models[1].remove(name);
    let mut misshapen = whole.clone();
    misshapen.models[1].insert(name.into(), Tensor::vector(&[1.0; 5]));
    for family in [lacking, misshapen] {
        let saved = family.save();
        let mut expected = family.expected(&recipe).tensors;
        saved.merge(&recipe, &["--missing", "base"]).must_equal(&expected);

        // `skip`: the two models that have it, merged as if there were no third.
        let mut two = whole.clone();
        two.models.remove(1);
        expected.insert(name.into(), two.expected(&recipe).tensors[name].clone());
        saved.merge(&recipe, &["--missing", "skip"]).must_equal(&expected);
    }
}

#[test]
fn what_does_not_fit_is_never_dropped_silently() {
    let whole = Spec::default().family();
    let mut extra = whole.clone();
    extra.models[2].insert("extra.weight".into(), Tensor::vector(&[1.0, 2.0]));
    let mut integer = whole.clone();
    integer.models[2].insert("layers.2.mlp.bias".into(), Tensor::raw(Dtype::I32, &[1], vec![0; 4]));
    for (name, family) in [("extra.weight", extra), ("layers.2.mlp.bias", integer)] {
        let saved = family.save();
        let out = saved.path("out");
        let outcome = saved.run("merge", &Recipe::default(), &["--json", "--out", out.to_str().unwrap()]);
        match outcome.code {
            Some(0) => assert!(outcome.json()["warnings"].to_string().contains(name), "{}", outcome.stdout),
            _ => assert!(outcome.refusal().contains(name)),
        }
    }
}

#[test]
fn a_name_absent_everywhere_stays_absent() {
    let family = Spec::default().family();
    let merged = family.save().merge(&Recipe::default(), &[]).tensors();
    assert_eq!(merged.keys().collect::<Vec<_>>(), family.base.keys().collect::<Vec<_>>());
}

#[test]
fn non_finite_inputs_when_asked_for() {
    let base = [1.0, 2.0, 3.0, 4.0];
    for (bad, is_same) in [
        (f32::NAN, f32::is_nan as fn(f32) -> bool),
        (f32::INFINITY, |x| x == f32::INFINITY),
        (f32::NEG_INFINITY, |x| x == f32::NEG_INFINITY),
    ] {
        let family = Family::vectors(&base, &[&[1.5, bad, 2.5, 4.25]]);
        let saved = family.save();
        let recipe = Recipe { density: 1.0, ..Recipe::default() };
        let merged = |how: &str| saved.merge(&recipe, &["--non-finite", how]).tensors()["w"].f32s();
        assert_eq!(merged("copy-base"), [1.5, 2.0, 2.5, 4.25], "{bad}");
        let propagated = merged("propagate");
        assert!(is_same(propagated[1]), "{bad} became {}", propagated[1]);
        assert_eq!([propagated[0], propagated[2], propagated[3]], [1.5, 2.5, 4.25]);
    }
}

#[test]
fn a_nan_among_doubles_spoils_no_other_element() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, values: &[f64]| {
        let path = dir.path().join(name);
        let header = format!(
            r#"{{"w":{{"dtype":"F64","shape":[{0}],"data_offsets":[0,{1}]}}}}"#,
            values.len(),
            8 * values.len()
        );
        files::write_raw(&path, &header, &values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>());
        path.to_str().unwrap().to_owned()
    };
    let base = write("base.safetensors", &[1e300, 1.0 / 3.0, 2.0]);
    let model = write("model.safetensors", &[1e300, f64::NAN, 2.5]);
    for (policy, middle) in [("copy-base", 1.0f64 / 3.0), ("propagate", f64::NAN)] {
        let out = dir.path().join(policy);
        let out = out.to_str().unwrap();
        let args =
            ["merge", "--base", &base, "--model", &model, "--density", "1", "--non-finite", policy, "--out", out];
        tiesmith(args).succeeded();
        let file = std::fs::read(format!("{out}/model.safetensors")).unwrap();
        let values: Vec<f64> =
            file[file.len() - 24..].as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect();
        assert_eq!((values[0], values[2]), (1e300, 2.5), "{policy}");
        assert!(values[1] == middle || values[1].is_nan() && middle.is_nan(), "{policy}: {}", values[1]);
    }
}

/// A small random recipe for ties.
fn any_recipe() -> impl Strategy<Value = Recipe> {
    let options = (0..Recipe::combinations().len(), 0..=20u32, -4..=8i32);
    let models = (proptest::collection::vec(1..=8u8, 0..=4), proptest::collection::vec(0..=10u8, 0..=4));
    (options, models).prop_map(|((combination, density, lambda), (weights, densities))| Recipe {
        density: f64::from(density) / 20.0,
        lambda: lambda as f32 / 4.0,
        weights: weights.into_iter().map(|w| f32::from(w) / 4.0).collect(),
        densities: densities.into_iter().map(|d| f64::from(d) / 10.0).collect(),
        ..Recipe::combinations()[combination].clone()
    })
}

/// A small random family of any stored types.
fn any_family() -> impl Strategy<Value = Spec> {
    const TYPES: [Dtype; 4] = [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F64];
    let dtype = || (0..TYPES.len()).prop_map(|i| TYPES[i]);
    let shape = proptest::collection::vec(0..=9usize, 0..=3);
    let shapes = proptest::collection::vec(shape, 1..=5);
    let types = (dtype(), proptest::collection::vec(dtype(), 1..=4));
    (any::<u64>(), shapes, types, any::<bool>()).prop_map(|(seed, shapes, (base, models), stepped)| Spec {
        seed,
        shapes: ["c", "a.10", "a.9", "b", "d"].into_iter().zip(shapes).collect(),
        base,
        models,
        deltas: if stepped { Deltas::Stepped } else { Deltas::HeavyTailed },
    })
}

/// A way to run that must not matter.
fn any_run() -> impl Strategy<Value = [String; 4]> {
    (1..=4u8, prop_oneof![Just("64MB"), Just("1GiB")], prop_oneof![Just("mmap"), Just("read")], 200..5000u32).prop_map(
        |(threads, memory, io, shard)| {
            [
                format!("--threads={threads}"),
                format!("--memory={memory}"),
                format!("--io={io}"),
                format!("--max-shard-size={shard}"),
            ]
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_family_any_recipe_any_run(spec in any_family(), recipe in any_recipe(), run in any_run()) {
        let family = spec.family();
        let saved: Saved = family.save();
        let run: Vec<&str> = run.iter().map(String::as_str).collect();
        let output = saved.merge(&recipe, &run);
        let found = differences(&family.expected(&recipe).tensors, &output.tensors());
        prop_assert!(found.is_empty(), "{}\n{}", output.outcome.command, found);
    }
}
