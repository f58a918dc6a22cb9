//! The seam to the file system: everything the crate does to files goes through [`Storage`].
//!
//! - Reads and writes are positional, so that no order of operations is hidden in a file cursor.
//! - A short read or write is an error here, never a shorter result.
//! - Nothing is retried after a failed write or sync: what then is on the disk is unknown.
//! - The trait is what fault-injection tests replace; [`Disk`] is the real thing.
//!
//! Knows bytes, paths and durability; knows nothing of tensors.

mod ahead;
mod cache;
mod cloud;
mod disk;
mod http;
mod hub;
mod mmap;
mod online;
mod places;
mod refusal;
mod remote;
mod system;
mod transfer;
mod waits;

pub(crate) use ahead::request_bytes;
pub use cloud::is_object;
pub use disk::Disk;
pub use mmap::Window;
pub use online::Online;
pub(crate) use online::is_remote;
pub(crate) use places::hub_cache;
pub(crate) use remote::HEAD_BYTES;
pub use system::address_space_is_limited;
pub use transfer::{read_fully, write_fully};

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// How inputs are read. Results are identical.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IoMode {
    /// Long ranges of files on this machine are mapped, everything else is read.
    #[default]
    Auto,
    /// Windows of the file are mapped, used and unmapped.
    Mmap,
    /// Positional reads into fixed buffers.
    Read,
}

/// What identifies a file's content without reading it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Identity {
    /// Length in bytes.
    pub bytes: u64,
    /// Modification time, nanoseconds since the Unix epoch (0 where unknown).
    pub mtime_ns: i128,
    /// Change time, nanoseconds since the Unix epoch (0 where unknown).
    pub ctime_ns: i128,
    /// Device and inode number (0 where unknown): two paths with equal pairs are one file.
    pub device: u64,
    /// See `device`.
    pub inode: u64,
}

/// An open input file.
pub trait InputFile: Send + Sync {
    /// The path it was opened by.
    fn path(&self) -> &Path;
    /// The path of what is to be looked at if what is read at `offset` is wrong: of what is computed from several files, one
    /// of them.
    fn origin(&self, offset: u64) -> PathBuf {
        let _ = offset;
        self.path().to_path_buf()
    }
    /// Of what is computed, the file beside the tensors that says how, if one does: as a user would name it.
    fn described_by(&self) -> Option<String> {
        None
    }
    /// Identity when it was opened.
    fn identity(&self) -> &Identity;
    /// Identity of the open file now, to notice a change during the run.
    fn identity_now(&self) -> Result<Identity>;
    /// Identity of what is at the path now, which may be another file; `None` if there is nothing.
    fn identity_there(&self) -> Result<Option<Identity>> {
        self.identity_now().map(Some)
    }
    /// Fills `buffer` from `offset`; an end of file before that is an error.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()>;
    /// Makes `window` show `length` bytes from `offset`, mapped or read as the storage's mode says.
    fn load(&self, window: &mut Window, offset: u64, length: usize) -> Result<()> {
        window.fill(length, |buffer| self.read_at(buffer, offset))
    }
    /// Calls `see` with each range (file, offset, length) of stored files that reading `length` bytes from `offset` reads, and
    /// returns true: of what is computed. What is stored itself returns false.
    fn made_of(&self, offset: u64, length: u64, see: &mut dyn FnMut(&dyn InputFile, u64, u64)) -> bool {
        let _ = (offset, length, see);
        false
    }
    /// Hints that the range will be read soon. Never fails.
    fn prefetch(&self, offset: u64, length: u64) {
        self.made_of(offset, length, &mut |file, offset, length| file.prefetch(offset, length));
    }
    /// Whether reading it holds so much in memory that no other such file is to be read meanwhile.
    fn is_exclusive(&self) -> bool {
        false
    }
    /// What reading it found that the user should know.
    fn note(&self) -> Option<String> {
        None
    }
    /// Bytes of it that are held in memory for as long as it is open.
    fn held_bytes(&self) -> u64 {
        0
    }
}

/// Calls `see` with each range of stored files that reading `length` bytes of `file` from `offset` reads.
pub(crate) fn stored_ranges(
    file: &dyn InputFile,
    offset: u64,
    length: u64,
    see: &mut dyn FnMut(&dyn InputFile, u64, u64),
) {
    if !file.made_of(offset, length, see) {
        see(file, offset, length);
    }
}

/// A repository of the Hub at the commit that a revision meant when it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pinned {
    /// A path that [`Storage`] takes for the directory of its files.
    pub dir: PathBuf,
    /// The commit.
    pub commit: String,
    /// Which Hub it is from.
    pub endpoint: String,
}

/// An output file being written. Its first failure is sticky: every later operation reports it again.
pub trait OutputFile: Send + Sync {
    /// The path it was created at.
    fn path(&self) -> &Path;
    /// Writes all of `bytes` at `offset`.
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()>;
    /// Makes everything written so far durable.
    fn sync(&self) -> Result<()>;
    /// Hints that written (and synced) bytes of the range need not stay in the page cache.
    fn release(&self, offset: u64, length: u64);
}

/// A file system.
pub trait Storage: Send + Sync {
    /// Finds repository `id` on the Hub, at a revision or the main one; `None` for a storage without network.
    fn pin(&self, id: &str, revision: Option<&str>) -> Result<Option<Pinned>> {
        let _ = (id, revision);
        Ok(None)
    }
    /// Whether [`Storage::pin`] is not to ask anybody.
    fn is_offline(&self) -> bool {
        true
    }
    /// Hints that these files will be opened soon. Never fails.
    fn expect(&self, paths: &[PathBuf]) {
        let _ = paths;
    }
    /// Opens a regular file for reading; anything else (directory, FIFO, device) is refused.
    fn open(&self, path: &Path) -> Result<Box<dyn InputFile>>;
    /// The same for a file that this program made: that it is gone or cannot be read is no fault of an input, and the next
    /// attempt makes it anew.
    fn open_own(&self, path: &Path) -> Result<Box<dyn InputFile>> {
        self.open(path).map_err(|e| e.as_failed().replace_help("run the same command again"))
    }
    /// Fails if an input could not be read while a window showed it, so that what was made of it is worthless.
    fn check_mapped(&self) -> Result<()> {
        Ok(())
    }
    /// Allows so many bytes of memory for ranges of `sources` checkpoints that are fetched before they are read. Storages
    /// whose system does that have no use for it.
    fn read_ahead(&self, bytes: u64, sources: usize) {
        let _ = (bytes, sources);
    }
    /// Reads a whole small file, refusing one of more than `limit` bytes.
    fn read_small(&self, path: &Path, limit: u64) -> Result<Vec<u8>> {
        let input = self.open(path)?;
        let bytes = input.identity().bytes;
        if bytes > limit {
            return Err(Error::input(format!("{bytes} bytes, but at most {limit} are accepted")).at(path));
        }
        let mut content = vec![0; bytes as usize];
        input.read_at(&mut content, 0)?;
        Ok(content)
    }
    /// Copies the file at `from` to the address `to` of an object store (see [`is_object`]), where it appears when all of it is
    /// there. `go_on` is asked between parts, and may end it.
    fn upload(&self, from: &Path, to: &Path, go_on: &dyn Fn() -> Result<()>) -> Result<()> {
        let _ = (from, go_on);
        Err(Error::input("no object store is known here").at(to))
    }
    /// Creates (or truncates) a file of `length` bytes.
    fn create(&self, path: &Path, length: u64) -> Result<Box<dyn OutputFile>>;
    /// Opens an existing regular file for writing, keeping what it holds, and gives it this length.
    fn reopen(&self, path: &Path, length: u64) -> Result<Box<dyn OutputFile>>;
    /// Writes a whole small file durably: temporary name in `scratch_dir`, sync, rename to `path`.
    fn write_small(&self, path: &Path, bytes: &[u8], scratch_dir: &Path) -> Result<()> {
        let temporary = scratch_dir.join(path.file_name().unwrap_or_default()).with_added_extension("partial");
        let file = self.create(&temporary, bytes.len() as u64)?;
        file.write_at(bytes, 0)?;
        file.sync()?;
        drop(file);
        self.rename(&temporary, path)?;
        self.sync_dir(path.parent().filter(|dir| *dir != Path::new("")).unwrap_or(Path::new(".")))
    }
    /// Renames within one file system, replacing the target.
    fn rename(&self, from: &Path, to: &Path) -> Result<()>;
    /// Makes the directory's entries durable.
    fn sync_dir(&self, path: &Path) -> Result<()>;
    /// Creates the directory and its parents; those that it makes are durable.
    fn create_dir_all(&self, path: &Path) -> Result<()>;
    /// Removes a file; a missing one is not an error.
    fn remove_file(&self, path: &Path) -> Result<()>;
    /// Removes an empty directory; one that is missing, or not empty, is left as it is.
    fn remove_dir(&self, path: &Path) -> Result<()>;
    /// File names in a directory, sorted by name.
    fn list(&self, path: &Path) -> Result<Vec<std::ffi::OsString>>;
    /// Takes the exclusive lock kept in `path`, creating its directory where needed, or says who holds it. What is
    /// locked is the file at `path`, not one that somebody removed meanwhile. Released when the value is dropped.
    fn lock(&self, path: &Path) -> Result<Lock>;
    /// The same, or `None` if somebody holds it.
    fn try_lock(&self, path: &Path) -> Result<Option<Lock>> {
        self.lock(path).map(Some)
    }
    /// Bytes that can still be written to the file system of `path` or of its nearest existing parent.
    fn free_bytes(&self, path: &Path) -> Result<u64>;
    /// Identity of the file or directory at `path` (links followed), or `None` if there is nothing.
    fn identity(&self, path: &Path) -> Result<Option<Identity>>;
    /// Whether there is an entry called `path`, even if it is a link that leads nowhere.
    fn is_there(&self, path: &Path) -> Result<bool> {
        Ok(self.identity(path)?.is_some())
    }
    /// Whether `path` is a directory.
    fn is_dir(&self, path: &Path) -> bool;
    /// Whether `path` is a regular file.
    fn is_file(&self, path: &Path) -> bool;
    /// `path` with links resolved, or as it is where that fails.
    fn canonical(&self, path: &Path) -> PathBuf;
}

/// A held lock; see [`Storage::lock`].
pub struct Lock {
    _held: Box<dyn Send + Sync>,
}

impl Lock {
    /// A lock that is released when `held` is dropped.
    pub fn new(held: impl Send + Sync + 'static) -> Self {
        Self { _held: Box::new(held) }
    }
}
