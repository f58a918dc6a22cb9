//! What a process notes on the way to a file of the board, so that whoever goes on begins there.

use std::sync::{Mutex, PoisonError};

use super::board::Board;
use crate::engine::records::{self, Entry};
use crate::engine::under_way::{Keeps, Step, UnderWay};
use crate::error::Result;

/// The notes beside one file: the newest steps, in a file of their own.
pub(super) struct Page<'a> {
    board: &'a Board,
    name: String,
    steps: Mutex<Vec<Entry>>,
}

impl<'a> Page<'a> {
    /// The notes on the way to file `name`.
    pub(super) fn open(board: &'a Board, name: &str) -> Self {
        Self { board, name: format!("on-the-way-{name}"), steps: Mutex::default() }
    }

    /// What was noted by whoever was here before.
    pub(super) fn left(&self) -> Result<UnderWay> {
        let mut left = UnderWay::default();
        let Some(bytes) = self.board.read(&self.name)? else { return Ok(left) };
        for entry in records::decode(&bytes).ok_or_else(|| self.board.senseless(&self.name))? {
            match entry {
                Entry::Step(step) => left.take(step),
                _ => return Err(self.board.senseless(&self.name)),
            }
        }
        Ok(left)
    }

    /// Takes the notes away: the file is there.
    pub(super) fn clear(&self) -> Result<()> {
        if self.board.has(&self.name) { self.board.remove(&self.name) } else { Ok(()) }
    }
}

impl Keeps for Page<'_> {
    fn keep_entries(&self, entries: Vec<Entry>) -> Result<()> {
        self.board.storage.check_mapped()?;
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        let first = entries.first();
        // Searches come in several portions, each replaced by the next of its time.
        let together = match (steps.last(), first) {
            (Some(Entry::Step(Step::Search(last))), Some(Entry::Step(Step::Search(first)))) => {
                (last.round, last.elements) == (first.round, first.elements)
            }
            _ => false,
        };
        if !together {
            steps.clear();
        }
        steps.extend(entries);
        self.board.write(&self.name, &records::encode(&steps))
    }
}
