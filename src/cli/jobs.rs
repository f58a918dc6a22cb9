//! What one command line asks to be merged: one recipe, or the documents of a recipe file, in order.

use std::path::{Path, PathBuf};

use tiesmith::mergekit::{self, Document};
use tiesmith::{Error, Recipe, Result, Storage};

use super::args::MergeArgs;
use super::lower;

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
}

/// The merges that `args` describe, each after those whose outputs it uses. The last one goes to `--out`.
pub fn read(args: &MergeArgs, verb: &str, storage: &dyn Storage) -> Result<Vec<Job>> {
    let out = args.output.out.clone();
    let Some(file) = &args.recipe else {
        let recipe = lower::recipe(args, verb)?;
        return Ok(vec![Job { name: None, recipe, out, part: false, warnings: Vec::new() }]);
    };
    let documents = mergekit::parse(&text(file, storage)?, file)?;
    let parts = parts_dir(args);
    let names: Vec<String> = documents.iter().filter_map(|document| document.name.clone()).collect();
    let count = documents.len();
    let jobs = documents.into_iter().enumerate().map(|(index, mut document)| {
        let last = index + 1 == count;
        if count > 1 {
            document.sources(|source| {
                if names.contains(source) {
                    *source = parts.join(&*source).to_string_lossy().into_owned();
                }
            });
        }
        let Document { name, mut recipe, warnings } = document;
        lower::override_recipe(&mut recipe, args)?;
        let out = if last { out.clone() } else { name.as_ref().map(|name| parts.join(name)) };
        Ok(Job { name, recipe, out, part: !last, warnings })
    });
    jobs.collect()
}

/// The directory of outputs that other documents use.
fn parts_dir(args: &MergeArgs) -> PathBuf {
    if let Some(parts) = &args.output.parts {
        return parts.clone();
    }
    let out = args.output.out.clone().unwrap_or_else(|| "out".into());
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
