//! The superblock of a log: what must be known before its first frame can be read.
//!
//! Blocks 0 and 1 of a log file hold two copies, A and B. Generation g is written to copy g mod 2,
//! so that a torn update leaves the one before it. [`choose`] takes the newer valid copy.
//! `docs/format.md`, section "Superblock", is the reference; [`layout`] holds the bytes.
//!
//! Always holds: a [`Superblock`] from [`Superblock::decode`] is consistent in itself (tail inside
//! the area, LSNs in order, tables within their limits).

mod layout;
#[cfg(test)]
mod tests;

use crate::chain::RecordChain;
use crate::ids::{BootId, DISKS_MAX, DiskId, Epoch, GroupId, LogId, Lsn};
use crate::segment::SinkId;

/// First bytes of a superblock.
pub const SUPERBLOCK_MAGIC: [u8; 8] = *b"AFILOGSB";
/// Version of the layout that this code writes, and the only one it reads.
pub const SUPERBLOCK_VERSION: u16 = 1;
/// Copies at the start of the log file, one block each.
pub const SUPERBLOCK_COPIES: u64 = 2;
/// Most sinks of one group.
pub const SINKS_MAX: usize = 8;

/// Where the log begins: the oldest frame that is still needed, or where the next one will be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tail {
    /// Block within the area where the previous frame ended. The frame is here, or at the start of
    /// the area if it did not fit.
    pub position: u64,
    /// Its number.
    pub frame: u64,
    /// Its first LSN.
    pub lsn: Lsn,
    /// Its lap if it is at `position`.
    pub lap: u32,
    /// Header checksum of the frame before it; 0 if there was none.
    pub previous_crc: u32,
}

/// One disk of the group. Its place in the table is its `DiskIndex`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskState {
    /// Identity.
    pub id: DiskId,
    /// Size in bytes, a multiple of 512.
    pub size: u64,
    /// The disk was taken out of the group; its index is not given again.
    pub removed: bool,
}

/// How far a sink is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SinkState {
    /// Identity.
    pub id: SinkId,
    /// It has durably acknowledged every record up to here.
    pub acked: Lsn,
    /// Record chain at `acked`.
    pub chain: RecordChain,
    /// `Some(l)`: records up to LSN l left the log without having been shipped to it, or it never
    /// had a base. Everything is dirty until a pass that began after l has committed there.
    pub dirty: Option<Lsn>,
    /// A base that began at or before this LSN lacks what came onto a disk past the log: a disk that
    /// was added or came back, a backing that was edited and accepted. [`Lsn::ZERO`]: nothing did.
    pub rebase_after: Lsn,
    /// The last record that such a base is good for: what came first, came behind it.
    pub good_until: Lsn,
}

/// Everything a superblock says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// The group whose writes the log holds.
    pub group: GroupId,
    /// Identity of the log.
    pub log: LogId,
    /// The boot in which this copy was written.
    pub boot: BootId,
    /// +1 with each update; decides which copy counts and where it stands.
    pub generation: u64,
    /// Epoch of the records; 0 until a replica has given one.
    pub epoch: Epoch,
    /// Blocks of the frame area, which begins behind the copies.
    pub area_blocks: u64,
    /// +1 with each start of the log.
    pub incarnation: u32,
    /// Number of the first frame that this incarnation writes: from it on, frames of any other
    /// incarnation are remains.
    pub incarnation_frame: u64,
    /// Area blocks of this incarnation's ring. More than that (and one frame) never stands behind
    /// the last durable frame.
    pub ring_blocks: u32,
    /// Nothing was answered that is not in the log: the ring of an earlier start is not needed.
    pub clean: bool,
    /// Where the log begins.
    pub tail: Tail,
    /// Everything up to here is durably in the backings.
    pub destaged: Lsn,
    /// Everything up to here was durable in the log when this copy was written.
    pub durable: Lsn,
    /// Wall clock when the log was created, nanoseconds since 1970.
    pub created_ns: u64,
    /// The group's disks, by index.
    pub disks: Vec<DiskState>,
    /// The group's sinks.
    pub sinks: Vec<SinkState>,
}

/// Why a superblock was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SuperblockError {
    /// Not one block.
    #[error("{0} bytes instead of one block")]
    Length(usize),
    /// The first bytes are not those of a superblock.
    #[error("no superblock here (magic missing)")]
    Magic,
    /// Written by another version of the program.
    #[error("superblock layout version {0}, this program reads version {SUPERBLOCK_VERSION}")]
    Version(u16),
    /// The block does not match its checksum.
    #[error("checksum is {found:#010x}, computed {computed:#010x}")]
    Crc {
        /// In the block.
        found: u32,
        /// Over the block.
        computed: u32,
    },
    /// A reserved byte is not zero.
    #[error("reserved byte {0} is not zero")]
    Reserved(usize),
    /// Unknown flags.
    #[error("unknown flags {0:#06x}")]
    Flags(u16),
    /// Stands where the other copy belongs.
    #[error("generation {generation} does not belong into copy {copy}")]
    Misplaced {
        /// Its generation.
        generation: u64,
        /// Where it stands: 0 for A, 1 for B.
        copy: u64,
    },
    /// More disks than a group can have, or none.
    #[error("{0} disks, 1 to {DISKS_MAX} are possible")]
    Disks(u16),
    /// More sinks than a group can have.
    #[error("{0} sinks, {SINKS_MAX} are possible")]
    Sinks(u16),
    /// A disk's size or flags cannot be.
    #[error("disk {0} of the table is not valid")]
    Disk(usize),
    /// A sink's flags cannot be.
    #[error("sink {0} of the table is not valid")]
    Sink(usize),
    /// Positions, frame numbers or LSNs contradict each other.
    #[error("{0}")]
    Inconsistent(Inconsistency),
}

/// What contradicts what in a superblock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Inconsistency {
    /// The area is too small to hold frames, or too large for byte offsets.
    #[error("an area of {0} blocks cannot be")]
    Area(u64),
    /// The tail lies outside the area.
    #[error("the tail lies outside the area")]
    Tail,
    /// Frame number or LSN 0 at the tail.
    #[error("the tail has frame number or LSN 0")]
    TailNumber,
    /// The tail passed records that are not destaged.
    #[error("the tail stands after records that are not destaged")]
    TailBeforeDestaged,
    /// More is destaged than was durable.
    #[error("more is destaged than is durable")]
    DestagedBeforeDurable,
}

/// The newer valid one of the two copies, by generation. `copies` are blocks 0 and 1 of the file.
///
/// # Errors
/// Both copies are refused: the reason of the one that tells more (a newer version before damage,
/// damage before nothing there).
pub fn choose(copies: [&[u8]; 2]) -> Result<Superblock, SuperblockError> {
    let a = Superblock::decode(copies[0], 0);
    let b = Superblock::decode(copies[1], 1);
    match (a, b) {
        (Ok(a), Ok(b)) => Ok(if a.generation > b.generation { a } else { b }),
        (Ok(one), Err(SuperblockError::Version(version)))
        | (Err(SuperblockError::Version(version)), Ok(one))
            // A lower version is what a cut in the copy's first write leaves.
            if version > SUPERBLOCK_VERSION =>
        {
            // A newer program wrote last; what it wrote may make this copy's word worthless.
            drop(one);
            Err(SuperblockError::Version(version))
        }
        (Ok(one), Err(_)) | (Err(_), Ok(one)) => Ok(one),
        (Err(a), Err(b)) => Err(match (a, b) {
            (SuperblockError::Version(_), _) => a,
            (_, SuperblockError::Version(_)) => b,
            (SuperblockError::Magic, _) => b,
            _ => a,
        }),
    }
}
