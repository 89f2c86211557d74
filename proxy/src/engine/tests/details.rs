//! What a model that looks at the disks at the end would miss, or meet by rare luck only.

use super::rig::{BLOCK, Geometry, Rig};
use crate::io::sim::SimRng;
use afterimage_format::ids::{BLOCK_SIZE, Lsn};

fn write_ok(rig: &mut Rig, disk: usize, offset: u64, data: &[u8]) {
    let id = rig.write(disk, offset, data, false);
    rig.wait(id).expect("alive").expect("written");
}

/// The log leaves the machine and outlives it: nothing may be in it that nobody wrote there.
#[test]
fn what_lies_behind_the_end_of_a_disk_is_zero_in_the_log() {
    let mut rig = Rig::new(1, Geometry::default());
    let (end, tail) = (9 * BLOCK, 1536);
    let mut seen = 0;
    for round in 0..8 {
        // Other content everywhere in the ring, then the part of a block at the disk's end.
        for at in 0..16 {
            write_ok(&mut rig, 0, at * BLOCK, &[0xee; BLOCK_SIZE]);
        }
        for _ in 0..round {
            write_ok(&mut rig, 0, 0, &[0xee; BLOCK_SIZE]);
        }
        write_ok(&mut rig, 1, end, &vec![0xa5; tail]);
        let flush = rig.flush();
        rig.wait(flush).expect("alive").expect("flushed");
        let log = rig.world.read("log", 2 * BLOCK, 48 * BLOCK_SIZE);
        for block in log.chunks_exact(BLOCK_SIZE) {
            if block[..tail].iter().all(|byte| *byte == 0xa5) {
                seen += 1;
                assert!(block[tail..].iter().all(|byte| *byte == 0), "round {round}");
            }
        }
    }
    assert!(seen >= 8);
}

/// A large write that waits for room gets it before smaller ones that came later.
/// A block that is rewritten faster than the log becomes durable: its old versions leave the ring
/// without being written to the backing, and hold nobody up.
#[test]
fn a_block_that_never_rests_is_skipped() {
    let mut rig = Rig::new(
        7,
        Geometry {
            ring_blocks: 128,
            log_blocks: 4096,
            disks: vec![1024 * BLOCK],
            ..Geometry::default()
        },
    );
    let hot = vec![1; BLOCK_SIZE];
    for round in 0..1000u64 {
        let cold = (1 + round % 1000) * BLOCK;
        let writes = [
            rig.write(0, 0, &hot, false),
            rig.write(0, cold, &hot, false),
        ];
        for id in writes {
            assert!(
                rig.answers.contains_key(&id),
                "round {round} waits for room"
            );
        }
        rig.turn();
    }
    let status = rig.engine().status();
    assert!(status.destage_skipped_blocks > 800, "{status:?}");
    rig.drain();
}

#[test]
fn nothing_overtakes_what_waits_for_room_in_the_ring() {
    let mut waited = 0;
    for seed in 0..20 {
        let mut rng = SimRng::new(seed);
        let mut rig = Rig::new(seed, Geometry::default());
        let mut open: Vec<u64> = Vec::new();
        for _ in 0..300 {
            // As large as a record can be with this ring, or one block.
            let blocks = if rng.chance(2500) { 7 } else { 1 };
            let data = vec![1; blocks * BLOCK_SIZE];
            let at = rng.below(16 - blocks as u64);
            open.push(rig.write(0, at * BLOCK, &data, false));
            let turns = rng.below(3) as usize;
            rig.turns(turns);
            let unanswered = |id: &&u64| !rig.answers.contains_key(id);
            let first = open.iter().position(|id| unanswered(&id));
            let Some(first) = first else {
                open.clear();
                continue;
            };
            waited += 1;
            let later = open[first..].iter().filter(|id| !unanswered(id)).count();
            assert_eq!(later, 0, "seed {seed}: a later write was answered first");
        }
        assert!(rig.engine().progress().appended > Lsn::ZERO);
    }
    assert!(waited > 100, "the ring was hardly ever full: {waited}");
}
