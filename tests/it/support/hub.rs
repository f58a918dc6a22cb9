//! A server on loopback that is like the Hub: interface, addresses that redirect to another host, byte ranges, ETags,
//! tokens. It can be told to misbehave, and remembers what it was asked.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What goes wrong with a range's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing comes after the headers and half of the body, for long.
    Stall,
    /// The connection is reset in mid-body.
    Reset,
    /// The body ends early, as if that were all.
    Truncate,
    /// 429, with Retry-After.
    TooMany,
    /// 503.
    Unavailable,
    /// Other bytes than were asked for, and said so.
    WrongRange,
    /// 206 without Content-Range.
    NoContentRange,
    /// Another version of the file.
    ChangedTag,
    /// 403, as when the signature of an address has expired.
    Expired,
    /// 200 and everything.
    IgnoresRanges,
    /// An address is good for one use, so that another is needed every time.
    ShortLived,
}

/// One request.
#[derive(Clone, Debug)]
pub struct Request {
    /// It went to where the files are, not to the interface.
    pub content: bool,
    pub path: String,
    pub range: Option<(u64, u64)>,
    pub token: Option<String>,
    /// Bytes of the body sent.
    pub sent: u64,
}

#[derive(Default)]
struct Repository {
    files: BTreeMap<String, Vec<u8>>,
    token: Option<String>,
    gated: bool,
}

#[derive(Default)]
struct State {
    repositories: BTreeMap<String, Repository>,
    log: Vec<Request>,
    /// What goes wrong, from which request for content on, and how often.
    fault: Option<(Fault, usize, usize)>,
    asked: usize,
    /// Number of addresses given out.
    signature: usize,
    /// Those that were used, where that is once.
    used: BTreeSet<String>,
    /// Before every answer.
    latency: Duration,
    /// Connections taken so far, of both hosts.
    connections: usize,
    /// Requests for content that are being answered, and the most that were at a time.
    busy: (usize, usize),
    /// How often a revision meant another commit than before.
    moves: bool,
}

pub struct Hub {
    state: Arc<Mutex<State>>,
    pub endpoint: String,
    content: String,
}

impl Hub {
    /// A server without models.
    pub fn start() -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (front, back) = (listen(), listen());
        let address = |l: &TcpListener| format!("http://{}", l.local_addr().unwrap());
        let (endpoint, content) = (address(&front), address(&back));
        for (listener, is_content) in [(front, false), (back, true)] {
            let (state, content) = (Arc::clone(&state), content.clone());
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    state.lock().unwrap().connections += 1;
                    let (state, content) = (Arc::clone(&state), content.clone());
                    std::thread::spawn(move || serve(&stream, &state, is_content, &content));
                }
            });
        }
        Self { state, endpoint, content }
    }

    /// Adds the files of `dir` as repository `id`.
    pub fn add(&self, id: &str, dir: &Path) {
        let files = std::fs::read_dir(dir).unwrap().map(|entry| {
            let path = entry.unwrap().path();
            (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(&path).unwrap())
        });
        let repository = Repository { files: files.collect(), ..Repository::default() };
        self.state.lock().unwrap().repositories.insert(id.into(), repository);
    }

    /// Asks for `token` from whoever reads `id`.
    pub fn protect(&self, id: &str, token: &str, gated: bool) {
        let mut state = self.state.lock().unwrap();
        let repository = state.repositories.get_mut(id).unwrap();
        repository.token = Some(token.into());
        repository.gated = gated;
    }

    /// Where a file is without the interface.
    pub fn address(&self, id: &str, file: &str) -> String {
        format!("{}/content/{id}/{file}", self.content)
    }

    /// Misbehaves from request `from` for content on, `times` times.
    pub fn misbehave(&self, fault: Fault, from: usize, times: usize) {
        let mut state = self.state.lock().unwrap();
        state.fault = Some((fault, from, times));
        state.asked = 0;
    }

    /// Lets every answer take so long.
    pub fn slow_down(&self, latency: Duration) {
        self.state.lock().unwrap().latency = latency;
    }

    /// Connections taken, and the most requests for content at a time, since the last call.
    pub fn traffic(&self) -> (usize, usize) {
        let mut state = self.state.lock().unwrap();
        (std::mem::take(&mut state.connections), std::mem::take(&mut state.busy.1))
    }

    /// Lets every question after a revision be answered with another commit.
    pub fn move_revisions(&self) {
        self.state.lock().unwrap().moves = true;
    }

    /// What was asked since the last call.
    pub fn log(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.lock().unwrap().log)
    }
}

fn serve(stream: &TcpStream, state: &Mutex<State>, is_content: bool, content: &str) {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        let mut words = line.split_whitespace();
        let (method, path) = (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default().to_owned());
        let mut headers = BTreeMap::new();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap_or(0) == 0 || line.trim().is_empty() {
                break;
            }
            if let Some((name, value)) = line.split_once(':') {
                headers.insert(name.to_lowercase(), value.trim().to_owned());
            }
        }
        let range = headers.get("range").and_then(|range| {
            let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
            Some((first.parse().ok()?, last.parse().unwrap_or(u64::MAX)))
        });
        let token = headers.get("authorization").and_then(|value| value.strip_prefix("Bearer ")).map(str::to_owned);
        let request = Request { content: is_content, path, range, token, sent: 0 };
        let whole = method == "HEAD";
        let latency = {
            let mut state = state.lock().unwrap();
            state.busy.0 += usize::from(is_content);
            state.busy.1 = state.busy.1.max(state.busy.0);
            state.latency
        };
        std::thread::sleep(latency);
        let open = match is_content {
            true => give_content(stream, state, &request, whole),
            false => answer(stream, state, &request, content, whole),
        };
        state.lock().unwrap().busy.0 -= usize::from(is_content);
        if !open {
            return;
        }
    }
}

fn send(mut stream: &TcpStream, status: &str, headers: &[(&str, String)], body: &[u8], no_body: bool) -> bool {
    let mut head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n", body.len());
    headers.iter().for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).is_ok() && (no_body || stream.write_all(body).is_ok())
}

/// The interface, and the addresses that redirect.
fn answer(stream: &TcpStream, state: &Mutex<State>, request: &Request, content: &str, no_body: bool) -> bool {
    let mut state = state.lock().unwrap();
    state.log.push(request.clone());
    let path = request.path.split('?').next().unwrap_or_default();
    let refuse = |status: &str, code: &str| send(stream, status, &[("X-Error-Code", code.into())], b"{}", no_body);
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    let (id, revision, file) = match parts[..] {
        ["api", "models", org, name] => (format!("{org}/{name}"), "main", None),
        ["api", "models", org, name, "revision", revision] => (format!("{org}/{name}"), revision, None),
        ["api", "models", org, name, "tree", revision] => (format!("{org}/{name}"), revision, Some(String::new())),
        [org, name, "resolve", revision, ref file @ ..] => (format!("{org}/{name}"), revision, Some(file.join("/"))),
        _ => return refuse("404 Not Found", "NotFound"),
    };
    let Some(repository) = state.repositories.get(&id) else {
        return match request.token {
            Some(_) => refuse("404 Not Found", "RepoNotFound"),
            None => refuse("401 Unauthorized", "RepoNotFound"),
        };
    };
    match (&repository.token, &request.token) {
        (Some(wanted), Some(given)) if wanted == given => {}
        (Some(_), _) if repository.gated => return refuse("403 Forbidden", "GatedRepo"),
        (Some(_), _) => return refuse("401 Unauthorized", "RepoNotFound"),
        (None, _) => {}
    }
    if !state.moves && ![COMMIT, "main", "v1", "refs%2Fpr%2F1"].contains(&revision) {
        return refuse("404 Not Found", "RevisionNotFound");
    }
    let Some(file) = file else {
        let moved = format!("{:040x}", state.log.len());
        let commit = if state.moves { &moved } else { COMMIT };
        let siblings: Vec<_> = repository.files.keys().map(|name| json!({"rfilename": name})).collect();
        let info = json!({"id": id, "sha": commit, "siblings": siblings, "private": false, "gated": false}).to_string();
        return send(stream, "200 OK", &[("Content-Type", "application/json".into())], info.as_bytes(), no_body);
    };
    if file.is_empty() {
        let file = |(name, bytes): (&String, &Vec<u8>)| json!({"type": "file", "path": name, "size": bytes.len(), "oid": blake3_of(bytes)});
        let tree = serde_json::Value::Array(repository.files.iter().map(file).collect()).to_string();
        return send(stream, "200 OK", &[("Content-Type", "application/json".into())], tree.as_bytes(), no_body);
    }
    let Some(bytes) = repository.files.get(&file) else { return refuse("404 Not Found", "EntryNotFound") };
    let tag = format!("\"{}\"", blake3_of(bytes));
    let length = bytes.len();
    state.signature += 1;
    let headers = [
        ("Location", format!("{content}/content/{id}/{file}?signature={}", state.signature)),
        ("X-Repo-Commit", COMMIT.into()),
        ("X-Linked-Etag", tag.clone()),
        ("X-Linked-Size", length.to_string()),
        ("ETag", tag),
    ];
    send(stream, "302 Found", &headers, b"", no_body)
}

/// A name for a file's content; any will do.
fn blake3_of(bytes: &[u8]) -> String {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// The files.
fn give_content(mut stream: &TcpStream, state: &Mutex<State>, request: &Request, no_body: bool) -> bool {
    let (path, query) = request.path.split_once('?').unwrap_or((&request.path, ""));
    let mut state = state.lock().unwrap();
    let found = path.strip_prefix("/content/").and_then(|rest| {
        let mut parts = rest.splitn(3, '/');
        let id = format!("{}/{}", parts.next()?, parts.next()?);
        state.repositories.get(&id)?.files.get(parts.next()?).cloned()
    });
    let Some(bytes) = found else {
        state.log.push(request.clone());
        return send(stream, "404 Not Found", &[], b"", no_body);
    };
    let asked = state.asked;
    state.asked += 1;
    let mut fault = state.fault.filter(|&(_, from, times)| asked >= from && asked - from < times).map(|(f, ..)| f);
    if fault == Some(Fault::ShortLived) {
        fault = (!state.used.insert(query.to_owned())).then_some(Fault::Expired);
    }
    let total = bytes.len() as u64;
    let (first, last) = request.range.unwrap_or((0, total.max(1) - 1));
    let last = last.min(total.max(1) - 1);
    let mut tag = format!("\"{}\"", blake3_of(&bytes));
    let mut status = if request.range.is_some() { "206 Partial Content" } else { "200 OK" };
    let mut said = Some(format!("bytes {first}-{last}/{total}")).filter(|_| request.range.is_some());
    let mut body = if total == 0 { &[][..] } else { &bytes[first as usize..=last as usize] };
    match fault {
        Some(Fault::TooMany) => {
            return send(stream, "429 Too Many Requests", &[("Retry-After", "1".into())], b"slow", no_body);
        }
        Some(Fault::Unavailable) => return send(stream, "503 Service Unavailable", &[], b"later", no_body),
        Some(Fault::Expired) => return send(stream, "403 Forbidden", &[], b"expired", no_body),
        Some(Fault::ChangedTag) => tag = "\"other\"".into(),
        Some(Fault::IgnoresRanges) => (status, said, body) = ("200 OK", None, &bytes[..]),
        Some(Fault::NoContentRange) => said = None,
        Some(Fault::WrongRange) => said = Some(format!("bytes {}-{}/{total}", first + 1, last + 1)),
        _ => {}
    }
    let cut = matches!(fault, Some(Fault::Stall | Fault::Reset | Fault::Truncate));
    let sent = if cut { &body[..body.len() / 2] } else { body };
    state.log.push(Request { sent: sent.len() as u64, ..request.clone() });
    drop(state);
    let mut head = format!("HTTP/1.1 {status}\r\nETag: {tag}\r\nAccept-Ranges: bytes\r\n");
    match fault {
        // Without a length the end of the connection is the end of the body.
        Some(Fault::Truncate) => head.push_str("Connection: close\r\n"),
        _ => head.push_str(&format!("Content-Length: {}\r\n", body.len())),
    }
    if let Some(said) = said {
        head.push_str(&format!("Content-Range: {said}\r\n"));
    }
    head.push_str("\r\n");
    let mut fine = stream.write_all(head.as_bytes()).is_ok();
    fine &= no_body || stream.write_all(sent).is_ok();
    if fault == Some(Fault::Stall) {
        std::thread::sleep(Duration::from_secs(4));
    }
    fine && !cut
}
