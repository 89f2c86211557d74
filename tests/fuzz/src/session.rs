//! The NBD session as a state machine: pieces of any length, answers in any order, a client that
//! does not read, half-close and death at any point.
//!
//! What must hold at every step: requests that are handed on lie within the export and are what the
//! client sent, in its order; memory for payloads stays within its bound. At the end: the session
//! ends, every budget is given back, and what the client was sent is exactly one whole answer to
//! each of its requests (`answers.rs`).

use crate::answers::Client;
use crate::bytes_of::Script;
use afterimage_format::nbd::constants::{cmd, cmd_flag};
use afterimage_format::nbd::reply::ReplyForm;
use afterimage_format::nbd::request::RequestHeader;
use afterimage_proxy::engine::request::{
    Extent, Reply, ReplyBody, Request, RequestError, RequestId,
};
use afterimage_proxy::io::buffer::AlignedBuffer;
use afterimage_proxy::nbd::budget::PayloadBudget;
use afterimage_proxy::nbd::session::{
    ContextKind, Event, MetaContext, OutChunk, PAYLOAD_BYTES_MAX, REQUESTS_MAX, Session,
    SessionConfig,
};

/// Bytes of the export.
pub(crate) const SIZE: u64 = 1 << 20;
const INLINE: usize = 4096;
const BUDGET: usize = 64 << 10;
/// The header of a request, the longer form.
const HEADER_MAX: usize = 32;
/// What a script may bring in all: each byte of it may stand for many.
const RECEIVED_MAX: usize = 2 << 20;

/// What is to be answered with.
enum Open {
    Data(usize),
    Extents,
    Nothing,
}

struct Talk {
    session: Session,
    budget: PayloadBudget,
    client: Client,
    /// Bytes that came and are not used up.
    received: Vec<u8>,
    open: Vec<(RequestId, Open)>,
}

pub(crate) fn run(data: &[u8]) {
    let mut script = Script::new(data);
    let form = [
        ReplyForm::Simple,
        ReplyForm::Structured,
        ReplyForm::Extended,
    ][script.below(3)];
    let flags = script.byte();
    let mut talk = Talk::new(form, flags);
    let mut came = 0;
    let mut closed = false;
    while !script.is_empty() && !closed && came < RECEIVED_MAX {
        let have = talk.received.len();
        match script.below(8) {
            // Bytes arrive.
            0..=2 => {
                let len = 1 + script.below(200);
                talk.received.extend_from_slice(script.take(len));
            }
            // A long payload arrives.
            3 => {
                let len = 10_000 * (1 + script.below(16));
                let bytes = std::iter::repeat_n(script.byte(), len);
                talk.received.extend(bytes);
            }
            // The storage answers one of the requests.
            4 if !talk.open.is_empty() => {
                let at = script.below(talk.open.len().min(256));
                let (id, what) = talk.open.swap_remove(at);
                talk.session.complete(answer(id, what, script.byte()));
            }
            // The client reads a little.
            5 => talk.read(1 + script.below(4), 1 + script.below(256)),
            6 if script.byte() == 0 => {
                talk.session.close_input();
                // What waited for room is not looked at any more.
                talk.received.clear();
                closed = true;
            }
            // A request that makes sense.
            7 => talk.ask(&mut script),
            _ => {}
        }
        came += talk.received.len().saturating_sub(have);
        closed |= talk.steps();
    }
    talk.end(flags & 8 != 0);
}

impl Talk {
    fn new(form: ReplyForm, flags: u8) -> Self {
        let budget = PayloadBudget::new(BUDGET);
        let context = |id, kind| MetaContext { id, kind };
        let contexts = if flags & 4 != 0 && form != ReplyForm::Simple {
            vec![
                context(1, ContextKind::Allocation),
                context(2, ContextKind::Dirty),
            ]
        } else {
            Vec::new()
        };
        let config = SessionConfig {
            connection: 3,
            size: SIZE,
            read_only: flags & 1 != 0,
            ack_durable: flags & 2 != 0,
            form,
            contexts,
            inline_payload_max: INLINE,
            budget: budget.clone(),
            answer: Vec::new(),
        };
        let client = Client::new(&config);
        let session = Session::new(config);
        Self {
            session,
            budget,
            client,
            received: Vec::new(),
            open: Vec::new(),
        }
    }

    /// Appends the header of a request with a cookie of its own; small ones get their payload.
    fn ask(&mut self, script: &mut Script<'_>) {
        let extended = self.client.form == ReplyForm::Extended;
        let command = [
            cmd::READ,
            cmd::WRITE,
            cmd::WRITE,
            cmd::FLUSH,
            cmd::TRIM,
            cmd::CACHE,
            cmd::WRITE_ZEROES,
            cmd::BLOCK_STATUS,
        ][script.below(8)];
        let offset = u64::from(script.byte()) << script.below(13);
        let length = u64::from(script.byte()) << script.below(12);
        let mut flags = 0;
        if extended && command == cmd::WRITE {
            flags |= cmd_flag::PAYLOAD_LEN;
        }
        if length & 1 == 1 {
            flags |= cmd_flag::FUA;
        }
        let (offset, length) = match command {
            cmd::FLUSH => (0, 0),
            _ => (offset, length),
        };
        let header = RequestHeader {
            flags,
            command,
            cookie: self.client.new_cookie(),
            offset,
            length,
        };
        header.encode(extended, &mut self.received);
        if command == cmd::WRITE && length < INLINE as u64 {
            let bytes = std::iter::repeat_n(script.byte(), length as usize);
            self.received.extend(bytes);
        }
    }

    fn read(&mut self, chunks: usize, bytes: usize) {
        let mut unsent: Vec<OutChunk> = Vec::new();
        self.session.take_output(&mut unsent, chunks, bytes);
        for chunk in unsent.drain(..) {
            self.client.hear(&chunk);
            self.session.sent(chunk);
        }
    }

    /// Steps as long as something comes of it. True: nothing more will.
    fn steps(&mut self) -> bool {
        loop {
            let have = self.received.len();
            let step = self.session.step(&self.received);
            let consumed = step.consumed;
            assert!(consumed <= have, "used more than there was");
            let mut progress = consumed > 0;
            let end = match step.event {
                Event::Request { id, request } => {
                    let known = self.open.iter().any(|(other, _)| *other == id);
                    assert!(!known, "one id twice");
                    self.client.handed_on(&request);
                    self.open.push((id, check(&request)));
                    progress = true;
                    None
                }
                Event::NeedInput { contiguous } => {
                    assert!(contiguous <= INLINE.max(HEADER_MAX));
                    assert!(consumed + contiguous > have, "asks for what there is");
                    Some(false)
                }
                Event::Blocked(_) => Some(false),
                Event::Disconnect | Event::Broken(_) => Some(true),
            };
            self.client
                .said
                .extend_from_slice(&self.received[..consumed]);
            self.received.drain(..consumed);
            // Beyond the budget: one payload, and one reply of the largest size.
            let bound = BUDGET + 2 * PAYLOAD_BYTES_MAX as usize + (1 << 20);
            assert!(self.budget.used() <= bound, "more memory than stated");
            assert!(self.open.len() <= REQUESTS_MAX);
            assert_eq!(self.session.in_flight(), self.open.len());
            if let Some(end) = end {
                return end;
            }
            assert!(progress, "a step that leads nowhere");
        }
    }

    /// Whatever is open is answered; the client reads it, or is dead.
    fn end(mut self, dead: bool) {
        self.session.close_input();
        let mut given_up = Vec::new();
        if dead {
            given_up = self.session.abandon();
        }
        for (id, what) in std::mem::take(&mut self.open) {
            assert!(!self.session.is_finished(), "finished with requests open");
            self.session.complete(answer(id, what, 0));
        }
        if !dead {
            self.read(usize::MAX, usize::MAX);
        }
        drop(given_up);
        assert!(self.session.is_finished() && !self.session.has_output());
        let Self {
            session,
            budget,
            client,
            ..
        } = self;
        drop(session);
        assert_eq!(budget.used(), 0, "memory that nobody gives back");
        client.judge(dead);
    }
}

/// A request that is handed on lies within the export.
fn check(request: &Request<'_>) -> Open {
    let (offset, len) = match *request {
        Request::Read { offset, len } => (offset, u64::from(len)),
        Request::Write { offset, data, .. } => (offset, data.len() as u64),
        Request::Trim { offset, len, .. }
        | Request::WriteZeroes { offset, len, .. }
        | Request::BlockStatus { offset, len, .. } => (offset, len),
        Request::Flush => return Open::Nothing,
    };
    assert!(len > 0 && offset.checked_add(len).is_some_and(|end| end <= SIZE));
    match request {
        Request::Read { .. } => Open::Data(len as usize),
        Request::BlockStatus { .. } => Open::Extents,
        _ => Open::Nothing,
    }
}

fn answer(id: RequestId, what: Open, how: u8) -> Reply {
    let result = match what {
        _ if how % 5 == 4 => Err(RequestError::Io),
        Open::Data(len) => Ok(ReplyBody::Data {
            buffer: AlignedBuffer::new(len),
            start: 0,
            len,
        }),
        Open::Extents => {
            let extents = (0..1 + how % 7).map(|at| Extent {
                len: 512 * (1 + u64::from(how)),
                hole: (how ^ at) & 1 != 0,
                zero: (how ^ at) & 2 != 0,
                dirty: (how ^ at) & 4 != 0,
            });
            Ok(ReplyBody::Extents(extents.collect()))
        }
        Open::Nothing => Ok(ReplyBody::Done),
    };
    Reply { id, result }
}
