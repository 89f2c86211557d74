//! The claims beside the backings: does this backing belong to this log, and is it as we left it?
//!
//! | case | claim | judgement |
//! | --- | --- | --- |
//! | C1 new | none; the log was never started, or the disk is new to it | claim it |
//! | C2 gone | none, though the log was in use | refuse; accepted: everything is shipped anew |
//! | C3 foreign | another group's or disk's | refuse |
//! | C4 other log | ours, but another log's | refuse |
//! | C5 attached | ours, attached | go on (an unclean stop: a verify is due) |
//! | C6 clean | ours, clean, fingerprint as stored | go on |
//! | C7 edited | ours, clean, fingerprint differs, or the same device was written since | refuse; accepted: everything is shipped anew |
//! | C11 untold | ours, clean, fingerprint as stored; a block device that was restarted, or of which nothing was counted | go on, a verify is due |
//! | C8 detached | ours, detached | the log is done: refuse, a new log is needed |
//! | C9 abandoned | ours, abandoned after the log failed | as C8; what the ring holds is brought into the backings first ([`super::abandoned`]) |
//! | C10 free | detached or abandoned by any log; this log was never started | claim it |
//!
//! Owns the claim files. An update alternates between the two copies and is durable before what it
//! permits is done: *attached* before the first byte of the backing changes, *clean* and *detached*
//! after the backing was synced.

use super::{LastWrite, RecoveryError, RecoveryInput, abandoned};
use crate::engine::blocking::{Blocking, StorageError};
use crate::engine::log::error::LogError;
use crate::engine::log::superblock;
use crate::io::buffer::AlignedBuffer;
use crate::io::{FileId, Storage};
use afterimage_format::claim::{CLAIM_FILE_BYTES, Claim, ClaimError, ClaimState, Fingerprint};
use afterimage_format::ids::{BLOCK_SIZE, DiskId, DiskIndex, GroupId, LogId};
use afterimage_format::superblock::Superblock;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// Why a claim forbids to go on. `path` is the claim's file.
#[derive(Debug, thiserror::Error)]
pub enum ClaimRefusal {
    /// C2.
    #[error("{}: missing, though the log was in use with this backing; put it back, or accept the backing as it is (--accept-edited): everything is then sent to the replicas anew", path.display())]
    Gone {
        /// The claim.
        path: PathBuf,
    },
    /// C3.
    #[error("{}: the backing belongs to disk {disk} of group {group}; detach it there first", path.display())]
    Foreign {
        /// The claim.
        path: PathBuf,
        /// Whose it is.
        group: GroupId,
        /// Which disk.
        disk: DiskId,
    },
    /// C4.
    #[error("{}: the backing belongs to log {found} at {}, not to {wanted}; start the group with that log, or run `afterimage recover --to-plain` with it", path.display(), log_path.display())]
    OtherLog {
        /// The claim.
        path: PathBuf,
        /// The log it names.
        found: LogId,
        /// Where that is.
        log_path: PathBuf,
        /// The log that was opened.
        wanted: LogId,
    },
    /// C7.
    #[error("{}: the backing was changed since the group was stopped; put it back, or accept it as it is (--accept-edited): everything is then sent to the replicas anew", path.display())]
    Edited {
        /// The claim.
        path: PathBuf,
    },
    /// C8 and C9.
    #[error("{}: log {log} is done with this backing ({how}) and must not be replayed; the disk is complete as it is; move the old log away, the group then starts with a new one", path.display())]
    Done {
        /// The claim.
        path: PathBuf,
        /// The log.
        log: LogId,
        /// How it ended.
        how: &'static str,
    },
    /// Cannot be read.
    #[error("{}: not a valid claim: {source}", path.display())]
    Invalid {
        /// The claim.
        path: PathBuf,
        /// Why.
        source: ClaimError,
    },
}

/// What a group is started for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To be served.
    Serve,
    /// To become plain disks: a claim that says detached already is as good as done.
    ToPlain,
}

/// What the claims say.
#[derive(Debug)]
pub(super) struct Verdict {
    /// A verify is due.
    pub(super) verify_due: bool,
    /// Nothing that sinks have can be relied on.
    pub(super) resend: bool,
    claims: Vec<(DiskIndex, DiskId, Option<Claim>)>,
}

/// The claim of a configured disk.
pub(super) struct Found {
    /// The disk's place in the superblock's table.
    pub(super) index: DiskIndex,
    path: PathBuf,
    pub(super) claim: Option<Claim>,
}

/// The index that each configured disk has, or will be given, in the superblock's table.
#[must_use]
pub fn disk_slots(superblock: &Superblock, disks: &[DiskId]) -> Vec<DiskIndex> {
    let mut next = superblock.disks.len();
    let slot = |id: &DiskId| {
        let known = superblock.disks.iter().position(|disk| disk.id == *id);
        let index = known.unwrap_or_else(|| {
            next += 1;
            next - 1
        });
        DiskIndex(index as u16)
    };
    disks.iter().map(slot).collect()
}

/// Reads the claim of a disk. `None`: there is none, or its creation was cut short.
///
/// # Errors
/// The file cannot be read; inner: what is there is no valid claim.
pub fn read_claim<S: Storage>(
    blocking: &mut Blocking<'_, S>,
    disk: DiskIndex,
) -> Result<Result<Option<Claim>, ClaimError>, StorageError> {
    let buffer = AlignedBuffer::new(CLAIM_FILE_BYTES);
    let (mut buffer, got) = blocking.read(FileId::claim(disk), 0, buffer)?;
    buffer[got..].fill(0);
    if buffer.iter().all(|byte| *byte == 0) {
        return Ok(Ok(None));
    }
    Ok(Claim::decode_file(&buffer).map(Some))
}

/// Stores the claim that comes after `found`, over the older copy, and makes it durable.
///
/// # Errors
/// The file cannot be written or synced.
pub fn store_claim<S: Storage>(
    blocking: &mut Blocking<'_, S>,
    found: Option<&Claim>,
    claim: &mut Claim,
) -> Result<(), StorageError> {
    let file = FileId::claim(claim.disk_index);
    claim.generation = 1;
    if let Some(found) = found {
        // It may come from a start that was killed before its sync, or whose sync failed: that it
        // can be read does not make it durable, and the copy before it is overwritten now.
        blocking.write_bytes(file, copy_offset(found), &found.encode())?;
        blocking.sync(file)?;
        claim.generation = found.generation + 1;
    }
    blocking.write_bytes(file, copy_offset(claim), &claim.encode())?;
    blocking.sync(file)
}

fn copy_offset(claim: &Claim) -> u64 {
    claim.generation % 2 * BLOCK_SIZE as u64
}

/// Judges the claims of all disks by the table above.
pub(super) fn judge<S: Storage>(
    blocking: &mut Blocking<'_, S>,
    superblock: &Superblock,
    input: &RecoveryInput,
    purpose: Purpose,
) -> Result<Verdict, RecoveryError> {
    let mut verdict = Verdict {
        verify_due: false,
        resend: false,
        claims: Vec::new(),
    };
    if !input.claims {
        return Ok(verdict);
    }
    let ids: Vec<DiskId> = input.disks.iter().map(|disk| disk.id).collect();
    let mut found = Vec::new();
    for index in disk_slots(superblock, &ids) {
        let path = blocking.names().of(FileId::claim(index));
        let claim = read_claim(blocking, index)?.map_err(|source| ClaimRefusal::Invalid {
            path: path.clone(),
            source,
        })?;
        found.push(Found { index, path, claim });
    }
    let half_abandoned = abandoned::settle(blocking, superblock, input, &mut found)?;
    for (Found { index, path, claim }, disk) in found.into_iter().zip(&input.disks) {
        let known = superblock.disks.iter().any(|known| known.id == disk.id);
        let unused = superblock.incarnation == 0 || !known;
        let accepted = match &claim {
            None if unused => false,
            None if input.accepted.edited_backing => true,
            None => return Err(ClaimRefusal::Gone { path }.into()),
            Some(claim) => {
                let is_next = claim.next_log == Some(superblock.log);
                let ours = claim.log == superblock.log || is_next;
                // It has just taken the place of a log that failed.
                verdict.verify_due |= is_next;
                match claim.state {
                    ClaimState::Detached(_) if purpose == Purpose::ToPlain && ours => false,
                    ClaimState::Detached(_) | ClaimState::Abandoned if unused && !ours => {
                        verdict.verify_due |= claim.state == ClaimState::Abandoned;
                        false
                    }
                    _ if claim.group != input.group || claim.disk != disk.id => {
                        let (group, disk) = (claim.group, claim.disk);
                        return Err(ClaimRefusal::Foreign { path, group, disk }.into());
                    }
                    _ if !ours => {
                        return Err(other_log(path, claim, superblock).into());
                    }
                    ClaimState::Attached => false,
                    ClaimState::Abandoned if half_abandoned => false,
                    ClaimState::Clean(stored) => {
                        let now = fingerprint(blocking, index, disk.size, disk.last_write)?;
                        let since = compare(&stored, &now);
                        if since == Since::Edited && !input.accepted.edited_backing {
                            return Err(ClaimRefusal::Edited { path }.into());
                        }
                        verdict.verify_due |= since == Since::Untold;
                        since == Since::Edited
                    }
                    ClaimState::Detached(_) | ClaimState::Abandoned => {
                        let how = match claim.state {
                            ClaimState::Abandoned => "it failed and the disk went on without it",
                            _ => "the disk was detached",
                        };
                        let log = claim.log;
                        return Err(ClaimRefusal::Done { path, log, how }.into());
                    }
                }
            }
        };
        verdict.resend |= accepted;
        verdict.verify_due |= accepted;
        verdict.claims.push((index, disk.id, claim));
    }
    Ok(verdict)
}

impl Verdict {
    /// Makes every claim say that this log belongs to the backing and may hold newer content.
    pub(super) fn mark_attached<S: Storage>(
        &mut self,
        blocking: &mut Blocking<'_, S>,
        superblock: &Superblock,
    ) -> Result<(), StorageError> {
        self.store_all(blocking, superblock.group, |claim| {
            claim.log = superblock.log;
            claim.next_log = None;
            claim.state = ClaimState::Attached;
        })
    }

    /// Makes every claim name the log that is about to take the place of the present one.
    pub(super) fn mark_next<S: Storage>(
        &mut self,
        blocking: &mut Blocking<'_, S>,
        superblock: &Superblock,
        next: LogId,
    ) -> Result<(), StorageError> {
        self.store_all(blocking, superblock.group, |claim| {
            claim.log = superblock.log;
            claim.next_log = Some(next);
            claim.state = ClaimState::Attached;
        })
    }

    fn store_all<S: Storage>(
        &mut self,
        blocking: &mut Blocking<'_, S>,
        group: GroupId,
        change: impl Fn(&mut Claim),
    ) -> Result<(), StorageError> {
        for (index, disk, found) in &mut self.claims {
            let log_path = blocking.names().log.as_os_str().as_bytes().to_vec();
            let mut claim = Claim {
                group,
                disk: *disk,
                disk_index: *index,
                log: LogId::from_bytes([0; 16]),
                next_log: None,
                generation: 0,
                state: ClaimState::Attached,
                log_path,
            };
            change(&mut claim);
            // Also when it is there already: a start that was killed may not have come to the sync.
            store_claim(blocking, found.as_ref(), &mut claim)?;
            *found = Some(claim);
        }
        Ok(())
    }
}

/// How a group leaves its backings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaving {
    /// The log goes on from here at the next start.
    Clean,
    /// The disks are plain from now on; the log is done.
    Detached,
}

/// How it left them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// As it was to.
    AsMeant,
    /// A disk has gone on without its log, which failed: its claim keeps saying so.
    Abandoned,
}

/// Syncs the backings and makes the claims say how they were left; everything must be in the
/// backings. The storage is the one that the engine had: its files were locked all the time.
/// `last_write` says what is known of the last write to a backing *after* the sync.
///
/// # Errors
/// The log is not clean, or a claim is another log's; a backing cannot be synced or read, a claim
/// cannot be stored: then the claims still say attached, wholly or in part, and the step is to be
/// done again.
pub fn leave<S: Storage>(
    storage: &mut S,
    input: &RecoveryInput,
    leaving: Leaving,
    last_write: &dyn Fn(DiskIndex) -> LastWrite,
) -> Result<Left, RecoveryError> {
    let blocking = &mut Blocking::new(storage, &input.names);
    let path = input.names.log.clone();
    let superblock = superblock::read(blocking, FileId::LOG)?
        .map_err(|source| LogError::Superblock { path, source })?;
    leave_blocking(blocking, input, &superblock, leaving, last_write)
}

pub(super) fn leave_blocking<S: Storage>(
    blocking: &mut Blocking<'_, S>,
    input: &RecoveryInput,
    superblock: &Superblock,
    leaving: Leaving,
    last_write: &dyn Fn(DiskIndex) -> LastWrite,
) -> Result<Left, RecoveryError> {
    let mut left = Left::AsMeant;
    for (index, disk) in superblock.disks.iter().enumerate() {
        if disk.removed {
            continue;
        }
        let index = DiskIndex(index as u16);
        blocking.sync(FileId::backing(index))?;
        if !input.claims {
            continue;
        }
        let path = blocking.names().of(FileId::claim(index));
        let found = read_claim(blocking, index)?.map_err(|source| {
            let path = path.clone();
            ClaimRefusal::Invalid { path, source }
        })?;
        if let Some(found) = &found {
            if found.log != superblock.log {
                return Err(other_log(path, found, superblock).into());
            }
            if found.state == ClaimState::Abandoned {
                left = Left::Abandoned;
                continue;
            }
        }
        if !superblock.clean {
            let path = input.names.log.clone();
            return Err(RecoveryError::NotClean { path });
        }
        let print = fingerprint(blocking, index, disk.size, last_write(index))?;
        let mut claim = Claim {
            group: superblock.group,
            disk: disk.id,
            disk_index: index,
            log: superblock.log,
            next_log: None,
            generation: 0,
            state: match leaving {
                Leaving::Clean => ClaimState::Clean(print),
                Leaving::Detached => ClaimState::Detached(print),
            },
            log_path: blocking.names().log.as_os_str().as_bytes().to_vec(),
        };
        store_claim(blocking, found.as_ref(), &mut claim)?;
    }
    Ok(left)
}

fn other_log(path: PathBuf, found: &Claim, superblock: &Superblock) -> ClaimRefusal {
    ClaimRefusal::OtherLog {
        path,
        found: found.log,
        log_path: std::ffi::OsStr::from_bytes(&found.log_path).into(),
        wanted: superblock.log,
    }
}

/// What happened to a backing since its fingerprint was stored, as far as can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Since {
    Untouched,
    Edited,
    /// No sampled block differs; more is not known.
    Untold,
}

fn compare(stored: &Fingerprint, now: &Fingerprint) -> Since {
    let told = |print: &Fingerprint| (print.size, print.mtime_ns, print.hash);
    if told(stored) != told(now) {
        return Since::Edited;
    }
    if now.mtime_ns != 0 {
        return Since::Untouched;
    }
    let (Some(before), Some(after)) = (stored.device, now.device) else {
        return Since::Untold;
    };
    let same_life = (before.boot, before.sequence) == (after.boot, after.sequence);
    // Counters that fell were begun anew, as those of a partition are with its table.
    if !same_life || after.writes < before.writes || after.sectors < before.sectors {
        return Since::Untold;
    }
    match before == after {
        true => Since::Untouched,
        false => Since::Edited,
    }
}

/// Blocks that a fingerprint reads, beside the first ones.
const SAMPLES: u64 = 64;
/// Blocks at the start of a backing that a fingerprint always reads: partition tables, boot
/// sectors and superblocks of file systems.
const FIRST_BLOCKS: u64 = 16;

/// The fingerprint of a backing: size, what is known of its last write, and BLAKE3 over its first 16 blocks, 64
/// blocks spread evenly, and its last one, each with its number.
///
/// # Errors
/// The backing cannot be read.
pub fn fingerprint<S: Storage>(
    blocking: &mut Blocking<'_, S>,
    disk: DiskIndex,
    size: u64,
    last_write: LastWrite,
) -> Result<Fingerprint, StorageError> {
    let blocks = size.div_ceil(BLOCK_SIZE as u64);
    let last = blocks.saturating_sub(1);
    let mut samples: Vec<u64> = (0..FIRST_BLOCKS.min(blocks)).collect();
    // 128 bits: a disk of 2^51 blocks times 64 does not fit 64 bits with room to spare.
    let spread = |index: u64| (u128::from(last) * u128::from(index) / u128::from(SAMPLES)) as u64;
    samples.extend((1..=SAMPLES).map(spread));
    samples.sort_unstable();
    samples.dedup();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&size.to_le_bytes());
    let mut buffer = AlignedBuffer::new(BLOCK_SIZE);
    for block in samples {
        let offset = block * BLOCK_SIZE as u64;
        let got;
        (buffer, got) = blocking.read(FileId::backing(disk), offset, buffer)?;
        let len = got.min((size - offset).min(BLOCK_SIZE as u64) as usize);
        hasher.update(&block.to_le_bytes());
        hasher.update(&buffer[..len]);
    }
    Ok(Fingerprint {
        size,
        mtime_ns: last_write.mtime_ns,
        hash: *hasher.finalize().as_bytes(),
        device: last_write.device,
    })
}
