//! A base: what a pass gave, and everything that followed until the next.

use afterimage_format::chain::RecordChain;
use afterimage_format::checkpoint::{CheckpointKind, CheckpointTrigger};
use afterimage_format::checkpoint_confirm::CheckpointConfirmBody;
use afterimage_format::ids::{DiskIndex, Lsn};
use afterimage_format::layer::PassProgress;
use afterimage_format::segment::{PassEndBody, SegmentIndex};
use afterimage_format::wire::ActivePass;

use super::error::{Refusal, Warning};
use crate::index::Index;

/// A named recovery point.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Checkpoint {
    /// The record that is the point.
    pub lsn: Lsn,
    /// The primary's clock, nanoseconds since 1970.
    pub wall_ns: u64,
    /// How consistent it was meant to be.
    pub kind: CheckpointKind,
    /// What became of it, if it was meant to be application-consistent and the record that says so
    /// has come. Only what this confirms is application-consistent.
    pub confirm: Option<CheckpointConfirmBody>,
    /// What made it.
    pub trigger: CheckpointTrigger,
    /// Its label; empty for none.
    pub label: String,
    /// Bytes written since the base's first readable moment or the checkpoint before.
    pub changed_bytes: u64,
}

#[derive(Debug, Clone)]
pub(super) enum State {
    /// The pass is under way.
    Active(PassProgress),
    /// The pass was complete at this record.
    Complete(Lsn),
    /// The pass ended without what it promised.
    Dropped(Warning),
    /// Another pass took its place before its end.
    Abandoned,
}

/// From one `PassBegin` to the next.
#[derive(Debug, Clone)]
pub struct Base {
    /// LSN of the `PassBegin`: everything reads zero here unless said otherwise.
    pub begin: Lsn,
    /// Clock of the `PassBegin`.
    pub begin_wall_ns: u64,
    /// Whether records before it are missing for good.
    pub after_gap: bool,
    /// Last record of it that came, once the base after it has begun. With a gap between them this
    /// is not the record before that begin: what the gap swallowed is no point.
    pub last: Option<Lsn>,
    /// Named points, in order.
    pub checkpoints: Vec<Checkpoint>,
    /// Clock at the first readable record.
    pub readable_wall_ns: u64,
    /// Clock of the newest record.
    pub last_wall_ns: u64,
    /// Bytes that records wrote since the last checkpoint.
    pub(super) changed_bytes: u64,
    pub(super) index: Index,
    pub(super) state: State,
}

impl Base {
    pub(super) fn new(begin: Lsn, begin_wall_ns: u64, after_gap: bool) -> Self {
        Self {
            begin,
            begin_wall_ns,
            after_gap,
            last: None,
            checkpoints: Vec::new(),
            readable_wall_ns: 0,
            last_wall_ns: begin_wall_ns,
            changed_bytes: 0,
            index: Index::default(),
            state: State::Active(PassProgress {
                next: (0, 0),
                blocks: 0,
                chain: RecordChain::BASE,
                lsn_max: begin,
            }),
        }
    }

    /// First and last readable LSN, if any; `cursor` is the last record that is there.
    #[must_use]
    pub fn readable(&self, cursor: Lsn) -> Option<(Lsn, Lsn)> {
        let State::Complete(first) = self.state else {
            return None;
        };
        let last = self.last.unwrap_or(cursor);
        (first <= last).then_some((first, last))
    }

    /// The index of this base.
    #[must_use]
    pub const fn index(&self) -> &Index {
        &self.index
    }

    /// How far its pass is, while it is under way.
    #[must_use]
    pub fn active_pass(&self) -> Option<ActivePass> {
        let State::Active(progress) = &self.state else {
            return None;
        };
        Some(ActivePass {
            begin: self.begin,
            next_disk: DiskIndex(progress.next.0),
            next_block: progress.next.1,
            blocks: progress.blocks,
            chain: progress.chain,
        })
    }

    /// LSN of the record at which the pass was complete.
    #[must_use]
    pub const fn completed_at(&self) -> Option<Lsn> {
        match self.state {
            State::Complete(at) => Some(at),
            _ => None,
        }
    }

    /// Why the pass gives no base, if its end did not match.
    #[must_use]
    pub const fn dropped(&self) -> Option<&Warning> {
        match &self.state {
            State::Dropped(warning) => Some(warning),
            _ => None,
        }
    }

    /// Another base takes over; `last` is the last record that came before it.
    pub(super) fn close(&mut self, last: Lsn) {
        self.last = Some(last);
        if matches!(self.state, State::Active(_)) {
            self.state = State::Abandoned;
        }
    }

    /// Whether a pass segment goes on where the pass stands. `Ok(false)`: it is here already.
    pub(super) fn check_blocks(&self, segment: &SegmentIndex) -> Result<bool, Refusal> {
        let header = &segment.header;
        let State::Active(progress) = &self.state else {
            return Err(Refusal::NoSuchPass { pass: header.pass });
        };
        if header.chain_before != progress.chain {
            if header.chain_after == progress.chain {
                return Ok(false);
            }
            return Err(Refusal::PassOutOfStep { pass: header.pass });
        }
        let first = segment
            .entries
            .first()
            .map(|e| (e.record.disk.0, e.record.first_block));
        if first.is_some_and(|first| first < progress.next) {
            return Err(Refusal::PassOutOfStep { pass: header.pass });
        }
        Ok(true)
    }

    pub(super) fn add_blocks(&mut self, segment: &SegmentIndex) {
        let State::Active(progress) = &mut self.state else {
            return;
        };
        for entry in &segment.entries {
            let record = &entry.record;
            let count = u64::from(record.block_count);
            progress.next = (record.disk.0, record.first_block + count);
            progress.blocks += count;
        }
        progress.chain = segment.header.chain_after;
        progress.lsn_max = progress.lsn_max.max(segment.header.last_lsn);
    }

    /// The primary says that the pass is over.
    pub(super) fn finish(&mut self, body: &PassEndBody, at: Lsn, wall_ns: u64) -> Option<Warning> {
        let State::Active(progress) = &self.state else {
            return None;
        };
        let agrees =
            progress.blocks == body.blocks && progress.chain == body.chain && progress.lsn_max < at;
        if agrees {
            self.state = State::Complete(at);
            self.readable_wall_ns = wall_ns;
            self.changed_bytes = 0;
            return None;
        }
        let warning = Warning::PassMismatch {
            pass: self.begin,
            came: progress.blocks,
            promised: body.blocks,
        };
        self.state = State::Dropped(warning.clone());
        Some(warning)
    }
}
