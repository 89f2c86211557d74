//! A pass: the allocated blocks of all disks, each read once, in (disk, block) order, packed into
//! pass segments. All-zero blocks are not sent: a full pass begins with everything zero.
//!
//! Owns: how far the pass is. Always holds: a segment is handed out with the LSN up to which the
//! log must be durable before it may leave. No I/O here: the session asks for [`Step`]s and brings
//! back what they gave.
#![deny(clippy::disallowed_methods)]

use super::cutter::Stream;
use super::status::PassProgress;
use crate::engine::request::PassRead;
use afterimage_format::chain::RecordChain;
use afterimage_format::ids::{BLOCK_SIZE, DiskIndex, Lsn};
use afterimage_format::segment::{
    PushError, SEGMENT_PAYLOAD_TARGET, SealedSegment, SegmentBuilder, SegmentKind,
};
use afterimage_format::wire::ActivePass;
use std::collections::VecDeque;
use std::ops::Range;

/// Blocks of one read.
pub const PASS_READ_BLOCKS: u32 = 256;

/// Ranges asked for at a time.
pub const PASS_RANGES_MAX: usize = 1024;

/// What the pass needs next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// The allocated ranges of a disk from a block on.
    Ranges(DiskIndex, u64),
    /// These blocks.
    Read(DiskIndex, u64, u32),
    /// Nothing: every block was read, every segment handed out.
    Done,
}

/// A segment of a pass that may leave once the log is durable to `durable_after`.
#[derive(Clone, Debug)]
pub struct PassSegment {
    /// The segment.
    pub sealed: SealedSegment,
    /// See above.
    pub durable_after: Lsn,
}

/// A pass under way.
pub struct Pass {
    stream: Stream,
    /// LSN of its `PassBegin`.
    begin: Lsn,
    /// Size in blocks of each disk.
    disk_blocks: Vec<u64>,
    disk: u16,
    block: u64,
    ranges: VecDeque<Range<u64>>,
    blocks_sent: u64,
    chain: RecordChain,
    open: Option<SegmentBuilder>,
    durable_after: Lsn,
    progress: PassProgress,
}

impl Pass {
    /// A pass that begins, or goes on where the sink durably has it.
    #[must_use]
    pub fn new(stream: Stream, disk_bytes: &[u64], at: &ActivePass) -> Self {
        Self {
            stream,
            begin: at.begin,
            disk_blocks: disk_bytes
                .iter()
                .map(|bytes| bytes.div_ceil(BLOCK_SIZE as u64))
                .collect(),
            disk: at.next_disk.0,
            block: at.next_block,
            ranges: VecDeque::new(),
            blocks_sent: at.blocks,
            chain: at.chain,
            open: None,
            durable_after: Lsn::ZERO,
            progress: PassProgress {
                begin: at.begin,
                blocks_sent: at.blocks,
                ..PassProgress::default()
            },
        }
    }

    /// The beginning of a pass.
    #[must_use]
    pub fn start(begin: Lsn) -> ActivePass {
        ActivePass {
            begin,
            next_disk: DiskIndex(0),
            next_block: 0,
            blocks: 0,
            chain: RecordChain::BASE,
        }
    }

    /// LSN of its `PassBegin`.
    #[must_use]
    pub fn begin(&self) -> Lsn {
        self.begin
    }

    /// Disk and block from which it goes on.
    #[must_use]
    pub fn position(&self) -> (DiskIndex, u64) {
        (DiskIndex(self.disk), self.block)
    }

    /// Blocks and chain of all segments handed out: what `PassEnd` says.
    #[must_use]
    pub fn totals(&self) -> (u64, RecordChain) {
        (self.blocks_sent, self.chain)
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> PassProgress {
        self.progress
    }

    /// Says how many allocated blocks are still to come, for people.
    pub fn expect_blocks(&mut self, blocks: u64) {
        self.progress.blocks_left = blocks;
    }

    /// What is needed next.
    #[must_use]
    pub fn next_step(&self) -> Step {
        if usize::from(self.disk) >= self.disk_blocks.len() {
            return Step::Done;
        }
        match self.ranges.front() {
            None => Step::Ranges(DiskIndex(self.disk), self.block),
            Some(range) => {
                let first = range.start.max(self.block);
                let count = (range.end - first).min(u64::from(PASS_READ_BLOCKS));
                Step::Read(DiskIndex(self.disk), first, count as u32)
            }
        }
    }

    /// Answer to [`Step::Ranges`]. No ranges end the disk. Whatever lies before the place asked
    /// for or behind the disk's end is left out. The last segment is closed with the last disk.
    pub fn take_ranges(&mut self, ranges: Vec<Range<u64>>) -> Option<PassSegment> {
        let end = self.disk_blocks[usize::from(self.disk)];
        let mut from = self.block;
        for range in ranges {
            let range = range.start.max(from)..range.end.min(end);
            if !range.is_empty() {
                from = range.end;
                self.ranges.push_back(range);
            }
        }
        if !self.ranges.is_empty() {
            return None;
        }
        (self.disk, self.block) = (self.disk + 1, 0);
        if usize::from(self.disk) < self.disk_blocks.len() {
            return None;
        }
        self.progress.blocks_left = 0;
        self.close()
    }

    /// Answer to [`Step::Read`].
    ///
    /// # Errors
    /// The blocks are not those asked for, or were read before the pass began.
    pub fn take_read(&mut self, read: &PassRead) -> Result<Option<PassSegment>, PushError> {
        let Step::Read(disk, first, count) = self.next_step() else {
            return Err(PushError::Order(read.lsn));
        };
        let asked = (disk, first, count as usize * BLOCK_SIZE);
        if (read.disk, read.first_block, read.data.len()) != asked {
            return Err(PushError::Malformed(read.lsn));
        }
        let blocks = read.data.chunks_exact(BLOCK_SIZE);
        let zero: Vec<bool> = blocks.map(|block| block.iter().all(|b| *b == 0)).collect();
        let mut at = 0;
        for run in zero.chunk_by(|a, b| a == b) {
            if !run[0] {
                let data = &read.data[at * BLOCK_SIZE..(at + run.len()) * BLOCK_SIZE];
                self.push(read, first + at as u64, data)?;
            }
            at += run.len();
        }
        self.block = first + u64::from(count);
        if self.ranges.front().is_some_and(|r| r.end <= self.block) {
            self.ranges.pop_front();
        }
        self.progress.blocks_done += u64::from(count);
        self.progress.blocks_left = self.progress.blocks_left.saturating_sub(count.into());
        let payload = self.open.as_ref().map_or(0, SegmentBuilder::payload_bytes);
        Ok(if payload >= SEGMENT_PAYLOAD_TARGET {
            self.close()
        } else {
            None
        })
    }

    fn push(&mut self, read: &PassRead, first: u64, data: &[u8]) -> Result<(), PushError> {
        let mut spec = self.stream.spec(SegmentKind::Pass, self.chain);
        spec.pass = self.begin;
        let open = self.open.get_or_insert_with(|| SegmentBuilder::new(spec));
        open.push_pass_blocks(read.disk, first, read.lsn, data)?;
        let blocks = (data.len() / BLOCK_SIZE) as u64;
        self.blocks_sent += blocks;
        self.progress.blocks_sent += blocks;
        self.durable_after = self.durable_after.max(read.durable_after).max(read.lsn);
        Ok(())
    }

    fn close(&mut self) -> Option<PassSegment> {
        let open = self.open.take()?;
        self.chain = open.chain();
        open.seal().map(|sealed| PassSegment {
            sealed,
            durable_after: self.durable_after,
        })
    }
}
