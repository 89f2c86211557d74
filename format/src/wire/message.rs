//! Messages of a session, and their bodies.

use super::hello::{decode_pass, encode_pass};
use super::{
    ActivePass, Comparisons, Cursor, FrameHeader, Hello, HelloReply, MessageKind, PROTOCOL_VERSION,
};
use crate::cursor::{CursorError, Put, Reader};
use crate::ids::Lsn;
use bytes::Bytes;

const ERROR_TEXT_BYTES_MAX: usize = 1024;

/// Why bytes of a peer were refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// No such message.
    #[error("unknown message {0}")]
    Kind(u8),
    /// The body is longer than such a message may be.
    #[error("{kind:?} of {len} bytes, the limit is {}", kind.body_bytes_max())]
    TooLong {
        /// Which message.
        kind: MessageKind,
        /// Its stated length.
        len: u32,
    },
    /// Bytes or flags that must be zero are not.
    #[error("reserved bits are not zero")]
    Reserved,
    /// The peer does not speak this protocol.
    #[error("the peer does not speak the replication protocol")]
    Magic,
    /// The peer speaks another version.
    #[error("the peer speaks protocol version {0}, this program speaks {PROTOCOL_VERSION}")]
    Version(u16),
    /// A field of the body.
    #[error("malformed message: {0}")]
    Body(#[from] CursorError),
}

/// What is durable at the replica. Cumulative: each says all that those before it said.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ack {
    /// How many segments of this session are dealt with, in the order they were sent.
    pub segments: u64,
    /// Last durable record.
    pub cursor: Cursor,
    /// As in [`Resume`](super::Resume).
    pub completed_pass: Lsn,
    /// The pass that is under way, if any.
    pub active_pass: Option<ActivePass>,
    /// What came of comparing verify records.
    pub comparisons: Comparisons,
}

/// Why a peer ends a session.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ErrorCode {
    /// The other side broke the protocol.
    Protocol,
    /// Protocol version not spoken.
    Version,
    /// The certificate does not allow this group.
    NotPermitted,
    /// The name is bound to another group UUID, or the UUID to another name.
    Identity,
    /// A newer epoch exists: this primary is no longer the one.
    Fenced,
    /// A segment does not follow the replica's last record.
    Gap,
    /// The same identity with different content.
    Diverged,
    /// A segment that is damaged or breaks the format.
    BadSegment,
    /// The end of a pass does not match what came.
    PassMismatch,
    /// The replica's storage failed.
    Storage,
    /// A newer session of the same group took over.
    Superseded,
    /// The peer shuts down.
    ShuttingDown,
    /// The disk table differs in a way that is not allowed.
    Disks,
    /// Too many sessions, or no memory for another.
    Busy,
    /// A code of a later version.
    Other(u16),
}

impl ErrorCode {
    const KNOWN: [Self; 14] = [
        Self::Protocol,
        Self::Version,
        Self::NotPermitted,
        Self::Identity,
        Self::Fenced,
        Self::Gap,
        Self::Diverged,
        Self::BadSegment,
        Self::PassMismatch,
        Self::Storage,
        Self::Superseded,
        Self::ShuttingDown,
        Self::Disks,
        Self::Busy,
    ];

    /// The code on the wire: the position in the list of codes, from 1.
    #[must_use]
    pub fn number(self) -> u16 {
        match self {
            Self::Other(number) => number,
            known => Self::KNOWN
                .iter()
                .position(|code| *code == known)
                .map_or(0, |at| at as u16 + 1),
        }
    }

    fn from_number(number: u16) -> Self {
        usize::from(number)
            .checked_sub(1)
            .and_then(|at| Self::KNOWN.get(at).copied())
            .unwrap_or(Self::Other(number))
    }
}

/// The peer gave up.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{code:?}: {text}")]
pub struct RemoteError {
    /// Why.
    pub code: ErrorCode,
    /// For people; at most 1024 bytes.
    pub text: String,
}

/// One message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Message {
    /// Primary's opening.
    Hello(Hello),
    /// Replica's answer to it.
    HelloReply(HelloReply),
    /// One sealed segment, to be checked by whoever stores it.
    Segment(Bytes),
    /// What is durable at the replica.
    Ack(Ack),
    /// A sign of life.
    KeepAlive,
    /// The sender gives up.
    Error(RemoteError),
}

impl Message {
    /// Header and body. A segment's body is not copied: write one after the other.
    #[must_use]
    pub fn encode(&self) -> (FrameHeader, Bytes) {
        let mut out = Vec::new();
        let (kind, body) = match self {
            Self::Segment(bytes) => (MessageKind::Segment, bytes.clone()),
            Self::KeepAlive => (MessageKind::KeepAlive, Bytes::new()),
            Self::Hello(hello) => {
                hello.encode(&mut out);
                (MessageKind::Hello, out.into())
            }
            Self::HelloReply(reply) => {
                reply.encode(&mut out);
                (MessageKind::HelloReply, out.into())
            }
            Self::Ack(ack) => {
                out.put_u64(ack.segments);
                ack.cursor.encode(&mut out);
                out.put_u64(ack.completed_pass.0);
                encode_pass(ack.active_pass.as_ref(), &mut out);
                ack.comparisons.encode(&mut out);
                (MessageKind::Ack, out.into())
            }
            Self::Error(error) => {
                out.put_u16(error.code.number());
                out.put_string(&error.text, ERROR_TEXT_BYTES_MAX);
                (MessageKind::Error, out.into())
            }
        };
        let header = FrameHeader {
            kind,
            body_len: body.len() as u32,
        };
        (header, body)
    }

    /// Decodes a body of the given kind.
    ///
    /// # Errors
    /// Longer than allowed, cut, followed by more, or with a value no peer writes.
    pub fn decode(kind: MessageKind, body: Bytes) -> Result<Self, WireError> {
        if body.len() > kind.body_bytes_max() {
            return Err(WireError::TooLong {
                kind,
                len: u32::try_from(body.len()).unwrap_or(u32::MAX),
            });
        }
        Ok(match kind {
            MessageKind::Hello => Self::Hello(Hello::decode(&body)?),
            MessageKind::HelloReply => Self::HelloReply(HelloReply::decode(&body)?),
            MessageKind::Segment => Self::Segment(body),
            MessageKind::Ack => Self::Ack(decode_ack(&body)?),
            MessageKind::KeepAlive => Self::KeepAlive,
            MessageKind::Error => Self::Error(decode_error(&body)?),
        })
    }
}

fn decode_ack(body: &[u8]) -> Result<Ack, CursorError> {
    let mut reader = Reader::new(body);
    let ack = Ack {
        segments: reader.u64("segment count")?,
        cursor: Cursor::decode(&mut reader)?,
        completed_pass: Lsn(reader.u64("completed pass")?),
        active_pass: decode_pass(&mut reader)?,
        comparisons: Comparisons::decode(&mut reader)?,
    };
    reader.finish()?;
    Ok(ack)
}

fn decode_error(body: &[u8]) -> Result<RemoteError, CursorError> {
    let mut reader = Reader::new(body);
    let code = reader.u16("error code")?;
    let text = reader.string(ERROR_TEXT_BYTES_MAX, "error text")?;
    reader.finish()?;
    if code == 0 {
        return Err(CursorError::Invalid("error code"));
    }
    Ok(RemoteError {
        code: ErrorCode::from_number(code),
        text,
    })
}
