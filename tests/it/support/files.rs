//! Writing and reading checkpoints on disk. The writer is minimal, so that it can also write what must be refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use super::random::Random;
use super::tensor::{Tensor, Tensors};

/// How a checkpoint is spread over files.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Number of files, at most one a tensor; 1 writes `model.safetensors` without an index.
    pub shards: usize,
    /// Which of the possible orders of tensors within and across files; 0 is by name.
    pub order: u64,
}

impl Layout {
    /// One file, tensors by name.
    pub const SINGLE: Self = Self { shards: 1, order: 0 };

    pub const fn sharded(shards: usize, order: u64) -> Self {
        Self { shards, order }
    }
}

/// The name that a safetensors header uses for a type.
pub fn dtype_name(dtype: Dtype) -> Value {
    serde_json::to_value(dtype).expect("a type has a name")
}

/// Writes a file with any text as header, right or wrong, followed by `data`.
pub fn write_raw(path: &Path, header: &str, data: &[u8]) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    fs::write(path, bytes).unwrap();
}

/// Writes one well-formed file with the tensors in this order.
pub fn write_file(path: &Path, tensors: &[(&String, &Tensor)]) {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut data = Vec::new();
    for (name, tensor) in tensors {
        let begin = data.len();
        data.extend_from_slice(&tensor.bytes);
        let entry = json!({
            "dtype": dtype_name(tensor.dtype), "shape": tensor.shape, "data_offsets": [begin, data.len()],
        });
        header.insert((*name).clone(), entry);
    }
    write_raw(path, &Value::Object(header).to_string(), &data);
}

/// Writes `tensors` into `dir` with an index if there are several files, and a `config.json`.
pub fn write_checkpoint(dir: &Path, tensors: &Tensors, layout: Layout) {
    fs::create_dir_all(dir).unwrap();
    let mut ordered: Vec<_> = tensors.iter().collect();
    if layout.order != 0 {
        Random::new(layout.order).shuffle(&mut ordered);
    }
    let config = json!({"model_type": "fixture", "hidden_size": 8, "torch_dtype": "float32"});
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let shards = layout.shards.clamp(1, tensors.len().max(1));
    if shards == 1 {
        write_file(&dir.join("model.safetensors"), &ordered);
        return;
    }
    let mut weight_map = BTreeMap::new();
    for shard in 0..shards {
        let name = format!("model-{:05}-of-{:05}.safetensors", shard + 1, shards);
        let held: Vec<_> = ordered.iter().copied().skip(shard).step_by(shards).collect();
        write_file(&dir.join(&name), &held);
        weight_map.extend(held.iter().map(|(tensor, _)| ((*tensor).clone(), name.clone())));
    }
    let bytes: usize = tensors.values().map(|tensor| tensor.bytes.len()).sum();
    write_index(dir, &json!({"metadata": {"total_size": bytes}, "weight_map": weight_map}));
}

/// Writes the index of `dir`.
pub fn write_index(dir: &Path, index: &Value) {
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// Reads a JSON file.
pub fn read_json(path: &Path) -> Value {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Reads one safetensors file with the reference implementation.
pub fn read_file(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    file.tensors()
        .into_iter()
        .map(|(name, view)| (name, Tensor::raw(view.dtype(), view.shape(), view.data().to_vec())))
        .collect()
}

/// Reads a checkpoint as loaders do: by its index if it has one, else `model.safetensors`.
pub fn read_checkpoint(dir: &Path) -> Tensors {
    let index = dir.join("model.safetensors.index.json");
    if !index.exists() {
        return read_file(&dir.join("model.safetensors"));
    }
    let index = read_json(&index);
    let weight_map = index["weight_map"].as_object().expect("an index has a weight_map");
    let mut files: BTreeMap<&str, Tensors> = BTreeMap::new();
    let mut all = Tensors::new();
    for (tensor, file) in weight_map {
        let file = file.as_str().expect("a file name");
        let held = files.entry(file).or_insert_with(|| read_file(&dir.join(file)));
        let found = held.remove(tensor).unwrap_or_else(|| panic!("{file} lacks {tensor}"));
        all.insert(tensor.clone(), found);
    }
    let unlisted: Vec<_> = files.values().flat_map(|held| held.keys()).collect();
    assert!(unlisted.is_empty(), "tensors that the index does not list: {unlisted:?}");
    all
}

/// Every file under `dir` with its bytes, by relative path.
pub fn read_tree(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut pending = vec![dir.to_path_buf()];
    while let Some(folder) = pending.pop() {
        for entry in fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let path = entry.unwrap().path();
            if path.is_dir() {
                pending.push(path);
            } else {
                files.insert(path.strip_prefix(dir).unwrap().to_path_buf(), fs::read(&path).unwrap());
            }
        }
    }
    files
}

/// Files of a finished output that do not depend on how a run went: all, but without the manifest's times and places.
pub fn lasting(out: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = read_tree(out);
    let manifest = files.get_mut(Path::new("tiesmith.json")).expect("a finished output has a manifest");
    let mut value: Value = serde_json::from_slice(manifest).unwrap();
    value.as_object_mut().unwrap().remove("run").expect("how it was done");
    let report = value["report"].as_object_mut().unwrap();
    for field in ["out", "wall_seconds", "peak_memory_bytes", "resumed", "chunks_reused", "bytes_read"] {
        report.remove(field).expect(field);
    }
    *manifest = value.to_string().into_bytes();
    files
}

/// Copies a directory, links followed.
pub fn copy_tree(from: &Path, to: &Path) {
    for (path, bytes) in read_tree(from) {
        let target = to.join(path);
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::write(target, bytes).unwrap();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::tensor::tensors;

    #[test]
    fn what_is_written_reads_back_in_every_layout() {
        let written = tensors([
            ("a", Tensor::vector(&[1.0, -0.0, 3.5])),
            ("b", Tensor::floats(Dtype::BF16, &[2, 1], &[0.5, -2.0])),
            ("c", Tensor::floats(Dtype::F16, &[], &[7.0])),
            ("d", Tensor::vector(&[])),
            ("e", Tensor::raw(Dtype::I64, &[1], 5i64.to_le_bytes().to_vec())),
        ]);
        for layout in [Layout::SINGLE, Layout::sharded(2, 0), Layout::sharded(3, 9), Layout::sharded(5, 4)] {
            let dir = tempfile::tempdir().unwrap();
            write_checkpoint(dir.path(), &written, layout);
            assert_eq!(read_checkpoint(dir.path()), written, "{layout:?}");
        }
    }
}
