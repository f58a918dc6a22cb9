//! The BLAKE3 hash of a file whose bytes are written in any order, by any thread.
//!
//! BLAKE3 is a tree over the file: a run of bytes that is a whole subtree can be hashed on its own, where it is
//! written, and two siblings become their parent as soon as both are there. What is kept is therefore one value per
//! gap, not per byte. What writes leave ragged (where two tensors meet inside a leaf of [`LEAF_BYTES`]) is read back
//! once, when the file is complete. The result is the plain hash of the file, as `b3sum` prints it.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use blake3::hazmat::{
    ChainingValue, HasherExt as _, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root,
};

use crate::error::Result;
use crate::limits::HASH_LEAF_BYTES as LEAF_BYTES;

/// Digest of a written range: tells whether the same bytes are still there.
pub(super) type Digest = [u8; 16];

/// A subtree: where it starts, how long it is, and its value.
pub(super) type Node = (u64, u64, ChainingValue);

/// The hash of one file while it is written.
pub(super) struct ShardHash {
    bytes: u64,
    /// Disjoint subtrees by start: length and value.
    nodes: Mutex<BTreeMap<u64, (u64, ChainingValue)>>,
}

impl ShardHash {
    /// For a file of `bytes` bytes.
    pub(super) fn new(bytes: u64) -> Self {
        Self { bytes, nodes: Mutex::default() }
    }

    /// Takes in `data`, found at `offset`, if `digest` is what [`Self::subtrees`] gave when it was written.
    pub(super) fn add_if(&self, offset: u64, data: &[u8], digest: &Digest) -> bool {
        let (nodes, found) = self.subtrees(offset, data);
        if found == *digest {
            self.insert(nodes);
        }
        found == *digest
    }

    /// The whole subtrees inside `data`, written at `offset`, for [`Self::insert`]; and its digest, a function of place and bytes.
    pub(super) fn subtrees(&self, offset: u64, data: &[u8]) -> (Vec<Node>, Digest) {
        let end = offset + data.len() as u64;
        let (mut nodes, mut digest) = (Vec::new(), blake3::Hasher::new());
        let mut start = offset;
        while start < end {
            let length = self.subtree_at(start, end);
            let until = match length {
                Some(length) => start + length,
                None => end.min((start / LEAF_BYTES + 1) * LEAF_BYTES),
            };
            let part = &data[(start - offset) as usize..(until - offset) as usize];
            match length {
                Some(length) => {
                    let value = value_of(start, part);
                    digest.update(&value);
                    nodes.push((start, length, value));
                }
                None => drop(digest.update(part)),
            }
            start = until;
        }
        let hash = digest.finalize();
        (nodes, *hash.as_bytes().first_chunk().expect("a hash has 32 bytes"))
    }

    /// Length of the longest subtree (but the root) that starts at `start` and does not go beyond `end`.
    fn subtree_at(&self, start: u64, end: u64) -> Option<u64> {
        if !start.is_multiple_of(LEAF_BYTES) || self.bytes <= LEAF_BYTES {
            return None;
        }
        if end - start < LEAF_BYTES {
            return (end == self.bytes).then_some(end - start);
        }
        let room = (end - start).min((self.bytes - 1).max(1));
        let aligned = if start == 0 { u64::MAX } else { 1 << start.trailing_zeros() };
        Some(aligned.min(1 << room.ilog2()))
    }

    /// Takes in subtrees.
    pub(super) fn insert(&self, nodes: Vec<Node>) {
        let mut known = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        for (mut start, mut length, mut value) in nodes {
            // A parent is made of two equal halves; the root is not made here, and the ragged end has no sibling.
            while length.is_power_of_two() && length >= LEAF_BYTES && 2 * length < self.bytes {
                let sibling = start ^ length;
                if known.get(&sibling).is_none_or(|&(other, _)| other != length) {
                    break;
                }
                let (_, other) = known.remove(&sibling).expect("it was there a moment ago");
                let (left, right) = if sibling < start { (other, value) } else { (value, other) };
                value = merge_subtrees_non_root(&left, &right, Mode::Hash);
                start = start.min(sibling);
                length *= 2;
            }
            known.insert(start, (length, value));
        }
    }

    /// The subtrees that were taken in, joined as far as they could be.
    pub(super) fn nodes(self) -> Vec<Node> {
        let nodes = self.nodes.into_inner().unwrap_or_else(PoisonError::into_inner);
        nodes.into_iter().map(|(start, (length, value))| (start, length, value)).collect()
    }

    /// The hash in hexadecimal. `read` fills a buffer from an offset of the finished file.
    pub(super) fn finish(&self, read: impl FnMut(&mut [u8], u64) -> Result<()>) -> Result<String> {
        let mut tree = Tree {
            nodes: std::mem::take(&mut *self.nodes.lock().unwrap_or_else(PoisonError::into_inner)),
            buffer: vec![0u8; LEAF_BYTES.min(self.bytes) as usize],
            read,
        };
        if self.bytes <= LEAF_BYTES {
            (tree.read)(&mut tree.buffer, 0)?;
            return Ok(blake3::hash(&tree.buffer).to_hex().to_string());
        }
        let (left, right) = tree.halves(0, self.bytes)?;
        Ok(merge_subtrees_root(&left, &right, Mode::Hash).to_hex().to_string())
    }
}

/// The tree of a complete file; subtrees that are not known are read.
struct Tree<R> {
    nodes: BTreeMap<u64, (u64, ChainingValue)>,
    buffer: Vec<u8>,
    read: R,
}

impl<R: FnMut(&mut [u8], u64) -> Result<()>> Tree<R> {
    fn halves(&mut self, start: u64, bytes: u64) -> Result<(ChainingValue, ChainingValue)> {
        let left = left_subtree_len(bytes);
        Ok((self.value(start, left)?, self.value(start + left, bytes - left)?))
    }

    fn value(&mut self, start: u64, bytes: u64) -> Result<ChainingValue> {
        if let Some((_, value)) = self.nodes.get(&start).filter(|(length, _)| *length == bytes) {
            return Ok(*value);
        }
        if bytes <= LEAF_BYTES {
            let part = &mut self.buffer[..bytes as usize];
            (self.read)(part, start)?;
            return Ok(value_of(start, part));
        }
        let (left, right) = self.halves(start, bytes)?;
        Ok(merge_subtrees_non_root(&left, &right, Mode::Hash))
    }
}

/// The value of the subtree over `data`, which starts at `start`.
fn value_of(start: u64, data: &[u8]) -> ChainingValue {
    let mut hasher = blake3::Hasher::new();
    hasher.set_input_offset(start);
    hasher.update(data).finalize_non_root()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn content(bytes: usize, seed: u64) -> Vec<u8> {
        (0..bytes).map(|i| (i as u64).wrapping_mul(seed | 1).to_le_bytes()[3]).collect()
    }

    proptest! {
        #[test]
        fn any_order_of_any_pieces_gives_the_plain_hash(
            bytes in prop_oneof![0usize..3000, 14_000usize..18_000, 60_000usize..70_000, 100_000usize..700_000,
                Just(1 << 15), Just(1 << 18)],
            cuts in prop::collection::vec(0.0f64..1.0, 0..12),
            round in any::<bool>(),
            seed in any::<u64>(),
        ) {
            let data = content(bytes, seed);
            let step = if round { 1 << 13 } else { 1 };
            let mut ends: Vec<usize> =
                cuts.iter().map(|c| (c * bytes as f64) as usize / step * step).chain([0, bytes]).collect();
            ends.sort_unstable();
            let mut pieces: Vec<(usize, usize)> = ends.windows(2).map(|w| (w[0], w[1])).collect();
            pieces.sort_by_key(|p| (p.0 as u64).wrapping_mul(seed | 1));
            let (hash, again) = (ShardHash::new(bytes as u64), ShardHash::new(bytes as u64));
            for (a, b) in pieces {
                let (nodes, digest) = hash.subtrees(a as u64, &data[a..b]);
                hash.insert(nodes);
                prop_assert!(again.add_if(a as u64, &data[a..b], &digest));
                if a < b {
                    let mut damaged = data[a..b].to_vec();
                    damaged[(seed % (b - a) as u64) as usize] ^= 1;
                    prop_assert!(!again.add_if(a as u64, &damaged, &digest));
                }
            }
            let read = |buffer: &mut [u8], offset: u64| {
                buffer.copy_from_slice(&data[offset as usize..offset as usize + buffer.len()]);
                Ok(())
            };
            let plain = blake3::hash(&data).to_hex().to_string();
            prop_assert_eq!(hash.finish(read).unwrap(), &*plain);
            prop_assert_eq!(again.finish(read).unwrap(), plain);
        }
    }

    #[test]
    fn short_writes_in_order_are_kept_as_few_values_and_read_nothing_back() {
        let data = content(3 << 20, 77);
        let hash = ShardHash::new(data.len() as u64);
        for (i, part) in data.chunks(1 << 14).enumerate() {
            hash.insert(hash.subtrees((i << 14) as u64, part).0);
            assert!(hash.nodes.lock().unwrap().len() <= 20);
        }
        let found = hash.finish(|_, offset| panic!("read at {offset}")).unwrap();
        assert_eq!(found, blake3::hash(&data).to_hex().to_string());
    }
}
