//! Tall matrices in f64: products with ΔW, block by block, and orthonormal bases.
//!
//! - Columns are stored eight at a time, as panels whose rows follow each other: what products take as they are.
//! - Every entry of a product is a sum over k in order, products and sums rounded separately. So blocks of ΔW may have any
//!   number of rows, and work may be cut for any number of threads.
//! - Bases come from block Gram-Schmidt, each panel projected twice (Giraud et al. 2005). A column that is a combination of
//!   those before it, as far as f64 can tell, becomes zero.

use std::ops::Range;

use crate::engine::pool;
use crate::error::Result;
use crate::kernels::{self, Isa, PANEL};
use crate::limits::{PANEL_COLUMNS, PRODUCT_BYTES};

/// Rows of a result that are computed at once, and entries of the sums that are converted at once.
const ROWS: usize = 32;
const DEPTH: usize = 1024;
/// Rows of a panel that are projected at once.
const PROJECTED: usize = 2048;
/// What is left of a column, in terms of its length, if there is nothing new in it.
const NOTHING: f64 = 1e-12;

const _: () = assert!((ROWS * DEPTH * 8) as u64 <= PRODUCT_BYTES && PANEL as u64 == PANEL_COLUMNS);

/// Who computes: an instruction set, and a buffer per thread.
pub(super) struct Hands {
    isa: Isa,
    buffers: Vec<Vec<f64>>,
}

impl Hands {
    pub(super) fn new(threads: usize) -> Self {
        Self { isa: Isa::detect(), buffers: vec![vec![0.0; ROWS * DEPTH]; threads] }
    }

    /// Runs `work` on every item.
    fn each<T: Send>(&mut self, items: Vec<T>, work: impl Fn(Isa, &mut [f64], T) + Sync) -> Result<()> {
        let isa = self.isa;
        pool::run(
            &mut self.buffers,
            items.into_iter(),
            0,
            |_| (),
            |buffer, _, item| {
                work(isa, buffer, item);
                Ok(())
            },
        )
    }
}

/// See the module's documentation.
pub(super) struct Tall {
    rows: usize,
    data: Vec<f64>,
}

/// A part of a panel to be computed: its first row, its panel, its entries.
type Part<'a> = (usize, usize, &'a mut [f64]);

impl Tall {
    /// Zeros; `columns` is a multiple of a panel's.
    pub(super) fn new(rows: usize, columns: usize) -> Self {
        debug_assert!(columns.is_multiple_of(PANEL));
        Self { rows, data: vec![0.0; rows * columns] }
    }

    pub(super) fn columns(&self) -> usize {
        self.data.len() / self.rows.max(1)
    }

    fn panel(&self, panel: usize) -> &[f64] {
        &self.data[panel * self.rows * PANEL..(panel + 1) * self.rows * PANEL]
    }

    /// The entry in `row` and `column`.
    pub(super) fn get(&self, row: usize, column: usize) -> f64 {
        self.data[(column / PANEL * self.rows + row) * PANEL + column % PANEL]
    }

    /// Fills it with numbers between -1 and 1 that look random, always the same.
    pub(super) fn randomize(&mut self) {
        let unit = |at: usize| (kernels::draw(0, at as u64) >> 11) as f64 / (1u64 << 52) as f64 - 1.0;
        self.data.iter_mut().enumerate().for_each(|(at, value)| *value = unit(at));
    }

    pub(super) fn clear(&mut self) {
        self.data.fill(0.0);
    }

    /// Rows `rows` of all panels, in parts: the parts of the first rows come first.
    fn parts(&mut self, rows: Range<usize>, length: usize) -> Vec<Part<'_>> {
        let panels = self.data.chunks_mut((self.rows * PANEL).max(1)).enumerate();
        let mut parts: Vec<Part<'_>> = panels
            .flat_map(|(number, panel)| {
                let own = panel[rows.start * PANEL..rows.end * PANEL].chunks_mut(length * PANEL).enumerate();
                own.map(move |(part, entries)| (part * length, number, entries))
            })
            .collect();
        parts.sort_by_key(|(row, panel, _)| (*row, *panel));
        parts
    }

    /// Rows of ΔW · `x` from `first` on; `block` has those rows of ΔW.
    pub(super) fn multiply(&mut self, hands: &mut Hands, block: &[f32], first: usize, x: &Tall) -> Result<()> {
        let n = x.rows;
        let parts = self.parts(first..first + block.len() / n, ROWS);
        hands.each(parts, |isa, buffer, (row, panel, sums)| {
            sums.fill(0.0);
            let rows = sums.len() / PANEL;
            for start in (0..n).step_by(DEPTH) {
                let depth = DEPTH.min(n - start);
                for (i, wide) in buffer.chunks_exact_mut(depth).take(rows).enumerate() {
                    let single = &block[(row + i) * n + start..][..depth];
                    wide.iter_mut().zip(single).for_each(|(wide, single)| *wide = f64::from(*single));
                }
                let panel = &x.panel(panel)[start * PANEL..(start + depth) * PANEL];
                kernels::multiply(isa, &buffer[..rows * depth], depth, panel, sums, false);
            }
        })
    }

    /// Adds the part of ΔWᵀ · `q` that comes from the rows of ΔW from `first` on, which `block` has.
    pub(super) fn add_transposed(&mut self, hands: &mut Hands, block: &[f32], first: usize, q: &Tall) -> Result<()> {
        let (n, rows) = (self.rows, block.len() / self.rows);
        let parts = self.parts(0..n, ROWS);
        hands.each(parts, |isa, buffer, (column, panel, sums)| {
            let columns = sums.len() / PANEL;
            for start in (0..rows).step_by(DEPTH) {
                let depth = DEPTH.min(rows - start);
                for k in 0..depth {
                    let line = &block[(start + k) * n + column..][..columns];
                    line.iter().enumerate().for_each(|(i, single)| buffer[i * depth + k] = f64::from(*single));
                }
                let begin = first + start;
                let panel = &q.panel(panel)[begin * PANEL..(begin + depth) * PANEL];
                kernels::multiply(isa, &buffer[..columns * depth], depth, panel, sums, false);
            }
        })
    }

    /// This times `right`, which has a row per column and `columns` columns, row by row.
    pub(super) fn combined(&self, hands: &mut Hands, right: &[f64], columns: usize) -> Result<Tall> {
        let mut out = Tall::new(self.rows, columns.next_multiple_of(PANEL));
        let parts = out.parts(0..self.rows, PROJECTED);
        let panels = self.columns() / PANEL;
        hands.each(parts, |isa, buffer, (row, panel, sums)| {
            let rows = sums.len() / PANEL;
            let small = &mut buffer[..PANEL * PANEL];
            for own in 0..panels {
                for (k, line) in small.chunks_exact_mut(PANEL).enumerate() {
                    let from = (own * PANEL + k) * columns + panel * PANEL;
                    let width = PANEL.min(columns - panel * PANEL);
                    line[..width].copy_from_slice(&right[from..from + width]);
                    line[width..].fill(0.0);
                }
                let left = &self.panel(own)[row * PANEL..(row + rows) * PANEL];
                kernels::multiply(isa, left, PANEL, small, sums, false);
            }
        })?;
        Ok(out)
    }

    /// Replaces this by an orthonormal basis Q of its columns, some of which may be zero, and returns R, row by row, with
    /// Q R the matrix that was.
    pub(super) fn orthonormalize(&mut self, hands: &mut Hands) -> Result<Vec<f64>> {
        let (rows, width) = (self.rows, self.columns());
        let mut r = vec![0.0; width * width];
        for number in 0..width / PANEL {
            let (before, rest) = self.data.split_at_mut(number * rows * PANEL);
            let own = &mut rest[..rows * PANEL];
            let lengths = lengths(own);
            for _ in 0..2 {
                let mut shares = vec![0.0; number * PANEL * PANEL];
                let items: Vec<_> =
                    before.chunks_exact((rows * PANEL).max(1)).zip(shares.chunks_exact_mut(64)).collect();
                let seen = &*own;
                hands.each(items, |_, _, (other, shares)| products(other, seen, shares))?;
                let items: Vec<_> = own.chunks_mut(PROJECTED * PANEL).enumerate().collect();
                hands.each(items, |isa, _, (part, own)| {
                    let length = own.len();
                    for (other, shares) in before.chunks_exact(rows * PANEL).zip(shares.chunks_exact(64)) {
                        let other = &other[part * PROJECTED * PANEL..][..length];
                        kernels::multiply(isa, other, PANEL, shares, own, true);
                    }
                })?;
                for (at, share) in shares.iter().enumerate() {
                    r[at / PANEL * width + number * PANEL + at % PANEL] += share;
                }
            }
            for column in 0..PANEL {
                let at = number * PANEL + column;
                for _ in 0..2 {
                    for other in 0..column {
                        let share = dot(own, other, column);
                        own.chunks_exact_mut(PANEL).for_each(|line| line[column] -= share * line[other]);
                        r[(number * PANEL + other) * width + at] += share;
                    }
                }
                let length = dot(own, column, column).sqrt();
                let new = length > NOTHING * lengths[column];
                let factor = if new { 1.0 / length } else { 0.0 };
                own.chunks_exact_mut(PANEL).for_each(|line| line[column] *= factor);
                r[at * width + at] = if new { length } else { 0.0 };
            }
        }
        Ok(r)
    }
}

/// Lengths of the columns of a panel.
fn lengths(panel: &[f64]) -> [f64; PANEL] {
    let mut sums = [0.0; PANEL];
    for line in panel.as_chunks::<PANEL>().0 {
        (0..PANEL).for_each(|i| sums[i] += line[i] * line[i]);
    }
    sums.map(f64::sqrt)
}

/// The products of the columns of `left` with those of `right`, in order of the rows.
fn products(left: &[f64], right: &[f64], out: &mut [f64]) {
    let mut sums = [[0.0; PANEL]; PANEL];
    for (left, right) in left.as_chunks::<PANEL>().0.iter().zip(right.as_chunks::<PANEL>().0) {
        for i in 0..PANEL {
            (0..PANEL).for_each(|j| sums[i][j] += left[i] * right[j]);
        }
    }
    out.copy_from_slice(sums.as_flattened());
}

/// The product of two columns of a panel.
fn dot(panel: &[f64], a: usize, b: usize) -> f64 {
    panel.chunks_exact(PANEL).map(|line| line[a] * line[b]).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rows: usize, columns: usize, seed: u64) -> Vec<f32> {
        let value = |at: usize| (kernels::draw(seed, at as u64) >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        (0..rows * columns).map(value).collect()
    }

    #[test]
    fn products_are_those_of_the_whole_however_it_is_cut() {
        let (m, n, width) = (77, 1300, 16);
        let block = random(m, n, 3);
        let mut x = Tall::new(n, width);
        x.randomize();
        let product = |threads: usize, rows: usize| {
            let (mut hands, mut y, mut z) = (Hands::new(threads), Tall::new(m, width), Tall::new(n, width));
            for first in (0..m).step_by(rows) {
                let block = &block[first * n..(first + rows).min(m) * n];
                y.multiply(&mut hands, block, first, &x).unwrap();
            }
            for first in (0..m).step_by(rows) {
                let block = &block[first * n..(first + rows).min(m) * n];
                z.add_transposed(&mut hands, block, first, &y).unwrap();
            }
            (y, z)
        };
        let (y, z) = product(1, m);
        for (row, column) in [(0, 0), (76, 15), (40, 9)] {
            let sum: f64 = (0..n).map(|k| f64::from(block[row * n + k]) * x.get(k, column)).sum();
            assert!((y.get(row, column) - sum).abs() < 1e-10);
            let sum: f64 = (0..m).map(|k| f64::from(block[k * n + row]) * y.get(k, column)).sum();
            assert!((z.get(row, column) - sum).abs() < 1e-9);
        }
        for (threads, rows) in [(3, 1), (2, 10), (1, 33)] {
            let other = product(threads, rows);
            assert!(other.0.data == y.data && other.1.data == z.data, "{threads} threads, {rows} rows");
        }
    }

    #[test]
    fn bases_are_orthonormal_and_dependent_columns_vanish() {
        let (m, width) = (500, 24);
        let mut tall = Tall::new(m, width);
        tall.randomize();
        // Column 20 is a combination of others, 21 is nearly one, 9 is zero.
        for row in 0..m {
            let (a, b) = (tall.get(row, 2), tall.get(row, 17));
            let at = |column: usize| (column / PANEL * m + row) * PANEL + column % PANEL;
            tall.data[at(20)] = 3.0 * a - b;
            tall.data[at(21)] = a + 1e-9 * tall.get(row, 21);
            tall.data[at(9)] = 0.0;
        }
        let before: Vec<f64> = (0..m * width).map(|at| tall.get(at / width, at % width)).collect();
        let mut other = Tall { rows: m, data: tall.data.clone() };
        let r = tall.orthonormalize(&mut Hands::new(1)).unwrap();
        assert!(other.orthonormalize(&mut Hands::new(3)).unwrap() == r && other.data == tall.data);
        for i in 0..width {
            for j in 0..width {
                let product: f64 = (0..m).map(|row| tall.get(row, i) * tall.get(row, j)).sum();
                let expected = f64::from(u8::from(i == j && i != 20 && i != 9));
                assert!((product - expected).abs() < 1e-13, "{i} {j}: {product}");
            }
        }
        for (at, value) in before.iter().enumerate() {
            let sum: f64 = (0..width).map(|k| tall.get(at / width, k) * r[k * width + at % width]).sum();
            assert!((sum - value).abs() < 1e-11);
        }
    }
}
