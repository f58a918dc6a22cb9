//! Dense linear algebra in f64, on row-major slices: products, Cholesky factors, and systems solved with them.
//!
//! - Every entry of a result is a sum over k in a fixed order, products and sums rounded separately. So a row of a result has
//!   the same bits whichever rows it is computed with, on every instruction set. Libraries promise neither (ADR 0013).
//! - Columns are taken [`PANEL`] at a time from a panel that the caller packs: its rows follow each other, so that a long
//!   stride does not defeat the caches.

/// Columns of a panel.
pub const PANEL: usize = 8;
/// Rows that share a load of a panel's row.
const ROWS: usize = 4;

/// c += a · panel, or c −= a · panel: `a` has rows of `stride` entries, of which the first `panel.len() / PANEL` count; `c` has
/// as many rows of [`PANEL`].
#[inline(always)]
pub(super) fn multiply(a: &[f64], stride: usize, panel: &[f64], c: &mut [f64], subtract: bool) {
    let depth = panel.len() / PANEL;
    let panel = panel.as_chunks::<PANEL>().0;
    let sign = if subtract { -1.0 } else { 1.0 };
    let c = c.as_chunks_mut::<PANEL>().0;
    let (mut blocks, mut row) = (c.chunks_exact_mut(ROWS), 0);
    for block in &mut blocks {
        let mut sums: [[f64; PANEL]; ROWS] = [block[0], block[1], block[2], block[3]];
        let rows: [&[f64]; ROWS] = std::array::from_fn(|i| &a[(row + i) * stride..][..depth]);
        for (k, line) in panel.iter().enumerate() {
            for i in 0..ROWS {
                // A sign changes no digit of a product.
                let factor = sign * rows[i][k];
                for j in 0..PANEL {
                    sums[i][j] += factor * line[j];
                }
            }
        }
        block.copy_from_slice(&sums);
        row += ROWS;
    }
    for sums in blocks.into_remainder() {
        let line_of_a = &a[row * stride..][..depth];
        for (factor, line) in line_of_a.iter().zip(panel) {
            for j in 0..PANEL {
                sums[j] += sign * factor * line[j];
            }
        }
        row += 1;
    }
}

/// Replaces the lower triangle of the symmetric `a`, n × n, by L with A = L Lᵀ. False, and no meaning in `a`, if a pivot is
/// not above `tolerance` times its diagonal entry. `scratch` has (n + [`PANEL`]) · 2 [`PANEL`] entries.
#[inline(always)]
pub(super) fn cholesky(a: &mut [f64], n: usize, tolerance: f64, scratch: &mut [f64]) -> bool {
    let (panel, block) = scratch.split_at_mut((n + PANEL) * PANEL);
    let mut start = 0;
    while start < n {
        let width = PANEL.min(n - start);
        let rows = n - start;
        // The rows of L that the block's columns are multiplied with, packed as columns.
        for k in 0..start {
            for j in 0..PANEL {
                panel[k * PANEL + j] = if j < width { a[(start + j) * n + k] } else { 0.0 };
            }
        }
        let block = &mut block[..rows * PANEL];
        for i in 0..rows {
            for j in 0..PANEL {
                block[i * PANEL + j] = if j < width { a[(start + i) * n + start + j] } else { 0.0 };
            }
        }
        multiply(&a[start * n..], n, &panel[..start * PANEL], block, true);
        for j in 0..width {
            let before = a[(start + j) * n + start + j];
            for k in 0..j {
                let factor = block[j * PANEL + k];
                for i in j..rows {
                    block[i * PANEL + j] -= block[i * PANEL + k] * factor;
                }
            }
            let pivot = block[j * PANEL + j];
            // Written so that NaN fails.
            if !(pivot > tolerance * before && pivot > 0.0) {
                return false;
            }
            let root = pivot.sqrt();
            for i in j..rows {
                block[i * PANEL + j] /= root;
            }
            block[j * PANEL + j] = root;
        }
        for i in 0..rows {
            for j in 0..width.min(i + 1) {
                a[(start + i) * n + start + j] = block[i * PANEL + j];
            }
        }
        start += width;
    }
    true
}

/// Solves X L Lᵀ = P for the rows of `p`, which become those of X; L is the lower triangle of `l`, n × n.
/// `scratch` has (n + rows) · [`PANEL`] entries.
#[inline(always)]
pub(super) fn solve(l: &[f64], n: usize, p: &mut [f64], scratch: &mut [f64]) {
    let (panel, block) = scratch.split_at_mut(n * PANEL);
    let rows = p.len() / n.max(1);
    let block = &mut block[..rows * PANEL];
    let starts = (0..n).step_by(PANEL);
    // Y Lᵀ = P, from the first columns to the last.
    for start in starts.clone() {
        let width = PANEL.min(n - start);
        for k in 0..start {
            for j in 0..PANEL {
                panel[k * PANEL + j] = if j < width { l[(start + j) * n + k] } else { 0.0 };
            }
        }
        take(p, n, start, width, block);
        multiply(p, n, &panel[..start * PANEL], block, true);
        for sums in block.as_chunks_mut::<PANEL>().0 {
            for j in 0..width {
                for k in 0..j {
                    sums[j] -= sums[k] * l[(start + j) * n + start + k];
                }
                sums[j] /= l[(start + j) * n + start + j];
            }
        }
        put(p, n, start, width, block);
    }
    // X L = Y, from the last columns to the first.
    for start in starts.rev() {
        let width = PANEL.min(n - start);
        let end = start + width;
        for k in end..n {
            for j in 0..PANEL {
                panel[(k - end) * PANEL + j] = if j < width { l[k * n + start + j] } else { 0.0 };
            }
        }
        take(p, n, start, width, block);
        if end < n {
            multiply(&p[end..], n, &panel[..(n - end) * PANEL], block, true);
        }
        for sums in block.as_chunks_mut::<PANEL>().0 {
            for j in (0..width).rev() {
                for k in j + 1..width {
                    sums[j] -= sums[k] * l[(start + k) * n + start + j];
                }
                sums[j] /= l[(start + j) * n + start + j];
            }
        }
        put(p, n, start, width, block);
    }
}

#[inline(always)]
fn take(p: &[f64], n: usize, start: usize, width: usize, block: &mut [f64]) {
    for (row, sums) in p.chunks_exact(n).zip(block.as_chunks_mut::<PANEL>().0) {
        sums[..width].copy_from_slice(&row[start..start + width]);
        sums[width..].fill(0.0);
    }
}

#[inline(always)]
fn put(p: &mut [f64], n: usize, start: usize, width: usize, block: &[f64]) {
    for (row, sums) in p.chunks_exact_mut(n).zip(block.as_chunks::<PANEL>().0) {
        row[start..start + width].copy_from_slice(&sums[..width]);
    }
}

#[cfg(test)]
mod tests {
    use super::PANEL;
    use crate::kernels::{self, Isa};

    fn numbers(seed: u64, count: usize) -> Vec<f64> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as f64 / f64::from(1u32 << 30) - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    /// Xᵀ X + something on the diagonal.
    fn positive(seed: u64, n: usize) -> Vec<f64> {
        let x = numbers(seed, n * n);
        let entry = |i: usize, j: usize| {
            let sum: f64 = (0..n).map(|k| x[k * n + i] * x[k * n + j]).sum();
            sum + if i == j { 0.1 } else { 0.0 }
        };
        (0..n * n).map(|at| entry(at / n, at % n)).collect()
    }

    fn solved(isa: Isa, s: &[f64], n: usize, p: &[f64]) -> Vec<f64> {
        let (mut l, mut x) = (s.to_vec(), p.to_vec());
        assert!(kernels::cholesky(isa, &mut l, n, 1e-12, &mut vec![0.0; (n + PANEL) * 2 * PANEL]));
        kernels::solve(isa, &l, n, &mut x, &mut vec![0.0; (n + p.len() / n) * PANEL]);
        x
    }

    #[test]
    fn systems_are_solved_with_the_same_bits_everywhere() {
        for n in [1, 2, 7, 8, 9, 33, 64] {
            let (s, p) = (positive(n as u64, n), numbers(99, 13 * n));
            let x = solved(Isa::baseline(), &s, n, &p);
            for (row, wanted) in x.chunks(n).zip(p.chunks(n)) {
                for j in 0..n {
                    let product: f64 = (0..n).map(|k| row[k] * s[k * n + j]).sum();
                    assert!((product - wanted[j]).abs() < 1e-8, "{n}: {product} for {}", wanted[j]);
                }
            }
            for isa in Isa::available() {
                assert!(solved(isa, &s, n, &p) == x, "{} differs", isa.name());
                // Rows alone are what they are among others.
                for row in [0, 5, 12] {
                    assert!(solved(isa, &s, n, &p[row * n..][..n]) == x[row * n..][..n]);
                }
            }
        }
    }

    #[test]
    fn products_are_sums_in_order() {
        for isa in Isa::available() {
            for (rows, depth, stride) in [(1, 1, 1), (3, 5, 7), (4, 9, 9), (11, 130, 131)] {
                let (a, panel) = (numbers(1, rows * stride), numbers(2, depth * PANEL));
                for subtract in [false, true] {
                    let mut c = numbers(3, rows * PANEL);
                    let sign = if subtract { -1.0 } else { 1.0 };
                    let expected: Vec<f64> = (0..rows * PANEL)
                        .map(|at| {
                            let (i, j) = (at / PANEL, at % PANEL);
                            (0..depth).fold(c[at], |sum, k| sum + sign * a[i * stride + k] * panel[k * PANEL + j])
                        })
                        .collect();
                    kernels::multiply(isa, &a, stride, &panel, &mut c, subtract);
                    assert!(c == expected, "{}", isa.name());
                }
            }
        }
    }

    #[test]
    fn what_is_not_positive_definite_is_said() {
        let n = 20;
        let factor = |edit: &dyn Fn(&mut Vec<f64>)| {
            let mut a = positive(7, n);
            edit(&mut a);
            kernels::cholesky(Isa::detect(), &mut a, n, 1e-12, &mut vec![0.0; (n + PANEL) * 2 * PANEL])
        };
        assert!(factor(&|_| ()));
        assert!(!factor(&|a| a[3 * n + 3] = -1.0));
        assert!(!factor(&|a| a[13 * n + 13] = f64::NAN));
        assert!(!factor(&|a| (0..n).for_each(|k| {
            // One column and row is another.
            let (row, column) = (a[4 * n + k], a[k * n + 4]);
            a[11 * n + k] = row;
            a[k * n + 11] = column;
            a[11 * n + 11] = a[4 * n + 4];
        })));
        assert!(!factor(&|a| a.fill(0.0)));
    }
}
