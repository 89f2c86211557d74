//! The header of a ring: block 0 of ring memory.
//!
//! The first 128 bytes are written once, when the ring is initialised, and have a checksum. Behind
//! them stand words that change while the ring is in use, each one aligned 64-bit store; they
//! survive the process, not the host. `docs/format.md`, section "Ring header", is the reference.

#[cfg(test)]
mod tests;

use crate::checksum::crc32c;
use crate::frame::AREA_BLOCKS_MIN;
use crate::ids::{BLOCK_SIZE, BootId, GroupId, LogId};
use std::mem::{offset_of, size_of};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First bytes of a ring header, and the word that is stored last when a ring is initialised.
pub const RING_MAGIC: [u8; 8] = *b"AFIRINGH";
/// Version of the layout that this code writes, and the only one it reads.
pub const RING_VERSION: u16 = 1;
/// Bytes of the part that does not change.
pub const RING_HEADER_BYTES: usize = 128;
/// Where frames begin in ring memory.
pub const RING_AREA_OFFSET: usize = BLOCK_SIZE;
/// Offset of the word that holds the magic.
pub const RING_MAGIC_WORD: usize = 0;
/// Offset of the word that holds the durable LSN: the log is durable up to there.
pub const RING_DURABLE_WORD: usize = 128;
/// Offset of the word that holds the error latch ([`LogLatch`]); 0 while the log is well.
pub const RING_LATCH_WORD: usize = 192;
/// Offset of the word that says which frame is the next to become durable in the log
/// ([`NextToPersist`]). Frames from it on are still in the ring, whole.
pub const RING_NEXT_WORD: usize = 256;
/// Offset of the word that holds the LSN of the newest record: stored after the record was published
/// and before anybody is told of it. A ring without that record is damaged.
pub const RING_APPENDED_WORD: usize = 320;
/// Bytes behind the last word that carry no meaning yet.
pub const RING_WORDS_END: usize = 328;

const _: () = assert!(RING_DURABLE_WORD >= RING_HEADER_BYTES);
const _: () = assert!(RING_DURABLE_WORD.is_multiple_of(64) && RING_LATCH_WORD.is_multiple_of(64));
const _: () = assert!(RING_NEXT_WORD.is_multiple_of(64) && RING_APPENDED_WORD.is_multiple_of(64));
const _: () = assert!(RING_WORDS_END <= BLOCK_SIZE);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    version: U16,
    header_bytes: U16,
    incarnation: U32,
    group: [u8; 16],
    log: [u8; 16],
    boot: [u8; 16],
    area_blocks: U64,
    reserved: [u8; 52],
    crc: U32,
}

const CRC_OFFSET: usize = 124;
const _: () = assert!(size_of::<Raw>() == RING_HEADER_BYTES);
const _: () = assert!(offset_of!(Raw, version) == 8);
const _: () = assert!(offset_of!(Raw, incarnation) == 12);
const _: () = assert!(offset_of!(Raw, group) == 16);
const _: () = assert!(offset_of!(Raw, log) == 32);
const _: () = assert!(offset_of!(Raw, boot) == 48);
const _: () = assert!(offset_of!(Raw, area_blocks) == 64);
const _: () = assert!(offset_of!(Raw, reserved) == 72);
const _: () = assert!(offset_of!(Raw, crc) == CRC_OFFSET);

/// The part of a ring header that does not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingHeader {
    /// The group whose writes it holds.
    pub group: GroupId,
    /// The log in front of which it stands.
    pub log: LogId,
    /// The boot in which it was initialised.
    pub boot: BootId,
    /// Start of the log that initialised it.
    pub incarnation: u32,
    /// Blocks of the frame area behind the header block.
    pub area_blocks: u64,
}

/// Why a ring header was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingHeaderError {
    /// Not as long as the header.
    #[error("{0} bytes instead of {RING_HEADER_BYTES}")]
    Length(usize),
    /// The first bytes are not those of a ring: it was never initialised.
    #[error("no ring header here (magic missing)")]
    Magic,
    /// Written by another version of the program.
    #[error("ring layout version {0}, this program reads version {RING_VERSION}")]
    Version(u16),
    /// The header does not match its checksum.
    #[error("checksum is {found:#010x}, computed {computed:#010x}")]
    Crc {
        /// In the header.
        found: u32,
        /// Over the header.
        computed: u32,
    },
    /// The header says it has another length.
    #[error("header length {0}, expected {RING_HEADER_BYTES}")]
    HeaderLength(u16),
    /// A reserved byte is not zero.
    #[error("reserved byte {0} is not zero")]
    Reserved(usize),
    /// The area is too small to hold frames.
    #[error("an area of {0} blocks cannot be")]
    Area(u64),
}

impl RingHeader {
    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; RING_HEADER_BYTES] {
        let raw = Raw {
            magic: RING_MAGIC,
            version: RING_VERSION.into(),
            header_bytes: (RING_HEADER_BYTES as u16).into(),
            incarnation: self.incarnation.into(),
            group: self.group.to_bytes(),
            log: self.log.to_bytes(),
            boot: self.boot.to_bytes(),
            area_blocks: self.area_blocks.into(),
            reserved: [0; 52],
            crc: U32::ZERO,
        };
        let mut bytes = [0; RING_HEADER_BYTES];
        bytes.copy_from_slice(raw.as_bytes());
        let crc = crc32c(&bytes[..CRC_OFFSET]);
        bytes[CRC_OFFSET..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads the first [`RING_HEADER_BYTES`] of ring memory.
    ///
    /// # Errors
    /// The first check that fails; magic, version and checksum come first, in this order.
    pub fn decode(bytes: &[u8]) -> Result<Self, RingHeaderError> {
        let raw = Raw::ref_from_bytes(bytes).map_err(|_| RingHeaderError::Length(bytes.len()))?;
        if raw.magic != RING_MAGIC {
            return Err(RingHeaderError::Magic);
        }
        if raw.version.get() != RING_VERSION {
            return Err(RingHeaderError::Version(raw.version.get()));
        }
        let (found, computed) = (raw.crc.get(), crc32c(&bytes[..CRC_OFFSET]));
        if found != computed {
            return Err(RingHeaderError::Crc { found, computed });
        }
        if raw.header_bytes.get() as usize != RING_HEADER_BYTES {
            return Err(RingHeaderError::HeaderLength(raw.header_bytes.get()));
        }
        if let Some(at) = raw.reserved.iter().position(|b| *b != 0) {
            return Err(RingHeaderError::Reserved(offset_of!(Raw, reserved) + at));
        }
        // Positions are stored in 32 bits.
        if !(AREA_BLOCKS_MIN..=u64::from(u32::MAX)).contains(&raw.area_blocks.get()) {
            return Err(RingHeaderError::Area(raw.area_blocks.get()));
        }
        Ok(Self {
            group: GroupId::from_bytes(raw.group),
            log: LogId::from_bytes(raw.log),
            boot: BootId::from_bytes(raw.boot),
            incarnation: raw.incarnation.get(),
            area_blocks: raw.area_blocks.get(),
        })
    }
}

/// Which frame is the next to become durable in the log, and where in the ring it stands or will
/// stand (there, or at the start of the area if it does not fit). One word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextToPersist {
    /// Block within the ring's area.
    pub position: u32,
    /// Low 32 bits of its number.
    pub frame_low: u32,
}

impl NextToPersist {
    /// For the frame with this number at this block of the area.
    #[must_use]
    pub const fn new(position: u32, frame: u64) -> Self {
        Self {
            position,
            frame_low: frame as u32,
        }
    }

    /// As stored.
    #[must_use]
    pub const fn word(self) -> u64 {
        (self.position as u64) << 32 | self.frame_low as u64
    }

    /// From a stored word.
    #[must_use]
    pub const fn from_word(word: u64) -> Self {
        Self {
            position: (word >> 32) as u32,
            frame_low: word as u32,
        }
    }

    /// The frame number that this means, being at most 2^31 away from one that is known.
    #[must_use]
    pub const fn frame_near(self, known: u64) -> u64 {
        let distance = self.frame_low.wrapping_sub(known as u32).cast_signed();
        known.wrapping_add_signed(distance as i64)
    }
}

/// The first error of the log, kept in the ring so that a restarted process does not forget it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogLatch {
    /// What the system said.
    pub errno: u32,
    /// What failed.
    pub operation: LatchedOperation,
}

/// Which operation on the log failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LatchedOperation {
    /// Writing frames or a superblock.
    Write,
    /// Making them durable.
    Sync,
    /// The word was set by something this program does not know.
    Unknown,
}

impl std::fmt::Display for LogLatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let operation = match self.operation {
            LatchedOperation::Write => "a write",
            LatchedOperation::Sync => "a sync",
            LatchedOperation::Unknown => "an operation",
        };
        write!(f, "{operation} failed with error {}", self.errno)
    }
}

impl LogLatch {
    const SET: u64 = 1 << 63;

    /// As stored; never 0.
    #[must_use]
    pub const fn word(self) -> u64 {
        let operation: u64 = match self.operation {
            LatchedOperation::Write => 1,
            LatchedOperation::Sync => 2,
            LatchedOperation::Unknown => 3,
        };
        Self::SET | operation << 32 | self.errno as u64
    }

    /// From a stored word: any word but 0 is a latch.
    #[must_use]
    pub const fn from_word(word: u64) -> Option<Self> {
        if word == 0 {
            return None;
        }
        let operation = match word >> 32 ^ Self::SET >> 32 {
            1 => LatchedOperation::Write,
            2 => LatchedOperation::Sync,
            _ => LatchedOperation::Unknown,
        };
        Some(Self {
            errno: word as u32,
            operation,
        })
    }
}
