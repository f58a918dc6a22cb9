//! `tiesmith merge`: plan, schedule, merge, and a summary of what was done.

use std::path::Path;
use std::sync::Arc;

use tiesmith::{DamagedFile, Error, Manifest, Observer, OutputOptions, Plan, Report, Result, Storage, printable};

use super::args::MergeArgs;
use super::jobs::{self, Job};
use super::make::EarlierArgs;
use super::progress::Progress;
use super::{human, lower, print, print_json, signals};

/// Runs the command.
pub fn run(args: &MergeArgs) -> Result<u8> {
    let progress = Progress::new(args.run.report.progress);
    let storage = super::inputs(&args.run, &progress)?;
    signals::install();
    let mut jobs = jobs::read(args, "merge", &*storage)?;
    let output = lower::output(args)?;
    if jobs.len() > 1 {
        jobs::check(&jobs, &storage)?;
    }
    let mut last = jobs.pop().expect("a recipe has a document");
    for job in jobs {
        part(args, job, &storage, &progress)?;
    }
    let mut plan = last.plan(&storage)?;
    if let Some(manifest) = &last.again {
        manifest.admit(&mut plan)?;
    }
    if output.hash_inputs && plan.factors.is_some() {
        return Err(Error::usage("--hash-inputs is not for adapters that are merged through their changes")
            .help("leave it out: such a merge is short"));
    }
    // Elsewhere they come with the result: a failed run's one line of error stands alone.
    for warning in plan.warnings.iter().filter(|_| progress.is_watched()) {
        progress.warn(warning);
    }
    let schedule = lower::schedule(&plan, args)?;
    let report = tiesmith::merge(&plan, &schedule, &output, &storage, &progress)?;
    for warning in lower::idle(&args.given, &[&last.recipe.method]).iter().chain(&report.warnings) {
        progress.warn(warning);
    }
    drop(progress);
    if let Some(manifest) = &last.again {
        compare(manifest, &output.dir, &*storage)?;
    }
    let made = if last.again.is_some() { Made::Again } else { Made::Merged };
    show(&plan, &report, made, args.run.report.json)
}

/// How an output came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Made {
    /// From its inputs.
    Merged,
    /// From a manifest, and it is what that lists.
    Again,
    /// In parts, so that the time is not that of reading and writing it.
    InParts,
}

/// Prints what was done.
pub fn show(plan: &Plan, report: &Report, made: Made, json: bool) -> Result<u8> {
    let reproduced = made == Made::Again;
    if json {
        return print_json(&Printed { report, reproduced });
    }
    let models: Vec<&str> = plan.recipe.models.iter().map(|model| model.source.as_str()).collect();
    let mut text = match made {
        Made::InParts => described(report, "merged into", ""),
        Made::Merged | Made::Again => summary(report, "merged into"),
    };
    if plan.merging().trim.is_some() {
        text.push_str(&kept(report, &models));
    }
    text.push_str(&surviving(report, &models));
    if plan.method.needs_base() {
        let share = human::percent(report.sign_conflict_fraction);
        human::line(&mut text, "sign conflicts", &format!("{share} of the merged parameters"));
    }
    if let Some(factors) = &report.factors {
        let [all, least] = [factors.kept_norm, factors.least_kept_norm].map(human::percent);
        let of = printable(&factors.least_kept);
        human::line(
            &mut text,
            &format!("rank {}", factors.rank),
            &format!("holds {all} of the length of what was merged"),
        );
        human::line(&mut text, "", &format!("least of all {least}, of {of}"));
    }
    if reproduced {
        human::line(&mut text, "reproduced", "every shard is bit for bit what the manifest lists");
    }
    print(&text)
}

/// The report, with what only the command knows.
#[derive(serde::Serialize)]
struct Printed<'a> {
    #[serde(flatten)]
    report: &'a Report,
    /// It is what a manifest lists, bit for bit.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    reproduced: bool,
}

/// Fails unless the output in `dir` has the shards that `manifest` lists.
fn compare(manifest: &Manifest, dir: &Path, storage: &dyn Storage) -> Result<()> {
    let made = Manifest::read(&dir.join("tiesmith.json"), storage)?;
    let Some(shard) = manifest.differs_from(&made) else { return Ok(()) };
    let (then, now) = (printable(&manifest.program), printable(&made.program));
    let what = format!("{} is not what the manifest lists, made by {then}; this is {now}", printable(shard));
    Err(Error::failed(what).at(dir).help("an input was changed without changing its length, or versions differ"))
}

/// Makes what later jobs use, unless it is there already, as it was written.
fn part(args: &MergeArgs, mut job: Job, storage: &Arc<dyn Storage>, progress: &Progress) -> Result<()> {
    let plan = job.plan(storage)?;
    let (Some(dir), Some(name)) = (job.out, job.name) else { return Ok(()) };
    let EarlierArgs { force, restart } = args.output.earlier;
    if tiesmith::is_finished(&plan, &dir, &**storage)? {
        let found = tiesmith::verify(&dir, lower::run(&args.run).threads, storage, progress)?;
        match found.damaged.first() {
            None => return Ok(()),
            Some(_) if force => {}
            Some(damaged) => return Err(not_as_written(&name, &dir, damaged)),
        }
    }
    let schedule = lower::schedule(&plan, args)?;
    let output = OutputOptions { dir, force, restart, hash_inputs: args.hash_inputs, on_shard: None };
    let report = tiesmith::merge(&plan, &schedule, &output, storage, progress)?;
    for warning in &report.warnings {
        progress.warn(&format!("{name}: {warning}"));
    }
    Ok(())
}

/// A finished output that later jobs would use, with a file that is not what was written.
fn not_as_written(name: &str, dir: &Path, damaged: &DamagedFile) -> Error {
    let dir_shown = printable(&dir.display().to_string());
    Error::input(format!("the output of document {} is damaged: this is not what was written", printable(name)))
        .at(&dir.join(&damaged.name))
        .help(format!("'tiesmith verify {dir_shown} --repair' makes it again, or --force the whole output"))
}

/// What was done, for people.
pub fn summary(report: &Report, done: &str) -> String {
    let rate = human::rate(report.bytes_read + report.bytes_written, report.wall_seconds);
    described(report, done, &format!(", {rate} read and written"))
}

fn described(report: &Report, done: &str, rate: &str) -> String {
    let mut text = String::new();
    let mut line = |label, value: String| human::line(&mut text, label, &value);
    line(done, printable(&report.out));
    let tensors = human::plural(report.tensors, "tensor");
    line("contents", format!("{tensors}, {} parameters", human::count(report.elements)));
    let shards = human::plural(report.shards, "shard");
    line("written", format!("{} in {shards}", human::bytes(report.bytes_written)));
    if report.shards_handed_over > 0 {
        line("handed over", human::plural(report.shards_handed_over, "shard"));
    }
    line("read", human::bytes(report.bytes_read));
    if report.resumed {
        line("resumed", format!("{} taken over", human::plural(report.chunks_reused, "chunk")));
    }
    line("time", format!("{}{rate}", human::duration(report.wall_seconds)));
    if let Some(bytes) = report.peak_memory_bytes {
        line("peak memory", human::bytes(bytes));
    }
    text
}

/// What the trim kept of each model.
fn kept(report: &Report, models: &[&str]) -> String {
    let mut text = String::new();
    for (index, (&kept, model)) in report.kept_fraction.iter().zip(models).enumerate() {
        let interval = report.kept_interval.as_ref().and_then(|all| all.get(index));
        let certified =
            interval.map(|&[low, high]| format!(" (certainly {} to {})", human::percent(low), human::percent(high)));
        let label = if index == 0 { "kept" } else { "" };
        let certified = certified.unwrap_or_default();
        human::line(&mut text, label, &format!("{} of {}{certified}", human::percent(kept), printable(model)));
    }
    text
}

/// What of each model points the way the merged task vector does.
fn surviving(report: &Report, models: &[&str]) -> String {
    let mut text = String::new();
    // Of one model, everything does.
    for (index, (&share, model)) in
        report.surviving_fraction.iter().zip(models).enumerate().filter(|_| models.len() > 1)
    {
        let label = if index == 0 { "survives" } else { "" };
        human::line(&mut text, label, &format!("{} of what is kept of {}", human::percent(share), printable(model)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report {
            out: "merged".into(),
            tensors: 291,
            elements: 6_738_415_616,
            shards: 3,
            bytes_read: 81_000_000_000,
            bytes_written: 13_476_839_424,
            shards_handed_over: 0,
            wall_seconds: 95.0,
            peak_memory_bytes: Some(1_930_000_000),
            resumed: true,
            chunks_reused: 1,
            kept_fraction: vec![0.2, 0.2003],
            kept_interval: None,
            surviving_fraction: vec![0.9, 0.875],
            sign_conflict_fraction: 0.0312,
            factors: None,
            warnings: Vec::new(),
        }
    }

    #[test]
    fn the_summary_says_what_was_done() {
        let expected = "\
merged into     merged
contents        291 tensors, 6.74 billion parameters
written         13.5 GB in 3 shards
read            81 GB
resumed         1 chunk taken over
time            1 min 35 s, 994 MB/s read and written
peak memory     1.93 GB
kept            20 % of chat
                20 % of code
";
        let report = report();
        assert_eq!(summary(&report, "merged into") + &kept(&report, &["chat", "code"]), expected);
        let expected = "survives        90 % of what is kept of chat\n                87.5 % of what is kept of code\n";
        assert_eq!(surviving(&report, &["chat", "code"]), expected);
        assert_eq!(surviving(&report, &["chat"]), "");
    }

    #[test]
    fn sketched_thresholds_show_their_interval() {
        let report = Report { kept_interval: Some(vec![[0.199, 0.201], [0.2, 0.2]]), ..report() };
        let text = kept(&report, &["chat", "co\nde"]);
        assert!(text.contains("20 % of chat (certainly 19.9 % to 20.1 %)"), "{text}");
        assert!(text.contains("co\\u{a}de"), "{text}");
    }
}
