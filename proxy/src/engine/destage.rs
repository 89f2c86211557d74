//! Destage: writing what the log has durably to the backings, oldest first.
//!
//! A cursor walks over the durable records, as long as more of them than the ring's window lie in the
//! ring: the longer a version rests there, the likelier another makes it needless. A version is
//! skipped if one that supersedes it is durable; all others are chosen, sorted and joined. The
//! fuller the ring, the more writes are in flight: no more than the guest needs, since the log's
//! writes, which flushes wait for, share the device. A zeroing is a
//! barrier: everything before it is in the backing first, nothing behind it goes until it is.
//! Always holds: nothing above the log's durable LSN is chosen; never two operations in flight that
//! overlap; every record up to `destaged` is in the backings or superseded by a durable one above;
//! every record up to `synced` is so durably. A ring frame is released when it is destaged.

use super::Engine;
use super::block_map::BlockKey;
use super::event::EngineEvent;
use super::request::Now;
use super::ring::{FrameState, RecordInfo, byte_offset};
use super::token::Purpose;
use crate::io::{FileId, Operation, RingSpan, Storage};
use afterimage_format::ids::{BLOCK_SHIFT, BLOCK_SIZE, DiskIndex, Lsn};
use afterimage_format::op::Op;
use slab::Slab;
use std::collections::VecDeque;
use std::io;

/// Blocks chosen, sorted and joined at a time.
const BATCH_BLOCKS: usize = 2048;
/// Fewest writes in flight while the ring holds more than its window.
const DEPTH_MIN: usize = 4;
/// So full, in eighths, is a ring that is destaged with as many writes in flight as there may be.
const FULL_DEPTH_EIGHTHS: u32 = 7;
/// Most blocks of one write to a backing (each may be a run of ring memory of its own).
const JOIN_BLOCKS_MAX: usize = 256;

#[derive(Debug)]
pub(super) struct Destage {
    /// The next record to be looked at.
    cursor: Lsn,
    /// Everything up to here is in the backings.
    pub(super) destaged: Lsn,
    /// Everything up to here is durably in the backings.
    pub(super) synced: Lsn,
    /// Everything up to here is to be destaged whatever the ring's level.
    goal: Lsn,
    /// Chosen, not submitted: sorted.
    ready: VecDeque<DestageOp>,
    in_flight: Slab<DestageOp>,
    chosen: Vec<Chosen>,
    /// Empty lists of operations that are over, for the next.
    runs: Vec<Vec<Chosen>>,
    /// Backings written to since their last sync was submitted.
    unsynced: Vec<bool>,
    sync: Option<BackingSync>,
    /// A failed sync has been made up for; only another sync tells whether it worked.
    resync: bool,
    /// A zeroing is on its way: nothing behind it may go.
    barrier: bool,
    retry: Retry,
}

/// A block on its way.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Chosen {
    key: BlockKey,
    lsn: Lsn,
    ring_block: u32,
}

#[derive(Debug)]
enum DestageOp {
    /// Neighbouring blocks of one disk.
    Blocks(Vec<Chosen>),
    Zero {
        lsn: Lsn,
        record: RecordInfo,
    },
}

#[derive(Debug)]
struct BackingSync {
    covers: Lsn,
    left: usize,
    failed: bool,
}

/// When a failing backing is tried again, and when it counts as working.
#[derive(Debug, Default)]
struct Retry {
    at_ns: Option<u64>,
    wait_ns: u64,
    failing_since_ns: Option<u64>,
    /// What was chosen at the last failure: once all of that is durably in the backings, they work.
    /// A success of something else proves nothing (a full file system still takes overwrites).
    until: Lsn,
}

impl Destage {
    pub(super) fn new(next: Lsn, synced: Lsn, disks: usize) -> Self {
        let recovered = Lsn(next.0 - 1);
        Self {
            cursor: next,
            destaged: recovered,
            synced: synced.max(recovered),
            goal: Lsn::ZERO,
            ready: VecDeque::new(),
            in_flight: Slab::new(),
            chosen: Vec::with_capacity(BATCH_BLOCKS),
            runs: Vec::new(),
            unsynced: vec![false; disks],
            sync: None,
            resync: false,
            barrier: false,
            retry: Retry::default(),
        }
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.in_flight.is_empty() && self.ready.is_empty()
    }

    pub(super) fn syncing(&self) -> bool {
        self.sync.is_some()
    }

    /// The last record that has been chosen.
    pub(super) fn chosen_up_to(&self) -> Lsn {
        Lsn(self.cursor.0 - 1)
    }

    pub(super) fn failing_since_ns(&self) -> Option<u64> {
        self.retry.failing_since_ns
    }

    pub(super) fn none_in_flight(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// The time of the next attempt has come.
    pub(super) fn end_backoff(&mut self) {
        self.retry.at_ns = None;
    }

    pub(super) fn mark_unsynced(&mut self, disk: DiskIndex) {
        self.unsynced[usize::from(disk.0)] = true;
    }

    /// The backings are to be synced again at once.
    pub(super) fn resync(&mut self) {
        self.resync = true;
    }

    /// Whether a failed operation waits for its next attempt.
    pub(super) fn backing_off(&self, now: Now) -> bool {
        self.retry.at_ns.is_some_and(|at| now.monotonic_ns < at)
    }
}

impl<S: Storage> Engine<S> {
    /// What destage may touch: the durable records; all of them when there is no log any more.
    fn destage_bound(&self) -> Lsn {
        if self.failure.detached() {
            self.ring.appended()
        } else {
            self.commit.durable
        }
    }

    pub(super) fn destage_deadline(&self) -> Option<u64> {
        if let Some(at) = self.destage.retry.at_ns {
            return Some(at);
        }
        if self.failure.log_errno != 0 {
            // All that may go is on its way already.
            return None;
        }
        self.age_deadline()
            .filter(|_| self.destage.goal <= self.destage.destaged)
    }

    fn age_deadline(&self) -> Option<u64> {
        let frame = self.ring.oldest_above(self.destage.destaged)?;
        Some(frame.opened_ns + self.config.destage_age_ns)
    }

    /// How many writes may be in flight to bring the ring back to its window of durable records: 0
    /// while it holds no more than that. Only what is durable counts: room that waits for the log
    /// comes from the log.
    pub(super) fn destage_level(&self) -> usize {
        let (area, window) = (self.ring.area_blocks(), self.ring.window_blocks());
        let over = if self.failure.detached() {
            self.ring.used_blocks().saturating_sub(window)
        } else {
            self.ring.rested_blocks()
        };
        if over == 0 {
            return 0;
        }
        let depth = self.config.destage_depth;
        let full = (area * FULL_DEPTH_EIGHTHS / 8 - window).max(1);
        (depth * over as usize / full as usize).clamp(DEPTH_MIN.min(depth), depth)
    }

    /// The newest record that is to be destaged: for its age or for another's need, or since the
    /// ring holds more than its window.
    fn destage_limit(&self) -> Lsn {
        let rested = if self.failure.detached() && self.destage_level() > 0 {
            self.destage_bound()
        } else {
            self.ring.rested()
        };
        self.destage.goal.max(rested)
    }

    /// Decides how far destage is to go now, and with how many writes in flight.
    fn set_goal(&mut self, now: Now) -> usize {
        let bound = self.destage_bound();
        let level = self.destage_level();
        let aged = self
            .age_deadline()
            .is_some_and(|deadline| now.monotonic_ns >= deadline);
        let log_full = self.commit.blocked
            || self.space.blocks_above(self.destage.destaged) > self.space.area_blocks() / 4 * 3;
        // The free room is too scattered for what waits, and the log has nothing to add.
        let no_room = self.writes.waits_for_room() && level == 0 && bound == self.ring.appended();
        let hurry = log_full || self.failure.log_errno != 0 || self.command.draining() || no_room;
        if hurry {
            self.destage.goal = bound;
        } else if aged {
            // A guest that goes on writing may write over the younger half before it is that old, too.
            let opened_by = now.monotonic_ns - self.config.destage_age_ns / 2;
            let older_half = self.ring.newest_opened_by(opened_by);
            self.destage.goal = self.destage.goal.max(bound.min(older_half));
        }
        let depth = self.config.destage_depth;
        if hurry {
            depth
        } else if self.destage.destaged < self.destage.goal {
            level.max(depth.div_ceil(4))
        } else {
            level
        }
    }

    pub(super) fn pump_destage(&mut self, now: Now) {
        self.release_frames();
        if self.redo.is_some() || self.destage.backing_off(now) {
            return;
        }
        self.destage.retry.at_ns = None;
        let depth = self.set_goal(now);
        loop {
            // What is chosen goes, if nothing else.
            while self.destage.in_flight.len() < depth.max(DEPTH_MIN.min(self.config.destage_depth))
                && let Some(op) = self.destage.ready.pop_front()
            {
                self.submit_destage(op);
            }
            if !self.destage.ready.is_empty() || !self.choose() {
                break;
            }
        }
        self.advance_destaged();
        self.release_frames();
    }

    /// Chooses a batch. Returns whether anything is ready now.
    fn choose(&mut self) -> bool {
        let bound = self.destage_bound();
        debug_assert!(self.destage.chosen.is_empty());
        if self.destage.barrier {
            return false;
        }
        let limit = bound.min(self.destage_limit());
        while self.destage.cursor <= limit && self.destage.chosen.len() < BATCH_BLOCKS {
            let lsn = self.destage.cursor;
            let record = *self.ring.record(lsn);
            match record.op {
                Op::Write if !self.choose_blocks(lsn, &record) => break,
                Op::Write => {}
                Op::Zero | Op::Trim => {
                    if !self.destage.chosen.is_empty() || !self.destage.is_quiet() {
                        break;
                    }
                    self.destage.barrier = true;
                    self.ring.record(lsn).pending = 1;
                    self.destage
                        .ready
                        .push_back(DestageOp::Zero { lsn, record });
                    self.destage.cursor = lsn.next();
                    return true;
                }
                _ => {}
            }
            self.destage.cursor = lsn.next();
        }
        self.join_chosen();
        !self.destage.ready.is_empty()
    }

    /// Chooses the blocks of one write. Returns false, with nothing chosen, if one of them must
    /// wait.
    fn choose_blocks(&mut self, lsn: Lsn, record: &RecordInfo) -> bool {
        let before = self.destage.chosen.len();
        let bound = self.destage_bound();
        let mut skipped = 0;
        for index in 0..record.block_count {
            let block = record.first_block + u64::from(index);
            let key = BlockKey::new(record.disk, block);
            let Some(version) = self.map.get(key) else {
                // Void since a zeroing that is durable, or it would still be there.
                skipped += 1;
                continue;
            };
            let newest = self
                .zeroes
                .get(record.disk, block)
                .map_or(version.lsn, |zeroed| zeroed.max(version.lsn));
            // Whichever later version is durable will do: the newest of a block that is written all
            // the time never is.
            let ring_block = record.ring_block + index;
            let newest_is_durable = newest > lsn && newest <= bound;
            if newest_is_durable || self.ring.superseded_by(ring_block, bound) {
                skipped += 1;
                continue;
            }
            if version.destaging {
                self.destage.chosen.truncate(before);
                return false;
            }
            self.destage.chosen.push(Chosen {
                key,
                lsn,
                ring_block,
            });
        }
        for chosen in &self.destage.chosen[before..] {
            self.map.begin_destage(chosen.key);
        }
        let pending = self.destage.chosen.len() - before;
        self.ring.record(lsn).pending = u32::try_from(pending).expect("a record has few blocks");
        self.status.destage_skipped_blocks += skipped;
        // What a zeroing made void goes from the map with the last version before it.
        for index in 0..record.block_count {
            let block = record.first_block + u64::from(index);
            if self
                .zeroes
                .get(record.disk, block)
                .is_some_and(|zeroed| zeroed > lsn && zeroed <= bound)
            {
                self.map
                    .remove_version(BlockKey::new(record.disk, block), lsn);
            }
        }
        true
    }

    fn join_chosen(&mut self) {
        self.destage.chosen.sort_unstable();
        let mut run = self.destage.runs.pop().unwrap_or_default();
        for index in 0..self.destage.chosen.len() {
            let next = self.destage.chosen[index];
            let joins = run.last().is_some_and(|last: &Chosen| {
                last.key.disk() == next.key.disk()
                    && last.key.block() + 1 == next.key.block()
                    && run.len() < JOIN_BLOCKS_MAX
            });
            if !joins && !run.is_empty() {
                let next = self.destage.runs.pop().unwrap_or_default();
                let run = std::mem::replace(&mut run, next);
                self.destage.ready.push_back(DestageOp::Blocks(run));
            }
            run.push(next);
        }
        if run.is_empty() {
            self.destage.runs.push(run);
        } else {
            self.destage.ready.push_back(DestageOp::Blocks(run));
        }
        self.destage.chosen.clear();
    }

    fn submit_destage(&mut self, op: DestageOp) {
        let operation = match &op {
            DestageOp::Blocks(run) => self.destage_write(run),
            DestageOp::Zero { record, .. } => self.zero_operation(record),
        };
        self.status.destage_writes += 1;
        let slot = self.destage.in_flight.insert(op);
        self.storage
            .submit(Purpose::Destage(slot).token(), operation);
    }

    fn destage_write(&mut self, run: &[Chosen]) -> Operation {
        let key = run[0].key;
        self.spans.clear();
        for chosen in run {
            let offset = byte_offset(chosen.ring_block) as u64;
            let valid = self.valid_bytes(chosen.key.disk(), chosen.key.block());
            let len = u32::try_from(valid).expect("at most a block");
            match self.spans.last_mut() {
                Some(last) if last.offset + u64::from(last.len) == offset => last.len += len,
                _ => self.spans.push(RingSpan { offset, len }),
            }
        }
        Operation::Write {
            file: FileId::backing(key.disk()),
            offset: key.block() << BLOCK_SHIFT,
            source: self.spans_source(),
            dsync: false,
        }
    }

    pub(super) fn zero_operation(&self, record: &RecordInfo) -> Operation {
        let file = FileId::backing(record.disk);
        let offset = record.first_block << BLOCK_SHIFT;
        let end = self.disk_sizes[usize::from(record.disk.0)]
            .min((record.first_block + u64::from(record.block_count)) << BLOCK_SHIFT);
        let len = end - offset;
        if record.op == Op::Trim {
            Operation::PunchHole { file, offset, len }
        } else {
            Operation::WriteZeroes { file, offset, len }
        }
    }

    pub(super) fn destage_done(&mut self, now: Now, slot: usize, result: io::Result<usize>) {
        let Some(op) = self.destage.in_flight.try_remove(slot) else {
            return;
        };
        let disk = match &op {
            DestageOp::Blocks(run) => run[0].key.disk(),
            DestageOp::Zero { record, .. } => record.disk,
        };
        // Also a failed write may have changed the backing.
        self.destage.unsynced[usize::from(disk.0)] = true;
        if let Err(error) = result {
            self.destage.ready.push_front(op);
            self.backing_failed(now, disk, &error);
            return;
        }
        match op {
            DestageOp::Blocks(run) => {
                for chosen in &run {
                    if self.map.end_destage(chosen.key, chosen.lsn) {
                        self.edges.block_left_ring(chosen.key);
                    }
                    self.ring.record(chosen.lsn).pending -= 1;
                }
                self.status.destaged_bytes += (run.len() * BLOCK_SIZE) as u64;
                let mut run = run;
                run.clear();
                if self.destage.runs.len() < BATCH_BLOCKS {
                    self.destage.runs.push(run);
                }
            }
            DestageOp::Zero { lsn, record } => {
                self.destage.barrier = false;
                let blocks = record.first_block..record.first_block + u64::from(record.block_count);
                self.zeroes.destaged(record.disk, blocks.clone(), lsn);
                self.edges.range_left_ring(record.disk, &blocks);
                self.ring.record(lsn).pending -= 1;
            }
        }
        self.advance_destaged();
    }

    fn advance_destaged(&mut self) {
        while self.destage.destaged < self.destage.chosen_up_to() {
            let next = self.destage.destaged.next();
            if self.ring.record(next).pending > 0 {
                break;
            }
            self.destage.destaged = next;
        }
    }

    /// Gives back the ring frames whose content the log has durably and the backings have.
    pub(super) fn release_frames(&mut self) {
        // Until then a successor may have to bring them into the backings.
        let handed_over = self.failure.handed_over();
        while let Some(frame) = self.ring.frames.front()
            && (frame.state == FrameState::Written
                || (handed_over && frame.state == FrameState::Closed))
            && (handed_over || frame.last_lsn() <= self.commit.durable)
            && frame.last_lsn() <= self.destage.destaged
        {
            self.ring.release_front();
        }
    }

    /// An operation on a backing failed: it is tried again after a while.
    pub(super) fn backing_failed(&mut self, now: Now, disk: DiskIndex, error: &io::Error) {
        self.status.backing_errors += 1;
        let errno = super::failure::errno_of(error);
        let retry = &mut self.destage.retry;
        if self.failure.backing_errno == 0 {
            tracing::error!(disk = disk.0, %error, "the backing fails; it is tried again, the log keeps what it lacks");
            self.events
                .push(EngineEvent::BackingFailing { disk, errno });
        }
        self.failure.backing_errno = errno;
        retry.until = Lsn(self.destage.cursor.0 - 1);
        retry.failing_since_ns.get_or_insert(now.monotonic_ns);
        if retry.at_ns.is_none() {
            retry.wait_ns = (retry.wait_ns * 2).clamp(
                self.config.backing_retry_ns,
                self.config.backing_retry_max_ns,
            );
            retry.at_ns = Some(now.monotonic_ns + retry.wait_ns);
        }
    }

    /// The backings have something durably: is it all that failed?
    fn backing_works(&mut self) {
        if self.failure.backing_errno != 0 && self.destage.synced >= self.destage.retry.until {
            self.failure.backing_errno = 0;
            self.destage.retry = Retry::default();
            self.events.push(EngineEvent::BackingRecovered);
        }
    }

    /// Nothing waits to be destaged that could be.
    pub(super) fn destage_idle(&self) -> bool {
        self.destage.is_quiet() && self.destage.destaged >= self.destage_bound()
    }

    /// Syncs the backings when the log needs it, when all is destaged, or when draining.
    pub(super) fn pump_backing_sync(&mut self, now: Now) {
        let Destage {
            destaged, synced, ..
        } = self.destage;
        if self.destage.sync.is_some()
            || self.redo.is_some()
            || destaged <= synced
            || self.destage.backing_off(now)
        {
            return;
        }
        let due = self.destage.resync
            || (self.failure.backing_errno != 0 && destaged >= self.destage.retry.until)
            || self.destage_idle()
            || self.commit.blocked
            || self.failure.detached()
            || self.space.blocks_above(synced) > self.space.area_blocks() / 4;
        if !due {
            return;
        }
        let disks: Vec<u16> = (0..)
            .zip(&self.destage.unsynced)
            .filter(|(_, unsynced)| **unsynced)
            .map(|(disk, _)| disk)
            .collect();
        if disks.is_empty() {
            self.destage.synced = destaged;
            self.backing_works();
            return;
        }
        self.destage.resync = false;
        self.destage.sync = Some(BackingSync {
            covers: destaged,
            left: disks.len(),
            failed: false,
        });
        for disk in disks {
            self.destage.unsynced[usize::from(disk)] = false;
            self.status.backing_syncs += 1;
            let file = FileId::backing(DiskIndex(disk));
            self.storage
                .submit(Purpose::BackingSync(disk).token(), Operation::Sync { file });
        }
    }

    pub(super) fn backing_synced(&mut self, now: Now, disk: DiskIndex, result: io::Result<usize>) {
        let Some(sync) = &mut self.destage.sync else {
            return;
        };
        sync.left -= 1;
        let last = sync.left == 0;
        if let Err(error) = result {
            sync.failed = true;
            self.destage.unsynced[usize::from(disk.0)] = true;
            self.backing_failed(now, disk, &error);
            // At once, though other backings are not through: nothing may be read meanwhile.
            if self.redo.is_none() {
                self.begin_redo();
            }
        }
        if last && let Some(sync) = self.destage.sync.take() {
            if !sync.failed {
                self.destage.synced = sync.covers;
                self.backing_works();
                self.release_waiters();
            }
            self.settle_unsure_edges();
            self.settle_unsure_reads();
            self.answer_questions();
        }
    }
}
