//! Group commit: bringing frames from the ring to the log and making them durable.
//!
//! One log write is in flight at a time: all frames that were closed meanwhile and lie one behind
//! the other in the log. A sync covers what was written when it was submitted. Always holds:
//! `durable ≤ written ≤ appended`; `durable` moves only when a sync, or a DSYNC write with nothing
//! unsynced before it, has succeeded; after the first error nothing moves any more.

use super::Engine;
use super::request::{LOG_SYNC_BOUNDS_NS, Now};
use super::ring::byte_offset;
use super::token::Purpose;
use crate::io::{FileId, GATHER_SPANS_MAX, Operation, RingSpan, Storage};
use afterimage_format::ids::{BLOCK_SIZE, Lsn};
use afterimage_format::ring_header::{
    LatchedOperation, NextToPersist, RING_DURABLE_WORD, RING_NEXT_WORD,
};
use afterimage_format::superblock::SUPERBLOCK_COPIES;
use std::io;

/// The part of the ring, one of so many, that is synced without being waited for.
const UNSYNCED_PART: usize = 8;
/// Flushes that come within so many log delays of another count as frequent.
const FLUSH_PAUSE_DELAYS: u64 = 10;

#[derive(Debug)]
pub(super) struct Commit {
    /// Everything up to here is durable in the log.
    pub(super) durable: Lsn,
    /// Everything up to here is written to the log.
    pub(super) written: Lsn,
    write: Option<LogWrite>,
    sync: Option<LogSync>,
    /// The next frame finds no room in the log.
    pub(super) blocked: bool,
    /// When the last sync was submitted.
    sync_started_ns: u64,
    /// Bytes written since then.
    unsynced_bytes: usize,
    /// When somebody last waited for the log to be durable.
    waited_for_ns: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
struct LogWrite {
    bytes: usize,
    dsync: bool,
    started_ns: u64,
}

#[derive(Clone, Copy, Debug)]
struct LogSync {
    /// What was written when it was submitted.
    covers: Lsn,
    started_ns: u64,
}

impl Commit {
    pub(super) fn new(durable: Lsn) -> Self {
        Self {
            durable,
            written: durable,
            write: None,
            sync: None,
            blocked: false,
            sync_started_ns: 0,
            unsynced_bytes: 0,
            waited_for_ns: None,
        }
    }
}

/// Byte offset in the log file of a block of its frame area.
pub(super) const fn log_offset(position: u64) -> u64 {
    (position + SUPERBLOCK_COPIES) * BLOCK_SIZE as u64
}

impl<S: Storage> Engine<S> {
    /// Somebody waits for a flush.
    fn flush_waits(&self) -> bool {
        self.waiters
            .first()
            .is_some_and(|lsn| lsn > self.commit.durable)
    }

    /// Everything is to become durable: nothing else goes on before.
    fn pressed(&self) -> bool {
        self.command.draining()
            // The ring makes room as long as destage has enough to do.
            || (self.writes.waits_for_room() && self.destage_level() == 0)
    }

    /// When the oldest record that is not durable has waited for the commit interval. A log that is
    /// further behind than that is not made faster by a sync after each of its writes: there is one in
    /// each interval.
    fn commit_due_ns(&self) -> Option<u64> {
        let frame = self.ring.oldest_above(self.commit.durable)?;
        let since = frame.opened_ns.max(self.commit.sync_started_ns);
        Some(since + self.config.commit_interval_ns)
    }

    pub(super) fn commit_deadline(&self) -> Option<u64> {
        if self.failure.log_errno != 0 {
            return None;
        }
        let write = self
            .ring
            .oldest_unsubmitted()
            .filter(|_| self.commit.write.is_none() && !self.commit.blocked)
            .map(|frame| frame.opened_ns + self.config.log_delay_ns);
        let sync = self
            .commit_due_ns()
            .filter(|_| self.commit.sync.is_none() && self.commit.written > self.commit.durable);
        [write, sync].into_iter().flatten().min()
    }

    pub(super) fn pump_commit(&mut self, now: Now) {
        if self.failure.log_errno != 0 {
            return;
        }
        if self.waiters.len() > 0 {
            self.commit.waited_for_ns = Some(now.monotonic_ns);
        }
        let pressed = self.pressed();
        self.start_log_write(now, pressed || self.flush_waits());
        self.start_log_sync(now, pressed);
    }

    fn start_log_write(&mut self, now: Now, urgent: bool) {
        if self.commit.write.is_some() {
            return;
        }
        let Some(oldest) = self.ring.oldest_unsubmitted() else {
            self.commit.blocked = false;
            return;
        };
        let write_blocks = self.config.log_write_bytes / BLOCK_SIZE as u32;
        let batch_blocks = if self.flushes_are_frequent(now) {
            write_blocks
        } else {
            self.config.log_batch_bytes / BLOCK_SIZE as u32
        };
        let due = urgent
            || now.monotonic_ns >= oldest.opened_ns + self.config.log_delay_ns
            || self.ring.unsubmitted_blocks(batch_blocks) >= batch_blocks;
        if !due {
            return;
        }
        let closed: u32 = self.ring.closed().map(super::ring::RingFrame::blocks).sum();
        if closed < write_blocks {
            self.close_frame();
        }
        let Some((first, frames)) = self.gather_frames(write_blocks) else {
            return;
        };
        self.ring.mark_writing(frames);
        let bytes: usize = self.spans.iter().map(|span| span.len as usize).sum();
        // A DSYNC write covers itself alone: it stands for a sync only if nothing before it waits
        // for one.
        let dsync = self.commit.written == self.commit.durable && self.waiters.len() > 0;
        let source = self.spans_source();
        self.commit.write = Some(LogWrite {
            bytes,
            dsync,
            started_ns: now.monotonic_ns,
        });
        self.status.log_writes += 1;
        self.storage.submit(
            Purpose::LogWrite.token(),
            Operation::Write {
                file: FileId::LOG,
                offset: log_offset(first),
                source,
                dsync,
            },
        );
    }

    /// The next flush comes soon: a log write just before it would have to be over before the one
    /// that makes everything durable, so that the flush would wait for two.
    fn flushes_are_frequent(&self, now: Now) -> bool {
        let after = self.config.log_delay_ns * FLUSH_PAUSE_DELAYS;
        self.commit
            .waited_for_ns
            .is_some_and(|at| now.monotonic_ns <= at + after)
    }

    /// The frames of the next log write: position of the first in the log, how many frames; their
    /// runs of ring memory are in `spans`. `None` if there is none or the log has no room.
    fn gather_frames(&mut self, enough_blocks: u32) -> Option<(u64, usize)> {
        let spans = &mut self.spans;
        spans.clear();
        let mut frames = 0;
        let mut blocks = 0;
        let mut first = None;
        let mut end = 0;
        let mut blocked = false;
        for frame in self.ring.closed() {
            if !self.space.fits(frame.place, u64::from(frame.blocks())) {
                blocked = frames == 0;
                break;
            }
            let joins = first.is_none()
                || (frame.place.distance == end
                    && frame.place.position != 0
                    && blocks < enough_blocks);
            if !joins {
                break;
            }
            let offset = byte_offset(frame.position) as u64;
            let len = frame.blocks() * BLOCK_SIZE as u32;
            let full = spans.len() == GATHER_SPANS_MAX;
            match spans.last_mut() {
                Some(last) if last.offset + u64::from(last.len) == offset => last.len += len,
                _ if full => break,
                _ => spans.push(RingSpan { offset, len }),
            }
            first.get_or_insert(frame.place.position);
            end = frame.place.distance + u64::from(frame.blocks());
            blocks += frame.blocks();
            frames += 1;
        }
        self.commit.blocked = blocked;
        first.map(|first| (first, frames))
    }

    fn start_log_sync(&mut self, now: Now, pressed: bool) {
        let Commit {
            durable, written, ..
        } = self.commit;
        if self.commit.sync.is_some() || written <= durable {
            return;
        }
        if self.commit.write.is_some_and(|write| write.dsync) {
            return;
        }
        let waited_for = self
            .waiters
            .first()
            .is_some_and(|lsn| lsn > durable && lsn <= written);
        let due = self
            .commit_due_ns()
            .is_some_and(|due| now.monotonic_ns >= due);
        // A sync for each write would slow the writes down. So there is one when nothing more can be
        // written, and before so much waits for it that destage has nothing left.
        let all_written = self.commit.write.is_none()
            && (self.commit.blocked || self.ring.oldest_unsubmitted().is_none());
        let much = self.commit.unsynced_bytes
            > self.ring.area_blocks() as usize / UNSYNCED_PART * BLOCK_SIZE;
        let room = self.waiters.len() == 0 && (much || (pressed && all_written));
        if !(waited_for || due || room) {
            return;
        }
        self.commit.unsynced_bytes = 0;
        self.commit.sync_started_ns = now.monotonic_ns;
        self.commit.sync = Some(LogSync {
            covers: written,
            started_ns: now.monotonic_ns,
        });
        self.storage.submit(
            Purpose::LogSync.token(),
            Operation::Sync { file: FileId::LOG },
        );
    }

    pub(super) fn log_written(&mut self, now: Now, result: io::Result<usize>) {
        let Some(write) = self.commit.write.take() else {
            return;
        };
        let last = self.ring.mark_written();
        match result {
            Ok(bytes) if bytes == write.bytes => {}
            Ok(_) => return self.log_failed(LatchedOperation::Write, None),
            Err(error) => return self.log_failed(LatchedOperation::Write, Some(&error)),
        }
        if self.failure.log_errno != 0 {
            return;
        }
        self.status.log_written_bytes += write.bytes as u64;
        let Some(last) = last else { return };
        self.commit.written = last;
        self.commit.unsynced_bytes += write.bytes;
        if write.dsync {
            self.commit.unsynced_bytes = 0;
            self.count_sync(now.monotonic_ns.saturating_sub(write.started_ns));
            self.advance_durable(last);
        }
    }

    pub(super) fn log_synced(&mut self, now: Now, result: io::Result<usize>) {
        let Some(sync) = self.commit.sync.take() else {
            return;
        };
        if let Err(error) = result {
            return self.log_failed(LatchedOperation::Sync, Some(&error));
        }
        if self.failure.log_errno != 0 {
            return;
        }
        self.count_sync(now.monotonic_ns.saturating_sub(sync.started_ns));
        self.advance_durable(sync.covers);
    }

    fn count_sync(&mut self, ns: u64) {
        self.status.log_syncs += 1;
        self.status.log_sync_ns += ns;
        self.status.log_sync_ns_max = self.status.log_sync_ns_max.max(ns);
        let bucket = LOG_SYNC_BOUNDS_NS.partition_point(|bound| *bound < ns);
        if let Some(count) = self.status.log_sync_buckets.get_mut(bucket) {
            *count += 1;
        }
    }

    fn advance_durable(&mut self, lsn: Lsn) {
        if lsn > self.commit.durable {
            self.commit.durable = lsn;
            self.ring.mark_durable(lsn);
            self.store_durable();
            self.release_waiters();
        }
    }

    /// Tells a successor, through the ring's header, what it need not look for in the ring.
    pub(super) fn store_durable(&mut self) {
        let durable = self.commit.durable;
        self.storage.ring_store(RING_DURABLE_WORD, durable.0);
        let next = match self.ring.oldest_above(durable) {
            Some(frame) => NextToPersist::new(frame.position, frame.start.number),
            None => NextToPersist::new(self.ring.head(), self.next_frame),
        };
        self.storage.ring_store(RING_NEXT_WORD, next.word());
    }
}
