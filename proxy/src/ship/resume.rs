//! Where shipping goes on after a hello: a table of cases, and the walk along the record chain
//! that proves that both sides mean the same records.
#![deny(clippy::disallowed_methods)]

use super::source::Record;
use afterimage_format::chain::RecordChain;
use afterimage_format::ids::Lsn;
use afterimage_format::op::Op;
use afterimage_format::segment::{PassBeginBody, SinkId};
use afterimage_format::wire::{Cursor, Resume};

/// What is known when the sink has answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Situation {
    /// What the sink had acknowledged as far as this side stored it. A cursor with
    /// [`RecordChain::BASE`] stands for a base declared at the record behind it.
    pub stored: Cursor,
    /// First record that the log still holds.
    pub oldest: Lsn,
    /// Last record that is durable in the log.
    pub durable: Lsn,
    /// The sink's answer.
    pub resume: Resume,
}

/// Why the sink needs a new base.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BaseReason {
    /// It has nothing of this epoch.
    Empty,
    /// Its last base was never completed, and its pass cannot go on.
    Incomplete,
    /// Records it lacks have left the log.
    LogTrimmed,
    /// A base was declared and never arrived.
    NotArrived,
    /// Nothing here can prove that its records are ours.
    Unproven,
    /// Something came onto a disk past the log since its base began: a disk was added or came back,
    /// an edited backing was accepted.
    PastTheLog,
}

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Plan {
    /// Go on behind the sink's cursor.
    Continue,
    /// Walk the log first; go on if the chain fits.
    Walk(ChainWalk),
    /// Begin a new base with a pass.
    NewBase(BaseReason),
    /// What the sink has is not a beginning of this log: ask for a new epoch.
    Diverged,
}

/// The cases, in the order in which they are tried. C: the sink's cursor. A: stored
/// acknowledgement. O, D: oldest and last durable record of the log.
///
/// | case | condition | plan |
/// | --- | --- | --- |
/// | R1 | C = 0 | new base: empty |
/// | R2 | C > D | diverged: records that this log never made durable |
/// | R3 | no complete base and no pass under way | new base: incomplete |
/// | R4 | C + 1 < O | new base: log trimmed |
/// | R5 | A declares a base and C ≤ A | new base: it did not arrive |
/// | R6 | C = A, same chain | go on |
/// | R7 | C = A, other chain | diverged |
/// | R8 | C > A (acknowledgements lost) | walk from A, or from O if A + 1 < O, to C |
/// | R9 | C < A (the sink lost records) | walk from C to A |
#[must_use]
pub fn plan(s: &Situation, sink: SinkId) -> Plan {
    let cursor = s.resume.cursor;
    let based = s.resume.completed_pass != Lsn::ZERO || s.resume.active_pass.is_some();
    let declared = s.stored.chain == RecordChain::BASE && s.stored.lsn != Lsn::ZERO;
    if cursor.lsn == Lsn::ZERO {
        Plan::NewBase(BaseReason::Empty)
    } else if cursor.lsn > s.durable {
        Plan::Diverged
    } else if !based {
        Plan::NewBase(BaseReason::Incomplete)
    } else if cursor.lsn.next() < s.oldest {
        Plan::NewBase(BaseReason::LogTrimmed)
    } else if declared && cursor.lsn <= s.stored.lsn {
        Plan::NewBase(BaseReason::NotArrived)
    } else if cursor.lsn == s.stored.lsn {
        if cursor.chain == s.stored.chain {
            Plan::Continue
        } else {
            Plan::Diverged
        }
    } else if cursor.lsn > s.stored.lsn {
        let known = s.stored.lsn.next() >= s.oldest;
        Plan::Walk(ChainWalk {
            sink,
            next: if known { s.stored.lsn.next() } else { s.oldest },
            chain: known.then_some(s.stored.chain),
            until: cursor.lsn,
            expected: cursor.chain,
        })
    } else {
        Plan::Walk(ChainWalk {
            sink,
            next: cursor.lsn.next(),
            chain: Some(cursor.chain),
            until: s.stored.lsn,
            expected: s.stored.chain,
        })
    }
}

/// Whether the sink may go on with the base that it has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BaseDue {
    /// It may.
    No,
    /// Up to this record, which is as far as its base is right.
    Behind(Lsn),
    /// It may not.
    Now,
}

/// Judges the sink's newest base, given that everything up to its cursor is ours: a base that began
/// at or before `rebase_after` lacks what came onto a disk past the log, the first of it behind
/// `good_until`. What the sink can still add to a complete history it gets first.
#[must_use]
pub fn base_due(resume: &Resume, rebase_after: Lsn, good_until: Lsn) -> BaseDue {
    let active = resume.active_pass.map(|pass| pass.begin);
    let newest = active.unwrap_or(resume.completed_pass);
    if newest > rebase_after {
        BaseDue::No
    } else if active.is_none() && resume.cursor.lsn < good_until {
        BaseDue::Behind(good_until)
    } else {
        BaseDue::Now
    }
}

/// A walk over consecutive records of the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChainWalk {
    sink: SinkId,
    next: Lsn,
    /// Unknown until a base of this sink is met.
    chain: Option<RecordChain>,
    until: Lsn,
    expected: RecordChain,
}

/// Outcome of a walk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Both sides have the same records.
    Same,
    /// They do not.
    Different,
    /// The walk met nothing to start from.
    Unproven,
}

impl ChainWalk {
    /// The record that comes next; `None` when the walk is over.
    #[must_use]
    pub fn next(&self) -> Option<Lsn> {
        (self.next <= self.until).then_some(self.next)
    }

    /// Last record of the walk.
    #[must_use]
    pub fn until(&self) -> Lsn {
        self.until
    }

    /// Takes a record; those outside the walk are skipped.
    pub fn step(&mut self, record: &Record) {
        if Some(record.meta.lsn) != self.next() {
            return;
        }
        self.next = self.next.next();
        if is_base_of(record, self.sink) {
            self.chain = Some(RecordChain::BASE);
        }
        self.chain = self.chain.map(|chain| chain.extend(&record.meta));
    }

    /// What it shows, once it is over.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        match self.chain {
            None => Verdict::Unproven,
            Some(chain) if chain == self.expected => Verdict::Same,
            Some(_) => Verdict::Different,
        }
    }
}

/// Whether the record is a `PassBegin` that starts a new base at this sink.
#[must_use]
pub fn is_base_of(record: &Record, sink: SinkId) -> bool {
    record.meta.op == Op::PassBegin
        && PassBeginBody::decode(&record.payload)
            .is_ok_and(|body| body.rebases && body.sink == sink)
}

#[cfg(test)]
#[path = "resume_tests.rs"]
mod tests;
