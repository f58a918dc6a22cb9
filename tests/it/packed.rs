//! Packed task vectors: packed and unpacked bit for bit, usable wherever a checkpoint is, and never a wrong number.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use tempfile::TempDir;

use crate::support::adapters::Adapter;
use crate::support::family::{Deltas, Family, Saved, Spec, text};
use crate::support::files::{self, Layout, read_checkpoint, read_tree, write_checkpoint};
use crate::support::numbers::is_float;
use crate::support::random::Random;
use crate::support::run::{Outcome, tiesmith};
use crate::support::tensor::{Tensor, Tensors, differences, tensors};

/// More than two chunks, the last of one element.
const LONG: usize = 2 * (1 << 18) + 1;

fn pack(checkpoint: &Path, base: &Path, out: &Path, extra: &[&str]) -> Outcome {
    let (checkpoint, base, out) = (text(checkpoint), text(base), text(out));
    let mut args = vec!["pack", &checkpoint, "--base", &base, "--out", &out, "--json", "--progress", "none"];
    args.extend(extra);
    tiesmith(args)
}

fn unpack(file: &Path, out: &Path, extra: &[&str]) -> Outcome {
    let (file, out) = (text(file), text(out));
    let mut args = vec!["unpack", &file, "--out", &out, "--json", "--progress", "none"];
    args.extend(extra);
    tiesmith(args)
}

/// A base and a checkpoint, as strange as they come.
struct Odd {
    dir: TempDir,
    base: Tensors,
    model: Tensors,
}

impl Odd {
    fn new() -> Self {
        let mut random = Random::new(3);
        let nan = |payload: u32| f32::from_bits(0x7f80_0000 | payload);
        let mut long = |width: usize| -> (Vec<u8>, Vec<u8>) {
            let base: Vec<u8> = (0..LONG * width).map(|_| random.bits() as u8).collect();
            let mut model = base.clone();
            for _ in 0..LONG / 5 {
                model[random.below(LONG * width)] = random.bits() as u8;
            }
            // One chunk is as in base.
            model[(1 << 18) * width..(2 << 18) * width].copy_from_slice(&base[(1 << 18) * width..(2 << 18) * width]);
            (base, model)
        };
        let (bf16, f64s, bytes) = (long(2), long(8), long(1));
        let base = tensors([
            ("a.nan", Tensor::vector(&[nan(1), 0.0, f32::INFINITY, 1.0, nan(2)])),
            ("b.long", Tensor::raw(Dtype::BF16, &[LONG], bf16.0)),
            ("c.long", Tensor::raw(Dtype::F64, &[LONG, 1], f64s.0)),
            ("d.bytes", Tensor::raw(Dtype::U8, &[LONG], bytes.0)),
            ("e.empty", Tensor::vector(&[])),
            ("f.scalar", Tensor::floats(Dtype::F16, &[], &[2.0])),
            ("g.dtype", Tensor::floats(Dtype::F32, &[3], &[1.0, 2.0, 3.0])),
            ("h.shape", Tensor::floats(Dtype::F32, &[2, 3], &[1.0; 6])),
            ("i.gone", Tensor::vector(&[1.0])),
            ("j.same", Tensor::vector(&[4.0, 5.0])),
            ("k.ids", Tensor::raw(Dtype::I64, &[2], [1i64.to_le_bytes(), 2i64.to_le_bytes()].concat())),
            ("l.flag", Tensor::raw(Dtype::BOOL, &[3], vec![0, 1, 0])),
        ]);
        let model = tensors([
            ("a.nan", Tensor::vector(&[nan(7), -0.0, f32::NEG_INFINITY, 1.0, nan(2)])),
            ("b.long", Tensor::raw(Dtype::BF16, &[LONG], bf16.1)),
            ("c.long", Tensor::raw(Dtype::F64, &[LONG, 1], f64s.1)),
            ("d.bytes", Tensor::raw(Dtype::U8, &[LONG], bytes.1)),
            ("e.empty", Tensor::vector(&[])),
            ("f.scalar", Tensor::floats(Dtype::F16, &[], &[-0.5])),
            ("g.dtype", Tensor::floats(Dtype::BF16, &[3], &[1.0, 2.5, 3.0])),
            ("h.shape", Tensor::floats(Dtype::F32, &[3, 3], &[1.5; 9])),
            ("j.same", Tensor::vector(&[4.0, 5.0])),
            ("k.ids", Tensor::raw(Dtype::I64, &[2], [1i64.to_le_bytes(), (-2i64).to_le_bytes()].concat())),
            ("l.flag", Tensor::raw(Dtype::BOOL, &[3], vec![1, 1, 0])),
            ("m.added", Tensor::floats(Dtype::F16, &[2], &[9.0, -9.0])),
            ("n.none", Tensor::raw(Dtype::I32, &[0, 5], Vec::new())),
        ]);
        let dir = tempfile::tempdir().unwrap();
        write_checkpoint(&dir.path().join("base"), &base, Layout::sharded(3, 5));
        write_checkpoint(&dir.path().join("model"), &model, Layout::sharded(2, 8));
        Self { dir, base, model }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

#[test]
fn what_differs_at_all_comes_back_bit_for_bit() {
    let odd = Odd::new();
    let file = odd.path("x.tvz");
    let report = pack(&odd.path("model"), &odd.path("base"), &file, &["--density", "1"]).succeeded().json();
    assert_eq!(report["tensors"], odd.model.len());
    assert_eq!(report["bytes_written"], fs::metadata(&file).unwrap().len());
    let out = odd.path("out");
    // Shards in which tensors end anywhere: most reads begin and end within chunks.
    unpack(&file, &out, &["--max-shard-size", "700kB"]).succeeded();
    assert_eq!(differences(&odd.model, &read_checkpoint(&out)), "");
    // Configuration is base's, but for the type.
    let config = files::read_json(&out.join("config.json"));
    assert_eq!((&config["hidden_size"], &config["torch_dtype"]), (&8.into(), &"bfloat16".into()));
    tiesmith(["verify", &text(&out)]).succeeded();
    assert!(fs::read_to_string(out.join("README.md")).unwrap().contains("The tensors of `x.tvz`"));
    // It is the checkpoint for every other command too.
    tiesmith(["diff", &text(&file), &text(&odd.path("model"))]).succeeded();
    tiesmith(["diff", &text(&file), &text(&odd.path("base"))]).exited(1);
    let shown = tiesmith(["inspect", &text(&file), "--json", "--stats"]).succeeded().json();
    assert_eq!(shown["tensors"], odd.model.len());
}

#[test]
fn packing_is_the_same_for_any_threads_and_memory() {
    let odd = Odd::new();
    let saved = Spec { models: vec![Dtype::F32], ..Spec::default() }.family().save();
    let packed = |checkpoint: &Path, base: &Path, extra: &[&str]| {
        let file = odd.path("x.tvz");
        pack(checkpoint, base, &file, &[extra, &["--force"]].concat()).succeeded();
        fs::read(file).unwrap()
    };
    let runs: [&[&str]; 3] = [&["--threads", "1"], &["--threads", "5"], &["--threads", "2", "--memory", "64MiB"]];
    let whole = runs.map(|run| packed(&odd.path("model"), &odd.path("base"), &[run, &["--density", "1"]].concat()));
    assert!(whole.windows(2).all(|pair| pair[0] == pair[1]));
    for how in [["--trim-ties", "lowest"], ["--trim-ties", "sample"], ["--scope", "tensor"]] {
        let all: Vec<_> = runs.map(|run| packed(&saved.models[0], &saved.base, &[run, &how].concat())).into();
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "{how:?}");
    }
}

/// The trimmed checkpoint by definition: at the ⌊K·d⌋ largest magnitudes of all float tensors, and what ties with them,
/// the model's bits; elsewhere base's.
fn trimmed(family: &Family, density: f64, per_tensor: bool) -> Tensors {
    let (base, model) = (&family.base, &family.models[0]);
    let tau = |name: &str| -> Vec<f32> {
        base[name].f32s().iter().zip(model[name].f32s()).map(|(base, model)| model - base).collect()
    };
    let threshold = |names: &[&String]| {
        let mut all: Vec<f32> = names.iter().flat_map(|name| tau(name)).map(f32::abs).collect();
        all.sort_by(|a, b| b.total_cmp(a));
        let mut keep = (density * all.len() as f64) as usize;
        if per_tensor && density > 0.0 {
            keep = keep.max(1);
        }
        if keep == 0 { f32::INFINITY } else { all.get(keep - 1).copied().unwrap_or(f32::INFINITY) }
    };
    let floats: Vec<&String> = model.keys().filter(|name| is_float(model[*name].dtype)).collect();
    let overall = threshold(&floats);
    let trim = |(name, tensor): (&String, &Tensor)| {
        if !is_float(tensor.dtype) {
            return (name.clone(), tensor.clone());
        }
        let least = if per_tensor { threshold(&[name]) } else { overall };
        let width = tensor.bytes.len() / tensor.elements().max(1);
        let mut bytes = base[name].bytes.clone();
        for (i, tau) in tau(name).into_iter().enumerate() {
            if tau.abs() >= least && tau != 0.0 {
                bytes[i * width..(i + 1) * width].copy_from_slice(&tensor.bytes[i * width..(i + 1) * width]);
            }
        }
        (name.clone(), Tensor::raw(tensor.dtype, &tensor.shape, bytes))
    };
    model.iter().map(trim).collect()
}

fn families() -> Vec<Family> {
    let spec = |seed, dtype, deltas| Spec { seed, base: dtype, models: vec![dtype; 2], deltas, ..Spec::default() };
    let mut families: Vec<Family> = [
        spec(1, Dtype::F32, Deltas::HeavyTailed),
        spec(2, Dtype::BF16, Deltas::HeavyTailed),
        spec(3, Dtype::F16, Deltas::Stepped),
    ]
    .iter()
    .map(Spec::family)
    .collect();
    families.push(Family::adversarial());
    let mut with_ids = families[0].clone();
    let ids = |value: i32| Tensor::raw(Dtype::I32, &[1], value.to_le_bytes().to_vec());
    with_ids.base.insert("ids".into(), ids(1));
    with_ids.models.iter_mut().for_each(|model| drop(model.insert("ids".into(), ids(2))));
    families.push(with_ids);
    families
}

#[test]
fn trimming_keeps_the_models_bits_where_the_largest_magnitudes_are() {
    for (number, family) in families().iter().enumerate() {
        let saved = family.save();
        for scope in ["model", "tensor"] {
            for density in ["0", "0.2", "0.5", "0.999"] {
                let (file, out) = (saved.path("x.tvz"), saved.path("out"));
                let args = ["--density", density, "--scope", scope, "--force"];
                pack(&saved.models[0], &saved.base, &file, &args).succeeded();
                unpack(&file, &out, &["--force"]).succeeded();
                let expected = trimmed(family, density.parse().unwrap(), scope == "tensor");
                let found = differences(&expected, &read_checkpoint(&out));
                assert!(found.is_empty(), "family {number}, {scope}, {density}\n{found}");
            }
        }
    }
}

fn merged(saved: &Saved, models: &[PathBuf], name: &str, extra: &[&str]) -> Tensors {
    let (out, base) = (saved.path(name), text(&saved.base));
    let mut args = vec!["merge".to_owned(), "--base".into(), base, "--out".into(), text(&out), "--force".into()];
    for model in models {
        args.extend(["--model".into(), text(model)]);
    }
    args.extend(extra.iter().map(|arg| (*arg).to_owned()));
    tiesmith(args).succeeded();
    read_checkpoint(&out)
}

#[test]
fn merging_packed_is_merging_what_is_packed() {
    for (number, family) in families().iter().enumerate() {
        let saved = family.save();
        let packed: Vec<PathBuf> = (0..2).map(|i| saved.path(&format!("{i}.tvz"))).collect();
        let trimmed: Vec<PathBuf> = (0..2).map(|i| saved.path(&format!("trimmed{i}"))).collect();
        for i in 0..2 {
            pack(&saved.models[i], &saved.base, &packed[i], &["--density", "0.3"]).succeeded();
            unpack(&packed[i], &trimmed[i], &[]).succeeded();
        }
        for extra in [
            &["--density", "1"][..],
            &["--density", "0.1", "--scope", "tensor", "--trim-ties", "lowest"],
            &["--method", "task_arithmetic", "--lambda", "0.4"],
            &["--method", "linear"],
            &["--method", "slerp", "--param", "t=0.3"],
        ] {
            let whole = merged(&saved, &trimmed, "a", extra);
            for how in [&["--threads", "1"][..], &["--threads", "3", "--io", "mmap"]] {
                let found = differences(&whole, &merged(&saved, &packed, "b", &[extra, how].concat()));
                assert!(found.is_empty(), "family {number}, {extra:?}\n{found}");
            }
        }
        // What is trimmed once needs no second trim: the same result as from the models themselves.
        let models = &saved.models[..2];
        let expected = merged(&saved, models, "a", &["--density", "0.3"]);
        let found = merged(&saved, &packed, "b", &["--density", "1"]);
        assert_eq!(differences(&expected, &found), "", "family {number}");
    }
}

fn saved() -> Saved {
    Spec { models: vec![Dtype::F32; 2], ..Spec::default() }.family().save()
}

#[test]
fn base_is_the_one_at_hand_or_the_one_named_and_no_other() {
    let saved = saved();
    let file = saved.path("x.tvz");
    pack(&saved.models[0], &saved.base, &file, &[]).succeeded();
    let expected = saved.path("out");
    unpack(&file, &expected, &[]).succeeded();
    // Another base is refused where differences to it are asked for, even if the one named is there.
    let (other, out) = (text(&saved.models[1]), text(&saved.path("a")));
    let merge = |method: &str, model: &Path| {
        tiesmith(["merge", "--method", method, "--base", &other, "--model", &text(model), "--out", &out, "--force"])
    };
    for line in [merge("ties", &file), unpack(&file, &saved.path("a"), &["--base", &other])] {
        assert!(line.refusal().contains("x.tvz: packed against another base than"), "{}", line.stderr);
        assert!(!saved.path("a").exists());
    }
    // Unpacked it is a model like any other, and so it is to methods that look at no differences.
    merge("ties", &expected).succeeded();
    merge("linear", &file).succeeded();
    assert_eq!(differences(&read_checkpoint(&expected), &read_checkpoint(&saved.path("a"))), "");
    // A moved base is found where it is given.
    let moved = saved.path("moved");
    fs::rename(&saved.base, &moved).unwrap();
    let line = unpack(&file, &saved.path("c"), &[]);
    assert!(line.refusal().contains("--base"), "{}", line.stderr);
    let line = unpack(&file, &saved.path("c"), &["--base", &text(&saved.models[1])]);
    assert!(line.refusal().contains("its weights are others"), "{}", line.stderr);
    unpack(&file, &saved.path("c"), &["--base", &text(&moved)]).succeeded();
    assert_eq!(differences(&read_checkpoint(&expected), &read_checkpoint(&saved.path("c"))), "");
    // One with other tensors.
    let small = saved.path("small");
    write_checkpoint(&small, &tensors([("w", Tensor::vector(&[1.0]))]), Layout::SINGLE);
    let line = unpack(&file, &saved.path("d"), &["--base", &text(&small)]);
    assert!(line.refusal().contains("it has other tensors"), "{}", line.stderr);
    assert!(!saved.path("d").exists());
}

#[test]
fn a_base_can_be_a_model_with_an_adapter_on_it() {
    let saved = saved();
    let base = read_checkpoint(&saved.base);
    let (name, shape) =
        base.iter().find(|(_, t)| t.shape.len() == 2).map(|(n, t)| (n.clone(), t.shape.clone())).unwrap();
    let module = name.strip_suffix(".weight").expect("a weight");
    let adapter = Adapter::lora(2, 4.0).with(&mut Random::new(8), module, (shape[1], shape[0]), Dtype::F32);
    adapter.write(&saved.path("lora"));
    let on = format!("{}+{}", text(&saved.base), text(&saved.path("lora")));
    let file = saved.path("x.tvz");
    let args = ["pack", &text(&saved.models[0]), "--base", &on, "--density", "1", "--out", &text(&file)];
    tiesmith(args).succeeded();
    // Opened by the name in the file, and by the one given.
    unpack(&file, &saved.path("a"), &[]).succeeded();
    unpack(&file, &saved.path("b"), &["--base", &on]).succeeded();
    let model = read_checkpoint(&saved.models[0]);
    for out in ["a", "b"] {
        assert_eq!(differences(&model, &read_checkpoint(&saved.path(out))), "");
    }
    fs::rename(saved.path("lora"), saved.path("moved")).unwrap();
    let line = unpack(&file, &saved.path("c"), &[]);
    assert!(line.refusal().contains("is not there"), "{}", line.stderr);
    assert_eq!(line.stderr.matches(&text(&saved.base)).count(), 1, "{}", line.stderr);
    // A base that is itself packed is no base, with an adapter on it or without.
    let other = saved.path("y.tvz");
    pack(&saved.models[1], &saved.base, &other, &[]).succeeded();
    for base in [text(&other), format!("{}+{}", text(&other), text(&saved.path("moved")))] {
        let line = unpack(&file, &saved.path("c"), &["--base", &base]);
        assert!(line.refusal().contains("it is itself a packed task vector"), "{}", line.stderr);
    }
}

#[test]
fn a_base_that_differs_in_one_weight_is_noticed() {
    let odd = Odd::new();
    let file = odd.path("x.tvz");
    pack(&odd.path("model"), &odd.path("base"), &file, &["--density", "1"]).succeeded();
    // In the middle of a long tensor, between the places that are compared when the file is opened.
    let mut base = odd.base.clone();
    base.get_mut("c.long").unwrap().bytes[3_000_001] ^= 1;
    fs::remove_dir_all(odd.path("base")).unwrap();
    write_checkpoint(&odd.path("base"), &base, Layout::sharded(3, 5));
    let outcome = unpack(&file, &odd.path("out"), &[]);
    assert!(outcome.refusal().contains("c.long"), "{}", outcome.stderr);
    assert!(!odd.path("out").exists());
}

#[test]
fn damage_is_one_line_and_never_a_wrong_number() {
    let saved = saved();
    let (file, out) = (saved.path("x.tvz"), saved.path("out"));
    pack(&saved.models[0], &saved.base, &file, &["--density", "0.5"]).succeeded();
    let whole = fs::read(&file).unwrap();
    let mut random = Random::new(11);
    let cuts = [0, 1, 15, 16, 63, 80, whole.len() / 2, whole.len() - 64, whole.len() - 1];
    for cut in cuts {
        fs::write(&file, &whole[..cut]).unwrap();
        unpack(&file, &out, &[]).refusal();
        assert!(!out.exists(), "cut at {cut}");
    }
    for _ in 0..60 {
        let mut damaged = whole.clone();
        let place = random.below(whole.len());
        damaged[place] ^= 1 << random.below(8);
        fs::write(&file, &damaged).unwrap();
        let line = unpack(&file, &out, &[]);
        line.refusal();
        assert!(!out.exists(), "damaged at {place}");
    }
    fs::write(&file, [&whole[..], b"more"].concat()).unwrap();
    unpack(&file, &out, &[]).refusal();
    fs::write(&file, &whole).unwrap();
    unpack(&file, &out, &[]).succeeded();
}

#[test]
fn what_cannot_be_packed_is_refused() {
    let saved = saved();
    let (file, model, base) = (saved.path("x.tvz"), &saved.models[0], &saved.base);
    let refused = |outcome: Outcome, part: &str| {
        assert!(outcome.refusal().contains(part), "{part}: {}", outcome.stderr);
        let files: Vec<PathBuf> = read_tree(saved.dir.path()).into_keys().collect();
        assert!(files.iter().all(|path| !path.to_string_lossy().contains(".tvz")), "{files:?}");
    };
    refused(pack(model, base, &saved.path("x.bin"), &[]), "ends in .tvz");
    refused(pack(model, base, &file, &["--memory", "1MB"]), "at least");
    refused(pack(&saved.path("nothing"), base, &file, &[]), "nothing");
    // Trimmed tensors must be as in base.
    let mut other = read_checkpoint(model);
    let name = other.keys().next().unwrap().clone();
    let tensor = other[&name].to(Dtype::BF16);
    other.insert(name, tensor);
    write_checkpoint(&saved.path("bf16"), &other, Layout::SINGLE);
    refused(pack(&saved.path("bf16"), base, &file, &[]), "--density 1");
    let mut bad = read_checkpoint(model);
    bad.insert("layers.2.mlp.bias".into(), Tensor::vector(&[f32::NAN]));
    write_checkpoint(&saved.path("nan"), &bad, Layout::SINGLE);
    refused(pack(&saved.path("nan"), base, &file, &[]), "layers.2.mlp.bias");
    // What is there stays, unless it is to be replaced.
    pack(model, base, &file, &[]).succeeded();
    let before = fs::read(&file).unwrap();
    assert!(pack(&saved.models[1], base, &file, &[]).refusal().contains("--force"));
    assert_eq!(fs::read(&file).unwrap(), before);
    pack(&saved.models[1], base, &file, &["--force"]).succeeded();
    assert_ne!(fs::read(&file).unwrap(), before);
    // A packed task vector is no base.
    let outcome = pack(model, &file, &saved.path("y.tvz"), &[]);
    assert!(outcome.refusal().contains("packed"), "{}", outcome.stderr);
}

#[test]
fn a_directory_of_one_packed_task_vector_is_one() {
    let saved = saved();
    let folder = saved.path("folder");
    fs::create_dir(&folder).unwrap();
    pack(&saved.models[0], &saved.base, &folder.join("model.tvz"), &["--density", "1"]).succeeded();
    tiesmith(["diff", &text(&folder), &text(&saved.models[0])]).succeeded();
    // Its own configuration goes before base's.
    fs::write(folder.join("config.json"), "{\"mine\": 1}").unwrap();
    unpack(&folder, &saved.path("out"), &[]).succeeded();
    assert_eq!(files::read_json(&saved.path("out").join("config.json"))["mine"], 1);
}
