//! From arguments to the library's terms: a recipe (what), a run (how) and an output (where).

use std::path::{Path, PathBuf};

use tiesmith::{
    Downloads, Error, METHODS, Method, OnShard, OutputOptions, Plan, Recipe, Result, Run, Schedule, Statistics, Value,
    is_object,
};

use super::args::{MergeArgs, RunArgs};
use super::make::EarlierArgs;

/// The recipe that `args` describe.
pub fn recipe(args: &MergeArgs, verb: &str) -> Result<Recipe> {
    let example = match verb {
        "merge" => "tiesmith merge --base BASE --model A --model B --out DIR",
        "sweep" => "tiesmith sweep --base BASE --model A --model B --lambda 0.8,1 --out DIR",
        _ => "tiesmith plan --base BASE --model A --model B",
    };
    if args.inputs.models.is_empty() {
        return Err(Error::usage("nothing to merge: no --model is given")
            .help(format!("name the base and the fine-tuned models, as in '{example}', or a recipe file")));
    }
    let mut recipe = Recipe {
        method: args.method.method.clone(),
        base: args.inputs.base.clone(),
        models: args.inputs.models.clone(),
        scope: args.trim.thresholds.scope,
        threshold: args.trim.thresholds.threshold,
        trim_ties: args.trim.thresholds.trim_ties,
        sign_from: args.method.rules.sign_from.clone(),
        seed: args.method.rules.seed,
        dtype: args.output.dtype,
        rank: args.output.rank,
        include: args.inputs.include.clone(),
        exclude: args.inputs.exclude.clone(),
        missing: args.inputs.missing,
        non_finite: args.inputs.non_finite,
        overflow: args.output.overflow,
        max_shard_bytes: args.output.max_shard_size,
        ..Recipe::default()
    };
    statistics(&mut recipe, Statistics::Fisher, &args.statistics.fisher)?;
    statistics(&mut recipe, Statistics::Gram, &args.statistics.gram)?;
    for (name, value) in method_params(args) {
        if recipe.params.insert(name.to_string(), value.into()).is_some() {
            return Err(Error::usage(format!("{name} is given twice")).help("use --param once for each parameter"));
        }
    }
    Ok(recipe)
}

/// Gives every model its checkpoint of `kind`, in order.
fn statistics(recipe: &mut Recipe, kind: Statistics, given: &[String]) -> Result<()> {
    if !given.is_empty() && given.len() != recipe.models.len() {
        let (name, models) = (kind.name(), recipe.models.len());
        return Err(Error::usage(format!("--{name} is given {} times, but there are {models} models", given.len()))
            .help(format!("give --{name} once per model, in the same order")));
    }
    for (model, given) in recipe.models.iter_mut().zip(given) {
        match kind {
            Statistics::Fisher => model.fisher = Some(given.clone()),
            Statistics::Gram => model.gram = Some(given.clone()),
        }
    }
    Ok(())
}

/// How the work is to be done.
pub fn run(args: &RunArgs) -> Run {
    Run::new(args.memory, args.threads.unwrap_or_else(cores))
}

/// The same, for a merge by `plan`: what it downloads and needs again is kept on the local disk, unless a cache does that.
pub fn schedule(plan: &Plan, args: &MergeArgs) -> Result<Schedule> {
    let run = run(&args.run);
    let schedule = match address(args) {
        Some(_) => Schedule::with_upload(plan, run)?,
        None => Schedule::with_spool(plan, run)?,
    };
    Ok(schedule.keeping(plan, &downloads(args)))
}

/// What becomes of what is downloaded and needed again.
pub fn downloads(args: &MergeArgs) -> Downloads {
    downloads_in(args.output.spool.as_deref(), &args.run)
}

/// The same with `spool` as the user gave it.
pub fn downloads_in(spool: Option<&Path>, run: &RunArgs) -> Downloads {
    match spool {
        None if run.cache.dir.is_some() => Downloads::Forgotten,
        None => Downloads::Beside,
        Some(dir) if dir.as_os_str() == "none" => Downloads::Forgotten,
        Some(dir) => Downloads::In(dir.to_owned()),
    }
}

/// The number of threads where none is given.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The address in an object store that the result is uploaded to, if it is.
pub fn address(args: &MergeArgs) -> Option<&Path> {
    args.output.out.as_deref().filter(|out| is_object(out))
}

/// The directory in which the result is made, if it is to be made.
pub fn out_dir(args: &MergeArgs) -> Option<PathBuf> {
    let out = args.output.out.as_ref()?;
    if !is_object(out) {
        return Some(out.clone());
    }
    let mut name = out.file_name().unwrap_or_default().to_os_string();
    name.push(".upload");
    Some(args.output.work.clone().unwrap_or_else(|| name.into()))
}

/// Where the result goes.
pub fn output(args: &MergeArgs) -> Result<OutputOptions> {
    let dir = out_dir(args).ok_or_else(|| {
        Error::usage("no output directory is given").help("add '--out DIR', or use 'tiesmith plan' to write nothing")
    })?;
    let on_shard = match (address(args), &args.output.on_shard) {
        (Some(_), _) if args.output.earlier.force => {
            return Err(Error::usage("--force replaces nothing in an object store")
                .help("remove what is there first, or use another --out"));
        }
        (Some(_), Some(_)) => {
            return Err(Error::usage("shards are uploaded to --out, so there are none for --on-shard")
                .help("leave it out, or give a directory for --out"));
        }
        (Some(address), None) => Some(OnShard::Upload(address.to_string_lossy().into_owned())),
        (None, _) if args.output.work.is_some() => {
            return Err(Error::usage("--work is where an output is made that is uploaded, and --out is a directory")
                .help("leave it out, or use an address such as s3://bucket/prefix for --out"));
        }
        (None, Some(command)) if is_object(Path::new(command)) => {
            return Err(Error::usage("--on-shard takes a command, and this is an address").help("use it for --out"));
        }
        (None, command) => command.clone().map(OnShard::Command),
    };
    let EarlierArgs { force, restart } = args.output.earlier;
    Ok(OutputOptions { dir, force, restart, hash_inputs: args.hash_inputs, on_shard })
}

/// What the command line says beside a recipe file goes before what the file says.
pub fn override_recipe(recipe: &mut Recipe, args: &MergeArgs) -> Result<()> {
    let given = |name: &str| args.given.iter().any(|id| id == name);
    let (trim, rules, output, inputs) = (&args.trim.thresholds, &args.method.rules, &args.output, &args.inputs);
    if given("scope") {
        recipe.scope = trim.scope;
    }
    if given("threshold") {
        recipe.threshold = trim.threshold;
    }
    if given("trim_ties") {
        recipe.trim_ties = trim.trim_ties;
    }
    if given("seed") {
        recipe.seed = rules.seed;
    }
    recipe.sign_from = rules.sign_from.clone();
    recipe.dtype = output.dtype.or(recipe.dtype);
    recipe.rank = output.rank.or(recipe.rank);
    recipe.include = inputs.include.clone();
    recipe.exclude = inputs.exclude.clone();
    recipe.missing = inputs.missing;
    recipe.non_finite = inputs.non_finite;
    recipe.overflow = output.overflow;
    recipe.max_shard_bytes = output.max_shard_size;
    statistics(recipe, Statistics::Fisher, &args.statistics.fisher)?;
    statistics(recipe, Statistics::Gram, &args.statistics.gram)?;
    for (name, value) in method_params(args) {
        if !recipe.method()?.params().iter().any(|spec| spec.name == name) {
            return Err(Error::usage(format!("the recipe's method {} has no parameter {name}", recipe.method)));
        }
        recipe.set_everywhere(name, value);
    }
    Ok(())
}

/// What is `given` of options about thresholds, where none of `methods` has any.
pub fn idle(given: &[String], methods: &[&str]) -> Vec<String> {
    let all: Vec<&dyn Method> = METHODS.iter().copied().filter(|method| methods.contains(&method.name())).collect();
    if all.iter().any(|method| method.trims() && !method.draws()) {
        return Vec::new();
    }
    let why = |method: &dyn Method| match method.draws() {
        true => format!("{} draws what it keeps", method.name()),
        false => format!("{} does not trim", method.name()),
    };
    let why = all.iter().map(|method| why(*method)).collect::<Vec<_>>().join(", ");
    let idle = [("scope", "scope"), ("threshold", "threshold"), ("trim_ties", "trim-ties")];
    let idle = idle.into_iter().filter(|(id, _)| given.iter().any(|given| given == id));
    idle.map(|(_, option)| format!("{why}: --{option} is ignored")).collect()
}

/// The parameters of the method that options set.
fn method_params(args: &MergeArgs) -> impl Iterator<Item = (&str, Value)> {
    let word = |word: &Option<String>| word.clone().map(Value::Word);
    let given = [
        ("lambda", args.method.lambda.map(Value::Number)),
        ("density", args.trim.density.map(Value::Number)),
        ("fisher_floor", args.statistics.fisher_floor.map(Value::Number)),
        ("alpha", args.statistics.alpha.map(Value::Number)),
        ("elect", word(&args.method.rules.elect)),
        ("combine", word(&args.method.rules.combine)),
        ("zero_sum", word(&args.method.rules.zero_sum)),
    ];
    let named = args.method.rules.params.iter().map(|(name, value)| (name.as_str(), value.clone()));
    given.into_iter().filter_map(|(name, value)| Some((name, value?))).chain(named)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::{Cli, Command};
    use clap::Parser;
    use tiesmith::{Float, Missing, Scope};

    fn args(line: &str) -> Box<MergeArgs> {
        let argv = ["tiesmith", "merge"].into_iter().chain(line.split_whitespace());
        match Cli::try_parse_from(argv).unwrap().command {
            Command::Merge(args) => args,
            _ => unreachable!(),
        }
    }

    #[test]
    fn defaults_are_the_default_recipe() {
        let lowered = recipe(&args("--base b --model m"), "merge").unwrap();
        let mut expected = Recipe { base: Some("b".into()), ..Recipe::default() };
        expected.models = vec![tiesmith::ModelInput { source: "m".into(), ..Default::default() }];
        assert_eq!(lowered, expected);
        assert_eq!(run(&args("--model m").run).memory_bytes, 2 << 30);
    }

    #[test]
    fn options_reach_the_recipe() {
        let args = args(
            "--base b --model m,weight=2 --model n --density 30% --lambda -0.5 --elect count --zero-sum majority \
             --scope tensor --missing skip --dtype bf16 --max-shard-size 1GB --threads 3 --out o --force",
        );
        let lowered = recipe(&args, "merge").unwrap();
        assert_eq!(lowered.params["density"], Value::Number(0.3));
        assert_eq!(lowered.params["lambda"], Value::Number(-0.5));
        assert_eq!(lowered.params["elect"], Value::Word("count".into()));
        assert_eq!(lowered.params["zero_sum"], Value::Word("majority".into()));
        assert!(!lowered.params.contains_key("combine"));
        assert_eq!((lowered.scope, lowered.missing), (Scope::Tensor, Missing::Skip));
        assert_eq!((lowered.dtype, lowered.max_shard_bytes), (Some(Float::BF16), 1_000_000_000));
        assert_eq!(lowered.models[0].params["weight"], Value::Number(2.0));
        assert_eq!(run(&args.run).threads, 3);
        let output = output(&args).unwrap();
        assert!(output.force && !output.restart);
    }

    #[test]
    fn options_without_a_meaning_for_the_method_are_named() {
        let given = ["scope", "seed", "trim_ties"].map(String::from);
        assert!(idle(&given, &["linear", "ties"]).is_empty());
        let warnings = idle(&given, &["linear", "dare_ties"]);
        let why = "linear does not trim, dare_ties draws what it keeps";
        assert_eq!(warnings, [format!("{why}: --scope is ignored"), format!("{why}: --trim-ties is ignored")]);
    }

    #[test]
    fn what_is_missing_or_unsupported_is_said() {
        let message = |line: &str| recipe(&args(line), "merge").unwrap_err().to_string();
        assert!(message("").contains("no --model is given; name the base"), "{}", message(""));
        assert!(output(&args("--model m")).unwrap_err().to_string().contains("--out DIR"));
    }
}
