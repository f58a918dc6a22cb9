//! One vocabulary for all models: which token is in which row of the output, and in which row of each input.
//!
//! - Tokens are read from `tokenizer.json`; a model without one is taken to have base's vocabulary.
//! - Every embedding and head becomes a view of its rows in the output's order ([`Rows`]); the merge sees tensors of
//!   equal shape and knows nothing of tokens.
//! - A token that a model lacks has, in that model: the row of the only model that has it; else base's row; else the mean
//!   of the rows of the models that have it; zeros if none has. Rules of the recipe for single tokens come before.
//! - Rows that only fill up to a multiple are the average of all rows before them.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use super::assembly::Opened;
use super::layers;
use super::tokens::Tokens;
use crate::checkpoint::rows::{Part, RowSource, Rows, Run};
use crate::checkpoint::{Checkpoint, CheckpointFile, TensorEntry};
use crate::dtype::Float;
use crate::error::{Error, Result, printable};
use crate::recipe::{Recipe, TokenRule, TokenSource, Vocabulary};
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
    /// Memory that this and the views of rows hold, and that finding them took, in bytes.
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
    let (source, dir) = match wanted {
        Vocabulary::Base | Vocabulary::Union => (0, checkpoints[0].dir.clone()),
        Vocabulary::Model(spec) => match checkpoints.iter().position(|c| c.spec == *spec) {
            Some(source) => (source, checkpoints[source].dir.clone()),
            None => {
                // A tokenizer of its own: it comes behind those of the models.
                let dir = Checkpoint::directory(spec, storage)?;
                tokens.push(Tokens::read(&dir, storage)?);
                (checkpoints.len(), dir)
            }
        },
    };
    if tokens[0].is_none() || tokens[source].is_none() {
        let lacking = if tokens[0].is_none() { &checkpoints[0].dir } else { &dir };
        let text = format!("no tokenizer.json in {}", printable(&lacking.to_string_lossy()));
        if *wanted == Vocabulary::Base && recipe.token_rules.is_empty() && recipe.vocabulary_multiple.is_none() {
            warnings.push(format!("{text}: the vocabulary is left as it is"));
            return Ok(None);
        }
        return Err(Error::input(text).help("save the model's tokenizer in the fast format (tokenizer.json) there"));
    }
    let mut added = match wanted {
        Vocabulary::Union => union(&mut tokens),
        _ => Vec::new(),
    };
    added.extend(recipe.token_rules.iter().filter_map(|rule| {
        let definition = tokens.iter().flatten().find_map(|t| t.added.get(&rule.token)).cloned();
        tokens[source].as_mut()?.add(&rule.token, definition.as_ref())
    }));
    let output = tokens[source].as_ref().expect("it was checked");
    let count = output.ids.values().max().map_or(0, |&last| last as usize + 1);
    let names = output.names(count);
    let of = |checkpoint: usize| tokens[checkpoint].as_ref().or(tokens[0].as_ref());
    let owned = (0..checkpoints.len()).map(|c| old_ids(&names, of(c))).collect();
    let rules = rules(recipe, checkpoints, &output.ids, &of)?;
    let rows = (count as u64).next_multiple_of(recipe.vocabulary_multiple.unwrap_or(1));
    let views = Wanted { owned, rules, rows }.views(recipe, checkpoints, warnings)?;
    let mut held_bytes = Tokens::read_bytes(&tokens, added.len());
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
        false => Some(Tokens::file_with(&dir, &added, storage)?),
    };
    // Once in the plan, and once on its way to the output.
    held_bytes += json.as_ref().map_or(0, |json| 2 * json.len() as u64);
    Ok(Some(TokenizerFiles { dir, json, rows, held_bytes }))
}

/// The checkpoint called `spec`.
fn find(spec: &str, checkpoints: &[Checkpoint]) -> Result<usize> {
    checkpoints
        .iter()
        .position(|c| c.spec == *spec)
        .ok_or_else(|| Error::usage(format!("no model is called \"{}\" to take tokens from", printable(spec))))
}

/// Adds to the first vocabulary every token of the others, ordinary ones first; returns them as they are to be written.
fn union(tokens: &mut [Option<Tokens>]) -> Vec<Map<String, Value>> {
    let (first, others) = tokens.split_at_mut(1);
    let Some(base) = &mut first[0] else { return Vec::new() };
    let mut written = Vec::new();
    for special in [false, true] {
        for other in others.iter().flatten() {
            let mut missing: Vec<(&String, u32)> = other
                .ids
                .iter()
                .map(|(name, &id)| (name, id))
                .filter(|(name, _)| !base.ids.contains_key(*name))
                .collect();
            missing.retain(|(name, _)| other.added.contains_key(*name) == special);
            missing.sort_unstable_by_key(|&(name, id)| (id, name));
            written.extend(missing.iter().filter_map(|(name, _)| base.add(name, other.added.get(*name))));
        }
    }
    written
}

/// Per row of the output, the row of a model with the vocabulary `own`. Rows without a token keep their place.
fn old_ids(names: &[Option<&str>], own: Option<&Tokens>) -> Vec<u32> {
    let old = |(row, name): (usize, &Option<&str>)| match (name, own) {
        (Some(name), Some(own)) => own.own(name).unwrap_or(NONE),
        _ => row as u32,
    };
    names.iter().enumerate().map(old).collect()
}

/// What is asked of one token.
struct Rule {
    /// (model, its row), or `None` for zeros; absent where nothing is said of it.
    source: Option<Option<(usize, u32)>>,
    force: bool,
    /// The token, for messages.
    token: String,
    place: Option<String>,
}

impl Rule {
    fn fail(&self, text: String) -> Error {
        let error = Error::input(format!("token \"{}\": {text}", printable(&self.token)));
        match &self.place {
            Some(place) => error.at(Path::new(place)),
            None => error,
        }
    }
}

/// The recipe's rules for single tokens, by the row of the output.
fn rules<'t>(
    recipe: &Recipe,
    checkpoints: &[Checkpoint],
    ids: &HashMap<String, u32>,
    of: &dyn Fn(usize) -> Option<&'t Tokens>,
) -> Result<HashMap<u32, Rule>> {
    let mut rules = HashMap::new();
    for TokenRule { token, source, force, place } in &recipe.token_rules {
        let mut rule = Rule { source: None, force: *force, token: token.clone(), place: place.clone() };
        let named = |model: &str, token: &str| {
            let checkpoint = find(model, checkpoints)?;
            let id = of(checkpoint).and_then(|tokens| tokens.own(token));
            let absent = || rule.fail(format!("{} has no token \"{}\"", printable(model), printable(token)));
            Ok::<_, Error>(Some((checkpoint, id.ok_or_else(absent)?)))
        };
        rule.source = match source {
            None => None,
            Some(TokenSource::Zero) => Some(None),
            Some(TokenSource::Model(model)) => Some(named(model, token)?),
            Some(TokenSource::Token(model, other)) => Some(named(model, other)?),
            Some(TokenSource::Row(model, id)) => {
                let id = u32::try_from(*id).map_err(|_| rule.fail(format!("there is no row {id}")))?;
                Some(Some((find(model, checkpoints)?, id)))
            }
        };
        rules.insert(ids[token], rule);
    }
    Ok(rules)
}

/// The rows that tensors of vocabularies are to have.
struct Wanted {
    /// Per checkpoint and token of the output, the row that the checkpoint has for it.
    owned: Vec<Vec<u32>>,
    /// By row of the output.
    rules: HashMap<u32, Rule>,
    /// How many rows there are, those without a token included.
    rows: u64,
}

/// A tensor in the checkpoints that have it: (checkpoint, tensor), the one whose rows are sought first.
type Parties<'a> = [(usize, &'a TensorEntry)];

impl Wanted {
    /// The tensors that change, as (checkpoint, tensor, its rows).
    fn views(
        &self,
        recipe: &Recipe,
        checkpoints: &[Checkpoint],
        warnings: &mut Vec<String>,
    ) -> Result<Vec<(usize, usize, Rows)>> {
        let opened = Opened { recipe, checkpoints, base: None, first_model: 0 };
        let mut views = Vec::new();
        let mut empty: BTreeMap<&str, usize> = BTreeMap::new();
        for (index, checkpoint) in checkpoints.iter().enumerate() {
            for (entry, tensor) in checkpoint.tensors.iter().enumerate() {
                if tensor.shape.len() != 2 || !layers::is_vocabulary(&tensor.name) {
                    continue;
                }
                let others = (0..checkpoints.len()).filter(|&other| other != index);
                let parties: Vec<(usize, &TensorEntry)> = std::iter::once((index, tensor))
                    .chain(others.filter_map(|other| Some((other, opened.find(other, &tensor.name)?.1))))
                    .collect();
                let parts =
                    parties.iter().map(|&(c, t)| part(&checkpoints[c], t, tensor)).collect::<Result<Vec<_>>>()?;
                let (runs, zeros) = self.runs(&parties)?;
                if zeros > 0 {
                    empty.insert(&tensor.name, zeros);
                }
                let same = matches!(&runs[..], [Run { count, source: RowSource::Rows(0, 0), .. }] if *count == tensor.shape[0]);
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

    /// The rows of the first of `parties`, and how many are zeros for want of a model that has them.
    fn runs(&self, parties: &Parties<'_>) -> Result<(Vec<Run>, usize)> {
        let (mut runs, mut zeros): (Vec<Run>, usize) = (Vec::new(), 0);
        let count = self.owned.first().map_or(0, Vec::len);
        for row in 0..count {
            let rule = self.rules.get(&(row as u32));
            let source = self.row_source(row, parties, rule)?;
            let asked = rule.is_some_and(|rule| rule.source.is_some());
            zeros += usize::from(source == RowSource::Zero && !asked);
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
        let count = count as u64;
        if self.rows > count {
            runs.push(Run { first: count, count: self.rows - count, source: RowSource::Average });
        }
        Ok((runs, zeros))
    }

    /// Where row `row` of the first of `parties` comes from: its own, else what its rule says, else another's.
    fn row_source(&self, row: usize, parties: &Parties<'_>, rule: Option<&Rule>) -> Result<RowSource> {
        let of = |&(checkpoint, tensor): &(usize, &TensorEntry)| {
            let old = self.owned[checkpoint][row];
            (old != NONE && u64::from(old) < tensor.shape[0]).then_some(u64::from(old))
        };
        if let Some(own) = of(&parties[0]).filter(|_| rule.is_none_or(|rule| !rule.force)) {
            return Ok(RowSource::Rows(0, own));
        }
        match rule.and_then(|rule| Some((rule, rule.source?))) {
            Some((_, None)) => return Ok(RowSource::Zero),
            Some((rule, Some((checkpoint, id)))) => {
                let part = parties.iter().position(|&(c, t)| c == checkpoint && u64::from(id) < t.shape[0]);
                let absent = || rule.fail(format!("\"{}\" has no row {id} there", printable(&parties[0].1.name)));
                return Ok(RowSource::Rows(part.ok_or_else(absent)? as u32, id.into()));
            }
            None => {}
        }
        let mut have: Vec<(usize, u32, u64)> = Vec::new();
        for (part, party) in parties.iter().enumerate() {
            have.extend(of(party).map(|old| (party.0, part as u32, old)));
        }
        // In the order of the checkpoints, so that the mean is the same for all of them.
        have.sort_unstable();
        Ok(match (&have[..], have.iter().find(|(checkpoint, ..)| *checkpoint == 0)) {
            ([], _) => RowSource::Zero,
            ([(_, part, old)], _) | (_, Some((_, part, old))) => RowSource::Rows(*part, *old),
            _ => RowSource::Mean(have.iter().map(|&(_, part, old)| (part, old)).collect()),
        })
    }
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
