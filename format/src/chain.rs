//! The record chain: one hash that stands for a group's whole history of records up to an LSN.
//!
//! Two sites compare 32 bytes to learn whether they hold the same records in the same order. The
//! chain starts at [`RecordChain::BASE`] and starts there again at a base, a `PassBegin` that
//! declares a gap. See `docs/format.md`, "Record chain".

use crate::ids::{BLOCK_SIZE, DiskIndex, Lsn};
use crate::op::Op;
use std::fmt;

/// Most blocks that a record carries as payload.
pub const RECORD_PAYLOAD_BLOCKS_MAX: usize = 256;

/// Everything about a record but its payload. The same in frames, segments and the chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RecordMeta {
    /// Its place in the group's order. In a pass segment: the LSN the blocks were read at.
    pub lsn: Lsn,
    /// Which disk; 0 for records that concern the group.
    pub disk: DiskIndex,
    /// What it does.
    pub op: Op,
    /// Flags of the operation.
    pub flags: u8,
    /// First block it concerns.
    pub first_block: u64,
    /// How many blocks it concerns.
    pub block_count: u32,
    /// Raw wall clock when it was accepted, nanoseconds since 1970.
    pub wall_ns: u64,
    /// Small data of the operation.
    pub aux: u32,
    /// CRC32C of the payload; 0 without one.
    pub payload_crc: u32,
}

impl RecordMeta {
    /// Whether a payload of `blocks` blocks suits the operation: a write carries its blocks,
    /// zero and trim carry none, all others at most one block with their body.
    #[must_use]
    pub fn payload_fits(&self, blocks: usize) -> bool {
        match self.op {
            Op::Write => blocks == self.block_count as usize && blocks > 0,
            Op::Zero | Op::Trim => blocks == 0 && self.block_count > 0,
            _ => blocks <= 1,
        }
    }

    /// Whether the run of blocks ends within what a disk can have (2^52 blocks of 4 KiB fill a
    /// 64-bit byte address).
    #[must_use]
    pub fn range_is_valid(&self) -> bool {
        const BLOCKS_MAX: u64 = u64::MAX / BLOCK_SIZE as u64;
        self.first_block
            .checked_add(u64::from(self.block_count))
            .is_some_and(|end| end <= BLOCKS_MAX)
    }
}

/// Bytes of a record's digest input, the canonical form that enters the chain.
pub const DIGEST_INPUT_BYTES: usize = 44;

/// Value of the record chain after some record.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct RecordChain(pub [u8; 32]);

impl RecordChain {
    /// Before the first record of a base.
    pub const BASE: Self = Self([0; 32]);

    /// The chain after one more record: BLAKE3 of this value and the record's digest input.
    #[must_use]
    pub fn extend(self, record: &RecordMeta) -> Self {
        let mut input = [0u8; 32 + DIGEST_INPUT_BYTES];
        let (before, digest) = input.split_at_mut(32);
        before.copy_from_slice(&self.0);
        digest.copy_from_slice(&digest_input(record));
        Self(*blake3::hash(&input).as_bytes())
    }
}

impl fmt::Display for RecordChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for RecordChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RecordChain({self})")
    }
}

/// The canonical 44 bytes of a record, little-endian: LSN 8, first block 8, wall clock 8, block
/// count 4, zero 4, payload CRC32C 4, disk 2, operation 1, flags 1, aux 4. They are the first 44
/// bytes of its entry in a frame, the payload's place in the frame left out.
#[must_use]
pub fn digest_input(record: &RecordMeta) -> [u8; DIGEST_INPUT_BYTES] {
    let mut out = [0u8; DIGEST_INPUT_BYTES];
    out[0..8].copy_from_slice(&record.lsn.0.to_le_bytes());
    out[8..16].copy_from_slice(&record.first_block.to_le_bytes());
    out[16..24].copy_from_slice(&record.wall_ns.to_le_bytes());
    out[24..28].copy_from_slice(&record.block_count.to_le_bytes());
    out[32..36].copy_from_slice(&record.payload_crc.to_le_bytes());
    out[36..38].copy_from_slice(&record.disk.0.to_le_bytes());
    out[38] = record.op.number();
    out[39] = record.flags;
    out[40..44].copy_from_slice(&record.aux.to_le_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> RecordMeta {
        RecordMeta {
            lsn: Lsn(0x0102_0304_0506_0708),
            disk: DiskIndex(0x1112),
            op: Op::Trim,
            flags: 0x21,
            first_block: 0x3132_3334_3536_3738,
            block_count: 0x4142_4344,
            wall_ns: 0x5152_5354_5556_5758,
            aux: 0x6162_6364,
            payload_crc: 0x7172_7374,
        }
    }

    #[test]
    fn digest_input_is_fixed() {
        let expected: [u8; 44] = [
            0x08, 0x07, 0x06, 0x05, 0x04, 0x03, 0x02, 0x01, // LSN
            0x38, 0x37, 0x36, 0x35, 0x34, 0x33, 0x32, 0x31, // first block
            0x58, 0x57, 0x56, 0x55, 0x54, 0x53, 0x52, 0x51, // wall clock
            0x44, 0x43, 0x42, 0x41, // block count
            0x00, 0x00, 0x00, 0x00, // zero
            0x74, 0x73, 0x72, 0x71, // payload CRC
            0x12, 0x11, // disk
            0x03, // operation: trim
            0x21, // flags
            0x64, 0x63, 0x62, 0x61, // aux
        ];
        assert_eq!(digest_input(&record()), expected);
    }

    #[test]
    fn every_field_enters_the_chain() {
        let base = RecordChain::BASE.extend(&record());
        let variants = [
            RecordMeta {
                lsn: Lsn(1),
                ..record()
            },
            RecordMeta {
                disk: DiskIndex(1),
                ..record()
            },
            RecordMeta {
                op: Op::Zero,
                ..record()
            },
            RecordMeta {
                flags: 0,
                ..record()
            },
            RecordMeta {
                first_block: 0,
                ..record()
            },
            RecordMeta {
                block_count: 0,
                ..record()
            },
            RecordMeta {
                wall_ns: 0,
                ..record()
            },
            RecordMeta { aux: 0, ..record() },
            RecordMeta {
                payload_crc: 0,
                ..record()
            },
        ];
        for variant in variants {
            assert_ne!(RecordChain::BASE.extend(&variant), base, "{variant:?}");
        }
        assert_ne!(base.extend(&record()), base);
    }

    #[test]
    fn payload_must_suit_the_operation() {
        let write = RecordMeta {
            op: Op::Write,
            block_count: 2,
            ..record()
        };
        assert!(write.payload_fits(2) && !write.payload_fits(1) && !write.payload_fits(0));
        let trim = RecordMeta {
            block_count: 2,
            ..record()
        };
        assert!(trim.payload_fits(0) && !trim.payload_fits(1));
        let checkpoint = RecordMeta {
            op: Op::Checkpoint,
            block_count: 0,
            ..record()
        };
        assert!(checkpoint.payload_fits(1) && !checkpoint.payload_fits(2));
    }
}
