//! Frames: round trips, every refusal, open frames, every cut.

use super::header::{FRAME_COUNTS_WORD, FRAME_NUMBER_WORD, counts_word, entry_offset};
use super::*;
use crate::checksum::crc32c;
use crate::ids::{BLOCK_SIZE, BootId, DiskIndex, LogId, Lsn};
use crate::op::Op;
use proptest::prelude::*;

fn start() -> FrameStart {
    FrameStart {
        log: LogId::from_bytes([1; 16]),
        incarnation: 3,
        number: 77,
        first_lsn: Lsn(500),
        wall_ns: 1_700_000_000_000_000_000,
        boottime_ns: 9_000_000_000,
        boot: BootId::from_bytes([2; 16]),
        previous_crc: 0xdead_beef,
    }
}

/// A frame with these payload lengths (0: a trim), whole.
fn frame(lengths: &[u32]) -> Vec<u8> {
    let mut payload = Vec::new();
    let mut entries = Vec::new();
    for (index, &blocks) in lengths.iter().enumerate() {
        let data: Vec<u8> = (0..blocks as usize * BLOCK_SIZE)
            .map(|at| (at * 7 + index) as u8)
            .collect();
        entries.push(Entry {
            lsn: Lsn(500 + index as u64),
            op: if blocks == 0 { Op::Trim } else { Op::Write },
            disk: DiskIndex(index as u16 % 64),
            first_block: index as u64 * 1000,
            block_count: blocks.max(1),
            payload_position: if blocks == 0 {
                0
            } else {
                1 + (payload.len() / BLOCK_SIZE) as u32
            },
            payload_crc: if blocks == 0 { 0 } else { crc32c(&data) },
            wall_ns: 1_700_000_000_000_000_001,
            aux: 0,
        });
        payload.extend_from_slice(&data);
    }
    let header = FrameHeader {
        start: start(),
        entry_count: entries.len() as u16,
        payload_blocks: (payload.len() / BLOCK_SIZE) as u32,
        durable_lsn: Lsn(499),
        lap: 2,
    };
    let (block, _) = decode::encode_descriptor(&header, &entries);
    let mut bytes = block.to_vec();
    bytes.extend_from_slice(&payload);
    bytes
}

/// Puts the header's checksum right after a change, so that the next check is reached.
fn reseal(frame: &mut [u8]) {
    let crc = crc32c(&frame[..header::FRAME_CRC_OFFSET]);
    frame[header::FRAME_CRC_OFFSET..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
}

/// Puts the first entry's checksum right after a change.
fn reseal_entry(frame: &mut [u8]) {
    let at = entry_offset(0);
    let mut bytes = start().entry_seed().to_le_bytes().to_vec();
    bytes.extend_from_slice(&frame[at..at + 44]);
    frame[at + 44..at + 48].copy_from_slice(&crc32c(&bytes).to_le_bytes());
}

#[test]
fn a_frame_reads_back() {
    let bytes = frame(&[1, 0, 3]);
    let descriptor = Descriptor::decode_frame(&bytes).unwrap();
    assert_eq!(descriptor.header.start, start());
    assert_eq!(descriptor.header.payload_blocks, 4);
    assert_eq!(descriptor.header.frame_blocks(), 5);
    assert_eq!(descriptor.header.last_lsn(), Lsn(502));
    assert_eq!(descriptor.entries.len(), 3);
    let data = Descriptor::payload_of(&descriptor.entries[2], &bytes[BLOCK_SIZE..]);
    assert_eq!(data.len(), 3 * BLOCK_SIZE);
    assert_eq!(data[0], 2);
    assert_eq!(
        Descriptor::decode_header(&bytes[..BLOCK_SIZE]).unwrap(),
        (descriptor.header, descriptor.header_crc)
    );
}

#[test]
fn a_full_descriptor_reads_back() {
    let bytes = frame(&[0; ENTRIES_MAX]);
    assert_eq!(
        Descriptor::decode_frame(&bytes).unwrap().entries.len(),
        ENTRIES_MAX
    );
}

#[test]
fn every_cut_and_every_excess_is_refused() {
    let bytes = frame(&[1, 1]);
    for len in 0..bytes.len() {
        assert!(Descriptor::decode_frame(&bytes[..len]).is_err(), "{len}");
    }
    let mut longer = bytes.clone();
    longer.push(0);
    assert!(matches!(
        Descriptor::decode_frame(&longer),
        Err(FrameError::Length { .. })
    ));
    for len in 0..BLOCK_SIZE {
        assert!(Descriptor::decode(&bytes[..len]).is_err(), "{len}");
        assert!(RingDescriptor::decode(&bytes[..len]).is_err(), "{len}");
    }
}

#[test]
fn every_flipped_bit_is_noticed() {
    let bytes = frame(&[1]);
    for byte in 0..bytes.len() {
        let mut broken = bytes.clone();
        broken[byte] ^= 1 << (byte % 8);
        assert!(Descriptor::decode_frame(&broken).is_err(), "byte {byte}");
    }
}

#[test]
fn each_refusal_has_its_name() {
    type Change = fn(&mut [u8]);
    let header_cases: [(Change, FrameError); 9] = [
        (|f| f[0] = b'X', FrameError::Magic),
        (|f| f[8] = 2, FrameError::Version(2)),
        (|f| f[10] = 127, FrameError::HeaderLength(127)),
        (|f| f[90] = 1, FrameError::Reserved(90)),
        (|f| f[119] = 1, FrameError::Reserved(119)),
        (|f| f[88] = 0, FrameError::EntryCount(0)),
        (|f| f[88] = 83, FrameError::EntryCount(83)),
        (|f| f[93] = 3, FrameError::PayloadBlocks(769)),
        (
            |f| f[96] = 3,
            FrameError::FrameBlocks {
                frame_blocks: 3,
                payload_blocks: 1,
            },
        ),
    ];
    for (change, expected) in header_cases {
        let mut bytes = frame(&[1]);
        change(&mut bytes);
        reseal(&mut bytes);
        assert_eq!(Descriptor::decode_frame(&bytes).unwrap_err(), expected);
    }
    let entry_cases: [(Change, FrameError); 8] = [
        (
            |f| f[entry_offset(0)] ^= 1,
            FrameError::EntryLsn {
                entry: 0,
                found: 501,
                expected: 500,
            },
        ),
        (
            |f| f[entry_offset(0) + 38] = 99,
            FrameError::EntryOp { entry: 0, op: 99 },
        ),
        (
            |f| f[entry_offset(0) + 39] = 4,
            FrameError::EntryFlags { entry: 0, flags: 4 },
        ),
        (
            |f| f[entry_offset(0) + 36] = 64,
            FrameError::EntryDisk { entry: 0, disk: 64 },
        ),
        (
            |f| f[entry_offset(0) + 24] = 0,
            FrameError::EntryRange {
                entry: 0,
                first: 0,
                count: 0,
            },
        ),
        (
            |f| f[entry_offset(0) + 24] = 2,
            FrameError::EntryPayload {
                entry: 0,
                position: 1,
                blocks: 2,
            },
        ),
        (
            |f| f[entry_offset(0) + 28] = 0,
            FrameError::EntryPayload {
                entry: 0,
                position: 0,
                blocks: 1,
            },
        ),
        (
            |f| f[entry_offset(0) + 15] = 0xff,
            FrameError::EntryRange {
                entry: 0,
                first: 0xff << 56,
                count: 1,
            },
        ),
    ];
    for (change, expected) in entry_cases {
        let mut bytes = frame(&[1]);
        change(&mut bytes);
        reseal_entry(&mut bytes);
        assert_eq!(Descriptor::decode_frame(&bytes).unwrap_err(), expected);
    }
}

#[test]
fn overlapping_payloads_are_refused() {
    let bytes = frame(&[1, 1]);
    let mut descriptor = Descriptor::decode_frame(&bytes).unwrap();
    descriptor.entries[1].payload_position = 1;
    let (block, _) = decode::encode_descriptor(&descriptor.header, &descriptor.entries);
    assert_eq!(
        Descriptor::decode(&block),
        Err(FrameError::PayloadOverlap { entry: 1 })
    );
}

#[test]
fn bytes_behind_the_last_entry_are_refused() {
    let mut bytes = frame(&[1]);
    bytes[entry_offset(1) + 5] = 1;
    assert_eq!(
        Descriptor::decode_frame(&bytes),
        Err(FrameError::Reserved(entry_offset(1) + 5))
    );
    let mut bytes = frame(&[1]);
    bytes[BLOCK_SIZE - 1] = 1;
    assert_eq!(
        Descriptor::decode_frame(&bytes),
        Err(FrameError::Reserved(BLOCK_SIZE - 1))
    );
}

#[test]
fn an_entry_of_another_frame_is_not_taken() {
    let theirs = FrameStart {
        incarnation: 2,
        ..start()
    };
    let ours = Descriptor::decode_frame(&frame(&[1])).unwrap();
    let mut bytes = frame(&[1]);
    let stale = ours.entries[0].encode(theirs.entry_seed());
    bytes[entry_offset(0)..entry_offset(1)].copy_from_slice(&stale);
    assert!(matches!(
        Descriptor::decode_frame(&bytes),
        Err(FrameError::EntryCrc { entry: 0, .. })
    ));
}

/// The writer's steps on ring memory, each followed by what a reader must find.
#[test]
fn an_open_frame_is_whole_after_every_step() {
    let whole = frame(&[2, 1]);
    let closed = Descriptor::decode_frame(&whole).unwrap();
    let mut ring = frame(&[1, 1, 1]);
    ring[FRAME_NUMBER_WORD] = 70;
    let opened = start().open_descriptor();
    let words = |ring: &mut [u8], at: usize, word: u64| {
        ring[at..at + 8].copy_from_slice(&word.to_le_bytes());
    };
    let count_at = |ring: &[u8]| match RingDescriptor::decode(&ring[..BLOCK_SIZE]).unwrap() {
        RingDescriptor::Open(open) => {
            (open.header.start.number == 77).then(|| open.entries(ring).unwrap().len())
        }
        RingDescriptor::Closed(_) => panic!("not closed yet"),
    };
    words(&mut ring, FRAME_COUNTS_WORD, 0);
    assert_eq!(count_at(&ring), None, "still the old number");
    ring[..FRAME_NUMBER_WORD].copy_from_slice(&opened[..FRAME_NUMBER_WORD]);
    ring[FRAME_NUMBER_WORD + 8..BLOCK_SIZE]
        .copy_from_slice(&opened[FRAME_NUMBER_WORD + 8..BLOCK_SIZE]);
    assert_eq!(count_at(&ring), None);
    words(&mut ring, FRAME_NUMBER_WORD, 77);
    assert_eq!(count_at(&ring), Some(0));
    let mut blocks = 0;
    for (index, entry) in closed.entries.iter().enumerate() {
        let at = entry.payload_position as usize * BLOCK_SIZE;
        let end = at + entry.block_count as usize * BLOCK_SIZE;
        ring[at..end].copy_from_slice(&whole[at..end]);
        assert_eq!(count_at(&ring), Some(index));
        let slot = entry_offset(index);
        ring[slot..slot + ENTRY_BYTES].copy_from_slice(&entry.encode(start().entry_seed()));
        assert_eq!(count_at(&ring), Some(index));
        blocks += entry.block_count;
        words(
            &mut ring,
            FRAME_COUNTS_WORD,
            counts_word(index as u16 + 1, blocks),
        );
        assert_eq!(count_at(&ring), Some(index + 1));
    }
    let (bytes, _) = closed.header.encode();
    for at in (56..header::FRAME_CRC_WORD).step_by(8) {
        ring[at..at + 8].copy_from_slice(&bytes[at..at + 8]);
        assert_eq!(count_at(&ring), Some(2));
    }
    ring[header::FRAME_CRC_WORD..HEADER_BYTES]
        .copy_from_slice(&bytes[header::FRAME_CRC_WORD..HEADER_BYTES]);
    assert_eq!(
        RingDescriptor::decode(&ring[..BLOCK_SIZE]),
        Ok(RingDescriptor::Closed(closed))
    );
    assert_eq!(ring, whole);
}

#[test]
fn damage_below_the_count_of_an_open_frame_is_noticed() {
    let mut bytes = frame(&[1, 1]);
    bytes[96..100].fill(0);
    let RingDescriptor::Open(once_closed) = RingDescriptor::decode(&bytes[..BLOCK_SIZE]).unwrap()
    else {
        panic!("open");
    };
    assert!(matches!(
        once_closed.entries(&bytes),
        Err(FrameError::HeaderCrc { .. })
    ));
    bytes[header::FRAME_CRC_OFFSET..HEADER_BYTES].fill(0);
    let RingDescriptor::Open(open) = RingDescriptor::decode(&bytes[..BLOCK_SIZE]).unwrap() else {
        panic!("open");
    };
    assert_eq!(open.entries(&bytes).unwrap().len(), 2);
    assert!(open.entries(&bytes[..2 * BLOCK_SIZE]).is_err());
    bytes[2 * BLOCK_SIZE + 9] ^= 1;
    assert!(matches!(
        open.entries(&bytes),
        Err(FrameError::PayloadCrc { entry: 1, .. })
    ));
}

#[test]
fn small_areas_hold_several_frames() {
    assert_eq!(
        payload_blocks_limit(1 << 20, 1 << 20),
        FRAME_PAYLOAD_BLOCKS_MAX
    );
    assert_eq!(payload_blocks_limit(64, 1 << 20), 15);
    assert_eq!(payload_blocks_limit(1 << 20, 8), 1);
    assert_eq!(payload_blocks_limit(0, 0), 1);
}

fn any_op() -> impl Strategy<Value = Op> {
    (1u8..=11).prop_map(|number| Op::from_number(number).unwrap())
}

prop_compose! {
    fn any_entry()(
        op in any_op(),
        disk in 0u16..64,
        first_block in 0..entry::BLOCKS_END - u64::from(u32::MAX),
        count in 1u32..=4,
        wall_ns: u64,
        aux: u32,
        body: bool,
        fill: u8,
    ) -> (Entry, u8) {
        (Entry {
            lsn: Lsn(0),
            op,
            disk: DiskIndex(disk),
            first_block,
            block_count: count,
            payload_position: u32::from(body),
            payload_crc: 0,
            wall_ns,
            aux,
        }, fill)
    }
}

proptest! {
    #[test]
    fn any_frame_reads_back(
        parts in prop::collection::vec(any_entry(), 1..ENTRIES_MAX),
        number: u64,
        lsn in 1..u64::MAX - 1000,
        lap: u32,
        durable: u64,
        previous_crc: u32,
    ) {
        let mut payload = Vec::new();
        let mut entries = Vec::new();
        for (index, (mut entry, fill)) in parts.into_iter().enumerate() {
            entry.lsn = Lsn(lsn + index as u64);
            if matches!(entry.op, Op::Write) {
                entry.payload_position = 1;
            } else if matches!(entry.op, Op::Zero | Op::Trim) {
                entry.payload_position = 0;
            }
            let blocks = entry.payload_blocks();
            if blocks > 0 {
                entry.payload_position = 1 + (payload.len() / BLOCK_SIZE) as u32;
                let data = vec![fill; blocks as usize * BLOCK_SIZE];
                entry.payload_crc = crc32c(&data);
                payload.extend_from_slice(&data);
            }
            entries.push(entry);
        }
        let header = FrameHeader {
            start: FrameStart { number, first_lsn: Lsn(lsn), previous_crc, ..start() },
            entry_count: entries.len() as u16,
            payload_blocks: (payload.len() / BLOCK_SIZE) as u32,
            durable_lsn: Lsn(durable),
            lap,
        };
        let (block, header_crc) = decode::encode_descriptor(&header, &entries);
        let mut bytes = block.to_vec();
        bytes.extend_from_slice(&payload);
        let expected = Descriptor { header, header_crc, entries };
        prop_assert_eq!(Descriptor::decode_frame(&bytes), Ok(expected));
    }

    #[test]
    fn noise_is_refused_without_a_panic(noise in prop::collection::vec(any::<u8>(), BLOCK_SIZE)) {
        prop_assert!(Descriptor::decode(&noise).is_err());
        prop_assert!(RingDescriptor::decode(&noise).is_err());
    }
}
