//! What one thread does to one chunk: load, sketch, trim, merge, settle exceptions, encode.
//!
//! - Buffers are allocated once per worker, from the schedule's numbers, and reused for every chunk.
//! - Inputs stay in their stored type; tiles of about a thousand elements (or whole rows) are widened to f32, so that all arithmetic
//!   happens in the first-level cache.
//! - A chunk's result depends on the plan, the cuts and the chunk's own bytes: never on the worker or its history.

use std::sync::Arc;

use super::Observer;
use super::cut::{Cut, TieCounts};
use super::exceptions::{narrow, no_weight};
use super::reads::Reads;
use super::scaled::Unscaled;
use super::slot::{Loaded, Slot, Span};
use super::spool::Packer;
use super::stored::Short;
use crate::dtype::Float;
use crate::error::Result;
use crate::kernels::{self, Isa, Ties};
use crate::limits::{OUT_ELEMENTS, SAMPLE_BLOCK, SAMPLE_ELEMENTS, SMALL_UNIT_ELEMENTS};
use crate::method::{Inputs, Look, Merger, Tile};
use crate::plan::near_keys;
use crate::plan::{Chunk, Piece, Plan, Schedule};
use crate::sketch::{Bracket, MagnitudeSketch, NearKeys};

/// What a worker counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Tally {
    /// Per model: survivors of the trim that are not zero.
    pub kept: Vec<u64>,
    /// Per model: those of them with the smallest key that survives, where that is a guess.
    pub tied: Vec<u64>,
    /// Per model: survivors whose sign is that of the merged task vector.
    pub agreeing: Vec<u64>,
    /// Elements whose survivors disagree in sign.
    pub conflicts: u64,
    /// Merged elements.
    pub merged: u64,
    /// Tensor bytes loaded.
    pub bytes_read: u64,
}

impl Tally {
    /// Nothing, of so many models.
    pub(super) fn of(models: usize) -> Self {
        let none = vec![0; models];
        Self { kept: none.clone(), tied: none.clone(), agreeing: none, ..Self::default() }
    }

    /// What was counted after `then`.
    pub(super) fn since(&self, then: &Self) -> Self {
        let Self { kept, tied, agreeing, conflicts, merged, bytes_read } = self;
        let since = |now: &[u64], then: &[u64]| now.iter().zip(then).map(|(now, then)| now - then).collect();
        Self {
            kept: since(kept, &then.kept),
            tied: since(tied, &then.tied),
            agreeing: since(agreeing, &then.agreeing),
            conflicts: conflicts - then.conflicts,
            merged: merged - then.merged,
            bytes_read: bytes_read - then.bytes_read,
        }
    }

    /// Adds what was counted elsewhere.
    pub(super) fn add(&mut self, other: &Self) {
        self.merged += other.merged;
        self.conflicts += other.conflicts;
        self.bytes_read = self.bytes_read.saturating_add(other.bytes_read);
        let add = |sum: &mut [u64], counts: &[u64]| sum.iter_mut().zip(counts).for_each(|(sum, n)| *sum += n);
        add(&mut self.kept, &other.kept);
        add(&mut self.tied, &other.tied);
        add(&mut self.agreeing, &other.agreeing);
    }
}

/// f32 views of one tile.
pub(super) struct Tiles {
    pub base: Vec<f32>,
    pub inputs: Vec<Vec<f32>>,
    pub oracle: Vec<f32>,
    /// What each model has besides its weights.
    pub statistics: Vec<Vec<f32>>,
    pub out: Vec<f32>,
    pub scratch: Vec<f32>,
    /// Elements of the tile that some non-finite input takes out of the merge.
    pub exempt: Vec<bool>,
}

/// One thread's buffers and counts.
pub(super) struct Worker {
    pub isa: Isa,
    /// The worker's own windows, for chunks that nobody holds in memory.
    pub slot: Slot,
    pub tiles: Tiles,
    pub weights: Vec<f32>,
    /// Per model: what its trimmed task vector is multiplied by; empty where nothing is.
    scales: Vec<f32>,
    encoded: Vec<u8>,
    /// One sketch per model, where the plan trims.
    pub sketches: Vec<MagnitudeSketch>,
    keys: Vec<u32>,
    /// The entries of a row in order of magnitude, for methods that rank them.
    order: Vec<u64>,
    /// One list per model, where thresholds are selected in memory.
    pub near: Vec<NearKeys>,
    near_keys: usize,
    pub tally: Tally,
    /// The tally when the current chunk was begun.
    mark: Tally,
    /// What several outputs of a chunk have in common.
    pub unscaled: Unscaled,
    /// Buffers for what is kept on the local disk, once they are needed.
    pub packer: Option<Box<Packer>>,
    /// Reads are not counted: they replace what an earlier attempt of this run had in memory.
    pub rereads: bool,
    /// What is told of reads, where inputs are hashed.
    pub reads: Option<Arc<Reads>>,
}

/// What was found out about a unit before it is merged.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// See [`Tile::majority`].
    pub majority: f32,
    /// See [`Tile::facts`].
    pub facts: Vec<f64>,
}

/// One of the ways in which a merger merges a tile.
pub(super) type MergeTile = fn(&(dyn Merger + 'static), &Tile<'_>, &mut [f32], &mut [f32]);

/// Where a worker's results go: (offset in the tensor in bytes, encoded bytes).
pub(super) type Sink<'a> = &'a mut dyn FnMut(u64, &[u8]) -> Result<()>;

impl Worker {
    pub(super) fn new(plan: &Plan, schedule: &Schedule) -> Self {
        let longest = (0..plan.tensors.len() as u32).map(|tensor| plan.tile(tensor)).max().unwrap_or(0);
        let tile = || vec![0.0f32; longest];
        let out_width = plan.tensors.iter().filter_map(|t| Float::from_dtype(t.dtype)).map(Float::width).max();
        let out_elements = OUT_ELEMENTS.min(schedule.slot_elements.max(1)) as usize;
        Self {
            isa: Isa::detect(),
            slot: Slot::new(&schedule.widths, schedule.slot_elements),
            tiles: Tiles {
                base: tile(),
                inputs: (0..plan.models()).map(|_| tile()).collect(),
                oracle: tile(),
                statistics: (plan.models()..plan.tile_columns()).map(|_| tile()).collect(),
                out: tile(),
                scratch: tile(),
                exempt: vec![false; longest],
            },
            weights: Vec::with_capacity(plan.models()),
            scales: Vec::new(),
            encoded: vec![0; out_elements * out_width.unwrap_or(1)],
            sketches: Vec::new(),
            keys: Vec::new(),
            order: Vec::with_capacity(if plan.needs().rows { longest } else { 0 }),
            near: Vec::new(),
            near_keys: near_keys(schedule.slot_elements) as usize,
            tally: Tally::of(plan.models()),
            mark: Tally::of(plan.models()),
            unscaled: Unscaled::default(),
            packer: None,
            rereads: false,
            reads: None,
        }
    }

    /// Tells `reads` of what it loads.
    pub(super) fn telling(self, reads: Option<Arc<Reads>>) -> Self {
        Self { reads, ..self }
    }

    /// Makes room for the work of `plan` too.
    pub(super) fn fit(&mut self, plan: &Plan, schedule: &Schedule) {
        let other = Self::new(plan, schedule);
        let longer = |own: &mut Vec<f32>, other: Vec<f32>| own.resize(own.len().max(other.len()), 0.0);
        let Tiles { base, inputs, oracle, statistics, out, scratch, exempt } = &mut self.tiles;
        for (own, other) in [
            (base, other.tiles.base),
            (oracle, other.tiles.oracle),
            (out, other.tiles.out),
            (scratch, other.tiles.scratch),
        ] {
            longer(own, other);
        }
        exempt.resize(exempt.len().max(other.tiles.exempt.len()), false);
        inputs.resize_with(inputs.len().max(other.tiles.inputs.len()), Vec::new);
        inputs.iter_mut().zip(other.tiles.inputs).for_each(|(own, other)| longer(own, other));
        statistics.resize_with(statistics.len().max(other.tiles.statistics.len()), Vec::new);
        statistics.iter_mut().zip(other.tiles.statistics).for_each(|(own, other)| longer(own, other));
        self.encoded.resize(self.encoded.len().max(other.encoded.len()), 0);
    }

    /// Begins a chunk: what is counted from here on is its own.
    pub(super) fn begin(&mut self) {
        self.mark.clone_from(&self.tally);
        self.scales.clear();
    }

    /// What was counted for the current chunk.
    pub(super) fn counted(&self) -> Tally {
        self.tally.since(&self.mark)
    }

    /// Loads `pieces` of `chunk` into the worker's own windows and runs `work` on them.
    pub(super) fn load(
        &mut self,
        plan: &Plan,
        chunk: Chunk,
        pieces: impl Iterator<Item = Piece>,
        observer: &dyn Observer,
        work: impl FnOnce(&mut Self, Loaded<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut slot = std::mem::take(&mut self.slot);
        let result = self.load_into(&mut slot, plan, chunk, pieces, observer);
        let result = result.and_then(|()| work(self, Loaded { plan, chunk, slot: &slot }));
        self.slot = slot;
        result
    }

    /// Loads `pieces` of `chunk` into `slot`.
    pub(super) fn load_into(
        &mut self,
        slot: &mut Slot,
        plan: &Plan,
        chunk: Chunk,
        pieces: impl Iterator<Item = Piece>,
        observer: &dyn Observer,
    ) -> Result<()> {
        observer.go_on()?;
        self.begin();
        let bytes = slot.load(plan, chunk, pieces, self.reads.as_deref())?;
        self.tally.bytes_read += if self.rereads { 0 } else { bytes };
        observer.advance(bytes);
        Ok(())
    }

    /// Gives every model's sketch its bracket; models without one are not sketched.
    pub(super) fn set_brackets(&mut self, brackets: &[Option<Bracket>]) {
        self.sketches.resize_with(brackets.len(), || MagnitudeSketch::new(Bracket::NONE));
        for (sketch, bracket) in self.sketches.iter_mut().zip(brackets) {
            sketch.reset(bracket.unwrap_or(Bracket::NONE));
        }
    }

    /// Counts the magnitudes of the chunk's task vectors in the sketches of the models that have a bracket.
    pub(super) fn sketch(&mut self, data: Loaded<'_>, brackets: &[Option<Bracket>]) -> Result<()> {
        let models = data.merge().models;
        for span in data.tiles() {
            self.load_base(span);
            for (turn, &(model, piece)) in (0..).step_by(2).zip(models) {
                span.ask_ahead(turn, 2 * models.len());
                let own = || searches(brackets, model, data.plan.models());
                if own().next().is_some() {
                    self.task_vector(span, (model as usize, piece))?;
                }
                span.ask_ahead(turn + 1, 2 * models.len());
                for at in own() {
                    self.sketches[at].add(self.isa, &self.tiles.inputs[model as usize][..span.length]);
                }
            }
        }
        Ok(())
    }

    /// Lists the keys of the chunk's task vectors about the bounds of the models that have any.
    pub(super) fn list_near(&mut self, data: Loaded<'_>, bounds: &[Option<(u32, u32)>]) -> Result<()> {
        let capacity = self.near_keys;
        self.near.resize_with(bounds.len(), || NearKeys::with_capacity(capacity));
        for (near, bounds) in self.near.iter_mut().zip(bounds) {
            bounds.iter().for_each(|&(low, high)| near.reset(low, high));
        }
        let models = data.merge().models;
        for span in data.tiles() {
            self.load_base(span);
            for (turn, &(model, piece)) in (0..).step_by(2).zip(models) {
                span.ask_ahead(turn, 2 * models.len());
                let own = || searches(bounds, model, data.plan.models());
                if own().next().is_some() {
                    self.task_vector(span, (model as usize, piece))?;
                }
                span.ask_ahead(turn + 1, 2 * models.len());
                for at in own() {
                    self.near[at].add(self.isa, &self.tiles.inputs[model as usize][..span.length]);
                }
            }
        }
        Ok(())
    }

    /// The keys of `model`'s task vector in all of the chunk, or in a block of every `stride`-th tile of it, for selection in
    /// memory. `ordinal` counts the chunks of a unit, so that many short ones are sampled evenly too.
    pub(super) fn keys(
        &mut self,
        data: Loaded<'_>,
        model: (usize, Piece),
        (ordinal, stride): (usize, Option<usize>),
    ) -> Result<&mut Vec<u32>> {
        self.keys.clear();
        self.keys.reserve_exact(SMALL_UNIT_ELEMENTS.max(SAMPLE_ELEMENTS).min(data.chunk.count) as usize);
        let step = stride.unwrap_or(1);
        let first = (step - ordinal % step) % step;
        for (nth, mut span) in data.tiles().skip(first).step_by(step).enumerate() {
            if stride.is_some() {
                span.shorten(SAMPLE_BLOCK, ordinal + nth);
            }
            self.load_base(span);
            self.task_vector(span, model)?;
            self.keys.extend(self.tiles.inputs[model.0][..span.length].iter().copied().map(kernels::key));
        }
        Ok(&mut self.keys)
    }

    /// Counts, per cut, the entries of the chunk that are tied with a threshold whose ties are kept by position.
    pub(super) fn count_ties(&mut self, data: Loaded<'_>, cuts: &[Cut]) -> Result<TieCounts> {
        let mut counts = vec![0; cuts.len()];
        for span in data.tiles() {
            self.load_base(span);
            for &(model, piece) in span.data.merge().models {
                let own = || (model as usize..cuts.len()).step_by(data.plan.models());
                let ties = |at: usize| if let Cut::Lowest { ties, .. } = cuts[at] { Some((at, ties)) } else { None };
                if own().any(|at| ties(at).is_some()) {
                    self.task_vector(span, (model as usize, piece))?;
                }
                for (at, ties) in own().filter_map(ties) {
                    counts[at] +=
                        kernels::count_ties(self.isa, &self.tiles.inputs[model as usize][..span.length], ties);
                }
            }
        }
        Ok(counts)
    }

    /// Sum of the elected signs over the chunk; `facts` as in [`Known::facts`].
    pub(super) fn vote(&mut self, data: Loaded<'_>, cuts: &[Cut], seen: &mut TieCounts, facts: &[f64]) -> Result<i64> {
        let mut sum = 0;
        // Survivors are counted once, when they are merged.
        let kept = self.tally.kept.clone();
        self.set_weights(data);
        self.set_scales(data, facts);
        for span in data.tiles() {
            self.load_inputs(span, cuts, seen)?;
            let Tiles { inputs, oracle, scratch, .. } = &mut self.tiles;
            let merge = span.data.merge();
            with_refs(inputs, merge.models, span.length, |inputs| {
                let oracle = merge.oracle.is_some().then_some(&oracle[..span.length]);
                let weights = &self.weights;
                let (isa, row) = (self.isa, data.row());
                let tile = Tile { isa, inputs, weights, statistics: &[], oracle, majority: 0.0, facts: &[], row };
                sum += data.plan.params_of(data.chunk.tensor).merger.sum_of_signs(&tile, &mut scratch[..span.length]);
            });
        }
        self.tally.kept = kept;
        Ok(sum)
    }

    /// Merges the chunk and hands the encoded result to `sink`, piece by piece.
    pub(super) fn merge(
        &mut self,
        data: Loaded<'_>,
        cuts: &[Cut],
        seen: &mut TieCounts,
        known: &Known,
        sink: Sink<'_>,
    ) -> Result<()> {
        self.set_weights(data);
        self.set_scales(data, &known.facts);
        let short = Short::of(data, cuts, &self.weights, known.majority);
        let go_short = |worker: &mut Self, span: Span<'_>, encoded: &mut [u8]| {
            short.as_ref().is_some_and(|short| worker.merge_short(span, short, encoded))
        };
        self.in_blocks(data, sink, go_short, |worker, span, encoded| {
            if go_short(worker, span, encoded) {
                return Ok(());
            }
            let clean = worker.load_inputs(span, cuts, seen)?;
            worker.combine(span, known, Merger::merge);
            worker.finish(span, clean, encoded)
        })?;
        self.tally.merged += data.chunk.count;
        Ok(())
    }

    /// Converts a chunk of a copied tensor to the output type.
    pub(super) fn convert(&mut self, data: Loaded<'_>, source: Piece, sink: Sink<'_>) -> Result<()> {
        let float = data.output();
        self.in_blocks(
            data,
            sink,
            |_, _, _| false,
            |worker, span, encoded| {
                let (stored, bytes) = span.stored(source);
                let out = &mut worker.tiles.out[..span.length];
                if stored == Float::F64 {
                    for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<8>().0) {
                        *value = narrow(f64::from_le_bytes(*bytes), float);
                    }
                } else {
                    kernels::load(worker.isa, stored, bytes, out);
                }
                // What was not finite before the conversion did not overflow in it.
                for (i, exempt) in worker.tiles.exempt[..span.length].iter_mut().enumerate() {
                    *exempt = !out[i].is_finite() && !span.value(source, i).is_finite();
                }
                worker.encode(span, encoded)
            },
        )
    }

    /// Hands a chunk of a tensor that is copied as it is to `sink`; false if a `compared` version differs.
    pub(super) fn copy(
        &self,
        slot: &Slot,
        source: Piece,
        compared: &[Piece],
        sink: Sink<'_>,
        start: u64,
    ) -> Result<bool> {
        let bytes = slot.bytes(source);
        sink(start, bytes)?;
        Ok(compared.iter().all(|&piece| slot.bytes(piece) == bytes))
    }

    /// Passes on the chunk in blocks of [`OUT_ELEMENTS`]: encoded by `whole` or, where that says no, tile by tile.
    pub(super) fn in_blocks(
        &mut self,
        data: Loaded<'_>,
        sink: Sink<'_>,
        mut whole: impl FnMut(&mut Self, Span<'_>, &mut [u8]) -> bool,
        mut tile: impl FnMut(&mut Self, Span<'_>, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let (chunk, width) = (data.chunk, data.output().width());
        let mut encoded = std::mem::take(&mut self.encoded);
        let block = OUT_ELEMENTS.min((encoded.len() / width) as u64).max(1);
        let (mut start, mut result) = (0, Ok(()));
        while start < chunk.count && result.is_ok() {
            let count = data.plan.aligned(chunk.tensor, chunk.start + start, block).min(chunk.count - start);
            let block = &mut encoded[..count as usize * width];
            let span = Span { data, from: start as usize, length: count as usize };
            if !whole(self, span, block) {
                let spans = data.tiles_of(span.from..span.from + span.length);
                let mut tiles = spans.zip(block.chunks_mut(data.tile() * width));
                result = tiles.try_for_each(|(span, encoded)| tile(self, span, encoded));
            }
            result = result.and_then(|()| sink((chunk.start + start) * width as u64, block));
            start += count;
        }
        self.encoded = encoded;
        result
    }

    pub(super) fn set_weights(&mut self, data: Loaded<'_>) {
        self.weights.clear();
        let weights = &data.plan.params_of(data.chunk.tensor).weights;
        self.weights.extend(data.merge().models.iter().map(|&(model, _)| weights[model as usize]));
    }

    /// Takes over the factors that looks at the tensor found, where thresholds decide what is kept: draws have theirs in
    /// their cuts.
    pub(super) fn set_scales(&mut self, data: Loaded<'_>, facts: &[f64]) {
        self.scales.clear();
        if data.plan.selects() && data.plan.needs().looks.contains(&Look::Magnitudes) {
            self.scales.resize(data.plan.models(), 1.0);
            for (&(model, _), &factor) in data.merge().models.iter().zip(facts) {
                self.scales[model as usize] = factor as f32;
            }
        }
    }

    pub(super) fn load_base(&mut self, span: Span<'_>) {
        if let Some(piece) = span.data.merge().base {
            let (float, bytes) = span.stored(piece);
            kernels::load(self.isa, float, bytes, &mut self.tiles.base[..span.length]);
        }
    }

    /// τ of one model into its input tile, finite everywhere: what is not finite is an error or, where the recipe says
    /// otherwise, zero. The base tile must be loaded. Returns whether all was finite.
    pub(super) fn task_vector(&mut self, span: Span<'_>, (model, piece): (usize, Piece)) -> Result<bool> {
        let Tiles { base, inputs, .. } = &mut self.tiles;
        let finite = subtract(self.isa, span, piece, base, &mut inputs[model][..span.length]);
        if !finite {
            self.settle_input(span, (model, piece))?;
        }
        Ok(finite)
    }

    /// τ̂ of one model into its input tile, counting survivors; otherwise like [`Self::task_vector`].
    pub(super) fn trimmed_task_vector(
        &mut self,
        span: Span<'_>,
        model: (usize, Piece),
        cuts: &[Cut],
        seen: &mut [u64],
    ) -> Result<bool> {
        let finite = self.cut_task_vector(span, model, cuts, seen)?;
        if let Some(&scale) = self.scales.get(model.0) {
            kernels::scale(self.isa, &mut self.tiles.inputs[model.0][..span.length], scale);
        }
        Ok(finite)
    }

    fn cut_task_vector(
        &mut self,
        span: Span<'_>,
        (model, piece): (usize, Piece),
        cuts: &[Cut],
        seen: &mut [u64],
    ) -> Result<bool> {
        let cut = &cuts[model];
        let at = span.data.plan.models() + model;
        let outliers = cuts.get(at).filter(|cut| **cut != Cut::Nothing);
        let base = span.data.merge().base.expect("task vectors need a base");
        let (float, bytes) = span.stored(piece);
        let narrow = float != Float::F64 && span.data.float(base) != Float::F64;
        if let Some(min_key) = cut.min_key().filter(|_| narrow && outliers.is_none()) {
            let Tiles { base, inputs, .. } = &mut self.tiles;
            let tau = &mut inputs[model][..span.length];
            if let Some(kept) = kernels::trimmed_task_vector(self.isa, float, bytes, &base[..span.length], min_key, tau)
            {
                self.tally.kept[model] += kept;
                return Ok(true);
            }
        }
        let finite = self.task_vector(span, (model, piece))?;
        let Tiles { inputs, out, .. } = &mut self.tiles;
        let (tau, dropped) = (&mut inputs[model][..span.length], &mut out[..span.length]);
        let first = span.element(0);
        // Outliers are told apart in the whole task vector; the out tile is free until the merge.
        if let Some(outliers) = outliers {
            dropped.copy_from_slice(tau);
            outliers.apply(self.isa, dropped, first, &mut seen[at]);
        }
        if let Cut::Guess { min_key } = *cut {
            self.tally.tied[model] += kernels::count_ties(self.isa, tau, Ties { low: min_key, high: min_key });
        }
        let mut kept = match cut {
            Cut::Ranked(ranked) => {
                let rows = (first..).step_by(span.data.row()).zip(tau.chunks_mut(span.data.row()));
                rows.map(|(first, row)| ranked.apply(row, first, &mut self.order)).sum()
            }
            _ => cut.apply(self.isa, tau, first, &mut seen[model]),
        };
        if outliers.is_some() {
            kept = kernels::drop_where(self.isa, tau, dropped);
        }
        self.tally.kept[model] += kept;
        Ok(finite)
    }

    /// Fills base, input (trimmed, where the method asks for that) and oracle tiles; returns whether every input was
    /// finite.
    pub(super) fn load_inputs(&mut self, span: Span<'_>, cuts: &[Cut], seen: &mut TieCounts) -> Result<bool> {
        let merge = span.data.merge();
        self.load_base(span);
        let mut clean = true;
        for (turn, &(model, piece)) in merge.models.iter().enumerate() {
            span.ask_ahead(turn, merge.models.len());
            let model = model as usize;
            clean &= match span.data.plan.needs().inputs {
                Inputs::Weights => {
                    let (float, bytes) = span.stored(piece);
                    let input = &mut self.tiles.inputs[model][..span.length];
                    kernels::load(self.isa, float, bytes, input);
                    let finite = kernels::all_finite(self.isa, input);
                    if !finite {
                        self.settle_input(span, (model, piece))?;
                    }
                    finite
                }
                Inputs::TaskVectors => self.task_vector(span, (model, piece))?,
                Inputs::TrimmedTaskVectors => self.trimmed_task_vector(span, (model, piece), cuts, seen)?,
            };
        }
        if let Some(piece) = merge.oracle {
            clean &= self.load_oracle(span, piece)?;
        }
        for (&(model, _), &piece) in merge.models.iter().zip(merge.statistics) {
            let (float, bytes) = span.stored(piece);
            let tile = &mut self.tiles.statistics[model as usize][..span.length];
            kernels::load(self.isa, float, bytes, tile);
            if !kernels::all_weights(self.isa, tile) {
                return Err(no_weight(span, piece, model));
            }
        }
        Ok(clean)
    }

    /// Fills the oracle tile with the signs of the oracle's task vector; returns whether all of it was finite.
    fn load_oracle(&mut self, span: Span<'_>, piece: Piece) -> Result<bool> {
        let Tiles { base, scratch, .. } = &mut self.tiles;
        let tau = &mut scratch[..span.length];
        let finite = subtract(self.isa, span, piece, base, tau);
        if !finite {
            self.settle_oracle(span, piece)?;
        }
        let Tiles { oracle, scratch, .. } = &mut self.tiles;
        kernels::sign_of(self.isa, &scratch[..span.length], &mut oracle[..span.length]);
        Ok(finite)
    }

    /// Runs the method on the input tiles, by `merge` of its merger; the result is in the out tile.
    pub(super) fn combine(&mut self, span: Span<'_>, known: &Known, merge_tile: MergeTile) {
        let (merge, length) = (span.data.merge(), span.length);
        let merger = &span.data.plan.params_of(span.data.chunk.tensor).merger;
        let Tiles { inputs, statistics, oracle, out, scratch, .. } = &mut self.tiles;
        let described = if merge.statistics.is_empty() { &[] } else { merge.models };
        with_refs(inputs, merge.models, length, |inputs| {
            if span.data.plan.needs().inputs != Inputs::Weights {
                self.tally.conflicts += kernels::conflicts(self.isa, inputs);
            }
            let oracle = merge.oracle.is_some().then_some(&oracle[..length]);
            let (isa, weights, row) = (self.isa, &self.weights[..], span.data.row());
            let Known { majority, facts } = known;
            with_refs(statistics, described, length, |statistics| {
                let tile = Tile { isa, inputs, weights, statistics, oracle, majority: *majority, facts, row };
                merge_tile(&**merger, &tile, &mut out[..length], &mut scratch[..length]);
            });
            if span.data.plan.needs().inputs != Inputs::Weights {
                for (&(model, _), input) in merge.models.iter().zip(inputs) {
                    self.tally.agreeing[model as usize] += kernels::agreeing(self.isa, input, &out[..length]);
                }
            }
        });
    }

    /// From the method's result to encoded output: adds base, settles elements with non-finite inputs, encodes.
    pub(super) fn finish(&mut self, span: Span<'_>, clean: bool, encoded: &mut [u8]) -> Result<()> {
        let float = span.data.output();
        let delta = span.data.plan.needs().inputs != Inputs::Weights;
        let base = span.data.merge().base.filter(|_| delta).map(|piece| span.stored(piece));
        self.tiles.exempt[..span.length].fill(false);
        let Tiles { base: base_tile, out, .. } = &mut self.tiles;
        let out = &mut out[..span.length];
        match base {
            // Base has more digits than f32: the sum is taken in f64, and rounded once.
            Some((Float::F64, base)) if float == Float::F64 => return self.finish_f64(span, clean, base, encoded),
            Some((Float::F64, base)) => {
                for (value, base) in out.iter_mut().zip(base.as_chunks::<8>().0) {
                    *value = narrow(f64::from_le_bytes(*base) + f64::from(*value), float);
                }
            }
            Some(_) => kernels::add(self.isa, out, &base_tile[..span.length]),
            None => {}
        }
        if !clean {
            self.settle_exempt(span);
        }
        self.encode(span, encoded)
    }
}

/// τ of `piece` into `out`; `base` is the base tile. Returns whether all of it is finite.
pub(super) fn subtract(isa: Isa, span: Span<'_>, piece: Piece, base: &[f32], out: &mut [f32]) -> bool {
    let base_piece = span.data.merge().base.expect("task vectors need a base");
    let (float, bytes) = span.stored(piece);
    let (base_float, base_bytes) = span.stored(base_piece);
    if float == Float::F64 || base_float == Float::F64 {
        kernels::task_vector_f64(isa, float, bytes, base_float, base_bytes, out);
        kernels::all_finite(isa, out)
    } else {
        kernels::task_vector(isa, float, bytes, &base[..span.length], out)
    }
}

/// The searches of `model` that go on, where each has an entry in `all`.
fn searches<T>(all: &[Option<T>], model: u32, models: usize) -> impl Iterator<Item = usize> + '_ {
    (model as usize..all.len()).step_by(models).filter(|&at| all[at].is_some())
}

/// Calls `f` with the first `length` elements of the tiles of `models`, without allocating.
pub(super) fn with_refs<R>(
    tiles: &[Vec<f32>],
    models: &[(u32, Piece)],
    length: usize,
    f: impl FnOnce(&[&[f32]]) -> R,
) -> R {
    let mut refs = [&[][..]; crate::limits::MAX_MODELS];
    for (slot, &(model, _)) in refs.iter_mut().zip(models) {
        *slot = &tiles[model as usize][..length];
    }
    f(&refs[..models.len()])
}
