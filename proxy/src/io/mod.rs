//! Storage behind one submit/complete trait, so that the engine runs on io_uring and in the
//! simulator alike.
//!
//! Owns: the kernel's rings, memory mappings, buffers in the kernel's hands, and all `unsafe` code.
//! Always holds: a buffer given to [`Storage::submit`] is not touched by the caller until its
//! completion; ring memory under an operation is not overwritten until its completion.

pub mod buffer;
pub mod file;
pub mod locks;
pub mod mapping;
mod operation;
pub mod sim;
pub mod socket;
pub mod storage;
pub mod uring;

#[cfg(test)]
mod tests;

use afterimage_format::ids::{DISKS_MAX, DiskIndex};
use buffer::AlignedBuffer;
use std::ops::Range;

/// A file opened within a [`Storage`]: the log, or one disk's backing.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FileId(pub u32);

impl FileId {
    /// The group's log.
    pub const LOG: Self = Self(0);
    /// A log that is being written to take the place of [`FileId::LOG`].
    pub const NEXT_LOG: Self = Self(1);

    /// The backing of a disk.
    #[must_use]
    pub const fn backing(disk: DiskIndex) -> Self {
        Self(2 + disk.0 as u32)
    }

    /// The claim (marker) that stands beside the backing of a disk: two blocks, copies A and B.
    #[must_use]
    pub const fn claim(disk: DiskIndex) -> Self {
        Self(2 + DISKS_MAX as u32 + disk.0 as u32)
    }
}

/// One more than the highest [`FileId`] of a group.
pub const FILES_MAX: usize = 2 + 2 * DISKS_MAX;

/// Chosen by the submitter, returned with the completion. Its meaning is the submitter's.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Token(pub u64);

/// A run of bytes in ring memory: offset and length, both multiples of the block size except for
/// the tail of a disk whose size is no multiple of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RingSpan {
    /// Byte offset in the ring's memory (its header included).
    pub offset: u64,
    /// Length in bytes.
    pub len: u32,
}

/// What is written.
#[derive(Debug)]
pub enum Source {
    /// Memory of its own; comes back with the completion.
    Owned(AlignedBuffer),
    /// One run of ring memory.
    Ring(RingSpan),
    /// Several runs of ring memory, gathered in order (at most [`GATHER_SPANS_MAX`]).
    Gather(Vec<RingSpan>),
}

/// Most runs in one [`Source::Gather`].
pub const GATHER_SPANS_MAX: usize = 256;

/// One operation on a file. Offsets and lengths are bytes.
#[derive(Debug)]
pub enum Operation {
    /// Read into the buffer's whole length. A short result means end of file.
    Read {
        /// Which file.
        file: FileId,
        /// Where in the file.
        offset: u64,
        /// Filled from its start; comes back with the completion.
        buffer: AlignedBuffer,
    },
    /// Write all of the source. Never completes short: the implementation goes on until all is
    /// written or an error occurs.
    Write {
        /// Which file.
        file: FileId,
        /// Where in the file.
        offset: u64,
        /// What is written.
        source: Source,
        /// Durable at completion (RWF_DSYNC); covers this write alone.
        dsync: bool,
    },
    /// fdatasync: durable at completion is every write whose completion was seen before this was
    /// submitted.
    Sync {
        /// Which file.
        file: FileId,
    },
    /// Makes the range read as zero and frees its space where that is possible; writes zeroes
    /// where the file cannot punch with guaranteed zeroes.
    PunchHole {
        /// Which file.
        file: FileId,
        /// Where in the file.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// Makes the range read as zero, keeping its space allocated.
    WriteZeroes {
        /// Which file.
        file: FileId,
        /// Where in the file.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
}

/// The end of an [`Operation`].
#[derive(Debug)]
pub struct Completion {
    /// As submitted.
    pub token: Token,
    /// Bytes transferred (0 for syncs and zeroings), or the error.
    pub result: std::io::Result<usize>,
    /// The buffer of a read or of a write from owned memory.
    pub buffer: Option<AlignedBuffer>,
}

/// The storage of one group: its ring memory and its files.
///
/// Operations complete in any order. Nothing is promised about the order in which two operations
/// in flight take effect; who needs an order waits for the completion.
pub trait Storage {
    /// Starts an operation. It may be held back until the next [`Storage::poll`] or
    /// [`Storage::wait`]. Never fails: errors come as completions.
    fn submit(&mut self, token: Token, operation: Operation);

    /// An empty list for a [`Source::Gather`], with the memory of one that was written before where
    /// there is any.
    fn take_spans(&mut self) -> Vec<RingSpan> {
        Vec::new()
    }

    /// Hands out the completions that are there, without blocking.
    fn poll(&mut self, completions: &mut Vec<Completion>);

    /// Blocks until at least one completion is there. Used by recovery and shutdown only.
    ///
    /// # Errors
    /// When nothing more can ever complete (the simulated process was killed, or the ring of the
    /// kernel failed): the caller gives up at once.
    fn wait(&mut self, completions: &mut Vec<Completion>) -> std::io::Result<()>;

    /// Length in bytes of a file, as of now.
    ///
    /// # Errors
    /// The error of the operating system.
    fn file_len(&mut self, file: FileId) -> std::io::Result<u64>;

    /// The runs within `offset..offset + len` that are allocated in the file, in order, clipped to
    /// it, at most `runs_max` of them. Everything between two of them, and before the first, reads
    /// as zero. A file that cannot say (a block device) is one run. Blocks briefly.
    ///
    /// # Errors
    /// The error of the operating system.
    fn allocated(
        &mut self,
        file: FileId,
        offset: u64,
        len: u64,
        runs_max: usize,
    ) -> std::io::Result<Vec<Range<u64>>>;

    /// Length in bytes of ring memory, its header block included.
    fn ring_len(&self) -> usize;

    /// A view of ring memory. Panics if out of range.
    fn ring(&self, offset: usize, len: usize) -> &[u8];

    /// Copies bytes into ring memory. Survives a kill of this process from the moment it returns.
    fn ring_write(&mut self, offset: usize, bytes: &[u8]);

    /// Ring memory to be filled in place (a merge, a zeroed tail). As [`Storage::ring_write`].
    fn ring_mut(&mut self, offset: usize, len: usize) -> &mut [u8];

    /// Stores one aligned word with release ordering: whoever sees it, also in a process that
    /// maps the ring after this one was killed, sees all earlier stores.
    fn ring_store(&mut self, offset: usize, value: u64);

    /// Loads one aligned word with acquire ordering.
    fn ring_load(&self, offset: usize) -> u64;
}
