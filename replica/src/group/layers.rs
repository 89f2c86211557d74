//! A group and its layers: taken in when it is loaded, made while it grows.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use afterimage_format::ids::Epoch as EpochNumber;
use afterimage_format::layer::LayerHead;

use super::{Group, read_index_checked};
use crate::history::{LayerMisfit, LayerWork};
use crate::index::LayerRange;
use crate::layers::{Joiner, LayerError, LayerWriter, ranges, read_head};
use crate::repository::keys;

impl Group {
    /// Takes in the layers of an epoch whose segments were not read yet. What cannot be used is left
    /// out: the segments say the same.
    pub(super) async fn take_layers(&self, at: usize) {
        let (number, mut next) = {
            let history = self.history();
            let epoch = &history.epochs[at];
            if !epoch.is_fresh() {
                return;
            }
            (epoch.number, epoch.next_sequence())
        };
        let ranges = match ranges(&self.repository, self.id, number).await {
            Ok(ranges) => ranges,
            Err(error) => return self.without_layer(number, &error.into()),
        };
        // The longest each time. Of one that cannot be used, the shorter ones may be whole.
        let mut candidates: Vec<LayerRange> = ranges.into_iter().rev().collect();
        while let Some(at_candidate) = candidates.iter().position(|range| range.first == next) {
            let range = candidates.remove(at_candidate);
            match self.take_layer(at, number, range).await {
                Ok(true) => next = range.last + 1,
                Ok(false) => {}
                Err(error) => self.without_layer(number, &error),
            }
        }
    }

    async fn take_layer(
        &self,
        at: usize,
        number: EpochNumber,
        range: LayerRange,
    ) -> Result<bool, LayerError> {
        let Some(head) = read_head(&self.repository, self.id, number, range).await? else {
            return Ok(false);
        };
        // Its last segment stands for all: a history that ends before the layer is not to go on
        // behind it. That those between are there, their readers and verify see.
        if let Some(last) = head.segments.last() {
            let key = keys::segment(self.id, number, last.sequence);
            let read = read_index_checked(&self.repository, &key, last).await;
            read.map_err(|source| LayerError::Segment {
                layer: keys::layer(self.id, number, range),
                source: Box::new(source),
            })?;
        }
        let taken = self.history_mut().epochs[at].take_layer(head);
        taken.map_err(|LayerMisfit| LayerError::Elsewhere {
            key: keys::layer(self.id, number, range),
        })?;
        Ok(true)
    }

    /// Seals what an epoch has in memory if that is enough for a layer; whether there is work for
    /// [`Group::keep_layers`].
    pub(crate) fn seal(&self, at: usize) -> bool {
        let mut history = self.history_mut();
        let epoch = &mut history.epochs[at];
        if epoch.growing_extents() >= self.seal_extents {
            epoch.seal(self.id);
            self.layers_failed.store(false, Ordering::Relaxed);
        }
        epoch.has_layer_work() && !self.layers_failed.load(Ordering::Relaxed)
    }

    /// The same of the newest epoch.
    pub(crate) fn seal_newest(&self) -> bool {
        let newest = self.history().epochs.len().checked_sub(1);
        newest.is_some_and(|at| self.seal(at))
    }

    /// Stores what is sealed and joins layers, until nothing is left to do. Called by whoever may
    /// write the group. When it fails, what is sealed stays in memory until the next seal.
    pub(crate) async fn keep_layers(&self) {
        let Ok(_turn) = self.keeping_layers.try_lock() else {
            return;
        };
        while let Some((at, number, work)) = self.next_layer_work()
            // Else a copy stands in for what the history was read from.
            && self.repository.turn() == self.repository_turn
        {
            match self.do_layer_work(number, work).await {
                Ok(head) => self.history_mut().epochs[at].store_layer(head),
                Err(error) => {
                    tracing::warn!(group = %self.id, epoch = %number, %error, "a layer could not be stored; its index stays in memory");
                    self.layers_failed.store(true, Ordering::Relaxed);
                    if error.is_of_the_name() {
                        self.history_mut().epochs[at].widen_sealed();
                    }
                    return;
                }
            }
        }
    }

    fn next_layer_work(&self) -> Option<(usize, EpochNumber, LayerWork)> {
        let history = self.history();
        let mut epochs = history.epochs.iter().enumerate();
        epochs.find_map(|(at, epoch)| Some((at, epoch.number, epoch.layer_work()?)))
    }

    async fn do_layer_work(
        &self,
        number: EpochNumber,
        work: LayerWork,
    ) -> Result<LayerHead, LayerError> {
        let ranges = match work {
            LayerWork::Store(sealed) => {
                return LayerWriter::store(self.repository.clone(), &sealed).await;
            }
            LayerWork::Join(ranges) => ranges,
        };
        let mut heads = Vec::with_capacity(ranges.len());
        for range in ranges {
            let head = read_head(&self.repository, self.id, number, range).await?;
            let gone = || LayerError::Elsewhere {
                key: keys::layer(self.id, number, range),
            };
            heads.push(Arc::new(head.ok_or_else(gone)?));
        }
        let joiner = Joiner::new(self.repository.clone(), self.id, number);
        joiner.join(&heads).await
    }

    fn without_layer(&self, number: EpochNumber, error: &LayerError) {
        tracing::warn!(group = %self.id, epoch = %number, %error, "the segments are read instead of a layer");
    }
}
