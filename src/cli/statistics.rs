//! What models have besides their weights: the options that name it, and how methods take it.

use clap::Args;

use super::parse;

#[derive(Debug, Args)]
#[command(next_help_heading = "Inputs")]
pub struct StatisticsArgs {
    /// A model's diagonal Fisher information, for method 'fisher'; give it once per model, in their order
    ///
    /// A checkpoint with tensors named and shaped like the model's. Tensors that none of them has are averaged.
    #[arg(long, value_name = "CKPT")]
    pub fisher: Vec<String>,

    /// A model's Gram matrices, for method 'regmean'; give it once per model, in their order
    ///
    /// A checkpoint with the matrix XᵀX [in, in] of a linear layer's inputs under the name of the layer's weight
    /// [out, in]. Tensors that none of them has are averaged.
    #[arg(long, value_name = "CKPT")]
    pub gram: Vec<String>,

    /// Smallest Fisher information, for method 'fisher': less counts as this much [default: 1e-6]
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true, value_parser = parse::number)]
    pub fisher_floor: Option<f64>,

    /// Factor of Gram matrices off their diagonal, for method 'regmean' [default: 0.9]; largest ratio that counts, for
    /// 'ramplus_tl' [default: 0.2]
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true, value_parser = parse::number)]
    pub alpha: Option<f64>,
}
