//! A server on loopback that is like the Hub: interface, addresses that redirect to another host, byte ranges, ETags,
//! tokens. It can be told to misbehave, and remembers what it was asked.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
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
    /// A few bytes of the body now and then, so that it never falls silent and never ends.
    Drip,
    /// A redirect to itself.
    Loop,
    /// Headers of a megabyte.
    LongHeaders,
    /// More bytes than were asked for, and than Content-Range says.
    Longer,
    /// Fewer bytes than were asked for, and than Content-Range says.
    Shorter,
    /// 403, as S3 refuses a signature of another time than its own, which the Date header has.
    Skewed,
}

/// One request.
#[derive(Clone, Debug)]
pub struct Request {
    /// It went to where the files are, not to the interface.
    pub content: bool,
    pub path: String,
    /// What stands behind a `?`.
    pub query: String,
    pub range: Option<(u64, u64)>,
    pub token: Option<String>,
    /// Bytes of the body sent.
    pub sent: u64,
}

/// A file that is served from the disk, as it was when it was added.
#[derive(Clone)]
struct File {
    path: PathBuf,
    bytes: u64,
    tag: String,
}

impl File {
    fn new(path: PathBuf) -> Self {
        let (bytes, tag) = (path.metadata().unwrap().len(), tag_of(&path));
        Self { path, bytes, tag }
    }

    fn read(&self, offset: u64, length: u64) -> Vec<u8> {
        let mut file = std::fs::File::open(&self.path).unwrap();
        file.seek(SeekFrom::Start(offset)).unwrap();
        let mut content = Vec::with_capacity(length as usize);
        file.take(length).read_to_end(&mut content).unwrap();
        content
    }
}

/// A name for a file's content; any will do.
fn tag_of(path: &Path) -> String {
    use std::hash::{DefaultHasher, Hasher};
    let (mut file, mut hasher, mut part) = (std::fs::File::open(path).unwrap(), DefaultHasher::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut part).unwrap() {
            0 => return format!("{:016x}", hasher.finish()),
            read => hasher.write(&part[..read]),
        }
    }
}

#[derive(Default)]
struct Repository {
    files: BTreeMap<String, File>,
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
            (path.file_name().unwrap().to_str().unwrap().to_owned(), File::new(path))
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
        let (method, address) = (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default());
        let (path, query) = address.split_once('?').unwrap_or((address, ""));
        let (path, query) = (unescaped(path), query.to_owned());
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
        let request = Request { content: is_content, path, query, range, token, sent: 0 };
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

/// A file's name in an address.
fn escaped(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./".contains(&byte);
    name.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// What an address is without its escapes, but for slashes, which stand for themselves.
fn unescaped(path: &str) -> String {
    let (mut bytes, mut rest) = (Vec::new(), path.as_bytes());
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        let escaped = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match escaped.filter(|&byte| first == b'%' && byte != b'/') {
            Some(byte) => (bytes.push(byte), rest = &after[2..]).1,
            None => (bytes.push(first), rest = after).1,
        }
    }
    String::from_utf8(bytes).unwrap()
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
    let path = &*request.path;
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
        let file =
            |(name, file): (&String, &File)| json!({"type": "file", "path": name, "size": file.bytes, "oid": file.tag});
        let tree = serde_json::Value::Array(repository.files.iter().map(file).collect()).to_string();
        return send(stream, "200 OK", &[("Content-Type", "application/json".into())], tree.as_bytes(), no_body);
    }
    let Some(found) = repository.files.get(&file) else { return refuse("404 Not Found", "EntryNotFound") };
    let (tag, length) = (format!("\"{}\"", found.tag), found.bytes);
    state.signature += 1;
    let headers = [
        ("Location", format!("{content}/content/{id}/{}?signature={}", escaped(&file), state.signature)),
        ("X-Repo-Commit", COMMIT.into()),
        ("X-Linked-Etag", tag.clone()),
        ("X-Linked-Size", length.to_string()),
        ("ETag", tag),
    ];
    send(stream, "302 Found", &headers, b"", no_body)
}

/// The files.
fn give_content(mut stream: &TcpStream, state: &Mutex<State>, request: &Request, no_body: bool) -> bool {
    let (path, query) = (&*request.path, &*request.query);
    let mut state = state.lock().unwrap();
    let found = path.strip_prefix("/content/").and_then(|rest| {
        let mut parts = rest.splitn(3, '/');
        let id = format!("{}/{}", parts.next()?, parts.next()?);
        state.repositories.get(&id)?.files.get(parts.next()?).cloned()
    });
    let Some(file) = found else {
        state.log.push(request.clone());
        return send(stream, "404 Not Found", &[], b"", no_body);
    };
    let asked = state.asked;
    state.asked += 1;
    let mut fault = state.fault.filter(|&(_, from, times)| asked >= from && asked - from < times).map(|(f, ..)| f);
    if fault == Some(Fault::ShortLived) {
        fault = (!state.used.insert(query.to_owned())).then_some(Fault::Expired);
    }
    let total = file.bytes;
    let (first, last) = request.range.unwrap_or((0, total.max(1) - 1));
    let last = last.min(total.max(1) - 1);
    let mut tag = format!("\"{}\"", file.tag);
    let mut status = if request.range.is_some() { "206 Partial Content" } else { "200 OK" };
    let mut said = Some(format!("bytes {first}-{last}/{total}")).filter(|_| request.range.is_some());
    let (mut start, mut length) = if total == 0 { (0, 0) } else { (first, last + 1 - first) };
    match fault {
        Some(Fault::TooMany) => {
            return send(stream, "429 Too Many Requests", &[("Retry-After", "1".into())], b"slow", no_body);
        }
        Some(Fault::Unavailable) => return send(stream, "503 Service Unavailable", &[], b"later", no_body),
        Some(Fault::Expired) => return send(stream, "403 Forbidden", &[], b"expired", no_body),
        Some(Fault::Loop) => return send(stream, "302 Found", &[("Location", request.path.clone())], b"", no_body),
        Some(Fault::LongHeaders) => {
            let line = ("X-Long", "x".repeat(1000));
            return send(stream, "206 Partial Content", &vec![line; 1000], b"", no_body);
        }
        Some(Fault::Longer) => length = (length + 10).min(total - start),
        Some(Fault::Shorter) => length = length.div_ceil(2),
        Some(Fault::Skewed) => {
            let date = [("Date", "Thu, 01 Jan 2099 00:00:00 GMT".to_owned())];
            let body =
                b"<?xml version=\"1.0\"?><Error><Code>RequestTimeTooSkewed</Code><Message>The difference between \
                the request time and the current time is too large.</Message></Error>";
            return send(stream, "403 Forbidden", &date, body, no_body);
        }
        Some(Fault::ChangedTag) => tag = "\"other\"".into(),
        Some(Fault::IgnoresRanges) => (status, said, start, length) = ("200 OK", None, 0, total),
        Some(Fault::NoContentRange) => said = None,
        Some(Fault::WrongRange) => said = Some(format!("bytes {}-{}/{total}", first + 1, last + 1)),
        _ => {}
    }
    let cut = matches!(fault, Some(Fault::Stall | Fault::Reset | Fault::Truncate));
    let sent = if cut { length / 2 } else { length };
    state.log.push(Request { sent, ..request.clone() });
    drop(state);
    let mut head = format!("HTTP/1.1 {status}\r\nETag: {tag}\r\nAccept-Ranges: bytes\r\n");
    match fault {
        // Without a length the end of the connection is the end of the body.
        Some(Fault::Truncate) => head.push_str("Connection: close\r\n"),
        _ => head.push_str(&format!("Content-Length: {length}\r\n")),
    }
    if let Some(said) = said {
        head.push_str(&format!("Content-Range: {said}\r\n"));
    }
    head.push_str("\r\n");
    let mut fine = stream.write_all(head.as_bytes()).is_ok();
    if fault == Some(Fault::Drip) {
        let body = file.read(start, sent);
        let drip = |bytes: &[u8]| {
            std::thread::sleep(Duration::from_millis(50));
            stream.write_all(bytes).is_ok()
        };
        return body.chunks(10).all(drip);
    }
    fine &= no_body || stream.write_all(&file.read(start, sent)).is_ok();
    if fault == Some(Fault::Stall) {
        std::thread::sleep(Duration::from_secs(4));
    }
    fine && !cut
}
