//! What a layer refuses, and that it comes back as it went in.

use super::*;
use crate::chain::RecordChain;
use crate::checkpoint::{CheckpointKind, CheckpointTrigger};
use crate::checkpoint_confirm::CheckpointConfirmBody;
use crate::ids::{DiskIndex, Epoch, GroupId, LogId, Lsn};
use crate::segment::{ClockAnchor, SegmentKind};
use crate::wire::Cursor;
use proptest::prelude::*;

pub(super) fn extent(block: u64, lsn: u64, level: u8) -> Extent {
    Extent {
        block,
        lsn: Lsn(lsn),
        segment: 3,
        position: if lsn.is_multiple_of(3) { 0 } else { 17 },
        disk: DiskIndex(1),
        level,
        has_data: !lsn.is_multiple_of(3),
    }
}

/// A head with something in every list, and the bytes of its one file.
pub(super) fn sample() -> (LayerHead, Vec<u8>) {
    let mut file = Vec::new();
    let small = [extent(7, 12, 0), extent(7, 13, 0), extent(9, 11, 0)];
    let large = [extent(64, 14, 6)];
    let pages = [&small[..], &large[..]]
        .map(|extents| encode_page(extents, 0, &mut file).unwrap())
        .to_vec();
    let segment = |sequence, kind, first, last| SegmentEntry {
        sequence,
        kind,
        first_lsn: Lsn(first),
        last_lsn: Lsn(last),
        chain_after: RecordChain([0x22; 32]),
        index_hash: [0x33; 32],
        stored_bytes: 4567,
        wall_min_ns: 89,
        has_verify: kind == SegmentKind::Log,
    };
    let base = |begin, last, pass| BaseEntry {
        begin: Lsn(begin),
        begin_wall_ns: 1,
        after_gap: begin > 5,
        last,
        readable_wall_ns: 2,
        last_wall_ns: 3,
        changed_bytes: 4,
        pass,
    };
    let active = PassProgress {
        next: (1, 10),
        blocks: 5,
        chain: RecordChain([0x44; 32]),
        lsn_max: Lsn(14),
    };
    let dropped = PassState::Dropped {
        came: 6,
        promised: 7,
    };
    let head = LayerHead {
        group: GroupId::from_bytes([0x11; 16]),
        epoch: Epoch(2),
        log: LogId::from_bytes([0x55; 16]),
        first_seq: 3,
        before: Cursor::default(),
        after: Cursor {
            lsn: Lsn(14),
            chain: RecordChain([0x22; 32]),
        },
        anchor: Some(ClockAnchor {
            wall_ns: 100,
            boot_id: [0x66; 16],
            boottime_ns: 50,
        }),
        segments: vec![
            segment(3, SegmentKind::Log, 1, 9),
            segment(4, SegmentKind::Pass, 2, 8),
            segment(5, SegmentKind::Log, 10, 14),
        ],
        eras: vec![
            ClockEra {
                first_lsn: Lsn(1),
                last_lsn: Lsn(4),
                first_ns: 10,
                last_ns: 20,
            },
            ClockEra {
                first_lsn: Lsn(5),
                last_lsn: Lsn(14),
                first_ns: 5,
                last_ns: 9,
            },
        ],
        bases: vec![
            base(1, Some(Lsn(2)), PassState::Abandoned),
            base(3, Some(Lsn(4)), dropped),
            base(5, Some(Lsn(9)), PassState::Complete(Lsn(6))),
            base(10, None, PassState::Active(active)),
        ],
        checkpoints: vec![CheckpointEntry {
            lsn: Lsn(8),
            base: Lsn(5),
            wall_ns: 77,
            kind: CheckpointKind::Application,
            trigger: CheckpointTrigger::Schedule,
            changed_bytes: 8192,
            label: "nightly".to_owned(),
        }],
        confirms: vec![CheckpointConfirmBody {
            checkpoint: Lsn(8),
            confirmed: false,
            window_ns: 5,
            own_ns: 4,
            frozen: "/".to_owned(),
            skipped: String::new(),
            reason: "slow".to_owned(),
        }],
        runs: vec![LayerRun {
            base: Lsn(10),
            lsn_min: Lsn(11),
            extents: 4,
            pages,
        }],
        files: 1,
    };
    (head, file)
}

#[test]
fn a_head_comes_back_as_it_went_in() {
    let (head, _) = sample();
    let bytes = head.encode();
    assert_eq!(LayerHead::decode(&bytes), Ok(head.clone()));
    assert_eq!((head.last_seq(), head.extents()), (5, 4));
    let cut: Vec<usize> = (0..bytes.len())
        .filter(|len| LayerHead::decode(&bytes[..*len]).is_ok())
        .collect();
    assert!(cut.is_empty(), "cut at {cut:?} and taken");
}

#[test]
fn heads_that_contradict_themselves_are_refused() {
    type Change = fn(&mut LayerHead);
    let changes: [(&str, Change); 13] = [
        ("epoch", |h| h.epoch = Epoch(0)),
        ("no segment", |h| h.segments.clear()),
        ("eras", |h| h.eras.reverse()),
        ("bases", |h| h.bases.reverse()),
        ("checkpoint of no base", |h| h.checkpoints[0].base = Lsn(4)),
        ("run of no base", |h| h.runs[0].base = Lsn(4)),
        ("pages out of order", |h| h.runs[0].pages.reverse()),
        ("pages that overlap", |h| {
            let mut page = h.runs[0].pages[0];
            page.first_block = 8;
            page.last_block = 8;
            h.runs[0].pages.insert(1, page);
            h.runs[0].extents += 3;
        }),
        ("extents miscounted", |h| h.runs[0].extents += 1),
        ("a file that is not there", |h| h.files = 0),
        ("a page without extents", |h| {
            h.runs[0].extents -= 1;
            h.runs[0].pages[1].extents = 0;
        }),
        ("a page that is longer than its extents", |h| {
            h.runs[0].pages[1].place.stored_len = 25;
        }),
        ("a page at the file's end of counting", |h| {
            h.runs[0].pages[1].place.offset = u32::MAX;
        }),
    ];
    for (what, change) in changes {
        let (mut head, _) = sample();
        change(&mut head);
        assert!(LayerHead::decode(&head.encode()).is_err(), "{what}");
    }
}

#[test]
fn a_damaged_page_is_refused() {
    let (head, file) = sample();
    for page in &head.runs[0].pages {
        let range = page.range();
        let stored = &file[range.start as usize..range.end as usize];
        assert!(decode_page(page, stored).is_ok());
        let mut damaged = stored.to_vec();
        damaged[0] ^= 1;
        assert_eq!(decode_page(page, &damaged), Err(PageError::Checksum));
        let other = PageEntry {
            first_lsn: Lsn(1),
            ..*page
        };
        assert_eq!(decode_page(&other, stored), Err(PageError::Content));
    }
}

#[test]
fn a_zstd_bomb_stops_at_the_stated_length() {
    let bomb = zstd::bulk::compress(&vec![0u8; 64 << 20], 19).unwrap();
    let (head, _) = sample();
    let mut page = head.runs[0].pages[0];
    page.extents = 200;
    page.place.stored_len = bomb.len() as u32;
    page.place.crc = crate::checksum::crc32c(&bomb);
    assert_eq!(decode_page(&page, &bomb), Err(PageError::Content));
}

#[test]
fn what_is_no_page_is_not_encoded() {
    let mut file = Vec::new();
    let mut refused = |extents: &[Extent]| encode_page(extents, 0, &mut file).is_err();
    assert!(refused(&[]));
    assert!(refused(&[extent(9, 1, 0), extent(7, 1, 0)]), "order");
    assert!(refused(&[extent(7, 1, 0), extent(8, 1, 1)]), "two levels");
    assert!(refused(&[extent(7, 1, 1)]), "not aligned");
    let behind = |position| Extent {
        position,
        ..extent(64, 1, 6)
    };
    assert!(refused(&[behind(4096 - 63)]), "behind a segment's payload");
    let beyond = Extent {
        block: 1 << 51,
        ..extent(0, 3, 0)
    };
    assert!(refused(&[beyond]), "behind the last block of any disk");
    assert!(refused(&vec![extent(7, 1, 0); PAGE_EXTENTS_MAX + 1]));
    assert!(file.is_empty());
}

proptest! {
    #[test]
    fn pages_come_back_as_they_went_in(
        mut places in proptest::collection::vec((0u64..1 << 20, 1u64..1 << 30), 1..=PAGE_EXTENTS_MAX),
        level in 0u8..12,
    ) {
        places.sort_unstable();
        let extents: Vec<Extent> = places
            .iter()
            .map(|(block, lsn)| extent(block << level, *lsn, level))
            .collect();
        let mut file = vec![1, 2, 3];
        let page = encode_page(&extents, 9, &mut file).unwrap();
        prop_assert_eq!(page.place.file, 9);
        prop_assert_eq!(page.range().start, 3);
        prop_assert_eq!(decode_page(&page, &file[3..]), Ok(extents));
    }
}
