//! Reading mappings with known keys: what is misspelt, missing or of the wrong kind is said with its place.

use std::path::Path;
use std::rc::Rc;

use super::node::{Content, Key, Node, Place};
use crate::error::{Error, Result, printable};

/// Says where in which file something is wrong.
#[derive(Clone, Copy)]
pub(super) struct Reader<'a> {
    /// The file, as the user named it.
    pub file: &'a str,
}

/// The entries of a mapping, known by name.
pub(super) struct Fields<'n> {
    pub place: Place,
    entries: Vec<(&'n Key, &'n Node)>,
}

impl<'n> Fields<'n> {
    /// The value of `key`, unless it is left out or written as nothing.
    pub(super) fn get(&self, key: &str) -> Option<&'n Node> {
        self.entries.iter().find(|(known, value)| known.text == key && !value.is_null()).map(|(_, value)| *value)
    }

    /// All entries, in the order of the file.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&'n Key, &'n Node)> + '_ {
        self.entries.iter().copied()
    }
}

impl Reader<'_> {
    /// An error at `place`.
    pub(super) fn fail(self, place: Place, message: impl Into<String>) -> Error {
        Error::usage(message).at(Path::new(&self.spot(place)))
    }

    /// `file:line:column`.
    pub(super) fn spot(self, place: Place) -> String {
        format!("{}:{}:{}", self.file, place.line, place.column)
    }

    /// The mapping `node`, which has no other keys than `known`.
    pub(super) fn fields<'n>(self, node: &'n Node, what: &str, known: &[&str]) -> Result<Fields<'n>> {
        let fields = self.map(node, what)?;
        for (key, _) in fields.iter() {
            if !known.contains(&&*key.text) {
                return Err(self.unknown(key.place, &format!("key in {what}"), &key.text, known));
            }
        }
        Ok(fields)
    }

    /// The mapping `node`, whatever its keys.
    pub(super) fn map<'n>(self, node: &'n Node, what: &str) -> Result<Fields<'n>> {
        match &node.content {
            Content::Map(entries) => {
                Ok(Fields { place: node.place, entries: entries.iter().map(|(key, value)| (key, &**value)).collect() })
            }
            _ => Err(self.fail(node.place, format!("{what} must be a mapping, not {}", node.kind()))),
        }
    }

    /// The list `node`.
    pub(super) fn list<'n>(self, node: &'n Node, what: &str) -> Result<&'n [Rc<Node>]> {
        match &node.content {
            Content::List(items) if !items.is_empty() => Ok(items),
            Content::List(_) => Err(self.fail(node.place, format!("{what} is an empty list"))),
            _ => Err(self
                .fail(node.place, format!("{what} must be a list, not {}", node.kind()))
                .help("begin each entry with '- '")),
        }
    }

    /// The text of the scalar `node`.
    pub(super) fn text<'n>(self, node: &'n Node, what: &str) -> Result<&'n str> {
        node.text().ok_or_else(|| self.fail(node.place, format!("{what} must be a text, not {}", node.kind())))
    }

    /// One of `words`.
    pub(super) fn word<T: Copy>(self, node: &Node, what: &str, words: &[(&str, T)]) -> Result<T> {
        let text = self.text(node, what)?;
        let names: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        let found = words.iter().find(|(word, _)| *word == text);
        found.map(|(_, value)| *value).ok_or_else(|| self.unknown(node.place, what, text, &names))
    }

    /// A whole number.
    pub(super) fn whole(self, node: &Node, what: &str) -> Result<u64> {
        let digits = node.text().filter(|text| text.bytes().all(|b| b.is_ascii_digit()));
        digits.and_then(|text| text.parse().ok()).ok_or_else(|| {
            let given = node.text().map_or_else(|| node.kind().to_string(), |text| format!("\"{}\"", printable(text)));
            self.fail(node.place, format!("{what} must be a whole number, not {given}"))
        })
    }

    /// An error about a name that does not exist, with the closest one that does.
    pub(super) fn unknown(self, place: Place, what: &str, name: &str, known: &[&str]) -> Error {
        let error = self.fail(place, format!("unknown {what}: \"{}\"", printable(name)));
        match closest(name, known) {
            Some(word) => error.help(format!("did you mean \"{word}\"?")),
            None => error.help(format!("known are: {}", known.join(", "))),
        }
    }
}

/// The word of `known` that `name` is most likely meant to be.
pub(super) fn closest<'w>(name: &str, known: &[&'w str]) -> Option<&'w str> {
    let name: String = name.chars().take(64).flat_map(char::to_lowercase).collect();
    let (steps, word) = known.iter().map(|word| (strsim::osa_distance(&name, word), *word)).min()?;
    (steps <= word.len() / 3 + 1 && steps < word.len()).then_some(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_recognised_and_other_words_are_not() {
        let known = ["models", "slices", "parameters", "base_model", "merge_method"];
        for (name, word) in [
            ("paramters", "parameters"),
            ("model", "models"),
            ("Models", "models"),
            ("merge-method", "merge_method"),
            ("sliecs", "slices"),
        ] {
            assert_eq!(closest(name, &known), Some(word), "{name}");
        }
        assert_eq!(closest("colour", &known), None);
        assert_eq!(closest("", &["a"]), None);
    }
}
