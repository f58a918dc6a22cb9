//! A loop over items on several threads: items are handed out in order, each worker keeps its own buffers.
//!
//! - The channel is bounded, so handing out waits for the workers and nothing piles up.
//! - If items fail, the error of the first failing item (in order) is returned: the same one for any thread count.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::{Error, Result};

/// Runs `work` on every item, one thread per worker. `ahead` is told of each item `lookahead` items before it is handed
/// out, so that reads can be announced.
pub(super) fn run<T: Send, W: Send>(
    workers: &mut [W],
    items: impl Iterator<Item = T>,
    lookahead: usize,
    mut ahead: impl FnMut(&T),
    work: impl Fn(&mut W, usize, T) -> Result<()> + Sync,
) -> Result<()> {
    let weigh = |item: &T| {
        ahead(item);
        1
    };
    run_weighed(workers, items, lookahead as u64, weigh, work)
}

/// The same where items weigh what `ahead` says of them: it is told of as many as weigh `lookahead`, and of one more.
pub(super) fn run_weighed<T: Send, W: Send>(
    workers: &mut [W],
    items: impl Iterator<Item = T>,
    lookahead: u64,
    mut ahead: impl FnMut(&T) -> u64,
    work: impl Fn(&mut W, usize, T) -> Result<()> + Sync,
) -> Result<()> {
    let first_failed = AtomicUsize::new(usize::MAX);
    let (sender, receiver) = crossbeam_channel::bounded::<(usize, T)>(workers.len());
    let consume = |worker: &mut W, receiver: crossbeam_channel::Receiver<(usize, T)>| {
        let mut failure: Option<(usize, Error)> = None;
        for (ordinal, item) in receiver {
            // Earlier items still run after a failure: one of them may be the first to fail.
            if ordinal > first_failed.load(Ordering::Relaxed) {
                continue;
            }
            if let Err(error) = work(worker, ordinal, item) {
                first_failed.fetch_min(ordinal, Ordering::Relaxed);
                if failure.as_ref().is_none_or(|(first, _)| ordinal < *first) {
                    failure = Some((ordinal, error));
                }
            }
        }
        failure
    };
    let consume = &consume;
    std::thread::scope(|scope| {
        let mut handles = Vec::with_capacity(workers.len());
        for worker in workers {
            let receiver = receiver.clone();
            match std::thread::Builder::new().spawn_scoped(scope, move || consume(worker, receiver)) {
                Ok(handle) => handles.push(handle),
                // Fewer threads do the same.
                Err(_) if !handles.is_empty() => break,
                Err(error) => return Err(no_thread(&error)),
            }
        }
        drop(receiver);
        let (mut queue, mut waiting) = (VecDeque::new(), 0u64);
        let mut items = items.enumerate();
        loop {
            while queue.is_empty() || waiting <= lookahead {
                let Some(item) = items.next() else { break };
                let weight = ahead(&item.1);
                waiting += weight;
                queue.push_back((item, weight));
            }
            let Some((item, weight)) = queue.pop_front() else { break };
            waiting -= weight;
            // Sending fails only if every worker has panicked, which joining reports.
            if first_failed.load(Ordering::Relaxed) != usize::MAX || sender.send(item).is_err() {
                break;
            }
        }
        drop(sender);
        let mut failures = Vec::new();
        for handle in handles {
            match handle.join() {
                Ok(failure) => failures.extend(failure),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        failures.into_iter().min_by_key(|(ordinal, _)| *ordinal).map_or(Ok(()), |(_, error)| Err(error))
    })
}

/// The system starts no thread.
pub(super) fn no_thread(error: &std::io::Error) -> Error {
    Error::failed(format!("cannot start a thread: {error}"))
        .help("use fewer --threads, or raise the limits of processes and memory (ulimit -u, ulimit -v)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_done_once_and_announced_before() {
        for threads in [1, 2, 7] {
            let mut sums = vec![0u64; threads];
            let mut announced = 0u64;
            run(
                &mut sums,
                1..=1000u64,
                5,
                |x| announced += x,
                |sum, _, x| {
                    *sum += x;
                    Ok(())
                },
            )
            .unwrap();
            assert_eq!((sums.iter().sum::<u64>(), announced), (500_500, 500_500));
        }
    }

    #[test]
    fn as_much_is_announced_as_weighs_the_lookahead() {
        let (mut announced, done) = (0u64, std::sync::atomic::AtomicU64::new(0));
        let weigh = |x: &u64| {
            // The worker has one, one is handed to it, and the rest waits.
            let ahead = announced.saturating_sub(done.load(Ordering::SeqCst));
            assert!(ahead <= 25 + 3 * 10, "{ahead}");
            announced += x;
            *x
        };
        run_weighed(&mut [()], [10u64; 100].into_iter(), 25, weigh, |(), _, x| {
            done.fetch_add(x, Ordering::SeqCst);
            Ok(())
        })
        .unwrap();
        assert_eq!((announced, done.into_inner()), (1000, 1000));
    }

    #[test]
    fn the_first_failing_item_is_reported_whatever_the_thread_count() {
        for threads in [1, 2, 7] {
            for _ in 0..20 {
                let error = run(
                    &mut vec![(); threads],
                    0..500usize,
                    3,
                    |_| (),
                    |(), _, x| {
                        if x % 100 == 42 { Err(Error::failed(format!("item {x}"))) } else { Ok(()) }
                    },
                )
                .unwrap_err();
                assert_eq!(error.to_string(), "item 42");
            }
        }
    }

    #[test]
    fn no_items_is_fine() {
        run(&mut [()], std::iter::empty::<()>(), 3, |()| (), |(), _, ()| Ok(())).unwrap();
    }
}
