//! Methods whose result lies in the span of their inputs: θ = Σ_t c_t x_t.
//!
//! Angles and lengths of the inputs are all that decides the coefficients c, so one look that gathers the Gram matrix
//! G_st = ⟨x_s, x_t⟩ is enough: iterations run on n numbers, and the merge is a weighted sum. Sums run in f64 over fixed
//! blocks in order; coefficients are f64, rounded to f32 to be multiplied.

use super::{Inputs, Look, Merger, Needs, Settings, Subject, Tile};
use crate::kernels;

/// The Gram matrix of a few vectors.
pub(super) struct Gram {
    n: usize,
    /// The upper triangle, row by row.
    products: Vec<f64>,
}

impl Gram {
    /// How many products n vectors have.
    fn size(n: usize) -> usize {
        n * (n + 1) / 2
    }

    fn add(tile: &Tile<'_>, products: &mut [f64]) {
        let pairs = (0..tile.inputs.len()).flat_map(|i| (i..tile.inputs.len()).map(move |j| (i, j)));
        for (product, (i, j)) in products.iter_mut().zip(pairs) {
            *product += kernels::dot(tile.isa, tile.inputs[i], tile.inputs[j]);
        }
    }

    /// How many vectors there are.
    pub(super) fn len(&self) -> usize {
        self.n
    }

    /// ⟨x_i, x_j⟩.
    pub(super) fn dot(&self, i: usize, j: usize) -> f64 {
        let (i, j) = (i.min(j), i.max(j));
        self.products[i * self.n - i * (i + 1) / 2 + j]
    }

    /// ‖x_i‖.
    pub(super) fn norm(&self, i: usize) -> f64 {
        self.dot(i, i).max(0.0).sqrt()
    }

    /// ‖Σ c_i x_i‖.
    pub(super) fn norm_of(&self, c: &[f64]) -> f64 {
        let row = |i: usize| c[i] * (0..self.n).map(|j| c[j] * self.dot(i, j)).sum::<f64>();
        (0..self.n).map(row).sum::<f64>().max(0.0).sqrt()
    }
}

/// Coefficients from a Gram matrix and the models' weights.
pub(super) type Coefficients = Box<dyn Fn(&Gram, &[f64]) -> Vec<f64> + Send + Sync>;

/// What a vector is, for a [`SpanMerger`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Vectors {
    /// A tensor.
    Tensors,
    /// A row of a tensor: the last axis.
    Rows,
    /// A column of a tensor: the first axis.
    Columns,
}

/// Σ c_t x_t, the c_t from the Gram matrix of whole tensors, of each row or of each column.
pub(super) struct SpanMerger {
    pub inputs: Inputs,
    pub vectors: Vectors,
    pub coefficients: Coefficients,
}

impl SpanMerger {
    /// Of whole tensors: weights, or task vectors where there is a base.
    pub(super) fn of(inputs: Inputs, coefficients: Coefficients) -> Box<dyn Merger> {
        Box::new(Self { inputs, vectors: Vectors::Tensors, coefficients })
    }

    /// The inputs of a tile, row by row.
    fn rows<'t>(tile: &'t Tile<'_>) -> impl Iterator<Item = Vec<&'t [f32]>> {
        let length = tile.inputs.first().map_or(0, |input| input.len());
        let row = move |start: usize| {
            let end = (start + tile.row).min(length);
            tile.inputs.iter().map(|input| &input[start..end]).collect()
        };
        (0..length).step_by(tile.row.max(1)).map(row)
    }

    fn combine(&self, products: &[f64], weights: &[f32]) -> Vec<f64> {
        let gram = Gram { n: weights.len(), products: products.to_vec() };
        let weights: Vec<f64> = weights.iter().map(|&w| f64::from(w)).collect();
        (self.coefficients)(&gram, &weights)
    }
}

/// Task vectors where there is a base, else the weights themselves.
pub(super) fn inputs_with(base: bool) -> Inputs {
    if base { Inputs::TaskVectors } else { Inputs::Weights }
}

/// A boolean parameter.
pub(super) fn flag(settings: &Settings, name: &str) -> bool {
    settings.word(name) == "true"
}

impl Merger for SpanMerger {
    fn needs(&self) -> Needs {
        let looks: &[Look] = if self.vectors == Vectors::Rows { &[] } else { &[Look::Sums] };
        let columns = self.vectors == Vectors::Columns;
        Needs { looks, rows: self.vectors != Vectors::Tensors, columns, ..Needs::of(self.inputs) }
    }

    fn facts(&self, models: usize) -> usize {
        if self.vectors == Vectors::Rows { 0 } else { models }
    }

    fn sums(&self, _look: usize, models: usize) -> usize {
        Gram::size(models)
    }

    fn add_sums(&self, _look: usize, tile: &Tile<'_>, sums: &mut [f64]) {
        if self.vectors != Vectors::Columns {
            return Gram::add(tile, sums);
        }
        for inputs in Self::rows(tile) {
            for (column, products) in sums.chunks_exact_mut(Gram::size(inputs.len())).enumerate() {
                let pairs = (0..inputs.len()).flat_map(|i| (i..inputs.len()).map(move |j| (i, j)));
                for (product, (i, j)) in products.iter_mut().zip(pairs) {
                    *product += f64::from(inputs[i][column]) * f64::from(inputs[j][column]);
                }
            }
        }
    }

    fn conclude(&self, _look: usize, subject: Subject<'_>, found: &[f64]) -> Vec<f64> {
        found.chunks_exact(Gram::size(subject.weights.len())).flat_map(|g| self.combine(g, subject.weights)).collect()
    }

    fn merge(&self, tile: &Tile<'_>, out: &mut [f32], _scratch: &mut [f32]) {
        out.fill(0.0);
        if self.vectors == Vectors::Tensors {
            for (input, &c) in tile.inputs.iter().zip(tile.facts) {
                kernels::add_scaled(tile.isa, out, c as f32, input);
            }
            return;
        }
        for (inputs, out) in Self::rows(tile).zip(out.chunks_mut(tile.row)) {
            if self.vectors == Vectors::Columns {
                let models = inputs.len();
                for (t, input) in inputs.iter().enumerate() {
                    let coefficients = tile.facts.iter().skip(t).step_by(models);
                    for ((out, x), c) in out.iter_mut().zip(*input).zip(coefficients) {
                        *out += *c as f32 * x;
                    }
                }
                continue;
            }
            let mut products = vec![0.0; Gram::size(inputs.len())];
            Gram::add(&Tile { inputs: &inputs, ..*tile }, &mut products);
            for (row, c) in inputs.iter().zip(self.combine(&products, tile.weights)) {
                kernels::add_scaled(tile.isa, out, c as f32, row);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_found_by_either_order_of_their_indexes() {
        let gram = Gram { n: 3, products: vec![4.0, 1.0, 2.0, 9.0, 3.0, 16.0] };
        let rows: Vec<Vec<f64>> = (0..3).map(|i| (0..3).map(|j| gram.dot(i, j)).collect()).collect();
        assert_eq!(rows, [[4.0, 1.0, 2.0], [1.0, 9.0, 3.0], [2.0, 3.0, 16.0]]);
        assert_eq!((gram.norm(2), gram.norm_of(&[1.0, 0.0, -1.0])), (4.0, 4.0));
    }
}
