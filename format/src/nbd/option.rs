//! Messages of the handshake: options with their data, and the answers to them.

use super::constants::{
    EXPORT_NAME_PADDING, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, INIT_MAGIC, OPTION_MAGIC,
    OPTION_REPLY_MAGIC, STRING_BYTES_MAX, info,
};
use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct OptionWire {
    magic: U64,
    option: U32,
    length: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct OptionReplyWire {
    magic: U64,
    option: U32,
    kind: U32,
    length: U32,
}

/// Bytes of the header of an option.
pub const OPTION_BYTES: usize = size_of::<OptionWire>();
/// Bytes of the header of an answer to an option.
pub const OPTION_REPLY_BYTES: usize = size_of::<OptionReplyWire>();
/// Bytes of a server's greeting.
pub const GREETING_BYTES: usize = 18;
const _: () = assert!(OPTION_BYTES == 16 && OPTION_REPLY_BYTES == 20);
const _: () = assert!(std::mem::offset_of!(OptionWire, length) == 12);
const _: () = assert!(std::mem::offset_of!(OptionReplyWire, length) == 16);

/// Why a message of the handshake was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// The stream is out of step.
    #[error("an option starts with {0:#018x} instead of IHAVEOPT")]
    Magic(u64),
    /// A length within the data points beyond its end.
    #[error("the option's data ends within a field")]
    Truncated,
    /// Bytes are left over.
    #[error("the option's data goes on after its last field")]
    TrailingBytes,
    /// A string is longer than [`STRING_BYTES_MAX`].
    #[error("a string of {0} bytes is too long")]
    StringTooLong(usize),
    /// A string is not UTF-8 or holds NUL.
    #[error("a string is not UTF-8 or holds a NUL")]
    NotText,
}

/// The first bytes a server sends.
#[must_use]
pub fn greeting() -> [u8; GREETING_BYTES] {
    let mut out = [0; GREETING_BYTES];
    out[..8].copy_from_slice(&INIT_MAGIC.to_be_bytes());
    out[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    out[16..].copy_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    out
}

/// The header of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// One of [`super::constants::opt`], or something else.
    pub option: u32,
    /// Bytes of data that follow.
    pub length: u32,
}

impl OptionHeader {
    /// Reads a header.
    ///
    /// # Errors
    /// When the magic is wrong.
    pub fn decode(bytes: &[u8; OPTION_BYTES]) -> Result<Self, OptionError> {
        let wire = OptionWire::read_from_bytes(bytes).map_err(|_| OptionError::Truncated)?;
        if wire.magic.get() != OPTION_MAGIC {
            return Err(OptionError::Magic(wire.magic.get()));
        }
        Ok(Self {
            option: wire.option.get(),
            length: wire.length.get(),
        })
    }

    /// Appends the header as a client sends it.
    pub fn encode(self, out: &mut Vec<u8>) {
        let wire = OptionWire {
            magic: OPTION_MAGIC.into(),
            option: self.option.into(),
            length: self.length.into(),
        };
        out.extend_from_slice(wire.as_bytes());
    }
}

/// Reads fields one after the other; refuses what is too short or left over.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], OptionError> {
        let (head, tail) = self.0.split_at_checked(len).ok_or(OptionError::Truncated)?;
        self.0 = tail;
        Ok(head)
    }

    fn u16(&mut self) -> Result<u16, OptionError> {
        let (head, tail) = self.0.split_first_chunk().ok_or(OptionError::Truncated)?;
        self.0 = tail;
        Ok(u16::from_be_bytes(*head))
    }

    fn u32(&mut self) -> Result<u32, OptionError> {
        let (head, tail) = self.0.split_first_chunk().ok_or(OptionError::Truncated)?;
        self.0 = tail;
        Ok(u32::from_be_bytes(*head))
    }

    fn string(&mut self) -> Result<&'a str, OptionError> {
        let len = self.u32()? as usize;
        text(self.take(len)?)
    }

    fn finish(self) -> Result<(), OptionError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(OptionError::TrailingBytes)
        }
    }
}

/// Bytes of a message as a string: UTF-8 without NUL, at most [`STRING_BYTES_MAX`].
///
/// # Errors
/// When they are not that.
pub fn text(bytes: &[u8]) -> Result<&str, OptionError> {
    if bytes.len() > STRING_BYTES_MAX {
        return Err(OptionError::StringTooLong(bytes.len()));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| OptionError::NotText)?;
    if text.contains('\0') {
        return Err(OptionError::NotText);
    }
    Ok(text)
}

/// Data of INFO and GO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoQuery<'a> {
    /// The export.
    pub name: &'a str,
    /// What the client would like to know: see [`super::constants::info`].
    pub items: Vec<u16>,
}

impl<'a> InfoQuery<'a> {
    /// Reads the option's data.
    ///
    /// # Errors
    /// When it is malformed.
    pub fn decode(data: &'a [u8]) -> Result<Self, OptionError> {
        let mut cursor = Cursor(data);
        let name = cursor.string()?;
        let count = cursor.u16()?;
        if cursor.0.len() < usize::from(count) * 2 {
            return Err(OptionError::Truncated);
        }
        let items = (0..count).map(|_| cursor.u16()).collect::<Result<_, _>>()?;
        cursor.finish()?;
        Ok(Self { name, items })
    }

    /// Appends the data as a client sends it.
    pub fn encode(&self, out: &mut Vec<u8>) {
        push_string(out, self.name);
        out.extend_from_slice(&(self.items.len() as u16).to_be_bytes());
        for item in &self.items {
            out.extend_from_slice(&item.to_be_bytes());
        }
    }
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaQuery<'a> {
    /// The export.
    pub name: &'a str,
    /// Which contexts.
    pub queries: Vec<&'a str>,
}

impl<'a> MetaQuery<'a> {
    /// Reads the option's data.
    ///
    /// # Errors
    /// When it is malformed.
    pub fn decode(data: &'a [u8]) -> Result<Self, OptionError> {
        let mut cursor = Cursor(data);
        let name = cursor.string()?;
        let count = cursor.u32()? as usize;
        // Each query has at least its length field, so a count that lies costs no memory.
        if cursor.0.len() / 4 < count {
            return Err(OptionError::Truncated);
        }
        let queries = (0..count)
            .map(|_| cursor.string())
            .collect::<Result<_, _>>()?;
        cursor.finish()?;
        Ok(Self { name, queries })
    }

    /// Appends the data as a client sends it.
    pub fn encode(&self, out: &mut Vec<u8>) {
        push_string(out, self.name);
        out.extend_from_slice(&(self.queries.len() as u32).to_be_bytes());
        for query in &self.queries {
            push_string(out, query);
        }
    }
}

fn push_string(out: &mut Vec<u8>, text: &str) {
    let len = u32::try_from(text.len()).expect("names and queries are short");
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// Appends an answer to an option.
pub fn push_reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    let length = u32::try_from(data.len()).expect("answers to options are short");
    let wire = OptionReplyWire {
        magic: OPTION_REPLY_MAGIC.into(),
        option: option.into(),
        kind: kind.into(),
        length: length.into(),
    };
    out.extend_from_slice(wire.as_bytes());
    out.extend_from_slice(data);
}

/// The header of an answer to an option, for clients and tests: option, type, length of the data.
/// `None` when it is no such header.
#[must_use]
pub fn decode_reply(bytes: &[u8; OPTION_REPLY_BYTES]) -> Option<(u32, u32, u32)> {
    let wire = OptionReplyWire::read_from_bytes(bytes).ok()?;
    (wire.magic.get() == OPTION_REPLY_MAGIC)
        .then(|| (wire.option.get(), wire.kind.get(), wire.length.get()))
}

/// Data of a SERVER answer: an export's name and a text for people.
#[must_use]
pub fn server_data(name: &str, description: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(4 + name.len() + description.len());
    push_string(&mut out, name);
    out.extend_from_slice(description.as_bytes());
    out
}

/// Data of an INFO answer with size and flags.
#[must_use]
pub fn info_export(size: u64, flags: u16) -> Vec<u8> {
    let mut out = info::EXPORT.to_be_bytes().to_vec();
    out.extend_from_slice(&size.to_be_bytes());
    out.extend_from_slice(&flags.to_be_bytes());
    out
}

/// Data of an INFO answer with a text: `item` is [`info::NAME`] or [`info::DESCRIPTION`].
#[must_use]
pub fn info_text(item: u16, text: &str) -> Vec<u8> {
    let mut out = item.to_be_bytes().to_vec();
    out.extend_from_slice(text.as_bytes());
    out
}

/// Data of an INFO answer with block sizes in bytes.
#[must_use]
pub fn info_block_size(minimum: u32, preferred: u32, maximum: u32) -> Vec<u8> {
    let mut out = info::BLOCK_SIZE.to_be_bytes().to_vec();
    for size in [minimum, preferred, maximum] {
        out.extend_from_slice(&size.to_be_bytes());
    }
    out
}

/// Data of a META_CONTEXT answer.
#[must_use]
pub fn meta_context_data(id: u32, name: &str) -> Vec<u8> {
    let mut out = id.to_be_bytes().to_vec();
    out.extend_from_slice(name.as_bytes());
    out
}

/// The answer to EXPORT_NAME.
#[must_use]
pub fn export_name_answer(size: u64, flags: u16, no_zeroes: bool) -> Vec<u8> {
    let mut out = size.to_be_bytes().to_vec();
    out.extend_from_slice(&flags.to_be_bytes());
    if !no_zeroes {
        out.resize(out.len() + EXPORT_NAME_PADDING, 0);
    }
    out
}
