//! Errors of images.

use afterimage_format::segment::SegmentError;

use crate::group::GroupError;
use crate::history::Position;
use crate::layers::LayerError;

/// Why an image cannot be opened or read.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The point does not exist.
    #[error(
        "there is no recovery point {at}: it lies in a gap, in an unfinished pass, or was never received; 'points' shows what there is"
    )]
    NoSuchPoint {
        /// The position.
        at: Position,
    },
    /// The group has no such disk at this point.
    #[error("the group has no disk number {disk} at this point")]
    NoSuchDisk {
        /// Its place in the disk table.
        disk: u16,
    },
    /// Beyond the disk's end.
    #[error("bytes {offset} to {end} are beyond the disk's end at {size}")]
    OutOfRange {
        /// First byte.
        offset: u64,
        /// Byte after the last.
        end: u64,
        /// The disk's size.
        size: u64,
    },
    /// A chunk's bytes are not those that were stored.
    #[error(
        "{key}, offset {offset}: {source}; run verify, and restore the object from a copy of the repository"
    )]
    Chunk {
        /// Key of the segment.
        key: String,
        /// Offset of the chunk.
        offset: u64,
        /// What is wrong.
        source: SegmentError,
    },
    /// The index cannot be read.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// A segment cannot be read.
    #[error(transparent)]
    Group(#[from] GroupError),
}
