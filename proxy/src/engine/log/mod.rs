//! The log of a group: the on-disk ring file in front of the backings.
//!
//! Two superblocks, then the frame area. Frames follow each other; one that does not fit before the
//! end of the area stands at its start. [`create`] makes a log, [`scan`] finds where its valid
//! frames end, [`reader`] reads them, [`directory`] says where an LSN stands.
//!
//! Always holds: only a log that recovery went through accepts frames
//! ([`super::recovery::RecoveredLog`]); a superblock is durable before what it permits is done
//! (overwriting space behind the old tail, answering in a new incarnation).

pub mod create;
pub mod directory;
pub mod error;
pub mod inspect;
pub mod reader;
pub mod scan;
pub mod superblock;

use afterimage_format::frame::FrameHeader;
use afterimage_format::ids::{BLOCK_SIZE, Lsn};
use afterimage_format::superblock::{SUPERBLOCK_COPIES, Tail};

/// Byte offset of the frame area in the log file.
pub const LOG_AREA_OFFSET: u64 = SUPERBLOCK_COPIES * BLOCK_SIZE as u64;

/// Byte offset in the log file of a block of the area.
#[must_use]
pub const fn area_offset(block: u64) -> u64 {
    LOG_AREA_OFFSET + block * BLOCK_SIZE as u64
}

/// Where the next frame goes and what it must say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogHead {
    /// Block of the area where the last frame ended.
    pub position: u64,
    /// How often the area was wrapped around so far.
    pub lap: u32,
    /// Number of the next frame.
    pub frame: u64,
    /// First LSN of the next frame.
    pub lsn: Lsn,
    /// Header checksum of the last frame.
    pub previous_crc: u32,
}

/// Where one frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// First block within the area.
    pub position: u64,
    /// What the frame's header says.
    pub lap: u32,
    /// Blocks of the area that the frame takes, those it skips at the end included.
    pub blocks_taken: u64,
}

impl LogHead {
    /// The head of a log that is empty from this tail on.
    #[must_use]
    pub const fn at_tail(tail: &Tail) -> Self {
        Self {
            position: tail.position,
            lap: tail.lap,
            frame: tail.frame,
            lsn: tail.lsn,
            previous_crc: tail.previous_crc,
        }
    }

    /// The tail that begins with the next frame: everything before it has left the log.
    #[must_use]
    pub const fn as_tail(&self) -> Tail {
        Tail {
            position: self.position,
            frame: self.frame,
            lsn: self.lsn,
            lap: self.lap,
            previous_crc: self.previous_crc,
        }
    }

    /// Where a frame of this many blocks goes: right here if it fits before the end of the area,
    /// else at its start. The same rule for whoever writes frames and whoever looks for them.
    #[must_use]
    pub const fn place(&self, area_blocks: u64, frame_blocks: u32) -> Placement {
        let blocks = frame_blocks as u64;
        let room = area_blocks - self.position;
        if blocks <= room {
            Placement {
                position: self.position,
                lap: self.lap,
                blocks_taken: blocks,
            }
        } else {
            Placement {
                position: 0,
                lap: self.lap.wrapping_add(1),
                blocks_taken: room + blocks,
            }
        }
    }

    /// The head after this frame, which stands where [`LogHead::place`] said. A frame that ends
    /// with the area leaves the head at its start, one lap on.
    #[must_use]
    pub const fn after(
        &self,
        area_blocks: u64,
        placement: Placement,
        header: &FrameHeader,
        header_crc: u32,
    ) -> Self {
        let end = placement.position + header.frame_blocks() as u64;
        let (position, lap) = if end == area_blocks {
            (0, placement.lap.wrapping_add(1))
        } else {
            (end, placement.lap)
        };
        Self {
            position,
            lap,
            frame: self.frame + 1,
            lsn: header.last_lsn().next(),
            previous_crc: header_crc,
        }
    }

    /// Blocks from a tail to this head, skipped ones included: what of the area is in use.
    #[must_use]
    pub const fn blocks_since(&self, tail: &Tail, area_blocks: u64) -> u64 {
        // More than one lap never lies between them.
        if self.lap == tail.lap {
            self.position - tail.position
        } else {
            area_blocks - tail.position + self.position
        }
    }
}
