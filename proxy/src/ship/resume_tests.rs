//! Each case of the table, and walks.

use super::*;
use afterimage_format::chain::RecordMeta;
use afterimage_format::ids::{DiskIndex, Epoch};
use afterimage_format::wire::ActivePass;

const SINK: SinkId = SinkId([7; 16]);

fn cursor(lsn: u64, chain: u8) -> Cursor {
    Cursor {
        lsn: Lsn(lsn),
        chain: RecordChain([chain; 32]),
    }
}

/// The sink at 50 on a complete base; the log holds 20 to 100; 50 acknowledged and stored.
fn situation() -> Situation {
    Situation {
        stored: cursor(50, 5),
        oldest: Lsn(20),
        durable: Lsn(100),
        resume: Resume {
            epoch: Epoch(1),
            cursor: cursor(50, 5),
            completed_pass: Lsn(10),
            active_pass: None,
        },
    }
}

fn at(sink: Cursor) -> Situation {
    let mut s = situation();
    s.resume.cursor = sink;
    s
}

#[test]
fn a_base_from_before_a_disk_came_is_replaced_behind_its_history() {
    let active = |begin| {
        Some(ActivePass {
            begin: Lsn(begin),
            next_disk: DiskIndex(0),
            next_block: 0,
            blocks: 0,
            chain: RecordChain::BASE,
        })
    };
    let due = |completed, active_pass, rebase_after: u64| {
        let resume = Resume {
            completed_pass: Lsn(completed),
            active_pass,
            ..situation().resume
        };
        base_due(&resume, Lsn(rebase_after), Lsn(rebase_after))
    };
    // The sink is at 50.
    assert_eq!(due(10, None, 0), BaseDue::No);
    assert_eq!(due(10, None, 9), BaseDue::No);
    assert_eq!(due(10, None, 10), BaseDue::Now);
    assert_eq!(due(10, None, 50), BaseDue::Now);
    assert_eq!(due(10, None, 51), BaseDue::Behind(Lsn(51)));
    // Twice: the base is good for what was before the first, and not once the sink has that.
    let twice = |first| base_due(&situation().resume, Lsn(80), Lsn(first));
    assert_eq!(twice(51), BaseDue::Behind(Lsn(51)));
    assert_eq!(twice(50), BaseDue::Now);
    // A copy that is under way is of no use; of one that began behind it nothing is lacking.
    assert_eq!(due(0, active(30), 60), BaseDue::Now);
    assert_eq!(due(0, active(30), 29), BaseDue::No);
}

#[test]
fn r1_empty() {
    assert_eq!(
        plan(&at(cursor(0, 0)), SINK),
        Plan::NewBase(BaseReason::Empty)
    );
}

#[test]
fn r2_ahead() {
    assert_eq!(plan(&at(cursor(101, 5)), SINK), Plan::Diverged);
}

#[test]
fn r3_incomplete() {
    let mut s = situation();
    s.resume.completed_pass = Lsn::ZERO;
    assert_eq!(plan(&s, SINK), Plan::NewBase(BaseReason::Incomplete));
    s.resume.active_pass = Some(ActivePass {
        begin: Lsn(30),
        next_disk: DiskIndex(0),
        next_block: 0,
        blocks: 0,
        chain: RecordChain::BASE,
    });
    assert_eq!(plan(&s, SINK), Plan::Continue);
}

#[test]
fn r4_trimmed() {
    assert_eq!(
        plan(&at(cursor(18, 5)), SINK),
        Plan::NewBase(BaseReason::LogTrimmed)
    );
    // 20 is the next one and still there.
    assert!(matches!(plan(&at(cursor(19, 5)), SINK), Plan::Walk(_)));
}

#[test]
fn r5_base_not_arrived() {
    for lsn in [40, 59, 60] {
        let s = Situation {
            stored: cursor(60, 0),
            ..at(cursor(lsn, 5))
        };
        assert_eq!(plan(&s, SINK), Plan::NewBase(BaseReason::NotArrived));
    }
    let s = Situation {
        stored: cursor(60, 0),
        ..at(cursor(61, 5))
    };
    assert!(matches!(plan(&s, SINK), Plan::Walk(_)));
}

#[test]
fn r6_r7_same_place() {
    assert_eq!(plan(&situation(), SINK), Plan::Continue);
    assert_eq!(plan(&at(cursor(50, 6)), SINK), Plan::Diverged);
}

#[test]
fn r8_r9_walks() {
    let Plan::Walk(walk) = plan(&at(cursor(70, 6)), SINK) else {
        panic!("R8")
    };
    assert_eq!((walk.next(), walk.until()), (Some(Lsn(51)), Lsn(70)));
    let Plan::Walk(walk) = plan(&at(cursor(30, 6)), SINK) else {
        panic!("R9")
    };
    assert_eq!((walk.next(), walk.until()), (Some(Lsn(31)), Lsn(50)));
    let s = Situation {
        stored: Cursor::default(),
        ..situation()
    };
    let Plan::Walk(walk) = plan(&s, SINK) else {
        panic!("R8 from the oldest record")
    };
    assert_eq!((walk.next(), walk.chain), (Some(Lsn(20)), None));
}

fn record(lsn: u64, op: Op, payload: Vec<u8>) -> Record {
    let meta = RecordMeta {
        lsn: Lsn(lsn),
        disk: DiskIndex(0),
        op,
        flags: 0,
        first_block: 0,
        block_count: 1,
        wall_ns: lsn,
        aux: 0,
        payload_crc: 0,
    };
    Record {
        meta,
        payload: payload.into(),
    }
}

fn walk(chain: Option<RecordChain>, expected: RecordChain) -> ChainWalk {
    ChainWalk {
        sink: SINK,
        next: Lsn(1),
        chain,
        until: Lsn(3),
        expected,
    }
}

#[test]
fn a_walk_compares_the_whole_way() {
    let records: Vec<Record> = (0..6)
        .map(|lsn| record(lsn, Op::Trim, Vec::new()))
        .collect();
    let start = RecordChain([3; 32]);
    let end = records[1..=3]
        .iter()
        .fold(start, |chain, r| chain.extend(&r.meta));
    for (expected, verdict) in [(end, Verdict::Same), (start, Verdict::Different)] {
        let mut walk = walk(Some(start), expected);
        records.iter().for_each(|record| walk.step(record));
        assert_eq!((walk.next(), walk.verdict()), (None, verdict));
    }
    let mut unknown = walk(None, end);
    records.iter().for_each(|record| unknown.step(record));
    assert_eq!(unknown.verdict(), Verdict::Unproven);
}

#[test]
fn a_base_of_this_sink_restarts_the_chain() {
    let body = |sink| {
        PassBeginBody {
            sink,
            rebases: true,
        }
        .encode()
    };
    let base = record(2, Op::PassBegin, body(SINK));
    let last = record(3, Op::Trim, Vec::new());
    let end = RecordChain::BASE.extend(&base.meta).extend(&last.meta);
    let mut from_nothing = walk(None, end);
    for record in [&record(1, Op::Trim, Vec::new()), &base, &last] {
        from_nothing.step(record);
    }
    assert_eq!(from_nothing.verdict(), Verdict::Same);
    let mut other = walk(None, end);
    let foreign = record(2, Op::PassBegin, body(SinkId([8; 16])));
    for record in [&record(1, Op::Trim, Vec::new()), &foreign, &last] {
        other.step(record);
    }
    assert_eq!(other.verdict(), Verdict::Unproven);
}
