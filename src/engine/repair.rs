//! Makes the damaged files of a finished output again, from the inputs that it was made of.
//!
//! - Only damaged shards are written, and only what they are made of is read; where thresholds over the whole model
//!   cannot be taken from the manifest, the passes that find them are run again.
//! - A file gets its place only if it has the hash that the manifest lists. The manifest itself stays as it is.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::kept::Kept;
use super::output::{INDEX, OutputDir};
use super::passes::Passes;
use super::records::UnitDone;
use super::side_files::{self, Content};
use super::{Observer, factor};
use super::{Report, shards};
use crate::error::{Error, Result};
use crate::kernels::Ties;
use crate::plan::{Goal, ListedFile, Manifest, Plan, Schedule, ThresholdKind, Unit};
use crate::sketch::Threshold;
use crate::storage::Storage;

/// Makes the files called `damaged` in `dir` again. `plan` is that of the manifest's recipe, which has admitted it.
pub fn repair(
    manifest: &Manifest,
    damaged: &[String],
    plan: &Plan,
    schedule: &Schedule,
    dir: &Path,
    storage: &Arc<dyn Storage>,
    observer: &dyn Observer,
) -> Result<()> {
    let output = OutputDir::for_repair(dir, storage)?;
    let result = files(manifest, damaged, plan, schedule, &output, observer);
    output.tidy_up();
    result
}

fn files(
    manifest: &Manifest,
    damaged: &[String],
    plan: &Plan,
    schedule: &Schedule,
    output: &OutputDir,
    observer: &dyn Observer,
) -> Result<()> {
    let hash = |shard: &ListedFile| damaged.contains(&shard.name).then(|| shard.blake3.clone());
    let repairs: Vec<Option<String>> = manifest.shards.iter().map(hash).collect();
    if repairs.iter().any(Option::is_some) {
        let bytes = plan.layout.shards.iter().zip(&repairs).filter(|(_, hash)| hash.is_some()).map(|(s, _)| s.bytes);
        output.check_space(bytes.sum())?;
        schedule.allow_ahead(plan, &*output.storage);
        let kept = intact(manifest, plan, schedule, &repairs);
        let all = 0..plan.layout.shards.len();
        shards::write_shards(plan, output, all, observer, Some(&repairs), &|_| true, |writer, _| {
            match &plan.factors {
                Some(factored) => factor::repair(plan, factored, schedule, observer, writer),
                None => Passes::new(plan, schedule, observer, Some(writer), &kept).run(),
            }
        })?;
    }
    let others: Vec<&ListedFile> = manifest.side_files.iter().filter(|file| damaged.contains(&file.name)).collect();
    if others.is_empty() {
        return Ok(());
    }
    let report: Report = serde_json::from_value(manifest.report.clone())
        .map_err(|e| Error::input(format!("the manifest's report makes no sense: {e}")).at(&output.dir))?;
    let mut contents = side_files::all(plan, &report, &*output.storage)?;
    contents.extend(plan.layout.index_json().map(|json| (INDEX.into(), Content::Bytes(json.as_bytes().to_vec()))));
    for file in others {
        let found = contents.iter().position(|(name, _)| *name == file.name);
        let made =
            found.map(|at| contents.swap_remove(at).1).map_or(Ok(false), |content| output.restore(file, content))?;
        if !made {
            return Err(Error::failed("it cannot be made again: what it was copied from is not what it was")
                .at(&output.dir.join(&file.name))
                .help("put a copy of it back, or merge again with --force"));
        }
    }
    Ok(())
}

/// What need not be done again: everything in shards that are not repaired, and the search for thresholds that the
/// manifest lists.
fn intact(manifest: &Manifest, plan: &Plan, schedule: &Schedule, repairs: &[Option<String>]) -> Kept {
    let is_intact = |tensor: u32| repairs[plan.layout.tensors[tensor as usize].shard as usize].is_none();
    let mut kept = Kept::new(plan);
    for unit in &schedule.units {
        if let [tensor] = unit.tensors[..] {
            if is_intact(tensor) {
                kept.skip(plan, tensor);
            }
        } else if let Some(known) = listed(manifest, plan, unit) {
            kept.add_unit(known);
            unit.tensors.iter().filter(|&&tensor| is_intact(tensor)).for_each(|&tensor| kept.skip(plan, tensor));
        }
    }
    schedule.direct.iter().filter(|&&tensor| is_intact(tensor)).for_each(|&tensor| kept.skip(plan, tensor));
    kept
}

/// The thresholds of a unit of many tensors, if the manifest has all that is known of it. What depends on positions needs
/// the tensors before it too.
fn listed(manifest: &Manifest, plan: &Plan, unit: &Unit) -> Option<UnitDone> {
    let exact = plan.trim.as_ref().is_none_or(|trim| trim.threshold == ThresholdKind::Exact);
    if !exact || plan.position_ordered() || plan.votes() || unit.tensors.iter().any(|&tensor| plan.facts(tensor) > 0) {
        return None;
    }
    let [entry] = &manifest.thresholds[..] else { return None };
    let lists = [&entry["models"], &entry["outliers"]];
    let mut values = lists.into_iter().filter_map(Value::as_array).flatten();
    let goals = plan.goals(unit);
    let found = goals.iter().map(|goal| threshold(goal, values.next()?)).collect::<Option<Vec<_>>>()?;
    Some(UnitDone { tensor: unit.tensors[0], found, majority: 0, bytes_read: 0, facts: Vec::new() })
}

/// One threshold with the number of elements it was found among; an inner `None` where nothing was sought.
fn threshold(goal: &Goal, listed: &Value) -> Option<Option<(Threshold, u64)>> {
    if !goal.needs_threshold() {
        return listed.is_null().then_some(None);
    }
    let magnitude = listed["magnitude"].as_f64()? as f32;
    let ties = Ties { low: magnitude.to_bits(), high: magnitude.to_bits() };
    let (above, tied) = (listed["above"].as_u64()?, listed["tied"].as_u64()?);
    Some(Some((Threshold { ties, above, tied }, listed["elements"].as_u64()?)))
}
