//! Random requests against a model that knows, for every sector, what a read may return.

use super::rig::{BLOCK, Geometry, Rig};
use crate::engine::request::Request;
use crate::io::sim::SimRng;
use std::collections::HashMap;

const SECTOR: u64 = 512;

/// A write to one sector: what it stores, and when it was in flight.
#[derive(Clone, Copy, Debug)]
struct Version {
    value: u64,
    submitted: u64,
    answered: Option<u64>,
}

/// Every sector holds the same word 64 times.
#[derive(Default)]
struct Model {
    sectors: HashMap<(usize, u64), Vec<Version>>,
    step: u64,
}

impl Model {
    fn submit(&mut self, disk: usize, offset: u64, len: u64, value: u64) {
        self.step += 1;
        for sector in offset / SECTOR..(offset + len) / SECTOR {
            self.sectors
                .entry((disk, sector))
                .or_default()
                .push(Version {
                    value,
                    submitted: self.step,
                    answered: None,
                });
        }
    }

    fn answer(&mut self, disk: usize, offset: u64, len: u64, submitted: u64) {
        self.step += 1;
        for sector in offset / SECTOR..(offset + len) / SECTOR {
            for version in self.sectors.get_mut(&(disk, sector)).into_iter().flatten() {
                if version.submitted == submitted {
                    version.answered = Some(self.step);
                }
            }
        }
    }

    /// Whether a read that was in flight from `from` to now may see `value`.
    fn allows(&self, disk: usize, sector: u64, value: u64, from: u64) -> bool {
        let versions = self.sectors.get(&(disk, sector));
        let versions = versions.map_or(&[][..], Vec::as_slice);
        let overwritten = |answered: Option<u64>| {
            versions.iter().any(|later| {
                answered.is_some_and(|answered| later.submitted > answered)
                    && later.answered.is_some_and(|end| end < from)
            })
        };
        (value == 0 && !overwritten(Some(0)))
            || versions
                .iter()
                .any(|version| version.value == value && !overwritten(version.answered))
    }
}

struct InFlight {
    id: u64,
    disk: usize,
    offset: u64,
    len: u64,
    /// Step of its submission.
    step: u64,
    read: bool,
}

fn run(seed: u64, geometry: Geometry, requests: usize) {
    let mut rng = SimRng::new(seed ^ 0xfeed);
    let mut rig = Rig::new(seed, geometry.clone());
    let mut model = Model::default();
    let mut in_flight: Vec<InFlight> = Vec::new();
    let mut value = 0;
    let mut left = requests;
    let mut turns = 0;
    while left > 0 || !in_flight.is_empty() {
        turns += 1;
        assert!(turns < 400_000, "stuck: {:?}", rig.engine().status());
        while left > 0 && in_flight.len() < 8 && rng.chance(6000) {
            left -= 1;
            let disk = rng.below(geometry.disks.len() as u64) as usize;
            let sectors = geometry.disks[disk] / SECTOR;
            let first = rng.below(sectors);
            let most = (sectors - first).min(if rng.chance(7000) { 16 } else { 64 });
            let count = 1 + rng.below(most);
            let (offset, len) = (first * SECTOR, count * SECTOR);
            let fua = rng.chance(1000);
            value += 1;
            let kind = rng.below(10);
            let mut read = false;
            let id = match kind {
                0..=4 => {
                    model.submit(disk, offset, len, value);
                    let data = value.to_le_bytes().repeat((len / 8) as usize);
                    rig.write(disk, offset, &data, fua)
                }
                5 => {
                    model.submit(disk, offset, len, 0);
                    rig.submit(disk, Request::Trim { offset, len, fua })
                }
                6 => {
                    model.submit(disk, offset, len, 0);
                    let no_hole = rng.chance(5000);
                    rig.submit(
                        disk,
                        Request::WriteZeroes {
                            offset,
                            len,
                            fua,
                            no_hole,
                        },
                    )
                }
                7 => {
                    model.step += 1;
                    read = true;
                    rig.flush()
                }
                _ => {
                    model.step += 1;
                    read = true;
                    let len = len as u32;
                    rig.submit(disk, Request::Read { offset, len })
                }
            };
            in_flight.push(InFlight {
                id,
                disk,
                offset,
                len,
                step: model.step,
                read,
            });
        }
        rig.turn();
        let status = rig.engine().status();
        assert!(status.destaged <= status.progress.durable);
        assert!(status.synced <= status.destaged);
        assert!(status.log_bytes_used <= status.log_bytes);
        in_flight.retain(|request| {
            let Some(answer) = rig.answers.remove(&request.id) else {
                return true;
            };
            let data = answer.expect("nothing fails here");
            if !request.read {
                model.answer(request.disk, request.offset, request.len, request.step);
            }
            for (sector, bytes) in
                (request.offset / SECTOR..).zip(data.unwrap_or_default().chunks(SECTOR as usize))
            {
                check(&model, request.disk, sector, bytes, request.step, seed);
            }
            false
        });
    }
    // All of it again, from the ring and the backings, then from the backings alone.
    let step = model.step + 1;
    model.step = step;
    for disk in 0..geometry.disks.len() {
        let len = geometry.disks[disk] as u32;
        let data = rig.read(disk, 0, len).expect("alive").expect("reads");
        for (sector, bytes) in (0..).zip(data.expect("data").chunks(SECTOR as usize)) {
            check(&model, disk, sector, bytes, step, seed);
        }
    }
    rig.drain();
    for disk in 0..geometry.disks.len() {
        for (sector, bytes) in (0..).zip(rig.backing(disk).chunks(SECTOR as usize)) {
            check(&model, disk, sector, bytes, step, seed);
        }
    }
}

fn check(model: &Model, disk: usize, sector: u64, bytes: &[u8], from: u64, seed: u64) {
    let word = &bytes[..8];
    assert!(
        bytes.chunks(8).all(|other| other == word),
        "seed {seed}: disk {disk} sector {sector} is torn"
    );
    let value = u64::from_le_bytes(word.try_into().expect("8 bytes"));
    assert!(
        model.allows(disk, sector, value, from),
        "seed {seed}: disk {disk} sector {sector} reads {value} as of step {from}; written: {:?}",
        model.sectors.get(&(disk, sector))
    );
}

#[test]
fn random_requests_read_what_was_written() {
    for seed in 0..60 {
        run(seed, Geometry::default(), 120);
    }
}

#[test]
fn the_smallest_ring_and_log_work() {
    for seed in 100..140 {
        let geometry = Geometry {
            ring_blocks: 8,
            log_blocks: 8,
            ..Geometry::default()
        };
        run(seed, geometry, 60);
    }
}

#[test]
fn a_small_log_behind_a_large_ring_works() {
    for seed in 200..230 {
        let geometry = Geometry {
            ring_blocks: 256,
            log_blocks: 12,
            ..Geometry::default()
        };
        run(seed, geometry, 100);
    }
}

#[test]
fn a_small_ring_before_a_large_log_works() {
    for seed in 300..330 {
        let geometry = Geometry {
            ring_blocks: 12,
            log_blocks: 400,
            disks: vec![64 * BLOCK, 512],
            ..Geometry::default()
        };
        run(seed, geometry, 150);
    }
}
