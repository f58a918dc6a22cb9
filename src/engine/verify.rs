//! Checks a finished output against its manifest: every file that is listed is read and hashed again.
//!
//! In a damaged shard, tensors are checked one by one, so that it can be said which are damaged.
//!
//! Files are read by several threads, in pieces, so that the disk is the limit and memory is not.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use serde_json::Value;

use super::output::{MANIFEST, is_file_name};
use super::shards::SealedShard;
use super::tensor_crc::{self, PieceCrc};
use super::{Observer, pool};
use crate::checkpoint;
use crate::error::{Error, ErrorKind, Result, printable};
use crate::limits::MAX_MANIFEST_BYTES;
use crate::plan::{is_sealed, must_be_current};
use crate::storage::{InputFile, Storage};

/// Bytes read at once by each thread.
const PIECE_BYTES: usize = 1 << 20;

/// What is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Damage {
    /// It is not there.
    Missing,
    /// It has another length.
    Length {
        /// Bytes that were written.
        expected: u64,
        /// Bytes that are there.
        found: u64,
    },
    /// Its bytes are others.
    Content,
    /// It cannot be read.
    Unreadable {
        /// Why.
        message: String,
    },
}

/// A file that is not what was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DamagedFile {
    /// Its name.
    pub name: String,
    /// What is wrong.
    pub damage: Damage,
    /// Tensors whose bytes are others, as far as that can be told.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tensors: Vec<String>,
}

/// What [`verify()`] found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// The output directory.
    pub dir: String,
    /// Files listed in the manifest, and the manifest.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Nothing is damaged.
    pub intact: bool,
    /// What is damaged, in the manifest's order.
    pub damaged: Vec<DamagedFile>,
    /// Shards that were handed over to a command and are not here: they were not checked.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub handed_over: Vec<String>,
    /// What was damaged and has been made again.
    pub repaired: Vec<String>,
}

/// A file as the manifest lists it.
struct Listed {
    name: String,
    bytes: u64,
    blake3: String,
    /// Checksums of tensors, by name.
    tensors: Vec<(String, String)>,
    /// A command may have taken it away.
    handed_over: bool,
}

/// What a manifest lists.
struct Listing {
    files: Vec<Listed>,
    /// Bytes of the manifest itself.
    bytes: u64,
    /// It is as it was written.
    sealed: bool,
}

/// Reads every file that the manifest in `dir` lists, with `threads` threads, and compares lengths and hashes. The manifest has
/// a hash of itself.
pub fn verify(dir: &Path, threads: usize, storage: &Arc<dyn Storage>, observer: &dyn Observer) -> Result<VerifyReport> {
    let Listing { files: listed, bytes, sealed } = listed(dir, &**storage)?;
    let bytes = listed.iter().map(|file| file.bytes).sum::<u64>().saturating_add(bytes);
    observer.stage("verify", bytes);
    let mut damaged = found_in_each(&listed, threads, |buffer, file| {
        let wanted = (file.bytes, &*file.blake3);
        let Some(damage) = check(&dir.join(&file.name), wanted, buffer, &**storage, observer)? else { return Ok(None) };
        let tensors = damaged_tensors(dir, file, buffer, &**storage, observer)?;
        Ok(Some(DamagedFile { name: file.name.clone(), damage, tensors }))
    })?;
    let taken =
        |(ordinal, file): &mut (usize, DamagedFile)| listed[*ordinal].handed_over && file.damage == Damage::Missing;
    let handed_over = damaged.extract_if(.., taken).map(|(_, file)| file.name).collect();
    let mut damaged: Vec<DamagedFile> = damaged.into_iter().map(|(_, file)| file).collect();
    if !sealed {
        damaged.push(DamagedFile { name: MANIFEST.into(), damage: Damage::Content, tensors: Vec::new() });
    }
    Ok(VerifyReport {
        dir: dir.display().to_string(),
        files: listed.len() as u64 + 1,
        bytes,
        intact: damaged.is_empty(),
        damaged,
        handed_over,
        repaired: Vec::new(),
    })
}

/// Which of `files` are not what was written, by place.
pub(super) fn differing(
    files: &[(PathBuf, SealedShard)],
    threads: usize,
    storage: &dyn Storage,
    observer: &dyn Observer,
) -> Result<Vec<usize>> {
    let damaged = found_in_each(files, threads, |buffer, (path, written)| {
        check(path, (written.bytes, &written.hash), buffer, storage, observer)
    })?;
    Ok(damaged.into_iter().map(|(place, _)| place).collect())
}

/// What `look` finds in `files`, with their places, in order. Several threads read, each through a buffer of its own.
fn found_in_each<F: Sync, T: Send>(
    files: &[F],
    threads: usize,
    look: impl Fn(&mut [u8], &F) -> Result<Option<T>> + Sync,
) -> Result<Vec<(usize, T)>> {
    let all = Mutex::new(Vec::new());
    let mut buffers = vec![vec![0u8; PIECE_BYTES]; threads.clamp(1, files.len().max(1))];
    pool::run(
        &mut buffers,
        files.iter(),
        0,
        |_| (),
        |buffer, place, file| {
            if let Some(found) = look(buffer, file)? {
                all.lock().unwrap_or_else(PoisonError::into_inner).push((place, found));
            }
            Ok(())
        },
    )?;
    let mut all = all.into_inner().unwrap_or_else(PoisonError::into_inner);
    all.sort_by_key(|(place, _)| *place);
    Ok(all)
}

/// Fails unless every file that the manifest in `dir` lists is there with its length. Nothing else is read.
pub(super) fn must_be_complete(dir: &Path, storage: &dyn Storage) -> Result<()> {
    let listing = listed(dir, storage)?;
    let damaged = |path: &Path, what: &str, help: String| {
        Err(Error::input(format!("a file of a finished output is damaged: {what}")).at(path).help(help))
    };
    for file in listing.files {
        let path = dir.join(&file.name);
        let what = match storage.identity(&path)? {
            Some(found) if found.bytes == file.bytes => continue,
            None if file.handed_over => continue,
            Some(found) => format!("it has {} bytes, {} were written", found.bytes, file.bytes),
            None => "it is missing".to_owned(),
        };
        let dir = printable(&dir.display().to_string());
        return damaged(
            &path,
            &what,
            format!("'tiesmith verify {dir} --repair' makes it again, or --force all outputs"),
        );
    }
    if !listing.sealed {
        let what = "it has other bytes than were written";
        return damaged(&dir.join(MANIFEST), what, "--force makes all outputs again".into());
    }
    Ok(())
}

/// What is wrong with a file that was written with this length and hash, if anything is; an error only if the work is to
/// stop.
fn check(
    path: &Path,
    (bytes, hash): (u64, &str),
    buffer: &mut [u8],
    storage: &dyn Storage,
    observer: &dyn Observer,
) -> Result<Option<Damage>> {
    let unreadable = |error: Error| Ok(Some(Damage::Unreadable { message: error.to_string() }));
    match storage.identity(path) {
        Ok(Some(_)) => {}
        Ok(None) => return Ok(Some(Damage::Missing)),
        Err(error) => return unreadable(error),
    }
    let input = match storage.open(path) {
        Ok(input) => input,
        Err(error) => return unreadable(error),
    };
    let found = input.identity().bytes;
    if found != bytes {
        return Ok(Some(Damage::Length { expected: bytes, found }));
    }
    let mut hasher = blake3::Hasher::new();
    let mut take = |part: &[u8]| {
        hasher.update(part);
        observer.advance(part.len() as u64);
    };
    match read(&*input, 0..found, buffer, observer, &mut take) {
        Ok(()) => Ok((*hasher.finalize().to_hex() != *hash).then_some(Damage::Content)),
        Err(error) if error.kind() == ErrorKind::Interrupted => Err(error),
        Err(error) => unreadable(error),
    }
}

/// Reads a range of a file through `buffer`, piece by piece.
fn read(
    input: &dyn InputFile,
    range: Range<u64>,
    buffer: &mut [u8],
    observer: &dyn Observer,
    take: &mut dyn FnMut(&[u8]),
) -> Result<()> {
    let mut at = range.start;
    while at < range.end {
        observer.go_on()?;
        let part = &mut buffer[..(range.end - at).min(PIECE_BYTES as u64) as usize];
        input.read_at(part, at)?;
        take(part);
        at += part.len() as u64;
        input.prefetch(at, 8 * PIECE_BYTES as u64);
    }
    Ok(())
}

/// Which tensors of a damaged shard are not what was written: none where its header can no longer tell where they are.
fn damaged_tensors(
    dir: &Path,
    file: &Listed,
    buffer: &mut [u8],
    storage: &dyn Storage,
    observer: &dyn Observer,
) -> Result<Vec<String>> {
    let mut damaged = Vec::new();
    let path = dir.join(&file.name);
    if file.tensors.is_empty() || !storage.is_file(&path) {
        return Ok(damaged);
    }
    let Ok(input) = storage.open(&path) else { return Ok(damaged) };
    let Ok(header) = checkpoint::tensors_of(&*input, file.bytes) else { return Ok(damaged) };
    let found: HashMap<&str, (u64, u64)> = header.iter().map(|t| (&*t.name, (t.offset, t.bytes))).collect();
    for (name, wanted) in &file.tensors {
        let Some(&(offset, bytes)) = found.get(&**name) else { return Ok(Vec::new()) };
        let mut crc = PieceCrc::new();
        match read(&*input, offset..offset + bytes, buffer, observer, &mut |part| crc.update(part)) {
            Ok(()) if tensor_crc::hex(crc.finish()) == *wanted => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => return Err(error),
            _ => damaged.push(name.clone()),
        }
    }
    Ok(damaged)
}

/// The files that the manifest lists, shards first.
fn listed(dir: &Path, storage: &dyn Storage) -> Result<Listing> {
    let path = dir.join(MANIFEST);
    if storage.identity(&path).map_err(Error::as_input)?.is_none() {
        return Err(Error::input(format!("there is no {MANIFEST}: not a finished output")).at(dir).help(
            "name a directory that tiesmith merged into; an unfinished merge goes on when its command is run again",
        ));
    }
    let content = storage.read_small(&path, MAX_MANIFEST_BYTES).map_err(Error::as_input)?;
    let broken = |what: &str| {
        Error::input(format!("the manifest is damaged: {what}")).at(&path).help("merge again to get a new one")
    };
    let manifest: Value = serde_json::from_slice(&content).map_err(|e| broken(&format!("not valid JSON: {e}")))?;
    let version = manifest["format_version"].as_u64().ok_or_else(|| broken("it has no \"format_version\""))?;
    must_be_current(version, &path)?;
    let one = |entry: &Value| {
        Some(Listed {
            name: entry["name"].as_str().filter(|name| is_file_name(name))?.to_owned(),
            bytes: entry["bytes"].as_u64()?,
            blake3: entry["blake3"].as_str()?.to_owned(),
            tensors: match &entry["tensors"] {
                Value::Object(tensors) => {
                    let one = |(name, hash): (&String, &Value)| Some((name.clone(), hash.as_str()?.to_owned()));
                    tensors.iter().map(one).collect::<Option<_>>()?
                }
                _ => Vec::new(),
            },
            handed_over: false,
        })
    };
    let handed_over = manifest["report"]["shards_handed_over"].as_u64().is_some_and(|count| count > 0);
    let mut files = Vec::new();
    for list in ["shards", "side_files"] {
        let entries = manifest[list].as_array().ok_or_else(|| broken(&format!("it has no {list:?}")))?;
        for (index, entry) in entries.iter().enumerate() {
            let file = one(entry).ok_or_else(|| broken(&format!("entry {} of {list:?} makes no sense", index + 1)))?;
            files.push(Listed { handed_over: list == "shards" && handed_over, ..file });
        }
    }
    if files.iter().try_fold(0u64, |sum, file| sum.checked_add(file.bytes)).is_none() {
        return Err(broken("its files have more than 2^64 bytes"));
    }
    Ok(Listing { files, bytes: content.len() as u64, sealed: is_sealed(&content) })
}
