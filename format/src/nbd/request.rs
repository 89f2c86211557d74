//! Requests of the transmission phase: compact (28 bytes) and extended (32 bytes) headers.

use super::constants::{EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC};
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct CompactWire {
    magic: U32,
    flags: U16,
    command: U16,
    cookie: U64,
    offset: U64,
    length: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct ExtendedWire {
    magic: U32,
    flags: U16,
    command: U16,
    cookie: U64,
    offset: U64,
    length: U64,
}

/// Bytes of a compact request header.
pub const COMPACT_BYTES: usize = size_of::<CompactWire>();
/// Bytes of an extended request header.
pub const EXTENDED_BYTES: usize = size_of::<ExtendedWire>();
const _: () = assert!(COMPACT_BYTES == 28 && EXTENDED_BYTES == 32);
const _: () = assert!(std::mem::offset_of!(CompactWire, cookie) == 8);
const _: () = assert!(std::mem::offset_of!(CompactWire, length) == 24);
const _: () = assert!(std::mem::offset_of!(ExtendedWire, length) == 24);

/// A request header as the client sent it; nothing but the magic is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// Bits of [`super::constants::cmd_flag`], and perhaps others.
    pub flags: u16,
    /// One of [`super::constants::cmd`], or something else.
    pub command: u16,
    /// The client's name for the request, returned in the reply.
    pub cookie: u64,
    /// In bytes.
    pub offset: u64,
    /// In bytes: of the effect, or of a payload that follows.
    pub length: u64,
}

/// What the start of a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// More bytes are needed.
    #[error("a request header has {needed} bytes, {have} are there")]
    Short {
        /// Bytes of a header.
        needed: usize,
        /// Bytes given.
        have: usize,
    },
    /// The stream is out of step; nothing after this can be understood.
    #[error("a request starts with {found:#010x} instead of {expected:#010x}")]
    Magic {
        /// What should stand there.
        expected: u32,
        /// What does.
        found: u32,
    },
}

impl RequestHeader {
    /// Bytes of a header, with or without extended headers.
    #[must_use]
    pub const fn bytes(extended: bool) -> usize {
        if extended {
            EXTENDED_BYTES
        } else {
            COMPACT_BYTES
        }
    }

    /// Reads a header from the start of `input`, which may hold more.
    ///
    /// # Errors
    /// When `input` is too short, or the magic is wrong.
    pub fn decode(input: &[u8], extended: bool) -> Result<Self, RequestError> {
        let short = RequestError::Short {
            needed: Self::bytes(extended),
            have: input.len(),
        };
        let (magic, expected, header) = if extended {
            let (wire, _) = ExtendedWire::read_from_prefix(input).map_err(|_| short)?;
            let header = Self {
                flags: wire.flags.get(),
                command: wire.command.get(),
                cookie: wire.cookie.get(),
                offset: wire.offset.get(),
                length: wire.length.get(),
            };
            (wire.magic.get(), EXTENDED_REQUEST_MAGIC, header)
        } else {
            let (wire, _) = CompactWire::read_from_prefix(input).map_err(|_| short)?;
            let header = Self {
                flags: wire.flags.get(),
                command: wire.command.get(),
                cookie: wire.cookie.get(),
                offset: wire.offset.get(),
                length: u64::from(wire.length.get()),
            };
            (wire.magic.get(), REQUEST_MAGIC, header)
        };
        if magic == expected {
            Ok(header)
        } else {
            Err(RequestError::Magic {
                expected,
                found: magic,
            })
        }
    }

    /// Appends the header as a client sends it. A compact header keeps the low 32 bits of the
    /// length.
    pub fn encode(&self, extended: bool, out: &mut Vec<u8>) {
        if extended {
            let wire = ExtendedWire {
                magic: EXTENDED_REQUEST_MAGIC.into(),
                flags: self.flags.into(),
                command: self.command.into(),
                cookie: self.cookie.into(),
                offset: self.offset.into(),
                length: self.length.into(),
            };
            out.extend_from_slice(wire.as_bytes());
        } else {
            #[expect(clippy::cast_possible_truncation, reason = "documented")]
            let wire = CompactWire {
                magic: REQUEST_MAGIC.into(),
                flags: self.flags.into(),
                command: self.command.into(),
                cookie: self.cookie.into(),
                offset: self.offset.into(),
                length: (self.length as u32).into(),
            };
            out.extend_from_slice(wire.as_bytes());
        }
    }
}
