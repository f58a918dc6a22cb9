//! Files put together by hand, right and wrong: the reader takes the right ones and says of the wrong ones what they are.
//!
//! `fuzz/corpus/packed` has the right ones as seeds: two bytes (little-endian) with the length of the chunks, the chunks,
//! and the index before compression. Checksums of index and foot are made when the seed is read, so that what is mutated
//! gets past them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;

use super::format::{close, tail};
use super::*;
use crate::dtype::Dtype;
use crate::storage::{Disk, IoMode};

/// The base of all seeds: 70 floats, 3 bytes, nothing.
fn write_base(dir: &Path) -> String {
    let json = r#"{"a":{"dtype":"F32","shape":[7,10],"data_offsets":[0,280]},"b":{"dtype":"U8","shape":[3],"data_offsets":[280,283]},"c":{"dtype":"BF16","shape":[0],"data_offsets":[283,283]}}"#;
    let data: Vec<u8> = (0..283u32).map(|i| (i * 7) as u8).collect();
    let path = dir.join("base.safetensors");
    fs::write(&path, [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &data].concat()).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Tensors of a seed: name, type, shape, bytes and whether it is a difference.
type Made<'a> = (&'a str, Dtype, &'a [u64], Vec<u8>, bool);

/// Chunks and index of a file that holds these tensors, each of one chunk at most.
fn seed(base: &Checkpoint, made: &[Made<'_>]) -> Vec<u8> {
    let mut encoder = Encoder::new(8).unwrap();
    let (mut chunks, mut entries, mut tensors) = (Vec::new(), Vec::new(), Vec::new());
    for (name, dtype, shape, bytes, delta) in made {
        let tensor = Tensor { name: (*name).into(), dtype: *dtype, shape: shape.to_vec(), delta: *delta };
        let (width, units) = tensor.units().unwrap();
        tensors.push(tensor);
        if units == 0 {
            continue;
        }
        let mut before = vec![0; bytes.len()];
        if *delta {
            let own = base.get(name).unwrap();
            base.files[0].file.read_at(&mut before, own.offset).unwrap();
        }
        let mut mask = vec![0u64; units.div_ceil(64) as usize];
        for i in 0..units as usize {
            let differs = bytes[i * width..(i + 1) * width] != before[i * width..(i + 1) * width];
            mask[i / 64] |= u64::from(differs || !delta) << (i % 64);
        }
        let (compressed, stored) = encoder.encode(bytes, delta.then_some(&before[..]), width, &mask).unwrap();
        let check = checksum(compressed);
        let base = if *delta { checksum(&before) } else { 0 };
        entries.push(Entry { stored, length: compressed.len() as u32, check, base });
        chunks.extend_from_slice(compressed);
    }
    let settings = Settings::whole();
    let base = identify(base, "base.safetensors").unwrap();
    let contents = Contents { program: "test".into(), settings, fingerprint: None, base, tensors };
    let whole = tail(&contents, &entries, HEAD_BYTES + chunks.len() as u64).unwrap();
    let index = zstd::bulk::decompress(&whole[..whole.len() - 64], 1 << 20).unwrap();
    [&(chunks.len() as u16).to_le_bytes()[..], &chunks, &index].concat()
}

fn seeds(base: &Checkpoint) -> Vec<(&'static str, Vec<u8>)> {
    let floats =
        |step: usize| -> Vec<u8> { (0..280).map(|i| (i as u32 * 7 + u32::from(i % step == 0)) as u8).collect() };
    let a = |step| ("a", Dtype::F32, &[7, 10][..], floats(step), true);
    vec![
        ("seed-delta", seed(base, &[a(9), ("b", Dtype::U8, &[3], vec![168, 175, 1], true)])),
        ("seed-same", seed(base, &[a(1000), ("c", Dtype::BF16, &[0], Vec::new(), true)])),
        ("seed-whole", seed(base, &[a(1), ("new", Dtype::I64, &[2], vec![5; 16], false)])),
    ]
}

/// The file that a seed stands for.
fn assemble(seed: &[u8]) -> Vec<u8> {
    let (length, rest) = seed.split_first_chunk::<2>().map_or((0, seed), |(l, rest)| (u16::from_le_bytes(*l), rest));
    let (chunks, index) = rest.split_at(usize::from(length).min(rest.len()));
    [&head()[..], chunks, &close(index, HEAD_BYTES + chunks.len() as u64).unwrap()].concat()
}

/// Opens `bytes` as a packed task vector and reads all of it.
fn read_all(dir: &Path, bytes: &[u8]) -> Result<Vec<(String, Vec<u8>)>> {
    let path = dir.join("x.tvz");
    fs::write(&path, bytes).unwrap();
    let storage: Arc<dyn Storage> = Arc::new(Disk::new(IoMode::Read));
    let base = dir.join("base.safetensors");
    let checkpoint = Checkpoint::open_on(path.to_str().unwrap(), base.to_str(), &storage)?;
    let read = |tensor: &TensorEntry| {
        let mut bytes = vec![0; tensor.bytes as usize];
        // In two parts, of which one begins and one ends within a chunk.
        let (first, second) = bytes.split_at_mut(tensor.bytes as usize / 3);
        let file = &checkpoint.files[tensor.file as usize].file;
        file.read_at(first, tensor.offset)?;
        file.read_at(second, tensor.offset + first.len() as u64)?;
        Ok((tensor.name.to_string(), bytes))
    };
    checkpoint.tensors.iter().map(read).collect()
}

fn checks(dir: &Path, bytes: &[u8]) {
    if let Err(error) = read_all(dir, bytes) {
        assert_eq!(error.exit_code(), 2, "{error}");
        assert!(!error.to_string().contains('\n'), "{error}");
    }
}

fn prepared() -> (tempfile::TempDir, Vec<(&'static str, Vec<u8>)>) {
    let dir = tempfile::tempdir().unwrap();
    let storage: Arc<dyn Storage> = Arc::new(Disk::new(IoMode::Read));
    let base = Checkpoint::open(&write_base(dir.path()), &storage).unwrap();
    let seeds = seeds(&base);
    (dir, seeds)
}

#[test]
fn seeds_are_read_and_are_those_of_the_fuzz_target() {
    let (dir, seeds) = prepared();
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/packed");
    let place = |name: &str| -> PathBuf { corpus.join(name) };
    for (name, seed) in &seeds {
        if std::env::var_os("TIESMITH_WRITE_SEEDS").is_some() {
            fs::create_dir_all(&corpus).unwrap();
            fs::write(place(name), seed).unwrap();
        }
        assert!(fs::read(place(name)).unwrap() == *seed, "{name} is out of date: see TIESMITH_WRITE_SEEDS here");
        read_all(dir.path(), &assemble(seed)).unwrap();
    }
    let read = read_all(dir.path(), &assemble(&seeds[0].1)).unwrap();
    assert_eq!(read[1], ("b".to_owned(), vec![168, 175, 1]));
}

#[test]
fn what_a_hostile_index_says_is_refused() {
    let (dir, seeds) = prepared();
    let seed = String::from_utf8_lossy(&seeds[2].1).into_owned();
    let refused = |from: &str, to: &str, part: &str| {
        assert_eq!(from.len(), to.len());
        assert!(seed.contains(from), "{from}");
        let at = seeds[2].1.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        let mut changed = seeds[2].1.clone();
        changed[at..at + from.len()].copy_from_slice(to.as_bytes());
        let error = read_all(dir.path(), &assemble(&changed)).unwrap_err().to_string();
        assert!(error.contains(part), "{part}: {error}");
    };
    refused("[7,10]", "[7,11]", "base lacks");
    refused("[7,10]", "[9e 8]", "index");
    refused("\"I64\"", "\"F99\"", "index");
    refused("\"shape\":[2]", "\"shape\":[1]", "cannot be as");
    refused("\"name\":\"new\"", "\"name\":\"a\\u0", "index");
    refused("\"F32\"", "\"I32\"", "base lacks");
    refused("\"delta\":false", "\"delta\":null ", "index");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, rng_seed: proptest::test_runner::RngSeed::Fixed(7), ..ProptestConfig::default() })]

    #[test]
    fn mutated_seeds_never_panic(
        which in 0usize..3,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let (dir, seeds) = prepared();
        let mut seed = seeds[which].1.clone();
        for (place, byte) in changes {
            let place = place.index(seed.len());
            seed[place] = byte;
        }
        if let Some(cut) = cut {
            seed.truncate(cut.index(seed.len() + 1));
        }
        checks(dir.path(), &assemble(&seed));
    }

    #[test]
    fn damaged_files_are_refused(
        which in 0usize..3,
        place in any::<prop::sample::Index>(),
        flip in 1u8..,
        cut in any::<bool>(),
    ) {
        let (dir, seeds) = prepared();
        let mut file = assemble(&seeds[which].1);
        let place = place.index(file.len());
        match cut {
            true => file.truncate(place),
            false => file[place] ^= flip,
        }
        checks(dir.path(), &file);
        prop_assert!(read_all(dir.path(), &file).is_err(), "byte {place}");
    }
}
