//! Writes, trims and zeroings of clients, and the owner's events: cut into parts, one record each.
//!
//! A part goes straight into the ring if it can. Otherwise it waits with a copy of its payload: for
//! room, in the order of arrival, or for what its ragged edges must be merged with
//! (`sub_block.rs`). A request is answered when its last part is in. Always holds: a part's LSN is
//! given, its edges are merged and its record is published in one go.

use super::append::RecordSpec;
use super::event::{EngineEvent, EventRecord, Ticket};
use super::request::{Now, ReplyBody, RequestError, RequestId};
use super::ring::byte_offset;
use super::waiters::Waiter;
use super::{Ack, Engine};
use crate::io::Storage;
use crate::io::buffer::AlignedBuffer;
use afterimage_format::ids::{BLOCK_SHIFT, BLOCK_SIZE, DiskIndex, Lsn};
use afterimage_format::op::Op;
use slab::Slab;
use std::collections::VecDeque;

const BLOCK: u64 = BLOCK_SIZE as u64;
/// Most blocks of one zeroing record.
const ZERO_BLOCKS_MAX: u64 = 1 << 31;

#[derive(Debug, Default)]
pub(super) struct Writes {
    requests: Slab<OpenRequest>,
    pub(super) parts: Slab<Part>,
    /// Parts that wait for room in the ring, oldest first.
    queue: VecDeque<usize>,
    /// Bytes of payload copies in `parts`.
    pub(super) waiting_bytes: usize,
    stalled_since: Option<u64>,
}

impl Writes {
    pub(super) fn waits_for_room(&self) -> bool {
        !self.queue.is_empty()
    }

    pub(super) fn is_idle(&self) -> bool {
        self.parts.is_empty()
    }

    /// A part whose edges are there goes before all that came after it.
    pub(super) fn requeue(&mut self, part: usize) {
        self.queue.push_front(part);
    }
}

/// A request with parts that wait.
#[derive(Debug)]
struct OpenRequest {
    id: RequestId,
    parts_left: u32,
    fua: bool,
    last: Lsn,
    error: Option<RequestError>,
}

/// What waits, and will be one record.
#[derive(Debug)]
pub(super) struct Part {
    owner: Owner,
    what: What,
    /// Blocks whose backing content this part needs, one for each ragged edge.
    pub(super) edges: [Option<(DiskIndex, u64)>; 2],
    /// Reads of such content that have not ended.
    pub(super) edges_awaited: u8,
}

#[derive(Clone, Copy, Debug)]
enum Owner {
    Request(usize),
    Event(Ticket),
}

#[derive(Debug)]
enum What {
    /// Bytes, with a copy of the payload; zeroes without.
    Bytes(ByteRange, Option<AlignedBuffer>),
    /// Whole blocks that read as zero.
    Zero(ZeroRange),
    Event(Box<EventRecord>),
}

/// Bytes of one disk within as many blocks as one record takes.
#[derive(Clone, Copy, Debug)]
struct ByteRange {
    disk: DiskIndex,
    offset: u64,
    len: usize,
}

#[derive(Clone, Copy, Debug)]
struct ZeroRange {
    disk: DiskIndex,
    first_block: u64,
    block_count: u32,
    hole: bool,
}

/// What became of an attempt to place a part.
enum Placed {
    Done(Lsn),
    NoRoom,
    /// The backing content of these blocks is needed first.
    NeedsEdges([Option<(DiskIndex, u64)>; 2]),
}

impl<S: Storage> Engine<S> {
    pub(super) fn submit_write(
        &mut self,
        now: Now,
        id: RequestId,
        disk: DiskIndex,
        offset: u64,
        data: &[u8],
        fua: bool,
    ) {
        if let Err(error) = self.accepts_writes() {
            self.reply(id, Err(error));
            return;
        }
        self.status.written_bytes += data.len() as u64;
        let mut request = Assembly::new(id, fua);
        let mut done = 0;
        while done < data.len() {
            let range = self.next_range(disk, offset + done as u64, data.len() - done);
            let bytes = &data[done..done + range.len];
            done += range.len;
            let placed = if self.must_queue() {
                Placed::NoRoom
            } else {
                self.place_bytes(now, range, Some(bytes))
            };
            if let Placed::Done(lsn) = placed {
                request.last = lsn;
                continue;
            }
            let mut copy = self.pool.take(range.len);
            copy.copy_from_slice(bytes);
            self.writes.waiting_bytes += range.len;
            self.keep_part(&mut request, What::Bytes(range, Some(copy)), placed);
        }
        self.finish_assembly(now, &request);
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of two requests")]
    pub(super) fn submit_zero(
        &mut self,
        now: Now,
        id: RequestId,
        disk: DiskIndex,
        offset: u64,
        len: u64,
        fua: bool,
        hole: bool,
    ) {
        if let Err(error) = self.accepts_writes() {
            self.reply(id, Err(error));
            return;
        }
        let mut request = Assembly::new(id, fua);
        let end = offset + len;
        let whole_end = if end == self.disk_sizes[usize::from(disk.0)] {
            end.next_multiple_of(BLOCK)
        } else {
            end & !(BLOCK - 1)
        };
        let whole_start = offset.next_multiple_of(BLOCK);
        if whole_start >= whole_end {
            self.zero_bytes(now, &mut request, disk, offset..end);
        } else {
            self.zero_bytes(now, &mut request, disk, offset..whole_start);
            let mut block = whole_start >> BLOCK_SHIFT;
            let end_block = whole_end >> BLOCK_SHIFT;
            while block < end_block {
                let count = (end_block - block).min(ZERO_BLOCKS_MAX);
                let range = ZeroRange {
                    disk,
                    first_block: block,
                    block_count: u32::try_from(count).expect("bounded just above"),
                    hole,
                };
                block += count;
                let placed = if self.must_queue() {
                    Placed::NoRoom
                } else {
                    self.place_zero(now, range)
                };
                match placed {
                    Placed::Done(lsn) => request.last = lsn,
                    other => self.keep_part(&mut request, What::Zero(range), other),
                }
            }
            self.zero_bytes(now, &mut request, disk, whole_end.min(end)..end);
        }
        self.finish_assembly(now, &request);
    }

    /// Zeroes within blocks: merged with what the blocks hold.
    fn zero_bytes(
        &mut self,
        now: Now,
        request: &mut Assembly,
        disk: DiskIndex,
        mut bytes: std::ops::Range<u64>,
    ) {
        while bytes.start < bytes.end {
            let left = usize::try_from(bytes.end - bytes.start).unwrap_or(usize::MAX);
            let range = self.next_range(disk, bytes.start, left);
            bytes.start += range.len as u64;
            let placed = if self.must_queue() {
                Placed::NoRoom
            } else {
                self.place_bytes(now, range, None)
            };
            match placed {
                Placed::Done(lsn) => request.last = lsn,
                other => self.keep_part(request, What::Bytes(range, None), other),
            }
        }
    }

    /// An event's record, now or when there is room.
    pub(super) fn submit_event(&mut self, now: Now, ticket: Ticket, event: EventRecord) {
        if !self.must_queue()
            && let Placed::Done(lsn) = self.place_event(now, &event)
        {
            self.event_appended(ticket, lsn);
            return;
        }
        let part = self.writes.parts.insert(Part {
            owner: Owner::Event(ticket),
            what: What::Event(Box::new(event)),
            edges: [None; 2],
            edges_awaited: 0,
        });
        self.writes.queue.push_back(part);
    }

    fn event_appended(&mut self, ticket: Ticket, lsn: Lsn) {
        self.events.push(EngineEvent::Appended { ticket, lsn });
        self.waiters.push(lsn, Waiter::Event(ticket, lsn));
    }

    fn accepts_writes(&self) -> Result<(), RequestError> {
        if self.command.draining() {
            return Err(RequestError::ShuttingDown);
        }
        if let Some(error) = self.refuses_for_a_backing() {
            return Err(error);
        }
        self.failure.durability()
    }

    /// Nothing overtakes what waits for room; while a log that failed is being detached everything
    /// waits.
    fn must_queue(&self) -> bool {
        self.writes.waits_for_room() || self.failure.detaching()
    }

    /// As much of the bytes as one record takes.
    fn next_range(&self, disk: DiskIndex, offset: u64, len: usize) -> ByteRange {
        let most = u64::from(self.record_blocks_max) * BLOCK - offset % BLOCK;
        ByteRange {
            disk,
            offset,
            len: usize::try_from(most).map_or(len, |most| most.min(len)),
        }
    }

    fn keep_part(&mut self, request: &mut Assembly, what: What, placed: Placed) {
        let slot = *request.slot.get_or_insert_with(|| {
            self.writes.requests.insert(OpenRequest {
                id: request.id,
                parts_left: 0,
                fua: request.fua,
                last: Lsn::ZERO,
                error: None,
            })
        });
        self.writes.requests[slot].parts_left += 1;
        let part = self.writes.parts.insert(Part {
            owner: Owner::Request(slot),
            what,
            edges: [None; 2],
            edges_awaited: 0,
        });
        match placed {
            Placed::NeedsEdges(edges) => self.await_edges(part, edges),
            Placed::NoRoom | Placed::Done(_) => self.writes.queue.push_back(part),
        }
    }

    fn finish_assembly(&mut self, now: Now, request: &Assembly) {
        if let Some(slot) = request.slot {
            let open = &mut self.writes.requests[slot];
            open.last = open.last.max(request.last);
            if self.writes.waits_for_room() && self.writes.stalled_since.is_none() {
                self.writes.stalled_since = Some(now.monotonic_ns);
            }
            return;
        }
        self.answer_write(request.id, request.last, request.fua);
    }

    /// All of a write is in the ring.
    fn answer_write(&mut self, id: RequestId, last: Lsn, fua: bool) {
        let durable = fua || self.config.ack == Ack::Durable || self.failure.detached();
        if durable && last > self.stable() {
            // Waiters stand in the order of LSNs: other parts may have come in since.
            self.waiters.push(self.ring.appended(), Waiter::Request(id));
        } else {
            self.reply(id, Ok(ReplyBody::Done));
        }
    }

    /// Places what waits for room, in order.
    pub(super) fn pump_writes(&mut self, now: Now) {
        if self.failure.detaching() {
            return;
        }
        while let Some(slot) = self.writes.queue.pop_front() {
            let part = &mut self.writes.parts[slot];
            let what = std::mem::replace(
                &mut part.what,
                What::Zero(ZeroRange {
                    disk: DiskIndex(0),
                    first_block: 0,
                    block_count: 0,
                    hole: false,
                }),
            );
            let placed = match &what {
                What::Bytes(range, data) => self.place_bytes(now, *range, data.as_deref()),
                What::Zero(range) => self.place_zero(now, *range),
                What::Event(event) => self.place_event(now, event),
            };
            self.writes.parts[slot].what = what;
            match placed {
                Placed::Done(lsn) => self.part_done(slot, Ok(lsn)),
                Placed::NeedsEdges(edges) => self.await_edges(slot, edges),
                Placed::NoRoom => {
                    if let Some(error) = self.no_room_error(now) {
                        self.fail_part(slot, error);
                        continue;
                    }
                    self.writes.queue.push_front(slot);
                    break;
                }
            }
        }
        self.account_stall(now);
    }

    fn account_stall(&mut self, now: Now) {
        match (self.writes.waits_for_room(), self.writes.stalled_since) {
            (true, None) => self.writes.stalled_since = Some(now.monotonic_ns),
            (false, Some(since)) => {
                self.status.stall_ns += now.monotonic_ns.saturating_sub(since);
                self.writes.stalled_since = None;
            }
            _ => {}
        }
    }

    /// A part will never be placed.
    pub(super) fn fail_part(&mut self, slot: usize, error: RequestError) {
        self.part_done(slot, Err(error));
    }

    /// Every part that waits fails (the log is gone).
    pub(super) fn fail_all_parts(&mut self, error: RequestError) {
        self.writes.queue.clear();
        let slots: Vec<usize> = self.writes.parts.iter().map(|(slot, _)| slot).collect();
        for slot in slots {
            self.fail_part(slot, error);
        }
    }

    fn part_done(&mut self, slot: usize, result: Result<Lsn, RequestError>) {
        let part = self.writes.parts.remove(slot);
        self.leave_edges(slot, part.edges);
        if let What::Bytes(range, Some(copy)) = part.what {
            self.writes.waiting_bytes -= range.len;
            self.pool.give(copy);
        }
        let owner = match part.owner {
            Owner::Event(ticket) => {
                match result {
                    Ok(lsn) => self.event_appended(ticket, lsn),
                    Err(_) => {
                        let error = self.failure.command_error();
                        self.events.push(EngineEvent::Failed { ticket, error });
                    }
                }
                return;
            }
            Owner::Request(owner) => owner,
        };
        let request = &mut self.writes.requests[owner];
        request.parts_left -= 1;
        match result {
            Ok(lsn) => request.last = request.last.max(lsn),
            Err(error) => request.error = request.error.or(Some(error)),
        }
        if request.parts_left > 0 {
            return;
        }
        let request = self.writes.requests.remove(owner);
        match request.error {
            Some(error) => self.reply(request.id, Err(error)),
            None => self.answer_write(request.id, request.last, request.fua),
        }
    }

    fn place_zero(&mut self, now: Now, range: ZeroRange) -> Placed {
        let Some(ring_block) = self.reserve(now, 0) else {
            return Placed::NoRoom;
        };
        let spec = RecordSpec {
            op: if range.hole { Op::Trim } else { Op::Zero },
            disk: range.disk,
            first_block: range.first_block,
            block_count: range.block_count,
            payload_blocks: 0,
            aux: 0,
        };
        Placed::Done(self.publish(now, ring_block, spec))
    }

    fn place_event(&mut self, now: Now, event: &EventRecord) -> Placed {
        let payload_blocks = u32::from(!event.body.is_empty());
        let Some(ring_block) = self.reserve(now, payload_blocks) else {
            return Placed::NoRoom;
        };
        if payload_blocks > 0 {
            let body = self.storage.ring_mut(byte_offset(ring_block), BLOCK_SIZE);
            body[..event.body.len()].copy_from_slice(&event.body);
            body[event.body.len()..].fill(0);
        }
        let spec = RecordSpec {
            op: event.op,
            disk: event.disk,
            first_block: event.first_block,
            block_count: event.block_count,
            payload_blocks,
            aux: event.aux,
        };
        Placed::Done(self.publish(now, ring_block, spec))
    }

    /// Bytes become a record of whole blocks: edges are merged with the newest version, the end of
    /// a disk that is no multiple of the block size is padded with zeroes.
    fn place_bytes(&mut self, now: Now, range: ByteRange, data: Option<&[u8]>) -> Placed {
        let ByteRange { disk, offset, len } = range;
        let end = offset + len as u64;
        let first_block = offset >> BLOCK_SHIFT;
        let last_block = (end - 1) >> BLOCK_SHIFT;
        let blocks = u32::try_from(last_block - first_block + 1).expect("a part is one record");
        let head = (offset % BLOCK) as usize;
        let tail = (end % BLOCK) as usize;
        let at_disk_end = end == self.disk_sizes[usize::from(disk.0)];
        let merge_head = head != 0;
        let merge_tail = tail != 0 && !at_disk_end;

        let mut missing = [None; 2];
        if merge_head && !self.edge_known(disk, first_block) {
            missing[0] = Some((disk, first_block));
        }
        if merge_tail
            && !(merge_head && last_block == first_block)
            && !self.edge_known(disk, last_block)
        {
            missing[1] = Some((disk, last_block));
        }
        if missing != [None; 2] {
            return Placed::NeedsEdges(missing);
        }
        let Some(ring_block) = self.reserve(now, blocks) else {
            return Placed::NoRoom;
        };
        let at = byte_offset(ring_block);
        if merge_head {
            self.copy_edge(disk, first_block, at, 0..head);
        }
        let tail_at = at + (blocks as usize - 1) * BLOCK_SIZE;
        if merge_tail {
            self.copy_edge(disk, last_block, tail_at, tail..BLOCK_SIZE);
        } else if tail != 0 {
            self.storage
                .ring_mut(tail_at + tail, BLOCK_SIZE - tail)
                .fill(0);
        }
        match data {
            Some(data) => self.storage.ring_write(at + head, data),
            None => self.storage.ring_mut(at + head, len).fill(0),
        }
        let spec = RecordSpec {
            op: Op::Write,
            disk,
            first_block,
            block_count: blocks,
            payload_blocks: blocks,
            aux: 0,
        };
        Placed::Done(self.publish(now, ring_block, spec))
    }
}

/// A request while its parts are made.
struct Assembly {
    id: RequestId,
    fua: bool,
    last: Lsn,
    slot: Option<usize>,
}

impl Assembly {
    fn new(id: RequestId, fua: bool) -> Self {
        Self {
            id,
            fua,
            last: Lsn::ZERO,
            slot: None,
        }
    }
}
