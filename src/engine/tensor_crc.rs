//! The checksum of every tensor's bytes, CRC-64/NVME, gathered while they are written in any order, by any thread.
//!
//! A CRC is linear: what a piece adds to the checksum of the whole depends on the piece and on how many bytes follow it.
//! So pieces are summed as they come, and one number per tensor is kept. That an output is what was written is proved by
//! the BLAKE3 hashes of its files; checksums tell where in a damaged shard the damage is, and which tensors of two outputs
//! differ. A second cryptographic hash of every byte would cost a tenth of a merge.
//!
//! Source: NVM Express NVM Command Set Specification 1.0d, section 5.2.1.3.4.

use std::sync::atomic::{AtomicU64, Ordering};

use crc_fast::{CrcAlgorithm, Digest};

/// A CRC-64/NVME.
pub(super) type Crc = u64;

/// The polynomial, its coefficients from x^0 in the highest bit on.
const POLYNOMIAL: u64 = 0x9a6c_9329_ac4b_c9b5;

/// 1 in the same order.
const ONE: u64 = 1 << 63;

/// The checksums of all tensors of an output.
pub(super) struct TensorCrcs(Vec<AtomicU64>);

impl TensorCrcs {
    /// For so many tensors, none of which has any bytes yet.
    pub(super) fn new(tensors: usize) -> Self {
        Self((0..tensors).map(|_| AtomicU64::new(0)).collect())
    }

    /// Takes in `piece`, behind which `following` bytes of the tensor come. Every byte comes once.
    pub(super) fn add(&self, tensor: u32, piece: &PieceCrc, following: u64) {
        let shifted = multiply(piece.finish(), power_of_x(following));
        self.0[tensor as usize].fetch_xor(shifted, Ordering::Relaxed);
    }

    /// Says what the checksum of a tensor is.
    pub(super) fn set(&self, tensor: u32, crc: Crc) {
        self.0[tensor as usize].store(crc, Ordering::Relaxed);
    }

    /// The checksum of what was taken in of a tensor: its own, once it is complete.
    pub(super) fn get(&self, tensor: u32) -> Crc {
        self.0[tensor as usize].load(Ordering::Relaxed)
    }

    /// The checksums of all tensors; 0 where there were no bytes.
    pub(super) fn finish(self) -> Vec<Crc> {
        self.0.into_iter().map(AtomicU64::into_inner).collect()
    }
}

/// The checksum of consecutive bytes.
pub(super) struct PieceCrc(Digest);

impl PieceCrc {
    /// Of no bytes.
    pub(super) fn new() -> Self {
        Self(Digest::new(CrcAlgorithm::Crc64Nvme))
    }

    /// Takes in the next bytes.
    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The checksum of what was taken in.
    pub(super) fn finish(&self) -> Crc {
        self.0.finalize()
    }
}

/// As the manifest has it: 16 hexadecimal digits.
pub(super) fn hex(crc: Crc) -> String {
    format!("{crc:016x}")
}

/// x to the power of 8 `bytes`, modulo the polynomial.
fn power_of_x(mut bytes: u64) -> u64 {
    // x^8, x^16, x^32, ...
    let (mut square, mut power) = (ONE >> 8, ONE);
    while bytes > 0 {
        if bytes & 1 == 1 {
            power = multiply(power, square);
        }
        square = multiply(square, square);
        bytes >>= 1;
    }
    power
}

/// The product of two polynomials modulo the polynomial.
fn multiply(a: u64, mut b: u64) -> u64 {
    let mut product = 0;
    for power in 0..u64::BITS {
        product ^= b & 0u64.wrapping_sub(a << power >> 63);
        b = (b >> 1) ^ (POLYNOMIAL & 0u64.wrapping_sub(b & 1));
    }
    product
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn crc(bytes: &[u8]) -> Crc {
        let mut piece = PieceCrc::new();
        piece.update(bytes);
        piece.finish()
    }

    /// One bit at a time, from the definition: reflected, beginning and ending with all ones.
    fn slow_crc(bytes: &[u8]) -> Crc {
        !bytes.iter().fold(u64::MAX, |crc, &byte| {
            (0..8).fold(crc ^ u64::from(byte), |crc, _| crc >> 1 ^ (if crc & 1 == 1 { POLYNOMIAL } else { 0 }))
        })
    }

    #[test]
    fn the_checksum_is_that_of_the_specification() {
        assert_eq!(crc(b"123456789"), 0xae8b_1486_0a79_9888);
        assert_eq!(crc(&[0; 4096]), 0x6482_d367_eb22_b64e);
        assert_eq!((crc(b""), hex(0x1f)), (0, "000000000000001f".to_owned()));
    }

    proptest! {
        #[test]
        fn any_order_of_any_pieces_gives_the_plain_checksum(
            bytes in prop_oneof![0usize..300, 14_000usize..18_000, 60_000usize..70_000],
            cuts in prop::collection::vec(0.0f64..1.0, 0..40),
            seed in any::<u64>(),
        ) {
            let data: Vec<u8> = (0..bytes).map(|i| (i as u64).wrapping_mul(seed | 1).to_le_bytes()[3]).collect();
            let mut ends: Vec<usize> = cuts.iter().map(|c| (c * bytes as f64) as usize).chain([0, bytes]).collect();
            ends.sort_unstable();
            let mut pieces: Vec<(usize, usize)> = ends.windows(2).map(|w| (w[0], w[1])).collect();
            pieces.sort_by_key(|p| (p.0 as u64).wrapping_mul(seed | 1));
            let crcs = TensorCrcs::new(2);
            for (a, b) in pieces {
                let mut piece = PieceCrc::new();
                data[a..b].chunks(1000).for_each(|part| piece.update(part));
                crcs.add(1, &piece, (bytes - b) as u64);
            }
            prop_assert_eq!((crcs.get(0), crcs.get(1)), (0, slow_crc(&data)));
            prop_assert_eq!(crcs.finish(), vec![0, crc(&data)]);
        }

        #[test]
        fn powers_of_x_are_products(a in 0u64..1 << 40, b in 0u64..1 << 40) {
            prop_assert_eq!(power_of_x(a + b), multiply(power_of_x(a), power_of_x(b)));
            prop_assert_eq!(multiply(a, ONE), a);
        }
    }
}
