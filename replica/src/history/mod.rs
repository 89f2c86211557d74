//! What a replica knows of one group: epochs, bases, cursor, passes, checkpoints, clock, and the
//! index of every base. A pure state machine over the committed objects of the group, in the order
//! of their keys: the same objects give the same history, at ingest as at a restart.
//!
//! What always holds: [`Epoch::check`] decides and changes nothing, [`Epoch::apply`] changes and
//! cannot fail; between the two the segment is committed. A position is readable if and only if a
//! base covers it whose pass is complete at or below it and no later base has begun.
#![deny(clippy::disallowed_methods)]

mod base;
mod clock;
mod epoch;
mod error;
mod events;
mod sealing;

use afterimage_format::ids::{Epoch as EpochNumber, Lsn};
use afterimage_format::manifest::Manifest;

pub use base::{Base, Checkpoint};
pub use clock::ClockEra;
pub(crate) use epoch::chain_at;
pub use epoch::{Epoch, SegmentEntry, Verdict, check_disks};
pub use error::{Refusal, Warning};
pub use events::{Event, Events};
pub use sealing::{Layer, LayerMisfit, LayerWork, Sealed, joined_head, range_of};

/// A place in a group's whole history: LSNs count within an epoch.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Position {
    /// The epoch.
    pub epoch: EpochNumber,
    /// The record that is the last to be seen.
    pub lsn: Lsn,
}

impl std::fmt::Display for Position {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "lsn:{}/{}", self.epoch, self.lsn)
    }
}

/// All epochs of a group, oldest first, and the manifest they were read under.
#[derive(Debug, Clone)]
pub struct History {
    /// The newest manifest.
    pub manifest: Manifest,
    /// One for each epoch of the manifest.
    pub epochs: Vec<Epoch>,
}

impl History {
    /// A history in which nothing has been shipped yet.
    #[must_use]
    pub fn new(manifest: Manifest) -> Self {
        let epochs = manifest
            .epochs
            .iter()
            .map(|entry| Epoch::new(entry, &manifest.disks));
        Self {
            epochs: epochs.collect(),
            manifest,
        }
    }

    /// Takes over a manifest with more epochs.
    pub fn advance(&mut self, manifest: Manifest) {
        let known = self.epochs.len().min(manifest.epochs.len());
        for entry in &manifest.epochs[known..] {
            self.epochs.push(Epoch::new(entry, &manifest.disks));
        }
        if let Some(newest) = self.epochs.last_mut() {
            newest.disks.clone_from(&manifest.disks);
        }
        self.manifest = manifest;
    }

    /// The epoch of this number.
    #[must_use]
    pub fn epoch(&self, number: EpochNumber) -> Option<&Epoch> {
        self.epochs.iter().find(|epoch| epoch.number == number)
    }

    /// The newest epoch, the only one that grows.
    #[must_use]
    pub fn newest(&self) -> Option<&Epoch> {
        self.epochs.last()
    }

    /// The newest epoch, to add to.
    pub fn newest_mut(&mut self) -> Option<&mut Epoch> {
        self.epochs.last_mut()
    }

    /// Every base that has a readable position, in order, with its epoch.
    pub fn readable(&self) -> impl DoubleEndedIterator<Item = (&Epoch, &Base, Lsn, Lsn)> {
        self.epochs.iter().flat_map(|epoch| {
            epoch.bases.iter().filter_map(move |base| {
                let (first, last) = base.readable(epoch.cursor.lsn)?;
                Some((epoch, base, first, last))
            })
        })
    }

    /// The base that gives the content at a position, if the position is readable.
    #[must_use]
    pub fn base_at(&self, at: Position) -> Option<&Base> {
        self.readable()
            .find(|(epoch, _, first, last)| {
                epoch.number == at.epoch && *first <= at.lsn && at.lsn <= *last
            })
            .map(|(_, base, _, _)| base)
    }

    /// Passes that are of no use because their end did not match, in order, with their epochs.
    pub fn dropped_passes(&self) -> impl Iterator<Item = (EpochNumber, &Warning)> {
        self.bases()
            .filter_map(|(epoch, base)| base.dropped().map(|warning| (epoch, warning)))
    }

    /// The last pass that is of no use, if none has been complete since: what came after its begin is
    /// no point.
    #[must_use]
    pub fn pass_due(&self) -> Option<(EpochNumber, &Warning)> {
        self.bases().fold(None, |due, (epoch, base)| {
            match (base.dropped(), base.completed_at()) {
                (Some(warning), _) => Some((epoch, warning)),
                (None, Some(_)) => None,
                (None, None) => due,
            }
        })
    }

    fn bases(&self) -> impl Iterator<Item = (EpochNumber, &Base)> {
        self.epochs.iter().flat_map(|epoch| {
            let bases = epoch.bases.iter();
            bases.map(|base| (epoch.number, base))
        })
    }

    /// The newest readable position.
    #[must_use]
    pub fn latest(&self) -> Option<Position> {
        self.readable()
            .next_back()
            .map(|(epoch, _, _, last)| Position {
                epoch: epoch.number,
                lsn: last,
            })
    }
}
