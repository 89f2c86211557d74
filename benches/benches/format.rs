//! What is computed on each byte of a write: the frame at the primary, the segment on both sides.

use std::hint::black_box;

use afterimage_benches::payload::{Numbers, half_compressible};
use afterimage_benches::primary::{Primary, SEGMENT_WRITES};
use afterimage_format::checksum::crc32c;
use afterimage_format::frame::header::entry_offset;
use afterimage_format::frame::{ENTRIES_MAX, ENTRY_BYTES, Entry, FrameHeader, FrameStart};
use afterimage_format::ids::{BLOCK_SIZE, BootId, DiskIndex, LogId, Lsn};
use afterimage_format::op::Op;
use afterimage_format::segment::{SegmentIndex, verify};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

criterion_group!(format, frame_encode, segment);
criterion_main!(format);

/// Payloads to frames: copied, summed, entered; each frame opened and closed as the ring does it.
fn frame_encode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("frame encode");
    for records in [1, 32, 256] {
        let payloads = payloads(records);
        let frames = records.div_ceil(ENTRIES_MAX);
        let mut area = vec![0; (records + frames) * BLOCK_SIZE];
        group.throughput(Throughput::Bytes((records * BLOCK_SIZE) as u64));
        group.bench_function(BenchmarkId::from_parameter(records), |bencher| {
            bencher.iter(|| encode_frames(black_box(&payloads), &mut area));
        });
    }
    group.finish();
}

/// Fills `area` with the frames of these writes, as many as they need.
fn encode_frames(payloads: &[Vec<u8>], area: &mut [u8]) {
    let mut rest = area;
    let mut start = FrameStart {
        log: LogId::from_bytes([1; 16]),
        incarnation: 1,
        number: 1,
        first_lsn: Lsn(1),
        wall_ns: 1,
        boottime_ns: 1,
        boot: BootId::from_bytes([2; 16]),
        previous_crc: 0,
    };
    for records in payloads.chunks(ENTRIES_MAX) {
        let (frame, after) = rest.split_at_mut((1 + records.len()) * BLOCK_SIZE);
        rest = after;
        frame[..BLOCK_SIZE].copy_from_slice(&start.open_descriptor());
        let seed = start.entry_seed();
        for (at, payload) in records.iter().enumerate() {
            let position = (1 + at) * BLOCK_SIZE;
            frame[position..position + BLOCK_SIZE].copy_from_slice(payload);
            let entry = Entry {
                lsn: Lsn(start.first_lsn.0 + at as u64),
                op: Op::Write,
                disk: DiskIndex(0),
                first_block: at as u64,
                block_count: 1,
                payload_position: 1 + at as u32,
                payload_crc: crc32c(payload),
                wall_ns: 1,
                aux: 0,
            };
            let offset = entry_offset(at);
            frame[offset..offset + ENTRY_BYTES].copy_from_slice(&entry.encode(seed));
        }
        let closed = FrameHeader {
            start,
            entry_count: records.len() as u16,
            payload_blocks: records.len() as u32,
            durable_lsn: Lsn::ZERO,
            lap: 0,
        };
        let (header, crc) = closed.encode();
        frame[..header.len()].copy_from_slice(&header);
        start.number += 1;
        start.first_lsn.0 += records.len() as u64;
        start.previous_crc = crc;
    }
}

/// A full segment of 4 KiB writes, compressed by zstd 1.
fn segment(criterion: &mut Criterion) {
    let payloads = payloads(SEGMENT_WRITES);
    let writes = || (0..).zip(payloads.iter().map(Vec::as_slice));
    let cut = || Primary::new(1 << 40).segment(writes()).expect("a segment");
    let bytes = cut();

    let mut group = criterion.benchmark_group("segment");
    group.sample_size(20);
    group.throughput(Throughput::Bytes((SEGMENT_WRITES * BLOCK_SIZE) as u64));
    group.bench_function("encode", |bencher| bencher.iter(cut));
    group.bench_function("decode and verify", |bencher| {
        bencher.iter(|| verify(black_box(&bytes)).expect("whole"));
    });
    group.throughput(Throughput::Elements(SEGMENT_WRITES as u64));
    group.bench_function("decode index", |bencher| {
        bencher.iter(|| SegmentIndex::of_segment(black_box(&bytes)).expect("whole"));
    });
    group.finish();
}

fn payloads(count: usize) -> Vec<Vec<u8>> {
    let mut numbers = Numbers::new(1);
    (0..count)
        .map(|_| half_compressible(&mut numbers))
        .collect()
}
