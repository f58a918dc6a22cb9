//! What an output of a sweep needs to merge a unit, once its thresholds are known.

use std::collections::HashMap;

use super::group::Out;
use crate::engine::cut::{Cut, TieChain, TieCounts};
use crate::engine::passes::ties_before;
use crate::engine::records::UnitDone;
use crate::engine::select::{UnitThresholds, cuts};
use crate::engine::slot::Loaded;
use crate::engine::worker::{Known, Worker};
use crate::error::Result;
use crate::plan::{Goal, Unit};
use crate::sketch::Threshold;

/// What an output needs to merge a unit.
pub(super) struct Ready {
    pub cuts: Vec<Cut>,
    pub known: Known,
    pub thresholds: UnitThresholds,
    /// Ties of what earlier attempts did, before each tensor.
    kept_ties: HashMap<u32, TieCounts>,
    pub chain: TieChain,
}

impl Ready {
    pub(super) fn new(out: &Out<'_>, unit: &Unit, goals: &[Goal], found: &[Option<Threshold>], known: Known) -> Self {
        let cuts = cuts(out.plan, goals, found);
        let chain = TieChain::of(cuts.len());
        let kept_ties = out.kept.ties_before(out.plan, &unit.tensors);
        Self { chain, known, thresholds: UnitThresholds::new(unit, goals, found), kept_ties, cuts }
    }

    /// The journal's entry.
    pub(super) fn done(&self, bytes_read: u64) -> UnitDone {
        let UnitThresholds { tensor, found } = &self.thresholds;
        let (majority, facts) = (self.known.majority as i8, Vec::new());
        UnitDone { tensor: *tensor, found: found.clone(), majority, bytes_read, facts }
    }

    /// Ties before the chunk, and in it.
    pub(super) fn ties(
        &self,
        out: &Out<'_>,
        worker: &mut Worker,
        ordinal: usize,
        data: Loaded<'_>,
        cuts: &[Cut],
    ) -> Result<(TieCounts, TieCounts)> {
        let (mut seen, own) = ties_before(worker, &self.chain, ordinal, data, cuts)?;
        if let Some(before) = self.kept_ties.get(&data.chunk.tensor) {
            seen.iter_mut().zip(before).for_each(|(seen, before)| *seen += before);
            out.kept.add_ties_in_tensor(data.chunk, &mut seen);
        }
        Ok((seen, own))
    }

    /// Passes a chunk that is done already: its ties are known from elsewhere.
    pub(super) fn skip(&self, ordinal: usize) -> Result<()> {
        if self.cuts.iter().any(|cut| matches!(cut, Cut::Lowest { .. })) {
            self.chain.pass(ordinal, &vec![0; self.cuts.len()])?;
        }
        Ok(())
    }
}
