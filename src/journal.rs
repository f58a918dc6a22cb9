//! An append-only log of records that survives being cut off anywhere.
//!
//! - One append is one write and one sync, so at most the last record can be incomplete after a crash: such a tail is
//!   cut off when the journal is opened. A damaged record with a sound one behind it is damage to what was durable: an
//!   error.
//! - Every record carries its number and a checksum over everything in it. Payloads that are worth it are compressed
//!   with zstd.
//! - Nothing is allocated in proportion to a length before the file is known to be that long.
//!
//! Knows kinds, numbers and bytes; not what they mean. `docs/format.md` has the layout.

use std::path::Path;

use crate::error::{Error, Result};
use crate::limits::MAX_RECORD_BYTES;
use crate::storage::{InputFile, OutputFile, Storage};

/// First bytes of a journal.
const MAGIC: &[u8; 16] = b"tiesmith journal";
/// First bytes of every record.
const MARKER: [u8; 4] = *b"TSR\n";
/// Marker, kind, encoding, two zeros, number, stored length, length.
const HEAD_BYTES: usize = 24;
const CHECKSUM_BYTES: usize = 16;
/// Longest record in the file: a crash leaves no more than a part of one.
const LONGEST_RECORD_BYTES: u64 = (HEAD_BYTES + MAX_RECORD_BYTES + CHECKSUM_BYTES) as u64;
/// Shorter payloads are stored as they are.
const COMPRESSED_FROM_BYTES: usize = 1 << 10;
const COMPRESSION_LEVEL: i32 = 3;
/// Bytes looked at at once when a damaged record is followed by something.
const SCAN_BYTES: u64 = 1 << 20;

/// One record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// What it is about.
    pub kind: u8,
    /// Its content.
    pub payload: Vec<u8>,
}

/// A journal that can be appended to.
pub struct Journal {
    file: Box<dyn OutputFile>,
    end: u64,
    number: u64,
}

impl Journal {
    /// Creates a journal with its first record. Both are durable afterwards, but for the directory entry.
    pub fn create(path: &Path, kind: u8, payload: &[u8], storage: &dyn Storage) -> Result<Self> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(encode(0, kind, payload, path)?);
        let file = storage.create(path, 0)?;
        file.write_at(&bytes, 0)?;
        file.sync()?;
        Ok(Self { file, end: bytes.len() as u64, number: 1 })
    }

    /// Opens the journal at `path` for more records and cuts off an incomplete tail. Shows every record to `each`, in
    /// order, whose errors end it. `None` if not even the first record was ever complete.
    pub fn open(path: &Path, storage: &dyn Storage, each: impl FnMut(Record) -> Result<()>) -> Result<Option<Self>> {
        let Some((end, number)) = replay(path, storage, each)? else { return Ok(None) };
        Ok(Some(Self { file: storage.reopen(path, end)?, end, number }))
    }

    /// Appends a record and makes it durable.
    pub fn append(&mut self, kind: u8, payload: &[u8]) -> Result<()> {
        let bytes = encode(self.number, kind, payload, self.file.path())?;
        self.file.write_at(&bytes, self.end)?;
        self.file.sync()?;
        self.end += bytes.len() as u64;
        self.number += 1;
        Ok(())
    }
}

/// Shows every record of the journal at `path` to `each`, in order; returns where the last one ends and how many there
/// are, or `None` if there is none.
pub fn replay(
    path: &Path,
    storage: &dyn Storage,
    mut each: impl FnMut(Record) -> Result<()>,
) -> Result<Option<(u64, u64)>> {
    let file = storage.open(path).map_err(|e| match storage.is_file(path) {
        true => e,
        false => e.replace_help("the journal of an unfinished run belongs there: remove what is there to start over"),
    })?;
    let bytes = file.identity().bytes;
    let mut magic = [0; MAGIC.len()];
    let mut end = MAGIC.len() as u64;
    let mut number = 0;
    if bytes >= end {
        file.read_at(&mut magic, 0)?;
    }
    if magic == *MAGIC {
        while let Some((record, length)) = read(&*file, end, Some(number))? {
            each(record)?;
            end += length;
            number += 1;
        }
    } else {
        end = 0;
    }
    let damaged = |what: String| {
        let what = format!("the journal is damaged: record {} at byte {end} is unreadable, {what}", number + 1);
        Err(Error::input(what).at(path).help("use --restart to start over"))
    };
    if bytes - end > LONGEST_RECORD_BYTES {
        return damaged(format!("and {} bytes are no part of one record", bytes - end));
    }
    if let Some(sound) = next_sound(&*file, end)? {
        return damaged(format!("but one at byte {sound} is not"));
    }
    Ok((number > 0).then_some((end, number)))
}

/// A record as it is stored.
fn encode(number: u64, kind: u8, payload: &[u8], path: &Path) -> Result<Vec<u8>> {
    if payload.len() > MAX_RECORD_BYTES {
        return Err(Error::failed(format!("a record of {} bytes is too long for the journal", payload.len())).at(path));
    }
    let compressed = match payload.len() {
        0..COMPRESSED_FROM_BYTES => None,
        _ => zstd::bulk::compress(payload, COMPRESSION_LEVEL).ok().filter(|c| c.len() < payload.len()),
    };
    let stored = compressed.as_deref().unwrap_or(payload);
    let mut bytes = Vec::with_capacity(HEAD_BYTES + stored.len() + CHECKSUM_BYTES);
    bytes.extend(MARKER);
    bytes.extend([kind, u8::from(compressed.is_some()), 0, 0]);
    bytes.extend(number.to_le_bytes());
    bytes.extend((stored.len() as u32).to_le_bytes());
    bytes.extend((payload.len() as u32).to_le_bytes());
    bytes.extend(stored);
    let checksum = checksum(&bytes);
    bytes.extend(checksum);
    Ok(bytes)
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    *blake3::hash(bytes).as_bytes().first_chunk().expect("a hash has 32 bytes")
}

/// The record at `offset` and its stored length; `None` if there is no sound one (with the number given, if one is).
fn read(file: &dyn InputFile, offset: u64, number: Option<u64>) -> Result<Option<(Record, u64)>> {
    let bytes = file.identity().bytes;
    if bytes < offset + (HEAD_BYTES + CHECKSUM_BYTES) as u64 {
        return Ok(None);
    }
    let mut head = [0; HEAD_BYTES];
    file.read_at(&mut head, offset)?;
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let (stored, length) = (word(16) as usize, word(20) as usize);
    let found = u64::from(word(8)) | u64::from(word(12)) << 32;
    let total = (HEAD_BYTES + stored + CHECKSUM_BYTES) as u64;
    let plausible = head[..4] == MARKER && head[5] <= 1 && head[6..8] == [0; 2] && length <= MAX_RECORD_BYTES;
    if !plausible || bytes - offset < total || number.is_some_and(|number| number != found) {
        return Ok(None);
    }
    let mut content = vec![0; total as usize];
    file.read_at(&mut content, offset)?;
    let (signed, sum) = content.split_at(HEAD_BYTES + stored);
    if checksum(signed) != sum {
        return Ok(None);
    }
    let payload = &signed[HEAD_BYTES..];
    let payload = match head[5] {
        0 => payload.to_vec(),
        _ => match zstd::bulk::decompress(payload, length) {
            Ok(payload) => payload,
            Err(_) => return Ok(None),
        },
    };
    Ok((payload.len() == length).then_some((Record { kind: head[4], payload }, total)))
}

/// Where the first sound record at or behind `from` begins.
fn next_sound(file: &dyn InputFile, from: u64) -> Result<Option<u64>> {
    let bytes = file.identity().bytes;
    let mut from = from;
    while from < bytes {
        let length = (bytes - from).min(SCAN_BYTES);
        let mut part = vec![0; length as usize];
        file.read_at(&mut part, from)?;
        for at in part.windows(MARKER.len()).enumerate().filter(|(_, w)| *w == MARKER).map(|(at, _)| at as u64) {
            if read(file, from + at, None)?.is_some() {
                return Ok(Some(from + at));
            }
        }
        // A marker may lie across two parts.
        from += if length < SCAN_BYTES { length } else { length - MARKER.len() as u64 + 1 };
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{Disk, IoMode};
    use std::path::PathBuf;

    struct Fixture {
        _dir: tempfile::TempDir,
        path: PathBuf,
        disk: Disk,
    }

    fn payload(i: u8) -> Vec<u8> {
        // Short ones are stored, long ones compressed, but where everything is interpreted: zstd is written in C.
        vec![i; 1 << if cfg!(miri) { i } else { 2 * i }]
    }

    /// A journal with records 0 to `count - 1`.
    fn journal(count: u8) -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let fixture = Fixture { path: dir.path().join("journal"), _dir: dir, disk: Disk::new(IoMode::Read) };
        let mut journal = Journal::create(&fixture.path, 0, &payload(0), &fixture.disk).unwrap();
        for i in 1..count {
            journal.append(i, &payload(i)).unwrap();
        }
        fixture
    }

    impl Fixture {
        fn bytes(&self) -> Vec<u8> {
            std::fs::read(&self.path).unwrap()
        }

        /// The kinds of the records found when the file is `bytes`.
        fn kinds(&self, bytes: &[u8]) -> Result<Vec<u8>> {
            std::fs::write(&self.path, bytes).unwrap();
            let mut kinds = Vec::new();
            replay(&self.path, &self.disk, |record| {
                assert_eq!(record.payload, payload(record.kind));
                kinds.push(record.kind);
                Ok(())
            })?;
            Ok(kinds)
        }
    }

    #[test]
    fn what_is_appended_is_found_again_after_every_reopening() {
        let fixture = journal(1);
        for i in 1..9 {
            let mut seen = 0;
            let mut journal = Journal::open(&fixture.path, &fixture.disk, |record| {
                assert_eq!(record, Record { kind: seen, payload: payload(seen) });
                seen += 1;
                Ok(())
            });
            assert_eq!(seen, i);
            journal.as_mut().unwrap().as_mut().unwrap().append(i, &payload(i)).unwrap();
        }
        assert!(fixture.bytes().len() < 20_000, "long payloads are compressed");
    }

    #[test]
    fn a_tail_cut_off_anywhere_costs_only_the_last_record() {
        let fixture = journal(4);
        let whole = fixture.bytes();
        let ends: Vec<usize> = (1..=4).map(|n| journal(n).bytes().len()).collect();
        for length in 0..whole.len() {
            let complete = ends.iter().filter(|end| **end <= length).count() as u8;
            for zeros in [0, 1, 40, 5000].into_iter().take(if cfg!(miri) { 2 } else { 4 }) {
                let mut cut = whole[..length].to_vec();
                cut.resize(length + zeros, 0);
                let found = fixture.kinds(&cut).unwrap();
                // A record whose last bytes are zero anyway may count as complete.
                assert!(found.len() as u8 >= complete && found.len() as u8 <= complete + 1, "{length} {zeros}");
            }
        }
        // More can be appended behind the cut.
        std::fs::write(&fixture.path, &whole[..ends[2] + 7]).unwrap();
        Journal::open(&fixture.path, &fixture.disk, |_| Ok(())).unwrap().unwrap().append(3, &payload(3)).unwrap();
        assert_eq!(fixture.bytes(), whole);
    }

    #[test]
    fn a_flipped_bit_is_an_error_before_the_tail_and_a_cut_in_it() {
        let fixture = journal(3);
        let whole = fixture.bytes();
        let last = journal(2).bytes().len();
        for at in 0..whole.len() {
            for bit in [1, 128] {
                let mut damaged = whole.clone();
                damaged[at] ^= bit;
                match fixture.kinds(&damaged) {
                    Ok(kinds) => assert!(at >= last && kinds == [0, 1], "byte {at}: {kinds:?}"),
                    Err(error) => {
                        assert!(at < last, "byte {at}: {error}");
                        assert!(error.to_string().contains("--restart"), "{error}");
                        assert_eq!(error.exit_code(), 2);
                    }
                }
            }
        }
    }

    #[test]
    fn records_out_of_place_are_damage() {
        let fixture = journal(3);
        let whole = fixture.bytes();
        let (first, second) = (journal(1).bytes().len(), journal(2).bytes().len());
        let missing = [&whole[..first], &whole[second..]].concat();
        let twice = [&whole[..second], &whole[first..]].concat();
        for damaged in [missing, twice] {
            assert!(fixture.kinds(&damaged).unwrap_err().to_string().contains("damaged"));
        }
    }

    #[test]
    fn what_is_no_journal_is_none() {
        let fixture = journal(1);
        for bytes in [&b""[..], b"tiesmith journal", &[0; 500], b"something else altogether, of whatever length"] {
            assert!(fixture.kinds(bytes).unwrap().is_empty());
            assert!(Journal::open(&fixture.path, &fixture.disk, |_| Ok(())).unwrap().is_none());
        }
    }

    proptest::proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(0u8.., 0..400), at in 0usize..100) {
            let fixture = journal(2);
            let mut mixed = fixture.bytes();
            let at = at.min(mixed.len());
            mixed.splice(at.., bytes);
            let _ = fixture.kinds(&mixed);
        }
    }
}
