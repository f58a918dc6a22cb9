//! Checkpoints: a catalogue of named tensors over a file, a sharded directory or a cached Hub snapshot.
//!
//! - A model with a PEFT adapter on it is one too: [`adapter`] shows the tensors that the adapter changes.
//! - [`Checkpoint::open`] reads headers only; every check that headers allow is made there.
//! - Entries are sorted by tensor name (byte order of UTF-8), so that catalogues can be joined like sorted lists.
//! - [`layout`] is the other direction: from names, types and shapes to shards, header bytes and offsets.
//!
//! Knows nothing of merging.

mod adapter;
mod header;
mod index;
mod json;
pub mod layout;
pub mod packed;
pub mod regression;
mod resolve;
pub mod rows;
#[cfg(test)]
mod testing;
mod torch;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use adapter::{Adapters, Changes, FactoredModule};

use crate::dtype::{Dtype, Float};
use crate::error::{Error, Result};
use crate::storage::{InputFile, Storage, is_remote};
use resolve::Source;

/// One tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// Name as stored.
    pub name: Box<str>,
    /// Element type as stored.
    pub dtype: Dtype,
    /// Shape, outermost dimension first; empty for a scalar.
    pub shape: Box<[u64]>,
    /// Which file of [`Checkpoint::files`] holds it.
    pub file: u32,
    /// Where its first byte is, from the start of that file.
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
}

impl TensorEntry {
    /// Number of elements (product of the shape; 1 for a scalar).
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

/// One open file of a checkpoint.
#[derive(Clone)]
pub struct CheckpointFile {
    /// The open file.
    pub file: Arc<dyn InputFile>,
    /// Length of what describes its tensors (of a safetensors file the header with its length prefix), in bytes.
    pub header_bytes: u64,
    /// BLAKE3 of those bytes: part of the input's identity.
    pub header_hash: [u8; 32],
}

/// An opened checkpoint: files kept open, tensors catalogued, no tensor data read. A clone shares the open files.
#[derive(Clone)]
pub struct Checkpoint {
    /// What the user wrote.
    pub spec: String,
    /// The directory (or the directory of the file) it was found in.
    pub dir: PathBuf,
    /// Hub id and commit when it came from the local Hub cache.
    pub hub: Option<HubRef>,
    /// The files, sorted by name.
    pub files: Vec<CheckpointFile>,
    /// The tensors, sorted by name.
    pub tensors: Vec<TensorEntry>,
    /// Peculiarities worth a warning (duplicate-free: each says one thing once).
    pub warnings: Vec<String>,
    /// What is computed and not stored.
    pub derived: Derived,
}

/// Tensors of a checkpoint that are computed where they are read.
#[derive(Clone, Default)]
pub struct Derived {
    /// Memory that they hold, in bytes.
    pub held_bytes: u64,
    /// Memory that reading one takes beside the result, in bytes.
    pub scratch_bytes: u64,
    /// Whether the checkpoint is a packed task vector.
    pub packed: bool,
    /// Whether it was packed against another base than the one at hand.
    pub other_base: bool,
    /// Memory that all readers of one share, in bytes, and which takes the most.
    pub shared: Option<(u64, Box<str>)>,
    /// The types in which a model without them would store them.
    stored: BTreeMap<Box<str>, Dtype>,
}

/// A snapshot in the local Hugging Face cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubRef {
    /// `org/name`.
    pub id: String,
    /// Commit hash of the snapshot.
    pub commit: String,
}

fn is_here(path: &Path, storage: &dyn Storage) -> bool {
    !is_remote(path) && matches!(storage.identity(path), Ok(Some(_)))
}

impl Checkpoint {
    /// Opens what `spec` names: a directory, a `.safetensors` file or a PyTorch file (`.bin`, `.pt`, `.pth`, `.ckpt`), an
    /// index file, a Hub id in the local cache, or one of these and a PEFT adapter on it, `MODEL+ADAPTER`.
    pub fn open(spec: &str, storage: &Arc<dyn Storage>) -> Result<Self> {
        Self::open_beside(spec, None, storage)
    }

    /// The same, where an adapter alone is one on the model called `base`, which a packed task vector may be against.
    pub fn open_on(spec: &str, base: Option<&str>, storage: &Arc<dyn Storage>) -> Result<Self> {
        let base = base.map(|base| Self::open(base, storage)).transpose()?;
        Self::open_beside(spec, base.as_ref(), storage)
    }

    /// The same with a base that is open already.
    pub fn open_beside(spec: &str, base: Option<&Self>, storage: &Arc<dyn Storage>) -> Result<Self> {
        if let Some((model, adapter)) = adapter::split(spec, &**storage)? {
            return Self::open(model, storage)?.with_adapter(spec, adapter, storage);
        }
        let found = resolve::resolve(spec, &**storage, &|name| std::env::var_os(name))?;
        let catalogue = match (&found.source, base) {
            (Source::File(path), _) => Catalogue::of_file(path, &**storage)?,
            (Source::Index(path), _) => index::open(path, &**storage)?,
            (Source::Packed(path), _) => return packed::open(spec, path, found.warnings, base, storage),
            (Source::Adapter, Some(base)) => return base.clone().with_adapter(spec, spec, storage),
            (Source::Adapter, None) => {
                return Err(Error::input("a PEFT adapter, which has no weights of its own")
                    .at(&found.dir)
                    .help("name the model that it was trained on too, as MODEL+ADAPTER"));
            }
        };
        let mut warnings = found.warnings;
        warnings.extend(catalogue.warnings);
        Ok(Self {
            spec: spec.to_owned(),
            dir: found.dir,
            hub: found.hub,
            files: catalogue.files,
            tensors: catalogue.tensors,
            warnings,
            derived: Derived::default(),
        })
    }

    /// `spec` as it is found from any working directory.
    pub fn place(spec: &str, storage: &dyn Storage) -> String {
        if let Ok(Some((model, adapter))) = adapter::split(spec, storage) {
            return format!("{}+{}", Self::place(model, storage), Self::place(adapter, storage));
        }
        let path = Path::new(spec);
        match std::path::absolute(path) {
            Ok(absolute) if is_here(path, storage) => absolute.to_string_lossy().into_owned(),
            _ => spec.to_owned(),
        }
    }

    /// Whether something on a local disk has the name `spec`, or both parts of it do.
    pub fn is_here(spec: &str, storage: &dyn Storage) -> bool {
        match adapter::split(spec, storage) {
            Ok(Some((model, adapter))) => Self::is_here(model, storage) && Self::is_here(adapter, storage),
            _ => is_here(Path::new(spec), storage),
        }
    }

    /// The directory of what `spec` names, for the sake of files beside the weights, which need not be there.
    pub fn directory(spec: &str, storage: &dyn Storage) -> Result<PathBuf> {
        if let Some((model, _)) = adapter::split(spec, storage)? {
            return Self::directory(model, storage);
        }
        match storage.is_dir(Path::new(spec)) {
            true => Ok(spec.into()),
            false => Ok(resolve::resolve(spec, storage, &|name| std::env::var_os(name))?.dir),
        }
    }

    /// This with an adapter on it, under the name `spec`.
    fn with_adapter(mut self, spec: &str, adapter: &str, storage: &Arc<dyn Storage>) -> Result<Self> {
        adapter::Adapter::open(adapter, &**storage)?.apply(&mut self)?;
        self.spec = spec.to_owned();
        Ok(self)
    }

    /// Puts a tensor that is computed as `float` in the place of `entry`.
    fn show(&mut self, entry: &TensorEntry, float: Float, header_hash: [u8; 32], file: Arc<dyn InputFile>) {
        let index = self.tensors.binary_search_by(|t| t.name.cmp(&entry.name)).expect("it is in its place");
        let bytes = entry.elements() * float.width() as u64;
        let number = self.files.len() as u32;
        self.derived.stored.entry(entry.name.clone()).or_insert(entry.dtype);
        self.derived.held_bytes += (size_of::<CheckpointFile>() + size_of_val(&*file)) as u64;
        self.tensors[index] = TensorEntry { dtype: float.dtype(), file: number, offset: 0, bytes, ..entry.clone() };
        self.files.push(CheckpointFile { file, header_bytes: 0, header_hash });
    }

    /// How many files there are on disk: what is computed has no header.
    pub fn stored_files(&self) -> usize {
        self.files.iter().filter(|file| file.header_bytes > 0).count()
    }

    /// The type that `tensor` has in an output that follows this checkpoint: as it is stored, or would be.
    pub fn output_dtype(&self, tensor: &TensorEntry) -> Dtype {
        self.derived.stored.get(&tensor.name).copied().unwrap_or(tensor.dtype)
    }

    /// Whether it is read over the network.
    pub fn is_remote(&self) -> bool {
        crate::storage::is_remote(&self.dir)
    }

    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Option<&TensorEntry> {
        self.tensors.binary_search_by(|t| (*t.name).cmp(name)).ok().map(|i| &self.tensors[i])
    }

    /// The path of the file that holds `tensor`.
    pub fn path_of(&self, tensor: &TensorEntry) -> &Path {
        self.files[tensor.file as usize].file.path()
    }
}

/// Files, tensors and warnings of a checkpoint while it is opened.
#[derive(Default)]
struct Catalogue {
    files: Vec<CheckpointFile>,
    tensors: Vec<TensorEntry>,
    warnings: Vec<String>,
}

impl Catalogue {
    /// A checkpoint that is one file.
    fn of_file(path: &Path, storage: &dyn Storage) -> Result<Self> {
        let mut catalogue = Self::default();
        catalogue.tensors = catalogue.add_file(path, storage)?;
        Ok(catalogue)
    }

    /// Opens one more file; its tensors are not taken in yet.
    fn add_file(&mut self, path: &Path, storage: &dyn Storage) -> Result<Vec<TensorEntry>> {
        let (file, number) = (storage.open(path)?, self.files.len() as u32);
        let header = match path.file_name().is_some_and(|name| torch::has_name(&name.to_string_lossy())) {
            true => {
                let (header, warning) = torch::read(&*file, number)?;
                self.warnings.extend(warning);
                header
            }
            false => header::read(&*file, number)?,
        };
        let header::Header { bytes, hash, tensors } = header;
        self.files.push(CheckpointFile { file: Arc::from(file), header_bytes: bytes, header_hash: hash });
        Ok(tensors)
    }
}

/// Where the tensors of a safetensors file are that has, or should have, `bytes` bytes.
pub fn tensors_of(file: &dyn InputFile, bytes: u64) -> Result<Vec<TensorEntry>> {
    header::tensors_of(file, bytes)
}

/// The directory that holds the file at `path`.
fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if dir != Path::new("") => dir,
        _ => Path::new("."),
    }
}
