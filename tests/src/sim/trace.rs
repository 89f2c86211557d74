//! What happened in a run, in order: a hash of it always, the words when somebody wants to read.
//!
//! One run, one thread: the trace belongs to the thread, so that the tasks of a run, which have to
//! be `Send`, need not carry it about.

use super::faults::{Fault, FaultCounts};
use std::cell::RefCell;

struct Trace {
    hash: u64,
    turn: u64,
    lines: Option<Vec<String>>,
    faults: FaultCounts,
}

impl Default for Trace {
    fn default() -> Self {
        Self {
            hash: 0xcbf2_9ce4_8422_2325,
            turn: 0,
            lines: None,
            faults: FaultCounts::default(),
        }
    }
}

thread_local! {
    static TRACE: RefCell<Trace> = RefCell::default();
}

/// What is left of a trace when its run is over.
#[derive(Debug, Default)]
pub struct Told {
    /// Hash of every event.
    pub hash: u64,
    /// The events in words, if they were wanted.
    pub lines: Vec<String>,
    /// Faults by kind.
    pub faults: FaultCounts,
}

/// Begins a run on this thread.
pub fn begin(in_words: bool) {
    TRACE.with_borrow_mut(|trace| {
        *trace = Trace {
            lines: in_words.then(Vec::new),
            ..Trace::default()
        };
    });
}

/// Ends the run.
#[must_use]
pub fn end() -> Told {
    TRACE.with_borrow_mut(|trace| {
        let trace = std::mem::take(trace);
        Told {
            hash: trace.hash,
            lines: trace.lines.unwrap_or_default(),
            faults: trace.faults,
        }
    })
}

/// The driver's turn from now on.
pub fn turn(turn: u64) {
    TRACE.with_borrow_mut(|trace| trace.turn = turn);
}

/// Something happened.
pub fn note(words: &[u64], text: impl FnOnce() -> String) {
    TRACE.with_borrow_mut(|trace| {
        for word in words {
            trace.hash = (trace.hash ^ word).wrapping_mul(0x0100_0000_01b3);
        }
        let turn = trace.turn;
        if let Some(lines) = &mut trace.lines {
            lines.push(format!("{turn:>6}  {}", text()));
        }
    });
}

/// A fault took place.
pub fn count(fault: Fault) {
    count_many(fault, 1);
}

/// A fault took place so many times.
pub fn count_many(fault: Fault, times: u64) {
    TRACE.with_borrow_mut(|trace| trace.faults.add(fault, times));
}
