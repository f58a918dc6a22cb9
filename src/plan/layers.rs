//! Layers, as far as names and `config.json` tell: no list of architectures.
//!
//! - A layer's number is the first component of a name that is a number and has others around it:
//!   `model.layers.12.mlp.up_proj.weight` is in layer 12 of the stack `model.layers`.
//! - A stack is as deep as `config.json` says, if it says so and that many layers are there (a checkpoint may store further
//!   ones, for prediction heads), else as its numbers go.
//! - A tensor outside the stacks belongs to the input side if its name says that it embeds, else to the output side.

use std::collections::BTreeMap;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result, printable};
use crate::limits::MAX_CONFIG_BYTES;
use crate::storage::Storage;

/// Keys of `config.json` for the number of layers.
pub const LAYER_COUNT_KEYS: &[&str] =
    &["num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "num_encoder_layers"];
/// Components that name what turns tokens or positions into vectors.
const INPUT_SIDE: &[&str] = &["embed", "wte", "wpe", "tok_", "shared"];
/// Components that name what turns vectors into tokens.
const HEADS: &[&str] = &["lm_head", "embed_out", "output_projection"];

/// `name` at its layer number: the stack before it, the number, and what follows, dots excluded.
pub fn split(name: &str) -> Option<(&str, u64, &str)> {
    let mut from = 0;
    while let Some(dot) = name[from..].find('.').map(|at| from + at) {
        let rest = &name[dot + 1..];
        let end = rest.find('.')?;
        let digits = &rest[..end];
        if dot > 0 && !digits.is_empty() && digits.len() <= 9 && digits.bytes().all(|b| b.is_ascii_digit()) {
            return Some((&name[..dot], digits.parse().ok()?, &rest[end + 1..]));
        }
        from = dot + 1;
    }
    None
}

/// The name of `rest` in layer `index` of `stack`.
pub(super) fn join(stack: &str, index: u64, rest: &str) -> String {
    format!("{stack}.{index}.{rest}")
}

/// Whether a tensor outside the layers turns vectors into tokens.
pub(super) fn is_head(name: &str) -> bool {
    HEADS.iter().any(|word| name.contains(word)) && split(name).is_none()
}

/// Whether a tensor outside the layers belongs to the input side.
pub(super) fn is_input_side(name: &str) -> bool {
    !is_head(name) && INPUT_SIDE.iter().any(|word| name.contains(word)) && split(name).is_none()
}

/// Whether a tensor, if it has two dimensions, has a row per token.
pub(super) fn is_vocabulary(name: &str) -> bool {
    let positional = ["wpe", "pos", "type", "norm"].iter().any(|word| name.to_ascii_lowercase().contains(word));
    is_head(name) || (is_input_side(name) && !positional)
}

/// The layers of one checkpoint.
#[derive(Debug, Clone, Default)]
pub(super) struct Stacks {
    /// Number of layers of each stack.
    depth: BTreeMap<String, u64>,
    /// The one that slices are about, if it is clear which.
    main: Option<String>,
}

impl Stacks {
    /// Reads those names of `checkpoint` that are `wanted`, and its `config.json`, if it has one.
    pub(super) fn of(checkpoint: &Checkpoint, storage: &dyn Storage, wanted: &dyn Fn(&str) -> bool) -> Result<Self> {
        let mut depth: BTreeMap<String, u64> = BTreeMap::new();
        for tensor in checkpoint.tensors.iter().filter(|tensor| wanted(&tensor.name)) {
            if let Some((stack, index, _)) = split(&tensor.name) {
                match depth.get_mut(stack) {
                    Some(count) => *count = (*count).max(index + 1),
                    None => drop(depth.insert(stack.to_owned(), index + 1)),
                }
            }
        }
        Ok(Self::new(depth, &configured_counts(checkpoint, storage)?))
    }

    fn new(mut depth: BTreeMap<String, u64>, configured: &[u64]) -> Self {
        let mut named: Vec<(String, u64)> = Vec::new();
        for (stack, count) in &depth {
            // Layers beyond the configured ones are extras; fewer than configured are an incomplete file.
            if let Some(&count) = configured.iter().find(|&&c| c <= *count && *count <= c + 1) {
                named.push((stack.clone(), count));
            }
        }
        let main = match (&named[..], depth.len()) {
            ([(only, _)], _) => Some(only.clone()),
            ([], 1) => depth.keys().next().cloned(),
            _ => None,
        };
        if let [(stack, count)] = &named[..] {
            depth.insert(stack.clone(), *count);
        }
        Self { depth, main }
    }

    /// Where a tensor of this name lies between the first layer (0) and the last (1); 0 outside the layers.
    pub(super) fn place(&self, name: &str) -> f64 {
        match split(name).and_then(|(stack, index, _)| Some((index, *self.depth.get(stack)?))) {
            Some((_, ..=1)) => 1.0,
            Some((index, count)) => (index as f64 / (count - 1) as f64).min(1.0),
            None => 0.0,
        }
    }

    /// The stack that slices are about, and its depth.
    pub(super) fn main(&self, checkpoint: &Checkpoint) -> Result<(&str, u64)> {
        let Some(main) = &self.main else {
            let listed = |(stack, count): (&String, &u64)| format!("\"{}\" ({count})", printable(stack));
            let stacks: Vec<_> = self.depth.iter().take(4).map(listed).collect();
            let text = match stacks.is_empty() {
                true => "no tensor name has a layer number, so there are no layers to take".to_string(),
                false => format!("it is not clear which of these are the layers: {}", stacks.join(", ")),
            };
            return Err(Error::input(text)
                .at(&checkpoint.dir)
                .help("slices need one stack of layers as deep as num_hidden_layers in config.json"));
        };
        Ok((main, self.depth[main]))
    }
}

/// Every number of layers that `config.json` mentions, in nested objects too (`text_config`).
fn configured_counts(checkpoint: &Checkpoint, storage: &dyn Storage) -> Result<Vec<u64>> {
    let path = checkpoint.dir.join("config.json");
    if !storage.is_there(&path)? {
        return Ok(Vec::new());
    }
    let content = storage.read_small(&path, MAX_CONFIG_BYTES).map_err(Error::as_input)?;
    let Ok(config) = super::python_json::read(&content) else { return Ok(Vec::new()) };
    let nested = config.as_object().into_iter().flat_map(|object| object.values());
    let objects = std::iter::once(&config).chain(nested);
    Ok(objects.flat_map(|o| LAYER_COUNT_KEYS.iter().filter_map(|key| o.get(key)?.as_u64())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_split_at_their_first_number() {
        assert_eq!(split("model.layers.12.mlp.experts.3.w1"), Some(("model.layers", 12, "mlp.experts.3.w1")));
        assert_eq!(split("h.0.attn.bias"), Some(("h", 0, "attn.bias")));
        for name in ["lm_head.weight", "0.weight", "a.0", "model.layers.x.b", "a.1234567890.b", "", ".", "..", "a..b"] {
            assert_eq!(split(name), None, "{name}");
        }
        assert_eq!(join("model.layers", 3, "mlp.w"), "model.layers.3.mlp.w");
    }

    #[test]
    fn names_tell_the_side() {
        for name in ["model.embed_tokens.weight", "transformer.wte.weight", "wpe.weight", "shared.weight"] {
            assert!(is_input_side(name) && !is_head(name), "{name}");
        }
        for name in ["lm_head.weight", "embed_out.weight", "model.norm.weight", "model.layers.0.embed.weight"] {
            assert!(!is_input_side(name), "{name}");
        }
        assert!(is_head("lm_head.weight") && is_head("embed_out.weight") && !is_head("model.norm.weight"));
    }

    #[test]
    fn a_stack_is_as_deep_as_configured_and_the_main_one_is_found() {
        let stacks = |depths: &[(&str, u64)], configured: &[u64]| {
            Stacks::new(depths.iter().map(|&(s, n)| (s.to_string(), n)).collect(), configured)
        };
        // One layer more than configured: a prediction head's.
        let model = stacks(&[("model.layers", 5)], &[4]);
        assert_eq!((model.main.as_deref(), model.depth["model.layers"]), (Some("model.layers"), 4));
        assert_eq!([0u64, 1, 3, 4].map(|i| model.place(&format!("model.layers.{i}.w"))), [0.0, 1.0 / 3.0, 1.0, 1.0]);
        assert_eq!(model.place("lm_head.weight"), 0.0);
        assert_eq!(stacks(&[("h", 1)], &[]).place("h.0.w"), 1.0);
        let both = stacks(&[("language_model.layers", 8), ("vision.blocks", 3)], &[8]);
        assert_eq!(both.main.as_deref(), Some("language_model.layers"));
        assert_eq!(both.place("vision.blocks.1.w"), 0.5);
        assert_eq!(stacks(&[("encoder.block", 4), ("decoder.block", 4)], &[4]).main, None);
    }
}
