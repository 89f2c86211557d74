//! Afterimage's formats: bytes in, values out.
//!
//! Nothing here touches a file system, a network or a clock. Each module owns one layout, states
//! its sizes and offsets as compile-time assertions, and refuses what it does not understand.
//! `docs/format.md` describes the layouts for independent readers.
#![forbid(unsafe_code)]

pub mod chain;
pub mod checkpoint;
pub mod checkpoint_confirm;
pub mod checksum;
pub mod claim;
pub mod cursor;
pub mod epoch;
pub mod frame;
#[cfg(test)]
mod golden;
pub mod ids;
pub mod layer;
pub mod manifest;
pub mod names;
pub mod nbd;
pub mod op;
pub mod ring_header;
pub mod segment;
pub mod superblock;
pub mod verify;
pub mod wire;
