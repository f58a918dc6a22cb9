//! One vote for all outputs of a group that ask for the majority's sign: every chunk is read once.

use std::sync::{Arc, Mutex};

use super::group::Group;
use super::ready::Ready;
use crate::engine::cut::TieChain;
use crate::engine::passes::{Passes, Resident, lock};
use crate::engine::reads::first_half;
use crate::engine::select::tensor_cuts;
use crate::engine::slot::Loaded;
use crate::engine::under_way::{Stretches, Votes, add};
use crate::error::Result;
use crate::plan::Unit;

impl Group<'_> {
    /// The majority's sign of the outputs `new` that ask for it.
    pub(super) fn vote(
        &self,
        unit: &Unit,
        passes: &mut Passes<'_>,
        resident: &mut Option<Resident>,
        new: &[usize],
        ready: &mut [Ready],
    ) -> Result<()> {
        let voters: Vec<usize> = new.iter().copied().filter(|&out| self.outs[out].plan.votes()).collect();
        if voters.is_empty() {
            return Ok(());
        }
        passes.announce("vote", passes.pass_bytes("vote"));
        let notes = passes.notes_of(unit);
        let fingerprint = |out: usize| first_half(&blake3::hash(self.outs[out].plan.fingerprint.as_bytes()));
        let none = || voters.iter().map(|&out| Votes::none(fingerprint(out), &ready[out].cuts));
        let begun = notes.and_then(|notes| {
            let known = none().zip(&voters).map(|(none, &out)| notes.votes_for(unit, none.of, &ready[out].cuts));
            Some((notes.votes(unit)?, known.map(Option::<&Votes>::cloned).collect::<Option<Vec<_>>>()?))
        });
        let (elements, bytes_read) = begun.as_ref().map_or((0, 0), |(done, _)| (done.elements, done.bytes_read));
        let mut votes = begun.map_or_else(|| none().collect(), |(_, votes)| votes);
        let read_before = passes.tally().bytes_read;
        passes.take_over_reads(bytes_read);
        self.observer.advance(bytes_read);
        let keep_after = notes.map(|_| self.schedule.keep_after);
        let mut chunks = Stretches::new(self.union, unit, elements, keep_after);
        let lacking: Arc<[usize]> = voters.clone().into();
        while chunks.more() {
            let (shown, before) = (&*ready, &votes);
            let parts: Vec<Mutex<Votes>> = before.iter().map(|v| Mutex::new(Votes { sum: 0, ..v.clone() })).collect();
            let stretch = chunks.stretch().map(|chunk| (chunk, Arc::clone(&lacking)));
            self.each_chunk((unit, &voters), stretch, passes, resident, shown, |worker, ordinal, chunk, slot, out| {
                let (own, ready) = (&self.outs[out], &shown[out]);
                let at = voters.iter().position(|&voter| voter == out).expect("it votes");
                let data = Loaded { plan: own.plan, chunk, slot };
                let cuts = tensor_cuts(own.plan, chunk, &ready.cuts, &[]);
                let (mut seen, ties) = ready.ties(own, worker, ordinal, data, &cuts)?;
                add(&mut seen, &before[at].ties);
                let sum = worker.vote(data, &cuts, &mut seen, &[])?;
                lock(&parts[at]).add(sum, &ties);
                Ok(())
            })?;
            let parts = parts.into_iter().map(|part| part.into_inner().unwrap_or_else(|e| e.into_inner()));
            votes =
                votes.iter().zip(parts).map(|(before, part)| Votes { sum: before.sum + part.sum, ..part }).collect();
            voters.iter().for_each(|&out| ready[out].chain = TieChain::of(ready[out].cuts.len()));
            if let Some(notes) = notes.filter(|_| chunks.more()) {
                let (elements, bytes_read) = (chunks.elements, passes.tally().bytes_read - read_before);
                notes.keep_votes(unit, (elements, bytes_read), votes.clone())?;
            }
        }
        for (&out, votes) in voters.iter().zip(&votes) {
            ready[out].known.majority = votes.sum.signum() as f32;
        }
        Ok(())
    }
}
