//! Where records come from: the durable part of a group's log, in LSN order.

use super::BoxFuture;
use afterimage_format::chain::RecordMeta;
use afterimage_format::ids::Lsn;
use afterimage_format::segment::ClockAnchor;
use bytes::Bytes;

/// One record with its payload (empty for none). The payload matches its checksum.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    /// All but the payload.
    pub meta: RecordMeta,
    /// Whole blocks.
    pub payload: Bytes,
}

/// Consecutive records, usually of one frame: at most 2 MiB of payload.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Batch {
    /// Clock of the primary when the frame was opened.
    pub anchor: ClockAnchor,
    /// The records. Empty: nothing more up to the bound.
    pub records: Vec<Record>,
}

/// Why records could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The log no longer holds the record: it was trimmed or overwritten while it was read.
    #[error("record {0} has left the log")]
    Gone(Lsn),
    /// The log's file could not be read.
    #[error("reading the log failed: {0}")]
    Io(#[from] std::io::Error),
    /// A durable frame does not pass its checks.
    #[error("the log is damaged at record {lsn}: {what}")]
    Damaged {
        /// The record that was to be read.
        lsn: Lsn,
        /// The check that failed.
        what: String,
    },
}

/// Reads a group's durable records.
pub trait RecordSource: Send {
    /// Sets the position: the next record read is `next`.
    ///
    /// # Errors
    /// The log does not hold it any more. A record that is still to come is no error.
    fn seek(&mut self, next: Lsn) -> BoxFuture<'_, Result<(), SourceError>>;

    /// Reads on, never past `durable`. Not harmed by being dropped half-way.
    fn read(&mut self, durable: Lsn) -> BoxFuture<'_, Result<Batch, SourceError>>;
}
