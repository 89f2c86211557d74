//! The simulated twin of [`super::storage::UringStorage`]: one seed gives one run.
//!
//! A [`SimWorld`] holds files and ring memory by name across the lives of processes. It is harsh:
//! operations take effect and complete in a seeded order; a sync makes durable only what had
//! completed when it was submitted; a failed sync forgets part of what was dirty for good; at a
//! power cut each sector that was not synced is kept (in any of its versions), lost or torn, each on
//! its own; at a kill what was submitted may still land, and a store to the ring may be cut short.
//!
//! Not simulated: time, and the taking of locks. With [`LateWrites::BeforeSuccessor`] (what the
//! locks on the descriptions guarantee) late writes land before the next life opens the files.

mod disk;
mod rng;
mod storage;
#[cfg(test)]
mod tests;

pub use rng::SimRng;
pub use storage::SimStorage;

use super::FileId;
use super::buffer::AlignedBuffer;
use disk::{Extents, SimFile};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// When the writes of a killed process land.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LateWrites {
    /// Before the next life opens the files: the locks work.
    #[default]
    BeforeSuccessor,
    /// At any later step, also in the middle of the next life: what the locks protect from.
    AnyTime,
}

/// Chances of faults, out of 10,000 operations of the kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultRates {
    /// A read fails with EIO.
    pub read_eio: u32,
    /// A write or zeroing fails with EIO; some of its sectors may have been written.
    pub write_eio: u32,
    /// A write or zeroing fails with ENOSPC.
    pub write_nospace: u32,
    /// A sync fails with EIO and forgets part of what was dirty.
    pub sync_eio: u32,
}

/// Kinds of operations, for faults that are asked for one by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FaultKind {
    /// Reads.
    Read,
    /// Writes and zeroings.
    Write,
    /// Syncs.
    Sync,
}

/// In the place of an errno: the transfer ends short, at a length of zero as a rule, and gets no
/// further. What the kernel's storage makes of that is an error without an errno.
pub const SHORT: i32 = -1;

/// How a write that says it succeeded goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WrongWrite {
    /// Nothing of it reaches the file.
    Lost,
    /// All of it lands so many bytes further on (wrapping around at the file's end).
    Misdirected(u64),
}

/// What happened so far. A test that wants a fault should see its counter move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SimStats {
    /// Processes killed.
    pub kills: u64,
    /// Power cuts.
    pub power_cuts: u64,
    /// Ring stores of which a part only was done.
    pub cut_stores: u64,
    /// Operations submitted.
    pub submitted: u64,
    /// Completions handed out.
    pub completed: u64,
    /// Reads that failed.
    pub reads_failed: u64,
    /// Writes and zeroings that failed.
    pub writes_failed: u64,
    /// Of those, with ENOSPC.
    pub no_space: u64,
    /// Syncs that failed.
    pub syncs_failed: u64,
    /// Reads that ended at the end of a file.
    pub short_reads: u64,
    /// Writes of a killed process that landed after its death.
    pub late_writes: u64,
    /// Writes of a killed process that never landed, or in part.
    pub late_writes_lost: u64,
    /// Sectors kept by a power cut though never synced.
    pub sectors_kept: u64,
    /// Sectors lost by a power cut.
    pub sectors_lost: u64,
    /// Sectors torn by a power cut.
    pub sectors_torn: u64,
    /// Bits flipped at rest.
    pub bits_flipped: u64,
    /// Writes and zeroings of which only a beginning was done (of `writes_failed`).
    pub short_writes: u64,
    /// Writes that said they succeeded and did nothing.
    pub lost_writes: u64,
    /// Writes that said they succeeded and went elsewhere.
    pub misdirected_writes: u64,
}

/// A fault that took place: an operation of this kind on this file failed so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FaultTaken {
    /// The file's name.
    pub file: String,
    /// The operation.
    pub kind: FaultKind,
    /// The errno, or [`SHORT`].
    pub errno: i32,
}

/// A write of a killed process that has not landed.
#[derive(Clone)]
struct LateWrite {
    file: String,
    offset: u64,
    extents: Extents,
}

/// Ring memory at rest.
struct Ring(AlignedBuffer);

impl Clone for Ring {
    fn clone(&self) -> Self {
        let mut copy = AlignedBuffer::new(self.0.len());
        copy.copy_from_slice(&self.0);
        Self(copy)
    }
}

#[derive(Clone)]
struct World {
    rng: SimRng,
    files: BTreeMap<String, SimFile>,
    /// Ring memory that no life has open.
    rings: BTreeMap<String, Ring>,
    /// The ring of the running life as other processes see it, if some do.
    watched: Option<Vec<u8>>,
    /// Changes at each power cut: memory taken out before it is not put back.
    boot: u64,
    /// Changes at each opening: an earlier life is dead for good.
    life: u64,
    dead: bool,
    steps: u64,
    kill_at: Option<u64>,
    late_mode: LateWrites,
    late: Vec<LateWrite>,
    rates: FaultRates,
    once: Vec<(String, FaultKind, i32)>,
    wrong: Vec<(String, WrongWrite)>,
    /// Files whose next failing sync loses at its submission what it loses.
    early: Vec<String>,
    taken: Vec<FaultTaken>,
    stats: SimStats,
    trace: u64,
}

/// Files and rings by name, across the lives of simulated processes. Clones share one world.
#[derive(Clone)]
pub struct SimWorld {
    world: Rc<RefCell<World>>,
}

impl std::fmt::Debug for SimWorld {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let world = self.world.borrow();
        write!(f, "SimWorld(step {}, {:?})", world.steps, world.stats)
    }
}

impl SimWorld {
    /// An empty world whose every choice follows from the seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let world = World {
            rng: SimRng::new(seed),
            files: BTreeMap::new(),
            rings: BTreeMap::new(),
            watched: None,
            boot: 1,
            life: 0,
            dead: false,
            steps: 0,
            kill_at: None,
            late_mode: LateWrites::default(),
            late: Vec::new(),
            rates: FaultRates::default(),
            once: Vec::new(),
            wrong: Vec::new(),
            early: Vec::new(),
            taken: Vec::new(),
            stats: SimStats::default(),
            trace: 0xcbf2_9ce4_8422_2325,
        };
        Self {
            world: Rc::new(RefCell::new(world)),
        }
    }

    /// Creates a file of zeroes, durable at once; replaces one of that name.
    pub fn create_file(&self, name: &str, len: u64) {
        let file = SimFile::new(len);
        self.world.borrow_mut().files.insert(name.to_owned(), file);
    }

    /// Creates ring memory of zeroes; replaces one of that name.
    pub fn create_ring(&self, name: &str, len: usize) {
        let memory = Ring(AlignedBuffer::new(len));
        self.world
            .borrow_mut()
            .rings
            .insert(name.to_owned(), memory);
    }

    /// Whether the ring memory exists, that is, no power cut took it.
    #[must_use]
    pub fn has_ring(&self, name: &str) -> bool {
        self.world.borrow().rings.contains_key(name)
    }

    /// Whether the file exists.
    #[must_use]
    pub fn has_file(&self, name: &str) -> bool {
        self.world.borrow().files.contains_key(name)
    }

    /// Removes ring memory, as a clean stop does.
    pub fn remove_ring(&self, name: &str) {
        self.world.borrow_mut().rings.remove(name);
    }

    /// Gives a file another name, durable at once; replaces one of that name.
    pub fn rename_file(&self, from: &str, to: &str) {
        let mut world = self.world.borrow_mut();
        if let Some(file) = world.files.remove(from) {
            world.files.insert(to.to_owned(), file);
        }
    }

    /// Begins a process life with these files and, if named, this ring. An earlier life that still
    /// runs is killed. Panics if something named does not exist: creating is the test's business.
    #[must_use]
    pub fn open(&self, ring: Option<&str>, files: &[(FileId, &str)]) -> SimStorage {
        let memory = {
            let mut world = self.world.borrow_mut();
            world.begin_life();
            for (_, name) in files {
                assert!(world.files.contains_key(*name), "no file {name}");
            }
            ring.map(|name| {
                let memory = world.rings.remove(name);
                let memory = memory.unwrap_or_else(|| panic!("no ring {name}, or it is open"));
                (name.to_owned(), memory.0)
            })
        };
        SimStorage::new(self.clone(), memory, files)
    }

    /// Kills the running process after so many more steps: ring stores, submissions, hand-outs.
    pub fn kill_after(&self, steps: u64) {
        let mut world = self.world.borrow_mut();
        world.kill_at = Some(world.steps + steps);
    }

    /// Kills the running process now.
    pub fn kill(&self) {
        self.world.borrow_mut().die();
    }

    /// Whether the running process was killed. Its stores and submissions no longer do anything.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.world.borrow().dead
    }

    /// Steps so far; for choosing kill points of a second run with the same seed.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.world.borrow().steps
    }

    /// Cuts the power: the process dies, rings are gone, unsynced sectors are kept, lost or torn.
    /// Drop the life's storage before or after; its memory does not come back either way.
    pub fn power_cut(&self) {
        self.world.borrow_mut().power_cut();
    }

    /// Changes with every power cut; use it as the boot id.
    #[must_use]
    pub fn boot_id(&self) -> [u8; 16] {
        let boot = u128::from(self.world.borrow().boot);
        (boot << 64 | 0xb007).to_le_bytes()
    }

    /// When writes of killed processes land.
    pub fn set_late_writes(&self, mode: LateWrites) {
        self.world.borrow_mut().late_mode = mode;
    }

    /// Random faults from now on.
    pub fn set_fault_rates(&self, rates: FaultRates) {
        self.world.borrow_mut().rates = rates;
    }

    /// The next operation of the kind on the file fails with this errno.
    pub fn fail_once(&self, name: &str, kind: FaultKind, errno: i32) {
        let fault = (name.to_owned(), kind, errno);
        self.world.borrow_mut().once.push(fault);
    }

    /// The next sync of the file fails, and readers see what it loses from its submission on.
    pub fn fail_sync_early(&self, name: &str) {
        self.fail_once(name, FaultKind::Sync, libc::EIO);
        self.world.borrow_mut().early.push(name.to_owned());
    }

    /// The next write of whole blocks to the file says that it succeeded, and did not.
    pub fn wrong_once(&self, name: &str, wrong: WrongWrite) {
        self.world.borrow_mut().wrong.push((name.to_owned(), wrong));
    }

    /// Faults that were asked for and have not happened never will.
    pub fn forget_faults(&self) {
        let mut world = self.world.borrow_mut();
        world.once.clear();
        world.wrong.clear();
        world.early.clear();
    }

    /// A world of its own with the same content and past, whose further choices follow from the
    /// seed. No life may be open.
    #[must_use]
    pub fn fork(&self, seed: u64) -> Self {
        let mut world = self.world.borrow().clone();
        world.rng = SimRng::new(seed);
        Self {
            world: Rc::new(RefCell::new(world)),
        }
    }

    /// Sectors that a power cut may keep or lose, with the number of versions each may have beside
    /// the durable one, in the order in which [`SimWorld::power_cut_choosing`] asks.
    #[must_use]
    pub fn unsynced(&self) -> Vec<(String, u64, usize)> {
        let world = self.world.borrow();
        let files = world.files.iter();
        files
            .flat_map(|(name, file)| {
                let dirty = file.unsynced();
                dirty.map(move |(sector, versions)| (name.clone(), sector, versions))
            })
            .collect()
    }

    /// Writes of killed processes that have not landed.
    #[must_use]
    pub fn late_writes(&self) -> usize {
        self.world.borrow().late.len()
    }

    /// Writes of killed processes land now, each of them whole.
    pub fn land_late_writes(&self) {
        let mut world = self.world.borrow_mut();
        for late in std::mem::take(&mut world.late) {
            world.stats.late_writes += 1;
            if let Some(file) = world.files.get_mut(&late.file) {
                file.apply(late.offset, &late.extents);
            }
        }
    }

    /// As [`SimWorld::power_cut`], but what becomes of each unsynced sector is chosen: 0 for lost,
    /// n for its n-th version. Late writes of killed processes are lost.
    pub fn power_cut_choosing(&self, choose: &mut dyn FnMut() -> usize) {
        let mut world = self.world.borrow_mut();
        world.begin_power_cut();
        world.late.clear();
        for file in world.files.values_mut() {
            file.power_cut_choosing(choose);
        }
    }

    /// Bytes of a file as another reader beside the running process gets them; read faults apply.
    ///
    /// # Errors
    /// A read fault is due.
    pub fn try_read(&self, name: &str, offset: u64, into: &mut [u8]) -> std::io::Result<usize> {
        let mut world = self.world.borrow_mut();
        if let Some(errno) = world.fault(name, FaultKind::Read) {
            world.stats.reads_failed += 1;
            return Err(std::io::Error::from_raw_os_error(errno));
        }
        let file = world.files.get(name);
        Ok(file.map_or(0, |file| file.read(offset, into)))
    }

    /// Lets other processes read the ring of the lives that begin from now on. One ring at a time.
    pub fn watch_ring(&self) {
        self.world.borrow_mut().watched.get_or_insert_default();
    }

    /// Bytes of the running life's ring as another process gets them. False where there are none.
    #[must_use]
    pub fn read_watched_ring(&self, offset: u64, into: &mut [u8]) -> bool {
        let world = self.world.borrow();
        let end = offset as usize + into.len();
        let ring = world.watched.as_ref();
        let Some(bytes) = ring.and_then(|ring| ring.get(offset as usize..end)) else {
            return false;
        };
        into.copy_from_slice(bytes);
        true
    }

    /// Flips one bit of a file at rest. Panics outside the file.
    pub fn flip_bit(&self, name: &str, offset: u64, bit: u8) {
        let mut world = self.world.borrow_mut();
        world.stats.bits_flipped += 1;
        world.note(&[7, offset, u64::from(bit)]);
        let file = world.files.get_mut(name);
        file.unwrap_or_else(|| panic!("no file {name}"))
            .flip(offset, bit);
    }

    /// Flips one bit of ring memory that no life has open. Panics if there is none.
    pub fn flip_ring_bit(&self, name: &str, offset: usize, bit: u8) {
        let mut world = self.world.borrow_mut();
        world.stats.bits_flipped += 1;
        world.note(&[8, offset as u64, u64::from(bit)]);
        let ring = world.rings.get_mut(name);
        ring.unwrap_or_else(|| panic!("no ring {name}")).0[offset] ^= 1 << bit;
    }

    /// Cuts a file to a length at rest, or grows it with zeroes.
    pub fn set_len(&self, name: &str, len: u64) {
        let mut world = self.world.borrow_mut();
        let file = world.files.get_mut(name);
        file.unwrap_or_else(|| panic!("no file {name}"))
            .set_len(len);
    }

    /// Length of a file.
    #[must_use]
    pub fn file_len(&self, name: &str) -> u64 {
        self.world.borrow().files.get(name).map_or(0, SimFile::len)
    }

    /// Bytes of a file as a reader sees them now. Zeroes past its end.
    #[must_use]
    pub fn read(&self, name: &str, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        if let Some(file) = self.world.borrow().files.get(name) {
            file.read(offset, &mut bytes);
        }
        bytes
    }

    /// Bytes of a file that a power cut right now is sure to keep, whatever the seed says about
    /// the sectors that were not synced.
    #[must_use]
    pub fn read_durable(&self, name: &str, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        if let Some(file) = self.world.borrow().files.get(name) {
            file.read_durable(offset, &mut bytes);
        }
        bytes
    }

    /// Writes a file behind everybody's back, durable at once.
    pub fn write(&self, name: &str, offset: u64, bytes: &[u8]) {
        let mut world = self.world.borrow_mut();
        let file = world.files.get_mut(name);
        file.unwrap_or_else(|| panic!("no file {name}"))
            .write_durable(offset, bytes);
    }

    /// Counters so far.
    #[must_use]
    pub fn stats(&self) -> SimStats {
        self.world.borrow().stats
    }

    /// The faults that took place, oldest first: one that was asked for and met no operation is
    /// not among them.
    #[must_use]
    pub fn faults_taken(&self) -> Vec<FaultTaken> {
        self.world.borrow().taken.clone()
    }

    /// How many faults took place, writes included that said they succeeded and did not.
    #[must_use]
    pub fn faults_taken_count(&self) -> u64 {
        let world = self.world.borrow();
        world.taken.len() as u64 + world.stats.lost_writes + world.stats.misdirected_writes
    }

    /// Hash of everything that happened, in order: equal for equal seeds and equal users.
    #[must_use]
    pub fn trace(&self) -> u64 {
        self.world.borrow().trace
    }
}

impl World {
    /// Mixes an event into the trace (FNV-1a over words).
    fn note(&mut self, words: &[u64]) {
        for word in words {
            self.trace = (self.trace ^ word).wrapping_mul(0x0100_0000_01b3);
        }
    }

    /// One more step of the running process. False: it is dead, by now or before.
    fn step(&mut self) -> bool {
        if self.dead {
            return false;
        }
        self.steps += 1;
        if self.late_mode == LateWrites::AnyTime && self.rng.chance(1000) {
            self.land_one();
        }
        if self.kill_at.is_some_and(|at| self.steps >= at) {
            self.die();
        }
        !self.dead
    }

    fn die(&mut self) {
        if !self.dead && self.life > 0 {
            self.dead = true;
            self.kill_at = None;
            self.stats.kills += 1;
            self.note(&[1, self.steps]);
        }
    }

    fn begin_life(&mut self) {
        if self.late_mode == LateWrites::BeforeSuccessor {
            while !self.late.is_empty() {
                self.land_one();
            }
        }
        self.life += 1;
        self.dead = false;
        self.kill_at = None;
        self.note(&[2, self.life]);
    }

    /// One late write lands whole, in part, or never.
    fn land_one(&mut self) {
        if self.late.is_empty() {
            return;
        }
        let at = self.rng.below(self.late.len() as u64) as usize;
        let late = self.late.swap_remove(at);
        let outcome = self.rng.below(4);
        self.note(&[3, late.offset, outcome]);
        let Some(file) = self.files.get_mut(&late.file) else {
            return;
        };
        match outcome {
            0 => self.stats.late_writes_lost += 1,
            1 => {
                file.apply_some(late.offset, &late.extents, &mut self.rng);
                self.stats.late_writes_lost += 1;
            }
            _ => {
                file.apply(late.offset, &late.extents);
                self.stats.late_writes += 1;
            }
        }
    }

    fn begin_power_cut(&mut self) {
        self.dead = true;
        self.kill_at = None;
        self.boot += 1;
        self.stats.power_cuts += 1;
        self.note(&[4, self.boot]);
        self.rings.clear();
    }

    fn power_cut(&mut self) {
        self.begin_power_cut();
        for late in std::mem::take(&mut self.late) {
            if let Some(file) = self.files.get_mut(&late.file) {
                file.apply_some(late.offset, &late.extents, &mut self.rng);
            }
        }
        for file in self.files.values_mut() {
            file.power_cut(&mut self.rng, &mut self.stats);
        }
    }

    /// How the next write to this file goes wrong, if it is to.
    fn wrong(&mut self, name: &str) -> Option<WrongWrite> {
        let at = self.wrong.iter().position(|(file, _)| file == name)?;
        Some(self.wrong.remove(at).1)
    }

    /// Whether an operation of this kind on this file fails now, and how.
    fn fault(&mut self, name: &str, kind: FaultKind) -> Option<i32> {
        let errno = self.draw_fault(name, kind)?;
        self.taken.push(FaultTaken {
            file: name.to_owned(),
            kind,
            errno,
        });
        Some(errno)
    }

    fn draw_fault(&mut self, name: &str, kind: FaultKind) -> Option<i32> {
        let asked = self
            .once
            .iter()
            .position(|(file, what, _)| file == name && *what == kind);
        if let Some(at) = asked {
            return Some(self.once.remove(at).2);
        }
        let (eio, nospace) = match kind {
            FaultKind::Read => (self.rates.read_eio, 0),
            FaultKind::Write => (self.rates.write_eio, self.rates.write_nospace),
            FaultKind::Sync => (self.rates.sync_eio, 0),
        };
        if eio > 0 && self.rng.chance(eio) {
            return Some(libc::EIO);
        }
        (nospace > 0 && self.rng.chance(nospace)).then_some(libc::ENOSPC)
    }
}
