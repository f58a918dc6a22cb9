//! Files that are read from the Hub, a web server or an object store by byte range, beside those of the file system.
//!
//! - `hf://org/name@COMMIT/...` and `s3://bucket/prefix` look like directories, `https://.../file` like a file; nothing of them
//!   is stored, unless a cache for it is given.
//! - A revision is asked for once: whatever names it, it means one commit from then on.
//!
//! Everything that is not remote is left to [`Disk`]; how a remote file is read, to `remote`.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use super::ahead::{Ahead, Source};
use super::cache::{Cache, Cached};
use super::cloud::{self, Clouds};
use super::hub::{Hub, Snapshot};
use super::remote::{DEVICE, Far, Remote, RemoteInput, hash};
use super::waits::Waits;
use super::{Disk, Identity, InputFile, Lock, OutputFile, Pinned, Storage};
use crate::error::{Error, ErrorKind, Result};

/// Files that are looked at at a time before they are opened.
const LOOKS_AT_ONCE: usize = 16;

/// A repository and the revision of it that was asked for.
type Wanted = (String, Option<String>);

/// The file system and what is on the network. See the module's documentation.
pub struct Online {
    disk: Disk,
    hub: OnceLock<Arc<Hub>>,
    ahead: Arc<Ahead>,
    /// What revisions mean, as far as that was asked.
    pins: Mutex<HashMap<Wanted, Pinned>>,
    /// By id and commit.
    snapshots: Mutex<HashMap<String, Arc<Snapshot>>>,
    /// What is known of files, by path; `None` for those that are not there.
    heads: Mutex<HashMap<PathBuf, Option<Arc<dyn Far>>>>,
    clouds: Clouds,
    waits: Arc<Waits>,
    /// What is kept of what was read.
    cache: Option<Arc<Cache>>,
}

impl Online {
    /// The network beside `disk`. Nothing is asked before a remote file is.
    pub fn new(disk: Disk) -> Self {
        Self {
            disk,
            hub: OnceLock::new(),
            ahead: Arc::default(),
            pins: Mutex::default(),
            snapshots: Mutex::default(),
            heads: Mutex::default(),
            clouds: Clouds::default(),
            waits: Arc::default(),
            cache: None,
        }
    }

    /// The same, telling `listener` of every wait that a server asks for: the host, and how long it takes.
    pub fn telling_waits(mut self, listener: impl Fn(&str, Duration) + Send + Sync + 'static) -> Self {
        self.waits = Arc::new(Waits::new(Box::new(listener)));
        self.clouds = Clouds::telling(Arc::clone(&self.waits));
        self
    }

    /// The same, keeping up to `bytes` bytes of what is read over the network in `dir`, for the next pass over it. They go
    /// when the process ends.
    pub fn with_cache(mut self, dir: &Path, bytes: u64) -> Result<Self> {
        let free = self.disk.free_bytes(dir)?;
        if !self.disk.is_dir(dir) {
            return Err(Error::input("there is no such directory for --cache").at(dir).help("create it"));
        }
        if free < bytes {
            return Err(Error::failed(format!("the cache is to hold {bytes} bytes, but only {free} are free"))
                .at(dir)
                .help("make room, or use a smaller --cache-size"));
        }
        self.cache = Some(Arc::new(Cache::new(dir, bytes)?));
        Ok(self)
    }

    fn hub(&self) -> &Arc<Hub> {
        self.hub.get_or_init(|| Arc::new(Hub::from_environment(Arc::clone(&self.waits))))
    }

    /// The snapshot that a `hf://` path is in, and the path in it.
    fn in_snapshot(&self, path: &Path) -> Option<(Arc<Snapshot>, String)> {
        let text = path.to_str()?.strip_prefix("hf://")?;
        let mut parts = text.splitn(3, '/');
        let key = format!("{}/{}", parts.next()?, parts.next()?);
        let snapshot = lock(&self.snapshots).get(&key).cloned()?;
        Some((snapshot, parts.next().unwrap_or_default().to_owned()))
    }

    /// What is at `path`; `None` if nothing is.
    fn look(&self, path: &Path) -> Result<Option<Arc<dyn Far>>> {
        if let Some(known) = lock(&self.heads).get(path) {
            return Ok(known.clone());
        }
        if cloud::is_object(path) {
            let found = self.clouds.open(path)?;
            lock(&self.heads).insert(path.to_path_buf(), found.clone());
            return Ok(found);
        }
        let hub = Arc::clone(self.hub());
        let (url, snapshot) = match self.in_snapshot(path) {
            Some((snapshot, file)) if snapshot.files.contains(&file) => (hub.address(&snapshot, &file), Some(snapshot)),
            Some(_) => return Ok(None),
            None => (path.to_str().unwrap_or_default().to_owned(), None),
        };
        let found = Remote::open(path, url, snapshot, hub)?.map(|found| Arc::new(found) as Arc<dyn Far>);
        lock(&self.heads).insert(path.to_path_buf(), found.clone());
        Ok(found)
    }
}

/// Whether `path` is one on the network.
pub(crate) fn is_remote(path: &Path) -> bool {
    let text = path.as_os_str().as_encoded_bytes();
    [&b"hf://"[..], b"https://", b"http://"].iter().any(|scheme| text.starts_with(scheme)) || cloud::is_object(path)
}

fn missing(path: &Path) -> Error {
    Error::input("no such file").at(path).help("check the address")
}

fn read_only(path: &Path) -> Error {
    Error::input("this is an address, and outputs are written to directories").at(path).help("choose another --out")
}

impl Storage for Online {
    fn pin(&self, id: &str, revision: Option<&str>) -> Result<Option<Pinned>> {
        let wanted = (id.to_owned(), revision.map(str::to_owned));
        // Held while the Hub is asked: two that ask at once are told the same.
        let mut pins = lock(&self.pins);
        if let Some(pinned) = pins.get(&wanted) {
            return Ok(Some(pinned.clone()));
        }
        let snapshot = Arc::new(self.hub().snapshot(id, revision)?);
        let commit = snapshot.commit.clone();
        let key = format!("{id}@{commit}");
        let dir = PathBuf::from(format!("hf://{key}"));
        lock(&self.snapshots).entry(key).or_insert(snapshot);
        let pinned = Pinned { dir, commit, endpoint: self.hub().endpoint.clone() };
        pins.insert(wanted, pinned.clone());
        Ok(Some(pinned))
    }

    fn is_offline(&self) -> bool {
        self.hub().offline
    }

    /// Looks at several at a time: a checkpoint can have hundreds of files, and each takes two answers.
    fn expect(&self, paths: &[PathBuf]) {
        let far: Vec<&PathBuf> = paths.iter().filter(|path| is_remote(path)).collect();
        let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        let look = || {
            while let Some(path) = far.get(next.fetch_add(1, Ordering::Relaxed)) {
                // Whoever opens it is told why it cannot be.
                if failed.load(Ordering::Relaxed) || self.look(path).is_err() {
                    return failed.store(true, Ordering::Relaxed);
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..far.len().min(LOOKS_AT_ONCE) {
                // Where the system has no more threads, those that there are do.
                if std::thread::Builder::new().spawn_scoped(scope, look).is_err() {
                    break;
                }
            }
            if far.len() > 1 {
                look();
            }
        });
    }

    fn open(&self, path: &Path) -> Result<Box<dyn InputFile>> {
        if !is_remote(path) {
            return self.disk.open(path);
        }
        let far = self.look(path)?.ok_or_else(|| missing(path))?;
        let source: Arc<dyn Source> = match &self.cache {
            Some(cache) => {
                let cache = Arc::clone(cache);
                Arc::new(Cached { source: Arc::clone(&far) as _, number: far.identity().inode, cache })
            }
            None => Arc::clone(&far) as _,
        };
        Ok(Box::new(RemoteInput { far, source, ahead: Arc::clone(&self.ahead) }))
    }

    fn check_mapped(&self) -> Result<()> {
        self.disk.check_mapped()
    }

    fn read_ahead(&self, bytes: u64, sources: usize) {
        self.ahead.allow(bytes, sources);
    }

    fn upload(&self, from: &Path, to: &Path, go_on: &dyn Fn() -> Result<()>) -> Result<()> {
        self.clouds.upload(&*self.disk.open(from)?, to, go_on)
    }

    fn create(&self, path: &Path, length: u64) -> Result<Box<dyn OutputFile>> {
        if is_remote(path) { Err(read_only(path)) } else { self.disk.create(path, length) }
    }

    fn reopen(&self, path: &Path, length: u64) -> Result<Box<dyn OutputFile>> {
        if is_remote(path) { Err(read_only(path)) } else { self.disk.reopen(path, length) }
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.disk.rename(from, to)
    }

    fn sync_dir(&self, path: &Path) -> Result<()> {
        self.disk.sync_dir(path)
    }

    fn create_dir_all(&self, path: &Path) -> Result<()> {
        if is_remote(path) { Err(read_only(path)) } else { self.disk.create_dir_all(path) }
    }

    fn remove_file(&self, path: &Path) -> Result<()> {
        self.disk.remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> Result<()> {
        self.disk.remove_dir(path)
    }

    fn list(&self, path: &Path) -> Result<Vec<OsString>> {
        if !is_remote(path) {
            return self.disk.list(path);
        }
        if cloud::is_object(path) {
            return self.clouds.list(path);
        }
        let Some((snapshot, _)) = self.in_snapshot(path) else { return Ok(Vec::new()) };
        let top = snapshot.files.iter().filter(|file| !file.contains('/'));
        let mut names: Vec<OsString> = top.map(OsString::from).collect();
        names.sort_unstable();
        Ok(names)
    }

    fn lock(&self, path: &Path) -> Result<Lock> {
        if is_remote(path) { Err(read_only(path)) } else { self.disk.lock(path) }
    }

    fn try_lock(&self, path: &Path) -> Result<Option<Lock>> {
        if is_remote(path) { Err(read_only(path)) } else { self.disk.try_lock(path) }
    }

    fn free_bytes(&self, path: &Path) -> Result<u64> {
        if is_remote(path) { Err(read_only(path)) } else { self.disk.free_bytes(path) }
    }

    fn identity(&self, path: &Path) -> Result<Option<Identity>> {
        if !is_remote(path) {
            return self.disk.identity(path);
        }
        if let Some((_, file)) = self.in_snapshot(path)
            && file.is_empty()
        {
            let inode = hash(&[&path.to_string_lossy()]);
            return Ok(Some(Identity { device: DEVICE, inode, ..Identity::default() }));
        }
        if cloud::is_object(path) && !self.clouds.list(path)?.is_empty() {
            let inode = hash(&[&path.to_string_lossy()]);
            return Ok(Some(Identity { device: DEVICE, inode, ..Identity::default() }));
        }
        // What has no ending is no file that anyone here asks for.
        if path.extension().is_none() && self.in_snapshot(path).is_none() {
            return Ok(None);
        }
        Ok(self.look(path)?.map(|found| found.identity().clone()))
    }

    fn is_there(&self, path: &Path) -> Result<bool> {
        match self.in_snapshot(path) {
            _ if !is_remote(path) => self.disk.is_there(path),
            Some((snapshot, file)) => Ok(snapshot.files.contains(&file)),
            None => match self.look(path) {
                // Some servers refuse what they do not have; one that does not answer may have it.
                Err(error) if error.kind() != ErrorKind::Failed => Ok(false),
                found => Ok(found?.is_some()),
            },
        }
    }

    fn is_dir(&self, path: &Path) -> bool {
        match is_remote(path) {
            true if cloud::is_object(path) => self.clouds.list(path).is_ok_and(|names| !names.is_empty()),
            true => self.in_snapshot(path).is_some_and(|(_, file)| file.is_empty()),
            false => self.disk.is_dir(path),
        }
    }

    fn is_file(&self, path: &Path) -> bool {
        if is_remote(path) { self.is_there(path).unwrap_or(false) } else { self.disk.is_file(path) }
    }

    fn canonical(&self, path: &Path) -> PathBuf {
        if is_remote(path) { path.to_path_buf() } else { self.disk.canonical(path) }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
