//! `tiesmith plan`: what a merge will read, hold and write, as a page or as JSON.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use tiesmith::{Error, InputSummary, PlanSummary, Result, printable, spool_room};

use super::args::PlanArgs;
use super::estimate::Rates;
use super::progress::Progress;
use super::table::Table;
use super::{disk, human, job, jobs, lower, output, print, print_json};

/// Most shards that are listed one by one.
const LISTED_SHARDS: usize = 6;

/// Runs the command.
pub fn run(args: &PlanArgs) -> Result<u8> {
    let rates = Rates {
        disk: args.disk,
        network: args.network,
        cache_bytes: args.merge.run.cache.size.unwrap_or(0),
        room: None,
    };
    let (args, save) = (&args.merge, args.save.as_deref());
    let progress = Progress::new(args.run.report.progress);
    let storage = disk(args.run.io, &progress);
    let jobs = jobs::read(args, "plan", &*storage)?;
    let alone = jobs.len() == 1;
    if save.is_some() && !alone {
        return Err(Error::usage("--save takes one merge, and the recipe file holds several")
            .help("merge the documents that others use first, each from a file of its own"));
    }
    if !alone {
        jobs::check(&jobs, &storage)?;
    }
    let (mut text, mut pending) = (String::new(), Vec::new());
    for mut job in jobs {
        let name = job.name.clone().unwrap_or_else(|| "the last document".into());
        // What is made of parts that are not there yet has no headers to plan by.
        let waits = |source: &str| pending.iter().any(|dir: &PathBuf| dir.as_path() == Path::new(source));
        if let Some(part) = job.recipe.sources().find(|source| waits(source)) {
            let part = printable(part);
            text.push_str(&format!("{}: planned once {part} is made\n", printable(&name)));
            pending.extend(job.out);
            continue;
        }
        let plan = job.plan(&storage)?;
        tiesmith::check_side_files(&plan, &*storage)?;
        let mut schedule = lower::schedule(&plan, args)?;
        if let Some(file) = save {
            schedule = job::save(file, args, &plan, &schedule, &*storage)?;
        }
        let mut summary = PlanSummary::new(&plan, &schedule);
        summary.warnings.extend(lower::idle(&args.given, &[&job.recipe.method]));
        if let (true, Some(dir)) = (job.part, &job.out)
            && !tiesmith::is_finished(&plan, dir, &*storage)?
        {
            pending.push(dir.clone());
        }
        if args.run.report.json {
            print_json(&summary)?;
            continue;
        }
        if !alone {
            text.push_str(&format!("{}\n\n", printable(&name)));
        }
        text.push_str(&render(&summary));
        let out = job.out.as_deref();
        let dir = args.output.spool.as_deref().or(out);
        let room = |dir: &Path| spool_room(dir, (out.unwrap_or(dir), summary.bytes_written), &*storage);
        let room = dir.filter(|_| summary.spool_bytes > 0).map(room).transpose()?;
        text.push_str(&Rates { room, ..rates }.render(&plan, &summary));
        if let Some(file) = save {
            let file = printable(&file.to_string_lossy());
            let _ =
                writeln!(text, "\nSaved to {file}; memory is that of each part. Next: tiesmith run {file} --part 1/N");
        }
        if !alone {
            text.push('\n');
        }
    }
    if args.run.report.json { Ok(0) } else { print(&text) }
}

/// The page.
fn render(plan: &PlanSummary) -> String {
    let sections = [method(plan), inputs(plan), tensors(plan), passes(plan), memory(plan), shards(plan), end(plan)];
    sections.join("\n")
}

fn pairs<'a>(values: impl IntoIterator<Item = (&'a String, &'a String)>) -> String {
    let words: Vec<String> = values.into_iter().map(|(name, value)| format!("{name} {value}")).collect();
    words.join(", ")
}

fn method(plan: &PlanSummary) -> String {
    let mut table = Table::new("", "ll");
    let params = pairs(&plan.params);
    let separator = if params.is_empty() { "" } else { ": " };
    table.row(["Method", &format!("{}{separator}{params}", plan.method)]);
    if !plan.trim.is_empty() {
        table.row(["Trim", &pairs(&plan.trim)]);
    }
    table.render()
}

fn inputs(plan: &PlanSummary) -> String {
    // Parameters become columns; equal ones in all models too, so that nothing is left to guess.
    let mut names: Vec<&str> = plan.inputs.iter().flat_map(|i| i.params.keys()).map(String::as_str).collect();
    names.sort_unstable();
    names.dedup();
    let mut table = Table::new("  ", &format!("llrrrrl{}", "r".repeat(names.len())));
    let head = ["", "checkpoint", "files", "tensors", "parameters", "size", "types"];
    table.row(head.into_iter().chain(names.iter().copied()));
    for input in &plan.inputs {
        let own = names.iter().map(|&name| input.params.get(name).map_or_else(String::new, |v| v.to_string()));
        let cells = [
            input.role.to_string(),
            checkpoint(input),
            input.files.to_string(),
            human::grouped(input.tensors as u64),
            human::count(input.elements),
            human::bytes(input.bytes),
            input.dtypes.join(" "),
        ];
        table.row(cells.into_iter().chain(own));
    }
    format!("Inputs\n{}", table.render())
}

/// What the user named; for a cached Hub snapshot the id with its commit.
fn checkpoint(input: &InputSummary) -> String {
    printable(input.hub.as_deref().unwrap_or(&input.source))
}

fn tensors(plan: &PlanSummary) -> String {
    let merged = human::plural(plan.tensors_merged as u64, "tensor");
    let copied = human::grouped(plan.tensors_copied as u64);
    format!("Tensors\n  {merged} merged ({} parameters), {copied} copied\n", human::count(plan.elements_merged))
}

fn passes(plan: &PlanSummary) -> String {
    let mut table = Table::new("  ", "lrrl");
    table.row(["", "reads", "writes", ""]);
    let amount = |bytes: u64| {
        if bytes == 0 { "-".to_string() } else { human::bytes(bytes) }
    };
    for pass in &plan.passes {
        let cells =
            [pass.name.to_string(), amount(pass.bytes_read), amount(pass.bytes_written), pass.purpose.to_string()];
        table.row(cells);
    }
    if plan.passes.len() > 1 {
        table.row(["total".to_string(), amount(plan.bytes_read), amount(plan.bytes_written)]);
    }
    format!("Passes\n{}", table.render())
}

fn memory(plan: &PlanSummary) -> String {
    let mut table = Table::new("  ", "lr");
    for (term, bytes) in &plan.memory {
        table.row([term.clone(), human::bytes(*bytes)]);
    }
    table.row(["total".to_string(), human::bytes(plan.memory_bytes)]);
    let share = plan.memory_bytes as f64 / plan.memory_limit_bytes.max(1) as f64;
    let threads = human::plural(plan.threads as u64, "thread");
    let limit = human::bytes(plan.memory_limit_bytes);
    format!("Memory (limit {limit}, {} of it used by {threads})\n{}", human::percent(share), table.render())
}

fn shards(plan: &PlanSummary) -> String {
    let shards = &plan.shards;
    let mut table = Table::new("  ", "lr");
    let mut list = |part: &[(String, u64)]| {
        for (name, bytes) in part {
            table.row([printable(name), human::bytes(*bytes)]);
        }
    };
    if shards.len() <= LISTED_SHARDS {
        list(shards);
    } else {
        let (head, tail) = (&shards[..2], &shards[shards.len() - 1..]);
        let middle = &shards[2..shards.len() - 1];
        let bytes = middle.iter().map(|(_, bytes)| bytes).sum();
        list(head);
        list(&[(format!("... {} more", middle.len()), bytes)]);
        list(tail);
    }
    let count = human::plural(shards.len() as u64, "shard");
    format!("Output ({count}, {})\n{}", human::bytes(plan.bytes_written), table.render())
}

fn end(plan: &PlanSummary) -> String {
    let mut text = format!("Fingerprint {}\n", plan.fingerprint);
    for warning in &plan.warnings {
        let _ = writeln!(text, "warning: {}", output::one_line(warning));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use tiesmith::PassSummary;
    use tiesmith::Spread;

    fn words(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_string(), (*value).to_string())).collect()
    }

    fn input(role: &'static str, source: &str, params: &[(&str, f64)]) -> InputSummary {
        InputSummary {
            role,
            source: source.into(),
            path: format!("/models/{source}"),
            hub: (role == "base").then(|| "org/llama@8cca527612d8".to_string()),
            files: 3,
            tensors: 291,
            elements: 6_738_415_616,
            bytes: 13_476_831_232,
            dtypes: vec!["BF16".into()],
            params: params.iter().map(|(name, value)| ((*name).to_string(), Spread::One(*value))).collect(),
        }
    }

    fn pass(name: &'static str, purpose: &'static str, read: u64, written: u64) -> PassSummary {
        PassSummary {
            name,
            purpose,
            bytes_read: read,
            bytes_downloaded: 0,
            requests: 0,
            bytes_spared: 0,
            bytes_written: written,
        }
    }

    fn example() -> PlanSummary {
        let shard = |index: u64| (format!("model-{index:05}-of-00003.safetensors"), 4_492_000_000 + index);
        PlanSummary {
            method: "ties".into(),
            params: words(&[("lambda", "1"), ("elect", "mass"), ("combine", "mean"), ("zero_sum", "zero")]),
            trim: words(&[("scope", "model"), ("threshold", "exact"), ("ties", "keep")]),
            inputs: vec![
                input("base", "org/llama", &[]),
                input("model", "chat", &[("density", 0.2), ("weight", 1.0)]),
                input("model", "finetunes/code", &[("density", 0.35), ("weight", 2.0)]),
            ],
            tensors_merged: 290,
            tensors_copied: 1,
            elements_merged: 6_738_415_104,
            passes: vec![
                pass("probe", "brackets the trim thresholds", 404_000_000, 0),
                pass("sketch", "finds the trim thresholds", 40_430_000_000, 0),
                pass("merge", "elects signs, averages, writes shards", 40_430_000_000, 13_476_900_000),
            ],
            bytes_read: 81_264_000_000,
            bytes_written: 13_476_900_000,
            spool_bytes: 0,
            shards: (1..=3).map(shard).collect(),
            memory: vec![
                ("source windows".into(), 603_979_776),
                ("output buffers".into(), 134_217_728),
                ("sketches".into(), 67_108_864),
                ("process".into(), 32_000_000),
            ],
            memory_bytes: 837_306_368,
            memory_limit_bytes: 2_147_483_648,
            threads: 8,
            fingerprint: "3f9a61c0d2".into(),
            warnings: vec!["tensor \"a\u{1b}b\" is an integer in every model: copied from base".into()],
        }
    }

    #[test]
    fn the_page_is_aligned_and_complete() {
        let expected = "\
Method  ties: combine mean, elect mass, lambda 1, zero_sum zero
Trim    scope model, threshold exact, ties keep

Inputs
         checkpoint              files  tensors    parameters     size  types  density  weight
  base   org/llama@8cca527612d8      3      291  6.74 billion  13.5 GB  BF16
  model  chat                        3      291  6.74 billion  13.5 GB  BF16       0.2       1
  model  finetunes/code              3      291  6.74 billion  13.5 GB  BF16      0.35       2

Tensors
  290 tensors merged (6.74 billion parameters), 1 copied

Passes
            reads   writes
  probe    404 MB        -  brackets the trim thresholds
  sketch  40.4 GB        -  finds the trim thresholds
  merge   40.4 GB  13.5 GB  elects signs, averages, writes shards
  total   81.3 GB  13.5 GB

Memory (limit 2.15 GB, 39 % of it used by 8 threads)
  source windows   604 MB
  output buffers   134 MB
  sketches        67.1 MB
  process           32 MB
  total            837 MB

Output (3 shards, 13.5 GB)
  model-00001-of-00003.safetensors  4.49 GB
  model-00002-of-00003.safetensors  4.49 GB
  model-00003-of-00003.safetensors  4.49 GB

Fingerprint 3f9a61c0d2
warning: tensor \"a\\u{1b}b\" is an integer in every model: copied from base
";
        let text = render(&example());
        assert_eq!(text, expected, "\n{text}");
    }

    #[test]
    fn many_shards_are_condensed() {
        let shards = (1..=30).map(|i| (format!("model-{i:05}-of-00030.safetensors"), 5_000_000_000)).collect();
        let text = render(&PlanSummary { shards, bytes_written: 150_000_000_000, ..example() });
        let expected = "\
Output (30 shards, 150 GB)
  model-00001-of-00030.safetensors    5 GB
  model-00002-of-00030.safetensors    5 GB
  ... 27 more                       135 GB
  model-00030-of-00030.safetensors    5 GB
";
        assert!(text.contains(expected), "{text}");
    }

    #[test]
    fn a_method_without_trim_or_parameters_says_no_more() {
        let plain = PlanSummary { method: "linear".into(), params: words(&[]), trim: words(&[]), ..example() };
        assert!(render(&plain).starts_with("Method  linear\n\nInputs\n"));
    }
}
