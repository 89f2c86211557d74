//! A group of simulated disks with an engine on it, driven turn by turn.

use crate::engine::blocking::FileNames;
use crate::engine::log::create::{NewLog, initial_superblock, superblock_bytes};
use crate::engine::recovery::{
    Accepted, ConfiguredDisk, RecoveredLog, RecoveryError, RecoveryInput, recover,
};
use crate::engine::request::{Allocated, Now, Reply, ReplyBody, Request, RequestError, RequestId};
use crate::engine::{Engine, EngineConfig, EngineEvent, Ticket};
use crate::io::sim::{SimStorage, SimWorld};
use crate::io::{Completion, FileId, Storage};
use afterimage_format::ids::{BLOCK_SIZE, BootId, DiskId, DiskIndex, GroupId, LogId};
use afterimage_format::segment::SinkId;
use afterimage_format::superblock::DiskState;
use std::collections::HashMap;
use std::path::PathBuf;

pub(super) const BLOCK: u64 = BLOCK_SIZE as u64;
const TURNS_MAX: usize = 200_000;

#[derive(Clone, Debug)]
pub(super) struct Geometry {
    pub(super) ring_blocks: u64,
    pub(super) log_blocks: u64,
    pub(super) disks: Vec<u64>,
    pub(super) sinks: usize,
    pub(super) config: EngineConfig,
}

impl Default for Geometry {
    fn default() -> Self {
        Self {
            ring_blocks: 32,
            log_blocks: 48,
            disks: vec![16 * BLOCK, 9 * BLOCK + 1536],
            sinks: 0,
            config: EngineConfig::default(),
        }
    }
}

pub(super) type Answer = Result<Option<Vec<u8>>, RequestError>;

pub(super) struct Rig {
    pub(super) world: SimWorld,
    pub(super) geometry: Geometry,
    /// Disks that the next start is not told of.
    pub(super) taken_out: Vec<usize>,
    engine: Option<Engine<SimStorage>>,
    pub(super) now_ns: u64,
    next_id: u64,
    pub(super) answers: HashMap<u64, Answer>,
    pub(super) events: Vec<EngineEvent>,
    completions: Vec<Completion>,
    replies: Vec<Reply>,
    kill_start_after: Option<u64>,
}

pub(super) fn sink(index: usize) -> SinkId {
    SinkId([index as u8 + 1; 16])
}

pub(super) fn disk_name(index: usize) -> String {
    format!("disk{index}")
}

impl Rig {
    /// A new group on empty disks.
    pub(super) fn new(seed: u64, geometry: Geometry) -> Self {
        let world = SimWorld::new(seed);
        for (index, size) in geometry.disks.iter().enumerate() {
            world.create_file(&disk_name(index), *size);
        }
        let size = (geometry.log_blocks + 2) * BLOCK;
        world.create_file("log", size);
        let new = NewLog {
            group: group(),
            log: LogId::from_bytes([2; 16]),
            size,
            disks: (0..geometry.disks.len())
                .map(|index| DiskState {
                    id: disk_id(index),
                    size: geometry.disks[index],
                    removed: false,
                })
                .collect(),
            sinks: (0..geometry.sinks).map(sink).collect(),
            boot: BootId::from_bytes(world.boot_id()),
            now_ns: 1,
        };
        world.write("log", 0, &superblock_bytes(&initial_superblock(&new)));
        let mut rig = Self {
            world,
            geometry,
            taken_out: Vec::new(),
            engine: None,
            now_ns: 1_000_000_000,
            next_id: 0,
            answers: HashMap::new(),
            events: Vec::new(),
            completions: Vec::new(),
            replies: Vec::new(),
            kill_start_after: None,
        };
        rig.start().expect("a new group starts");
        rig
    }

    /// Ends the present life, if any, recovers and starts a new engine.
    pub(super) fn start(&mut self) -> Result<RecoveredReport, RecoveryError> {
        self.engine = None;
        let ring_len = (self.geometry.ring_blocks as usize + 1) * BLOCK_SIZE;
        if !self.world.has_ring("ring") {
            self.world.create_ring("ring", ring_len);
        }
        let names: Vec<String> = (0..self.geometry.disks.len()).map(disk_name).collect();
        let mut files = vec![(FileId::LOG, "log")];
        for index in self.disks_left() {
            let name = &names[index];
            files.push((FileId::backing(DiskIndex(index as u16)), name.as_str()));
        }
        let mut storage = self.world.open(Some("ring"), &files);
        if let Some(steps) = self.kill_start_after.take() {
            self.world.kill_after(steps);
        }
        let input = RecoveryInput {
            names: FileNames {
                log: PathBuf::from("log"),
                next_log: PathBuf::new(),
                ring: PathBuf::from("ring"),
                backings: names.iter().map(PathBuf::from).collect(),
                claims: Vec::new(),
            },
            group: group(),
            boot: BootId::from_bytes(self.world.boot_id()),
            disks: self
                .disks_left()
                .map(|index| ConfiguredDisk {
                    id: disk_id(index),
                    size: self.geometry.disks[index],
                    last_write: Default::default(),
                })
                .collect(),
            sinks: (0..self.geometry.sinks).map(sink).collect(),
            claims: false,
            accepted: Accepted::default(),
        };
        let recovered: RecoveredLog = recover(&mut storage, &input)?;
        if self.world.is_dead() {
            // The last steps of recovery wait for nothing; the kill shows at the next start.
            drop(storage);
            return self.start();
        }
        let report = RecoveredReport {
            ring_frames: recovered.report().ring_frames,
        };
        self.engine = Some(Engine::start(
            storage,
            recovered.into_start(),
            self.geometry.config,
        ));
        self.answers.clear();
        self.events.clear();
        self.replies.clear();
        Ok(report)
    }

    fn disks_left(&self) -> impl Iterator<Item = usize> {
        (0..self.geometry.disks.len()).filter(|index| !self.taken_out.contains(index))
    }

    /// Kills the next start after so many steps.
    pub(super) fn kill_next_start_after(&mut self, steps: u64) {
        self.kill_start_after = Some(steps);
    }

    /// Drops the engine of a life that ended.
    pub(super) fn drop_engine(&mut self) {
        self.engine = None;
    }

    pub(super) fn engine(&mut self) -> &mut Engine<SimStorage> {
        self.engine.as_mut().expect("started")
    }

    pub(super) fn now(&self) -> Now {
        Now {
            monotonic_ns: self.now_ns,
            wall_ns: self.now_ns,
            boottime_ns: self.now_ns,
        }
    }

    pub(super) fn submit(&mut self, disk: usize, request: Request<'_>) -> u64 {
        self.next_id += 1;
        let (id, now) = (self.next_id, self.now());
        self.engine()
            .submit(now, RequestId(id), DiskIndex(disk as u16), request);
        self.collect();
        id
    }

    /// Carries out whatever the storage has, then a tick.
    pub(super) fn turn(&mut self) {
        self.now_ns += 100_000;
        let now = self.now();
        let mut completions = std::mem::take(&mut self.completions);
        self.engine().storage_mut().poll(&mut completions);
        for completion in completions.drain(..) {
            self.engine().complete(now, completion);
        }
        self.completions = completions;
        self.engine().tick(now);
        self.collect();
    }

    fn collect(&mut self) {
        if self.world.is_dead() {
            // A dead process answers nobody.
            return;
        }
        let mut replies = std::mem::take(&mut self.replies);
        let engine = self.engine.as_mut().expect("started");
        engine.take_replies(&mut replies);
        engine.take_events(&mut self.events);
        for reply in replies.drain(..) {
            let answer = reply.result.map(|body| match body {
                ReplyBody::Data { buffer, start, len } => {
                    let bytes = buffer[start..start + len].to_vec();
                    engine.recycle(buffer);
                    Some(bytes)
                }
                _ => None,
            });
            let before = self.answers.insert(reply.id.0, answer);
            assert!(before.is_none(), "request {} answered twice", reply.id.0);
        }
        self.replies = replies;
    }

    /// Turns until the request is answered; `None` if the process dies first.
    pub(super) fn wait(&mut self, id: u64) -> Option<Answer> {
        for _ in 0..TURNS_MAX {
            if let Some(answer) = self.answers.get(&id) {
                return Some(answer.clone());
            }
            if self.world.is_dead() {
                return None;
            }
            self.turn();
        }
        panic!(
            "request {id} is never answered: {:?}",
            self.engine().status()
        );
    }

    pub(super) fn turns(&mut self, count: usize) {
        for _ in 0..count {
            if !self.world.is_dead() {
                self.turn();
            }
        }
    }

    pub(super) fn write(&mut self, disk: usize, offset: u64, data: &[u8], fua: bool) -> u64 {
        self.submit(disk, Request::Write { offset, data, fua })
    }

    pub(super) fn flush(&mut self) -> u64 {
        self.submit(0, Request::Flush)
    }

    pub(super) fn read(&mut self, disk: usize, offset: u64, len: u32) -> Option<Answer> {
        let id = self.submit(disk, Request::Read { offset, len });
        self.wait(id)
    }

    /// What the engine says to be allocated, once it says so.
    pub(super) fn allocated(&mut self, disk: u16, from: u64, ranges_max: usize) -> Allocated {
        let ticket = Ticket(u64::MAX - 1);
        self.engine()
            .allocated_ranges(ticket, DiskIndex(disk), from, ranges_max);
        for _ in 0..TURNS_MAX {
            self.collect();
            let is_answer = |event: &EngineEvent| matches!(event, EngineEvent::Allocated { ticket: of, .. } if *of == ticket);
            if let Some(at) = self.events.iter().position(is_answer)
                && let EngineEvent::Allocated { result, .. } = self.events.remove(at)
            {
                return result.expect("the backing says it");
            }
            self.turn();
        }
        panic!("never told what is allocated");
    }

    /// Waits until everything is in the backings, the superblock is clean.
    pub(super) fn drain(&mut self) {
        self.engine().drain(Ticket(u64::MAX));
        self.drained();
    }

    /// Waits for the end of a drain with that ticket.
    pub(super) fn drained(&mut self) {
        for _ in 0..TURNS_MAX {
            self.turn();
            if self.events.iter().any(
                |event| matches!(event, EngineEvent::Drained { ticket } if ticket.0 == u64::MAX),
            ) {
                return;
            }
        }
        panic!("never drained: {:?}", self.engine().status());
    }

    /// The content of a backing as a reader of the file sees it.
    pub(super) fn backing(&self, disk: usize) -> Vec<u8> {
        let size = self.geometry.disks[disk];
        self.world.read(&disk_name(disk), 0, size as usize)
    }
}

pub(super) struct RecoveredReport {
    pub(super) ring_frames: u64,
}

fn group() -> GroupId {
    GroupId::from_bytes([1; 16])
}

fn disk_id(index: usize) -> DiskId {
    DiskId::from_bytes([index as u8 + 16; 16])
}
