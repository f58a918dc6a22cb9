//! Slow references of merge methods in f64, one tensor at a time, written from their equations.
//!
//! They share nothing with the program. Differences to base are taken in f32, as the inputs define them; everything
//! else is f64, so the program is compared within a tolerance.

use super::family::Family;
use super::tensor::Tensors;

/// One tensor of a family.
pub struct Unit {
    pub base: Vec<f64>,
    pub models: Vec<Vec<f64>>,
    /// θ_t − θ_0, rounded to f32.
    pub taus: Vec<Vec<f64>>,
    pub shape: Vec<usize>,
}

impl Unit {
    /// Tensor `name` of the first `models` models of `family`.
    pub fn new(family: &Family, name: &str, models: usize) -> Self {
        let values = |tensors: &Tensors| tensors[name].f32s();
        let base = values(&family.base);
        let models: Vec<Vec<f32>> = family.models[..models].iter().map(values).collect();
        let tau = |theta: &Vec<f32>| theta.iter().zip(&base).map(|(x, b)| f64::from(x - b)).collect();
        let wide = |values: &Vec<f32>| values.iter().map(|&x| f64::from(x)).collect();
        let shape = family.base[name].shape.clone();
        let taus = models.iter().map(tau).collect();
        Self { taus, models: models.iter().map(wide).collect(), base: wide(&base), shape }
    }

    /// Length of a row.
    pub fn row(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    pub fn elements(&self) -> usize {
        self.base.len()
    }

    /// base + `delta(position)`.
    pub fn added(&self, delta: impl Fn(usize) -> f64) -> Vec<f64> {
        self.base.iter().enumerate().map(|(p, base)| base + delta(p)).collect()
    }
}

/// θ0 + Σ w τ̂ over the models, or over those that agree with the sign of that sum (cancelling counts as +).
pub fn consensus(unit: &Unit, sparse: &[Vec<f64>], weights: &[f64], elect: bool) -> Vec<f64> {
    unit.added(|p| {
        let weighted: Vec<f64> = sparse.iter().zip(weights).map(|(tau, w)| w * tau[p]).collect();
        let positive = weighted.iter().sum::<f64>() >= 0.0;
        weighted.iter().filter(|x| !elect || (**x > 0.0) == positive).sum()
    })
}

/// `sparse`, with each vector's sum of magnitudes as in `taus`.
pub fn restored(taus: &[Vec<f64>], sparse: Vec<Vec<f64>>) -> Vec<Vec<f64>> {
    let sum = |vector: &[f64]| vector.iter().map(|x| x.abs()).sum::<f64>();
    let restore = |(tau, sparse): (&Vec<f64>, Vec<f64>)| {
        let (before, after) = (sum(tau), sum(&sparse));
        let factor = if before < 1e-7 || after < 1e-7 { 1.0 } else { before / after };
        sparse.into_iter().map(|x| x * factor).collect()
    };
    taus.iter().zip(sparse).map(restore).collect()
}

/// Σ w max(F, floor) θ / Σ w max(F, floor).
pub fn fisher(models: &[Vec<f64>], fishers: &[Vec<f64>], weights: &[f64], floor: f64) -> Vec<f64> {
    let at = |p: usize| {
        let share = |t: usize| weights[t] * fishers[t][p].max(floor);
        let sum: f64 = (0..models.len()).map(|t| share(t) * models[t][p]).sum();
        sum / (0..models.len()).map(share).sum::<f64>()
    };
    (0..models[0].len()).map(at).collect()
}

/// (Σ W_t G̃_t)(Σ G̃_t)⁻¹ for W [.., n] and G [n, n], G̃ being G with its entries off the diagonal times `alpha`: by Gauss and
/// Jordan's elimination with pivots.
pub fn regmean(weights: &[Vec<f64>], grams: &[Vec<f64>], n: usize, alpha: f64) -> Vec<f64> {
    let scaled = |gram: &Vec<f64>, at: usize| gram[at] * if at / n == at % n { 1.0 } else { alpha };
    let sum: Vec<f64> = (0..n * n).map(|at| grams.iter().map(|gram| scaled(gram, at)).sum()).collect();
    let mut rows: Vec<Vec<f64>> = (0..n)
        .map(|i| (0..2 * n).map(|j| if j < n { sum[i * n + j] } else { f64::from(u8::from(j - n == i)) }).collect())
        .collect();
    for column in 0..n {
        let pivot = (column..n).max_by(|&a, &b| rows[a][column].abs().total_cmp(&rows[b][column].abs())).unwrap();
        rows.swap(column, pivot);
        let head = rows[column][column];
        rows[column].iter_mut().for_each(|x| *x /= head);
        let line = rows[column].clone();
        for (_, row) in rows.iter_mut().enumerate().filter(|(i, _)| *i != column) {
            let factor = row[column];
            row.iter_mut().zip(&line).for_each(|(x, y)| *x -= factor * y);
        }
    }
    let mut merged = Vec::new();
    for first in (0..weights[0].len()).step_by(n) {
        let product: Vec<f64> = (0..n)
            .map(|j| {
                let term = |t: usize| (0..n).map(move |k| (t, k));
                (0..weights.len())
                    .flat_map(term)
                    .map(|(t, k)| weights[t][first + k] * scaled(&grams[t], k * n + j))
                    .sum()
            })
            .collect();
        merged.extend((0..n).map(|j| (0..n).map(|k| product[k] * rows[k][n + j]).sum::<f64>()));
    }
    merged
}

/// The entries of descending rank `dropped + 1` to `dropped + kept`, ties in order of position; the rest is 0.
pub fn breadcrumbs(tau: &[f64], density: f64, gamma: f64) -> Vec<f64> {
    let d = tau.len() as f64;
    let kept = ((density * d).floor() as usize).max(1).min(tau.len());
    let dropped = ((gamma * d).floor() as usize).min(tau.len() - kept);
    let mut order: Vec<usize> = (0..tau.len()).collect();
    order.sort_by(|&a, &b| tau[b].abs().total_cmp(&tau[a].abs()));
    let mut out = vec![0.0; tau.len()];
    order[dropped..dropped + kept].iter().for_each(|&p| out[p] = tau[p]);
    out
}

/// Entries that base's differences beyond `epsilon` change are averaged over the models that changed them.
pub fn ram(unit: &Unit, epsilon: f64) -> Vec<f64> {
    unit.added(|p| {
        let changed: Vec<f64> = unit.taus.iter().map(|tau| tau[p]).filter(|x| x.abs() > epsilon).collect();
        if changed.is_empty() { 0.0 } else { changed.iter().sum::<f64>() / changed.len() as f64 }
    })
}

/// Interpolation towards the model where differences are small.
pub fn nearswap(unit: &Unit, t: f64) -> Vec<f64> {
    (0..unit.elements())
        .map(|p| {
            let (base, model) = (unit.base[p], unit.models[0][p]);
            let weight = (t / unit.taus[0][p].abs().max(1e-6)).clamp(0.0, 1.0);
            weight * model + (1.0 - weight) * base
        })
        .collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

/// Σ c_t x_t.
pub fn weighted(vectors: &[Vec<f64>], c: &[f64]) -> Vec<f64> {
    (0..vectors[0].len()).map(|p| vectors.iter().zip(c).map(|(x, c)| c * x[p]).sum()).collect()
}

fn scaled(x: &[f64], factor: f64) -> Vec<f64> {
    x.iter().map(|x| x * factor).collect()
}

/// Along the arc from `a` to `b`.
pub fn slerp(a: &[f64], b: &[f64], t: f64) -> Vec<f64> {
    let unit = |x: &[f64]| if norm(x) > 1e-8 { scaled(x, 1.0 / norm(x)) } else { x.to_vec() };
    let cosine = dot(&unit(a), &unit(b));
    let c = if cosine.abs() > 0.9995 {
        [1.0 - t, t]
    } else {
        let angle = cosine.acos();
        [((1.0 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin()]
    };
    weighted(&[a.to_vec(), b.to_vec()], &c)
}

/// mergekit's nuslerp of two vectors.
pub fn nuslerp(a: &[f64], b: &[f64], weights: [f64; 2]) -> Vec<f64> {
    let t = weights[1] / (weights[0] + weights[1]);
    let unit = |x: &[f64]| scaled(x, 1.0 / norm(x).max(1e-7));
    let angle = dot(&unit(a), &unit(b)).clamp(-1.0, 1.0).acos();
    let c = match angle.sin() {
        sine if sine.abs() < 1e-8 => [1.0 - t, t],
        sine => [((1.0 - t) * angle).sin() / sine, (t * angle).sin() / sine],
    };
    weighted(&[a.to_vec(), b.to_vec()], &c)
}

/// mergekit's multislerp, its tangent step included.
pub fn multislerp(vectors: &[Vec<f64>], weights: &[f64]) -> Vec<f64> {
    let sum: f64 = weights.iter().sum();
    let weights: Vec<f64> = weights.iter().map(|w| w / sum).collect();
    let units: Vec<Vec<f64>> = vectors.iter().map(|x| scaled(x, 1.0 / (norm(x) + 1e-8))).collect();
    let mean = weighted(&units, &weights);
    if norm(&mean) < 1e-8 {
        return weighted(vectors, &weights);
    }
    let mean = scaled(&mean, 1.0 / norm(&mean));
    let tangents: Vec<Vec<f64>> =
        units.iter().map(|u| weighted(&[u.clone(), mean.clone()], &[1.0, -dot(u, &mean)])).collect();
    let step = weighted(&tangents, &weights);
    let length = norm(&step) + 1e-8;
    let point = weighted(&[mean, step], &[length.cos(), length.sin() / length]);
    scaled(&point, vectors.iter().zip(&weights).map(|(x, w)| w * norm(x)).sum())
}

/// The Karcher mean with mergekit's defaults.
pub fn karcher(vectors: &[Vec<f64>]) -> Vec<f64> {
    let length = vectors.iter().map(|x| norm(x)).sum::<f64>() / vectors.len() as f64;
    let units: Vec<Vec<f64>> = vectors.iter().filter(|x| norm(x) > 1e-5).map(|x| scaled(x, 1.0 / norm(x))).collect();
    let Some(first) = units.first() else { return vec![0.0; vectors[0].len()] };
    let alpha = vec![1.0 / units.len() as f64; units.len()];
    let mean = weighted(&units, &alpha);
    let mut u = if norm(&mean) < 1e-5 { first.clone() } else { scaled(&mean, 1.0 / norm(&mean)) };
    for _ in 0..10 {
        let mut tangent = vec![0.0; u.len()];
        for (unit, alpha) in units.iter().zip(&alpha) {
            let cosine = dot(&u, unit).clamp(-1.0, 1.0);
            let angle = cosine.acos();
            if angle >= 1e-5 && angle.sin() != 0.0 {
                let scale = alpha * angle / angle.sin();
                tangent = weighted(&[tangent, unit.clone(), u.clone()], &[1.0, scale, -scale * cosine]);
            }
        }
        let step = norm(&tangent);
        if step < 1e-5 {
            break;
        }
        u = weighted(&[u, tangent], &[step.cos(), step.sin() / step]);
        u = scaled(&u, 1.0 / norm(&u));
    }
    scaled(&u, length)
}

/// r · mean τ, the ratio r from the mean cosine of pairs.
pub fn model_stock(taus: &[Vec<f64>], floor: f64) -> Vec<f64> {
    let n = taus.len();
    let mut cosines = Vec::new();
    for i in 0..n {
        for j in i + 1..n {
            let norms = (norm(&taus[i]) * norm(&taus[j])).max(floor);
            cosines.push(if norms == 0.0 { 0.0 } else { (dot(&taus[i], &taus[j]) / norms).clamp(-1.0, 1.0) });
        }
    }
    let cosine = cosines.iter().sum::<f64>() / cosines.len() as f64;
    let ratio = n as f64 * cosine / (1.0 + (n as f64 - 1.0) * cosine);
    weighted(taus, &vec![ratio / n as f64; n])
}

/// Applies `merge` to every row of length `row` of `vectors`.
pub fn by_rows(vectors: &[Vec<f64>], row: usize, merge: impl Fn(&[Vec<f64>]) -> Vec<f64>) -> Vec<f64> {
    let rows = (0..vectors[0].len()).step_by(row);
    rows.flat_map(|start| merge(&vectors.iter().map(|x| x[start..start + row].to_vec()).collect::<Vec<_>>())).collect()
}

/// Applies `merge` to every column of `vectors`: entries that differ in the first index alone.
pub fn by_columns(unit: &Unit, vectors: &[Vec<f64>], merge: impl Fn(&[Vec<f64>]) -> Vec<f64>) -> Vec<f64> {
    let columns = unit.elements() / unit.shape.first().copied().unwrap_or(1);
    let mut out = vec![0.0; unit.elements()];
    for column in 0..columns {
        let own = |x: &Vec<f64>| x.iter().skip(column).step_by(columns).copied().collect();
        let merged = merge(&vectors.iter().map(own).collect::<Vec<_>>());
        out.iter_mut().skip(column).step_by(columns).zip(merged).for_each(|(out, x)| *out = x);
    }
    out
}

/// RAM+ with mergekit's defaults.
pub fn ramplus(unit: &Unit) -> Vec<f64> {
    let changed = |t: usize, p: usize| unit.taus[t][p].abs() > f64::from(1e-5f32);
    let count = |p: usize| (0..unit.taus.len()).filter(|&t| changed(t, p)).count();
    let scale = |t: usize| {
        let own = |wanted: fn(usize) -> bool| {
            (0..unit.elements()).filter(|&p| changed(t, p) && wanted(count(p))).count() as f64
        };
        1.0 + 0.1 * (own(|c| c > 1) / own(|c| c == 1).max(1e-5)).clamp(0.0, 0.2)
    };
    let scales: Vec<f64> = (0..unit.taus.len()).map(scale).collect();
    unit.added(|p| {
        let own: Vec<usize> = (0..unit.taus.len()).filter(|&t| changed(t, p)).collect();
        match own[..] {
            [] => 0.0,
            [only] => scales[only] * unit.taus[only][p],
            _ => own.iter().map(|&t| unit.taus[t][p]).sum::<f64>() / own.len() as f64,
        }
    })
}

/// SCE; ties of the smallest variance selected are all kept.
pub fn sce(unit: &Unit, topk: f64, uniform_below: f64) -> Vec<f64> {
    let n = unit.taus.len() as f64;
    let variance = |p: usize| {
        let mean = unit.taus.iter().map(|tau| tau[p]).sum::<f64>() / n;
        // Compared in f32, as ranks are.
        (unit.taus.iter().map(|tau| (tau[p] - mean).powi(2)).sum::<f64>() / n).min(f64::from(f32::MAX)) as f32
    };
    let variances: Vec<f32> = (0..unit.elements()).map(variance).collect();
    let mut varying: Vec<f32> = variances.iter().copied().filter(|v| *v != 0.0).collect();
    varying.sort_by(|a, b| b.total_cmp(a));
    let selected = (varying.len() as f64 * topk) as usize;
    let smallest = if topk >= 1.0 {
        0.0
    } else if selected == 0 {
        f32::INFINITY
    } else {
        varying[selected - 1]
    };
    let kept = |p: usize| variances[p] >= smallest;
    let squares = |tau: &Vec<f64>| (0..tau.len()).filter(|&p| kept(p)).map(|p| tau[p].powi(2)).sum::<f64>();
    let means: Vec<f64> = unit.taus.iter().map(|tau| squares(tau) / unit.elements() as f64).collect();
    let sum: f64 = means.iter().sum();
    let weights: Vec<f64> = means.iter().map(|mean| if sum <= uniform_below { 1.0 / n } else { mean / sum }).collect();
    unit.added(|p| {
        let positive = unit.taus.iter().map(|tau| tau[p] as f32).sum::<f32>() >= 0.0;
        let agrees = |tau: &&(&Vec<f64>, &f64)| kept(p) && if positive { tau.0[p] > 0.0 } else { tau.0[p] < 0.0 };
        let pairs: Vec<_> = unit.taus.iter().zip(&weights).collect();
        let sum: f64 = pairs.iter().filter(agrees).map(|(tau, w)| *w * tau[p]).sum();
        let divisor: f64 = pairs.iter().filter(agrees).map(|(_, w)| **w).sum();
        sum / divisor.max(1e-6)
    })
}

/// Entries of high importance from the second of two tensors, the others from the first.
pub fn fusion(base: &[f64], model: &[f64], row: usize) -> Vec<f64> {
    let softmax = |row: &[f64]| {
        let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let exponentials: Vec<f64> = row.iter().map(|x| (x - largest).exp()).collect();
        let sum: f64 = exponentials.iter().sum();
        exponentials.into_iter().map(|x| x / sum + 1e-8).collect::<Vec<_>>()
    };
    let mut importance = Vec::new();
    for (base, model) in base.chunks(row).zip(model.chunks(row)) {
        let (p, q) = (softmax(model), softmax(base));
        let divergence: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
        let tau = |(x, b): (&f64, &f64)| f64::from((*x as f32 - *b as f32).abs());
        importance.extend(
            model.iter().zip(base).map(tau).map(|tau| (tau * divergence.max(0.0)).min(f64::from(f32::MAX)) as f32),
        );
    }
    let mut sorted = importance.clone();
    sorted.sort_by(f32::total_cmp);
    let quantile = |share: f64| f64::from(sorted[(share * (sorted.len() - 1) as f64) as usize]);
    let threshold = quantile(0.5) + 1.5 * (quantile(0.75) - quantile(0.25));
    let pick = |p: usize| if f64::from(importance[p]) >= threshold { model[p] } else { base[p] };
    (0..base.len()).map(pick).collect()
}
