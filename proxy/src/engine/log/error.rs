//! Why a log cannot be used.

use crate::engine::blocking::StorageError;
use afterimage_format::frame::FrameError;
use afterimage_format::ids::{GroupId, LogId, Lsn};
use afterimage_format::superblock::SuperblockError;
use std::fmt;
use std::path::PathBuf;

/// A log was refused. The file is kept as it is.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The storage failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// Neither superblock is valid.
    #[error("{}: not a usable log: {source}; it was left as it is: if a newer version of Afterimage wrote it, run that; if it is damaged, keep it and recover the group from its replica; if it is no log, give the group another log path", path.display())]
    Superblock {
        /// The log.
        path: PathBuf,
        /// Of the copy that tells more.
        source: SuperblockError,
    },
    /// The log is another group's.
    #[error("{}: log of group {found}, not of {wanted}; give each group a log path of its own", path.display())]
    OtherGroup {
        /// The log.
        path: PathBuf,
        /// Whose it is.
        found: GroupId,
        /// Whose it should be.
        wanted: GroupId,
    },
    /// The file is shorter than its superblock says.
    #[error("{}: truncated: {len} bytes, its superblock says {wanted}; restore the file or recover the group from its replica", path.display())]
    Truncated {
        /// The log.
        path: PathBuf,
        /// Bytes there.
        len: u64,
        /// Bytes that should be there.
        wanted: u64,
    },
    /// A frame that was durable is not there any more.
    #[error("{}: corrupt at byte {offset}: frame {frame} (LSN {lsn} on) {found}, though {evidence}; keep the file, recover the group from its replica or accept the loss by a verify", path.display())]
    Corrupt {
        /// The log.
        path: PathBuf,
        /// Where the frame was due.
        offset: u64,
        /// Its number.
        frame: u64,
        /// Its first LSN.
        lsn: Lsn,
        /// What is there.
        found: Absence,
        /// How it is known that it was durable.
        evidence: Evidence,
    },
    /// The log's file and the ring contradict each other.
    #[error("{}: log {found} found, log {wanted} expected", path.display())]
    OtherLog {
        /// The log.
        path: PathBuf,
        /// Its identity.
        found: LogId,
        /// The identity expected.
        wanted: LogId,
    },
}

/// How it is known that a record had been durable in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// The superblock's durable LSN.
    Superblock(Lsn),
    /// The ring's durable LSN.
    Ring(Lsn),
    /// A later frame, at this byte of the file, that was written when the log was durable to here.
    LaterFrame {
        /// Byte offset of its descriptor.
        offset: u64,
        /// What it says.
        durable: Lsn,
    },
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Superblock(lsn) => {
                write!(
                    f,
                    "the superblock says that the log was durable to LSN {lsn}"
                )
            }
            Self::Ring(lsn) => write!(f, "the ring says that the log was durable to LSN {lsn}"),
            Self::LaterFrame { offset, durable } => write!(
                f,
                "the frame at byte {offset} says that the log was durable to LSN {durable}"
            ),
        }
    }
}

/// Why there is no next frame at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absence {
    /// No valid frame begins here.
    NoFrame(FrameError),
    /// A frame of another log.
    OtherLog(LogId),
    /// A frame with another number: remains of an earlier lap.
    OtherFrame(u64),
    /// The right number, but it does not continue the frame before it, or is of an incarnation
    /// that cannot be here: remains of a tail that was cut.
    OtherHistory,
    /// It continues the chain but belongs elsewhere in the area.
    Misplaced,
    /// It continues the chain but is damaged.
    Damaged(FrameError),
    /// The area is full up to the tail.
    Full,
}

impl fmt::Display for Absence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoFrame(error) => write!(f, "is missing ({error})"),
            Self::OtherLog(log) => write!(f, "is missing (there is a frame of log {log})"),
            Self::OtherFrame(number) => write!(f, "is missing (frame {number} is there)"),
            Self::OtherHistory => write!(f, "is missing (remains of a cut tail are there)"),
            Self::Misplaced => write!(f, "stands where it does not belong"),
            Self::Damaged(error) => write!(f, "is damaged ({error})"),
            Self::Full => write!(f, "is missing (the area is full)"),
        }
    }
}
