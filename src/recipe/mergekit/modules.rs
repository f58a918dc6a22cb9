//! `modules`: parts of a model that are merged each in its own way.
//!
//! mergekit takes the names of modules from its list of architectures, or, for one that it does not know, from what tensor
//! names have before their layer numbers. Here a module is what its name says: tensors whose names hold it. A few of
//! mergekit's names say something else than tensors do, or mean all the rest.

use super::models::Inputs;
use super::node::{Key, Node};
use super::settings::Scope;
use crate::error::{Result, printable};
use crate::limits::MAX_MODELS;
use crate::recipe::{Module, ModuleModel, Params};

/// mergekit's names of modules that are not (only) parts of tensor names: (name, such parts, whether it has the rest).
const KNOWN: &[(&str, &[&str], bool)] = &[
    ("default", &[], true),
    ("text_decoder", &[], true),
    ("decoder", &["decoder"], true),
    ("vision_tower", &["vision_tower", "vision_model", "visual"], false),
    (
        "multi_modal_projector",
        &["multi_modal_projector", "visual.merger", "visual.deepstack_merger_list", "visual.merger_list"],
        false,
    ),
];

impl Inputs<'_> {
    /// One module is the whole model; several are told apart by the names of their tensors.
    pub(super) fn modules(&mut self, node: &Node) -> Result<()> {
        let modules: Vec<(&Key, &Node)> = self.reader().map(node, "modules")?.iter().collect();
        match &modules[..] {
            [] => Err(self.reader().fail(node.place, "modules is empty")),
            [(_, only)] => self.only_module(only),
            _ if modules.len() > MAX_MODELS => {
                let text = format!("{} modules, but at most {MAX_MODELS} are supported", modules.len());
                Err(self.reader().fail(node.place, text))
            }
            _ => modules.iter().try_for_each(|(name, node)| {
                let module = self.module(name, node)?;
                self.recipe.modules.push(module);
                Ok(())
            }),
        }
        .and_then(|()| match self.recipe.models.is_empty() {
            true => Err(self.reader().fail(node.place, "no model but base").help("list the models to merge")),
            false => Ok(()),
        })
    }

    fn only_module(&mut self, node: &Node) -> Result<()> {
        let fields = self.reader().fields(node, "a module", &["models", "slices", "parameters"])?;
        let inner = self.params(&fields, Scope::Shared)?;
        let outer = std::mem::take(&mut self.recipe.params);
        self.recipe.params = within(inner, &outer);
        match (fields.get("models"), fields.get("slices")) {
            (Some(models), None) => self.models(models),
            (None, Some(slices)) => {
                self.recipe.slices = self.slices(slices)?;
                Ok(())
            }
            _ => Err(self.reader().fail(fields.place, "a module has either 'models' or 'slices'")),
        }
    }

    fn module(&mut self, name: &Key, node: &Node) -> Result<Module> {
        let fields = self.reader().fields(node, "a module", &["models", "slices", "parameters"])?;
        let params = self.params(&fields, Scope::Shared)?;
        let known = KNOWN.iter().find(|(known, ..)| *known == name.text);
        let (parts, rest) = match known {
            Some((_, parts, rest)) => (parts.iter().map(|part| (*part).to_owned()).collect(), *rest),
            None => (vec![name.text.clone()], false),
        };
        let place = Some(self.reader().spot(name.place));
        let mut module = Module { name: name.text.clone(), parts, rest, params, place, ..Module::default() };
        match (fields.get("models"), fields.get("slices")) {
            (Some(models), None) => {
                for (input, place) in self.listed(models)? {
                    let model = self.model(input.source, place)?;
                    let known = &mut self.recipe.models[model];
                    known.fisher = known.fisher.take().or(input.fisher);
                    known.gram = known.gram.take().or(input.gram);
                    module.models.push(ModuleModel { model, params: input.params });
                }
            }
            (None, Some(slices)) => {
                module.slices = self.slices(slices)?;
                for slice in &mut module.slices {
                    slice.params = within(std::mem::take(&mut slice.params), &module.params);
                }
            }
            _ => {
                let text = format!("the module \"{}\" has either 'models' or 'slices'", printable(&name.text));
                return Err(self.reader().fail(fields.place, text));
            }
        }
        Ok(module)
    }
}

/// `inner` parameters, and where their cases say nothing, `outer` ones.
fn within(inner: Params, outer: &Params) -> Params {
    let mut all = outer.clone();
    for (name, setting) in inner {
        let merged = match all.remove(&name) {
            Some(outer) => setting.or(outer),
            None => setting,
        };
        all.insert(name, merged);
    }
    all
}
