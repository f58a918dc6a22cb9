//! Every bound the crate relies on, as a constant with its reason.

/// Longest accepted safetensors header in bytes: the reference implementation's limit.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Longest accepted index file in bytes: two million tensors at about 100 bytes each.
pub const MAX_INDEX_BYTES: u64 = 256_000_000;
/// Most files one checkpoint may have: they are all held open, and the largest known have a few hundred.
pub const MAX_SHARDS: usize = 10_000;
/// Most tensors one checkpoint may have.
pub const MAX_TENSORS: usize = 10_000_000;
/// Longest accepted tensor name in bytes.
pub const MAX_NAME_BYTES: usize = 4096;
/// Most dimensions a tensor may have.
pub const MAX_DIMENSIONS: usize = 64;
/// Longest accepted pickle of a PyTorch checkpoint, in bytes: a tensor takes about 200.
pub const MAX_PICKLE_BYTES: u64 = 16_000_000;
/// Most values that it may make, and most that it may have on its stack or in its memo: a tensor takes about 20.
pub const MAX_PICKLE_VALUES: usize = 1_000_000;
/// Longest side file (config, tokenizer) that is copied, in bytes.
pub const MAX_SIDE_FILE_BYTES: u64 = 256_000_000;
/// Longest configuration that is parsed, in bytes: those with twenty thousand labels have two million.
pub const MAX_CONFIG_BYTES: u64 = 4_000_000;

/// Longest accepted configuration of an adapter in bytes: tables of patterns have a line per module.
pub const MAX_ADAPTER_CONFIG_BYTES: u64 = 4 << 20;
/// What one read of a tensor that an adapter changes takes beside its result, in bytes: blocks of it and of both factors.
pub const ADAPTER_SCRATCH_BYTES: u64 = 1 << 20;

/// Largest factors of a module, in bytes of f32, that are kept while the tensor that they change is read: those of rank 64 of
/// an 8B model's layers. Larger ones are read block by block.
pub const FACTORS_BYTES: u64 = 8 << 20;
/// Bytes of such factors that are kept of one adapter, between reads.
pub const KEPT_FACTORS_BYTES: u64 = 2 * FACTORS_BYTES;
/// Columns that products of tall matrices take at a time.
pub const PANEL_COLUMNS: u64 = 8;
/// What one thread takes for such products beside the matrices, in bytes.
pub const PRODUCT_BYTES: u64 = 1 << 18;

/// Longest accepted manifest in bytes: ten thousand listed units of a hundred models, and room to spare.
pub const MAX_MANIFEST_BYTES: u64 = 256_000_000;
/// Longest recipe file in bytes.
pub const MAX_RECIPE_BYTES: u64 = 1 << 20;
/// Most values in a recipe file, with aliases written out.
pub const MAX_RECIPE_NODES: u64 = 100_000;
/// Deepest nesting in a recipe file: the language itself needs about ten levels.
pub const MAX_RECIPE_DEPTH: usize = 64;
/// Most documents in a recipe file.
pub const MAX_RECIPE_DOCUMENTS: usize = 1_000;

/// Most outputs of a sweep that are made together: each has a thread that follows its writes, and open files.
pub const MAX_SWEEP_GROUP: usize = 128;
/// Most parts of one merge: as many as shards, and some to spare.
pub const MAX_PARTS: usize = 10_000;

/// Most models in one merge: each needs a tile in every worker.
pub const MAX_MODELS: usize = 128;

/// Elements of a tile: the unit of computation. With a handful of models its slices stay in the first-level cache.
pub const TILE_ELEMENTS: usize = 2048;
/// Elements of a chunk where memory allows: so many that its windows are worth mapping. Disks are kept busy by what is
/// announced ahead.
pub const CHUNK_ELEMENTS: u64 = 1 << 21;
/// Shortest chunk that is worth reading: below, system calls cost more than arithmetic.
pub const MIN_CHUNK_ELEMENTS: u64 = 1 << 14;
/// Elements computed before they are written.
pub const OUT_ELEMENTS: u64 = 1 << 17;
/// Longest tensor that one worker takes alone; longer ones are shared, so that no worker is left with a long tail.
pub const SOLO_ELEMENTS: u64 = 1 << 24;
/// Longest unit whose threshold is selected among all its keys.
pub const SMALL_UNIT_ELEMENTS: u64 = 1 << 16;
/// Elements of a block of a sample of a unit in memory: four cache lines of a 16-bit type.
pub const SAMPLE_BLOCK: usize = 128;
/// Longest sample of a unit in memory.
pub const SAMPLE_ELEMENTS: u64 = 1 << 16;
/// Most keys listed near the threshold of a unit in memory: one in [`NEAR_SHARE`], up to so many.
pub const NEAR_KEYS: u64 = 1 << 18;
/// See [`NEAR_KEYS`].
pub const NEAR_SHARE: u64 = 8;
/// Thresholds of tensors that the manifest lists, over all models: enough for any dense model, bounded for mixtures of
/// experts.
pub const LISTED_THRESHOLDS: usize = 20_000;
/// What one of them takes until the manifest is written.
pub const LISTED_BYTES: u64 = 1_000;
/// Largest model, in bytes of all checkpoints, that model scope holds in memory: a larger one's second read costs little
/// beside its first, and comes from the page cache where there is memory for it.
pub const RESIDENT_BYTES: u64 = 32_000_000;
/// Most windows on chunks that are held in memory at once: systems limit the number of mappings, often to 65,530.
pub const RESIDENT_WINDOWS: u64 = 1 << 14;

/// Longest row of a tensor that is treated as one, where a method works row by row: longer ones are taken in pieces of
/// this length. Twice the longest of any language model known.
pub const ROW_ELEMENTS: u64 = OUT_ELEMENTS;

/// One element in so many is probed.
pub const PROBE_SHARE: u64 = 64;
/// Elements of one probed block: neighbours are alike, so many short blocks say more than few long ones.
pub const PROBE_BLOCK: u64 = 1 << 10;
/// The same where it is fetched from a network, which takes as long for more.
pub const PROBE_REMOTE_BLOCK: u64 = 1 << 12;
/// Most elements of a probe: more would say little more, and each block costs a disk a seek, or a network a request.
pub const PROBE_MAX_ELEMENTS: u64 = 1 << 23;
/// Fewest elements probed (or all, if there are fewer): keeps the bracket of a smaller model narrow.
pub const PROBE_MIN_ELEMENTS: u64 = 1 << 17;

/// Groups of a probe's sample, whose spread tells how far the sample can be trusted.
pub const PROBE_GROUPS: usize = 8;
/// Looks at a probe's sample where thresholds can be guessed from it: for the magnitudes about the wanted rank, for the most
/// common one, and for how many entries have it.
pub const GUESS_LOOKS: u64 = 3;

/// Fewest bins of a magnitude sketch: one that covers all keys at 0.4 % of a magnitude per bin.
pub const SKETCH_BINS_MIN: usize = 1 << 16;
/// Most bins of a magnitude sketch: about a seventh of a magnitude at one key per bin.
pub const SKETCH_BINS_MAX: usize = 1 << 20;

/// Resident memory of the program itself, and what the allocator keeps.
pub const PROCESS_BYTES: u64 = 14_000_000;
/// A thread's stack as far as it is used, and what the allocator keeps for it.
pub const THREAD_BYTES: u64 = 200_000;

/// Input bytes announced to the system ahead of their use: keeps a slow disk busy while workers compute.
pub const PREFETCH_BYTES: u64 = 64_000_000;
/// Most memory for ranges that are fetched from a network ahead of their use: keeps ten gigabits per second busy at 200 ms.
pub const AHEAD_BYTES: u64 = 256_000_000;
/// Share of the limit of memory that they may have, as a divisor.
pub const AHEAD_SHARE: u64 = 8;
/// What connections and the threads that read from them take.
pub const CONNECTIONS_BYTES: u64 = 8_000_000;
/// Blocks of a probe that each worker announces ahead, where they are fetched from a network.
pub const PROBES_AHEAD: usize = 64;
/// Bytes of a part of an upload, unless that makes more parts than stores take.
pub const UPLOAD_PART_BYTES: u64 = 8 << 20;
/// Most parts of an upload.
pub const UPLOAD_PARTS: u64 = 9_000;
/// Parts on their way at a time, beside the one that is read.
pub const UPLOAD_PARTS_AT_ONCE: usize = 2;
/// Written bytes that may wait for the disk before writers pause. When they are durable, the journal says so: a kill
/// costs at most what was written since.
pub const WRITE_BEHIND_BYTES: u64 = 128_000_000;
/// Seconds after which what was written is made durable and journalled, however little it is.
pub const WRITE_BEHIND_SECONDS: u64 = 5;
/// Seconds after which work that writes nothing keeps what it has found out.
pub const KEEP_AFTER_SECONDS: u64 = 30;
/// Bytes of what it has counted that are written at once, or a little more.
pub const KEPT_AT_ONCE_BYTES: usize = 16_000_000;
/// Longest record of a journal, in bytes.
pub const MAX_RECORD_BYTES: usize = 256_000_000;
/// What a threshold that was found takes, with the numbers of entries about it.
pub const FOUND_BYTES: usize = 48;
/// Bytes of a journal's record after which it is written, however little time has passed.
pub const RECORD_BYTES: usize = 1 << 20;
/// Shortest subtree of a file that is hashed on its own: a power of two, long enough for every lane of a vector unit.
pub const HASH_LEAF_BYTES: u64 = 1 << 14;
/// Shortest range of a file that is mapped, and shortest buffer that the system is asked for: below, whole pages cost more
/// memory and time than they save.
pub const MAPPED_BYTES: usize = 1 << 16;
/// What pages add to a mapped range at both ends, on systems with the largest pages that are usual.
pub const PAGE_BYTES: u64 = 16_384;

/// Length of the parts in which a file of `bytes` bytes is uploaded.
pub fn upload_part_bytes(bytes: u64) -> u64 {
    UPLOAD_PART_BYTES.max(bytes.div_ceil(UPLOAD_PARTS))
}

const _: () = {
    assert!(MIN_CHUNK_ELEMENTS >= TILE_ELEMENTS as u64 && CHUNK_ELEMENTS >= MIN_CHUNK_ELEMENTS);
    assert!(
        MIN_CHUNK_ELEMENTS >= PROBE_BLOCK && MIN_CHUNK_ELEMENTS >= PROBE_REMOTE_BLOCK,
        "a probed block fits into the smallest window"
    );
    assert!(SKETCH_BINS_MIN.is_power_of_two() && SKETCH_BINS_MAX.is_power_of_two());
    assert!(OUT_ELEMENTS.is_multiple_of(TILE_ELEMENTS as u64));
};
