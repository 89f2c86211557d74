//! Bodies of the records that begin and end a pass. Each is one payload block: magic, version,
//! fields, zeroes to the end; the record's payload checksum covers it.

use crate::chain::RecordChain;
use crate::ids::{BLOCK_SIZE, Lsn};
use std::mem::offset_of;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const MAGIC_BEGIN: [u8; 4] = *b"PBGN";
const MAGIC_END: [u8; 4] = *b"PEND";
const VERSION: u16 = 1;
const FLAG_REBASES: u16 = 1;

/// Identity of a sink within its group: the first 16 bytes of BLAKE3 of its canonical URL.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct SinkId(pub [u8; 16]);

impl SinkId {
    /// The identity of the sink with this canonical URL.
    #[must_use]
    pub fn of_url(url: &str) -> Self {
        let mut id = [0; 16];
        id.copy_from_slice(&blake3::hash(url.as_bytes()).as_bytes()[..16]);
        Self(id)
    }
}

/// Why the body of a pass record was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EventBodyError {
    /// Not one block.
    #[error("the body has {0} bytes instead of {BLOCK_SIZE}")]
    Length(usize),
    /// Not the body of this operation.
    #[error("the body is of another kind")]
    Magic,
    /// A version this program does not know.
    #[error("version {0} of the body is unknown")]
    Version(u16),
    /// Bytes or flags that must be zero are not.
    #[error("reserved bytes are not zero")]
    Reserved,
}

/// Body of `PassBegin`. Its record's LSN is the pass's identity.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PassBeginBody {
    /// The sink that the pass goes to. For all others the record changes nothing.
    pub sink: SinkId,
    /// Records before this one are missing at that sink: its record chain starts anew here.
    pub rebases: bool,
}

/// Body of `PassEnd`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PassEndBody {
    /// The sink that the pass goes to.
    pub sink: SinkId,
    /// LSN of the pass's `PassBegin`.
    pub begin: Lsn,
    /// Blocks sent in the pass's segments.
    pub blocks: u64,
    /// Chain over all entries of the pass's segments.
    pub chain: RecordChain,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawBegin {
    magic: [u8; 4],
    version: U16,
    flags: U16,
    sink: [u8; 16],
}

const _: () = assert!(size_of::<RawBegin>() == 24);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEnd {
    magic: [u8; 4],
    version: U16,
    flags: U16,
    sink: [u8; 16],
    begin: U64,
    blocks: U64,
    chain: [u8; 32],
    reserved: U32,
}

const _: () = assert!(size_of::<RawEnd>() == 76);
const _: () = assert!(offset_of!(RawEnd, chain) == 40);

fn block_of(raw: &[u8]) -> Vec<u8> {
    let mut block = vec![0; BLOCK_SIZE];
    block[..raw.len()].copy_from_slice(raw);
    block
}

fn split<T: FromBytes + Immutable>(body: &[u8]) -> Result<T, EventBodyError> {
    if body.len() != BLOCK_SIZE {
        return Err(EventBodyError::Length(body.len()));
    }
    let Ok((raw, rest)) = T::read_from_prefix(body) else {
        return Err(EventBodyError::Length(body.len()));
    };
    if rest.iter().any(|byte| *byte != 0) {
        return Err(EventBodyError::Reserved);
    }
    Ok(raw)
}

fn check(magic: [u8; 4], want: [u8; 4], version: u16) -> Result<(), EventBodyError> {
    if magic != want {
        return Err(EventBodyError::Magic);
    }
    if version != VERSION {
        return Err(EventBodyError::Version(version));
    }
    Ok(())
}

impl PassBeginBody {
    /// The body as one payload block.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let raw = RawBegin {
            magic: MAGIC_BEGIN,
            version: VERSION.into(),
            flags: if self.rebases {
                FLAG_REBASES.into()
            } else {
                0.into()
            },
            sink: self.sink.0,
        };
        block_of(raw.as_bytes())
    }

    /// Decodes a payload block.
    ///
    /// # Errors
    /// Anything that `encode` would not have written.
    pub fn decode(body: &[u8]) -> Result<Self, EventBodyError> {
        let raw: RawBegin = split(body)?;
        check(raw.magic, MAGIC_BEGIN, raw.version.get())?;
        if raw.flags.get() & !FLAG_REBASES != 0 {
            return Err(EventBodyError::Reserved);
        }
        Ok(Self {
            sink: SinkId(raw.sink),
            rebases: raw.flags.get() & FLAG_REBASES != 0,
        })
    }
}

impl PassEndBody {
    /// The body as one payload block.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let raw = RawEnd {
            magic: MAGIC_END,
            version: VERSION.into(),
            flags: 0.into(),
            sink: self.sink.0,
            begin: self.begin.0.into(),
            blocks: self.blocks.into(),
            chain: self.chain.0,
            reserved: 0.into(),
        };
        block_of(raw.as_bytes())
    }

    /// Decodes a payload block.
    ///
    /// # Errors
    /// Anything that `encode` would not have written.
    pub fn decode(body: &[u8]) -> Result<Self, EventBodyError> {
        let raw: RawEnd = split(body)?;
        check(raw.magic, MAGIC_END, raw.version.get())?;
        if raw.flags.get() != 0 || raw.reserved.get() != 0 {
            return Err(EventBodyError::Reserved);
        }
        Ok(Self {
            sink: SinkId(raw.sink),
            begin: Lsn(raw.begin.get()),
            blocks: raw.blocks.get(),
            chain: RecordChain(raw.chain),
        })
    }
}
