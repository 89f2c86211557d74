//! After the first error of the log: what must be in the backings before anything else may happen,
//! and that nobody waits for what cannot come.

use super::rig::{BLOCK, Geometry, Rig, disk_name};
use crate::engine::{EngineConfig, EngineError, EngineEvent, OnLogError, Ticket};

use crate::io::Storage;
use crate::io::sim::FaultKind;
use afterimage_format::ids::BLOCK_SIZE;
use afterimage_format::ring_header::{RING_HEADER_BYTES, RingHeader};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

fn block(value: u8) -> Vec<u8> {
    vec![value; BLOCK_SIZE]
}

fn rig_with(seed: u64, on_log_error: OnLogError) -> Rig {
    let config = EngineConfig {
        on_log_error,
        ..EngineConfig::default()
    };
    Rig::new(
        seed,
        Geometry {
            config,
            ..Geometry::default()
        },
    )
}

fn write_ok(rig: &mut Rig, disk: usize, offset: u64, data: &[u8]) {
    let id = rig.write(disk, offset, data, false);
    rig.wait(id).expect("alive").expect("written");
}

/// Blocks 0 to 3 of both disks are flushed, blocks 2 to 5 written anew and answered; then the log
/// fails. Nothing was destaged.
fn broken(seed: u64, on_log_error: OnLogError) -> Rig {
    let mut rig = rig_with(seed, on_log_error);
    for disk in 0..2 {
        for at in 0..4 {
            write_ok(&mut rig, disk, at * BLOCK, &block(10 + at as u8));
        }
    }
    let flush = rig.flush();
    rig.wait(flush).expect("alive").expect("flushed");
    for disk in 0..2 {
        for at in 2..6 {
            write_ok(&mut rig, disk, at * BLOCK, &block(20 + at as u8));
        }
    }
    rig.world.fail_once("log", FaultKind::Write, EIO);
    rig
}

fn wanted(rig: &Rig) -> usize {
    let wanted = |event: &&EngineEvent| matches!(event, EngineEvent::DetachWanted);
    rig.events.iter().filter(wanted).count()
}

fn until_wanted(rig: &mut Rig, count: usize) {
    for _ in 0..50_000 {
        if wanted(rig) >= count {
            return;
        }
        rig.turn();
    }
    panic!("no marker is asked for: {:?}", rig.engine().status());
}

fn drain_fails(rig: &mut Rig) {
    rig.engine().drain(Ticket(77));
    let failed = |event: &EngineEvent| {
        matches!(
            event,
            EngineEvent::Failed {
                ticket: Ticket(77),
                error: EngineError::LogFailed { .. }
            }
        )
    };
    for _ in 0..50_000 {
        rig.turn();
        if rig.events.iter().any(failed) {
            return;
        }
    }
    panic!("the drain never ends: {:?}", rig.engine().status());
}

#[test]
fn what_the_log_has_durably_is_in_the_backings_before_the_marker_is_asked_for() {
    for seed in 0..20 {
        let mut rig = broken(seed, OnLogError::Detach);
        let flush = rig.flush();
        until_wanted(&mut rig, 1);
        for disk in 0..2 {
            for at in 0..4 {
                let durable = rig
                    .world
                    .read_durable(&disk_name(disk), at * BLOCK, BLOCK_SIZE);
                assert_eq!(durable, block(10 + at as u8), "seed {seed}: block {at}");
            }
        }
        assert!(!rig.answers.contains_key(&flush), "seed {seed}");
    }
}

#[test]
fn a_drain_ends_though_a_durable_block_was_written_over() {
    let mut rig = broken(1, OnLogError::Fail);
    let flush = rig.flush();
    assert!(rig.wait(flush).expect("alive").is_err());
    drain_fails(&mut rig);
    for at in 0..4 {
        let backing = rig.backing(0);
        let at = at as usize;
        let found = &backing[at * BLOCK_SIZE..(at + 1) * BLOCK_SIZE];
        assert_eq!(
            found,
            block(10 + at as u8),
            "what is durable is in the disk"
        );
    }
}

#[test]
fn a_drain_ends_though_log_and_backing_have_failed() {
    let mut rig = broken(2, OnLogError::Fail);
    for _ in 0..10_000 {
        rig.world.fail_once(&disk_name(0), FaultKind::Write, EIO);
    }
    drain_fails(&mut rig);
}

#[test]
fn markers_that_cannot_be_stored_are_asked_for_again_and_the_state_says_so() {
    let mut rig = broken(3, OnLogError::Detach);
    let waiting = rig.flush();
    for attempt in 1..4 {
        until_wanted(&mut rig, attempt);
        rig.turns(5_000);
        assert_eq!(wanted(&rig), attempt, "not before the last attempt is over");
        let now = rig.now();
        rig.engine().detach_failed(now, ENOSPC);
        assert_eq!(rig.engine().status().marker_errno, ENOSPC);
        let due = rig.engine().next_deadline().expect("tried again");
        assert!(due > now.monotonic_ns, "not at once");
        rig.turns(100);
        assert_eq!(wanted(&rig), attempt, "not at once");
    }
    assert!(!rig.answers.contains_key(&waiting));
    until_wanted(&mut rig, 4);
    let now = rig.now();
    rig.engine().detach_marked(now);
    rig.wait(waiting).expect("alive").expect("flushed");
    let status = rig.engine().status();
    assert_eq!((status.detaching, status.detached), (false, true));
    assert_eq!(status.marker_errno, 0);
}

#[test]
fn a_drain_does_not_wait_for_markers_that_cannot_be_stored() {
    // Asked for before the markers, between two attempts, and while they are stored.
    let mut rig = broken(4, OnLogError::Detach);
    drain_fails(&mut rig);
    assert_eq!(wanted(&rig), 0);

    let mut rig = broken(4, OnLogError::Detach);
    until_wanted(&mut rig, 1);
    let now = rig.now();
    rig.engine().detach_failed(now, ENOSPC);
    drain_fails(&mut rig);
    rig.turns(100_000);
    assert_eq!(wanted(&rig), 1, "none after the end");

    let mut rig = broken(4, OnLogError::Detach);
    until_wanted(&mut rig, 1);
    rig.engine().drain(Ticket(u64::MAX));
    rig.turns(1_000);
    let now = rig.now();
    rig.engine().detach_marked(now);
    rig.drained();
    for disk in 0..2 {
        for at in 2..6 {
            let durable = rig
                .world
                .read_durable(&disk_name(disk), at * BLOCK, BLOCK_SIZE);
            assert_eq!(durable, block(20 + at as u8), "all is in the disks");
        }
    }
}

/// Until the backings have all that was answered, a kill must find it in the ring; afterwards it must
/// find no ring, since the backings are newer.
#[test]
fn the_ring_is_kept_until_the_backings_have_what_it_alone_held_and_no_longer() {
    let mut rig = rig_with(5, OnLogError::Detach);
    write_ok(&mut rig, 1, 2 * BLOCK, &block(12));
    let flush = rig.flush();
    rig.wait(flush).expect("alive").expect("flushed");
    // More than a frame of the first disk, then the second one.
    for at in 0..10 {
        write_ok(&mut rig, 0, at * BLOCK, &block(20 + at as u8));
    }
    write_ok(&mut rig, 1, 2 * BLOCK, &block(22));
    rig.world.fail_once("log", FaultKind::Write, EIO);
    until_wanted(&mut rig, 1);
    let ring_is_there = |rig: &mut Rig| {
        let ring = rig.engine().storage_mut().ring(0, RING_HEADER_BYTES);
        RingHeader::decode(ring).is_ok()
    };
    // While a backing fails nothing is answered, and nothing of the ring is given away.
    rig.world.fail_once(&disk_name(1), FaultKind::Write, EIO);
    let now = rig.now();
    rig.engine().detach_marked(now);
    let flush = rig.flush();
    let mut late = Vec::new();
    for at in 0..40 {
        late.push(rig.write(0, at % 16 * BLOCK, &block(100 + at as u8), false));
    }
    rig.turns(500);
    assert!(ring_is_there(&mut rig));
    assert!(!rig.answers.contains_key(&flush));
    assert!(late.iter().all(|id| !rig.answers.contains_key(id)));
    let status = rig.engine().status();
    assert!(
        status.destaged > status.progress.durable,
        "the first disk's are destaged"
    );
    // Four frames of a descriptor and seven blocks are all that the ring takes.
    let kept = status.progress.appended.0 - status.progress.durable.0;
    assert!(
        kept <= 28,
        "{kept} records since the last durable one cannot be in the ring"
    );
    rig.wait(flush).expect("alive").expect("flushed");
    assert!(!ring_is_there(&mut rig), "a successor would roll back");
    let durable = rig.world.read_durable(&disk_name(1), 2 * BLOCK, BLOCK_SIZE);
    assert_eq!(durable, block(22));
    for id in late {
        rig.wait(id).expect("alive").expect("written");
    }
}
