//! What the replica does with a segment, and what a reader of an image waits for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_benches::payload::{Numbers, half_compressible};
use afterimage_benches::primary::{Primary, SEGMENT_WRITES, give};
use afterimage_format::ids::{BLOCK_SIZE, DiskIndex, Lsn};
use afterimage_format::segment::SegmentIndex;
use afterimage_replica::history::Position;
use afterimage_replica::image::{ChunkCache, Image};
use afterimage_replica::index::{Index, SegmentOrdinal};
use afterimage_replica::receive::{Receiver, Session, Verified};
use afterimage_replica::repository::Repository;
use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tempfile::TempDir;
use tokio::runtime::Runtime;

const SEGMENT_PAYLOAD_BYTES: usize = SEGMENT_WRITES * BLOCK_SIZE;
/// Bytes of the disk that images are read of.
const DISK_BYTES: usize = 256 << 20;
/// As the daemon's cache: small beside the disk.
const CACHE_BYTES: usize = 64 << 20;
/// Adds 10^7 records to the sizes of `index build`: 1 GiB of memory, some seconds per sample.
const LARGE: &str = "AFTERIMAGE_BENCH_LARGE";

criterion_group!(replica, index_build, ingest, image_read);
criterion_main!(replica);

/// Segments of 2048 writes of one block all over a disk of 1 TiB, added one by one.
fn index_build(criterion: &mut Criterion) {
    let payloads = payloads();
    let segment = Primary::new(1 << 40).segment(all_of(&payloads));
    let segment = SegmentIndex::of_segment(&segment.expect("a segment")).expect("whole");
    let mut sizes = vec![100_000, 1_000_000];
    if std::env::var_os(LARGE).is_some() {
        sizes.push(10_000_000);
    }
    let mut group = criterion.benchmark_group("index build");
    group.sample_size(10);
    for records in sizes {
        group.throughput(Throughput::Elements(records as u64));
        group.bench_function(BenchmarkId::from_parameter(records), |bencher| {
            bencher.iter_custom(|times| (0..times).map(|_| build(&segment, records)).sum());
        });
    }
    group.finish();
}

/// Time to add so many records. The segments are made from `like`, outside of it.
fn build(like: &SegmentIndex, records: usize) -> Duration {
    let mut index = Index::default();
    let mut numbers = Numbers::new(1);
    let mut segment = like.clone();
    let mut time = Duration::ZERO;
    for (ordinal, first) in (0..records).step_by(SEGMENT_WRITES).enumerate() {
        segment.entries.truncate(records - first);
        for (lsn, entry) in (first as u64 + 1..).zip(&mut segment.entries) {
            entry.record.lsn = Lsn(lsn);
            entry.record.first_block = numbers.below(1 << 28);
        }
        let start = Instant::now();
        index.add(SegmentOrdinal(ordinal as u32), &segment, 0);
        time += start.elapsed();
    }
    assert_eq!(index.extents(), records);
    time
}

/// Full segments into a repository that is a folder: checked alone, and with the durable commit.
fn ingest(criterion: &mut Criterion) {
    let payloads = payloads();
    let mut group = criterion.benchmark_group("ingest");
    group.sample_size(20);
    group.throughput(Throughput::Bytes(SEGMENT_PAYLOAD_BYTES as u64));

    let bytes = Primary::new(1 << 40).segment(all_of(&payloads));
    let bytes = bytes.expect("a segment");
    group.bench_function("check", |bencher| {
        bencher.iter(|| Verified::check(bytes.clone()).expect("whole"));
    });
    let mut site = Site::new(1 << 40);
    group.bench_function("check and commit", |bencher| {
        bencher.iter_custom(|times| {
            let next = |_| site.primary.segment(all_of(&payloads)).expect("a segment");
            let segments: Vec<Bytes> = (0..times).map(next).collect();
            let start = Instant::now();
            segments.into_iter().for_each(|bytes| site.give(bytes));
            start.elapsed()
        });
    });
    group.finish();
}

/// Reads of an image whose disk was written in blocks of 4 KiB, once in order and once all over.
fn image_read(criterion: &mut Criterion) {
    let blocks = (DISK_BYTES / BLOCK_SIZE) as u64;
    let in_order: Vec<u64> = (0..blocks).collect();
    let mut all_over = in_order.clone();
    all_over.sort_unstable_by_key(|block| block.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mut group = criterion.benchmark_group("image read");
    group.sample_size(10);
    for (written, order) in [
        ("written in order", &in_order),
        ("written all over", &all_over),
    ] {
        let site = Site::with_disk(order);
        let image = site.image();
        let mut numbers = Numbers::new(2);
        let mut buffer = vec![0; 1 << 20];
        let mut read = |offset: u64, len: usize| {
            let read = image.read(DiskIndex(0), offset, &mut buffer[..len]);
            site.runtime.block_on(read).expect("readable");
        };
        group.throughput(Throughput::Bytes(BLOCK_SIZE as u64));
        group.bench_function(format!("4 KiB random, {written}"), |bencher| {
            bencher.iter(|| read(numbers.below(blocks) * BLOCK_SIZE as u64, BLOCK_SIZE));
        });
        let mut offset = 0;
        group.throughput(Throughput::Bytes(1 << 20));
        group.bench_function(format!("1 MiB sequential, {written}"), |bencher| {
            bencher.iter(|| {
                read(offset, 1 << 20);
                offset = (offset + (1 << 20)) % DISK_BYTES as u64;
            });
        });
    }
    group.finish();
}

/// A repository in a folder of its own, and the primary that writes it.
struct Site {
    primary: Primary,
    session: Session,
    runtime: Runtime,
    _folder: TempDir,
}

impl Site {
    fn new(disk_bytes: u64) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        let runtime = runtime.expect("a runtime");
        let url = format!("file://{}", folder.path().display());
        let mut primary = Primary::new(disk_bytes);
        let session = runtime.block_on(async {
            let repository = Repository::open(&url).await.expect("a repository");
            primary.connect(&Receiver::new(repository)).await
        });
        Self {
            primary,
            session: session.expect("a session"),
            runtime,
            _folder: folder,
        }
    }

    /// Each block of the disk written once, in this order.
    fn with_disk(order: &[u64]) -> Self {
        let mut site = Self::new(DISK_BYTES as u64);
        let payloads = payloads();
        for blocks in order.chunks(SEGMENT_WRITES) {
            let writes = blocks
                .iter()
                .copied()
                .zip(payloads.iter().map(Vec::as_slice));
            let bytes = site.primary.segment(writes).expect("a segment");
            site.give(bytes);
        }
        site
    }

    fn give(&mut self, bytes: Bytes) {
        let given = give(&mut self.session, bytes, 1);
        self.runtime.block_on(given).expect("stored");
    }

    fn image(&self) -> Image {
        let at = Position {
            epoch: self.primary.epoch(),
            lsn: self.primary.last(),
        };
        let cache = Arc::new(ChunkCache::new(CACHE_BYTES));
        Image::open(self.session.group().clone(), at, cache).expect("the point")
    }
}

/// The payloads of one segment.
fn payloads() -> Vec<Vec<u8>> {
    let mut numbers = Numbers::new(1);
    let block = |_| half_compressible(&mut numbers);
    (0..SEGMENT_WRITES).map(block).collect()
}

/// Writes of these payloads to the first blocks of the disk.
fn all_of(payloads: &[Vec<u8>]) -> impl Iterator<Item = (u64, &[u8])> {
    (0..).zip(payloads.iter().map(Vec::as_slice))
}
