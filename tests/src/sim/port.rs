//! The group as its shipping task sees it: commands to the life that runs, answers back.
//!
//! The same few steps as the product's worker thread, which has sockets and an io_uring besides.

use super::host::{Life, WorldFile, WorldRing, disk_id, group};
use afterimage_format::ids::{DiskIndex, Epoch, LogId, Lsn};
use afterimage_format::manifest::DiskEntry;
use afterimage_format::segment::SinkId;
use afterimage_format::wire::Cursor;
use afterimage_proxy::engine::request::{Allocated, LogProgress, Now, PassRead};
use afterimage_proxy::engine::{EngineEvent, EventRecord, Ticket};
use afterimage_proxy::ship::BoxFuture;
use afterimage_proxy::ship::log_source::FollowedLog;
use afterimage_proxy::ship::port::{GroupIdentity, GroupPort, PortError, SinkRecord};
use afterimage_proxy::ship::source::{Batch, RecordSource, SourceError};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{oneshot, watch};

enum Command {
    SinkRecord(SinkId, oneshot::Sender<Result<SinkRecord, PortError>>),
    Report(SinkId, Cursor, bool, oneshot::Sender<Result<(), PortError>>),
    Epoch(Epoch, oneshot::Sender<Result<(), PortError>>),
    Append(EventRecord, oneshot::Sender<Result<Lsn, PortError>>),
    PassRead(
        DiskIndex,
        u64,
        u32,
        oneshot::Sender<Result<PassRead, PortError>>,
    ),
    Allocated(
        DiskIndex,
        u64,
        usize,
        oneshot::Sender<Result<Allocated, PortError>>,
    ),
}

enum Waiting {
    Stored(oneshot::Sender<Result<(), PortError>>),
    Epoch(oneshot::Sender<Result<(), PortError>>),
    Appended(oneshot::Sender<Result<Lsn, PortError>>),
    PassRead(DiskIndex, oneshot::Sender<Result<PassRead, PortError>>),
    Allocated(DiskIndex, oneshot::Sender<Result<Allocated, PortError>>),
}

/// What the shipping task holds.
pub struct Port {
    commands: Arc<Mutex<Option<Vec<Command>>>>,
    progress: watch::Receiver<LogProgress>,
    identity: GroupIdentity,
}

/// What the life's driver holds. Dropping it ends the group for the task.
pub struct Desk {
    commands: Arc<Mutex<Option<Vec<Command>>>>,
    progress: watch::Sender<LogProgress>,
    waiting: BTreeMap<u64, Waiting>,
    next: u64,
}

/// Tickets of the desk begin here; those below are the driver's.
pub const TICKETS: u64 = 1 << 32;

/// Both ends for a life.
#[must_use]
pub fn connect(life: &Life, sizes: &[u64]) -> (Desk, Port) {
    let commands = Arc::new(Mutex::new(Some(Vec::new())));
    let (progress, seen) = watch::channel(life.engine.progress());
    let entry = |(index, size): (usize, &u64)| DiskEntry {
        disk: disk_id(index),
        name: format!("disk{index}"),
        size_bytes: *size,
    };
    let port = Port {
        commands: commands.clone(),
        progress: seen,
        identity: identity(life.log, sizes.iter().enumerate().map(entry).collect()),
    };
    let desk = Desk {
        commands,
        progress,
        waiting: BTreeMap::new(),
        next: TICKETS,
    };
    (desk, port)
}

fn identity(log: LogId, disks: Vec<DiskEntry>) -> GroupIdentity {
    GroupIdentity {
        group: group(),
        name: "vm1".to_owned(),
        log,
        disks,
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        *self.commands.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Desk {
    /// Gives the engine what was asked since.
    pub fn serve(&mut self, life: &mut Life, now: Now) {
        let taken = {
            let mut commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
            commands.as_mut().map(std::mem::take).unwrap_or_default()
        };
        for command in taken {
            self.command(life, now, command);
        }
    }

    fn wait(&mut self, waiting: Waiting) -> Ticket {
        self.next += 1;
        self.waiting.insert(self.next, waiting);
        Ticket(self.next)
    }

    fn command(&mut self, life: &mut Life, now: Now, command: Command) {
        let engine = &mut life.engine;
        match command {
            Command::SinkRecord(sink, reply) => {
                let known = engine.sinks().iter().find(|state| state.id == sink);
                let record = known.map_or_else(SinkRecord::default, |state| SinkRecord {
                    acked: Cursor {
                        lsn: state.acked,
                        chain: state.chain,
                    },
                    dirty: state.dirty,
                    rebase_after: state.rebase_after,
                    good_until: state.good_until,
                });
                let _ = reply.send(Ok(record));
            }
            Command::Report(sink, acked, complete, reply) => {
                let ticket = self.wait(Waiting::Stored(reply));
                let answer = match engine.report_acked(ticket, sink, acked, complete) {
                    Ok(true) => return,
                    Ok(false) => Ok(()),
                    Err(_) => Err(PortError::UnknownSink),
                };
                if let Some(Waiting::Stored(reply)) = self.waiting.remove(&ticket.0) {
                    let _ = reply.send(answer);
                }
            }
            Command::Epoch(epoch, reply) => {
                let ticket = self.wait(Waiting::Epoch(reply));
                engine.raise_epoch(ticket, epoch);
            }
            Command::Append(event, reply) => {
                let ticket = self.wait(Waiting::Appended(reply));
                engine.append_event(now, ticket, event);
            }
            Command::PassRead(disk, first, count, reply) => {
                let ticket = self.wait(Waiting::PassRead(disk, reply));
                engine.pass_read(ticket, disk, first, count);
            }
            Command::Allocated(disk, from, max, reply) => {
                let ticket = self.wait(Waiting::Allocated(disk, reply));
                engine.allocated_ranges(ticket, disk, from, max);
            }
        }
    }

    /// Tells who waits. Events with other tickets are the driver's own.
    pub fn tell(&mut self, event: EngineEvent) {
        match event {
            EngineEvent::Appended { ticket, lsn } => {
                if let Some(Waiting::Appended(_)) = self.waiting.get(&ticket.0)
                    && let Some(Waiting::Appended(reply)) = self.waiting.remove(&ticket.0)
                {
                    let _ = reply.send(Ok(lsn));
                }
            }
            EngineEvent::Durable { ticket, .. } => {
                if let Some(Waiting::Epoch(_)) = self.waiting.get(&ticket.0)
                    && let Some(Waiting::Epoch(reply)) = self.waiting.remove(&ticket.0)
                {
                    let _ = reply.send(Ok(()));
                }
            }
            EngineEvent::PassRead { ticket, result } => {
                if let Some(Waiting::PassRead(disk, reply)) = self.waiting.remove(&ticket.0) {
                    let _ = reply.send(result.map_err(|source| PortError::Read { disk, source }));
                }
            }
            EngineEvent::Allocated { ticket, result } => {
                if let Some(Waiting::Allocated(disk, reply)) = self.waiting.remove(&ticket.0) {
                    let _ = reply.send(result.map_err(|source| PortError::Read { disk, source }));
                }
            }
            EngineEvent::SinkStored { ticket } => {
                if let Some(Waiting::Stored(reply)) = self.waiting.remove(&ticket.0) {
                    let _ = reply.send(Ok(()));
                }
            }
            EngineEvent::Failed { ticket, .. } => match self.waiting.remove(&ticket.0) {
                Some(Waiting::Stored(reply) | Waiting::Epoch(reply)) => {
                    let _ = reply.send(Err(PortError::LogFailed));
                }
                Some(Waiting::Appended(reply)) => {
                    let _ = reply.send(Err(PortError::LogFailed));
                }
                Some(Waiting::PassRead(_, reply)) => {
                    let _ = reply.send(Err(PortError::LogFailed));
                }
                Some(Waiting::Allocated(_, reply)) => {
                    let _ = reply.send(Err(PortError::LogFailed));
                }
                None => {}
            },
            _ => {}
        }
    }

    /// Publishes how far the log is.
    pub fn publish(&mut self, progress: LogProgress) {
        // As the product does: all of it is shown, not all of it wakes.
        self.progress.send_if_modified(|shown| {
            let wakes = shown.durable != progress.durable || shown.epoch != progress.epoch;
            *shown = progress;
            wakes
        });
    }
}

impl Port {
    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, PortError>>) -> Command,
    ) -> Result<T, PortError> {
        let (reply, answer) = oneshot::channel();
        match &mut *self.commands.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(commands) => commands.push(command(reply)),
            None => return Err(PortError::Gone),
        }
        answer.await.unwrap_or(Err(PortError::Gone))
    }
}

impl GroupPort for Port {
    fn identity(&self) -> GroupIdentity {
        self.identity.clone()
    }

    fn progress(&self) -> watch::Receiver<LogProgress> {
        self.progress.clone()
    }

    fn sink_record(&self, sink: SinkId) -> BoxFuture<'_, Result<SinkRecord, PortError>> {
        Box::pin(self.ask(move |reply| Command::SinkRecord(sink, reply)))
    }

    fn report_acked(
        &self,
        sink: SinkId,
        acked: Cursor,
        complete: bool,
    ) -> BoxFuture<'_, Result<(), PortError>> {
        Box::pin(self.ask(move |reply| Command::Report(sink, acked, complete, reply)))
    }

    fn set_epoch(&self, epoch: Epoch) -> BoxFuture<'_, Result<(), PortError>> {
        Box::pin(self.ask(move |reply| Command::Epoch(epoch, reply)))
    }

    fn append(&self, event: EventRecord) -> BoxFuture<'_, Result<Lsn, PortError>> {
        Box::pin(self.ask(move |reply| Command::Append(event, reply)))
    }

    fn pass_read(
        &self,
        disk: DiskIndex,
        first_block: u64,
        block_count: u32,
    ) -> BoxFuture<'_, Result<PassRead, PortError>> {
        Box::pin(self.ask(move |reply| Command::PassRead(disk, first_block, block_count, reply)))
    }

    fn allocated_ranges(
        &self,
        disk: DiskIndex,
        from_block: u64,
        ranges_max: usize,
    ) -> BoxFuture<'_, Result<Allocated, PortError>> {
        Box::pin(self.ask(move |reply| Command::Allocated(disk, from_block, ranges_max, reply)))
    }
}

/// The log as the shipping task reads it, beside the engine.
pub struct Source {
    log: Option<FollowedLog<WorldFile>>,
    next: u64,
    through_ring: bool,
}

impl Source {
    /// As in the product frames are taken out of the ring while they are there; without `through_ring`
    /// all are read from the log.
    #[must_use]
    pub const fn new(through_ring: bool) -> Self {
        Self {
            log: None,
            next: 0,
            through_ring,
        }
    }

    fn read_on(&mut self, durable: Lsn) -> Result<Batch, SourceError> {
        if self.next > durable.0 {
            return Ok(Batch::default());
        }
        // As the product's source does: after an error the log is opened anew.
        let mut log = match self.log.take() {
            Some(log) => log,
            None => {
                let mut log = FollowedLog::open(WorldFile("log"))?;
                if self.through_ring {
                    log.follow_ring(Box::new(WorldRing));
                }
                log
            }
        };
        let batch = log.read(Lsn(self.next), durable)?;
        self.log = Some(log);
        if let Some(last) = batch.records.last() {
            self.next = last.meta.lsn.0 + 1;
        }
        Ok(batch)
    }
}

impl RecordSource for Source {
    fn seek(&mut self, next: Lsn) -> BoxFuture<'_, Result<(), SourceError>> {
        self.next = next.0;
        Box::pin(std::future::ready(Ok(())))
    }

    fn read(&mut self, durable: Lsn) -> BoxFuture<'_, Result<Batch, SourceError>> {
        Box::pin(std::future::ready(self.read_on(durable)))
    }
}
