//! What methods share that thin task vectors out in a way of their own and then merge them as TIES or by summing.

use super::ties::TiesMerger;
use super::{Merger, Needs, Settings, Sparsify, Tile};

/// A rule per model, and the merge of what is left.
pub(super) struct SparseMerger {
    rules: Vec<Sparsify>,
    merge: TiesMerger,
}

impl SparseMerger {
    /// `rules` has one entry per model.
    pub(super) fn new(merge: TiesMerger, rules: Vec<Sparsify>) -> Self {
        Self { rules, merge }
    }
}

/// The values of parameter `name`, one per model. The method must declare it.
pub(super) fn per_model(settings: &Settings, name: &str) -> Vec<f64> {
    settings.per_model(name).unwrap_or_else(|| unreachable!("{name} is declared"))
}

impl Merger for SparseMerger {
    fn needs(&self) -> Needs {
        let rows = self.rules.iter().any(|rule| matches!(rule, Sparsify::Ranked { .. }));
        Needs { rows, ..self.merge.needs() }
    }

    fn sparsify(&self, model: usize) -> Sparsify {
        self.rules[model]
    }

    fn merge(&self, tile: &Tile<'_>, out: &mut [f32], scratch: &mut [f32]) {
        self.merge.merge(tile, out, scratch);
    }

    fn sum_of_signs(&self, tile: &Tile<'_>, scratch: &mut [f32]) -> i64 {
        self.merge.sum_of_signs(tile, scratch)
    }
}
