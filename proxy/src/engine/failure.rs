//! What happens when the log or a backing fails.
//!
//! Always holds: the first error of the log is latched in the ring's header before anything else
//! happens, so that a successor knows it too; from then on no FLUSH succeeds on that log. A failing
//! backing costs nothing that was answered: with `on_backing_error = "fail"` no more is taken until it
//! works.
//!
//! With `on_log_error = "detach"` the backings come to stand in for the log, in steps ([`Detach`]).
//! Until the last of them nothing new is answered but reads, and the ring keeps every record that
//! the log has not durably. What a kill or a power cut leaves at each step stands in
//! `docs/durability.md`, "After the first error of the log".

use super::event::{EngineError, EngineEvent};
use super::request::{Now, RequestError};
use super::waiters::Waiter;
use super::{Engine, OnBackingError, OnLogError};
use crate::io::Storage;
use afterimage_format::ids::Lsn;
use afterimage_format::ring_header::{
    LatchedOperation, LogLatch, RING_LATCH_WORD, RING_MAGIC_WORD,
};
use std::io;

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

#[derive(Debug, Default)]
pub(super) struct Failure {
    /// First error of the log; 0 while it is well.
    pub(super) log_errno: i32,
    /// Error of the backing that fails; 0 while all are well.
    pub(super) backing_errno: i32,
    /// How far the group has come on its way from its log, where it may go on without one.
    detach: Option<Detach>,
    /// Why the markers could not be stored at the last attempt; 0 if they could.
    pub(super) marker_errno: i32,
    marker_wait_ns: u64,
}

/// From a log that failed to backings without one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Detach {
    /// What the log has durably is brought into the backings and synced: after the markers nobody
    /// may read it from the log any more.
    Settling,
    /// The owner stores the markers.
    Marking,
    /// It could not; it is asked again then.
    Retrying { at_ns: u64 },
    /// The markers are durable. What the ring alone has, up to here, is brought into the backings;
    /// a successor of this process would do it from the ring.
    HandingOver { until: Lsn },
    /// The backings have all that was answered, the ring is of no more use to a successor.
    Done,
}

/// The number of the operating system, EIO for an error without one.
pub(super) fn errno_of(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(EIO)
}

impl Failure {
    /// Whether durability can still be promised, now or later.
    pub(super) fn durability(&self) -> Result<(), RequestError> {
        if self.log_errno != 0 && self.detach.is_none() {
            return Err(RequestError::Io);
        }
        Ok(())
    }

    /// The log has failed and its markers are not stored yet.
    pub(super) fn detaching(&self) -> bool {
        self.detach.is_some() && !self.detached()
    }

    /// The owner has been asked for the markers and has not answered.
    pub(super) fn marking(&self) -> bool {
        self.detach == Some(Detach::Marking)
    }

    /// The group runs without a log.
    pub(super) fn detached(&self) -> bool {
        matches!(self.detach, Some(Detach::HandingOver { .. } | Detach::Done))
    }

    /// The backings have all that was answered before the group went on without its log.
    pub(super) fn handed_over(&self) -> bool {
        self.detach == Some(Detach::Done)
    }

    /// When the owner is asked for the markers again.
    pub(super) fn marker_deadline(&self) -> Option<u64> {
        match self.detach {
            Some(Detach::Retrying { at_ns }) => Some(at_ns),
            _ => None,
        }
    }

    /// What a write gets that the failing backing is in the way of.
    fn backing_error(&self) -> RequestError {
        if self.backing_errno == ENOSPC {
            RequestError::NoSpace
        } else {
            RequestError::Io
        }
    }

    /// Why a command cannot be carried out any more.
    pub(super) fn command_error(&self) -> EngineError {
        if self.log_errno == 0 {
            EngineError::ShuttingDown
        } else {
            EngineError::LogFailed {
                errno: self.log_errno,
            }
        }
    }
}

impl<S: Storage> Engine<S> {
    /// The first failed write or sync of the log. `None` stands for a write that ended short.
    pub(super) fn log_failed(&mut self, operation: LatchedOperation, error: Option<&io::Error>) {
        if self.failure.log_errno != 0 {
            return;
        }
        let errno = error.map_or(EIO, errno_of);
        let latch = LogLatch {
            errno: errno.unsigned_abs(),
            operation,
        };
        self.storage.ring_store(RING_LATCH_WORD, latch.word());
        self.failure.log_errno = errno;
        tracing::error!(
            errno,
            ?operation,
            durable = self.commit.durable.0,
            "the log failed; nothing is made durable in it any more"
        );
        self.events.push(EngineEvent::LogFailed { errno });
        if self.config.on_log_error == OnLogError::Detach {
            self.failure.detach = Some(Detach::Settling);
            return;
        }
        while let Some(waiter) = self.waiters.pop() {
            match waiter {
                Waiter::Request(id) => self.reply(id, Err(RequestError::Io)),
                Waiter::Event(ticket, _) => self.events.push(EngineEvent::Failed {
                    ticket,
                    error: EngineError::LogFailed { errno },
                }),
            }
        }
        self.fail_all_parts(RequestError::Io);
        self.fail_commands();
    }

    /// The owner has stored, durably and beside every backing, that this log may never be
    /// replayed: the group goes on without a log. Writes are answered when the backings have them
    /// durably.
    pub fn detach_marked(&mut self, now: Now) {
        if !self.failure.detaching() {
            return;
        }
        self.failure.marker_errno = 0;
        self.failure.detach = Some(Detach::HandingOver {
            until: self.ring.appended(),
        });
        self.fail_commands();
        self.tick(now);
    }

    /// The owner could not store the markers: it is asked again after a while. What waits goes on
    /// waiting.
    pub fn detach_failed(&mut self, now: Now, errno: i32) {
        if !self.failure.marking() {
            return;
        }
        let wait_ns = (self.failure.marker_wait_ns * 2).clamp(
            self.config.backing_retry_ns,
            self.config.backing_retry_max_ns,
        );
        self.failure.marker_errno = errno;
        self.failure.marker_wait_ns = wait_ns;
        self.failure.detach = Some(Detach::Retrying {
            at_ns: now.monotonic_ns + wait_ns,
        });
        self.tick(now);
    }

    /// Takes the next step away from the log. None after the end of a drain: the successor finds
    /// log and ring as they are.
    pub(super) fn pump_detach(&mut self, now: Now) {
        match self.failure.detach {
            Some(Detach::Settling) if self.settled() => self.want_markers(),
            Some(Detach::Retrying { at_ns }) if now.monotonic_ns >= at_ns => self.want_markers(),
            Some(Detach::HandingOver { until }) if self.destage.synced >= until => {
                // Before the first frame is given away: from here on the backings are newer than
                // what a successor would bring them from the ring.
                self.storage.ring_store(RING_MAGIC_WORD, 0);
                self.failure.detach = Some(Detach::Done);
                self.release_frames();
                self.release_waiters();
            }
            _ => {}
        }
    }

    fn want_markers(&mut self) {
        if self.command.draining() {
            return;
        }
        self.failure.detach = Some(Detach::Marking);
        self.events.push(EngineEvent::DetachWanted);
    }

    /// The backings have, durably, all that the log has durably.
    fn settled(&self) -> bool {
        self.destage.synced >= self.commit.durable
    }

    /// Why a write that finds no room will not get any, if that is so.
    pub(super) fn no_room_error(&self, now: Now) -> Option<RequestError> {
        let since = self.destage.failing_since_ns()?;
        if now.monotonic_ns.saturating_sub(since) < self.config.backing_patience_ns {
            return None;
        }
        Some(self.failure.backing_error())
    }

    /// Why no write is taken while a backing fails, if the guest is to know it at once.
    pub(super) fn refuses_for_a_backing(&self) -> Option<RequestError> {
        self.destage.failing_since_ns()?;
        (self.config.on_backing_error == OnBackingError::Fail).then(|| self.failure.backing_error())
    }
}
