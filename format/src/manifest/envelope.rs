//! The envelope around a repository object: magic, version, length, checksum.

use crate::checksum::crc32c;
use crate::cursor::CursorError;
use std::mem::offset_of;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Head {
    magic: [u8; 8],
    version: U16,
    reserved: U16,
    /// Of the whole object.
    length: U32,
}

/// Bytes before the body.
const HEAD_BYTES: usize = size_of::<Head>();

const _: () = assert!(HEAD_BYTES == 16);
const _: () = assert!(offset_of!(Head, version) == 8);
const _: () = assert!(offset_of!(Head, length) == 12);
/// Bytes behind the body.
const CRC_BYTES: usize = 4;

/// Why a repository object was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ObjectError {
    /// Another kind of object, or none of ours.
    #[error("not a {0} (wrong magic)")]
    Magic(&'static str),
    /// A format version this program does not know.
    #[error("{kind} has format version {found}, this program reads version {known}")]
    Version {
        /// Kind of object.
        kind: &'static str,
        /// Its version.
        found: u16,
        /// The version known here.
        known: u16,
    },
    /// The stated length is not the object's, or is above the limit.
    #[error("{kind} of {len} bytes: cut, or larger than allowed")]
    Length {
        /// Kind of object.
        kind: &'static str,
        /// Bytes there are.
        len: usize,
    },
    /// The checksum does not match.
    #[error("{0}: checksum mismatch, the object is damaged")]
    Checksum(&'static str),
    /// A field of the body.
    #[error("{kind}: {source}")]
    Body {
        /// Kind of object.
        kind: &'static str,
        /// What is wrong.
        source: CursorError,
    },
}

/// A kind of object.
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    pub(crate) magic: [u8; 8],
    pub(crate) version: u16,
    pub(crate) bytes_max: usize,
}

impl Kind {
    pub(crate) fn seal(&self, body: &[u8]) -> Vec<u8> {
        let total = HEAD_BYTES + body.len() + CRC_BYTES;
        let mut out = Vec::with_capacity(total);
        let head = Head {
            magic: self.magic,
            version: self.version.into(),
            reserved: 0.into(),
            length: (total as u32).into(),
        };
        out.extend_from_slice(head.as_bytes());
        out.extend_from_slice(body);
        out.extend_from_slice(&crc32c(&out).to_le_bytes());
        out
    }

    /// The body of an object of this kind.
    pub(crate) fn open<'a>(&self, bytes: &'a [u8]) -> Result<&'a [u8], ObjectError> {
        if !bytes.starts_with(&self.magic) {
            return Err(ObjectError::Magic(self.name));
        }
        let length = || ObjectError::Length {
            kind: self.name,
            len: bytes.len(),
        };
        if bytes.len() < HEAD_BYTES + CRC_BYTES || bytes.len() > self.bytes_max {
            return Err(length());
        }
        let Ok((head, _)) = Head::ref_from_prefix(bytes) else {
            return Err(length());
        };
        let found = head.version.get();
        if found != self.version {
            return Err(ObjectError::Version {
                kind: self.name,
                found,
                known: self.version,
            });
        }
        if head.length.get() as usize != bytes.len() {
            return Err(length());
        }
        let (content, crc) = bytes.split_at(bytes.len() - CRC_BYTES);
        if crc != crc32c(content).to_le_bytes() {
            return Err(ObjectError::Checksum(self.name));
        }
        if head.reserved.get() != 0 {
            return Err(self.body_error(CursorError::Invalid("reserved bytes")));
        }
        Ok(&content[HEAD_BYTES..])
    }

    pub(crate) fn body_error(&self, source: CursorError) -> ObjectError {
        ObjectError::Body {
            kind: self.name,
            source,
        }
    }
}
