//! After a failed sync of a backing nothing written since the last good one can be relied upon:
//! all of it is written again, from the log, in order, one operation at a time.
//!
//! Always holds: destage rests meanwhile, and so do reads from the backings, which might serve what
//! the device has lost; those that were in flight when the sync failed are read again. Every frame read from the log is checked. Ends with another sync.

use super::Engine;
use super::commit::log_offset;
use super::request::{Now, RequestError};
use super::ring::RecordInfo;
use super::token::Purpose;
use crate::io::buffer::AlignedBuffer;
use crate::io::{FileId, Operation, Source, Storage};
use afterimage_format::frame::{Descriptor, Entry, FrameError};
use afterimage_format::ids::{BLOCK_SHIFT, BLOCK_SIZE, DiskIndex, Lsn};
use afterimage_format::op::Op;
use std::collections::VecDeque;
use std::io;

#[derive(Debug)]
pub(super) struct Redo {
    /// The next record to write again.
    next: Lsn,
    /// The last one.
    to: Lsn,
    /// Frames read from the log, and where in them we are.
    read: Option<ReadFrames>,
    busy: Option<DiskIndex>,
    reading: bool,
}

#[derive(Debug)]
struct ReadFrames {
    bytes: AlignedBuffer,
    /// Where the next frame begins.
    next_frame: usize,
    /// Records of the present frame, each with the offset of its payload in `bytes`.
    records: VecDeque<(Entry, usize)>,
}

/// What was read from the log cannot be written again.
#[derive(Debug, thiserror::Error)]
enum RedoError {
    #[error("the log's frame with LSN {next} cannot be read back: {error}")]
    Frame { next: Lsn, error: FrameError },
    #[error("the log holds LSN {found} where LSN {next} belongs")]
    Order { next: Lsn, found: Lsn },
    #[error("the log ends within a frame, before LSN {next}")]
    Short { next: Lsn },
}

impl<S: Storage> Engine<S> {
    /// A backing's sync failed.
    pub(super) fn begin_redo(&mut self) {
        let next = self.destage.synced.next();
        tracing::warn!(
            from = next.0,
            to = self.destage.chosen_up_to().0,
            "a backing's sync failed; what was written since the last good one is written again"
        );
        self.edges.all_left_ring();
        self.reads.distrust();
        self.redo = Some(Redo {
            next,
            to: self.destage.chosen_up_to(),
            read: None,
            busy: None,
            reading: false,
        });
    }

    pub(super) fn pump_redo(&mut self, now: Now) {
        let Some(redo) = &self.redo else { return };
        if redo.busy.is_some()
            || redo.reading
            || self.destage.syncing()
            || !self.destage.none_in_flight()
            || self.destage.backing_off(now)
        {
            return;
        }
        self.destage.end_backoff();
        if let Err(error) = self.redo_step() {
            tracing::error!(%error, "a backing cannot be brought up to date from the log");
            self.redo_failed(
                now,
                DiskIndex(0),
                &io::Error::from(io::ErrorKind::InvalidData),
            );
        }
    }

    /// Starts the next operation, or ends the redo.
    fn redo_step(&mut self) -> Result<(), RedoError> {
        loop {
            let Some(redo) = &mut self.redo else {
                return Ok(());
            };
            if redo.next > redo.to {
                self.end_redo();
                return Ok(());
            }
            let Some(read) = &mut redo.read else {
                self.read_extent();
                return Ok(());
            };
            let Some((entry, payload)) = read.records.pop_front() else {
                let next = redo.next;
                if read.next_frame == read.bytes.len() {
                    if let Some(read) = redo.read.take() {
                        self.pool.give(read.bytes);
                    }
                } else {
                    read.decode_next(next)?;
                }
                continue;
            };
            if entry.lsn < redo.next {
                continue;
            }
            if entry.lsn > redo.next {
                let (next, found) = (redo.next, entry.lsn);
                return Err(RedoError::Order { next, found });
            }
            redo.next = entry.lsn.next();
            if !entry.op.changes_blocks() {
                continue;
            }
            redo.busy = Some(entry.disk);
            self.redo_record(&entry, payload);
            return Ok(());
        }
    }

    fn read_extent(&mut self) {
        let Some(redo) = &mut self.redo else { return };
        let Some(extent) = self
            .space
            .extent_of(redo.next)
            .and_then(|index| self.space.extent(index))
        else {
            return;
        };
        redo.reading = true;
        let bytes = usize::try_from(extent.blocks).expect("extents are small") * BLOCK_SIZE;
        let offset = log_offset(extent.place.position);
        let buffer = self.pool.take(bytes);
        self.storage.submit(
            Purpose::RedoRead.token(),
            Operation::Read {
                file: FileId::LOG,
                offset,
                buffer,
            },
        );
    }

    pub(super) fn redo_read_done(
        &mut self,
        now: Now,
        result: io::Result<usize>,
        buffer: Option<AlignedBuffer>,
    ) {
        let (Some(redo), Some(buffer)) = (&mut self.redo, buffer) else {
            return;
        };
        redo.reading = false;
        match result {
            Ok(bytes) if bytes == buffer.len() => {
                redo.read = Some(ReadFrames {
                    bytes: buffer,
                    next_frame: 0,
                    records: VecDeque::new(),
                });
            }
            Ok(_) => {
                self.pool.give(buffer);
                let error = io::Error::from(io::ErrorKind::UnexpectedEof);
                self.redo_failed(now, DiskIndex(0), &error);
            }
            Err(error) => {
                self.pool.give(buffer);
                self.redo_failed(now, DiskIndex(0), &error);
            }
        }
    }

    fn redo_record(&mut self, entry: &Entry, payload: usize) {
        let operation = if entry.op == Op::Write {
            let end = entry.first_block + u64::from(entry.block_count);
            let offset = entry.first_block << BLOCK_SHIFT;
            let disk_end = self.disk_sizes[usize::from(entry.disk.0)];
            let len = (end << BLOCK_SHIFT).min(disk_end).saturating_sub(offset);
            let len = usize::try_from(len).expect("a record is small");
            let mut buffer = self.pool.take(len);
            if let Some(read) = self.redo.as_ref().and_then(|redo| redo.read.as_ref()) {
                buffer.copy_from_slice(&read.bytes[payload..payload + len]);
            }
            Operation::Write {
                file: FileId::backing(entry.disk),
                offset,
                source: Source::Owned(buffer),
                dsync: false,
            }
        } else {
            self.zero_operation(&RecordInfo {
                op: entry.op,
                disk: entry.disk,
                first_block: entry.first_block,
                block_count: entry.block_count,
                ring_block: 0,
                pending: 0,
            })
        };
        self.storage.submit(Purpose::RedoWrite.token(), operation);
    }

    pub(super) fn redo_write_done(
        &mut self,
        now: Now,
        result: io::Result<usize>,
        buffer: Option<AlignedBuffer>,
    ) {
        if let Some(buffer) = buffer {
            self.pool.give(buffer);
        }
        let Some(disk) = self.redo.as_mut().and_then(|redo| redo.busy.take()) else {
            return;
        };
        self.destage.mark_unsynced(disk);
        if let Err(error) = result {
            self.redo_failed(now, disk, &error);
        }
    }

    /// The whole redo is tried again after a while.
    fn redo_failed(&mut self, now: Now, disk: DiskIndex, error: &io::Error) {
        self.backing_failed(now, disk, error);
        if let Some(redo) = &mut self.redo {
            redo.next = self.destage.synced.next();
            if let Some(read) = redo.read.take() {
                self.pool.give(read.bytes);
            }
        }
        self.fail_held_reads();
        self.fail_held_edges(RequestError::Io);
    }

    fn end_redo(&mut self) {
        self.redo = None;
        self.destage.resync();
        self.release_held_reads();
        self.release_held_edges();
    }
}

impl ReadFrames {
    /// Reads the frame at `next_frame` and checks all of it.
    fn decode_next(&mut self, next: Lsn) -> Result<(), RedoError> {
        let frame = |error| RedoError::Frame { next, error };
        let block = self
            .bytes
            .get(self.next_frame..self.next_frame + BLOCK_SIZE)
            .ok_or(RedoError::Short { next })?;
        let (header, _) = Descriptor::decode_header(block).map_err(frame)?;
        let end = self.next_frame + header.frame_blocks() as usize * BLOCK_SIZE;
        let bytes = self
            .bytes
            .get(self.next_frame..end)
            .ok_or(RedoError::Short { next })?;
        let descriptor = Descriptor::decode_frame(bytes).map_err(frame)?;
        for entry in descriptor.entries {
            let payload = self.next_frame + entry.payload_position as usize * BLOCK_SIZE;
            self.records.push_back((entry, payload));
        }
        self.next_frame = end;
        Ok(())
    }
}
