//! Ranges that are fetched before they are read, several at a time.
//!
//! - What is announced is fetched once and held until it has been read, as often as it was announced, within a number of bytes. Ranges that touch become
//!   one, up to the length of a request: readers ask for little at a time, networks like it large.
//! - A reader takes what is there, waits for what is on its way, and fetches by itself what nobody began: it never waits
//!   for room. So whatever is announced, too much or never read, costs time and no deadlock.
//! - A failed range is reported to the reader that wants it, and to no other.
//!
//! Knows numbers of sources and places in them; how a range is fetched is the source's business.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::mmap::{Buffer, allocate};
use crate::error::{Error, Result};

/// Ranges on their way at a time, over all sources.
const FETCHERS: usize = 16;
/// A thread that fetches needs little.
const STACK_BYTES: usize = 1 << 19;
/// Bounds of the length of a request; in between, each source gets several within the bytes allowed.
const LONGEST: u64 = 8 << 20;
const SHORTEST: u64 = 64 << 10;
/// Requests that each source is to have on its way.
const PER_SOURCE: u64 = 4;
/// After so long without another announcement a short range is fetched as it is.
const PATIENCE: Duration = Duration::from_millis(20);
/// How often a reader that waits looks again whether it should rather do it by itself.
const AGAIN: Duration = Duration::from_millis(20);

/// Length of a request where `bytes` bytes are allowed for ranges of `sources` sources.
pub fn request_bytes(bytes: u64, sources: usize) -> u64 {
    (bytes / PER_SOURCE / (sources as u64).max(1)).clamp(SHORTEST, LONGEST)
}

/// What ranges are fetched from.
pub(super) trait Source: Send + Sync {
    /// Fills `buffer` from `offset`.
    fn fetch(&self, buffer: &mut [u8], offset: u64) -> Result<()>;
}

/// Where a range begins: number of its source, and offset.
type Place = (u64, u64);

/// See the module's documentation.
#[derive(Default)]
pub(super) struct Ahead {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// A range arrived or failed.
    arrived: Condvar,
    /// There is something to fetch, or room for it.
    wanted: Condvar,
}

#[derive(Default)]
struct State {
    /// Bytes that may be held.
    room: u64,
    /// Length of a request.
    length: u64,
    /// Bytes that are there or on their way.
    held: u64,
    ranges: BTreeMap<Place, Range>,
    /// Those that wait to be fetched, in the order of their announcement.
    waiting: VecDeque<Place>,
    threads: usize,
    closed: bool,
}

struct Range {
    source: Arc<dyn Source>,
    bytes: u64,
    progress: Progress,
    /// Bytes of it that are to be read, counted as often as they were announced, and those that were.
    announced: u64,
    read: u64,
}

enum Progress {
    /// Nobody began. `urgent` if somebody wants it now.
    Waiting {
        since: Instant,
        urgent: bool,
    },
    Coming,
    Here(Arc<Buffer>),
    Failed(Error),
}

/// What a reader finds at a place.
enum Found {
    Here {
        data: Arc<Buffer>,
        place: Place,
    },
    Failed(Error),
    /// To be waited for.
    Later,
    /// The reader's own business, for so many bytes at most.
    Nothing(u64),
}

impl Ahead {
    /// Allows `bytes` for ranges of `sources` sources.
    pub(super) fn allow(&self, bytes: u64, sources: usize) {
        let mut state = self.shared.lock();
        state.room = bytes;
        state.length = request_bytes(bytes, sources);
        self.shared.wanted.notify_all();
    }

    /// Says that `bytes` bytes of source `number` from `offset` will be read, once more than was said before.
    pub(super) fn announce(&self, (number, offset): Place, bytes: u64, source: &Arc<dyn Source>) {
        let mut state = self.shared.lock();
        if state.room == 0 {
            return;
        }
        state.announce((number, offset), bytes, source);
        let missing = FETCHERS.min(state.waiting.len()).saturating_sub(state.threads);
        state.threads += missing;
        drop(state);
        for _ in 0..missing {
            let shared = Arc::clone(&self.shared);
            let builder = std::thread::Builder::new().name("range".into()).stack_size(STACK_BYTES);
            if builder.spawn(move || shared.fetch_all()).is_err() {
                // Readers manage alone.
                self.shared.lock().threads -= 1;
            }
        }
        self.shared.wanted.notify_one();
    }

    /// Fills `buffer` from `offset` of source `number`.
    pub(super) fn read(&self, (number, offset): Place, buffer: &mut [u8], source: &Arc<dyn Source>) -> Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            let place = (number, offset + done as u64);
            let wanted = buffer.len() - done;
            match self.shared.find(place, wanted as u64) {
                Found::Here { data, place: start } => {
                    let from = (place.1 - start.1) as usize;
                    let count = wanted.min(data.len() - from);
                    buffer[done..done + count].copy_from_slice(&data[from..from + count]);
                    done += count;
                    self.shared.was_read(start, count as u64);
                }
                Found::Nothing(bytes) => {
                    let count = wanted.min(bytes as usize);
                    source.fetch(&mut buffer[done..done + count], place.1)?;
                    done += count;
                }
                Found::Failed(error) => return Err(error),
                Found::Later => {}
            }
        }
        Ok(())
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.wanted.notify_all();
    }
}

impl State {
    /// The range that covers `place`.
    fn covering(&self, (number, offset): Place) -> Option<Place> {
        let (&place, range) = self.ranges.range(..=(number, offset)).next_back()?;
        (place.0 == number && place.1 + range.bytes > offset).then_some(place)
    }

    /// Where the next range after `place` begins, in its source.
    fn next_after(&self, (number, offset): Place) -> u64 {
        self.ranges.range((number, offset)..=(number, u64::MAX)).next().map_or(u64::MAX, |(place, _)| place.1)
    }

    fn announce(&mut self, (number, mut offset): Place, bytes: u64, source: &Arc<dyn Source>) {
        let end = offset + bytes;
        while offset < end {
            if let Some(place) = self.covering((number, offset))
                && let Some(range) = self.ranges.get_mut(&place)
            {
                let covered = end.min(place.1 + range.bytes) - offset;
                range.announced += covered;
                offset += covered;
                continue;
            }
            let gap = end.min(self.next_after((number, offset))) - offset;
            offset += self.extend((number, offset), gap).unwrap_or_else(|| {
                let bytes = gap.min(self.length);
                self.put_off((number, offset), bytes, source, false);
                bytes
            });
        }
    }

    /// Makes the range before `place` longer by up to `bytes`; by how much, if it can be.
    fn extend(&mut self, place: Place, bytes: u64) -> Option<u64> {
        let before = self.covering((place.0, place.1.checked_sub(1)?))?;
        let (length, range) = (self.length, self.ranges.get_mut(&before)?);
        let Progress::Waiting { since, urgent: false } = &mut range.progress else { return None };
        let bytes = bytes.min(length.saturating_sub(range.bytes));
        *since = Instant::now();
        range.bytes += bytes;
        range.announced += bytes;
        (bytes > 0).then_some(bytes)
    }

    fn put_off(&mut self, place: Place, bytes: u64, source: &Arc<dyn Source>, first: bool) {
        let progress = Progress::Waiting { since: Instant::now(), urgent: false };
        self.ranges.insert(place, Range { source: Arc::clone(source), bytes, progress, announced: bytes, read: 0 });
        if first { self.waiting.push_front(place) } else { self.waiting.push_back(place) }
    }

    /// Takes `bytes` bytes at `place` out of the waiting range at `start`; what is left of it waits on.
    fn split(&mut self, start: Place, place: Place, bytes: u64) {
        self.waiting.retain(|waiting| *waiting != start);
        let Some(range) = self.ranges.remove(&start) else { return };
        let end = start.1 + range.bytes;
        let rest = place.1 + bytes;
        if rest < end {
            self.put_off((start.0, rest), end - rest, &range.source, true);
        }
        if start.1 < place.1 {
            self.put_off(start, place.1 - start.1, &range.source, true);
        }
    }

    /// Forgets ranges that are there, from the first on, until there is half of the room: nobody seems to want them.
    fn make_room(&mut self) {
        while self.held > self.room / 2 {
            let here = self.ranges.iter().find(|(_, range)| matches!(range.progress, Progress::Here(_)));
            let Some((&place, _)) = here else { return };
            self.forget(place);
        }
    }

    fn forget(&mut self, place: Place) {
        if let Some(range) = self.ranges.remove(&place)
            && matches!(range.progress, Progress::Here(_))
        {
            self.held -= range.bytes;
        }
    }

    /// The range to fetch next. `Err` says how long to wait: until told, or so long.
    fn next(&mut self) -> Result<Place, Option<Duration>> {
        let mut soonest = None;
        let mut chosen = None;
        for (index, place) in self.waiting.iter().enumerate() {
            let range = &self.ranges[place];
            let Progress::Waiting { since, urgent } = range.progress else { continue };
            if self.held + range.bytes > self.room {
                // Those behind it are not to overtake it for ever.
                return Err(None);
            }
            let left = PATIENCE.saturating_sub(since.elapsed());
            if urgent || range.bytes >= self.length || left.is_zero() {
                chosen = Some(index);
                break;
            }
            soonest = Some(soonest.map_or(left, |soonest: Duration| soonest.min(left)));
        }
        let place = chosen.and_then(|index| self.waiting.remove(index)).ok_or(soonest)?;
        if let Some(range) = self.ranges.get_mut(&place) {
            range.progress = Progress::Coming;
            self.held += range.bytes;
        }
        Ok(place)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What there is for a reader of `wanted` bytes at `place`.
    fn find(&self, place: Place, wanted: u64) -> Found {
        let mut state = self.lock();
        let Some(start) = state.covering(place) else {
            if state.room > 0 && state.held >= state.room {
                state.make_room();
                self.wanted.notify_all();
            }
            return Found::Nothing(state.next_after(place).saturating_sub(place.1));
        };
        let (held, room, threads) = (state.held, state.room, state.threads);
        let Some(range) = state.ranges.get_mut(&start) else { return Found::Later };
        match &mut range.progress {
            Progress::Here(data) => return Found::Here { data: Arc::clone(data), place: start },
            Progress::Failed(error) => {
                let error = error.clone();
                state.ranges.remove(&start);
                return Found::Failed(error);
            }
            Progress::Coming => {}
            Progress::Waiting { urgent, .. } if threads > 0 && held + range.bytes <= room => {
                *urgent = true;
                // First in the queue, so that nothing that lacks room stands before it.
                state.waiting.retain(|waiting| *waiting != start);
                state.waiting.push_front(start);
                self.wanted.notify_one();
            }
            Progress::Waiting { .. } => {
                let bytes = wanted.min(start.1 + range.bytes - place.1);
                state.split(start, place, bytes);
                return Found::Nothing(bytes);
            }
        }
        drop(self.arrived.wait_timeout(state, AGAIN));
        Found::Later
    }

    /// Bytes of the range at `place` were read; when all were that are to be, it goes.
    fn was_read(&self, place: Place, bytes: u64) {
        let mut state = self.lock();
        let Some(range) = state.ranges.get_mut(&place) else { return };
        range.read += bytes;
        if range.read >= range.announced {
            state.forget(place);
            self.wanted.notify_all();
        }
    }

    /// What one of several threads does until the end.
    fn fetch_all(&self) {
        let mut state = self.lock();
        while !state.closed {
            match state.next() {
                Ok(place) => {
                    let Some(range) = state.ranges.get(&place) else { continue };
                    let (source, bytes) = (Arc::clone(&range.source), range.bytes);
                    drop(state);
                    // From the system, where it goes back to at once: allocators keep what one thread frees of another's.
                    let data = allocate(bytes as usize);
                    let result = data.and_then(|mut data| source.fetch(&mut data, place.1).map(|()| Arc::new(data)));
                    state = self.lock();
                    state.settle(place, bytes, result);
                    self.arrived.notify_all();
                    self.wanted.notify_all();
                }
                Err(Some(wait)) => {
                    state = self.wanted.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
                }
                Err(None) => state = self.wanted.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

impl State {
    fn settle(&mut self, place: Place, bytes: u64, result: Result<Arc<Buffer>>) {
        let Some(range) = self.ranges.get_mut(&place) else { return };
        range.progress = match result {
            Ok(data) => Progress::Here(data),
            Err(error) => {
                self.held -= bytes;
                Progress::Failed(error)
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that tell their place, and what was asked for.
    struct Numbers {
        asked: Mutex<Vec<(u64, u64)>>,
        delay: Duration,
        /// From here on it fails.
        fails: u64,
    }

    impl Source for Numbers {
        fn fetch(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
            std::thread::sleep(self.delay);
            self.asked.lock().unwrap().push((offset, buffer.len() as u64));
            if offset + buffer.len() as u64 > self.fails {
                return Err(Error::failed(format!("no bytes at {offset}")));
            }
            buffer.iter_mut().zip(offset..).for_each(|(byte, at)| *byte = (at % 251) as u8);
            Ok(())
        }
    }

    fn numbers(delay_ms: u64, fails: u64) -> (Arc<Numbers>, Arc<dyn Source>) {
        let source = Arc::new(Numbers { asked: Mutex::default(), delay: Duration::from_millis(delay_ms), fails });
        (Arc::clone(&source), source)
    }

    fn read(ahead: &Ahead, source: &Arc<dyn Source>, offset: u64, bytes: usize) -> Result<()> {
        let mut buffer = vec![0; bytes];
        ahead.read((1, offset), &mut buffer, source)?;
        assert!(buffer.iter().zip(offset..).all(|(byte, at)| *byte == (at % 251) as u8));
        Ok(())
    }

    fn sum(asked: &Mutex<Vec<(u64, u64)>>) -> u64 {
        asked.lock().unwrap().iter().map(|(_, bytes)| bytes).sum()
    }

    #[test]
    fn what_is_announced_is_fetched_once_in_long_ranges() {
        let (log, source) = numbers(1, u64::MAX);
        let ahead = Ahead::default();
        ahead.allow(8 << 20, 1);
        for at in 0..64 {
            ahead.announce((1, at * 16_384), 16_384, &source);
        }
        for at in 0..64 {
            read(&ahead, &source, at * 16_384, 16_384).unwrap();
        }
        assert_eq!(sum(&log.asked), 64 * 16_384);
        assert!(log.asked.lock().unwrap().len() <= 2, "{:?}", log.asked.lock().unwrap());
        let state = ahead.shared.lock();
        assert!(state.ranges.is_empty() && state.waiting.is_empty() && state.held == 0);
    }

    #[test]
    fn what_is_announced_by_several_is_fetched_once_for_all() {
        let (log, source) = numbers(1, u64::MAX);
        let ahead = Ahead::default();
        ahead.allow(8 << 20, 1);
        for at in [0, 1, 2, 0, 1, 2].map(|at| at * 100_000) {
            ahead.announce((1, at), 100_000, &source);
        }
        for (at, bytes) in [(0, 100_000), (0, 30_000), (30_000, 70_000), (100_000, 200_000), (100_000, 200_000)] {
            read(&ahead, &source, at, bytes).unwrap();
        }
        assert_eq!(sum(&log.asked), 300_000);
        assert_eq!(ahead.shared.lock().held, 0);
    }

    #[test]
    fn nothing_waits_for_what_is_never_read() {
        let (log, source) = numbers(0, u64::MAX);
        let ahead = Ahead::default();
        ahead.allow(256 << 10, 1);
        // Far more than there is room for, and most of it is not read.
        for at in 0..100 {
            ahead.announce((1, at << 20), 100_000, &source);
        }
        for at in (0..100).rev() {
            read(&ahead, &source, at << 20, 50_000).unwrap();
            read(&ahead, &source, (at << 20) + 200_000, 10).unwrap();
            assert!(ahead.shared.lock().held <= 256 << 10);
        }
        assert!(sum(&log.asked) < 3 * 100 * 100_000);
    }

    #[test]
    fn readers_at_once_get_their_bytes_whatever_is_announced() {
        for room in [0, 64 << 10, 1 << 20, 64 << 20] {
            let (_, source) = numbers(0, u64::MAX);
            let ahead = Ahead::default();
            ahead.allow(room, 3);
            std::thread::scope(|scope| {
                for thread in 0..4u64 {
                    let (ahead, source) = (&ahead, &source);
                    scope.spawn(move || {
                        for step in 0..200 {
                            let at = (step * 7919 + thread * 104_729) % 3_000_000;
                            ahead.announce((1, at / 2 * 3), 20_000, source);
                            read(ahead, source, at, 30_000).unwrap();
                        }
                    });
                }
            });
        }
    }

    #[test]
    fn a_failure_is_told_to_the_reader_of_its_range() {
        let (_, source) = numbers(0, 100_000);
        let ahead = Ahead::default();
        ahead.allow(1 << 20, 4);
        ahead.announce((1, 0), 65_536, &source);
        ahead.announce((1, 200_000), 65_536, &source);
        read(&ahead, &source, 0, 65_536).unwrap();
        assert!(read(&ahead, &source, 200_000, 10).unwrap_err().to_string().contains("no bytes at 200000"));
        assert_eq!(ahead.shared.lock().held, 0);
    }

    #[test]
    fn ranges_are_on_their_way_at_the_same_time() {
        let (_, source) = numbers(50, u64::MAX);
        let ahead = Ahead::default();
        ahead.allow(8 << 20, 8);
        let begin = Instant::now();
        for at in 0..FETCHERS as u64 {
            ahead.announce((1, at << 20), 100_000, &source);
        }
        for at in 0..FETCHERS as u64 {
            read(&ahead, &source, at << 20, 100_000).unwrap();
        }
        let (took, alone) = (begin.elapsed(), Duration::from_millis(50) * FETCHERS as u32);
        assert!(took < alone / 2, "{took:?} where one after the other takes {alone:?}");
    }
}
