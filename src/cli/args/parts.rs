//! What can be asked of a merge in parts: `plan --save`, `run`, `finish`, `slurm`.

use std::path::PathBuf;

use clap::Args;
use tiesmith::{IoMode, Stage};

use super::words::io_modes;
use super::{MergeArgs, choice};
use crate::cli::estimate;
use crate::cli::parse;
use crate::cli::progress::Mode;
use crate::cli::ranks::PartSpec;

/// Examples of `run`.
pub const RUN_EXAMPLES: &str = "\
Examples:
  tiesmith plan --base llama --model chat --model code --out merged --save job.plan
  Four parts, on this machine or any other, in any order
    tiesmith run job.plan --part 1/4
  The part that Slurm, a Kubernetes Indexed Job (auto/N) or mpirun gives this process
    tiesmith run job.plan --part auto
  When all are done
    tiesmith finish job.plan";

/// Examples of `slurm`.
pub const SLURM_EXAMPLES: &str = "\
Examples:
  tiesmith slurm job.plan --parts 16 > submit.sh && bash submit.sh
  tiesmith slurm job.plan --parts 16 --threads 8 --memory 16GiB -- --partition=cpu --time=02:00:00";

/// How progress and the result are shown.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// Progress on stderr
    #[arg(long, value_name = "FORM", default_value = "auto", value_parser = choice(&[
        ("auto", "a bar on a terminal, plain lines elsewhere", Mode::Auto),
        ("bar", "a bar with rate and time left", Mode::Bar),
        ("plain", "a line per stage, then one every 10 seconds", Mode::Plain),
        ("json", "one JSON object per line", Mode::Json),
        ("none", "nothing but warnings and errors", Mode::None),
    ]))]
    pub progress: Mode,

    /// Print the result as one JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// What is kept of inputs on the network.
#[derive(Debug, Clone, Args)]
pub struct CacheArgs {
    /// Keep what is downloaded here for the next pass over it; gone when the run ends
    #[arg(long = "cache", id = "cache_dir", value_name = "DIR", requires = "cache_size")]
    pub dir: Option<PathBuf>,

    /// Most bytes to keep in --cache, such as 200GB
    #[arg(long = "cache-size", id = "cache_size", value_name = "SIZE", requires = "cache_dir", value_parser = parse::size)]
    pub size: Option<u64>,
}

/// What `--on-shard` does.
pub const ON_SHARD: &str = "\
Command for each finished shard, such as 'rclone copy {} remote:merged && rm {}'

The shell runs it when a shard is complete, durable and under its final name, before the index is there; {} is the shard's \
path, quoted. TIESMITH_SHARD (the path), TIESMITH_SHARD_NAME, _NUMBER (from 1), _COUNT, _BYTES, _BLAKE3 and TIESMITH_OUT are \
set. It may remove the shard: then the output need not fit on the disk, and four shards have to. That it succeeded is \
remembered. If it fails, the run ends with exit code 1, and the same command goes on with that shard. If the run is killed \
just then, it runs again: it must be one that may.";

/// Help of `--out`.
pub const OUT: &str = "\
Directory of the merged checkpoint, or an address to upload it to, such as s3://bucket/prefix

An address in an object store (s3://, gs://, az://; keys come from the environment) must have nothing under it. Shards are made \
in --work, a directory, uploaded one by one, and removed: four of them have to fit on the disk. The index is uploaded last. The same \
command goes on after an interruption, from the same directory. Of a merge in parts, 'tiesmith finish' uploads what the parts \
made in --work, which they share.";

/// Help of `--spool`.
pub const SPOOL: &str = "\
Directory for what is downloaded and needed again, or 'none' [default: in --out]

Where thresholds are sought over the whole model (--scope model), inputs are read twice. Of inputs on the network, what the \
merge needs of them (base, and of each model what may survive the trim) is kept on the disk until the run ends, compressed, so \
that every byte is downloaded once; 'tiesmith plan' says how much that is. Of thresholds per tensor, and of methods that look at \
whole tensors first, the same goes for tensors that do not fit into --memory, one at a time. What the disk has no room for is \
downloaded again. With 'none', or a --cache, nothing is kept.";

/// Inputs and options of `plan`.
#[derive(Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    pub merge: MergeArgs,

    /// Write the plan down, for 'tiesmith run' on several machines; needs --out
    #[arg(long, value_name = "FILE", help_heading = "Several machines")]
    pub save: Option<PathBuf>,

    /// Rate of the disks, such as 2GB/s: adds an estimate of the time
    #[arg(long, value_name = "RATE", help_heading = "Estimate", value_parser = estimate::rate)]
    pub disk: Option<f64>,

    /// Rate of the network, such as 1Gbit/s, where inputs are read over it
    #[arg(long, value_name = "RATE", help_heading = "Estimate", value_parser = estimate::rate)]
    pub network: Option<f64>,
}

#[derive(Debug, Args)]
pub struct RunPartArgs {
    /// What 'tiesmith plan --save' wrote
    #[arg(value_name = "JOB.plan")]
    pub job: PathBuf,

    /// Which part, of how many; 'auto' is what the scheduler gave this process, 'auto/N' where it does not say of how many
    #[arg(long, value_name = "I/N", value_parser = parse::part)]
    pub part: PartSpec,

    /// Do this pass only [default: all that is left, as far as nobody else does it]
    #[arg(long, value_name = "PASS", value_parser = choice(&[
        ("sketch", "count magnitudes to find the thresholds", Stage::Sketch),
        ("merge", "merge, once all parts are sketched", Stage::Merge),
    ]))]
    pub stage: Option<Stage>,

    #[command(flatten)]
    pub resources: ResourceArgs,

    /// How inputs are read; results are identical [default: as planned]
    #[arg(long, value_name = "MODE", value_parser = io_modes())]
    pub io: Option<IoMode>,

    #[command(flatten)]
    pub report: ReportArgs,
}

/// What a part may use, where that is not as planned.
#[derive(Debug, Args)]
pub struct ResourceArgs {
    /// Upper bound of peak resident memory [default: as planned]
    #[arg(long, value_name = "SIZE", value_parser = parse::size)]
    pub memory: Option<u64>,

    /// Worker threads [default: as planned, else one per core]
    #[arg(long, value_name = "N", value_parser = parse::threads)]
    pub threads: Option<usize>,
}

#[derive(Debug, Args)]
pub struct FinishArgs {
    /// What 'tiesmith plan --save' wrote
    #[arg(value_name = "JOB.plan")]
    pub job: PathBuf,

    #[command(flatten)]
    pub report: ReportArgs,
}

#[derive(Debug, Args)]
pub struct SlurmArgs {
    /// What 'tiesmith plan --save' wrote
    #[arg(value_name = "JOB.plan")]
    pub job: PathBuf,

    /// Number of parts: tasks of the arrays
    #[arg(long, value_name = "N", value_parser = parse::parts)]
    pub parts: usize,

    #[command(flatten)]
    pub resources: ResourceArgs,

    /// Options for every sbatch, such as --partition=NAME and --time=02:00:00
    #[arg(value_name = "SBATCH OPTION", last = true)]
    pub sbatch: Vec<String>,
}
