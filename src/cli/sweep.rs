//! `tiesmith sweep`: a grid of parameters, methods and subsets of models, merged from shared reads.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::str::FromStr;

use tiesmith::{Error, METHODS, Method, Plan, Recipe, Result, SweepOptions, SweepReport, Value, Variant, printable};

use super::args::{MergeArgs, MethodArgs, SweepArgs, TrimArgs};
use super::progress::Progress;
use super::{human, jobs, lower, print, print_json, signals};

/// Most outputs of one sweep.
const MAX_OUTPUTS: usize = 10_000;

/// Runs the command.
pub fn run(args: SweepArgs) -> Result<u8> {
    let progress = Progress::new(args.run.report.progress);
    let storage = super::inputs(&args.run, &progress)?;
    signals::install();
    let grid = Grid {
        methods: args.method.clone(),
        subsets: args.subset.clone(),
        densities: args.density.iter().flat_map(|list| list.0.clone()).collect(),
        lambdas: args.lambda.iter().flat_map(|list| list.0.clone()).collect(),
    };
    if args.output.parts.is_some() {
        return Err(Error::usage("--parts has no meaning in a sweep: its recipe file has one document"));
    }
    let packed = args.packed;
    let args = merge_args(args);
    if lower::address(&args).is_some() || args.output.work.is_some() {
        return Err(Error::usage("the outputs of a sweep go to a directory: give one for --out, and no --work"));
    }
    let options = SweepOptions { output: lower::output(&args)?, packed, downloads: lower::downloads(&args) };
    let mut jobs = jobs::read(&args, "sweep", &*storage)?;
    let (Some(job), true) = (jobs.pop(), jobs.is_empty()) else {
        return Err(Error::usage("a sweep takes a recipe file of one document")
            .help("merge the others first, and name their outputs as models"));
    };
    let points = grid.points(&job.recipe, args.recipe.is_some())?;
    let mut recipes = vec![union(&job.recipe, &points)?];
    recipes.extend(points.iter().map(|point| point.recipe.clone()));
    let mut plans = Plan::all(&recipes, &storage)?.into_iter();
    let union = plans.next().expect("there is a plan per recipe");
    let mut warnings: BTreeSet<String> = job.warnings.into_iter().collect();
    let methods: BTreeSet<&str> = points.iter().map(|point| &*point.recipe.method).collect();
    warnings.extend(lower::idle(&args.given, &methods.into_iter().collect::<Vec<_>>()));
    let variants: Vec<Variant> = points
        .into_iter()
        .zip(plans)
        .map(|(Point { name, settings, .. }, plan)| Variant { name, settings, plan })
        .collect();
    let report = tiesmith::sweep(union, &variants, lower::run(&args.run), &options, &storage, &progress)?;
    warnings.extend(
        report
            .outputs
            .iter()
            .filter_map(|entry| entry.report.as_ref())
            .flat_map(|report| report.warnings.iter().cloned()),
    );
    for warning in &warnings {
        tiesmith::Observer::warn(&progress, warning);
    }
    drop(progress);
    if args.run.report.json {
        return print_json(&report);
    }
    print(&summary(&report))
}

/// The same request as one of `merge`, without what the grid says.
fn merge_args(args: SweepArgs) -> MergeArgs {
    let SweepArgs { recipe, given, inputs, statistics, rules, thresholds, .. } = args;
    let method = args.method.into_iter().next().unwrap_or_else(|| Recipe::default().method);
    MergeArgs {
        recipe,
        given,
        inputs,
        statistics,
        method: MethodArgs { method, lambda: None, rules },
        trim: TrimArgs { density: None, thresholds },
        output: args.output,
        hash_inputs: false,
        run: args.run,
    }
}

/// Values of a parameter, as they are written: names of outputs show them so.
#[derive(Debug, Clone, PartialEq)]
pub struct Values(Vec<(String, f64)>);

/// `0.8,0.9,1` and `0.8:3.0:0.1`, which may be mixed.
pub fn numbers(text: &str) -> Result<Values, String> {
    list(text, &super::parse::number)
}

/// The same for fractions, which may be in percent.
pub fn fractions(text: &str) -> Result<Values, String> {
    list(text, &super::parse::fraction)
}

fn list(text: &str, parse: &dyn Fn(&str) -> Result<f64, String>) -> Result<Values, String> {
    let mut values = Vec::new();
    for part in text.split(',') {
        match part.split(':').collect::<Vec<_>>()[..] {
            [one] => values.push((one.trim().to_owned(), parse(one)?)),
            [first, last, step] => {
                for one in range(first, last, step)? {
                    let value = parse(&one)?;
                    values.push((one, value));
                }
            }
            _ => return Err("a list is like 0.8,0.9,1 and a range like 0.8:3.0:0.1 (first:last:step)".into()),
        }
    }
    Ok(Values(values))
}

/// The values of a range, in decimal arithmetic: 0.8:1:0.1 is 0.8, 0.9, 1.0 and not 0.9000000000000001.
fn range(first: &str, last: &str, step: &str) -> Result<Vec<String>, String> {
    let parts = [first.trim(), last.trim(), step.trim()];
    let digits = |text: &str| text.split_once('.').map_or(0, |(_, fraction)| fraction.len());
    let places = parts.iter().map(|part| digits(part)).max().unwrap_or(0);
    let scaled = |text: &str| -> Result<i64, String> {
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        let plain = !whole.is_empty() && fraction.bytes().all(|b| b.is_ascii_digit()) && places <= 9;
        let digits = format!("{whole}{fraction}{}", "0".repeat(places - fraction.len().min(places)));
        let number = i64::from_str(&digits).ok().filter(|_| plain);
        number.ok_or_else(|| format!("'{text}' is no decimal number as ranges take it"))
    };
    let [first, last, step] = [scaled(parts[0])?, scaled(parts[1])?, scaled(parts[2])?];
    if step <= 0 || last < first {
        return Err("a range goes up from its first value to its last: first:last:step".into());
    }
    if (last - first) / step >= MAX_OUTPUTS as i64 {
        return Err(format!("a range of more than {MAX_OUTPUTS} values"));
    }
    let text = |value: i64| {
        let (sign, digits) = (if value < 0 { "-" } else { "" }, value.unsigned_abs());
        match places {
            0 => format!("{sign}{digits}"),
            _ => {
                let unit = 10u64.pow(places as u32);
                format!("{sign}{}.{:0places$}", digits / unit, digits % unit)
            }
        }
    };
    Ok((0..=(last - first) / step).map(|i| text(first + i * step)).collect())
}

/// Which models are merged.
#[derive(Debug, Clone, PartialEq)]
pub enum Subset {
    /// All of them.
    All,
    /// Every two.
    Pairs,
    /// All but one, for each.
    LeaveOneOut,
    /// The first two, the first three, and so on.
    Sizes,
    /// These, by number.
    These(Vec<usize>),
}

/// A word, or numbers of models such as `1+3`.
pub fn subset(text: &str) -> Result<Subset, String> {
    Ok(match text.trim() {
        "all" => Subset::All,
        "pairs" => Subset::Pairs,
        "leave-one-out" => Subset::LeaveOneOut,
        "sizes" => Subset::Sizes,
        other => {
            let numbers = other.split('+').map(|number| number.trim().parse().ok().filter(|&n: &usize| n > 0));
            let numbers: Option<Vec<usize>> = numbers.collect();
            let unique = |numbers: &Vec<usize>| numbers.iter().collect::<BTreeSet<_>>().len() == numbers.len();
            Subset::These(
                numbers.filter(unique).ok_or(
                    "a subset is all, pairs, leave-one-out, sizes, or different numbers of models such as 1+3",
                )?,
            )
        }
    })
}

impl Subset {
    /// The sets of models (counted from 0) that it means among `count`.
    fn sets(&self, count: usize) -> Result<Vec<Vec<usize>>> {
        Ok(match self {
            Self::All => vec![(0..count).collect()],
            Self::Pairs => (0..count).flat_map(|a| (a + 1..count).map(move |b| vec![a, b])).collect(),
            Self::LeaveOneOut => (0..count).map(|out| (0..count).filter(|&m| m != out).collect()).collect(),
            Self::Sizes => (2..=count).map(|size| (0..size).collect()).collect(),
            Self::These(numbers) => match numbers.iter().find(|&&number| number > count) {
                Some(number) => {
                    return Err(Error::usage(format!("--subset: there is no model {number}, only {count}")));
                }
                None => vec![numbers.iter().map(|number| number - 1).collect()],
            },
        })
    }
}

/// What is varied.
struct Grid {
    methods: Vec<String>,
    subsets: Vec<Subset>,
    densities: Vec<(String, f64)>,
    lambdas: Vec<(String, f64)>,
}

/// An output to be.
struct Point {
    name: String,
    settings: Vec<(String, String)>,
    recipe: Recipe,
}

impl Grid {
    /// The outputs: methods, subsets, densities and lambdas, the last varying fastest.
    fn points(&self, base: &Recipe, from_file: bool) -> Result<Vec<Point>> {
        let mut sets = Vec::new();
        for subset in &self.subsets {
            sets.extend(subset.sets(base.models.len())?);
        }
        let whole = base.slices.is_empty() && base.modules.is_empty();
        if !sets.is_empty() && !whole {
            return Err(Error::usage("--subset cannot be used with slices or modules: they name their models"));
        }
        sets.retain(|set| !set.is_empty());
        let mut seen = BTreeSet::new();
        sets.retain(|set| seen.insert(set.clone()));
        let sets = if self.subsets.is_empty() { vec![(0..base.models.len()).collect()] } else { sets };
        let methods = if self.methods.is_empty() { vec![base.method.clone()] } else { self.methods.clone() };
        let mut points: Vec<Point> = Vec::new();
        for name in &methods {
            let method = METHODS.iter().copied().find(|method| method.name() == name).expect("clap knows the methods");
            for set in &sets {
                for density in self.values(method, "density", &self.densities) {
                    for lambda in self.values(method, "lambda", &self.lambdas) {
                        let mut point = self.point(base, name, set);
                        for (key, value) in [("density", density), ("lambda", lambda)] {
                            let Some((text, number)) = value else { continue };
                            match from_file {
                                true => point.recipe.set_everywhere(key, Value::Number(*number)),
                                false => drop(point.recipe.params.insert(key.into(), Value::Number(*number).into())),
                            }
                            point.settings.push((key.into(), text.clone()));
                        }
                        points.push(point);
                        if points.len() > MAX_OUTPUTS {
                            return Err(Error::usage(format!("a sweep of more than {MAX_OUTPUTS} outputs")));
                        }
                    }
                }
            }
        }
        name_points(&mut points)?;
        Ok(points)
    }

    /// The values of a parameter to go through: one, none, if the method does not have it.
    fn values<'a>(
        &self,
        method: &dyn Method,
        name: &str,
        values: &'a [(String, f64)],
    ) -> Vec<Option<&'a (String, f64)>> {
        let has = method.params().iter().any(|spec| spec.name == name);
        if has && !values.is_empty() { values.iter().map(Some).collect() } else { vec![None] }
    }

    fn point(&self, base: &Recipe, method: &str, set: &[usize]) -> Point {
        let mut recipe = Recipe { method: method.to_owned(), ..base.clone() };
        let mut settings = Vec::new();
        if self.methods.len() > 1 {
            settings.push(("method".to_owned(), method.to_owned()));
        }
        if !self.subsets.is_empty() {
            recipe.models = set.iter().map(|&model| base.models[model].clone()).collect();
            let numbers: Vec<String> = set.iter().map(|model| (model + 1).to_string()).collect();
            settings.push(("models".to_owned(), numbers.join("+")));
        }
        Point { name: String::new(), settings, recipe }
    }
}

/// Names folders after what is special about each output.
fn name_points(points: &mut [Point]) -> Result<()> {
    let mut names = BTreeSet::new();
    for point in points {
        let part = |(key, value): &(String, String)| match &**key {
            "method" => value.clone(),
            _ => format!("{key}-{}", value.replace(['%', ' '], "")),
        };
        point.name = point.settings.iter().map(part).collect::<Vec<_>>().join("_");
        if point.name.is_empty() {
            point.name = "merged".into();
        }
        if !names.insert(point.name.clone()) {
            return Err(Error::usage(format!("two outputs would be called {}", printable(&point.name)))
                .help("give each value of --lambda, --density, --method and --subset once"));
        }
    }
    Ok(())
}

/// The recipe that loads what all outputs need: with all models, and thresholds where one of them has any.
fn union(base: &Recipe, points: &[Point]) -> Result<Recipe> {
    // What decides is whether magnitudes are counted: then everything else fits in too.
    let selects = |point: &&Point| -> bool {
        let method = METHODS.iter().find(|method| method.name() == point.recipe.method);
        method.is_some_and(|method| method.trims() && !method.draws() && method.models() == (1, usize::MAX))
    };
    let trimmed = |point: &&Point| {
        let density = point.recipe.params.get("density");
        selects(point) && density.is_none_or(|density| *density != Value::Number(1.0))
    };
    let first = points.iter().find(trimmed).or(points.iter().find(selects)).or(points.first());
    let point = first.ok_or_else(|| Error::usage("nothing to sweep over"))?;
    Ok(Recipe { models: base.models.clone(), ..point.recipe.clone() })
}

fn summary(report: &SweepReport) -> String {
    let mut text = String::new();
    let mut line = |label: &str, value: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{label:<15} {value}");
    };
    let found = report.outputs.iter().filter(|entry| entry.found).count();
    let shared = report.outputs.iter().filter(|entry| entry.shared).count();
    let made = report.outputs.len() - found;
    line("swept into", printable(&report.out));
    line("outputs", format!("{}, listed in sweep.md and sweep.json", report.outputs.len()));
    if found > 0 {
        line("there already", found.to_string());
    }
    if made > shared {
        line(
            "by themselves",
            format!("{} (their method looks at whole tensors, or they have other tensors)", made - shared),
        );
    }
    line("written", human::bytes(report.bytes_written));
    let separate = human::bytes(report.separate_bytes_read);
    line("read", format!("{}; separate merges would read {separate}", human::bytes(report.bytes_read)));
    line("time", human::duration(report.wall_seconds));
    if let Some(bytes) = report.peak_memory_bytes {
        line("peak memory", human::bytes(bytes));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(values: &Values) -> Vec<&str> {
        values.0.iter().map(|(text, _)| text.as_str()).collect()
    }

    #[test]
    fn ranges_are_decimal() {
        let values = numbers("0.8:1.1:0.1,2").unwrap();
        assert_eq!(texts(&values), ["0.8", "0.9", "1.0", "1.1", "2"]);
        assert_eq!(values.0[1].1, 0.9);
        assert_eq!(numbers("0.8:3.0:0.1").unwrap().0.len(), 23);
        assert_eq!(texts(&numbers("-1:1:1").unwrap()), ["-1", "0", "1"]);
        assert_eq!(texts(&numbers("-0.5:0.5:0.25").unwrap()), ["-0.50", "-0.25", "0.00", "0.25", "0.50"]);
        assert_eq!(fractions("10%,0.2").unwrap().0[0].1, 0.1);
        for wrong in ["", "1,", "1:2", "2:1:0.5", "1:2:0", "1:2:x", "1:2:3:4", "0:1:0.0000000001", "nan", "0:1:-1"] {
            assert!(numbers(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn subsets_are_sets_of_models() {
        let sets = |text: &str, count| subset(text).unwrap().sets(count).unwrap();
        assert_eq!(sets("all", 3), [vec![0, 1, 2]]);
        assert_eq!(sets("pairs", 3), [vec![0, 1], vec![0, 2], vec![1, 2]]);
        assert_eq!(sets("leave-one-out", 3), [vec![1, 2], vec![0, 2], vec![0, 1]]);
        assert_eq!(sets("sizes", 4), [vec![0, 1], vec![0, 1, 2], vec![0, 1, 2, 3]]);
        assert_eq!(sets("3+1", 3), [vec![2, 0]]);
        assert!(subset("1+1").is_err() && subset("0").is_err() && subset("a").is_err() && subset("").is_err());
        assert!(subset("4").unwrap().sets(3).is_err());
    }
}
