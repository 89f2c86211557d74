//! The primary's host: its disks and memory, and the process that runs the group's engine on them,
//! life after life.

use super::tap::RingTap;
use afterimage_format::ids::{BLOCK_SIZE, BootId, DiskId, DiskIndex, GroupId, LogId};
use afterimage_format::segment::SinkId;
use afterimage_format::superblock::{DiskState, Superblock};
use afterimage_proxy::engine::blocking::{FileNames, StorageError};
use afterimage_proxy::engine::log::create::{NewLog, initial_superblock, superblock_bytes};
use afterimage_proxy::engine::log::reader::LogSource;
use afterimage_proxy::engine::log::superblock::peek;
use afterimage_proxy::engine::recovery::claims::{Leaving, leave};
use afterimage_proxy::engine::recovery::{
    Accepted, ConfiguredDisk, LastWrite, RecoveryError, RecoveryInput, recover,
};
use afterimage_proxy::engine::request::Now;
use afterimage_proxy::engine::{Engine, EngineConfig};
use afterimage_proxy::io::buffer::AlignedBuffer;
use afterimage_proxy::io::sim::{SimStorage, SimWorld};
use afterimage_proxy::io::{Completion, FileId, Storage};
use afterimage_proxy::ship::ring_frames::RingSource;
use std::cell::RefCell;
use std::path::PathBuf;

const BLOCK: u64 = BLOCK_SIZE as u64;
const TEN_YEARS_NS: i64 = 10 * 365 * 86_400 * 1_000_000_000;

thread_local! {
    static WORLD: RefCell<Option<SimWorld>> = const { RefCell::new(None) };
}

/// A file of this thread's world, read beside the engine that has it open.
#[derive(Clone, Debug)]
pub struct WorldFile(pub &'static str);

impl LogSource for WorldFile {
    fn path(&self) -> PathBuf {
        PathBuf::from(self.0)
    }

    fn read(
        &mut self,
        offset: u64,
        mut buffer: AlignedBuffer,
    ) -> Result<(AlignedBuffer, usize), StorageError> {
        let got = WORLD.with_borrow(|world| {
            let world = world.as_ref().expect("a run has a world");
            world.try_read(self.0, offset, &mut buffer)
        });
        match got {
            Ok(got) => Ok((buffer, got)),
            Err(source) => Err(StorageError {
                path: self.path(),
                action: "read",
                offset,
                source,
            }),
        }
    }
}

/// The running life's ring, read beside the engine that stores into it.
#[derive(Clone, Copy, Debug)]
pub struct WorldRing;

impl RingSource for WorldRing {
    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        let there = WORLD.with_borrow(|world| {
            let world = world.as_ref().expect("a run has a world");
            world.read_watched_ring(offset, buffer)
        });
        there
            .then_some(())
            .ok_or_else(|| std::io::ErrorKind::UnexpectedEof.into())
    }
}

/// Shape of a group.
#[derive(Clone, Debug)]
pub struct Geometry {
    /// Blocks of the ring's frame area.
    pub ring_blocks: u64,
    /// Blocks of the log's frame area.
    pub log_blocks: u64,
    /// Bytes of each disk.
    pub disks: Vec<u64>,
    /// Sinks that the superblock knows.
    pub sinks: Vec<SinkId>,
    /// Settings of the engine.
    pub config: EngineConfig,
}

/// One life of the primary's process.
pub struct Life {
    /// Its engine.
    pub engine: Engine<SimStorage>,
    /// Reads its ring.
    pub tap: RingTap,
    /// Last record when it began: durable, in the backings.
    pub began_at: u64,
    /// Its log.
    pub log: LogId,
    completions: Vec<Completion>,
}

/// The host.
pub struct Host {
    /// Disks and memory.
    pub world: SimWorld,
    /// Shape of the group.
    pub geometry: Geometry,
    /// Nanoseconds since it was switched on the first time.
    pub now_ns: u64,
    /// What its wall clock is ahead.
    pub wall_ahead_ns: i64,
    /// An edited backing is accepted.
    pub accepts_edits: bool,
    backings: Vec<String>,
    claims: Vec<String>,
    /// Modification time of each backing.
    mtimes_ns: Vec<u64>,
}

/// Identity of the group.
#[must_use]
pub fn group() -> GroupId {
    GroupId::from_bytes([1; 16])
}

/// Identity of a disk.
#[must_use]
pub fn disk_id(index: usize) -> DiskId {
    DiskId::from_bytes([index as u8 + 16; 16])
}

impl Host {
    /// A host with a new group on empty disks.
    #[must_use]
    pub fn new(seed: u64, geometry: Geometry) -> Self {
        let world = SimWorld::new(seed);
        world.watch_ring();
        WORLD.set(Some(world.clone()));
        let count = geometry.disks.len();
        let backings: Vec<String> = (0..count).map(|disk| format!("disk{disk}")).collect();
        let claims: Vec<String> = (0..count).map(|disk| format!("claim{disk}")).collect();
        for (disk, size) in geometry.disks.iter().enumerate() {
            world.create_file(&backings[disk], *size);
            world.create_file(&claims[disk], 2 * BLOCK);
        }
        let host = Self {
            world,
            geometry,
            now_ns: 1_000_000_000,
            wall_ahead_ns: 1_700_000_000_000_000_000,
            accepts_edits: false,
            backings,
            claims,
            mtimes_ns: vec![0; count],
        };
        host.create_log("log", LogId::from_bytes([2; 16]));
        host
    }

    /// A host of its own in the same state. No process may run.
    #[must_use]
    pub fn fork(&self, seed: u64) -> Self {
        let world = self.world.fork(seed);
        WORLD.set(Some(world.clone()));
        Self {
            world,
            geometry: self.geometry.clone(),
            now_ns: self.now_ns,
            wall_ahead_ns: self.wall_ahead_ns,
            accepts_edits: self.accepts_edits,
            backings: self.backings.clone(),
            claims: self.claims.clone(),
            mtimes_ns: self.mtimes_ns.clone(),
        }
    }

    /// Makes a new log under a name.
    pub fn create_log(&self, name: &str, log: LogId) {
        let size = (self.geometry.log_blocks + 2) * BLOCK;
        self.world.create_file(name, size);
        let disk = |index: usize| DiskState {
            id: disk_id(index),
            size: self.geometry.disks[index],
            removed: false,
        };
        let new = NewLog {
            group: group(),
            log,
            size,
            disks: (0..self.geometry.disks.len()).map(disk).collect(),
            sinks: self.geometry.sinks.clone(),
            boot: BootId::from_bytes(self.world.boot_id()),
            now_ns: 1,
        };
        let bytes = superblock_bytes(&initial_superblock(&new));
        self.world.write(name, 0, &bytes);
    }

    /// The time.
    #[must_use]
    pub fn now(&self) -> Now {
        let wall = i64::try_from(self.now_ns).unwrap_or(i64::MAX) + self.wall_ahead_ns;
        Now {
            monotonic_ns: self.now_ns,
            wall_ns: wall.max(1) as u64,
            boottime_ns: self.now_ns,
        }
    }

    /// The wall clock jumps ten years.
    pub fn jump_clock(&mut self, ahead: bool) {
        self.wall_ahead_ns += if ahead { TEN_YEARS_NS } else { -TEN_YEARS_NS };
    }

    /// What recovery is told.
    #[must_use]
    pub fn input(&self) -> RecoveryInput {
        RecoveryInput {
            names: FileNames {
                log: PathBuf::from("log"),
                next_log: std::path::PathBuf::new(),
                ring: PathBuf::from("ring"),
                backings: self.backings.iter().map(PathBuf::from).collect(),
                claims: Vec::new(),
            },
            group: group(),
            boot: BootId::from_bytes(self.world.boot_id()),
            disks: (0..self.geometry.disks.len())
                .map(|index| ConfiguredDisk {
                    id: disk_id(index),
                    size: self.geometry.disks[index],
                    last_write: LastWrite::at(self.mtimes_ns[index]),
                })
                .collect(),
            sinks: self.geometry.sinks.clone(),
            claims: true,
            accepted: Accepted {
                edited_backing: self.accepts_edits,
                ..Accepted::default()
            },
        }
    }

    /// Somebody writes to a backing past the proxy, durably.
    pub fn edit(&mut self, disk: usize, offset: u64, bytes: &[u8]) {
        self.world.write(&self.backings[disk], offset, bytes);
        self.mtimes_ns[disk] += 1;
    }

    /// Opens everything as a process does that starts.
    #[must_use]
    pub fn open(&self) -> SimStorage {
        if !self.world.has_ring("ring") {
            let len = (self.geometry.ring_blocks as usize + 1) * BLOCK_SIZE;
            self.world.create_ring("ring", len);
        }
        let mut files = vec![(FileId::LOG, "log")];
        for disk in 0..self.backings.len() {
            let index = DiskIndex(disk as u16);
            files.push((FileId::backing(index), self.backings[disk].as_str()));
            files.push((FileId::claim(index), self.claims[disk].as_str()));
        }
        self.world.open(Some("ring"), &files)
    }

    /// Starts the process; with `kill_after` it dies after so many steps. `Ok(None)`: it died
    /// where nothing was waited for.
    ///
    /// # Errors
    /// Recovery refused, or the process died.
    pub fn start(&self, kill_after: Option<u64>) -> Result<Option<Life>, RecoveryError> {
        let mut storage = self.open();
        if let Some(steps) = kill_after {
            self.world.kill_after(steps);
        }
        let recovered = recover(&mut storage, &self.input())?;
        if self.world.is_dead() {
            return Ok(None);
        }
        self.world.kill_after(u64::MAX / 2);
        let start = recovered.into_start();
        Ok(Some(Life {
            tap: RingTap::new(&start),
            began_at: start.next_lsn.0 - 1,
            log: start.superblock.log,
            engine: Engine::start(storage, start, self.geometry.config),
            completions: Vec::new(),
        }))
    }

    /// Leaves the claims clean after a drain, as a process does that ends.
    ///
    /// # Errors
    /// A step failed, or the process died.
    pub fn leave(&self, life: Life) -> Result<(), RecoveryError> {
        // What was to break and has not will not break this.
        self.world.forget_faults();
        let mut storage = life.engine.into_storage();
        let last_write = |disk: DiskIndex| LastWrite::at(self.mtimes_ns[usize::from(disk.0)]);
        leave(&mut storage, &self.input(), Leaving::Clean, &last_write).map(|_| ())
    }

    /// The log's superblock as it can be read now.
    #[must_use]
    pub fn superblock(&self) -> Superblock {
        peek(&mut WorldFile("log")).expect("one copy is whole")
    }

    /// A backing as its readers see it, or as a power cut right now is sure to leave it.
    #[must_use]
    pub fn backing(&self, disk: usize, durable: bool) -> Vec<u8> {
        let len = self.geometry.disks[disk] as usize;
        let name = &self.backings[disk];
        if durable {
            self.world.read_durable(name, 0, len)
        } else {
            self.world.read(name, 0, len)
        }
    }

    /// Name of a disk's backing.
    #[must_use]
    pub fn backing_name(&self, disk: usize) -> &str {
        &self.backings[disk]
    }

    /// Name of a disk's claim.
    #[must_use]
    pub fn claim_name(&self, disk: usize) -> &str {
        &self.claims[disk]
    }
}

impl Life {
    /// Hands the storage's completions to the engine, then lets it do what is due.
    pub fn turn(&mut self, now: Now) {
        let mut completions = std::mem::take(&mut self.completions);
        self.engine.storage_mut().poll(&mut completions);
        for completion in completions.drain(..) {
            self.engine.complete(now, completion);
        }
        self.completions = completions;
        self.engine.tick(now);
    }

    /// The storage, to look at the ring.
    pub fn storage(&mut self) -> &impl Storage {
        self.engine.storage_mut()
    }
}
