//! Families: a base checkpoint, its fine-tunes, and a checkpoint for oracle signs; in memory and on disk.

use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::Value;
use tempfile::TempDir;

use super::files::{self, Layout};
use super::oracle::{self, Merged, Recipe};
use super::random::Random;
use super::run::{Outcome, tiesmith};
use super::tensor::{Tensor, Tensors, differences, tensors};

/// Checkpoints that belong together.
#[derive(Clone, Debug)]
pub struct Family {
    pub base: Tensors,
    pub models: Vec<Tensors>,
    /// Its task vector gives signs where a test asks for it.
    pub signs: Tensors,
}

/// How the task vectors of a random family are drawn.
#[derive(Clone, Copy, Debug)]
pub enum Deltas {
    /// Heavy-tailed, a tenth exactly zero: hardly any two magnitudes are equal.
    HeavyTailed,
    /// Small multiples of one step: nearly all magnitudes are equal to many others, and sums cancel exactly.
    Stepped,
}

/// A random family, to be varied by struct update.
#[derive(Clone, Debug)]
pub struct Spec {
    pub seed: u64,
    pub shapes: Vec<(&'static str, Vec<usize>)>,
    pub base: Dtype,
    /// Stored type of each model.
    pub models: Vec<Dtype>,
    pub deltas: Deltas,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            seed: 1,
            shapes: vec![
                ("embed.weight", vec![16, 9]),
                ("layers.0.mlp.weight", vec![7, 13]),
                ("layers.0.norm.weight", vec![13]),
                ("layers.10.mlp.weight", vec![3, 5, 4]),
                ("layers.2.mlp.bias", vec![1]),
            ],
            base: Dtype::F32,
            models: vec![Dtype::F32; 3],
            deltas: Deltas::HeavyTailed,
        }
    }
}

impl Spec {
    /// Draws the family.
    pub fn family(&self) -> Family {
        let mut random = Random::new(self.seed);
        let mut family =
            Family { base: Tensors::new(), models: vec![Tensors::new(); self.models.len()], signs: Tensors::new() };
        for (name, shape) in &self.shapes {
            let elements = shape.iter().product();
            let theta0: Vec<f32> = (0..elements).map(|_| self.base_value(&mut random)).collect();
            let base = Tensor::floats(self.base, shape, &theta0);
            let theta0 = base.f32s();
            let mut tuned = |dtype| {
                let theta: Vec<f32> = theta0.iter().map(|x| x + self.delta(&mut random)).collect();
                Tensor::floats(dtype, shape, &theta)
            };
            for (model, &dtype) in family.models.iter_mut().zip(&self.models) {
                model.insert((*name).into(), tuned(dtype));
            }
            family.signs.insert((*name).into(), tuned(Dtype::F32));
            family.base.insert((*name).into(), base);
        }
        family
    }

    fn base_value(&self, random: &mut Random) -> f32 {
        match self.deltas {
            Deltas::HeavyTailed => random.symmetric(),
            Deltas::Stepped => (random.below(33) as f32 - 16.0) / 16.0,
        }
    }

    fn delta(&self, random: &mut Random) -> f32 {
        match self.deltas {
            Deltas::HeavyTailed if random.below(10) == 0 => 0.0,
            Deltas::HeavyTailed => 0.01 * random.heavy_tailed(),
            Deltas::Stepped => (random.below(7) as f32 - 3.0) / 16.0,
        }
    }
}

impl Family {
    /// What usually goes wrong, in f32: ties everywhere, zeros of both signs, denormals, one element, none, a scalar,
    /// exact cancellation, huge beside tiny.
    pub fn adversarial() -> Self {
        let tiny = f32::from_bits(1);
        let names = ["all_tied", "cancel", "denormal", "empty", "one", "range", "scalar", "unchanged", "zeros"];
        let shapes: [&[usize]; 9] = [&[3, 7], &[6], &[5], &[0, 4], &[1], &[7], &[], &[2, 2], &[6]];
        let base: [&[f32]; 9] = [
            &[0.5; 21],
            &[0.0; 6],
            &[tiny, 0.0, -tiny, 3.0 * tiny, f32::MIN_POSITIVE],
            &[],
            &[1.0],
            &[1e30, -1e30, 1e-30, 1.0, -1.0, 0.0, -0.0],
            &[2.0],
            &[1.0, -0.0, 0.0, -4.0],
            &[0.0, -0.0, 0.0, -0.0, 1.0, -1.0],
        ];
        let up: [&[f32]; 9] = [
            &[1.0; 21],
            &[1.0, -1.0, 2.0, 0.25, -3.0, 0.5],
            &[2.0 * tiny, tiny, 0.0, 0.0, 0.0],
            &[],
            &[1.5],
            &[2e30, -1e30, 2e-30, 1.0 + f32::EPSILON, -1.0, tiny, -tiny],
            &[2.25],
            &[1.0, -0.0, 0.0, -4.0],
            &[-0.0, 0.0, 1.0, -1.0, 1.0, -1.0],
        ];
        let signed: Vec<f32> = (0..21).map(|p| if p % 3 == 0 { 1.0 } else { 0.0 }).collect();
        let down: [&[f32]; 9] = [
            &signed,
            &[-1.0, 1.0, -2.0, 0.25, 1.0, -0.5],
            &[0.0, -tiny, -2.0 * tiny, 6.0 * tiny, 0.0],
            &[],
            &[0.5],
            &[1e30, -2e30, 0.0, 1.0 - f32::EPSILON, -1.0, -tiny, tiny],
            &[1.75],
            &[1.0, -0.0, 0.0, -4.0],
            &[0.0, -0.0, -1.0, 1.0, 2.0, -0.0],
        ];
        let third: [&[f32]; 9] = [
            &[0.0; 21],
            &[0.0, 0.0, 0.0, -0.5, 2.0, 0.0],
            &[tiny; 5],
            &[],
            &[1.0],
            &[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            &[2.0],
            &[1.0, -0.0, 0.0, -4.0],
            &[1.0, 1.0, 0.0, -0.0, -1.0, 1.0],
        ];
        let checkpoint = |values: [&[f32]; 9]| -> Tensors {
            (0..9).map(|i| (names[i].into(), Tensor::floats(Dtype::F32, shapes[i], values[i]))).collect()
        };
        Self {
            base: checkpoint(base),
            models: vec![checkpoint(up), checkpoint(down), checkpoint(third)],
            signs: checkpoint(down),
        }
    }

    /// A family of single vectors called `w`.
    pub fn vectors(base: &[f32], models: &[&[f32]]) -> Self {
        let one = |values: &[f32]| tensors([("w", Tensor::vector(values))]);
        Self { base: one(base), models: models.iter().map(|values| one(values)).collect(), signs: one(base) }
    }

    /// What the program should make of it.
    pub fn expected(&self, recipe: &Recipe) -> Merged {
        oracle::merge(&self.base, &self.models, None, recipe)
    }

    /// The same with oracle signs.
    pub fn expected_with_signs(&self, recipe: &Recipe) -> Merged {
        oracle::merge(&self.base, &self.models, Some(&self.signs), recipe)
    }

    /// Writes it with a different layout for every checkpoint.
    pub fn save(&self) -> Saved {
        self.save_as(|checkpoint| match checkpoint {
            0 => Layout::sharded(2, 0),
            1 => Layout::SINGLE,
            n => Layout::sharded(n, 77 + n as u64),
        })
    }

    /// Writes it with the layout given for base (0), each model (1, 2, ...) and the signs (last).
    pub fn save_as(&self, layout: impl Fn(usize) -> Layout) -> Saved {
        let dir = tempfile::tempdir().unwrap();
        let place = |name: &str, tensors: &Tensors, checkpoint: usize| {
            let path = dir.path().join(name);
            files::write_checkpoint(&path, tensors, layout(checkpoint));
            path
        };
        Saved {
            base: place("base", &self.base, 0),
            models: (1..).zip(&self.models).map(|(i, model)| place(&format!("model{i}"), model, i)).collect(),
            signs: place("signs", &self.signs, self.models.len() + 1),
            dir,
        }
    }
}

/// A family on disk, in a directory that disappears with it.
pub struct Saved {
    pub dir: TempDir,
    pub base: PathBuf,
    pub models: Vec<PathBuf>,
    pub signs: PathBuf,
}

impl Saved {
    /// A path beside the checkpoints.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `--base ... --model ...` as the recipe says.
    pub fn inputs(&self, recipe: &Recipe) -> Vec<String> {
        let mut args = vec!["--base".into(), text(&self.base)];
        for (t, model) in self.models.iter().enumerate() {
            args.extend(["--model".into(), text(model) + &recipe.model_suffix(t)]);
        }
        args
    }

    /// Runs `VERB inputs recipe extra`; a flag in `extra` replaces the recipe's.
    pub fn run(&self, verb: &str, recipe: &Recipe, extra: &[&str]) -> Outcome {
        let flag = |arg: &str| arg.split('=').next().unwrap_or_default().to_owned();
        let given: Vec<String> = extra.iter().map(|arg| flag(arg)).collect();
        let mut args = vec![verb.to_owned()];
        args.extend(self.inputs(recipe));
        args.extend(recipe.args().into_iter().filter(|arg| !given.contains(&flag(arg))));
        args.extend(extra.iter().map(|arg| (*arg).to_owned()));
        tiesmith(args)
    }

    /// Merges, which must succeed, into a new directory.
    pub fn merge(&self, recipe: &Recipe, extra: &[&str]) -> Output {
        let dir = tempfile::tempdir().unwrap();
        let out = text(&dir.path().join("merged"));
        let mut all = vec!["--out", out.as_str(), "--json", "--progress", "none"];
        all.extend(extra);
        let outcome = self.run("merge", recipe, &all).succeeded();
        Output { path: PathBuf::from(&out), report: outcome.json(), outcome, _dir: dir }
    }

    /// `--sign-from` this family's signs.
    pub fn signs_flag(&self) -> String {
        format!("--sign-from={}", self.signs.display())
    }
}

/// A finished output, in a directory that disappears with it.
pub struct Output {
    pub path: PathBuf,
    pub report: Value,
    pub outcome: Outcome,
    _dir: TempDir,
}

impl Output {
    pub fn tensors(&self) -> Tensors {
        files::read_checkpoint(&self.path)
    }

    /// Fails unless the output is `expected`, bit for bit.
    #[track_caller]
    pub fn must_equal(&self, expected: &Tensors) {
        let found = differences(expected, &self.tensors());
        assert!(found.is_empty(), "{}\n{found}", self.outcome.command);
    }

    /// `warnings` of the report, joined.
    pub fn warnings(&self) -> String {
        self.report["warnings"].to_string()
    }
}

/// A path as an argument.
pub fn text(path: &Path) -> String {
    path.to_str().expect("a temporary path is UTF-8").to_owned()
}
