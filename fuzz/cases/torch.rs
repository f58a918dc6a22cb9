//! Any bytes as a PyTorch file: opening never panics, and every tensor that it finds lies within the file.

use tiesmith::Checkpoint;

/// See the file's documentation.
pub fn run(data: &[u8]) {
    let path = super::place("torch").join("pytorch_model.bin");
    super::write(&path, data);
    match Checkpoint::open(path.to_str().expect("a temporary path is UTF-8"), &super::storage()) {
        Ok(checkpoint) => {
            assert!(checkpoint.tensors.iter().all(|t| t.offset + t.bytes <= data.len() as u64));
        }
        Err(error) => super::refused(&error),
    }
}
