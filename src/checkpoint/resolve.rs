//! From what the user wrote to the file that is opened first: a safetensors or PyTorch file, or an index.
//!
//! - What exists on disk wins over a Hub id of the same spelling.
//! - In a directory safetensors win over PyTorch files, and an index wins over single files; where it is not clear which file is meant, nothing is guessed.
//! - A Hub id is looked up in the local cache (`models--org--name/{refs,snapshots}`), then on the Hub.
//! - A refusal says what was looked for and what to do: most people who get here have an incomplete download.
//!
//! Reads directory listings and refs only; knows nothing of headers and tensors.

#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::index::{is_plain_component, shard_number};
use super::{HubRef, directory_of, torch};
use crate::error::{Error, Result, printable};
use crate::storage::{Pinned, Storage, hub_cache, is_remote};

/// The usual names: of the index, and of a model in one file.
const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// The same of a PyTorch checkpoint.
const TORCH_INDEX: &str = "pytorch_model.bin.index.json";
const TORCH_SINGLE: &str = "pytorch_model.bin";
/// How a packed task vector's name ends.
const PACKED: &str = ".tvz";
/// Longest accepted ref file of the Hub cache: a commit hash and a newline, with room to spare.
const MAX_REF_BYTES: u64 = 256;
const CONVERT: &str = "convert it to safetensors first, e.g. with transformers: from_pretrained, then save_pretrained";

/// A value of the environment; replaced by tests.
pub(super) type Env<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// What to open.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// The directory it is in.
    pub(super) dir: PathBuf,
    pub(super) source: Source,
    pub(super) hub: Option<HubRef>,
    pub(super) warnings: Vec<String>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// One safetensors or PyTorch file.
    File(PathBuf),
    /// An index file.
    Index(PathBuf),
    /// A packed task vector.
    Packed(PathBuf),
    /// A PEFT adapter: the directory.
    Adapter,
}

/// Finds what `spec` names.
pub(super) fn resolve(spec: &str, storage: &dyn Storage, env: Env<'_>) -> Result<Found> {
    let path = Path::new(spec);
    if let Some(id) = spec.strip_prefix("hf://") {
        return on_hub(id, path, storage, env);
    }
    if storage.is_dir(path) {
        return in_directory(path, storage);
    }
    // Not `is_file`: that a pipe or a device is no input is better said when it is opened.
    if storage.identity(path).map_err(|e| unreadable(e, path))?.is_some() {
        return named_file(path);
    }
    match HubId::parse(spec) {
        Some(id) => in_cache(&id, path, storage, env).or_else(|absent| match storage.is_offline() {
            true => Err(absent),
            false => from_hub(&id, storage, Some(&absent)),
        }),
        None if spec.contains("://") => Err(Error::input("there is no such file").at(path).help("check the address")),
        None => Err(Error::input("no such file or directory").at(path).help("check the path")),
    }
}

/// What cannot be looked at is no input; but a network that fails may work the next time.
fn unreadable(error: Error, path: &Path) -> Error {
    if is_remote(path) { error } else { error.as_input() }
}

/// A repository of the Hub: from the local cache if it is there, else by byte range.
fn on_hub(spec: &str, path: &Path, storage: &dyn Storage, env: Env<'_>) -> Result<Found> {
    let Some(id) = HubId::parse(spec) else {
        return Err(Error::input("not a model of the Hub")
            .at(path)
            .help("write hf://org/name or hf://org/name@revision"));
    };
    match in_cache(&id, path, storage, env) {
        Ok(found) => Ok(found),
        Err(absent) if storage.is_offline() => Err(absent),
        Err(_) => from_hub(&id, storage, None),
    }
}

/// A repository that is read from the Hub; `absent` is why it is, where nobody said so.
fn from_hub(id: &HubId<'_>, storage: &dyn Storage, absent: Option<&Error>) -> Result<Found> {
    let pinned = storage.pin(id.id, id.revision).map_err(|error| match absent {
        Some(absent) => error.after(&format!("{absent}; nor can it be read from the Hub: ")),
        None => error,
    })?;
    let Some(Pinned { dir, commit, endpoint }) = pinned else {
        return Err(Error::input("there is no network here").at(Path::new(id.id)).help("download the model first"));
    };
    let mut found = in_directory(&dir, storage)?;
    if absent.is_some() {
        let (id, commit) = (id.id, &commit[..commit.len().min(12)]);
        found.warnings.push(format!("{id} is not in the local cache: it is read from {endpoint}, at commit {commit}"));
    }
    found.hub = Some(HubRef { id: id.id.to_owned(), commit });
    Ok(found)
}

fn named_file(path: &Path) -> Result<Found> {
    let name = path.file_name().map(|n| n.to_string_lossy()).unwrap_or_default();
    let mut warnings = Vec::new();
    let source = if name.ends_with(".index.json") {
        Source::Index(path.to_path_buf())
    } else if name.ends_with(".safetensors") || torch::has_name(&name) {
        if let Some((number, count)) = shard_number(&name).filter(|&(_, count)| count > 1) {
            warnings.push(format!("{} is shard {number} of {count}: only its tensors are used", printable(&name)));
        }
        Source::File(path.to_path_buf())
    } else if name.ends_with(PACKED) {
        Source::Packed(path.to_path_buf())
    } else {
        let error = match other_format(&name) {
            Some((what, help)) => Error::input(format!("{what}, not safetensors")).help(help),
            None => Error::input("not a .safetensors, .bin, .index.json or .tvz file")
                .help("give a checkpoint directory or such a file"),
        };
        return Err(error.at(path));
    };
    Ok(Found { dir: directory_of(path).to_path_buf(), source, hub: None, warnings })
}

/// What a file of another format is, and what to do with it.
fn other_format(name: &str) -> Option<(&'static str, &'static str)> {
    let (_, extension) = name.rsplit_once('.')?;
    match extension {
        "gguf" => Some(("a GGUF file", "give the original safetensors checkpoint: GGUF is made from it")),
        "h5" | "msgpack" | "onnx" => Some(("a checkpoint of another framework", CONVERT)),
        _ => None,
    }
}

fn in_directory(dir: &Path, storage: &dyn Storage) -> Result<Found> {
    // Hidden files are left by editors, file managers and interrupted downloads.
    let names: Vec<String> = storage
        .list(dir)
        .map_err(|e| unreadable(e, dir))?
        .into_iter()
        .filter_map(|name| name.into_string().ok())
        .filter(|name| !name.starts_with('.'))
        .collect();
    let source = choose(dir, &names).map_err(|e| e.at(dir))?;
    Ok(Found { dir: dir.to_path_buf(), source, hub: None, warnings: Vec::new() })
}

/// The file to open among the `names` in `dir`.
fn choose(dir: &Path, names: &[String]) -> Result<Source> {
    let ending = |suffix: &str| names.iter().map(|n| &**n).filter(|n| n.ends_with(suffix)).collect::<Vec<_>>();
    let indexes = ending(".safetensors.index.json");
    match indexes[..] {
        _ if indexes.contains(&INDEX) => return Ok(Source::Index(dir.join(INDEX))),
        [only] => return Ok(Source::Index(dir.join(only))),
        [] => {}
        _ => {
            return Err(Error::input(format!("{} index files: {}", indexes.len(), listed(&indexes)))
                .help("name the one that is meant"));
        }
    }
    let files = ending(".safetensors");
    let adapter = names.iter().any(|n| n == "adapter_config.json");
    let packed = ending(PACKED);
    match files[..] {
        _ if files.contains(&SINGLE) => Ok(Source::File(dir.join(SINGLE))),
        [] | ["adapter_model.safetensors"] if adapter => Ok(Source::Adapter),
        ["adapter_model.safetensors"] => Err(Error::input("a PEFT adapter without its adapter_config.json")
            .help("download the adapter again, configuration and weights together")),
        [] if packed.len() == 1 => Ok(Source::Packed(dir.join(packed[0]))),
        [] => choose_torch(dir, names),
        [only] => match shard_number(only).filter(|&(_, count)| count > 1) {
            Some((_, count)) => Err(incomplete(&files, count)),
            None => Ok(Source::File(dir.join(only))),
        },
        _ => match files.iter().find_map(|name| shard_number(name)) {
            Some((_, count)) => Err(incomplete(&files, count)),
            None => Err(Error::input(format!("{} safetensors files and no index: {}", files.len(), listed(&files)))
                .help("name the one that is meant")),
        },
    }
}

/// The PyTorch file to open among the `names` in `dir`, which has no safetensors file.
fn choose_torch(dir: &Path, names: &[String]) -> Result<Source> {
    let has = |name: &str| names.iter().any(|n| n == name);
    let shards: Vec<&str> = names.iter().map(|n| &**n).filter(|n| n.starts_with("pytorch_model-")).collect();
    match shards.iter().find_map(|name| shard_number(name)) {
        _ if has(TORCH_INDEX) => Ok(Source::Index(dir.join(TORCH_INDEX))),
        _ if has(TORCH_SINGLE) => Ok(Source::File(dir.join(TORCH_SINGLE))),
        Some((_, count)) => Err(incomplete(&shards, count)),
        None => Err(nothing_to_open(names)),
    }
}

fn incomplete(files: &[&str], count: u64) -> Error {
    let (found, names) = (files.len(), listed(files));
    let index = if files.iter().any(|name| torch::has_name(name)) { TORCH_INDEX } else { INDEX };
    Error::input(format!("{found} of {count} shards and no index ({index}): {names}")).help("complete the download")
}

fn nothing_to_open(names: &[String]) -> Error {
    if let Some(name) = names.iter().find(|name| torch::has_name(name)) {
        return Error::input(format!("no safetensors file, but {}: a PyTorch file of another name", printable(name)))
            .help(format!("if it holds the model's weights, name it, or call it {TORCH_SINGLE}"));
    }
    let Some((name, (what, help))) = names.iter().find_map(|name| Some((name, other_format(name)?))) else {
        return Error::input("no safetensors file or index in this directory")
            .help("check the path, or complete the download");
    };
    Error::input(format!("no safetensors file, but {}: {what}", printable(name))).help(help)
}

/// The first few names, for a message.
fn listed(names: &[&str]) -> String {
    const SHOWN: usize = 4;
    let mut text = names.iter().take(SHOWN).map(|name| printable(name)).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text.push_str(", ...");
    }
    text
}

/// `org/name[@revision]`.
#[derive(Debug, PartialEq, Eq)]
struct HubId<'a> {
    id: &'a str,
    revision: Option<&'a str>,
}

impl<'a> HubId<'a> {
    fn parse(spec: &'a str) -> Option<Self> {
        let (id, revision) = match spec.split_once('@') {
            Some((id, revision)) => (id, Some(revision)),
            None => (spec, None),
        };
        let (org, name) = id.split_once('/')?;
        let plain = |part: &str| {
            part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        };
        let file = [".safetensors", ".json", ".bin", PACKED].iter().any(|ending| name.ends_with(ending));
        // A revision is a branch (which may have slashes), a tag or a commit.
        let revision_is_path = revision.is_none_or(|r| r.split('/').all(is_plain_component));
        (plain(org) && plain(name) && !file && revision_is_path).then_some(Self { id, revision })
    }
}

fn in_cache(id: &HubId<'_>, path: &Path, storage: &dyn Storage, env: Env<'_>) -> Result<Found> {
    let HubId { id: name, revision } = id;
    // The Hub would be asked else.
    let allow = if storage.is_offline() { ", unset HF_HUB_OFFLINE" } else { "" };
    let download = match revision {
        Some(revision) => {
            format!("download it with `hf download {name} --revision {revision}`{allow}, or check the path")
        }
        None => format!(
            "download it with `hf download {name}` (older: `huggingface-cli download {name}`){allow}, or check the path"
        ),
    };
    let Some(cache) = hub_cache(env) else {
        return Err(Error::input("no such file or directory, and no home directory to look for a Hub cache")
            .at(path)
            .help(download));
    };
    let repository = cache.join(format!("models--{}", name.replace('/', "--")));
    if !storage.is_dir(&repository) {
        let cache = printable(&cache.to_string_lossy());
        return Err(Error::input(format!("no such file or directory, and not in the Hub cache {cache}"))
            .at(path)
            .help(download));
    }
    let commit =
        find_commit(&repository, *revision, storage).map_err(|e| e.as_input().at(&repository).help(&*download))?;
    let mut found = in_directory(&repository.join("snapshots").join(&commit), storage)?;
    found.hub = Some(HubRef { id: (*name).to_owned(), commit });
    Ok(found)
}

/// The commit that `revision` means among the snapshots of a cached repository.
fn find_commit(repository: &Path, revision: Option<&str>, storage: &dyn Storage) -> Result<String> {
    let snapshots = repository.join("snapshots");
    let commits: Vec<String> = match storage.is_dir(&snapshots) {
        true => storage.list(&snapshots)?.into_iter().filter_map(|name| name.into_string().ok()).collect(),
        false => Vec::new(),
    };
    let name = revision.unwrap_or("main");
    if let Some(commit) = read_ref(&repository.join("refs").join(name), storage)? {
        return match commits.contains(&commit) {
            true => Ok(commit),
            false => Err(Error::input(format!(
                "revision {name} is commit {}, which is not in the cache",
                printable(&commit)
            ))),
        };
    }
    match (revision, &commits[..]) {
        (_, []) => Err(Error::input("no snapshot in the cache")),
        (None, [only]) => Ok(only.clone()),
        (None, _) => {
            Err(Error::input(format!("{} snapshots, and none is called main: {}", commits.len(), commits.join(", ")))
                .help("name one, as in org/name@commit"))
        }
        (Some(revision), _) => by_prefix(revision, &commits),
    }
}

fn by_prefix(revision: &str, commits: &[String]) -> Result<String> {
    let is_hash = revision.chars().all(|c| c.is_ascii_hexdigit());
    let mut matches = commits.iter().filter(|commit| *commit == revision || is_hash && commit.starts_with(revision));
    match (matches.next(), matches.next()) {
        (Some(commit), None) => Ok(commit.clone()),
        (Some(first), Some(second)) => {
            Err(Error::input(format!("revision {revision} is ambiguous: {first}, {second}")).help("give more digits"))
        }
        (None, _) => Err(Error::input(format!("revision {} is not in the cache", printable(revision)))),
    }
}

/// The commit that a ref file names, if there is such a file.
fn read_ref(path: &Path, storage: &dyn Storage) -> Result<Option<String>> {
    if !storage.is_file(path) {
        return Ok(None);
    }
    let content = storage.read_small(path, MAX_REF_BYTES)?;
    let commit = String::from_utf8_lossy(&content).trim().to_owned();
    match is_plain_component(&commit) {
        true => Ok(Some(commit)),
        false => Err(Error::input(format!("\"{}\" is not a commit", printable(&commit))).at(path)),
    }
}
