//! The source over a real log file, beside a writer that wraps around and trims.

use crate::engine::blocking::StorageError;
use crate::engine::log::LogHead;
use crate::engine::log::area_offset;
use crate::engine::log::create::{NewLog, create};
use crate::engine::log::error::Absence;
use crate::engine::log::reader::{ChainRules, LogReader, LogSource, READAHEAD_FOLLOW, ReadError};
use crate::engine::log::superblock::{copy_offset, peek};
use crate::io::buffer::AlignedBuffer;
use crate::io::file::{OpenOptions, StorageFile};
use crate::ship::log_source::LogFileSource;
use crate::ship::source::{Record, RecordSource, SourceError};
use afterimage_format::checksum::crc32c;
use afterimage_format::frame::decode::encode_descriptor;
use afterimage_format::frame::{Entry, FrameHeader, FrameStart};
use afterimage_format::ids::{BLOCK_SIZE, BootId, DiskId, DiskIndex, GroupId, LogId, Lsn};
use afterimage_format::op::Op;
use afterimage_format::superblock::DiskState;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Appends frames to a log as an engine would.
pub(super) struct Writer {
    path: PathBuf,
    pub(super) file: std::fs::File,
    pub(super) head: LogHead,
    /// Heads before each frame.
    pub(super) frames: Vec<LogHead>,
    area_blocks: u64,
}

impl Writer {
    pub(super) fn new(path: &Path) -> Self {
        let new = NewLog {
            group: GroupId::from_bytes([1; 16]),
            log: LogId::from_bytes([2; 16]),
            size: 4 << 20,
            disks: vec![DiskState {
                id: DiskId::from_bytes([4; 16]),
                size: 1 << 20,
                removed: false,
            }],
            sinks: Vec::new(),
            boot: BootId::from_bytes([3; 16]),
            now_ns: 1,
        };
        drop(create(path, &new).unwrap());
        let superblock =
            peek(&mut StorageFile::open(path, &OpenOptions::reader()).unwrap()).unwrap();
        Self {
            path: path.to_owned(),
            file: std::fs::OpenOptions::new().write(true).open(path).unwrap(),
            head: LogHead::at_tail(&superblock.tail),
            frames: Vec::new(),
            area_blocks: superblock.area_blocks,
        }
    }

    pub(super) fn last(&self) -> Lsn {
        Lsn(self.head.lsn.0 - 1)
    }

    /// A frame with a write of `blocks` blocks and a trim. Gives its bytes.
    pub(super) fn append(&mut self, blocks: u32) -> Vec<u8> {
        let lsn = self.head.lsn;
        let payload = vec![lsn.0 as u8; blocks as usize * BLOCK_SIZE];
        let write = Entry {
            lsn,
            op: Op::Write,
            disk: DiskIndex(0),
            first_block: lsn.0,
            block_count: blocks,
            payload_position: 1,
            payload_crc: crc32c(&payload),
            wall_ns: lsn.0,
            aux: 0,
        };
        let trim = Entry {
            lsn: lsn.next(),
            op: Op::Trim,
            payload_position: 0,
            payload_crc: 0,
            ..write
        };
        let placement = self.head.place(self.area_blocks, blocks + 1);
        let header = FrameHeader {
            start: FrameStart {
                log: LogId::from_bytes([2; 16]),
                incarnation: 1,
                number: self.head.frame,
                first_lsn: lsn,
                wall_ns: lsn.0,
                boottime_ns: 5,
                boot: BootId::from_bytes([3; 16]),
                previous_crc: self.head.previous_crc,
            },
            entry_count: 2,
            payload_blocks: blocks,
            durable_lsn: Lsn::ZERO,
            lap: placement.lap,
        };
        let (block, crc) = encode_descriptor(&header, &[write, trim]);
        let at = area_offset(placement.position);
        let bytes = [&block, &payload[..]].concat();
        self.file.write_all_at(&bytes, at).unwrap();
        self.frames.push(self.head);
        self.head = self.head.after(self.area_blocks, placement, &header, crc);
        bytes
    }

    /// Moves the tail to the frame that begins with this record.
    pub(super) fn trim_to(&mut self, lsn: Lsn) {
        let mut log = StorageFile::open(&self.path, &OpenOptions::reader()).unwrap();
        let mut superblock = peek(&mut log).unwrap();
        let frame = self.frames.iter().find(|head| head.lsn == lsn).unwrap();
        superblock.tail = frame.as_tail();
        superblock.destaged = Lsn(lsn.0 - 1);
        superblock.durable = self.last();
        superblock.generation += 1;
        let at = copy_offset(superblock.generation);
        self.file.write_all_at(&superblock.encode(), at).unwrap();
    }
}

async fn read_all(source: &mut LogFileSource, durable: Lsn) -> Vec<Record> {
    let mut records = Vec::new();
    loop {
        let batch = source.read(durable).await.unwrap();
        if batch.records.is_empty() {
            return records;
        }
        records.extend(batch.records);
    }
}

pub(super) fn assert_records(records: &[Record], first: u64, last: Lsn) {
    let lsns: Vec<u64> = records.iter().map(|r| r.meta.lsn.0).collect();
    assert_eq!(lsns, (first..=last.0).collect::<Vec<u64>>());
    for record in records {
        assert_eq!(crc32c(&record.payload), record.meta.payload_crc);
    }
}

#[tokio::test]
async fn records_are_read_up_to_the_durable_bound_and_around_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm1.log");
    let mut writer = Writer::new(&path);
    let mut source = LogFileSource::new(&path, Path::new("/nowhere"));
    assert_eq!(read_all(&mut source, Lsn::ZERO).await, []);
    let mut next = 1;
    // Several times around, the tail close behind.
    let mut round = 0;
    while writer.head.lap < 3 {
        round += 1;
        let trimmed = writer.head.lsn;
        writer.append(round % 40 + 1);
        let durable = writer.last();
        let records = read_all(&mut source, durable).await;
        assert_records(&records, next, durable);
        next = durable.0 + 1;
        writer.trim_to(trimmed);
    }
}

#[tokio::test]
async fn a_source_goes_back_and_into_the_middle_of_frames() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm1.log");
    let mut writer = Writer::new(&path);
    for _ in 0..20 {
        writer.append(3);
    }
    let durable = writer.last();
    let mut source = LogFileSource::new(&path, Path::new("/nowhere"));
    for first in [1, 2, 40, 17, 18, 1, 39] {
        source.seek(Lsn(first)).await.unwrap();
        assert_records(&read_all(&mut source, durable).await, first, durable);
    }
    // To a record that is still to come.
    source.seek(Lsn(41)).await.unwrap();
    assert_eq!(read_all(&mut source, durable).await, []);
    writer.append(1);
    assert_records(
        &read_all(&mut source, writer.last()).await,
        41,
        writer.last(),
    );
}

#[tokio::test]
async fn what_was_overwritten_is_gone_and_what_was_not_is_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm1.log");
    let mut writer = Writer::new(&path);
    writer.append(40);
    writer.append(40);
    // Frames so long that none is in memory before it is asked for.
    let mut source = LogFileSource::new(&path, Path::new("/nowhere"));
    let mut damaged = LogFileSource::new(&path, Path::new("/nowhere"));
    assert_eq!(source.read(Lsn(2)).await.unwrap().records.len(), 2);
    assert_eq!(damaged.read(Lsn(2)).await.unwrap().records.len(), 2);
    // A flipped bit in a frame that nobody gave up.
    let start = area_offset(writer.frames[1].position) + BLOCK_SIZE as u64;
    writer.file.write_all_at(&[0xee], start).unwrap();
    let error = damaged.read(Lsn(4)).await.map(drop).unwrap_err();
    assert!(
        matches!(error, SourceError::Damaged { lsn: Lsn(3), .. }),
        "{error}"
    );
    // The tail passes, the space is written again.
    writer.append(40);
    let third = writer.frames[2].lsn;
    writer.trim_to(third);
    let error = source.read(Lsn(6)).await.map(drop).unwrap_err();
    assert!(matches!(error, SourceError::Gone(Lsn(3))), "{error}");
    // Opened anew, it goes on from the tail.
    source.seek(third).await.unwrap();
    assert_records(
        &read_all(&mut source, writer.last()).await,
        third.0,
        writer.last(),
    );
}

#[tokio::test]
async fn what_comes_before_damage_is_read_and_what_comes_behind_once_it_is_mended() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm1.log");
    let mut writer = Writer::new(&path);
    for _ in 0..4 {
        writer.append(1);
    }
    let (durable, third) = (writer.last(), writer.frames[2]);
    let byte = area_offset(third.position) + BLOCK_SIZE as u64;
    writer.file.write_all_at(&[0xee], byte).unwrap();
    let mut source = LogFileSource::new(&path, Path::new("/nowhere"));
    for first in [1, 3] {
        let records = source.read(durable).await.unwrap().records;
        assert_records(&records, first, Lsn(first + 1));
    }
    for _ in 0..2 {
        let error = source.read(durable).await.map(drop).unwrap_err();
        let damaged = matches!(error, SourceError::Damaged { lsn, .. } if lsn == third.lsn);
        assert!(damaged, "{error}");
    }
    let content = third.lsn.0 as u8;
    writer.file.write_all_at(&[content], byte).unwrap();
    assert_records(&read_all(&mut source, durable).await, third.lsn.0, durable);
}

/// A log file that counts what is read.
pub(super) struct Counted {
    pub(super) file: StorageFile,
    pub(super) bytes: Arc<AtomicU64>,
}

impl LogSource for Counted {
    fn path(&self) -> PathBuf {
        self.file.path().to_owned()
    }

    fn read(
        &mut self,
        offset: u64,
        buffer: AlignedBuffer,
    ) -> Result<(AlignedBuffer, usize), StorageError> {
        self.bytes.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        self.file.read(offset, buffer)
    }
}

#[test]
fn what_is_passed_costs_a_block_and_what_is_read_is_checked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let mut writer = Writer::new(&path);
    let frames = 30;
    for _ in 0..frames {
        writer.append(24);
    }
    // A flipped bit in the third frame's payload.
    let third = writer.frames[2];
    let at = area_offset(third.position) + BLOCK_SIZE as u64 + 77;
    writer.file.write_all_at(&[0xFF], at).unwrap();

    let mut source = Counted {
        file: StorageFile::open(&path, &OpenOptions::reader()).unwrap(),
        bytes: Arc::default(),
    };
    let rules = ChainRules {
        log: LogId::from_bytes([2; 16]),
        area_blocks: writer.area_blocks,
        incarnation: None,
    };
    let (last, wanted) = (writer.last(), writer.frames[frames - 1]);
    let mut reader = LogReader::new(rules, writer.frames[0], READAHEAD_FOLLOW);
    while reader
        .pass_before(&mut source, last, last)
        .unwrap()
        .is_some()
    {}
    assert_eq!(reader.head(), wanted);
    let blocks = source.bytes.load(Ordering::Relaxed) / BLOCK_SIZE as u64;
    assert!(
        blocks <= frames as u64 + 2 * READAHEAD_FOLLOW,
        "{blocks} blocks were read to pass {frames} frames"
    );
    let frame = reader.next(&mut source, last).unwrap().expect("the last");
    assert_eq!(frame.descriptor.entries[1].lsn, last);

    // Whoever reads what was passed finds the damage; a damaged header cannot be passed.
    let mut reader = LogReader::new(rules, third, READAHEAD_FOLLOW);
    let damaged = reader.next(&mut source, last).unwrap_err();
    assert!(
        matches!(
            damaged,
            ReadError::NotThere {
                found: Absence::Damaged(_),
                ..
            }
        ),
        "{damaged}"
    );
    let at = area_offset(third.position) + 40;
    writer.file.write_all_at(&[0xFF], at).unwrap();
    let mut reader = LogReader::new(rules, writer.frames[0], READAHEAD_FOLLOW);
    let stopped = loop {
        match reader.pass_before(&mut source, last, last) {
            Ok(Some(_)) => {}
            other => break other,
        }
    };
    assert!(stopped.is_err(), "{stopped:?}");
}
