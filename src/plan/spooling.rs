//! What a merge keeps on the local disk of inputs that come over a network, so that no pass downloads what another did.
//!
//! - It applies where a pass over the whole model finds thresholds: of a model's task vector only what may survive is
//!   kept, for whatever lies below is trimmed, and trimmed values are alike. Base is kept whole, and so is a model of
//!   another type than base's.
//! - A look at the models needs all of their task vectors again, and so does a method that looks at whole tensors: of those all
//!   of what is downloaded is kept.
//! - What a pass reads first, later passes take from there. What only one pass reads is not kept.
//! - Where every tensor is a unit of its own, those that are too long to be held are kept, one at a time.
//!
//! How it is kept is the engine's business.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Action, Goal, PassSummary, Plan, Run, Schedule, Together, Unit};
use crate::checkpoint::packed::{CHUNK, Encoder};
use crate::error::Result;
use crate::limits::{CONNECTIONS_BYTES, UPLOAD_PARTS_AT_ONCE, upload_part_bytes};
use crate::method::Sparsify;
use crate::storage::Storage;

/// Longest chunk of a unit that is kept: what is compressed at once.
pub(super) const SPOOLED_ELEMENTS: u64 = CHUNK as u64;
/// What a chunk has beside what is stored of it, and what the table of chunks has for it.
const RECORD_BYTES: u64 = 64;
const PLACE_BYTES: u64 = 8;
/// Bytes of the disk that are left alone.
const SPARE_BYTES: u64 = 64_000_000;
/// What the table may take of the memory allowed.
const TABLE_SHARE: u64 = 8;

/// What becomes of what is downloaded and needed again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Downloads {
    /// It is kept beside the output.
    #[default]
    Beside,
    /// It is kept in this directory.
    In(PathBuf),
    /// It is downloaded again.
    Forgotten,
}

/// See the module's documentation.
#[derive(Debug, Clone)]
pub struct Spooling {
    /// Where; the output's work directory, if `None`.
    pub dir: Option<PathBuf>,
    /// About how much that is on the disk, in bytes.
    pub bytes: u64,
    /// Per checkpoint: whether it comes over a network.
    remote: Vec<bool>,
    /// Per model: whether a pass before the merge reads its task vector, of any tensor.
    searched: Vec<bool>,
    /// The tensors that are kept, each while it is worked on, in increasing order, with what `searched` is of it; all of the
    /// unit together, if `None`.
    alone: Option<Vec<(u32, Box<[bool]>)>>,
    /// Whether a vote before the merge reads everything.
    votes: bool,
    /// Whether looks before the merge and a vote do.
    looks: bool,
    /// Whether models are kept whole, and not what of them may survive.
    whole: bool,
    /// Elements of all tensors, and how many of them there are.
    elements: u64,
    tensors: u64,
    /// Widest element, in bytes.
    width: u64,
}

impl Spooling {
    /// What is worth keeping of a merge by `plan` whose units have the tensors `grouped`; `None` if it needs none.
    pub(super) fn of(plan: &Plan, grouped: &[u32]) -> Option<Self> {
        if plan.per_tensor() {
            return Self::of_tensors(plan, grouped);
        }
        if !plan.selects() || flips(plan) {
            return None;
        }
        Self::over(plan, grouped, &plan.goals(&unit_of(plan, grouped)), false)
    }

    /// The same where every tensor is a unit, and `streamed`, in increasing order, are read more than once.
    pub(super) fn of_tensors(plan: &Plan, streamed: &[u32]) -> Option<Self> {
        let looks = !plan.needs().looks.is_empty();
        if (flips(plan) || !plan.selects()) && !looks {
            return None;
        }
        Self::over_each(plan, streamed, &|unit| plan.goals(unit), looks)
    }

    /// The same for units of one tensor in which `goals` are sought; `whole` says that all of the models is kept.
    fn over_each(plan: &Plan, tensors: &[u32], goals: &dyn Fn(&Unit) -> Vec<Goal>, whole: bool) -> Option<Self> {
        let each = tensors.iter().filter_map(|&tensor| {
            Self::over(plan, &[tensor], &goals(&unit_of(plan, &[tensor])), whole).map(|spooling| (tensor, spooling))
        });
        let mut all: Option<Self> = None;
        for (tensor, own) in each {
            let all = all.get_or_insert_with(|| Self {
                alone: Some(Vec::new()),
                // The engine numbers the chunks of a tensor among all tensors.
                tensors: plan.tensors.len() as u64,
                ..own.clone()
            });
            all.bytes = all.bytes.max(own.bytes);
            all.elements = all.elements.max(own.elements);
            all.width = all.width.max(own.width);
            all.alone.iter_mut().for_each(|alone| alone.push((tensor, own.searched.clone().into())));
        }
        all
    }

    /// Whether all that `other` keeps one at a time are among its own.
    pub(super) fn has_all_of(&self, other: &Self) -> bool {
        other.alone.iter().flatten().all(|(tensor, _)| self.has(*tensor))
    }

    /// Whether something of `tensor` is kept.
    pub fn has(&self, tensor: u32) -> bool {
        self.searched_in(tensor).is_some()
    }

    /// Per model: whether its thresholds are sought in the unit of `tensor`; `None` if nothing of that is kept.
    fn searched_in(&self, tensor: u32) -> Option<&[bool]> {
        let Some(alone) = &self.alone else { return Some(&self.searched) };
        let place = alone.binary_search_by_key(&tensor, |(tensor, _)| *tensor).ok()?;
        Some(&alone[place].1)
    }

    /// The same for a look at the models that seeks `goals` in a unit. Where every tensor is one, `grouped` are those that are
    /// read more than once.
    pub(super) fn of_study(plan: &Plan, grouped: &[u32], goals: &dyn Fn(&Unit) -> Vec<Goal>) -> Option<Self> {
        match plan.per_tensor() {
            true => Self::over_each(plan, grouped, goals, true),
            false => Self::over(plan, grouped, &goals(&unit_of(plan, grouped)), true),
        }
    }

    /// The same where all outputs of `together` are made from what `plan` loads.
    pub(super) fn of_together(plan: &Plan, grouped: &[u32], together: &Together<'_>) -> Option<Self> {
        if together.plans.iter().any(|plan| flips(plan)) {
            return None;
        }
        match plan.per_tensor() {
            true => Self::over_each(plan, grouped, together.goals, false),
            false => Self::over(plan, grouped, &(together.goals)(&unit_of(plan, grouped)), false),
        }
    }

    /// Goal i of `goals` is about model i mod n.
    fn over(plan: &Plan, grouped: &[u32], goals: &[Goal], whole: bool) -> Option<Self> {
        let looks = !plan.needs().looks.is_empty();
        let unit = unit_of(plan, grouped);
        let mut spooling = Self {
            dir: None,
            bytes: 0,
            remote: plan.checkpoints.iter().map(|checkpoint| checkpoint.is_remote()).collect(),
            searched: plan.searched(goals),
            alone: None,
            votes: plan.votes(),
            looks,
            whole,
            elements: unit.elements,
            tensors: grouped.len() as u64,
            width: 0,
        };
        if !(looks || spooling.searched.contains(&true)) {
            return None;
        }
        let shares: Vec<f64> = (0..plan.models()).map(|model| largest_share(goals, model, plan.models())).collect();
        let (mut bytes, mut widest) = (0, 0);
        for &tensor in grouped {
            for (piece, model) in spooling.kept(plan, tensor, false) {
                let (elements, width) = (plan.length(tensor), plan.float_width(piece));
                let trimmed = |model: &usize| !whole && spooling.searched[*model] && is_like_base(plan, tensor, piece);
                let of_base = model.filter(trimmed);
                bytes += match of_base {
                    Some(model) => elements.div_ceil(8) + (elements as f64 * shares[model]) as u64 * width,
                    None => elements * width,
                };
                bytes += (elements / SPOOLED_ELEMENTS + 1) * RECORD_BYTES;
                widest = widest.max(width);
            }
        }
        (spooling.bytes, spooling.width) = (bytes, widest);
        (bytes > 0).then_some(spooling)
    }

    /// Whether anything of checkpoint `index` may be kept.
    pub fn keeps(&self, index: usize) -> bool {
        self.remote[index]
    }

    /// Whether tensors are kept one at a time.
    pub fn by_tensor(&self) -> bool {
        self.alone.is_some()
    }

    /// Whether of models is kept what lies above a bound, which a sample has to tell, and not everything.
    pub fn needs_bounds(&self) -> bool {
        !self.whole
    }

    /// Widest element of what is kept, in bytes.
    pub fn width(&self) -> usize {
        self.width as usize
    }

    /// Pieces of tensor `index` that passes before the merge keep, or the sketch pass alone; of models with their number.
    fn kept<'a>(
        &'a self,
        plan: &'a Plan,
        index: u32,
        by_sketch: bool,
    ) -> impl Iterator<Item = (super::Piece, Option<usize>)> + 'a {
        let (base, models) = match (&plan.tensors[index as usize].action, self.has(index)) {
            (Action::Merge { base, models, .. }, true) => (*base, &models[..]),
            _ => (None, &[][..]),
        };
        let searched = self.searched_in(index).unwrap_or_default();
        let all = !by_sketch && (self.votes || self.looks);
        let models = models.iter().map(|&(model, piece)| (piece, Some(model as usize)));
        let models = models.filter(move |(_, model)| model.is_none_or(|model| all || searched[model]));
        let base = base.filter(|_| all || searched.contains(&true));
        let pieces = base.into_iter().map(|piece| (piece, None)).chain(models);
        pieces.filter(|(piece, _)| self.remote[piece.checkpoint as usize])
    }

    /// Whether a pass over all of tensor `index` finds `piece` of it on the local disk: the first one after the sketch pass, or
    /// the merge.
    pub(super) fn spares(&self, plan: &Plan, index: u32, piece: super::Piece, first: bool) -> bool {
        self.kept(plan, index, first).any(|(kept, _)| kept == piece)
    }

    /// Bytes of `tensors` that a pass over all of them finds on the local disk: the first one after the sketch pass, or the merge.
    pub(super) fn spared(&self, plan: &Plan, tensors: &[u32], first: bool) -> u64 {
        let of = |&tensor: &u32| -> u64 {
            self.kept(plan, tensor, first).map(|(piece, _)| plan.bytes_used(tensor, piece)).sum()
        };
        tensors.iter().map(of).sum()
    }

    /// Memory of each thread, and of all together where chunks have `chunk_elements`.
    pub(super) fn held_bytes(&self, chunk_elements: u64) -> (u64, u64) {
        // Chunks of whole granules are half as long, at the least.
        let chunk = chunk_elements.min(SPOOLED_ELEMENTS).div_ceil(if self.looks { 2 } else { 1 });
        // Compressing, to a record; decompressing from one, and a chunk of which only a part is asked for.
        let thread = Encoder::held_bytes(self.width()) + 4 * SPOOLED_ELEMENTS * (self.width + 1);
        let checkpoints = self.remote.iter().filter(|&&remote| remote).count() as u64;
        let chunks = self.elements / chunk + 2 * self.tensors;
        (thread, (checkpoints * chunks + 2 * self.tensors) * PLACE_BYTES)
    }

    /// Whether the table of chunks is in proportion to the memory allowed.
    pub(super) fn is_modest(&self, limit: u64) -> bool {
        self.held_bytes(SPOOLED_ELEMENTS).1 <= limit / TABLE_SHARE
    }
}

fn unit_of(plan: &Plan, grouped: &[u32]) -> Unit {
    Unit {
        tensors: grouped.to_vec(),
        elements: grouped.iter().map(|&tensor| plan.length(tensor)).sum(),
        kind: super::UnitKind::Streamed,
        chunk_elements: SPOOLED_ELEMENTS,
    }
}

/// Whether signs of what is trimmed are flipped: then it matters.
fn flips(plan: &Plan) -> bool {
    plan.params.iter().any(|set| matches!(set.merger.sparsify(0), Sparsify::Flip { .. }))
}

/// Whether the values of `piece` that are not kept can be base's in the merge of tensor `index`: they are of one type.
fn is_like_base(plan: &Plan, index: u32, piece: super::Piece) -> bool {
    let Action::Merge { base: Some(base), .. } = plan.tensors[index as usize].action else { return false };
    plan.source(base).0.dtype == plan.source(piece).0.dtype
}

/// The largest share of a model's entries that a threshold is sought for.
fn largest_share(goals: &[Goal], model: usize, models: usize) -> f64 {
    let share = |goal: &Goal| goal.fraction().unwrap_or(if *goal == Goal::All { 1.0 } else { 0.0 });
    goals.iter().skip(model).step_by(models).map(share).fold(0.0, f64::max)
}

impl Schedule {
    /// Keeps nothing on the local disk between the passes: what they need is read again.
    pub fn without_spool(mut self, plan: &Plan) -> Self {
        if self.spool.take().is_some() {
            self.memory.retain(|(term, _)| *term != SPOOL);
            self.passes = self.passes(plan);
        }
        self
    }

    /// The same as [`Self::with_spool`], with memory left for uploading shards beside it.
    pub fn with_upload(plan: &Plan, run: Run) -> Result<Self> {
        let longest = plan.layout.shards.iter().map(|shard| shard.bytes).max().unwrap_or(0);
        let bytes = (UPLOAD_PARTS_AT_ONCE as u64 + 1) * upload_part_bytes(longest) + CONNECTIONS_BYTES;
        let rest = Run { memory_bytes: run.memory_bytes.saturating_sub(bytes), ..run };
        let mut schedule = Self::with_spool(plan, rest).map_err(|error| {
            let smallest = Self::smallest_memory(plan) + bytes;
            error.replace_help(format!("use --memory {}MB or more", smallest.div_ceil(1_000_000)))
        })?;
        schedule.memory.push(("parts that are uploaded".to_owned(), bytes));
        schedule.memory_limit = run.memory_bytes;
        Ok(schedule)
    }

    /// Bytes that passes after the first one over everything download, because nothing keeps them.
    pub fn downloaded_again(&self) -> u64 {
        let all = self.passes.iter().filter(|pass| pass.name != "probe").map(|pass| pass.bytes_downloaded).sum::<u64>();
        all - all.min(PassSummary::needed_once(&self.passes))
    }

    /// Keeps what is downloaded and needed again as `kept` says.
    pub fn keeping(mut self, plan: &Plan, kept: &Downloads) -> Self {
        match (kept, &mut self.spool) {
            (Downloads::Forgotten, _) => return self.without_spool(plan),
            (Downloads::In(dir), Some(spool)) => spool.dir = Some(dir.clone()),
            _ => {}
        }
        self
    }
}

/// Bytes that can be kept in `dir`, while an output of which `bytes` bytes are on the disk at once is made in `out`.
pub fn spool_room(dir: &Path, (out, bytes): (&Path, u64), storage: &dyn Storage) -> Result<u64> {
    let device = |path: &Path| -> Result<Option<u64>> {
        for path in path.ancestors() {
            let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
            if let Some(identity) = storage.identity(path)? {
                return Ok(Some(identity.device));
            }
        }
        Ok(None)
    };
    let reserved = if device(dir)? == device(out)? { bytes } else { 0 };
    Ok(storage.free_bytes(dir)?.saturating_sub(reserved + SPARE_BYTES))
}

/// The memory term of what keeping takes.
pub(super) const SPOOL: &str = "spool of what is downloaded";
