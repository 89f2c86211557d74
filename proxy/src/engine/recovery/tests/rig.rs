//! A simulated disk, a client that writes in order, and what each prefix of its writes must read.
//! A second disk, where one is asked for, is only there.

use crate::engine::blocking::FileNames;
use crate::engine::log::create::{NewLog, initial_superblock, superblock_bytes};
use crate::engine::recovery::claims::{Leaving, Left, leave};
use crate::engine::recovery::plain::recover_to_plain;
use crate::engine::recovery::replay::ReplayProgress;
use crate::engine::recovery::rewrite::{Rewritten, rewrite_failed_log};
use crate::engine::recovery::{
    Accepted, ConfiguredDisk, LastWrite, RecoveryError, RecoveryInput, RecoveryReport, recover,
};
use crate::engine::request::{Now, Reply, Request, RequestId};
use crate::engine::{Engine, EngineConfig, EngineEvent, OnLogError, Ticket};
use crate::io::sim::{SimStorage, SimWorld};
use crate::io::{Completion, FileId, Storage};
use afterimage_format::claim::{CLAIM_FILE_BYTES, Claim, ClaimState};
use afterimage_format::ids::{BLOCK_SIZE, BootId, DiskId, DiskIndex, GroupId, LogId};
use afterimage_format::segment::SinkId;
use afterimage_format::superblock::{DiskState, Superblock, choose};
use std::path::PathBuf;

pub(super) const BLOCKS: u64 = 24;
/// No multiple of the block size.
pub(super) const DISK_BYTES: u64 = BLOCKS * BLOCK_SIZE as u64 - 1024;
const TURNS_MAX: usize = 20_000;

pub(super) struct Rig {
    pub(super) world: SimWorld,
    pub(super) accepted: Accepted,
    pub(super) last_write: LastWrite,
    pub(super) blocks_max: u64,
    pub(super) log_bytes: u64,
    ring_bytes: usize,
    pub(super) engine: Option<Engine<SimStorage>>,
    pub(super) config: EngineConfig,
    /// What the engine said and nobody has taken.
    pub(super) events: Vec<EngineEvent>,
    /// The owner stores the markers that are asked for.
    pub(super) marks: bool,
    /// How many disks the group has.
    pub(super) disks: usize,
    /// The disk after each operation that was submitted; the first is before any.
    pub(super) snapshots: Vec<Vec<u8>>,
    /// Snapshots that are sure to survive a kill, and a power cut.
    pub(super) answered: usize,
    pub(super) flushed: usize,
    /// What the last recovery to plain disks told of its replay.
    pub(super) told: Vec<ReplayProgress>,
    now_ns: u64,
    requests: u64,
}

pub(super) fn group() -> GroupId {
    GroupId::from_bytes([1; 16])
}

pub(super) fn sink() -> SinkId {
    SinkId([9; 16])
}

pub(super) fn disk() -> DiskId {
    disk_id(0)
}

fn disk_id(index: usize) -> DiskId {
    DiskId::from_bytes([3 + index as u8; 16])
}

/// Backing and claim of each disk.
const FILES: [(&str, &str); 2] = [("disk", "claim"), ("disk1", "claim1")];

pub(super) fn new_log(world: &SimWorld, id: u8, size: u64) -> Vec<u8> {
    let new = NewLog {
        group: group(),
        log: LogId::from_bytes([id; 16]),
        size,
        disks: vec![DiskState {
            id: disk(),
            size: DISK_BYTES,
            removed: false,
        }],
        sinks: vec![sink()],
        boot: BootId::from_bytes(world.boot_id()),
        now_ns: 1,
    };
    superblock_bytes(&initial_superblock(&new))
}

impl Rig {
    pub(super) fn new(seed: u64, log_blocks: u64, ring_blocks: u64) -> Self {
        let world = SimWorld::new(seed);
        let log_bytes = (log_blocks + 2) * BLOCK_SIZE as u64;
        world.create_file("disk", DISK_BYTES);
        world.create_file("claim", CLAIM_FILE_BYTES as u64);
        world.create_file("log", log_bytes);
        world.write("log", 0, &new_log(&world, 2, log_bytes));
        Self {
            world,
            accepted: Accepted::default(),
            last_write: LastWrite::at(77),
            told: Vec::new(),
            blocks_max: 3,
            log_bytes,
            ring_bytes: (ring_blocks as usize + 1) * BLOCK_SIZE,
            engine: None,
            config: EngineConfig::default(),
            events: Vec::new(),
            marks: true,
            disks: 1,
            snapshots: vec![vec![0; DISK_BYTES as usize]],
            answered: 0,
            flushed: 0,
            now_ns: 1_000_000,
            requests: 0,
        }
    }

    pub(super) fn input(&self) -> RecoveryInput {
        RecoveryInput {
            names: FileNames {
                log: PathBuf::from("log"),
                next_log: PathBuf::from("next"),
                ring: PathBuf::from("ring"),
                backings: FILES[..self.disks]
                    .iter()
                    .map(|(disk, _)| disk.into())
                    .collect(),
                claims: Vec::new(),
            },
            group: group(),
            boot: BootId::from_bytes(self.world.boot_id()),
            disks: (0..self.disks)
                .map(|index| ConfiguredDisk {
                    id: disk_id(index),
                    size: DISK_BYTES,
                    last_write: self.last_write,
                })
                .collect(),
            sinks: vec![sink()],
            claims: true,
            accepted: self.accepted,
        }
    }

    /// A new life, with a ring of zeroes if there is none.
    pub(super) fn open(&mut self) -> SimStorage {
        self.engine = None;
        if !self.world.has_ring("ring") {
            self.world.create_ring("ring", self.ring_bytes);
        }
        let mut files = vec![(FileId::LOG, "log")];
        for (index, (disk, claim)) in FILES[..self.disks].iter().enumerate() {
            let index = DiskIndex(index as u16);
            files.push((FileId::backing(index), disk));
            files.push((FileId::claim(index), claim));
        }
        if self.world.has_file("next") {
            files.push((FileId::NEXT_LOG, "next"));
        }
        self.world.open(Some("ring"), &files)
    }

    /// Recovers and starts an engine. `kill_after`: so many steps later the process is killed.
    pub(super) fn start(
        &mut self,
        kill_after: Option<u64>,
    ) -> Result<RecoveryReport, RecoveryError> {
        let mut storage = self.open();
        if let Some(steps) = kill_after {
            self.world.kill_after(steps);
        }
        let recovered = recover(&mut storage, &self.input())?;
        let report = *recovered.report();
        let start = recovered.into_start();
        self.engine = Some(Engine::start(storage, start, self.config));
        self.events.clear();
        Ok(report)
    }

    /// The ring as it stands.
    pub(super) fn ring_bytes(&mut self) -> Vec<u8> {
        let storage = self.open();
        storage.ring(0, storage.ring_len()).to_vec()
    }

    pub(super) fn recover_plain(
        &mut self,
        kill_after: Option<u64>,
    ) -> Result<RecoveryReport, RecoveryError> {
        let mut storage = self.open();
        if let Some(steps) = kill_after {
            self.world.kill_after(steps);
        }
        let last_write = self.last_write;
        self.told.clear();
        let input = self.input();
        let mut progress = |at| self.told.push(at);
        recover_to_plain(&mut storage, &input, &|_| last_write, &mut progress)
    }

    pub(super) fn rewrite(
        &mut self,
        kill_after: Option<u64>,
    ) -> Result<Option<Rewritten>, RecoveryError> {
        let mut storage = self.open();
        if let Some(steps) = kill_after {
            self.world.kill_after(steps);
        }
        rewrite_failed_log(&mut storage, &self.input())
    }

    /// A log to take the place of the present one.
    pub(super) fn create_next(&self) {
        self.world.create_file("next", self.log_bytes);
        self.world
            .write("next", 0, &new_log(&self.world, 4, self.log_bytes));
    }

    /// A group of two disks that goes on without its log if that fails.
    pub(super) fn detaching(seed: u64) -> Self {
        let mut rig = Self::new(seed, 64, 48);
        rig.config.on_log_error = OnLogError::Detach;
        rig.disks = 2;
        rig.world.create_file("disk1", DISK_BYTES);
        rig.world.create_file("claim1", CLAIM_FILE_BYTES as u64);
        rig
    }

    /// Makes the claim of a disk say, durably, that its log was abandoned.
    pub(super) fn abandon(&self, disk: usize) {
        let mut claim = self.claim_of(disk);
        claim.generation += 1;
        claim.state = ClaimState::Abandoned;
        let at = claim.generation % 2 * BLOCK_SIZE as u64;
        self.world.write(FILES[disk].1, at, &claim.encode());
    }

    pub(super) fn now(&self) -> Now {
        Now {
            monotonic_ns: self.now_ns,
            wall_ns: self.now_ns,
            boottime_ns: self.now_ns,
        }
    }

    pub(super) fn engine(&mut self) -> &mut Engine<SimStorage> {
        self.engine.as_mut().expect("started")
    }

    /// Submits and waits for the answer. False: the process died before it.
    fn request(&mut self, request: Request<'_>) -> bool {
        self.requests += 1;
        let (now, id) = (self.now(), RequestId(self.requests));
        self.engine().submit(now, id, DiskIndex(0), request);
        let mut replies: Vec<Reply> = Vec::new();
        for _ in 0..TURNS_MAX {
            if self.world.is_dead() {
                return false;
            }
            self.engine().take_replies(&mut replies);
            if let Some(reply) = replies.pop() {
                assert_eq!(reply.id, id);
                return reply.result.is_ok();
            }
            self.turn();
        }
        panic!("no answer");
    }

    /// What the storage has, then a tick.
    pub(super) fn turn(&mut self) {
        self.now_ns += 500_000;
        let now = self.now();
        let mut completions: Vec<Completion> = Vec::new();
        let engine = self.engine();
        engine.storage_mut().poll(&mut completions);
        for completion in completions {
            engine.complete(now, completion);
        }
        engine.tick(now);
        let mut events = Vec::new();
        engine.take_events(&mut events);
        let marker = events
            .iter()
            .any(|e| matches!(e, EngineEvent::DetachWanted));
        self.events.append(&mut events);
        if marker && self.marks && !self.world.is_dead() {
            (0..self.disks).for_each(|disk| self.abandon(disk));
            let now = self.now();
            self.engine().detach_marked(now);
        }
    }

    pub(super) fn write(&mut self, first_block: u64, blocks: u64, fill: u8) -> bool {
        let offset = first_block * BLOCK_SIZE as u64;
        let end = (offset + blocks * BLOCK_SIZE as u64).min(DISK_BYTES);
        let data: Vec<u8> = (offset..end).map(|at| fill ^ (at % 251) as u8).collect();
        let mut next = self.snapshots.last().unwrap().clone();
        next[offset as usize..end as usize].copy_from_slice(&data);
        self.snapshots.push(next);
        let answered = self.request(Request::Write {
            offset,
            data: &data,
            fua: false,
        });
        self.note(answered)
    }

    pub(super) fn trim(&mut self, first_block: u64, blocks: u64) -> bool {
        let offset = first_block * BLOCK_SIZE as u64;
        let end = (offset + blocks * BLOCK_SIZE as u64).min(DISK_BYTES);
        let mut next = self.snapshots.last().unwrap().clone();
        next[offset as usize..end as usize].fill(0);
        self.snapshots.push(next);
        let answered = self.request(Request::Trim {
            offset,
            len: end - offset,
            fua: false,
        });
        self.note(answered)
    }

    fn note(&mut self, answered: bool) -> bool {
        if answered {
            self.answered = self.snapshots.len() - 1;
        }
        answered
    }

    pub(super) fn flush(&mut self) -> bool {
        let answered = self.request(Request::Flush);
        if answered {
            self.flushed = self.answered;
        }
        answered
    }

    /// A mix of writes, trims and flushes until it is done or the process dies.
    pub(super) fn work(&mut self, seed: u64, operations: u64) {
        let mut state = seed | 1;
        for _ in 0..operations {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(99);
            let (kind, at, fill) = (state >> 60, (state >> 40) % BLOCKS, (state >> 20) as u8);
            let blocks = (1 + (state >> 33) % self.blocks_max).min(BLOCKS - at);
            let alive = match kind {
                0..=1 => self.flush(),
                2..=3 => self.trim(at, blocks),
                _ => self.write(at, blocks, fill),
            };
            if !alive {
                return;
            }
        }
    }

    /// Drains the engine and leaves the disk.
    pub(super) fn stop(&mut self, leaving: Leaving) {
        self.engine().drain(Ticket(1));
        for _ in 0..TURNS_MAX {
            self.turn();
            let drained = |event: &EngineEvent| matches!(event, EngineEvent::Drained { .. });
            if self.events.iter().any(drained) {
                let mut storage = self.engine.take().unwrap().into_storage();
                let last_write = self.last_write;
                let input = self.input();
                let left = leave(&mut storage, &input, leaving, &|_| last_write).unwrap();
                let abandoned = self.claim().state == ClaimState::Abandoned;
                assert_eq!(left == Left::Abandoned, abandoned);
                self.flushed = self.answered;
                return;
            }
        }
        panic!("does not drain");
    }

    pub(super) fn superblock(&self) -> Superblock {
        let bytes = self.world.read("log", 0, 2 * BLOCK_SIZE);
        choose([&bytes[..BLOCK_SIZE], &bytes[BLOCK_SIZE..]]).unwrap()
    }

    pub(super) fn claim(&self) -> Claim {
        self.claim_of(0)
    }

    pub(super) fn claim_of(&self, disk: usize) -> Claim {
        Claim::decode_file(&self.world.read(FILES[disk].1, 0, CLAIM_FILE_BYTES)).unwrap()
    }

    pub(super) fn disk_bytes(&self) -> Vec<u8> {
        self.world.read("disk", 0, DISK_BYTES as usize)
    }

    /// The disk is what one of the snapshots from `least` on was. Which.
    pub(super) fn check(&self, least: usize, context: &str) -> usize {
        let bytes = self.disk_bytes();
        let found = (least..self.snapshots.len())
            .rev()
            .find(|at| self.snapshots[*at] == bytes);
        found.unwrap_or_else(|| {
            for block in 0..BLOCKS as usize {
                let range = block * BLOCK_SIZE..((block + 1) * BLOCK_SIZE).min(bytes.len());
                let same: Vec<usize> = (0..self.snapshots.len())
                    .filter(|at| self.snapshots[*at][range.clone()] == bytes[range.clone()])
                    .collect();
                eprintln!("block {block} is as after operations {same:?}");
            }
            let older = self.snapshots.iter().rposition(|old| *old == bytes);
            panic!(
                "{context}: the disk is as after operation {older:?}, {least} to {} were due",
                self.snapshots.len() - 1
            )
        })
    }

    /// Each byte of the disk is what one of the snapshots from `least` on has there: what a disk
    /// with a write cache may hold that was flushed then.
    pub(super) fn check_bytes(&self, least: usize, context: &str) {
        for (at, byte) in self.disk_bytes().iter().enumerate() {
            let known = |old: &Vec<u8>| old[at] == *byte;
            assert!(
                self.snapshots[least..].iter().any(known),
                "{context}: byte {at} is older than operation {least}"
            );
        }
    }

    /// What comes after goes on from what the disk now is.
    pub(super) fn go_on_from(&mut self, at: usize) {
        self.snapshots.truncate(at + 1);
        self.answered = at;
        self.flushed = at;
    }
}
