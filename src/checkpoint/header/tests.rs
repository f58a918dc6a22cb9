//! Good, odd and broken headers, and the comparison with the reference implementation.

use std::path::Path;

use proptest::prelude::*;
use safetensors::SafeTensors;

use super::super::testing::{file_of, raw};
use super::*;
use crate::storage::Identity;

/// A file in memory.
struct Memory {
    content: Vec<u8>,
    identity: Identity,
}

impl Memory {
    fn new(content: &[u8]) -> Self {
        Self::claiming(content, content.len() as u64)
    }

    /// A file that seems to have `bytes` bytes, of which only the first can be read.
    fn claiming(content: &[u8], bytes: u64) -> Self {
        Self { content: content.to_vec(), identity: Identity { bytes, ..Identity::default() } }
    }
}

impl InputFile for Memory {
    fn path(&self) -> &Path {
        Path::new("dir/model.safetensors")
    }

    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn identity_now(&self) -> Result<Identity> {
        Ok(self.identity.clone())
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let source = self.content.get(offset as usize..).and_then(|rest| rest.get(..buffer.len()));
        buffer.copy_from_slice(source.ok_or_else(|| Error::failed("end of file").at(self.path()))?);
        Ok(())
    }
}

fn parse_file(content: &[u8]) -> Result<Header> {
    read(&Memory::new(content), 0)
}

/// Asserts that `content` is refused with a message that names the file and has all `parts`.
fn refused(content: &[u8], parts: &[&str]) {
    let error = parse_file(content).expect_err(&format!("accepted, but expected {parts:?}"));
    let text = error.to_string();
    assert_eq!(error.exit_code(), 2, "{text}");
    assert!(text.starts_with("dir/model.safetensors: "), "{text}");
    for part in parts {
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    }
}

/// Asserts that a header text (with that much data) is refused.
fn refused_json(json: &str, data_bytes: usize, parts: &[&str]) {
    refused(&raw(json, data_bytes), parts);
}

#[test]
fn a_good_header_gives_sorted_entries_with_absolute_offsets() {
    let json = r#"{"__metadata__":{"format":"pt"},
        "b":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},
        "a":{"data_offsets":[8,10],"shape":[],"dtype":"BF16","extra":[{"x":null}]}}   "#;
    let file = raw(json, 10);
    let header = read(&Memory::new(&file), 3).unwrap();
    let start = 8 + json.len() as u64;
    let entry = |name: &str, dtype, shape: &[u64], offset, bytes| TensorEntry {
        name: name.into(),
        dtype,
        shape: shape.into(),
        file: 3,
        offset: start + offset,
        bytes,
    };
    assert_eq!(header.tensors, [entry("a", Dtype::BF16, &[], 8, 2), entry("b", Dtype::F32, &[2, 1], 0, 8)]);
    assert_eq!(header.bytes, start);
    assert_eq!(header.hash, *blake3::hash(&file[..start as usize]).as_bytes());
}

#[test]
fn odd_but_valid_headers_are_accepted() {
    let empty = r#""dtype":"F32","shape":[0],"data_offsets""#;
    for (json, data_bytes) in [
        ("{}".to_owned(), 0),
        (r#"{"__metadata__":null}"#.to_owned(), 0),
        (format!(r#"{{"a":{{{empty}:[0,0]}},"b":{{{empty}:[0,0]}}}}"#), 0),
        (r#"{"":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#.to_owned(), 1),
        (format!(r#"{{"z":{{{empty}:[1,1]}},"y":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}"#), 1),
        (r#"{"a":{"dtype":"F4","shape":[2,3],"data_offsets":[0,3]}}"#.to_owned(), 3),
        (r#"{"a":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}"#.to_owned(), 3),
        (r#"{"a\u0062\n😀":{"dtype":"I64","shape":[1,1,1],"data_offsets":[0,8]}}"#.to_owned(), 8),
    ] {
        let file = raw(&json, data_bytes);
        parse_file(&file).unwrap_or_else(|e| panic!("{json}: {e}"));
        SafeTensors::deserialize(&file).unwrap_or_else(|e| panic!("{json}: the reference: {e}"));
    }
}

#[test]
fn files_that_are_something_else_are_recognised() {
    refused(b"", &["the file is empty"]);
    refused(b"1234567", &["only 7 bytes"]);
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
    refused(pointer, &["git-lfs pointer", "git lfs pull"]);
    refused(b"PK\x03\x04\x00\x00\x08\x08\x00\x00\x00\x00", &["PyTorch (zip)", "convert"]);
    refused(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", &["pickle"]);
    refused(b"GGUF\x03\x00\x00\x00\x23\x01\x00\x00", &["GGUF"]);
    refused(b"<!DOCTYPE html><html></html>", &["web page"]);
    refused(&raw("[1]", 0), &["does not begin with `{`"]);
    refused(&raw("", 0), &["does not begin with `{`"]);
    refused(&raw(" {}", 0), &["does not begin with `{`"]);
}

#[test]
fn lengths_are_checked_before_memory_is_taken() {
    for claimed in [u64::MAX, 1 << 63, 1 << 40, 10] {
        let mut file = claimed.to_le_bytes().to_vec();
        file.extend(b"{}");
        refused(&file, &[&claimed.to_string(), "the file has 10"]);
    }
    // A file so long that the length is possible, but beyond the limit.
    let length = MAX_HEADER_BYTES + 1;
    let file = Memory::claiming(&[&length.to_le_bytes()[..], &[b'{'; 100]].concat(), 1 << 40);
    let error = read(&file, 0).unwrap_err().to_string();
    assert!(error.contains("100000001") && error.contains("at most 100000000"), "{error}");
}

#[test]
fn bad_json_is_refused_with_its_place() {
    refused_json("{", 0, &["invalid header", "line 1 column 1"]);
    refused_json("{} x", 0, &["trailing characters"]);
    refused_json("{}\0", 0, &["trailing characters"]);
    refused_json(r#"{"a":1}"#, 0, &["tensor \"a\"", "expected an object with dtype"]);
    refused_json(r#"{"a":["U8",[1],[0,1]]}"#, 1, &["tensor \"a\"", "expected an object"]);
    refused_json(r#"{"__metadata__":{"n":1}}"#, 0, &["__metadata__", "expected a string"]);
    refused_json(r#"{"__metadata__":[]}"#, 0, &["__metadata__", "expected an object of strings"]);
    let deep = format!(r#"{{"a":{{"x":{}{}}}}}"#, "[".repeat(500), "]".repeat(500));
    refused_json(&deep, 0, &["tensor \"a\"", "recursion limit"]);
    let mut file = raw(r#"{"aa":1}"#, 0);
    file[10] = 0xff;
    refused(&file, &["not UTF-8 at byte 10"]);
}

#[test]
fn bad_fields_name_tensor_and_field() {
    let cases = [
        (r#""dtype":"F13","shape":[1],"data_offsets":[0,1]"#, "unknown type \"F13\""),
        (r#""dtype":"f32","shape":[1],"data_offsets":[0,1]"#, "unknown type \"f32\""),
        (r#""dtype":7,"shape":[1],"data_offsets":[0,1]"#, "\"dtype\": invalid type"),
        (r#""shape":[1],"data_offsets":[0,1]"#, "\"dtype\" is missing"),
        (r#""dtype":"U8","data_offsets":[0,1]"#, "\"shape\" is missing"),
        (r#""dtype":"U8","shape":[1]"#, "\"data_offsets\" is missing"),
        (r#""dtype":"U8","shape":[-1],"data_offsets":[0,1]"#, "\"shape\": invalid value: integer `-1`"),
        (r#""dtype":"U8","shape":[1.0],"data_offsets":[0,1]"#, "\"shape\": invalid type: floating point"),
        (r#""dtype":"U8","shape":[1e0],"data_offsets":[0,1]"#, "\"shape\": invalid type: floating point"),
        (r#""dtype":"U8","shape":["1"],"data_offsets":[0,1]"#, "\"shape\": invalid type: string"),
        (r#""dtype":"U8","shape":1,"data_offsets":[0,1]"#, "\"shape\": invalid type"),
        (r#""dtype":"U8","shape":[18446744073709551616],"data_offsets":[0,1]"#, "\"shape\": invalid type"),
        (r#""dtype":"U8","shape":[1],"data_offsets":[0]"#, "\"data_offsets\": invalid length 1"),
        (r#""dtype":"U8","shape":[1],"data_offsets":[0,1,2]"#, "\"data_offsets\": "),
        (r#""dtype":"U8","shape":[1],"data_offsets":[0,-1]"#, "\"data_offsets\": invalid value"),
        (r#""dtype":"U8","shape":[1],"data_offsets":[1,0]"#, "[1, 0] run backwards"),
        (r#""dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]"#, "duplicate \"dtype\""),
        (r#""dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]"#, "duplicate \"shape\""),
        (r#""dtype":"U8","shape":[1],"data_offsets":[0,1],"data_offsets":[0,1]"#, "duplicate \"data_offsets\""),
        (r#""dtype":"U8","shape":[2],"data_offsets":[0,1]"#, "U8 of shape [2] has 2 bytes, but its offsets span 1"),
        (r#""dtype":"U8","shape":[0],"data_offsets":[0,1]"#, "has 0 bytes, but its offsets span 1"),
        (r#""dtype":"F4","shape":[3],"data_offsets":[0,1]"#, "12 bits, which do not fill whole bytes"),
        (r#""dtype":"U8","shape":[4294967296,4294967296,0],"data_offsets":[0,1]"#, "too large"),
        (r#""dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,1]"#, "too large"),
    ];
    for (fields, message) in cases {
        refused_json(
            &format!(r#"{{"ok":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}},"w.x":{{{fields}}}}}"#),
            1,
            &["tensor \"w.x\"", message],
        );
    }
    let dimensions = vec!["1"; MAX_DIMENSIONS + 1].join(",");
    let json = format!(r#"{{"a":{{"dtype":"U8","shape":[{dimensions}],"data_offsets":[0,1]}}}}"#);
    refused_json(&json, 1, &["tensor \"a\"", "more than 64 dimensions"]);
    let name = "n".repeat(MAX_NAME_BYTES + 1);
    refused_json(&format!(r#"{{"{name}":{{}}}}"#), 0, &["4097 bytes, at most 4096"]);
}

#[test]
fn nothing_is_listed_twice() {
    let tensor = r#"{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
    refused_json(&format!(r#"{{"a":{tensor},"a":{tensor}}}"#), 1, &["tensor \"a\"", "lists it twice"]);
    refused_json(&format!(r#"{{"a":{tensor},"\u0061":{tensor}}}"#), 1, &["tensor \"a\"", "lists it twice"]);
    refused_json(r#"{"__metadata__":{},"__metadata__":{}}"#, 0, &["duplicate \"__metadata__\""]);
}

#[test]
fn the_data_is_covered_exactly() {
    let two = |first: [u64; 2], second: [u64; 2]| {
        let tensor = |[begin, end]: [u64; 2]| {
            let bytes = end - begin;
            format!(r#"{{"dtype":"U8","shape":[{bytes}],"data_offsets":[{begin},{end}]}}"#)
        };
        format!(r#"{{"a":{},"b":{}}}"#, tensor(first), tensor(second))
    };
    parse_file(&raw(&two([4, 6], [0, 4]), 6)).unwrap();
    refused_json(&two([0, 2], [3, 4]), 4, &["tensor \"b\"", "begins at byte 3", "2 was due", "leaves a hole"]);
    refused_json(&two([0, 3], [2, 4]), 4, &["tensor \"b\"", "begins at byte 2", "3 was due", "overlaps"]);
    refused_json(&two([1, 2], [2, 4]), 4, &["tensor \"a\"", "leaves a hole"]);
    refused_json(&two([0, 2], [0, 2]), 2, &["tensor \"b\"", "overlaps"]);
    refused_json(&two([0, 3], [1, 1]), 3, &["overlaps"]);
    refused_json(&two([0, 2], [2, 4]), 3, &["tensor \"b\"", "ends at byte 4", "the file has 3", "cut short"]);
    refused_json(&two([0, 2], [2, 4]), 5, &["end at byte 4", "the file has 5"]);
    refused_json("{}", 1, &["end at byte 0", "the file has 1"]);
    refused_json(&two([0, 0], [1 << 62, 1 << 63]), 1, &["tensor \"b\"", "too large"]);
}

#[test]
fn many_tensors_are_read_quickly() {
    let count = if cfg!(miri) { 200 } else { 20_000 };
    let names: Vec<String> = (0..count).map(|i| format!("model.layers.{i}.self_attn.q_proj.weight")).collect();
    let tensors: Vec<(&str, u64)> = names.iter().map(|name| (&**name, 1)).collect();
    let header = parse_file(&file_of(&tensors)).unwrap();
    assert_eq!(header.tensors.len(), count);
    assert!(header.tensors.is_sorted_by(|a, b| a.name < b.name));
}

#[test]
fn encoded_headers_are_aligned_deterministic_and_readable() {
    let tensors = [
        ("b \"quoted\"\u{1}", Dtype::F32, &[2u64, 1][..], 0, 8),
        ("a", Dtype::F8_E4M3FNUZ, &[3][..], 8, 11),
        ("scalar", Dtype::U8, &[][..], 11, 12),
    ];
    let header = encode(tensors, &[("format", "pt"), ("a", "b")]);
    assert_eq!(header.len() % 64, 0);
    let text = std::str::from_utf8(&header[8..]).unwrap();
    assert!(
        text.starts_with(
            r#"{"__metadata__":{"format":"pt","a":"b"},"b \"quoted\"\u0001":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"#
        ),
        "{text}"
    );
    let file = [&header[..], &[0; 12]].concat();
    let ours = parse_file(&file).unwrap();
    assert_eq!((ours.bytes, ours.tensors.len()), (header.len() as u64, 3));
    let reference = SafeTensors::deserialize(&file).unwrap();
    assert_eq!(reference.tensor("b \"quoted\"\u{1}").unwrap().shape(), [2, 1]);

    let measured: u64 = tensors.iter().map(|(name, dtype, shape, ..)| encoded_bytes_max(name, *dtype, shape)).sum();
    assert!(measured >= text.trim_end().len() as u64 - 50);
    parse_file(&encode([], &[])).unwrap();
    parse_file(&encode([], &[("format", "pt")])).unwrap();
    assert_eq!(encode([], &[]).len(), 64);
}

/// What a generated header says about a tensor.
#[derive(Debug, Clone)]
struct Member {
    name: String,
    dtype: &'static str,
    shape: Vec<u64>,
    /// Offsets before the other fields.
    offsets_first: bool,
    /// Added to the first offset.
    shift: i64,
    /// Text of further fields.
    extra: &'static str,
}

/// Mostly sound members, so that the later checks are reached.
fn member() -> impl Strategy<Value = Member> {
    let name = prop_oneof![8 => "[a-f]{1,3}", 1 => Just("__metadata__".to_owned()), 1 => Just(String::new())];
    let dtype = prop::sample::select(vec!["F32", "BF16", "U8", "F4", "F6_E2M3", "I64", "C64", "F8_E8M0", "F31"]);
    let shape = prop::collection::vec(0u64..4, 0..3);
    let shift = prop_oneof![12 => Just(0i64), 1 => -3i64..3];
    let extra = prop_oneof![
        12 => Just(""),
        1 => Just(r#","x":{"y":[1,2.5,"z",null,true]}"#),
        1 => Just(r#","x":"\ud800""#),
        1 => Just(r#","x":1e999"#),
        1 => Just(r#","shape":[1]"#),
    ];
    (name, dtype, shape, any::<bool>(), shift, extra).prop_map(|(name, dtype, shape, offsets_first, shift, extra)| {
        Member { name, dtype, shape, offsets_first, shift, extra }
    })
}

/// The header of `members`, written in another order than that of the data; and the length of the data.
fn text_of(members: &[Member], rotate: usize) -> (String, usize) {
    let mut end = 0;
    let mut texts: Vec<String> = Vec::new();
    for Member { name, dtype, shape, offsets_first, shift, extra } in members {
        if name == METADATA {
            texts.push(r#""__metadata__":{"format":"pt"}"#.to_owned());
            continue;
        }
        let bits = Dtype::deserialize(StrDeserializer::<serde_json::Error>::new(dtype)).map_or(8, |d| d.bitsize());
        let begin = (end as i64 + shift).max(0);
        end += shape.iter().product::<u64>() * bits as u64 / 8;
        let offsets = format!(r#""data_offsets":[{begin},{end}]"#);
        let typed = format!(r#""dtype":"{dtype}","shape":{shape:?}"#);
        let (first, second) = if *offsets_first { (offsets, typed) } else { (typed, offsets) };
        texts.push(format!(r#""{name}":{{{first},{second}{extra}}}"#));
    }
    let middle = rotate % texts.len().max(1);
    texts.rotate_left(middle);
    (format!("{{{}}}", texts.join(",")), end as usize)
}

/// Refused by the reference means refused here; accepted here means read alike.
fn compare_with_reference(file: &[u8]) -> Result<bool, TestCaseError> {
    let reference = SafeTensors::read_metadata(file);
    match (parse_file(file), reference) {
        (Err(error), _) => {
            prop_assert_eq!(error.exit_code(), 2);
            Ok(false)
        }
        (Ok(_), Err(error)) => Err(TestCaseError::fail(format!("accepted, but the reference says {error}"))),
        (Ok(header), Ok((length, metadata))) => {
            prop_assert_eq!(header.bytes, 8 + length as u64);
            prop_assert_eq!(header.tensors.len(), metadata.tensors().len());
            for tensor in &header.tensors {
                let info = metadata.info(&tensor.name).expect("the same names");
                prop_assert_eq!(info.dtype, tensor.dtype);
                prop_assert!(info.shape.iter().map(|&d| d as u64).eq(tensor.shape.iter().copied()));
                prop_assert_eq!(info.data_offsets.0 as u64 + header.bytes, tensor.offset);
                prop_assert_eq!((info.data_offsets.1 - info.data_offsets.0) as u64, tensor.bytes);
            }
            Ok(true)
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 20 } else { 4000 }, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_the_reference_refuses_is_refused(
        members in prop::collection::vec(member(), 0..4),
        rotate in 0usize..4,
        mutations in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4u8), 0..3),
        extra_data in prop_oneof![10 => Just(0i64), 1 => -2i64..3],
    ) {
        let (json, data_bytes) = text_of(&members, rotate);
        let mut file = raw(&json, (data_bytes as i64 + extra_data).max(0) as usize);
        compare_with_reference(&file)?;
        for (place, byte, kind) in mutations {
            let place = place.index(file.len().min(8 + json.len()));
            match kind {
                0 => { file.remove(place); }
                1 => file.insert(place, byte),
                // JSON's own characters break structures more interestingly than random bytes.
                2 => file[place] = b"{}[],:\"0159-.eE\\ntu \0"[byte as usize % 21],
                _ => file[place] = byte,
            }
            compare_with_reference(&file)?;
        }
    }

    #[test]
    fn sound_headers_are_accepted(dims in prop::collection::vec(prop::collection::vec(0u64..5, 0..3), 0..5), rotate in 0usize..5) {
        let members: Vec<_> = dims
            .into_iter()
            .enumerate()
            .map(|(i, shape)| {
                let (name, offsets_first) = (format!("t{i}"), i % 2 == 1);
                Member { name, dtype: "BF16", shape, offsets_first, shift: 0, extra: "" }
            })
            .collect();
        let (json, data_bytes) = text_of(&members, rotate);
        prop_assert!(compare_with_reference(&raw(&json, data_bytes))?);
    }

    #[test]
    fn random_bytes_never_panic(file in prop::collection::vec(any::<u8>(), 0..200)) {
        compare_with_reference(&file)?;
        compare_with_reference(&raw(&String::from_utf8_lossy(&file), 0))?;
    }
}
