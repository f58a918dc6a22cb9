//! Reads and writes of which the system does only a part, or none because a signal came in between.
//!
//! Every storage goes through these loops, that of the fault-injection tests included.

use std::io::{ErrorKind, Result};

/// Reads with `read` (rest of the buffer, bytes done) until `buffer` is full or the source ends; returns the bytes read.
///
/// # Errors
///
/// The first error of `read` that is not an interruption.
pub fn read_fully(buffer: &mut [u8], mut read: impl FnMut(&mut [u8], u64) -> Result<usize>) -> Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match read(&mut buffer[done..], done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

/// Writes with `write` (rest of the bytes, bytes done) until everything is written.
///
/// # Errors
///
/// The first error of `write` that is not an interruption; [`ErrorKind::WriteZero`] if it takes nothing.
pub fn write_fully(bytes: &[u8], mut write: impl FnMut(&[u8], u64) -> Result<usize>) -> Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match write(&bytes[done..], done as u64) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(n) => done += n,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupted_and_short_transfers_are_continued() {
        let source = b"abcdefgh";
        let mut turn = 0;
        let mut transfer = |bytes: &mut [u8], done: u64| {
            turn += 1;
            if turn % 2 == 0 {
                return Err(ErrorKind::Interrupted.into());
            }
            let n = bytes.len().min(3);
            bytes[..n].copy_from_slice(&source[done as usize..done as usize + n]);
            Ok(n)
        };
        let mut buffer = [0; 8];
        assert_eq!(read_fully(&mut buffer, &mut transfer).unwrap(), 8);
        assert_eq!(&buffer, source);

        let mut written: Vec<u8> = Vec::new();
        let take_three = |rest: &[u8], done: u64| {
            assert_eq!(done as usize, written.len());
            written.extend(rest.iter().take(3));
            Ok(rest.len().min(3))
        };
        write_fully(source, take_three).unwrap();
        assert_eq!(written, source);
        assert_eq!(write_fully(source, |_, _| Ok(0)).unwrap_err().kind(), ErrorKind::WriteZero);
    }
}
