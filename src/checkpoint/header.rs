//! The header of one safetensors file: read and checked, or encoded.
//!
//! A file is an 8-byte little-endian length, that many bytes of JSON, and the data. What [`read`] accepts satisfies:
//!
//! - The length fits the file and the limit, checked before anything is allocated; the JSON is an object in UTF-8.
//! - No tensor, field or `__metadata__` occurs twice (the reference lets the last one win, so that two readers of one
//!   file could disagree); unknown fields are ignored, as the reference does.
//! - Every tensor is as long as its type and shape say, and the tensors cover the data exactly: no hole, no overlap,
//!   nothing behind. Tensors of no elements may stand anywhere between others.
//!
//! Whatever the `safetensors` crate refuses is refused here too; a property test holds this. Knows one file only.

#[cfg(test)]
mod tests;

use std::fmt;

use serde::Deserialize;
use serde::de::value::StrDeserializer;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use super::TensorEntry;
use super::json::Loose;
use crate::dtype::{Dtype, dtype_name};
use crate::error::{Error, Result, printable};
use crate::limits::{MAX_DIMENSIONS, MAX_HEADER_BYTES, MAX_NAME_BYTES, MAX_TENSORS};
use crate::storage::InputFile;

/// Length of the length prefix.
const PREFIX_BYTES: u64 = 8;
/// The data of a file that we write starts at a multiple of this: a cache line, and any element's width.
const DATA_ALIGNMENT: usize = 64;
/// Enough of a file's start to recognise other formats.
const MAGIC_BYTES: usize = 64;
/// The one member of the header that is not a tensor.
const METADATA: &str = "__metadata__";

/// A checked header.
#[derive(Debug)]
pub(super) struct Header {
    /// Length with the prefix: where the data starts.
    pub(super) bytes: u64,
    /// BLAKE3 of those bytes.
    pub(super) hash: [u8; 32],
    /// The tensors, sorted by name.
    pub(super) tensors: Vec<TensorEntry>,
}

/// Reads and checks the header of `file`, which is number `index` of its checkpoint.
pub(super) fn read(file: &dyn InputFile, index: u32) -> Result<Header> {
    read_and_check(file, index, file.identity().bytes).map_err(|e| e.at(file.path()))
}

/// The tensors of `file`, whose whole length is, or was, `file_bytes`.
pub(super) fn tensors_of(file: &dyn InputFile, file_bytes: u64) -> Result<Vec<TensorEntry>> {
    read_and_check(file, 0, file_bytes).map(|header| header.tensors)
}

fn read_and_check(file: &dyn InputFile, index: u32, file_bytes: u64) -> Result<Header> {
    let raw = read_raw(file, file_bytes)?;
    let header_bytes = raw.len() as u64;
    let hash = *blake3::hash(&raw).as_bytes();
    let text = header_text(&raw)?;
    let mut tensors = parse(text)?;
    drop(raw);

    tensors.shrink_to_fit();
    tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    if let Some(twice) = tensors.windows(2).find(|w| w[0].name == w[1].name) {
        return Err(Error::input("the header lists it twice").tensor(&twice[0].name));
    }
    check_cover(&tensors, file_bytes - header_bytes)?;
    for tensor in &mut tensors {
        tensor.offset += header_bytes;
        tensor.file = index;
    }
    Ok(Header { bytes: header_bytes, hash, tensors })
}

/// Prefix and JSON text, as stored.
fn read_raw(file: &dyn InputFile, file_bytes: u64) -> Result<Vec<u8>> {
    if file_bytes < PREFIX_BYTES {
        let what = if file_bytes == 0 { "the file is empty".into() } else { format!("only {file_bytes} bytes long") };
        return Err(Error::input(format!("{what}; a safetensors file has at least {PREFIX_BYTES} bytes"))
            .help("download or copy it again"));
    }
    let mut start = [0; MAGIC_BYTES];
    let start = &mut start[..file_bytes.min(MAGIC_BYTES as u64) as usize];
    file.read_at(start, 0)?;
    let prefix: [u8; 8] = std::array::from_fn(|i| start[i]);
    let length = u64::from_le_bytes(prefix);

    if length > file_bytes - PREFIX_BYTES {
        return Err(foreign(start).unwrap_or_else(|| {
            Error::input(format!("its first bytes claim a header of {length} bytes, but the file has {file_bytes}"))
                .help("the file is cut short or not safetensors; download or copy it again")
        }));
    }
    if length > MAX_HEADER_BYTES {
        return Err(foreign(start).unwrap_or_else(|| {
            Error::input(format!("the header has {length} bytes; at most {MAX_HEADER_BYTES} are accepted"))
        }));
    }
    let mut raw = vec![0; (PREFIX_BYTES + length) as usize];
    let (head, json) = raw.split_at_mut(prefix.len());
    head.copy_from_slice(&prefix);
    file.read_at(json, PREFIX_BYTES)?;
    Ok(raw)
}

fn header_text(raw: &[u8]) -> Result<&str> {
    let json = &raw[PREFIX_BYTES as usize..];
    if json.first() != Some(&b'{') {
        return Err(foreign(&raw[..raw.len().min(MAGIC_BYTES)])
            .unwrap_or_else(|| Error::input("not a safetensors file: the header does not begin with `{`")));
    }
    std::str::from_utf8(json).map_err(|e| {
        Error::input(format!("the header is not UTF-8 at byte {} of the file", PREFIX_BYTES as usize + e.valid_up_to()))
    })
}

/// A sentence for well-known other things that are found under a `.safetensors` name.
pub(super) fn foreign(start: &[u8]) -> Option<Error> {
    const CONVERT: &str = "convert the checkpoint to safetensors first";
    let known: [(&[u8], &str, &str); 5] = [
        (b"version https://git-lfs", "a git-lfs pointer, not the file itself", "fetch it with `git lfs pull`"),
        (b"PK\x03\x04", "a PyTorch (zip) checkpoint, not safetensors", CONVERT),
        (b"\x80\x02", "a PyTorch (pickle) checkpoint, not safetensors", CONVERT),
        (b"GGUF", "a GGUF file, not safetensors", "give the original safetensors checkpoint"),
        (b"<", "a web page or XML, not safetensors", "download it again: this is what a server said instead"),
    ];
    let (_, what, help) = known.into_iter().find(|(magic, ..)| start.starts_with(magic))?;
    Some(Error::input(what).help(help))
}

/// The tensors in the order of the text; offsets count from the start of the data.
fn parse(text: &str) -> Result<Vec<TensorEntry>> {
    let mut tensors = Vec::new();
    let mut current = None;
    let mut json = serde_json::Deserializer::from_str(text);
    let parsed =
        json.deserialize_map(HeaderVisitor { tensors: &mut tensors, current: &mut current }).and_then(|()| json.end());
    parsed.map_err(|e| {
        let error = Error::input(format!("invalid header: {e}"));
        match &current {
            Some(name) => error.tensor(name),
            None => error,
        }
    })?;
    tensors.shrink_to_fit();
    for tensor in &mut tensors {
        check_length(tensor).map_err(|e| e.tensor(&tensor.name))?;
    }
    Ok(tensors)
}

/// Checks the offsets of a tensor against its type and shape.
fn check_length(tensor: &TensorEntry) -> Result<()> {
    let TensorEntry { dtype, shape, bytes, .. } = tensor;
    let needed = tensor_bytes(*dtype, shape)?;
    if needed != *bytes {
        let dtype = dtype_name(*dtype);
        return Err(Error::input(format!(
            "{dtype} of shape {shape:?} has {needed} bytes, but its offsets span {bytes}"
        )));
    }
    Ok(())
}

/// Bytes of a tensor of `dtype` and `shape`.
pub(super) fn tensor_bytes(dtype: Dtype, shape: &[u64]) -> Result<u64> {
    // The order of the factors matters: the reference refuses what overflows on the way, even if a zero follows.
    let elements = shape.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim));
    let Some(bits) = elements.and_then(|n| n.checked_mul(dtype.bitsize() as u64)) else {
        return Err(Error::input(format!("shape {shape:?} is too large: its size in bits does not fit 64 bits")));
    };
    if !bits.is_multiple_of(8) {
        let dtype = dtype_name(dtype);
        return Err(Error::input(format!("{dtype} of shape {shape:?} has {bits} bits, which do not fill whole bytes")));
    }
    Ok(bits / 8)
}

/// Checks that the tensors cover `data_bytes` exactly.
fn check_cover(tensors: &[TensorEntry], data_bytes: u64) -> Result<()> {
    let end = |t: &TensorEntry| t.offset + t.bytes;
    if let Some(last) = tensors.iter().max_by_key(|t| end(t)).filter(|t| end(t) > data_bytes) {
        return Err(Error::input(format!("ends at byte {} of the data, but the file has {data_bytes}", end(last)))
            .tensor(&last.name)
            .help("the file is cut short; download or copy it again"));
    }
    let mut order: Vec<&TensorEntry> = tensors.iter().collect();
    order.sort_unstable_by_key(|t| (t.offset, t.bytes));
    let mut covered = 0;
    for tensor in order {
        if tensor.offset != covered {
            let what = if tensor.offset < covered { "overlaps the one before it" } else { "leaves a hole before it" };
            return Err(Error::input(format!(
                "begins at byte {} of the data, but {covered} was due: it {what}",
                tensor.offset
            ))
            .tensor(&tensor.name));
        }
        covered = end(tensor);
    }
    if covered != data_bytes {
        return Err(Error::input(format!(
            "the tensors end at byte {covered} of the data, but the file has {data_bytes}"
        ))
        .help("bytes that belong to no tensor are not accepted; download or copy the file again"));
    }
    Ok(())
}

/// Reads the header object; `current` is the tensor at hand, for error messages.
struct HeaderVisitor<'a> {
    tensors: &'a mut Vec<TensorEntry>,
    current: &'a mut Option<Box<str>>,
}

impl<'de> Visitor<'de> for HeaderVisitor<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut metadata = false;
        while let Some(name) = map.next_key::<Box<str>>()? {
            if &*name == METADATA {
                if std::mem::replace(&mut metadata, true) {
                    return Err(A::Error::custom("duplicate \"__metadata__\""));
                }
                map.next_value::<Option<TextMap>>().map_err(|e| within(METADATA, e))?;
                continue;
            }
            check_name(&name, self.tensors.len()).map_err(A::Error::custom)?;
            *self.current = Some(name);
            let Info { dtype, shape, begin, bytes } = map.next_value()?;
            let name = self.current.take().unwrap_or_default();
            self.tensors.push(TensorEntry { name, dtype, shape, file: 0, offset: begin, bytes });
        }
        Ok(())
    }
}

/// Checks a tensor's name and that there is room for one more beside `count` others.
pub(super) fn check_name(name: &str, count: usize) -> Result<(), String> {
    if name.len() > MAX_NAME_BYTES {
        let (length, name) = (name.len(), printable(name));
        return Err(format!("a tensor's name has {length} bytes, at most {MAX_NAME_BYTES} are accepted: \"{name}\""));
    }
    if count >= MAX_TENSORS {
        return Err(format!("more than {MAX_TENSORS} tensors"));
    }
    Ok(())
}

/// `error` with the name of the field that it is about.
fn within<E: serde::de::Error>(field: &str, error: E) -> E {
    E::custom(format_args!("\"{field}\": {error}"))
}

/// What a header says about one tensor.
struct Info {
    dtype: Dtype,
    shape: Box<[u64]>,
    begin: u64,
    bytes: u64,
}

#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum Field {
    Dtype,
    Shape,
    DataOffsets,
    #[serde(other)]
    Other,
}

impl<'de> Deserialize<'de> for Info {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(InfoVisitor)
    }
}

struct InfoVisitor;

impl<'de> Visitor<'de> for InfoVisitor {
    type Value = Info;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Info, A::Error> {
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(field) = map.next_key()? {
            match field {
                Field::Dtype => set(&mut dtype, "dtype", &mut map)?,
                Field::Shape => set(&mut shape, "shape", &mut map)?,
                Field::DataOffsets => set(&mut offsets, "data_offsets", &mut map)?,
                Field::Other => {
                    map.next_value::<Loose>()?;
                }
            }
        }
        let missing = |field| A::Error::custom(format_args!("\"{field}\" is missing"));
        let StoredDtype(dtype) = dtype.ok_or_else(|| missing("dtype"))?;
        let Dimensions(shape) = shape.ok_or_else(|| missing("shape"))?;
        let (begin, end): (u64, u64) = offsets.ok_or_else(|| missing("data_offsets"))?;
        let bytes = end
            .checked_sub(begin)
            .ok_or_else(|| A::Error::custom(format_args!("\"data_offsets\": [{begin}, {end}] run backwards")))?;
        Ok(Info { dtype, shape, begin, bytes })
    }
}

/// Reads the value of `field` into `slot`, once.
fn set<'de, A: MapAccess<'de>, T: Deserialize<'de>>(
    slot: &mut Option<T>,
    field: &str,
    map: &mut A,
) -> Result<(), A::Error> {
    let value = map.next_value().map_err(|e| within(field, e))?;
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(A::Error::custom(format_args!("duplicate \"{field}\""))),
    }
}

/// A type name. The reference's own list is the authority; only its error message is replaced.
struct StoredDtype(Dtype);

impl<'de> Deserialize<'de> for StoredDtype {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct DtypeVisitor;
        impl Visitor<'_> for DtypeVisitor {
            type Value = StoredDtype;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of a type")
            }

            fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<StoredDtype, E> {
                Dtype::deserialize(StrDeserializer::<E>::new(name))
                    .map(StoredDtype)
                    .map_err(|_| E::custom(format_args!("unknown type \"{}\"", printable(name))))
            }
        }
        deserializer.deserialize_str(DtypeVisitor)
    }
}

/// A shape, collected without growing a vector.
pub(super) struct Dimensions(pub(super) Box<[u64]>);

impl<'de> Deserialize<'de> for Dimensions {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct DimensionsVisitor;
        impl<'de> Visitor<'de> for DimensionsVisitor {
            type Value = Dimensions;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of whole numbers")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Dimensions, A::Error> {
                let mut dimensions = [0; MAX_DIMENSIONS];
                let mut count = 0;
                while let Some(dimension) = seq.next_element()? {
                    let slot = dimensions.get_mut(count).ok_or_else(|| {
                        A::Error::custom(format_args!("more than {MAX_DIMENSIONS} dimensions are not accepted"))
                    })?;
                    *slot = dimension;
                    count += 1;
                }
                Ok(Dimensions(dimensions[..count].into()))
            }
        }
        deserializer.deserialize_seq(DimensionsVisitor)
    }
}

/// `__metadata__`: an object of strings, checked and dropped.
struct TextMap;

impl<'de> Deserialize<'de> for TextMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextMapVisitor;
        impl<'de> Visitor<'de> for TextMapVisitor {
            type Value = TextMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<TextMap, A::Error> {
                while map.next_entry::<Box<str>, Box<str>>()?.is_some() {}
                Ok(TextMap)
            }
        }
        deserializer.deserialize_map(TextMapVisitor)
    }
}

/// Encodes a header: prefix and JSON, padded with spaces so that the data is aligned. `tensors` are (name, type,
/// shape, begin, end) in the order of the data; equal arguments give equal bytes.
pub(crate) fn encode<'a>(
    tensors: impl IntoIterator<Item = (&'a str, Dtype, &'a [u64], u64, u64)>,
    metadata: &[(&str, &str)],
) -> Vec<u8> {
    let mut header = vec![0; PREFIX_BYTES as usize];
    header.push(b'{');
    if !metadata.is_empty() {
        push_json(&mut header, METADATA);
        for (i, (key, value)) in metadata.iter().enumerate() {
            header.extend(if i == 0 { b":{" } else { &b","[..] });
            push_json(&mut header, key);
            header.push(b':');
            push_json(&mut header, value);
        }
        header.extend(b"},");
    }
    for (name, dtype, shape, begin, end) in tensors {
        push_tensor(&mut header, name, dtype, shape, (begin, end));
    }
    // Every member ended with a comma; the last one has none.
    header.pop_if(|last| *last == b',');
    header.push(b'}');
    header.resize(header.len().next_multiple_of(DATA_ALIGNMENT), b' ');
    let length = header.len() as u64 - PREFIX_BYTES;
    header[..PREFIX_BYTES as usize].copy_from_slice(&length.to_le_bytes());
    header
}

/// Most bytes that a tensor can add to an encoded header, whatever its offsets.
pub(super) fn encoded_bytes_max(name: &str, dtype: Dtype, shape: &[u64]) -> u64 {
    let mut member = Vec::new();
    push_tensor(&mut member, name, dtype, shape, (u64::MAX, u64::MAX));
    member.len() as u64
}

fn push_tensor(json: &mut Vec<u8>, name: &str, dtype: Dtype, shape: &[u64], offsets: (u64, u64)) {
    push_json(json, name);
    json.extend(b":{\"dtype\":");
    push_json(json, &dtype);
    json.extend(b",\"shape\":");
    push_json(json, shape);
    json.extend(b",\"data_offsets\":");
    push_json(json, &offsets);
    json.extend(b"},");
}

fn push_json<T: serde::Serialize + ?Sized>(json: &mut Vec<u8>, value: &T) {
    serde_json::to_writer(json, value).expect("strings and numbers have a JSON form, and a Vec takes any bytes");
}
