//! Any bytes as the index of a directory with one valid shard: opening never panics and never leaves the directory.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use tiesmith::{Checkpoint, Disk, IoMode, Storage};

/// A file with one tensor `a` of two bytes.
fn shard() -> Vec<u8> {
    let json = r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#;
    [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &[1, 2]].concat()
}

fuzz_target!(|data: &[u8]| {
    let dir = std::env::temp_dir().join(format!("tiesmith-fuzz-index-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("the temporary directory can be written to");
    std::fs::write(dir.join("s.safetensors"), shard()).expect("the temporary directory can be written to");
    std::fs::write(dir.join("model.safetensors.index.json"), data).expect("the temporary directory can be written to");
    let storage: Arc<dyn Storage> = Arc::new(Disk::new(IoMode::Read));
    match Checkpoint::open(dir.to_str().expect("a temporary path is UTF-8"), &storage) {
        Ok(checkpoint) => {
            assert!(checkpoint.files.iter().all(|file| file.file.path().parent() == Some(&*dir)));
        }
        Err(error) => assert_eq!(error.exit_code(), 2, "{error}"),
    }
});
