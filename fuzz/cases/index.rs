//! Any bytes as the index of a directory with one valid shard: opening never panics and never leaves the directory.

use tiesmith::Checkpoint;

/// See the file's documentation.
pub fn run(data: &[u8]) {
    let files = super::Files::new("index");
    let shard = super::file(r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#, &[1, 2]);
    files.put("s.safetensors", &shard);
    files.put("model.safetensors.index.json", data);
    match Checkpoint::open(&files.path(""), &files.storage) {
        Ok(checkpoint) => {
            assert!(checkpoint.files.iter().all(|file| file.file.path().parent() == Some(&*files.dir)));
        }
        Err(error) => super::refused(&error),
    }
}
