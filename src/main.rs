//! Parse, run, map the error to an exit code.
//!
//! A panic is a defect of the program, not of its input: it too ends as one line and exit code 1.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::install_panic_hook();
    ExitCode::from(cli::run(std::env::args_os()))
}
