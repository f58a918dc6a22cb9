//! What any merge must do, without the merging: read every input byte once, and write as many bytes as the output has.
//!
//! Threads take turns at blocks of about 1 MiB: a positional read into a fixed buffer, a sum over it so that every
//! byte is touched, and after each share of reads a positional write. Files written are made durable, as a merge does.

use std::fs::{self, File};
use std::hint::black_box;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes of one read or write.
const BLOCK: u64 = 1 << 20;

/// A piece of a file.
struct Piece<'a> {
    file: &'a File,
    offset: u64,
    length: usize,
}

/// Reads `inputs` and writes files of the lengths `outputs` in `out`, with `threads` threads.
pub fn run(inputs: &[PathBuf], outputs: &[u64], out: &Path, threads: usize) -> io::Result<()> {
    let inputs: Vec<File> = inputs.iter().map(File::open).collect::<io::Result<_>>()?;
    let lengths = inputs.iter().map(|file| Ok(file.metadata()?.len())).collect::<io::Result<Vec<u64>>>()?;
    fs::create_dir_all(out)?;
    let create = |(number, &length): (usize, &u64)| {
        let file = File::create(out.join(number.to_string()))?;
        file.set_len(length).map(|()| file)
    };
    let written: Vec<File> = outputs.iter().enumerate().map(create).collect::<io::Result<_>>()?;
    let reads: Vec<Piece> = inputs.iter().zip(lengths).flat_map(|(file, length)| pieces(file, length)).collect();
    let writes: Vec<Piece> = written.iter().zip(outputs).flat_map(|(file, &length)| pieces(file, length)).collect();
    let next = AtomicUsize::new(0);
    let work = || -> io::Result<()> {
        let mut buffer = vec![0u8; BLOCK as usize];
        loop {
            let turn = next.fetch_add(1, Ordering::Relaxed);
            let Some(read) = reads.get(turn) else { return Ok(()) };
            let bytes = &mut buffer[..read.length];
            read.file.read_exact_at(bytes, read.offset)?;
            black_box(
                bytes.as_chunks::<8>().0.iter().fold(0u64, |sum, word| sum.wrapping_add(u64::from_le_bytes(*word))),
            );
            // The writes that fall to this turn's share of all reads.
            let due = |turn: usize| turn * writes.len() / reads.len();
            for write in &writes[due(turn)..due(turn + 1)] {
                write.file.write_all_at(&buffer[..write.length], write.offset)?;
            }
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("a worker does not panic"))
    })?;
    written.iter().try_for_each(File::sync_data)
}

/// A file cut into blocks.
fn pieces(file: &File, length: u64) -> impl Iterator<Item = Piece<'_>> {
    let starts = (0..length).step_by(BLOCK as usize);
    starts.map(move |offset| Piece { file, offset, length: BLOCK.min(length - offset) as usize })
}
