//! Work on chunks in parallel whose results are put together in the order of the chunks.
//!
//! A worker does its chunk, then waits until those before it have had their turn. Chunks are handed out in order, so the
//! earliest unfinished chunk never waits, and results that wait are as many as there are workers.

use std::sync::{Condvar, Mutex, PoisonError};

use crate::error::{Error, Result};

/// What is put together, and whose turn it is.
pub(super) struct Turns<S> {
    state: Mutex<State<S>>,
    changed: Condvar,
}

struct State<S> {
    next: usize,
    shared: S,
    /// First chunk that failed: those after it wait in vain.
    failed: usize,
}

/// Something that chunks wait for in order.
pub(super) trait Ordered: Sync {
    /// Says that chunk `ordinal` failed, so that the chunks after it do not wait for it.
    fn abort(&self, ordinal: usize);
}

/// Work on a chunk: unless it is completed, by failure or panic, the chunks after it do not wait for it.
pub(super) struct Pending<'a> {
    turns: &'a dyn Ordered,
    ordinal: usize,
    complete: bool,
}

impl<'a> Pending<'a> {
    /// Work on chunk `ordinal`.
    pub(super) fn new(turns: &'a dyn Ordered, ordinal: usize) -> Self {
        Self { turns, ordinal, complete: false }
    }

    /// The chunk is done.
    pub(super) fn complete(&mut self) {
        self.complete = true;
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if !self.complete {
            self.turns.abort(self.ordinal);
        }
    }
}

impl<S> Turns<S> {
    pub(super) fn new(shared: S) -> Self {
        Self { state: Mutex::new(State { next: 0, shared, failed: usize::MAX }), changed: Condvar::new() }
    }

    /// Waits for the turn of chunk `ordinal`, and gives `work` what is shared.
    pub(super) fn take<R>(&self, ordinal: usize, work: impl FnOnce(&mut S) -> R) -> Result<R> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.next != ordinal && state.failed > ordinal {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.next != ordinal {
            return Err(Error::failed("stopped because an earlier part of the work failed"));
        }
        let result = work(&mut state.shared);
        state.next += 1;
        self.changed.notify_all();
        Ok(result)
    }

    /// What was put together.
    pub(super) fn into_inner(self) -> S {
        self.state.into_inner().unwrap_or_else(PoisonError::into_inner).shared
    }
}

impl<S: Send> Ordered for Turns<S> {
    fn abort(&self, ordinal: usize) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.failed = state.failed.min(ordinal);
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::pool;

    #[test]
    fn a_panic_reaches_the_caller_instead_of_letting_the_others_wait() {
        for threads in [1, 2, 5] {
            for in_its_turn in [false, true] {
                let turns = Turns::new(0);
                let run = || {
                    pool::run(
                        &mut vec![(); threads],
                        0..50,
                        2,
                        |_| (),
                        |(), ordinal, item| {
                            let mut pending = Pending::new(&turns, ordinal);
                            assert!(in_its_turn || item != 20, "a mistake");
                            turns.take(ordinal, |sum| {
                                assert!(!in_its_turn || item != 20, "a mistake");
                                *sum += item;
                            })?;
                            pending.complete();
                            Ok(())
                        },
                    )
                };
                let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).unwrap_err();
                assert!(caught.downcast_ref::<&str>().is_some_and(|text| text.contains("a mistake")));
            }
        }
    }
}
