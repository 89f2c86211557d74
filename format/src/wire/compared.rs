//! How far a replica has come in comparing verify records with what it holds.

use crate::cursor::{CursorError, Put, Reader};
use crate::ids::Lsn;

/// What came of comparing a run of verify records so far.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Compared {
    /// The run, as in [`VerifyBody::run`](crate::verify::VerifyBody::run); 0: none.
    pub run: u64,
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

/// What a replica has come to.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Comparisons {
    /// The newest run whose last record has been dealt with, by whatever process.
    pub finished: Compared,
    /// A run that has begun behind it.
    pub current: Compared,
    /// The records of the newest epoch up to here have been looked at: what a run up to here has come
    /// to will not change any more.
    pub looked: Lsn,
}

impl Comparisons {
    /// Appends its 104 bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        self.finished.encode(out);
        self.current.encode(out);
        out.put_u64(self.looked.0);
    }

    /// Reads it back.
    ///
    /// # Errors
    /// Cut, or with counts that do not go together.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, CursorError> {
        Ok(Self {
            finished: Compared::decode(reader)?,
            current: Compared::decode(reader)?,
            looked: Lsn(reader.u64("record looked at")?),
        })
    }
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
        self.is_over()
            && self.ranges == self.total
            && (self.skipped, self.mismatched_blocks) == (0, 0)
    }

    /// Appends its 48 bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_u64(self.run);
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
            run: reader.u64("run of verify records")?,
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
