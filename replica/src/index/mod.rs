//! Which version of which block is where: in memory, per base of a group's history.
//!
//! Owns immutable sorted runs of extents, one per segment at first, merged by size as they come, so
//! that their number stays logarithmic. An extent covers an aligned power of two of blocks
//! ([`extent`]), so that a lookup is a few binary searches per run, however long the history.
//!
//! What always holds: a run never changes once it is in a list; a [`Snapshot`] is a copy of the
//! list and sees exactly what was added before it was taken. Nothing here is durable: it is built
//! anew from the segments' own indexes.
#![deny(clippy::disallowed_methods)]

mod extent;
mod lookup;
mod run;
mod skip;

use std::sync::Arc;

use afterimage_format::ids::{DiskIndex, Lsn};
use afterimage_format::op::Op;
use afterimage_format::segment::SegmentIndex;

use extent::Extent;
pub use lookup::{Piece, Source};
use run::Run;

/// Runs of about the same size that are merged into one.
const MERGE_WIDTH: usize = 8;

/// Number of a segment within its epoch's list, in the order of commits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct SegmentOrdinal(pub u32);

/// The growing index of one base. Cheap to snapshot.
#[derive(Debug, Default, Clone)]
pub struct Index {
    /// Largest and oldest first.
    runs: Vec<Arc<Run>>,
    extents: usize,
}

impl Index {
    /// Adds what a segment says about blocks. Records before position `skip` are left out: another
    /// segment, or an older base, has them.
    pub fn add(&mut self, ordinal: SegmentOrdinal, segment: &SegmentIndex, skip: usize) {
        self.add_part(ordinal, segment, skip, segment.entries.len());
    }

    /// Adds the records `from..to` of a segment.
    pub fn add_part(
        &mut self,
        ordinal: SegmentOrdinal,
        segment: &SegmentIndex,
        from: usize,
        to: usize,
    ) {
        let mut extents = Vec::new();
        let mut position = 0u32;
        for (at, entry) in segment.entries.iter().enumerate() {
            let record = &entry.record;
            let here = position;
            position += entry.payload.map_or(0, |place| u32::from(place.blocks));
            if at < from || at >= to || !record.op.changes_blocks() {
                continue;
            }
            let has_data = record.op == Op::Write;
            extent::split(
                record.first_block,
                u64::from(record.block_count),
                |block, level| {
                    let offset = (block - record.first_block) as u32;
                    extents.push(Extent {
                        block,
                        lsn: record.lsn.0,
                        segment: ordinal.0,
                        position: if has_data { here + offset } else { 0 },
                        disk: record.disk.0,
                        level,
                        has_data,
                    });
                },
            );
        }
        if extents.is_empty() {
            return;
        }
        self.extents += extents.len();
        self.runs.push(Arc::new(Run::new(extents)));
        self.merge();
    }

    /// What is known now, to be read at any LSN up to the last added.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            runs: self.runs.as_slice().into(),
        }
    }

    /// Extents held, 32 bytes each.
    #[must_use]
    pub const fn extents(&self) -> usize {
        self.extents
    }

    /// Runs held.
    #[must_use]
    pub const fn runs(&self) -> usize {
        self.runs.len()
    }

    /// Joins the newest [`MERGE_WIDTH`] runs whenever they are of about one size, so that each
    /// extent is moved a logarithmic number of times.
    fn merge(&mut self) {
        while self.runs.len() >= MERGE_WIDTH {
            let tail = &self.runs[self.runs.len() - MERGE_WIDTH..];
            let newest = tail[MERGE_WIDTH - 1].len().max(1);
            let joined: usize = tail.iter().map(|run| run.len()).sum();
            let oldest = tail[0].len();
            // The oldest of them must be no larger than all the others would become together.
            if oldest > (joined - oldest).max(newest) {
                break;
            }
            let from = self.runs.len() - MERGE_WIDTH;
            let parts: Vec<Arc<Run>> = self.runs.drain(from..).collect();
            self.runs.push(Arc::new(Run::merged(&parts)));
        }
    }
}

/// The runs of an [`Index`] at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    runs: Arc<[Arc<Run>]>,
}

impl Snapshot {
    /// What blocks `first_block..first_block + block_count` of a disk hold after the record `at`:
    /// pieces in order, without holes, that cover exactly this range.
    #[must_use]
    pub fn lookup(
        &self,
        disk: DiskIndex,
        first_block: u64,
        block_count: usize,
        at: Lsn,
    ) -> Vec<Piece> {
        lookup::lookup(&self.runs, disk, first_block, block_count, at)
    }

    /// A block in `from..=to`: all blocks up to it read as zero, and it is `to` or may hold data.
    #[must_use]
    pub fn zero_until(&self, disk: DiskIndex, from: u64, to: u64) -> u64 {
        skip::zero_until(&self.runs, disk, from, to)
    }
}
