//! Units that one worker does alone, each read once: thresholds and merge of a tensor in memory.

use std::sync::Mutex;

use super::cut::Cut;
use super::guess::Guess;
use super::looks::solo_facts;
use super::passes::{Passes, lock, prefetch, units_ahead, whole};
use super::pool;
use super::records::UnitDone;
use super::select::{SoloSearch, UnitThresholds, cuts, tensor_cuts};
use super::shards::{ChunkWriter, ShardWriter};
use super::slot::Loaded;
use super::worker::{Known, Worker};
use crate::error::Result;
use crate::plan::{Goal, Unit, Wanted};
use crate::sketch::Threshold;

impl Passes<'_> {
    /// Does `units`, each of which fits into a worker's windows.
    pub(super) fn solo_units(&mut self, units: &[&Unit]) -> Result<()> {
        let (plan, writer, observer) = (self.plan, self.writer(), self.observer);
        let items = units.iter().filter(|unit| unit.elements > 0);
        let (lookahead, weight) = units_ahead(self.schedule);
        let ahead = |unit: &&&Unit| weight(prefetch(plan, whole(unit), Wanted::All));
        let thresholds = Mutex::new(&mut self.thresholds);
        let (bins, guesses) = (self.schedule.sketch_bins, plan.can_guess());
        pool::run_weighed(&mut self.workers, items, lookahead, ahead, |worker, _, unit| {
            let (chunk, goals) = (whole(unit), plan.goals(unit));
            worker.load(plan, chunk, plan.pieces(chunk.tensor, Wanted::All), observer, |worker, data| {
                let mut search = SoloSearch::new(&goals, bins);
                let guess = if guesses { search.guess(worker, data)? } else { None };
                let guessed = guess.map(|guess| merge_guessed(worker, data, writer, &goals, &guess)).transpose()?;
                let (out, found, known) = match guessed {
                    Some((Some(out), found)) => (out, found, Known::default()),
                    wrong => {
                        wrong.into_iter().for_each(|(_, found)| search.learn(found));
                        let found = search.end(worker, data)?;
                        let cuts = cuts(plan, &goals, &found);
                        let mut known = Known { facts: solo_facts(worker, data, &cuts)?, ..Known::default() };
                        let cuts = tensor_cuts(plan, chunk, &cuts, &known.facts);
                        if plan.votes() {
                            let vote = worker.vote(data, &cuts, &mut vec![0; cuts.len()], &known.facts)?;
                            known.majority = vote.signum() as f32;
                        }
                        (merge_chunk(worker, data, writer, &cuts, &known)?, found, known)
                    }
                };
                let counted = worker.counted();
                let thresholds_found = UnitThresholds::new(unit, &goals, &found);
                let found = thresholds_found.found.clone();
                lock(&thresholds).record(thresholds_found, &counted.kept);
                let Known { majority, facts } = known;
                let done = UnitDone { tensor: chunk.tensor, found, majority: majority as i8, bytes_read: 0, facts };
                out.done(counted, Vec::new(), false, Some(done))
            })
        })?;
        Ok(())
    }
}

/// Merges a chunk with its tensor's cuts. It is not done yet. Where a cut goes by position, the chunk has to be the whole tensor.
pub(super) fn merge_chunk<'w>(
    worker: &mut Worker,
    data: Loaded<'_>,
    writer: &'w ShardWriter<'_>,
    cuts: &[Cut],
    known: &Known,
) -> Result<ChunkWriter<'w>> {
    let mut out = writer.chunk(data.chunk);
    worker.merge(data, cuts, &mut vec![0; cuts.len()], known, &mut |offset, bytes| out.write(offset, bytes))?;
    Ok(out)
}

/// Merges a unit in memory with guessed thresholds. If some turn out to be others, there is nothing merged or counted, and
/// what was found are the rest.
fn merge_guessed<'w>(
    worker: &mut Worker,
    data: Loaded<'_>,
    writer: &'w ShardWriter<'_>,
    goals: &[Goal],
    guess: &Guess,
) -> Result<(Option<ChunkWriter<'w>>, Vec<Option<Threshold>>)> {
    let before = worker.tally.clone();
    let out = merge_chunk(worker, data, writer, &guess.cuts(goals), &Known::default())?;
    let counted = worker.tally.since(&before);
    Ok(match guess.proven(goals, &counted.kept, &counted.tied) {
        Ok(found) => (Some(out), found),
        Err(found) => {
            worker.tally = before;
            (None, found)
        }
    })
}
