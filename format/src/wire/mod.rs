//! The replication protocol: what primary and replica say to each other (`docs/protocol.md`).
//!
//! Frames of an 8-byte header and a body, over TLS. The header names the message and the body's
//! length, which is checked against the message's own limit before a byte of the body is read.
//! Bodies are decoded strictly: cut anywhere, or followed by anything, they are refused.

mod compared;
mod frame;
mod hello;
mod message;

pub use compared::{Compared, Comparisons};
pub use frame::{FRAME_HEADER_BYTES, FrameHeader, MessageKind};
pub use hello::{ActivePass, Cursor, Hello, HelloReply, Resume};
pub use message::{Ack, ErrorCode, Message, RemoteError, WireError};

/// Version of the protocol that this program speaks.
pub const PROTOCOL_VERSION: u16 = 1;

#[cfg(test)]
mod tests;
