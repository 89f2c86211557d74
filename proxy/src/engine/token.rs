//! What the tokens of the engine's storage operations mean.

use crate::io::Token;

/// What an operation was for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Purpose {
    /// Frames on their way to the log.
    LogWrite,
    /// fdatasync of the log.
    LogSync,
    /// A superblock.
    Superblock,
    /// A destage operation, by its slot.
    Destage(usize),
    /// Sync of the backing of the disk with this number.
    BackingSync(u16),
    /// A client's or a pass's read, by its slot.
    Read(usize),
    /// What a ragged edge is merged with, by its slot.
    Edge(usize),
    /// Reading the log to destage again.
    RedoRead,
    /// Destaging again.
    RedoWrite,
}

const SHIFT: u32 = 56;

impl Purpose {
    pub(super) fn token(self) -> Token {
        let (kind, detail) = match self {
            Self::LogWrite => (1, 0),
            Self::LogSync => (2, 0),
            Self::Superblock => (3, 0),
            Self::Destage(slot) => (4, slot as u64),
            Self::BackingSync(disk) => (5, u64::from(disk)),
            Self::Read(slot) => (6, slot as u64),
            Self::Edge(slot) => (7, slot as u64),
            Self::RedoRead => (8, 0),
            Self::RedoWrite => (9, 0),
        };
        Token(kind << SHIFT | detail)
    }

    /// What a token of this engine says; `None` for one that it never gave.
    pub(super) fn of(token: Token) -> Option<Self> {
        let detail = token.0 & ((1 << SHIFT) - 1);
        let slot = usize::try_from(detail).ok()?;
        Some(match token.0 >> SHIFT {
            1 => Self::LogWrite,
            2 => Self::LogSync,
            3 => Self::Superblock,
            4 => Self::Destage(slot),
            5 => Self::BackingSync(u16::try_from(detail).ok()?),
            6 => Self::Read(slot),
            7 => Self::Edge(slot),
            8 => Self::RedoRead,
            9 => Self::RedoWrite,
            _ => return None,
        })
    }
}
