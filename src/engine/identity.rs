//! What a run is a run of: the first record of its journal, and the comparison with what is asked now.
//!
//! The same recipe over the same inputs gives the same bytes, so its unfinished work can be continued. An input counts as
//! the same if its header, length, times and inode are: a modification time can be put back, a change time cannot.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::PROGRAM;
use crate::error::{Error, Result, printable};
use crate::plan::Plan;
use crate::storage::InputFile;

/// Version of the journal's format.
const JOURNAL_VERSION: u32 = 7;
const ADVICE: &str = "use --restart to start over, or another --out";
/// What a journal in an output directory is about.
const MERGE: &str = "merge in the output directory";
const HASHES: &str = "a merge begun with --hash-inputs goes on over inputs that were only touched or copied";

/// The first record.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Begin {
    version: u32,
    program: String,
    fingerprint: String,
    /// The same without the inputs' modification times.
    untimed_fingerprint: String,
    recipe: Value,
    inputs: Vec<Input>,
    /// Names of the shards.
    pub shards: Vec<String>,
    /// Whether the journal keeps hashes of what is read of the inputs.
    hashes: bool,
}

/// One file of an input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Input {
    path: String,
    bytes: u64,
    mtime_ns: String,
    ctime_ns: String,
    inode: u64,
    header_blake3: String,
}

impl Begin {
    pub(super) fn of(plan: &Plan) -> Result<Self> {
        // What a checkpoint is called says nothing about its content: a moved input is the same input.
        let mut recipe = plan.recipe.clone();
        recipe.base = recipe.base.map(|_| String::new());
        recipe.sign_from = recipe.sign_from.map(|_| String::new());
        recipe.models.iter_mut().for_each(|model| model.rename(|_| String::new()));
        Ok(Self {
            version: JOURNAL_VERSION,
            program: PROGRAM.into(),
            fingerprint: plan.fingerprint.clone(),
            untimed_fingerprint: plan.untimed_fingerprint.clone(),
            recipe: serde_json::to_value(recipe).map_err(|e| Error::failed(format!("the recipe as JSON: {e}")))?,
            inputs: files(plan).map(|(file, header)| Input::of(file, header)).collect(),
            shards: plan.layout.shards.iter().map(|shard| shard.name.clone()).collect(),
            hashes: false,
        })
    }

    /// The same for a journal that keeps hashes of what is read of the inputs, if it does.
    pub(super) fn with_hashes(self, hashes: bool) -> Self {
        Self { hashes, ..self }
    }

    /// Whether the journal keeps hashes of what is read of the inputs.
    pub(super) fn has_hashes(&self) -> bool {
        self.hashes
    }

    pub(super) fn encode(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).map_err(|e| Error::failed(format!("the journal's first record as JSON: {e}")))
    }

    /// What a payload says; `None` if it is not one of this version.
    pub(super) fn decode(payload: &[u8]) -> Option<Self> {
        serde_json::from_slice(payload).ok().filter(|begin: &Self| begin.version == JOURNAL_VERSION)
    }

    /// Whether `fingerprint` is that of this run.
    pub(super) fn is_of(&self, fingerprint: &str) -> bool {
        self.fingerprint == fingerprint
    }

    /// Refuses to go on with `plan` unless it is the same work; says what changed.
    pub(super) fn admit(&self, plan: &Plan) -> Result<()> {
        self.admit_as(plan, MERGE)
    }

    /// The same for unfinished work that is called `work` to the user.
    pub(super) fn admit_as(&self, plan: &Plan, work: &str) -> Result<()> {
        self.compare(plan, work, Input::change)
    }

    /// The same, but for inputs that were only touched or copied, as far as that can be seen before their content is
    /// compared. That takes a journal with hashes of what was read.
    pub(super) fn admit_touched(&self, plan: &Plan) -> Result<()> {
        let content = self.compare(plan, MERGE, Input::change_of_content);
        match self.hashes {
            true => content,
            false => self.admit(plan).map_err(|e| match content {
                Ok(()) => e.replace_help(format!("{ADVICE}; {HASHES}")),
                Err(_) => e,
            }),
        }
    }

    /// Which input is another by its times or its inode.
    pub(super) fn touched(&self, plan: &Plan) -> Option<String> {
        let changed =
            |(then, (file, header)): (&Input, _)| then.change(&Input::of(file, header)).map(|what| (file, what));
        let (file, what) = self.inputs.iter().zip(files(plan)).find_map(changed)?;
        Some(format!("{}: {what}, but its content is the same", printable(&file.path().to_string_lossy())))
    }

    /// The same for inputs that may be copies on another machine, made with their modification times.
    pub(super) fn admit_copies(&self, plan: &Plan) -> Result<()> {
        self.compare(plan, MERGE, Input::change_of_copy)
    }

    fn compare(&self, plan: &Plan, work: &str, change: impl Fn(&Input, &Input) -> Option<String>) -> Result<()> {
        let now = Self::of(plan)?;
        let refuse = |what: String| Error::input(format!("the unfinished {work} is another one: {what}")).help(ADVICE);
        if let Some(change) = difference("", &self.recipe, &now.recipe) {
            return Err(refuse(change));
        }
        if self.inputs.len() != now.inputs.len() {
            return Err(refuse(format!("its inputs have {} files, now {}", self.inputs.len(), now.inputs.len())));
        }
        for ((then, now), (file, _)) in self.inputs.iter().zip(&now.inputs).zip(files(plan)) {
            let Some(change) = change(then, now) else { continue };
            // Of what is computed, the tensors' own files come first: they are as they were.
            let config = file.described_by().filter(|_| then.header_blake3 != now.header_blake3);
            return Err(other(file, &config.map_or(change, |config| format!("{config} was changed"))));
        }
        // Modification times are looked at with the inputs.
        if self.untimed_fingerprint != now.untimed_fingerprint || self.shards != now.shards {
            let program = printable(&self.program);
            return Err(refuse(match program == PROGRAM {
                true => "a config.json that decides which layers are meant was another".into(),
                false => format!("it was begun by {program}, which computes in another way than {PROGRAM}"),
            }));
        }
        Ok(())
    }
}

impl Input {
    fn of(file: &dyn InputFile, header: &[u8; 32]) -> Self {
        let identity = file.identity();
        Self {
            path: file.path().display().to_string(),
            bytes: identity.bytes,
            mtime_ns: identity.mtime_ns.to_string(),
            ctime_ns: identity.ctime_ns.to_string(),
            inode: identity.inode,
            header_blake3: blake3::Hash::from_bytes(*header).to_hex().to_string(),
        }
    }

    /// What is different about `now`.
    fn change(&self, now: &Self) -> Option<String> {
        if self.bytes != now.bytes {
            return Some(format!("it had {} bytes, now {}", self.bytes, now.bytes));
        }
        let different = [
            (self.header_blake3 != now.header_blake3, "its header"),
            (self.mtime_ns != now.mtime_ns, "its modification time"),
            (self.inode != now.inode, "its inode, so it was replaced,"),
            (self.ctime_ns != now.ctime_ns, "its change time"),
        ];
        different.iter().find(|(different, _)| *different).map(|(_, what)| format!("{what} is another"))
    }

    /// The same for a file whose content is compared: nothing but that counts.
    fn change_of_content(&self, now: &Self) -> Option<String> {
        let times = (self.mtime_ns.clone(), self.ctime_ns.clone());
        self.change(&Self { mtime_ns: times.0, ctime_ns: times.1, inode: self.inode, ..now.clone() })
    }

    /// The same where `now` may be a copy: it has another inode then. The same inode must not have changed.
    fn change_of_copy(&self, now: &Self) -> Option<String> {
        match self.inode == now.inode {
            true => self.change(now),
            false => {
                let copy = Self { inode: self.inode, ctime_ns: self.ctime_ns.clone(), ..now.clone() };
                self.change(&copy).map(|change| format!("{change} (copies must keep their times: cp -p, rsync -a)"))
            }
        }
    }
}

/// The refusal of an input that is not what it was.
pub(super) fn other(file: &dyn InputFile, what: &str) -> Error {
    Error::input(format!("this input is not what it was when the unfinished merge began: {what}"))
        .at(file.path())
        .help(ADVICE)
}

/// All input files with the hashes of their headers.
fn files(plan: &Plan) -> impl Iterator<Item = (&dyn InputFile, &[u8; 32])> {
    plan.checkpoints.iter().flat_map(|c| &c.files).map(|f| (&*f.file, &f.header_hash))
}

/// The first setting that differs, with both values.
fn difference(name: &str, then: &Value, now: &Value) -> Option<String> {
    match (then, now) {
        (Value::Object(then), Value::Object(now)) => {
            let keys = then.keys().chain(now.keys().filter(|key| !then.contains_key(*key)));
            keys.filter_map(|key| {
                let inner = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
                difference(&inner, then.get(key).unwrap_or(&Value::Null), now.get(key).unwrap_or(&Value::Null))
            })
            .next()
        }
        (Value::Array(then), Value::Array(now)) if then.len() == now.len() => then
            .iter()
            .zip(now)
            .enumerate()
            .find_map(|(i, (then, now))| difference(&format!("{name}[{}]", i + 1), then, now)),
        (Value::Array(then), Value::Array(now)) if name == "models" => {
            Some(format!("the number of models was {}, now {}", then.len(), now.len()))
        }
        _ if then == now => None,
        _ => Some(format!("{} was {}, now {}", name.trim_start_matches("params."), shown(then), shown(now))),
    }
}

/// A setting's value; one that is not given has its default.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => "not given".into(),
        other => printable(&other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_first_difference_is_named_with_both_values() {
        let recipe = |density: Value, models: Value| json!({"method": "ties", "models": models, "params": density});
        let one = json!([{"params": {"weight": 1.0}}]);
        let then = recipe(json!({"density": 0.2}), one.clone());
        let change = |now: &Value| difference("", &then, now);
        assert_eq!(change(&then), None);
        assert_eq!(change(&recipe(json!({"density": 0.5}), one.clone())).unwrap(), "density was 0.2, now 0.5");
        assert_eq!(change(&recipe(json!({}), one.clone())).unwrap(), "density was 0.2, now not given");
        let lambda = recipe(json!({"density": 0.2, "lambda": 2.0}), one);
        assert_eq!(change(&lambda).unwrap(), "lambda was not given, now 2.0");
        let heavier = recipe(json!({"density": 0.2}), json!([{"params": {"weight": 2.0}}]));
        assert_eq!(change(&heavier).unwrap(), "models[1].params.weight was 1.0, now 2.0");
        let more = recipe(json!({"density": 0.2}), json!([{}, {}]));
        assert_eq!(change(&more).unwrap(), "the number of models was 1, now 2");
    }

    #[test]
    fn an_input_is_the_same_if_everything_about_it_is() {
        let input = || Input {
            path: "a".into(),
            bytes: 1,
            mtime_ns: "2".into(),
            ctime_ns: "3".into(),
            inode: 4,
            header_blake3: "5".into(),
        };
        assert_eq!(input().change(&Input { path: "moved".into(), ..input() }), None);
        let changed = [
            Input { bytes: 9, ..input() },
            Input { mtime_ns: "9".into(), ..input() },
            Input { ctime_ns: "9".into(), ..input() },
            Input { inode: 9, ..input() },
            Input { header_blake3: "9".into(), ..input() },
        ];
        for now in changed {
            assert!(input().change(&now).is_some(), "{now:?}");
        }
    }
}
