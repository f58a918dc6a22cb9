//! The arguments of 'sweep': those of a merge, with lists where a grid is meant.

use clap::Args;
use tiesmith::{Scope, ThresholdKind, TrimTies, Value};

use super::{InputArgs, OutputArgs, RunArgs, methods, scopes, thresholds, tie_rules, words};
use crate::cli::statistics::StatisticsArgs;
use crate::cli::{parse, sweep};

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

    /// How the sign of each parameter is elected [default: mass]
    #[arg(long, value_name = "RULE", help_heading = "Method", value_parser = words("elect"))]
    pub elect: Option<String>,

    /// What becomes of the values that agree with the elected sign [default: mean] (sum in dare_ties and breadcrumbs_ties)
    #[arg(long, value_name = "RULE", help_heading = "Method", value_parser = words("combine"))]
    pub combine: Option<String>,

    /// The sign where an election cancels exactly [default: zero]
    #[arg(long, value_name = "RULE", help_heading = "Method", value_parser = words("zero_sum"))]
    pub zero_sum: Option<String>,

    /// Any parameter of the methods by its name, as in '--param gamma=0.01'; repeatable
    #[arg(long = "param", value_name = "NAME=VALUE", help_heading = "Method", allow_hyphen_values = true, value_parser = parse::param)]
    pub params: Vec<(String, Value)>,

    /// Take the elected signs from this checkpoint's task vector instead (oracle signs)
    #[arg(long, value_name = "CKPT", help_heading = "Method")]
    pub sign_from: Option<String>,

    /// Seed of every random draw; equal seeds give equal bytes
    #[arg(long, value_name = "N", help_heading = "Method", default_value = "0", value_parser = parse::whole)]
    pub seed: u64,

    /// Where one threshold applies
    #[arg(long, value_name = "SCOPE", help_heading = "Trim", default_value = "model", value_parser = scopes())]
    pub scope: Scope,

    /// How the thresholds are found
    #[arg(long, value_name = "KIND", help_heading = "Trim", default_value = "exact", value_parser = thresholds())]
    pub threshold: ThresholdKind,

    /// What becomes of magnitudes equal to the threshold
    #[arg(long, value_name = "RULE", help_heading = "Trim", default_value = "keep", value_parser = tie_rules())]
    pub trim_ties: TrimTies,

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
