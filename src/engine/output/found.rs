//! What is found where an output is to be, and what of it is refused before anything is written.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::{JOURNAL, LOADABLE, LOCK, MANIFEST, OutputOptions, WORK_DIR, parts};
use crate::error::{Error, Result};
use crate::storage::Storage;

/// What a directory holds, by names.
pub(super) struct Found {
    pub exists: bool,
    /// All but the work directory.
    pub entries: Vec<String>,
    /// What the work directory holds.
    pub work: Vec<String>,
}

impl Found {
    pub fn look(dir: &Path, work: &Path, storage: &dyn Storage) -> Result<Self> {
        let names = |path: &Path| -> Result<Vec<String>> {
            if storage.identity(path)?.is_none() {
                return Ok(Vec::new());
            }
            let names = storage.list(path).map_err(Error::as_input)?;
            Ok(names.into_iter().map(|name| name.to_string_lossy().into_owned()).collect())
        };
        let exists = storage.identity(dir)?.is_some();
        if exists && !storage.is_dir(dir) {
            return Err(no_directory(dir));
        }
        let mut entries = names(dir)?;
        entries.retain(|name| name != WORK_DIR);
        Ok(Self { exists, entries, work: names(work)? })
    }

    pub fn has(&self, name: &str) -> bool {
        self.entries.iter().any(|entry| entry == name)
    }

    pub fn loadable(&self) -> bool {
        LOADABLE.iter().any(|name| self.has(name))
    }

    /// The manifest is written before what makes the directory loadable, so both together are a finished output, even if
    /// a killed run left its work directory beside it. What makes it loadable may be elsewhere by now.
    pub fn finished(&self) -> bool {
        self.has(MANIFEST) && (self.loadable() || self.work.iter().all(|name| name == LOCK))
    }

    pub fn begun(&self) -> bool {
        self.work.iter().any(|name| name == JOURNAL)
    }

    pub fn in_parts(&self) -> bool {
        self.work.iter().any(|name| name == parts::DIR)
    }

    /// Refuses what needs no look into a journal.
    pub fn admit(&self, dir: &Path, options: &OutputOptions) -> Result<()> {
        match (self.begun(), self.finished()) {
            _ if self.in_parts() => Err(Error::input("a merge in parts is under way here").at(dir).help(
                "end it with 'tiesmith finish' and its plan, or remove the directory's .tiesmith folder to give it up",
            )),
            (true, _) => Ok(()),
            (false, true) if options.force => Ok(()),
            (false, true) => Err(finished_already(dir)),
            (false, false) if self.entries.is_empty() => Ok(()),
            (false, false) => Err(self.not_empty(dir)),
        }
    }

    pub fn not_empty(&self, dir: &Path) -> Error {
        let partials = self.work.iter().filter(|name| name.ends_with(".partial")).count();
        let shards = self.entries.iter().filter(|name| is_shard_name(name)).count();
        if !self.loadable() && partials + shards > 0 {
            return Error::input(format!(
                "the output directory is not empty: it has {shards} shards and {partials} unfinished files of a merge, but \
                 neither an index nor the journal that a merge goes on with"
            ))
            .at(dir)
            .help("remove them to start over, or use another --out");
        }
        not_empty(dir, self.entries.len())
    }
}

/// The refusal of a directory that has `entries` entries of somebody else.
pub(in crate::engine) fn not_empty(dir: &Path, entries: usize) -> Error {
    Error::input(format!("the output directory is not empty ({entries} entries)"))
        .at(dir)
        .help("use a new or empty directory for --out")
}

/// Where `dir` has its work: in itself, whatever links there are.
pub(in crate::engine) fn work_dir(dir: &Path, storage: &dyn Storage) -> Result<PathBuf> {
    let work = dir.join(WORK_DIR);
    let parts = work.join(parts::DIR);
    for folder in [&work, &parts] {
        let here = storage.canonical(dir).join(folder.strip_prefix(dir).unwrap_or(folder));
        if storage.identity(folder)?.is_some() && storage.canonical(folder) != here {
            return Err(Error::input("the work directory is a link to somewhere else").at(folder).help("remove it"));
        }
        if storage.is_there(folder)? && !storage.is_dir(folder) {
            return Err(Error::input("no directory, where a run keeps its work").at(folder).help("remove it"));
        }
    }
    Ok(work)
}

pub(super) fn finished_already(dir: &Path) -> Error {
    Error::input("a finished merge is already there").at(dir).help("use another --out, or --force to replace it")
}

/// The refusal of an output directory that is none.
pub(in crate::engine) fn no_directory(dir: &Path) -> Error {
    Error::input("the output is a file, not a directory").at(dir).help("choose another --out")
}

/// Refuses, as the directory of a sweep's outputs, one with entries of which none is a sweep's: of names that it gives (`own`), or
/// with an unfinished output in it, which may be of a sweep with other values.
pub(in crate::engine) fn admit_swept(dir: &Path, own: &BTreeSet<String>, storage: &dyn Storage) -> Result<()> {
    if storage.identity(dir)?.is_none() {
        return Ok(());
    }
    if !storage.is_dir(dir) {
        return Err(no_directory(dir));
    }
    let names = storage.list(dir).map_err(Error::as_input)?;
    let is_own = |name: &std::ffi::OsString| {
        own.contains(&*name.to_string_lossy()) || storage.is_dir(&dir.join(name).join(WORK_DIR))
    };
    match names.is_empty() || names.iter().any(is_own) {
        true => Ok(()),
        false => Err(not_empty(dir, names.len())),
    }
}

/// Whether `name` is one that this program gives to a shard of several.
pub(super) fn is_shard_name(name: &str) -> bool {
    let Some(middle) = name.strip_prefix("model-").and_then(|n| n.strip_suffix(".safetensors")) else { return false };
    let digits = |s: &str| s.len() >= 5 && s.bytes().all(|b| b.is_ascii_digit());
    middle.split_once("-of-").is_some_and(|(i, n)| digits(i) && digits(n))
}
