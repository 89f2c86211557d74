//! Segments: immutable, compressed, checksummed runs of records; what is shipped and stored.
//!
//! Layout, all integers little-endian (`docs/format.md`, "Segment"):
//! header ‖ chunks ‖ index ‖ chunk table ‖ copy of the header ‖ footer.
//! Whoever reads the end of a segment has everything but the data; whoever wants one block reads
//! one chunk. Every byte is covered by a checksum, and every limit is checked before memory is
//! allocated for it. Decoders refuse what a builder would not have written.

mod build;
mod error;
mod index;
mod layout;
mod pass;
mod verify;

pub use build::{PushError, SealedSegment, SegmentBuilder, SegmentSpec};
pub use error::SegmentError;
pub use index::{ChunkInfo, Codec, IndexEntry, PayloadPlace, SegmentIndex};
pub use layout::{ClockAnchor, Footer, SegmentFlags, SegmentHeader, SegmentKind};
pub use layout::{FOOTER_BYTES, HEADER_BYTES, INDEX_ENTRY_BYTES, SEGMENT_MAGIC, SEGMENT_VERSION};
pub use pass::{EventBodyError, PassBeginBody, PassEndBody, SinkId};
pub use verify::verify;

/// Most raw bytes in a chunk.
pub const CHUNK_BYTES_MAX: usize = 256 * 1024;

/// Most raw bytes that a builder puts into a chunk: whoever reads one block inflates the chunk that it
/// is in.
pub const CHUNK_BYTES_TARGET: usize = 64 * 1024;

/// A segment is closed once its payload reaches this many bytes.
pub const SEGMENT_PAYLOAD_TARGET: usize = 8 * 1024 * 1024;

/// Most raw payload bytes that any segment may have.
pub const SEGMENT_PAYLOAD_MAX: usize = 16 * 1024 * 1024;

/// Most records in a segment.
pub const SEGMENT_RECORDS_MAX: usize = 65_536;

/// Most chunks in a segment: two neighbours always hold more than the target together.
pub const SEGMENT_CHUNKS_MAX: usize = 2 * SEGMENT_PAYLOAD_MAX / CHUNK_BYTES_TARGET + 2;

/// Most bytes of a whole segment as stored and sent.
pub const SEGMENT_BYTES_MAX: usize = 20 * 1024 * 1024;

const _: () = assert!(SEGMENT_PAYLOAD_TARGET + (1 << 20) <= SEGMENT_PAYLOAD_MAX);
const _: () = assert!(
    2 * HEADER_BYTES
        + SEGMENT_PAYLOAD_MAX
        + SEGMENT_RECORDS_MAX * INDEX_ENTRY_BYTES
        + SEGMENT_CHUNKS_MAX * layout::CHUNK_ENTRY_BYTES
        + FOOTER_BYTES
        <= SEGMENT_BYTES_MAX
);

#[cfg(test)]
mod golden_tests;
#[cfg(test)]
mod tests;
