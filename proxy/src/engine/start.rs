//! What an engine goes on from: a log that recovery has made whole.

use afterimage_format::ids::Lsn;
use afterimage_format::superblock::Superblock;

/// A frame that lies in the log, as the engine's books need it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameInLog {
    /// Block in the log's frame area.
    pub position: u64,
    /// Lap in which it was written.
    pub lap: u32,
    /// Its blocks, descriptor included.
    pub blocks: u32,
    /// Its number.
    pub number: u64,
    /// LSN of its first record.
    pub first_lsn: Lsn,
    /// LSN of its last record.
    pub last_lsn: Lsn,
    /// Header checksum of the frame before it.
    pub previous_crc: u32,
}

/// A group's log after recovery: every record of it is durable in the log and in the backings, the
/// ring is initialised and empty, the superblock with the present incarnation and `clean = false`
/// is durable.
#[derive(Clone, Debug)]
pub struct LogStart {
    /// The durable superblock.
    pub superblock: Superblock,
    /// Blocks of the ring's frame area.
    pub ring_blocks: u32,
    /// Number of the next frame.
    pub next_frame: u64,
    /// LSN of the next record.
    pub next_lsn: Lsn,
    /// Header checksum of the last frame; 0 if there was none.
    pub previous_crc: u32,
    /// Block in the log's frame area where the last frame ended.
    pub position: u64,
    /// Lap of a frame that begins there.
    pub lap: u32,
    /// The frames from the tail on.
    pub frames: Vec<FrameInLog>,
}
