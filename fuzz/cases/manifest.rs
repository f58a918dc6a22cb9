//! Any bytes as the manifest of a finished output: reading it, planning its recipe and verifying never panic.

use tiesmith::{Manifest, Observer, Plan};

struct Silent;

impl Observer for Silent {}

/// See the file's documentation.
pub fn run(data: &[u8]) {
    let dir = super::place("manifest");
    let path = dir.join("tiesmith.json");
    let shard = super::file(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, &[0; 4]);
    super::write(&dir.join("model.safetensors"), &shard);
    super::write(&path, data);
    let storage = super::storage();
    // Inputs are looked for in the temporary directory only: other names would read whatever this machine has.
    let text = String::from_utf8_lossy(data);
    let _ = Manifest::is_one(&text);
    match Manifest::read(&path, &*storage) {
        Ok(manifest) => {
            let mut recipe = manifest.recipe(&*storage);
            let here = dir.to_str().expect("a temporary path is UTF-8");
            recipe.base = recipe.base.map(|_| here.to_owned());
            recipe.sign_from = recipe.sign_from.map(|_| here.to_owned());
            recipe.models.iter_mut().for_each(|model| model.source = here.to_owned());
            match Plan::new(&recipe, &storage).and_then(|mut plan| manifest.admit(&mut plan)) {
                Ok(()) => {}
                Err(error) => super::refused(&error),
            }
        }
        Err(error) => super::refused(&error),
    }
    if let Err(error) = tiesmith::verify(&dir, 1, &storage, &Silent) {
        super::refused(&error);
    }
}
