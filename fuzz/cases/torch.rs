//! Any bytes as a PyTorch file: opening never panics, and every tensor that it finds lies within the file.

use tiesmith::Checkpoint;

/// See the file's documentation.
pub fn run(data: &[u8]) {
    let files = super::Files::new("torch");
    match Checkpoint::open(&files.put("pytorch_model.bin", data), &files.storage) {
        Ok(checkpoint) => {
            assert!(checkpoint.tensors.iter().all(|t| t.offset + t.bytes <= data.len() as u64));
        }
        Err(error) => super::refused(&error),
    }
}
