//! From what a dead process left to a log that accepts frames.
//!
//! Synchronous steps over [`Storage`]; a kill or a power cut between any two of them is harmless,
//! since each step only adds what a later run would do in the same way:
//!
//! 1. read the superblock; judge the ring ([`ring`], cases R1 to R8);
//! 2. check the claims beside the backings ([`claims`], cases C1 to C10; where the group had gone on
//!    without its log, [`abandoned`], cases A1 to A5, and then no further);
//! 3. follow the log's chain to its end and judge it ([`super::log::scan`], cases E1 to E5);
//! 4. write the ring's missing frames to the log, **fdatasync**: from here on the ring is not
//!    needed ([`refill`]);
//! 5. mark the claims attached; bring the backings up to the log, sync them ([`replay`]);
//! 6. superblock: next incarnation, everything destaged, *clean* (nothing was answered yet);
//! 7. initialise the ring for that incarnation;
//! 8. superblock: not clean. Only now may anything be answered.
//!
//! Durable after each step is what the step says. On an error nothing was answered and nothing is
//! lost; the files stay as they are.

mod abandoned;
pub mod claims;
pub mod plain;
mod reconcile;
mod refill;
pub mod replay;
pub mod rewrite;
pub mod ring;

#[cfg(test)]
mod tests;

use super::blocking::{Blocking, FileNames, StorageError};
use super::log::LogHead;
use super::log::error::LogError;
use super::log::reader::{ChainRules, ReadError};
use super::log::scan::{LogEnd, Scan, UnverifiedLog};
use super::log::superblock;
use super::start::{FrameInLog, LogStart};
use crate::io::{FileId, Storage};
use afterimage_format::claim::DeviceWrites;
use afterimage_format::ids::{BLOCK_SIZE, BootId, DiskId, DiskIndex, GroupId, Lsn};
use afterimage_format::ring_header::{LogLatch, RING_AREA_OFFSET, RingHeader};
use afterimage_format::segment::SinkId;
use afterimage_format::superblock::Superblock;
use claims::{ClaimRefusal, Purpose};
use refill::Refill;
use replay::{ReplayProgress, Replayed};
use ring::{RingAbsence, RingDamage, RingFinding};
use std::path::PathBuf;

/// A disk as the configuration has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfiguredDisk {
    /// Identity.
    pub id: DiskId,
    /// Size in bytes of its backing.
    pub size: u64,
    /// What the system knows of the last write to its backing.
    pub last_write: LastWrite,
}

/// What the system knows of the last write to a backing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LastWrite {
    /// Modification time, nanoseconds since 1970; 0 for a block device, which has none.
    pub mtime_ns: u64,
    /// What the kernel counted of a block device, if it does.
    pub device: Option<DeviceWrites>,
}

impl LastWrite {
    /// Of a file that was modified then.
    #[must_use]
    pub const fn at(mtime_ns: u64) -> Self {
        Self {
            mtime_ns,
            device: None,
        }
    }
}

/// What the operator accepts at this start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accepted {
    /// Answered writes may be lost: no ring though there should be one.
    pub ring_loss: bool,
    /// A backing was changed behind our back, or its marker is gone: everything is shipped anew.
    pub edited_backing: bool,
}

/// What recovery is told. Files are open and locked in the storage: the log, the backing of each
/// disk by its index in the superblock, the claims if they are kept, and the ring's memory (zeroes
/// where there was no ring file).
#[derive(Clone, Debug)]
pub struct RecoveryInput {
    /// What people call the files.
    pub names: FileNames,
    /// The group whose log it must be.
    pub group: GroupId,
    /// The running boot.
    pub boot: BootId,
    /// The group's disks; new ones are added to the superblock's table, others are taken out.
    pub disks: Vec<ConfiguredDisk>,
    /// The group's sinks; new ones begin without a base.
    pub sinks: Vec<SinkId>,
    /// Whether claim files are kept beside the backings.
    pub claims: bool,
    /// What the operator accepts.
    pub accepted: Accepted,
}

/// Why a group does not start. Nothing was answered, the files are as they were or nearer to the
/// log's content.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    /// The storage failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The log was refused.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The log changed while it was read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A claim forbids it.
    #[error(transparent)]
    Claim(#[from] ClaimRefusal),
    /// Answered writes may be lost.
    #[error("{}: the ring {absence}, though the group was not stopped cleanly in this boot: writes that were answered may be lost; put the ring file back, or accept the loss (--accept-ring-loss) and have the group verified", path.display())]
    RingMissing {
        /// The ring.
        path: PathBuf,
        /// What is there instead.
        absence: RingAbsence,
    },
    /// The ring was written by a newer program.
    #[error("{}: ring layout version {version} is newer than this program; start the version that wrote it", path.display())]
    RingNewer {
        /// The ring.
        path: PathBuf,
        /// Its version.
        version: u16,
    },
    /// The ring's content is damaged: the host's memory is not to be trusted.
    #[error(
        "the ring is damaged: {damage}; accept the loss of what it alone holds (--accept-ring-loss) and have the group verified"
    )]
    RingDamaged {
        /// What is wrong.
        damage: RingDamage,
    },
    /// The ring of an abandoned log holds writes of a disk that was taken out.
    #[error("{}: holds writes of disk number {} of this group, which were answered and are not in the disk; put the disk back into the configuration, or accept their loss (--accept-ring-loss)", path.display(), disk.0)]
    RingOfDiskGone {
        /// The ring.
        path: PathBuf,
        /// Its number in the table of the abandoned log.
        disk: DiskIndex,
    },
    /// The log failed in the last run and was not replaced.
    #[error("{}: the log failed earlier ({latch}); what it lacks is in the ring and is to be written to a new log", path.display())]
    LogFailed {
        /// The log.
        path: PathBuf,
        /// What failed.
        latch: LogLatch,
    },
    /// A record is about a range that its disk does not have.
    #[error("record {lsn} is about blocks {first_block}+{block_count} of disk {}, which has no such blocks", disk.0)]
    RecordBeyondDisk {
        /// Its LSN.
        lsn: Lsn,
        /// Its disk.
        disk: DiskIndex,
        /// First block.
        first_block: u64,
        /// Number of blocks.
        block_count: u32,
    },
    /// A log that is not clean cannot be left clean.
    #[error("{}: not clean: the disks stay marked as belonging to it, and the next start recovers the group", path.display())]
    NotClean {
        /// The log.
        path: PathBuf,
    },
    /// A disk was taken out of the configuration too early.
    #[error(
        "disk {disk} of this group is not configured any more, and the log holds writes that its backing lacks; put the disk back, with its claim, and stop the group cleanly before you take it out"
    )]
    DiskGone {
        /// Which disk.
        disk: DiskId,
    },
    /// A backing is not as long as the log says its disk is.
    #[error(
        "{}: the backing has {found} bytes, the log says {wanted}; put the backing back as it was", path.display()
    )]
    DiskSize {
        /// The backing.
        path: PathBuf,
        /// Bytes of the backing.
        found: u64,
        /// Bytes the log says.
        wanted: u64,
    },
    /// No place in the superblock's tables.
    #[error(
        "the group's log has no place for another {what}; detach the group and attach it with a new log"
    )]
    TableFull {
        /// Of what.
        what: &'static str,
    },
    /// The log that is to take the place of a failed one holds less than the ring.
    #[error("{}: smaller than the ring, whose content it is to take over", path.display())]
    NextLogTooSmall {
        /// The new log.
        path: PathBuf,
    },
    /// The ring is too small to hold frames.
    #[error("{}: a ring of {bytes} bytes is too small", path.display())]
    RingTooSmall {
        /// The ring.
        path: PathBuf,
        /// Its length.
        bytes: usize,
    },
}

/// What a recovery did, for the log and for `status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecoveryReport {
    /// How the log's end was judged.
    pub log_end: LogEnd,
    /// What was made of the ring; `None`: it was used.
    pub ring_absence: Option<RingAbsence>,
    /// Frames that the ring had and the log lacked.
    pub ring_frames: u64,
    /// Frames in the log before that.
    pub log_frames: u64,
    /// What went into the backings.
    pub replayed: Replayed,
    /// The group was not stopped cleanly, or something was accepted: a verify is due.
    pub verify_due: bool,
}

/// A log that recovery went through: it accepts frames.
///
/// The ring in front of it is empty and initialised, the superblock durable, the backings
/// complete. Made by [`recover`] only.
#[derive(Debug)]
pub struct RecoveredLog {
    superblock: Superblock,
    head: LogHead,
    frames: Vec<FrameInLog>,
    report: RecoveryReport,
}

impl RecoveredLog {
    /// The durable superblock of the new incarnation.
    #[must_use]
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// Where the next frame goes and what it must say.
    #[must_use]
    pub fn head(&self) -> LogHead {
        self.head
    }

    /// What recovery did.
    #[must_use]
    pub fn report(&self) -> &RecoveryReport {
        &self.report
    }

    /// What the engine goes on from.
    #[must_use]
    pub fn into_start(self) -> LogStart {
        LogStart {
            ring_blocks: self.superblock.ring_blocks,
            superblock: self.superblock,
            next_frame: self.head.frame,
            next_lsn: self.head.lsn,
            previous_crc: self.head.previous_crc,
            position: self.head.position,
            lap: self.head.lap,
            frames: self.frames,
        }
    }
}

/// A log and its backings brought to the same state, durable; the superblock in memory is newer
/// than the stored one.
struct Settled {
    superblock: Superblock,
    head: LogHead,
    frames: Vec<FrameInLog>,
    report: RecoveryReport,
}

/// Recovers a group, or starts it for the first time.
///
/// # Errors
/// See [`RecoveryError`]. Nothing was answered.
pub fn recover<S: Storage>(
    storage: &mut S,
    input: &RecoveryInput,
) -> Result<RecoveredLog, RecoveryError> {
    let ring_blocks = ring_area_blocks(storage, input)?;
    let blocking = &mut Blocking::new(storage, &input.names);
    let Settled {
        mut superblock,
        head,
        frames,
        report,
    } = settle(blocking, input, Purpose::Serve, &mut |_| {})?;
    superblock.ring_blocks = ring_blocks;
    superblock.clean = true;
    superblock::store(blocking, FileId::LOG, &mut superblock)?;
    let header = RingHeader {
        group: superblock.group,
        log: superblock.log,
        boot: input.boot,
        incarnation: superblock.incarnation,
        area_blocks: u64::from(ring_blocks),
    };
    ring::initialise(blocking.storage(), &header, head.lsn, head.frame);
    superblock.clean = false;
    superblock::store(blocking, FileId::LOG, &mut superblock)?;
    Ok(RecoveredLog {
        superblock,
        head,
        frames,
        report,
    })
}

/// Steps 1 to 6 without the last store: what `recover` and `--to-plain` share.
fn settle<S: Storage>(
    blocking: &mut Blocking<'_, S>,
    input: &RecoveryInput,
    purpose: Purpose,
    progress: &mut dyn FnMut(ReplayProgress),
) -> Result<Settled, RecoveryError> {
    let log = UnverifiedLog::open(blocking, FileId::LOG, input.group)?;
    reconcile::check_sizes(log.superblock(), input)?;
    let mut verdict = claims::judge(blocking, log.superblock(), input, purpose)?;
    let finding = ring::examine(blocking.storage(), log.superblock(), input.boot);
    let (ring, ring_absence) = accept_ring(finding, input)?;
    let mut scan: Scan = log.scan(blocking, ring.map(|ring| ring.durable))?;
    let log_frames = scan.frames.len() as u64;
    let mut frames = Vec::new();
    if let Some(ring) = &ring {
        // Frames above the durable bound can be read from the log without being durable, or be
        // overtaken by a late write of the dead process: all of them are written again. It is the
        // same bytes in the same places.
        let first = ring.next.frame_near(scan.head.frame);
        let mut head = scan.head;
        if first < scan.head.frame {
            // Where room had to be made the tail has gone past it, with all that is in the backings.
            let tail = LogHead::at_tail(&log.superblock().tail);
            head = scan.head_at(first).unwrap_or(tail);
        }
        match ring::frames_after(blocking.storage(), ring, &head) {
            Err(RecoveryError::RingDamaged { .. }) if input.accepted.ring_loss => {}
            found => {
                frames = found?;
                let reach = head.frame + frames.len() as u64;
                if reach < scan.head.frame {
                    return Err(RecoveryError::RingDamaged {
                        damage: RingDamage::Short {
                            ring: reach,
                            log: scan.head.frame,
                        },
                    });
                }
                scan.cut_to(head);
            }
        }
    }
    if !frames.is_empty() || log.superblock().destaged.next() < scan.head.lsn {
        reconcile::check_configured(log.superblock(), input)?;
    }
    let rules: ChainRules = log.rules();
    let unclean = !matches!(scan.end, LogEnd::Closed) || !frames.is_empty();
    let mut superblock = log.into_superblock();
    let ring_durable = ring.map_or(superblock.durable, |ring| ring.durable);
    let mut refill = Refill {
        superblock: &mut superblock,
        rules,
        head: scan.head,
        directory: scan.directory,
        frames: scan.frames,
        replayed: Replayed::default(),
        progress,
    };
    refill.write(blocking, &frames, ring_durable)?;
    if verdict.resend {
        // Durable before the claims are: afterwards nothing else tells that something was accepted.
        reconcile::demand_base(refill.superblock, Lsn(refill.head.lsn.0 - 1));
        superblock::store(blocking, FileId::LOG, refill.superblock)?;
    }
    verdict.mark_attached(blocking, refill.superblock)?;
    refill.replay(blocking)?;
    let Refill {
        head,
        frames: frames_in_log,
        replayed,
        ..
    } = refill;
    superblock.incarnation += 1;
    superblock.incarnation_frame = head.frame;
    superblock.boot = input.boot;
    reconcile::reconcile(&mut superblock, input)?;
    Ok(Settled {
        superblock,
        head,
        frames: frames_in_log,
        report: RecoveryReport {
            log_end: scan.end,
            ring_absence,
            ring_frames: frames.len() as u64,
            log_frames,
            replayed,
            verify_due: unclean || verdict.verify_due,
        },
    })
}

/// The ring to go by, or why there is none.
fn accept_ring(
    finding: RingFinding,
    input: &RecoveryInput,
) -> Result<(Option<ring::RingState>, Option<RingAbsence>), RecoveryError> {
    match finding {
        RingFinding::Ours(ring) => Ok((Some(ring), None)),
        RingFinding::Failed(_, latch) => Err(RecoveryError::LogFailed {
            path: input.names.log.clone(),
            latch,
        }),
        RingFinding::Absent { absence, refuse } if refuse && !input.accepted.ring_loss => {
            Err(RecoveryError::RingMissing {
                path: input.names.ring.clone(),
                absence,
            })
        }
        RingFinding::Absent { absence, .. } => Ok((None, Some(absence))),
        RingFinding::Newer(version) => Err(RecoveryError::RingNewer {
            path: input.names.ring.clone(),
            version,
        }),
    }
}

fn ring_area_blocks<S: Storage>(storage: &S, input: &RecoveryInput) -> Result<u32, RecoveryError> {
    let bytes = storage.ring_len();
    let blocks = bytes.saturating_sub(RING_AREA_OFFSET) / BLOCK_SIZE;
    let enough = blocks as u64 >= afterimage_format::frame::AREA_BLOCKS_MIN;
    u32::try_from(blocks)
        .ok()
        .filter(|_| enough)
        .ok_or_else(|| RecoveryError::RingTooSmall {
            path: input.names.ring.clone(),
            bytes,
        })
}
