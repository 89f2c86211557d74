//! One group of a repository: its history in memory, kept in step with the committed objects.
//!
//! Owns the reading of manifests and segment indexes in the order of their keys, never by listing.
//! What always holds: the history holds exactly the objects up to some key; [`Group::refresh`]
//! takes in what has been committed since, by whomever. The lock around the history is never held
//! over an await. An object that contradicts those before it is reported with its key; it is never
//! skipped, since everything behind it would be a guess.

mod comparison;
mod error;
mod layers;
mod read;
mod status;

use std::sync::atomic::AtomicBool;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use afterimage_format::ids::GroupId;
use afterimage_format::manifest::{Manifest, NameBinding};
use futures::{StreamExt, stream};

use crate::history::{History, Verdict};
use crate::repository::{Repository, RepositoryError, keys};

pub use comparison::{Comparison, Place as ComparisonPlace};
pub use error::GroupError;
use read::{Object, read_object};
pub use read::{Payloads, read_index, read_index_checked};
pub use status::{Intake, Status};

/// Objects that are read ahead while a history is loaded.
const READ_AHEAD: usize = 16;

/// A group of a repository.
#[derive(Debug)]
pub struct Group {
    id: GroupId,
    repository: Repository,
    history: RwLock<History>,
    status: RwLock<Status>,
    comparison: Comparison,
    /// [`Repository::turn`] when it was loaded.
    repository_turn: u64,
    /// Extents after which what came is sealed; `usize::MAX` where nobody stores layers.
    seal_extents: usize,
    /// Held by whoever stores layers.
    keeping_layers: tokio::sync::Mutex<()>,
    /// The last layer could not be stored: nobody tries again before the next seal.
    layers_failed: AtomicBool,
}

impl Group {
    /// Loads a group by its UUID.
    ///
    /// # Errors
    /// [`GroupError::Unknown`] if it has no manifest; else what cannot be read, with its key.
    pub async fn load(repository: &Repository, id: GroupId) -> Result<Self, GroupError> {
        Self::load_sealing(repository, id, usize::MAX).await
    }

    /// Loads a group to write it: it seals a layer after so many extents.
    ///
    /// # Errors
    /// As [`Group::load`].
    pub async fn load_sealing(
        repository: &Repository,
        id: GroupId,
        seal_extents: usize,
    ) -> Result<Self, GroupError> {
        let first = read_manifest(repository, id, keys::FIRST).await?;
        let first = first.ok_or_else(|| GroupError::Unknown {
            group: id.to_string(),
        })?;
        let group = Self {
            id,
            repository: repository.clone(),
            history: RwLock::new(History::new(first)),
            status: RwLock::default(),
            comparison: Comparison::default(),
            repository_turn: repository.turn(),
            seal_extents,
            keeping_layers: tokio::sync::Mutex::default(),
            layers_failed: AtomicBool::new(false),
        };
        group.refresh().await?;
        Ok(group)
    }

    /// Loads a group by its name.
    ///
    /// # Errors
    /// As [`Group::load`]; the name is not one, or no group has it, or has begun under it.
    pub async fn find(repository: &Repository, name: &str) -> Result<Self, GroupError> {
        let binding = read_binding(repository, name).await?;
        let binding = binding.ok_or_else(|| GroupError::Unknown {
            group: name.to_owned(),
        })?;
        let loaded = Self::load(repository, binding.group).await;
        loaded.map_err(|error| error.of_bound(name))
    }

    /// Names of all groups of a repository, sorted.
    ///
    /// # Errors
    /// The repository cannot be listed.
    pub async fn names(repository: &Repository) -> Result<Vec<String>, GroupError> {
        Ok(repository.names_below(keys::NAMES).await?)
    }

    /// Its UUID.
    #[must_use]
    pub const fn id(&self) -> GroupId {
        self.id
    }

    /// The repository it is in.
    #[must_use]
    pub const fn repository(&self) -> &Repository {
        &self.repository
    }

    /// The history, to look at. Not to be held over an await.
    pub fn history(&self) -> RwLockReadGuard<'_, History> {
        self.history.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The history, to add to.
    pub(crate) fn history_mut(&self) -> RwLockWriteGuard<'_, History> {
        self.history.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// How the intake goes. What became of passes stands in the history, so that a restart does not
    /// forget it.
    #[must_use]
    pub fn status(&self) -> Status {
        let met = self.status.read().unwrap_or_else(PoisonError::into_inner);
        let mut status = met.clone();
        drop(met);
        let history = self.history();
        status.passes_dropped = history.dropped_passes().count() as u64;
        if let Some((epoch, warning)) = history.pass_due() {
            let due = format!(
                "epoch {epoch}: {warning}; if that is dropped too, memory or a disk of one side is failing"
            );
            status.alarm = Some(match status.alarm {
                Some(met) => format!("{met}; {due}"),
                None => due,
            });
        }
        let apart = self.comparison.alarm();
        status.alarm = match (status.alarm.take(), apart) {
            (Some(met), Some(apart)) => Some(format!("{met}; {apart}")),
            (met, apart) => met.or(apart),
        };
        status
    }

    /// How far it is compared with its primary's disks.
    #[must_use]
    pub const fn comparison(&self) -> &Comparison {
        &self.comparison
    }

    /// Changes what is known of the intake.
    pub(crate) fn note(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.status.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// Takes in everything that was committed since.
    ///
    /// # Errors
    /// What cannot be read, with its key; everything before it is in the history.
    pub async fn refresh(&self) -> Result<(), GroupError> {
        loop {
            let next = self.history().manifest.number + 1;
            let Some(manifest) = read_manifest(&self.repository, self.id, next).await? else {
                break;
            };
            self.check_manifest(&manifest)?;
            self.history_mut().advance(manifest);
        }
        let epochs = self.history().epochs.len();
        for at in 0..epochs {
            let ended = self.history().epochs[at].ended;
            if !ended {
                if self.history().epochs[at].segments.is_empty() {
                    self.take_layers(at).await;
                }
                self.refresh_epoch(at).await?;
            }
            let epoch = &self.history().epochs[at];
            if !epoch.ended && at + 1 < epochs {
                let key = keys::segment(self.id, epoch.number, epoch.next_sequence());
                return Err(GroupError::Missing { key });
            }
        }
        Ok(())
    }

    fn check_manifest(&self, manifest: &Manifest) -> Result<(), GroupError> {
        let history = self.history();
        let known = &history.manifest;
        let same = manifest.group == self.id
            && manifest.name == known.name
            && manifest.epochs.starts_with(&known.epochs);
        if same {
            return Ok(());
        }
        Err(GroupError::Contradiction {
            key: keys::manifest(self.id, manifest.number),
        })
    }

    async fn refresh_epoch(&self, at: usize) -> Result<(), GroupError> {
        let (number, first) = {
            let history = self.history();
            let epoch = &history.epochs[at];
            (epoch.number, epoch.next_sequence())
        };
        let mut objects = stream::iter(first..)
            .map(|sequence| async move {
                let key = keys::segment(self.id, number, sequence);
                (sequence, read_object(&self.repository, key).await)
            })
            .buffered(READ_AHEAD);
        while let Some((sequence, object)) = objects.next().await {
            let key = || keys::segment(self.id, number, sequence);
            let (index, events) = match object? {
                Object::Absent => break,
                Object::Terminator(terminator) => {
                    if (terminator.group, terminator.epoch, terminator.seq)
                        != (self.id, number, sequence)
                    {
                        return Err(GroupError::Contradiction { key: key() });
                    }
                    self.history_mut().epochs[at].ended = true;
                    break;
                }
                Object::Segment(segment) => *segment,
            };
            if index.header.group != self.id {
                return Err(GroupError::Contradiction { key: key() });
            }
            let mut history = self.history_mut();
            let epoch = &mut history.epochs[at];
            match epoch.check(&index) {
                Ok(Verdict::Append { sequence: next }) if next == sequence => {}
                Ok(_) => return Err(GroupError::Contradiction { key: key() }),
                Err(source) => return Err(GroupError::Refused { key: key(), source }),
            }
            for warning in epoch.apply(&index, &events) {
                tracing::warn!(group = %self.id, epoch = %number, %warning, "a stored pass is of no use");
            }
            drop(history);
            self.seal(at);
        }
        Ok(())
    }
}

/// The manifest of this number, if it exists.
pub(crate) async fn read_manifest(
    repository: &Repository,
    group: GroupId,
    number: u64,
) -> Result<Option<Manifest>, GroupError> {
    let key = keys::manifest(group, number);
    let bytes = match repository.get(&key).await {
        Err(RepositoryError::NotFound { .. }) => return Ok(None),
        bytes => bytes?,
    };
    let manifest = Manifest::decode(&bytes).map_err(|source| GroupError::Object {
        key: key.clone(),
        source,
    })?;
    if manifest.group != group || manifest.number != number {
        return Err(GroupError::Contradiction { key });
    }
    Ok(Some(manifest))
}

/// The binding of a name, if it exists.
pub(crate) async fn read_binding(
    repository: &Repository,
    name: &str,
) -> Result<Option<NameBinding>, GroupError> {
    let key = keys::name(name).map_err(|source| GroupError::Name {
        name: name.to_owned(),
        source,
    })?;
    let bytes = match repository.get(&key).await {
        Err(RepositoryError::NotFound { .. }) => return Ok(None),
        bytes => bytes?,
    };
    let binding = NameBinding::decode(&bytes).map_err(|source| GroupError::Object {
        key: key.clone(),
        source,
    })?;
    if binding.name != name {
        return Err(GroupError::Contradiction { key });
    }
    Ok(Some(binding))
}
