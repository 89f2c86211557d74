//! Why a frame was refused.

/// Each check of a frame that can fail has its own variant. `entry` counts from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not the length that was announced.
    #[error("{have} bytes where {want} were expected")]
    Length {
        /// Bytes given.
        have: usize,
        /// Bytes expected.
        want: usize,
    },
    /// The first bytes are not those of a descriptor.
    #[error("no frame descriptor here (magic missing)")]
    Magic,
    /// Another version of the layout.
    #[error("frame layout version {0}, this program reads version {FRAME_VERSION}", FRAME_VERSION = super::FRAME_VERSION)]
    Version(u16),
    /// The header does not match its checksum.
    #[error("header checksum is {found:#010x}, computed {computed:#010x}")]
    HeaderCrc {
        /// In the header.
        found: u32,
        /// Over the header.
        computed: u32,
    },
    /// A reserved byte is not zero.
    #[error("reserved byte {0} of the descriptor is not zero")]
    Reserved(usize),
    /// The header says it has another length.
    #[error("header length {0}, expected 128")]
    HeaderLength(u16),
    /// No entries, or more than a descriptor holds.
    #[error("{0} entries in a frame")]
    EntryCount(u16),
    /// More payload blocks than a frame may have.
    #[error("{0} payload blocks in a frame")]
    PayloadBlocks(u32),
    /// The length of the frame is not one descriptor and its payload.
    #[error("{frame_blocks} blocks in a frame with {payload_blocks} payload blocks")]
    FrameBlocks {
        /// As stated.
        frame_blocks: u32,
        /// As stated.
        payload_blocks: u32,
    },
    /// LSN 0, or LSNs that overflow.
    #[error("first LSN {0} cannot be")]
    FirstLsn(u64),
    /// An entry does not match its checksum (which also covers log, incarnation, frame number).
    #[error("entry {entry}: checksum is {found:#010x}, computed {computed:#010x}")]
    EntryCrc {
        /// Which.
        entry: usize,
        /// In the entry.
        found: u32,
        /// Over the entry.
        computed: u32,
    },
    /// LSNs of a frame are consecutive.
    #[error("entry {entry}: LSN {found} where {expected} was due")]
    EntryLsn {
        /// Which.
        entry: usize,
        /// In the entry.
        found: u64,
        /// Its predecessor's + 1.
        expected: u64,
    },
    /// Unknown operation.
    #[error("entry {entry}: unknown operation {op}")]
    EntryOp {
        /// Which.
        entry: usize,
        /// Its number.
        op: u8,
    },
    /// Unknown flags.
    #[error("entry {entry}: unknown flags {flags:#04x}")]
    EntryFlags {
        /// Which.
        entry: usize,
        /// As found.
        flags: u8,
    },
    /// A disk number that no group has.
    #[error("entry {entry}: disk {disk}")]
    EntryDisk {
        /// Which.
        entry: usize,
        /// As found.
        disk: u16,
    },
    /// No blocks, too many, or past the end of the block numbers.
    #[error("entry {entry}: {count} blocks from block {first}")]
    EntryRange {
        /// Which.
        entry: usize,
        /// First block.
        first: u64,
        /// Number of blocks.
        count: u32,
    },
    /// A payload where there must be none, none where there must be one, or outside the frame.
    #[error("entry {entry}: payload at block {position} of the frame, {blocks} blocks")]
    EntryPayload {
        /// Which.
        entry: usize,
        /// Block offset in the frame.
        position: u32,
        /// Its length in blocks.
        blocks: u32,
    },
    /// Two payloads share a block.
    #[error("entry {entry}: payload overlaps that of an earlier entry")]
    PayloadOverlap {
        /// The later one.
        entry: usize,
    },
    /// A payload does not match its checksum.
    #[error("entry {entry}: payload checksum is {found:#010x}, computed {computed:#010x}")]
    PayloadCrc {
        /// Which.
        entry: usize,
        /// In the entry.
        found: u32,
        /// Over the payload.
        computed: u32,
    },
}
