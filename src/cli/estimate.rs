//! How long a merge takes, from what its plan reads and writes and the rates that the user names.
//!
//! Reading and writing overlap where they use different devices, so a pass lasts as long as the busiest of them. Cores are
//! not in it: with a few of them a disk or a network is what limits.

use tiesmith::{PassSummary, Plan, PlanSummary};

use super::human;
use super::table::Table;

/// Rates in bytes per second.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rates {
    pub disk: Option<f64>,
    pub network: Option<f64>,
    /// Bytes that are kept of what is downloaded.
    pub cache_bytes: u64,
    /// Bytes that there is room for of what is kept between the passes, if that is known.
    pub room: Option<u64>,
}

/// One pass.
#[derive(Debug, PartialEq)]
struct Pass {
    name: &'static str,
    disk_bytes: u64,
    network_bytes: u64,
    /// `None` if a rate that matters is not known.
    seconds: Option<f64>,
}

impl Rates {
    /// The section of the page: what is downloaded, if anything, and how long it takes, if rates are given.
    pub fn render(self, plan: &Plan, summary: &PlanSummary) -> String {
        let downloads =
            if plan.is_remote() { self.downloads(&summary.passes, summary.spool_bytes) } else { String::new() };
        if self.disk.is_none() && self.network.is_none() {
            return downloads;
        }
        let passes = self.passes(&summary.passes, summary.spool_bytes);
        let mut table = Table::new("  ", "lrrr");
        table.row(["", "disk", "network", "time"]);
        let amount = |bytes: u64| if bytes == 0 { "-".to_string() } else { human::bytes(bytes) };
        let time = |seconds: Option<f64>| seconds.map_or("?".to_string(), human::duration);
        for pass in &passes {
            table.row([pass.name.to_string(), amount(pass.disk_bytes), amount(pass.network_bytes), time(pass.seconds)]);
        }
        if passes.len() > 1 {
            let sum = |bytes: fn(&Pass) -> u64| amount(passes.iter().map(bytes).sum());
            let seconds = passes.iter().map(|pass| pass.seconds).sum();
            table.row(["total".to_string(), sum(|p| p.disk_bytes), sum(|p| p.network_bytes), time(seconds)]);
        }
        format!("{downloads}\nTime, at the rates given\n{}", table.render())
    }

    /// What comes over the network, how much of it more than once, and what is kept so that it is not more.
    fn downloads(self, passes: &[PassSummary], spool_bytes: u64) -> String {
        let all = self.passes(passes, spool_bytes).iter().map(|pass| pass.network_bytes).sum::<u64>();
        let sample = passes.iter().filter(|pass| pass.name == "probe").map(|pass| pass.bytes_downloaded).sum();
        let again = self.downloaded_again(passes, spool_bytes);
        let requests = human::grouped(self.requests(passes, spool_bytes));
        let mut text = format!("\nNetwork\n  {} are downloaded in about {requests} range requests", human::bytes(all));
        let sampled = if sample > 0 { format!(" but a sample of {}", human::bytes(sample)) } else { String::new() };
        if again == 0 {
            text.push_str(&format!(", nothing of them twice{sampled}\n"));
        } else {
            let time = self.network.map(|rate| format!(" ({})", human::duration(again as f64 / rate)));
            text.push_str(&format!(", {}{} of them again", human::bytes(again), time.unwrap_or_default()));
            // What a cache must hold so that no pass downloads what another did.
            let kept = passes.iter().map(|pass| pass.bytes_downloaded).max().unwrap_or(0);
            text.push_str(&match spool_bytes {
                0 => format!("; with --cache DIR --cache-size {}GB nothing is\n", kept.div_ceil(1_000_000_000)),
                _ => "\n".to_string(),
            });
        }
        if spool_bytes > 0 {
            let bytes = human::bytes(spool_bytes);
            text.push_str(&format!(
                "  at most about {bytes} are kept on the disk until the end (--spool DIR says where)"
            ));
            match self.room.filter(|&room| room < spool_bytes) {
                Some(room) => text.push_str(&format!(", where there is room for {}\n", human::bytes(room))),
                None => text.push('\n'),
            }
        }
        text
    }

    /// How many requests that takes, beside those that open the files.
    fn requests(self, passes: &[PassSummary], spool_bytes: u64) -> u64 {
        // What comes again because there is no room for it comes in ranges like those of the first pass.
        let first = passes.iter().find(|pass| pass.name != "probe" && pass.requests > 0);
        let usual = first.map_or(0.0, |pass| pass.requests as f64 / pass.bytes_downloaded.max(1) as f64);
        let of = |(pass, shown): (&PassSummary, &Pass)| {
            let missing = shown.network_bytes.saturating_sub(pass.bytes_downloaded) as f64;
            let share = shown.network_bytes.min(pass.bytes_downloaded) as f64 / pass.bytes_downloaded.max(1) as f64;
            (pass.requests as f64 * share + missing * usual).ceil() as u64
        };
        passes.iter().zip(&self.passes(passes, spool_bytes)).map(of).sum()
    }

    /// What a pass downloads that another did, but for the sample.
    fn downloaded_again(self, passes: &[PassSummary], spool_bytes: u64) -> u64 {
        let shown = self.passes(passes, spool_bytes);
        let all: u64 = shown.iter().filter(|pass| pass.name != "probe").map(|pass| pass.network_bytes).sum();
        all.saturating_sub(PassSummary::needed_once(passes))
    }

    fn passes(self, passes: &[PassSummary], all_spooled: u64) -> Vec<Pass> {
        // What the first pass over everything leaves in the cache; a probe's blocks lie too far apart to be of use.
        let mut kept = 0;
        // Of what is to be kept, what there is room for.
        let spool_bytes = all_spooled.min(self.room.unwrap_or(u64::MAX));
        let fits = spool_bytes as f64 / all_spooled.max(1) as f64;
        let first = passes.iter().position(|pass| pass.name != "probe");
        let pass = |(index, pass): (usize, &PassSummary)| {
            let missing = pass.bytes_spared - (pass.bytes_spared as f64 * fits) as u64;
            let missing = if all_spooled > 0 { missing } else { 0 };
            let remote_bytes = pass.bytes_downloaded + missing;
            let network_bytes = remote_bytes - remote_bytes.min(kept);
            if pass.name != "probe" {
                kept = self.cache_bytes.min(remote_bytes.max(kept));
            }
            let spooled = if pass.bytes_spared > 0 || first == Some(index) { spool_bytes } else { 0 };
            // What is downloaded to compute an input may be more than that.
            let read_bytes = (pass.bytes_read + missing).saturating_sub(network_bytes);
            let disk_bytes = read_bytes + pass.bytes_written + spooled;
            let time = |bytes: u64, rate: Option<f64>| match (bytes, rate) {
                (0, _) => Some(0.0),
                (bytes, rate) => rate.map(|rate| bytes as f64 / rate),
            };
            let seconds = time(disk_bytes, self.disk).zip(time(network_bytes, self.network)).map(|(a, b)| a.max(b));
            Pass { name: pass.name, disk_bytes, network_bytes, seconds }
        };
        passes.iter().enumerate().map(pass).collect()
    }
}

/// `2GB/s`, `500MiB/s`, `1Gbit/s`: bytes per second.
pub fn rate(text: &str) -> Result<f64, String> {
    const EXPECTED: &str = "a rate is like 2GB/s or 1Gbit/s";
    let amount = text.trim().strip_suffix("/s").ok_or(EXPECTED)?;
    let (amount, share) = match amount.strip_suffix("bit") {
        Some(bits) => (format!("{bits}B"), 8.0),
        // Without a B it might mean either.
        None if amount.ends_with('B') => (amount.to_owned(), 1.0),
        None => return Err(EXPECTED.into()),
    };
    let bytes = super::parse::size(&amount).map_err(|e| format!("{e}; {EXPECTED}"))?;
    if bytes == 0 { Err(EXPECTED.into()) } else { Ok(bytes as f64 / share) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_in_bytes_or_bits() {
        for (text, bytes) in [("2GB/s", 2e9), ("1Gbit/s", 1.25e8), ("512 MiB/s", 536_870_912.0), ("10Gbps", f64::NAN)] {
            match bytes.is_nan() {
                true => assert!(rate(text).is_err(), "{text}"),
                false => assert_eq!(rate(text), Ok(bytes), "{text}"),
            }
        }
        for bad in ["2GB", "fast", "1G/s", "0GB/s", ""] {
            assert!(rate(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_the_disk_has_no_room_for_is_downloaded_again() {
        let pass = |name, bytes_read, bytes_downloaded, bytes_spared, bytes_written| PassSummary {
            name,
            purpose: "",
            bytes_read,
            bytes_downloaded,
            requests: bytes_downloaded / 8_000_000,
            bytes_spared,
            bytes_written,
        };
        let passes = [
            pass("probe", 10_000_000_000, 10_000_000_000, 0, 0),
            pass("sketch", 1_000_000_000_000, 1_000_000_000_000, 0, 0),
            pass("merge", 0, 0, 1_000_000_000_000, 100_000_000_000),
        ];
        let rates = Rates { disk: Some(1e9), network: Some(1e9), ..Rates::default() };
        let shown = |room| {
            let rates = Rates { room, ..rates };
            (rates.downloads(&passes, 200_000_000_000), rates.passes(&passes, 200_000_000_000))
        };
        for room in [None, Some(200_000_000_000), Some(u64::MAX)] {
            let (text, passes) = shown(room);
            assert_eq!(
                text,
                "\nNetwork\n  1.01 TB are downloaded in about 126,250 range requests, nothing of them twice but a sample of 10 GB\n  at most about 200 GB \
                 are kept on the disk until the end (--spool DIR says where)\n"
            );
            // What is kept is written in one pass and read in the other.
            let disk: Vec<u64> = passes.iter().map(|pass| pass.disk_bytes).collect();
            assert_eq!(disk, [0, 200_000_000_000, 300_000_000_000]);
        }
        let (text, passes) = shown(Some(50_000_000_000));
        assert!(
            text.contains(
                "1.76 TB are downloaded in about 220,000 range requests, 750 GB (12 min 30 s) of them again\n"
            ),
            "{text}"
        );
        assert!(text.ends_with("(--spool DIR says where), where there is room for 50 GB\n"), "{text}");
        assert_eq!((passes[2].disk_bytes, passes[2].network_bytes), (150_000_000_000, 750_000_000_000));
    }
}
