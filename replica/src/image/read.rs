//! Reading an image: pieces to chunks, chunks to bytes.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use afterimage_format::ids::{BLOCK_SIZE, DiskIndex};
use afterimage_format::segment::ChunkInfo;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

use super::cache::{ChunkTable, SegmentId};
use super::{Image, ImageError};
use crate::group::{GroupError, read_index_checked};
use crate::index::{Piece, SegmentOrdinal, Source};
use crate::repository::keys;

/// Chunks of one read that are fetched at a time.
pub(super) const FETCHES_MAX: usize = 8;

/// Stored bytes that are read at a time.
const READ_BYTES: u64 = 1 << 20;

/// Bytes of the read buffer that come out of one chunk.
struct Part {
    /// Offset in the buffer.
    to: usize,
    /// Offset in the chunk's raw bytes.
    from: usize,
    len: usize,
}

/// Parts by the chunk they come from.
type Plan = BTreeMap<(SegmentId, u32), Vec<Part>>;

/// Neighbouring chunks that are read at once, with the parts of each.
struct Read {
    id: SegmentId,
    first: u32,
    parts: Vec<Vec<Part>>,
}

/// Puts chunks together that stand right behind each other in a segment.
fn neighbours(plan: Plan, tables: &HashMap<SegmentId, Arc<ChunkTable>>) -> Vec<Read> {
    let mut reads: Vec<Read> = Vec::new();
    let mut bytes = 0;
    for ((id, number), parts) in plan {
        let info = tables
            .get(&id)
            .and_then(|table| table.chunks.get(number as usize));
        let len = info.map_or(0, |info| u64::from(info.stored_len));
        if let Some(last) = reads.last_mut()
            && last.id == id
            && last.first + last.parts.len() as u32 == number
            && bytes + len <= READ_BYTES
        {
            last.parts.push(parts);
            bytes += len;
            continue;
        }
        bytes = len;
        reads.push(Read {
            id,
            first: number,
            parts: vec![parts],
        });
    }
    reads
}

impl Image {
    /// Fills `buffer` with the disk's bytes from `offset` on.
    ///
    /// # Errors
    /// Beyond the disk's end, or a segment is damaged or cannot be read; the buffer's content is
    /// then of no use.
    pub async fn read(
        &self,
        disk: DiskIndex,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), ImageError> {
        let size = self.size(disk)?;
        let end = offset.saturating_add(buffer.len() as u64);
        if end > size {
            return Err(ImageError::OutOfRange { offset, end, size });
        }
        let block = BLOCK_SIZE as u64;
        let mut at = offset;
        while at < end {
            let blocks = end.div_ceil(block) - at / block;
            let pieces = self.pieces(disk, at / block, blocks).await?;
            let found: u64 = pieces.iter().map(|piece| piece.block_count as u64).sum();
            let stop = end.min((at / block + found) * block);
            let part = &mut buffer[(at - offset) as usize..(stop - offset) as usize];
            self.fill(&pieces, at, part).await?;
            at = stop;
        }
        Ok(())
    }

    /// Fills a buffer that stands for the bytes from `offset` on out of the pieces that cover it.
    async fn fill(
        &self,
        pieces: &[Piece],
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), ImageError> {
        let tables = self.tables(pieces).await?;
        let mut plan = Plan::new();
        for piece in pieces {
            let start = piece.first_block * BLOCK_SIZE as u64;
            let end = start + (piece.block_count * BLOCK_SIZE) as u64;
            let from = start.max(offset);
            let to = end.min(offset + buffer.len() as u64);
            let range = (from - offset) as usize..(to - offset) as usize;
            match piece.source {
                Source::Nothing | Source::Zero => buffer[range].fill(0),
                Source::Data { segment, position } => {
                    let id = self.segment_id(segment);
                    let table = tables.get(&id).ok_or_else(|| self.missing(id))?;
                    let skip = (from - start) as usize;
                    let mut parts = Parts {
                        plan: &mut plan,
                        id,
                        table,
                        range,
                        skip,
                        position,
                    };
                    parts.add().ok_or_else(|| self.missing(id))?;
                }
            }
        }
        let reads = neighbours(plan, &tables);
        let mut chunks = stream::iter(reads)
            .map(|read| {
                let table = tables.get(&read.id).cloned();
                async move {
                    let table = table.ok_or_else(|| self.missing(read.id))?;
                    let chunks = self.chunks(read.id, read.first, read.parts.len(), &table);
                    Ok::<_, ImageError>((chunks.await?, read.parts))
                }
            })
            .buffer_unordered(FETCHES_MAX);
        while let Some((chunks, parts)) = chunks.try_next().await? {
            for (raw, parts) in chunks.iter().zip(parts) {
                for part in parts {
                    let bytes = &raw[part.from..part.from + part.len];
                    buffer[part.to..part.to + part.len].copy_from_slice(bytes);
                }
            }
        }
        Ok(())
    }

    /// The chunk tables of all segments that the pieces need.
    async fn tables(
        &self,
        pieces: &[Piece],
    ) -> Result<HashMap<SegmentId, Arc<ChunkTable>>, ImageError> {
        let mut wanted: Vec<SegmentOrdinal> = pieces
            .iter()
            .filter_map(|piece| match piece.source {
                Source::Data { segment, .. } => Some(segment),
                _ => None,
            })
            .collect();
        wanted.sort_unstable();
        wanted.dedup();
        stream::iter(wanted)
            .map(|segment| async move {
                let id = self.segment_id(segment);
                Ok((id, self.table(id).await?))
            })
            .buffer_unordered(FETCHES_MAX)
            .try_collect()
            .await
    }

    async fn table(&self, id: SegmentId) -> Result<Arc<ChunkTable>, ImageError> {
        if let Some(table) = self.cache.table(id) {
            return Ok(table);
        }
        let key = keys::segment(id.group, id.epoch, id.sequence);
        let expected = {
            let history = self.group.history();
            let epoch = history.epoch(id.epoch);
            epoch.and_then(|epoch| epoch.segment(id.sequence)).copied()
        };
        let expected = expected.ok_or_else(|| self.missing(id))?;
        let index = read_index_checked(self.group.repository(), &key, &expected).await?;
        let table = Arc::new(ChunkTable::of(&index));
        self.cache.put_table(id, table.clone());
        Ok(table)
    }

    /// Neighbouring chunks of a segment: those of the cache, and all others in as few reads as there
    /// are stretches of them.
    async fn chunks(
        &self,
        id: SegmentId,
        first: u32,
        count: usize,
        table: &ChunkTable,
    ) -> Result<Vec<Bytes>, ImageError> {
        let infos = table
            .chunks
            .get(first as usize..first as usize + count)
            .ok_or_else(|| self.missing(id))?;
        let numbers = first..first + count as u32;
        let mut found: Vec<Option<Bytes>> =
            numbers.map(|number| self.cache.chunk(id, number)).collect();
        let mut at = 0;
        while at < count {
            let missing = found[at..].iter().take_while(|raw| raw.is_none()).count();
            if missing > 0 {
                let infos = &infos[at..at + missing];
                let read = self.read_chunks(id, first + at as u32, infos).await?;
                for (place, raw) in found[at..].iter_mut().zip(read) {
                    *place = Some(raw);
                }
            }
            at += missing.max(1);
        }
        Ok(found.into_iter().flatten().collect())
    }

    /// Reads chunks that stand right behind each other.
    async fn read_chunks(
        &self,
        id: SegmentId,
        first: u32,
        infos: &[ChunkInfo],
    ) -> Result<Vec<Bytes>, ImageError> {
        let (Some(from), Some(to)) = (infos.first(), infos.last()) else {
            return Ok(Vec::new());
        };
        let key = keys::segment(id.group, id.epoch, id.sequence);
        let range = from.range().start..to.range().end;
        let stored = self.group.repository().get_range(&key, range).await;
        let stored = stored.map_err(GroupError::from)?;
        let mut read = Vec::with_capacity(infos.len());
        for (number, info) in (first..).zip(infos) {
            let start = (info.offset - from.offset) as usize;
            let end = start + info.stored_len as usize;
            // An object that ends early.
            let bytes = stored.get(start..end).unwrap_or_default();
            let raw = info
                .decode(number, bytes)
                .map_err(|source| ImageError::Chunk {
                    key: key.clone(),
                    offset: info.offset,
                    source,
                })?;
            let raw = Bytes::from(raw);
            self.cache.put_chunk(id, number, raw.clone());
            read.push(raw);
        }
        Ok(read)
    }

    fn segment_id(&self, segment: SegmentOrdinal) -> SegmentId {
        SegmentId {
            group: self.group.id(),
            epoch: self.epoch(),
            sequence: u64::from(segment.0),
        }
    }

    fn missing(&self, id: SegmentId) -> ImageError {
        let key = keys::segment(id.group, id.epoch, id.sequence);
        GroupError::Missing { key }.into()
    }
}

/// Spreads one piece over the chunks it lies in.
struct Parts<'a> {
    plan: &'a mut Plan,
    id: SegmentId,
    table: &'a ChunkTable,
    /// Of the buffer.
    range: std::ops::Range<usize>,
    /// Bytes of the piece before the range.
    skip: usize,
    position: u32,
}

impl Parts<'_> {
    /// `None` if the segment does not reach that far.
    fn add(&mut self) -> Option<()> {
        while self.range.start < self.range.end {
            let position = self.position + (self.skip / BLOCK_SIZE) as u32;
            let (chunk, within, blocks) = self.table.locate(position)?;
            let from = within * BLOCK_SIZE + self.skip % BLOCK_SIZE;
            let left = (within + blocks) * BLOCK_SIZE - from;
            let len = left.min(self.range.len());
            let parts = self.plan.entry((self.id, chunk)).or_default();
            parts.push(Part {
                to: self.range.start,
                from,
                len,
            });
            self.range.start += len;
            self.skip += len;
        }
        Some(())
    }
}
