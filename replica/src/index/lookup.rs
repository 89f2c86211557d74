//! Finding the newest version of each block of a range.

use std::sync::Arc;

use afterimage_format::ids::{DiskIndex, Lsn};
use afterimage_format::layer::Extent;

use super::SegmentOrdinal;
use super::run::Run;

/// Where the content of some blocks comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// Never written since the base: reads as zero.
    Nothing,
    /// Zeroed or trimmed: reads as zero.
    Zero,
    /// In a segment, from this block of its raw payload on.
    Data {
        /// The segment.
        segment: SegmentOrdinal,
        /// Block within all of the segment's raw payload, chunk after chunk.
        position: u32,
    },
}

/// A run of blocks with one source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// First block.
    pub first_block: u64,
    /// How many.
    pub block_count: usize,
    /// Where they come from.
    pub source: Source,
}

#[derive(Clone, Copy)]
struct Version {
    lsn: Lsn,
    source: Source,
}

const UNWRITTEN: Version = Version {
    lsn: Lsn::ZERO,
    source: Source::Nothing,
};

/// Out of runs in memory and pages of stored ones.
pub(super) fn lookup(
    runs: &[Arc<Run>],
    pages: &[Arc<[Extent]>],
    disk: DiskIndex,
    first_block: u64,
    block_count: usize,
    at: Lsn,
) -> Vec<Piece> {
    let mut versions = vec![UNWRITTEN; block_count];
    let end_block = first_block + block_count as u64;
    for run in runs.iter().filter(|run| run.lsn_first() <= at.0) {
        for (level, extents) in run.levels_of(disk) {
            let start = first_block >> level << level;
            newest_each(extents, start, end_block, at, |extent| {
                overlay(&mut versions, first_block, extent);
            });
        }
    }
    for extents in pages {
        let Some(level) = extents.first().map(|extent| extent.level) else {
            continue;
        };
        let start = first_block >> level << level;
        newest_each(extents, start, end_block, at, |extent| {
            overlay(&mut versions, first_block, extent);
        });
    }
    join(first_block, &versions)
}

/// Of each aligned range from `start` to below `end`: the newest extent not newer than `at`.
/// Skips over the other versions by searching, so that a hot block costs no more than a cold one.
fn newest_each(extents: &[Extent], start: u64, end: u64, at: Lsn, mut each: impl FnMut(&Extent)) {
    let mut rest = &extents[extents.partition_point(|extent| extent.block < start)..];
    while let Some(first) = rest.first()
        && first.block < end
    {
        let block = first.block;
        let versions = &rest[..gallop(rest, |extent| extent.block == block)];
        let visible = gallop(versions, |extent| extent.lsn <= at);
        if let Some(newest) = versions[..visible].last() {
            each(newest);
        }
        rest = &rest[versions.len()..];
    }
}

/// Length of the prefix that satisfies `holds`, found in steps that double: cheap when short.
fn gallop(extents: &[Extent], holds: impl Fn(&Extent) -> bool) -> usize {
    let mut bound = 1;
    while bound < extents.len() && holds(&extents[bound - 1]) {
        bound *= 2;
    }
    let upper = bound.min(extents.len());
    let lower = bound / 2;
    lower + extents[lower..upper].partition_point(holds)
}

fn overlay(versions: &mut [Version], first_block: u64, extent: &Extent) {
    let from = extent.block.max(first_block);
    let to = extent.end().min(first_block + versions.len() as u64);
    for block in from..to {
        let version = &mut versions[(block - first_block) as usize];
        if extent.lsn < version.lsn {
            continue;
        }
        let source = if extent.has_data {
            Source::Data {
                segment: SegmentOrdinal(extent.segment),
                position: extent.position + (block - extent.block) as u32,
            }
        } else {
            Source::Zero
        };
        *version = Version {
            lsn: extent.lsn,
            source,
        };
    }
}

fn join(first_block: u64, versions: &[Version]) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for (block, version) in (first_block..).zip(versions) {
        if let Some(piece) = pieces.last_mut()
            && continues(piece, version.source)
        {
            piece.block_count += 1;
            continue;
        }
        pieces.push(Piece {
            first_block: block,
            block_count: 1,
            source: version.source,
        });
    }
    pieces
}

fn continues(piece: &Piece, next: Source) -> bool {
    match (piece.source, next) {
        (
            Source::Data { segment, position },
            Source::Data {
                segment: same,
                position: here,
            },
        ) => segment == same && position as usize + piece.block_count == here as usize,
        (Source::Nothing, Source::Nothing) | (Source::Zero, Source::Zero) => true,
        _ => false,
    }
}
