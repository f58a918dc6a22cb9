//! How long a merge takes, from what its plan reads and writes and the rates that the user names.
//!
//! Reading and writing overlap where they use different devices, so a pass lasts as long as the busiest of them. Cores are
//! not in it: with a few of them a disk or a network is what limits.

use tiesmith::{Plan, PlanSummary};

use super::human;
use super::table::Table;

/// Rates in bytes per second.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rates {
    pub disk: Option<f64>,
    pub network: Option<f64>,
    /// Bytes that are kept of what is downloaded.
    pub cache_bytes: u64,
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
    /// The section of the page: empty if no rate is given.
    pub fn render(self, plan: &Plan, summary: &PlanSummary) -> String {
        let downloads = self.downloads(plan, summary);
        if self.disk.is_none() && self.network.is_none() {
            return downloads;
        }
        let passes = self.passes(summary, remote_share(plan));
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

    /// What comes over the network, and how much of it more than once.
    fn downloads(self, plan: &Plan, summary: &PlanSummary) -> String {
        if !plan.is_remote() {
            return String::new();
        }
        let sum = |rates: Self| rates.passes(summary, remote_share(plan)).iter().map(|p| p.network_bytes).sum::<u64>();
        let bytes = |cache_bytes| sum(Self { cache_bytes, ..self });
        let (now, once) = (bytes(self.cache_bytes), bytes(u64::MAX));
        let mut text = format!("\nNetwork\n  {} are downloaded", human::bytes(now));
        if now > once {
            let kept = self.largest_pass(summary, remote_share(plan));
            text.push_str(&format!(
                ", {} of them again; with --cache DIR --cache-size {}GB nothing is\n",
                human::bytes(now - once),
                kept.div_ceil(1_000_000_000)
            ));
        } else {
            text.push_str(", nothing of them twice\n");
        }
        text
    }

    /// What a cache must hold so that no pass downloads what another did.
    fn largest_pass(self, summary: &PlanSummary, remote_share: f64) -> u64 {
        summary.passes.iter().map(|pass| (pass.bytes_read as f64 * remote_share) as u64).max().unwrap_or(0)
    }

    fn passes(self, summary: &PlanSummary, remote_share: f64) -> Vec<Pass> {
        // What the first pass over everything leaves in the cache; a probe's blocks lie too far apart to be of use.
        let mut kept = 0;
        let pass = |pass: &tiesmith::PassSummary| {
            let remote_bytes = (pass.bytes_read as f64 * remote_share) as u64;
            let network_bytes = remote_bytes - remote_bytes.min(kept);
            if pass.name != "probe" {
                kept = self.cache_bytes.min(remote_bytes.max(kept));
            }
            let disk_bytes = pass.bytes_read - network_bytes + pass.bytes_written;
            let time = |bytes: u64, rate: Option<f64>| match (bytes, rate) {
                (0, _) => Some(0.0),
                (bytes, rate) => rate.map(|rate| bytes as f64 / rate),
            };
            let seconds = time(disk_bytes, self.disk).zip(time(network_bytes, self.network)).map(|(a, b)| a.max(b));
            Pass { name: pass.name, disk_bytes, network_bytes, seconds }
        };
        summary.passes.iter().map(pass).collect()
    }
}

/// Share of the inputs' bytes that come over the network.
fn remote_share(plan: &Plan) -> f64 {
    let bytes = |remote: bool| -> u64 {
        let inputs = plan.checkpoints.iter().filter(|input| !remote || input.is_remote());
        inputs.flat_map(|input| &input.tensors).map(|tensor| tensor.bytes).sum()
    };
    bytes(true) as f64 / bytes(false).max(1) as f64
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
}
