//! Any bytes as a safetensors file: opening never panics, and whatever the reference refuses is refused.

use tiesmith::Checkpoint;

/// See the file's documentation.
pub fn run(data: &[u8]) {
    let files = super::Files::new("header");
    let ours = Checkpoint::open(&files.put("model.safetensors", data), &files.storage);
    if let Err(error) = &ours {
        super::refused(error);
    }
    let reference = safetensors::SafeTensors::deserialize(data);
    assert!(reference.is_ok() || ours.is_err(), "accepted what the reference refuses: {:?}", reference.err());
}
