//! Messages into a worker thread: a channel, and an eventfd that wakes it only when it sleeps.

use crossbeam_channel::{Receiver, Sender};
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

#[derive(Debug)]
struct Bell {
    eventfd: Arc<OwnedFd>,
    sleeping: AtomicBool,
}

/// The senders' end.
pub(super) struct Postbox<M> {
    sender: Sender<M>,
    bell: Arc<Bell>,
}

impl<M> Clone for Postbox<M> {
    fn clone(&self) -> Self {
        Self {
            sender: self.sender.clone(),
            bell: Arc::clone(&self.bell),
        }
    }
}

impl<M> std::fmt::Debug for Postbox<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Postbox({} waiting)", self.sender.len())
    }
}

impl<M> Postbox<M> {
    /// Sends a message; gives it back if the worker has ended.
    pub(super) fn send(&self, message: M) -> Result<(), M> {
        self.sender.send(message).map_err(|refused| refused.0)?;
        // Pairs with the fence in `prepare_sleep`: either we see it asleep, or it sees the message.
        fence(Ordering::SeqCst);
        if self.bell.sleeping.swap(false, Ordering::Relaxed) {
            // Fails only when the counter is at its end, and then the worker is awake anyway.
            let _ = rustix::io::write(&self.bell.eventfd, &1u64.to_ne_bytes());
        }
        Ok(())
    }
}

/// The worker's end.
pub(super) struct Mailbox<M> {
    receiver: Receiver<M>,
    bell: Arc<Bell>,
}

impl<M> Mailbox<M> {
    /// Both ends.
    pub(super) fn new() -> io::Result<(Postbox<M>, Self)> {
        let (sender, receiver) = crossbeam_channel::unbounded();
        let bell = Arc::new(Bell {
            eventfd: Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?),
            sleeping: AtomicBool::new(false),
        });
        let postbox = Postbox {
            sender,
            bell: Arc::clone(&bell),
        };
        Ok((postbox, Self { receiver, bell }))
    }

    /// What wakes the worker.
    pub(super) fn eventfd(&self) -> &Arc<OwnedFd> {
        &self.bell.eventfd
    }

    /// The next message, if there is one.
    pub(super) fn take(&self) -> Option<M> {
        self.receiver.try_recv().ok()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.receiver.is_empty()
    }

    /// Says that the worker is about to sleep until the eventfd or something else wakes it. False:
    /// a message is there, do not sleep.
    pub(super) fn prepare_sleep(&self) -> bool {
        // Changed by exchanges alone, so that all threads agree on the order of the changes.
        self.bell.sleeping.swap(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if self.receiver.is_empty() {
            return true;
        }
        self.awake();
        false
    }

    pub(super) fn awake(&self) {
        self.bell.sleeping.swap(false, Ordering::Relaxed);
    }
}
