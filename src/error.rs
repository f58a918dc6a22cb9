//! The crate's one error type: what went wrong, where, with which numbers, and what to do about it.
//!
//! - `Error` is built once, at the place that knows the facts, and printed once, by `main`.
//! - `Display` is always a single line without control or bidirectional characters, at most
//!   [`MAX_MESSAGE_BYTES`] long, so that a hostile tensor name cannot disturb a terminal or a log.
//! - The kind decides the exit code; nothing else reads it.

use std::fmt;
use std::path::{Path, PathBuf};

/// Longest text an error prints, in bytes: with its prefix a line stays below 1,000.
pub const MAX_MESSAGE_BYTES: usize = 980;
/// Longest file, tensor or other name inside a message, in characters.
const MAX_NAME_CHARS: usize = 200;

/// Result with the crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a failure means for the person who ran the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The command line or the recipe is wrong; nothing was written.
    Usage,
    /// A checkpoint or the output place cannot be used as asked; nothing was written.
    Input,
    /// The work could not be done (I/O, disk full, in use by another run); the same command can be run again.
    Failed,
    /// The work was stopped on request; the same command goes on with it.
    Interrupted,
}

/// One failure. See the module's documentation.
#[derive(Debug, Clone)]
pub struct Error {
    kind: ErrorKind,
    /// It is about what a path is, and not about the moment: the next attempt would find the same.
    lasting: bool,
    message: String,
    path: Option<PathBuf>,
    tensor: Option<String>,
    help: Option<String>,
}

impl Error {
    /// A wrong command line or recipe.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Usage, message)
    }

    /// A checkpoint, side file or output place that cannot be used.
    pub fn input(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Input, message)
    }

    /// Work that failed on the way.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Failed, message)
    }

    /// Work that was stopped on request.
    pub fn interrupted(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Interrupted, message)
    }

    /// An operating-system error while doing `what` ("read", "create", ...) on `path`.
    pub fn io(what: &str, path: &Path, error: &std::io::Error) -> Self {
        Self { lasting: is_lasting(error.kind()), ..Self::failed(format!("cannot {what}: {error}")) }.at(path)
    }

    fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        let lasting = matches!(kind, ErrorKind::Usage | ErrorKind::Input);
        Self { kind, lasting, message: message.into(), path: None, tensor: None, help: None }
    }

    /// Names the file or directory concerned (the innermost one given first wins).
    #[must_use]
    pub fn at(mut self, path: &Path) -> Self {
        self.path.get_or_insert_with(|| path.to_path_buf());
        self
    }

    /// Names the tensor concerned (the innermost one given first wins).
    #[must_use]
    pub fn tensor(mut self, name: &str) -> Self {
        self.tensor.get_or_insert_with(|| name.to_owned());
        self
    }

    /// Says what to do next.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help.get_or_insert_with(|| help.into());
        self
    }

    /// Says where the user named what the error is about, as `file:line:column`.
    #[must_use]
    pub fn named_in(mut self, place: &str) -> Self {
        self.message.push_str(&format!(", named in {place}"));
        self
    }

    /// The same failure with what was tried before it.
    #[must_use]
    pub(crate) fn after(self, before: &str) -> Self {
        Self::new(self.kind, format!("{before}{self}"))
    }

    /// Says something else to do next.
    #[must_use]
    pub fn replace_help(self, help: impl Into<String>) -> Self {
        Self { help: Some(help.into()), ..self }
    }

    /// The same facts, seen as a problem of the input or the output place rather than of the work. What may be otherwise the next
    /// time (a disk that is full or fails, a server that does not answer, a lock) stays a failure.
    #[must_use]
    pub fn as_input(mut self) -> Self {
        if self.lasting {
            self.kind = ErrorKind::Input;
        }
        self
    }

    /// The same facts, seen as a problem of the work, which goes on when it is mended.
    #[must_use]
    pub fn as_failed(mut self) -> Self {
        self.kind = ErrorKind::Failed;
        self
    }

    /// What the failure means.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The process exit code that stands for this failure: 2 for usage and input, 1 for failed work, 130 for work that was
    /// stopped (by an interrupt from the keyboard; whoever knows another signal uses its number).
    pub fn exit_code(&self) -> u8 {
        match self.kind {
            ErrorKind::Usage | ErrorKind::Input => 2,
            ErrorKind::Failed => 1,
            ErrorKind::Interrupted => 130,
        }
    }
}

/// Whether the system will say the same until somebody changes the path, its permissions or a limit.
fn is_lasting(kind: std::io::ErrorKind) -> bool {
    use std::io::ErrorKind as Io;
    matches!(
        kind,
        Io::NotFound
            | Io::PermissionDenied
            | Io::AlreadyExists
            | Io::NotADirectory
            | Io::IsADirectory
            | Io::ReadOnlyFilesystem
            | Io::InvalidFilename
            | Io::InvalidInput
            | Io::Unsupported
            | Io::FileTooLarge
    )
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = String::new();
        if let Some(path) = &self.path {
            line.push_str(&printable(&path.to_string_lossy()));
            line.push_str(": ");
        }
        if let Some(tensor) = &self.tensor {
            line.push_str(&format!("tensor \"{}\": ", printable(tensor)));
        }
        line.push_str(&escape(&self.message));
        // The advice is never cut off: the facts before it are shortened instead.
        let help = self.help.as_deref().map(|h| format!("; {}", escape(h))).unwrap_or_default();
        cut_to_bytes(&mut line, MAX_MESSAGE_BYTES.saturating_sub(help.len()));
        line.push_str(&help);
        cut_to_bytes(&mut line, MAX_MESSAGE_BYTES);
        f.write_str(&line)
    }
}

impl std::error::Error for Error {}

/// `name` made fit for a terminal: control, bidirectional and line-separator characters are escaped and the text
/// is cut at 200 characters.
pub fn printable(name: &str) -> String {
    let mut chars = name.chars();
    let mut text: String = chars.by_ref().take(MAX_NAME_CHARS).collect();
    if chars.next().is_some() {
        text.push('…');
    }
    escape(&text)
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if is_unprintable(c) {
            escaped.extend(c.escape_unicode());
        } else {
            escaped.push(c);
        }
    }
    escaped
}

fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{61c}' | '\u{fff9}'..='\u{fffb}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

fn cut_to_bytes(text: &mut String, limit: usize) {
    if text.len() <= limit {
        return;
    }
    let mut end = limit.saturating_sub('…'.len_utf8());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text.push('…');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_file_tensor_numbers_and_advice_in_one_line() {
        let error = Error::input("shape [2, 3], but base has [3, 2]")
            .at(Path::new("dir/model.safetensors"))
            .tensor("lm_head.weight")
            .help("use --missing base");
        assert_eq!(
            error.to_string(),
            "dir/model.safetensors: tensor \"lm_head.weight\": shape [2, 3], but base has [3, 2]; use --missing base"
        );
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn what_may_pass_is_a_failure_wherever_it_happens() {
        use std::io::ErrorKind as Io;
        let code = |kind: Io| Error::io("write", Path::new("out"), &kind.into()).as_input().exit_code();
        for kind in [Io::StorageFull, Io::QuotaExceeded, Io::OutOfMemory, Io::ResourceBusy, Io::TimedOut, Io::Other] {
            assert_eq!(code(kind), 1, "{kind}");
        }
        for kind in [Io::PermissionDenied, Io::ReadOnlyFilesystem, Io::NotADirectory, Io::InvalidFilename] {
            assert_eq!(code(kind), 2, "{kind}");
        }
        assert_eq!(Error::failed("gave up").as_input().exit_code(), 1);
        assert_eq!(Error::input("no checkpoint").as_failed().exit_code(), 1);
    }

    #[test]
    fn hostile_names_cannot_reach_the_terminal() {
        let name = format!("a\n\u{1b}[31m\u{202e}{}", "x".repeat(5000));
        let text = Error::failed("bad\rname").tensor(&name).help("rename it").to_string();
        assert!(!text.chars().any(is_unprintable), "{text:?}");
        assert!(text.len() <= MAX_MESSAGE_BYTES);
        assert!(text.ends_with("; rename it"));
    }

    #[test]
    fn long_messages_are_cut_on_a_character_boundary() {
        let text = Error::failed("ä".repeat(4000)).to_string();
        assert!(text.len() <= MAX_MESSAGE_BYTES && text.ends_with('…'));
    }
}
