//! PyTorch checkpoints (`pytorch_model.bin`): zip archives of a pickle and one member per storage.
//!
//! - Tensors become entries at offsets of the file, like those of a safetensors file, so that they are streamed alike.
//!   Tensors that share a storage are entries at the same place.
//! - The pickle is read by a machine that can only describe tensors (`pickle`); no code of it is ever run.
//! - Every tensor must lie within its storage, and its elements must stand as its shape says.
//! - What cannot be streamed (compressed, encrypted, not contiguous, the format from before PyTorch 1.6) is refused.
//!
//! Format: `torch/serialization.py` and `caffe2/serialize/inline_container.h` of PyTorch.

mod pickle;
#[cfg(test)]
mod tests;
mod zip;

use std::collections::HashMap;

use super::TensorEntry;
use super::header::{self, Header};
use crate::dtype::{Dtype, dtype_name};
use crate::error::{Error, Result, printable};
use crate::limits::MAX_PICKLE_BYTES;
use crate::storage::InputFile;
use pickle::TensorRef;
use zip::Archive;

/// What every such file begins with.
const MAGIC: &[u8; 4] = b"PK\x03\x04";
/// How the pickle of the format from before PyTorch 1.6 begins: protocol 2, and a number of ten bytes.
const LEGACY: &[u8; 14] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";
/// Where a tar archive says what it is, and how.
const TAR_MAGIC: std::ops::Range<usize> = 257..262;
const TAR: &[u8] = b"ustar";
pub(super) const CONVERT: &str = "convert it to safetensors first: in Python, \
    safetensors.torch.save_file({k: v.clone().contiguous() for k, v in torch.load(FILE, weights_only=True).items()}, NEW)";
/// What to do about a file of something else than weights.
const SAVE: &str = "save the model's weights only: torch.save(model.state_dict(), FILE)";

/// Whether a file called so is taken for a PyTorch checkpoint.
pub(super) fn has_name(name: &str) -> bool {
    [".bin", ".pt", ".pth", ".ckpt"].iter().any(|ending| name.ends_with(ending))
}

/// Reads the catalogue of `file`, which is number `index` of its checkpoint, and what is to be warned of.
pub(super) fn read(file: &dyn InputFile, index: u32) -> Result<(Header, Option<String>)> {
    catalogue(file, index).map_err(|e| e.at(file.path()))
}

fn catalogue(file: &dyn InputFile, index: u32) -> Result<(Header, Option<String>)> {
    recognise(file)?;
    let archive = Archive::read(file)?;
    let root = root(&archive)?;
    let text = member(&archive, file, &format!("{root}/data.pkl"), MAX_PICKLE_BYTES)?;
    check_order(&archive, file, root)?;
    let contents = pickle::read(&text).map_err(|e| e.help(SAVE))?;
    let mut starts = HashMap::new();
    let mut tensors = Vec::with_capacity(contents.tensors.len());
    for (name, tensor) in contents.tensors {
        header::check_name(&name, tensors.len()).map_err(Error::input)?;
        let key = String::from_utf8_lossy(&text[tensor.storage.key.clone()]).into_owned();
        let entry = place(&archive, root, &key, &tensor, &mut starts).map_err(|e| e.tensor(&name))?;
        tensors.push(TensorEntry { name, dtype: tensor.dtype, shape: tensor.shape, file: index, ..entry });
    }
    tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    if let Some(twice) = tensors.windows(2).find(|w| w[0].name == w[1].name) {
        return Err(Error::input("the pickle lists it twice").tensor(&twice[0].name));
    }
    let (others, first) = contents.others;
    if tensors.is_empty() && others > 0 {
        let first = printable(&first);
        return Err(Error::input(format!("no entry is a tensor: the first of {others} is \"{first}\"")).help(SAVE));
    }
    let warning = (others > 0).then(|| {
        let path = printable(&file.path().to_string_lossy());
        let first = printable(&first);
        match others {
            1 => format!("{path}: left out an entry that is no tensor: \"{first}\""),
            _ => format!("{path}: left out {others} entries that are no tensors: the first is \"{first}\""),
        }
    });
    let hash = *blake3::Hasher::new().update(&archive.raw).update(&text).finalize().as_bytes();
    Ok((Header { bytes: (archive.raw.len() + text.len()) as u64, hash, tensors }, warning))
}

/// Refuses what is no zip archive, by what it is.
fn recognise(file: &dyn InputFile) -> Result<()> {
    let mut start = [0; TAR_MAGIC.start + TAR.len()];
    let length = file.identity().bytes.min(start.len() as u64) as usize;
    let start = &mut start[..length];
    file.read_at(start, 0)?;
    if start.starts_with(MAGIC) {
        return Ok(());
    }
    if start.starts_with(LEGACY) {
        return Err(Error::input("a PyTorch file in the format from before version 1.6").help(CONVERT));
    }
    if start.starts_with(b"\x80") {
        return Err(Error::input("a bare pickle, not a PyTorch checkpoint: it may run code when it is loaded")
            .help("if you trust it, load it where it was made and save it with safetensors"));
    }
    if start.get(TAR_MAGIC) == Some(TAR) {
        return Err(
            Error::input("a tar archive: a PyTorch file in the format from before version 0.1.10").help(CONVERT)
        );
    }
    Err(header::foreign(start).unwrap_or_else(|| {
        let what = if start.is_empty() { "the file is empty" } else { "not a zip archive" };
        Error::input(format!("{what}: not a PyTorch checkpoint")).help("download or copy it again")
    }))
}

/// The one folder of the archive.
fn root<'a>(archive: &'a Archive<'_>) -> Result<&'a str> {
    let mut roots = archive.names().filter_map(|name| name.strip_suffix("/data.pkl"));
    let (root, more) = (roots.next(), roots.next());
    if archive.names().any(|name| name.ends_with("/constants.pkl")) {
        return Err(Error::input("a TorchScript archive, which holds a program besides its weights").help(SAVE));
    }
    match (root, more) {
        (Some(root), None) => Ok(root),
        (None, _) => Err(Error::input("a zip archive without data.pkl: not a PyTorch checkpoint").help(SAVE)),
        (Some(_), Some(_)) => Err(Error::input("a zip archive with several data.pkl").help(SAVE)),
    }
}

/// A whole member of at most `limit` bytes.
fn member(archive: &Archive<'_>, file: &dyn InputFile, name: &str, limit: u64) -> Result<Vec<u8>> {
    let (begin, bytes) = archive.range(name)?;
    if bytes > limit {
        let name = printable(name);
        return Err(Error::input(format!("archive member \"{name}\" has {bytes} bytes; at most {limit} are accepted"))
            .help(SAVE));
    }
    let mut content = vec![0; bytes as usize];
    file.read_at(&mut content, begin)?;
    Ok(content)
}

/// Refuses numbers whose first byte is the highest.
fn check_order(archive: &Archive<'_>, file: &dyn InputFile, root: &str) -> Result<()> {
    let name = format!("{root}/byteorder");
    if archive.get(&name).is_none() {
        return Ok(());
    }
    match &member(archive, file, &name, 64)?[..] {
        b"little" => Ok(()),
        other => {
            let order = printable(&String::from_utf8_lossy(other));
            Err(Error::input(format!("numbers are in the byte order \"{order}\"")).help(CONVERT))
        }
    }
}

/// Where a tensor lies: the name, type and shape of the entry are not set. `starts` knows storages already found.
fn place(
    archive: &Archive<'_>,
    root: &str,
    key: &str,
    tensor: &TensorRef,
    starts: &mut HashMap<String, (u64, u64)>,
) -> Result<TensorEntry> {
    let TensorRef { storage, dtype, offset, shape, strides } = tensor;
    let (begin, held) = match starts.get(key) {
        Some(found) => *found,
        None => {
            let found = archive.range(&format!("{root}/data/{key}"))?;
            starts.insert(key.to_owned(), found);
            found
        }
    };
    let width = |dtype: Dtype| dtype.bitsize() as u64 / 8;
    let declared = storage.count.checked_mul(storage.dtype.map_or(1, width));
    if declared != Some(held) {
        let (key, count) = (printable(key), storage.count);
        return Err(Error::input(format!("storage {key} of {count} elements has {held} bytes in the archive"))
            .help("download or copy the file again"));
    }
    let bytes = header::tensor_bytes(*dtype, shape)?;
    let outside = || {
        let dtype = dtype_name(*dtype);
        Error::input(format!(
            "{dtype} of shape {shape:?} from element {offset} on reaches beyond its storage of {held} bytes"
        ))
    };
    let from = offset.checked_mul(width(*dtype)).filter(|&from| from <= held).ok_or_else(outside)?;
    // What the strides reach, whatever their order.
    let reach = match bytes {
        0 => Some(0),
        _ => shape.iter().zip(strides).try_fold(1u64, |reach, (size, stride)| {
            (size - 1).checked_mul(*stride).and_then(|more| reach.checked_add(more))
        }),
    };
    reach
        .and_then(|reach| reach.checked_mul(width(*dtype)))
        .filter(|&reach| reach <= held - from)
        .ok_or_else(outside)?;
    if bytes > 0 && !is_contiguous(shape, strides) {
        return Err(Error::input(format!("shape {shape:?} with strides {strides:?}: its elements are not in order"))
            .help(CONVERT));
    }
    Ok(TensorEntry { name: "".into(), dtype: *dtype, shape: Box::default(), file: 0, offset: begin + from, bytes })
}

/// Whether elements stand in the order of the shape, the last dimension fastest. Dimensions of one do not matter.
fn is_contiguous(shape: &[u64], strides: &[u64]) -> bool {
    let mut expected = 1;
    shape.iter().zip(strides).rev().all(|(&size, &stride)| {
        let fits = size == 1 || stride == expected;
        expected *= size;
        fits
    })
}
