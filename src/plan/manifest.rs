//! The manifest of a finished output, read back: what was asked, of which inputs, and what came of it.
//!
//! - It is a file like any other, which somebody may have edited: everything in it is checked before it is used.
//! - Inputs are looked for where the recipe names them, then where they were found at the time; one from the Hub's cache
//!   is taken at the commit it was of.
//! - Whether inputs are the same is judged by names, lengths and headers before the work, and by the hashes of what comes
//!   out of them after it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::Plan;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result, printable};
use crate::limits::MAX_MANIFEST_BYTES;
use crate::recipe::{Module, Recipe, Slice};
use crate::storage::Storage;

/// The version of the format that is read and written.
pub const MANIFEST_VERSION: u32 = 3;
/// What a manifest ends with, before and after the seal. It is a part of `run`: all that differs between two runs of a merge is
/// there and in `report`.
const SEAL: [&str; 2] = ["    \"manifest_blake3\": \"", "\"\n  }\n}\n"];
const AGAIN: &str = "give the original inputs, or merge them as they are with --base and --model";

/// A file of the output.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ListedFile {
    /// Its name.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// BLAKE3 of its content, in hexadecimal.
    pub blake3: String,
}

/// An input as it was.
#[derive(Debug, Deserialize)]
struct Input {
    checkpoint: Named,
    files: Vec<InputFile>,
}

#[derive(Debug, Deserialize)]
struct Named {
    source: String,
    hub: Option<String>,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
struct InputFile {
    name: String,
    bytes: u64,
    header_blake3: String,
}

/// See the module's documentation.
#[derive(Debug, Deserialize)]
pub struct Manifest {
    format_version: u32,
    /// Program that made the output.
    pub program: String,
    /// Its plan's fingerprint.
    pub fingerprint: String,
    /// What was asked.
    pub recipe: Recipe,
    #[serde(default)]
    places: BTreeMap<String, String>,
    inputs: Vec<Input>,
    /// Thresholds as they were found, unit by unit.
    #[serde(default)]
    pub thresholds: Vec<Value>,
    /// The shards, in order.
    pub shards: Vec<ListedFile>,
    /// The other files.
    pub side_files: Vec<ListedFile>,
    /// What the run reported.
    #[serde(default)]
    pub report: Value,
    #[serde(skip)]
    path: PathBuf,
    #[serde(skip)]
    sealed: bool,
}

/// A manifest in indented JSON, with one more field at the end of `run`, which comes last: the hash of all bytes before that
/// field's line.
pub fn seal(json: &str) -> Vec<u8> {
    let mut text = format!("{},\n", json.trim_end_matches("\n  }\n}"));
    let [before, after] = SEAL;
    let hash = blake3::hash(text.as_bytes()).to_hex();
    text.extend([before, &hash, after]);
    text.into_bytes()
}

/// Whether this is what [`seal`] made, unchanged.
pub fn is_sealed(content: &[u8]) -> bool {
    let length: usize = SEAL.iter().map(|part| part.len()).sum::<usize>() + 2 * blake3::OUT_LEN;
    let Some((sealed, found)) = content.len().checked_sub(length).map(|at| content.split_at(at)) else { return false };
    let [before, after] = SEAL;
    [before, &blake3::hash(sealed).to_hex(), after].concat().as_bytes() == found
}

/// Refuses a manifest at `path` of another version of the format than this program's.
pub fn must_be_current(version: u64, path: &Path) -> Result<()> {
    if version == u64::from(MANIFEST_VERSION) {
        return Ok(());
    }
    Err(Error::input(format!("the manifest has format version {version}, not {MANIFEST_VERSION}"))
        .at(path)
        .help("use the version of tiesmith that wrote it"))
}

impl Manifest {
    /// Whether a file with this text means to be a manifest.
    pub fn is_one(text: &str) -> bool {
        #[derive(Deserialize)]
        struct Marks {
            #[serde(rename = "fingerprint")]
            _fingerprint: String,
            #[serde(rename = "recipe")]
            _recipe: serde::de::IgnoredAny,
        }
        text.trim_start().starts_with('{') && serde_json::from_str::<Marks>(text).is_ok()
    }

    /// Reads the manifest at `path`.
    pub fn read(path: &Path, storage: &dyn Storage) -> Result<Self> {
        let content = storage.read_small(path, MAX_MANIFEST_BYTES).map_err(Error::as_input)?;
        let broken = |what: String| {
            Error::input(format!("the manifest is damaged: {what}")).at(path).help("merge again to get a new one")
        };
        let mut manifest: Self = serde_json::from_slice(&content).map_err(|e| broken(e.to_string()))?;
        must_be_current(manifest.format_version.into(), path)?;
        let recipe = &manifest.recipe;
        let expected =
            usize::from(recipe.base.is_some()) + recipe.models.len() + usize::from(recipe.sign_from.is_some());
        // Statistics of models follow.
        if manifest.inputs.len() < expected {
            return Err(broken(format!("it lists {} inputs of {expected}", manifest.inputs.len())));
        }
        let models = recipe.models.len();
        let slices = recipe.slices.iter().flat_map(Slice::models);
        let sources = slices.chain(recipe.modules.iter().flat_map(Module::sources));
        if sources.max().is_some_and(|model| model >= models) {
            return Err(broken("a slice or a module is of a model that is not listed".into()));
        }
        manifest.path = path.to_path_buf();
        manifest.sealed = is_sealed(&content);
        Ok(manifest)
    }

    /// Fails if it is not what a merge wrote, to the byte.
    pub fn must_be_as_written(&self) -> Result<()> {
        if self.sealed {
            return Ok(());
        }
        Err(Error::failed("the manifest was changed after the merge, so that it cannot be trusted with a repair")
            .at(&self.path)
            .help("put a copy of it back, or merge again with --force"))
    }

    /// The recipe, with inputs named by where they are now.
    pub fn recipe(&self, storage: &dyn Storage) -> Recipe {
        let mut recipe = self.recipe.clone();
        recipe.rename_sources(|source| *source = self.place(source, storage));
        recipe
    }

    /// What to open for `source` now.
    fn place(&self, source: &str, storage: &dyn Storage) -> String {
        let input = self.inputs.iter().find(|input| input.checkpoint.source == source);
        if let Some(hub) = input.and_then(|input| input.checkpoint.hub.as_ref())
            && hub.split('@').next() == source.trim_start_matches("hf://").split('@').next()
        {
            return hub.clone();
        }
        match self.places.get(source) {
            Some(place) if !Checkpoint::is_here(source, storage) => place.clone(),
            _ => source.to_owned(),
        }
    }

    /// Refuses a plan whose inputs or shards are not those of the manifest, as far as that shows before the work. The
    /// plan's inputs are called as they were: where they are now is no part of the result.
    pub fn admit(&self, plan: &mut Plan) -> Result<()> {
        self.compare(plan)?;
        plan.recipe = self.recipe.clone();
        plan.places.clone_from(&self.places);
        let merged = plan.factors.as_mut().map_or(&mut [][..], |factored| &mut factored.merged.checkpoints);
        for checkpoints in [&mut plan.checkpoints[..], merged] {
            for (input, checkpoint) in self.inputs.iter().zip(checkpoints) {
                checkpoint.spec.clone_from(&input.checkpoint.source);
            }
        }
        Ok(())
    }

    fn compare(&self, plan: &Plan) -> Result<()> {
        for (input, checkpoint) in self.inputs.iter().zip(&plan.checkpoints) {
            // A view of other files is no file of its own.
            let files: Vec<InputFile> =
                checkpoint.files.iter().filter(|file| file.header_bytes > 0).map(described).collect();
            let changed = input.files.iter().zip(&files).find(|(then, now)| then != now);
            let what = match changed {
                Some((then, now)) if then.name != now.name => {
                    format!("the merge was of {}, which is now {}", printable(&then.name), printable(&now.name))
                }
                Some((then, now)) if then.bytes != now.bytes => {
                    format!("{} had {} bytes, now {}", printable(&then.name), then.bytes, now.bytes)
                }
                Some((then, _)) => format!("{} has another header", printable(&then.name)),
                None if input.files.len() != files.len() => {
                    format!("it had {} files, now {}", input.files.len(), files.len())
                }
                None => continue,
            };
            return Err(Error::input(format!("this input is not the one that was merged: {what}"))
                .at(&checkpoint.dir)
                .help(AGAIN));
        }
        let planned = plan.layout.shards.iter().map(|shard| (&*shard.name, shard.bytes));
        if !self.shards.iter().map(|shard| (&*shard.name, shard.bytes)).eq(planned) {
            let program = printable(&self.program);
            return Err(Error::input(format!("its recipe gives other shards than those listed, which {program} made"))
                .at(&self.path)
                .help("use that version of the program, or merge anew"));
        }
        Ok(())
    }

    /// The first shard whose length or hash differs from that in `other`, if there is one.
    pub fn differs_from(&self, other: &Self) -> Option<&str> {
        let odd = self.shards.len() != other.shards.len();
        let mut pairs = self.shards.iter().zip(&other.shards);
        let differing = pairs.find(|(a, b)| a != b).map(|(a, _)| &*a.name);
        differing.or_else(|| odd.then(|| self.shards.last().map_or("", |shard| &shard.name)))
    }
}

fn described(file: &crate::checkpoint::CheckpointFile) -> InputFile {
    InputFile {
        name: file.file.path().file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
        bytes: file.file.identity().bytes,
        header_blake3: blake3::Hash::from_bytes(file.header_hash).to_hex().to_string(),
    }
}
