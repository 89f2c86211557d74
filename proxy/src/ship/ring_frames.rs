//! Frames out of the ring, while they are still there: what was written a moment ago need not be read
//! back from the log's disk.
//!
//! Nothing is shared with the engine but the ring file. Its frames are those of the log, byte for
//! byte, so a frame from here is as good as one from there: it must be the one that the chain
//! demands, and every checksum in it is checked on a private copy. A frame that is being overwritten
//! while it is copied fails that, and is read from the log instead. What always holds: nothing above
//! the durable bound is given out. Errors are not told: whatever cannot be had here is in the log.

use crate::engine::log::LogHead;
use afterimage_format::frame::Descriptor;
use afterimage_format::ids::{BLOCK_SIZE, LogId, Lsn};
use afterimage_format::ring_header::{
    NextToPersist, RING_AREA_OFFSET, RING_HEADER_BYTES, RING_NEXT_WORD, RingHeader,
};
use bytes::Bytes;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Where the bytes of a ring come from.
pub trait RingSource: Send {
    /// Fills the buffer from this offset of ring memory on.
    ///
    /// # Errors
    /// The ring is gone, or ends before.
    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

/// A ring file on its tmpfs. Read by copies, never mapped: the engine stores into it meanwhile.
impl RingSource for File {
    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(buffer, offset)
    }
}

/// A whole frame, checked.
pub(super) struct RingFrame {
    pub(super) descriptor: Descriptor,
    /// Everything behind the descriptor.
    pub(super) payload: Bytes,
}

/// Follows the frames of one ring.
pub(super) struct RingFrames {
    ring: Box<dyn RingSource>,
    log: LogId,
    incarnation: u32,
    area_blocks: u64,
    known: Option<Known>,
}

/// Where one frame stands or will stand: at this block of the area, or at its start.
#[derive(Clone, Copy)]
struct Known {
    frame: u64,
    position: u64,
}

impl RingFrames {
    /// Follows this ring, if it is one of this log.
    pub(super) fn open(mut ring: Box<dyn RingSource>, log: LogId) -> Option<Self> {
        let mut bytes = [0; RING_HEADER_BYTES];
        ring.read(0, &mut bytes).ok()?;
        let header = RingHeader::decode(&bytes).ok()?;
        (header.log == log).then_some(Self {
            ring,
            log,
            incarnation: header.incarnation,
            area_blocks: header.area_blocks,
            known: None,
        })
    }

    /// The frame that follows `head`, if all of it is durable and it is still here.
    pub(super) fn next(&mut self, head: &LogHead, durable: Lsn) -> Option<RingFrame> {
        if head.lsn > durable {
            return None;
        }
        let known = self.locate(head.frame)?;
        let Some((position, blocks)) = self.find(head, known, durable) else {
            self.known = None;
            return None;
        };
        let frame = self.copy(position, blocks);
        self.known = frame.is_some().then_some(Known {
            frame: head.frame + 1,
            position: position + blocks,
        });
        frame
    }

    /// Where to look for this frame. The ring's header names but one place, that of the frame which is
    /// the next to become durable; from there on each frame leads to the next. So a place ahead is
    /// kept until the reader, going through the log, has come to it.
    fn locate(&mut self, frame: u64) -> Option<Known> {
        if self.known.is_none_or(|known| known.frame < frame) {
            let mut word = [0; 8];
            self.ring.read(RING_NEXT_WORD as u64, &mut word).ok()?;
            let next = NextToPersist::from_word(u64::from_le_bytes(word));
            self.known = Some(Known {
                frame: next.frame_near(frame),
                position: next.position.into(),
            });
        }
        self.known.filter(|known| known.frame == frame)
    }

    /// Place and blocks of the frame that follows `head`.
    fn find(&mut self, head: &LogHead, known: Known, durable: Lsn) -> Option<(u64, u64)> {
        [known.position, 0].into_iter().find_map(|position| {
            let block = self.read(position, 1)?;
            let (header, _) = Descriptor::decode_header(&block).ok()?;
            let start = &header.start;
            let follows = start.log == self.log
                && start.incarnation == self.incarnation
                && start.number == head.frame
                && start.first_lsn == head.lsn
                && start.previous_crc == head.previous_crc;
            (follows && header.last_lsn() <= durable)
                .then_some((position, header.frame_blocks().into()))
        })
    }

    fn copy(&mut self, position: u64, blocks: u64) -> Option<RingFrame> {
        let bytes = self.read(position, blocks)?;
        let descriptor = Descriptor::decode_frame(&bytes).ok()?;
        Some(RingFrame {
            descriptor,
            payload: Bytes::from(bytes).slice(BLOCK_SIZE..),
        })
    }

    fn read(&mut self, position: u64, blocks: u64) -> Option<Vec<u8>> {
        if position + blocks > self.area_blocks {
            return None;
        }
        let mut bytes = vec![0; blocks as usize * BLOCK_SIZE];
        let offset = RING_AREA_OFFSET as u64 + position * BLOCK_SIZE as u64;
        self.ring.read(offset, &mut bytes).ok()?;
        Some(bytes)
    }
}
