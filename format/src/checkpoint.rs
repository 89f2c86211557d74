//! Body of a checkpoint's record: what kind of recovery point it names, and its label.
//!
//! One payload block (`docs/format.md`, "Checkpoint body"): magic 4, version 2, kind 1, trigger 1,
//! label length 1, reserved 7, label 64, zeroes to the end. The record's payload checksum covers
//! it. Readable without zstd or key material beyond the chunk's own.

use crate::ids::BLOCK_SIZE;
use crate::names::{self, NAME_BYTES_MAX, NameError};
use std::mem::offset_of;
use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const MAGIC: [u8; 4] = *b"CKPT";
const VERSION: u16 = 1;

/// How consistent the point is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum CheckpointKind {
    /// As after a power cut: what was flushed is there.
    Crash = 1,
    /// The guest was frozen. Counts as crash-consistent until a `CheckpointConfirm` follows.
    Application = 2,
}

/// What made the checkpoint.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum CheckpointTrigger {
    /// Somebody asked for it.
    Request = 1,
    /// The schedule.
    Schedule = 2,
}

/// Body of a `Checkpoint` record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CheckpointBody {
    /// How consistent it is.
    pub kind: CheckpointKind,
    /// What made it.
    pub trigger: CheckpointTrigger,
    /// Its label; empty for none.
    pub label: String,
}

/// Why a body was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CheckpointBodyError {
    /// Not one block.
    #[error("the body of a checkpoint has {0} bytes instead of {BLOCK_SIZE}")]
    Length(usize),
    /// Not the body of a checkpoint.
    #[error("not the body of a checkpoint (wrong magic)")]
    Magic,
    /// A version this program does not know.
    #[error("version {0} of a checkpoint's body is unknown")]
    Version(u16),
    /// A kind or trigger this program does not know.
    #[error("unknown kind {0} or trigger {1} of a checkpoint")]
    Kind(u8, u8),
    /// The label is no name.
    #[error("label of a checkpoint: {0}")]
    Label(#[from] NameError),
    /// The label is not text, or longer than its field.
    #[error("label of a checkpoint: not a name")]
    LabelBytes,
    /// Bytes that must be zero are not.
    #[error("reserved bytes of a checkpoint's body are not zero")]
    Reserved,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 4],
    version: U16,
    kind: u8,
    trigger: u8,
    label_len: u8,
    reserved: [u8; 7],
    label: [u8; NAME_BYTES_MAX],
}

const _: () = assert!(size_of::<Raw>() == 80);
const _: () = assert!(offset_of!(Raw, label) == 16);

impl CheckpointBody {
    /// The body as one payload block.
    ///
    /// # Errors
    /// The label is no name.
    pub fn encode(&self) -> Result<Vec<u8>, NameError> {
        if !self.label.is_empty() {
            names::validate(&self.label)?;
        }
        let mut label = [0; NAME_BYTES_MAX];
        label[..self.label.len()].copy_from_slice(self.label.as_bytes());
        let raw = Raw {
            magic: MAGIC,
            version: VERSION.into(),
            kind: self.kind as u8,
            trigger: self.trigger as u8,
            label_len: self.label.len() as u8,
            reserved: [0; 7],
            label,
        };
        let mut block = vec![0; BLOCK_SIZE];
        block[..size_of::<Raw>()].copy_from_slice(raw.as_bytes());
        Ok(block)
    }

    /// Decodes a payload block.
    ///
    /// # Errors
    /// Anything that `encode` would not have written.
    pub fn decode(body: &[u8]) -> Result<Self, CheckpointBodyError> {
        if body.len() != BLOCK_SIZE {
            return Err(CheckpointBodyError::Length(body.len()));
        }
        let Ok((raw, rest)) = Raw::read_from_prefix(body) else {
            return Err(CheckpointBodyError::Length(body.len()));
        };
        if raw.magic != MAGIC {
            return Err(CheckpointBodyError::Magic);
        }
        if raw.version.get() != VERSION {
            return Err(CheckpointBodyError::Version(raw.version.get()));
        }
        let unknown = CheckpointBodyError::Kind(raw.kind, raw.trigger);
        let kind = match raw.kind {
            1 => CheckpointKind::Crash,
            2 => CheckpointKind::Application,
            _ => return Err(unknown),
        };
        let trigger = match raw.trigger {
            1 => CheckpointTrigger::Request,
            2 => CheckpointTrigger::Schedule,
            _ => return Err(unknown),
        };
        let (label, padding) = raw
            .label
            .split_at_checked(usize::from(raw.label_len))
            .ok_or(CheckpointBodyError::LabelBytes)?;
        let label = std::str::from_utf8(label).map_err(|_| CheckpointBodyError::LabelBytes)?;
        if !label.is_empty() {
            names::validate(label)?;
        }
        let reserved = raw.reserved.iter().chain(padding).chain(rest);
        if reserved.copied().any(|byte| byte != 0) {
            return Err(CheckpointBodyError::Reserved);
        }
        Ok(Self {
            kind,
            trigger,
            label: label.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body() -> CheckpointBody {
        CheckpointBody {
            kind: CheckpointKind::Application,
            trigger: CheckpointTrigger::Schedule,
            label: "before-upgrade".to_owned(),
        }
    }

    #[test]
    fn bytes_are_fixed() {
        let mut expected = vec![0; BLOCK_SIZE];
        expected[0..4].copy_from_slice(b"CKPT"); // magic
        expected[4..6].copy_from_slice(&[1, 0]); // version
        expected[6] = 2; // kind: application
        expected[7] = 2; // trigger: schedule
        expected[8] = 14; // label length; 9..16 reserved
        expected[16..30].copy_from_slice(b"before-upgrade");
        assert_eq!(body().encode().expect("a name"), expected);
        assert_eq!(CheckpointBody::decode(&expected), Ok(body()));
    }

    #[test]
    fn nothing_else_is_accepted() {
        let good = body().encode().expect("a name");
        for len in 0..good.len() {
            assert!(CheckpointBody::decode(&good[..len]).is_err(), "{len}");
        }
        for at in (0..96).chain([BLOCK_SIZE - 1]) {
            let mut bad = good.clone();
            bad[at] ^= 0x80;
            assert!(CheckpointBody::decode(&bad).is_err(), "byte {at}");
        }
        let dots = CheckpointBody {
            label: "../x".into(),
            ..body()
        };
        assert_eq!(dots.encode(), Err(NameError::BadStart));
    }
}
