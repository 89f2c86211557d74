//! `on_log_error = "detach"`, ended at every step: the cases A1 to A5, and that nothing answered is
//! lost by a kill and nothing flushed by a power cut.

use super::rig::Rig;
use crate::engine::EngineEvent;
use crate::engine::recovery::claims::{ClaimRefusal, Leaving};
use crate::engine::recovery::{Accepted, RecoveryError};
use crate::engine::request::{Request, RequestId};
use crate::io::sim::FaultKind;
use afterimage_format::claim::ClaimState;
use afterimage_format::ids::{BLOCK_SIZE, DiskIndex, LogId};
use afterimage_format::ring_header::{RING_HEADER_BYTES, RingHeader};

const EIO: i32 = 5;

/// The group works, then its log fails, and it goes on until the process dies or all is done.
fn works_on(rig: &mut Rig, seed: u64) {
    rig.work(seed * 7, 12);
    rig.flush();
    for block in 0..6 {
        rig.write(block, 1, 0x40 + block as u8);
    }
    rig.trim(3, 2);
    rig.world.fail_once("log", FaultKind::Write, EIO);
    for block in 4..9 {
        if !rig.write(block, 1, 0x60 + block as u8) {
            return;
        }
    }
    rig.flush();
    rig.work(seed, 30);
    rig.flush();
}

/// The log has failed and the markers are wanted; nobody stores them. Six writes are flushed, five
/// are only answered.
fn markers_wanted(seed: u64) -> Rig {
    let mut rig = Rig::detaching(seed);
    rig.marks = false;
    rig.start(None).unwrap();
    for block in 0..6 {
        rig.write(block, 1, 0x20 + block as u8);
    }
    rig.flush();
    rig.world.fail_once("log", FaultKind::Write, EIO);
    for block in 4..9 {
        rig.write(block, 1, 0x60 + block as u8);
    }
    assert_eq!((rig.flushed, rig.answered), (6, 11));
    for _ in 0..1000 {
        rig.turn();
        let wanted = |event: &EngineEvent| matches!(event, EngineEvent::DetachWanted);
        if rig.events.iter().any(wanted) {
            return rig;
        }
    }
    panic!("no marker is asked for");
}

/// The same, with all markers stored, and the first writes past the log on their way.
fn past_the_log(seed: u64) -> Rig {
    let mut rig = markers_wanted(seed);
    (0..2).for_each(|disk| rig.abandon(disk));
    let now = rig.now();
    rig.engine().detach_marked(now);
    rig
}

fn is_done(error: &RecoveryError) -> bool {
    matches!(error, RecoveryError::Claim(ClaimRefusal::Done { .. }))
}

/// What people do after the end, until the group runs or its log is done.
fn start_until_settled(rig: &mut Rig, kill: Option<u64>, context: &str) {
    match rig.start(kill) {
        Ok(_) => {}
        Err(_) if rig.world.is_dead() => start_until_settled(rig, None, context),
        Err(RecoveryError::LogFailed { .. }) => {
            rig.create_next();
            rig.rewrite(None)
                .unwrap_or_else(|error| panic!("{context}: {error}"));
            rig.world.rename_file("next", "log");
            rig.start(None)
                .unwrap_or_else(|error| panic!("{context}: {error}"));
        }
        Err(error) => assert!(is_done(&error), "{context}: {error}"),
    }
}

#[test]
fn nothing_answered_is_lost_by_kills_at_any_operation_of_going_on_without_the_log() {
    let mut ends = [0; 3];
    for seed in 1..8 {
        for kill in 1.. {
            let mut rig = Rig::detaching(seed);
            rig.start(None).unwrap();
            rig.world.kill_after(kill);
            works_on(&mut rig, seed);
            rig.world.forget_faults();
            let whole = !rig.world.is_dead();
            rig.world.kill();
            let context = format!("seed {seed}, killed at {kill}");
            let retired = RingHeader::decode(&rig.ring_bytes()[..RING_HEADER_BYTES]).is_err();
            // The start is killed, too.
            start_until_settled(&mut rig, Some(1 + kill % 17), &context);
            if rig.world.is_dead() {
                start_until_settled(&mut rig, None, &context);
            }
            if retired {
                // What was on its way to the disk may be there in part.
                rig.check_bytes(rig.answered, &context);
            } else {
                rig.check(rig.answered, &context);
            }
            let abandoned = rig.claim().state == ClaimState::Abandoned;
            ends[usize::from(abandoned) + usize::from(retired)] += 1;
            if abandoned {
                // Whoever uses the disk now is not written over.
                rig.world.write("disk", 0, b"in use without us");
                let used = rig.disk_bytes();
                assert!(is_done(&rig.start(None).unwrap_err()), "{context}");
                assert!(rig.disk_bytes() == used, "{context}: written over");
            }
            if whole {
                break;
            }
        }
    }
    assert!(ends.iter().all(|ends| *ends > 20), "{ends:?}");
}

#[test]
fn nothing_flushed_is_lost_by_power_cuts_at_any_operation_of_going_on_without_the_log() {
    for seed in 1..8 {
        for kill in 1.. {
            let mut rig = Rig::detaching(seed);
            rig.start(None).unwrap();
            rig.world.kill_after(kill);
            works_on(&mut rig, seed);
            rig.world.forget_faults();
            let whole = !rig.world.is_dead();
            let context = format!("seed {seed}, cut at {kill}");
            if kill % 2 == 0 {
                // A start between kill and cut, cut itself.
                rig.world.kill();
                let _ = rig.start(Some(1 + kill % 23));
            }
            rig.world.power_cut();
            rig.engine = None;
            start_until_settled(&mut rig, None, &context);
            rig.check_bytes(rig.flushed, &context);
            if whole {
                break;
            }
        }
    }
}

#[test]
fn a1_what_only_the_ring_held_is_brought_into_the_disks() {
    for seed in 1..20 {
        let mut rig = past_the_log(seed);
        rig.world.kill();
        assert!(is_done(&rig.start(None).unwrap_err()));
        rig.check(rig.answered, "killed before the hand-over");

        // The same for plain disks, and for a new log when nobody has started the old one.
        let mut rig = past_the_log(seed);
        rig.world.kill();
        assert!(is_done(&rig.recover_plain(None).unwrap_err()));
        rig.check(rig.answered, "made plain");

        let mut rig = past_the_log(seed);
        rig.world.kill();
        rig.create_next();
        rig.world.rename_file("next", "log");
        assert!(rig.start(None).unwrap().verify_due);
        assert_eq!(rig.claim().log, LogId::from_bytes([4; 16]));
        rig.check(rig.answered, "a new log");
    }
}

#[test]
fn a1_damage_in_the_ring_is_refused_until_its_loss_is_accepted() {
    let mut rig = past_the_log(3);
    rig.world.kill();
    let last = rig.snapshots.last().unwrap()[8 * BLOCK_SIZE..9 * BLOCK_SIZE].to_vec();
    let ring = rig.ring_bytes();
    let at = ring
        .chunks(BLOCK_SIZE)
        .position(|block| block == last)
        .unwrap();
    let mut storage = rig.open();
    crate::io::Storage::ring_write(&mut storage, at * BLOCK_SIZE, b"damage");
    drop(storage);
    let error = rig.start(None).unwrap_err();
    assert!(
        matches!(error, RecoveryError::RingDamaged { .. }),
        "{error}"
    );
    rig.accepted.ring_loss = true;
    assert!(is_done(&rig.start(None).unwrap_err()));
    rig.check_bytes(rig.flushed, "accepted");
}

#[test]
fn a1_a_disk_that_was_taken_out_too_early_is_named() {
    let mut rig = Rig::detaching(5);
    rig.marks = false;
    rig.start(None).unwrap();
    rig.write(0, 1, 7);
    rig.world.fail_once("log", FaultKind::Write, EIO);
    let now = rig.now();
    let request = Request::Write {
        offset: 0,
        data: &[9; BLOCK_SIZE],
        fua: false,
    };
    rig.engine()
        .submit(now, RequestId(u64::MAX), DiskIndex(1), request);
    (0..1000).for_each(|_| rig.turn());
    (0..2).for_each(|disk| rig.abandon(disk));
    let now = rig.now();
    rig.engine().detach_marked(now);
    rig.world.kill();
    rig.disks = 1;
    let error = rig.start(None).unwrap_err();
    assert!(
        matches!(
            error,
            RecoveryError::RingOfDiskGone {
                disk: DiskIndex(1),
                ..
            }
        ),
        "{error}"
    );
    rig.disks = 2;
    assert!(is_done(&rig.start(None).unwrap_err()));
    assert_eq!(rig.world.read("disk1", 0, BLOCK_SIZE), [9; BLOCK_SIZE]);
}

#[test]
fn a3_a_group_that_was_half_abandoned_goes_on_with_a_new_log() {
    for disk in 0..2 {
        let mut rig = markers_wanted(2);
        rig.abandon(disk);
        rig.world.kill();
        let error = rig.start(None).unwrap_err();
        assert!(matches!(error, RecoveryError::LogFailed { .. }), "{error}");
        start_until_settled(&mut rig, None, "half abandoned");
        rig.check(rig.answered, "half abandoned");
        for disk in 0..2 {
            assert_eq!(rig.claim_of(disk).state, ClaimState::Attached);
            assert_eq!(rig.claim_of(disk).log, LogId::from_bytes([4; 16]));
        }
    }
}

#[test]
fn a4_after_a_power_cut_the_rest_is_abandoned_too() {
    for disk in 0..2 {
        let mut rig = markers_wanted(2);
        rig.abandon(disk);
        rig.world.power_cut();
        assert!(is_done(&rig.start(None).unwrap_err()));
        rig.check_bytes(rig.flushed, "cut between two markers");
        for disk in 0..2 {
            assert_eq!(rig.claim_of(disk).state, ClaimState::Abandoned);
        }
        // So a new log may take the disks.
        rig.create_next();
        rig.world.rename_file("next", "log");
        rig.start(None).unwrap();
        rig.check_bytes(rig.flushed, "a new log");
    }
}

#[test]
fn a5_half_abandoned_without_the_ring_is_refused_unless_accepted() {
    let mut rig = markers_wanted(2);
    rig.abandon(1);
    rig.world.kill();
    rig.engine = None;
    rig.world.remove_ring("ring");
    let error = rig.start(None).unwrap_err();
    assert!(
        matches!(error, RecoveryError::RingMissing { .. }),
        "{error}"
    );
    assert_eq!(rig.claim_of(0).state, ClaimState::Attached);
    rig.accepted = Accepted {
        ring_loss: true,
        ..Accepted::default()
    };
    assert!(is_done(&rig.start(None).unwrap_err()));
    assert_eq!(rig.claim_of(0).state, ClaimState::Abandoned);
    rig.check_bytes(rig.flushed, "accepted");
}

#[test]
fn a_group_that_ends_without_its_log_stays_without_it() {
    let mut rig = Rig::detaching(4);
    rig.start(None).unwrap();
    works_on(&mut rig, 4);
    rig.stop(Leaving::Clean);
    for disk in 0..2 {
        assert_eq!(rig.claim_of(disk).state, ClaimState::Abandoned);
    }
    let at = rig.check(rig.answered, "ended");
    assert!(is_done(&rig.start(None).unwrap_err()));
    assert_eq!(rig.check(at, "the log is done"), at);
}
