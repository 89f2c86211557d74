//! Reads records where they first exist: in the ring, as soon as they have their LSN; after a
//! recovery, in the log. Whatever is read here is checked against the clients' requests, so that a
//! mistake in reading cannot hide one in writing.

use super::host::WorldFile;
use afterimage_format::frame::{Entry, RingDescriptor};
use afterimage_format::ids::{BLOCK_SIZE, DiskIndex, Lsn};
use afterimage_format::op::Op;
use afterimage_proxy::engine::start::LogStart;
use afterimage_proxy::io::Storage;
use afterimage_proxy::ship::log_source::FollowedLog;
use afterimage_proxy::ship::source::SourceError;
use std::ops::Range;

/// One record with its payload.
#[derive(Debug)]
pub struct Record {
    /// Its LSN.
    pub lsn: u64,
    /// What it does.
    pub op: Op,
    /// Which disk.
    pub disk: DiskIndex,
    /// First block.
    pub first_block: u64,
    /// Number of blocks.
    pub block_count: u32,
    /// Whole blocks.
    pub payload: Vec<u8>,
}

/// Where reading goes on in the ring of one life.
#[derive(Debug)]
pub struct RingTap {
    area_blocks: u64,
    incarnation: u32,
    frame: u64,
    position: u64,
    /// Where the frame ended when it was last looked at.
    end: u64,
    /// Last record read.
    seen: u64,
}

impl RingTap {
    /// The ring of a life that begins so.
    #[must_use]
    pub fn new(start: &LogStart) -> Self {
        Self {
            area_blocks: u64::from(start.ring_blocks),
            incarnation: start.superblock.incarnation,
            frame: start.next_frame,
            position: 0,
            end: 0,
            seen: start.next_lsn.0 - 1,
        }
    }

    /// Records that are new since the last call: up to `appended`, or all that were published when
    /// the process died.
    pub fn read(&mut self, storage: &impl Storage, appended: Option<Lsn>) -> Vec<Record> {
        let mut records = Vec::new();
        while appended.is_none_or(|appended| self.seen < appended.0) {
            let mut found = self.find(storage);
            if found.is_none() {
                // Released, and overwritten by the one behind it.
                (self.frame, self.position) = (self.frame + 1, self.end);
                found = self.find(storage);
            }
            let Some((position, blocks, entries)) = found else {
                if appended.is_none() {
                    break;
                }
                panic!(
                    "record {} has its LSN, and frame {} is not in the ring at block {} or 0",
                    self.seen + 1,
                    self.frame,
                    self.position
                );
            };
            (self.position, self.end) = (position, position + blocks);
            let bytes = area(storage, position, blocks);
            let seen = self.seen;
            for entry in entries.iter().filter(|entry| entry.lsn.0 > seen) {
                assert_eq!(entry.lsn.0, self.seen + 1, "LSNs go up by one");
                let start = entry.payload_position as usize * BLOCK_SIZE;
                let len = entry.payload_blocks() as usize * BLOCK_SIZE;
                records.push(record(entry, bytes[start..start + len].to_vec()));
                self.seen = entry.lsn.0;
            }
            if appended.is_none_or(|appended| self.seen < appended.0) {
                // What else there is stands in the frame behind this one.
                self.position = position + blocks;
                self.frame += 1;
            }
        }
        records
    }

    /// When a process died right after it had closed frames that were never looked at here: goes on at
    /// the first of them that is in the ring, wherever it is. Returns the records before it that have
    /// been released and are in the log only. (An open frame is not trusted: it may be half a new one
    /// in what an old one has left.)
    pub fn skip(&mut self, storage: &impl Storage) -> Option<Range<u64>> {
        let frames = (0..self.area_blocks).filter_map(|position| {
            let RingDescriptor::Closed(closed) =
                RingDescriptor::decode(area(storage, position, 1)).ok()?
            else {
                return None;
            };
            let start = closed.header.start;
            let unseen = start.incarnation == self.incarnation && start.first_lsn.0 > self.seen;
            unseen.then_some((start.number, position, start.first_lsn.0))
        });
        let (frame, position, first_lsn) = frames.min()?;
        let missing = self.seen + 1..first_lsn;
        (self.frame, self.position, self.seen) = (frame, position, first_lsn - 1);
        Some(missing)
    }

    fn find(&self, storage: &impl Storage) -> Option<(u64, u64, Vec<Entry>)> {
        let candidates = [self.position, 0];
        candidates.into_iter().find_map(|position| {
            if position >= self.area_blocks {
                return None;
            }
            let block = area(storage, position, 1);
            let (header, entries) = match RingDescriptor::decode(block).ok()? {
                RingDescriptor::Closed(closed) => (closed.header, Some(closed.entries)),
                RingDescriptor::Open(open) => (open.header, None),
            };
            let ours = (header.start.incarnation, header.start.number);
            if ours != (self.incarnation, self.frame) || header.start.first_lsn.0 > self.seen + 1 {
                return None;
            }
            let blocks = u64::from(header.frame_blocks());
            let entries = match entries {
                Some(entries) => entries,
                None => {
                    let RingDescriptor::Open(open) = RingDescriptor::decode(block).ok()? else {
                        return None;
                    };
                    let whole = area(storage, position, blocks);
                    open.entries(whole).expect("what is published is whole")
                }
            };
            Some((position, blocks, entries))
        })
    }
}

fn area(storage: &impl Storage, position: u64, blocks: u64) -> &[u8] {
    let start = (position as usize + 1) * BLOCK_SIZE;
    storage.ring(start, blocks as usize * BLOCK_SIZE)
}

fn record(entry: &Entry, payload: Vec<u8>) -> Record {
    Record {
        lsn: entry.lsn.0,
        op: entry.op,
        disk: entry.disk,
        first_block: entry.first_block,
        block_count: entry.block_count,
        payload,
    }
}

/// These records of the log file.
///
/// # Errors
/// The log does not hold them.
pub fn read_log(file: WorldFile, lsns: Range<u64>) -> Result<Vec<Record>, SourceError> {
    if lsns.is_empty() {
        return Ok(Vec::new());
    }
    let (from, to) = (lsns.start, lsns.end - 1);
    let mut log = FollowedLog::open(file)?;
    let mut records = Vec::new();
    let mut next = from;
    while next <= to {
        let batch = log.read(Lsn(next), Lsn(to))?;
        if batch.records.is_empty() {
            return Err(SourceError::Gone(Lsn(next)));
        }
        for found in batch
            .records
            .into_iter()
            .filter(|found| found.meta.lsn.0 <= to)
        {
            next = found.meta.lsn.0 + 1;
            records.push(Record {
                lsn: found.meta.lsn.0,
                op: found.meta.op,
                disk: found.meta.disk,
                first_block: found.meta.first_block,
                block_count: found.meta.block_count,
                payload: found.payload.to_vec(),
            });
        }
    }
    Ok(records)
}
