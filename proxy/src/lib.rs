//! Afterimage's data path: from an NBD request to a durable, shipped record.
//!
//! A write walks through the folders in this order: [`nbd`] receives it, [`engine`] places it in
//! the ring and the log, [`io`] carries both to the kernel, [`backing`] holds the disk itself, and
//! [`ship`] cuts and sends the segments. [`checkpoint`] and [`verify`] put records of their own
//! between the writes.
#![deny(unsafe_code)]

pub mod backing;
pub mod checkpoint;
pub mod engine;
pub mod io;
pub mod nbd;
pub mod ship;
pub mod tls;
pub mod verify;
pub mod worker;
