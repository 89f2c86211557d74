//! One session with a sink: agree on where to go on, then ship until something ends it.
//!
//! Owns: what was read and not yet acknowledged, in memory only; whatever a session knew is known
//! again from the log, the superblock and the sink's hello reply. Always holds: a segment is sent
//! only when the log is durable up to all it was made from; what is reported to the group has been
//! acknowledged by the sink, checked against what was sent. Memory: the window, one segment of
//! each kind, one read. A session ends with an error, never silently.
#![deny(clippy::disallowed_methods)]

mod follow;
mod open;
mod stream;

use super::port::{GroupPort, PortError};
use super::sink::{SinkConnection, SinkError};
use super::source::{RecordSource, SourceError};
use super::status::StatusCell;
pub use super::window::AckError;
use super::{ShipConfig, Tuning};
use afterimage_format::ids::{Epoch, Lsn};
use afterimage_format::segment::{PushError, SinkId};
use afterimage_format::wire::Cursor;
use std::convert::Infallible;
use std::sync::Arc;
use tokio::sync::watch;

/// What all sessions towards one sink share.
#[derive(Clone)]
pub struct Context {
    /// The group.
    pub port: Arc<dyn GroupPort>,
    /// The sink's identity in superblock and pass records.
    pub sink: SinkId,
    /// Settings.
    pub config: ShipConfig,
    /// The part of them that changes; what counts.
    pub tuning: watch::Receiver<Tuning>,
    /// Where to show what happens.
    pub status: StatusCell,
}

/// What one session leaves to the next within the same process.
#[derive(Clone, Copy, Default, Debug)]
pub struct Memory {
    /// Newer than the superblock's: what the sink acknowledged last, or the base declared last.
    acked: Option<Cursor>,
    /// Records below were found to be gone or unreadable, whatever the log's bounds say.
    readable_from: Lsn,
    /// The record at which a damaged frame was met last.
    damaged: Option<Lsn>,
    /// The sink has fenced an epoch that it did not give, at its first contact with this log.
    demands_epoch: bool,
    /// `PassBegin` of the pass whose `PassEnd` was given to the group. It may wait there for room
    /// long after its session has ended.
    ending: Lsn,
    /// The last session got an acknowledgement.
    pub(super) progressed: bool,
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The connection or the sink.
    #[error(transparent)]
    Sink(#[from] SinkError),
    /// The group.
    #[error(transparent)]
    Port(#[from] PortError),
    /// The log.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// An acknowledgement that cannot be.
    #[error("the sink {0}: this must not happen; verify the group at the replica")]
    Ack(#[from] AckError),
    /// What the log or the disk gave does not make a segment.
    #[error("cutting a segment failed: {0}")]
    Cut(#[from] PushError),
    /// An answer to a hello that makes no sense.
    #[error("the sink's answer makes no sense: {0}")]
    Answer(&'static str),
    /// The sink counts other pass blocks than were sent.
    #[error("the sink has other blocks of pass {0} than were sent; a new pass is needed")]
    PassNumbers(Lsn),
    /// The sink found other blocks than the end of the pass says.
    #[error("the sink has dropped pass {0}, which does not add up; a new pass is needed")]
    PassDropped(Lsn),
    /// Another sink made the group take a new epoch.
    #[error("the group is in epoch {0} now")]
    EpochChanged(Epoch),
    /// The sink has all that its base is good for.
    #[error("the sink has everything up to {0}; a new pass is due")]
    BaseDue(Lsn),
}

impl SessionError {
    /// The group is gone: nothing more to do.
    pub(super) fn is_end_of_group(&self) -> bool {
        matches!(self, Self::Port(PortError::Gone))
    }

    /// Nothing is wrong with the sink: the next session may begin at once.
    pub(super) fn is_benign(&self) -> bool {
        matches!(
            self,
            Self::EpochChanged(_) | Self::BaseDue(_) | Self::Source(SourceError::Gone(_))
        )
    }
}

/// Runs one session on a fresh connection.
///
/// # Errors
/// Always ends with one; see [`SessionError`].
pub async fn run(
    context: &Context,
    memory: &mut Memory,
    connection: &mut dyn SinkConnection,
    source: &mut dyn RecordSource,
) -> Result<Infallible, SessionError> {
    let result = async {
        let opened = open::open(context, memory, connection, source).await?;
        stream::Streaming::new(context, memory, connection, source, opened)
            .run()
            .await
    }
    .await;
    match &result {
        Err(SessionError::Source(error)) => memory.note_unreadable(error),
        // What was acknowledged counts within the epoch that was.
        Err(SessionError::EpochChanged(_)) => memory.acked = Some(Cursor::default()),
        _ => {}
    }
    result
}

impl Memory {
    /// A record that is gone, or damaged twice in a row, will not come back: the next session
    /// begins a base behind it.
    fn note_unreadable(&mut self, error: &SourceError) {
        let lost = match error {
            SourceError::Gone(lsn) => Some(*lsn),
            SourceError::Damaged { lsn, .. } if self.damaged == Some(*lsn) => Some(*lsn),
            SourceError::Damaged { lsn, .. } => {
                self.damaged = Some(*lsn);
                None
            }
            SourceError::Io(_) => None,
        };
        if let Some(lsn) = lost {
            self.readable_from = self.readable_from.max(lsn.next());
        }
    }
}
