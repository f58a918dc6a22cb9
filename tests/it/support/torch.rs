//! Writing checkpoints as PyTorch does: a zip archive of a pickle and the storages, and an index if there are several.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::Dtype;
use serde_json::json;

use super::tensor::{Tensor, Tensors};

/// Writes `tensors` into `dir`, spread over so many files.
pub fn write_torch(dir: &Path, tensors: &Tensors, files: usize) {
    fs::create_dir_all(dir).unwrap();
    let all: Vec<(&String, &Tensor)> = tensors.iter().collect();
    if files == 1 {
        fs::write(dir.join("pytorch_model.bin"), archive("pytorch_model", &all)).unwrap();
        return;
    }
    let mut weight_map = BTreeMap::new();
    for file in 0..files {
        let stem = format!("pytorch_model-{:05}-of-{files:05}", file + 1);
        let held: Vec<_> = all.iter().copied().skip(file).step_by(files).collect();
        fs::write(dir.join(format!("{stem}.bin")), archive(&stem, &held)).unwrap();
        weight_map.extend(held.iter().map(|(name, _)| ((*name).clone(), format!("{stem}.bin"))));
    }
    let index = json!({"metadata": {}, "weight_map": weight_map});
    fs::write(dir.join("pytorch_model.bin.index.json"), index.to_string()).unwrap();
}

/// The archive of one file, every tensor a storage of its own; equal tensors share one.
fn archive(root: &str, tensors: &[(&String, &Tensor)]) -> Vec<u8> {
    let mut storages: Vec<&Tensor> = Vec::new();
    let mut pickle = b"\x80\x02}(".to_vec();
    for (name, tensor) in tensors {
        let key = storages.iter().position(|known| known == tensor).unwrap_or_else(|| {
            storages.push(tensor);
            storages.len() - 1
        });
        text(&mut pickle, name);
        pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut pickle, "storage");
        pickle.extend(format!("ctorch\n{}\n", class(tensor.dtype)).bytes());
        text(&mut pickle, &key.to_string());
        text(&mut pickle, "cpu");
        number(&mut pickle, tensor.elements());
        pickle.extend(b"tQK\x00");
        let strides = (0..tensor.shape.len()).map(|d| tensor.shape[d + 1..].iter().product());
        for sizes in [tensor.shape.clone(), strides.collect()] {
            pickle.push(b'(');
            sizes.iter().for_each(|&size| number(&mut pickle, size));
            pickle.push(b't');
        }
        pickle.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    pickle.extend(b"u.");
    let mut members = vec![(format!("{root}/data.pkl"), pickle), (format!("{root}/byteorder"), b"little".to_vec())];
    members.extend(storages.iter().enumerate().map(|(i, t)| (format!("{root}/data/{i}"), t.bytes.clone())));
    zip(&members)
}

fn class(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F64 => "DoubleStorage",
        Dtype::F32 => "FloatStorage",
        Dtype::F16 => "HalfStorage",
        Dtype::BF16 => "BFloat16Storage",
        Dtype::I64 => "LongStorage",
        Dtype::I32 => "IntStorage",
        Dtype::I16 => "ShortStorage",
        Dtype::I8 => "CharStorage",
        Dtype::U8 => "ByteStorage",
        Dtype::BOOL => "BoolStorage",
        other => panic!("no class of storages for {other:?}"),
    }
}

fn text(pickle: &mut Vec<u8>, text: &str) {
    pickle.push(b'X');
    pickle.extend((text.len() as u32).to_le_bytes());
    pickle.extend(text.bytes());
}

fn number(pickle: &mut Vec<u8>, number: usize) {
    pickle.push(b'J');
    pickle.extend(i32::try_from(number).unwrap().to_le_bytes());
}

/// Members stored as they are, their data at multiples of 64.
fn zip(members: &[(String, Vec<u8>)]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in members {
        let padding = (64 - (out.len() + 30 + name.len() + 4) % 64) % 64;
        let at = (out.len() as u32).to_le_bytes();
        let lengths = [(data.len() as u32).to_le_bytes(); 2].concat();
        let named = (name.len() as u16).to_le_bytes();
        let extra = ((padding + 4) as u16).to_le_bytes();
        let field = [b"FB", &(padding as u16).to_le_bytes()[..], &vec![b'Z'; padding]].concat();
        let common = [&[0u8; 12][..], &lengths, &named].concat();
        out.extend([b"PK\x03\x04", &[0, 0][..], &common[..], &extra, name.as_bytes(), &field, data].concat());
        directory.extend([b"PK\x01\x02", &[0; 4][..], &common, &[0; 12], &at, name.as_bytes()].concat());
    }
    let count = (members.len() as u16).to_le_bytes();
    let (at, length) = ((out.len() as u32).to_le_bytes(), (directory.len() as u32).to_le_bytes());
    [&out[..], &directory, b"PK\x05\x06", &[0; 4], &count, &count, &length, &at, &[0, 0]].concat()
}
