//! The Hugging Face Hub's interface: what a revision is and which files it has.
//!
//! - A revision is asked for once, and means one commit from then on.
//! - Token, endpoint and being offline are told by the variables that huggingface_hub reads.
//! - A refusal is explained: missing, private, gated, wrong token.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::http::{Answer, Failure, Http, Patience, settled};
use super::waits::Waits;
use crate::error::{Error, Result, printable};

/// Longest accepted list of a repository's files.
const MAX_LIST_BYTES: u64 = 64 << 20;

/// Where the Hub is, and who asks.
pub(super) struct Hub {
    pub endpoint: String,
    pub offline: bool,
    pub http: Http,
}

/// A repository at one commit.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub id: String,
    pub commit: String,
    /// Paths in the repository.
    pub files: Vec<String>,
}

#[derive(Deserialize)]
struct Info {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// A value of the environment that is not empty.
fn variable(name: &str) -> Option<String> {
    std::env::var_os(name).and_then(|value| value.into_string().ok()).filter(|value| !value.trim().is_empty())
}

impl Hub {
    /// The Hub as the environment has it.
    pub(super) fn from_environment(waits: Arc<Waits>) -> Self {
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let endpoint = endpoint.trim().trim_end_matches('/').to_owned();
        let yes =
            |name| variable(name).is_some_and(|v| matches!(v.to_lowercase().as_str(), "1" | "on" | "yes" | "true"));
        let http = Http::new(&endpoint, token(), waits);
        Self { offline: yes("HF_HUB_OFFLINE"), http, endpoint }
    }

    /// The commit and the files that `revision` of repository `id` means now.
    pub(super) fn snapshot(&self, id: &str, revision: Option<&str>) -> Result<Snapshot> {
        let revision = revision.unwrap_or("main");
        if self.offline {
            return Err(Error::input("HF_HUB_OFFLINE is set, so the Hub is not asked")
                .at(Path::new(id))
                .help("unset it, or download the model first"));
        }
        let url = format!("{}/api/models/{id}/revision/{}", self.endpoint, escaped(revision, ""));
        let mut patience = Patience::at_first(&self.http);
        let body = loop {
            let body = self.http.get(&url, None).and_then(settled).and_then(|answer| {
                if !answer.response.status().is_success() {
                    return Err(Failure::Final(self.refused(&answer, id, revision)));
                }
                self.http.body(answer, MAX_LIST_BYTES)
            });
            match body {
                Ok(body) => break body,
                Err(failure) => patience.after(failure, &url)?,
            }
        };
        let info: Info = serde_json::from_slice(&body).map_err(|_| {
            Error::input("the answer is not what the Hub says about a model")
                .at(Path::new(&url))
                .help("check HF_ENDPOINT")
        })?;
        let plain = !info.sha.is_empty() && info.sha.chars().all(|c| c.is_ascii_alphanumeric());
        if !plain {
            return Err(Error::input(format!("\"{}\" is not a commit", printable(&info.sha))).at(Path::new(&url)));
        }
        let files = info.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        Ok(Snapshot { id: id.to_owned(), commit: info.sha, files })
    }

    /// The address of a file.
    pub(super) fn address(&self, snapshot: &Snapshot, file: &str) -> String {
        format!("{}/{}/resolve/{}/{}", self.endpoint, snapshot.id, snapshot.commit, escaped(file, "/"))
    }

    /// What a status that is no success says about a repository.
    pub(super) fn refused(&self, answer: &Answer, id: &str, revision: &str) -> Error {
        let status = answer.response.status().as_u16();
        let code = answer.header("x-error-code").unwrap_or_default();
        let page = format!("{}/{id}", self.endpoint);
        let error = match (status, code) {
            (_, "GatedRepo") => Error::input("the model is gated, and this account has no access to it")
                .help(format!("accept its terms at {page}, and set HF_TOKEN to a token of that account")),
            (404, "RevisionNotFound") => Error::input(format!("there is no revision {}", printable(revision)))
                .help(format!("look it up at {page}")),
            (404, "EntryNotFound") => Error::input("there is no such file").help(format!("look at {page}")),
            (401 | 403 | 404, _) if self.http.has_token() => {
                Error::input(format!("there is no such model, or this token may not read it (status {status})"))
                    .help("check the name, and HF_TOKEN or ~/.cache/huggingface/token")
            }
            (401 | 403 | 404, _) => Error::input(format!("there is no such model, or it is private (status {status})"))
                .help("check the name, or set HF_TOKEN to a token that may read it"),
            _ => Error::input(format!("the Hub says status {status}")).help(format!("look at {page}")),
        };
        error.at(&PathBuf::from(format!("hf://{id}")))
    }
}

/// The user's token, looked for where huggingface_hub does.
fn token() -> Option<String> {
    let clean = |token: String| Some(token.trim().to_owned()).filter(|token| !token.is_empty());
    let given = variable("HF_TOKEN").or_else(|| variable("HUGGING_FACE_HUB_TOKEN")).and_then(clean);
    given.or_else(|| {
        let file = super::places::token_file(&|name| std::env::var_os(name))?;
        std::fs::read_to_string(file).ok().and_then(clean)
    })
}

/// `text` with everything escaped that may have a meaning in an address, but for `kept`.
pub(super) fn escaped(text: &str, kept: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        let c = char::from(byte);
        if c.is_ascii_alphanumeric() || "-_.~".contains(c) || (c.is_ascii() && kept.contains(c)) {
            out.push(c);
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}
