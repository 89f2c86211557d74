//! One NBD connection in transmission on a worker thread: socket, session, buffers.
//!
//! Always holds: at most one receive and one send are in the kernel; what the session has not
//! consumed lies in `input[start..end]`; the connection is removed only when nothing is in the
//! kernel and no request is in flight, so an answer always finds its session.

use super::message::Attachment;
use super::tls::TlsLayer;
use crate::engine::request::{Reply, Request, RequestId};
use crate::io::Token;
use crate::io::buffer::AlignedBuffer;
use crate::io::socket::{PIECES_MAX, Piece, Sockets};
use crate::nbd::listener::ConnectionSlot;
use crate::nbd::patience::{CutOff, Owed, Patience};
use crate::nbd::session::{Event, INLINE_PAYLOAD_DEFAULT, Session};
use afterimage_format::ids::DiskIndex;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

/// Bytes received at once; holds any payload that the session wants in one piece.
const INPUT_BYTES: usize = INLINE_PAYLOAD_DEFAULT + 4096;
/// Bytes given to one send, about.
const SEND_BYTES: usize = 1 << 20;
/// A receive with less room than this first moves what is left to the front.
const ROOM_MIN: usize = 64 << 10;

/// What the input side waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Input {
    /// More bytes: the unconsumed ones and what follows in one piece of this length.
    Bytes(usize),
    /// The session takes nothing at present.
    Room,
    /// Nothing more comes in.
    Ended,
}

pub(super) struct Connection {
    pub(super) group: usize,
    pub(super) disk: DiskIndex,
    pub(super) peer: String,
    _slot: ConnectionSlot,
    socket: Rc<OwnedFd>,
    session: Session,
    tls: Option<Box<TlsLayer>>,
    input: Option<AlignedBuffer>,
    start: usize,
    end: usize,
    waits_for: Input,
    receiving: bool,
    sending: bool,
    dead: bool,
    tls_closed: bool,
    patience: Patience,
    chunks: Vec<Piece>,
}

impl Connection {
    pub(super) fn new(group: usize, attachment: Attachment, session: Session) -> io::Result<Self> {
        let Attachment {
            disk,
            socket,
            tls,
            peer,
            slot,
            ..
        } = attachment;
        prepare_socket(&socket)?;
        Ok(Self {
            group,
            disk,
            peer,
            _slot: slot,
            socket: Rc::new(socket),
            session,
            tls: tls.map(|connection| Box::new(TlsLayer::new(connection))),
            input: Some(AlignedBuffer::new(INPUT_BYTES)),
            start: 0,
            end: 0,
            waits_for: Input::Room,
            receiving: false,
            sending: false,
            dead: false,
            tls_closed: false,
            patience: Patience::default(),
            chunks: Vec::new(),
        })
    }

    /// A receive has ended.
    pub(super) fn received(&mut self, result: io::Result<usize>, buffer: AlignedBuffer) {
        self.receiving = false;
        let bytes = match &result {
            Ok(bytes) => *bytes,
            Err(_) => 0,
        };
        self.patience.moved(bytes);
        match &mut self.tls {
            Some(tls) => tls.received(buffer, bytes),
            None => {
                self.input = Some(buffer);
                self.end += bytes;
            }
        }
        match result {
            Ok(0) => self.end_input(),
            Ok(_) => self.waits_for = Input::Room,
            Err(error) => self.fail(&error),
        }
    }

    fn end_input(&mut self) {
        self.waits_for = Input::Ended;
        self.session.close_input();
    }

    /// The connection is of no more use. What is in flight in the engine goes on.
    fn fail(&mut self, error: &io::Error) {
        if !self.dead {
            tracing::debug!(peer = %self.peer, %error, "NBD connection failed");
            self.kill();
        }
    }

    /// Ends the connection without waiting for the peer. Gives no buffers back: they are dropped.
    pub(super) fn kill(&mut self) {
        if self.dead {
            return;
        }
        self.dead = true;
        self.waits_for = Input::Ended;
        self.session.abandon();
        // Ends a receive or send in the kernel.
        let _ = rustix::net::shutdown(&*self.socket, rustix::net::Shutdown::Both);
    }

    /// Whether the session could go on with what is here.
    pub(super) fn can_advance(&self) -> bool {
        !self.dead && !self.receiving && self.waits_for == Input::Room
    }

    /// Takes requests out of the input until it is used up or the session wants no more. True if
    /// any was submitted.
    pub(super) fn advance(
        &mut self,
        mut submit: impl FnMut(RequestId, Request<'_>) -> bool,
    ) -> bool {
        let mut submitted = false;
        while self.can_advance() {
            if let Err(error) = self.decrypt() {
                self.fail(&error);
                return submitted;
            }
            let Some(input) = self.input.as_ref() else {
                return submitted;
            };
            let mut room = true;
            let before = self.end - self.start;
            let event = loop {
                let step = self.session.step(&input[self.start..self.end]);
                self.start += step.consumed;
                match step.event {
                    Event::Request { id, request } => {
                        submitted = true;
                        room = submit(id, request);
                        if !room {
                            // Frees a payload that the session has collected.
                            break None;
                        }
                    }
                    Event::NeedInput { contiguous } => break Some(Input::Bytes(contiguous)),
                    Event::Blocked(_) => break Some(Input::Room),
                    Event::Disconnect => break Some(Input::Ended),
                    Event::Broken(error) => {
                        tracing::info!(peer = %self.peer, %error, "closing an NBD connection");
                        self.kill();
                        return submitted;
                    }
                }
            };
            match event {
                Some(Input::Ended) => self.end_input(),
                Some(Input::Bytes(contiguous)) => {
                    self.waits_for = Input::Bytes(contiguous);
                    let consumed = before > self.end - self.start;
                    if self.tls.is_some() && self.more_plaintext(contiguous, consumed) {
                        self.waits_for = Input::Room;
                    }
                }
                Some(Input::Room) | None => {
                    self.waits_for = Input::Room;
                    return submitted || !room;
                }
            }
        }
        submitted
    }

    /// Brings decrypted bytes into the input, as far as there is room.
    fn decrypt(&mut self) -> io::Result<()> {
        let (Some(tls), Some(input)) = (&mut self.tls, &mut self.input) else {
            return Ok(());
        };
        compact(input, &mut self.start, &mut self.end, ROOM_MIN);
        let plaintext = tls.read(&mut input[self.end..])?;
        self.end += plaintext.bytes;
        if plaintext.ended && plaintext.bytes == 0 && self.start == self.end {
            self.end_input();
        }
        Ok(())
    }

    /// Whether another [`Connection::decrypt`] brings something the session can use.
    fn more_plaintext(&mut self, contiguous: usize, consumed: bool) -> bool {
        let (Some(tls), Some(input)) = (&mut self.tls, &mut self.input) else {
            return false;
        };
        compact(input, &mut self.start, &mut self.end, contiguous);
        let before = self.end;
        match tls.read(&mut input[self.end..]) {
            Ok(plaintext) => {
                self.end += plaintext.bytes;
                if plaintext.ended && self.end == before && !consumed {
                    self.end_input();
                    return false;
                }
                self.end > before
            }
            Err(error) => {
                self.fail(&error);
                false
            }
        }
    }

    /// Takes an answer; gives its buffer back if it is not going to be sent.
    pub(super) fn complete(&mut self, reply: Reply) -> Option<AlignedBuffer> {
        self.session.complete(reply)
    }

    /// Queues the next send and the next receive, where there is something to send or room to
    /// receive into.
    pub(super) fn arm(
        &mut self,
        sockets: &Sockets,
        receive: Token,
        send: Token,
        recycle: &mut impl FnMut(AlignedBuffer),
    ) {
        if self.dead {
            return;
        }
        if !self.sending
            && let Err(error) = self.arm_send(sockets, send, recycle)
        {
            self.fail(&error);
            return;
        }
        if let Input::Bytes(contiguous) = self.waits_for
            && !self.receiving
        {
            let buffer = match &mut self.tls {
                Some(tls) => tls.take_buffer(),
                None => self.input.take().map(|mut input| {
                    compact(&mut input, &mut self.start, &mut self.end, contiguous);
                    (input, self.end)
                }),
            };
            if let Some((buffer, start)) = buffer {
                self.receiving = true;
                sockets.receive(receive, &self.socket, buffer, start);
            }
        }
    }

    fn arm_send(
        &mut self,
        sockets: &Sockets,
        token: Token,
        recycle: &mut impl FnMut(AlignedBuffer),
    ) -> io::Result<()> {
        let mut pieces = std::mem::take(&mut self.chunks);
        self.session
            .take_output(&mut pieces, PIECES_MAX, SEND_BYTES);
        if let Some(tls) = &mut self.tls {
            for piece in pieces.drain(..) {
                tls.write(&piece)?;
                if let Some(buffer) = self.session.sent(piece) {
                    recycle(buffer);
                }
            }
            if self.session.is_finished() && !self.tls_closed {
                self.tls_closed = true;
                tls.close();
            }
            if tls.has_output() {
                pieces.push(tls.take_output()?);
            }
        }
        if pieces.is_empty() {
            self.chunks = pieces;
        } else {
            self.sending = true;
            sockets.send(token, &self.socket, pieces);
        }
        Ok(())
    }

    /// A send has ended.
    pub(super) fn sent(
        &mut self,
        result: io::Result<usize>,
        mut pieces: Vec<Piece>,
        recycle: &mut impl FnMut(AlignedBuffer),
    ) {
        self.sending = false;
        for piece in pieces.drain(..) {
            match &mut self.tls {
                Some(tls) => tls.recycle(piece),
                None => {
                    if let Some(buffer) = self.session.sent(piece) {
                        recycle(buffer);
                    }
                }
            }
        }
        self.chunks = pieces;
        match result {
            Ok(bytes) => self.patience.moved(bytes),
            Err(error) => self.fail(&error),
        }
    }

    /// Nothing of it is left anywhere: remove it. `unanswered`: its group ends, so requests in
    /// flight will not be answered any more.
    pub(super) fn is_over(&self, unanswered: bool) -> bool {
        if self.receiving || self.sending {
            return false;
        }
        if self.session.in_flight() > 0 {
            return unanswered && self.dead;
        }
        let flushed = self.tls.as_ref().is_none_or(|tls| !tls.has_output());
        self.dead || (self.session.is_finished() && flushed)
    }

    /// Whether the client keeps us, or those who wait for memory, waiting for too long; else when to
    /// look again, if it owes anything.
    pub(super) fn look(&mut self, now_ns: u64, wanted: bool) -> Result<Option<u64>, CutOff> {
        if self.dead {
            return Ok(None);
        }
        let payload = self.session.awaited_payload().filter(|_| self.receiving);
        let its_turn = payload.is_some() || self.sending;
        let owed = Owed {
            payload,
            memory: its_turn && self.session.holds_budget(),
        };
        self.patience.look(now_ns, owed, wanted)
    }

    /// The peer has closed, or the connection is broken: nobody will send requests on it beyond
    /// those that are here already.
    pub(super) fn peer_is_gone(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        if self.dead || self.waits_for == Input::Ended {
            return true;
        }
        let mut polled = [PollFd::new(&*self.socket, PollFlags::RDHUP)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        poll(&mut polled, Some(&now)).is_ok() && polled[0].revents().intersects(gone)
    }
}

/// Moves the unconsumed bytes to the front when what is to come needs the room.
fn compact(input: &mut AlignedBuffer, start: &mut usize, end: &mut usize, contiguous: usize) {
    if *start == *end {
        (*start, *end) = (0, 0);
    } else if *start > 0 && (*start + contiguous > input.len() || input.len() - *end < ROOM_MIN) {
        input.copy_within(*start..*end, 0);
        *end -= *start;
        *start = 0;
    }
}

/// Blocking mode (io_uring answers EAGAIN at once otherwise), buffers, no Nagle.
fn prepare_socket(socket: &OwnedFd) -> io::Result<()> {
    use rustix::net::{AddressFamily, sockopt};
    let flags = rustix::fs::fcntl_getfl(socket)?;
    rustix::fs::fcntl_setfl(socket, flags - rustix::fs::OFlags::NONBLOCK)?;
    // The system may give less; any size works.
    let _ = sockopt::set_socket_send_buffer_size(socket, 256 << 10);
    let family = sockopt::socket_domain(socket)?;
    if family == AddressFamily::INET || family == AddressFamily::INET6 {
        sockopt::set_tcp_nodelay(socket, true)?;
        // A host that vanished is noticed within two minutes.
        sockopt::set_socket_keepalive(socket, true)?;
        sockopt::set_tcp_keepidle(socket, Duration::from_secs(30))?;
        sockopt::set_tcp_keepintvl(socket, Duration::from_secs(15))?;
        sockopt::set_tcp_keepcnt(socket, 5)?;
    }
    Ok(())
}
