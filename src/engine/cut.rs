//! A threshold and a rule for ties, made into something that trims a tile.

use std::sync::{Condvar, Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::kernels::{self, Isa, Ties};
use crate::plan::TrimTies;
use crate::sketch::Threshold;

/// What survives of one task vector in one unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    /// Everything that is not zero (no trim).
    NonZero,
    /// Nothing.
    Nothing,
    /// Keys at or above this one.
    Keep {
        /// Smallest key kept, at least 1.
        min_key: u32,
    },
    /// Keys above the ties, and the first `quota` ties by position.
    Lowest {
        /// Tied keys.
        ties: Ties,
        /// How many of them survive.
        quota: u64,
    },
    /// Keys above the ties, and ties whose draw is below `accept`.
    Sample {
        /// Tied keys.
        ties: Ties,
        /// Share of them that survives, of 2^64.
        accept: u64,
        /// Keys the draws: depends on seed, model and tensor.
        draw_key: u64,
    },
}

impl Cut {
    /// Trims to the `keep` largest of `threshold`'s data by `rule`.
    pub(super) fn new(threshold: Threshold, keep: u64, rule: TrimTies) -> Self {
        let Threshold { ties, above, tied } = threshold;
        let quota = keep - above;
        match rule {
            _ if ties.high == 0 => Self::NonZero,
            TrimTies::Lowest if quota < tied => Self::Lowest { ties, quota },
            TrimTies::Sample if quota < tied => {
                let accept = ((u128::from(quota) << 64) / u128::from(tied)) as u64;
                Self::Sample { ties, accept, draw_key: 0 }
            }
            _ => Self::Keep { min_key: ties.low.max(1) },
        }
    }

    /// The same cut, with its draws keyed to one tensor of one model.
    pub(super) fn for_tensor(self, seed: u64, model: usize, tensor: &str) -> Self {
        let Self::Sample { ties, accept, .. } = self else { return self };
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        hasher.update(&(model as u64).to_le_bytes());
        hasher.update(tensor.as_bytes());
        let hash = hasher.finalize();
        let (first, _) = hash.as_bytes().split_first_chunk::<8>().expect("a hash has 32 bytes");
        Self::Sample { ties, accept, draw_key: u64::from_le_bytes(*first) }
    }

    /// The smallest key that survives, where that is all there is to it.
    pub(super) fn min_key(&self) -> Option<u32> {
        match *self {
            Self::NonZero => Some(1),
            Self::Keep { min_key } => Some(min_key),
            _ => None,
        }
    }

    /// Trims `tau`, whose first element has index `first` in its tensor; `seen` counts the ties before it, for rules
    /// that go by position. Returns the number of survivors that are not zero.
    pub(super) fn apply(&self, isa: Isa, tau: &mut [f32], first: u64, seen: &mut u64) -> u64 {
        match *self {
            Self::NonZero => kernels::trim(isa, tau, 1),
            Self::Nothing => {
                tau.fill(0.0);
                0
            }
            Self::Keep { min_key } => kernels::trim(isa, tau, min_key),
            Self::Sample { ties, accept, draw_key } => kernels::trim_sample(isa, tau, ties, draw_key, first, accept),
            Self::Lowest { ties, quota } => {
                let here = if *seen < quota { kernels::count_ties(isa, tau, ties) } else { 0 };
                let before = *seen;
                *seen += here;
                if before >= quota {
                    kernels::trim(isa, tau, ties.high.saturating_add(1))
                } else if *seen <= quota {
                    kernels::trim(isa, tau, ties.low.max(1))
                } else {
                    kernels::trim_lowest(isa, tau, ties, quota - before).0
                }
            }
        }
    }
}

/// Ties seen so far, per model.
pub(super) type TieCounts = Vec<u64>;

/// Hands each chunk the number of ties in all chunks before it, while chunks are worked on in parallel.
///
/// A worker counts its chunk's ties, then waits for its predecessors' counts. Chunks are handed out in order, so the
/// earliest unfinished chunk never waits.
pub(super) struct TieChain {
    state: Mutex<ChainState>,
    changed: Condvar,
}

struct ChainState {
    next: usize,
    counts: TieCounts,
    /// First chunk that failed: those after it wait in vain.
    failed: usize,
}

impl TieChain {
    pub(super) fn new(models: usize) -> Self {
        let state = ChainState { next: 0, counts: vec![0; models], failed: usize::MAX };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Waits for the counts before chunk `ordinal`, adds `own` and passes them on. Returns the counts before.
    pub(super) fn pass(&self, ordinal: usize, own: &TieCounts) -> Result<TieCounts> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.next != ordinal && state.failed > ordinal {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.next != ordinal {
            return Err(Error::failed("stopped because an earlier part of the work failed"));
        }
        let before = state.counts.clone();
        for (sum, count) in state.counts.iter_mut().zip(own) {
            *sum += count;
        }
        state.next += 1;
        self.changed.notify_all();
        Ok(before)
    }

    /// Work on chunk `ordinal`: unless it is completed, by failure or panic, the chunks after it do not wait for it.
    pub(super) fn pending(&self, ordinal: usize) -> Pending<'_> {
        Pending { chain: self, ordinal, complete: false }
    }

    fn abort(&self, ordinal: usize) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.failed = state.failed.min(ordinal);
        self.changed.notify_all();
    }
}

/// See [`TieChain::pending`].
pub(super) struct Pending<'a> {
    chain: &'a TieChain,
    ordinal: usize,
    complete: bool,
}

impl Pending<'_> {
    /// The chunk is done.
    pub(super) fn complete(&mut self) {
        self.complete = true;
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if !self.complete {
            self.chain.abort(self.ordinal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_arrive_in_order_whoever_comes_first() {
        let chain = TieChain::new(1);
        std::thread::scope(|scope| {
            let chain = &chain;
            let before =
                |ordinal: usize| scope.spawn(move || chain.pass(ordinal, &vec![10 + ordinal as u64]).unwrap()[0]);
            let got = [3, 1, 2, 0].map(before).map(|thread| thread.join().unwrap());
            assert_eq!(got, [33, 10, 21, 0]);
        });
    }

    #[test]
    fn a_failure_releases_the_chunks_after_it_and_no_others() {
        let chain = TieChain::new(1);
        std::thread::scope(|scope| {
            let later = scope.spawn(|| chain.pass(3, &vec![1]));
            let earlier = scope.spawn(|| chain.pass(1, &vec![1]));
            drop(chain.pending(2));
            assert!(later.join().unwrap().is_err());
            chain.pass(0, &vec![5]).unwrap();
            assert_eq!(earlier.join().unwrap().unwrap(), [5]);
        });
    }
}
