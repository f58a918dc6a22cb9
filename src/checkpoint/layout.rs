//! Where every output tensor goes: shards, header bytes and offsets, from names, types and shapes alone.
//!
//! - Tensors fill shards in the given order; one that would pass the limit opens the next shard. The limit counts
//!   tensor bytes; a tensor beyond it has a shard of its own.
//! - Within a shard wider types come first (otherwise the order is kept), so that every tensor starts at a multiple of
//!   its element's width, as files of the reference implementation do.
//! - Names and index are those of the Hub: `model.safetensors` alone, or `model-00001-of-000NN.safetensors` and an
//!   index. Equal arguments give equal bytes.
//!
//! Opens no file and knows nothing of where the bytes come from.

use std::collections::BTreeMap;

use serde::Serialize;

use super::header;
use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// Longest header that is written: what the Hub's own client accepts when it reads a header remotely.
const MAX_WRITTEN_HEADER_BYTES: u64 = 25_000_000;
/// Some versions of transformers refuse files without it.
const METADATA: [(&str, &str); 1] = [("format", "pt")];

/// A tensor to be written.
#[derive(Debug, Clone, Copy)]
pub struct OutputTensor<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its stored type.
    pub dtype: Dtype,
    /// Its shape, outermost dimension first.
    pub shape: &'a [u64],
}

/// Where a tensor goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// Which of [`Layout::shards`].
    pub shard: u32,
    /// Where its first byte is, from the start of that file.
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
}

/// An output file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardLayout {
    /// File name.
    pub name: String,
    /// The file's first bytes; tensor data follows.
    pub header: Vec<u8>,
    /// Length of the file, header included.
    pub bytes: u64,
}

/// The output files and where each tensor goes. See the module's documentation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The files; never empty (an output without tensors is one file with an empty header).
    pub shards: Vec<ShardLayout>,
    /// Where each tensor goes, in the order they were given.
    pub tensors: Vec<Placement>,
    index: Option<String>,
}

/// The file of an adapter's weights.
const ADAPTER: &str = "adapter_model.safetensors";

impl Layout {
    /// The layout of an adapter, which is one file whatever its size.
    pub fn adapter<'a>(tensors: impl IntoIterator<Item = OutputTensor<'a>>) -> Result<Self> {
        let mut layout = Self::new(tensors, u64::MAX)?;
        layout.shards[0].name = ADAPTER.to_owned();
        Ok(layout)
    }

    /// Lays out `tensors`, whose names must differ.
    pub fn new<'a>(tensors: impl IntoIterator<Item = OutputTensor<'a>>, max_shard_bytes: u64) -> Result<Self> {
        let tensors: Vec<OutputTensor<'a>> = tensors.into_iter().collect();
        let bytes: Vec<u64> = tensors
            .iter()
            .map(|t| header::tensor_bytes(t.dtype, t.shape).map_err(|e| e.tensor(t.name)))
            .collect::<Result<_>>()?;
        let groups = split(&tensors, &bytes, max_shard_bytes);

        let mut placements = vec![Placement { shard: 0, offset: 0, bytes: 0 }; tensors.len()];
        let mut shards = Vec::with_capacity(groups.len());
        for (number, group) in groups.iter().enumerate() {
            let mut order: Vec<usize> = group.clone().collect();
            order.sort_by_key(|&i| std::cmp::Reverse(tensors[i].dtype.bitsize()));
            let mut end = 0u64;
            for &i in &order {
                placements[i] = Placement { shard: number as u32, offset: end, bytes: bytes[i] };
                end = end.checked_add(bytes[i]).ok_or_else(too_large)?;
            }
            let header = header::encode(
                order.iter().map(|&i| {
                    let OutputTensor { name, dtype, shape } = tensors[i];
                    (name, dtype, shape, placements[i].offset, placements[i].offset + bytes[i])
                }),
                &METADATA,
            );
            let data = header.len() as u64;
            let file_bytes = end.checked_add(data).ok_or_else(too_large)?;
            order.iter().for_each(|&i| placements[i].offset += data);
            shards.push(ShardLayout { name: shard_name(number, groups.len()), header, bytes: file_bytes });
        }
        let index = (shards.len() > 1).then(|| index_text(&tensors, &placements, &shards));
        Ok(Self { shards, tensors: placements, index })
    }

    /// Text of `model.safetensors.index.json`; `None` for a single shard, which needs none.
    pub fn index_json(&self) -> Option<&str> {
        self.index.as_deref()
    }
}

/// Ranges of tensors, one per shard.
fn split(tensors: &[OutputTensor<'_>], bytes: &[u64], max_shard_bytes: u64) -> Vec<std::ops::Range<usize>> {
    let empty_header = header::encode([], &METADATA).len() as u64;
    let mut groups = Vec::new();
    let mut start = 0;
    let (mut data, mut header) = (0u64, empty_header);
    for (i, tensor) in tensors.iter().enumerate() {
        let member = header::encoded_bytes_max(tensor.name, tensor.dtype, tensor.shape);
        let full = data.saturating_add(bytes[i]) > max_shard_bytes || header + member > MAX_WRITTEN_HEADER_BYTES;
        if full && i > start {
            groups.push(start..i);
            start = i;
            (data, header) = (0, empty_header);
        }
        data = data.saturating_add(bytes[i]);
        header += member;
    }
    groups.push(start..tensors.len());
    groups
}

fn shard_name(index: usize, count: usize) -> String {
    match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
    }
}

fn too_large() -> Error {
    Error::input("an output file would have more than 2^64 bytes").help("use a smaller --max-shard-size")
}

/// The index as transformers writes it: sorted, two spaces of indent, a final newline.
fn index_text(tensors: &[OutputTensor<'_>], placements: &[Placement], shards: &[ShardLayout]) -> String {
    #[derive(Serialize)]
    struct Metadata {
        total_size: u64,
    }
    #[derive(Serialize)]
    struct Index<'a> {
        metadata: Metadata,
        weight_map: BTreeMap<&'a str, &'a str>,
    }
    let index = Index {
        metadata: Metadata { total_size: placements.iter().map(|p| p.bytes).fold(0, u64::saturating_add) },
        weight_map: tensors.iter().zip(placements).map(|(t, p)| (t.name, &*shards[p.shard as usize].name)).collect(),
    };
    let mut text = serde_json::to_string_pretty(&index).expect("strings and numbers have a JSON form");
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::checkpoint::testing::disk;

    fn tensor<'a>(name: &'a str, dtype: Dtype, shape: &'a [u64]) -> OutputTensor<'a> {
        OutputTensor { name, dtype, shape }
    }

    fn names(layout: &Layout) -> Vec<&str> {
        layout.shards.iter().map(|s| &*s.name).collect()
    }

    fn shards(layout: &Layout) -> Vec<u32> {
        layout.tensors.iter().map(|t| t.shard).collect()
    }

    #[test]
    fn nothing_is_one_empty_file() {
        let layout = Layout::new([], 100).unwrap();
        assert_eq!((names(&layout), layout.index_json()), (vec!["model.safetensors"], None));
        assert_eq!(layout.shards[0].bytes, layout.shards[0].header.len() as u64);
    }

    #[test]
    fn one_shard_keeps_the_order_of_equally_wide_types_and_aligns_all() {
        let layout = Layout::new(
            [
                tensor("u8", Dtype::U8, &[3]),
                tensor("half", Dtype::BF16, &[3]),
                tensor("f4", Dtype::F4, &[2]),
                tensor("single", Dtype::F32, &[5]),
                tensor("half2", Dtype::F16, &[1]),
                tensor("double", Dtype::F64, &[1]),
                tensor("i32", Dtype::I32, &[1]),
            ],
            1000,
        )
        .unwrap();
        let data = layout.shards[0].header.len() as u64;
        let offsets: Vec<u64> = layout.tensors.iter().map(|t| t.offset - data).collect();
        assert_eq!(offsets, [40, 32, 43, 8, 38, 0, 28]);
        assert_eq!((data % 64, layout.shards[0].bytes), (0, data + 44));
        assert!(layout.shards[0].header[8..].starts_with(br#"{"__metadata__":{"format":"pt"},"double":"#));
    }

    #[test]
    fn shards_are_filled_in_order_up_to_the_limit() {
        let tensors = [
            tensor("a", Dtype::U8, &[60]),
            tensor("b", Dtype::U8, &[40]),
            tensor("c", Dtype::U8, &[1]),
            tensor("huge", Dtype::U8, &[500]),
            tensor("empty", Dtype::U8, &[0]),
            tensor("d", Dtype::U8, &[99]),
        ];
        let layout = Layout::new(tensors, 100).unwrap();
        assert_eq!(shards(&layout), [0, 0, 1, 2, 3, 3]);
        assert_eq!(names(&layout)[0], "model-00001-of-00004.safetensors");
        assert_eq!(names(&layout)[3], "model-00004-of-00004.safetensors");
        assert_eq!(shards(&Layout::new(tensors, 0).unwrap()), [0, 1, 2, 3, 4, 5]);
        assert_eq!(shards(&Layout::new(tensors, u64::MAX).unwrap()), [0; 6]);
    }

    #[test]
    fn the_index_is_sorted_and_indented() {
        let tensors = [tensor("b", Dtype::F32, &[2]), tensor("a", Dtype::F32, &[1]), tensor("c", Dtype::U8, &[])];
        let layout = Layout::new(tensors, 8).unwrap();
        let index = r#"{
  "metadata": {
    "total_size": 13
  },
  "weight_map": {
    "a": "model-00002-of-00002.safetensors",
    "b": "model-00001-of-00002.safetensors",
    "c": "model-00002-of-00002.safetensors"
  }
}
"#;
        assert_eq!(layout.index_json(), Some(index));
        assert_eq!(layout, Layout::new(tensors, 8).unwrap());
    }

    #[test]
    fn what_is_laid_out_can_be_opened() {
        let tensors = [
            tensor("x.\"q\"", Dtype::BF16, &[7]),
            tensor("y", Dtype::I64, &[2, 2]),
            tensor("empty", Dtype::F32, &[0, 9]),
            tensor("z", Dtype::BOOL, &[5]),
        ];
        for limit in [0, 20, 1000] {
            let layout = Layout::new(tensors, limit).unwrap();
            let dir = tempfile::tempdir().unwrap();
            for shard in &layout.shards {
                let mut content = shard.header.clone();
                content.resize(shard.bytes as usize, 7);
                safetensors::SafeTensors::deserialize(&content).unwrap();
                std::fs::write(dir.path().join(&shard.name), content).unwrap();
            }
            if let Some(index) = layout.index_json() {
                std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
            }
            let checkpoint = crate::checkpoint::Checkpoint::open(dir.path().to_str().unwrap(), &disk()).unwrap();
            assert_eq!(checkpoint.warnings, [""; 0]);
            for (tensor, place) in tensors.iter().zip(&layout.tensors) {
                let entry = checkpoint.get(tensor.name).unwrap();
                assert_eq!((entry.dtype, &*entry.shape), (tensor.dtype, tensor.shape));
                assert_eq!((entry.offset, entry.bytes), (place.offset, place.bytes));
                assert!(checkpoint.path_of(entry).ends_with(&layout.shards[place.shard as usize].name));
            }
        }
    }

    proptest! {
        #[test]
        fn every_layout_is_aligned_and_dense(
            shapes in prop::collection::vec((prop::collection::vec(0u64..5, 0..3), 0usize..6), 0..12),
            limit in 0u64..300,
        ) {
            const TYPES: [Dtype; 6] = [Dtype::F64, Dtype::I32, Dtype::BF16, Dtype::U8, Dtype::C64, Dtype::F8_E4M3];
            let names: Vec<String> = (0..shapes.len()).map(|i| format!("t{i}")).collect();
            let tensors = || names.iter().zip(&shapes).map(|(name, (shape, dtype))| tensor(name, TYPES[*dtype], shape));
            let layout = Layout::new(tensors(), limit).unwrap();
            prop_assert!(layout.tensors.is_sorted_by_key(|t| t.shard));
            for (tensor, place) in tensors().zip(&layout.tensors) {
                prop_assert_eq!(place.offset % (tensor.dtype.bitsize() as u64 / 8), 0);
            }
            for (number, shard) in layout.shards.iter().enumerate() {
                // The reference checks that the tensors cover the data exactly.
                let mut file = shard.header.clone();
                file.resize(shard.bytes as usize, 0);
                let read = safetensors::SafeTensors::deserialize(&file).unwrap();
                let placed: Vec<u64> =
                    layout.tensors.iter().filter(|t| t.shard as usize == number).map(|t| t.bytes).collect();
                prop_assert_eq!(read.len(), placed.len());
                prop_assert!(placed.len() <= 1 || placed.iter().sum::<u64>() <= limit);
            }
        }
    }

    #[test]
    fn long_headers_open_a_new_shard() {
        let names: Vec<String> = (0..7000).map(|i| format!("{i:04000}")).collect();
        let layout = Layout::new(names.iter().map(|name| tensor(name, Dtype::U8, &[1])), u64::MAX).unwrap();
        assert_eq!(layout.shards.len(), 2);
        assert!(layout.shards.iter().all(|s| s.header.len() as u64 <= MAX_WRITTEN_HEADER_BYTES));
        assert!(layout.shards[0].header.len() as u64 > MAX_WRITTEN_HEADER_BYTES - 500_000);
    }

    #[test]
    fn sizes_that_do_not_fit_are_errors() {
        let half = [1u64 << 60];
        let tensors = [tensor("a", Dtype::U8, &half); 20];
        assert_eq!(Layout::new(tensors, u64::MAX).unwrap_err().exit_code(), 2);
        let error = Layout::new([tensor("w", Dtype::F64, &[1 << 62])], 1).unwrap_err().to_string();
        assert!(error.starts_with("tensor \"w\": "), "{error}");
        assert!(Layout::new([tensor("w", Dtype::F4, &[1])], 1).is_err());
    }
}
