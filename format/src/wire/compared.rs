//! How far a replica has come in comparing verify records with what it holds.

use crate::cursor::{CursorError, Put, Reader};
use crate::ids::Lsn;

/// The newest run of verify records that the replica knows of, and what came of it so far.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Compared {
    /// The run, as in [`VerifyBody::run`](crate::verify::VerifyBody::run).
    pub run: Lsn,
    /// Records of the run whose blocks were compared.
    pub ranges: u64,
    /// Blocks in them.
    pub blocks: u64,
    /// Blocks that the replica holds with other content.
    pub mismatched_blocks: u64,
    /// Records that could not be compared: the replica has no readable point there, or cannot read
    /// its own copy.
    pub skipped: u64,
    /// Records of the run; 0 until its last has been dealt with.
    pub total: u64,
}

impl Compared {
    /// Whether the run's last record has been dealt with.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        self.total > 0
    }

    /// Whether the run is over and every block of it was found to be the same.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.is_over() && self.ranges == self.total && self.mismatched_blocks == 0
    }

    /// Appends its 48 bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_u64(self.run.0);
        out.put_u64(self.ranges);
        out.put_u64(self.blocks);
        out.put_u64(self.mismatched_blocks);
        out.put_u64(self.skipped);
        out.put_u64(self.total);
    }

    /// Reads it back.
    ///
    /// # Errors
    /// Cut, or with counts that do not go together.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, CursorError> {
        let compared = Self {
            run: Lsn(reader.u64("run of verify records")?),
            ranges: reader.u64("compared ranges")?,
            blocks: reader.u64("compared blocks")?,
            mismatched_blocks: reader.u64("mismatched blocks")?,
            skipped: reader.u64("skipped ranges")?,
            total: reader.u64("ranges of the run")?,
        };
        if compared.mismatched_blocks > compared.blocks {
            return Err(CursorError::Invalid("mismatched blocks"));
        }
        Ok(compared)
    }
}
