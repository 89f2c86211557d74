//! The bytes of format version 1. If one of these tests fails, stored segments become unreadable:
//! make a new version instead.

use super::tests::{spec, write};
use super::*;
use crate::chain::{RecordChain, RecordMeta};
use crate::golden::golden;
use crate::ids::{BLOCK_SIZE, DiskIndex, Lsn};
use crate::op::Op;

const LOG: &str = include_str!("../../golden/segment-log-v1.hex");
const PASS: &str = include_str!("../../golden/segment-pass-v1.hex");
const PASS_BEGIN: &str = include_str!("../../golden/pass-begin-v1.hex");
const PASS_END: &str = include_str!("../../golden/pass-end-v1.hex");

#[test]
fn log_segment() {
    let trim = RecordMeta {
        op: Op::Trim,
        block_count: 9,
        ..write(10, 77, &[])
    };
    let zero = RecordMeta {
        op: Op::Zero,
        block_count: 0x0102_0304,
        disk: DiskIndex(2),
        ..write(11, 0x1112_1314_1516, &[])
    };
    let mut builder = SegmentBuilder::new(spec());
    builder.push(&trim, &[]).unwrap();
    builder.push(&zero, &[]).unwrap();
    let sealed = builder.seal().unwrap();
    assert_eq!(sealed.bytes, golden(LOG));
    let index = verify(&golden(LOG)).unwrap();
    let records: Vec<RecordMeta> = index.entries.iter().map(|e| e.record).collect();
    assert_eq!(records, [trim, zero]);
}

/// Compressed bytes are read for ever; a later zstd may write others, so writing is not compared.
#[test]
fn pass_segment() {
    let bytes = golden(PASS);
    let index = verify(&bytes).unwrap();
    assert_eq!(
        (index.header.kind, index.header.pass),
        (SegmentKind::Pass, Lsn(40))
    );
    assert_eq!(index.header.chain_before, RecordChain::BASE);
    let runs: Vec<_> = index
        .entries
        .iter()
        .map(|e| (e.record.disk.0, e.record.first_block, e.record.lsn.0))
        .collect();
    assert_eq!(runs, [(0, 10, 44), (1, 0, 43)]);
    let range = index.chunks[0].range();
    let raw = index.chunks[0]
        .decode(0, &bytes[range.start as usize..range.end as usize])
        .unwrap();
    let want = [vec![0xab; 2 * BLOCK_SIZE], vec![0xcd; BLOCK_SIZE]].concat();
    assert_eq!(raw, want);
}

#[test]
fn pass_bodies() {
    let begin = PassBeginBody {
        sink: SinkId([0x55; 16]),
        rebases: true,
    };
    let end = PassEndBody {
        sink: SinkId([0x55; 16]),
        begin: Lsn(7),
        blocks: 9,
        chain: RecordChain([0x44; 32]),
    };
    let block = |text| {
        let mut bytes = golden(text);
        bytes.resize(BLOCK_SIZE, 0);
        bytes
    };
    assert_eq!(begin.encode(), block(PASS_BEGIN));
    assert_eq!(PassBeginBody::decode(&block(PASS_BEGIN)), Ok(begin));
    assert_eq!(end.encode(), block(PASS_END));
    assert_eq!(PassEndBody::decode(&block(PASS_END)), Ok(end));
}
