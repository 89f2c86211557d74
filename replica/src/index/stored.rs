//! A run that lies in a layer of the repository: which of its pages a lookup needs.

use std::ops::Range;
use std::sync::Arc;

use afterimage_format::ids::{DiskIndex, Lsn};
use afterimage_format::layer::{LayerRun, PageEntry};

/// The segments that a layer covers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LayerRange {
    /// Sequence number of the first.
    pub first: u64,
    /// Sequence number of the last.
    pub last: u64,
}

impl LayerRange {
    /// Whether this segment is in it.
    #[must_use]
    pub const fn contains(&self, sequence: u64) -> bool {
        self.first <= sequence && sequence <= self.last
    }

    /// Whether all of another range is in it.
    #[must_use]
    pub const fn covers(&self, other: Self) -> bool {
        self.first <= other.first && other.last <= self.last
    }
}

/// The table of pages of a run that is not in memory.
#[derive(Debug)]
pub struct StoredRun {
    layer: LayerRange,
    lsn_min: Lsn,
    pages: Vec<PageEntry>,
    /// (disk, level) and the pages of it, in order.
    levels: Vec<((u16, u8), Range<usize>)>,
}

/// A page of a stored run.
#[derive(Clone, Debug)]
pub struct PageRef {
    run: Arc<StoredRun>,
    at: usize,
}

impl PageRef {
    /// The layer that it is in.
    #[must_use]
    pub fn layer(&self) -> LayerRange {
        self.run.layer
    }

    /// What is known of it.
    #[must_use]
    pub fn entry(&self) -> &PageEntry {
        &self.run.pages[self.at]
    }
}

impl StoredRun {
    /// The run of a layer that was decoded, and so is in order.
    #[must_use]
    pub fn new(layer: LayerRange, run: LayerRun) -> Self {
        let mut levels: Vec<((u16, u8), Range<usize>)> = Vec::new();
        for (at, page) in run.pages.iter().enumerate() {
            let of = (page.disk.0, page.level);
            match levels.last_mut() {
                Some((last, range)) if *last == of => range.end = at + 1,
                _ => levels.push((of, at..at + 1)),
            }
        }
        Self {
            layer,
            lsn_min: run.lsn_min,
            pages: run.pages,
            levels,
        }
    }

    pub(super) const fn layer(&self) -> LayerRange {
        self.layer
    }

    /// Adds the pages that may hold the newest extent, not newer than `at`, of any of the blocks.
    pub(super) fn pages_of(
        self: &Arc<Self>,
        disk: DiskIndex,
        blocks: &Range<u64>,
        at: Lsn,
        wanted: &mut Vec<PageRef>,
    ) {
        if self.lsn_min > at {
            return;
        }
        for (level, range) in self.levels_of(disk) {
            let start = blocks.start >> level << level;
            let pages = &self.pages[range.clone()];
            let from = pages.partition_point(|page| page.last_block < start);
            for (place, page) in (range.start + from..).zip(&pages[from..]) {
                if page.first_block >= blocks.end {
                    break;
                }
                if !self.is_passed_over(place, range.end, at) {
                    wanted.push(self.page(place));
                }
            }
        }
    }

    /// Whether the page holds versions of one extent alone, and none of them is the newest at `at`:
    /// the next page has a newer one that counts, or all of these are too new.
    fn is_passed_over(&self, place: usize, end: usize, at: Lsn) -> bool {
        let page = &self.pages[place];
        if page.first_block != page.last_block {
            return false;
        }
        let next = self.pages[..end].get(place + 1);
        let superseded =
            next.is_some_and(|next| next.first_block == page.first_block && next.first_lsn <= at);
        superseded || page.first_lsn > at
    }

    /// Adds, of each size of extents, the first page that has data of blocks from `from` on.
    pub(super) fn first_data_pages(
        self: &Arc<Self>,
        disk: DiskIndex,
        from: u64,
        to: u64,
        wanted: &mut Vec<PageRef>,
    ) {
        for (level, range) in self.levels_of(disk) {
            let start = from >> level << level;
            let pages = &self.pages[range.clone()];
            let skip = pages.partition_point(|page| page.last_block < start);
            let mut near = (range.start + skip..)
                .zip(&pages[skip..])
                .take_while(|(_, page)| page.first_block < to);
            wanted.extend(
                near.find(|(_, page)| page.has_data)
                    .map(|(place, _)| self.page(place)),
            );
        }
    }

    fn page(self: &Arc<Self>, at: usize) -> PageRef {
        PageRef {
            run: Arc::clone(self),
            at,
        }
    }

    /// The pages of one disk, level by level.
    fn levels_of(&self, disk: DiskIndex) -> impl Iterator<Item = (u8, &Range<usize>)> {
        let from = self.levels.partition_point(|((of, _), _)| *of < disk.0);
        self.levels[from..]
            .iter()
            .take_while(move |((of, _), _)| *of == disk.0)
            .map(|((_, level), range)| (*level, range))
    }
}
