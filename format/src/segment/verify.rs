//! Checking every byte of a segment.

use super::layout::FOOTER_BYTES;
use super::{SegmentError, SegmentIndex};

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
    // Payloads lie in the order of the chunks: one decoded chunk serves all records that begin
    // or end in it.
    let mut last: Option<(u32, std::rc::Rc<[u8]>)> = None;
    for entry in &index.entries {
        index.payload(entry, |number, info| {
            if let Some((held, raw)) = &last
                && *held == number
            {
                return Ok(raw.clone());
            }
            let range = info.range();
            let stored = &bytes[range.start as usize..range.end as usize];
            let raw: std::rc::Rc<[u8]> = info.decode(number, stored)?.into();
            last = Some((number, raw.clone()));
            Ok::<_, SegmentError>(raw)
        })?;
    }
    Ok(index)
}
