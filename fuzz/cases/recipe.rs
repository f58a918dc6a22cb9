//! Any text as a recipe file: reading it never panics, and every refusal names a place in the file.

use tiesmith::mergekit;

/// See the file's documentation.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Err(error) = mergekit::parse(text, "recipe.yml") {
        super::refused(&error);
        assert!(error.to_string().starts_with("recipe.yml:"), "{error}");
    }
}
