//! Which frame continues the chain: each thing that says otherwise is enough to refuse one.

use super::*;
use crate::engine::log::LOG_AREA_OFFSET;
use afterimage_format::frame::decode::encode_descriptor;
use afterimage_format::frame::{Entry, FrameStart};
use afterimage_format::ids::{BootId, DiskIndex};
use afterimage_format::op::Op;

const AREA_BLOCKS: u64 = 16;

/// A log in memory.
struct Bytes(Vec<u8>);

impl LogSource for Bytes {
    fn path(&self) -> PathBuf {
        PathBuf::from("log")
    }

    fn read(
        &mut self,
        offset: u64,
        mut buffer: AlignedBuffer,
    ) -> Result<(AlignedBuffer, usize), StorageError> {
        let len = buffer.len();
        buffer.copy_from_slice(&self.0[offset as usize..offset as usize + len]);
        Ok((buffer, len))
    }
}

fn rules() -> ChainRules {
    ChainRules {
        log: LogId::from_bytes([1; 16]),
        area_blocks: AREA_BLOCKS,
        incarnation: Some(IncarnationRule {
            current: 3,
            first_frame: 20,
        }),
    }
}

fn head() -> LogHead {
    LogHead {
        position: 5,
        lap: 2,
        frame: 20,
        lsn: Lsn(100),
        previous_crc: 0xabcd,
    }
}

/// The header that continues [`head`].
fn header() -> FrameHeader {
    FrameHeader {
        start: FrameStart {
            log: rules().log,
            incarnation: 3,
            number: 20,
            first_lsn: Lsn(100),
            wall_ns: 1,
            boottime_ns: 2,
            boot: BootId::from_bytes([4; 16]),
            previous_crc: 0xabcd,
        },
        entry_count: 1,
        payload_blocks: 0,
        durable_lsn: Lsn(90),
        lap: 2,
    }
}

/// What a reader makes of a whole frame with this header where the next frame is due.
fn read(header: &FrameHeader) -> Result<Lsn, Absence> {
    let last = read_until(header, Lsn(1000))?;
    Ok(last.expect("not above the bound"))
}

/// The same, with a log that is durable to `until`; `None`: the frame is above it.
fn read_until(header: &FrameHeader, until: Lsn) -> Result<Option<Lsn>, Absence> {
    let first = header.start.first_lsn.0;
    let entries: Vec<Entry> = (first..first + u64::from(header.entry_count))
        .map(|lsn| Entry {
            lsn: Lsn(lsn),
            op: Op::Trim,
            disk: DiskIndex(0),
            first_block: 7,
            block_count: 1,
            payload_position: 0,
            payload_crc: 0,
            wall_ns: 1,
            aux: 0,
        })
        .collect();
    let (block, _) = encode_descriptor(header, &entries);
    let mut log = vec![0; LOG_AREA_OFFSET as usize + AREA_BLOCKS as usize * BLOCK_SIZE];
    let at = area_offset(head().position) as usize;
    log[at..at + BLOCK_SIZE].copy_from_slice(&block[..]);
    let mut reader = LogReader::new(rules(), head(), READAHEAD_FOLLOW);
    match reader.next(&mut Bytes(log), until) {
        Ok(frame) => Ok(frame.map(|frame| frame.descriptor.header.last_lsn())),
        Err(ReadError::NotThere { found, .. }) => Err(found),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn only_the_frame_that_continues_the_chain_is_taken() {
    assert_eq!(read(&header()), Ok(Lsn(100)));
    let start = |change: &dyn Fn(&mut FrameStart)| {
        let mut header = header();
        change(&mut header.start);
        read(&header)
    };
    let other = LogId::from_bytes([9; 16]);
    assert_eq!(start(&|s| s.log = other), Err(Absence::OtherLog(other)));
    assert_eq!(start(&|s| s.number = 19), Err(Absence::OtherFrame(19)));
    let history = Err(Absence::OtherHistory);
    assert_eq!(start(&|s| s.previous_crc ^= 1), history);
    assert_eq!(start(&|s| s.first_lsn = Lsn(99)), history);
    assert_eq!(start(&|s| s.incarnation = 2), history);
    assert_eq!(start(&|s| s.incarnation = 4), history);
    for lap in [0, 1, 3] {
        assert_eq!(
            read(&FrameHeader { lap, ..header() }),
            Err(Absence::Misplaced)
        );
    }
}

#[test]
fn a_frame_that_is_durable_in_part_is_not_read() {
    let header = FrameHeader {
        entry_count: 3,
        ..header()
    };
    for until in [99, 100, 101] {
        assert_eq!(read_until(&header, Lsn(until)), Ok(None));
    }
    assert_eq!(read_until(&header, Lsn(102)), Ok(Some(Lsn(102))));
}
