//! Body of a `Verify` record: what a run of blocks held at an exact LSN, for the replica to compare
//! with what it holds there.
//!
//! One payload block (`docs/format.md`, "Verify body"). Disk, first block and block count stand in
//! the record itself. The content is that at [`VerifyBody::at`], an LSN of the same log at or below
//! the record's own. Runs of data carry one hash over all of it, which decides, and the beginning of
//! each block's hash, which tells the blocks that differ. Runs that read as zero carry none, and may
//! be of any length.

use crate::ids::{BLOCK_SIZE, Lsn};
use std::mem::offset_of;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const MAGIC: [u8; 4] = *b"VRFY";
const VERSION: u16 = 1;
const FLAG_LAST: u16 = 1;
const FLAG_ZERO: u16 = 2;
/// Most blocks of data that one record describes: 1 MiB.
pub const VERIFY_BLOCKS_MAX: usize = 256;
const TAG_BYTES: usize = 8;
const TAGS_BYTES: usize = VERIFY_BLOCKS_MAX * TAG_BYTES;

/// What a run of blocks held.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Content {
    /// Zeroes only.
    Zero,
    /// Data with these hashes; whole blocks, the tail of a disk filled up with zeroes.
    Data(BlockHashes),
}

/// Hashes of up to [`VERIFY_BLOCKS_MAX`] blocks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlockHashes {
    /// BLAKE3 over the BLAKE3 hashes of all blocks, in order.
    pub all: [u8; 32],
    /// First 8 bytes of each block's BLAKE3 hash.
    pub tags: Vec<[u8; TAG_BYTES]>,
}

impl BlockHashes {
    /// Hashes of whole blocks.
    ///
    /// # Panics
    /// No blocks, more than [`VERIFY_BLOCKS_MAX`], or bytes that are no whole blocks.
    #[must_use]
    pub fn of(data: &[u8]) -> Self {
        let (blocks, rest) = data.as_chunks::<BLOCK_SIZE>();
        assert!(
            rest.is_empty() && (1..=VERIFY_BLOCKS_MAX).contains(&blocks.len()),
            "{} bytes to be hashed",
            data.len()
        );
        let mut all = blake3::Hasher::new();
        let mut tags = Vec::with_capacity(blocks.len());
        for block in blocks {
            let hash = blake3::hash(block);
            all.update(hash.as_bytes());
            let mut tag = [0; TAG_BYTES];
            tag.copy_from_slice(&hash.as_bytes()[..TAG_BYTES]);
            tags.push(tag);
        }
        Self {
            all: *all.finalize().as_bytes(),
            tags,
        }
    }

    /// Positions of the blocks that differ from another's of as many blocks; empty if and only if
    /// all are the same.
    #[must_use]
    pub fn differing(&self, other: &Self) -> Vec<usize> {
        if self.all == other.all {
            return Vec::new();
        }
        let pairs = self.tags.iter().zip(&other.tags).enumerate();
        let found: Vec<usize> = pairs
            .filter(|(_, (ours, theirs))| ours != theirs)
            .map(|(at, _)| at)
            .collect();
        if found.is_empty() {
            // Different behind equal beginnings: which block cannot be told.
            return (0..self.tags.len()).collect();
        }
        found
    }
}

/// Body of a `Verify` record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VerifyBody {
    /// Identity of the run of records that together describe all disks: drawn at random when it
    /// began, not 0.
    pub run: u64,
    /// Place of this record in its run, from 0.
    pub number: u32,
    /// No further record belongs to the run.
    pub last: bool,
    /// The content is that after this record.
    pub at: Lsn,
    /// What it was.
    pub content: Content,
}

/// Why a body was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VerifyBodyError {
    /// Not one block.
    #[error("the body of a verify record has {0} bytes instead of {BLOCK_SIZE}")]
    Length(usize),
    /// Not such a body.
    #[error("not the body of a verify record (wrong magic)")]
    Magic,
    /// A version this program does not know.
    #[error("version {0} of a verify record's body is unknown")]
    Version(u16),
    /// Hashes by a scheme this program does not know.
    #[error("hash scheme {0} of a verify record is unknown")]
    Scheme(u16),
    /// The run has no identity.
    #[error("a verify record of run 0")]
    Run,
    /// A number of hashes that does not go with the rest.
    #[error("a verify record with {0} hashes")]
    Count(u16),
    /// Bytes or flags that must be zero are not.
    #[error("reserved bytes of a verify record's body are not zero")]
    Reserved,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 4],
    version: U16,
    flags: U16,
    run: U64,
    at: U64,
    number: U32,
    /// 0: plain BLAKE3. Keyed hashes will have a number of their own.
    scheme: U16,
    tag_count: U16,
    all: [u8; 32],
}

const _: () = assert!(size_of::<Raw>() == 64);
const _: () = assert!(offset_of!(Raw, run) == 8);
const _: () = assert!(offset_of!(Raw, number) == 24);
const _: () = assert!(offset_of!(Raw, all) == 32);
const _: () = assert!(size_of::<Raw>() + TAGS_BYTES <= BLOCK_SIZE);

impl VerifyBody {
    /// The body as one payload block.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let (zero, all, tags) = match &self.content {
            Content::Zero => (FLAG_ZERO, [0; 32], &[][..]),
            Content::Data(hashes) => (0, hashes.all, hashes.tags.as_slice()),
        };
        let last = if self.last { FLAG_LAST } else { 0 };
        let raw = Raw {
            magic: MAGIC,
            version: VERSION.into(),
            flags: (last | zero).into(),
            run: self.run.into(),
            at: self.at.0.into(),
            number: self.number.into(),
            scheme: 0.into(),
            tag_count: (tags.len() as u16).into(),
            all,
        };
        let mut block = raw.as_bytes().to_vec();
        block.extend_from_slice(tags.as_flattened());
        block.resize(BLOCK_SIZE, 0);
        block
    }

    /// Decodes a payload block.
    ///
    /// # Errors
    /// Anything that `encode` would not have written.
    pub fn decode(body: &[u8]) -> Result<Self, VerifyBodyError> {
        use VerifyBodyError as E;
        if body.len() != BLOCK_SIZE {
            return Err(E::Length(body.len()));
        }
        let Ok((raw, rest)) = Raw::read_from_prefix(body) else {
            return Err(E::Length(body.len()));
        };
        if raw.magic != MAGIC {
            return Err(E::Magic);
        }
        if raw.version.get() != VERSION {
            return Err(E::Version(raw.version.get()));
        }
        if raw.scheme.get() != 0 {
            return Err(E::Scheme(raw.scheme.get()));
        }
        if raw.run.get() == 0 {
            return Err(E::Run);
        }
        let (flags, count) = (raw.flags.get(), raw.tag_count.get());
        let zero = flags & FLAG_ZERO != 0;
        if usize::from(count) > VERIFY_BLOCKS_MAX || zero != (count == 0) {
            return Err(E::Count(count));
        }
        let (tags, rest) = rest.split_at(usize::from(count) * TAG_BYTES);
        let known = flags & !(FLAG_LAST | FLAG_ZERO) == 0;
        if !known || (zero && raw.all != [0; 32]) || rest.iter().any(|byte| *byte != 0) {
            return Err(E::Reserved);
        }
        let content = if zero {
            Content::Zero
        } else {
            Content::Data(BlockHashes {
                all: raw.all,
                tags: tags.as_chunks::<TAG_BYTES>().0.to_vec(),
            })
        };
        Ok(Self {
            run: raw.run.get(),
            number: raw.number.get(),
            last: flags & FLAG_LAST != 0,
            at: Lsn(raw.at.get()),
            content,
        })
    }
}

#[cfg(test)]
#[path = "verify_tests.rs"]
mod tests;
