//! `tokenizer_source` and `tokenizer`: which vocabulary the output has, and the rows of single tokens.

use super::models::model_ref;
use super::node::{Content, Node};
use super::reader::{Fields, Reader};
use crate::error::{Result, printable};
use crate::recipe::{Recipe, TokenRule, TokenSource, Vocabulary};

/// Largest accepted `pad_to_multiple_of`: powers of two up to some thousand are in use.
const MAX_MULTIPLE: u64 = 65_536;

/// Reads what a document's `fields` say about it into `recipe`, whose models are known.
pub(super) fn read(reader: Reader<'_>, fields: &Fields<'_>, recipe: &mut Recipe) -> Result<()> {
    match (fields.get("tokenizer_source"), fields.get("tokenizer")) {
        (Some(_), Some(second)) => Err(reader.fail(second.place, "both 'tokenizer_source' and 'tokenizer': give one")),
        (Some(source), None) => {
            recipe.vocabulary = Some(vocabulary(reader, source, recipe)?);
            Ok(())
        }
        (None, Some(node)) => section(reader, node, recipe),
        (None, None) => Ok(()),
    }
}

/// The mapping `tokenizer`.
fn section(reader: Reader<'_>, node: &Node, recipe: &mut Recipe) -> Result<()> {
    let fields = reader.fields(node, "tokenizer", &["source", "tokens", "pad_to_multiple_of"])?;
    recipe.vocabulary = Some(match fields.get("source") {
        Some(source) => vocabulary(reader, source, recipe)?,
        None => Vocabulary::Union,
    });
    if let Some(node) = fields.get("pad_to_multiple_of") {
        let multiple = reader.whole(node, "pad_to_multiple_of")?;
        if !(1..=MAX_MULTIPLE).contains(&multiple) {
            let text = format!("pad_to_multiple_of is {multiple}, but must lie between 1 and {MAX_MULTIPLE}");
            return Err(reader.fail(node.place, text));
        }
        recipe.vocabulary_multiple = Some(multiple);
    }
    if let Some(tokens) = fields.get("tokens") {
        for (token, node) in reader.map(tokens, "tokens")?.iter() {
            let (source, force) = rule(reader, node, recipe)?;
            let place = Some(reader.spot(token.place));
            recipe.token_rules.push(TokenRule { token: token.text.clone(), source, force, place });
        }
    }
    Ok(())
}

/// The name of a model of the recipe, or base: a token's row must be among their rows.
fn model(reader: Reader<'_>, node: &Node, recipe: &Recipe) -> Result<String> {
    let name = model_ref(reader, node, "token source")?;
    match recipe.base.as_ref() == Some(&name) || recipe.models.iter().any(|input| input.source == name) {
        true => Ok(name),
        false => {
            let text = format!("the token source \"{}\" is none of the models", printable(&name));
            Err(reader.fail(node.place, text).help("name a model of this recipe"))
        }
    }
}

fn vocabulary(reader: Reader<'_>, node: &Node, recipe: &Recipe) -> Result<Vocabulary> {
    Ok(match node.text() {
        Some("union") => Vocabulary::Union,
        Some("base") => Vocabulary::Base,
        _ => match model_ref(reader, node, "tokenizer source")? {
            name if recipe.base.as_ref() == Some(&name) => Vocabulary::Base,
            name => Vocabulary::Model(name),
        },
    })
}

/// What is asked of one token: where its row is from, and whether for all models.
fn rule(reader: Reader<'_>, node: &Node, recipe: &Recipe) -> Result<(Option<TokenSource>, bool)> {
    if node.is_null() {
        return Ok((None, false));
    }
    let fields = reader.fields(node, "a token", &["source", "force"])?;
    let force = match fields.get("force") {
        Some(node) => node.boolean().ok_or_else(|| reader.fail(node.place, "force must be true or false"))?,
        None => false,
    };
    let source = fields.get("source").map(|node| token_source(reader, node, recipe)).transpose()?;
    Ok((source, force))
}

fn token_source(reader: Reader<'_>, node: &Node, recipe: &Recipe) -> Result<TokenSource> {
    let has_kind = matches!(&node.content, Content::Map(entries) if entries.iter().any(|(key, _)| key.text == "kind"));
    if !has_kind {
        return Ok(TokenSource::Model(model(reader, node, recipe)?));
    }
    let fields = reader.fields(node, "a token source", &["kind", "model", "token", "token_id"])?;
    let kind = fields.get("kind").ok_or_else(|| reader.fail(node.place, "a token source without its 'kind'"))?;
    if reader.word(kind, "kind", &[("zero", true), ("model_token", false)])? {
        return match fields.iter().find(|(key, value)| key.text != "kind" && !value.is_null()) {
            Some((key, _)) => Err(reader.fail(key.place, format!("{} with kind zero", key.text))),
            None => Ok(TokenSource::Zero),
        };
    }
    let Some(name) = fields.get("model") else {
        return Err(reader.fail(node.place, "a token source without 'model'"));
    };
    let name = model(reader, name, recipe)?;
    match (fields.get("token"), fields.get("token_id")) {
        (Some(token), None) => Ok(TokenSource::Token(name, reader.text(token, "token")?.to_owned())),
        (None, Some(id)) => Ok(TokenSource::Row(name, reader.whole(id, "token_id")?)),
        _ => Err(reader.fail(node.place, "a token source needs 'token' or 'token_id', and not both")),
    }
}
