//! The entry of one record in a frame: 48 bytes, all numbers little-endian.

use super::{ENTRY_BYTES, FrameError, RECORD_BLOCKS_MAX};
use crate::chain::RecordMeta;
use crate::checksum::crc32c;
use crate::ids::{DISKS_MAX, DiskIndex, Lsn};
use crate::op::Op;
use std::mem::{offset_of, size_of};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The layout.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawEntry {
    lsn: U64,
    first_block: U64,
    wall_ns: U64,
    block_count: U32,
    payload_position: U32,
    payload_crc: U32,
    disk: U16,
    op: u8,
    flags: u8,
    aux: U32,
    crc: U32,
}

/// Bytes of an entry that its checksum covers, behind the frame's seed.
const CRC_OFFSET: usize = 44;

const _: () = assert!(size_of::<RawEntry>() == ENTRY_BYTES);
const _: () = assert!(offset_of!(RawEntry, first_block) == 8);
const _: () = assert!(offset_of!(RawEntry, wall_ns) == 16);
const _: () = assert!(offset_of!(RawEntry, block_count) == 24);
const _: () = assert!(offset_of!(RawEntry, payload_position) == 28);
const _: () = assert!(offset_of!(RawEntry, payload_crc) == 32);
const _: () = assert!(offset_of!(RawEntry, disk) == 36);
const _: () = assert!(offset_of!(RawEntry, op) == 38);
const _: () = assert!(offset_of!(RawEntry, flags) == 39);
const _: () = assert!(offset_of!(RawEntry, aux) == 40);
const _: () = assert!(offset_of!(RawEntry, crc) == CRC_OFFSET);

/// One record of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its LSN.
    pub lsn: Lsn,
    /// What it does.
    pub op: Op,
    /// The disk it is about; 0 for records about the whole group.
    pub disk: DiskIndex,
    /// First block, for records about a range; otherwise 0.
    pub first_block: u64,
    /// Blocks of the range; otherwise 0.
    pub block_count: u32,
    /// Block offset of its payload in the frame (at least 1); 0 without payload.
    pub payload_position: u32,
    /// CRC32C of the payload; 0 without payload.
    pub payload_crc: u32,
    /// Wall clock, nanoseconds since 1970, raw.
    pub wall_ns: u64,
    /// Small data of the operation; 0 where it has none.
    pub aux: u32,
}

impl Entry {
    /// Blocks of payload behind the descriptor that belong to this record.
    #[must_use]
    pub const fn payload_blocks(&self) -> u32 {
        match self.op {
            Op::Write => self.block_count,
            Op::Zero | Op::Trim => 0,
            _ if self.payload_position == 0 => 0,
            _ => 1,
        }
    }

    /// One past the last block of the range.
    #[must_use]
    pub const fn end_block(&self) -> u64 {
        self.first_block + self.block_count as u64
    }

    /// The record without its place in the frame, as segments and the record chain know it.
    #[must_use]
    pub const fn meta(&self) -> RecordMeta {
        RecordMeta {
            lsn: self.lsn,
            disk: self.disk,
            op: self.op,
            flags: 0,
            first_block: self.first_block,
            block_count: self.block_count,
            wall_ns: self.wall_ns,
            aux: self.aux,
            payload_crc: self.payload_crc,
        }
    }

    fn raw(&self, crc: u32) -> RawEntry {
        RawEntry {
            lsn: self.lsn.0.into(),
            first_block: self.first_block.into(),
            wall_ns: self.wall_ns.into(),
            block_count: self.block_count.into(),
            payload_position: self.payload_position.into(),
            payload_crc: self.payload_crc.into(),
            disk: self.disk.0.into(),
            op: self.op.number(),
            flags: 0,
            aux: self.aux.into(),
            crc: crc.into(),
        }
    }

    /// The entry's bytes in a frame with this seed ([`super::FrameStart::entry_seed`]).
    #[must_use]
    pub fn encode(&self, seed: u32) -> [u8; ENTRY_BYTES] {
        let mut raw = self.raw(0);
        raw.crc = raw.computed_crc(seed).into();
        let mut out = [0; ENTRY_BYTES];
        out.copy_from_slice(raw.as_bytes());
        out
    }

    /// Reads and checks one entry. `index` is its place in the frame, for errors and its LSN;
    /// `payload_blocks` the frame's.
    ///
    /// # Errors
    /// The first check that fails; the checksum comes first.
    pub fn decode(
        bytes: &[u8; ENTRY_BYTES],
        seed: u32,
        index: usize,
        first_lsn: Lsn,
        payload_blocks: u32,
    ) -> Result<Self, FrameError> {
        let raw: RawEntry = zerocopy::transmute!(*bytes);
        let (found, computed) = (raw.crc.get(), raw.computed_crc(seed));
        if found != computed {
            return Err(FrameError::EntryCrc {
                entry: index,
                found,
                computed,
            });
        }
        let expected = first_lsn.0 + index as u64;
        if raw.lsn.get() != expected {
            return Err(FrameError::EntryLsn {
                entry: index,
                found: raw.lsn.get(),
                expected,
            });
        }
        let op = Op::from_number(raw.op).ok_or(FrameError::EntryOp {
            entry: index,
            op: raw.op,
        })?;
        if raw.flags != 0 {
            return Err(FrameError::EntryFlags {
                entry: index,
                flags: raw.flags,
            });
        }
        if raw.disk.get() as usize >= DISKS_MAX {
            return Err(FrameError::EntryDisk {
                entry: index,
                disk: raw.disk.get(),
            });
        }
        let entry = Self {
            lsn: Lsn(raw.lsn.get()),
            op,
            disk: DiskIndex(raw.disk.get()),
            first_block: raw.first_block.get(),
            block_count: raw.block_count.get(),
            payload_position: raw.payload_position.get(),
            payload_crc: raw.payload_crc.get(),
            wall_ns: raw.wall_ns.get(),
            aux: raw.aux.get(),
        };
        entry.check_range(index)?;
        entry.check_payload(index, payload_blocks)?;
        Ok(entry)
    }

    fn check_range(&self, index: usize) -> Result<(), FrameError> {
        let in_bounds = self
            .first_block
            .checked_add(u64::from(self.block_count))
            .is_some_and(|end| end <= BLOCKS_END);
        let count_fits = match self.op {
            Op::Write => (1..=RECORD_BLOCKS_MAX).contains(&self.block_count),
            Op::Zero | Op::Trim => self.block_count > 0,
            _ => true,
        };
        if in_bounds && count_fits {
            return Ok(());
        }
        Err(FrameError::EntryRange {
            entry: index,
            first: self.first_block,
            count: self.block_count,
        })
    }

    fn check_payload(&self, index: usize, payload_blocks: u32) -> Result<(), FrameError> {
        let blocks = self.payload_blocks();
        let position = self.payload_position;
        // Blocks 1..=payload_blocks of the frame are payload.
        let fits = if blocks == 0 {
            position == 0 && self.payload_crc == 0
        } else {
            position > 0
                && position
                    .checked_add(blocks)
                    .is_some_and(|end| end <= payload_blocks + 1)
        };
        if fits {
            return Ok(());
        }
        Err(FrameError::EntryPayload {
            entry: index,
            position,
            blocks,
        })
    }
}

/// No disk has a block with this number or a higher one: byte offsets stay below 2^63.
pub const BLOCKS_END: u64 = 1 << (63 - crate::ids::BLOCK_SHIFT);

impl RawEntry {
    /// CRC32C of the seed and the entry up to its checksum.
    fn computed_crc(&self, seed: u32) -> u32 {
        let mut bytes = [0; 4 + CRC_OFFSET];
        bytes[..4].copy_from_slice(&seed.to_le_bytes());
        bytes[4..].copy_from_slice(&self.as_bytes()[..CRC_OFFSET]);
        crc32c(&bytes)
    }
}
