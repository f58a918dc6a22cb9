//! The directory of a zip archive whose members are stored as they are, so that each is a range of the file.
//!
//! - The directory at the end of the file decides; a member's own header is only asked where its data begin, and must
//!   name the same member.
//! - Zip64 is read wherever it is announced. Compressed, encrypted, split or prefixed archives are refused.
//! - Nothing is allocated before it was compared with the length of the file.
//!
//! Format: PKWARE APPNOTE 6.3.10, sections 4.3.7 to 4.3.16 and 4.5.3. Knows nothing of what members mean.

use std::collections::HashMap;

use crate::error::{Error, Result, printable};
use crate::limits::MAX_HEADER_BYTES;
use crate::storage::InputFile;

/// Length of the end record without its comment, and its signature.
const END_BYTES: u64 = 22;
const END: [u8; 4] = *b"PK\x05\x06";
/// Length and signature of the zip64 end record and of what locates it.
const END64_BYTES: u64 = 56;
const END64: [u8; 4] = *b"PK\x06\x06";
const LOCATOR_BYTES: u64 = 20;
const LOCATOR: [u8; 4] = *b"PK\x06\x07";
/// Length without names, and signature, of an entry of the directory and of a member's own header.
const ENTRY_BYTES: usize = 46;
const ENTRY: [u8; 4] = *b"PK\x01\x02";
const LOCAL_BYTES: usize = 30;
const LOCAL: [u8; 4] = *b"PK\x03\x04";
/// Longest comment of an archive.
const MAX_COMMENT: u64 = 0xffff;
/// The field with the 64-bit numbers of an entry.
const ZIP64_FIELD: u16 = 1;

/// What a file that is cut off or damaged needs.
const AGAIN: &str = "download or copy it again";

/// A member of the archive, as the directory has it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Member {
    /// Where its own header begins.
    header: u64,
    /// Its length in bytes.
    pub bytes: u64,
    encrypted: bool,
    method: u16,
    stored_bytes: u64,
}

/// An archive's directory.
pub(super) struct Archive<'a> {
    file: &'a dyn InputFile,
    members: HashMap<String, Member>,
    /// Where the directory begins: members' data end before.
    end_of_data: u64,
    /// The directory as stored.
    pub raw: Vec<u8>,
}

impl<'a> Archive<'a> {
    /// Reads the directory of `file`.
    pub(super) fn read(file: &'a dyn InputFile) -> Result<Self> {
        let (begin, bytes, count) = end_record(file)?;
        if bytes > MAX_HEADER_BYTES {
            return Err(Error::input(format!(
                "the archive's directory has {bytes} bytes; at most {MAX_HEADER_BYTES} are accepted"
            )));
        }
        let mut raw = vec![0; bytes as usize];
        file.read_at(&mut raw, begin)?;
        let mut members = HashMap::new();
        let mut rest = &raw[..];
        while !rest.is_empty() {
            let (name, member) = entry(&mut rest)?;
            if let Some(name) = members.insert(name.clone(), member).map(|_| name) {
                return Err(Error::input(format!("the archive has two members \"{}\"", printable(&name))));
            }
        }
        if members.len() as u64 != count {
            let found = members.len();
            return Err(Error::input(format!("the archive's directory has {found} members, not {count}")).help(AGAIN));
        }
        Ok(Self { file, members, end_of_data: begin, raw })
    }

    /// The names of all members, in no order.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.members.keys().map(String::as_str)
    }

    /// The member called `name`.
    pub(super) fn get(&self, name: &str) -> Option<Member> {
        self.members.get(name).copied()
    }

    /// Where the data of the member called `name` begin and how many bytes they are.
    pub(super) fn range(&self, name: &str) -> Result<(u64, u64)> {
        let fail = |what: String| Error::input(format!("archive member \"{}\" {what}", printable(name)));
        let member = self.get(name).ok_or_else(|| fail("is not there".into()).help(AGAIN))?;
        let Member { header, bytes, encrypted, method, stored_bytes } = member;
        if encrypted {
            return Err(fail("is encrypted".into()).help("decrypt the archive first"));
        }
        if method != 0 || stored_bytes != bytes {
            return Err(fail(format!("is compressed (method {method})")).help(super::CONVERT));
        }
        let mut start = [0; LOCAL_BYTES];
        if self.end_of_data.checked_sub(LOCAL_BYTES as u64).is_none_or(|last| header > last) {
            return Err(fail(format!("begins at {header}, beyond the archive's data")).help(AGAIN));
        }
        self.file.read_at(&mut start, header)?;
        let (name_bytes, extra_bytes) = (u16_at(&start, 26), u16_at(&start, 28));
        let begin = header + LOCAL_BYTES as u64 + u64::from(name_bytes) + u64::from(extra_bytes);
        let mut own = vec![0; usize::from(name_bytes)];
        let fits = begin <= self.end_of_data && bytes <= self.end_of_data - begin;
        if start[..4] == LOCAL && fits {
            self.file.read_at(&mut own, header + LOCAL_BYTES as u64)?;
        }
        match start[..4] == LOCAL && own == name.as_bytes() && u16_at(&start, 8) == 0 {
            true => Ok((begin, bytes)),
            false if start[..4] == LOCAL && !fits => {
                let end = self.end_of_data;
                Err(fail(format!("has {bytes} bytes from {begin} on, but the archive's data end at {end}")).help(AGAIN))
            }
            false => Err(fail(format!("is not what stands at byte {header}")).help(AGAIN)),
        }
    }
}

/// Where the directory begins, its length, and the number of its entries.
fn end_record(file: &dyn InputFile) -> Result<(u64, u64, u64)> {
    let file_bytes = file.identity().bytes;
    let no_end = || Error::input("a zip archive without its end: the file is cut short or damaged").help(AGAIN);
    if file_bytes < END_BYTES {
        return Err(no_end());
    }
    let mut tail = vec![0; file_bytes.min(END_BYTES + MAX_COMMENT) as usize];
    let tail_begin = file_bytes - tail.len() as u64;
    file.read_at(&mut tail, tail_begin)?;
    // The record is the last one whose comment ends with the file.
    let is_end = |&at: &usize| {
        let rest = &tail[at..];
        rest[..4] == END && END_BYTES as usize + usize::from(u16_at(rest, 20)) == rest.len()
    };
    let at = (0..=tail.len() - END_BYTES as usize).rev().find(is_end).ok_or_else(no_end)?;
    let (end, record) = (tail_begin + at as u64, &tail[at..]);
    let disks = [u16_at(record, 4), u16_at(record, 6)];
    let entries = [u16_at(record, 8), u16_at(record, 10)];
    let mut found = (u64::from(u32_at(record, 16)), u64::from(u32_at(record, 12)), u64::from(entries[0]));
    let mut split = disks.iter().any(|&disk| disk != 0 && disk != u16::MAX) || entries[0] != entries[1];
    let mut end_of_directory = end;
    if let Some((at, record)) = end64(file, end)? {
        split = u32_at(&record, 16) != 0 || u32_at(&record, 20) != 0 || u64_at(&record, 24) != u64_at(&record, 32);
        found = (u64_at(&record, 48), u64_at(&record, 40), u64_at(&record, 24));
        end_of_directory = at;
    }
    if split {
        return Err(Error::input("an archive that is split over several files").help("join its parts first"));
    }
    let (begin, bytes, _) = found;
    match begin.checked_add(bytes) {
        Some(stop) if stop <= end_of_directory => Ok(found),
        _ => Err(Error::input(format!(
            "the archive's directory has {bytes} bytes from {begin} on, but must end before {end_of_directory}"
        ))
        .help(AGAIN)),
    }
}

/// The zip64 end record and where it is, if one is announced before the end record at `end`.
fn end64(file: &dyn InputFile, end: u64) -> Result<Option<(u64, [u8; END64_BYTES as usize])>> {
    let mut locator = [0; LOCATOR_BYTES as usize];
    let Some(at) = end.checked_sub(LOCATOR_BYTES) else { return Ok(None) };
    file.read_at(&mut locator, at)?;
    if locator[..4] != LOCATOR {
        return Ok(None);
    }
    let begin = u64_at(&locator, 8);
    let mut record = [0; END64_BYTES as usize];
    if at.checked_sub(END64_BYTES).is_some_and(|last| begin <= last) {
        file.read_at(&mut record, begin)?;
    }
    match record[..4] == END64 {
        true => Ok(Some((begin, record))),
        false => Err(Error::input(format!("no zip64 record at byte {begin}, where one is announced")).help(AGAIN)),
    }
}

/// Takes the first entry off the directory.
fn entry(rest: &mut &[u8]) -> Result<(String, Member)> {
    let damaged = || Error::input("the archive's directory is damaged").help(AGAIN);
    let (fixed, after) = rest.split_at_checked(ENTRY_BYTES).ok_or_else(damaged)?;
    if fixed[..4] != ENTRY {
        return Err(damaged());
    }
    let [name_bytes, extra_bytes, comment_bytes] = [28, 30, 32].map(|at| usize::from(u16_at(fixed, at)));
    let (name, after) = after.split_at_checked(name_bytes).ok_or_else(damaged)?;
    let (extra, after) = after.split_at_checked(extra_bytes).ok_or_else(damaged)?;
    let (_, after) = after.split_at_checked(comment_bytes).ok_or_else(damaged)?;
    *rest = after;
    let name = String::from_utf8(name.to_vec()).map_err(|_| Error::input("an archive member's name is not UTF-8"))?;
    let mut large = zip64(extra);
    let mut wide = |at: usize| match u32_at(fixed, at) {
        u32::MAX => large.next().ok_or_else(damaged),
        number => Ok(u64::from(number)),
    };
    // In this order, and only those that did not fit 32 bits.
    let (bytes, stored_bytes, header) = (wide(24)?, wide(20)?, wide(42)?);
    let encrypted = u16_at(fixed, 8) & 0x2041 != 0;
    Ok((name, Member { header, bytes, encrypted, method: u16_at(fixed, 10), stored_bytes }))
}

/// The numbers of the zip64 field among an entry's further fields.
fn zip64(mut extra: &[u8]) -> impl Iterator<Item = u64> + '_ {
    let mut numbers: &[u8] = &[];
    while let Some((head, rest)) = extra.split_at_checked(4) {
        let Some((field, rest)) = rest.split_at_checked(usize::from(u16_at(head, 2))) else { break };
        if u16_at(head, 0) == ZIP64_FIELD {
            numbers = field;
            break;
        }
        extra = rest;
    }
    numbers.chunks_exact(8).map(|number| u64_at(number, 0))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}
