//! Damage to an output that is finished but for the traces of its run: never a success.

use super::memory::{Fault, Survives};
use super::*;

/// So many changes from the end on.
const LAST: usize = 14;

#[test]
fn what_was_damaged_after_it_got_its_name_is_no_success() {
    let (mut refused, mut made_again) = (0, 0);
    for job in jobs() {
        let Undisturbed { before, expected, changes, .. } = undisturbed(&job);
        for at in (1..=changes + 1).rev().take(LAST) {
            let memory = before.fork(Some((at, Fault::CrashBefore)));
            let _ = job.run(&memory);
            let left = memory.reboot(Survives::All);
            let tree = left.tree(OUT);
            if !tree.contains_key(".tiesmith/journal") {
                continue;
            }
            for (name, (_, data)) in tree.iter().filter(|(name, _)| !name.contains('/')) {
                let damaged = left.fork(None);
                damaged.put(&format!("{OUT}/{name}"), &data[..data.len() / 2]);
                match job.run(&damaged) {
                    Err(_) => refused += 1,
                    Ok(_) => {
                        let found = lasting(&damaged.tree(OUT));
                        let differing = expected.iter().find(|(name, data)| found.get(*name) != Some(*data));
                        let differing = differing.map(|(name, _)| name);
                        assert_eq!(differing, None, "{}, change {at} of {changes}, {name} cut off", job.name);
                        made_again += 1;
                    }
                }
            }
        }
    }
    say(&format!("{} outputs damaged at the end, {made_again} of them made good", refused + made_again));
    assert!(refused > 20 && made_again > 20, "{refused}, {made_again}");
}
