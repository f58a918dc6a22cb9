//! Singular values and vectors of a small matrix, by rotations of its columns (one-sided Jacobi, Hestenes 1958).
//!
//! Rotations follow each other in a fixed order, and sums run in order: the same bits wherever it is computed. Small
//! singular values are as accurate, relative to their size, as large ones.

/// Products of two columns, in terms of their lengths, that count as none.
const TOLERANCE: f64 = 1e-15;
/// Rounds after which what is left is rounding: convergence is quadratic.
const ROUNDS: usize = 60;

/// M V = U S.
pub(super) struct Spectrum {
    /// Singular values, the largest first.
    pub values: Vec<f64>,
    /// U S, column by column, in their order.
    pub left: Vec<Vec<f64>>,
    /// V, column by column.
    pub right: Vec<Vec<f64>>,
}

/// The singular values and vectors of the matrix with these columns.
pub(super) fn spectrum(mut left: Vec<Vec<f64>>) -> Spectrum {
    let n = left.len();
    let mut right: Vec<Vec<f64>> = (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    for _ in 0..ROUNDS {
        let mut turned = false;
        for i in 0..n {
            for j in i + 1..n {
                turned |= rotate(&mut left, &mut right, (i, j));
            }
        }
        if !turned {
            break;
        }
    }
    let values: Vec<f64> = left.iter().map(|column| dot(column, column).sqrt()).collect();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    Spectrum {
        values: order.iter().map(|&i| values[i]).collect(),
        left: order.iter().map(|&i| std::mem::take(&mut left[i])).collect(),
        right: order.iter().map(|&i| std::mem::take(&mut right[i])).collect(),
    }
}

/// Makes two columns orthogonal; tells if they were not.
fn rotate(left: &mut [Vec<f64>], right: &mut [Vec<f64>], (i, j): (usize, usize)) -> bool {
    let (a, b) = (dot(&left[i], &left[i]), dot(&left[j], &left[j]));
    let product = dot(&left[i], &left[j]);
    // Of zero columns and of NaN, nothing is.
    let slanted = product.abs() > TOLERANCE * (a * b).sqrt();
    if !slanted {
        return false;
    }
    let half = (b - a) / (2.0 * product);
    let tangent = half.signum() / (half.abs() + (1.0 + half * half).sqrt());
    let cosine = 1.0 / (1.0 + tangent * tangent).sqrt();
    let sine = cosine * tangent;
    for columns in [left, right] {
        let (first, second) = columns.split_at_mut(j);
        for (x, y) in first[i].iter_mut().zip(&mut second[0]) {
            (*x, *y) = (cosine * *x - sine * *y, sine * *x + cosine * *y);
        }
    }
    true
}

/// The product of two columns, as eight sums that are added up at the end.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let (mut sums, (heads, rest)) = ([0.0; 8], a.as_chunks::<8>());
    for (a, b) in heads.iter().zip(b.as_chunks::<8>().0) {
        (0..8).for_each(|i| sums[i] += a[i] * b[i]);
    }
    let rest: f64 = rest.iter().zip(&b[heads.len() * 8..]).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels;

    fn value(seed: u64, at: usize) -> f64 {
        (kernels::draw(seed, at as u64) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    #[test]
    fn it_takes_a_matrix_apart_and_back_together() {
        for (n, scale) in [(1, 1.0), (2, 1e-30), (7, 1e20), (40, 1.0)] {
            // Columns of very different lengths, one zero, two equal.
            let column = |j: usize| -> Vec<f64> {
                let length = if j == 3 { 0.0 } else { scale * 10f64.powi(-(j as i32 % 9)) };
                let j = if j == 6 { 5 } else { j };
                (0..n).map(|i| length * value(n as u64, j * n + i)).collect()
            };
            let m: Vec<Vec<f64>> = (0..n).map(column).collect();
            let Spectrum { values, left, right } = spectrum(m.clone());
            assert!(values.windows(2).all(|pair| pair[0] >= pair[1]));
            for i in 0..n {
                for j in 0..n {
                    let back: f64 = (0..n).map(|k| left[k][i] * right[k][j]).sum();
                    assert!((back - m[j][i]).abs() <= 1e-13 * values[0], "{n}: {back} for {}", m[j][i]);
                    let orthogonal = dot(&left[i], &left[j]);
                    assert!(i == j || orthogonal.abs() <= 1e-13 * values[i] * values[j] + 1e-300 * scale);
                    let own = f64::from(u8::from(i == j));
                    assert!((dot(&right[i], &right[j]) - own).abs() < 1e-13);
                }
            }
        }
    }

    #[test]
    fn known_singular_values_are_found() {
        let Spectrum { values, .. } = spectrum(vec![vec![3.0, 0.0], vec![4.0, 5.0]]);
        assert!((values[0] - 45f64.sqrt()).abs() < 1e-14 && (values[1] - 5f64.sqrt()).abs() < 1e-14);
        assert_eq!(spectrum(vec![vec![0.0; 3]; 3]).values, [0.0; 3]);
        assert!(spectrum(Vec::new()).values.is_empty());
    }
}
