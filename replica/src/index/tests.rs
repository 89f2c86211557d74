//! A run that is stored in pages answers as one that is in memory, on disks of any size.

use std::sync::Arc;

use afterimage_format::ids::{DiskIndex, Lsn};
use afterimage_format::layer::{Extent, LayerRun, encode_page};
use proptest::prelude::*;

use super::{Index, LayerRange, PageRef, Run, Snapshot, StoredRun};

const DISK: DiskIndex = DiskIndex(1);
/// Blocks that the extents are among.
const BLOCKS: u64 = 1 << 12;

fn extent() -> impl Strategy<Value = Extent> {
    let place = (
        0..3u16,
        0..10u8,
        0..BLOCKS,
        1..u64::from(u32::MAX),
        any::<bool>(),
    );
    place.prop_map(|(disk, level, block, lsn, has_data)| Extent {
        block: block >> level << level,
        lsn: Lsn(lsn),
        segment: 7,
        position: if has_data { lsn as u32 % 1024 } else { 0 },
        disk: DiskIndex(disk),
        level,
        has_data,
    })
}

/// The run in pages of so many extents, and the extents of each page.
struct Stored {
    snapshot: Snapshot,
    pages: Vec<(u32, Arc<[Extent]>)>,
}

impl Stored {
    fn new(run: &Run, page_extents: usize) -> Self {
        let mut file = Vec::new();
        let mut pages = Vec::new();
        let mut entries = Vec::new();
        for same in run
            .extents()
            .chunk_by(|one, other| (one.disk, one.level) == (other.disk, other.level))
        {
            for extents in same.chunks(page_extents) {
                let entry = encode_page(extents, 0, &mut file).expect("a page");
                pages.push((entry.place.offset, extents.into()));
                entries.push(entry);
            }
        }
        let mut index = Index::default();
        let range = LayerRange { first: 1, last: 9 };
        let run = LayerRun {
            base: Lsn(1),
            lsn_min: Lsn(run.lsn_first()),
            extents: run.len() as u64,
            pages: entries,
        };
        index.store(range, Some(StoredRun::new(range, run)));
        Self {
            snapshot: index.snapshot(),
            pages,
        }
    }

    /// What is read for these, and nothing else.
    fn read(&self, wanted: &[PageRef]) -> Vec<Arc<[Extent]>> {
        let read = wanted.iter().map(|page| {
            let offset = page.entry().place.offset;
            let at = self.pages.binary_search_by_key(&offset, |(at, _)| *at);
            self.pages[at.expect("a page")].1.clone()
        });
        read.collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn stored_runs_answer_as_those_in_memory(
        mut extents in prop::collection::vec(extent(), 1..200),
        page_extents in 1..6usize,
        ranges in prop::collection::vec((0..BLOCKS, 1..1024u64, 0..u64::from(u32::MAX)), 1..20),
    ) {
        extents.sort_by_key(Extent::key);
        extents.dedup_by_key(|extent| extent.key());
        let run = Arc::new(Run::new(extents.clone()));
        let stored = Stored::new(&run, page_extents);
        let memory = Index { runs: vec![run], ..Index::default() }.snapshot();
        for (first, count, at) in ranges {
            let (at, blocks) = (Lsn(at), count as usize);
            let pages = stored.read(&stored.snapshot.pages(DISK, first, blocks, at));
            // Versions of one LSN may be of any of its extents.
            let data = |snapshot: &Snapshot, pages: &[_]| {
                let pieces = snapshot.lookup(DISK, first, blocks, at, pages);
                pieces.into_iter().map(|p| (p.first_block, p.block_count, p.source)).collect::<Vec<_>>()
            };
            let same_lsn = extents.windows(2).any(|two| two[0].lsn == two[1].lsn);
            if !same_lsn {
                prop_assert_eq!(data(&stored.snapshot, &pages), data(&memory, &[]));
            }
            let end = first + count;
            let wanted = stored.snapshot.first_data_pages(DISK, first, end);
            let until = stored.snapshot.zero_until(DISK, first, end, &stored.read(&wanted));
            prop_assert!((first..=end).contains(&until));
            let in_the_way = extents.iter().find(|extent| {
                until > first && extent.disk == DISK && extent.has_data && extent.end() > first && extent.block < until
            });
            prop_assert_eq!(in_the_way, None, "{} to {}", first, until);
            let any = extents.iter().any(|extent| extent.disk == DISK && extent.has_data);
            prop_assert!(any || until == end, "nothing but zeroes, and it ends at {}", until);
        }
    }
}
