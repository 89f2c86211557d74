//! The index of a segment: which record is where. Decoded from the end of a segment without its
//! data, checked against every rule a builder keeps, so that later reads need no more checks than
//! those of the chunks themselves.

use super::layout::{
    CHUNK_ENTRY_BYTES, FOOTER_BYTES, Footer, HEADER_BYTES, INDEX_ENTRY_BYTES, RawChunk, RawEntry,
    SegmentHeader, SegmentKind, limit, too_short,
};
use super::{CHUNK_BYTES_MAX, SEGMENT_BYTES_MAX, SegmentError};
use crate::chain::{RECORD_PAYLOAD_BLOCKS_MAX, RecordChain, RecordMeta};
use crate::checksum::crc32c;
use crate::ids::{BLOCK_SIZE, DISKS_MAX, DiskIndex, Lsn};
use crate::op::Op;
use std::cell::RefCell;
use std::ops::Range;
use zerocopy::{FromBytes, Immutable};

/// Where a record's payload begins. It goes on in the chunks after if it does not end in this one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PayloadPlace {
    /// Number of the chunk.
    pub chunk: u32,
    /// First block within the chunk's raw bytes.
    pub block: u16,
    /// Length of the payload in blocks.
    pub blocks: u16,
}

/// One record of a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IndexEntry {
    /// The record.
    pub record: RecordMeta,
    /// Its payload, if it has one.
    pub payload: Option<PayloadPlace>,
}

/// How a chunk is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Codec {
    /// As it is.
    Raw = 0,
    /// One zstd frame.
    Zstd = 1,
}

/// One chunk of a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChunkInfo {
    /// Offset of its stored bytes from the segment's start.
    pub offset: u64,
    /// Length of its stored bytes.
    pub stored_len: u32,
    /// Length of its raw bytes.
    pub raw_len: u32,
    /// CRC32C of its stored bytes.
    pub crc: u32,
    /// How it is stored.
    pub codec: Codec,
}

thread_local! {
    /// Making one costs a good part of what the decoding of a chunk does.
    static DECOMPRESSOR: RefCell<zstd::bulk::Decompressor<'static>> =
        RefCell::new(zstd::bulk::Decompressor::new().expect("zstd finds memory for a context"));
}

impl ChunkInfo {
    /// Bytes of the segment that hold the chunk.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset + u64::from(self.stored_len)
    }

    fn raw_blocks(&self) -> usize {
        self.raw_len as usize / BLOCK_SIZE
    }

    /// Raw bytes of this chunk (`number` is for the message) from its stored bytes. Never writes
    /// more than the chunk's stated length, which is at most [`CHUNK_BYTES_MAX`].
    ///
    /// # Errors
    /// The stored bytes are damaged or do not hold exactly the stated length.
    pub fn decode(&self, number: u32, stored: &[u8]) -> Result<Vec<u8>, SegmentError> {
        if stored.len() != self.stored_len as usize || crc32c(stored) != self.crc {
            return Err(SegmentError::ChunkChecksum(number));
        }
        match self.codec {
            Codec::Raw => Ok(stored.to_vec()),
            Codec::Zstd => {
                let want = self.raw_len as usize;
                let mut raw = Vec::with_capacity(want);
                let len = DECOMPRESSOR.with_borrow_mut(|decompressor| {
                    decompressor.decompress_to_buffer(stored, &mut raw)
                });
                match len {
                    Ok(len) if len == want => Ok(raw),
                    _ => Err(SegmentError::ChunkContent(number)),
                }
            }
        }
    }
}

/// Header, index and chunk table of a segment, checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SegmentIndex {
    /// The segment's header.
    pub header: SegmentHeader,
    /// The segment's footer.
    pub footer: Footer,
    /// Its records, in the segment's order.
    pub entries: Vec<IndexEntry>,
    /// Its chunks.
    pub chunks: Vec<ChunkInfo>,
}

impl SegmentIndex {
    /// Decodes the index from the end of a segment: at least the bytes of
    /// [`Footer::tail_range`]; more may stand before them (a read of the last 128 KiB
    /// usually brings all of it). The record chain is not followed: the hash of the index stands for what
    /// was checked when the segment was taken in ([`of_segment`](Self::of_segment) follows it).
    ///
    /// # Errors
    /// [`SegmentError::TooShort`] with the number of bytes needed if the end does not reach back
    /// to the index; else anything that a builder of this version would not have written.
    pub fn decode(end: &[u8]) -> Result<Self, SegmentError> {
        let footer = Footer::decode(end)?;
        let tail = footer.tail_range();
        let need = (tail.end - tail.start) as usize;
        let Some(start) = end.len().checked_sub(need) else {
            return Err(too_short("segment index", end.len(), need));
        };
        let hashed = &end[start..end.len() - FOOTER_BYTES];
        if *blake3::hash(hashed).as_bytes() != footer.index_hash {
            return Err(SegmentError::Checksum {
                part: "segment index",
            });
        }
        let (index, rest) = hashed.split_at(footer.record_count as usize * INDEX_ENTRY_BYTES);
        let (table, copy) = rest.split_at(footer.chunk_count as usize * CHUNK_ENTRY_BYTES);
        debug_assert_eq!(copy.len(), HEADER_BYTES);
        let header = SegmentHeader::decode(copy)?;
        if header.record_count != footer.record_count || header.chunk_count != footer.chunk_count {
            return Err(SegmentError::Invalid {
                part: "segment footer",
                field: "counts",
            });
        }
        let chunks = decode_chunks(table, &header, &footer)?;
        let entries = decode_entries(index)?;
        let decoded = Self {
            header,
            footer,
            entries,
            chunks,
        };
        decoded.check_order()?;
        decoded.check_places()?;
        Ok(decoded)
    }

    /// Decodes the index of a whole segment and follows its record chain; its chunks are not looked
    /// at (see [`verify`](super::verify())).
    ///
    /// # Errors
    /// As [`decode`](Self::decode), or the bytes are not one whole segment.
    pub fn of_segment(bytes: &[u8]) -> Result<Self, SegmentError> {
        limit("segment length", bytes.len() as u64, SEGMENT_BYTES_MAX)?;
        let header = SegmentHeader::decode(bytes)?;
        let index = Self::decode(bytes)?;
        if index.footer.total_len != bytes.len() as u64 {
            return Err(SegmentError::Invalid {
                part: "segment footer",
                field: "segment length",
            });
        }
        if index.header != header {
            return Err(SegmentError::Invalid {
                part: "segment footer",
                field: "copy of the header",
            });
        }
        index.check_chain()?;
        Ok(index)
    }

    /// Chunk and block within it that hold block `nth` of a payload.
    #[must_use]
    pub fn locate_block(&self, place: PayloadPlace, nth: usize) -> (u32, usize) {
        let mut chunk = place.chunk;
        let mut block = usize::from(place.block) + nth;
        while let Some(info) = self.chunks.get(chunk as usize)
            && block >= info.raw_blocks()
        {
            block -= info.raw_blocks();
            chunk += 1;
        }
        (chunk, block)
    }

    /// Chunks over which a payload extends.
    #[must_use]
    pub fn chunks_of(&self, place: PayloadPlace) -> Range<u32> {
        let (last, _) = self.locate_block(place, usize::from(place.blocks).saturating_sub(1));
        place.chunk..last + 1
    }

    /// Assembles a record's payload and checks it. `fetch` gives the raw bytes of a chunk by its
    /// number (from a cache, or [`ChunkInfo::decode`]).
    ///
    /// # Errors
    /// Those of `fetch`, and a payload that does not match its checksum.
    pub fn payload<C, E>(
        &self,
        entry: &IndexEntry,
        mut fetch: impl FnMut(u32, &ChunkInfo) -> Result<C, E>,
    ) -> Result<Vec<u8>, E>
    where
        C: AsRef<[u8]>,
        E: From<SegmentError>,
    {
        let Some(place) = entry.payload else {
            return Ok(Vec::new());
        };
        let bad = || SegmentError::PayloadChecksum(entry.record.lsn.0);
        let want = usize::from(place.blocks) * BLOCK_SIZE;
        let mut out = Vec::with_capacity(want);
        let mut skip = usize::from(place.block) * BLOCK_SIZE;
        for number in self.chunks_of(place) {
            let info = self.chunks.get(number as usize).ok_or_else(bad)?;
            let raw = fetch(number, info)?;
            let raw = raw.as_ref();
            let end = raw.len().min(skip + want - out.len());
            out.extend_from_slice(raw.get(skip..end).ok_or_else(bad)?);
            skip = 0;
        }
        if out.len() != want || crc32c(&out) != entry.record.payload_crc {
            return Err(bad().into());
        }
        Ok(out)
    }

    fn check_order(&self) -> Result<(), SegmentError> {
        let header = &self.header;
        let mut pass_end = (0u16, 0u64);
        let mut lowest = Lsn(u64::MAX);
        let mut highest = Lsn::ZERO;
        for (at, entry) in self.entries.iter().enumerate() {
            let record = &entry.record;
            let refuse = |field| entry_error(at, field);
            lowest = lowest.min(record.lsn);
            highest = highest.max(record.lsn);
            match header.kind {
                SegmentKind::Log => {
                    if record.lsn.0 - header.first_lsn.0.min(record.lsn.0) != at as u64 {
                        return Err(refuse("LSN"));
                    }
                    if record.lsn == header.pass && record.op != Op::PassBegin {
                        return Err(refuse("operation (a pass begins here)"));
                    }
                }
                SegmentKind::Pass => {
                    if record.op != Op::Write {
                        return Err(refuse("operation"));
                    }
                    if (record.disk.0, record.first_block) < pass_end {
                        return Err(refuse("order"));
                    }
                    pass_end = (
                        record.disk.0,
                        record.first_block + u64::from(record.block_count),
                    );
                }
            }
        }
        if (lowest, highest) != (header.first_lsn, header.last_lsn) {
            return Err(SegmentError::Invalid {
                part: "segment header",
                field: "LSN range",
            });
        }
        Ok(())
    }

    /// Payloads fill the chunks without overlap or hole, in the order of the records.
    fn check_places(&self) -> Result<(), SegmentError> {
        let mut chunk = 0usize;
        let mut block = 0usize;
        for (at, entry) in self.entries.iter().enumerate() {
            let Some(place) = entry.payload else { continue };
            let refuse = || entry_error(at, "payload position");
            if place.chunk as usize != chunk || usize::from(place.block) != block {
                return Err(refuse());
            }
            let mut left = usize::from(place.blocks);
            while left > 0 {
                let info = self.chunks.get(chunk).ok_or_else(refuse)?;
                let step = left.min(info.raw_blocks() - block);
                left -= step;
                block += step;
                if block == info.raw_blocks() {
                    (chunk, block) = (chunk + 1, 0);
                }
            }
        }
        if (chunk, block) != (self.chunks.len(), 0) {
            return Err(SegmentError::Invalid {
                part: "segment index",
                field: "chunk without a record",
            });
        }
        Ok(())
    }

    fn check_chain(&self) -> Result<(), SegmentError> {
        let after = self
            .entries
            .iter()
            .fold(self.header.chain_before, |chain: RecordChain, entry| {
                chain.extend(&entry.record)
            });
        if after == self.header.chain_after {
            Ok(())
        } else {
            Err(SegmentError::Chain)
        }
    }
}

fn entry_error(at: usize, field: &'static str) -> SegmentError {
    SegmentError::Entry {
        entry: at as u32,
        field,
    }
}

fn table<T: FromBytes + Immutable>(bytes: &[u8]) -> impl Iterator<Item = T> + '_ {
    bytes
        .chunks_exact(size_of::<T>())
        .filter_map(|part| T::read_from_bytes(part).ok())
}

fn decode_chunks(
    bytes: &[u8],
    header: &SegmentHeader,
    footer: &Footer,
) -> Result<Vec<ChunkInfo>, SegmentError> {
    let invalid = |field| SegmentError::Invalid {
        part: "chunk table",
        field,
    };
    let mut chunks = Vec::with_capacity(footer.chunk_count as usize);
    let mut offset = HEADER_BYTES as u64;
    let mut raw_total = 0u64;
    for raw in table::<RawChunk>(bytes) {
        let codec = match raw.codec {
            0 => Codec::Raw,
            1 => Codec::Zstd,
            _ => return Err(invalid("codec")),
        };
        let info = ChunkInfo {
            offset: raw.offset.get(),
            stored_len: raw.stored_len.get(),
            raw_len: raw.raw_len.get(),
            crc: raw.crc.get(),
            codec,
        };
        limit("raw length of a chunk", info.raw_len, CHUNK_BYTES_MAX)?;
        let lengths_suit = match codec {
            Codec::Raw => info.stored_len == info.raw_len,
            Codec::Zstd => 0 < info.stored_len && info.stored_len < info.raw_len,
        };
        if !lengths_suit || info.raw_len == 0 || !(info.raw_len as usize).is_multiple_of(BLOCK_SIZE)
        {
            return Err(invalid("length"));
        }
        if raw.reserved != [0; 3] {
            return Err(invalid("reserved bytes"));
        }
        if info.offset != offset {
            return Err(invalid("offset"));
        }
        offset += u64::from(info.stored_len);
        raw_total += u64::from(info.raw_len);
        chunks.push(info);
    }
    if offset != footer.index_offset || raw_total != header.payload_bytes {
        return Err(invalid("total length"));
    }
    Ok(chunks)
}

fn decode_entries(bytes: &[u8]) -> Result<Vec<IndexEntry>, SegmentError> {
    let mut entries = Vec::with_capacity(bytes.len() / INDEX_ENTRY_BYTES);
    for (at, raw) in table::<RawEntry>(bytes).enumerate() {
        let refuse = |field| entry_error(at, field);
        let record = RecordMeta {
            lsn: Lsn(raw.lsn.get()),
            disk: DiskIndex(raw.disk.get()),
            op: Op::from_number(raw.op).ok_or_else(|| refuse("operation"))?,
            flags: raw.flags,
            first_block: raw.first_block.get(),
            block_count: raw.block_count.get(),
            wall_ns: raw.wall_ns.get(),
            aux: raw.aux.get(),
            payload_crc: raw.payload_crc.get(),
        };
        let blocks = raw.payload_blocks.get();
        if usize::from(record.disk.0) >= DISKS_MAX {
            return Err(refuse("disk"));
        }
        if !record.range_is_valid() {
            return Err(refuse("block range"));
        }
        if usize::from(blocks) > RECORD_PAYLOAD_BLOCKS_MAX
            || !record.payload_fits(usize::from(blocks))
        {
            return Err(refuse("payload length"));
        }
        let place = PayloadPlace {
            chunk: raw.chunk.get(),
            block: raw.chunk_block.get(),
            blocks,
        };
        let nothing = (place.chunk, place.block, record.payload_crc) == (0, 0, 0);
        if blocks == 0 && !nothing {
            return Err(refuse("payload position"));
        }
        entries.push(IndexEntry {
            record,
            payload: (blocks > 0).then_some(place),
        });
    }
    Ok(entries)
}
