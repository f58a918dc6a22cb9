//! The vote pass: the sign of the sum of all elected signs, for methods that need the majority's.

use std::sync::atomic::{AtomicI64, Ordering};

use super::cut::{Cut, TieChain};
use super::passes::{Passes, Resident, add_ties, ties_before};
use super::select::tensor_cuts;
use super::spool::Keep;
use crate::error::Result;
use crate::plan::{Unit, Wanted};

impl Passes<'_> {
    /// Sign of the sum of all elected signs of the unit, where the method asks for it.
    pub(super) fn majority(
        &mut self,
        unit: &Unit,
        resident: &mut Option<Resident>,
        cuts: &[Cut],
        facts: &[f64],
    ) -> Result<f32> {
        let sum = if self.plan.votes() { self.votes(unit, resident, cuts, facts)? } else { 0 };
        Ok(sum.signum() as f32)
    }

    /// Sum of all elected signs of the unit.
    pub(super) fn votes(
        &mut self,
        unit: &Unit,
        resident: &mut Option<Resident>,
        cuts: &[Cut],
        facts: &[f64],
    ) -> Result<i64> {
        let plan = self.plan;
        self.announce("vote", self.pass_bytes("vote"));
        let sum = AtomicI64::new(0);
        let chain = TieChain::of(cuts.len());
        let elsewhere = &std::mem::take(&mut self.ties_elsewhere);
        // What no sketch had to read is read here first.
        let (spool, keep) = (self.spool, vec![Keep::All; plan.models()]);
        self.each_chunk(unit, resident, Wanted::All, Some(&chain), |worker, ordinal, data| {
            let cuts = tensor_cuts(plan, data.chunk, cuts, facts);
            let (mut seen, _) = ties_before(worker, &chain, ordinal, data, &cuts)?;
            add_ties(elsewhere, data.chunk, &mut seen);
            sum.fetch_add(worker.vote(data, &cuts, &mut seen, facts)?, Ordering::Relaxed);
            spool.map_or(Ok(()), |spool| spool.put(worker, data, &keep))
        })?;
        Ok(sum.into_inner())
    }
}
