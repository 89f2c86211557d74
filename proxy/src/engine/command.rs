//! What the owner of an engine asks besides requests: events, epochs, sinks, the end.

use super::Engine;
use super::event::{EngineError, EngineEvent, EventRecord, Ticket};
use super::request::Now;
use super::trim::Stored;
use crate::io::Storage;
use afterimage_format::chain::RecordChain;
use afterimage_format::epoch::EpochBody;
use afterimage_format::ids::{BLOCK_SIZE, DiskIndex, Epoch, Lsn};
use afterimage_format::op::Op;
use afterimage_format::segment::SinkId;
use afterimage_format::superblock::{SINKS_MAX, SinkState};
use afterimage_format::wire::Cursor;

#[derive(Debug, Default)]
pub(super) struct Commands {
    drain: Option<Ticket>,
    /// Everything is where it belongs; only the clean superblock is missing.
    wants_clean: bool,
    drained: bool,
    /// Epochs that are stored and have no record yet.
    epochs: Vec<(Ticket, Epoch)>,
}

impl Commands {
    /// No more writes are taken.
    pub(super) fn draining(&self) -> bool {
        self.drain.is_some() || self.drained
    }

    /// The drain is over.
    pub(super) fn drained(&self) -> bool {
        self.drained
    }

    pub(super) fn wants_clean(&self) -> bool {
        self.wants_clean
    }

    /// A superblock that is written now says clean. After a drain too: the tail still moves when a
    /// late acknowledgement comes.
    pub(super) fn leaves_clean(&self) -> bool {
        self.wants_clean || self.drained
    }

    pub(super) fn epoch_stored(&mut self, ticket: Ticket, epoch: Epoch) {
        self.epochs.push((ticket, epoch));
    }
}

impl<S: Storage> Engine<S> {
    /// Appends a record that changes no blocks: [`EngineEvent::Appended`] when it has its LSN and
    /// survives a kill, [`EngineEvent::Durable`] when it survives a power cut, or
    /// [`EngineEvent::Failed`].
    pub fn append_event(&mut self, now: Now, ticket: Ticket, event: EventRecord) {
        let error = if self.command.draining() {
            EngineError::ShuttingDown
        } else if event.body.len() > BLOCK_SIZE {
            EngineError::BodyTooLong(event.body.len())
        } else if self.failure.log_errno != 0 {
            self.failure.command_error()
        } else {
            self.submit_event(now, ticket, event);
            return;
        };
        self.events.push(EngineEvent::Failed { ticket, error });
    }

    /// Raises the epoch: durable in the superblock first, then a record of it.
    /// [`EngineEvent::Appended`] and [`EngineEvent::Durable`] are about that record.
    pub fn raise_epoch(&mut self, ticket: Ticket, epoch: Epoch) {
        if self.refuses_command(ticket) {
            return;
        }
        self.trim.set_epoch(epoch);
        self.trim.store(Stored::Epoch(ticket, epoch));
    }

    /// The sinks as the next superblock will have them.
    #[must_use]
    pub fn sinks(&self) -> &[SinkState] {
        self.trim.sinks()
    }

    /// Makes the group's sinks these, in this order. A sink that is new lacks everything, so it is
    /// dirty. [`EngineEvent::SinkStored`] when durable.
    pub fn set_sinks(&mut self, ticket: Ticket, ids: &[SinkId]) {
        if ids.len() > SINKS_MAX {
            let error = EngineError::UnknownSink(ids.len());
            self.events.push(EngineEvent::Failed { ticket, error });
            return;
        }
        if self.refuses_command(ticket) {
            return;
        }
        let dirty = self.ring.appended();
        let sinks = ids
            .iter()
            .map(|id| {
                let known = self.trim.sinks().iter().find(|sink| sink.id == *id);
                known.copied().unwrap_or(SinkState {
                    id: *id,
                    acked: Lsn::ZERO,
                    chain: RecordChain::default(),
                    dirty: Some(dirty),
                    rebase_after: dirty,
                    good_until: Lsn::ZERO,
                })
            })
            .collect();
        *self.trim.sinks_mut() = sinks;
        self.trim.store(Stored::Sink(ticket));
    }

    /// A sink has durably acknowledged everything up to `acked`. Reaches the disk with the next
    /// superblock; nothing is lost if it does not, since the sink says it again.
    pub fn sink_acked(&mut self, sink: SinkId, acked: Lsn, chain: RecordChain) {
        if let Some(state) = self
            .trim
            .sinks_mut()
            .iter_mut()
            .find(|state| state.id == sink)
            && acked >= state.acked
        {
            state.acked = acked;
            state.chain = chain;
        }
    }

    /// What a sink has durably, and what that means for its dirty flag: cleared when the sink's
    /// records build on a `complete` base and reach the dirty LSN, set when it has less than it
    /// had. `complete` is a base that began after what the sink's `rebase_after` says. True: [`EngineEvent::SinkStored`] or [`EngineEvent::Failed`] tells when the change is
    /// durable; false: nothing to wait for.
    ///
    /// # Errors
    /// The superblock has no such sink.
    pub fn report_acked(
        &mut self,
        ticket: Ticket,
        sink: SinkId,
        acked: Cursor,
        complete: bool,
    ) -> Result<bool, EngineError> {
        let known = self.trim.sinks().iter().find(|state| state.id == sink);
        let state = *known.ok_or(EngineError::UnknownSink(self.trim.sinks().len()))?;
        self.sink_acked(sink, acked.lsn, acked.chain);
        let change = if acked.lsn < state.acked && state.dirty.is_none() {
            // The log may be without it already.
            DirtyChange::Set
        } else if complete
            && (state.dirty.is_some_and(|dirty| acked.lsn >= dirty)
                || (state.rebase_after != Lsn::ZERO && acked.lsn > state.rebase_after))
        {
            // Complete up to here, so nothing that left the log before is missing.
            let begin = acked.lsn.next();
            DirtyChange::PassCommitted { begin }
        } else {
            return Ok(false);
        };
        self.sink_dirty(ticket, sink, change);
        Ok(true)
    }

    /// Sets or clears a sink's dirty flag. Cleared is what a pass that began after the dirty LSN
    /// has brought up to date: the caller names the pass's begin, and the flag stays if more has
    /// left the log since. [`EngineEvent::SinkStored`] when durable.
    pub fn sink_dirty(&mut self, ticket: Ticket, sink: SinkId, change: DirtyChange) {
        if self.refuses_command(ticket) {
            return;
        }
        let appended = self.ring.appended();
        let Some(index) = self.trim.sinks().iter().position(|state| state.id == sink) else {
            let error = EngineError::UnknownSink(self.trim.sinks().len());
            self.events.push(EngineEvent::Failed { ticket, error });
            return;
        };
        let state = &mut self.trim.sinks_mut()[index];
        match change {
            DirtyChange::Set => state.dirty = Some(appended),
            DirtyChange::PassCommitted { begin } => {
                if state.dirty.is_some_and(|dirty| begin > dirty) {
                    state.dirty = None;
                }
                // Not at the last record before it: that is what an older base reaches, too.
                if begin > state.rebase_after.next() {
                    (state.rebase_after, state.good_until) = (Lsn::ZERO, Lsn::ZERO);
                }
            }
        }
        self.trim.store(Stored::Sink(ticket));
    }

    /// Takes no more writes, brings everything to the backings durably and stores a clean
    /// superblock: [`EngineEvent::Drained`].
    pub fn drain(&mut self, ticket: Ticket) {
        if self.command.draining() {
            let error = EngineError::ShuttingDown;
            self.events.push(EngineEvent::Failed { ticket, error });
            return;
        }
        self.command.drain = Some(ticket);
    }

    fn refuses_command(&mut self, ticket: Ticket) -> bool {
        let refuses = self.command.draining() || self.failure.log_errno != 0;
        if refuses {
            let error = self.failure.command_error();
            self.events.push(EngineEvent::Failed { ticket, error });
        }
        refuses
    }

    /// Nothing that waits for a superblock will come.
    pub(super) fn fail_commands(&mut self) {
        let error = self.failure.command_error();
        for ticket in self.trim.take_tickets() {
            self.events.push(EngineEvent::Failed { ticket, error });
        }
    }

    /// Appends the records of epochs that are stored; ends a drain that is complete.
    pub(super) fn pump_commands(&mut self, now: Now) {
        for (ticket, epoch) in std::mem::take(&mut self.command.epochs) {
            let event = EventRecord {
                op: Op::Epoch,
                disk: DiskIndex(0),
                first_block: 0,
                block_count: 0,
                aux: 0,
                body: EpochBody { epoch }.encode(),
            };
            self.append_event(now, ticket, event);
        }
        let Some(ticket) = self.command.drain else {
            return;
        };
        if self.failure.log_errno != 0 && !self.failure.detached() {
            // Markers that are being stored are waited for, those that could not be are not: the
            // successor goes on from log and ring as they are. Neither is a backing that fails.
            let idle = self.destage_idle() || self.failure.backing_errno != 0;
            if !self.failure.marking() && idle {
                let error = self.failure.command_error();
                self.events.push(EngineEvent::Failed { ticket, error });
                self.command.drain = None;
                self.command.drained = true;
            }
            return;
        }
        let quiet = self.writes.is_idle()
            && self.waiters.len() == 0
            && self.redo.is_none()
            && self.destage_idle()
            && !self.destage.syncing()
            && self.destage.synced == self.ring.appended()
            && self.reads.in_flight() == 0
            && !self.edges.reads_in_flight();
        if !quiet {
            return;
        }
        self.command.wants_clean = true;
        if self.failure.detached() || self.trim.stored_clean(self.destage.synced) {
            self.command.wants_clean = false;
            self.command.drain = None;
            self.command.drained = true;
            self.events.push(EngineEvent::Drained { ticket });
        }
    }
}

/// What becomes of a sink's dirty flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirtyChange {
    /// The sink lacks something that the log does not hold any more.
    Set,
    /// A pass has committed at the sink.
    PassCommitted {
        /// LSN of its `PassBegin`.
        begin: Lsn,
    },
}
