//! The keys near a threshold, kept one by one: the way to select in data that stays in memory.
//!
//! - A sample of the data gives two bounds about the threshold; one look counts the keys above and at the bounds and
//!   lists those between them, about one in a hundred; selecting in the list gives the exact threshold.
//! - The list has a fixed length. Bounds that miss, or hold too much, are noticed: the answer is then left to sketches.

use super::{Threshold, select_in_place};
use crate::kernels::{self, Isa, Near, Ties};

/// The keys of one task vector about two bounds. See the module's documentation.
#[derive(Debug, Default)]
pub struct NearKeys {
    low: u32,
    high: u32,
    counts: Near,
    between: Vec<u32>,
}

impl NearKeys {
    /// Room for `capacity` keys.
    pub fn with_capacity(capacity: usize) -> Self {
        Self { between: vec![0; capacity], ..Self::default() }
    }

    /// Empties the list and gives it other bounds.
    pub fn reset(&mut self, low: u32, high: u32) {
        (self.low, self.high, self.counts) = (low, high, Near::default());
    }

    /// Takes in the values of `tau`.
    pub fn add(&mut self, isa: Isa, tau: &[f32]) {
        let room = self.between.get_mut(self.counts.between as usize..).unwrap_or_default();
        let counts = kernels::collect(isa, tau, self.low, self.high, room);
        self.counts.above += counts.above;
        self.counts.at_high += counts.at_high;
        self.counts.between += counts.between;
        self.counts.at_low += counts.at_low;
    }

    /// The `rank`-th largest (1-based) of all values taken in, if it lies within the bounds and was listed. Reorders
    /// the list.
    pub fn threshold(&mut self, rank: u64) -> Option<Threshold> {
        let Near { above, at_high, between, at_low } = self.counts;
        let of_one = |key, above, tied| Some(Threshold { ties: Ties { low: key, high: key }, above, tied });
        if rank <= above {
            return None;
        }
        if rank <= above + at_high {
            return of_one(self.high, above, at_high);
        }
        let above = above + at_high;
        if rank <= above + between {
            let found = select_in_place(self.between.get_mut(..between as usize)?, rank - above);
            return Some(Threshold { above: found.above + above, ..found });
        }
        let above = above + between;
        if rank <= above + at_low { of_one(self.low, above, at_low) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(values: &[f32], capacity: usize, low: f32, high: f32) -> NearKeys {
        let mut near = NearKeys::with_capacity(capacity);
        near.reset(low.to_bits(), high.to_bits());
        values.chunks(7).for_each(|part| near.add(Isa::detect(), part));
        near
    }

    /// Magnitudes 1 to 100 but that the last ten are 91, with either sign.
    fn values() -> Vec<f32> {
        (1..=100u8).map(|i| f32::from(i.min(91)) * if i % 2 == 0 { 1.0 } else { -1.0 }).collect()
    }

    #[test]
    fn ranks_within_the_bounds_are_found_and_others_left_to_sketches() {
        for (low, high) in [(60.0, 95.0), (60.0, 91.0), (91.0, 91.0), (30.0, 50.0), (90.5, 91.5), (10.0, 11.0)] {
            for rank in 1..=100u64 {
                let value = if rank <= 10 { 91.0f32 } else { 101.0 - rank as f32 };
                let expected = (low <= value && value <= high).then(|| Threshold {
                    ties: Ties { low: value.to_bits(), high: value.to_bits() },
                    above: if rank <= 10 { 0 } else { rank - 1 },
                    tied: if rank <= 10 { 10 } else { 1 },
                });
                assert_eq!(near(&values(), 50, low, high).threshold(rank), expected, "{low} to {high}, rank {rank}");
            }
        }
    }

    #[test]
    fn a_list_that_is_too_short_answers_only_for_the_bounds() {
        assert!(near(&values(), 9, 41.0, 52.0).threshold(55).is_none());
        assert!(near(&values(), 10, 41.0, 52.0).threshold(55).is_some());
        assert_eq!(near(&values(), 0, 41.0, 52.0).threshold(49).map(|t| t.ties.low), Some(52f32.to_bits()));
    }
}
