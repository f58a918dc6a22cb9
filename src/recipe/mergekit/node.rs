//! YAML as a tree that knows where everything stands.
//!
//! - An alias shares the node that it names, so it costs nothing to hold; a node counts what it would be written out, and
//!   a file that would be too long written out is refused: everything that walks the tree is bounded.
//! - Keys are plain texts, and none may come twice. `<<` takes in the entries of other mappings, as YAML 1.1 has it.
//! - Scalars stay texts until it is known what they should be.

use std::collections::HashMap;
use std::rc::Rc;

use granit_parser::{Event, Marker, Options, Parser, ScalarStyle};

use crate::error::{Error, Result, printable};
use crate::limits::{MAX_RECIPE_BYTES, MAX_RECIPE_DEPTH, MAX_RECIPE_NODES};

/// Line and column, both from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub line: usize,
    pub column: usize,
}

/// A value and where it stands.
#[derive(Debug)]
pub(super) struct Node {
    pub place: Place,
    pub content: Content,
    /// Nodes in it, aliases written out, itself included.
    size: u64,
    /// Levels below it.
    depth: usize,
}

#[derive(Debug)]
pub(super) enum Content {
    /// A text; `plain` if it stands without quotes and may mean something else.
    Scalar {
        text: String,
        plain: bool,
    },
    List(Vec<Rc<Node>>),
    Map(Vec<(Key, Rc<Node>)>),
}

/// A key and where it stands.
#[derive(Debug, Clone)]
pub(super) struct Key {
    pub place: Place,
    pub text: String,
}

impl Node {
    /// Whether it is written as nothing.
    pub(super) fn is_null(&self) -> bool {
        matches!(&self.content, Content::Scalar { text, plain: true }
            if matches!(&**text, "" | "~" | "null" | "Null" | "NULL"))
    }

    /// The scalar's text.
    pub(super) fn text(&self) -> Option<&str> {
        match &self.content {
            Content::Scalar { text, .. } if !self.is_null() => Some(text),
            _ => None,
        }
    }

    /// What a plain scalar means if it is one of YAML 1.1's words for yes and no.
    pub(super) fn boolean(&self) -> Option<bool> {
        let Content::Scalar { text, plain: true } = &self.content else { return None };
        match &**text {
            "true" | "True" | "TRUE" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" => Some(true),
            "false" | "False" | "FALSE" | "no" | "No" | "NO" | "off" | "Off" | "OFF" => Some(false),
            _ => None,
        }
    }

    /// A finite decimal number, with underscores between digits as YAML 1.1 allows.
    pub(super) fn number(&self) -> Option<f64> {
        let text = self.text()?;
        let decimal = |c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '.' | 'e' | 'E' | '_');
        if !text.chars().all(decimal) || text.starts_with('_') {
            return None;
        }
        text.replace('_', "").parse::<f64>().ok().filter(|x| x.is_finite())
    }

    /// What it is, in a word, for messages.
    pub(super) fn kind(&self) -> &'static str {
        match &self.content {
            _ if self.is_null() => "nothing",
            Content::Scalar { .. } => "a single value",
            Content::List(_) => "a list",
            Content::Map(_) => "a mapping",
        }
    }
}

/// Reads all documents of a file; empty ones are left out.
pub(super) fn documents(text: &str, fail: &dyn Fn(Place, String) -> Error) -> Result<Vec<Rc<Node>>> {
    let begin = Place { line: 1, column: 1 };
    if text.len() as u64 > MAX_RECIPE_BYTES {
        let bytes = text.len();
        return Err(fail(begin, format!("{bytes} bytes, but a recipe has at most {MAX_RECIPE_BYTES}")));
    }
    let mut options = Options::default();
    options.block_nesting_limit = MAX_RECIPE_DEPTH;
    options.flow_nesting_limit = MAX_RECIPE_DEPTH;
    let parser = Parser::new_from_str_with_options(text.strip_prefix('\u{feff}').unwrap_or(text), options);
    let mut builder = Builder { open: Vec::new(), anchors: HashMap::new(), documents: Vec::new(), made: 0, fail };
    for event in parser {
        let (event, span) = event.map_err(|e| fail(place(e.marker()), format!("not valid YAML: {}", e.info())))?;
        builder.take(event, place(&span.start))?;
    }
    Ok(builder.documents)
}

fn place(marker: &Marker) -> Place {
    Place { line: marker.line().max(1), column: marker.col() + 1 }
}

/// A collection that is being read.
struct Open {
    place: Place,
    anchor: usize,
    kind: OpenKind,
}

enum OpenKind {
    List(Vec<Rc<Node>>),
    Map(OpenMap),
}

#[derive(Default)]
struct OpenMap {
    entries: Vec<(Key, Rc<Node>)>,
    /// The keys of `entries`, and the lines that they are in.
    known: HashMap<String, usize>,
    /// Values of `<<`.
    merged: Vec<Rc<Node>>,
    /// The key whose value comes next.
    key: Option<Key>,
}

struct Builder<'a> {
    open: Vec<Open>,
    anchors: HashMap<usize, Rc<Node>>,
    documents: Vec<Rc<Node>>,
    /// Values made so far.
    made: u64,
    fail: &'a dyn Fn(Place, String) -> Error,
}

impl Builder<'_> {
    fn take(&mut self, event: Event<'_>, at: Place) -> Result<()> {
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                self.refuse_tag(tag.is_some(), at)?;
                let content = Content::Scalar { text: text.into_owned(), plain: style == ScalarStyle::Plain };
                self.add(Node { place: at, content, size: 1, depth: 0 }, anchor)
            }
            Event::SequenceStart(_, anchor, tag) => {
                self.refuse_tag(tag.is_some(), at)?;
                self.begin(OpenKind::List(Vec::new()), anchor, at)
            }
            Event::MappingStart(_, anchor, tag) => {
                self.refuse_tag(tag.is_some(), at)?;
                self.begin(OpenKind::Map(OpenMap::default()), anchor, at)
            }
            Event::SequenceEnd | Event::MappingEnd => self.end(),
            Event::Alias(anchor) => match self.anchors.get(&anchor) {
                Some(node) => self.place_node(Rc::clone(node), at),
                None => Err((self.fail)(at, "an alias within what it names".into())),
            },
            Event::DocumentEnd => {
                self.anchors.clear();
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn refuse_tag(&self, tagged: bool, at: Place) -> Result<()> {
        match tagged {
            true => Err((self.fail)(at, "a YAML tag, which recipes have no use for".into())),
            false => Ok(()),
        }
    }

    fn begin(&mut self, kind: OpenKind, anchor: usize, place: Place) -> Result<()> {
        if self.open.len() >= MAX_RECIPE_DEPTH {
            return Err((self.fail)(place, format!("nested deeper than {MAX_RECIPE_DEPTH} levels")));
        }
        self.open.push(Open { place, anchor, kind });
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        let Some(Open { place, anchor, kind }) = self.open.pop() else { return Ok(()) };
        let content = match kind {
            OpenKind::List(items) => Content::List(items),
            OpenKind::Map(map) => Content::Map(self.merge(map)?),
        };
        let children: Box<dyn Iterator<Item = &Rc<Node>>> = match &content {
            Content::Scalar { .. } => Box::new(std::iter::empty()),
            Content::List(items) => Box::new(items.iter()),
            Content::Map(entries) => Box::new(entries.iter().map(|(_, value)| value)),
        };
        let (mut size, mut depth) = (1u64, 0);
        for child in children {
            size = size.saturating_add(child.size);
            depth = depth.max(child.depth + 1);
        }
        if size > MAX_RECIPE_NODES {
            return Err((self.fail)(place, format!("more than {MAX_RECIPE_NODES} values, aliases written out")));
        }
        if depth > MAX_RECIPE_DEPTH {
            return Err((self.fail)(place, format!("nested deeper than {MAX_RECIPE_DEPTH} levels")));
        }
        self.add(Node { place, content, size, depth }, anchor)
    }

    /// The entries of `<<` come last, and only where a key is not there yet.
    fn merge(&mut self, map: OpenMap) -> Result<Vec<(Key, Rc<Node>)>> {
        let OpenMap { mut entries, mut known, merged, .. } = map;
        for source in &merged {
            let maps: &[Rc<Node>] = match &source.content {
                Content::List(maps) => maps,
                _ => std::slice::from_ref(source),
            };
            for map in maps {
                let Content::Map(more) = &map.content else {
                    return Err((self.fail)(map.place, format!("<< takes in mappings, not {}", map.kind())));
                };
                for (key, value) in more {
                    self.count(map.place)?;
                    if known.insert(key.text.clone(), key.place.line).is_none() {
                        entries.push((key.clone(), Rc::clone(value)));
                    }
                }
            }
        }
        Ok(entries)
    }

    fn count(&mut self, at: Place) -> Result<()> {
        self.made += 1;
        match self.made > MAX_RECIPE_NODES {
            true => Err((self.fail)(at, format!("more than {MAX_RECIPE_NODES} values"))),
            false => Ok(()),
        }
    }

    fn add(&mut self, node: Node, anchor: usize) -> Result<()> {
        self.count(node.place)?;
        let node = Rc::new(node);
        if anchor != 0 {
            self.anchors.insert(anchor, Rc::clone(&node));
        }
        let place = node.place;
        self.place_node(node, place)
    }

    /// Puts a finished node where it belongs.
    fn place_node(&mut self, node: Rc<Node>, at: Place) -> Result<()> {
        let Some(open) = self.open.last_mut() else {
            if !node.is_null() {
                self.documents.push(node);
            }
            return Ok(());
        };
        match &mut open.kind {
            OpenKind::List(items) => items.push(node),
            OpenKind::Map(OpenMap { entries, known, merged, key }) => match key.take() {
                None => {
                    let Content::Scalar { text, .. } = &node.content else {
                        return Err((self.fail)(at, format!("{} as a key", node.kind())));
                    };
                    if let Some(line) = known.get(text) {
                        let name = printable(text);
                        return Err((self.fail)(at, format!("key \"{name}\" comes twice, first in line {line}")));
                    }
                    *key = Some(Key { place: at, text: text.clone() });
                }
                Some(key) if key.text == "<<" => merged.push(node),
                Some(key) => {
                    known.insert(key.text.clone(), key.place.line);
                    entries.push((key, node));
                }
            },
        }
        Ok(())
    }
}
