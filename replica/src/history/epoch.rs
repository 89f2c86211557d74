//! One epoch: the segments under its keys, in order.

use std::sync::Arc;

use afterimage_format::chain::RecordChain;
use afterimage_format::checkpoint_confirm::CheckpointConfirmBody;
use afterimage_format::ids::{BLOCK_SIZE, Epoch as EpochNumber, LogId, Lsn};
pub use afterimage_format::layer::SegmentEntry;
use afterimage_format::manifest::{DiskEntry, EpochEntry};
use afterimage_format::op::Op;
use afterimage_format::segment::{SegmentIndex, SegmentKind};
use afterimage_format::wire::{Cursor, Resume};

use super::base::{Base, Checkpoint};
use super::clock::{Clock, ClockEra};
use super::error::{Refusal, Warning};
use super::events::{Event, Events};
use super::sealing::{Layer, Mark, Sealed};
use crate::index::SegmentOrdinal;

/// What is to be done with a segment that is not refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Commit it under this sequence number, then apply it.
    Append {
        /// Its key within the epoch.
        sequence: u64,
    },
    /// All of it is here: acknowledge.
    Known,
    /// It ends within the segment of this number: compare the chain at its last record with what
    /// the stored one says there.
    Compare {
        /// The stored segment.
        sequence: u64,
    },
}

/// The history under one epoch.
#[derive(Debug, Clone)]
pub struct Epoch {
    /// Its number.
    pub number: EpochNumber,
    /// The log whose records it holds.
    pub log: LogId,
    /// Clock of the replica when it began.
    pub begun_ns: u64,
    /// Last record that is here.
    pub cursor: Cursor,
    /// Bases, oldest first.
    pub bases: Vec<Base>,
    /// Segments, in the order of their keys.
    pub segments: Vec<SegmentEntry>,
    /// The disk table: the newest manifest's of those under which this was the newest epoch.
    pub disks: Vec<DiskEntry>,
    /// Whether a terminator stands behind the last segment.
    pub ended: bool,
    next_sequence: u64,
    pub(super) clock: Clock,
    /// Where the last seal was.
    pub(super) mark: Mark,
    /// Sealed and not stored yet, oldest first.
    pub(super) sealed: Vec<Arc<Sealed>>,
    /// Stored layers, oldest first.
    pub(super) layers: Vec<Layer>,
    /// Parts of `sealed` that the first goes together with.
    pub(super) widened: usize,
}

impl Epoch {
    pub(super) fn new(entry: &EpochEntry, disks: &[DiskEntry]) -> Self {
        Self {
            number: entry.epoch,
            log: entry.log,
            begun_ns: entry.begun_ns,
            cursor: Cursor::default(),
            bases: Vec::new(),
            segments: Vec::new(),
            disks: disks.to_vec(),
            ended: false,
            next_sequence: entry.first_seq,
            clock: Clock::default(),
            mark: Mark::default(),
            sealed: Vec::new(),
            layers: Vec::new(),
            widened: 0,
        }
    }

    /// The key at which the epoch goes on.
    #[must_use]
    pub const fn next_sequence(&self) -> u64 {
        self.next_sequence
    }

    pub(super) const fn set_next_sequence(&mut self, sequence: u64) {
        self.next_sequence = sequence;
    }

    /// The segment of this key.
    #[must_use]
    pub fn segment(&self, sequence: u64) -> Option<&SegmentEntry> {
        let at = self
            .segments
            .partition_point(|segment| segment.sequence < sequence);
        self.segments
            .get(at)
            .filter(|segment| segment.sequence == sequence)
    }

    /// Clock eras, in order.
    #[must_use]
    pub fn eras(&self) -> &[ClockEra] {
        &self.clock.eras
    }

    /// Where a primary of this epoch goes on.
    #[must_use]
    pub fn resume(&self) -> Resume {
        // The records up to the cursor build on the newest base: that an older one is complete helps
        // nobody behind the gap.
        let base = self.bases.last();
        let completed = base.filter(|base| base.completed_at().is_some());
        Resume {
            epoch: self.number,
            cursor: self.cursor,
            completed_pass: completed.map_or(Lsn::ZERO, |base| base.begin),
            active_pass: base.and_then(Base::active_pass),
        }
    }

    /// Decides on a segment whose bytes were verified. Changes nothing.
    ///
    /// # Errors
    /// Why it does not belong here.
    pub fn check(&self, segment: &SegmentIndex) -> Result<Verdict, Refusal> {
        let header = &segment.header;
        if (header.epoch, header.log) != (self.number, self.log) {
            let (group, epoch, log) = (header.group, header.epoch, header.log);
            return Err(Refusal::Foreign { group, epoch, log });
        }
        let append = Verdict::Append {
            sequence: self.next_sequence,
        };
        if header.kind == SegmentKind::Pass {
            let base = self.bases.last().filter(|base| base.begin == header.pass);
            let base = base.ok_or(Refusal::NoSuchPass { pass: header.pass })?;
            return Ok(if base.check_blocks(segment)? {
                append
            } else {
                Verdict::Known
            });
        }
        let (first, last, cursor) = (header.first_lsn, header.last_lsn, self.cursor.lsn);
        if first > cursor {
            return self.check_continuation(segment).map(|()| append);
        }
        let diverged = Refusal::Diverged { first, last };
        if last >= cursor {
            let overlap = (cursor.0 - first.0 + 1) as usize;
            if chain_at(segment, overlap) != self.cursor.chain {
                return Err(diverged);
            }
            return Ok(if last == cursor {
                Verdict::Known
            } else {
                append
            });
        }
        match self.log_segment_with(last) {
            Some(held) if held.last_lsn == last && held.chain_after == header.chain_after => {
                Ok(Verdict::Known)
            }
            Some(held) if held.last_lsn > last => Ok(Verdict::Compare {
                sequence: held.sequence,
            }),
            _ => Err(diverged),
        }
    }

    fn check_continuation(&self, segment: &SegmentIndex) -> Result<(), Refusal> {
        let header = &segment.header;
        let (first, cursor) = (header.first_lsn, self.cursor.lsn);
        if header.flags.declares_gap {
            let begins = header.pass == first && header.chain_before == RecordChain::BASE;
            return if begins {
                Ok(())
            } else {
                Err(Refusal::GapWithoutPass { first })
            };
        }
        if first != cursor.next() {
            return Err(Refusal::Gap { first, cursor });
        }
        if header.chain_before != self.cursor.chain {
            return Err(Refusal::Diverged {
                first: Lsn(1),
                last: cursor,
            });
        }
        Ok(())
    }

    /// The log segment here that holds a record; of several the last, which has the longest say.
    fn log_segment_with(&self, lsn: Lsn) -> Option<&SegmentEntry> {
        let holds = |s: &&SegmentEntry| {
            s.kind == SegmentKind::Log && s.first_lsn <= lsn && lsn <= s.last_lsn
        };
        self.segments.iter().rev().find(holds)
    }

    /// Takes a committed segment in. `check` has said [`Verdict::Append`] for it in this state.
    pub fn apply(&mut self, segment: &SegmentIndex, events: &Events) -> Vec<Warning> {
        let header = &segment.header;
        let ordinal = SegmentOrdinal(self.next_sequence as u32);
        self.segments.push(SegmentEntry {
            sequence: self.next_sequence,
            kind: header.kind,
            first_lsn: header.first_lsn,
            last_lsn: header.last_lsn,
            chain_after: header.chain_after,
            index_hash: segment.footer.index_hash,
            stored_bytes: segment.footer.total_len,
            wall_min_ns: segment
                .entries
                .iter()
                .map(|e| e.record.wall_ns)
                .min()
                .unwrap_or(0),
            has_verify: segment.entries.iter().any(|e| e.record.op == Op::Verify),
        });
        self.next_sequence += 1;
        if header.kind == SegmentKind::Pass {
            if let Some(base) = self.bases.last_mut() {
                base.index.add(ordinal, segment, 0);
                base.add_blocks(segment);
            }
            return Vec::new();
        }
        let warnings = self.apply_log(ordinal, segment, events);
        self.cursor = Cursor {
            lsn: header.last_lsn,
            chain: header.chain_after,
        };
        warnings
    }

    fn apply_log(
        &mut self,
        ordinal: SegmentOrdinal,
        segment: &SegmentIndex,
        events: &Events,
    ) -> Vec<Warning> {
        let header = &segment.header;
        let count = segment.entries.len();
        // Records that a segment before this one brought are not taken twice.
        let known =
            (self.cursor.lsn.next().0.saturating_sub(header.first_lsn.0) as usize).min(count);
        let known = if header.first_lsn > self.cursor.lsn {
            0
        } else {
            known
        };
        let mut warnings = Vec::new();
        let mut jumped = self.clock.anchor(header.anchor);
        let mut from = known;
        for (at, entry) in segment.entries.iter().enumerate().skip(known) {
            let record = &entry.record;
            self.clock
                .record(record.lsn, record.wall_ns, std::mem::take(&mut jumped));
            if record.op == Op::PassBegin && record.lsn == header.pass {
                if let Some(base) = self.bases.last_mut() {
                    base.index.add_part(ordinal, segment, from, at);
                    base.close(if at == 0 {
                        self.cursor.lsn
                    } else {
                        Lsn(record.lsn.0 - 1)
                    });
                }
                from = at;
                let cursor = self.cursor.lsn;
                let after_gap = cursor > Lsn::ZERO && header.first_lsn > cursor.next();
                self.bases
                    .push(Base::new(record.lsn, record.wall_ns, after_gap));
            }
            let Some(base) = self.bases.last_mut() else {
                continue;
            };
            base.last_wall_ns = record.wall_ns;
            if record.op.changes_blocks() {
                base.changed_bytes += u64::from(record.block_count) * BLOCK_SIZE as u64;
            }
            match (record.op, events.at(at)) {
                (Op::PassEnd, Some(Event::PassEnd(body))) if body.begin == base.begin => {
                    warnings.extend(base.finish(body, record.lsn, record.wall_ns));
                }
                (Op::Checkpoint, Some(Event::Checkpoint(body))) => {
                    base.checkpoints.push(Checkpoint {
                        lsn: record.lsn,
                        wall_ns: record.wall_ns,
                        kind: body.kind,
                        confirm: None,
                        trigger: body.trigger,
                        label: body.label.clone(),
                        changed_bytes: std::mem::take(&mut base.changed_bytes),
                    });
                }
                (Op::CheckpointConfirm, Some(Event::Confirm(body)))
                    if body.checkpoint < record.lsn =>
                {
                    self.mark.confirms.push(body.clone());
                    self.confirm(body);
                }
                _ => {}
            }
        }
        if let Some(base) = self.bases.last_mut() {
            base.index.add_part(ordinal, segment, from, count);
        }
        warnings
    }

    /// Keeps what became of a checkpoint: the first word about it, whichever base it stands in.
    pub(super) fn confirm(&mut self, body: &CheckpointConfirmBody) {
        for base in self.bases.iter_mut().rev() {
            let found = base
                .checkpoints
                .binary_search_by_key(&body.checkpoint, |point| point.lsn);
            if let Ok(at) = found {
                base.checkpoints[at]
                    .confirm
                    .get_or_insert_with(|| body.clone());
                return;
            }
        }
    }
}

/// Record chain of a segment after its first `records` records.
pub(crate) fn chain_at(segment: &SegmentIndex, records: usize) -> RecordChain {
    let records = segment.entries.iter().take(records);
    records.fold(segment.header.chain_before, |chain, entry| {
        chain.extend(&entry.record)
    })
}

/// Checks that every record stays within the disk table.
///
/// # Errors
/// The first that does not.
pub fn check_disks(segment: &SegmentIndex, disks: &[DiskEntry]) -> Result<(), Refusal> {
    for entry in &segment.entries {
        let record = &entry.record;
        if !record.op.changes_blocks() {
            continue;
        }
        let blocks = disks
            .get(usize::from(record.disk.0))
            .map_or(0, |disk| disk.size_bytes.div_ceil(BLOCK_SIZE as u64));
        if record.first_block + u64::from(record.block_count) > blocks {
            return Err(Refusal::OutOfDisk {
                lsn: record.lsn,
                disk: record.disk.0,
            });
        }
    }
    Ok(())
}
