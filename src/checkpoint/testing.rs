//! Files for the tests of this folder: good ones, odd ones and broken ones.

use std::path::Path;
use std::sync::Arc;

use crate::storage::{Disk, IoMode, Storage};

/// A file of `header` (JSON text) and `data_bytes` bytes of data.
pub(super) fn raw(header: &str, data_bytes: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend((0..data_bytes).map(|i| i as u8));
    file
}

/// A file of U8 tensors: (name, bytes).
pub(super) fn file_of(tensors: &[(&str, u64)]) -> Vec<u8> {
    let mut end = 0;
    let members: Vec<String> = tensors
        .iter()
        .map(|(name, bytes)| {
            let begin = end;
            end += bytes;
            format!(r#""{name}":{{"dtype":"U8","shape":[{bytes}],"data_offsets":[{begin},{end}]}}"#)
        })
        .collect();
    raw(&format!("{{{}}}", members.join(",")), end as usize)
}

/// An index of (tensor, shard).
pub(super) fn index_of(tensors: &[(&str, &str)]) -> String {
    let members: Vec<String> = tensors.iter().map(|(tensor, shard)| format!("{tensor:?}: {shard:?}")).collect();
    format!(r#"{{"metadata": {{}}, "weight_map": {{{}}}}}"#, members.join(", "))
}

/// Writes `files` (name, content) under `dir`, with the directories in between.
pub(super) fn write(dir: &Path, files: &[(&str, &[u8])]) {
    for (name, content) in files {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
}

/// The real file system.
pub(super) fn disk() -> Arc<dyn Storage> {
    Arc::new(Disk::new(IoMode::Auto))
}
