//! Kills and power cuts at any step, also within recovery: what was answered, or flushed, is there,
//! and the disks are as they were after some record, all of them together.

use super::rig::{BLOCK, Geometry, Rig};
use crate::engine::request::Request;
use crate::engine::{Ack, EngineConfig};
use crate::io::sim::SimRng;
use afterimage_format::frame::{RECORD_BLOCKS_MAX, payload_blocks_limit};

/// What one record did to the disks.
struct Effect {
    disk: usize,
    offset: u64,
    bytes: Vec<u8>,
}

struct History {
    /// The disks before the first effect.
    base: Vec<Vec<u8>>,
    requests: Vec<Vec<Effect>>,
    /// So many requests were answered.
    answered: usize,
    /// So many must survive a power cut.
    durable: usize,
    record_bytes: u64,
}

impl History {
    fn new(geometry: &Geometry) -> Self {
        let blocks =
            payload_blocks_limit(geometry.ring_blocks, geometry.log_blocks).min(RECORD_BLOCKS_MAX);
        Self {
            base: geometry
                .disks
                .iter()
                .map(|len| vec![0; *len as usize])
                .collect(),
            requests: Vec::new(),
            answered: 0,
            durable: 0,
            record_bytes: u64::from(blocks) * BLOCK,
        }
    }

    /// The records of a write, as the engine cuts it.
    fn write(&mut self, disk: usize, mut offset: u64, data: &[u8]) {
        let mut data = data;
        while !data.is_empty() {
            let most = self.record_bytes - offset % BLOCK;
            let len = data.len().min(most as usize);
            self.requests.last_mut().expect("begun").push(Effect {
                disk,
                offset,
                bytes: data[..len].to_vec(),
            });
            data = &data[len..];
            offset += len as u64;
        }
    }

    /// The records of a zeroing.
    fn zero(&mut self, disk: usize, offset: u64, len: u64) {
        let end = offset + len;
        let size = self.base[disk].len() as u64;
        let inner = offset.next_multiple_of(BLOCK);
        let inner_end = if end == size {
            end
        } else {
            end / BLOCK * BLOCK
        };
        if inner >= inner_end {
            return self.write(disk, offset, &vec![0; len as usize]);
        }
        self.write(disk, offset, &vec![0; (inner - offset) as usize]);
        self.requests.last_mut().expect("begun").push(Effect {
            disk,
            offset: inner,
            bytes: vec![0; (inner_end - inner) as usize],
        });
        self.write(disk, inner_end, &vec![0; (end - inner_end) as usize]);
    }

    /// Finds after how many records, `least` or more, the disks were as they are now; goes on from
    /// there.
    fn settle(&mut self, rig: &Rig, least: usize, seed: u64) {
        let now: Vec<Vec<u8>> = (0..self.base.len()).map(|disk| rig.backing(disk)).collect();
        let mut state = self.base.clone();
        for count in 0..=self.requests.len() {
            // The records of one request are about different blocks; of the last any may be there.
            let mut some = state.clone();
            for effect in self.requests.get(count).into_iter().flatten() {
                let range = effect.offset as usize..effect.offset as usize + effect.bytes.len();
                if now[effect.disk][range.clone()] == effect.bytes {
                    some[effect.disk][range].copy_from_slice(&effect.bytes);
                }
            }
            if count >= least && some == now {
                self.base = some;
                self.requests.clear();
                self.answered = 0;
                self.durable = 0;
                return;
            }
            for effect in self.requests.get(count).into_iter().flatten() {
                let at = effect.offset as usize;
                state[effect.disk][at..at + effect.bytes.len()].copy_from_slice(&effect.bytes);
            }
        }
        panic!(
            "seed {seed}: the disks are not as after any request from {least} to {}",
            self.requests.len()
        );
    }
}

#[derive(Clone, Copy, PartialEq)]
enum End {
    Kill,
    PowerCut,
}

fn run(seed: u64, geometry: &Geometry, end: End, rounds: usize) -> u64 {
    let mut rng = SimRng::new(seed ^ 0xc4a5);
    let mut rig = Rig::new(seed, geometry.clone());
    let mut history = History::new(geometry);
    let mut from_ring = 0;
    for _ in 0..rounds {
        rig.world.kill_after(1 + rng.below(1500));
        while !rig.world.is_dead() {
            one_request(&mut rig, &mut history, geometry, &mut rng);
            let idle = rng.below(4) as usize;
            rig.turns(idle);
        }
        let least = match end {
            End::Kill => history.answered,
            End::PowerCut => history.durable,
        };
        if end == End::PowerCut {
            rig.drop_engine();
            rig.world.power_cut();
        }
        loop {
            if rng.chance(5000) {
                rig.kill_next_start_after(1 + rng.below(200));
            }
            match rig.start() {
                Ok(report) => {
                    from_ring += report.ring_frames;
                    break;
                }
                Err(error) => {
                    assert!(
                        rig.world.is_dead(),
                        "seed {seed}: recovery refuses: {error}"
                    );
                    if end == End::PowerCut && rng.chance(5000) {
                        rig.world.power_cut();
                    }
                }
            }
        }
        history.settle(&rig, least, seed);
    }
    from_ring
}

fn one_request(rig: &mut Rig, history: &mut History, geometry: &Geometry, rng: &mut SimRng) {
    let disk = rng.below(geometry.disks.len() as u64) as usize;
    let sectors = geometry.disks[disk] / 512;
    let first = rng.below(sectors);
    let count = 1 + rng.below((sectors - first).min(24));
    let (offset, len) = (first * 512, count * 512);
    let fua = rng.chance(2000);
    let id = match rng.below(8) {
        0..=3 => {
            let data: Vec<u8> = rng.next_u64().to_le_bytes().repeat((len / 8) as usize);
            history.requests.push(Vec::new());
            history.write(disk, offset, &data);
            rig.write(disk, offset, &data, fua)
        }
        4 => {
            history.requests.push(Vec::new());
            history.zero(disk, offset, len);
            rig.submit(disk, Request::Trim { offset, len, fua })
        }
        5 => {
            history.requests.push(Vec::new());
            history.zero(disk, offset, len);
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
        6 => {
            let id = rig.flush();
            if let Some(answer) = rig.wait(id) {
                answer.expect("a flush succeeds");
                history.durable = history.requests.len();
            }
            return;
        }
        _ => {
            rig.read(disk, offset, len as u32);
            return;
        }
    };
    if let Some(answer) = rig.wait(id) {
        answer.expect("a write succeeds");
        history.answered = history.requests.len();
        if fua || geometry.config.ack == Ack::Durable {
            history.durable = history.requests.len();
        }
    }
}

#[test]
fn whatever_was_answered_survives_a_kill() {
    let mut from_ring = 0;
    for seed in 0..40 {
        from_ring += run(seed, &Geometry::default(), End::Kill, 6);
    }
    assert!(from_ring > 0, "no answered write was in the ring alone");
}

#[test]
fn whatever_was_flushed_survives_a_power_cut() {
    for seed in 0..40 {
        run(seed, &Geometry::default(), End::PowerCut, 6);
    }
}

#[test]
fn the_smallest_ring_and_log_survive() {
    let geometry = Geometry {
        ring_blocks: 8,
        log_blocks: 8,
        ..Geometry::default()
    };
    for seed in 100..125 {
        run(seed, &geometry, End::Kill, 5);
        run(seed, &geometry, End::PowerCut, 5);
    }
}

#[test]
fn with_ack_durable_every_answer_survives_a_power_cut() {
    let geometry = Geometry {
        config: EngineConfig {
            ack: Ack::Durable,
            ..EngineConfig::default()
        },
        ..Geometry::default()
    };
    for seed in 200..215 {
        run(seed, &geometry, End::PowerCut, 5);
    }
}
