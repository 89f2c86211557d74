//! A group as everybody outside its thread sees it.

use super::WorkerError;
use super::mailbox::Postbox;
use super::message::{
    Attachment, Command, DetachMarker, GroupEvent, GroupKey, GroupSnapshot, Message,
};
use crate::engine::event::EngineError;
use crate::engine::request::{Allocated, LogProgress, PassRead};
use crate::engine::{EngineConfig, EventRecord, LogStart};
use crate::io::storage::StorageParts;
use crate::ship::BoxFuture;
use crate::ship::port::{GroupIdentity, GroupPort, PortError, SinkRecord};
use afterimage_format::ids::{DiskIndex, Epoch, Lsn};
use afterimage_format::segment::SinkId;
use afterimage_format::wire::Cursor;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{mpsc, oneshot, watch};

/// A group whose log is recovered, ready to be served.
pub struct RecoveredGroup {
    /// Who it is.
    pub identity: GroupIdentity,
    /// Its ring and files, with the ids of [`crate::io::FileId`].
    pub parts: StorageParts,
    /// What recovery found.
    pub start: LogStart,
    /// Limits and times of its engine.
    pub config: EngineConfig,
    /// Memory for payloads larger than a receive buffer.
    pub payload_budget_bytes: usize,
    /// For `on_log_error = "detach"`.
    pub detach_marker: DetachMarker,
}

impl fmt::Debug for RecoveredGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RecoveredGroup({})", self.identity.name)
    }
}

/// A running group. Clones talk to the same one.
#[derive(Clone)]
pub struct GroupHandle {
    shared: Arc<Shared>,
}

struct Shared {
    postbox: Postbox<Message>,
    key: GroupKey,
    identity: GroupIdentity,
    progress: watch::Receiver<LogProgress>,
    events: Mutex<Option<mpsc::UnboundedReceiver<GroupEvent>>>,
}

impl fmt::Debug for GroupHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GroupHandle({})", self.shared.identity.name)
    }
}

impl GroupHandle {
    pub(super) fn new(
        postbox: Postbox<Message>,
        key: GroupKey,
        identity: GroupIdentity,
        progress: watch::Receiver<LogProgress>,
        events: mpsc::UnboundedReceiver<GroupEvent>,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                postbox,
                key,
                identity,
                progress,
                events: Mutex::new(Some(events)),
            }),
        }
    }

    fn send(&self, command: Command) -> Result<(), WorkerError> {
        let message = Message::Group(self.shared.key, command);
        let sent = self.shared.postbox.send(message);
        sent.map_err(|_| WorkerError::Gone)
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.send(command(reply)).ok()?;
        answer.await.ok()
    }

    /// Who the group is.
    #[must_use]
    pub fn identity(&self) -> &GroupIdentity {
        &self.shared.identity
    }

    /// How far the log is. Closed when the group ends.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<LogProgress> {
        self.shared.progress.clone()
    }

    /// What happens to the group. Can be taken once.
    #[must_use]
    pub fn take_events(&self) -> Option<mpsc::UnboundedReceiver<GroupEvent>> {
        let mut events = self
            .shared
            .events
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        events.take()
    }

    /// Hands a connection over whose handshake is done.
    ///
    /// # Errors
    /// The group has ended; the connection is closed.
    pub fn attach(&self, attachment: Attachment) -> Result<(), WorkerError> {
        self.send(Command::Attach(Box::new(attachment)))
    }

    /// Returns when every request readable on dead connections to the disk has been executed or
    /// dropped for good.
    ///
    /// # Errors
    /// The group has ended.
    pub async fn quiesce(&self, disk: DiskIndex) -> Result<(), WorkerError> {
        let quiet = self.ask(|reply| Command::Quiesce { disk, reply }).await;
        quiet.ok_or(WorkerError::Gone)
    }

    /// Appends a record that changes no blocks; returns its LSN when it has one, or when it is
    /// durable in the log.
    ///
    /// # Errors
    /// The log has failed, or the group is shutting down.
    pub async fn append_event(
        &self,
        record: EventRecord,
        durable: bool,
    ) -> Result<Lsn, EngineError> {
        let appended = self
            .ask(|reply| Command::Append {
                record,
                durable,
                reply,
            })
            .await;
        appended.unwrap_or(Err(EngineError::ShuttingDown))
    }

    /// Makes the group's sinks these, durably. One that is new lacks everything.
    ///
    /// # Errors
    /// Too many, or the log has failed, or the group is shutting down.
    pub async fn set_sinks(&self, sinks: Vec<SinkId>) -> Result<(), PortError> {
        let stored = self.ask(|reply| Command::SetSinks { sinks, reply }).await;
        stored.unwrap_or(Err(PortError::Gone))
    }

    /// The group as of now.
    ///
    /// # Errors
    /// The group has ended.
    pub async fn snapshot(&self) -> Result<GroupSnapshot, WorkerError> {
        let snapshot = self.ask(|reply| Command::Snapshot { reply }).await;
        snapshot.ok_or(WorkerError::Gone)
    }

    /// Brings everything into the backings and marks the log clean. Requests that come from now on
    /// get ESHUTDOWN.
    ///
    /// # Errors
    /// The log has failed.
    pub async fn drain(&self) -> Result<(), EngineError> {
        let drained = self.ask(|reply| Command::Drain { reply }).await;
        drained.unwrap_or(Err(EngineError::ShuttingDown))
    }

    /// Ends the connections and the group, drained or not. Returns its ring and files when nothing
    /// is in flight any more: open and locked until they are dropped. `None` if it was gone already.
    #[must_use = "the files are unlocked when this is dropped"]
    pub async fn remove(&self) -> Option<StorageParts> {
        self.ask(|reply| Command::Remove { reply }).await?
    }
}

fn port_error(error: EngineError) -> PortError {
    match error {
        EngineError::LogFailed { .. } => PortError::LogFailed,
        EngineError::UnknownSink(_) => PortError::UnknownSink,
        _ => PortError::Gone,
    }
}

impl GroupPort for GroupHandle {
    fn identity(&self) -> GroupIdentity {
        self.shared.identity.clone()
    }

    fn progress(&self) -> watch::Receiver<LogProgress> {
        self.shared.progress.clone()
    }

    fn sink_record(&self, sink: SinkId) -> BoxFuture<'_, Result<SinkRecord, PortError>> {
        Box::pin(async move {
            let record = self.ask(|reply| Command::SinkRecord { sink, reply }).await;
            record.unwrap_or(Err(PortError::Gone))
        })
    }

    fn report_acked(
        &self,
        sink: SinkId,
        acked: Cursor,
        complete: bool,
    ) -> BoxFuture<'_, Result<(), PortError>> {
        Box::pin(async move {
            let stored = self
                .ask(|reply| Command::ReportAcked {
                    sink,
                    acked,
                    complete,
                    reply,
                })
                .await;
            stored.unwrap_or(Err(PortError::Gone))
        })
    }

    fn set_epoch(&self, epoch: Epoch) -> BoxFuture<'_, Result<(), PortError>> {
        Box::pin(async move {
            let raised = self.ask(|reply| Command::RaiseEpoch { epoch, reply }).await;
            let raised = raised.unwrap_or(Err(EngineError::ShuttingDown));
            raised.map(|_| ()).map_err(port_error)
        })
    }

    fn append(&self, event: EventRecord) -> BoxFuture<'_, Result<Lsn, PortError>> {
        Box::pin(async move { self.append_event(event, false).await.map_err(port_error) })
    }

    fn pass_read(
        &self,
        disk: DiskIndex,
        first_block: u64,
        block_count: u32,
    ) -> BoxFuture<'_, Result<PassRead, PortError>> {
        Box::pin(async move {
            let read = self
                .ask(|reply| Command::PassRead {
                    disk,
                    first_block,
                    block_count,
                    reply,
                })
                .await;
            read.unwrap_or(Err(PortError::Gone))
        })
    }

    fn allocated_ranges(
        &self,
        disk: DiskIndex,
        from_block: u64,
        ranges_max: usize,
    ) -> BoxFuture<'_, Result<Allocated, PortError>> {
        Box::pin(async move {
            let ranges = self
                .ask(|reply| Command::AllocatedRanges {
                    disk,
                    from_block,
                    ranges_max,
                    reply,
                })
                .await;
            ranges.unwrap_or(Err(PortError::Gone))
        })
    }
}
