//! Every algorithm, once: safe, generic over the stored type, written to be vectorised.
//!
//! - Inlined always, so that `isa.rs` can instantiate each one under an instruction set. Hence no closures around
//!   loops: a closure that the compiler chooses not to inline is compiled for the baseline.
//! - No data-dependent branch in a hot loop: selects are bit masks. Branches that skip whole blocks are allowed.
//! - Arithmetic is per element and in model order; only integers are summed across elements. Hence the results do not
//!   depend on vector width or on where a slice is cut. Multiplication and addition round separately (no FMA).
//! - Elements are independent, so the tail of a slice runs the same code with blocks of one lane.
//! - Counters are u32 within a stretch and u64 across stretches: 64-bit counters would halve the vector width.
//!
//! Counting keys has its own file, `count.rs`. This one does not check that slices match (the entry points in `mod.rs` do), and knows nothing of instruction sets.

use super::convert::{Codec, INFINITY, bytes_of_f64, keep, key, mask, select, with_codec};
use super::{Ties, draw};
use crate::dtype::Float;

pub(super) use super::count::{collect, histogram};
pub(super) use super::dense::{cholesky, multiply, solve};
pub(super) use super::fisher::{all_weights, weighted_mean};
pub(super) use super::fused::merge_stored;
pub(super) use super::scaled::{key_range, store_scaled};

/// Elements per block of the kernels that go through several models: large enough not to be unrolled into scalar
/// code, small enough for accumulators to live in registers or the nearest cache.
pub(super) const LANES: usize = 64;

/// Elements whose counts fit a u32 with room to spare.
const STRETCH: usize = 1 << 16;

/// The sign of a value as -1.0, 0.0 or +1.0; 0.0 for NaN.
#[inline(always)]
pub(super) fn sign(value: f32) -> f32 {
    let signed = mask(value > 0.0) | mask(value < 0.0);
    f32::from_bits(signed & (0x3f80_0000 | (value.to_bits() & 0x8000_0000)))
}

/// `L` elements of a slice.
#[inline(always)]
fn lanes<const L: usize>(values: &[f32], start: usize) -> &[f32; L] {
    values[start..].first_chunk().expect("slices have equal lengths")
}

// ---- Widening -----------------------------------------------------------------------------------------------------

#[inline(always)]
pub(super) fn load(float: Float, bytes: &[u8], out: &mut [f32]) {
    #[inline(always)]
    fn widen<C: Codec<W>, const W: usize>(bytes: &[u8], out: &mut [f32]) {
        for (bytes, out) in bytes.as_chunks::<W>().0.iter().zip(out) {
            *out = C::widen(*bytes);
        }
    }
    with_codec!(float, C => widen::<C, _>(bytes, out))
}

#[inline(always)]
pub(super) fn task_vector(float: Float, bytes: &[u8], base: &[f32], out: &mut [f32]) -> bool {
    #[inline(always)]
    fn subtract<C: Codec<W>, const W: usize>(bytes: &[u8], base: &[f32], out: &mut [f32]) -> bool {
        let mut found = 0;
        for ((bytes, base), out) in bytes.as_chunks::<W>().0.iter().zip(base).zip(out) {
            let tau = C::widen(*bytes) - base;
            *out = tau;
            found |= mask(key(tau) >= INFINITY);
        }
        found == 0
    }
    with_codec!(float, C => subtract::<C, _>(bytes, base, out))
}

#[inline(always)]
pub(super) fn trimmed_task_vector(
    float: Float,
    bytes: &[u8],
    base: &[f32],
    min_key: u32,
    out: &mut [f32],
) -> Option<u64> {
    #[inline(always)]
    fn subtract<C: Codec<W>, const W: usize>(bytes: &[u8], base: &[f32], min_key: u32, out: &mut [f32]) -> (u32, u32) {
        let (mut found, mut count) = (0, 0);
        for ((bytes, base), out) in bytes.as_chunks::<W>().0.iter().zip(base).zip(out) {
            let tau = C::widen(*bytes) - base;
            let kept = mask(key(tau) >= min_key);
            *out = keep(kept, tau);
            found |= mask(key(tau) >= INFINITY);
            count += kept & 1;
        }
        (found, count)
    }
    let mut survivors = 0;
    let stretches = bytes.chunks(STRETCH * float.width()).zip(base.chunks(STRETCH));
    for ((bytes, base), out) in stretches.zip(out.chunks_mut(STRETCH)) {
        let (found, count) = with_codec!(float, C => subtract::<C, _>(bytes, base, min_key, out));
        if found != 0 {
            return None;
        }
        survivors += u64::from(count);
    }
    Some(survivors)
}

/// Widens up to [`LANES`] elements to f64.
#[inline(always)]
fn load_f64(float: Float, bytes: &[u8], out: &mut [f64; LANES]) {
    #[inline(always)]
    fn widen<C: Codec<W>, const W: usize>(bytes: &[u8], out: &mut [f64; LANES]) {
        for (bytes, out) in bytes.as_chunks::<W>().0.iter().zip(out) {
            *out = C::widen_f64(*bytes);
        }
    }
    with_codec!(float, C => widen::<C, _>(bytes, out))
}

#[inline(always)]
pub(super) fn task_vector_f64(float: Float, bytes: &[u8], base_float: Float, base_bytes: &[u8], out: &mut [f32]) {
    let (mut model, mut base) = ([0.0; LANES], [0.0; LANES]);
    let blocks = bytes.chunks(LANES * float.width()).zip(base_bytes.chunks(LANES * base_float.width()));
    for ((bytes, base_bytes), out) in blocks.zip(out.chunks_mut(LANES)) {
        load_f64(float, bytes, &mut model);
        load_f64(base_float, base_bytes, &mut base);
        for ((out, model), base) in out.iter_mut().zip(&model).zip(&base) {
            *out = (model - base) as f32;
        }
    }
}

// ---- Narrowing ----------------------------------------------------------------------------------------------------

#[inline(always)]
pub(super) fn store(float: Float, values: &[f32], out: &mut [u8], clamp: bool) -> bool {
    #[inline(always)]
    fn narrow<C: Codec<W>, const W: usize>(values: &[f32], out: &mut [u8], clamp: bool) -> bool {
        let mut finite = true;
        for (values, out) in values.chunks(LANES).zip(out.as_chunks_mut::<W>().0.chunks_mut(LANES)) {
            let mut special = 0;
            for (value, out) in values.iter().zip(&mut *out) {
                let (bytes, beyond) = C::narrow_finite(*value);
                *out = bytes;
                special |= beyond;
            }
            if special != 0 {
                finite &= settle::<C, W>(values, out, clamp);
            }
        }
        finite
    }
    with_codec!(float, C => narrow::<C, _>(values, out, clamp))
}

/// Stores a block in which some value may not be finite; whether everything stored is.
fn settle<C: Codec<W>, const W: usize>(values: &[f32], out: &mut [[u8; W]], clamp: bool) -> bool {
    let mut finite = true;
    for (value, out) in values.iter().zip(out) {
        let (bytes, overflow) = C::narrow(*value, clamp);
        *out = bytes;
        finite &= value.is_finite() && (clamp || !overflow);
    }
    finite
}

#[inline(always)]
pub(super) fn store_sum_f64(base_float: Float, base_bytes: &[u8], values: &[f32], out: &mut [u8]) {
    let mut base = [0.0; LANES];
    let blocks = base_bytes.chunks(LANES * base_float.width()).zip(values.chunks(LANES));
    for ((base_bytes, values), out) in blocks.zip(out.chunks_mut(LANES * 8)) {
        load_f64(base_float, base_bytes, &mut base);
        for ((out, base), value) in out.as_chunks_mut::<8>().0.iter_mut().zip(&base).zip(values) {
            *out = bytes_of_f64(base + f64::from(*value));
        }
    }
}

// ---- Finiteness ---------------------------------------------------------------------------------------------------

#[inline(always)]
pub(super) fn all_finite(values: &[f32]) -> bool {
    for stretch in values.chunks(4096) {
        let mut found = 0;
        for value in stretch {
            found |= mask(key(*value) >= INFINITY);
        }
        if found != 0 {
            return false;
        }
    }
    true
}

// ---- Trim ---------------------------------------------------------------------------------------------------------

#[inline(always)]
pub(super) fn trim(tau: &mut [f32], min_key: u32) -> u64 {
    let mut survivors = 0;
    for stretch in tau.chunks_mut(STRETCH) {
        let mut count = 0;
        for tau in stretch {
            let kept = mask(key(*tau) >= min_key);
            *tau = keep(kept, *tau);
            count += kept & 1;
        }
        survivors += u64::from(count);
    }
    survivors
}

#[inline(always)]
pub(super) fn trim_sample(tau: &mut [f32], ties: Ties, draw_key: u64, first_index: u64, accept: u64) -> u64 {
    let mut survivors = 0;
    let mut index = first_index;
    let (blocks, rest) = tau.as_chunks_mut::<LANES>();
    for block in blocks {
        survivors += trim_sample_block(block, ties, draw_key, index, accept);
        index = index.wrapping_add(LANES as u64);
    }
    for block in rest.as_chunks_mut::<1>().0 {
        survivors += trim_sample_block(block, ties, draw_key, index, accept);
        index = index.wrapping_add(1);
    }
    survivors
}

#[inline(always)]
fn trim_sample_block<const L: usize>(tau: &mut [f32; L], ties: Ties, draw_key: u64, first: u64, accept: u64) -> u64 {
    let mut tied = [0; L];
    let mut any = 0;
    for (tied, tau) in tied.iter_mut().zip(&*tau) {
        *tied = ties.mask(key(*tau));
        any |= *tied;
    }
    // Drawing costs more than the rest together: blocks without a tie go without.
    if any != 0 {
        for (lane, tied) in tied.iter_mut().enumerate() {
            let draw = draw(draw_key, first.wrapping_add(lane as u64));
            *tied &= mask(draw < accept);
        }
    }
    let mut survivors = 0;
    for (tau, tied) in tau.iter_mut().zip(&tied) {
        let key = key(*tau);
        let kept = (mask(key > ties.high) | tied) & mask(key != 0);
        *tau = keep(kept, *tau);
        survivors += kept & 1;
    }
    u64::from(survivors)
}

#[inline(always)]
pub(super) fn trim_lowest(tau: &mut [f32], ties: Ties, quota: u64) -> (u64, u64) {
    let (mut survivors, mut ties_kept) = (0, 0);
    for block in tau.chunks_mut(1024) {
        let tied = count_ties(block, ties);
        let left = quota - ties_kept;
        if tied > 0 && tied <= left {
            survivors += trim(block, ties.low.max(1));
            ties_kept += tied;
        } else if tied == 0 || left == 0 {
            // Saturating: no key is as large as that.
            survivors += trim(block, ties.high.saturating_add(1));
        } else {
            survivors += trim_lowest_within(block, ties, left);
            ties_kept = quota;
        }
    }
    (survivors, ties_kept)
}

/// The block in which the quota runs out, entry by entry.
#[inline(always)]
fn trim_lowest_within(tau: &mut [f32], ties: Ties, mut left: u64) -> u64 {
    let mut survivors = 0;
    for tau in tau {
        let key = key(*tau);
        let tied = ties.mask(key) & mask(left > 0);
        left -= u64::from(tied & 1);
        let kept = (mask(key > ties.high) | tied) & mask(key != 0);
        *tau = keep(kept, *tau);
        survivors += u64::from(kept & 1);
    }
    survivors
}

#[inline(always)]
pub(super) fn drop_where(tau: &mut [f32], dropped: &[f32]) -> u64 {
    let mut survivors = 0;
    for (tau, dropped) in tau.chunks_mut(STRETCH).zip(dropped.chunks(STRETCH)) {
        let mut count = 0;
        for (tau, dropped) in tau.iter_mut().zip(dropped) {
            let kept = mask(key(*dropped) == 0) & mask(key(*tau) != 0);
            *tau = keep(kept, *tau);
            count += kept & 1;
        }
        survivors += u64::from(count);
    }
    survivors
}

#[inline(always)]
pub(super) fn count_ties(tau: &[f32], ties: Ties) -> u64 {
    let mut total = 0;
    for stretch in tau.chunks(STRETCH) {
        let mut count = 0;
        for tau in stretch {
            count += ties.mask(key(*tau)) & 1;
        }
        total += u64::from(count);
    }
    total
}

// ---- Elect --------------------------------------------------------------------------------------------------------

/// One output per position, computed from that position of every task vector.
trait Column {
    /// Computes the `L` outputs from position `start` on.
    fn block<const L: usize>(&self, start: usize, out: &mut [f32; L]);
}

/// Fills `out` block by block, the tail lane by lane.
#[inline(always)]
fn fill(out: &mut [f32], column: impl Column) {
    let (blocks, rest) = out.as_chunks_mut::<LANES>();
    let tail = blocks.len() * LANES;
    for (index, block) in blocks.iter_mut().enumerate() {
        column.block(index * LANES, block);
    }
    for (index, block) in rest.as_chunks_mut::<1>().0.iter_mut().enumerate() {
        column.block(tail + index, block);
    }
}

struct Mass<'a> {
    taus: &'a [&'a [f32]],
    weights: &'a [f32],
}

impl Column for Mass<'_> {
    #[inline(always)]
    fn block<const L: usize>(&self, start: usize, out: &mut [f32; L]) {
        let mut sum = [0.0; L];
        for (tau, weight) in self.taus.iter().zip(self.weights) {
            for (sum, tau) in sum.iter_mut().zip(lanes::<L>(tau, start)) {
                *sum += weight * tau;
            }
        }
        for (out, sum) in out.iter_mut().zip(&sum) {
            *out = sign(*sum);
        }
    }
}

#[inline(always)]
pub(super) fn elect_mass(taus: &[&[f32]], weights: &[f32], gamma: &mut [f32]) {
    fill(gamma, Mass { taus, weights });
}

struct Majority<'a> {
    taus: &'a [&'a [f32]],
}

impl Column for Majority<'_> {
    #[inline(always)]
    fn block<const L: usize>(&self, start: usize, out: &mut [f32; L]) {
        let mut votes = [0u32; L];
        for tau in self.taus {
            for (votes, tau) in votes.iter_mut().zip(lanes::<L>(tau, start)) {
                *votes = votes.wrapping_sub(mask(*tau > 0.0)).wrapping_add(mask(*tau < 0.0));
            }
        }
        for (out, votes) in out.iter_mut().zip(&votes) {
            *out = sign(*votes as i32 as f32);
        }
    }
}

#[inline(always)]
pub(super) fn elect_count(taus: &[&[f32]], gamma: &mut [f32]) {
    fill(gamma, Majority { taus });
}

#[inline(always)]
pub(super) fn sign_of(values: &[f32], gamma: &mut [f32]) {
    for (gamma, value) in gamma.iter_mut().zip(values) {
        *gamma = sign(*value);
    }
}

#[inline(always)]
pub(super) fn fill_zero_sign(gamma: &mut [f32], sign: f32) {
    for gamma in gamma {
        let zero = mask(key(*gamma) == 0);
        *gamma = f32::from_bits(select(zero, sign.to_bits(), gamma.to_bits()));
    }
}

#[inline(always)]
pub(super) fn sum_signs(gamma: &[f32]) -> i64 {
    let mut total = 0;
    for stretch in gamma.chunks(STRETCH) {
        let mut sum = 0i32;
        for gamma in stretch {
            sum += i32::from(*gamma > 0.0) - i32::from(*gamma < 0.0);
        }
        total += i64::from(sum);
    }
    total
}

#[inline(always)]
pub(super) fn agreeing(tau: &[f32], other: &[f32]) -> u64 {
    let mut total = 0;
    // Short runs, whose count fits the lanes that compare.
    for (tau, other) in tau.chunks(1024).zip(other.chunks(1024)) {
        let mut count = 0u32;
        for (a, b) in tau.iter().zip(other) {
            count += (mask(*a > 0.0) & mask(*b > 0.0) | mask(*a < 0.0) & mask(*b < 0.0)) & 1;
        }
        total += u64::from(count);
    }
    total
}

#[inline(always)]
pub(super) fn conflicts(taus: &[&[f32]]) -> u64 {
    let len = taus.first().map_or(0, |tau| tau.len());
    let tail = len - len % LANES;
    let mut total = 0;
    for start in (0..tail).step_by(LANES) {
        total += conflicts_block::<LANES>(taus, start);
    }
    for start in tail..len {
        total += conflicts_block::<1>(taus, start);
    }
    total
}

#[inline(always)]
fn conflicts_block<const L: usize>(taus: &[&[f32]], start: usize) -> u64 {
    let (mut least, mut greatest) = ([0.0f32; L], [0.0f32; L]);
    for tau in taus {
        let tau = lanes::<L>(tau, start);
        for lane in 0..L {
            least[lane] = if tau[lane] < least[lane] { tau[lane] } else { least[lane] };
            greatest[lane] = if tau[lane] > greatest[lane] { tau[lane] } else { greatest[lane] };
        }
    }
    let mut count = 0;
    for (least, greatest) in least.iter().zip(&greatest) {
        count += mask(*least < 0.0) & mask(*greatest > 0.0) & 1;
    }
    u64::from(count)
}

// ---- Disjoint merge -----------------------------------------------------------------------------------------------

/// What the three combinations share; `ELECTED` says whether `gamma` holds signs or is ignored (and empty).
struct Members<'a, const ELECTED: bool> {
    taus: &'a [&'a [f32]],
    weights: &'a [f32],
    gamma: &'a [f32],
}

impl<const ELECTED: bool> Members<'_, ELECTED> {
    /// The elected signs of a block.
    #[inline(always)]
    fn signs<const L: usize>(&self, start: usize) -> [f32; L] {
        if ELECTED { *lanes(self.gamma, start) } else { [0.0; L] }
    }

    /// All ones where an entry belongs to the set A of its position. The product with a sign is exact.
    #[inline(always)]
    fn member(tau: f32, gamma: f32) -> u32 {
        if ELECTED { mask(tau * gamma > 0.0) } else { mask(tau != 0.0) }
    }
}

struct Mean<'a, const ELECTED: bool>(Members<'a, ELECTED>);

impl<const ELECTED: bool> Column for Mean<'_, ELECTED> {
    #[inline(always)]
    fn block<const L: usize>(&self, start: usize, out: &mut [f32; L]) {
        let gamma = self.0.signs::<L>(start);
        let (mut sum, mut divisor) = ([0.0; L], [0.0; L]);
        for (tau, weight) in self.0.taus.iter().zip(self.0.weights) {
            let tau = lanes::<L>(tau, start);
            for lane in 0..L {
                let member = Members::<ELECTED>::member(tau[lane], gamma[lane]);
                sum[lane] += keep(member, weight * tau[lane]);
                divisor[lane] += keep(member, *weight);
            }
        }
        for ((out, sum), divisor) in out.iter_mut().zip(&sum).zip(&divisor) {
            *out = keep(mask(*divisor != 0.0), sum / divisor);
        }
    }
}

struct Sum<'a, const ELECTED: bool>(Members<'a, ELECTED>);

impl<const ELECTED: bool> Column for Sum<'_, ELECTED> {
    #[inline(always)]
    fn block<const L: usize>(&self, start: usize, out: &mut [f32; L]) {
        let gamma = self.0.signs::<L>(start);
        let mut sum = [0.0; L];
        for (tau, weight) in self.0.taus.iter().zip(self.0.weights) {
            let tau = lanes::<L>(tau, start);
            for lane in 0..L {
                let member = Members::<ELECTED>::member(tau[lane], gamma[lane]);
                sum[lane] += keep(member, weight * tau[lane]);
            }
        }
        *out = sum;
    }
}

struct Max<'a, const ELECTED: bool>(Members<'a, ELECTED>);

impl<const ELECTED: bool> Column for Max<'_, ELECTED> {
    #[inline(always)]
    fn block<const L: usize>(&self, start: usize, out: &mut [f32; L]) {
        let gamma = self.0.signs::<L>(start);
        let mut best = [0u32; L];
        for (tau, weight) in self.0.taus.iter().zip(self.0.weights) {
            let tau = lanes::<L>(tau, start);
            for lane in 0..L {
                let member = Members::<ELECTED>::member(tau[lane], gamma[lane]);
                let candidate = keep(member, weight * tau[lane]);
                let larger = mask(key(candidate) > key(f32::from_bits(best[lane])));
                best[lane] = select(larger, candidate.to_bits(), best[lane]);
            }
        }
        *out = best.map(f32::from_bits);
    }
}

macro_rules! combine {
    ($($name:ident: $column:ident;)*) => {$(
        #[inline(always)]
        pub(super) fn $name(taus: &[&[f32]], weights: &[f32], gamma: Option<&[f32]>, out: &mut [f32]) {
            match gamma {
                Some(gamma) => fill(out, $column(Members::<true> { taus, weights, gamma })),
                None => fill(out, $column(Members::<false> { taus, weights, gamma: &[] })),
            }
        }
    )*};
}

combine! {
    combine_mean: Mean;
    combine_sum: Sum;
    combine_max: Max;
}

// ---- Linear -------------------------------------------------------------------------------------------------------

#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f64 {
    // One sum per lane, so that lanes can be worked on together. Products of two f32 are exact in f64.
    let mut sums = [0.0f64; LANES];
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += f64::from(*a) * f64::from(*b);
        }
    }
    let mut total = 0.0;
    for sum in sums {
        total += sum;
    }
    total
}

#[inline(always)]
pub(super) fn scale(values: &mut [f32], factor: f32) {
    for value in values {
        *value *= factor;
    }
}

#[inline(always)]
pub(super) fn divide(values: &mut [f32], divisor: f32) {
    for value in values {
        *value /= divisor;
    }
}

#[inline(always)]
pub(super) fn add(values: &mut [f32], other: &[f32]) {
    for (value, other) in values.iter_mut().zip(other) {
        *value += other;
    }
}

#[inline(always)]
pub(super) fn add_scaled(acc: &mut [f32], factor: f32, values: &[f32]) {
    for (acc, value) in acc.iter_mut().zip(values) {
        *acc += factor * value;
    }
}
