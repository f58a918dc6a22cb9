//! Merges fine-tuned checkpoints that do not fit in memory: TIES-Merging (arXiv 2306.01708), task arithmetic, averaging.
//!
//! Checkpoints flow through a plan that places every output byte before the first byte of tensor data is read: a
//! *sketch pass* finds the trim thresholds, a *merge pass* elects signs and writes shards.
//!
//! **Output bytes are a pure function of the recipe and the inputs.** Threads, memory, chunk lengths, instruction sets
//! and the way files are read change how long a merge takes, never what it gives.
//!
//! - [`Recipe`]: what is wanted, free of any dialect.
//! - [`Plan`]: recipe and checkpoints reconciled; nothing is left to decide.
//! - [`Schedule`]: the plan cut into pieces that fit a memory budget.
//! - [`merge()`]: does it, and publishes the result atomically.
//!
//! ```no_run
//! use std::sync::Arc;
//! use tiesmith::{Disk, IoMode, ModelInput, Observer, OutputOptions, Plan, Recipe, Run, Schedule, Storage};
//!
//! struct Silent;
//! impl Observer for Silent {}
//!
//! # fn main() -> tiesmith::Result<()> {
//! let model = |source: &str| ModelInput { source: source.into(), ..ModelInput::default() };
//! let recipe = Recipe {
//!     base: Some("llama".into()),
//!     models: vec![model("chat"), model("code")],
//!     ..Recipe::default()
//! };
//! let storage: Arc<dyn Storage> = Arc::new(Disk::new(IoMode::Auto));
//! let plan = Plan::new(&recipe, &storage)?;
//! let schedule = Schedule::new(&plan, Run::new(2 << 30, 8))?;
//! let output = OutputOptions { dir: "merged".into(), ..OutputOptions::default() };
//! let report = tiesmith::merge(&plan, &schedule, &output, &storage, &Silent)?;
//! println!("kept {:?} of each task vector", report.kept_fraction);
//! # Ok(())
//! # }
//! ```

mod checkpoint;
mod dtype;
mod engine;
mod error;
mod journal;
mod kernels;
mod limits;
mod method;
mod plan;
mod recipe;
mod report;
mod sketch;
mod storage;

pub use checkpoint::Checkpoint;
pub use dtype::{Dtype, Float, dtype_name};
pub use engine::{
    AnalysisReport, Change, Damage, DamagedFile, DiffOptions, DiffReport, DtypeTotal, FactorReport, InspectReport, Job,
    Observer, Octave, OnShard, OutputOptions, PackOutput, PackReport, Part, PartReport, Report, Stage, Study,
    SweepEntry, SweepOptions, SweepReport, TensorDiff, TensorStats, ValueStats, Variant, VerifyReport, analyze,
    check_side_files, diff, finish, inspect, is_finished, merge, pack, repair, run_part, sweep, verify,
};
pub use error::{Error, ErrorKind, Result, printable};
pub use method::{METHODS, Method, ParamKind, ParamSpec, Statistics, Value};
pub use plan::{
    Downloads, InputSummary, ListedFile, Manifest, PassSummary, Plan, PlanSummary, Run, Schedule, Spread, spool_room,
};
pub use recipe::mergekit;
pub use recipe::{
    BaseLayers, Case, ChatTemplate, Filter, LayerSource, Missing, ModelInput, Module, ModuleModel, NonFinite, Overflow,
    Params, Recipe, Scope, Setting, Slice, ThresholdKind, TokenRule, TokenSource, TrimTies, Vocabulary,
};
pub use report::{Analysis, Line, Remark, remarks};
pub use storage::{Disk, Identity, InputFile, IoMode, Lock, Online, OutputFile, Pinned, Storage, Window};
pub use storage::{is_object, read_fully, write_fully};

/// What the benchmarks measure. No part of the API: it changes without notice.
#[doc(hidden)]
pub mod bench {
    pub use crate::kernels::{
        Counted, Fused, Isa, NO_KEY, Stored, add, add_scaled, all_finite, collect, combine_mean, conflicts, elect_mass,
        histogram, load, merge_stored, store, task_vector, trim,
    };
}

/// What the fuzz targets take apart. No part of the API: it changes without notice.
#[doc(hidden)]
pub mod fuzz {
    pub use crate::engine::{Decoded, decode_journal, packing_left};
}
