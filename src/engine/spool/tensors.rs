//! Tensors with thresholds of their own that are too long to be held: each has a spool while it is worked on, so that no more
//! of the disk is taken than the largest of them needs.

use super::Spool;
use crate::engine::identity::Begin;
use crate::engine::passes::Passes;
use crate::error::Result;
use crate::plan::{Schedule, Spooling, Unit, UnitKind};

impl<'a> Passes<'a> {
    /// Does `work` on `unit`, with what is downloaded for it kept at the passes' site where that spares another download;
    /// `searches` says that its thresholds are still sought.
    pub(in crate::engine) fn keeping(
        &mut self,
        unit: &Unit,
        searches: bool,
        work: impl FnOnce(&mut Passes<'_>) -> Result<()>,
    ) -> Result<()> {
        let schedule = self.schedule;
        let (Some(site), Some(spooling)) = (self.site, by_tensor(schedule, unit)) else { return work(self) };
        if self.kept.left(self.plan, &unit.tensors, unit.chunk_elements).next().is_none() {
            return work(self);
        }
        let mut begin = blake3::Hasher::new();
        begin.update(&Begin::of(self.plan)?.encode()?).update(&unit.tensors[0].to_le_bytes());
        let spool = Spool::open_for(self.plan, (spooling, unit), begin.finalize(), site, searches, self.observer)?;
        let done = self.lending(schedule, |passes| {
            passes.spool = Some(&spool);
            work(passes)
        });
        Spool::forget(Some(spool), done)
    }

    /// Removes what an attempt left that ended between a tensor and its spool.
    pub(in crate::engine) fn forget_kept(&self) {
        if let (Some(site), Some(spooling)) = (self.site, self.schedule.spool.as_ref().filter(|s| s.by_tensor()))
            && let Ok((path, _)) = site.place(self.plan, spooling)
        {
            // Best effort: it is of no use any more.
            let _ = site.storage.remove_file(&path);
        }
    }
}

/// How `unit` is kept on its own, if it is.
fn by_tensor<'s>(schedule: &'s Schedule, unit: &Unit) -> Option<&'s Spooling> {
    let keeps = |spooling: &&Spooling| spooling.by_tensor() && spooling.has(unit.tensors[0]);
    schedule.spool.as_ref().filter(keeps).filter(|_| unit.kind == UnitKind::Streamed)
}
