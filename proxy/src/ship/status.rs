//! What shipping towards one sink is doing, for status, metrics and people.

use afterimage_format::ids::{Epoch, Lsn};
use afterimage_format::wire::{Compared, Comparisons};
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
    /// Wall clock of the first record that was read and is not acknowledged: what the sink has is how
    /// things stood until then. 0 while there is none.
    pub outstanding_ns: u64,
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
    pub comparisons: Comparisons,
    /// Blocks that it found to differ, in all runs that ended since the task began.
    pub mismatched_blocks_total: u64,
    /// The run whose blocks were counted last, and how many; `None` before the sink said anything.
    counted: Option<(u64, u64)>,
    /// Why the last session ended.
    pub last_error: Option<String>,
}

/// The status, shared between the task and whoever shows it.
#[derive(Clone, Default, Debug)]
pub struct StatusCell(Arc<Mutex<SinkStatus>>);

impl SinkStatus {
    /// Blocks that are known to differ at the sink: those of the last run that ended there, until one
    /// ends that finds none, and those of a run that goes on.
    #[must_use]
    pub fn mismatched_blocks(&self) -> u64 {
        let Comparisons {
            finished, current, ..
        } = self.comparisons;
        finished.mismatched_blocks.max(current.mismatched_blocks)
    }

    /// What a run has come to at the sink: the result, once it is over there or can come no further.
    /// `last` is its last record.
    #[must_use]
    pub fn of_run(&self, run: u64, last: Lsn) -> Option<Compared> {
        let Comparisons {
            finished,
            current,
            looked,
        } = self.comparisons;
        if finished.run == run {
            return Some(finished);
        }
        let none = Compared {
            run,
            ..Compared::default()
        };
        let unfinished = if current.run == run { current } else { none };
        (looked >= last).then_some(unfinished)
    }
}

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

    /// What the sink says of verify records. What it knew before this task began is not counted
    /// again. Of one run it may say less than before, when it began anew.
    pub(super) fn compared(&self, now: Comparisons) {
        self.update(|s| {
            let known = (now.finished.run, now.finished.mismatched_blocks);
            let (run, counted) = *s.counted.get_or_insert(known);
            let newest: Compared = match now.current.run {
                0 => now.finished,
                _ => now.current,
            };
            let before = if run == newest.run { counted } else { 0 };
            let more = newest.mismatched_blocks.saturating_sub(before);
            s.mismatched_blocks_total = s.mismatched_blocks_total.saturating_add(more);
            s.counted = Some((newest.run, before + more));
            s.comparisons = now;
        });
    }

    fn lock(&self) -> MutexGuard<'_, SinkStatus> {
        // A snapshot of numbers stays usable whoever panicked while holding it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(run: u64, mismatched_blocks: u64, total: u64) -> Compared {
        Compared {
            run,
            ranges: 3,
            blocks: 100,
            mismatched_blocks,
            skipped: 0,
            total,
        }
    }

    fn said(finished: Compared, current: Compared, looked: u64) -> Comparisons {
        Comparisons {
            finished,
            current,
            looked: Lsn(looked),
        }
    }

    #[test]
    fn differences_are_counted_once_and_known_until_a_run_finds_none() {
        let none = Compared::default();
        let cell = StatusCell::new("");
        let seen = |cell: &StatusCell| {
            let status = cell.get();
            (status.mismatched_blocks_total, status.mismatched_blocks())
        };
        // Found by an earlier process: known, and not counted again.
        cell.compared(said(run(1, 5, 3), none, 10));
        assert_eq!(seen(&cell), (0, 5));
        // A run that has found nothing yet does not make it right.
        cell.compared(said(run(1, 5, 3), run(2, 0, 0), 20));
        assert_eq!(seen(&cell), (0, 5));
        cell.compared(said(run(1, 5, 3), run(2, 4, 0), 21));
        // The sink's process began the run anew.
        cell.compared(said(run(1, 5, 3), run(2, 1, 0), 20));
        cell.compared(said(run(2, 6, 3), none, 22));
        assert_eq!(seen(&cell), (6, 6));
        cell.compared(said(run(3, 0, 3), none, 30));
        assert_eq!(seen(&cell), (6, 0));
        cell.compared(said(run(4, 2, 3), none, 40));
        assert_eq!(seen(&cell), (8, 2));
    }

    #[test]
    fn a_run_that_cannot_end_any_more_is_over() {
        let none = Compared::default();
        let cell = StatusCell::new("");
        cell.compared(said(none, run(7, 0, 0), 30));
        assert_eq!(cell.get().of_run(7, Lsn(40)), None);
        // Its last record never came, and what lies behind it did.
        cell.compared(said(none, run(7, 0, 0), 41));
        let over = cell.get().of_run(7, Lsn(40)).expect("over");
        assert!(!over.is_over() && !over.is_whole());
        let never = cell.get().of_run(8, Lsn(40)).expect("over");
        assert_eq!((never.ranges, never.is_whole()), (0, false));
        cell.compared(said(run(7, 0, 3), none, 40));
        assert!(cell.get().of_run(7, Lsn(40)).expect("over").is_whole());
        // Another run's result is not this one's.
        assert_eq!(cell.get().of_run(9, Lsn(50)), None);
    }
}
