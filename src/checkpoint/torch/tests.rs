//! Good, odd and hostile PyTorch files.

use std::path::Path;

use super::super::Checkpoint;
use super::super::testing::disk;
use super::pickle;
use crate::dtype::Dtype;
use crate::limits::{MAX_PICKLE_BYTES, MAX_PICKLE_VALUES};

/// A file of the tests' folder, made by `make.py` there with Python's own pickle.
fn golden(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/torch").join(name)).unwrap()
}

fn open(name: &str, content: &[u8]) -> (crate::error::Result<Checkpoint>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, content).unwrap();
    (Checkpoint::open(path.to_str().unwrap(), &disk()), dir)
}

fn refused(content: &[u8], parts: &[&str]) {
    let begin = std::time::Instant::now();
    let (opened, dir) = open("m.bin", content);
    let error = opened.err().unwrap_or_else(|| panic!("accepted, but expected {parts:?}"));
    let text = error.to_string();
    assert_eq!(error.exit_code(), 2, "{text}");
    assert!(text.starts_with(dir.path().join("m.bin").to_str().unwrap()), "{text}");
    for part in parts {
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    }
    assert!(begin.elapsed().as_secs() < 20, "{text}: {:?}", begin.elapsed());
}

/// A member of an archive: name, data, and what its entry says.
struct Member {
    name: String,
    data: Vec<u8>,
    method: u16,
    flags: u16,
}

fn member(name: &str, data: impl Into<Vec<u8>>) -> Member {
    Member { name: name.into(), data: data.into(), method: 0, flags: 0 }
}

/// A plain zip archive of `members`.
fn zip(members: &[Member]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for Member { name, data, method, flags } in members {
        let (at, length) = ((out.len() as u32).to_le_bytes(), (data.len() as u32).to_le_bytes());
        let name_length = (name.len() as u16).to_le_bytes();
        let (method, flags) = (method.to_le_bytes(), flags.to_le_bytes());
        let common = [&[0, 0][..], &flags, &method, &[0; 8], &length, &length, &name_length, &[0, 0]].concat();
        out.extend([&b"PK\x03\x04"[..], &common[..], name.as_bytes(), data].concat());
        directory.extend([&b"PK\x01\x02"[..], &[0, 0], &common[..], &[0; 10], &at, name.as_bytes()].concat());
    }
    let count = (members.len() as u16).to_le_bytes();
    let (at, length) = ((out.len() as u32).to_le_bytes(), (directory.len() as u32).to_le_bytes());
    [&out[..], &directory, b"PK\x05\x06", &[0; 4], &count, &count, &length, &at, &[0, 0]].concat()
}

/// An archive with this pickle and a storage 0 of 24 bytes.
fn archive(pickle: &[u8]) -> Vec<u8> {
    zip(&[member("a/data.pkl", pickle), member("a/data/0", vec![0; 24]), member("a/version", "3\n")])
}

fn text(s: &str) -> Vec<u8> {
    [b"X", &(s.len() as u32).to_le_bytes()[..], s.as_bytes()].concat()
}

fn int(x: i64) -> Vec<u8> {
    [&[0x8a, 8], &x.to_le_bytes()[..]].concat()
}

fn ints(values: &[i64]) -> Vec<u8> {
    [b"(".to_vec(), values.iter().flat_map(|&x| int(x)).collect(), b"t".to_vec()].concat()
}

fn global(module: &str, name: &str) -> Vec<u8> {
    format!("c{module}\n{name}\n").into_bytes()
}

fn storage(class: &str, key: &str, count: i64) -> Vec<u8> {
    [b"(".to_vec(), text("storage"), global("torch", class), text(key), text("cpu"), int(count), b"tQ".to_vec()]
        .concat()
}

/// A tensor on `storage` that begins at `offset`.
fn tensor(storage: Vec<u8>, offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    let function = global("torch._utils", "_rebuild_tensor_v2");
    [function, b"(".to_vec(), storage, int(offset), ints(shape), ints(strides), b"\x89N".to_vec(), b"tR".to_vec()]
        .concat()
}

/// A pickle of the mapping {"w": value}.
fn dict(value: &[u8]) -> Vec<u8> {
    [b"\x80\x02}", &text("w")[..], value, b"s."].concat()
}

fn floats(offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    archive(&dict(&tensor(storage("FloatStorage", "0", 6), offset, shape, strides)))
}

#[test]
fn tensors_are_ranges_of_the_file() {
    let content = golden("pytorch_model.bin");
    let (opened, _dir) = open("pytorch_model.bin", &content);
    let checkpoint = opened.unwrap();
    let entries: Vec<(&str, Dtype, &[u64], u64)> =
        checkpoint.tensors.iter().map(|t| (&*t.name, t.dtype, &*t.shape, t.bytes)).collect();
    let expected: [(&str, Dtype, &[u64], u64); 10] = [
        ("embed.weight", Dtype::F32, &[3, 4], 48),
        ("layer.attributes", Dtype::F16, &[1, 2], 4),
        ("layer.empty", Dtype::F32, &[0, 5], 0),
        ("layer.float8", Dtype::F8_E4M3, &[2], 2),
        ("layer.mask", Dtype::BOOL, &[2], 2),
        ("layer.parameter", Dtype::BF16, &[3], 6),
        ("layer.positions", Dtype::I64, &[3], 24),
        ("layer.scalar", Dtype::F64, &[], 8),
        ("layer.view", Dtype::F32, &[2, 2], 16),
        ("lm_head.weight", Dtype::F32, &[3, 4], 48),
    ];
    assert_eq!(entries, expected);
    let data = |name: &str| {
        let entry = checkpoint.get(name).unwrap();
        content[entry.offset as usize..(entry.offset + entry.bytes) as usize].to_vec()
    };
    let of = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let all: Vec<f32> = (0..12).map(|i| 0.5 * i as f32).collect();
    assert_eq!(data("embed.weight"), of(&all));
    assert_eq!(data("layer.view"), of(&all[4..8]));
    assert_eq!(data("layer.scalar"), 3f64.to_le_bytes());
    assert_eq!(data("layer.float8"), [0x38, 0xb8]);
    // Tensors of one storage lie at one place.
    assert_eq!(checkpoint.get("lm_head.weight").unwrap().offset, checkpoint.get("embed.weight").unwrap().offset);
    let [warning] = &checkpoint.warnings[..] else { panic!("{:?}", checkpoint.warnings) };
    assert!(warning.contains("left out an entry that is no tensor: \"step\""), "{warning}");
}

#[test]
fn newer_pickles_and_nested_state_dicts_are_read() {
    let (opened, _dir) = open("protocol4.pt", &golden("protocol4.pt"));
    let (plain, _other) = open("m.bin", &golden("pytorch_model.bin"));
    let shapes = |checkpoint: &Checkpoint| {
        checkpoint.tensors.iter().map(|t| (t.name.clone(), t.dtype, t.shape.clone())).collect::<Vec<_>>()
    };
    assert_eq!(shapes(&opened.unwrap()), shapes(&plain.unwrap()));
}

#[test]
fn what_is_no_checkpoint_of_weights_is_refused_by_what_it_is() {
    refused(b"", &["the file is empty", "download"]);
    refused(b"PK\x03\x04", &["cut short"]);
    // A record is announced where there is no room for it.
    let announced = [&b"PK\x03\x04\0PK\x06\x07\r\0\0}\0\0\0\0\0\0\0\0\x01\0\0\0"[..], b"PK\x05\x06", &[0; 18]].concat();
    refused(&announced, &["no zip64 record at byte"]);
    refused(b"hello, this is text", &["not a zip archive: not a PyTorch checkpoint"]);
    refused(b"version https://git-lfs.github.com/spec/v1", &["git-lfs pointer"]);
    refused(b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", &["before version 1.6", "safetensors.torch"]);
    refused(b"\x80\x02}q\x00.", &["a bare pickle"]);
    let mut tar = vec![0; 1024];
    tar[257..262].copy_from_slice(b"ustar");
    refused(&tar, &["a tar archive", "convert"]);
    refused(&zip(&[member("a/x", "")]), &["without data.pkl"]);
    refused(&zip(&[member("a/data.pkl", ""), member("b/data.pkl", "")]), &["several data.pkl"]);
    refused(&zip(&[member("a/data.pkl", ""), member("a/constants.pkl", "")]), &["TorchScript"]);
    refused(&zip(&[member("a/data.pkl", ""), member("a/data.pkl", "")]), &["two members \"a/data.pkl\""]);
    refused(&golden("transposed.bin"), &["tensor \"w\"", "strides [1, 4]", "not in order", "contiguous()"]);
    refused(&golden("evil.bin"), &["data.pkl, byte ", "names __builtin__.eval, which tensors do not need"]);
}

#[test]
fn members_that_cannot_be_streamed_are_refused() {
    let good = dict(&tensor(storage("FloatStorage", "0", 6), 0, &[6], &[1]));
    let with = |method: u16, flags: u16| {
        zip(&[member("a/data.pkl", &good[..]), Member { method, flags, ..member("a/data/0", vec![0; 24]) }])
    };
    assert!(open("m.bin", &with(0, 0x0808)).0.is_ok());
    refused(&with(8, 0), &["tensor \"w\"", "\"a/data/0\" is compressed (method 8)", "convert"]);
    refused(&with(0, 1), &["is encrypted"]);
    refused(&zip(&[member("a/data.pkl", &good[..])]), &["\"a/data/0\" is not there"]);
    let order = |order: &str| {
        zip(&[member("a/data.pkl", &good[..]), member("a/data/0", vec![0; 24]), member("a/byteorder", order)])
    };
    assert!(open("m.bin", &order("little")).0.is_ok());
    refused(&order("big"), &["byte order \"big\""]);
    // The directory and the member's own header must agree.
    let mut other = with(0, 0);
    let at = other.windows(8).position(|bytes| bytes == b"a/data/0").unwrap();
    other[at] = b'b';
    refused(&other, &["is not what stands at byte"]);
    let mut long = with(0, 0);
    let at = long.windows(4).rposition(|bytes| bytes == b"PK\x01\x02").unwrap();
    long[at + 20..at + 28].copy_from_slice(&[0xff, 0xff, 0, 0, 0xff, 0xff, 0, 0]);
    refused(&long, &["has 65535 bytes from"]);
}

#[test]
fn large_archives_have_64_bit_numbers() {
    // The same file with its numbers in the zip64 field and record.
    let small = floats(0, &[6], &[1]);
    let at = small.windows(4).position(|bytes| bytes == b"PK\x01\x02").unwrap();
    let end = small.len() - 22;
    let mut wide = small[..at].to_vec();
    let mut rest = &small[at..end];
    let mut count = 0u64;
    while !rest.is_empty() {
        let name_bytes = usize::from(rest[28]);
        let (entry, next) = rest.split_at(46 + name_bytes);
        let number = |at: usize| u64::from(u32::from_le_bytes(entry[at..at + 4].try_into().unwrap())).to_le_bytes();
        let field = [&[9, 9, 1, 0, 7][..], &[1, 0, 24, 0], &number(24), &number(20), &number(42)].concat();
        let mut entry = entry.to_vec();
        [20, 24, 42].iter().for_each(|&at| entry[at..at + 4].fill(0xff));
        entry[30] = field.len() as u8;
        wide.extend([entry, field].concat());
        rest = next;
        count += 1;
    }
    let (begin, length) = (at as u64, (wide.len() - at) as u64);
    let record_at = wide.len() as u64;
    let numbers = [count, count, length, begin].map(u64::to_le_bytes).concat();
    wide.extend([&b"PK\x06\x06"[..], &44u64.to_le_bytes(), &[0; 12], &numbers].concat());
    wide.extend([&b"PK\x06\x07"[..], &[0; 4], &record_at.to_le_bytes(), &1u32.to_le_bytes()].concat());
    wide.extend([&b"PK\x05\x06"[..], &[0; 4], &[0xff; 12], &[0, 0]].concat());
    let (opened, _dir) = open("m.bin", &wide);
    let (plain, _other) = open("m.bin", &small);
    assert_eq!(opened.unwrap().tensors, plain.unwrap().tensors);
    let mut broken = wide.clone();
    let at = broken.len() - 22 - 20;
    broken[at + 8] ^= 1;
    refused(&broken, &["no zip64 record at byte"]);
}

#[test]
fn tensors_must_lie_within_their_storage() {
    assert!(open("m.bin", &floats(2, &[2, 2], &[2, 1])).0.is_ok());
    // Strides of dimensions of one, and of nothing at all, do not matter.
    assert!(open("m.bin", &floats(0, &[1, 6], &[99, 1])).0.is_ok());
    assert!(open("m.bin", &floats(6, &[0], &[1])).0.is_ok());
    refused(
        &floats(3, &[2, 2], &[2, 1]),
        &["tensor \"w\"", "F32 of shape [2, 2] from element 3", "storage of 24 bytes"],
    );
    refused(&floats(7, &[0], &[1]), &["reaches beyond"]);
    refused(&floats(i64::MAX, &[1], &[1]), &["reaches beyond"]);
    refused(&floats(0, &[2], &[i64::MAX]), &["reaches beyond"]);
    refused(&floats(0, &[i64::MAX, i64::MAX], &[1, 1]), &["too large"]);
    refused(&floats(0, &[6], &[0]), &["not in order"]);
    refused(&floats(0, &[2, 3], &[1, 2]), &["not in order"]);
    refused(&floats(-1, &[1], &[1]), &["begins at element -1"]);
    refused(&floats(0, &[-1], &[1]), &["size or stride -1"]);
    refused(&floats(0, &[1, 2], &[1]), &["2 dimensions with 1 strides"]);
    refused(&floats(0, &[1; 65], &[1; 65]), &["65 dimensions"]);
    let of = |class: &str, key: &str, count: i64| archive(&dict(&tensor(storage(class, key, count), 0, &[1], &[1])));
    refused(&of("FloatStorage", "0", 7), &["storage 0 of 7 elements has 24 bytes"]);
    refused(&of("FloatStorage", "0", i64::MAX), &["has 24 bytes"]);
    refused(&of("FloatStorage", "0", -1), &["a storage of -1 elements"]);
    refused(&of("FloatStorage", "../0", 6), &["\"a/data/../0\" is not there"]);
    refused(&of("QInt8Storage", "0", 24), &["names torch.QInt8Storage"]);
    refused(&of("float32", "0", 6), &["not a storage"]);
}

#[test]
fn only_what_describes_tensors_is_allowed() {
    let pickle = |body: &[u8], parts: &[&str]| refused(&archive(&dict(body)), parts);
    for (module, name) in [
        ("os", "system"),
        ("builtins", "exec"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_tensor_v2x"),
        ("torch._utils", "_import_dotted_name"),
        ("collections", "OrderedDict.fromkeys"),
        ("torch.serialization", "load"),
        ("a\u{202e}b", "c\u{1b}[31m"),
    ] {
        let call = [global(module, name), b"(".to_vec(), text("x"), b"tR".to_vec()].concat();
        pickle(&call, &["data.pkl, byte 9: the pickle names ", "not read any further"]);
        let stacked = [text(module), text(name), b"\x93".to_vec()].concat();
        pickle(&stacked, &["the pickle names "]);
    }
    // INST, OBJ, NEWOBJ, EXT1, NEXT_BUFFER, PERSID, a float as text: whatever PyTorch does not write.
    for opcode in [&b"ios\nsystem\n"[..], b"(o", b")\x81", b"\x82\x01", b"\x97", b"P1\n", b"F1.0\n", b"I01\n", b"\xff"]
    {
        pickle(opcode, &["is not one that tensors need"]);
    }
    pickle(b"h\x05", &["value 5 was never memorised"]);
    pickle(b"\x85", &["nothing is left", "byte "]);
    pickle(b"(\x85", &["nothing is left"]);
    pickle(b"u", &["no mark is open"]);
    pickle(b"RRR", &["arguments that are no tuple"]);
    pickle(b"X\xff\xff\xff\xffabc", &["a text of 4294967295 bytes"]);
    pickle(b"X\x01\x00\x00\x00\xff", &["not UTF-8"]);
    pickle(b"NQ", &["not a storage"]);
    pickle(&[global("torch", "Tensor"), b")R".to_vec()].concat(), &["arguments that do not fit"]);
    pickle(&[global("torch._utils", "_rebuild_tensor_v2"), b")R".to_vec()].concat(), &["storage, offset, size"]);
    refused(&archive(b""), &["the pickle ends in the middle"]);
    refused(&archive(b"\x80\x02."), &["nothing is left"]);
    refused(&archive(b"\x80\x01N."), &["pickle protocol 1"]);
    refused(&archive(b"\x80\x02]."), &["no mapping from names to tensors"]);
    let twice = [b"\x80\x02}".to_vec(), text("w"), tensor(storage("FloatStorage", "0", 6), 0, &[6], &[1])].concat();
    let twice = [&twice[..], b"s", &twice[3..], b"s."].concat();
    refused(&archive(&twice), &["tensor \"w\": the pickle lists it twice"]);
    let name = [b"\x80\x02}".to_vec(), text(&"n".repeat(5000)), tensor(storage("FloatStorage", "0", 6), 0, &[6], &[1])];
    refused(&archive(&[&name.concat()[..], b"s."].concat()), &["5000 bytes, at most 4096"]);
    let key = tensor(storage("FloatStorage", &"k".repeat(65), 6), 0, &[1], &[1]);
    refused(&archive(&dict(&key)), &["a storage's name has 65 bytes"]);
}

#[test]
fn what_contains_itself_does_no_harm() {
    // A list in itself, a mapping in itself, and a very deep tuple.
    let list = [&b"]q\x01h\x01a"[..]].concat();
    refused(&archive(&dict(&list)), &["no entry is a tensor: the first of 1 is \"w\""]);
    assert!(open("m.bin", &archive(b"\x80\x02}.")).0.is_ok_and(|checkpoint| checkpoint.tensors.is_empty()));
    refused(&archive(b"\x80\x02}q\x01X\x0a\x00\x00\x00state_dicth\x01s."), &["no entry is a tensor"]);
    let deep = [&b")"[..], &b"\x85".repeat(900_000)].concat();
    refused(&archive(&dict(&deep)), &["no entry is a tensor"]);
}

#[test]
fn pickles_that_would_be_huge_are_refused_quickly() {
    let many = MAX_PICKLE_VALUES + 1;
    for (body, message) in [
        (b"N".repeat(many), "values"),
        (b"(".repeat(many), "marks"),
        ([b"]q\x00".to_vec(), b"h\x00".repeat(many)].concat(), "values on the stack"),
        ([b"N".to_vec(), b"\x94".repeat(many)].concat(), "memorised values"),
        // One long text as the name of a storage, of a module and of entries, very often.
        ([text(&"x".repeat(1 << 20)), b"\x940".to_vec()].concat(), "is not one that tensors need"),
    ] {
        refused(&archive(&dict(&body)), &[message]);
    }
    let long = [b"\x80\x02}".to_vec(), text(&"x".repeat(1 << 20)), b"q\x00N".to_vec(), b"s".to_vec()].concat();
    let again = b"h\x00Ns".repeat(500_000);
    refused(&archive(&[&long[..], &again, b"."].concat()), &["a tensor's name has 1048576 bytes"]);
    let module = [text(&"x".repeat(1 << 20)), b"q\x00".to_vec(), b"h\x00\x93".to_vec()].concat();
    refused(&archive(&dict(&module)), &["the pickle names xxx"]);
    let items = [b"(".to_vec(), b"N".repeat(100_000), b"tq\x00".to_vec()].concat();
    let size = [global("torch", "Size"), b"q\x01".to_vec(), items, b"h\x01h\x00\x85R".repeat(100_000)].concat();
    assert!(open("m.bin", &archive(&dict(&[&size[..], b"]"].concat()))).0.is_err());
    let file = zip(&[member("a/data.pkl", vec![b'N'; MAX_PICKLE_BYTES as usize + 1])]);
    refused(&file, &["at most 16000000 are accepted"]);
}

#[test]
fn no_mutation_of_a_file_makes_it_panic() {
    let seeds = [golden("pytorch_model.bin"), golden("protocol4.pt"), floats(0, &[2, 3], &[3, 1]), golden("evil.bin")];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.bin");
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let (mut accepted, mut refused) = (0, 0);
    for round in 0..6000 {
        let mut content = seeds[round % seeds.len()].clone();
        for _ in 0..1 + random(3) {
            let at = random(content.len());
            match random(6) {
                0 => content.truncate(at.max(1)),
                1 => drop(content.splice(at..at, [random(256) as u8])),
                2 => content[at] = [0, 1, 0x7f, 0x80, 0xff, b'.', b'R', b'Q'][random(8)],
                3 => content[at] ^= 1 << random(8),
                4 => {
                    let end = (at + 1 + random(16)).min(content.len());
                    let piece = content[at..end].to_vec();
                    let to = random(content.len());
                    drop(content.splice(to..to, piece));
                }
                _ => drop(content.remove(at)),
            }
            if content.is_empty() {
                content.push(0);
            }
        }
        std::fs::write(&path, &content).unwrap();
        match Checkpoint::open(path.to_str().unwrap(), &disk()) {
            Ok(checkpoint) => {
                accepted += 1;
                let inside = |t: &super::TensorEntry| t.offset + t.bytes <= content.len() as u64;
                assert!(checkpoint.tensors.iter().all(inside));
            }
            Err(error) => {
                refused += 1;
                assert_eq!(error.exit_code(), 2, "{error}");
            }
        }
    }
    assert!(accepted > 200 && refused > 2000, "{accepted} {refused}");
}

#[test]
fn no_mutation_of_a_pickle_makes_it_panic() {
    // Without the archive around it, every change reaches the machine.
    let whole = golden("pytorch_model.bin");
    let begin = whole.windows(3).position(|bytes| bytes == b"\x80\x02c").unwrap();
    let end = whole.windows(4).skip(begin).position(|bytes| bytes == b"PK\x07\x08").unwrap() + begin;
    let seed = &whole[begin..end];
    assert_eq!(pickle::read(seed).unwrap().tensors.len(), 10);
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let opcodes = b"\x80(NKMJGXUTCB)t]}aesuqrhjcQRb.\x85\x86\x87\x88\x89\x8a\x8c\x8d\x93\x94\x95";
    let (mut accepted, mut refused) = (0, 0);
    for _ in 0..60_000 {
        let mut text = seed.to_vec();
        for _ in 0..1 + random(4) {
            let at = random(text.len());
            match random(3) {
                0 => text[at] = opcodes[random(opcodes.len())],
                1 => drop(text.splice(at..at, [opcodes[random(opcodes.len())]])),
                _ => text[at] = random(256) as u8,
            }
        }
        match pickle::read(&text) {
            Ok(_) => accepted += 1,
            Err(_) => refused += 1,
        }
    }
    assert!(accepted > 1000 && refused > 1000, "{accepted} {refused}");
}
