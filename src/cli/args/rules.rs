//! How task vectors are trimmed and merged: options that several commands take alike.

use clap::Args;
use tiesmith::{Scope, ThresholdKind, TrimTies, Value};

use super::{scopes, thresholds, tie_rules, words};
use crate::cli::parse;

#[derive(Debug, Args)]
#[command(next_help_heading = "Method")]
pub struct RuleArgs {
    /// How the sign of each parameter is elected: by summed mass (the paper), by count, or not at all [default: mass]
    #[arg(long, value_name = "RULE", value_parser = words("elect"))]
    pub elect: Option<String>,

    /// What becomes of the values that agree with the elected sign: their mean (the paper), their sum, the largest, or
    /// mean-all, their sum divided by the weights of all models [default: mean] (sum in dare_ties and breadcrumbs_ties)
    #[arg(long, value_name = "RULE", value_parser = words("combine"))]
    pub combine: Option<String>,

    /// The sign where an election cancels exactly: none, so zero (the paper's formula), positive (mergekit), or the
    /// majority's (the paper's code) [default: zero]
    #[arg(long, value_name = "RULE", value_parser = words("zero_sum"))]
    pub zero_sum: Option<String>,

    /// Any parameter of the method by its name, as in '--param gamma=0.01'; repeatable
    ///
    /// 'tiesmith methods' lists them. Those that each model may have of its own can also follow its path.
    #[arg(long = "param", value_name = "NAME=VALUE", allow_hyphen_values = true, value_parser = parse::param)]
    pub params: Vec<(String, Value)>,

    /// Take the elected signs from this checkpoint's task vector instead (oracle signs)
    ///
    /// For example a multitask model: the upper bound in section 7.2 of the TIES paper.
    #[arg(long, value_name = "CKPT")]
    pub sign_from: Option<String>,

    /// Seed of every random draw; equal seeds give equal bytes
    #[arg(long, value_name = "N", default_value = "0", value_parser = parse::whole)]
    pub seed: u64,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Trim")]
pub struct ThresholdArgs {
    /// Where one threshold applies
    #[arg(long, value_name = "SCOPE", default_value = "model", value_parser = scopes())]
    pub scope: Scope,

    /// How the threshold is found
    #[arg(long, value_name = "KIND", default_value = "exact", value_parser = thresholds())]
    pub threshold: ThresholdKind,

    /// What becomes of magnitudes equal to the threshold
    #[arg(long, value_name = "RULE", default_value = "keep", value_parser = tie_rules())]
    pub trim_ties: TrimTies,
}
