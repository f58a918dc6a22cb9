//! The BLAKE3 hash of every tensor's bytes, gathered while they are written in any order, by any thread.
//!
//! Writes begin and end at round places of the file, which are odd places of the tensor: what of a write is no whole leaf
//! of the tensor's own tree waits here for the write beside it. That is at most two leaves for each gap between writes,
//! and nothing of a tensor that is complete but its hash. What cannot be told so is read once more, when the file is
//! complete.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::shard_hash::ShardHash;
use crate::error::{Error, Result};
use crate::limits::HASH_LEAF_BYTES as LEAF_BYTES;

/// A plain BLAKE3 hash.
pub(super) type Hash = [u8; 32];

/// Bytes read at once.
const READ_BYTES: u64 = 1 << 20;

/// The hashes of all tensors of an output.
pub(super) struct TensorHashes {
    /// Tensors that are written to and not complete.
    open: Mutex<HashMap<u32, Open>>,
    /// Tensors that are not gathered any more: they are read.
    lost: Mutex<HashSet<u32>>,
    done: Mutex<Vec<Option<Hash>>>,
}

/// A tensor while it is written.
struct Open {
    tree: ShardHash,
    /// Bytes still to come.
    missing: u64,
    /// Parts of leaves, by offset; disjoint, and joined where they touch.
    parts: BTreeMap<u64, Vec<u8>>,
}

impl TensorHashes {
    /// For so many tensors.
    pub(super) fn new(tensors: usize) -> Self {
        Self { open: Mutex::default(), lost: Mutex::default(), done: Mutex::new(vec![None; tensors]) }
    }

    /// Takes in `data`, which is at `offset` of the `bytes` bytes of tensor `tensor`. Every byte comes once.
    pub(super) fn add(&self, tensor: u32, bytes: u64, offset: u64, data: &[u8]) {
        if data.len() as u64 == bytes {
            return self.set(tensor, *blake3::hash(data).as_bytes());
        }
        // Hashed before the lock is taken: others go on meanwhile.
        let nodes = ShardHash::new(bytes).whole_subtrees(offset, data);
        if lock(&self.lost).contains(&tensor) {
            return;
        }
        let mut open = lock(&self.open);
        let state = open.entry(tensor).or_insert_with(|| Open {
            tree: ShardHash::new(bytes),
            missing: bytes,
            parts: BTreeMap::new(),
        });
        let mut from = offset;
        for &(start, length, _) in &nodes {
            state.add_part(from, &data[(from - offset) as usize..(start - offset) as usize], bytes);
            from = start + length;
        }
        state.add_part(from, &data[(from - offset) as usize..], bytes);
        state.tree.insert(nodes);
        state.missing = state.missing.saturating_sub(data.len() as u64);
        if state.missing == 0 {
            let state = open.remove(&tensor).expect("it was there a moment ago");
            drop(open);
            if let Some(hash) = state.finish() {
                self.set(tensor, hash);
            }
        }
    }

    /// Gives up on a tensor of which some bytes may come again.
    pub(super) fn lose(&self, tensor: u32) {
        lock(&self.lost).insert(tensor);
        lock(&self.open).remove(&tensor);
        lock(&self.done)[tensor as usize] = None;
    }

    /// The hash of a tensor that is complete.
    pub(super) fn get(&self, tensor: u32) -> Hash {
        lock(&self.done)[tensor as usize].unwrap_or_default()
    }

    /// Says what the hash of a tensor is.
    pub(super) fn set(&self, tensor: u32, hash: Hash) {
        lock(&self.done)[tensor as usize] = Some(hash);
    }

    /// Reads a tensor of `bytes` bytes whose hash is not known, in pieces: `read` fills a buffer from an offset of it.
    pub(super) fn complete(
        &self,
        tensor: u32,
        bytes: u64,
        mut read: impl FnMut(&mut [u8], u64) -> Result<()>,
    ) -> Result<()> {
        if lock(&self.done)[tensor as usize].is_some() {
            return Ok(());
        }
        let mut buffer = vec![0; bytes.min(READ_BYTES) as usize];
        let (mut hasher, mut at) = (blake3::Hasher::new(), 0);
        while at < bytes {
            let part = &mut buffer[..(bytes - at).min(READ_BYTES) as usize];
            read(part, at)?;
            hasher.update(part);
            at += part.len() as u64;
        }
        self.set(tensor, *hasher.finalize().as_bytes());
        Ok(())
    }

    /// The hashes of all tensors; zeros where one was never written nor read.
    pub(super) fn finish(self) -> Vec<Hash> {
        let done = self.done.into_inner().unwrap_or_else(PoisonError::into_inner);
        done.into_iter().map(Option::unwrap_or_default).collect()
    }
}

impl Open {
    /// Takes in bytes that are no whole leaf, at most two leaves' worth; makes leaves of those that became whole.
    fn add_part(&mut self, offset: u64, data: &[u8], bytes: u64) {
        let mut at = 0;
        while at < data.len() {
            let start = offset + at as u64;
            let leaf = start / LEAF_BYTES * LEAF_BYTES;
            let end = (leaf + LEAF_BYTES).min(bytes);
            let take = ((end - start) as usize).min(data.len() - at);
            self.join(start, &data[at..at + take]);
            at += take;
            if bytes > LEAF_BYTES && self.parts.get(&leaf).is_some_and(|part| part.len() as u64 == end - leaf) {
                let part = self.parts.remove(&leaf).expect("it was there a moment ago");
                self.tree.add(leaf, &part);
            }
        }
    }

    /// Puts bytes of one leaf beside those that are there.
    fn join(&mut self, start: u64, data: &[u8]) {
        let leaf = start / LEAF_BYTES;
        let before = self.parts.range_mut(..start).next_back();
        let mut first = start;
        match before.filter(|(at, part)| **at / LEAF_BYTES == leaf && **at + part.len() as u64 == start) {
            Some((at, part)) => {
                first = *at;
                part.extend_from_slice(data);
            }
            None => drop(self.parts.insert(start, data.to_vec())),
        }
        let end = start + data.len() as u64;
        let after = if end / LEAF_BYTES == leaf { self.parts.remove(&end) } else { None };
        if let Some(after) = after {
            self.parts.get_mut(&first).expect("it was put there").extend(after);
        }
    }

    /// The hash of a complete tensor.
    fn finish(self) -> Option<Hash> {
        let parts = self.parts;
        let hash = self.tree.finish(|buffer, offset| match parts.get(&offset) {
            Some(part) if part.len() == buffer.len() => {
                buffer.copy_from_slice(part);
                Ok(())
            }
            _ => Err(Error::failed("a part of the tensor was never written")),
        });
        hash.ok().and_then(|hex| blake3::Hash::from_hex(hex).ok()).map(|hash| *hash.as_bytes())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_order_of_any_pieces_gives_the_plain_hash(
            bytes in prop_oneof![1usize..3000, 14_000usize..18_000, 60_000usize..70_000, 100_000usize..300_000,
                Just(1 << 14), Just(1 << 15), Just(1 << 17)],
            cuts in prop::collection::vec(0.0f64..1.0, 0..40),
            seed in any::<u64>(),
        ) {
            let data: Vec<u8> = (0..bytes).map(|i| (i as u64).wrapping_mul(seed | 1).to_le_bytes()[3]).collect();
            let mut ends: Vec<usize> = cuts.iter().map(|c| (c * bytes as f64) as usize).chain([0, bytes]).collect();
            ends.sort_unstable();
            ends.dedup();
            let mut pieces: Vec<(usize, usize)> = ends.windows(2).map(|w| (w[0], w[1])).collect();
            pieces.sort_by_key(|p| (p.0 as u64).wrapping_mul(seed | 1));
            let hashes = TensorHashes::new(3);
            for (a, b) in pieces {
                hashes.add(1, bytes as u64, a as u64, &data[a..b]);
            }
            prop_assert!(lock(&hashes.open).is_empty(), "nothing is left of a complete tensor");
            let whole = *blake3::hash(&data).as_bytes();
            prop_assert_eq!(lock(&hashes.done)[1], Some(whole));
            // What may come twice is read instead.
            hashes.lose(1);
            hashes.add(1, bytes as u64 + 1, 0, &data);
            hashes.complete(2, 0, |_, _| panic!("nothing to read")).unwrap();
            let read = |buffer: &mut [u8], at: u64| {
                buffer.copy_from_slice(&data[at as usize..at as usize + buffer.len()]);
                Ok(())
            };
            hashes.complete(1, bytes as u64, read).unwrap();
            prop_assert_eq!(hashes.finish(), vec![[0; 32], whole, *blake3::hash(b"").as_bytes()]);
        }
    }

    #[test]
    fn what_waits_is_bounded_by_the_gaps() {
        let data = vec![5u8; 4 << 20];
        let hashes = TensorHashes::new(1);
        // Pieces end at odd places, in order: one part waits at a time.
        let step = (1 << 18) + 40;
        for (i, part) in data.chunks(step).enumerate() {
            hashes.add(0, data.len() as u64, (i * step) as u64, part);
            let waiting: usize = lock(&hashes.open).values().flat_map(|o| o.parts.values()).map(Vec::len).sum();
            assert!(waiting <= LEAF_BYTES as usize, "{waiting}");
        }
        assert_eq!(hashes.finish()[0], *blake3::hash(&data).as_bytes());
    }
}
