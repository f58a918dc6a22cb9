//! mergekit's recipe files, read into [`Recipe`]s: the only place that knows that mergekit exists.
//!
//! - What such a file says means what it means to mergekit 0.1.4: one threshold per tensor, ties at it kept by position,
//!   election by weighted mass with + for sums of zero, a division by the weights of what agrees where `normalize` says so.
//!   Arithmetic is in float32 whatever `dtype` says; `dtype` and `out_dtype` choose the type of the output.
//! - mergekit takes no notice of keys that it does not know; here they are errors, with file, line, column and the key
//!   that was most likely meant.
//! - Further keys: `scope`, `threshold`, `trim_ties` and `seed` beside `merge_method`; `elect`, `combine` and `zero_sum`
//!   there or among `parameters`; a filter with `*`, `?` or `[` is a glob of the whole tensor name.

mod document;
mod models;
mod modules;
mod node;
mod reader;
mod settings;
mod templates;
#[cfg(test)]
mod tests;
mod tokenizer;

use std::collections::HashMap;

use super::Recipe;
use crate::error::{Result, printable};
use crate::limits::MAX_RECIPE_DOCUMENTS;
use reader::Reader;

/// One document of a recipe file.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    /// Its name, by which other documents can use its output as a model.
    pub name: Option<String>,
    /// What it asks for.
    pub recipe: Recipe,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// Where each checkpoint is first named, as `file:line:column`.
    pub places: HashMap<String, String>,
}

/// Reads the text of a recipe file called `file`. Documents come in an order in which each finds its inputs made.
pub fn parse(text: &str, file: &str) -> Result<Vec<Document>> {
    let reader = Reader { file };
    let nodes = node::documents(text, &|place, message| reader.fail(place, message))?;
    let begin = node::Place { line: 1, column: 1 };
    if nodes.is_empty() {
        return Err(reader.fail(begin, "an empty recipe").help("it begins with merge_method: NAME"));
    }
    if nodes.len() > MAX_RECIPE_DOCUMENTS {
        let count = nodes.len();
        return Err(reader.fail(begin, format!("{count} documents, but at most {MAX_RECIPE_DOCUMENTS} are supported")));
    }
    let alone = nodes.len() == 1;
    let mut documents = Vec::with_capacity(nodes.len());
    let mut names: HashMap<String, usize> = HashMap::new();
    for node in &nodes {
        let document = document::read(reader, node)?;
        let at = node.place;
        match document.name.clone() {
            Some(name) if names.contains_key(&name) => {
                return Err(reader.fail(at, format!("two documents are called \"{}\"", printable(&name))));
            }
            Some(name) => drop(names.insert(name, documents.len())),
            None if documents.iter().any(|d: &Document| d.name.is_none()) => {
                return Err(reader
                    .fail(at, "a second document without a name")
                    .help("give every document but the last one a 'name:'"));
            }
            None => {}
        }
        documents.push(document);
    }
    if alone {
        return Ok(documents);
    }
    let order = in_order(reader, &documents, &names, &|index| nodes[index].place)?;
    let mut documents: Vec<Option<Document>> = documents.into_iter().map(Some).collect();
    Ok(order.into_iter().filter_map(|index| documents[index].take()).collect())
}

/// The indexes of `documents`, each after those whose outputs it uses.
fn in_order(
    reader: Reader<'_>,
    documents: &[Document],
    names: &HashMap<String, usize>,
    place: &dyn Fn(usize) -> node::Place,
) -> Result<Vec<usize>> {
    let uses: Vec<Vec<usize>> = documents
        .iter()
        .map(|document| document.recipe.sources().filter_map(|source| names.get(source).copied()).collect())
        .collect();
    let mut done = vec![false; documents.len()];
    let mut order = Vec::with_capacity(documents.len());
    while order.len() < documents.len() {
        let ready = |index: &usize| !done[*index] && uses[*index].iter().all(|&used| done[used]);
        let Some(next) = (0..documents.len()).find(ready) else {
            let index = done.iter().position(|done| !done).unwrap_or_default();
            let name = documents[index].name.as_deref().unwrap_or("(no name)");
            let text = format!("document \"{}\" is made, in the end, from its own output", printable(name));
            return Err(reader.fail(place(index), text));
        };
        done[next] = true;
        order.push(next);
    }
    // What the file is for comes last: the document without a name, if there is one.
    if let Some(at) = order.iter().position(|&index| documents[index].name.is_none()) {
        let last = order[at];
        if !uses.iter().flatten().any(|&used| used == last) {
            order.remove(at);
            order.push(last);
        }
    }
    Ok(order)
}
