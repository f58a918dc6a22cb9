//! More of the corpus: adapters, packed task vectors, PyTorch archives, tokenizers and recipes that are malformed or adversarial,
//! things that are no files where files should be, and outputs that cannot be.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use crate::corpus::{Corpus, entry, file};

fn fifo(path: &Path) {
    let _ = fs::remove_file(path);
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

fn socket(path: &Path) {
    let _ = fs::remove_file(path);
    drop(UnixListener::bind(path).unwrap());
}

fn link(target: &str, path: &Path) {
    let _ = fs::remove_file(path);
    symlink(target, path).unwrap();
}

#[test]
fn what_is_no_file_is_refused_where_a_file_should_be() {
    type Spoil = fn(&Path);
    let kinds: [(&str, Spoil); 8] = [
        ("a FIFO", fifo),
        ("a socket", socket),
        ("a link to itself", |path| link(&path.file_name().unwrap().to_string_lossy(), path)),
        ("a link to nowhere", |path| link("/nonexistent/file", path)),
        ("an endless device", |path| link("/dev/zero", path)),
        ("an empty device", |path| link("/dev/null", path)),
        ("a file without a length", |path| link("/proc/self/maps", path)),
        ("a directory", |path| {
            let _ = fs::remove_file(path);
            fs::create_dir(path).unwrap();
        }),
    ];
    let mut corpus = Corpus::new();
    for (what, spoil) in kinds {
        corpus.refuse(&format!("weights: {what}"), &["bad"], |bad| spoil(&bad.join("model.safetensors")));
        corpus.refuse(&format!("an index: {what}"), &["model.safetensors.index.json"], |bad| {
            fs::rename(bad.join("model.safetensors"), bad.join("one.safetensors")).unwrap();
            spoil(&bad.join("model.safetensors.index.json"));
        });
        corpus.refuse(&format!("a pickle: {what}"), &["bad"], |bad| {
            fs::remove_file(bad.join("model.safetensors")).unwrap();
            spoil(&bad.join("pytorch_model.bin"));
        });
        let dir = corpus.place();
        spoil(&dir.join("recipe.yml"));
        corpus.refuse_args(&format!("a recipe: {what}"), &["recipe.yml"], &dir, &["recipe.yml"]);
        let dir = corpus.place();
        fs::create_dir(dir.join("lora")).unwrap();
        spoil(&dir.join("lora/adapter_config.json"));
        fs::write(dir.join("lora/adapter_model.safetensors"), file("{}", &[])).unwrap();
        corpus.refuse_args(&format!("an adapter: {what}"), &["lora"], &dir, &["--base=good", "--model=lora"]);
    }
    corpus.finish(40);
}

#[test]
fn inputs_that_are_no_places_are_refused() {
    let mut corpus = Corpus::new();
    let (long, deep) = ("x".repeat(5000), "x/".repeat(3000));
    for name in [
        "/",
        "/proc",
        "/dev/zero",
        "/dev/stdin",
        "-",
        ".",
        "..",
        "....",
        "a\nb",
        "\u{1b}[2J",
        "\u{202e}evil",
        &long,
        &deep,
    ] {
        let dir = corpus.place();
        corpus.refuse_args(&format!("{name:.20?}"), &[], &dir, &["--base=good", &format!("--model={name}")]);
    }
    corpus.finish(13);
}

#[test]
fn outputs_that_cannot_be_are_refused() {
    let mut corpus = Corpus::new();
    let (long, deep) = ("y".repeat(300), "y/".repeat(3000));
    for name in ["", ".", "/", "/dev/null", "/dev/null/x", "/proc/x", "good", "good/model.safetensors", &long, &deep] {
        let dir = corpus.place();
        corpus.refuse_args(
            &format!("{name:.20?}"),
            &[],
            &dir,
            &["--base=good", "--model=bad", &format!("--out={name}")],
        );
    }
    type Make = fn(&Path);
    let places: [(&str, Make); 12] = [
        ("a link to nowhere", |out| link("/nonexistent/place", out)),
        ("a FIFO for the lock", |out| {
            fs::create_dir_all(out.join(".tiesmith")).unwrap();
            fifo(&out.join(".tiesmith/lock"));
        }),
        ("a file with another name for the lock", |out| {
            fs::create_dir_all(out.join(".tiesmith")).unwrap();
            fs::write(out.with_extension("mine"), "mine").unwrap();
            fs::hard_link(out.with_extension("mine"), out.join(".tiesmith/lock")).unwrap();
        }),
        ("a FIFO", fifo),
        ("a socket", socket),
        ("a link to itself", |out| link("o", out)),
        ("a file for the work directory", |out| {
            fs::create_dir(out).unwrap();
            fs::write(out.join(".tiesmith"), "mine").unwrap();
        }),
        ("a directory for the lock", |out| fs::create_dir_all(out.join(".tiesmith/lock")).unwrap()),
        ("a directory for the journal", |out| fs::create_dir_all(out.join(".tiesmith/journal")).unwrap()),
        ("a FIFO for the journal", |out| {
            fs::create_dir_all(out.join(".tiesmith")).unwrap();
            fifo(&out.join(".tiesmith/journal"));
        }),
        ("a device for the journal", |out| {
            fs::create_dir_all(out.join(".tiesmith")).unwrap();
            link("/dev/zero", &out.join(".tiesmith/journal"));
        }),
        ("a journal of 8 GB", |out| {
            fs::create_dir_all(out.join(".tiesmith")).unwrap();
            fs::write(out.join(".tiesmith/journal"), "tiesmith journal").unwrap();
            fs::File::options().write(true).open(out.join(".tiesmith/journal")).unwrap().set_len(8 << 30).unwrap();
        }),
    ];
    for (what, make) in places {
        let dir = corpus.place();
        make(&dir.join("o"));
        corpus.refuse_args(what, &["o"], &dir, &["--base=good", "--model=bad", "--out=o"]);
    }
    corpus.finish(22);
}

#[test]
fn adapters_that_are_wrong_are_refused() {
    let mut corpus = Corpus::new();
    let mut refuse = |what: &str, config: &[u8], weights: &[u8]| {
        let dir = corpus.place();
        fs::create_dir(dir.join("lora")).unwrap();
        fs::write(dir.join("lora/adapter_config.json"), config).unwrap();
        fs::write(dir.join("lora/adapter_model.safetensors"), weights).unwrap();
        corpus.refuse_args(what, &["lora"], &dir, &["--base=good", "--model=lora"]);
    };
    let lora = r#"{"peft_type":"LORA","r":1,"lora_alpha":2,"target_modules":["a"]}"#;
    let deep = "[".repeat(100_000);
    let configs = [
        "",
        "null",
        "[]",
        "{",
        "{}",
        "\u{feff}{}",
        &deep,
        r#"{"peft_type":3}"#,
        r#"{"peft_type":"PROMPT_TUNING"}"#,
        &lora.replace(r#""r":1"#, r#""r":0"#),
        &lora.replace(r#""r":1"#, r#""r":-1"#),
        &lora.replace(r#""r":1"#, r#""r":1.5"#),
        &lora.replace(r#""r":1"#, r#""r":1e30"#),
        &lora.replace(r#""r":1"#, r#""r":"1""#),
        &lora.replace(r#""lora_alpha":2"#, r#""lora_alpha":"x""#),
        &lora.replace(r#""lora_alpha":2"#, r#""lora_alpha":1e400"#),
        &lora.replace(r#""lora_alpha":2"#, r#""lora_alpha":NaN"#),
        &lora.replace(r#""r":1"#, r#""r":1,"rank_pattern":3"#),
        &lora.replace(r#""r":1"#, r#""r":1,"fan_in_fan_out":"x""#),
        &lora.replace(r#""r":1"#, r#""r":1,"use_dora":true"#),
    ];
    let pair = |a: &str, b: &str, bytes: [u64; 2], module: &str| {
        let end = bytes[0] + bytes[1];
        let [first, second] = [entry("F32", a, 0, bytes[0]), entry("F32", b, bytes[0], end)];
        let name = |which: &str| format!("base_model.model.{module}.lora_{which}.weight");
        file(&format!(r#"{{"{}":{first},"{}":{second}}}"#, name("A"), name("B")), &vec![0; end as usize])
    };
    for config in configs {
        refuse(&format!("{config:.60}"), config.as_bytes(), &pair("[1,2]", "[2,1]", [8, 8], "a"));
    }
    refuse("Latin-1", b"{\"peft_type\":\"\xff\"}", &pair("[1,2]", "[2,1]", [8, 8], "a"));
    refuse("no tensors", lora.as_bytes(), &file("{}", &[]));
    refuse("another module", lora.as_bytes(), &pair("[1,2]", "[2,1]", [8, 8], "z"));
    refuse("vectors", lora.as_bytes(), &pair("[2]", "[2]", [8, 8], "a"));
    refuse("other ranks", lora.as_bytes(), &pair("[1,2]", "[1,2]", [8, 8], "a"));
    refuse("cut off", lora.as_bytes(), &pair("[1,2]", "[2,1]", [8, 8], "a")[..40]);
    refuse("empty", lora.as_bytes(), b"");
    let half = format!(r#"{{"base_model.model.a.lora_A.weight":{}}}"#, entry("F32", "[1,2]", 0, 8));
    refuse("one factor only", lora.as_bytes(), &file(&half, &[0; 8]));
    corpus.finish(28);
}

#[test]
fn packed_files_and_archives_that_are_wrong_are_refused() {
    let mut corpus = Corpus::new();
    let head = |version: u32| [&b"TIESMTVZ"[..], &version.to_le_bytes(), &[0; 4]].concat();
    let foot = |offset: u64, length: u64, plain: u64| {
        [&offset.to_le_bytes()[..], &length.to_le_bytes(), &plain.to_le_bytes(), &[0; 32], b"ZVTMSEIT"].concat()
    };
    let packed: [(&str, Vec<u8>); 9] = [
        ("empty", Vec::new()),
        ("the magic only", b"TIESMTVZ".to_vec()),
        ("zeros", vec![0; 200]),
        ("another version", [head(9), vec![0; 200]].concat()),
        ("no foot", [head(2), vec![0; 200]].concat()),
        ("an index beyond the end", [head(2), foot(1 << 62, 1 << 62, 5)].concat()),
        ("an index of a terabyte", [head(2), vec![7; 50], foot(16, 50, 1 << 40)].concat()),
        ("an index that is none", [head(2), vec![7; 50], foot(16, 50, 100)].concat()),
        ("an index of nothing", [head(2), foot(16, 0, 0)].concat()),
    ];
    for (what, content) in packed {
        let dir = corpus.place();
        fs::write(dir.join("p.tvz"), content).unwrap();
        corpus.refuse_args(what, &["p.tvz"], &dir, &["--base=good", "--model=p.tvz"]);
    }
    let archives: [(&str, Vec<u8>); 7] = [
        ("empty", Vec::new()),
        ("text", b"hello, this is no archive at all".to_vec()),
        ("the beginning of an archive", b"PK\x03\x04".to_vec()),
        ("an archive of nothing", [&b"PK\x05\x06"[..], &[0; 18]].concat()),
        ("an archive that claims a terabyte", [&b"PK\x05\x06\0\0\0\0\x01\0\x01\0"[..], &[0xff; 8], &[0; 2]].concat()),
        ("a bare pickle", b"\x80\x02}q\x00.".to_vec()),
        ("a bare pickle of code", b"cposix\nsystem\n(S'true'\ntR.".to_vec()),
    ];
    for (what, content) in archives {
        corpus.refuse(&format!("an archive: {what}"), &["pytorch_model.bin"], |bad| {
            fs::remove_file(bad.join("model.safetensors")).unwrap();
            fs::write(bad.join("pytorch_model.bin"), content).unwrap();
        });
    }
    corpus.finish(16);
}

#[test]
fn tokenizers_that_are_wrong_are_refused() {
    const GOOD: &str =
        r#"{"version":"1.0","model":{"type":"BPE","vocab":{"a":0,"b":1,"c":2},"merges":[]},"added_tokens":[]}"#;
    let recipe = "merge_method: linear\nmodels: [{model: good}, {model: bad}]\nparameters: {weight: 1.0}\n\
                  tokenizer_source: union\n";
    let mut corpus = Corpus::new();
    let vocabulary = |vocab: &str| GOOD.replace(r#"{"a":0,"b":1,"c":2}"#, vocab);
    let deep = format!(r#"{{"model":{}"#, "[".repeat(100_000));
    let texts = [
        "",
        "null",
        "[]",
        "{}",
        "{",
        &deep,
        r#"{"model":null}"#,
        r#"{"model":{"type":"Unigram","vocab":[["a"]]}}"#,
        &vocabulary("[1,2]"),
        &vocabulary("{\"a\":-1}"),
        &vocabulary("{\"a\":1.5}"),
        &vocabulary("{\"a\":\"0\"}"),
        &vocabulary("{\"a\":99999999999}"),
        &vocabulary("{\"a\":4294967295}"),
        &vocabulary("{\"a\":null}"),
        &GOOD.replace("[]}", "3}").replace(r#""added_tokens":[]"#, r#""added_tokens":3"#),
        &GOOD.replace(r#""added_tokens":[]"#, r#""added_tokens":[{"id":4000000000,"content":"z"}]"#),
        &GOOD.replace(r#""added_tokens":[]"#, r#""added_tokens":[{"id":-1,"content":"z"}]"#),
    ];
    for content in texts {
        let dir = corpus.place();
        let rows = file(&format!(r#"{{"model.embed_tokens.weight":{}}}"#, entry("F32", "[3,1]", 0, 12)), &[0; 12]);
        for name in ["good", "bad"] {
            fs::write(dir.join(name).join("model.safetensors"), &rows).unwrap();
            fs::write(dir.join(name).join("tokenizer.json"), GOOD).unwrap();
        }
        fs::write(dir.join("bad/tokenizer.json"), content).unwrap();
        fs::write(dir.join("recipe.yml"), recipe).unwrap();
        corpus.refuse_args(&format!("{content:.60}"), &["bad/tokenizer.json"], &dir, &["recipe.yml"]);
    }
    corpus.finish(18);
}

#[test]
fn recipes_in_hostile_yaml_are_refused() {
    let good = "models: [{model: good}, {model: bad}]\nmerge_method: linear\nparameters: {weight: 1.0}\n";
    let wide = |name: char, item: &str| format!("{name}: &{name} [{}]\n", vec![item; 100].join(","));
    let texts = [
        "models:\n\t- model: good\n".to_owned(),
        format!("{good}parameters: {{weight: 2.0}}\n"),
        "models: [{model: good, model: bad}]\nmerge_method: linear\n".into(),
        "models: [{model: good, parameters: {weight: 1, weight: 2}}]\nmerge_method: linear\n".into(),
        format!("x: &x {{weight: 1.0}}\n{good}"),
        format!("a: &a [*a]\n{good}"),
        "models: *nothing\nmerge_method: linear\n".into(),
        format!("{}{}{}{good}", wide('a', &"x".repeat(1000)), wide('b', "*a"), wide('c', "*b")),
        "models: !!set {good}\nmerge_method: linear\n".into(),
        "models: !!binary aGVsbG8=\nmerge_method: linear\n".into(),
        format!("{good}---\n{good}"),
        format!("{good}...\nmore: of it\n"),
        format!("{good}\0"),
        format!("{good}\u{1}"),
        good.replace("1.0", &format!("1{}", "0".repeat(400))),
        good.replace("1.0", "1e400"),
        good.replace("1.0", "-1e400"),
        good.replace("1.0", "0x1p3"),
        good.replace("good", "/dev/zero"),
        good.replace("{model: good}", "[good]"),
        good.replace("{model: good}", "{model: null}"),
        format!("{good}x: \"abc"),
        format!("{good}x: [1,"),
        "models: |\n  - model: good\nmerge_method: linear\n".into(),
        format!("? [a, b]\n: c\n{good}"),
        format!("~: 1\n{good}"),
        format!("1: 1\n{good}"),
        format!("true: 1\n{good}"),
        format!("x: {}1{}\n{good}", "{a: ".repeat(20_000), "}".repeat(20_000)),
        (0..1200).map(|i| format!("{}a:\n", " ".repeat(i))).collect(),
        format!("{good}{}", (0..20_000).map(|i| format!("k{i}: 1\n")).collect::<String>()),
        good.replace("1.0", &format!("[{}]", vec!["1"; 100_000].join(","))),
        format!("models: [{}]\nmerge_method: linear\n", vec!["{model: good}"; 5000].join(",")),
        "{\"models\": [".into(),
        r#"{"fingerprint":"x","recipe":{}}"#.into(),
        r#"{"fingerprint":"x","recipe":null}"#.into(),
        format!(r#"{{"fingerprint":"x","recipe":{}"#, "[".repeat(100_000)),
    ];
    let mut corpus = Corpus::new();
    for content in texts {
        let dir = corpus.place();
        fs::write(dir.join("recipe.yml"), &content).unwrap();
        let what: String = content.chars().take(60).collect();
        corpus.refuse_args(&format!("recipe {what:?}"), &[], &dir, &["recipe.yml"]);
    }
    for (what, content) in [
        ("UTF-16", good.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>()),
        ("Latin-1", [good.as_bytes(), b"# \xe9\n"].concat()),
    ] {
        let dir = corpus.place();
        fs::write(dir.join("recipe.yml"), content).unwrap();
        corpus.refuse_args(what, &["recipe.yml"], &dir, &["recipe.yml"]);
    }
    corpus.finish(39);
}
