//! A recipe before anything is opened: what it means where base is one of the models, and what makes no sense whatever
//! the checkpoints hold.

use super::statistics;
use crate::error::{Error, Result};
use crate::limits::MAX_MODELS;
use crate::method::Method;
use crate::recipe::{ModelInput, ModuleModel, NonFinite, Recipe, Slice};

/// The recipe with base as the first of two models, where the method means that: as one of them, or beside a single one.
pub(super) fn base_as_model(recipe: &Recipe, method: &dyn Method) -> Recipe {
    let mut recipe = recipe.clone();
    let Some(base) = recipe.base.clone().filter(|_| method.base_is_model()) else { return recipe };
    let models = &recipe.models;
    let listed = models.iter().position(|model| model.source == base);
    recipe.slices.iter_mut().for_each(|slice| slice.sources.sort_by_key(|source| Some(source.model) != listed));
    match (listed, recipe.slices.is_empty() && recipe.modules.is_empty()) {
        (Some(index), true) => recipe.models[..=index].rotate_right(1),
        (None, true) if recipe.models.len() == 1 => {
            recipe.models.insert(0, ModelInput { source: base, ..ModelInput::default() });
        }
        (_, false) => base_in_modules(&mut recipe, base, listed),
        _ => {}
    }
    recipe
}

/// The same for each module; `listed` is base's index among the models.
fn base_in_modules(recipe: &mut Recipe, base: String, listed: Option<usize>) {
    let mut added = None;
    for module in &mut recipe.modules {
        module.slices.iter_mut().for_each(|slice| slice.sources.sort_by_key(|source| Some(source.model) != listed));
        module.models.sort_by_key(|source| Some(source.model) != listed);
        match &module.models[..] {
            // Base alone is what is copied anyway.
            [only] if Some(only.model) == listed => module.models.clear(),
            [_] => {
                let first = *added.get_or_insert(listed.unwrap_or(recipe.models.len()));
                module.models.insert(0, ModuleModel { model: first, ..ModuleModel::default() });
            }
            _ => {}
        }
    }
    if added.is_some() && listed.is_none() {
        recipe.models.push(ModelInput { source: base, ..ModelInput::default() });
    }
}

/// Refuses what no checkpoints can make right; `adapters`: whether adapters are merged with each other.
pub(super) fn check_request(recipe: &Recipe, adapters: bool) -> Result<()> {
    let method = recipe.method()?;
    if recipe.models.is_empty() {
        return Err(Error::usage("no model to merge").help("give at least one --model CKPT"));
    }
    if recipe.models.len() > MAX_MODELS {
        return Err(Error::usage(format!("{} models, but at most {MAX_MODELS} are supported", recipe.models.len()))
            .help("merge in groups"));
    }
    // A module without models is base's.
    let parts = recipe.modules.iter().map(|module| module.models.len()).filter(|&count| count > 0);
    let mut counts: Vec<usize> = recipe.all_slices().map(|slice| slice.sources.len()).chain(parts).collect();
    if recipe.slices.is_empty() && recipe.modules.is_empty() {
        counts.push(recipe.models.len());
    }
    let (fewest, most) = method.models();
    if let Some(given) = counts.into_iter().find(|count| !(fewest..=most).contains(count)) {
        let wanted = match (fewest, most) {
            (fewest, usize::MAX) => format!("at least {fewest} models"),
            (1, 1) => "one model".to_owned(),
            (fewest, most) if fewest == most => format!("{fewest} models"),
            (fewest, most) => format!("{fewest} to {most} models"),
        };
        return Err(Error::usage(format!(
            "{} merges {wanted}, but {given} {} given",
            method.name(),
            if given == 1 { "is" } else { "are" }
        ))
        .help("'tiesmith methods' says what each method takes"));
    }
    if recipe.rank.is_some() && !adapters {
        return Err(Error::usage("--rank is for LoRA adapters that are merged with each other")
            .help("leave it out, or give adapters as every --model, and no --base"));
    }
    let based = |slice: &Slice| slice.base.as_ref().is_some_and(|base| base.model.is_some());
    let by_slices = recipe.assembles_layers() && recipe.all_slices().all(based);
    if method.needs_base() && recipe.base.is_none() && !adapters && !by_slices {
        return Err(Error::usage(format!("{} works on task vectors and needs a base checkpoint", method.name()))
            .help("give --base CKPT, the checkpoint that the models were fine-tuned from"));
    }
    if recipe.sign_from.is_some() && recipe.assembles_layers() {
        return Err(Error::usage("--sign-from cannot be used with slices: its layers are those of a whole model"));
    }
    let baseless = recipe.all_slices().any(|slice| slice.base.is_none());
    if recipe.non_finite == NonFinite::CopyBase && baseless {
        return Err(Error::usage("--non-finite copy-base needs a base in every slice"));
    }
    statistics::check(recipe, method)?;
    let elects = method.params().iter().any(|spec| spec.name == "elect");
    if recipe.sign_from.is_some() && !elects {
        return Err(Error::usage(format!("{} elects no signs, so --sign-from has no meaning", method.name())));
    }
    if recipe.non_finite == NonFinite::CopyBase && recipe.base.is_none() {
        return Err(Error::usage("--non-finite copy-base needs a base checkpoint").help("give --base CKPT"));
    }
    Ok(())
}
