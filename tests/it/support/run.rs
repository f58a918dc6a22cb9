//! Runs the binary and judges how it ended.

use std::ffi::OsStr;
use std::process::{Command, Stdio};

use serde_json::Value;

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The arguments, for messages.
    pub command: String,
    /// Exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// The binary, in an environment that owes nothing to the machine.
pub fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tiesmith"));
    for variable in ["HF_HOME", "HF_HUB_CACHE", "NO_COLOR", "CLICOLOR_FORCE", "RUST_BACKTRACE"] {
        command.env_remove(variable);
    }
    for variable in ["HF_TOKEN", "HF_ENDPOINT", "HF_TOKEN_PATH", "HF_HUB_DOWNLOAD_TIMEOUT"] {
        command.env_remove(variable);
    }
    // Nothing leaves the machine, whatever a test names.
    command.env("HF_HUB_OFFLINE", "1").stdin(Stdio::null());
    command
}

/// Runs `tiesmith ARGS`.
pub fn tiesmith<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Outcome {
    let mut command = command();
    command.args(args);
    run(command)
}

/// Runs a prepared command.
pub fn run(mut command: Command) -> Outcome {
    let output = command.output().expect("the binary starts");
    let args: Vec<_> = command.get_args().map(|arg| arg.to_string_lossy()).collect();
    Outcome {
        command: format!("tiesmith {}", args.join(" ")),
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("stdout is UTF-8"),
        stderr: String::from_utf8(output.stderr).expect("stderr is UTF-8"),
    }
}

impl Outcome {
    /// Fails unless the exit code is 0.
    #[track_caller]
    pub fn succeeded(self) -> Self {
        self.exited(0)
    }

    /// Fails unless the exit code is `code`.
    #[track_caller]
    pub fn exited(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{}\n{}{}", self.command, self.stdout, self.stderr);
        self
    }

    /// The JSON object on stdout.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|e| panic!("{}\nstdout is not one JSON value: {e}\n{}", self.command, self.stdout))
    }

    /// The one `error: ` line of a refusal: exit code 2, and nothing else on stderr but `warning: ` lines.
    #[track_caller]
    pub fn refusal(&self) -> &str {
        self.error_line(2)
    }

    /// The one `error: ` line of a run that ended with `code`.
    #[track_caller]
    pub fn error_line(&self, code: i32) -> &str {
        let shown = format!("{}\nexit {:?}\n{}", self.command, self.code, self.stderr);
        assert_eq!(self.code, Some(code), "{shown}");
        let lines: Vec<&str> = self.stderr.lines().filter(|line| !line.starts_with("warning: ")).collect();
        assert_eq!(lines.len(), 1, "not exactly one line of error\n{shown}");
        let line = lines[0];
        assert!(line.starts_with("error: "), "{shown}");
        assert!(line.len() <= 1000 + "error: ".len(), "more than 1,000 bytes\n{shown}");
        assert!(!line.chars().any(char::is_control), "control characters\n{shown}");
        for word in ["panicked", "RUST_BACKTRACE", ".rs:"] {
            assert!(!self.stderr.contains(word), "{word}\n{shown}");
        }
        line
    }
}
