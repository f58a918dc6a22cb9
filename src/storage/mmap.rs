//! A window on a file: a fixed buffer that is read into, or a mapping of the range.
//!
//! - The buffer is allocated at the first read and reused: a window that is only mapped has none.
//! - A mapping covers exactly the range, is populated before it is shown, so that a range that cannot be read is an
//!   error and not a signal, and is dropped before the next load: mapped pages count as memory like any others.
//!
//! Knows neither paths nor what the bytes mean.

#![allow(unsafe_code)]

use std::fs::File;

use memmap2::{Mmap, MmapMut, MmapOptions};

use crate::error::{Error, Result};

/// Bytes of a file, read or mapped. See the module's documentation.
#[derive(Debug, Default)]
pub struct Window {
    buffer: Option<MmapMut>,
    capacity: usize,
    length: usize,
    mapping: Option<Mmap>,
}

impl Window {
    /// A window for ranges of up to `bytes` bytes.
    pub fn with_capacity(bytes: usize) -> Self {
        Self { capacity: bytes, ..Self::default() }
    }

    /// The bytes of the last load; none before the first and after a failed one.
    pub fn bytes(&self) -> &[u8] {
        match &self.mapping {
            Some(mapping) => mapping,
            None => self.buffer.as_deref().map_or(&[], |buffer| &buffer[..self.length]),
        }
    }

    /// Bytes it was made for.
    pub fn capacity(&self) -> usize {
        self.capacity
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

    /// Maps `length` bytes of `file` from `offset`; false if the system cannot map or cannot read them all. The
    /// caller then reads, which works or says why not.
    pub(super) fn map(&mut self, file: &File, offset: u64, length: usize) -> bool {
        self.clear();
        if length == 0 {
            return true;
        }
        // SAFETY: the mapping is read-only, lives in this window and is shown as `&[u8]` only while the window is
        // borrowed; every bit pattern is a valid u8. Two things cannot be ruled out from here, because another process
        // may write to the file: (1) bytes may change under the reference, which the language calls undefined and in
        // practice gives mixed bytes; no decision on memory is ever made from data bytes, and the engine compares the
        // file's identity before it publishes what used it. (2) A file that is cut after its pages were populated, and
        // loses them from the page cache before they are used, raises SIGBUS, which ends the process. Nothing that
        // was published is harmed, but no error is reported. Positional reads have neither problem and are the default.
        let mapping = unsafe { MmapOptions::new().offset(offset).len(length).map(file) };
        let Ok(mapping) = mapping else { return false };
        if !populate(&mapping) {
            return false;
        }
        self.mapping = Some(mapping);
        true
    }
}

/// Memory straight from the system, so that running out of it is an error, and in huge pages where it has them, which
/// cost a fraction of the faults and of the address translation.
fn allocate(bytes: usize) -> Result<MmapMut> {
    let memory = MmapMut::map_anon(bytes).map_err(|e| {
        Error::failed(format!("no memory for a buffer of {bytes} bytes: {e}")).help("use less --memory")
    })?;
    #[cfg(target_os = "linux")]
    if bytes >= HUGE_PAGE_BYTES {
        // Only a hint.
        let _ = memory.advise(memmap2::Advice::HugePage);
    }
    Ok(memory)
}

/// Buffers shorter than this would mostly be padding in huge pages.
#[cfg(target_os = "linux")]
const HUGE_PAGE_BYTES: usize = 4 << 20;

/// Reads the mapped pages now; false if that fails, as it does where the file has ended or the disk has a fault.
#[cfg(target_os = "linux")]
fn populate(mapping: &Mmap) -> bool {
    // Only a hint, but population is slow on mappings that are advised as random.
    let _ = mapping.advise(memmap2::Advice::Sequential);
    // A kernel before 5.14 does not know the advice: reading is then the safe way.
    mapping.advise(memmap2::Advice::PopulateRead).is_ok()
}

/// Not known to other systems: pages are read when they are used.
#[cfg(not(target_os = "linux"))]
fn populate(_mapping: &Mmap) -> bool {
    true
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

    /// Reads `content`.
    fn with(content: &[u8]) -> impl FnOnce(&mut [u8]) -> Result<()> {
        |buffer| {
            buffer.copy_from_slice(content);
            Ok(())
        }
    }

    #[test]
    fn a_mapped_window_has_no_buffer() {
        let content: Vec<u8> = (0..20_000u32).map(|i| i as u8).collect();
        let file = file(&content);
        let mut window = Window::with_capacity(10_000);
        for (offset, length) in [(0, 10_000), (4_097, 1), (19_999, 1), (123, 0)] {
            assert!(window.map(&file, offset as u64, length));
            assert_eq!(window.bytes(), &content[offset..offset + length]);
        }
        assert!(window.buffer.is_none());
        assert_eq!(window.capacity(), 10_000);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_range_behind_the_end_cannot_be_mapped() {
        let mut window = Window::default();
        assert!(!window.map(&file(&[1; 5_000]), 4_096, 10_000));
        assert_eq!(window.bytes(), b"");
    }

    #[test]
    fn the_buffer_is_allocated_once_and_replaces_a_mapping() {
        let mut window = Window::with_capacity(8);
        assert!(window.map(&file(b"abcdef"), 2, 3));
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
