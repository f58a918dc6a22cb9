//! What `plan` shows: the plan and its schedule as plain numbers, printable and serialisable.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

use super::{Action, Plan, Schedule};
use crate::dtype::dtype_name;
use crate::method::Statistics;

/// Values of a parameter that are listed where it differs between tensors.
const VALUES_LISTED: usize = 6;

/// One input checkpoint.
#[derive(Debug, Clone, Serialize)]
pub struct InputSummary {
    /// "base", "model", "signs" or the name of what a model has besides, such as "fisher".
    pub role: &'static str,
    /// As the user named it.
    pub source: String,
    /// Where it was found.
    pub path: String,
    /// Hub id and commit, `org/name@commit`, if it came from the local cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hub: Option<String>,
    /// Files.
    pub files: usize,
    /// Tensors.
    pub tensors: usize,
    /// Elements.
    pub elements: u64,
    /// Tensor bytes.
    pub bytes: u64,
    /// Element types, most elements first.
    pub dtypes: Vec<String>,
    /// Method parameters of this model (weight, density, ...).
    pub params: BTreeMap<String, Spread>,
}

/// A parameter's value, or its least and greatest where it differs between tensors.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Spread {
    /// The same for all tensors.
    One(f64),
    /// Least and greatest.
    Range([f64; 2]),
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::One(value) => value.fmt(f),
            Self::Range([least, greatest]) => write!(f, "{least}..{greatest}"),
        }
    }
}

/// One pass over the data.
#[derive(Debug, Clone, Serialize)]
pub struct PassSummary {
    /// "probe", "sketch", "vote", "gather" or "merge".
    pub name: &'static str,
    /// What it is for, in a few words.
    pub purpose: &'static str,
    /// Input bytes it reads.
    pub bytes_read: u64,
    /// Those that come over a network.
    #[serde(skip_serializing_if = "is_zero")]
    pub bytes_downloaded: u64,
    /// Requests that these take: fewer where much of it is held, more where the network is faster than what follows.
    #[serde(skip_serializing_if = "is_zero")]
    pub requests: u64,
    /// Input bytes that it does not read, because an earlier pass left on the local disk what matters of them.
    #[serde(skip_serializing_if = "is_zero")]
    pub bytes_spared: u64,
    /// Output bytes it writes.
    pub bytes_written: u64,
}

impl PassSummary {
    /// Input bytes that it uses, wherever they come from.
    pub fn bytes_used(&self) -> u64 {
        self.bytes_read + self.bytes_spared
    }

    /// Bytes that come over a network in `passes`, each counted once: the last pass needs them all.
    pub fn needed_once(passes: &[Self]) -> u64 {
        passes.last().map_or(0, |merge| merge.bytes_downloaded + merge.bytes_spared)
    }
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Everything `tiesmith plan` prints.
#[derive(Debug, Clone, Serialize)]
pub struct PlanSummary {
    /// Method name.
    pub method: String,
    /// Global method parameters after defaults.
    pub params: BTreeMap<String, String>,
    /// Scope, threshold, tie rule: empty where nothing is trimmed.
    pub trim: BTreeMap<String, String>,
    /// The inputs.
    pub inputs: Vec<InputSummary>,
    /// Tensors that are merged.
    pub tensors_merged: usize,
    /// Tensors that are copied.
    pub tensors_copied: usize,
    /// Elements that are merged.
    pub elements_merged: u64,
    /// Passes in order.
    pub passes: Vec<PassSummary>,
    /// Bytes read over all passes.
    pub bytes_read: u64,
    /// Bytes written (shards).
    pub bytes_written: u64,
    /// How much is kept, at most and about, on the local disk between the passes, where that spares downloads.
    #[serde(skip_serializing_if = "is_zero")]
    pub spool_bytes: u64,
    /// Output shards: (file name, bytes).
    pub shards: Vec<(String, u64)>,
    /// The memory sum: (term, bytes).
    pub memory: Vec<(String, u64)>,
    /// Total of `memory`.
    pub memory_bytes: u64,
    /// The limit asked for.
    pub memory_limit_bytes: u64,
    /// Worker threads.
    pub threads: usize,
    /// Plan fingerprint.
    pub fingerprint: String,
    /// What the user should know.
    pub warnings: Vec<String>,
}

impl PlanSummary {
    /// Sums up `plan` and `schedule`.
    pub fn new(plan: &Plan, schedule: &Schedule) -> Self {
        let merged = |t: &&super::PlannedTensor| matches!(t.action, Action::Merge { .. });
        let merging = plan.merging();
        let tensors_merged = merging.tensors.iter().filter(merged).count();
        Self {
            method: plan.method.name().into(),
            params: params(merging),
            trim: trim(merging),
            inputs: Self::inputs(merging).collect(),
            tensors_merged,
            tensors_copied: merging.tensors.len() - tensors_merged,
            elements_merged: merging.tensors.iter().filter(merged).map(|t| t.elements).sum(),
            bytes_read: schedule.passes.iter().map(|p| p.bytes_read).sum(),
            bytes_written: schedule.passes.iter().map(|p| p.bytes_written).sum(),
            passes: schedule.passes.clone(),
            spool_bytes: schedule.spool.as_ref().map_or(0, |spool| spool.bytes),
            shards: plan.layout.shards.iter().map(|s| (s.name.clone(), s.bytes)).collect(),
            memory: schedule.memory.clone(),
            memory_bytes: schedule.memory_bytes(),
            memory_limit_bytes: schedule.memory_limit,
            threads: schedule.threads,
            fingerprint: plan.fingerprint.clone(),
            warnings: plan.warnings.clone(),
        }
    }

    /// The inputs alone, in the order of [`Plan::checkpoints`].
    pub fn inputs(plan: &Plan) -> impl Iterator<Item = InputSummary> + '_ {
        (0..plan.named).map(|index| input(plan, index))
    }
}

fn params(plan: &Plan) -> BTreeMap<String, String> {
    let global = plan.method.params().iter().filter(|spec| !spec.per_model);
    let value = |name: &str| {
        let mut values = Vec::new();
        for set in &plan.params {
            let value = set.settings.global(name).to_string();
            if !values.contains(&value) && values.len() < VALUES_LISTED {
                values.push(value);
            }
        }
        values.join("|")
    };
    global.map(|spec| (spec.name.to_string(), value(spec.name))).collect()
}

/// A recipe's choice in the word that users write; its own serialisation is the authority.
fn word(choice: &impl Serialize) -> String {
    serde_json::to_value(choice).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

fn trim(plan: &Plan) -> BTreeMap<String, String> {
    if !plan.selects() {
        return BTreeMap::new();
    }
    BTreeMap::from([
        ("scope".to_string(), word(&plan.recipe.scope)),
        ("threshold".to_string(), word(&plan.recipe.threshold)),
        ("ties".to_string(), word(&plan.recipe.trim_ties)),
    ])
}

/// The values of a per-model parameter over the tensors that the model takes part in.
fn spread(plan: &Plan, model: usize, name: &str) -> Option<Spread> {
    let mut takes_part = vec![false; plan.params.len()];
    for tensor in plan.tensors.iter().filter(|t| t.merges_model(model)) {
        takes_part[tensor.params as usize] = true;
    }
    let none = takes_part.iter().all(|part| !part);
    let (mut least, mut greatest) = (f64::INFINITY, f64::NEG_INFINITY);
    for (set, _) in plan.params.iter().zip(takes_part).filter(|(_, part)| *part || none) {
        let value = set.settings.per_model(name)?[model];
        (least, greatest) = (least.min(value), greatest.max(value));
    }
    Some(if least == greatest { Spread::One(least) } else { Spread::Range([least, greatest]) })
}

fn input(plan: &Plan, index: usize) -> InputSummary {
    let checkpoint = &plan.checkpoints[index];
    let models = plan.first_model..plan.first_model + plan.models();
    let model = models.contains(&index).then(|| index - plan.first_model);
    let mut elements: HashMap<String, u64> = HashMap::new();
    for tensor in &checkpoint.tensors {
        *elements.entry(dtype_name(tensor.dtype)).or_default() += tensor.elements();
    }
    let mut dtypes: Vec<(String, u64)> = elements.into_iter().collect();
    dtypes.sort_unstable_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    let own = |model: usize| {
        let specs = plan.method.params().iter().filter(|spec| spec.per_model);
        specs.filter_map(|spec| Some((spec.name.to_string(), spread(plan, model, spec.name)?))).collect()
    };
    InputSummary {
        role: match model {
            Some(_) => "model",
            None if Some(index) == plan.oracle => "signs",
            None if index > 0 => plan.method.statistics().map_or("base", Statistics::name),
            None => "base",
        },
        source: checkpoint.spec.clone(),
        path: checkpoint.dir.display().to_string(),
        hub: checkpoint.hub.as_ref().map(|hub| format!("{}@{}", hub.id, hub.commit)),
        files: checkpoint.stored_files(),
        tensors: checkpoint.tensors.len(),
        elements: checkpoint.tensors.iter().map(|t| t.elements()).sum(),
        bytes: checkpoint.tensors.iter().map(|t| t.bytes).sum(),
        dtypes: dtypes.into_iter().map(|(name, _)| name).collect(),
        params: model.map(own).unwrap_or_default(),
    }
}
