//! The state machine of one group: ring, log, block map, group commit, destage, recovery, passes.
//!
//! Single-threaded, without a runtime, a clock or randomness of its own: requests, completions and
//! the time go in; replies, events and storage operations come out.

pub mod config;
pub mod event;
pub mod request;

pub use config::{Ack, EngineConfig, OnLogError};
pub use event::{EngineError, EngineEvent, EventRecord, Ticket};
