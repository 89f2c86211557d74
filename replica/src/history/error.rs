//! Why a segment is refused, and what is only said.

use afterimage_format::checkpoint::CheckpointBodyError;
use afterimage_format::checkpoint_confirm::CheckpointConfirmError;
use afterimage_format::ids::{Epoch, GroupId, LogId, Lsn};
use afterimage_format::segment::EventBodyError;
use afterimage_format::wire::ErrorCode;

/// Why a segment does not enter the history. Nothing has changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Of another group, epoch or log than the session.
    #[error("the segment belongs to group {group}, epoch {epoch}, log {log}, not to this session")]
    Foreign {
        /// Its group.
        group: GroupId,
        /// Its epoch.
        epoch: Epoch,
        /// Its log.
        log: LogId,
    },
    /// Records are missing before it and no gap is declared.
    #[error(
        "the segment begins with record {first}, the last one here is {cursor}; a gap must be declared and begin with a pass"
    )]
    Gap {
        /// First record of the segment.
        first: Lsn,
        /// Last record here.
        cursor: Lsn,
    },
    /// A declared gap that does not begin with the record of a pass to this sink.
    #[error(
        "the segment declares a gap, yet its first record {first} does not begin a pass to here"
    )]
    GapWithoutPass {
        /// First record of the segment.
        first: Lsn,
    },
    /// The same records with other content.
    #[error(
        "records {first} to {last} are here already with different content: two primaries wrote under one identity; the refused segment is kept, run verify on both sides"
    )]
    Diverged {
        /// First record of the segment.
        first: Lsn,
        /// Last record of the segment.
        last: Lsn,
    },
    /// Blocks of a pass that is not under way.
    #[error("no pass that began at record {pass} is under way here")]
    NoSuchPass {
        /// The pass.
        pass: Lsn,
    },
    /// Blocks of a pass that do not follow those that came.
    #[error("the blocks do not follow those of the pass {pass} that came before; say hello again")]
    PassOutOfStep {
        /// The pass.
        pass: Lsn,
    },
    /// A block beyond the disk's end, or a disk that the group does not have.
    #[error("record {lsn} touches disk {disk} beyond what the group's disk table says")]
    OutOfDisk {
        /// The record.
        lsn: Lsn,
        /// The disk's place in the table.
        disk: u16,
    },
    /// The body of a checkpoint cannot be read.
    #[error("record {lsn}: {source}")]
    Checkpoint {
        /// The record.
        lsn: Lsn,
        /// What is wrong.
        source: CheckpointBodyError,
    },
    /// The body of a checkpoint's confirmation cannot be read.
    #[error("record {lsn}: {source}")]
    Confirm {
        /// The record.
        lsn: Lsn,
        /// What is wrong.
        source: CheckpointConfirmError,
    },
    /// The body of an event cannot be read.
    #[error("record {lsn}: {source}")]
    Body {
        /// The record.
        lsn: Lsn,
        /// What is wrong.
        source: EventBodyError,
    },
}

impl Refusal {
    /// The code that the peer gets.
    #[must_use]
    pub const fn code(&self) -> ErrorCode {
        match self {
            Self::Foreign { .. } => ErrorCode::Protocol,
            Self::Gap { .. } | Self::GapWithoutPass { .. } => ErrorCode::Gap,
            Self::Diverged { .. } => ErrorCode::Diverged,
            Self::NoSuchPass { .. } | Self::PassOutOfStep { .. } => ErrorCode::PassMismatch,
            Self::OutOfDisk { .. } => ErrorCode::Disks,
            Self::Body { .. } | Self::Checkpoint { .. } | Self::Confirm { .. } => {
                ErrorCode::BadSegment
            }
        }
    }
}

/// What was accepted and still deserves to be known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Warning {
    /// A pass ended with other numbers than it sent; it gives no base.
    #[error(
        "the pass that began at record {pass} does not add up ({promised} blocks were promised, {came} came{}): no point in it exists, earlier ones stay; the primary makes a new one when it is connected",
        if came == promised { ", but other ones" } else { "" }
    )]
    PassMismatch {
        /// The pass.
        pass: Lsn,
        /// Blocks that came.
        came: u64,
        /// Blocks that were promised.
        promised: u64,
    },
}
