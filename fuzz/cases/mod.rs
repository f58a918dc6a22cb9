//! What each fuzz target does with its bytes. `tests/fuzz.rs` runs the same with fixed seeds.
//!
//! Files are in memory, behind the seam that the program reads the disk through: an input costs what the program does with
//! it. [`on_disk`] puts them on the disk.
//!
//! Every function panics if the program does something wrong; a refusal is an [`Error`] with exit code 2 and one line.

pub mod adapter;
pub mod differential;
pub mod header;
pub mod index;
pub mod journal;
pub mod manifest;
pub mod memory;
pub mod packed;
pub mod packing;
pub mod recipe;
pub mod records;
pub mod torch;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memory::Memory;
use tiesmith::{Disk, Error, IoMode, Storage};

thread_local! {
    static ON_DISK: Cell<bool> = const { Cell::new(false) };
}

/// Does `work` with files in a temporary directory instead of in memory.
pub fn on_disk<T>(work: impl FnOnce() -> T) -> T {
    ON_DISK.set(true);
    let result = work();
    ON_DISK.set(false);
    result
}

/// The files of one target: in memory, or in a directory of this thread.
struct Files {
    dir: PathBuf,
    storage: Arc<dyn Storage>,
    memory: Option<Memory>,
}

impl Files {
    fn new(name: &str) -> Self {
        if !ON_DISK.get() {
            let memory = Memory::default();
            return Self {
                dir: Path::new("/fuzz").join(name),
                storage: Arc::new(memory.clone()),
                memory: Some(memory),
            };
        }
        let thread = format!("{:?}", std::thread::current().id()).replace(|c: char| !c.is_ascii_digit(), "");
        let dir = std::env::temp_dir().join(format!("tiesmith-fuzz-{name}-{}-{thread}", std::process::id()));
        Self { dir, storage: Arc::new(Disk::new(IoMode::Read)), memory: None }
    }

    /// Where the file called `name` is, or would be.
    fn path(&self, name: &str) -> String {
        self.dir.join(name).to_str().expect("a temporary path is UTF-8").to_owned()
    }

    /// Writes a file, and says where.
    fn put(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.dir.join(name);
        match &self.memory {
            Some(memory) => memory.put(&path, bytes),
            None => {
                std::fs::create_dir_all(path.parent().expect("a file in a directory")).expect("it can be made");
                std::fs::write(&path, bytes).expect("the temporary directory can be written to");
            }
        }
        self.path(name)
    }

    /// Removes the directory called `name`.
    fn clear(&self, name: &str) {
        match &self.memory {
            Some(memory) => memory.clear(&self.dir.join(name)),
            None => _ = std::fs::remove_dir_all(self.dir.join(name)),
        }
    }

    /// The files under `dir`, by their paths in there.
    fn tree(&self, name: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        let dir = self.dir.join(name);
        if let Some(memory) = &self.memory {
            return memory.tree(&dir);
        }
        let (mut tree, mut folders) = (BTreeMap::new(), vec![dir.clone()]);
        while let Some(folder) = folders.pop() {
            for path in std::fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path()) {
                if path.is_dir() {
                    folders.push(path);
                } else {
                    let name = path.strip_prefix(&dir).expect("it is in there").to_path_buf();
                    tree.insert(name, std::fs::read(&path).expect("it can be read"));
                }
            }
        }
        tree
    }
}

/// A refusal, as every one must be.
fn refused(error: &Error) {
    let line = error.to_string();
    assert_eq!(error.exit_code(), 2, "{line}");
    assert!(line.len() < 1000 && !line.chars().any(char::is_control), "{line:?}");
}

/// A safetensors file.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}
