//! A directory with small models in it, where recipes are run.

use std::fs;
use std::path::PathBuf;

use safetensors::Dtype;
use serde_json::json;
use tempfile::TempDir;

use super::files::{Layout, read_checkpoint, write_checkpoint};
use super::random::Random;
use super::run::{Outcome, command, run};
use super::tensor::{Tensor, Tensors};

/// A directory with models in it, where recipes are run.
pub struct Place {
    dir: TempDir,
}

impl Place {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, content: &str) {
        fs::write(self.path(name), content).unwrap();
    }

    /// A model `name` of `layers` layers, its `config.json` and its tensors.
    pub fn model(&self, name: &str, layers: u64, seed: u64) -> Tensors {
        let mut random = Random::new(seed);
        let mut tensors = Tensors::new();
        let mut add = |name: &str, shape: &[usize]| {
            let values: Vec<f32> = (0..shape.iter().product()).map(|_| random.symmetric()).collect();
            tensors.insert(name.into(), Tensor::floats(Dtype::F32, shape, &values));
        };
        add("model.embed_tokens.weight", &[6, 4]);
        for layer in 0..layers {
            for part in ["mlp.up_proj.weight", "self_attn.q_proj.weight"] {
                add(&format!("model.layers.{layer}.{part}"), &[4, 4]);
            }
        }
        add("model.norm.weight", &[4]);
        add("lm_head.weight", &[6, 4]);
        let layer = Tensor::raw(Dtype::I64, &[1], seed.to_le_bytes().to_vec());
        tensors.insert("model.layers.0.positions".into(), layer);
        self.save(name, &tensors, layers);
        tensors
    }

    pub fn save(&self, name: &str, tensors: &Tensors, layers: u64) {
        let dir = self.path(name);
        write_checkpoint(&dir, tensors, Layout::sharded(2, 3));
        let kinds: Vec<String> = (0..layers).map(|layer| format!("kind{layer}")).collect();
        let config = json!({
            "model_type": "fixture", "num_hidden_layers": layers, "layer_types": kinds, "torch_dtype": "float32",
            "vocab_size": 6,
        });
        fs::write(dir.join("config.json"), config.to_string()).unwrap();
    }

    pub fn tiesmith(&self, args: &[&str]) -> Outcome {
        let mut command = command();
        command.current_dir(self.dir.path()).args(args);
        run(command)
    }

    /// Merges as `recipe` says into `out`, which must succeed.
    pub fn merge(&self, recipe: &str, extra: &[&str]) -> Tensors {
        self.write("recipe.yml", recipe);
        let _ = fs::remove_dir_all(self.path("out"));
        let args = [&["merge", "recipe.yml", "--out", "out", "--json", "--progress", "none"], extra].concat();
        self.tiesmith(&args).succeeded();
        read_checkpoint(&self.path("out"))
    }

    /// The one line with which `recipe` is refused; nothing is written.
    pub fn refusal(&self, recipe: &str, extra: &[&str]) -> String {
        let _ = fs::remove_dir_all(self.path("out"));
        self.write("recipe.yml", recipe);
        let outcome = self.tiesmith(&[&["merge", "recipe.yml", "--out", "out"], extra].concat());
        assert!(!self.path("out").exists());
        outcome.refusal().to_owned()
    }
}

/// base + weight · (model − base), in the order of operations of the program.
pub fn moved(base: &Tensor, model: &Tensor, weight: f32) -> Tensor {
    let values: Vec<f32> =
        base.f32s().iter().zip(model.f32s()).map(|(b, m)| (0.0 + weight * (m - b)) * 1.0 + b).collect();
    Tensor::floats(Dtype::F32, &base.shape, &values)
}
