//! Any bytes as a journal, raw or as records with right checksums: they are decoded or refused, what was decoded is encoded
//! as the same, and a journal that was cut off is whole afterwards. Nothing is merged, and the file is in memory.
//!
//! Of the first byte, the two lowest bits say what follows: 0, what stands behind the magic bytes; 1, the payload of a record
//! of work that is done; 2 and 3, records: kind (1 byte), length (2 bytes) and payload of each, and at the end perhaps a part
//! of one. With 3, the byte's other bits say how many bytes of the end are missing.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tiesmith::fuzz::{Decoded, decode_journal};
use tiesmith::{Identity, InputFile, Lock, OutputFile, Result, Storage};

use super::journal::record;

/// A file system of one file.
struct Memory {
    path: PathBuf,
    content: Arc<Mutex<Vec<u8>>>,
}

struct File {
    path: PathBuf,
    identity: Identity,
    content: Arc<Mutex<Vec<u8>>>,
}

impl Memory {
    fn file(&self) -> Box<File> {
        let content = Arc::clone(&self.content);
        let bytes = content.lock().expect("no panic").len() as u64;
        Box::new(File { path: self.path.clone(), identity: Identity { bytes, ..Identity::default() }, content })
    }
}

impl InputFile for File {
    fn path(&self) -> &Path {
        &self.path
    }
    fn identity(&self) -> &Identity {
        &self.identity
    }
    fn identity_now(&self) -> Result<Identity> {
        Ok(self.identity.clone())
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        // Beyond the end of the file nothing is ever asked for.
        let offset = offset as usize;
        buffer.copy_from_slice(&self.content.lock().expect("no panic")[offset..offset + buffer.len()]);
        Ok(())
    }
}

impl OutputFile for File {
    fn path(&self) -> &Path {
        &self.path
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let mut content = self.content.lock().expect("no panic");
        assert_eq!(content.len() as u64, offset, "records follow without gaps");
        content.extend(bytes);
        Ok(())
    }
    fn sync(&self) -> Result<()> {
        Ok(())
    }
    fn release(&self, _offset: u64, _length: u64) {}
}

impl Storage for Memory {
    fn open(&self, _path: &Path) -> Result<Box<dyn InputFile>> {
        Ok(self.file())
    }
    fn reopen(&self, _path: &Path, length: u64) -> Result<Box<dyn OutputFile>> {
        self.content.lock().expect("no panic").truncate(length as usize);
        Ok(self.file())
    }
    fn create(&self, _path: &Path, _length: u64) -> Result<Box<dyn OutputFile>> {
        unreachable!("a journal is opened")
    }
    fn rename(&self, _from: &Path, _to: &Path) -> Result<()> {
        unreachable!("nothing is renamed")
    }
    fn sync_dir(&self, _path: &Path) -> Result<()> {
        unreachable!("nothing is renamed")
    }
    fn create_dir_all(&self, _path: &Path) -> Result<()> {
        unreachable!("nothing is made")
    }
    fn remove_file(&self, _path: &Path) -> Result<()> {
        unreachable!("nothing is removed")
    }
    fn remove_dir(&self, _path: &Path) -> Result<()> {
        unreachable!("nothing is removed")
    }
    fn list(&self, _path: &Path) -> Result<Vec<OsString>> {
        unreachable!("nothing is listed")
    }
    fn lock(&self, _path: &Path) -> Result<Lock> {
        unreachable!("nothing is locked")
    }
    fn free_bytes(&self, _path: &Path) -> Result<u64> {
        unreachable!("nothing is made")
    }
    fn identity(&self, _path: &Path) -> Result<Option<Identity>> {
        Ok(Some(self.file().identity))
    }
    fn is_dir(&self, _path: &Path) -> bool {
        false
    }
    fn is_file(&self, _path: &Path) -> bool {
        true
    }
    fn canonical(&self, path: &Path) -> PathBuf {
        path.to_path_buf()
    }
}

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
    let path = PathBuf::from("/out/.tiesmith/journal");
    let content = Arc::new(Mutex::new(bytes.clone()));
    let storage = Memory { path: path.clone(), content: Arc::clone(&content) };
    let now = || content.lock().expect("no panic").clone();
    let decoded: Option<Decoded> = match decode_journal(&path, &storage) {
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
    let again = decode_journal(&path, &storage).expect("what was cut off is whole");
    assert_eq!((again, now() == whole), (decoded, true));
}
