//! Signals that ask a run to stop.
//!
//! - The first one sets a flag that workers look at; the run then keeps what it did and ends with 128 + its number. A
//!   second one ends the process at once.
//! - Work that does not get to look at the flag in time (a long computation, a file system that hangs) is ended: what is
//!   journalled is kept, as after a kill.
//! - A signal that the caller ignores (as `nohup` does) stays ignored.
//! - A file that grows beyond the limit of the process is an error of the write, not a signal.

use std::sync::atomic::{AtomicBool, Ordering};

#[cfg(unix)]
mod unix {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::sync::{Arc, LazyLock};

    use std::io::Read as _;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    use signal_hook::{flag, low_level};

    use crate::cli::output;
    use tiesmith::Error;

    /// How long work has to end by itself.
    const PATIENCE: Duration = Duration::from_millis(1500);
    /// How long the last line has to be written.
    const LAST_LINE: Duration = Duration::from_millis(300);

    const GO_ON: &str = "run the same command again to go on";

    static RECEIVED: LazyLock<Arc<AtomicUsize>> = LazyLock::new(Arc::default);

    pub fn install() {
        let stopping = Arc::new(AtomicBool::new(false));
        let ignored = ignored();
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            if ignored >> (signal - 1) & 1 == 1 {
                continue;
            }
            // Without a handler the signal ends the process as ever: what is journalled is kept even then.
            let _ = flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&stopping));
            let _ = flag::register(signal, Arc::clone(&stopping));
            let _ = flag::register_usize(signal, Arc::clone(&RECEIVED), signal as usize);
        }
        // Without one the run takes as long as it takes.
        let _ = watch(ignored);
    }

    /// Starts a thread that ends the process if it does not end in time after a signal.
    fn watch(ignored: u64) -> std::io::Result<()> {
        let (mut told, tell) = UnixStream::pair()?;
        for signal in [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| ignored >> (signal - 1) & 1 == 0) {
            low_level::pipe::register(signal, tell.try_clone()?)?;
        }
        let end = move || {
            if told.read_exact(&mut [0]).is_err() {
                return;
            }
            std::thread::sleep(PATIENCE);
            if super::has_last_word() {
                // Whoever reads it may have stopped reading.
                let say = || output::error(&Error::interrupted("interrupted").help(GO_ON));
                let said = thread("last line").spawn(say);
                let begin = std::time::Instant::now();
                while said.as_ref().is_ok_and(|said| !said.is_finished()) && begin.elapsed() < LAST_LINE {
                    std::thread::sleep(Duration::from_millis(1));
                }
                low_level::exit(received().map_or(1, |signal| 128 + i32::from(signal)));
            }
        };
        thread("signals").spawn(end).map(drop)
    }

    fn thread(name: &str) -> std::thread::Builder {
        std::thread::Builder::new().name(name.into()).stack_size(1 << 16)
    }

    pub fn survive_file_limit() {
        let unread = Arc::new(AtomicBool::new(false));
        let _ = flag::register(rustix::process::Signal::XFSZ.as_raw(), unread);
    }

    pub fn received() -> Option<u8> {
        match RECEIVED.load(Ordering::Relaxed) {
            0 => None,
            signal => Some(signal as u8),
        }
    }

    /// The signals that are ignored, a bit each, where the system tells.
    fn ignored() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
    }
}

/// Elsewhere the system's own handling stands: the process ends, and what is journalled is kept.
#[cfg(not(unix))]
mod unix {
    pub fn install() {}

    pub fn survive_file_limit() {}

    pub fn received() -> Option<u8> {
        None
    }
}

/// From now on, a file that is too long for the limit of the process is an error of the write.
pub fn survive_file_limit() {
    unix::survive_file_limit();
}

/// Whether how the command ended was said.
static SAID: AtomicBool = AtomicBool::new(false);

/// Whether the caller is the one to say how the command ended: the first who asks.
fn has_last_word() -> bool {
    !SAID.swap(true, Ordering::SeqCst)
}

/// Leaves it to the caller to end the process, unless that is happening.
pub fn settle() {
    while !has_last_word() {
        std::thread::park();
    }
}

/// From now on, signals to stop are taken note of.
pub fn install() {
    unix::install();
}

/// The signal that asked the run to stop.
pub fn received() -> Option<u8> {
    unix::received()
}
