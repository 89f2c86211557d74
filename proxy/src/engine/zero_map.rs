//! Which ranges read as zero since which LSN, until the backing reads so too.
//!
//! Always holds: for every block the newest zeroing that has not been destaged. Ranges are never
//! joined with those of another LSN. In memory only.

use afterimage_format::ids::{DiskIndex, Lsn};
use rangemap::RangeMap;
use std::ops::Range;

/// What zeroed a range: its space may be freed or not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Zeroing {
    pub(super) lsn: Lsn,
    pub(super) hole: bool,
}

#[derive(Debug)]
pub(super) struct ZeroMap {
    disks: Vec<RangeMap<u64, Zeroing>>,
}

impl ZeroMap {
    pub(super) fn new(disks: usize) -> Self {
        Self {
            disks: vec![RangeMap::new(); disks],
        }
    }

    pub(super) fn insert(&mut self, disk: DiskIndex, blocks: Range<u64>, zeroing: Zeroing) {
        self.disks[usize::from(disk.0)].insert(blocks, zeroing);
    }

    pub(super) fn get(&self, disk: DiskIndex, block: u64) -> Option<Lsn> {
        let ranges = &self.disks[usize::from(disk.0)];
        if ranges.is_empty() {
            return None;
        }
        ranges.get(&block).map(|zeroing| zeroing.lsn)
    }

    /// The zeroings that touch `blocks`, clipped to it.
    pub(super) fn overlapping(
        &self,
        disk: DiskIndex,
        blocks: Range<u64>,
    ) -> impl Iterator<Item = (Range<u64>, Zeroing)> + '_ {
        self.disks[usize::from(disk.0)]
            .overlapping(blocks.clone())
            .map(move |(range, zeroing)| {
                let clipped = range.start.max(blocks.start)..range.end.min(blocks.end);
                (clipped, *zeroing)
            })
    }

    /// The backing reads as zero there as of `lsn`: what no newer zeroing covers goes.
    pub(super) fn destaged(&mut self, disk: DiskIndex, blocks: Range<u64>, lsn: Lsn) {
        let mut from = blocks.start;
        while from < blocks.end {
            let mut touched = self.overlapping(disk, from..blocks.end);
            let Some((range, _)) = touched.find(|(_, zeroing)| zeroing.lsn == lsn) else {
                return;
            };
            drop(touched);
            from = range.end;
            self.disks[usize::from(disk.0)].remove(range);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_zeroing_stays_until_it_is_destaged() {
        let disk = DiskIndex(0);
        let zeroing = |lsn| Zeroing {
            lsn: Lsn(lsn),
            hole: true,
        };
        let mut map = ZeroMap::new(1);
        map.insert(disk, 0..100, zeroing(1));
        map.insert(disk, 40..60, zeroing(2));
        assert_eq!(map.get(disk, 39), Some(Lsn(1)));
        assert_eq!(map.get(disk, 40), Some(Lsn(2)));
        map.destaged(disk, 0..100, Lsn(1));
        assert_eq!(map.get(disk, 39), None);
        assert_eq!(map.get(disk, 59), Some(Lsn(2)));
        assert_eq!(map.get(disk, 60), None);
        map.destaged(disk, 40..60, Lsn(2));
        assert_eq!(map.get(disk, 50), None);
    }
}
