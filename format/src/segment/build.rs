//! Building segments: records in, sealed bytes out. Chunks are compressed as they fill, so a
//! segment under construction holds at most one raw chunk beside its compressed ones.

use super::layout::{Footer, RawChunk, RawEntry};
use super::{
    CHUNK_BYTES_TARGET, ClockAnchor, FOOTER_BYTES, HEADER_BYTES, SEGMENT_PAYLOAD_MAX,
    SEGMENT_RECORDS_MAX, SegmentFlags, SegmentHeader, SegmentKind,
};
use crate::chain::{RECORD_PAYLOAD_BLOCKS_MAX, RecordChain, RecordMeta};
use crate::checksum::crc32c;
use crate::ids::{BLOCK_SIZE, DISKS_MAX, DiskIndex, Epoch, GroupId, LogId, Lsn};
use crate::op::Op;
use bytes::Bytes;
use std::io::Cursor;
use zerocopy::IntoBytes;

/// What is known of a segment before its first record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentSpec {
    /// What its records are.
    pub kind: SegmentKind,
    /// Its flags.
    pub flags: SegmentFlags,
    /// Whose records.
    pub group: GroupId,
    /// Under which reign; not 0.
    pub epoch: Epoch,
    /// The log they come from.
    pub log: LogId,
    /// See [`SegmentHeader::pass`].
    pub pass: Lsn,
    /// Chain before the first record.
    pub chain_before: RecordChain,
    /// Clock of the primary.
    pub anchor: ClockAnchor,
}

/// Why a record was not taken. The segment is as before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PushError {
    /// A limit of the segment would be passed: seal it and start another.
    #[error("the segment is full")]
    Full,
    /// Not the record after the last one (log) or not behind the last block (pass).
    #[error("record {0} is out of order")]
    Order(Lsn),
    /// The payload's length does not suit the operation, or the range or disk is impossible.
    #[error("record {0} is malformed")]
    Malformed(Lsn),
    /// The payload does not match the record's checksum.
    #[error("record {0}: payload checksum mismatch")]
    Checksum(Lsn),
}

/// A finished segment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SealedSegment {
    /// Its header.
    pub header: SegmentHeader,
    /// All of its bytes.
    pub bytes: Bytes,
}

/// A segment under construction.
pub struct SegmentBuilder {
    spec: SegmentSpec,
    chain: RecordChain,
    /// Header space and finished chunks.
    stored: Vec<u8>,
    /// Payload of the chunk being filled.
    chunk: Vec<u8>,
    chunks: Vec<RawChunk>,
    entries: Vec<RawEntry>,
    payload_bytes: usize,
    first_lsn: Lsn,
    last_lsn: Lsn,
    /// End of the last pass block: (disk, block).
    pass_end: (u16, u64),
    compressor: zstd::bulk::Compressor<'static>,
}

impl SegmentBuilder {
    /// An empty segment.
    #[must_use]
    pub fn new(spec: SegmentSpec) -> Self {
        Self {
            spec,
            chain: spec.chain_before,
            stored: vec![0; HEADER_BYTES],
            chunk: Vec::new(),
            chunks: Vec::new(),
            entries: Vec::new(),
            payload_bytes: 0,
            first_lsn: Lsn::ZERO,
            last_lsn: Lsn::ZERO,
            pass_end: (0, 0),
            compressor: zstd::bulk::Compressor::new(1).expect("level 1 is a level of zstd"),
        }
    }

    /// Raw payload bytes so far.
    #[must_use]
    pub fn payload_bytes(&self) -> usize {
        self.payload_bytes
    }

    /// Records so far.
    #[must_use]
    pub fn record_count(&self) -> usize {
        self.entries.len()
    }

    /// Whether no record was pushed yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// What the segment was begun with.
    #[must_use]
    pub fn spec(&self) -> &SegmentSpec {
        &self.spec
    }

    /// LSN of the last record (log), highest LSN of a block (pass); 0 while empty.
    #[must_use]
    pub fn last_lsn(&self) -> Lsn {
        self.last_lsn
    }

    /// Chain after the last record so far.
    #[must_use]
    pub fn chain(&self) -> RecordChain {
        self.chain
    }

    /// Adds one record with its payload (empty for none).
    ///
    /// # Errors
    /// The record does not fit, is out of order or is malformed; the segment is as before.
    pub fn push(&mut self, record: &RecordMeta, payload: &[u8]) -> Result<(), PushError> {
        let blocks = payload.len() / BLOCK_SIZE;
        if !payload.len().is_multiple_of(BLOCK_SIZE)
            || blocks > RECORD_PAYLOAD_BLOCKS_MAX
            || !record.payload_fits(blocks)
            || !record.range_is_valid()
            || usize::from(record.disk.0) >= DISKS_MAX
        {
            return Err(PushError::Malformed(record.lsn));
        }
        self.check_order(record)?;
        if record.payload_crc != crc32c(payload) {
            return Err(PushError::Checksum(record.lsn));
        }
        if self.entries.len() == SEGMENT_RECORDS_MAX
            || self.payload_bytes + payload.len() > SEGMENT_PAYLOAD_MAX
        {
            return Err(PushError::Full);
        }
        let (chunk, chunk_block) = self.place(payload);
        self.entries.push(RawEntry {
            lsn: record.lsn.0.into(),
            wall_ns: record.wall_ns.into(),
            first_block: record.first_block.into(),
            block_count: record.block_count.into(),
            payload_crc: record.payload_crc.into(),
            aux: record.aux.into(),
            chunk: chunk.into(),
            chunk_block: chunk_block.into(),
            payload_blocks: (blocks as u16).into(),
            disk: record.disk.0.into(),
            op: record.op.number(),
            flags: record.flags,
        });
        self.chain = self.chain.extend(record);
        self.payload_bytes += payload.len();
        if self.entries.len() == 1 || record.lsn < self.first_lsn {
            self.first_lsn = record.lsn;
        }
        self.last_lsn = self.last_lsn.max(record.lsn);
        self.pass_end = (
            record.disk.0,
            record.first_block + u64::from(record.block_count),
        );
        Ok(())
    }

    /// Adds a run of blocks of a pass, read at `lsn`.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub fn push_pass_blocks(
        &mut self,
        disk: DiskIndex,
        first_block: u64,
        lsn: Lsn,
        data: &[u8],
    ) -> Result<(), PushError> {
        let blocks = data.len() / BLOCK_SIZE;
        let record = RecordMeta {
            lsn,
            disk,
            op: Op::Write,
            flags: 0,
            first_block,
            block_count: u32::try_from(blocks).map_err(|_| PushError::Malformed(lsn))?,
            wall_ns: 0,
            aux: 0,
            payload_crc: crc32c(data),
        };
        self.push(&record, data)
    }

    fn check_order(&self, record: &RecordMeta) -> Result<(), PushError> {
        let in_order = record.lsn <= Lsn::MAX
            && match self.spec.kind {
                SegmentKind::Log if self.entries.is_empty() => record.lsn > Lsn::ZERO,
                SegmentKind::Log => self.last_lsn.0.checked_add(1) == Some(record.lsn.0),
                SegmentKind::Pass => {
                    record.op == Op::Write
                        && record.lsn >= self.spec.pass
                        && (record.disk.0, record.first_block) >= self.pass_end
                }
            };
        if in_order {
            Ok(())
        } else {
            Err(PushError::Order(record.lsn))
        }
    }

    /// Appends a payload to the chunks; returns where it begins. A payload that does not fit the
    /// open chunk begins a new one; one larger than a chunk goes on in the chunks after.
    fn place(&mut self, payload: &[u8]) -> (u32, u16) {
        if payload.is_empty() {
            return (0, 0);
        }
        if self.chunk.len() + payload.len() > CHUNK_BYTES_TARGET {
            self.finish_chunk();
        }
        let place = (
            self.chunks.len() as u32,
            (self.chunk.len() / BLOCK_SIZE) as u16,
        );
        for part in payload.chunks(CHUNK_BYTES_TARGET) {
            if self.chunk.len() + part.len() > CHUNK_BYTES_TARGET {
                self.finish_chunk();
            }
            self.chunk.extend_from_slice(part);
        }
        place
    }

    fn finish_chunk(&mut self) {
        if self.chunk.is_empty() {
            return;
        }
        debug_assert!(self.chunk.len() <= CHUNK_BYTES_TARGET);
        let start = self.stored.len();
        self.stored
            .reserve(zstd::zstd_safe::compress_bound(self.chunk.len()));
        let mut end = Cursor::new(&mut self.stored);
        end.set_position(start as u64);
        // A compression that fails is treated like one that does not pay: stored raw.
        let codec = match self.compressor.compress_to_buffer(&self.chunk, &mut end) {
            Ok(len) if len < self.chunk.len() => 1,
            _ => {
                self.stored.truncate(start);
                self.stored.extend_from_slice(&self.chunk);
                0
            }
        };
        self.chunks.push(RawChunk {
            offset: (start as u64).into(),
            stored_len: ((self.stored.len() - start) as u32).into(),
            raw_len: (self.chunk.len() as u32).into(),
            crc: crc32c(&self.stored[start..]).into(),
            codec,
            reserved: [0; 3],
        });
        self.chunk.clear();
    }

    /// Finishes the segment. `None` if it has no records.
    #[must_use]
    pub fn seal(mut self) -> Option<SealedSegment> {
        if self.entries.is_empty() {
            return None;
        }
        self.finish_chunk();
        let header = SegmentHeader {
            kind: self.spec.kind,
            flags: self.spec.flags,
            group: self.spec.group,
            epoch: self.spec.epoch,
            log: self.spec.log,
            first_lsn: self.first_lsn,
            last_lsn: self.last_lsn,
            pass: self.spec.pass,
            chain_before: self.spec.chain_before,
            chain_after: self.chain,
            anchor: self.spec.anchor,
            record_count: self.entries.len() as u32,
            chunk_count: self.chunks.len() as u32,
            payload_bytes: self.payload_bytes as u64,
        };
        let encoded = header.encode();
        let mut bytes = self.stored;
        bytes[..HEADER_BYTES].copy_from_slice(&encoded);
        let index_offset = bytes.len();
        bytes.extend_from_slice(self.entries.as_bytes());
        bytes.extend_from_slice(self.chunks.as_bytes());
        bytes.extend_from_slice(&encoded);
        let footer = Footer {
            index_offset: index_offset as u64,
            total_len: (bytes.len() + FOOTER_BYTES) as u64,
            record_count: header.record_count,
            chunk_count: header.chunk_count,
            index_hash: *blake3::hash(&bytes[index_offset..]).as_bytes(),
            content_hash: *blake3::hash(&bytes).as_bytes(),
        };
        bytes.extend_from_slice(&footer.encode());
        Some(SealedSegment {
            header,
            bytes: Bytes::from(bytes),
        })
    }
}
