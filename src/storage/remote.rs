//! A file on the Hub or a web server, read by byte range.
//!
//! - The first request tells its length and version (ETag), and brings its beginning, which holds the header or all of a
//!   small file. Every later answer must be of the same version.
//! - The address that a redirect led to is used again until it is refused, then asked for anew.
//! - What is announced is fetched ahead of its use, by [`Ahead`].

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::ahead::{Ahead, Source};
use super::http::{Answer, Failure, Flow, Http, Patience, content_range, drain, settled, shown};
use super::hub::{Hub, Snapshot};
use super::online::lock;
use super::refusal::SET_CLOCK;
use super::{Identity, InputFile};
use crate::error::{Error, Result};

/// Bytes that the first request of a file asks for: the header of a usual shard.
pub const HEAD_BYTES: u64 = 64 << 10;
/// Longest range of one request.
const REQUEST_BYTES: u64 = 16 << 20;
/// So much of an answer is progress, or a sixteenth of what is wanted.
const ENOUGH_BYTES: usize = 64 << 10;
/// Device of remote files, which no file system has.
pub(super) const DEVICE: u64 = u64::MAX;

/// What is known of a remote file.
pub(super) struct Remote {
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

/// What is read over a network: a file on a server, or an object in a store.
pub(super) trait Far: Source {
    /// The path it is opened by.
    fn path(&self) -> &Path;
    /// Identity when it was looked up.
    fn identity(&self) -> &Identity;
    /// Identity of what is there now.
    fn identity_now(&self) -> Result<Identity>;
    /// Its first bytes.
    fn head(&self) -> &[u8];
}

/// One that is open.
pub(super) struct RemoteInput {
    pub far: Arc<dyn Far>,
    /// Where its ranges come from: itself, or what is kept of it.
    pub source: Arc<dyn Source>,
    pub ahead: Arc<Ahead>,
}

impl Remote {
    /// Asks for the first bytes; `None` if there is no such file.
    pub(super) fn open(
        path: &Path,
        url: String,
        snapshot: Option<Arc<Snapshot>>,
        hub: Arc<Hub>,
    ) -> Result<Option<Self>> {
        let mut patience = Patience::at_first(&hub.http);
        loop {
            match Self::try_open(path, &url, snapshot.as_ref(), &hub) {
                Ok(found) => return Ok(found),
                Err(failure) => patience.after(failure, &url)?,
            }
        }
    }

    fn try_open(
        path: &Path,
        url: &str,
        snapshot: Option<&Arc<Snapshot>>,
        hub: &Arc<Hub>,
    ) -> Result<Option<Self>, Failure> {
        let answer = settled(hub.http.get(url, Some((0, HEAD_BYTES - 1)))?)?;
        let status = answer.response.status().as_u16();
        // An empty file has no first byte.
        let empty = status == 416 && answer.header("content-range").is_some_and(|range| range.ends_with("/0"));
        let total = match status {
            404 | 410 if snapshot.is_none() => return Ok(None),
            206 => first_of(&answer, path)?,
            _ if empty => 0,
            200 => return Err(Failure::Final(ignores_ranges(path))),
            400 | 401 | 403 if answer.url != url => return Err(refused_there(answer, path)),
            _ => return Err(Failure::Final(refused(answer, path, snapshot, hub))),
        };
        let version = Version::of(&answer, total);
        let direct = answer.url.clone();
        let mut head = vec![0; if empty { 0 } else { total.min(HEAD_BYTES) as usize }];
        read_body(answer, &mut head, &mut 0, path, hub.http.flow())?;
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

    /// One request for the rest of `buffer` from `done` on; `done` grows with what arrives.
    fn request(&self, buffer: &mut [u8], offset: u64, done: &mut usize) -> Result<(), Failure> {
        let first = offset + *done as u64;
        let last = offset + buffer.len() as u64 - 1;
        let direct = lock(&self.direct).clone();
        let mut answer = self.hub.http.get(&direct, Some((first, last)))?;
        let expired = matches!(answer.response.status().as_u16(), 400 | 401 | 403 | 404 | 410);
        if expired && direct != self.url {
            drain(answer.response);
            answer = self.hub.http.get(&self.url, Some((first, last)))?;
            lock(&self.direct).clone_from(&answer.url);
        }
        let answer = settled(answer)?;
        match answer.response.status().as_u16() {
            206 => {}
            200 => return Err(Failure::Final(ignores_ranges(&self.path))),
            400 | 401 | 403 if answer.url != self.url => return Err(refused_there(answer, &self.path)),
            404 | 410 | 412 | 416 => return Err(Failure::Final(self.changed())),
            _ => return Err(Failure::Final(refused(answer, &self.path, self.snapshot.as_ref(), &self.hub))),
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
        read_body(answer, buffer, done, &self.path, self.hub.http.flow())
    }

    fn changed(&self) -> Error {
        Error::failed("the file on the server changed while it was read")
            .at(shown_path(&self.path))
            .help("do not change inputs during a run; run it again with --restart")
    }
}

impl Source for Remote {
    /// In as many requests as it takes.
    fn fetch(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let mut done = 0;
        let mut patience = Patience::at_work(&self.hub.http);
        while done < buffer.len() {
            let end = buffer.len().min(done + REQUEST_BYTES as usize);
            let (before, rest) = (done, buffer.len() - done);
            let result = self.request(&mut buffer[..end], offset, &mut done);
            // Who sends a byte at a time would be asked for ever.
            let moved = done - before >= (rest / 16).clamp(1, ENOUGH_BYTES);
            if moved && !matches!(result, Err(Failure::Slow(_))) {
                patience.renew();
            }
            if let Err(failure) = result {
                patience.after(failure, &self.url).map_err(|e| e.at(shown_path(&self.path)))?;
            }
        }
        Ok(())
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
        Some((0, last, total)) if last.checked_add(1) == Some(total.min(HEAD_BYTES)) => Ok(total),
        _ => {
            let said = answer.header("content-range").unwrap_or("no Content-Range").to_owned();
            let text = format!("asked for bytes 0-{}, answered with {said}", HEAD_BYTES - 1);
            Err(Failure::Final(
                Error::input(text).at(shown_path(path)).help("its server is of no use here: download the file"),
            ))
        }
    }
}

/// Reads the rest of `buffer`, from `done` on, which must be all there is; `done` grows with what arrives.
fn read_body(answer: Answer, buffer: &mut [u8], done: &mut usize, path: &Path, mut flow: Flow) -> Result<(), Failure> {
    let mut body = answer.response.into_body().into_reader();
    while *done < buffer.len() {
        match body.read(&mut buffer[*done..]) {
            Ok(0) => return Err(Failure::Passing("the answer ended early".into(), None)),
            Ok(read) => {
                *done += read;
                if *done < buffer.len() {
                    flow.arrived(read)?;
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Failure::Passing(format!("the answer broke off: {e}"), None)),
        }
    }
    // To the end, so that the connection can be used again.
    match body.read(&mut [0]) {
        Ok(0) => Ok(()),
        Ok(_) => Err(Failure::Final(Error::failed("the server sent more than was asked for").at(shown_path(path)))),
        Err(_) => Ok(()),
    }
}

/// A path that is an address, without what may be a secret in it.
pub(super) fn shown_path(path: &Path) -> &Path {
    path.to_str().map_or(path, shown)
}

pub(super) fn ignores_ranges(path: &Path) -> Error {
    Error::input("its server ignores byte ranges, and would send the whole file again and again")
        .at(shown_path(path))
        .help("download the file, or use another server")
}

/// Where a redirect led to refuses. A new address may have been a moment too late, unless it says more.
fn refused_there(answer: Answer, path: &Path) -> Failure {
    let (why, advice) = Http::refusal(answer);
    let text = format!("the address that it leads to is refused ({why})");
    match advice.filter(|advice| *advice == SET_CLOCK) {
        Some(advice) => Failure::Final(Error::failed(text).at(shown_path(path)).help(advice)),
        None => Failure::Passing(text, None),
    }
}

fn refused(answer: Answer, path: &Path, snapshot: Option<&Arc<Snapshot>>, hub: &Hub) -> Error {
    match snapshot {
        Some(snapshot) => hub.refused(&answer, &snapshot.id, &snapshot.commit),
        None => {
            let (why, advice) = Http::refusal(answer);
            Error::input(format!("the server refuses it ({why})"))
                .at(shown_path(path))
                .help(advice.unwrap_or("check the address, and whether it may be read"))
        }
    }
}

/// A number that stands for these texts.
pub(super) fn hash(texts: &[&str]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    for text in texts {
        hasher.update(text.as_bytes());
        hasher.update(&[0]);
    }
    u64::from_le_bytes(*hasher.finalize().as_bytes().first_chunk().expect("a hash has 32 bytes"))
}

impl Far for Remote {
    fn path(&self) -> &Path {
        &self.path
    }

    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn identity_now(&self) -> Result<Identity> {
        if self.snapshot.is_some() {
            // A commit's files do not change, and every answer was checked.
            return Ok(self.identity.clone());
        }
        let now = Self::open(&self.path, self.url.clone(), None, Arc::clone(&self.hub))?;
        now.map(|now| now.identity).ok_or_else(|| self.changed())
    }

    fn head(&self) -> &[u8] {
        &self.head
    }
}

impl InputFile for RemoteInput {
    fn path(&self) -> &Path {
        self.far.path()
    }

    fn identity(&self) -> &Identity {
        self.far.identity()
    }

    fn identity_now(&self) -> Result<Identity> {
        self.far.identity_now()
    }

    fn identity_there(&self) -> Result<Option<Identity>> {
        // What is at an address is what is read there: see above.
        Ok(Some(self.far.identity().clone()))
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let (head, bytes) = (self.far.head(), self.far.identity().bytes);
        let end = offset.saturating_add(buffer.len() as u64);
        if end > bytes {
            let text = format!("{bytes} bytes, but bytes up to {end} were wanted");
            return Err(Error::failed(text).at(shown_path(self.far.path())));
        }
        let done = (head.len() as u64).saturating_sub(offset).min(buffer.len() as u64) as usize;
        if done > 0 {
            buffer[..done].copy_from_slice(&head[offset as usize..offset as usize + done]);
        }
        self.ahead.read((self.identity().inode, offset + done as u64), &mut buffer[done..], &self.source)
    }

    fn prefetch(&self, offset: u64, length: u64) {
        let first = offset.max(self.far.head().len() as u64);
        let end = offset.saturating_add(length).min(self.identity().bytes);
        if first < end {
            self.ahead.announce((self.identity().inode, first), end - first, &self.source);
        }
    }

    fn held_bytes(&self) -> u64 {
        self.far.head().len() as u64
    }
}
