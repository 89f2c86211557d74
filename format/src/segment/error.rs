//! Why a segment was refused.

use super::layout::SEGMENT_VERSION;

/// What is wrong with a segment, or with the part of it that was read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// Fewer bytes than the part needs.
    #[error("{part}: {have} bytes where at least {need} are needed")]
    TooShort {
        /// Which part.
        part: &'static str,
        /// Bytes there are.
        have: usize,
        /// Bytes needed.
        need: usize,
    },
    /// Does not begin (or end) like a segment.
    #[error("{part}: not a segment (wrong magic)")]
    Magic {
        /// Which part.
        part: &'static str,
    },
    /// A format version this program does not know.
    #[error("segment format version {0}, this program reads version {SEGMENT_VERSION}")]
    Version(u16),
    /// Sealed with an encryption scheme this program does not know.
    #[error("segment is encrypted with scheme {0}, this program reads unencrypted segments only")]
    Scheme(u8),
    /// A checksum over the part does not match.
    #[error("{part}: checksum mismatch, the bytes are damaged")]
    Checksum {
        /// Which part.
        part: &'static str,
    },
    /// A chunk's stored bytes do not match their checksum.
    #[error("chunk {0}: checksum mismatch, the bytes are damaged")]
    ChunkChecksum(u32),
    /// A chunk does not decompress to exactly its stated length.
    #[error("chunk {0}: does not decompress to its stated length")]
    ChunkContent(u32),
    /// A record's payload does not match its checksum.
    #[error("record {0}: payload checksum mismatch")]
    PayloadChecksum(u64),
    /// A length or count above its limit.
    #[error("{what} is {value}, the limit is {limit}")]
    Limit {
        /// Which number.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The most it may be.
        limit: u64,
    },
    /// A field that contradicts another or holds a value no builder writes.
    #[error("{part}: invalid {field}")]
    Invalid {
        /// Which part.
        part: &'static str,
        /// Which field.
        field: &'static str,
    },
    /// An entry of the index that breaks a rule.
    #[error("index entry {entry}: invalid {field}")]
    Entry {
        /// Its position.
        entry: u32,
        /// Which field.
        field: &'static str,
    },
    /// The records do not hash from the header's chain before to its chain after.
    #[error("the record chain over the index does not match the header")]
    Chain,
    /// No such record or chunk.
    #[error("segment has no {what} {number}")]
    NoSuch {
        /// What was asked for.
        what: &'static str,
        /// Its number.
        number: u64,
    },
}
