//! A file system in memory, so that an input costs what the program does with it and no system call.
//!
//! It answers as the real one does: a file that is open keeps its content when another takes its name; reading beyond the end
//! is an error; what has no name that a file could have is not there.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tiesmith::{Error, Identity, InputFile, Lock, OutputFile, Result, Storage};

/// Longest name of a file, in bytes.
const MAX_NAME_BYTES: usize = 255;

/// A file: its content, and how often that was changed.
#[derive(Default)]
struct Node {
    number: u64,
    content: Mutex<(Vec<u8>, i128)>,
}

impl Node {
    fn content(&self) -> MutexGuard<'_, (Vec<u8>, i128)> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn identity(&self) -> Identity {
        let (content, time) = &*self.content();
        Identity { bytes: content.len() as u64, mtime_ns: *time, ctime_ns: *time, device: 1, inode: self.number }
    }
}

#[derive(Default)]
struct State {
    files: BTreeMap<PathBuf, Arc<Node>>,
    directories: BTreeSet<PathBuf>,
    numbers: u64,
}

/// See the file's documentation. Clones share everything.
#[derive(Clone, Default)]
pub struct Memory(Arc<Mutex<State>>);

impl Memory {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a file there, a new one in the place of what has the name.
    pub fn put(&self, path: &Path, content: &[u8]) {
        let mut state = self.state();
        let parent = path.parent().expect("a file in a directory");
        if !state.directories.contains(parent) {
            state.directories.extend(parent.ancestors().map(Path::to_path_buf));
        }
        state.numbers += 1;
        let node = Node { number: state.numbers, content: Mutex::new((content.to_vec(), 1)) };
        state.files.insert(path.to_path_buf(), Arc::new(node));
    }

    /// Removes everything under `dir`.
    pub fn clear(&self, dir: &Path) {
        let mut state = self.state();
        state.files.retain(|path, _| !path.starts_with(dir));
        state.directories.retain(|path| !path.starts_with(dir));
    }

    /// What is in the files under `dir`, by their paths in there.
    pub fn tree(&self, dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
        let state = self.state();
        let file = |(path, node): (&PathBuf, &Arc<Node>)| {
            path.strip_prefix(dir).ok().map(|name| (name.to_path_buf(), node.content().0.clone()))
        };
        state.files.iter().filter_map(file).collect()
    }

    fn node(&self, path: &Path) -> Result<Arc<Node>> {
        let state = self.state();
        let missing = || match state.directories.contains(path) {
            true => Error::input("a directory, not a file").at(path),
            false => Error::input("no such file").at(path).help("check the path"),
        };
        state.files.get(path).cloned().ok_or_else(missing)
    }
}

struct File {
    path: PathBuf,
    node: Arc<Node>,
    identity: Identity,
    memory: Memory,
}

impl InputFile for File {
    fn path(&self) -> &Path {
        &self.path
    }

    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn identity_now(&self) -> Result<Identity> {
        Ok(self.node.identity())
    }

    fn identity_there(&self) -> Result<Option<Identity>> {
        self.memory.identity(&self.path)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let (content, _) = &*self.node.content();
        let range = usize::try_from(offset).ok().and_then(|from| Some(from..from.checked_add(buffer.len())?));
        match range.and_then(|range| content.get(range)) {
            Some(found) => buffer.copy_from_slice(found),
            None => return Err(Error::failed("the file shrank while being read").at(&self.path)),
        }
        Ok(())
    }
}

impl OutputFile for File {
    fn path(&self) -> &Path {
        &self.path
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let (content, time) = &mut *self.node.content();
        let end = offset as usize + bytes.len();
        if content.len() < end {
            content.resize(end, 0);
        }
        content[offset as usize..end].copy_from_slice(bytes);
        *time += 1;
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn release(&self, _offset: u64, _length: u64) {}
}

impl Memory {
    fn file(&self, path: &Path, node: Arc<Node>) -> Box<File> {
        let identity = node.identity();
        Box::new(File { path: path.to_path_buf(), node, identity, memory: self.clone() })
    }
}

impl Storage for Memory {
    fn open(&self, path: &Path) -> Result<Box<dyn InputFile>> {
        Ok(self.file(path, self.node(path)?))
    }

    fn create(&self, path: &Path, length: u64) -> Result<Box<dyn OutputFile>> {
        let name = path.file_name().unwrap_or_default();
        if name.is_empty() || name.len() > MAX_NAME_BYTES || name.as_encoded_bytes().contains(&0) {
            return Err(Error::io("create", path, &std::io::ErrorKind::InvalidFilename.into()));
        }
        if !self.state().files.contains_key(path) {
            self.put(path, &[]);
        }
        self.reopen(path, 0)?;
        self.reopen(path, length)
    }

    fn reopen(&self, path: &Path, length: u64) -> Result<Box<dyn OutputFile>> {
        let node = self.node(path)?;
        {
            let (content, time) = &mut *node.content();
            *time += i128::from(content.len() as u64 != length);
            content.resize(length as usize, 0);
        }
        Ok(self.file(path, node))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        let node = self.node(from)?;
        let mut state = self.state();
        state.files.remove(from);
        state.files.insert(to.to_path_buf(), node);
        Ok(())
    }

    fn sync_dir(&self, _path: &Path) -> Result<()> {
        Ok(())
    }

    fn create_dir_all(&self, path: &Path) -> Result<()> {
        self.state().directories.extend(path.ancestors().map(Path::to_path_buf));
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> Result<()> {
        self.state().files.remove(path);
        Ok(())
    }

    fn remove_dir(&self, path: &Path) -> Result<()> {
        if self.list(path)?.is_empty() {
            self.state().directories.remove(path);
        }
        Ok(())
    }

    fn list(&self, path: &Path) -> Result<Vec<OsString>> {
        let state = self.state();
        let here = state.files.keys().chain(&state.directories).filter(|name| name.parent() == Some(path));
        let mut names: Vec<OsString> = here.map(|name| name.file_name().unwrap_or_default().to_owned()).collect();
        names.sort();
        Ok(names)
    }

    fn lock(&self, path: &Path) -> Result<Lock> {
        self.create_dir_all(path.parent().expect("a file in a directory"))?;
        self.create(path, 0)?;
        Ok(Lock::new(()))
    }

    fn free_bytes(&self, _path: &Path) -> Result<u64> {
        Ok(u64::MAX)
    }

    fn identity(&self, path: &Path) -> Result<Option<Identity>> {
        let state = self.state();
        if let Some(node) = state.files.get(path) {
            return Ok(Some(node.identity()));
        }
        // Every directory is its own.
        let place = state.directories.iter().position(|directory| directory == path);
        Ok(place.map(|place| Identity { device: 1, inode: (1 << 40) + place as u64, ..Identity::default() }))
    }

    fn is_dir(&self, path: &Path) -> bool {
        self.state().directories.contains(path)
    }

    fn is_file(&self, path: &Path) -> bool {
        self.state().files.contains_key(path)
    }

    fn canonical(&self, path: &Path) -> PathBuf {
        path.to_path_buf()
    }
}
