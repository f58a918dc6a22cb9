//! `tiesmith inspect`: what is in a checkpoint.

use std::fmt::Write;
use std::sync::Arc;

use serde::Serialize;
use tiesmith::{Checkpoint, InspectReport, IoMode, Observer, Result, Storage, TensorStats, printable};

use super::args::InspectArgs;
use super::bars::bar;
use super::progress::Progress;
use super::table::Table;
use super::{disk, human, print, print_json};

/// Largest config.json that is looked at, in bytes.
const MAX_CONFIG_BYTES: u64 = 16_000_000;
/// Characters of a bar.
const BAR: usize = 8;
/// How many of the largest tensors the summary names.
const LARGEST: usize = 5;
/// Characters of the longest bar of the histogram.
const WIDE_BAR: usize = 40;
/// Share of all values below which the least octaves share a line.
const LEAST_SHARE: f64 = 0.001;

/// What `--json` prints.
#[derive(Serialize)]
struct Inspection<'a> {
    #[serde(flatten)]
    report: &'a InspectReport,
    #[serde(flatten)]
    config: &'a Config,
}

/// What config.json says about the model, as far as it says it.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Config {
    model_type: Option<String>,
    architectures: Vec<String>,
}

/// Runs the command.
pub fn run(args: &InspectArgs) -> Result<u8> {
    let progress = Progress::new(args.report.progress);
    let storage = disk(IoMode::Auto, &progress);
    let checkpoint = Checkpoint::open(&args.checkpoint, &storage)?;
    let config = config(&checkpoint, &storage, &progress);
    let mut report = tiesmith::inspect(&checkpoint, args.stats, &progress)?;
    for warning in &report.warnings {
        progress.warn(warning);
    }
    drop(progress);
    let listed = args.tensors || args.stats;
    if args.report.json {
        if !listed {
            report.list.clear();
        }
        return print_json(&Inspection { report: &report, config: &config });
    }
    print(&render(&report, &config, listed, args.stats))
}

fn config(checkpoint: &Checkpoint, storage: &Arc<dyn Storage>, progress: &Progress) -> Config {
    let path = checkpoint.dir.join("config.json");
    if !storage.is_file(&path) {
        return Config::default();
    }
    match storage.read_small(&path, MAX_CONFIG_BYTES) {
        Ok(bytes) => parse_config(&bytes).unwrap_or_else(|| {
            progress.warn(&format!("{} is not JSON", printable(&path.to_string_lossy())));
            Config::default()
        }),
        Err(error) => {
            progress.warn(&error.to_string());
            Config::default()
        }
    }
}

fn parse_config(bytes: &[u8]) -> Option<Config> {
    let json: serde_json::Value = serde_json::from_slice(bytes).ok()?;
    let words = |value: &serde_json::Value| value.as_str().map(str::to_owned);
    let names = json["architectures"].as_array();
    Some(Config {
        model_type: words(&json["model_type"]),
        architectures: names.map(|names| names.iter().filter_map(words).collect()).unwrap_or_default(),
    })
}

fn render(report: &InspectReport, config: &Config, listed: bool, stats: bool) -> String {
    let mut text = summary(report, config);
    if listed {
        let _ = write!(text, "\nTensors\n{}", list(&report.list, stats));
        text.push_str(&histogram(report));
    } else if report.list.len() > 1 {
        let mut largest: Vec<&TensorStats> = report.list.iter().collect();
        largest.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.name.cmp(&b.name)));
        let mut table = Table::new("  ", "lllr");
        for tensor in largest.iter().take(LARGEST) {
            let size = human::bytes(tensor.bytes);
            table.row([printable(&tensor.name), tensor.dtype.clone(), human::shape(&tensor.shape), size]);
        }
        let _ = write!(text, "\nLargest tensors\n{}", table.render());
    }
    text
}

fn summary(report: &InspectReport, config: &Config) -> String {
    let mut table = Table::new("", "ll");
    table.row(["Checkpoint", &printable(report.hub.as_deref().unwrap_or(&report.source))]);
    if !report.path.is_empty() {
        table.row(["Path", &printable(&report.path)]);
    }
    let kind = config.model_type.as_deref().map(printable).unwrap_or_default();
    match config.architectures.first().map(|name| printable(name)) {
        Some(name) if !kind.is_empty() => table.row(["Model", &format!("{name} ({kind})")]),
        Some(name) => table.row(["Model", &name]),
        None if !kind.is_empty() => table.row(["Model", &kind]),
        None => {}
    }
    table.row(["Files", &human::grouped(report.files)]);
    table.row(["Tensors", &human::grouped(report.tensors)]);
    let parameters = human::grouped(report.elements);
    let rounded = human::count(report.elements);
    let rounded = if rounded == parameters { String::new() } else { format!(" ({rounded})") };
    table.row(["Parameters", &format!("{parameters}{rounded}")]);
    table.row(["Size", &human::bytes(report.bytes)]);
    let types: Vec<String> = report
        .dtypes
        .iter()
        .map(|total| {
            let tensors = human::plural(total.tensors, "tensor");
            format!("{} ({tensors}, {})", total.dtype, human::bytes(total.bytes))
        })
        .collect();
    table.row(["Types", &types.join(", ")]);
    table.render()
}

fn list(tensors: &[TensorStats], stats: bool) -> String {
    let mut table = Table::new("  ", "lllrrrrrlrrrl");
    let figures = ["least", "greatest", "mean", "deviation", "", "zeros", "NaN", "inf"];
    let figures = if stats { figures } else { [""; 8] };
    let deviations = tensors.iter().filter_map(|tensor| tensor.stats?.std);
    let widest = deviations.fold(0.0, f64::max);
    table.row(["name", "type", "shape", "size"].into_iter().chain(figures).chain(["file"]));
    for tensor in tensors {
        let cells =
            [printable(&tensor.name), tensor.dtype.clone(), human::shape(&tensor.shape), human::bytes(tensor.bytes)];
        let file = printable(&tensor.file);
        table.row(cells.into_iter().chain(figure_cells(tensor, widest)).chain([file]));
    }
    table.render()
}

/// Magnitudes of all float values together, largest last; empty where none were counted.
fn histogram(report: &InspectReport) -> String {
    let zeros: u64 = report.list.iter().filter_map(|tensor| Some(tensor.stats?.zeros)).sum();
    let octaves = &report.magnitudes;
    let all = zeros + octaves.iter().map(|octave| octave.count).sum::<u64>();
    if all == 0 {
        return String::new();
    }
    let rare = |count: u64| count as f64 / all as f64 <= LEAST_SHARE;
    let mut below = 0;
    let lumped = octaves.iter().take_while(|octave| {
        below += octave.count;
        rare(below)
    });
    let first = lumped.count();
    let mut rows: Vec<(String, u64)> = vec![("0".into(), zeros)];
    if first > 0 {
        let end = octaves.get(first).map_or_else(|| octaves[first - 1].from * 2.0, |octave| octave.from);
        let label = format!("below {}", human::significant(end));
        rows.push((label, octaves[..first].iter().map(|octave| octave.count).sum()));
    }
    rows.extend(octaves[first..].iter().map(|octave| {
        let label = format!("{} to {}", human::significant(octave.from), human::significant(2.0 * octave.from));
        (label, octave.count)
    }));
    let most = rows.iter().map(|(_, count)| *count).max().unwrap_or(1);
    let mut table = Table::new("  ", "rrl");
    for (label, count) in rows {
        let share = human::share(count as f64 / all as f64);
        table.row([label, share, bar(count as f64 / most as f64, WIDE_BAR)]);
    }
    format!("\nMagnitudes of all float values\n{}", table.render())
}

/// The figures of a tensor; a bar shows its deviation beside the `widest` one.
fn figure_cells(tensor: &TensorStats, widest: f64) -> [String; 8] {
    let Some(stats) = &tensor.stats else {
        return Default::default();
    };
    let value = |value: Option<f64>| value.map_or_else(|| "-".to_string(), human::significant);
    let count = |count: u64| {
        if count == 0 { "-".to_string() } else { human::grouped(count) }
    };
    [
        value(stats.min),
        value(stats.max),
        value(stats.mean),
        value(stats.std),
        stats.std.map_or_else(String::new, |std| bar(std / widest, BAR)),
        count(stats.zeros),
        count(stats.nan),
        count(stats.inf),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use tiesmith::{DtypeTotal, ValueStats};

    fn tensor(name: &str, rows: u64, stats: Option<ValueStats>) -> TensorStats {
        TensorStats {
            name: name.into(),
            dtype: "BF16".into(),
            shape: vec![rows, 4096],
            elements: rows * 4096,
            bytes: rows * 8192,
            file: "model.safetensors".into(),
            stats,
        }
    }

    fn report(list: Vec<TensorStats>) -> InspectReport {
        InspectReport {
            source: "llama".into(),
            path: "/models/llama".into(),
            hub: None,
            files: 1,
            tensors: 2,
            elements: 131_080_192,
            bytes: 262_160_384,
            dtypes: vec![DtypeTotal { dtype: "BF16".into(), tensors: 2, elements: 131_080_192, bytes: 262_160_384 }],
            list,
            magnitudes: Vec::new(),
            warnings: Vec::new(),
        }
    }

    #[test]
    fn the_histogram_is_of_all_values_and_lumps_what_is_rare() {
        let stats = ValueStats { zeros: 500, ..ValueStats::default() };
        let octaves = [(0.000_976_562_5, 3), (0.0625, 6), (0.125, 3_000), (0.5, 6_000), (1.0, 491)];
        let magnitudes = octaves.map(|(from, count)| tiesmith::Octave { from, count }).into();
        let report = InspectReport { magnitudes, ..report(vec![tensor("b", 2, Some(stats)), tensor("c", 2, None)]) };
        let expected = "
Magnitudes of all float values
              0    5.00 %  ███▍
    below 0.125  0.0900 %  ▏
  0.125 to 0.25    30.0 %  ████████████████████
       0.5 to 1    60.0 %  ████████████████████████████████████████
         1 to 2    4.91 %  ███▎
";
        let text = histogram(&report);
        assert_eq!(text, expected, "{text}");
    }

    #[test]
    fn the_summary_names_model_types_and_largest_tensors() {
        let config = parse_config(br#"{"model_type": "llama", "architectures": ["LlamaForCausalLM", 3]}"#).unwrap();
        let text =
            render(&report(vec![tensor("b", 2, None), tensor("a\u{202e}", 32_000, None)]), &config, false, false);
        let expected = "\
Checkpoint  llama
Path        /models/llama
Model       LlamaForCausalLM (llama)
Files       1
Tensors     2
Parameters  131,080,192 (131 million)
Size        262 MB
Types       BF16 (2 tensors, 262 MB)

Largest tensors
  a\\u{202e}  BF16  [32000, 4096]   262 MB
  b          BF16  [2, 4096]      16.4 kB
";
        assert_eq!(text, expected, "\n{text}");
    }

    #[test]
    fn statistics_have_their_columns() {
        let stats = ValueStats {
            min: Some(-0.12),
            max: Some(3.0),
            mean: Some(1.5e-6),
            std: Some(0.0213),
            zeros: 12_345,
            nan: 0,
            inf: 0,
        };
        let narrow = ValueStats { std: Some(0.0213 / 4.0), zeros: 0, ..stats };
        let text = list(&[tensor("b", 2, Some(stats)), tensor("c", 4, None), tensor("d", 2, Some(narrow))], true);
        let expected = "  \
  name  type  shape         size  least  greatest     mean  deviation             zeros  NaN  inf  file
  b     BF16  [2, 4096]  16.4 kB  -0.12         3  1.50e-6     0.0213  ████████  12,345    -    -  model.safetensors
  c     BF16  [4, 4096]  32.8 kB                                                                   model.safetensors
  d     BF16  [2, 4096]  16.4 kB  -0.12         3  1.50e-6    0.00532  ██             -    -    -  model.safetensors
";
        assert_eq!(text, expected, "\n{text}");
        assert!(!list(&[tensor("b", 2, None)], false).contains("NaN"));
    }

    #[test]
    fn a_config_that_is_not_json_is_noticed() {
        assert_eq!(parse_config(b"model_type: llama"), None);
        assert_eq!(parse_config(b"[1]"), Some(Config::default()));
    }
}
