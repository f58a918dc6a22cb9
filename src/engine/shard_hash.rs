//! The BLAKE3 hash of a file whose bytes are written in any order, by any thread.
//!
//! BLAKE3 is a tree over the file: a run of bytes that is a whole subtree can be hashed on its own, where it is
//! written. Runs of [`GROUP_BYTES`] at multiples of it are such subtrees. What writes leave ragged (where two tensors
//! meet inside a group) is read back once, when the file is complete. The result is the plain hash of the file, as
//! `b3sum` prints it.

use std::sync::OnceLock;

use blake3::hazmat::{
    ChainingValue, HasherExt as _, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root,
};

use crate::error::Result;

/// Length of a subtree that is hashed on its own: a power of two.
pub(super) const GROUP_BYTES: u64 = 1 << 16;

/// The hash of one file while it is written.
pub(super) struct ShardHash {
    bytes: u64,
    groups: Vec<OnceLock<ChainingValue>>,
}

impl ShardHash {
    /// For a file of `bytes` bytes.
    pub(super) fn new(bytes: u64) -> Self {
        let groups = (0..bytes.div_ceil(GROUP_BYTES)).map(|_| OnceLock::new()).collect();
        Self { bytes, groups }
    }

    /// Takes in `data`, written at `offset`.
    pub(super) fn add(&self, offset: u64, data: &[u8]) {
        let end = offset + data.len() as u64;
        let mut group = offset.div_ceil(GROUP_BYTES);
        loop {
            let begin = group * GROUP_BYTES;
            let until = (begin + GROUP_BYTES).min(self.bytes);
            if begin >= until || until > end {
                return;
            }
            self.set(group, &data[(begin - offset) as usize..(until - offset) as usize]);
            group += 1;
        }
    }

    /// The hash in hexadecimal. `read` fills a buffer from an offset of the finished file.
    pub(super) fn finish(&self, mut read: impl FnMut(&mut [u8], u64) -> Result<()>) -> Result<String> {
        let mut buffer = vec![0u8; GROUP_BYTES.min(self.bytes) as usize];
        if self.bytes <= GROUP_BYTES {
            read(&mut buffer, 0)?;
            return Ok(blake3::hash(&buffer).to_hex().to_string());
        }
        for (group, value) in self.groups.iter().enumerate() {
            if value.get().is_none() {
                let begin = group as u64 * GROUP_BYTES;
                let part = &mut buffer[..GROUP_BYTES.min(self.bytes - begin) as usize];
                read(part, begin)?;
                self.set(group as u64, part);
            }
        }
        let (left, right) = self.split(0, self.bytes);
        Ok(merge_subtrees_root(&left, &right, Mode::Hash).to_hex().to_string())
    }

    fn set(&self, group: u64, data: &[u8]) {
        // Nothing is written twice; if it were, the first value would stand and verification would tell.
        let _ = self.groups[group as usize].get_or_init(|| {
            let mut hasher = blake3::Hasher::new();
            hasher.set_input_offset(group * GROUP_BYTES);
            hasher.update(data).finalize_non_root()
        });
    }

    /// Both halves of the subtree over `bytes` bytes from group `first`.
    fn split(&self, first: u64, bytes: u64) -> (ChainingValue, ChainingValue) {
        let left = left_subtree_len(bytes);
        (self.subtree(first, left), self.subtree(first + left / GROUP_BYTES, bytes - left))
    }

    fn subtree(&self, first: u64, bytes: u64) -> ChainingValue {
        if bytes <= GROUP_BYTES {
            return *self.groups[first as usize].get().expect("every group is set before the tree is built");
        }
        let (left, right) = self.split(first, bytes);
        merge_subtrees_non_root(&left, &right, Mode::Hash)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_order_of_any_pieces_gives_the_plain_hash(
            bytes in prop_oneof![0usize..3000, 60_000usize..70_000, 100_000usize..700_000],
            cuts in prop::collection::vec(0.0f64..1.0, 0..12),
            seed in any::<u64>(),
        ) {
            let data: Vec<u8> = (0..bytes).map(|i| (i as u64).wrapping_mul(seed | 1).to_le_bytes()[3]).collect();
            let mut ends: Vec<usize> = cuts.iter().map(|c| (c * bytes as f64) as usize).chain([0, bytes]).collect();
            ends.sort_unstable();
            let mut pieces: Vec<(usize, usize)> = ends.windows(2).map(|w| (w[0], w[1])).collect();
            pieces.sort_by_key(|p| (p.0 as u64).wrapping_mul(seed | 1));
            let hash = ShardHash::new(bytes as u64);
            for (a, b) in pieces {
                hash.add(a as u64, &data[a..b]);
            }
            let read = |buffer: &mut [u8], offset: u64| {
                buffer.copy_from_slice(&data[offset as usize..offset as usize + buffer.len()]);
                Ok(())
            };
            prop_assert_eq!(hash.finish(read).unwrap(), blake3::hash(&data).to_hex().to_string());
        }
    }
}
