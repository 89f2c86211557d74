//! Fixed-size parts of a segment: header, index entry, chunk table entry, footer.

use super::error::SegmentError;
use super::{SEGMENT_BYTES_MAX, SEGMENT_CHUNKS_MAX, SEGMENT_PAYLOAD_MAX, SEGMENT_RECORDS_MAX};
use crate::chain::RecordChain;
use crate::checksum::crc32c;
use crate::ids::{BLOCK_SIZE, Epoch, GroupId, LogId, Lsn};
use std::mem::offset_of;
use std::ops::Range;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First eight bytes of a segment.
pub const SEGMENT_MAGIC: [u8; 8] = *b"AFTRSEGM";
/// First eight bytes of a segment's footer.
pub(super) const FOOTER_MAGIC: [u8; 8] = *b"AFTRSEGF";
/// Format version that this program writes and reads.
pub const SEGMENT_VERSION: u16 = 1;
/// Bytes of a header.
pub const HEADER_BYTES: usize = 256;
/// Bytes of a footer.
pub const FOOTER_BYTES: usize = 128;
/// Bytes of an entry of the index.
pub const INDEX_ENTRY_BYTES: usize = 48;
/// Bytes of an entry of the chunk table.
pub(super) const CHUNK_ENTRY_BYTES: usize = 24;

/// What the records of a segment are.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum SegmentKind {
    /// Records of the log, consecutive in LSN.
    Log = 1,
    /// Blocks of a pass, ascending in (disk, block), each with the LSN it was read at.
    Pass = 2,
}

/// Flags of a segment.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct SegmentFlags {
    /// The records before this segment's first are missing and stay missing. The first record is
    /// the `PassBegin` that gives a new base, and the chain starts anew.
    pub declares_gap: bool,
}

const FLAG_DECLARES_GAP: u16 = 1;

/// Ties wall-clock times to a boot, so that a jump of the clock can be seen.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct ClockAnchor {
    /// Raw wall clock, nanoseconds since 1970.
    pub wall_ns: u64,
    /// The primary's boot ID.
    pub boot_id: [u8; 16],
    /// CLOCK_BOOTTIME at the same moment, nanoseconds.
    pub boottime_ns: u64,
}

/// A segment's header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentHeader {
    /// What its records are.
    pub kind: SegmentKind,
    /// Its flags.
    pub flags: SegmentFlags,
    /// Whose records.
    pub group: GroupId,
    /// Under which reign they were written.
    pub epoch: Epoch,
    /// The log they come from.
    pub log: LogId,
    /// Log: LSN of the first record. Pass: lowest LSN a block was read at.
    pub first_lsn: Lsn,
    /// Log: LSN of the last record. Pass: highest LSN a block was read at.
    pub last_lsn: Lsn,
    /// Pass: the LSN of its `PassBegin`. Log: the LSN of the `PassBegin` in this segment that
    /// opens a pass towards this very repository, else 0. (With several sinks, a log also holds
    /// the `PassBegin` records of passes towards others: those change nothing here.)
    pub pass: Lsn,
    /// Chain before the first record. Log: the record chain. Pass: the chain over the pass's
    /// blocks so far.
    pub chain_before: RecordChain,
    /// The same after the last record.
    pub chain_after: RecordChain,
    /// Clock of the primary about when the segment's first frame was written.
    pub anchor: ClockAnchor,
    /// How many records (entries of the index).
    pub record_count: u32,
    /// How many chunks.
    pub chunk_count: u32,
    /// Raw bytes of all payloads.
    pub payload_bytes: u64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub(super) struct RawHeader {
    magic: [u8; 8],
    version: U16,
    header_bytes: U16,
    kind: u8,
    scheme: u8,
    flags: U16,
    group: [u8; 16],
    log: [u8; 16],
    epoch: U64,
    first_lsn: U64,
    last_lsn: U64,
    pass: U64,
    chain_before: [u8; 32],
    chain_after: [u8; 32],
    boot_id: [u8; 16],
    wall_ns: U64,
    boottime_ns: U64,
    record_count: U32,
    chunk_count: U32,
    payload_bytes: U64,
    key_id: [u8; 16],
    salt: [u8; 32],
    reserved: [u8; 12],
    crc: U32,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES);
const _: () = assert!(offset_of!(RawHeader, kind) == 12);
const _: () = assert!(offset_of!(RawHeader, group) == 16);
const _: () = assert!(offset_of!(RawHeader, epoch) == 48);
const _: () = assert!(offset_of!(RawHeader, chain_before) == 80);
const _: () = assert!(offset_of!(RawHeader, boot_id) == 144);
const _: () = assert!(offset_of!(RawHeader, record_count) == 176);
const _: () = assert!(offset_of!(RawHeader, key_id) == 192);
const _: () = assert!(offset_of!(RawHeader, crc) == 252);

impl SegmentHeader {
    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut raw = RawHeader {
            magic: SEGMENT_MAGIC,
            version: SEGMENT_VERSION.into(),
            header_bytes: (HEADER_BYTES as u16).into(),
            kind: self.kind as u8,
            scheme: 0,
            flags: if self.flags.declares_gap {
                FLAG_DECLARES_GAP.into()
            } else {
                0.into()
            },
            group: self.group.to_bytes(),
            log: self.log.to_bytes(),
            epoch: self.epoch.0.into(),
            first_lsn: self.first_lsn.0.into(),
            last_lsn: self.last_lsn.0.into(),
            pass: self.pass.0.into(),
            chain_before: self.chain_before.0,
            chain_after: self.chain_after.0,
            boot_id: self.anchor.boot_id,
            wall_ns: self.anchor.wall_ns.into(),
            boottime_ns: self.anchor.boottime_ns.into(),
            record_count: self.record_count.into(),
            chunk_count: self.chunk_count.into(),
            payload_bytes: self.payload_bytes.into(),
            key_id: [0; 16],
            salt: [0; 32],
            reserved: [0; 12],
            crc: 0.into(),
        };
        raw.crc = crc32c(&raw.as_bytes()[..HEADER_BYTES - 4]).into();
        let mut out = [0; HEADER_BYTES];
        out.copy_from_slice(raw.as_bytes());
        out
    }

    /// Decodes a header from the first bytes of a segment (more may follow).
    ///
    /// # Errors
    /// Anything that a builder of this version would not have written.
    pub fn decode(bytes: &[u8]) -> Result<Self, SegmentError> {
        const PART: &str = "segment header";
        let Ok((raw, _)) = RawHeader::read_from_prefix(bytes) else {
            return Err(too_short(PART, bytes.len(), HEADER_BYTES));
        };
        if raw.magic != SEGMENT_MAGIC {
            return Err(SegmentError::Magic { part: PART });
        }
        if raw.version.get() != SEGMENT_VERSION {
            return Err(SegmentError::Version(raw.version.get()));
        }
        if raw.crc.get() != crc32c(&bytes[..HEADER_BYTES - 4]) {
            return Err(SegmentError::Checksum { part: PART });
        }
        if raw.scheme != 0 {
            return Err(SegmentError::Scheme(raw.scheme));
        }
        raw.validate()
    }
}

impl RawHeader {
    fn validate(&self) -> Result<SegmentHeader, SegmentError> {
        let invalid = |field| SegmentError::Invalid {
            part: "segment header",
            field,
        };
        if usize::from(self.header_bytes.get()) != HEADER_BYTES {
            return Err(invalid("header length"));
        }
        let kind = match self.kind {
            1 => SegmentKind::Log,
            2 => SegmentKind::Pass,
            _ => return Err(invalid("kind")),
        };
        if self.flags.get() & !FLAG_DECLARES_GAP != 0 {
            return Err(invalid("flags"));
        }
        if self.key_id != [0; 16] || self.salt != [0; 32] || self.reserved != [0; 12] {
            return Err(invalid("reserved bytes"));
        }
        limit("record count", self.record_count.get(), SEGMENT_RECORDS_MAX)?;
        limit("chunk count", self.chunk_count.get(), SEGMENT_CHUNKS_MAX)?;
        limit(
            "payload length",
            self.payload_bytes.get(),
            SEGMENT_PAYLOAD_MAX,
        )?;
        let header = SegmentHeader {
            kind,
            flags: SegmentFlags {
                declares_gap: self.flags.get() & FLAG_DECLARES_GAP != 0,
            },
            group: GroupId::from_bytes(self.group),
            epoch: Epoch(self.epoch.get()),
            log: LogId::from_bytes(self.log),
            first_lsn: Lsn(self.first_lsn.get()),
            last_lsn: Lsn(self.last_lsn.get()),
            pass: Lsn(self.pass.get()),
            chain_before: RecordChain(self.chain_before),
            chain_after: RecordChain(self.chain_after),
            anchor: ClockAnchor {
                wall_ns: self.wall_ns.get(),
                boot_id: self.boot_id,
                boottime_ns: self.boottime_ns.get(),
            },
            record_count: self.record_count.get(),
            chunk_count: self.chunk_count.get(),
            payload_bytes: self.payload_bytes.get(),
        };
        header.check_relations().map_err(invalid)?;
        Ok(header)
    }
}

impl SegmentHeader {
    /// What must hold between fields; names the field that breaks it.
    fn check_relations(&self) -> Result<(), &'static str> {
        let count = u64::from(self.record_count);
        if count == 0 {
            return Err("record count");
        }
        if self.epoch.0 == 0 || self.epoch > Epoch::MAX {
            return Err("epoch");
        }
        if self.last_lsn > Lsn::MAX {
            return Err("LSN range");
        }
        if !self.payload_bytes.is_multiple_of(BLOCK_SIZE as u64)
            || (self.payload_bytes == 0) != (self.chunk_count == 0)
        {
            return Err("payload length");
        }
        match self.kind {
            SegmentKind::Log => {
                if self.first_lsn.0 == 0
                    || self.last_lsn.0.checked_sub(self.first_lsn.0) != Some(count - 1)
                {
                    return Err("LSN range");
                }
                let pass_within = self.first_lsn <= self.pass && self.pass <= self.last_lsn;
                if self.pass != Lsn::ZERO && !pass_within {
                    return Err("pass");
                }
                if self.flags.declares_gap
                    && (self.pass != self.first_lsn || self.chain_before != RecordChain::BASE)
                {
                    return Err("gap declaration");
                }
            }
            SegmentKind::Pass => {
                if self.pass == Lsn::ZERO
                    || self.first_lsn < self.pass
                    || self.last_lsn < self.first_lsn
                {
                    return Err("LSN range");
                }
                if self.flags.declares_gap {
                    return Err("gap declaration");
                }
            }
        }
        Ok(())
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub(super) struct RawEntry {
    pub(super) lsn: U64,
    pub(super) wall_ns: U64,
    pub(super) first_block: U64,
    pub(super) block_count: U32,
    pub(super) payload_crc: U32,
    pub(super) aux: U32,
    pub(super) chunk: U32,
    pub(super) chunk_block: U16,
    pub(super) payload_blocks: U16,
    pub(super) disk: U16,
    pub(super) op: u8,
    pub(super) flags: u8,
}

const _: () = assert!(size_of::<RawEntry>() == INDEX_ENTRY_BYTES);
const _: () = assert!(offset_of!(RawEntry, block_count) == 24);
const _: () = assert!(offset_of!(RawEntry, chunk_block) == 40);
const _: () = assert!(offset_of!(RawEntry, flags) == 47);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub(super) struct RawChunk {
    pub(super) offset: U64,
    pub(super) stored_len: U32,
    pub(super) raw_len: U32,
    pub(super) crc: U32,
    pub(super) codec: u8,
    pub(super) reserved: [u8; 3],
}

const _: () = assert!(size_of::<RawChunk>() == CHUNK_ENTRY_BYTES);
const _: () = assert!(offset_of!(RawChunk, codec) == 20);

/// A segment's footer: where index and chunk table are, and the hash of everything before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Footer {
    /// Offset of the index from the segment's start; the end of the chunks.
    pub index_offset: u64,
    /// Length of the whole segment, this footer included.
    pub total_len: u64,
    /// Entries of the index.
    pub record_count: u32,
    /// Entries of the chunk table.
    pub chunk_count: u32,
    /// BLAKE3 of index, chunk table and the header's copy.
    pub index_hash: [u8; 32],
    /// BLAKE3 of every byte before the footer.
    pub content_hash: [u8; 32],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawFooter {
    magic: [u8; 8],
    version: U16,
    footer_bytes: U16,
    reserved_a: U32,
    index_offset: U64,
    table_offset: U64,
    total_len: U64,
    record_count: U32,
    chunk_count: U32,
    index_hash: [u8; 32],
    content_hash: [u8; 32],
    reserved_b: [u8; 12],
    crc: U32,
}

const _: () = assert!(size_of::<RawFooter>() == FOOTER_BYTES);
const _: () = assert!(offset_of!(RawFooter, index_offset) == 16);
const _: () = assert!(offset_of!(RawFooter, index_hash) == 48);
const _: () = assert!(offset_of!(RawFooter, crc) == 124);

impl Footer {
    fn table_offset(&self) -> u64 {
        self.index_offset + u64::from(self.record_count) * INDEX_ENTRY_BYTES as u64
    }

    /// Bytes of the segment from the index to the very end: what
    /// [`SegmentIndex::decode`](super::SegmentIndex::decode) needs.
    #[must_use]
    pub fn tail_range(&self) -> Range<u64> {
        self.index_offset..self.total_len
    }

    pub(super) fn encode(&self) -> [u8; FOOTER_BYTES] {
        let mut raw = RawFooter {
            magic: FOOTER_MAGIC,
            version: SEGMENT_VERSION.into(),
            footer_bytes: (FOOTER_BYTES as u16).into(),
            reserved_a: 0.into(),
            index_offset: self.index_offset.into(),
            table_offset: self.table_offset().into(),
            total_len: self.total_len.into(),
            record_count: self.record_count.into(),
            chunk_count: self.chunk_count.into(),
            index_hash: self.index_hash,
            content_hash: self.content_hash,
            reserved_b: [0; 12],
            crc: 0.into(),
        };
        raw.crc = crc32c(&raw.as_bytes()[..FOOTER_BYTES - 4]).into();
        let mut out = [0; FOOTER_BYTES];
        out.copy_from_slice(raw.as_bytes());
        out
    }

    /// Decodes the footer from the last bytes of a segment (more may stand before it).
    ///
    /// # Errors
    /// Anything that a builder of this version would not have written.
    pub fn decode(end: &[u8]) -> Result<Self, SegmentError> {
        const PART: &str = "segment footer";
        let invalid = |field| SegmentError::Invalid { part: PART, field };
        let Ok((before, raw)) = RawFooter::read_from_suffix(end) else {
            return Err(too_short(PART, end.len(), FOOTER_BYTES));
        };
        if raw.magic != FOOTER_MAGIC {
            return Err(SegmentError::Magic { part: PART });
        }
        if raw.version.get() != SEGMENT_VERSION {
            return Err(SegmentError::Version(raw.version.get()));
        }
        if raw.crc.get() != crc32c(&end[before.len()..end.len() - 4]) {
            return Err(SegmentError::Checksum { part: PART });
        }
        if usize::from(raw.footer_bytes.get()) != FOOTER_BYTES {
            return Err(invalid("footer length"));
        }
        if raw.reserved_a.get() != 0 || raw.reserved_b != [0; 12] {
            return Err(invalid("reserved bytes"));
        }
        limit("record count", raw.record_count.get(), SEGMENT_RECORDS_MAX)?;
        limit("chunk count", raw.chunk_count.get(), SEGMENT_CHUNKS_MAX)?;
        limit("segment length", raw.total_len.get(), SEGMENT_BYTES_MAX)?;
        limit("index offset", raw.index_offset.get(), SEGMENT_BYTES_MAX)?;
        let footer = Self {
            index_offset: raw.index_offset.get(),
            total_len: raw.total_len.get(),
            record_count: raw.record_count.get(),
            chunk_count: raw.chunk_count.get(),
            index_hash: raw.index_hash,
            content_hash: raw.content_hash,
        };
        let table_end =
            footer.table_offset() + u64::from(footer.chunk_count) * CHUNK_ENTRY_BYTES as u64;
        if raw.table_offset.get() != footer.table_offset()
            || table_end + (HEADER_BYTES + FOOTER_BYTES) as u64 != footer.total_len
            || footer.index_offset < HEADER_BYTES as u64
        {
            return Err(invalid("offsets"));
        }
        Ok(footer)
    }
}

pub(super) fn too_short(part: &'static str, have: usize, need: usize) -> SegmentError {
    SegmentError::TooShort { part, have, need }
}

pub(super) fn limit(
    what: &'static str,
    value: impl Into<u64>,
    limit: usize,
) -> Result<(), SegmentError> {
    let value = value.into();
    if value > limit as u64 {
        return Err(SegmentError::Limit {
            what,
            value,
            limit: limit as u64,
        });
    }
    Ok(())
}
