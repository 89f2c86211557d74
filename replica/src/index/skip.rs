//! Skipping what reads as zero: how far from a block no version of anything holds data.
//!
//! A lookup costs as much as it covers blocks; a sparse disk of many TiB is walked with this.

use std::sync::Arc;

use afterimage_format::ids::DiskIndex;
use afterimage_format::layer::Extent;

use super::run::Run;

/// Extents without data that one call passes over in each list, at most.
const PASSED_MAX: usize = 1024;

/// A block in `from..=to`: all blocks from `from` up to it read as zero at every LSN, and it is
/// `to` or may hold data. Of stored runs, `pages` are the first with data in reach.
pub(super) fn zero_until(
    runs: &[Arc<Run>],
    pages: &[Arc<[Extent]>],
    disk: DiskIndex,
    from: u64,
    to: u64,
) -> u64 {
    let lists = runs.iter().flat_map(|run| run.levels_of(disk));
    let until = lists.fold(to, |until, (level, extents)| {
        until.min(first_data(extents, level, from, until))
    });
    pages.iter().fold(until, |until, extents| {
        let Some(last) = extents.last() else {
            return until;
        };
        // What follows the page may begin with another version of its last extent.
        let behind = last.block.max(from);
        until.min(first_data(extents, last.level, from, until).min(behind))
    })
}

/// The same for the extents of one size.
fn first_data(extents: &[Extent], level: u8, from: u64, to: u64) -> u64 {
    let start = from >> level << level;
    let rest = &extents[extents.partition_point(|extent| extent.block < start)..];
    let near = rest.iter().take_while(|extent| extent.block < to);
    for (passed, extent) in near.enumerate() {
        if extent.has_data || passed == PASSED_MAX {
            return extent.block.max(from);
        }
    }
    to
}

#[cfg(test)]
mod tests {
    use super::*;
    use afterimage_format::ids::Lsn;

    fn extent(block: u64, level: u8, lsn: u64, has_data: bool) -> Extent {
        Extent {
            block,
            lsn: Lsn(lsn),
            segment: 0,
            position: 0,
            disk: DiskIndex(1),
            level,
            has_data,
        }
    }

    fn until(runs: &[Arc<Run>], from: u64) -> u64 {
        zero_until(runs, &[], DiskIndex(1), from, 1 << 32)
    }

    #[test]
    fn data_of_any_size_and_run_ends_it_and_zeroes_do_not() {
        let runs = [
            Arc::new(Run::new(vec![
                extent(0, 31, 1, false),
                extent(1 << 30, 0, 2, true),
                extent(1 << 30, 0, 3, false),
            ])),
            Arc::new(Run::new(vec![extent(1 << 31, 8, 4, true)])),
        ];
        for (from, wanted) in [
            (0, 1 << 30),
            (1 << 30, 1 << 30),
            ((1 << 30) + 1, 1 << 31),
            // Within an extent that began before.
            ((1 << 31) + 255, (1 << 31) + 255),
            ((1 << 31) + 256, 1 << 32),
        ] {
            assert_eq!(until(&runs, from), wanted, "{from}");
        }
        assert_eq!(
            zero_until(&runs, &[], DiskIndex(0), 5, 9),
            9,
            "another disk"
        );
        assert_eq!(zero_until(&runs, &[], DiskIndex(1), 5, 9), 9);
    }

    #[test]
    fn many_zeroes_end_it_early_and_never_too_late() {
        let zeroes = (0..5000).map(|block| extent(block, 0, 1, false));
        let runs = [Arc::new(Run::new(
            zeroes.chain([extent(6000, 0, 2, true)]).collect(),
        ))];
        let mut at = 0;
        let mut calls = 0;
        while at != 6000 {
            let next = until(&runs, at).max(at + 1);
            assert!(next <= 6000, "{at} to {next}");
            (at, calls) = (next, calls + 1);
        }
        assert!(calls < 20, "{calls}");
    }
}
