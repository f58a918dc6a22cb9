//! `tiesmith verify`: whether a finished output still is what was written. Exit code 1 if it is not.

use tiesmith::{Damage, IoMode, Result, VerifyReport, printable};

use super::args::VerifyArgs;
use super::progress::Progress;
use super::table::Table;
use super::{DIFFERS, disk, human, print, print_json, signals};

/// Runs the command.
pub fn run(args: &VerifyArgs) -> Result<u8> {
    signals::install();
    let progress = Progress::new(args.report.progress);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let report = tiesmith::verify(&args.dir, threads, &disk(IoMode::Auto), &progress)?;
    drop(progress);
    if args.report.json {
        print_json(&report)?;
    } else {
        print(&render(&report))?;
    }
    Ok(if report.intact { 0 } else { DIFFERS })
}

fn render(report: &VerifyReport) -> String {
    let all = format!("{}, {}", human::plural(report.files, "file"), human::bytes(report.bytes));
    if report.intact {
        return format!("intact: {all}\n");
    }
    let mut text = format!("damaged: {} of {all}\n", report.damaged.len());
    let mut table = Table::new("  ", "ll");
    for file in &report.damaged {
        let what = match &file.damage {
            Damage::Missing => "is missing".to_owned(),
            Damage::Length { expected, found } => format!("has {found} bytes, {expected} were written"),
            Damage::Content => "has other bytes than were written".to_owned(),
            Damage::Unreadable { message } => message.clone(),
        };
        table.row([printable(&file.name), what]);
    }
    text.push_str(&table.render());
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use tiesmith::DamagedFile;

    #[test]
    fn damage_is_listed_by_file() {
        let file = |name: &str, damage| DamagedFile { name: name.into(), damage };
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
        };
        let expected = "\
damaged: 3 of 7 files, 13.5 GB
  model-00001-of-00003.safetensors  has other bytes than were written
  config.json                       has 9 bytes, 10 were written
  a\\u{a}b                           is missing
";
        assert_eq!(render(&report), expected);
        (report.intact, report.damaged) = (true, Vec::new());
        assert_eq!(render(&report), "intact: 7 files, 13.5 GB\n");
    }
}
