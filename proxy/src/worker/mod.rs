//! Worker threads: one per core, each with an io_uring that carries the storage and the sockets of
//! the groups it owns.
//!
//! [`ProxyHandle`] starts them and gives each group to one; [`GroupHandle`] is how everybody else
//! talks to a group: messages into its thread, answers out of it. Always holds: a group's engine,
//! files and connections are touched by its thread alone; no lock is taken on the data path. What a
//! command's answer says is as durable as the engine says; a command whose thread has ended gets
//! [`WorkerError::Gone`].

mod connection;
mod durations;
mod group;
mod handle;
mod mailbox;
mod message;
#[cfg(test)]
mod test_rig;
#[cfg(test)]
mod tests;
mod thread;
mod tls;

pub use durations::{DURATION_BOUNDS_NS, DURATION_OPS, DurationHistogram};
pub use handle::{GroupHandle, RecoveredGroup};
pub use message::{Attachment, DetachMarker, GroupEvent, GroupSnapshot, SinkBacklog};

use crate::engine::LogStart;
use crate::engine::request::LogProgress;
use crate::io::uring::{Uring, UringError, UringStats};
use crate::nbd::budget::PayloadBudget;
use afterimage_format::ids::Lsn;
use mailbox::{Mailbox, Postbox};
use message::{Message, NewGroup};
use std::io;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use tokio::sync::{mpsc, oneshot, watch};

/// Why a worker could not do it.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// No io_uring.
    #[error(transparent)]
    Uring(#[from] UringError),
    /// No thread, or no eventfd.
    #[error("cannot start a worker thread: {0}")]
    Start(#[source] io::Error),
    /// The thread or the group has ended.
    #[error("the group is shutting down")]
    Gone,
}

/// The worker threads of this process.
#[derive(Debug)]
pub struct ProxyHandle {
    threads: Vec<Thread>,
    next: AtomicUsize,
}

#[derive(Debug)]
struct Thread {
    postbox: Postbox<Message>,
    join: Option<JoinHandle<()>>,
}

impl ProxyHandle {
    /// Starts `threads` worker threads, one per usable core if not said, each pinned to a core of
    /// its own as long as there are enough.
    ///
    /// # Errors
    /// No io_uring, or no thread.
    pub fn start(threads: Option<usize>) -> Result<Self, WorkerError> {
        let cores = usable_cores();
        let count = threads.unwrap_or(cores.len()).max(1);
        let mut started = Vec::with_capacity(count);
        for number in 0..count {
            let core = (count <= cores.len()).then(|| cores[number]);
            started.push(start_thread(number, core)?);
        }
        Ok(Self {
            threads: started,
            next: AtomicUsize::new(0),
        })
    }

    /// Gives a recovered group to a thread, which serves it from now on.
    ///
    /// # Errors
    /// The thread has ended.
    pub async fn add_group(&self, group: RecoveredGroup) -> Result<GroupHandle, WorkerError> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let thread = &self.threads[turn % self.threads.len()];
        let (reply, added) = oneshot::channel();
        let (progress, shown) = watch::channel(starting_progress(&group.start));
        let (events, event_stream) = mpsc::unbounded_channel();
        let identity = group.identity.clone();
        let new = NewGroup {
            name: identity.name.clone(),
            parts: group.parts,
            start: group.start,
            config: group.config,
            budget: PayloadBudget::new(group.payload_budget_bytes),
            progress,
            events,
            detach_marker: group.detach_marker,
            reply,
        };
        let message = Message::Add(Box::new(new));
        thread
            .postbox
            .send(message)
            .map_err(|_| WorkerError::Gone)?;
        let key = added.await.map_err(|_| WorkerError::Gone)?;
        Ok(GroupHandle::new(
            thread.postbox.clone(),
            key,
            identity,
            shown,
            event_stream,
        ))
    }

    /// Counters of each thread's io_uring.
    pub async fn uring_stats(&self) -> Vec<UringStats> {
        let mut all = Vec::new();
        for thread in &self.threads {
            let (reply, stats) = oneshot::channel();
            let sent = thread.postbox.send(Message::Stats(reply));
            if sent.is_ok()
                && let Ok(stats) = stats.await
            {
                all.push(stats);
            }
        }
        all
    }

    /// Ends all threads. Groups that were not drained stop as they are: what was answered is in
    /// their rings and logs. Blocks until what is in flight has landed.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        for thread in &self.threads {
            // Refused: it has ended already.
            let _ = thread.postbox.send(Message::End);
        }
        for thread in &mut self.threads {
            if let Some(join) = thread.join.take()
                && join.join().is_err()
            {
                tracing::error!("a worker thread panicked");
            }
        }
    }
}

impl Drop for ProxyHandle {
    fn drop(&mut self) {
        self.end();
    }
}

/// Cores this process may run on.
fn usable_cores() -> Vec<usize> {
    let cores: Vec<usize> = rustix::thread::sched_getaffinity(None)
        .map(|set| {
            (0..rustix::thread::CpuSet::MAX_CPU)
                .filter(|core| set.is_set(*core))
                .collect()
        })
        .unwrap_or_default();
    if cores.is_empty() { vec![0] } else { cores }
}

fn pin_to(core: usize) {
    let mut set = rustix::thread::CpuSet::new();
    set.set(core);
    if let Err(error) = rustix::thread::sched_setaffinity(None, &set) {
        tracing::debug!(core, %error, "a worker thread is not pinned");
    }
}

fn start_thread(number: usize, core: Option<usize>) -> Result<Thread, WorkerError> {
    let (postbox, mailbox) = Mailbox::new().map_err(WorkerError::Start)?;
    let (ready, started) = std::sync::mpsc::channel();
    let own = postbox.clone();
    let join = std::thread::Builder::new()
        .name(format!("worker-{number}"))
        .spawn(move || {
            if let Some(core) = core {
                pin_to(core);
            }
            // The ring belongs to the thread that makes it.
            let uring = match Uring::new() {
                Ok(uring) => uring,
                Err(error) => {
                    let _ = ready.send(Err(error));
                    return;
                }
            };
            let _ = ready.send(Ok(()));
            drop(ready);
            if let Err(error) = thread::Worker::new(uring, mailbox, own).run() {
                // The ring file keeps what was answered; a restart recovers it.
                tracing::error!(%error, "io_uring failed: the groups of this thread stop");
            }
        })
        .map_err(WorkerError::Start)?;
    match started.recv() {
        Ok(Ok(())) => Ok(Thread {
            postbox,
            join: Some(join),
        }),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(WorkerError::Start(io::Error::other("it ended at once"))),
    }
}

/// What recovery left: everything that is in the log is durable.
fn starting_progress(start: &LogStart) -> LogProgress {
    let last = Lsn(start.next_lsn.0.saturating_sub(1));
    LogProgress {
        durable: last,
        appended: last,
        oldest: start
            .frames
            .first()
            .map_or(start.next_lsn, |frame| frame.first_lsn),
        epoch: start.superblock.epoch,
        ..LogProgress::default()
    }
}
