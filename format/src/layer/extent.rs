//! An extent: an aligned power of two of blocks, one version of them.

use crate::ids::{DiskIndex, Lsn};

/// Highest level: no disk has more than 2^51 blocks.
pub const LEVEL_MAX: u8 = 51;

/// One version of `1 << level` blocks from `block`, which is a multiple of that number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// First block.
    pub block: u64,
    /// LSN of the version.
    pub lsn: Lsn,
    /// Sequence number of the segment that holds the data; it names the segment within its epoch.
    pub segment: u32,
    /// Where in the segment's raw payload the first block is, in blocks; 0 without data.
    pub position: u32,
    /// The disk.
    pub disk: DiskIndex,
    /// Size as a power of two.
    pub level: u8,
    /// Whether there is data; otherwise the blocks read as zero.
    pub has_data: bool,
}

const _: () = assert!(size_of::<Extent>() == 32);

impl Extent {
    /// Order within a run: all versions of one aligned range stand together, oldest first.
    #[must_use]
    pub const fn key(&self) -> (u16, u8, u64, u64) {
        (self.disk.0, self.level, self.block, self.lsn.0)
    }

    /// The block behind its last.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.block + (1 << self.level)
    }
}
