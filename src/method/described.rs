//! A method as a table of what there is to say about it, for methods without state of their own.

use super::{Merger, Method, ParamSpec, Settings};

/// See [`Method`] for the fields.
pub(super) struct Described {
    pub name: &'static str,
    pub summary: &'static str,
    pub formula: &'static str,
    pub reference: &'static str,
    pub params: &'static [ParamSpec],
    pub models: (usize, usize),
    pub trims: bool,
    pub draws: bool,
    pub needs_base: bool,
    pub base_is_model: bool,
    pub prepare: fn(&Settings, bool) -> Box<dyn Merger>,
}

impl Described {
    /// What most methods are: a function of task vectors that are whole.
    pub const PLAIN: Self = Self {
        name: "",
        summary: "",
        formula: "",
        reference: "",
        params: &[],
        models: (1, usize::MAX),
        trims: false,
        draws: false,
        needs_base: true,
        base_is_model: false,
        prepare: |_, _| unreachable!("every method says how it is prepared"),
    };
}

impl Method for Described {
    fn name(&self) -> &'static str {
        self.name
    }

    fn summary(&self) -> &'static str {
        self.summary
    }

    fn formula(&self) -> &'static str {
        self.formula
    }

    fn reference(&self) -> &'static str {
        self.reference
    }

    fn params(&self) -> &'static [ParamSpec] {
        self.params
    }

    fn trims(&self) -> bool {
        self.trims
    }

    fn draws(&self) -> bool {
        self.draws
    }

    fn models(&self) -> (usize, usize) {
        self.models
    }

    fn needs_base(&self) -> bool {
        self.needs_base
    }

    fn base_is_model(&self) -> bool {
        self.base_is_model
    }

    fn prepare(&self, settings: &Settings, base: bool) -> Box<dyn Merger> {
        (self.prepare)(settings, base)
    }
}
