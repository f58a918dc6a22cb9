//! What can be asked: every command, option and default, with the help that teaches them.
//!
//! Names of methods and words of method parameters are taken from the registry of methods, so that help, validation
//! and shell completions cannot disagree with it.

mod grid;
mod parts;
mod rules;
mod words;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use tiesmith::{
    Float, IoMode, METHODS, Missing, ModelInput, NonFinite, Overflow, ParamKind, Scope, ThresholdKind, TrimTies,
};

use super::analyze::AnalyzeArgs;
use super::make::{EarlierArgs, PlaceArgs};
use super::parse;
use super::perturb::PerturbArgs;
use super::statistics::StatisticsArgs;
use super::verify::VerifyArgs;

use words::{dtypes, io_modes};

pub use grid::SweepArgs;
pub use parts::{CacheArgs, FinishArgs, PlanArgs, ReportArgs, ResourceArgs, RunPartArgs, SlurmArgs};
pub use rules::{RuleArgs, ThresholdArgs};

/// Merge fine-tuned models that do not fit in memory
///
/// Checkpoints are streamed through a fixed amount of memory, whatever their size. Output bytes depend on the recipe
/// and the inputs alone: not on threads, memory or chunking.
#[derive(Debug, Parser)]
#[command(name = "tiesmith", version, subcommand_required = true, args_override_self = true, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
A checkpoint (CKPT) is a directory of .safetensors files with or without an index, one .safetensors file, an \
.index.json file, the same of PyTorch (.bin, .pt, .pth), a packed task vector (.tvz), an https:// address, or a Hub id (org/name[@revision]): from the local Hugging Face cache, or read over the network. MODEL+ADAPTER is a \
checkpoint with a PEFT adapter (LoRA or (IA)3) on it; an adapter alone as a --model is one on --base.

Examples:
  tiesmith plan  --base llama --model chat --model code
  tiesmith merge --base llama --model chat --model code --out merged
  tiesmith diff merged elsewhere/merged";

const MERGE_EXAMPLES: &str = "\
Examples:
  The paper's recipe: keep 20% of each task vector, elect signs, average what agrees
    tiesmith merge --base llama --model chat --model code --out merged
  Favour one model, keep more of another
    tiesmith merge --base llama --model chat,weight=2 --model code,density=40% --out merged
  As mergekit trims: one threshold per tensor
    tiesmith merge --base llama --model chat --model code --scope tensor --out merged
  What a recipe file says, in more memory
    tiesmith merge recipe.yml --memory 8GiB --out merged
  Merge adapters of one base: a directory with adapter_config.json is a model on --base
    tiesmith merge --base llama --model lora-chat --model lora-code --out merged
  Merge adapters with each other, into an adapter of rank 16
    tiesmith merge --model lora-chat --model lora-code --rank 16 --out lora-merged
  Make a finished output again, bit for bit
    tiesmith merge merged/tiesmith.json --out again
  Average three fine-tunes, no base needed
    tiesmith merge --method linear --model a --model b --model c --out soup
  Merge the attention only, in 1 GiB of memory
    tiesmith merge --base llama --model chat --model code --include '*attn*' --memory 1GiB --out m";

const SWEEP_EXAMPLES: &str = "\
Examples:
  The paper's search: three densities, lambda from 0.8 to 3.0 by 0.1
    tiesmith sweep --base llama --model chat --model code --density 0.1,0.2,0.3 --lambda 0.8:3.0:0.1 --out grid
  Every pair of models, by two methods
    tiesmith sweep --base llama --model a --model b --model c --subset pairs --method ties,task_arithmetic --out grid";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Merge models into a new checkpoint
    #[command(after_help = MERGE_EXAMPLES)]
    Merge(Box<MergeArgs>),
    /// Show what a merge will read, hold in memory and write, and check its inputs
    ///
    /// Takes the arguments of 'merge'. Only headers are read, and nothing is written but the plan itself, with '--save'.
    #[command(after_help = "Example:\n  tiesmith plan --base llama --model chat --model code --memory 1GiB")]
    Plan(Box<PlanArgs>),
    /// Show how models would get in each other's way, in a report with figures; no model is written
    ///
    /// Measures, per tensor, kind of layer, layer and overall: what the trim keeps at several densities, where signs
    /// conflict and how that grows with the number of models, how alike the task vectors are, and what of each model a
    /// merge would hold. Writes report.html, report.json and figures as SVG. Reads inputs twice, in bounded memory; the same
    /// command goes on with an interrupted run.
    #[command(after_help = super::analyze::EXAMPLES)]
    Analyze(Box<AnalyzeArgs>),
    /// Flip signs of a fine-tune's changes at random: how much do they matter? (the TIES paper's Figure 7)
    ///
    /// Writes a checkpoint: base plus the task vector, in which the sign of each of the largest (or smallest) entries is
    /// flipped with the probability given. Everything else is as in a merge of one model.
    #[command(after_help = super::perturb::EXAMPLES)]
    Perturb(Box<PerturbArgs>),
    /// Do one part of a merge that was planned with 'plan --save', on any of several machines
    ///
    /// A part is a number of whole output shards. Parts may run at once or one after the other, on machines that share
    /// the inputs' and the output's file system; what is done is not done again. 'finish' publishes the output.
    #[command(after_help = parts::RUN_EXAMPLES)]
    Run(RunPartArgs),
    /// Publish the output of a merge whose parts are all done
    #[command(after_help = "Example:\n  tiesmith finish job.plan")]
    Finish(FinishArgs),
    /// Print a script that submits a planned merge to Slurm, in parts
    #[command(after_help = parts::SLURM_EXAMPLES)]
    Slurm(SlurmArgs),
    /// Show what is in a checkpoint
    #[command(after_help = "Examples:\n  tiesmith inspect llama\n  tiesmith inspect merged --stats")]
    Inspect(InspectArgs),
    /// Compare two checkpoints tensor by tensor; exit code 1 if they differ
    #[command(after_help = "Examples:\n  tiesmith diff a b\n  tiesmith diff a b --max-ulp 1")]
    Diff(DiffArgs),
    /// Check a finished output against its manifest; exit code 1 if something is damaged
    ///
    /// Every file that the manifest lists is read and hashed again. In a damaged shard, damaged tensors are named.
    #[command(
        after_help = "Examples:\n  tiesmith verify merged\n  tiesmith verify merged --json\n  tiesmith verify merged --repair"
    )]
    Verify(VerifyArgs),
    /// Merge models in many ways from shared reads: a grid of lambda, density, methods and subsets of models
    ///
    /// Each output is what 'merge' gives with the same options, bit for bit, in a folder of its own; sweep.md and
    /// sweep.json list them. The same command goes on after an interruption.
    #[command(
        after_help = SWEEP_EXAMPLES,
        mut_arg("out", |arg| {
            let help = "Directory of the outputs, which have a folder each, and of their table";
            arg.help(help).long_help(help)
        }),
        mut_arg("parts", |arg| arg.hide(true)),
        mut_arg("work", |arg| arg.hide(true)),
    )]
    Sweep(Box<SweepArgs>),
    /// Pack a checkpoint into a file of what differs from its base, trimmed and compressed
    ///
    /// The file stands for the (trimmed) checkpoint wherever one is asked for, as long as the base is there.
    #[command(after_help = super::pack::EXAMPLES)]
    Pack(PackArgs),
    /// Write what is packed in a file as a checkpoint, bit for bit
    ///
    /// Configuration and tokenizer are the base's. The same command goes on after an interruption.
    #[command(after_help = "Example:\n  tiesmith unpack chat.tvz --base llama --out chat-trimmed")]
    Unpack(UnpackArgs),
    /// List the merge methods, their parameters, defaults and formulas
    Methods(MethodsArgs),
    /// Print a completion script for a shell
    #[command(after_help = "Example:\n  tiesmith completions bash > /etc/bash_completion.d/tiesmith")]
    Completions(CompletionsArgs),
    /// Print the manual pages
    #[command(after_help = "Examples:\n  tiesmith man | man -l -\n  tiesmith man --out man/man1")]
    Man(ManArgs),
}

impl Cli {
    /// Parses `argv`, and notes which options of a merge it holds.
    pub fn read(argv: &[OsString]) -> Result<Self, clap::Error> {
        let mut command = Self::command();
        let matches = command.try_get_matches_from_mut(argv)?;
        let mut cli = Self::from_arg_matches(&matches).map_err(|e| e.format(&mut command))?;
        match (&mut cli.command, matches.subcommand()) {
            (Command::Merge(args), Some((_, matches))) => args.given = given(matches),
            (Command::Plan(args), Some((_, matches))) => args.merge.given = given(matches),
            (Command::Sweep(args), Some((_, matches))) => args.given = given(matches),
            _ => {}
        }
        Ok(cli)
    }
}

fn given(matches: &ArgMatches) -> Vec<String> {
    let ids = matches.ids().map(clap::Id::as_str);
    // Groups of arguments have ids too, and no value of their own.
    let given = |id: &&str| matches.value_source(id) == Some(ValueSource::CommandLine);
    ids.filter(given).map(str::to_owned).collect()
}

/// Inputs and options of `merge` and `plan`.
#[derive(Debug, Args)]
pub struct MergeArgs {
    /// A recipe file in mergekit's language, instead of --base, --model and --method; other options override it
    ///
    /// See docs/recipes.md. It may hold several named documents, of which later ones use the outputs of earlier ones. The
    /// manifest of a finished output, DIR/tiesmith.json, is one too: its merge is done again and compared bit for bit.
    #[arg(value_name = "RECIPE.yml", conflicts_with_all = ["base", "models", "method"])]
    pub recipe: Option<String>,

    /// Options that were given, not filled in.
    #[arg(skip)]
    pub given: Vec<String>,

    #[command(flatten)]
    pub inputs: InputArgs,
    #[command(flatten)]
    pub statistics: StatisticsArgs,
    #[command(flatten)]
    pub method: MethodArgs,
    #[command(flatten)]
    pub trim: TrimArgs,
    #[command(flatten)]
    pub output: OutputArgs,
    /// Hash what is read of the inputs, so that an interrupted run can go on after they were copied or touched
    ///
    /// A run goes on by itself where the inputs are as they were by length, times and inode, or were moved. With this, copies
    /// will do too (a job that brings its inputs to a local disk on every attempt): what was read before is read again and
    /// compared. Given when a merge begins; it takes about a third more time where inputs are in memory, and little where the disk is the limit.
    #[arg(long, help_heading = "Output")]
    pub hash_inputs: bool,
    #[command(flatten)]
    pub run: RunArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Inputs")]
pub struct InputArgs {
    /// The checkpoint that the models were fine-tuned from
    ///
    /// Task vectors are differences to it, and its names, types, side files and tensors left out of the merge make up
    /// the output.
    #[arg(long, value_name = "CKPT")]
    pub base: Option<String>,

    /// A model to merge; give it once per model, in the order in which sums are to run
    ///
    /// Parameters of this model alone follow the path: weight (a number, default 1), density (see --density) and others
    /// that 'tiesmith methods' marks, as in 'chat,weight=0.5,density=30%'. Only ',name=value' at the end is split off: paths may contain commas.
    #[arg(long = "model", value_name = "CKPT[,weight=W][,density=D]", value_parser = parse::model)]
    pub models: Vec<ModelInput>,

    /// Merge only tensors whose name matches; repeatable [default: all]
    ///
    /// '*' matches any text, dots included. The other tensors are copied from the base.
    #[arg(long, value_name = "GLOB")]
    pub include: Vec<String>,

    /// Copy tensors whose name matches from the base instead of merging them; repeatable, wins over --include
    #[arg(long, value_name = "GLOB")]
    pub exclude: Vec<String>,

    /// What to do with a tensor that some model lacks or has in another shape
    #[arg(long, value_name = "RULE", default_value = "error", value_parser = choice(&[
        ("error", "stop, naming the tensor and the models", Missing::Error),
        ("base", "keep the base's tensor", Missing::Base),
        ("skip", "merge the models that have it", Missing::Skip),
    ]))]
    pub missing: Missing,

    /// What a NaN or an infinity in an input does
    #[arg(long, value_name = "RULE", default_value = "error", value_parser = choice(&[
        ("error", "stop, naming the model, the tensor and the index", NonFinite::Error),
        ("copy-base", "the element keeps the base's value", NonFinite::CopyBase),
        ("propagate", "the element of the output becomes NaN or infinite too", NonFinite::Propagate),
    ]))]
    pub non_finite: NonFinite,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Method")]
pub struct MethodArgs {
    /// How models are merged; 'tiesmith methods' explains each
    #[arg(long, value_name = "NAME", default_value = "ties", value_parser = methods())]
    pub method: String,

    /// Scale of the merged task vector [default: 1]
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true, value_parser = parse::number)]
    pub lambda: Option<f64>,

    #[command(flatten)]
    pub rules: RuleArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Trim")]
pub struct TrimArgs {
    /// Fraction of each task vector to keep, largest magnitudes first: 0.2 or 20% [default: 0.2]
    ///
    /// 0.2 is the paper's choice where there is no validation data. A model can have its own: '--model CKPT,density=D'.
    #[arg(long, value_name = "FRACTION", allow_negative_numbers = true, value_parser = parse::fraction)]
    pub density: Option<f64>,

    #[command(flatten)]
    pub thresholds: ThresholdArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Output")]
pub struct OutputArgs {
    /// Directory of the merged checkpoint, or an address to upload it to, such as s3://bucket/prefix
    #[arg(long, value_name = "DIR", long_help = parts::OUT)]
    pub out: Option<PathBuf>,

    /// Where an output is made that is uploaded; removed at the end [default: NAME.upload]
    #[arg(long, value_name = "DIR")]
    pub work: Option<PathBuf>,

    /// Where the documents of a recipe file are made that others use [default: DIR.parts]
    #[arg(long, value_name = "PARTS", requires = "recipe")]
    pub parts: Option<PathBuf>,

    /// Element type of the output [default: as the base stores it]
    ///
    /// Arithmetic is in float32 or better whatever the types.
    #[arg(long, value_name = "TYPE", value_parser = dtypes())]
    pub dtype: Option<Float>,

    /// Rank of the adapter that LoRA adapters are merged into [default: the largest of theirs, if they differ]
    ///
    /// For adapters as every --model, and no --base. The changes B A that they make are merged, and factors of this rank
    /// come as close as any can. Without it, adapters of equal ranks are merged factor by factor, as in the TIES paper.
    #[arg(long, value_name = "R", value_parser = parse::rank)]
    pub rank: Option<u64>,

    /// What a result too large for the output type does
    #[arg(long, value_name = "RULE", default_value = "error", value_parser = choice(&[
        ("error", "stop, naming the tensor", Overflow::Error),
        ("clamp", "becomes the largest finite value", Overflow::Clamp),
    ]))]
    pub overflow: Overflow,

    /// Largest output file, in tensor bytes, such as 5GB or 500MB
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse::size)]
    pub max_shard_size: u64,

    #[command(flatten)]
    pub earlier: EarlierArgs,

    /// Command for each finished shard, such as 'rclone copy {} remote:merged && rm {}'
    #[arg(long, value_name = "CMD", long_help = parts::ON_SHARD)]
    pub on_shard: Option<String>,

    /// Where to keep what is downloaded and needed again until the run ends, or 'none' [default: in --out]
    #[arg(long, value_name = "DIR", long_help = parts::SPOOL)]
    pub spool: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Run (changes no output byte)")]
pub struct RunArgs {
    /// Upper bound of peak resident memory, such as 2GiB or 500MB; 'tiesmith plan' shows the sum
    #[arg(long, value_name = "SIZE", default_value = "2GiB", value_parser = parse::size)]
    pub memory: u64,

    /// Worker threads [default: one per core]
    #[arg(long, value_name = "N", value_parser = parse::threads)]
    pub threads: Option<usize>,

    /// How inputs are read; results are identical
    #[arg(long, value_name = "MODE", default_value = "auto", value_parser = io_modes())]
    pub io: IoMode,

    #[command(flatten)]
    pub cache: CacheArgs,

    #[command(flatten)]
    pub report: ReportArgs,
}

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The checkpoint
    #[arg(value_name = "CKPT")]
    pub checkpoint: String,

    /// List every tensor
    #[arg(long)]
    pub tensors: bool,

    /// Read every float tensor: least, greatest, mean, deviation (with a bar), zeros, NaN and infinities of each
    #[arg(long)]
    pub stats: bool,

    #[command(flatten)]
    pub report: ReportArgs,
}

#[derive(Debug, Args)]
pub struct DiffArgs {
    /// The first checkpoint
    #[arg(value_name = "A")]
    pub a: String,

    /// The second checkpoint
    #[arg(value_name = "B")]
    pub b: String,

    /// Accept values whose absolute difference is at most X [default: bits must be equal]
    ///
    /// NaN equals NaN. With this or --max-ulp, float tensors of different types are compared by value.
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = parse::tolerance)]
    pub atol: Option<f64>,

    /// Accept values at most N units in the last place apart, in the stored type
    #[arg(long, value_name = "N", value_parser = parse::whole)]
    pub max_ulp: Option<u64>,

    #[command(flatten)]
    pub report: ReportArgs,
}

#[derive(Debug, Args)]
pub struct PackArgs {
    /// The checkpoint
    #[arg(value_name = "CKPT")]
    pub checkpoint: String,

    /// The checkpoint that it was fine-tuned from
    #[arg(long, value_name = "BASE")]
    pub base: String,

    /// The file to write; its name ends in .tvz
    #[arg(long, value_name = "FILE.tvz")]
    pub out: PathBuf,

    /// Fraction of the task vector to keep, largest magnitudes first: 0.2 or 20%; 1 keeps every bit that differs
    #[arg(long, value_name = "FRACTION", default_value = "0.2", value_parser = parse::fraction)]
    pub density: f64,

    #[command(flatten)]
    pub thresholds: ThresholdArgs,

    /// Seed of '--trim-ties sample'
    #[arg(long, value_name = "N", default_value = "0", value_parser = parse::whole)]
    pub seed: u64,

    /// Replace a file that is there, and unfinished work of other inputs or settings
    #[arg(long)]
    pub force: bool,

    #[command(flatten)]
    pub run: RunArgs,
}

#[derive(Debug, Args)]
pub struct UnpackArgs {
    /// The packed task vector
    #[arg(value_name = "FILE.tvz")]
    pub file: String,

    /// The checkpoint that it was packed against [default: the one that the file names]
    #[arg(long, value_name = "BASE")]
    pub base: Option<String>,

    #[command(flatten)]
    pub place: PlaceArgs,

    /// Largest output file, in tensor bytes, such as 5GB or 500MB
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse::size)]
    pub max_shard_size: u64,

    #[command(flatten)]
    pub run: RunArgs,
}

#[derive(Debug, Args)]
pub struct MethodsArgs {
    /// Print the list as one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_name = "SHELL")]
    pub shell: clap_complete::Shell,
}

#[derive(Debug, Args)]
pub struct ManArgs {
    /// Print the page of this command only
    #[arg(value_name = "COMMAND")]
    pub command: Option<String>,

    /// Write every page as a file of its own into this directory instead of printing
    #[arg(long, value_name = "DIR", conflicts_with = "command")]
    pub out: Option<PathBuf>,
}

/// A word per value: (word, help, value).
fn choice<T: Copy + Send + Sync + 'static>(
    values: &'static [(&'static str, &'static str, T)],
) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(values.iter().map(|(word, help, _)| PossibleValue::new(*word).help(*help)))
        .map(|word| values.iter().find(|(known, ..)| *known == word).expect("clap checked the word").2)
}

/// Where one threshold applies.
pub fn scopes() -> impl TypedValueParser<Value = Scope> {
    choice(&[
        ("model", "one per task vector over the whole model (the paper)", Scope::Model),
        ("tensor", "one per tensor (mergekit); inputs are read only once", Scope::Tensor),
    ])
}

/// How thresholds are found.
pub fn thresholds() -> impl TypedValueParser<Value = ThresholdKind> {
    choice(&[
        ("exact", "the true k-th largest magnitude", ThresholdKind::Exact),
        ("sketch", "an approximation with a certified interval, in less memory", ThresholdKind::Sketch),
    ])
}

fn tie_rules() -> impl TypedValueParser<Value = TrimTies> {
    choice(&[
        ("keep", "all are kept (the paper's code)", TrimTies::Keep),
        ("lowest", "those at the lowest positions fill up the count exactly", TrimTies::Lowest),
        ("sample", "an evenly spread seeded sample meets the count on average", TrimTies::Sample),
    ])
}

fn methods() -> PossibleValuesParser {
    METHODS.iter().map(|method| PossibleValue::new(method.name()).help(method.summary())).into()
}

/// The words of a method parameter.
fn words(param: &str) -> PossibleValuesParser {
    let mut words: Vec<&str> = Vec::new();
    for spec in METHODS.iter().flat_map(|method| method.params()).filter(|spec| spec.name == param) {
        if let ParamKind::Choice(choices) = spec.kind {
            words.extend(choices.iter().filter(|choice| !words.contains(choice)).collect::<Vec<_>>());
        }
    }
    PossibleValuesParser::new(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn defaults_named_in_help_are_those_of_the_methods() {
        let command = Cli::command();
        let merge = command.find_subcommand("merge").unwrap();
        let ties = METHODS.iter().find(|method| method.name() == "ties").unwrap();
        for spec in ties.params().iter().filter(|spec| !["weight", "rescale"].contains(&spec.name)) {
            let argument = merge.get_arguments().find(|a| a.get_id() == spec.name).expect(spec.name);
            let help = argument.get_help().unwrap().to_string();
            let default = match spec.kind {
                ParamKind::Number { default, .. } => default.to_string(),
                ParamKind::Choice(words) => words[0].to_string(),
            };
            assert!(help.contains(&format!("[default: {default}]")), "{}: {help}", spec.name);
        }
    }

    #[test]
    fn types_have_aliases() {
        for (word, float) in
            [("bfloat16", Float::BF16), ("bf16", Float::BF16), ("f16", Float::F16), ("fp32", Float::F32)]
        {
            let cli = Cli::try_parse_from(["tiesmith", "merge", "--dtype", word]).unwrap();
            let Command::Merge(args) = cli.command else { panic!() };
            assert_eq!(args.output.dtype, Some(float));
        }
    }
}
