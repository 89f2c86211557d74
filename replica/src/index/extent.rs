//! An extent: an aligned power of two of blocks, one version of them.

/// One version of `1 << level` blocks from `block`, which is a multiple of that number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Extent {
    /// First block.
    pub(super) block: u64,
    /// LSN of the version.
    pub(super) lsn: u64,
    /// Segment that holds the data.
    pub(super) segment: u32,
    /// Where in the segment's raw payload the first block is, in blocks.
    pub(super) position: u32,
    /// The disk.
    pub(super) disk: u16,
    /// Size as a power of two.
    pub(super) level: u8,
    /// Whether there is data; otherwise the blocks read as zero.
    pub(super) has_data: bool,
}

const _: () = assert!(size_of::<Extent>() == 32);

impl Extent {
    /// Order within a run: all versions of one aligned range stand together, oldest first.
    pub(super) const fn key(&self) -> (u16, u8, u64, u64) {
        (self.disk, self.level, self.block, self.lsn)
    }
}

/// Cuts a run of blocks into aligned powers of two, the largest possible each time, and gives
/// each with its level: at most two of every size.
pub(super) fn split(mut first: u64, mut count: u64, mut each: impl FnMut(u64, u8)) {
    while count > 0 {
        let aligned = if first == 0 {
            63
        } else {
            first.trailing_zeros()
        };
        let level = aligned.min(count.ilog2());
        each(first, level as u8);
        first += 1 << level;
        count -= 1 << level;
    }
}
