//! The numbers of a look at a family, as two flat lists: counts, and sums in f64. So they add up, travel and are stored
//! alike, whether they are about a tensor, a layer, a kind of layer or the whole model.
//!
//! Counts are integers and add up in any order. Sums are added block by block, in the order of the elements, so that
//! neither threads nor chunks show in a digit.

use std::ops::Range;

/// Bins of a magnitude histogram, two per octave.
pub(super) const BINS: usize = 96;
/// Bits of a key that a bin leaves out: the exponent and the first bit of the fraction remain.
pub(super) const BIN_SHIFT: u32 = 22;
/// Exponent of the first bin's lower end: all smaller magnitudes but zero count there, and all larger ones in the last.
pub(super) const FIRST_EXPONENT: i32 = -40;
/// Parameters that survive the trim in no model, in one, in more.
pub(super) const CLASSES: usize = 3;
/// Sign agreement of parameters with two survivors or more: tenths from 0.5, and exactly 1.
pub(super) const BUCKETS: usize = 6;
/// Ways to merge that are compared: plain mean, trimmed disjoint mean, TIES.
pub(super) const WAYS: usize = 3;
/// Sums over magnitudes: of them, and of their squares.
pub(super) const MOMENTS: usize = 2;

/// Groups of counts. n models, K densities, P pairs of models, S subsets of models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Count {
    /// 1: merged elements.
    Elements,
    /// n: elements of the tensors that the model has.
    Present,
    /// n: entries of the task vector that are not zero.
    NonZero,
    /// n × [`BINS`]: magnitudes.
    Magnitudes,
    /// K × n: entries kept.
    Kept,
    /// K × n: entries equal to the threshold.
    Ties,
    /// K: elements whose survivors disagree in sign.
    Conflicts,
    /// P: entries of equal sign in both, before the trim.
    Alike,
    /// P: entries of opposite sign.
    Opposed,
    /// P: entries of equal sign in both, after it.
    AlikeTrimmed,
    /// P: entries of opposite sign.
    OpposedTrimmed,
    /// n: entries kept that point the way the merged task vector does.
    Agreeing,
    /// n + 1: elements that survive in 0, 1, ..., n models.
    Influential,
    /// [`BUCKETS`]: elements with two survivors or more, by sign agreement.
    Agreement,
    /// S: elements whose survivors among the subset disagree.
    Subsets,
}

const COUNTS: [Count; 15] = [
    Count::Elements,
    Count::Present,
    Count::NonZero,
    Count::Magnitudes,
    Count::Kept,
    Count::Ties,
    Count::Conflicts,
    Count::Alike,
    Count::Opposed,
    Count::AlikeTrimmed,
    Count::OpposedTrimmed,
    Count::Agreeing,
    Count::Influential,
    Count::Agreement,
    Count::Subsets,
];

/// Groups of sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sum {
    /// n: Σ|τ|.
    Mass,
    /// n: Σ|τ̂|.
    MassKept,
    /// n: Σ|τ̂| over the entries that point the way the merged task vector does.
    MassAgreeing,
    /// n: Σ τ².
    Squares,
    /// K × n: Σ τ̂² at each density.
    SquaresKept,
    /// P: Σ τ_a τ_b.
    Dots,
    /// P: Σ τ̂_a τ̂_b.
    DotsTrimmed,
    /// n: Σ τ τ_m with the merged task vector τ_m.
    DotsMerged,
    /// 1: Σ τ_m².
    Merged,
    /// [`CLASSES`] × [`WAYS`] × [`MOMENTS`].
    Classes,
    /// [`BUCKETS`] × [`WAYS`] × [`MOMENTS`].
    Agreement,
}

const SUMS: [Sum; 11] = [
    Sum::Mass,
    Sum::MassKept,
    Sum::MassAgreeing,
    Sum::Squares,
    Sum::SquaresKept,
    Sum::Dots,
    Sum::DotsTrimmed,
    Sum::DotsMerged,
    Sum::Merged,
    Sum::Classes,
    Sum::Agreement,
];

/// Where each group lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shape {
    pub models: usize,
    pub densities: usize,
    pub subsets: usize,
    counts: [usize; COUNTS.len() + 1],
    sums: [usize; SUMS.len() + 1],
}

impl Shape {
    pub(super) fn new(models: usize, densities: usize, subsets: usize) -> Self {
        let pairs = models * models.saturating_sub(1) / 2;
        let count = |what| match what {
            Count::Elements => 1,
            Count::Present | Count::NonZero | Count::Agreeing => models,
            Count::Magnitudes => models * BINS,
            Count::Kept | Count::Ties => densities * models,
            Count::Conflicts => densities,
            Count::Alike | Count::Opposed | Count::AlikeTrimmed | Count::OpposedTrimmed => pairs,
            Count::Influential => models + 1,
            Count::Agreement => BUCKETS,
            Count::Subsets => subsets,
        };
        let sum = |what| match what {
            Sum::Mass | Sum::MassKept | Sum::MassAgreeing | Sum::Squares | Sum::DotsMerged => models,
            Sum::SquaresKept => densities * models,
            Sum::Dots | Sum::DotsTrimmed => pairs,
            Sum::Merged => 1,
            Sum::Classes => CLASSES * WAYS * MOMENTS,
            Sum::Agreement => BUCKETS * WAYS * MOMENTS,
        };
        let mut shape = Self { models, densities, subsets, counts: [0; COUNTS.len() + 1], sums: [0; SUMS.len() + 1] };
        for (at, what) in COUNTS.into_iter().enumerate() {
            shape.counts[at + 1] = shape.counts[at] + count(what);
        }
        for (at, what) in SUMS.into_iter().enumerate() {
            shape.sums[at + 1] = shape.sums[at] + sum(what);
        }
        shape
    }

    /// Number of counts.
    pub(super) fn counts(&self) -> usize {
        self.counts[COUNTS.len()]
    }

    /// Number of sums.
    pub(super) fn sums(&self) -> usize {
        self.sums[SUMS.len()]
    }

    pub(super) fn count(&self, what: Count) -> Range<usize> {
        self.counts[what as usize]..self.counts[what as usize + 1]
    }

    pub(super) fn sum(&self, what: Sum) -> Range<usize> {
        self.sums[what as usize]..self.sums[what as usize + 1]
    }

    /// Bytes of one set of numbers.
    pub(super) fn bytes(&self) -> u64 {
        8 * (self.counts() + self.sums()) as u64 + size_of::<Measures>() as u64
    }

    /// All pairs of models in the order of their numbers: (0, 1), (0, 2), ..., (1, 2), ...
    pub(super) fn pairs(&self) -> impl Iterator<Item = (usize, usize)> {
        let models = self.models;
        (0..models).flat_map(move |a| (a + 1..models).map(move |b| (a, b)))
    }
}

/// One set of numbers.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Measures {
    pub counts: Vec<u64>,
    pub sums: Vec<f64>,
}

impl Measures {
    pub(super) fn new(shape: &Shape) -> Self {
        Self { counts: vec![0; shape.counts()], sums: vec![0.0; shape.sums()] }
    }

    pub(super) fn clear(&mut self) {
        self.counts.fill(0);
        self.sums.fill(0.0);
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.add_counts(&other.counts);
        self.add_sums(&other.sums);
    }

    pub(super) fn add_counts(&mut self, counts: &[u64]) {
        self.counts.iter_mut().zip(counts).for_each(|(total, count)| *total += count);
    }

    pub(super) fn add_sums(&mut self, sums: &[f64]) {
        self.sums.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_follow_each_other_without_gaps() {
        let shape = Shape::new(3, 5, 4);
        assert_eq!(COUNTS.map(|what| what as usize), std::array::from_fn(|at| at));
        assert_eq!(SUMS.map(|what| what as usize), std::array::from_fn(|at| at));
        assert_eq!(shape.count(Count::Elements), 0..1);
        assert_eq!(shape.count(Count::Magnitudes).len(), 3 * BINS);
        assert_eq!(shape.count(Count::Subsets), shape.counts() - 4..shape.counts());
        assert_eq!(shape.sum(Sum::Dots).len(), 3);
        assert_eq!(shape.pairs().collect::<Vec<_>>(), [(0, 1), (0, 2), (1, 2)]);
        assert_eq!(Shape::new(1, 1, 0).pairs().count(), 0);
    }
}
