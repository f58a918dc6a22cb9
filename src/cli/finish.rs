//! `tiesmith finish`: publishes a merge that was done in parts.

use tiesmith::{Observer, Result};

use super::args::FinishArgs;
use super::job::{self, Planned};
use super::progress::Progress;
use super::{lower, merge, signals};

/// Runs the command.
pub fn run(args: &FinishArgs) -> Result<u8> {
    signals::install();
    let progress = Progress::new(args.report.progress);
    let Planned { args: planned, plan, job, storage } = job::load(&args.job, None, &progress)?;
    let report = tiesmith::finish(&plan, &job, lower::run(&planned.run), &storage, &progress)?;
    for warning in &report.warnings {
        progress.warn(warning);
    }
    drop(progress);
    merge::show(&plan, &report, merge::Made::InParts, args.report.json)
}
