//! What the tests share: fixtures, the oracle, running the binary, reading results.
//!
//! Nothing here uses the crate under test: a mistake in it cannot hide itself.

pub mod adapters;
pub mod family;
pub mod files;
pub mod hub;
pub mod interference;
pub mod numbers;
pub mod oracle;
pub mod place;
pub mod random;
pub mod reference;
pub mod run;
pub mod statistics;
pub mod tensor;
pub mod torch;

use std::path::{Path, PathBuf};

/// A file or directory of the repository.
pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}
