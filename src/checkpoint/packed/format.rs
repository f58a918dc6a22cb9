//! The file around the chunks: a head, the chunks, the index, a foot (`docs/format.md`, byte by byte).
//!
//! - The index is what the foot points to and vouches for; chunks are vouched for by the index.
//! - Reading accepts any bytes: every length is checked against what there is before it is used.
//!
//! Knows names, shapes and lengths; reads no tensor data.

use serde::{Deserialize, Serialize};

use super::chunk::{CHUNK, compressed_bytes_max};
use crate::checkpoint::header::{Dimensions, check_name, tensor_bytes};
use crate::checkpoint::{Checkpoint, TensorEntry};
use crate::dtype::{Dtype, dtype_name};
use crate::error::{Error, Result};
use crate::limits::{MAX_DIMENSIONS, MAX_INDEX_BYTES};
use crate::storage::InputFile;

/// Version of the format.
const VERSION: u32 = 2;
const MAGIC: [u8; 8] = *b"TIESMTVZ";
const END: [u8; 8] = *b"ZVTMSEIT";
/// What the file begins with: magic, version, and four bytes that are zero.
pub const HEAD_BYTES: u64 = 16;
/// What it ends with: where the index is, its length, its length before compression, its BLAKE3, magic.
const FOOT_BYTES: u64 = 64;
/// A chunk in the index.
pub const ENTRY_BYTES: usize = 24;
const LEVEL: i32 = 1;
/// Blocks of base that are hashed to tell it from others, and their length in bytes.
const SAMPLES: u64 = 64;
const SAMPLE_BYTES: u64 = 4096;

/// What is known of all tensors: the JSON part of the index.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Contents {
    /// Program that wrote it.
    pub program: String,
    /// What was asked for.
    pub settings: Settings,
    /// The fingerprint of the merge that this is the output of, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    /// What the values not stored are taken from.
    pub base: Base,
    /// The tensors, in the order in which their chunks follow each other.
    pub tensors: Vec<Tensor>,
}

/// How a task vector was trimmed, for the record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Fraction kept; 1 keeps whatever differs from base.
    pub density: f64,
    /// Where one threshold applied.
    pub scope: String,
    /// Ties at it.
    pub trim_ties: String,
    /// How it was found.
    pub threshold: String,
    /// Of random draws.
    pub seed: u64,
}

impl Settings {
    /// Nothing is trimmed.
    pub fn whole() -> Self {
        let [scope, trim_ties, threshold] = ["model", "keep", "exact"].map(str::to_owned);
        Self { density: 1.0, scope, trim_ties, threshold, seed: 0 }
    }
}

/// The identity of base.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// As the user named it.
    pub source: String,
    /// BLAKE3 over names, types and shapes of all its tensors, in hexadecimal.
    pub catalogue: String,
    /// BLAKE3 over blocks of its data, spread evenly, in hexadecimal.
    pub sample: String,
}

/// A tensor of the packed checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Its stored type.
    pub dtype: Dtype,
    /// Its shape.
    #[serde(deserialize_with = "dimensions")]
    pub shape: Vec<u64>,
    /// Whether its chunks are differences to base's tensor of this name, type and shape, and not the whole.
    pub delta: bool,
}

/// A list of dimensions that is refused before it is long.
fn dimensions<'de, D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Vec<u64>, D::Error> {
    Dimensions::deserialize(deserializer).map(|dimensions| dimensions.0.into_vec())
}

impl Tensor {
    /// Bytes of an element, and how many there are. Types of other widths than 1, 2, 4 and 8 bytes count as bytes.
    pub fn units(&self) -> Result<(usize, u64)> {
        units(self.dtype, &self.shape)
    }
}

/// See [`Tensor::units`].
pub fn units(dtype: Dtype, shape: &[u64]) -> Result<(usize, u64)> {
    let bytes = tensor_bytes(dtype, shape)?;
    Ok(match dtype.bitsize() {
        16 => (2, bytes / 2),
        32 => (4, bytes / 4),
        64 => (8, bytes / 8),
        _ => (1, bytes),
    })
}

/// A chunk in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry {
    /// Elements stored.
    pub stored: u32,
    /// Bytes in the file.
    pub length: u32,
    /// Checksum of those bytes.
    pub check: u64,
    /// Checksum of base's bytes of this chunk; 0 if the tensor is no difference.
    pub base: u64,
}

impl Entry {
    /// As it is stored.
    pub fn encode(&self) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        bytes[..4].copy_from_slice(&self.stored.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.length.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.check.to_le_bytes());
        bytes[16..].copy_from_slice(&self.base.to_le_bytes());
        bytes
    }

    /// What is stored so.
    pub fn decode(bytes: &[u8; ENTRY_BYTES]) -> Self {
        let half = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let whole = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        Self { stored: half(0), length: half(4), check: whole(8), base: whole(16) }
    }
}

/// What the index says.
#[derive(Debug)]
pub struct Index {
    pub contents: Contents,
    /// The chunks of all tensors, in order.
    pub entries: Vec<Entry>,
    /// BLAKE3 of the index as it is stored.
    pub hash: [u8; 32],
    /// Its length in the file, foot included.
    pub bytes: u64,
}

/// The bytes that a file begins with.
pub fn head() -> [u8; HEAD_BYTES as usize] {
    let mut head = [0; HEAD_BYTES as usize];
    head[..8].copy_from_slice(&MAGIC);
    head[8..12].copy_from_slice(&VERSION.to_le_bytes());
    head
}

/// Index and foot of a file whose chunks end at `offset`.
pub fn tail(contents: &Contents, entries: &[Entry], offset: u64) -> Result<Vec<u8>> {
    let failed = |e: String| Error::failed(format!("the index: {e}"));
    let json = serde_json::to_vec(contents).map_err(|e| failed(e.to_string()))?;
    let mut index = Vec::with_capacity(4 + json.len() + entries.len() * ENTRY_BYTES);
    index.extend((json.len() as u32).to_le_bytes());
    index.extend(json);
    entries.iter().for_each(|entry| index.extend(entry.encode()));
    if index.len() as u64 > MAX_INDEX_BYTES {
        return Err(failed(format!("{} bytes, but at most {MAX_INDEX_BYTES} are supported", index.len())));
    }
    close(&index, offset)
}

/// The end of a file whose chunks end at `offset`: this index, compressed, and the foot.
pub(super) fn close(index: &[u8], offset: u64) -> Result<Vec<u8>> {
    let mut tail = zstd::bulk::compress(index, LEVEL).map_err(|e| Error::failed(format!("the index: {e}")))?;
    let (hash, length) = (blake3::hash(&tail), tail.len() as u64);
    [offset, length, index.len() as u64].iter().for_each(|n| tail.extend(n.to_le_bytes()));
    tail.extend(hash.as_bytes());
    tail.extend(END);
    Ok(tail)
}

/// Reads and checks everything but the chunks.
pub fn read(file: &dyn InputFile) -> Result<Index> {
    let damaged = |what: &str| Error::input(what).help("the file is damaged or cut short; copy or pack it again");
    let bytes = file.identity().bytes;
    let mut head = [0; HEAD_BYTES as usize];
    if bytes < HEAD_BYTES + FOOT_BYTES {
        return Err(damaged("too short to be a packed task vector"));
    }
    file.read_at(&mut head, 0)?;
    if head[..8] != MAGIC {
        return Err(Error::input("not a packed task vector").help("'tiesmith pack' makes one"));
    }
    let version = u32::from_le_bytes([head[8], head[9], head[10], head[11]]);
    if version != VERSION {
        return Err(Error::input(format!(
            "a packed task vector of version {version}, but this program reads {VERSION}"
        ))
        .help("use the version of tiesmith that wrote it"));
    }
    let mut foot = [0; FOOT_BYTES as usize];
    file.read_at(&mut foot, bytes - FOOT_BYTES)?;
    let number = |at: usize| u64::from_le_bytes(foot[at..at + 8].try_into().expect("8 bytes"));
    let (offset, length, expanded) = (number(0), number(8), number(16));
    let ends = offset.checked_add(length).and_then(|end| end.checked_add(FOOT_BYTES));
    if foot[56..] != END || head[12..] != [0; 4] || ends != Some(bytes) || offset < HEAD_BYTES {
        return Err(damaged("it does not end as a packed task vector does"));
    }
    if length > MAX_INDEX_BYTES || expanded > MAX_INDEX_BYTES {
        return Err(damaged(&format!("an index of {expanded} bytes, but at most {MAX_INDEX_BYTES} are accepted")));
    }
    let mut compressed = vec![0; length as usize];
    file.read_at(&mut compressed, offset)?;
    let hash = *blake3::hash(&compressed).as_bytes();
    if hash[..] != foot[24..56] {
        return Err(damaged("its index has another checksum than was written"));
    }
    let index = zstd::bulk::decompress(&compressed, expanded as usize)
        .ok()
        .filter(|index| index.len() as u64 == expanded)
        .ok_or_else(|| damaged("its index cannot be decompressed"))?;
    let (contents, entries) = parse(&index).map_err(|e| e.help("'tiesmith pack' makes a new one"))?;
    check(&contents, &entries, offset)?;
    Ok(Index { contents, entries, hash, bytes: length + FOOT_BYTES })
}

fn parse(index: &[u8]) -> Result<(Contents, Vec<Entry>)> {
    let senseless = || Error::input("its index makes no sense");
    let (length, rest) = index.split_first_chunk::<4>().ok_or_else(senseless)?;
    let (json, table) = rest.split_at_checked(u32::from_le_bytes(*length) as usize).ok_or_else(senseless)?;
    let contents = serde_json::from_slice(json).map_err(|e| Error::input(format!("its index: {e}")))?;
    let (rows, rest) = table.as_chunks::<ENTRY_BYTES>();
    if !rest.is_empty() {
        return Err(senseless());
    }
    Ok((contents, rows.iter().map(Entry::decode).collect()))
}

/// Checks tensors and chunks against each other, and that the chunks end at `end`.
fn check(contents: &Contents, entries: &[Entry], end: u64) -> Result<()> {
    let wrong = |what: String| Error::input(what).help("the file is damaged; copy or pack it again");
    let mut rest = entries;
    let mut offset = HEAD_BYTES;
    for (count, tensor) in contents.tensors.iter().enumerate() {
        let fail = |what: String| Err(wrong(what).tensor(&tensor.name));
        check_name(&tensor.name, count).map_err(Error::input)?;
        if tensor.shape.len() > MAX_DIMENSIONS {
            return fail(format!("{} dimensions, at most {MAX_DIMENSIONS} are accepted", tensor.shape.len()));
        }
        let (width, units) = tensor.units().map_err(|e| e.tensor(&tensor.name))?;
        let chunks = units.div_ceil(CHUNK as u64);
        let Some((own, others)) = usize::try_from(chunks).ok().and_then(|chunks| rest.split_at_checked(chunks)) else {
            return fail(format!("{chunks} chunks of it, but the index lists {}", rest.len()));
        };
        for (number, entry) in own.iter().enumerate() {
            let elements = (units - number as u64 * CHUNK as u64).min(CHUNK as u64) as usize;
            let stored = entry.stored as usize;
            let fits = stored <= elements && (tensor.delta || stored == elements);
            if !fits || entry.length as usize > compressed_bytes_max(elements, stored.min(elements), width) {
                return fail(format!("its chunk {number} cannot be as the index says"));
            }
            offset += u64::from(entry.length);
        }
        rest = others;
    }
    if !rest.is_empty() || offset != end {
        return Err(wrong("its index does not fit its chunks".into()));
    }
    let mut names: Vec<&str> = contents.tensors.iter().map(|tensor| &*tensor.name).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(twice) => Err(wrong("it is there twice".into()).tensor(twice[0])),
        None => Ok(()),
    }
}

/// The identity of `base`, which the user called `source`: 64 short reads.
pub fn identify(base: &Checkpoint, source: &str) -> Result<Base> {
    let mut hasher = blake3::Hasher::new();
    for tensor in &base.tensors {
        hasher.update(&(tensor.name.len() as u64).to_le_bytes());
        hasher.update(tensor.name.as_bytes());
        hasher.update(dtype_name(tensor.dtype).as_bytes());
        hasher.update(&(tensor.shape.len() as u64).to_le_bytes());
        for dim in &tensor.shape {
            hasher.update(&dim.to_le_bytes());
        }
    }
    let catalogue = hasher.finalize().to_hex().to_string();
    Ok(Base { source: source.to_owned(), catalogue, sample: sample(base)? })
}

/// BLAKE3 over blocks that are spread evenly over the data of all tensors, in the order of their names.
fn sample(base: &Checkpoint) -> Result<String> {
    let total: u64 = base.tensors.iter().map(|tensor| tensor.bytes).sum();
    let stride = (total / SAMPLES).max(SAMPLE_BYTES);
    let mut hasher = blake3::Hasher::new();
    let mut buffer = [0; SAMPLE_BYTES as usize];
    let mut before = 0u64;
    for tensor in &base.tensors {
        let TensorEntry { file, offset, bytes, .. } = *tensor;
        let mut start = before.div_ceil(stride).saturating_mul(stride) - before;
        while start < bytes {
            let block = &mut buffer[..SAMPLE_BYTES.min(bytes - start) as usize];
            base.files[file as usize].file.read_at(block, offset + start)?;
            hasher.update(block);
            start += stride;
        }
        before += bytes;
    }
    Ok(hasher.finalize().to_hex().to_string())
}
