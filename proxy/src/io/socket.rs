//! Receives, sends and wake-ups on the thread's io_uring, beside its storage operations.
//!
//! Always holds: a buffer given to an operation comes back with its completion, whatever came of
//! it; a socket stays open until its last operation is over. A send is whole or failed.

use super::Token;
use super::buffer::AlignedBuffer;
pub use super::operation::{Piece, SocketBuffers};
pub use super::uring::SocketCompletion;

use super::operation::Kind;
use super::uring::Uring;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

/// Most pieces in one send (the system's limit, UIO_MAXIOV).
pub const PIECES_MAX: usize = 1024;

/// The socket side of a thread's io_uring. One user per thread: completions are not sorted by
/// user.
#[derive(Clone, Debug)]
pub struct Sockets {
    uring: Uring,
}

impl Sockets {
    /// On this thread's ring.
    #[must_use]
    pub fn new(uring: &Uring) -> Self {
        Self {
            uring: uring.clone(),
        }
    }

    /// Receives what is there into the buffer from `start` to its length. 0 bytes: the peer sends
    /// no more.
    pub fn receive(&self, token: Token, socket: &Rc<OwnedFd>, buffer: AlignedBuffer, start: usize) {
        assert!(start < buffer.len(), "no room to receive into");
        let kind = Kind::Receive {
            socket: Rc::clone(socket),
            buffer,
            start,
        };
        self.uring.submit_socket(token, kind);
    }

    /// Sends all pieces in order, at most [`PIECES_MAX`]. One send per socket at a time, or their
    /// bytes may mix.
    pub fn send(&self, token: Token, socket: &Rc<OwnedFd>, pieces: Vec<Piece>) {
        assert!(pieces.len() <= PIECES_MAX, "{} pieces", pieces.len());
        let kind = Kind::Send {
            socket: Rc::clone(socket),
            total: pieces.iter().map(|piece| piece.len()).sum(),
            pieces,
            header: self.uring.take_send_header(),
        };
        self.uring.submit_socket(token, kind);
    }

    /// Completes when somebody adds to the eventfd's counter, and resets it.
    pub fn wait_event(&self, token: Token, eventfd: &Arc<OwnedFd>) {
        let kind = Kind::Event {
            eventfd: Arc::clone(eventfd),
            counter: Box::new(0),
        };
        self.uring.submit_socket(token, kind);
    }

    /// Hands out what [`Uring::enter`] has distributed.
    pub fn poll(&self, completions: &mut Vec<SocketCompletion>) {
        self.uring.poll_sockets(completions);
    }
}
