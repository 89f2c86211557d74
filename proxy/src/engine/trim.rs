//! What lets records leave the log: the superblock and its tail.
//!
//! Always holds: a tail passes a frame only when the backings have it durably and every sink has
//! acknowledged it or is dirty in the *durable* superblock; space behind a tail is reused only when
//! the superblock that moved it is durable. One superblock is written at a time, as a DSYNC write
//! to the copy that is not the current one.

use super::Engine;
use super::event::{EngineError, EngineEvent, Ticket};
use super::token::Purpose;
use crate::io::buffer::AlignedBuffer;
use crate::io::{FileId, Operation, Source, Storage};
use afterimage_format::ids::{BLOCK_SIZE, Epoch, Lsn};
use afterimage_format::ring_header::LatchedOperation;
use afterimage_format::superblock::{SUPERBLOCK_COPIES, SinkState, Superblock, Tail};
use std::io;

#[derive(Debug)]
pub(super) struct Trim {
    /// The durable one.
    superblock: Superblock,
    /// On its way.
    pending: Option<Pending>,
    /// The sinks as the next superblock will have them.
    sinks: Vec<SinkState>,
    /// The epoch as the next superblock will have it.
    epoch: Epoch,
    /// Something besides the tail must be stored.
    changed: bool,
    /// Who waits for the next superblock, and for the one on its way.
    tickets: Vec<Stored>,
}

#[derive(Debug)]
struct Pending {
    superblock: Superblock,
    /// Distance of its tail, if that moves.
    tail_distance: Option<u64>,
    tickets: Vec<Stored>,
}

/// Whom to tell that something is stored.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stored {
    Sink(Ticket),
    Epoch(Ticket, Epoch),
}

impl Stored {
    fn ticket(self) -> Ticket {
        match self {
            Self::Sink(ticket) | Self::Epoch(ticket, _) => ticket,
        }
    }
}

impl Trim {
    pub(super) fn new(superblock: Superblock) -> Self {
        Self {
            pending: None,
            sinks: superblock.sinks.clone(),
            epoch: superblock.epoch,
            changed: false,
            tickets: Vec::new(),
            superblock,
        }
    }

    /// The durable superblock.
    pub(super) fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    pub(super) fn sinks(&self) -> &[SinkState] {
        &self.sinks
    }

    pub(super) fn sinks_mut(&mut self) -> &mut Vec<SinkState> {
        &mut self.sinks
    }

    /// Whether some sink may lack something of what the disks hold at this LSN.
    pub(super) fn some_sink_lacks(&self, appended: Lsn) -> bool {
        self.sinks.iter().any(|sink| {
            sink.dirty.is_some() || sink.rebase_after != Lsn::ZERO || sink.acked < appended
        })
    }

    pub(super) fn set_epoch(&mut self, epoch: Epoch) {
        self.epoch = epoch;
    }

    /// Has the next superblock written soon and `stored` told when it is durable.
    pub(super) fn store(&mut self, stored: Stored) {
        self.changed = true;
        self.tickets.push(stored);
    }

    /// Who waits for a superblock that will not come.
    pub(super) fn take_tickets(&mut self) -> Vec<Ticket> {
        let pending = self.pending.iter_mut().flat_map(|p| p.tickets.drain(..));
        pending
            .chain(self.tickets.drain(..))
            .map(Stored::ticket)
            .collect()
    }

    /// Whether the durable superblock is clean and says that all up to `synced` is destaged.
    pub(super) fn stored_clean(&self, synced: Lsn) -> bool {
        self.pending.is_none()
            && !self.changed
            && self.superblock.clean
            && self.superblock.destaged == synced
    }

    fn durably_dirty(&self, sink: &SinkState) -> Option<Lsn> {
        self.superblock
            .sinks
            .iter()
            .find(|stored| stored.id == sink.id)
            .and_then(|stored| stored.dirty)
    }

    /// How far the tail may go for this sink's sake.
    fn limit_of(&self, sink: &SinkState, pressure: bool) -> Lsn {
        match (sink.dirty, self.durably_dirty(sink)) {
            (Some(_), Some(_)) if pressure => Lsn(u64::MAX),
            (Some(dirty), Some(_)) => dirty.max(sink.acked),
            _ => sink.acked,
        }
    }
}

/// Of a log with so many blocks, how many may be in use before unshipped records have to go.
pub(super) const fn pressure_from(area_blocks: u64) -> u64 {
    area_blocks / 8 * 7
}

impl<S: Storage> Engine<S> {
    /// Writes a superblock if one is due.
    ///
    /// None after a drain: the clean superblock is the last word, and the storage may be closed.
    pub(super) fn pump_trim(&mut self) {
        if self.trim.pending.is_some() || self.failure.log_errno != 0 || self.command.drained() {
            return;
        }
        let area = self.space.area_blocks();
        let used = self.space.used_blocks();
        let pressure = self.commit.blocked || used > pressure_from(area);
        let extents = self.passable_extents(pressure);
        if extents == 0 && pressure {
            self.mark_dirty_sinks();
        }
        let idle = self.destage_idle() && self.destage.synced == self.ring.appended();
        let undestaged_stored = self.space.blocks_above(self.trim.superblock.destaged)
            - self.space.blocks_above(self.destage.synced);
        let tail_due = extents > 0 && (self.commit.blocked || used > area / 2 || idle);
        let destaged_due = (idle && self.destage.synced > self.trim.superblock.destaged)
            || undestaged_stored > area / 8;
        let clean = self.command.wants_clean() && !self.trim.stored_clean(self.destage.synced);
        if !(self.trim.changed || tail_due || destaged_due || clean) {
            return;
        }
        self.write_superblock(extents, self.command.leaves_clean());
    }

    /// How many extents of the log may leave it now.
    fn passable_extents(&self, pressure: bool) -> usize {
        let limit = |pressure| {
            self.trim
                .sinks
                .iter()
                .map(|sink| self.trim.limit_of(sink, pressure))
                .fold(self.destage.synced, Lsn::min)
        };
        let free = self.space.passable(limit(false), u64::MAX);
        if !pressure {
            return free;
        }
        // For the sake of room no more than necessary: down to three quarters, one extent at least.
        let first = self
            .space
            .extent(0)
            .map_or(0, |extent| extent.place.distance);
        let keep = self.space.area_blocks() / 4 * 3;
        let target = self.space.head().saturating_sub(keep).max(first + 1);
        free.max(self.space.passable(limit(true), target))
    }

    /// The log needs room that only sinks hold: their dirty flags come first, durably.
    fn mark_dirty_sinks(&mut self) {
        let Some(first) = self.space.extent(0).copied() else {
            return;
        };
        if first.last_lsn > self.destage.synced {
            return;
        }
        for sink in &mut self.trim.sinks {
            if sink.dirty.is_none() && sink.acked < first.last_lsn {
                tracing::warn!(
                    acked = sink.acked.0,
                    "the log is full of records that a sink lacks; it will need a pass"
                );
                sink.dirty = Some(Lsn(first.first_lsn.0 - 1).max(sink.acked));
                self.trim.changed = true;
            }
        }
    }

    fn write_superblock(&mut self, extents: usize, clean: bool) {
        let mut next = self.trim.superblock.clone();
        let mut tail_distance = None;
        if extents > 0 {
            let (tail, distance) = self.tail_behind(extents);
            let gone = Lsn(tail.lsn.0 - 1);
            for (index, sink) in self.trim.sinks.iter_mut().enumerate() {
                if let Some(dirty) = &mut sink.dirty
                    && gone > *dirty
                    && gone > sink.acked
                {
                    *dirty = gone;
                    self.events.push(EngineEvent::HistoryGap {
                        sink: index,
                        lsn: gone,
                    });
                }
            }
            next.tail = tail;
            tail_distance = Some(distance);
        }
        next.generation += 1;
        next.destaged = self.destage.synced;
        next.durable = self.commit.durable;
        next.epoch = self.trim.epoch;
        next.sinks.clone_from(&self.trim.sinks);
        next.clean = clean;
        let mut buffer = self.pool.take(BLOCK_SIZE);
        buffer.copy_from_slice(&next.encode());
        let offset = next.generation % SUPERBLOCK_COPIES * BLOCK_SIZE as u64;
        self.trim.changed = false;
        self.trim.pending = Some(Pending {
            superblock: next,
            tail_distance,
            tickets: std::mem::take(&mut self.trim.tickets),
        });
        self.status.superblock_writes += 1;
        self.storage.submit(
            Purpose::Superblock.token(),
            Operation::Write {
                file: FileId::LOG,
                offset,
                source: Source::Owned(buffer),
                dsync: true,
            },
        );
    }

    /// The tail when the first `extents` of the log have left it.
    fn tail_behind(&mut self, extents: usize) -> (Tail, u64) {
        if let Some(extent) = self.space.extent(extents) {
            let tail = Tail {
                position: extent.place.position,
                frame: extent.first_frame,
                lsn: extent.first_lsn,
                lap: extent.place.lap,
                previous_crc: extent.previous_crc,
            };
            return (tail, extent.place.distance);
        }
        // Nothing is left: where the open frame, or the next one, will go.
        let place = self.space.place_at(self.space.head());
        let (frame, lsn) = match self.ring.open_frame() {
            Some(open) => (open.start.number, open.start.first_lsn),
            None => (self.next_frame, self.ring.appended().next()),
        };
        let tail = Tail {
            position: place.position,
            frame,
            lsn,
            lap: place.lap,
            previous_crc: self.previous_crc,
        };
        (tail, place.distance)
    }

    pub(super) fn superblock_written(
        &mut self,
        result: io::Result<usize>,
        buffer: Option<AlignedBuffer>,
    ) {
        if let Some(buffer) = buffer {
            self.pool.give(buffer);
        }
        let Some(pending) = self.trim.pending.take() else {
            return;
        };
        match result {
            Ok(BLOCK_SIZE) if self.failure.log_errno == 0 => {}
            other => {
                let error = other.err();
                for stored in pending.tickets {
                    let error = EngineError::LogFailed {
                        errno: error.as_ref().map_or(5, super::failure::errno_of),
                    };
                    let ticket = stored.ticket();
                    self.events.push(EngineEvent::Failed { ticket, error });
                }
                self.log_failed(LatchedOperation::Write, error.as_ref());
                return;
            }
        }
        if let Some(distance) = pending.tail_distance {
            self.space.tail_durable(distance);
        }
        self.trim.superblock = pending.superblock;
        for stored in pending.tickets {
            match stored {
                Stored::Sink(ticket) => self.events.push(EngineEvent::SinkStored { ticket }),
                Stored::Epoch(ticket, epoch) => self.command.epoch_stored(ticket, epoch),
            }
        }
    }
}
