//! What a record does. The numbers are part of every format that holds records: frame entries,
//! segment indexes, the record chain.

/// Operation of a record. Unknown numbers are refused by every decoder.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Op {
    /// Data for a run of blocks; the payload is that run.
    Write = 1,
    /// The run reads as zero and keeps its space. No payload.
    Zero = 2,
    /// The run reads as zero; its space may be freed. No payload.
    Trim = 3,
    /// Names a recovery point. One payload block holds its body.
    Checkpoint = 4,
    /// A new epoch begins.
    Epoch = 5,
    /// Hash of a range at this LSN, to be compared by the replica.
    Verify = 6,
    /// A pass begins; its LSN is the pass's identity.
    PassBegin = 7,
    /// A pass has sent its last block.
    PassEnd = 8,
    /// A disk has a new size.
    Resize = 9,
    /// What became of an earlier application-consistent checkpoint. One payload block holds its body.
    CheckpointConfirm = 10,
    /// The primary's disk was set back to an earlier point. Number reserved.
    Rewind = 11,
}

impl Op {
    /// The operation with this number, if there is one.
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Write,
            2 => Self::Zero,
            3 => Self::Trim,
            4 => Self::Checkpoint,
            5 => Self::Epoch,
            6 => Self::Verify,
            7 => Self::PassBegin,
            8 => Self::PassEnd,
            9 => Self::Resize,
            10 => Self::CheckpointConfirm,
            11 => Self::Rewind,
            _ => return None,
        })
    }

    /// Its number in every format.
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// Whether it changes the content of blocks.
    #[must_use]
    pub const fn changes_blocks(self) -> bool {
        matches!(self, Self::Write | Self::Zero | Self::Trim)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_fixed() {
        for number in 0..=255u8 {
            if let Some(op) = Op::from_number(number) {
                assert_eq!(op.number(), number);
            }
        }
        assert_eq!(Op::from_number(0), None);
        assert_eq!(Op::from_number(12), None);
        assert_eq!(Op::from_number(7), Some(Op::PassBegin));
    }
}
