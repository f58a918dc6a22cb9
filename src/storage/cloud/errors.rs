//! Errors of the crate `object_store`, for people. It says much of itself, and has most of what happened in its text alone.

use std::path::Path;

use object_store::Error as E;

use crate::error::{Error, printable};
use crate::storage::refusal;
use crate::storage::remote::ignores_ranges;

/// Where a machine of a provider is told keys of its own.
const OWN_KEYS: &str = "//169.254.169.254/";
const CHECK_KEYS: &str = "check the keys in the environment (AWS_ACCESS_KEY_ID, GOOGLE_SERVICE_ACCOUNT, \
                          AZURE_STORAGE_ACCOUNT_KEY), and this machine's clock";

/// What went wrong with `path`.
pub(super) fn explained(error: &E, path: &Path) -> Error {
    let text = error.to_string();
    let (status, said) = answer_in(&text).unwrap_or_default();
    if text.contains(OWN_KEYS) {
        return Error::input("there are no keys in the environment, and this machine gets none of its own")
            .at(path)
            .help(
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_SERVICE_ACCOUNT or AZURE_STORAGE_ACCOUNT_KEY",
            );
    }
    if text.contains("NoSuchBucket") {
        return Error::input("there is no such bucket").at(path).help("check the address, or make it");
    }
    match error {
        E::NotFound { .. } => Error::input("there is no such object").at(path).help("check the address"),
        E::Precondition { .. } => changed(path),
        E::NotSupported { .. } => ignores_ranges(path),
        _ if text.contains("non-partial response") => ignores_ranges(path),
        E::PermissionDenied { .. } | E::Unauthenticated { .. } => denied(said, path),
        _ if status.starts_with("401 ") || status.starts_with("403 ") => denied(said, path),
        _ => Error::failed(failure(error, &text, status, said))
            .at(path)
            .help("check the network, the keys and the region in the environment, and run the same command again"),
    }
}

/// What a changed object is.
pub(super) fn changed(path: &Path) -> Error {
    Error::failed("the object changed while it was read")
        .at(path)
        .help("do not change inputs during a run; run it again with --restart")
}

/// The status, and what the answer says, if `text` is about one.
fn answer_in(text: &str) -> Option<(&str, Option<String>)> {
    let (_, answer) = text.split_once("status code: ")?;
    let (status, body) = answer.split_once(": ").unwrap_or((answer, ""));
    Some((status, refusal::said(body)))
}

fn denied(said: Option<String>, path: &Path) -> Error {
    let text = said.as_ref().map_or("access is denied".to_owned(), |said| format!("access is denied ({said})"));
    Error::input(text).at(path).help(said.as_deref().and_then(refusal::advice).unwrap_or(CHECK_KEYS))
}

/// What failed, after how many attempts if it was tried again.
fn failure(error: &E, text: &str, status: &str, said: Option<String>) -> String {
    let why = match said {
        Some(said) => format!("the server says {status} ({said})"),
        None if !status.is_empty() => format!("the server says {status}"),
        // Of a request, the last cause says what happened.
        None if text.contains("Error performing ") => {
            let mut cause: &dyn std::error::Error = error;
            while let Some(next) = cause.source() {
                cause = next;
            }
            cause.to_string()
        }
        None => text.to_owned(),
    };
    // What stands behind a ? in an address may be a signature.
    let words = why.split_whitespace().map(|word| match word.contains("://") {
        true => word.split('?').next().unwrap_or_default(),
        false => word,
    });
    let why = printable(&words.collect::<Vec<_>>().join(" "));
    let retries = text.split_once(", after ").and_then(|(_, rest)| rest.split_once(" retries"));
    match retries.and_then(|(number, _)| number.parse::<u32>().ok()) {
        Some(retries) => format!("gave up after {} attempts: {why}", retries.saturating_add(1)),
        None => why,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> (u8, String) {
        let error = explained(&E::Generic { store: "S3", source: text.into() }, Path::new("s3://b/k"));
        (error.exit_code(), error.to_string())
    }

    #[test]
    fn what_the_crate_says_becomes_a_line_that_says_what_to_do() {
        let request = "Error performing list request: Error performing GET http://h/b?list-type=2&secret=s in 3ms";
        let refused = |status: &str, code: &str| {
            let body = format!("<Error><Code>{code}</Code><Message>Why.</Message></Error>");
            line(&format!("{request} - Server returned non-2xx status code: {status}: {body}"))
        };
        for (status, code, words) in [
            ("403 Forbidden", "RequestTimeTooSkewed", "(RequestTimeTooSkewed: Why); set this machine's clock"),
            ("403 Forbidden", "InvalidAccessKeyId", "access is denied (InvalidAccessKeyId: Why); check the keys"),
            ("401 Unauthorized", "AccessDenied", "access is denied (AccessDenied: Why); check the keys"),
            ("404 Not Found", "NoSuchBucket", "there is no such bucket"),
        ] {
            let (exit, line) = refused(status, code);
            assert!(exit == 2 && line.contains(words), "{line}");
        }
        let (exit, line_of) = refused("503 Slow Down", "SlowDown");
        assert!(exit == 1 && line_of.contains("the server says 503 Slow Down (SlowDown: Why); check the network"));
        let keys = "Error performing PUT http://169.254.169.254/latest/api/token in 1ms - HTTP error: no";
        let (exit, line_of) = line(keys);
        assert!(exit == 2 && line_of.contains("no keys in the environment"), "{line_of}");
        let (exit, line_of) =
            line(&format!("{request}, after 5 retries, max_retries: 5, retry_timeout: 90s  - HTTP error: no"));
        assert!(exit == 1 && line_of.contains("gave up after 6 attempts: "), "{line_of}");
        assert!(!line_of.contains("secret"), "{line_of}");
    }
}
