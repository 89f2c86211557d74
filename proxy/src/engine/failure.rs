//! What happens when the log or a backing fails.
//!
//! Always holds: the first error of the log is latched in the ring's header before anything else
//! happens, so that a successor knows it too; from then on no FLUSH succeeds on that log. With
//! `on_log_error = "detach"` everything that waits goes on waiting until the owner has stored a
//! durable marker beside every backing; then the backings stand in for the log. A failing backing
//! costs nothing that was answered: with `on_backing_error = "fail"` no more is taken until it works.

use super::event::{EngineError, EngineEvent};
use super::request::{Now, RequestError};
use super::waiters::Waiter;
use super::{Engine, OnBackingError, OnLogError};
use crate::io::Storage;
use afterimage_format::ring_header::{LatchedOperation, LogLatch, RING_LATCH_WORD};
use std::io;

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

#[derive(Debug, Default)]
pub(super) struct Failure {
    /// First error of the log; 0 while it is well.
    pub(super) log_errno: i32,
    /// Error of the backing that fails; 0 while all are well.
    pub(super) backing_errno: i32,
    /// The group runs without a log.
    pub(super) detached: bool,
    detach_wanted: bool,
}

/// The number of the operating system, EIO for an error without one.
pub(super) fn errno_of(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(EIO)
}

impl Failure {
    /// Whether durability can still be promised, now or later.
    pub(super) fn durability(&self) -> Result<(), RequestError> {
        if self.log_errno != 0 && !self.detach_wanted {
            return Err(RequestError::Io);
        }
        Ok(())
    }

    /// The log has failed and its marker is not stored yet.
    pub(super) fn detaching(&self) -> bool {
        self.log_errno != 0 && self.detach_wanted && !self.detached
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
            self.failure.detach_wanted = true;
            self.events.push(EngineEvent::DetachWanted);
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

    /// The owner has stored, durably, that this log may never be replayed: the group goes on
    /// without a log. Writes are answered when the backings have them durably.
    pub fn detach_marked(&mut self, now: Now) {
        if !self.failure.detaching() {
            return;
        }
        self.failure.detached = true;
        self.fail_commands();
        self.tick(now);
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
