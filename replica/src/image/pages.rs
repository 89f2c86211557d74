//! Pages of layers: from the cache, or read where they stand, neighbours together.

use std::sync::Arc;

use afterimage_format::layer::{Extent, PageEntry};
use futures::{StreamExt, TryStreamExt, stream};

use super::cache::PageId;
use super::read::FETCHES_MAX;
use super::{Image, ImageError};
use crate::index::{LayerRange, PageRef};
use crate::layers::{LayerError, page_of, together};
use crate::repository::keys;

/// Bytes that are read at a time.
const READ_BYTES: u64 = 1 << 20;

impl Image {
    /// The extents of these pages, in no order.
    pub(super) async fn pages(&self, wanted: &[PageRef]) -> Result<Vec<Arc<[Extent]>>, ImageError> {
        let mut found = Vec::with_capacity(wanted.len());
        let mut missing: Vec<(LayerRange, PageEntry)> = Vec::new();
        for page in wanted {
            let (layer, entry) = (page.layer(), *page.entry());
            match self.cache.page(self.page_id(layer, &entry)) {
                Some(extents) => found.push(extents),
                None => missing.push((layer, entry)),
            }
        }
        if missing.is_empty() {
            return Ok(found);
        }
        missing.sort_by_key(|(layer, page)| (*layer, page.place.file, page.place.offset));
        let mut reads: Vec<(LayerRange, Vec<PageEntry>)> = Vec::new();
        for same in missing.chunk_by(|(one, _), (other, _)| one == other) {
            let layer = same[0].0;
            let pages: Vec<PageEntry> = same.iter().map(|(_, page)| *page).collect();
            let mut rest = &pages[..];
            while !rest.is_empty() {
                let (read, behind) = rest.split_at(together(rest, READ_BYTES));
                reads.push((layer, read.to_vec()));
                rest = behind;
            }
        }
        let mut done = stream::iter(reads)
            .map(|(layer, pages)| self.read_pages(layer, pages))
            .buffer_unordered(FETCHES_MAX);
        while let Some(read) = done.try_next().await? {
            found.extend(read);
        }
        Ok(found)
    }

    /// Pages that stand right behind each other.
    async fn read_pages(
        &self,
        layer: LayerRange,
        pages: Vec<PageEntry>,
    ) -> Result<Vec<Arc<[Extent]>>, LayerError> {
        let (Some(first), Some(last)) = (pages.first(), pages.last()) else {
            return Ok(Vec::new());
        };
        let key = keys::layer_file(self.group.id(), self.epoch(), layer, first.place.file);
        let start = first.range().start;
        let range = start..last.range().end;
        let stored = self.group.repository().get_range(&key, range).await?;
        let each = pages.iter().map(|page| {
            let extents: Arc<[Extent]> = page_of(page, &key, &stored, start)?.into();
            self.cache
                .put_page(self.page_id(layer, page), extents.clone());
            Ok(extents)
        });
        each.collect()
    }

    fn page_id(&self, layer: LayerRange, page: &PageEntry) -> PageId {
        PageId {
            group: self.group.id(),
            epoch: self.epoch(),
            layer,
            file: page.place.file,
            offset: page.place.offset,
            crc: page.place.crc,
        }
    }
}
