//! Replies of the transmission phase: simple replies, structured and extended chunks.

use super::constants::{
    EXTENDED_REPLY_MAGIC, Errno, REPLY_FLAG_DONE, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk,
};
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct SimpleWire {
    magic: U32,
    errno: U32,
    cookie: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct StructuredWire {
    magic: U32,
    flags: U16,
    kind: U16,
    cookie: U64,
    length: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct ExtendedWire {
    magic: U32,
    flags: U16,
    kind: U16,
    cookie: U64,
    offset: U64,
    length: U64,
}

/// Bytes of a simple reply without data.
pub const SIMPLE_BYTES: usize = size_of::<SimpleWire>();
/// Bytes of the header of a structured chunk.
pub const STRUCTURED_BYTES: usize = size_of::<StructuredWire>();
/// Bytes of the header of an extended chunk.
pub const EXTENDED_BYTES: usize = size_of::<ExtendedWire>();
const _: () = assert!(SIMPLE_BYTES == 16 && STRUCTURED_BYTES == 20 && EXTENDED_BYTES == 32);
const _: () = assert!(std::mem::offset_of!(StructuredWire, length) == 16);
const _: () = assert!(std::mem::offset_of!(ExtendedWire, length) == 24);

/// Which replies a connection has agreed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReplyForm {
    /// Simple replies only.
    #[default]
    Simple,
    /// Structured chunks.
    Structured,
    /// Chunks with extended headers, and extended requests.
    Extended,
}

/// The request a reply belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answered {
    /// The cookie of the request.
    pub cookie: u64,
    /// The offset of the request; extended headers repeat it.
    pub offset: u64,
}

/// One extent as a metadata context describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Length in bytes, not zero.
    pub length: u64,
    /// Flags of the context.
    pub flags: u32,
}

fn push_chunk(
    out: &mut Vec<u8>,
    form: ReplyForm,
    to: Answered,
    kind: u16,
    done: bool,
    payload_bytes: u64,
) {
    let flags = if done { REPLY_FLAG_DONE } else { 0 };
    if form == ReplyForm::Extended {
        let wire = ExtendedWire {
            magic: EXTENDED_REPLY_MAGIC.into(),
            flags: flags.into(),
            kind: kind.into(),
            cookie: to.cookie.into(),
            offset: to.offset.into(),
            length: payload_bytes.into(),
        };
        out.extend_from_slice(wire.as_bytes());
    } else {
        let length = u32::try_from(payload_bytes)
            .expect("payloads of replies are bounded far below 4 GiB by the request limits");
        let wire = StructuredWire {
            magic: STRUCTURED_REPLY_MAGIC.into(),
            flags: flags.into(),
            kind: kind.into(),
            cookie: to.cookie.into(),
            length: length.into(),
        };
        out.extend_from_slice(wire.as_bytes());
    }
}

fn push_simple(out: &mut Vec<u8>, cookie: u64, errno: u32) {
    let wire = SimpleWire {
        magic: SIMPLE_REPLY_MAGIC.into(),
        errno: errno.into(),
        cookie: cookie.into(),
    };
    out.extend_from_slice(wire.as_bytes());
}

/// Appends a success without data.
pub fn push_done(out: &mut Vec<u8>, form: ReplyForm, to: Answered) {
    match form {
        ReplyForm::Simple => push_simple(out, to.cookie, 0),
        _ => push_chunk(out, form, to, chunk::NONE, true, 0),
    }
}

/// Appends an error, with `message` for people where the form has room for it. The message is cut
/// to 255 bytes at most.
pub fn push_error(out: &mut Vec<u8>, form: ReplyForm, to: Answered, errno: Errno, message: &str) {
    if form == ReplyForm::Simple {
        return push_simple(out, to.cookie, errno as u32);
    }
    let message = &message[..message.floor_char_boundary(255)];
    push_chunk(out, form, to, chunk::ERROR, true, 6 + message.len() as u64);
    out.extend_from_slice(&(errno as u32).to_be_bytes());
    out.extend_from_slice(&(message.len() as u16).to_be_bytes());
    out.extend_from_slice(message.as_bytes());
}

/// Appends all of a successful READ's reply that comes before its `len` bytes of data (at least
/// 1), which must follow at once and end it.
pub fn push_data_header(out: &mut Vec<u8>, form: ReplyForm, to: Answered, len: u32) {
    match form {
        ReplyForm::Simple => push_simple(out, to.cookie, 0),
        _ => {
            push_chunk(out, form, to, chunk::OFFSET_DATA, true, 8 + u64::from(len));
            out.extend_from_slice(&to.offset.to_be_bytes());
        }
    }
}

/// Appends the extents of one context. `done` marks the last chunk of the reply. Only for forms
/// with chunks. Compact extents longer than 32 bits hold are cut to a multiple of 64 KiB.
pub fn push_block_status(
    out: &mut Vec<u8>,
    form: ReplyForm,
    to: Answered,
    context: u32,
    descriptors: &[Descriptor],
    done: bool,
) {
    let count = descriptors.len();
    if form == ReplyForm::Extended {
        let bytes = 8 + 16 * count as u64;
        push_chunk(out, form, to, chunk::BLOCK_STATUS_EXT, done, bytes);
        out.extend_from_slice(&context.to_be_bytes());
        let count = u32::try_from(count).expect("extents of one reply are few");
        out.extend_from_slice(&count.to_be_bytes());
        for descriptor in descriptors {
            out.extend_from_slice(&descriptor.length.to_be_bytes());
            out.extend_from_slice(&u64::from(descriptor.flags).to_be_bytes());
        }
    } else {
        let bytes = 4 + 8 * count as u64;
        push_chunk(out, form, to, chunk::BLOCK_STATUS, done, bytes);
        out.extend_from_slice(&context.to_be_bytes());
        for descriptor in descriptors {
            let length = u32::try_from(descriptor.length).unwrap_or(0xffff_0000);
            out.extend_from_slice(&length.to_be_bytes());
            out.extend_from_slice(&descriptor.flags.to_be_bytes());
        }
    }
}

/// The start of one message from a server in transmission, for clients and tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyHeader {
    /// How it is framed.
    pub form: ReplyForm,
    /// The cookie of the request.
    pub cookie: u64,
    /// Errno of a simple reply, 0 otherwise.
    pub errno: u32,
    /// Flags of a chunk.
    pub flags: u16,
    /// Kind of a chunk.
    pub kind: u16,
    /// Offset of the request, in an extended chunk.
    pub offset: u64,
    /// Payload bytes of a chunk that follow. What follows a simple reply depends on the request.
    pub length: u64,
}

/// Reads the start of a server's message; gives it and the bytes it took. `None` when `input` is
/// too short or is no reply.
#[must_use]
pub fn decode_header(input: &[u8]) -> Option<(ReplyHeader, usize)> {
    let magic = u32::from_be_bytes(*input.first_chunk()?);
    let header = ReplyHeader {
        form: ReplyForm::Simple,
        cookie: 0,
        errno: 0,
        flags: 0,
        kind: 0,
        offset: 0,
        length: 0,
    };
    match magic {
        SIMPLE_REPLY_MAGIC => {
            let (wire, _) = SimpleWire::read_from_prefix(input).ok()?;
            let header = ReplyHeader {
                cookie: wire.cookie.get(),
                errno: wire.errno.get(),
                ..header
            };
            Some((header, SIMPLE_BYTES))
        }
        STRUCTURED_REPLY_MAGIC => {
            let (wire, _) = StructuredWire::read_from_prefix(input).ok()?;
            let header = ReplyHeader {
                form: ReplyForm::Structured,
                cookie: wire.cookie.get(),
                flags: wire.flags.get(),
                kind: wire.kind.get(),
                length: u64::from(wire.length.get()),
                ..header
            };
            Some((header, STRUCTURED_BYTES))
        }
        EXTENDED_REPLY_MAGIC => {
            let (wire, _) = ExtendedWire::read_from_prefix(input).ok()?;
            let header = ReplyHeader {
                form: ReplyForm::Extended,
                cookie: wire.cookie.get(),
                flags: wire.flags.get(),
                kind: wire.kind.get(),
                offset: wire.offset.get(),
                length: wire.length.get(),
                ..header
            };
            Some((header, EXTENDED_BYTES))
        }
        _ => None,
    }
}
