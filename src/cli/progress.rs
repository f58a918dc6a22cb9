//! Progress on stderr: a bar, plain lines, or JSON lines.
//!
//! - Workers only add to an atomic counter; a background thread looks at it and draws.
//! - Every warning is said once, however often and from wherever it arrives.
//! - A stage that ends before the first tick costs one line, or nothing on a bar.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use tiesmith::Observer;

use super::{human, output, signals};

/// What `--progress` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// A bar on a terminal, else plain lines.
    Auto,
    /// A bar; where there is no terminal to draw it on, plain lines.
    Bar,
    /// Lines of text.
    Plain,
    /// Lines of JSON.
    Json,
    /// Warnings only.
    None,
    /// What `Auto` becomes without a terminal: lines of text about stages that last, so that a short run says nothing.
    Sparse,
}

/// Where lines go: stderr, except in tests.
type Sink = Box<dyn Fn(&str) + Send + Sync>;

/// Seconds over which the rate is smoothed.
const SMOOTHING_SECONDS: f64 = 10.0;

/// See the module's documentation. Dropping it ends the current stage.
pub struct Progress {
    shared: Arc<Shared>,
    ticker: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    /// Never [`Mode::Auto`].
    mode: Mode,
    sink: Sink,
    /// Bytes done in the current stage.
    done: AtomicU64,
    stage: Mutex<Option<Stage>>,
    warned: Mutex<HashSet<String>>,
    stopped: Mutex<bool>,
    stop: Condvar,
}

struct Stage {
    name: String,
    bytes: u64,
    bar: Option<ProgressBar>,
    meter: Meter,
}

impl Progress {
    /// Progress on stderr. Prints nothing yet.
    pub fn new(mode: Mode) -> Self {
        let mode = match mode {
            Mode::Auto if ProgressDrawTarget::stderr().is_hidden() => Mode::Sparse,
            Mode::Bar if ProgressDrawTarget::stderr().is_hidden() => Mode::Plain,
            Mode::Auto => Mode::Bar,
            mode => mode,
        };
        Self::with_sink(mode, Box::new(output::stderr_line))
    }

    /// Whether somebody watches: then warnings are worth saying before the work, not only after it.
    pub fn is_watched(&self) -> bool {
        self.shared.mode == Mode::Bar
    }

    /// Says that a server asks to wait.
    pub fn waits(&self) -> impl Fn(&str, Duration) + Send + Sync + use<> {
        let shared = Arc::clone(&self.shared);
        move |host, time| shared.wait(host, time)
    }

    fn with_sink(mode: Mode, sink: Sink) -> Self {
        let shared = Shared {
            mode,
            sink,
            done: AtomicU64::new(0),
            stage: Mutex::default(),
            warned: Mutex::default(),
            stopped: Mutex::default(),
            stop: Condvar::new(),
        };
        Self { shared: Arc::new(shared), ticker: Mutex::default() }
    }

    fn start_ticking(&self) {
        let period = match self.shared.mode {
            Mode::Bar => Duration::from_millis(100),
            Mode::Json => Duration::from_secs(1),
            Mode::Plain | Mode::Sparse => Duration::from_secs(10),
            Mode::Auto | Mode::None => return,
        };
        let mut ticker = lock(&self.ticker);
        if ticker.is_none() {
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new().name("progress".into());
            // Without a thread to spare there is no progress to see, but the work goes on.
            *ticker = thread.spawn(move || shared.tick_until_stopped(period)).ok();
        }
    }
}

impl Observer for Progress {
    fn stage(&self, name: &str, bytes: u64) {
        let shared = &self.shared;
        let mut stage = lock(&shared.stage);
        let last = stage.take();
        // The groups of a probe and the like follow each other: one line says it.
        let again = last.as_ref().is_some_and(|last| last.name == name);
        shared.close(last);
        shared.done.store(0, Ordering::Relaxed);
        match shared.mode {
            Mode::Plain if again => {}
            Mode::Plain if bytes == 0 => (shared.sink)(name),
            Mode::Plain => (shared.sink)(&format!("{name}: {}", human::bytes(bytes))),
            Mode::Json => shared.json(&json!({"event": "stage", "stage": name, "bytes": bytes})),
            Mode::Auto | Mode::Bar | Mode::None | Mode::Sparse => {}
        }
        let bar = (shared.mode == Mode::Bar).then(|| bar(name, bytes));
        *stage = Some(Stage { name: name.into(), bytes, bar, meter: Meter::new(Instant::now()) });
        drop(stage);
        self.start_ticking();
    }

    fn advance(&self, bytes: u64) {
        self.shared.done.fetch_add(bytes, Ordering::Relaxed);
    }

    fn warn(&self, message: &str) {
        let shared = &self.shared;
        if !lock(&shared.warned).insert(message.to_string()) {
            return;
        }
        if shared.mode == Mode::Json {
            return shared.json(&json!({"event": "warning", "message": message}));
        }
        shared.line(&format!("warning: {}", output::one_line(message)));
    }

    fn stopped(&self) -> bool {
        signals::received().is_some()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        *lock(&self.shared.stopped) = true;
        self.shared.stop.notify_all();
        if let Some(ticker) = lock(&self.ticker).take() {
            let _ = ticker.join();
        }
        self.shared.close(lock(&self.shared.stage).take());
    }
}

impl Shared {
    fn json(&self, event: &serde_json::Value) {
        (self.sink)(&event.to_string());
    }

    /// A line of text, above the bar if there is one.
    fn line(&self, line: &str) {
        match &*lock(&self.stage) {
            Some(Stage { bar: Some(bar), .. }) => bar.suspend(|| (self.sink)(line)),
            _ => (self.sink)(line),
        }
    }

    fn wait(&self, host: &str, time: Duration) {
        match self.mode {
            Mode::None => {}
            Mode::Json => self.json(&json!({"event": "wait", "host": host, "seconds": time.as_secs()})),
            _ => self.line(&format!("{} asks to wait {}", output::one_line(host), human::duration(time.as_secs_f64()))),
        }
    }

    /// Leaves the stage's bar where it got to.
    fn close(&self, stage: Option<Stage>) {
        if let Some(Stage { bar: Some(bar), mut meter, bytes, .. }) = stage {
            let done = self.done.load(Ordering::Relaxed);
            bar.set_position(done);
            bar.set_message(meter.at(Instant::now(), done).closing(bytes));
            bar.abandon();
            // The cursor is left behind the bar.
            (self.sink)("");
        }
    }

    fn tick_until_stopped(&self, period: Duration) {
        let mut stopped = lock(&self.stopped);
        while !*stopped {
            let (guard, timeout) = self.stop.wait_timeout(stopped, period).unwrap_or_else(PoisonError::into_inner);
            stopped = guard;
            if timeout.timed_out() && !*stopped {
                self.tick();
            }
        }
    }

    fn tick(&self) {
        let mut stage = lock(&self.stage);
        let Some(stage) = stage.as_mut() else { return };
        let done = self.done.load(Ordering::Relaxed);
        let reading = stage.meter.at(Instant::now(), done);
        let left = reading.seconds_left(stage.bytes);
        match self.mode {
            Mode::Bar => {
                let Some(bar) = &stage.bar else { return };
                bar.set_position(done);
                bar.set_message(reading.words(stage.bytes));
            }
            Mode::Plain | Mode::Sparse => {
                let share = human::percent(done as f64 / stage.bytes.max(1) as f64);
                (self.sink)(&format!("{}: {share}, {}", stage.name, reading.words(stage.bytes)));
            }
            Mode::Json => self.json(&json!({
                "event": "progress",
                "stage": stage.name,
                "bytes_done": done,
                "bytes_total": stage.bytes,
                "bytes_per_second": reading.rate.round() as u64,
                "seconds_left": left.map(|seconds| seconds.round() as u64),
            })),
            Mode::Auto | Mode::None => {}
        }
    }
}

fn bar(name: &str, bytes: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(bytes), ProgressDrawTarget::stderr_with_hz(10));
    let style = ProgressStyle::with_template("{prefix:<8} [{wide_bar}] {percent:>3} %  {msg}");
    if let Ok(style) = style {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_prefix(name.to_string());
    bar
}

/// Smooths a rate over irregular readings.
struct Meter {
    start: Instant,
    last: Instant,
    last_done: u64,
    rate: f64,
}

/// What a [`Meter`] shows.
struct Reading {
    done: u64,
    elapsed_seconds: f64,
    /// Bytes per second.
    rate: f64,
}

impl Meter {
    fn new(now: Instant) -> Self {
        Self { start: now, last: now, last_done: 0, rate: 0.0 }
    }

    fn at(&mut self, now: Instant, done: u64) -> Reading {
        let seconds = now.duration_since(self.last).as_secs_f64();
        let elapsed_seconds = now.duration_since(self.start).as_secs_f64();
        if seconds > 0.0 {
            let rate = done.saturating_sub(self.last_done) as f64 / seconds;
            // The weight of what is older than SMOOTHING_SECONDS fades; at first the plain average is shown.
            let fresh = if elapsed_seconds < SMOOTHING_SECONDS {
                seconds / elapsed_seconds
            } else {
                1.0 - (-seconds / SMOOTHING_SECONDS).exp()
            };
            self.rate += (rate - self.rate) * fresh;
            (self.last, self.last_done) = (now, done);
        }
        Reading { done, elapsed_seconds, rate: self.rate }
    }
}

impl Reading {
    fn seconds_left(&self, total: u64) -> Option<f64> {
        let left = total.checked_sub(self.done)?;
        (self.rate >= 1.0).then(|| left as f64 / self.rate)
    }

    /// `12.3 GB of 54 GB, 1.2 GB/s, 35 s left`.
    fn words(&self, total: u64) -> String {
        let left = self.seconds_left(total).map(|s| format!(", {} left", human::duration(s.ceil())));
        format!("{}, {}{}", self.of(total), human::rate(self.rate as u64, 1.0), left.unwrap_or_default())
    }

    /// `54 GB of 54 GB, 1.2 GB/s, 45 s`.
    fn closing(&self, total: u64) -> String {
        let rate = human::rate(self.done, self.elapsed_seconds);
        format!("{}, {rate}, {}", self.of(total), human::duration(self.elapsed_seconds))
    }

    fn of(&self, total: u64) -> String {
        format!("{} of {}", human::bytes(self.done), human::bytes(total))
    }
}

/// A panic elsewhere must not keep the rest from being told.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(mode: Mode, act: impl FnOnce(&Progress)) -> Vec<String> {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&lines);
        let progress = Progress::with_sink(mode, Box::new(move |line| lock(&sink).push(line.to_string())));
        act(&progress);
        drop(progress);
        std::mem::take(&mut lock(&lines))
    }

    fn short_run(progress: &Progress) {
        progress.stage("sketch", 2_000_000);
        progress.advance(2_000_000);
        progress.warn("odd\nname");
        progress.warn("odd\nname");
        progress.stage("merge", 3_000_000);
        progress.advance(3_000_000);
    }

    #[test]
    fn a_short_run_prints_its_stages_and_each_warning_once() {
        let lines = record(Mode::Plain, short_run);
        assert_eq!(lines, ["sketch: 2 MB", "warning: odd\\u{a}name", "merge: 3 MB"]);
    }

    #[test]
    fn json_lines_are_objects() {
        let lines = record(Mode::Json, |progress| {
            short_run(progress);
            progress.shared.tick();
        });
        let events: Vec<serde_json::Value> = lines.iter().map(|l| serde_json::from_str(l).unwrap()).collect();
        let kinds: Vec<&str> = events.iter().map(|e| e["event"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["stage", "warning", "stage", "progress"]);
        assert_eq!((&events[3]["bytes_done"], &events[3]["stage"]), (&json!(3_000_000), &json!("merge")));
        assert_eq!(events[1]["message"], "odd\nname");
    }

    #[test]
    fn silence_still_warns() {
        assert_eq!(record(Mode::None, short_run), ["warning: odd\\u{a}name"]);
    }

    #[test]
    fn the_rate_follows_what_happens() {
        let start = Instant::now();
        let mut meter = Meter::new(start);
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(meter.at(after(2), 200).rate, 100.0);
        assert_eq!(meter.at(after(4), 400).words(1400), "400 B of 1.4 kB, 100 B/s, 10 s left");
        let slowed = meter.at(after(64), 400);
        assert!(slowed.rate < 1.0, "{}", slowed.rate);
        assert_eq!(slowed.words(1400), "400 B of 1.4 kB, 0 B/s");
        assert_eq!(meter.at(after(64), 1400).closing(1400), "1.4 kB of 1.4 kB, 21 B/s, 1 min 4 s");
    }
}
