//! Body of a `CheckpointConfirm` record: what became of an application-consistent checkpoint.
//!
//! One payload block (`docs/format.md`, "Checkpoint confirmation body"). It stands behind its
//! checkpoint in the same log, perhaps in a later segment. Without one, a checkpoint counts as
//! crash-consistent.

use crate::ids::{BLOCK_SIZE, Lsn};
use std::mem::offset_of;
use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const MAGIC: [u8; 4] = *b"CKCF";
const VERSION: u16 = 1;
/// Longest text of each kind; what is longer is cut at a character.
pub const TEXT_BYTES_MAX: usize = 1024;

/// Body of a `CheckpointConfirm` record.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CheckpointConfirmBody {
    /// LSN of the checkpoint.
    pub checkpoint: Lsn,
    /// Whether the guest confirmed the thaw, in time, of all that it froze.
    pub confirmed: bool,
    /// From the freeze asked to the thaw answered; 0 if it did not come to that.
    pub window_ns: u64,
    /// The primary's share of it, from the freeze answered to the thaw sent; 0 as above.
    pub own_ns: u64,
    /// What was frozen, separated by spaces.
    pub frozen: String,
    /// What could not be frozen, separated by spaces.
    pub skipped: String,
    /// Why it was not confirmed; empty if it was.
    pub reason: String,
}

/// Why a body was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CheckpointConfirmError {
    /// Not one block.
    #[error("the confirmation of a checkpoint has {0} bytes instead of {BLOCK_SIZE}")]
    Length(usize),
    /// Not such a body.
    #[error("not the confirmation of a checkpoint (wrong magic)")]
    Magic,
    /// A version this program does not know.
    #[error("version {0} of a checkpoint's confirmation is unknown")]
    Version(u16),
    /// An outcome this program does not know, or one with a reason that does not go with it.
    #[error("unknown outcome {0} of a checkpoint")]
    Outcome(u8),
    /// A text is longer than its bound, or is no text.
    #[error("a text in a checkpoint's confirmation is damaged")]
    Text,
    /// Bytes that must be zero are not.
    #[error("reserved bytes of a checkpoint's confirmation are not zero")]
    Reserved,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 4],
    version: U16,
    outcome: u8,
    reserved: u8,
    checkpoint: U64,
    window_ns: U64,
    own_ns: U64,
    frozen_len: U16,
    skipped_len: U16,
    reason_len: U16,
    reserved_2: [u8; 26],
}

const _: () = assert!(size_of::<Raw>() == 64);
const _: () = assert!(offset_of!(Raw, checkpoint) == 8);
const _: () = assert!(offset_of!(Raw, frozen_len) == 32);
const _: () = assert!(size_of::<Raw>() + 3 * TEXT_BYTES_MAX <= BLOCK_SIZE);

impl CheckpointConfirmBody {
    /// The body as one payload block. Texts that are too long are cut; none has a zero byte.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let texts =
            [&self.frozen, &self.skipped, &self.reason].map(|text| cut(text).replace('\0', " "));
        let raw = Raw {
            magic: MAGIC,
            version: VERSION.into(),
            outcome: if self.confirmed { 1 } else { 2 },
            reserved: 0,
            checkpoint: self.checkpoint.0.into(),
            window_ns: self.window_ns.into(),
            own_ns: self.own_ns.into(),
            frozen_len: (texts[0].len() as u16).into(),
            skipped_len: (texts[1].len() as u16).into(),
            reason_len: (texts[2].len() as u16).into(),
            reserved_2: [0; 26],
        };
        let mut block = raw.as_bytes().to_vec();
        for text in texts {
            block.extend_from_slice(text.as_bytes());
        }
        block.resize(BLOCK_SIZE, 0);
        block
    }

    /// Decodes a payload block.
    ///
    /// # Errors
    /// Anything that `encode` would not have written.
    pub fn decode(body: &[u8]) -> Result<Self, CheckpointConfirmError> {
        use CheckpointConfirmError as E;
        if body.len() != BLOCK_SIZE {
            return Err(E::Length(body.len()));
        }
        let Ok((raw, mut rest)) = Raw::read_from_prefix(body) else {
            return Err(E::Length(body.len()));
        };
        if raw.magic != MAGIC {
            return Err(E::Magic);
        }
        if raw.version.get() != VERSION {
            return Err(E::Version(raw.version.get()));
        }
        let mut text = |len: U16| {
            let len = usize::from(len.get());
            let (text, after) = rest.split_at_checked(len).ok_or(E::Text)?;
            rest = after;
            if len > TEXT_BYTES_MAX || text.contains(&0) {
                return Err(E::Text);
            }
            let text = std::str::from_utf8(text).map_err(|_| E::Text)?;
            Ok(text.to_owned())
        };
        let (frozen, skipped) = (text(raw.frozen_len)?, text(raw.skipped_len)?);
        let reason = text(raw.reason_len)?;
        let confirmed = match raw.outcome {
            1 if reason.is_empty() => true,
            2 => false,
            other => return Err(E::Outcome(other)),
        };
        let reserved = [raw.reserved].into_iter().chain(raw.reserved_2);
        if reserved.chain(rest.iter().copied()).any(|byte| byte != 0) {
            return Err(E::Reserved);
        }
        Ok(Self {
            checkpoint: Lsn(raw.checkpoint.get()),
            confirmed,
            window_ns: raw.window_ns.get(),
            own_ns: raw.own_ns.get(),
            frozen,
            skipped,
            reason,
        })
    }
}

fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(TEXT_BYTES_MAX)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body() -> CheckpointConfirmBody {
        CheckpointConfirmBody {
            checkpoint: Lsn(0x0102),
            confirmed: false,
            window_ns: 5,
            own_ns: 3,
            frozen: "/ /srv".to_owned(),
            skipped: "/boot".to_owned(),
            reason: "late".to_owned(),
        }
    }

    #[test]
    fn bytes_are_fixed() {
        let mut expected = vec![0; BLOCK_SIZE];
        expected[0..4].copy_from_slice(b"CKCF"); // magic
        expected[4..6].copy_from_slice(&[1, 0]); // version
        expected[6] = 2; // outcome: not confirmed; 7 reserved
        expected[8..10].copy_from_slice(&[2, 1]); // LSN of the checkpoint
        expected[16] = 5; // window
        expected[24] = 3; // own share
        expected[32] = 6; // length of what was frozen
        expected[34] = 5; // length of what was skipped
        expected[36] = 4; // length of the reason; 38..64 reserved
        expected[64..79].copy_from_slice(b"/ /srv/bootlate");
        assert_eq!(body().encode(), expected);
        assert_eq!(CheckpointConfirmBody::decode(&expected), Ok(body()));
    }

    #[test]
    fn nothing_else_is_accepted() {
        let good = body().encode();
        for len in 0..good.len() {
            assert!(CheckpointConfirmBody::decode(&good[..len]).is_err());
        }
        // All but the numbers, which may be any.
        let fixed = (0..8).chain(32..64).chain(64..80).chain([BLOCK_SIZE - 1]);
        for at in fixed {
            let mut bad = good.clone();
            bad[at] ^= 0x80;
            assert!(CheckpointConfirmBody::decode(&bad).is_err(), "byte {at}");
        }
        let both = CheckpointConfirmBody {
            confirmed: true,
            ..body()
        };
        assert!(CheckpointConfirmBody::decode(&both.encode()).is_err());
    }

    #[test]
    fn long_texts_are_cut_at_a_character() {
        let long = CheckpointConfirmBody {
            reason: "ü".repeat(1000),
            ..body()
        };
        let back = CheckpointConfirmBody::decode(&long.encode()).expect("readable");
        assert_eq!(back.reason, "ü".repeat(512));
    }
}
