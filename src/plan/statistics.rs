//! What models have besides their weights: that it is given where it is needed, and fits the tensors it is about.
//!
//! - All models have it for a tensor, or none: where none has, the method falls back on an average, and that is said.
//! - Layers that are solved as a whole become tensors of a checkpoint that nobody named: see `checkpoint::regression`.

use std::sync::Arc;

use super::assembly::Target;
use super::build::{Lack, Reconciler, list};
use super::{Action, Piece, PlannedTensor};
use crate::checkpoint::regression::{Held, Regression};
use crate::checkpoint::rows::Part;
use crate::checkpoint::{Checkpoint, CheckpointFile, Derived, TensorEntry};
use crate::dtype::{Dtype, Float};
use crate::error::{Error, Result, printable};
use crate::method::{Method, Statistics};
use crate::recipe::{ModelInput, Recipe};

/// Every model has what the method needs of it, and nothing that it does not.
pub(super) fn check(recipe: &Recipe, method: &dyn Method) -> Result<()> {
    let wanted = method.statistics();
    for kind in Statistics::ALL {
        let name = kind.name();
        let given = |model: &ModelInput| model.statistics(kind).is_some();
        if wanted != Some(kind) && recipe.models.iter().any(given) {
            return Err(Error::usage(format!("{} has no use for --{name}", method.name()))
                .help(format!("leave it out, or use a method that 'tiesmith methods' says needs --{name}")));
        }
        if wanted == Some(kind) && !recipe.models.iter().all(given) {
            return Err(Error::usage(format!("{} needs the {name} checkpoint of every model", method.name()))
                .help(format!("give --{name} CKPT once per model, in their order")));
        }
    }
    if wanted.is_some() && recipe.vocabulary.is_some() {
        return Err(Error::usage(format!("{} cannot bring vocabularies together", method.name()))
            .help("bring the models to one vocabulary first, with another method"));
    }
    Ok(())
}

/// What became of the tensors of a method that needs more than weights.
#[derive(Default)]
pub(super) struct Described {
    /// Tensors for which nothing is given.
    pub plain: Vec<String>,
    layers: Vec<Layer>,
}

/// A linear layer that is solved for.
struct Layer {
    name: Box<str>,
    shape: [u64; 2],
    weights: Vec<Piece>,
    grams: Vec<Piece>,
    alpha: f64,
}

impl Described {
    /// Notes a layer to solve for; returns where its solution will be.
    pub(super) fn solve(
        &mut self,
        reconciler: &Reconciler<'_>,
        tensor: &TensorEntry,
        models: &[(u32, Piece)],
        grams: &[Piece],
        alpha: f64,
    ) -> Piece {
        let weights = models.iter().map(|&(_, piece)| piece).collect();
        let shape = [tensor.shape[0], tensor.shape[1]];
        self.layers.push(Layer { name: tensor.name.clone(), shape, weights, grams: grams.to_vec(), alpha });
        Piece { checkpoint: reconciler.checkpoints.len() as u32, entry: self.layers.len() as u32 - 1 }
    }

    /// The checkpoint of the solutions, if there are any.
    pub(super) fn solutions(self, like: &Checkpoint, checkpoints: &[Checkpoint]) -> Option<Checkpoint> {
        let part = |&Piece { checkpoint, entry }: &Piece| {
            let checkpoint = &checkpoints[checkpoint as usize];
            let entry = &checkpoint.tensors[entry as usize];
            let float = Float::from_dtype(entry.dtype).expect("floats are what is merged");
            Part { file: Arc::clone(&checkpoint.files[entry.file as usize].file), offset: entry.offset, float }
        };
        let held = Arc::new(Held::default());
        // Weights may be computed themselves.
        let inner = checkpoints.iter().map(|c| c.derived.scratch_bytes).max().unwrap_or(0);
        let mut derived = Derived::default();
        let (mut files, mut tensors) = (Vec::new(), Vec::new());
        for (layer, Layer { name, shape: [outputs, inputs], weights, grams, alpha }) in (0..).zip(self.layers) {
            let (weights, grams): (Vec<Part>, Vec<Part>) =
                (weights.iter().map(part).collect(), grams.iter().map(part).collect());
            let floats: Vec<Float> = grams.iter().map(|gram| gram.float).collect();
            let bytes = Regression::held_bytes(inputs, &floats);
            if derived.shared.as_ref().is_none_or(|(most, _)| bytes > *most) {
                derived.shared = Some((bytes, name.clone()));
            }
            derived.scratch_bytes = derived.scratch_bytes.max(Regression::scratch_bytes(inputs) + inner);
            derived.held_bytes += (size_of::<Regression>() + size_of::<Part>() * 2 * weights.len()) as u64;
            let held = Arc::clone(&held);
            let file = Regression { layer, weights, grams, outputs, inputs, alpha, held };
            let (shape, bytes) = ([outputs, inputs].into(), outputs * inputs * 4);
            tensors.push(TensorEntry { name, dtype: Dtype::F32, shape, file: layer, offset: 0, bytes });
            files.push(CheckpointFile { header_bytes: 0, header_hash: file.hash(), file: Arc::new(file) });
        }
        (!tensors.is_empty()).then(|| Checkpoint {
            spec: "regmean".into(),
            dir: like.dir.clone(),
            hub: None,
            files,
            tensors,
            warnings: Vec::new(),
            derived,
        })
    }
}

impl Reconciler<'_> {
    /// Tensor `name` of checkpoint `index`, if it is a float tensor of exactly this shape.
    fn fitting(&self, index: usize, name: &str, shape: &[u64]) -> Result<Piece, Lack> {
        let piece = self.usable(index, name, shape)?;
        let own = &self.checkpoints[index].tensors[piece.entry as usize].shape;
        match **own == *shape {
            true => Ok(piece),
            false => Err(Lack { who: self.role(index), why: format!("has shape {own:?}") }),
        }
    }

    /// The checkpoint of what the first model has besides its weights.
    pub(super) fn first_statistics(&self) -> usize {
        self.first_model + self.recipe.models.len() + usize::from(self.oracle.is_some())
    }

    /// What `models` have of `target` besides their weights: all of them, or none.
    pub(super) fn statistics_of(
        &self,
        target: &Target<'_>,
        tensor: &TensorEntry,
        models: &[(u32, Piece)],
        shape: &[u64],
    ) -> Result<Box<[Piece]>> {
        let square;
        let wanted = match (self.statistics, shape) {
            (None, _) => return Ok(Box::default()),
            (Some(Statistics::Fisher), _) => shape,
            (Some(Statistics::Gram), &[_, inputs]) => {
                square = [inputs, inputs];
                &square[..]
            }
            // No linear layer.
            (Some(Statistics::Gram), _) => return Ok(Box::default()),
        };
        let mut pieces = Vec::with_capacity(models.len());
        let mut lacks = Vec::new();
        for &(model, _) in models {
            let source = target.sources.iter().find(|source| source.model as u32 == model).expect("it was found there");
            let index = self.first_statistics() + model as usize;
            match self.checkpoints[index].get(&source.name) {
                None => lacks.push(Lack { who: self.role(index), why: "does not have it".into() }),
                Some(_) => match self.fitting(index, &source.name, wanted) {
                    Ok(piece) => pieces.push(piece),
                    // What is there and does not fit is a mistake, whoever else lacks it.
                    Err(lack) => return Err(self.without_statistics(target, tensor, &[lack])),
                },
            }
        }
        match pieces.is_empty() || lacks.is_empty() {
            true => Ok(pieces.into()),
            false => Err(self.without_statistics(target, tensor, &lacks)),
        }
    }

    fn without_statistics(&self, target: &Target<'_>, tensor: &TensorEntry, lacks: &[Lack]) -> Error {
        let parties: Vec<_> = lacks.iter().map(|l| format!("{} {}", l.who, l.why)).collect();
        Error::input(format!("the models have it with shape {:?}, but {}", tensor.shape, list(&parties)))
            .at(self.checkpoints[target.template.checkpoint].path_of(tensor))
            .tensor(&target.name)
            .help("all models need it, or none of them, whose tensors are then averaged")
    }

    /// Says which tensors are averaged for want of what the method goes by; all of them is a mistake.
    pub(super) fn report_plain(
        &self,
        plain: &[String],
        tensors: &[PlannedTensor],
        warnings: &mut Vec<String>,
    ) -> Result<()> {
        let Some(kind) = self.statistics.filter(|_| !plain.is_empty()) else { return Ok(()) };
        let merged = tensors.iter().filter(|t| matches!(t.action, Action::Merge { .. })).count();
        if plain.len() == merged {
            let given = &self.checkpoints[self.first_statistics()..];
            let specs: Vec<String> = given.iter().map(|c| printable(&c.spec)).collect();
            let name = kind.name();
            return Err(Error::input(format!("no tensor of the models has a {name} in {}", list(&specs)))
                .help("its tensors are named like the models'"));
        }
        // Only linear layers have Gram matrices.
        if kind == Statistics::Gram {
            return Ok(());
        }
        let (count, name) = (plain.len(), kind.name());
        warnings.push(format!("{count} tensors have no {name} and are averaged: {}", list(plain)));
        Ok(())
    }
}
