//! PEFT adapters on disk, and models with them merged in by hand.

use std::fs;
use std::path::Path;

use safetensors::Dtype;
use serde_json::{Value, json};

use super::files;
use super::oracle::{Method, Recipe, Scope};
use super::random::Random;
use super::tensor::{Tensor, Tensors};

/// An adapter: its configuration and its tensors, named as PEFT names them.
#[derive(Clone)]
pub struct Adapter {
    pub config: Value,
    pub tensors: Tensors,
}

/// What PEFT puts before a module's name.
pub const PREFIX: &str = "base_model.model.";

/// Merges of every kind that adapters go through.
pub fn recipes() -> Vec<Recipe> {
    let ties = Recipe { density: 0.3, ..Recipe::default() };
    vec![
        ties.clone(),
        Recipe { scope: Scope::Tensor, ..ties.clone() },
        Recipe { method: Method::TaskArithmetic, lambda: 0.5, ..ties.clone() },
        Recipe { method: Method::Linear, ..ties },
    ]
}

impl Adapter {
    /// LoRA without modules.
    pub fn lora(rank: usize, alpha: f64) -> Self {
        let config = json!({
            "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["weight"], "bias": "none",
            "task_type": "CAUSAL_LM", "base_model_name_or_path": "somewhere/base", "inference_mode": true,
        });
        Self { config, tensors: Tensors::new() }
    }

    /// (IA)³ with random vectors for modules of so many outputs.
    pub fn ia3(random: &mut Random, modules: &[(&str, usize)]) -> Self {
        let config = json!({"peft_type": "IA3", "target_modules": ["a", "b"], "feedforward_modules": []});
        let vector = |&(module, outputs): &(&str, usize)| {
            let values: Vec<f32> = (0..outputs).map(|_| 1.0 + 0.1 * random.heavy_tailed()).collect();
            (format!("{PREFIX}{module}.ia3_l"), Tensor::floats(Dtype::F32, &[outputs, 1], &values))
        };
        Self { config, tensors: modules.iter().map(vector).collect() }
    }

    /// Adds random factors for a layer of these inputs and outputs.
    pub fn with(mut self, random: &mut Random, module: &str, (inputs, outputs): (usize, usize), dtype: Dtype) -> Self {
        let rank = self.config["r"].as_u64().expect("a LoRA adapter") as usize;
        let mut draw = |n: usize| (0..n).map(|_| 0.3 * random.symmetric()).collect::<Vec<f32>>();
        let (a, b) = (draw(rank * inputs), draw(outputs * rank));
        let named = |end: &str| format!("{PREFIX}{module}.{end}.weight");
        self.tensors.insert(named("lora_A"), Tensor::floats(dtype, &[rank, inputs], &a));
        self.tensors.insert(named("lora_B"), Tensor::floats(dtype, &[outputs, rank], &b));
        self
    }

    /// Writes it into `dir`.
    pub fn write(&self, dir: &Path) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("adapter_config.json"), self.config.to_string()).unwrap();
        files::write_file(&dir.join("adapter_model.safetensors"), &self.tensors.iter().collect::<Vec<_>>());
    }

    /// Reads it from `dir`.
    pub fn read(dir: &Path) -> Self {
        let config = files::read_json(&dir.join("adapter_config.json"));
        Self { config, tensors: files::read_file(&dir.join("adapter_model.safetensors")) }
    }

    /// s B A of a module, in f32, summed up in the order of the rank: [outputs, inputs].
    pub fn change(&self, module: &str, scale: f32) -> (usize, usize, Vec<f32>) {
        let part = |end: &str| &self.tensors[&format!("{PREFIX}{module}.{end}.weight")];
        let (a, b) = (part("lora_A"), part("lora_B"));
        let (rank, inputs, outputs) = (a.shape[0], a.shape[1], b.shape[0]);
        let (a, b) = (a.f32s(), b.f32s());
        let entry = |i: usize, j: usize| {
            let terms = (0..rank).map(|k| b[i * rank + k] * a[k * inputs + j]);
            terms.fold(0f32, |sum, term| sum + term) * scale
        };
        let all = (0..outputs).flat_map(|i| (0..inputs).map(move |j| (i, j))).map(|(i, j)| entry(i, j)).collect();
        (outputs, inputs, all)
    }

    /// `model` with every LoRA module merged in, in f32.
    pub fn merged_into(&self, model: &Tensors) -> Tensors {
        let scale = self.config["lora_alpha"].as_f64().unwrap() / self.config["r"].as_f64().unwrap();
        let mut merged = model.clone();
        for name in self.tensors.keys().filter_map(|name| name.strip_suffix(".lora_A.weight")) {
            let module = &name[PREFIX.len()..];
            let (outputs, inputs, change) = self.change(module, scale as f32);
            let weight = merged.get_mut(&format!("{module}.weight")).expect("the module's weight");
            let values: Vec<f32> = weight.f32s().iter().zip(change).map(|(w, d)| d + w).collect();
            *weight = Tensor::floats(Dtype::F32, &[outputs, inputs], &values);
        }
        merged
    }
}
