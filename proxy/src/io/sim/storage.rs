//! One process life's view of the world: its [`Storage`].

use super::disk::Extents;
use super::{FaultKind, LateWrite, Ring, SHORT, SimWorld, WrongWrite};
use crate::io::buffer::AlignedBuffer;
use crate::io::{Completion, FileId, Operation, RingSpan, Source, Storage, Token};
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

const BLOCK: u64 = afterimage_format::ids::BLOCK_SIZE as u64;

/// Work of an operation that is in flight.
enum Work {
    Read {
        buffer: AlignedBuffer,
    },
    Write {
        source: WriteSource,
        dsync: bool,
        /// Its number, once it has taken effect.
        applied: Option<u64>,
    },
    Sync {
        point: u64,
    },
}

enum WriteSource {
    Owned(AlignedBuffer),
    Ring(Vec<RingSpan>),
    Zero { len: u64, punch: bool },
}

struct Pending {
    token: Token,
    file: String,
    offset: u64,
    work: Work,
}

/// Storage of one simulated process life. Dropping it puts ring memory back into the world, as it
/// was at the kill.
pub struct SimStorage {
    world: SimWorld,
    life: u64,
    boot: u64,
    ring: Option<(String, AlignedBuffer)>,
    /// Runs of ring memory that changed since the last submission, where another process reads it.
    changed: Option<Vec<Range<usize>>>,
    /// Takes the stores of a dead process.
    scratch: Vec<u8>,
    files: BTreeMap<FileId, String>,
    pending: Vec<Pending>,
    failed: Vec<Completion>,
}

impl std::fmt::Debug for SimStorage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "SimStorage(life {}, {} in flight)",
            self.life,
            self.pending.len()
        )
    }
}

impl SimStorage {
    pub(super) fn new(
        world: SimWorld,
        ring: Option<(String, AlignedBuffer)>,
        files: &[(FileId, &str)],
    ) -> Self {
        let (life, boot, watched) = {
            let world = world.world.borrow();
            (world.life, world.boot, world.watched.is_some())
        };
        let changed = match &ring {
            Some((_, memory)) if watched => Some(Vec::from_iter(std::iter::once(0..memory.len()))),
            _ => None,
        };
        Self {
            world,
            life,
            boot,
            ring,
            changed,
            scratch: Vec::new(),
            files: files
                .iter()
                .map(|(file, name)| (*file, (*name).to_owned()))
                .collect(),
            pending: Vec::new(),
            failed: Vec::new(),
        }
    }

    /// Opens one more file of the world in this life.
    pub fn add_file(&mut self, file: FileId, name: &str) {
        self.files.insert(file, name.to_owned());
    }

    fn is_dead(&self) -> bool {
        let world = self.world.world.borrow();
        world.dead || world.life != self.life
    }

    /// One step; false if this life is over.
    fn step(&self) -> bool {
        let mut world = self.world.world.borrow_mut();
        world.life == self.life && world.step()
    }

    fn memory(&self) -> &AlignedBuffer {
        &self.ring.as_ref().expect("opened with a ring").1
    }

    fn memory_mut(&mut self) -> &mut AlignedBuffer {
        &mut self.ring.as_mut().expect("opened with a ring").1
    }

    fn note_change(&mut self, offset: usize, len: usize) {
        if let Some(changed) = &mut self.changed {
            changed.push(offset..offset + len);
        }
    }

    /// Shows other processes what the ring holds now. They see it no later than at a submission, so
    /// before anything of it can be durable in the log.
    fn show_ring(&mut self) {
        let (Some(changed), Some((_, memory))) = (&mut self.changed, &self.ring) else {
            return;
        };
        let mut world = self.world.world.borrow_mut();
        if let Some(seen) = &mut world.watched {
            seen.resize(memory.len(), 0);
            for run in changed.drain(..) {
                seen[run.clone()].copy_from_slice(&memory[run]);
            }
        }
    }

    /// Nobody may change ring memory that an operation in flight reads.
    fn check_not_in_flight(&self, offset: usize, len: usize) {
        let (start, end) = (offset as u64, (offset + len) as u64);
        for pending in &self.pending {
            let Work::Write {
                source: WriteSource::Ring(spans),
                ..
            } = &pending.work
            else {
                continue;
            };
            let hit = spans
                .iter()
                .find(|span| span.offset < end && start < span.offset + u64::from(span.len));
            assert!(
                hit.is_none(),
                "ring bytes {offset}+{len} change under {:?} in flight ({hit:?})",
                pending.token
            );
        }
    }

    fn extents(&self, source: &WriteSource) -> Extents {
        match source {
            WriteSource::Owned(buffer) => Extents::Data(buffer.to_vec()),
            WriteSource::Ring(spans) => {
                let mut bytes = Vec::new();
                for span in spans {
                    let start = span.offset as usize;
                    bytes.extend_from_slice(&self.memory()[start..start + span.len as usize]);
                }
                Extents::Data(bytes)
            }
            WriteSource::Zero { len, punch } => Extents::Zero {
                len: *len,
                punch: *punch,
            },
        }
    }

    /// Lets some writes take effect before their completion.
    fn apply_some(&mut self) {
        for at in 0..self.pending.len() {
            if self.world.world.borrow_mut().rng.chance(3000) {
                self.apply(at);
            }
        }
    }

    fn apply(&mut self, at: usize) {
        let pending = &self.pending[at];
        let Work::Write {
            source,
            applied: None,
            ..
        } = &pending.work
        else {
            return;
        };
        let extents = self.extents(source);
        let number = {
            let mut guard = self.world.world.borrow_mut();
            let world = &mut *guard;
            let whole = pending.offset.is_multiple_of(BLOCK) && extents.len() >= BLOCK;
            let wrong = if whole {
                world.wrong(&pending.file)
            } else {
                None
            };
            let file = world.files.get_mut(&pending.file);
            file.map(|file| match wrong {
                None => file.apply(pending.offset, &extents),
                Some(WrongWrite::Lost) => {
                    world.stats.lost_writes += 1;
                    file.apply(pending.offset, &Extents::Data(Vec::new()))
                }
                Some(WrongWrite::Misdirected(by)) => {
                    world.stats.misdirected_writes += 1;
                    let room = file.len().saturating_sub(extents.len()) + BLOCK;
                    let elsewhere = (pending.offset + by) % room / BLOCK * BLOCK;
                    file.apply(elsewhere, &extents)
                }
            })
        };
        if let Work::Write { applied, .. } = &mut self.pending[at].work {
            *applied = number;
        }
    }

    /// Ends one operation: its effect, or its fault.
    fn complete(&mut self, at: usize) -> Completion {
        let kind = match &self.pending[at].work {
            Work::Read { .. } => FaultKind::Read,
            Work::Write { .. } => FaultKind::Write,
            Work::Sync { .. } => FaultKind::Sync,
        };
        let fault = {
            let mut world = self.world.world.borrow_mut();
            world.fault(&self.pending[at].file, kind)
        };
        if fault.is_none() {
            self.apply(at);
        }
        let pending = self.pending.swap_remove(at);
        let partly = match &pending.work {
            Work::Write {
                source,
                applied: None,
                ..
            } if fault.is_some() => Some(self.extents(source)),
            _ => None,
        };
        let mut guard = self.world.world.borrow_mut();
        let world = &mut *guard;
        world.stats.completed += 1;
        let token = pending.token;
        world.note(&[5, token.0, pending.offset, fault.unwrap_or(0) as u64]);
        let Some(file) = world.files.get_mut(&pending.file) else {
            let result = Err(io::Error::from_raw_os_error(libc::ENOENT));
            return Completion {
                token,
                result,
                buffer: None,
            };
        };
        let error = fault.map(|errno| match errno {
            SHORT => io::ErrorKind::WriteZero.into(),
            errno => io::Error::from_raw_os_error(errno),
        });
        let (result, buffer) = match pending.work {
            Work::Read { mut buffer } => {
                let result = match error {
                    Some(error) => {
                        world.stats.reads_failed += 1;
                        Err(error)
                    }
                    None => {
                        let have = file.read(pending.offset, &mut buffer);
                        world.stats.short_reads += u64::from(have < buffer.len());
                        Ok(have)
                    }
                };
                (result, Some(buffer))
            }
            Work::Write {
                source,
                dsync,
                applied,
            } => {
                let result = match error {
                    Some(error) => {
                        world.stats.writes_failed += 1;
                        world.stats.no_space += u64::from(fault == Some(libc::ENOSPC));
                        world.stats.short_writes += u64::from(fault == Some(SHORT));
                        if let Some(extents) = &partly
                            && fault == Some(SHORT)
                        {
                            file.apply_short(pending.offset, extents, &mut world.rng);
                        } else if let Some(extents) = &partly {
                            file.apply_some(pending.offset, extents, &mut world.rng);
                        }
                        Err(error)
                    }
                    None => {
                        let number = applied.unwrap_or_default();
                        file.completed(number);
                        if dsync {
                            file.sync_write(number);
                        }
                        Ok(match &source {
                            WriteSource::Owned(buffer) => buffer.len(),
                            WriteSource::Ring(spans) => {
                                spans.iter().map(|span| span.len as usize).sum()
                            }
                            WriteSource::Zero { .. } => 0,
                        })
                    }
                };
                let buffer = match source {
                    WriteSource::Owned(buffer) => Some(buffer),
                    _ => None,
                };
                (result, buffer)
            }
            Work::Sync { point } => {
                let result = match error {
                    Some(error) => {
                        world.stats.syncs_failed += 1;
                        file.fail_sync(&mut world.rng);
                        Err(error)
                    }
                    None => {
                        file.sync(point);
                        Ok(0)
                    }
                };
                (result, None)
            }
        };
        Completion {
            token,
            result,
            buffer,
        }
    }

    fn hand_out(&mut self, at_least_one: bool, completions: &mut Vec<Completion>) {
        completions.append(&mut self.failed);
        self.apply_some();
        let mut wanted = {
            let limit = self.pending.len() as u64 + 1;
            self.world.world.borrow_mut().rng.below(limit)
        };
        if at_least_one && completions.is_empty() {
            wanted = wanted.max(1);
        }
        while wanted > 0 && !self.pending.is_empty() {
            if !self.step() {
                return;
            }
            let at = {
                let limit = self.pending.len() as u64;
                self.world.world.borrow_mut().rng.below(limit) as usize
            };
            completions.push(self.complete(at));
            wanted -= 1;
        }
    }

    fn work(&self, operation: Operation) -> (FileId, u64, Work) {
        let write = |source, dsync| Work::Write {
            source,
            dsync,
            applied: None,
        };
        match operation {
            Operation::Read {
                file,
                offset,
                buffer,
            } => (file, offset, Work::Read { buffer }),
            Operation::Write {
                file,
                offset,
                source,
                dsync,
            } => {
                let source = match source {
                    Source::Owned(buffer) => WriteSource::Owned(buffer),
                    Source::Ring(span) => WriteSource::Ring(vec![span]),
                    Source::Gather(spans) => WriteSource::Ring(spans),
                };
                (file, offset, write(source, dsync))
            }
            Operation::Sync { file } => {
                let world = &mut *self.world.world.borrow_mut();
                let name = self.files.get(&file);
                let opened = name.and_then(|name| Some((name, world.files.get_mut(name)?)));
                let point = opened.map_or(0, |(name, file)| {
                    if let Some(at) = world.early.iter().position(|early| early == name) {
                        world.early.remove(at);
                        file.lose_dirty(&mut world.rng);
                    }
                    file.sync_point()
                });
                (file, 0, Work::Sync { point })
            }
            Operation::PunchHole { file, offset, len } => (
                file,
                offset,
                write(WriteSource::Zero { len, punch: true }, false),
            ),
            Operation::WriteZeroes { file, offset, len } => (
                file,
                offset,
                write(WriteSource::Zero { len, punch: false }, false),
            ),
        }
    }
}

impl Storage for SimStorage {
    fn submit(&mut self, token: Token, operation: Operation) {
        if !self.step() {
            return;
        }
        self.show_ring();
        let (file, offset, work) = self.work(operation);
        {
            let mut world = self.world.world.borrow_mut();
            world.stats.submitted += 1;
            world.note(&[6, token.0, u64::from(file.0), offset]);
        }
        if let Some(name) = self.files.get(&file) {
            self.pending.push(Pending {
                token,
                file: name.clone(),
                offset,
                work,
            });
        } else {
            let buffer = match work {
                Work::Read { buffer } => Some(buffer),
                _ => None,
            };
            let result = Err(io::Error::from_raw_os_error(libc::EBADF));
            self.failed.push(Completion {
                token,
                result,
                buffer,
            });
        }
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) {
        if !self.is_dead() {
            self.hand_out(false, completions);
        }
    }

    fn wait(&mut self, completions: &mut Vec<Completion>) -> io::Result<()> {
        let before = completions.len();
        if !self.is_dead() {
            self.hand_out(true, completions);
        }
        if completions.len() > before {
            return Ok(());
        }
        Err(io::Error::other(if self.is_dead() {
            "the simulated process was killed"
        } else {
            "waited for completions with nothing in flight"
        }))
    }

    fn file_len(&mut self, file: FileId) -> io::Result<u64> {
        match self.files.get(&file) {
            Some(name) => Ok(self.world.file_len(name)),
            None => Err(io::Error::from_raw_os_error(libc::EBADF)),
        }
    }

    fn allocated(
        &mut self,
        file: FileId,
        offset: u64,
        len: u64,
        runs_max: usize,
    ) -> io::Result<Vec<Range<u64>>> {
        let world = self.world.world.borrow();
        let opened = self.files.get(&file).and_then(|name| world.files.get(name));
        match opened {
            Some(file) => Ok(file.allocated(offset, len, runs_max)),
            None => Err(io::Error::from_raw_os_error(libc::EBADF)),
        }
    }

    fn ring_len(&self) -> usize {
        self.ring.as_ref().map_or(0, |(_, memory)| memory.len())
    }

    fn ring(&self, offset: usize, len: usize) -> &[u8] {
        &self.memory()[offset..offset + len]
    }

    fn ring_write(&mut self, offset: usize, bytes: &[u8]) {
        if self.is_dead() {
            return;
        }
        self.check_not_in_flight(offset, bytes.len());
        let mut len = bytes.len();
        if !self.step() {
            // Killed within the store: a prefix of it is done.
            let mut world = self.world.world.borrow_mut();
            world.stats.cut_stores += 1;
            len = world.rng.below(len as u64 + 1) as usize;
        }
        self.memory_mut()[offset..offset + len].copy_from_slice(&bytes[..len]);
        self.note_change(offset, len);
    }

    fn ring_mut(&mut self, offset: usize, len: usize) -> &mut [u8] {
        self.check_not_in_flight(offset, len);
        if self.step() {
            self.note_change(offset, len);
            return &mut self.memory_mut()[offset..offset + len];
        }
        self.scratch = self.memory()[offset..offset + len].to_vec();
        &mut self.scratch
    }

    fn ring_store(&mut self, offset: usize, value: u64) {
        assert!(offset.is_multiple_of(8), "word at {offset} is not aligned");
        self.check_not_in_flight(offset, 8);
        if self.step() {
            self.memory_mut()[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
            self.note_change(offset, 8);
        }
    }

    fn ring_load(&self, offset: usize) -> u64 {
        let mut word = [0; 8];
        word.copy_from_slice(&self.memory()[offset..offset + 8]);
        u64::from_le_bytes(word)
    }
}

impl Drop for SimStorage {
    fn drop(&mut self) {
        // What is in flight lands later, with what ring memory holds now.
        let late: Vec<LateWrite> = std::mem::take(&mut self.pending)
            .into_iter()
            .filter_map(|pending| match &pending.work {
                Work::Write {
                    source,
                    applied: None,
                    ..
                } => Some(LateWrite {
                    file: pending.file.clone(),
                    offset: pending.offset,
                    extents: self.extents(source),
                }),
                _ => None,
            })
            .collect();
        let mut guard = self.world.world.borrow_mut();
        let world = &mut *guard;
        if world.boot == self.boot {
            world.late.extend(late);
            if let Some((name, memory)) = self.ring.take() {
                world.rings.insert(name, Ring(memory));
            }
        } else if world.life == self.life {
            // The power went while these were in flight.
            for write in late {
                if let Some(file) = world.files.get_mut(&write.file) {
                    file.apply_some(write.offset, &write.extents, &mut world.rng);
                    file.power_cut(&mut world.rng, &mut world.stats);
                }
            }
        }
    }
}
