//! From a run of blocks to extents: aligned powers of two.

use afterimage_format::layer::LEVEL_MAX;

/// Cuts a run of blocks into aligned powers of two, the largest possible each time, and gives
/// each with its level: at most two of every size.
pub(super) fn split(mut first: u64, mut count: u64, mut each: impl FnMut(u64, u8)) {
    while count > 0 {
        let aligned = if first == 0 {
            LEVEL_MAX.into()
        } else {
            first.trailing_zeros()
        };
        let level = aligned.min(count.ilog2()).min(LEVEL_MAX.into());
        each(first, level as u8);
        first += 1 << level;
        count -= 1 << level;
    }
}
