//! A new log in the place of one that failed.
//!
//! After the first failed write or sync of a log nobody knows what of its tail is durable, whatever
//! a later read says. What is known: everything up to the ring's durable LSN is, and everything
//! above it is still in the ring. So: the log's part goes into the backings, the ring's part into a
//! new log with a new identity, in which LSNs go on. Sinks get a pass, since the new log does not
//! continue what they have.
//!
//! The caller has created the new log beside the old one and opened it as
//! [`FileId::NEXT_LOG`]; afterwards it gives it the old one's name
//! ([`crate::engine::log::create::publish`]), takes it for [`FileId::LOG`] and calls
//! [`super::recover`]. What may end the process or the host between two steps:
//!
//! | after | is durable | what the next start finds |
//! | --- | --- | --- |
//! | nothing | – | old log, ring, latch: begins anew |
//! | the backings are synced | all that the old log has durably | the same; replays it again |
//! | the new log is synced | what the ring has | the same; a half-made log is removed |
//! | the claims name both logs | that either may come | the same |
//! | its superblock is stored | the new log, clean | the same: it has no name yet |
//! | the rename | maybe the name | kill: the new log, clean, so its ring is not needed; the caller syncs the folder before the claims forget the old one. Power cut: one of the two, and no ring. The old one then counts as after any power cut: what the new one has beyond it was never flushed |
//! | the folder is synced | the name | the new log |
//! | recovery has marked the claims | that the old one may never come back | the new log |
//!
//! The new log begins with epoch 0, *not assigned*: it does not continue what a sink has of the old
//! one, so each sink gives it an epoch at the first contact and gets a pass
//! (`docs/decisions/0010-a-new-log-after-an-error.md`).

use super::claims::{Purpose, judge};
use super::reconcile::check_configured;
use super::replay::replay;
use super::ring::{self, RingFinding};
use super::{RecoveryError, RecoveryInput, refill};
use crate::engine::blocking::Blocking;
use crate::engine::log::reader::{LogReader, READAHEAD_SCAN, StorageSource};
use crate::engine::log::scan::UnverifiedLog;
use crate::engine::log::{LogHead, area_offset, create, superblock};
use crate::io::{FileId, Storage};
use afterimage_format::frame::{FrameHeader, FrameStart};
use afterimage_format::ids::Lsn;
use afterimage_format::superblock::{SinkState, Tail};

/// What a rewrite did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewritten {
    /// The old log was durable up to here.
    pub durable: Lsn,
    /// Last LSN in the new log.
    pub last: Lsn,
}

/// Fills the new log with what the failed one lacks, durably. `None`: the log has not failed.
///
/// # Errors
/// As for [`super::recover`]; or the new log has no room for what the ring holds.
pub fn rewrite_failed_log<S: Storage>(
    storage: &mut S,
    input: &RecoveryInput,
) -> Result<Option<Rewritten>, RecoveryError> {
    let blocking = &mut Blocking::new(storage, &input.names);
    let old = UnverifiedLog::open(blocking, FileId::LOG, input.group)?;
    let RingFinding::Failed(ring, _) =
        ring::examine(blocking.storage(), old.superblock(), input.boot)
    else {
        return Ok(None);
    };
    check_configured(old.superblock(), input)?;
    let mut verdict = judge(blocking, old.superblock(), input, Purpose::Serve)?;
    let scan = old.scan(blocking, Some(ring.durable))?;
    let durable = ring.durable.max(old.superblock().durable);
    let rules = old.rules();
    // Where the durable part ends: what was read behind it may be gone after the next power cut.
    let start = scan.directory.locate(durable.next()).unwrap_or(scan.head);
    let mut reader = LogReader::new(rules, start, READAHEAD_SCAN);
    let file = FileId::LOG;
    while reader
        .next(&mut StorageSource { blocking, file }, durable)?
        .is_some()
    {}
    let frames = ring::frames_after(blocking.storage(), &ring, &reader.head())?;

    let from = old.superblock().destaged.next();
    let start = scan.directory.locate(from).unwrap_or(scan.head);
    let disks = &old.superblock().disks;
    verdict.mark_attached(blocking, old.superblock())?;
    let records = from..=durable;
    replay(blocking, rules, file, start, records, disks, &mut |_| {})?;
    refill::sync_backings(blocking, old.superblock())?;

    let next = UnverifiedLog::open(blocking, FileId::NEXT_LOG, input.group)?;
    let mut new = next.into_superblock();
    new.disks = old.superblock().disks.clone();
    new.sinks = old
        .superblock()
        .sinks
        .iter()
        .map(|sink| SinkState {
            dirty: Some(durable),
            ..create::without_base(sink.id)
        })
        .collect();
    new.boot = input.boot;
    new.incarnation = 1;
    new.tail = Tail {
        position: 0,
        frame: 1,
        lsn: durable.next(),
        lap: 0,
        previous_crc: 0,
    };
    new.destaged = durable;
    let mut head = LogHead::at_tail(&new.tail);
    for frame in &frames {
        let header = FrameHeader {
            start: FrameStart {
                log: new.log,
                incarnation: new.incarnation,
                number: head.frame,
                previous_crc: head.previous_crc,
                ..frame.header.start
            },
            entry_count: frame.entries.len() as u16,
            payload_blocks: frame.header.payload_blocks,
            durable_lsn: durable,
            lap: 0,
        };
        let placement = head.place(new.area_blocks, header.frame_blocks());
        if placement.lap != 0 {
            return Err(RecoveryError::NextLogTooSmall {
                path: input.names.next_log.clone(),
            });
        }
        let (bytes, crc) = refill::close(blocking, frame, &header);
        let offset = area_offset(placement.position);
        blocking.write_bytes(FileId::NEXT_LOG, offset, &bytes)?;
        head = head.after(new.area_blocks, placement, &header, crc);
    }
    blocking.sync(FileId::NEXT_LOG)?;
    new.durable = Lsn(head.lsn.0 - 1);
    new.clean = true;
    verdict.mark_next(blocking, old.superblock(), new.log)?;
    superblock::store(blocking, FileId::NEXT_LOG, &mut new)?;
    Ok(Some(Rewritten {
        durable,
        last: new.durable,
    }))
}
