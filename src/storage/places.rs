//! Where huggingface_hub keeps what it downloaded and the user's token, as the environment has it.
//!
//! Variables that are empty count as not set, and `~` at a path's beginning is the user's home.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// A value of the environment; replaced by tests.
pub type Env<'a> = &'a dyn Fn(&str) -> Option<OsString>;

fn home(env: Env<'_>) -> Option<PathBuf> {
    env("HOME").or_else(|| env("USERPROFILE")).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn path(env: Env<'_>, name: &str) -> Option<PathBuf> {
    let path = env(name).filter(|value| !value.is_empty()).map(PathBuf::from)?;
    match path.strip_prefix("~") {
        Ok(rest) => home(env).map(|home| home.join(rest)),
        Err(_) => Some(path),
    }
}

/// `HF_HOME`, and what it is by default.
fn hub_home(env: Env<'_>) -> Option<PathBuf> {
    let by_default = || path(env, "XDG_CACHE_HOME").or_else(|| home(env).map(|home| home.join(".cache")));
    path(env, "HF_HOME").or_else(|| by_default().map(|cache| cache.join("huggingface")))
}

/// The directory of downloaded repositories.
pub fn hub_cache(env: Env<'_>) -> Option<PathBuf> {
    path(env, "HF_HUB_CACHE")
        .or_else(|| path(env, "HUGGINGFACE_HUB_CACHE"))
        .or_else(|| hub_home(env).map(|home| home.join("hub")))
}

/// The repository and the commit that a path in the Hub's cache is of (`.../models--org--name/snapshots/COMMIT/file`).
pub(super) fn cached(path: &Path) -> Option<(String, String)> {
    let names: Vec<&str> = path.iter().map(|name| name.to_str().unwrap_or_default()).collect();
    let at = names.windows(2).rposition(|pair| pair[0].starts_with("models--") && pair[1] == "snapshots")?;
    let id = names[at].strip_prefix("models--")?.replacen("--", "/", 1);
    Some((id, (*names.get(at + 2)?).to_owned()))
}

/// The file that logging in writes the token to.
pub(super) fn token_file(env: Env<'_>) -> Option<PathBuf> {
    path(env, "HF_TOKEN_PATH").or_else(|| hub_home(env).map(|home| home.join("token")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_in_the_cache_tells_its_repository() {
        let of = |path: &str| cached(Path::new(path));
        let found = of("/c/hub/models--org--my--name/snapshots/0123/sub/config.json").unwrap();
        assert_eq!(found, ("org/my--name".to_owned(), "0123".to_owned()));
        for other in ["/c/models--org--name/blobs/0123", "/c/snapshots/0123/config.json", "models--a--b/snapshots"] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn cache_and_token_are_looked_for_in_the_same_home() {
        for (variables, home) in [
            (&[("HOME", "/h")][..], "/h/.cache/huggingface"),
            (&[("HOME", ""), ("USERPROFILE", "/u")], ""),
            (&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")], "/x/huggingface"),
            (&[("HOME", "/h"), ("XDG_CACHE_HOME", "~/x")], "/h/x/huggingface"),
            (&[("HOME", "/h"), ("HF_HOME", "~/hf")], "/h/hf"),
            (&[("HOME", "/h"), ("HF_HOME", "/hf"), ("XDG_CACHE_HOME", "/x")], "/hf"),
            (&[("HOME", "/h"), ("HF_HOME", "")], "/h/.cache/huggingface"),
        ] {
            let env = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into());
            let expected = |file: &str| (!home.is_empty()).then(|| PathBuf::from(home).join(file));
            assert_eq!(hub_cache(&env), expected("hub"), "{variables:?}");
            assert_eq!(token_file(&env), expected("token"), "{variables:?}");
        }
        let env = |name: &str| match name {
            "HOME" => Some("/h".into()),
            "HF_HUB_CACHE" => Some("~/c".into()),
            "HF_TOKEN_PATH" => Some("~/t".into()),
            _ => None,
        };
        assert_eq!(hub_cache(&env), Some("/h/c".into()));
        assert_eq!(token_file(&env), Some("/h/t".into()));
    }
}
