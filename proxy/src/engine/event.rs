//! What the owner of an engine asks besides requests, and what the engine tells it.

use super::request::{Allocated, PassRead};
use afterimage_format::ids::{DiskIndex, Lsn};
use afterimage_format::op::Op;

/// Chosen by the owner with a command; returned with the events about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(pub u64);

/// A record that is not a change of blocks: checkpoint, begin or end of a pass, verify, …
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventRecord {
    /// What it is. Never a write, zeroing or trim.
    pub op: Op,
    /// The disk it is about; 0 for the whole group.
    pub disk: DiskIndex,
    /// First block, for records about a range; otherwise 0.
    pub first_block: u64,
    /// Blocks of the range; otherwise 0.
    pub block_count: u32,
    /// Small data of the operation.
    pub aux: u32,
    /// The body, at most one block; empty for none. Zero-padded to a block in the log.
    pub body: Vec<u8>,
}

/// What the engine tells its owner, in the order it happened.
#[derive(Debug)]
pub enum EngineEvent {
    /// The record of `append_event` has its LSN and survives a kill of the process.
    Appended {
        /// Of the command.
        ticket: Ticket,
        /// Its LSN.
        lsn: Lsn,
    },
    /// The record of `append_event` or `raise_epoch` is durable in the log.
    Durable {
        /// Of the command.
        ticket: Ticket,
        /// Its LSN.
        lsn: Lsn,
    },
    /// What `pass_read` read.
    PassRead {
        /// Of the command.
        ticket: Ticket,
        /// The blocks, or the backing's error.
        result: std::io::Result<PassRead>,
    },
    /// What `allocated_ranges` found.
    Allocated {
        /// Of the command.
        ticket: Ticket,
        /// What may hold data, or the backing's error.
        result: std::io::Result<Allocated>,
    },
    /// A sink's state was stored durably in the superblock.
    SinkStored {
        /// Of the command.
        ticket: Ticket,
    },
    /// Everything is in the backing and synced, the superblock says clean. No further request is
    /// taken. The storage may be closed.
    Drained {
        /// Of the command.
        ticket: Ticket,
    },
    /// A command failed for good.
    Failed {
        /// Of the command.
        ticket: Ticket,
        /// Why.
        error: EngineError,
    },
    /// The first failed write or sync of the log. Nothing is durable any more from here on.
    LogFailed {
        /// The error of the operating system.
        errno: i32,
    },
    /// `on_log_error = "detach"`: the backings have what the log has durably. The owner stores a
    /// durable marker beside every backing that forbids replay of this log, then calls
    /// `detach_marked`, or `detach_failed`. Writes wait until then.
    DetachWanted,
    /// A backing fails; it is tried again. The log keeps what it lacks.
    BackingFailing {
        /// Which disk.
        disk: DiskIndex,
        /// The error of the operating system.
        errno: i32,
    },
    /// All backings work again.
    BackingRecovered,
    /// Records up to `lsn` are about to leave the log without this sink having them. Its dirty
    /// flag is durable: only a new pass can bring it up to date.
    HistoryGap {
        /// Position of the sink in the superblock's table.
        sink: usize,
        /// Last LSN that left.
        lsn: Lsn,
    },
}

/// Why a command failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// After the first error of the log nothing can be made durable.
    #[error("the log has failed (errno {errno}); nothing more can be made durable in it")]
    LogFailed {
        /// The first error.
        errno: i32,
    },
    /// The engine drains or has drained.
    #[error("the group is being shut down")]
    ShuttingDown,
    /// The body of an event is longer than a block.
    #[error("the body of a record has {0} bytes; at most 4096 fit")]
    BodyTooLong(usize),
    /// The command is about a sink that the superblock does not have.
    #[error("the log's superblock has no sink number {0}")]
    UnknownSink(usize),
}
