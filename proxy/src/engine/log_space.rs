//! The books of the log's frame area: where the next frame goes, what lies in it, what may be
//! overwritten.
//!
//! Places are counted as a distance in blocks from the log's first block, laps included, so that
//! "free" is one comparison. Always holds: no frame is placed over a block that the durable
//! superblock's tail has not passed. Frames are remembered in extents of bounded size, so that a
//! large log needs little memory; the tail moves by whole extents.

use super::ring::LogPlace;
use afterimage_format::ids::Lsn;
use std::collections::VecDeque;

/// Neighbouring frames of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) place: LogPlace,
    pub(super) blocks: u64,
    pub(super) first_frame: u64,
    pub(super) first_lsn: Lsn,
    pub(super) last_lsn: Lsn,
    /// Header checksum of the frame before the first.
    pub(super) previous_crc: u32,
}

/// One frame as the log's books take it.
#[derive(Clone, Copy, Debug)]
pub(super) struct PlacedFrame {
    pub(super) place: LogPlace,
    pub(super) blocks: u64,
    pub(super) number: u64,
    pub(super) first_lsn: Lsn,
    pub(super) last_lsn: Lsn,
    pub(super) previous_crc: u32,
}

#[derive(Debug)]
pub(super) struct LogSpace {
    area_blocks: u64,
    extent_blocks_max: u64,
    head: u64,
    /// Distance of the tail that the durable superblock has.
    durable_tail: u64,
    extents: VecDeque<Extent>,
}

impl LogSpace {
    /// A log whose tail and next frame are at these distances.
    pub(super) fn new(area_blocks: u64, durable_tail: u64, head: u64) -> Self {
        Self {
            area_blocks,
            extent_blocks_max: (area_blocks / 1024).clamp(1, 1024),
            head,
            durable_tail,
            extents: VecDeque::new(),
        }
    }

    pub(super) fn area_blocks(&self) -> u64 {
        self.area_blocks
    }

    pub(super) fn head(&self) -> u64 {
        self.head
    }

    /// The place that this distance stands for.
    pub(super) fn place_at(&self, distance: u64) -> LogPlace {
        LogPlace {
            distance,
            position: distance % self.area_blocks,
            lap: u32::try_from(distance / self.area_blocks).expect("fewer laps than 2^32"),
        }
    }

    /// Where a frame of this many blocks goes: right behind the last one, or at the beginning of
    /// the area if it would cross its end.
    pub(super) fn next_place(&self, blocks: u64) -> LogPlace {
        let position = self.head % self.area_blocks;
        let distance = if position + blocks > self.area_blocks {
            self.head - position + self.area_blocks
        } else {
            self.head
        };
        self.place_at(distance)
    }

    /// Books a frame at the place that [`LogSpace::next_place`] gave.
    pub(super) fn push(&mut self, frame: PlacedFrame) {
        self.head = frame.place.distance + frame.blocks;
        if let Some(last) = self.extents.back_mut()
            && last.place.distance + last.blocks == frame.place.distance
            && last.place.lap == frame.place.lap
            && last.blocks + frame.blocks <= self.extent_blocks_max
        {
            last.blocks += frame.blocks;
            last.last_lsn = frame.last_lsn;
            return;
        }
        self.extents.push_back(Extent {
            place: frame.place,
            blocks: frame.blocks,
            first_frame: frame.number,
            first_lsn: frame.first_lsn,
            last_lsn: frame.last_lsn,
            previous_crc: frame.previous_crc,
        });
    }

    /// Whether a frame there overwrites nothing that recovery may need.
    pub(super) fn fits(&self, place: LogPlace, blocks: u64) -> bool {
        place.distance + blocks <= self.durable_tail + self.area_blocks
    }

    /// Blocks that may not be overwritten.
    pub(super) fn used_blocks(&self) -> u64 {
        self.head - self.durable_tail
    }

    /// Blocks of the log that hold records above `lsn`, to within an extent.
    pub(super) fn blocks_above(&self, lsn: Lsn) -> u64 {
        let index = self
            .extents
            .partition_point(|extent| extent.last_lsn <= lsn);
        self.extents
            .get(index)
            .map_or(0, |extent| self.head - extent.place.distance)
    }

    /// Blocks of the log from the first record above `lsn` on, the unused ends of laps among them.
    /// Exact where `lsn` is the last of its extent; within the extent that holds it, it is taken to
    /// lie where its share of the records ends. The error is less than that extent: 4 MiB at most.
    pub(super) fn blocks_behind(&self, lsn: Lsn) -> u64 {
        let below = self.extent_of(lsn.next()).and_then(|index| {
            let extent = self.extents.get(index)?;
            let below = lsn.next().0.checked_sub(extent.first_lsn.0)?;
            let records = extent.last_lsn.0 - extent.first_lsn.0 + 1;
            Some((u128::from(extent.blocks) * u128::from(below) / u128::from(records)) as u64)
        });
        self.blocks_above(lsn) - below.unwrap_or(0)
    }

    /// How many extents at the tail hold nothing above `lsn`, and nothing at or beyond `distance`.
    pub(super) fn passable(&self, lsn: Lsn, distance: u64) -> usize {
        self.extents
            .iter()
            .take_while(|extent| extent.last_lsn <= lsn && extent.place.distance < distance)
            .count()
    }

    pub(super) fn extent(&self, index: usize) -> Option<&Extent> {
        self.extents.get(index)
    }

    /// The extent that holds this record.
    pub(super) fn extent_of(&self, lsn: Lsn) -> Option<usize> {
        let index = self.extents.partition_point(|extent| extent.last_lsn < lsn);
        (index < self.extents.len()).then_some(index)
    }

    /// First LSN in the log, if it holds any record.
    pub(super) fn oldest(&self) -> Option<Lsn> {
        self.extents.front().map(|extent| extent.first_lsn)
    }

    /// A superblock with the tail at `distance` is durable: everything before it is free.
    pub(super) fn tail_durable(&mut self, distance: u64) {
        debug_assert!(distance >= self.durable_tail);
        self.durable_tail = distance;
        while self
            .extents
            .front()
            .is_some_and(|extent| extent.place.distance < distance)
        {
            self.extents.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks and records of frames: large writes with few records to a frame, and small ones.
    const FRAMES: [(u64, u64); 7] = [(9, 1), (1, 90), (3, 2), (17, 1), (1, 64), (2, 50), (12, 3)];

    /// Books of frames with so many blocks and records each, and the distance at which the frame of
    /// each record begins, from LSN 1 on.
    fn filled(area_blocks: u64, frames: impl Iterator<Item = (u64, u64)>) -> (LogSpace, Vec<u64>) {
        let mut space = LogSpace::new(area_blocks, 0, 0);
        let mut begins = Vec::new();
        for (number, (blocks, records)) in (0..).zip(frames) {
            let before = begins.len() as u64;
            let place = space.next_place(blocks);
            space.push(PlacedFrame {
                place,
                blocks,
                number,
                first_lsn: Lsn(before + 1),
                last_lsn: Lsn(before + records),
                previous_crc: 0,
            });
            begins.extend(std::iter::repeat_n(place.distance, records as usize));
        }
        (space, begins)
    }

    #[test]
    fn within_an_extent_the_records_share_its_blocks() {
        let (space, begins) = filled(16 * 1024, [(2, 5); 100].into_iter());
        let extent = space.extent(0).expect("an extent");
        assert_eq!(extent.blocks, 16, "eight frames to an extent");
        for frame in 0..100 {
            let behind = space.blocks_behind(Lsn(frame * 5));
            assert_eq!(behind, space.head() - begins[frame as usize * 5]);
        }
    }

    #[test]
    fn what_lies_behind_a_record_is_known_to_less_than_an_extent() {
        // Extents of up to 16 blocks, of one frame each, and across the ends of laps.
        for (area_blocks, rounds) in [(16 * 1024, 50), (1000, 20), (203, 4)] {
            let frames = std::iter::repeat_n(FRAMES, rounds).flatten();
            let (space, begins) = filled(area_blocks, frames);
            let mut before = space.blocks_behind(Lsn::ZERO);
            assert_eq!(before, space.used_blocks());
            for (lsn, begin) in (0..).map(Lsn).zip(&begins) {
                let behind = space.blocks_behind(lsn);
                let exact = space.head() - begin;
                let index = space.extent_of(lsn.next()).expect("it is in the log");
                let extent = space.extent(index).expect("it is in the log");
                if extent.first_lsn == lsn.next() {
                    assert_eq!(behind, exact, "{lsn} of {area_blocks}");
                }
                assert!(behind.abs_diff(exact) < extent.blocks.max(2), "{lsn}");
                assert!(behind <= before, "more lies behind a later record");
                before = behind;
            }
            assert_eq!(space.blocks_behind(Lsn(begins.len() as u64)), 0);
        }
    }
}
