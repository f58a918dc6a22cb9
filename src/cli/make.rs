//! Checkpoints that other verbs than `merge` make: one recipe of their own, one output.

use std::path::PathBuf;

use clap::Args;
use tiesmith::{Observer, OutputOptions, Plan, Recipe, Report, Result, Schedule};

use super::args::RunArgs;
use super::progress::Progress;
use super::{lower, print, print_json, signals};

#[derive(Debug, Clone, Args)]
pub struct PlaceArgs {
    /// Directory of the checkpoint
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,

    #[command(flatten)]
    pub earlier: EarlierArgs,
}

/// What becomes of what an earlier run left.
#[derive(Debug, Clone, Copy, Args)]
pub struct EarlierArgs {
    /// Replace a finished output
    #[arg(long)]
    pub force: bool,

    /// Throw an unfinished run's work away instead of going on with it
    #[arg(long)]
    pub restart: bool,
}

/// Makes what `recipe` describes, and prints its report: for people as `shown` puts it.
pub fn run(recipe: &Recipe, place: &PlaceArgs, run: &RunArgs, shown: impl FnOnce(&Report) -> String) -> Result<u8> {
    signals::install();
    let progress = Progress::new(run.report.progress);
    let storage = super::inputs(run, &progress)?;
    let plan = Plan::new(recipe, &storage)?;
    let schedule = Schedule::new(&plan, lower::run(run))?;
    let EarlierArgs { force, restart } = place.earlier;
    let output = OutputOptions { dir: place.out.clone(), force, restart, ..OutputOptions::default() };
    let report = tiesmith::merge(&plan, &schedule, &output, &storage, &progress)?;
    for warning in &report.warnings {
        progress.warn(warning);
    }
    drop(progress);
    if run.report.json { print_json(&report) } else { print(&shown(&report)) }
}
