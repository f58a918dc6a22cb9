//! Adapters merged with each other, without the model that they are on.
//!
//! - Each is a checkpoint of its own tensors. Their task vectors are differences to what an adapter that does nothing has:
//!   ones for (IA)³, and zeros for the factors of LoRA, as PEFT and the TIES paper have it.
//! - Factors can be merged entry by entry only if ranks are equal. Where scales differ, B takes the difference up, so that
//!   the first adapter's configuration is the output's. Otherwise what is merged are the changes B A (`changes.rs`).
//! - Tensors that an adapter holds whole have no known base: only methods without one take them.

use std::sync::Arc;

use super::changes::{self, Changes};
use super::config::Kind;
use super::views::{Adapted, Change, Constant};
use super::{Adapter, Factors, Modules, one_factor, part};
use crate::checkpoint::resolve::{self, Source};
use crate::checkpoint::{Checkpoint, CheckpointFile, Derived, TensorEntry};
use crate::dtype::Float;
use crate::error::{Error, Result, printable};
use crate::storage::Storage;

/// Adapters that are merged with each other.
pub enum Adapters {
    /// Tensor by tensor: a checkpoint each, after the base of their task vectors if there is one.
    Tensors(Vec<Checkpoint>),
    /// Through the changes that they make.
    Changes(Changes),
}

impl Checkpoint {
    /// The adapters that `specs` name, after the base of their task vectors if `with_base`; `None` if one of them is no
    /// adapter. They are taken as changes if `rank` says so, or ranks differ.
    pub fn open_adapters(
        specs: &[&str],
        with_base: bool,
        rank: Option<u64>,
        storage: &Arc<dyn Storage>,
    ) -> Result<Option<Adapters>> {
        for spec in specs {
            // What cannot be found is said where it is opened.
            let found = resolve::resolve(spec, &**storage, &|name| std::env::var_os(name));
            if !found.is_ok_and(|found| found.source == Source::Adapter) {
                return Ok(None);
            }
        }
        let adapters = specs.iter().map(|spec| Adapter::open(spec, &**storage)).collect::<Result<Vec<_>>>()?;
        let Some(first) = adapters.first() else { return Ok(None) };
        for (adapter, spec) in adapters.iter().zip(specs) {
            first.check_kind(adapter, specs[0], spec)?;
        }
        if rank.is_some() || !changes::ranks_are_equal(&adapters)? {
            return Ok(Some(Adapters::Changes(changes::changes(&adapters, specs, with_base, rank, &**storage)?)));
        }
        if with_base {
            adapters.iter().try_for_each(Adapter::refuse_whole)?;
        }
        let scales = first.scales()?;
        let mut checkpoints = Vec::with_capacity(adapters.len() + 1);
        if with_base {
            checkpoints.push(first.untrained(specs[0])?);
        }
        for (adapter, spec) in adapters.into_iter().zip(specs) {
            checkpoints.push(adapter.alone(spec, &scales)?);
        }
        Ok(Some(Adapters::Tensors(checkpoints)))
    }
}

/// Scale and rank of each module, by its name.
pub(super) type Scales = std::collections::BTreeMap<String, (f32, u64)>;

impl Adapter {
    fn check_kind(&self, other: &Self, spec: &str, other_spec: &str) -> Result<()> {
        let name = |kind: &Kind| if matches!(kind, Kind::Lora(_)) { "LoRA" } else { "(IA)³" };
        let (own, others) = (name(&self.config.kind), name(&other.config.kind));
        if own == others {
            return Ok(());
        }
        let (spec, other_spec) = (printable(spec), printable(other_spec));
        Err(Error::input(format!(
            "{spec} is {own}, but {other_spec} is {others}: they cannot be merged with each other"
        ))
        .help("give --base MODEL to merge the models that they make of it"))
    }

    fn refuse_whole(&self) -> Result<()> {
        match Modules::of(&self.tensors)?.whole.values().next() {
            None => Ok(()),
            Some(entry) => Err(Error::input("a whole tensor, whose base is not known")
                .at(self.file.file.path())
                .tensor(&entry.name)
                .help("give --base MODEL, or use a method without a base, such as linear")),
        }
    }

    /// Scales and ranks of the modules of a LoRA adapter.
    pub(super) fn scales(&self) -> Result<Scales> {
        let mut scales = Scales::new();
        if let Kind::Lora(lora) = &self.config.kind {
            let place = |error: Error| error.at(self.file.file.path());
            for (module, parts) in Modules::of(&self.tensors).map_err(place)?.changed {
                let (Some(a), Some(b)) = (parts.linear.0.or(parts.embedding.0), parts.linear.1.or(parts.embedding.1))
                else {
                    return Err(place(one_factor(&module)));
                };
                let factors = Factors::new(&module, lora, a, b).map_err(place)?;
                scales.insert(module, (factors.scale, factors.rank));
            }
        }
        Ok(scales)
    }

    /// An adapter like this one that does nothing.
    fn untrained(&self, spec: &str) -> Result<Checkpoint> {
        let value: f32 = if matches!(self.config.kind, Kind::Lora(_)) { 0.0 } else { 1.0 };
        let like = Arc::clone(&self.file.file);
        let mut derived = Derived::default();
        let shown = |entry: &TensorEntry| {
            let elements = entry.elements();
            derived.stored.insert(entry.name.clone(), entry.dtype);
            TensorEntry { dtype: Float::F32.dtype(), file: 0, offset: 0, bytes: elements * 4, ..entry.clone() }
        };
        let tensors = self.tensors.iter().map(shown).collect();
        let header_hash = *blake3::hash(&value.to_le_bytes()).as_bytes();
        let files = vec![CheckpointFile { file: Arc::new(Constant { like, value }), header_bytes: 0, header_hash }];
        Ok(self.checkpoint(&format!("untrained {spec}"), files, tensors, derived))
    }

    pub(super) fn checkpoint(
        &self,
        spec: &str,
        files: Vec<CheckpointFile>,
        tensors: Vec<TensorEntry>,
        derived: Derived,
    ) -> Checkpoint {
        let (spec, dir) = (spec.to_owned(), self.dir.clone());
        Checkpoint { spec, dir, hub: None, files, tensors, warnings: Vec::new(), derived }
    }

    /// Its tensors, with scales that differ from `scales` taken up by B.
    fn alone(self, spec: &str, scales: &Scales) -> Result<Checkpoint> {
        let place = self.file.file.path().to_path_buf();
        let own = self.scales()?;
        let file = Arc::clone(&self.file.file);
        let mut rescaled = Vec::new();
        for (module, parts) in &Modules::of(&self.tensors).map_err(|e| e.at(&place))?.changed {
            let (Some(&(wanted, _)), Some(&(scale, _))) = (scales.get(module), own.get(module)) else { continue };
            let b = parts.linear.1.or(parts.embedding.1).expect("it has a scale");
            if wanted != scale {
                let shape = (b.shape[0], b.elements() / b.shape[0].max(1));
                let view = Adapted::new(Some(part(&file, b)?), shape, Change::Scale(scale / wanted));
                rescaled.push((b.clone(), view));
            }
        }
        let Self { dir, file, tensors, .. } = self;
        let (spec, files, derived) = (spec.to_owned(), vec![file], Derived::default());
        let mut checkpoint = Checkpoint { spec, dir, hub: None, files, tensors, warnings: Vec::new(), derived };
        for (entry, view) in rescaled {
            checkpoint.derived.scratch_bytes = crate::limits::ADAPTER_SCRATCH_BYTES;
            checkpoint.show(&entry, view.float(), view.hash(), Arc::new(view));
        }
        Ok(checkpoint)
    }
}
