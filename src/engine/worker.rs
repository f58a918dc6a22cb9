//! What one thread does to one chunk: load, sketch, trim, merge, settle exceptions, encode.
//!
//! - Buffers are allocated once per worker, from the schedule's numbers, and reused for every chunk.
//! - Inputs stay in their stored type; tiles of [`TILE_ELEMENTS`] elements are widened to f32, so that all arithmetic
//!   happens in the first-level cache.
//! - A chunk's result depends on the plan, the cuts and the chunk's own bytes: never on the worker or its history.

use super::cut::{Cut, TieCounts};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::kernels::{self, Isa};
use crate::limits::{OUT_ELEMENTS, SMALL_UNIT_ELEMENTS, TILE_ELEMENTS};
use crate::method::{Inputs, Tile};
use crate::plan::{Action, Chunk, Piece, Plan, Schedule};
use crate::plan::{NonFinite, Overflow, near_keys};
use crate::sketch::{Bracket, MagnitudeSketch, NearKeys};
use crate::storage::Window;

/// Windows on one chunk of every checkpoint.
#[derive(Default)]
pub(super) struct Slot {
    windows: Vec<Window>,
}

impl Slot {
    /// Windows that hold `elements` elements of each checkpoint's widest type.
    pub(super) fn new(widths: &[u64], elements: u64) -> Self {
        Self { windows: widths.iter().map(|&w| Window::with_capacity((w * elements) as usize)).collect() }
    }

    /// Windows that hold exactly `chunk`.
    pub(super) fn for_chunk(plan: &Plan, chunk: Chunk) -> Self {
        let mut bytes = vec![0; plan.checkpoints.len()];
        for piece in plan.pieces(chunk.tensor, true) {
            bytes[piece.checkpoint as usize] = locate(plan, chunk, piece).2;
        }
        Self { windows: bytes.into_iter().map(|b| Window::with_capacity(b as usize)).collect() }
    }

    /// Loads `pieces` of `chunk`; returns the bytes loaded.
    pub(super) fn load(&mut self, plan: &Plan, chunk: Chunk, pieces: impl Iterator<Item = Piece>) -> Result<u64> {
        let mut total = 0;
        for piece in pieces {
            let (file, offset, bytes) = locate(plan, chunk, piece);
            file.load(&mut self.windows[piece.checkpoint as usize], offset, bytes as usize)
                .map_err(|e| e.tensor(&plan.tensors[chunk.tensor as usize].name))?;
            total += bytes;
        }
        Ok(total)
    }

    fn bytes(&self, piece: Piece) -> &[u8] {
        self.windows[piece.checkpoint as usize].bytes()
    }

    /// The bytes of elements `[from, from + length)` of the chunk in `piece`.
    fn tile(&self, plan: &Plan, piece: Piece, from: usize, length: usize) -> (Float, &[u8]) {
        let float = float_of(plan, piece);
        (float, &self.bytes(piece)[from * float.width()..(from + length) * float.width()])
    }
}

/// Where `chunk` of `piece` lies: file, offset and length in bytes.
pub(super) fn locate(plan: &Plan, chunk: Chunk, piece: Piece) -> (&dyn crate::storage::InputFile, u64, u64) {
    let (entry, file) = plan.source(piece);
    let width = if plan.is_raw_copy(chunk.tensor) { 1 } else { plan.float_width(piece) };
    (file, entry.offset + chunk.start * width, chunk.count * width)
}

fn float_of(plan: &Plan, piece: Piece) -> Float {
    Float::from_dtype(plan.source(piece).0.dtype).expect("the plan merges floats only")
}

/// What a worker counts.
#[derive(Debug, Clone, Default)]
pub(super) struct Tally {
    /// Per model: survivors of the trim that are not zero.
    pub kept: Vec<u64>,
    /// Elements whose survivors disagree in sign.
    pub conflicts: u64,
    /// Merged elements.
    pub merged: u64,
    /// Tensor bytes loaded.
    pub bytes_read: u64,
}

/// f32 views of one tile.
struct Tiles {
    base: Vec<f32>,
    inputs: Vec<Vec<f32>>,
    oracle: Vec<f32>,
    out: Vec<f32>,
    scratch: Vec<f32>,
    /// Elements of the tile that some non-finite input takes out of the merge.
    exempt: Vec<bool>,
}

/// One thread's buffers and counts.
pub(super) struct Worker {
    isa: Isa,
    /// The worker's own windows, for chunks that nobody holds in memory.
    pub slot: Slot,
    tiles: Tiles,
    weights: Vec<f32>,
    encoded: Vec<u8>,
    /// One sketch per model, where the plan trims.
    pub sketches: Vec<MagnitudeSketch>,
    keys: Vec<u32>,
    /// One list per model, where thresholds are selected in memory.
    pub near: Vec<NearKeys>,
    near_keys: usize,
    pub tally: Tally,
}

/// Where a worker's results go: (offset in the tensor in bytes, encoded bytes).
pub(super) type Sink<'a> = &'a mut dyn FnMut(u64, &[u8]) -> Result<()>;

impl Worker {
    pub(super) fn new(plan: &Plan, schedule: &Schedule) -> Self {
        let tile = || vec![0.0f32; TILE_ELEMENTS];
        let out_width = plan.tensors.iter().filter_map(|t| Float::from_dtype(t.dtype)).map(Float::width).max();
        let out_elements = OUT_ELEMENTS.min(schedule.slot_elements.max(1)) as usize;
        Self {
            isa: Isa::detect(),
            slot: Slot::new(&schedule.widths, schedule.slot_elements),
            tiles: Tiles {
                base: tile(),
                inputs: (0..plan.models()).map(|_| tile()).collect(),
                oracle: tile(),
                out: tile(),
                scratch: tile(),
                exempt: vec![false; TILE_ELEMENTS],
            },
            weights: Vec::with_capacity(plan.models()),
            encoded: vec![0; out_elements * out_width.unwrap_or(1)],
            sketches: Vec::new(),
            keys: Vec::new(),
            near: Vec::new(),
            near_keys: near_keys(schedule.slot_elements) as usize,
            tally: Tally { kept: vec![0; plan.models()], ..Tally::default() },
        }
    }

    /// Gives every model's sketch its bracket; models without one are not sketched.
    pub(super) fn set_brackets(&mut self, brackets: &[Option<Bracket>]) {
        self.sketches.resize_with(brackets.len(), || MagnitudeSketch::new(Bracket { low: 0, shift: 0, bins: 0 }));
        for (sketch, bracket) in self.sketches.iter_mut().zip(brackets) {
            sketch.reset(bracket.unwrap_or(Bracket { low: 0, shift: 0, bins: 0 }));
        }
    }

    /// Counts the magnitudes of the chunk's task vectors in the sketches of the models that have a bracket.
    pub(super) fn sketch(
        &mut self,
        plan: &Plan,
        chunk: Chunk,
        slot: &Slot,
        brackets: &[Option<Bracket>],
    ) -> Result<()> {
        for (from, length) in tiles(chunk) {
            self.load_base(plan, chunk, slot, from, length);
            for &(model, piece) in merged(plan, chunk).models {
                if brackets[model as usize].is_some() {
                    self.task_vector(plan, chunk, slot, (model as usize, piece), from, length)?;
                    let tau = &self.tiles.inputs[model as usize][..length];
                    self.sketches[model as usize].add(self.isa, tau);
                }
            }
        }
        Ok(())
    }

    /// Lists the keys of the chunk's task vectors about the bounds of the models that have any.
    pub(super) fn list_near(
        &mut self,
        plan: &Plan,
        chunk: Chunk,
        slot: &Slot,
        bounds: &[Option<(u32, u32)>],
    ) -> Result<()> {
        let capacity = self.near_keys;
        self.near.resize_with(bounds.len(), || NearKeys::with_capacity(capacity));
        for (near, bounds) in self.near.iter_mut().zip(bounds) {
            bounds.iter().for_each(|&(low, high)| near.reset(low, high));
        }
        for (from, length) in tiles(chunk) {
            self.load_base(plan, chunk, slot, from, length);
            for &(model, piece) in merged(plan, chunk).models {
                if bounds[model as usize].is_some() {
                    self.task_vector(plan, chunk, slot, (model as usize, piece), from, length)?;
                    self.near[model as usize].add(self.isa, &self.tiles.inputs[model as usize][..length]);
                }
            }
        }
        Ok(())
    }

    /// The keys of `model`'s task vector in every `stride`-th tile of the chunk (1 for all), for selection in memory.
    /// `ordinal` counts the chunks of a unit, so that many short ones are sampled evenly too.
    pub(super) fn keys(
        &mut self,
        plan: &Plan,
        chunk: Chunk,
        slot: &Slot,
        model: (usize, Piece),
        (ordinal, stride): (usize, usize),
    ) -> Result<&mut Vec<u32>> {
        self.keys.clear();
        self.keys.reserve_exact(SMALL_UNIT_ELEMENTS.min(chunk.count) as usize);
        let first = (stride - ordinal % stride) % stride;
        for (from, length) in tiles(chunk).skip(first).step_by(stride) {
            self.load_base(plan, chunk, slot, from, length);
            self.task_vector(plan, chunk, slot, model, from, length)?;
            self.keys.extend(self.tiles.inputs[model.0][..length].iter().copied().map(kernels::key));
        }
        Ok(&mut self.keys)
    }

    /// Counts, per model, the entries of the chunk that are tied with a threshold whose ties are kept by position.
    pub(super) fn count_ties(&mut self, plan: &Plan, chunk: Chunk, slot: &Slot, cuts: &[Cut]) -> Result<TieCounts> {
        let mut counts = vec![0; cuts.len()];
        for (from, length) in tiles(chunk) {
            self.load_base(plan, chunk, slot, from, length);
            for &(model, piece) in merged(plan, chunk).models {
                if let Cut::Lowest { ties, .. } = cuts[model as usize] {
                    self.task_vector(plan, chunk, slot, (model as usize, piece), from, length)?;
                    counts[model as usize] +=
                        kernels::count_ties(self.isa, &self.tiles.inputs[model as usize][..length], ties);
                }
            }
        }
        Ok(counts)
    }

    /// Sum of the elected signs over the chunk.
    pub(super) fn vote(
        &mut self,
        plan: &Plan,
        chunk: Chunk,
        slot: &Slot,
        cuts: &[Cut],
        seen: &mut TieCounts,
    ) -> Result<i64> {
        let mut sum = 0;
        // Survivors are counted once, when they are merged.
        let kept = self.tally.kept.clone();
        self.set_weights(plan, chunk);
        for (from, length) in tiles(chunk) {
            self.load_inputs(plan, chunk, slot, from, length)?;
            self.trim(plan, chunk, from, length, cuts, seen);
            let Tiles { inputs, oracle, scratch, .. } = &mut self.tiles;
            let merge = merged(plan, chunk);
            with_refs(inputs, merge.models, length, |inputs| {
                let oracle = merge.oracle.is_some().then_some(&oracle[..length]);
                let tile = Tile { isa: self.isa, inputs, weights: &self.weights, oracle, majority: 0.0 };
                sum += plan.params_of(chunk.tensor).merger.sum_of_signs(&tile, &mut scratch[..length]);
            });
        }
        self.tally.kept = kept;
        Ok(sum)
    }

    /// Merges the chunk and hands the encoded result to `sink`, piece by piece.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn merge(
        &mut self,
        plan: &Plan,
        chunk: Chunk,
        slot: &Slot,
        cuts: &[Cut],
        seen: &mut TieCounts,
        majority: f32,
        sink: Sink<'_>,
    ) -> Result<()> {
        let float = Float::from_dtype(plan.tensors[chunk.tensor as usize].dtype).expect("merged tensors are floats");
        self.set_weights(plan, chunk);
        self.in_blocks(plan, chunk, float, sink, |worker, from, length, encoded| {
            let clean = worker.load_inputs(plan, chunk, slot, from, length)?;
            worker.trim(plan, chunk, from, length, cuts, seen);
            worker.combine(plan, chunk, length, majority);
            worker.finish(plan, chunk, slot, (from, length), clean, encoded)
        })?;
        self.tally.merged += chunk.count;
        Ok(())
    }

    /// Converts a chunk of a copied tensor to the output type.
    pub(super) fn convert(
        &mut self,
        plan: &Plan,
        chunk: Chunk,
        slot: &Slot,
        source: Piece,
        sink: Sink<'_>,
    ) -> Result<()> {
        let float = Float::from_dtype(plan.tensors[chunk.tensor as usize].dtype).expect("only floats are converted");
        self.in_blocks(plan, chunk, float, sink, |worker, from, length, encoded| {
            let (stored, bytes) = slot.tile(plan, source, from, length);
            if stored == Float::F64 {
                for (value, bytes) in worker.tiles.out.iter_mut().zip(bytes.as_chunks::<8>().0) {
                    *value = narrow(f64::from_le_bytes(*bytes), float);
                }
            } else {
                kernels::load(worker.isa, stored, bytes, &mut worker.tiles.out[..length]);
            }
            // What was not finite before the conversion did not overflow in it.
            for (exempt, value) in worker.tiles.exempt.iter_mut().zip(&worker.tiles.out[..length]) {
                *exempt = !value.is_finite();
            }
            worker.encode(plan, chunk, from, length, float, encoded)
        })
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

    /// Calls `tile` for every tile of the chunk and passes on what it encoded in blocks of [`OUT_ELEMENTS`].
    fn in_blocks(
        &mut self,
        plan: &Plan,
        chunk: Chunk,
        float: Float,
        sink: Sink<'_>,
        mut tile: impl FnMut(&mut Self, usize, usize, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let width = float.width();
        let mut encoded = std::mem::take(&mut self.encoded);
        let block = OUT_ELEMENTS.min((encoded.len() / width) as u64).max(1);
        let (mut start, mut result) = (0, Ok(()));
        while start < chunk.count && result.is_ok() {
            let count = plan.aligned(chunk.tensor, chunk.start + start, block).min(chunk.count - start);
            let part = Chunk { start: 0, count, ..chunk };
            result = tiles(part)
                .try_for_each(|(from, length)| {
                    tile(self, start as usize + from, length, &mut encoded[from * width..(from + length) * width])
                })
                .and_then(|()| sink((chunk.start + start) * width as u64, &encoded[..count as usize * width]));
            start += count;
        }
        self.encoded = encoded;
        result
    }

    fn set_weights(&mut self, plan: &Plan, chunk: Chunk) {
        self.weights.clear();
        let weights = &plan.params_of(chunk.tensor).weights;
        self.weights.extend(merged(plan, chunk).models.iter().map(|&(model, _)| weights[model as usize]));
    }

    fn load_base(&mut self, plan: &Plan, chunk: Chunk, slot: &Slot, from: usize, length: usize) {
        if let Some(piece) = merged(plan, chunk).base {
            let (float, bytes) = slot.tile(plan, piece, from, length);
            kernels::load(self.isa, float, bytes, &mut self.tiles.base[..length]);
        }
    }

    /// τ of one model into its input tile, finite everywhere: what is not finite is an error or, where the recipe says
    /// otherwise, zero. The base tile must be loaded. Returns whether all was finite.
    fn task_vector(
        &mut self,
        plan: &Plan,
        chunk: Chunk,
        slot: &Slot,
        (model, piece): (usize, Piece),
        from: usize,
        length: usize,
    ) -> Result<bool> {
        let base = merged(plan, chunk).base.expect("task vectors need a base");
        let (float, bytes) = slot.tile(plan, piece, from, length);
        let (base_float, base_bytes) = slot.tile(plan, base, from, length);
        let tau = &mut self.tiles.inputs[model][..length];
        if float == Float::F64 || base_float == Float::F64 {
            kernels::task_vector_f64(self.isa, float, bytes, base_float, base_bytes, tau);
        } else {
            kernels::task_vector(self.isa, float, bytes, &self.tiles.base[..length], tau);
        }
        self.settle_input(plan, chunk, slot, model, from, length)
    }

    fn settle_input(
        &mut self,
        plan: &Plan,
        chunk: Chunk,
        slot: &Slot,
        model: usize,
        from: usize,
        length: usize,
    ) -> Result<bool> {
        let input = &mut self.tiles.inputs[model][..length];
        if kernels::all_finite(self.isa, input) {
            return Ok(true);
        }
        if plan.non_finite == NonFinite::Error {
            return Err(self.non_finite_error(plan, chunk, slot, from, length));
        }
        kernels::zero_non_finite(self.isa, input);
        Ok(false)
    }

    /// Fills base, input and oracle tiles; returns whether every input was finite.
    fn load_inputs(&mut self, plan: &Plan, chunk: Chunk, slot: &Slot, from: usize, length: usize) -> Result<bool> {
        let merge = merged(plan, chunk);
        self.load_base(plan, chunk, slot, from, length);
        let mut clean = true;
        for &(model, piece) in merge.models {
            clean &= if plan.needs().inputs == Inputs::Weights {
                let (float, bytes) = slot.tile(plan, piece, from, length);
                kernels::load(self.isa, float, bytes, &mut self.tiles.inputs[model as usize][..length]);
                self.settle_input(plan, chunk, slot, model as usize, from, length)?
            } else {
                self.task_vector(plan, chunk, slot, (model as usize, piece), from, length)?
            };
        }
        if let Some(piece) = merge.oracle {
            let (float, bytes) = slot.tile(plan, piece, from, length);
            let base = &self.tiles.base[..length];
            kernels::task_vector(self.isa, float, bytes, base, &mut self.tiles.scratch[..length]);
            if !kernels::all_finite(self.isa, &self.tiles.scratch[..length]) {
                if plan.non_finite == NonFinite::Error {
                    return Err(self.non_finite_error(plan, chunk, slot, from, length));
                }
                kernels::zero_non_finite(self.isa, &mut self.tiles.scratch[..length]);
                clean = false;
            }
            kernels::sign_of(self.isa, &self.tiles.scratch[..length], &mut self.tiles.oracle[..length]);
        }
        Ok(clean)
    }

    /// Trims the input tiles and counts survivors.
    fn trim(&mut self, plan: &Plan, chunk: Chunk, from: usize, length: usize, cuts: &[Cut], seen: &mut TieCounts) {
        if plan.needs().inputs != Inputs::TrimmedTaskVectors {
            return;
        }
        for &(model, _) in merged(plan, chunk).models {
            let model = model as usize;
            let tau = &mut self.tiles.inputs[model][..length];
            self.tally.kept[model] += cuts[model].apply(self.isa, tau, chunk.start + from as u64, &mut seen[model]);
        }
    }

    /// Runs the method on the input tiles; the result is in the out tile.
    fn combine(&mut self, plan: &Plan, chunk: Chunk, length: usize, majority: f32) {
        let merge = merged(plan, chunk);
        let Tiles { inputs, oracle, out, scratch, .. } = &mut self.tiles;
        with_refs(inputs, merge.models, length, |inputs| {
            if plan.needs().inputs != Inputs::Weights {
                self.tally.conflicts += kernels::conflicts(self.isa, inputs);
            }
            let oracle = merge.oracle.is_some().then_some(&oracle[..length]);
            let tile = Tile { isa: self.isa, inputs, weights: &self.weights, oracle, majority };
            plan.params_of(chunk.tensor).merger.merge(&tile, &mut out[..length], &mut scratch[..length]);
        });
    }

    /// From the method's result to encoded output: adds base, settles elements with non-finite inputs, encodes.
    fn finish(
        &mut self,
        plan: &Plan,
        chunk: Chunk,
        slot: &Slot,
        (from, length): (usize, usize),
        clean: bool,
        encoded: &mut [u8],
    ) -> Result<()> {
        let merge = merged(plan, chunk);
        let float = Float::from_dtype(plan.tensors[chunk.tensor as usize].dtype).expect("merged tensors are floats");
        let delta = plan.needs().inputs != Inputs::Weights;
        let double_base = merge.base.map(|piece| slot.tile(plan, piece, from, length));
        let double_base = double_base.filter(|&(base, _)| delta && base == Float::F64).map(|(_, bytes)| bytes);
        self.tiles.exempt[..length].fill(false);
        match double_base {
            // Base has more digits than f32: the sum is taken in f64, and rounded once.
            Some(base) if float == Float::F64 => {
                let out = &self.tiles.out[..length];
                kernels::store_sum_f64(self.isa, Float::F64, base, out, encoded);
                if !clean {
                    self.settle_exempt(plan, chunk, slot, from, length);
                    let kept = plan.non_finite == NonFinite::CopyBase;
                    for i in (0..length).filter(|&i| self.tiles.exempt[i]) {
                        let value = f64::from(self.tiles.out[i]).to_le_bytes();
                        encoded[i * 8..i * 8 + 8].copy_from_slice(if kept { &base[i * 8..i * 8 + 8] } else { &value });
                    }
                }
                return Ok(());
            }
            Some(base) => {
                for (value, base) in self.tiles.out.iter_mut().zip(base.as_chunks::<8>().0) {
                    *value = narrow(f64::from_le_bytes(*base) + f64::from(*value), float);
                }
            }
            None if delta => kernels::add(self.isa, &mut self.tiles.out[..length], &self.tiles.base[..length]),
            None => {}
        }
        if !clean {
            self.settle_exempt(plan, chunk, slot, from, length);
        }
        self.encode(plan, chunk, from, length, float, encoded)
    }

    /// Gives every element with a non-finite input the value that the recipe asks for.
    fn settle_exempt(&mut self, plan: &Plan, chunk: Chunk, slot: &Slot, from: usize, length: usize) {
        let merge = merged(plan, chunk);
        let base = merge.base.filter(|_| plan.needs().inputs != Inputs::Weights);
        let models = merge.models.iter().map(|&(_, piece)| piece);
        let mut sums = [0.0f32; TILE_ELEMENTS];
        for piece in base.into_iter().chain(models).chain(merge.oracle) {
            let (float, bytes) = slot.tile(plan, piece, from, length);
            let values = &mut self.tiles.scratch[..length];
            kernels::load(self.isa, float, bytes, values);
            let finite = |i: usize, value: f32| match float {
                // A double beyond the range of f32 is a number all the same.
                Float::F64 => f64::from_le_bytes(bytes.as_chunks::<8>().0[i]).is_finite(),
                _ => value.is_finite(),
            };
            for (i, &mut value) in values.iter_mut().enumerate() {
                if !finite(i, value) {
                    sums[i] += value;
                    self.tiles.exempt[i] = true;
                }
            }
        }
        for (i, sum) in sums.iter().enumerate().take(length).filter(|&(i, _)| self.tiles.exempt[i]) {
            self.tiles.out[i] = match plan.non_finite {
                NonFinite::CopyBase => self.tiles.base[i],
                _ => *sum,
            };
        }
    }

    /// Encodes the out tile as `float`, refusing (or clamping) results that the type cannot hold.
    fn encode(
        &mut self,
        plan: &Plan,
        chunk: Chunk,
        from: usize,
        length: usize,
        float: Float,
        encoded: &mut [u8],
    ) -> Result<()> {
        let clamp = plan.overflow == Overflow::Clamp;
        let values = &mut self.tiles.out[..length];
        let exempt = &self.tiles.exempt;
        let mut lost = None;
        if !kernels::all_finite(self.isa, values) {
            for (i, value) in values.iter_mut().enumerate().filter(|(i, v)| !v.is_finite() && !exempt[*i]) {
                if clamp && value.is_infinite() {
                    *value = f32::MAX.copysign(*value);
                } else {
                    lost = lost.or(Some((i, *value)));
                }
            }
        }
        if kernels::store(self.isa, float, values, encoded, clamp) && !clamp {
            let mut one = [0u8; 8];
            let overflows = |value: f32| kernels::store(self.isa, float, &[value], &mut one[..float.width()], false);
            let first = values.iter().copied().map(overflows).position(|over| over);
            lost = lost.or(first.map(|i| (i, values[i])));
        }
        match lost {
            None => Ok(()),
            Some((i, value)) => Err(Error::input(format!(
                "the result at element {} is {value:e}, which {} cannot hold",
                chunk.start + (from + i) as u64,
                float.torch_name()
            ))
            .tensor(&plan.tensors[chunk.tensor as usize].name)
            .help("use --overflow clamp, a wider --dtype, or a smaller --lambda")),
        }
    }

    /// The first non-finite input of the tile, or an overflowing task vector, as an error.
    fn non_finite_error(&mut self, plan: &Plan, chunk: Chunk, slot: &Slot, from: usize, length: usize) -> Error {
        let merge = merged(plan, chunk);
        let name = &plan.tensors[chunk.tensor as usize].name;
        let base = merge.base.map(|piece| ("base".to_string(), piece));
        let models = merge.models.iter().map(|&(model, piece)| (format!("model {}", model + 1), piece));
        let oracle = merge.oracle.map(|piece| ("the sign checkpoint".to_string(), piece));
        for (who, piece) in base.into_iter().chain(models).chain(oracle) {
            let (float, bytes) = slot.tile(plan, piece, from, length);
            kernels::load(self.isa, float, bytes, &mut self.tiles.scratch[..length]);
            if let Some(i) = self.tiles.scratch[..length].iter().position(|v| !v.is_finite()) {
                let value = self.tiles.scratch[i];
                return Error::input(format!("{value} in {who} at element {}", chunk.start + (from + i) as u64))
                    .at(plan.source(piece).1.path())
                    .tensor(name)
                    .help("repair the checkpoint, or use --non-finite copy-base or --non-finite propagate");
            }
        }
        let first = chunk.start + from as u64;
        Error::input(format!("a task vector overflows float32 at elements {first} to {}", first + length as u64 - 1))
            .tensor(name)
            .help("the models are too far from base to be merged")
    }
}

/// The merge of a chunk's tensor.
pub(super) struct Merge<'a> {
    base: Option<Piece>,
    pub models: &'a [(u32, Piece)],
    oracle: Option<Piece>,
}

pub(super) fn merged(plan: &Plan, chunk: Chunk) -> Merge<'_> {
    match &plan.tensors[chunk.tensor as usize].action {
        Action::Merge { base, models, oracle } => Merge { base: *base, models, oracle: *oracle },
        Action::Copy { .. } => unreachable!("copied tensors are not merged"),
    }
}

/// The tiles of a chunk: (first element, number of elements), relative to the chunk.
fn tiles(chunk: Chunk) -> impl Iterator<Item = (usize, usize)> {
    let count = chunk.count as usize;
    (0..count).step_by(TILE_ELEMENTS).map(move |from| (from, TILE_ELEMENTS.min(count - from)))
}

/// Calls `f` with the first `length` elements of the tiles of `models`, without allocating.
fn with_refs<R>(tiles: &[Vec<f32>], models: &[(u32, Piece)], length: usize, f: impl FnOnce(&[&[f32]]) -> R) -> R {
    let mut refs = [&[][..]; crate::limits::MAX_MODELS];
    for (slot, &(model, _)) in refs.iter_mut().zip(models) {
        *slot = &tiles[model as usize][..length];
    }
    f(&refs[..models.len()])
}

/// `value` as the f32 that rounds to `float` as `value` itself does: nearest for f32; for narrower types, rounded to odd,
/// which keeps what was cut off from being rounded twice (Boldo and Melquiond 2008).
fn narrow(value: f64, float: Float) -> f32 {
    let nearest = value as f32;
    if float == Float::F32 || !value.is_finite() || f64::from(nearest) == value {
        return nearest;
    }
    let beyond = f64::from(nearest).abs() > value.abs();
    f32::from_bits((nearest.to_bits() - u32::from(beyond)) | 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_are_rounded_once_to_half_precision() {
        let to = |float: Float, value: f64| {
            let mut bytes = [0; 2];
            kernels::store(Isa::detect(), float, &[narrow(value, float)], &mut bytes, false);
            u16::from_le_bytes(bytes)
        };
        let tiny = 2f64.powi(-40);
        // Halfway between two f16, or a hair beside it.
        assert_eq!(to(Float::F16, 1.0 + 2f64.powi(-11)), 0x3c00);
        assert_eq!(to(Float::F16, 1.0 + 2f64.powi(-11) + tiny), 0x3c01);
        assert_eq!(to(Float::F16, 1.0 + 3.0 * 2f64.powi(-11) - tiny), 0x3c01);
        assert_eq!(to(Float::BF16, -1.0 - 2f64.powi(-8) - tiny), 0xbf81);
        assert_eq!(to(Float::BF16, -1.0 - 2f64.powi(-8)), 0xbf80);
        assert_eq!(narrow(1.0 + tiny, Float::F32), 1.0);
        assert_eq!(narrow(f64::MAX, Float::BF16), f32::MAX);
        assert!(narrow(f64::NAN, Float::F16).is_nan());
    }
}
