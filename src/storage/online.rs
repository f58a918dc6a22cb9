//! Files that are read from the Hub or a web server by byte range, beside those of the file system.
//!
//! - `hf://org/name@COMMIT/...` looks like a directory, `https://.../file` like a file; nothing of them is stored.
//! - The first request of a file tells its length and version (ETag), and brings its beginning, which holds the header or
//!   all of a small file. Every later answer must be of the same version.
//! - The address that a redirect led to is used again until it is refused, then asked for anew.
//!
//! Everything that is not remote is left to [`Disk`].

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::http::{Answer, Failure, Patience, content_range, passing};
use super::hub::{Hub, Snapshot};
use super::{Disk, Identity, InputFile, Lock, OutputFile, Pinned, Storage, Window};
use crate::error::{Error, Result};

/// Bytes that the first request of a file asks for: the header of a usual shard.
const HEAD_BYTES: u64 = 64 << 10;
/// Longest range of one request.
const REQUEST_BYTES: u64 = 16 << 20;
/// Device of remote files, which no file system has.
const DEVICE: u64 = u64::MAX;

/// The file system and what is on the network. See the module's documentation.
pub struct Online {
    disk: Disk,
    hub: OnceLock<Arc<Hub>>,
    /// By id and commit.
    snapshots: Mutex<HashMap<String, Arc<Snapshot>>>,
    /// What is known of files, by path; `None` for those that are not there.
    heads: Mutex<HashMap<PathBuf, Option<Arc<Remote>>>>,
}

/// What is known of a remote file.
struct Remote {
    path: PathBuf,
    /// Where it is asked for.
    url: String,
    /// The commit it belongs to, for messages.
    snapshot: Option<Arc<Snapshot>>,
    hub: Arc<Hub>,
    identity: Identity,
    version: Version,
    /// Its first bytes.
    head: Vec<u8>,
    /// Where a redirect led to.
    direct: Mutex<String>,
}

/// What tells versions of a file apart.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Version {
    bytes: u64,
    tag: Option<String>,
    linked: Option<String>,
}

struct RemoteInput(Arc<Remote>);

impl Online {
    /// The network beside `disk`. Nothing is asked before a remote file is.
    pub fn new(disk: Disk) -> Self {
        Self { disk, hub: OnceLock::new(), snapshots: Mutex::default(), heads: Mutex::default() }
    }

    fn hub(&self) -> &Arc<Hub> {
        self.hub.get_or_init(|| Arc::new(Hub::from_environment()))
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
    fn look(&self, path: &Path) -> Result<Option<Arc<Remote>>> {
        if let Some(known) = lock(&self.heads).get(path) {
            return Ok(known.clone());
        }
        let hub = Arc::clone(self.hub());
        let (url, snapshot) = match self.in_snapshot(path) {
            Some((snapshot, file)) if snapshot.files.contains(&file) => (hub.address(&snapshot, &file), Some(snapshot)),
            Some(_) => return Ok(None),
            None => (path.to_str().unwrap_or_default().to_owned(), None),
        };
        let found = Remote::open(path, url, snapshot, hub)?.map(Arc::new);
        lock(&self.heads).insert(path.to_path_buf(), found.clone());
        Ok(found)
    }
}

/// Whether `path` is one on the network.
fn is_remote(path: &Path) -> bool {
    let text = path.as_os_str().as_encoded_bytes();
    [&b"hf://"[..], b"https://", b"http://"].iter().any(|scheme| text.starts_with(scheme))
}

impl Remote {
    /// Asks for the first bytes; `None` if there is no such file.
    fn open(path: &Path, url: String, snapshot: Option<Arc<Snapshot>>, hub: Arc<Hub>) -> Result<Option<Self>> {
        let mut patience = Patience::at_first();
        loop {
            match Self::try_open(path, &url, snapshot.as_ref(), &hub) {
                Ok(found) => return Ok(found),
                Err(failure) => patience.after(failure, &url).map_err(|e| e.as_input())?,
            }
        }
    }

    fn try_open(
        path: &Path,
        url: &str,
        snapshot: Option<&Arc<Snapshot>>,
        hub: &Arc<Hub>,
    ) -> Result<Option<Self>, Failure> {
        let answer = hub.http.get(url, Some((0, HEAD_BYTES - 1)))?;
        if let Some(failure) = passing(&answer) {
            return Err(failure);
        }
        let status = answer.response.status().as_u16();
        // An empty file has no first byte.
        let empty = status == 416 && answer.header("content-range").is_some_and(|range| range.ends_with("/0"));
        let total = match status {
            404 | 410 if snapshot.is_none() => return Ok(None),
            206 => first_of(&answer, path)?,
            _ if empty => 0,
            200 => return Err(Failure::Final(ignores_ranges(path))),
            _ => return Err(Failure::Final(refused(&answer, path, snapshot, hub))),
        };
        let version = Version::of(&answer, total);
        let direct = answer.url.clone();
        let mut head = vec![0; if empty { 0 } else { total.min(HEAD_BYTES) as usize }];
        let mut body = answer.response.into_body().into_reader();
        body.read_exact(&mut head).map_err(|e| Failure::Passing(format!("the answer broke off: {e}"), None))?;
        let identity = Identity {
            bytes: total,
            mtime_ns: i128::from(hash(&[version.tag.as_deref().unwrap_or_default(), url]) >> 1),
            ctime_ns: 0,
            device: DEVICE,
            inode: hash(&[url]),
        };
        Ok(Some(Self {
            path: path.to_path_buf(),
            url: url.to_owned(),
            snapshot: snapshot.cloned(),
            hub: Arc::clone(hub),
            identity,
            version,
            head,
            direct: Mutex::new(direct),
        }))
    }

    /// Fills `buffer` from `offset`, in as many requests as it takes.
    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let mut done = 0;
        let from_head = (self.head.len() as u64).saturating_sub(offset).min(buffer.len() as u64) as usize;
        if from_head > 0 {
            buffer[..from_head].copy_from_slice(&self.head[offset as usize..offset as usize + from_head]);
            done = from_head;
        }
        let mut patience = Patience::at_work();
        while done < buffer.len() {
            let end = buffer.len().min(done + REQUEST_BYTES as usize);
            let before = done;
            let result = self.request(&mut buffer[..end], offset, &mut done);
            if done > before {
                patience.renew();
            }
            if let Err(failure) = result {
                patience.after(failure, &self.url).map_err(|e| e.at(&self.path))?;
            }
        }
        Ok(())
    }

    /// One request for the rest of `buffer` from `done` on; `done` grows with what arrives.
    fn request(&self, buffer: &mut [u8], offset: u64, done: &mut usize) -> Result<(), Failure> {
        let first = offset + *done as u64;
        let last = offset + buffer.len() as u64 - 1;
        let direct = lock(&self.direct).clone();
        let mut answer = self.hub.http.get(&direct, Some((first, last)))?;
        let expired = matches!(answer.response.status().as_u16(), 400 | 401 | 403 | 404 | 410);
        if expired && direct != self.url {
            answer = self.hub.http.get(&self.url, Some((first, last)))?;
            lock(&self.direct).clone_from(&answer.url);
        }
        if let Some(failure) = passing(&answer) {
            return Err(failure);
        }
        match answer.response.status().as_u16() {
            206 => {}
            200 => return Err(Failure::Final(ignores_ranges(&self.path))),
            404 | 410 | 412 | 416 => return Err(Failure::Final(self.changed())),
            _ => return Err(Failure::Final(refused(&answer, &self.path, self.snapshot.as_ref(), &self.hub))),
        }
        let range = answer.header("content-range").and_then(content_range);
        let version = Version::of(&answer, range.map_or(0, |(_, _, total)| total));
        if range.map(|(first, last, _)| (first, last)) != Some((first, last)) {
            let said = answer.header("content-range").unwrap_or("no Content-Range").to_owned();
            return Err(Failure::Passing(format!("asked for bytes {first}-{last}, answered with {said}"), None));
        }
        if !version.fits(&self.version) {
            return Err(Failure::Final(self.changed()));
        }
        let mut body = answer.response.into_body().into_reader();
        while *done < buffer.len() {
            match body.read(&mut buffer[*done..]) {
                Ok(0) => return Err(Failure::Passing("the answer ended early".into(), None)),
                Ok(read) => *done += read,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Failure::Passing(format!("the answer broke off: {e}"), None)),
            }
        }
        // To the end, so that the connection can be used again.
        match body.read(&mut [0]) {
            Ok(0) => Ok(()),
            _ => Err(Failure::Final(Error::failed("the server sent more than was asked for").at(&self.path))),
        }
    }

    fn changed(&self) -> Error {
        Error::failed("the file on the server changed while it was read")
            .at(&self.path)
            .help("do not change inputs during a run; run it again with --restart")
    }
}

impl Version {
    fn of(answer: &Answer, bytes: u64) -> Self {
        let tag = answer.header("etag").or(answer.header("last-modified"));
        Self { bytes, tag: tag.map(|tag| tag.trim_start_matches("W/").to_owned()), linked: answer.linked_etag.clone() }
    }

    /// Whether both can be versions of the same content: what only one of them tells does not count.
    fn fits(&self, other: &Self) -> bool {
        let same = |a: &Option<String>, b: &Option<String>| a.is_none() || b.is_none() || a == b;
        self.bytes == other.bytes && same(&self.tag, &other.tag) && same(&self.linked, &other.linked)
    }
}

/// The file's length, from the answer to a request for its first bytes.
fn first_of(answer: &Answer, path: &Path) -> Result<u64, Failure> {
    let range = answer.header("content-range").and_then(content_range);
    match range {
        Some((0, last, total)) if last + 1 == total.min(HEAD_BYTES) => Ok(total),
        _ => {
            let said = answer.header("content-range").unwrap_or("no Content-Range").to_owned();
            let text = format!("asked for bytes 0-{}, answered with {said}", HEAD_BYTES - 1);
            Err(Failure::Final(Error::input(text).at(path).help("its server is of no use here: download the file")))
        }
    }
}

fn ignores_ranges(path: &Path) -> Error {
    Error::input("its server ignores byte ranges, and would send the whole file again and again")
        .at(path)
        .help("download the file, or use another server")
}

fn refused(answer: &Answer, path: &Path, snapshot: Option<&Arc<Snapshot>>, hub: &Hub) -> Error {
    match snapshot {
        Some(snapshot) => hub.refused(answer, &snapshot.id, &snapshot.commit),
        None => Error::input(format!("the server says {}", answer.response.status()))
            .at(path)
            .help("check the address, and whether it may be read"),
    }
}

/// A number that stands for these texts.
fn hash(texts: &[&str]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    for text in texts {
        hasher.update(text.as_bytes());
        hasher.update(&[0]);
    }
    u64::from_le_bytes(*hasher.finalize().as_bytes().first_chunk().expect("a hash has 32 bytes"))
}

impl InputFile for RemoteInput {
    fn path(&self) -> &Path {
        &self.0.path
    }

    fn identity(&self) -> &Identity {
        &self.0.identity
    }

    fn identity_now(&self) -> Result<Identity> {
        let remote = &self.0;
        if remote.snapshot.is_some() {
            // A commit's files do not change, and every answer was checked.
            return Ok(remote.identity.clone());
        }
        let now = Remote::open(&remote.path, remote.url.clone(), None, Arc::clone(&remote.hub))?;
        now.map(|now| now.identity).ok_or_else(|| remote.changed())
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let end = offset + buffer.len() as u64;
        if end > self.0.identity.bytes {
            let bytes = self.0.identity.bytes;
            return Err(Error::failed(format!("{bytes} bytes, but bytes up to {end} were wanted")).at(&self.0.path));
        }
        self.0.read(buffer, offset)
    }

    fn load(&self, window: &mut Window, offset: u64, length: usize) -> Result<()> {
        window.fill(length, |buffer| self.read_at(buffer, offset))
    }

    fn prefetch(&self, _offset: u64, _length: u64) {}

    fn held_bytes(&self) -> u64 {
        self.0.head.len() as u64
    }
}

fn missing(path: &Path) -> Error {
    Error::input("no such file").at(path).help("check the address")
}

fn read_only(path: &Path) -> Error {
    Error::input("this is an address, and outputs are written to directories").at(path).help("choose another --out")
}

impl Storage for Online {
    fn pin(&self, id: &str, revision: Option<&str>) -> Result<Option<Pinned>> {
        let snapshot = Arc::new(self.hub().snapshot(id, revision)?);
        let commit = snapshot.commit.clone();
        let key = format!("{id}@{commit}");
        let dir = PathBuf::from(format!("hf://{key}"));
        lock(&self.snapshots).entry(key).or_insert(snapshot);
        Ok(Some(Pinned { dir, commit, endpoint: self.hub().endpoint.clone() }))
    }

    fn is_offline(&self) -> bool {
        self.hub().offline
    }

    fn open(&self, path: &Path) -> Result<Box<dyn InputFile>> {
        if !is_remote(path) {
            return self.disk.open(path);
        }
        let found = self.look(path)?.ok_or_else(|| missing(path))?;
        Ok(Box::new(RemoteInput(found)))
    }

    fn check_mapped(&self) -> Result<()> {
        self.disk.check_mapped()
    }

    fn read_small(&self, path: &Path, limit: u64) -> Result<Vec<u8>> {
        if !is_remote(path) {
            return self.disk.read_small(path, limit);
        }
        let found = self.look(path)?.ok_or_else(|| missing(path))?;
        let bytes = found.identity.bytes;
        if bytes > limit {
            return Err(Error::input(format!("{bytes} bytes, but at most {limit} are accepted")).at(path));
        }
        let mut content = vec![0; bytes as usize];
        found.read(&mut content, 0)?;
        Ok(content)
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
        // What has no ending is no file that anyone here asks for.
        if path.extension().is_none() && self.in_snapshot(path).is_none() {
            return Ok(None);
        }
        Ok(self.look(path)?.map(|found| found.identity.clone()))
    }

    fn is_dir(&self, path: &Path) -> bool {
        match is_remote(path) {
            true => self.in_snapshot(path).is_some_and(|(_, file)| file.is_empty()),
            false => self.disk.is_dir(path),
        }
    }

    fn is_file(&self, path: &Path) -> bool {
        if !is_remote(path) {
            return self.disk.is_file(path);
        }
        match self.in_snapshot(path) {
            Some((snapshot, file)) => snapshot.files.contains(&file),
            None => self.look(path).is_ok_and(|found| found.is_some()),
        }
    }

    fn canonical(&self, path: &Path) -> PathBuf {
        if is_remote(path) { path.to_path_buf() } else { self.disk.canonical(path) }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
