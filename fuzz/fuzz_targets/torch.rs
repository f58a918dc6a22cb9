//! Any bytes as a PyTorch file: opening never panics, and every tensor that it finds lies within the file.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use tiesmith::{Checkpoint, Disk, IoMode, Storage};

fuzz_target!(|data: &[u8]| {
    let path = std::env::temp_dir().join(format!("tiesmith-fuzz-torch-{}.bin", std::process::id()));
    std::fs::write(&path, data).expect("the temporary directory can be written to");
    let storage: Arc<dyn Storage> = Arc::new(Disk::new(IoMode::Read));
    match Checkpoint::open(path.to_str().expect("a temporary path is UTF-8"), &storage) {
        Ok(checkpoint) => {
            assert!(checkpoint.tensors.iter().all(|t| t.offset + t.bytes <= data.len() as u64));
        }
        Err(error) => {
            assert_eq!(error.exit_code(), 2, "{error}");
            assert!(!error.to_string().contains('\n'));
        }
    }
});
