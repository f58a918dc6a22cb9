//! What operating systems do differently: positional I/O, identities, hints, directory syncs, free space.
//!
//! Each function has a Unix form and a portable one. Hints that a system does not have do nothing; what cannot be
//! known says so in the way that never refuses work (unknown free space is unlimited space).

use std::fs::{File, Metadata, OpenOptions};
use std::io::Result;
use std::path::Path;

use super::Identity;

/// A hint on what happens to a range of a file next.
#[derive(Debug, Clone, Copy)]
pub(super) enum Hint {
    /// It will be read soon.
    WillNeed,
    /// It need not stay in the page cache.
    DontNeed,
}

#[cfg(unix)]
pub(super) fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, buffer, offset)
}

#[cfg(windows)]
pub(super) fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, buffer, offset)
}

#[cfg(unix)]
pub(super) fn write_at(file: &File, bytes: &[u8], offset: u64) -> Result<usize> {
    std::os::unix::fs::FileExt::write_at(file, bytes, offset)
}

#[cfg(windows)]
pub(super) fn write_at(file: &File, bytes: &[u8], offset: u64) -> Result<usize> {
    std::os::windows::fs::FileExt::seek_write(file, bytes, offset)
}

#[cfg(unix)]
pub(super) fn identity_of(metadata: &Metadata) -> Identity {
    use std::os::unix::fs::MetadataExt as _;
    let nanoseconds = |seconds: i64, rest: i64| i128::from(seconds) * 1_000_000_000 + i128::from(rest);
    Identity {
        bytes: metadata.len(),
        mtime_ns: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
        ctime_ns: nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
        device: metadata.dev(),
        inode: metadata.ino(),
    }
}

#[cfg(not(unix))]
pub(super) fn identity_of(metadata: &Metadata) -> Identity {
    let modified = metadata.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
    let mtime_ns = modified.map_or(0, |d| d.as_nanos() as i128);
    Identity { bytes: metadata.len(), mtime_ns, ..Identity::default() }
}

/// Whether what is open is a file that has one name only: writing to it changes nothing that is called otherwise.
#[cfg(unix)]
pub(super) fn is_plain(metadata: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    metadata.is_file() && metadata.nlink() <= 1
}

#[cfg(not(unix))]
pub(super) fn is_plain(metadata: &Metadata) -> bool {
    metadata.is_file()
}

/// Whether nothing can be at a path: it is too long for the file system, or its links lead back to themselves.
pub(super) fn is_nowhere(error: &std::io::Error) -> bool {
    #[cfg(unix)]
    let circular = error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error());
    #[cfg(not(unix))]
    let circular = false;
    circular || error.kind() == std::io::ErrorKind::InvalidFilename
}

/// Lets opening a FIFO return at once, so that it can be refused instead of waited for.
#[cfg(all(unix, not(miri)))]
pub(super) fn open_without_waiting(options: &mut OpenOptions) {
    use std::os::unix::fs::OpenOptionsExt as _;
    options.custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32);
}

#[cfg(any(not(unix), miri))]
pub(super) fn open_without_waiting(_options: &mut OpenOptions) {}

/// Refuses to open what a symbolic link points to, and does not wait for the other end of a FIFO.
#[cfg(unix)]
pub(super) fn no_follow(options: &mut OpenOptions) {
    use rustix::fs::OFlags;
    use std::os::unix::fs::OpenOptionsExt as _;
    options.custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32);
}

#[cfg(not(unix))]
pub(super) fn no_follow(_options: &mut OpenOptions) {}

/// Raises the limit of open files as far as the system allows.
#[cfg(all(unix, not(miri)))]
pub(super) fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Without it, opening a checkpoint of very many shards fails with the system's own clear error.
    let _ = setrlimit(Resource::Nofile, limit);
}

#[cfg(any(not(unix), miri))]
pub(super) fn raise_file_limit() {}

#[cfg(unix)]
pub(super) fn sync_directory(path: &Path) -> Result<()> {
    use std::io::ErrorKind;
    match File::open(path)?.sync_all() {
        // Some network file systems cannot sync a directory; they make entries durable on their own.
        Err(e) if matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => Ok(()),
        other => other,
    }
}

/// Directory entries cannot be synced here; renames are as durable as the system makes them.
#[cfg(not(unix))]
pub(super) fn sync_directory(_path: &Path) -> Result<()> {
    Ok(())
}

#[cfg(unix)]
pub(super) fn free_bytes(path: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    // Some network file systems do not say how large they are.
    if stat.f_blocks == 0 {
        return Ok(u64::MAX);
    }
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Not known here: a full disk shows when it is full.
#[cfg(not(unix))]
pub(super) fn free_bytes(_path: &Path) -> Result<u64> {
    Ok(u64::MAX)
}

/// Whether a file is on a file system of this machine, as far as is known. On others, a mapped page may take as long as
/// a network, or fail as it does.
#[cfg(target_os = "linux")]
pub(super) fn is_local(file: &File) -> bool {
    /// Magic numbers from `statfs(2)`: ext2 to ext4, XFS, Btrfs, F2FS, tmpfs, overlayfs, ZFS, bcachefs.
    const LOCAL: [u32; 8] =
        [0xef53, 0x5846_5342, 0x9123_683e, 0xf2f5_2010, 0x0102_1994, 0x794c_7630, 0x2fc1_2fc1, 0xca45_1a4e];
    rustix::fs::fstatfs(file).is_ok_and(|stat| LOCAL.contains(&(stat.f_type as u32)))
}

#[cfg(not(target_os = "linux"))]
pub(super) fn is_local(_file: &File) -> bool {
    false
}

/// Whether this process may have only so many addresses (`ulimit -v`).
#[cfg(unix)]
pub fn address_space_is_limited() -> bool {
    rustix::process::getrlimit(rustix::process::Resource::As).current.is_some()
}

/// Not known here.
#[cfg(not(unix))]
pub fn address_space_is_limited() -> bool {
    false
}

#[cfg(unix)]
pub(super) fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(not(unix))]
pub(super) fn host_name() -> String {
    std::env::var("COMPUTERNAME").unwrap_or_else(|_| "this host".to_owned())
}

/// The time now, in UTC to the second: `2026-11-25 14:03:21 UTC`.
pub(super) fn now_text() -> String {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    utc_text(since.as_secs())
}

/// A time given in seconds since 1970.
pub(super) fn utc_text(seconds: u64) -> String {
    // Days since 0000-03-01, in eras of 400 years; a year that begins in March has its leap day last.
    let (days, rest) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = year + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(target_os = "linux")]
pub(super) fn hint(file: &File, offset: u64, length: u64, hint: Hint) {
    use rustix::fs::Advice;
    // To the system, a length of zero means the rest of the file.
    let Some(length) = std::num::NonZeroU64::new(length) else { return };
    let advice = match hint {
        Hint::WillNeed => Advice::WillNeed,
        Hint::DontNeed => Advice::DontNeed,
    };
    // A file system that does not take the hint loses nothing.
    let _ = rustix::fs::fadvise(file, offset, Some(length), advice);
}

#[cfg(not(target_os = "linux"))]
pub(super) fn hint(_file: &File, _offset: u64, _length: u64, hint: Hint) {
    match hint {
        Hint::WillNeed | Hint::DontNeed => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_shown_in_utc() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_709_251_199, "2024-02-29 23:59:59 UTC"),
            (1_709_251_200, "2024-03-01 00:00:00 UTC"),
            (4_107_542_399, "2100-02-28 23:59:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
            (1_798_761_599, "2026-12-31 23:59:59 UTC"),
        ] {
            assert_eq!(utc_text(seconds), text);
        }
    }
}
