//! `tiesmith pack` and `tiesmith unpack`: a checkpoint as what differs from its base, and back.

use tiesmith::{PackOutput, PackReport, Plan, Recipe, Report, Result, printable};

use super::args::{PackArgs, UnpackArgs};
use super::progress::Progress;
use super::{human, lower, make, print, print_json, signals};

/// What the help of `pack` shows.
pub const EXAMPLES: &str = "\
Examples:
  The 20 % of the task vector with the largest magnitudes: about six times smaller
    tiesmith pack chat --base llama --density 0.2 --out chat.tvz
  All that differs, whatever it is
    tiesmith pack chat --base llama --density 1 --out chat.tvz
  A packed task vector is trimmed already
    tiesmith merge --base llama --model chat.tvz --model code.tvz --density 1 --out merged";

/// Packs.
pub fn pack(args: &PackArgs) -> Result<u8> {
    let progress = Progress::new(args.run.report.progress);
    let storage = super::inputs(&args.run, &progress)?;
    signals::install();
    let recipe = Recipe {
        scope: args.thresholds.scope,
        threshold: args.thresholds.threshold,
        trim_ties: args.thresholds.trim_ties,
        seed: args.seed,
        ..Recipe::packing(&args.checkpoint, &args.base, args.density)
    };
    let plan = Plan::new(&recipe, &storage)?;
    let output = PackOutput { file: args.out.clone(), force: args.force };
    let report = tiesmith::pack(&plan, lower::run(&args.run), &output, &storage, &progress)?;
    for warning in &report.warnings {
        tiesmith::Observer::warn(&progress, warning);
    }
    drop(progress);
    if args.run.report.json {
        return print_json(&report);
    }
    print(&packed(&report))
}

/// Unpacks.
pub fn unpack(args: &UnpackArgs) -> Result<u8> {
    let recipe =
        Recipe { packed_base: args.base.clone(), max_shard_bytes: args.max_shard_size, ..Recipe::copying(&args.file) };
    make::run(&recipe, &args.place, &args.run, unpacked)
}

fn packed(report: &PackReport) -> String {
    let mut text = String::new();
    let mut line = |label, value: String| human::line(&mut text, label, &value);
    line("packed into", printable(&report.out));
    let tensors = human::plural(report.tensors, "tensor");
    line("contents", format!("{tensors}, {} parameters", human::count(report.elements)));
    line("stored", format!("{} of what base has too", human::percent(report.stored_fraction)));
    let (before, after) = (human::bytes(report.checkpoint_bytes), human::bytes(report.bytes_written));
    line("size", format!("{after}, the checkpoint has {before} ({:.2} times as much)", report.ratio));
    line("read", human::bytes(report.bytes_read));
    if report.resumed {
        line("resumed", format!("{} taken over", human::plural(report.chunks_reused, "chunk")));
    }
    let rate = human::rate(report.bytes_read + report.bytes_written, report.wall_seconds);
    line("time", format!("{}, {rate} read and written", human::duration(report.wall_seconds)));
    if let Some(bytes) = report.peak_memory_bytes {
        line("peak memory", human::bytes(bytes));
    }
    text
}

fn unpacked(report: &Report) -> String {
    let mut text = String::new();
    let mut line = |label, value: String| human::line(&mut text, label, &value);
    line("unpacked into", printable(&report.out));
    let tensors = human::plural(report.tensors, "tensor");
    line("contents", format!("{tensors}, {} parameters", human::count(report.elements)));
    let shards = human::plural(report.shards, "shard");
    line("written", format!("{} in {shards}", human::bytes(report.bytes_written)));
    if report.resumed {
        line("resumed", format!("{} taken over", human::plural(report.chunks_reused, "chunk")));
    }
    let rate = human::rate(report.bytes_written, report.wall_seconds);
    line("time", format!("{}, {rate} written", human::duration(report.wall_seconds)));
    if let Some(bytes) = report.peak_memory_bytes {
        line("peak memory", human::bytes(bytes));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_says_what_was_packed() {
        let report = PackReport {
            out: "chat.tvz".into(),
            tensors: 291,
            elements: 6_738_415_616,
            stored_fraction: 0.2,
            checkpoint_bytes: 13_476_831_232,
            bytes_written: 1_800_000_000,
            ratio: 7.487,
            bytes_read: 40_000_000_000,
            wall_seconds: 41.8,
            peak_memory_bytes: None,
            resumed: false,
            chunks_reused: 0,
            warnings: Vec::new(),
        };
        let expected = "\
packed into     chat.tvz
contents        291 tensors, 6.74 billion parameters
stored          20 % of what base has too
size            1.8 GB, the checkpoint has 13.5 GB (7.49 times as much)
read            40 GB
time            41.8 s, 1 GB/s read and written
";
        assert_eq!(packed(&report), expected);
    }
}
