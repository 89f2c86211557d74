//! The NBD wire: fixed newstyle handshake and transmission, as the protocol document of the NBD
//! project (`doc/proto.md`) defines them. All integers are big-endian.
//!
//! [`constants`] holds the numbers, [`option`] the handshake's messages, [`request`] and [`reply`]
//! those of transmission. Nothing here knows exports or sizes: what is within bounds is the
//! session's business.

pub mod constants;
pub mod option;
pub mod reply;
pub mod request;

#[cfg(test)]
mod tests;
