//! The arguments of 'sweep': those of a merge, with lists where a grid is meant.

use clap::Args;

use super::rules::{RuleArgs, ThresholdArgs};
use super::{InputArgs, OutputArgs, RunArgs, methods};
use crate::cli::statistics::StatisticsArgs;
use crate::cli::sweep;

#[derive(Debug, Args)]
pub struct SweepArgs {
    /// A recipe file in mergekit's language, instead of --base, --model and --method; other options override it
    #[arg(value_name = "RECIPE.yml", conflicts_with_all = ["base", "models", "method"])]
    pub recipe: Option<String>,

    /// Options that were given, not filled in.
    #[arg(skip)]
    pub given: Vec<String>,

    #[command(flatten)]
    pub inputs: InputArgs,
    #[command(flatten)]
    pub statistics: StatisticsArgs,

    /// Scales of the merged task vector: a list, ranges first:last:step, or both
    #[arg(long, value_name = "LIST", help_heading = "Grid", allow_hyphen_values = true, value_parser = sweep::numbers)]
    pub lambda: Option<sweep::Values>,

    /// Fractions of each task vector to keep: a list, ranges first:last:step, or both
    #[arg(long, value_name = "LIST", help_heading = "Grid", value_parser = sweep::fractions)]
    pub density: Option<sweep::Values>,

    /// Methods, separated by commas; 'tiesmith methods' explains each [default: ties]
    #[arg(long, value_name = "NAMES", help_heading = "Grid", value_delimiter = ',', value_parser = methods())]
    pub method: Vec<String>,

    /// Which models: all, pairs, leave-one-out, sizes (the first two, three, ...), or numbers such as 1+3; several are
    /// separated by commas
    #[arg(long, value_name = "SETS", help_heading = "Grid", value_delimiter = ',', value_parser = sweep::subset)]
    pub subset: Vec<sweep::Subset>,

    #[command(flatten)]
    pub rules: RuleArgs,
    #[command(flatten)]
    pub thresholds: ThresholdArgs,

    /// Store each output as what differs from the base, compressed, in a file DIR/NAME.tvz
    ///
    /// Such a file is a checkpoint for every command; 'tiesmith unpack' writes it as one.
    #[arg(long, help_heading = "Output")]
    pub packed: bool,

    #[command(flatten)]
    pub output: OutputArgs,
    #[command(flatten)]
    pub run: RunArgs,
}
