//! `tiesmith verify`: whether a finished output still is what was written. Exit code 1 if it is not.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use tiesmith::{Damage, IoMode, Manifest, Plan, Result, Run, Schedule, Storage, VerifyReport, printable};

use super::args::ReportArgs;
use super::parse;
use super::progress::Progress;
use super::table::Table;
use super::{DIFFERS, disk, human, lower, print, print_json, signals};

#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Directory that was merged into
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,

    /// Make damaged files again from the inputs, which must be those of the merge
    ///
    /// Only damaged shards are computed. Each gets its place only if it has the hash that the manifest lists.
    #[arg(long)]
    pub repair: bool,

    /// Upper bound of peak resident memory while repairing, such as 2GiB or 500MB
    #[arg(long, value_name = "SIZE", default_value = "2GiB", value_parser = parse::size)]
    pub memory: u64,

    /// Worker threads [default: one per core]
    #[arg(long, value_name = "N", value_parser = parse::threads)]
    pub threads: Option<usize>,

    #[command(flatten)]
    pub report: ReportArgs,
}

/// Runs the command.
pub fn run(args: &VerifyArgs) -> Result<u8> {
    signals::install();
    let progress = Progress::new(args.report.progress);
    let storage = disk(IoMode::Auto, &progress);
    let threads = args.threads.unwrap_or_else(lower::cores);
    let mut report = tiesmith::verify(&args.dir, threads, &storage, &progress)?;
    if args.repair && !report.intact {
        repair(args, &mut report, Run::new(args.memory, threads), &storage, &progress)?;
    }
    drop(progress);
    if args.report.json {
        print_json(&report)?;
    } else {
        print(&render(&report))?;
    }
    Ok(if report.intact { 0 } else { DIFFERS })
}

/// Makes what is damaged again.
fn repair(
    args: &VerifyArgs,
    report: &mut VerifyReport,
    run: Run,
    storage: &Arc<dyn Storage>,
    progress: &Progress,
) -> Result<()> {
    let manifest = Manifest::read(&args.dir.join("tiesmith.json"), &**storage)?;
    manifest.must_be_as_written()?;
    let mut plan = Plan::new(&manifest.recipe(&**storage), storage)?;
    manifest.admit(&mut plan)?;
    let schedule = Schedule::new(&plan, run)?;
    let damaged: Vec<String> = report.damaged.iter().map(|file| file.name.clone()).collect();
    tiesmith::repair(&manifest, &damaged, &plan, &schedule, &args.dir, storage, progress)?;
    (report.intact, report.repaired) = (true, damaged);
    Ok(())
}

fn render(report: &VerifyReport) -> String {
    let mut all = format!("{}, {}", human::plural(report.files, "file"), human::bytes(report.bytes));
    if !report.handed_over.is_empty() {
        let shards = human::plural(report.handed_over.len() as u64, "shard");
        all.push_str(&format!(", but for {shards} that --on-shard took away"));
    }
    if report.intact && report.repaired.is_empty() {
        return format!("intact: {all}\n");
    }
    let state = if report.intact { "repaired" } else { "damaged" };
    let mut text = format!("{state}: {} of {all}\n", report.damaged.len());
    let mut table = Table::new("  ", "ll");
    for file in &report.damaged {
        let what = match &file.damage {
            Damage::Missing => "is missing".to_owned(),
            Damage::Length { expected, found } => format!("has {found} bytes, {expected} were written"),
            Damage::Content => "has other bytes than were written".to_owned(),
            Damage::Unreadable { message } => message.clone(),
        };
        table.row([printable(&file.name), what + &tensors(&file.tensors)]);
    }
    text.push_str(&table.render());
    if report.damaged.iter().any(|file| file.name == "tiesmith.json") {
        text.push_str("without its manifest an output cannot be checked or repaired: merge again with --force\n");
    } else if !report.intact {
        let dir = printable(&report.dir.to_string());
        text.push_str(&format!("'tiesmith verify {dir} --repair' makes damaged files again from the inputs\n"));
    }
    text
}

/// The damaged tensors, or the first of them.
fn tensors(names: &[String]) -> String {
    const SHOWN: usize = 3;
    if names.is_empty() {
        return String::new();
    }
    let shown: Vec<String> = names.iter().take(SHOWN).map(|name| printable(name)).collect();
    let more = if names.len() > SHOWN { format!(" and {} more", names.len() - SHOWN) } else { String::new() };
    format!(", in {}{more}", shown.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tiesmith::DamagedFile;

    #[test]
    fn damage_is_listed_by_file() {
        let file = |name: &str, damage| DamagedFile { name: name.into(), damage, tensors: Vec::new() };
        let mut report = VerifyReport {
            dir: "out".into(),
            files: 7,
            bytes: 13_500_000_000,
            intact: false,
            damaged: vec![
                file("model-00001-of-00003.safetensors", Damage::Content),
                file("config.json", Damage::Length { expected: 10, found: 9 }),
                file("a\nb", Damage::Missing),
            ],
            handed_over: Vec::new(),
            repaired: Vec::new(),
        };
        report.damaged[0].tensors = ["a", "b", "c\n", "d"].map(str::to_owned).to_vec();
        let expected = "\
damaged: 3 of 7 files, 13.5 GB
  model-00001-of-00003.safetensors  has other bytes than were written, in a, b, c\\u{a} and 1 more
  config.json                       has 9 bytes, 10 were written
  a\\u{a}b                           is missing
'tiesmith verify out --repair' makes damaged files again from the inputs
";
        assert_eq!(render(&report), expected);
        (report.intact, report.repaired) = (true, vec!["config.json".into()]);
        assert!(render(&report).starts_with("repaired: 3 of 7 files") && !render(&report).contains("--repair"));
        (report.damaged, report.repaired) = (Vec::new(), Vec::new());
        assert_eq!(render(&report), "intact: 7 files, 13.5 GB\n");
        report.handed_over = vec!["model-00001-of-00002.safetensors".into()];
        assert_eq!(render(&report), "intact: 7 files, 13.5 GB, but for 1 shard that --on-shard took away\n");
    }
}
