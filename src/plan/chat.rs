//! The chat template of the output, where the recipe asks for another than what comes with the tokenizer's files.

use std::path::Path;

use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::limits::{MAX_CONFIG_BYTES, MAX_SIDE_FILE_BYTES};
use crate::recipe::{ChatTemplate, Recipe};
use crate::storage::Storage;

/// The template's text: as given, or the one that most inputs have, the first of them where several are as common.
pub(super) fn template(
    recipe: &Recipe,
    checkpoints: &[Checkpoint],
    storage: &dyn Storage,
    warnings: &mut Vec<String>,
) -> Result<Option<String>> {
    match &recipe.chat_template {
        None => return Ok(None),
        Some(ChatTemplate::Text(text)) => return Ok(Some(text.clone())),
        Some(ChatTemplate::Auto) => {}
    }
    let mut counts: Vec<(String, usize)> = Vec::new();
    for checkpoint in checkpoints {
        let Some(text) = stored(&checkpoint.dir, storage)? else { continue };
        match counts.iter_mut().find(|(known, _)| *known == text) {
            Some((_, count)) => *count += 1,
            None => counts.push((text, 1)),
        }
    }
    let most = counts.iter().map(|(_, count)| *count).max();
    let chosen = counts.into_iter().find(|(_, count)| Some(*count) == most).map(|(text, _)| text);
    if chosen.is_none() {
        warnings.push("chat_template auto: no input has a chat template".into());
    }
    Ok(chosen)
}

/// The template in `dir`: in a file of its own, or in the tokenizer's configuration.
fn stored(dir: &Path, storage: &dyn Storage) -> Result<Option<String>> {
    let own = dir.join("chat_template.jinja");
    if storage.is_there(&own)? {
        let text = storage.read_small(&own, MAX_SIDE_FILE_BYTES).map_err(Error::as_input)?;
        return Ok(Some(String::from_utf8_lossy(&text).into_owned()));
    }
    let path = dir.join("tokenizer_config.json");
    if !storage.is_there(&path)? {
        return Ok(None);
    }
    let text = storage.read_small(&path, MAX_CONFIG_BYTES).map_err(Error::as_input)?;
    let config: Value =
        serde_json::from_slice(&text).map_err(|e| Error::input(format!("not valid JSON: {e}")).at(&path))?;
    // Several templates are a list of names and texts.
    let named = |list: &Value| {
        let default = list.as_array()?.iter().find(|entry| entry["name"] == "default")?;
        default["template"].as_str().map(str::to_owned)
    };
    let template = &config["chat_template"];
    Ok(template.as_str().map(str::to_owned).or_else(|| named(template)))
}
