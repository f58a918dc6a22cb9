//! Which tensors the output has, and which tensors of the inputs each is made of.
//!
//! - Whole models: the template's tensors, in the order in which its files hold them, so that reads stay sequential.
//! - Modules (`modules`): the same for each part of a model, by the names of its tensors.
//! - Slices: the input side of the first slice, its layers and those of all further slices numbered consecutively, and
//!   the output side of the last slice. Names are changed at the layer number and nowhere else.
//!
//! Looks at names only; whether shapes and types fit is for `build`.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use super::LayerMap;
use super::layers::{self, Stacks};
use crate::checkpoint::{Checkpoint, TensorEntry};
use crate::error::{Error, Result, printable};
use crate::recipe::{Params, Recipe, Slice};
use crate::storage::Storage;

/// Most layers an output may have.
const MAX_LAYERS: u64 = 100_000;

/// A tensor of an input by checkpoint and name.
pub(super) struct Input<'a> {
    pub checkpoint: usize,
    pub name: Cow<'a, str>,
}

/// A model's part in a target.
pub(super) struct Source<'a> {
    /// Index of the model in the recipe.
    pub model: usize,
    /// Name of its tensor.
    pub name: Cow<'a, str>,
    /// Its own parameters.
    pub params: &'a Params,
}

/// One tensor of the output.
pub(super) struct Target<'a> {
    pub name: Cow<'a, str>,
    /// The tensor that gives shape and type: base's, or the first model's.
    pub template: Input<'a>,
    /// θ_0.
    pub base: Option<Input<'a>>,
    /// The models, in recipe order.
    pub sources: Vec<Source<'a>>,
    /// Parameters of the slice.
    pub slice: Option<&'a Params>,
    /// Place among the layers that parameters go by, 0 to 1.
    pub t: f64,
}

/// The opened inputs of a recipe.
#[derive(Clone, Copy)]
pub(super) struct Opened<'a> {
    pub recipe: &'a Recipe,
    pub checkpoints: &'a [Checkpoint],
    pub base: Option<usize>,
    pub first_model: usize,
}

/// What the output is made of, and where its layers come from.
pub(super) struct Assembly<'a> {
    pub targets: Vec<Target<'a>>,
    /// Where layers come from, unless whole models are merged.
    pub layers: Vec<LayerMap>,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// The part of a model that is assembled: which names are in it, and what it is called where it is not all.
#[derive(Clone, Copy)]
pub(super) struct Extent<'w> {
    pub wanted: &'w dyn Fn(&str) -> bool,
    pub module: Option<&'w str>,
}

impl Extent<'_> {
    /// All of it.
    const WHOLE: Self = Self { wanted: &|_| true, module: None };
}

impl<'a> Opened<'a> {
    /// All tensors of the output.
    pub(super) fn assemble(self, storage: &dyn Storage) -> Result<Assembly<'a>> {
        let (mut targets, mut layers, mut warnings) = (Vec::new(), Vec::new(), Vec::new());
        if !self.recipe.modules.is_empty() {
            warnings = self.in_modules(storage, &mut targets, &mut layers)?;
        } else if !self.recipe.slices.is_empty() {
            layers.push(self.sliced(&self.recipe.slices, Extent::WHOLE, storage, &mut targets)?);
        } else {
            let models: Vec<_> = self.recipe.models.iter().map(|model| &model.params).enumerate().collect();
            self.whole(&models, None, Extent::WHOLE, storage, &mut targets)?;
        }
        Ok(Assembly { targets, layers, warnings })
    }

    pub(super) fn template(self) -> usize {
        self.base.unwrap_or(self.first_model)
    }

    /// Whole `models`, each with its own parameters, as far as `extent` goes.
    pub(super) fn whole(
        self,
        models: &[(usize, &'a Params)],
        shared: Option<&'a Params>,
        extent: Extent<'_>,
        storage: &dyn Storage,
        targets: &mut Vec<Target<'a>>,
    ) -> Result<()> {
        let index = match (self.base, models) {
            (Some(base), _) => base,
            (None, models) => self.first_model + models.first().map_or(0, |(model, _)| *model),
        };
        let template = &self.checkpoints[index];
        let stacks = Stacks::of(template, storage, extent.wanted)?;
        let target = |(checkpoint, tensor): (usize, &'a TensorEntry)| {
            let name = || Cow::Borrowed(&*tensor.name);
            Target {
                name: name(),
                template: Input { checkpoint, name: name() },
                base: self.base.map(|checkpoint| Input { checkpoint, name: name() }),
                sources: models.iter().map(|&(model, params)| Source { model, name: name(), params }).collect(),
                slice: shared,
                t: stacks.place(&tensor.name),
            }
        };
        let heads = self.untied_heads(index);
        let all = stored_order(template).map(|tensor| (index, tensor)).chain(heads);
        targets.extend(all.filter(|(_, tensor)| (extent.wanted)(&tensor.name)).map(target));
        Ok(())
    }

    /// Heads that some model has and the template lacks, where a head that is not stored is the input embedding.
    fn untied_heads(self, index: usize) -> impl Iterator<Item = (usize, &'a TensorEntry)> {
        let template = &self.checkpoints[index];
        let mut heads: BTreeMap<&str, (usize, &TensorEntry)> = BTreeMap::new();
        for index in (0..self.recipe.models.len()).map(|model| self.first_model + model) {
            let all = self.checkpoints[index].tensors.iter();
            for tensor in all.filter(|t| layers::is_head(&t.name) && template.get(&t.name).is_none()) {
                heads.entry(&tensor.name).or_insert((index, tensor));
            }
        }
        let wanted = self.recipe.tied_heads;
        heads.into_values().filter(move |(_, head)| wanted && self.find(index, &head.name).is_some())
    }

    /// The tensor called `name` in a checkpoint; where the recipe says so, a head that it lacks is its embedding.
    pub(super) fn find(self, checkpoint: usize, name: &str) -> Option<(u32, &'a TensorEntry)> {
        let tensors = &self.checkpoints[checkpoint].tensors;
        let at = |name: &str| tensors.binary_search_by(|t| (*t.name).cmp(name)).ok();
        let index = at(name).or_else(|| {
            let tied = self.recipe.tied_heads && layers::is_head(name);
            let embeds = |t: &&TensorEntry| {
                t.shape.len() == 2 && layers::is_vocabulary(&t.name) && layers::is_input_side(&t.name)
            };
            let mut embeddings = tensors.iter().filter(embeds).filter(|_| tied);
            let only = embeddings.next().filter(|_| embeddings.next().is_none())?;
            at(&only.name)
        })?;
        Some((index as u32, &tensors[index]))
    }

    /// The checkpoint that is base in `slice`, and its first layer there.
    fn base_of(self, slice: &Slice) -> Option<(usize, u64)> {
        let base = slice.base.as_ref()?;
        let checkpoint = match base.model {
            Some(model) => Some(self.first_model + model),
            None => self.base,
        };
        Some((checkpoint?, base.first))
    }

    /// Layers of models, and what is before and behind them, as far as `extent` goes.
    pub(super) fn sliced(
        self,
        slices: &'a [Slice],
        extent: Extent<'_>,
        storage: &dyn Storage,
        targets: &mut Vec<Target<'a>>,
    ) -> Result<LayerMap> {
        let of = |checkpoint| Stacks::of(checkpoint, storage, extent.wanted);
        let stacks: Vec<Stacks> = self.checkpoints.iter().map(of).collect::<Result<_>>()?;
        let total = slices.iter().fold(0u64, |sum, slice| sum.saturating_add(slice.layers));
        if total > MAX_LAYERS {
            return Err(Error::usage(format!("{total} layers, but at most {MAX_LAYERS} are supported")));
        }
        let (first, last) = (&slices[0], &slices[slices.len() - 1]);
        targets.extend(self.outside(first, |name| (extent.wanted)(name) && layers::is_input_side(name)));
        let (mut layers, mut next) = (Vec::new(), 0);
        for slice in slices {
            self.check_range(slice, &stacks)?;
            for layer in 0..slice.layers {
                self.layer(slice, layer, next, &stacks, targets)?;
                layers.push(slice.sources[0].first + layer);
                next += 1;
            }
        }
        targets.extend(self.outside(last, |name| (extent.wanted)(name) && !layers::is_input_side(name)));
        let template = self.template();
        let (_, depth) = stacks[template].main(&self.checkpoints[template])?;
        Ok(LayerMap { depth, module: extent.module.map(str::to_owned), from: layers })
    }

    fn check_range(self, slice: &Slice, stacks: &[Stacks]) -> Result<()> {
        let sources = slice.sources.iter();
        let sources = sources.map(|source| (self.first_model + source.model, source.first, source.place.as_deref()));
        let base = self.base_of(slice).map(|(checkpoint, first)| (checkpoint, first, None));
        for (checkpoint, first, place) in sources.chain(base) {
            let input = &self.checkpoints[checkpoint];
            let (stack, depth) = stacks[checkpoint].main(input)?;
            let end = first.saturating_add(slice.layers);
            if end > depth {
                let error = Error::usage(format!(
                    "layer_range [{first}, {end}] of {}, but \"{}\" has {depth} layers",
                    printable(&input.spec),
                    printable(stack)
                ))
                .help(format!("the range must lie within [0, {depth}]"));
                return Err(match place {
                    Some(place) => error.at(Path::new(place)),
                    None => error,
                });
            }
        }
        Ok(())
    }

    /// The checkpoint whose tensors a slice's output has: its base, or its first source.
    fn slice_template(self, slice: &Slice) -> (usize, u64) {
        self.base_of(slice).unwrap_or((self.first_model + slice.sources[0].model, slice.sources[0].first))
    }

    /// The tensors outside the layers whose names `wanted` accepts, merged as `slice` says.
    fn outside(self, slice: &'a Slice, wanted: impl Fn(&str) -> bool) -> Vec<Target<'a>> {
        let (template, _) = self.slice_template(slice);
        let base = self.base_of(slice).map(|(checkpoint, _)| checkpoint);
        let outer = stored_order(&self.checkpoints[template]);
        outer
            .filter(|tensor| layers::split(&tensor.name).is_none() && wanted(&tensor.name))
            .map(|tensor| {
                let name = || Cow::Borrowed(&*tensor.name);
                let sources = slice.sources.iter();
                Target {
                    name: name(),
                    template: Input { checkpoint: template, name: name() },
                    base: base.map(|checkpoint| Input { checkpoint, name: name() }),
                    sources: sources.map(|s| Source { model: s.model, name: name(), params: &s.params }).collect(),
                    slice: Some(&slice.params),
                    t: 0.0,
                }
            })
            .collect()
    }

    /// The tensors of one layer of `slice`, which becomes layer `output`.
    fn layer(
        self,
        slice: &'a Slice,
        layer: u64,
        output: u64,
        stacks: &[Stacks],
        targets: &mut Vec<Target<'a>>,
    ) -> Result<()> {
        let (template, first) = self.slice_template(slice);
        let (stack, _) = stacks[template].main(&self.checkpoints[template])?;
        let base = self.base_of(slice);
        let t = if slice.layers > 1 { layer as f64 / (slice.layers - 1) as f64 } else { 1.0 };
        let prefix = layers::join(stack, first + layer, "");
        for tensor in in_stored_order(with_prefix(&self.checkpoints[template], &prefix)) {
            let rest = &tensor.name[prefix.len()..];
            let input = |checkpoint: usize, first: u64| -> Result<Cow<'a, str>> {
                let (stack, _) = stacks[checkpoint].main(&self.checkpoints[checkpoint])?;
                Ok(Cow::Owned(layers::join(stack, first + layer, rest)))
            };
            let mut sources = Vec::with_capacity(slice.sources.len());
            for source in &slice.sources {
                let name = input(self.first_model + source.model, source.first)?;
                sources.push(Source { model: source.model, name, params: &source.params });
            }
            targets.push(Target {
                name: Cow::Owned(layers::join(stack, output, rest)),
                template: Input { checkpoint: template, name: Cow::Borrowed(&tensor.name) },
                base: match base {
                    Some((checkpoint, first)) => Some(Input { checkpoint, name: input(checkpoint, first)? }),
                    None => None,
                },
                sources,
                slice: Some(&slice.params),
                t,
            });
        }
        Ok(())
    }
}

/// The tensors of a checkpoint in the order in which its files hold them.
pub(super) fn stored_order(checkpoint: &Checkpoint) -> impl Iterator<Item = &TensorEntry> {
    in_stored_order(&checkpoint.tensors)
}

fn in_stored_order(tensors: &[TensorEntry]) -> impl Iterator<Item = &TensorEntry> {
    let mut order: Vec<&TensorEntry> = tensors.iter().collect();
    // Tensors without elements share their offset with the next: the sort is stable, so the order is that of names.
    order.sort_by_key(|tensor| (tensor.file, tensor.offset));
    order.into_iter()
}

/// The tensors of a checkpoint, which are sorted by name, whose names begin with `prefix`.
fn with_prefix<'a>(checkpoint: &'a Checkpoint, prefix: &str) -> &'a [TensorEntry] {
    let tensors = &checkpoint.tensors;
    let begin = tensors.partition_point(|t| &*t.name < prefix);
    let count = tensors[begin..].partition_point(|t| t.name.starts_with(prefix));
    &tensors[begin..begin + count]
}
