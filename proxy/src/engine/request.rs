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
    /// true; an image says false.
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
    /// How full the log is, in percent of what makes unshipped records leave it.
    pub log_fill_percent: u8,
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
    /// A block was changed while its older content was being read from the backing: the data may
    /// be newer than `lsn` there, or a mixture. Or something came onto a disk past the log at
    /// `lsn`, of which sinks have the content before. Otherwise it is the content at exactly `lsn`.
    pub overtaken: bool,
    /// Whole blocks; the tail of a disk that is no multiple of the block size is zero-filled.
    pub data: AlignedBuffer,
}

/// What of a disk may hold something other than zeroes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Allocated {
    /// All between `from_block` and `end_block` that is in none of the ranges reads as zero at
    /// exactly this LSN, if `exact`.
    pub lsn: Lsn,
    /// Nothing came onto a disk past the log at this LSN.
    pub exact: bool,
    /// Runs of blocks: ascending, disjoint.
    pub ranges: Vec<std::ops::Range<u64>>,
    /// From this block on nothing is known: the disk's end, unless there were too many ranges;
    /// `from_block` of a disk that was taken out of the group.
    pub end_block: u64,
}

/// Upper bounds of the histogram of log syncs, in nanoseconds.
pub const LOG_SYNC_BOUNDS_NS: [u64; 12] = [
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    500_000_000,
    2_500_000_000,
];

/// What an engine has done since its start, and how full it is. A copy, made on demand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineStatus {
    /// How far the log is.
    pub progress: LogProgress,
    /// Last LSN whose content the backings have, synced or not.
    pub destaged: Lsn,
    /// Last LSN that the backings have durably.
    pub synced: Lsn,
    /// Bytes of the ring's frame area.
    pub ring_bytes: u64,
    /// Bytes of it in use.
    pub ring_bytes_used: u64,
    /// Bytes of the log's frame area.
    pub log_bytes: u64,
    /// Bytes of it that may not be overwritten yet.
    pub log_bytes_used: u64,
    /// When more of it is in use, records leave it although a sink lacks them.
    pub log_bytes_gap_from: u64,
    /// Bytes of it that hold records not yet in the backings.
    pub log_bytes_undestaged: u64,
    /// Bytes of payload that wait for room or for a merge.
    pub waiting_bytes: u64,
    /// Requests that have not been answered.
    pub requests_open: u64,
    /// First error of the log, 0 for none.
    pub log_errno: i32,
    /// Error of a failing backing, 0 for none.
    pub backing_errno: i32,
    /// The log failed and `on_log_error = "detach"` is being carried out: all but reads waits.
    pub detaching: bool,
    /// Why the markers for that could not be stored at the last attempt, 0 for none.
    pub marker_errno: i32,
    /// The group runs without a log since `on_log_error = "detach"`.
    pub detached: bool,
    /// Bytes of payload written by clients.
    pub written_bytes: u64,
    /// Bytes answered to reads.
    pub read_bytes: u64,
    /// Records appended.
    pub records: u64,
    /// Writes of frames to the log.
    pub log_writes: u64,
    /// Bytes of frames written to the log.
    pub log_written_bytes: u64,
    /// Syncs of the log (fdatasync and DSYNC writes).
    pub log_syncs: u64,
    /// Nanoseconds spent in them, summed up.
    pub log_sync_ns: u64,
    /// Nanoseconds of the longest of them.
    pub log_sync_ns_max: u64,
    /// Syncs that took at most so long as [`LOG_SYNC_BOUNDS_NS`] says, and longer than the bound
    /// before it; longer ones are in `log_syncs` alone.
    pub log_sync_buckets: [u64; LOG_SYNC_BOUNDS_NS.len()],
    /// Writes to the backings.
    pub destage_writes: u64,
    /// Bytes written to the backings.
    pub destaged_bytes: u64,
    /// Blocks never written to a backing, because a newer version was durable.
    pub destage_skipped_blocks: u64,
    /// Syncs of the backings.
    pub backing_syncs: u64,
    /// Failed operations on the backings.
    pub backing_errors: u64,
    /// Superblocks written.
    pub superblock_writes: u64,
    /// Nanoseconds during which writes waited for room in the ring.
    pub stall_ns: u64,
}
