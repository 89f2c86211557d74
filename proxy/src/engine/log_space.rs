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
