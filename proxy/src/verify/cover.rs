//! Which blocks a run describes next: data in ranges of a record's size, everything else in runs of
//! zeroes as long as they are. Pure; the answers are brought by who asks.

use crate::engine::request::Allocated;
use afterimage_format::ids::{BLOCK_SIZE, DiskIndex, Lsn};
use afterimage_format::verify::VERIFY_BLOCKS_MAX;
use std::collections::VecDeque;
use std::ops::Range;

/// Most blocks of zeroes in one record: what a record's count can say, as a round number.
const ZERO_BLOCKS_MAX: u64 = 1 << 31;

/// What the run needs next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// What may hold data on a disk, from a block on.
    Ranges(DiskIndex, u64),
    /// These blocks read as zero at this LSN.
    Zero {
        disk: DiskIndex,
        first: u64,
        blocks: u32,
        at: Lsn,
    },
    /// These blocks have to be read.
    Read(DiskIndex, u64, u32),
    /// Nothing.
    Done,
}

/// How far a run is.
#[derive(Debug)]
pub(super) struct Cover {
    /// Blocks of each disk.
    disks: Vec<u64>,
    disk: usize,
    block: u64,
    /// What may hold data behind `block`, ascending; gaps that are not worth a record are in it.
    data: VecDeque<Range<u64>>,
    /// All before this block that is not in `data` reads as zero at `at`.
    known_end: u64,
    at: Lsn,
    done: u64,
}

impl Cover {
    pub(super) fn new(disk_bytes: &[u64]) -> Self {
        Self {
            disks: disk_bytes
                .iter()
                .map(|bytes| bytes.div_ceil(BLOCK_SIZE as u64))
                .collect(),
            disk: 0,
            block: 0,
            data: VecDeque::new(),
            known_end: 0,
            at: Lsn::ZERO,
            done: 0,
        }
    }

    pub(super) fn blocks_total(&self) -> u64 {
        self.disks.iter().sum()
    }

    pub(super) fn blocks_done(&self) -> u64 {
        self.done
    }

    pub(super) fn next_step(&self) -> Step {
        let Some(end) = self.disks.get(self.disk) else {
            return Step::Done;
        };
        let disk = DiskIndex(self.disk as u16);
        if self.block >= self.known_end.min(*end) {
            return Step::Ranges(disk, self.block);
        }
        match self.data.front() {
            Some(data) if data.start <= self.block => {
                let blocks = (data.end - self.block).min(VERIFY_BLOCKS_MAX as u64);
                Step::Read(disk, self.block, blocks as u32)
            }
            next => {
                let until = next.map_or(self.known_end, |data| data.start);
                Step::Zero {
                    disk,
                    first: self.block,
                    blocks: (until - self.block).min(ZERO_BLOCKS_MAX) as u32,
                    at: self.at,
                }
            }
        }
    }

    /// The answer to [`Step::Ranges`]. Nothing known at all: the disk is not there, and left out.
    pub(super) fn take_ranges(&mut self, allocated: Allocated) {
        let Some(end) = self.disks.get(self.disk).copied() else {
            return;
        };
        self.at = allocated.lsn;
        self.known_end = allocated.end_block.min(end);
        if self.known_end <= self.block {
            self.done += end - self.block;
            self.next_disk();
            return;
        }
        // What is no content of one LSN has to be read when it is.
        let all = std::iter::once(self.block..self.known_end).filter(|_| !allocated.exact);
        for range in all.chain(allocated.ranges) {
            let range = range.start.max(self.block)..range.end.min(self.known_end);
            if range.is_empty() {
                continue;
            }
            match self.data.back_mut() {
                Some(last) if range.start < last.end + VERIFY_BLOCKS_MAX as u64 => {
                    last.end = last.end.max(range.end);
                }
                _ => self.data.push_back(range),
            }
        }
    }

    /// So many blocks of the last step are described.
    pub(super) fn advance(&mut self, blocks: u64) {
        self.block += blocks;
        self.done += blocks;
        while self.data.front().is_some_and(|data| data.end <= self.block) {
            self.data.pop_front();
        }
        if self
            .disks
            .get(self.disk)
            .is_some_and(|end| self.block >= *end)
        {
            self.next_disk();
        }
    }

    fn next_disk(&mut self) {
        self.disk += 1;
        self.block = 0;
        self.known_end = 0;
        self.data.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allocated<const N: usize>(lsn: u64, ranges: [(u64, u64); N], end_block: u64) -> Allocated {
        Allocated {
            lsn: Lsn(lsn),
            exact: true,
            ranges: ranges.map(|(start, end)| start..end).to_vec(),
            end_block,
        }
    }

    /// Steps to the end: (disk, first, blocks, whether read).
    fn all(
        cover: &mut Cover,
        mut answer: impl FnMut(u16, u64) -> Allocated,
    ) -> Vec<(u16, u64, u64, bool)> {
        let mut steps = Vec::new();
        loop {
            match cover.next_step() {
                Step::Ranges(disk, from) => cover.take_ranges(answer(disk.0, from)),
                Step::Zero {
                    disk,
                    first,
                    blocks,
                    ..
                } => {
                    steps.push((disk.0, first, u64::from(blocks), false));
                    cover.advance(u64::from(blocks));
                }
                Step::Read(disk, first, blocks) => {
                    steps.push((disk.0, first, u64::from(blocks), true));
                    cover.advance(u64::from(blocks));
                }
                Step::Done => return steps,
            }
        }
    }

    #[test]
    fn every_block_comes_once_and_in_order() {
        let mut cover = Cover::new(&[2000 * BLOCK_SIZE as u64, 10 * BLOCK_SIZE as u64 - 512]);
        assert_eq!(cover.blocks_total(), 2010);
        let steps = all(&mut cover, |disk, from| match (disk, from) {
            // Too many ranges to tell at once; a small gap is read over.
            (0, 0) => allocated(5, [(300, 310), (320, 900)], 900),
            (0, 900) => allocated(6, [(950, 960)], 2000),
            _ => allocated(7, [], 10),
        });
        assert_eq!(
            steps,
            [
                (0, 0, 300, false),
                (0, 300, 256, true),
                (0, 556, 256, true),
                (0, 812, 88, true),
                (0, 900, 50, false),
                (0, 950, 10, true),
                (0, 960, 1040, false),
                (1, 0, 10, false),
            ]
        );
        assert_eq!(cover.blocks_done(), cover.blocks_total());
    }

    #[test]
    fn a_part_that_was_read_is_gone_on_behind() {
        let mut cover = Cover::new(&[100 * BLOCK_SIZE as u64]);
        cover.take_ranges(allocated(1, [(0, 100)], 100));
        assert_eq!(cover.next_step(), Step::Read(DiskIndex(0), 0, 100));
        cover.advance(3);
        assert_eq!(cover.next_step(), Step::Read(DiskIndex(0), 3, 97));
    }

    #[test]
    fn a_disk_that_is_not_there_is_left_out() {
        let mut cover = Cover::new(&[BLOCK_SIZE as u64; 2]);
        let steps = all(&mut cover, |disk, from| match disk {
            0 => allocated(1, [], from),
            _ => allocated(2, [(0, 1)], 1),
        });
        assert_eq!(steps, [(1, 0, 1, true)]);
        assert_eq!(cover.blocks_done(), 2);
    }

    #[test]
    fn what_is_not_told_of_one_lsn_is_read() {
        let mut cover = Cover::new(&[100 * BLOCK_SIZE as u64]);
        let steps = all(&mut cover, |_, _| Allocated {
            exact: false,
            ..allocated(1, [(90, 95)], 100)
        });
        assert_eq!(steps, [(0, 0, 100, true)]);
    }

    /// A disk of 16 TiB has more blocks than a record can count.
    #[test]
    fn endless_zeroes_are_several_records() {
        let blocks = 1u64 << 32;
        let mut cover = Cover::new(&[blocks * BLOCK_SIZE as u64]);
        let steps = all(&mut cover, |_, _| allocated(1, [], blocks));
        assert_eq!(
            steps,
            [(0, 0, 1 << 31, false), (0, 1 << 31, 1 << 31, false)]
        );
    }
}
