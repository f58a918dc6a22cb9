//! `tiesmith run`: one part of a planned merge.

use std::fmt::Write;
use std::path::Path;

use tiesmith::{Error, Observer, PartReport, Result, printable};

use super::args::RunPartArgs;
use super::job::{self, Planned};
use super::progress::Progress;
use super::{human, print, print_json, signals};

/// Runs the command.
pub fn run(args: &RunPartArgs) -> Result<u8> {
    signals::install();
    let part = args.part.resolve(|name| std::env::var(name).ok())?;
    let progress = Progress::new(args.report.progress);
    let Planned { args: planned, plan, job, storage } = job::load(&args.job, args.io, &progress)?;
    // Where nothing is that all parts share, a part would do everything by itself, and in vain.
    if let Some(dir) = job.out.parent().filter(|dir| *dir != Path::new("") && !storage.is_dir(dir)) {
        return Err(Error::input(format!(
            "there is no directory {} on this machine",
            printable(&dir.to_string_lossy())
        ))
        .at(&job.out)
        .help("parts share it, as 'tiesmith plan --save' made it: mount it here"));
    }
    let run = job::run(&planned, &args.resources);
    let report = tiesmith::run_part(&plan, &job, part, args.stage, run, &storage, &progress)?;
    for warning in &report.warnings {
        progress.warn(warning);
    }
    drop(progress);
    if args.report.json {
        return print_json(&report);
    }
    print(&summary(&report))
}

fn summary(report: &PartReport) -> String {
    let mut text = String::new();
    let mut line = |label: &str, value: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{label:<15} {value}");
    };
    let done = match (report.sketched, report.merged) {
        _ if report.done_before => "was done before",
        (_, true) => "merged",
        (true, false) => "sketched",
        (false, false) => "not sketched",
    };
    line("part", format!("{} of {}: {done}", report.part, report.parts));
    line("output", printable(&report.out));
    if report.merged {
        line(
            "written",
            format!("{} in {}", human::bytes(report.bytes_written), human::plural(report.shards as u64, "shard")),
        );
    }
    if !report.done_before {
        line("read", human::bytes(report.bytes_read));
        let rate = human::rate(report.bytes_read + report.bytes_written, report.wall_seconds);
        line("time", format!("{}, {rate} read and written", human::duration(report.wall_seconds)));
    }
    if let Some(bytes) = report.peak_memory_bytes {
        line("peak memory", human::bytes(bytes));
    }
    text
}
