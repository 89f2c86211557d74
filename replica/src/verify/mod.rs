//! Reading everything a group has, and checking every byte of it.
//!
//! What always holds: the check trusts nothing that was loaded before; it reads objects anew, in
//! the order of their keys, and goes on behind what is damaged, so that one report says all that
//! is wrong. It changes nothing; what it came to can be [`kept`].

pub mod kept;
mod layers;
mod problem;

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use afterimage_format::ids::{Epoch, GroupId};
use afterimage_format::manifest::{EpochEntry, Manifest, Terminator, is_terminator};
use bytes::Bytes;

use crate::group::{GroupError, read_binding, read_manifest};
use crate::history::{History, Verdict};
use crate::receive::{IngestError, Verified};
use crate::repository::{Repository, RepositoryError, keys};

use layers::Layers;
pub use problem::{Problem, damage_offset};

/// How far a check is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct VerifyProgress {
    /// Objects read.
    pub objects: u64,
    /// Bytes read.
    pub bytes: u64,
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct VerifyReport {
    /// The group's name.
    pub group: String,
    /// Its UUID.
    #[serde(skip)]
    pub id: GroupId,
    /// What was read.
    pub read: VerifyProgress,
    /// Recovery points of a name that can be restored, as far as the history is whole.
    pub checkpoints: u64,
    /// What is wrong; empty if nothing is.
    pub problems: Vec<Problem>,
}

/// Checks everything a group has.
///
/// # Errors
/// The repository does not answer, or has no such group. What is damaged is in the report.
pub async fn verify(
    repository: &Repository,
    name: &str,
    progress: impl FnMut(VerifyProgress),
) -> Result<VerifyReport, GroupError> {
    let mut check = Check {
        repository,
        progress,
        read: VerifyProgress::default(),
        problems: Vec::new(),
    };
    let Some(id) = check.find(name).await? else {
        return Err(GroupError::Unknown {
            group: name.to_owned(),
        });
    };
    let history = check.manifests(id, name).await?;
    let mut checkpoints = 0;
    if let Some(mut history) = history {
        let entries = history.manifest.epochs.clone();
        for (at, entry) in entries.iter().enumerate() {
            let is_last = at + 1 == entries.len();
            check.epoch(id, &mut history, at, entry, is_last).await?;
        }
        check.epochs_without_manifest(id, &history).await?;
        checkpoints = crate::points::PointList::of(&history).checkpoints.len() as u64;
    }
    let (read, problems) = (check.read, check.problems);
    Ok(VerifyReport {
        group: name.to_owned(),
        id,
        read,
        checkpoints,
        problems,
    })
}

struct Check<'a, P> {
    repository: &'a Repository,
    progress: P,
    read: VerifyProgress,
    problems: Vec<Problem>,
}

impl<P: FnMut(VerifyProgress)> Check<'_, P> {
    /// The group's UUID: from its binding, or, if that is damaged, from the manifests.
    async fn find(&mut self, name: &str) -> Result<Option<GroupId>, GroupError> {
        match read_binding(self.repository, name).await {
            Ok(binding) => {
                self.count(0);
                Ok(binding.map(|binding| binding.group))
            }
            Err(error @ (GroupError::Object { .. } | GroupError::Contradiction { .. })) => {
                self.problems.push(Problem::of(&error));
                for uuid in self.repository.names_below(keys::GROUPS).await? {
                    let Ok(uuid) = uuid.parse() else { continue };
                    let first = read_manifest(self.repository, GroupId(uuid), keys::FIRST).await;
                    if let Ok(Some(manifest)) = first
                        && manifest.name == name
                    {
                        return Ok(Some(manifest.group));
                    }
                }
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    fn count(&mut self, bytes: usize) {
        self.read.objects += 1;
        self.read.bytes += bytes as u64;
        (self.progress)(self.read);
    }

    async fn get(&mut self, key: &str) -> Result<Option<Bytes>, GroupError> {
        match self.repository.get(key).await {
            Ok(bytes) => {
                self.count(bytes.len());
                Ok(Some(bytes))
            }
            Err(RepositoryError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Numbers that exist below a folder, as its listing says. The listing only tells where to
    /// look for more.
    async fn numbers(&mut self, folder: &str) -> Result<BTreeSet<u64>, GroupError> {
        let names = self.repository.names_below(folder).await?;
        let mut numbers = BTreeSet::new();
        for name in names {
            match name.parse::<u64>() {
                Ok(number) if format!("{number:020}") == name => {
                    numbers.insert(number);
                }
                _ => self
                    .problems
                    .push(Problem::stray(&format!("{folder}/{name}"))),
            }
        }
        Ok(numbers)
    }

    async fn manifests(&mut self, id: GroupId, name: &str) -> Result<Option<History>, GroupError> {
        let listed = self
            .numbers(&format!("{}/manifests", keys::group(id)))
            .await?;
        let last = listed.last().copied().unwrap_or(keys::FIRST);
        let mut history: Option<History> = None;
        for number in keys::FIRST..=last {
            let key = keys::manifest(id, number);
            let Some(bytes) = self.get(&key).await? else {
                self.problems.push(Problem::missing(&key));
                continue;
            };
            let manifest = match Manifest::decode(&bytes) {
                Ok(manifest) => manifest,
                Err(source) => {
                    self.problems
                        .push(Problem::of(&GroupError::Object { key, source }));
                    continue;
                }
            };
            let fits = (manifest.group, manifest.number) == (id, number)
                && manifest.name == name
                && history
                    .as_ref()
                    .is_none_or(|history| manifest.epochs.starts_with(&history.manifest.epochs));
            if !fits {
                self.problems
                    .push(Problem::of(&GroupError::Contradiction { key }));
                continue;
            }
            match &mut history {
                Some(history) => history.advance(manifest),
                None => history = Some(History::new(manifest)),
            }
        }
        Ok(history)
    }

    /// Segments of an epoch that no manifest knows prove that a manifest is lost: the epoch's
    /// first segment comes after it. One that is there now is newer than this check.
    async fn epochs_without_manifest(
        &mut self,
        id: GroupId,
        history: &History,
    ) -> Result<(), GroupError> {
        let folder = format!("{}/segments", keys::group(id));
        let next = keys::manifest(id, history.manifest.number + 1);
        for name in self.repository.names_below(&folder).await? {
            let known = name
                .parse()
                .is_ok_and(|number| history.epoch(Epoch(number)).is_some());
            if !known && self.get(&next).await?.is_none() {
                self.problems.push(Problem::missing(&next));
            }
        }
        Ok(())
    }

    async fn epoch(
        &mut self,
        id: GroupId,
        history: &mut History,
        at: usize,
        entry: &EpochEntry,
        is_last: bool,
    ) -> Result<(), GroupError> {
        let mut layers = Layers::list(self.repository, id, entry.epoch).await?;
        let first = keys::segment(id, entry.epoch, entry.first_seq);
        let folder = first.rsplit_once('/').map_or("", |(folder, _)| folder);
        let listed = self.numbers(folder).await?;
        let last = listed.last().copied().unwrap_or(0);
        // Once an object is damaged, those behind it are checked each by itself.
        let mut in_step = true;
        let mut ended = false;
        for sequence in entry.first_seq..=last {
            let key = keys::segment(id, entry.epoch, sequence);
            let Some(bytes) = self.get(&key).await? else {
                self.problems.push(Problem::missing(&key));
                in_step = false;
                continue;
            };
            if ended {
                self.problems.push(Problem::stray(&key));
                continue;
            }
            if is_terminator(&bytes) {
                ended = self.terminator(id, entry, sequence, &key, &bytes);
                continue;
            }
            in_step &= self.segment(&key, bytes, &mut history.epochs[at], sequence, in_step);
            if in_step {
                layers.after(&mut history.epochs[at], sequence, id);
            }
        }
        self.layers(id, entry.epoch, &layers, in_step).await?;
        if !ended && !is_last {
            self.problems
                .push(Problem::missing(&keys::segment(id, entry.epoch, last + 1)));
        }
        Ok(())
    }

    fn terminator(
        &mut self,
        id: GroupId,
        entry: &EpochEntry,
        sequence: u64,
        key: &str,
        bytes: &[u8],
    ) -> bool {
        let error = match Terminator::decode(bytes) {
            Ok(t) if (t.group, t.epoch, t.seq) == (id, entry.epoch, sequence) => return true,
            Ok(_) => GroupError::Contradiction {
                key: key.to_owned(),
            },
            Err(source) => GroupError::Object {
                key: key.to_owned(),
                source,
            },
        };
        self.problems.push(Problem::of(&error));
        true
    }

    /// Checks one segment; whether the history could take it.
    fn segment(
        &mut self,
        key: &str,
        bytes: Bytes,
        epoch: &mut crate::history::Epoch,
        sequence: u64,
        in_step: bool,
    ) -> bool {
        let verified = match Verified::check(bytes.clone()) {
            Ok(verified) => verified,
            Err(IngestError::Segment(source)) => {
                self.problems.push(Problem::segment(key, &bytes, &source));
                return false;
            }
            Err(error) => {
                self.problems.push(Problem::other(key, &error.to_string()));
                return false;
            }
        };
        if !in_step {
            return false;
        }
        match epoch.check(verified.index()) {
            Ok(Verdict::Append { sequence: next }) if next == sequence => {
                epoch.apply(verified.index(), verified.events());
                true
            }
            Ok(_) => {
                let error = GroupError::Contradiction {
                    key: key.to_owned(),
                };
                self.problems.push(Problem::of(&error));
                false
            }
            Err(source) => {
                let error = GroupError::Refused {
                    key: key.to_owned(),
                    source,
                };
                self.problems.push(Problem::of(&error));
                false
            }
        }
    }
}
