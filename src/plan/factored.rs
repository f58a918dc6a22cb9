//! LoRA adapters of any ranks, merged through the changes ΔW that they make and written as factors of one rank.
//!
//! - The merge of the changes is a plan of its own (`merged`), one tensor per module, whose result is never written: it is
//!   computed as often as it is needed.
//! - The output's plan has the factors as its tensors, which come from no file (`engine/factor`).
//! - How many columns the search for the factors has depends on shapes and rank alone, as do the output's bytes; how much
//!   of ΔW is held between its passes is what memory leaves.

use std::sync::Arc;

use super::summary::PassSummary;
use super::{Action, Piece, Plan, PlannedTensor, Run, Schedule};
use crate::checkpoint::layout::Layout;
use crate::checkpoint::{Changes, Checkpoint, CheckpointFile, Derived, FactoredModule, TensorEntry};
use crate::error::{Error, Result, printable};
use crate::limits::{PANEL_COLUMNS, PRODUCT_BYTES};

/// Up to so many rows or columns, the search spans all of them: it is exact at once.
const SMALL: u64 = 128;
/// Columns beyond the rank that the search has at least.
const SPARE: u64 = 16;
/// Fewest elements of ΔW that are computed at once, where there are as many.
const FEWEST_ELEMENTS: u64 = 1 << 18;

/// See the module's documentation.
pub struct Factored {
    /// The merge of the changes.
    pub merged: Plan,
    /// The modules, in the order of the tensors of `merged`; factors 2 i and 2 i + 1 of the output are A and B of module i.
    pub modules: Vec<FactoredModule>,
    /// The rank that they are written with.
    pub rank: u64,
    /// The output's `adapter_config.json`.
    pub config: Vec<u8>,
}

/// Columns of the search for `rank` factors of a matrix of `rows` × `columns`: a multiple of a panel's.
pub fn search_columns(rows: u64, columns: u64, rank: u64) -> u64 {
    let least = rows.min(columns);
    let wanted = if least <= SMALL { least } else { (rank + rank.max(SPARE)).min(least) };
    wanted.next_multiple_of(PANEL_COLUMNS)
}

impl Factored {
    /// Rows and columns of ΔW of module `index`.
    pub fn shape(&self, index: usize) -> (u64, u64) {
        let shape = &self.merged.tensors[index].shape;
        (shape[0], shape[1..].iter().product())
    }

    /// The number under which a journal has what was counted of module `index`: behind all modules' own.
    pub fn result(&self, index: usize) -> u32 {
        (self.modules.len() + index) as u32
    }

    /// Memory of the search for the factors of module `index` but for ΔW itself, in bytes.
    fn search_bytes(&self, index: usize) -> u64 {
        let (rows, columns) = self.shape(index);
        let width = search_columns(rows, columns, self.rank);
        let rank = self.rank.next_multiple_of(PANEL_COLUMNS).min(width);
        // Both bases and the factor that is being written; the small matrices; the coefficients of a panel.
        8 * (width * (rows + columns) + rank * rows.max(columns) + 6 * width * width + 64 * width)
    }

    /// Memory of the search beside ΔW for `threads` threads, in bytes, and the module that takes the most.
    fn memory(&self, threads: usize) -> (u64, &str) {
        let all = 0..self.modules.len();
        let most = all.max_by_key(|&index| self.search_bytes(index)).expect("adapters have modules");
        (self.search_bytes(most) + threads as u64 * PRODUCT_BYTES, &self.modules[most].name)
    }

    /// Elements of ΔW that are held at least, and at most.
    fn elements(&self) -> (u64, u64) {
        let all = || (0..self.modules.len()).map(|index| self.shape(index));
        let fewest = all().map(|(rows, columns)| columns.max(FEWEST_ELEMENTS).min(rows * columns)).max();
        (fewest.unwrap_or(0), all().map(|(rows, columns)| rows * columns).max().unwrap_or(0))
    }

    /// Cuts the merge of the changes for `run`, with what the search takes.
    pub(super) fn schedule(&self, output: &Plan, run: Run) -> Result<Schedule> {
        let (fewest, most) = self.elements();
        for threads in (1..=run.threads.max(1)).rev() {
            let (search, _) = self.memory(threads);
            // As much of ΔW as half of the memory holds, if the rest is enough for everything else.
            for elements in [most.min(run.memory_bytes / 8), most.min(run.memory_bytes / 16), fewest] {
                let elements = elements.max(fewest);
                let extra = search + 4 * elements;
                let Some(memory_bytes) = run.memory_bytes.checked_sub(extra) else { continue };
                let Ok(mut schedule) = Schedule::new(&self.merged, Run { memory_bytes, threads, ..run }) else {
                    continue;
                };
                schedule.memory.push((format!("factors of a module ({threads} threads)"), search));
                schedule.memory.push(("changed weights of a module, or a part of them".into(), 4 * elements));
                schedule.memory_limit = run.memory_bytes;
                schedule.held_elements = elements;
                self.passes(output, &mut schedule.passes);
                return Ok(schedule);
            }
        }
        let (search, module) = self.memory(1);
        let smallest = Schedule::smallest_memory(&self.merged) + search + 4 * fewest;
        Err(Error::usage(format!(
            "--memory {} bytes is too little for this plan: at least {smallest} bytes are needed",
            run.memory_bytes
        ))
        .help(format!(
            "use --memory {}MB or more, or a smaller --rank: the factors of \"{}\" take {search} bytes",
            smallest.div_ceil(1_000_000),
            printable(module)
        )))
    }

    /// What is written are the factors.
    fn passes(&self, output: &Plan, passes: &mut [PassSummary]) {
        let written = output.layout.shards.iter().map(|shard| shard.bytes).sum();
        for pass in passes.iter_mut().filter(|pass| pass.name == "merge") {
            *pass = PassSummary {
                name: "factor",
                purpose: "merge module by module, again for each round where not all of it is held",
                bytes_written: written,
                ..pass.clone()
            };
        }
    }
}

impl Plan {
    /// The plan that merges: this one, or that of the changes whose factors this one writes.
    pub fn merging(&self) -> &Plan {
        self.factors.as_ref().map_or(self, |factored| &factored.merged)
    }

    /// Turns a plan of the changes (this one and `merged` are of the same recipe) into one of their factors.
    pub(super) fn factored(mut self, merged: Plan, changes: Changes) -> Result<Plan> {
        let Changes { mut modules, rank, config, .. } = changes;
        let place = |name: &str| merged.tensors.iter().position(|tensor| *tensor.name == *name);
        modules.sort_by_cached_key(|module| place(&module.name));
        let like = self.checkpoints[self.first_model].clone();
        let number = self.checkpoints.len() as u32;
        let float = self.recipe.dtype;
        let (mut tensors, mut entries) = (Vec::new(), Vec::new());
        for module in &modules {
            let dtype = float.map_or(module.dtype, |float| float.dtype());
            for factor in [&module.a, &module.b] {
                let elements = factor.shape.iter().product();
                let source = Piece { checkpoint: number, entry: entries.len() as u32 };
                entries.push(TensorEntry {
                    name: factor.name.clone(),
                    dtype,
                    shape: factor.shape.clone(),
                    file: 0,
                    offset: 0,
                    bytes: elements * dtype.bitsize() as u64 / 8,
                });
                tensors.push(PlannedTensor {
                    name: factor.name.clone(),
                    shape: factor.shape.clone(),
                    elements,
                    dtype,
                    action: Action::Copy { source, compared: Box::default() },
                    params: 0,
                });
            }
        }
        self.layout = Layout::adapter(tensors.iter().map(super::build::output_tensor))?;
        self.tensors = tensors;
        // Stands for files that there are none of: whether the first adapter changes is watched in its place.
        let file = CheckpointFile { file: Arc::clone(&like.files[0].file), header_bytes: 0, header_hash: [0; 32] };
        self.checkpoints.push(Checkpoint {
            spec: "factors".into(),
            dir: like.dir,
            hub: None,
            files: vec![file],
            tensors: entries,
            warnings: Vec::new(),
            derived: Derived::default(),
        });
        self.trim = None;
        self.factors = Some(Box::new(Factored { merged, modules, rank, config }));
        Ok(self)
    }
}
