//! The house rules, read from the source: who may know whom, where unsafe and printing live, how files begin and end.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Module → the modules it may use besides itself.
const LAYERS: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("limits", &["error"]),
    ("dtype", &["error"]),
    ("kernels", &["dtype"]),
    ("sketch", &["kernels", "dtype", "limits", "error"]),
    ("storage", &["limits", "error"]),
    ("checkpoint", &["kernels", "storage", "dtype", "limits", "error"]),
    ("method", &["kernels", "sketch", "dtype", "error"]),
    ("recipe", &["method", "dtype", "limits", "error"]),
    ("plan", &["recipe", "checkpoint", "method", "storage", "dtype", "limits", "error"]),
    ("journal", &["storage", "limits", "error"]),
    ("report", &["error"]),
    (
        "engine",
        &[
            "plan",
            "checkpoint",
            "method",
            "kernels",
            "sketch",
            "storage",
            "journal",
            "report",
            "dtype",
            "limits",
            "error",
        ],
    ),
];

/// The only files that may contain unsafe code.
const UNSAFE_FILES: [&str; 3] = ["kernels/isa.rs", "kernels/convert.rs", "storage/mmap.rs"];
const PRINTING: [&str; 7] = ["println!", "print!", "eprintln!", "eprint!", "dbg!", "stdout()", "stderr()"];
const MAX_LINES: usize = 700;

/// A file under `src/`.
struct Source {
    /// Path below `src/`, with `/`.
    path: String,
    text: String,
}

impl Source {
    /// The module that the file belongs to: the first component of its path.
    fn module(&self) -> &str {
        self.path.split('/').next().unwrap().trim_end_matches(".rs")
    }

    /// Whether the whole file is unit tests.
    fn is_tests(&self) -> bool {
        self.path.split('/').any(|part| part == "tests" || part == "tests.rs")
    }

    /// The code: without comments, and without the unit tests at its end.
    fn code(&self) -> String {
        let end = self.text.find("\n#[cfg(test)]\nmod tests {").unwrap_or(self.text.len());
        let lines = self.text[..end].lines().map(|line| match line.trim_start().starts_with("//") {
            true => "",
            false => line.split(" // ").next().unwrap_or_default(),
        });
        lines.collect::<Vec<_>>().join("\n")
    }
}

fn sources() -> Vec<Source> {
    fn visit(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                visit(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = Vec::new();
    visit(&root, &mut paths);
    paths.sort();
    let below = |path: &Path| path.strip_prefix(&root).unwrap().to_str().unwrap().replace('\\', "/");
    paths.iter().map(|path| Source { path: below(path), text: fs::read_to_string(path).unwrap() }).collect()
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The first name of every path that begins `prefix::`, groups in braces included.
fn names_after<'a>(code: &'a str, prefix: &str) -> BTreeSet<&'a str> {
    let mut names = BTreeSet::new();
    let start = format!("{prefix}::");
    for (at, _) in code.match_indices(&start) {
        if code[..at].ends_with(is_word) || code[..at].ends_with(':') {
            continue;
        }
        let rest = &code[at + start.len()..];
        match rest.strip_prefix('{') {
            None => names.extend(rest.split(|c| !is_word(c)).next()),
            Some(group) => names.extend(group_heads(group)),
        }
    }
    names
}

/// The first name of every item of a `use` group, given what follows its opening brace.
fn group_heads(group: &str) -> Vec<&str> {
    let (mut heads, mut depth, mut expecting) = (Vec::new(), 0, true);
    let mut rest = group;
    while let Some(c) = rest.chars().next() {
        let length = if is_word(c) { rest.find(|c| !is_word(c)).unwrap_or(rest.len()) } else { c.len_utf8() };
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => expecting = true,
            _ if is_word(c) && expecting => {
                heads.push(&rest[..length]);
                expecting = false;
            }
            _ => {}
        }
        rest = &rest[length..];
    }
    heads
}

/// Names that `lib.rs` re-exports.
fn public_names(lib: &str) -> BTreeSet<&str> {
    let mut names = BTreeSet::new();
    for (at, _) in lib.match_indices("pub use ") {
        let statement = lib[at..].split(';').next().unwrap();
        match statement.split_once('{') {
            Some((_, group)) => names.extend(group.split(|c| !is_word(c)).filter(|word| !word.is_empty())),
            None => names.extend(statement.rsplit(|c| !is_word(c)).next()),
        }
    }
    names
}

#[test]
fn modules_know_only_the_layers_below() {
    let table: BTreeMap<_, _> = LAYERS.iter().copied().collect();
    let sources = sources();
    let lib = sources.iter().find(|source| source.path == "lib.rs").expect("src/lib.rs").code();
    let public = public_names(&lib);
    let mut offences = Vec::new();
    for source in sources.iter().filter(|source| !source.is_tests()) {
        let (module, code) = (source.module(), source.code());
        let mut used = names_after(&code, "crate");
        let allowed: BTreeSet<&str> = match module {
            "lib" => continue,
            "main" | "cli" => {
                used.extend(names_after(&code, "tiesmith"));
                public.iter().copied().chain(["cli"]).collect()
            }
            _ => match table.get(module) {
                Some(below) => below.iter().copied().chain([module]).collect(),
                None => {
                    offences.push(format!("{}: {module} is not in the table of layers", source.path));
                    continue;
                }
            },
        };
        let unknown = used.difference(&allowed).map(|name| format!("{}: uses {name}", source.path));
        offences.extend(unknown);
    }
    assert!(offences.is_empty(), "{offences:#?}");
}

#[test]
fn every_file_says_what_it_is() {
    let silent: Vec<_> = sources().into_iter().filter(|s| !s.text.starts_with("//!")).map(|s| s.path).collect();
    assert!(silent.is_empty(), "these do not begin with //!: {silent:?}");
}

#[test]
fn no_file_is_too_long() {
    let long: Vec<_> = sources().into_iter().filter(|s| s.text.lines().count() > MAX_LINES).map(|s| s.path).collect();
    assert!(long.is_empty(), "these have more than {MAX_LINES} lines: {long:?}");
}

/// Whether `code` contains `word` not as part of a longer one.
fn contains_word(code: &str, word: &str) -> bool {
    code.match_indices(word).any(|(at, _)| {
        let after = &code[at + word.len()..];
        let goes_on = word.ends_with(is_word) && after.starts_with(is_word);
        !code[..at].ends_with(is_word) && !goes_on
    })
}

#[test]
fn only_the_command_line_prints() {
    let mut offences = Vec::new();
    for source in sources().iter().filter(|s| !["cli", "main"].contains(&s.module()) && !s.is_tests()) {
        let code = source.code();
        let found = PRINTING.iter().filter(|word| contains_word(&code, word));
        offences.extend(found.map(|word| format!("{}: {word}", source.path)));
    }
    assert!(offences.is_empty(), "{offences:#?}");
}

#[test]
fn unsafe_code_is_where_it_may_be() {
    let found: Vec<_> = sources()
        .into_iter()
        .filter(|source| contains_word(&source.code(), "unsafe") && !UNSAFE_FILES.contains(&source.path.as_str()))
        .map(|source| source.path)
        .collect();
    assert!(found.is_empty(), "unsafe in {found:?}");
}

/// Rust files below `dir` of the repository.
fn texts(dir: &str) -> Vec<String> {
    let mut pending = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(dir)];
    let mut texts = Vec::new();
    while let Some(folder) = pending.pop() {
        for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            match path.extension() {
                _ if path.is_dir() => pending.push(path),
                Some(extension) if extension == "rs" => texts.push(fs::read_to_string(path).unwrap()),
                _ => {}
            }
        }
    }
    texts
}

/// The last cells of all tables of a page whose last column is called `heading`.
fn last_cells<'a>(page: &'a str, heading: &str) -> Vec<&'a str> {
    let (mut cells, mut within) = (Vec::new(), false);
    for line in page.lines() {
        let Some(row) = line.strip_prefix("| ").and_then(|row| row.strip_suffix(" |")) else {
            within &= line.starts_with("|-");
            continue;
        };
        let last = row.rsplit(" | ").next().unwrap_or_default();
        if within {
            cells.push(last);
        }
        within |= last == heading;
    }
    cells
}

#[test]
fn tables_name_tests_that_are_there() {
    let code = [texts("src"), texts("tests")].concat().concat();
    let page = |name: &str| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap();
    let (format, reliability) = (page("docs/format.md"), page("docs/reliability.md"));
    let cells = [last_cells(&format, "test"), last_cells(&reliability, "test")];
    assert!(cells.iter().all(|cells| cells.len() > 15), "{cells:?}");
    let cells = cells.concat();
    for cell in cells {
        let names: Vec<&str> = cell.split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty(), "no test is named: {cell}");
        for name in names {
            let (before, _) = code.split_once(&format!("fn {name}() {{")).unwrap_or_default();
            // Other attributes may stand between.
            assert!(before.lines().rev().take(4).any(|line| line.trim() == "#[test]"), "{name} is no test");
        }
    }
}

#[test]
fn the_reader_of_paths_reads_them() {
    let code = "use crate::a::{b, c};\nuse crate::{d::e, f::{g, h}, i};\nlet x = crate::j::k(); mycrate::no();";
    assert_eq!(names_after(code, "crate").into_iter().collect::<Vec<_>>(), ["a", "d", "f", "i", "j"]);
    let lib = "mod a;\npub use a::{B, C};\npub use d::E;";
    assert_eq!(public_names(lib).into_iter().collect::<Vec<_>>(), ["B", "C", "E"]);
    assert!(contains_word("unsafe { x }", "unsafe") && !contains_word("deny(unsafe_code)", "unsafe"));
    assert!(contains_word("print!()", "print!") && !contains_word("eprint!()", "print!"));
}
