//! Models that are merged part by part: which tensors are in which module, and the assembly of each.
//!
//! A module has the tensors whose names hold one of its `parts`, as whole components before their layer number
//! (`visual.merger` is in `model.visual.merger.mlp.0.weight`); of several modules, the one with the most components. What is in none is in the
//! module that has the rest; where there is none, it is copied from the template, and said.

use super::LayerMap;
use super::assembly::{Extent, Input, Opened, Target, stored_order};
use super::layers;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result, printable};
use crate::recipe::Module;
use crate::storage::Storage;

/// Words for the same kind of model, in names of modules and in keys of `config.json`.
const KINDS: [&[&str]; 5] = [
    &["text", "language", "llm"],
    &["encoder"],
    &["decoder"],
    &["vision", "visual", "image", "vit"],
    &["audio", "speech", "sound"],
];
/// How many names a message lists.
const NAMES_LISTED: usize = 4;

/// Whether what `key` of a `config.json` holds can describe the module called `module`: it is not about a model of
/// another kind.
pub fn may_describe(key: &str, module: &str) -> bool {
    let (key, module) = (key.to_lowercase(), module.to_lowercase());
    let kinds = |text: &str| KINDS.map(|words| words.iter().any(|word| text.contains(word)));
    let (key, module) = (kinds(&key), kinds(&module));
    !key.contains(&true) || !module.contains(&true) || key.iter().zip(&module).any(|(key, module)| *key && *module)
}

/// How many components the longest of `parts` has that is in `name` before its layer number.
fn depth_of(name: &str, parts: &[String]) -> usize {
    let head = layers::split(name).map_or(name, |(stack, ..)| stack);
    let within = |part: &&String| {
        let at = |from: usize| (from == 0 || head.as_bytes()[from - 1] == b'.', from + part.len());
        head.match_indices(&***part).any(|(from, _)| {
            let (begins, end) = at(from);
            begins && (end == head.len() || head.as_bytes()[end] == b'.')
        })
    };
    parts.iter().filter(within).map(|part| part.split('.').count()).max().unwrap_or(0)
}

/// The modules of a recipe, as the names of some checkpoint divide them.
struct Division<'a> {
    modules: &'a [Module],
    /// The module that has what is in no other.
    rest: Option<usize>,
}

impl<'a> Division<'a> {
    /// Refuses modules that no tensor is in, except for a single one, which then has the rest.
    fn of(modules: &'a [Module], template: &Checkpoint) -> Result<Self> {
        let fail = |module: &Module, text: String| match &module.place {
            Some(place) => Error::usage(text).at(std::path::Path::new(place)),
            None => Error::usage(text),
        };
        let mut rests = modules.iter().enumerate().filter(|(_, module)| module.rest);
        let rest = rests.next().map(|(index, _)| index);
        if let (Some(first), Some((_, second))) = (rest, rests.next()) {
            let (first, second) = (printable(&modules[first].name), printable(&second.name));
            let text = format!("\"{second}\" and \"{first}\" both are for the tensors that no other module has");
            return Err(fail(&modules[rest.unwrap_or_default()], text).help("keep one of them"));
        }
        let idle = |module: &&Module| !template.tensors.iter().any(|t| depth_of(&t.name, &module.parts) > 0);
        let mut idle = modules.iter().enumerate().filter(|(index, module)| Some(*index) != rest && idle(module));
        match (idle.next(), idle.next(), rest) {
            (None, ..) => Ok(Self { modules, rest }),
            (Some((only, _)), None, None) => Ok(Self { modules, rest: Some(only) }),
            (Some((_, module)), ..) => {
                let mut heads: Vec<String> = Vec::new();
                for tensor in &template.tensors {
                    let stack = layers::split(&tensor.name).map_or(&*tensor.name, |(stack, ..)| stack);
                    let head = format!("\"{}\"", printable(stack));
                    if heads.len() < NAMES_LISTED && !heads.contains(&head) {
                        heads.push(head);
                    }
                }
                let text = format!("no tensor is in the module \"{}\"", printable(&module.name));
                Err(fail(module, text).help(format!(
                    "call a module by a part of its tensors' names; here they are like {}",
                    heads.join(", ")
                )))
            }
        }
    }

    /// The module that the tensor `name` is in.
    fn home(&self, name: &str) -> Option<usize> {
        let depths = self.modules.iter().enumerate().map(|(index, module)| (depth_of(name, &module.parts), index));
        // The first of equals.
        let best = depths.reduce(|best, next| if next.0 > best.0 { next } else { best });
        best.filter(|(depth, _)| *depth > 0).map(|(_, index)| index).or(self.rest)
    }
}

impl<'a> Opened<'a> {
    /// All tensors, module by module. Returns what is to be warned of.
    pub(super) fn in_modules(
        self,
        storage: &dyn Storage,
        targets: &mut Vec<Target<'a>>,
        layers: &mut Vec<LayerMap>,
    ) -> Result<Vec<String>> {
        let template = &self.checkpoints[self.template()];
        let division = Division::of(&self.recipe.modules, template)?;
        for (index, module) in self.recipe.modules.iter().enumerate() {
            let wanted = |name: &str| division.home(name) == Some(index);
            let extent = Extent { wanted: &wanted, module: Some(&module.name) };
            if module.slices.is_empty() {
                let models: Vec<_> = module.models.iter().map(|model| (model.model, &model.params)).collect();
                self.whole(&models, Some(&module.params), extent, storage, targets)?;
            } else {
                layers.push(self.sliced(&module.slices, extent, storage, targets)?);
            }
        }
        let homeless: Vec<_> = stored_order(template).filter(|tensor| division.home(&tensor.name).is_none()).collect();
        let mut warnings = Vec::new();
        if let Some(first) = homeless.first() {
            let (count, name) = (homeless.len(), printable(&first.name));
            warnings
                .push(format!("{count} tensors in no module, such as \"{name}\", are copied from {}", template.spec));
        }
        let alike = |a: &LayerMap, b: &LayerMap| a.depth == b.depth && a.from.len() != b.from.len();
        if layers.iter().enumerate().any(|(at, map)| layers[..at].iter().any(|other| alike(map, other))) {
            warnings.push("modules of equally many layers: see that config.json says how many each has now".into());
        }
        targets.extend(homeless.into_iter().map(|tensor| Target {
            name: (&*tensor.name).into(),
            template: Input { checkpoint: self.template(), name: (&*tensor.name).into() },
            base: None,
            sources: Vec::new(),
            slice: None,
            t: 0.0,
        }));
        Ok(warnings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_whole_components_before_the_layer_number() {
        let depth = |name: &str, part: &str| depth_of(name, &[part.to_owned()]);
        assert_eq!(depth("model.visual.merger.mlp.0.weight", "visual.merger"), 2);
        assert_eq!(depth("model.visual.merger.mlp.0.weight", "visual"), 1);
        assert_eq!(depth("visual.blocks.3.attn.w", "visual"), 1);
        assert_eq!(depth("model.encoder.layers.0.w", "encoder"), 1);
        assert_eq!(depth("decoder.block.0.encoder.w", "encoder"), 0);
        assert_eq!(depth("model.decoder.layers.0.w", "coder"), 0);
        assert_eq!(depth("model.audio_visual.w", "visual"), 0);
    }

    #[test]
    fn configurations_describe_models_of_their_kind() {
        assert!(may_describe("text_config", "text_decoder") && !may_describe("vision_config", "text_decoder"));
        assert!(may_describe("vision_config", "visual") && may_describe("extras", "visual"));
        assert!(may_describe("vision_config", "tower"));
        assert!(may_describe("num_decoder_layers", "decoder") && !may_describe("num_decoder_layers", "encoder"));
    }
}
