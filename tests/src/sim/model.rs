//! What the disks hold after every record of a log, as far as the simulation has seen the log.
//!
//! Built from the records themselves, each of which was checked against the requests of the clients
//! before it is taken in ([`super::clients`]). Records that a power cut took are taken out again;
//! their LSNs may come back with other content, which nobody may have seen. What somebody writes to
//! a disk past the log stands behind the last record before it: the primary's disks have it from
//! there on, a replica's points from the record after that.

use afterimage_format::ids::{BLOCK_SIZE, LogId};
use std::collections::BTreeSet;
use std::ops::{Range, RangeInclusive};
use std::rc::Rc;

const BLOCK: u64 = BLOCK_SIZE as u64;
const SECTOR: usize = 512;

/// One version of a block: from which record on, and its bytes (none for zeroes).
#[derive(Clone)]
struct Version {
    lsn: u64,
    /// Written past the log, behind the record.
    past_the_log: bool,
    bytes: Option<Rc<[u8]>>,
}

/// The content of a group's disks after each record of one log.
#[derive(Clone)]
pub struct LogModel {
    /// Which log.
    pub log: LogId,
    /// Last record taken in.
    pub head: u64,
    sizes: Vec<u64>,
    blocks: Vec<Vec<Vec<Version>>>,
    /// Records that are checkpoints.
    checkpoints: BTreeSet<u64>,
}

/// A block's bytes.
pub enum Content<'a> {
    /// All zero.
    Zero,
    /// These.
    Bytes(&'a [u8]),
}

impl Content<'_> {
    /// Whether a part of the block is `bytes`.
    #[must_use]
    pub fn has(&self, at: usize, bytes: &[u8]) -> bool {
        match self {
            Self::Zero => bytes.iter().all(|byte| *byte == 0),
            Self::Bytes(content) => &content[at..at + bytes.len()] == bytes,
        }
    }

    /// Copies the block.
    pub fn copy_to(&self, into: &mut [u8]) {
        match self {
            Self::Zero => into.fill(0),
            Self::Bytes(content) => into.copy_from_slice(&content[..into.len()]),
        }
    }
}

impl LogModel {
    /// Disks of zeroes and a log without records.
    #[must_use]
    pub fn new(log: LogId, sizes: &[u64]) -> Self {
        Self {
            log,
            head: 0,
            sizes: sizes.to_vec(),
            blocks: sizes
                .iter()
                .map(|size| vec![Vec::new(); size.div_ceil(BLOCK) as usize])
                .collect(),
            checkpoints: BTreeSet::new(),
        }
    }

    /// Sizes of the disks in bytes.
    #[must_use]
    pub fn sizes(&self) -> &[u64] {
        &self.sizes
    }

    /// Bytes of a block that lie within its disk.
    #[must_use]
    pub fn valid(&self, disk: usize, block: u64) -> usize {
        (self.sizes[disk] - block * BLOCK).min(BLOCK) as usize
    }

    /// A block of the primary's disk as of a record.
    #[must_use]
    pub fn block(&self, disk: usize, block: u64, lsn: u64) -> Content<'_> {
        self.block_before(disk, block, (lsn, true))
    }

    fn block_before(&self, disk: usize, block: u64, last: (u64, bool)) -> Content<'_> {
        let versions = &self.blocks[disk][block as usize];
        let after = versions.partition_point(|version| (version.lsn, version.past_the_log) <= last);
        match after.checked_sub(1).map(|at| &versions[at].bytes) {
            Some(Some(bytes)) => Content::Bytes(bytes),
            _ => Content::Zero,
        }
    }

    /// Whether a part of a block was `bytes` at some record of `from..=to`.
    #[must_use]
    pub fn was(
        &self,
        (disk, block): (usize, u64),
        at: usize,
        bytes: &[u8],
        from: u64,
        to: u64,
    ) -> bool {
        let versions = &self.blocks[disk][block as usize];
        self.block(disk, block, from).has(at, bytes)
            || versions
                .iter()
                .filter(|version| from < version.lsn && version.lsn <= to)
                .any(|version| match &version.bytes {
                    None => Content::Zero.has(at, bytes),
                    Some(content) => Content::Bytes(content).has(at, bytes),
                })
    }

    /// A record brought new content for a block; none for zeroes.
    pub fn set(&mut self, disk: usize, block: u64, lsn: u64, bytes: Option<&[u8]>) {
        self.push(disk, block, (lsn, false), bytes);
    }

    /// Somebody wrote a block past the log, behind the last record.
    pub fn edit(&mut self, disk: usize, block: u64, bytes: &[u8]) {
        self.push(disk, block, (self.head, true), Some(bytes));
    }

    fn push(&mut self, disk: usize, block: u64, at: (u64, bool), bytes: Option<&[u8]>) {
        self.blocks[disk][block as usize].push(Version {
            lsn: at.0,
            past_the_log: at.1,
            bytes: bytes.map(Rc::from),
        });
    }

    /// Records behind this one never were.
    pub fn truncate(&mut self, lsn: u64) {
        for versions in self.blocks.iter_mut().flatten() {
            while versions.last().is_some_and(|version| version.lsn > lsn) {
                versions.pop();
            }
        }
        self.checkpoints.retain(|at| *at <= lsn);
        self.head = self.head.min(lsn);
    }

    /// A record is a checkpoint.
    pub fn add_checkpoint(&mut self, lsn: u64) {
        self.checkpoints.insert(lsn);
    }

    /// The checkpoints of a range, ascending.
    #[must_use]
    pub fn checkpoints(&self, range: RangeInclusive<u64>) -> Vec<u64> {
        self.checkpoints.range(range).copied().collect()
    }

    /// The first block in which a disk of the primary differs from what it was at a record.
    #[must_use]
    pub fn differs(&self, disk: usize, lsn: u64, content: &[u8]) -> Option<u64> {
        self.differs_from(disk, (lsn, true), content)
    }

    /// The first block in which a disk of a replica's point differs from what the records up to
    /// there made of it.
    #[must_use]
    pub fn point_differs(&self, disk: usize, lsn: u64, content: &[u8]) -> Option<u64> {
        self.differs_from(disk, (lsn, false), content)
    }

    fn differs_from(&self, disk: usize, last: (u64, bool), content: &[u8]) -> Option<u64> {
        let mut blocks = (0..).zip(content.chunks(BLOCK_SIZE));
        blocks
            .find(|(block, bytes)| !self.block_before(disk, *block, last).has(0, bytes))
            .map(|(block, _)| block)
    }

    /// The first block with a sector that is neither as it was at one of these records nor torn
    /// between two of them.
    #[must_use]
    pub fn differs_from_all(
        &self,
        disk: usize,
        lsns: RangeInclusive<u64>,
        content: &[u8],
    ) -> Option<u64> {
        let mut sectors = (0..).step_by(SECTOR).zip(content.chunks(SECTOR));
        sectors.find_map(|(start, bytes): (usize, _)| {
            let block = start / BLOCK_SIZE;
            let versions = self.blocks[disk][block].iter().map(|version| version.lsn);
            let versions = versions.filter(|lsn| lsns.contains(lsn));
            let (mut begins, mut ends) = (0, 0);
            for lsn in versions.chain([*lsns.start()]) {
                let content = self.block(disk, block as u64, lsn);
                let same = |part: &Range<usize>| {
                    content.has(start % BLOCK_SIZE + part.start, &bytes[part.clone()])
                };
                let begin = (0..=bytes.len()).rev().find(|cut| same(&(0..*cut)));
                let end = (0..=bytes.len()).find(|cut| same(&(*cut..bytes.len())));
                begins = begins.max(begin.unwrap_or(0));
                ends = ends.max(bytes.len() - end.unwrap_or(bytes.len()));
            }
            (begins + ends < bytes.len()).then_some(block as u64)
        })
    }

    /// For messages: at which records a block's content was the one given.
    #[must_use]
    pub fn when(&self, disk: usize, block: u64, bytes: &[u8]) -> String {
        let versions = &self.blocks[disk][block as usize];
        let lsns: Vec<u64> = versions.iter().map(|version| version.lsn).collect();
        let same = |lsn: &&u64| self.block(disk, block, **lsn).has(0, bytes);
        match lsns.iter().find(same) {
            Some(lsn) => format!("its content of record {lsn}; it was written by {lsns:?}"),
            None if bytes.iter().all(|byte| *byte == 0) => {
                format!("zeroes; it was written by {lsns:?}")
            }
            None => format!("content it never had; it was written by {lsns:?}"),
        }
    }
}
