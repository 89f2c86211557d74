//! What a pass reads, and what it is told to be empty, is the content at exactly one LSN unless the
//! engine says otherwise: verify records are made of it.

use super::rig::{BLOCK, Geometry, Rig};
use crate::engine::request::Request;
use crate::engine::{EngineConfig, EngineEvent, Ticket};
use crate::io::sim::SimRng;
use afterimage_format::ids::{BLOCK_SIZE, DiskIndex, Lsn};

const BLOCKS: u64 = 16;

/// The value of every byte of each block, by the record that gave it.
struct History(Vec<Vec<(Lsn, u8)>>);

impl History {
    fn at(&self, block: u64, lsn: Lsn) -> u8 {
        let versions = &self.0[block as usize];
        let later = versions.partition_point(|(from, _)| *from <= lsn);
        versions[later - 1].1
    }

    fn newest(&self, block: u64) -> u8 {
        self.at(block, Lsn::MAX)
    }
}

/// One record, answered.
fn change(rig: &mut Rig, history: &mut History, rng: &mut SimRng, value: u8) {
    let block = rng.below(BLOCKS);
    let offset = block * BLOCK;
    let trims = rng.below(3) == 0;
    let id = if trims {
        let (len, fua) = (BLOCK, false);
        rig.submit(0, Request::Trim { offset, len, fua })
    } else {
        rig.write(0, offset, &[value; BLOCK_SIZE], false)
    };
    rig.wait(id).expect("alive").expect("changed");
    let lsn = rig.engine().progress().appended;
    let value = if trims { 0 } else { value };
    history.0[block as usize].push((lsn, value));
}

/// What may be empty is told of one moment: nothing of it is anything else then.
fn check_allocated(rig: &mut Rig, history: &History, from: u64, ranges_max: usize) -> u64 {
    let said = rig.allocated(0, from, ranges_max);
    assert_eq!(said.lsn, rig.engine().progress().appended);
    assert!(said.ranges.len() <= ranges_max);
    let empty = (from..said.end_block)
        .filter(|block| !said.ranges.iter().any(|range| range.contains(block)));
    empty
        .inspect(|block| assert_eq!(history.newest(*block), 0, "block {block} of {said:?}"))
        .count() as u64
}

#[test]
fn reads_that_were_not_overtaken_are_exact() {
    let (mut exact, mut overtaken, mut empty) = (0, 0, 0);
    for seed in 0..120 {
        let mut rng = SimRng::new(seed);
        let config = EngineConfig {
            log_delay_ns: 0,
            commit_interval_ns: 0,
            destage_age_ns: 0,
            ..EngineConfig::default()
        };
        let mut rig = Rig::new(
            seed,
            Geometry {
                config,
                ..Geometry::default()
            },
        );
        let mut history = History(vec![vec![(Lsn::ZERO, 0)]; BLOCKS as usize]);
        for step in 0..120u64 {
            if rng.below(3) > 0 {
                change(&mut rig, &mut history, &mut rng, step as u8 + 1);
            }
            if rng.below(4) == 0 {
                let first = rng.below(BLOCKS - 6);
                rig.engine().pass_read(Ticket(step), DiskIndex(0), first, 6);
            }
            if rng.below(4) == 0 {
                let (from, max) = (rng.below(BLOCKS), 1 + rng.below(4) as usize);
                empty += check_allocated(&mut rig, &history, from, max);
            }
            let turns = rng.below(4) as usize;
            rig.turns(turns);
        }
        rig.turns(3_000);
        for event in &rig.events {
            let EngineEvent::PassRead { result, .. } = event else {
                continue;
            };
            let read = result.as_ref().expect("read");
            if read.overtaken {
                overtaken += 1;
                continue;
            }
            exact += 1;
            for (at, data) in read.data.chunks(BLOCK_SIZE).enumerate() {
                let wanted = history.at(read.first_block + at as u64, read.lsn);
                let lsn = read.lsn;
                assert!(
                    data.iter().all(|byte| *byte == wanted),
                    "seed {seed}: block {at} of the read at {lsn} holds {} instead of {wanted}",
                    data[0]
                );
            }
        }
    }
    assert!(
        exact > 1_000 && overtaken > 100 && empty > 1_000,
        "{exact}, {overtaken}, {empty}"
    );
}

/// A block in the ring is not read from the backing: however often it is written, nothing of the
/// read becomes newer by that.
#[test]
fn hot_blocks_do_not_overtake() {
    let mut rig = Rig::new(7, Geometry::default());
    let id = rig.write(0, 0, &[1; BLOCK_SIZE], false);
    rig.wait(id).expect("alive").expect("written");
    rig.engine().pass_read(Ticket(1), DiskIndex(0), 0, 2);
    rig.write(0, 0, &[2; BLOCK_SIZE], false);
    // Another block of the read, and one beside it.
    rig.engine().pass_read(Ticket(2), DiskIndex(0), 0, 2);
    rig.write(0, BLOCK, &[3; BLOCK_SIZE], false);
    rig.write(0, 2 * BLOCK, &[3; BLOCK_SIZE], false);
    rig.turns(500);
    let overtaken = |wanted| {
        rig.events.iter().find_map(|event| match event {
            EngineEvent::PassRead { ticket, result } if *ticket == Ticket(wanted) => result
                .as_ref()
                .ok()
                .map(|read| (read.overtaken, read.data[0])),
            _ => None,
        })
    };
    // The second write to block 1 came while both were under way.
    assert_eq!(overtaken(1), Some((true, 1)));
    assert_eq!(overtaken(2), Some((true, 2)));
    rig.events.clear();
    rig.engine().pass_read(Ticket(3), DiskIndex(0), 2, 2);
    rig.write(0, 2 * BLOCK, &[4; BLOCK_SIZE], false);
    rig.write(0, 4 * BLOCK, &[4; BLOCK_SIZE], false);
    rig.turns(500);
    let read = rig.events.iter().find_map(|event| match event {
        EngineEvent::PassRead { result, .. } => result.as_ref().ok(),
        _ => None,
    });
    let read = read.expect("read");
    assert!(
        !read.overtaken,
        "block 2 was in the ring, block 4 beside it"
    );
    assert_eq!(read.data[0], 3);
}
