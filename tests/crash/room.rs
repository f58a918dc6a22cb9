//! A disk that has just the room that is needed: what the output takes while it grows is not taken from the spools of the tensors
//! that come later.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tiesmith::{Observer, OutputOptions, Plan, Recipe, Run, Schedule, Scope, Storage};

use super::memory::Memory;
use super::{DISK, OUT, STORE, far, floats, lasting, recipe};

/// Bytes of a disk that are left alone.
const SPARE: u64 = 64_000_000;

/// Takes what is written to the output, holes left out, from what is free, and hears what is told.
struct Disk {
    memory: Memory,
    bytes: u64,
    told: Mutex<Vec<String>>,
    advanced: AtomicU64,
}

impl Observer for Disk {
    fn advance(&self, bytes: u64) {
        // Looking at every step would take long.
        if self.advanced.fetch_add(bytes, Ordering::Relaxed) % 1_000_000 + bytes >= 1_000_000 {
            let tree = self.memory.tree(OUT);
            let partial = tree.iter().filter(|(name, _)| name.contains(".safetensors"));
            let taken: usize = partial.map(|(_, (_, data))| data.iter().filter(|&&byte| byte != 0).count()).sum();
            self.memory.set_free(Some(self.bytes - taken as u64));
        }
    }

    fn warn(&self, message: &str) {
        self.told.lock().unwrap().push(message.to_owned());
    }
}

#[test]
fn the_output_takes_its_room_once() {
    let shapes: [(&str, &[u64]); 2] = [("v", &[1_500_001]), ("w", &[1_500_001])];
    let before = Memory::default();
    for (seed, name) in (1..).zip(["base", "one", "two"]) {
        let value = |i: u64| ((i * (2_654_435_761 + 2 * seed)) % 65_521 + 1) as f32 / 16.1;
        before.put(&format!("/in/{name}/model.safetensors"), &floats(&shapes, value));
    }
    let before = before.moved(DISK, STORE);
    let merge = |extra: Option<u64>| {
        let memory = before.fork(None);
        let storage: Arc<dyn Storage> = Arc::new(memory.clone());
        let plan = Plan::new(&far(Recipe { scope: Scope::Tensor, max_shard_bytes: 1 << 30, ..recipe() }), &storage)?;
        let schedule = Schedule::with_spool(&plan, Run::new(46 << 20, 1))?;
        let spool = schedule.spool.as_ref().expect("tensors are kept").bytes;
        let written: u64 = schedule.passes.iter().map(|pass| pass.bytes_written).sum();
        // Room for one tensor at a time, beside the output.
        let bytes = extra.map_or(u64::MAX / 2, |percent| SPARE + written + spool * percent / 100);
        memory.set_free(Some(bytes));
        let disk = Disk { memory: memory.clone(), bytes, told: Mutex::default(), advanced: AtomicU64::new(0) };
        let output = OutputOptions { dir: OUT.into(), ..OutputOptions::default() };
        tiesmith::merge(&plan, &schedule, &output, &storage, &disk)?;
        let told: Vec<String> = disk.told.into_inner().unwrap();
        let of_room = told.into_iter().filter(|told| told.contains("no room for all that is downloaded")).count();
        Ok::<_, tiesmith::Error>((lasting(&memory.tree(OUT)), of_room))
    };
    let (expected, none) = merge(None).unwrap();
    assert_eq!(none, 0);
    for (percent, told) in [(115, 0), (40, 1)] {
        let (found, of_room) = merge(Some(percent)).unwrap();
        assert!(found == expected, "{percent} %");
        assert_eq!(of_room, told, "{percent} %: it is told when there is too little room, once");
    }
}
