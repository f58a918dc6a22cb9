//! Arcee Fusion: take over the entries of one model that matter most, and keep base elsewhere (arcee.ai 2025, mergekit's
//! method of that name).
//!
//! For each row of a tensor (the last axis; a row longer than 131,072 elements in pieces of that length), with p =
//! softmax(θ_1) + 1e-8 and q = softmax(θ_0) + 1e-8, an entry's importance is I = |θ_1 − θ_0| · Σ_row p ln(p / q). Over the
//! whole tensor, with Q(f) the importance of ascending rank ⌊f (d − 1)⌋, counted from 0: θ = θ_1 where I ≥ Q(½) +
//! 1.5 (Q(¾) − Q(¼)), else θ_0. θ_0 is base, or the first of two models. The sum over a row is in f64: for usual
//! fine-tunes it is far below what f32 can tell from 0.

use super::described::Described;
use super::{Inputs, Look, Merger, Needs, Subject, Tile};

/// See the module's documentation.
pub(super) static ARCEE_FUSION: Described = Described {
    name: "arcee_fusion",
    summary: "take over a model's entries whose change matters most, keep base elsewhere",
    formula: "θ = θ_1 where I ≥ median I + 1.5 (Q3 − Q1), else θ_0,  I = |θ_1 − θ_0| · KL(softmax θ_1 row, softmax θ_0 row)",
    reference: "arcee.ai 2025, mergekit's arcee_fusion; Goddard et al. 2024, arXiv 2403.13257",
    models: (2, 2),
    needs_base: false,
    base_is_model: true,
    prepare: |_, _| Box::new(FusionMerger),
    ..Described::PLAIN
};

struct FusionMerger;

/// Added to every probability: none is 0.
const SMOOTHING: f64 = 1e-8;

/// The row's softmax as a function of its values: the largest value, and the sum of the exponentials.
fn softmax(row: &[f32]) -> impl Fn(f32) -> f64 + use<> {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exponential = move |value: f32| libm::exp(f64::from(value) - f64::from(largest));
    let sum: f64 = row.iter().map(|&value| exponential(value)).sum();
    move |value| exponential(value) / sum + SMOOTHING
}

impl Merger for FusionMerger {
    fn needs(&self) -> Needs {
        Needs { looks: &[Look::Ranks], rows: true, ..Needs::of(Inputs::Weights) }
    }

    fn facts(&self, _models: usize) -> usize {
        1
    }

    /// Third quartile, median, first quartile.
    fn ranks(&self, subject: Subject<'_>) -> Vec<u64> {
        let last = subject.elements - 1;
        [0.75, 0.5, 0.25].map(|share| subject.elements - (share * last as f64) as u64).to_vec()
    }

    fn score(&self, tile: &Tile<'_>, out: &mut [f32]) {
        let &[base, model] = tile.inputs else { return out.fill(0.0) };
        let rows = base.chunks(tile.row).zip(model.chunks(tile.row)).zip(out.chunks_mut(tile.row));
        for ((base, model), out) in rows {
            let (p, q) = (softmax(model), softmax(base));
            let terms = model.iter().zip(base).map(|(&model, &base)| p(model) * libm::log(p(model) / q(base)));
            // A divergence is not negative, but for rounding.
            let divergence = terms.sum::<f64>().max(0.0);
            for ((out, model), base) in out.iter_mut().zip(model).zip(base) {
                let importance = f64::from((model - base).abs()) * divergence;
                *out = importance.min(f64::from(f32::MAX)) as f32;
            }
        }
    }

    fn conclude(&self, _look: usize, _subject: Subject<'_>, found: &[f64]) -> Vec<f64> {
        let &[third, median, first] = found else { unreachable!("three ranks are asked for") };
        vec![median + 1.5 * (third - first)]
    }

    fn merge(&self, tile: &Tile<'_>, out: &mut [f32], scratch: &mut [f32]) {
        self.score(tile, scratch);
        let (Some(base), Some(model)) = (tile.inputs.first(), tile.inputs.last()) else { return };
        for (((out, importance), base), model) in out.iter_mut().zip(scratch).zip(*base).zip(*model) {
            *out = if f64::from(*importance) >= tile.facts[0] { *model } else { *base };
        }
    }
}
