//! The books of the ring: which frames and records lie in it, where the next one goes, what may be
//! released.
//!
//! Always holds: frames lie in the order of their numbers and are released in that order; none
//! crosses the end of the area; only the newest may be open. Space of a frame is given away only
//! after [`Ring::release_front`]. The bytes themselves are written in `append.rs`.

use afterimage_format::frame::{ENTRIES_MAX, FrameStart};
use afterimage_format::ids::{BLOCK_SIZE, DiskIndex, Lsn};
use afterimage_format::op::Op;
use std::collections::VecDeque;

/// How far a frame has come on its way to the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum FrameState {
    Open,
    Closed,
    /// Handed to the storage, or completed: [`Ring::mark_written`] tells them apart.
    Writing,
    Written,
}

/// Where a closed frame goes in the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct LogPlace {
    /// Distance in blocks from the log's very beginning, laps included.
    pub(super) distance: u64,
    /// Block in the log's frame area.
    pub(super) position: u64,
    pub(super) lap: u32,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct RingFrame {
    pub(super) start: FrameStart,
    /// Block of the ring's frame area.
    pub(super) position: u32,
    pub(super) payload_blocks: u32,
    pub(super) entries: u16,
    pub(super) seed: u32,
    pub(super) state: FrameState,
    pub(super) place: LogPlace,
    /// Monotonic time at which it was opened.
    pub(super) opened_ns: u64,
}

impl RingFrame {
    pub(super) fn blocks(&self) -> u32 {
        1 + self.payload_blocks
    }

    pub(super) fn last_lsn(&self) -> Lsn {
        Lsn(self.start.first_lsn.0 + u64::from(self.entries) - 1)
    }
}

/// A record whose frame is in the ring.
#[derive(Clone, Copy, Debug)]
pub(super) struct RecordInfo {
    pub(super) op: Op,
    pub(super) disk: DiskIndex,
    pub(super) first_block: u64,
    pub(super) block_count: u32,
    /// First block of the payload in the ring's frame area.
    pub(super) ring_block: u32,
    /// Blocks (or, for a zeroing, 1) that are chosen for destage and not in the backing yet.
    pub(super) pending: u32,
}

/// Where a record of some payload blocks can go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Room {
    /// Into the open frame.
    Open,
    /// Into a new frame at this block of the area.
    New(u32),
    /// Nowhere until a frame is released.
    Full,
}

#[derive(Debug)]
pub(super) struct Ring {
    area_blocks: u32,
    payload_limit: u32,
    records_max: usize,
    pub(super) frames: VecDeque<RingFrame>,
    records: VecDeque<RecordInfo>,
    /// Of each block of the area that holds a version of a disk's block: the record that holds the
    /// next version of it, or 0.
    successors: Vec<u64>,
    /// LSN of the first of `records`.
    first: Lsn,
    /// Where the next frame would begin.
    head: u32,
    used_blocks: u32,
    /// Frames at the front whose records the log has durably.
    durable_frames: usize,
    /// The first of them: older than the newest durable ones that fill the window, and their blocks.
    rested_frames: usize,
    rested_blocks: u32,
    /// Blocks of the durable ones that have not rested.
    resting_blocks: u32,
    /// Frames at the front that are no longer to be handed to the log.
    submitted: usize,
}

/// Byte offset in ring memory of a block of the frame area.
pub(super) const fn byte_offset(area_block: u32) -> usize {
    (area_block as usize + 1) * BLOCK_SIZE
}

impl Ring {
    /// An empty ring whose next record has LSN `next`.
    pub(super) fn new(area_blocks: u32, payload_limit: u32, next: Lsn) -> Self {
        let records_max = (area_blocks as usize).max(ENTRIES_MAX);
        Self {
            area_blocks,
            payload_limit,
            records_max,
            frames: VecDeque::with_capacity((area_blocks as usize / 2).min(4096)),
            records: VecDeque::with_capacity(records_max),
            successors: vec![0; area_blocks as usize],
            first: next,
            head: 0,
            used_blocks: 0,
            durable_frames: 0,
            rested_frames: 0,
            rested_blocks: 0,
            resting_blocks: 0,
            submitted: 0,
        }
    }

    pub(super) fn area_blocks(&self) -> u32 {
        self.area_blocks
    }

    /// Where the next frame begins if it fits there.
    pub(super) fn head(&self) -> u32 {
        self.head
    }

    pub(super) fn used_blocks(&self) -> u32 {
        self.used_blocks
    }

    /// Blocks of the newest durable frames that rest in the ring, since most of what is written over
    /// at all is written over soon.
    pub(super) fn window_blocks(&self) -> u32 {
        self.area_blocks / 2
    }

    /// Blocks of the durable frames that are older than the window.
    pub(super) fn rested_blocks(&self) -> u32 {
        self.rested_blocks
    }

    /// The newest record older than the window, or 0.
    pub(super) fn rested(&self) -> Lsn {
        let newest = self.rested_frames.checked_sub(1);
        let newest = newest.and_then(|index| self.frames.get(index));
        newest.map_or(Lsn::ZERO, RingFrame::last_lsn)
    }

    /// LSN of the newest record, or of the last one before the ring was empty.
    pub(super) fn appended(&self) -> Lsn {
        Lsn(self.first.0 + self.records.len() as u64 - 1)
    }

    pub(super) fn record(&mut self, lsn: Lsn) -> &mut RecordInfo {
        let index = usize::try_from(lsn.0 - self.first.0).expect("records in the ring are few");
        &mut self.records[index]
    }

    pub(super) fn open_frame(&mut self) -> Option<&mut RingFrame> {
        self.frames
            .back_mut()
            .filter(|frame| frame.state == FrameState::Open)
    }

    /// Where a record with this payload would go now.
    pub(super) fn room(&self, payload_blocks: u32) -> Room {
        debug_assert!(payload_blocks <= self.payload_limit);
        if self.records.len() >= self.records_max {
            return Room::Full;
        }
        let need = 1 + payload_blocks;
        let (Some(oldest), Some(newest)) = (self.frames.front(), self.frames.back()) else {
            return Room::New(if self.head + need <= self.area_blocks {
                self.head
            } else {
                0
            });
        };
        // Wrapped: the free space ends where the oldest frame begins.
        let wrapped = self.head <= oldest.position;
        let end = if wrapped {
            oldest.position
        } else {
            self.area_blocks
        };
        if newest.state == FrameState::Open
            && usize::from(newest.entries) < ENTRIES_MAX
            && newest.payload_blocks + payload_blocks <= self.payload_limit
            && self.head + payload_blocks <= end
        {
            return Room::Open;
        }
        if self.head + need <= end {
            Room::New(self.head)
        } else if !wrapped && need <= oldest.position {
            Room::New(0)
        } else {
            Room::Full
        }
    }

    pub(super) fn push_frame(&mut self, frame: RingFrame) {
        debug_assert_eq!(frame.payload_blocks, 0);
        self.head = frame.position + 1;
        self.used_blocks += 1;
        self.frames.push_back(frame);
    }

    /// Books a record into the open frame. Returns its LSN.
    pub(super) fn push_record(&mut self, record: RecordInfo, payload_blocks: u32) -> Lsn {
        self.records.push_back(record);
        self.head += payload_blocks;
        self.used_blocks += payload_blocks;
        let frame = self.open_frame().expect("records go into an open frame");
        frame.entries += 1;
        frame.payload_blocks += payload_blocks;
        self.appended()
    }

    /// Notes where a record has put a version of a disk's block, and where the version before it
    /// lies if the ring still has that.
    pub(super) fn place_version(&mut self, ring_block: u32, lsn: Lsn, before: Option<u32>) {
        self.successors[ring_block as usize] = 0;
        if let Some(before) = before {
            self.successors[before as usize] = lsn.0;
        }
    }

    /// Whether the version of a disk's block at this place of the area has a next version at or below
    /// this record.
    pub(super) fn superseded_by(&self, ring_block: u32, bound: Lsn) -> bool {
        let successor = self.successors[ring_block as usize];
        successor != 0 && successor <= bound.0
    }

    /// Closed frames that have not been handed to the log, oldest first.
    pub(super) fn closed(&self) -> impl Iterator<Item = &RingFrame> {
        self.frames
            .range(self.submitted..)
            .take_while(|frame| frame.state == FrameState::Closed)
    }

    /// The oldest frame, open or closed, that has not been handed to the log.
    pub(super) fn oldest_unsubmitted(&self) -> Option<&RingFrame> {
        self.frames.get(self.submitted)
    }

    /// Blocks of frames, open or closed, that have not been handed to the log.
    pub(super) fn unsubmitted_blocks(&self, enough: u32) -> u32 {
        let mut blocks = 0;
        for frame in self.frames.range(self.submitted..) {
            blocks += frame.blocks();
            if blocks >= enough {
                break;
            }
        }
        blocks
    }

    /// The next `count` closed frames are in the storage's hands.
    pub(super) fn mark_writing(&mut self, count: usize) {
        for frame in self
            .frames
            .range_mut(self.submitted..self.submitted + count)
        {
            debug_assert_eq!(frame.state, FrameState::Closed);
            frame.state = FrameState::Writing;
        }
        self.submitted += count;
    }

    /// What was in the storage's hands is written. Returns the last LSN of it.
    pub(super) fn mark_written(&mut self) -> Option<Lsn> {
        let mut last = None;
        for frame in self.frames.range_mut(..self.submitted).rev() {
            if frame.state != FrameState::Writing {
                break;
            }
            frame.state = FrameState::Written;
            last.get_or_insert(frame.last_lsn());
        }
        last
    }

    /// The log has every record up to this one durably.
    pub(super) fn mark_durable(&mut self, durable: Lsn) {
        while let Some(frame) = self.frames.get(self.durable_frames)
            && frame.entries > 0
            && frame.last_lsn() <= durable
        {
            self.resting_blocks += frame.blocks();
            self.durable_frames += 1;
        }
        while let Some(frame) = self.frames.get(self.rested_frames)
            && self.resting_blocks > self.window_blocks()
        {
            self.resting_blocks -= frame.blocks();
            self.rested_blocks += frame.blocks();
            self.rested_frames += 1;
        }
    }

    /// The oldest frame whose records are not all at or below `durable`.
    pub(super) fn oldest_above(&self, durable: Lsn) -> Option<&RingFrame> {
        let index = self
            .frames
            .partition_point(|frame| frame.entries > 0 && frame.last_lsn() <= durable);
        self.frames.get(index)
    }

    /// The newest record of the frames that were opened by then, or 0.
    pub(super) fn newest_opened_by(&self, opened_ns: u64) -> Lsn {
        let frames = self
            .frames
            .partition_point(|frame| frame.opened_ns <= opened_ns);
        let newest = frames
            .checked_sub(1)
            .and_then(|index| self.frames.get(index));
        newest.map_or(Lsn::ZERO, RingFrame::last_lsn)
    }

    /// Gives the space of the oldest frame away. The caller has seen to it that the log has it
    /// durably and the backing has its content.
    pub(super) fn release_front(&mut self) {
        let Some(frame) = self.frames.pop_front() else {
            return;
        };
        debug_assert_ne!(frame.state, FrameState::Open);
        debug_assert_ne!(frame.state, FrameState::Writing);
        self.used_blocks -= frame.blocks();
        if self.rested_frames > 0 {
            self.rested_frames -= 1;
            self.rested_blocks -= frame.blocks();
        } else if self.durable_frames > 0 {
            self.resting_blocks -= frame.blocks();
        }
        self.durable_frames = self.durable_frames.saturating_sub(1);
        self.submitted = self.submitted.saturating_sub(1);
        for _ in 0..frame.entries {
            self.records.pop_front();
        }
        self.first.0 += u64::from(frame.entries);
    }
}
