//! Frame headers.

use super::message::WireError;
use crate::segment::SEGMENT_BYTES_MAX;

/// Bytes of a frame's header: kind 1, reserved 3, body length 4.
pub const FRAME_HEADER_BYTES: usize = 8;
const KIND_AT: usize = 0;
const RESERVED_AT: usize = 1;
const BODY_LEN_AT: usize = 4;

const _: () = assert!(KIND_AT + size_of::<u8>() == RESERVED_AT);
const _: () = assert!(RESERVED_AT + 3 == BODY_LEN_AT);
const _: () = assert!(BODY_LEN_AT + size_of::<u32>() == FRAME_HEADER_BYTES);
const _: () = assert!(SEGMENT_BYTES_MAX <= u32::MAX as usize);

/// What a frame carries.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum MessageKind {
    /// Primary's opening.
    Hello = 1,
    /// Replica's answer to it.
    HelloReply = 2,
    /// One sealed segment, as it is.
    Segment = 3,
    /// What is durable at the replica.
    Ack = 4,
    /// Nothing but a sign of life; either side.
    KeepAlive = 5,
    /// The sender gives up, and why; either side; the last message.
    Error = 6,
}

impl MessageKind {
    /// Most bytes of the body.
    #[must_use]
    pub const fn body_bytes_max(self) -> usize {
        match self {
            Self::Hello => 16 * 1024,
            Self::HelloReply | Self::Ack => 512,
            Self::Segment => SEGMENT_BYTES_MAX,
            Self::KeepAlive => 0,
            Self::Error => 2048,
        }
    }

    const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Hello,
            2 => Self::HelloReply,
            3 => Self::Segment,
            4 => Self::Ack,
            5 => Self::KeepAlive,
            6 => Self::Error,
            _ => return None,
        })
    }
}

/// Header of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameHeader {
    /// What the body is.
    pub kind: MessageKind,
    /// Length of the body in bytes.
    pub body_len: u32,
}

impl FrameHeader {
    /// The header's bytes.
    #[must_use]
    pub fn encode(self) -> [u8; FRAME_HEADER_BYTES] {
        let mut out = [0; FRAME_HEADER_BYTES];
        out[KIND_AT] = self.kind as u8;
        out[BODY_LEN_AT..].copy_from_slice(&self.body_len.to_le_bytes());
        out
    }

    /// Decodes a header and checks the length against the message's limit.
    ///
    /// # Errors
    /// Unknown message, reserved bytes not zero, body too long.
    pub fn decode(bytes: [u8; FRAME_HEADER_BYTES]) -> Result<Self, WireError> {
        let number = bytes[KIND_AT];
        let kind = MessageKind::from_number(number).ok_or(WireError::Kind(number))?;
        if bytes[RESERVED_AT..BODY_LEN_AT] != [0; 3] {
            return Err(WireError::Reserved);
        }
        let mut body_len = [0; size_of::<u32>()];
        body_len.copy_from_slice(&bytes[BODY_LEN_AT..]);
        let body_len = u32::from_le_bytes(body_len);
        if body_len as usize > kind.body_bytes_max() {
            return Err(WireError::TooLong {
                kind,
                len: body_len,
            });
        }
        Ok(Self { kind, body_len })
    }
}
