//! What is sent to a worker thread.

use super::durations::{DURATION_OPS, DurationHistogram};
use crate::engine::event::EngineError;
use crate::engine::request::{Allocated, EngineStatus, LogProgress, PassRead};
use crate::engine::{EngineConfig, EventRecord, LogStart};
use crate::io::storage::StorageParts;
use crate::nbd::budget::PayloadBudget;
use crate::nbd::export::Negotiated;
use crate::nbd::listener::ConnectionSlot;
use crate::ship::port::{PortError, SinkRecord};
use afterimage_format::ids::{DiskIndex, Epoch, Lsn};
use afterimage_format::segment::SinkId;
use afterimage_format::wire::Cursor;
use rustls::ServerConnection;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot, watch};

/// A group's number on its worker.
pub(super) type GroupKey = usize;

/// What the owner of a group should know, as it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupEvent {
    /// The first failed write or sync of the log; nothing is durable any more from here on.
    LogFailed {
        /// The error of the operating system.
        errno: i32,
    },
    /// The group runs without a log from now on (`on_log_error = "detach"`).
    Detached,
    /// A backing fails; it is tried again. The log keeps what it lacks.
    BackingFailing {
        /// Which disk.
        disk: DiskIndex,
        /// The error of the operating system.
        errno: i32,
    },
    /// All backings work again.
    BackingRecovered,
    /// Records up to `lsn` left the log without this sink having them: a pass is due.
    HistoryGap {
        /// Which sink.
        sink: SinkId,
        /// Last LSN that left.
        lsn: Lsn,
    },
}

/// A group as its owner sees it at one moment.
#[derive(Clone, Debug, Default)]
pub struct GroupSnapshot {
    /// Counters and levels of the engine.
    pub engine: EngineStatus,
    /// What each sink of the log's superblock lacks.
    pub sinks: Vec<SinkBacklog>,
    /// Connections of each disk.
    pub connections: Vec<(DiskIndex, String)>,
    /// Bytes of large payloads under way.
    pub payload_bytes: usize,
    /// Durations of requests, in the order of [`DURATION_OPS`].
    pub durations: [DurationHistogram; DURATION_OPS.len()],
}

/// What a sink lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SinkBacklog {
    /// Which sink.
    pub sink: SinkId,
    /// Bytes of the log behind what it has acknowledged
    /// ([`Engine::log_bytes_behind`](crate::engine::Engine::log_bytes_behind)).
    pub log_bytes: u64,
}

/// Stores a durable marker beside every backing that forbids replay of the group's log. Runs on a
/// thread of its own; after an error it is run again, later.
pub type DetachMarker = Arc<dyn Fn() -> std::io::Result<()> + Send + Sync>;

/// A recovered group on its way to a worker.
pub(super) struct NewGroup {
    pub(super) name: String,
    pub(super) parts: StorageParts,
    pub(super) start: LogStart,
    pub(super) config: EngineConfig,
    pub(super) budget: PayloadBudget,
    pub(super) progress: watch::Sender<LogProgress>,
    pub(super) events: mpsc::UnboundedSender<GroupEvent>,
    pub(super) detach_marker: DetachMarker,
    pub(super) reply: oneshot::Sender<GroupKey>,
}

/// A connection whose handshake is over, for the worker of its group.
pub struct Attachment {
    /// Which disk.
    pub disk: DiskIndex,
    /// The socket, at the first byte of transmission.
    pub socket: OwnedFd,
    /// Its TLS session. May hold decrypted bytes already.
    pub tls: Option<ServerConnection>,
    /// What was agreed.
    pub negotiated: Negotiated,
    /// Who it is, for people.
    pub peer: String,
    /// Its place at the listener, kept as long as the connection.
    pub slot: ConnectionSlot,
}

impl std::fmt::Debug for Attachment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Attachment({} to disk {})", self.peer, self.disk.0)
    }
}

/// Something asked of a group.
pub(super) enum Command {
    Attach(Box<Attachment>),
    /// Answered when the record has its LSN, or with `durable` when it is durable.
    Append {
        record: EventRecord,
        durable: bool,
        reply: oneshot::Sender<Result<Lsn, EngineError>>,
    },
    RaiseEpoch {
        epoch: Epoch,
        reply: oneshot::Sender<Result<Lsn, EngineError>>,
    },
    PassRead {
        disk: DiskIndex,
        first_block: u64,
        block_count: u32,
        reply: oneshot::Sender<Result<PassRead, PortError>>,
    },
    AllocatedRanges {
        disk: DiskIndex,
        from_block: u64,
        ranges_max: usize,
        reply: oneshot::Sender<Result<Allocated, PortError>>,
    },
    /// Answered when the superblock names these sinks durably.
    SetSinks {
        sinks: Vec<SinkId>,
        reply: oneshot::Sender<Result<(), PortError>>,
    },
    SinkRecord {
        sink: SinkId,
        reply: oneshot::Sender<Result<SinkRecord, PortError>>,
    },
    ReportAcked {
        sink: SinkId,
        acked: Cursor,
        complete: bool,
        reply: oneshot::Sender<Result<(), PortError>>,
    },
    /// Answered when no dead connection of the disk is left.
    Quiesce {
        disk: DiskIndex,
        reply: oneshot::Sender<()>,
    },
    Snapshot {
        reply: oneshot::Sender<GroupSnapshot>,
    },
    /// The detach marker is stored.
    DetachMarked,
    /// The detach marker could not be stored.
    DetachFailed {
        errno: i32,
    },
    /// Answered when everything is in the backings and the superblock says clean.
    Drain {
        reply: oneshot::Sender<Result<(), EngineError>>,
    },
    /// Ends the connections and gives up the group, drained or not; answered with its ring and
    /// files, still open and locked, when nothing is in flight any more.
    Remove {
        reply: oneshot::Sender<Option<StorageParts>>,
    },
}

pub(super) enum Message {
    Add(Box<NewGroup>),
    Group(GroupKey, Command),
    /// Counters of the thread's io_uring.
    Stats(oneshot::Sender<crate::io::uring::UringStats>),
    /// Gives up all groups and ends the thread.
    End,
}
