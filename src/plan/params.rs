//! From settings that vary over tensors to sets of numbers, each different one made once.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::ParamSet;
use crate::error::{Error, Result, printable};
use crate::method::{Method, Settings, Value};
use crate::recipe::{Params, Recipe, Scope};

/// What decides the parameters of one tensor.
pub(super) struct Scopes<'a> {
    /// Name of the output tensor: for parameters of the merge as a whole.
    pub name: &'a str,
    /// Place among the layers, 0 to 1.
    pub t: f64,
    /// Parameters of the slice.
    pub slice: Option<&'a Params>,
    /// The models that take part: (index, name of the tensor in it, its own parameters).
    pub models: &'a [(usize, &'a str, &'a Params)],
}

/// The sets made so far.
pub(super) struct ParamTable<'a> {
    recipe: &'a Recipe,
    method: &'static dyn Method,
    sets: Vec<ParamSet>,
    /// Sets by the values that they were made from.
    known: HashMap<String, u32>,
    /// The one set, if nothing varies.
    constant: bool,
    /// Parameters that the method does not have, and the like.
    pub warnings: BTreeSet<String>,
}

impl<'a> ParamTable<'a> {
    pub(super) fn new(recipe: &'a Recipe) -> Result<Self> {
        let own = recipe.models.iter().map(|m| &m.params);
        let constant = recipe.slices.is_empty()
            && recipe.modules.is_empty()
            && std::iter::once(&recipe.params).chain(own).flat_map(|p| p.values()).all(|s| s.is_constant());
        let method = recipe.method()?;
        let (sets, known) = (Vec::new(), HashMap::new());
        Ok(Self { recipe, method, sets, known, constant, warnings: BTreeSet::new() })
    }

    /// The index of the set for `scopes`.
    pub(super) fn index(&mut self, scopes: &Scopes<'_>) -> Result<u32> {
        if self.constant {
            if self.sets.is_empty() {
                let set = self.constants()?;
                self.sets.push(set);
            }
            return Ok(0);
        }
        let (given, per_model) = self.evaluate(scopes)?;
        let key = format!("{given:?}{per_model:?}");
        if let Some(&index) = self.known.get(&key) {
            return Ok(index);
        }
        let set = self.make(&given, &per_model)?;
        if let Some(first) = self.sets.first() {
            self.check_alike(first, &set).map_err(|e| e.tensor(scopes.name))?;
        }
        self.sets.push(set);
        let index = self.sets.len() as u32 - 1;
        self.known.insert(key, index);
        Ok(index)
    }

    /// The set of this index.
    pub(super) fn get(&self, index: u32) -> &ParamSet {
        &self.sets[index as usize]
    }

    /// All sets: at least one, made of what holds for all tensors, if no tensor is merged.
    pub(super) fn finish(mut self) -> Result<(Vec<ParamSet>, BTreeSet<String>)> {
        if self.sets.is_empty() {
            let set = self.constants()?;
            self.sets.push(set);
        }
        Ok((self.sets, self.warnings))
    }

    /// The set of what is given for all tensors alike.
    fn constants(&mut self) -> Result<ParamSet> {
        let constants = |params: &Params| -> BTreeMap<String, Value> {
            let constant = params.iter().filter(|(_, setting)| setting.is_constant());
            constant.filter_map(|(name, setting)| Some((name.clone(), setting.at("", 0.0)?))).collect()
        };
        let given = constants(&self.recipe.params);
        let per_model: Vec<_> = self.recipe.models.iter().map(|m| constants(&m.params)).collect();
        if self.constant {
            for name in &self.recipe.required {
                let Some(spec) = self.method.params().iter().find(|spec| spec.name == name) else { continue };
                let lacks = |own: &BTreeMap<String, Value>| !own.contains_key(name) && !given.contains_key(name);
                match per_model.iter().position(lacks) {
                    Some(model) if spec.per_model => return Err(self.lacking(name, Some(model))),
                    _ if !spec.per_model && !given.contains_key(name) => return Err(self.lacking(name, None)),
                    _ => {}
                }
            }
        }
        self.make(&given, &per_model)
    }

    /// Passes and memory are planned for the whole merge, and a threshold over the whole model has one density.
    fn check_alike(&self, first: &ParamSet, other: &ParamSet) -> Result<()> {
        if first.merger.needs() != other.merger.needs() {
            return Err(Error::usage("parameters that decide how often the data is read differ between tensors")
                .help("elect, zero_sum and the like must be the same for all tensors"));
        }
        let rules = |set: &ParamSet| (0..set.density.len()).map(|m| set.merger.sparsify(m)).collect::<Vec<_>>();
        let differ = first.density != other.density || rules(first) != rules(other);
        if self.recipe.scope == Scope::Model && !self.method.draws() && differ {
            return Err(Error::usage("the density differs between tensors, but one threshold is for the whole model")
                .help("use scope tensor"));
        }
        Ok(())
    }

    fn make(&mut self, given: &BTreeMap<String, Value>, per_model: &[BTreeMap<String, Value>]) -> Result<ParamSet> {
        let (settings, warnings) = Settings::resolve(self.method, given, &per_model.iter().collect::<Vec<_>>())?;
        self.warnings.extend(warnings);
        let weights = match settings.per_model(self.method.weight_param()) {
            Some(weights) => weights.iter().map(|&w| w as f32).collect(),
            None => vec![1.0; self.recipe.models.len()],
        };
        let density = match self.method.trims() {
            true => settings.per_model("density").unwrap_or_default(),
            false => Vec::new(),
        };
        Ok(ParamSet { merger: self.method.prepare(&settings, self.recipe.base.is_some()), settings, weights, density })
    }

    /// The values that hold: for the merge, and for each model of the recipe (none where it takes no part).
    #[allow(clippy::type_complexity)]
    fn evaluate(&self, scopes: &Scopes<'_>) -> Result<(BTreeMap<String, Value>, Vec<BTreeMap<String, Value>>)> {
        let mut given = BTreeMap::new();
        let mut per_model = vec![BTreeMap::new(); self.recipe.models.len()];
        // Parameters that the method does not have are passed on, to be warned of.
        let outer = scopes.slice.into_iter().chain([&self.recipe.params]);
        for name in outer.clone().flat_map(|params| params.keys()) {
            let spec = self.method.params().iter().find(|spec| spec.name == name);
            if spec.is_none_or(|spec| !spec.per_model)
                && let Some(value) = first(outer.clone(), name, scopes.name, scopes.t)
            {
                given.insert(name.clone(), value);
            }
        }
        for &(model, input, own) in scopes.models {
            let all = std::iter::once(own).chain(outer.clone());
            for name in all.clone().flat_map(|params| params.keys()) {
                let spec = self.method.params().iter().find(|spec| spec.name == name);
                let own_only = spec.is_none_or(|spec| !spec.per_model);
                if own_only && !own.contains_key(name) {
                    continue;
                }
                if let Some(value) = first(all.clone(), name, input, scopes.t) {
                    per_model[model].insert(name.clone(), value);
                }
            }
        }
        self.check_required(scopes, &given, &per_model)?;
        Ok((given, per_model))
    }

    fn check_required(
        &self,
        scopes: &Scopes<'_>,
        given: &BTreeMap<String, Value>,
        per_model: &[BTreeMap<String, Value>],
    ) -> Result<()> {
        for name in &self.recipe.required {
            let Some(spec) = self.method.params().iter().find(|spec| spec.name == name) else { continue };
            let lacking = match spec.per_model {
                true => {
                    let lacks = |(model, ..): &&(usize, &str, &Params)| !per_model[*model].contains_key(name);
                    scopes.models.iter().find(lacks).map(|&(model, ..)| Some(model))
                }
                false => (!given.contains_key(name)).then_some(None),
            };
            if let Some(model) = lacking {
                return Err(self.lacking(name, model).tensor(scopes.name));
            }
        }
        Ok(())
    }

    fn lacking(&self, name: &str, model: Option<usize>) -> Error {
        let of = match model.and_then(|model| self.recipe.models.get(model)) {
            Some(input) => format!(" for model {}", printable(&input.source)),
            None => String::new(),
        };
        Error::usage(format!("{} needs the parameter {name}, which is not given{of}", self.recipe.method))
            .help("give it; in a list of filters, end with an entry that has none")
    }
}

/// The value of the innermost scope that has one for this tensor.
fn first<'a>(scopes: impl Iterator<Item = &'a Params>, name: &str, tensor: &str, t: f64) -> Option<Value> {
    scopes.filter_map(|params| params.get(name)?.at(tensor, t)).next()
}
