//! `tiesmith perturb`: the signs of a fine-tune's largest or smallest changes, flipped at random.

use clap::Args;
use clap::ValueEnum;
use tiesmith::{ModelInput, Recipe, Result, Value};

use super::args::RunArgs;
use super::make::PlaceArgs;
use super::{human, make, merge, parse};

/// What the help shows.
pub const EXAMPLES: &str = "\
Examples:
  Flip a third of the signs of the 20% largest changes
    tiesmith perturb chat --base llama --flip-sign top --density 20% --probability 0.33 --out flipped
  The same share of the 80% smallest ones
    tiesmith perturb chat --base llama --flip-sign bottom --density 80% --probability 0.33 --out flipped-small";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Side {
    /// The entries of largest magnitude
    Top,
    /// The entries of smallest magnitude
    Bottom,
}

#[derive(Debug, Args)]
pub struct PerturbArgs {
    /// The fine-tuned checkpoint
    #[arg(value_name = "CKPT")]
    pub checkpoint: String,

    /// The checkpoint that it was fine-tuned from
    #[arg(long, value_name = "CKPT")]
    pub base: String,

    /// Flip signs among the largest or among the smallest entries of the task vector
    #[arg(long, value_name = "SIDE")]
    pub flip_sign: Side,

    /// How many of the entries count as largest, or as smallest: 0.2 or 20%
    #[arg(long, value_name = "FRACTION", default_value = "0.2", value_parser = parse::fraction)]
    pub density: f64,

    /// Probability with which each of them is flipped
    #[arg(long, value_name = "FRACTION", default_value = "1", value_parser = parse::fraction)]
    pub probability: f64,

    /// Seed of the draws; equal seeds give equal bytes
    #[arg(long, value_name = "N", default_value = "0", value_parser = parse::whole)]
    pub seed: u64,

    #[command(flatten)]
    pub place: PlaceArgs,
    #[command(flatten)]
    pub run: RunArgs,
}

/// Runs the command.
pub fn run(args: &PerturbArgs) -> Result<u8> {
    let (side, largest) = match args.flip_sign {
        Side::Top => ("top", args.density),
        // What 1 − K loses in binary must not cost an entry.
        Side::Bottom => ("bottom", ((1.0 - args.density) * 1e12).round() / 1e12),
    };
    let mut recipe = Recipe {
        method: "perturb".into(),
        base: Some(args.base.clone()),
        models: vec![ModelInput { source: args.checkpoint.clone(), ..ModelInput::default() }],
        seed: args.seed,
        ..Recipe::default()
    };
    let numbers = [("density", largest), ("probability", args.probability)];
    let values = numbers.map(|(name, value)| (name, Value::Number(value)));
    for (name, value) in values.into_iter().chain([("side", Value::Word(side.into()))]) {
        recipe.params.insert(name.into(), value.into());
    }
    make::run(&recipe, &args.place, &args.run, |report| {
        let flipped = human::percent(report.kept_fraction.first().copied().unwrap_or(0.0));
        format!("{}{:<15} {flipped} of the task vector\n", merge::summary(report, "perturbed into"), "flipped")
    })
}
