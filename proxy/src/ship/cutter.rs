//! Cuts the stream of records into segments.
//!
//! Owns: the segment under construction, and the place in the record chain. Always holds: records
//! go in without a hole, from the cursor on or from a declared base on; every segment continues
//! the chain of the one before. A segment is closed at 8 MiB of payload, when its first record is
//! `ship_interval` old, behind a checkpoint, epoch or pass record, and where the clock's boot
//! changes. Time is an input.
#![deny(clippy::disallowed_methods)]

use super::source::Record;
use afterimage_format::chain::RecordChain;
use afterimage_format::ids::{Epoch, GroupId, LogId, Lsn};
use afterimage_format::op::Op;
use afterimage_format::segment::{
    ClockAnchor, PushError, SEGMENT_PAYLOAD_TARGET, SealedSegment, SegmentBuilder, SegmentFlags,
    SegmentKind, SegmentSpec,
};
use afterimage_format::wire::Cursor;
use std::collections::VecDeque;

/// Whose records are cut, and under which reign.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stream {
    /// The group.
    pub group: GroupId,
    /// Its log.
    pub log: LogId,
    /// The epoch agreed with the sink.
    pub epoch: Epoch,
}

impl Stream {
    /// The beginning of a segment of this stream.
    #[must_use]
    pub fn spec(&self, kind: SegmentKind, chain_before: RecordChain) -> SegmentSpec {
        SegmentSpec {
            kind,
            flags: SegmentFlags::default(),
            group: self.group,
            epoch: self.epoch,
            log: self.log,
            pass: Lsn::ZERO,
            chain_before,
            anchor: ClockAnchor::default(),
        }
    }
}

/// A log segment that is ready to go.
#[derive(Clone, Debug)]
pub struct CutSegment {
    /// The segment.
    pub sealed: SealedSegment,
    /// Wall clock of its first record.
    pub first_wall_ns: u64,
    /// Wall clock of its last record.
    pub last_wall_ns: u64,
}

struct Open {
    builder: SegmentBuilder,
    since_ns: u64,
    first_wall_ns: u64,
    last_wall_ns: u64,
}

/// The cutter of one session.
pub struct Cutter {
    stream: Stream,
    interval_ns: u64,
    cursor: Cursor,
    /// The `PassBegin` that the next record must be.
    base: Option<Lsn>,
    open: Option<Open>,
}

impl Cutter {
    /// A cutter that goes on behind `cursor`.
    #[must_use]
    pub fn new(stream: Stream, cursor: Cursor, interval_ns: u64) -> Self {
        Self {
            stream,
            interval_ns,
            cursor,
            base: None,
            open: None,
        }
    }

    /// Goes on at the `PassBegin` record `begin` with a declared gap before it and a new chain.
    /// Records not yet closed into a segment are dropped: they lie before the base.
    pub fn begin_base(&mut self, begin: Lsn) {
        self.open = None;
        self.base = Some(begin);
        self.cursor = Cursor {
            lsn: Lsn(begin.0.saturating_sub(1)),
            chain: RecordChain::BASE,
        };
    }

    /// The record that must come next.
    #[must_use]
    pub fn next(&self) -> Lsn {
        self.cursor.lsn.next()
    }

    /// Payload bytes of the segment under construction.
    #[must_use]
    pub fn open_bytes(&self) -> usize {
        self.open
            .as_ref()
            .map_or(0, |open| open.builder.payload_bytes())
    }

    /// Wall clock of the first record of the segment under construction.
    #[must_use]
    pub fn first_wall_ns(&self) -> Option<u64> {
        self.open.as_ref().map(|open| open.first_wall_ns)
    }

    /// Another interval, for the open segment too.
    pub fn set_interval(&mut self, interval_ns: u64) {
        self.interval_ns = interval_ns;
    }

    /// When [`tick`](Self::tick) would close the open segment.
    #[must_use]
    pub fn deadline_ns(&self) -> Option<u64> {
        self.open
            .as_ref()
            .map(|open| open.since_ns.saturating_add(self.interval_ns))
    }

    /// Takes the next record. Closed segments go to `out`.
    ///
    /// # Errors
    /// The record is not the next one, is malformed, or is not the `PassBegin` of the base.
    pub fn push(
        &mut self,
        anchor: ClockAnchor,
        record: &Record,
        now_ns: u64,
        out: &mut VecDeque<CutSegment>,
    ) -> Result<(), PushError> {
        let meta = &record.meta;
        let base = self.base.filter(|_| self.open.is_none());
        let right_base = base.is_none_or(|begin| begin == meta.lsn && meta.op == Op::PassBegin);
        if meta.lsn != self.next() || !right_base {
            return Err(PushError::Order(meta.lsn));
        }
        let same_boot = |open: &Open| open.builder.spec().anchor.boot_id == anchor.boot_id;
        if !self.open.as_ref().is_none_or(same_boot) {
            self.close(out);
        }
        let mut pushed = self
            .open(anchor, now_ns)
            .builder
            .push(meta, &record.payload);
        if pushed == Err(PushError::Full) {
            self.close(out);
            pushed = self
                .open(anchor, now_ns)
                .builder
                .push(meta, &record.payload);
        }
        pushed?;
        self.base = None;
        let open = self.open(anchor, now_ns);
        if open.builder.record_count() == 1 {
            open.first_wall_ns = meta.wall_ns;
        }
        open.last_wall_ns = meta.wall_ns;
        let chain = open.builder.chain();
        let full = open.builder.payload_bytes() >= SEGMENT_PAYLOAD_TARGET;
        self.cursor = Cursor {
            lsn: meta.lsn,
            chain,
        };
        if full || closes_segment(meta.op) {
            self.close(out);
        }
        Ok(())
    }

    /// Closes the open segment if its time has come.
    pub fn tick(&mut self, now_ns: u64, out: &mut VecDeque<CutSegment>) {
        if self
            .deadline_ns()
            .is_some_and(|deadline| deadline <= now_ns)
        {
            self.close(out);
        }
    }

    /// Closes the open segment, if there is one.
    pub fn close(&mut self, out: &mut VecDeque<CutSegment>) {
        if let Some(open) = self.open.take() {
            let (first_wall_ns, last_wall_ns) = (open.first_wall_ns, open.last_wall_ns);
            out.extend(open.builder.seal().map(|sealed| CutSegment {
                sealed,
                first_wall_ns,
                last_wall_ns,
            }));
        }
    }

    fn open(&mut self, anchor: ClockAnchor, now_ns: u64) -> &mut Open {
        let (stream, cursor, base) = (self.stream, self.cursor, self.base);
        self.open.get_or_insert_with(|| {
            let mut spec = stream.spec(SegmentKind::Log, cursor.chain);
            spec.anchor = anchor;
            if let Some(begin) = base {
                spec.pass = begin;
                spec.flags.declares_gap = true;
            }
            Open {
                builder: SegmentBuilder::new(spec),
                since_ns: now_ns,
                first_wall_ns: 0,
                last_wall_ns: 0,
            }
        })
    }
}

/// Records that somebody waits for at the other side.
fn closes_segment(op: Op) -> bool {
    matches!(
        op,
        Op::Checkpoint
            | Op::CheckpointConfirm
            | Op::Epoch
            | Op::PassBegin
            | Op::PassEnd
            | Op::Resize
            | Op::Rewind
    )
}

#[cfg(test)]
#[path = "cutter_tests.rs"]
mod tests;
