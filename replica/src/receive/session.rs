//! One primary's stream of segments into one epoch.
#![deny(clippy::disallowed_methods)]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use afterimage_format::ids::{Epoch, GroupId, LogId};
use afterimage_format::manifest::is_terminator;
use afterimage_format::segment::{self, SegmentError, SegmentIndex, SegmentKind};
use afterimage_format::wire::{Ack, Resume};
use bytes::Bytes;
use tokio::runtime::Handle;

use super::Slot;
use super::error::IngestError;
use crate::aside;
use crate::group::{Group, GroupError, Intake, read_index_checked};
use crate::history::{Events, Refusal, Verdict, chain_at, check_disks};
use crate::repository::{Created, RepositoryError, keys};

/// Most refused segments that are kept for a group: enough to see what happened.
const CONFLICTS_MAX: usize = 16;

/// A segment of which every byte was checked: hashes, limits, chain, payloads, bodies of events.
/// Only such a one can be given to a session. Building it takes no session and can be done
/// anywhere.
#[derive(Debug)]
pub struct Verified {
    bytes: Bytes,
    index: SegmentIndex,
    events: Events,
}

impl Verified {
    /// Checks a whole segment as it came.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn check(bytes: Bytes) -> Result<Self, IngestError> {
        let index = segment::verify(&bytes)?;
        let mut bodies = Vec::new();
        for (_, entry) in Events::wanted(&index) {
            bodies.push(index.payload(entry, |number, info| {
                let range = info.range();
                let stored = bytes.get(range.start as usize..range.end as usize);
                let stored = stored.ok_or(SegmentError::ChunkChecksum(number))?;
                info.decode(number, stored)
            })?);
        }
        let events = Events::decode(&index, bodies)?;
        Ok(Self {
            bytes,
            index,
            events,
        })
    }

    /// As [`Verified::check`], on a thread for such work if the runtime has more than one.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub(super) async fn check_aside(bytes: Bytes) -> Result<Self, IngestError> {
        aside::compute(move || Self::check(bytes.clone())).await
    }

    /// Its index.
    #[must_use]
    pub const fn index(&self) -> &SegmentIndex {
        &self.index
    }

    /// Its events.
    #[must_use]
    pub const fn events(&self) -> &Events {
        &self.events
    }
}

/// A session that counts until a newer one begins.
#[derive(Debug)]
pub struct Session {
    group: Arc<Group>,
    slot: Arc<Slot>,
    generation: u64,
    epoch: Epoch,
    log: LogId,
    segments: u64,
    /// [`crate::repository::Repository::turn`] when the session began.
    repository_turn: u64,
}

impl Session {
    /// Begins: every older session ends here.
    pub(super) fn begin(group: Arc<Group>, slot: Arc<Slot>) -> Self {
        let generation = slot.take_over();
        let (epoch, log) = {
            let history = group.history();
            history
                .newest()
                .map_or((Epoch(0), LogId::from_bytes([0; 16])), |newest| {
                    (newest.number, newest.log)
                })
        };
        let repository_turn = slot.repository_turn.load(Ordering::Acquire);
        Self {
            group,
            slot,
            generation,
            epoch,
            log,
            segments: 0,
            repository_turn,
        }
    }

    /// Where the primary goes on.
    #[must_use]
    pub fn resume(&self) -> Resume {
        let history = self.group.history();
        history.epoch(self.epoch).map_or(
            Resume {
                epoch: self.epoch,
                cursor: Default::default(),
                completed_pass: Default::default(),
                active_pass: None,
            },
            crate::history::Epoch::resume,
        )
    }

    /// The group it writes.
    #[must_use]
    pub fn group(&self) -> &Arc<Group> {
        &self.group
    }

    /// Waits until a newer session has taken over.
    pub async fn superseded(&self) {
        let mut newest = self.slot.generation.subscribe();
        let generation = self.generation;
        // An error means that the slot is gone, and with it whoever could take over.
        let _ = newest.wait_for(|newest| *newest != generation).await;
    }

    /// Commits a segment and says what is durable. When this returns, the segment is durable or
    /// was so before.
    ///
    /// # Errors
    /// The segment is not acknowledged and the session is over: the primary has to say hello
    /// again, which finds out what is durable.
    pub async fn accept(&mut self, segment: Verified, now_ns: u64) -> Result<Ack, IngestError> {
        let slot = self.slot.clone();
        let turn = slot.turn.lock().await;
        if !slot.counts(self.generation) {
            return Err(IngestError::Superseded {
                group: self.group.id(),
            });
        }
        let outcome = self.place(segment, now_ns).await;
        if let Err(error) = &outcome {
            // Whatever happened to the segment, a new hello decides where it goes on.
            slot.take_over();
            self.note_failure(error);
        }
        drop(turn);
        outcome?;
        self.segments += 1;
        Ok(self.ack())
    }

    /// What is durable, and what comparing has come to, as of now.
    pub(super) fn ack(&self) -> Ack {
        let Resume {
            cursor,
            completed_pass,
            active_pass,
            ..
        } = self.resume();
        Ack {
            segments: self.segments,
            cursor,
            completed_pass,
            active_pass,
            comparisons: self.group.comparison().now(),
        }
    }

    async fn place(&self, segment: Verified, now_ns: u64) -> Result<(), IngestError> {
        if self.group.repository().turn() != self.repository_turn {
            // A copy stands in for what this history was read from.
            return Err(IngestError::Superseded {
                group: self.group.id(),
            });
        }
        let index = &segment.index;
        let header = &index.header;
        if (header.group, header.epoch, header.log) != (self.group.id(), self.epoch, self.log) {
            let (group, epoch, log) = (header.group, header.epoch, header.log);
            return Err(Refusal::Foreign { group, epoch, log }.into());
        }
        let verdict = {
            let history = self.group.history();
            let epoch = history
                .newest()
                .filter(|epoch| epoch.number == self.epoch && !epoch.ended);
            let epoch = epoch.ok_or_else(|| self.fenced(history.newest().map(|e| e.number)))?;
            check_disks(index, &history.manifest.disks)?;
            epoch.check(index)
        };
        match verdict {
            Ok(Verdict::Append { sequence }) => self.commit(segment, sequence, now_ns).await,
            Ok(Verdict::Known) => Ok(()),
            Ok(Verdict::Compare { sequence }) => self.compare(segment, sequence).await,
            Err(refusal @ Refusal::Diverged { .. }) => Err(self.keep(&segment, refusal).await),
            Err(refusal) => Err(refusal.into()),
        }
    }

    /// Creates the key, then takes the segment into the history.
    async fn commit(
        &self,
        segment: Verified,
        sequence: u64,
        now_ns: u64,
    ) -> Result<(), IngestError> {
        let Verified {
            bytes,
            index,
            events,
        } = segment;
        let stored_bytes = bytes.len() as u64;
        let key = keys::segment(self.group.id(), self.epoch, sequence);
        match self.group.repository().create(&key, bytes).await? {
            Created::Ours => {}
            Created::Taken(found) if is_terminator(&found) => return Err(self.fenced(None)),
            // Another process, or a commit of an older session that landed late.
            Created::Taken(_) => {
                return Err(IngestError::Superseded {
                    group: self.group.id(),
                });
            }
        }
        let warnings = {
            let mut history = self.group.history_mut();
            match history.newest_mut() {
                Some(epoch) => epoch.apply(&index, &events),
                None => Vec::new(),
            }
        };
        self.keep_layers().await;
        self.group.comparison().tell();
        let newest_ns = match index.header.kind {
            SegmentKind::Log => index.entries.last().map_or(0, |entry| entry.record.wall_ns),
            SegmentKind::Pass => 0,
        };
        self.group.note(|status| {
            status.intake = Intake::Running;
            status.last_received_ns = now_ns;
            if newest_ns > 0 {
                status.newest_record_ns = newest_ns;
            }
            status.segments += 1;
            status.payload_bytes += index.header.payload_bytes;
            status.stored_bytes += stored_bytes;
        });
        // The history keeps it, and the status shows it.
        for warning in &warnings {
            tracing::error!(group = %self.group.id(), %warning, "pass dropped");
        }
        Ok(())
    }

    /// The index goes into layers, beside the intake where there is a runtime for it.
    async fn keep_layers(&self) {
        if !self.group.seal_newest() {
            return;
        }
        match Handle::try_current() {
            Ok(runtime) => {
                let group = Arc::clone(&self.group);
                runtime.spawn(async move { group.keep_layers().await });
            }
            Err(_) => self.group.keep_layers().await,
        }
    }

    /// The segment ends in the middle of one that is here: is it the same up to there?
    async fn compare(&self, segment: Verified, sequence: u64) -> Result<(), IngestError> {
        let key = keys::segment(self.group.id(), self.epoch, sequence);
        let expected = {
            let history = self.group.history();
            let epoch = history.epoch(self.epoch);
            epoch.and_then(|epoch| epoch.segment(sequence)).copied()
        };
        let expected = expected.ok_or_else(|| GroupError::Missing { key: key.clone() })?;
        let held = read_index_checked(self.group.repository(), &key, &expected).await?;
        let last = segment.index.header.last_lsn;
        let records = (last.0 - held.header.first_lsn.0 + 1) as usize;
        if chain_at(&held, records) == segment.index.header.chain_after {
            return Ok(());
        }
        let first = segment.index.header.first_lsn;
        Err(self.keep(&segment, Refusal::Diverged { first, last }).await)
    }

    /// Keeps content whose identity is taken, so that somebody can look at it.
    async fn keep(&self, segment: &Verified, refusal: Refusal) -> IngestError {
        let hash = blake3::hash(&segment.bytes);
        let key = keys::conflict(self.group.id(), self.epoch, &hash);
        let kept = self.keep_under(&key, segment.bytes.clone()).await;
        let alarm = match &kept {
            Ok(true) => format!("{refusal}; kept as {key}"),
            Ok(false) => format!("{refusal}; not kept, {CONFLICTS_MAX} are already"),
            Err(error) => format!("{refusal}; could not be kept: {error}"),
        };
        tracing::error!(group = %self.group.id(), %alarm, "diverged");
        self.group.note(|status| {
            status.diverged += 1;
            status.alarm = Some(alarm);
        });
        refusal.into()
    }

    async fn keep_under(&self, key: &str, bytes: Bytes) -> Result<bool, RepositoryError> {
        let repository = self.group.repository();
        let folder = format!("{}/conflicts", keys::group(self.group.id()));
        if repository.names_below(&folder).await?.len() >= CONFLICTS_MAX {
            return Ok(false);
        }
        repository.create(key, bytes).await.map(|_| true)
    }

    fn fenced(&self, newest: Option<Epoch>) -> IngestError {
        let newest = newest.unwrap_or(Epoch(self.epoch.0 + 1));
        IngestError::Fenced {
            group: self.group.id(),
            said: self.epoch,
            newest,
        }
    }

    fn note_failure(&self, error: &IngestError) {
        self.group.note(|status| match error.repository() {
            Some(cause) if cause.is_full() => {
                status.intake = Intake::RepositoryFull {
                    text: cause.to_string(),
                };
            }
            Some(cause) => {
                status.intake = Intake::Failed {
                    text: cause.to_string(),
                }
            }
            None => {
                if matches!(error, IngestError::Fenced { .. }) {
                    status.fenced += 1;
                }
            }
        });
    }

    /// The group's UUID.
    #[must_use]
    pub fn group_id(&self) -> GroupId {
        self.group.id()
    }
}
