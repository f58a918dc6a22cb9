//! What is not finite: inputs with NaN and infinities, and results that the output type cannot hold.
//!
//! - Whether an element is an exception is decided on its stored values, in f64: a double beyond the range of f32 is a
//!   number all the same.
//! - A task vector of finite values that overflows f32 is an error whatever the recipe says about non-finite inputs:
//!   there is no value that could stand for it.
//!
//! Called for tiles in which something is not finite, so it goes element by element.

use super::slot::Span;
use super::worker::Worker;
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::kernels;
use crate::method::Inputs;
use crate::plan::{NonFinite, Overflow, Piece};

impl Worker {
    /// Deals with the input tile of `model`, which is not finite everywhere: an error or, where the recipe says
    /// otherwise, zeros.
    pub(super) fn settle_input(&mut self, span: Span<'_>, (model, piece): (usize, Piece)) -> Result<()> {
        let deltas = span.data.plan.needs().inputs != Inputs::Weights;
        let base = span.data.merge().base.filter(|_| deltas);
        let input = &mut self.tiles.inputs[model][..span.length];
        for (i, value) in input.iter_mut().enumerate().filter(|(_, value)| !value.is_finite()) {
            let parties = base.into_iter().chain([piece]);
            if let Some(bad) = parties.into_iter().find(|&party| !span.value(party, i).is_finite()) {
                if span.data.plan.non_finite == NonFinite::Error {
                    return Err(non_finite(span, bad, i));
                }
                *value = 0.0;
            } else {
                return Err(too_large(span, piece, base, i));
            }
        }
        Ok(())
    }

    /// Deals with the oracle's task vector in the scratch tile, which is not finite everywhere. One that overflows has
    /// a sign all the same.
    pub(super) fn settle_oracle(&mut self, span: Span<'_>, piece: Piece) -> Result<()> {
        let base = span.data.merge().base;
        for (i, value) in self.tiles.scratch[..span.length].iter_mut().enumerate() {
            let parties = base.into_iter().chain([piece]);
            if let Some(bad) =
                parties.into_iter().find(|&party| !value.is_finite() && !span.value(party, i).is_finite())
            {
                if span.data.plan.non_finite == NonFinite::Error {
                    return Err(non_finite(span, bad, i));
                }
                *value = 0.0;
            }
        }
        Ok(())
    }

    /// Gives every element with a non-finite input the value that the recipe asks for, in the out tile, and marks it.
    pub(super) fn settle_exempt(&mut self, span: Span<'_>) {
        let merge = span.data.merge();
        let base = merge.base.filter(|_| span.data.plan.needs().inputs != Inputs::Weights);
        let models = merge.models.iter().map(|&(_, piece)| piece);
        let mut sums = vec![0.0f32; span.length];
        for piece in base.into_iter().chain(models).chain(merge.oracle) {
            for (i, sum) in sums[..span.length].iter_mut().enumerate() {
                let value = span.value(piece, i);
                if !value.is_finite() {
                    *sum += value as f32;
                    self.tiles.exempt[i] = true;
                }
            }
        }
        for (i, sum) in sums.iter().enumerate().take(span.length).filter(|&(i, _)| self.tiles.exempt[i]) {
            self.tiles.out[i] = match span.data.plan.non_finite {
                NonFinite::CopyBase => self.tiles.base[i],
                _ => *sum,
            };
        }
    }

    /// Encodes the out tile as f64 on top of `base`, the stored bytes of an f64 base.
    pub(super) fn finish_f64(&mut self, span: Span<'_>, clean: bool, base: &[u8], encoded: &mut [u8]) -> Result<()> {
        let plan = span.data.plan;
        if !kernels::all_finite(self.isa, &self.tiles.out[..span.length]) {
            // What is not finite here for a reason is replaced below.
            let exempt = |i: usize| {
                let merge = span.data.merge();
                let models = merge.models.iter().map(|&(_, piece)| piece);
                let mut parties = merge.base.into_iter().chain(models).chain(merge.oracle);
                parties.any(|piece| !span.value(piece, i).is_finite())
            };
            for (i, value) in self.tiles.out[..span.length].iter_mut().enumerate() {
                match value.is_finite() || exempt(i) {
                    true => {}
                    false if plan.overflow == Overflow::Clamp && value.is_infinite() => {
                        *value = f32::MAX.copysign(*value);
                    }
                    false => return Err(lost(span, i, *value)),
                }
            }
        }
        kernels::store_sum_f64(self.isa, Float::F64, base, &self.tiles.out[..span.length], encoded);
        if !clean {
            self.settle_exempt(span);
            let kept = plan.non_finite == NonFinite::CopyBase;
            for i in (0..span.length).filter(|&i| self.tiles.exempt[i]) {
                let value = f64::from(self.tiles.out[i]).to_le_bytes();
                encoded[i * 8..i * 8 + 8].copy_from_slice(if kept { &base[i * 8..i * 8 + 8] } else { &value });
            }
        }
        Ok(())
    }

    /// Encodes the out tile, refusing (or clamping) results that the output type cannot hold.
    pub(super) fn encode(&mut self, span: Span<'_>, encoded: &mut [u8]) -> Result<()> {
        let float = span.data.output();
        let clamp = span.data.plan.overflow == Overflow::Clamp;
        let values = &mut self.tiles.out[..span.length];
        if kernels::store(self.isa, float, values, encoded, clamp) {
            return Ok(());
        }
        let mut one = [0u8; 8];
        for (i, value) in values.iter_mut().enumerate().filter(|&(i, _)| !self.tiles.exempt[i]) {
            if clamp && value.is_infinite() {
                *value = f32::MAX.copysign(*value);
            } else if !kernels::store(self.isa, float, &[*value], &mut one[..float.width()], clamp) {
                return Err(lost(span, i, *value));
            }
        }
        kernels::store(self.isa, float, values, encoded, clamp);
        Ok(())
    }
}

/// The stored value of `party` at element `index` of the tile is NaN or infinite.
fn non_finite(span: Span<'_>, party: Piece, index: usize) -> Error {
    let merge = span.data.merge();
    let model = merge.models.iter().find(|&&(_, piece)| piece == party);
    let who = match model {
        Some((model, _)) => format!("model {}", model + 1),
        None if merge.base == Some(party) => "base".into(),
        None => "the sign checkpoint".into(),
    };
    let (entry, file) = span.data.plan.source(party);
    let offset = entry.offset + span.element(index) * span.data.float(party).width() as u64;
    Error::input(format!("{} in {who} at element {}", span.value(party, index), span.element(index)))
        .at(&file.origin(offset))
        .tensor(span.data.name())
        .help("repair the checkpoint, or use --non-finite copy-base or --non-finite propagate")
}

/// What weighs the parameters of `model` holds something that is no weight.
pub(super) fn no_weight(span: Span<'_>, piece: Piece, model: u32) -> Error {
    let bad = |&i: &usize| !(span.value(piece, i) >= 0.0 && (span.value(piece, i) as f32).is_finite());
    let index = (0..span.length).find(bad).unwrap_or(0);
    let (value, element) = (span.value(piece, index), span.element(index));
    Error::input(format!("{value} in the Fisher information of model {} at element {element}", model + 1))
        .at(span.data.plan.source(piece).1.path())
        .tensor(span.data.name())
        .help("Fisher information is a mean of squares: finite, and nowhere negative")
}

/// Finite values of `piece` and `base` whose difference (or, without base, which itself) is too large for f32.
fn too_large(span: Span<'_>, piece: Piece, base: Option<Piece>, index: usize) -> Error {
    let value = span.value(piece, index);
    let text = match base {
        Some(base) => format!(
            "the task vector at element {}: {value:e} less {:e} in base",
            span.element(index),
            span.value(base, index)
        ),
        None => format!("{value:e} at element {}", span.element(index)),
    };
    Error::input(format!("{text} is too large for float32"))
        .at(span.data.plan.source(piece).1.path())
        .tensor(span.data.name())
        .help("such a model cannot be merged: repair the checkpoint")
}

/// The output type cannot hold a result.
fn lost(span: Span<'_>, index: usize, value: f32) -> Error {
    let (element, float) = (span.element(index), span.data.output().torch_name());
    Error::input(format!("the result at element {element} is {value:e}, which {float} cannot hold"))
        .tensor(span.data.name())
        .help("use --overflow clamp, a wider --dtype, or a smaller --lambda")
}

/// `value` as the f32 that rounds to `float` as `value` itself does: nearest for f32; for narrower types, rounded to odd,
/// which keeps what was cut off from being rounded twice (Boldo and Melquiond 2008).
pub(super) fn narrow(value: f64, float: Float) -> f32 {
    let nearest = value as f32;
    if float == Float::F32 || !value.is_finite() || f64::from(nearest) == value {
        return nearest;
    }
    let beyond = f64::from(nearest).abs() > value.abs();
    f32::from_bits((nearest.to_bits() - u32::from(beyond)) | 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Isa;

    #[test]
    fn doubles_are_rounded_once_to_half_precision() {
        let to = |float: Float, value: f64| {
            let mut bytes = [0; 2];
            kernels::store(Isa::detect(), float, &[narrow(value, float)], &mut bytes, false);
            u16::from_le_bytes(bytes)
        };
        let tiny = 2f64.powi(-40);
        // Halfway between two f16, or a hair beside it.
        assert_eq!(to(Float::F16, 1.0 + 2f64.powi(-11)), 0x3c00);
        assert_eq!(to(Float::F16, 1.0 + 2f64.powi(-11) + tiny), 0x3c01);
        assert_eq!(to(Float::F16, 1.0 + 3.0 * 2f64.powi(-11) - tiny), 0x3c01);
        assert_eq!(to(Float::BF16, -1.0 - 2f64.powi(-8) - tiny), 0xbf81);
        assert_eq!(to(Float::BF16, -1.0 - 2f64.powi(-8)), 0xbf80);
        assert_eq!(narrow(1.0 + tiny, Float::F32), 1.0);
        assert_eq!(narrow(f64::MAX, Float::BF16), f32::MAX);
        assert!(narrow(f64::NAN, Float::F16).is_nan());
    }
}
