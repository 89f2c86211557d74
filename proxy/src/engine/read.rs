//! Reads of clients and of passes: the newest of ring and backing.
//!
//! Always holds: what lies in the ring (or reads as zero) when a read is submitted is copied then;
//! only the rest comes from the backing, which has it since before the read was submitted. So a
//! version that goes from the ring to the backing meanwhile is never missed. A sync of a backing that
//! fails may have lost what was read over: reads in flight are then done again, and a pass's reads
//! that end during a sync wait for its outcome, for the replica would keep what is not so. (A
//! client's do not: the wait would be that of every sync.) A read of a pass knows whether a block was
//! changed while it was read from the backing; if none was, it has the content at exactly one LSN.

use super::Engine;
use super::block_map::BlockKey;
use super::event::{EngineEvent, Ticket};
use super::request::{PassRead, ReplyBody, RequestError, RequestId};
use super::ring::byte_offset;
use super::token::Purpose;
use crate::io::buffer::AlignedBuffer;
use crate::io::{FileId, Operation, Storage};
use afterimage_format::ids::{BLOCK_SHIFT, BLOCK_SIZE, DiskIndex, Lsn};
use slab::Slab;
use std::io;
use std::ops::Range;

const BLOCK: u64 = BLOCK_SIZE as u64;

/// Where the newest version of a block is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Newest {
    /// In this block of the ring's frame area.
    Ring(u32),
    /// Nowhere: it reads as zero.
    Zero,
    Backing,
}

#[derive(Debug, Default)]
pub(super) struct Reads {
    slots: Slab<ReadOp>,
    /// Reads that wait until the backing is whole again (`redo.rs`).
    held: Vec<usize>,
    /// Reads of passes that have ended during a sync of the backings, with the number of bytes.
    unsure: Vec<(usize, usize, AlignedBuffer)>,
    /// Reads of passes from the backings.
    passes: Vec<usize>,
    /// Lists of mixed reads that are over, for the next.
    lists: Vec<Vec<bool>>,
}

#[derive(Debug)]
struct ReadOp {
    what: Reader,
    disk: DiskIndex,
    first_block: u64,
    blocks: usize,
    /// Bytes within the disk, from the first block on.
    valid: usize,
    /// Copies of what was newer than the backing; the whole range long if there is any.
    side: Option<AlignedBuffer>,
    /// For each block whether `side` has it. Empty if `side` is `None`.
    in_side: Vec<bool>,
    /// What is being read may be older than what the backing was given: read it again.
    stale: bool,
}

#[derive(Clone, Copy, Debug)]
enum Reader {
    Client {
        id: RequestId,
        start: usize,
        len: usize,
    },
    Pass {
        ticket: Ticket,
        lsn: Lsn,
        overtaken: bool,
    },
}

impl ReadOp {
    /// Whether one of these blocks is being read from the backing.
    fn reads(&self, blocks: Range<u64>) -> bool {
        let from = blocks.start.max(self.first_block);
        let to = blocks.end.min(self.first_block + self.blocks as u64);
        (from..to).any(|block| {
            let index = (block - self.first_block) as usize;
            self.in_side.get(index).is_none_or(|has| !has)
        })
    }
}

impl Reads {
    pub(super) fn in_flight(&self) -> usize {
        self.slots.len()
    }

    /// A record changes these blocks: what a pass reads of them may become newer than its LSN.
    pub(super) fn overtake(&mut self, disk: DiskIndex, blocks: &Range<u64>) {
        for slot in &self.passes {
            let read = &mut self.slots[*slot];
            let touched = read.disk == disk && read.reads(blocks.clone());
            if let Reader::Pass { overtaken, .. } = &mut read.what {
                *overtaken |= touched;
            }
        }
    }

    fn insert(&mut self, read: ReadOp) -> usize {
        let of_pass = matches!(read.what, Reader::Pass { .. });
        let slot = self.slots.insert(read);
        if of_pass {
            self.passes.push(slot);
        }
        slot
    }

    fn remove(&mut self, slot: usize) -> ReadOp {
        let read = self.slots.remove(slot);
        if matches!(read.what, Reader::Pass { .. }) {
            self.passes.retain(|other| *other != slot);
        }
        read
    }

    /// A backing has lost writes: what is in flight may bring what was there before them.
    pub(super) fn distrust(&mut self) {
        for (_, read) in &mut self.slots {
            read.stale = true;
        }
    }
}

impl<S: Storage> Engine<S> {
    /// Where the newest version of a block is now.
    pub(super) fn newest(&self, disk: DiskIndex, block: u64) -> Newest {
        let version = self.map.get(BlockKey::new(disk, block));
        let zeroed = self.zeroes.get(disk, block);
        match (version, zeroed) {
            (Some(version), Some(zeroed)) if zeroed > version.lsn => Newest::Zero,
            (Some(version), _) => Newest::Ring(version.ring_block),
            (None, Some(_)) => Newest::Zero,
            (None, None) => Newest::Backing,
        }
    }

    pub(super) fn submit_read(&mut self, id: RequestId, disk: DiskIndex, offset: u64, len: u32) {
        let first_block = offset >> BLOCK_SHIFT;
        let len = len as usize;
        let start = (offset % BLOCK) as usize;
        let blocks = (start + len).div_ceil(BLOCK_SIZE);
        self.start_read(Reader::Client { id, start, len }, disk, first_block, blocks);
    }

    /// Reads whole blocks for a pass. Answered with [`EngineEvent::PassRead`].
    pub fn pass_read(&mut self, ticket: Ticket, disk: DiskIndex, first_block: u64, blocks: u32) {
        let lsn = self.ring.appended();
        let overtaken = !self.one_content_at(lsn);
        self.start_read(
            Reader::Pass {
                ticket,
                lsn,
                overtaken,
            },
            disk,
            first_block,
            blocks as usize,
        );
    }

    /// Whether no content came past the log that an LSN stands for as well as for the one before it.
    pub(super) fn one_content_at(&self, lsn: Lsn) -> bool {
        self.sinks()
            .iter()
            .all(|sink| sink.rebase_after < lsn || sink.rebase_after == Lsn::ZERO)
    }

    fn start_read(&mut self, what: Reader, disk: DiskIndex, first_block: u64, blocks: usize) {
        let mut buffer = self.pool.take(blocks * BLOCK_SIZE);
        let mut from_backing = 0;
        for index in 0..blocks {
            let at = index * BLOCK_SIZE;
            match self.newest(disk, first_block + index as u64) {
                Newest::Ring(ring_block) => buffer[at..at + BLOCK_SIZE]
                    .copy_from_slice(self.storage.ring(byte_offset(ring_block), BLOCK_SIZE)),
                Newest::Zero => buffer[at..at + BLOCK_SIZE].fill(0),
                Newest::Backing => from_backing += 1,
            }
        }
        if from_backing == 0 {
            self.finish_read(what, disk, first_block, Ok(buffer));
            return;
        }
        let disk_left =
            self.disk_sizes[usize::from(disk.0)].saturating_sub(first_block << BLOCK_SHIFT);
        let valid = usize::try_from(disk_left).map_or(buffer.len(), |left| left.min(buffer.len()));
        let (buffer, side, in_side) = if from_backing == blocks {
            (buffer, None, Vec::new())
        } else {
            let mut in_side = self.reads.lists.pop().unwrap_or_default();
            in_side.extend(
                (0..blocks)
                    .map(|index| self.newest(disk, first_block + index as u64) != Newest::Backing),
            );
            (self.pool.take(blocks * BLOCK_SIZE), Some(buffer), in_side)
        };
        let slot = self.reads.insert(ReadOp {
            what,
            disk,
            first_block,
            blocks,
            valid,
            side,
            in_side,
            stale: false,
        });
        if self.redo.is_some() {
            self.pool.give(buffer);
            self.reads.held.push(slot);
        } else {
            self.submit_backing_read(slot, buffer);
        }
    }

    fn submit_backing_read(&mut self, slot: usize, buffer: AlignedBuffer) {
        let read = &mut self.reads.slots[slot];
        read.stale = false;
        self.storage.submit(
            Purpose::Read(slot).token(),
            Operation::Read {
                file: FileId::backing(read.disk),
                offset: read.first_block << BLOCK_SHIFT,
                buffer,
            },
        );
    }

    /// The backing is whole again: what was held back is read.
    pub(super) fn release_held_reads(&mut self) {
        for slot in std::mem::take(&mut self.reads.held) {
            let buffer = self.pool.take(self.reads.slots[slot].blocks * BLOCK_SIZE);
            self.submit_backing_read(slot, buffer);
        }
    }

    /// The backing cannot be made whole for now.
    pub(super) fn fail_held_reads(&mut self) {
        for slot in std::mem::take(&mut self.reads.held) {
            let read = self.reads.remove(slot);
            if let Some(side) = read.side {
                self.pool.give(side);
            }
            let error = io::Error::from_raw_os_error(self.failure.backing_errno);
            self.finish_read(read.what, read.disk, read.first_block, Err(error));
        }
    }

    pub(super) fn read_done(
        &mut self,
        slot: usize,
        result: io::Result<usize>,
        buffer: Option<AlignedBuffer>,
    ) {
        let of_pass = |read: &ReadOp| matches!(read.what, Reader::Pass { .. });
        let waits = self.destage.syncing() && self.reads.slots.get(slot).is_some_and(of_pass);
        match (result, buffer) {
            (Ok(bytes), Some(buffer)) if waits => self.reads.unsure.push((slot, bytes, buffer)),
            (result, buffer) => self.read_counts(slot, result, buffer),
        }
    }

    /// The sync has ended, and if it failed everything read so far is stale.
    pub(super) fn settle_unsure_reads(&mut self) {
        for (slot, bytes, buffer) in std::mem::take(&mut self.reads.unsure) {
            self.read_counts(slot, Ok(bytes), Some(buffer));
        }
    }

    fn read_counts(
        &mut self,
        slot: usize,
        result: io::Result<usize>,
        buffer: Option<AlignedBuffer>,
    ) {
        let (Some(read), Some(mut buffer)) = (self.reads.slots.get(slot), buffer) else {
            return;
        };
        if read.stale && result.is_ok() {
            if self.redo.is_some() {
                self.pool.give(buffer);
                self.reads.held.push(slot);
            } else {
                self.submit_backing_read(slot, buffer);
            }
            return;
        }
        let read = self.reads.remove(slot);
        let result = match result {
            Ok(bytes) if bytes >= read.valid => Ok(()),
            Ok(bytes) => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                BackingShort {
                    disk: read.disk,
                    end: (read.first_block << BLOCK_SHIFT) + bytes as u64,
                },
            )),
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            self.status.backing_errors += 1;
            self.pool.give(buffer);
            if let Some(side) = read.side {
                self.pool.give(side);
            }
            self.finish_read(read.what, read.disk, read.first_block, Err(error));
            return;
        }
        buffer[read.valid..].fill(0);
        if let Some(side) = read.side {
            for (index, _) in read.in_side.iter().enumerate().filter(|(_, has)| **has) {
                let at = index * BLOCK_SIZE..(index + 1) * BLOCK_SIZE;
                buffer[at.clone()].copy_from_slice(&side[at]);
            }
            self.pool.give(side);
            let mut in_side = read.in_side;
            in_side.clear();
            self.reads.lists.push(in_side);
        }
        self.finish_read(read.what, read.disk, read.first_block, Ok(buffer));
    }

    fn finish_read(
        &mut self,
        what: Reader,
        disk: DiskIndex,
        first_block: u64,
        result: io::Result<AlignedBuffer>,
    ) {
        match what {
            Reader::Client { id, start, len } => {
                let result = match result {
                    Ok(buffer) => {
                        self.status.read_bytes += len as u64;
                        Ok(ReplyBody::Data { buffer, start, len })
                    }
                    Err(error) => {
                        tracing::error!(disk = disk.0, first_block, %error, "read of the backing failed");
                        Err(RequestError::Io)
                    }
                };
                self.reply(id, result);
            }
            Reader::Pass {
                ticket,
                lsn,
                overtaken,
            } => {
                let durable_after = self.ring.appended();
                let result = result.map(|data| PassRead {
                    disk,
                    first_block,
                    lsn,
                    durable_after,
                    overtaken,
                    data,
                });
                self.events.push(EngineEvent::PassRead { ticket, result });
            }
        }
    }
}

/// The backing ends before the disk does.
#[derive(Debug, thiserror::Error)]
#[error("the backing of disk {} ends at byte {end}, before the disk does", disk.0)]
struct BackingShort {
    disk: DiskIndex,
    end: u64,
}
