//! Parts of a model that are merged each in its own way: a text model and a vision tower, an encoder and a decoder.

use serde::{Deserialize, Serialize};

use super::{Params, Slice};

/// A part of the model, told from the others by the names of its tensors.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Module {
    /// What it is called.
    pub name: String,
    /// What its tensors' names hold before their layer number, as whole components (`visual.merger`): any of these. Of
    /// several modules that a name is in, the one with the most components has it.
    pub parts: Vec<String>,
    /// Whether tensors that are in no module are in this one.
    pub rest: bool,
    /// The models that are merged in it, whole.
    pub models: Vec<ModuleModel>,
    /// Its layers, instead of whole models.
    pub slices: Vec<Slice>,
    /// Parameters of this module, between those of a model or slice and the recipe's.
    pub params: Params,
    /// Where this is written, for messages.
    #[serde(skip)]
    pub place: Option<String>,
}

/// A model in a module.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModuleModel {
    /// Index of the model in the recipe.
    pub model: usize,
    /// Its own parameters in this module.
    pub params: Params,
}

impl Module {
    /// Indexes of all models that take part, base's of a slice among them.
    pub fn sources(&self) -> impl Iterator<Item = usize> + '_ {
        self.models.iter().map(|model| model.model).chain(self.slices.iter().flat_map(Slice::models))
    }

    /// Parameters of the module itself, of its models and of its slices.
    pub(crate) fn params_mut(&mut self) -> impl Iterator<Item = &mut Params> {
        let models = self.models.iter_mut().map(|model| &mut model.params);
        std::iter::once(&mut self.params).chain(models).chain(self.slices.iter_mut().flat_map(Slice::params_mut))
    }

    /// The same, to be read.
    pub(crate) fn all_params(&self) -> impl Iterator<Item = &Params> {
        let models = self.models.iter().map(|model| &model.params);
        std::iter::once(&self.params).chain(models).chain(self.slices.iter().flat_map(Slice::all_params))
    }
}

impl Slice {
    /// Indexes of the models in it, base's among them.
    pub fn models(&self) -> impl Iterator<Item = usize> + '_ {
        let base = self.base.as_ref().and_then(|base| base.model);
        self.sources.iter().map(|source| source.model).chain(base)
    }

    /// Parameters of the slice and of its sources.
    pub(crate) fn params_mut(&mut self) -> impl Iterator<Item = &mut Params> {
        std::iter::once(&mut self.params).chain(self.sources.iter_mut().map(|source| &mut source.params))
    }

    /// The same, to be read.
    pub(crate) fn all_params(&self) -> impl Iterator<Item = &Params> {
        std::iter::once(&self.params).chain(self.sources.iter().map(|source| &source.params))
    }
}
