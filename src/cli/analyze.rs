//! `tiesmith analyze`: what a family's task vectors have in common and where they disagree.

use std::path::{Path, PathBuf};

use clap::Args;
use tiesmith::{
    Analysis, AnalysisReport, Error, Line, Observer, OutputOptions, Plan, Recipe, Result, Scope, Storage, Study,
    ThresholdKind, Value, printable, spool_room,
};

use super::args::{InputArgs, RunArgs, scopes, thresholds};
use super::bars::bar;
use super::progress::Progress;
use super::table::Table;
use super::{human, jobs, lower, parse, print, print_json, signals};

/// Characters of a bar.
const BAR: usize = 16;
/// Layers that the summary names.
const LAYERS: usize = 8;
/// Models that the summary names.
const MODELS: usize = 24;
/// Most numbers of models with a line of their own.
const SIZES: usize = 8;

/// What the help shows.
pub const EXAMPLES: &str = "\
Examples:
  Will these two get along, and at which density?
    tiesmith analyze --base llama --model chat --model code --out report
  One threshold per tensor, three densities
    tiesmith analyze --base llama --model chat --model code --scope tensor --densities 10%,20%,40% --out report
  The models of a recipe, at its densities
    tiesmith analyze recipe.yml --out report";

#[derive(Debug, Args)]
pub struct AnalyzeArgs {
    /// A recipe file in mergekit's language, instead of --base and --model
    ///
    /// Base, models, layers, densities, scope, threshold and seed are taken from it, whatever its method; options override
    /// them. The manifest of a merge, DIR/tiesmith.json, is one too.
    #[arg(value_name = "RECIPE.yml", conflicts_with_all = ["base", "models"])]
    pub recipe: Option<String>,

    /// Which merge of a recipe file with several: its name, or its number where it has none
    #[arg(long, value_name = "NAME", requires = "recipe")]
    pub document: Option<String>,

    #[command(flatten)]
    pub inputs: InputArgs,
    #[command(flatten)]
    pub look: LookArgs,
    #[command(flatten)]
    pub run: RunArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "What is looked at")]
pub struct LookArgs {
    /// Directory of the report: report.html, report.json and the figures as SVG
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,

    /// Fraction of each task vector that the merge would keep: 0.2 or 20% [default: 0.2]
    ///
    /// What is said of trimmed task vectors is about this density. A model can have its own: '--model CKPT,density=D'.
    #[arg(long, value_name = "FRACTION", allow_negative_numbers = true, value_parser = parse::fraction)]
    pub density: Option<f64>,

    /// Further densities to compare, separated by commas; 1 is always looked at
    #[arg(
        long,
        value_name = "FRACTION,...",
        value_delimiter = ',',
        default_value = "0.05,0.1,0.2,0.3,0.5,0.7",
        value_parser = parse::fraction
    )]
    pub densities: Vec<f64>,

    /// Where one threshold applies [default: model]
    #[arg(long, value_name = "SCOPE", value_parser = scopes())]
    pub scope: Option<Scope>,

    /// How thresholds are found [default: exact]
    #[arg(long, value_name = "KIND", value_parser = thresholds())]
    pub threshold: Option<ThresholdKind>,

    /// Seed of the draw of subsets of models, where there are more than ten of a size [default: 0]
    #[arg(long, value_name = "N", value_parser = parse::whole)]
    pub seed: Option<u64>,

    /// Where to keep what is downloaded and needed again until the run ends, or 'none' [default: in --out]
    ///
    /// Where thresholds are sought over the whole model (--scope model), inputs are read twice; else tensors are that do not
    /// fit into --memory. Of inputs on the network, everything is kept on the disk for the second time, compressed; what that
    /// has no room for is downloaded again. With 'none', or a --cache, nothing is kept.
    #[arg(long, value_name = "DIR")]
    pub spool: Option<PathBuf>,

    /// Replace a finished report
    #[arg(long)]
    pub force: bool,

    /// Throw an unfinished run's work away instead of going on with it
    #[arg(long)]
    pub restart: bool,
}

/// Runs the command.
pub fn run(args: &AnalyzeArgs) -> Result<u8> {
    signals::install();
    let dir = args.look.out.clone().ok_or_else(|| {
        Error::usage("no output directory is given").help("add '--out DIR': the report is written there")
    })?;
    let progress = Progress::new(args.run.report.progress);
    let storage = super::inputs(&args.run, &progress)?;
    let recipe = recipe(args, &*storage)?;
    let plan = Plan::new(&recipe, &storage)?;
    let spool = args.look.spool.as_deref();
    let study = Study::new(plan, &args.look.densities, lower::run(&args.run))?;
    let study = study.keeping(&lower::downloads_in(spool, &args.run));
    if let Some(spool) = spool.filter(|dir| study.schedule.spool.is_some() && !storage.is_dir(dir)) {
        return Err(Error::input("there is no such directory for --spool").at(spool).help("create it"));
    }
    if let Some(text) = downloads(&study, spool.unwrap_or(&dir), args.run.cache.dir.is_some(), &*storage)? {
        progress.warn(&text);
    }
    let output = OutputOptions { dir, force: args.look.force, restart: args.look.restart, ..OutputOptions::default() };
    let report = tiesmith::analyze(&study, &output, &storage, &progress)?;
    for warning in &report.analysis.warnings {
        progress.warn(warning);
    }
    drop(progress);
    if args.run.report.json {
        return print_json(&report);
    }
    print(&render(&report))
}

/// What is worth knowing of what is downloaded and needed again, before it begins: kept in `dir`, or in a cache.
fn downloads(study: &Study, dir: &Path, cached: bool, storage: &dyn Storage) -> Result<Option<String>> {
    let again = study.schedule.downloaded_again();
    if again > 0 && !cached {
        return Ok(Some(format!(
            "{} are downloaded twice: with --cache DIR --cache-size {}GB they are kept for the second time",
            human::bytes(again),
            again.div_ceil(1_000_000_000)
        )));
    }
    let Some(spool) = &study.schedule.spool else { return Ok(None) };
    let mut text = format!(
        "at most about {} that are downloaded are kept on the disk until the end (--spool DIR says where)",
        human::bytes(spool.bytes)
    );
    let room = spool_room(dir, (dir, 0), storage)?;
    if room < spool.bytes {
        text += &format!(", where there is room for {}: the rest is downloaded twice", human::bytes(room));
    }
    Ok(Some(text))
}

/// What is looked at, as a merge with `ties`.
fn recipe(args: &AnalyzeArgs, storage: &dyn Storage) -> Result<Recipe> {
    let (inputs, look) = (&args.inputs, &args.look);
    let mut recipe = match &args.recipe {
        Some(file) => jobs::family(file, args.document.as_deref(), storage)?,
        None => Recipe { base: inputs.base.clone(), models: inputs.models.clone(), ..Recipe::default() },
    };
    if recipe.models.is_empty() {
        return Err(Error::usage("nothing to analyze: no --model is given").help(
            "name the base and the fine-tuned models, as in 'tiesmith analyze --base BASE --model A --model B --out DIR', \
             or a recipe file",
        ));
    }
    recipe.scope = look.scope.unwrap_or(recipe.scope);
    recipe.threshold = look.threshold.unwrap_or(recipe.threshold);
    recipe.seed = look.seed.unwrap_or(recipe.seed);
    recipe.include = inputs.include.clone();
    recipe.exclude = inputs.exclude.clone();
    recipe.missing = inputs.missing;
    recipe.non_finite = inputs.non_finite;
    match look.density.map(Value::Number) {
        // Beside a model that has its own, as in a merge.
        Some(density) if args.recipe.is_none() => drop(recipe.params.insert("density".into(), density.into())),
        Some(density) => recipe.set_everywhere("density", density),
        None => {}
    }
    Ok(recipe)
}

/// What was found, for people.
fn render(report: &AnalysisReport) -> String {
    let analysis = &report.analysis;
    let mut text = String::new();
    let models = human::plural(analysis.models.len() as u64, "model");
    let tensors = human::plural(report.tensors, "tensor");
    let parameters = human::count(analysis.overall.elements);
    human::line(&mut text, "analyzed", &format!("{models}, {tensors}, {parameters} parameters"));
    let out = printable(&report.out);
    human::line(&mut text, "report", &format!("{out}/report.html, report.json and {} figures", report.files.len() - 2));
    if report.resumed {
        human::line(&mut text, "resumed", &format!("{} taken over", human::plural(report.tensors_reused, "tensor")));
    }
    human::line(&mut text, "read", &human::bytes(report.bytes_read));
    human::line(&mut text, "time", &human::duration(report.wall_seconds));
    if let Some(bytes) = report.peak_memory_bytes {
        human::line(&mut text, "peak memory", &human::bytes(bytes));
    }
    if analysis.models.len() > 1 {
        let chosen = analysis.chosen().conflict_fraction.unwrap_or(0.0);
        let chance = analysis.chance_of_conflict().unwrap_or(0.0);
        let conflicts =
            format!("{} of the parameters, {} if signs were drawn", human::percent(chosen), human::percent(chance));
        human::line(&mut text, "sign conflicts", &conflicts);
    }
    text.push_str(&models_table(analysis));
    text.push_str(&densities_table(analysis));
    if analysis.models.len() > 1 {
        text.push_str(&sizes_table(analysis));
        text.push_str(&layers_table(analysis));
    }
    text
}

/// A share with its bar, `whole` being a full one.
fn with_bar(share: Option<f64>, whole: f64) -> [String; 2] {
    match share {
        Some(share) => [human::share(share), bar(share / whole, BAR)],
        None => ["–".into(), String::new()],
    }
}

fn models_table(analysis: &Analysis) -> String {
    let two = analysis.models.len() > 1;
    let mut table = Table::new("  ", "lrlrlrl");
    let heads = ["model", "kept", "", "of norm", "", if two { "survives" } else { "" }, ""];
    table.row(heads);
    let at = analysis.chosen();
    for (model, name) in analysis.models.iter().enumerate().take(MODELS) {
        let mut row = vec![printable(name)];
        row.extend(with_bar(at.kept_fraction[model], 1.0));
        row.extend(with_bar(at.norm_kept[model], 1.0));
        if two {
            row.extend(with_bar(analysis.overall.survival[model].of_kept, 1.0));
        }
        table.row(row);
    }
    let more = analysis.models.len().saturating_sub(MODELS);
    let more = if more > 0 { format!("  and {more} more\n") } else { String::new() };
    format!("\nModels, trimmed\n{}{more}", table.render())
}

fn densities_table(analysis: &Analysis) -> String {
    let two = analysis.models.len() > 1;
    let mut table = Table::new("  ", "rrlrl");
    table.row(["density", "of norm", "", if two { "conflict" } else { "" }, ""]);
    let most = analysis.overall.densities.iter().filter_map(|at| at.conflict_fraction).fold(0.0, f64::max);
    for (density, at) in analysis.settings.densities.iter().zip(&analysis.overall.densities) {
        let norms: Vec<f64> = at.norm_kept.iter().flatten().copied().collect();
        let norm = (!norms.is_empty()).then(|| norms.iter().sum::<f64>() / norms.len() as f64);
        let mut row = vec![density.map_or("planned".into(), human::percent)];
        row.extend(with_bar(norm, 1.0));
        if two {
            row.extend(with_bar(at.conflict_fraction, most.max(f64::MIN_POSITIVE)));
        }
        table.row(row);
    }
    format!("\nWhat each density keeps, mean over the models\n{}", table.render())
}

fn sizes_table(analysis: &Analysis) -> String {
    let sizes = analysis.conflicts_by_size();
    let mean = |rates: &[f64]| rates.iter().sum::<f64>() / rates.len() as f64;
    let most = sizes.iter().map(|(_, rates)| mean(rates)).fold(0.0, f64::max);
    let mut table = Table::new("  ", "rrl");
    table.row(["models", "conflict", ""]);
    let step = sizes.len().div_ceil(SIZES).max(1);
    let shown = sizes.iter().enumerate().filter(|(at, _)| (sizes.len() - 1 - at).is_multiple_of(step));
    for (_, (size, rates)) in shown {
        let [share, bar] = with_bar(Some(mean(rates)), most.max(f64::MIN_POSITIVE));
        table.row([size.to_string(), share, bar]);
    }
    format!("\nConflicts by number of models merged\n{}", table.render())
}

fn layers_table(analysis: &Analysis) -> String {
    if analysis.layers.len() < 2 {
        return String::new();
    }
    let lines = analysis.layers.iter().map(|group| (&group.name, Line::of(&group.measured, analysis.settings.chosen)));
    let mut lines: Vec<(&String, Line)> = lines.collect();
    lines.sort_by(|a, b| b.1.conflicts.unwrap_or(0.0).total_cmp(&a.1.conflicts.unwrap_or(0.0)));
    let most = lines.iter().filter_map(|(_, line)| line.conflicts).fold(f64::MIN_POSITIVE, f64::max);
    let mut table = Table::new("  ", "lrlr");
    table.row(["layer", "conflict", "", "of norm"]);
    for (name, line) in lines.iter().take(LAYERS) {
        let [share, bar] = with_bar(line.conflicts, most);
        table.row([printable(name), share, bar, line.norm_share.map_or("–".into(), human::share)]);
    }
    format!("\nLayers with the most conflicts\n{}", table.render())
}
