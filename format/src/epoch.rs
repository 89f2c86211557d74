//! Body of an `Epoch` record: the number that the log was given. The record says since when.
//!
//! One payload block (`docs/format.md`, "Epoch body"): magic, version, the number, zeroes to the end;
//! the record's payload checksum covers it.

use crate::ids::{BLOCK_SIZE, Epoch};
use std::mem::offset_of;
use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const MAGIC: [u8; 4] = *b"EPCH";
const VERSION: u16 = 1;

/// Body of an `Epoch` record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EpochBody {
    /// Under which epoch the records behind this one are written, from 1.
    pub epoch: Epoch,
}

/// Why a body was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EpochBodyError {
    /// Not one block.
    #[error("the body of an epoch record has {0} bytes instead of {BLOCK_SIZE}")]
    Length(usize),
    /// Not such a body.
    #[error("not the body of an epoch record (wrong magic)")]
    Magic,
    /// A version this program does not know.
    #[error("version {0} of an epoch record's body is unknown")]
    Version(u16),
    /// A number that no log is given.
    #[error("an epoch record with the number {0}")]
    Number(u64),
    /// Bytes that must be zero are not.
    #[error("reserved bytes of an epoch record's body are not zero")]
    Reserved,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 4],
    version: U16,
    reserved: U16,
    epoch: U64,
}

const _: () = assert!(size_of::<Raw>() == 16);
const _: () = assert!(offset_of!(Raw, version) == 4);
const _: () = assert!(offset_of!(Raw, epoch) == 8);

impl EpochBody {
    /// The body as one payload block.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let raw = Raw {
            magic: MAGIC,
            version: VERSION.into(),
            reserved: 0.into(),
            epoch: self.epoch.0.into(),
        };
        let mut block = raw.as_bytes().to_vec();
        block.resize(BLOCK_SIZE, 0);
        block
    }

    /// Decodes a payload block.
    ///
    /// # Errors
    /// Anything that `encode` would not have written for an epoch of a log.
    pub fn decode(body: &[u8]) -> Result<Self, EpochBodyError> {
        use EpochBodyError as E;
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
        if raw.reserved.get() != 0 || rest.iter().any(|byte| *byte != 0) {
            return Err(E::Reserved);
        }
        let epoch = Epoch(raw.epoch.get());
        if epoch == Epoch(0) || epoch > Epoch::MAX {
            return Err(E::Number(epoch.0));
        }
        Ok(Self { epoch })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::golden;

    const BODY: EpochBody = EpochBody {
        epoch: Epoch(0x0102),
    };

    #[test]
    fn bytes_are_fixed() {
        let mut expected = golden(include_str!("../golden/epoch-v1.hex"));
        expected.resize(BLOCK_SIZE, 0);
        assert_eq!(BODY.encode(), expected);
        assert_eq!(EpochBody::decode(&expected), Ok(BODY));
    }

    #[test]
    fn nothing_else_is_accepted() {
        let good = BODY.encode();
        for len in 0..good.len() {
            let cut = EpochBody::decode(&good[..len]);
            assert_eq!(cut, Err(EpochBodyError::Length(len)));
        }
        let longer = [&good[..], &[0]].concat();
        assert!(EpochBody::decode(&longer).is_err());
        // All but the number.
        for at in (0..8).chain(16..good.len()) {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(EpochBody::decode(&bad).is_err(), "byte {at}");
        }
        for number in [0, Epoch::MAX.0 + 1, u64::MAX] {
            let mut bad = good.clone();
            bad[8..16].copy_from_slice(&number.to_le_bytes());
            assert_eq!(EpochBody::decode(&bad), Err(EpochBodyError::Number(number)));
        }
    }
}
