//! Bytes behind, or in the place of, the end of an interrupted packing's journal, raw or as records with right checksums: what
//! is left is read or refused, and what is refused stays as it was. The packing itself, of some, ends with the
//! right file.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicI64;
use std::time::Duration;

use tiesmith::fuzz::packing_left;
use tiesmith::{PackOutput, Plan, Recipe, Run, TrimTies};

use super::Files;
use super::journal::{StopAfter, change, make_inputs};

/// Where the file goes.
const OUT: &str = "out";
const NAME: &str = "x.tvz";
const JOURNAL: &str = "x.tvz.journal";
const LOCK: &str = ".x.tvz.lock";

type Tree = BTreeMap<PathBuf, Vec<u8>>;

/// An interrupted packing of two tensors, whose ties are kept by position: what is in its directory, and the file that it must
/// become.
struct Interrupted {
    files: Files,
    plan: Plan,
    tree: Tree,
    expected: Vec<u8>,
}

impl Interrupted {
    fn new() -> Self {
        let files = Files::new("packing");
        make_inputs(&files);
        let recipe = Recipe::packing(&files.path("one.safetensors"), &files.path("base.safetensors"), 0.4);
        let recipe = Recipe { trim_ties: TrimTies::Lowest, ..recipe };
        let plan = Plan::new(&recipe, &files.storage).expect("the inputs fit together");
        let mut start = Self { files, plan, tree: Tree::new(), expected: Vec::new() };
        start.files.clear(OUT);
        start.pack(i64::MAX).expect("an undisturbed packing succeeds");
        start.expected = start.made();
        for patience in 1.. {
            start.files.clear(OUT);
            if start.pack(patience).is_ok() {
                break;
            }
            start.tree = start.tree();
        }
        assert!(start.tree.contains_key(Path::new(JOURNAL)), "it is interrupted in the middle");
        start
    }

    fn output(&self) -> PackOutput {
        PackOutput { file: self.files.path(&format!("{OUT}/{NAME}")).into(), force: false }
    }

    fn pack(&self, patience: i64) -> tiesmith::Result<()> {
        let run = Run { keep_after: Duration::ZERO, ..Run::new(96 << 20, 1) };
        let observer = StopAfter(AtomicI64::new(patience));
        tiesmith::pack(&self.plan, run, &self.output(), &self.files.storage, &observer).map(drop)
    }

    /// What is there; who holds the lock is written down anew each time.
    fn tree(&self) -> Tree {
        let mut tree = self.files.tree(OUT);
        tree.remove(Path::new(LOCK));
        tree
    }

    fn made(&self) -> Vec<u8> {
        self.tree().remove(Path::new(NAME)).expect("a packed file")
    }

    /// Changes the journal, and has it read, or the packing gone on with.
    fn check(&self, way: u8, packs: bool, data: &[u8]) {
        let mut tree = self.tree.clone();
        change(tree.get_mut(Path::new(JOURNAL)).expect("a journal"), way, data);
        self.files.clear(OUT);
        for (name, content) in &tree {
            self.files.put(&format!("{OUT}/{}", name.display()), content);
        }
        let result = match packs {
            true => self.pack(i64::MAX),
            false => packing_left(&self.plan, &self.output(), &*self.files.storage).map(drop),
        };
        match result {
            Ok(()) if packs => {
                // What has a right checksum and could be true is believed.
                assert!(self.made() == self.expected || matches!(way % 4, 1 | 2), "another file");
                assert_eq!(self.tree().len(), 1, "something is left");
            }
            Ok(()) => {
                let journal = tree.remove(Path::new(JOURNAL)).expect("a journal");
                let mut after = self.tree();
                let left = after.remove(Path::new(JOURNAL)).expect("the journal stays");
                assert!(journal.starts_with(&left) && after == tree, "something was changed that was to be cut off");
            }
            Err(error) => {
                super::refused(&error);
                assert!(self.tree() == tree, "a refused run changed something: {error}");
            }
        }
    }
}

/// One in so many inputs that ask for it is packed: that takes some ten times as long as reading what is left.
const PACKED: u32 = 8;

/// See the file's documentation. Of the first byte, the highest bit asks that the packing goes on.
pub fn run(data: &[u8]) {
    thread_local! {
        static STARTS: [OnceCell<Interrupted>; 2] = const { [const { OnceCell::new() }; 2] };
    }
    let Some((&way, data)) = data.split_first() else { return };
    let sum = data.iter().fold(0u32, |sum, &byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    let packs = way & 0x80 != 0 && (sum / 7).is_multiple_of(PACKED);
    STARTS.with(|starts| {
        let start = starts[usize::from(super::ON_DISK.get())].get_or_init(Interrupted::new);
        start.check(way & 0x7f, packs, data);
    });
}
