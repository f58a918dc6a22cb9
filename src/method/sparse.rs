//! What methods share that thin task vectors out in a way of their own and then merge them as TIES or by summing.

use super::ties::TiesMerger;
use super::{Look, Merger, Needs, ParamKind, ParamSpec, Settings, Sparsify, Tile};

/// A rule per model, and the merge of what is left.
pub(super) struct SparseMerger {
    rules: Vec<Sparsify>,
    merge: TiesMerger,
    /// What is kept is multiplied so that its magnitudes sum up to what they did before.
    l1: bool,
}

/// What becomes of entries that draws keep.
pub(super) const RESCALE: ParamSpec = ParamSpec {
    name: "rescale",
    per_model: false,
    kind: ParamKind::Choice(&["density", "l1", "none"]),
    help: "divide what is kept by its probability (paper), restore each tensor's sum of magnitudes (mergekit), or neither",
};

/// The same where thresholds choose what is kept.
pub(super) const RESTORE: ParamSpec = ParamSpec {
    name: "rescale",
    per_model: false,
    kind: ParamKind::Choice(&["none", "l1"]),
    help: "leave what is kept as it is, or restore each tensor's sum of magnitudes (mergekit); needs scope tensor",
};

impl SparseMerger {
    /// `rules` has one entry per model, `rescale` is as the settings say.
    pub(super) fn new(merge: TiesMerger, rules: Vec<Sparsify>, settings: &Settings) -> Self {
        Self { rules, merge, l1: settings.word("rescale") == "l1" }
    }
}

/// The values of parameter `name`, one per model. The method must declare it.
pub(super) fn per_model(settings: &Settings, name: &str) -> Vec<f64> {
    settings.per_model(name).unwrap_or_else(|| unreachable!("{name} is declared"))
}

impl Merger for SparseMerger {
    fn needs(&self) -> Needs {
        let rows = self.rules.iter().any(|rule| matches!(rule, Sparsify::Ranked { .. }));
        let looks: &[Look] = if self.l1 { &[Look::Magnitudes] } else { &[] };
        Needs { rows, looks, ..self.merge.needs() }
    }

    fn facts(&self, models: usize) -> usize {
        if self.l1 { models } else { 0 }
    }

    /// Magnitudes of each model before and after.
    fn sums(&self, _look: usize, models: usize) -> usize {
        2 * models
    }

    fn sparsify(&self, model: usize) -> Sparsify {
        self.rules[model]
    }

    fn merge(&self, tile: &Tile<'_>, out: &mut [f32], scratch: &mut [f32]) {
        self.merge.merge(tile, out, scratch);
    }

    fn lambda(&self) -> Option<f32> {
        self.merge.lambda()
    }

    fn unscaled(&self, tile: &Tile<'_>, out: &mut [f32], scratch: &mut [f32]) {
        self.merge.unscaled(tile, out, scratch);
    }

    fn sum_of_signs(&self, tile: &Tile<'_>, scratch: &mut [f32]) -> i64 {
        self.merge.sum_of_signs(tile, scratch)
    }
}
