//! What a layer says of segments, clock, bases and checkpoints.

use crate::chain::RecordChain;
use crate::checkpoint::{CheckpointKind, CheckpointTrigger};
use crate::cursor::{CursorError, Put, Reader};
use crate::ids::Lsn;
use crate::names::{self, NAME_BYTES_MAX};
use crate::segment::SegmentKind;

/// What is kept of a segment beside its extents.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentEntry {
    /// Its key within the epoch.
    pub sequence: u64,
    /// Log or pass.
    pub kind: SegmentKind,
    /// Header's first LSN.
    pub first_lsn: Lsn,
    /// Header's last LSN.
    pub last_lsn: Lsn,
    /// Header's chain after the last record.
    pub chain_after: RecordChain,
    /// Footer's hash of the index: whoever reads the segment later expects this one.
    pub index_hash: [u8; 32],
    /// Length of the object.
    pub stored_bytes: u64,
    /// Log: lowest clock of a record, nanoseconds since 1970. Pass: 0.
    pub wall_min_ns: u64,
    /// Verify records are in it.
    pub has_verify: bool,
}

/// Records whose times can be compared.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClockEra {
    /// First record.
    pub first_lsn: Lsn,
    /// Last record so far.
    pub last_lsn: Lsn,
    /// Time of the first record, nanoseconds since 1970.
    pub first_ns: u64,
    /// Highest time of a record so far.
    pub last_ns: u64,
}

/// How far the blocks of a pass have come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PassProgress {
    /// Disk and block behind the last that came.
    pub next: (u16, u64),
    /// Blocks that came.
    pub blocks: u64,
    /// Chain over them.
    pub chain: RecordChain,
    /// Highest LSN at which one was read.
    pub lsn_max: Lsn,
}

/// What became of the pass of a base.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PassState {
    /// Under way.
    Active(PassProgress),
    /// Complete at this record.
    Complete(Lsn),
    /// It ended without what it promised.
    Dropped {
        /// Blocks that came.
        came: u64,
        /// Blocks that were promised.
        promised: u64,
    },
    /// Another pass took its place before its end.
    Abandoned,
}

/// A base as it stands behind the layer's last segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BaseEntry {
    /// LSN of its `PassBegin`.
    pub begin: Lsn,
    /// Clock of the `PassBegin`.
    pub begin_wall_ns: u64,
    /// Whether records before it are missing for good.
    pub after_gap: bool,
    /// Last record of it, once the base after it has begun.
    pub last: Option<Lsn>,
    /// Clock at the first readable record.
    pub readable_wall_ns: u64,
    /// Clock of the newest record.
    pub last_wall_ns: u64,
    /// Bytes that records wrote since the last checkpoint.
    pub changed_bytes: u64,
    /// Its pass.
    pub pass: PassState,
}

/// A checkpoint.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CheckpointEntry {
    /// The record that is the point.
    pub lsn: Lsn,
    /// The base that it stands in.
    pub base: Lsn,
    /// The primary's clock, nanoseconds since 1970.
    pub wall_ns: u64,
    /// How consistent it was meant to be.
    pub kind: CheckpointKind,
    /// What made it.
    pub trigger: CheckpointTrigger,
    /// Bytes written since the base's first readable moment or the checkpoint before.
    pub changed_bytes: u64,
    /// Its label; empty for none.
    pub label: String,
}

const LOG: u8 = 1;
const PASS: u8 = 2;
const HAS_VERIFY: u8 = 1;

impl SegmentEntry {
    pub(super) const BYTES: usize = 2 + 8 + 8 + 32 + 32 + 8 + 8;

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.put_u8(match self.kind {
            SegmentKind::Log => LOG,
            SegmentKind::Pass => PASS,
        });
        out.put_u8(if self.has_verify { HAS_VERIFY } else { 0 });
        out.put_u64(self.first_lsn.0);
        out.put_u64(self.last_lsn.0);
        out.put(&self.chain_after.0);
        out.put(&self.index_hash);
        out.put_u64(self.stored_bytes);
        out.put_u64(self.wall_min_ns);
    }

    pub(super) fn decode(reader: &mut Reader<'_>, sequence: u64) -> Result<Self, CursorError> {
        let kind = match reader.u8("kind of segment")? {
            LOG => SegmentKind::Log,
            PASS => SegmentKind::Pass,
            _ => return Err(CursorError::Invalid("kind of segment")),
        };
        let flags = reader.u8("flags of segment")?;
        if flags & !HAS_VERIFY != 0 {
            return Err(CursorError::Invalid("flags of segment"));
        }
        Ok(Self {
            sequence,
            kind,
            first_lsn: Lsn(reader.u64("first LSN")?),
            last_lsn: Lsn(reader.u64("last LSN")?),
            chain_after: RecordChain(reader.array("chain")?),
            index_hash: reader.array("hash of index")?,
            stored_bytes: reader.u64("stored bytes")?,
            wall_min_ns: reader.u64("time")?,
            has_verify: flags & HAS_VERIFY != 0,
        })
    }
}

impl ClockEra {
    pub(super) const BYTES: usize = 32;

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.put_u64(self.first_lsn.0);
        out.put_u64(self.last_lsn.0);
        out.put_u64(self.first_ns);
        out.put_u64(self.last_ns);
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, CursorError> {
        let era = Self {
            first_lsn: Lsn(reader.u64("first LSN of era")?),
            last_lsn: Lsn(reader.u64("last LSN of era")?),
            first_ns: reader.u64("first time of era")?,
            last_ns: reader.u64("last time of era")?,
        };
        if era.last_lsn < era.first_lsn || era.last_ns < era.first_ns {
            return Err(CursorError::Invalid("clock era"));
        }
        Ok(era)
    }
}

const ACTIVE: u8 = 1;
const COMPLETE: u8 = 2;
const DROPPED: u8 = 3;
const ABANDONED: u8 = 4;
const AFTER_GAP: u8 = 1;
const CLOSED: u8 = 2;

impl BaseEntry {
    pub(super) const BYTES_MIN: usize = 8 + 8 + 1 + 8 + 8 + 8 + 8 + 1;

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let after_gap = if self.after_gap { AFTER_GAP } else { 0 };
        let closed = if self.last.is_some() { CLOSED } else { 0 };
        out.put_u64(self.begin.0);
        out.put_u64(self.begin_wall_ns);
        out.put_u8(after_gap | closed);
        out.put_u64(self.last.unwrap_or(Lsn::ZERO).0);
        out.put_u64(self.readable_wall_ns);
        out.put_u64(self.last_wall_ns);
        out.put_u64(self.changed_bytes);
        match &self.pass {
            PassState::Active(progress) => {
                out.put_u8(ACTIVE);
                out.put_u16(progress.next.0);
                out.put_u64(progress.next.1);
                out.put_u64(progress.blocks);
                out.put(&progress.chain.0);
                out.put_u64(progress.lsn_max.0);
            }
            PassState::Complete(at) => {
                out.put_u8(COMPLETE);
                out.put_u64(at.0);
            }
            PassState::Dropped { came, promised } => {
                out.put_u8(DROPPED);
                out.put_u64(*came);
                out.put_u64(*promised);
            }
            PassState::Abandoned => out.put_u8(ABANDONED),
        }
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, CursorError> {
        let begin = Lsn(reader.u64("begin of base")?);
        let begin_wall_ns = reader.u64("time of base")?;
        let flags = reader.u8("flags of base")?;
        let last = Lsn(reader.u64("last LSN of base")?);
        let closed = flags & CLOSED != 0;
        if flags & !(AFTER_GAP | CLOSED) != 0 || (!closed && last != Lsn::ZERO) {
            return Err(CursorError::Invalid("flags of base"));
        }
        Ok(Self {
            begin,
            begin_wall_ns,
            after_gap: flags & AFTER_GAP != 0,
            last: closed.then_some(last),
            readable_wall_ns: reader.u64("readable time")?,
            last_wall_ns: reader.u64("last time")?,
            changed_bytes: reader.u64("changed bytes")?,
            pass: match reader.u8("state of pass")? {
                ACTIVE => PassState::Active(PassProgress {
                    next: (reader.u16("next disk")?, reader.u64("next block")?),
                    blocks: reader.u64("blocks of pass")?,
                    chain: RecordChain(reader.array("chain of pass")?),
                    lsn_max: Lsn(reader.u64("highest LSN of pass")?),
                }),
                COMPLETE => PassState::Complete(Lsn(reader.u64("end of pass")?)),
                DROPPED => PassState::Dropped {
                    came: reader.u64("blocks that came")?,
                    promised: reader.u64("blocks promised")?,
                },
                ABANDONED => PassState::Abandoned,
                _ => return Err(CursorError::Invalid("state of pass")),
            },
        })
    }
}

impl CheckpointEntry {
    pub(super) const BYTES_MIN: usize = 8 + 8 + 8 + 2 + 8 + 2;

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.put_u64(self.lsn.0);
        out.put_u64(self.base.0);
        out.put_u64(self.wall_ns);
        out.put_u8(self.kind as u8);
        out.put_u8(self.trigger as u8);
        out.put_u64(self.changed_bytes);
        out.put_string(&self.label, NAME_BYTES_MAX);
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, CursorError> {
        let lsn = Lsn(reader.u64("LSN of checkpoint")?);
        let base = Lsn(reader.u64("base of checkpoint")?);
        let wall_ns = reader.u64("time of checkpoint")?;
        let kind = match reader.u8("kind of checkpoint")? {
            1 => CheckpointKind::Crash,
            2 => CheckpointKind::Application,
            _ => return Err(CursorError::Invalid("kind of checkpoint")),
        };
        let trigger = match reader.u8("trigger of checkpoint")? {
            1 => CheckpointTrigger::Request,
            2 => CheckpointTrigger::Schedule,
            _ => return Err(CursorError::Invalid("trigger of checkpoint")),
        };
        let changed_bytes = reader.u64("changed bytes")?;
        let label = reader.string(NAME_BYTES_MAX, "label of checkpoint")?;
        if !label.is_empty() {
            names::validate(&label).map_err(|_| CursorError::Invalid("label of checkpoint"))?;
        }
        Ok(Self {
            lsn,
            base,
            wall_ns,
            kind,
            trigger,
            changed_bytes,
            label,
        })
    }
}
