//! Writing to stdout and stderr without ever panicking.
//!
//! - A closed pipe is the reader's choice and no failure: the rest of the text is dropped.
//! - Any other failure on stdout (a full disk behind a redirection) is the command's failure.
//! - stderr has nowhere to complain to: its failures are dropped.

use std::io::{self, ErrorKind, Write};

use tiesmith::{Error, Result};

/// Standard output, buffered; remembers the first failure.
pub struct Out {
    writer: io::BufWriter<io::Stdout>,
    failure: Option<io::Error>,
}

impl Out {
    /// Standard output.
    pub fn stdout() -> Self {
        Self { writer: io::BufWriter::new(io::stdout()), failure: None }
    }

    /// Writes `text` as it is.
    pub fn text(&mut self, text: &str) {
        if self.failure.is_none() {
            self.failure = self.writer.write_all(text.as_bytes()).err();
        }
    }

    /// Flushes, and reports a failure other than a closed pipe.
    pub fn finish(mut self) -> Result<()> {
        if self.failure.is_none() {
            self.failure = self.writer.flush().err();
        }
        // What could not be written must not be tried again when the buffer is dropped.
        let _ = self.writer.into_parts();
        match self.failure {
            Some(error) if error.kind() != ErrorKind::BrokenPipe => {
                Err(Error::failed(format!("cannot write to standard output: {error}")))
            }
            _ => Ok(()),
        }
    }
}

/// Prints one line on stderr.
pub fn stderr_line(line: &str) {
    // One write, so that lines of several threads do not mix.
    let _ = io::stderr().lock().write_all(format!("{line}\n").as_bytes());
}

/// Prints the command's one error.
pub fn error(error: &Error) {
    stderr_line(&format!("error: {error}"));
}

/// `message` fit for one line of a terminal, as errors are.
pub fn one_line(message: &str) -> String {
    Error::failed(message).to_string()
}
