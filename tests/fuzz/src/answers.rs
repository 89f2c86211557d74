//! An NBD client that remembers what it said and heard, and judges it at the end, by the protocol
//! alone.

use crate::session::SIZE;
use afterimage_format::nbd::constants::{REPLY_FLAG_DONE, chunk, cmd, cmd_flag};
use afterimage_format::nbd::reply::{ReplyForm, ReplyHeader, decode_header};
use afterimage_format::nbd::request::RequestHeader;
use afterimage_proxy::engine::request::Request;
use afterimage_proxy::nbd::session::SessionConfig;
use std::collections::HashMap;

/// A request as the storage got it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Served {
    command: u16,
    fua: bool,
    offset: u64,
    length: u64,
    /// CRC32C of a WRITE's payload.
    content: u32,
}

/// One side of a connection.
pub(crate) struct Client {
    pub(crate) form: ReplyForm,
    read_only: bool,
    ack_durable: bool,
    /// Whether metadata contexts were selected.
    contexts: bool,
    /// What the server has used up.
    pub(crate) said: Vec<u8>,
    heard: Vec<u8>,
    served: Vec<Served>,
    cookies: u64,
}

/// A request of which every byte was used up.
struct Asked {
    header: RequestHeader,
    content: u32,
}

impl Client {
    pub(crate) fn new(config: &SessionConfig) -> Self {
        Self {
            form: config.form,
            read_only: config.read_only,
            ack_durable: config.ack_durable,
            contexts: !config.contexts.is_empty(),
            said: Vec::new(),
            heard: Vec::new(),
            served: Vec::new(),
            cookies: 0x1000,
        }
    }

    pub(crate) fn new_cookie(&mut self) -> u64 {
        self.cookies += 1;
        self.cookies
    }

    pub(crate) fn hear(&mut self, bytes: &[u8]) {
        self.heard.extend_from_slice(bytes);
    }

    /// The storage was given a request.
    pub(crate) fn handed_on(&mut self, request: &Request<'_>) {
        let served = |command, fua, offset, length| Served {
            command,
            fua,
            offset,
            length,
            content: 0,
        };
        self.served.push(match *request {
            Request::Read { offset, len } => served(cmd::READ, false, offset, len.into()),
            Request::Write { offset, data, fua } => Served {
                content: crc(data),
                ..served(cmd::WRITE, fua, offset, data.len() as u64)
            },
            Request::Flush => served(cmd::FLUSH, false, 0, 0),
            Request::Trim { offset, len, fua } => served(cmd::TRIM, fua, offset, len),
            Request::WriteZeroes {
                offset, len, fua, ..
            } => served(cmd::WRITE_ZEROES, fua, offset, len),
            Request::BlockStatus { offset, len, .. } => {
                served(cmd::BLOCK_STATUS, false, offset, len)
            }
        });
    }

    /// The requests that came whole, in order.
    fn asked(&self) -> Vec<Asked> {
        let extended = self.form == ReplyForm::Extended;
        let mut asked = Vec::new();
        let mut rest = &self.said[..];
        while let Ok(header) = RequestHeader::decode(rest, extended) {
            rest = &rest[RequestHeader::bytes(extended)..];
            let marked = extended && header.flags & cmd_flag::PAYLOAD_LEN != 0;
            let payload = match header.command {
                cmd::DISC => break,
                cmd::WRITE => header.length,
                _ if marked => header.length,
                _ => 0,
            };
            let Some((payload, left)) = usize::try_from(payload)
                .ok()
                .and_then(|len| rest.split_at_checked(len))
            else {
                break;
            };
            rest = left;
            let content = match header.command {
                cmd::WRITE => crc(payload),
                _ => 0,
            };
            asked.push(Asked { header, content });
        }
        asked
    }

    /// The end of the connection. A dead client has heard a part, perhaps.
    pub(crate) fn judge(self, dead: bool) {
        let asked = self.asked();
        self.judge_served(&asked);
        let mut times: HashMap<u64, usize> = HashMap::new();
        for one in &asked {
            *times.entry(one.header.cookie).or_default() += 1;
        }
        let twice = times.values().any(|times| *times > 1);
        // Whether data follows a simple reply is known by its cookie alone.
        if twice && self.form == ReplyForm::Simple {
            return;
        }
        let by_cookie: HashMap<u64, &RequestHeader> = asked
            .iter()
            .map(|one| (one.header.cookie, &one.header))
            .collect();
        let mut answered: HashMap<u64, usize> = HashMap::new();
        let mut rest = &self.heard[..];
        while !rest.is_empty() {
            let Some((reply, len)) = decode_header(rest) else {
                assert!(dead, "no reply where one should begin");
                return;
            };
            assert_eq!(reply.form, self.form);
            let request = by_cookie.get(&reply.cookie);
            let request = request.expect("an answer to a question");
            let body = body_bytes(&reply, request);
            let Some((body, left)) = rest[len..].split_at_checked(body) else {
                assert!(dead, "an answer that is cut");
                return;
            };
            rest = left;
            if !twice {
                judge_body(&reply, body, request);
            }
            if reply.form == ReplyForm::Simple || reply.flags & REPLY_FLAG_DONE != 0 {
                *answered.entry(reply.cookie).or_default() += 1;
            } else {
                let ended = answered.get(&reply.cookie).is_some_and(|times| *times > 0);
                assert!(twice || !ended, "a chunk after the last");
            }
        }
        for (cookie, count) in &answered {
            assert!(*count <= times[cookie], "answered more often than asked");
        }
        // The last may wait for room when the connection ends.
        let waiting = asked.last().map(|one| one.header.cookie);
        for (cookie, times) in times.iter().filter(|_| !dead) {
            let count = answered.get(cookie).copied().unwrap_or_default();
            let may_wait = usize::from(waiting == Some(*cookie));
            assert!(count + may_wait >= *times, "a question without an answer");
        }
    }

    /// What the storage got is what was asked and is good, all of it and in order.
    fn judge_served(&self, asked: &[Asked]) {
        let mut served = self.served.iter();
        let good = asked.iter().filter(|one| self.is_good(&one.header));
        for one in good {
            let header = &one.header;
            let wanted = Served {
                command: header.command,
                fua: changes(header) && (self.ack_durable || header.flags & cmd_flag::FUA != 0),
                offset: header.offset,
                length: header.length,
                content: one.content,
            };
            match served.next() {
                Some(served) => assert_eq!(*served, wanted, "not what was asked: {header:?}"),
                // The last may wait for room when the connection ends.
                None => assert_eq!(Some(header), asked.last().map(|one| &one.header)),
            }
        }
        assert_eq!(served.next(), None, "served what nobody may ask for");
    }

    /// Whether the storage is to get a request, by the words of the protocol.
    fn is_good(&self, header: &RequestHeader) -> bool {
        let (structured, extended) = (
            self.form != ReplyForm::Simple,
            self.form == ReplyForm::Extended,
        );
        let flags = cmd_flag::FUA
            | match header.command {
                cmd::READ if structured => cmd_flag::DF,
                cmd::WRITE if extended => cmd_flag::PAYLOAD_LEN,
                cmd::WRITE_ZEROES => cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO,
                cmd::BLOCK_STATUS if self.contexts => cmd_flag::REQ_ONE,
                cmd::READ | cmd::WRITE | cmd::TRIM => 0,
                cmd::FLUSH => {
                    return header.flags & !cmd_flag::FUA == 0
                        && (header.offset, header.length) == (0, 0);
                }
                _ => return false,
            };
        let end = header.offset.checked_add(header.length);
        header.flags & !flags == 0
            && header.length > 0
            && end.is_some_and(|end| end <= SIZE)
            && !(changes(header) && self.read_only)
    }
}

fn changes(header: &RequestHeader) -> bool {
    matches!(header.command, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES)
}

fn crc(bytes: &[u8]) -> u32 {
    afterimage_format::checksum::crc32c(bytes)
}

/// Bytes that follow a reply's header.
fn body_bytes(reply: &ReplyHeader, request: &RequestHeader) -> usize {
    match reply.form {
        ReplyForm::Simple if reply.errno == 0 && request.command == cmd::READ => {
            request.length as usize
        }
        ReplyForm::Simple => 0,
        _ => reply.length as usize,
    }
}

fn judge_body(reply: &ReplyHeader, body: &[u8], request: &RequestHeader) {
    let number = |bytes: &[u8]| bytes.iter().fold(0u64, |n, byte| n << 8 | u64::from(*byte));
    let done = reply.flags & REPLY_FLAG_DONE != 0;
    if reply.form == ReplyForm::Simple {
        return;
    }
    assert_eq!(reply.flags & !REPLY_FLAG_DONE, 0);
    if reply.form == ReplyForm::Extended {
        assert_eq!(reply.offset, request.offset);
    }
    match reply.kind {
        chunk::NONE => {
            assert!(done && body.is_empty());
            let silent = request.command == cmd::READ || request.command == cmd::BLOCK_STATUS;
            assert!(!silent || request.length == 0, "an answer without content");
        }
        chunk::ERROR => {
            assert!(done && number(&body[..4]) != 0);
            assert_eq!(number(&body[4..6]) as usize, body.len() - 6);
            assert!(std::str::from_utf8(&body[6..]).is_ok());
        }
        chunk::OFFSET_DATA => {
            assert!(done && request.command == cmd::READ);
            assert_eq!(number(&body[..8]), request.offset);
            assert_eq!(body.len() as u64 - 8, request.length);
        }
        chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT => {
            let extended = reply.form == ReplyForm::Extended;
            assert_eq!(reply.kind == chunk::BLOCK_STATUS_EXT, extended);
            assert_eq!(request.command, cmd::BLOCK_STATUS);
            let (head, each, half) = if extended { (8, 16, 8) } else { (4, 8, 4) };
            let (head, extents) = body.split_at(head);
            assert_eq!(done, number(&head[..4]) == 2, "the last context ends it");
            assert!(!extents.is_empty() && extents.len().is_multiple_of(each));
            if extended {
                assert_eq!(number(&head[4..]) as usize, extents.len() / each);
            }
            let lengths = extents.chunks(each).map(|one| number(&one[..half]));
            assert!(lengths.clone().all(|length| length > 0));
            assert!(
                lengths.sum::<u64>() <= request.length,
                "beyond the question"
            );
            let one = request.flags & cmd_flag::REQ_ONE != 0;
            assert!(!one || extents.len() == each, "more than one extent");
        }
        other => panic!("a chunk of kind {other:#x}"),
    }
}
