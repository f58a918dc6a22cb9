//! Any bytes as a safetensors file: opening never panics, and whatever the reference refuses is refused.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use tiesmith::{Checkpoint, Disk, IoMode, Storage};

fuzz_target!(|data: &[u8]| {
    let path = std::env::temp_dir().join(format!("tiesmith-fuzz-header-{}.safetensors", std::process::id()));
    std::fs::write(&path, data).expect("the temporary directory can be written to");
    let storage: Arc<dyn Storage> = Arc::new(Disk::new(IoMode::Read));
    let ours = Checkpoint::open(path.to_str().expect("a temporary path is UTF-8"), &storage);
    if let Err(error) = &ours {
        assert_eq!(error.exit_code(), 2, "{error}");
        assert!(!error.to_string().contains('\n'));
    }
    let reference = safetensors::SafeTensors::deserialize(data);
    assert!(reference.is_ok() || ours.is_err(), "accepted what the reference refuses: {:?}", reference.err());
});
