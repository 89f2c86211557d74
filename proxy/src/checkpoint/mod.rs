//! Checkpoints: when they are due.
//!
//! A crash-consistent checkpoint is a record in the group's log, so taking one costs nothing and
//! disturbs nobody. This module says when the next is due; the record itself is appended by the
//! group's engine.

pub mod schedule;
