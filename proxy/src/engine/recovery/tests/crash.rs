//! A recovery that is killed, or whose host loses power, at any operation.

use super::rig::Rig;
use crate::engine::recovery::claims::Leaving;
use crate::engine::recovery::replay::ReplayProgress;
use afterimage_format::claim::ClaimState;
use afterimage_format::ids::{BLOCK_SIZE, Lsn};

/// A group that worked a while and was killed in the middle.
fn killed(seed: u64, log_blocks: u64, ring_blocks: u64) -> Rig {
    killed_with(seed, log_blocks, ring_blocks, 3)
}

/// Writes of so many blocks fit one record each, so that each is whole or not there.
fn killed_with(seed: u64, log_blocks: u64, ring_blocks: u64, blocks_max: u64) -> Rig {
    let mut rig = Rig::new(seed, log_blocks, ring_blocks);
    rig.blocks_max = blocks_max;
    rig.start(None).unwrap();
    rig.world.kill_after(60 + seed * 37 % 400);
    rig.work(seed.wrapping_mul(77), 120);
    if !rig.world.is_dead() {
        rig.world.kill();
    }
    rig
}

#[test]
fn nothing_answered_is_lost_by_kills_at_any_operation_of_recovery() {
    let mut recoveries = 0;
    for seed in 1..12 {
        for kill in 1.. {
            let mut rig = killed(seed, 64, 24);
            let whole = rig.start(Some(kill)).is_ok() && !rig.world.is_dead();
            rig.start(None)
                .unwrap_or_else(|error| panic!("seed {seed} kill {kill}: {error}"));
            rig.check(rig.answered, &format!("seed {seed}, killed at {kill}"));
            recoveries += 1;
            if whole {
                break;
            }
        }
    }
    assert!(recoveries > 100, "{recoveries}");
}

#[test]
fn many_kills_in_a_row_do_no_harm() {
    for seed in 1..20 {
        let mut rig = killed(seed, 64, 24);
        for kill in 1..60 {
            if rig.start(Some(kill)).is_ok() && !rig.world.is_dead() {
                let at = rig.check(rig.answered, &format!("seed {seed} kill {kill}"));
                rig.snapshots.truncate(at + 1);
                rig.answered = at;
                rig.work(seed + kill, 40);
                if !rig.world.is_dead() {
                    rig.world.kill();
                }
            }
            if rig.snapshots.len() > 200 {
                break;
            }
        }
        rig.start(None).unwrap();
        rig.check(rig.answered, &format!("seed {seed}"));
    }
}

/// The disk is what some prefix of the writes made of it, and none shorter than what was flushed:
/// nothing is in the backing that the log could lose.
#[test]
fn a_power_cut_at_any_operation_of_recovery_leaves_a_prefix() {
    for seed in 1..40 {
        for cut in 1.. {
            let mut rig = killed(seed, 64, 24);
            let whole = rig.start(Some(cut)).is_ok() && !rig.world.is_dead();
            rig.world.power_cut();
            rig.start(None)
                .unwrap_or_else(|error| panic!("seed {seed} cut {cut}: {error}"));
            rig.check(rig.flushed, &format!("seed {seed}, cut at {cut}"));
            if whole {
                break;
            }
        }
    }
}

/// Afterwards nothing else tells that the sinks lack it.
#[test]
fn an_accepted_edit_is_not_forgotten_by_a_crash_at_any_operation_of_recovery() {
    for power in [false, true] {
        for crash in 1.. {
            let mut rig = Rig::new(crash, 64, 24);
            rig.start(None).unwrap();
            rig.work(crash, 20);
            rig.stop(Leaving::Clean);
            rig.world.write("disk", 4096, b"somebody was here");
            rig.accepted.edited_backing = true;
            let whole = rig.start(Some(crash)).is_ok() && !rig.world.is_dead();
            if power {
                rig.world.power_cut();
            } else {
                rig.world.kill();
            }
            rig.accepted.edited_backing = false;
            if rig.start(None).is_ok() {
                let rebase = rig.superblock().sinks[0].rebase_after;
                assert!(rebase > Lsn::ZERO, "crash {crash}, power {power}");
            }
            if whole {
                break;
            }
        }
    }
}

/// What a start finds in a claim may have been written by one that was killed before the sync.
#[test]
fn a_claim_that_a_killed_start_wrote_survives_a_power_cut_of_the_next() {
    for kill in 1.. {
        let mut rig = Rig::new(kill, 64, 24);
        rig.start(None).unwrap();
        rig.work(kill, 20);
        rig.stop(Leaving::Clean);
        let whole = rig.start(Some(kill)).is_ok() && !rig.world.is_dead();
        rig.world.kill();
        rig.start(None).unwrap();
        rig.work(kill, 40);
        rig.world.power_cut();
        rig.start(None)
            .unwrap_or_else(|error| panic!("killed at {kill}: {error}"));
        rig.check(rig.flushed, &format!("killed at {kill}"));
        if whole {
            break;
        }
    }
}

/// Two starts that are killed before their sync have written both copies of a claim.
#[test]
fn starts_that_are_killed_never_leave_both_copies_of_a_claim_to_a_power_cut() {
    let stopped = |seed| {
        let mut rig = Rig::new(seed, 64, 24);
        rig.start(None).unwrap();
        rig.work(seed, 4);
        rig.stop(Leaving::Clean);
        rig
    };
    // True: it came to its end.
    let killed = |rig: &mut Rig, kill| {
        let whole = rig.start(Some(kill)).is_ok() && !rig.world.is_dead();
        rig.world.kill();
        whole
    };
    for first in 1.. {
        if killed(&mut stopped(first), first) {
            break;
        }
        for second in 1.. {
            // Whether a power cut tears both is a matter of luck.
            let whole = [0, 1000, 2000].map(|dice| {
                let mut rig = stopped(second + dice);
                killed(&mut rig, first);
                let whole = killed(&mut rig, second);
                rig.world.power_cut();
                rig.start(None)
                    .unwrap_or_else(|error| panic!("killed at {first} and {second}: {error}"));
                whole
            });
            if whole == [true; 3] {
                break;
            }
        }
    }
}

#[test]
fn power_cuts_at_work_leave_a_prefix_and_lose_nothing_flushed() {
    for seed in 1..150 {
        let mut rig = Rig::new(seed, 64, 24);
        rig.start(None).unwrap();
        for round in 0..4 {
            rig.world.kill_after(20 + (seed * 13 + round * 101) % 700);
            rig.work(seed * 10 + round, 150);
            rig.world.power_cut();
            rig.start(None)
                .unwrap_or_else(|error| panic!("seed {seed} round {round}: {error}"));
            let at = rig.check(rig.flushed, &format!("seed {seed} round {round}"));
            rig.go_on_from(at);
        }
    }
}

/// What was cut off never comes back: a second power cut after writes that share blocks with it.
#[test]
fn a_cut_tail_does_not_come_back() {
    for seed in 1..100 {
        let mut rig = Rig::new(seed, 32, 16);
        rig.start(None).unwrap();
        for round in 0..6 {
            rig.world.kill_after(30 + (seed * 7 + round * 31) % 120);
            // The same few contents again and again.
            rig.work(seed, 60);
            rig.world.power_cut();
            rig.start(None)
                .unwrap_or_else(|error| panic!("seed {seed} round {round}: {error}"));
            let at = rig.check(rig.flushed, &format!("seed {seed} round {round}"));
            rig.go_on_from(at);
        }
    }
}

/// The ring holds more than the log has room for.
#[test]
fn a_log_without_room_for_the_ring_is_emptied_first() {
    let mut dirty = 0;
    for seed in 1..40 {
        let mut rig = killed_with(seed, 10, 64, 1);
        rig.start(Some(seed * 3)).ok();
        rig.start(None)
            .unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        rig.check(rig.answered, &format!("seed {seed}"));
        dirty += usize::from(rig.superblock().sinks[0].dirty.is_some());
    }
    assert!(dirty > 0);
}

/// As above, and the recovery that made room is killed; what the next one finds in the log, and leaves
/// there because the ring begins before it, must survive the power cut that follows.
#[test]
fn a_log_that_was_emptied_for_the_ring_survives_a_kill_and_a_power_cut() {
    for seed in 1..12 {
        for kill in (1..).step_by(3) {
            let mut rig = killed_with(seed, 10, 64, 1);
            let whole = rig.start(Some(kill)).is_ok() && !rig.world.is_dead();
            for cut in [20, 45, 70] {
                rig.start(Some(cut + kill % 25)).ok();
            }
            rig.world.power_cut();
            rig.start(None)
                .unwrap_or_else(|error| panic!("seed {seed} kill {kill}: {error}"));
            rig.check(rig.flushed, &format!("seed {seed}, killed at {kill}"));
            if whole {
                break;
            }
        }
    }
}

#[test]
fn to_plain_is_complete_after_kills_at_any_operation() {
    for seed in 1..8 {
        for kill in 1.. {
            let mut rig = killed(seed, 64, 24);
            let whole = rig.recover_plain(Some(kill)).is_ok() && !rig.world.is_dead();
            rig.recover_plain(None)
                .unwrap_or_else(|error| panic!("seed {seed} kill {kill}: {error}"));
            rig.check(rig.answered, &format!("seed {seed}, killed at {kill}"));
            assert!(matches!(rig.claim().state, ClaimState::Detached(_)));
            if whole {
                break;
            }
        }
    }
}

#[test]
fn to_plain_after_a_power_cut_needs_no_ring() {
    for seed in 1..40 {
        let mut rig = killed(seed, 64, 24);
        rig.world.power_cut();
        rig.recover_plain(None).unwrap();
        rig.check(rig.flushed, &format!("seed {seed}"));
    }
}

#[test]
fn to_plain_tells_how_much_of_the_log_is_in_the_disks() {
    let mut replayed = 0;
    for seed in 1..20 {
        let mut rig = killed(seed, 256, 24);
        let report = rig.recover_plain(None).unwrap();
        if report.replayed.records == 0 {
            assert_eq!(rig.told, [], "seed {seed}");
            continue;
        }
        replayed += 1;
        let (first, last) = (rig.told[0], rig.told[rig.told.len() - 1]);
        assert_eq!(first.bytes_done, 0, "seed {seed}");
        assert_eq!(last.bytes_done, last.bytes_total, "seed {seed}");
        // At least the blocks that were written, at most what the log has.
        let blocks = report.replayed.blocks * BLOCK_SIZE as u64;
        assert!(blocks < last.bytes_total && last.bytes_total <= rig.log_bytes);
        let rises = |pair: &[ReplayProgress]| pair[0].bytes_done <= pair[1].bytes_done;
        assert!(rig.told.windows(2).all(rises), "seed {seed}");
    }
    assert!(replayed > 5, "{replayed} replays");
}

#[test]
fn a_clean_stop_has_nothing_to_replay() {
    let mut rig = Rig::new(5, 64, 24);
    rig.start(None).unwrap();
    rig.work(5, 60);
    rig.stop(Leaving::Clean);
    assert!(rig.superblock().clean);
    let at = rig.check(rig.answered, "after the stop");
    rig.world.remove_ring("ring");
    let report = rig.start(None).unwrap();
    assert_eq!(report.replayed.records, 0);
    assert_eq!(report.ring_frames, 0);
    assert!(!report.verify_due);
    assert_eq!(rig.check(at, "after the start"), at);
    assert_eq!(rig.claim().state, ClaimState::Attached);
}

/// The error latch: what the ring alone holds goes to a new log, over kills at any operation.
#[test]
fn a_failed_log_is_replaced_without_losing_an_answered_write() {
    let mut rewritten = 0;
    for seed in 1..10 {
        for kill in 1.. {
            let mut rig = Rig::new(seed, 64, 64);
            rig.start(None).unwrap();
            rig.work(seed * 3, 20);
            rig.flush();
            rig.world
                .fail_once("log", crate::io::sim::FaultKind::Write, 5);
            for block in 0..5 {
                rig.write(block, 1, 0x40 + block as u8);
            }
            assert!(!rig.flush(), "no flush succeeds on a failed log");
            rig.world.kill();
            let refused = rig.start(None).unwrap_err().to_string();
            assert!(refused.contains("failed"), "{refused}");

            rig.create_next();
            let first = rig.rewrite(Some(kill));
            let whole = first.is_ok() && !rig.world.is_dead();
            if !whole {
                // A half-made new log is made again.
                rig.create_next();
                rig.rewrite(None)
                    .unwrap_or_else(|error| panic!("seed {seed} kill {kill}: {error}"));
            }
            rig.world.kill();
            rig.world.rename_file("next", "log");
            let report = rig
                .start(None)
                .unwrap_or_else(|error| panic!("seed {seed} kill {kill}: {error}"));
            assert!(report.verify_due);
            rig.check(rig.answered, &format!("seed {seed}, killed at {kill}"));
            assert_eq!(rig.claim().log, rig.superblock().log);
            assert!(rig.superblock().sinks[0].dirty.is_some());
            // The new log works.
            let at = rig.check(rig.answered, "rewritten");
            rig.go_on_from(at);
            rig.work(seed, 30);
            rig.flush();
            rig.world.power_cut();
            rig.start(None).unwrap();
            rig.check(rig.flushed, "after the new log's first power cut");
            rewritten += 1;
            if whole {
                break;
            }
        }
    }
    assert!(rewritten > 50);
}
