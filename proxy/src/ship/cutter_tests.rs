//! When segments are closed, and that they hold every record once.

use super::*;
use afterimage_format::chain::RecordMeta;
use afterimage_format::checksum::crc32c;
use afterimage_format::ids::{BLOCK_SIZE, DiskIndex};
use afterimage_format::segment::verify;
use proptest::prelude::*;

const INTERVAL: u64 = 500;

fn cutter(lsn: u64) -> Cutter {
    let stream = Stream {
        group: GroupId::from_bytes([1; 16]),
        log: LogId::from_bytes([2; 16]),
        epoch: Epoch(1),
    };
    let chain = RecordChain([9; 32]);
    Cutter::new(
        stream,
        Cursor {
            lsn: Lsn(lsn),
            chain,
        },
        INTERVAL,
    )
}

fn record(lsn: u64, op: Op, blocks: usize) -> Record {
    let payload = vec![lsn as u8; blocks * BLOCK_SIZE];
    let meta = RecordMeta {
        lsn: Lsn(lsn),
        disk: DiskIndex(0),
        op,
        flags: 0,
        first_block: lsn,
        block_count: blocks.max(1) as u32,
        wall_ns: lsn * 10,
        aux: 0,
        payload_crc: crc32c(&payload),
    };
    Record {
        meta,
        payload: payload.into(),
    }
}

fn anchor(boot: u8) -> ClockAnchor {
    ClockAnchor {
        wall_ns: 1,
        boot_id: [boot; 16],
        boottime_ns: 1,
    }
}

#[test]
fn a_segment_closes_when_its_first_record_is_old() {
    let (mut cutter, mut out) = (cutter(4), VecDeque::new());
    assert_eq!(cutter.deadline_ns(), None);
    cutter
        .push(anchor(1), &record(5, Op::Write, 1), 1000, &mut out)
        .unwrap();
    cutter
        .push(anchor(1), &record(6, Op::Write, 1), 1400, &mut out)
        .unwrap();
    assert_eq!(cutter.deadline_ns(), Some(1500));
    cutter.tick(1499, &mut out);
    assert!(out.is_empty());
    cutter.tick(1500, &mut out);
    assert_eq!(out.len(), 1);
    assert_eq!((out[0].first_wall_ns, out[0].last_wall_ns), (50, 60));
    assert_eq!((cutter.deadline_ns(), cutter.open_bytes()), (None, 0));
}

#[test]
fn a_segment_closes_at_its_size_and_behind_checkpoints() {
    let (mut cutter, mut out) = (cutter(0), VecDeque::new());
    for lsn in 1..=8 {
        cutter
            .push(anchor(1), &record(lsn, Op::Write, 256), 0, &mut out)
            .unwrap();
    }
    assert_eq!(out.len(), 1, "8 MiB");
    cutter
        .push(anchor(1), &record(9, Op::Write, 1), 0, &mut out)
        .unwrap();
    cutter
        .push(anchor(1), &record(10, Op::Checkpoint, 1), 0, &mut out)
        .unwrap();
    assert_eq!(out.len(), 2);
    assert_eq!(out[1].sealed.header.last_lsn, Lsn(10));
}

#[test]
fn another_boot_begins_another_segment() {
    let (mut cutter, mut out) = (cutter(0), VecDeque::new());
    cutter
        .push(anchor(1), &record(1, Op::Trim, 0), 0, &mut out)
        .unwrap();
    cutter
        .push(anchor(2), &record(2, Op::Trim, 0), 0, &mut out)
        .unwrap();
    cutter.close(&mut out);
    let boots: Vec<u8> = out
        .iter()
        .map(|s| s.sealed.header.anchor.boot_id[0])
        .collect();
    assert_eq!(boots, [1, 2]);
}

#[test]
fn holes_are_refused() {
    let (mut cutter, mut out) = (cutter(4), VecDeque::new());
    for lsn in [4, 6] {
        let refused = cutter.push(anchor(1), &record(lsn, Op::Trim, 0), 0, &mut out);
        assert_eq!(refused, Err(PushError::Order(Lsn(lsn))));
    }
}

#[test]
fn a_base_begins_with_its_own_pass_record() {
    let (mut cutter, mut out) = (cutter(4), VecDeque::new());
    cutter
        .push(anchor(1), &record(5, Op::Trim, 0), 0, &mut out)
        .unwrap();
    cutter.begin_base(Lsn(90));
    let wrong = cutter.push(anchor(1), &record(90, Op::Trim, 0), 0, &mut out);
    assert_eq!(wrong, Err(PushError::Order(Lsn(90))));
    let mut begin = record(90, Op::PassBegin, 1);
    begin.meta.block_count = 0;
    cutter.push(anchor(1), &begin, 0, &mut out).unwrap();
    cutter
        .push(anchor(1), &record(91, Op::Trim, 0), 0, &mut out)
        .unwrap();
    cutter.close(&mut out);
    assert_eq!(out.len(), 2);
    let (base, next) = (out[0].sealed.header, out[1].sealed.header);
    assert!(base.flags.declares_gap && base.pass == Lsn(90));
    assert_eq!(base.chain_before, RecordChain::BASE);
    assert!(!next.flags.declares_gap && next.pass == Lsn::ZERO);
    assert_eq!(next.chain_before, base.chain_after);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// However records come and time goes: every record once, in order, one chain.
    #[test]
    fn segments_hold_the_stream(
        steps in prop::collection::vec((0usize..40, 0u8..10, 0u64..300), 1..60),
    ) {
        let (mut cutter, mut out) = (cutter(0), VecDeque::new());
        let mut now = 0;
        for (at, (blocks, kind, delay)) in steps.iter().enumerate() {
            let op = match (kind, blocks) {
                (0, 1) => Op::Checkpoint,
                (_, 0) => Op::Trim,
                _ => Op::Write,
            };
            cutter.push(anchor(1), &record(at as u64 + 1, op, *blocks), now, &mut out).unwrap();
            now += delay;
            cutter.tick(now, &mut out);
        }
        cutter.close(&mut out);
        let mut next = 1;
        let mut chain = RecordChain([9; 32]);
        for segment in &out {
            let index = verify(&segment.sealed.bytes).unwrap();
            prop_assert_eq!(index.header.first_lsn, Lsn(next));
            prop_assert_eq!(index.header.chain_before, chain);
            next = index.header.last_lsn.0 + 1;
            chain = index.header.chain_after;
        }
        prop_assert_eq!(next as usize, steps.len() + 1);
    }
}
