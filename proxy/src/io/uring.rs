//! One io_uring per worker thread, shared by the storages of its groups and by its sockets.
//!
//! Owns: the ring, and every buffer that is in the kernel's hands. Always holds: what an operation
//! uses (buffer, vector, file, ring memory) stays alive and unmoved until its completion was seen;
//! dropping waits for what is in flight, and leaks it rather than freeing it under the kernel.
//! Short transfers go on, EINTR and EAGAIN are tried again, a failed sync is reported at once and
//! never tried again.
#![expect(
    unsafe_code,
    reason = "pushing entries whose pointers the slots keep alive"
)]

use super::file::StorageFile;
use super::mapping::RingMapping;
use super::operation::{Kind, SendHeader, Slot, SocketBuffers, Step};
use super::{Completion, FILES_MAX, FileId, RingSpan, Token};
use io_uring::{IoUring, squeue, types};
use slab::Slab;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::mem;
use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// Entries of the submission queue, and what to fall back to where RLIMIT_MEMLOCK (to which the
/// kernel counts rings of users without privileges) leaves no room. The completion queue has four
/// times as many.
const SUBMISSION_ENTRIES: [u32; 3] = [1024, 256, 64];
/// How often, and after which pause each, memory for a ring is asked for again: what a killed
/// process of the same user had locked counts until the kernel has taken its rings apart.
const MEMORY_TRIES: u32 = 100;
const MEMORY_PAUSE: Duration = Duration::from_millis(50);
/// Lists of gathered writes kept for the next.
const GATHERS_KEPT_MAX: usize = 256;

/// Why there is no io_uring.
#[derive(Debug, thiserror::Error)]
pub enum UringError {
    /// Switched off, or filtered by seccomp.
    #[error(
        "io_uring is not permitted here ({0}): set the sysctl kernel.io_uring_disabled to 0, or \
         allow the io_uring system calls in the container's seccomp profile"
    )]
    NotPermitted(#[source] io::Error),
    /// No room within the limit.
    #[error(
        "no memory for io_uring ({0}): raise the limit of locked memory (ulimit -l, or \
         LimitMEMLOCK= in the unit), which all processes of this user share"
    )]
    Memory(#[source] io::Error),
    /// Anything else.
    #[error("cannot set up io_uring: {0}")]
    Setup(#[source] io::Error),
}

/// How [`Uring::enter`] waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Submit and take what is there.
    No,
    /// Until something completes.
    Forever,
    /// Until something completes, or for this long.
    For(Duration),
}

/// Counters since the start; for metrics and for the proof that requests share system calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UringStats {
    /// Calls of io_uring_enter.
    pub enters: u64,
    /// Operations that completed.
    pub completed: u64,
    /// Transfers that were continued or tried again.
    pub continued: u64,
}

/// The end of a socket operation.
#[derive(Debug)]
pub struct SocketCompletion {
    /// As submitted.
    pub token: Token,
    /// Bytes transferred. A receive of 0 is the end of the stream; a send is complete or failed.
    pub result: io::Result<usize>,
    /// The memory of the operation, given back.
    pub buffers: SocketBuffers,
}

/// Files, memory and completions of one user of the ring.
#[derive(Default)]
struct Client {
    files: Vec<Option<Arc<StorageFile>>>,
    memory: Option<Arc<RingMapping>>,
    ready: Vec<Completion>,
    in_flight: usize,
    closed: bool,
}

/// Memory of gathered writes that is used again.
#[derive(Default)]
struct Gathers {
    spans: Vec<Vec<RingSpan>>,
    vectors: Vec<Vec<libc::iovec>>,
}

impl Gathers {
    fn keep(&mut self, slot: &mut Slot) {
        if let Some((mut spans, mut vectors)) = slot.take_gather()
            && self.spans.len() < GATHERS_KEPT_MAX
        {
            spans.clear();
            vectors.clear();
            self.spans.push(spans);
            self.vectors.push(vectors);
        }
    }
}

struct Core {
    ring: IoUring,
    slots: Slab<Slot>,
    /// Entries not yet in the submission queue.
    backlog: VecDeque<squeue::Entry>,
    in_kernel: usize,
    /// Entries of the completion queue. More operations wait in the backlog, so it never overflows.
    in_kernel_max: usize,
    clients: Slab<Client>,
    socket_ready: Vec<SocketCompletion>,
    reaped: Vec<(u64, i32)>,
    /// Vectors and headers of sends that are over, for the next.
    send_headers: Vec<SendHeader>,
    /// Lists of gathered writes that are over, for the next.
    gathers: Gathers,
    /// Clients whose completions went from none to some since last asked.
    ready_clients: Vec<usize>,
    /// A loop calls `enter` each turn: polls need not.
    driven: bool,
    stats: UringStats,
}

/// Handle of a thread's io_uring. Not to leave the thread that made it.
#[derive(Clone)]
pub struct Uring {
    core: Rc<RefCell<Core>>,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let core = self.core.borrow();
        write!(f, "Uring({} in flight)", core.slots.len())
    }
}

impl Uring {
    /// A ring for the calling thread, with the best of what the kernel has: deferred task work
    /// (6.1), cooperative task work (5.19), or neither.
    ///
    /// # Errors
    /// Not permitted, or no memory for it within some seconds.
    pub fn new() -> Result<Self, UringError> {
        let ring = build_ring_patiently().map_err(|error| match error.raw_os_error() {
            Some(libc::EPERM | libc::ENOSYS | libc::EACCES) => UringError::NotPermitted(error),
            Some(libc::ENOMEM) => UringError::Memory(error),
            _ => UringError::Setup(error),
        })?;
        Ok(Self {
            core: Rc::new(RefCell::new(Core {
                in_kernel_max: ring.params().cq_entries() as usize,
                ring,
                slots: Slab::with_capacity(1024),
                backlog: VecDeque::new(),
                in_kernel: 0,
                clients: Slab::new(),
                socket_ready: Vec::new(),
                reaped: Vec::with_capacity(1024),
                send_headers: Vec::new(),
                gathers: Gathers::default(),
                ready_clients: Vec::new(),
                driven: false,
                stats: UringStats::default(),
            })),
        })
    }

    /// From now on a loop calls [`Uring::enter`] each turn, and polls of storages only hand out.
    pub fn set_driven(&self, driven: bool) {
        self.core.borrow_mut().driven = driven;
    }

    /// Submits everything that was queued, waits as told and distributes what has completed: one
    /// system call, or none when there is nothing to submit and no need to wait.
    ///
    /// # Errors
    /// The ring itself failed; nothing more can complete.
    pub fn enter(&self, wait: Wait) -> io::Result<usize> {
        self.core.borrow_mut().enter(wait)
    }

    /// Whether something has completed that [`Uring::enter`] would distribute; reads memory only.
    #[must_use]
    pub fn has_completions(&self) -> bool {
        let mut core = self.core.borrow_mut();
        if !core.ring.completion().is_empty() {
            return true;
        }
        core.ring.submission().taskrun()
    }

    /// Moves the numbers of storages that have had completions since the last call to the end of
    /// `clients` (see [`super::storage::UringStorage::client`]).
    pub fn take_ready(&self, clients: &mut Vec<usize>) {
        clients.append(&mut self.core.borrow_mut().ready_clients);
    }

    /// Operations that are queued or in the kernel.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.core.borrow().slots.len()
    }

    /// Counters since the start.
    #[must_use]
    pub fn stats(&self) -> UringStats {
        self.core.borrow().stats
    }

    pub(super) fn add_client(&self, memory: Option<Arc<RingMapping>>) -> usize {
        self.core.borrow_mut().clients.insert(Client {
            memory,
            ..Client::default()
        })
    }

    pub(super) fn set_file(&self, client: usize, file: FileId, opened: Option<Arc<StorageFile>>) {
        let mut core = self.core.borrow_mut();
        let files = &mut core.clients[client].files;
        let at = file.0 as usize;
        assert!(
            at < FILES_MAX,
            "{file:?} is above the {FILES_MAX} of a group"
        );
        if files.len() <= at {
            files.resize_with(at + 1, || None);
        }
        files[at] = opened;
    }

    /// Waits for a client's operations and forgets it.
    pub(super) fn remove_client(&self, client: usize) {
        let mut core = self.core.borrow_mut();
        while core.clients[client].in_flight > 0 {
            if core.enter(Wait::Forever).is_err() {
                // The kernel may still write: what the client owns stays in `clients` for good.
                core.clients[client].closed = true;
                return;
            }
        }
        core.clients.remove(client);
    }

    pub(super) fn client_in_flight(&self, client: usize) -> usize {
        self.core.borrow().clients[client].in_flight
    }

    pub(super) fn submit(&self, client: usize, token: Token, kind: Kind) {
        let mut core = self.core.borrow_mut();
        core.clients[client].in_flight += 1;
        core.start(Slot::of_client(client, token, kind));
    }

    /// Hands an error back without asking the kernel.
    pub(super) fn fail(&self, client: usize, completion: Completion) {
        self.core.borrow_mut().clients[client]
            .ready
            .push(completion);
    }

    pub(super) fn poll_client(&self, client: usize, completions: &mut Vec<Completion>) {
        let mut core = self.core.borrow_mut();
        if !core.driven && core.clients[client].ready.is_empty() {
            // A broken ring shows at the next wait.
            let _ = core.enter(Wait::No);
        }
        completions.append(&mut core.clients[client].ready);
    }

    pub(super) fn wait_client(
        &self,
        client: usize,
        completions: &mut Vec<Completion>,
    ) -> io::Result<()> {
        let mut core = self.core.borrow_mut();
        while core.clients[client].ready.is_empty() {
            if core.clients[client].in_flight == 0 {
                return Err(io::Error::other(
                    "waited for completions with nothing in flight",
                ));
            }
            core.enter(Wait::Forever)?;
        }
        completions.append(&mut core.clients[client].ready);
        Ok(())
    }

    pub(super) fn take_spans(&self) -> Vec<RingSpan> {
        let pooled = self.core.borrow_mut().gathers.spans.pop();
        pooled.unwrap_or_default()
    }

    pub(super) fn take_vectors(&self) -> Vec<libc::iovec> {
        let pooled = self.core.borrow_mut().gathers.vectors.pop();
        pooled.unwrap_or_default()
    }

    pub(super) fn take_send_header(&self) -> SendHeader {
        let pooled = self.core.borrow_mut().send_headers.pop();
        pooled.unwrap_or_default()
    }

    pub(super) fn submit_socket(&self, token: Token, kind: Kind) {
        self.core.borrow_mut().start(Slot::of_socket(token, kind));
    }

    pub(super) fn poll_sockets(&self, completions: &mut Vec<SocketCompletion>) {
        completions.append(&mut self.core.borrow_mut().socket_ready);
    }
}

fn build_ring_patiently() -> io::Result<IoUring> {
    for _ in 0..MEMORY_TRIES {
        match build_ring() {
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => thread::sleep(MEMORY_PAUSE),
            other => return other,
        }
    }
    build_ring()
}

fn build_ring() -> io::Result<IoUring> {
    let mut last = io::Error::from_raw_os_error(libc::ENOMEM);
    for entries in SUBMISSION_ENTRIES {
        match build_ring_with(entries) {
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => last = error,
            other => return other,
        }
    }
    Err(last)
}

fn build_ring_with(entries: u32) -> io::Result<IoUring> {
    let mut last = None;
    for flavour in 0..3 {
        let mut builder = IoUring::builder();
        builder.setup_clamp().setup_cqsize(entries * 4).dontfork();
        match flavour {
            0 => {
                builder
                    .setup_single_issuer()
                    .setup_defer_taskrun()
                    .setup_taskrun_flag()
                    .setup_submit_all();
            }
            1 => {
                builder
                    .setup_coop_taskrun()
                    .setup_taskrun_flag()
                    .setup_submit_all();
            }
            _ => {}
        }
        match builder.build(entries) {
            // Its descriptor is not registered with the thread: the thread would then keep the
            // ring alive, and with it files whose last operations the kernel has not let go of.
            Ok(ring) => return Ok(ring),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => last = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(last.unwrap_or_else(|| io::Error::from_raw_os_error(libc::EINVAL)))
}

impl Core {
    fn start(&mut self, slot: Slot) {
        let key = self.slots.insert(slot);
        self.queue(key);
    }

    /// Puts the next step of a slot into the backlog.
    fn queue(&mut self, key: usize) {
        let slot = &mut self.slots[key];
        let client = slot.client.map(|client| &self.clients[client]);
        let files = client.map_or(&[][..], |client| &client.files);
        let memory = client.and_then(|client| client.memory.as_deref());
        let entry = slot.entry(files, memory).user_data(key as u64);
        self.backlog.push_back(entry);
    }

    fn fill_submission_queue(&mut self) {
        if self.backlog.is_empty() {
            return;
        }
        let mut queue = self.ring.submission();
        while self.in_kernel < self.in_kernel_max && !queue.is_full() {
            let Some(entry) = self.backlog.pop_front() else {
                break;
            };
            // SAFETY: the slot named by the entry's user data owns, or its client's entry keeps,
            // every address in it until the completion.
            if unsafe { queue.push(&entry) }.is_err() {
                self.backlog.push_front(entry);
                break;
            }
            self.in_kernel += 1;
        }
    }

    fn enter(&mut self, wait: Wait) -> io::Result<usize> {
        let mut total = self.reap();
        loop {
            self.fill_submission_queue();
            let more = !self.backlog.is_empty() && self.in_kernel < self.in_kernel_max;
            let blocking = if more || total > 0 { Wait::No } else { wait };
            self.call(blocking)?;
            total += self.reap();
            if !more {
                // Continuations of what was reaped go out with the next call; a waiter comes back.
                return Ok(total);
            }
        }
    }

    fn call(&mut self, wait: Wait) -> io::Result<()> {
        let (queued, taskrun) = {
            let queue = self.ring.submission();
            (queue.len(), queue.taskrun() || queue.cq_overflow())
        };
        if wait == Wait::No && queued == 0 && !taskrun {
            return Ok(());
        }
        self.stats.enters += 1;
        let result = match wait {
            Wait::No => self.ring.submit(),
            Wait::Forever => self.ring.submit_and_wait(1),
            Wait::For(duration) => {
                let timeout = types::Timespec::from(duration);
                let arguments = types::SubmitArgs::new().timespec(&timeout);
                self.ring.submitter().submit_with_args(1, &arguments)
            }
        };
        match result {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                // Timed out, interrupted, or the kernel wants completions reaped first.
                Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY) => Ok(()),
                _ => Err(error),
            },
        }
    }

    fn reap(&mut self) -> usize {
        let mut reaped = mem::take(&mut self.reaped);
        reaped.extend(
            self.ring
                .completion()
                .map(|entry| (entry.user_data(), entry.result())),
        );
        let count = reaped.len();
        self.in_kernel -= count.min(self.in_kernel);
        for (key, result) in reaped.drain(..) {
            if let Ok(key) = usize::try_from(key)
                && self.slots.contains(key)
            {
                self.advance(key, result);
            }
        }
        self.reaped = reaped;
        count
    }

    fn advance(&mut self, key: usize, result: i32) {
        let slot = &mut self.slots[key];
        let files = slot
            .client
            .map_or(&[][..], |client| &self.clients[client].files);
        match slot.advance(result, files) {
            Step::Continue => {
                self.stats.continued += 1;
                self.queue(key);
            }
            Step::Done(result) => {
                self.stats.completed += 1;
                let mut slot = self.slots.remove(key);
                self.gathers.keep(&mut slot);
                match slot.client {
                    Some(client_key) => {
                        let client = &mut self.clients[client_key];
                        client.in_flight -= 1;
                        if client.ready.is_empty() {
                            self.ready_clients.push(client_key);
                        }
                        if !client.closed {
                            client.ready.push(slot.into_completion(result));
                        }
                    }
                    None => {
                        let (completion, header) = slot.into_socket_completion(result);
                        self.send_headers.extend(header);
                        self.socket_ready.push(completion);
                    }
                }
            }
        }
    }

    /// Cancels what can be cancelled (sockets) and waits for the rest.
    fn drain(&mut self) -> io::Result<()> {
        self.fill_submission_queue();
        self.call(Wait::No)?;
        let _ = self
            .ring
            .submitter()
            .register_sync_cancel(None, types::CancelBuilder::any());
        while self.slots.iter().any(|(_, slot)| !slot.is_socket()) || self.in_kernel > 0 {
            self.enter(Wait::For(Duration::from_millis(100)))?;
            if self.slots.iter().all(|(_, slot)| slot.is_socket()) {
                let _ = self
                    .ring
                    .submitter()
                    .register_sync_cancel(None, types::CancelBuilder::any());
                self.backlog.clear();
            }
        }
        Ok(())
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        if self.slots.is_empty() {
            return;
        }
        if let Err(error) = self.drain() {
            tracing::error!(%error, "io_uring failed while closing; its buffers are leaked");
            mem::forget(mem::take(&mut self.slots));
            mem::forget(mem::take(&mut self.clients));
        }
    }
}
