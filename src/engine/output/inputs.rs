//! Inputs and the output directory: what its journal says of them, where it keeps hashes of what is read (see `reads`), and
//! which directories would overwrite them.

use std::path::Path;

use super::{Begin, OutputDir, kind};
use crate::checkpoint::CheckpointFile;
use crate::error::{Error, Result, printable};
use crate::plan::Plan;
use crate::storage::{Identity, Storage};

impl OutputDir {
    /// Whether the journal keeps hashes of what is read.
    pub(in crate::engine) fn hashes_inputs(&self) -> bool {
        self.inputs.as_ref().is_some_and(Begin::has_hashes)
    }

    /// Whether they were asked for when the journal was begun without them.
    pub(in crate::engine) fn lacks_hashes(&self) -> bool {
        self.hash_inputs && !self.hashes_inputs()
    }

    /// Which input was touched or copied since the journal was written, so that content has to be compared.
    pub(in crate::engine) fn touched(&self, plan: &Plan) -> Option<String> {
        self.inputs.as_ref().filter(|begin| begin.has_hashes()).and_then(|begin| begin.touched(plan))
    }

    /// Records that the inputs of `plan`, as they are now, are those that the work was begun with.
    pub(in crate::engine) fn record_inputs(&self, plan: &Plan) -> Result<()> {
        self.record(kind::INPUTS, &Begin::of(plan)?.with_hashes(true).encode()?)
    }
}

/// An output directory that is an input's directory would be overwritten while it is read, and one that holds a file of
/// an input, by whatever path that was named, would lose it.
pub(in crate::engine) fn refuse_inputs(plan: &Plan, dir: &Path, storage: &dyn Storage) -> Result<()> {
    let Some(out) = storage.identity(dir)? else { return Ok(()) };
    let refuse = |what: String| Err(Error::input(what).at(dir).help("choose another --out"));
    for checkpoint in &plan.checkpoints {
        let input = storage.identity(&checkpoint.dir)?;
        if input.is_some_and(|input| is_same(storage, (&checkpoint.dir, &input), (dir, &out))) {
            return refuse(format!("the output directory is the input {}", printable(&checkpoint.spec)));
        }
    }
    let names = if storage.is_dir(dir) { storage.list(dir).map_err(Error::as_input)? } else { Vec::new() };
    for path in names.iter().map(|name| dir.join(name)) {
        let Some(there) = storage.identity(&path)? else { continue };
        for checkpoint in &plan.checkpoints {
            let is_it =
                |file: &&CheckpointFile| is_same(storage, (file.file.path(), file.file.identity()), (&path, &there));
            if let Some(file) = checkpoint.files.iter().find(is_it) {
                let (name, input) = (path.file_name().unwrap_or_default().to_string_lossy(), file.file.path());
                return refuse(format!(
                    "its {} is a file of the input {} ({})",
                    printable(&name),
                    printable(&checkpoint.spec),
                    printable(&input.to_string_lossy())
                ));
            }
        }
    }
    Ok(())
}

/// Whether two paths with their identities are one file. Where inodes are not known, only the resolved paths can tell.
fn is_same(storage: &dyn Storage, (a, of_a): (&Path, &Identity), (b, of_b): (&Path, &Identity)) -> bool {
    match of_a.inode {
        0 => storage.canonical(a) == storage.canonical(b),
        inode => (of_a.device, inode) == (of_b.device, of_b.inode),
    }
}
