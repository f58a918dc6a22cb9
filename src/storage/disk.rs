//! The real file system.
//!
//! - Interrupted and short reads and writes are continued (`transfer`); an early end of file is an error.
//! - The first failure of an output file is sticky: after a failed sync the system may have dropped the data and would
//!   call the next sync a success.
//!
//! Decides what errors mean; what systems do differently is in `system`.

use std::ffi::OsString;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind as IoKind, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use super::mmap::Faults;
use super::system::{self, Hint};
use super::transfer::{read_fully, write_fully};
use super::{Identity, InputFile, IoMode, Lock, OutputFile, Storage, Window, places};
use crate::error::{Error, Result, printable};

/// How often a lock that vanishes while it is taken is taken anew.
const LOCK_ATTEMPTS: usize = 100;

/// A range of so many bytes is not read but mapped, where the mode leaves it open: a copy of several of them would not stay
/// in a core's cache, so that they would be written to memory only to be read from there again.
const LONG_BYTES: usize = 1 << 20;

/// The file system of the operating system.
#[derive(Debug)]
pub struct Disk {
    mode: IoMode,
    /// Inputs that could not be read while they were mapped.
    faults: Arc<Faults>,
}

impl Disk {
    /// Reads inputs as `mode` says. Raises the limit of open files as far as the system allows: a large checkpoint has
    /// hundreds of shards, and several are open at once.
    pub fn new(mode: IoMode) -> Self {
        system::raise_file_limit();
        Self { mode, faults: Arc::default() }
    }
}

impl Disk {
    /// A lock, or (as the inner error) who holds it.
    fn attempt_lock(&self, path: &Path) -> Result<Result<Lock>> {
        // A run that ends removes its lock: then what was opened here is no longer what others would open.
        for _ in 0..LOCK_ATTEMPTS {
            self.create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            // The lock's content is replaced: it must not be somebody else's file behind a link.
            system::no_follow(&mut options);
            let mut file = match options.open(path) {
                Err(e) if e.kind() == IoKind::NotFound => continue,
                Err(_) if is_in_the_way(path) || path.is_dir() => return Err(in_the_way(path)),
                other => other.map_err(|e| write_error("create", path, &e))?,
            };
            let metadata = file.metadata().map_err(|e| Error::io("examine", path, &e))?;
            if !system::is_plain(&metadata) {
                return Err(in_the_way(path));
            }
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(Err(locked(path, file))),
                // Without locks (some network file systems) one run per output is up to the user.
                Err(TryLockError::Error(e)) if e.kind() == IoKind::Unsupported => {}
                Err(TryLockError::Error(e)) => return Err(Error::io("lock", path, &e)),
            }
            let held = system::identity_of(&metadata);
            if self.identity(path)?.is_none_or(|there| (there.device, there.inode) != (held.device, held.inode)) {
                continue;
            }
            // Only information for the next one who asks: failing to write it changes nothing.
            let (host, now) = (system::host_name(), system::now_text());
            let holder = format!("process {} on {host} since {now}", std::process::id());
            let _ = file.set_len(0).and_then(|()| file.write_all(holder.as_bytes()));
            // Kept open: the operating system releases the lock when the process ends, however it ends.
            return Ok(Ok(Lock::new(file)));
        }
        Err(Error::failed("others keep taking and removing this lock").at(path).help("wait until they end"))
    }
}

struct DiskInput {
    file: File,
    path: Arc<Path>,
    identity: Identity,
    /// Bytes from which on a range is mapped instead of read.
    mapped_from: usize,
    faults: Arc<Faults>,
}

impl InputFile for DiskInput {
    fn path(&self) -> &Path {
        &self.path
    }

    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn identity_now(&self) -> Result<Identity> {
        self.file.metadata().map(|m| system::identity_of(&m)).map_err(|e| Error::io("examine", &self.path, &e))
    }

    fn identity_there(&self) -> Result<Option<Identity>> {
        identity_at(&self.path)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let wanted = buffer.len();
        let done = read_fully(buffer, |rest, done| system::read_at(&self.file, rest, offset + done))
            .map_err(|e| Error::io(&format!("read {wanted} bytes at {offset}"), &self.path, &e))?;
        if done < wanted {
            let (end, opened) = (offset + done as u64, self.identity.bytes);
            return Err(Error::failed(format!(
                "the file shrank while being read: it had {opened} bytes, but ends at {end}, within {wanted} bytes at {offset}"
            ))
            .at(&self.path)
            .help("do not change inputs during a run; run it again with whole files"));
        }
        Ok(())
    }

    fn load(&self, window: &mut Window, offset: u64, length: usize) -> Result<()> {
        if length >= self.mapped_from && window.map(&self.file, &self.path, &self.faults, offset, length) {
            // A mapping shows zeros between the end of the file and the end of its last page.
            if self.identity_now()?.bytes >= offset + length as u64 {
                return Ok(());
            }
        }
        window.fill(length, |buffer| self.read_at(buffer, offset))
    }

    fn prefetch(&self, offset: u64, length: u64) {
        system::hint(&self.file, offset, length, Hint::WillNeed);
    }
}

struct DiskOutput {
    file: File,
    path: PathBuf,
    failure: OnceLock<Error>,
}

impl DiskOutput {
    /// Runs `operation` unless an earlier one failed, and keeps the first failure.
    fn sticky(&self, operation: impl FnOnce() -> Result<()>) -> Result<()> {
        match self.failure.get() {
            Some(error) => Err(error.clone()),
            None => operation().map_err(|error| self.failure.get_or_init(|| error).clone()),
        }
    }
}

impl OutputFile for DiskOutput {
    fn path(&self) -> &Path {
        &self.path
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.sticky(|| {
            write_fully(bytes, |rest, done| system::write_at(&self.file, rest, offset + done))
                .map_err(|e| write_error(&format!("write {} bytes at {offset}", bytes.len()), &self.path, &e))
        })
    }

    fn sync(&self) -> Result<()> {
        self.sticky(|| self.file.sync_data().map_err(|e| write_error("make durable", &self.path, &e)))
    }

    fn release(&self, offset: u64, length: u64) {
        system::hint(&self.file, offset, length, Hint::DontNeed);
    }
}

impl Storage for Disk {
    fn open(&self, path: &Path) -> Result<Box<dyn InputFile>> {
        let mut options = OpenOptions::new();
        options.read(true);
        system::open_without_waiting(&mut options);
        let file = options.open(path).map_err(|e| open_error(path, &e))?;
        let metadata = file.metadata().map_err(|e| Error::io("examine", path, &e))?;
        if !metadata.is_file() {
            return Err(not_regular(path));
        }
        let identity = system::identity_of(&metadata);
        let mapped_from = match self.mode {
            IoMode::Mmap => 0,
            IoMode::Auto if system::is_local(&file) => LONG_BYTES,
            IoMode::Auto | IoMode::Read => usize::MAX,
        };
        let faults = Arc::clone(&self.faults);
        Ok(Box::new(DiskInput { file, path: path.into(), identity, mapped_from, faults }))
    }

    fn check_mapped(&self) -> Result<()> {
        match self.faults.first() {
            None => Ok(()),
            Some(path) => {
                Err(Error::failed("the file could not be read while it was mapped: it was cut off, or its disk failed")
                    .at(&path)
                    .help("do not change inputs during a run; run it again with whole files, or with --io read"))
            }
        }
    }

    fn create(&self, path: &Path, length: u64) -> Result<Box<dyn OutputFile>> {
        // Readable too, so that what was written can be hashed through the same file system path.
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        // What is behind a link is not this program's to write to.
        system::no_follow(&mut options);
        let file = match options.open(path) {
            Ok(file) if file.metadata().is_ok_and(|metadata| !system::is_plain(&metadata)) => None,
            Err(_) if is_in_the_way(path) => None,
            other => Some(other),
        };
        let file = match file {
            Some(file) => file,
            None => {
                self.remove_file(path)?;
                options.create_new(true).open(path)
            }
        };
        let file = file.map_err(|e| write_error("create", path, &e))?;
        // What an earlier attempt left is no part of it.
        file.set_len(0).map_err(|e| write_error("empty", path, &e))?;
        file.set_len(length).map_err(|e| write_error(&format!("set the length to {length} bytes"), path, &e))?;
        Ok(Box::new(DiskOutput { file, path: path.to_path_buf(), failure: OnceLock::new() }))
    }

    fn reopen(&self, path: &Path, length: u64) -> Result<Box<dyn OutputFile>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        system::no_follow(&mut options);
        // Taken away, the work goes on.
        let file = options.open(path).map_err(|e| match is_in_the_way(path) {
            true => in_the_way(path).as_failed(),
            false => write_error("open", path, &e),
        })?;
        let metadata = file.metadata().map_err(|e| Error::io("examine", path, &e))?;
        if !system::is_plain(&metadata) {
            return Err(in_the_way(path).as_failed());
        }
        if metadata.len() != length {
            file.set_len(length).map_err(|e| write_error(&format!("set the length to {length} bytes"), path, &e))?;
        }
        Ok(Box::new(DiskOutput { file, path: path.to_path_buf(), failure: OnceLock::new() }))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        std::fs::rename(from, to).map_err(|e| match to.is_dir() && !from.is_dir() {
            true => in_the_way(to).as_failed(),
            false => Error::io(&format!("rename to {}", to.display()), from, &e),
        })
    }

    fn sync_dir(&self, path: &Path) -> Result<()> {
        system::sync_directory(path).map_err(|e| Error::io("make durable", path, &e))
    }

    fn create_dir_all(&self, path: &Path) -> Result<()> {
        let is_missing = |dir: &&Path| *dir != Path::new("") && !dir.exists();
        let made: Vec<&Path> = path.ancestors().take_while(is_missing).collect();
        if let Some(link) = made.iter().find(|dir| dir.is_symlink()) {
            return Err(Error::input("a link to a place that is not there")
                .at(link)
                .help("make the directory that it leads to, or remove the link"));
        }
        std::fs::create_dir_all(path).map_err(|e| write_error("create directory", path, &e))?;
        for dir in made.into_iter().rev() {
            let parent = dir.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
            match system::sync_directory(parent) {
                // Somebody else's directory need not be readable for things to be made in it.
                Err(e) if e.kind() == IoKind::PermissionDenied => {}
                other => other.map_err(|e| write_error("make durable", parent, &e))?,
            }
        }
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> Result<()> {
        ignore_missing(std::fs::remove_file(path)).map_err(|e| match path.is_dir() && !path.is_symlink() {
            true => in_the_way(path).as_failed(),
            false => Error::io("remove", path, &e),
        })
    }

    fn remove_dir(&self, path: &Path) -> Result<()> {
        match std::fs::remove_dir(path) {
            Err(e) if e.kind() == IoKind::DirectoryNotEmpty => Ok(()),
            other => ignore_missing(other).map_err(|e| Error::io("remove", path, &e)),
        }
    }

    fn list(&self, path: &Path) -> Result<Vec<OsString>> {
        let fail = |e| Error::io("list", path, &e);
        let entries = std::fs::read_dir(path).map_err(fail)?;
        let mut names = entries.map(|e| e.map(|e| e.file_name())).collect::<std::io::Result<Vec<_>>>().map_err(fail)?;
        names.sort_unstable();
        Ok(names)
    }

    fn lock(&self, path: &Path) -> Result<Lock> {
        self.attempt_lock(path)?
    }

    fn try_lock(&self, path: &Path) -> Result<Option<Lock>> {
        self.attempt_lock(path).map(Result::ok)
    }

    fn free_bytes(&self, path: &Path) -> Result<u64> {
        let absolute = std::path::absolute(path).map_err(|e| Error::io("resolve", path, &e))?;
        let existing = absolute.ancestors().find(|p| p.exists()).unwrap_or(&absolute);
        system::free_bytes(existing).map_err(|e| Error::io("examine the file system", path, &e))
    }

    fn identity(&self, path: &Path) -> Result<Option<Identity>> {
        identity_at(path)
    }

    fn is_there(&self, path: &Path) -> Result<bool> {
        Ok(path.is_symlink() || self.identity(path)?.is_some())
    }

    fn is_dir(&self, path: &Path) -> bool {
        path.is_dir()
    }

    fn is_file(&self, path: &Path) -> bool {
        path.is_file()
    }

    fn canonical(&self, path: &Path) -> PathBuf {
        path.canonicalize().unwrap_or_else(|_| path.to_path_buf())
    }
}

fn identity_at(path: &Path) -> Result<Option<Identity>> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(Some(system::identity_of(&metadata))),
        Err(e) if matches!(e.kind(), IoKind::NotFound | IoKind::NotADirectory) => Ok(None),
        // No file can be called so, or links lead back to themselves.
        Err(e) if system::is_nowhere(&e) => Ok(None),
        Err(e) => Err(Error::io("examine", path, &e)),
    }
}

fn open_error(path: &Path, error: &std::io::Error) -> Error {
    match error.kind() {
        IoKind::NotFound if path.is_symlink() => dangling(path),
        IoKind::NotFound | IoKind::NotADirectory => Error::input("no such file").at(path).help("check the path"),
        _ if system::is_nowhere(error) => {
            Error::input(format!("no such file: {error}")).at(path).help("check the path")
        }
        IoKind::PermissionDenied => Error::input("you may not read this file").at(path).help("change its permissions"),
        // A socket cannot even be opened.
        _ if std::fs::metadata(path).is_ok_and(|m| !m.is_file()) => not_regular(path),
        _ => Error::io("open", path, error),
    }
}

/// A link whose file is gone; in the Hub's cache, because somebody cleaned up or a download was not finished.
fn dangling(path: &Path) -> Error {
    let error = Error::input("a link to a file that is not there").at(path);
    match places::cached(path) {
        Some((id, commit)) => {
            error.help(format!("the Hub cache is incomplete: complete it with `hf download {id} --revision {commit}`"))
        }
        None => error.help("put the file back, or remove the link"),
    }
}

/// Whether a link, or something that is no file, is where this program keeps a file.
fn is_in_the_way(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|metadata| !metadata.is_dir() && !system::is_plain(&metadata))
}

/// It is not this program's to write to.
fn in_the_way(path: &Path) -> Error {
    let (what, help) = match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_symlink() => ("a link to somewhere else", "remove it"),
        Ok(metadata) if metadata.is_file() => {
            ("a file that has another name too (a hard link)", "put a copy in its place")
        }
        Ok(metadata) if metadata.is_dir() => ("a directory", "remove it"),
        _ => ("no regular file", "remove it"),
    };
    Error::input(format!("{what}, where this program keeps a file of its own")).at(path).help(help)
}

fn not_regular(path: &Path) -> Error {
    let what = if path.is_dir() { "a directory, not a file" } else { "not a regular file" };
    Error::input(what).at(path).help("give a checkpoint directory, a .safetensors file, or an .index.json file")
}

fn write_error(what: &str, path: &Path, error: &std::io::Error) -> Error {
    let full = matches!(error.kind(), IoKind::StorageFull | IoKind::QuotaExceeded);
    let failed = Error::io(what, path, error);
    match error.kind() {
        _ if full => failed.help("make room and run the same command again"),
        IoKind::FileTooLarge => failed.help("raise the limit (ulimit -f) and run the same command again"),
        _ => failed,
    }
}

/// Says who holds the lock, as far as the lock file tells.
fn locked(path: &Path, file: File) -> Error {
    const LONGEST_HOLDER: u64 = 200;
    let mut holder = Vec::new();
    // Nothing to add where it cannot be read: on Windows a locked file is not readable.
    let _ = file.take(LONGEST_HOLDER).read_to_end(&mut holder);
    let holder = printable(String::from_utf8_lossy(&holder).trim());
    let holder = if holder.is_empty() { "another process" } else { &holder };
    Error::failed(format!("in use by {holder}"))
        .at(path)
        .help("wait until it ends, or stop it, and run the same command again")
}

fn ignore_missing(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(e) if e.kind() == IoKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(mode: IoMode) -> (tempfile::TempDir, Disk) {
        (tempfile::tempdir().unwrap(), Disk::new(mode))
    }

    #[test]
    fn every_mode_shows_the_same_bytes_at_any_offset() {
        let content: Vec<u8> = (0..100_000u32).map(|i| (i * 7) as u8).collect();
        for mode in [IoMode::Auto, IoMode::Mmap, IoMode::Read] {
            let (dir, disk) = disk(mode);
            let path = dir.path().join("f");
            std::fs::write(&path, &content).unwrap();
            let file = disk.open(&path).unwrap();
            let mut window = Window::with_capacity(70_000);
            for (offset, length) in [(0, 70_000), (1, 1), (4095, 2), (99_999, 1), (100_000, 0), (50_000, 50_000)] {
                file.load(&mut window, offset as u64, length).unwrap();
                assert_eq!(window.bytes(), &content[offset..offset + length], "{mode:?} {offset}");
            }
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn long_ranges_of_local_files_are_mapped() {
        let (dir, disk) = disk(IoMode::Auto);
        let path = dir.path().join("f");
        let content: Vec<u8> = (0..3 << 20).map(|i: u32| (i * 7) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let file = disk.open(&path).unwrap();
        let local = system::is_local(&File::open(&path).unwrap());
        for length in [LONG_BYTES - 1, LONG_BYTES, content.len()] {
            let mut window = Window::with_capacity(content.len());
            file.load(&mut window, 0, length).unwrap();
            assert!(window.bytes() == &content[..length]);
            assert_eq!(window.is_mapped(), local && length >= LONG_BYTES);
        }
    }

    #[test]
    fn a_file_that_ends_early_is_an_error_with_numbers() {
        for mode in [IoMode::Mmap, IoMode::Read] {
            let (dir, disk) = disk(mode);
            let path = dir.path().join("f");
            std::fs::write(&path, vec![1u8; 10_000]).unwrap();
            let file = disk.open(&path).unwrap();
            std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(5_000).unwrap();
            let error = file.load(&mut Window::with_capacity(8_000), 1_000, 8_000).unwrap_err().to_string();
            assert!(error.contains("shrank while being read: it had 10000 bytes, but ends at 5000"), "{error}");
        }
    }

    #[test]
    fn only_regular_files_are_opened() {
        let (dir, disk) = disk(IoMode::Auto);
        assert_eq!(disk.open(dir.path()).err().unwrap().exit_code(), 2);
        assert!(disk.open(&dir.path().join("none")).err().unwrap().to_string().contains("no such file"));
        assert!(disk.open(dir.path()).err().unwrap().to_string().contains("a directory, not a file"));
        std::fs::write(dir.path().join("f"), b"").unwrap();
        assert_eq!(disk.open(&dir.path().join("f/g")).err().unwrap().exit_code(), 2);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn what_is_no_file_is_refused_without_waiting() {
        use rustix::fs::{CWD, FileType, Mode, mknodat};
        let (dir, disk) = disk(IoMode::Auto);
        let fifo = dir.path().join("fifo");
        mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        for path in [&*fifo, &*socket, Path::new("/dev/zero")] {
            let error = disk.open(path).err().unwrap();
            assert!(error.to_string().contains("not a regular file") && error.exit_code() == 2, "{error}");
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn the_first_failure_of_an_output_is_sticky() {
        let file = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let output = DiskOutput { file, path: "shard".into(), failure: OnceLock::new() };
        let first = output.write_at(b"x", 0).unwrap_err().to_string();
        assert!(first.contains("make room"), "{first}");
        assert_eq!(output.sync().unwrap_err().to_string(), first);
    }

    #[test]
    fn hints_on_empty_ranges_and_changes_of_an_open_file_are_harmless() {
        let (dir, disk) = disk(IoMode::Auto);
        let path = dir.path().join("f");
        std::fs::write(&path, b"abc").unwrap();
        let file = disk.open(&path).unwrap();
        file.prefetch(0, 0);
        file.prefetch(0, u64::MAX);
        assert_eq!(file.identity(), &file.identity_now().unwrap());
        assert_eq!(disk.identity(&path).unwrap().as_ref(), Some(file.identity()));
        std::fs::write(&path, b"abcd").unwrap();
        assert_ne!(file.identity(), &file.identity_now().unwrap());
    }

    #[test]
    fn small_files_appear_whole() {
        let (dir, disk) = disk(IoMode::Auto);
        let path = dir.path().join("a.json");
        disk.write_small(&path, b"{}", dir.path()).unwrap();
        assert_eq!(disk.read_small(&path, 2).unwrap(), b"{}");
        assert_eq!(disk.list(dir.path()).unwrap(), ["a.json"]);
    }

    #[test]
    fn locks_exclude() {
        let (dir, disk) = disk(IoMode::Auto);
        let path = dir.path().join("work/lock");
        let held = disk.lock(&path).unwrap();
        let refused = disk.lock(&path).err().unwrap();
        assert!(refused.to_string().contains(&format!("in use by process {} on ", std::process::id())), "{refused}");
        assert_eq!(refused.as_input().exit_code(), 1);
        drop(held);
        disk.lock(&path).unwrap();
    }

    #[test]
    fn a_lock_that_was_removed_meanwhile_is_no_lock() {
        let (dir, disk) = disk(IoMode::Auto);
        let path = dir.path().join("work/lock");
        // Threads take the lock and remove it, as runs that end do: never do two believe that they hold it.
        let holders = std::sync::atomic::AtomicUsize::new(0);
        let taken = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..300 {
                        let Ok(held) = disk.lock(&path) else { continue };
                        assert_eq!(holders.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                        taken.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        holders.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                        disk.remove_file(&path).unwrap();
                        drop(held);
                    }
                });
            }
        });
        assert!(taken.into_inner() > 1);
    }

    #[test]
    fn a_reopened_file_keeps_what_it_holds() {
        let (dir, disk) = disk(IoMode::Auto);
        let path = dir.path().join("f");
        std::fs::write(&path, b"abcdef").unwrap();
        disk.reopen(&path, 4).unwrap().write_at(b"X", 1).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"aXcd");
        disk.reopen(&path, 6).unwrap();
        assert_eq!(disk.read_small(&path, 6).unwrap(), b"aXcd\0\0");
        assert!(disk.read_small(&path, 5).is_err());
        assert!(disk.reopen(&dir.path().join("none"), 1).is_err());
    }

    #[test]
    fn a_directory_in_the_place_of_a_file_is_named() {
        let (dir, disk) = disk(IoMode::Auto);
        let (from, to) = (dir.path().join("README.md.partial"), dir.path().join("README.md"));
        std::fs::write(&from, b"").unwrap();
        std::fs::create_dir(&to).unwrap();
        for error in [disk.rename(&from, &to).unwrap_err(), disk.remove_file(&to).unwrap_err()] {
            assert!(error.to_string().contains("README.md: a directory, where this program keeps"), "{error}");
            assert_eq!(error.exit_code(), 1);
        }
    }

    #[test]
    #[cfg(unix)]
    fn nothing_is_written_through_a_link() {
        let (dir, disk) = disk(IoMode::Auto);
        let (target, link) = (dir.path().join("input"), dir.path().join("out.partial"));
        std::fs::write(&target, b"precious").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        assert!(disk.reopen(&link, 3).is_err());
        disk.create(&link, 3).unwrap().write_at(b"abc", 0).unwrap();
        assert_eq!(
            (std::fs::read(&target).unwrap(), std::fs::read(&link).unwrap()),
            (b"precious".into(), b"abc".into())
        );
    }

    #[test]
    #[cfg(unix)]
    fn nothing_is_written_to_a_file_with_another_name_or_to_none() {
        let (dir, disk) = disk(IoMode::Auto);
        let (other, path) = (dir.path().join("copy of the work"), dir.path().join("out.partial"));
        std::fs::write(&other, b"precious").unwrap();
        std::fs::hard_link(&other, &path).unwrap();
        for error in [disk.reopen(&path, 3).map(drop), disk.lock(&path).map(drop)].map(Result::unwrap_err) {
            assert!(error.to_string().contains("a hard link"), "{error}");
        }
        disk.create(&path, 3).unwrap().write_at(b"abc", 0).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"abc");
        std::fs::remove_file(&path).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        for error in [disk.reopen(&path, 3).map(drop), disk.lock(&path).map(drop)].map(Result::unwrap_err) {
            assert!(error.to_string().contains("no regular file"), "{error}");
        }
        disk.create(&path, 3).unwrap().write_at(b"abc", 0).unwrap();
        assert_eq!(
            (std::fs::read(&path).unwrap(), std::fs::read(&other).unwrap()),
            (b"abc".into(), b"precious".into())
        );
    }

    #[test]
    fn outputs_are_written_by_position_and_missing_things_removed_in_peace() {
        let (dir, disk) = disk(IoMode::Auto);
        let path = dir.path().join("out");
        let file = disk.create(&path, 10).unwrap();
        file.write_at(b"cd", 2).unwrap();
        file.write_at(b"ab", 0).unwrap();
        file.sync().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"abcd\0\0\0\0\0\0");
        disk.remove_file(&dir.path().join("none")).unwrap();
        disk.remove_dir(&dir.path().join("none")).unwrap();
        disk.remove_dir(dir.path()).unwrap();
        assert!(path.exists(), "a directory that is not empty stays");
        assert!(disk.free_bytes(&dir.path().join("no/such/dir")).unwrap() > 0);
        assert_eq!(disk.identity(&dir.path().join("none")).unwrap(), None);
    }
}
