//! Any bytes as the manifest of a finished output: reading it, planning its recipe and verifying never panic.

use tiesmith::{Manifest, Observer, Plan};

struct Silent;

impl Observer for Silent {}

/// See the file's documentation.
pub fn run(data: &[u8]) {
    let files = super::Files::new("manifest");
    let shard = super::file(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, &[0; 4]);
    files.put("model.safetensors", &shard);
    let path = files.put("tiesmith.json", data);
    let storage = &files.storage;
    // Inputs are looked for in the temporary directory only: other names would read whatever this machine has.
    let text = String::from_utf8_lossy(data);
    let _ = Manifest::is_one(&text);
    match Manifest::read(path.as_ref(), &**storage) {
        Ok(manifest) => {
            let mut recipe = manifest.recipe(&**storage);
            let here = files.path("");
            recipe.base = recipe.base.map(|_| here.clone());
            recipe.sign_from = recipe.sign_from.map(|_| here.clone());
            recipe.models.iter_mut().for_each(|model| model.source = here.clone());
            match Plan::new(&recipe, storage).and_then(|mut plan| manifest.admit(&mut plan)) {
                Ok(()) => {}
                Err(error) => super::refused(&error),
            }
        }
        Err(error) => super::refused(&error),
    }
    if let Err(error) = tiesmith::verify(&files.dir, 1, storage, &Silent) {
        super::refused(&error);
    }
}
