//! The clients: what they have asked, what they were told, and whether both can be true.
//!
//! A record of the log is taken in only when it is the effect of requests that are open: right
//! disk, right blocks, and exactly the bytes that the request has for them over what they held
//! before. So the order of the log is the order in which the requests took effect, and everything
//! else (reads, floors of what must survive) is judged by LSN.

use super::attribution::Shared;
use super::content;
use super::model::LogModel;
use afterimage_format::ids::{BLOCK_SIZE, DiskIndex};
use afterimage_proxy::engine::request::{Reply, ReplyBody, Request as EngineRequest, RequestError};
use afterimage_proxy::io::sim::SimRng;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

const BLOCK: u64 = BLOCK_SIZE as u64;
const SECTOR: usize = 512;

/// What a client asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ask {
    /// Content number.
    Write(u64),
    /// Zeroes; trim or not.
    Zero {
        /// As TRIM.
        trim: bool,
        /// Keep the space.
        no_hole: bool,
    },
    /// Everything answered before is to be durable.
    Flush,
    /// Read.
    Read,
}

/// A request, on its way for the first time or again.
#[derive(Clone, Debug)]
pub struct Request {
    /// What.
    pub ask: Ask,
    /// Which disk.
    pub disk: usize,
    /// Where, in bytes.
    pub range: Range<u64>,
    /// Only when durable.
    pub fua: bool,
    /// Connection it belongs to.
    pub connection: usize,
}

impl Request {
    pub(super) fn changes(&self) -> bool {
        matches!(self.ask, Ask::Write(_) | Ask::Zero { .. })
    }
}

/// A request that the engine has.
pub(super) struct Open {
    pub(super) request: Request,
    /// What no record has brought yet.
    pub(super) left: Vec<Range<u64>>,
    /// Record that brought the last of it.
    pub(super) last: u64,
    /// Last record when it was submitted.
    since: u64,
    /// For a flush: what must be durable when it is answered.
    must: u64,
    /// The client has gone; nobody hears the answer.
    orphan: bool,
    turn: u64,
}

/// A connection: one disk, some requests in flight.
struct Connection {
    disk: usize,
    in_flight: usize,
    /// Sent and not answered when the connection broke: to be sent again, in this order.
    again: VecDeque<Request>,
}

/// All clients of a group.
pub struct Clients {
    connections: Vec<Connection>,
    depth: usize,
    unaligned: bool,
    pub(super) open: BTreeMap<u64, Open>,
    pub(super) shared: Vec<Shared>,
    next_id: u64,
    next_value: u64,
    /// New requests that are still to be made.
    pub left: usize,
    /// Last record of a change that was answered.
    pub answered: u64,
    /// Last record that a FLUSH, a FUA or `ack = "durable"` has promised for good.
    pub flushed: u64,
    /// Answers so far.
    pub answers: u64,
    /// Requests may fail: something is broken that they need.
    pub may_fail: bool,
    /// A write to a backing fails and leaves some of its sectors.
    pub may_tear: bool,
    /// Every answer is durable.
    pub ack_durable: bool,
}

impl Clients {
    /// Clients with a number of requests to make.
    #[must_use]
    pub fn new(rng: &mut SimRng, sizes: &[u64], requests: usize, ack_durable: bool) -> Self {
        let mut connections = Vec::new();
        for disk in 0..sizes.len() {
            for _ in 0..1 + rng.below(3) {
                connections.push(Connection {
                    disk,
                    in_flight: 0,
                    again: VecDeque::new(),
                });
            }
        }
        Self {
            connections,
            depth: 1 + rng.below(4) as usize,
            unaligned: rng.chance(5000),
            open: BTreeMap::new(),
            shared: Vec::new(),
            next_id: 0,
            next_value: 0,
            left: requests,
            answered: 0,
            flushed: 0,
            answers: 0,
            may_fail: false,
            may_tear: false,
            ack_durable,
        }
    }

    /// Number of connections.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Whether everything was asked and answered.
    #[must_use]
    pub fn done(&self) -> bool {
        self.left == 0
            && self.open.is_empty()
            && self.connections.iter().all(|one| one.again.is_empty())
    }

    /// Requests the engine has not answered.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.open.len()
    }

    /// The turn in which the oldest open request was submitted.
    #[must_use]
    pub fn oldest(&self) -> Option<(u64, String)> {
        let oldest = self.open.values().min_by_key(|open| open.turn)?;
        Some((oldest.turn, format!("{:?}", oldest.request)))
    }

    /// The next request of some connection that may have one more.
    pub fn next(&mut self, rng: &mut SimRng, sizes: &[u64]) -> Option<Request> {
        let at = rng.below(self.connections.len() as u64) as usize;
        let connection = &mut self.connections[at];
        if connection.in_flight >= self.depth {
            return None;
        }
        // A client that reconnects sends again what was not answered, before anything new. Its
        // dead connection's requests are over by then.
        let gone = self
            .open
            .values()
            .any(|open| open.orphan && open.request.connection == at);
        if gone {
            return None;
        }
        if let Some(request) = connection.again.pop_front() {
            return Some(request);
        }
        if self.left == 0 {
            return None;
        }
        let disk = connection.disk;
        let request = self.invent(rng, at, disk, sizes[disk])?;
        self.left -= 1;
        Some(request)
    }

    fn invent(
        &mut self,
        rng: &mut SimRng,
        connection: usize,
        disk: usize,
        size: u64,
    ) -> Option<Request> {
        let grain = match rng.below(10) {
            0..=4 => BLOCK,
            5..=7 => 512,
            _ if self.unaligned => 1,
            _ => 512,
        };
        let places = size / grain;
        let first = rng.below(places.max(1)) * grain;
        let most = (size - first).min(match rng.below(10) {
            0 => 24 * BLOCK,
            1..=3 => 4 * BLOCK,
            _ => 2 * BLOCK,
        });
        let len = (1 + rng.below(most.div_ceil(grain))) * grain;
        let range = first..(first + len).min(size);
        let ask = match rng.below(12) {
            0..=5 => {
                self.next_value += 1;
                Ask::Write(self.next_value)
            }
            6 => Ask::Zero {
                trim: true,
                no_hole: false,
            },
            7 => Ask::Zero {
                trim: false,
                no_hole: rng.chance(5000),
            },
            8..=9 => Ask::Flush,
            _ => Ask::Read,
        };
        let zero = |ask: &Ask| matches!(ask, Ask::Zero { .. });
        if zero(&ask) {
            // Two zeroings of one place at a time could not be told apart.
            let again = self.connections.iter().flat_map(|one| &one.again);
            let open = self.open.values().map(|open| &open.request).chain(again);
            let overlaps = |other: &Request| {
                zero(&other.ask)
                    && other.disk == disk
                    && other.range.start / BLOCK < range.end.div_ceil(BLOCK)
                    && range.start / BLOCK < other.range.end.div_ceil(BLOCK)
            };
            if open.into_iter().any(overlaps) {
                return None;
            }
        }
        Some(Request {
            ask,
            disk,
            range: if ask == Ask::Flush { 0..0 } else { range },
            fua: rng.chance(1500),
            connection,
        })
    }

    /// The engine gets a request: its number and the request in the engine's words.
    pub fn sent<'a>(
        &mut self,
        request: Request,
        data: &'a mut Vec<u8>,
        head: u64,
        turn: u64,
    ) -> (u64, DiskIndex, EngineRequest<'a>) {
        self.next_id += 1;
        self.connections[request.connection].in_flight += 1;
        let (offset, len) = (request.range.start, request.range.end - request.range.start);
        let disk = DiskIndex(request.disk as u16);
        let asked = match request.ask {
            Ask::Write(value) => {
                data.resize(len as usize, 0);
                content::fill(value, offset, data);
                EngineRequest::Write {
                    offset,
                    data,
                    fua: request.fua,
                }
            }
            Ask::Zero { trim: true, .. } => EngineRequest::Trim {
                offset,
                len,
                fua: request.fua,
            },
            Ask::Zero { no_hole, .. } => EngineRequest::WriteZeroes {
                offset,
                len,
                fua: request.fua,
                no_hole,
            },
            Ask::Flush => EngineRequest::Flush,
            Ask::Read => EngineRequest::Read {
                offset,
                len: len as u32,
            },
        };
        let left = if request.changes() {
            vec![request.range.clone()]
        } else {
            Vec::new()
        };
        self.open.insert(
            self.next_id,
            Open {
                left,
                last: 0,
                since: head,
                must: self.answered,
                orphan: false,
                turn,
                request,
            },
        );
        (self.next_id, disk, asked)
    }

    /// The engine answers.
    ///
    /// # Errors
    /// In words: the answer is wrong.
    pub fn answer(&mut self, reply: &Reply, model: &LogModel) -> Result<(), String> {
        if self.open.contains_key(&reply.id.0) {
            self.claim_missing(reply.id.0);
        }
        let open = self.open.remove(&reply.id.0);
        let waiting = &self.open;
        self.shared
            .retain(|shared| waiting.contains_key(&shared.owner));
        let open = open.ok_or_else(|| format!("request {} is answered twice", reply.id.0))?;
        let request = &open.request;
        self.answers += 1;
        if !open.orphan {
            self.connections[request.connection].in_flight -= 1;
        }
        let body = match &reply.result {
            Ok(body) => body,
            Err(error) => {
                if self.may_fail && *error != RequestError::Invalid {
                    return Ok(());
                }
                return Err(format!(
                    "{request:?} failed with {error:?} though nothing is broken"
                ));
            }
        };
        if let ReplyBody::Data { buffer, start, len } = body {
            let data = &buffer[*start..*start + *len];
            return check_read(&open, data, model, self.may_tear);
        }
        if request.ask == Ask::Flush {
            if !open.orphan {
                self.flushed = self.flushed.max(open.must);
            }
            return Ok(());
        }
        if !open.left.is_empty() {
            return Err(format!(
                "{request:?} was answered, but no record has {:?}",
                open.left
            ));
        }
        if open.orphan {
            // Nobody heard it.
            return Ok(());
        }
        self.answered = self.answered.max(open.last);
        if request.fua || self.ack_durable {
            self.flushed = self.flushed.max(open.last);
        }
        Ok(())
    }

    /// A client goes away with its requests in flight and comes back. How many it had.
    pub fn disconnect(&mut self, connection: usize) -> usize {
        let mut count = 0;
        for open in self.open.values_mut() {
            if open.request.connection == connection && !open.orphan {
                open.orphan = true;
                self.connections[connection]
                    .again
                    .push_back(open.request.clone());
                count += 1;
            }
        }
        self.connections[connection].in_flight = 0;
        count
    }

    /// The process that had the open requests is gone. Called when every record of it that
    /// survived was taken in. Clients that live on (`survive`) send again what was not answered.
    pub fn process_gone(&mut self, survive: bool) {
        self.shared.clear();
        for open in std::mem::take(&mut self.open).into_values() {
            if !open.orphan && survive {
                self.connections[open.request.connection]
                    .again
                    .push_back(open.request);
            }
        }
        for connection in &mut self.connections {
            connection.in_flight = 0;
            if !survive {
                connection.again.clear();
            }
        }
    }
}

/// Every block of a read was so at some moment between question and answer. A write that fails on
/// its way to the disk leaves some of its sectors, and a read beside it may find them: then
/// (`torn`) that holds for every sector.
fn check_read(open: &Open, data: &[u8], model: &LogModel, torn: bool) -> Result<(), String> {
    let request = &open.request;
    let range = &request.range;
    if data.len() as u64 != range.end - range.start {
        return Err(format!("{request:?} brought {} bytes", data.len()));
    }
    for block in range.start / BLOCK..range.end.div_ceil(BLOCK) {
        let from = range.start.max(block * BLOCK);
        let to = range.end.min((block + 1) * BLOCK);
        let part = &data[(from - range.start) as usize..(to - range.start) as usize];
        let at = (from - block * BLOCK) as usize;
        let place = (request.disk, block);
        let was = |at, part: &[u8]| model.was(place, at, part, open.since, model.head);
        let sectors_were = || {
            let first = part.len().min(SECTOR - at % SECTOR);
            let (first, rest) = part.split_at(first);
            was(at, first)
                && (0..)
                    .zip(rest.chunks(SECTOR))
                    .all(|(index, sector)| was(at + first.len() + index * SECTOR, sector))
        };
        if !(was(at, part) || torn && sectors_were()) {
            return Err(format!(
                "{request:?}, asked at record {} and answered at {}, has in block {block} what was not there then",
                open.since, model.head
            ));
        }
    }
    Ok(())
}
