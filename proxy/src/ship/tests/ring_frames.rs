//! Frames out of the ring: as good as those of the log, and read from there whenever they are not.

use super::log_file::{Counted, Writer, assert_records};
use crate::engine::log::reader::READAHEAD_FOLLOW;
use crate::io::file::{OpenOptions, StorageFile};
use crate::ship::log_source::FollowedLog;
use crate::ship::source::Record;
use afterimage_format::ids::{BLOCK_SIZE, BootId, GroupId, LogId, Lsn};
use afterimage_format::ring_header::{NextToPersist, RING_AREA_OFFSET, RING_NEXT_WORD, RingHeader};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const RING_BLOCKS: u64 = 64;
const BLOCK: u64 = BLOCK_SIZE as u64;

/// A log and a ring in front of it, both written as an engine does.
struct Site {
    _folder: tempfile::TempDir,
    log: Writer,
    log_path: PathBuf,
    ring_path: PathBuf,
    ring: File,
    /// Where the next frame goes in the ring if it fits.
    position: u64,
    /// Where the newest frame stands.
    newest: u64,
}

impl Site {
    fn new(log: [u8; 16], incarnation: u32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (log_path, ring_path) = (folder.path().join("log"), folder.path().join("ring"));
        let ring = File::create_new(&ring_path).unwrap();
        ring.set_len((RING_BLOCKS + 1) * BLOCK).unwrap();
        let header = RingHeader {
            group: GroupId::from_bytes([1; 16]),
            log: LogId::from_bytes(log),
            boot: BootId::from_bytes([3; 16]),
            incarnation,
            area_blocks: RING_BLOCKS,
        };
        ring.write_all_at(&header.encode(), 0).unwrap();
        let site = Self {
            log: Writer::new(&log_path),
            _folder: folder,
            log_path,
            ring_path,
            ring,
            position: 0,
            newest: 0,
        };
        site.store_next();
        site
    }

    /// The next frame to become durable is the one that comes next.
    fn store_next(&self) {
        let next = NextToPersist::new(self.position as u32, self.log.head.frame);
        self.ring
            .write_all_at(&next.word().to_le_bytes(), RING_NEXT_WORD as u64)
            .unwrap();
    }

    fn append(&mut self, blocks: u32) {
        self.append_unsynced(blocks);
        self.store_next();
    }

    /// Written to ring and log, and not known to be durable.
    fn append_unsynced(&mut self, blocks: u32) {
        let frame = self.log.append(blocks);
        let need = u64::from(blocks) + 1;
        if self.position + need > RING_BLOCKS {
            self.position = 0;
        }
        self.newest = self.position;
        self.ring
            .write_all_at(&frame, ring_offset(self.position))
            .unwrap();
        self.position += need;
    }

    fn follow(&self) -> Followed {
        let bytes = Arc::new(AtomicU64::new(0));
        let file = StorageFile::open(&self.log_path, &OpenOptions::reader()).unwrap();
        let mut log = FollowedLog::open(Counted {
            file,
            bytes: bytes.clone(),
        })
        .unwrap();
        log.follow_ring(Box::new(File::open(&self.ring_path).unwrap()));
        bytes.store(0, Ordering::Relaxed);
        Followed {
            log,
            bytes,
            next: Lsn(1),
        }
    }
}

const fn ring_offset(position: u64) -> u64 {
    RING_AREA_OFFSET as u64 + position * BLOCK
}

struct Followed {
    log: FollowedLog<Counted>,
    /// Bytes that were read of the log's file.
    bytes: Arc<AtomicU64>,
    next: Lsn,
}

impl Followed {
    /// Reads on up to this record and checks what came.
    fn read(&mut self, durable: Lsn) {
        let first = self.next;
        let mut records: Vec<Record> = Vec::new();
        loop {
            let batch = self.log.read(self.next, durable).unwrap();
            let Some(last) = batch.records.last() else {
                break;
            };
            self.next = last.meta.lsn.next();
            records.extend(batch.records);
        }
        assert_records(&records, first.0, durable);
        for record in records.iter().filter(|record| !record.payload.is_empty()) {
            assert!(record.payload.iter().all(|b| *b == record.meta.lsn.0 as u8));
        }
    }

    fn log_bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

#[test]
fn what_is_still_in_the_ring_is_not_read_from_the_log() {
    let mut site = Site::new([2; 16], 1);
    let mut followed = site.follow();
    // Around the ring many times, around the log three times: that costs a look at the superblock. The
    // first frame had become durable when the ring's header was first looked at.
    let mut round = 0;
    while site.log.head.lap < 3 {
        round += 1;
        let trimmed = site.log.head.lsn;
        site.append(round % 21 + 1);
        followed.read(site.log.last());
        site.log.trim_to(trimmed);
    }
    assert!(round > 200, "{round}");
    let blocks = followed.log_bytes() / BLOCK;
    let most = READAHEAD_FOLLOW + 3 * 4;
    assert!(blocks <= most, "{blocks} blocks of the log were read");
}

#[test]
fn a_reader_that_comes_late_finds_its_way_into_the_ring() {
    let mut site = Site::new([2; 16], 1);
    for _ in 0..40 {
        site.append(5);
    }
    // Most of this has left the ring.
    let mut followed = site.follow();
    followed.read(site.log.last());
    let late = followed.log_bytes();
    assert!(late >= 30 * 6 * BLOCK, "{late} bytes of the log were read");
    for _ in 0..40 {
        site.append(5);
        followed.read(site.log.last());
    }
    assert_eq!(followed.log_bytes(), late);
}

#[test]
fn a_frame_that_is_damaged_or_overwritten_in_the_ring_comes_from_the_log() {
    let mut site = Site::new([2; 16], 1);
    let mut followed = site.follow();
    // In a header, an entry, a payload; each time the reader finds back into the ring afterwards.
    for at in [20, 150, BLOCK + 1000] {
        site.append(3);
        site.ring
            .write_all_at(&[0xEE], ring_offset(site.newest) + at)
            .unwrap();
        let before = followed.log_bytes();
        followed.read(site.log.last());
        assert!(followed.log_bytes() > before, "damage at {at} was taken");
        // The ring's header names the frame behind this one.
        site.append(3);
        followed.read(site.log.last());
        let before = followed.log_bytes();
        for _ in 0..READAHEAD_FOLLOW {
            site.append(3);
            followed.read(site.log.last());
        }
        assert_eq!(followed.log_bytes(), before, "after damage at {at}");
    }
    // More than the ring holds, at once.
    for _ in 0..40 {
        site.append(5);
    }
    followed.read(site.log.last());
}

#[test]
fn nothing_comes_out_of_the_ring_that_is_not_durable() {
    let mut site = Site::new([2; 16], 1);
    let mut followed = site.follow();
    for _ in 0..2 {
        site.append(1);
        followed.read(site.log.last());
    }
    let durable = site.log.last();
    site.append_unsynced(1);
    // Not before, and not when half of it is.
    for durable in [durable, durable.next()] {
        let batch = followed.log.read(followed.next, durable).unwrap();
        assert!(batch.records.is_empty(), "{durable}");
    }
    followed.read(site.log.last());
}

#[test]
fn the_ring_of_another_log_or_another_start_is_left_alone() {
    for (log, incarnation) in [([9; 16], 1), ([2; 16], 7)] {
        let mut site = Site::new(log, incarnation);
        let mut followed = site.follow();
        for _ in 0..6 {
            site.append(20);
            followed.read(site.log.last());
        }
        let blocks = followed.log_bytes() / BLOCK;
        assert!(blocks >= 6 * 21, "{blocks} blocks of the log were read");
    }
}
