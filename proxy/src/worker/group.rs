//! One group on its worker thread: the engine, and who waits for what from it.

use super::durations::Durations;
use super::mailbox::Postbox;
use super::message::{Command, DetachMarker, GroupEvent, GroupKey, Message};
use crate::engine::event::{EngineError, EngineEvent};
use crate::engine::request::{Allocated, LogProgress, Now, PassRead, Reply};
use crate::engine::{Engine, Ticket};
use crate::io::Completion;
use crate::io::Storage;
use crate::io::storage::{StorageParts, UringStorage};
use crate::nbd::budget::PayloadBudget;
use crate::ship::port::{PortError, SinkRecord};
use afterimage_format::ids::{DiskIndex, Lsn};
use afterimage_format::segment::SinkId;
use afterimage_format::superblock::SinkState;
use afterimage_format::wire::Cursor;
use slab::Slab;
use tokio::sync::{mpsc, oneshot, watch};

/// Stands for an error without a number.
const EIO: i32 = 5;

/// Who waits for an event of the engine.
enum Waiting {
    Appended(oneshot::Sender<Result<Lsn, EngineError>>),
    Durable(oneshot::Sender<Result<Lsn, EngineError>>),
    PassRead(DiskIndex, oneshot::Sender<Result<PassRead, PortError>>),
    Allocated(DiskIndex, oneshot::Sender<Result<Allocated, PortError>>),
    Stored(oneshot::Sender<Result<(), PortError>>),
    Drained(oneshot::Sender<Result<(), EngineError>>),
}

/// Who waits for gone clients to be over.
pub(super) struct Quiescing {
    /// Their connections.
    pub(super) connections: Vec<usize>,
    /// When they are ended, answered or not.
    pub(super) due_ns: u64,
    /// Answered when none is left.
    pub(super) reply: oneshot::Sender<()>,
}

pub(super) struct Group {
    pub(super) name: String,
    pub(super) engine: Engine<UringStorage>,
    pub(super) budget: PayloadBudget,
    /// Its connections, by their numbers.
    pub(super) connections: Vec<usize>,
    pub(super) quiescing: Vec<Quiescing>,
    pub(super) touched: bool,
    pub(super) durations: Durations,
    /// Answered with its files when the group is gone.
    pub(super) removing: Option<oneshot::Sender<Option<StorageParts>>>,
    waiting: Slab<Waiting>,
    progress: watch::Sender<LogProgress>,
    /// What is shown there, so that a turn without progress takes no lock.
    shown: LogProgress,
    events: mpsc::UnboundedSender<GroupEvent>,
    detach_marker: DetachMarker,
    postbox: Postbox<Message>,
    key: GroupKey,
    taken: Vec<EngineEvent>,
    completions: Vec<Completion>,
}

impl Group {
    #[expect(clippy::too_many_arguments, reason = "called once, each is moved in")]
    pub(super) fn new(
        name: String,
        engine: Engine<UringStorage>,
        budget: PayloadBudget,
        progress: watch::Sender<LogProgress>,
        events: mpsc::UnboundedSender<GroupEvent>,
        detach_marker: DetachMarker,
        postbox: Postbox<Message>,
        key: GroupKey,
    ) -> Self {
        let shown = *progress.borrow();
        Self {
            name,
            engine,
            budget,
            connections: Vec::new(),
            quiescing: Vec::new(),
            touched: false,
            durations: Durations::default(),
            removing: None,
            waiting: Slab::new(),
            shown,
            progress,
            events,
            detach_marker,
            postbox,
            key,
            taken: Vec::new(),
            completions: Vec::new(),
        }
    }

    /// Hands the storage's completions to the engine.
    pub(super) fn complete_storage(&mut self, now: Now) {
        let mut completions = std::mem::take(&mut self.completions);
        self.engine.storage_mut().poll(&mut completions);
        for completion in completions.drain(..) {
            self.engine.complete(now, completion);
        }
        self.completions = completions;
    }

    /// Lets the engine start what is due, and tells who waits.
    pub(super) fn tick(&mut self, now: Now, replies: &mut Vec<Reply>) {
        self.engine.tick(now);
        self.engine.take_replies(replies);
        let mut events = std::mem::take(&mut self.taken);
        self.engine.take_events(&mut events);
        for event in events.drain(..) {
            self.tell(event);
        }
        self.taken = events;
        let progress = self.engine.progress();
        if progress == self.shown {
            return;
        }
        self.shown = progress;
        // All of it is shown, but only what makes work for the sinks wakes them: where the log
        // begins may change long after the last record became durable.
        self.progress.send_if_modified(|shown| {
            let wakes = shown.durable != progress.durable || shown.epoch != progress.epoch;
            *shown = progress;
            wakes
        });
    }

    fn wait_for(&mut self, waiting: Waiting) -> Ticket {
        Ticket(self.waiting.insert(waiting) as u64)
    }

    fn take_waiting(&mut self, ticket: Ticket) -> Option<Waiting> {
        self.waiting.try_remove(usize::try_from(ticket.0).ok()?)
    }

    /// Commands about the engine. Who has gone away meanwhile is not told.
    pub(super) fn command(&mut self, now: Now, command: Command) {
        match command {
            Command::Append {
                record,
                durable,
                reply,
            } => {
                let ticket = self.wait_for(if durable {
                    Waiting::Durable(reply)
                } else {
                    Waiting::Appended(reply)
                });
                self.engine.append_event(now, ticket, record);
            }
            Command::RaiseEpoch { epoch, reply } => {
                let ticket = self.wait_for(Waiting::Durable(reply));
                self.engine.raise_epoch(ticket, epoch);
            }
            Command::PassRead {
                disk,
                first_block,
                block_count,
                reply,
            } => {
                let ticket = self.wait_for(Waiting::PassRead(disk, reply));
                self.engine
                    .pass_read(ticket, disk, first_block, block_count);
            }
            Command::AllocatedRanges {
                disk,
                from_block,
                ranges_max,
                reply,
            } => {
                let ticket = self.wait_for(Waiting::Allocated(disk, reply));
                self.engine
                    .allocated_ranges(ticket, disk, from_block, ranges_max);
            }
            Command::SetSinks { sinks, reply } => {
                let ticket = self.wait_for(Waiting::Stored(reply));
                self.engine.set_sinks(ticket, &sinks);
            }
            Command::SinkRecord { sink, reply } => {
                let known = self.sink(sink).map(|state| SinkRecord {
                    acked: Cursor {
                        lsn: state.acked,
                        chain: state.chain,
                    },
                    dirty: state.dirty,
                    rebase_after: state.rebase_after,
                    good_until: state.good_until,
                });
                let _ = reply.send(Ok(known.unwrap_or_default()));
            }
            Command::ReportAcked {
                sink,
                acked,
                complete,
                reply,
            } => self.report_acked(sink, acked, complete, reply),
            Command::DetachMarked => {
                self.engine.detach_marked(now);
                let _ = self.events.send(GroupEvent::Detached);
            }
            Command::DetachFailed { errno } => self.engine.detach_failed(now, errno),
            Command::Drain { reply } => {
                let ticket = self.wait_for(Waiting::Drained(reply));
                self.engine.drain(ticket);
            }
            Command::Attach(_)
            | Command::Quiesce { .. }
            | Command::Snapshot { .. }
            | Command::Remove { .. } => {
                debug_assert!(false, "handled by the thread");
            }
        }
    }

    fn sink(&self, sink: SinkId) -> Option<SinkState> {
        let sinks = self.engine.sinks();
        sinks.iter().find(|state| state.id == sink).copied()
    }

    fn report_acked(
        &mut self,
        sink: SinkId,
        acked: Cursor,
        complete: bool,
        reply: oneshot::Sender<Result<(), PortError>>,
    ) {
        let ticket = self.wait_for(Waiting::Stored(reply));
        let answer = match self.engine.report_acked(ticket, sink, acked, complete) {
            Ok(true) => return,
            Ok(false) => Ok(()),
            Err(_) => Err(PortError::UnknownSink),
        };
        if let Some(Waiting::Stored(reply)) = self.take_waiting(ticket) {
            let _ = reply.send(answer);
        }
    }

    fn tell(&mut self, event: EngineEvent) {
        match event {
            EngineEvent::Appended { ticket, lsn } => {
                let key = usize::try_from(ticket.0).unwrap_or(usize::MAX);
                if let Some(Waiting::Appended(_)) = self.waiting.get(key)
                    && let Waiting::Appended(reply) = self.waiting.remove(key)
                {
                    let _ = reply.send(Ok(lsn));
                }
            }
            EngineEvent::Durable { ticket, lsn } => {
                // Also comes for records whose owner was content with the LSN.
                let key = usize::try_from(ticket.0).unwrap_or(usize::MAX);
                if let Some(Waiting::Durable(_)) = self.waiting.get(key)
                    && let Waiting::Durable(reply) = self.waiting.remove(key)
                {
                    let _ = reply.send(Ok(lsn));
                }
            }
            EngineEvent::PassRead { ticket, result } => {
                if let Some(Waiting::PassRead(disk, reply)) = self.take_waiting(ticket) {
                    let _ = reply.send(result.map_err(|source| PortError::Read { disk, source }));
                }
            }
            EngineEvent::Allocated { ticket, result } => {
                if let Some(Waiting::Allocated(disk, reply)) = self.take_waiting(ticket) {
                    let _ = reply.send(result.map_err(|source| PortError::Read { disk, source }));
                }
            }
            EngineEvent::SinkStored { ticket } => {
                if let Some(Waiting::Stored(reply)) = self.take_waiting(ticket) {
                    let _ = reply.send(Ok(()));
                }
            }
            EngineEvent::Drained { ticket } => {
                if let Some(Waiting::Drained(reply)) = self.take_waiting(ticket) {
                    let _ = reply.send(Ok(()));
                }
            }
            EngineEvent::Failed { ticket, error } => self.failed(ticket, error),
            EngineEvent::LogFailed { errno } => {
                let error = std::io::Error::from_raw_os_error(errno);
                tracing::error!(group = %self.name, %error, "the log has failed");
                let _ = self.events.send(GroupEvent::LogFailed { errno });
            }
            EngineEvent::DetachWanted => self.mark_detached(),
            EngineEvent::BackingFailing { disk, errno } => {
                let error = std::io::Error::from_raw_os_error(errno);
                tracing::error!(group = %self.name, disk = disk.0, %error, "a backing fails");
                let _ = self.events.send(GroupEvent::BackingFailing { disk, errno });
            }
            EngineEvent::BackingRecovered => {
                tracing::info!(group = %self.name, "all backings work again");
                let _ = self.events.send(GroupEvent::BackingRecovered);
            }
            EngineEvent::HistoryGap { sink, lsn } => {
                tracing::warn!(
                    group = %self.name, sink, %lsn,
                    "records left the log before they were shipped: history has a gap, a pass is due"
                );
                if let Some(SinkState { id: sink, .. }) = self.engine.sinks().get(sink).copied() {
                    let _ = self.events.send(GroupEvent::HistoryGap { sink, lsn });
                }
            }
        }
    }

    fn failed(&mut self, ticket: Ticket, error: EngineError) {
        let port = match error {
            EngineError::LogFailed { .. } => PortError::LogFailed,
            EngineError::UnknownSink(_) => PortError::UnknownSink,
            _ => PortError::Gone,
        };
        match self.take_waiting(ticket) {
            Some(Waiting::Appended(reply) | Waiting::Durable(reply)) => {
                let _ = reply.send(Err(error));
            }
            Some(Waiting::PassRead(_, reply)) => {
                let _ = reply.send(Err(port));
            }
            Some(Waiting::Allocated(_, reply)) => {
                let _ = reply.send(Err(port));
            }
            Some(Waiting::Stored(reply)) => {
                let _ = reply.send(Err(port));
            }
            Some(Waiting::Drained(reply)) => {
                let _ = reply.send(Err(error));
            }
            None => {}
        }
    }

    /// The marker is files and syncs: not on this thread. Writes wait until it is there.
    fn mark_detached(&self) {
        let marker = DetachMarker::clone(&self.detach_marker);
        let (postbox, key, name) = (self.postbox.clone(), self.key, self.name.clone());
        let marking = std::thread::Builder::new()
            .name("detach-marker".to_owned())
            .spawn(move || {
                let command = match marker() {
                    Ok(()) => Command::DetachMarked,
                    Err(error) => marker_failed(&name, &error),
                };
                let _ = postbox.send(Message::Group(key, command));
            });
        if let Err(error) = marking {
            let command = marker_failed(&self.name, &error);
            let _ = self.postbox.send(Message::Group(self.key, command));
        }
    }
}

fn marker_failed(group: &str, error: &std::io::Error) -> Command {
    tracing::error!(%group, %error, "cannot store the markers that the guest may go on without its log; tried again");
    Command::DetachFailed {
        errno: error.raw_os_error().unwrap_or(EIO),
    }
}
