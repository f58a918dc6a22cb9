//! Many merges of the same inputs at once: what they need to read, they read together.
//!
//! - Each output is a merge of its own: a plan, a directory, a journal. It has the bytes that it would have alone, and an
//!   interrupted sweep goes on as an interrupted merge does.
//! - What is shared: the open files; one search for the thresholds of all densities; one vote; and every chunk that is
//!   loaded to be merged, by all outputs that lack it. A plan of all models (`union`) says what is loaded.
//! - Outputs that differ in λ alone are merged once per chunk, and multiplied for each (`engine/scaled.rs`).
//! - Outputs follow each other within a chunk, so that buffers are those of one merge, whatever their number.
//! - Packed, an output is one file: what of the merge differs from base (`spool`).
//! - A merge whose method needs looks at whole tensors, or whose tensors are not those of the others, runs by itself.

mod chunks;
mod downloads;
mod group;
mod ready;
mod spool;
mod votes;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;

use super::output::{JOURNAL_PATH, MANIFEST, admit_swept, must_fit, refuse_inputs};
use super::scaled::HELD_BYTES;
use super::{Observer, OutputOptions, Report, check_memory, is_finished, merge, peak_memory_bytes, verify};
use crate::checkpoint::packed;
use crate::error::{Error, Result, printable};
use crate::limits::{MAX_MANIFEST_BYTES, MAX_SWEEP_GROUP};
use crate::method::Value;
use crate::plan::{Action, Downloads, Piece, Plan, PlannedTensor, Recipe, Run, Schedule, Together, Unit};
use crate::storage::Storage;

/// The tables of a finished sweep.
const TABLE_JSON: &str = "sweep.json";
const TABLE_TEXT: &str = "sweep.md";

/// Fewest outputs that are merged once for all: working out what they have in common takes longer than one merge from stored
/// bytes to stored bytes.
const LEAST_FAMILY: usize = 4;

/// Where and how outputs are put.
#[derive(Debug, Clone)]
pub struct SweepOptions {
    /// The directory of all outputs, and what is done with what is there.
    pub output: OutputOptions,
    /// Each output is a packed difference to base, and not a checkpoint in a folder.
    pub packed: bool,
    /// What becomes of what is downloaded and needed again.
    pub downloads: Downloads,
}

/// One output of a sweep.
pub struct Variant {
    /// The name of its folder, or of its file without `.tvz`.
    pub name: String,
    /// What is special about it: (parameter, value).
    pub settings: Vec<(String, String)>,
    /// What is merged.
    pub plan: Plan,
}

/// An output, as the tables list it.
#[derive(Debug, Clone, Serialize)]
pub struct SweepEntry {
    /// The name of its folder, or of its file without `.tvz`.
    pub name: String,
    /// What is special about it.
    pub settings: Vec<(String, String)>,
    /// Whether it was there already.
    pub found: bool,
    /// Whether it was made together with others.
    pub shared: bool,
    /// The fingerprint of its plan.
    pub fingerprint: String,
    /// Its own report; tensor bytes read are those that its result is made of. None for a packed one that was there and is
    /// not in the table.
    pub report: Option<Report>,
}

/// What a sweep did.
#[derive(Debug, Clone, Serialize)]
pub struct SweepReport {
    /// Directory of the folders.
    pub out: String,
    /// The outputs.
    pub outputs: Vec<SweepEntry>,
    /// Tensor bytes read from inputs in this run.
    pub bytes_read: u64,
    /// Tensor bytes that separate merges of the outputs made in this run would read: by their plans, or as they did.
    pub separate_bytes_read: u64,
    /// Bytes of shards of the outputs made in this run.
    pub bytes_written: u64,
    /// Duration.
    pub wall_seconds: f64,
    /// Peak resident memory of the process, where the system tells.
    pub peak_memory_bytes: Option<u64>,
}

/// Makes all `variants`, each in a folder of its name in `output.dir`. `union` is a plan of the same kind with all models.
pub fn sweep(
    mut union: Plan,
    variants: &[Variant],
    run: Run,
    options: &SweepOptions,
    storage: &Arc<dyn Storage>,
    observer: &dyn Observer,
) -> Result<SweepReport> {
    let dir = &options.output.dir;
    let created = storage.identity(dir)?.is_none();
    union.packing = options.packed.then_some(packed::CHUNK as u64);
    let result = run_all(&union, variants, run, options, storage, observer);
    if result.is_err() && created {
        // Only if nothing is in it.
        let _ = storage.remove_dir(dir);
    }
    result
}

fn run_all(
    union: &Plan,
    variants: &[Variant],
    run: Run,
    options: &SweepOptions,
    storage: &Arc<dyn Storage>,
    observer: &dyn Observer,
) -> Result<SweepReport> {
    let output = &options.output;
    let begin = Instant::now();
    let mut sweep = Sweep { union, run, options, output, packed: options.packed, storage, observer, bytes_read: 0 };
    let mut outputs: Vec<Option<SweepEntry>> = Vec::new();
    sweep.admit(variants)?;
    for variant in variants {
        outputs.push(sweep.found(variant)?);
    }
    let open: Vec<usize> = (0..variants.len()).filter(|&at| outputs[at].is_none()).collect();
    sweep.check_space(open.iter().map(|&at| &variants[at]))?;
    let (shared, alone): (Vec<usize>, Vec<usize>) =
        open.iter().copied().partition(|&at| fits(&variants[at].plan, union));
    let mut separate = 0u64;
    for &at in &shared {
        let planned = Schedule::new(&variants[at].plan, run)?.passes.iter().map(|pass| pass.bytes_read).sum::<u64>();
        separate = separate.saturating_add(planned);
    }
    if options.packed {
        refuse_unpackable(union, alone.iter().map(|&at| &variants[at]))?;
    }
    if !open.is_empty() && storage.identity(&output.dir)?.is_none() {
        storage.create_dir_all(&output.dir).map_err(Error::as_input)?;
    }
    let mut rest = &shared[..];
    while !rest.is_empty() {
        let (group, schedule) = sweep.group(rest, variants)?;
        check_memory(&schedule)?;
        rest = &rest[group.len()..];
        let plans: Vec<&Variant> = group.iter().map(|&at| &variants[at]).collect();
        let reports = match options.packed {
            true => sweep.pack_group(&plans, &schedule)?,
            false => sweep.run_group(&plans, &schedule)?,
        };
        for (&at, report) in group.iter().zip(reports) {
            outputs[at] = Some(entry(&variants[at], report, true));
        }
    }
    for &at in &alone {
        let schedule = Schedule::with_spool(&variants[at].plan, run)?.keeping(&variants[at].plan, &options.downloads);
        let report = merge(&variants[at].plan, &schedule, &sweep.options(&variants[at]), storage, observer)?;
        sweep.bytes_read = sweep.bytes_read.saturating_add(report.bytes_read);
        separate = separate.saturating_add(report.bytes_read);
        outputs[at] = Some(entry(&variants[at], report, false));
    }
    downloads::remove_leftover(&output.dir, &**storage)?;
    let outputs: Vec<SweepEntry> = outputs.into_iter().flatten().collect();
    let report = SweepReport {
        out: output.dir.display().to_string(),
        bytes_read: sweep.bytes_read,
        separate_bytes_read: separate,
        bytes_written: outputs.iter().filter(|e| !e.found).filter_map(|e| Some(e.report.as_ref()?.bytes_written)).sum(),
        wall_seconds: begin.elapsed().as_secs_f64(),
        peak_memory_bytes: peak_memory_bytes(),
        outputs,
    };
    // A run that found everything has nothing to say about how it was made.
    if !open.is_empty() || !tables_list(&report, &output.dir, &**storage)? {
        write_tables(&report, &output.dir, &**storage)?;
    }
    Ok(report)
}

fn entry(variant: &Variant, report: Report, shared: bool) -> SweepEntry {
    SweepEntry {
        name: variant.name.clone(),
        settings: variant.settings.clone(),
        found: false,
        shared,
        fingerprint: variant.plan.fingerprint.clone(),
        report: Some(report),
    }
}

/// Everything that a sweep's parts share.
struct Sweep<'a> {
    union: &'a Plan,
    run: Run,
    options: &'a SweepOptions,
    output: &'a OutputOptions,
    packed: bool,
    storage: &'a Arc<dyn Storage>,
    observer: &'a dyn Observer,
    bytes_read: u64,
}

impl Sweep<'_> {
    fn dir(&self, variant: &Variant) -> PathBuf {
        self.output.dir.join(&variant.name)
    }

    fn options(&self, variant: &Variant) -> OutputOptions {
        OutputOptions { dir: self.dir(variant), ..self.output.clone() }
    }

    /// Refuses an output directory that is an input's, or not empty and not a sweep's.
    fn admit(&self, variants: &[Variant]) -> Result<()> {
        let dir = &self.output.dir;
        refuse_inputs(self.union, dir, &**self.storage)?;
        let mut own: BTreeSet<String> = [TABLE_JSON, downloads::SPOOL].map(str::to_owned).into();
        for variant in variants {
            let file = spool::file(dir, &variant.name);
            let beside = spool::leftovers(&file);
            let files = beside.iter().chain([&file]).filter(|_| self.packed).filter_map(|path| path.file_name());
            own.extend(files.map(|name| name.to_string_lossy().into_owned()));
            own.extend(Some(variant.name.clone()).filter(|_| !self.packed));
        }
        admit_swept(dir, &own, &**self.storage)
    }

    /// The entry of an output that is finished already.
    fn found(&self, variant: &Variant) -> Result<Option<SweepEntry>> {
        if self.packed {
            return self.found_packed(variant);
        }
        let dir = self.dir(variant);
        if self.output.force || !is_finished(&variant.plan, &dir, &**self.storage)? {
            return Ok(None);
        }
        verify::must_be_complete(&dir, &**self.storage)?;
        let manifest = self.storage.read_small(&dir.join(MANIFEST), MAX_MANIFEST_BYTES)?;
        let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap_or_default();
        let report = serde_json::from_value(manifest["report"].clone());
        Ok(report.ok().map(|report| SweepEntry { found: true, ..entry(variant, report, false) }))
    }

    /// The same of a packed one.
    fn found_packed(&self, variant: &Variant) -> Result<Option<SweepEntry>> {
        let path = spool::file(&self.output.dir, &variant.name);
        if self.output.force || self.storage.identity(&path)?.is_none() {
            return Ok(None);
        }
        let made = packed::fingerprint(&path, &**self.storage)
            .map_err(|e| e.replace_help("remove it and run the sweep again, or make all outputs anew with --force"))?;
        if made.as_ref() != Some(&variant.plan.fingerprint) {
            return Err(Error::input("another file is already there")
                .at(&path)
                .help("use another --out, or --force to replace it"));
        }
        // A run that died right after it gave the file its name left these.
        for left in spool::leftovers(&path) {
            let _ = self.storage.remove_file(&left);
        }
        let Variant { name, settings, plan } = variant;
        let (name, settings, fingerprint) = (name.clone(), settings.clone(), plan.fingerprint.clone());
        let report = self.listed(&fingerprint)?;
        Ok(Some(SweepEntry { name, settings, found: true, shared: false, fingerprint, report }))
    }

    /// The report of an output with this fingerprint in the table that is there, if there is one.
    fn listed(&self, fingerprint: &str) -> Result<Option<Report>> {
        let path = self.output.dir.join(TABLE_JSON);
        if !self.storage.is_file(&path) {
            return Ok(None);
        }
        let table = self.storage.read_small(&path, MAX_MANIFEST_BYTES)?;
        // Whatever else it may be, it is replaced in the end.
        let table: serde_json::Value = serde_json::from_slice(&table).unwrap_or_default();
        let outputs = table["outputs"].as_array().into_iter().flatten();
        let own = outputs.into_iter().find(|output| output["fingerprint"] == *fingerprint);
        Ok(own.and_then(|output| serde_json::from_value(output["report"].clone()).ok()))
    }

    /// Refuses outputs that do not fit on the disk together.
    fn check_space<'v>(&self, open: impl Iterator<Item = &'v Variant>) -> Result<()> {
        let mut needed = 0u64;
        let (mut count, mut longest) = (0u64, 0u64);
        for variant in open {
            if self.packed {
                let [journal, ..] = spool::leftovers(&spool::file(&self.output.dir, &variant.name));
                if self.storage.identity(&journal)?.is_some() {
                    continue;
                }
                let most = packed_bytes_max(&variant.plan);
                longest = longest.max(most);
                needed = needed.saturating_add(most);
                count += 1;
                continue;
            }
            // What a begun output needs, it has taken or says when it goes on.
            if self.storage.identity(&self.dir(variant).join(JOURNAL_PATH))?.is_none() {
                needed = needed.saturating_add(variant.plan.layout.shards.iter().map(|shard| shard.bytes).sum());
                count += 1;
            }
        }
        // A packed one is put in order beside what is to be put in order.
        needed = needed.saturating_add(longest);
        let needs = format!("{count} outputs need{}", if self.packed { " up to" } else { "" });
        must_fit(&needs, needed, &self.output.dir, &**self.storage)
            .map_err(|e| e.help("make room, ask for fewer outputs, or use another --out"))
    }

    /// As many of `open` as can be made together, and how.
    fn group<'v>(&self, open: &'v [usize], variants: &[Variant]) -> Result<(&'v [usize], Schedule)> {
        let mut count = open.len().min(MAX_SWEEP_GROUP);
        loop {
            let group = &open[..count];
            let plans = || group.iter().map(|&at| &variants[at].plan);
            let held_bytes: (u64, u64) = match self.packed {
                true => {
                    let width = plans().map(spool::Spool::width).max().unwrap_or(1);
                    (plans().map(spool::table_bytes).sum(), spool::Framer::held_bytes(width))
                }
                false => (0, 0),
            };
            let once = families(&plans().collect::<Vec<_>>()).iter().any(Option::is_some);
            let held_bytes = (held_bytes.0, held_bytes.1 + if once { HELD_BYTES } else { 0 });
            let goals = |unit: &Unit| chunks::goals_of(self.union, plans(), unit);
            let together =
                Together { searches: searches(plans()), plans: plans().collect(), held_bytes, goals: &goals };
            match Schedule::together(self.union, self.run, &together) {
                Ok(schedule) => return Ok((group, schedule.keeping(self.union, &self.options.downloads))),
                Err(error) if count == 1 => return Err(error),
                Err(_) => count = count.div_ceil(2),
            }
        }
    }
}

/// Refuses what cannot be packed as it is merged.
fn refuse_unpackable<'v>(union: &Plan, mut alone: impl Iterator<Item = &'v Variant>) -> Result<()> {
    let Some(base) = union.base else {
        return Err(Error::usage("what is packed is a difference to a base").help("give --base, or leave --packed out"));
    };
    if union.checkpoints[base].derived.packed {
        return Err(Error::usage("base is itself a packed task vector").help("give a whole checkpoint as --base"));
    }
    match alone.next() {
        Some(Variant { name, .. }) => Err(Error::usage(format!(
            "{} cannot be packed as it is merged: its method looks at whole tensors first, its adapters are merged through \
             their changes, or its tensors are not those of the other outputs",
            printable(name)
        ))
        .help("leave it out, or sweep without --packed")),
        None => Ok(()),
    }
}

/// Most bytes of a packed output: all that may differ from base, not compressed.
fn packed_bytes_max(plan: &Plan) -> u64 {
    let whole: u64 = plan.layout.shards.iter().map(|shard| shard.bytes).sum();
    let share = |set: &crate::plan::ParamSet| set.density.iter().sum::<f64>().min(1.0);
    let most = plan.params.iter().map(share).fold(0.0, f64::max);
    if plan.trim.is_none() || plan.params.iter().any(|set| set.density.is_empty()) {
        return whole;
    }
    let elements: u64 = plan.tensors.iter().map(|tensor| tensor.elements).sum();
    whole.min(elements / 8 + (whole as f64 * most) as u64)
}

/// Most thresholds that are sought at a time for one model.
fn searches<'a>(plans: impl Iterator<Item = &'a Plan>) -> u64 {
    let mut kinds = BTreeSet::new();
    for plan in plans.filter(|plan| plan.selects()) {
        for set in &plan.params {
            for (model, density) in set.density.iter().enumerate() {
                // Outliers take a second threshold.
                for bound in 0..plan.bounds() {
                    kinds.insert(format!("{density} {:?} {bound}", set.merger.sparsify(model)));
                }
            }
        }
    }
    kinds.len().max(1) as u64
}

/// Per plan, the number of its family: those that differ in λ alone, if they are enough to be merged once for all.
fn families(plans: &[&Plan]) -> Vec<Option<usize>> {
    let unscaled = |plan: &&Plan| {
        let mut recipe = plan.recipe.clone();
        recipe.set_everywhere("lambda", Value::Number(1.0));
        recipe
    };
    let recipes: Vec<Recipe> = plans.iter().map(unscaled).collect();
    let first = |recipe| recipes.iter().position(|other| other == recipe);
    let family: Vec<Option<usize>> = recipes.iter().map(first).collect();
    let size = |of: &Option<usize>| family.iter().filter(|other| *other == of).count();
    family.iter().map(|of| of.filter(|_| size(of) >= LEAST_FAMILY)).collect()
}

/// Whether `plan` can be merged from what `union` loads, chunk by chunk.
fn fits(plan: &Plan, union: &Plan) -> bool {
    if plan.factors.is_some() || union.factors.is_some() {
        return false;
    }
    let needs = plan.needs();
    let simple = |plan: &Plan| plan.layers.is_empty() && plan.tokenizer.is_none();
    let in_units = union.selects() || union.votes();
    let same_units = plan.scope == union.scope && (in_units || !plan.selects() && !plan.votes());
    let sought = union.trim.is_some() || !plan.selects();
    if !needs.looks.is_empty() || needs.rows || !simple(plan) || !simple(union) || !same_units || !sought {
        return false;
    }
    let Some(places) = places(plan, union) else { return false };
    let place = |piece: &Piece| (places[piece.checkpoint as usize], piece.entry);
    let models: BTreeSet<u32> = places[plan.first_model..plan.first_model + plan.models()].iter().copied().collect();
    // A model that is listed twice has one window, but two tiles.
    let distinct = models.len() == plan.models();
    let alike = |(own, other): (&PlannedTensor, &PlannedTensor)| {
        let actions = match (&own.action, &other.action) {
            (Action::Copy { source: own, .. }, Action::Copy { source: other, .. }) => {
                place(own) == (other.checkpoint, other.entry)
            }
            (Action::Merge { models: own, .. }, Action::Merge { models: all, .. }) => {
                let own: BTreeSet<_> = own.iter().map(|(_, piece)| place(piece)).collect();
                let all = all.iter().map(|(_, piece)| (piece.checkpoint, piece.entry));
                own == all.filter(|(checkpoint, _)| models.contains(checkpoint)).collect()
            }
            _ => false,
        };
        actions && own.name == other.name && own.shape == other.shape && own.dtype == other.dtype
    };
    distinct && plan.tensors.len() == union.tensors.len() && plan.tensors.iter().zip(&union.tensors).all(alike)
}

/// Per checkpoint of `plan`, its index in `union`.
fn places(plan: &Plan, union: &Plan) -> Option<Vec<u32>> {
    let models = |plan: &Plan, at: usize| at >= plan.first_model && at < plan.first_model + plan.models();
    let place = |(at, checkpoint): (usize, &crate::checkpoint::Checkpoint)| {
        if Some(at) == plan.base {
            return union.base.map(|base| base as u32);
        }
        if Some(at) == plan.oracle {
            return union.oracle.map(|oracle| oracle as u32);
        }
        let same = |&other: &usize| models(union, other) && union.checkpoints[other].spec == checkpoint.spec;
        (0..union.checkpoints.len()).find(same).map(|other| other as u32)
    };
    plan.checkpoints.iter().enumerate().map(place).collect()
}

/// Whether the tables that are there list the outputs of `report`.
fn tables_list(report: &SweepReport, dir: &Path, storage: &dyn Storage) -> Result<bool> {
    let path = dir.join(TABLE_JSON);
    if !storage.is_file(&path) || !storage.is_file(&dir.join(TABLE_TEXT)) {
        return Ok(false);
    }
    let table: serde_json::Value =
        serde_json::from_slice(&storage.read_small(&path, MAX_MANIFEST_BYTES)?).unwrap_or_default();
    let listed = table["outputs"].as_array().into_iter().flatten().map(|output| &output["fingerprint"]);
    Ok(listed.eq(report.outputs.iter().map(|output| &output.fingerprint)))
}

fn write_tables(report: &SweepReport, dir: &Path, storage: &dyn Storage) -> Result<()> {
    storage.create_dir_all(dir)?;
    let json = serde_json::to_string_pretty(report).map_err(|e| Error::failed(format!("{TABLE_JSON}: {e}")))?;
    storage.write_small(&dir.join(TABLE_JSON), (json + "\n").as_bytes(), dir)?;
    storage.write_small(&dir.join(TABLE_TEXT), table(report).as_bytes(), dir)
}

/// The table for people: a row per output.
fn table(report: &SweepReport) -> String {
    let mut keys: Vec<&str> = Vec::new();
    for (key, _) in report.outputs.iter().flat_map(|entry| &entry.settings) {
        if !keys.contains(&&**key) {
            keys.push(key);
        }
    }
    let cell = |text: &str| printable(text).replace('|', "\\|");
    let mut text = String::from("# Outputs of a sweep\n\n| output |");
    keys.iter().for_each(|key| text.push_str(&format!(" {} |", cell(key))));
    text.push_str(" kept | sign conflicts |\n|---|");
    text.push_str(&"---|".repeat(keys.len() + 2));
    text.push('\n');
    for entry in &report.outputs {
        text.push_str(&format!("| `{}` |", cell(&entry.name)));
        for key in &keys {
            let value = entry.settings.iter().find(|(own, _)| own == key).map_or("", |(_, value)| value);
            text.push_str(&format!(" {} |", cell(value)));
        }
        let Some(report) = &entry.report else {
            text.push_str(" | |\n");
            continue;
        };
        let kept: Vec<String> = report.kept_fraction.iter().map(|k| format!("{:.2} %", k * 100.0)).collect();
        let conflicts = report.sign_conflict_fraction * 100.0;
        text.push_str(&format!(" {} | {conflicts:.2} % |\n", kept.join(", ")));
    }
    let made = report.outputs.iter().filter(|entry| !entry.found).count();
    text.push_str(&format!(
        "\nThe last run made {made} of them: it read {} of tensors in {:.1} s; separate merges would read {}.\n",
        sized(report.bytes_read),
        report.wall_seconds,
        sized(report.separate_bytes_read)
    ));
    text
}

/// A number of bytes for people, in decimal units.
fn sized(bytes: u64) -> String {
    let units = [("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)];
    let unit = units.into_iter().find(|(_, size)| bytes as f64 >= *size);
    unit.map_or_else(|| format!("{bytes} B"), |(unit, size)| format!("{:.2} {unit}", bytes as f64 / size))
}
