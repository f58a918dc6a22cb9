//! What a merge has read of its inputs, with hashes: so that a run that was interrupted can go on over inputs whose times or
//! inodes are others, once all that counts has been read again and found to be the same.
//!
//! - A range is hashed when it is loaded for the first time. Later passes over it are covered by the inputs' identity, which
//!   is looked at again before the journal says that work is done.
//! - The journal knows a read before, or together with, the work that depends on it.
//! - Probes do not count: they decide how soon a threshold is found, not which.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::identity::other;
use super::records::ReadDone;
use super::shard_hash::Digest;
use crate::error::{Error, Result};
use crate::plan::{Piece, Plan};
use crate::storage::InputFile;

/// Bytes that are read at once to be compared.
const COMPARE_BYTES: usize = 4 << 20;

/// Disjoint ranges: start and end; neighbours are joined.
type Ranges = BTreeMap<u64, u64>;

/// See the module's documentation.
pub(super) struct Reads {
    /// Per file, in the order of [`files`].
    known: Vec<Mutex<Ranges>>,
    /// Number of each checkpoint's first file.
    first: Vec<usize>,
    /// What the journal does not know yet.
    pending: Mutex<Vec<ReadDone>>,
}

/// All files of a plan's inputs, in the order in which they are numbered.
pub(super) fn files(plan: &Plan) -> impl Iterator<Item = &dyn InputFile> {
    plan.checkpoints.iter().flat_map(|c| &c.files).map(|f| &*f.file)
}

impl Reads {
    pub(super) fn new(plan: &Plan) -> Self {
        let mut count = 0;
        let first = plan.checkpoints.iter().map(|checkpoint| {
            count += checkpoint.files.len();
            count - checkpoint.files.len()
        });
        let first = first.collect();
        Self { known: (0..count).map(|_| Mutex::default()).collect(), first, pending: Mutex::default() }
    }

    /// Takes in `bytes`, which were loaded for `piece` from `offset` of its file.
    pub(super) fn add(&self, plan: &Plan, piece: Piece, offset: u64, bytes: &[u8]) {
        let checkpoint = piece.checkpoint as usize;
        let within = plan.checkpoints[checkpoint].tensors[piece.entry as usize].file;
        let file = self.first[checkpoint] + within as usize;
        let end = offset + bytes.len() as u64;
        if bytes.is_empty() || covers(&lock(&self.known[file]), offset, end) {
            return;
        }
        let length = u32::try_from(bytes.len()).expect("a window is shorter than 4 GiB");
        lock(&self.pending).push(ReadDone {
            file: file as u32,
            offset,
            bytes: length,
            digest: first_half(&blake3::hash(bytes)),
        });
        // Last: whoever finds it here relies on the journal being told.
        cover(&mut lock(&self.known[file]), offset, end);
    }

    /// What the journal does not know yet; it will.
    pub(super) fn take_pending(&self) -> Vec<ReadDone> {
        std::mem::take(&mut *lock(&self.pending))
    }

    /// Takes in what an earlier attempt read; `None` if that can be no read of this plan.
    pub(super) fn know(&self, read: &ReadDone) -> Option<()> {
        let end = read.offset.checked_add(read.bytes.into())?;
        cover(&mut lock(self.known.get(read.file as usize)?), read.offset, end);
        Some(())
    }

    /// Reads again what an earlier attempt read of `file`. Fails, naming it, if it is not the same.
    pub(super) fn compare(file: &dyn InputFile, read: &ReadDone, buffer: &mut Vec<u8>) -> Result<()> {
        let (mut at, mut left) = (read.offset, read.bytes as usize);
        let mut hasher = blake3::Hasher::new();
        while left > 0 {
            buffer.resize(left.min(COMPARE_BYTES), 0);
            file.read_at(buffer, at).map_err(Error::as_input)?;
            hasher.update(buffer);
            at += buffer.len() as u64;
            left -= buffer.len();
        }
        if first_half(&hasher.finalize()) == read.digest {
            return Ok(());
        }
        let from = read.offset;
        Err(other(file, &format!("bytes {from} to {at} are others")))
    }
}

pub(super) fn first_half(hash: &blake3::Hash) -> Digest {
    *hash.as_bytes().first_chunk().expect("a hash has 32 bytes")
}

fn covers(ranges: &Ranges, start: u64, end: u64) -> bool {
    ranges.range(..=start).next_back().is_some_and(|(_, &known)| known >= end)
}

fn cover(ranges: &mut Ranges, mut start: u64, mut end: u64) {
    // Whatever overlaps it or touches it becomes a part of it.
    while let Some((&other, &until)) = ranges.range(..=end).next_back().filter(|&(_, &until)| until >= start) {
        ranges.remove(&other);
        (start, end) = (start.min(other), end.max(until));
    }
    ranges.insert(start, end);
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_joined_and_known_when_all_of_them_are() {
        let mut ranges = Ranges::new();
        for (start, end) in [(10, 20), (40, 50), (20, 30), (0, 5)] {
            cover(&mut ranges, start, end);
        }
        assert_eq!(ranges.clone().into_iter().collect::<Vec<_>>(), [(0, 5), (10, 30), (40, 50)]);
        assert!(covers(&ranges, 12, 30) && covers(&ranges, 40, 41) && covers(&ranges, 0, 5));
        assert!(!covers(&ranges, 12, 31) && !covers(&ranges, 4, 6) && !covers(&ranges, 9, 12));
        cover(&mut ranges, 4, 45);
        assert_eq!(ranges.into_iter().collect::<Vec<_>>(), [(0, 50)]);
    }
}
