//! Packing that fails or dies leaves no file that looks packed and is not, and the same command then works.

use std::io::ErrorKind;
use std::sync::Arc;

use tiesmith::{Error, PackOutput, PackReport, Plan, Recipe, Run, Storage};

use super::memory::{Fault, Memory, every_fault};
use super::{OUT, STEP, Silent, inputs, say};

fn pack(density: f64, memory: &Memory) -> Result<PackReport, Error> {
    let storage: Arc<dyn Storage> = Arc::new(memory.clone());
    let plan = Plan::new(&Recipe::packing("/in/one", "/in/base", density), &storage)?;
    let output = PackOutput { file: format!("{OUT}/one.tvz").into(), force: false };
    tiesmith::pack(&plan, Run::new(96 << 20, 1), &output, &storage, &Silent)
}

#[test]
fn packing_is_all_or_nothing() {
    let mut cases = 0;
    for density in [0.2, 1.0] {
        let memory = inputs().fork(None);
        pack(density, &memory).unwrap();
        let (operations, changes) = memory.counts();
        let tree = memory.tree(OUT);
        assert_eq!(tree.keys().collect::<Vec<_>>(), ["one.tvz"]);
        let expected = &tree["one.tvz"].1;
        let faults = every_fault(operations, changes, |_| [ErrorKind::StorageFull, ErrorKind::Other]);
        for (at, fault, survives) in faults.into_iter().step_by(STEP) {
            let what = format!("{density}, at {at}, {fault:?}, survives {survives:?}");
            let memory = inputs().fork(Some((at, fault)));
            let outcome = pack(density, &memory);
            let memory = memory.reboot(survives);
            let there = |memory: &Memory| memory.tree(OUT).get("one.tvz").map(|(_, data)| data.clone());
            match there(&memory) {
                Some(found) => assert!(found == *expected, "{what}: not what was packed"),
                None => {
                    // What an ended run called done is there, unless the machine died on the way.
                    let crashed = matches!(fault, Fault::CrashBefore | Fault::CrashIn);
                    assert!(outcome.is_err() || crashed, "{what}: done, but nothing there");
                    pack(density, &memory).unwrap_or_else(|error| panic!("{what}: {error}"));
                    assert!(there(&memory).as_ref() == Some(expected), "{what}: packed again, but otherwise");
                }
            }
            cases += 1;
        }
    }
    say(&format!("{cases} packings disturbed"));
    assert!(cases > 200 / STEP, "{cases}");
}
