//! What the ring tells after a stop: whether it is needed, whether it is the right one, and which
//! frames in it the log may lack.
//!
//! # Is there a ring to go by?
//!
//! *same boot*: the superblock was written in the running boot, so that shared memory of that time
//! would still be there.
//!
//! | case | superblock | ring | judgement |
//! | --- | --- | --- | --- |
//! | R1 closed | clean | none of this log, boot and incarnation | not needed: nothing was answered that the log lacks |
//! | R2 ours | clean or unclean, same boot | this log, boot and incarnation | use it |
//! | R3 missing | unclean, same boot | none (never initialised, damaged header) | answered writes may be lost: refuse unless accepted |
//! | R4 rebooted | unclean, other boot | none, or of a boot before | the power was cut: the log alone counts |
//! | R5 rolled back | unclean | this log and the running boot, other incarnation or boot than the superblock's | the log was put back to an older state: refuse unless accepted |
//! | R6 foreign | unclean, same boot | another log's or group's, or of a boot before | as R3 |
//! | R7 newer | unclean | of a newer version | refuse |
//! | R8 failed | as R2 | as R2, with the error latch set | the log must be rewritten ([`super::rewrite`]) |
//!
//! R2 with a clean superblock: the ring is empty, or the copy that said *not clean* is damaged. R8 with
//! one: the write that failed was that of the superblock, and reached the disk all the same.

use super::{RecoveryError, RecoveryInput};
use crate::engine::log::LogHead;
use crate::io::Storage;
use afterimage_format::frame::{
    Descriptor, Entry, FRAME_BLOCKS_MAX, FrameError, FrameHeader, RingDescriptor,
};
use afterimage_format::ids::{BLOCK_SIZE, BootId, LogId, Lsn};
use afterimage_format::ring_header::{
    LogLatch, NextToPersist, RING_APPENDED_WORD, RING_AREA_OFFSET, RING_DURABLE_WORD,
    RING_HEADER_BYTES, RING_LATCH_WORD, RING_MAGIC_WORD, RING_NEXT_WORD, RingHeader,
    RingHeaderError,
};
use afterimage_format::superblock::Superblock;

/// Why there is no ring to go by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingAbsence {
    /// R1: it is not needed.
    NotNeeded,
    /// R3: never initialised, or its header is damaged.
    Missing(RingHeaderError),
    /// R4: the host was started anew since.
    Rebooted,
    /// R5: the log is older than the ring.
    RolledBack {
        /// Incarnation of the ring.
        ring: u32,
        /// Incarnation of the log.
        log: u32,
    },
    /// R6: it belongs to this log.
    OtherLog(LogId),
    /// R6: it is of an earlier boot, though the log is not.
    OtherBoot(BootId),
}

impl std::fmt::Display for RingAbsence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotNeeded => write!(f, "is not needed"),
            Self::Missing(error) => write!(f, "is missing ({error})"),
            Self::Rebooted => write!(f, "went with the host's reboot"),
            Self::RolledBack { ring, log } => write!(
                f,
                "is newer than the log (start {ring} of the log, which itself says {log}): was the log put back from a copy?"
            ),
            Self::OtherLog(log) => write!(f, "belongs to log {log}"),
            Self::OtherBoot(boot) => write!(f, "is of an earlier boot ({boot})"),
        }
    }
}

/// What the ring's header tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingFinding {
    /// R2: the ring counts.
    Ours(RingState),
    /// R8: the ring counts, and the log has failed.
    Failed(RingState, LogLatch),
    /// There is no ring to go by. `refuse`: the operator has to accept that.
    Absent {
        /// Why.
        absence: RingAbsence,
        /// Answered writes may be lost.
        refuse: bool,
    },
    /// R7: nothing can be said.
    Newer(u16),
}

/// A ring that counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingState {
    /// Its header.
    pub header: RingHeader,
    /// The log was durable up to here.
    pub durable: Lsn,
    /// Frames from this one on are whole in the ring.
    pub next: NextToPersist,
    /// The newest record that may have been answered.
    pub appended: Lsn,
}

/// Judges the ring by the table above.
pub fn examine<S: Storage>(storage: &S, superblock: &Superblock, boot: BootId) -> RingFinding {
    let absent = |absence, refuse| RingFinding::Absent { absence, refuse };
    if superblock.clean {
        return match ring_of(storage, superblock, boot) {
            Some(header) => usable(storage, header),
            None => absent(RingAbsence::NotNeeded, false),
        };
    }
    let same_boot = superblock.boot == boot;
    let gone = |absence| {
        if same_boot {
            absent(absence, true)
        } else {
            absent(RingAbsence::Rebooted, false)
        }
    };
    if storage.ring_len() < RING_AREA_OFFSET {
        return gone(RingAbsence::Missing(RingHeaderError::Length(
            storage.ring_len(),
        )));
    }
    let header = match RingHeader::decode(storage.ring(0, RING_HEADER_BYTES)) {
        Ok(header) => header,
        Err(RingHeaderError::Version(version)) => return RingFinding::Newer(version),
        Err(error) => return gone(RingAbsence::Missing(error)),
    };
    if header.group != superblock.group || header.log != superblock.log {
        return gone(RingAbsence::OtherLog(header.log));
    }
    if header.boot != boot {
        return gone(RingAbsence::OtherBoot(header.boot));
    }
    if !area_fits(storage, &header) {
        return gone(RingAbsence::Missing(RingHeaderError::Area(
            header.area_blocks,
        )));
    }
    if !same_boot || header.incarnation != superblock.incarnation {
        let absence = RingAbsence::RolledBack {
            ring: header.incarnation,
            log: superblock.incarnation,
        };
        return absent(absence, true);
    }
    usable(storage, header)
}

/// The ring that a process of the running boot left in front of this log after it had failed,
/// whatever became of the log itself.
pub(super) fn left_by<S: Storage>(
    storage: &S,
    input: &RecoveryInput,
    log: LogId,
) -> Option<RingState> {
    if storage.ring_len() < RING_AREA_OFFSET {
        return None;
    }
    let header = RingHeader::decode(storage.ring(0, RING_HEADER_BYTES)).ok()?;
    let same = header.group == input.group && header.log == log && header.boot == input.boot;
    match usable(storage, header) {
        RingFinding::Failed(state, _) if same && area_fits(storage, &header) => Some(state),
        _ => None,
    }
}

/// The very ring that a clean log had in front of it.
fn ring_of<S: Storage>(storage: &S, superblock: &Superblock, boot: BootId) -> Option<RingHeader> {
    if storage.ring_len() < RING_AREA_OFFSET {
        return None;
    }
    let header = RingHeader::decode(storage.ring(0, RING_HEADER_BYTES)).ok()?;
    let same = header.group == superblock.group
        && header.log == superblock.log
        && header.incarnation == superblock.incarnation
        && header.boot == boot
        && superblock.boot == boot;
    (same && area_fits(storage, &header)).then_some(header)
}

fn usable<S: Storage>(storage: &S, header: RingHeader) -> RingFinding {
    let state = RingState {
        header,
        durable: Lsn(storage.ring_load(RING_DURABLE_WORD)),
        next: NextToPersist::from_word(storage.ring_load(RING_NEXT_WORD)),
        appended: Lsn(storage.ring_load(RING_APPENDED_WORD)),
    };
    match LogLatch::from_word(storage.ring_load(RING_LATCH_WORD)) {
        None => RingFinding::Ours(state),
        Some(latch) => RingFinding::Failed(state, latch),
    }
}

fn area_fits<S: Storage>(storage: &S, header: &RingHeader) -> bool {
    let area = header.area_blocks.saturating_mul(BLOCK_SIZE as u64);
    area.saturating_add(RING_AREA_OFFSET as u64) <= storage.ring_len() as u64
}

/// A frame of the ring that the log lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingFrame {
    /// First block in the ring's area.
    pub position: u64,
    /// Its header; of an open frame without lap, length and checksum.
    pub header: FrameHeader,
    /// Its records.
    pub entries: Vec<Entry>,
    /// Header checksum; `None` while the frame is open.
    pub closed: Option<u32>,
}

impl RingFrame {
    /// Byte offset in ring memory.
    #[must_use]
    pub fn offset(&self) -> usize {
        RING_AREA_OFFSET + self.position as usize * BLOCK_SIZE
    }

    /// Bytes of the whole frame.
    #[must_use]
    pub fn len(&self) -> usize {
        self.header.frame_blocks() as usize * BLOCK_SIZE
    }

    /// Never: a frame has a descriptor.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }
}

/// Why the ring cannot be read to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingDamage {
    /// A frame is damaged.
    #[error("frame {frame} at block {position} of the ring: {error}")]
    Frame {
        /// Its number.
        frame: u64,
        /// Where.
        position: u64,
        /// What is wrong.
        error: FrameError,
    },
    /// A frame is missing though a later one is there.
    #[error("frame {frame} is missing, frame {later} at block {position} is there")]
    Hole {
        /// The missing one.
        frame: u64,
        /// The later one.
        later: u64,
        /// Where that is.
        position: u64,
    },
    /// The ring continues another history than the log.
    #[error("frame {frame} does not continue the log's frame before it")]
    Fork {
        /// Its number.
        frame: u64,
    },
    /// The log holds frames that were not durable yet and that the ring lacks.
    #[error("it ends before frame {ring}, the log before frame {log}")]
    Short {
        /// First frame that the ring lacks.
        ring: u64,
        /// First frame that the log lacks.
        log: u64,
    },
    /// Records are missing at the end.
    #[error("it ends with record {found}, and record {published} had been published")]
    Tail {
        /// The last one there.
        found: Lsn,
        /// The last one that there was.
        published: Lsn,
    },
    /// The ring begins behind the log's end.
    #[error("it begins with frame {ring}, the log ends before frame {log}")]
    Behind {
        /// First frame in the ring.
        ring: u64,
        /// Frame that the log lacks first.
        log: u64,
    },
}

/// The frames of the ring that come after the log's end, in order; at most the last of them is
/// open. Everything below an entry count was answered or about to be, so damage is an error, not
/// an end.
///
/// # Errors
/// The ring is damaged, or does not fit the log.
pub fn frames_after<S: Storage>(
    storage: &S,
    ring: &RingState,
    log_head: &LogHead,
) -> Result<Vec<RingFrame>, RecoveryError> {
    let damage = |damage| RecoveryError::RingDamaged { damage };
    let mut number = ring.next.frame_near(log_head.frame);
    if number > log_head.frame {
        return Err(damage(RingDamage::Behind {
            ring: number,
            log: log_head.frame,
        }));
    }
    let mut position = u64::from(ring.next.position);
    let mut chain: Option<(u32, Lsn)> = None;
    let mut frames = Vec::new();
    loop {
        if number == log_head.frame {
            let expected = (log_head.previous_crc, log_head.lsn);
            if chain.is_some_and(|found| found != expected) {
                return Err(damage(RingDamage::Fork { frame: number }));
            }
            chain = Some(expected);
        }
        let found = find_frame(storage, ring, number, chain, position).map_err(damage)?;
        let Some(frame) = found else { break };
        position = frame.position + u64::from(frame.header.frame_blocks());
        number += 1;
        let Some(crc) = frame.closed else {
            if !frame.entries.is_empty() {
                frames.push(frame);
            }
            break;
        };
        chain = Some((crc, frame.header.last_lsn().next()));
        if frame.header.start.number >= log_head.frame {
            frames.push(frame);
        }
    }
    if let Some((later, position)) = later_frame(storage, ring, number) {
        return Err(damage(RingDamage::Hole {
            frame: number,
            later,
            position,
        }));
    }
    // Frames below the log's head were only walked through; an open one among them (the log holds
    // it closed, from a recovery that was killed) has nothing more to give.
    frames.retain(|frame| frame.header.start.number >= log_head.frame);
    let found = frames
        .last()
        .map_or(Lsn(log_head.lsn.0 - 1), |frame| frame.header.last_lsn());
    if found < ring.appended {
        return Err(damage(RingDamage::Tail {
            found,
            published: ring.appended,
        }));
    }
    Ok(frames)
}

/// All frames that the log has not durably, in order, of a ring that counts without its log.
///
/// # Errors
/// The ring is damaged.
pub(super) fn frames_left<S: Storage>(
    storage: &S,
    ring: &RingState,
) -> Result<Vec<RingFrame>, RecoveryError> {
    let first = [u64::from(ring.next.position), 0]
        .into_iter()
        .filter(|position| *position < ring.header.area_blocks)
        .filter_map(|position| header_at(storage, position))
        .find(|header| {
            header.start.log == ring.header.log
                && header.start.incarnation == ring.header.incarnation
                && header.start.number as u32 == ring.next.frame_low
        });
    let Some(first) = first else {
        // Nothing may have been published behind the durable records then.
        let (found, published) = (ring.durable, ring.appended);
        if found < published {
            return Err(RecoveryError::RingDamaged {
                damage: RingDamage::Tail { found, published },
            });
        }
        return Ok(Vec::new());
    };
    let head = LogHead {
        position: 0,
        lap: 0,
        frame: first.start.number,
        lsn: first.start.first_lsn,
        previous_crc: first.start.previous_crc,
    };
    frames_after(storage, ring, &head)
}

/// The header of the frame, open or closed, at this block of the area.
fn header_at<S: Storage>(storage: &S, position: u64) -> Option<FrameHeader> {
    let offset = RING_AREA_OFFSET + position as usize * BLOCK_SIZE;
    let block = storage.ring(offset, BLOCK_SIZE);
    match RingDescriptor::decode(block) {
        Ok(RingDescriptor::Closed(descriptor)) => Some(descriptor.header),
        Ok(RingDescriptor::Open(open)) => Some(open.header),
        // Damaged entries: `frames_after` says so.
        Err(_) => Descriptor::decode_header(block)
            .ok()
            .map(|(header, _)| header),
    }
}

/// The frame with this number at one of the two places where it may be.
fn find_frame<S: Storage>(
    storage: &S,
    ring: &RingState,
    number: u64,
    chain: Option<(u32, Lsn)>,
    position: u64,
) -> Result<Option<RingFrame>, RingDamage> {
    let candidates = [Some(position), (position != 0).then_some(0)];
    for position in candidates.into_iter().flatten() {
        if position >= ring.header.area_blocks {
            continue;
        }
        if let Some(frame) = frame_at(storage, ring, number, chain, position)? {
            return Ok(Some(frame));
        }
    }
    Ok(None)
}

fn frame_at<S: Storage>(
    storage: &S,
    ring: &RingState,
    number: u64,
    chain: Option<(u32, Lsn)>,
    position: u64,
) -> Result<Option<RingFrame>, RingDamage> {
    let offset = RING_AREA_OFFSET + position as usize * BLOCK_SIZE;
    let belongs = |header: &FrameHeader| {
        let start = &header.start;
        start.log == ring.header.log
            && start.incarnation == ring.header.incarnation
            && start.number == number
            && chain.is_none_or(|(crc, lsn)| start.previous_crc == crc && start.first_lsn == lsn)
    };
    let damaged = |error| RingDamage::Frame {
        frame: number,
        position,
        error,
    };
    let whole = |header: &FrameHeader| {
        let blocks = header.frame_blocks();
        let room = ring.header.area_blocks - position;
        if u64::from(blocks) > room || blocks > FRAME_BLOCKS_MAX {
            return Err(damaged(FrameError::PayloadBlocks(header.payload_blocks)));
        }
        Ok(storage.ring(offset, blocks as usize * BLOCK_SIZE))
    };
    match RingDescriptor::decode(storage.ring(offset, BLOCK_SIZE)) {
        Ok(RingDescriptor::Closed(descriptor)) if belongs(&descriptor.header) => {
            let bytes = whole(&descriptor.header)?;
            descriptor
                .verify_payloads(&bytes[BLOCK_SIZE..])
                .map_err(damaged)?;
            Ok(Some(RingFrame {
                position,
                header: descriptor.header,
                entries: descriptor.entries,
                closed: Some(descriptor.header_crc),
            }))
        }
        Ok(RingDescriptor::Open(open)) if belongs(&open.header) => {
            let bytes = whole(&open.header)?;
            let entries = open.entries(bytes).map_err(damaged)?;
            Ok(Some(RingFrame {
                position,
                header: open.header,
                entries,
                closed: None,
            }))
        }
        Ok(_) => Ok(None),
        // A valid header in front of damaged entries still says whose it is.
        Err(error) => match Descriptor::decode_header(storage.ring(offset, BLOCK_SIZE)) {
            Ok((header, _)) if belongs(&header) => Err(damaged(error)),
            _ => Ok(None),
        },
    }
}

/// A closed frame of this ring with a higher number than `number`, which is missing.
fn later_frame<S: Storage>(storage: &S, ring: &RingState, number: u64) -> Option<(u64, u64)> {
    (0..ring.header.area_blocks).find_map(|position| {
        let offset = RING_AREA_OFFSET + position as usize * BLOCK_SIZE;
        let (header, _) = Descriptor::decode_header(storage.ring(offset, BLOCK_SIZE)).ok()?;
        let ours = header.start.log == ring.header.log
            && header.start.incarnation == ring.header.incarnation
            && header.start.number > number;
        ours.then_some((header.start.number, position))
    })
}

/// Initialises ring memory for an incarnation whose superblock is durable and says clean: until it
/// says otherwise nobody looks at the ring, so a kill between two of these stores does no harm.
pub fn initialise<S: Storage>(storage: &mut S, header: &RingHeader, next_lsn: Lsn, frame: u64) {
    storage.ring_store(RING_MAGIC_WORD, 0);
    storage.ring_store(RING_DURABLE_WORD, next_lsn.0 - 1);
    storage.ring_store(RING_LATCH_WORD, 0);
    storage.ring_store(RING_NEXT_WORD, NextToPersist::new(0, frame).word());
    storage.ring_store(RING_APPENDED_WORD, next_lsn.0 - 1);
    let bytes = header.encode();
    storage.ring_write(8, &bytes[8..]);
    let mut magic = [0; 8];
    magic.copy_from_slice(&bytes[..8]);
    storage.ring_store(RING_MAGIC_WORD, u64::from_le_bytes(magic));
}
