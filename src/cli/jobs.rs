//! What one command line asks to be merged: one recipe, or the documents of a recipe file, in order.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tiesmith::mergekit::{self, Document};
use tiesmith::{Checkpoint, Error, Manifest, Plan, Recipe, Result, Storage, printable};

use super::args::MergeArgs;
use super::{job, lower};

/// Longest recipe file that is read at all; the language has a closer bound.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// One merge.
pub struct Job {
    /// Its name in the recipe file, if it has one.
    pub name: Option<String>,
    pub recipe: Recipe,
    /// Where its output goes, if that is known.
    pub out: Option<PathBuf>,
    /// Whether other jobs use its output, so that a finished one is used again.
    pub part: bool,
    /// What the recipe file's reader has to say.
    pub warnings: Vec<String>,
    /// Where checkpoints are named in the recipe file.
    places: HashMap<String, String>,
    /// The finished output that is to be made again.
    pub again: Option<Manifest>,
}

impl Job {
    /// The plan, with the reader's warnings.
    pub fn plan(&mut self, storage: &Arc<dyn Storage>) -> Result<Plan> {
        let mut plan = Plan::new(&self.recipe, storage).map_err(|error| self.placed(error, storage))?;
        plan.warnings.splice(0..0, std::mem::take(&mut self.warnings));
        Ok(plan)
    }

    /// `error`, with the place in the recipe file if it is one of opening a checkpoint.
    fn placed(&self, error: Error, storage: &Arc<dyn Storage>) -> Error {
        let text = error.to_string();
        let (places, base, mut found) = (&self.places, self.recipe.base.clone(), None);
        for source in self.recipe.sources() {
            let Some(place) = places.get(source).filter(|_| found.is_none()) else { continue };
            if Checkpoint::open_on(source, base.as_deref(), storage).is_err_and(|e| e.to_string() == text) {
                found = Some(place);
            }
        }
        match found {
            Some(place) => error.named_in(place),
            None => error,
        }
    }
}

/// Options that do not change the result, and so can be given beside a manifest.
const NEUTRAL: [&str; 9] = ["recipe", "out", "force", "restart", "memory", "threads", "io", "progress", "json"];

/// The merges that `args` describe, each after those whose outputs it uses. The last one goes to `--out`.
pub fn read(args: &MergeArgs, verb: &str, storage: &dyn Storage) -> Result<Vec<Job>> {
    let out = lower::out_dir(args);
    let Some(file) = &args.recipe else {
        let recipe = lower::recipe(args, verb)?;
        let (places, warnings) = (HashMap::new(), Vec::new());
        return Ok(vec![Job { name: None, recipe, out, part: false, warnings, places, again: None }]);
    };
    let text = text(file, storage)?;
    if Manifest::is_one(&text) {
        return Ok(vec![again(args, file, storage)?]);
    }
    let documents = documents(&text, file)?;
    let parts = parts_dir(args);
    let names: Vec<String> = documents.iter().filter_map(|document| document.name.clone()).collect();
    let count = documents.len();
    let jobs = documents.into_iter().enumerate().map(|(index, mut document)| {
        let last = index + 1 == count;
        if count > 1 {
            document.recipe.rename_sources(|source| {
                if names.contains(source) {
                    *source = parts.join(&*source).to_string_lossy().into_owned();
                }
            });
        }
        let Document { name, mut recipe, warnings, places } = document;
        lower::override_recipe(&mut recipe, args)?;
        let out = if last { out.clone() } else { name.as_ref().map(|name| parts.join(name)) };
        Ok(Job { name, recipe, out, part: !last, warnings, places, again: None })
    });
    jobs.collect()
}

/// The family that the recipe `file` merges, to be looked at: with its densities, where its thresholds apply and how they are
/// found. Of several documents, `document` tells which, by its name or its number.
pub fn family(file: &str, document: Option<&str>, storage: &dyn Storage) -> Result<Recipe> {
    let text = text(file, storage)?;
    let recipe = match Manifest::is_one(&text) {
        true => Manifest::read(Path::new(file), storage)?.recipe(storage),
        false => one_document(documents(&text, file)?, file, document)?,
    };
    if !(recipe.slices.is_empty() && recipe.modules.is_empty() || recipe.method()?.needs_base()) {
        return Err(Error::usage(format!(
            "{} puts layers together without a base: there are no task vectors",
            recipe.method
        ))
        .at(Path::new(file))
        .help("name base and models with --base and --model"));
    }
    Ok(recipe.as_studied())
}

/// The document that is meant.
fn one_document(documents: Vec<Document>, file: &str, wanted: Option<&str>) -> Result<Recipe> {
    let label = |(at, document): (usize, &Document)| document.name.clone().unwrap_or_else(|| (at + 1).to_string());
    let labels: Vec<String> = documents.iter().enumerate().map(label).collect();
    let names: Vec<String> = documents.iter().filter_map(|document| document.name.clone()).collect();
    let list = labels.iter().map(|label| printable(label)).collect::<Vec<_>>().join(", ");
    let found = match wanted {
        None if documents.len() == 1 => Some(0),
        None => {
            let count = documents.len();
            return Err(Error::usage(format!("{count} merges in one file: which of them is to be looked at?"))
                .at(Path::new(file))
                .help(format!("add '--document NAME', one of: {list}")));
        }
        Some(wanted) => labels.iter().position(|label| label == wanted),
    };
    let document = found.and_then(|at| documents.into_iter().nth(at));
    let Document { name, recipe, .. } = document.ok_or_else(|| {
        Error::usage(format!("there is no document {} in it", printable(wanted.unwrap_or_default())))
            .at(Path::new(file))
            .help(format!("'--document NAME' takes one of: {list}"))
    })?;
    // Such a name means the document even where a checkpoint is called so, as in a merge.
    let others = |source: &&str| names.iter().any(|other| other == source && Some(other) != name.as_ref());
    if let Some(made) = recipe.sources().find(others) {
        let made = printable(made);
        return Err(Error::usage(format!("{made} is the output of another document, which is to be made first"))
            .at(Path::new(file))
            .help("merge the file, then name base and models with --base and --model"));
    }
    Ok(recipe)
}

/// Opens every checkpoint that the jobs merge and that none of them makes: what is missing or broken is said before the
/// first of them has worked for hours.
pub fn check(jobs: &[Job], storage: &Arc<dyn Storage>) -> Result<()> {
    let made: HashSet<PathBuf> = jobs.iter().filter_map(|job| job.out.clone()).collect();
    let mut known = HashSet::new();
    for job in jobs.iter() {
        let recipe = &job.recipe;
        let base = recipe.base.as_deref();
        // What is made of a base that is not there yet cannot be opened.
        let waits = base.is_some_and(|base| made.contains(Path::new(base)));
        let mut sources = recipe.sources();
        let open = |source: &str| match waits || made.contains(Path::new(source)) || !known.insert(source.to_owned()) {
            true => Ok(()),
            false => Checkpoint::open_on(source, base, storage).map(drop),
        };
        sources.try_for_each(open).map_err(|error| job.placed(error, storage))?;
    }
    Ok(())
}

/// The documents of a recipe file; what else this program writes is no recipe.
fn documents(text: &str, file: &str) -> Result<Vec<Document>> {
    // A recipe may be written as JSON too.
    if text.trim_start().starts_with('{') {
        let refuse = |what: String| Error::usage(what).at(Path::new(file));
        let kinds = [("format_version", "manifest"), (job::MARK, "plan made by 'tiesmith plan --save'")];
        let kind = kinds.iter().find(|(mark, _)| text.contains(&format!("\"{mark}\"")));
        match (serde_json::from_str::<serde::de::IgnoredAny>(text), kind) {
            (Err(error), Some((_, what))) => {
                return Err(refuse(format!("a {what} that is cut off or damaged: {error}"))
                    .help("put the whole file back, or name base and models with --base and --model"));
            }
            (Ok(_), Some((job::MARK, what))) => {
                return Err(refuse(format!("a {what}, not a recipe"))
                    .help("its parts are run by 'tiesmith run', and put together by 'tiesmith finish'"));
            }
            _ => {}
        }
    }
    mergekit::parse(text, file)
}

/// The merge that the manifest `file` is the record of.
fn again(args: &MergeArgs, file: &str, storage: &dyn Storage) -> Result<Job> {
    // Groups of arguments are listed too, by the names of their types.
    let is_option = |id: &&String| id.starts_with(|c: char| c.is_ascii_lowercase());
    if let Some(option) = args.given.iter().filter(is_option).find(|id| !NEUTRAL.contains(&id.as_str())) {
        let flag = option.replace('_', "-").replace("params", "param");
        return Err(Error::usage(format!("--{flag} cannot be given with a manifest, which says everything"))
            .help("leave it out, or merge anew with --base and --model"));
    }
    let manifest = Manifest::read(Path::new(file), storage)?;
    let recipe = manifest.recipe(storage);
    let out = lower::out_dir(args);
    Ok(Job {
        name: None,
        recipe,
        out,
        part: false,
        warnings: Vec::new(),
        places: HashMap::new(),
        again: Some(manifest),
    })
}

/// The directory of outputs that other documents use.
fn parts_dir(args: &MergeArgs) -> PathBuf {
    if let Some(parts) = &args.output.parts {
        return parts.clone();
    }
    let out = lower::out_dir(args).unwrap_or_else(|| "out".into());
    let mut name = out.file_name().unwrap_or_default().to_os_string();
    name.push(".parts");
    out.with_file_name(name)
}

fn text(file: &str, storage: &dyn Storage) -> Result<String> {
    let path = Path::new(file);
    if storage.is_dir(path) {
        return Err(Error::usage(format!("'{file}' is a directory, not a recipe file"))
            .help("name checkpoints with --base CKPT and --model CKPT"));
    }
    let bytes = storage.read_small(path, MAX_FILE_BYTES).map_err(Error::as_input)?;
    String::from_utf8(bytes).map_err(|_| Error::input("not a text file").at(path).help("a recipe is YAML in UTF-8"))
}
