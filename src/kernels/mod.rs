//! Element-wise arithmetic on tiles: slices in, slices out.
//!
//! | file | what |
//! |---|---|
//! | this one | the entry points: lengths are checked here, then one dispatch on [`Isa`] per call |
//! | `body.rs` | each algorithm once, safe and branch-free |
//! | `count.rs` | the ones that count keys around a threshold |
//! | `fused.rs` | whole merges from stored bytes to stored bytes, for what is common |
//! | `scaled.rs` | merged task vectors times a factor, stored |
//! | `isa.rs` | the bodies compiled per instruction set, and the only unsafe code |
//! | `dense.rs` | products and systems of matrices in f64 |
//! | `fisher.rs` | means with a weight per element |
//! | `convert.rs` | stored floats to and from f32 |
//! | `naive.rs` | tests only: the equations in f64, one element at a time |
//!
//! What holds for every kernel:
//!
//! - **Deterministic.** The result is the same, bit for bit, on every [`Isa`] and however a tensor is cut into tiles.
//!   Sums over models run in slice order; products and sums round separately; only integers are summed over elements.
//!   The one exception is which NaN an operation on NaN or infinities yields: [`store`] makes them all one.
//! - **Stored bytes** are little-endian and may be unaligned; there are `elements * float.width()` of them.
//! - A **key** is the bits of an f32 without the sign: an integer that is monotone in magnitude.
//! - **NaN and infinities** are ordinary data: their keys are above every finite one, so they survive a trim; an infinity
//!   has a sign like any value; NaN has none, so it is never elected, but takes part where there is no election.
//! - Slices that disagree in length are a mistake of the caller and panic; no value of an element ever does.
//!
//! Notation: θ0 base, θ_t model t, τ_t = θ_t − θ0 its task vector, γ the elected sign, w_t the weight of model t
//! (TIES-merging, arXiv 2306.01708). The kernels allocate nothing and know nothing of tensors, files or threads.

mod body;
mod convert;
mod count;
mod dense;
mod fisher;
mod fused;
mod isa;
#[cfg(test)]
mod naive;
mod scaled;
#[cfg(test)]
mod tests;

pub use convert::key;
pub use dense::PANEL;
pub use isa::Isa;

use crate::dtype::Float;

/// The keys that tie at a trim threshold, both ends included; `low > high` is no key at all.
///
/// With an exact threshold both are its key; with an approximate one they bound it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ties {
    /// The smallest key that ties.
    pub low: u32,
    /// The largest key that ties; everything above survives.
    pub high: u32,
}

impl Ties {
    /// All ones for a key in the range.
    #[inline(always)]
    fn mask(self, key: u32) -> u32 {
        convert::mask(key >= self.low) & convert::mask(key <= self.high)
    }
}

/// The finaliser of splitmix64: a bijection in which every input bit changes half of the output bits.
#[inline(always)]
const fn mix(mut state: u64) -> u64 {
    state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}

/// Where the state of a splitmix64 generator stands at its `index`-th output.
#[inline(always)]
const fn step(index: u64) -> u64 {
    index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// The `index`-th output of the random stream named by `draw_key`: uniform over all of u64.
///
/// A counter-based generator: splitmix64 (Steele, Lea, Flood 2014) seeded with the mixed key and read at any index
/// without the ones before. Mixing the key first keeps the streams of keys that differ by multiples of the generator's
/// increment from being shifted copies of each other. Part of the output format: it must never change.
#[inline(always)]
pub const fn draw(draw_key: u64, index: u64) -> u64 {
    mix(mix(draw_key).wrapping_add(step(index)))
}

/// Asserts that there are `elements` stored values of type `float`.
#[track_caller]
fn assert_stored(float: Float, bytes: &[u8], elements: usize) {
    assert_eq!(bytes.len(), elements * float.width(), "bytes of {elements} elements of {float:?}");
}

/// Asserts that every model has `elements` entries.
#[track_caller]
fn assert_columns(taus: &[&[f32]], elements: usize) {
    assert!(taus.iter().all(|tau| tau.len() == elements), "task vectors of {elements} elements");
}

/// Asserts what the weighted kernels need.
#[track_caller]
fn assert_weighted(taus: &[&[f32]], weights: &[f32], elements: usize) {
    assert_columns(taus, elements);
    assert_eq!(taus.len(), weights.len(), "one weight per task vector");
}

// ---- Stored values ------------------------------------------------------------------------------------------------

/// Widens stored values to f32: exact, but for f64, which rounds to nearest even.
pub fn load(isa: Isa, float: Float, bytes: &[u8], out: &mut [f32]) {
    assert_stored(float, bytes, out.len());
    match float {
        // Stored as they are held: bytes are copied, wherever they lie.
        Float::F32 if cfg!(target_endian = "little") => bytemuck::cast_slice_mut(out).copy_from_slice(bytes),
        _ => isa::load(isa, float, bytes, out),
    }
}

/// Hints that `bytes` will be loaded soon.
pub fn prefetch(bytes: &[u8]) {
    isa::prefetch(bytes);
}

/// τ = θ − θ0 with θ stored as `float` and θ0 = `base` in f32; returns whether all of it is finite.
pub fn task_vector(isa: Isa, float: Float, bytes: &[u8], base: &[f32], out: &mut [f32]) -> bool {
    assert_stored(float, bytes, out.len());
    assert_eq!(base.len(), out.len());
    isa::task_vector(isa, float, bytes, base, out)
}

/// [`task_vector`] and [`trim`] at once: the number of survivors, or `None`, and no meaning in `out`, if some entry of
/// the task vector is not finite.
pub fn trimmed_task_vector(
    isa: Isa,
    float: Float,
    bytes: &[u8],
    base: &[f32],
    min_key: u32,
    out: &mut [f32],
) -> Option<u64> {
    assert_stored(float, bytes, out.len());
    assert_eq!(base.len(), out.len());
    assert!(min_key >= 1, "zeros never survive a trim");
    isa::trimmed_task_vector(isa, float, bytes, base, min_key, out)
}

/// τ = θ − θ0 subtracted in f64 and rounded once to f32, for checkpoints with f64 tensors.
pub fn task_vector_f64(isa: Isa, float: Float, bytes: &[u8], base_float: Float, base_bytes: &[u8], out: &mut [f32]) {
    assert_stored(float, bytes, out.len());
    assert_stored(base_float, base_bytes, out.len());
    isa::task_vector_f64(isa, float, bytes, base_float, base_bytes, out);
}

/// Rounds to nearest even and stores, little-endian. Returns whether everything stored is finite.
///
/// A finite value that is too large for the type becomes the largest finite one of its sign with `clamp`, else an
/// infinity, or NaN in E4M3, which has no infinities. "Too large" is what rounds, with an unlimited exponent, beyond the
/// largest finite value: from 65520 in F16, above 464 in E4M3. Infinities stay infinities (E4M3: NaN) and NaN becomes
/// the type's positive quiet NaN.
pub fn store(isa: Isa, float: Float, values: &[f32], out: &mut [u8], clamp: bool) -> bool {
    assert_stored(float, out, values.len());
    isa::store(isa, float, values, out, clamp)
}

/// Stores θ0 + value in f64, with θ0 widened exactly; NaN becomes the positive quiet NaN.
pub fn store_sum_f64(isa: Isa, base_float: Float, base_bytes: &[u8], values: &[f32], out: &mut [u8]) {
    assert_stored(base_float, base_bytes, values.len());
    assert_stored(Float::F64, out, values.len());
    isa::store_sum_f64(isa, base_float, base_bytes, values, out);
}

/// Whether no value is NaN or infinite.
pub fn all_finite(isa: Isa, values: &[f32]) -> bool {
    isa::all_finite(isa, values)
}

// ---- Trim ---------------------------------------------------------------------------------------------------------

/// Zeroes every entry whose key is below `min_key` (at least 1) and returns the number of the others.
///
/// What is zeroed becomes +0.0, and -0.0 does too.
pub fn trim(isa: Isa, tau: &mut [f32], min_key: u32) -> u64 {
    assert!(min_key >= 1, "zeros never survive a trim");
    isa::trim(isa, tau, min_key)
}

/// Keeps entries above the ties, and of the ties those whose draw is below `accept`; returns the non-zero survivors.
///
/// Entry i draws `draw(draw_key, first_index + i)`: `first_index` is the position of the tile in the whole. A tie
/// survives with probability `accept` / 2^64. Zeros, kept or not, become +0.0 and are not counted.
pub fn trim_sample(isa: Isa, tau: &mut [f32], ties: Ties, draw_key: u64, first_index: u64, accept: u64) -> u64 {
    isa::trim_sample(isa, tau, ties, draw_key, first_index, accept)
}

/// Keeps entries above the ties, and the first `quota` ties; returns (non-zero survivors, ties kept).
///
/// A zero that ties uses up quota, but does not count as a survivor.
pub fn trim_lowest(isa: Isa, tau: &mut [f32], ties: Ties, quota: u64) -> (u64, u64) {
    isa::trim_lowest(isa, tau, ties, quota)
}

/// Zeroes every entry where `dropped` is not zero and returns the number of non-zero entries left.
pub fn drop_where(isa: Isa, tau: &mut [f32], dropped: &[f32]) -> u64 {
    assert_eq!(tau.len(), dropped.len());
    isa::drop_where(isa, tau, dropped)
}

/// The number of entries that tie.
pub fn count_ties(isa: Isa, tau: &[f32], ties: Ties) -> u64 {
    isa::count_ties(isa, tau, ties)
}

/// What is no entry's key: keys have 31 bits.
pub const NO_KEY: u32 = u32::MAX;

/// Marks a bin of [`histogram`] that holds keys other than its first: without it, the bin's keys are all equal. Never
/// reached by a count.
pub const STRAY: u64 = 1 << 63;

/// Counts keys into bins of 2^`shift` keys each, the first bin starting at key `low`.
///
/// Adds to `bins`; keys below `low` are ignored. A bin that counts a key other than its first is marked with [`STRAY`].
/// Returns the number of entries at or above the end of the last bin.
///
/// `common` changes nothing but the time it takes: a key that very many entries have is counted apart, without a visit
/// to each. [`NO_KEY`] if there is none.
pub fn histogram(isa: Isa, tau: &[f32], low: u32, shift: u32, common: u32, bins: &mut [u64]) -> u64 {
    assert!(shift < 32, "a key has 31 bits");
    isa::histogram(isa, tau, low, shift, common, bins)
}

/// Numbers of keys about two bounds; see [`collect`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Near {
    /// Above the upper bound.
    pub above: u64,
    /// Equal to the upper bound.
    pub at_high: u64,
    /// Between the bounds, whether they found room or not.
    pub between: u64,
    /// Equal to the lower bound, unless it is the upper one too.
    pub at_low: u64,
}

/// Counts keys about `low` and `high`, and writes those between them to `between`, in order, as far as there is room.
///
/// Bounds that a sample suggests are often keys that many entries share: these are counted, not written.
pub fn collect(isa: Isa, tau: &[f32], low: u32, high: u32, between: &mut [u32]) -> Near {
    assert!(low <= high && high < 1 << 31, "a range of keys");
    let near = isa::collect(isa, tau, low, high, between);
    if low < high { near } else { Near { at_low: 0, ..near } }
}

// ---- Elect --------------------------------------------------------------------------------------------------------

/// γ = sgn(Σ_t w_t τ_t), as -1.0, 0.0 or +1.0; 0.0 where the sum is NaN.
pub fn elect_mass(isa: Isa, taus: &[&[f32]], weights: &[f32], gamma: &mut [f32]) {
    assert_weighted(taus, weights, gamma.len());
    isa::elect_mass(isa, taus, weights, gamma);
}

/// γ = sgn(number of positive entries − number of negative entries) among the models.
pub fn elect_count(isa: Isa, taus: &[&[f32]], gamma: &mut [f32]) {
    assert_columns(taus, gamma.len());
    isa::elect_count(isa, taus, gamma);
}

/// γ = sgn(value), for signs that come from elsewhere; 0.0 for ±0.0 and NaN.
pub fn sign_of(isa: Isa, values: &[f32], gamma: &mut [f32]) {
    assert_eq!(values.len(), gamma.len());
    isa::sign_of(isa, values, gamma);
}

/// Replaces every γ = 0 by `sign`.
pub fn fill_zero_sign(isa: Isa, gamma: &mut [f32], sign: f32) {
    isa::fill_zero_sign(isa, gamma, sign);
}

/// Σ γ: the number of positive signs less the number of negative ones.
pub fn sum_signs(isa: Isa, gamma: &[f32]) -> i64 {
    isa::sum_signs(isa, gamma)
}

/// The number of positions at which some model is positive and some model negative.
pub fn conflicts(isa: Isa, taus: &[&[f32]]) -> u64 {
    assert_columns(taus, taus.first().map_or(0, |tau| tau.len()));
    isa::conflicts(isa, taus)
}

/// The number of positions at which both have the same sign, zeros having none.
pub fn agreeing(isa: Isa, tau: &[f32], other: &[f32]) -> u64 {
    assert_eq!(tau.len(), other.len());
    isa::agreeing(isa, tau, other)
}

// ---- Disjoint merge -----------------------------------------------------------------------------------------------

/// Asserts what the combining kernels need.
#[track_caller]
fn assert_combine(taus: &[&[f32]], weights: &[f32], gamma: Option<&[f32]>, elements: usize) {
    assert_weighted(taus, weights, elements);
    assert!(gamma.is_none_or(|gamma| gamma.len() == elements), "signs of {elements} elements");
}

/// Σ_A w τ / Σ_A w over A = {t : τ_t ≠ 0 and sgn τ_t = γ}; 0 where A is empty or its weights sum to 0.
///
/// Without `gamma`, A holds every model whose entry is not zero. With unit weights: the paper's mean by count.
pub fn combine_mean(isa: Isa, taus: &[&[f32]], weights: &[f32], gamma: Option<&[f32]>, out: &mut [f32]) {
    assert_combine(taus, weights, gamma, out.len());
    isa::combine_mean(isa, taus, weights, gamma, out);
}

/// Σ_A w τ over the A of [`combine_mean`].
pub fn combine_sum(isa: Isa, taus: &[&[f32]], weights: &[f32], gamma: Option<&[f32]>, out: &mut [f32]) {
    assert_combine(taus, weights, gamma, out.len());
    isa::combine_sum(isa, taus, weights, gamma, out);
}

/// The w τ of largest magnitude over the A of [`combine_mean`], the first model winning ties; 0 where A is empty.
pub fn combine_max(isa: Isa, taus: &[&[f32]], weights: &[f32], gamma: Option<&[f32]>, out: &mut [f32]) {
    assert_combine(taus, weights, gamma, out.len());
    isa::combine_max(isa, taus, weights, gamma, out);
}

/// Σ w max(F, floor) θ / Σ w max(F, floor) per element, in f64, rounded once.
///
/// `weights` are finite, not negative and not all zero, `floor` is above zero.
pub fn weighted_mean(isa: Isa, thetas: &[&[f32]], fishers: &[&[f32]], weights: &[f32], floor: f32, out: &mut [f32]) {
    assert_weighted(thetas, weights, out.len());
    assert_weighted(fishers, weights, out.len());
    isa::weighted_mean(isa, thetas, fishers, weights, floor, out);
}

/// Whether no value is negative, NaN or infinite.
pub fn all_weights(isa: Isa, values: &[f32]) -> bool {
    isa::all_weights(isa, values)
}

// ---- Matrices -----------------------------------------------------------------------------------------------------

/// c ± a · panel in f64, summed up in the order of the panel's rows: `a` has rows of `stride` entries, of which the first
/// `panel.len()` / [`PANEL`] count, and `c` as many rows of [`PANEL`] entries.
pub fn multiply(isa: Isa, a: &[f64], stride: usize, panel: &[f64], c: &mut [f64], subtract: bool) {
    assert!(c.len().is_multiple_of(PANEL) && panel.len().is_multiple_of(PANEL), "whole rows");
    isa::multiply(isa, a, stride, panel, c, subtract);
}

/// Replaces the lower triangle of the symmetric `a`, n × n, by its Cholesky factor. False, and no meaning in `a`, if a
/// pivot is not above `tolerance` times its diagonal entry. `scratch` has (n + [`PANEL`]) · 2 [`PANEL`] entries.
pub fn cholesky(isa: Isa, a: &mut [f64], n: usize, tolerance: f64, scratch: &mut [f64]) -> bool {
    assert!(a.len() == n * n && scratch.len() >= (n + PANEL) * 2 * PANEL, "a square matrix and its scratch");
    isa::cholesky(isa, a, n, tolerance, scratch)
}

/// Solves X L Lᵀ = P, P being the rows of `p` before and X after; L is the lower triangle of `l`, n × n, from
/// [`cholesky`]. `scratch` has (n + rows) · [`PANEL`] entries.
pub fn solve(isa: Isa, l: &[f64], n: usize, p: &mut [f64], scratch: &mut [f64]) {
    assert!(l.len() == n * n && p.len().is_multiple_of(n.max(1)), "a square matrix and rows as long");
    assert!(scratch.len() >= (n + p.len() / n.max(1)) * PANEL, "scratch");
    isa::solve(isa, l, n, p, scratch);
}

// ---- From stored bytes to stored bytes ---------------------------------------------------------------------------

/// Most models that [`merge_stored`] has loops for.
pub const FUSED_MODELS: usize = 8;

/// A merge that [`merge_stored`] knows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fused {
    /// Σ w θ / divisor.
    Average {
        /// What the sum is divided by.
        divisor: f32,
    },
    /// θ0 + λ Σ w τ.
    Sum {
        /// Factor of the sum.
        lambda: f32,
    },
    /// θ0 + λ Σ_A w τ̂ / Σ_A w: [`trim`], [`elect_mass`], [`fill_zero_sign`] and [`combine_mean`].
    Elected {
        /// The sign where an election cancels.
        zero_sign: f32,
        /// Factor of the mean.
        lambda: f32,
    },
}

/// The inputs of [`merge_stored`]: slices of equal length, stored as `float`.
#[derive(Debug, Clone, Copy)]
pub struct Stored<'a> {
    /// The type of all inputs and of the output.
    pub float: Float,
    /// θ0, for a merge of task vectors.
    pub base: Option<&'a [u8]>,
    /// θ_t.
    pub models: &'a [&'a [u8]],
    /// w_t, finite.
    pub weights: &'a [f32],
    /// The smallest key that survives, per model, at least 1; for [`Fused::Elected`].
    pub min_keys: &'a [u32],
    /// Whether entries with that key are counted.
    pub counts_ties: bool,
}

/// What [`merge_stored`] counts, added to what is there: an entry per model.
#[derive(Debug)]
pub struct Counted<'a> {
    /// Survivors ([`Fused::Elected`]).
    pub kept: &'a mut [u64],
    /// Those of them with the smallest key, where they are counted.
    pub tied: &'a mut [u64],
    /// Entries with the sign of the merged task vector (not for [`Fused::Average`]).
    pub agreeing: &'a mut [u64],
}

/// A whole merge in one loop: what the other kernels give one after the other, bit for bit.
///
/// Returns the number of positions at which survivors have either sign (not for [`Fused::Average`]). `None`, and no meaning
/// in `out`, if some input, task vector, sum of task vectors or result is not finite, or if there is no such loop: for other
/// types, more models, or an election with weights or λ that are not above zero or that survivors vanish under.
pub fn merge_stored(isa: Isa, fused: Fused, stored: &Stored<'_>, out: &mut [u8], counted: Counted<'_>) -> Option<u64> {
    let count = stored.models.len();
    assert!(stored.models.iter().chain(&stored.base).all(|input| input.len() == out.len()), "equal lengths");
    let counts = [counted.kept.len(), counted.tied.len(), counted.agreeing.len()];
    assert!(stored.weights.len() == count && counts == [count; 3], "one weight and count per model");
    match fused {
        Fused::Average { .. } => {}
        Fused::Sum { .. } => assert!(stored.base.is_some(), "task vectors need a base"),
        Fused::Elected { .. } => {
            assert!(stored.base.is_some() && stored.min_keys.len() == count, "task vectors need a base and thresholds");
            assert!(stored.min_keys.iter().all(|&key| key >= 1), "zeros never survive a trim");
        }
    }
    isa::merge_stored(isa, fused, stored, out, counted)
}

/// θ0 + λ τ, stored: what [`scale`], [`add`] and [`store`] give one after the other, bit for bit. `base` has the output's type.
///
/// False, and no meaning in `out`, if a result is not finite in that type, or may not be; and always for float64.
pub fn store_scaled(isa: Isa, float: Float, base: &[u8], tau: &[f32], lambda: f32, out: &mut [u8]) -> bool {
    assert_eq!([base.len(), out.len()], [tau.len() * float.width(); 2]);
    isa::store_scaled(isa, float, base, tau, lambda, out)
}

/// The least key that is not zero's (0 if there is none), and the greatest (0 of nothing).
pub fn key_range(isa: Isa, values: &[f32]) -> (u32, u32) {
    isa::key_range(isa, values)
}

// ---- Linear -------------------------------------------------------------------------------------------------------

/// Σ a·b in f64. The order of the sum depends on the length alone.
pub fn dot(isa: Isa, a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    isa::dot(isa, a, b)
}

/// values *= factor.
pub fn scale(isa: Isa, values: &mut [f32], factor: f32) {
    isa::scale(isa, values, factor);
}

/// values /= divisor.
pub fn divide(isa: Isa, values: &mut [f32], divisor: f32) {
    isa::divide(isa, values, divisor);
}

/// values += other.
pub fn add(isa: Isa, values: &mut [f32], other: &[f32]) {
    assert_eq!(values.len(), other.len());
    isa::add(isa, values, other);
}

/// acc += factor * values, product and sum rounded separately.
pub fn add_scaled(isa: Isa, acc: &mut [f32], factor: f32, values: &[f32]) {
    assert_eq!(acc.len(), values.len());
    isa::add_scaled(isa, acc, factor, values);
}
