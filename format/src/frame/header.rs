//! The header of a frame: 128 bytes, all numbers little-endian.

use super::{
    ENTRY_BYTES, FRAME_BLOCKS_MAX, FRAME_MAGIC, FRAME_PAYLOAD_BLOCKS_MAX, FRAME_VERSION,
    FrameError, HEADER_BYTES,
};
use crate::checksum::crc32c;
use crate::ids::{BLOCK_SIZE, BootId, LogId, Lsn};
use std::mem::{offset_of, size_of};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The layout.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub(super) struct RawHeader {
    pub(super) magic: [u8; 8],
    pub(super) version: U16,
    pub(super) header_bytes: U16,
    pub(super) incarnation: U32,
    pub(super) log: [u8; 16],
    pub(super) boot: [u8; 16],
    pub(super) number: U64,
    pub(super) first_lsn: U64,
    pub(super) wall_ns: U64,
    pub(super) boottime_ns: U64,
    pub(super) durable_lsn: U64,
    pub(super) entry_count: U16,
    pub(super) reserved_a: [u8; 2],
    pub(super) payload_blocks: U32,
    pub(super) frame_blocks: U32,
    pub(super) lap: U32,
    pub(super) reserved_b: [u8; 16],
    pub(super) previous_crc: U32,
    pub(super) crc: U32,
}

/// Offset in the descriptor of the word that holds the frame number. Stored last when a frame is
/// opened.
pub const FRAME_NUMBER_WORD: usize = 48;
/// Offset of the word that holds entry count and payload block count ([`counts_word`]).
pub const FRAME_COUNTS_WORD: usize = 88;
/// Offset of the word that holds the previous header's checksum (low half) and this header's (high
/// half). Stored last when a frame is closed ([`crc_word`]).
pub const FRAME_CRC_WORD: usize = 120;
/// Offset of the header's own checksum, which covers everything before it.
pub const FRAME_CRC_OFFSET: usize = 124;

const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES);
const _: () = assert!(offset_of!(RawHeader, version) == 8);
const _: () = assert!(offset_of!(RawHeader, incarnation) == 12);
const _: () = assert!(offset_of!(RawHeader, log) == 16);
const _: () = assert!(offset_of!(RawHeader, boot) == 32);
const _: () = assert!(offset_of!(RawHeader, number) == FRAME_NUMBER_WORD);
const _: () = assert!(offset_of!(RawHeader, first_lsn) == 56);
const _: () = assert!(offset_of!(RawHeader, wall_ns) == 64);
const _: () = assert!(offset_of!(RawHeader, boottime_ns) == 72);
const _: () = assert!(offset_of!(RawHeader, durable_lsn) == 80);
const _: () = assert!(offset_of!(RawHeader, entry_count) == FRAME_COUNTS_WORD);
const _: () = assert!(offset_of!(RawHeader, payload_blocks) == FRAME_COUNTS_WORD + 4);
const _: () = assert!(offset_of!(RawHeader, frame_blocks) == 96);
const _: () = assert!(offset_of!(RawHeader, lap) == 100);
const _: () = assert!(offset_of!(RawHeader, reserved_b) == 104);
const _: () = assert!(offset_of!(RawHeader, previous_crc) == FRAME_CRC_WORD);
const _: () = assert!(offset_of!(RawHeader, crc) == FRAME_CRC_OFFSET);
const _: () = assert!(FRAME_NUMBER_WORD.is_multiple_of(8) && FRAME_COUNTS_WORD.is_multiple_of(8));
const _: () = assert!(FRAME_CRC_WORD.is_multiple_of(8) && FRAME_CRC_OFFSET + 4 == HEADER_BYTES);

/// The counts as the one word that publishes an entry in an open frame.
#[must_use]
pub const fn counts_word(entry_count: u16, payload_blocks: u32) -> u64 {
    (payload_blocks as u64) << 32 | entry_count as u64
}

/// The word that closes a frame.
#[must_use]
pub const fn crc_word(previous_crc: u32, crc: u32) -> u64 {
    (crc as u64) << 32 | previous_crc as u64
}

/// Offset in the descriptor of the entry with this index.
#[must_use]
pub const fn entry_offset(index: usize) -> usize {
    HEADER_BYTES + index * ENTRY_BYTES
}

/// What is known of a frame when it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameStart {
    /// The log it belongs to.
    pub log: LogId,
    /// Which start of the log wrote it.
    pub incarnation: u32,
    /// +1 for each frame of a log; the first is 1.
    pub number: u64,
    /// LSN of its first record.
    pub first_lsn: Lsn,
    /// Wall clock when it was opened, nanoseconds since 1970, raw.
    pub wall_ns: u64,
    /// CLOCK_BOOTTIME at the same instant.
    pub boottime_ns: u64,
    /// The boot that this clock belongs to.
    pub boot: BootId,
    /// Header checksum of the frame before it; 0 for the first of a log.
    pub previous_crc: u32,
}

impl FrameStart {
    /// The descriptor block of the frame when it has no entries yet: counts, length, durable LSN,
    /// lap and checksum are zero.
    #[must_use]
    pub fn open_descriptor(&self) -> [u8; BLOCK_SIZE] {
        let mut block = [0; BLOCK_SIZE];
        let header = FrameHeader {
            start: *self,
            entry_count: 0,
            payload_blocks: 0,
            durable_lsn: Lsn::ZERO,
            lap: 0,
        };
        let mut raw = header.raw();
        raw.frame_blocks = U32::ZERO;
        block[..HEADER_BYTES].copy_from_slice(raw.as_bytes());
        block
    }

    /// What the checksum of each entry of this frame begins with, so that an entry of another log,
    /// incarnation or frame is never taken for one of this.
    #[must_use]
    pub fn entry_seed(&self) -> u32 {
        let mut bytes = [0; 28];
        bytes[..16].copy_from_slice(&self.log.to_bytes());
        bytes[16..24].copy_from_slice(&self.number.to_le_bytes());
        bytes[24..].copy_from_slice(&self.incarnation.to_le_bytes());
        crc32c(&bytes)
    }
}

/// The header of a closed frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// As opened.
    pub start: FrameStart,
    /// Records in the frame.
    pub entry_count: u16,
    /// Blocks behind the descriptor, unused ones included.
    pub payload_blocks: u32,
    /// The log was durable up to here when the frame was closed.
    pub durable_lsn: Lsn,
    /// How often the log's area had been wrapped around before this frame.
    pub lap: u32,
}

impl FrameHeader {
    /// Blocks of the whole frame.
    #[must_use]
    pub const fn frame_blocks(&self) -> u32 {
        1 + self.payload_blocks
    }

    /// LSN of the last record.
    #[must_use]
    pub const fn last_lsn(&self) -> Lsn {
        Lsn(self.start.first_lsn.0 + self.entry_count as u64 - 1)
    }

    fn raw(&self) -> RawHeader {
        RawHeader {
            magic: FRAME_MAGIC,
            version: FRAME_VERSION.into(),
            header_bytes: (HEADER_BYTES as u16).into(),
            incarnation: self.start.incarnation.into(),
            log: self.start.log.to_bytes(),
            boot: self.start.boot.to_bytes(),
            number: self.start.number.into(),
            first_lsn: self.start.first_lsn.0.into(),
            wall_ns: self.start.wall_ns.into(),
            boottime_ns: self.start.boottime_ns.into(),
            durable_lsn: self.durable_lsn.0.into(),
            entry_count: self.entry_count.into(),
            reserved_a: [0; 2],
            payload_blocks: self.payload_blocks.into(),
            frame_blocks: self.frame_blocks().into(),
            lap: self.lap.into(),
            reserved_b: [0; 16],
            previous_crc: self.start.previous_crc.into(),
            crc: U32::ZERO,
        }
    }

    /// The header's bytes and the checksum among them.
    #[must_use]
    pub fn encode(&self) -> ([u8; HEADER_BYTES], u32) {
        let mut bytes = [0; HEADER_BYTES];
        bytes.copy_from_slice(self.raw().as_bytes());
        let crc = crc32c(&bytes[..FRAME_CRC_OFFSET]);
        bytes[FRAME_CRC_OFFSET..].copy_from_slice(&crc.to_le_bytes());
        (bytes, crc)
    }
}

impl RawHeader {
    /// The first bytes of a descriptor block.
    pub(super) fn of(block: &[u8]) -> Result<&Self, FrameError> {
        if block.len() != BLOCK_SIZE {
            return Err(FrameError::Length {
                have: block.len(),
                want: BLOCK_SIZE,
            });
        }
        let (raw, _) = Self::ref_from_prefix(block).map_err(|_| FrameError::Length {
            have: block.len(),
            want: BLOCK_SIZE,
        })?;
        Ok(raw)
    }

    /// What needs no checksum: magic, version, lengths, reserved bytes. The order matters: a newer
    /// version is told from a broken header.
    pub(super) fn check_kind(&self) -> Result<(), FrameError> {
        if self.magic != FRAME_MAGIC {
            return Err(FrameError::Magic);
        }
        if self.version.get() != FRAME_VERSION {
            return Err(FrameError::Version(self.version.get()));
        }
        Ok(())
    }

    /// The checksum as computed over the header.
    pub(super) fn computed_crc(&self) -> u32 {
        crc32c(&self.as_bytes()[..FRAME_CRC_OFFSET])
    }

    /// Lengths, reserved bytes and counts; `entries_min` is 0 for an open frame.
    pub(super) fn check_fields(&self, entries_min: u16) -> Result<(), FrameError> {
        if self.header_bytes.get() as usize != HEADER_BYTES {
            return Err(FrameError::HeaderLength(self.header_bytes.get()));
        }
        let reserved = [
            (offset_of!(RawHeader, reserved_a), &self.reserved_a[..]),
            (offset_of!(RawHeader, reserved_b), &self.reserved_b[..]),
        ];
        for (offset, bytes) in reserved {
            if let Some(at) = bytes.iter().position(|b| *b != 0) {
                return Err(FrameError::Reserved(offset + at));
            }
        }
        let entries = self.entry_count.get();
        if entries < entries_min || entries as usize > super::ENTRIES_MAX {
            return Err(FrameError::EntryCount(entries));
        }
        if self.payload_blocks.get() > FRAME_PAYLOAD_BLOCKS_MAX {
            return Err(FrameError::PayloadBlocks(self.payload_blocks.get()));
        }
        let first = self.first_lsn.get();
        if first == 0 || first.checked_add(super::ENTRIES_MAX as u64).is_none() {
            return Err(FrameError::FirstLsn(first));
        }
        Ok(())
    }

    /// The length of a closed frame.
    pub(super) fn check_frame_blocks(&self) -> Result<(), FrameError> {
        let frame_blocks = self.frame_blocks.get();
        let payload_blocks = self.payload_blocks.get();
        if frame_blocks > FRAME_BLOCKS_MAX || frame_blocks != payload_blocks + 1 {
            return Err(FrameError::FrameBlocks {
                frame_blocks,
                payload_blocks,
            });
        }
        Ok(())
    }

    /// The values. Meaningful after the checks.
    pub(super) fn value(&self) -> FrameHeader {
        FrameHeader {
            start: FrameStart {
                log: LogId::from_bytes(self.log),
                incarnation: self.incarnation.get(),
                number: self.number.get(),
                first_lsn: Lsn(self.first_lsn.get()),
                wall_ns: self.wall_ns.get(),
                boottime_ns: self.boottime_ns.get(),
                boot: BootId::from_bytes(self.boot),
                previous_crc: self.previous_crc.get(),
            },
            entry_count: self.entry_count.get(),
            payload_blocks: self.payload_blocks.get(),
            durable_lsn: Lsn(self.durable_lsn.get()),
            lap: self.lap.get(),
        }
    }
}
