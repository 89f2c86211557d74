//! Reading layers: which there are, their heads, and their pages one behind the other.

use std::collections::VecDeque;
use std::sync::Arc;

use afterimage_format::ids::{Epoch, GroupId};
use afterimage_format::layer::{Extent, LayerHead, PageEntry, decode_page};

use super::error::LayerError;
use crate::aside;
use crate::history::range_of;
use crate::index::LayerRange;
use crate::repository::{Repository, RepositoryError, keys};

/// Bytes of a file that are read at a time.
const READ_BYTES: u64 = 256 << 10;

/// The layers of an epoch, by what they cover.
///
/// # Errors
/// The repository cannot be listed.
pub async fn ranges(
    repository: &Repository,
    group: GroupId,
    epoch: Epoch,
) -> Result<Vec<LayerRange>, RepositoryError> {
    let names = repository.names_below(&keys::layers(group, epoch)).await?;
    let mut ranges: Vec<LayerRange> = names.iter().filter_map(|name| range(name)).collect();
    ranges.sort_unstable();
    Ok(ranges)
}

/// What the layer of this name covers; none for a file of pages.
fn range(name: &str) -> Option<LayerRange> {
    let (first, last) = name.split_once('-')?;
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    (first <= last).then_some(LayerRange { first, last })
}

/// The head of a layer; none if it is not there.
///
/// # Errors
/// It cannot be read, or is another's.
pub async fn read_head(
    repository: &Repository,
    group: GroupId,
    epoch: Epoch,
    range: LayerRange,
) -> Result<Option<LayerHead>, LayerError> {
    let key = keys::layer(group, epoch, range);
    let bytes = match repository.get(&key).await {
        Err(RepositoryError::NotFound { .. }) => return Ok(None),
        bytes => bytes?,
    };
    let head = aside::compute(move || LayerHead::decode(&bytes)).await;
    let head = head.map_err(|source| LayerError::Head {
        key: key.clone(),
        source,
    })?;
    if (head.group, head.epoch) != (group, epoch) || range_of(&head) != range {
        return Err(LayerError::Elsewhere { key });
    }
    Ok(Some(head))
}

/// Reads the pages of a run in order.
#[derive(Debug)]
pub struct PageReader {
    repository: Repository,
    group: GroupId,
    epoch: Epoch,
    head: Arc<LayerHead>,
    run: usize,
    next: usize,
    decoded: VecDeque<Vec<Extent>>,
}

impl PageReader {
    /// Of this run of a layer.
    #[must_use]
    pub const fn new(
        repository: Repository,
        group: GroupId,
        epoch: Epoch,
        head: Arc<LayerHead>,
        run: usize,
    ) -> Self {
        Self {
            repository,
            group,
            epoch,
            head,
            run,
            next: 0,
            decoded: VecDeque::new(),
        }
    }

    /// The extents of the next page; none behind the last.
    ///
    /// # Errors
    /// It cannot be read or is damaged.
    pub async fn next(&mut self) -> Result<Option<Vec<Extent>>, LayerError> {
        if self.decoded.is_empty() {
            self.read_ahead().await?;
        }
        Ok(self.decoded.pop_front())
    }

    async fn read_ahead(&mut self) -> Result<(), LayerError> {
        let pages = self
            .head
            .runs
            .get(self.run)
            .map_or(&[][..], |run| &run.pages);
        let pages = &pages[self.next.min(pages.len())..];
        let Some(first) = pages.first() else {
            return Ok(());
        };
        let count = together(pages, READ_BYTES);
        let key = keys::layer_file(
            self.group,
            self.epoch,
            range_of(&self.head),
            first.place.file,
        );
        let range = first.range().start..pages[count - 1].range().end;
        let stored = self.repository.get_range(&key, range.clone()).await?;
        for page in &pages[..count] {
            let extents = page_of(page, &key, &stored, range.start)?;
            self.decoded.push_back(extents);
        }
        self.next += count;
        Ok(())
    }
}

/// How many of these pages, at least one, stand right behind each other within so many bytes.
pub(crate) fn together(pages: &[PageEntry], bytes_max: u64) -> usize {
    let Some(first) = pages.first() else { return 0 };
    let (file, start) = (first.place.file, first.range().start);
    let mut end = start;
    let fits = |page: &&PageEntry| {
        let range = page.range();
        let follows = page.place.file == file && range.start == end;
        end = range.end;
        follows && (range.end - start <= bytes_max || range.start == start)
    };
    pages.iter().take_while(fits).count().max(1)
}

/// The extents of a page, from bytes of its file that begin at `start`.
pub(crate) fn page_of(
    page: &PageEntry,
    key: &str,
    stored: &[u8],
    start: u64,
) -> Result<Vec<Extent>, LayerError> {
    let range = page.range();
    let from = (range.start - start) as usize;
    let to = (range.end - start) as usize;
    // A file that ends early.
    let stored = stored.get(from..to).unwrap_or_default();
    decode_page(page, stored).map_err(|source| LayerError::Page {
        key: key.to_owned(),
        offset: range.start,
        source,
    })
}
