//! `perturb`: which signs are flipped, and how many, from the task vector before and after.

use safetensors::Dtype;

use crate::support::family::{Deltas, Family, Saved, Spec, text};
use crate::support::files::read_checkpoint;
use crate::support::oracle::Recipe;
use crate::support::run::{Outcome, tiesmith};
use crate::support::tensor::Tensors;

fn perturb(saved: &Saved, out: &str, flags: &[&str]) -> Outcome {
    let mut args = vec!["perturb".to_owned(), text(&saved.models[0]), "--base".into(), text(&saved.base)];
    args.extend(["--out".into(), text(&saved.path(out)), "--progress=none".into()]);
    args.extend(flags.iter().map(|flag| (*flag).to_owned()));
    tiesmith(args)
}

/// One model whose weights and task vector are multiples of a power of two, so that nothing is rounded.
fn family() -> Family {
    let shapes = vec![("layers.0.w", vec![100, 50]), ("layers.1.w", vec![2000]), ("scale", vec![])];
    let mut family = Spec { shapes, models: vec![Dtype::F32], deltas: Deltas::Stepped, ..Spec::default() }.family();
    let mut at = 0u32;
    for (name, tensor) in &mut family.models[0] {
        let base = family.base[name].f32s();
        // Magnitudes differ, so that no two tie.
        let theta: Vec<f32> = base
            .iter()
            .map(|base| {
                at += 1;
                let size = (at.wrapping_mul(2_654_435_761) % 16_381) as f32 / 65_536.0;
                base + if at.is_multiple_of(3) { -size } else { size }
            })
            .collect();
        *tensor = crate::support::tensor::Tensor::floats(Dtype::F32, &tensor.shape, &theta);
    }
    family
}

/// τ over the whole model, in the order of names.
fn tau(base: &Tensors, model: &Tensors) -> Vec<f32> {
    let one = |(name, tensor): (&String, &crate::support::tensor::Tensor)| {
        tensor.f32s().iter().zip(base[name].f32s()).map(|(theta, base)| theta - base).collect::<Vec<_>>()
    };
    model.iter().flat_map(one).collect()
}

#[test]
fn signs_are_flipped_on_the_side_chosen_and_nowhere_else() {
    let family = family();
    let saved = family.save();
    let before = tau(&family.base, &family.models[0]);
    let mut magnitudes: Vec<f32> = before.iter().map(|x| x.abs()).collect();
    magnitudes.sort_by(|a, b| b.total_cmp(a));
    let count = before.len() as f64;
    for (number, (side, density, probability)) in [
        ("top", 0.2, 1.0),
        ("top", 0.2, 0.4),
        ("top", 1.0, 1.0),
        ("top", 0.0, 1.0),
        ("bottom", 0.8, 1.0),
        ("bottom", 0.8, 0.4),
        ("bottom", 1.0, 0.5),
        ("bottom", 0.0, 1.0),
        ("top", 0.5, 0.0),
    ]
    .into_iter()
    .enumerate()
    {
        let out = format!("out{number}");
        let flags =
            [format!("--flip-sign={side}"), format!("--density={density}"), format!("--probability={probability}")];
        let flags: Vec<&str> = flags.iter().map(String::as_str).chain(["--json"]).collect();
        let report = perturb(&saved, &out, &flags).succeeded().json();
        let after = tau(&family.base, &read_checkpoint(&saved.path(&out)));
        let largest = if side == "top" { density } else { 1.0 - density };
        let keep = (largest * count) as usize;
        let least = if keep == 0 { f32::INFINITY } else { magnitudes[keep - 1] };
        let (mut flipped, mut eligible) = (0, 0);
        for (before, after) in before.iter().zip(&after) {
            let on_side = *before != 0.0 && (before.abs() >= least) == (side == "top");
            eligible += usize::from(on_side);
            flipped += usize::from(*before != 0.0 && *after == -before);
            assert!(*after == *before || on_side && *after == -before, "{side} {density}: {before} became {after}");
        }
        let share = flipped as f64 / count;
        assert!((report["kept_fraction"][0].as_f64().unwrap() - share).abs() < 1e-9);
        let spread = 5.0 * (eligible as f64 * probability * (1.0 - probability)).sqrt();
        assert!(
            (flipped as f64 - eligible as f64 * probability).abs() <= spread,
            "{flipped} of {eligible}: {probability}"
        );
    }
}

#[test]
fn equal_seeds_give_equal_bytes_and_others_do_not() {
    let saved = family().save();
    let read = |out: &str, flags: &[&str]| {
        let flags = [&["--flip-sign=top", "--density=50%", "--probability=0.5"], flags].concat();
        perturb(&saved, out, &flags).succeeded();
        read_checkpoint(&saved.path(out))
    };
    let first = read("a", &["--seed=1", "--threads=1"]);
    assert!(first == read("b", &["--seed=1", "--threads=4", "--memory=60MB"]));
    assert!(first != read("c", &["--seed=2"]));
}

#[test]
fn a_merge_of_one_is_the_model_trimmed() {
    let family = family();
    let saved = family.save();
    let recipe = Recipe { density: 0.2, ..Recipe::default() };
    saved.merge(&recipe, &[]).must_equal(&family.expected(&recipe).tensors);
}

#[test]
fn what_is_asked_wrongly_is_refused_in_one_line() {
    let saved = family().save();
    for (flags, said) in [
        (&["--density=0.2"][..], "--flip-sign"),
        (&["--flip-sign=left"], "possible values: top, bottom"),
        (&["--flip-sign=top", "--probability=1.5"], "1.5"),
        (&["--flip-sign=top", "--density=-1"], "-1"),
    ] {
        let outcome = perturb(&saved, "out", flags);
        assert!(outcome.refusal().contains(said), "{}", outcome.stderr);
        assert!(!saved.path("out").exists());
    }
    // It is a command, not a method to merge with.
    let outcome = saved.run("merge", &Recipe::default(), &["--method=perturb", "--out", &text(&saved.path("out"))]);
    assert!(outcome.refusal().contains("perturb"), "{}", outcome.stderr);
    assert!(!tiesmith(["methods"]).succeeded().stdout.contains("perturb"));
}
