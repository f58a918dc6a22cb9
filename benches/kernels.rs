//! Kernels per instruction set beside memcpy, and the rate of reading headers: `cargo bench --bench kernels`.
//!
//! - Tiles have the engine's size and stay in the nearest caches, so this is arithmetic, not memory.
//! - GB/s counts bytes read and written. Best of several batches: what the kernel can do, whatever else runs.

#[allow(dead_code, reason = "whole checkpoints are for end_to_end")]
mod family;
mod tiny;

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tiesmith::bench::{self, Isa};
use tiesmith::{Checkpoint, Disk, Float, IoMode, ModelInput, Plan, Recipe, Storage};

/// Elements of a tile, as the engine has them.
const TILE: usize = 1024;
/// Different tiles in turn, so that branch predictors and histograms see fresh data.
const TILES: usize = 16;
const MODELS: usize = 3;
/// The share of a task vector that is kept.
const DENSITY: f64 = 0.2;
const BF16: Float = Float::BF16;

/// What the kernels work on, one entry per tile.
struct Data {
    stored: Vec<Vec<u8>>,
    base: Vec<Vec<f32>>,
    /// Per model, then per tile.
    taus: Vec<Vec<Vec<f32>>>,
    /// The key at [`DENSITY`] from the top of the first model's task vector.
    threshold: u32,
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
        let threshold = keys[(DENSITY * keys.len() as f64) as usize];
        Self { stored: tiles(1), base, taus, threshold }
    }

    /// Tile `tile` of every model.
    fn column(&self, tile: usize) -> [&[f32]; MODELS] {
        std::array::from_fn(|model| self.taus[model][tile].as_slice())
    }
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
    vec![
        ("memcpy", 4, Box::new(move |_, data, tile| black_box(&mut copy).copy_from_slice(&data.stored[tile]))),
        ("load bf16", 6, Box::new(move |isa, data, tile| bench::load(isa, BF16, &data.stored[tile], &mut a))),
        (
            "task_vector bf16",
            10,
            Box::new(move |isa, data, tile| {
                bench::task_vector(isa, BF16, &data.stored[tile], &data.base[tile], &mut b);
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
    ]
}

fn main() {
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
