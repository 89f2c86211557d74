//! One connection in the transmission phase, without I/O: bytes in, requests out; replies in,
//! bytes out.
//!
//! Owns: where the incoming stream stands, what is in flight, what waits to be sent. The caller
//! owns the socket, the receive buffer and the clock. A turn of the caller:
//!
//! 1. receive into a buffer of at least [`SessionConfig::inline_payload_max`] bytes;
//! 2. call [`Session::step`] on what is unconsumed until it says [`Event::NeedInput`],
//!    [`Event::Blocked`], [`Event::Disconnect`] or [`Event::Broken`], submitting each request;
//! 3. hand each reply to [`Session::complete`];
//! 4. move bytes to the socket: [`Session::take_output`], then [`Session::sent`] for each chunk.
//!
//! Always holds: a request is yielded only with its whole payload, so a WRITE cut by a close
//! changes nothing; a bad request is answered and its payload skipped, so the stream stays in
//! step; a connection has at most [`REQUESTS_MAX`] requests and [`REPLY_BYTES_MAX`] bytes of
//! replies in flight (one larger reply when alone): beyond that nothing more is taken from it. What
//! it has in flight beyond [`REPLY_BYTES_FREE`], and large payloads, come out of a budget that it
//! shares with others.
//!
//! At the end (DISC, or [`Session::close_input`] at end of file) requests in flight finish and are
//! answered; the caller closes the socket when [`Session::is_finished`]. After an error of the
//! socket it calls [`Session::abandon`], keeps handing in replies until nothing is in flight, and
//! drops the session.

mod check;
mod output;
mod replies;
#[cfg(test)]
mod tests;

pub use output::OutChunk;

use super::budget::{PayloadBudget, Waiting};
use crate::engine::request::{Request, RequestId};
use crate::io::buffer::AlignedBuffer;
use afterimage_format::nbd::constants::cmd_flag;
use afterimage_format::nbd::reply::{Answered, ReplyForm, push_done, push_error};
use afterimage_format::nbd::request::{RequestError as HeaderError, RequestHeader};
use check::{Checked, Refusal};
use output::Output;
use slab::Slab;

/// Largest payload of a READ or WRITE that is accepted.
pub const PAYLOAD_BYTES_MAX: u32 = 64 << 20;
/// A payload up to this size is asked for in one piece, unless configured.
pub const INLINE_PAYLOAD_DEFAULT: usize = 256 << 10;
/// Larger payloads are collected in memory that grows by this much.
const COLLECT_CHUNK: usize = 256 << 10;
/// Most requests of one connection that are in flight.
pub const REQUESTS_MAX: usize = 1024;
/// Most bytes of replies of one connection that are promised or unsent; a single larger one is
/// let through when it is alone.
pub const REPLY_BYTES_MAX: usize = 16 << 20;
/// Bytes of replies that a connection may have promised or unsent without asking the budget.
pub const REPLY_BYTES_FREE: usize = 256 << 10;
/// Most extents in one answer to BLOCK_STATUS.
pub const EXTENTS_MAX: u32 = 1024;
/// Of a connection's refused requests so many are in the log with their cause; then those whose
/// number is a power of two.
const REFUSALS_TOLD: u64 = 8;
/// What a reply without data is counted as until it is sent.
const REPLY_HEAD_BYTES: usize = 64;

/// What a metadata context tells about a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContextKind {
    /// `base:allocation`.
    Allocation,
    /// `afterimage:dirty`: bit 0 is set where the range may differ from what every replica has
    /// (for an image: from the point it is compared with).
    Dirty,
}

/// A metadata context that the client selected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetaContext {
    /// Its number in replies.
    pub id: u32,
    /// What it tells.
    pub kind: ContextKind,
}

/// What a session needs to know about its export and what was agreed in the handshake.
#[derive(Clone, Debug)]
pub struct SessionConfig {
    /// Number of the connection; upper half of its [`RequestId`]s.
    pub connection: u32,
    /// Bytes of the export.
    pub size: u64,
    /// Writes get EPERM.
    pub read_only: bool,
    /// Every write is submitted as if the client had asked for FUA (`ack = "durable"`).
    pub ack_durable: bool,
    /// How replies are framed. `Extended` also means extended requests.
    pub form: ReplyForm,
    /// Selected contexts. Empty: BLOCK_STATUS gets EINVAL.
    pub contexts: Vec<MetaContext>,
    /// Payloads up to this are asked for in one piece ([`Event::NeedInput`]); larger ones are
    /// collected by the session under `budget`.
    pub inline_payload_max: usize,
    /// Memory for larger payloads, and for replies beyond [`REPLY_BYTES_FREE`].
    pub budget: PayloadBudget,
    /// Sent before anything else: the handshake's last answer.
    pub answer: Vec<u8>,
}

/// Why no more requests are taken for the moment. Call [`Session::step`] again after a reply was
/// completed or sent, or after another connection gave back budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocked {
    /// The client has too many replies in flight or unsent.
    Replies,
    /// No memory at present: others have it.
    Budget,
}

/// Why a connection cannot go on: the stream is out of step. Close it; nothing of the request that
/// caused it takes effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BrokenStream {
    /// No request starts where one should.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// A payload longer than any client's mistake explains.
    #[error("a payload of {0} bytes is announced")]
    Payload(u64),
}

/// What [`Session::step`] found.
#[derive(Debug)]
pub enum Event<'a> {
    /// Submit it. Its payload is borrowed: from the input, or from the session.
    Request {
        /// Comes back with the reply.
        id: RequestId,
        /// Within the bounds of the export, length not 0.
        request: Request<'a>,
    },
    /// Receive more. The unconsumed input and what follows it must then lie in one piece of at
    /// least `contiguous` bytes.
    NeedInput {
        /// At most the larger of 32 and [`SessionConfig::inline_payload_max`].
        contiguous: usize,
    },
    /// Take nothing more from the socket for now.
    Blocked(Blocked),
    /// The client said DISC: ignore further input, as after [`Session::close_input`].
    Disconnect,
    /// Close the connection at once.
    Broken(BrokenStream),
}

/// Outcome of one [`Session::step`].
#[derive(Debug)]
pub struct Step<'a> {
    /// Bytes of the input that are used up, payload of the request included. With
    /// [`Event::Request`] they may be reused once the request has been submitted.
    pub consumed: usize,
    /// What to do.
    pub event: Event<'a>,
}

/// What was promised to a client.
#[derive(Debug)]
struct Pending {
    to: Answered,
    checked: Checked,
    reserved: usize,
}

#[derive(Debug)]
enum Receiving {
    /// At the start of a request.
    Header,
    /// A good request waits for room, then for its payload.
    Admit(RequestHeader, Checked),
    /// Its payload is longer than a receive buffer.
    Collect(RequestHeader, Checked),
    /// The payload of a refused request goes by; then the refusal is answered.
    Skip(RequestHeader, Refusal, u64),
    /// Nothing more comes in.
    Closed,
}

/// Where the payload of a yielded request lies.
enum Payload {
    None,
    Input { start: usize, end: usize },
    Collected,
}

enum Found {
    Request(RequestId, Checked, RequestHeader, Payload),
    NeedInput(usize),
    Blocked(Blocked),
    Disconnect,
    Broken(BrokenStream),
}

/// One connection in the transmission phase.
#[derive(Debug)]
pub struct Session {
    config: SessionConfig,
    receiving: Receiving,
    /// Payload collected so far, and the budget taken for it.
    collected: Vec<u8>,
    budget_taken: usize,
    /// `collected` belongs to a request already yielded.
    collected_spent: bool,
    /// Budget taken for replies.
    replies_taken: usize,
    /// It waits for budget.
    waiting: Option<Waiting>,
    /// Requests seen, by their headers.
    seen: u64,
    /// Requests refused.
    refused: u64,
    pending: Slab<Pending>,
    /// Bytes promised and unsent.
    reply_bytes: usize,
    output: Output,
    abandoned: bool,
}

impl Session {
    /// A connection that has just entered transmission.
    #[must_use]
    pub fn new(mut config: SessionConfig) -> Self {
        let answer = std::mem::take(&mut config.answer);
        let mut session = Self {
            config,
            receiving: Receiving::Header,
            collected: Vec::new(),
            budget_taken: 0,
            collected_spent: false,
            replies_taken: 0,
            waiting: None,
            seen: 0,
            refused: 0,
            pending: Slab::new(),
            reply_bytes: 0,
            output: Output::default(),
            abandoned: false,
        };
        if !answer.is_empty() {
            session.push_head(|out, _| out.extend_from_slice(&answer));
        }
        session
    }

    /// The connection a [`RequestId`] belongs to.
    #[must_use]
    pub const fn connection_of(id: RequestId) -> u32 {
        (id.0 >> 32) as u32
    }

    /// Requests submitted and not yet completed.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// The number of the request in the middle of whose payload the client is. It is the client's
    /// turn unless [`Event::Blocked`]; [`super::patience`] says how long.
    #[must_use]
    pub fn awaited_payload(&self) -> Option<u64> {
        let between = matches!(self.receiving, Receiving::Header | Receiving::Closed);
        (!between).then_some(self.seen)
    }

    /// It has memory of the budget, which others may wait for.
    #[must_use]
    pub fn holds_budget(&self) -> bool {
        self.budget_taken + self.replies_taken > 0
    }

    /// Takes the next request from `input`, the unconsumed bytes of the stream. Frees the payload
    /// of the request yielded last, so call it once more after the last one.
    pub fn step<'a>(&'a mut self, input: &'a [u8]) -> Step<'a> {
        let (consumed, found) = self.advance(input);
        let event = match found {
            Found::Request(id, checked, header, payload) => {
                let data = match payload {
                    Payload::None => &[],
                    Payload::Input { start, end } => &input[start..end],
                    Payload::Collected => &self.collected[..],
                };
                let request = checked.request(&header, data);
                Event::Request { id, request }
            }
            Found::NeedInput(contiguous) => Event::NeedInput { contiguous },
            Found::Blocked(why) => Event::Blocked(why),
            Found::Disconnect => Event::Disconnect,
            Found::Broken(why) => Event::Broken(why),
        };
        Step { consumed, event }
    }

    fn advance(&mut self, input: &[u8]) -> (usize, Found) {
        if self.collected_spent {
            self.release_collected();
        }
        let mut at = 0;
        loop {
            let rest = &input[at..];
            match self.receiving {
                Receiving::Header => {
                    if self.reply_bytes >= REPLY_BYTES_MAX || self.pending.len() >= REQUESTS_MAX {
                        return (at, Found::Blocked(Blocked::Replies));
                    }
                    let extended = self.config.form == ReplyForm::Extended;
                    let header = match RequestHeader::decode(rest, extended) {
                        Ok(header) => header,
                        Err(HeaderError::Short { needed, .. }) => {
                            return (at, Found::NeedInput(needed));
                        }
                        Err(error) => {
                            self.receiving = Receiving::Closed;
                            return (at, Found::Broken(error.into()));
                        }
                    };
                    at += RequestHeader::bytes(extended);
                    if let Err(end) = self.accept(header) {
                        self.receiving = Receiving::Closed;
                        return (at, end);
                    }
                }
                Receiving::Admit(header, checked) => {
                    let reserve = checked.reply_bytes(&self.config) + REPLY_HEAD_BYTES;
                    if let Err(why) = self.room_for_reply(reserve) {
                        return (at, Found::Blocked(why));
                    }
                    let payload = checked.payload_bytes(&header);
                    let (payload, end) = if payload == 0 {
                        (Payload::None, at)
                    } else if rest.len() >= payload {
                        let (start, end) = (at, at + payload);
                        (Payload::Input { start, end }, end)
                    } else if payload <= self.config.inline_payload_max {
                        return (at, Found::NeedInput(payload));
                    } else {
                        self.receiving = Receiving::Collect(header, checked);
                        continue;
                    };
                    let id = self.promise(&header, checked, reserve);
                    return (end, Found::Request(id, checked, header, payload));
                }
                Receiving::Collect(header, checked) => {
                    let wanted = checked.payload_bytes(&header) - self.collected.len();
                    if wanted == 0 {
                        let id = self.promise(&header, checked, REPLY_HEAD_BYTES);
                        self.collected_spent = true;
                        return (at, Found::Request(id, checked, header, Payload::Collected));
                    }
                    if rest.is_empty() {
                        return (at, Found::NeedInput(1));
                    }
                    if self.collected.len() == self.budget_taken {
                        let grow = wanted.min(COLLECT_CHUNK);
                        if !self.take_budget(grow) {
                            return (at, Found::Blocked(Blocked::Budget));
                        }
                        self.budget_taken += grow;
                        self.collected.reserve_exact(grow);
                    }
                    let room = self.budget_taken - self.collected.len();
                    let take = rest.len().min(room).min(wanted);
                    self.collected.extend_from_slice(&rest[..take]);
                    at += take;
                }
                Receiving::Skip(header, refusal, left) => {
                    let skip = rest.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    at += skip;
                    let left = left - skip as u64;
                    if left > 0 {
                        self.receiving = Receiving::Skip(header, refusal, left);
                        return (at, Found::NeedInput(1));
                    }
                    self.receiving = Receiving::Header;
                    self.refuse(&header, refusal);
                }
                Receiving::Closed => return (input.len(), Found::Disconnect),
            }
        }
    }

    /// Decides on a header. The error ends the connection.
    fn accept(&mut self, header: RequestHeader) -> Result<(), Found> {
        use afterimage_format::nbd::constants::cmd;
        self.seen += 1;
        if header.command == cmd::DISC {
            return Err(Found::Disconnect);
        }
        let extended = self.config.form == ReplyForm::Extended;
        let has_payload =
            header.command == cmd::WRITE || (extended && header.flags & cmd_flag::PAYLOAD_LEN != 0);
        let payload = if has_payload { header.length } else { 0 };
        match check::check(&header, &self.config) {
            Ok(Checked::AtOnce) => {
                // A payload of length 0 or none at all, and nothing to do.
                let to = answered(&header);
                self.receiving = Receiving::Header;
                self.push_head(|out, form| push_done(out, form, to));
            }
            Ok(checked) => self.receiving = Receiving::Admit(header, checked),
            Err(_) if payload > u64::from(u32::MAX) => {
                return Err(Found::Broken(BrokenStream::Payload(payload)));
            }
            Err(refusal) => self.receiving = Receiving::Skip(header, refusal, payload),
        }
        Ok(())
    }

    /// Takes what a reply of `reserve` bytes needs beyond what the connection may have for itself.
    fn room_for_reply(&mut self, reserve: usize) -> Result<(), Blocked> {
        let after = self.reply_bytes + reserve;
        if self.reply_bytes > 0 && after > REPLY_BYTES_MAX {
            return Err(Blocked::Replies);
        }
        if after <= REPLY_BYTES_FREE {
            return Ok(());
        }
        // Who has some lets those go first who wait; when its replies are sent it has none.
        if self.replies_taken > 0 && self.config.budget.is_wanted() {
            return Err(Blocked::Replies);
        }
        let lacking = after.saturating_sub(REPLY_BYTES_FREE + self.replies_taken);
        let lacking = lacking.next_multiple_of(COLLECT_CHUNK);
        if lacking == 0 {
            return Ok(());
        }
        if self.replies_taken > 0 {
            if !self.config.budget.take(self.config.connection, lacking) {
                return Err(Blocked::Replies);
            }
        } else if !self.take_budget(lacking) {
            return Err(Blocked::Budget);
        }
        self.replies_taken += lacking;
        Ok(())
    }

    /// Takes budget; others know as long as it cannot.
    fn take_budget(&mut self, bytes: usize) -> bool {
        let taken = self.config.budget.take(self.config.connection, bytes);
        if taken {
            self.waiting = None;
        } else if self.waiting.is_none() {
            self.waiting = Some(self.config.budget.wait());
        }
        taken
    }

    /// Gives back what was taken for replies once there are few.
    fn settle_replies(&mut self) {
        if self.replies_taken > 0 && self.reply_bytes <= REPLY_BYTES_FREE {
            let bytes = std::mem::take(&mut self.replies_taken);
            let (budget, me) = (&self.config.budget, self.config.connection);
            budget.give_back(me, bytes, self.budget_taken);
        }
    }

    fn promise(&mut self, header: &RequestHeader, checked: Checked, reserved: usize) -> RequestId {
        self.receiving = Receiving::Header;
        self.reply_bytes += reserved;
        let slot = self.pending.insert(Pending {
            to: answered(header),
            checked,
            reserved,
        });
        RequestId(u64::from(self.config.connection) << 32 | slot as u64)
    }

    fn refuse(&mut self, header: &RequestHeader, refusal: Refusal) {
        self.refused += 1;
        let refused = self.refused;
        // The client learns a number only. Without a clock: ever more rarely, however many come.
        if refused <= REFUSALS_TOLD || refused.is_power_of_two() {
            tracing::warn!(
                connection = self.config.connection,
                command = header.command,
                flags = header.flags,
                offset = header.offset,
                length = header.length,
                errno = refusal.errno as u32,
                refused,
                "refused a request: {}",
                refusal.message
            );
        }
        let to = answered(header);
        self.push_head(|out, form| push_error(out, form, to, refusal.errno, refusal.message));
    }

    /// Encodes into the output and counts it.
    fn push_head(&mut self, encode: impl FnOnce(&mut Vec<u8>, ReplyForm)) {
        let form = self.config.form;
        self.reply_bytes += self.output.small(|out| encode(out, form));
    }

    fn release_collected(&mut self) {
        self.collected = Vec::new();
        self.collected_spent = false;
        if self.budget_taken > 0 {
            let bytes = std::mem::take(&mut self.budget_taken);
            let (budget, me) = (&self.config.budget, self.config.connection);
            budget.give_back(me, bytes, self.replies_taken);
        }
    }

    /// Moves chunks to be sent, in order, into `into`: until it holds `chunks_max` chunks or about
    /// `bytes_max` bytes were moved. Send them in this order and hand each to [`Session::sent`].
    pub fn take_output(&mut self, into: &mut Vec<OutChunk>, chunks_max: usize, bytes_max: usize) {
        self.output.take(into, chunks_max, bytes_max);
    }

    /// There is something to send.
    #[must_use]
    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// A chunk from [`Session::take_output`] is with the kernel for good, or never will be. Gives
    /// back its data buffer, if it had one.
    pub fn sent(&mut self, chunk: OutChunk) -> Option<AlignedBuffer> {
        self.reply_bytes -= chunk.len();
        self.settle_replies();
        self.output.recycle(chunk)
    }

    /// The client will send no more (end of file). A payload cut short is dropped; requests in
    /// flight go on.
    pub fn close_input(&mut self) {
        self.receiving = Receiving::Closed;
        self.waiting = None;
        self.release_collected();
    }

    /// The socket is dead: nothing more comes in, nothing more is sent. Gives the unsent chunks
    /// for their buffers; they count as sent.
    pub fn abandon(&mut self) -> Vec<OutChunk> {
        self.close_input();
        self.abandoned = true;
        let mut chunks = Vec::new();
        self.output.take(&mut chunks, usize::MAX, usize::MAX);
        self.reply_bytes -= chunks.iter().map(|chunk| chunk.len()).sum::<usize>();
        self.settle_replies();
        chunks
    }

    /// Nothing comes in, nothing is in flight, everything is sent: close the socket.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        matches!(self.receiving, Receiving::Closed)
            && self.pending.is_empty()
            && self.reply_bytes == 0
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.release_collected();
        self.reply_bytes = 0;
        self.settle_replies();
    }
}

fn answered(header: &RequestHeader) -> Answered {
    Answered {
        cookie: header.cookie,
        offset: header.offset,
    }
}
