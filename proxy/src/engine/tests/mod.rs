//! The engine on simulated storage, against a byte-exact model, with kills, power cuts and faults.

mod backing;
mod backlog;
mod crash;
mod details;
mod exact_reads;
mod log_failure;
mod model;
mod pace;
mod promises;
mod rig;
