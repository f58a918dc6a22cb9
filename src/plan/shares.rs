//! A plan divided over machines: whole output shards, so that no two machines write to one file.
//!
//! - A part has the same tensors in every pass: what it read once may still be near when it reads it again.
//! - The division depends on the plan and the number of parts alone.

use std::ops::Range;

use super::{Plan, Schedule, UnitKind};

impl Plan {
    /// The shards of each of `parts` parts.
    pub fn shares(&self, parts: usize) -> Vec<Range<usize>> {
        divide(&self.layout.shards.iter().map(|shard| shard.bytes).collect::<Vec<_>>(), parts)
    }

    /// Whether tensor `index` is in one of `shards`.
    pub fn is_within(&self, index: u32, shards: &Range<usize>) -> bool {
        shards.contains(&(self.layout.tensors[index as usize].shard as usize))
    }
}

impl Schedule {
    /// The part of this schedule that deals with the tensors of `shards`. A unit that is shared by the whole model is
    /// streamed: no machine has all of it.
    pub fn part(&self, plan: &Plan, shards: &Range<usize>) -> Self {
        let own = |tensor: &u32| plan.is_within(*tensor, shards);
        let mut part = self.clone();
        part.direct.retain(own);
        for unit in &mut part.units {
            unit.tensors.retain(own);
            unit.elements = unit.tensors.iter().map(|&tensor| plan.length(tensor)).sum();
            if !plan.per_tensor() {
                unit.kind = UnitKind::Streamed;
            }
        }
        part.units.retain(|unit| !unit.tensors.is_empty());
        part.memory.retain(|(term, _)| *term != HELD);
        part.passes = part.passes(plan);
        part
    }
}

/// The memory term of what stays between the passes.
pub(super) const HELD: &str = "inputs held between the passes";

/// Divides neighbours of these sizes into `parts` groups of about the same size; some are empty if there are too few.
fn divide(bytes: &[u64], parts: usize) -> Vec<Range<usize>> {
    let total: u128 = bytes.iter().map(|&bytes| u128::from(bytes)).sum();
    let (mut next, mut before) = (0, 0u128);
    let group = |part: usize| {
        let first = next;
        let goal = total * (part as u128 + 1);
        // One belongs where its middle lies.
        let within = |before: u128, bytes: u64| (2 * before + u128::from(bytes)) * (parts as u128) < 2 * goal;
        while next < bytes.len() && (part + 1 == parts || within(before, bytes[next])) {
            before += u128::from(bytes[next]);
            next += 1;
        }
        first..next
    };
    (0..parts).map(group).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn equal_shards_are_divided_evenly() {
        assert_eq!(divide(&[5; 6], 3), [0..2, 2..4, 4..6]);
        assert_eq!(divide(&[5; 2], 4), [0..0, 0..1, 1..1, 1..2]);
        assert_eq!(divide(&[], 2), [0..0, 0..0]);
    }

    proptest! {
        #[test]
        fn every_shard_is_in_one_part(bytes in prop::collection::vec(0..u64::MAX, 0..40), parts in 1usize..50) {
            let groups = divide(&bytes, parts);
            prop_assert_eq!(groups.len(), parts);
            prop_assert_eq!(groups.into_iter().flatten().collect::<Vec<_>>(), (0..bytes.len()).collect::<Vec<_>>());
        }
    }
}
