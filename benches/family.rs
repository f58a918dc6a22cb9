//! A Llama-shaped family of bf16 checkpoints: a base and its fine-tunes, a pure function of shape and model number.
//!
//! - Weights are about normal; fine-tunes add heavy-tailed deltas whose scale differs between tensors, and leave one
//!   element in ten exactly as it was (rounding to bf16 leaves many more).
//! - Each checkpoint has [`SHARDS`] shards and its own order of tensors, as if saved by different programs.
//! - Every element is a hash of its position, so that threads write shards independently.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Shards of each checkpoint.
const SHARDS: usize = 5;
/// Elements generated at once: 1 MiB of bf16.
const BLOCK: u64 = 1 << 19;
/// Standard deviation of a matrix's weights.
const WEIGHT_SCALE: f32 = 0.02;
/// Scale of the deltas before their tail is applied.
const DELTA_SCALE: f32 = 3e-4;
/// Of 256 elements, how many a fine-tune leaves alone.
const UNTOUCHED: u64 = 26;

/// Sizes of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub layers: u64,
    pub hidden: u64,
    pub intermediate: u64,
    pub vocabulary: u64,
    pub key_value: u64,
}

impl Shape {
    /// About 1.5 billion parameters.
    pub const FULL: Self = Self { layers: 32, hidden: 2048, intermediate: 5632, vocabulary: 32_000, key_value: 256 };
    /// About 30 million parameters.
    pub const SMALL: Self = Self { layers: 8, hidden: 512, intermediate: 1408, vocabulary: 8_000, key_value: 128 };

    /// The same widths with one `divisor`-th of the layers and of the vocabulary: that share of the parameters.
    pub fn divided(self, divisor: u64) -> Self {
        Self { layers: self.layers / divisor, vocabulary: self.vocabulary / divisor, ..self }
    }

    /// Name and shape of every tensor.
    fn tensors(self) -> Vec<(String, Vec<u64>)> {
        let Self { layers, hidden, intermediate, vocabulary, key_value } = self;
        let mut tensors = vec![
            ("model.embed_tokens.weight".to_string(), vec![vocabulary, hidden]),
            ("model.norm.weight".to_string(), vec![hidden]),
            ("lm_head.weight".to_string(), vec![vocabulary, hidden]),
        ];
        for layer in 0..layers {
            let parts = [
                ("self_attn.q_proj", vec![hidden, hidden]),
                ("self_attn.k_proj", vec![key_value, hidden]),
                ("self_attn.v_proj", vec![key_value, hidden]),
                ("self_attn.o_proj", vec![hidden, hidden]),
                ("mlp.gate_proj", vec![intermediate, hidden]),
                ("mlp.up_proj", vec![intermediate, hidden]),
                ("mlp.down_proj", vec![hidden, intermediate]),
                ("input_layernorm", vec![hidden]),
                ("post_attention_layernorm", vec![hidden]),
            ];
            tensors.extend(parts.map(|(part, shape)| (format!("model.layers.{layer}.{part}.weight"), shape)));
        }
        tensors
    }

    /// Parameters of one checkpoint.
    pub fn elements(self) -> u64 {
        self.tensors().iter().map(|(_, shape)| shape.iter().product::<u64>()).sum()
    }
}

/// Where the checkpoints of a family are: the base first.
pub fn checkpoints(dir: &Path, models: usize) -> Vec<PathBuf> {
    let model = |number| if number == 0 { "base".to_string() } else { format!("model-{number}") };
    (0..=models).map(|number| dir.join(model(number))).collect()
}

/// Writes the base and `models` fine-tunes under `dir` with two threads.
pub fn write(dir: &Path, shape: Shape, models: usize) -> io::Result<()> {
    let mut shards = Vec::new();
    for (number, checkpoint) in checkpoints(dir, models).into_iter().enumerate() {
        fs::create_dir_all(&checkpoint)?;
        shards.extend(layout(&checkpoint, shape, number as u64)?);
    }
    let next = AtomicUsize::new(0);
    let work = || -> io::Result<()> {
        let mut buffer = Vec::with_capacity(2 * BLOCK as usize);
        while let Some(shard) = shards.get(next.fetch_add(1, Ordering::Relaxed)) {
            shard.write(&mut buffer)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads = [scope.spawn(work), scope.spawn(work)];
        threads.into_iter().try_for_each(|thread| thread.join().expect("a writer does not panic"))
    })
}

/// One file to write.
struct Shard {
    path: PathBuf,
    tensors: Vec<(String, Vec<u64>)>,
    model: u64,
}

/// Deals the tensors of checkpoint `model` out to shards and writes its index and config.
fn layout(checkpoint: &Path, shape: Shape, model: u64) -> io::Result<Vec<Shard>> {
    let mut tensors = shape.tensors();
    tensors.sort_by_key(|(name, _)| mix(hash(name) ^ mix(model)));
    let target = shape.elements().div_ceil(SHARDS as u64);
    let mut shards: Vec<Shard> = (1..=SHARDS)
        .map(|n| Shard {
            path: checkpoint.join(format!("model-{n:05}-of-{SHARDS:05}.safetensors")),
            tensors: Vec::new(),
            model,
        })
        .collect();
    let mut before = 0;
    let mut map = Vec::new();
    for (name, dims) in tensors {
        let shard = &mut shards[(before / target) as usize];
        before += dims.iter().product::<u64>();
        map.push(format!("{name:?}: {:?}", shard.path.file_name().expect("a shard has a name")));
        shard.tensors.push((name, dims));
    }
    let total = 2 * shape.elements();
    let index = format!("{{\"metadata\": {{\"total_size\": {total}}}, \"weight_map\": {{{}}}}}", map.join(", "));
    fs::write(checkpoint.join("model.safetensors.index.json"), index)?;
    fs::write(checkpoint.join("config.json"), "{\"model_type\": \"llama\", \"torch_dtype\": \"bfloat16\"}")?;
    Ok(shards)
}

impl Shard {
    fn write(&self, buffer: &mut Vec<u8>) -> io::Result<()> {
        let mut file = File::create(&self.path)?;
        file.write_all(&header(self.tensors.iter().map(|(name, shape)| (name.as_str(), shape.as_slice()))))?;
        for (name, shape) in &self.tensors {
            let count: u64 = shape.iter().product();
            let values = Values::of(name, shape.len() == 1, self.model);
            for start in (0..count).step_by(BLOCK as usize) {
                buffer.clear();
                values.extend(buffer, start..(start + BLOCK).min(count));
                file.write_all(buffer)?;
            }
        }
        Ok(())
    }
}

/// The safetensors header of bf16 tensors that lie in this order, with its length in front.
pub fn header<'a>(tensors: impl Iterator<Item = (&'a str, &'a [u64])>) -> Vec<u8> {
    let mut text = String::from("{\"__metadata__\":{\"format\":\"pt\"}");
    let mut begin = 0;
    for (name, shape) in tensors {
        let end = begin + 2 * shape.iter().product::<u64>();
        text += &format!(",{name:?}:{{\"dtype\":\"BF16\",\"shape\":{shape:?},\"data_offsets\":[{begin},{end}]}}");
        begin = end;
    }
    text.push('}');
    // Data begins at a multiple of 8 bytes.
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// The elements of one tensor of one checkpoint.
pub struct Values {
    base_key: u64,
    delta_key: u64,
    center: f32,
    delta: f32,
    /// Tail of the deltas: (1 / u)^0.4 at 256 quantiles.
    tail: [f32; 256],
}

impl Values {
    /// Tensor `name` of the base (0) or of a model.
    pub fn of(name: &str, is_norm: bool, model: u64) -> Self {
        let base_key = hash(name);
        let spread = 0.5 + (base_key >> 40) as f32 / (1 << 24) as f32;
        Self {
            base_key,
            delta_key: mix(base_key ^ mix(model)),
            center: if is_norm { 1.0 } else { 0.0 },
            delta: if model == 0 { 0.0 } else { DELTA_SCALE * spread },
            tail: std::array::from_fn(|i| (256.0 / (i as f32 + 0.5)).powf(0.4)),
        }
    }

    /// Appends the bytes of elements `range`.
    pub fn extend(&self, buffer: &mut Vec<u8>, range: Range<u64>) {
        buffer.extend(range.flat_map(|index| self.at(index).to_le_bytes()));
    }

    /// Element `index` as bf16.
    fn at(&self, index: u64) -> u16 {
        /// Standard deviation of one uniform 16-bit number.
        const UNIFORM: f32 = 18_918.6;
        let parts = |bits: u64| [bits & 0xffff, bits >> 16 & 0xffff, bits >> 32 & 0xffff, bits >> 48];
        let step = index.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let weight = parts(mix(self.base_key.wrapping_add(step)));
        let normal = (weight.iter().sum::<u64>() as f32 - 4.0 * 32_767.5) / (2.0 * UNIFORM);
        let base = round(self.center + normal * WEIGHT_SCALE);
        if self.delta == 0.0 {
            return base;
        }
        let [choice, drawn @ ..] = parts(mix(self.delta_key.wrapping_add(step)));
        if choice >> 8 < UNTOUCHED {
            return base;
        }
        let normal = (drawn.iter().sum::<u64>() as f32 - 3.0 * 32_767.5) / (3.0f32.sqrt() * UNIFORM);
        round(f32::from_bits(u32::from(base) << 16) + self.delta * normal * self.tail[(choice & 0xff) as usize])
    }
}

/// Rounds to the nearest bf16.
fn round(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// The finaliser of splitmix64.
fn mix(mut state: u64) -> u64 {
    state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}

fn hash(name: &str) -> u64 {
    name.bytes().fold(0x7469_6573, |hash, byte| mix(hash ^ u64::from(byte)))
}
