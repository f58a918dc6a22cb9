//! The end of a merge in parts: everything is there, or nothing is published.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use super::super::select::Thresholds;
use super::super::worker::Tally;
use super::super::{
    Finished, Observer, Report, differing_warning, peak_memory_bytes, publish, report, side_files, tidy_up,
};
use super::board::Board;
use super::done::PartDone;
use super::looks::{Looks, listed};
use super::{Desk, Job, Part, parts_of};
use crate::engine::output::OutputDir;
use crate::error::{Error, Result};
use crate::plan::{Plan, Run, Schedule};
use crate::storage::Storage;

/// Publishes the output of `job`, whose parts are all done. Refuses if one is missing.
pub fn finish(plan: &Plan, job: &Job, run: Run, storage: &Arc<dyn Storage>, observer: &dyn Observer) -> Result<Report> {
    let begin = Instant::now();
    job.admit(plan)?;
    side_files::check(plan, &**storage)?;
    // Of what the parts left, some may be gone.
    if OutputDir::is_ended(plan, &job.out, job.on_shard.as_ref(), &**storage)? {
        let dir = OutputDir::of_parts(plan, &job.out, job.force, job.on_shard.clone(), storage)?;
        return tidy_up(plan, dir, observer);
    }
    let parts_dir = OutputDir::parts_dir(&job.out, &**storage)?;
    if !storage.is_dir(&parts_dir) {
        return finished_before(plan, job, storage);
    }
    let board = Board::new(parts_dir, plan, job.sketch_bins, storage);
    let count = parts_of(&board, &job.out)?;
    let dir = OutputDir::of_parts(plan, &job.out, job.force, job.on_shard.clone(), storage)?;
    if dir.is_published() {
        // By somebody else, right now.
        return tidy_up(plan, dir, observer);
    }
    let schedule = Schedule::with_bins(plan, run, job.sketch_bins)?;
    let desk = Desk { plan, job, part: Part { index: 0, count }, board, schedule, observer };
    let parts = all_parts(&desk, &dir)?;
    let looks = Looks::new(&desk);
    let mut finished = Summed::of(plan, &parts);
    finished.tally.bytes_read = finished.tally.bytes_read.saturating_add(looks.bytes_read()?);
    if looks.has_shared() {
        finished.thresholds.record(looks.thresholds_found()?, &finished.unit_kept);
    }
    let mut warnings = plan.warnings.clone();
    warnings.extend(differing_warning(plan, &finished.differing));
    let mut report = report(plan, &desk.schedule, (&dir.dir, false), &finished.tally, &finished.thresholds, warnings);
    report.chunks_reused = parts.iter().map(|part| part.reused).sum();
    report.resumed = report.chunks_reused > 0;
    report.out = dir.address().map_or(report.out, str::to_owned);
    report.shards_handed_over = if dir.hands_over() { report.shards } else { 0 };
    report.wall_seconds = begin.elapsed().as_secs_f64();
    let written = PartDone::written(plan, &parts);
    let finished = Finished { report, written, thresholds: finished.thresholds };
    let mut report = publish(plan, &desk.schedule, dir, finished, observer)?;
    report.wall_seconds = begin.elapsed().as_secs_f64();
    report.peak_memory_bytes = peak_memory_bytes();
    Ok(report)
}

/// The report of what was finished before, if it was.
fn finished_before(plan: &Plan, job: &Job, storage: &Arc<dyn Storage>) -> Result<Report> {
    if OutputDir::is_begun(&job.out, &**storage)? || !job.is_published(plan, &**storage)? {
        return Err(Error::input("no part of this merge was run yet")
            .at(&job.out)
            .help("run its parts first: tiesmith run JOB --part 1/N and so on"));
    }
    OutputDir::forget_lock(&job.out, &**storage);
    OutputDir::report_in(job.address().unwrap_or(&job.out), &**storage)
}

/// What all parts left, whose shards are what was written; an error names those that are missing or damaged.
fn all_parts(desk: &Desk<'_>, dir: &OutputDir) -> Result<Vec<PartDone>> {
    let (plan, job, count) = (desk.plan, desk.job, desk.part.count);
    let (mut parts, mut missing) = (Vec::with_capacity(count), Vec::new());
    for index in 0..count {
        match PartDone::read(plan, &desk.board, Part { index, count })? {
            Some(done) if done.is_there(plan, dir)? => parts.push(done),
            _ => missing.push(index),
        }
    }
    if let Some(first) = missing.first() {
        return Err(Error::failed(format!("not done yet: {}", listed(&missing, count)))
            .at(&job.out)
            .help(format!("run them first: tiesmith run JOB --part {}/{count}", first + 1)));
    }
    let damaged = desk.damaged(&parts.iter().collect::<Vec<_>>(), dir)?;
    let Some(first) = damaged.first() else { return Ok(parts) };
    let mut of = Vec::new();
    for (index, part) in parts.iter().enumerate() {
        if part.files(plan, dir)?.iter().any(|(path, _)| damaged.contains(path)) {
            of.push(index);
        }
    }
    let again = of.first().map_or(1, |index| index + 1);
    let more = if damaged.len() > 1 { format!(", as are {} more", damaged.len() - 1) } else { String::new() };
    Err(Error::failed(format!("this shard is damaged{more}: made by {}", listed(&of, count))).at(first).help(format!(
        "run {} again, then finish: tiesmith run JOB --part {again}/{count}",
        if of.len() > 1 { "them" } else { "it" }
    )))
}

/// What the parts add up to.
struct Summed {
    tally: Tally,
    thresholds: Thresholds,
    unit_kept: Vec<u64>,
    differing: BTreeSet<u32>,
}

impl Summed {
    fn of(plan: &Plan, parts: &[PartDone]) -> Self {
        let models = plan.models();
        let mut sum = Self {
            tally: Tally { kept: vec![0; models], agreeing: vec![0; models], ..Tally::default() },
            thresholds: Thresholds::new(models, plan.selects()),
            unit_kept: vec![0; models],
            differing: BTreeSet::new(),
        };
        for part in parts {
            sum.tally.conflicts += part.conflicts;
            sum.tally.merged += part.merged;
            sum.tally.bytes_read = sum.tally.bytes_read.saturating_add(part.bytes_read);
            add(&mut sum.tally.kept, &part.kept);
            add(&mut sum.tally.agreeing, &part.agreeing);
            add(&mut sum.unit_kept, &part.unit_kept);
            if plan.per_tensor() {
                for (sums, bounds) in sum.thresholds.survivors.iter_mut().zip(&part.survivors) {
                    add(sums, bounds);
                }
                part.thresholds().for_each(|unit| sum.thresholds.list(unit));
            }
            sum.differing.extend(&part.differing);
        }
        sum
    }
}

fn add(sum: &mut [u64], counts: &[u64]) {
    sum.iter_mut().zip(counts).for_each(|(sum, count)| *sum = sum.saturating_add(*count));
}
