//! The state machine of one group: ring, log, block map, group commit, destage, recovery, passes.
//!
//! Single-threaded, without a runtime, a clock or randomness of its own: requests, completions and
//! the time go in; replies, events and storage operations come out. The driver's turn is: submit
//! what clients asked, complete what the storage finished, [`Engine::tick`] once, take replies and
//! events, sleep until [`Engine::next_deadline`] or news.
//!
//! A write's way through the files: [`write`](self) places it in the ring (`append`), `commit`
//! brings its frame to the log, `destage` to the backing, `trim` lets it leave the log. `read`
//! answers from ring and backing, `waiters` holds back what must be durable first.
//!
//! Always holds (design, section 3): nothing is destaged before the log is durable past it; a FLUSH
//! is answered only when the log is durable past every write answered before; a record leaves the
//! log only when the backings have it durably and every sink has it or is durably dirty; after the
//! first error of the log nothing is called durable any more.
#![deny(clippy::disallowed_methods)]

mod append;
pub mod block_map;
mod block_status;
pub mod blocking;
mod command;
mod commit;
pub mod config;
mod destage;
pub mod event;
mod failure;
pub mod log;
mod log_space;
mod pool;
mod read;
pub mod recovery;
mod redo;
pub mod request;
mod ring;
pub mod start;
mod sub_block;
#[cfg(test)]
mod tests;
mod token;
mod trim;
mod waiters;
mod write;
mod zero_map;

pub use command::DirtyChange;
pub use config::{Ack, EngineConfig, OnBackingError, OnLogError};
pub use event::{EngineError, EngineEvent, EventRecord, Ticket};
pub use start::{FrameInLog, LogStart};

use crate::io::buffer::AlignedBuffer;
use crate::io::{Completion, RingSpan, Source, Storage};
use afterimage_format::frame::payload_blocks_limit;
use afterimage_format::ids::{BootId, DiskIndex, Epoch, LogId, Lsn};
use block_map::BlockMap;
use log_space::{LogSpace, PlacedFrame};
use pool::BufferPool;
use request::{EngineStatus, LogProgress, Now, Reply, ReplyBody, Request, RequestError, RequestId};
use ring::{LogPlace, Ring};
use token::Purpose;
use waiters::{Waiter, Waiters};
use zero_map::ZeroMap;

/// Rounds of one tick; what is left then waits for the next.
const TICK_ROUNDS_MAX: usize = 8;

/// One group's engine.
#[derive(Debug)]
pub struct Engine<S> {
    storage: S,
    config: EngineConfig,
    log: LogId,
    boot: BootId,
    incarnation: u32,
    disk_sizes: Vec<u64>,
    /// Taken out of the group: their backings are not open.
    disks_removed: Vec<bool>,
    record_blocks_max: u32,

    ring: Ring,
    map: BlockMap,
    zeroes: ZeroMap,
    space: LogSpace,
    next_frame: u64,
    previous_crc: u32,

    commit: commit::Commit,
    destage: destage::Destage,
    redo: Option<redo::Redo>,
    trim: trim::Trim,
    writes: write::Writes,
    edges: sub_block::Edges,
    reads: read::Reads,
    questions: Vec<block_status::Question>,
    failure: failure::Failure,
    command: command::Commands,
    waiters: Waiters,
    pool: BufferPool,
    scratch: AlignedBuffer,
    /// Runs of ring memory of the write that is being put together.
    spans: Vec<RingSpan>,

    replies: Vec<Reply>,
    events: Vec<EngineEvent>,
    status: EngineStatus,
}

impl<S: Storage> Engine<S> {
    /// Takes over the storage of a group whose log is recovered.
    pub fn start(storage: S, start: LogStart, config: EngineConfig) -> Self {
        let superblock = start.superblock;
        let area = superblock.area_blocks;
        let payload_limit = payload_blocks_limit(u64::from(start.ring_blocks), area);
        let distance = |lap: u32, position: u64| u64::from(lap) * area + position;
        let mut space = LogSpace::new(
            area,
            distance(superblock.tail.lap, superblock.tail.position),
            distance(superblock.tail.lap, superblock.tail.position),
        );
        for frame in &start.frames {
            space.push(PlacedFrame {
                place: LogPlace {
                    distance: distance(frame.lap, frame.position),
                    position: frame.position,
                    lap: frame.lap,
                },
                blocks: u64::from(frame.blocks),
                number: frame.number,
                first_lsn: frame.first_lsn,
                last_lsn: frame.last_lsn,
                previous_crc: frame.previous_crc,
            });
        }
        debug_assert_eq!(space.head(), distance(start.lap, start.position));
        let durable = Lsn(start.next_lsn.0 - 1);
        let disk_sizes: Vec<u64> = superblock.disks.iter().map(|disk| disk.size).collect();
        let disks_removed = superblock.disks.iter().map(|disk| disk.removed).collect();
        let mut engine = Self {
            storage,
            config,
            log: superblock.log,
            boot: superblock.boot,
            incarnation: superblock.incarnation,
            record_blocks_max: payload_limit.min(afterimage_format::frame::RECORD_BLOCKS_MAX),
            ring: Ring::new(start.ring_blocks, payload_limit, start.next_lsn),
            map: BlockMap::with_capacity(start.ring_blocks as usize),
            zeroes: ZeroMap::new(disk_sizes.len()),
            space,
            next_frame: start.next_frame,
            previous_crc: start.previous_crc,
            commit: commit::Commit::new(durable),
            destage: destage::Destage::new(start.next_lsn, superblock.destaged, disk_sizes.len()),
            redo: None,
            trim: trim::Trim::new(superblock),
            writes: write::Writes::default(),
            edges: sub_block::Edges::default(),
            reads: read::Reads::default(),
            questions: Vec::new(),
            failure: failure::Failure::default(),
            command: command::Commands::default(),
            waiters: Waiters::default(),
            pool: BufferPool::default(),
            scratch: AlignedBuffer::new(afterimage_format::ids::BLOCK_SIZE),
            spans: Vec::with_capacity(crate::io::GATHER_SPANS_MAX),
            replies: Vec::with_capacity(256),
            events: Vec::new(),
            status: EngineStatus::default(),
            disk_sizes,
            disks_removed,
        };
        engine.store_durable();
        engine
    }

    /// Takes a request. Its answer comes with [`Engine::take_replies`], maybe at once. Call
    /// [`Engine::tick`] once after a batch of requests.
    pub fn submit(&mut self, now: Now, id: RequestId, disk: DiskIndex, request: Request<'_>) {
        self.status.requests_open += 1;
        match request {
            Request::Read { offset, len } => self.submit_read(id, disk, offset, len),
            Request::Write { offset, data, fua } => {
                self.submit_write(now, id, disk, offset, data, fua);
            }
            Request::Flush => self.submit_flush(id),
            Request::Trim { offset, len, fua } => {
                self.submit_zero(now, id, disk, offset, len, fua, true);
            }
            Request::WriteZeroes {
                offset,
                len,
                fua,
                no_hole,
            } => self.submit_zero(now, id, disk, offset, len, fua, !no_hole),
            Request::BlockStatus {
                offset,
                len,
                extents_max,
            } => self.submit_block_status(id, disk, offset, len, extents_max),
        }
    }

    /// Takes the end of a storage operation that this engine started.
    pub fn complete(&mut self, now: Now, completion: Completion) {
        let Completion {
            token,
            result,
            buffer,
        } = completion;
        match Purpose::of(token) {
            Some(Purpose::LogWrite) => self.log_written(now, result),
            Some(Purpose::LogSync) => self.log_synced(now, result),
            Some(Purpose::Superblock) => self.superblock_written(result, buffer),
            Some(Purpose::Destage(slot)) => self.destage_done(now, slot, result),
            Some(Purpose::BackingSync(disk)) => self.backing_synced(now, DiskIndex(disk), result),
            Some(Purpose::Read(slot)) => self.read_done(slot, result, buffer),
            Some(Purpose::Edge(slot)) => self.edge_read_done(slot, result, buffer),
            Some(Purpose::RedoRead) => self.redo_read_done(now, result, buffer),
            Some(Purpose::RedoWrite) => self.redo_write_done(now, result, buffer),
            None => debug_assert!(false, "a token that the engine never gave"),
        }
    }

    /// Starts whatever is due. Once per turn of the driver, after submits and completions.
    pub fn tick(&mut self, now: Now) {
        // What one of them frees another may wait for; a few rounds settle it.
        for _ in 0..TICK_ROUNDS_MAX {
            let before = self.progress_mark();
            self.pump_commands(now);
            self.pump_writes(now);
            self.pump_redo(now);
            self.pump_destage(now);
            self.pump_backing_sync(now);
            self.pump_commit(now);
            self.pump_trim();
            self.pump_detach(now);
            if self.progress_mark() == before {
                break;
            }
        }
        self.release_waiters();
    }

    /// Monotonic time at which [`Engine::tick`] has something to do without any news.
    #[must_use]
    pub fn next_deadline(&self) -> Option<u64> {
        [
            self.commit_deadline(),
            self.destage_deadline(),
            self.failure.marker_deadline(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Moves the answers that are there to the end of `replies`.
    pub fn take_replies(&mut self, replies: &mut Vec<Reply>) {
        replies.append(&mut self.replies);
    }

    /// Moves what the owner must know to the end of `events`.
    pub fn take_events(&mut self, events: &mut Vec<EngineEvent>) {
        events.append(&mut self.events);
    }

    /// Takes back the buffer of a reply.
    pub fn recycle(&mut self, buffer: AlignedBuffer) {
        self.pool.give(buffer);
    }

    /// The storage, for the driver to poll.
    pub fn storage_mut(&mut self) -> &mut S {
        &mut self.storage
    }

    /// Gives the storage back, when the engine is drained or its process is to end.
    #[must_use]
    pub fn into_storage(self) -> S {
        self.storage
    }

    /// The group's durable cursor over its log.
    #[must_use]
    pub fn progress(&self) -> LogProgress {
        LogProgress {
            durable: self.commit.durable,
            appended: self.ring.appended(),
            oldest: self.space.oldest().unwrap_or(self.ring.appended().next()),
            epoch: self.epoch(),
            log_fill_percent: self.log_fill_percent(),
        }
    }

    fn log_fill_percent(&self) -> u8 {
        let full = trim::pressure_from(self.space.area_blocks()).max(1);
        (self.space.used_blocks() * 100 / full).min(100) as u8
    }

    /// Epoch under which records are written.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.trim.superblock().epoch
    }

    /// Whether the caller had better take no more writes: too much payload waits already.
    #[must_use]
    pub fn congested(&self) -> bool {
        self.writes.waiting_bytes > self.config.waiting_bytes_max
    }

    /// Whether an answer waits for a device: a read of a backing, a sync of the log. That takes
    /// longer than a driver should spin.
    #[must_use]
    pub fn waits_for_device(&self) -> bool {
        self.reads.in_flight() > 0 || self.waiters.len() > 0
    }

    /// Counters and levels as of now.
    #[must_use]
    pub fn status(&self) -> EngineStatus {
        const BLOCK: u64 = afterimage_format::ids::BLOCK_SIZE as u64;
        EngineStatus {
            progress: self.progress(),
            destaged: self.destage.destaged,
            synced: self.destage.synced,
            ring_bytes: u64::from(self.ring.area_blocks()) * BLOCK,
            ring_bytes_used: u64::from(self.ring.used_blocks()) * BLOCK,
            log_bytes: self.space.area_blocks() * BLOCK,
            // Frames that wait for room have a place already.
            log_bytes_used: self.space.used_blocks().min(self.space.area_blocks()) * BLOCK,
            log_bytes_gap_from: trim::pressure_from(self.space.area_blocks()) * BLOCK,
            log_bytes_undestaged: self.space.blocks_above(self.destage.destaged) * BLOCK,
            waiting_bytes: self.writes.waiting_bytes as u64,
            log_errno: self.failure.log_errno,
            backing_errno: self.failure.backing_errno,
            detaching: self.failure.detaching(),
            marker_errno: self.failure.marker_errno,
            detached: self.failure.detached(),
            ..self.status
        }
    }

    /// Bytes of frames behind record `lsn`: what one lacks who has everything up to it, as far as the
    /// log has that still. Those that have a place in the log count as its books have them, exact to
    /// less than an extent of them (4 MiB at most); the open frame, which has no place yet, counts as
    /// it is, though not in [`EngineStatus::log_bytes_used`].
    #[must_use]
    pub fn log_bytes_behind(&self, lsn: Lsn) -> u64 {
        let open = self.ring.frames.back().filter(|frame| {
            frame.state == ring::FrameState::Open && frame.entries > 0 && frame.last_lsn() > lsn
        });
        let open = open.map_or(0, |frame| u64::from(frame.blocks()));
        (self.space.blocks_behind(lsn) + open) * afterimage_format::ids::BLOCK_SIZE as u64
    }

    /// Changes with whatever one part of a tick may have done for another.
    fn progress_mark(&self) -> (u32, Lsn, Lsn, [bool; 4]) {
        (
            self.ring.used_blocks(),
            self.destage.destaged,
            self.destage.synced,
            [
                self.commit.blocked,
                self.redo.is_some(),
                self.command.wants_clean(),
                self.failure.handed_over(),
            ],
        )
    }

    /// A source of the runs in `spans`.
    fn spans_source(&mut self) -> Source {
        match self.spans.as_slice() {
            [span] => Source::Ring(*span),
            many => {
                let mut spans = self.storage.take_spans();
                spans.extend_from_slice(many);
                Source::Gather(spans)
            }
        }
    }

    fn reply(&mut self, id: RequestId, result: Result<ReplyBody, RequestError>) {
        self.status.requests_open -= 1;
        self.replies.push(Reply { id, result });
    }

    fn submit_flush(&mut self, id: RequestId) {
        if let Err(error) = self.failure.durability() {
            self.reply(id, Err(error));
            return;
        }
        let target = self.ring.appended();
        if self.stable() >= target {
            self.reply(id, Ok(ReplyBody::Done));
        } else {
            self.waiters.push(target, Waiter::Request(id));
        }
    }

    /// Everything up to here survives a power cut.
    fn stable(&self) -> Lsn {
        if self.failure.handed_over() {
            self.destage.synced
        } else {
            self.commit.durable
        }
    }

    fn release_waiters(&mut self) {
        if self.failure.log_errno != 0 && !self.failure.handed_over() {
            return;
        }
        let stable = self.stable();
        while let Some(waiter) = self.waiters.pop_up_to(stable) {
            match waiter {
                Waiter::Request(id) => self.reply(id, Ok(ReplyBody::Done)),
                Waiter::Event(ticket, lsn) => {
                    self.events.push(EngineEvent::Durable { ticket, lsn });
                }
            }
        }
    }

    /// Bytes of a block that lie within its disk.
    fn valid_bytes(&self, disk: DiskIndex, block: u64) -> usize {
        use afterimage_format::ids::{BLOCK_SHIFT, BLOCK_SIZE};
        let left = self.disk_sizes[usize::from(disk.0)].saturating_sub(block << BLOCK_SHIFT);
        usize::try_from(left).map_or(BLOCK_SIZE, |left| left.min(BLOCK_SIZE))
    }
}
