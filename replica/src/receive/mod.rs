//! What receives segments and commits them: the only writer of a repository.
//!
//! A hello leads to a [`Session`] or to a new epoch ([`hello`]); a segment is checked byte by byte
//! ([`Verified`]), placed in the history, committed by the creation of its key, applied, and only
//! then acknowledged ([`session`]). [`server`] carries this over TLS, [`direct`] within a process.
//!
//! What always holds: one session per group counts at a time. A newer hello waits for the commit
//! under way, then takes over; whatever the older session says afterwards is refused. Nothing is
//! acknowledged that is not durable; after any doubt the history is read again from the repository
//! before a hello is answered. Time is passed in; nothing is spawned here but the comparison beside a
//! session (`comparing`), and that only where there are threads for it.

mod comparing;
mod direct;
mod error;
mod hello;
mod peer;
mod place;
mod room;
mod server;
mod session;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use afterimage_format::ids::GroupId;
use tokio::sync::Mutex as AsyncMutex;
use tokio::sync::watch;

use crate::group::{Group, GroupError};
use crate::layers::SEAL_EXTENTS;
use crate::repository::Repository;

pub use direct::DirectSink;
pub use error::IngestError;
pub use hello::Opened;
pub use peer::Peer;
pub use place::Place;
pub use server::{Conversation, Server, ServerLimits};
pub use session::{Session, Verified};

/// The replica's clock: nanoseconds since 1970.
pub type NowNs = Arc<dyn Fn() -> u64 + Send + Sync>;

/// The receiving side of a repository. One per process and repository; cheap to clone.
#[derive(Debug, Clone)]
pub struct Receiver {
    repository: Repository,
    /// Groups that were stored here and are not found begin anew.
    accepts_loss: bool,
    /// Extents after which a group's index is stored as a layer.
    seal_extents: usize,
    slots: Arc<Mutex<HashMap<GroupId, Arc<Slot>>>>,
}

/// One group's place: its history, and which session counts.
#[derive(Debug, Default)]
struct Slot {
    /// Held while a hello is answered and while a segment is committed.
    turn: AsyncMutex<Option<Arc<Group>>>,
    /// Number of the session that counts.
    generation: watch::Sender<u64>,
    /// Generations given out.
    issued: AtomicU64,
    /// [`Repository::turn`] when the history was read.
    repository_turn: AtomicU64,
}

impl Slot {
    /// A new session's number; from now on no other counts.
    fn take_over(&self) -> u64 {
        let generation = self.issued.fetch_add(1, Ordering::Relaxed) + 1;
        self.generation.send_replace(generation);
        generation
    }

    fn counts(&self, generation: u64) -> bool {
        *self.generation.borrow() == generation
    }
}

impl Receiver {
    /// The receiving side of this repository.
    #[must_use]
    pub fn new(repository: Repository) -> Self {
        Self {
            repository,
            accepts_loss: false,
            seal_extents: SEAL_EXTENTS,
            slots: Arc::default(),
        }
    }

    /// Whether groups begin anew whose primaries know that they had been stored here, although
    /// nothing of them is found; refused otherwise.
    #[must_use]
    pub fn accepting_loss(self, accepts_loss: bool) -> Self {
        Self {
            accepts_loss,
            ..self
        }
    }

    /// Stores a layer after so many extents instead of [`SEAL_EXTENTS`].
    #[must_use]
    pub fn sealing(self, seal_extents: usize) -> Self {
        Self {
            seal_extents,
            ..self
        }
    }

    /// The repository.
    #[must_use]
    pub const fn repository(&self) -> &Repository {
        &self.repository
    }

    /// A group with its history as this process keeps it: loaded at the first call, followed by
    /// the intake from then on.
    ///
    /// # Errors
    /// It does not exist or cannot be read.
    pub async fn group(&self, id: GroupId) -> Result<Arc<Group>, GroupError> {
        let slot = self.slot(id);
        let mut turn = slot.turn.lock().await;
        if let Some(group) = &*turn {
            return Ok(group.clone());
        }
        let group = Arc::new(self.load(id).await?);
        *turn = Some(group.clone());
        Ok(group)
    }

    /// A group by its name.
    ///
    /// # Errors
    /// As [`Receiver::group`].
    pub async fn group_by_name(&self, name: &str) -> Result<Arc<Group>, GroupError> {
        let binding = crate::group::read_binding(&self.repository, name).await?;
        let binding = binding.ok_or_else(|| GroupError::Unknown {
            group: name.to_owned(),
        })?;
        let group = self.group(binding.group).await;
        group.map_err(|error| error.of_bound(name))
    }

    async fn load(&self, id: GroupId) -> Result<Group, GroupError> {
        Group::load_sealing(&self.repository, id, self.seal_extents).await
    }

    fn slot(&self, id: GroupId) -> Arc<Slot> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = slots.entry(id).or_insert_with(|| {
            Arc::new(Slot {
                repository_turn: AtomicU64::new(self.repository.turn()),
                ..Slot::default()
            })
        });
        slot.clone()
    }
}
