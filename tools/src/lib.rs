//! The administrator's side of Afterimage: configuration, command line, API, metrics, and the
//! wiring of proxy and replica into one daemon.
#![forbid(unsafe_code)]

pub mod config;
