//! The vote pass: the sign of the sum of all elected signs, for methods that need the majority's.

use std::sync::{Mutex, PoisonError};

use super::cut::{Cut, TieChain};
use super::passes::{Passes, Resident, add_ties, lock, ties_before};
use super::select::tensor_cuts;
use super::shard_hash::Digest;
use super::spool::Keep;
use super::under_way::{Stretches, Votes, add};
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
        let notes = self.notes_of(unit);
        let left = notes.and_then(|notes| Some((notes.votes(unit)?, notes.votes_for(unit, Digest::default(), cuts)?)));
        let (elements, bytes_read) = left.as_ref().map_or((0, 0), |(done, _)| (done.elements, done.bytes_read));
        let mut votes = left.map_or_else(|| Votes::none(Digest::default(), cuts), |(_, votes)| votes.clone());
        let read_before = self.tally().bytes_read;
        self.take_over_reads(bytes_read);
        self.observer.advance(bytes_read);
        let elsewhere = &std::mem::take(&mut self.ties_elsewhere);
        // What no sketch had to read is read here first.
        let (spool, keep) = (self.spool, vec![Keep::All; plan.models()]);
        let mut chunks = Stretches::new(plan, unit, elements, notes.map(|_| self.schedule.keep_after));
        while chunks.more() {
            let (chain, before) = (TieChain::of(cuts.len()), &votes.ties);
            let part = Mutex::new(Votes::none(votes.of, cuts));
            self.each_of(chunks.stretch(), unit, resident, Wanted::All, Some(&chain), |worker, ordinal, data| {
                let cuts = tensor_cuts(plan, data.chunk, cuts, facts);
                let (mut seen, own) = ties_before(worker, &chain, ordinal, data, &cuts)?;
                add(&mut seen, before);
                add_ties(elsewhere, data.chunk, &mut seen);
                let sum = worker.vote(data, &cuts, &mut seen, facts)?;
                lock(&part).add(sum, &own);
                spool.map_or(Ok(()), |spool| spool.put(worker, data, &keep))
            })?;
            let part = part.into_inner().unwrap_or_else(PoisonError::into_inner);
            votes.add(part.sum, &part.ties);
            if let Some(notes) = notes.filter(|_| chunks.more()) {
                let (elements, bytes_read) = (chunks.elements, self.tally().bytes_read - read_before);
                notes.keep_votes(unit, (elements, bytes_read), vec![votes.clone()])?;
            }
        }
        Ok(votes.sum)
    }
}
