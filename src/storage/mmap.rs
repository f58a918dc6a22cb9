//! A window on a file: a fixed buffer that is read into, or a mapping of the range.
//!
//! - The buffer is allocated at the first read and reused: a window that is only mapped has none.
//! - A mapping covers exactly the range, is touched before it is shown, so that a range that cannot be read is seldom
//!   found out later, and is dropped before the next load: mapped pages count as memory like any others.
//! - A range that becomes unreadable while it is shown shows zeros from there on, and [`Faults`] knows of it. The system
//!   raises a signal for such a page; the handler here puts zeros in its place (`faults`).
//!
//! Does not know what the bytes mean.

#![allow(unsafe_code)]

use std::fs::File;
use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::sync::Arc;

use memmap2::{Mmap, MmapMut, MmapOptions};

use crate::error::{Error, Result};
use crate::limits::MAPPED_BYTES;

/// Bytes of a file, read or mapped. See the module's documentation.
#[derive(Debug, Default)]
pub struct Window {
    buffer: Option<Buffer>,
    capacity: usize,
    length: usize,
    mapping: Option<Guarded>,
}

/// Memory that is read into.
#[derive(Debug)]
pub(super) enum Buffer {
    /// A short one: of the allocator, which does not round it up to pages.
    Short(Box<[u8]>),
    /// Memory straight from the system.
    Long(MmapMut),
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Short(bytes) => bytes,
            Self::Long(bytes) => bytes,
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Short(bytes) => bytes,
            Self::Long(bytes) => bytes,
        }
    }
}

/// A mapping whose faults are taken note of.
#[derive(Debug)]
struct Guarded {
    mapping: Mmap,
    /// Ends before the mapping goes.
    watch: faults::Watch,
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.watch.end();
    }
}

impl Window {
    /// A window for ranges of up to `bytes` bytes.
    pub fn with_capacity(bytes: usize) -> Self {
        Self { capacity: bytes, ..Self::default() }
    }

    /// The bytes of the last load; none before the first and after a failed one.
    pub fn bytes(&self) -> &[u8] {
        match &self.mapping {
            Some(guarded) => &guarded.mapping,
            None => self.buffer.as_deref().map_or(&[], |buffer| &buffer[..self.length]),
        }
    }

    /// Bytes it was made for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Whether what it shows is mapped.
    #[cfg(test)]
    pub(super) fn is_mapped(&self) -> bool {
        self.mapping.is_some()
    }

    /// Shows nothing and gives mapped pages back; the buffer is kept.
    pub fn clear(&mut self) {
        self.mapping = None;
        self.length = 0;
    }

    /// Shows `length` bytes that `read` puts into the buffer.
    pub fn fill(&mut self, length: usize, read: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<()> {
        self.clear();
        if length > 0 {
            if self.buffer.as_ref().is_none_or(|buffer| buffer.len() < length) {
                self.buffer = Some(allocate(self.capacity.max(length))?);
            }
            if let Some(buffer) = &mut self.buffer {
                read(&mut buffer[..length])?;
            }
        }
        self.length = length;
        Ok(())
    }

    /// Maps `length` bytes of `file` from `offset`; false if they are few, or if the system cannot map or cannot read them
    /// all. The caller then reads, which works or says why not.
    pub(super) fn map(
        &mut self,
        file: &File,
        path: &Arc<Path>,
        faults: &Arc<Faults>,
        offset: u64,
        length: usize,
    ) -> bool {
        self.clear();
        if length < MAPPED_BYTES {
            return false;
        }
        // SAFETY: the mapping is read-only, lives in this window and is shown as `&[u8]` only while the window is
        // borrowed; every bit pattern is a valid u8. Two things cannot be ruled out from here, because another process
        // may write to the file: (1) bytes may change under the reference, which the language calls undefined and in
        // practice gives mixed bytes; no decision on memory is ever made from data bytes, and the engine compares the
        // file's identity before it publishes what used it. (2) A file that is cut after its pages were mapped
        // loses them, and using them raises SIGBUS: it is watched for that.
        let mapping = unsafe { MmapOptions::new().offset(offset).len(length).map(file) };
        let Ok(mapping) = mapping else { return false };
        let Some(watch) = faults::watch(&mapping, path, faults) else { return false };
        let guarded = Guarded { mapping, watch };
        touch(&guarded.mapping);
        // A range that cannot be read is an error, which reading it will tell.
        if guarded.watch.take_fault() {
            return false;
        }
        self.mapping = Some(guarded);
        true
    }
}

/// Which files could not be read while they were mapped.
#[derive(Debug, Default)]
pub(super) struct Faults {
    first: std::sync::OnceLock<Arc<Path>>,
}

impl Faults {
    /// The first file that could not be read.
    pub(super) fn first(self: &Arc<Self>) -> Option<Arc<Path>> {
        let known = || self.first.get().cloned();
        // A mapping may go, and tell of its fault, between the two.
        known().or_else(|| faults::current(self)).or_else(known)
    }
}

/// The signal handler, and the table of mappings that it looks into.
#[cfg(unix)]
mod faults {
    use std::path::Path;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex, OnceLock, PoisonError};

    use super::{Faults, Mmap};

    /// Most mappings at a time; beyond, ranges are read instead.
    const REGIONS: usize = 4096;

    /// Addresses of a mapping; the end is 0 while the entry is not in use.
    struct Region {
        start: AtomicUsize,
        end: AtomicUsize,
        faulted: AtomicBool,
    }

    static TABLE: [Region; REGIONS] =
        [const { Region { start: AtomicUsize::new(0), end: AtomicUsize::new(0), faulted: AtomicBool::new(false) } };
            REGIONS];
    /// Whether there was a fault ever: spares looking for one.
    static ANY: AtomicBool = AtomicBool::new(false);
    static PAGE_BYTES: AtomicUsize = AtomicUsize::new(0);
    /// Whose each region is. Never locked by the handler.
    static OWNERS: Mutex<Vec<Option<Owner>>> = Mutex::new(Vec::new());

    struct Owner {
        path: Arc<Path>,
        faults: Arc<Faults>,
    }

    /// A mapping in the table.
    #[derive(Debug)]
    pub(super) struct Watch(usize);

    /// Watches `mapping`; `None` if that is not possible.
    pub(super) fn watch(mapping: &Mmap, path: &Arc<Path>, faults: &Arc<Faults>) -> Option<Watch> {
        if !install() {
            return None;
        }
        let mut owners = OWNERS.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = owners.iter().position(Option::is_none).unwrap_or(owners.len());
        let region = TABLE.get(slot)?;
        let owner = Some(Owner { path: Arc::clone(path), faults: Arc::clone(faults) });
        if slot == owners.len() {
            owners.push(owner)
        } else {
            owners[slot] = owner
        }
        let page = PAGE_BYTES.load(Ordering::Relaxed);
        // The mapping begins at the page that holds the range's first byte.
        let start = mapping.as_ptr().addr();
        region.start.store(start / page * page, Ordering::Relaxed);
        region.end.store((start + mapping.len()).next_multiple_of(page), Ordering::SeqCst);
        Some(Watch(slot))
    }

    impl Watch {
        /// Whether there was a fault, which is forgotten.
        pub(super) fn take_fault(&self) -> bool {
            TABLE[self.0].faulted.swap(false, Ordering::SeqCst)
        }

        /// Ends watching: the mapping is about to go.
        pub(super) fn end(&self) {
            let region = &TABLE[self.0];
            region.end.store(0, Ordering::SeqCst);
            let mut owners = OWNERS.lock().unwrap_or_else(PoisonError::into_inner);
            let owner = owners[self.0].take();
            if let (true, Some(owner)) = (region.faulted.swap(false, Ordering::SeqCst), owner) {
                let _ = owner.faults.first.set(owner.path);
            }
        }
    }

    /// The file of a mapping that has had a fault.
    pub(super) fn current(faults: &Arc<Faults>) -> Option<Arc<Path>> {
        if !ANY.load(Ordering::SeqCst) {
            return None;
        }
        let owners = OWNERS.lock().unwrap_or_else(PoisonError::into_inner);
        let faulted = |(slot, owner): (usize, &Option<Owner>)| {
            let owner = owner.as_ref().filter(|owner| Arc::ptr_eq(&owner.faults, faults))?;
            TABLE[slot].faulted.load(Ordering::SeqCst).then(|| Arc::clone(&owner.path))
        };
        owners.iter().enumerate().find_map(faulted)
    }

    /// What handled the signal before, kept for faults that are not ours.
    static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

    /// Installs the handler once; false if the system refuses.
    fn install() -> bool {
        static INSTALLED: OnceLock<bool> = OnceLock::new();
        *INSTALLED.get_or_init(|| {
            // SAFETY: both calls only ask; the structure that receives an answer is valid for every bit pattern (it is
            // plain data) and lives until the call returns.
            let (page, previous) = unsafe {
                let mut previous: libc::sigaction = std::mem::zeroed();
                let asked = libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut previous);
                (libc::sysconf(libc::_SC_PAGESIZE), (asked == 0).then_some(previous))
            };
            let (Ok(page @ 1..), Some(previous)) = (usize::try_from(page), previous) else { return false };
            PAGE_BYTES.store(page, Ordering::Relaxed);
            let _ = PREVIOUS.set(previous);
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = handle;
            // SAFETY: the structure is plain data, filled in before it is passed; `handle` has the signature that
            // SA_SIGINFO asks for and does nothing that is not allowed in a signal handler. What was there before is kept,
            // and called for faults that are not ours.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handler as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                libc::sigemptyset(&mut action.sa_mask);
                libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) == 0
            }
        })
    }

    /// Puts zeros where a watched mapping cannot be read; leaves every other fault to what handled it before. Only
    /// touches atomics and makes system calls: it may interrupt anything.
    extern "C" fn handle(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
        // SAFETY: the system passes a valid structure to a handler installed with SA_SIGINFO, and for this signal it
        // holds an address.
        let address = unsafe { (*info).si_addr() }.addr();
        for region in &TABLE {
            let end = region.end.load(Ordering::SeqCst);
            if end == 0 || address < region.start.load(Ordering::Relaxed) || address >= end {
                continue;
            }
            let page = PAGE_BYTES.load(Ordering::Relaxed);
            let first = address / page * page;
            // SAFETY: the pages from the fault to the end of the region belong to a mapping that `Watch` vouches for: it
            // is private to its window, read-only, and stays mapped until the watch has ended. Readable pages of zeros
            // take their place at the same addresses, which is what the code that was interrupted goes on reading; its
            // bytes are never relied on for safety.
            let replaced = unsafe {
                libc::mmap(
                    std::ptr::without_provenance_mut(first),
                    end - first,
                    libc::PROT_READ,
                    libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANON,
                    -1,
                    0,
                )
            };
            if replaced != libc::MAP_FAILED {
                region.faulted.store(true, Ordering::SeqCst);
                ANY.store(true, Ordering::SeqCst);
                return;
            }
        }
        if let Some(previous) = PREVIOUS.get() {
            // SAFETY: puts back what the system gave out itself; the instruction then faults again, and is handled as if
            // this handler had never been.
            unsafe { libc::sigaction(libc::SIGBUS, previous, std::ptr::null_mut()) };
        }
    }
}

/// Elsewhere nothing can be watched, so that ranges are read.
#[cfg(not(unix))]
mod faults {
    use super::{Arc, Faults, Mmap, Path};

    #[derive(Debug)]
    pub(super) struct Watch;

    impl Watch {
        pub(super) fn take_fault(&self) -> bool {
            false
        }

        pub(super) fn end(&self) {}
    }

    pub(super) fn watch(_mapping: &Mmap, _path: &Arc<Path>, _faults: &Arc<Faults>) -> Option<Watch> {
        None
    }

    pub(super) fn current(_faults: &Arc<Faults>) -> Option<Arc<Path>> {
        None
    }
}

/// Memory straight from the system, so that running out of it is an error, and in huge pages where it has them, which
/// cost a fraction of the faults and of the address translation.
pub(super) fn allocate(bytes: usize) -> Result<Buffer> {
    if bytes < MAPPED_BYTES {
        return Ok(Buffer::Short(vec![0; bytes].into()));
    }
    let memory = MmapMut::map_anon(bytes).map_err(|e| {
        Error::failed(format!("no memory for a buffer of {bytes} bytes: {e}")).help("use less --memory")
    })?;
    #[cfg(target_os = "linux")]
    if bytes >= HUGE_PAGE_BYTES {
        // Only a hint.
        let _ = memory.advise(memmap2::Advice::HugePage);
    }
    Ok(Buffer::Long(memory))
}

/// Buffers shorter than this would mostly be padding in huge pages.
#[cfg(target_os = "linux")]
const HUGE_PAGE_BYTES: usize = 4 << 20;

/// Bytes of page table that a system fills in at one fault, where the pages are in memory (Linux: `fault_around_bytes`).
const FAULT_AROUND: usize = 64 << 10;

/// Uses a byte of each range whose pages the system maps at once: a third cheaper than asking it to populate the mapping,
/// which goes page by page.
fn touch(mapping: &Mmap) {
    // Only a hint.
    #[cfg(unix)]
    let _ = mapping.advise(memmap2::Advice::Sequential);
    // The ranges are aligned in memory, not in the file.
    let first = mapping.as_ptr().addr().wrapping_neg() % FAULT_AROUND;
    for at in std::iter::once(0).chain((first..mapping.len()).step_by(FAULT_AROUND)).chain([mapping.len() - 1]) {
        std::hint::black_box(mapping.get(at).copied());
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file
    }

    /// Maps into `window` for nobody in particular.
    fn map(window: &mut Window, file: &File, offset: u64, length: usize) -> bool {
        window.map(file, &Arc::from(Path::new("input")), &Arc::default(), offset, length)
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_file_that_is_cut_off_while_it_is_mapped_shows_zeros_and_is_named() {
        let file = file(&[7; 500_000]);
        let (path, faults, others): (Arc<Path>, Arc<Faults>, Arc<Faults>) =
            (Path::new("cut").into(), Arc::default(), Arc::default());
        let (mut window, mut other) = (Window::default(), Window::default());
        assert!(window.map(&file, &path, &faults, 100, 490_000));
        assert!(map(&mut other, &super::tests::file(&[9; 200_000]), 0, 200_000));
        assert!(window.bytes().iter().all(|&byte| byte == 7) && faults.first().is_none());
        file.set_len(100_000).unwrap();
        let bytes = window.bytes();
        assert_eq!((bytes[0], bytes[90_000]), (7, 7), "what is left can still be read");
        assert_eq!((bytes[300_000], bytes[489_999]), (0, 0));
        assert_eq!(faults.first().as_deref(), Some(&*path));
        assert_eq!(others.first(), None, "other storages are not concerned");
        assert!(other.bytes().iter().all(|&byte| byte == 9));
        window.clear();
        assert_eq!(faults.first().as_deref(), Some(&*path), "remembered");
    }

    /// Reads `content`.
    fn with(content: &[u8]) -> impl FnOnce(&mut [u8]) -> Result<()> {
        |buffer| {
            buffer.copy_from_slice(content);
            Ok(())
        }
    }

    #[test]
    fn a_mapped_window_has_no_buffer() {
        let content: Vec<u8> = (0..400_000u32).map(|i| i as u8).collect();
        let file = file(&content);
        let mut window = Window::with_capacity(200_000);
        for (offset, length) in [(0, 200_000), (4_097, 70_000), (399_999 - MAPPED_BYTES, MAPPED_BYTES)] {
            assert!(map(&mut window, &file, offset as u64, length));
            assert_eq!(window.bytes(), &content[offset..offset + length]);
        }
        assert!(window.buffer.is_none());
        assert_eq!(window.capacity(), 200_000);
        assert!(!map(&mut window, &file, 0, MAPPED_BYTES - 1), "pages are not worth it");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_range_behind_the_end_cannot_be_mapped() {
        let mut window = Window::default();
        assert!(!map(&mut window, &file(&[1; 5_000]), 4_096, 100_000));
        assert_eq!(window.bytes(), b"");
    }

    #[test]
    fn the_buffer_is_allocated_once_and_replaces_a_mapping() {
        let mut window = Window::with_capacity(8);
        assert!(map(&mut window, &file(&[5; 100_000]), 2, 80_000));
        window.fill(2, with(b"xy")).unwrap();
        assert_eq!(window.bytes(), b"xy");
        let address = window.bytes().as_ptr();
        window.fill(8, with(b"zzzzzzzz")).unwrap();
        assert_eq!((window.bytes(), window.bytes().as_ptr()), (&b"zzzzzzzz"[..], address));
        window.fill(4, |_| Err(Error::failed("no"))).unwrap_err();
        assert_eq!(window.bytes(), b"");
    }

    #[test]
    fn no_capacity_is_needed_for_no_bytes() {
        let mut window = Window::with_capacity(0);
        window.fill(0, |_| Ok(())).unwrap();
        assert_eq!(window.bytes(), b"");
        window.fill(3, with(b"abc")).unwrap();
        assert_eq!(window.bytes(), b"abc", "the fallback of a window made for mappings");
    }
}
