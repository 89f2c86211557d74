//! What `log inspect` shows: superblocks, frames, entries, and where the log ends and why. Only
//! reads, takes no locks; beside a running engine the end may move while it looks.

use super::error::Absence;
use super::reader::{ChainRules, IncarnationRule, LogSource, Probe, READAHEAD_SCAN, Window};
use super::{LogHead, Placement, area_offset};
use crate::engine::blocking::StorageError;
use crate::io::buffer::AlignedBuffer;
use afterimage_format::frame::Descriptor;
use afterimage_format::ids::{BLOCK_SIZE, Lsn};
use afterimage_format::superblock::{SUPERBLOCK_COPIES, Superblock, SuperblockError, choose};

/// The superblocks of a log.
#[derive(Debug)]
pub struct InspectedSuperblocks {
    /// Copies A and B as they stand.
    pub copies: [Result<Superblock, SuperblockError>; 2],
    /// The one that counts.
    pub current: Result<Superblock, SuperblockError>,
}

/// One frame of a log.
#[derive(Debug)]
pub struct InspectedFrame {
    /// Header and entries; the payloads were checked.
    pub descriptor: Descriptor,
    /// Where it stands in the area.
    pub placement: Placement,
    /// Byte offset in the file.
    pub offset: u64,
}

/// Where a log ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InspectedEnd {
    /// Where the next frame would go.
    pub head: LogHead,
    /// Last LSN.
    pub last: Lsn,
    /// Frames from tail to end.
    pub frames: u64,
    /// What stands behind the last frame.
    pub absence: Absence,
    /// Byte offset of that.
    pub offset: u64,
    /// The end lies below what the superblock says was durable: the log is corrupt.
    pub below_durable: bool,
}

/// Reads the superblocks.
///
/// # Errors
/// The file cannot be read.
pub fn superblocks(source: &mut impl LogSource) -> Result<InspectedSuperblocks, StorageError> {
    let len = SUPERBLOCK_COPIES as usize * BLOCK_SIZE;
    let (mut buffer, got) = source.read(0, AlignedBuffer::new(len))?;
    buffer[got..].fill(0);
    let (a, b) = buffer.split_at(BLOCK_SIZE);
    Ok(InspectedSuperblocks {
        copies: [Superblock::decode(a, 0), Superblock::decode(b, 1)],
        current: choose([a, b]),
    })
}

/// Goes through the frames from the tail on; `visit` sees each and says whether to go on.
///
/// # Errors
/// The file cannot be read.
pub fn frames(
    source: &mut impl LogSource,
    superblock: &Superblock,
    mut visit: impl FnMut(InspectedFrame) -> bool,
) -> Result<Option<InspectedEnd>, StorageError> {
    let rules = ChainRules {
        log: superblock.log,
        area_blocks: superblock.area_blocks,
        incarnation: Some(IncarnationRule {
            current: superblock.incarnation,
            first_frame: superblock.incarnation_frame,
        }),
    };
    let mut head = LogHead::at_tail(&superblock.tail);
    let mut window = Window::new(superblock.area_blocks, READAHEAD_SCAN);
    let mut frames = 0;
    let (absence, position) = loop {
        let used = head.blocks_since(&superblock.tail, rules.area_blocks);
        if used >= rules.area_blocks {
            break (Absence::Full, head.position);
        }
        match window.probe_both(source, &rules, &head, &|_| false)? {
            (Probe::Frame(descriptor, placement), position) => {
                if used + placement.blocks_taken > rules.area_blocks {
                    break (Absence::Full, position);
                }
                head = head.after(
                    rules.area_blocks,
                    placement,
                    &descriptor.header,
                    descriptor.header_crc,
                );
                frames += 1;
                let offset = area_offset(placement.position);
                let frame = InspectedFrame {
                    descriptor,
                    placement,
                    offset,
                };
                if !visit(frame) {
                    return Ok(None);
                }
            }
            (Probe::Absent(absence), position) => break (absence, position),
            (Probe::Passed(..), _) => unreachable!("nothing was to be passed"),
        }
    };
    let last = Lsn(head.lsn.0 - 1);
    Ok(Some(InspectedEnd {
        head,
        last,
        frames,
        absence,
        offset: area_offset(position),
        below_durable: last < superblock.durable,
    }))
}
