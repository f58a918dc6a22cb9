//! Packed task vectors (`.tvz`): a checkpoint stored as what differs from its base, in compressed chunks.
//!
//! - A chunk that is asked for is decompressed, and put on top of base's bytes: what is read is the checkpoint that was
//!   packed (trimmed, if it was), bit for bit, and everything that works on checkpoints works on it.
//! - Base is the one at hand (a merge's `--base`) if it is the one that the file was packed against, else the one that the
//!   file names. Its catalogue and a sample of its data are compared when the file is opened, and the checksum of its
//!   bytes with every chunk that is read: a wrong base is an error, never a wrong number.
//! - Memory is the index, a few decoders and a few chunks at whose ends reads stopped.

mod chunk;
mod format;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

pub use chunk::{CHUNK, Decoder, Encoder, checksum};
pub use format::{Base, Contents, ENTRY_BYTES, Entry, HEAD_BYTES, Settings, Tensor, head, identify, tail, units};

use super::adapter;
use super::resolve::{self, Source};
use super::{Checkpoint, CheckpointFile, Derived, TensorEntry, directory_of};
use crate::error::{Error, Result, printable};
use crate::storage::{Identity, InputFile, Storage, stored_ranges};
use chunk::content_bytes;

/// Decoders that are kept for the next chunk.
const DECODERS: usize = 2;
/// Chunks that are kept because only a part of them was asked for.
const KEPT_CHUNKS: usize = 4;

/// Opens the file at `path`, which the user called `spec`. `beside` is a base at hand.
pub(super) fn open(
    spec: &str,
    path: &Path,
    warnings: Vec<String>,
    beside: Option<&Checkpoint>,
    storage: &Arc<dyn Storage>,
) -> Result<Checkpoint> {
    let file: Arc<dyn InputFile> = Arc::from(storage.open(path)?);
    let index = format::read(&*file).map_err(|e| e.at(path))?;
    let mut base = find_base(path, &index.contents.base, beside, storage)?;
    let other_base = beside.is_some_and(|beside| beside.spec != base.spec);
    let packed = PackedFile::new(file, index, &base).map_err(|e| e.at(path))?;
    let tensors = packed.entries();
    let derived = Derived {
        held_bytes: packed.held_bytes() + base.derived.held_bytes,
        scratch_bytes: packed.decode_bytes() + base.derived.scratch_bytes,
        packed: true,
        other_base,
        ..Derived::default()
    };
    let own = CheckpointFile { header_bytes: packed.index_bytes, header_hash: packed.hash, file: Arc::new(packed) };
    // Base's files are inputs too: whether they change is watched like that of any other.
    base.files.insert(0, own);
    // A sweep puts configuration and tokenizer beside what it packs; else they are base's.
    let folder = directory_of(path);
    let dir = if storage.is_file(&folder.join("config.json")) { folder.to_path_buf() } else { base.dir };
    Ok(Checkpoint { spec: spec.to_owned(), dir, hub: None, files: base.files, tensors, warnings, derived })
}

/// The fingerprint of the merge whose output the file at `path` holds, if it is one.
pub fn fingerprint(path: &Path, storage: &dyn Storage) -> Result<Option<String>> {
    let file = storage.open(path)?;
    Ok(format::read(&*file).map_err(|e| e.at(path))?.contents.fingerprint)
}

/// What the file at `path` says of its tensors and chunks.
pub fn index(path: &Path, storage: &dyn Storage) -> Result<(Contents, Vec<Entry>)> {
    let index = format::read(&*storage.open(path)?).map_err(|e| e.at(path))?;
    Ok((index.contents, index.entries))
}

/// In what `base` is another than `expected`.
fn difference(base: &Checkpoint, expected: &Base) -> Result<Option<&'static str>> {
    let found = identify(base, &expected.source)?;
    Ok(match (found.catalogue == expected.catalogue, found.sample == expected.sample) {
        (true, true) => None,
        (true, false) => Some("its weights are others"),
        (false, _) => Some("it has other tensors"),
    })
}

/// The base of the file at `path`: the one at hand if it is the one expected, else the one that the file names.
fn find_base(
    path: &Path,
    expected: &Base,
    beside: Option<&Checkpoint>,
    storage: &Arc<dyn Storage>,
) -> Result<Checkpoint> {
    let mut others = Vec::new();
    let mut try_one = |source: &str, base: Result<Checkpoint>| {
        match base.and_then(|base| Ok((difference(&base, expected)?, base))) {
            Ok((None, base)) => return Some(base),
            Ok((Some(what), _)) => others.push(format!("{} is another: {what}", printable(source))),
            Err(error) => {
                let (source, error) = (printable(source), error.to_string());
                others.push(if error.starts_with(&source) { error } else { format!("{source}: {error}") });
            }
        }
        None
    };
    let known = beside.and_then(|base| try_one(&base.spec, refuse_packed(base.clone())));
    let named = Some(&*expected.source).filter(|named| beside.is_none_or(|base| base.spec != *named));
    match known.or_else(|| named.and_then(|source| try_one(source, open_base(source, storage)))) {
        Some(base) => Ok(base),
        None => Err(Error::input(format!("the base that it was packed against is not there ({})", others.join("; ")))
            .at(path)
            .help("give that checkpoint as --base")),
    }
}

fn refuse_packed(base: Checkpoint) -> Result<Checkpoint> {
    match base.derived.packed {
        true => Err(Error::input("it is itself a packed task vector")),
        false => Ok(base),
    }
}

/// Opens a checkpoint to be base.
fn open_base(source: &str, storage: &Arc<dyn Storage>) -> Result<Checkpoint> {
    // One that names itself, with adapters or without, would be opened for ever.
    let mut model = source;
    while let Some((inner, _)) = adapter::split(model, &**storage)? {
        model = inner;
    }
    match resolve::resolve(model, &**storage, &|name| std::env::var_os(name))?.source {
        Source::Packed(_) => Err(Error::input("it is itself a packed task vector")),
        _ => Checkpoint::open(source, storage),
    }
}

/// Where a tensor of the packed checkpoint is.
struct Place {
    name: Box<str>,
    /// Where its bytes begin among those of all tensors.
    start: u64,
    bytes: u64,
    /// Bytes of an element.
    width: usize,
    first_chunk: usize,
    /// Base's tensor: file and offset.
    base: Option<(Arc<dyn InputFile>, u64)>,
}

/// Chunks that are kept, the oldest first: (number of the chunk, its bytes).
type KeptChunks = VecDeque<(usize, Arc<[u8]>)>;

/// The tensors of a packed checkpoint, one after the other, seen as a file.
struct PackedFile {
    file: Arc<dyn InputFile>,
    hash: [u8; 32],
    index_bytes: u64,
    contents: Contents,
    entries: Vec<Entry>,
    /// Where each chunk is in the file.
    offsets: Vec<u64>,
    places: Vec<Place>,
    decoders: Mutex<Vec<Decoder>>,
    kept: Mutex<KeptChunks>,
}

impl PackedFile {
    fn new(file: Arc<dyn InputFile>, index: format::Index, base: &Checkpoint) -> Result<Self> {
        let format::Index { contents, entries, hash, bytes: index_bytes } = index;
        let (mut start, mut first_chunk) = (0u64, 0);
        let mut places = Vec::with_capacity(contents.tensors.len());
        for tensor in &contents.tensors {
            let (width, count) = tensor.units()?;
            let bytes = width as u64 * count;
            let own = base.get(&tensor.name).filter(|own| own.dtype == tensor.dtype && *own.shape == *tensor.shape);
            let base = match (tensor.delta, own) {
                (true, Some(own)) => Some((Arc::clone(&base.files[own.file as usize].file), own.offset)),
                (false, _) => None,
                (true, None) => {
                    return Err(Error::input("a difference to a tensor that base lacks").tensor(&tensor.name));
                }
            };
            places.push(Place { name: (*tensor.name).into(), start, bytes, width, first_chunk, base });
            first_chunk += count.div_ceil(CHUNK as u64) as usize;
            let end = start.checked_add(bytes).filter(|&end| end < 1 << 62);
            start = end.ok_or_else(|| Error::input("more bytes than any file has").tensor(&tensor.name))?;
        }
        let mut offsets = Vec::with_capacity(entries.len());
        let mut offset = HEAD_BYTES;
        for entry in &entries {
            offsets.push(offset);
            offset += u64::from(entry.length);
        }
        let (decoders, kept) = Default::default();
        Ok(Self { file, hash, index_bytes, contents, entries, offsets, places, decoders, kept })
    }

    /// The catalogue, sorted by name.
    fn entries(&self) -> Vec<TensorEntry> {
        let entry = |(tensor, place): (&Tensor, &Place)| TensorEntry {
            name: place.name.clone(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone().into(),
            file: 0,
            offset: place.start,
            bytes: place.bytes,
        };
        let mut entries: Vec<_> = self.contents.tensors.iter().zip(&self.places).map(entry).collect();
        entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        entries
    }

    /// Longest chunk as it is read, compressed, and decompressed before it is put on base, in bytes.
    fn longest(&self) -> (usize, usize, usize) {
        let mut longest = (0, 0, 0);
        for place in &self.places {
            let elements = (place.bytes / place.width as u64).min(CHUNK as u64) as usize;
            longest.0 = longest.0.max(elements * place.width);
            for entry in self.entries[place.first_chunk..].iter().take(self.chunks(place)) {
                longest.1 = longest.1.max(entry.length as usize);
                longest.2 = longest.2.max(content_bytes(elements, entry.stored as usize, place.width));
            }
        }
        longest
    }

    fn chunks(&self, place: &Place) -> usize {
        (place.bytes / place.width as u64).div_ceil(CHUNK as u64) as usize
    }

    /// Memory that a thread needs while it reads, in bytes.
    fn decode_bytes(&self) -> u64 {
        let (whole, compressed, content) = self.longest();
        whole as u64 + Decoder::held_bytes(compressed, content)
    }

    /// Memory that is held between reads, in bytes.
    fn held_bytes(&self) -> u64 {
        let (whole, compressed, content) = self.longest();
        let names: usize = self.places.iter().map(|place| 3 * place.name.len()).sum();
        let dims: usize = self.contents.tensors.iter().map(|tensor| tensor.shape.len() * 8).sum();
        let index = self.entries.len() * (size_of::<Entry>() + 8)
            + self.places.len() * (size_of::<Place>() + size_of::<Tensor>() + 64)
            + names
            + dims;
        (index + KEPT_CHUNKS * whole) as u64 + DECODERS as u64 * Decoder::held_bytes(compressed, content)
    }

    /// Fills `out` with a whole chunk of `place`.
    fn decode(&self, place: &Place, number: usize, out: &mut [u8]) -> Result<()> {
        let entry = self.entries[place.first_chunk + number];
        if let Some((base, offset)) = &place.base {
            base.read_at(out, offset + number as u64 * (CHUNK * place.width) as u64)?;
            if checksum(out) != entry.base {
                return Err(Error::input("base's weights are not those that this was packed against")
                    .at(self.file.path())
                    .tensor(&place.name)
                    .help("give --base with the checkpoint that it was packed against"));
            }
        }
        let idle = self.decoders.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut decoder = idle.map_or_else(Decoder::new, Ok)?;
        decoder.compressed.resize(entry.length as usize, 0);
        self.file.read_at(&mut decoder.compressed, self.offsets[place.first_chunk + number])?;
        let sound = checksum(&decoder.compressed) == entry.check;
        if !sound || !decoder.apply(entry.stored as usize, place.width, place.base.is_some(), out) {
            return Err(Error::input(format!("chunk {number} is damaged"))
                .at(self.file.path())
                .tensor(&place.name)
                .help("copy the file again, or pack the checkpoint again"));
        }
        let mut idle = self.decoders.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < DECODERS {
            idle.push(decoder);
        }
        Ok(())
    }

    /// Fills `part` with what begins at byte `from` of a chunk of `whole` bytes.
    fn decode_part(&self, place: &Place, number: usize, whole: usize, from: usize, part: &mut [u8]) -> Result<()> {
        let chunk = place.first_chunk + number;
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let found = kept.iter().find(|(other, _)| *other == chunk).map(|(_, bytes)| Arc::clone(bytes));
        drop(kept);
        if let Some(bytes) = found {
            part.copy_from_slice(&bytes[from..from + part.len()]);
            return Ok(());
        }
        let mut bytes = vec![0; whole];
        self.decode(place, number, &mut bytes)?;
        part.copy_from_slice(&bytes[from..from + part.len()]);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT_CHUNKS {
            kept.pop_front();
        }
        kept.push_back((chunk, bytes.into()));
        Ok(())
    }

    /// Calls `each` for every chunk that the `length` bytes from `offset` on touch: (place, number of the chunk, its
    /// length in bytes, first byte of it, bytes of it).
    fn touched(
        &self,
        mut offset: u64,
        length: u64,
        mut each: impl FnMut(&Place, usize, usize, usize, usize) -> Result<()>,
    ) -> Result<()> {
        let end = offset + length;
        while offset < end {
            // Of tensors that begin at one place, all but the last are empty.
            let place = &self.places[self.places.partition_point(|place| place.start <= offset) - 1];
            let (within, chunk) = (offset - place.start, (CHUNK * place.width) as u64);
            let (number, from) = (within / chunk, within % chunk);
            let whole = chunk.min(place.bytes - number * chunk);
            let count = (whole - from).min(end - offset);
            each(place, number as usize, whole as usize, from as usize, count as usize)?;
            offset += count;
        }
        Ok(())
    }
}

impl InputFile for PackedFile {
    fn path(&self) -> &Path {
        self.file.path()
    }

    fn identity(&self) -> &Identity {
        self.file.identity()
    }

    fn identity_now(&self) -> Result<Identity> {
        self.file.identity_now()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let mut rest = buffer;
        let length = rest.len() as u64;
        self.touched(offset, length, |place, number, whole, from, count| {
            let (part, left) = std::mem::take(&mut rest).split_at_mut(count);
            rest = left;
            match count == whole {
                true => self.decode(place, number, part),
                false => self.decode_part(place, number, whole, from, part),
            }
        })
    }

    fn made_of(&self, offset: u64, length: u64, see: &mut dyn FnMut(&dyn InputFile, u64, u64)) -> bool {
        let seen = self.touched(offset, length, |place, number, whole, from, _| {
            // Chunks are read once, and kept for those who want the rest of them.
            if from > 0 {
                return Ok(());
            }
            let chunk = place.first_chunk + number;
            see(&*self.file, self.offsets[chunk], u64::from(self.entries[chunk].length));
            if let Some((base, offset)) = &place.base {
                stored_ranges(&**base, offset + number as u64 * (CHUNK * place.width) as u64, whole as u64, see);
            }
            Ok(())
        });
        debug_assert!(seen.is_ok(), "nothing is read");
        true
    }
}
