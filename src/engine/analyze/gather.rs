//! What was measured, put together in the order of the tensors: sums over layers, kinds and the whole, and the journal's
//! records of finished tensors, and of how far the one at hand is.

use std::time::{Duration, Instant};

use super::measures::Measures;
use super::meter::BLOCK_ELEMENTS;
use super::study::Study;
use super::work::WorkDir;
use crate::engine::records;
use crate::engine::under_way::{Step, UnderWay};
use crate::error::{Error, Result};
use crate::kernels::Ties;
use crate::limits::WRITE_BEHIND_SECONDS;
use crate::sketch::Threshold;
use crate::storage::Storage;

/// Bytes of finished tensors that wait for the journal, at most.
const PENDING_BYTES: usize = 1 << 20;

/// One entry of the journal.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Entry {
    /// Thresholds of the whole model.
    Thresholds(Vec<Option<Threshold>>),
    /// All of one tensor: its place in the study's order, its own thresholds (none in model scope), its numbers.
    Tensor { place: u32, found: Vec<Option<Threshold>>, measures: Measures },
    /// How far the search for thresholds is.
    Step(Step),
    /// The first elements of a tensor, whole blocks of them: the same about these.
    Part { place: u32, found: Vec<Option<Threshold>>, part: Part },
}

/// What was measured of a tensor so far.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Part {
    /// Elements that were, from the first one on.
    pub elements: u64,
    pub measures: Measures,
}

const THRESHOLDS: u8 = 1;
const TENSOR: u8 = 2;
const STEP: u8 = 3;
const PART: u8 = 4;

impl Entry {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Thresholds(found) => {
                out.push(THRESHOLDS);
                encode_found(found, out);
            }
            Self::Tensor { place, found, measures } => {
                encode_tensor(*place, found, measures, out);
            }
            Self::Part { place, found, part } => encode_part(*place, found, part, out),
            Self::Step(step) => {
                let mut entry = Vec::new();
                step.encode(&mut entry);
                out.push(STEP);
                out.extend((entry.len() as u32).to_le_bytes());
                out.extend(entry);
            }
        }
    }

    /// The next entry of `rest`, for lists of these lengths; `None` if there is none that makes sense.
    fn decode(rest: &mut &[u8], counts: usize, sums: usize) -> Option<Self> {
        match take::<1>(rest)? {
            [THRESHOLDS] => Some(Self::Thresholds(decode_found(rest)?)),
            [TENSOR] => {
                let place = u32::from_le_bytes(take(rest)?);
                let (found, measures) = decode_measured(rest, counts, sums)?;
                Some(Self::Tensor { place, found, measures })
            }
            [PART] => {
                let (place, elements) = (u32::from_le_bytes(take(rest)?), u64::from_le_bytes(take(rest)?));
                let (found, measures) = decode_measured(rest, counts, sums)?;
                Some(Self::Part { place, found, part: Part { elements, measures } })
            }
            [STEP] => {
                let length = u32::from_le_bytes(take(rest)?) as usize;
                let (entry, after) = rest.split_at_checked(length)?;
                *rest = after;
                match &records::decode(entry)?[..] {
                    [records::Entry::Step(step)] => Some(Self::Step(step.clone())),
                    _ => None,
                }
            }
            _ => None,
        }
    }
}

/// All entries of a payload, one after the other; `None` if it is not made of them.
pub(super) fn decode(
    mut payload: &[u8],
    study: &Study,
    mut each: impl FnMut(Entry) -> Result<()>,
) -> Result<Option<()>> {
    let shape = &study.aim.shape;
    while !payload.is_empty() {
        match Entry::decode(&mut payload, shape.counts(), shape.sums()) {
            Some(entry) => each(entry)?,
            None => return Ok(None),
        }
    }
    Ok(Some(()))
}

fn encode_tensor(place: u32, found: &[Option<Threshold>], measures: &Measures, out: &mut Vec<u8>) {
    out.push(TENSOR);
    out.extend(place.to_le_bytes());
    encode_measured(found, measures, out);
}

fn encode_part(place: u32, found: &[Option<Threshold>], part: &Part, out: &mut Vec<u8>) {
    out.push(PART);
    out.extend(place.to_le_bytes());
    out.extend(part.elements.to_le_bytes());
    encode_measured(found, &part.measures, out);
}

fn encode_measured(found: &[Option<Threshold>], measures: &Measures, out: &mut Vec<u8>) {
    encode_found(found, out);
    measures.counts.iter().for_each(|count| out.extend(count.to_le_bytes()));
    measures.sums.iter().for_each(|sum| out.extend(sum.to_le_bytes()));
}

/// Thresholds and so many counts and sums.
fn decode_measured(rest: &mut &[u8], counts: usize, sums: usize) -> Option<(Vec<Option<Threshold>>, Measures)> {
    let found = decode_found(rest)?;
    if rest.len() < 8 * (counts + sums) {
        return None;
    }
    let counts = (0..counts).map(|_| take(rest).map(u64::from_le_bytes)).collect::<Option<_>>()?;
    let sums = (0..sums).map(|_| take(rest).map(f64::from_le_bytes)).collect::<Option<_>>()?;
    Some((found, Measures { counts, sums }))
}

fn encode_found(found: &[Option<Threshold>], out: &mut Vec<u8>) {
    out.extend((found.len() as u32).to_le_bytes());
    for found in found {
        out.push(u8::from(found.is_some()));
        if let Some(Threshold { ties, above, tied }) = found {
            [ties.low, ties.high].iter().for_each(|key| out.extend(key.to_le_bytes()));
            [above, tied].iter().for_each(|count| out.extend(count.to_le_bytes()));
        }
    }
}

fn decode_found(rest: &mut &[u8]) -> Option<Vec<Option<Threshold>>> {
    let length = u32::from_le_bytes(take(rest)?);
    let one = |rest: &mut &[u8]| match take::<1>(rest)? {
        [0] => Some(None),
        _ => {
            let ties = Ties { low: u32::from_le_bytes(take(rest)?), high: u32::from_le_bytes(take(rest)?) };
            let (above, tied) = (u64::from_le_bytes(take(rest)?), u64::from_le_bytes(take(rest)?));
            Some(Some(Threshold { ties, above, tied }))
        }
    };
    // Each takes a byte at least.
    if length as usize > rest.len() {
        return None;
    }
    (0..length).map(|_| one(rest)).collect()
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (first, after) = rest.split_first_chunk::<N>()?;
    *rest = after;
    Some(*first)
}

/// Everything that is known so far.
pub(super) struct Gathered {
    pub overall: Measures,
    pub layers: Vec<Measures>,
    pub kinds: Vec<Measures>,
    /// Thresholds of the whole model, in model scope.
    pub thresholds: Option<Vec<Option<Threshold>>>,
    /// Tensors that are done: the first so many of the study's order.
    pub done: usize,
    /// What of the next one is measured, and its own thresholds (none in model scope).
    pub part: Option<(Part, Vec<Option<Threshold>>)>,
    /// What is known of units whose thresholds are not found.
    pub under_way: UnderWay,
}

impl Gathered {
    pub(super) fn new(study: &Study) -> Self {
        let new = || Measures::new(&study.aim.shape);
        Self {
            overall: new(),
            layers: study.layers.names.iter().map(|_| new()).collect(),
            kinds: study.kinds.names.iter().map(|_| new()).collect(),
            thresholds: None,
            done: 0,
            part: None,
            under_way: UnderWay::default(),
        }
    }

    /// Takes in an entry of the journal; false if it does not follow from what came before.
    pub(super) fn take(&mut self, study: &Study, entry: Entry) -> bool {
        let goals = study.densities.len() * study.plan.models();
        let own = if study.plan.per_tensor() { goals } else { 0 };
        let next = study.tensors.get(self.done).copied();
        let length = next.map_or(0, |tensor| study.plan.length(tensor));
        // What is counted are elements.
        let is_next = |place: u32, found: &[_], elements: u64, measures: &Measures| {
            let counts = measures.counts.iter().all(|&count| count <= elements);
            next.is_some() && place as usize == self.done && found.len() == own && counts
        };
        match entry {
            Entry::Thresholds(found) => {
                let fits = found.len() == goals && self.done == 0;
                self.thresholds = Some(found);
                fits
            }
            Entry::Part { place, found, part } => {
                let whole_blocks = part.elements.is_multiple_of(BLOCK_ELEMENTS) && part.elements < length;
                let fits = whole_blocks && is_next(place, &found, part.elements, &part.measures);
                self.part = Some((part, found));
                fits
            }
            Entry::Tensor { place, found, measures } => {
                let fits = is_next(place, &found, length, &measures);
                if let Some(tensor) = next.filter(|_| fits) {
                    self.part = None;
                    self.under_way.forget(tensor);
                    self.add(study, &measures);
                }
                fits
            }
            Entry::Step(step) => {
                self.under_way.take(step);
                true
            }
        }
    }

    fn add(&mut self, study: &Study, measures: &Measures) {
        self.overall.add(measures);
        self.layers[study.layers.of[self.done] as usize].add(measures);
        self.kinds[study.kinds.of[self.done] as usize].add(measures);
        self.done += 1;
    }
}

/// Puts together what the threads measure, in turn.
pub(super) struct Gatherer<'a> {
    study: &'a Study,
    work: &'a WorkDir,
    storage: &'a dyn Storage,
    pub gathered: Gathered,
    /// The tensor that is being measured.
    open: Part,
    /// What is measured is recorded when it is so old.
    keep_after: Duration,
    pending: Vec<u8>,
    flushed: Instant,
}

impl<'a> Gatherer<'a> {
    pub(super) fn new(study: &'a Study, work: &'a WorkDir, storage: &'a dyn Storage, gathered: Gathered) -> Self {
        let open = Part { elements: 0, measures: Measures::new(&study.aim.shape) };
        let keep_after = study.schedule.keep_after.min(Duration::from_secs(WRITE_BEHIND_SECONDS));
        Self { study, work, storage, gathered, open, keep_after, pending: Vec::new(), flushed: Instant::now() }
    }

    /// Goes on with a tensor of which `part` is measured.
    pub(super) fn go_on(&mut self, part: Part) {
        self.open = part;
    }

    /// What to say of a journal that makes no sense.
    pub(super) fn senseless(&self) -> Error {
        self.work.senseless()
    }

    /// Takes in the next `elements` of the tensor whose turn it is: counts, and the sums of its blocks in order.
    pub(super) fn part<'s>(&mut self, elements: u64, counts: &[u64], blocks: impl Iterator<Item = &'s [f64]>) {
        self.open.elements += elements;
        self.open.measures.add_counts(counts);
        blocks.for_each(|sums| self.open.measures.add_sums(sums));
    }

    /// Keeps what was taken in of the tensor whose turn it is, if it is time.
    pub(super) fn keep_in_time(&mut self, found: &[Option<Threshold>]) -> Result<()> {
        if self.flushed.elapsed() >= self.keep_after { self.keep(found) } else { Ok(()) }
    }

    /// Keeps what was taken in of the tensor whose turn it is, and all that waits for the journal.
    pub(super) fn keep(&mut self, found: &[Option<Threshold>]) -> Result<()> {
        self.storage.check_mapped()?;
        if self.open.elements > 0 {
            encode_part(self.gathered.done as u32, found, &self.open, &mut self.pending);
        }
        self.flush()
    }

    /// The tensor whose turn it is, is done.
    pub(super) fn finish(&mut self, found: &[Option<Threshold>]) -> Result<()> {
        // What was read of a file that was cut off meanwhile is worth nothing.
        self.storage.check_mapped()?;
        encode_tensor(self.gathered.done as u32, found, &self.open.measures, &mut self.pending);
        self.gathered.add(self.study, &self.open.measures);
        self.open.elements = 0;
        self.open.measures.clear();
        let late = self.flushed.elapsed() >= Duration::from_secs(WRITE_BEHIND_SECONDS);
        if late || self.pending.len() >= PENDING_BYTES { self.flush() } else { Ok(()) }
    }

    /// Records thresholds of the whole model.
    pub(super) fn thresholds(&mut self, found: Vec<Option<Threshold>>) -> Result<()> {
        self.storage.check_mapped()?;
        Entry::Thresholds(found.clone()).encode(&mut self.pending);
        self.gathered.thresholds = Some(found);
        self.flush()
    }

    /// Writes what waits to the journal.
    pub(super) fn flush(&mut self) -> Result<()> {
        if !self.pending.is_empty() {
            self.work.record(&self.pending)?;
            self.pending.clear();
        }
        self.flushed = Instant::now();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_survive_the_journal_and_nonsense_is_noticed() {
        let found = vec![None, Some(Threshold { ties: Ties { low: 3, high: 4 }, above: 5, tied: 6 })];
        let measures = Measures { counts: vec![1, 2, 3], sums: vec![0.5, -0.0] };
        let steps = crate::engine::under_way::tests::steps().into_iter().map(Entry::Step);
        let part = Part { elements: 1 << 40, measures: measures.clone() };
        let entries = [
            Entry::Thresholds(found.clone()),
            Entry::Part { place: 7, found: found.clone(), part },
            Entry::Tensor { place: 7, found, measures },
        ];
        let entries: Vec<Entry> = entries.into_iter().chain(steps).collect();
        let mut bytes = Vec::new();
        entries.iter().for_each(|entry| entry.encode(&mut bytes));
        let mut rest = &bytes[..];
        for entry in &entries {
            assert_eq!(Entry::decode(&mut rest, 3, 2).as_ref(), Some(entry));
        }
        assert!(rest.is_empty());
        for cut in 1..bytes.len() {
            let mut rest = &bytes[..cut];
            let whole = entries.iter().all(|_| Entry::decode(&mut rest, 3, 2).is_some());
            assert!(!whole, "{cut}");
        }
        assert_eq!(Entry::decode(&mut &[TENSOR, 0, 0, 0, 0, 255, 255, 255, 255][..], 3, 2), None);
    }
}
