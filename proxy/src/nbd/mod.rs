//! The NBD server: sockets, handshake, transmission.
//!
//! A connection walks through the files in this order: [`listener`] accepts it and knows what it
//! may open, [`handshake`] agrees with the client on an export ([`export`]), then the socket moves
//! to the thread that owns the export's group, where a [`session`] turns bytes into requests and
//! replies into bytes. Devices that have no group's engine behind them, such as images, are served
//! right here, over the same session ([`device`]).
//!
//! Always holds: what a client sends is checked before anything acts on it or memory is allocated
//! for it; one client's stall holds nothing that another needs; only the protocol's errors go on
//! the wire, the cause goes to the log.

pub mod budget;
pub mod device;
pub mod export;
pub mod handshake;
pub mod listener;
pub(crate) mod patience;
pub mod session;
mod socket;
#[cfg(test)]
pub(crate) mod test_support;
