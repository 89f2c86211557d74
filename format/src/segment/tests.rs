//! Round trips, limits and damage.

use super::*;
use crate::chain::{RecordChain, RecordMeta};
use crate::checksum::crc32c;
use crate::ids::{BLOCK_SIZE, DiskIndex, Epoch, GroupId, LogId, Lsn};
use crate::op::Op;
use proptest::prelude::*;

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

fn trim(lsn: u64) -> RecordMeta {
    RecordMeta {
        op: Op::Trim,
        block_count: 9,
        ..write(lsn, 77, &[])
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

/// A segment of writes with these lengths in blocks (0: a trim), every other one compressible.
fn segment_of(lengths: &[usize]) -> (SealedSegment, Vec<(RecordMeta, Vec<u8>)>) {
    let mut builder = SegmentBuilder::new(spec());
    let mut records = Vec::new();
    for (at, blocks) in lengths.iter().copied().enumerate() {
        let lsn = 10 + at as u64;
        let payload = if at % 2 == 0 {
            noise(lsn, blocks)
        } else {
            vec![at as u8; blocks * BLOCK_SIZE]
        };
        let record = if blocks == 0 {
            trim(lsn)
        } else {
            write(lsn, at as u64 * 1000, &payload)
        };
        builder.push(&record, &payload).unwrap();
        records.push((record, payload));
    }
    (builder.seal().unwrap(), records)
}

fn small() -> Vec<u8> {
    segment_of(&[1, 1, 0]).0.bytes.to_vec()
}

fn payload_in(
    index: &SegmentIndex,
    bytes: &[u8],
    entry: &IndexEntry,
) -> Result<Vec<u8>, SegmentError> {
    index.payload(entry, |number, info| {
        let range = info.range();
        info.decode(number, &bytes[range.start as usize..range.end as usize])
    })
}

/// Changes parts of a segment and makes all checksums right again, so that the checks behind them
/// are reached.
fn forge(bytes: &[u8], change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    change(&mut bytes);
    let crc = crc32c(&bytes[..HEADER_BYTES - 4]).to_le_bytes();
    bytes[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&crc);
    let header: Vec<u8> = bytes[..HEADER_BYTES].to_vec();
    let footer = bytes.len() - FOOTER_BYTES;
    bytes[footer - HEADER_BYTES..footer].copy_from_slice(&header);
    let index = u64::from_le_bytes(bytes[footer + 16..footer + 24].try_into().unwrap()) as usize;
    let index_hash = *blake3::hash(&bytes[index.min(footer)..footer]).as_bytes();
    bytes[footer + 48..footer + 80].copy_from_slice(&index_hash);
    let content_hash = *blake3::hash(&bytes[..footer]).as_bytes();
    bytes[footer + 80..footer + 112].copy_from_slice(&content_hash);
    let crc = crc32c(&bytes[footer..footer + 124]).to_le_bytes();
    bytes[footer + 124..].copy_from_slice(&crc);
    bytes
}

/// Offsets of index, chunk table and footer.
fn offsets(bytes: &[u8]) -> (usize, usize, usize) {
    let footer = Footer::decode(bytes).unwrap();
    let index = footer.index_offset as usize;
    let table = index + footer.record_count as usize * INDEX_ENTRY_BYTES;
    (index, table, bytes.len() - FOOTER_BYTES)
}

#[test]
fn what_goes_in_comes_out() {
    let (sealed, records) = segment_of(&[1, 3, 64, 60, 5, 256, 1, 0]);
    let index = verify(&sealed.bytes).unwrap();
    assert_eq!(index.header, sealed.header);
    assert_eq!(index.entries.len(), records.len());
    for (entry, (record, payload)) in index.entries.iter().zip(&records) {
        assert_eq!(entry.record, *record);
        assert_eq!(payload_in(&index, &sealed.bytes, entry).unwrap(), *payload);
    }
    assert!(index.chunks.iter().any(|c| c.codec == Codec::Raw));
    assert!(index.chunks.iter().any(|c| c.codec == Codec::Zstd));
}

#[test]
fn a_block_is_found_within_a_long_record() {
    let (sealed, records) = segment_of(&[5, 256, 7]);
    let index = verify(&sealed.bytes).unwrap();
    let place = index.entries[1].payload.unwrap();
    assert_eq!(index.chunks_of(place).len(), 16);
    for nth in [0, 1, 15, 16, 200, 255] {
        let (chunk, block) = index.locate_block(place, nth);
        let info = index.chunks[chunk as usize];
        let range = info.range();
        let raw = info
            .decode(
                chunk,
                &sealed.bytes[range.start as usize..range.end as usize],
            )
            .unwrap();
        let want = &records[1].1[nth * BLOCK_SIZE..(nth + 1) * BLOCK_SIZE];
        assert_eq!(&raw[block * BLOCK_SIZE..(block + 1) * BLOCK_SIZE], want);
    }
}

#[test]
fn the_end_alone_gives_the_index() {
    let bytes = small();
    let footer = Footer::decode(&bytes[bytes.len() - FOOTER_BYTES..]).unwrap();
    let tail = footer.tail_range();
    let index = SegmentIndex::decode(&bytes[tail.start as usize..]).unwrap();
    assert_eq!(index, SegmentIndex::of_segment(&bytes).unwrap());
    let short = SegmentIndex::decode(&bytes[tail.start as usize + 1..]);
    let need = (tail.end - tail.start) as usize;
    assert!(
        matches!(short, Err(SegmentError::TooShort { need: n, .. }) if n == need),
        "{short:?}"
    );
}

#[test]
fn every_cut_and_every_flip_is_noticed() {
    let bytes = segment_of(&[0, 0, 1]).0.bytes.to_vec();
    for len in 0..bytes.len() {
        assert!(verify(&bytes[..len]).is_err(), "cut at {len}");
        assert!(verify(&bytes[bytes.len() - len..]).is_err(), "last {len}");
    }
    for at in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << (at % 8);
        assert!(verify(&flipped).is_err(), "flip in byte {at}");
    }
    let mut longer = bytes.clone();
    longer.push(0);
    assert!(verify(&longer).is_err());
    let twice = [bytes.clone(), bytes].concat();
    assert!(verify(&twice).is_err());
}

/// A reader of one part alone cannot count on the hash over all of them.
#[test]
fn each_part_is_covered_by_its_own_checksum() {
    let bytes = segment_of(&[1]).0.bytes.to_vec();
    let (index, _, footer) = offsets(&bytes);
    let flipped = |at: usize| {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1;
        flipped
    };
    let checksum = |part| SegmentError::Checksum { part };
    // In fields that may hold anything: a clock, a clock, a hash, noise.
    let header = flipped(160);
    assert_eq!(
        SegmentHeader::decode(&header[..HEADER_BYTES]),
        Err(checksum("segment header"))
    );
    assert_eq!(
        SegmentIndex::decode(&flipped(index + 8)[index..]),
        Err(checksum("segment index"))
    );
    assert_eq!(
        Footer::decode(&flipped(footer + 90)[footer..]),
        Err(checksum("segment footer"))
    );
    let good = SegmentIndex::of_segment(&bytes).unwrap();
    assert_eq!(good.chunks[0].codec, Codec::Raw);
    let chunk = good.chunks[0].range();
    assert_eq!(
        good.chunks[0].decode(
            0,
            &flipped(HEADER_BYTES)[chunk.start as usize..chunk.end as usize]
        ),
        Err(SegmentError::ChunkChecksum(0))
    );
}

#[test]
fn other_versions_and_schemes_are_named() {
    let bytes = small();
    assert_eq!(
        verify(&forge(&bytes, |_| {})).unwrap().header.epoch,
        Epoch(3)
    );
    let newer = forge(&bytes, |b| b[8] = 2);
    assert_eq!(verify(&newer), Err(SegmentError::Version(2)));
    let sealed = forge(&bytes, |b| b[13] = 1);
    assert_eq!(verify(&sealed), Err(SegmentError::Scheme(1)));
    assert!(matches!(
        verify(b"not a segment"),
        Err(SegmentError::TooShort { .. })
    ));
    assert!(matches!(
        verify(&[7; 4096]),
        Err(SegmentError::Magic { .. })
    ));
}

#[test]
fn forged_lengths_are_refused_before_memory_is_taken() {
    let bytes = small();
    let (index, table, footer) = offsets(&bytes);
    let put =
        |at: usize, value: &[u8]| forge(&bytes, |b| b[at..at + value.len()].copy_from_slice(value));
    let huge = u32::MAX.to_le_bytes();
    let is_limit =
        |r: Result<SegmentIndex, SegmentError>| matches!(r, Err(SegmentError::Limit { .. }));
    // Header: records, chunks, payload.
    assert!(is_limit(verify(&put(176, &huge))));
    assert!(is_limit(verify(&put(180, &huge))));
    assert!(is_limit(verify(&put(184, &u64::MAX.to_le_bytes()))));
    // Footer: index offset, total length, counts.
    assert!(is_limit(SegmentIndex::decode(&put(
        footer + 16,
        &u64::MAX.to_le_bytes()
    ))));
    assert!(is_limit(SegmentIndex::decode(&put(
        footer + 32,
        &u64::MAX.to_le_bytes()
    ))));
    assert!(is_limit(SegmentIndex::decode(&put(footer + 40, &huge))));
    assert!(is_limit(SegmentIndex::decode(&put(footer + 44, &huge))));
    // Chunk table: raw length.
    assert!(is_limit(verify(&put(table + 12, &huge))));
    assert!(verify(&put(table + 8, &huge)).is_err());
    // Index: payload length, position, disk, operation.
    for (at, value) in [(42, 0xffff_u16), (36, 9), (40, 9), (44, 64), (46, 200)] {
        let forged = put(index + at, &value.to_le_bytes());
        assert!(verify(&forged).is_err(), "field at {at}");
    }
}

#[test]
fn a_zstd_bomb_stops_at_the_stated_length() {
    // 64 MiB of zeroes in a few KiB, stated as one block.
    let bomb = zstd::bulk::compress(&vec![0u8; 64 << 20], 19).unwrap();
    let info = ChunkInfo {
        offset: 256,
        stored_len: bomb.len() as u32,
        raw_len: BLOCK_SIZE as u32,
        crc: crc32c(&bomb),
        codec: Codec::Zstd,
    };
    assert_eq!(info.decode(4, &bomb), Err(SegmentError::ChunkContent(4)));
    // The opposite: less than was stated.
    let little = zstd::bulk::compress(&[0u8; 100], 1).unwrap();
    let info = ChunkInfo {
        stored_len: little.len() as u32,
        crc: crc32c(&little),
        ..info
    };
    assert_eq!(info.decode(4, &little), Err(SegmentError::ChunkContent(4)));
    assert_eq!(
        info.decode(4, &[1, 2, 3]),
        Err(SegmentError::ChunkChecksum(4))
    );
}

#[test]
fn a_forged_record_breaks_the_chain() {
    let bytes = small();
    let (index, ..) = offsets(&bytes);
    // Another wall clock in the first record.
    let forged = forge(&bytes, |b| b[index + 8] ^= 1);
    assert_eq!(verify(&forged), Err(SegmentError::Chain));
}

#[test]
fn a_payload_under_another_records_name_is_noticed() {
    // Two records of one block: contents exchanged within the chunk, all hashes made right.
    let mut builder = SegmentBuilder::new(spec());
    for lsn in [10, 11] {
        let payload = noise(lsn, 1);
        builder.push(&write(lsn, lsn, &payload), &payload).unwrap();
    }
    let bytes = builder.seal().unwrap().bytes.to_vec();
    let (_, table, _) = offsets(&bytes);
    let forged = forge(&bytes, |b| {
        let (a, c) = (HEADER_BYTES, HEADER_BYTES + BLOCK_SIZE);
        let first = b[a..c].to_vec();
        b.copy_within(c..c + BLOCK_SIZE, a);
        b[c..c + BLOCK_SIZE].copy_from_slice(&first);
        let crc = crc32c(&b[a..a + 2 * BLOCK_SIZE]).to_le_bytes();
        b[table + 16..table + 20].copy_from_slice(&crc);
    });
    assert_eq!(verify(&forged), Err(SegmentError::PayloadChecksum(10)));
    // A reader of one record alone notices, too.
    let index = SegmentIndex::of_segment(&forged).unwrap();
    let alone = payload_in(&index, &forged, &index.entries[0]);
    assert_eq!(alone, Err(SegmentError::PayloadChecksum(10)));
}

#[test]
fn the_builder_takes_nothing_that_a_reader_refuses() {
    let mut builder = SegmentBuilder::new(spec());
    let block = noise(1, 1);
    let cases = [
        (write(0, 0, &block), PushError::Order(Lsn(0))),
        (
            RecordMeta {
                block_count: 2,
                ..write(5, 0, &block)
            },
            PushError::Malformed(Lsn(5)),
        ),
        (
            RecordMeta {
                first_block: u64::MAX,
                ..write(5, 0, &block)
            },
            PushError::Malformed(Lsn(5)),
        ),
        (
            RecordMeta {
                disk: DiskIndex(64),
                ..write(5, 0, &block)
            },
            PushError::Malformed(Lsn(5)),
        ),
        (
            RecordMeta {
                op: Op::Trim,
                ..write(5, 0, &block)
            },
            PushError::Malformed(Lsn(5)),
        ),
        (
            RecordMeta {
                payload_crc: 1,
                ..write(5, 0, &block)
            },
            PushError::Checksum(Lsn(5)),
        ),
    ];
    for (record, error) in cases {
        assert_eq!(builder.push(&record, &block), Err(error));
    }
    builder.push(&write(5, 0, &block), &block).unwrap();
    assert_eq!(
        builder.push(&write(7, 0, &block), &block),
        Err(PushError::Order(Lsn(7)))
    );
    let sealed = builder.seal().unwrap();
    assert_eq!(verify(&sealed.bytes).unwrap().entries.len(), 1);
    assert!(SegmentBuilder::new(spec()).seal().is_none());
}

/// What comes after the highest would begin again at zero.
#[test]
fn numbers_that_have_none_after_them_are_refused() {
    let decoded = |epoch, first_lsn| {
        let header = SegmentHeader {
            epoch,
            first_lsn,
            last_lsn: Lsn(first_lsn.0 + 1),
            record_count: 2,
            ..SegmentIndex::of_segment(&small()).expect("good").header
        };
        SegmentHeader::decode(&header.encode()).is_ok()
    };
    let last = Lsn(Lsn::MAX.0 - 1);
    assert!(decoded(Epoch::MAX, last));
    assert!(!decoded(Epoch(Epoch::MAX.0 + 1), last));
    assert!(!decoded(Epoch::MAX, Lsn::MAX));
    let mut builder = SegmentBuilder::new(spec());
    let record = RecordMeta {
        lsn: Lsn(u64::MAX),
        ..trim(1)
    };
    assert_eq!(
        builder.push(&record, &[]),
        Err(PushError::Order(record.lsn))
    );
}

#[test]
fn a_builder_is_full_at_its_limits() {
    let mut builder = SegmentBuilder::new(spec());
    let payload = vec![0; 256 * BLOCK_SIZE];
    let mut lsn = 1;
    while builder.push(&write(lsn, 0, &payload), &payload).is_ok() {
        lsn += 1;
    }
    assert_eq!(builder.payload_bytes(), SEGMENT_PAYLOAD_MAX);
    assert_eq!(
        builder.push(&write(lsn, 0, &payload), &payload),
        Err(PushError::Full)
    );
    verify(&builder.seal().unwrap().bytes).unwrap();
    let mut builder = SegmentBuilder::new(spec());
    for lsn in 1..=SEGMENT_RECORDS_MAX as u64 {
        builder.push(&trim(lsn), &[]).unwrap();
    }
    let next = SEGMENT_RECORDS_MAX as u64 + 1;
    assert_eq!(builder.push(&trim(next), &[]), Err(PushError::Full));
    verify(&builder.seal().unwrap().bytes).unwrap();
}

#[test]
fn a_pass_goes_forward_only() {
    let pass = SegmentSpec {
        kind: SegmentKind::Pass,
        pass: Lsn(40),
        ..spec()
    };
    let mut builder = SegmentBuilder::new(pass);
    let blocks = noise(1, 2);
    builder
        .push_pass_blocks(DiskIndex(0), 10, Lsn(44), &blocks)
        .unwrap();
    let back = builder.push_pass_blocks(DiskIndex(0), 11, Lsn(44), &blocks);
    assert_eq!(back, Err(PushError::Order(Lsn(44))));
    let early = builder.push_pass_blocks(DiskIndex(0), 12, Lsn(39), &blocks);
    assert_eq!(early, Err(PushError::Order(Lsn(39))));
    builder
        .push_pass_blocks(DiskIndex(0), 12, Lsn(43), &blocks)
        .unwrap();
    builder
        .push_pass_blocks(DiskIndex(1), 0, Lsn(50), &blocks)
        .unwrap();
    let sealed = builder.seal().unwrap();
    assert_eq!(
        (sealed.header.first_lsn, sealed.header.last_lsn),
        (Lsn(43), Lsn(50))
    );
    let index = verify(&sealed.bytes).unwrap();
    assert_eq!(index.entries.len(), 3);
}

#[test]
fn a_gap_is_declared_by_its_pass_begin_only() {
    let body = PassBeginBody {
        sink: SinkId([5; 16]),
        rebases: true,
    }
    .encode();
    let begin = RecordMeta {
        op: Op::PassBegin,
        block_count: 0,
        ..write(10, 0, &body)
    };
    let based = SegmentSpec {
        flags: SegmentFlags { declares_gap: true },
        pass: Lsn(10),
        chain_before: RecordChain::BASE,
        ..spec()
    };
    let seal = |spec: SegmentSpec, record: &RecordMeta, payload: &[u8]| {
        let mut builder = SegmentBuilder::new(spec);
        builder.push(record, payload).unwrap();
        verify(&builder.seal().unwrap().bytes)
    };
    assert!(seal(based, &begin, &body).is_ok());
    assert!(seal(based, &trim(10), &[]).is_err(), "no PassBegin");
    assert!(
        seal(
            SegmentSpec {
                pass: Lsn(0),
                ..based
            },
            &begin,
            &body
        )
        .is_err()
    );
    let chained = SegmentSpec {
        chain_before: RecordChain([1; 32]),
        ..based
    };
    assert!(seal(chained, &begin, &body).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_mix_of_lengths_survives(lengths in prop::collection::vec(0usize..=256, 1..20)) {
        let (sealed, records) = segment_of(&lengths);
        let index = verify(&sealed.bytes).unwrap();
        for (entry, (record, payload)) in index.entries.iter().zip(&records) {
            prop_assert_eq!(&entry.record, record);
            prop_assert_eq!(&payload_in(&index, &sealed.bytes, entry).unwrap(), payload);
        }
    }

    /// Decoders neither panic nor accept: damaged bytes, with the checksums made right again.
    #[test]
    fn forged_bytes_do_no_harm(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        tail_only in any::<bool>(),
    ) {
        let bytes = small();
        let (index, ..) = offsets(&bytes);
        let forged = forge(&bytes, |b| {
            for (at, value) in &changes {
                // Chunks are opaque: aim at header, index, table and footer.
                let at = at.index(HEADER_BYTES + b.len() - index);
                let at = if at < HEADER_BYTES { at } else { index + at - HEADER_BYTES };
                b[at] = *value;
            }
        });
        let decoded = if tail_only { SegmentIndex::decode(&forged) } else { verify(&forged) };
        if let Ok(decoded) = decoded {
            for entry in &decoded.entries {
                if let Some(place) = entry.payload {
                    prop_assert!(decoded.chunks_of(place).end as usize <= decoded.chunks.len());
                }
            }
        }
    }

    #[test]
    fn noise_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
        prop_assert!(verify(&bytes).is_err());
        prop_assert!(SegmentIndex::decode(&bytes).is_err());
        prop_assert!(PassBeginBody::decode(&bytes).is_err());
        prop_assert!(PassEndBody::decode(&bytes).is_err());
    }
}

#[test]
fn pass_bodies_are_strict() {
    let begin = PassBeginBody {
        sink: SinkId::of_url("file:///srv/repo"),
        rebases: true,
    };
    let end = PassEndBody {
        sink: begin.sink,
        begin: Lsn(9),
        blocks: 7,
        chain: RecordChain([3; 32]),
    };
    assert_eq!(PassBeginBody::decode(&begin.encode()), Ok(begin));
    assert_eq!(PassEndBody::decode(&end.encode()), Ok(end));
    assert_eq!(
        PassBeginBody::decode(&end.encode()),
        Err(EventBodyError::Reserved)
    );
    assert_eq!(
        PassEndBody::decode(&begin.encode()),
        Err(EventBodyError::Magic)
    );
    for body in [begin.encode(), end.encode()] {
        let decode = |b: &[u8]| {
            (
                PassBeginBody::decode(b).is_ok(),
                PassEndBody::decode(b).is_ok(),
            )
        };
        for len in 0..BLOCK_SIZE {
            assert_eq!(decode(&body[..len]), (false, false));
        }
        let mut dirty = body.clone();
        dirty[BLOCK_SIZE - 1] = 1;
        assert_eq!(decode(&dirty), (false, false));
        let mut newer = body;
        newer[4] = 2;
        assert_eq!(decode(&newer), (false, false));
    }
}
