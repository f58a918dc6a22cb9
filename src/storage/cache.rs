//! Ranges that were fetched, kept on the local disk for the next pass over them.
//!
//! - Each source has a file as long as itself in which what was fetched stands at its place. The files are temporary: they
//!   have no name once they are open where the system allows that, so nothing of them outlives the process.
//! - At most so many bytes are kept: those that came first. Passes go through the inputs in the same order, so throwing
//!   out the oldest would keep what is needed last.
//! - A range is taken from here if all of it is here; else it is fetched in one request.

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::ahead::Source;
use super::online::lock;
use super::system::{self, Hint};
use crate::error::{Error, Result};

/// See the module's documentation.
pub(super) struct Cache {
    dir: PathBuf,
    limit: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    used: u64,
    files: HashMap<u64, Arc<Kept>>,
    /// Writing failed once: nothing more is kept.
    broken: bool,
}

/// What is kept of one source.
struct Kept {
    file: File,
    path: PathBuf,
    /// Ranges by their beginning, with their end; disjoint and not touching.
    ranges: Mutex<BTreeMap<u64, u64>>,
}

/// A source whose ranges are kept.
pub(super) struct Cached {
    pub source: Arc<dyn Source>,
    pub number: u64,
    pub cache: Arc<Cache>,
}

impl Cache {
    /// At most `limit` bytes in `dir`, which must be there.
    pub(super) fn new(dir: &Path, limit: u64) -> Result<Self> {
        let cache = Self { dir: dir.to_path_buf(), limit, state: Mutex::default() };
        // Whether it can be written to should be known before hours of work.
        cache.create(0).map_err(Error::as_input)?;
        Ok(cache)
    }

    fn create(&self, number: u64) -> Result<Kept> {
        let path = self.dir.join(format!(".tiesmith-cache-{}-{number:016x}", std::process::id()));
        let failed = |e: std::io::Error| Error::io("create", &path, &e).help("give another --cache");
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).map_err(failed)?;
        if cfg!(unix) {
            std::fs::remove_file(&path).map_err(failed)?;
        }
        Ok(Kept { file, path, ranges: Mutex::default() })
    }

    /// Fills `buffer` from `offset` of source `number`, if all of it is kept.
    fn take(&self, number: u64, buffer: &mut [u8], offset: u64) -> bool {
        let Some(kept) = lock(&self.state).files.get(&number).cloned() else { return false };
        if !covers(&lock(&kept.ranges), offset, offset + buffer.len() as u64) {
            return false;
        }
        let mut done = 0;
        while done < buffer.len() {
            match system::read_at(&kept.file, &mut buffer[done..], offset + done as u64) {
                Ok(0) => return false,
                Ok(count) => done += count,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                // What cannot be read is fetched again.
                Err(_) => return false,
            }
        }
        true
    }

    /// Keeps `data`, which is at `offset` of source `number`, if there is room.
    fn put(&self, number: u64, data: &[u8], offset: u64) {
        let kept = {
            let mut state = lock(&self.state);
            if state.broken || state.used + data.len() as u64 > self.limit {
                return;
            }
            let kept = match state.files.get(&number) {
                Some(kept) => Arc::clone(kept),
                None => {
                    let Ok(kept) = self.create(number) else {
                        state.broken = true;
                        return;
                    };
                    let kept = Arc::new(kept);
                    state.files.insert(number, Arc::clone(&kept));
                    kept
                }
            };
            // Taken before it is written: others write at the same time.
            state.used += data.len() as u64;
            kept
        };
        let mut done = 0;
        while done < data.len() {
            match system::write_at(&kept.file, &data[done..], offset + done as u64) {
                Ok(count @ 1..) => done += count,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                // The disk is full, or worse: the run needs the network only.
                _ => return lock(&self.state).broken = true,
            }
        }
        // Bytes that wait for the disk count as memory.
        let _ = kept.file.sync_data();
        system::hint(&kept.file, offset, data.len() as u64, Hint::DontNeed);
        let new = insert(&mut lock(&kept.ranges), offset, offset + data.len() as u64);
        lock(&self.state).used -= data.len() as u64 - new;
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if !cfg!(unix) {
            // Best effort: it is a temporary file.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn covers(ranges: &BTreeMap<u64, u64>, start: u64, end: u64) -> bool {
    ranges.range(..=start).next_back().is_some_and(|(_, &last)| last >= end)
}

/// Adds a range; returns how many bytes of it are new.
fn insert(ranges: &mut BTreeMap<u64, u64>, start: u64, end: u64) -> u64 {
    let (mut first, mut last, mut known) = (start, end, 0);
    while let Some((&from, &to)) = ranges.range(..=last).next_back().filter(|&(_, &to)| to >= first) {
        known += to.min(end).saturating_sub(from.max(start));
        (first, last) = (first.min(from), last.max(to));
        ranges.remove(&from);
    }
    ranges.insert(first, last);
    end - start - known
}

impl Source for Cached {
    fn fetch(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        if self.cache.take(self.number, buffer, offset) {
            return Ok(());
        }
        self.source.fetch(buffer, offset)?;
        self.cache.put(self.number, buffer, offset);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranges_are_what_was_added(added in prop::collection::vec((0u64..200, 1u64..40), 0..40)) {
            let (mut ranges, mut bytes) = (BTreeMap::new(), vec![false; 300]);
            for (start, length) in added {
                let new = (start..start + length).filter(|&at| !bytes[at as usize]).count() as u64;
                prop_assert_eq!(insert(&mut ranges, start, start + length), new);
                (start..start + length).for_each(|at| bytes[at as usize] = true);
            }
            for (start, end) in [(0, 1), (5, 30), (100, 140), (0, 240), (199, 239)] {
                prop_assert_eq!(covers(&ranges, start, end), bytes[start as usize..end as usize].iter().all(|&b| b));
            }
            let gaps = ranges.iter().zip(ranges.iter().skip(1));
            prop_assert!(gaps.into_iter().all(|((_, end), (start, _))| end < start));
        }
    }

    #[test]
    fn what_fits_is_kept_and_comes_back() {
        struct Counted(Mutex<u64>);
        impl Source for Counted {
            fn fetch(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
                *self.0.lock().unwrap() += buffer.len() as u64;
                buffer.iter_mut().zip(offset..).for_each(|(byte, at)| *byte = (at % 251) as u8);
                Ok(())
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let cache = Arc::new(Cache::new(dir.path(), 50_000).unwrap());
        let fetched = Arc::new(Counted(Mutex::new(0)));
        let source = Cached { source: Arc::clone(&fetched) as _, number: 7, cache };
        for pass in 0..2 {
            for at in 0..10u64 {
                let mut buffer = vec![0; 10_000];
                source.fetch(&mut buffer, at * 10_000).unwrap();
                assert!(buffer.iter().zip(at * 10_000..).all(|(byte, at)| *byte == (at % 251) as u8));
            }
            assert_eq!(*fetched.0.lock().unwrap(), [100_000, 150_000][pass]);
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), usize::from(!cfg!(unix)));
        assert!(Cache::new(&dir.path().join("missing"), 1).is_err());
    }
}
