//! Outputs in an object store: what is complete in the directory is uploaded, and removed from it.
//!
//! - Shards go when they are complete, side files after them, and last what makes the output loadable: until then no loader sees
//!   a model there.
//! - What was uploaded is known by the journal, with the address. When all of it is, the directory is removed.
//! - Nothing that is there already is replaced.

use std::path::{Path, PathBuf};

use super::{INDEX, LOADABLE, MANIFEST, OutputDir, is_file_name};
use crate::engine::Observer;
use crate::engine::hand_over::{AllHandedOver, OnShard};
use crate::error::{Error, Result, printable};
use crate::plan::Plan;
use crate::storage::Storage;

/// The address that shards are uploaded to, if they are.
pub(in crate::engine) fn address(on_shard: Option<&OnShard>) -> Option<&str> {
    match on_shard {
        Some(OnShard::Upload(address)) => Some(address),
        Some(OnShard::Command(_)) | None => None,
    }
}

/// Refuses an address at which something is.
pub(super) fn refuse_occupied(on_shard: Option<&OnShard>, storage: &dyn Storage) -> Result<()> {
    let Some(address) = address(on_shard).map(Path::new) else { return Ok(()) };
    let names = storage.list(address)?;
    match names.first() {
        None => Ok(()),
        Some(name) => {
            let name = printable(&name.to_string_lossy());
            Err(Error::input(format!("something is there already ({} objects, such as {name})", names.len()))
                .at(address)
                .help("use another --out, or remove it; an interrupted upload goes on where its --work is"))
        }
    }
}

impl OutputDir {
    /// Where the output is uploaded to.
    pub(in crate::engine) fn address(&self) -> Option<&str> {
        address(self.on_shard.as_ref())
    }

    /// Fails if shards that are gone were uploaded to another address than what is left would be.
    pub(super) fn refuse_other_address(&self, handed_over: &AllHandedOver) -> Result<()> {
        let there = |to: Option<&str>| to.map_or("no address".to_owned(), printable);
        match handed_over.values().find(|shard| shard.to.as_deref() != self.address()) {
            None => Ok(()),
            Some(shard) => {
                let (then, now) = (there(shard.to.as_deref()), there(self.address()));
                Err(Error::input(format!("shards of the unfinished merge were uploaded to {then}, and now to {now}"))
                    .at(&self.dir)
                    .help("use the same --out, or --restart to start over"))
            }
        }
    }

    /// Uploads the file called `name`.
    pub(in crate::engine) fn upload(&self, name: &str, observer: &dyn Observer) -> Result<()> {
        let Some(address) = self.address() else { return Ok(()) };
        let to = PathBuf::from(format!("{}/{name}", address.trim_end_matches('/')));
        self.storage.upload(&self.dir.join(name), &to, &|| observer.go_on())
    }

    /// Uploads what lies beside the shards of a published output, but for the index.
    pub(super) fn upload_side_files(&self, observer: &dyn Observer) -> Result<()> {
        if self.address().is_none() {
            return Ok(());
        }
        self.side_files()?.iter().try_for_each(|name| self.upload(name, observer))
    }

    /// Makes the output loadable where it is uploaded to, and removes it here: first what makes it loadable.
    pub(super) fn upload_last(&self, plan: &Plan, observer: &dyn Observer) -> Result<()> {
        if self.address().is_none() {
            return Ok(());
        }
        if plan.layout.index_json().is_some() {
            self.upload(INDEX, observer)?;
        }
        self.remove_uploaded(plan);
        Ok(())
    }

    /// Removes what is uploaded: first what makes it loadable, and last the manifest, which says what there is.
    pub(super) fn remove_uploaded(&self, plan: &Plan) {
        let side_files = self.side_files().unwrap_or_default();
        // Best effort: all of it is where it should be.
        let remove = |name: &str| drop(self.storage.remove_file(&self.dir.join(name)));
        LOADABLE.into_iter().for_each(remove);
        // What is loadable here after a crash is whole.
        let _ = self.storage.sync_dir(&self.dir);
        plan.layout.shards.iter().for_each(|shard| remove(&shard.name));
        side_files.iter().filter(|name| *name != MANIFEST).for_each(|name| remove(name));
        // Before the manifest goes, which says what there is.
        let _ = self.storage.sync_dir(&self.dir);
        remove(MANIFEST);
        // Before the journal goes, which says whose they are.
        let _ = self.storage.sync_dir(&self.dir);
    }

    /// Names of the manifest and of the files that it lists beside shards and index.
    fn side_files(&self) -> Result<Vec<String>> {
        let manifest = self.manifest()?.unwrap_or_default();
        let listed = manifest["side_files"].as_array().into_iter().flatten();
        let names =
            listed.filter_map(|entry| entry["name"].as_str()).filter(|name| is_file_name(name) && *name != INDEX);
        Ok(names.chain([MANIFEST]).map(str::to_owned).collect())
    }
}
