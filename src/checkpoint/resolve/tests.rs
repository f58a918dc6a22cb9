//! Every form of naming a checkpoint, and every refusal with its advice.

use super::super::testing::{disk, file_of, index_of, write};
use super::*;
use crate::checkpoint::Checkpoint;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const OTHER: &str = "0123fff789abcdef0123456789abcdef01234567";

fn no_env(_: &str) -> Option<OsString> {
    None
}

/// Resolves `name` under a directory of `files`.
fn resolve_in(files: &[(&str, &[u8])], name: &str) -> (Result<Found>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), files);
    let spec = dir.path().join(name);
    (resolve(spec.to_str().unwrap(), &*disk(), &no_env), dir)
}

/// The file that is opened among empty files of these `names`.
fn opened(names: &[&str]) -> String {
    let files: Vec<(&str, &[u8])> = names.iter().map(|name| (*name, &b""[..])).collect();
    let (found, dir) = resolve_in(&files, "");
    let found = found.unwrap();
    assert_eq!((found.hub, found.warnings), (None, Vec::new()));
    assert_eq!(found.dir, dir.path().join(""));
    let (Source::File(path) | Source::Index(path) | Source::Packed(path)) = found.source else { panic!("an adapter") };
    path.file_name().unwrap().to_str().unwrap().to_owned()
}

fn refused(names: &[&str], name: &str, parts: &[&str]) {
    let files: Vec<(&str, &[u8])> = names.iter().map(|name| (*name, &b""[..])).collect();
    let (found, dir) = resolve_in(&files, name);
    let error = found.expect_err(&format!("{names:?} accepted"));
    let text = error.to_string();
    assert_eq!(error.exit_code(), 2, "{text}");
    assert!(text.starts_with(dir.path().to_str().unwrap()), "{text}");
    for part in parts {
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    }
}

#[test]
fn in_a_directory_the_usual_names_come_first() {
    let shard = "model-00001-of-00002.safetensors";
    assert_eq!(opened(&["model.safetensors"]), "model.safetensors");
    assert_eq!(opened(&["weights.safetensors", ".hidden.safetensors"]), "weights.safetensors");
    assert_eq!(opened(&["consolidated.safetensors", "model.safetensors"]), "model.safetensors");
    assert_eq!(opened(&["model-00001-of-00001.safetensors"]), "model-00001-of-00001.safetensors");
    assert_eq!(opened(&[shard, "model.safetensors.index.json", "model.safetensors"]), "model.safetensors.index.json");
    assert_eq!(opened(&[shard, "x.safetensors.index.json"]), "x.safetensors.index.json");
    assert_eq!(opened(&["a.safetensors.index.json", "model.safetensors.index.json"]), "model.safetensors.index.json");
    assert_eq!(opened(&["model.safetensors", "adapter_config.json"]), "model.safetensors");
    assert_eq!(opened(&["model.safetensors", "pytorch_model.bin"]), "model.safetensors");
    assert_eq!(opened(&["weights.safetensors", "pytorch_model.bin.index.json"]), "weights.safetensors");
    assert_eq!(opened(&["training_args.bin", "pytorch_model.bin", "config.json"]), "pytorch_model.bin");
    assert_eq!(
        opened(&["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"]),
        "pytorch_model.bin.index.json"
    );
    assert_eq!(opened(&["x.tvz"]), "x.tvz");
    assert_eq!(opened(&["model.safetensors", "x.tvz"]), "model.safetensors");
}

#[test]
fn an_unclear_directory_is_refused_with_advice() {
    refused(
        &["a.safetensors.index.json", "b.safetensors.index.json"],
        "",
        &["2 index files: a.safetensors.index.json, b.safetensors.index.json", "name the one"],
    );
    refused(
        &["b.safetensors", "a.safetensors"],
        "",
        &["2 safetensors files and no index: a.safetensors, b.safetensors"],
    );
    refused(&["model-00001-of-00003.safetensors"], "", &["1 of 3 shards and no index", "complete the download"]);
    refused(&["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"], "", &["2 of 3 shards"]);
    refused(&["adapter_model.safetensors"], "", &["a PEFT adapter without its adapter_config.json"]);
    refused(
        &["config.json", "training_args.bin"],
        "",
        &["training_args.bin: a PyTorch file of another name", "name it"],
    );
    refused(
        &["pytorch_model-00001-of-00002.bin"],
        "",
        &["1 of 2 shards and no index (pytorch_model.bin.index.json)", "complete the download"],
    );
    refused(&["q4.gguf"], "", &["q4.gguf: a GGUF file", "original"]);
    refused(&["config.json"], "", &["no safetensors file or index"]);
    refused(&["x/empty"], "x", &["no safetensors file or index"]);
    let many: Vec<String> = (0..9).map(|i| format!("{i}.safetensors")).collect();
    let many: Vec<&str> = many.iter().map(|name| &**name).collect();
    refused(&many, "", &["9 safetensors files", "3.safetensors, ..."]);
}

#[test]
fn adapters_are_told_from_models() {
    for names in
        [&["adapter_config.json", "adapter_model.safetensors"][..], &["adapter_config.json", "adapter_model.bin"]]
    {
        let files: Vec<(&str, &[u8])> = names.iter().map(|&name| (name, &b""[..])).collect();
        let (found, dir) = resolve_in(&files, "");
        let found = found.unwrap();
        assert_eq!((found.dir, found.source), (dir.path().join(""), Source::Adapter));
    }
}

#[test]
fn files_are_taken_by_name() {
    let (found, dir) = resolve_in(&[("m.safetensors", b"")], "m.safetensors");
    let found = found.unwrap();
    assert_eq!((&*found.dir, found.source), (dir.path(), Source::File(dir.path().join("m.safetensors"))));
    let (found, dir) = resolve_in(&[("x.index.json", b"")], "x.index.json");
    assert_eq!(found.unwrap().source, Source::Index(dir.path().join("x.index.json")));
    let (found, _dir) = resolve_in(&[("m-00002-of-00003.safetensors", b"")], "m-00002-of-00003.safetensors");
    assert_eq!(found.unwrap().warnings, ["m-00002-of-00003.safetensors is shard 2 of 3: only its tensors are used"]);
    let (found, dir) = resolve_in(&[("model.bin", b"")], "model.bin");
    assert_eq!(found.unwrap().source, Source::File(dir.path().join("model.bin")));
    refused(&["model.gguf"], "model.gguf", &["a GGUF file, not safetensors"]);
    refused(&["config.json"], "config.json", &["not a .safetensors, .bin, .index.json or .tvz file"]);
    refused(&[], "none.safetensors", &["no such file or directory"]);
    assert!(resolve("", &*disk(), &no_env).is_err());
    assert!(resolve("a\0b", &*disk(), &no_env).is_err());
}

#[test]
fn hub_ids_are_told_from_paths() {
    let id = |spec| HubId::parse(spec).map(|HubId { id, revision }| (id, revision));
    assert_eq!(id("org/name"), Some(("org/name", None)));
    assert_eq!(id("meta-llama/Llama-3.2_1B@v1.0"), Some(("meta-llama/Llama-3.2_1B", Some("v1.0"))));
    assert_eq!(id("org/name@refs/pr/1"), Some(("org/name", Some("refs/pr/1"))));
    for spec in [
        "name",
        "/org/name",
        "./name",
        "../name",
        "a/b/c",
        "org/",
        "/name",
        "org/x.safetensors",
        "org/x.index.json",
        "org/na me",
        "org/name@",
        "org/name@../../x",
        "org/name@/abs",
        "org/..",
        "~/name",
        "org\\name/x",
    ] {
        assert_eq!(id(spec), None, "{spec}");
    }
}

#[test]
fn the_cache_is_where_the_hub_client_has_it() {
    let at = |pairs: &[(&str, &str)]| {
        hub_cache(&|name| pairs.iter().find(|(n, _)| *n == name).map(|(_, value)| OsString::from(value)))
    };
    let all = [
        ("HF_HUB_CACHE", "/1"),
        ("HUGGINGFACE_HUB_CACHE", "/2"),
        ("HF_HOME", "/3"),
        ("XDG_CACHE_HOME", "/4"),
        ("HOME", "/5"),
    ];
    let expected = ["/1", "/2", "/3/hub", "/4/huggingface/hub", "/5/.cache/huggingface/hub"];
    for (skipped, expected) in expected.iter().enumerate() {
        assert_eq!(at(&all[skipped..]), Some(PathBuf::from(expected)));
    }
    assert_eq!(at(&[]), None);
    assert_eq!(at(&[("HF_HOME", "~/hf"), ("HOME", "/h")]), Some("/h/hf/hub".into()));
    assert_eq!(at(&[("HF_HUB_CACHE", ""), ("HF_HOME", "/3")]), Some("/3/hub".into()));
}

/// A cache of `org/name` with these `files` under its directory; resolves `spec` with it.
fn resolve_cached(files: &[(&str, &[u8])], spec: &str) -> (Result<Found>, tempfile::TempDir) {
    let cache = tempfile::tempdir().unwrap();
    let root = cache.path().join("models--org--name");
    write(&root, files);
    let env = |name: &str| (name == "HF_HUB_CACHE").then(|| cache.path().as_os_str().to_owned());
    (resolve(spec, &*disk(), &env), cache)
}

fn cached_commit(files: &[(&str, &[u8])], spec: &str) -> String {
    let (found, cache) = resolve_cached(files, spec);
    let found = found.unwrap_or_else(|e| panic!("{spec}: {e}"));
    let HubRef { id, commit } = found.hub.unwrap();
    assert_eq!(id, "org/name");
    assert_eq!(found.dir, cache.path().join("models--org--name/snapshots").join(&commit));
    commit
}

fn cache_refused(files: &[(&str, &[u8])], spec: &str, parts: &[&str]) {
    let (found, _cache) = resolve_cached(files, spec);
    let error = found.expect_err(&format!("{spec} accepted"));
    let text = error.to_string();
    assert_eq!(error.exit_code(), 2, "{text}");
    for part in parts {
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    }
}

#[test]
fn revisions_are_found_in_the_cache() {
    let one = format!("snapshots/{COMMIT}/model.safetensors");
    let two = format!("snapshots/{OTHER}/model.safetensors");
    let reference = format!("{OTHER}\n");
    let files: [(&str, &[u8]); 5] = [
        (&one, b""),
        (&two, b""),
        ("refs/main", COMMIT.as_bytes()),
        ("refs/v1", reference.as_bytes()),
        ("refs/refs/pr/1", OTHER.as_bytes()),
    ];
    assert_eq!(cached_commit(&files, "org/name"), COMMIT);
    assert_eq!(cached_commit(&files, "org/name@main"), COMMIT);
    assert_eq!(cached_commit(&files, "org/name@v1"), OTHER);
    assert_eq!(cached_commit(&files, "org/name@refs/pr/1"), OTHER);
    assert_eq!(cached_commit(&files, &format!("org/name@{OTHER}")), OTHER);
    assert_eq!(cached_commit(&files, "org/name@01234"), COMMIT);
    cache_refused(&files, "org/name@0123", &["revision 0123 is ambiguous", COMMIT, OTHER, "more digits"]);
    cache_refused(&files, "org/name@v2", &["revision v2 is not in the cache", "hf download org/name --revision v2"]);
    cache_refused(&files[..2], "org/name", &["2 snapshots, and none is called main", COMMIT, "org/name@commit"]);
    cache_refused(&files[..2], "org/name@main", &["revision main is not in the cache"]);
    assert_eq!(cached_commit(&files[..1], "org/name"), COMMIT);
}

#[test]
fn what_is_not_in_the_cache_can_be_downloaded() {
    let none: [(&str, &[u8]); 1] = [("refs/main", COMMIT.as_bytes())];
    cache_refused(&none, "org/name", &["which is not in the cache", "hf download org/name"]);
    cache_refused(&none, "org/name@abc", &["no snapshot in the cache", "hf download org/name"]);
    cache_refused(
        &none,
        "other/name",
        &[
            "other/name: no such file or directory, and not in the Hub cache /",
            "hf download other/name",
            "huggingface-cli download other/name",
        ],
    );
    let partial = format!("snapshots/{COMMIT}/config.json");
    cache_refused(&[(&partial, b"")], "org/name", &["no safetensors file or index", "complete the download"]);
    cache_refused(&[("refs/main", b"../../../x"), (&partial, b"")], "org/name", &["is not a commit"]);
    let text = resolve("org/name", &*disk(), &no_env).unwrap_err().to_string();
    assert!(text.contains("no home directory"), "{text}");
}

#[test]
fn a_directory_wins_over_a_hub_id() {
    // Any relative path of two plain parts is spelt like a Hub id; `src/checkpoint` is one in this crate.
    let snapshot = format!("snapshots/{COMMIT}/model.safetensors");
    let cache = tempfile::tempdir().unwrap();
    write(&cache.path().join("models--src--checkpoint"), &[(&snapshot, b"")]);
    let env = |name: &str| (name == "HF_HUB_CACHE").then(|| cache.path().as_os_str().to_owned());
    let text = resolve("src/checkpoint", &*disk(), &env).unwrap_err().to_string();
    assert!(text.starts_with("src/checkpoint: no safetensors file"), "{text}");
}

#[test]
#[cfg(unix)]
fn links_into_the_blobs_of_a_cache_work() {
    let dir = tempfile::tempdir().unwrap();
    let blob = "blobs/4d7a";
    let index = index_of(&[("w", "model-00001-of-00001.safetensors")]);
    write(
        dir.path(),
        &[(blob, &file_of(&[("w", 4)])), ("blobs/9c", index.as_bytes()), ("snapshots/c/config.json", b"")],
    );
    let snapshot = dir.path().join("snapshots/c");
    std::os::unix::fs::symlink("../../blobs/4d7a", snapshot.join("model-00001-of-00001.safetensors")).unwrap();
    std::os::unix::fs::symlink("../../blobs/9c", snapshot.join("model.safetensors.index.json")).unwrap();
    let checkpoint = Checkpoint::open(snapshot.to_str().unwrap(), &disk()).unwrap();
    assert_eq!((checkpoint.tensors.len(), checkpoint.get("w").unwrap().bytes), (1, 4));
    assert_eq!(checkpoint.get("v"), None);

    std::fs::remove_file(dir.path().join(blob)).unwrap();
    let text = Checkpoint::open(snapshot.to_str().unwrap(), &disk()).err().unwrap().to_string();
    assert!(text.contains("model-00001-of-00001.safetensors: a link to a file that is not there"), "{text}");
}

#[test]
fn a_single_file_is_opened_with_its_warnings() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &[("m-00001-of-00002.safetensors", &file_of(&[("b", 1), ("a", 2)]))]);
    let path = dir.path().join("m-00001-of-00002.safetensors");
    let checkpoint = Checkpoint::open(path.to_str().unwrap(), &disk()).unwrap();
    assert_eq!(checkpoint.dir, dir.path());
    assert_eq!(checkpoint.warnings.len(), 1);
    assert_eq!(checkpoint.tensors.iter().map(|t| &*t.name).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(checkpoint.path_of(&checkpoint.tensors[0]), path);
}
