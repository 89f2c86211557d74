//! Several layers, one behind the other, as one.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use afterimage_format::ids::{Epoch, GroupId, Lsn};
use afterimage_format::layer::{Extent, LayerHead};

use super::error::LayerError;
use super::read::PageReader;
use super::write::LayerWriter;
use crate::history::{LayerMisfit, joined_head, range_of};
use crate::repository::Repository;

/// Joins stored layers.
#[derive(Debug)]
pub struct Joiner {
    repository: Repository,
    group: GroupId,
    epoch: Epoch,
}

impl Joiner {
    /// Of layers of this epoch.
    #[must_use]
    pub const fn new(repository: Repository, group: GroupId, epoch: Epoch) -> Self {
        Self {
            repository,
            group,
            epoch,
        }
    }

    /// Writes the layer that covers what these cover; its head.
    ///
    /// # Errors
    /// One cannot be read, they do not continue each other, or the new one cannot be written.
    pub async fn join(&self, heads: &[Arc<LayerHead>]) -> Result<LayerHead, LayerError> {
        let joined = joined_head(heads.iter().map(|head| &**head));
        let joined = joined.map_err(|LayerMisfit| LayerError::Elsewhere {
            key: heads.first().map_or_else(String::new, |head| {
                crate::repository::keys::layer(self.group, self.epoch, range_of(head))
            }),
        })?;
        let mut bases: Vec<Lsn> = heads
            .iter()
            .flat_map(|head| head.runs.iter().map(|run| run.base))
            .collect();
        bases.sort_unstable();
        bases.dedup();
        let mut writer = LayerWriter::new(self.repository.clone(), &joined);
        for base in bases {
            writer.begin(base)?;
            self.merge(heads, base, &mut writer).await?;
        }
        writer.finish().await
    }

    /// Brings the extents of one base into order.
    async fn merge(
        &self,
        heads: &[Arc<LayerHead>],
        base: Lsn,
        writer: &mut LayerWriter,
    ) -> Result<(), LayerError> {
        let mut inputs: Vec<Input> = Vec::new();
        for head in heads {
            if let Some(run) = head.runs.iter().position(|run| run.base == base) {
                inputs.push(Input {
                    pages: PageReader::new(
                        self.repository.clone(),
                        self.group,
                        self.epoch,
                        head.clone(),
                        run,
                    ),
                    extents: Vec::new().into_iter(),
                });
            }
        }
        let mut next = BinaryHeap::with_capacity(inputs.len());
        for (number, input) in inputs.iter_mut().enumerate() {
            if let Some(extent) = input.next().await? {
                next.push(Reverse(Next { extent, number }));
            }
        }
        while let Some(mut first) = next.peek_mut() {
            let Reverse(Next { extent, number }) = *first;
            match inputs[number].next().await? {
                Some(extent) => *first = Reverse(Next { extent, number }),
                None => {
                    std::collections::binary_heap::PeekMut::pop(first);
                }
            }
            writer.push(extent).await?;
        }
        Ok(())
    }
}

/// One of the runs that are merged.
struct Input {
    pages: PageReader,
    extents: std::vec::IntoIter<Extent>,
}

impl Input {
    async fn next(&mut self) -> Result<Option<Extent>, LayerError> {
        loop {
            if let Some(extent) = self.extents.next() {
                return Ok(Some(extent));
            }
            match self.pages.next().await? {
                Some(extents) => self.extents = extents.into_iter(),
                None => return Ok(None),
            }
        }
    }
}

/// The next extent of an input, in the order of a run; those of equal key by age of the layer.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Next {
    extent: Extent,
    number: usize,
}

impl Ord for Next {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.extent.key(), self.number).cmp(&(other.extent.key(), other.number))
    }
}

impl PartialOrd for Next {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
