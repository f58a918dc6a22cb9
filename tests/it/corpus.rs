//! A corpus made by code: malformed and adversarial inputs, each refused quickly, in little memory and in one line that
//! names the file (and the tensor); and odd but valid ones, which must work.
//!
//! A merge of a checkpoint with itself by `linear` must give that checkpoint, so odd inputs need no other oracle.

use std::fs;

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::support::family::text;
use crate::support::files::{read_checkpoint, read_file};
use crate::support::run::command;

/// Longest a refusal may take: a build without full optimisation on a busy machine gets more.
const MOST_TIME: Duration = Duration::from_secs(if cfg!(debug_assertions) { 10 } else { 1 });
const MOST_BYTES: u64 = 100_000_000;
const DTYPES: [(&str, u64); 16] = [
    ("BOOL", 8),
    ("U8", 8),
    ("I8", 8),
    ("F8_E5M2", 8),
    ("F8_E4M3", 8),
    ("F8_E8M0", 8),
    ("I16", 16),
    ("U16", 16),
    ("F16", 16),
    ("BF16", 16),
    ("I32", 32),
    ("U32", 32),
    ("F32", 32),
    ("C64", 64),
    ("F64", 64),
    ("I64", 64),
];

/// How a run ended, and what it took.
struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
    took: Duration,
    peak_bytes: u64,
}

fn run(dir: &Path, args: &[String]) -> Ended {
    let begin = Instant::now();
    let mut child = command();
    child.current_dir(dir).args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = child.spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak_bytes = 0;
    let code = loop {
        // The peak so far, of a process that still lives.
        let status = fs::read_to_string(&status).unwrap_or_default();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = peak.and_then(|peak| peak.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
        peak_bytes = peak_bytes.max(kib.unwrap_or(0) * 1024);
        if let Some(status) = child.try_wait().unwrap() {
            break status.code();
        }
        std::thread::sleep(Duration::from_micros(500));
    };
    let took = begin.elapsed();
    let read = |stream: &mut dyn std::io::Read| {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        String::from_utf8(bytes).expect("output is UTF-8")
    };
    let (stdout, stderr) = (read(child.stdout.as_mut().unwrap()), read(child.stderr.as_mut().unwrap()));
    Ended { code, stdout, stderr, took, peak_bytes }
}

/// What is wrong with how a refusal went; nothing, if it went well.
fn faults(ended: &Ended, out: &Path, names: &[&str]) -> Vec<String> {
    let mut faults = Vec::new();
    let mut check = |holds: bool, what: String| {
        if !holds {
            faults.push(what);
        }
    };
    let line = ended.stderr.trim_end_matches('\n');
    check(ended.code == Some(2), format!("exit code {:?}", ended.code));
    check(line.starts_with("error: ") && !line.contains('\n'), "not one line of error".into());
    check(line.len() <= 1000, format!("{} bytes", line.len()));
    let raw = |c: char| {
        c.is_control() || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    check(!line.chars().any(raw), "a raw control character".into());
    check(ended.stdout.is_empty(), "something on stdout".into());
    for name in names {
        check(line.contains(name), format!("{name:?} is not named"));
    }
    check(ended.took < MOST_TIME, format!("{:?}", ended.took));
    check(ended.peak_bytes < MOST_BYTES, format!("{} bytes of memory", ended.peak_bytes));
    let left = ["model.safetensors", "model.safetensors.index.json", ".tiesmith", "tiesmith.json"];
    check(!left.iter().any(|name| out.join(name).exists()), "something was left in the output".into());
    faults
}

/// Runs every case and reports all that went wrong.
pub struct Corpus {
    dir: TempDir,
    cases: usize,
    failures: Vec<String>,
}

impl Corpus {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), cases: 0, failures: Vec::new() }
    }

    /// A fresh directory for a case, with two good checkpoints in it.
    pub fn place(&mut self) -> PathBuf {
        self.cases += 1;
        let dir = self.dir.path().join(self.cases.to_string());
        for name in ["good", "bad"] {
            fs::create_dir_all(dir.join(name)).unwrap();
            fs::write(dir.join(name).join("model.safetensors"), good_file()).unwrap();
        }
        dir
    }

    /// A merge of `good` and `bad` must be refused.
    pub fn refuse(&mut self, what: &str, names: &[&str], spoil: impl FnOnce(&Path)) {
        let dir = self.place();
        spoil(&dir.join("bad"));
        self.refuse_args(what, names, &dir, &["--base=good", "--model=bad"]);
    }

    pub fn refuse_args(&mut self, what: &str, names: &[&str], dir: &Path, args: &[&str]) {
        let all: Vec<String> =
            ["merge", "--progress=none", "--out=out"].iter().chain(args).map(|a| (*a).into()).collect();
        let ended = run(dir, &all);
        let faults = faults(&ended, &dir.join("out"), names);
        if !faults.is_empty() {
            self.failures.push(format!("{what}: {}\n    {}", faults.join("; "), ended.stderr));
        }
        fs::remove_dir_all(dir).unwrap();
    }

    /// `file` as the only file of a checkpoint must be refused.
    fn refuse_file(&mut self, what: &str, names: &[&str], file: &[u8]) {
        let names: Vec<&str> = ["model.safetensors"].iter().chain(names).copied().collect();
        self.refuse(what, &names, |bad| fs::write(bad.join("model.safetensors"), file).unwrap());
    }

    #[track_caller]
    pub fn finish(self, least: usize) {
        let count = self.failures.len();
        println!("{} cases", self.cases);
        assert!(self.failures.is_empty(), "{count} of {} cases failed:\n{}", self.cases, self.failures.join("\n"));
        assert!(self.cases >= least, "{} cases", self.cases);
    }
}

pub fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

const GOOD: &str = r#"{"a.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b.weight":{"dtype":"F32","shape":[3],"data_offsets":[8,20]}}"#;

fn good_file() -> Vec<u8> {
    file(GOOD, &[0; 20])
}

pub fn entry(dtype: &str, shape: &str, begin: u64, end: u64) -> String {
    format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
}

#[test]
fn files_that_are_no_checkpoints_are_refused() {
    let mut corpus = Corpus::new();
    let good = good_file();
    for length in (0..=16).chain((20..good.len()).step_by(9)) {
        corpus.refuse_file(&format!("cut to {length} bytes"), &[], &good[..length]);
    }
    for more in [1, 7, 8, 4096] {
        corpus.refuse_file(&format!("{more} bytes behind"), &[], &[&good[..], &vec![0; more]].concat());
    }
    let length = GOOD.len() as u64;
    let claims = [0, 1, 2, length - 1, length + 1, length + 19, length + 20, length + 21, 1 << 20, 99_999_999];
    for claim in claims.into_iter().chain([
        100_000_001,
        1 << 31,
        1 << 32,
        1 << 40,
        1 << 62,
        u64::MAX / 2,
        u64::MAX - 8,
        u64::MAX,
    ]) {
        corpus.refuse_file(
            &format!("a header of {claim} bytes"),
            &[],
            &[&claim.to_le_bytes()[..], &good[8..]].concat(),
        );
    }
    let foreign: [(&str, &[u8]); 10] = [
        ("git-lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"),
        ("zip", b"PK\x03\x04archive/data.pkl and more of it, long enough to be looked at"),
        ("pickle", b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01K\x01u."),
        ("GGUF", b"GGUF\x03\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"),
        ("HTML", b"<!DOCTYPE html><html><body>404</body></html>"),
        ("zeros", &[0; 4096]),
        ("ones", &[0xff; 4096]),
        ("text", b"hello, this is not a checkpoint at all"),
        ("JSON", br#"{"a.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#),
        ("gzip", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03 and whatever follows"),
    ];
    for (what, content) in foreign {
        corpus.refuse_file(what, &[], content);
    }
    let sparse = |prefix: u64, bytes: u64| {
        move |bad: &Path| {
            let path = bad.join("model.safetensors");
            fs::write(&path, prefix.to_le_bytes()).unwrap();
            fs::File::options().write(true).open(&path).unwrap().set_len(bytes).unwrap();
        }
    };
    corpus.refuse("a sparse file", &["model.safetensors"], sparse(1 << 33, 1 << 34));
    corpus.refuse("60 MB of zeros for a header", &["model.safetensors"], sparse(60_000_000, 60_000_008));
    corpus.finish(60);
}

#[test]
fn headers_with_one_bad_tensor_are_refused_by_its_name() {
    let mut corpus = Corpus::new();
    for (dtype, bits) in DTYPES {
        for (elements, off) in [(3u64, 1i64), (3, -1), (5, 8)] {
            let bytes = (elements * bits / 8).checked_add_signed(off).unwrap();
            let header = format!(r#"{{"the.tensor":{}}}"#, entry(dtype, &format!("[{elements}]"), 0, bytes));
            corpus.refuse_file(
                &format!("{dtype} of {bytes} bytes"),
                &["the.tensor"],
                &file(&header, &vec![0; bytes as usize]),
            );
        }
    }
    let shapes = [
        "[-1]",
        "[1.0]",
        "[1e1]",
        "[\"2\"]",
        "[null]",
        "[[2]]",
        "{}",
        "null",
        "2",
        "\"2\"",
        "[18446744073709551616]",
        "[18446744073709551615,2]",
        "[4294967296,4294967296,2]",
        "[true]",
    ];
    for shape in shapes {
        let header = format!(r#"{{"the.tensor":{}}}"#, entry("F32", shape, 0, 8));
        corpus.refuse_file(&format!("shape {shape}"), &["the.tensor"], &file(&header, &[0; 8]));
    }
    let offsets = [
        "[8,0]",
        "[0,7]",
        "[1,9]",
        "[0,16]",
        "[0]",
        "[]",
        "[0,8,8]",
        "null",
        "8",
        "[0.0,8]",
        "[\"0\",\"8\"]",
        "[-0,8.5]",
        "[0,18446744073709551615]",
        "[18446744073709551608,18446744073709551615]",
        "[0,8e0]",
        "{\"0\":8}",
    ];
    for offset in offsets {
        let header = format!(r#"{{"the.tensor":{{"dtype":"F32","shape":[2],"data_offsets":{offset}}}}}"#);
        corpus.refuse_file(&format!("offsets {offset}"), &["the.tensor"], &file(&header, &[0; 8]));
    }
    for dtype in ["", "f32", "F31", "float32", "F32 ", "FP32", "\\u0000", "BFLOAT16", "Q4_0"] {
        let header = format!(r#"{{"the.tensor":{}}}"#, entry(dtype, "[2]", 0, 8));
        corpus.refuse_file(&format!("type {dtype:?}"), &["the.tensor"], &file(&header, &[0; 8]));
    }
    let dimensions = format!("[{}2]", "1,".repeat(64));
    corpus.refuse_file(
        "65 dimensions",
        &["the.tensor"],
        &file(&format!(r#"{{"the.tensor":{}}}"#, entry("F32", &dimensions, 0, 8)), &[0; 8]),
    );
    corpus.finish(85);
}

#[test]
fn headers_that_are_bad_as_a_whole_are_refused() {
    let mut corpus = Corpus::new();
    let one = entry("F32", "[2]", 0, 8);
    let deep =
        |open: &str, close: &str, times: usize| format!(r#"{{"a":{}{}}}"#, open.repeat(times), close.repeat(times));
    let headers = [
        "",
        "{",
        "}",
        "[]",
        "null",
        "0",
        "\"\"",
        "{]",
        "{}{}",
        "{,}",
        "{\"a\"}",
        "{\"a\":}",
        "{\"a\":1,}",
        "{'a':1}",
        "{\"a\":null}",
        "{\"a\":[]}",
        "{\"a\":{}}",
        "{\"a\":true}",
        "{/**/}",
        "{\"a\":NaN}",
        "\u{feff}{}",
        "{}\0",
    ];
    for header in headers {
        corpus.refuse_file(&format!("header {header:?}"), &[], &file(header, &[0; 8]));
    }
    let with = |metadata: &str| format!(r#"{{"__metadata__":{metadata},"a":{one}}}"#);
    for metadata in
        ["1", "\"pt\"", "[]", "{\"format\":1}", "{\"format\":null}", "{\"a\":{}}", "{\"a\":[\"b\"]}", "true"]
    {
        corpus.refuse_file(&format!("metadata {metadata}"), &[], &file(&with(metadata), &[0; 8]));
    }
    let twice = [
        format!(r#"{{"a":{one},"a":{one}}}"#),
        format!(r#"{{"a":{one},"\u0061":{one}}}"#),
        r#"{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#.into(),
        r#"{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}"#.into(),
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"data_offsets":[0,8]}}"#.into(),
    ];
    for header in twice {
        corpus.refuse_file(&format!("twice: {header}"), &["a"], &file(&header, &[0; 8]));
    }
    corpus.refuse_file(
        "metadata twice",
        &[],
        &file(&format!(r#"{{"__metadata__":{{}},"__metadata__":{{}},"a":{one}}}"#), &[0; 8]),
    );
    for (open, close) in [("[", "]"), (r#"{"a":"#, "}"), ("[[", "]]")] {
        corpus.refuse_file("nested without end", &[], &file(&deep(open, close, 100_000), &[0; 8]));
    }
    for name in [r"\ud800", r"\udc00\ud800", r"\x41", r"\u00"] {
        corpus.refuse_file(&format!("name {name}"), &[], &file(&format!(r#"{{"{name}":{one}}}"#), &[0; 8]));
    }
    let mut latin = file(&format!(r#"{{"name":{one}}}"#), &[0; 8]);
    latin[11] = 0xe9;
    corpus.refuse_file("a name in Latin-1", &[], &latin);
    corpus.refuse_file(
        "a name of 5,000 bytes",
        &["xxxx"],
        &file(&format!(r#"{{"{}":{one}}}"#, "x".repeat(5_000)), &[0; 8]),
    );
    // Names that would disturb a terminal, in an error about them.
    for name in [r"\u001b[2J", r"a\nb", r"\r\n", r"\u0000", "\u{202e}evil", "\u{200b}", r"\u0007\u0008", "\u{2028}"] {
        let header = format!(r#"{{"{name}":{}}}"#, entry("F32", "[3]", 0, 8));
        corpus.refuse_file(&format!("a hostile name {name:?}"), &[], &file(&header, &[0; 8]));
    }
    corpus.finish(50);
}

/// `bad` becomes two shards with this index.
fn sharded(bad: &Path, index: &str) {
    fs::remove_file(bad.join("model.safetensors")).unwrap();
    fs::write(bad.join("one.safetensors"), file(&format!(r#"{{"a.weight":{}}}"#, entry("F32", "[2]", 0, 8)), &[0; 8]))
        .unwrap();
    fs::write(
        bad.join("two.safetensors"),
        file(&format!(r#"{{"b.weight":{}}}"#, entry("F32", "[3]", 0, 12)), &[0; 12]),
    )
    .unwrap();
    fs::write(bad.join("model.safetensors.index.json"), index).unwrap();
}

const INDEX: &str = "model.safetensors.index.json";
const GOOD_INDEX: &str =
    r#"{"metadata":{"total_size":20},"weight_map":{"a.weight":"one.safetensors","b.weight":"two.safetensors"}}"#;

#[test]
fn indexes_that_are_wrong_or_reach_out_are_refused() {
    let mut corpus = Corpus::new();
    let files = [
        "..",
        ".",
        "",
        "/",
        "/etc/passwd",
        "../good/model.safetensors",
        "a/../one.safetensors",
        "./one.safetensors",
        "sub/one.safetensors",
        "one.safetensors/",
        "..\\\\one.safetensors",
        "one\\u0000.safetensors",
        "nowhere.safetensors",
        "one.safetensors ",
        "ONE.safetensors",
        "model.safetensors.index.json",
        "\\u001b[31m.safetensors",
        "~/one.safetensors",
    ];
    for name in files {
        let index = format!(r#"{{"weight_map":{{"a.weight":"{name}","b.weight":"two.safetensors"}}}}"#);
        corpus.refuse(&format!("file {name:?}"), &["bad"], |bad| sharded(bad, &index));
    }
    for value in ["1", "null", "true", "[]", "{}", "[\"one.safetensors\"]"] {
        let index = format!(r#"{{"weight_map":{{"a.weight":{value},"b.weight":"two.safetensors"}}}}"#);
        corpus.refuse(&format!("file {value}"), &[INDEX], |bad| sharded(bad, &index));
    }
    let texts = [
        "",
        "{",
        "[]",
        "null",
        "{}",
        "{\"weight_map\":null}",
        "{\"weight_map\":[]}",
        "{\"weight_map\":\"x\"}",
        "{\"weight_map\":{}} x",
        "{\"weight_map\":{},\"weight_map\":{}}",
        "\u{feff}{\"weight_map\":{}}",
        "weight_map: {}",
    ];
    for index in texts {
        corpus.refuse(&format!("index {index:?}"), &[INDEX], |bad| sharded(bad, index));
    }
    let nested = format!(r#"{{"metadata":{}{},"weight_map":{{}}}}"#, "[".repeat(100_000), "]".repeat(100_000));
    corpus.refuse("nested without end", &[INDEX], |bad| sharded(bad, &nested));
    corpus.refuse("not UTF-8", &[INDEX], |bad| {
        sharded(bad, GOOD_INDEX);
        fs::write(bad.join(INDEX), b"{\"weight_map\":{\"\xff\":\"one.safetensors\"}}").unwrap();
    });
    corpus.refuse("larger than any index", &[INDEX], |bad| {
        sharded(bad, GOOD_INDEX);
        fs::File::options().write(true).open(bad.join(INDEX)).unwrap().set_len(1 << 30).unwrap();
    });
    let more = |tensor: &str, file: &str| {
        GOOD_INDEX.replace(r#""weight_map":{"#, &format!(r#""weight_map":{{"{tensor}":"{file}","#))
    };
    corpus.refuse("a tensor that no shard has", &["ghost"], |bad| sharded(bad, &more("ghost", "one.safetensors")));
    corpus.refuse("the wrong shard", &["a.weight"], |bad| {
        sharded(bad, &GOOD_INDEX.replace(r#""a.weight":"one"#, r#""a.weight":"two"#))
    });
    corpus.refuse("a tensor twice", &["a.weight"], |bad| sharded(bad, &more("a.weight", "two.safetensors")));
    type Spoil = fn(&Path);
    let spoils: [(&str, &[&str], Spoil); 11] = [
        ("a shard is missing", &["one.safetensors"], |bad| fs::remove_file(bad.join("one.safetensors")).unwrap()),
        ("a shard is empty", &["one.safetensors"], |bad| fs::write(bad.join("one.safetensors"), "").unwrap()),
        ("a shard is cut off", &["one.safetensors"], |bad| {
            let content = fs::read(bad.join("one.safetensors")).unwrap();
            fs::write(bad.join("one.safetensors"), &content[..content.len() - 1]).unwrap();
        }),
        ("a shard is a directory", &["one.safetensors"], |bad| {
            fs::remove_file(bad.join("one.safetensors")).unwrap();
            fs::create_dir(bad.join("one.safetensors")).unwrap();
        }),
        ("a shard is a device", &["one.safetensors"], |bad| {
            fs::remove_file(bad.join("one.safetensors")).unwrap();
            symlink("/dev/zero", bad.join("one.safetensors")).unwrap();
        }),
        ("a shard is a link to itself", &["one.safetensors"], |bad| {
            fs::remove_file(bad.join("one.safetensors")).unwrap();
            symlink("one.safetensors", bad.join("one.safetensors")).unwrap();
        }),
        ("a shard is a link to nowhere", &["one.safetensors"], |bad| {
            fs::remove_file(bad.join("one.safetensors")).unwrap();
            symlink("/nonexistent/file", bad.join("one.safetensors")).unwrap();
        }),
        ("a shard is a socket", &["one.safetensors"], |bad| {
            fs::remove_file(bad.join("one.safetensors")).unwrap();
            drop(std::os::unix::net::UnixListener::bind(bad.join("one.safetensors")).unwrap());
        }),
        ("two indexes", &["bad"], |bad| {
            fs::rename(bad.join(INDEX), bad.join("x.safetensors.index.json")).unwrap();
            fs::copy(bad.join("x.safetensors.index.json"), bad.join("y.safetensors.index.json")).unwrap();
        }),
        ("no index", &["bad"], |bad| fs::remove_file(bad.join(INDEX)).unwrap()),
        ("the index is a directory", &[INDEX], |bad| {
            fs::remove_file(bad.join(INDEX)).unwrap();
            fs::create_dir(bad.join(INDEX)).unwrap();
        }),
    ];
    for (what, names, spoil) in spoils {
        corpus.refuse(what, names, |bad| {
            sharded(bad, GOOD_INDEX);
            spoil(bad);
        });
    }
    corpus.finish(50);
}

#[test]
fn recipes_that_are_wrong_are_refused() {
    let mut corpus = Corpus::new();
    let good = "models: [{model: good}, {model: bad}]\nmerge_method: linear\nparameters: {weight: 1.0}\n";
    let bomb: String =
        (0..30).map(|i| format!("a{}: &a{i} [{}]\n", i, format!("*a{},", i - 1).repeat(9))).skip(1).collect();
    let texts = [
        String::new(),
        " ".into(),
        "---".into(),
        "[]".into(),
        "null".into(),
        "3".into(),
        "models".into(),
        "\t".into(),
        "models: [".into(),
        "models: {a: b".into(),
        "a: b: c".into(),
        "{}".into(),
        "models: []\nmerge_method: linear".into(),
        "merge_method: linear".into(),
        "models: [{model: good}]".into(),
        good.replace("linear", "best"),
        good.replace("linear", "[]"),
        good.replace("linear", ""),
        good.replace("good", "nowhere/at-all"),
        good.replace("{model: good}", "good: {}"),
        good.replace("{model: good}", "{modle: good}"),
        good.replace("{model: good}", "{model: 3}"),
        good.replace("{model: good}", "{model: ''}"),
        good.replace("1.0", ".nan"),
        good.replace("1.0", ".inf"),
        good.replace("1.0", "heavy"),
        good.replace("1.0", "[]"),
        good.replace("1.0", "[[1]]"),
        good.replace("1.0", "{}"),
        good.replace("1.0", "null"),
        good.replace("weight", "wieght"),
        format!("{good}colour: red\n"),
        format!("{good}dtype: int4\n"),
        format!("{good}dtype: 7\n"),
        format!("{good}merge_method: linear\n"),
        format!("{good}models: []\n"),
        format!("{good}slices: []\n"),
        format!("{good}tokenizer_source: 9\n"),
        format!("{good}chat_template: ''\n"),
        format!("{good}base_model: nowhere/at-all\n"),
        format!("a0: &a0 [1]\n{bomb}{good}"),
        format!("x: *y\n{good}"),
        format!("{}{good}", "x: {".repeat(500)),
        format!("{}1{}\n", "[".repeat(5_000), "]".repeat(5_000)),
        format!("!!python/object:os.system {good}"),
        "%YAML 9.9\n---\n".into(),
        "slices: [{sources: [{model: good, layer_range: [0, 99]}]}]\nmerge_method: passthrough\n".into(),
        "slices: [{sources: [{model: good, layer_range: [5, 1]}]}]\nmerge_method: passthrough\n".into(),
        "slices: [{sources: []}]\nmerge_method: passthrough\n".into(),
        "slices: [{sources: [{model: good, layer_range: [0, 18446744073709551615]}]}]\nmerge_method: passthrough\n"
            .into(),
        "x".repeat(2 << 20),
    ];
    for content in texts {
        let dir = corpus.place();
        fs::write(dir.join("recipe.yml"), &content).unwrap();
        let what: String = content.chars().take(60).collect();
        corpus.refuse_args(&format!("recipe {what:?}"), &[], &dir, &["recipe.yml"]);
    }
    let dir = corpus.place();
    fs::write(dir.join("recipe.yml"), b"models: \xff\xfe").unwrap();
    corpus.refuse_args("not UTF-8", &["recipe.yml"], &dir, &["recipe.yml"]);
    let dir = corpus.place();
    corpus.refuse_args("no such recipe", &["nowhere.yml"], &dir, &["nowhere.yml"]);
    let dir = corpus.place();
    corpus.refuse_args("a directory", &["good"], &dir, &["good"]);
    let dir = corpus.place();
    corpus.refuse_args("a device", &["/dev/zero"], &dir, &["/dev/zero"]);
    corpus.finish(50);
}

// ---- Odd, but valid ------------------------------------------------------------------------------------------------

/// A merge of the checkpoint with itself must give its tensors, bit for bit.
fn accept(what: &str, failures: &mut Vec<String>, make: impl FnOnce(&Path) -> PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let ckpt = make(dir.path());
    let tensors = if ckpt.is_dir()
        && !ckpt.join("only.safetensors").exists()
        && !ckpt.join("x.safetensors.index.json").exists()
    {
        read_checkpoint(&ckpt)
    } else if ckpt.is_file() && ckpt.extension().is_some_and(|e| e == "safetensors") {
        read_file(&ckpt)
    } else {
        let place = if ckpt.is_dir() { &ckpt } else { ckpt.parent().unwrap() };
        let files = fs::read_dir(place).unwrap().map(|entry| entry.unwrap().path());
        files
            .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
            .flat_map(|path| read_file(&path))
            .collect()
    };
    for (flags, out) in [(["--method=linear", "--model"], "linear"), (["--density=0.5", "--base"], "ties")] {
        let out = dir.path().join(out);
        let mut args: Vec<String> = ["merge", "--progress=none", "--out", &text(&out)].map(str::to_owned).to_vec();
        args.extend(flags.iter().map(|flag| (*flag).to_owned()).chain([text(&ckpt), "--model".into(), text(&ckpt)]));
        let ended = run(dir.path(), &args);
        if ended.code != Some(0) {
            failures.push(format!("{what}: {}", ended.stderr));
        } else if read_checkpoint(&out) != tensors {
            failures.push(format!("{what}: other tensors"));
        }
    }
}

fn single(dir: &Path, content: &[u8]) -> PathBuf {
    let ckpt = dir.join("ckpt");
    fs::create_dir_all(&ckpt).unwrap();
    fs::write(ckpt.join("model.safetensors"), content).unwrap();
    ckpt
}

/// A file of these tensors (name, type, shape, bytes), of values that float32 can hold.
fn tensors(list: &[(&str, &str, &str, u64)]) -> Vec<u8> {
    let (mut entries, mut data, mut end) = (Vec::new(), Vec::new(), 0);
    for (name, dtype, shape, bytes) in list {
        entries.push(format!("{}:{}", Value::from(*name), entry(dtype, shape, end, end + bytes)));
        let value = if *dtype == "F64" { 1.5f64.to_le_bytes() } else { [0x3c; 8] };
        data.extend(value.iter().cycle().take(*bytes as usize));
        end += bytes;
    }
    file(&format!("{{{}}}", entries.join(",")), &data)
}

#[test]
fn odd_but_valid_checkpoints_work() {
    let mut failures = Vec::new();
    let mut count = 0;
    let mut odd = |what: &str, content: Vec<u8>| {
        count += 1;
        accept(what, &mut failures, |dir| single(dir, &content));
    };
    for (dtype, bits) in DTYPES {
        let bytes = 6 * bits / 8;
        odd(dtype, tensors(&[("f", "F32", "[2]", 8), ("odd", dtype, "[2,3]", bytes)]));
    }
    let one = entry("F32", "[2]", 0, 8);
    let data = 1f32.to_le_bytes().repeat(2);
    odd("no elements", tensors(&[("a", "F32", "[0]", 0), ("b", "F32", "[3,0,5]", 0), ("c", "F32", "[1]", 4)]));
    odd("nothing but empty tensors", tensors(&[("a", "F32", "[0]", 0)]));
    odd("a scalar", tensors(&[("a", "F32", "[]", 4), ("b", "BF16", "[]", 2)]));
    odd("ones for dimensions", tensors(&[("a", "F16", "[1,1,1,1,2,1]", 4)]));
    odd("64 dimensions", tensors(&[("a", "F32", &format!("[{}2]", "1,".repeat(63)), 8)]));
    odd("data at odd places", file(&format!(r#"{{"a":{one}}} "#), &data));
    odd("padding", file(&format!(r#"{{"a":{one}}}{}"#, " ".repeat(1000)), &data));
    odd("white space", file(&format!("{{\n\t\"a\" :\r\n {one} }}"), &data));
    odd("wide behind narrow", tensors(&[("a", "U8", "[3]", 3), ("b", "F64", "[1]", 8), ("c", "F32", "[1]", 4)]));
    odd("names in another order than data", {
        let entries = format!(r#"{{"a":{},"b":{}}}"#, entry("F32", "[1]", 4, 8), entry("F32", "[1]", 0, 4));
        file(&entries, &data)
    });
    odd(
        "metadata",
        file(&format!(r#"{{"__metadata__":{{"format":"pt","x":"{}"}},"a":{one}}}"#, "y".repeat(10_000)), &data),
    );
    odd("metadata last", file(&format!(r#"{{"a":{one},"__metadata__":{{}}}}"#), &data));
    odd("unknown fields", file(&format!(r#"{{"a":{}}}"#, one.replace("{", r#"{"extra":[1,{"x":null}],"#)), &data));
    for name in [
        "ä.ö",
        "模型.权重",
        "🦙",
        "with space",
        "a/b",
        "a\\b",
        "\"quoted\"",
        "a\nb",
        "\u{1b}[0m",
        ".",
        "..",
        "x,weight=2",
        "__meta__",
        "\u{202e}",
    ] {
        odd(name, tensors(&[(name, "F32", "[2]", 8)]));
    }
    odd("a long name", tensors(&[(&"n".repeat(4096), "F32", "[2]", 8)]));
    odd("escapes in names", file(&format!(r#"{{"\u0061\u00e4\ud83e\udd99":{one}}}"#), &data));
    type Make = fn(&Path) -> PathBuf;
    let mut layouts: Vec<(&str, Make)> = vec![
        ("a file called otherwise", |dir| {
            let ckpt = single(dir, &good_file());
            fs::rename(ckpt.join("model.safetensors"), ckpt.join("only.safetensors")).unwrap();
            ckpt
        }),
        ("a file by its path", |dir| single(dir, &good_file()).join("model.safetensors")),
        ("hidden files beside it", |dir| {
            let ckpt = single(dir, &good_file());
            fs::write(ckpt.join("._model.safetensors"), "resource fork").unwrap();
            fs::write(ckpt.join(".gitattributes"), "").unwrap();
            ckpt
        }),
        ("a linked file", |dir| {
            let ckpt = single(dir, &good_file());
            fs::rename(ckpt.join("model.safetensors"), dir.join("blob")).unwrap();
            symlink("../blob", ckpt.join("model.safetensors")).unwrap();
            ckpt
        }),
        ("a linked directory", |dir| {
            single(dir, &good_file());
            symlink("ckpt", dir.join("link")).unwrap();
            dir.join("link")
        }),
        ("a pickle beside it", |dir| {
            let ckpt = single(dir, &good_file());
            fs::write(ckpt.join("pytorch_model.bin"), "whatever").unwrap();
            ckpt
        }),
    ];
    let shards: Make = |dir| {
        let ckpt = single(dir, &good_file());
        sharded(&ckpt, GOOD_INDEX);
        ckpt
    };
    layouts.push(("shards", shards));
    layouts.push(("an index without metadata", |dir| {
        let ckpt = single(dir, &good_file());
        sharded(&ckpt, r#"{"weight_map":{"a.weight":"one.safetensors","b.weight":"two.safetensors"}}"#);
        ckpt
    }));
    layouts.push(("an index with more in it", |dir| {
        let ckpt = single(dir, &good_file());
        sharded(
            &ckpt,
            &GOOD_INDEX
                .replace(r#"{"total_size":20}"#, r#"{"total_size":20.0,"total_parameters":5,"x":[{}]},"y":null"#),
        );
        ckpt
    }));
    layouts.push(("an index called otherwise", |dir| {
        let ckpt = single(dir, &good_file());
        sharded(&ckpt, GOOD_INDEX);
        fs::rename(ckpt.join(INDEX), ckpt.join("x.safetensors.index.json")).unwrap();
        ckpt
    }));
    layouts.push(("linked shards", |dir| {
        let ckpt = single(dir, &good_file());
        sharded(&ckpt, GOOD_INDEX);
        fs::rename(ckpt.join("one.safetensors"), dir.join("blob")).unwrap();
        symlink(dir.join("blob"), ckpt.join("one.safetensors")).unwrap();
        ckpt
    }));
    layouts.push(("a shard with nothing to merge", |dir| {
        let ckpt = single(dir, &good_file());
        sharded(&ckpt, GOOD_INDEX);
        fs::write(ckpt.join("one.safetensors"), tensors(&[("a.weight", "I64", "[1]", 8)])).unwrap();
        ckpt
    }));
    for (what, make) in layouts {
        count += 1;
        accept(what, &mut failures, make);
    }
    println!("{count} odd checkpoints");
    assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
    assert!(count >= 40);
}

#[test]
fn a_hundred_thousand_tensors_work() {
    let names: Vec<String> = (0..100_000).map(|i| format!("layers.{i}.weight")).collect();
    let list: Vec<(&str, &str, &str, u64)> = names.iter().map(|name| (&**name, "BF16", "[1]", 2)).collect();
    let mut failures = Vec::new();
    accept("100,000 tensors", &mut failures, |dir| single(dir, &tensors(&list)));
    assert!(failures.is_empty(), "{failures:?}");
}
