//! A file system in memory that knows what is durable, counts operations, and fails or dies at any of them.
//!
//! - Data is durable after the file's sync, names after the directory's.
//! - Reads and writes may do a part of what is asked, or be interrupted, as the system's may.
//! - After a crash nothing works any more, until [`Memory::reboot`] decides what of the rest survived.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tiesmith::{Error, Identity, InputFile, Lock, OutputFile, Result, Storage, read_fully, write_fully};

/// What happens at one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The process dies before it.
    CrashBefore,
    /// The process dies in it: half of a write arrives; other operations happen and are not seen to.
    CrashIn,
    /// It fails with this kind of error, once.
    Once(io::ErrorKind),
    /// It and every later one fails with this kind of error.
    FromHere(io::ErrorKind),
    /// This transfer of data does only a half of what is asked; `true`: and so does every later one.
    Short(bool),
    /// This transfer of data is interrupted by a signal; `true`: and then every second one.
    Interrupted(bool),
}

/// What survives of what was not durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survives {
    /// Everything: only the process died.
    All,
    /// Nothing.
    Nothing,
    /// Names and lengths are lost; data that was written is zeros.
    Zeros,
    /// Data, but no name: renames, creations and removals are undone.
    Data,
    /// Names, but no data.
    Names,
    /// Of every sector and every name either the old or the new, whatever was written first: a choice by number.
    Mixed(u64),
}

impl Survives {
    pub const EACH: [Self; 8] = [
        Self::All,
        Self::Nothing,
        Self::Zeros,
        Self::Data,
        Self::Names,
        Self::Mixed(1),
        Self::Mixed(2),
        Self::Mixed(3),
    ];
}

/// A crash before and in each of `changes`, with all that may survive it, and errors of the two kinds that `kinds` gives, once
/// and from there on, at each of `operations`.
pub fn every_fault(
    operations: u64,
    changes: u64,
    kinds: impl Fn(u64) -> [io::ErrorKind; 2],
) -> Vec<(u64, Fault, Survives)> {
    let crashes = (1..=changes).flat_map(|at| {
        let both = move |survives| [(at, Fault::CrashBefore, survives), (at, Fault::CrashIn, survives)];
        Survives::EACH.into_iter().flat_map(both)
    });
    let errors = (1..=operations).flat_map(|at| {
        let [once, lasting] = kinds(at);
        [(at, Fault::Once(once), Survives::All), (at, Fault::FromHere(lasting), Survives::All)]
    });
    crashes.chain(errors).collect()
}

/// What a disk writes at once.
const SECTOR_BYTES: usize = 512;

/// An even choice by number, of `place` in `file`.
fn choice(number: u64, file: u64, place: u64) -> bool {
    let mut mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ file.wrapping_mul(0xd1b5_4a32_d192_ed03) ^ place;
    for _ in 0..3 {
        mixed = (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    }
    mixed >> 63 == 1
}

#[derive(Clone, Default)]
struct Node {
    data: Vec<u8>,
    durable: Vec<u8>,
    time: u64,
}

impl Node {
    /// Takes of every sector, and of the length, either what is durable or what was written since.
    fn mix(&mut self, number: u64, file: u64) {
        let length = if choice(number, file, u64::MAX) { self.data.len() } else { self.durable.len() };
        self.data.resize(length, 0);
        for (place, sector) in self.data.chunks_mut(SECTOR_BYTES).enumerate() {
            if choice(number, file, place as u64) {
                let from = place * SECTOR_BYTES;
                let durable = self.durable.get(from..).unwrap_or_default();
                let kept = durable.len().min(sector.len());
                sector[..kept].copy_from_slice(&durable[..kept]);
                sector[kept..].fill(0);
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    Directory,
    File(u64),
}

#[derive(Clone, Default)]
struct State {
    nodes: BTreeMap<u64, Node>,
    names: BTreeMap<PathBuf, Entry>,
    durable_names: BTreeMap<PathBuf, Entry>,
    clock: u64,
    /// Operations so far, and those among them that change something.
    operations: u64,
    changes: u64,
    /// Reads and writes of data so far; an operation has more than one where they are cut short.
    transfers: u64,
    /// Bytes read of each file.
    read: BTreeMap<PathBuf, u64>,
    fault: Option<(u64, Fault)>,
    dead: bool,
    /// What is in an object store: there when its upload is complete, and durable.
    objects: BTreeMap<PathBuf, Vec<u8>>,
    /// The files that are locked.
    locked: BTreeSet<PathBuf>,
    /// What it says is free, if that is not everything.
    free_bytes: Option<u64>,
}

/// See the module's documentation. Clones share everything.
#[derive(Clone, Default)]
pub struct Memory(Arc<Mutex<State>>, Arc<Mutex<Option<Hook>>>);

/// Something that happens in between.
type Hook = Box<dyn FnOnce() + Send>;

/// Whether an operation changes something; only those are worth crashing at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Does {
    Look,
    Change,
}

/// How an operation is to go on.
enum Go {
    On,
    /// Do it (or half of it), then fail.
    Die,
}

impl State {
    fn step(&mut self, does: Does, what: &str, path: &Path) -> Result<Go> {
        let fail = |kind: io::ErrorKind| Err(Error::io(what, path, &kind.into()));
        if self.dead {
            return fail(io::ErrorKind::Other);
        }
        self.operations += 1;
        self.changes += u64::from(does == Does::Change);
        match self.fault {
            Some((at, Fault::CrashBefore)) if does == Does::Change && self.changes == at => {
                self.dead = true;
                fail(io::ErrorKind::Other)
            }
            Some((at, Fault::CrashIn)) if does == Does::Change && self.changes == at => {
                self.dead = true;
                Ok(Go::Die)
            }
            Some((at, Fault::Once(kind))) if self.operations == at => fail(kind),
            Some((at, Fault::FromHere(kind))) if self.operations >= at => fail(kind),
            _ => Ok(Go::On),
        }
    }

    /// One call that moves data: how much of `length` bytes it does.
    fn transfer(&mut self, length: usize) -> io::Result<usize> {
        self.transfers += 1;
        let (hit, from) = match self.fault {
            Some((at, Fault::Short(_) | Fault::Interrupted(_))) => (self.transfers == at, self.transfers > at),
            _ => (false, false),
        };
        match self.fault {
            Some((_, Fault::Short(on))) if hit || on && from => Ok(length.div_ceil(2)),
            Some((at, Fault::Interrupted(on))) if hit || on && from && (self.transfers - at).is_multiple_of(2) => {
                Err(io::ErrorKind::Interrupted.into())
            }
            _ => Ok(length),
        }
    }

    fn file(&self, path: &Path) -> Result<u64> {
        match self.names.get(path) {
            Some(Entry::File(id)) => Ok(*id),
            Some(Entry::Directory) => Err(Error::input("a directory, not a file").at(path)),
            None => Err(Error::input("no such file").at(path)),
        }
    }

    fn identity(&self, id: u64) -> Identity {
        let node = &self.nodes[&id];
        let time = i128::from(node.time);
        Identity { bytes: node.data.len() as u64, mtime_ns: time, ctime_ns: time, device: 1, inode: id }
    }

    fn touch(&mut self, id: u64) -> &mut Node {
        self.clock += 1;
        let node = self.nodes.get_mut(&id).expect("a node lives as long as its names");
        node.time = self.clock;
        node
    }

    /// Takes of every name either the old or the new. What has a new name may have the old one too, but not none.
    fn mix_names(&mut self, number: u64) {
        let mut mixed = self.durable_names.clone();
        let chosen = |place: usize| choice(number, 0, place as u64);
        for (place, (name, entry)) in self.names.iter().enumerate() {
            if self.durable_names.get(name) != Some(entry) && chosen(place) {
                mixed.insert(name.clone(), *entry);
            }
        }
        let files = |names: &BTreeMap<PathBuf, Entry>| -> BTreeSet<u64> {
            names.values().filter_map(|entry| if let Entry::File(id) = entry { Some(*id) } else { None }).collect()
        };
        let (now, new) = (files(&self.names), files(&mixed));
        for (place, (name, entry)) in self.durable_names.iter().enumerate() {
            let renamed = match entry {
                Entry::File(id) if now.contains(id) => {
                    // The one new name of what was renamed must have survived.
                    new.contains(id) && mixed.iter().any(|(other, found)| other != name && found == entry)
                }
                _ => true,
            };
            if !self.names.contains_key(name) && renamed && chosen(place + self.names.len()) {
                mixed.remove(name);
            }
        }
        self.names = mixed;
    }

    fn make_directory(&mut self, path: &Path) {
        for parent in path.ancestors() {
            self.names.entry(parent.to_path_buf()).or_insert(Entry::Directory);
        }
    }
}

/// The result of an operation that went on, or an error if the process died in it.
fn unless_dead<T>(go: &Go, value: T, path: &Path) -> Result<T> {
    match go {
        Go::On => Ok(value),
        Go::Die => Err(Error::io("do anything", path, &io::ErrorKind::Other.into())),
    }
}

impl Memory {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a durable file there.
    pub fn put(&self, path: &str, content: &[u8]) {
        let mut state = self.state();
        state.make_directory(Path::new(path).parent().unwrap());
        state.clock += 1;
        let id = state.clock;
        let node = Node { data: content.to_vec(), durable: content.to_vec(), time: id };
        state.nodes.insert(id, node);
        state.names.insert(path.into(), Entry::File(id));
        state.durable_names = state.names.clone();
    }

    /// Puts everything under `from` under `to` instead: from a disk to an object store, whose objects nothing here loses.
    pub fn moved(self, from: &str, to: &str) -> Self {
        let mut state = self.state();
        let files =
            state.names.iter().filter(|(name, entry)| name.starts_with(from) && matches!(entry, Entry::File(_)));
        for (name, entry) in files.map(|(name, &entry)| (name.clone(), entry)).collect::<Vec<_>>() {
            let there = Path::new(to).join(name.strip_prefix(from).expect("it starts with it"));
            state.names.remove(&name);
            state.make_directory(there.parent().expect("it has a name"));
            state.names.insert(there, entry);
        }
        state.names.retain(|name, _| !name.starts_with(from));
        state.durable_names = state.names.clone();
        drop(state);
        self
    }

    /// Puts copies in the places of all files under `dir`, with the times of these, as `cp -p` does.
    pub fn copy_files(&self, dir: &str) {
        let mut state = self.state();
        let files = state.names.iter().filter(|(name, entry)| name.starts_with(dir) && matches!(entry, Entry::File(_)));
        for (name, entry) in files.map(|(name, &entry)| (name.clone(), entry)).collect::<Vec<_>>() {
            let Entry::File(from) = entry else { continue };
            state.clock += 1;
            let (copy, node) = (state.clock, state.nodes[&from].clone());
            state.nodes.insert(copy, node);
            state.names.insert(name.clone(), Entry::File(copy));
            state.durable_names.insert(name, Entry::File(copy));
        }
    }

    /// What is in the object store.
    pub fn objects(&self) -> BTreeMap<String, Vec<u8>> {
        let state = self.state();
        state.objects.iter().map(|(path, content)| (path.to_str().unwrap().to_owned(), content.clone())).collect()
    }

    /// An independent copy, with an operation to fail at.
    pub fn fork(&self, fault: Option<(u64, Fault)>) -> Self {
        let (state, locked) = (self.state().clone(), BTreeSet::new());
        let read = BTreeMap::new();
        let state = State { operations: 0, changes: 0, transfers: 0, read, fault, dead: false, locked, ..state };
        Self(Arc::new(Mutex::new(state)), Arc::default())
    }

    /// Says that so many bytes are free, or that there is no limit.
    pub fn set_free(&self, bytes: Option<u64>) {
        self.state().free_bytes = bytes;
    }

    /// Lets `hook` happen right before the next lock is taken.
    pub fn before_lock(&self, hook: impl FnOnce() + Send + 'static) {
        *self.1.lock().unwrap() = Some(Box::new(hook));
    }

    /// The state after the process died, or the machine with it.
    pub fn reboot(&self, survives: Survives) -> Self {
        let fork = self.fork(None);
        let mut state = fork.state();
        match survives {
            Survives::All | Survives::Names => {}
            Survives::Nothing | Survives::Zeros | Survives::Data => state.names = state.durable_names.clone(),
            Survives::Mixed(number) => state.mix_names(number),
        }
        // A directory that is gone took everything in it along.
        let names = state.names.clone();
        state.names.retain(|name, _| name.ancestors().all(|parent| names.contains_key(parent)));
        for (&id, node) in &mut state.nodes {
            match survives {
                Survives::All | Survives::Data => {}
                Survives::Nothing | Survives::Names => node.data.clone_from(&node.durable),
                Survives::Zeros => {
                    for (i, byte) in node.data.iter_mut().enumerate() {
                        if node.durable.get(i) != Some(byte) {
                            *byte = 0;
                        }
                    }
                }
                Survives::Mixed(number) => node.mix(number, id),
            }
            node.durable.clone_from(&node.data);
        }
        state.durable_names = state.names.clone();
        drop(state);
        fork
    }

    /// (operations, changes) so far.
    pub fn counts(&self) -> (u64, u64) {
        let state = self.state();
        (state.operations, state.changes)
    }

    /// Reads and writes of data so far.
    pub fn transfers(&self) -> u64 {
        self.state().transfers
    }

    /// Bytes read of all files under `dir` so far.
    pub fn bytes_read(&self, dir: &str) -> u64 {
        self.state().read.iter().filter(|(path, _)| path.starts_with(dir)).map(|(_, bytes)| bytes).sum()
    }

    /// Every file under `dir`: its inode and content.
    pub fn tree(&self, dir: &str) -> BTreeMap<String, (u64, Vec<u8>)> {
        let state = self.state();
        let file = |(path, entry): (&PathBuf, &Entry)| match (entry, path.strip_prefix(dir)) {
            (Entry::File(id), Ok(name)) => {
                Some((name.to_str().unwrap().to_owned(), (*id, state.nodes[id].data.clone())))
            }
            _ => None,
        };
        state.names.iter().filter_map(file).collect()
    }
}

struct Input {
    memory: Memory,
    path: PathBuf,
    id: u64,
    identity: Identity,
}

impl InputFile for Input {
    fn path(&self) -> &Path {
        &self.path
    }

    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn identity_now(&self) -> Result<Identity> {
        let mut state = self.memory.state();
        state.step(Does::Look, "examine", &self.path)?;
        Ok(state.identity(self.id))
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let mut state = self.memory.state();
        state.step(Does::Look, "read", &self.path)?;
        *state.read.entry(self.path.clone()).or_default() += buffer.len() as u64;
        let done = read_fully(buffer, |rest, done| {
            let most = state.transfer(rest.len())?;
            let data = state.nodes[&self.id].data.get((offset + done) as usize..).unwrap_or_default();
            let length = most.min(data.len());
            rest[..length].copy_from_slice(&data[..length]);
            Ok(length)
        });
        match done.map_err(|e| Error::io("read", &self.path, &e))? {
            done if done < buffer.len() => Err(Error::failed("the file ends early").at(&self.path)),
            _ => Ok(()),
        }
    }
}

struct Output {
    memory: Memory,
    path: PathBuf,
    id: u64,
    failure: Mutex<Option<Error>>,
}

impl Output {
    /// Runs `operation` unless an earlier one failed, and keeps the first failure.
    fn sticky(&self, operation: impl FnOnce(&mut State) -> Result<()>) -> Result<()> {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = &*failure {
            return Err(error.clone());
        }
        let result = operation(&mut self.memory.state());
        *failure = result.as_ref().err().cloned();
        result
    }
}

impl OutputFile for Output {
    fn path(&self) -> &Path {
        &self.path
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.sticky(|state| {
            let go = state.step(Does::Change, "write", &self.path)?;
            let bytes = if matches!(go, Go::Die) { &bytes[..bytes.len() / 2] } else { bytes };
            let written = write_fully(bytes, |rest, done| {
                let length = state.transfer(rest.len())?;
                let data = &mut state.touch(self.id).data;
                let range = (offset + done) as usize..(offset + done) as usize + length;
                data.resize(data.len().max(range.end), 0);
                data[range].copy_from_slice(&rest[..length]);
                Ok(length)
            });
            written.map_err(|e| Error::io("write", &self.path, &e))?;
            unless_dead(&go, (), &self.path)
        })
    }

    fn sync(&self) -> Result<()> {
        self.sticky(|state| {
            let go = state.step(Does::Change, "sync", &self.path)?;
            let node = state.nodes.get_mut(&self.id).unwrap();
            node.durable.clone_from(&node.data);
            unless_dead(&go, (), &self.path)
        })
    }

    fn release(&self, _offset: u64, _length: u64) {}
}

impl Memory {
    fn output(&self, path: &Path, id: u64) -> Box<dyn OutputFile> {
        Box::new(Output { memory: self.clone(), path: path.to_path_buf(), id, failure: Mutex::default() })
    }
}

impl Storage for Memory {
    fn open(&self, path: &Path) -> Result<Box<dyn InputFile>> {
        let mut state = self.state();
        state.step(Does::Look, "open", path)?;
        let id = state.file(path)?;
        let identity = state.identity(id);
        Ok(Box::new(Input { memory: self.clone(), path: path.to_path_buf(), id, identity }))
    }

    fn read_small(&self, path: &Path, limit: u64) -> Result<Vec<u8>> {
        let object = self.state().objects.get(path).cloned();
        if let Some(object) = object {
            self.state().step(Does::Look, "read", path)?;
            return Ok(object);
        }
        let input = self.open(path)?;
        assert!(input.identity().bytes <= limit);
        let mut content = vec![0; input.identity().bytes as usize];
        input.read_at(&mut content, 0)?;
        Ok(content)
    }

    fn upload(&self, from: &Path, to: &Path, go_on: &dyn Fn() -> Result<()>) -> Result<()> {
        let mut state = self.state();
        let go = state.step(Does::Change, "upload", to)?;
        unless_dead(&go, (), to)?;
        go_on()?;
        let file = state.file(from)?;
        let content = state.nodes[&file].data.clone();
        state.objects.insert(to.to_path_buf(), content);
        Ok(())
    }

    fn create(&self, path: &Path, length: u64) -> Result<Box<dyn OutputFile>> {
        let mut state = self.state();
        let go = state.step(Does::Change, "create", path)?;
        assert_eq!(state.names.get(path.parent().unwrap()), Some(&Entry::Directory), "{}", path.display());
        let id = match state.names.get(path) {
            Some(Entry::File(id)) => *id,
            _ => {
                state.clock += 1;
                let id = state.clock;
                state.nodes.insert(id, Node::default());
                state.names.insert(path.to_path_buf(), Entry::File(id));
                id
            }
        };
        let data = &mut state.touch(id).data;
        data.clear();
        data.resize(length as usize, 0);
        unless_dead(&go, (), path)?;
        Ok(self.output(path, id))
    }

    fn reopen(&self, path: &Path, length: u64) -> Result<Box<dyn OutputFile>> {
        let mut state = self.state();
        let go = state.step(Does::Change, "reopen", path)?;
        let id = state.file(path)?;
        if state.nodes[&id].data.len() as u64 != length {
            state.touch(id).data.resize(length as usize, 0);
        }
        unless_dead(&go, (), path)?;
        Ok(self.output(path, id))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        let mut state = self.state();
        let go = state.step(Does::Change, "rename", from)?;
        let id = state.file(from)?;
        state.names.remove(from);
        state.names.insert(to.to_path_buf(), Entry::File(id));
        unless_dead(&go, (), from)
    }

    fn sync_dir(&self, path: &Path) -> Result<()> {
        let mut state = self.state();
        let go = state.step(Does::Change, "sync directory", path)?;
        let here = |name: &Path| name.parent() == Some(path);
        let entries: Vec<_> = state.names.iter().filter(|(name, _)| here(name)).map(|(n, e)| (n.clone(), *e)).collect();
        state.durable_names.retain(|name, _| !here(name));
        state.durable_names.extend(entries);
        unless_dead(&go, (), path)
    }

    fn create_dir_all(&self, path: &Path) -> Result<()> {
        let mut state = self.state();
        let made: Vec<_> = path.ancestors().take_while(|dir| !state.names.contains_key(*dir)).collect();
        let go = state.step(Does::Change, "create directory", path)?;
        state.make_directory(path);
        unless_dead(&go, (), path)?;
        drop(state);
        made.into_iter().rev().try_for_each(|dir| self.sync_dir(dir.parent().expect("the root is always there")))
    }

    fn remove_file(&self, path: &Path) -> Result<()> {
        let mut state = self.state();
        let go = state.step(Does::Change, "remove", path)?;
        state.names.remove(path);
        unless_dead(&go, (), path)
    }

    fn remove_dir(&self, path: &Path) -> Result<()> {
        let mut state = self.state();
        let go = state.step(Does::Change, "remove directory", path)?;
        if !state.names.keys().any(|name| name.parent() == Some(path)) {
            state.names.remove(path);
        }
        unless_dead(&go, (), path)
    }

    fn list(&self, path: &Path) -> Result<Vec<OsString>> {
        let mut state = self.state();
        state.step(Does::Look, "list", path)?;
        let here = state.names.keys().chain(state.objects.keys()).filter(|name| name.parent() == Some(path));
        Ok(here.map(|name| name.file_name().unwrap().to_owned()).collect())
    }

    fn lock(&self, path: &Path) -> Result<Lock> {
        let hook = self.1.lock().unwrap().take();
        hook.into_iter().for_each(|hook| hook());
        self.create_dir_all(path.parent().unwrap())?;
        self.create(path, 0)?;
        let mut state = self.state();
        assert!(state.locked.insert(path.to_owned()), "one run at a time");
        Ok(Lock::new(Held(self.clone(), path.to_owned())))
    }

    fn free_bytes(&self, path: &Path) -> Result<u64> {
        let mut state = self.state();
        state.step(Does::Look, "examine", path)?;
        Ok(state.free_bytes.unwrap_or(u64::MAX))
    }

    fn identity(&self, path: &Path) -> Result<Option<Identity>> {
        let mut state = self.state();
        state.step(Does::Look, "examine", path)?;
        Ok(match state.names.get(path) {
            Some(Entry::File(id)) => Some(state.identity(*id)),
            // Every directory is its own.
            Some(Entry::Directory) => {
                let inode = state.names.keys().position(|name| name == path).unwrap() as u64 + (1 << 40);
                Some(Identity { device: 1, inode, ..Identity::default() })
            }
            None => None,
        })
    }

    fn is_dir(&self, path: &Path) -> bool {
        self.state().names.get(path) == Some(&Entry::Directory)
    }

    fn is_file(&self, path: &Path) -> bool {
        let state = self.state();
        matches!(state.names.get(path), Some(Entry::File(_))) || state.objects.contains_key(path)
    }

    fn canonical(&self, path: &Path) -> PathBuf {
        path.to_path_buf()
    }
}

struct Held(Memory, PathBuf);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.state().locked.remove(&self.1);
    }
}
