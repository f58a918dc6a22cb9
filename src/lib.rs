//! tiesmith merges checkpoints that do not fit in memory.

mod checkpoint;
mod dtype;
mod engine;
mod error;
mod kernels;
mod limits;
mod method;
mod plan;
mod recipe;
mod sketch;
mod storage;

pub use checkpoint::Checkpoint;
pub use dtype::{Dtype, Float, dtype_name};
pub use engine::{
    Change, DiffOptions, DiffReport, DtypeTotal, InspectReport, Observer, OutputOptions, Report, TensorDiff,
    TensorStats, ValueStats, diff, inspect, merge,
};
pub use error::{Error, ErrorKind, Result, printable};
pub use method::{METHODS, Method, ParamKind, ParamSpec, Value};
pub use plan::{InputSummary, PassSummary, Plan, PlanSummary, Run, Schedule};
pub use recipe::{Missing, ModelInput, NonFinite, Overflow, Recipe, Scope, ThresholdKind, TrimTies};
pub use storage::{Disk, IoMode, Storage};
