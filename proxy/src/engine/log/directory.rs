//! A sparse map from LSNs to places in the log: about one entry for each MiB.
//!
//! Filled by the scan and by the engine as frames become durable; trimmed as the tail moves. Always
//! holds: entries are in order, and the frame that holds a given LSN is at or after the place that
//! [`Directory::locate`] returns.

use super::LogHead;
use afterimage_format::ids::Lsn;
use std::collections::VecDeque;

/// Blocks between two entries.
pub const DIRECTORY_STRIDE_BLOCKS: u64 = 256;

/// Where frames with certain LSNs are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directory {
    entries: VecDeque<LogHead>,
    blocks_since_entry: u64,
}

impl Directory {
    /// The directory of a log whose oldest frame is, or will be, at this place.
    #[must_use]
    pub fn new(start: LogHead) -> Self {
        Self {
            entries: VecDeque::from([start]),
            blocks_since_entry: 0,
        }
    }

    /// Notes a frame: `before` is the head that placed it, `blocks_taken` what it takes.
    pub fn note(&mut self, before: LogHead, blocks_taken: u64) {
        if self.blocks_since_entry >= DIRECTORY_STRIDE_BLOCKS {
            self.entries.push_back(before);
            self.blocks_since_entry = 0;
        }
        self.blocks_since_entry += blocks_taken;
    }

    /// The last noted place at or before the frame that holds this LSN. `None` if the LSN is older
    /// than everything in the log.
    #[must_use]
    pub fn locate(&self, lsn: Lsn) -> Option<LogHead> {
        let after = self.entries.partition_point(|entry| entry.lsn <= lsn);
        self.entries.get(after.checked_sub(1)?).copied()
    }

    /// Forgets what is before the new tail, which becomes the first entry.
    pub fn trim(&mut self, tail: LogHead) {
        while self
            .entries
            .front()
            .is_some_and(|entry| entry.lsn <= tail.lsn)
        {
            self.entries.pop_front();
        }
        if self.entries.is_empty() {
            self.blocks_since_entry = 0;
        }
        self.entries.push_front(tail);
    }

    /// Forgets the places from this head on: frames there are about to be written again.
    pub fn cut(&mut self, head: LogHead) {
        while self.entries.len() > 1 && self.entries.back().is_some_and(|e| e.lsn >= head.lsn) {
            self.entries.pop_back();
        }
        self.blocks_since_entry = 0;
    }

    /// The first entry at which at least this many blocks before it would be free.
    #[must_use]
    pub fn after_blocks(&self, blocks: u64, area_blocks: u64) -> Option<LogHead> {
        let tail = self.entries.front()?.as_tail();
        self.entries
            .iter()
            .find(|entry| entry.blocks_since(&tail, area_blocks) >= blocks)
            .copied()
    }

    /// Entries, for tests and inspection.
    pub fn iter(&self) -> impl Iterator<Item = &LogHead> {
        self.entries.iter()
    }
}
