//! Whole merges, beside a reference that only moves the bytes: `cargo bench --bench end_to_end -- --help`.
//!
//! - Every run is a process of its own; the reference and all cases take turns, so that a busy machine slows them alike.
//! - A run that others on the machine disturb is repeated, if `--patience` says so; what disturbance is left is printed.
//! - Ratios are medians over the rounds of (case ÷ reference of the same round).
//! - Prints Markdown. `docs/performance.md` records a full run.

mod child;
mod family;
mod packed;
mod reference;
mod tiny;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tiesmith::{Disk, IoMode, ModelInput, Plan, Recipe, Run as Limits, Schedule, Storage};

use family::Shape;

const HELP: &str = "\
cargo bench --bench end_to_end -- [OPTIONS]

  --dir DIR       Where data and outputs go: choose the file system to measure [default: a temporary directory]
  --full          1.5 billion parameters (20 GB free in DIR) instead of 30 million
  --divide N      With --full: one N-th of the parameters [default: 1]
  --only PART     One of merge, scaling, start-up, packed, cold (the last two only run when named)
  --memory SIZE   Limit given to every merge [default: 1GB]
  --threads N     Threads of merges and reference [default: 2]
  --io MODE       How merges read: auto, mmap, read [default: auto]
  --runs N        Rounds [default: 5]
  --patience N    Times a run is repeated while others use more than 5 % of the machine [default: 0]
  --out DIR       Where outputs go [default: inside --dir]
  --keep          Leave the data in DIR, and use what an earlier run left there

DIR is created, and what the benchmark wrote into it is removed at the end.
";

/// A merge to measure: name, flags, and the most it may take in multiples of the reference.
struct Case {
    name: &'static str,
    flags: &'static [&'static str],
    bar: Option<f64>,
}

const TENSOR: &[&str] = &["--method", "ties", "--scope", "tensor"];

const CASES: [Case; 5] = [
    Case { name: "linear", flags: &["--method", "linear"], bar: Some(1.3) },
    Case { name: "task_arithmetic", flags: &["--method", "task_arithmetic"], bar: Some(1.3) },
    Case { name: "ties, tensor scope, exact", flags: TENSOR, bar: Some(1.6) },
    Case { name: "ties, model scope, exact", flags: &["--method", "ties", "--scope", "model"], bar: Some(2.4) },
    Case {
        name: "ties, model scope, sketch",
        flags: &["--method", "ties", "--scope", "model", "--threshold", "sketch"],
        bar: None,
    },
];

fn main() -> io::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    // The benchmark is its own child where it measures something else than the program.
    match args.first().map(String::as_str) {
        Some("child-reference") => return child_reference(&args[1..]),
        Some("child-plan") => return child_plan(&args[1..]),
        Some("--help" | "-h") => {
            print!("{HELP}");
            return Ok(());
        }
        _ => {}
    }
    let options = Options::parse(&args).unwrap_or_else(|message| {
        eprintln!("error: {message}\n\n{HELP}");
        std::process::exit(2);
    });
    let temporary = options.dir.is_none().then(tempfile::tempdir).transpose()?;
    let dir = options.dir.clone().or(temporary.as_ref().map(|dir| dir.path().to_path_buf())).expect("one of both");
    let bench = Bench { out: options.out.clone().unwrap_or_else(|| dir.join("out")), dir, options };
    println!("{}\n", bench.machine());
    for (part, run) in PARTS {
        if bench.options.only.as_deref().map_or(!["cold", "packed"].contains(&part), |only| only == part) {
            run(&bench)?;
        }
    }
    Ok(())
}

/// A part of the benchmark: its name for `--only`, and what it does.
type Part = (&'static str, fn(&Bench) -> io::Result<()>);

const PARTS: [Part; 5] = [
    ("merge", Bench::merge),
    ("scaling", Bench::scaling),
    ("start-up", Bench::start_up),
    ("packed", Bench::packed),
    ("cold", Bench::cold),
];

struct Options {
    dir: Option<PathBuf>,
    out: Option<PathBuf>,
    full: bool,
    divide: u64,
    only: Option<String>,
    memory: String,
    threads: usize,
    io: String,
    runs: usize,
    patience: usize,
    keep: bool,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self, String> {
        let mut options = Self {
            dir: None,
            out: None,
            full: false,
            divide: 1,
            only: None,
            memory: "1GB".into(),
            threads: 2,
            io: "auto".into(),
            runs: 5,
            patience: 0,
            keep: false,
        };
        let mut args = args.iter();
        while let Some(flag) = args.next() {
            let mut value = || args.next().cloned().ok_or(format!("{flag} needs a value"));
            let number = |text: String| text.parse().map_err(|_| format!("{flag} {text}: not a number"));
            match flag.as_str() {
                "--dir" => options.dir = Some(value()?.into()),
                "--out" => options.out = Some(value()?.into()),
                "--full" => options.full = true,
                "--small" => options.full = false,
                "--divide" => options.divide = value()?.parse().map_err(|_| "--divide needs a number".to_string())?,
                "--only" => options.only = Some(value()?),
                "--memory" => options.memory = value()?,
                "--threads" => options.threads = number(value()?)?,
                "--io" => options.io = value()?,
                "--runs" => options.runs = number(value()?)?,
                "--patience" => options.patience = number(value()?)?,
                "--keep" => options.keep = true,
                // What cargo passes to every benchmark.
                "--bench" => {}
                other => return Err(format!("unknown option {other}")),
            }
        }
        if options.threads == 0 || options.runs == 0 || options.divide == 0 {
            return Err("--threads, --runs and --divide begin at 1".into());
        }
        match &options.only {
            Some(only) if PARTS.iter().all(|(part, _)| part != only) => Err(format!("--only {only}: no such part")),
            _ => Ok(options),
        }
    }
}

struct Bench {
    options: Options,
    dir: PathBuf,
    out: PathBuf,
}

/// Checkpoints on disk, removed when dropped unless they are to be kept.
struct Data {
    dir: PathBuf,
    checkpoints: Vec<PathBuf>,
    shape: Shape,
    keep: bool,
}

impl Data {
    /// Elements of all checkpoints together.
    fn input_elements(&self) -> u64 {
        self.shape.elements() * self.checkpoints.len() as u64
    }

    /// The base and the first `models` models.
    fn first(&self, models: usize) -> &[PathBuf] {
        &self.checkpoints[..=models]
    }
}

impl Drop for Data {
    fn drop(&mut self) {
        if !self.keep {
            // What cannot be removed is left: nothing is lost by it but space.
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

impl Bench {
    fn shape(&self) -> Shape {
        if self.options.full { Shape::FULL.divided(self.options.divide) } else { Shape::SMALL }
    }

    fn data(&self, name: &str, shape: Shape, models: usize) -> io::Result<Data> {
        let dir = self.dir.join(name);
        let complete = dir.join("complete");
        if !complete.is_file() {
            let begin = Instant::now();
            family::write(&dir, shape, models)?;
            File::create(complete)?;
            let gigabytes = 2e-9 * (shape.elements() * (models as u64 + 1)) as f64;
            eprintln!("{name}: {gigabytes:.1} GB generated in {:.0} s", begin.elapsed().as_secs_f64());
        }
        Ok(Data { checkpoints: family::checkpoints(&dir, models), dir, shape, keep: self.options.keep })
    }

    fn machine(&self) -> String {
        let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpus.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(": unknown CPU");
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        let Options { threads, memory, io, runs, .. } = &self.options;
        format!(
            "{cores} × {}, {threads} threads, --memory {memory}, --io {io}, {runs} rounds",
            model.trim_start_matches(['\t', ' ', ':'])
        )
    }

    /// Arguments of a merge (or of its plan) of `checkpoints`.
    fn inputs(&self, command: &mut Command, checkpoints: &[PathBuf], flags: &[&str], threads: usize) {
        let (base, models) = checkpoints.split_first().expect("a base");
        let Options { memory, io, .. } = &self.options;
        command.args(flags).args(["--memory", memory, "--io", io, "--threads", &threads.to_string(), "--json"]);
        command.arg("--base").arg(base);
        models.iter().for_each(|model| {
            command.arg("--model").arg(model);
        });
    }

    /// Runs `command` with no output in its way, and leaves none; of disturbed runs, the least disturbed counts.
    fn measure(&self, command: &mut Command) -> child::Run {
        /// Share of the machine that others may use.
        const TOLERATED: f64 = 0.05;
        let once = |command: &mut Command| {
            let _ = fs::remove_dir_all(&self.out);
            let run = child::run(command);
            let _ = fs::remove_dir_all(&self.out);
            run
        };
        let mut best = once(command);
        for _ in 0..self.options.patience {
            if best.disturbance <= TOLERATED {
                break;
            }
            std::thread::sleep(Duration::from_secs(1));
            let again = once(command);
            if again.disturbance < best.disturbance {
                best = again;
            }
        }
        best
    }

    fn run_merge(&self, checkpoints: &[PathBuf], flags: &[&str], threads: usize) -> child::Run {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tiesmith"));
        command.arg("merge").arg("--out").arg(&self.out).args(["--progress", "json"]);
        self.inputs(&mut command, checkpoints, flags, threads);
        self.measure(&mut command)
    }

    /// A look at the family, which writes a report instead of a model.
    fn run_look(&self, checkpoints: &[PathBuf]) -> child::Run {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tiesmith"));
        command.arg("analyze").arg("--out").arg(&self.out).args(["--progress", "json"]);
        self.inputs(&mut command, checkpoints, &[], self.options.threads);
        self.measure(&mut command)
    }

    /// What the program says it will do.
    fn plan(&self, checkpoints: &[PathBuf], flags: &[&str]) -> Value {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tiesmith"));
        command.arg("plan");
        self.inputs(&mut command, checkpoints, flags, self.options.threads);
        child::run(&mut command).report
    }

    /// Reads all of `checkpoints` once and writes files of the lengths `outputs`.
    fn run_reference(&self, checkpoints: &[PathBuf], outputs: &[u64], threads: usize) -> io::Result<child::Run> {
        let list = |items: Vec<String>| items.join("\n");
        let files = shards(checkpoints)?.iter().map(|file| file.display().to_string()).collect();
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["child-reference", &threads.to_string()]).arg(&self.out);
        command.args([list(files), list(outputs.iter().map(u64::to_string).collect())]);
        Ok(self.measure(&mut command))
    }

    /// Every case beside the reference, from the page cache.
    fn merge(&self) -> io::Result<()> {
        let data = self.data("family", self.shape(), 3)?;
        let threads = self.options.threads;
        let plans: Vec<Value> = CASES.iter().map(|case| self.plan(&data.checkpoints, case.flags)).collect();
        let outputs = output_lengths(&plans[0]);
        let (mut reference, mut looks) = (Vec::new(), Vec::new());
        let mut runs: Vec<Vec<child::Run>> = CASES.iter().map(|_| Vec::new()).collect();
        // A virtual machine gives memory that was freed back to its host within seconds, and pays more for getting it again
        // than any case costs: whoever writes first. So the reference is run before each, unmeasured, itself included.
        let reference_run = || self.run_reference(&data.checkpoints, &outputs, threads);
        // The first round only warms up.
        for round in 0..=self.options.runs {
            reference_run()?;
            let moved = reference_run()?;
            let merge = |case: &Case| reference_run().map(|_| self.run_merge(&data.checkpoints, case.flags, threads));
            let merged = CASES.iter().map(merge).collect::<io::Result<Vec<_>>>()?;
            let look = self.run_look(&data.checkpoints);
            if round > 0 {
                reference.push(moved);
                looks.push(look);
                runs.iter_mut().zip(merged).for_each(|(runs, run)| runs.push(run));
            }
        }
        let walls = |runs: &[child::Run]| runs.iter().map(|run| run.wall).collect::<Vec<_>>();
        let base_walls = walls(&reference);
        let elements = data.input_elements() as f64 / 1e9;
        println!("### Merges from the page cache: 4 × {:.2} billion parameters\n", elements / 4.0);
        println!(
            "| case | wall, median (least) | × R | bar | CPU | CPU / 10⁹ input elements | peak memory | read ÷ plan | others |"
        );
        println!("|---|---|---|---|---|---|---|---|---|");
        let row = |name: &str, runs: &[child::Run], bar: Option<f64>, plan: Option<&Value>| {
            let walls = walls(runs);
            let ratios: Vec<f64> = walls.iter().zip(&base_walls).map(|(wall, base)| wall / base).collect();
            let cpu = median(&runs.iter().map(|run| run.cpu).collect::<Vec<_>>());
            let peak = runs.iter().map(|run| run.number("peak_memory_bytes")).max().unwrap_or_default() as f64 / 1e6;
            let read = plan.and_then(|plan| plan["bytes_read"].as_u64()).map_or("".to_string(), |planned| {
                format!("{:.3}", runs[0].number("bytes_read") as f64 / planned as f64)
            });
            let others = median(&runs.iter().map(|run| run.disturbance).collect::<Vec<_>>());
            println!(
                "| {name} | {} | {:.2} | {} | {cpu:.2} s | {:.2} s | {peak:.0} MB | {read} | {:.0} % |",
                seconds(&walls),
                median(&ratios),
                bar.map_or("".to_string(), |bar| bar.to_string()),
                cpu / elements,
                others * 100.0,
            );
        };
        row("R: read all, write as much", &reference, None, None);
        for ((case, runs), plan) in CASES.iter().zip(&runs).zip(&plans) {
            row(case.name, runs, case.bar, Some(plan));
        }
        row("analyze, model scope, six densities", &looks, None, None);
        println!("\n### Stages, median seconds\n");
        for (case, runs) in CASES.iter().zip(&runs) {
            println!("- {}: {}", case.name, stages(runs));
        }
        println!();
        Ok(())
    }

    /// Threads, parameters and models, each against twice (or four times) as many.
    fn scaling(&self) -> io::Result<()> {
        let shape = if self.options.full { Shape::FULL.divided(4 * self.options.divide) } else { Shape::SMALL };
        let data = self.data("scaling", shape, 8)?;
        let half = self.data("scaling-half", shape.divided(2), 3)?;
        let threads = self.options.threads;
        println!("### Scaling: {:.2} billion parameters, ties, tensor scope\n", shape.elements() as f64 / 1e9);
        println!("| what | from | to | ratio of medians |");
        println!("|---|---|---|---|");
        let outputs = output_lengths(&self.plan(data.first(3), TENSOR));
        let compare = |name: &str, cases: [(&[PathBuf], usize); 2], per: f64| -> io::Result<()> {
            let mut walls = [Vec::new(), Vec::new()];
            for round in 0..=self.options.runs {
                for (walls, (checkpoints, threads)) in walls.iter_mut().zip(cases) {
                    // As beside the reference: memory for the output is there before it is measured.
                    self.run_reference(data.first(3), &outputs, self.options.threads)?;
                    let run = self.run_merge(checkpoints, TENSOR, threads);
                    if round > 0 {
                        walls.push(run.wall);
                    }
                }
            }
            let ratio = median(&walls[1]) / median(&walls[0]) / per;
            println!("| {name} | {} | {} | {ratio:.2} |", seconds(&walls[0]), seconds(&walls[1]));
            Ok(())
        };
        compare("2 threads → 1", [(data.first(3), 2), (data.first(3), 1)], 1.0)?;
        compare("parameters × 2", [(half.first(3), threads), (data.first(3), threads)], 1.0)?;
        compare("2 → 8 models, per input byte", [(data.first(2), threads), (data.first(8), threads)], 3.0)?;
        println!();
        Ok(())
    }

    /// Planning for very many tensors.
    fn start_up(&self) -> io::Result<()> {
        const TENSORS: usize = 200_000;
        let dir = self.dir.join("tiny");
        let checkpoints = family::checkpoints(&dir, 3);
        checkpoints.iter().try_for_each(|checkpoint| tiny::write(checkpoint, TENSORS))?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("child-plan").args(&checkpoints);
        let runs: Vec<child::Run> = (0..self.options.runs).map(|_| child::run(&mut command)).collect();
        fs::remove_dir_all(dir)?;
        let walls: Vec<f64> = runs.iter().map(|run| run.wall).collect();
        let peak = runs.iter().map(|run| run.number("peak_memory_bytes")).max().unwrap_or_default() as f64 / 1e6;
        println!("### Start-up: planning 4 checkpoints of {TENSORS} tensors\n");
        println!("wall {}, peak memory {peak:.0} MB\n", seconds(&walls));
        Ok(())
    }

    /// Every case with nothing in the page cache, against the rate of the disk in the same round.
    fn cold(&self) -> io::Result<()> {
        let data = self.data("family", self.shape(), 3)?;
        let files = shards(&data.checkpoints)?;
        println!("### Cold: nothing in the page cache\n");
        println!("| case | wall, median (least) | disk reads | wall × rate ÷ planned bytes | storage bytes ÷ plan |");
        println!("|---|---|---|---|---|");
        for case in &CASES {
            let planned = self.plan(&data.checkpoints, case.flags)["bytes_read"].as_u64().unwrap_or_default() as f64;
            let (mut walls, mut rates, mut shares, mut stored) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
            for _ in 0..self.options.runs {
                forget(&files)?;
                let straight = self.run_reference(&data.checkpoints, &[], self.options.threads)?;
                forget(&files)?;
                let run = self.run_merge(&data.checkpoints, case.flags, self.options.threads);
                let rate = straight.storage_bytes as f64 / straight.wall;
                walls.push(run.wall);
                rates.push(rate / 1e6);
                shares.push(run.wall * rate / planned);
                stored.push(run.storage_bytes as f64 / planned);
            }
            let (wall, rate) = (seconds(&walls), median(&rates));
            let (share, stored) = (median(&shares), median(&stored));
            println!("| {} | {wall} | {rate:.0} MB/s | {share:.2} | {stored:.3} |", case.name);
        }
        println!();
        Ok(())
    }
}

/// `child-reference THREADS OUT INPUTS LENGTHS`: lists are separated by line ends.
fn child_reference(args: &[String]) -> io::Result<()> {
    let [threads, out, inputs, lengths] = args else { panic!("four arguments") };
    let inputs: Vec<PathBuf> = inputs.lines().map(PathBuf::from).collect();
    let lengths: Vec<u64> = lengths.lines().map(|length| length.parse().expect("a length")).collect();
    reference::run(&inputs, &lengths, Path::new(out), threads.parse().expect("a number of threads"))?;
    println!("{}", json!({"peak_memory_bytes": child::peak_memory_bytes()}));
    Ok(())
}

/// `child-plan CHECKPOINT...`: plans and schedules, nothing else.
fn child_plan(checkpoints: &[String]) -> io::Result<()> {
    let (base, models) = checkpoints.split_first().expect("a base");
    let model = |source: &String| ModelInput { source: source.clone(), ..ModelInput::default() };
    let recipe = Recipe { base: Some(base.clone()), models: models.iter().map(model).collect(), ..Recipe::default() };
    let storage: Arc<dyn Storage> = Arc::new(Disk::new(IoMode::Auto));
    let plan = Plan::new(&recipe, &storage).expect("a plan");
    let schedule = Schedule::new(&plan, Limits::new(2_000_000_000, 2)).expect("a schedule");
    println!("{}", json!({"passes": schedule.passes, "peak_memory_bytes": child::peak_memory_bytes()}));
    Ok(())
}

/// The tensor files of `checkpoints`.
fn shards(checkpoints: &[PathBuf]) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for checkpoint in checkpoints {
        for entry in fs::read_dir(checkpoint)? {
            files.push(entry?.path());
        }
    }
    files.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    files.sort();
    Ok(files)
}

/// Lengths of the shards that a plan names.
fn output_lengths(plan: &Value) -> Vec<u64> {
    let shards = plan["shards"].as_array().expect("a list of shards");
    shards.iter().map(|shard| shard[1].as_u64().expect("a length")).collect()
}

/// Takes `files` out of the page cache.
fn forget(files: &[PathBuf]) -> io::Result<()> {
    for path in files {
        let file = File::open(path)?;
        file.sync_all()?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    }
    Ok(())
}

/// Each stage's median duration, in the order of the first run.
fn stages(runs: &[child::Run]) -> String {
    let duration = |index: usize| median(&runs.iter().filter_map(|r| Some(r.stages.get(index)?.1)).collect::<Vec<_>>());
    let named = |(index, (name, _)): (usize, &(String, f64))| format!("{name} {:.2}", duration(index));
    runs[0].stages.iter().enumerate().map(named).collect::<Vec<_>>().join(", ")
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

/// Median and least of some durations.
fn seconds(walls: &[f64]) -> String {
    format!("{:.3} s ({:.3})", median(walls), walls.iter().copied().fold(f64::INFINITY, f64::min))
}
