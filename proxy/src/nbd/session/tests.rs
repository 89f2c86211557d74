//! What servers commonly get wrong in transmission, against a disk in memory.

use super::{
    Blocked, ContextKind, Event, MetaContext, OutChunk, REPLY_BYTES_MAX, REQUESTS_MAX, Session,
    SessionConfig,
};
use crate::engine::request::{Extent, Reply, ReplyBody, Request, RequestError, RequestId};
use crate::io::buffer::AlignedBuffer;
use crate::nbd::budget::PayloadBudget;
use afterimage_format::nbd::constants::{chunk, cmd, cmd_flag};
use afterimage_format::nbd::reply::{ReplyForm, ReplyHeader, decode_header};
use afterimage_format::nbd::request::RequestHeader;
use proptest::prelude::*;
use std::sync::{Arc, Mutex};

const SIZE: usize = 1 << 20;
const EPERM: u32 = 1;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;

fn config(form: ReplyForm) -> SessionConfig {
    SessionConfig {
        connection: 3,
        size: SIZE as u64,
        read_only: false,
        ack_durable: false,
        form,
        contexts: Vec::new(),
        inline_payload_max: 64 << 10,
        budget: PayloadBudget::new(1 << 20),
        answer: Vec::new(),
    }
}

fn with_contexts(form: ReplyForm) -> SessionConfig {
    let context = |id, kind| MetaContext { id, kind };
    SessionConfig {
        contexts: vec![
            context(1, ContextKind::Allocation),
            context(2, ContextKind::Dirty),
        ],
        ..config(form)
    }
}

fn request(command: u16, flags: u16, cookie: u64, offset: u64, length: u64) -> RequestHeader {
    RequestHeader {
        flags,
        command,
        cookie,
        offset,
        length,
    }
}

fn encode(form: ReplyForm, header: &RequestHeader, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    header.encode(form == ReplyForm::Extended, &mut out);
    out.extend_from_slice(payload);
    out
}

/// Executes requests at once, and notes them.
struct Disk {
    data: Vec<u8>,
    done: Vec<String>,
}

impl Disk {
    fn new() -> Self {
        Self {
            data: vec![0; SIZE],
            done: Vec::new(),
        }
    }

    fn execute(&mut self, id: RequestId, request: &Request<'_>) -> Reply {
        let range = |offset: u64, len: u64| {
            let start = (offset as usize).min(SIZE);
            start..(start + len as usize).min(SIZE)
        };
        let result = match *request {
            Request::Read { offset, len } => {
                let mut buffer = AlignedBuffer::new(len as usize + 7);
                buffer[7..].copy_from_slice(&self.data[range(offset, len.into())]);
                Ok(ReplyBody::Data {
                    buffer,
                    start: 7,
                    len: len as usize,
                })
            }
            Request::Write { offset, data, fua } => {
                self.done
                    .push(format!("write {offset} {} {fua}", data.len()));
                self.data[range(offset, data.len() as u64)].copy_from_slice(data);
                Ok(ReplyBody::Done)
            }
            Request::Flush => {
                self.done.push("flush".into());
                Ok(ReplyBody::Done)
            }
            Request::Trim { offset, len, fua } => {
                self.done.push(format!("trim {offset} {len} {fua}"));
                self.data[range(offset, len)].fill(0);
                Ok(ReplyBody::Done)
            }
            Request::WriteZeroes {
                offset,
                len,
                fua,
                no_hole,
            } => {
                self.done
                    .push(format!("zero {offset} {len} {fua} {no_hole}"));
                self.data[range(offset, len)].fill(0);
                Ok(ReplyBody::Done)
            }
            Request::BlockStatus {
                len, extents_max, ..
            } => {
                let extent = |len, zero, dirty| Extent {
                    len,
                    hole: zero,
                    zero,
                    dirty,
                };
                let mut extents = vec![
                    extent(512, false, true),
                    extent(512, true, true),
                    extent(len * 2, true, false),
                ];
                extents.truncate(extents_max as usize);
                Ok(ReplyBody::Extents(extents))
            }
        };
        Reply { id, result }
    }
}

/// Feeds `input` in pieces of `piece` bytes as a caller with a bounded buffer does; executes at
/// once. Gives what the client receives, and how it ended.
fn drive(session: &mut Session, disk: &mut Disk, input: &[u8], piece: usize) -> (Vec<u8>, String) {
    let mut out = Vec::new();
    let (mut from, mut have) = (0, 0);
    loop {
        let step = session.step(&input[from..have]);
        let consumed = step.consumed;
        let mut end = None;
        match step.event {
            Event::Request { id, request } => {
                let reply = disk.execute(id, &request);
                session.complete(reply);
            }
            Event::NeedInput { contiguous } => {
                assert!(contiguous <= 64 << 10);
                assert!(
                    consumed + contiguous > have - from,
                    "asks for more than there is"
                );
                if have == input.len() {
                    end = Some("wants more");
                }
                have = (have + piece).min(input.len());
            }
            Event::Blocked(_) => end = Some("blocked"),
            Event::Disconnect => end = Some("disconnect"),
            Event::Broken(_) => end = Some("broken"),
        }
        from += consumed;
        send(session, &mut out);
        if let Some(end) = end {
            return (out, end.into());
        }
    }
}

fn send(session: &mut Session, out: &mut Vec<u8>) {
    let mut chunks: Vec<OutChunk> = Vec::new();
    session.take_output(&mut chunks, usize::MAX, usize::MAX);
    for chunk in chunks {
        out.extend_from_slice(&chunk);
        session.sent(chunk);
    }
}

/// A client's view of a stream of replies to requests without data: cookie and errno.
fn outcomes(mut bytes: &[u8]) -> Vec<(u64, u32)> {
    let mut out = Vec::new();
    while !bytes.is_empty() {
        let (header, at) = decode_header(bytes).expect("a reply");
        let length = header.length as usize;
        let errno = match header.form {
            ReplyForm::Simple => header.errno,
            _ if header.kind == chunk::ERROR => {
                u32::from_be_bytes(*bytes[at..].first_chunk().expect("an errno"))
            }
            _ => 0,
        };
        out.push((header.cookie, errno));
        bytes = &bytes[at + length..];
    }
    out
}

const FORMS: [ReplyForm; 3] = [
    ReplyForm::Simple,
    ReplyForm::Structured,
    ReplyForm::Extended,
];

#[test]
fn bad_requests_get_their_errno_and_the_stream_stays_in_step() {
    let end = SIZE as u64;
    let cases: &[(&str, RequestHeader, u32)] = &[
        ("read beyond", request(cmd::READ, 0, 1, end - 1, 2), EINVAL),
        (
            "read overflow",
            request(cmd::READ, 0, 1, u64::MAX, 2),
            EINVAL,
        ),
        (
            "read of 65 MiB",
            request(cmd::READ, 0, 1, 0, 65 << 20),
            EINVAL,
        ),
        ("write beyond", request(cmd::WRITE, 0, 1, end, 9), ENOSPC),
        (
            "write overflow",
            request(cmd::WRITE, 0, 1, u64::MAX - 1, 9),
            ENOSPC,
        ),
        (
            "write, bad flag",
            request(cmd::WRITE, 1 << 9, 1, 0, 9),
            EINVAL,
        ),
        ("trim beyond", request(cmd::TRIM, 0, 1, end, 1), EINVAL),
        (
            "zero beyond",
            request(cmd::WRITE_ZEROES, 0, 1, 1, end),
            ENOSPC,
        ),
        (
            "zero overflow",
            request(cmd::WRITE_ZEROES, 0, 1, u64::MAX, 1),
            ENOSPC,
        ),
        ("cache beyond", request(cmd::CACHE, 0, 1, end, 1), EINVAL),
        (
            "flush with a range",
            request(cmd::FLUSH, 0, 1, 0, 1),
            EINVAL,
        ),
        (
            "status without context",
            request(cmd::BLOCK_STATUS, 0, 1, 0, 512),
            EINVAL,
        ),
        ("unknown command", request(99, 0, 1, 0, 0), EINVAL),
        (
            "flag of another command",
            request(cmd::READ, cmd_flag::NO_HOLE, 1, 0, 1),
            EINVAL,
        ),
        (
            "FAST_ZERO on trim",
            request(cmd::TRIM, cmd_flag::FAST_ZERO, 1, 0, 1),
            EINVAL,
        ),
    ];
    for form in FORMS {
        for (what, bad, errno) in cases {
            let payload = if bad.command == cmd::WRITE { 9 } else { 0 };
            let mut input = encode(form, bad, &[0xaa; 9][..payload]);
            input.extend(encode(form, &request(cmd::FLUSH, 0, 2, 0, 0), &[]));
            for piece in [1, 7, 10_000] {
                let (mut session, mut disk) = (Session::new(config(form)), Disk::new());
                let (out, end) = drive(&mut session, &mut disk, &input, piece);
                assert_eq!(outcomes(&out), [(1, *errno), (2, 0)], "{what}, {form:?}");
                assert_eq!(end, "wants more", "{what}, {form:?}");
                assert_eq!(disk.done, ["flush"], "{what}: nothing else was done");
            }
        }
    }
}

#[test]
fn errors_are_structured_where_that_was_agreed() {
    let bad = request(cmd::READ, 0, 77, u64::MAX, 2);
    for form in FORMS {
        let (mut session, mut disk) = (Session::new(config(form)), Disk::new());
        let (out, _) = drive(&mut session, &mut disk, &encode(form, &bad, &[]), 100);
        let (header, at) = decode_header(&out).expect("a reply");
        assert_eq!(header.form, form);
        if form == ReplyForm::Simple {
            assert_eq!((header.errno, out.len()), (EINVAL, at));
        } else {
            assert_eq!((header.kind, header.flags), (chunk::ERROR, 1));
            assert!(out.ends_with(b"beyond the end of the export"));
        }
        if form == ReplyForm::Extended {
            assert_eq!(header.offset, u64::MAX, "the request's offset is repeated");
        }
    }
}

/// Counts warnings.
struct Warnings(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::WARN
    }

    fn event(&self, event: &tracing::Event<'_>) {
        struct Text(String);
        impl tracing::field::Visit for Text {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                self.0 += &format!("{field}={value:?} ");
            }
        }
        let mut text = Text(String::new());
        event.record(&mut text);
        self.0.lock().expect("not poisoned").push(text.0);
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn why_requests_are_refused_is_in_the_log_and_does_not_fill_it() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let form = ReplyForm::Simple;
    tracing::subscriber::with_default(Warnings(told.clone()), || {
        let (mut session, mut disk) = (Session::new(config(form)), Disk::new());
        let good = encode(form, &request(cmd::READ, 0, 1, 0, 512), &[]);
        drive(&mut session, &mut disk, &good, 4096);
        assert!(told.lock().expect("not poisoned").is_empty());
        let bad = encode(form, &request(cmd::READ, 0, 2, SIZE as u64, 512), &[]);
        for _ in 0..1000 {
            drive(&mut session, &mut disk, &bad, 4096);
        }
    });
    let told = told.lock().expect("not poisoned");
    // Eight, then 16, 32, 64, 128, 256 and 512.
    assert_eq!(told.len(), 14, "{told:?}");
    assert!(told[0].contains("beyond the end"), "{}", told[0]);
    assert!(told[0].contains("offset=1048576"), "{}", told[0]);
    assert!(told[13].contains("refused=512"), "{}", told[13]);
}

#[test]
fn a_read_only_export_refuses_every_change() {
    for form in FORMS {
        let read_only = SessionConfig {
            read_only: true,
            ..config(form)
        };
        let (mut session, mut disk) = (Session::new(read_only), Disk::new());
        let mut input = encode(form, &request(cmd::WRITE, 0, 1, 0, 3), b"abc");
        input.extend(encode(form, &request(cmd::TRIM, 0, 2, 0, 3), &[]));
        input.extend(encode(form, &request(cmd::WRITE_ZEROES, 0, 3, 0, 3), &[]));
        input.extend(encode(form, &request(cmd::FLUSH, 0, 4, 0, 0), &[]));
        let (out, _) = drive(&mut session, &mut disk, &input, 5);
        assert_eq!(outcomes(&out), [(1, EPERM), (2, EPERM), (3, EPERM), (4, 0)]);
    }
}

#[test]
fn what_is_written_is_read_in_every_form() {
    for form in FORMS {
        let (mut session, mut disk) = (Session::new(config(form)), Disk::new());
        let payload: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
        // Extended clients set PAYLOAD_LEN; those that forget are understood all the same.
        let flags = if form == ReplyForm::Extended {
            cmd_flag::PAYLOAD_LEN
        } else {
            0
        };
        let write = request(cmd::WRITE, flags | cmd_flag::FUA, 1, 13, 100_000);
        let mut input = encode(form, &write, &payload);
        input.extend(encode(
            form,
            &request(cmd::WRITE, 0, 2, 13, 1),
            &payload[..1],
        ));
        let (out, _) = drive(&mut session, &mut disk, &input, 4096);
        assert_eq!(outcomes(&out), [(1, 0), (2, 0)]);
        assert_eq!(disk.done, ["write 13 100000 true", "write 13 1 false"]);
        let read = encode(form, &request(cmd::READ, 0, 3, 13, 100_000), &[]);
        let (out, _) = drive(&mut session, &mut disk, &read, 4096);
        let (header, at) = decode_header(&out).expect("a reply");
        assert_eq!((header.form, header.cookie), (form, 3));
        let at = if form == ReplyForm::Simple {
            at
        } else {
            assert_eq!((header.kind, header.flags), (chunk::OFFSET_DATA, 1));
            assert_eq!(header.length, 100_008);
            assert_eq!(out[at..at + 8], 13u64.to_be_bytes());
            at + 8
        };
        assert_eq!(out[at..], payload);
    }
}

#[test]
fn a_listener_that_answers_durably_asks_for_it() {
    let durable = SessionConfig {
        ack_durable: true,
        ..config(ReplyForm::Simple)
    };
    let (mut session, mut disk) = (Session::new(durable), Disk::new());
    let write = encode(ReplyForm::Simple, &request(cmd::WRITE, 0, 1, 0, 1), b"x");
    drive(&mut session, &mut disk, &write, 100);
    assert_eq!(disk.done, ["write 0 1 true"]);
}

#[test]
fn zero_length_requests_succeed_and_do_nothing() {
    for form in FORMS {
        let (mut session, mut disk) = (Session::new(config(form)), Disk::new());
        let commands = [
            cmd::READ,
            cmd::WRITE,
            cmd::TRIM,
            cmd::CACHE,
            cmd::WRITE_ZEROES,
        ];
        let mut input = Vec::new();
        for (cookie, command) in commands.into_iter().enumerate() {
            let header = request(command, 0, cookie as u64, SIZE as u64, 0);
            input.extend(encode(form, &header, &[]));
        }
        let (out, _) = drive(&mut session, &mut disk, &input, 9);
        assert_eq!(outcomes(&out), [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0)]);
        assert!(disk.done.is_empty());
    }
}

#[test]
fn trim_and_write_zeroes_of_4_gib_and_more_pass_whole() {
    let wide = |form| SessionConfig {
        size: 16 << 40,
        ..config(form)
    };
    let (mut session, mut disk) = (Session::new(wide(ReplyForm::Simple)), Disk::new());
    let len = u64::from(u32::MAX);
    let mut input = encode(ReplyForm::Simple, &request(cmd::TRIM, 0, 1, 5, len), &[]);
    let flags = cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO;
    let zero = request(cmd::WRITE_ZEROES, flags, 2, 5, len);
    input.extend(encode(ReplyForm::Simple, &zero, &[]));
    let (out, _) = drive(&mut session, &mut disk, &input, 100);
    assert_eq!(outcomes(&out), [(1, 0), (2, 0)]);
    assert_eq!(
        disk.done,
        ["trim 5 4294967295 false", "zero 5 4294967295 false true"]
    );
    let (mut session, mut disk) = (Session::new(wide(ReplyForm::Extended)), Disk::new());
    let all = request(cmd::TRIM, cmd_flag::FUA, 1, 0, 16 << 40);
    let input = encode(ReplyForm::Extended, &all, &[]);
    drive(&mut session, &mut disk, &input, 100);
    assert_eq!(disk.done, ["trim 0 17592186044416 true"]);
}

#[test]
fn too_large_a_payload_is_answered_in_step() {
    for form in FORMS {
        let (mut session, mut disk) = (Session::new(config(form)), Disk::new());
        let len = (64 << 20) + 1;
        let mut input = encode(form, &request(cmd::WRITE, 0, 1, 0, len), &[]);
        input.resize(input.len() + len as usize, 0x25);
        input.extend(encode(form, &request(cmd::FLUSH, 0, 2, 0, 0), &[]));
        let (out, _) = drive(&mut session, &mut disk, &input, 1 << 20);
        assert_eq!(outcomes(&out), [(1, EINVAL), (2, 0)]);
        assert_eq!(session.config.budget.used(), 0);
    }
    // A payload that would take years to skip ends the connection.
    let (mut session, mut disk) = (Session::new(config(ReplyForm::Extended)), Disk::new());
    let absurd = request(cmd::WRITE, 0, 1, 0, 1 << 40);
    let input = encode(ReplyForm::Extended, &absurd, &[]);
    assert_eq!(drive(&mut session, &mut disk, &input, 100).1, "broken");
    // A payload on a command that has none is skipped, too.
    let (mut session, mut disk) = (Session::new(config(ReplyForm::Extended)), Disk::new());
    let odd = request(cmd::READ, cmd_flag::PAYLOAD_LEN, 1, 0, 6);
    let mut input = encode(ReplyForm::Extended, &odd, b"odd one");
    input.truncate(input.len() - 1);
    input.extend(encode(
        ReplyForm::Extended,
        &request(cmd::FLUSH, 0, 2, 0, 0),
        &[],
    ));
    let (out, _) = drive(&mut session, &mut disk, &input, 100);
    assert_eq!(outcomes(&out), [(1, EINVAL), (2, 0)]);
}

#[test]
fn a_torn_write_changes_nothing() {
    for len in [1000, 100_000, 700_000] {
        let write = request(cmd::WRITE, 0, 1, 0, len as u64);
        let whole = encode(ReplyForm::Simple, &write, &vec![1; len]);
        for cut in [0, 27, 28, 29, whole.len() / 2, whole.len() - 1] {
            let (mut session, mut disk) = (Session::new(config(ReplyForm::Simple)), Disk::new());
            let (out, end) = drive(&mut session, &mut disk, &whole[..cut], 60_000);
            assert_eq!((out.len(), &*end), (0, "wants more"));
            session.close_input();
            assert!(session.is_finished());
            assert!(disk.done.is_empty(), "{len} cut at {cut}");
            assert_eq!(session.config.budget.used(), 0, "memory is given back");
        }
    }
}

#[test]
fn what_is_in_flight_at_disc_or_half_close_finishes_and_is_answered() {
    for disc in [true, false] {
        let mut session = Session::new(config(ReplyForm::Structured));
        let mut disk = Disk::new();
        let mut input = encode(
            ReplyForm::Structured,
            &request(cmd::READ, 0, 7, 0, 512),
            &[],
        );
        input.extend(encode(
            ReplyForm::Structured,
            &request(cmd::FLUSH, 0, 8, 0, 0),
            &[],
        ));
        if disc {
            let header = request(cmd::DISC, 0, 9, 0, 0);
            input.extend(encode(ReplyForm::Structured, &header, b"ignored"));
        }
        let mut replies = Vec::new();
        let mut at = 0;
        loop {
            let step = session.step(&input[at..]);
            at += step.consumed;
            match step.event {
                Event::Request { id, request } => replies.push(disk.execute(id, &request)),
                Event::Disconnect => break,
                Event::NeedInput { .. } => {
                    session.close_input();
                    break;
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(session.in_flight(), 2);
        assert!(!session.is_finished());
        // In another order than asked for.
        for reply in replies.into_iter().rev() {
            session.complete(reply);
        }
        assert!(!session.is_finished(), "not sent yet");
        let mut out = Vec::new();
        send(&mut session, &mut out);
        assert_eq!(outcomes(&out), [(8, 0), (7, 0)]);
        assert!(session.is_finished());
    }
}

#[test]
fn after_an_error_of_the_socket_replies_are_dropped_and_buffers_come_back() {
    let mut session = Session::new(config(ReplyForm::Simple));
    let mut disk = Disk::new();
    let header = request(cmd::READ, 0, 7, 0, 512);
    let input = [
        encode(ReplyForm::Simple, &header, &[]),
        encode(ReplyForm::Simple, &header, &[]),
    ];
    let input = input.concat();
    let mut replies = Vec::new();
    for at in [0, 28] {
        if let Event::Request { id, request } = session.step(&input[at..]).event {
            replies.push(disk.execute(id, &request));
        }
    }
    assert_eq!(session.complete(replies.remove(0)).map(|_| ()), None);
    let unsent = session.abandon();
    assert_eq!(
        unsent.iter().map(|chunk| chunk.len()).sum::<usize>(),
        16 + 512
    );
    assert!(!session.is_finished());
    let buffer = session.complete(replies.remove(0));
    assert!(buffer.is_some(), "the buffer comes back");
    assert!(session.is_finished());
}

#[test]
fn only_the_protocols_errors_go_on_the_wire() {
    let causes = [
        (RequestError::Io, 5),
        (RequestError::NoSpace, 28),
        (RequestError::Invalid, 22),
        (RequestError::NoMemory, 12),
        (RequestError::ShuttingDown, 108),
    ];
    for form in FORMS {
        let mut session = Session::new(config(form));
        for (error, errno) in causes {
            let read = encode(form, &request(cmd::READ, 0, 5, 0, 1), &[]);
            let Event::Request { id, .. } = session.step(&read).event else {
                panic!("a request");
            };
            let result = Err(error);
            session.complete(Reply { id, result });
            let mut out = Vec::new();
            send(&mut session, &mut out);
            assert_eq!(outcomes(&out), [(5, errno)]);
        }
    }
}

#[test]
fn stalled_payloads_hold_a_bounded_budget_and_nobody_else() {
    let budget = PayloadBudget::new(1 << 20);
    let client = |connection| {
        Session::new(SessionConfig {
            connection,
            size: 1 << 30,
            budget: budget.clone(),
            ..config(ReplyForm::Simple)
        })
    };
    let head = encode(
        ReplyForm::Simple,
        &request(cmd::WRITE, 0, 1, 0, 32 << 20),
        &[],
    );
    let part = vec![7; 512 << 10];
    let (mut a, mut b) = (client(0), client(1));
    for stalled in [&mut a, &mut b] {
        assert_eq!(stalled.step(&head).consumed, 28);
        let step = stalled.step(&part);
        assert_eq!(step.consumed, part.len());
        assert!(matches!(step.event, Event::NeedInput { contiguous: 1 }));
        assert_eq!(stalled.awaited_payload(), Some(1));
    }
    assert_eq!(budget.used(), 1 << 20);
    // A third client with ordinary writes needs none of it.
    let (mut c, mut disk) = (client(2), Disk::new());
    let write = encode(
        ReplyForm::Simple,
        &request(cmd::WRITE, 0, 1, 0, 4096),
        &[1; 4096],
    );
    let (out, _) = drive(&mut c, &mut disk, &write, 4096);
    assert_eq!(outcomes(&out), [(1, 0)]);
    // The first that needs more may go on, the second waits until memory comes back.
    assert!(matches!(a.step(&part).event, Event::NeedInput { .. }));
    assert!(matches!(
        b.step(&part).event,
        Event::Blocked(Blocked::Budget)
    ));
    drop(a);
    assert!(matches!(b.step(&part).event, Event::NeedInput { .. }));
    drop(b);
    assert_eq!(budget.used(), 0);
}

#[test]
fn a_client_that_never_reads_is_not_served_for_ever() {
    let wide = SessionConfig {
        size: 1 << 30,
        ..config(ReplyForm::Simple)
    };
    let mut session = Session::new(wide.clone());
    let read = encode(
        ReplyForm::Simple,
        &request(cmd::READ, 0, 1, 0, 4 << 20),
        &[],
    );
    let mut taken = Vec::new();
    let blocked = loop {
        match session.step(&read).event {
            Event::Request { id, .. } => taken.push(id),
            other => break other,
        }
    };
    assert!(matches!(blocked, Event::Blocked(Blocked::Replies)));
    assert_eq!(
        taken.len(),
        3,
        "3 x 4 MiB and their heads are below 16 MiB, 4 are not"
    );
    // Answered but unread counts the same.
    let id = taken.remove(0);
    let reply = |id, len: usize| Reply {
        id,
        result: Ok(ReplyBody::Data {
            buffer: AlignedBuffer::new(len),
            start: 0,
            len,
        }),
    };
    session.complete(reply(id, 4 << 20));
    assert!(matches!(
        session.step(&[]).event,
        Event::Blocked(Blocked::Replies)
    ));
    let mut out = Vec::new();
    send(&mut session, &mut out);
    assert!(matches!(session.step(&[]).event, Event::Request { .. }));

    // One reply above the bound passes when it is alone.
    let mut session = Session::new(wide);
    let read = encode(
        ReplyForm::Simple,
        &request(cmd::READ, 0, 1, 0, 64 << 20),
        &[],
    );
    const { assert!(64 << 20 > REPLY_BYTES_MAX) };
    assert!(matches!(session.step(&read).event, Event::Request { .. }));
    assert!(matches!(session.step(&read).event, Event::Blocked(_)));

    // Bad requests whose errors nobody reads, and requests that are never answered.
    let bad = encode(ReplyForm::Simple, &request(99, 0, 1, 0, 0), &[]).repeat(2_000_000);
    let mut session = Session::new(config(ReplyForm::Simple));
    assert!(matches!(session.step(&bad).event, Event::Blocked(_)));
    let flush = encode(ReplyForm::Simple, &request(cmd::FLUSH, 0, 1, 0, 0), &[]);
    let mut session = Session::new(config(ReplyForm::Simple));
    for _ in 0..REQUESTS_MAX {
        assert!(matches!(session.step(&flush).event, Event::Request { .. }));
    }
    assert!(matches!(session.step(&flush).event, Event::Blocked(_)));
}

#[test]
fn replies_beyond_a_connections_own_come_out_of_a_shared_budget() {
    let budget = PayloadBudget::new(2 << 20);
    let client = |connection| {
        Session::new(SessionConfig {
            connection,
            size: 1 << 30,
            budget: budget.clone(),
            ..config(ReplyForm::Simple)
        })
    };
    let read = |len| encode(ReplyForm::Simple, &request(cmd::READ, 0, 1, 0, len), &[]);
    let (mut hog, mut late, mut small) = (client(0), client(1), client(2));
    let mut taken = Vec::new();
    while let Event::Request { id, .. } = hog.step(&read(1 << 20)).event {
        taken.push(id);
    }
    assert!(budget.used() > 2 << 20, "the first may go beyond the limit");
    let (one_mib, little) = (read(1 << 20), read(64 << 10));
    let blocked = late.step(&one_mib);
    let head = blocked.consumed;
    assert!(matches!(blocked.event, Event::Blocked(Blocked::Budget)));
    assert!(budget.is_wanted());
    let step = small.step(&little);
    assert!(
        matches!(step.event, Event::Request { .. }),
        "what is its own it always has"
    );
    assert!(head > 0 && hog.holds_budget() && !small.holds_budget());
    // While somebody waits, whoever has some gets no more before all of it is back.
    for id in taken.drain(..) {
        let buffer = AlignedBuffer::new(1 << 20);
        let (start, len) = (0, 1 << 20);
        let result = Ok(ReplyBody::Data { buffer, start, len });
        hog.complete(Reply { id, result });
    }
    let mut chunks = Vec::new();
    hog.take_output(&mut chunks, usize::MAX, usize::MAX);
    let last = chunks.split_off(chunks.len() - 2);
    for chunk in chunks {
        hog.sent(chunk);
    }
    let step = hog.step(&[]);
    assert!(matches!(step.event, Event::Blocked(Blocked::Replies)));
    for chunk in last {
        hog.sent(chunk);
    }
    assert_eq!(budget.used(), 0);
    let step = late.step(&[]);
    assert!(matches!(step.event, Event::Request { .. }));
    assert!(!budget.is_wanted());
    assert_eq!(budget.used(), 1 << 20);
    drop(late);
    assert_eq!(budget.used(), 0);
}

/// A chunk's header, its context, and its extents as length and flags.
type StatusChunk = (ReplyHeader, u32, Vec<(u64, u64)>);

#[test]
fn block_status_tells_every_context_within_the_range() {
    for form in [ReplyForm::Structured, ReplyForm::Extended] {
        let (mut session, mut disk) = (Session::new(with_contexts(form)), Disk::new());
        let status = |flags, len| encode(form, &request(cmd::BLOCK_STATUS, flags, 4, 0, len), &[]);
        let parse = |out: &[u8]| {
            let mut all = Vec::<StatusChunk>::new();
            let mut rest = out;
            while let Some((header, at)) = decode_header(rest) {
                let body = &rest[at..at + header.length as usize];
                let context = u32::from_be_bytes(*body.first_chunk().expect("a context"));
                let extents = if form == ReplyForm::Extended {
                    let number = |b: &[u8]| u64::from_be_bytes(*b.first_chunk().expect("8 bytes"));
                    body[8..]
                        .chunks(16)
                        .map(|e| (number(e), number(&e[8..])))
                        .collect()
                } else {
                    let number =
                        |b: &[u8]| u32::from_be_bytes(*b.first_chunk().expect("4 bytes")).into();
                    body[4..]
                        .chunks(8)
                        .map(|e| (number(e), number(&e[4..])))
                        .collect()
                };
                all.push((header, context, extents));
                rest = &rest[at + header.length as usize..];
            }
            all
        };
        let (out, _) = drive(&mut session, &mut disk, &status(0, 4096), 100);
        let all = parse(&out);
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].1, &all[0].2[..]), (1, &[(512, 0), (3584, 3)][..]));
        assert_eq!((all[1].1, &all[1].2[..]), (2, &[(1024, 1), (3072, 0)][..]));
        assert_eq!((all[0].0.flags, all[1].0.flags), (0, 1), "DONE on the last");
        let (out, _) = drive(
            &mut session,
            &mut disk,
            &status(cmd_flag::REQ_ONE, 4096),
            100,
        );
        let all = parse(&out);
        assert!(
            all.iter()
                .all(|(_, _, extents)| extents == &[(512, extents[0].1)])
        );
        let (out, _) = drive(&mut session, &mut disk, &status(0, 0), 100);
        assert_eq!(outcomes(&out), [(4, EINVAL)], "no extent has length 0");
    }
}

fn any_request() -> impl Strategy<Value = (RequestHeader, Vec<u8>)> {
    let number = prop_oneof![
        0u64..5000,
        (SIZE as u64 - 10)..(SIZE as u64 + 10),
        Just(u64::MAX)
    ];
    let length = prop_oneof![
        Just(0u64),
        1u64..3000,
        Just(70_000),
        (SIZE as u64 - 5)..(SIZE as u64 + 5)
    ];
    (0u16..9, 0u16..64, any::<u64>(), number, length).prop_map(
        |(command, flags, cookie, offset, length)| {
            let header = request(command, flags & 0x3f, cookie, offset, length);
            (header, vec![cookie as u8; length as usize])
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// However the stream is cut into pieces, the client sees the same.
    #[test]
    fn pieces_do_not_matter(
        requests in proptest::collection::vec(any_request(), 1..12),
        piece in 1usize..5000,
        which in 0usize..3,
    ) {
        let form = FORMS[which];
        let extended = form == ReplyForm::Extended;
        let mut input = Vec::new();
        for (header, payload) in &requests {
            let has_payload = header.command == cmd::WRITE
                || (extended && header.flags & cmd_flag::PAYLOAD_LEN != 0);
            let payload = if has_payload { &payload[..] } else { &[] };
            input.extend(encode(form, header, payload));
        }
        let mut results = Vec::new();
        for piece in [piece, input.len()] {
            let (mut session, mut disk) = (Session::new(config(form)), Disk::new());
            let (out, end) = drive(&mut session, &mut disk, &input, piece);
            prop_assert!(end != "broken");
            prop_assert_eq!(session.config.budget.used(), 0);
            results.push((out, end, disk.data, disk.done));
        }
        prop_assert!(results[0] == results[1]);
    }

    /// Arbitrary bytes neither panic nor make memory grow.
    #[test]
    fn noise_is_survived(noise in proptest::collection::vec(any::<u8>(), 0..300), piece in 1usize..50) {
        for form in FORMS {
            let magic = encode(form, &request(0, 0, 0, 0, 0), &[]);
            let input = [&magic[..4], &noise].concat();
            let (mut session, mut disk) = (Session::new(with_contexts(form)), Disk::new());
            drive(&mut session, &mut disk, &input, piece);
            session.close_input();
            prop_assert!(session.is_finished());
        }
    }
}
