//! An immutable sorted run of extents.

use std::ops::Range;
use std::sync::Arc;

use afterimage_format::ids::DiskIndex;
use afterimage_format::layer::Extent;

/// Extents in the order of [`Extent::key`], with a table of where each disk's level begins.
#[derive(Debug)]
pub struct Run {
    extents: Vec<Extent>,
    /// (disk, level) and the extents of it, in order.
    levels: Vec<((u16, u8), Range<usize>)>,
    lsn_first: u64,
}

impl Run {
    pub(super) fn new(mut extents: Vec<Extent>) -> Self {
        extents.sort_by_key(Extent::key);
        extents.shrink_to_fit();
        let mut levels: Vec<((u16, u8), Range<usize>)> = Vec::new();
        for (at, extent) in extents.iter().enumerate() {
            let of = (extent.disk.0, extent.level);
            match levels.last_mut() {
                Some((last, range)) if *last == of => range.end = at + 1,
                _ => levels.push((of, at..at + 1)),
            }
        }
        let lsn_first = extents.iter().map(|extent| extent.lsn.0).min().unwrap_or(0);
        Self {
            extents,
            levels,
            lsn_first,
        }
    }

    /// One run with everything of several. The sort finds the sorted parts and merges them.
    pub(crate) fn merged(parts: &[Arc<Self>]) -> Self {
        let mut extents = Vec::with_capacity(parts.iter().map(|part| part.len()).sum());
        for part in parts {
            extents.extend_from_slice(&part.extents);
        }
        Self::new(extents)
    }

    pub(super) fn len(&self) -> usize {
        self.extents.len()
    }

    /// All of them, in order.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// The lowest LSN in it.
    pub(super) const fn lsn_first(&self) -> u64 {
        self.lsn_first
    }

    /// The extents of one disk, level by level.
    pub(super) fn levels_of(&self, disk: DiskIndex) -> impl Iterator<Item = (u8, &[Extent])> {
        let from = self.levels.partition_point(|((of, _), _)| *of < disk.0);
        self.levels[from..]
            .iter()
            .take_while(move |((of, _), _)| *of == disk.0)
            .map(|((_, level), range)| (*level, &self.extents[range.clone()]))
    }
}
