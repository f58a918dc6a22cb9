//! What the output directory knows of shards that are handed over: see `hand_over`.

use std::path::PathBuf;
use std::sync::{MutexGuard, PoisonError};

use serde_json::Value;

use super::{INDEX, OutputDir, kind};
use crate::engine::Observer;
use crate::engine::hand_over::{AllHandedOver, HandedOver, hand_over};
use crate::error::{Error, Result};
use crate::plan::Plan;

/// Shards on the disk at once where they are handed over: one is, one waits for that, and one or two are written.
const SHARDS_HANDED_OVER: u64 = 4;

impl OutputDir {
    /// Whether finished shards are handed over to a command.
    pub(in crate::engine) fn hands_over(&self) -> bool {
        self.on_shard.is_some()
    }

    /// Whether shard `name` was.
    pub(in crate::engine) fn was_handed_over(&self, name: &str) -> bool {
        self.handed_over().contains_key(name)
    }

    /// The shards that were.
    pub(in crate::engine) fn handed_over(&self) -> MutexGuard<'_, AllHandedOver> {
        self.handed_over.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that `shard` was.
    pub(in crate::engine) fn record_handed_over(&self, shard: &HandedOver) -> Result<()> {
        let payload = serde_json::to_vec(shard).map_err(|e| Error::failed(format!("hashes as JSON: {e}")))?;
        self.record(kind::HANDED_OVER, &payload)?;
        self.handed_over().insert(shard.name.clone(), shard.clone());
        Ok(())
    }

    /// Hands over what an earlier attempt published without getting so far.
    pub(in crate::engine) fn hand_over_rest(&self, plan: &Plan, observer: &dyn Observer) -> Result<()> {
        // Without a manifest, all of it is uploaded and removed.
        let Some(manifest) = self.manifest()?.filter(|_| self.hands_over()) else { return Ok(()) };
        let all_away = || plan.layout.shards.iter().all(|shard| self.was_handed_over(&shard.name));
        if self.address().is_some() && all_away() && !self.storage.is_file(&self.dir.join(INDEX)) {
            // It is where it should be: the index goes last there, and first here.
            self.remove_uploaded(plan);
            return Ok(());
        }
        self.upload_side_files(observer)?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        for (shard, planned) in plan.layout.shards.iter().enumerate() {
            let listed = &manifest["shards"][shard];
            let tensors = listed["tensors"].as_object().into_iter().flatten().map(|(_, hash)| text(hash)).collect();
            let name = planned.name.clone();
            let made = HandedOver { name, bytes: planned.bytes, blake3: text(&listed["blake3"]), tensors, to: None };
            hand_over(self, &made, (shard, plan.layout.shards.len()), observer)?;
        }
        self.upload_last(plan, observer)
    }

    /// Bytes of shards that are on the disk at once, at most.
    pub(in crate::engine) fn bytes_at_once(&self, plan: &Plan) -> u64 {
        held_at_once(plan, self.hands_over())
    }

    /// Where what is downloaded and needed again is kept, and the directory that it is in.
    pub(in crate::engine) fn spool(&self) -> (PathBuf, PathBuf) {
        (self.work.join("spool"), self.work.clone())
    }

    /// Fails if less than `needed` bytes are free, or than are on the disk at once.
    pub(in crate::engine) fn check_space_for(&self, plan: &Plan, needed: u64) -> Result<()> {
        self.check_space(needed.min(held_at_once(plan, self.hands_over())))
    }
}

/// Bytes of shards that are on the disk at once: all of them, unless a command takes them away one after the other.
pub(super) fn held_at_once(plan: &Plan, hands_over: bool) -> u64 {
    let shards = plan.layout.shards.iter().map(|shard| shard.bytes);
    match hands_over {
        true => shards.clone().max().unwrap_or(0).saturating_mul(SHARDS_HANDED_OVER).min(shards.sum()),
        false => shards.sum(),
    }
}
