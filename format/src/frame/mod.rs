//! Frames: what the ring holds and the log persists, byte for byte the same.
//!
//! A frame is one descriptor block and the payload blocks behind it, contiguous. The descriptor
//! holds a header of 128 bytes, up to 82 entries of 48 bytes (one for each record), and zeroes.
//! `docs/format.md`, section "Frame", is the reference; [`header`] and [`entry`] hold the layouts.
//!
//! Always holds: a value of type [`Descriptor`] has passed every check that its descriptor block
//! alone allows. Payloads are checked by [`Descriptor::verify_payloads`].
//!
//! # Frames in the making
//!
//! Only the ring knows open frames. The writer keeps this order, so that a reader who finds the
//! ring after a kill at any instant sees whole entries only:
//!
//! 1. open: store 0 into the counts word, then all of the descriptor except the frame number
//!    ([`header::FrameStart::open_descriptor`]), then store the frame number;
//! 2. append: payload, then the entry ([`entry::Entry::encode`]), then store the counts word
//!    ([`header::counts_word`]);
//! 3. close: rewrite the header ([`header::FrameHeader::encode`]), then store its last word, which
//!    holds the checksum ([`header::FRAME_CRC_WORD`]).
//!
//! Each "store" is one aligned 64-bit store with release ordering.

pub mod decode;
pub mod entry;
pub mod error;
pub mod header;

#[cfg(test)]
mod golden_tests;
#[cfg(test)]
mod tests;

pub use decode::{Descriptor, OpenFrame, RingDescriptor};
pub use entry::Entry;
pub use error::FrameError;
pub use header::{FrameHeader, FrameStart};

use crate::ids::BLOCK_SIZE;

/// First bytes of a descriptor.
pub const FRAME_MAGIC: [u8; 8] = *b"AFIFRAME";
/// Version of the frame layout that this code writes, and the only one it reads.
pub const FRAME_VERSION: u16 = 1;
/// Bytes of the header.
pub const HEADER_BYTES: usize = 128;
/// Bytes of one entry.
pub const ENTRY_BYTES: usize = 48;
/// Most entries in one frame.
pub const ENTRIES_MAX: usize = 82;
/// Most blocks in the payload of one record: 1 MiB. Longer writes become several records.
pub const RECORD_BLOCKS_MAX: u32 = 256;
/// Most payload blocks in one frame.
pub const FRAME_PAYLOAD_BLOCKS_MAX: u32 = 512;
/// Most blocks in one frame, its descriptor included.
pub const FRAME_BLOCKS_MAX: u32 = 1 + FRAME_PAYLOAD_BLOCKS_MAX;
/// Smallest area (ring or log) in blocks: a frame with one payload block, four times.
pub const AREA_BLOCKS_MIN: u64 = 8;

const _: () = assert!(HEADER_BYTES + ENTRIES_MAX * ENTRY_BYTES <= BLOCK_SIZE);
const _: () = assert!(HEADER_BYTES + (ENTRIES_MAX + 1) * ENTRY_BYTES > BLOCK_SIZE);
const _: () = assert!(RECORD_BLOCKS_MAX <= FRAME_PAYLOAD_BLOCKS_MAX);
const _: () = assert!(ENTRIES_MAX <= u16::MAX as usize);
const _: () = assert!(RECORD_BLOCKS_MAX as usize == crate::chain::RECORD_PAYLOAD_BLOCKS_MAX);

/// Most payload blocks of a frame where ring and log areas have these sizes: small areas still
/// hold several frames.
#[must_use]
pub fn payload_blocks_limit(ring_area_blocks: u64, log_area_blocks: u64) -> u32 {
    let quarter = ring_area_blocks.min(log_area_blocks) / 4;
    u32::try_from(quarter.saturating_sub(1))
        .unwrap_or(u32::MAX)
        .clamp(1, FRAME_PAYLOAD_BLOCKS_MAX)
}
