//! What clients ask of a group's engine, and what they get.

use crate::io::buffer::AlignedBuffer;
use afterimage_format::ids::{DiskIndex, Epoch, Lsn};

/// Time as the engine sees it. Both come from the driver; the engine never asks a clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Monotonic nanoseconds (CLOCK_MONOTONIC), for deadlines.
    pub monotonic_ns: u64,
    /// Wall clock, nanoseconds since 1970, raw: it may jump.
    pub wall_ns: u64,
    /// CLOCK_BOOTTIME in nanoseconds.
    pub boottime_ns: u64,
}

/// Chosen by the session (connection and slot); returned with the reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestId(pub u64);

/// A request of a client on one disk. Offsets and lengths are bytes; the session has checked that
/// they lie within the disk and that the disk exists. Length 0 never reaches the engine.
#[derive(Debug)]
pub enum Request<'a> {
    /// Read.
    Read {
        /// Where.
        offset: u64,
        /// How much; at most 64 MiB.
        len: u32,
    },
    /// Write. The engine copies what it needs before `submit` returns.
    Write {
        /// Where.
        offset: u64,
        /// The payload, at most 64 MiB.
        data: &'a [u8],
        /// Answer only when durable in the log.
        fua: bool,
    },
    /// Answer when every write answered before, on any connection and disk of the group, is
    /// durable in the log.
    Flush,
    /// The range reads as zero from the answer on; space may be freed. Whole range, ragged edges
    /// zeroed within their blocks.
    Trim {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
        /// Answer only when durable in the log.
        fua: bool,
    },
    /// As `Trim`; `no_hole` keeps the space allocated.
    WriteZeroes {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
        /// Answer only when durable in the log.
        fua: bool,
        /// Keep the space allocated.
        no_hole: bool,
    },
    /// What is allocated, what reads as zero.
    BlockStatus {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
        /// At most this many extents in the answer.
        extents_max: u32,
    },
}

/// One run of a disk with the same state (NBD `base:allocation`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes.
    pub len: u64,
    /// Not allocated.
    pub hole: bool,
    /// Reads as zero.
    pub zero: bool,
    /// May differ from what every replica has (NBD `afterimage:dirty`). Who does not know says
    /// true; an image says whether it differs from the point it is compared with, else false.
    pub dirty: bool,
}

/// The body of a successful reply.
#[derive(Debug)]
pub enum ReplyBody {
    /// Nothing but success.
    Done,
    /// Data of a read: `len` bytes from `start` in the buffer.
    Data {
        /// Owned by the receiver; hand it back with `Engine::recycle` when sent.
        buffer: AlignedBuffer,
        /// First byte of the data within the buffer.
        start: usize,
        /// Length in bytes.
        len: usize,
    },
    /// Extents from the request's offset on.
    Extents(Vec<Extent>),
}

/// Why a request failed; what goes on the wire as errno. The real cause is in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestError {
    /// EIO.
    Io,
    /// ENOSPC.
    NoSpace,
    /// EINVAL.
    Invalid,
    /// ENOMEM.
    NoMemory,
    /// ESHUTDOWN.
    ShuttingDown,
}

/// The answer to one request.
#[derive(Debug)]
pub struct Reply {
    /// As submitted.
    pub id: RequestId,
    /// What came of it.
    pub result: Result<ReplyBody, RequestError>,
}

/// How far a group's log is, as others may know it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogProgress {
    /// Last LSN that is durable in the log.
    pub durable: Lsn,
    /// Last LSN given.
    pub appended: Lsn,
    /// First LSN still in the log.
    pub oldest: Lsn,
    /// Epoch under which records are written.
    pub epoch: Epoch,
}

/// A block range of one disk, read as of one LSN, for a pass.
#[derive(Debug)]
pub struct PassRead {
    /// Which disk.
    pub disk: DiskIndex,
    /// First block.
    pub first_block: u64,
    /// The LSN last assigned when the read was submitted.
    pub lsn: Lsn,
    /// The data may leave this site once the log is durable to here.
    pub durable_after: Lsn,
    /// Whole blocks; the tail of a disk that is no multiple of the block size is zero-filled.
    pub data: AlignedBuffer,
}
