//! Any bytes as the index of a directory with one valid shard: opening never panics and never leaves the directory.

use tiesmith::Checkpoint;

/// See the file's documentation.
pub fn run(data: &[u8]) {
    let dir = super::place("index");
    let shard = super::file(r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#, &[1, 2]);
    super::write(&dir.join("s.safetensors"), &shard);
    super::write(&dir.join("model.safetensors.index.json"), data);
    match Checkpoint::open(dir.to_str().expect("a temporary path is UTF-8"), &super::storage()) {
        Ok(checkpoint) => {
            assert!(checkpoint.files.iter().all(|file| file.file.path().parent() == Some(&*dir)));
        }
        Err(error) => super::refused(&error),
    }
}
