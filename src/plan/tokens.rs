//! `tokenizer.json`: its tokens and their numbers, and the same file with tokens added.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::limits::MAX_SIDE_FILE_BYTES;
use crate::storage::Storage;

const NAME: &str = "tokenizer.json";
/// How far a token's number may go beyond the number of tokens.
const MAX_GAP: u64 = 100_000;

/// The tokens of one model.
pub(super) struct Tokens {
    /// Every token's number, added ones included.
    pub ids: HashMap<String, u32>,
    /// Added tokens as they are defined.
    pub added: HashMap<String, Map<String, Value>>,
    /// Numbers from here on were given by [`Tokens::add`]: the model has no rows for them.
    known: u32,
    /// The next number.
    next: u32,
    /// Length of the file.
    file_bytes: u64,
}

#[derive(Deserialize)]
struct File {
    model: Model,
    #[serde(default)]
    added_tokens: Vec<Map<String, Value>>,
}

#[derive(Deserialize)]
struct Model {
    #[serde(default)]
    vocab: Vocab,
}

/// A mapping from tokens to numbers, or a list of tokens with their scores.
#[derive(Default)]
struct Vocab(HashMap<String, u64>);

impl<'de> Deserialize<'de> for Vocab {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = Vocab;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a vocabulary")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vocab, A::Error> {
                let mut ids = HashMap::new();
                while let Some((token, id)) = map.next_entry()? {
                    ids.insert(token, id);
                }
                Ok(Vocab(ids))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vocab, A::Error> {
                let mut ids = HashMap::new();
                while let Some((token, IgnoredAny)) = list.next_element::<(String, IgnoredAny)>()? {
                    let id = ids.len() as u64;
                    ids.entry(token).or_insert(id);
                }
                Ok(Vocab(ids))
            }
        }
        deserializer.deserialize_any(Read)
    }
}

impl Tokens {
    /// The tokens of the model in `dir`, if it has a `tokenizer.json`.
    pub(super) fn read(dir: &Path, storage: &dyn Storage) -> Result<Option<Self>> {
        let path = dir.join(NAME);
        if !storage.is_there(&path)? {
            return Ok(None);
        }
        let text = storage.read_small(&path, MAX_SIDE_FILE_BYTES).map_err(Error::as_input)?;
        let file: File = serde_json::from_slice(&text).map_err(|e| unreadable(&path, &e.to_string()))?;
        let mut all = file.model.vocab.0;
        let mut added = HashMap::new();
        for token in file.added_tokens {
            let (Some(name), Some(id)) =
                (token.get("content").and_then(Value::as_str), token.get("id").and_then(Value::as_u64))
            else {
                return Err(unreadable(&path, "an added token without content or id"));
            };
            all.insert(name.to_owned(), id);
            added.insert(name.to_owned(), token);
        }
        // Numbers may have gaps, but what is made of them grows with the largest.
        let most = all.len() as u64 + MAX_GAP;
        let small = |(name, id): (String, u64)| match id < most {
            true => Ok((name, id as u32)),
            false => Err(unreadable(
                &path,
                &format!("a token has the number {id}, but there are only {} tokens", most - MAX_GAP),
            )),
        };
        let ids: HashMap<String, u32> = all.into_iter().map(small).collect::<Result<_>>()?;
        let known = ids.values().max().map_or(0, |last| last + 1);
        Ok(Some(Self { ids, added, known, next: known, file_bytes: text.len() as u64 }))
    }

    /// The number that the model has for `token`.
    pub(super) fn own(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied().filter(|&id| id < self.known)
    }

    /// The tokens by their numbers, which are below `count`. Of several with one number, it belongs to an added one, as loaders
    /// put these above the vocabulary, and else to the first by name.
    pub(super) fn names(&self, count: usize) -> Vec<Option<&str>> {
        let mut names: Vec<Option<&str>> = vec![None; count];
        let is_plain = |name: &str| !self.added.contains_key(name);
        for (name, &id) in &self.ids {
            let slot = &mut names[id as usize];
            if slot.is_none_or(|other| (is_plain(name), name.as_str()) < (is_plain(other), other)) {
                *slot = Some(name);
            }
        }
        names
    }

    /// Adds a token with the next number, unless it is there; returns its definition, to be written.
    pub(super) fn add(&mut self, token: &str, definition: Option<&Map<String, Value>>) -> Option<Map<String, Value>> {
        if self.ids.contains_key(token) {
            return None;
        }
        let mut definition = definition.cloned().unwrap_or_else(|| plain_token(token));
        definition.insert("id".into(), self.next.into());
        self.ids.insert(token.to_owned(), self.next);
        self.next += 1;
        Some(definition)
    }

    /// Memory that all of `tokens` took while they were read and joined, and `written` of them added to a file, in bytes.
    pub(super) fn read_bytes(tokens: &[Option<Self>], written: usize) -> u64 {
        // A name, its number, and a map that may be half empty; in lists of rows besides.
        const TOKEN_BYTES: u64 = 160;
        // A definition as JSON, and again in the file that is made of it.
        const ADDED_BYTES: u64 = 4_000;
        // The text, and what is parsed of it, are held for one file at a time.
        let longest = tokens.iter().flatten().map(|tokens| 3 * tokens.file_bytes).max().unwrap_or(0);
        tokens.iter().flatten().map(|tokens| tokens.ids.len() as u64 * TOKEN_BYTES).sum::<u64>()
            + written as u64 * ADDED_BYTES
            + longest
    }

    /// The `tokenizer.json` in `dir` with `added` appended to its added tokens; all else stays as it is.
    pub(super) fn file_with(dir: &Path, added: &[Map<String, Value>], storage: &dyn Storage) -> Result<Vec<u8>> {
        let path = dir.join(NAME);
        let text = storage.read_small(&path, MAX_SIDE_FILE_BYTES).map_err(Error::as_input)?;
        let text = String::from_utf8(text).map_err(|_| unreadable(&path, "not UTF-8"))?;
        // Merges and vocabularies of many megabytes are passed on as text. The order of keys is kept.
        let fields: Vec<(String, &RawValue)> =
            serde_json::from_str::<Fields<'_>>(&text).map_err(|e| unreadable(&path, &e.to_string()))?.0;
        let mut out = String::with_capacity(text.len() + added.len() * 128);
        for (key, value) in &fields {
            out.push_str(if out.is_empty() { "{" } else { "," });
            out.push_str(&Value::from(key.as_str()).to_string());
            out.push(':');
            if key != "added_tokens" {
                out.push_str(value.get());
                continue;
            }
            let mut tokens: Vec<Value> =
                serde_json::from_str(value.get()).map_err(|e| unreadable(&path, &e.to_string()))?;
            tokens.extend(added.iter().cloned().map(Value::Object));
            out.push_str(&Value::Array(tokens).to_string());
        }
        if !fields.iter().any(|(key, _)| key == "added_tokens") {
            let tokens = Value::Array(added.iter().cloned().map(Value::Object).collect());
            out.push_str(&format!(",\"added_tokens\":{tokens}"));
        }
        out.push('}');
        Ok(out.into_bytes())
    }
}

/// How a token of another model's vocabulary is added: as transformers adds a plain string.
fn plain_token(name: &str) -> Map<String, Value> {
    let mut token = Map::new();
    token.insert("id".into(), 0.into());
    token.insert("content".into(), name.into());
    for (key, value) in
        [("single_word", false), ("lstrip", false), ("rstrip", false), ("normalized", true), ("special", false)]
    {
        token.insert(key.into(), value.into());
    }
    token
}

/// The fields of an object, in order, not read any further.
struct Fields<'a>(Vec<(String, &'a RawValue)>);

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
                let mut fields = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    fields.push(entry);
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(Read)
    }
}

fn unreadable(path: &Path, why: &str) -> Error {
    Error::input(format!("not a tokenizer that can be read: {why}")).at(path)
}
