//! Backings that fail, and what a group leaves behind when it ends.

use super::rig::{BLOCK, Geometry, Rig, disk_name, sink};
use crate::engine::request::RequestError;
use crate::engine::{DirtyChange, EngineConfig, EngineEvent, OnBackingError, Ticket};
use crate::io::sim::{FaultKind, SimRng};
use afterimage_format::chain::RecordChain;
use afterimage_format::ids::{BLOCK_SIZE, DiskIndex, Lsn};
use afterimage_format::superblock::{Superblock, choose};
use afterimage_format::wire::Cursor;

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

fn stored_superblock(rig: &Rig) -> Superblock {
    let a = rig.world.read_durable("log", 0, BLOCK_SIZE);
    let b = rig.world.read_durable("log", BLOCK, BLOCK_SIZE);
    choose([&a, &b]).expect("one copy is always whole")
}

fn put(rig: &mut Rig, disk: usize, offset: u64, data: &[u8]) {
    let id = rig.write(disk, offset, data, false);
    rig.wait(id).expect("alive").expect("written");
}

/// How often the owner was told that a backing fails, and that all work again.
fn told(rig: &Rig) -> (usize, usize) {
    let count = |is: fn(&EngineEvent) -> bool| rig.events.iter().filter(|e| is(e)).count();
    (
        count(|event| matches!(event, EngineEvent::BackingFailing { .. })),
        count(|event| matches!(event, EngineEvent::BackingRecovered)),
    )
}

/// The tail moves when a sink acknowledges after the drain; that superblock once said *not clean*,
/// and the next start called for a verify.
#[test]
fn a_late_acknowledgement_leaves_the_superblock_clean() {
    let mut rig = Rig::new(
        21,
        Geometry {
            sinks: 1,
            log_blocks: 200,
            ..Geometry::default()
        },
    );
    rig.engine().sink_dirty(
        Ticket(1),
        sink(0),
        DirtyChange::PassCommitted { begin: Lsn(1) },
    );
    for at in 0..10 {
        put(&mut rig, 0, at * BLOCK, &[1; BLOCK_SIZE]);
    }
    rig.drain();
    assert!(stored_superblock(&rig).clean);
    rig.engine().sink_acked(sink(0), Lsn(10), RecordChain::BASE);
    rig.turns(100);
    let after = stored_superblock(&rig);
    assert!(after.clean, "a drained group was left unclean");
}

#[test]
fn a_failing_sync_is_said_once_and_its_end_once() {
    let config = EngineConfig {
        backing_retry_ns: 1_000_000,
        backing_retry_max_ns: 2_000_000,
        ..EngineConfig::default()
    };
    let mut rig = Rig::new(
        22,
        Geometry {
            config,
            ..Geometry::default()
        },
    );
    for _ in 0..6 {
        rig.world.fail_once(&disk_name(0), FaultKind::Sync, EIO);
    }
    for at in 0..12 {
        put(&mut rig, 0, at * BLOCK, &[at as u8 + 1; BLOCK_SIZE]);
        rig.turns(20);
    }
    rig.turns(20_000);
    assert_eq!(rig.world.stats().syncs_failed, 6, "the faults never came");
    assert_eq!(told(&rig), (1, 1), "the state flaps");
    assert_eq!(rig.engine().status().backing_errno, 0);
    rig.drain();
    for at in 0..12 {
        let block = rig
            .world
            .read_durable(&disk_name(0), at * BLOCK, BLOCK_SIZE);
        assert!(block == [at as u8 + 1; BLOCK_SIZE], "block {at} is lost");
    }
}

/// Overwrites go on in a full file system, where a hole cannot be filled.
#[test]
fn a_success_beside_the_failing_write_is_no_recovery() {
    let config = EngineConfig {
        destage_age_ns: 1_000_000,
        ..EngineConfig::default()
    };
    let mut rig = Rig::new(
        23,
        Geometry {
            config,
            ..Geometry::default()
        },
    );
    for _ in 0..4 {
        rig.world.fail_once(&disk_name(0), FaultKind::Write, ENOSPC);
        // Neighbours would be joined to one write.
        for at in [1, 3, 5, 7, 9] {
            put(&mut rig, 0, at * BLOCK, &[at as u8; BLOCK_SIZE]);
        }
        for _ in 0..100 {
            rig.turn();
            let (failing, recovered) = told(&rig);
            let status = rig.engine().status();
            assert_eq!(failing > recovered, status.backing_errno != 0);
            if recovered == failing && failing > 0 {
                assert!(status.synced >= Lsn(5), "called recovered too early");
            }
        }
    }
    rig.turns(20_000);
    let (failing, recovered) = told(&rig);
    assert!(failing > 0 && failing == recovered, "{failing} {recovered}");
}

/// Where writes succeed and syncs never do, the time since the first failure must go on counting.
#[test]
fn a_backing_that_never_syncs_is_told_to_the_guest() {
    let config = EngineConfig {
        backing_patience_ns: 50_000_000,
        ..EngineConfig::default()
    };
    let mut rig = Rig::new(
        24,
        Geometry {
            config,
            ..Geometry::default()
        },
    );
    for _ in 0..2_000 {
        rig.world.fail_once(&disk_name(0), FaultKind::Sync, EIO);
    }
    let mut refused = false;
    for at in 0..400 {
        let id = rig.write(0, at % 16 * BLOCK, &[at as u8; BLOCK_SIZE], false);
        if let Err(error) = rig.wait(id).expect("alive") {
            assert_eq!(error, RequestError::Io);
            refused = true;
            break;
        }
    }
    assert!(refused, "the guest is never told");
    assert_eq!(told(&rig), (1, 0));
}

/// `on_backing_error`: with `retry` the guest notices nothing while there is room; with `fail` it is
/// told at once, nothing that was answered is lost, and it goes on by itself.
#[test]
fn a_failing_backing_is_told_to_the_guest_at_once_if_that_is_wanted() {
    for (policy, errno, expected) in [
        (OnBackingError::Retry, EIO, Ok(())),
        (OnBackingError::Fail, EIO, Err(RequestError::Io)),
        (OnBackingError::Fail, ENOSPC, Err(RequestError::NoSpace)),
    ] {
        let config = EngineConfig {
            on_backing_error: policy,
            destage_age_ns: 1_000_000,
            backing_retry_ns: 50_000_000,
            backing_retry_max_ns: 50_000_000,
            ..EngineConfig::default()
        };
        let mut rig = Rig::new(
            25,
            Geometry {
                config,
                ..Geometry::default()
            },
        );
        rig.world.fail_once(&disk_name(0), FaultKind::Write, errno);
        put(&mut rig, 0, 0, &[1; BLOCK_SIZE]);
        while rig.engine().status().backing_errno == 0 {
            rig.turn();
        }
        let id = rig.write(0, BLOCK, &[2; BLOCK_SIZE], false);
        let seen = rig.wait(id).expect("alive").map(|_| ());
        assert_eq!(seen, expected, "{policy:?} {errno}");
        let flushed = rig.flush();
        rig.wait(flushed).expect("alive").expect("flushed");
        while rig.engine().status().backing_errno != 0 {
            rig.turn();
        }
        put(&mut rig, 0, BLOCK, &[3; BLOCK_SIZE]);
        rig.drain();
        for (at, fill) in [(0, 1), (1, 3)] {
            let block = rig
                .world
                .read_durable(&disk_name(0), at * BLOCK, BLOCK_SIZE);
            assert!(block == [fill; BLOCK_SIZE], "{policy:?}: block {at}");
        }
    }
}

/// A failed sync may take with it what was written since the last good one, and readers beside it
/// must not see that: neither a read of a client nor the rest of a block that a write covers in
/// part.
#[test]
fn nothing_read_beside_a_failing_sync_is_older_than_what_was_written() {
    let mut failed = 0;
    for seed in 0..60 {
        let config = EngineConfig {
            destage_age_ns: 1_000_000,
            backing_retry_ns: 300_000,
            ..EngineConfig::default()
        };
        let mut rig = Rig::new(
            seed,
            Geometry {
                config,
                ..Geometry::default()
            },
        );
        let mut reads = Vec::new();
        for round in 0..12u8 {
            let fill = [round + 1; BLOCK_SIZE];
            for disk in 0..2 {
                for at in 0..4 {
                    put(&mut rig, disk, at * BLOCK, &fill);
                }
            }
            rig.world
                .fail_once(&disk_name(usize::from(round % 2)), FaultKind::Sync, EIO);
            let failed = rig.world.stats().syncs_failed;
            let mut left = 400;
            let mut after = 20;
            while left > 0 && after > 0 {
                left -= 1;
                after -= u64::from(rig.world.stats().syncs_failed > failed);
                for disk in 0..2 {
                    let id = rig.submit(
                        disk,
                        crate::engine::request::Request::Read {
                            offset: left % 3 * BLOCK,
                            len: BLOCK as u32,
                        },
                    );
                    reads.push((id, round + 1));
                    if left % 20 == 19 {
                        rig.write(disk, 3 * BLOCK + 512, &[0xEE; 512], false);
                    }
                }
                rig.turn();
            }
            rig.turns(200);
            for (id, fill) in reads.drain(..) {
                // A read that the failing backing refuses is no lie.
                if let Ok(data) = rig.wait(id).expect("alive") {
                    let data = data.expect("data");
                    assert!(
                        data == [fill; BLOCK_SIZE],
                        "seed {seed}: a read gave {}, {fill} was there",
                        data[0]
                    );
                }
            }
            for disk in 0..2 {
                let data = rig.read(disk, 3 * BLOCK, BLOCK as u32).expect("alive");
                let Ok(Some(data)) = data else { continue };
                assert!(
                    data[..512] == fill[..512] && data[1024..] == fill[1024..],
                    "seed {seed}: a write to a sector brought back {}",
                    data[0]
                );
            }
        }
        failed += rig.world.stats().syncs_failed;
    }
    assert!(failed > 300, "{failed} faults came");
}

/// What was read for a merge before a sync failed may be what the device has lost the newer of.
#[test]
fn what_was_read_for_a_merge_is_read_again_after_a_failed_sync() {
    let mut merged_while_syncing = 0;
    for seed in 0..300 {
        let mut rng = SimRng::new(seed);
        let mut rig = Rig::new(seed, Geometry::default());
        let mut expected = vec![0; 12 * BLOCK_SIZE];
        for round in 1..=2 {
            for (at, block) in expected.chunks_exact_mut(BLOCK_SIZE).enumerate() {
                block.fill(round);
                put(&mut rig, 0, at as u64 * BLOCK, block);
            }
            if round == 1 {
                rig.turns(2_000);
            }
        }
        // Version 1 is durable in the backing, version 2 is on its way: the next sync fails.
        let last = rig.engine().progress().appended;
        if seed % 2 == 0 {
            rig.world.fail_once(&disk_name(0), FaultKind::Sync, EIO);
        } else {
            rig.world.fail_sync_early(&disk_name(0));
        }
        while rig.engine().status().destaged < last {
            rig.turn();
        }
        let mut writes = Vec::new();
        let first = rng.below(12) as usize;
        while writes.len() < 6 {
            let turns = rng.below(3) as usize;
            rig.turns(turns);
            let at = (first + 5 * writes.len()) % 12 * BLOCK_SIZE + 512;
            expected[at..at + 512].fill(100 + writes.len() as u8);
            let data = expected[at..at + 512].to_vec();
            merged_while_syncing += usize::from(rig.engine().status().backing_errno == 0);
            writes.push(rig.write(0, at as u64, &data, false));
        }
        for id in writes {
            rig.wait(id).expect("alive").expect("written");
        }
        rig.drain();
        assert!(rig.world.stats().syncs_failed > 0, "the fault never came");
        let content = rig.backing(0);
        assert!(
            content[..expected.len()] == expected,
            "seed {seed}: a merge took what was lost"
        );
    }
    assert!(merged_while_syncing > 0);
}

/// A pass that was under way goes on behind the restart, and meets the place of the disk that left.
/// Whether a read of a pass is of one LSN.
fn reads_exactly(rig: &mut Rig) -> bool {
    rig.events.clear();
    rig.engine().pass_read(Ticket(77), DiskIndex(0), 1, 1);
    rig.turns(100);
    rig.events
        .iter()
        .find_map(|event| match event {
            EngineEvent::PassRead { result, .. } => result.as_ref().ok(),
            _ => None,
        })
        .is_some_and(|read| !read.overtaken)
}

#[test]
fn a_disk_that_was_taken_out_has_nothing_for_a_pass_and_needs_one_when_it_is_back() {
    let geometry = Geometry {
        sinks: 1,
        ..Geometry::default()
    };
    let mut rig = Rig::new(41, geometry);
    for disk in 0..2 {
        put(&mut rig, disk, BLOCK, &[9; BLOCK_SIZE]);
    }
    rig.drain();
    rig.taken_out = vec![0];
    rig.start().expect("the other disk goes on");
    for disk in 0..2 {
        let ranges = rig.allocated(disk, 0, 8);
        assert_eq!(ranges.ranges.is_empty(), disk == 0, "{ranges:?}");
        assert_eq!(
            ranges.end_block == 0,
            disk == 0,
            "nothing is known of it: {ranges:?}"
        );
    }
    assert_eq!(stored_superblock(&rig).sinks[0].rebase_after, Lsn::ZERO);
    rig.drain();
    // Back again, with whatever was done to it meanwhile.
    rig.taken_out.clear();
    rig.start().expect("both disks");
    let stored = stored_superblock(&rig);
    assert_eq!(stored.sinks[0].rebase_after, stored.durable);
    assert!(stored.durable > Lsn::ZERO);
    assert_eq!(stored.sinks[0].good_until, stored.durable);
    // The sink has other content for this LSN: nothing is said of it.
    assert!(!rig.allocated(0, 0, 8).exact);
    assert!(!reads_exactly(&mut rig));
    // Once more before a sink has a new base: the old one is good for what was before the first.
    put(&mut rig, 0, BLOCK, &[8; BLOCK_SIZE]);
    assert!(rig.allocated(0, 0, 8).exact);
    assert!(reads_exactly(&mut rig));
    rig.drain();
    rig.taken_out = vec![0];
    rig.start().expect("the other disk");
    rig.drain();
    rig.taken_out.clear();
    rig.start().expect("both disks again");
    let first = stored.durable;
    let stored = stored_superblock(&rig);
    assert_eq!(stored.sinks[0].good_until, first);
    assert_eq!(stored.sinks[0].rebase_after, stored.durable);
    assert!(stored.durable > first);
    let complete_at = |rig: &mut Rig, lsn| {
        let acked = Cursor {
            lsn,
            chain: RecordChain::BASE,
        };
        let told = rig.engine().report_acked(Ticket(1), sink(0), acked, true);
        rig.turns(100);
        told.expect("a sink that is known")
    };
    // What an older base reaches, too, does not clear it.
    complete_at(&mut rig, stored.durable);
    assert_eq!(
        stored_superblock(&rig).sinks[0].rebase_after,
        stored.durable
    );
    assert!(complete_at(&mut rig, stored.durable.next()));
    assert_eq!(stored_superblock(&rig).sinks[0].rebase_after, Lsn::ZERO);
}

/// What looks like a hole because a sync lost it must be read: a pass would leave it out.
#[test]
fn what_a_failed_sync_lost_is_never_told_to_be_empty() {
    let mut told = 0;
    for seed in 0..200 {
        let mut rng = SimRng::new(seed);
        let mut rig = Rig::new(seed, Geometry::default());
        for at in 0..12 {
            put(&mut rig, 0, at * BLOCK, &[1; BLOCK_SIZE]);
        }
        let last = rig.engine().progress().appended;
        rig.world.fail_sync_early(&disk_name(0));
        while rig.engine().status().destaged < last {
            rig.turn();
        }
        for ticket in 0..8 {
            let turns = rng.below(3) as usize;
            rig.turns(turns);
            rig.engine()
                .allocated_ranges(Ticket(ticket), DiskIndex(0), 0, 64);
        }
        rig.turns(3_000);
        assert!(rig.world.stats().syncs_failed > 0, "the fault never came");
        for event in &rig.events {
            if let EngineEvent::Allocated { result, .. } = event {
                told += 1;
                let said = result.as_ref().expect("told");
                let held = |block| said.ranges.iter().any(|range| range.contains(&block));
                assert!((0..12).all(held), "seed {seed}: {said:?}");
            }
        }
    }
    assert_eq!(told, 200 * 8);
}

/// What a pass sends stays at the replica: it must not be what the device lost for a while.
#[test]
fn a_pass_never_sends_what_a_failed_sync_lost() {
    let mut read = 0;
    for seed in 0..300 {
        let mut rng = SimRng::new(seed);
        let mut rig = Rig::new(seed, Geometry::default());
        for version in 1..=2 {
            for at in 0..12 {
                put(&mut rig, 0, at * BLOCK, &[version; BLOCK_SIZE]);
            }
            if version == 1 {
                rig.turns(2_000);
            }
        }
        let last = rig.engine().progress().appended;
        rig.world.fail_sync_early(&disk_name(0));
        while rig.engine().status().destaged < last {
            rig.turn();
        }
        for ticket in 0..8 {
            let turns = rng.below(3) as usize;
            rig.turns(turns);
            let first = rng.below(10);
            rig.engine()
                .pass_read(Ticket(ticket), DiskIndex(0), first, 2);
        }
        rig.turns(3_000);
        assert!(rig.world.stats().syncs_failed > 0, "the fault never came");
        for event in &rig.events {
            if let EngineEvent::PassRead { result, .. } = event {
                read += 1;
                let data = &result.as_ref().expect("read").data;
                assert!(data.iter().all(|byte| *byte == 2), "seed {seed}");
            }
        }
    }
    assert_eq!(read, 300 * 8);
}
