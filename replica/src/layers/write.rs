//! Writing a layer: sorted extents in, files of pages and at last the head out.

use afterimage_format::ids::Lsn;
use afterimage_format::layer::{Extent, LayerHead, LayerRun, PAGE_EXTENTS_MAX, encode_page};
use bytes::Bytes;

use super::FILE_BYTES;
use super::error::LayerError;
use crate::history::{Sealed, range_of};
use crate::index::LayerRange;
use crate::repository::{Created, Repository, keys};

/// File numbers that are tried behind one that is taken: by a process that died between a file and
/// the head, and wrote other bytes for the same.
const TRIES_MAX: u32 = 64;

/// A layer that is being written.
#[derive(Debug)]
pub struct LayerWriter {
    repository: Repository,
    range: LayerRange,
    head: LayerHead,
    /// Extents of the page that fills.
    page: Vec<Extent>,
    /// Pages of the file that fills.
    file: Vec<u8>,
}

impl LayerWriter {
    /// For the layer with this head; its runs and files are what is written.
    #[must_use]
    pub fn new(repository: Repository, head: &LayerHead) -> Self {
        Self {
            repository,
            range: range_of(head),
            head: head.without_pages(),
            page: Vec::with_capacity(PAGE_EXTENTS_MAX),
            file: Vec::new(),
        }
    }

    /// Writes a layer of what was sealed; its head.
    ///
    /// # Errors
    /// The repository failed; what was written means nothing and may be written again.
    pub async fn store(repository: Repository, sealed: &Sealed) -> Result<LayerHead, LayerError> {
        let mut writer = Self::new(repository, &sealed.head);
        for (base, run) in &sealed.runs {
            writer.begin(*base)?;
            for extent in run.extents() {
                writer.push(*extent).await?;
            }
        }
        writer.finish().await
    }

    /// What follows is of this base.
    ///
    /// # Errors
    /// What came before is out of order.
    pub fn begin(&mut self, base: Lsn) -> Result<(), LayerError> {
        self.end_page()?;
        self.head.runs.push(LayerRun {
            base,
            lsn_min: Lsn::MAX,
            extents: 0,
            pages: Vec::new(),
        });
        Ok(())
    }

    /// Adds an extent; they come in the order of a run.
    ///
    /// # Errors
    /// The repository failed.
    pub async fn push(&mut self, extent: Extent) -> Result<(), LayerError> {
        let other = self
            .page
            .first()
            .is_some_and(|first| (first.disk, first.level) != (extent.disk, extent.level));
        if other || self.page.len() == PAGE_EXTENTS_MAX {
            self.end_page()?;
            if self.file.len() >= FILE_BYTES {
                self.end_file().await?;
            }
            // Others want to run, too.
            tokio::task::yield_now().await;
        }
        if let Some(run) = self.head.runs.last_mut() {
            run.lsn_min = run.lsn_min.min(extent.lsn);
            run.extents += 1;
        }
        self.page.push(extent);
        Ok(())
    }

    /// Writes the rest, then the head.
    ///
    /// # Errors
    /// The repository failed.
    pub async fn finish(mut self) -> Result<LayerHead, LayerError> {
        self.end_page()?;
        self.end_file().await?;
        let key = keys::layer(self.head.group, self.head.epoch, self.range);
        let bytes = Bytes::from(self.head.encode());
        match self.repository.create(&key, bytes).await? {
            Created::Ours => Ok(self.head),
            // Another process was first; what it says follows from the same segments.
            Created::Taken(found) => {
                let theirs = LayerHead::decode(&found).map_err(|source| LayerError::Head {
                    key: key.clone(),
                    source,
                })?;
                if !says_the_same(&theirs, &self.head) {
                    return Err(LayerError::Elsewhere { key });
                }
                Ok(theirs)
            }
        }
    }

    fn end_page(&mut self) -> Result<(), LayerError> {
        if self.page.is_empty() {
            return Ok(());
        }
        let page = encode_page(&self.page, self.head.files, &mut self.file);
        let page = page.map_err(|source| LayerError::Page {
            key: keys::layer(self.head.group, self.head.epoch, self.range),
            offset: self.file.len() as u64,
            source,
        })?;
        if let Some(run) = self.head.runs.last_mut() {
            run.pages.push(page);
        }
        self.page.clear();
        Ok(())
    }

    async fn end_file(&mut self) -> Result<(), LayerError> {
        if self.file.is_empty() {
            return Ok(());
        }
        let bytes = Bytes::from(std::mem::take(&mut self.file));
        let wanted = self.head.files;
        let mut number = wanted;
        loop {
            let key = keys::layer_file(self.head.group, self.head.epoch, self.range, number);
            match self.repository.create(&key, bytes.clone()).await? {
                Created::Ours => break,
                Created::Taken(_) if number - wanted < TRIES_MAX => number += 1,
                Created::Taken(_) => return Err(LayerError::Taken { key }),
            }
        }
        let pages = self.head.runs.iter_mut().flat_map(|run| &mut run.pages);
        for page in pages.filter(|page| page.place.file == wanted) {
            page.place.file = number;
        }
        self.head.files = number + 1;
        Ok(())
    }
}

/// Whether two heads say the same of the same segments, wherever their pages are.
fn says_the_same(one: &LayerHead, other: &LayerHead) -> bool {
    let runs = |head: &LayerHead| -> Vec<_> {
        let runs = head.runs.iter();
        runs.map(|run| (run.base, run.lsn_min, run.extents))
            .collect()
    };
    one.without_pages() == other.without_pages() && runs(one) == runs(other)
}
