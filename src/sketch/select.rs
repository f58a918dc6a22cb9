//! Exact selection of the k-th largest magnitude from bounded sketches.

use super::{Bracket, KEYS, MagnitudeSketch, Miss, count};
use crate::kernels::{STRAY, Ties};

/// The result of a selection: which keys count as tied with the k-th largest, and how many values stand where.
///
/// Exact selection gives a single key (`ties.low == ties.high`); a coarse one gives the bin that holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Threshold {
    /// Keys tied with the k-th largest.
    pub ties: Ties,
    /// Number of values above them.
    pub above: u64,
    /// Number of values tied.
    pub tied: u64,
}

/// Finds the `rank`-th largest key of a data set seen only through sketches.
///
/// Ask for [`Selector::bracket`], sketch all the data with it, [`Selector::observe`]; repeat until
/// [`Selector::threshold`] answers. With a first bracket that holds the answer in bins of one key, once is enough; from
/// [`Bracket::COARSE`] with 65,536 bins, twice.
#[derive(Debug, Clone)]
pub struct Selector {
    rank: u64,
    max_bins: usize,
    coarse: bool,
    /// What the answer is probably not below: looks at what lies above cost less.
    floor: u32,
    /// Whether a bracket missed.
    missed: bool,
    state: State,
}

#[derive(Debug, Clone)]
enum State {
    Searching(Bracket),
    Found(Threshold),
}

impl Selector {
    /// Looks for the `rank`-th largest (1-based), starting from bracket `first`, with at most `max_bins` bins a sketch.
    pub fn exact(rank: u64, first: Bracket, max_bins: usize) -> Self {
        debug_assert!(rank > 0);
        Self { rank, max_bins, coarse: false, floor: 0, missed: false, state: State::Searching(first) }
    }

    /// Looks for the coarse bin that holds the `rank`-th largest.
    pub fn coarse(rank: u64) -> Self {
        debug_assert!(rank > 0);
        Self {
            rank,
            max_bins: Bracket::COARSE.bins,
            coarse: true,
            floor: 0,
            missed: false,
            state: State::Searching(Bracket::COARSE),
        }
    }

    /// A search for the `rank`-th largest that is over.
    pub fn found(rank: u64, threshold: Threshold) -> Self {
        Self { state: State::Found(threshold), ..Self::coarse(rank) }
    }

    /// The same, if `missed`, after a bracket that missed.
    pub fn after_a_miss(self, missed: bool) -> Self {
        Self { missed, ..self }
    }

    /// Whether a bracket missed.
    pub fn has_missed(&self) -> bool {
        self.missed
    }

    /// The same, looking at no key below `floor` before all above it were.
    pub fn not_below(self, floor: u32) -> Self {
        Self { floor, ..self }
    }

    /// The same over data of which what is below `bound` may not be seen any more.
    pub fn over_what_is_kept(self, bound: Option<u32>) -> Self {
        let floor = match self.state {
            State::Searching(_) if self.coarse => bound.unwrap_or(0),
            State::Searching(Bracket { low, .. }) => bound.filter(|&bound| bound < low).unwrap_or(low),
            State::Found(_) => 0,
        };
        self.not_below(floor)
    }

    /// The least key that matters to what is left of the search, unless the answer is below the floor.
    pub fn least(&self) -> u32 {
        match self.state {
            // One look sees everything; what lies below the floor does not matter to it.
            State::Searching(_) if self.coarse => self.floor,
            State::Searching(bracket) => bracket.low.min(self.floor),
            State::Found(threshold) => threshold.ties.low,
        }
    }

    /// The bracket to sketch next; `None` once the threshold is found.
    pub fn bracket(&self) -> Option<Bracket> {
        match self.state {
            State::Searching(bracket) => Some(bracket),
            State::Found(_) => None,
        }
    }

    /// The threshold, once found.
    pub fn threshold(&self) -> Option<Threshold> {
        match self.state {
            State::Searching(_) => None,
            State::Found(threshold) => Some(threshold),
        }
    }

    /// Whether a sketch leaves keys that can be the answer.
    pub fn can_observe(&self, sketch: &MagnitudeSketch) -> bool {
        match sketch.locate(self.rank) {
            Ok(_) => true,
            Err(Miss::Above) => sketch.bracket.end() < KEYS,
            Err(Miss::Below) => sketch.bracket.low > 0,
        }
    }

    /// Takes in a sketch of all the data made with [`Selector::bracket`]. The data must hold at least `rank` values.
    pub fn observe(&mut self, sketch: &MagnitudeSketch) {
        let bracket = sketch.bracket;
        debug_assert_eq!(Some(bracket), self.bracket());
        self.state = match sketch.locate(self.rank) {
            Ok((bin, above)) => {
                let (low, high) = bracket.keys(bin);
                let single = sketch.bins[bin] & STRAY == 0;
                if self.coarse && low < self.floor {
                    // The floor was too high, and what is below it may not have been seen.
                    self.floor = 0;
                    State::Searching(bracket)
                } else if single || self.coarse {
                    // All of a bin's keys that are equal are its first.
                    let high = if single { low } else { high };
                    State::Found(Threshold { ties: Ties { low, high }, above, tied: count(sketch.bins[bin]) })
                } else {
                    State::Searching(Bracket::over(low, u64::from(high) + 1, self.max_bins))
                }
            }
            // A bracket misses by little, as a rule: its neighbour comes first, then all the rest.
            Err(Miss::Above) => {
                let end = bracket.end() + if self.missed { KEYS } else { self.max_bins as u64 };
                self.missed = true;
                State::Searching(Bracket::over(bracket.end() as u32, end.min(KEYS), self.max_bins))
            }
            Err(Miss::Below) => {
                assert!(bracket.low > 0, "fewer values than the rank asked for");
                let low = match self.missed {
                    _ if self.floor > 0 && self.floor < bracket.low => self.floor,
                    true => 0,
                    false => bracket.low.saturating_sub(self.max_bins as u32),
                };
                self.missed = true;
                State::Searching(Bracket::over(low, u64::from(bracket.low), self.max_bins))
            }
        };
    }
}

/// Exact threshold for the `rank`-th largest (1-based) of keys held in memory; reorders `keys`.
pub fn select_in_place(keys: &mut [u32], rank: u64) -> Threshold {
    let index = rank as usize - 1;
    let (larger, &mut key, smaller) = keys.select_nth_unstable_by(index, |a, b| b.cmp(a));
    let above = larger.iter().filter(|&&k| k > key).count();
    let tied = larger.len() - above + 1 + smaller.iter().filter(|&&k| k == key).count();
    Threshold { ties: Ties { low: key, high: key }, above: above as u64, tied: tied as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Isa;
    use proptest::prelude::*;

    fn sorted_threshold(values: &[f32], rank: u64) -> Threshold {
        let mut keys: Vec<u32> = values.iter().map(|v| v.to_bits() & 0x7fff_ffff).collect();
        keys.sort_unstable_by(|a, b| b.cmp(a));
        let key = keys[rank as usize - 1];
        Threshold {
            ties: Ties { low: key, high: key },
            above: keys.iter().filter(|&&k| k > key).count() as u64,
            tied: keys.iter().filter(|&&k| k == key).count() as u64,
        }
    }

    fn run(values: &[f32], mut selector: Selector) -> (Threshold, usize) {
        let mut looks = 0;
        while let Some(bracket) = selector.bracket() {
            let mut sketch = MagnitudeSketch::new(bracket);
            for part in values.chunks(37) {
                sketch.add(Isa::detect(), part);
            }
            selector.observe(&sketch);
            looks += 1;
            assert!(looks < 64, "no progress");
        }
        (selector.threshold().unwrap(), looks)
    }

    fn values() -> impl Strategy<Value = Vec<f32>> {
        let value = prop_oneof![
            4 => (-1.0f32..1.0).prop_map(|x| x * 1e-3),
            2 => prop::sample::select(vec![0.0f32, -0.0, 1e-3, -1e-3, 2e-3, f32::MAX, f32::MIN_POSITIVE, 1e-45]),
            1 => any::<f32>().prop_filter("finite", |x| x.is_finite()),
        ];
        prop::collection::vec(value, 1..400)
    }

    proptest! {
        #[test]
        fn any_first_bracket_leads_to_the_true_threshold(
            values in values(), at in 0.0f64..1.0, low in 0u32..0x7f80_0000, width in 1u64..0x4000_0000, bins in 1usize..70_000,
        ) {
            let rank = ((at * values.len() as f64) as u64 + 1).min(values.len() as u64);
            let end = (u64::from(low) + width).min(KEYS);
            let expected = sorted_threshold(&values, rank);
            for first in [Bracket::COARSE, Bracket::over(low, end, bins.max(2))] {
                for floor in [0, low / 2, low] {
                    let selector = Selector::exact(rank, first, bins.max(2)).not_below(floor);
                    prop_assert_eq!(run(&values, selector).0, expected);
                }
            }
            let mut keys: Vec<u32> = values.iter().map(|v| v.to_bits() & 0x7fff_ffff).collect();
            prop_assert_eq!(select_in_place(&mut keys, rank), expected);
        }

        #[test]
        fn a_coarse_threshold_brackets_the_true_one(values in values(), at in 0.0f64..1.0) {
            let rank = ((at * values.len() as f64) as u64 + 1).min(values.len() as u64);
            let exact = sorted_threshold(&values, rank);
            let (coarse, looks) = run(&values, Selector::coarse(rank));
            prop_assert_eq!(looks, 1);
            prop_assert!(coarse.ties.low <= exact.ties.low && exact.ties.high <= coarse.ties.high);
            prop_assert!(coarse.above < rank && rank <= coarse.above + coarse.tied);
        }
    }

    #[test]
    fn magnitudes_of_16_bit_checkpoints_take_one_look() {
        let values: Vec<f32> =
            (0..if cfg!(miri) { 3_000 } else { 10_000 }).map(|i| ((i % 397) as f32 - 200.0) / 65536.0).collect();
        for first in [Bracket::COARSE, Bracket::over(0x3a00_0000, 0x3b80_0000, 1 << 10)] {
            let (threshold, looks) = run(&values, Selector::exact(2000, first, 1 << 16));
            assert_eq!((threshold, looks), (sorted_threshold(&values, 2000), 1));
        }
    }

    #[test]
    fn coarse_then_fine_takes_two_looks() {
        let values: Vec<f32> = (0..if cfg!(miri) { 3_000 } else { 10_000 }).map(|i| (i as f32).sin()).collect();
        let (threshold, looks) = run(&values, Selector::exact(2000, Bracket::COARSE, 1 << 16));
        assert_eq!((threshold, looks), (sorted_threshold(&values, 2000), 2));
    }
}
