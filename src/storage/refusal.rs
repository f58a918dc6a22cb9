//! What a server says when it refuses: `<Code>` and `<Message>` of an S3 error, which other stores write too, and its clock.

use std::time::{SystemTime, UNIX_EPOCH};

use super::system::utc_text;
use crate::error::printable;

/// Most that is read of an answer that refuses.
pub(super) const MOST_BYTES: u64 = 4 << 10;
/// Clocks that differ by no more, in seconds, are taken to agree: stores allow for 15 minutes.
const SLACK_SECONDS: u64 = 5 * 60;

/// What to do where a signature is of a time that is not the server's.
pub(super) const SET_CLOCK: &str = "set this machine's clock, and run the same command again";

/// What `body` says, as `Code: Message`, if it is such an error.
pub(super) fn said(body: &str) -> Option<String> {
    let between = |name: &str| {
        let (_, rest) = body.split_once(&format!("<{name}>"))?;
        rest.split_once(&format!("</{name}>")).map(|(text, _)| text.trim())
    };
    let code = between("Code").filter(|code| !code.is_empty())?;
    Some(match between("Message").and_then(|message| message.lines().next()) {
        Some(message) => printable(&format!("{code}: {}", message.trim_end_matches('.'))),
        None => printable(code),
    })
}

/// What to do about a refusal that says `said`, where that can be told.
pub(super) fn advice(said: &str) -> Option<&'static str> {
    let says = |words: &[&str]| words.iter().any(|word| said.contains(word));
    if says(&["RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture", "not yet valid"]) {
        Some(SET_CLOCK)
    } else if says(&["ExpiredToken", "TokenRefreshRequired", "token has expired"]) {
        Some("the sign-in is too old: sign in again, and run the same command again")
    } else if says(&["has expired", "Signature not valid in the specified time frame"]) {
        Some("the signature in the address is too old: get a new address, and check this machine's clock")
    } else if says(&["InvalidAccessKeyId", "SignatureDoesNotMatch"]) {
        Some("check the keys in the environment")
    } else {
        None
    }
}

/// The times of both clocks, if that in an answer's `Date` header is far from this machine's.
pub(super) fn clocks(date: Option<&str>) -> Option<String> {
    let there = seconds_of(date?)?;
    let here = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (there_text, here_text) = (utc_text(there), utc_text(here));
    let differ = there.abs_diff(here) > SLACK_SECONDS;
    differ.then(|| format!("the server's clock says {there_text}, this machine's {here_text}"))
}

/// Seconds since 1970 of a time as HTTP writes it (RFC 9110, IMF-fixdate): `Thu, 26 Nov 2026 06:11:40 GMT`.
fn seconds_of(date: &str) -> Option<u64> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let (_, rest) = date.split_once(", ")?;
    let mut words = rest.split_whitespace();
    let (day, name, year) = (words.next()?.parse::<u64>().ok()?, words.next()?, words.next()?.parse::<u64>().ok()?);
    let month = MONTHS.iter().position(|month| *month == name)? as u64;
    let mut time = words.next()?.split(':').map(|part| part.parse::<u64>().ok());
    let (hour, minute, second) = (time.next()??, time.next()??, time.next()??);
    if !(1970..10_000).contains(&year) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    // A year that begins in March has its leap day last.
    let (march_year, march_month) = if month < 2 { (year - 1, month + 10) } else { (year, month - 2) };
    let days = march_year * 365 + march_year / 4 - march_year / 100 + march_year / 400;
    let days = days + (153 * march_month + 2) / 5 + day - 1;
    Some((days.checked_sub(719_468)?) * 86_400 + hour * 3600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_stores_are_read_and_advised_on() {
        let body = "<?xml version=\"1.0\"?>\n<Error><Code>RequestTimeTooSkewed</Code><Message>The difference is too \
                    large.</Message><RequestId>x</RequestId></Error>";
        let text = said(body).unwrap();
        assert_eq!(text, "RequestTimeTooSkewed: The difference is too large");
        assert!(advice(&text).unwrap().contains("clock"));
        assert_eq!(said("<Code>A\u{1b}B</Code>").unwrap(), "A\\u{1b}B");
        for none in ["", "expired", "<Code>", "<Code></Code>", "{\"Code\": 1}"] {
            assert_eq!(said(none), None, "{none}");
        }
        assert!(advice("AccessDenied: Request has expired").unwrap().contains("new address"));
        assert_eq!(advice("AccessDenied: Access Denied"), None);
    }

    #[test]
    fn times_of_http_are_understood() {
        for (date, text) in [
            ("Thu, 01 Jan 1970 00:00:00 GMT", "1970-01-01 00:00:00 UTC"),
            ("Tue, 29 Feb 2000 23:59:59 GMT", "2000-02-29 23:59:59 UTC"),
            ("Thu, 26 Nov 2026 06:11:40 GMT", "2026-11-26 06:11:40 UTC"),
            ("Mon, 01 Mar 2100 00:00:00 GMT", "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(utc_text(seconds_of(date).unwrap()), text);
        }
        for bad in ["", "yesterday", "Thu, 01 Jan", "Thu, 99 Jan 2020 00:00:00 GMT", "Thu, 01 Jan 99999999999 0:0:0"] {
            assert_eq!(seconds_of(bad), None, "{bad}");
        }
        assert!(
            clocks(Some("Thu, 01 Jan 1970 00:00:00 GMT")).unwrap().starts_with("the server's clock says 1970-01-01")
        );
        assert_eq!(clocks(None), None);
    }
}
