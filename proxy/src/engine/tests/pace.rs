//! When the log is written and synced and when the backings are, as far as it decides over the
//! speed: counted, not timed.

use super::rig::{BLOCK, Geometry, Rig};
use crate::engine::EngineConfig;
use afterimage_format::ids::BLOCK_SIZE;

const HOUR_NS: u64 = 3_600_000_000_000;

fn rig(ring_blocks: u64, config: EngineConfig) -> Rig {
    let geometry = Geometry {
        ring_blocks,
        log_blocks: 16 * ring_blocks,
        disks: vec![4096 * BLOCK],
        sinks: 0,
        config,
    };
    Rig::new(11, geometry)
}

fn write(rig: &mut Rig, block: u64, byte: u8) -> u64 {
    rig.write(0, block * BLOCK, &[byte; BLOCK_SIZE], false)
}

/// A guest that is faster than its ring waits; that is no reason to write to the backing what is
/// written over a moment later.
#[test]
fn a_full_ring_still_skips_what_was_written_over() {
    let mut rig = rig(256, EngineConfig::default());
    let mut writes = 0;
    let mut held = 0;
    for round in 0..100u64 {
        let ids: Vec<u64> = (0..256)
            .map(|at| write(&mut rig, at % 32, round as u8))
            .collect();
        writes += ids.len() as u64;
        let last = ids[ids.len() - 1];
        held += u64::from(!rig.answers.contains_key(&last));
        rig.wait(last).expect("alive").expect("written");
    }
    assert!(held > 50, "the ring was full in {held} rounds only");
    let destaged = rig.engine().status().destaged_bytes / BLOCK;
    assert!(destaged < writes / 20, "{destaged} of {writes} blocks");
    rig.drain();
}

/// What is durable goes to the backing, though a later version is on its way into the log.
#[test]
fn a_version_whose_successor_is_not_durable_is_written() {
    let config = EngineConfig {
        log_delay_ns: HOUR_NS,
        commit_interval_ns: HOUR_NS,
        destage_age_ns: 1_000_000,
        ..EngineConfig::default()
    };
    let mut rig = rig(64, config);
    write(&mut rig, 0, 1);
    let flush = rig.flush();
    rig.wait(flush).expect("alive").expect("flushed");
    let durable = rig.engine().progress().durable;
    write(&mut rig, 0, 2);
    rig.turns(100);
    assert_eq!(rig.engine().progress().durable, durable);
    assert_eq!(rig.engine().status().destaged, durable);
    assert_eq!(rig.backing(0)[0], 1);
}

/// A write of the log that begins just before a flush would have to end before the one that the
/// flush waits for begins.
#[test]
fn frequent_flushes_wait_for_one_write_each() {
    let mut rig = rig(512, EngineConfig::default());
    let round = |rig: &mut Rig| {
        for at in 0..40 {
            write(rig, at, 1);
            if at % 10 == 9 {
                rig.turn();
            }
        }
        let flush = rig.flush();
        rig.wait(flush).expect("alive").expect("flushed");
    };
    round(&mut rig);
    let before = rig.engine().status().log_writes;
    for _ in 0..20 {
        round(&mut rig);
    }
    assert_eq!(rig.engine().status().log_writes - before, 20);
}

/// Nobody waits for a flush: the log is synced now and then, not once for each write.
#[test]
fn a_stream_without_flushes_is_synced_now_and_then() {
    let mut rig = rig(2048, EngineConfig::default());
    for turn in 0..400u64 {
        let last = (0..32)
            .map(|at| write(&mut rig, (turn * 32 + at) % 4096, 1))
            .last();
        rig.turn();
        rig.wait(last.expect("some"))
            .expect("alive")
            .expect("written");
    }
    let status = rig.engine().status();
    assert!(status.log_syncs > 0, "{status:?}");
    assert!(status.log_syncs * 4 < status.log_writes, "{status:?}");
    rig.drain();
}

/// Destage writes share the device with those of the log: there are no more than the ring's level
/// demands.
#[test]
fn the_fuller_the_ring_the_more_destage_writes_are_in_flight() {
    let first_writes = |blocks: u64| {
        let mut rig = rig(1024, EngineConfig::default());
        for at in 0..blocks {
            // Blocks that are no neighbours are written one by one.
            write(&mut rig, 2 * at, 1);
        }
        let flush = rig.flush();
        rig.wait(flush).expect("alive").expect("flushed");
        rig.engine().status().destage_writes
    };
    assert_eq!(first_writes(450), 0, "within the window");
    let (little, much) = (first_writes(560), first_writes(900));
    assert!((1..16).contains(&little), "{little}");
    assert!(much > 2 * little, "{much} and {little}");
}

/// A log that is behind by more than the commit interval catches up by writing, not by a sync after
/// each of its writes.
#[test]
fn a_log_that_is_behind_is_synced_once_in_each_interval() {
    const TURN_NS: u64 = 100_000;
    let config = EngineConfig {
        commit_interval_ns: 10 * TURN_NS,
        log_write_bytes: BLOCK as u32,
        ..EngineConfig::default()
    };
    let mut rig = rig(16384, config);
    for at in 0..4096 {
        write(&mut rig, at, 1);
    }
    rig.turns(10);
    let before = rig.engine().status();
    rig.turns(20);
    let status = rig.engine().status();
    let (writes, syncs) = (
        status.log_writes - before.log_writes,
        status.log_syncs - before.log_syncs,
    );
    assert!(writes >= 10, "the log was behind for {writes} writes only");
    assert!((1..=2).contains(&syncs), "{syncs} syncs, {writes} writes");
    rig.drain();
}

/// With their descriptors two of the largest frames are a bit longer than a write that is meant for two.
#[test]
fn a_log_write_takes_frames_until_it_is_large_enough() {
    let config = EngineConfig {
        log_write_bytes: 63 * BLOCK as u32,
        ..EngineConfig::default()
    };
    // A quarter of the ring is the largest frame: 32 blocks with its descriptor.
    let mut rig = rig(128, config);
    for at in 0..93 {
        write(&mut rig, at, 1);
    }
    let flush = rig.flush();
    rig.wait(flush).expect("alive").expect("flushed");
    let status = rig.engine().status();
    assert_eq!(status.log_written_bytes, 96 * BLOCK);
    assert_eq!(status.log_writes, 2);
    rig.drain();
}

/// What goes to the backing for its age goes together with what is half as old; what came later may be
/// written over before.
#[test]
fn the_young_half_rests_when_the_old_goes() {
    const AGE_NS: u64 = 100 * 100_000;
    let config = EngineConfig {
        destage_age_ns: AGE_NS,
        ..EngineConfig::default()
    };
    let mut rig = rig(1024, config);
    let durable = |rig: &mut Rig, block: u64| {
        write(rig, block, 1);
        let flush = rig.flush();
        rig.wait(flush).expect("alive").expect("flushed");
        rig.engine().progress().durable
    };
    durable(&mut rig, 0);
    rig.turns(30);
    let half_old = durable(&mut rig, 2);
    rig.turns(40);
    let young = durable(&mut rig, 4);
    rig.turns(40);
    assert_eq!(rig.engine().status().destaged, half_old);
    rig.turns(70);
    assert_eq!(rig.engine().status().destaged, young);
}
