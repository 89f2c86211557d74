use super::*;
use crate::io::{Completion, Operation, RingSpan, Source, Storage, Token};

const LOG: FileId = FileId::LOG;

fn world(seed: u64) -> SimWorld {
    let world = SimWorld::new(seed);
    world.create_file("log", 1 << 20);
    world.create_ring("ring", 1 << 16);
    world
}

fn open(world: &SimWorld) -> SimStorage {
    world.open(Some("ring"), &[(LOG, "log")])
}

fn write(offset: u64, byte: u8, len: usize) -> Operation {
    let mut buffer = AlignedBuffer::new(len);
    buffer.fill(byte);
    let source = Source::Owned(buffer);
    Operation::Write {
        file: LOG,
        offset,
        source,
        dsync: false,
    }
}

fn drain(storage: &mut SimStorage, count: usize) -> Vec<Completion> {
    let mut completions = Vec::new();
    while completions.len() < count && storage.wait(&mut completions).is_ok() {}
    completions
}

/// A life with faults, a kill, a power cut and one more life; returns what it left.
fn story(seed: u64) -> (u64, SimStats, Vec<u8>) {
    let world = world(seed);
    world.set_fault_rates(FaultRates {
        read_eio: 200,
        write_eio: 500,
        write_nospace: 500,
        sync_eio: 500,
    });
    for life in 0..24 {
        if !world.has_ring("ring") {
            world.create_ring("ring", 1 << 16);
        }
        let mut storage = open(&world);
        world.kill_after(100 + life * 3);
        for n in 0..200u64 {
            storage.ring_write((n as usize % 8) * 64, &[n as u8; 64]);
            storage.submit(Token(n), write((n * 7919 % 256) * 4096, n as u8, 4096));
            if n % 5 == 0 {
                storage.submit(Token(1000 + n), Operation::Sync { file: LOG });
            }
            storage.poll(&mut Vec::new());
        }
        assert!(world.is_dead());
        if life % 2 == 1 {
            world.power_cut();
        }
    }
    (world.trace(), world.stats(), world.read("log", 0, 1 << 20))
}

#[test]
fn one_seed_is_one_run() {
    let first = story(42);
    assert_eq!(first, story(42));
    assert_ne!(first.0, story(43).0, "another seed is another run");
    let stats = first.1;
    let all_happen = [
        stats.kills,
        stats.power_cuts,
        stats.writes_failed,
        stats.no_space,
        stats.syncs_failed,
        stats.late_writes,
        stats.late_writes_lost,
        stats.sectors_kept,
        stats.sectors_lost,
        stats.sectors_torn,
    ];
    assert!(all_happen.iter().all(|count| *count > 0), "{stats:?}");
}

#[test]
fn synced_survives_a_power_cut_and_unsynced_is_kept_lost_and_torn() {
    let (mut kept, mut lost, mut torn) = (0, 0, 0);
    for seed in 0..50 {
        let world = world(seed);
        let mut storage = open(&world);
        storage.submit(Token(1), write(0, 1, 4096));
        drain(&mut storage, 1);
        storage.submit(Token(2), Operation::Sync { file: LOG });
        drain(&mut storage, 1);
        storage.submit(Token(3), write(4096, 2, 4096));
        drain(&mut storage, 1);
        world.power_cut();
        drop(storage);
        assert_eq!(world.read("log", 0, 4096), vec![1; 4096], "seed {seed}");
        assert!(!world.has_ring("ring"));
        let stats = world.stats();
        kept += stats.sectors_kept;
        lost += stats.sectors_lost;
        torn += stats.sectors_torn;
        let seen = world.read("log", 4096, 4096);
        let twos = seen
            .chunks(512)
            .filter(|sector| sector.iter().all(|byte| *byte == 2))
            .count();
        assert_eq!(twos as u64, stats.sectors_kept, "each sector on its own");
    }
    assert!(kept > 50 && lost > 50 && torn > 20, "{kept} {lost} {torn}");
}

#[test]
fn a_sync_covers_what_had_completed_when_it_was_submitted() {
    let mut uncovered = 0;
    for seed in 0..50 {
        let world = world(seed);
        let mut storage = open(&world);
        storage.submit(Token(1), write(0, 1, 512));
        storage.submit(Token(2), Operation::Sync { file: LOG });
        drain(&mut storage, 2);
        uncovered += u32::from(world.read_durable("log", 0, 512) == vec![0; 512]);
    }
    assert_eq!(uncovered, 50);
}

#[test]
fn a_dsync_write_covers_itself_alone() {
    let world = world(5);
    let mut storage = open(&world);
    storage.submit(Token(1), write(0, 1, 512));
    drain(&mut storage, 1);
    let Operation::Write { source, .. } = write(512, 2, 512) else {
        unreachable!()
    };
    storage.submit(
        Token(2),
        Operation::Write {
            file: LOG,
            offset: 512,
            source,
            dsync: true,
        },
    );
    drain(&mut storage, 1);
    assert_eq!(world.read_durable("log", 0, 512), vec![0; 512]);
    assert_eq!(world.read_durable("log", 512, 512), vec![2; 512]);
}

#[test]
fn after_a_failed_sync_another_does_not_help() {
    let (mut gone, mut gone_and_seen) = (0, 0);
    for seed in 0..100 {
        let world = world(seed);
        let mut storage = open(&world);
        storage.submit(Token(1), write(0, 1, 512));
        drain(&mut storage, 1);
        world.fail_once("log", FaultKind::Sync, libc::EIO);
        storage.submit(Token(2), Operation::Sync { file: LOG });
        assert!(drain(&mut storage, 1)[0].result.is_err());
        storage.submit(Token(3), Operation::Sync { file: LOG });
        assert!(drain(&mut storage, 1)[0].result.is_ok());
        let seen = world.read("log", 0, 512) == vec![1; 512];
        let durable = world.read_durable("log", 0, 512) == vec![1; 512];
        assert!(seen || !durable, "seed {seed}: what is durable is seen");
        gone += u32::from(!durable);
        gone_and_seen += u32::from(!durable && seen);
    }
    assert!((30..70).contains(&gone), "{gone}");
    assert!((10..60).contains(&gone_and_seen), "{gone_and_seen}");
}

#[test]
fn ring_memory_is_as_it_was_at_the_kill() {
    let world = world(1);
    let mut storage = open(&world);
    storage.ring_write(0, b"before");
    storage.ring_store(64, 7);
    world.kill();
    storage.ring_write(0, b"after!");
    storage.ring_store(64, 8);
    storage.ring_mut(128, 4).fill(1);
    assert!(storage.wait(&mut Vec::new()).is_err());
    drop(storage);
    let storage = open(&world);
    assert_eq!(storage.ring(0, 6), b"before");
    assert_eq!(storage.ring_load(64), 7);
    assert_eq!(storage.ring(128, 4), [0; 4]);
}

#[test]
fn a_store_may_be_cut_by_the_kill() {
    let mut lengths = std::collections::BTreeSet::new();
    for seed in 0..50 {
        let world = world(seed);
        let mut storage = open(&world);
        world.kill_after(1);
        storage.ring_write(0, &[1; 16]);
        drop(storage);
        let storage = open(&world);
        lengths.insert(
            storage
                .ring(0, 16)
                .iter()
                .filter(|byte| **byte == 1)
                .count(),
        );
    }
    assert!(lengths.len() > 10, "{lengths:?}");
}

#[test]
fn late_writes_land_in_the_next_life_only_where_locks_do_not_hold() {
    let mut surprised = 0;
    for seed in 0..100 {
        for mode in [LateWrites::BeforeSuccessor, LateWrites::AnyTime] {
            let world = world(seed);
            world.set_late_writes(mode);
            let mut storage = open(&world);
            storage.submit(Token(1), write(0, 1, 512));
            world.kill();
            drop(storage);
            let mut storage = open(&world);
            storage.submit(Token(2), write(0, 2, 512));
            drain(&mut storage, 1);
            for _ in 0..100 {
                storage.ring_store(0, 1);
            }
            let overwritten = world.read("log", 0, 512) != vec![2; 512];
            assert!(!overwritten || mode == LateWrites::AnyTime, "seed {seed}");
            surprised += u32::from(overwritten);
        }
    }
    assert!(surprised > 10, "{surprised}");
}

#[test]
#[should_panic(expected = "change under")]
fn overwriting_ring_memory_in_flight_is_caught() {
    let world = world(1);
    let mut storage = open(&world);
    let source = Source::Ring(RingSpan {
        offset: 4096,
        len: 8192,
    });
    storage.submit(
        Token(1),
        Operation::Write {
            file: LOG,
            offset: 0,
            source,
            dsync: false,
        },
    );
    storage.ring_write(8192, &[1]);
}

#[test]
fn zeroing_punches_and_bits_flip() {
    let world = world(3);
    let mut storage = open(&world);
    storage.submit(Token(1), write(0, 9, 16384));
    drain(&mut storage, 1);
    storage.submit(
        Token(2),
        Operation::PunchHole {
            file: LOG,
            offset: 4096,
            len: 1 << 40,
        },
    );
    drain(&mut storage, 1);
    let runs = storage.allocated(LOG, 0, 1 << 20, 10).expect("known");
    assert_eq!(runs, std::iter::once(0..4096).collect::<Vec<_>>());
    assert_eq!(world.read("log", 4096, 12288), vec![0; 12288]);
    world.flip_bit("log", 5, 1);
    assert_eq!(world.read("log", 5, 1), [9 ^ 2]);
    world.set_len("log", 100);
    let buffer = AlignedBuffer::new(512);
    storage.submit(
        Token(3),
        Operation::Read {
            file: LOG,
            offset: 0,
            buffer,
        },
    );
    assert_eq!(
        drain(&mut storage, 1)[0].result.as_ref().expect("read"),
        &100
    );
}
