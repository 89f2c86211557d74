//! A group's disks as they were at one point, read straight from the segments.
//!
//! Opening one reads nothing: it is a copy of a list of index runs. What always holds: an image
//! shows exactly the records up to its LSN over its base, whatever is received meanwhile; every
//! byte handed out comes from a chunk whose checksum was checked, out of a segment whose index is
//! the very one that the history was built from. Memory is bounded by the [`ChunkCache`] and a few
//! chunks per read. An error names the object and leaves the image usable.

mod cache;
mod device;
mod error;
mod pages;
mod read;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use afterimage_format::ids::{BLOCK_SIZE, DiskIndex, Epoch};
use afterimage_format::manifest::DiskEntry;

use crate::group::Group;
use crate::history::Position;
use crate::index::{Piece, Snapshot, Source};

pub use cache::ChunkCache;
pub use device::ImageDevice;
pub use error::ImageError;

/// Most blocks that one lookup covers.
pub const LOOKUP_BLOCKS_MAX: usize = 8192;

/// Most pages of layers that one lookup reads, if it covers more than a block: 4 MiB of memory.
const PAGES_MAX: usize = 512;

/// A group's disks at one point.
#[derive(Debug, Clone)]
pub struct Image {
    group: Arc<Group>,
    at: Position,
    wall_ns: Option<u64>,
    snapshot: Snapshot,
    disks: Arc<[DiskEntry]>,
    cache: Arc<ChunkCache>,
}

impl Image {
    /// Opens the image at a position.
    ///
    /// # Errors
    /// [`ImageError::NoSuchPoint`] if the position is in a gap, in an unfinished pass, or not
    /// there at all.
    pub fn open(
        group: Arc<Group>,
        at: Position,
        cache: Arc<ChunkCache>,
    ) -> Result<Self, ImageError> {
        let (snapshot, disks, wall_ns) = {
            let history = group.history();
            let base = history.base_at(at).ok_or(ImageError::NoSuchPoint { at })?;
            let epoch = history
                .epoch(at.epoch)
                .ok_or(ImageError::NoSuchPoint { at })?;
            let named = base.checkpoints.iter().find(|point| point.lsn == at.lsn);
            (
                base.index().snapshot(),
                epoch.disks.as_slice().into(),
                named.map(|p| p.wall_ns),
            )
        };
        Ok(Self {
            group,
            at,
            wall_ns,
            snapshot,
            disks,
            cache,
        })
    }

    /// The point it shows.
    #[must_use]
    pub const fn position(&self) -> Position {
        self.at
    }

    /// Primary's clock at the point, if a checkpoint stands there.
    #[must_use]
    pub const fn checkpoint_ns(&self) -> Option<u64> {
        self.wall_ns
    }

    /// The group.
    #[must_use]
    pub const fn group(&self) -> &Arc<Group> {
        &self.group
    }

    /// The disks, in the order of the group's disk table.
    #[must_use]
    pub fn disks(&self) -> &[DiskEntry] {
        &self.disks
    }

    /// The disk of this name.
    #[must_use]
    pub fn disk_by_name(&self, name: &str) -> Option<DiskIndex> {
        let place = self.disks.iter().position(|disk| disk.name == name)?;
        Some(DiskIndex(place as u16))
    }

    /// Size of a disk in bytes.
    ///
    /// # Errors
    /// No such disk.
    pub fn size(&self, disk: DiskIndex) -> Result<u64, ImageError> {
        let entry = self.disks.get(usize::from(disk.0));
        entry
            .map(|entry| entry.size_bytes)
            .ok_or(ImageError::NoSuchDisk { disk: disk.0 })
    }

    /// What is where, from `first_block` on, for at most [`LOOKUP_BLOCKS_MAX`] blocks, and not
    /// beyond the disk's last block: the pieces may end before all that was asked for. More blocks
    /// than that come at once where all of them read as zero. Reads no data, and of the index what
    /// is not in memory.
    ///
    /// # Errors
    /// No such disk, or a layer cannot be read.
    pub async fn pieces(
        &self,
        disk: DiskIndex,
        first_block: u64,
        block_count: u64,
    ) -> Result<Vec<Piece>, ImageError> {
        let blocks = self.size(disk)?.div_ceil(BLOCK_SIZE as u64);
        let left = blocks.saturating_sub(first_block);
        let count = block_count.min(left);
        if count > LOOKUP_BLOCKS_MAX as u64 {
            let end = first_block + count;
            let wanted = self.snapshot.first_data_pages(disk, first_block, end);
            let pages = self.pages(&wanted).await?;
            let until = self.snapshot.zero_until(disk, first_block, end, &pages);
            if until - first_block > LOOKUP_BLOCKS_MAX as u64 {
                return Ok(vec![Piece {
                    first_block,
                    block_count: (until - first_block) as usize,
                    source: Source::Zero,
                }]);
            }
        }
        let mut count = count.min(LOOKUP_BLOCKS_MAX as u64) as usize;
        let mut wanted = self.snapshot.pages(disk, first_block, count, self.at.lsn);
        // Blocks that were written very often have many.
        while wanted.len() > PAGES_MAX && count > 1 {
            count = count.div_ceil(2);
            wanted = self.snapshot.pages(disk, first_block, count, self.at.lsn);
        }
        let pages = self.pages(&wanted).await?;
        Ok(self
            .snapshot
            .lookup(disk, first_block, count, self.at.lsn, &pages))
    }

    const fn epoch(&self) -> Epoch {
        self.at.epoch
    }
}
