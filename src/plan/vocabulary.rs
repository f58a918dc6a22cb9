//! One vocabulary for all models: which token is in which row of the output, and in which row of each input.
//!
//! - Tokens are read from `tokenizer.json`; a model without one is taken to have base's vocabulary.
//! - Every embedding and head becomes a view of its rows in the output's order ([`Rows`]); the merge sees tensors of
//!   equal shape and knows nothing of tokens.
//! - A token that a model lacks has, in that model: the row of the only model that has it; else base's row; else the mean
//!   of the rows of the models that have it; zeros if none has.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::assembly::Opened;
use super::layers;
use super::tokens::Tokens;
use crate::checkpoint::rows::{Part, RowSource, Rows, Run};
use crate::checkpoint::{Checkpoint, CheckpointFile, TensorEntry};
use crate::dtype::Float;
use crate::error::{Error, Result, printable};
use crate::recipe::{Recipe, Vocabulary};
use crate::storage::Storage;

/// A token that the model has no row for.
const NONE: u32 = u32::MAX;

/// The tokenizer of an output whose vocabulary was reconciled.
pub struct TokenizerFiles {
    /// The directory that tokenizer files are copied from.
    pub dir: PathBuf,
    /// `tokenizer.json`, if it is another than there.
    pub json: Option<Vec<u8>>,
    /// Number of rows of embeddings and heads.
    pub rows: u64,
    /// Memory that this and the views of rows hold, in bytes.
    pub held_bytes: u64,
}

/// Gives all `checkpoints` the vocabulary that `recipe` asks for. The first of them is base, or the first model.
pub(super) fn reconcile(
    recipe: &Recipe,
    checkpoints: &mut [Checkpoint],
    storage: &dyn Storage,
    warnings: &mut Vec<String>,
) -> Result<Option<TokenizerFiles>> {
    let Some(wanted) = &recipe.vocabulary else { return Ok(None) };
    let mut tokens: Vec<Option<Tokens>> =
        checkpoints.iter().map(|c| Tokens::read(&c.dir, storage)).collect::<Result<_>>()?;
    let source = match wanted {
        Vocabulary::Base | Vocabulary::Union => 0,
        Vocabulary::Model(spec) => checkpoints.iter().position(|c| c.spec == *spec).ok_or_else(|| {
            Error::usage(format!("no model is called \"{}\" to take the tokenizer from", printable(spec)))
        })?,
    };
    if tokens[0].is_none() || tokens[source].is_none() {
        let lacking = if tokens[0].is_none() { &checkpoints[0] } else { &checkpoints[source] };
        let text = format!("no tokenizer.json in {}", printable(&lacking.dir.to_string_lossy()));
        if *wanted == Vocabulary::Base {
            warnings.push(format!("{text}: the vocabulary is left as it is"));
            return Ok(None);
        }
        return Err(Error::input(text).help("save the model's tokenizer in the fast format (tokenizer.json) there"));
    }
    let added = match wanted {
        Vocabulary::Union => union(&mut tokens),
        _ => Vec::new(),
    };
    let ids = &tokens[source].as_ref().expect("it was checked").ids;
    let count = ids.values().max().map_or(0, |&last| last as usize + 1);
    let mut names: Vec<Option<&str>> = vec![None; count];
    ids.iter().for_each(|(name, &id)| names[id as usize] = Some(name));
    let owned: Vec<Vec<u32>> =
        (0..checkpoints.len()).map(|c| old_ids(&names, tokens[c].as_ref().or(tokens[0].as_ref()))).collect();
    let views = views(recipe, checkpoints, &owned, warnings)?;
    let mut held_bytes = 0;
    for (checkpoint, entry, rows) in views {
        held_bytes += rows.held_bytes();
        let checkpoint = &mut checkpoints[checkpoint];
        let file = checkpoint.files.len() as u32;
        checkpoint.tensors[entry] = rows.entry(&checkpoint.tensors[entry], file);
        let header_hash = rows.hash();
        checkpoint.files.push(CheckpointFile { file: Arc::new(rows), header_bytes: 0, header_hash });
    }
    let json = match added.is_empty() {
        true => None,
        false => Some(Tokens::file_with(&checkpoints[source].dir, &added, storage)?),
    };
    // Once in the plan, and once on its way to the output.
    held_bytes += json.as_ref().map_or(0, |json| 2 * json.len() as u64);
    Ok(Some(TokenizerFiles { dir: checkpoints[source].dir.clone(), json, rows: count as u64, held_bytes }))
}

/// Adds to the first vocabulary every token of the others, ordinary ones first; returns them as they are to be written.
fn union(tokens: &mut [Option<Tokens>]) -> Vec<Map<String, Value>> {
    let (first, others) = tokens.split_at_mut(1);
    let Some(base) = &mut first[0] else { return Vec::new() };
    let mut written = Vec::new();
    let mut next = base.ids.values().max().map_or(0, |last| last + 1);
    for special in [false, true] {
        for other in others.iter().flatten() {
            let mut missing: Vec<(&String, u32)> = other
                .ids
                .iter()
                .map(|(name, &id)| (name, id))
                .filter(|(name, _)| !base.ids.contains_key(*name))
                .collect();
            missing.retain(|(name, _)| other.added.contains_key(*name) == special);
            missing.sort_unstable_by_key(|&(_, id)| id);
            for (name, _) in missing {
                let mut definition = other.added.get(name).cloned().unwrap_or_else(|| plain_token(name));
                definition.insert("id".into(), next.into());
                written.push(definition);
                base.ids.insert(name.clone(), next);
                next += 1;
            }
        }
    }
    written
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

/// Per row of the output, the row of a model with the vocabulary `own`. Rows without a token keep their place.
fn old_ids(names: &[Option<&str>], own: Option<&Tokens>) -> Vec<u32> {
    let old = |(row, name): (usize, &Option<&str>)| match (name, own) {
        (Some(name), Some(own)) => own.ids.get(*name).copied().unwrap_or(NONE),
        _ => row as u32,
    };
    names.iter().enumerate().map(old).collect()
}

/// The tensors that change, as (checkpoint, tensor, its rows).
fn views(
    recipe: &Recipe,
    checkpoints: &[Checkpoint],
    owned: &[Vec<u32>],
    warnings: &mut Vec<String>,
) -> Result<Vec<(usize, usize, Rows)>> {
    let opened = Opened { recipe, checkpoints, base: None, first_model: 0 };
    let mut views = Vec::new();
    let mut empty: HashMap<&str, usize> = HashMap::new();
    for (index, checkpoint) in checkpoints.iter().enumerate() {
        for (entry, tensor) in checkpoint.tensors.iter().enumerate() {
            if tensor.shape.len() != 2 || !layers::is_vocabulary(&tensor.name) {
                continue;
            }
            // This tensor in every checkpoint that has it, the one at hand first.
            let others = (0..checkpoints.len()).filter(|&other| other != index);
            let parties: Vec<(usize, &TensorEntry)> = std::iter::once((index, tensor))
                .chain(others.filter_map(|other| Some((other, opened.find(other, &tensor.name)?.1))))
                .collect();
            let parts = parties.iter().map(|&(c, t)| part(&checkpoints[c], t, tensor)).collect::<Result<Vec<_>>>()?;
            let (runs, zeros) = runs(&parties, owned);
            if zeros > 0 {
                empty.insert(&tensor.name, zeros);
            }
            let same =
                matches!(&runs[..], [Run { count, source: RowSource::Rows(0, 0), .. }] if *count == tensor.shape[0]);
            if !same {
                views.push((index, entry, Rows::new(parts, tensor.shape[1], runs)));
            }
        }
    }
    for (name, zeros) in empty {
        warnings.push(format!("\"{}\": {zeros} tokens have a row in no model: zeros", printable(name)));
    }
    Ok(views)
}

fn part(checkpoint: &Checkpoint, tensor: &TensorEntry, like: &TensorEntry) -> Result<Part> {
    let fail = |text: String| Err(Error::input(text).at(checkpoint.path_of(tensor)).tensor(&tensor.name));
    let Some(float) = Float::from_dtype(tensor.dtype) else {
        return fail("a vocabulary of a type that cannot be merged".into());
    };
    if tensor.shape.len() != 2 || tensor.shape[1] != like.shape[1] {
        return fail(format!(
            "shape {:?}, but elsewhere {:?}: vocabularies need equal columns",
            tensor.shape, like.shape
        ));
    }
    Ok(Part { file: Arc::clone(&checkpoint.files[tensor.file as usize].file), offset: tensor.offset, float })
}

/// The rows of the first of `parties`, and how many are zeros for want of a model that has them.
fn runs(parties: &[(usize, &TensorEntry)], owned: &[Vec<u32>]) -> (Vec<Run>, usize) {
    let (mut runs, mut zeros): (Vec<Run>, usize) = (Vec::new(), 0);
    let count = owned.first().map_or(0, Vec::len);
    for (row, source) in (0..count).map(|row| row_source(row, parties, owned)).enumerate() {
        zeros += usize::from(source == RowSource::Zero);
        match (runs.last_mut(), &source) {
            (Some(Run { count, source: RowSource::Rows(part, first), .. }), RowSource::Rows(next, old))
                if part == next && *first + *count == *old =>
            {
                *count += 1;
            }
            (Some(Run { count, source: RowSource::Zero, .. }), RowSource::Zero) => *count += 1,
            _ => runs.push(Run { first: row as u64, count: 1, source }),
        }
    }
    (runs, zeros)
}

/// Where row `row` of the first of `parties` comes from: its own, else another's.
fn row_source(row: usize, parties: &[(usize, &TensorEntry)], owned: &[Vec<u32>]) -> RowSource {
    let of = |&(checkpoint, tensor): &(usize, &TensorEntry)| {
        let old = owned[checkpoint][row];
        (old != NONE && u64::from(old) < tensor.shape[0]).then_some(u64::from(old))
    };
    if let Some(own) = of(&parties[0]) {
        return RowSource::Rows(0, own);
    }
    let mut have: Vec<(u32, u64, bool)> = Vec::new();
    for (part, party) in parties.iter().enumerate() {
        have.extend(of(party).map(|old| (part as u32, old, party.0 == 0)));
    }
    match (&have[..], have.iter().find(|(.., base)| *base)) {
        ([], _) => RowSource::Zero,
        ([(part, old, _)], _) | (_, Some((part, old, _))) => RowSource::Rows(*part, *old),
        _ => RowSource::Mean(have.iter().map(|&(part, old, _)| (part, old)).collect()),
    }
}
