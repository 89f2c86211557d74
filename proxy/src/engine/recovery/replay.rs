//! Bringing the backings up to the log: the newest version of each block, sorted and joined.
//!
//! Works in batches of bounded memory: frames are read in order until a batch is full, then its
//! zeroings are done, then what was written over them; the next batch begins when all of that has
//! completed. Replaying any part again changes nothing, so a kill at any point does no harm.
//! Durable when the caller has synced the backings.

use super::RecoveryError;
use super::ring::RingFrame;
use crate::engine::blocking::{Blocking, StorageError};
use crate::engine::log::LogHead;
use crate::engine::log::reader::{ChainRules, LogReader, READAHEAD_SCAN, StorageSource};
use crate::io::buffer::AlignedBuffer;
use crate::io::{FileId, Operation, Source, Storage};
use afterimage_format::frame::{Descriptor, Entry};
use afterimage_format::ids::{BLOCK_SIZE, DiskIndex, Lsn};
use afterimage_format::op::Op;
use afterimage_format::superblock::DiskState;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// Most payload bytes in memory at once, one frame more or less.
const BATCH_BYTES_MAX: usize = 16 << 20;
/// Most zeroings in memory at once.
const BATCH_ZEROES_MAX: usize = 4096;
/// Longest joined write.
const WRITE_BLOCKS_MAX: usize = 256;

/// What was replayed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replayed {
    /// Records gone through.
    pub records: u64,
    /// Blocks written.
    pub blocks: u64,
    /// Ranges zeroed.
    pub zeroings: u64,
}

/// How far a replay is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReplayProgress {
    /// Bytes of the log whose content the backings have, synced or not.
    pub bytes_done: u64,
    /// Bytes of the log to be replayed.
    pub bytes_total: u64,
}

/// A range to be zeroed.
#[derive(Clone, Copy, Debug)]
struct Zeroing {
    disk: DiskIndex,
    first: u64,
    end: u64,
    keep_allocated: bool,
}

/// What is gathered before it goes to the backings.
#[derive(Default)]
struct Batch {
    /// Newest payload of each block, as an offset in `bytes`.
    blocks: BTreeMap<(DiskIndex, u64), usize>,
    zeroings: Vec<Zeroing>,
    bytes: Vec<u8>,
}

/// Replays `records`, reading the log from `start` on, which is at or before the frame of the first.
/// The log is durable to the last. `reached` is told up to where the log was written to the backings.
///
/// # Errors
/// The log cannot be read or changed meanwhile; a record is about what the disk does not have; a
/// backing cannot be written.
pub fn replay<S: Storage>(
    blocking: &mut Blocking<'_, S>,
    rules: ChainRules,
    log: FileId,
    start: LogHead,
    records: RangeInclusive<Lsn>,
    disks: &[DiskState],
    reached: &mut dyn FnMut(LogHead),
) -> Result<Replayed, RecoveryError> {
    let (from, until) = records.into_inner();
    let mut reader = LogReader::new(rules, start, READAHEAD_SCAN);
    let mut batch = Batch::default();
    let mut replayed = Replayed::default();
    loop {
        let mut source = StorageSource {
            blocking,
            file: log,
        };
        let Some(frame) = reader.next(&mut source, until)? else {
            break;
        };
        for entry in &frame.descriptor.entries {
            if entry.lsn < from || !entry.op.changes_blocks() {
                continue;
            }
            replayed.records += 1;
            if check_disk(entry, disks)? {
                batch.add(entry, Descriptor::payload_of(entry, frame.payload));
            }
        }
        if batch.is_full() {
            batch.flush(blocking, disks, &mut replayed)?;
            reached(reader.head());
        }
    }
    batch.flush(blocking, disks, &mut replayed)?;
    reached(reader.head());
    Ok(replayed)
}

/// Replays all records of frames that stand in the ring, in their order. `place` gives the index of
/// a disk in `disks`, or none if its records are to be left out.
///
/// # Errors
/// As [`replay`]; or what `place` says.
pub(super) fn replay_ring<S: Storage>(
    blocking: &mut Blocking<'_, S>,
    frames: &[RingFrame],
    disks: &[DiskState],
    place: &dyn Fn(DiskIndex) -> Result<Option<DiskIndex>, RecoveryError>,
) -> Result<Replayed, RecoveryError> {
    let mut batch = Batch::default();
    let mut replayed = Replayed::default();
    for frame in frames {
        for entry in &frame.entries {
            if !entry.op.changes_blocks() {
                continue;
            }
            let Some(disk) = place(entry.disk)? else {
                continue;
            };
            let entry = Entry { disk, ..*entry };
            if check_disk(&entry, disks)? {
                replayed.records += 1;
                let payload = frame.offset() + BLOCK_SIZE;
                let payload = blocking.ring(payload, frame.len() - BLOCK_SIZE);
                batch.add(&entry, Descriptor::payload_of(&entry, payload));
            }
        }
        if batch.is_full() {
            batch.flush(blocking, disks, &mut replayed)?;
        }
    }
    batch.flush(blocking, disks, &mut replayed)?;
    Ok(replayed)
}

/// Whether the record is to be replayed: not for a disk that was taken out of the group.
fn check_disk(entry: &Entry, disks: &[DiskState]) -> Result<bool, RecoveryError> {
    let beyond = RecoveryError::RecordBeyondDisk {
        lsn: entry.lsn,
        disk: entry.disk,
        first_block: entry.first_block,
        block_count: entry.block_count,
    };
    let Some(disk) = disks.get(usize::from(entry.disk.0)) else {
        return Err(beyond);
    };
    if entry.end_block() > disk.size.div_ceil(BLOCK_SIZE as u64) {
        return Err(beyond);
    }
    Ok(!disk.removed)
}

impl Batch {
    fn is_full(&self) -> bool {
        self.bytes.len() >= BATCH_BYTES_MAX || self.zeroings.len() >= BATCH_ZEROES_MAX
    }

    fn add(&mut self, entry: &Entry, payload: &[u8]) {
        if entry.op == Op::Write {
            let start = self.bytes.len();
            self.bytes.extend_from_slice(payload);
            for index in 0..u64::from(entry.block_count) {
                let at = start + index as usize * BLOCK_SIZE;
                self.blocks
                    .insert((entry.disk, entry.first_block + index), at);
            }
            return;
        }
        let (first, end) = (entry.first_block, entry.end_block());
        let covered = (entry.disk, first)..(entry.disk, end);
        let superseded: Vec<_> = self.blocks.range(covered).map(|(key, _)| *key).collect();
        for key in superseded {
            self.blocks.remove(&key);
        }
        self.zeroings.push(Zeroing {
            disk: entry.disk,
            first,
            end,
            keep_allocated: entry.op == Op::Zero,
        });
    }

    /// Zeroings first: what is left in `blocks` is newer than every zeroing that covers it.
    fn flush<S: Storage>(
        &mut self,
        blocking: &mut Blocking<'_, S>,
        disks: &[DiskState],
        replayed: &mut Replayed,
    ) -> Result<(), StorageError> {
        for zeroing in self.zeroings.drain(..) {
            let file = FileId::backing(zeroing.disk);
            let offset = zeroing.first * BLOCK_SIZE as u64;
            let end = byte_end(zeroing.end, disks, zeroing.disk);
            let len = end - offset;
            blocking.start(if zeroing.keep_allocated {
                Operation::WriteZeroes { file, offset, len }
            } else {
                Operation::PunchHole { file, offset, len }
            })?;
            replayed.zeroings += 1;
        }
        blocking.finish_all()?;
        let mut run: Vec<usize> = Vec::new();
        let mut run_start = (DiskIndex(0), 0);
        for (&(disk, block), &at) in &self.blocks {
            let joins = disk == run_start.0
                && block == run_start.1 + run.len() as u64
                && run.len() < WRITE_BLOCKS_MAX;
            if !joins && !run.is_empty() {
                write_run(blocking, disks, run_start, &run, &self.bytes)?;
                run.clear();
            }
            if run.is_empty() {
                run_start = (disk, block);
            }
            run.push(at);
        }
        if !run.is_empty() {
            write_run(blocking, disks, run_start, &run, &self.bytes)?;
        }
        blocking.finish_all()?;
        replayed.blocks += self.blocks.len() as u64;
        self.blocks.clear();
        self.bytes.clear();
        Ok(())
    }
}

/// Writes joined blocks; the last one of a disk whose size is no multiple of the block size in
/// part.
fn write_run<S: Storage>(
    blocking: &mut Blocking<'_, S>,
    disks: &[DiskState],
    (disk, first): (DiskIndex, u64),
    run: &[usize],
    bytes: &[u8],
) -> Result<(), StorageError> {
    let mut buffer = AlignedBuffer::new(run.len() * BLOCK_SIZE);
    for (block, &at) in buffer.chunks_exact_mut(BLOCK_SIZE).zip(run) {
        block.copy_from_slice(&bytes[at..at + BLOCK_SIZE]);
    }
    let offset = first * BLOCK_SIZE as u64;
    let end = byte_end(first + run.len() as u64, disks, disk);
    buffer.set_len((end - offset) as usize);
    blocking.start(Operation::Write {
        file: FileId::backing(disk),
        offset,
        source: Source::Owned(buffer),
        dsync: false,
    })
}

/// Byte behind the last of these blocks that the disk has.
fn byte_end(end_block: u64, disks: &[DiskState], disk: DiskIndex) -> u64 {
    (end_block * BLOCK_SIZE as u64).min(disks[usize::from(disk.0)].size)
}
