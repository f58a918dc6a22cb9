//! Kernels per instruction set beside memcpy, and the rate of reading headers: `cargo bench --bench kernels`.
//!
//! `cargo bench --bench kernels -- --instructions` counts instructions under valgrind instead, which no other load on the
//! machine changes, and fails if a kernel takes more than [`MOST_INSTRUCTIONS`] says.
//!
//! - Tiles have the engine's size and stay in the nearest caches, so this is arithmetic, not memory.
//! - GB/s counts bytes read and written. Best of several batches: what the kernel can do, whatever else runs.

#[allow(dead_code, reason = "whole checkpoints are for end_to_end")]
mod family;
mod tiny;

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tiesmith::bench::{self, Fused, Isa, Stored};
use tiesmith::{Checkpoint, Disk, Float, IoMode, ModelInput, Plan, Recipe, Storage};

/// Elements of a tile, as the engine has them.
const TILE: usize = 2048;
/// Different tiles in turn, so that branch predictors and histograms see fresh data.
const TILES: usize = 16;
const MODELS: usize = 3;
/// The share of a task vector that is kept.
const DENSITY: f64 = 0.2;
const BF16: Float = Float::BF16;

/// What the kernels work on, one entry per tile.
struct Data {
    /// Of base and each model, then per tile.
    stored: Vec<Vec<Vec<u8>>>,
    base: Vec<Vec<f32>>,
    /// Per model, then per tile.
    taus: Vec<Vec<Vec<f32>>>,
    /// The key at [`DENSITY`] from the top of the first model's task vector.
    threshold: u32,
    /// Keys a hundredth of it below and above that.
    near: (u32, u32),
}

impl Data {
    fn new() -> Self {
        let tiles = |model| -> Vec<Vec<u8>> {
            let mut bytes = Vec::new();
            family::Values::of("sample", false, model).extend(&mut bytes, 0..(TILE * TILES) as u64);
            bytes.chunks(2 * TILE).map(<[u8]>::to_vec).collect()
        };
        let isa = Isa::detect();
        let widen = |bytes: &Vec<u8>| {
            let mut out = vec![0.0; TILE];
            bench::load(isa, BF16, bytes, &mut out);
            out
        };
        let base: Vec<Vec<f32>> = tiles(0).iter().map(widen).collect();
        let tau = |(bytes, base): (&Vec<u8>, &Vec<f32>)| {
            let mut out = vec![0.0; TILE];
            bench::task_vector(isa, BF16, bytes, base, &mut out);
            out
        };
        let taus: Vec<Vec<Vec<f32>>> =
            (1..=MODELS as u64).map(|model| tiles(model).iter().zip(&base).map(tau).collect()).collect();
        let mut keys: Vec<u32> = taus[0].iter().flatten().map(|tau| tau.to_bits() & 0x7fff_ffff).collect();
        keys.sort_unstable_by(|a, b| b.cmp(a));
        let at = |share: f64| keys[(share * keys.len() as f64) as usize];
        let (threshold, near) = (at(DENSITY), (at(DENSITY + 0.01), at(DENSITY - 0.01)));
        Self { stored: (0..=MODELS as u64).map(tiles).collect(), base, taus, threshold, near }
    }

    /// Tile `tile` of every model.
    fn column(&self, tile: usize) -> [&[f32]; MODELS] {
        std::array::from_fn(|model| self.taus[model][tile].as_slice())
    }

    /// A whole merge of tile `tile`, from stored bytes to stored bytes.
    fn merge(&self, isa: Isa, fused: Fused, tile: usize, out: &mut [u8]) {
        let models: [&[u8]; MODELS] = std::array::from_fn(|model| &*self.stored[model + 1][tile]);
        let (base, min_keys) = (Some(&*self.stored[0][tile]), &[self.threshold; MODELS]);
        let stored =
            Stored { float: BF16, base, models: &models, weights: &[1.0; MODELS], min_keys, counts_ties: false };
        let [mut kept, mut tied, mut agreeing] = [[0; MODELS]; 3];
        let counted = bench::Counted { kept: &mut kept, tied: &mut tied, agreeing: &mut agreeing };
        black_box(bench::merge_stored(isa, fused, &stored, out, counted));
    }
}

/// A line of the table for a whole merge.
fn merge(name: &'static str, bytes: usize, fused: Fused) -> Kernel {
    let mut out = vec![0; 2 * TILE];
    (name, bytes, Box::new(move |isa, data, tile| data.merge(isa, fused, tile, &mut out)))
}

/// One line of the table: name, bytes read and written per element, and what to do to a tile.
type Kernel = (&'static str, usize, Box<dyn FnMut(Isa, &Data, usize)>);

fn kernels(data: &Data) -> Vec<Kernel> {
    const WEIGHTS: [f32; MODELS] = [1.0; MODELS];
    let out = || vec![0.0f32; TILE];
    let (mut a, mut b, mut c, mut d, mut e, mut f, mut g) = (out(), out(), out(), out(), out(), out(), out());
    let (mut bytes, mut copy) = (vec![0u8; 2 * TILE], vec![0u8; 2 * TILE]);
    let (mut coarse, mut narrow) = (vec![0u64; 1 << 16], vec![0u64; 1 << 18]);
    let threshold = data.threshold;
    let low = threshold - narrow.len() as u32 / 2;
    let (near, mut between) = (data.near, vec![0; TILE]);
    vec![
        ("memcpy", 4, Box::new(move |_, data, tile| black_box(&mut copy).copy_from_slice(&data.stored[1][tile]))),
        ("load bf16", 6, Box::new(move |isa, data, tile| bench::load(isa, BF16, &data.stored[1][tile], &mut a))),
        (
            "task_vector bf16",
            10,
            Box::new(move |isa, data, tile| {
                bench::task_vector(isa, BF16, &data.stored[1][tile], &data.base[tile], &mut b);
            }),
        ),
        (
            "all_finite",
            4,
            Box::new(|isa, data, tile| {
                black_box(bench::all_finite(isa, &data.taus[0][tile]));
            }),
        ),
        (
            "histogram, all keys",
            4,
            Box::new(move |isa, data, tile| {
                black_box(bench::histogram(isa, &data.taus[0][tile], 0, 15, bench::NO_KEY, &mut coarse));
            }),
        ),
        (
            "histogram, narrow",
            4,
            Box::new(move |isa, data, tile| {
                black_box(bench::histogram(isa, &data.taus[0][tile], low, 0, bench::NO_KEY, &mut narrow));
            }),
        ),
        (
            "keys near a threshold",
            4,
            Box::new(move |isa, data, tile| {
                black_box(bench::collect(isa, &data.taus[0][tile], near.0, near.1, &mut between));
            }),
        ),
        (
            "trim (and copy)",
            16,
            Box::new(move |isa, data, tile| {
                c.copy_from_slice(&data.taus[0][tile]);
                black_box(bench::trim(isa, &mut c, threshold));
            }),
        ),
        (
            "conflicts, 3 models",
            12,
            Box::new(|isa, data, tile| {
                black_box(bench::conflicts(isa, &data.column(tile)));
            }),
        ),
        (
            "elect_mass, 3 models",
            16,
            Box::new(move |isa, data, tile| bench::elect_mass(isa, &data.column(tile), &WEIGHTS, &mut d)),
        ),
        (
            "combine_mean, 3 models",
            20,
            Box::new(move |isa, data, tile| {
                bench::combine_mean(isa, &data.column(tile), &WEIGHTS, Some(&data.taus[0][tile]), &mut e);
            }),
        ),
        ("add", 12, Box::new(move |isa, data, tile| bench::add(isa, &mut f, &data.base[tile]))),
        ("add_scaled", 12, Box::new(move |isa, data, tile| bench::add_scaled(isa, &mut g, 0.5, &data.base[tile]))),
        (
            "store bf16",
            6,
            Box::new(move |isa, data, tile| {
                black_box(bench::store(isa, BF16, &data.base[tile], &mut bytes, false));
            }),
        ),
        merge("whole merge: linear, 3 models", 8, Fused::Average { divisor: 3.0 }),
        merge("whole merge: task_arithmetic, base and 3 models", 10, Fused::Sum { lambda: 1.0 }),
        merge("whole merge: ties, base and 3 models", 10, Fused::Elected { zero_sign: 0.0, lambda: 1.0 }),
    ]
}

/// Instructions per element that kernels may take under AVX2, the widest that valgrind knows: a tenth more than when this
/// was written.
const MOST_INSTRUCTIONS: [(&str, f64); 6] = [
    ("task_vector bf16", 1.95),
    ("histogram, narrow", 4.2),
    ("keys near a threshold", 4.4),
    ("whole merge: linear, 3 models", 4.2),
    ("whole merge: task_arithmetic, base and 3 models", 9.6),
    ("whole merge: ties, base and 3 models", 17.6),
];

/// Instructions per element of each kernel with a limit.
fn instructions() -> std::io::Result<()> {
    let names: Vec<&str> = kernels(&Data::new()).into_iter().map(|(name, ..)| name).collect();
    let mut exceeded = false;
    println!("### Kernels: instructions per element, AVX2\n\n| kernel | instructions | limit |\n|---|---|---|");
    for (index, name) in names.into_iter().enumerate() {
        // What comes before the kernel is the same for any number of rounds.
        let [few, many] = [1, 5].map(|rounds: u32| collected(index, rounds));
        let count = (many? - few?) / (4 * TILES * TILE) as f64;
        let most = MOST_INSTRUCTIONS.iter().find(|(limited, _)| *limited == name).map(|&(_, most)| most);
        exceeded |= most.is_some_and(|most| count > most);
        println!("| {name} | {count:.2} | {} |", most.map_or(String::new(), |most| most.to_string()));
    }
    if exceeded { Err(std::io::Error::other("a kernel takes more instructions than its limit")) } else { Ok(()) }
}

/// What valgrind counts while kernel `index` goes `rounds` times through all tiles.
fn collected(index: usize, rounds: u32) -> std::io::Result<f64> {
    let mut command = std::process::Command::new("valgrind");
    command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(std::env::current_exe()?);
    let output = command.args(["child-kernel", &index.to_string(), &rounds.to_string()]).output()?;
    let messages = String::from_utf8_lossy(&output.stderr);
    let line = messages.lines().find_map(|line| line.split_once("Collected :"));
    let count = line.and_then(|(_, count)| count.trim().parse().ok());
    count.ok_or_else(|| std::io::Error::other(format!("valgrind says: {messages}")))
}

/// `child-kernel INDEX ROUNDS`.
fn child_kernel(index: usize, rounds: u32) {
    let data = Data::new();
    let (_, _, mut kernel) = kernels(&data).swap_remove(index);
    (0..rounds).for_each(|_| (0..TILES).for_each(|tile| kernel(Isa::detect(), black_box(&data), tile)));
}

fn main() -> std::io::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["child-kernel", index, rounds] => {
            child_kernel(index.parse().expect("an index"), rounds.parse().expect("a number"));
            return Ok(());
        }
        ["--instructions", ..] => return instructions(),
        _ => {}
    }
    let data = Data::new();
    let sets = Isa::available();
    println!("### Kernels: GB/s read and written (ns per 1000 elements), tiles of {TILE} elements\n");
    println!("| kernel | {} |", sets.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(" | "));
    println!("|---|{}", "---|".repeat(sets.len()));
    for (name, bytes, mut kernel) in kernels(&data) {
        let cell = |&isa: &Isa| {
            let seconds =
                best(|| (0..TILES).for_each(|tile| kernel(isa, black_box(&data), tile))) / (TILE * TILES) as f64;
            format!("{:.0} ({:.0})", bytes as f64 / seconds / 1e9, seconds * 1e12)
        };
        println!("| {name} | {} |", sets.iter().map(cell).collect::<Vec<_>>().join(" | "));
    }
    headers();
    Ok(())
}

/// Opening and planning checkpoints that are all header.
fn headers() {
    const TENSORS: usize = 100_000;
    let dir = tempfile::tempdir().expect("a temporary directory");
    let paths = family::checkpoints(dir.path(), 1);
    paths.iter().for_each(|path| tiny::write(path, TENSORS).expect("a checkpoint"));
    let source = |index: usize| paths[index].display().to_string();
    let storage: Arc<dyn Storage> = Arc::new(Disk::new(IoMode::Auto));
    let open = best(|| drop(black_box(Checkpoint::open(&source(0), &storage).expect("a checkpoint"))));
    let model = ModelInput { source: source(1), ..ModelInput::default() };
    let recipe = Recipe { base: Some(source(0)), models: vec![model], ..Recipe::default() };
    let plan = best(|| drop(black_box(Plan::new(&recipe, &storage).expect("a plan"))));
    println!("\n### Headers: {TENSORS} tensors a checkpoint\n");
    println!("- opening one checkpoint: {:.2} million tensors/s", TENSORS as f64 / open / 1e6);
    println!("- planning a base and a model: {:.2} million tensors/s", 2.0 * TENSORS as f64 / plan / 1e6);
}

/// Seconds of one call, in the best of some batches of about 10 ms.
fn best(mut call: impl FnMut()) -> f64 {
    const BATCHES: usize = 15;
    let mut calls = 1;
    let mut least = f64::INFINITY;
    let mut batches = 0;
    while batches < BATCHES {
        let begin = Instant::now();
        (0..calls).for_each(|_| call());
        let elapsed = begin.elapsed();
        if elapsed < Duration::from_millis(10) {
            calls *= 2;
            continue;
        }
        least = least.min(elapsed.as_secs_f64() / f64::from(calls));
        batches += 1;
    }
    least
}
