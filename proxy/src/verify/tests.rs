//! Runs over a group that changes while it is read.

use super::*;
use crate::engine::request::{Allocated, LogProgress};
use crate::io::buffer::AlignedBuffer;
use crate::ship::BoxFuture;
use crate::ship::port::{GroupIdentity, SinkRecord};
use afterimage_format::ids::{DiskId, Epoch, GroupId, LogId};
use afterimage_format::manifest::DiskEntry;
use afterimage_format::segment::SinkId;
use afterimage_format::wire::Cursor;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

const BLOCKS: u64 = 1000;

/// One disk whose block N is filled with N % 255 + 1 where it is allocated.
struct Port {
    progress: watch::Sender<LogProgress>,
    allocated: Vec<Range<u64>>,
    /// Reads of more than one block that reach into this are overtaken.
    hot: Range<u64>,
    reads: Mutex<Vec<(u64, u32)>>,
    records: Mutex<Vec<(u64, u32, VerifyBody)>>,
}

impl Port {
    fn new<const N: usize>(allocated: [(u64, u64); N], hot: Range<u64>) -> Self {
        let appended = Lsn(41);
        let (progress, _) = watch::channel(LogProgress {
            appended,
            ..LogProgress::default()
        });
        Self {
            progress,
            allocated: allocated.map(|(start, end)| start..end).to_vec(),
            hot,
            reads: Mutex::default(),
            records: Mutex::default(),
        }
    }

    fn content(&self, first: u64, blocks: u32) -> Vec<u8> {
        let mut data = vec![0; blocks as usize * BLOCK_SIZE];
        for (block, content) in (first..).zip(data.chunks_mut(BLOCK_SIZE)) {
            if self.allocated.iter().any(|range| range.contains(&block)) {
                content.fill((block % 255) as u8 + 1);
            }
        }
        data
    }

    fn records(&self) -> Vec<(u64, u32, VerifyBody)> {
        self.records.lock().unwrap().clone()
    }
}

impl GroupPort for Port {
    fn identity(&self) -> GroupIdentity {
        GroupIdentity {
            group: GroupId::from_bytes([1; 16]),
            name: "vm1".to_owned(),
            log: LogId::from_bytes([2; 16]),
            disks: vec![DiskEntry {
                disk: DiskId::from_bytes([3; 16]),
                name: "vda".to_owned(),
                size_bytes: BLOCKS * BLOCK_SIZE as u64,
            }],
        }
    }

    fn progress(&self) -> watch::Receiver<LogProgress> {
        self.progress.subscribe()
    }

    fn sink_record(&self, _: SinkId) -> BoxFuture<'_, Result<SinkRecord, PortError>> {
        unreachable!("no sink is asked about")
    }

    fn report_acked(&self, _: SinkId, _: Cursor, _: bool) -> BoxFuture<'_, Result<(), PortError>> {
        unreachable!("nothing is shipped")
    }

    fn set_epoch(&self, _: Epoch) -> BoxFuture<'_, Result<(), PortError>> {
        unreachable!("the epoch stays")
    }

    fn append(&self, event: EventRecord) -> BoxFuture<'_, Result<Lsn, PortError>> {
        assert_eq!((event.op, event.disk), (Op::Verify, DiskIndex(0)));
        let body = VerifyBody::decode(&event.body).expect("a body");
        let record = (event.first_block, event.block_count, body);
        self.records.lock().unwrap().push(record);
        self.progress
            .send_modify(|p| p.appended = p.appended.next());
        let lsn = self.progress.borrow().appended;
        Box::pin(async move { Ok(lsn) })
    }

    fn pass_read(
        &self,
        disk: DiskIndex,
        first_block: u64,
        block_count: u32,
    ) -> BoxFuture<'_, Result<PassRead, PortError>> {
        self.reads.lock().unwrap().push((first_block, block_count));
        let end = first_block + u64::from(block_count);
        let overtaken = block_count > 1 && first_block < self.hot.end && self.hot.start < end;
        let mut data = AlignedBuffer::new(block_count as usize * BLOCK_SIZE);
        data.copy_from_slice(&self.content(first_block, block_count));
        if overtaken {
            data.fill(0xee);
        }
        let lsn = self.progress.borrow().appended;
        Box::pin(async move {
            Ok(PassRead {
                disk,
                first_block,
                lsn,
                durable_after: lsn,
                overtaken,
                data,
            })
        })
    }

    fn allocated_ranges(
        &self,
        _: DiskIndex,
        from_block: u64,
        _: usize,
    ) -> BoxFuture<'_, Result<Allocated, PortError>> {
        let later = self.allocated.iter().filter(|range| range.end > from_block);
        let allocated = Allocated {
            lsn: self.progress.borrow().appended,
            exact: true,
            ranges: later.cloned().collect(),
            end_block: BLOCKS,
        };
        Box::pin(async move { Ok(allocated) })
    }
}

struct Rig {
    acked: AtomicU64,
    progress: watch::Sender<VerifyProgress>,
}

impl Rig {
    fn new(acked: u64) -> Self {
        Self {
            acked: AtomicU64::new(acked),
            progress: watch::channel(VerifyProgress::default()).0,
        }
    }

    async fn run(&self, port: &Port, rate: Option<u64>) -> Result<(), VerifyError> {
        let acked = || match self.acked.load(Ordering::Relaxed) {
            0 => None,
            lsn => Some(Lsn(lsn)),
        };
        let around = Surroundings {
            run: 5,
            acked: &acked,
            bytes_per_second: &|| rate,
            progress: &self.progress,
        };
        run(port, &around).await
    }
}

#[tokio::test(start_paused = true)]
async fn every_block_is_described_once_as_it_is() {
    let port = Port::new([(10, 20), (300, 700)], 0..0);
    let rig = Rig::new(u64::MAX);
    rig.run(&port, None).await.expect("described");
    let records = port.records();
    let mut next = 0;
    for (number, (first, blocks, body)) in records.iter().enumerate() {
        assert_eq!(*first, next);
        next += u64::from(*blocks);
        assert_eq!((body.run, body.number as usize), (5, number));
        assert_eq!(body.last, number + 1 == records.len());
        let content = port.content(*first, *blocks);
        match &body.content {
            Content::Zero => assert!(content.iter().all(|byte| *byte == 0)),
            Content::Data(hashes) => assert_eq!(*hashes, BlockHashes::of(&content)),
        }
        // What a record says held when it was looked at, before the record was there.
        assert!(body.at >= Lsn(41) && body.at.0 <= 41 + number as u64);
    }
    assert_eq!(next, BLOCKS);
    let shown = *rig.progress.borrow();
    assert!(shown.over && shown.blocks_done == BLOCKS && shown.blocks_total == BLOCKS);
    assert_eq!((shown.records as usize, shown.retries), (records.len(), 0));
    assert_eq!(shown.last, Lsn(41 + records.len() as u64));
}

/// What is read while it changes is never described; it is read again until it holds still.
#[tokio::test(start_paused = true)]
async fn a_range_that_changes_all_the_time_is_described_in_parts() {
    let port = Port::new([(0, BLOCKS)], 300..301);
    let rig = Rig::new(u64::MAX);
    rig.run(&port, None).await.expect("described");
    let mut next = 0;
    for (first, blocks, body) in port.records() {
        assert_eq!(first, next);
        next += u64::from(blocks);
        let content = BlockHashes::of(&port.content(first, blocks));
        assert_eq!(
            body.content,
            Content::Data(content),
            "blocks {first}, {blocks}"
        );
    }
    assert_eq!(next, BLOCKS);
    let reads = port.reads.lock().unwrap();
    assert!(reads.contains(&(300, 1)), "{reads:?}");
    assert!(rig.progress.borrow().retries > 20);
}

#[tokio::test(start_paused = true)]
async fn a_run_waits_for_a_sink_in_step_and_for_one_that_is_slow() {
    let port = Port::new([(0, 1)], 0..0);
    let rig = Rig::new(0);
    let waits = tokio::time::timeout(Duration::from_secs(60), rig.run(&port, None)).await;
    assert!(
        waits.is_err() && port.records().is_empty(),
        "no sink is in step"
    );
    assert!(rig.progress.borrow().waiting);

    // A record for each block.
    let port = Port::new([(0, BLOCKS)], 0..BLOCKS);
    let rig = Rig::new(41);
    let acked = || Some(Lsn(rig.acked.load(Ordering::Relaxed)));
    let around = Surroundings {
        run: 5,
        acked: &acked,
        bytes_per_second: &|| None,
        progress: &rig.progress,
    };
    let mut running = std::pin::pin!(run(&port, &around));
    let waits = tokio::time::timeout(Duration::from_secs(60), &mut running).await;
    assert!(waits.is_err());
    assert_eq!(port.records().len(), WINDOW_RECORDS);
    assert!(!rig.progress.borrow().waiting, "a slow sink is in step");
    rig.acked.store(41 + 100, Ordering::Relaxed);
    let waits = tokio::time::timeout(Duration::from_secs(60), &mut running).await;
    assert!(waits.is_err());
    assert_eq!(port.records().len(), WINDOW_RECORDS + 100);
    rig.acked.store(u64::MAX, Ordering::Relaxed);
    running.await.expect("described");
    assert_eq!(port.records().len() as u64, BLOCKS);
}

#[tokio::test(start_paused = true)]
async fn the_rate_of_passes_holds() {
    let port = Port::new([(0, BLOCKS)], 0..0);
    let rig = Rig::new(u64::MAX);
    let began = Instant::now();
    let rate = BLOCKS * BLOCK_SIZE as u64 / 10;
    rig.run(&port, Some(rate)).await.expect("described");
    let took = began.elapsed().as_secs();
    assert!((6..=10).contains(&took), "{took} s at a tenth per second");
}
