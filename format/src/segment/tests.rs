//! Round trips, limits and damage.

use super::*;
use crate::chain::{RecordChain, RecordMeta};
use crate::checksum::crc32c;
use crate::ids::{BLOCK_SIZE, DiskIndex, Epoch, GroupId, LogId, Lsn};
use crate::op::Op;

pub(super) fn spec() -> SegmentSpec {
    SegmentSpec {
        kind: SegmentKind::Log,
        flags: SegmentFlags::default(),
        group: GroupId::from_bytes([0x11; 16]),
        epoch: Epoch(3),
        log: LogId::from_bytes([0x22; 16]),
        pass: Lsn::ZERO,
        chain_before: RecordChain([0x33; 32]),
        anchor: ClockAnchor {
            wall_ns: 5,
            boot_id: [0x44; 16],
            boottime_ns: 6,
        },
    }
}

pub(super) fn write(lsn: u64, first_block: u64, payload: &[u8]) -> RecordMeta {
    RecordMeta {
        lsn: Lsn(lsn),
        disk: DiskIndex(1),
        op: Op::Write,
        flags: 0,
        first_block,
        block_count: (payload.len() / BLOCK_SIZE) as u32,
        wall_ns: 1000 + lsn,
        aux: 0,
        payload_crc: crc32c(payload),
    }
}

pub(super) fn noise(seed: u64, blocks: usize) -> Vec<u8> {
    let mut reader = blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof();
    let mut out = vec![0; blocks * BLOCK_SIZE];
    reader.fill(&mut out);
    out
}

fn sample() -> (SealedSegment, Vec<(RecordMeta, Vec<u8>)>) {
    let mut builder = SegmentBuilder::new(spec());
    let mut records = Vec::new();
    for (at, blocks) in [1usize, 3, 64, 60, 5, 256, 1, 0].into_iter().enumerate() {
        let lsn = 10 + at as u64;
        let payload = if at % 2 == 0 {
            noise(lsn, blocks)
        } else {
            vec![at as u8; blocks * BLOCK_SIZE]
        };
        let mut record = write(lsn, at as u64 * 1000, &payload);
        if blocks == 0 {
            record = RecordMeta {
                op: Op::Trim,
                block_count: 9,
                ..record
            };
        }
        builder.push(&record, &payload).unwrap();
        records.push((record, payload));
    }
    (builder.seal().unwrap(), records)
}

#[test]
fn what_goes_in_comes_out() {
    let (sealed, records) = sample();
    let index = verify(&sealed.bytes).unwrap();
    assert_eq!(index.header, sealed.header);
    assert_eq!(index.entries.len(), records.len());
    for (entry, (record, payload)) in index.entries.iter().zip(&records) {
        assert_eq!(entry.record, *record);
        let read = index
            .payload(entry, |number, info| {
                let range = info.range();
                info.decode(
                    number,
                    &sealed.bytes[range.start as usize..range.end as usize],
                )
            })
            .unwrap();
        assert_eq!(read, *payload);
    }
    assert!(index.chunks.iter().any(|c| c.codec == Codec::Raw));
    assert!(index.chunks.iter().any(|c| c.codec == Codec::Zstd));
}

#[test]
fn the_end_alone_gives_the_index() {
    let (sealed, _) = sample();
    let footer = Footer::decode(&sealed.bytes[sealed.bytes.len() - FOOTER_BYTES..]).unwrap();
    let tail = footer.tail_range();
    let index = SegmentIndex::decode(&sealed.bytes[tail.start as usize..]).unwrap();
    assert_eq!(index, SegmentIndex::of_segment(&sealed.bytes).unwrap());
    let short = SegmentIndex::decode(&sealed.bytes[tail.start as usize + 1..]);
    assert!(
        matches!(short, Err(SegmentError::TooShort { .. })),
        "{short:?}"
    );
}
