//! What each fuzz target does with its bytes. `tests/fuzz.rs` runs the same with fixed seeds.
//!
//! Every function panics if the program does something wrong; a refusal is an [`Error`] with exit code 2 and one line.

pub mod adapter;
pub mod differential;
pub mod header;
pub mod index;
pub mod journal;
pub mod manifest;
pub mod packed;
pub mod recipe;
pub mod records;
pub mod torch;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tiesmith::{Disk, Error, IoMode, Storage};

/// A directory of this process for one target.
fn place(name: &str) -> PathBuf {
    let thread = format!("{:?}", std::thread::current().id()).replace(|c: char| !c.is_ascii_digit(), "");
    let dir = std::env::temp_dir().join(format!("tiesmith-fuzz-{name}-{}-{thread}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("the temporary directory can be written to");
    dir
}

/// Writes a file in there.
fn write(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).expect("the temporary directory can be written to");
}

fn storage() -> Arc<dyn Storage> {
    Arc::new(Disk::new(IoMode::Read))
}

/// A refusal, as every one must be.
fn refused(error: &Error) {
    let line = error.to_string();
    assert_eq!(error.exit_code(), 2, "{line}");
    assert!(line.len() < 1000 && !line.chars().any(char::is_control), "{line:?}");
}

/// A safetensors file.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}
