//! What the output directory's journal says of the inputs, where it keeps hashes of what is read of them: see `reads`.

use super::{Begin, OutputDir, kind};
use crate::error::Result;
use crate::plan::Plan;

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
