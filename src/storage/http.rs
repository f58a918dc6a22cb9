//! HTTP as far as byte ranges need it: requests, redirects, patience.
//!
//! - A range is answered with 206 and exactly the bytes asked for, or it is an error: a server that ignores ranges would
//!   send whole models.
//! - Redirects are followed here, so that a token goes to the host it is for and to no other.
//! - What may pass (429, 5xx, resets, stalls) is tried again, later each time, or when the server says. Bytes that did
//!   arrive are kept.
//!
//! Knows requests and bytes; not what is behind an address.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ureq::http::{HeaderMap, Response, StatusCode};
use ureq::{Agent, Body};

use super::refusal;
use super::waits::{Wait, Waits};
use crate::error::{Error, Result, printable};

/// Redirects followed for one request.
const MAX_REDIRECTS: usize = 8;
/// Attempts in a row that bring nothing before giving up.
const MAX_ATTEMPTS: u32 = 6;
/// The same before any work is done: a wrong address should be known soon.
const FIRST_ATTEMPTS: u32 = 3;
/// Before the second attempt; doubled for each after it.
const FIRST_WAIT: Duration = Duration::from_millis(250);
/// Longest pause between attempts, whatever a server asks for: the Hub counts requests in windows of five minutes.
pub(super) const LONGEST_WAIT: Duration = Duration::from_secs(300);
/// Pause where a server says that there were too many requests, and not for how long.
const TOO_MANY_WAIT: Duration = Duration::from_secs(10);
/// Slowest answer that is waited for, in bytes per second: slower ones are stalls.
const SLOWEST: u64 = 1 << 10;
/// Most that is read of an answer that is of no use, so that its connection is.
const MAX_DRAINED_BYTES: u64 = 64 << 10;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest silence of a server, unless `HF_HUB_DOWNLOAD_TIMEOUT` says otherwise.
const SILENCE: Duration = Duration::from_secs(30);

/// A client with its connections.
pub(super) struct Http {
    agent: Agent,
    /// The host (scheme, name and port) that the token is for, and the token.
    credentials: Option<(String, String)>,
    /// Longest silence.
    silence: Duration,
    waits: Arc<Waits>,
}

/// What arrives of an answer, as far as it is too little for its time.
pub(super) struct Flow {
    silence: Duration,
    since: Instant,
    bytes: u64,
}

impl Flow {
    /// So many bytes more have arrived.
    pub(super) fn arrived(&mut self, bytes: usize) -> Result<(), Failure> {
        self.bytes += bytes as u64;
        let took = self.since.elapsed();
        if took < self.silence {
            return Ok(());
        }
        let rate = (self.bytes as f64 / took.as_secs_f64()) as u64;
        (self.since, self.bytes) = (Instant::now(), 0);
        if rate < SLOWEST {
            return Err(Failure::Slow(format!("only {rate} bytes of the answer come per second")));
        }
        Ok(())
    }
}

/// An answer, with the address it came from after redirects.
pub(super) struct Answer {
    pub response: Response<Body>,
    pub url: String,
    /// `X-Linked-Etag` of a redirect on the way: the content's hash at the Hub.
    pub linked_etag: Option<String>,
}

impl Answer {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        header(self.response.headers(), name)
    }
}

/// Why a request brought nothing.
pub(super) enum Failure {
    /// Another attempt may succeed, after the wait that the server asks for, if it does.
    Passing(String, Option<Wait>),
    /// The same, and what it did bring is next to nothing.
    Slow(String),
    /// No other attempt will.
    Final(Error),
}

/// Attempts at one thing.
pub(super) struct Patience<'a> {
    attempts: u32,
    most: u32,
    waits: &'a Waits,
}

impl<'a> Patience<'a> {
    /// With a server that answered before.
    pub(super) fn at_work(http: &'a Http) -> Self {
        Self { attempts: 0, most: MAX_ATTEMPTS, waits: &http.waits }
    }

    /// With a server that was not asked yet.
    pub(super) fn at_first(http: &'a Http) -> Self {
        Self { attempts: 0, most: FIRST_ATTEMPTS, waits: &http.waits }
    }

    /// Something was achieved.
    pub(super) fn renew(&mut self) {
        self.attempts = 0;
    }

    /// Waits before another attempt after a passing failure, or gives up.
    pub(super) fn after(&mut self, failure: Failure, url: &str) -> Result<()> {
        let (why, wait) = match failure {
            Failure::Final(error) => return Err(error),
            Failure::Passing(why, wait) => (why, wait),
            Failure::Slow(why) => (why, None),
        };
        self.attempts += 1;
        if self.attempts >= self.most {
            return Err(Error::failed(format!("gave up after {} attempts: {why}", self.attempts))
                .at(shown(url))
                .help("check the network and run the same command again to go on"));
        }
        let doubled = FIRST_WAIT * 2u32.pow(self.attempts - 1);
        // Workers that failed together do not come back together.
        let jitter = RandomState::new().build_hasher().finish() % 256;
        let spread = |wait: Duration| wait.mul_f64(0.75 + jitter as f64 / 512.0);
        let own = spread(doubled);
        let pause = match wait {
            Some(wait) => {
                let time = wait.time.min(LONGEST_WAIT);
                self.waits.begin(&Wait { time, ..wait });
                time + spread(FIRST_WAIT)
            }
            None => own,
        };
        std::thread::sleep(pause);
        Ok(())
    }
}

impl Http {
    /// A client that shows `token` to the host of `endpoint` only, and speaks of `waits`.
    pub(super) fn new(endpoint: &str, token: Option<String>, waits: Arc<Waits>) -> Self {
        let silence = std::env::var("HF_HUB_DOWNLOAD_TIMEOUT").ok().and_then(|seconds| seconds.parse().ok());
        let silence = silence.map_or(SILENCE, |seconds: u64| Duration::from_secs(seconds.clamp(1, 3600)));
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_resolve(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(silence))
            .timeout_per_read(Some(silence))
            .max_idle_connections(128)
            .max_idle_connections_per_host(128)
            .input_buffer_size(64 << 10)
            .output_buffer_size(8 << 10)
            .user_agent(concat!("tiesmith/", env!("CARGO_PKG_VERSION")))
            .build();
        let credentials = token.map(|token| (origin(endpoint).to_owned(), token));
        Self { agent: config.into(), credentials, silence, waits }
    }

    pub(super) fn has_token(&self) -> bool {
        self.credentials.is_some()
    }

    /// Watches over an answer that is about to be read.
    pub(super) fn flow(&self) -> Flow {
        Flow { silence: self.silence, since: Instant::now(), bytes: 0 }
    }

    /// One GET, redirects followed; of bytes `range` (first, last), if given.
    pub(super) fn get(&self, url: &str, range: Option<(u64, u64)>) -> Result<Answer, Failure> {
        let mut url = url.to_owned();
        let mut linked_etag = None;
        for _ in 0..MAX_REDIRECTS {
            admit(&url).map_err(Failure::Final)?;
            // Compressed ranges would be ranges of something else.
            let mut request = self.agent.get(&url).header("Accept-Encoding", "identity");
            if let Some((first, last)) = range {
                request = request.header("Range", format!("bytes={first}-{last}"));
            }
            if let Some((host, token)) = &self.credentials
                && origin(&url) == host
            {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            let response = request.call().map_err(|e| failure_of(&e, &url))?;
            if !response.status().is_redirection() {
                return Ok(Answer { response, url, linked_etag });
            }
            let headers = response.headers();
            linked_etag = header(headers, "x-linked-etag").map(str::to_owned).or(linked_etag);
            let Some(target) = header(headers, "location") else {
                return Err(Failure::Final(Error::input("a redirect to nowhere").at(shown(&url))));
            };
            url = join(&url, target);
            drain(response);
        }
        Err(Failure::Final(Error::input("too many redirects").at(shown(&url))))
    }

    /// Why an answer is no success: its status, what it says, the clocks if they differ; and what to do, if that can be told.
    pub(super) fn refusal(answer: Answer) -> (String, Option<&'static str>) {
        let mut text = format!("status {}", answer.response.status().as_u16());
        // What comes from a cache has an older date.
        let date = answer.header("date").filter(|_| answer.header("age").is_none());
        let clocks = refusal::clocks(date);
        let mut body = Vec::new();
        read_soon(answer.response, refusal::MOST_BYTES, |part| body.extend_from_slice(part));
        let said = refusal::said(&String::from_utf8_lossy(&body));
        for more in [&said, &clocks].into_iter().flatten() {
            text.push_str(&format!("; {more}"));
        }
        (text, said.and_then(|said| refusal::advice(&said)).or(clocks.map(|_| "set the clock that is wrong")))
    }

    /// The whole body of a small answer, at most `limit` bytes.
    pub(super) fn body(&self, answer: Answer, limit: u64) -> Result<Vec<u8>, Failure> {
        let url = answer.url;
        let (mut body, mut part, mut flow) = (Vec::new(), vec![0; 64 << 10], self.flow());
        let mut reader = answer.response.into_body().into_reader().take(limit + 1);
        loop {
            match reader.read(&mut part) {
                Ok(0) => break,
                Ok(read) => {
                    body.extend_from_slice(&part[..read]);
                    flow.arrived(read)?;
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Failure::Passing(format!("the answer broke off: {e}"), None)),
            }
        }
        if body.len() as u64 > limit {
            let text = format!("an answer of more than {limit} bytes");
            return Err(Failure::Final(Error::input(text).at(shown(&url))));
        }
        Ok(body)
    }
}

/// Takes what is left of an answer that nobody reads, if it is short, so that its connection can be used again.
pub(super) fn drain(response: Response<Body>) {
    // A connection that fails here is not used again, which is all there is to it.
    read_soon(response, MAX_DRAINED_BYTES, |_| ());
}

/// Reads up to `limit` bytes of an answer that is no success: what does not arrive soon does not matter.
fn read_soon(response: Response<Body>, limit: u64, mut take: impl FnMut(&[u8])) {
    /// Nothing more is asked for after so long.
    const SOON: Duration = Duration::from_secs(2);
    let (begin, mut part) = (Instant::now(), [0; 4096]);
    let mut reader = response.into_body().into_reader().take(limit);
    while begin.elapsed() < SOON {
        match reader.read(&mut part) {
            Ok(read @ 1..) => take(&part[..read]),
            Ok(0) | Err(_) => return,
        }
    }
}

/// The answer, unless its status says that another attempt may bring one that is better.
pub(super) fn settled(answer: Answer) -> Result<Answer, Failure> {
    let status = answer.response.status();
    let again = status.is_server_error()
        || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY);
    if !again {
        return Ok(answer);
    }
    let wait = answer.header("retry-after").and_then(retry_after);
    // The Hub says in how many seconds its window ends: `"resolvers";r=0;t=123`.
    let window =
        || answer.header("ratelimit")?.split(';').find_map(|part| part.trim().strip_prefix("t=")).and_then(retry_after);
    let wait = wait.or_else(|| (status == StatusCode::TOO_MANY_REQUESTS).then(|| window().unwrap_or(TOO_MANY_WAIT)));
    let wait = wait.map(|time| Wait::at(&answer.url, time));
    drain(answer.response);
    Err(Failure::Passing(format!("the server says {status}"), wait))
}

/// The time that a number of seconds, such as that of `Retry-After`, asks for.
pub(super) fn retry_after(text: &str) -> Option<Duration> {
    text.trim().parse().ok().map(Duration::from_secs)
}

/// The bounds and total of `bytes FIRST-LAST/TOTAL`.
pub(super) fn content_range(text: &str) -> Option<(u64, u64, u64)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    Some((first.trim().parse().ok()?, last.trim().parse().ok()?, total.trim().parse().ok()?))
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// Unencrypted connections leave the machine only where the user's own endpoint is one.
fn admit(url: &str) -> Result<()> {
    let endpoint = std::env::var("HF_ENDPOINT").unwrap_or_default();
    let origin_of = origin(url);
    if origin_of.contains('@') {
        return Err(Error::input("a user name in an address").at(shown(url)).help("leave it out"));
    }
    let host = origin_of.strip_prefix("http://").unwrap_or_default();
    let name = match host.strip_prefix("[::1]") {
        // The colons of an IPv6 address are no port's.
        Some(port) if port.is_empty() || port.starts_with(':') => "[::1]",
        _ => host.split(':').next().unwrap_or_default(),
    };
    let loopback = matches!(name, "127.0.0.1" | "localhost" | "[::1]");
    let own = !endpoint.is_empty() && origin(&endpoint) == origin_of;
    if url.starts_with("https://") || loopback || url.starts_with("http://") && own {
        return Ok(());
    }
    let help = if own { "HF_ENDPOINT must begin with https://" } else { "use https://" };
    Err(Error::input("not encrypted").at(shown(url)).help(help))
}

/// An address as messages show it: what may be a signature or a password is left out.
pub(super) fn shown(url: &str) -> &Path {
    let end = url.find(['?', '#']).unwrap_or(url.len());
    match (origin(url).contains('@'), url[..end].rfind('@')) {
        (true, Some(at)) => Path::new(&url[at + 1..end]),
        _ => Path::new(&url[..end]),
    }
}

/// Scheme, host and port of an address.
pub(super) fn origin(url: &str) -> &str {
    let start = url.find("://").map_or(0, |at| at + 3);
    let end = url[start..].find(['/', '?', '#']).map_or(url.len(), |at| start + at);
    &url[..end]
}

/// Where `target`, as a redirect at `url` says it, leads.
fn join(url: &str, target: &str) -> String {
    let is_scheme = |text: &str| {
        text.starts_with(|c: char| c.is_ascii_alphabetic())
            && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'))
    };
    if target.split_once("://").is_some_and(|(scheme, _)| is_scheme(scheme)) {
        return target.to_owned();
    }
    if let Some(rest) = target.strip_prefix("//") {
        return format!("{}://{rest}", url.split("://").next().unwrap_or("https"));
    }
    let path = url.split(['?', '#']).next().unwrap_or(url);
    let dir = match path.len() > origin(url).len() {
        true => path.rsplit_once('/').map_or(path, |(dir, _)| dir),
        false => path,
    };
    match target.as_bytes().first() {
        Some(b'/') => format!("{}{target}", origin(url)),
        Some(b'?') => format!("{path}{target}"),
        _ => format!("{dir}/{target}"),
    }
}

fn untrusted(error: &ureq::Error) -> Error {
    Error::input(format!("no trusted connection: {}", printable(&error.to_string())))
        .help("check the address, and this machine's clock and trusted certificates")
}

fn failure_of(error: &ureq::Error, url: &str) -> Failure {
    let at = |error: Error| Failure::Final(error.at(Path::new(origin(url))));
    match error {
        ureq::Error::HostNotFound => {
            at(Error::input("there is no such host, or no network").help("check the address and the network"))
        }
        ureq::Error::BadUri(_) => at(Error::input("not an address").help("check it")),
        ureq::Error::Tls(_) | ureq::Error::Rustls(_) => at(untrusted(error)),
        // What a certificate is refused for comes while the connection is made; it is no better the next time.
        ureq::Error::Io(io) if io.to_string().contains("invalid peer certificate") => at(untrusted(error)),
        other => Failure::Passing(printable(&other.to_string()), None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_exact_content_ranges_are_understood() {
        assert_eq!(content_range("bytes 0-7/100"), Some((0, 7, 100)));
        for bad in ["bytes 0-7/*", "bytes */100", "0-7/100", "bytes 7/100", "items 0-7/100", ""] {
            assert_eq!(content_range(bad), None, "{bad}");
        }
    }

    #[test]
    fn addresses_are_taken_apart_and_joined() {
        assert_eq!(origin("https://a.b:1/c?d"), "https://a.b:1");
        assert_eq!(origin("https://a.b?x=/y"), "https://a.b");
        assert_eq!(join("https://a/b/c?x=1/2", "d"), "https://a/b/d");
        assert_eq!(join("https://a/b/c", "/d"), "https://a/d");
        assert_eq!(join("https://a/b", "//c/d"), "https://c/d");
        assert_eq!(join("https://a/b", "http://c/d"), "http://c/d");
        assert_eq!(join("https://a", "d"), "https://a/d");
        assert_eq!(join("https://a/b/c", "/d?to=https://e/f"), "https://a/d?to=https://e/f");
        assert_eq!(join("https://a/b/c", "d?to=https://e"), "https://a/b/d?to=https://e");
        assert_eq!(join("https://a/b?c", "?d=1"), "https://a/b?d=1");
        assert_eq!(join("https://a/b", "https://c?to=https://d"), "https://c?to=https://d");
    }

    #[test]
    fn unencrypted_hosts_are_refused_unless_they_are_this_one() {
        for fine in ["https://a/b", "http://127.0.0.1:80/x", "http://localhost/x", "http://[::1]:8/x", "http://[::1]/x"]
        {
            assert!(admit(fine).is_ok(), "{fine}");
        }
        for bad in [
            "http://example.org/x",
            "http://127.0.0.1.example.org/x",
            "ftp://a/b",
            "http://user@localhost/",
            "http://127.0.0.1:80@example.org/x",
            "http://[::1]@example.org/x",
            "https://user:password@example.org/x",
            "http://[::1].example.org/x",
            "http://",
        ] {
            let said = admit(bad).unwrap_err().to_string();
            assert!(!said.contains("password"), "{said}");
        }
    }

    #[test]
    fn messages_show_neither_signatures_nor_passwords() {
        for (url, text) in [
            ("https://a.b/c?X-Amz-Signature=secret#d", "https://a.b/c"),
            ("https://user:secret@a.b/c", "a.b/c"),
            ("https://a.b/c@d", "https://a.b/c@d"),
        ] {
            assert_eq!(shown(url), Path::new(text));
        }
        let waits = Waits::default();
        let error = Patience { attempts: 0, most: 1, waits: &waits }
            .after(Failure::Passing("no".into(), None), "https://a/b?secret");
        assert!(!error.unwrap_err().to_string().contains("secret"));
    }
}
