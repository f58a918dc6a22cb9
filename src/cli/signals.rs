//! Signals that ask a run to stop.
//!
//! - The first one sets a flag that workers look at; the run then keeps what it did and ends with 128 + its number. A
//!   second one ends the process at once.
//! - A signal that the caller ignores (as `nohup` does) stays ignored.
//! - A file that grows beyond the limit of the process is an error of the write, not a signal.

#[cfg(unix)]
mod unix {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::sync::{Arc, LazyLock};

    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    use signal_hook::flag;

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

/// From now on, signals to stop are taken note of.
pub fn install() {
    unix::install();
}

/// The signal that asked the run to stop.
pub fn received() -> Option<u8> {
    unix::received()
}
