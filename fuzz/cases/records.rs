//! Any bytes as a journal, raw or as records with right checksums: they are decoded or refused, what was decoded is encoded
//! as the same, and a journal that was cut off is whole afterwards. Nothing is merged.
//!
//! Of the first byte, the two lowest bits say what follows: 0, what stands behind the magic bytes; 1, the payload of a record
//! of work that is done; 2 and 3, records: kind (1 byte), length (2 bytes) and payload of each, and at the end perhaps a part
//! of one. With 3, the byte's other bits say how many bytes of the end are missing.

use std::path::Path;

use tiesmith::fuzz::{Decoded, decode_journal};

use super::journal::record;

const JOURNAL: &str = "out/.tiesmith/journal";

/// The content of a `begin` that makes sense.
const BEGIN: &[u8] = br#"{"version":7,"program":"tiesmith","fingerprint":"0","untimed_fingerprint":"0","recipe":{},"inputs":[],"shards":[],"hashes":false}"#;

/// The journal that `data` stands for, and how many sound records it has, where that is known.
fn journal(data: &[u8]) -> Option<(Vec<u8>, Option<u64>)> {
    let (&way, mut data) = data.split_first()?;
    let mut bytes = b"tiesmith journal".to_vec();
    let mut count = 0;
    match way % 4 {
        0 => {
            bytes.extend(data);
            return Some((bytes, None));
        }
        1 => {
            bytes.extend(record(0, 1, BEGIN));
            bytes.extend(record(1, 2, data));
            return Some((bytes, Some(2)));
        }
        _ => {
            while let Some(([kind, low, high], rest)) = data.split_first_chunk() {
                let length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
                let (payload, rest) = rest.split_at(length);
                bytes.extend(record(count, *kind, payload));
                (count, data) = (count + 1, rest);
            }
        }
    }
    let cut = if way % 4 == 3 { usize::from(way / 4) } else { 0 };
    bytes.truncate(bytes.len() - cut.min(bytes.len() - 16));
    Some((bytes, (cut == 0).then_some(count)))
}

/// See the file's documentation.
pub fn run(data: &[u8]) {
    let Some((bytes, count)) = journal(data) else { return };
    let files = super::Files::new("records");
    files.put(JOURNAL, &bytes);
    let (path, storage) = (files.dir.join(JOURNAL), &*files.storage);
    let now = || files.tree("").remove(Path::new(JOURNAL)).expect("the journal stays");
    let decoded: Option<Decoded> = match decode_journal(&path, storage) {
        Ok(decoded) => decoded,
        Err(error) => {
            super::refused(&error);
            assert!(count.is_none(), "sound records were refused: {error}");
            assert!(now() == bytes, "what was refused was changed");
            return;
        }
    };
    assert!(count.is_none_or(|count| decoded.map_or(count == 0, |found| found.records <= count)), "{decoded:?}");
    // Else no work would be decoded.
    assert!(
        data[0] % 4 != 1 || decoded.is_some_and(|found| found.records > 0),
        "the first record is not of this version"
    );
    let whole = now();
    assert!(bytes.starts_with(&whole), "something was changed that was to be cut off");
    let again = decode_journal(&path, storage).expect("what was cut off is whole");
    assert_eq!((again, now() == whole), (decoded, true));
}
