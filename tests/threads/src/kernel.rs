//! What the mailbox stands on: a channel that promises no more than crossbeam's does (what was sent
//! happens before it is received; a look at its length may be old), and an eventfd.

use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::sync::{Arc, Condvar, Mutex};
use std::collections::VecDeque;
use std::io;

struct Channel<M> {
    queue: Mutex<VecDeque<M>>,
    /// Beside the queue, so that looking at it does not order anything as taking the lock would.
    len: AtomicUsize,
}

pub(crate) struct Sender<M>(Arc<Channel<M>>);
pub(crate) struct Receiver<M>(Arc<Channel<M>>);
pub(crate) struct Refused<M>(pub(crate) M);

pub(crate) fn unbounded<M>() -> (Sender<M>, Receiver<M>) {
    let channel = Arc::new(Channel {
        queue: Mutex::new(VecDeque::new()),
        len: AtomicUsize::new(0),
    });
    (Sender(Arc::clone(&channel)), Receiver(channel))
}

impl<M> Clone for Sender<M> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<M> Sender<M> {
    pub(crate) fn send(&self, message: M) -> Result<(), Refused<M>> {
        self.0
            .queue
            .lock()
            .expect("never poisoned")
            .push_back(message);
        self.0.len.fetch_add(1, Ordering::Release);
        Ok(())
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len.load(Ordering::Acquire)
    }
}

impl<M> Receiver<M> {
    pub(crate) fn try_recv(&self) -> Result<M, ()> {
        if self.is_empty() {
            return Err(());
        }
        let message = self.0.queue.lock().expect("never poisoned").pop_front();
        self.0.len.fetch_sub(1, Ordering::AcqRel);
        message.ok_or(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.len.load(Ordering::Acquire) == 0
    }
}

pub(crate) struct EventfdFlags;

impl EventfdFlags {
    pub(crate) const CLOEXEC: Self = Self;
}

/// An eventfd: a write is remembered until somebody waits.
#[derive(Debug)]
pub(crate) struct OwnedFd {
    count: Mutex<u64>,
    raised: Condvar,
}

impl OwnedFd {
    pub(crate) fn wait(&self) {
        let mut count = self.count.lock().expect("never poisoned");
        while *count == 0 {
            count = self.raised.wait(count).expect("never poisoned");
        }
        *count = 0;
    }
}

pub(crate) fn eventfd(_: u32, _: EventfdFlags) -> io::Result<OwnedFd> {
    Ok(OwnedFd {
        count: Mutex::new(0),
        raised: Condvar::new(),
    })
}

pub(crate) fn write(eventfd: &OwnedFd, bytes: &[u8]) -> io::Result<usize> {
    *eventfd.count.lock().expect("never poisoned") += 1;
    eventfd.raised.notify_one();
    Ok(bytes.len())
}
