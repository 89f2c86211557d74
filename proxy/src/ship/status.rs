//! What shipping towards one sink is doing, for status, metrics and people.

use afterimage_format::ids::{Epoch, Lsn};
use afterimage_format::wire::Compared;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What the task is doing.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum SinkState {
    /// Not started yet.
    #[default]
    Idle,
    /// Connecting for the first time, or again after an end that was no fault of the sink's.
    Connecting,
    /// Sending a pass (and new records beside it): points before its end do not exist.
    Pass,
    /// Sending new records.
    Streaming,
    /// Waiting before the next attempt, or attempting it, after an error. It ends when the sink
    /// has answered: an attempt alone proves nothing, and may take long.
    Waiting,
    /// The sink refuses for a reason that an administrator must settle; tried again all the same,
    /// and left as [`Waiting`](Self::Waiting) is.
    Refused,
    /// Ended with the group.
    Stopped,
}

/// How far a pass is. Blocks are counted over what was allocated when it was last asked.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct PassProgress {
    /// LSN of its `PassBegin`.
    pub begin: Lsn,
    /// Allocated blocks that were looked at.
    pub blocks_done: u64,
    /// Allocated blocks still to come, as far as is known.
    pub blocks_left: u64,
    /// Blocks that were sent (those that are all zero are not).
    pub blocks_sent: u64,
}

/// A snapshot.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct SinkStatus {
    /// The sink's URL.
    pub url: String,
    /// What the task is doing.
    pub state: SinkState,
    /// Epoch of the session.
    pub epoch: Epoch,
    /// Last record that is durable at the sink.
    pub acked: Lsn,
    /// Wall clock of the primary when that record was written, nanoseconds since 1970: the moment
    /// to which the sink can restore, if its copy is complete. 0 while unknown.
    pub acked_record_ns: u64,
    /// The same of the last record that built on a complete copy: the moment to which the sink can
    /// restore, whatever came later. 0 while there was none.
    pub restorable_ns: u64,
    /// Last record that is durable in the log. Equal to `acked` when nothing is outstanding.
    pub durable: Lsn,
    /// Payload bytes read from the log or the disks and not acknowledged.
    pub unacked_bytes: u64,
    /// Bytes of segments sent, in all sessions.
    pub sent_bytes_total: u64,
    /// Payload bytes in them before compression.
    pub sent_payload_bytes_total: u64,
    /// Segments sent.
    pub sent_segments_total: u64,
    /// Sessions that began after the first.
    pub reconnects_total: u64,
    /// Passes that were begun because records were missing at the sink.
    pub gaps_total: u64,
    /// Times the sink was found with other content than ours under the same identity, or without
    /// what it had acknowledged.
    pub divergences_total: u64,
    /// The pass under way.
    pub pass: Option<PassProgress>,
    /// What the sink says came of comparing verify records.
    pub compared: Compared,
    /// Blocks that it found to differ, in all runs.
    pub mismatched_blocks_total: u64,
    /// Why the last session ended.
    pub last_error: Option<String>,
}

/// The status, shared between the task and whoever shows it.
#[derive(Clone, Default, Debug)]
pub struct StatusCell(Arc<Mutex<SinkStatus>>);

impl StatusCell {
    /// A cell for the sink with this URL.
    #[must_use]
    pub fn new(url: &str) -> Self {
        Self(Arc::new(Mutex::new(SinkStatus {
            url: url.to_owned(),
            ..SinkStatus::default()
        })))
    }

    /// The present status.
    #[must_use]
    pub fn get(&self) -> SinkStatus {
        self.lock().clone()
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut SinkStatus)) {
        change(&mut self.lock());
    }

    /// An attempt begins: news only to who does not know yet how the last one ended.
    pub(super) fn attempt(&self) {
        self.update(|s| {
            if !matches!(s.state, SinkState::Waiting | SinkState::Refused) {
                s.state = SinkState::Connecting;
            }
        });
    }

    /// What the sink says of verify records. Of one run it may say less than before, when it began
    /// anew.
    pub(super) fn compared(&self, now: Compared) {
        self.update(|s| {
            let before = match s.compared.run == now.run {
                true => s.compared.mismatched_blocks,
                false => 0,
            };
            s.mismatched_blocks_total += now.mismatched_blocks.saturating_sub(before);
            s.compared = now;
        });
    }

    fn lock(&self) -> MutexGuard<'_, SinkStatus> {
        // A snapshot of numbers stays usable whoever panicked while holding it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
