//! What one thread counts and adds up over the tiles of a chunk.
//!
//! - Signs are kept as bit planes, one bit per element: agreement of pairs, conflicts within subsets and survival are
//!   then a few operations per 64 elements, however many models there are.
//! - Sums restart with every block of [`BLOCK_ELEMENTS`] elements of the tensor.

use super::super::cut::Cut;
use super::super::slot::{Loaded, Span};
use super::super::worker::{Worker, with_refs};
use super::measures::{BIN_SHIFT, BINS, Count, FIRST_EXPONENT, MOMENTS, Shape, Sum, WAYS};
use crate::error::Result;
use crate::kernels::{self, Isa, NO_KEY, STRAY, Ties};
use crate::limits::TILE_ELEMENTS;
use crate::method::Tile;

/// Elements over which sums run in one go.
pub(super) const BLOCK_ELEMENTS: u64 = 1 << 16;
/// Words of a bit plane.
const WORDS: usize = TILE_ELEMENTS / 64;

const _: () = assert!(BLOCK_ELEMENTS.is_multiple_of(TILE_ELEMENTS as u64) && TILE_ELEMENTS.is_multiple_of(64));

/// What is looked for, the same for all threads.
pub(super) struct Aim {
    pub shape: Shape,
    /// Which of the densities the family is merged at.
    pub chosen: usize,
    /// Subsets of models, by their numbers.
    pub subsets: Vec<Vec<usize>>,
}

/// What survives at each density: K × n, with the keys that tie with the threshold.
pub(super) struct Cuts {
    pub cuts: Vec<Cut>,
    pub ties: Vec<Option<Ties>>,
}

/// Bit planes of the models' signs: positive entries, and negative ones.
struct Signs {
    planes: Vec<[[u64; WORDS]; 2]>,
}

impl Signs {
    fn new(vectors: usize) -> Self {
        Self { planes: vec![[[0; WORDS]; 2]; vectors] }
    }

    fn clear(&mut self) {
        self.planes.fill([[0; WORDS]; 2]);
    }

    fn set(&mut self, vector: usize, values: &[f32]) {
        let [positive, negative] = &mut self.planes[vector];
        for (word, values) in values.chunks(64).enumerate() {
            let (mut above, mut below) = (0, 0);
            for (bit, &value) in values.iter().enumerate() {
                above |= u64::from(value > 0.0) << bit;
                below |= u64::from(value < 0.0) << bit;
            }
            (positive[word], negative[word]) = (above, below);
        }
    }

    /// Entries that are not zero.
    fn present(&self, vector: usize) -> u64 {
        self.planes[vector].iter().flatten().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Entries of equal sign and of opposite sign.
    fn compare(&self, a: usize, other: &Self, b: usize) -> (u64, u64) {
        let ([above, below], [above_b, below_b]) = (&self.planes[a], &other.planes[b]);
        let (mut alike, mut opposed) = (0, 0);
        for word in 0..WORDS {
            alike += ((above[word] & above_b[word]) | (below[word] & below_b[word])).count_ones();
            opposed += ((above[word] & below_b[word]) | (below[word] & above_b[word])).count_ones();
        }
        (u64::from(alike), u64::from(opposed))
    }

    /// Elements that are positive in one of `vectors` and negative in another.
    fn conflicts(&self, vectors: impl Iterator<Item = usize>) -> u64 {
        let (mut above, mut below) = ([0; WORDS], [0; WORDS]);
        for vector in vectors {
            let [positive, negative] = &self.planes[vector];
            for word in 0..WORDS {
                above[word] |= positive[word];
                below[word] |= negative[word];
            }
        }
        above.iter().zip(&below).map(|(above, below)| u64::from((above & below).count_ones())).sum()
    }
}

/// See the module's documentation.
pub(super) struct Meter {
    /// τ̂ of each model at one density.
    trimmed: Vec<Vec<f32>>,
    /// What the ways to merge make of the tile.
    merged: [Vec<f32>; WAYS],
    scratch: Vec<f32>,
    before: Signs,
    after: Signs,
    /// One vector: the merged one.
    way: Signs,
    /// Per element: models in which it survives, and in which it is positive.
    survivors: Vec<u8>,
    positive: Vec<u8>,
    bins: Vec<u64>,
    /// Counts of the chunk.
    pub counts: Vec<u64>,
    /// Sums of the block.
    sums: Vec<f64>,
}

impl Meter {
    pub(super) fn new(shape: &Shape) -> Self {
        let tile = || vec![0.0; TILE_ELEMENTS];
        Self {
            trimmed: (0..shape.models).map(|_| tile()).collect(),
            merged: std::array::from_fn(|_| tile()),
            scratch: tile(),
            before: Signs::new(shape.models),
            after: Signs::new(shape.models),
            way: Signs::new(1),
            survivors: vec![0; TILE_ELEMENTS],
            positive: vec![0; TILE_ELEMENTS],
            bins: vec![0; shape.models * BINS],
            counts: vec![0; shape.counts()],
            sums: vec![0.0; shape.sums()],
        }
    }

    /// What one takes.
    pub(super) fn bytes(shape: &Shape) -> u64 {
        let tiles = (shape.models + WAYS + 1) * TILE_ELEMENTS * 4 + 2 * TILE_ELEMENTS;
        let planes = (2 * shape.models + 1) * TILE_ELEMENTS / 4;
        (tiles + planes + shape.models * (BINS * 8 + 48)) as u64 + shape.bytes()
    }

    /// Measures a chunk that begins with a block: its counts are in [`Self::counts`] afterwards, and the sums of its
    /// blocks were given to `each`, in order.
    pub(super) fn measure(
        &mut self,
        worker: &mut Worker,
        data: Loaded<'_>,
        aim: &Aim,
        cuts: &Cuts,
        mut each: impl FnMut(&[f64]),
    ) -> Result<()> {
        self.counts.fill(0);
        self.bins.fill(0);
        self.sums.fill(0.0);
        worker.set_weights(data);
        for span in data.tiles() {
            self.tile(worker, span, aim, cuts)?;
            let end = (span.from + span.length) as u64;
            if end.is_multiple_of(BLOCK_ELEMENTS) || end == data.chunk.count {
                each(&self.sums);
                self.sums.fill(0.0);
            }
        }
        let shape = &aim.shape;
        self.counts[shape.count(Count::Elements)][0] = data.chunk.count;
        for &(model, _) in data.merge().models {
            self.counts[shape.count(Count::Present)][model as usize] = data.chunk.count;
        }
        let bins = self.bins.iter().map(|bin| bin & !STRAY);
        self.counts[shape.count(Count::Magnitudes)].iter_mut().zip(bins).for_each(|(count, bin)| *count += bin);
        Ok(())
    }

    fn tile(&mut self, worker: &mut Worker, span: Span<'_>, aim: &Aim, cuts: &Cuts) -> Result<()> {
        let models = span.data.merge().models;
        self.before.clear();
        self.after.clear();
        worker.load_base(span);
        for &(model, piece) in models {
            worker.task_vector(span, (model as usize, piece))?;
            self.untrimmed(worker, span, model as usize, aim);
        }
        // The density that counts comes last, so that its task vectors are there afterwards.
        for density in (0..aim.shape.densities).filter(|&k| k != aim.chosen).chain([aim.chosen]) {
            self.trim(worker, span, aim, cuts, density);
        }
        self.ways(worker, span);
        self.pairs(worker, span, aim);
        self.survival(worker, span, aim);
        self.influence(span, aim);
        for (subset, count) in aim.subsets.iter().zip(&mut self.counts[aim.shape.count(Count::Subsets)]) {
            *count += self.after.conflicts(subset.iter().copied());
        }
        Ok(())
    }

    /// What there is to say about one task vector as it is.
    fn untrimmed(&mut self, worker: &Worker, span: Span<'_>, model: usize, aim: &Aim) {
        let (isa, shape) = (worker.isa, &aim.shape);
        let tau = &worker.tiles.inputs[model][..span.length];
        self.before.set(model, tau);
        let nonzero = self.before.present(model);
        self.counts[shape.count(Count::NonZero)][model] += nonzero;
        let bins = &mut self.bins[model * BINS..(model + 1) * BINS];
        let total = |bins: &[u64]| bins.iter().map(|bin| bin & !STRAY).sum::<u64>();
        let before = total(bins);
        let low = ((FIRST_EXPONENT + 127) as u32) << 23;
        let above = kernels::histogram(isa, tau, low, BIN_SHIFT, NO_KEY, bins);
        bins[0] += nonzero - above - (total(bins) - before);
        bins[BINS - 1] += above;
        self.sums[shape.sum(Sum::Mass)][model] += mass(tau);
        self.sums[shape.sum(Sum::Squares)][model] += kernels::dot(isa, tau, tau);
    }

    /// Trims all task vectors at one density.
    fn trim(&mut self, worker: &Worker, span: Span<'_>, aim: &Aim, cuts: &Cuts, density: usize) {
        let (isa, shape) = (worker.isa, &aim.shape);
        for &(model, _) in span.data.merge().models {
            let model = model as usize;
            let at = density * shape.models + model;
            let (tau, trimmed) = (&worker.tiles.inputs[model][..span.length], &mut self.trimmed[model][..span.length]);
            trimmed.copy_from_slice(tau);
            self.counts[shape.count(Count::Kept)][at] += cuts.cuts[at].apply(isa, trimmed, span.element(0), &mut 0);
            if let Some(ties) = cuts.ties[at] {
                self.counts[shape.count(Count::Ties)][at] += kernels::count_ties(isa, tau, ties);
            }
            self.sums[shape.sum(Sum::SquaresKept)][at] += kernels::dot(isa, trimmed, trimmed);
        }
        let conflicts =
            with_refs(&self.trimmed, span.data.merge().models, span.length, |taus| kernels::conflicts(isa, taus));
        self.counts[shape.count(Count::Conflicts)][density] += conflicts;
    }

    /// Merges the tile in each way.
    fn ways(&mut self, worker: &Worker, span: Span<'_>) {
        let (isa, models, length) = (worker.isa, span.data.merge().models, span.length);
        let weights = &worker.weights[..];
        let [plain, disjoint, ties] = &mut self.merged;
        plain_mean(isa, &worker.tiles.inputs, models.iter().map(|&(m, _)| m as usize), weights, &mut plain[..length]);
        let merger = &span.data.plan.params_of(span.data.chunk.tensor).merger;
        with_refs(&self.trimmed, models, length, |inputs| {
            kernels::combine_mean(isa, inputs, weights, None, &mut disjoint[..length]);
            let row = span.data.row();
            let tile = Tile { isa, inputs, weights, statistics: &[], oracle: None, majority: 0.0, facts: &[], row };
            merger.merge(&tile, &mut ties[..length], &mut self.scratch[..length]);
        });
        self.way.clear();
        self.way.set(0, &ties[..length]);
        for &(model, _) in models {
            self.after.set(model as usize, &self.trimmed[model as usize][..length]);
        }
    }

    /// How alike the task vectors are.
    fn pairs(&mut self, worker: &Worker, span: Span<'_>, aim: &Aim) {
        let (isa, shape, raw) = (worker.isa, &aim.shape, &worker.tiles.inputs);
        let has = |model: usize| span.data.merge().models.iter().any(|&(m, _)| m as usize == model);
        for (at, (a, b)) in shape.pairs().enumerate().filter(|&(_, (a, b))| has(a) && has(b)) {
            let dot = |tiles: &[Vec<f32>]| kernels::dot(isa, &tiles[a][..span.length], &tiles[b][..span.length]);
            self.sums[shape.sum(Sum::Dots)][at] += dot(raw);
            self.sums[shape.sum(Sum::DotsTrimmed)][at] += dot(&self.trimmed);
            let (alike, opposed) = self.before.compare(a, &self.before, b);
            self.counts[shape.count(Count::Alike)][at] += alike;
            self.counts[shape.count(Count::Opposed)][at] += opposed;
            let (alike, opposed) = self.after.compare(a, &self.after, b);
            self.counts[shape.count(Count::AlikeTrimmed)][at] += alike;
            self.counts[shape.count(Count::OpposedTrimmed)][at] += opposed;
        }
    }

    /// What of each model is found in the merged task vector.
    fn survival(&mut self, worker: &Worker, span: Span<'_>, aim: &Aim) {
        let (isa, shape, length) = (worker.isa, &aim.shape, span.length);
        let merged = &self.merged[WAYS - 1][..length];
        for &(model, _) in span.data.merge().models {
            let model = model as usize;
            let (tau, trimmed) = (&worker.tiles.inputs[model][..length], &self.trimmed[model][..length]);
            let (agreeing, _) = self.after.compare(model, &self.way, 0);
            self.counts[shape.count(Count::Agreeing)][model] += agreeing;
            self.sums[shape.sum(Sum::MassKept)][model] += mass(trimmed);
            self.sums[shape.sum(Sum::MassAgreeing)][model] += mass_agreeing(trimmed, merged);
            self.sums[shape.sum(Sum::DotsMerged)][model] += kernels::dot(isa, tau, merged);
        }
        self.sums[shape.sum(Sum::Merged)][0] += kernels::dot(isa, merged, merged);
    }

    /// In how many models each element survives, with which signs, and what the ways to merge make of it.
    fn influence(&mut self, span: Span<'_>, aim: &Aim) {
        let (shape, length) = (&aim.shape, span.length);
        let (survivors, positive) = (&mut self.survivors[..length], &mut self.positive[..length]);
        survivors.fill(0);
        positive.fill(0);
        for &(model, _) in span.data.merge().models {
            let trimmed = &self.trimmed[model as usize][..length];
            for ((survivors, positive), &tau) in survivors.iter_mut().zip(positive.iter_mut()).zip(trimmed) {
                *survivors += u8::from(tau != 0.0);
                *positive += u8::from(tau > 0.0);
            }
        }
        let [plain, disjoint, ties] = &self.merged;
        let (classes, buckets) = (shape.sum(Sum::Classes).start, shape.sum(Sum::Agreement).start);
        let (influential, agreement) = (shape.count(Count::Influential).start, shape.count(Count::Agreement).start);
        for at in 0..length {
            let survivors = usize::from(self.survivors[at]);
            self.counts[influential + survivors] += 1;
            let values = [plain[at], disjoint[at], ties[at]];
            add_moments(&mut self.sums[classes + survivors.min(2) * WAYS * MOMENTS..], values);
            if survivors >= 2 {
                let bucket = bucket(survivors, usize::from(self.positive[at]));
                self.counts[agreement + bucket] += 1;
                add_moments(&mut self.sums[buckets + bucket * WAYS * MOMENTS..], values);
            }
        }
    }
}

/// Adds the magnitude of each value, and its square, to the sums.
#[inline]
fn add_moments(sums: &mut [f64], values: [f32; WAYS]) {
    for (sums, value) in sums.chunks_exact_mut(MOMENTS).zip(values) {
        let magnitude = f64::from(value.abs());
        sums[0] += magnitude;
        sums[1] += magnitude * magnitude;
    }
}

/// Where `positive` of `survivors` entries put an element: by tenths of max(positive, negative) / survivors from 0.5 on,
/// and exactly 1 on its own.
pub(super) fn bucket(survivors: usize, positive: usize) -> usize {
    let most = positive.max(survivors - positive);
    if most == survivors { super::measures::BUCKETS - 1 } else { 10 * most / survivors - 5 }
}

/// Σ w τ / Σ w over all entries, trimmed or not; zero where the weights sum to zero.
fn plain_mean(isa: Isa, taus: &[Vec<f32>], models: impl Iterator<Item = usize>, weights: &[f32], out: &mut [f32]) {
    out.fill(0.0);
    let length = out.len();
    for (model, &weight) in models.zip(weights) {
        kernels::add_scaled(isa, out, weight, &taus[model][..length]);
    }
    let total: f32 = weights.iter().sum();
    if total == 0.0 {
        out.fill(0.0);
    } else {
        kernels::divide(isa, out, total);
    }
}

/// Σ|x|, in eight interleaved sums that are added in order.
fn mass(values: &[f32]) -> f64 {
    masses(values.iter().map(|value| f64::from(value.abs())))
}

/// Σ|x| over the entries whose sign is that of `way`.
fn mass_agreeing(values: &[f32], way: &[f32]) -> f64 {
    let agreeing = |value: f32, way: f32| (value > 0.0 && way > 0.0) || (value < 0.0 && way < 0.0);
    masses(values.iter().zip(way).map(|(&value, &way)| if agreeing(value, way) { f64::from(value.abs()) } else { 0.0 }))
}

fn masses(values: impl Iterator<Item = f64>) -> f64 {
    let mut sums = [0.0; 8];
    values.enumerate().for_each(|(at, value)| sums[at % 8] += value);
    sums.iter().fold(0.0, |total, sum| total + sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agreement_falls_into_tenths() {
        let of = |survivors, positive| bucket(survivors, positive);
        assert_eq!([of(2, 1), of(2, 2), of(2, 0), of(3, 1), of(3, 2)], [0, 5, 5, 1, 1]);
        assert_eq!([of(5, 3), of(5, 4), of(10, 9), of(10, 1), of(10, 5), of(128, 127)], [1, 3, 4, 4, 0, 4]);
    }

    #[test]
    fn planes_know_signs_and_conflicts() {
        let mut signs = Signs::new(3);
        let mut values = vec![0.0f32; 130];
        (values[0], values[64], values[129]) = (1.0, -1.0, 2.0);
        signs.set(0, &values);
        values[64] = 3.0;
        values[1] = -0.0;
        signs.set(1, &values);
        assert_eq!((signs.present(0), signs.compare(0, &signs, 1)), (3, (2, 1)));
        assert_eq!((signs.conflicts([0, 1].into_iter()), signs.conflicts([0, 2].into_iter())), (1, 0));
    }
}
