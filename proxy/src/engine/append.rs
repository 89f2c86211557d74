//! Putting records into the ring.
//!
//! Order of stores (format, `frame`): a frame is opened with its counts 0, its number last; a record
//! is payload, entry, the counts word, then the header's word for the newest LSN; a frame is closed by
//! the word with its checksum. So a kill at any instant leaves whole records only, and every record
//! that was answered; and damage that hides one of those is noticed.

use super::block_map::BlockKey;
use super::ring::{FrameState, RecordInfo, RingFrame, Room, byte_offset};
use super::zero_map::Zeroing;
use super::{Engine, PlacedFrame};
use crate::io::Storage;
use afterimage_format::checksum::crc32c;
use afterimage_format::frame::header::{
    FRAME_COUNTS_WORD, FRAME_CRC_WORD, FRAME_NUMBER_WORD, counts_word, crc_word, entry_offset,
};
use afterimage_format::frame::{Entry, FrameHeader, FrameStart};
use afterimage_format::ids::{BLOCK_SIZE, DiskIndex, Lsn};
use afterimage_format::op::Op;
use afterimage_format::ring_header::RING_APPENDED_WORD;

use super::request::Now;

/// What a record says, its payload aside.
#[derive(Clone, Copy, Debug)]
pub(super) struct RecordSpec {
    pub(super) op: Op,
    pub(super) disk: DiskIndex,
    pub(super) first_block: u64,
    pub(super) block_count: u32,
    pub(super) payload_blocks: u32,
    pub(super) aux: u32,
}

impl<S: Storage> Engine<S> {
    /// Finds room for a record of this many payload blocks. `Some` is the first of them in the
    /// ring's area (without meaning if there are none); fill them, then [`Engine::publish`] before
    /// anything else.
    pub(super) fn reserve(&mut self, now: Now, payload_blocks: u32) -> Option<u32> {
        if let Room::New(position) = self.ring.room(payload_blocks) {
            self.close_frame();
            self.open_frame(now, position);
        }
        // After opening a frame for it there is room in the open frame.
        match self.ring.room(payload_blocks) {
            Room::Open => self
                .ring
                .open_frame()
                .map(|frame| frame.position + frame.blocks()),
            Room::New(_) | Room::Full => None,
        }
    }

    /// Makes a reserved and filled record part of the group's history: from here on it survives a
    /// kill, is read, persisted and destaged.
    pub(super) fn publish(&mut self, now: Now, ring_block: u32, spec: RecordSpec) -> Lsn {
        let payload_len = spec.payload_blocks as usize * BLOCK_SIZE;
        let payload_crc = if payload_len == 0 {
            0
        } else {
            crc32c(self.storage.ring(byte_offset(ring_block), payload_len))
        };
        let frame = *self
            .ring
            .open_frame()
            .expect("reserve leaves an open frame behind");
        let entry = Entry {
            lsn: self.ring.appended().next(),
            op: spec.op,
            disk: spec.disk,
            first_block: spec.first_block,
            block_count: spec.block_count,
            payload_position: if payload_len == 0 { 0 } else { frame.blocks() },
            payload_crc,
            wall_ns: now.wall_ns,
            aux: spec.aux,
        };
        let descriptor = byte_offset(frame.position);
        self.storage.ring_write(
            descriptor + entry_offset(usize::from(frame.entries)),
            &entry.encode(frame.seed),
        );
        self.storage.ring_store(
            descriptor + FRAME_COUNTS_WORD,
            counts_word(
                frame.entries + 1,
                frame.payload_blocks + spec.payload_blocks,
            ),
        );
        let lsn = self.ring.push_record(
            RecordInfo {
                op: spec.op,
                disk: spec.disk,
                first_block: spec.first_block,
                block_count: spec.block_count,
                ring_block,
                pending: 0,
            },
            spec.payload_blocks,
        );
        debug_assert_eq!(lsn, entry.lsn);
        self.storage.ring_store(RING_APPENDED_WORD, lsn.0);
        self.status.records += 1;
        if spec.op.changes_blocks() {
            let blocks = spec.first_block..spec.first_block + u64::from(spec.block_count);
            self.reads.overtake(spec.disk, &blocks);
        }
        match spec.op {
            Op::Write => {
                for index in 0..spec.block_count {
                    let key = BlockKey::new(spec.disk, spec.first_block + u64::from(index));
                    let before = self.map.insert(key, lsn, ring_block + index);
                    self.ring.place_version(ring_block + index, lsn, before);
                }
            }
            Op::Zero | Op::Trim => {
                let blocks = spec.first_block..spec.first_block + u64::from(spec.block_count);
                let hole = spec.op == Op::Trim;
                self.zeroes.insert(spec.disk, blocks, Zeroing { lsn, hole });
            }
            _ => {}
        }
        lsn
    }

    fn open_frame(&mut self, now: Now, position: u32) {
        let start = FrameStart {
            log: self.log,
            incarnation: self.incarnation,
            number: self.next_frame,
            first_lsn: self.ring.appended().next(),
            wall_ns: now.wall_ns,
            boottime_ns: now.boottime_ns,
            boot: self.boot,
            previous_crc: self.previous_crc,
        };
        self.next_frame += 1;
        let at = byte_offset(position);
        let descriptor = start.open_descriptor();
        self.storage.ring_store(at + FRAME_COUNTS_WORD, 0);
        self.storage
            .ring_write(at, &descriptor[..FRAME_NUMBER_WORD]);
        let behind = FRAME_NUMBER_WORD + size_of::<u64>();
        self.storage.ring_write(at + behind, &descriptor[behind..]);
        self.storage
            .ring_store(at + FRAME_NUMBER_WORD, start.number);
        self.ring.push_frame(RingFrame {
            start,
            position,
            payload_blocks: 0,
            entries: 0,
            seed: start.entry_seed(),
            state: FrameState::Open,
            place: super::LogPlace::default(),
            opened_ns: now.monotonic_ns,
        });
    }

    /// Closes the open frame, if there is one with records, and gives it its place in the log.
    pub(super) fn close_frame(&mut self) {
        let durable_lsn = self.commit.durable;
        let Some(frame) = self.ring.open_frame() else {
            return;
        };
        if frame.entries == 0 {
            return;
        }
        let blocks = u64::from(frame.blocks());
        frame.state = FrameState::Closed;
        frame.place = self.space.next_place(blocks);
        let frame = *frame;
        let header = FrameHeader {
            start: frame.start,
            entry_count: frame.entries,
            payload_blocks: frame.payload_blocks,
            durable_lsn,
            lap: frame.place.lap,
        };
        let (bytes, crc) = header.encode();
        let at = byte_offset(frame.position);
        self.storage.ring_write(at, &bytes[..FRAME_CRC_WORD]);
        self.storage
            .ring_store(at + FRAME_CRC_WORD, crc_word(frame.start.previous_crc, crc));
        self.space.push(PlacedFrame {
            place: frame.place,
            blocks,
            number: frame.start.number,
            first_lsn: frame.start.first_lsn,
            last_lsn: frame.last_lsn(),
            previous_crc: frame.start.previous_crc,
        });
        self.previous_crc = crc;
    }
}
