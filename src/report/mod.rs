//! Reports of a look at a family: figures as SVG, and a page that needs nothing but itself.
//!
//! - `data`: the numbers, as `report.json` has them.
//! - `svg`: axes, lines, bars, points and cells on a canvas.
//! - `figures`: each figure from the numbers, with a sentence on how to read it.
//! - `words`: the summary in plain words.
//! - `page`: the page; its style and its script lie beside it.
//!
//! Knows numbers and text only: nothing here reads, computes on weights, or writes a file.

mod data;
mod figures;
mod page;
mod svg;
mod words;

pub use data::*;
pub use figures::{FIGURES, figures};
pub use page::{PAGE, page};
pub use words::{Remark, remarks};
