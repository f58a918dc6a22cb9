//! Views against sums written out, whatever range is read; names that fit and names that do not; mutated adapters.

use proptest::prelude::*;

use super::*;
use crate::checkpoint::rows::read_elements;
use crate::checkpoint::testing::{disk, raw, write};
use crate::kernels::{self, Isa};

/// A safetensors file of f32 tensors.
fn floats(tensors: &[(&str, &[usize], Vec<f32>)]) -> Vec<u8> {
    let (mut members, mut data) = (Vec::new(), Vec::new());
    for (name, shape, values) in tensors {
        let begin = data.len();
        data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        members
            .push(format!(r#""{name}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[{begin},{}]}}"#, data.len()));
    }
    let mut file = raw(&format!("{{{}}}", members.join(",")), 0);
    file.extend(data);
    file
}

fn numbers(seed: usize, count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1000.0 - 1.0).collect()
}

const LORA: &str = r#"{"peft_type": "LORA", "r": 3, "lora_alpha": 6}"#;

/// A model `m` with one layer `w` [rows, columns], and an adapter `a` of rank 3 on it.
fn model_and_adapter(rows: usize, columns: usize, config: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let model = floats(&[("w.weight", &[rows, columns], numbers(1, rows * columns))]);
    let adapter = floats(&[
        ("base_model.model.w.lora_A.weight", &[3, columns], numbers(2, 3 * columns)),
        ("base_model.model.w.lora_B.weight", &[rows, 3], numbers(3, rows * 3)),
    ]);
    let files: [(&str, &[u8]); 3] = [
        ("m/model.safetensors", &model),
        ("a/adapter_model.safetensors", &adapter),
        ("a/adapter_config.json", config.as_bytes()),
    ];
    write(dir.path(), &files);
    dir
}

fn opened(dir: &tempfile::TempDir) -> Result<Checkpoint> {
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    Checkpoint::open(&format!("{}+{}", at("m"), at("a")), &disk())
}

fn bytes_of(checkpoint: &Checkpoint, name: &str) -> Vec<u8> {
    let entry = checkpoint.get(name).unwrap();
    let mut bytes = vec![0; entry.bytes as usize];
    checkpoint.files[entry.file as usize].file.read_at(&mut bytes, entry.offset).unwrap();
    bytes
}

#[test]
fn an_entry_is_the_same_whichever_range_is_read() {
    // More rows and columns than a block has, and neither a multiple of it.
    for (rows, columns) in [(1, 1), (5, 3), (131, 515), (300, 2), (2, 1100)] {
        let checkpoint = opened(&model_and_adapter(rows, columns, LORA)).unwrap();
        let whole = bytes_of(&checkpoint, "w.weight");
        let (a, b) = (numbers(2, 3 * columns), numbers(3, rows * 3));
        let expected = numbers(1, rows * columns).into_iter().enumerate().map(|(at, w)| {
            let (i, j) = (at / columns, at % columns);
            let product = (0..3).fold(0f32, |sum, k| sum + b[i * 3 + k] * a[k * columns + j]);
            w + product * 2.0
        });
        let expected: Vec<u8> = expected.flat_map(f32::to_le_bytes).collect();
        assert!(whole == expected, "{rows} x {columns}");
        let entry = checkpoint.get("w.weight").unwrap();
        let file = &checkpoint.files[entry.file as usize].file;
        for (start, end) in [(0, 1), (1, 2), (whole.len() / 3, whole.len()), (whole.len() / 2, whole.len() / 2 + 2)] {
            let mut part = vec![0; end - start];
            file.read_at(&mut part, start as u64).unwrap();
            assert!(part == whole[start..end], "{rows} x {columns}: bytes {start}..{end}");
        }
    }
}

proptest! {
    #[test]
    fn bytes_of_elements_are_those_of_any_range(width in 1usize..=8, offset in 0u64..40, length in 0usize..60) {
        let byte = |at: u64| (at * 37 % 251) as u8;
        let mut buffer = vec![0; length];
        read_elements(&mut buffer, offset, width, |element, out| {
            assert!(out.len().is_multiple_of(width));
            out.iter_mut().zip(element * width as u64..).for_each(|(out, at)| *out = byte(at));
            Ok(())
        })
        .unwrap();
        let expected: Vec<u8> = (offset..).take(length).map(byte).collect();
        prop_assert_eq!(buffer, expected);
    }
}

#[test]
fn every_instruction_set_sums_up_the_same() {
    let (a, b) = (numbers(4, 515), numbers(5, 64));
    let sum = |isa| {
        let mut out = vec![0f32; 515];
        b.iter().for_each(|&factor| kernels::add_scaled(isa, &mut out, factor, &a));
        out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    let all: Vec<_> = Isa::available().into_iter().map(sum).collect();
    assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn a_path_with_a_plus_that_exists_is_that_path() {
    let dir = model_and_adapter(4, 2, LORA);
    std::fs::rename(dir.path().join("m"), dir.path().join("m+a")).unwrap();
    std::fs::rename(dir.path().join("a"), dir.path().join("b+c")).unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let plain = Checkpoint::open(&at("m+a"), &disk()).unwrap();
    assert_eq!(plain.files.len(), 1);
    let both = format!("{}+{}", at("m+a"), at("b+c"));
    let adapted = Checkpoint::open(&both, &disk()).unwrap();
    assert_eq!((adapted.files.len(), &*adapted.spec), (3, &*both));
    assert_ne!(bytes_of(&plain, "w.weight"), bytes_of(&adapted, "w.weight"));
    let twice = Checkpoint::open(&format!("{both}+{}", at("b+c")), &disk()).unwrap();
    assert_ne!(bytes_of(&twice, "w.weight"), bytes_of(&adapted, "w.weight"), "adapters add up");
    let many = format!("{}{}", at("m+a"), "+x".repeat(1000));
    assert!(Checkpoint::open(&many, &disk()).err().unwrap().to_string().contains("at most 16"));
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let refused = |model: &[(&str, &[usize])], adapter: &[(&str, &[usize])], config: &str, parts: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        let file = |tensors: &[(&str, &[usize])]| {
            let filled: Vec<_> =
                tensors.iter().map(|&(name, shape)| (name, shape, numbers(1, shape.iter().product()))).collect();
            floats(&filled)
        };
        let files: [(&str, &[u8]); 3] = [
            ("m/model.safetensors", &file(model)),
            ("a/adapter_model.safetensors", &file(adapter)),
            ("a/adapter_config.json", config.as_bytes()),
        ];
        write(dir.path(), &files);
        let error = opened(&dir).err().expect("it is refused");
        assert_eq!(error.exit_code(), 2);
        let text = error.to_string();
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    };
    let model: &[(&str, &[usize])] = &[("w.weight", &[4, 2]), ("n.weight", &[4])];
    let a: (&str, &[usize]) = ("base_model.model.w.lora_A.weight", &[3, 2]);
    let b: (&str, &[usize]) = ("base_model.model.w.lora_B.weight", &[4, 3]);
    refused(model, &[a, ("w.lora_B.weight", &[5, 3])], LORA, &["shape [3, 2] by [5, 3] does not fit", "[4, 2]"]);
    refused(model, &[a, ("w.lora_B.weight", &[4, 2])], LORA, &["not factors of rank 3"]);
    refused(model, &[a], LORA, &["module \"w\" does not have the parts"]);
    refused(&[("v.weight", &[4, 2])], &[a, b], LORA, &["changes \"w.weight\"", "the model that it was trained on"]);
    refused(&[("w.weight", &[8])], &[a, b], LORA, &["w.weight", "its shape is [8]"]);
    refused(model, &[a, b, ("w.lora_A.weight", &[3, 2])], LORA, &["means the same as"]);
    refused(model, &[a, b, ("w.lora_C.weight", &[3])], LORA, &["a part of an adapter that is not known"]);
    refused(model, &[a, b, ("w.lora_magnitude_vector", &[4])], LORA, &["a DoRA adapter"]);
    refused(model, &[], LORA, &["an adapter without a tensor"]);
    refused(model, &[("w.ia3_l", &[4, 1])], LORA, &["does not have the parts that a LoRA adapter has"]);
    let ia3 = r#"{"peft_type": "IA3", "feedforward_modules": ["w"]}"#;
    refused(model, &[("w.ia3_l", &[1, 7])], ia3, &["shape [1, 7] does not fit"]);
    refused(model, &[("n.ia3_l", &[4, 1])], ia3, &["n.weight", "its shape is [4]"]);
    refused(model, &[a, b], ia3, &["does not have the parts that a (IA)³ adapter has"]);
}

#[test]
fn outer_modules_may_be_named_otherwise() {
    for (stored, trained) in [("h.0.w", "transformer.h.0.w"), ("model.language.layers.0.w", "layers.0.w"), ("w", "w")] {
        let dir = tempfile::tempdir().unwrap();
        let model = floats(&[(&format!("{stored}.weight"), &[4, 2], numbers(1, 8))]);
        let adapter = floats(&[
            (&format!("base_model.model.{trained}.lora_A.weight"), &[3, 2], numbers(2, 6)),
            (&format!("base_model.model.{trained}.lora_B.default.weight"), &[4, 3], numbers(3, 12)),
        ]);
        let files: [(&str, &[u8]); 3] = [
            ("m/model.safetensors", &model),
            ("a/adapter_model.safetensors", &adapter),
            ("a/adapter_config.json", LORA.as_bytes()),
        ];
        write(dir.path(), &files);
        let checkpoint = opened(&dir).unwrap();
        let plain = Checkpoint::open(dir.path().join("m").to_str().unwrap(), &disk()).unwrap();
        let name = format!("{stored}.weight");
        assert_ne!(bytes_of(&plain, &name), bytes_of(&checkpoint, &name), "{trained}");
    }
}

/// The fuzz target `adapter` with a fixed seed: seeds changed at random places.
#[test]
fn mutated_adapters_are_read_or_refused() {
    let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/adapter");
    let mut seeds: Vec<_> = std::fs::read_dir(corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
    seeds.sort();
    let dir = tempfile::tempdir().unwrap();
    let model = floats(&[
        ("w.weight", &[4, 6], numbers(1, 24)),
        ("w.bias", &[4], numbers(2, 4)),
        ("e.weight", &[9, 4], numbers(3, 36)),
    ]);
    let lora = floats(&[
        ("base_model.model.w.lora_A.weight", &[2, 6], numbers(4, 12)),
        ("w.lora_B.weight", &[4, 2], numbers(5, 8)),
    ]);
    write(dir.path(), &[("m/model.safetensors", &model)]);
    let mut state = 1u64;
    let mut next = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let (mut accepted, mut refused) = (0, 0);
    for round in 0..300 {
        for seed in &seeds {
            let mut data = std::fs::read(seed).unwrap();
            for _ in 0..next(if round == 0 { 1 } else { 4 }) {
                let at = next(data.len());
                match next(3) {
                    0 => data[at] = next(256) as u8,
                    1 => drop(data.remove(at)),
                    _ => data.insert(at, b"0123456789.-[]{}\",:"[next(19)]),
                }
            }
            let (config, weights) = match data.iter().position(|&byte| byte == 0) {
                Some(end) => (&data[..end], &data[end + 1..]),
                None => (&data[..], &lora[..]),
            };
            write(dir.path(), &[("a/adapter_config.json", config), ("a/adapter_model.safetensors", weights)]);
            match opened(&dir) {
                Ok(checkpoint) => {
                    accepted += 1;
                    checkpoint.tensors.iter().for_each(|t| drop(bytes_of(&checkpoint, &t.name)));
                }
                Err(error) => {
                    refused += 1;
                    assert_eq!(error.exit_code(), 2, "{error}");
                    assert!(!error.to_string().contains('\n'));
                }
            }
        }
    }
    assert!(accepted > 300 && refused > 300, "{accepted} accepted, {refused} refused");
}
