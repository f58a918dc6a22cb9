//! Tensors that are units of their own and too long to be held: each has a spool while it is worked on, so that no more of the
//! disk is taken than the largest of them needs.

use super::{Site, Spool};
use crate::engine::Observer;
use crate::engine::identity::Begin;
use crate::engine::passes::Passes;
use crate::error::Result;
use crate::plan::{Plan, Schedule, Unit, UnitKind};

impl<'a> Spool<'a> {
    /// Begins the spool of `unit` at `site`, or goes on with that of an earlier attempt; `None` if `schedule` keeps nothing of
    /// it on its own. `searches` says that its thresholds are still sought.
    pub(in crate::engine) fn of_tensor(
        plan: &'a Plan,
        schedule: &'a Schedule,
        unit: &Unit,
        site: &Site<'a>,
        searches: bool,
        observer: &'a dyn Observer,
    ) -> Result<Option<Self>> {
        let spooling = schedule.spool.as_ref().filter(|spooling| spooling.by_tensor());
        let Some(spooling) = spooling.filter(|s| unit.kind == UnitKind::Streamed && s.has(unit.tensors[0])) else {
            return Ok(None);
        };
        let mut begin = blake3::Hasher::new();
        begin.update(&Begin::of(plan)?.encode()?).update(&unit.tensors[0].to_le_bytes());
        Self::open_for(plan, (spooling, unit), begin.finalize(), site, searches, observer).map(Some)
    }
}

impl Site<'_> {
    /// Removes what an attempt left that ended between a tensor and its spool.
    pub(in crate::engine) fn forget_tensors(&self, plan: &Plan, schedule: &Schedule) {
        if let Some(spooling) = schedule.spool.as_ref().filter(|spooling| spooling.by_tensor())
            && let Ok((path, _)) = self.place(plan, spooling)
        {
            // Best effort: it is of no use any more.
            let _ = self.storage.remove_file(&path);
        }
    }
}

impl<'a> Passes<'a> {
    /// Does `work` on `unit`, with what is downloaded for it kept at the passes' site where that spares another download;
    /// `searches` says that its thresholds are still sought.
    pub(in crate::engine) fn keeping(
        &mut self,
        unit: &Unit,
        searches: bool,
        work: impl FnOnce(&mut Passes<'_>) -> Result<()>,
    ) -> Result<()> {
        let Some(site) = self.site else { return work(self) };
        if self.kept.left(self.plan, &unit.tensors, unit.chunk_elements).next().is_none() {
            return work(self);
        }
        let spool = Spool::of_tensor(self.plan, self.schedule, unit, site, searches, self.observer)?;
        let Some(spool) = spool else { return work(self) };
        let done = self.lending(self.schedule, |passes| {
            passes.spool = Some(&spool);
            work(passes)
        });
        Spool::forget(Some(spool), done)
    }

    /// Removes what an attempt left that ended between a tensor and its spool.
    pub(in crate::engine) fn forget_kept(&self) {
        self.site.into_iter().for_each(|site| site.forget_tensors(self.plan, self.schedule));
    }
}
