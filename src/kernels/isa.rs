//! The bodies, compiled once per instruction set, and the choice between them at run time.
//!
//! - [`Isa`] can only be made by asking the CPU, so holding one is the proof that its instructions exist.
//! - The list of kernels stands here once; the macro makes every variant and one dispatch per kernel from it.
//! - The target features leave out fused multiply-add: nothing could contract a product and a sum by accident.
//! - On aarch64 the baseline is NEON already, so there is one variant.
//!
//! The only unsafe code of the kernels is the call into a variant. It does not know what the kernels compute.
#![allow(unsafe_code)]

use std::sync::OnceLock;

use super::{Counted, Fused, Near, Stored, Ties, body};
use crate::dtype::Float;

/// An instruction set that this CPU has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Isa(Level);

/// Narrowest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Level {
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// The widest instruction set of this CPU; or the one that the environment variable `TIESMITH_ISA` names, if this
    /// CPU has it. Results are the same: that is what the variable is there to show. Asked once.
    pub fn detect() -> Self {
        static DETECTED: OnceLock<Isa> = OnceLock::new();
        *DETECTED.get_or_init(|| {
            let named = std::env::var("TIESMITH_ISA").unwrap_or_default();
            let sets = Self::available();
            let widest = sets.last().copied().unwrap_or(Self::baseline());
            sets.into_iter().find(|isa| isa.name() == named).unwrap_or(widest)
        })
    }

    /// What every CPU of the architecture has: SSE2 on x86-64, NEON on aarch64.
    pub const fn baseline() -> Self {
        Self(Level::Baseline)
    }

    /// Every instruction set of this CPU that the kernels know, narrowest first.
    pub fn available() -> Vec<Self> {
        let sets = [
            Some(Self::baseline()),
            #[cfg(target_arch = "x86_64")]
            Self::has_avx2().then_some(Self(Level::Avx2)),
            #[cfg(target_arch = "x86_64")]
            Self::has_avx512().then_some(Self(Level::Avx512)),
        ];
        sets.into_iter().flatten().collect()
    }

    /// A short name for reports: `baseline`, `avx2`, `avx512`.
    pub const fn name(self) -> &'static str {
        match self.0 {
            Level::Baseline => "baseline",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn has_avx2() -> bool {
        is_x86_feature_detected!("avx2")
    }

    #[cfg(target_arch = "x86_64")]
    fn has_avx512() -> bool {
        Self::has_avx2()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512cd")
    }
}

macro_rules! kernels {
    ($(fn $name:ident($($arg:ident: $type:ty),*) $(-> $result:ty)?;)*) => {
        #[cfg(target_arch = "x86_64")]
        mod avx2 {
            use super::{Counted, Float, Fused, Near, Stored, Ties, body};
            $(
                #[target_feature(enable = "avx2")]
                pub(super) fn $name($($arg: $type),*) $(-> $result)? {
                    body::$name($($arg),*)
                }
            )*
        }

        #[cfg(target_arch = "x86_64")]
        mod avx512 {
            use super::{Counted, Float, Fused, Near, Stored, Ties, body};
            $(
                #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,avx512cd")]
                pub(super) fn $name($($arg: $type),*) $(-> $result)? {
                    body::$name($($arg),*)
                }
            )*
        }

        $(
            #[inline]
            pub(super) fn $name(isa: Isa, $($arg: $type),*) $(-> $result)? {
                match isa.0 {
                    Level::Baseline => body::$name($($arg),*),
                    // SAFETY: only `Isa::detect` and `Isa::available` make this level, and only after `has_avx2`
                    // found the one feature that the variant enables. The variant is safe otherwise.
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx2 => unsafe { avx2::$name($($arg),*) },
                    // SAFETY: as above; `has_avx512` tests each of the features that the variant enables.
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx512 => unsafe { avx512::$name($($arg),*) },
                }
            }
        )*
    };
}

kernels! {
    fn load(float: Float, bytes: &[u8], out: &mut [f32]);
    fn task_vector(float: Float, bytes: &[u8], base: &[f32], out: &mut [f32]) -> bool;
    fn trimmed_task_vector(float: Float, bytes: &[u8], base: &[f32], min_key: u32, out: &mut [f32]) -> Option<u64>;
    fn task_vector_f64(float: Float, bytes: &[u8], base_float: Float, base_bytes: &[u8], out: &mut [f32]);
    fn store(float: Float, values: &[f32], out: &mut [u8], clamp: bool) -> bool;
    fn store_sum_f64(base_float: Float, base_bytes: &[u8], values: &[f32], out: &mut [u8]);
    fn all_finite(values: &[f32]) -> bool;
    fn trim(tau: &mut [f32], min_key: u32) -> u64;
    fn trim_sample(tau: &mut [f32], ties: Ties, draw_key: u64, first_index: u64, accept: u64) -> u64;
    fn trim_lowest(tau: &mut [f32], ties: Ties, quota: u64) -> (u64, u64);
    fn drop_where(tau: &mut [f32], dropped: &[f32]) -> u64;
    fn count_ties(tau: &[f32], ties: Ties) -> u64;
    fn histogram(tau: &[f32], low: u32, shift: u32, common: u32, bins: &mut [u64]) -> u64;
    fn collect(tau: &[f32], low: u32, high: u32, between: &mut [u32]) -> Near;
    fn elect_mass(taus: &[&[f32]], weights: &[f32], gamma: &mut [f32]);
    fn elect_count(taus: &[&[f32]], gamma: &mut [f32]);
    fn sign_of(values: &[f32], gamma: &mut [f32]);
    fn fill_zero_sign(gamma: &mut [f32], sign: f32);
    fn sum_signs(gamma: &[f32]) -> i64;
    fn agreeing(tau: &[f32], other: &[f32]) -> u64;
    fn conflicts(taus: &[&[f32]]) -> u64;
    fn combine_mean(taus: &[&[f32]], weights: &[f32], gamma: Option<&[f32]>, out: &mut [f32]);
    fn combine_sum(taus: &[&[f32]], weights: &[f32], gamma: Option<&[f32]>, out: &mut [f32]);
    fn combine_max(taus: &[&[f32]], weights: &[f32], gamma: Option<&[f32]>, out: &mut [f32]);
    fn weighted_mean(thetas: &[&[f32]], fishers: &[&[f32]], weights: &[f32], floor: f32, out: &mut [f32]);
    fn multiply(a: &[f64], stride: usize, panel: &[f64], c: &mut [f64], subtract: bool);
    fn cholesky(a: &mut [f64], n: usize, tolerance: f64, scratch: &mut [f64]) -> bool;
    fn solve(l: &[f64], n: usize, p: &mut [f64], scratch: &mut [f64]);
    fn all_weights(values: &[f32]) -> bool;
    fn merge_stored(fused: Fused, stored: &Stored<'_>, out: &mut [u8], counted: Counted<'_>) -> Option<u64>;
    fn store_scaled(float: Float, base: &[u8], tau: &[f32], lambda: f32, out: &mut [u8]) -> bool;
    fn key_range(values: &[f32]) -> (u32, u32);
    fn dot(a: &[f32], b: &[f32]) -> f64;
    fn scale(values: &mut [f32], factor: f32);
    fn divide(values: &mut [f32], divisor: f32);
    fn add(values: &mut [f32], other: &[f32]);
    fn add_scaled(acc: &mut [f32], factor: f32, values: &[f32]);
}

/// Asks for `bytes` to be brought into the second-level cache. Changes no result.
#[inline]
pub(super) fn prefetch(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in bytes.chunks(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch of any address is harmless, and this one lies in a slice; SSE is in the baseline.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bytes;
}
