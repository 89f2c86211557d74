//! Reading frames along the chain, each checked before anyone sees it.
//!
//! Used by the scan, by replay, by shipping (from a read-only descriptor of its own, beside the
//! engine that appends) and by `log inspect`. Nothing is written here.

use super::error::Absence;
use super::{LogHead, Placement, area_offset};
use crate::engine::blocking::{Blocking, StorageError};
use crate::io::buffer::AlignedBuffer;
use crate::io::file::StorageFile;
use crate::io::{FileId, Storage};
use afterimage_format::frame::{Descriptor, FRAME_BLOCKS_MAX, FrameHeader};
use afterimage_format::ids::{BLOCK_SIZE, LogId, Lsn};
use std::path::PathBuf;

#[cfg(test)]
#[path = "reader_tests.rs"]
mod tests;

/// Where the bytes of a log come from.
pub trait LogSource {
    /// What people call it.
    fn path(&self) -> PathBuf;

    /// Fills the buffer from the file; the count is short at the end of the file only.
    ///
    /// # Errors
    /// The error of the operating system, with the file's name.
    fn read(
        &mut self,
        offset: u64,
        buffer: AlignedBuffer,
    ) -> Result<(AlignedBuffer, usize), StorageError>;
}

/// A log that is open in a storage.
pub struct StorageSource<'b, 'a, S: Storage> {
    /// The storage.
    pub blocking: &'b mut Blocking<'a, S>,
    /// Which file of it.
    pub file: FileId,
}

impl<S: Storage> LogSource for StorageSource<'_, '_, S> {
    fn path(&self) -> PathBuf {
        self.blocking.names().of(self.file)
    }

    fn read(
        &mut self,
        offset: u64,
        buffer: AlignedBuffer,
    ) -> Result<(AlignedBuffer, usize), StorageError> {
        self.blocking.read(self.file, offset, buffer)
    }
}

/// A descriptor of its own, beside that of the engine. Blocks.
impl LogSource for StorageFile {
    fn path(&self) -> PathBuf {
        Self::path(self).to_owned()
    }

    fn read(
        &mut self,
        offset: u64,
        mut buffer: AlignedBuffer,
    ) -> Result<(AlignedBuffer, usize), StorageError> {
        match self.read_at(offset, &mut buffer) {
            Ok(got) => Ok((buffer, got)),
            Err(source) => Err(StorageError {
                path: self.path().to_owned(),
                action: "read",
                offset,
                source,
            }),
        }
    }
}

/// Which frames may stand in a log, as far as the chain does not say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChainRules {
    /// The log.
    pub log: LogId,
    /// Blocks of its area.
    pub area_blocks: u64,
    /// Which incarnation wrote which frames; `None` for a reader that follows the writer.
    pub incarnation: Option<IncarnationRule>,
}

/// Frames from `first_frame` on are of `current`, those before it of an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IncarnationRule {
    /// The incarnation of the newest frames.
    pub current: u32,
    /// The number of its first frame.
    pub first_frame: u64,
}

impl IncarnationRule {
    fn allows(self, header: &FrameHeader) -> bool {
        if header.start.number >= self.first_frame {
            header.start.incarnation == self.current
        } else {
            header.start.incarnation < self.current
        }
    }
}

/// One frame that passed every check.
#[derive(Debug)]
pub struct FrameView<'a> {
    /// Header and entries.
    pub descriptor: Descriptor,
    /// Everything behind the descriptor.
    pub payload: &'a [u8],
    /// Where it stands.
    pub placement: Placement,
}

/// Why a reader cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The log cannot be read.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The next frame is not where it must be. If the log's tail has passed it meanwhile it was
    /// overwritten; otherwise the log is corrupt.
    #[error("frame {frame} (LSN {lsn} on) at byte {offset} of the log {found}")]
    NotThere {
        /// Its number.
        frame: u64,
        /// Its first LSN.
        lsn: Lsn,
        /// Where it was due.
        offset: u64,
        /// What is there.
        found: Absence,
    },
}

/// What stands at a place where the next frame may be.
#[derive(Debug)]
pub(super) enum Probe {
    /// The next frame, whole.
    Frame(Descriptor, Placement),
    /// The next frame by its header alone, with the header's checksum: the caller has no use for
    /// what is in it, and nothing of it was looked at.
    Passed(FrameHeader, u32, Placement),
    /// Something else.
    Absent(Absence),
}

/// A part of the area in memory.
#[derive(Debug)]
pub(super) struct Window {
    area_blocks: u64,
    readahead_blocks: u64,
    start: u64,
    blocks: u64,
    buffer: Option<AlignedBuffer>,
    /// Length of the frame that was passed last: behind a long one only a header is read.
    passed_blocks: u64,
}

/// Frames of so many blocks are passed with one read of a block each; shorter ones share a read.
const LONG_FRAME_BLOCKS: u64 = 16;

impl Window {
    pub(super) fn new(area_blocks: u64, readahead_blocks: u64) -> Self {
        Self {
            area_blocks,
            readahead_blocks,
            start: 0,
            blocks: 0,
            buffer: None,
            passed_blocks: 0,
        }
    }

    pub(super) fn forget(&mut self) {
        self.blocks = 0;
    }

    /// Makes sure that this run of the area is in memory. The caller has checked that it is within
    /// the area; what the file lacks reads as zero.
    pub(super) fn load(
        &mut self,
        source: &mut impl LogSource,
        first: u64,
        blocks: u64,
    ) -> Result<(), StorageError> {
        self.load_with(source, first, blocks, self.readahead_blocks)
    }

    fn load_with(
        &mut self,
        source: &mut impl LogSource,
        first: u64,
        blocks: u64,
        readahead_blocks: u64,
    ) -> Result<(), StorageError> {
        debug_assert!(first + blocks <= self.area_blocks);
        if first >= self.start && first + blocks <= self.start + self.blocks {
            return Ok(());
        }
        let want = blocks.max(readahead_blocks).min(self.area_blocks - first);
        let len = want as usize * BLOCK_SIZE;
        let mut buffer = match self.buffer.take() {
            Some(buffer) if buffer.capacity() >= len => buffer,
            _ => AlignedBuffer::new(len),
        };
        buffer.set_len(len);
        self.blocks = 0;
        let (mut buffer, got) = source.read(area_offset(first), buffer)?;
        buffer[got..].fill(0);
        self.buffer = Some(buffer);
        self.start = first;
        self.blocks = want;
        Ok(())
    }

    /// A run that was loaded.
    pub(super) fn bytes(&self, first: u64, blocks: u64) -> &[u8] {
        let start = (first - self.start) as usize * BLOCK_SIZE;
        let buffer = self.buffer.as_ref().expect("loaded before it is looked at");
        &buffer[start..start + blocks as usize * BLOCK_SIZE]
    }

    /// Looks for the frame that follows `head` at one place. Where `passes` says so its header is
    /// enough.
    fn probe(
        &mut self,
        source: &mut impl LogSource,
        rules: &ChainRules,
        head: &LogHead,
        position: u64,
        passes: &impl Fn(&FrameHeader) -> bool,
    ) -> Result<Probe, StorageError> {
        let readahead = match self.passed_blocks >= LONG_FRAME_BLOCKS {
            true => 1,
            false => self.readahead_blocks,
        };
        self.load_with(source, position, 1, readahead)?;
        let (header, crc) = match Descriptor::decode_header(self.bytes(position, 1)) {
            Ok(decoded) => decoded,
            Err(error) => return Ok(Probe::Absent(Absence::NoFrame(error))),
        };
        let placement = match follows(rules, head, position, &header) {
            Ok(placement) => placement,
            Err(absence) => return Ok(Probe::Absent(absence)),
        };
        let blocks = u64::from(header.frame_blocks());
        if passes(&header) {
            self.passed_blocks = blocks;
            return Ok(Probe::Passed(header, crc, placement));
        }
        self.passed_blocks = 0;
        self.load(source, position, blocks)?;
        match Descriptor::decode_frame(self.bytes(position, blocks)) {
            Ok(descriptor) => Ok(Probe::Frame(descriptor, placement)),
            Err(error) => Ok(Probe::Absent(Absence::Damaged(error))),
        }
    }

    /// Looks for the frame that follows `head` at both places where it may be. If it is at
    /// neither: the more telling reason and its place.
    pub(super) fn probe_both(
        &mut self,
        source: &mut impl LogSource,
        rules: &ChainRules,
        head: &LogHead,
        passes: &impl Fn(&FrameHeader) -> bool,
    ) -> Result<(Probe, u64), StorageError> {
        let mut here = None;
        if head.position < rules.area_blocks {
            match self.probe(source, rules, head, head.position, passes)? {
                Probe::Absent(absence) => here = Some(absence),
                frame => return Ok((frame, head.position)),
            }
        }
        // At the start only what does not fit here.
        if head.position > 0 && rules.area_blocks - head.position < u64::from(FRAME_BLOCKS_MAX) {
            match self.probe(source, rules, head, 0, passes)? {
                Probe::Absent(absence) => {
                    if here.is_none() || matches!(absence, Absence::Damaged(_)) {
                        return Ok((Probe::Absent(absence), 0));
                    }
                }
                frame => return Ok((frame, 0)),
            }
        }
        let absence = here.expect("a position is within the area or past its start");
        Ok((Probe::Absent(absence), head.position))
    }
}

/// Whether a valid header continues the chain at this place.
fn follows(
    rules: &ChainRules,
    head: &LogHead,
    position: u64,
    header: &FrameHeader,
) -> Result<Placement, Absence> {
    let start = &header.start;
    if start.log != rules.log {
        return Err(Absence::OtherLog(start.log));
    }
    if start.number != head.frame {
        return Err(Absence::OtherFrame(start.number));
    }
    let incarnation_fits = rules.incarnation.is_none_or(|rule| rule.allows(header));
    if start.previous_crc != head.previous_crc || start.first_lsn != head.lsn || !incarnation_fits {
        return Err(Absence::OtherHistory);
    }
    let placement = head.place(rules.area_blocks, header.frame_blocks());
    let fits = placement.position + u64::from(header.frame_blocks()) <= rules.area_blocks;
    if placement.position != position || placement.lap != header.lap || !fits {
        return Err(Absence::Misplaced);
    }
    Ok(placement)
}

/// Reads a log frame by frame from some place on.
#[derive(Debug)]
pub struct LogReader {
    rules: ChainRules,
    head: LogHead,
    window: Window,
    loaded_until: Lsn,
}

/// Blocks that a reader takes in at once when it goes through a whole log.
pub const READAHEAD_SCAN: u64 = 2048;
/// Blocks that a reader takes in at once when it follows the writer.
pub const READAHEAD_FOLLOW: u64 = 32;

impl LogReader {
    /// A reader that begins with the frame at `head`, which a [`super::directory::Directory`], a
    /// scan or a superblock's tail has named.
    #[must_use]
    pub fn new(rules: ChainRules, head: LogHead, readahead_blocks: u64) -> Self {
        Self {
            rules,
            head,
            window: Window::new(rules.area_blocks, readahead_blocks),
            loaded_until: Lsn::ZERO,
        }
    }

    /// Where the next frame is.
    #[must_use]
    pub fn head(&self) -> LogHead {
        self.head
    }

    /// Goes on behind the next frame, which somebody else has read and checked, as part of this chain
    /// too.
    pub fn pass(&mut self, frame: &Descriptor) -> Placement {
        let area_blocks = self.rules.area_blocks;
        let placement = self.head.place(area_blocks, frame.header.frame_blocks());
        self.head = self
            .head
            .after(area_blocks, placement, &frame.header, frame.header_crc);
        placement
    }

    /// The next frame if it lies wholly at or below `until`, to which the log must be durable;
    /// `None` when everything up to there was read.
    ///
    /// # Errors
    /// The log cannot be read, or the frame is not there.
    pub fn next(
        &mut self,
        source: &mut impl LogSource,
        until: Lsn,
    ) -> Result<Option<FrameView<'_>>, ReadError> {
        if self.head.lsn > until {
            return Ok(None);
        }
        let Probe::Frame(descriptor, placement) = self.find(source, until, |_| false)? else {
            unreachable!("nothing was to be passed");
        };
        if descriptor.header.last_lsn() > until {
            return Ok(None);
        }
        self.head = self.head.after(
            self.rules.area_blocks,
            placement,
            &descriptor.header,
            descriptor.header_crc,
        );
        let payload = self.window.bytes(
            placement.position + 1,
            u64::from(descriptor.header.payload_blocks),
        );
        Ok(Some(FrameView {
            descriptor,
            payload,
            placement,
        }))
    }

    /// Passes the next frame if all of it lies below `lsn` and at or below `until`, to which the log
    /// must be durable. Only its header is read and checked; the chain goes on through that.
    ///
    /// # Errors
    /// As [`LogReader::next`].
    pub fn pass_before(
        &mut self,
        source: &mut impl LogSource,
        lsn: Lsn,
        until: Lsn,
    ) -> Result<Option<Placement>, ReadError> {
        if self.head.lsn >= lsn || self.head.lsn > until {
            return Ok(None);
        }
        let passes = |header: &FrameHeader| header.last_lsn() < lsn && header.last_lsn() <= until;
        let Probe::Passed(header, crc, placement) = self.find(source, until, passes)? else {
            return Ok(None);
        };
        self.head = self
            .head
            .after(self.rules.area_blocks, placement, &header, crc);
        Ok(Some(placement))
    }

    fn find(
        &mut self,
        source: &mut impl LogSource,
        until: Lsn,
        passes: impl Fn(&FrameHeader) -> bool,
    ) -> Result<Probe, ReadError> {
        let (rules, head) = (&self.rules, &self.head);
        let mut found = self.window.probe_both(source, rules, head, &passes)?;
        if matches!(found.0, Probe::Absent(_)) && self.loaded_until < until {
            // The window may be older than the frame.
            self.window.forget();
            self.loaded_until = until;
            found = self.window.probe_both(source, rules, head, &passes)?;
        }
        match found {
            (Probe::Absent(found), position) => Err(ReadError::NotThere {
                frame: self.head.frame,
                lsn: self.head.lsn,
                offset: area_offset(position),
                found,
            }),
            (frame, _) => Ok(frame),
        }
    }
}
