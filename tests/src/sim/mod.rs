//! The whole system from one seed: the real engine on simulated disks, the real shipping task over a
//! simulated network, the real intake, history and images on a simulated object store.
//!
//! Owns: the driver that decides, from the seed alone, what clients ask, what breaks and when; and
//! the judge, who knows from the records themselves what every disk held after each of them. Always
//! holds: one seed, one run. Nothing here reads a clock, starts a thread, or asks the operating
//! system for randomness; time is the paused clock of a runtime with one thread.
//!
//! Follow a run: [`plan`] draws a group, its clients and its incidents; [`run`](run::run) drives
//! [`host`] (the primary), [`clients`], [`net`], [`site`] (the replica) and compares with [`model`].

pub mod attribution;
pub mod clients;
pub mod content;
pub mod exhaustive;
pub mod faults;
pub mod host;
pub mod model;
pub mod net;
pub mod plan;
pub mod port;
pub mod run;
pub mod site;
pub mod store;
pub mod tap;
pub mod trace;
pub mod verifier;
