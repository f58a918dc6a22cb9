//! What the parts of a merge tell each other: small files in one directory that all of them see.
//!
//! - A file appears whole or not at all, names the work it belongs to, and ends with a checksum.
//! - What is in it is a function of the plan and the file's name. So it does not matter who writes it, or how often.
//! - Locks spare double work, and nothing depends on them: a file system without locks costs time, not bytes.
//!
//! Knows names and bytes; not what they mean.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::lengths::Lengths;
use crate::engine::Observer;
use crate::error::{Error, Result};
use crate::plan::Plan;
use crate::storage::{Lock, Storage};

/// First bytes of every file.
const MAGIC: &[u8; 16] = b"tiesmith part 1\n";
const CHECKSUM_BYTES: usize = 16;
/// What helps against a file that makes no sense.
const HELP: &str = "remove it and run the part again";
/// Between looks whether others are done.
const WAIT: Duration = Duration::from_millis(200);

/// The directory. See the module's documentation.
pub(super) struct Board {
    pub storage: Arc<dyn Storage>,
    dir: PathBuf,
    fingerprint: String,
    lengths: Lengths,
}

impl Board {
    /// The board of the work on `plan`, whose sketches have `bins` bins, in `dir`.
    pub(super) fn new(dir: PathBuf, plan: &Plan, bins: usize, storage: &Arc<dyn Storage>) -> Self {
        let (fingerprint, lengths) = (plan.fingerprint.clone(), Lengths::of(plan, bins));
        Self { storage: Arc::clone(storage), dir, fingerprint, lengths }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Whether there is a file `name`.
    pub(super) fn has(&self, name: &str) -> bool {
        self.storage.is_file(&self.path(name))
    }

    /// What file `name` says; `None` if it is not there.
    pub(super) fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        self.look(name)?.transpose()
    }

    /// The same; what is wrong with the file itself is told apart from a failure to read it.
    pub(super) fn look(&self, name: &str) -> Result<Option<Result<Vec<u8>>>> {
        let path = self.path(name);
        let Some(found) = self.storage.identity(&path)? else { return Ok(None) };
        let longest =
            MAGIC.len() as u64 + self.fingerprint.len() as u64 + self.lengths.longest(name) + CHECKSUM_BYTES as u64;
        if found.bytes > longest {
            let long =
                format!("this file of a part is damaged: it has {} bytes, but can have {longest} at most", found.bytes);
            return Ok(Some(Err(Error::failed(long).at(&path).help(HELP))));
        }
        let bytes = self.storage.read_small(&path, longest)?;
        Ok(Some(self.content(&path, bytes)))
    }

    /// What the `bytes` of a file say.
    fn content(&self, path: &Path, mut bytes: Vec<u8>) -> Result<Vec<u8>> {
        let start = MAGIC.len() + self.fingerprint.len();
        let sound = bytes.len() >= start + CHECKSUM_BYTES && bytes.starts_with(MAGIC) && {
            let (content, sum) = bytes.split_at(bytes.len() - CHECKSUM_BYTES);
            checksum(content) == sum
        };
        if !sound {
            return Err(damaged(path));
        }
        if &bytes[MAGIC.len()..start] != self.fingerprint.as_bytes() {
            return Err(Error::input("this belongs to another plan").at(path).help("use the plan it was made with"));
        }
        bytes.truncate(bytes.len() - CHECKSUM_BYTES);
        bytes.drain(..start);
        Ok(bytes)
    }

    /// Puts up file `name`, durably.
    pub(super) fn write(&self, name: &str, payload: &[u8]) -> Result<()> {
        let mut bytes = Vec::with_capacity(payload.len() + 128);
        bytes.extend(MAGIC);
        bytes.extend(self.fingerprint.as_bytes());
        bytes.extend(payload);
        let sum = checksum(&bytes);
        bytes.extend(sum);
        // Unique, for two may write the same where there are no locks.
        let nonce = RandomState::new().build_hasher().finish();
        let temporary = self.path(&format!("{name}.{}-{nonce:016x}.tmp", std::process::id()));
        let file = self.storage.create(&temporary, bytes.len() as u64)?;
        file.write_at(&bytes, 0)?;
        file.sync()?;
        drop(file);
        self.storage.rename(&temporary, &self.path(name))?;
        self.storage.sync_dir(&self.dir)
    }

    /// Takes file `name` away.
    pub(super) fn remove(&self, name: &str) -> Result<()> {
        self.storage.remove_file(&self.path(name))?;
        self.storage.sync_dir(&self.dir)
    }

    /// The lock on the work that `name` is about, or who holds it.
    pub(super) fn lock(&self, name: &str) -> Result<Lock> {
        self.storage.lock(&self.lock_path(name))
    }

    fn lock_path(&self, name: &str) -> PathBuf {
        self.path(&format!("{name}.lock"))
    }

    /// Waits until all files `names` are there, and makes those that nobody is at work on, from `first` on. `make` is
    /// given an index. Ends without waiting for anybody who does not run.
    pub(super) fn share(
        &self,
        names: &[String],
        first: usize,
        observer: &dyn Observer,
        mut make: impl FnMut(usize) -> Result<Vec<u8>>,
    ) -> Result<()> {
        loop {
            let mut busy = false;
            for at in (0..names.len()).map(|i| (first + i) % names.len()).filter(|&at| !self.has(&names[at])) {
                match self.storage.try_lock(&self.lock_path(&names[at]))? {
                    Some(_lock) if self.has(&names[at]) => {}
                    Some(_lock) => {
                        let payload = make(at)?;
                        self.write(&names[at], &payload)?;
                    }
                    None => busy = true,
                }
            }
            if !busy && names.iter().all(|name| self.has(name)) {
                return Ok(());
            }
            observer.go_on()?;
            std::thread::sleep(WAIT);
        }
    }

    /// The content of a file that has to be there.
    pub(super) fn expect(&self, name: &str) -> Result<Vec<u8>> {
        self.read(name)?.ok_or_else(|| Error::failed("it is gone").at(&self.path(name)).help("run the part again"))
    }

    /// A file that is sound and does not say what it should.
    pub(super) fn senseless(&self, name: &str) -> Error {
        damaged(&self.path(name))
    }
}

fn damaged(path: &Path) -> Error {
    Error::failed("this file of a part is damaged").at(path).help(HELP)
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    *blake3::hash(bytes).as_bytes().first_chunk().expect("a hash has 32 bytes")
}
