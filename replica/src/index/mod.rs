//! Which version of which block is where, per base of a group's history.
//!
//! Owns immutable sorted runs of extents, one per segment at first, merged by size as they come, so
//! that their number stays logarithmic. An extent covers an aligned power of two of blocks
//! ([`extent`]), so that a lookup is a few binary searches per run, however long the history. What
//! is sealed is one run, and goes into a layer of the repository; then only the table of its pages
//! ([`stored`]) stays in memory.
//!
//! What always holds: a run never changes once it is in a list; a [`Snapshot`] is a copy of the
//! lists and sees exactly what was added before it was taken. Nothing here reads anything: a lookup
//! says which pages it needs ([`Snapshot::pages`]) and is given them. Everything can be built anew
//! from the segments' own indexes.
#![deny(clippy::disallowed_methods)]

mod extent;
mod lookup;
mod run;
mod skip;
mod stored;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use afterimage_format::ids::{DiskIndex, Lsn};
use afterimage_format::layer::Extent;
use afterimage_format::op::Op;
use afterimage_format::segment::SegmentIndex;

pub use lookup::{Piece, Source};
pub use run::Run;
pub use stored::{LayerRange, PageRef, StoredRun};

/// Runs of about the same size that are merged into one.
const MERGE_WIDTH: usize = 8;

/// Number of a segment within its epoch's list, in the order of commits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct SegmentOrdinal(pub u32);

/// The growing index of one base. Cheap to snapshot.
#[derive(Debug, Default, Clone)]
pub struct Index {
    /// In layers, oldest first.
    stored: Vec<Arc<StoredRun>>,
    /// On the way into layers, with the number of the last segment in them, oldest first.
    sealed: Vec<(u64, Arc<Run>)>,
    /// What came since, largest and oldest first.
    runs: Vec<Arc<Run>>,
    /// Extents in `runs`.
    growing: usize,
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
                        lsn: record.lsn,
                        segment: ordinal.0,
                        position: if has_data { here + offset } else { 0 },
                        disk: record.disk,
                        level,
                        has_data,
                    });
                },
            );
        }
        if extents.is_empty() {
            return;
        }
        self.growing += extents.len();
        self.runs.push(Arc::new(Run::new(extents)));
        self.merge();
    }

    /// What is known now, to be read at any LSN up to the last added.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let sealed = self.sealed.iter().map(|(_, run)| run);
        Snapshot {
            stored: self.stored.as_slice().into(),
            runs: sealed.chain(&self.runs).cloned().collect(),
        }
    }

    /// Extents held in memory, 32 bytes each.
    #[must_use]
    pub fn extents(&self) -> usize {
        let sealed = self.sealed.iter().map(|(_, run)| run.len());
        sealed.sum::<usize>() + self.growing
    }

    /// Extents that are not sealed.
    #[must_use]
    pub const fn growing(&self) -> usize {
        self.growing
    }

    /// Runs held, in memory or in layers.
    #[must_use]
    pub fn runs(&self) -> usize {
        self.stored.len() + self.sealed.len() + self.runs.len()
    }

    /// Everything that is not sealed as one run, up to this segment.
    pub(crate) fn seal(&mut self, last_seq: u64) -> Option<Arc<Run>> {
        let parts = std::mem::take(&mut self.runs);
        self.growing = 0;
        let run = match &parts[..] {
            [] => return None,
            [run] => run.clone(),
            parts => Arc::new(Run::merged(parts)),
        };
        self.sealed.push((last_seq, run.clone()));
        Some(run)
    }

    /// A layer holds what these segments brought; `run` is this base's part of it.
    pub(crate) fn store(&mut self, range: LayerRange, run: Option<StoredRun>) {
        self.sealed.retain(|(last, _)| !range.contains(*last));
        self.stored.retain(|run| !range.covers(run.layer()));
        self.stored.extend(run.map(Arc::new));
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
    stored: Arc<[Arc<StoredRun>]>,
    runs: Arc<[Arc<Run>]>,
}

impl Snapshot {
    /// The pages that a [`Snapshot::lookup`] of this range needs, those of a layer together and in
    /// its order.
    #[must_use]
    pub fn pages(
        &self,
        disk: DiskIndex,
        first_block: u64,
        block_count: usize,
        at: Lsn,
    ) -> Vec<PageRef> {
        let blocks = first_block..first_block + block_count as u64;
        let mut wanted = Vec::new();
        for run in &*self.stored {
            run.pages_of(disk, &blocks, at, &mut wanted);
        }
        wanted
    }

    /// What blocks `first_block..first_block + block_count` of a disk hold after the record `at`:
    /// pieces in order, without holes, that cover exactly this range. `pages` are the extents of
    /// [`Snapshot::pages`] for the same range.
    #[must_use]
    pub fn lookup(
        &self,
        disk: DiskIndex,
        first_block: u64,
        block_count: usize,
        at: Lsn,
        pages: &[Arc<[Extent]>],
    ) -> Vec<Piece> {
        lookup::lookup(&self.runs, pages, disk, first_block, block_count, at)
    }

    /// The pages that [`Snapshot::zero_until`] needs.
    #[must_use]
    pub fn first_data_pages(&self, disk: DiskIndex, from: u64, to: u64) -> Vec<PageRef> {
        let mut wanted = Vec::new();
        for run in &*self.stored {
            run.first_data_pages(disk, from, to, &mut wanted);
        }
        wanted
    }

    /// A block in `from..=to`: all blocks up to it read as zero, and it is `to` or may hold data.
    /// `pages` are the extents of [`Snapshot::first_data_pages`] for the same range.
    #[must_use]
    pub fn zero_until(&self, disk: DiskIndex, from: u64, to: u64, pages: &[Arc<[Extent]>]) -> u64 {
        skip::zero_until(&self.runs, pages, disk, from, to)
    }
}
