//! A journal taken apart without the merge that it belongs to: as a run that goes on reads it, up to where its plan is asked.
//!
//! What the fuzz target of journals' records calls; holds what must be true of any bytes whatever.

use std::path::Path;

use super::output::Log;
use super::output::kind::DONE;
use super::records::{self, Entry};
use super::under_way::{SearchState, Step, UnderWay};
use crate::error::Result;
use crate::journal::Journal;
use crate::sketch::{BlockCounts, MagnitudeSketch, Selector};

/// What a journal holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Decoded {
    /// Records that make sense.
    pub records: u64,
    /// Entries of the records of work that is done.
    pub entries: u64,
    /// Those among them about a unit: its thresholds, or what was counted of a module.
    pub units: u64,
    /// Sketches and counts of blocks in these.
    pub sketches: u64,
}

/// Opens the journal at `path`, which cuts off an incomplete tail, and decodes all of it; `None` if it has no first record.
/// A journal that is damaged is an error. Panics if what is decoded is encoded as something else.
pub fn decode_journal(path: &Path, storage: &dyn crate::storage::Storage) -> Result<Option<Decoded>> {
    let (mut decoded, mut log, mut under_way) = (Decoded::default(), Log::default(), UnderWay::default());
    let journal = Journal::open(path, storage, |record| {
        if log.take(&record).is_none() {
            return Ok(());
        }
        decoded.records += 1;
        let entries = if record.kind == DONE { records::decode(&record.payload) } else { None };
        for entry in entries.into_iter().flatten() {
            decoded.entries += 1;
            decoded.units += u64::from(matches!(entry, Entry::Unit(_)));
            let bytes = records::encode(std::slice::from_ref(&entry));
            let again = records::decode(&bytes).expect("what is encoded is decoded");
            // As bytes: a fact may be no number, and none is equal to another.
            assert_eq!(records::encode(&again), bytes, "{entry:?}");
            assert!(entry.held_bytes() <= 64 * bytes.len() + 1024, "{entry:?}");
            if let Entry::Step(step) = entry {
                decoded.sketches += sketches_of(&step);
                under_way.take(step);
            }
        }
        Ok(())
    })?;
    Ok(journal.map(|_| decoded))
}

/// Works with the sketches of a step as a search does; returns how many there are.
fn sketches_of(step: &Step) -> u64 {
    match step {
        Step::Votes(_) => 0,
        Step::Search(search) => {
            let SearchState::Counting { missed, sketch } = &search.state else { return 0 };
            let Some(sketch) = MagnitudeSketch::decode(&mut &sketch[..]) else { return 0 };
            if sketch.bins() > 0 && search.rank > 0 {
                let mut selector = Selector::exact(search.rank, sketch.bracket(), sketch.bins()).after_a_miss(*missed);
                if selector.can_observe(&sketch) {
                    selector.observe(&sketch);
                }
            }
            1
        }
        Step::Probe(probe) => {
            let (mut rest, mut count) = (&probe.sketches[..], 0);
            while let Some(sketch) = MagnitudeSketch::decode(&mut rest) {
                let mut sum = MagnitudeSketch::new(sketch.bracket());
                // Groups add up.
                (0..3).for_each(|_| sum.merge(&sketch));
                assert_eq!(sum.total(), sketch.total().and_then(|total| total.checked_mul(3)));
                let _ = sum.mode();
                count += 1;
            }
            let (mut rest, mut sum) = (&probe.sketches[..], BlockCounts::default());
            while let Some(counts) = BlockCounts::decode(&mut rest) {
                assert!(BlockCounts::decode(&mut &counts.encode()[..]).is_some(), "what is encoded is decoded");
                sum.merge(&counts);
                let _ = sum.is_certain(0.2);
                count += 1;
            }
            count
        }
    }
}
