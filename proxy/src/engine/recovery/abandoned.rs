//! What a group left behind that went on without its log (`on_log_error = "detach"`).
//!
//! The process before had, in this order: the log's durable part in the backings, synced; every
//! claim *abandoned*, one by one, each durable; what the ring alone held in the backings, synced;
//! the ring's magic cleared; and only then the first frame of the ring given away. So where claims
//! of a log say abandoned:
//!
//! | its claims | ring of that log and boot, with its latch | judgement |
//! | --- | --- | --- |
//! | all | there | A1: everything written to the backings since is in the ring, too: it is brought into them, then the log is done |
//! | all | not | A2: the backings have it (kill), or it was never flushed (power cut): the log is done |
//! | some | there | A3: the process ended between two claims; nothing came past the log: as if none said so, the log is rewritten |
//! | some | not, and not needed (power cut), or its loss is accepted | A4: the backings have what was flushed: the others are abandoned, too, then the log is done |
//! | some | not, though it should be | A5: refuse |
//!
//! In no case is a record of an abandoned log replayed that the ring does not hold. A1 may be
//! killed at any point and is begun again: records are replayed in their order, nothing above the
//! log's durable end was flushed before the magic was cleared, and it is cleared when the backings
//! are synced. Who removes the ring in between loses what A2 says.

use super::claims::{Found, store_claim};
use super::replay::replay_ring;
use super::ring::{self, RingFinding, RingState};
use super::{RecoveryError, RecoveryInput};
use crate::engine::blocking::{Blocking, StorageError};
use crate::io::{FileId, Storage};
use afterimage_format::claim::{Claim, ClaimState};
use afterimage_format::ids::{DiskIndex, LogId};
use afterimage_format::ring_header::RING_MAGIC_WORD;
use afterimage_format::superblock::{DiskState, Superblock};

/// Whether the log that was opened was abandoned by some of its disks only, and goes on (A3).
/// Otherwise the claims say what holds for each of them.
///
/// # Errors
/// The ring is missing or damaged and the operator has not accepted that; a backing or a claim
/// cannot be written. Can be repeated.
pub(super) fn settle<S: Storage>(
    blocking: &mut Blocking<'_, S>,
    superblock: &Superblock,
    input: &RecoveryInput,
    found: &mut [Found],
) -> Result<bool, RecoveryError> {
    let is_abandoned = |claim: &&Claim| claim.state == ClaimState::Abandoned;
    let claims = found.iter().filter_map(|found| found.claim.as_ref());
    let mut logs: Vec<LogId> = claims.filter(is_abandoned).map(|claim| claim.log).collect();
    logs.sort_unstable();
    logs.dedup();
    for log in logs {
        let of_log = |found: &&Found| found.claim.as_ref().is_some_and(|claim| claim.log == log);
        let left: Vec<&Claim> = found
            .iter()
            .filter(of_log)
            .filter_map(|found| found.claim.as_ref())
            .collect();
        if left.iter().all(is_abandoned) {
            let ring = ring::left_by(blocking.storage(), input, log);
            if let Some(ring) = ring {
                hand_over(blocking, input, &ring, found, log)?;
            }
        } else if log == superblock.log {
            match ring::examine(blocking.storage(), superblock, input.boot) {
                RingFinding::Ours(_) | RingFinding::Failed(..) => return Ok(true),
                finding => super::accept_ring(finding, input)?,
            };
            abandon_others(blocking, found, log)?;
        }
    }
    Ok(false)
}

/// A1.
fn hand_over<S: Storage>(
    blocking: &mut Blocking<'_, S>,
    input: &RecoveryInput,
    ring: &RingState,
    found: &[Found],
    log: LogId,
) -> Result<(), RecoveryError> {
    let frames = match ring::frames_left(blocking.storage(), ring) {
        Err(RecoveryError::RingDamaged { .. }) if input.accepted.ring_loss => Vec::new(),
        frames => frames?,
    };
    // A new log may have given a disk another place than the abandoned one had for it.
    let place = |disk: DiskIndex| {
        let is_it = |claim: &Claim| claim.log == log && claim.disk_index == disk;
        let at = found
            .iter()
            .find(|found| found.claim.as_ref().is_some_and(is_it));
        match at {
            None if !input.accepted.ring_loss => Err(RecoveryError::RingOfDiskGone {
                path: input.names.ring.clone(),
                disk,
            }),
            at => Ok(at.map(|found| found.index)),
        }
    };
    let disks = table(input, found);
    let replayed = replay_ring(blocking, &frames, &disks, &place)?;
    for (index, disk) in (0..).zip(&disks) {
        if !disk.removed {
            blocking.sync(FileId::backing(DiskIndex(index)))?;
        }
    }
    blocking.storage().ring_store(RING_MAGIC_WORD, 0);
    tracing::warn!(
        %log,
        records = replayed.records,
        blocks = replayed.blocks,
        "the log failed and the guest went on without it: the disks now have what only the ring held"
    );
    Ok(())
}

/// The configured disks by their index; the others count as taken out.
fn table(input: &RecoveryInput, found: &[Found]) -> Vec<DiskState> {
    let places = found.iter().map(|found| usize::from(found.index.0) + 1);
    let gone = DiskState {
        id: afterimage_format::ids::DiskId::from_bytes([0; 16]),
        size: 0,
        removed: true,
    };
    let mut disks = vec![gone; places.max().unwrap_or_default()];
    for (found, disk) in found.iter().zip(&input.disks) {
        disks[usize::from(found.index.0)] = DiskState {
            id: disk.id,
            size: disk.size,
            removed: false,
        };
    }
    disks
}

/// A4: the backings are complete without the log.
fn abandon_others<S: Storage>(
    blocking: &mut Blocking<'_, S>,
    found: &mut [Found],
    log: LogId,
) -> Result<(), StorageError> {
    for found in found {
        let Some(claim) = &found.claim else { continue };
        if claim.log != log || claim.state == ClaimState::Abandoned {
            continue;
        }
        let mut abandoned = Claim {
            state: ClaimState::Abandoned,
            next_log: None,
            disk_index: found.index,
            ..claim.clone()
        };
        store_claim(blocking, Some(claim), &mut abandoned)?;
        found.claim = Some(abandoned);
    }
    Ok(())
}
