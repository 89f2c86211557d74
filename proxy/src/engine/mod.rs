//! The state machine of one group: ring, log, block map, group commit, destage, recovery, passes.
//!
//! Single-threaded, without a runtime, a clock or randomness of its own: requests, completions and
//! the time go in; replies and storage operations come out.

pub mod request;
