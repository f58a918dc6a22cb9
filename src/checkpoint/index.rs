//! `*.safetensors.index.json`: which shard holds which tensor.
//!
//! - Every name of a shard is one component of a path, so that an index cannot reach out of its directory.
//! - No tensor is listed twice, every listed shard is there, and every listed tensor is in the shard it is listed for.
//! - The index decides: tensors that only shards have are left out, with a warning. Of `metadata` only `total_size` is
//!   looked at, and a wrong one is a warning, because nothing is read by it.
//!
//! Knows nothing of how the index was found.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, Visitor};

use super::json::Loose;
use super::{Catalogue, TensorEntry, header};
use crate::error::{Error, Result, printable};
use crate::limits::{MAX_INDEX_BYTES, MAX_SHARDS};
use crate::storage::Storage;

/// A parsed index.
#[derive(Debug, Default)]
struct Index {
    /// Shard names, sorted.
    shards: Vec<Box<str>>,
    /// (tensor, which of `shards`), sorted by tensor.
    tensors: Vec<(Box<str>, u32)>,
    /// `metadata.total_size`, if it is a whole number.
    total_size: Option<u64>,
}

impl Index {
    fn shard_of(&self, tensor: &str) -> Option<u32> {
        self.tensors.binary_search_by(|(name, _)| (**name).cmp(tensor)).ok().map(|i| self.tensors[i].1)
    }
}

/// Opens every shard that the index at `path` lists.
pub(super) fn open(path: &Path, storage: &dyn Storage) -> Result<Catalogue> {
    let index = parse(&storage.read_small(path, MAX_INDEX_BYTES)?).map_err(|e| e.at(path))?;
    if index.shards.is_empty() {
        return Err(Error::input("the index lists no tensors").at(path).help("download it again"));
    }
    let dir = super::directory_of(path);
    storage.expect(&index.shards.iter().map(|name| dir.join(&**name)).collect::<Vec<_>>());
    check_present(&index, dir, storage).map_err(|e| e.at(path))?;
    let mut catalogue = Catalogue::default();
    let mut left_out = LeftOut::default();
    for (number, name) in index.shards.iter().enumerate() {
        let number = number as u32;
        for tensor in catalogue.add_file(&dir.join(&**name), storage)? {
            if index.shard_of(&tensor.name) == Some(number) {
                catalogue.tensors.push(tensor);
            } else {
                left_out.add(tensor.name, name);
            }
        }
    }
    catalogue.tensors.shrink_to_fit();
    catalogue.tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    check_complete(&index, &catalogue.tensors).map_err(|e| e.at(path))?;
    let path = printable(&path.to_string_lossy());
    let warnings = warnings(&index, &catalogue.tensors, left_out);
    catalogue.warnings.extend(warnings.into_iter().map(|warning| format!("{path}: {warning}")));
    Ok(catalogue)
}

/// Tensors of shards that the index does not list there.
#[derive(Default)]
struct LeftOut {
    count: u64,
    first: Option<(Box<str>, Box<str>)>,
}

impl LeftOut {
    fn add(&mut self, tensor: Box<str>, shard: &str) {
        self.count += 1;
        self.first.get_or_insert_with(|| (tensor, shard.into()));
    }
}

fn check_present(index: &Index, dir: &Path, storage: &dyn Storage) -> Result<()> {
    let mut missing = Vec::new();
    for name in &index.shards {
        if storage.identity(&dir.join(&**name))?.is_none() {
            missing.push(name);
        }
    }
    let Some(first) = missing.first() else { return Ok(()) };
    let path = dir.join(&***first);
    if storage.is_there(&path)? {
        return storage.open(&path).map(drop);
    }
    let (count, all) = (missing.len(), index.shards.len());
    Err(Error::input(format!("missing shard {}: {count} of the {all} shards it lists are not there", printable(first)))
        .help("complete the download"))
}

/// Checks that each listed tensor was found: `tensors` are a subset of those listed, in the same order.
fn check_complete(index: &Index, tensors: &[TensorEntry]) -> Result<()> {
    let count = index.tensors.len() - tensors.len();
    if count == 0 {
        return Ok(());
    }
    let mut found = tensors.iter().peekable();
    let absent = index.tensors.iter().find(|(name, _)| found.next_if(|t| t.name == *name).is_none());
    let (name, shard) = absent.map_or(("", ""), |(name, shard)| (name, &index.shards[*shard as usize]));
    let others = if count > 1 { format!(" ({} more are missing)", count - 1) } else { String::new() };
    Err(Error::input(format!("listed in {}, which does not have it{others}", printable(shard)))
        .tensor(name)
        .help("index and shards are of different checkpoints, or damaged"))
}

fn warnings(index: &Index, tensors: &[TensorEntry], left_out: LeftOut) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Some((tensor, shard)) = left_out.first {
        let (tensor, shard, count) = (printable(&tensor), printable(&shard), left_out.count);
        warnings.push(format!("left out {count} tensors that shards have but the index does not list there: the first is \"{tensor}\" in {shard}"));
    }
    let bytes: u128 = tensors.iter().map(|t| u128::from(t.bytes)).sum();
    if let Some(total) = index.total_size.filter(|&total| u128::from(total) != bytes) {
        warnings.push(format!("total_size is {total}, but the tensors have {bytes} bytes"));
    }
    let named = index.shards.iter().filter_map(|name| shard_number(name)).map(|(_, count)| count).max();
    if let Some(named) = named.filter(|&count| count > index.shards.len() as u64) {
        warnings.push(format!("lists {} shards, but their names count {named}", index.shards.len()));
    }
    warnings
}

/// (number, count) of a shard named like `model-00001-of-00003.safetensors`.
pub(super) fn shard_number(name: &str) -> Option<(u64, u64)> {
    let stem = name.strip_suffix(".safetensors").or_else(|| name.strip_suffix(".bin"))?;
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (_, number) = rest.rsplit_once('-')?;
    Some((number.parse().ok()?, count.parse().ok()?))
}

/// Whether `name` is one plain component of a path on every system.
pub(super) fn is_plain_component(name: &str) -> bool {
    let drive = name.len() >= 2 && name.as_bytes()[0].is_ascii_alphabetic() && name.as_bytes()[1] == b':';
    !drive && !matches!(name, "" | "." | "..") && !name.contains(['/', '\\', '\0'])
}

fn parse(text: &[u8]) -> Result<Index> {
    let mut index = Index::default();
    let mut current = None;
    let mut json = serde_json::Deserializer::from_slice(text);
    json.deserialize_map(IndexVisitor { index: &mut index, current: &mut current }).and_then(|()| json.end()).map_err(
        |e| {
            let error = Error::input(format!("invalid index: {e}"));
            match &current {
                Some(name) => error.tensor(name),
                None => error,
            }
        },
    )?;
    sort(&mut index);
    if let Some(twice) = index.tensors.windows(2).find(|w| w[0].0 == w[1].0) {
        return Err(Error::input("\"weight_map\" lists it twice").tensor(&twice[0].0));
    }
    Ok(index)
}

/// Sorts shards and tensors by name.
fn sort(index: &mut Index) {
    let mut order: Vec<usize> = (0..index.shards.len()).collect();
    order.sort_unstable_by(|&a, &b| index.shards[a].cmp(&index.shards[b]));
    let mut rank = vec![0; order.len()];
    for (new, &old) in order.iter().enumerate() {
        rank[old] = new as u32;
    }
    index.shards.sort_unstable();
    index.tensors.shrink_to_fit();
    index.tensors.iter_mut().for_each(|(_, shard)| *shard = rank[*shard as usize]);
    index.tensors.sort_unstable();
}

#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum Field {
    WeightMap,
    Metadata,
    #[serde(other)]
    Other,
}

/// Reads the whole index; `current` is the tensor at hand, for error messages.
struct IndexVisitor<'a> {
    index: &'a mut Index,
    current: &'a mut Option<Box<str>>,
}

impl<'de> Visitor<'de> for IndexVisitor<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with \"weight_map\"")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (mut weight_map, mut metadata) = (false, false);
        while let Some(field) = map.next_key()? {
            match field {
                Field::WeightMap => {
                    if std::mem::replace(&mut weight_map, true) {
                        return Err(A::Error::custom("duplicate \"weight_map\""));
                    }
                    map.next_value_seed(WeightMap { index: self.index, current: self.current })?;
                }
                Field::Metadata => {
                    if std::mem::replace(&mut metadata, true) {
                        return Err(A::Error::custom("duplicate \"metadata\""));
                    }
                    self.index.total_size = map.next_value::<Option<Metadata>>()?.and_then(|m| m.total_size);
                }
                Field::Other => {
                    map.next_value::<Loose>()?;
                }
            }
        }
        if weight_map { Ok(()) } else { Err(A::Error::custom("\"weight_map\" is missing")) }
    }
}

struct WeightMap<'a> {
    index: &'a mut Index,
    current: &'a mut Option<Box<str>>,
}

impl<'de> DeserializeSeed<'de> for WeightMap<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for WeightMap<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of file names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut numbers: HashMap<Box<str>, u32> = HashMap::new();
        while let Some(tensor) = map.next_key::<Box<str>>()? {
            header::check_name(&tensor, self.index.tensors.len()).map_err(A::Error::custom)?;
            *self.current = Some(tensor);
            let shard = map.next_value::<Box<str>>()?;
            if !is_plain_component(&shard) {
                let shard = printable(&shard);
                return Err(A::Error::custom(format_args!(
                    "\"{shard}\" is not the plain name of a file beside the index"
                )));
            }
            let number = match numbers.get(&shard) {
                Some(number) => *number,
                None if numbers.len() == MAX_SHARDS => {
                    return Err(A::Error::custom(format_args!("more than {MAX_SHARDS} shards are not accepted")));
                }
                None => {
                    let number = numbers.len() as u32;
                    self.index.shards.push(shard.clone());
                    numbers.insert(shard, number);
                    number
                }
            };
            self.index.tensors.push((self.current.take().unwrap_or_default(), number));
        }
        Ok(())
    }
}

struct Metadata {
    total_size: Option<u64>,
}

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MetadataVisitor;
        impl<'de> Visitor<'de> for MetadataVisitor {
            type Value = Metadata;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of metadata")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
                let mut total_size = None;
                while let Some(key) = map.next_key::<Box<str>>()? {
                    let Loose(number) = map.next_value()?;
                    if &*key == "total_size" {
                        total_size = number;
                    }
                }
                Ok(Metadata { total_size })
            }
        }
        deserializer.deserialize_map(MetadataVisitor)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{disk, file_of, index_of, write};
    use super::*;

    const ONE: &str = "model-00001-of-00002.safetensors";
    const TWO: &str = "model-00002-of-00002.safetensors";

    fn open_in(files: &[(&str, &[u8])]) -> (Result<Catalogue>, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), files);
        (open(&dir.path().join("i.json"), &*disk()), dir)
    }

    fn refused(files: &[(&str, &[u8])], parts: &[&str]) {
        let (opened, dir) = open_in(files);
        let error = opened.err().unwrap_or_else(|| panic!("accepted, but expected {parts:?}"));
        let text = error.to_string();
        assert_eq!(error.exit_code(), 2, "{text}");
        assert!(text.starts_with(dir.path().to_str().unwrap()), "{text}");
        for part in parts {
            assert!(text.contains(part), "{text:?} lacks {part:?}");
        }
    }

    fn names(catalogue: &Catalogue) -> Vec<(&str, u32)> {
        catalogue.tensors.iter().map(|t| (&*t.name, t.file)).collect()
    }

    #[test]
    fn tensors_of_all_shards_are_sorted_by_name() {
        let index = index_of(&[("z", ONE), ("m", TWO), ("a", ONE)]);
        let (one, two) = (file_of(&[("a", 1), ("z", 2)]), file_of(&[("m", 3)]));
        let (opened, _dir) = open_in(&[("i.json", index.as_bytes()), (TWO, &two), (ONE, &one)]);
        let catalogue = opened.unwrap();
        assert_eq!(names(&catalogue), [("a", 0), ("m", 1), ("z", 0)]);
        assert_eq!(catalogue.warnings, [""; 0]);
        assert!(catalogue.files[0].file.path().ends_with(ONE));
    }

    #[test]
    fn an_index_that_lists_nothing_is_refused() {
        refused(&[("i.json", br#"{"other": [1], "weight_map": {}, "metadata": null}"#)], &["lists no tensors"]);
    }

    #[test]
    fn bad_text_is_refused() {
        let refused = |text: &str, parts: &[&str]| refused(&[("i.json", text.as_bytes())], parts);
        refused("", &["invalid index", "EOF"]);
        refused("[]", &["expected an object with \"weight_map\""]);
        refused("{}", &["\"weight_map\" is missing"]);
        refused(r#"{"weight_map": {}, "weight_map": {}}"#, &["duplicate \"weight_map\""]);
        refused(r#"{"metadata": {}, "metadata": {}, "weight_map": {}}"#, &["duplicate \"metadata\""]);
        refused(r#"{"metadata": 3, "weight_map": {}}"#, &["expected an object of metadata"]);
        refused(r#"{"weight_map": ["a"]}"#, &["expected an object of file names"]);
        refused(r#"{"weight_map": {"w": 1}}"#, &["tensor \"w\"", "expected a string"]);
        refused(r#"{"weight_map": {"w": "a", "w": "a"}}"#, &["tensor \"w\"", "lists it twice"]);
        refused(r#"{"weight_map": {}} x"#, &["trailing characters"]);
        refused(&format!(r#"{{"weight_map": {{"{}": "a"}}}}"#, "n".repeat(5000)), &["5000 bytes, at most 4096"]);
        refused(&format!(r#"{{"x": {}"#, "[".repeat(1000)), &["recursion limit"]);
        let shards: Vec<String> = (0..=MAX_SHARDS).map(|i| format!(r#""{i}": "{i}""#)).collect();
        let text = format!(r#"{{"weight_map": {{{}}}}}"#, shards.join(","));
        refused(&text, &["tensor \"10000\"", "more than 10000 shards"]);
    }

    #[test]
    fn shard_names_cannot_reach_out_of_the_directory() {
        for name in
            ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\\\b", "C:x", "c:\\\\x", "a\\u0000b", "\\\\\\\\s\\\\x"]
        {
            let text = format!(r#"{{"weight_map": {{"ok": "x.safetensors", "w": "{name}"}}}}"#);
            refused(&[("i.json", text.as_bytes())], &["tensor \"w\"", "is not the plain name of a file"]);
        }
        for name in ["a", "a.safetensors", "..a", "ab:c", "ä"] {
            assert!(is_plain_component(name), "{name}");
        }
    }

    #[test]
    fn missing_shards_and_tensors_are_named_and_counted() {
        let index = index_of(&[("a", ONE), ("b", TWO), ("c", "x.safetensors")]);
        let one = file_of(&[("a", 1)]);
        let text = ["i.json: missing shard model-00002-of-00002.safetensors: 2 of the 3 shards"];
        refused(&[("i.json", index.as_bytes()), (ONE, &one)], &text);

        let index = index_of(&[("a", ONE), ("b", TWO), ("c", TWO), ("d", TWO)]);
        let files: [(&str, &[u8]); 3] = [("i.json", index.as_bytes()), (ONE, &one), (TWO, &file_of(&[("c", 1)]))];
        refused(&files, &["tensor \"b\": listed in model-00002-of-00002.safetensors, which does not have it (1 more"]);

        let index = index_of(&[("b", ONE)]);
        refused(&[("i.json", index.as_bytes()), (ONE, &one)], &["tensor \"b\": listed in", "which does not have it;"]);
        refused(&[("i.json", index.as_bytes()), (ONE, b"short")], &["00001-of-00002.safetensors: only 5 bytes long"]);
    }

    #[test]
    fn a_shard_must_be_a_file() {
        let index = index_of(&[("a", "dir")]);
        refused(&[("i.json", index.as_bytes()), ("dir/x", b"")], &["a directory, not a file"]);
    }

    #[test]
    fn the_index_decides_on_duplicates_and_leftovers() {
        let index = index_of(&[("a", ONE), ("b", TWO)]);
        let (one, two) = (file_of(&[("a", 1), ("b", 9)]), file_of(&[("a", 7), ("b", 2), ("c", 5)]));
        let (opened, _dir) = open_in(&[("i.json", index.as_bytes()), (ONE, &one), (TWO, &two)]);
        let catalogue = opened.unwrap();
        assert_eq!(names(&catalogue), [("a", 0), ("b", 1)]);
        assert_eq!((catalogue.tensors[0].bytes, catalogue.tensors[1].bytes), (1, 2));
        let [warning] = &catalogue.warnings[..] else { panic!("{:?}", catalogue.warnings) };
        assert!(warning.contains("i.json: left out 3 tensors") && warning.contains("\"b\" in"), "{warning}");
    }

    #[test]
    fn a_wrong_total_size_or_count_of_shards_is_a_warning() {
        let one = file_of(&[("a", 3)]);
        for (metadata, warns) in [("3", false), ("4", true), ("3.0", false), ("\"x\"", false), ("[{}]", false)] {
            let text = format!(r#"{{"metadata": {{"total_size": {metadata}}}, "weight_map": {{"a": "x"}}}}"#);
            let (opened, _dir) = open_in(&[("i.json", text.as_bytes()), ("x", &one)]);
            let warnings = opened.unwrap().warnings;
            assert_eq!(
                warnings.iter().any(|w| w.contains("i.json: total_size is 4, but the tensors have 3 bytes")),
                warns
            );
        }
        let index = index_of(&[("a", ONE)]);
        let (opened, _dir) = open_in(&[("i.json", index.as_bytes()), (ONE, &one)]);
        let warnings = opened.unwrap().warnings;
        assert!(
            warnings.len() == 1 && warnings[0].ends_with("lists 1 shards, but their names count 2"),
            "{warnings:?}"
        );
    }

    #[test]
    fn shard_names_tell_number_and_count() {
        assert_eq!(shard_number(TWO), Some((2, 2)));
        assert_eq!(shard_number("pytorch_model-00003-of-000163.safetensors"), Some((3, 163)));
        assert_eq!(shard_number("pytorch_model-00002-of-00003.bin"), Some((2, 3)));
        for name in ["model.safetensors", "model-1-of-x.safetensors", "1-of-2.bin", "x-of-2.safetensors"] {
            assert_eq!(shard_number(name), None, "{name}");
        }
    }

    proptest! {
        #[test]
        fn damaged_indexes_never_panic(place in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<bool>()) {
            let mut text = index_of(&[("a", ONE), ("b", TWO), ("c", ONE)]).into_bytes();
            let place = place.index(text.len());
            if cut { text.truncate(place) } else { text[place] = byte }
            if let Ok(index) = parse(&text) {
                prop_assert!(index.tensors.is_sorted_by(|a, b| a.0 < b.0) && index.shards.is_sorted_by(|a, b| a < b));
                prop_assert!(index.tensors.iter().all(|(_, shard)| (*shard as usize) < index.shards.len()));
            }
        }
    }
}
