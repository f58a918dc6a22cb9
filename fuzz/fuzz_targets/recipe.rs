//! Any text as a recipe file: reading it never panics, and every refusal names a place in the file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tiesmith::mergekit;

fuzz_target!(|text: &str| {
    if let Err(error) = mergekit::parse(text, "recipe.yml") {
        assert_eq!(error.exit_code(), 2, "{error}");
        assert!(error.to_string().starts_with("recipe.yml:"), "{error}");
    }
});
