//! Where spools are, and how much they may hold.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use crate::engine::kept::Kept;
use crate::engine::output::OutputDir;
use crate::error::{Error, Result};
use crate::plan::{Plan, Spooling, spool_room};
use crate::storage::Storage;

/// Where a spool is to be.
pub(in crate::engine) struct Site<'a> {
    /// Its path where no other directory is asked for, and that directory.
    pub own: (PathBuf, PathBuf),
    /// What tells it from others of the same output.
    pub name: String,
    /// Where the output is made, of which so many bytes are on the disk at once.
    pub out: &'a Path,
    /// See `out`.
    pub at_once: u64,
    /// What an earlier attempt left is taken over.
    pub takes_over: bool,
    /// What is read for thresholds must be hashed.
    pub hashes: bool,
    /// The file system.
    pub storage: &'a dyn Storage,
    /// How much can be kept there.
    pub room: Room,
}

/// How much can be kept at a site, over all spools that it has one after the other.
#[derive(Default)]
pub(in crate::engine) struct Room {
    /// In bytes, once that was asked for.
    bytes: OnceLock<u64>,
    /// Whether it was told that they are too few.
    pub(super) told: Arc<AtomicBool>,
}

impl<'a> Site<'a> {
    /// That of a merge into `output`, of which `kept` is done; `hashes` says that what is read must be hashed.
    pub(in crate::engine) fn of_merge(plan: &Plan, output: &'a OutputDir, kept: &Kept, hashes: bool) -> Self {
        Self {
            own: output.spool(),
            name: String::new(),
            out: &output.dir,
            at_once: output.bytes_at_once(plan).min(kept.bytes_left(plan)),
            takes_over: output.resumes(),
            hashes,
            storage: &*output.storage,
            room: Room::default(),
        }
    }

    /// Whether what an earlier attempt left is taken over, if thresholds are still sought or not.
    pub(super) fn takes_over(&self, searches: bool) -> bool {
        self.takes_over && !(searches && self.hashes)
    }

    /// The spool's path, and the directory that it is in.
    pub(super) fn place(&self, plan: &Plan, spooling: &Spooling) -> Result<(PathBuf, PathBuf)> {
        let Some(dir) = &spooling.dir else { return Ok(self.own.clone()) };
        if !self.storage.is_dir(dir) {
            return Err(Error::input("there is no such directory for --spool").at(dir).help("create it"));
        }
        // Several merges may use one directory.
        let out = self.storage.canonical(self.out);
        let name = blake3::hash(format!("{} {}{}", plan.fingerprint, out.display(), self.name).as_bytes()).to_hex();
        Ok((dir.join(format!("tiesmith-{}.spool", &name[..16])), dir.clone()))
    }

    /// How many bytes can be kept in `dir`. Tensors have their spools one after the other: what the output takes meanwhile was set
    /// aside for it from the beginning.
    pub(super) fn room(&self, dir: &Path) -> Result<u64> {
        if let Some(&room) = self.room.bytes.get() {
            return Ok(room);
        }
        let room = spool_room(dir, (self.out, self.at_once), self.storage)?;
        Ok(*self.room.bytes.get_or_init(|| room))
    }
}
