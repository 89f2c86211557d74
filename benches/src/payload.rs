//! Blocks and block numbers that are the same in every run.

use afterimage_format::ids::BLOCK_SIZE;

/// A generator of 64-bit numbers (SplitMix64): small, fast and the same everywhere.
#[derive(Clone, Debug)]
pub struct Numbers(u64);

impl Numbers {
    /// The numbers that belong to this seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number, any 64 bits.
    pub const fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not 0.
    pub const fn below(&mut self, end: u64) -> u64 {
        self.next_u64() % end
    }
}

/// A block of 4 KiB that compresses to half: random bytes, then zeroes, as fio's
/// `buffer_compress_percentage=50` makes them.
#[must_use]
pub fn half_compressible(numbers: &mut Numbers) -> Vec<u8> {
    let mut block = vec![0; BLOCK_SIZE];
    for word in block[..BLOCK_SIZE / 2].chunks_exact_mut(8) {
        word.copy_from_slice(&numbers.next_u64().to_le_bytes());
    }
    block
}
