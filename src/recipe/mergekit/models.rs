//! `models`, `slices` and `modules`: which checkpoints take part, and with which parameters.

use super::node::{Content, Node, Place};
use super::reader::{Fields, Reader};
use super::settings::{Scope, Settings};
use crate::error::{Result, printable};
use crate::limits::MAX_MODELS;
use crate::recipe::{BaseLayers, LayerSource, ModelInput, Params, Recipe, Slice};

/// Longest accepted `slices` list: more layers than any model has.
const MAX_SLICES: usize = 10_000;
/// Largest accepted number of a layer.
const MAX_LAYER: u64 = 1_000_000;

/// A checkpoint as a recipe names it.
pub(super) fn model_ref(reader: Reader<'_>, node: &Node, what: &str) -> Result<String> {
    named(reader, node, what, &mut Vec::new())
}

/// The same; if it is said to have another architecture than its `config.json` names, that is noted.
pub(super) fn named(
    reader: Reader<'_>,
    node: &Node,
    what: &str,
    architectures: &mut Vec<(String, String)>,
) -> Result<String> {
    let Content::Map(_) = &node.content else {
        return Ok(reader.text(node, what)?.to_owned());
    };
    let fields = reader.fields(node, what, &["model", "lora", "override_architecture"])?;
    let model = fields.get("model").ok_or_else(|| reader.fail(node.place, format!("{what} without 'model'")))?;
    let mut name = located(reader, model, what)?;
    if let Some(lora) = fields.get("lora") {
        name = format!("{name}+{}", located(reader, lora, "lora")?);
    }
    if let Some(node) = fields.get("override_architecture") {
        architectures.push((name.clone(), reader.text(node, "override_architecture")?.to_owned()));
    }
    Ok(name)
}

/// A checkpoint or an adapter by its path, which may have a revision.
fn located(reader: Reader<'_>, node: &Node, what: &str) -> Result<String> {
    let Content::Map(_) = &node.content else { return model_ref(reader, node, what) };
    let parts = reader.fields(node, what, &["path", "revision"])?;
    let path = parts.get("path").ok_or_else(|| reader.fail(node.place, format!("{what} without 'path'")))?;
    let path = reader.text(path, "path")?;
    Ok(match parts.get("revision") {
        Some(revision) => format!("{path}@{}", reader.text(revision, "revision")?),
        None => path.to_owned(),
    })
}

/// Reads `models` or `slices` of a document into a recipe.
pub(super) struct Inputs<'a> {
    pub settings: Settings<'a>,
    pub recipe: Recipe,
    pub warnings: Vec<String>,
    /// Checkpoints that are said to have another architecture than they say themselves.
    pub architectures: Vec<(String, String)>,
}

impl<'a> Inputs<'a> {
    pub(super) fn reader(&self) -> Reader<'a> {
        self.settings.reader
    }

    pub(super) fn params(&mut self, fields: &Fields<'_>, scope: Scope) -> Result<Params> {
        let mut params = Params::new();
        if let Some(node) = fields.get("parameters") {
            self.settings.read(node, scope, &mut params, &mut self.warnings)?;
        }
        Ok(params)
    }

    /// `models`: whole models.
    pub(super) fn models(&mut self, node: &Node) -> Result<()> {
        for (model, place) in self.listed(node)? {
            self.recipe.models.push(model);
            self.check_count(place)?;
        }
        match self.recipe.models.is_empty() {
            true => Err(self.reader().fail(node.place, "no model but base").help("list the models to merge")),
            false => Ok(()),
        }
    }

    /// The entries of a list of models, but for base where that is no model.
    pub(super) fn listed(&mut self, node: &Node) -> Result<Vec<(ModelInput, Place)>> {
        let items = self.reader().list(node, "models")?;
        let (mut models, mut seen) = (Vec::new(), Vec::new());
        for item in items {
            let fields = self.reader().fields(item, "a model", &["model", "parameters", "fisher", "gram"])?;
            let source = self.source(&fields)?;
            self.refuse_twice(&mut seen, &source, fields.place)?;
            let params = self.params(&fields, Scope::Model)?;
            if self.is_only_base(&source, self.recipe.base.as_deref()) {
                continue;
            }
            let own = |key| fields.get(key).map(|node| model_ref(self.reader(), node, key)).transpose();
            let (fisher, gram) = (own("fisher")?, own("gram")?);
            models.push((ModelInput { source, params, fisher, gram }, item.place));
        }
        Ok(models)
    }

    /// A method on task vectors has no use for the difference of base to itself.
    fn is_only_base(&self, source: &str, base: Option<&str>) -> bool {
        self.settings.method.needs_base() && base == Some(source)
    }

    fn source(&mut self, fields: &Fields<'_>) -> Result<String> {
        let Some(node) = fields.get("model") else {
            return Err(self.reader().fail(fields.place, "an entry without 'model'").help("write '- model: CKPT'"));
        };
        named(self.reader(), node, "model", &mut self.architectures)
    }

    fn refuse_twice(&self, seen: &mut Vec<(String, Place)>, source: &str, at: Place) -> Result<()> {
        if let Some((_, first)) = seen.iter().find(|(known, _)| known == source) {
            let text = format!("model \"{}\" comes twice, first in line {}", printable(source), first.line);
            return Err(self.reader().fail(at, text).help("give it once, with one weight"));
        }
        seen.push((source.to_owned(), at));
        Ok(())
    }

    fn check_count(&self, at: Place) -> Result<()> {
        match self.recipe.models.len() > MAX_MODELS {
            true => Err(self.reader().fail(at, format!("more than {MAX_MODELS} models")).help("merge in groups")),
            false => Ok(()),
        }
    }

    /// `slices`: layers of models.
    pub(super) fn slices(&mut self, node: &Node) -> Result<Vec<Slice>> {
        let items = self.reader().list(node, "slices")?;
        if items.len() > MAX_SLICES {
            return Err(self.reader().fail(node.place, format!("{} slices, but at most {MAX_SLICES}", items.len())));
        }
        items.iter().map(|item| self.slice(item)).collect()
    }

    fn slice(&mut self, node: &Node) -> Result<Slice> {
        let known = ["sources", "base_model", "parameters", "residual_weight"];
        let fields = self.reader().fields(node, "a slice", &known)?;
        if let Some(value) = fields.get("residual_weight") {
            let spot = self.reader().spot(value.place);
            self.warnings.push(format!("{spot}: residual_weight has no effect, as in mergekit"));
        }
        let base = match fields.get("base_model") {
            Some(node) => Some(named(self.reader(), node, "base_model", &mut self.architectures)?),
            None => self.recipe.base.clone(),
        };
        let params = self.params(&fields, Scope::Shared)?;
        let Some(sources) = fields.get("sources") else {
            return Err(self.reader().fail(fields.place, "a slice without 'sources'"));
        };
        let mut slice = Slice { params, ..Slice::default() };
        let (mut seen, mut base_first) = (Vec::new(), None);
        for item in self.reader().list(sources, "sources")? {
            let fields = self.reader().fields(item, "a source", &["model", "layer_range", "parameters"])?;
            let source = self.source(&fields)?;
            self.refuse_twice(&mut seen, &source, fields.place)?;
            let (place, first, layers) = self.layer_range(&fields)?;
            if seen.len() > 1 && layers != slice.layers {
                let text = format!("{layers} layers, but the slice's first source has {}", slice.layers);
                return Err(self.reader().fail(place, text).help("all sources of a slice have as many layers"));
            }
            slice.layers = layers;
            let params = self.params(&fields, Scope::Model)?;
            if self.is_only_base(&source, base.as_deref()) {
                base_first = Some(first);
                continue;
            }
            let place = Some(self.reader().spot(place));
            let model = self.model(source, item.place)?;
            slice.sources.push(LayerSource { model, first, params, place });
        }
        if slice.sources.is_empty() {
            return Err(self.reader().fail(sources.place, "no source but base").help("list the models to merge"));
        }
        if let Some(base) = base.filter(|_| self.settings.method.needs_base()) {
            slice.base = Some(self.base_layers(&slice, base, base_first, node.place)?);
        }
        Ok(slice)
    }

    /// Where base's layers begin: as it says as a source, or as all sources say.
    fn base_layers(&mut self, slice: &Slice, base: String, first: Option<u64>, at: Place) -> Result<BaseLayers> {
        let agreed = slice.sources[0].first;
        let first = match first {
            Some(first) => first,
            None if slice.sources.iter().all(|source| source.first == agreed) => agreed,
            None => {
                return Err(self
                    .reader()
                    .fail(at, "the sources begin at different layers, so it is not clear which of base's are meant")
                    .help("list base_model as a source with its layer_range"));
            }
        };
        let model = match self.recipe.base.as_ref() == Some(&base) {
            true => None,
            false => Some(self.model(base, at)?),
        };
        Ok(BaseLayers { model, first })
    }

    /// The index of the model called `source`, which is added if it is new.
    pub(super) fn model(&mut self, source: String, at: Place) -> Result<usize> {
        if let Some(index) = self.recipe.models.iter().position(|model| model.source == source) {
            return Ok(index);
        }
        self.recipe.models.push(ModelInput { source, ..ModelInput::default() });
        self.check_count(at)?;
        Ok(self.recipe.models.len() - 1)
    }

    /// The place, first layer and number of layers of a source.
    fn layer_range(&self, fields: &Fields<'_>) -> Result<(Place, u64, u64)> {
        let reader = self.reader();
        let Some(node) = fields.get("layer_range") else {
            return Err(reader.fail(fields.place, "a source without 'layer_range'").help("write layer_range: [0, 8]"));
        };
        let bounds = reader.list(node, "layer_range")?;
        let [start, end] = bounds else {
            let text = format!("layer_range has {} numbers, but needs two", bounds.len());
            return Err(reader.fail(node.place, text).help("write layer_range: [START, END]"));
        };
        let (start, end) = (reader.whole(start, "a layer")?, reader.whole(end, "a layer")?);
        if start >= end || end > MAX_LAYER {
            let text = format!("layer_range [{start}, {end}] holds no layer, or too many");
            return Err(reader.fail(node.place, text).help("the end is not included: [0, 8] are eight layers"));
        }
        Ok((node.place, start, end - start))
    }
}
