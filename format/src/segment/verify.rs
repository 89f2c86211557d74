//! Checking every byte of a segment.

use super::layout::FOOTER_BYTES;
use super::{ChunkInfo, SegmentError, SegmentIndex};
use crate::checksum::crc32c;
use crate::ids::BLOCK_SIZE;

/// Checks a whole segment: hash of the stored bytes, index, chain, every chunk, every payload.
/// Holds at most a few chunks (1.5 MiB) of raw data at a time.
///
/// # Errors
/// The first thing that is wrong.
pub fn verify(bytes: &[u8]) -> Result<SegmentIndex, SegmentError> {
    let index = SegmentIndex::of_segment(bytes)?;
    let content = &bytes[..bytes.len() - FOOTER_BYTES];
    if *blake3::hash(content).as_bytes() != index.footer.content_hash {
        return Err(SegmentError::Checksum {
            part: "segment content",
        });
    }
    // Payloads lie in the order of the chunks: one decoded chunk serves all records in it.
    let decode = |number: u32, info: &ChunkInfo| {
        let range = info.range();
        info.decode(number, &bytes[range.start as usize..range.end as usize])
    };
    let mut held: Option<(u32, Vec<u8>)> = None;
    for entry in &index.entries {
        let Some(place) = entry.payload else { continue };
        let chunks = index.chunks_of(place);
        let Some(info) = index.chunks.get(chunks.start as usize) else {
            return Err(SegmentError::PayloadChecksum(entry.record.lsn.0));
        };
        if chunks.len() > 1 {
            index.payload(entry, decode)?;
            continue;
        }
        let raw = match &mut held {
            Some((number, raw)) if *number == chunks.start => raw,
            held => {
                let raw = decode(chunks.start, info)?;
                &mut held.insert((chunks.start, raw)).1
            }
        };
        let start = usize::from(place.block) * BLOCK_SIZE;
        let payload = raw.get(start..start + usize::from(place.blocks) * BLOCK_SIZE);
        if payload.map(crc32c) != Some(entry.record.payload_crc) {
            return Err(SegmentError::PayloadChecksum(entry.record.lsn.0));
        }
    }
    Ok(index)
}
