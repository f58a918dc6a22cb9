//! Reconciles names, shapes, types and parameters: from a recipe and headers to a plan.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use super::assembly::{Assembly, Input, Opened, Source, Target};
use super::params::{ParamTable, Scopes};
use super::request::{base_as_model, check_request};
use super::statistics::Described;
use super::{Action, ParamSet, Piece, Plan, PlannedTensor, Trim};
use super::{chat, layers, vocabulary};
use crate::checkpoint::layout::{Layout, OutputTensor};
use crate::checkpoint::{Adapters, Checkpoint, TensorEntry};
use crate::dtype::{Dtype, Float, dtype_name};
use crate::error::{Error, Result, printable};
use crate::limits::{MAX_CONFIG_BYTES, ROW_ELEMENTS};
use crate::method::{Inputs, Method, Statistics};
use crate::recipe::{Filter, Missing, Module, NonFinite, Recipe, Scope, Slice, TensorFilter};
use crate::storage::Storage;

/// Changes whenever a change of the program changes output bytes.
const NUMERIC_VERSION: u32 = 1;
/// How many names a warning or an error lists before it only counts.
const NAMES_LISTED: usize = 3;

/// Lowers `recipe`: see [`Plan::new`].
pub(super) fn build(recipe: &Recipe, storage: &Arc<dyn Storage>) -> Result<Plan> {
    build_from(recipe, storage, &mut |spec, beside| Checkpoint::open_beside(spec, beside, storage))
}

/// Lowers `recipes`, opening what they name alike once.
pub(super) fn build_all(recipes: &[Recipe], storage: &Arc<dyn Storage>) -> Result<Vec<Plan>> {
    let mut opened: HashMap<(String, Option<String>), Checkpoint> = HashMap::new();
    let mut open = |spec: &str, beside: Option<&Checkpoint>| {
        let key = (spec.to_owned(), beside.map(|base| base.spec.clone()));
        if let Some(known) = opened.get(&key) {
            return Ok(known.clone());
        }
        let checkpoint = Checkpoint::open_beside(spec, beside, storage)?;
        opened.insert(key, checkpoint.clone());
        Ok(checkpoint)
    };
    recipes.iter().map(|recipe| build_from(recipe, storage, &mut open)).collect()
}

/// Opens the checkpoint that is called so, with a base at hand for packed task vectors.
type Open<'a> = &'a mut dyn FnMut(&str, Option<&Checkpoint>) -> Result<Checkpoint>;

fn build_from(recipe: &Recipe, storage: &Arc<dyn Storage>, open_one: Open<'_>) -> Result<Plan> {
    let method = recipe.method()?;
    let recipe = &base_as_model(recipe, method);
    let adapters = adapters(recipe, method, storage).map_err(Error::as_input)?;
    check_request(recipe, adapters.is_some())?;
    // Whatever keeps an input from being opened, nothing has been written yet.
    match adapters {
        None => lower(recipe, open(recipe, open_one).map_err(Error::as_input)?, false, storage),
        Some(Adapters::Tensors(adapters)) => lower(recipe, adapters, true, storage),
        Some(Adapters::Changes(changes)) => {
            let exact = Recipe { dtype: Some(Float::F32), rank: None, ..recipe.clone() };
            let merged = lower(&exact, changes.checkpoints.clone(), true, storage)?;
            let mut output = lower(recipe, changes.checkpoints.clone(), true, storage)?;
            output.warnings.extend(changes.warnings.iter().cloned());
            output.factored(merged, changes)
        }
    }
}

/// The plan for opened checkpoints; `adapter` says that they are adapters, before which base is if the method needs one.
fn lower(recipe: &Recipe, mut checkpoints: Vec<Checkpoint>, adapter: bool, storage: &Arc<dyn Storage>) -> Result<Plan> {
    let method = recipe.method()?;
    let filter = recipe.filter()?;
    let base = (recipe.base.is_some() || adapter && method.needs_base()).then_some(0);
    let first_model = usize::from(base.is_some());
    let oracle = recipe.sign_from.is_some().then_some(first_model + recipe.models.len());
    let mut warnings = Vec::new();
    for checkpoint in &checkpoints {
        warnings.extend(checkpoint.warnings.iter().cloned());
    }

    let tokenizer = vocabulary::reconcile(recipe, &mut checkpoints, &**storage, &mut warnings)?;
    let chat_template = chat::template(recipe, &checkpoints, &**storage, &mut warnings)?;
    let opened = Opened { recipe, checkpoints: &checkpoints, base, first_model };
    let Assembly { targets, layers, warnings: assembled } = opened.assemble(&**storage)?;
    warnings.extend(assembled);
    let reconciler = Reconciler {
        recipe,
        filter,
        opened,
        checkpoints: &checkpoints,
        base,
        first_model,
        oracle,
        statistics: method.statistics(),
    };
    let mut table = ParamTable::new(recipe)?;
    let (tensors, described) = reconciler.tensors(&targets, &mut table, &mut warnings)?;
    if recipe.slices.is_empty() && recipe.modules.is_empty() {
        reconciler.report_leftovers(&targets, &mut warnings)?;
    }
    reconciler.report_idle_globs(&mut warnings)?;
    reconciler.report_idle_filters(&targets, &mut warnings);
    drop(targets);
    let named = checkpoints.len();
    checkpoints.extend(described.solutions(&checkpoints[first_model], &checkpoints));
    let (params, unused) = table.finish()?;
    warnings.extend(unused);
    let trims = params.iter().flat_map(|set| &set.density).any(|&k| k < 1.0);
    if trims && !method.draws() && recipe.scope == Scope::Model && !params[0].merger.needs().looks.is_empty() {
        return Err(Error::usage("rescale l1 is per tensor, but one threshold is for the whole model")
            .help("use --scope tensor (in a recipe file: scope: tensor)"));
    }
    let trim = trims.then_some(Trim { threshold: recipe.threshold, ties: recipe.trim_ties });

    let float = recipe.dtype.or_else(|| commonest_float(&tensors));
    let cropped = || cropped_rows(&tensors, &checkpoints[base.unwrap_or(first_model)]);
    let vocabulary = tokenizer.as_ref().map(|tokenizer| tokenizer.rows).or_else(cropped);
    let layout = match adapter {
        true => Layout::adapter(tensors.iter().map(output_tensor))?,
        false => Layout::new(tensors.iter().map(output_tensor), recipe.max_shard_bytes)?,
    };
    let fingerprints = [true, false].map(|timed| fingerprint(recipe, &checkpoints, &params, &tensors, timed));
    let [fingerprint, untimed_fingerprint] = fingerprints;
    let parsed_bytes = parsed_bytes(&checkpoints, chat_template.is_some(), &**storage)?;
    Ok(Plan {
        places: recipe.sources().map(|spec| (spec.to_owned(), Checkpoint::place(spec, &**storage))).collect(),
        recipe: recipe.clone(),
        method,
        params,
        trim,
        scope: recipe.scope,
        non_finite: recipe.non_finite,
        overflow: recipe.overflow,
        seed: recipe.seed,
        base,
        first_model,
        oracle,
        tensors,
        layout,
        layers,
        vocabulary,
        tokenizer,
        chat_template,
        parsed_bytes,
        float,
        packing: None,
        warnings,
        fingerprint,
        untimed_fingerprint,
        named,
        adapter,
        factors: None,
        checkpoints,
    })
}

/// The adapters that are merged with each other, after the base of their task vectors, if that is asked for: no model
/// is given besides.
fn adapters(recipe: &Recipe, method: &dyn Method, storage: &Arc<dyn Storage>) -> Result<Option<Adapters>> {
    let besides =
        recipe.models.iter().any(|model| Statistics::ALL.iter().any(|&kind| model.statistics(kind).is_some()));
    let in_parts = !recipe.slices.is_empty() || !recipe.modules.is_empty();
    if recipe.base.is_some() || in_parts || recipe.sign_from.is_some() || besides {
        return Ok(None);
    }
    let specs: Vec<&str> = recipe.models.iter().map(|model| &*model.source).collect();
    Checkpoint::open_adapters(&specs, method.needs_base(), recipe.rank, storage)
}

/// Opens base, models, oracle and what models have besides, in that order.
fn open(recipe: &Recipe, open_one: Open<'_>) -> Result<Vec<Checkpoint>> {
    // An adapter alone is one on base; a packed task vector needs the base that it was packed against.
    let base = recipe.base.as_ref().map(|spec| open_one(spec, None)).transpose()?;
    let packed_base = recipe.packed_base.as_ref().filter(|_| base.is_none());
    let packed_base = packed_base.map(|spec| open_one(spec, None)).transpose()?;
    let beside = base.as_ref().or(packed_base.as_ref());
    let kind = recipe.method()?.statistics();
    let others = recipe.models.iter().map(|m| &m.source).chain(&recipe.sign_from).map(|spec| (spec, beside));
    let statistics = recipe.models.iter().filter_map(|model| Some((model.statistics(kind?)?, None)));
    let others = others.chain(statistics).map(|(spec, beside)| open_one(spec, beside)).collect::<Result<Vec<_>>>()?;
    // A difference to another base is not what was trimmed and packed.
    let measured = beside.filter(|_| packed_base.is_some() || recipe.method().is_ok_and(Method::needs_base));
    if let (Some(base), Some(other)) = (measured, others.iter().find(|other| other.derived.other_base)) {
        return Err(Error::input(format!("packed against another base than {}", printable(&base.spec)))
            .at(Path::new(&other.spec))
            .help("give that one as --base, or unpack the file first to take it as a model like any other"));
    }
    Ok(base.into_iter().chain(others).collect())
}

/// Length of the longest of the configurations that are parsed.
fn parsed_bytes(checkpoints: &[Checkpoint], templates: bool, storage: &dyn Storage) -> Result<u64> {
    let names = ["config.json", "tokenizer_config.json"];
    let mut longest = 0;
    for path in checkpoints.iter().flat_map(|c| names[..1 + usize::from(templates)].iter().map(|name| c.dir.join(name)))
    {
        let bytes = storage.identity(&path)?.map_or(0, |identity| identity.bytes);
        longest = longest.max(bytes.min(MAX_CONFIG_BYTES));
    }
    Ok(longest)
}

pub(super) fn output_tensor(tensor: &PlannedTensor) -> OutputTensor<'_> {
    OutputTensor { name: &tensor.name, dtype: tensor.dtype, shape: &tensor.shape }
}

/// The number of rows of the output's vocabulary, if the template has another.
fn cropped_rows(tensors: &[PlannedTensor], template: &Checkpoint) -> Option<u64> {
    tensors.iter().filter(|t| layers::is_vocabulary(&t.name)).find_map(|tensor| {
        let before = template.get(&tensor.name)?.shape.first()?;
        tensor.shape.first().filter(|now| *now != before).copied()
    })
}

fn commonest_float(tensors: &[PlannedTensor]) -> Option<Float> {
    let mut elements: HashMap<Float, u64> = HashMap::new();
    for tensor in tensors {
        if let Some(float) = Float::from_dtype(tensor.dtype) {
            *elements.entry(float).or_default() += tensor.elements;
        }
    }
    elements.into_iter().max_by_key(|&(float, n)| (n, float)).map(|(float, _)| float)
}

/// BLAKE3 over everything that decides output bytes, as far as it is known without reading tensor data. What is not `timed`
/// leaves out when inputs were modified.
fn fingerprint(
    recipe: &Recipe,
    checkpoints: &[Checkpoint],
    params: &[ParamSet],
    tensors: &[PlannedTensor],
    timed: bool,
) -> String {
    // What a checkpoint is called says nothing about its content, so a moved input keeps the fingerprint.
    let mut nameless = recipe.clone();
    nameless.base = nameless.base.map(|_| String::new());
    nameless.sign_from = nameless.sign_from.map(|_| String::new());
    nameless.models.iter_mut().for_each(|model| model.rename(|_| String::new()));
    let mut hasher = blake3::Hasher::new();
    hasher.update(&NUMERIC_VERSION.to_le_bytes());
    hasher.update(serde_json::to_string(&nameless).expect("a recipe is plain data").as_bytes());
    for checkpoint in checkpoints {
        hasher.update(&(checkpoint.files.len() as u64).to_le_bytes());
        for file in &checkpoint.files {
            let identity = file.file.identity();
            hasher.update(&file.header_hash);
            hasher.update(&identity.bytes.to_le_bytes());
            if timed {
                hasher.update(&identity.mtime_ns.to_le_bytes());
            }
        }
    }
    // Where parameters go by layers, and slices by stacks, `config.json` has its say too.
    if params.len() > 1 || recipe.assembles_layers() {
        for tensor in tensors {
            hasher.update(&(tensor.name.len() as u64).to_le_bytes());
            hasher.update(tensor.name.as_bytes());
            let settings = serde_json::to_string(&params[tensor.params as usize].settings);
            hasher.update(settings.expect("settings are plain data").as_bytes());
        }
    }
    hasher.finalize().to_hex().to_string()
}

/// Joins the catalogues.
pub(super) struct Reconciler<'a> {
    pub(super) recipe: &'a Recipe,
    pub(super) filter: TensorFilter,
    pub(super) opened: Opened<'a>,
    pub(super) checkpoints: &'a [Checkpoint],
    pub(super) base: Option<usize>,
    pub(super) first_model: usize,
    pub(super) oracle: Option<usize>,
    pub(super) statistics: Option<Statistics>,
}

/// What becomes of a target.
struct Decided {
    action: Action,
    params: u32,
    shape: Box<[u64]>,
}

/// One party's lack of a usable tensor.
pub(super) struct Lack {
    pub(super) who: String,
    pub(super) why: String,
}

impl Reconciler<'_> {
    fn template(&self) -> usize {
        self.base.unwrap_or(self.first_model)
    }

    fn model_checkpoint(&self, model: usize) -> usize {
        self.first_model + model
    }

    /// What users call checkpoint `index`.
    pub(super) fn role(&self, index: usize) -> String {
        let spec = printable(&self.checkpoints[index].spec);
        match index {
            i if Some(i) == self.base => format!("base ({spec})"),
            i if Some(i) == self.oracle => format!("sign checkpoint ({spec})"),
            i if i >= self.first_statistics() => {
                let kind = self.statistics.map_or("", Statistics::name);
                format!("{kind} of model {} ({spec})", i - self.first_statistics() + 1)
            }
            i => format!("model {} ({spec})", i - self.first_model + 1),
        }
    }

    /// The output tensors.
    fn tensors(
        &self,
        targets: &[Target<'_>],
        table: &mut ParamTable<'_>,
        warnings: &mut Vec<String>,
    ) -> Result<(Vec<PlannedTensor>, Described)> {
        if self.recipe.slices.is_empty() && self.recipe.modules.is_empty() {
            self.check_common_names(&self.checkpoints[self.template()])?;
        }
        let (mut differing, mut cropped, mut described) = (Vec::new(), Vec::new(), Described::default());
        let mut tensors = Vec::with_capacity(targets.len());
        for target in targets {
            let (entry, tensor) = self.find(&target.template).expect("a template exists");
            let Decided { action, params, shape } =
                self.action(entry, tensor, target, table, &mut differing, &mut described)?;
            if shape != tensor.shape {
                cropped.push(format!("\"{}\" from {:?} to {shape:?}", printable(&target.name), tensor.shape));
            }
            let dtype = match (self.recipe.dtype, Float::from_dtype(tensor.dtype)) {
                (Some(float), Some(_)) => float.dtype(),
                _ => self.checkpoints[target.template.checkpoint].output_dtype(tensor),
            };
            tensors.push(PlannedTensor {
                name: (*target.name).into(),
                elements: shape.iter().product(),
                shape,
                dtype,
                action,
                params,
            });
        }
        if !differing.is_empty() {
            let count = differing.len();
            warnings.push(format!("{count} tensors are not merged everywhere: {}", list(&differing)));
        }
        self.report_plain(&described.plain, &tensors, warnings)?;
        if !cropped.is_empty() {
            let text =
                format!("the vocabularies differ in size, and rows that not all have are cropped: {}", list(&cropped));
            warnings.push(text);
        }
        self.report_longer(targets, &tensors, warnings);
        Ok((tensors, described))
    }

    fn find(&self, input: &Input<'_>) -> Option<(u32, &TensorEntry)> {
        self.opened.find(input.checkpoint, &input.name)
    }

    /// A set of checkpoints that share no name is a mistake whatever `--missing` says.
    fn check_common_names(&self, template: &Checkpoint) -> Result<()> {
        for model in 0..self.recipe.models.len() {
            let checkpoint = &self.checkpoints[self.model_checkpoint(model)];
            if !template.tensors.is_empty() && !template.tensors.iter().any(|t| checkpoint.get(&t.name).is_some()) {
                let example = |c: &Checkpoint| c.tensors.first().map_or("nothing".into(), |t| printable(&t.name));
                return Err(Error::input(format!(
                    "{} has no tensor in common with {}: {} tensors like \"{}\" against {} like \"{}\"",
                    self.role(self.model_checkpoint(model)),
                    self.role(self.template()),
                    checkpoint.tensors.len(),
                    example(checkpoint),
                    template.tensors.len(),
                    example(template),
                ))
                .help("merge fine-tunes of one base model"));
            }
        }
        Ok(())
    }

    /// What is done to `target`, whose template is `tensor`, and the index of its parameters.
    fn action(
        &self,
        entry: u32,
        tensor: &TensorEntry,
        target: &Target<'_>,
        table: &mut ParamTable<'_>,
        differing: &mut Vec<String>,
        described: &mut Described,
    ) -> Result<Decided> {
        let template = target.template.checkpoint;
        let source = Piece { checkpoint: template as u32, entry };
        let decided = |action, params, shape: &[u64]| Ok(Decided { action, params, shape: shape.into() });
        let copy = |compared| decided(Action::Copy { source, compared }, 0, &tensor.shape);
        if !self.filter.merges(&target.name) {
            return copy(Box::default());
        }
        if Float::from_dtype(tensor.dtype).is_none() {
            return copy(self.comparable(tensor, target, differing));
        }
        let scopes: Vec<_> = target.sources.iter().map(|s| (s.model, &*s.name, s.params)).collect();
        let scopes = Scopes { name: &target.name, t: target.t, slice: target.slice, models: &scopes };
        let params = table.index(&scopes)?;
        let inputs = table.get(params).merger.needs().inputs;
        let shape = &*self.common_shape(target, tensor, inputs);
        let columns = || shape.iter().skip(1).product::<u64>();
        if table.get(params).merger.needs().columns && columns() > ROW_ELEMENTS {
            return Err(Error::usage(format!(
                "{} columns, but at most {ROW_ELEMENTS} can be merged one by one",
                columns()
            ))
            .tensor(&target.name)
            .help("leave it out with --exclude, or set nuslerp_row_wise to false"));
        }
        let mut models = Vec::with_capacity(target.sources.len());
        let mut lacks = Vec::new();
        for Source { model, name, .. } in &target.sources {
            match self.usable(self.model_checkpoint(*model), name, shape) {
                Ok(piece) => models.push((*model as u32, piece)),
                Err(lack) => lacks.push(lack),
            }
        }
        let set = table.get(params);
        if let ([(model, piece)], true) = (&models[..], lacks.is_empty())
            && set.merger.is_copy(set.weights[*model as usize])
        {
            return decided(Action::Copy { source: *piece, compared: Box::default() }, params, shape);
        }
        self.refuse_quantised(&self.checkpoints[template], tensor)?;
        let oracle = match self.oracle.map(|index| self.usable(index, &target.name, shape)) {
            None => None,
            Some(Ok(piece)) => Some(piece),
            Some(Err(lack)) => {
                lacks.push(lack);
                // Without its signs there is no election to fall back on.
                models.clear();
                None
            }
        };
        let needs_base = inputs != Inputs::Weights || self.recipe.non_finite == NonFinite::CopyBase;
        let mut base = None;
        if let (true, Some(input)) = (needs_base, &target.base) {
            match self.usable(input.checkpoint, &input.name, shape) {
                Ok(piece) => base = Some(piece),
                Err(lack) => {
                    lacks.push(lack);
                    models.clear();
                }
            }
        }
        if !lacks.is_empty() {
            if self.recipe.missing == Missing::Error {
                return Err(self.lacking(template, tensor, &lacks));
            }
            differing.push(format!("\"{}\" ({} {})", printable(&target.name), lacks[0].who, lacks[0].why));
        }
        if models.is_empty() || (!lacks.is_empty() && self.recipe.missing == Missing::Base) {
            return copy(Box::default());
        }
        self.check_weight_sum(tensor, &models, set)?;
        let statistics = self.statistics_of(target, tensor, &models, shape)?;
        if statistics.is_empty() && self.statistics.is_some() {
            described.plain.push(format!("\"{}\"", printable(&target.name)));
        }
        if let (Some(Statistics::Gram), false) = (self.statistics, statistics.is_empty()) {
            let solution = described.solve(self, tensor, &models, &statistics, set.settings.number("alpha"));
            let (models, statistics) = ([(0, solution)].into(), Box::default());
            return decided(Action::Merge { base: None, models, oracle: None, statistics }, params, shape);
        }
        decided(Action::Merge { base, models: models.into(), oracle, statistics }, params, shape)
    }

    /// The shape of `target`'s output: the template's, unless vocabularies may be cropped. Then base decides how many rows
    /// a task vector has, and the shortest model how many there are to average.
    fn common_shape(&self, target: &Target<'_>, tensor: &TensorEntry, inputs: Inputs) -> Box<[u64]> {
        let mut shape = tensor.shape.clone();
        if !self.is_croppable(&target.name, &shape) || inputs != Inputs::Weights {
            return shape;
        }
        let rows = |source: &Source<'_>| {
            let (_, other) = self.opened.find(self.model_checkpoint(source.model), &source.name)?;
            (other.shape.len() == 2).then(|| other.shape[0])
        };
        shape[0] = target.sources.iter().filter_map(rows).min().unwrap_or(shape[0]);
        shape
    }

    fn is_croppable(&self, name: &str, shape: &[u64]) -> bool {
        self.recipe.crop_vocabulary && shape.len() == 2 && layers::is_vocabulary(name)
    }

    /// Says which models have rows that the output does not.
    fn report_longer(&self, targets: &[Target<'_>], tensors: &[PlannedTensor], warnings: &mut Vec<String>) {
        for (target, planned) in targets.iter().zip(tensors).filter(|(t, p)| self.is_croppable(&t.name, &p.shape)) {
            for source in &target.sources {
                let index = self.model_checkpoint(source.model);
                let Some((_, other)) = self.opened.find(index, &source.name) else { continue };
                if other.shape.len() == 2 && other.shape[0] > planned.shape[0] {
                    warnings.push(format!(
                        "\"{}\": {} has {} rows, of which the first {} are merged",
                        printable(&target.name),
                        self.role(index),
                        other.shape[0],
                        planned.shape[0]
                    ));
                }
            }
        }
    }

    /// The other models' versions of a tensor that is only copied, as far as they can be compared byte for byte.
    fn comparable(&self, tensor: &TensorEntry, target: &Target<'_>, differing: &mut Vec<String>) -> Box<[Piece]> {
        let mut pieces = Vec::new();
        for source in &target.sources {
            let index = self.model_checkpoint(source.model);
            if index == target.template.checkpoint {
                continue;
            }
            match self.opened.find(index, &source.name) {
                Some((entry, other)) if other.dtype == tensor.dtype && other.shape == tensor.shape => {
                    pieces.push(Piece { checkpoint: index as u32, entry });
                }
                Some((_, other)) => differing.push(format!(
                    "\"{}\" ({} has {} {:?}, copied is {} {:?})",
                    printable(&tensor.name),
                    self.role(index),
                    dtype_name(other.dtype),
                    other.shape,
                    dtype_name(tensor.dtype),
                    tensor.shape,
                )),
                None => {}
            }
        }
        pieces.into()
    }

    /// Tensor `name` in checkpoint `index`, if it can be merged with tensors of `shape`.
    pub(super) fn usable(&self, index: usize, name: &str, shape: &[u64]) -> Result<Piece, Lack> {
        let lack = |why: String| Lack { who: self.role(index), why };
        let (entry, other) = self.opened.find(index, name).ok_or_else(|| lack("does not have it".into()))?;
        let longer =
            other.shape.len() == 2 && shape.len() == 2 && other.shape[0] >= shape[0] && other.shape[1] == shape[1];
        if *other.shape != *shape && !(longer && self.is_croppable(name, shape)) {
            return Err(lack(format!("has shape {:?}", other.shape)));
        }
        if Float::from_dtype(other.dtype).is_none() {
            return Err(lack(format!("has type {}, which cannot be merged", dtype_name(other.dtype))));
        }
        Ok(Piece { checkpoint: index as u32, entry })
    }

    fn lacking(&self, template: usize, tensor: &TensorEntry, lacks: &[Lack]) -> Error {
        let parties: Vec<_> = lacks.iter().map(|l| format!("{} {}", l.who, l.why)).collect();
        Error::input(format!(
            "{} has it with shape {:?}, but {}",
            self.role(template),
            tensor.shape,
            list(&parties)
        ))
        .at(self.checkpoints[template].path_of(tensor))
        .tensor(&tensor.name)
        .help("--missing base keeps base's tensor, --missing skip merges the models that have it, --exclude leaves it out")
    }

    fn check_weight_sum(&self, tensor: &TensorEntry, models: &[(u32, Piece)], set: &ParamSet) -> Result<()> {
        let sum: f32 = models.iter().map(|&(model, _)| set.weights[model as usize]).sum();
        if set.merger.divides_by_weights() && (sum == 0.0 || !sum.is_finite()) {
            return Err(Error::usage(format!("the models' weights sum to {sum}, so there is no average"))
                .tensor(&tensor.name)
                .help("use weights with another sum, or task_arithmetic"));
        }
        Ok(())
    }

    /// A quantised checkpoint's 8-bit floats mean nothing without their scales.
    fn refuse_quantised(&self, template: &Checkpoint, tensor: &TensorEntry) -> Result<()> {
        if !matches!(tensor.dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2) {
            return Ok(());
        }
        for suffix in ["_scale", "_scale_inv", ".scale"] {
            let companion = format!("{}{suffix}", tensor.name);
            if template.get(&companion).is_some() {
                return Err(Error::input(format!(
                    "8-bit floats with a separate scale (\"{}\"): quantised checkpoints cannot be merged",
                    printable(&companion)
                ))
                .at(template.path_of(tensor))
                .tensor(&tensor.name)
                .help("convert the checkpoint to bfloat16 first"));
            }
        }
        Ok(())
    }

    /// Tensors that only models have do not reach the output: that is said, and refused where there is no base to
    /// decide what the output holds.
    fn report_leftovers(&self, targets: &[Target<'_>], warnings: &mut Vec<String>) -> Result<()> {
        let written: HashSet<&str> = targets.iter().map(|target| &*target.name).collect();
        for model in 0..self.recipe.models.len() {
            let index = self.model_checkpoint(model);
            let mut count = 0;
            let mut names = Vec::new();
            for tensor in self.checkpoints[index].tensors.iter().filter(|t| !written.contains(&*t.name)) {
                count += 1;
                if names.len() < NAMES_LISTED {
                    names.push(format!("\"{}\"", printable(&tensor.name)));
                }
            }
            if count == 0 {
                continue;
            }
            let text = format!(
                "{} has {count} tensors that {} lacks: {}{}",
                self.role(index),
                self.role(self.template()),
                names.join(", "),
                if count > names.len() { ", ..." } else { "" }
            );
            if self.base.is_none() && self.recipe.missing == Missing::Error {
                return Err(Error::input(text).help("give --base, or --missing skip to leave them out"));
            }
            warnings.push(format!("{text}; they are left out"));
        }
        Ok(())
    }

    fn report_idle_globs(&self, warnings: &mut Vec<String>) -> Result<()> {
        let template = &self.checkpoints[self.template()];
        let flags = [("--include", &self.recipe.include), ("--exclude", &self.recipe.exclude)];
        for (flag, pattern) in flags.iter().flat_map(|(flag, list)| list.iter().map(move |p| (flag, p))) {
            let alone = Recipe { include: vec![pattern.clone()], ..Recipe::default() }.filter()?;
            if !template.tensors.iter().any(|t| alone.merges(&t.name)) {
                warnings.push(format!("{flag} {pattern:?} matches no tensor of {}", self.role(self.template())));
            }
        }
        Ok(())
    }

    /// A filter that is for no tensor is most likely misspelt.
    fn report_idle_filters(&self, targets: &[Target<'_>], warnings: &mut Vec<String>) {
        let mut filters: Vec<&Filter> = Vec::new();
        let recipe = self.recipe;
        let slices = recipe.slices.iter().flat_map(Slice::all_params);
        let slices = slices.chain(recipe.modules.iter().flat_map(Module::all_params));
        let models = recipe.models.iter().map(|model| &model.params);
        for setting in std::iter::once(&recipe.params).chain(models).chain(slices).flat_map(|params| params.values()) {
            setting.filters(&mut |filter| {
                if !filters.contains(&filter) {
                    filters.push(filter);
                }
            });
        }
        for filter in filters {
            let inputs = |t: &Target<'_>| t.sources.iter().any(|source| filter.matches(&source.name));
            if !targets.iter().any(|target| filter.matches(&target.name) || inputs(target)) {
                warnings.push(format!("the filter {:?} matches no tensor", printable(filter.text())));
            }
        }
    }
}

/// The first few of `texts`, and how many more there are.
pub(super) fn list(texts: &[String]) -> String {
    let shown = texts.iter().take(NAMES_LISTED).cloned().collect::<Vec<_>>().join("; ");
    match texts.len().saturating_sub(NAMES_LISTED) {
        0 => shown,
        more => format!("{shown}; and {more} more"),
    }
}
