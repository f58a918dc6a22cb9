//! `tiesmith completions`: a completion script for a shell.

use clap::CommandFactory;
use tiesmith::Result;

use super::args::{Cli, CompletionsArgs};
use super::print;

/// Runs the command.
pub fn run(args: &CompletionsArgs) -> Result<u8> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "tiesmith", &mut script);
    print(&String::from_utf8_lossy(&script))
}
