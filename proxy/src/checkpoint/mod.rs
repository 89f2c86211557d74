//! Checkpoints: when they are due, and how a guest is brought into a consistent state for one.
//!
//! A crash-consistent checkpoint is a record in the group's log, so taking one costs nothing and
//! disturbs nobody. An application-consistent one freezes the guest for a moment: [`sequence`]
//! decides the steps, [`qga`] and [`exec`] talk to the guest, [`run`] drives them, [`intent`] and
//! [`watchdog`] see to it that a guest is thawed whatever becomes of this process.

pub mod agent;
pub mod exec;
pub mod intent;
mod leftover;
pub mod provider;
pub mod qga;
pub mod run;
pub mod schedule;
pub mod sequence;
#[cfg(test)]
mod tests;
pub mod watchdog;
