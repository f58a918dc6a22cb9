//! Any bytes as a safetensors file: opening never panics, and whatever the reference refuses is refused.

use tiesmith::Checkpoint;

/// See the file's documentation.
pub fn run(data: &[u8]) {
    let path = super::place("header").join("model.safetensors");
    super::write(&path, data);
    let ours = Checkpoint::open(path.to_str().expect("a temporary path is UTF-8"), &super::storage());
    if let Err(error) = &ours {
        super::refused(error);
    }
    let reference = safetensors::SafeTensors::deserialize(data);
    assert!(reference.is_ok() || ours.is_err(), "accepted what the reference refuses: {:?}", reference.err());
}
