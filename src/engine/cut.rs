//! A threshold and a rule for ties, made into something that trims a tile.

use super::turns::Turns;
use crate::error::Result;
use crate::kernels::{self, Isa, Ties};
use crate::plan::TrimTies;
use crate::sketch::Threshold;

/// What survives of one task vector in one unit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Cut {
    /// Everything that is not zero (no trim).
    NonZero,
    /// Nothing.
    Nothing,
    /// Keys at or above this one.
    Keep {
        /// Smallest key kept, at least 1.
        min_key: u32,
    },
    /// The same, entries with that key being counted: what survives if it is the threshold, which counts tell afterwards.
    Guess {
        /// Smallest key kept, at least 1.
        min_key: u32,
    },
    /// Keys above the ties, and the first `quota` ties by position.
    Lowest {
        /// Tied keys.
        ties: Ties,
        /// How many of them survive.
        quota: u64,
    },
    /// Keys above the ties, and ties whose draw is below `accept`.
    Sample {
        /// Tied keys.
        ties: Ties,
        /// Share of them that survives, of 2^64.
        accept: u64,
        /// Keys the draws: depends on seed, model and tensor.
        draw_key: u64,
    },
    /// Whatever its key: what has a draw below `accept`, multiplied by `scale`.
    Random {
        /// Share that survives, of 2^64.
        accept: u64,
        /// Factor of what survives.
        scale: f32,
        /// As in `Sample`.
        draw_key: u64,
    },
    /// Everything; entries with keys from `least` on, or below it, change their sign where a draw is below `accept`, which
    /// every draw is if there is none.
    Flip {
        /// Smallest key of the largest entries.
        least: u32,
        /// Whether the entries below it are flipped.
        below: bool,
        /// Share that is flipped, of 2^64.
        accept: Option<u64>,
        /// As in `Sample`.
        draw_key: u64,
    },
    /// What has a draw below its probability, which depends on its rank in its row: see [`Ranked::apply`].
    Ranked(Ranked),
}

/// Every key but zero's.
const ANY: Ties = Ties { low: 1, high: u32::MAX };

/// Probabilities by rank, from `least` for the smallest magnitude of a row to `most` for the largest.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Ranked {
    least: f64,
    most: f64,
    rescale: bool,
    /// Factor of what survives.
    scale: f32,
    draw_key: u64,
}

impl Ranked {
    /// Trims a row, whose first element has index `first` in its tensor, and divides what survives by its probability
    /// where that is asked for. Returns the number of survivors that are not zero. `order` is a buffer.
    pub(super) fn apply(&self, row: &mut [f32], first: u64, order: &mut Vec<u64>) -> u64 {
        order.clear();
        // Keys are unique with their positions, so that the order is that of equal keys' positions too.
        order.extend(row.iter().zip(0u64..).map(|(&value, at)| u64::from(kernels::key(value)) << 32 | at));
        order.sort_unstable();
        let step = match row.len() {
            0 | 1 => 0.0,
            length => (self.most - self.least) / (length - 1) as f64,
        };
        let only = row.len() == 1;
        let mut kept = 0;
        for (rank, entry) in order.iter().enumerate() {
            let at = entry & u64::from(u32::MAX);
            let probability = match only {
                true => (self.least + self.most) / 2.0,
                false => self.least + step * rank as f64,
            };
            let value = &mut row[at as usize];
            let survives = kernels::draw(self.draw_key, first + at) < share_of_draws(probability) && *value != 0.0;
            *value = match (survives, self.rescale) {
                (true, true) => *value * (1.0 / probability) as f32,
                (true, false) => *value * self.scale,
                (false, _) => 0.0,
            };
            kept += u64::from(survives);
        }
        kept
    }
}

/// The bound that a draw is below with this probability, rounded down to a multiple of 2^-64.
fn share_of_draws(probability: f64) -> u64 {
    (probability * 2f64.powi(64)) as u64
}

impl Cut {
    /// The same draws, what they keep multiplied by `factor`.
    pub(super) fn scaled(self, factor: f32) -> Self {
        match self {
            Self::Random { accept, scale, draw_key } => Self::Random { accept, scale: scale * factor, draw_key },
            Self::Ranked(ranked) => Self::Ranked(Ranked { scale: ranked.scale * factor, ..ranked }),
            other => other,
        }
    }

    /// Keeps each entry with a probability that rises with its rank in its row, and is `density` on average.
    pub(super) fn ranked(density: f64, epsilon: f64, rescale: bool) -> Self {
        let epsilon = epsilon.min(density).min(1.0 - density);
        Self::Ranked(Ranked { least: density - epsilon, most: density + epsilon, rescale, scale: 1.0, draw_key: 0 })
    }

    /// Flips signs with a probability where this cut keeps entries, or where it does not.
    pub(super) fn flipped(self, below: bool, probability: f64) -> Self {
        let least = match self {
            Self::Nothing => u32::MAX,
            cut => cut.min_key().unwrap_or(1),
        };
        let accept = (probability < 1.0).then(|| share_of_draws(probability));
        Self::Flip { least, below, accept, draw_key: 0 }
    }

    /// Keeps each entry with probability `density`, below 1.
    pub(super) fn random(density: f64, scale: f32) -> Self {
        Self::Random { accept: share_of_draws(density), scale, draw_key: 0 }
    }

    /// Drops the `count` largest of `threshold`'s data by `rule`: what this keeps is what is dropped. Entries that tie
    /// with the largest one not dropped are not dropped either, where all ties are kept; then the threshold is that of
    /// `count` + 1.
    pub(super) fn outliers(threshold: Threshold, count: u64, rule: TrimTies) -> Self {
        match rule {
            TrimTies::Keep => Self::Keep { min_key: threshold.ties.high.saturating_add(1) },
            _ => Self::new(threshold, count, rule),
        }
    }

    /// Trims to the `keep` largest of `threshold`'s data by `rule`.
    pub(super) fn new(threshold: Threshold, keep: u64, rule: TrimTies) -> Self {
        let Threshold { ties, above, tied } = threshold;
        let quota = keep - above;
        match rule {
            _ if ties.high == 0 => Self::NonZero,
            TrimTies::Lowest if quota < tied => Self::Lowest { ties, quota },
            TrimTies::Sample if quota < tied => {
                let accept = ((u128::from(quota) << 64) / u128::from(tied)) as u64;
                Self::Sample { ties, accept, draw_key: 0 }
            }
            _ => Self::Keep { min_key: ties.low.max(1) },
        }
    }

    /// What survives if `key` is the threshold and all ties are kept.
    pub(super) fn guess(key: u32) -> Self {
        if key == 0 { Self::NonZero } else { Self::Guess { min_key: key } }
    }

    /// The same cut, with its draws keyed to one tensor of one model.
    pub(super) fn for_tensor(self, seed: u64, model: usize, tensor: &str) -> Self {
        if !matches!(self, Self::Sample { .. } | Self::Random { .. } | Self::Ranked(_) | Self::Flip { .. }) {
            return self;
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        hasher.update(&(model as u64).to_le_bytes());
        hasher.update(tensor.as_bytes());
        let hash = hasher.finalize();
        let (first, _) = hash.as_bytes().split_first_chunk::<8>().expect("a hash has 32 bytes");
        let draw_key = u64::from_le_bytes(*first);
        match self {
            Self::Sample { ties, accept, .. } => Self::Sample { ties, accept, draw_key },
            Self::Random { accept, scale, .. } => Self::Random { accept, scale, draw_key },
            Self::Ranked(ranked) => Self::Ranked(Ranked { draw_key, ..ranked }),
            Self::Flip { least, below, accept, .. } => Self::Flip { least, below, accept, draw_key },
            other => other,
        }
    }

    /// The smallest key that survives, where that is all there is to it.
    pub(super) fn min_key(&self) -> Option<u32> {
        match *self {
            Self::NonZero => Some(1),
            Self::Keep { min_key } => Some(min_key),
            _ => None,
        }
    }

    /// Trims `tau`, whose first element has index `first` in its tensor; `seen` counts the ties before it, for rules
    /// that go by position. Returns the number of survivors that are not zero; of entries flipped, where it flips.
    pub(super) fn apply(&self, isa: Isa, tau: &mut [f32], first: u64, seen: &mut u64) -> u64 {
        match *self {
            Self::NonZero => kernels::trim(isa, tau, 1),
            Self::Nothing => {
                tau.fill(0.0);
                0
            }
            Self::Keep { min_key } | Self::Guess { min_key } => kernels::trim(isa, tau, min_key),
            Self::Sample { ties, accept, draw_key } => kernels::trim_sample(isa, tau, ties, draw_key, first, accept),
            Self::Random { accept, scale, draw_key } => {
                let kept = kernels::trim_sample(isa, tau, ANY, draw_key, first, accept);
                kernels::scale(isa, tau, scale);
                kept
            }
            Self::Ranked(_) => unreachable!("ranks need whole rows"),
            Self::Flip { least, below, accept, draw_key } => {
                let mut flipped = 0;
                for (value, index) in tau.iter_mut().zip(first..) {
                    let key = kernels::key(*value);
                    let drawn = || accept.is_none_or(|accept| kernels::draw(draw_key, index) < accept);
                    if key != 0 && (key < least) == below && drawn() {
                        *value = -*value;
                        flipped += 1;
                    }
                }
                flipped
            }
            Self::Lowest { ties, quota } => {
                let here = if *seen < quota { kernels::count_ties(isa, tau, ties) } else { 0 };
                let before = *seen;
                *seen += here;
                if before >= quota {
                    kernels::trim(isa, tau, ties.high.saturating_add(1))
                } else if *seen <= quota {
                    kernels::trim(isa, tau, ties.low.max(1))
                } else {
                    kernels::trim_lowest(isa, tau, ties, quota - before).0
                }
            }
        }
    }
}

/// Ties seen so far, per cut.
pub(super) type TieCounts = Vec<u64>;

/// Hands each chunk the number of ties in all chunks before it, while chunks are worked on in parallel.
pub(super) type TieChain = Turns<TieCounts>;

impl TieChain {
    /// For so many cuts.
    pub(super) fn of(cuts: usize) -> Self {
        Self::new(vec![0; cuts])
    }

    /// Waits for the counts before chunk `ordinal`, adds `own` and passes them on. Returns the counts before.
    pub(super) fn pass(&self, ordinal: usize, own: &TieCounts) -> Result<TieCounts> {
        self.take(ordinal, |counts| {
            let before = counts.clone();
            counts.iter_mut().zip(own).for_each(|(sum, count)| *sum += count);
            before
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::turns::Pending;

    #[test]
    fn counts_arrive_in_order_whoever_comes_first() {
        let chain = TieChain::of(1);
        std::thread::scope(|scope| {
            let chain = &chain;
            let before =
                |ordinal: usize| scope.spawn(move || chain.pass(ordinal, &vec![10 + ordinal as u64]).unwrap()[0]);
            let got = [3, 1, 2, 0].map(before).map(|thread| thread.join().unwrap());
            assert_eq!(got, [33, 10, 21, 0]);
        });
    }

    #[test]
    fn a_failure_releases_the_chunks_after_it_and_no_others() {
        let chain = TieChain::of(1);
        std::thread::scope(|scope| {
            let later = scope.spawn(|| chain.pass(3, &vec![1]));
            let earlier = scope.spawn(|| chain.pass(1, &vec![1]));
            drop(Pending::new(&chain, 2));
            assert!(later.join().unwrap().is_err());
            chain.pass(0, &vec![5]).unwrap();
            assert_eq!(earlier.join().unwrap().unwrap(), [5]);
        });
    }
}
