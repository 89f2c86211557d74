//! A group in memory: disks, a log of records, what its superblock would say.

use crate::engine::event::EventRecord;
use crate::engine::request::{Allocated, LogProgress, PassRead};
use crate::io::buffer::AlignedBuffer;
use crate::ship::BoxFuture;
use crate::ship::port::{GroupIdentity, GroupPort, PortError, SinkRecord};
use crate::ship::source::{Batch, Record, RecordSource, SourceError};
use afterimage_format::chain::RecordMeta;
use afterimage_format::checksum::crc32c;
use afterimage_format::ids::{BLOCK_SIZE, DiskId, DiskIndex, Epoch, GroupId, LogId, Lsn};
use afterimage_format::manifest::DiskEntry;
use afterimage_format::op::Op;
use afterimage_format::segment::{ClockAnchor, SinkId};
use afterimage_format::wire::Cursor;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::watch;

pub(super) struct State {
    pub(super) records: BTreeMap<u64, Record>,
    pub(super) disks: Vec<Vec<u8>>,
    pub(super) sinks: HashMap<SinkId, SinkRecord>,
    /// What was reported, oldest first.
    pub(super) reports: Vec<(Cursor, bool)>,
    pub(super) blocks_read: u64,
    next: u64,
    epoch: Epoch,
    oldest: u64,
    durable: u64,
    /// New records do not become durable by themselves.
    held: bool,
    /// Events that wait for room in the log, while there is none.
    pub(super) waiting: Option<Vec<EventRecord>>,
}

pub(super) struct FakeGroup {
    state: Mutex<State>,
    progress: watch::Sender<LogProgress>,
}

pub(super) fn block(fill: u64) -> Vec<u8> {
    let mut reader = {
        let mut hasher = blake3_like(fill);
        move || hasher.next().unwrap_or_default()
    };
    (0..BLOCK_SIZE).map(|_| reader()).collect()
}

/// Bytes that do not compress.
fn blake3_like(seed: u64) -> impl Iterator<Item = u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x as u8
    })
}

impl FakeGroup {
    pub(super) fn new(disk_blocks: &[u64]) -> Arc<Self> {
        let disks = disk_blocks
            .iter()
            .map(|blocks| vec![0; *blocks as usize * BLOCK_SIZE])
            .collect();
        let state = State {
            records: BTreeMap::new(),
            disks,
            sinks: HashMap::new(),
            reports: Vec::new(),
            blocks_read: 0,
            next: 1,
            epoch: Epoch(0),
            oldest: 1,
            durable: 0,
            held: false,
            waiting: None,
        };
        let (progress, _) = watch::channel(LogProgress {
            oldest: Lsn(1),
            ..LogProgress::default()
        });
        Arc::new(Self {
            state: Mutex::new(state),
            progress,
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn publish(&self, state: &State) {
        self.progress.send_replace(LogProgress {
            durable: Lsn(state.durable),
            appended: Lsn(state.next - 1),
            oldest: Lsn(state.oldest),
            epoch: state.epoch,
            ..LogProgress::default()
        });
    }

    fn push(&self, state: &mut State, meta: RecordMeta, payload: Vec<u8>) -> Lsn {
        let lsn = Lsn(state.next);
        state.next += 1;
        let meta = RecordMeta {
            lsn,
            wall_ns: 1_000_000 + lsn.0,
            payload_crc: crc32c(&payload),
            ..meta
        };
        let payload = payload.into();
        state.records.insert(lsn.0, Record { meta, payload });
        if !state.held {
            state.durable = lsn.0;
        }
        self.publish(state);
        lsn
    }

    pub(super) fn event(&self, op: Op, payload: Vec<u8>) -> Lsn {
        let mut state = self.lock();
        self.push(&mut state, meta(op, 0, 0, 0), payload)
    }

    /// One block of a disk.
    pub(super) fn write(&self, disk: u16, at: u64, data: &[u8]) -> Lsn {
        let mut state = self.lock();
        let start = at as usize * BLOCK_SIZE;
        state.disks[usize::from(disk)][start..start + data.len()].copy_from_slice(data);
        let blocks = (data.len() / BLOCK_SIZE) as u32;
        self.push(&mut state, meta(Op::Write, disk, at, blocks), data.to_vec())
    }

    pub(super) fn trim(&self, disk: u16, at: u64, blocks: u32) -> Lsn {
        let mut state = self.lock();
        let start = at as usize * BLOCK_SIZE;
        let len = blocks as usize * BLOCK_SIZE;
        state.disks[usize::from(disk)][start..start + len].fill(0);
        self.push(&mut state, meta(Op::Trim, disk, at, blocks), Vec::new())
    }

    /// Content that was there before the log.
    pub(super) fn preload(&self, disk: u16, at: u64, data: &[u8]) {
        let start = at as usize * BLOCK_SIZE;
        self.lock().disks[usize::from(disk)][start..start + data.len()].copy_from_slice(data);
    }

    /// Stops or lets go the log's syncs.
    pub(super) fn hold_syncs(&self, held: bool) {
        let mut state = self.lock();
        state.held = held;
        if !held {
            state.durable = state.next - 1;
        }
        self.publish(&state);
    }

    /// From now on there is no room for events, until [`FakeGroup::make_room`].
    pub(super) fn fill(&self) {
        self.lock().waiting = Some(Vec::new());
    }

    /// What waited for room gets its LSN. How many did.
    pub(super) fn make_room(&self) -> usize {
        let waiting = self.lock().waiting.take().unwrap_or_default();
        let count = waiting.len();
        for event in waiting {
            self.event(event.op, event.body);
        }
        count
    }

    /// Drops the log's records below.
    pub(super) fn trim_log(&self, oldest: u64) {
        let mut state = self.lock();
        state.records = state.records.split_off(&oldest);
        state.oldest = oldest;
        self.publish(&state);
    }

    pub(super) fn last(&self) -> Lsn {
        Lsn(self.lock().next - 1)
    }

    pub(super) fn set_sink(&self, record: SinkRecord) {
        let id = SinkId::of_url(super::URL);
        self.lock().sinks.insert(id, record);
    }

    /// As if the process had been started anew with another epoch in its superblock.
    pub(super) fn set_epoch_now(&self, epoch: u64) {
        let mut state = self.lock();
        state.epoch = Epoch(epoch);
        self.publish(&state);
    }
}

fn meta(op: Op, disk: u16, first_block: u64, block_count: u32) -> RecordMeta {
    RecordMeta {
        lsn: Lsn::ZERO,
        disk: DiskIndex(disk),
        op,
        flags: 0,
        first_block,
        block_count,
        wall_ns: 0,
        aux: 0,
        payload_crc: 0,
    }
}

impl GroupPort for FakeGroup {
    fn identity(&self) -> GroupIdentity {
        let disks = self.lock().disks.iter().map(Vec::len).collect::<Vec<_>>();
        let entry = |(at, len): (usize, usize)| DiskEntry {
            disk: DiskId::from_bytes([at as u8 + 1; 16]),
            name: format!("disk{at}"),
            size_bytes: len as u64,
        };
        GroupIdentity {
            group: GroupId::from_bytes([0xaa; 16]),
            name: "vm1".to_owned(),
            log: LogId::from_bytes([0xbb; 16]),
            disks: disks.into_iter().enumerate().map(entry).collect(),
        }
    }

    fn progress(&self) -> watch::Receiver<LogProgress> {
        self.progress.subscribe()
    }

    fn sink_record(&self, sink: SinkId) -> BoxFuture<'_, Result<SinkRecord, PortError>> {
        let record = self.lock().sinks.get(&sink).copied().unwrap_or_default();
        Box::pin(async move { Ok(record) })
    }

    fn report_acked(
        &self,
        sink: SinkId,
        acked: Cursor,
        complete: bool,
    ) -> BoxFuture<'_, Result<(), PortError>> {
        let mut state = self.lock();
        state.reports.push((acked, complete));
        state.sinks.entry(sink).or_default().acked = acked;
        Box::pin(async { Ok(()) })
    }

    fn set_epoch(&self, epoch: Epoch) -> BoxFuture<'_, Result<(), PortError>> {
        let mut state = self.lock();
        state.epoch = epoch;
        self.push(&mut state, meta(Op::Epoch, 0, 0, 0), Vec::new());
        Box::pin(async { Ok(()) })
    }

    fn append(&self, event: EventRecord) -> BoxFuture<'_, Result<Lsn, PortError>> {
        if let Some(waiting) = &mut self.lock().waiting {
            waiting.push(event);
            return Box::pin(std::future::pending());
        }
        let lsn = self.event(event.op, event.body);
        Box::pin(async move { Ok(lsn) })
    }

    fn pass_read(
        &self,
        disk: DiskIndex,
        first_block: u64,
        block_count: u32,
    ) -> BoxFuture<'_, Result<PassRead, PortError>> {
        let mut state = self.lock();
        state.blocks_read += u64::from(block_count);
        let len = block_count as usize * BLOCK_SIZE;
        let start = first_block as usize * BLOCK_SIZE;
        let mut data = AlignedBuffer::new(len);
        data.copy_from_slice(&state.disks[usize::from(disk.0)][start..start + len]);
        let lsn = Lsn(state.next - 1);
        Box::pin(async move {
            Ok(PassRead {
                disk,
                first_block,
                lsn,
                durable_after: lsn,
                overtaken: false,
                data,
            })
        })
    }

    fn allocated_ranges(
        &self,
        disk: DiskIndex,
        from_block: u64,
        ranges_max: usize,
    ) -> BoxFuture<'_, Result<Allocated, PortError>> {
        let state = self.lock();
        let blocks = state.disks[usize::from(disk.0)].chunks(BLOCK_SIZE);
        let mut ranges: Vec<Range<u64>> = Vec::new();
        // Coarse, as file systems are: 16 blocks at a time.
        for (at, content) in blocks.enumerate() {
            if content.iter().all(|b| *b == 0) {
                continue;
            }
            let start = (at as u64 / 16 * 16).max(from_block);
            let end = at as u64 / 16 * 16 + 16;
            match ranges.last_mut() {
                Some(last) if last.end >= start => last.end = last.end.max(end),
                _ if end > from_block => ranges.push(start..end),
                _ => {}
            }
        }
        let end_block = match ranges.get(ranges_max) {
            Some(next) => next.start,
            None => state.disks[usize::from(disk.0)].len() as u64 / BLOCK_SIZE as u64,
        };
        ranges.truncate(ranges_max);
        let lsn = Lsn(state.next - 1);
        Box::pin(async move {
            Ok(Allocated {
                lsn,
                exact: true,
                ranges,
                end_block,
            })
        })
    }
}

/// Reads the fake group's records; as a log does, it fails when they are gone.
pub(super) struct MemorySource {
    group: Arc<FakeGroup>,
    next: u64,
}

impl MemorySource {
    pub(super) fn new(group: Arc<FakeGroup>) -> Self {
        Self { group, next: 1 }
    }
}

impl RecordSource for MemorySource {
    fn seek(&mut self, next: Lsn) -> BoxFuture<'_, Result<(), SourceError>> {
        self.next = next.0;
        let gone = next.0 < self.group.lock().oldest;
        Box::pin(async move {
            if gone {
                return Err(SourceError::Gone(next));
            }
            Ok(())
        })
    }

    fn read(&mut self, durable: Lsn) -> BoxFuture<'_, Result<Batch, SourceError>> {
        let state = self.group.lock();
        assert!(durable.0 <= state.durable, "read above the durable bound");
        if self.next < state.oldest {
            let gone = SourceError::Gone(Lsn(self.next));
            return Box::pin(async move { Err(gone) });
        }
        let records: Vec<Record> = state
            .records
            .range(self.next..=durable.0)
            .take(50)
            .map(|(_, record)| record.clone())
            .collect();
        self.next += records.len() as u64;
        let anchor = ClockAnchor::default();
        Box::pin(async move { Ok(Batch { anchor, records }) })
    }
}
