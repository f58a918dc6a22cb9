//! Runs a program and measures it: wall and CPU time, storage bytes, and when its stages began.
//!
//! Everything about one run is in one child process. CPU time and storage bytes are what the system adds to this
//! process's account of waited-for children, so children must run one at a time. Off Linux these read as zero.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::Value;

/// Ticks of the CPU times in `/proc`, per second: fixed by Linux's interface.
const TICKS: f64 = 100.0;

/// What one run cost.
pub struct Run {
    /// From before the start to after the end, in seconds.
    pub wall: f64,
    /// User and system time, in seconds.
    pub cpu: f64,
    /// What everything else on the machine used meanwhile, as a share of all cores.
    pub disturbance: f64,
    /// Bytes fetched from storage, not from the page cache.
    pub storage_bytes: u64,
    /// What it printed.
    pub report: Value,
    /// Stages that it announced (`--progress json`), with their durations in seconds.
    pub stages: Vec<(String, f64)>,
}

impl Run {
    /// A number of the report, zero if it has none.
    pub fn number(&self, name: &str) -> u64 {
        self.report[name].as_u64().unwrap_or_default()
    }
}

/// Runs `command`, which prints one JSON object.
pub fn run(command: &mut Command) -> Run {
    let (cpu, storage, busy) = (children_cpu(), storage_bytes(), machine_cpu());
    let begin = Instant::now();
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the child starts");
    let mut marks = Vec::new();
    let mut messages = String::new();
    // Beside the other stream: a report may be longer than a pipe holds.
    let mut stdout = child.stdout.take().expect("piped");
    let report = std::thread::spawn(move || {
        let mut output = String::new();
        stdout.read_to_string(&mut output).map(|_| output)
    });
    for line in BufReader::new(child.stderr.take().expect("piped")).lines().map_while(Result::ok) {
        match serde_json::from_str::<Value>(&line).unwrap_or_default()["stage"].as_str() {
            Some(stage) if marks.last().is_none_or(|(last, _)| last != stage) => {
                marks.push((stage.to_string(), begin.elapsed().as_secs_f64()));
            }
            _ => messages += &line,
        }
    }
    let output = report.join().expect("a thread that reads").expect("a report in UTF-8");
    let status = child.wait().expect("a child to wait for");
    let wall = begin.elapsed().as_secs_f64();
    assert!(status.success(), "{command:?}: {messages}");
    let cpu = children_cpu() - cpu;
    let cores = std::thread::available_parallelism().map_or(1.0, |cores| usize::from(cores) as f64);
    let ends = marks.iter().skip(1).map(|(_, at)| *at).chain([wall]).collect::<Vec<_>>();
    Run {
        wall,
        cpu,
        // Short runs are off by a tick or two, in either direction.
        disturbance: ((machine_cpu() - busy - cpu) / cores / wall).max(0.0),
        storage_bytes: storage_bytes() - storage,
        report: serde_json::from_str(&output).expect("a report in JSON"),
        stages: marks.into_iter().zip(ends).map(|((name, begin), end)| (name, end - begin)).collect(),
    }
}

/// User and system seconds of all children waited for.
fn children_cpu() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the name, which may contain anything: state is field 3, cutime and cstime are fields 16 and 17.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(13).take(2);
    fields.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / TICKS
}

/// Seconds that all cores together have spent busy or taken away by a hypervisor.
fn machine_cpu() -> f64 {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let ticks: Vec<f64> = stat.split_whitespace().skip(1).take(8).filter_map(|ticks| ticks.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal
    ticks.iter().enumerate().filter(|(field, _)| ![3, 4].contains(field)).map(|(_, ticks)| ticks).sum::<f64>() / TICKS
}

/// Bytes fetched from storage by this process and all children waited for.
fn storage_bytes() -> u64 {
    number_in("/proc/self/io", "read_bytes:")
}

/// Peak resident memory of this process in bytes.
pub fn peak_memory_bytes() -> u64 {
    number_in("/proc/self/status", "VmHWM:") * 1024
}

/// The number after `label` at the beginning of a line.
fn number_in(file: &str, label: &str) -> u64 {
    let text = fs::read_to_string(file).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(label)).unwrap_or_default();
    line.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or_default()
}
