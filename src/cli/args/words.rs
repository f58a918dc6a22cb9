//! Options whose values are words, used by more than one command.

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use tiesmith::{Float, IoMode};

use super::choice;

/// How inputs are read.
pub(super) fn io_modes() -> impl TypedValueParser<Value = IoMode> {
    choice(&[
        ("auto", "map long windows of local files, read the rest", IoMode::Auto),
        ("mmap", "map windows of the files", IoMode::Mmap),
        ("read", "read into buffers; for network file systems", IoMode::Read),
    ])
}

/// The types that can be asked for, with the names that other tools use for them.
pub(super) fn dtypes() -> impl TypedValueParser<Value = Float> {
    static TYPES: [(Float, &[&str]); 3] =
        [(Float::F32, &["fp32", "f32"]), (Float::BF16, &["bf16"]), (Float::F16, &["fp16", "f16"])];
    let words = TYPES.iter().map(|(float, aliases)| PossibleValue::new(float.torch_name()).aliases(*aliases));
    PossibleValuesParser::new(words).map(|word| {
        let named =
            |(float, aliases): &&(Float, &[&str])| float.torch_name() == word || aliases.contains(&word.as_str());
        TYPES.iter().find(named).expect("clap checked the word").0
    })
}
