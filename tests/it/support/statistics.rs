//! What some methods need of each model besides its weights: made from the model, so that every family has it.

use std::path::{Path, PathBuf};

use safetensors::Dtype;

use super::family::text;
use super::files::{self, Layout, read_checkpoint};
use super::tensor::{Tensor, Tensors};

/// The Fisher information that a model gets here: the magnitude of each of its weights.
pub fn fisher_of(model: &Tensors) -> Tensors {
    let magnitudes = |tensor: &Tensor| {
        let values: Vec<f32> = tensor.f32s().iter().map(|value| value.abs()).collect();
        Tensor::floats(tensor.dtype, &tensor.shape, &values)
    };
    let floats =
        model.iter().filter(|(_, tensor)| !matches!(tensor.dtype, Dtype::I64 | Dtype::I32 | Dtype::U8 | Dtype::BOOL));
    floats.map(|(name, tensor)| (name.clone(), magnitudes(tensor))).collect()
}

/// The Gram matrices that a model gets here, for its matrices: WᵀW and a little on the diagonal, as if its rows had been the
/// inputs.
pub fn gram_of(model: &Tensors) -> Tensors {
    let gram = |tensor: &Tensor| {
        let (rows, n) = (tensor.shape[0], tensor.shape[1]);
        let w = tensor.values();
        let entry = |i: usize, j: usize| (0..rows).map(|k| w[k * n + i] * w[k * n + j]).sum::<f64>();
        let extra = |i: usize, j: usize| if i == j { 0.01 + 0.001 * i as f64 } else { 0.0 };
        let values: Vec<f32> = (0..n * n).map(|at| (entry(at / n, at % n) + extra(at / n, at % n)) as f32).collect();
        Tensor::floats(Dtype::F32, &[n, n], &values)
    };
    let matrices = model.iter().filter(|(_, tensor)| tensor.shape.len() == 2 && tensor.elements() > 0);
    matrices.map(|(name, tensor)| (name.clone(), gram(tensor))).collect()
}

/// The options that give `method` what it needs of the checkpoints at `models`, made beside them.
pub fn args<P: AsRef<Path>>(method: &str, models: &[P]) -> Vec<String> {
    let make: fn(&Tensors) -> Tensors = match method {
        "fisher" => fisher_of,
        "regmean" => gram_of,
        _ => return Vec::new(),
    };
    let option = if method == "fisher" { "--fisher" } else { "--gram" };
    let beside = |model: &P| -> PathBuf {
        let model = model.as_ref();
        let path = model.with_file_name(format!("{}-{method}", model.file_name().unwrap().to_str().unwrap()));
        if !path.exists() {
            files::write_checkpoint(&path, &make(&read_checkpoint(model)), Layout::SINGLE);
        }
        path
    };
    models.iter().flat_map(|model| [option.to_owned(), text(&beside(model))]).collect()
}
