//! What the outputs of a sweep keep together of what they download and need again.

use std::path::Path;

use super::Sweep;
use super::group::Out;
use super::ready::Ready;
use crate::engine::spool::{Room, Site};
use crate::error::Result;
use crate::plan::{Goal, Plan, Unit};
use crate::storage::Storage;

/// Name of the spool, in the directory of the outputs.
pub(super) const SPOOL: &str = "sweep.spool";

impl Sweep<'_> {
    /// Where what is downloaded is kept for all outputs together; `at_once` bytes of them are on the disk. What an earlier run
    /// left is used.
    pub(super) fn site(&self, at_once: u64) -> Site<'_> {
        Site {
            own: (self.output.dir.join(SPOOL), self.output.dir.clone()),
            name: String::new(),
            out: &self.output.dir,
            at_once,
            takes_over: !self.output.restart,
            hashes: false,
            storage: &**self.storage,
            room: Room::default(),
        }
    }
}

/// Per model of the union, the key from which on everything matters to the outputs whose thresholds are known, and to those
/// that trim nothing.
pub(super) fn floors(union: &Plan, outs: &[Out<'_>], unit: &Unit, ready: &[Option<Ready>]) -> Vec<Option<u32>> {
    let mut floors = vec![None; union.models()];
    for (out, ready) in outs.iter().zip(ready) {
        for (at, goal) in out.plan.goals(unit).iter().enumerate() {
            let found = ready.as_ref().and_then(|ready| ready.thresholds.found[at]);
            let least = match (goal, found) {
                (Goal::All, _) => 0,
                (Goal::Keep { .. }, Some((threshold, _))) => threshold.ties.low,
                (Goal::Keep { .. }, None) | (Goal::Nothing, _) => continue,
            };
            let floor: &mut Option<u32> = &mut floors[out.union_model(union, at % out.plan.models())];
            *floor = Some(floor.map_or(least, |floor| floor.min(least)));
        }
    }
    floors
}

/// Removes what a run left that ended when it had nothing more to download.
pub(super) fn remove_leftover(dir: &Path, storage: &dyn Storage) -> Result<()> {
    let path = dir.join(SPOOL);
    if storage.is_file(&path) { storage.remove_file(&path) } else { Ok(()) }
}
