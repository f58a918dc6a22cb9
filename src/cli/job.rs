//! Plan files: a merge's command line, written down with what its inputs were, for processes on other machines.
//!
//! Whoever runs a part plans again, from the same arguments and the inputs' headers, and the result must be the same plan.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Parser;
use serde::{Deserialize, Serialize};
use tiesmith::{Disk, Error, IoMode, Job, Plan, Result, Run, Schedule, Storage};

use super::args::{Cli, Command, MergeArgs, ResourceArgs};
use super::progress::Progress;
use super::{jobs, lower};

/// Version of the file's format.
const VERSION: u32 = 1;
/// Longest plan file that is read: it lists the inputs' files.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// The field that tells such a file from others.
pub const MARK: &str = "tiesmith_plan";

/// What the file holds, as JSON.
#[derive(Debug, Serialize, Deserialize)]
struct PlanFile {
    tiesmith_plan: u32,
    /// Where the command was given: relative paths start there.
    directory: PathBuf,
    /// The command's arguments after `plan`.
    arguments: Vec<String>,
    job: Job,
}

/// A plan file, planned again.
pub struct Planned {
    pub args: Box<MergeArgs>,
    pub plan: Plan,
    pub job: Job,
    pub storage: Arc<dyn Storage>,
}

/// Writes down the merge that `args` describe. Returns how a part of it is run: with sketches as in all parts.
pub fn save(
    file: &Path,
    args: &MergeArgs,
    plan: &Plan,
    schedule: &Schedule,
    storage: &dyn Storage,
) -> Result<Schedule> {
    if lower::out_dir(args).is_none() {
        return Err(Error::usage("no output directory is given")
            .help("add '--out DIR': all parts write there, and the plan file says where"));
    }
    let mut output = lower::output(args)?;
    if output.hash_inputs {
        return Err(Error::usage("--hash-inputs is not for merges in parts")
            .help("leave it out; copies of inputs will do for parts if they keep their times (cp -p)"));
    }
    output.dir = std::path::absolute(&output.dir)
        .map_err(|e| Error::usage(format!("{}: {e}", output.dir.display())).help("choose another --out"))?;
    let arguments = std::env::args_os().skip(2).map(|argument| argument.into_string());
    let arguments = arguments.collect::<std::result::Result<_, _>>().map_err(|argument| {
        Error::usage(format!("{} is not UTF-8, so it cannot be saved", argument.display())).help("rename it")
    })?;
    let directory = std::env::current_dir()
        .map_err(|e| Error::failed(format!("cannot tell the current directory: {e}")).help("change to another one"))?;
    let mut job = Job::new(plan, schedule, &output)?;
    job.downloads = lower::downloads(args);
    // What is wrong with the address is known before parts have worked for it.
    job.address().map(|address| storage.list(address)).transpose()?;
    let in_parts = job.schedule(plan, lower::run(&args.run))?;
    let file_content = PlanFile { tiesmith_plan: VERSION, directory, arguments, job };
    let json = serde_json::to_string_pretty(&file_content)
        .map_err(|e| Error::failed(format!("cannot write the plan as JSON: {e}")))?;
    // A part where this is not mounted is to notice.
    if let Some(shared) = output.dir.parent().filter(|dir| !storage.is_dir(dir)) {
        storage.create_dir_all(shared).map_err(Error::as_input)?;
    }
    let scratch = file.parent().filter(|dir| *dir != Path::new("")).unwrap_or(Path::new("."));
    storage.write_small(file, (json + "\n").as_bytes(), scratch).map_err(Error::as_input)?;
    Ok(in_parts)
}

fn read(file: &Path) -> Result<PlanFile> {
    let bytes = Disk::new(IoMode::Auto)
        .read_small(file, MAX_FILE_BYTES)
        .map_err(|e| e.as_input().replace_help("give a file that 'tiesmith plan --save' wrote"))?;
    let plan: std::result::Result<PlanFile, _> = serde_json::from_slice(&bytes);
    match plan {
        Ok(plan) if plan.tiesmith_plan == VERSION => Ok(plan),
        Ok(plan) => Err(Error::input(format!("a plan file of version {}, not {VERSION}", plan.tiesmith_plan))
            .at(file)
            .help("plan again with this version of tiesmith")),
        Err(_) => Err(Error::input("not a plan file").at(file).help("give a file that 'tiesmith plan --save' wrote")),
    }
}

/// Plans again what `file` describes, reading inputs as `io` says; `progress` tells of waits.
pub fn load(file: &Path, io: Option<IoMode>, progress: &Progress) -> Result<Planned> {
    let PlanFile { directory, arguments, job, .. } = read(file)?;
    std::env::set_current_dir(&directory).map_err(|e| {
        Error::input(format!("the directory it was planned in cannot be entered here: {e}"))
            .at(&directory)
            .help("run parts where it is mounted under the same path, or plan with absolute paths from one that is")
    })?;
    let argv = ["tiesmith", "plan"].into_iter().map(str::to_owned).chain(arguments);
    let argv: Vec<_> = argv.map(std::ffi::OsString::from).collect();
    let cli = Cli::read(&argv).map_err(|_| {
        Error::input("its arguments are not understood by this version").at(file).help("plan again with it")
    })?;
    let Command::Plan(args) = cli.command else {
        return Err(Error::input("not a plan file").at(file));
    };
    let mut args = args.merge;
    args.run.io = io.unwrap_or(args.run.io);
    let storage = super::inputs(&args.run, progress)?;
    let mut merges = jobs::read(&args, "plan", &*storage)?;
    let mut merge = merges.pop().ok_or_else(|| Error::input("there is nothing to merge in it").at(file))?;
    let plan = merge.plan(&storage)?;
    Ok(Planned { args: Box::new(args), plan, job, storage })
}

/// What a part may use: as planned, unless it is said anew.
pub fn run(args: &MergeArgs, resources: &ResourceArgs) -> Run {
    let planned = lower::run(&args.run);
    let (memory_bytes, threads) = (planned.memory_bytes, planned.threads);
    Run::new(resources.memory.unwrap_or(memory_bytes), resources.threads.unwrap_or(threads))
}

/// What a plan file says, without a look at its inputs.
pub struct Saved {
    pub job: Job,
    /// What its command line says, for scripts.
    pub memory: u64,
    pub threads: Option<usize>,
}

/// Reads `file`.
pub fn saved(file: &Path) -> Result<Saved> {
    let plan = read(file)?;
    let argv = ["tiesmith".to_owned(), "plan".to_owned()].into_iter().chain(plan.arguments);
    match Cli::try_parse_from(argv).map(|cli| cli.command) {
        Ok(Command::Plan(args)) => {
            let run = &args.merge.run;
            Ok(Saved { job: plan.job, memory: run.memory, threads: run.threads })
        }
        _ => Err(Error::input("its arguments are not understood by this version").at(file).help("plan again with it")),
    }
}
