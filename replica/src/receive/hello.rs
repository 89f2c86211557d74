//! Answering a hello: who may write what, and which epoch it is.
//!
//! | the log is | epoch said | answer |
//! | --- | --- | --- |
//! | of a group not known here, acknowledged before | | refused: the repository is lost or not mounted |
//! | of a group not known here | 0 | group created with epoch 1: `NewEpoch` |
//! | of a group not known here | E | group created with epoch E: resume at nothing |
//! | the newest epoch's | the newest | resume; a new epoch if one is demanded |
//! | the newest epoch's | older, and that epoch is empty | `NewEpoch` again: the answer got lost |
//! | the newest epoch's | older otherwise | fenced: the log was set back |
//! | any | newer than all here | that epoch is adopted (another sink has given it) |
//! | an earlier epoch's | | fenced |
//! | not known here | 0, or a new one is demanded | terminator, manifest: `NewEpoch` |
//! | not known here | not 0 | fenced |
//!
//! A new epoch is durable before it is answered: first the terminator under the old one's next
//! key, then the manifest. A crash between the two leaves an ended epoch whose terminator says
//! what was meant; the next hello goes on from there. Losing either race means that somebody else
//! has moved on: the history is read again and the table applied anew.
#![deny(clippy::disallowed_methods)]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use afterimage_format::ids::{BLOCK_SIZE, Epoch, LogId, Lsn};
use afterimage_format::manifest::{
    DiskEntry, EPOCHS_MAX, EpochEntry, Manifest, NameBinding, Terminator,
};
use afterimage_format::wire::{Hello, HelloReply};
use bytes::Bytes;

use super::error::IngestError;
use super::peer::Peer;
use super::session::Session;
use super::{Receiver, Slot};
use crate::group::{Group, GroupError, read_binding, read_manifest};
use crate::repository::{Created, RepositoryError, keys};

/// What a hello led to.
#[derive(Debug)]
pub struct Opened {
    /// What to answer.
    pub reply: HelloReply,
    /// The session, unless another hello must come first.
    pub session: Option<Session>,
}

/// What the table above says.
enum Decision {
    Resume,
    Repeat(Epoch),
    /// Begin this epoch; whether the primary has to be told its number.
    Begin(Epoch, bool),
}

impl Receiver {
    /// Answers a hello. Any older session of the group has ended when this returns a session.
    ///
    /// # Errors
    /// Why this peer may not go on; nothing was stored for it but what the table says.
    pub async fn hello(
        &self,
        hello: &Hello,
        peer: &Peer,
        now_ns: u64,
    ) -> Result<Opened, IngestError> {
        if hello.epoch > Epoch::MAX {
            return Err(IngestError::EpochsUsedUp { group: hello.group });
        }
        let Some(san) = peer.grant(&hello.name) else {
            return Err(IngestError::NotPermitted {
                peer: peer.address().to_owned(),
                group: hello.name.clone(),
                sans: peer.sans(),
            });
        };
        let slot = self.slot(hello.group);
        let mut turn = slot.turn.lock().await;
        self.repository.attend().await?;
        let repository_turn = self.repository.turn();
        if slot.repository_turn.swap(repository_turn, Ordering::AcqRel) != repository_turn {
            *turn = None;
        }
        let group = match turn.clone() {
            Some(group) => group,
            None => Arc::new(self.load_or_create(hello, san, now_ns).await?),
        };
        *turn = Some(group.clone());
        self.check_identity(hello, san).await?;
        let opened = open(&group, &slot, hello, now_ns).await;
        if let Err(IngestError::Fenced { .. }) = &opened {
            group.note(|status| status.fenced += 1);
        }
        opened
    }

    /// Name and UUID belong to each other and to the certificate, before anything else is looked
    /// at.
    async fn check_identity(&self, hello: &Hello, san: &str) -> Result<(), IngestError> {
        let binding = read_binding(&self.repository, &hello.name).await?;
        match binding {
            Some(binding) => check_binding(&binding, hello, san),
            // A group whose UUID is known under another name only.
            None => Err(self.renamed(hello).await?),
        }
    }

    async fn renamed(&self, hello: &Hello) -> Result<IngestError, IngestError> {
        let manifest = read_manifest(&self.repository, hello.group, keys::FIRST).await?;
        Ok(IngestError::Renamed {
            group: hello.group,
            bound: manifest.map(|manifest| manifest.name).unwrap_or_default(),
            said: hello.name.clone(),
        })
    }

    async fn load_or_create(
        &self,
        hello: &Hello,
        san: &str,
        now_ns: u64,
    ) -> Result<Group, IngestError> {
        if let Some(first) = read_manifest(&self.repository, hello.group, keys::FIRST).await? {
            if first.name != hello.name {
                return Err(self.renamed(hello).await?);
            }
            self.check_identity(hello, san).await?;
            return Ok(self.load(hello.group).await?);
        }
        if hello.acked.lsn > Lsn::ZERO && !self.accepts_loss {
            return Err(IngestError::Lost {
                url: self.repository.url().to_owned(),
                name: hello.name.clone(),
                acked: hello.acked.lsn,
            });
        }
        let binding = NameBinding {
            group: hello.group,
            name: hello.name.clone(),
            peer: san.to_owned(),
            created_ns: now_ns,
        };
        let key = keys::name(&hello.name).map_err(|source| GroupError::Name {
            name: hello.name.clone(),
            source,
        })?;
        match read_binding(&self.repository, &hello.name).await? {
            Some(bound) => check_binding(&bound, hello, san)?,
            None => {
                if let Created::Taken(found) = self
                    .repository
                    .create(&key, binding.encode().into())
                    .await?
                {
                    let bound = NameBinding::decode(&found)
                        .map_err(|source| IngestError::Object { key, source })?;
                    check_binding(&bound, hello, san)?;
                }
            }
        }
        let epoch = Epoch(hello.epoch.0.max(1));
        let manifest = Manifest {
            number: keys::FIRST,
            group: hello.group,
            name: hello.name.clone(),
            peer: san.to_owned(),
            written_ns: now_ns,
            disks: hello.disks.clone(),
            epochs: vec![epoch_entry(epoch, hello.log, now_ns)],
        };
        let key = keys::manifest(hello.group, keys::FIRST);
        // Whoever won: the manifest that is there counts.
        self.repository
            .create(&key, manifest.encode().into())
            .await?;
        Ok(self.load(hello.group).await?)
    }
}

fn check_binding(binding: &NameBinding, hello: &Hello, san: &str) -> Result<(), IngestError> {
    if binding.group == hello.group && binding.peer == san {
        return Ok(());
    }
    Err(IngestError::Identity {
        name: hello.name.clone(),
        bound: binding.group,
        bound_peer: binding.peer.clone(),
        said: hello.group,
        said_peer: san.to_owned(),
    })
}

fn epoch_entry(epoch: Epoch, log: LogId, begun_ns: u64) -> EpochEntry {
    EpochEntry {
        epoch,
        log,
        first_seq: keys::FIRST,
        first_lsn: Lsn::ZERO,
        begun_ns,
    }
}

/// Applies the table until nobody else interferes.
async fn open(
    group: &Arc<Group>,
    slot: &Arc<Slot>,
    hello: &Hello,
    now_ns: u64,
) -> Result<Opened, IngestError> {
    loop {
        group.refresh().await?;
        settle(group).await?;
        match decide(group, hello)? {
            Decision::Resume => {
                if !adopt_disks(group, hello, now_ns).await? {
                    continue;
                }
                let session = Session::begin(group.clone(), slot.clone());
                let reply = HelloReply::Resume(session.resume());
                return Ok(Opened {
                    reply,
                    session: Some(session),
                });
            }
            Decision::Repeat(epoch) => {
                return Ok(Opened {
                    reply: HelloReply::NewEpoch(epoch),
                    session: None,
                });
            }
            Decision::Begin(epoch, tell) => {
                // From here on no older session of this process may commit.
                slot.take_over();
                if !begin_epoch(group, epoch, hello, now_ns).await? {
                    continue;
                }
                if tell {
                    return Ok(Opened {
                        reply: HelloReply::NewEpoch(epoch),
                        session: None,
                    });
                }
            }
        }
    }
}

/// Makes everything durable that was read and will be built upon: an earlier process may have
/// been killed before it synced a folder.
async fn settle(group: &Group) -> Result<(), RepositoryError> {
    let (manifest, segment) = {
        let history = group.history();
        let newest = history.newest().map_or(Epoch(0), |epoch| epoch.number);
        (
            history.manifest.number,
            keys::segment(group.id(), newest, keys::FIRST),
        )
    };
    group
        .repository()
        .resync(&keys::manifest(group.id(), manifest))
        .await?;
    group.repository().resync(&segment).await?;
    let name = group.history().manifest.name.clone();
    match keys::name(&name) {
        Ok(key) => group.repository().resync(&key).await,
        Err(_) => Ok(()),
    }
}

fn decide(group: &Group, hello: &Hello) -> Result<Decision, IngestError> {
    let history = group.history();
    let Some(newest) = history.newest() else {
        return Ok(Decision::Begin(
            Epoch(hello.epoch.0.max(1)),
            hello.epoch.0 == 0,
        ));
    };
    let fenced = IngestError::Fenced {
        group: group.id(),
        said: hello.epoch,
        newest: newest.number,
    };
    let next = || {
        let next = newest.number.max(hello.epoch).next();
        next.ok_or(IngestError::EpochsUsedUp { group: group.id() })
    };
    let known_before = history
        .epochs
        .iter()
        .rev()
        .skip(1)
        .any(|epoch| epoch.log == hello.log);
    let is_newest = newest.log == hello.log;
    if hello.demands_epoch && (is_newest || !known_before) {
        let is_repeat = is_newest && hello.epoch < newest.number && newest.segments.is_empty();
        if is_newest && hello.epoch < newest.number && !is_repeat {
            return Err(fenced);
        }
        return Ok(match is_repeat && !newest.ended {
            true => Decision::Repeat(newest.number),
            false => Decision::Begin(next()?, true),
        });
    }
    if hello.epoch > newest.number {
        return Ok(Decision::Begin(hello.epoch, false));
    }
    if is_newest {
        return match hello.epoch == newest.number {
            // Its manifest is missing: the epoch that was to follow was never begun.
            true if newest.ended => Err(fenced),
            true => Ok(Decision::Resume),
            false if newest.segments.is_empty() && !newest.ended => {
                Ok(Decision::Repeat(newest.number))
            }
            false => Err(fenced),
        };
    }
    if !known_before && hello.epoch.0 == 0 {
        return Ok(Decision::Begin(next()?, true));
    }
    Err(fenced)
}

/// Ends the newest epoch and begins another. `false`: somebody else was faster; look again.
async fn begin_epoch(
    group: &Group,
    epoch: Epoch,
    hello: &Hello,
    now_ns: u64,
) -> Result<bool, IngestError> {
    let (mut manifest, last) = {
        let history = group.history();
        let last = history
            .newest()
            .map(|last| (last.number, last.next_sequence(), last.ended));
        (history.manifest.clone(), last)
    };
    if manifest.epochs.len() == EPOCHS_MAX {
        return Err(IngestError::TooManyEpochs {
            group: group.id(),
            epochs: EPOCHS_MAX,
        });
    }
    if let Some((last, sequence, false)) = last {
        let terminator = Terminator {
            group: group.id(),
            epoch: last,
            seq: sequence,
            next_epoch: epoch,
            next_log: hello.log,
            ended_ns: now_ns,
        };
        let key = keys::segment(group.id(), last, sequence);
        let created = group
            .repository()
            .create(&key, terminator.encode().into())
            .await?;
        if matches!(created, Created::Taken(_)) {
            return Ok(false);
        }
    }
    manifest.number += 1;
    manifest.written_ns = now_ns;
    manifest.epochs.push(epoch_entry(epoch, hello.log, now_ns));
    manifest.disks.clone_from(&hello.disks);
    commit_manifest(group, manifest).await
}

/// Takes over a disk table that grew. `false`: somebody else was faster; look again.
async fn adopt_disks(group: &Group, hello: &Hello, now_ns: u64) -> Result<bool, IngestError> {
    let mut manifest = group.history().manifest.clone();
    if manifest.disks == hello.disks {
        return Ok(true);
    }
    if let Some(place) = first_conflict(&manifest.disks, &hello.disks) {
        return Err(IngestError::Disks {
            group: group.id(),
            place,
        });
    }
    manifest.number += 1;
    manifest.written_ns = now_ns;
    manifest.disks.clone_from(&hello.disks);
    commit_manifest(group, manifest).await
}

/// Within an epoch a disk keeps UUID and place, and does not shrink.
fn first_conflict(known: &[DiskEntry], said: &[DiskEntry]) -> Option<usize> {
    let blocks = |disk: &DiskEntry| disk.size_bytes.div_ceil(BLOCK_SIZE as u64);
    let same = |(known, said): (&DiskEntry, &DiskEntry)| {
        known.disk == said.disk && blocks(known) <= blocks(said)
    };
    if said.len() < known.len() {
        return Some(said.len());
    }
    known.iter().zip(said).position(|pair| !same(pair))
}

async fn commit_manifest(group: &Group, manifest: Manifest) -> Result<bool, IngestError> {
    let key = keys::manifest(group.id(), manifest.number);
    match group
        .repository()
        .create(&key, Bytes::from(manifest.encode()))
        .await?
    {
        Created::Ours => {
            group.history_mut().advance(manifest);
            Ok(true)
        }
        Created::Taken(_) => Ok(false),
    }
}
