//! A finished output of which some files are written again. Nothing is journalled: a repair that is interrupted leaves
//! every file as it was or repaired, and is begun anew.

use std::path::Path;
use std::sync::Arc;

use super::{Found, JOURNAL, LOCK, OutputDir, work_dir};
use crate::engine::side_files::Content;
use crate::error::{Error, Result};
use crate::plan::ListedFile;
use crate::storage::Storage;

impl OutputDir {
    /// Takes the finished output in `dir`. Its manifest is there.
    pub(in crate::engine) fn for_repair(dir: &Path, storage: &Arc<dyn Storage>) -> Result<Self> {
        let work = work_dir(dir, &**storage)?;
        let begun = |storage: &dyn Storage| Found::look(dir, &work, storage).map(|found| found.begun());
        let unfinished = || {
            Err(Error::input("a merge into this output is unfinished")
                .at(dir)
                .help("run its command again, with --force where it replaces this output"))
        };
        if begun(&**storage)? {
            return unfinished();
        }
        let unwritable = |e: Error| e.as_input().help("repair needs to write there");
        let lock = storage.lock(&work.join(LOCK)).map_err(unwritable)?;
        if begun(&**storage)? {
            return unfinished();
        }
        let output = Self::taken(dir, work.join(JOURNAL), lock, storage);
        output.clear_work()?;
        Ok(output)
    }

    /// Puts `content` in the place of the damaged file `listed`, if it is what the manifest lists; else false.
    pub(in crate::engine) fn restore(&self, listed: &ListedFile, content: Content) -> Result<bool> {
        let made = self.stage(listed.name.clone(), content)?;
        let partial = self.partial(&listed.name);
        if (made.bytes, &made.blake3) != (listed.bytes, &listed.blake3) {
            self.storage.remove_file(&partial)?;
            return Ok(false);
        }
        self.storage.rename(&partial, &self.dir.join(&listed.name))?;
        self.storage.sync_dir(&self.dir)?;
        Ok(true)
    }
}
