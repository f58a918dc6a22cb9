//! Any bytes as the configuration of an adapter, and as its weights: opening never panics, reading stays in bounds.
//!
//! The bytes up to the first NUL are `adapter_config.json`; what follows, if anything does, is `adapter_model.safetensors`.

use std::sync::LazyLock;

use tiesmith::Checkpoint;

/// A file of f32 tensors filled with one number.
fn floats(tensors: &[(&str, &[usize])]) -> Vec<u8> {
    let (mut members, mut end) = (Vec::new(), 0);
    for (name, shape) in tensors {
        let begin = end;
        end += 4 * shape.iter().product::<usize>();
        members.push(format!(r#""{name}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[{begin},{end}]}}"#));
    }
    let header = format!("{{{}}}", members.join(","));
    let data: Vec<u8> = std::iter::repeat_n(0.5f32.to_le_bytes(), end / 4).flatten().collect();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

static MODEL: LazyLock<Vec<u8>> =
    LazyLock::new(|| floats(&[("w.weight", &[4, 6]), ("w.bias", &[4]), ("e.weight", &[9, 4])]));
static WEIGHTS: LazyLock<Vec<u8>> =
    LazyLock::new(|| floats(&[("base_model.model.w.lora_A.weight", &[2, 6]), ("w.lora_B.weight", &[4, 2])]));

/// See the file's documentation.
pub fn run(data: &[u8]) {
    let files = super::Files::new("adapter");
    files.put("model/model.safetensors", &MODEL);
    let (config, weights) = match data.iter().position(|&byte| byte == 0) {
        Some(end) => (&data[..end], &data[end + 1..]),
        None => (data, &WEIGHTS[..]),
    };
    files.put("adapter/adapter_config.json", config);
    files.put("adapter/adapter_model.safetensors", weights);
    match Checkpoint::open(&format!("{}+{}", files.path("model"), files.path("adapter")), &files.storage) {
        Ok(checkpoint) => {
            for tensor in checkpoint.tensors.iter().filter(|tensor| tensor.bytes < 1 << 20) {
                let mut bytes = vec![0; tensor.bytes as usize];
                checkpoint.files[tensor.file as usize].file.read_at(&mut bytes, tensor.offset).expect("it can be read");
            }
        }
        Err(error) => super::refused(&error),
    }
}
