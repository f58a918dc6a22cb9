//! What the journal says about work that is done: thresholds of a unit, and ranges of tensors that are durable.
//!
//! Integers are little-endian and of fixed width. Decoding accepts any bytes: lengths are checked against what is left.

use super::shard_hash::Digest;
use super::under_way::Step;
use crate::kernels::Ties;
use crate::limits::FOUND_BYTES;
use crate::sketch::Threshold;

/// A unit whose thresholds are found.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct UnitDone {
    /// First tensor of the unit.
    pub tensor: u32,
    /// Per goal: the threshold and the number of elements it was found among, as in `UnitThresholds`.
    pub found: Vec<Option<(Threshold, u64)>>,
    /// Sign of the unit's vote: -1, 0 or 1.
    pub majority: i8,
    /// Tensor bytes read to find out.
    pub bytes_read: u64,
    /// What looks at the tensor found.
    pub facts: Vec<f64>,
}

const _: () = assert!(size_of::<Option<(Threshold, u64)>>() <= FOUND_BYTES);

/// A range of a tensor whose result is durable.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct RangeDone {
    /// Index into the plan's tensors.
    pub tensor: u32,
    /// First element (or byte, of a tensor copied as it is).
    pub start: u64,
    /// Number of elements.
    pub count: u64,
    /// A copied tensor's versions differ here.
    pub differs: bool,
    /// Tensor bytes read for it.
    pub bytes_read: u64,
    /// Elements whose survivors disagree in sign.
    pub conflicts: u64,
    /// Per model: survivors; empty if there are none.
    pub kept: Vec<u64>,
    /// Per model: survivors with the sign of the merged task vector; empty if there are none.
    pub agreeing: Vec<u64>,
    /// Per model: ties with a threshold that is guessed, or whose ties are kept by position; empty where there are none.
    pub ties: Vec<u64>,
    /// What was written, in order and without gaps.
    pub pieces: Vec<Piece>,
}

/// One write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub bytes: u32,
    pub digest: Digest,
}

/// What a sample says of the thresholds of a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct GuessDone {
    /// First tensor of the unit.
    pub tensor: u32,
    /// How far it is.
    pub state: GuessState,
    /// Tensor bytes read for it.
    pub bytes_read: u64,
    /// Per goal: the key that the threshold is taken for.
    pub keys: Vec<Option<u32>>,
}

/// How far a guess is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GuessState {
    /// The keys are the most common ones; how many entries have them is still to be counted.
    Candidates,
    /// The unit is merged with them: its ranges count once its thresholds are known to be these.
    Taken,
    /// They are not certain enough: the thresholds are searched for.
    Doubted,
}

impl GuessState {
    const ALL: [Self; 3] = [Self::Candidates, Self::Taken, Self::Doubted];
}

/// The guess was wrong: the ranges since then are void.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MissDone {
    /// Tensor bytes read in vain.
    pub bytes_read: u64,
}

/// A range of an input that was read, where inputs are hashed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ReadDone {
    /// Index into all files of the plan's inputs.
    pub file: u32,
    /// First byte in the file.
    pub offset: u64,
    pub bytes: u32,
    /// First half of the BLAKE3 of the bytes.
    pub digest: Digest,
}

/// One entry of a record.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Entry {
    Unit(UnitDone),
    Range(RangeDone),
    Read(ReadDone),
    Step(Step),
    Guess(GuessDone),
    Miss(MissDone),
}

impl Entry {
    /// Whether the ranges behind it are merged with a guess.
    pub(super) fn takes_guess(&self) -> bool {
        matches!(self, Self::Guess(GuessDone { state: GuessState::Taken, .. }))
    }

    /// Memory that it holds.
    pub(super) fn held_bytes(&self) -> usize {
        let lists = match self {
            Self::Unit(unit) => size_of_val(&*unit.found) + size_of_val(&*unit.facts),
            Self::Range(range) => {
                size_of_val(&*range.kept)
                    + size_of_val(&*range.agreeing)
                    + size_of_val(&*range.ties)
                    + range.pieces.capacity() * size_of::<Piece>()
            }
            Self::Read(_) | Self::Miss(_) => 0,
            Self::Step(step) => step.held_bytes(),
            Self::Guess(guess) => size_of_val(&*guess.keys),
        };
        size_of::<Self>() + lists
    }
}

const UNIT: u8 = 1;
const RANGE: u8 = 2;
const READ: u8 = 3;
const GUESS: u8 = 7;
const MISS: u8 = 8;

/// The payload of a record that says that `entries` are done.
pub(super) fn encode(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    for entry in entries {
        match entry {
            Entry::Unit(unit) => encode_unit(unit, &mut out),
            Entry::Range(range) => encode_range(range, &mut out),
            Entry::Read(read) => encode_read(read, &mut out),
            Entry::Step(step) => step.encode(&mut out),
            Entry::Guess(guess) => encode_guess(guess, &mut out),
            Entry::Miss(miss) => {
                out.push(MISS);
                out.extend(miss.bytes_read.to_le_bytes());
            }
        }
    }
    out
}

fn encode_unit(unit: &UnitDone, out: &mut Vec<u8>) {
    out.push(UNIT);
    out.extend(unit.tensor.to_le_bytes());
    out.extend(unit.majority.to_le_bytes());
    out.extend(unit.bytes_read.to_le_bytes());
    out.extend((unit.facts.len() as u32).to_le_bytes());
    unit.facts.iter().for_each(|fact| out.extend(fact.to_le_bytes()));
    out.extend((unit.found.len() as u32).to_le_bytes());
    for model in &unit.found {
        out.push(u8::from(model.is_some()));
        if let Some((threshold, elements)) = model {
            out.extend(threshold.ties.low.to_le_bytes());
            out.extend(threshold.ties.high.to_le_bytes());
            [threshold.above, threshold.tied, *elements].iter().for_each(|n| out.extend(n.to_le_bytes()));
        }
    }
}

fn encode_range(range: &RangeDone, out: &mut Vec<u8>) {
    out.push(RANGE);
    out.extend(range.tensor.to_le_bytes());
    out.push(u8::from(range.differs));
    for number in [range.start, range.count, range.bytes_read, range.conflicts] {
        out.extend(number.to_le_bytes());
    }
    for counts in [&range.kept, &range.agreeing, &range.ties] {
        out.extend((counts.len() as u32).to_le_bytes());
        counts.iter().for_each(|n| out.extend(n.to_le_bytes()));
    }
    out.extend((range.pieces.len() as u32).to_le_bytes());
    for piece in &range.pieces {
        out.extend(piece.bytes.to_le_bytes());
        out.extend(piece.digest);
    }
}

fn encode_read(read: &ReadDone, out: &mut Vec<u8>) {
    out.push(READ);
    out.extend(read.file.to_le_bytes());
    out.extend(read.offset.to_le_bytes());
    out.extend(read.bytes.to_le_bytes());
    out.extend(read.digest);
}

fn encode_guess(guess: &GuessDone, out: &mut Vec<u8>) {
    out.push(GUESS);
    out.extend(guess.tensor.to_le_bytes());
    out.push(guess.state as u8);
    out.extend(guess.bytes_read.to_le_bytes());
    out.extend((guess.keys.len() as u32).to_le_bytes());
    for key in &guess.keys {
        out.push(u8::from(key.is_some()));
        out.extend(key.unwrap_or_default().to_le_bytes());
    }
}

/// The entries of a payload; `None` if it is not one.
pub(super) fn decode(payload: &[u8]) -> Option<Vec<Entry>> {
    let mut rest = Rest(payload);
    let mut entries = Vec::new();
    while !rest.0.is_empty() {
        entries.push(match rest.byte()? {
            UNIT => Entry::Unit(decode_unit(&mut rest)?),
            RANGE => Entry::Range(decode_range(&mut rest)?),
            READ => Entry::Read(decode_read(&mut rest)?),
            GUESS => Entry::Guess(decode_guess(&mut rest)?),
            MISS => Entry::Miss(MissDone { bytes_read: rest.u64()? }),
            kind => Entry::Step(Step::decode(kind, &mut rest)?),
        });
    }
    Some(entries)
}

fn decode_unit(rest: &mut Rest<'_>) -> Option<UnitDone> {
    let (tensor, [majority], bytes_read) = (rest.u32()?, rest.take()?, rest.u64()?);
    let model = |rest: &mut Rest<'_>| match rest.byte()? {
        0 => Some(None),
        _ => {
            let ties = Ties { low: rest.u32()?, high: rest.u32()? };
            let (above, tied, elements) = (rest.u64()?, rest.u64()?, rest.u64()?);
            Some(Some((Threshold { ties, above, tied }, elements)))
        }
    };
    let facts = rest.list(|rest| rest.u64().map(f64::from_bits))?;
    Some(UnitDone { tensor, majority: i8::from_le_bytes([majority]), bytes_read, facts, found: rest.list(model)? })
}

fn decode_range(rest: &mut Rest<'_>) -> Option<RangeDone> {
    let (tensor, differs) = (rest.u32()?, rest.byte()? != 0);
    let [start, count, bytes_read, conflicts] = [rest.u64()?, rest.u64()?, rest.u64()?, rest.u64()?];
    let (kept, agreeing, ties) = (rest.list(Rest::u64)?, rest.list(Rest::u64)?, rest.list(Rest::u64)?);
    let pieces = rest.list(|rest| Some(Piece { bytes: rest.u32()?, digest: rest.take()? }))?;
    Some(RangeDone { tensor, start, count, differs, bytes_read, conflicts, kept, agreeing, ties, pieces })
}

fn decode_read(rest: &mut Rest<'_>) -> Option<ReadDone> {
    Some(ReadDone { file: rest.u32()?, offset: rest.u64()?, bytes: rest.u32()?, digest: rest.take()? })
}

fn decode_guess(rest: &mut Rest<'_>) -> Option<GuessDone> {
    let tensor = rest.u32()?;
    let (state, bytes_read) = (*GuessState::ALL.get(usize::from(rest.byte()?))?, rest.u64()?);
    let key = |rest: &mut Rest<'_>| {
        let (is_some, key) = (rest.byte()?, rest.u32()?);
        Some((is_some != 0).then_some(key))
    };
    Some(GuessDone { tensor, state, bytes_read, keys: rest.list(key)? })
}

/// What is left of a payload.
pub(super) struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    pub(super) fn of(payload: &'a [u8]) -> Self {
        Self(payload)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*first)
    }

    pub(super) fn byte(&mut self) -> Option<u8> {
        self.take::<1>().map(|[byte]| byte)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    /// A count and as many bytes.
    pub(super) fn bytes(&mut self) -> Option<Vec<u8>> {
        let count = self.u32()? as usize;
        let (bytes, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(bytes.to_vec())
    }

    /// A count and as many items, each of at least one byte.
    pub(super) fn list<T>(&mut self, mut item: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let count = self.u32()? as usize;
        if count > self.0.len() {
            return None;
        }
        (0..count).map(|_| item(self)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::under_way;
    use proptest::prelude::*;

    fn guess(state: GuessState) -> Entry {
        let keys = vec![Some(0), None, Some(u32::MAX)];
        Entry::Guess(GuessDone { tensor: 4, state, bytes_read: 1 << 43, keys })
    }

    fn entries() -> Vec<Entry> {
        let threshold = Threshold { ties: Ties { low: 5, high: 6 }, above: 1 << 40, tied: 3 };
        let pieces = vec![Piece { bytes: 4096, digest: [7; 16] }, Piece { bytes: 1, digest: [8; 16] }];
        [
            Entry::Unit(UnitDone {
                tensor: 9,
                found: vec![None, Some((threshold, 77))],
                majority: -1,
                bytes_read: 1 << 50,
                facts: vec![0.1, f64::INFINITY],
            }),
            Entry::Range(RangeDone {
                tensor: 1,
                start: 2,
                count: 3,
                differs: true,
                bytes_read: 4,
                conflicts: 5,
                kept: vec![6, 7],
                agreeing: vec![5, 7],
                ties: vec![8],
                pieces,
            }),
            Entry::Range(RangeDone::default()),
            Entry::Read(ReadDone { file: 3, offset: 1 << 41, bytes: 1 << 20, digest: [9; 16] }),
            guess(GuessState::Candidates),
            guess(GuessState::Taken),
            guess(GuessState::Doubted),
            Entry::Miss(MissDone { bytes_read: 1 << 44 }),
        ]
        .into_iter()
        .chain(under_way::tests::steps().into_iter().map(Entry::Step))
        .collect()
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        assert_eq!(decode(&encode(&entries())), Some(entries()));
        assert_eq!(decode(b""), Some(Vec::new()));
    }

    #[test]
    fn a_payload_cut_off_anywhere_is_none_or_shorter() {
        let payload = encode(&entries());
        for length in 0..payload.len() {
            assert!(decode(&payload[..length]).is_none_or(|found| entries().starts_with(&found)), "{length}");
        }
    }

    proptest! {
        #[test]
        fn random_payloads_never_panic(bytes in prop::collection::vec(0u8..4, 0..300)) {
            let _ = decode(&bytes);
        }
    }
}
