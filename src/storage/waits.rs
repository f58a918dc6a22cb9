//! Waits that servers ask for: a word is said of each, for they can take minutes.
//!
//! Requests that are under way together are told to wait together: of a host, a wait that is not over stands for those that follow.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::http::origin;

/// Who is told of a wait: the host that asks for it, and how long it takes.
pub type Listener = Box<dyn Fn(&str, Duration) + Send + Sync>;

/// A wait that a server asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wait {
    /// Its name and port.
    pub host: String,
    pub time: Duration,
}

impl Wait {
    /// One that what answers at `url` asks for.
    pub(super) fn at(url: &str, time: Duration) -> Self {
        let host = origin(url).split_once("://").map_or(origin(url), |(_, host)| host);
        Self { host: host.to_owned(), time }
    }
}

/// See the module's documentation.
#[derive(Default)]
pub(super) struct Waits {
    listener: Option<Listener>,
    /// When the wait ends that was told of, by host.
    told: Mutex<HashMap<String, Instant>>,
}

impl std::fmt::Debug for Waits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Waits").field("told", &self.told).finish_non_exhaustive()
    }
}

impl Waits {
    pub(super) fn new(listener: Listener) -> Self {
        Self { listener: Some(listener), told: Mutex::default() }
    }

    /// A request waits as `wait` says.
    pub(super) fn begin(&self, wait: &Wait) {
        let Some(listener) = &self.listener else { return };
        let (now, mut told) = (Instant::now(), self.told.lock().unwrap_or_else(PoisonError::into_inner));
        if told.get(&wait.host).is_some_and(|end| now < *end) {
            return;
        }
        told.insert(wait.host.clone(), now + wait.time);
        listener(&wait.host, wait.time);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_wait_of_a_host_is_told_once() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let hears = Arc::clone(&told);
        let waits = Waits::new(Box::new(move |host, time| hears.lock().unwrap().push((host.to_owned(), time))));
        let (long, short) = (Duration::from_secs(100), Duration::ZERO);
        for (url, time) in [
            ("https://a.b:1/c?d", long),
            ("https://a.b:1/other", long),
            ("https://b/c", short),
            // The one before is over.
            ("https://b/c", short),
        ] {
            waits.begin(&Wait::at(url, time));
        }
        let host = |host: &str, time| (host.to_owned(), time);
        assert_eq!(*told.lock().unwrap(), [host("a.b:1", long), host("b", short), host("b", short)]);
    }
}
