//! Passes over a part of the work, with the workers of those over all of it: one shard after the other.

use super::passes::Passes;
use crate::error::Result;
use crate::plan::Schedule;

impl<'a> Passes<'a> {
    /// Does everything in an order that completes shards early, one after the other as far as thresholds allow.
    pub(super) fn run_by_shard(&mut self) -> Result<()> {
        self.announce_all();
        if !self.plan.per_tensor() {
            // Where they lie between the others, no shard would be complete before the end.
            self.direct()?;
            return self.units();
        }
        for shard in 0..self.plan.layout.shards.len() {
            let schedule = self.schedule.part(self.plan, &(shard..shard + 1));
            self.lending(&schedule, |passes| {
                passes.by_shard = true;
                passes.units().and_then(|()| passes.direct())
            })?;
        }
        self.forget_kept();
        Ok(())
    }

    /// Does `work` as passes by `schedule`, with these ones' workers.
    pub(super) fn lending<'b>(
        &mut self,
        schedule: &'b Schedule,
        work: impl FnOnce(&mut Passes<'b>) -> Result<()>,
    ) -> Result<()>
    where
        'a: 'b,
    {
        let workers = std::mem::take(&mut self.workers);
        let mut passes = Passes::with_workers(self.plan, schedule, self.observer, self.writer, self.kept, workers);
        std::mem::swap(&mut passes.thresholds, &mut self.thresholds);
        (passes.by_shard, passes.site, passes.guesses) = (self.by_shard, self.site, self.guesses);
        let result = work(&mut passes);
        self.workers = passes.workers;
        self.thresholds = passes.thresholds;
        self.kept_reads = self.kept_reads.saturating_add(passes.kept_reads);
        self.differing.append(&mut passes.differing);
        result
    }
}
