//! Takes over what earlier attempts left: reads every range that the journal vouches for and keeps those whose bytes are
//! still what was written.

use std::ops::Range;

use super::{Follower, SealedShard, ShardFile};
use crate::engine::check_inputs_unchanged;
use crate::engine::kept::Kept;
use crate::engine::reads::{Reads, files};
use crate::engine::records::{self, Entry, RangeDone, ReadDone};
use crate::engine::tensor_crc::PieceCrc;
use crate::error::Result;
use crate::limits::WRITE_BEHIND_BYTES;
use crate::storage::InputFile;

/// What is left of a shard.
struct Leftover {
    file: Option<Box<dyn InputFile>>,
    /// It has its final name.
    published: bool,
    /// It was handed over, and is not here: what sealing it found out.
    elsewhere: Option<SealedShard>,
}

impl Leftover {
    const NOTHING: Self = Self { file: None, published: false, elsewhere: None };
}

/// What the journal lists, before anything of it is looked at.
#[derive(Default)]
struct Listed {
    /// Entries so far.
    entries: usize,
    /// Bytes of ranges that count.
    bytes: u64,
    /// Entries between a guess and the word that it was wrong.
    void: Vec<Range<usize>>,
    /// Bytes of ranges among them.
    void_bytes: u64,
    /// Where the last guess is, and the bytes of ranges since then.
    guess: Option<(usize, u64)>,
}

impl Listed {
    /// Takes in the next entry; false if it makes no sense there.
    fn take(&mut self, entry: &Entry) -> bool {
        self.entries += 1;
        self.bytes += bytes_of(entry);
        match (entry, &mut self.guess) {
            (entry, guess) if entry.takes_guess() => *guess = Some((self.entries, 0)),
            (Entry::Miss(_), guess) => {
                let Some((start, bytes)) = guess.take() else { return false };
                self.void.push(start..self.entries);
                (self.void_bytes, self.bytes) = (self.void_bytes.max(bytes), self.bytes - bytes);
            }
            (Entry::Range(_), Some((_, bytes))) => *bytes += bytes_of(entry),
            (Entry::Unit(_), guess) => *guess = None,
            _ => {}
        }
        true
    }

    /// Whether `entry`, the one in `place`, is a range that was merged with a wrong guess.
    fn is_void(&self, entry: &Entry, place: usize) -> bool {
        matches!(entry, Entry::Range(_)) && self.void.iter().any(|void| void.contains(&place))
    }
}

impl Follower<'_> {
    /// See the module's documentation. Shards that turn out to be complete are sealed.
    pub(super) fn take_over(&mut self, makes_sense: &dyn Fn(&Kept) -> bool) -> Result<Kept> {
        let (plan, output, observer) = (self.shards.plan, self.shards.output, self.shards.observer);
        let decode = |payload: &[u8]| records::decode(payload).ok_or_else(|| output.senseless_journal());
        self.compare_inputs()?;
        let mut listed = Listed::default();
        output.each_done(|payload| {
            let sound = decode(payload)?.iter().all(|entry| listed.take(entry));
            if sound { Ok(()) } else { Err(output.senseless_journal()) }
        })?;
        observer.stage("check", listed.bytes);
        let left = (0..self.sealed.len()).map(|shard| self.leftover(shard)).collect::<Result<Vec<_>>>()?;
        let mut kept = Kept::new(plan);
        let mut buffer = Vec::new();
        let mut places = 0..;
        output.each_done(|payload| {
            for (entry, place) in decode(payload)?.into_iter().zip(places.by_ref()) {
                if listed.is_void(&entry, place) {
                    continue;
                }
                observer.advance(bytes_of(&entry));
                match entry {
                    Entry::Read(read) if self.shards.reads.as_ref().is_some_and(|r| r.know(&read).is_some()) => {}
                    Entry::Step(step) => kept.under_way.take(step),
                    Entry::Guess(guess) if Kept::fits_guess(plan, &guess) => kept.add_guess(guess),
                    Entry::Miss(miss) => kept.add_miss(&miss),
                    Entry::Unit(unit) if Kept::fits_unit(plan, &unit) => kept.add_unit(unit),
                    Entry::Range(range)
                        if Kept::fits(plan, &range) && plan.is_within(range.tensor, &self.shards.own) =>
                    {
                        observer.go_on()?;
                        if kept.is_new(&range) && self.is_intact(&range, &left, &mut buffer)? {
                            self.count_down(&range);
                            kept.add_range(plan, range);
                        }
                    }
                    _ => return Err(output.senseless_journal()),
                }
            }
            Ok(())
        })?;
        if !makes_sense(&kept) {
            return Err(output.senseless_journal());
        }
        // What was written without being recorded takes up room already.
        let there = listed.void_bytes.saturating_add(2 * WRITE_BEHIND_BYTES);
        let missing = self.remaining.iter().sum::<u64>().saturating_sub(there);
        // What was begun is not wrong for lack of room, and a job may wait for it.
        output
            .check_space_for(plan, missing)
            .map_err(|e| e.as_failed().replace_help("make room and run the same command again"))?;
        output.taken_over();
        for (shard, leftover) in left.iter().enumerate() {
            self.settle(shard, leftover)?;
        }
        self.guessing = kept.is_guessing();
        if !kept.is_empty() && !self.guessing {
            self.seal_complete()?;
        }
        Ok(kept)
    }

    /// Where inputs have other times or inodes than they had: makes sure that all that was read of them is the same, and
    /// remembers what they are now.
    fn compare_inputs(&self) -> Result<()> {
        let (plan, output, observer) = (self.shards.plan, self.shards.output, self.shards.observer);
        let Some(touched) = output.touched(plan) else { return Ok(()) };
        let reads = |payload: &[u8], each: &mut dyn FnMut(ReadDone) -> Result<()>| {
            let entries = records::decode(payload).ok_or_else(|| output.senseless_journal())?;
            entries.into_iter().try_for_each(|entry| if let Entry::Read(read) = entry { each(read) } else { Ok(()) })
        };
        let mut bytes = 0;
        output.each_done(|payload| {
            reads(payload, &mut |read| {
                bytes += u64::from(read.bytes);
                Ok(())
            })
        })?;
        observer.stage("compare inputs", bytes);
        // All inputs: what is computed where it is read can be of several files.
        let files: Vec<_> = files(plan).collect();
        let mut buffer = Vec::new();
        output.each_done(|payload| {
            reads(payload, &mut |read| {
                observer.go_on()?;
                let file = files.get(read.file as usize).ok_or_else(|| output.senseless_journal())?;
                Reads::compare(*file, &read, &mut buffer)?;
                observer.advance(read.bytes.into());
                Ok(())
            })
        })?;
        check_inputs_unchanged(plan)?;
        observer.warn(&touched);
        output.record_inputs(plan)
    }

    fn leftover(&self, shard: usize) -> Result<Leftover> {
        let output = self.shards.output;
        if !self.shards.own.contains(&shard) {
            return Ok(Leftover::NOTHING);
        }
        let name = &self.shards.plan.layout.shards[shard].name;
        let partial = output.partial(name);
        if output.storage.identity(&partial)?.is_some() {
            return Ok(Leftover { file: Some(output.storage.open_own(&partial)?), ..Leftover::NOTHING });
        }
        let path = output.dir.join(name);
        if output.owns_final_names() && output.storage.identity(&path)?.is_some() {
            return Ok(Leftover { file: Some(output.storage.open_own(&path)?), published: true, elsewhere: None });
        }
        let known = output.handed_over().get(name).map(|shard_made| shard_made.of(self.shards.plan, shard));
        let Some(known) = known else { return Ok(Leftover::NOTHING) };
        let (sealed, tensors) = known.ok_or_else(|| output.senseless_journal())?;
        tensors.into_iter().for_each(|(tensor, crc)| self.shards.tensors.set(tensor, crc));
        Ok(Leftover { elsewhere: Some(sealed), ..Leftover::NOTHING })
    }

    /// Whether the bytes of `range` are those that were written.
    fn is_intact(&self, range: &RangeDone, left: &[Leftover], buffer: &mut Vec<u8>) -> Result<bool> {
        let plan = self.shards.plan;
        let place = &plan.layout.tensors[range.tensor as usize];
        let shard = place.shard as usize;
        if left[shard].elsewhere.is_some() {
            return Ok(true);
        }
        let Some(file) = &left[shard].file else { return Ok(false) };
        let width = plan.output_bytes(range.tensor) / plan.length(range.tensor).max(1);
        let mut offset = place.offset + range.start * width;
        let mut crc = PieceCrc::new();
        for piece in &range.pieces {
            let end = offset + u64::from(piece.bytes);
            let mut intact = end <= file.identity().bytes;
            if intact {
                buffer.resize(piece.bytes as usize, 0);
                file.read_at(buffer, offset)?;
                intact = self.shards.hashes[shard].add_if(offset, buffer, &piece.digest);
            }
            if !intact {
                return Ok(false);
            }
            crc.update(buffer);
            offset = end;
        }
        let following = place.offset + plan.output_bytes(range.tensor) - offset;
        self.shards.tensors.add(range.tensor, &crc, following);
        Ok(true)
    }

    /// A shard that is complete under its final name stays as it is; every other one is open to be written again.
    fn settle(&mut self, shard: usize, left: &Leftover) -> Result<()> {
        let (output, planned) = (self.shards.output, &self.shards.plan.layout.shards[shard]);
        if let Some(sealed) = &left.elsewhere {
            if self.remaining[shard] > 0 {
                return Err(output.senseless_journal());
            }
            self.sealed[shard] = Some(sealed.clone());
            self.shards.set(shard, ShardFile::Sealed);
            return Ok(());
        }
        let Some(file) = &left.file else { return Ok(()) };
        if left.published {
            let mut header = vec![0; planned.header.len()];
            let complete = self.remaining[shard] == 0 && file.identity().bytes == planned.bytes;
            if complete {
                file.read_at(&mut header, 0)?;
            }
            if complete && header == planned.header {
                let hash = self.shards.hashes[shard].finish(|buffer, offset| file.read_at(buffer, offset))?;
                self.sealed[shard] = Some(SealedShard { hash, bytes: planned.bytes });
                self.shards.set(shard, ShardFile::Sealed);
                return self.hand_over(shard);
            }
            output.storage.rename(&output.dir.join(&planned.name), &output.partial(&planned.name))?;
            output.sync_work()?;
            output.storage.sync_dir(&output.dir)?;
        }
        self.shards.set(shard, ShardFile::Left);
        Ok(())
    }
}

fn bytes_of(entry: &Entry) -> u64 {
    match entry {
        Entry::Range(range) => range.pieces.iter().map(|piece| u64::from(piece.bytes)).sum(),
        _ => 0,
    }
}
