//! The command line: the only place that prints.
//!
//! - One file per verb; `args` says what can be asked, `lower` turns it into a recipe and a run.
//! - Results go to stdout; progress, warnings and the one error go to stderr (see `output`).
//! - Uses the crate's public API only.

mod analyze;
mod args;
mod bars;
mod completions;
mod diff;
mod estimate;
mod finish;
mod human;
mod inspect;
mod job;
mod jobs;
mod lower;
mod make;
mod man;
mod merge;
mod methods;
mod output;
mod pack;
mod parse;
mod perturb;
mod plan;
mod progress;
mod ranks;
mod run;
mod signals;
mod slurm;
mod statistics;
mod sweep;
mod table;
mod usage;
mod verify;

use std::ffi::OsString;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tiesmith::{Disk, Error, ErrorKind, IoMode, Online, Result, Storage};

use args::{Cli, Command};
use output::Out;
use progress::Progress;

/// Exit code of a comparison that found differences.
const DIFFERS: u8 = 1;

/// Runs the command line `argv` and returns the exit code. Everything there is to say has been said.
pub fn run(argv: impl IntoIterator<Item = OsString>) -> u8 {
    signals::survive_file_limit();
    let argv: Vec<OsString> = argv.into_iter().collect();
    let outcome = match Cli::read(&argv) {
        Ok(cli) => dispatch(cli.command),
        Err(error) if !error.use_stderr() => print(&error.render().to_string()),
        Err(error) => Err(usage::flatten(&error, &argv)),
    };
    signals::settle();
    match outcome {
        Ok(code) => code,
        Err(error) => {
            output::error(&error);
            match (error.kind(), signals::received()) {
                (ErrorKind::Interrupted, Some(signal)) => 128 + signal,
                _ => error.exit_code(),
            }
        }
    }
}

fn dispatch(command: Command) -> Result<u8> {
    match command {
        Command::Merge(args) => merge::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Sweep(args) => sweep::run(*args),
        Command::Perturb(args) => perturb::run(&args),
        Command::Analyze(args) => analyze::run(&args),
        Command::Run(args) => run::run(&args),
        Command::Finish(args) => finish::run(&args),
        Command::Slurm(args) => slurm::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Diff(args) => diff::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Pack(args) => pack::pack(&args),
        Command::Unpack(args) => pack::unpack(&args),
        Command::Methods(args) => methods::run(&args),
        Command::Completions(args) => completions::run(&args),
        Command::Man(args) => man::run(&args),
    }
}

/// Prints `text` on stdout; success unless stdout fails in another way than being closed.
fn print(text: &str) -> Result<u8> {
    let mut out = Out::stdout();
    out.text(text);
    out.finish()?;
    Ok(0)
}

/// Prints `value` as one JSON object on one line.
fn print_json(value: &impl serde::Serialize) -> Result<u8> {
    let json =
        serde_json::to_string(value).map_err(|e| Error::failed(format!("cannot write the report as JSON: {e}")))?;
    print(&format!("{json}\n"))
}

/// The local file system, and what is on the network; `progress` tells of waits for servers.
fn disk(io: IoMode, progress: &Progress) -> Arc<dyn Storage> {
    Arc::new(online(io, progress))
}

fn online(io: IoMode, progress: &Progress) -> Online {
    Online::new(Disk::new(io)).telling_waits(progress.waits())
}

/// The same with what `args` say of them.
fn inputs(args: &args::RunArgs, progress: &Progress) -> Result<Arc<dyn Storage>> {
    let online = online(args.io, progress);
    match (&args.cache.dir, args.cache.size) {
        (Some(dir), Some(size)) => Ok(Arc::new(online.with_cache(dir, size)?)),
        _ => Ok(Arc::new(online)),
    }
}

/// Makes a panic one line and exit code 1, once, whichever thread it happens in.
pub fn install_panic_hook() {
    static PANICKED: AtomicBool = AtomicBool::new(false);
    std::panic::set_hook(Box::new(|panic| {
        if PANICKED.swap(true, Ordering::SeqCst) {
            return;
        }
        let what = panic.payload_as_str().unwrap_or("unknown");
        let place = panic.location().map(|l| format!(" at {}:{}", l.file(), l.line()));
        let text = format!("internal: {what}{}", place.unwrap_or_default());
        output::error(&Error::failed(text).help("this is a defect of tiesmith, please report it"));
        std::process::exit(1);
    }));
}
